"""Lines of any length, the lines of a page, and the pages of PDF files."""

import io

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from difftsr.dataset import MAX_PIXELS
from difftsr.model import DiffTSR
from difftsr.pages import (
    PageLine,
    cut_line,
    find_cuts,
    find_lines,
    frame,
    ink,
    join_images,
    join_texts,
    open_pdf,
    paste,
    pdf_page,
    rectangle,
    rectify,
    restore_lines,
    restore_page,
    share_text,
    spaces,
    spans_of,
    why_left_alone,
)
from difftsr.restore import restore
from difftsr.text_lines import Alphabet, find_fonts, package_font_folders
from restore_common import save_tiny_weights


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return DiffTSR.from_pretrained(save_tiny_weights(tmp_path_factory.mktemp("weights")))


def written(text, font, size=56, ink_colour="black", paper="white"):
    """A line as uint8 RGB at half that size, noisy, and the ends of its characters in its columns."""
    face = font.pillow(size)
    ends = [6 + face.getlength(text[:k]) for k in range(len(text) + 1)]
    picture = Image.new("RGB", (int(ends[-1]) + 6, int(1.4 * size)), paper)
    ImageDraw.Draw(picture).text((6, 3), text, fill=ink_colour, font=face)
    small = np.asarray(picture.reduce(2)).astype(float)
    noisy = small + np.random.default_rng(0).normal(0, 6, (*small.shape[:2], 1))
    return noisy.clip(0, 255).round().astype(np.uint8), [end / 2 for end in ends]


@pytest.fixture(scope="module")
def fonts():
    return find_fonts(package_font_folders())[:3]


# ---------------------------------------------------------------- long lines


@pytest.mark.parametrize("colours", [("black", "white"), ("#f0e0a0", "#20305a")])
def test_cuts_fall_between_characters_in_any_colours(fonts, colours):
    """Fifty random Hanzi or some words, in several fonts: a cut is at most .16 em from the end of a character."""
    rng, hanzi = np.random.default_rng(1), [c for c in Alphabet.classroom().characters if "\u4e00" <= c <= "\u9fff"]
    distances = []
    for k, font in enumerate(fonts):
        text = "".join(hanzi[i] for i in rng.integers(0, len(hanzi), 50)) if k else "the office is open from nine " * 3
        line, ends = written(text, font, ink_colour=colours[0], paper=colours[1])
        parts = 7
        cuts = find_cuts(line, parts)
        assert cuts == sorted(cuts) and len(cuts) == parts - 1
        distances += [min(abs(cut - end) for end in ends) for cut in cuts]
        spans = spans_of(line, cuts)
        assert spans[0][0] == 0 and spans[-1][1] == line.shape[1]
        assert max((b - a) / line.shape[0] for a, b in spans) <= 8
        assert all(a[1] > b[0] for a, b in zip(spans, spans[1:]))  # they overlap
    assert max(distances) <= 0.16 * 28


def test_a_column_without_ink_has_none(fonts):
    line = np.full((40, 100, 3), 90, np.uint8)
    line[10:30, 50:60] = 200
    assert ink(line)[:40].max() < 1 and ink(line)[55] > 40


def test_lines_that_fit_are_whole_and_are_restored_as_before(model):
    line = np.random.default_rng(0).integers(0, 255, (30, 110, 3)).astype(np.uint8)
    assert cut_line(model, line) == [(0, 110)]
    (result,) = restore_lines(model, [line], steps=1)
    assert result.image.tobytes() == restore(model, line, steps=1).image.tobytes()


def test_full_places_ask_for_another_cut(model, monkeypatch, fonts):
    """A recogniser that fills all its places for whatever is wider than 3 heights gets narrower pieces."""
    read, seen = model.recognizer.read, []

    def full(canvases, *arguments):
        reading = read(canvases, *arguments)
        seen.append(len(canvases))
        reading.tokens[:, :, 0] = torch.where(torch.tensor(len(canvases) < 3), 5, reading.tokens[:, :, 0])
        reading.tokens[:, -1, 0] = 5 if len(canvases) < 3 else 0
        return reading

    monkeypatch.setattr(model.recognizer, "read", full)
    line, _ = written("a street of many small shops", fonts[0])
    assert len(cut_line(model, line[:, : 8 * line.shape[0]])) == 3 and seen == [1, 2, 3]


