"""Keep lessons, texts and package in step.

    python tests/maintain.py sync [NAME ...]       make each notebook and its text agree; fill badge, set-up, needs
    python tests/maintain.py export [NAME ...]     write the modules of difftsr/ from the notebooks
    python tests/maintain.py exercises [NAME ...]  write exercises/ from the lessons: the tasks without their solutions
    python tests/maintain.py run [NAME ...]        sync, export, then execute each notebook in a fresh kernel
    python tests/maintain.py needs [NAME ...]      sync, and fill the table of README.md: minutes and memory as measured
    python tests/maintain.py check [NAME ...]      say what is out of step, and exit with 1 if anything is

NAME is a lesson such as 04_vae, or just its number. Without names every lesson is meant. Only what is named is
touched, and every file is written under a temporary name and moved, so several people may work at once.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import jupytext
import nbformat
from jupytext.combine import combine_inputs_with_outputs
from nbformat import NotebookNode

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
LESSONS = ROOT / "notebooks"
EXERCISES = ROOT / "exercises"
PACKAGE = ROOT / "difftsr"
TEXT_FORMAT = "py:percent"
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
GITHUB_SHOWS = re.compile(r"text/(plain|markdown|latex)|image/(png|jpeg|gif|svg\+xml)")  # HTML loses styles and scripts
METADATA = {
    "jupytext": {
        "cell_metadata_filter": "tags,-all",
        "formats": "ipynb,py:percent",
        "notebook_metadata_filter": "kernelspec,-all",
    },
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
MAX_NOTEBOOK_BYTES = 1_000_000
MAX_TRACKED_BYTES = 60_000_000
CELL_SECONDS = 3600  # ends what hangs, not what is slow
KERNEL_SECONDS = 600
BENCHMARK = ROOT / "data" / "benchmarks" / "lessons.json"  # written by tests/bench_lessons.py
NEEDS = re.compile(r"[\d.]+\s+minutes?\s+and\s+[\d.]+\s+GB\s+of\s+memory\s+on\s+two\s+CPU\s+cores")
TABLES = ("README.md", "README.zh.md")  # rows "| number | ... | minutes, memory |"
ABSOLUTE_PATH = re.compile(r"(?<![\w.\-:/~])/(?:home|root|tmp|work|Users)(?=/)|\b[A-Z]:\\\w+\\")

SETUP = """\
# On Colab this fetches the project and installs what Colab lacks; elsewhere it only makes `import difftsr` work.
import importlib.util
import os
import subprocess
import sys

if "google.colab" in sys.modules:
    if not os.path.isdir("/content/{project}/notebooks"):
        clone = ["git", "clone", "--quiet", "--depth", "1", "{address}", "/content/{project}"]
        subprocess.run(clone, check=True)
    os.chdir("/content/{project}/{folder}")
    needed = {{
{needed}
    }}
    missing = [package for module, package in needed.items() if importlib.util.find_spec(module) is None]
    if missing:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "-c", "../constraints.txt"]
        subprocess.run(pip + missing, check=True)
        importlib.invalidate_caches()
