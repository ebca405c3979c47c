"""The tasks of the lessons: every solution is right, every stub is not yet, and no nonsense makes a checker raise."""

import ast
import contextlib
import io
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from nbformat import NotebookNode

import maintain

ROOT = Path(__file__).resolve().parents[1]
LESSONS = [name for name in maintain.lessons() if '"solution"' in (maintain.LESSONS / f"{name}.py").read_text("utf-8")]
HEADING = re.compile(r"### \d+ · \S.* · (●○○ easy|●●○ medium|●●● hard)\n")
NONSENSE = [None, "7", 7.5, torch.zeros(7, 1, 2), np.full((2, 5), np.nan), [], {}]


@pytest.fixture(autouse=True)
def as_a_notebook(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The folder of a notebook, and one random state: what a task draws without a seed would differ from run to run."""
    monkeypatch.chdir(ROOT / "exercises")
    monkeypatch.setattr(sys, "path", list(sys.path))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def section(name: str) -> list[NotebookNode]:
    return maintain.exercise_section(maintain.read_text(maintain.LESSONS / f"{name}.py"))


def tagged(cells: list[NotebookNode], tag: str) -> list[NotebookNode]:
    return [cell for cell in cells if tag in maintain.tags(cell)]


def said(source: str, namespace: dict) -> str:
    """What a cell prints when it runs."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(source, "<cell>", "exec"), namespace)
    return output.getvalue()


def names_of(solution: str) -> list[str]:
    """The functions, classes and values that a solution cell leaves behind."""
    found = []
    for node in ast.parse(solution).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.append(node.name)
        elif isinstance(node, ast.Assign):
            found += [part.id for target in node.targets for part in ast.walk(target) if isinstance(part, ast.Name)]
    return found


# ---------------------------------------------------------------- every lesson


def test_every_lesson_but_that_on_exercises_has_tasks() -> None:
    assert LESSONS == [name for name in maintain.lessons() if not name.startswith("00b")]


@pytest.mark.parametrize("name", LESSONS)
def test_a_lesson_has_three_to_six_graded_tasks(name: str) -> None:
    cells = section(name)
    tasks = [cell for cell in cells if cell.cell_type == "markdown" and HEADING.match(cell.source)]
    assert 3 <= len(tasks) <= 6
    assert [cell.source.split(" ", 2)[1] for cell in tasks] == [str(k) for k in range(1, len(tasks) + 1)]
    assert all("<details>" in cell.source for cell in tasks), "a task lacks its hint"
    order = [tag for cell in cells for tag in maintain.tags(cell) if tag in ("solution", "check")]
    assert order == ["solution", "check"] * len(tasks)
    assert all("hide-input" in maintain.tags(cell) for cell in tagged(cells, "solution"))


@pytest.mark.parametrize("name", LESSONS)
def test_a_checker_asks_for_two_properties_or_more(name: str) -> None:
    for cell in tagged(section(name), "check"):
        calls = [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.Call)]
        (properties,) = [node.args[0] for node in calls if getattr(node.func, "id", "") == "check"]
        assert len(properties.keys) >= 2


@pytest.mark.parametrize("name", LESSONS)
def test_every_solution_is_right_and_no_nonsense_is_or_raises(name: str) -> None:
    namespace: dict = {}
    for cell in section(name):
        if cell.cell_type != "code":
            continue
        printed = said(cell.source, namespace)
        if "solution" in maintain.tags(cell):
            answers = names_of(cell.source)
        elif "check" in maintain.tags(cell):
            assert printed == "right\n"
            answered = {answer: namespace[answer] for answer in answers}
            for nonsense in NONSENSE:
                for answer, value in answered.items():
                    namespace[answer] = (lambda *_, x=nonsense, **__: x) if callable(value) else nonsense
                assert re.fullmatch(r"not yet: .+\n", said(cell.source, namespace)), (cell.source, nonsense)
            namespace |= answered


