"""Measures against second implementations and values worked out by hand; reports with tiny random weights."""

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import linalg

from difftsr import ablations, restorers, scores
from difftsr.evaluate import DemoRow, EvaluateConfig, demo_lines, evaluate, main, mean_scores, read_set
from difftsr.measures import (
    PPOCR,
    accuracy,
    alexnet,
    bootstrap,
    found,
    frechet_distance,
    knows,
    lpips,
    luma,
    ned,
    normalised,
    psnr,
    ssim,
    to_tensor,
    unicharset,
    window_features,
)
from difftsr.model import DiffTSR, preset
from difftsr.report import columns, compare, failure_table, failures, table
from difftsr.restorers import LabelledLine, Restorer, fingerprint, labelled, make_restorer, parsed, slices
from difftsr.scores import PSNR_TOP, Bar, band, figures, metrics

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = ROOT / "data" / "samples"


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


def naive_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """SSIM window by window, as the paper writes it."""
    bell = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    weights = np.outer(bell, bell) / bell.sum() ** 2
    scores = []
    for channel in range(x.shape[2]):
        for top in range(x.shape[0] - 10):
            for left in range(x.shape[1] - 10):
                a, b = (z[top : top + 11, left : left + 11, channel].astype(float) for z in (x, y))
                mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
                var_a, var_b = (weights * (a - mean_a) ** 2).sum(), (weights * (b - mean_b) ** 2).sum()
                cov = (weights * (a - mean_a) * (b - mean_b)).sum()
                light = (2 * mean_a * mean_b + 2.55**2) / (mean_a**2 + mean_b**2 + 2.55**2)
                scores.append(light * (2 * cov + 7.65**2) / (var_a + var_b + 7.65**2))
    return float(np.mean(scores))


def test_ssim_equals_the_sum_over_windows():
    rng = np.random.default_rng(1)
    x = rng.integers(0, 256, (15, 18, 3), dtype=np.uint8)
    y = np.clip(x.astype(int) + rng.integers(-40, 41, x.shape), 0, 255).astype(np.uint8)
    assert ssim(x, y) == pytest.approx(naive_ssim(x, y), abs=1e-9)
    assert ssim(luma(x), luma(y)) == pytest.approx(naive_ssim(luma(x)[..., None], luma(y)[..., None]), abs=1e-9)
    assert ssim(x, x) == pytest.approx(1)
    with pytest.raises(ValueError, match="11 pixels"):
        ssim(x[:10], y[:10])


@pytest.mark.parametrize(
    "rgb, y",
    [((0, 0, 0), 16), ((255, 255, 255), 235), ((255, 0, 0), 81.481), ((0, 255, 0), 144.553), ((0, 0, 255), 40.966)],
)
def test_luma_of_the_corners_of_the_cube(rgb, y):
    assert luma(np.array([[rgb]], np.uint8))[0, 0] == pytest.approx(y)


def test_psnr_on_luma_of_a_grey_step():
    x, y = (np.full((12, 12, 3), value, np.uint8) for value in (100, 110))
    assert psnr(luma(x), luma(y)) == pytest.approx(10 * np.log10(255**2 / (10 * 219 / 255) ** 2))
    assert psnr(luma(x), luma(y)) - psnr(x, y) == pytest.approx(20 * np.log10(255 / 219))


@pytest.fixture
def perceptual():
    try:
        return alexnet()
    except ModuleNotFoundError as error:
        pytest.skip(f"LPIPS has no weights here: {error}")


def test_lpips_equals_its_formula_layer_by_layer(perceptual):
    rng = np.random.default_rng(2)
    x, y = rng.integers(0, 256, (2, 64, 96, 3), dtype=np.uint8)
    total = 0.0
    for number, (a, b) in enumerate(zip(*(perceptual.features(to_tensor(z)) for z in (x, y)))):
        a, b = a[0].numpy(), b[0].numpy()
        assert np.allclose((a**2).sum(0)[(a**2).sum(0) > 0.5], 1, atol=1e-4)
        (weights,) = getattr(perceptual, f"lin{number}").parameters()
        total += np.einsum("c,chw->hw", weights.numpy().ravel(), (a - b) ** 2).mean()
    assert lpips(x, y) == pytest.approx(total, rel=1e-4)
    assert lpips(x, x) == 0