if os.path.dirname(os.getcwd()) not in sys.path:
    sys.path.insert(0, os.path.dirname(os.getcwd()))"""
BADGE = (
    "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
    "(https://colab.research.google.com/github/{repository}/blob/main/{folder}/{name}.ipynb)"
)
SOLUTION = re.compile(r"^([ \t]*)### BEGIN SOLUTION\n(.*?)^[ \t]*### END SOLUTION[ \t]*$", re.MULTILINE | re.DOTALL)
STUB = re.compile(r"^[ \t]*### STUB: ?(.*)$", re.MULTILINE)
HOW_TO = """\
Each task has a cell that waits for your code and a cell that checks it: it prints *right*, or what is not right yet.
The tasks come from [the lesson](../notebooks/{name}.ipynb), where each solution lies folded away. The words and symbols
stand in the [glossary](../notebooks/GLOSSARY.md)."""


def lessons(names: list[str] | None = None) -> list[str]:
    """The stems of the named lessons, in order; of all lessons (those with a text or a notebook) without names."""
    found = sorted({path.stem for end in ("py", "ipynb") for path in LESSONS.glob(f"[0-9][0-9]*_*.{end}")})
    if not names:
        return found
    chosen = []
    for name in names:
        stem = Path(name).stem
        matches = [lesson for lesson in found if stem in (lesson, lesson.split("_")[0])]
        if not matches:
            raise SystemExit(f"{name}: no such lesson in notebooks/")
        chosen += matches
    return chosen


def write(path: Path, text: str) -> bool:
    """Write `text` under a temporary name and move it; leave an equal file alone. True when the file changed."""
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return False
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
    return True


def notebook_text(notebook: NotebookNode) -> str:
    return nbformat.writes(notebook, version=4) + "\n"


def read_text(path: Path) -> NotebookNode:
    return jupytext.reads(path.read_text(encoding="utf-8"), fmt=TEXT_FORMAT)


def read_notebook(path: Path) -> NotebookNode:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nbformat.read(path, as_version=4)


def tags(cell: NotebookNode) -> list[str]:
    return list(cell.metadata.get("tags", []))


def contents(notebook: NotebookNode) -> list[tuple[str, str, tuple[str, ...]]]:
    """What a notebook and its text must agree on: type, source and tags of every cell."""
    return [(cell.cell_type, cell.source, tuple(tags(cell))) for cell in notebook.cells]


# ---------------------------------------------------------------- badge and set-up cell, written from pyproject.toml


def settings() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def badge_and_setup(name: str, folder: str = "notebooks") -> tuple[str, str]:
    """The sources of the Colab badge and of the set-up cell of one lesson, or of its notebook in another folder."""
    project = settings()
    address = project["project"]["urls"]["Repository"].rstrip("/")
    packages = project["tool"]["difftsr"]["colab"]
    needed = "\n".join(f'        "{module}": "{package}",' for module, package in sorted(packages.items()))
    badge = BADGE.format(repository=address.split("://", 1)[1].split("/", 1)[1], folder=folder, name=name)
    return badge, SETUP.format(project=address.rsplit("/", 1)[1], address=address, folder=folder, needed=needed)


def fill(notebook: NotebookNode, name: str) -> None:
    """Write the badge and the set-up cell into their tagged cells, adding the cells where they are missing."""
    badge, setup = badge_and_setup(name)
    cells = notebook.cells
    places = {tag: index for index, cell in enumerate(cells) for tag in tags(cell) if tag in ("badge", "setup")}
    if "setup" not in places:
        first_code = next((i for i, cell in enumerate(cells) if cell.cell_type == "code"), len(cells))
        cells.insert(first_code, nbformat.v4.new_code_cell(metadata={"tags": ["setup"]}))
        places["setup"] = first_code
    if "badge" not in places:
        cells.insert(places["setup"], nbformat.v4.new_markdown_cell(metadata={"tags": ["badge"]}))
    opening = opening_with_needs(notebook)
    if opening is not None and (needed := minutes_and_memory(name)):
        opening.source = NEEDS.sub("{} and {} of memory on two CPU cores".format(*needed), opening.source)
    for cell in cells:
        if "badge" in tags(cell):
            cell.source = badge
        elif "setup" in tags(cell):
            cell.source = setup


# ---------------------------------------------------------------- what a lesson needs, written from the benchmark


def minutes_and_memory(name: str) -> tuple[str, str] | None:
    """("1.5 minutes", "0.9 GB") of a lesson, rounded up to half a minute and a tenth of a GB; None if not measured."""
    measured = json.loads(BENCHMARK.read_text(encoding="utf-8"))["lessons"] if BENCHMARK.exists() else {}
    if name not in measured:
        return None
    minutes = math.ceil(measured[name]["seconds"] / 30) / 2
    gigabytes = math.ceil(measured[name]["peak_mb"] / 100) / 10
    return f"{minutes:g} minute{'s' if minutes != 1 else ''}", f"{gigabytes:g} GB"


def opening_with_needs(notebook: NotebookNode) -> NotebookNode | None:
    """The first markdown cell that says what the lesson needs."""
    return next((cell for cell in notebook.cells if cell.cell_type == "markdown" and NEEDS.search(cell.source)), None)


def filled_table(text: str, names: list[str]) -> str:
    """A README with the last cell of each named lesson's row as measured; units in English or in Chinese, as found."""
    for name in names:
        if needed := minutes_and_memory(name):
            chinese = f"{needed[0].split()[0]} 分钟，{needed[1]}"
            for old, new in ((r"[\d.]+ minutes?, [\d.]+ GB", ", ".join(needed)), (r"[\d.]+ 分钟，[\d.]+ GB", chinese)):
                row = re.compile(rf"^(\| {name.split('_')[0]} \|.*\|) {old} \|$", re.MULTILINE)
                text = row.sub(rf"\1 {new} |", text)
    return text


