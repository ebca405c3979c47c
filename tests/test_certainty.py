"""Confidences: alignment, evidence, calibration, reliability, and the colours of a heatmap."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from difftsr.certainty import (
    LIMIT,
    characters_right,
    collect,
    colour_of,
    confidence,
    fit,
    gather,
    heatmap,
    main,
    matches,
    reliability,
    support,
)
from difftsr.model import DiffTSR
from difftsr.recognizer import Reading
from difftsr.restore import restore
from difftsr.text_lines import Alphabet
from restore_common import coloured_line, save_tiny_weights

ALPHABET = Alphabet.tiny()


def reading(text, *probs):
    tokens = ALPHABET.encode(text)
    sure = torch.zeros(24)
    sure[: len(probs)] = torch.tensor(probs)
    return Reading.of(tokens[None], prob=sure[None])


def test_a_witness_supports_what_it_read_in_its_place_only():
    assert matches("ABC", "AXC") == [(0, 0), (2, 2)]
    tokens = ALPHABET.encode("ABC")[:3].tolist()
    assert support(tokens, reading("ABC", 0.5, 0.75, 1.0)) == [0.5, 0.75, 1.0]
    assert support(tokens, reading("AC", 0.5, 0.25)) == [0.5, 0.0, 0.25]  # a missing character
    assert support(tokens, reading("XABC", 1.0, 0.5, 0.75, 0.25)) == [0.5, 0.75, 0.25]  # one too many
    assert support(tokens, reading("")) == [0.0] * 3
    found = gather(ALPHABET.encode("AB"), torch.full((24,), 0.5), reading("A", 1.0), reading("AB", 0.25, 0.75))
    assert found == [(0.5, 1.0, 0.25), (0.5, 0.0, 0.75)]


def test_right_characters_are_found_by_alignment():
    assert characters_right("BOOK", "B00K") == [True, False, False, True]
    assert characters_right("XBOOK", "BOOK") == [False, True, True, True, True]
    assert characters_right("", "A") == []


def test_calibration_finds_the_weights_that_made_the_data():
    """Characters drawn from a known logistic model: its four numbers come back."""
    generator = torch.Generator().manual_seed(0)
    evidence = torch.rand(20_000, 3, generator=generator).clamp(LIMIT, 1 - LIMIT)
    odds = (evidence / (1 - evidence)).log()
    true = [0.5, 0.3, 0.0, 0.9]
    probability = (true[0] + odds @ torch.tensor(true[1:])).sigmoid()
    right = torch.rand(20_000, generator=generator) < probability
    found = fit(evidence.tolist(), right.tolist())
    assert np.abs(np.array(found) - true).max() < 0.06
    sure = confidence(evidence.tolist(), found)
    assert np.abs(np.array(sure) - probability.numpy()).max() < 0.03
    assert reliability(sure, right.tolist())["ece"] < 0.02
    with pytest.raises(ValueError, match="right and characters that are wrong"):
        fit([(0.5, 0.5, 0.5)] * 3, [True] * 3)


def test_without_weights_the_text_diffusion_speaks_and_nothing_is_nothing():
    assert confidence([(0.25, 1.0, 1.0)], None) == [0.25]
    assert confidence([], None) == [] and confidence([], [0.0, 1.0, 1.0, 1.0]) == []
    assert 0 <= confidence([(0.0, 0.0, 0.0)], [0.0, 1.0, 1.0, 1.0])[0] < 0.001


def test_reliability_by_hand():
    found = reliability([0.1, 0.1, 0.9, 1.0], [False, True, True, True], bins=2)
    assert [row["count"] for row in found["bins"]] == [2, 2]
    assert found["ece"] == pytest.approx((2 * 0.4 + 2 * 0.05) / 4, abs=1e-4)
    assert found["brier"] == pytest.approx((0.01 + 0.81 + 0.01 + 0) / 4, abs=1e-4)
    with pytest.raises(ValueError, match="no characters"):
        reliability([], [])


def test_a_heatmap_is_red_where_doubt_is():
    shown = np.asarray(heatmap(Image.new("RGB", (100, 40), "white"), [0.25, 0.75], [0.0, 1.0])).astype(int)
    assert shown.shape == (44, 100, 3)
    assert tuple(shown[42, 20]) == colour_of(0.0) and tuple(shown[42, 80]) == colour_of(1.0)
    assert shown[20, 20, 1] < shown[20, 20, 0] and shown[20, 80, 0] < shown[20, 80, 1]
    assert heatmap(Image.new("RGB", (100, 40)), [], []).size == (100, 44)
    with pytest.raises(ValueError, match="one of each"):
        heatmap(Image.new("RGB", (100, 40)), [0.5], [])


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_tiny_weights(tmp_path_factory.mktemp("weights"))


def test_restorations_use_the_weights_that_the_config_holds(weights):
    model = DiffTSR.from_pretrained(weights)
    raw = restore(model, coloured_line(), steps=1)
    assert raw.confidence == [row[0] for row in raw.evidence] and len(raw.places) == len(raw.text)
    model.config.certainty = (-1.0, 0.5, 1.0, 2.0)
    assert restore(model, coloured_line(), steps=1).confidence == confidence(raw.evidence, (-1.0, 0.5, 1.0, 2.0))
    told = restore(model, coloured_line(), steps=1, text="AB")
    assert told.confidence == [1.0, 1.0]  # who knows the text is sure of it


def test_the_command_calibrates_a_folder_of_weights(weights, tmp_path, capsys):
    """Labels that agree with what the tiny model writes, but for some: the config holds four numbers afterwards."""
    mine = shutil.copytree(weights, tmp_path / "weights")
    model, lines = DiffTSR.from_pretrained(mine), []
    (tmp_path / "set").mkdir()
    for k in range(4):
        coloured_line().rotate(90 * k % 180).resize((90, 30)).save(tmp_path / "set" / f"{k}.png")
        lines.append(f"{k}.png\t" + restore(model, tmp_path / "set" / f"{k}.png").text.strip()[: 6 + k])
    (tmp_path / "set" / "labels.tsv").write_text("file\ttext\n" + "\n".join(lines) + "\n", encoding="utf-8")
    lines_of = tmp_path / "set"
    words = ["--weights", mine, "--dev", lines_of, "--test", lines_of, "--output", tmp_path / "out.json"]
    assert main([str(word) for word in words]) == 0
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    again = DiffTSR.from_pretrained(mine)
    assert list(again.config.certainty) == found["weights"] and len(found["weights"]) == 4
    assert found["calibrated"]["brier"] <= found["text_diffusion"]["brier"]
    assert main(["--weights", str(mine), "--dev", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


def test_some_lines_of_a_set_are_of_every_strength(monkeypatch):
    """The strengths take turns in the sets of the project; half of the lines must not be two of the four."""
    strengths, seen = ("mild", "medium", "hard", "severe"), []
    lines = [SimpleNamespace(truth="A", image=strengths[k % 4]) for k in range(320)]
    monkeypatch.setattr("difftsr.evaluate.labelled", lambda folder: lines)
    monkeypatch.setattr("difftsr.restore.restore_batch", lambda model, images: seen.extend(images) or [])
    for _ in range(2):
        assert collect(None, Path("set"), 160) == ([], [])
    assert len(seen) == 320 and seen[:160] == seen[160:]  # the same ones each time
    assert all(30 <= seen[:160].count(strength) <= 50 for strength in strengths)