def test_frechet_distance_equals_the_one_with_a_matrix_root():
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(60, 5)) @ rng.normal(size=(5, 5)), rng.normal(size=(50, 5)) + 1
    sigma_x, sigma_y = (np.cov(z, rowvar=False, bias=True) for z in (x, y))
    root = linalg.sqrtm(sigma_x @ sigma_y).real
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(sigma_x + sigma_y - 2 * root)
    assert frechet_distance(x, y) == pytest.approx(expected)
    assert frechet_distance(x, x + 2) == pytest.approx(5 * 4)
    assert frechet_distance(x, x[::-1]) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="two feature vectors"):
        frechet_distance(x[:1], y)


def test_features_are_one_row_for_each_square_of_a_line(perceptual):
    assert window_features(np.zeros((128, 512, 3), np.uint8)).shape == (4, 256)
    assert window_features(np.zeros((128, 130, 3), np.uint8)).shape == (1, 256)


@pytest.mark.parametrize(
    "read, true, hits",
    [("停场入口", "停车场入口", "10111"), ("停车", "停车", "11"), ("", "店", "0"), ("X停车", "停车", "11")],
)
def test_found_by_hand(read, true, hits):
    assert "".join("01"[hit] for hit in found(read, true)) == hits


def test_bootstrap_equals_drawing_with_a_loop():
    rng = np.random.default_rng(4)
    values, clusters = rng.normal(size=60), np.repeat(np.arange(20), 3).astype(str)
    means = []
    for _ in range(4000):
        drawn = rng.integers(20, size=20)
        means.append(np.mean([values[clusters == str(name)] for name in drawn]))
    mean, low, high = bootstrap(values, clusters, resamples=4000)
    assert mean == pytest.approx(values.mean())
    assert (low, high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.02)
    assert bootstrap(values, clusters) == bootstrap(values, clusters)
    assert bootstrap([3.0, 3.0]) == (3, 3, 3)
    with pytest.raises(ValueError, match="at least one"):
        bootstrap([])


def test_a_judge_is_not_asked_about_what_it_cannot_write():
    class Reader:
        name, version, characters = "reader", "1", frozenset("abc店")

        def __call__(self, image):
            return "ab", 0.5

    assert knows(Reader(), "A b店") and not knows(Reader(), "龘")


