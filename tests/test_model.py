"""The whole model: presets, counts, and the folder of weights on disk."""

import json
import re
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from difftsr import model as module
from difftsr.model import (
    NETWORKS,
    PRESETS,
    DiffTSR,
    ModelConfig,
    from_plain,
    has_weights,
    preset,
    weights_folder,
)
from difftsr.text_lines import Alphabet
from parity_common import parity_folder


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return DiffTSR(preset("tiny")).eval()


@pytest.fixture(scope="module")
def paper():
    with torch.device("meta"):
        return DiffTSR(preset("paper"))


@pytest.fixture
def saved(tiny, tmp_path):
    return tiny.save(tmp_path / "weights")


# ---------------------------------------------------------------- presets


def test_paper_counts_are_the_published_ones(paper):
    counts = paper.parameter_counts()
    assert sum(p.numel() for p in paper.idm.unet.parameters()) == 874_024_003
    assert counts["tdm"] == 211_099_217
    assert counts["mom"] == 6_226_675
    assert counts["vae"] == 55_312_063
    assert counts["recognizer"] == 83_904_779
    assert counts["total"] == sum(counts[name] for name in NETWORKS)


@pytest.mark.parametrize(
    ("table", "network", "ours_alone"),
    [
        ("IDM_Unet", "idm.unet", set()),
        ("TDM_Decoder", "tdm", set()),
        ("MoM_module", "mom", set()),
        ("VAE_model", "vae", {"latent_shift", "latent_scale"}),
        ("TransOCR", "recognizer", set()),
    ],
)
def test_paper_networks_have_the_published_keys_and_shapes(paper, table, network, ours_alone):
    rows = (parity_folder() / "keys" / f"{table}.tsv").read_text().splitlines()
    cells = [row.split("\t") for row in rows if "\t" in row and not row.startswith("key\t")]
    published = {key.replace("weights.", "weights_"): numbers(shape) for key, shape, *_ in cells}
    own = {key: tuple(value.shape) for key, value in paper.get_submodule(network).state_dict().items()}
    assert {key: shape for key, shape in own.items() if key not in ours_alone} == published


def numbers(text):
    """All whole numbers in a text: a shape, however it is written."""
    return tuple(int(n) for n in re.findall(r"\d+", text))


@pytest.mark.parametrize("name", ["tiny", "classroom"])
def test_presets_agree_on_the_sizes_that_networks_share(name):
    config, alphabet = preset(name), {"tiny": Alphabet.tiny, "classroom": Alphabet.classroom}[name]()
    classes = {config.recognizer.num_classes, config.tdm.num_classes, config.mom.num_classes}
    classes |= {config.idm.text_encoder.vocab_size, config.mom.text_encoder.vocab_size}
    assert classes == {len(alphabet)}
    with torch.device("meta"):
        model = DiffTSR(config)
    latent = model.vae.latent_shape(config.image_size)
    assert latent == tuple(config.tdm.latent_shape) and config.mom.latent_height == latent[1]
    assert config.idm.unet.in_channels == 2 * latent[0] + 4 * config.idm.canvas
    assert config.idm.unet.out_channels == latent[0]
    assert config.mom.columns == config.tdm.columns and config.mom.tdm_dim == config.tdm.dim


def test_classroom_geometry_is_the_documented_one():
    config = preset("classroom")
    assert config.image_size == (128, 512) and config.tdm.latent_shape == (16, 16, 64)
    assert config.steps == 20 and preset("paper").steps == 200


def test_presets_are_independent_objects():
    first, second = preset("tiny"), preset("tiny")
    first.idm.unet.model_channels = 8
    assert second.idm.unet.model_channels != 8


def test_unknown_preset_names_the_known_ones():
    with pytest.raises(ValueError, match="tiny, classroom, paper"):
        preset("huge")


@pytest.mark.parametrize("name", PRESETS)
def test_settings_survive_json(name):
    config = preset(name)
    again = from_plain(ModelConfig, json.loads(json.dumps(asdict(config))))
    assert again == config and type(again.tdm) is type(config.tdm) and type(again.mom) is type(config.mom)
    assert isinstance(again.image_size, tuple) and isinstance(again.idm.unet.channel_mult, tuple)


def test_an_unknown_setting_is_an_error():
    plain = asdict(preset("tiny"))
    plain["vae"]["latent_chanels"] = 8
    with pytest.raises(ValueError, match="latent_chanels.*known:.*latent_channels"):
        from_plain(ModelConfig, plain)


# ---------------------------------------------------------------- weights on disk


def test_a_round_trip_keeps_every_tensor_and_the_alphabet(tiny, saved):
    again = DiffTSR.from_pretrained(saved)
    assert again.config == tiny.config and again.alphabet.characters == tiny.alphabet.characters
    assert not again.training
    own, its = tiny.state_dict(), again.state_dict()
    assert own.keys() == its.keys()
    assert all(torch.equal(own[key], its[key]) for key in own)
    names = {path.name for path in saved.iterdir()}
    assert names == {"config.json", "glyphs.safetensors", *(f"{name}.safetensors" for name in NETWORKS)}