@pytest.mark.parametrize("name", LESSONS)
def test_every_stub_runs_and_is_not_right(name: str) -> None:
    """The notebook that a learner opens, run from top to bottom."""
    notebook = nbformat.read(maintain.EXERCISES / f"{name}.ipynb", as_version=4)
    checks = {cell.source for cell in tagged(section(name), "check")}
    namespace: dict = {}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            printed = said(cell.source, namespace)
            if cell.source in checks:
                assert re.fullmatch(r"not yet: .+\n", printed), cell.source
    assert sum(cell.source in checks for cell in notebook.cells) == len(checks)


# ---------------------------------------------------------------- how they are cut out


def test_exercise_notebooks_hold_no_solution_and_no_output() -> None:
    paths = sorted(maintain.EXERCISES.glob("*.ipynb"))
    assert [path.stem for path in paths] == LESSONS
    for path in paths:
        text = path.read_text(encoding="utf-8")
        assert "SOLUTION" not in text and "STUB" not in text
        notebook = json.loads(text)
        nbformat.validate(nbformat.from_dict(notebook))
        assert not any(cell.get("outputs") for cell in notebook["cells"])
        assert f"main/exercises/{path.name}" in "".join(notebook["cells"][0]["source"])


def test_links_of_an_exercise_notebook_lead_somewhere() -> None:
    for path in sorted(maintain.EXERCISES.glob("*.ipynb")):
        for cell in nbformat.read(path, as_version=4).cells:
            for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", cell.source) if cell.cell_type == "markdown" else ():
                assert (path.parent / link).exists(), f"{path.name} links to {link}"


def test_a_stub_keeps_what_is_given_and_its_place() -> None:
    cell = """\
def halve(x):
    y = 2
    ### BEGIN SOLUTION
    ### STUB: if x:
    ### STUB:     return y
    ### STUB: return x
    return x / y
    ### END SOLUTION
"""
    assert maintain.stub(cell) == """\
def halve(x):
    y = 2
    # your code here
    if x:
        return y
    return x
"""


@pytest.mark.parametrize("cell", ["x = 1", "### BEGIN SOLUTION\nx = 1\n### END SOLUTION", "### BEGIN SOLUTION\nx = 1"])
def test_a_solution_without_its_marks_is_refused(cell: str) -> None:
    with pytest.raises(ValueError, match="a solution lacks"):
        maintain.stub(cell)


def test_sync_folds_solutions_away_and_check_sees_a_stale_notebook(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("LESSONS", "EXERCISES"):
        (tmp_path / folder).mkdir()
        monkeypatch.setattr(maintain, folder, tmp_path / folder)
    name = "07_idm"
    text = (ROOT / "notebooks" / f"{name}.py").read_text(encoding="utf-8")
    (maintain.LESSONS / f"{name}.py").write_text(text, encoding="utf-8")
    (maintain.LESSONS / f"{name}.ipynb").write_bytes((ROOT / "notebooks" / f"{name}.ipynb").read_bytes())
    os.utime(maintain.LESSONS / f"{name}.ipynb", ns=(0, 0))  # the text is the newer one
    folded = [cell for cell in maintain.sync(name).cells if cell.metadata.get("jupyter", {}).get("source_hidden")]
    assert folded == tagged(maintain.read_notebook(maintain.LESSONS / f"{name}.ipynb").cells, "solution") != []
    assert (maintain.LESSONS / f"{name}.py").read_text(encoding="utf-8") == text
    (stale,) = maintain.check_exercises([name])
    assert stale == f"exercises/{name}.ipynb: not what its lesson asks (make exercises)"
    maintain.write_exercises(name)
    assert list(maintain.check_exercises([name])) == []
    (maintain.EXERCISES / "99_lost.ipynb").write_text("{}", encoding="utf-8")
    assert list(maintain.check_exercises([name])) == ["exercises/99_lost.ipynb: no lesson has these exercises"]
    edited = text.replace("### STUB: ", "### STUB: pass  # ", 1)
    (maintain.LESSONS / f"{name}.py").write_text(edited, encoding="utf-8")
    assert "not what its lesson asks" in "".join(maintain.check_exercises([name]))