def fill_tables(names: list[str]) -> None:
    for path in (ROOT / table for table in TABLES):
        if path.exists() and write(path, filled_table(path.read_text(encoding="utf-8"), names)):
            print(f"{path.name}: minutes and memory as measured")


# ---------------------------------------------------------------- sync, export, run


def tidy(notebook: NotebookNode) -> None:
    """Drop what differs between machines or bloats a diff: metadata other than tags, widget state, timings.

    Solutions are folded away.
    """
    notebook.metadata = nbformat.from_dict(METADATA)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({"tags": tags(cell)} if tags(cell) else {})
        if "solution" in tags(cell):
            cell.metadata.jupyter = nbformat.from_dict({"source_hidden": True})
        for output in cell.get("outputs", []):
            output.get("data", {}).pop(WIDGET_VIEW, None)
            if "metadata" in output:
                output.metadata.pop(WIDGET_VIEW, None)


def sync(name: str) -> NotebookNode:
    """Make text and notebook of a lesson agree: the text wins, unless the notebook was edited after it.

    Cell ids stay. A code cell that changed loses its stored outputs, so that `check` asks for a new run.
    """
    text_path, notebook_path = LESSONS / f"{name}.py", LESSONS / f"{name}.ipynb"
    old = read_notebook(notebook_path) if notebook_path.exists() else None
    if not text_path.exists():
        notebook = old
    else:
        text = read_text(text_path)
        edited = old is not None and notebook_path.stat().st_mtime_ns > text_path.stat().st_mtime_ns
        if edited and contents(old) != contents(text):
            notebook = old
            print(f"{name}: the notebook is newer than its text, so the text is written from it")
        elif old is not None:
            runs = {cell.id: cell.source for cell in old.cells if cell.cell_type == "code"}
            notebook = combine_inputs_with_outputs(text, old, fmt=TEXT_FORMAT)
            for cell in notebook.cells:
                if cell.cell_type == "code" and runs.get(cell.id) != cell.source:
                    cell.outputs, cell.execution_count = [], None
        else:
            notebook = text
    fill(notebook, name)
    tidy(notebook)
    changed_text = write(text_path, jupytext.writes(notebook, fmt=TEXT_FORMAT))
    changed_notebook = write(notebook_path, notebook_text(notebook))
    level_times(text_path, notebook_path)
    if changed_text or changed_notebook:
        print(f"{name}: synced")
    return notebook


def level_times(text_path: Path, notebook_path: Path) -> None:
    """Give the notebook its text's time, so that whichever of the two is edited next is the newer one."""
    moment = text_path.stat().st_mtime_ns
    os.utime(notebook_path, ns=(moment, moment))


def fresh_export(names: list[str]) -> dict[str, str]:
    """Module file name -> text, exported by nbdev into a temporary folder that has the project's layout."""
    from nbdev.export import nb_export

    os.chdir(ROOT)  # nbdev looks for its settings from here
    modules = {}
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "difftsr"
        for path in (Path(folder) / "notebooks", library):
            path.mkdir()
        for name in names:
            copy = Path(folder) / "notebooks" / f"{name}.ipynb"
            copy.write_bytes((LESSONS / f"{name}.ipynb").read_bytes())
            nb_export(copy, lib_path=library)
        for path in sorted(library.rglob("*.py")):
            modules[path.relative_to(library).as_posix()] = path.read_text(encoding="utf-8")
    return modules


