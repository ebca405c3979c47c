"""Released weights: the published constructors, every file layout, alphabets, conversion, and training."""

import hashlib
import json
import os
import sys
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from difftsr import official
from difftsr.idm import IDMStage, IDMTraining, condition, reader_classes, text_classes
from difftsr.model import DiffTSR, preset
from difftsr.mom import MoMStage, MoMTraining, PublishedMoMConfig
from difftsr.recognizer import RecognizerConfig, RecognizerStage, RecognizerTraining
from difftsr.restore import line_to_canvas, restore
from difftsr.sampling import released_reading, to_released
from difftsr.tdm import PublishedTDMConfig, TDMStage, TDMTraining
from difftsr.text_lines import Alphabet
from difftsr.train import TrainConfig, starting_model, train
from difftsr.unet import WinogradConv2d, use_winograd
from difftsr.vae import VAEConfig, VAEStage, VAETraining
from parity_common import COMMITTED, assert_close, load_fixture, parity_folder, recipe_state_dict

WHOLE = {"atol": 1e-4, "rtol": 1e-3}
CHARACTERS = "天地玄黄宇宙洪荒日月盈昃"  # 12: 13 diffusion classes, 15 recogniser classes
UNET = {
    "image_size": [8, 32], "in_channels": 6, "out_channels": 3, "model_channels": 32, "attention_resolutions": [2],
    "num_res_blocks": 1, "channel_mult": [1, 2], "num_heads": 4, "resblock_updown": True, "context_dim": 16,
    "use_spatial_transformer": True, "transformer_depth": 1, "use_checkpoint": True, "legacy": False,
}  # fmt: skip


def small_config():
    """The published networks at sizes for tests."""
    config = preset("paper")
    config.image_size = (32, 128)
    config.vae = VAEConfig.published(dict(z_channels=3, ch=32, ch_mult=(1, 1, 2), num_res_blocks=1), embed_dim=3)
    text = replace(config.idm.text_encoder, vocab_size=13, n_embed=16, n_layer=1)
    config.idm = replace(config.idm, unet=official.unet_config(UNET), text_encoder=text)
    config.tdm = PublishedTDMConfig(13, dim=32, heads=4, local_heads=2, depth=1)
    config.mom = PublishedMoMConfig(config.idm.unet, text, num_classes=13)
    config.recognizer = RecognizerConfig.paper(15)
    return config


@pytest.fixture(scope="module")
def donor():
    torch.manual_seed(0)
    model = DiffTSR(small_config(), Alphabet(CHARACTERS)).eval()
    for network in (model.idm, model.tdm, model.mom):
        for parameter in network.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.05)
    model.idm.text_encoder.load_state_dict(model.mom.Transformer.state_dict())  # the released model has one for both
    return model


@pytest.fixture(scope="module")
def parts(donor):
    """Published state dicts of the small model."""
    whole = {"unet": donor.idm.unet, "tdm": donor.tdm, "mom": donor.mom, "vae": donor.vae}
    whole |= {"recognizer": donor.recognizer, "text_encoder": donor.mom.Transformer}
    states = {name: dict(network.state_dict()) for name, network in whole.items()}
    states["vae"] = {key: value for key, value in states["vae"].items() if "latent_" not in key}
    return states


def prefixed(prefix, tensors):
    return {prefix + key: value for key, value in tensors.items()}


def lightning(tensors, callback):
    """The content of a Lightning file, with what else lies in one."""
    return {
        "epoch": 3, "global_step": 1000, "pytorch-lightning_version": "1.4.2", "state_dict": tensors,
        "callbacks": {callback: {"best": torch.tensor(0.5), "monitor": "val/rec_loss"}}, "hooks": [callback()],
        "optimizer_states": [{"state": {}, "param_groups": []}], "lr_schedulers": [],
    }  # fmt: skip


