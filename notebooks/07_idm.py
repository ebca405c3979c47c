# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 07 · Image diffusion

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
from difftsr.text_lines import PAD, UNK
from difftsr.unet import CrossAttention, UNet, UNetConfig


# %% [markdown]
# ## 1. Forward: drowning a line in noise

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


# %% [markdown]
# ## 2. The text as a condition

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


# %% [markdown]
# ## 3. The network

# %%
#| export
@dataclass
class IDMConfig:
    """Settings of the image diffusion. The defaults are the classroom preset."""

    unet: UNetConfig = field(default_factory=UNetConfig)
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    prediction: Prediction = "residual"  # eps in the published model

    @classmethod
    def tiny(cls, vocab_size: int = 38, latent_channels: int = 4) -> "IDMConfig":
        """For tests: about half a million parameters."""
        c = latent_channels
        return cls(
            UNetConfig(2 * c, c, 24, (1, 2), num_res_blocks=1, num_heads=2, context_dim=48, groups=8),
            TextEncoderConfig(vocab_size, 48, 1, heads=2, dim_head=24, character_dim=32),
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


class IDM(nn.Module):
    """The image diffusion model: a U-Net on concat(z_t, z_lr) that reads the text while it removes the noise."""

    def __init__(self, config: IDMConfig, glyphs: Tensor | None = None):
        super().__init__()
        if config.prediction not in get_args(Prediction):
            raise ValueError(f"no prediction {config.prediction!r}: {', '.join(get_args(Prediction))}")
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
        self, z_t: Tensor, z_lr: Tensor, t: Tensor, context: Tensor, centers: Tensor | None = None
    ) -> Tensor:
        """The raw prediction (B, C, h, w) at times t (B,), under a text `context` (B, 24, d) with `centers` (B, 24)."""
        return self.unet(torch.cat([z_t, z_lr], dim=1), t, context, centers)

    def predict(
        self, z_t: Tensor, z_lr: Tensor, t: Tensor, context: Tensor, centers: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Estimates (z_0, eps) of the clean latent and of the noise in z_t."""
        prediction = self(z_t, z_lr, t, context, centers)
        return self.diffusion.to_z0_eps(prediction, z_t, t, z_lr, self.config.prediction)


# %% [markdown]
# ## 4. Texts to train with

# %%
#| export
Mix = tuple[float, float, float, float]
REAL, TRUE, CONFUSED, NONE = range(4)  # where the text of a training line comes from
MIX: Mix = (0.50, 0.25, 0.15, 0.10)


def similar_glyphs(embedding: CharacterEmbedding, count: int = 8) -> Tensor:
    """For every class the `count` classes that look most like it, (K, count); PAD and UNK are like themselves."""
    bitmaps = unpack_bits(embedding.glyphs).float()  # (K, 576)
    unit = F.normalize(bitmaps - bitmaps.mean(1, keepdim=True), dim=1)
    likeness = unit @ unit.T
    likeness.fill_diagonal_(-2)
    likeness[:, [PAD, UNK]] = -2
    similar = likeness.topk(min(count, len(bitmaps) - 3), dim=1).indices
    similar[[PAD, UNK]] = torch.tensor([[PAD], [UNK]], device=similar.device)
    return similar


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

    A real reading; the truth with random confidences; a simulated misreading (`confused`); no text at all. The target
    of the training stays the truth.

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


# %% [markdown]
# ## 5. The training stage

# %%
#| export
@dataclass
class IDMTraining:
    """How the IDM learns."""

    learning_rate: float = 4e-4
    batch_size: int = 16
    weight_decay: float = 0.01
    loss: Literal["l2", "l1"] = "l2"  # l1 without weights is the released code's
    snr_clip: tuple[float, float] = (0.5, 5.0)  # limits of the weight of an error of z_0
    ocr_weight: float = 0.02
    ocr_lines: int = 4  # lines of a batch that are decoded and read
    ocr_start: float = 0.75  # fraction of the run after which the OCR loss is on
    text_mix: Mix = MIX  # real readings, truth, confusions, no text
    jitter: float = 0.01  # std of the noise on true centres, a fraction of the width


# %%
#| export
class IDMStage:
    """Trains `model.idm`; the VAE and the recogniser are frozen, but gradients of the OCR loss pass through them.

    Whoever runs the stage sets `progress` (0 to 1), the fraction of the run that is done. A batch may carry what is
    costly to compute: latents under "z_hr" and "z_lr", a `Reading` of its LR lines under "reading".
    """

    name = "idm"
    trains = ("idm",)

    def __init__(self, training: IDMTraining, model: nn.Module):
        self.training = training
        self.progress = 0.0
        encoder = model.idm.text_encoder
        self.similar = similar_glyphs(encoder.transformer.token_emb) if encoder.config.soft else None
        model.idm.unet.to(memory_format=torch.channels_last)  # faster convolutions, the same numbers

    def optimizers(self, model: nn.Module) -> dict[str, torch.optim.Optimizer]:
        matrices = [p for p in model.idm.parameters() if p.ndim > 1]
        others = [p for p in model.idm.parameters() if p.ndim <= 1]
        groups = [dict(params=matrices, weight_decay=self.training.weight_decay), dict(params=others, weight_decay=0.0)]
        return {"idm": torch.optim.AdamW(groups, lr=self.training.learning_rate, betas=(0.9, 0.99))}

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
        z_t = diffusion.q_sample(z_hr, t, noise)

        prediction = idm(z_t, z_lr, t, idm.context(told), told.centers)
        z_0, _ = diffusion.to_z0_eps(prediction, z_t, t, z_lr, kind)
        loss = self.denoising_loss(prediction, diffusion.target(z_hr, noise, t, z_lr, kind), diffusion, t, kind)
        logs = {"denoise": loss.detach(), "gain_db": 10 * torch.log10((z_lr - z_hr).square().mean() / error(z_0, z_hr))}
        if self.training.ocr_weight and self.progress >= self.training.ocr_start:
            ocr = ocr_loss(model, z_0, batch["tokens"], t, self.training.ocr_lines)
            loss = loss + self.training.ocr_weight * ocr
            logs["ocr"] = ocr.detach()
        yield loss, "idm", {"loss": loss.detach(), **logs}

    def text(self, model: nn.Module, batch: dict, generator: torch.Generator) -> Reading:
        """The texts under which this batch is trained; only lines that are to be read are read."""
        reading = batch.get("reading")
        if reading is None and "lr" in batch:
            reading = lambda rows: model.recognizer.read(batch["lr"][rows])  # noqa: E731
        settings = self.training
        return text_conditions(
            batch["tokens"], batch["centers"], reading, generator, settings.text_mix,
            similar=self.similar, jitter=settings.jitter,
        )  # fmt: skip

    def denoising_loss(
        self, prediction: Tensor, target: Tensor, diffusion: GaussianDiffusion, t: Tensor, kind: Prediction
    ) -> Tensor:
        """The mean absolute error, or the squared error weighted by the level of the noise."""
        if self.training.loss == "l1":
            return F.l1_loss(prediction, target)
        squared = (prediction - target).square().flatten(1).mean(1)  # (B,)
        return (diffusion.loss_weight(t, kind, self.training.snr_clip) * squared).mean()


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


def spread_times(batch: int, timesteps: int, generator: torch.Generator) -> Tensor:
    """Times (B,) whose distribution is uniform, spread evenly over the batch, in random order (arXiv 2107.00630)."""
    device = generator.device
    offset = torch.rand(1, generator=generator, device=device)
    order = torch.randperm(batch, generator=generator, device=device)
    return ((order + offset) / batch % 1 * timesteps).long().clamp(max=timesteps - 1)


def ocr_loss(model: nn.Module, z_0: Tensor, tokens: Tensor, t: Tensor, lines: int) -> Tensor:
    """How badly the decoded one-step estimates z_0 of the first few lines read as their true text.

    The gradient passes through the recogniser and the decoder to z_0. With eps-prediction z_0 explodes near T, and each
    line counts alpha_bar_t; other predictions need no such weight.
    """
    images = model.vae.from_latent(z_0[:lines])
    losses = model.recognizer.ocr_loss(images, tokens[:lines], reduction="none")  # (lines,)
    if model.idm.config.prediction == "eps":
        losses = losses * model.idm.diffusion.alpha_bar[t[:lines]]
    return losses.mean()