def export(name: str) -> None:
    for module, text in fresh_export([name]).items():
        if write(PACKAGE / module, text):
            print(f"{name}: wrote difftsr/{module}")


def client_for(notebook: NotebookNode):
    """What executes a lesson in a fresh kernel, from the folder of the lessons."""
    from nbclient import NotebookClient

    return NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        startup_timeout=KERNEL_SECONDS,
        kernel_name="python3",
        extra_arguments=["--log-level=ERROR"],
        resources={"metadata": {"path": str(LESSONS)}},
        record_timing=False,
        store_widget_state=False,
        coalesce_streams=True,
    )


def run(name: str) -> bool:
    """Execute a lesson in a fresh kernel and store what it showed. False, and nothing stored, when a cell fails."""
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    notebook = sync(name)
    export(name)
    text_path, notebook_path = LESSONS / f"{name}.py", LESSONS / f"{name}.ipynb"
    moment = text_path.stat().st_mtime_ns
    print(f"{name}: running {sum(cell.cell_type == 'code' for cell in notebook.cells)} cells", flush=True)
    start = time.perf_counter()
    try:
        client_for(notebook).execute()
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        print(f"{error}\n{name}: FAILED after {time.perf_counter() - start:.0f} s, nothing stored", flush=True)
        return False
    tidy(notebook)
    write(notebook_path, notebook_text(notebook))
    os.utime(notebook_path, ns=(moment, moment))  # a text edited meanwhile is the newer one and wins at the next sync
    print(f"{name}: {time.perf_counter() - start:.1f} s", flush=True)
    return True


# ---------------------------------------------------------------- exercises


def exercise_section(notebook: NotebookNode) -> list[NotebookNode]:
    """The cells from "## Exercises" to the next heading of that level; empty where a lesson has no tasks in code."""
    headings = [
        (index, cell.source.split("\n", 1)[0])
        for index, cell in enumerate(notebook.cells)
        if cell.cell_type == "markdown" and cell.source.startswith("## ")
    ]
    start = next((index for index, heading in headings if heading == "## Exercises"), len(notebook.cells))
    end = next((index for index, _ in headings if index > start), len(notebook.cells))
    section = notebook.cells[start:end]
    return section if any("solution" in tags(cell) for cell in section) else []


def stub(source: str) -> str:
    """A solution cell with the lines that a learner writes replaced by those of its `### STUB:` comments.

    Raises `ValueError` for a cell without such a part.
    """

    def replaced(match: re.Match) -> str:
        lines = STUB.findall(match[2])
        if not lines:
            raise ValueError("a solution lacks a line '### STUB: code'")
        return "\n".join(match[1] + line for line in ["# your code here", *lines])

    text, count = SOLUTION.subn(replaced, source)
    if not count:
        raise ValueError("a solution lacks '### BEGIN SOLUTION' and '### END SOLUTION'")
    return text


def exercise_notebook(name: str) -> NotebookNode | None:
    """The tasks of a lesson as a notebook of their own, without solutions and outputs; None where it has none."""
    lesson = read_text(LESSONS / f"{name}.py")
    section = exercise_section(lesson)
    if not section:
        return None
    title = lesson.cells[0].source.split("\n", 1)[0].removeprefix("# ")
    badge, setup = badge_and_setup(name, EXERCISES.name)
    cells = [
        nbformat.v4.new_markdown_cell(f"# Exercises · {title}\n\n{badge}\n\n{HOW_TO.format(name=name)}"),
        nbformat.v4.new_code_cell(setup),
    ]
    for cell in section[1:]:
        if cell.cell_type == "markdown":
            from_here = re.sub(r"\]\((?=\w+\.(ipynb|md))", "](../notebooks/", cell.source)
            cells.append(nbformat.v4.new_markdown_cell(from_here))
        else:
            cells.append(nbformat.v4.new_code_cell(stub(cell.source) if "solution" in tags(cell) else cell.source))
    for number, cell in enumerate(cells):
        cell.id = f"cell-{number}"
    alone = METADATA | {"jupytext": {"formats": "ipynb"}}  # JupyterLab shall write no text beside it
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=nbformat.from_dict(alone))
    notebook.nbformat_minor = 5
    return notebook