def test_the_characters_of_tesseract_s_data():
    rows = ["6", "NULL 0", "Joined 7", "|Broken|0|1 f", "店 1 x", "Ａ 5 x", "ab 3 x"]
    text = "\n".join(rows).encode()
    head = struct.pack("<i", 22) + struct.pack("<22q", *[-1] * 21, 4 + 22 * 8)
    assert unicharset(head + text) == frozenset("店ab")


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
    pytest.importorskip("rapidocr", reason="the judge PP-OCRv6 is not installed (extra: evaluate)")
    DiffTSR(preset("tiny")).save(tmp_path / "weights")
    (tmp_path / "broken.png").write_bytes(b"not an image")
    command = [sys.executable, "-m", "difftsr.evaluate", "--demo", "broken.png", "--weights", "weights"]
    done = subprocess.run(
        [*command, "--output", "out", "--steps", "1"], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONIOENCODING": "cp1252"}, encoding="cp1252",  # a console without Chinese
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "broken.png" in done.stderr and "mean NED" in done.stdout
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert len(report["lines"]) == len(demo_lines([]))
    assert Image.open(tmp_path / "out" / "gallery.png").width > 600


# ---------------------------------------------------------------- reports


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a small set (three texts, two strengths each), tiny random weights and a restorer of one's own."""
    pytest.importorskip("rapidocr", reason="the judge PP-OCRv6 is not installed (extra: evaluate)")
    folder = tmp_path_factory.mktemp("evaluate")
    rows = {row.name: row for row in labelled(SAMPLES)}
    text = ["file\thr\ttext\tstrength"]
    for kind in ("lr", "hr"):
        (folder / "set" / kind).mkdir(parents=True)
    for name in ("01", "05", "09"):
        row = rows[f"{name}.png"]
        shutil.copy(row.sharp, folder / "set" / "hr" / f"{name}.png")
        for strength, factor in (("mild", 1), ("hard", 4)):
            with Image.open(row.path) as image:
                small = image.convert("RGB").reduce(factor)
            small.save(folder / "set" / "lr" / f"{name}-{strength}.png")
            text.append(f"{name}-{strength}.png\t{name}.png\t{row.truth}\t{strength}")
    shutil.copy(SAMPLES / "hr" / "01.png", folder / "set" / "hr" / "tall.png")
    Image.new("RGB", (20, 30)).save(folder / "set" / "lr" / "tall.png")  # no line: it is left out, and said
    text.append("tall.png\ttall.png\t停\tmild")
    (folder / "set" / "labels.tsv").write_text("\n".join(text) + "\n", encoding="utf-8")
    DiffTSR(preset("tiny")).save(folder / "weights")
    (folder / "mine.py").write_text(
        "import os\nimport time\n"
        "import numpy as np\n"
        "from PIL import Image\n"
        "from difftsr.restorers import Restorer\n\n\n"
        "def noise(config):\n"
        "    def run(line):\n"
        "        open('calls.txt', 'a').write(line.name + '\\n')\n"
        "        rng = np.random.default_rng(len(line.name))\n"
        "        return Image.fromarray(rng.integers(0, 256, (128, 512, 3), dtype=np.uint8))\n\n"
        "    return Restorer('noise', run, identity='noise 1')\n\n\n"
        "def slow(config):\n"
        "    restorer, done = noise(config), []\n"
        "    def run(line):\n"
        "        while len(done) == 2 and os.path.exists('hold'):  # waits to be killed\n"
        "            time.sleep(0.05)\n"
        "        done.append(line)\n"
        "        return restorer.run(line)\n\n"
        "    return Restorer('slow', run, identity='slow 1')\n",
        encoding="utf-8",
    )
    return folder


def settings(place: Path, **changes) -> EvaluateConfig:
    chosen = {
        "set": str(place / "set"), "weights": str(place / "weights"), "steps": 1, "judges": ("v6",),
        "cache": place / "cache", "output": place / "out", "baselines": ("mine:noise",), "device": "cpu",
    }  # fmt: skip
    return EvaluateConfig(**(chosen | changes))


@pytest.fixture(scope="module")
def report(place):
    try:
        alexnet()
    except ModuleNotFoundError as error:
        pytest.skip(f"LPIPS has no weights here: {error}")
    here = os.getcwd()
    os.chdir(place)
    try:
        return evaluate(settings(place))
    finally:
        os.chdir(here)


def test_hr_beats_the_input_and_the_input_beats_noise_on_every_measure(report):
    means = {(row["restorer"], row["metric"]): row for row in report["figures"] if row["slice"] == "all"}
    for name, metric in metrics(["v6"]).items():
        if name in ("seconds", "peak_mb"):
            continue
        best, middle, worst = (means[restorer, name]["mean"] for restorer in ("hr", "input", "noise"))
        assert best > middle > worst if metric.higher else best < middle < worst, name
        row = means["input", name]
        assert row["low"] <= row["mean"] <= row["high"] and row["lines"] == 6
    assert means["hr", "ned_v6"]["mean"] == 1 and means["hr", "lpips"]["mean"] == 0
    assert means["hr", "afd"]["mean"] == pytest.approx(0, abs=1e-6) and means["hr", "psnr"]["mean"] == PSNR_TOP


def test_the_files_of_a_report(place, report):
    files = {path.name for path in (place / "out").iterdir()}
    assert files - {"failures.jpg"} == {"report.md", "report.json", "figures.png", "sheet-01.jpg"}
    text = (place / "out" / "report.md").read_text(encoding="utf-8")
    assert report["left_out"] == ["tall.png"]
    headings = "| restorer |", "## Bars", "**not met**", "**hard**", "**Chinese**"
    for words in (*headings, "tall.png", "hanzi", "(sheet-01.jpg)"):
        assert words in text
    assert json.loads((place / "out" / "report.json").read_text(encoding="utf-8")) == json.loads(json.dumps(report))
    assert Image.open(place / "out" / "figures.png").width > 600
    assert len(report["lines"]) == 6 * len(report["restorers"])
    timed = [record for record in report["lines"] if record["restorer"] == "difftsr"]
    assert all(record["seconds"] > 0 for record in timed)
    if Path("/proc/self/clear_refs").exists():
        assert all(record["peak_mb"] > 50 for record in timed)


def test_what_is_in_the_cache_is_neither_restored_nor_measured_again(place, report, monkeypatch):
    calls = (place / "calls.txt").read_text(encoding="utf-8").split()
    assert sorted(calls) == sorted({record["file"] for record in report["lines"]})
    monkeypatch.chdir(place)
    monkeypatch.setattr(scores, "lpips", lambda *_: pytest.fail("measured again"))
    again = evaluate(settings(place, output=place / "again"))
    assert again == report
    assert (place / "calls.txt").read_text(encoding="utf-8").split() == calls


@pytest.mark.parametrize(
    "module, restored, measured",
    [("certainty", True, False), ("dataset", True, False), ("idm", True, False), ("text_lines", True, True),
     ("scores", False, True), ("measures", False, True), ("vae", True, True), ("report", False, False),
     ("evaluate", False, False), ("command", False, False)],
)  # fmt: skip
def test_a_change_of_code_asks_for_new_figures_where_it_decides_them(module, restored, measured, tmp_path, monkeypatch):
    """What is kept under the name of other code is not served: the name follows from what is imported."""

    def identities() -> tuple[str, str]:
        asked = (("restore", ("evaluate",)), ("scores", ("restorers",)))  # as lessons 14b and 14c ask
        return tuple(restorers.code_identity.__wrapped__(name, without) for name, without in asked)

    package = shutil.copytree(ROOT / "difftsr", tmp_path / "difftsr")
    monkeypatch.setattr(restorers.measures, "__file__", str(package / "measures.py"))
    before = identities()
    with (package / f"{module}.py").open("a", encoding="utf-8") as file:
        file.write("CHANGED = 1\n")
    after = identities()
    assert [a != b for a, b in zip(before, after)] == [restored, measured]


def test_another_version_of_a_package_asks_for_new_figures(monkeypatch):
    before = restorers.code_identity.__wrapped__("scores", ("restorers",))
    true_version = restorers.importlib.metadata.version
    monkeypatch.setattr(restorers.importlib.metadata, "version", lambda name: true_version(name) + ".1")
    assert restorers.code_identity.__wrapped__("scores", ("restorers",)) != before


def test_imports_are_found_wherever_they_stand():
    source = b"""
import os, torch.nn
from .vae import VAE
from difftsr import measures
from difftsr.gate import (
    gate,
)
def work():
    from rapidocr import RapidOCR
def main():
    from difftsr.command import main
"""
    assert restorers.imported(source) == {
        "os", "torch.nn", "difftsr.vae", "difftsr.measures", "difftsr.gate", "rapidocr"
    }  # fmt: skip


def test_the_demo_computes_where_it_is_told(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("difftsr.evaluate.JUDGES", {"v6": lambda: None})
    monkeypatch.setattr(DiffTSR, "from_pretrained", lambda name, device: asked.append(device) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["--demo", "--device", "cuda:7", "--output", str(tmp_path)])
    assert asked == ["cuda:7"]


def test_a_label_that_is_empty_is_left_out_and_said(tmp_path, capsys):
    Image.new("RGB", (80, 20)).save(tmp_path / "a.png")
    Image.new("RGB", (80, 20)).save(tmp_path / "b.png")
    (tmp_path / "labels.tsv").write_text("file\ttext\na.png\t \nb.png\tEXIT\n", encoding="utf-8")
    lines, refused = read_set(EvaluateConfig(set=str(tmp_path)))
    assert [line.name for line in lines] == ["b.png"] and refused == ["a.png"]
    assert "a.png: its label is empty" in capsys.readouterr().err


def test_a_run_killed_and_taken_up_equals_one_that_ran_through(place, report):
    def command(name: str) -> list[str]:
        return [
            sys.executable, "-m", "difftsr.evaluate", "--set", "set", "--weights", "weights", "--steps", "1",
            "--judges", "v6", "--baselines", "mine:slow", "--cache", f"cache-{name}", "--output", name,
            "--device", "cpu",
        ]  # fmt: skip

    def without_cost(name: str) -> dict:
        whole = json.loads((place / name / "report.json").read_text(encoding="utf-8"))
        costs = ("seconds", "peak_mb")
        whole["lines"] = [{k: v for k, v in row.items() if k not in costs} for row in whole["lines"]]
        whole["figures"] = [row for row in whole["figures"] if row["metric"] not in costs]
        whole["bars"] = [bar for bar in whole["bars"] if not bar["bar"].startswith("s/line")]
        return whole

    (place / "hold").touch()
    process = subprocess.Popen(command("killed"), cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    done = place / "cache-killed" / "restored"
    while process.poll() is None:
        if done.is_dir() and len(list(done.glob("[!.]*.png"))) >= 8:  # our six lines, and two of the slow ones
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    (place / "hold").unlink()
    assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
    assert not (place / "killed" / "report.json").exists()
    assert len(list(done.glob("[!.]*.png"))) < 12
    for name in ("killed", "through"):
        result = subprocess.run(command(name), cwd=place, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    assert without_cost("killed") == without_cost("through")


def test_a_report_against_itself_and_against_better_weights(report, place):
    same = compare(report, report)
    assert same["differences"] == {} and same["changed"] == []
    better = json.loads(json.dumps(report))
    for record in better["lines"]:
        if record["restorer"] == "difftsr" and record["file"] == "01-hard.png":
            record["ned_v6"] += 0.6
            record["reading_v6"] = "竹溪茶"
    result = compare(report, better)
    row = next(r for r in result["differences"]["difftsr"] if (r["slice"], r["metric"]) == ("all", "ned_v6"))
    assert list(result["differences"]) == ["difftsr"] and row["mean"] == pytest.approx(0.1)
    assert row["low"] == 0 and 0.1 < row["high"] <= 0.3 + 1e-9 and row["lines"] == 6
    assert [(r["file"], r["b"]) for r in result["changed"]] == [("01-hard.png", "竹溪茶")]
    other = json.loads(json.dumps(report).replace("-hard.png", "-other.png").replace("-mild.png", "-x.png"))
    with pytest.raises(ValueError, match="no line in common"):
        compare(report, other)


def test_the_comparison_is_printed_and_written(place, report, tmp_path, capsys):
    assert main(["--compare", str(place / "out"), str(place / "out" / "report.json"), "--output", str(tmp_path)]) == 0
    assert "No restorer gave another result." in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"compare.md", "compare.json"}


def test_an_ablation_has_a_row_for_every_switch(place, report, monkeypatch):
    monkeypatch.chdir(place)
    few = {"as it comes": "", "baseline": "mode=baseline", "true text": "text=truth", "later": "no_such_switch=1"}
    monkeypatch.setattr(ablations, "ABLATIONS", few)
    result = evaluate(settings(place, ablate=True, baselines=(), output=place / "ablation"))
    assert result["restorers"] == ["input", "difftsr", "difftsr:mode=baseline", "difftsr:text=truth", "hr"]
    assert Image.open(place / "ablation" / "ablation.png").width > 600
    assert {row["slice"] for row in result["effects"]} == {"input", "baseline", "true text"}
    text = (place / "ablation" / "report.md").read_text(encoding="utf-8")
    assert text.count("| true text |") >= 2 and "(ablation.png)" in text


def test_effects_are_differences_to_our_first_row():
    base = {"slices": {"all": "all"}, "truth": "a"}
    scores_of = {"input": [0.1, 0.9], "difftsr": [0.5, 0.7], "difftsr:steps=4": [0.6, 0.9], "hr": [1, 1]}
    records = [
        base | {"restorer": name, "file": str(n), "text_id": str(n), "ned_v6": value}
        for name, values in scores_of.items() for n, value in enumerate(values)
    ]  # fmt: skip
    rows = ablations.effects(records, {"difftsr:steps=4": "4 steps"}, ["ned_v6"])
    found = {row["slice"]: (row["mean"], row["low"], row["high"], row["lines"]) for row in rows}
    assert found == {"input": pytest.approx((-0.1, -0.4, 0.2, 2)), "4 steps": pytest.approx((0.15, 0.1, 0.2, 2))}


def test_failures_are_the_lines_that_were_read_better_before():
    def record(name: str, file: str, score: float, reading: str) -> dict:
        return {"restorer": name, "file": file, "truth": "停车", "ned_v6": score, "reading_v6": reading}

    lines = [record("input", file, score, "停车") for file, score in (("a", 1.0), ("b", 1.0), ("c", 0.0), ("d", 1.0))]
    lines += [record("difftsr", file, score, "停") for file, score in (("a", 0.5), ("b", 0.0), ("c", 0.5), ("d", 1.0))]
    lines += [{"restorer": "difftsr", "file": "e", "truth": "龘"}]  # nobody was asked
    found = failures({"judges": {"v6": "PP-OCRv6"}, "lines": lines})
    assert [(row["file"], row["harm"]) for row in found] == [("b", 1), ("a", 0.5)]
    assert found[0]["input"] == "停车" and found[0]["difftsr"] == "停" and found[0]["hr"] is None
    assert [row[0] for row in failure_table(found)[1]] == ["b", "a"]


def test_some_texts_of_a_set_come_with_all_their_pictures(place):
    for texts, expected in ((1, {"01"}), (2, {"01", "05"}), (9, {"01", "05", "09"})):
        lines, _ = read_set(settings(place, texts=texts))
        assert {line.text_id for line in lines} == expected and len(lines) == 2 * len(expected)


def test_real_ablation_rows_name_switches_that_exist():
    rows = ablations.ablations()
    assert len(rows) == len(ablations.ABLATIONS), "a row names a switch that a restoration does not have"
    for spec in rows.values():
        parsed(spec.partition(":")[2])


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--set", "nowhere"], "no set of lines"),
        (["photo.png"], "--set"),
        (["--set", "SET", "--texts", "0"], "at least 1"),
        (["--compare", "nowhere", "nowhere"], "no report"),
        (["--set", "SET", "--baselines", "magic"], "no such restorer"),
        (["--set", "SET", "--baselines", "difftsr:speed=9"], "no setting of a restoration"),
        (["--set", "SET", "--baselines", "folder:nowhere"], "no such folder"),
        (["--set", "SET", "--baselines", "no_such_module:make"], "name a function"),
        (["--set", "SET", "--weights", "nowhere"], "nowhere"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(arguments, words, place, capsys):
    arguments = [str(place / "set") if argument == "SET" else argument for argument in arguments]
    assert main(arguments) == 2
    *before, error = capsys.readouterr().err.splitlines()
    assert words in error and error.startswith("difftsr.evaluate: ")
    assert all("left out" in line for line in before)


def test_a_folder_of_results_is_a_restorer_and_may_lack_lines(tmp_path):
    Image.new("RGB", (80, 20), "red").save(tmp_path / "01.jpg")
    restorer = make_restorer(f"folder:{tmp_path}", EvaluateConfig())
    one, two = (restorer.run(LabelledLine(Path("x"), name=name)) for name in ("sub/01.webp", "02.webp"))
    assert one.size == (80, 20) and two is None


def test_other_weights_settings_and_inputs_have_other_fingerprints(place):
    config = settings(place)
    makers = ["difftsr", "difftsr:seed=1", "difftsr:mode=baseline"]
    assert len({make_restorer(name, config).identity for name in makers}) == 3
    assert len({fingerprint(*parts) for parts in (("a", "bc"), ("ab", "c"), (b"abc",), (None, "abc"))}) == 4
    zeros = np.zeros((2, 3), np.uint8)
    assert fingerprint(zeros) != fingerprint(zeros.reshape(3, 2))


@pytest.mark.parametrize(
    "text, script, length",
    [("停车场", "Chinese", "1 to 4"), ("OPEN 24", "Latin", "5 to 8"), ("Coffee & 书", "mixed", "5 to 8"),
     ("13705648291", "digits", "9 and more")],
)  # fmt: skip
def test_slices(text, script, length):
    belongs = slices(LabelledLine(Path("x"), text, strength="hard", name="photos/1.png"))
    assert belongs == {"all": "all", "script": script, "length": length, "strength": "hard", "group": "photos"}


def test_bands_of_characters():
    pytest.importorskip("jieba", reason="frequencies come from jieba's dictionary (extra: data)")
    assert [band(c) for c in "的甯a7¥"] == ["hanzi 1-500", "rarer hanzi", "letters", "digits", "signs"]


@pytest.mark.parametrize(
    "bar, figure, other, met",
    [
        (Bar("psnr", "hard", strict=True), 20.1, 20.0, True),
        (Bar("psnr", "hard", strict=True), 20.0, 20.0, False),
        (Bar("psnr", "hard", margin=-1), 19.0, 20.0, True),
        (Bar("psnr", "hard", margin=-1), 18.9, 20.0, False),
        (Bar("lpips", "hard", strict=True), 0.3, 0.4, True),
        (Bar("lpips", "hard", strict=True), 0.4, 0.3, False),
        (Bar("ned_v4", "hard", margin=0.03), 0.93, 0.9, True),
        (Bar("ned_v4", "hard", margin=0.03), 0.92, 0.9, False),
        (Bar("ned_v4", "hard", against=None, margin=0.95), 0.95, None, True),
        (Bar("ned_v4", "hard"), 0.95, None, None),
    ],
)
def test_bars(bar, figure, other, met):
    means = {(name, bar.metric, "hard"): x for name, x in (("difftsr", figure), ("input", other)) if x is not None}
    assert bar.judge(means, metrics(["v4"]))["met"] is met


def test_a_bar_of_reading_comes_with_what_sharp_lines_get():
    means = {(name, metric, "hard"): 0.98 for name in ("difftsr", "input", "hr") for metric in ("ned_v4", "lpips")}
    sharp = [Bar(metric, "hard").judge(means, metrics(["v4"]))["sharp"] for metric in ("ned_v4", "lpips")]
    assert sharp == [0.98, None]


def test_figures_leave_out_lines_on_which_a_judge_was_not_asked():
    base = {"restorer": "x", "slices": {"all": "all"}, "text_id": "1", "truth": "a"}
    rows = figures([base | {"file": "1", "ned_v4": 0.5}, base | {"file": "2"}], ["ned_v4"])
    assert [(row["mean"], row["lines"]) for row in rows] == [(0.5, 1)]


def test_the_published_inputs_and_outputs_read_as_recorded():
    reference = os.environ.get("DIFFTSR_REFERENCE")
    if not reference or not (Path(reference) / "real_lines").is_dir():
        pytest.skip("DIFFTSR_REFERENCE names no reference folder")
    pytest.importorskip("rapidocr_onnxruntime", reason="the judge PP-OCRv4 is not installed (extra: evaluate)")
    judge, config = PPOCR("v4"), EvaluateConfig(set=f"{reference}/real_lines")
    lines = [line for line in labelled(config.set_folder()) if line.name.startswith("difftsr_synth_lr/")]
    for name, expected in (("input", 0.855), ("released", 0.975)):
        restorer: Restorer = make_restorer(name, config)
        scores = [ned(judge(np.asarray(restorer.run(line)))[0], line.truth) for line in lines]
        assert len(scores) == 10 and np.mean(scores) == pytest.approx(expected, abs=6e-4)


def test_real_esrgan_keeps_a_flat_picture_flat(tmp_path):
    pytest.importorskip("ncnn", reason="ncnn is not installed (extra: baselines)")
    Image.new("RGB", (24, 16), (200, 60, 20)).save(tmp_path / "flat.png")
    try:
        restorer = make_restorer("animevideov3", EvaluateConfig())
    except ImportError as error:
        pytest.skip(str(error))
    image = np.asarray(restorer.run(LabelledLine(tmp_path / "flat.png")))
    assert image.shape == (64, 96, 3)
    assert np.abs(image[16:-16, 16:-16].astype(int) - [200, 60, 20]).max() < 12