def test_an_alphabet_of_its_own_is_restored(tmp_path):
    alphabet = Alphabet("".join(sorted("0123456789ABCDEFGHIJKLMNOPQRSTUVWXY字")), "mine")
    model = DiffTSR(preset("tiny"), alphabet)
    again = DiffTSR.from_pretrained(model.save(tmp_path))
    assert again.alphabet.characters == alphabet.characters and "字" in again.alphabet
    glyphs = again.recognizer.embedding_word.glyphs
    assert torch.equal(glyphs, model.recognizer.embedding_word.glyphs) and glyphs.any()


def test_half_precision_halves_the_files_and_keeps_buffers(tiny, saved, tmp_path):
    half = tiny.save(tmp_path / "half", half=True)
    for name in NETWORKS:
        assert (half / f"{name}.safetensors").stat().st_size < 0.6 * (saved / f"{name}.safetensors").stat().st_size
    stored = load_file(half / "vae.safetensors")
    assert stored["latent_scale"].dtype == torch.float32 and stored["decoder.conv_in.weight"].dtype == torch.float16
    again = DiffTSR.from_pretrained(half)
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert all(torch.allclose(p, q, rtol=1e-3, atol=1e-6) for p, q in zip(tiny.parameters(), again.parameters()))


def test_glyphs_are_on_disk_once(tiny, saved):
    for name in NETWORKS:
        assert not [key for key in load_file(saved / f"{name}.safetensors") if key.endswith("glyphs")]
    shared = load_file(saved / "glyphs.safetensors")["glyphs"]
    assert torch.equal(shared, tiny.recognizer.embedding_word.glyphs) and shared[2:].any()


def test_untrained_networks_stay_known(tiny, tmp_path):
    tiny.untrained = ["mom"]
    try:
        folder = tiny.save(tmp_path)
    finally:
        tiny.untrained = list(NETWORKS)
    assert DiffTSR.from_pretrained(folder).untrained == ["mom"]
    fresh = DiffTSR(preset("tiny"))
    fresh.load_network("vae", folder)
    fresh.load_network("mom", folder)
    assert fresh.untrained == ["recognizer", "idm", "tdm", "mom"]
    assert torch.equal(fresh.vae.quant_conv.weight, tiny.vae.quant_conv.weight)


def test_a_missing_network_is_tolerated_only_when_asked(saved):
    (saved / "tdm.safetensors").unlink()
    with pytest.raises(ValueError, match="tdm.safetensors: missing"):
        DiffTSR.from_pretrained(saved)
    assert "tdm" in DiffTSR.from_pretrained(saved, missing_ok=True).untrained


def test_damaged_files_are_named(saved):
    whole = (saved / "idm.safetensors").read_bytes()
    (saved / "idm.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="idm.safetensors: not a complete safetensors file"):
        DiffTSR.from_pretrained(saved)
    (saved / "idm.safetensors").write_bytes(whole)
    for text in ("{ half a", '{"config": {"nam": 1}, "alphabet": "AB"}', "[]"):
        (saved / "config.json").write_text(text)
        with pytest.raises(ValueError, match="config.json: not a configuration"):
            DiffTSR.from_pretrained(saved)


@pytest.mark.parametrize("change", ["lacks", "unknown", "shape"])
def test_tensors_that_do_not_fit_are_named(saved, change):
    tensors = load_file(saved / "vae.safetensors")
    if change == "lacks":
        del tensors["quant_conv.bias"]
    elif change == "unknown":
        tensors["quant_conv.extra"] = torch.zeros(1)
    else:
        tensors["quant_conv.bias"] = torch.zeros(3)
    save_file(tensors, saved / "vae.safetensors")
    with pytest.raises(ValueError, match=f"vae.safetensors: .*{change}.*quant_conv"):
        DiffTSR.from_pretrained(saved)


def test_an_interrupted_save_leaves_the_old_weights_whole(tiny, saved, monkeypatch):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    written = []

    def fails_at_the_third(network, path, half):
        written.append(path)
        if len(written) == 3:
            raise OSError("no space left on device")
        write(network, path, half)

    write = module.save_network
    monkeypatch.setattr(module, "save_network", fails_at_the_third)
    changed = DiffTSR(replace(tiny.config, steps=7))
    with pytest.raises(OSError, match="no space"):
        changed.save(saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_names_and_paths_of_weights(saved):
    assert weights_folder(saved) == saved and has_weights(saved)
    assert not has_weights("no-such-weights")
    with pytest.raises(ValueError, match="no-such-weights: no weights here .* allowed: a path, or one of"):
        DiffTSR.from_pretrained("no-such-weights")