def write_exercises(name: str) -> None:
    notebook = exercise_notebook(name)
    if notebook is not None:
        EXERCISES.mkdir(exist_ok=True)
        if write(EXERCISES / f"{name}.ipynb", notebook_text(notebook)):
            print(f"{name}: wrote {EXERCISES.name}/{name}.ipynb")


# ---------------------------------------------------------------- check


def check_pairs(names: list[str]) -> Iterator[str]:
    for name in names:
        text_path, notebook_path = LESSONS / f"{name}.py", LESSONS / f"{name}.ipynb"
        for path in (text_path, notebook_path):
            if not path.exists():
                yield f"notebooks/{path.name}: missing; its pair stands alone (make sync)"
        if not (text_path.exists() and notebook_path.exists()):
            continue
        text, notebook = contents(read_text(text_path)), contents(read_notebook(notebook_path))
        if len(text) != len(notebook):
            yield f"notebooks/{name}.py: {len(text)} cells, but {len(notebook)} in its notebook (make sync)"
        for number, (ours, theirs) in enumerate(zip(text, notebook, strict=False), start=1):
            if ours != theirs:
                yield f"notebooks/{name}.py: cell {number} differs from its notebook (make sync)"
                break


def output_texts(cell: NotebookNode) -> Iterator[str]:
    for output in cell.get("outputs", []):
        yield str(output.get("text", ""))
        yield "\n".join(output.get("traceback", []))
        for mime, value in output.get("data", {}).items():
            if not mime.startswith("image/") or mime == "image/svg+xml":
                yield str(value)


def check_notebooks(names: list[str]) -> Iterator[str]:
    for name in names:
        path = LESSONS / f"{name}.ipynb"
        if not path.exists():
            continue
        where, notebook = f"notebooks/{name}.ipynb", read_notebook(path)
        if path.stat().st_size > MAX_NOTEBOOK_BYTES:
            yield f"{where}: {path.stat().st_size / 1e6:.2f} MB; at most 1 MB is allowed"
        if "widgets" in notebook.metadata:
            yield f"{where}: holds widget state, which can stop GitHub from showing it (make run)"
        badge, setup = badge_and_setup(name)
        sources = {tag: cell.source for cell in notebook.cells for tag in tags(cell)}
        if sources.get("badge") != badge or sources.get("setup") != setup:
            yield f"{where}: the badge or the set-up cell is not the current one (make sync)"
        expected = 0
        for number, cell in enumerate(notebook.cells, start=1):
            if ABSOLUTE_PATH.search("\n".join([cell.source, *output_texts(cell)])):
                yield f"{where}: cell {number} shows an absolute path"
            if any(WIDGET_VIEW in output.get("data", {}) for output in cell.get("outputs", [])):
                yield f"{where}: cell {number} stores a widget (make run)"
            for output in cell.get("outputs", []):
                if "data" in output and not any(map(GITHUB_SHOWS.fullmatch, output.data)):
                    yield f"{where}: cell {number} shows only {', '.join(output.data) or 'a widget'}; GitHub does not"
            if cell.cell_type != "code" or not cell.source.strip():
                continue
            expected += 1
            if cell.execution_count is None:
                yield f"{where}: cell {number} lacks a stored run (make run)"
            elif cell.execution_count != expected:
                yield f"{where}: cell {number} was not run in order from a fresh kernel (make run)"
                expected = cell.execution_count
            if any(output.output_type == "error" for output in cell.outputs):
                yield f"{where}: cell {number} stores an error"


def check_export(names: list[str]) -> Iterator[str]:
    complete = names == lessons()
    modules = fresh_export([name for name in names if (LESSONS / f"{name}.ipynb").exists()])
    for module, text in modules.items():
        path = PACKAGE / module
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            yield f"difftsr/{module}: differs from a fresh export of its lesson (make sync)"
    if complete:
        for path in sorted(PACKAGE.rglob("*.py")):
            module = path.relative_to(PACKAGE).as_posix()
            if module not in modules and module != "__init__.py":
                yield f"difftsr/{module}: orphan module, no lesson exports it"