@contextmanager
def lightning_callback():
    """A class that pickles as Lightning's callback, and whose module is gone when the file is read."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    with pytest.MonkeyPatch.context() as patch:
        for part in ("pytorch_lightning", "pytorch_lightning.callbacks", name):
            patch.setitem(sys.modules, part, ModuleType(part))
        sys.modules[name].ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": name})
        yield sys.modules[name].ModelCheckpoint


@pytest.fixture(scope="module")
def files(parts, tmp_path_factory):
    """Every published layout, as a file (1.5 GB, most of it the recogniser): to be read only."""
    folder = tmp_path_factory.mktemp("published")
    with lightning_callback() as callback:
        for name, content in layouts(parts, callback).items():
            torch.save(content, folder / f"{name}.ckpt")
    (folder / "alphabet.txt").write_text(CHARACTERS, encoding="utf-8")
    return folder


def layouts(parts, callback):
    """The content of every published file by its name."""
    vae_loss = {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.zeros(2, 3)}
    reader = prefixed("module.", parts["recognizer"])
    return {
        "joint": {
            "IDM_Unet": parts["unet"], "TDM_Decoder": parts["tdm"], "MoM_module": parts["mom"],
            "VAE_model": parts["vae"],
        },
        "step0": lightning(parts["vae"] | vae_loss, callback),
        "step1": lightning(
            prefixed("model.diffusion_model.", parts["unet"]) | prefixed("first_stage_model.", parts["vae"] | vae_loss)
            | prefixed("hybrid_concat_cond_stage_model.", parts["vae"] | vae_loss) | {"betas": torch.zeros(1000)}
            | prefixed("hybrid_cross_attn_cond_stage_model.", parts["text_encoder"])
            | prefixed("pixel_loss.trans_ocr_model.", reader),
            callback,
        ),
        "step2": lightning(
            prefixed("denoise_fn.diffusion_model.", parts["tdm"]) | prefixed("cond_stage_model.", parts["vae"])
            | {"log_alpha": torch.zeros(1000), "Lt_history": torch.zeros(1000)},
            callback,
        ),
        "step3": lightning(
            prefixed("IDM_Unet.", parts["unet"]) | prefixed("TDM_Decoder.", parts["tdm"])
            | prefixed("MoM_module.", parts["mom"]) | prefixed("VAE_model.", parts["vae"])
            | prefixed("IDM_recognize_loss_metric.trans_ocr_model.", reader) | {"IDM_betas": torch.zeros(1000)},
            callback,
        ),
        "transocr": {"state_dict": parts["recognizer"], "epoch": 1},
        "transocr_module": reader,
        "transocr_module_module": prefixed("module.", reader),
    }  # fmt: skip


# ---------------------------------------------------------------- fixtures


def test_committed_fixtures_are_the_recorded_ones():
    manifests = sorted(COMMITTED.glob("*.json"))
    assert [m.stem for m in manifests] == ["idm_schedule", "multinomial_k50", "tdm_small"]
    for manifest in manifests:
        recorded = json.loads(manifest.read_text(encoding="utf-8"))["sha256"]
        assert hashlib.sha256(manifest.with_suffix(".safetensors").read_bytes()).hexdigest() == recorded


# ---------------------------------------------------------------- constructors against recorded values


def recorded_weights(fixture, keys=None):
    """The stored weights of a fixture, or recipe weights for the keys and shapes of its manifest."""
    if fixture.weights:
        return fixture.weights
    return recipe_state_dict(keys, fixture.manifest["recipe_salt"], fixture.manifest["recipe_gain"])


@pytest.mark.parametrize("name", ["idm_unet_small", "idm_unet_4level_recipe"])
def test_unet(name):
    f = load_fixture(name)
    with torch.device("meta"):
        shapes = official.UNet(official.unet_config(f.manifest["config"])).state_dict()
    net = official.unet(f.manifest["config"], recorded_weights(f, {k: tuple(v.shape) for k, v in shapes.items()}))
    with torch.no_grad():
        out = net(f.inputs["x"], f.inputs["timesteps"], f.inputs["context"])
    assert_close(out, f.outputs["eps"], name=name)


@pytest.mark.parametrize("name", ["vae_small", "vae_124_recipe"])
def test_vae(name):
    f = load_fixture(name)
    config = f.manifest["config"]
    with torch.device("meta"):
        shapes = official.VAE(VAEConfig.published(config["ddconfig"], config["embed_dim"])).state_dict()
    shapes = {key: tuple(value.shape) for key, value in shapes.items() if "latent_" not in key}
    net = official.vae(config, recorded_weights(f, shapes) | {"loss.logvar": torch.zeros(())})
    with torch.no_grad():
        posterior = net.encode(f.inputs["x"])  # images in [0, 1]
        assert_close(posterior.mean, f.outputs["mean"], **WHOLE)
        assert_close(posterior.logvar, f.outputs["logvar"], **WHOLE)
        assert_close(net.decode(f.inputs["z"]), f.outputs["decode_z"], **WHOLE)


@pytest.mark.parametrize("spelling", ["weights_", "weights."])
def test_tdm(spelling):
    f = load_fixture("tdm_small")
    weights = {key.replace("axial_pos_emb.weights_", f"axial_pos_emb.{spelling}"): v for key, v in f.weights.items()}
    with torch.no_grad():
        logits = official.tdm(f.manifest["config"], weights)(f.inputs["tokens"], f.inputs["t"], f.inputs["context"])
    assert_close(logits, f.outputs["logits"], **WHOLE)


def test_text_encoder_and_mom():
    f, g = load_fixture("text_encoder_small"), load_fixture("mom_small")
    with torch.no_grad():
        assert_close(official.text_encoder(f.manifest["config"], f.weights)(f.inputs["tokens"]), f.outputs["z"])
        image, text = official.mom(g.manifest["config"], g.weights)(*(g.inputs[k] for k in ("c_t", "z_lr", "z_t", "t")))
    assert_close(image, g.outputs["I_cond"], **WHOLE)
    assert_close(text, g.outputs["C_cond"], **WHOLE)


def test_transocr():
    f = load_fixture("transocr_recipe")
    shapes = DiffTSR(replace(small_config(), recognizer=RecognizerConfig.paper(60))).recognizer.state_dict()
    net = official.transocr(60, recorded_weights(f, shapes))
    text = f.inputs["text_length"], f.inputs["text_input"]
    with torch.no_grad():
        out = net(f.inputs["image_u8"].float() / 255, *text, test=True)
        packed = net(None, *text, conv_feature=out["conv"])["pred"]
    assert_close(out["pred"], f.outputs["pred_test"], **WHOLE)
    assert_close(out["map"], f.outputs["map_test"])
    assert_close(out["conv"][:, ::16], f.outputs["conv_every16"], **WHOLE)
    assert_close(packed, f.outputs["pred_packed"], **WHOLE)


@pytest.mark.skipif(not os.environ.get("DIFFTSR_SLOW"), reason="8 GB and minutes: set DIFFTSR_SLOW=1 to run")
@pytest.mark.parametrize(
    ("name", "tiles"),
    [("IDM_Unet", ""), ("IDM_Unet", " in tiles"), ("TDM_Decoder", ""), ("MoM_module", ""), ("VAE_model", ""),
     ("VAE_model", " in tiles")],
)  # fmt: skip
def test_paper_size(name, tiles):
    f = load_fixture(f"paper_{name}_recipe")
    rows = (row.split("\t") for row in (parity_folder() / "keys" / f"{name}.tsv").read_text().splitlines())
    shapes = {row[0]: tuple(int(n) for n in row[1].split("x")) for row in rows}
    make = dict(IDM_Unet=official.unet, TDM_Decoder=official.tdm, MoM_module=official.mom, VAE_model=official.vae)
    net, x = make[name](f.manifest["config"], recorded_weights(f, shapes)), f.inputs
    if tiles:
        use_winograd(net)
    with torch.no_grad():
        if name == "IDM_Unet":
            pairs = {"eps": net(x["x"], x["timesteps"], x["context"])}
        elif name == "TDM_Decoder":
            pairs = {"logits_every16": net(x["tokens"], x["t"], x["context"])[:, ::16]}
        elif name == "MoM_module":
            pairs = dict(zip(("I_cond", "C_cond"), net(x["c_t"], x["z_lr"], x["z_t"], x["t"])))
        else:
            posterior = net.encode(x["x"])
            pairs = {"moments": torch.cat([posterior.mean, posterior.logvar], 1), "decode_z": net.decode(x["z"])}
    assert pairs.keys() <= f.outputs.keys()
    for key, value in pairs.items():
        assert_close(value, f.outputs[key], atol=1e-3, rtol=1e-3, name=key + tiles)


def test_settings_that_do_not_exist_are_named():
    with pytest.raises(ValueError, match="num_heds.*known.*num_heads"):
        official.unet_config({**UNET, "num_heds": 8})


def test_weights_that_do_not_fit_are_named(parts):
    lacking = {key: value for key, value in parts["unet"].items() if "time_embed" not in key}
    with pytest.raises(ValueError, match=r"U-Net: 4 keys are missing \(time_embed.0.weight"):
        official.unet(UNET, lacking)
    with pytest.raises(ValueError, match="unexpected.*looks like a MoM alone"):
        official.unet(UNET, parts["mom"])
    with pytest.raises(ValueError, match=r"shapes differ.*not \[256, 64\]"):
        official.unet({**UNET, "model_channels": 64}, parts["unet"])


# ---------------------------------------------------------------- files


def same(network, state):
    own = network.state_dict()
    return all(torch.equal(own[key], value) for key, value in state.items())


@pytest.mark.parametrize(
    ("file", "found"),
    [
        ("joint", {"vae", "idm", "tdm", "mom"}),
        ("step0", {"vae"}),
        ("step1", {"vae", "idm", "recognizer"}),
        ("step2", {"vae", "tdm"}),
        ("step3", {"vae", "idm", "tdm", "mom", "recognizer"}),
        ("transocr", {"recognizer"}),
        ("transocr_module", {"recognizer"}),
        ("transocr_module_module", {"recognizer"}),
    ],
)
def test_every_layout_finds_its_networks(files, parts, file, found):
    model = official.load_checkpoint(files / f"{file}.ckpt", alphabet=files / "alphabet.txt", config=small_config())
    assert {"vae", "recognizer", "idm", "tdm", "mom"} - set(model.untrained) == found
    assert "pytorch_lightning" not in sys.modules
    for name in found - {"idm"}:
        assert same(getattr(model, name), parts[name]), name
    if "idm" in found:
        assert same(model.idm.unet, parts["unet"]) and same(model.idm.text_encoder, parts["text_encoder"])
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    if "vae" in found:
        assert torch.allclose(model.vae.latent_scale, torch.tensor(1 / 0.18215))


def in_the_names_of_diffusers(tensors, levels):
    """The published names of an autoencoder in those that diffusers uses, and linear attention."""
    said = {}
    for key, value in tensors.items():
        if key.startswith("decoder.up."):
            place = key.split(".")
            key = ".".join(["decoder", "up", str(levels - 1 - int(place[2])), *place[3:]])
        for theirs, ours in (
            ("down_blocks", "down"), ("up_blocks", "up"), ("resnets", "block"), ("downsamplers.0", "downsample"),
            ("upsamplers.0", "upsample"), ("conv_shortcut", "nin_shortcut"), ("conv_norm_out", "norm_out"),
            ("mid_block.attentions.0", "mid.attn_1"), ("mid_block.resnets.0", "mid.block_1"),
            ("mid_block.resnets.1", "mid.block_2"),
        ):
            key = f".{key}.".replace(f".{ours}.", f".{theirs}.")[1:-1]
        if ".attentions.0." in key:
            for theirs, ours in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
                key = key.replace(f".0.{ours}.", f".0.{theirs}.")
            key, value = key.replace(".norm.", ".group_norm."), value[..., 0, 0] if value.ndim == 4 else value
        said[key] = value
    return said


@pytest.mark.parametrize("file", ["kl-f4.ckpt", "diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"])
def test_the_vae_stage_starts_from_kl_f4(parts, tmp_path, monkeypatch, file):
    """A general autoencoder, as latent diffusion and as diffusers write it, becomes a folder for --init."""
    for module in ("difftsr.official", "difftsr.train"):
        monkeypatch.setattr(f"{module}.preset", lambda name: small_config())
    if file == "kl-f4.ckpt":
        torch.save({"state_dict": parts["vae"] | {"loss.logvar": torch.zeros(())}}, tmp_path / file)
    else:
        tensors = in_the_names_of_diffusers(parts["vae"], levels=3)
        assert not tensors.keys() & {"encoder.mid.attn_1.q.weight", "decoder.up.0.block.0.norm1.weight"}
        if file.endswith("bin"):
            torch.save(tensors, tmp_path / file)
        else:
            save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / file)
    assert official.main([str(tmp_path / file), "--output", str(tmp_path / "start")]) == 0
    vae = DiffTSR.from_pretrained(tmp_path / "start", missing_ok=True).vae
    assert same(vae, parts["vae"] | {"latent_shift": vae.latent_shift, "latent_scale": vae.latent_scale})
    (tmp_path / "letters.txt").write_text(CHARACTERS, encoding="utf-8")
    options = dict(preset="paper", steps=1, batch_size=1, warmup=0, bar=False, init=str(tmp_path / "start"))
    options |= dict(overrides={"lpips": 0.0, "crop": (32, 128)}, alphabet=tmp_path / "letters.txt")
    train(TrainConfig("vae", output=tmp_path / "run", **options))
    trained = DiffTSR.from_pretrained(tmp_path / "run" / "weights", missing_ok=True).vae
    apart = max((a - b).abs().max().item() for a, b in zip(trained.parameters(), vae.parameters(), strict=True))
    assert 0 < apart < 1e-4  # one step of the published rate away from where it began


def test_autoencoders_of_diffusers_give_what_diffusers_gives():
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: the second implementation")
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKL(
        block_out_channels=(32, 32, 64), down_block_types=("DownEncoderBlock2D",) * 3, layers_per_block=1,
        up_block_types=("UpDecoderBlock2D",) * 3, latent_channels=3, norm_num_groups=32,
    ).eval()  # fmt: skip
    config = dict(z_channels=3, ch=32, ch_mult=(1, 1, 2), num_res_blocks=1, double_z=True)
    ours = official.vae({"ddconfig": config, "embed_dim": 3}, official.from_diffusers(theirs.state_dict()))
    x = torch.randn(1, 3, 32, 64)
    with torch.no_grad():
        code = theirs.encode(x).latent_dist
        assert_close(ours.encode(x).mean, code.mean)
        assert_close(ours.encode(x).logvar, code.logvar)
        assert_close(ours.decode(code.mean), theirs.decode(code.mean).sample)


def test_a_recogniser_of_its_own_file_and_the_alphabet_beside(files, parts):
    model = official.load_checkpoint(
        files / "joint.ckpt", alphabet=files / "alphabet.txt", recognizer=files / "transocr_module.ckpt",
        config=small_config(),
    )  # fmt: skip
    assert model.untrained == [] and same(model.recognizer, parts["recognizer"])
    assert model.reader_alphabet.characters == model.alphabet.characters == CHARACTERS
    assert model.config.reference and not model.training
    with pytest.raises(ValueError, match="step2.ckpt: no recogniser; it looks like a training file of step 2"):
        official.load_checkpoint(files / "joint.ckpt", recognizer=files / "step2.ckpt", config=small_config())


def test_files_of_an_old_torch(parts, tmp_path):
    torch.save(parts["recognizer"], tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    kind, found = official.published_parts(tmp_path / "old.pth")
    assert kind.startswith("TransOCR") and found["recognizer"].keys() == parts["recognizer"].keys()


class Trap:
    def __reduce__(self):
        return os.system, ("touch trapped",)


def test_nothing_in_a_file_is_run(parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for old in (True, False):
        torch.save({"state_dict": parts["vae"], "hook": Trap()}, "trap.ckpt", _use_new_zipfile_serialization=old)
        with pytest.raises(ValueError, match="trap.ckpt"):
            official.load_file(tmp_path / "trap.ckpt")
    assert not (tmp_path / "trapped").exists()


def test_other_files_are_told_apart(files, tmp_path):
    (tmp_path / "page.ckpt").write_text("<html>404</html>")
    whole = (files / "step0.ckpt").read_bytes()
    (tmp_path / "half.ckpt").write_bytes(whole[: len(whole) // 2])
    torch.save({"step": 3, "networks": {"vae": {"a": torch.ones(1)}}}, tmp_path / "ours.ckpt")
    torch.save({"a": torch.ones(1)}, tmp_path / "other.ckpt")
    torch.save(torch.ones(1), tmp_path / "tensor.ckpt")
    for name, reason in {
        "missing.ckpt": "no such file",
        "page.ckpt": "not a complete file of torch.save",
        "half.ckpt": "not a complete file of torch.save",
        "ours.ckpt": "a checkpoint of difftsr.train",
        "other.ckpt": "its keys begin with a; known are the joint model",
        "tensor.ckpt": "holds a Tensor",
    }.items():
        with pytest.raises(ValueError, match=f"{name}: .*{reason}"):
            official.load_checkpoint(tmp_path / name, config=small_config())


# ---------------------------------------------------------------- alphabets


def test_alphabets_are_utf8_and_have_the_right_size(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbf" + CHARACTERS.encode() + b"\r\n")
    assert official.read_alphabet(file, 13).characters == CHARACTERS
    assert official.read_alphabet(file, 15, "recogniser").characters == CHARACTERS
    with pytest.raises(ValueError, match="a.txt: 12 characters, but weights of 6,736 classes need 6,735"):
        official.read_alphabet(file, 6736)
    file.write_bytes(CHARACTERS.encode("gbk"))
    with pytest.raises(ValueError, match="a.txt: not UTF-8"):
        official.read_alphabet(file, 13)
    with pytest.raises(ValueError, match="none.txt: cannot be read"):
        official.read_alphabet(tmp_path / "none.txt", 13)


def test_the_published_alphabets():
    folder = parity_folder() / "alphabets"
    alphabet = official.read_alphabet(folder / "diffusion_alphabet.txt", 6736)
    assert official.sibling_alphabet(folder / "diffusion_alphabet.txt", 7937).characters == official.read_alphabet(
        folder / "transocr_alphabet.txt", 7937, "recogniser"
    ).characters
    for text, expected in load_fixture("text_predict_recipe").manifest["label_tests"].items():
        assert to_released(alphabet.encode(text[:24]), alphabet).tolist() == expected, text


def test_the_text_predictor():
    pytest.importorskip("zhconv", reason="zhconv is not installed: the recorded texts went through it")
    f = load_fixture("text_predict_recipe")
    folder = parity_folder() / "alphabets"
    model = DiffTSR(replace(small_config(), recognizer=RecognizerConfig.paper(7937))).eval()
    model.alphabet = official.read_alphabet(folder / "diffusion_alphabet.txt", 6736)
    model.reader_alphabet = official.sibling_alphabet(folder / "diffusion_alphabet.txt", 7937)
    weights = recipe_state_dict(model.recognizer.state_dict(), f.manifest["recipe_salt"], f.manifest["recipe_gain"])
    weights["generator_word.proj.bias"][-1] = f.manifest["end_bias"]
    model.recognizer.load_state_dict(weights)
    images = [Image.open(parity_folder() / name).convert("RGB") for name in f.manifest["images"]]
    lr = torch.stack([line_to_canvas(np.array(image), (128, 512)) for image in images])
    reading = released_reading(model, lr)
    assert reading.text(model.alphabet) == [after for _, after in f.manifest["strings_before_after_zhconv"]]
    assert torch.equal(to_released(reading.best, model.alphabet), f.outputs["label_index"])


# ---------------------------------------------------------------- conversion and use


def test_conversion_and_restoration(files, parts, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(official, "preset", lambda name: small_config())
    arguments = [str(files / "joint.ckpt"), "--alphabet", str(files / "alphabet.txt"), "--recognizer"]
    arguments += [str(files / "transocr.ckpt"), "--output"]
    assert official.main([*arguments, str(tmp_path / "whole")]) == 0
    assert official.main([*arguments, str(tmp_path / "half"), "--half"]) == 0
    assert capsys.readouterr().err == ""
    whole, half = (DiffTSR.from_pretrained(tmp_path / name) for name in ("whole", "half"))
    assert whole.config.reference and whole.reader_alphabet.characters == CHARACTERS
    assert same(whole.tdm, parts["tdm"]) and not same(half.tdm, parts["tdm"])
    assert all(torch.allclose(a, b, atol=1e-3, rtol=1e-3) for a, b in zip(whole.parameters(), half.parameters()))
    size = {name: (tmp_path / name / "idm.safetensors").stat().st_size for name in ("whole", "half")}
    assert size["half"] < 0.55 * size["whole"]
    line = torch.randint(0, 255, (20, 60, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8).numpy()
    for mode in ("full", "baseline", "no-text"):
        first, second = (restore(whole, line, steps=5, mode=mode, seed=3) for _ in range(2))
        assert first.image.tobytes() == second.image.tobytes() and first.image.size == (384, 128)
    assert any(isinstance(layer, WinogradConv2d) for layer in whole.modules())  # on a CPU
    chosen = restore(whole, line, steps=5, mode="baseline", candidates=2, text="天地")
    assert chosen.text == "天地"
    with pytest.raises(ValueError, match="cannot do 300 steps"):
        restore(whole, line, steps=300)
    with pytest.raises(ValueError, match="as released"):
        restore(whole, line, steps=5, solver="dpm")


def test_conversion_of_a_part_writes_that_part(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(official, "preset", lambda name: small_config())
    assert official.main([str(files / "step0.ckpt"), "--output", str(tmp_path / "part")]) == 0
    assert sorted(f.name for f in (tmp_path / "part").iterdir()) == ["config.json", "vae.safetensors"]
    assert "no tdm" in capsys.readouterr().err
    assert "vae" not in DiffTSR.from_pretrained(tmp_path / "part", missing_ok=True).untrained


def test_errors_of_the_command(tmp_path, capsys):
    assert official.main([str(tmp_path / "none.ckpt"), "--output", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1 and "no such file" in message
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- training at published settings


@pytest.fixture(scope="module")
def start(files, tmp_path_factory):
    """A folder of converted weights, and the characters beside, from which the paper's model is trained on."""
    folder = tmp_path_factory.mktemp("start")
    arguments = [str(files / "joint.ckpt"), "--recognizer", str(files / "transocr.ckpt"), "--output", str(folder)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(official, "preset", lambda name: small_config())
        assert official.main(arguments) == 0
    return folder


@pytest.mark.parametrize("stage", ["tdm", "idm", "mom"])
def test_a_run_of_the_paper_s_model_with_its_alphabet(files, start, tmp_path, monkeypatch, stage):
    monkeypatch.setattr("difftsr.train.preset", lambda name: small_config())
    options = dict(preset="paper", init=str(start), steps=2, batch_size=2, warmup=1, bar=False)
    config = TrainConfig(stage, output=tmp_path, alphabet=files / "alphabet.txt", **options)
    if stage == "idm":
        config.overrides = {"ocr_start": 0.0}
    train(config)
    before = DiffTSR.from_pretrained(start)
    model = DiffTSR.from_pretrained(tmp_path / "weights")  # in the end the run's own folder says all
    assert model.alphabet.characters == model.reader_alphabet.characters == CHARACTERS and model.config.reference
    for name, network in before.networks().items():
        assert same(model.networks()[name], network.state_dict()) == (name != stage), name
    line = np.full((20, 60, 3), 128, np.uint8)
    assert restore(model, line, steps=5, mode="full").image.size == (384, 128)


def test_a_run_of_the_paper_s_model_says_what_it_lacks(files, start, tmp_path, monkeypatch):
    monkeypatch.setattr("difftsr.train.preset", lambda name: small_config())
    config = TrainConfig("tdm", preset="paper", output=tmp_path, init=str(start))
    for alphabet, message in ((None, "--alphabet"), (tmp_path / "none.txt", "none.txt: cannot be read")):
        with pytest.raises(ValueError, match=message):
            starting_model(replace(config, alphabet=alphabet), "tdm")
    (tmp_path / "short.txt").write_text(CHARACTERS[:5], encoding="utf-8")
    with pytest.raises(ValueError, match="5 characters, but weights of 13 classes need 12"):
        starting_model(replace(config, alphabet=tmp_path / "short.txt"), "tdm")
    (tmp_path / "alone.txt").write_text(CHARACTERS, encoding="utf-8")
    (tmp_path / "short.txt").unlink()
    monkeypatch.setattr(official, "sibling_alphabet", lambda *_: None)
    with pytest.raises(ValueError, match="the recogniser.s table of 12"):
        starting_model(replace(config, alphabet=tmp_path / "alone.txt"), "tdm")
    with pytest.raises(ValueError, match="--alphabet is for the preset paper"):
        starting_model(TrainConfig("vae", preset="tiny", output=tmp_path, alphabet=files / "alphabet.txt"), "vae")


def test_training_uses_the_released_classes(donor):
    """The last character has class 13 in an `Alphabet` of twelve, and 11 of 13 classes in released networks."""
    model = DiffTSR(replace(donor.config, reference=True), donor.alphabet)
    model.reader_alphabet = donor.alphabet
    tokens = donor.alphabet.encode_batch([CHARACTERS[-2:]])
    assert text_classes(model, tokens)[0, :3].tolist() == [10, 11, 12]
    assert reader_classes(model, tokens)[0, :3].tolist() == [12, 13, 14]  # and END
    z = torch.randn(1, 3, 8, 32)
    model.vae.latent_scale.fill_(1 / official.LATENT_FACTOR)
    torch.testing.assert_close(condition(model, z), z / official.LATENT_FACTOR)
    assert condition(donor, z) is z and text_classes(donor, tokens) is tokens


def test_every_stage_takes_a_step(donor):
    """The published networks learn: a finite loss, and gradients for the network of the stage."""
    g = torch.Generator().manual_seed(0)
    batch = {
        "hr": torch.rand(2, 3, 32, 128, generator=g) * 2 - 1, "lr": torch.rand(2, 3, 32, 128, generator=g) * 2 - 1,
        "tokens": torch.randint(2, 12, (2, 24), generator=g), "centers": torch.full((2, 24), -1.0),
    }  # fmt: skip
    stages = {
        "vae": (VAEStage, replace(VAETraining.paper(), lpips=0.0, crop=(32, 128))),
        "recognizer": (RecognizerStage, RecognizerTraining()),
        "idm": (IDMStage, IDMTraining.paper()),
        "tdm": (TDMStage, TDMTraining.paper()),
        "mom": (MoMStage, MoMTraining.paper()),
    }
    donor.recognizer.eval()
    for name, (stage_type, settings) in stages.items():
        stage = stage_type(settings, donor)
        if hasattr(stage, "initialise"):
            stage.initialise(donor)
        network = getattr(donor, name)
        donor.requires_grad_(False)
        network.requires_grad_(True)
        optimizers = stage.optimizers(donor)
        for loss, optimizer, _ in stage.losses(donor, batch, g):
            assert torch.isfinite(loss), name
            before = [p.detach().clone() for p in network.parameters()]
            loss.backward()
            optimizers[optimizer].step()
            assert any(not torch.equal(a, b) for a, b in zip(before, network.parameters())), name
            optimizers[optimizer].zero_grad()
