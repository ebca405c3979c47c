"""The map of the lessons: complete, and at the head of every lesson with that lesson's part in colour."""

import io
import re
from pathlib import Path

import nbformat
import pytest
from PIL import Image

from difftsr.overview import ARROWS, BOXES, where_it_sits

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))


def module_of(notebook: nbformat.NotebookNode) -> str:
    return re.search(r"#\| default_exp (\w+)", "\n".join(cell.source for cell in notebook.cells))[1]


def test_every_module_has_a_box_with_the_number_of_its_lesson() -> None:
    lessons = {module_of(nbformat.read(path, as_version=4)): path.stem.split("_")[0] for path in NOTEBOOKS}
    lessons.pop("overview")
    assert {module: lesson for module, lesson, *_ in BOXES if module} == lessons


def test_arrows_join_boxes() -> None:
    says = {box[2] for box in BOXES}
    assert {end for arrow in ARROWS for end in arrow[:2]} <= says


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_lesson_opens_with_the_map(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    module = module_of(notebook)
    first = next(c for c in notebook.cells if c.cell_type == "code" and c.source.startswith("from difftsr.overview"))
    assert first.source.endswith("where_it_sits()" if module == "overview" else f'where_it_sits("{module}")')
    assert notebook.cells.index(first) < 6
    assert first.outputs[0].data["image/png"]


def test_the_picture_is_small_and_colours_only_what_was_asked_for() -> None:
    orange = {}
    for name in (None, "idm", "vae"):
        picture = Image.open(io.BytesIO(where_it_sits(name).data))
        assert len(where_it_sits(name).data) < 10_000 and picture.size == (840, 350)
        orange[name] = sum(count for count, colour in picture.convert("RGB").getcolors() if colour == (255, 180, 80))
    assert orange[None] == 0 < 2 * orange["idm"] < orange["vae"]  # encoder and decoder, each wider


def test_an_unknown_module_is_refused() -> None:
    with pytest.raises(ValueError, match="no module 'imd' on the map; it has ablations"):
        where_it_sits("imd")
