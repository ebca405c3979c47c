"""Other machines: the tool that stands for them finds what hangs on the machine; a slice of the lessons does not."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT / "tests" / "tools" / "other_machines.py"
spec = importlib.util.spec_from_file_location("other_machines", TOOL)
machines = importlib.util.module_from_spec(spec)
sys.modules["other_machines"] = machines  # its dataclass looks itself up there
spec.loader.exec_module(machines)

SLICE = ["08", "09", "11", "11b", "14"]  # long sums, two diffusions, halves, thresholds, pictures and readings
OLD = "capability-default+threads-1"

STABLE = "print(6 * 7)"
ZONE = "import time\nprint(time.timezone)"
SEEDED = "print(len({'a', 'b'}), sorted({'a', 'b'}))"
ORDER = "print([hash(str(k)) % 7 for k in range(9)])"
IGNORED = "# NBVAL_IGNORE_OUTPUT\nimport os\nprint(os.environ.get('TZ'))"
CELLS = (STABLE, ZONE, SEEDED, ORDER, IGNORED)


def tiny_project(folder: Path, environment: dict[str, str], sources: tuple[str, ...] = CELLS) -> Path:
    """A clone with one lesson, whose stored outputs are those of a run in this environment."""
    (folder / "notebooks").mkdir(parents=True)
    (folder / "tests").mkdir()
    shutil.copy(ROOT / "conftest.py", folder)
    shutil.copy(ROOT / "tests" / "nbval_sanitize.cfg", folder / "tests")
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    notebook = nbformat.v4.new_notebook(cells=cells)
    for count, cell in enumerate(notebook.cells, start=1):
        shown = subprocess.run([sys.executable, "-c", cell.source], env=environment, capture_output=True, text=True)
        cell.execution_count, cell.outputs = count, [nbformat.v4.new_output("stream", text=shown.stdout)]
    nbformat.write(notebook, folder / "notebooks" / "01_tiny.ipynb")
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_project(tmp_path_factory.mktemp("tiny") / "clone", {**os.environ, "TZ": "UTC", "PYTHONHASHSEED": "0"})


@pytest.mark.parametrize(
    ("name", "cells"),
    [("native", []), ("time-zone", [1]), ("hash-seed", [3]), ("hash-seed+time-zone", [1, 3])],
)
def test_cells_that_hang_on_the_machine_are_found_and_no_others(tiny, monkeypatch, name, cells):
    monkeypatch.setenv("TZ", "UTC")
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    found = machines.run(name, ["notebooks/01_tiny.ipynb"], root=tiny)
    assert {lesson: sorted(differ) for lesson, differ in found.items()} == {"01_tiny": cells}
    assert all("disagrees" in text or "mismatch" in text for text in found["01_tiny"].values())


def test_a_kernel_that_dies_is_not_waited_for(tmp_path):
    place = tiny_project(tmp_path / "clone", dict(os.environ), ("import os\nos._exit(1)", STABLE))
    found = machines.run("native", ["notebooks/01_tiny.ipynb"], root=place)  # the limit of a cell is an hour
    assert list(found["01_tiny"]) == [0]  # nbval expects nothing of the cells after it


def in_process(code: str, names: str, tmp_path: Path) -> str:
    """What a process prints under the named perturbations."""
    environment = machines.environment(machines.parts(names), tmp_path)
    result = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_mkldnn_and_the_capability_are_what_they_are_called(tmp_path):
    code = "import torch\nprint(torch._C._get_mkldnn_enabled(), torch.backends.cpu.get_cpu_capability())"
    assert in_process(code, "mkldnn-off+capability-default", tmp_path) == "False DEFAULT"
    assert in_process(code, "native", tmp_path).startswith("True")


def test_noise_is_small_seeded_and_on_the_project_s_weights_alone(tmp_path):
    file = ROOT / "data" / "weights" / "classroom" / "vae.safetensors"
    copy = shutil.copy(file, tmp_path / "copy.safetensors")
    code = f"""
from safetensors.torch import load_file
noisy, again, plain = (load_file(file) for file in ({str(file)!r}, {str(file)!r}, {str(copy)!r}))
name, value = max(plain.items(), key=lambda item: item[1].numel())
apart = ((noisy[name] - value.float()).abs() / value.float().abs().clamp(min=1e-9)).max().item()
print(noisy[name].equal(again[name]), 1e-7 < apart < 1e-5)"""
    assert in_process(code, "weight-noise", tmp_path) == "True True"


def test_hidden_fonts_are_not_found(tmp_path):
    code = """
from difftsr.text_lines import find_fonts, font_folders, package_font_folders
print(any(folder.startswith("/usr") for folder in font_folders()), len(find_fonts(package_font_folders())) > 0)"""
    assert in_process(code, "fonts-hidden", tmp_path) == "False True"


def test_a_busy_process_ends_with_its_block():
    with machines.busy_process(False) as none:
        assert none is None
    with pytest.raises(KeyError), machines.busy_process(True) as process:
        assert process.poll() is None
        raise KeyError  # whatever ends the block
    assert process.poll() is not None


def test_runs_of_single_lessons_keep_the_others(tmp_path):
    file, machine = tmp_path / "machines.json", {"machine": "one", "torch": "2.6"}
    machines.store(file, "threads-1", machine, {"01_a": {3: "x", 1: "y"}, "02_b": {}})
    machines.store(file, "threads-1", machine, {"02_b": {7: "z"}})
    machines.store(file, "threads-1", machine | {"torch": "2.13"}, {"02_b": {}})
    stored = json.loads(file.read_text(encoding="utf-8"))
    assert stored["runs"]["threads-1 (machine 1)"] == {"01_a": [1, 3], "02_b": [7]}
    assert stored["runs"]["threads-1 (machine 2)"] == {"02_b": []}


def test_unknown_names_are_refused():
    with pytest.raises(SystemExit, match="no such perturbation"):
        machines.parts("threads-1+moon")
    with pytest.raises(SystemExit, match="no such lesson"):
        machines.lesson_files(["08", "99"])


def test_a_slice_of_the_lessons_shows_the_same_on_the_oldest_processor():
    """Sums in another order, without vectors and on one thread: what is stored must not hang on it."""
    found = machines.run(OLD, machines.lesson_files(SLICE))
    told = [f"{lesson}: cell {cell}\n{text}" for lesson, cells in found.items() for cell, text in cells.items()]
    assert len(found) == len(SLICE) and not told, "\n".join(told)
