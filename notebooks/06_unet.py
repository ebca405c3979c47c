# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 06 · The U-Net

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
#| default_exp unet

# %%
#| export
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


# %% [markdown]
# ## 1. Telling the network the time

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


# %% [markdown]
# ## 2. Residual blocks that hear the time

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
# ## 3. Attention

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

    def forward(self, x: Tensor, context: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        source = x if context is None else context
        q, k, v = (self.split(part) for part in (self.to_q(x), self.to_k(source), self.to_v(source)))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)  # (B, heads, m, dim_head)
        return self.to_out(mixed.transpose(1, 2).flatten(2))

    def split(self, x: Tensor) -> Tensor:
        """(B, m, heads * dim_head) -> (B, heads, m, dim_head)"""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


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

    def forward(
        self, u: Tensor, context: Tensor, columns: Tensor | None = None, centers: Tensor | None = None
    ) -> Tensor:
        u = u + self.attn1(self.norm1(u))
        bias = None if self.distance is None else self.distance(columns, centers).to(u.dtype)
        u = u + self.attn2(self.norm2(u), context, bias)
        return u + self.ff(self.norm3(u))


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


# %% [markdown]
# ## 5. The whole network

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