def check_exercises(names: list[str]) -> Iterator[str]:
    wanted = set()
    for name in names:
        path = EXERCISES / f"{name}.ipynb"
        try:
            notebook = exercise_notebook(name) if (LESSONS / f"{name}.py").exists() else None
        except ValueError as error:
            yield f"notebooks/{name}.py: {error}"
            continue
        if notebook is not None:
            wanted.add(path)
            if not path.exists() or path.read_text(encoding="utf-8") != notebook_text(notebook):
                yield f"exercises/{name}.ipynb: not what its lesson asks (make exercises)"
    if names == lessons():
        for path in sorted(set(EXERCISES.glob("*.ipynb")) - wanted):
            yield f"exercises/{path.name}: no lesson has these exercises"


def check_lint(names: list[str]) -> Iterator[str]:
    targets = ["."] if names == lessons() else [f"notebooks/{name}.ipynb" for name in names]
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--quiet", "--output-format", "concise", *targets]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    yield from (result.stdout + result.stderr).splitlines()
    if result.returncode and not (result.stdout or result.stderr):
        yield f"ruff: failed with status {result.returncode}"


def check_size(names: list[str]) -> Iterator[str]:
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode:  # an unpacked archive has no history to weigh
        return
    files = [ROOT / file for file in set(result.stdout.split("\0")) if file]
    total = sum(file.stat().st_size for file in files if file.is_file())
    if total >= MAX_TRACKED_BYTES:
        largest = sorted((file for file in files if file.is_file()), key=lambda file: -file.stat().st_size)[:3]
        listed = ", ".join(f"{file.relative_to(ROOT)} {file.stat().st_size / 1e6:.1f} MB" for file in largest)
        yield f"tracked files: {total / 1e6:.1f} MB together, under 60 MB is allowed; the largest: {listed}"


def check_needs(names: list[str]) -> Iterator[str]:
    for name in names:
        path, needed = LESSONS / f"{name}.ipynb", minutes_and_memory(name)
        if needed is None or not path.exists():
            continue
        opening = opening_with_needs(read_notebook(path))
        said = " ".join(NEEDS.search(opening.source)[0].split()) if opening is not None else "nothing"
        if said != "{} and {} of memory on two CPU cores".format(*needed):
            yield f"notebooks/{name}.ipynb: needs {said}, it says; measured: {', '.join(needed)} (maintain.py needs)"
    for table in TABLES:
        text = (ROOT / table).read_text(encoding="utf-8") if (ROOT / table).exists() else ""
        if filled_table(text, names) != text:
            yield f"{table}: minutes and memory are not those measured (maintain.py needs)"


CHECKS: list[Callable[[list[str]], Iterator[str]]] = [
    check_pairs,
    check_notebooks,
    check_export,
    check_exercises,
    check_needs,
    check_lint,
    check_size,
]


def check(names: list[str]) -> int:
    start = time.perf_counter()
    problems = [problem for checker in CHECKS for problem in checker(names)]
    print("\n".join(problems), end="\n" if problems else "")
    verdict = f"{len(problems)} problems" if problems else "all in step"
    print(f"check: {len(names)} lessons, {verdict} ({time.perf_counter() - start:.1f} s)")
    return 1 if problems else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["sync", "export", "exercises", "run", "needs", "check"])
    parser.add_argument("names", nargs="*", metavar="NAME")
    arguments = parser.parse_args()
    names = lessons(arguments.names)
    if arguments.task == "check":
        return check(names)
    if arguments.task == "run":
        failed = [name for name in names if not run(name)]
        if failed:
            print("failed: " + " ".join(failed))
        return 1 if failed else 0
    for name in names:
        {"sync": sync, "export": export, "exercises": write_exercises, "needs": sync}[arguments.task](name)
    if arguments.task == "needs":
        fill_tables(names)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
