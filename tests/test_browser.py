"""The lessons in JupyterLab, in a browser. Off by default: `pytest -m browser`, or `make browser` for a table.

Needs the extra "browser" and a Chromium.
"""

from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest

import browser_lessons
import maintain

pytestmark = pytest.mark.browser
FAULTS = {
    "slider": "import ipywidgets\nipywidgets.VBox([ipywidgets.IntSlider(1, 0, 9), ipywidgets.Label('always this')])",
    "error": "1 / 0",
    "warning": "import warnings\nwarnings.warn('this will break')",
}


@pytest.fixture(scope="module")
def browser() -> Iterator:
    pytest.importorskip("playwright", reason="the extra browser is not installed")
    with browser_lessons.chromium() as browser:
        yield browser


@pytest.mark.parametrize("name", maintain.lessons())
def test_a_lesson_runs_and_answers(name: str, browser, tmp_path: Path) -> None:
    with browser_lessons.jupyterlab(browser_lessons.ROOT, tmp_path / "lab.log") as address:
        visit = browser_lessons.visit_lesson(browser, address, f"notebooks/{name}.ipynb", tmp_path)
    assert not visit.faults
    assert visit.cells
    source = (maintain.LESSONS / f"{name}.py").read_text(encoding="utf-8")
    assert bool(visit.answers) == ("import ipywidgets as widgets" in source), "a lesson with sliders has them tried"


def test_planted_faults_are_seen(browser, tmp_path: Path) -> None:
    for name, source in FAULTS.items():
        cells = [nbformat.v4.new_code_cell("'a folded cell'", metadata={"jupyter": {"source_hidden": True}})]
        notebook = nbformat.v4.new_notebook(cells=[*cells, nbformat.v4.new_code_cell(source)])
        notebook.metadata = nbformat.from_dict(maintain.METADATA | {"jupytext": {"formats": "ipynb"}})
        nbformat.write(notebook, tmp_path / f"{name}.ipynb")
    with browser_lessons.jupyterlab(tmp_path, tmp_path / "lab.log") as address:
        found = {
            name: browser_lessons.visit_lesson(browser, address, f"{name}.ipynb", tmp_path).faults for name in FAULTS
        }
    assert any("changed nothing" in fault for fault in found["slider"])
    assert any("ZeroDivisionError" in fault for fault in found["error"])
    assert any("stderr" in fault for fault in found["warning"])
