"""Measures against values worked out by hand, the demo end to end with tiny random weights."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from difftsr.evaluate import DemoRow, accuracy, columns, demo_lines, labelled, mean_scores, ned, normalised, psnr, table


@pytest.mark.parametrize(
    "read, true, expected",
    [
        ("停车场", "停车场", 1),
        ("停车汤", "停车场", 2 / 3),
        ("", "停车场", 0),
        ("", "", 1),
        ("abcd", "abXd", 3 / 4),
        ("ab", "abcd", 1 / 2),
        ("ＡＢ　１", "ab1", 1),
    ],
)
def test_ned_by_hand(read, true, expected):
    assert ned(read, true) == pytest.approx(expected)
    assert accuracy(read, true) == (expected == 1)


def test_normalised_keeps_traditional_characters():
    assert normalised("國 華Ａ") == "國華a"


def test_psnr_by_hand():
    x = np.zeros((2, 2, 3), np.uint8)
    y = x.copy()
    y[0, 0] = 16
    assert psnr(x, y) == pytest.approx(10 * np.log10(255**2 / 64))
    assert psnr(x, x) == float("inf")
    with pytest.raises(ValueError, match="one shape"):
        psnr(x, y[:1])


def test_a_table_lines_up_with_wide_characters():
    lines = table(["a", "b"], [["停车", "x"], ["EXIT", "y"]]).splitlines()
    assert [columns(line[: line.rindex(end)]) for line, end in zip(lines[2:], "xy", strict=True)] == [6, 6]


def test_mean_scores_leave_out_lines_without_truth():
    rows = [DemoRow("a", "ab", "ab", "a", "", [], 0.1), DemoRow("b", None, "x", "y", "", [], 0.1)]
    assert mean_scores(rows) == {"input": 1.0, "restored": 0.5, "lines": 1}
    assert mean_scores(rows[1:]) is None


def test_labels_give_the_truth_and_the_sharp_twin(tmp_path):
    for kind in ("lr", "hr"):
        (tmp_path / kind).mkdir()
        Image.new("RGB", (80, 20)).save(tmp_path / kind / "01.png")
    Image.new("RGB", (80, 20)).save(tmp_path / "02.png")
    (tmp_path / "labels.tsv").write_text("path\ttext\n01.png\t停车\n02.png\tEXIT\n", encoding="utf-8")
    first, second = labelled(tmp_path)
    assert (first.path, first.truth, first.sharp) == (tmp_path / "lr/01.png", "停车", tmp_path / "hr/01.png")
    assert (second.path, second.truth, second.sharp) == (tmp_path / "02.png", "EXIT", None)


def test_the_sample_lines_are_complete():
    lines = demo_lines([])
    assert len(lines) >= 10
    assert all(line.path.exists() and line.sharp.exists() and line.truth for line in lines)


def test_the_demo_runs_in_a_fresh_process_and_survives_a_bad_image(tmp_path):
    from difftsr.model import DiffTSR, preset

    pytest.importorskip("rapidocr", reason="the judge PP-OCRv6 is not installed (extra: evaluate)")
    DiffTSR(preset("tiny")).save(tmp_path / "weights")
    (tmp_path / "broken.png").write_bytes(b"not an image")
    command = [sys.executable, "-m", "difftsr.evaluate", "--demo", "broken.png", "--weights", "weights"]
    done = subprocess.run([*command, "--output", "out", "--steps", "1"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "broken.png" in done.stderr and "mean NED" in done.stdout
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert len(report["lines"]) == len(demo_lines([]))
    assert Image.open(tmp_path / "out" / "gallery.png").width > 600