def test_joining_unrestored_pieces_gives_the_line_back(fonts):
    """Pieces cut out and joined, at once or twice as large, are the line: no seam, no shift, no gap."""
    line, _ = written("over the hills and far away we walk along the river until noon", fonts[0])
    spans = spans_of(line, find_cuts(line, 5))
    pieces = [Image.fromarray(line[:, a:b]) for a, b in spans]
    assert np.array_equal(np.asarray(join_images(pieces, spans, line.shape[1])), line)
    twice = [piece.resize((2 * piece.width, 2 * piece.height), Image.Resampling.BICUBIC) for piece in pieces]
    joined = np.asarray(join_images(twice, spans, line.shape[1])).astype(int)
    whole = Image.fromarray(line).resize((2 * line.shape[1], 2 * line.shape[0]), Image.Resampling.BICUBIC)
    assert joined.shape == np.asarray(whole).shape and np.abs(joined - np.asarray(whole)).mean() < 0.5


def test_joining_fades_from_one_piece_to_the_next():
    a, b = (Image.new("L", (60, 10), grey).convert("RGB") for grey in (100, 200))
    row = np.asarray(join_images([a, b], [(0, 60), (40, 100)], 100))[5, :, 0].astype(int)
    assert (row[:40] == 100).all() and (row[60:] == 200).all() and (np.diff(row) >= 0).all()
    assert np.diff(row).max() <= 100 / 20 + 1


@pytest.mark.parametrize("height", [128, 70])
def test_a_long_line_keeps_its_ratio_and_one_confidence_a_character(model, fonts, height):
    line, _ = written("A long line 0123456789 with more than sixty characters in it, all of them", fonts[0])
    assert line.shape[1] > 12 * line.shape[0]
    (result,) = restore_lines(model, [line], steps=1, height=height)
    assert result.image.height == height
    assert abs(result.image.width - height * line.shape[1] / line.shape[0]) <= 0.01 * result.image.width
    assert len(result.confidence) == len(result.text) and result.gate.action in ("kept", "blended", "input")


def test_a_known_text_of_a_long_line_is_shared_out(model, fonts):
    text = "0123456789" * 6
    line, _ = written(text, fonts[0])
    (result,) = restore_lines(model, [line], steps=1, text=[text])
    assert result.text == text and result.confidence == [1.0] * 60
    short = line[:, : 7 * line.shape[0]]  # it would fit on a canvas, but its text would not
    (result,) = restore_lines(model, [short], steps=1, text=[text[:30]])
    assert result.text == text[:30]
    assert share_text("abcdefgh", [1, 1, 2]) == ["ab", "cd", "efgh"] and share_text("ab", [0, 0]) == ["", "ab"]


def test_spaces_stand_in_wide_gaps_between_words_only(fonts):
    line, ends = written("open daily", fonts[0])
    gap, tight = round((ends[4] + ends[5]) / 2), round(ends[2])
    assert spaces(line, spans_of(line, [gap])) == [" "] and spaces(line, spans_of(line, [tight])) == [""]
    assert join_texts(["open", "daily"], [" "]) == "open daily" and join_texts(["茶", "馆"], [" "]) == "茶馆"
    assert join_texts(["ab", "cd"], [""]) == "abcd" and join_texts(["", "cd"], [" "]) == "cd"


def test_several_lines_keep_their_order_and_their_heights(model, fonts):
    lines = [written(text, fonts[0])[0] for text in ("AB", "a line of more than eight heights in width, yes", "XYZ")]
    results = restore_lines(model, lines, steps=1, height=[40, 50, 60], batch=2)
    assert [result.image.height for result in results] == [40, 50, 60]
    with pytest.raises(ValueError, match="too tall"):
        restore_lines(model, [np.zeros((60, 20, 3), np.uint8)])


# ---------------------------------------------------------------- pages


def slanted(size=(300, 500)):
    """Corners of a slanted line on a page of that size."""
    return np.array([[60, 80], [360, 50], [370, 110], [66, 140]], np.float32)


def test_there_and_back_a_line_lands_where_it_was():
    """Rectified and pasted again, a smooth page is unchanged; far from the line, to the bit."""
    y, x = np.mgrid[:300, :500].astype(np.float32)
    page = np.dstack([x / 2, y / 2, (x + y) / 4]).astype(np.uint8)
    copy = page.copy()
    paste(copy, rectify(page, slanted()), slanted())
    assert np.abs(copy.astype(int) - page).max() <= 2
    marked = page.copy()
    paste(marked, np.full((60, 300, 3), 255, np.uint8), slanted())
    inside = cv2.fillConvexPoly(np.zeros(page.shape[:2], np.uint8), slanted().astype(int), 1).astype(bool)
    outside = cv2.erode((~inside).astype(np.uint8), np.ones((5, 5))).astype(bool)
    assert np.array_equal(marked[outside], page[outside])
    assert (marked[90:100, 200] > 250).all()  # the middle is the new line, its edge is soft
    steps = np.abs(np.diff(marked[:, 200].astype(int).sum(1)))
    assert steps.max() < 0.4 * abs(int(marked[95, 200].sum()) - int(page[95, 200].sum()))


def test_corners_and_rectangles():
    assert rectangle(frame(40, 30)) == (40, 30)
    assert rectify(np.zeros((50, 60, 3), np.uint8), frame(40, 30)).shape == (30, 40, 3)
    assert why_left_alone(frame(200, 30), 128) == ""
    assert "upright" in why_left_alone(frame(30, 200), 128) and "128" in why_left_alone(frame(900, 140), 128)
    assert "smaller" in why_left_alone(frame(90, 3), 128)


def test_lines_outside_the_page_are_pasted_as_far_as_they_reach():
    page = np.zeros((40, 60, 3), np.uint8)
    paste(page, np.full((20, 40, 3), 200, np.uint8), frame(40, 20) + np.float32([-20, -5]))
    paste(page, np.full((20, 40, 3), 200, np.uint8), frame(40, 20) + np.float32([500, 500]))
    assert page[:10, :10].max() == 200 and page[30:].max() == 0


@pytest.fixture(scope="module")
def notice(fonts):
    page = Image.new("RGB", (420, 260), "white")
    for text, top in (("图书馆开放时间", 30), ("Open from nine", 110)):
        ImageDraw.Draw(page).text((30, top), text, fill="black", font=fonts[0].pillow(40))
    ImageDraw.Draw(page).text((30, 200), "END", fill="black", font=fonts[0].pillow(30))
    return np.asarray(page)


def test_the_detector_finds_the_lines_in_order(notice):
    pytest.importorskip("rapidocr")
    corners = find_lines(notice)
    assert len(corners) == 3
    tops = [float(c[:, 1].mean()) for c in corners]
    assert tops == sorted(tops) and 30 < tops[0] < 90 and 110 < tops[1] < 170
    assert find_lines(np.full((100, 200, 3), 255, np.uint8)) == []


@pytest.mark.parametrize("scale", [1, 2])
def test_a_page_changes_only_where_lines_are(model, notice, scale, monkeypatch):
    boxes = [frame(180, 30) + np.float32([20, 20]), frame(30, 90) + np.float32([380, 20])]
    monkeypatch.setattr("difftsr.pages.find_lines", lambda page: boxes)
    result = restore_page(model, notice, scale=scale, steps=1, do_no_harm=False)
    plain = cv2.resize(notice, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC) if scale > 1 else notice
    changed = (np.asarray(result.image) != plain).any(-1)
    assert result.image.size == (420 * scale, 260 * scale) and changed.any()
    changed[19 * scale : 51 * scale, 19 * scale : 201 * scale] = False
    assert not changed.any()
    first, second = result.lines
    assert isinstance(first, PageLine) and first.restored and second.restored is None and "upright" in second.left_alone
    assert result.text == first.restored.text


def test_a_page_without_lines_is_only_made_larger(model, monkeypatch):
    monkeypatch.setattr("difftsr.pages.find_lines", lambda page: [])
    result = restore_page(model, np.full((50, 80, 3), 7, np.uint8), scale=3)
    assert result.image.size == (240, 150) and result.lines == [] and result.text == ""


def test_a_page_that_would_fill_the_memory_is_refused(model):
    page = np.broadcast_to(np.uint8(0), (5000, 5000, 3))
    assert 25e6 * 16 > MAX_PIXELS
    with pytest.raises(ValueError, match="20000 x 20000 pixels at scale 4"):
        restore_page(model, page, scale=4)


# ---------------------------------------------------------------- PDF files


def test_pages_of_a_pdf_file(notice):
    pytest.importorskip("pypdfium2")
    buffer = io.BytesIO()
    other = Image.fromarray(notice).rotate(180)
    Image.fromarray(notice).save(buffer, "PDF", resolution=100, save_all=True, append_images=[other])
    assert len(open_pdf(buffer.getvalue())) == 2
    for k, expected in enumerate((notice, np.asarray(other))):
        picture = pdf_page(buffer.getvalue(), k, dots_per_inch=100)
        assert picture.size == (420, 260) and picture.format == "PNG"
        assert np.abs(picture.pixels.astype(int) - expected).mean() < 6  # a PDF file holds pictures as JPEG
    small = pdf_page(buffer.getvalue(), 0, dots_per_inch=1e5)
    assert small.size[0] * small.size[1] <= MAX_PIXELS
    with pytest.raises(ValueError, match="cannot be opened as PDF"):
        open_pdf(b"%PDF-1.4 and nothing else")
