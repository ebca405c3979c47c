"""The training loop: resume, averages, settings, starting weights, and the command line in a fresh process."""

import json
import math
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from PIL import Image

from difftsr.cleaning import plant_faults
from difftsr.dataset import SIZES, SyntheticLines
from difftsr.dataset import main as dataset_command
from difftsr.model import DiffTSR, fill_network, preset
from difftsr.recognizer import TransOCR
from difftsr.runs import (
    Every,
    checkpoints,
    draw_curves,
    draw_sheet,
    newest_checkpoint,
    read_card,
    save_checkpoint,
    write_card,
)
from difftsr.text_lines import Alphabet
from difftsr.train import (
    EMA,
    STAGES,
    CachedLatents,
    TrainConfig,
    Trainer,
    latent_batches,
    rate,
    stage_settings,
    starting_model,
    train,
    train_stage,
)

TINY = dict(preset="tiny", batch_size=4, warmup=2, checkpoint_every=2, seed=3)


def newest(folder, stage):
    return torch.load(checkpoints(folder / "checkpoints" / stage)[-1], weights_only=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two steps of every stage, in order."""
    folder = tmp_path_factory.mktemp("run")
    train(TrainConfig("all", output=folder, steps=2, **TINY))
    return folder


def test_all_stages_run_in_order_and_leave_complete_weights(trained):
    card = json.loads((trained / "run.json").read_text(encoding="utf-8"))
    assert list(card["stages"]) == list(STAGES)
    model = DiffTSR.from_pretrained(trained / "weights")
    assert model.untrained == []


def test_all_skips_what_is_done(trained):
    assert train(TrainConfig("all", output=trained, steps=2, **TINY)) == {}


def test_a_run_by_the_minute_writes_down_its_last_step(trained, tmp_path):
    config = TrainConfig("tdm", output=tmp_path, init=str(trained / "weights"), minutes=0.005, bar=False, **TINY)
    (history,) = train(config).values()
    card = read_card(tmp_path)["tdm"]
    assert history["step"][-1] == card["steps"] >= 1 and history["step"] == sorted(set(history["step"]))
    draw_curves([tmp_path], tmp_path / "curves.png")


def test_curves_of_a_run_that_wrote_nothing_down_are_empty(tmp_path):
    write_card(tmp_path, "tdm", {"history": {}, "steps": 0})
    assert draw_curves([tmp_path], tmp_path / "curves.png").stat().st_size > 1000


@pytest.mark.parametrize("stage", ["recognizer", "idm"])
def test_a_cut_run_resumes_bit_for_bit(trained, tmp_path, stage):
    cut_and_resumed(TrainConfig(stage, init=str(trained / "weights"), steps=6, **TINY), stage, tmp_path)


def test_a_cut_run_goes_on_with_what_the_bound_has_learned(trained, tmp_path, monkeypatch):
    """On three noise levels importance sampling begins before the cut: what it has seen must travel too."""
    config = preset("tiny")
    config = replace(config, tdm=replace(config.tdm, timesteps=3))
    monkeypatch.setattr("difftsr.train.preset", lambda name: config)
    monkeypatch.setattr(Trainer, "look", lambda self: None)  # a sheet walks both diffusions through the same 1,000
    common = TINY | {"batch_size": 16, "init": str(trained / "weights"), "overrides": {"loss": "bound"}}
    at_the_cut, at_the_end = cut_and_resumed(TrainConfig("tdm", steps=6, **common), "tdm", tmp_path)
    seen, count = (state["auxiliary"]["importance"]["count"] for state in (at_the_cut, at_the_end))
    assert (seen > 10).all() and seen.sum() == 4 * 16 and count.sum() == 6 * 16


def cut_and_resumed(config, stage, folder):
    """The checkpoints at the cut, after four of six steps, and at the end, which is that of a run left alone."""
    whole = replace(config, output=folder / "whole")
    train_stage(whole, stage)
    cut = replace(config, output=folder / "cut")
    train_stage(cut, stage)
    for file in checkpoints(cut.output / "checkpoints" / stage)[1:]:
        file.unlink()
    before = newest(cut.output, stage)
    assert before["step"] == 4
    train_stage(replace(cut, resume=True), stage)
    a, b = newest(whole.output, stage), newest(cut.output, stage)
    assert a["step"] == b["step"] == 6
    for kind in ("networks", "ema", "auxiliary"):
        for network, tensors in a[kind].items():
            for name, tensor in tensors.items():
                assert torch.equal(tensor, b[kind][network][name]), name
    return before, b


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """A folder with one set of every kind that --data names, made by the commands that the README gives."""
    folder = tmp_path_factory.mktemp("sets")
    lines = SyntheticLines(Alphabet.tiny(), SIZES["tiny"], length=24, seed=5)
    plant_faults(folder / "pairs", [lines.line(index) for index in range(24)], each=1)
    common = ["--preset", "tiny", "--count", "8", "--workers", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for arguments in (
            ["--pool", "pool"], ["--lmdb", "lines"], ["--shards", "shards", "--source", "lmdb:lines"],
            ["--clean", "lmdb:lines", "--output", "lines.tsv"], ["--clean", "pairs:pairs", "--output", "pairs.tsv"],
            ["--lmdb", "sharp", "--source", "pairs:pairs"],
        ):  # fmt: skip
            assert dataset_command([*arguments, *common]) == 0, arguments
    return folder


def test_a_reader_that_is_not_trained_reads_as_its_weights_do(tmp_path):
    """The preset's recogniser finds the line first. Weights of before did not, and must read on as they did."""
    weights = DiffTSR.from_pretrained("classroom").recognizer
    models = {
        stage: starting_model(TrainConfig(stage, output=tmp_path, init="classroom"), stage, say=lambda _: None)
        for stage in ("idm", "recognizer")
    }
    assert models["recognizer"].recognizer.config.finder > 0  # it learns to find the line
    assert models["idm"].recognizer.config == weights.config
    line = torch.rand(1, 3, 128, 512, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        assert torch.equal(models["idm"].recognizer.eval().features(line), weights.eval().features(line))


def test_weights_may_lack_the_finder_but_not_a_part_of_it(tmp_path):
    reader = TransOCR(replace(preset("tiny").recognizer, finder=4))
    tensors = {name: value for name, value in reader.state_dict().items() if not name.endswith("glyphs")}
    before = {name: value for name, value in tensors.items() if not name.startswith("finder.")}
    fill_network(reader, before, tmp_path / "recognizer.safetensors")
    del tensors["finder.edges.bias"]
    with pytest.raises(ValueError, match="lacks 'finder.edges.bias'"):
        fill_network(reader, tensors, tmp_path / "recognizer.safetensors")


@pytest.mark.parametrize(
    "data",
    [
        "synthetic", "pool:pool", "lmdb:lines", "lmdb:lines@lines.tsv", "lmdb:sharp", "pairs:pairs",
        "pairs:pairs@pairs.tsv", "shards:shards",
    ],
)  # fmt: skip
def test_a_run_learns_from_every_kind_of_data(sets, tmp_path, monkeypatch, data):
    monkeypatch.chdir(sets)
    config = TrainConfig("recognizer", output=tmp_path, data=data, steps=1, bar=False, **TINY)
    train(config)
    assert read_card(tmp_path)["recognizer"]["history"]["loss"][-1] > 0


def test_a_second_run_in_a_folder_sets_the_first_aside_whole(tmp_path):
    """Nothing of the first is lost or mixed in: it lies in earlier/1, and --resume goes on with the second."""
    first = TrainConfig("recognizer", output=tmp_path, steps=6, bar=False, **TINY)
    train_stage(first, "recognizer")
    a, weights = newest(tmp_path, "recognizer"), (tmp_path / "weights" / "recognizer.safetensors").read_bytes()
    second = replace(first, steps=2, seed=first.seed + 1)
    train_stage(second, "recognizer")
    kept = tmp_path / "earlier" / "1"
    assert newest(kept, "recognizer")["step"] == 6 and newest(tmp_path, "recognizer")["step"] == 2
    assert torch.equal(*(next(iter(s["ema"]["recognizer"].values())) for s in (a, newest(kept, "recognizer"))))
    assert (kept / "weights" / "recognizer.safetensors").read_bytes() == weights
    assert (tmp_path / "weights" / "recognizer.safetensors").read_bytes() != weights
    assert read_card(kept)["recognizer"]["config"]["seed"] == first.seed
    assert read_card(tmp_path)["recognizer"]["config"]["seed"] == second.seed
    train_stage(replace(second, steps=4, resume=True), "recognizer")
    assert newest(tmp_path, "recognizer")["step"] == 4 and len(list((tmp_path / "earlier").iterdir())) == 1


def test_the_card_counts_epochs(sets, tmp_path):
    """Three steps of two shares of four lines meet each of the eight lines of a pool three times."""
    config = TrainConfig("recognizer", output=tmp_path, data=f"pool:{sets / 'pool'}", steps=3, accumulate=2, **TINY)
    train_stage(config, "recognizer")
    assert read_card(tmp_path)["recognizer"]["epochs"] == 3


@pytest.mark.parametrize(
    "data, message",
    [
        ("nothing", "unknown data 'nothing'"), ("lmdb:none", "none"), ("pool:lines", "lines"), ("shards:pool", "pool"),
        ("pairs:lines", "lines"), ("lmdb:lines@none.tsv", "none.tsv is no index file"),
        ("synthetic,pool:pool", "unknown data"),
    ],
)  # fmt: skip
def test_data_that_is_not_there_is_named(sets, tmp_path, monkeypatch, data, message):
    monkeypatch.chdir(sets)
    with pytest.raises(ValueError, match=message):
        train(TrainConfig("recognizer", output=tmp_path, data=data, steps=1, bar=False, **TINY))


def test_a_damaged_checkpoint_is_passed_over(trained, tmp_path):
    whole = TrainConfig("recognizer", output=tmp_path, steps=4, **TINY)
    train_stage(whole, "recognizer")
    folder, said = tmp_path / "checkpoints" / "recognizer", []
    last = checkpoints(folder)[-1]
    last.write_bytes(last.read_bytes()[:5000])
    state = newest_checkpoint(folder, torch.device("cpu"), said.append)
    assert state["step"] == 2 and last.name in said[0] and "damaged" in said[0]


def test_a_full_disk_loses_nothing_and_is_said_in_one_line(tmp_path):
    state = {"step": 2, "weights": torch.zeros(100_000)}
    kept = save_checkpoint(tmp_path, state, keep=1).read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # a file over it fails in the middle
    try:
        with pytest.raises(OSError, match="step-00000004.pt could not be written") as caught:
            save_checkpoint(tmp_path, {**state, "step": 4}, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["step-00000002.pt"]
    assert checkpoints(tmp_path)[0].read_bytes() == kept


def test_a_run_on_a_full_disk_goes_on_and_ends_with_an_error(tmp_path, capsys):
    config = TrainConfig("recognizer", output=tmp_path, steps=4, bar=False, **TINY)
    train_stage(replace(config, steps=2), "recognizer")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))
    try:
        with pytest.raises(OSError, match="untouched"):
            train_stage(replace(config, steps=6, resume=True), "recognizer")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "step 4: " in capsys.readouterr().out  # the checkpoint in between was given up, the run was not
    assert [file.name for file in checkpoints(tmp_path / "checkpoints" / "recognizer")] == ["step-00000002.pt"]


def test_intervals_are_steps_or_minutes():
    assert [step for step in range(1, 10) if Every(4).due(step, 0)] == [4, 8]
    clock = Every("2min", seconds=60)
    assert [second for second in range(0, 500, 30) if clock.due(1, second)] == [180, 300, 420]
    assert not Every(0).due(1, 1e9) and not Every("0min").due(1, 1e9)
    for wrong in ("soon", "5 minutes", "-3", "-1min", "1.5", "nanmin"):
        with pytest.raises(ValueError, match="is no interval"):
            Every(wrong)


def test_a_half_written_checkpoint_is_never_found(tmp_path):
    (tmp_path / ".step-00000009.pt.123").write_bytes(b"half")
    (tmp_path / "step-00000004.pt").write_bytes(b"whole")
    assert [file.name for file in checkpoints(tmp_path)] == ["step-00000004.pt"]


def test_frozen_networks_stay_bit_identical_through_the_joint_stage(trained, tmp_path):
    before = DiffTSR.from_pretrained(trained / "weights")
    train_stage(TrainConfig("mom", output=tmp_path, init=str(trained / "weights"), steps=2, **TINY), "mom")
    after = DiffTSR.from_pretrained(tmp_path / "weights")
    for name, network in before.networks().items():
        pairs = zip(network.state_dict().values(), after.networks()[name].state_dict().values(), strict=True)
        same = all(torch.equal(a, b) for a, b in pairs)
        assert same == (name != "mom"), name


def test_a_stage_without_the_networks_it_needs_says_so(tmp_path):
    with pytest.raises(ValueError, match="vae, recognizer"):
        starting_model(TrainConfig("idm", preset="tiny", output=tmp_path), "idm")


def test_ema_follows_and_copies_buffers():
    net = torch.nn.BatchNorm1d(2)
    ema = EMA({"net": net}, decay=0.5)
    net.weight.data.fill_(3.0)
    net.running_mean.fill_(7.0)
    ema.update({"net": net}, step=1000)
    assert torch.allclose(ema.networks["net"].weight, torch.full((2,), 2.0))
    assert torch.equal(ema.networks["net"].running_mean, net.running_mean)


def test_the_rate_warms_up_and_cools_down():
    config = TrainConfig(warmup=10)
    assert rate(0.0, 0, config) == pytest.approx(0.1)
    assert rate(0.0, 50, config) == pytest.approx(1.0)
    assert rate(1.0, 99, config) == pytest.approx(0.02)
    assert rate(1.0, 99, replace(config, schedule="constant")) == 1.0


def test_overrides_reach_the_stage_and_unknown_ones_are_refused():
    config = TrainConfig("vae", batch_size=3, overrides={"lpips": 0.0})
    settings = stage_settings(config, "vae")
    assert settings.batch_size == 3 and settings.lpips == 0.0
    with pytest.raises(ValueError, match="lpipz"):
        stage_settings(replace(config, overrides={"lpipz": 1.0}), "vae")


def test_overrides_may_be_words_lists_and_numbers_and_wrong_ones_are_refused():
    def given(stage, **overrides):
        return stage_settings(TrainConfig(stage, overrides=overrides), stage)

    assert given("idm", loss="l1", weighting="none").loss == "l1"
    assert given("vae", crop="32,64", disc_start=5.0, decoder_only="true").crop == (32, 64)
    assert given("vae", disc_start="5").disc_start == 5 and given("vae", decoder_only="false").decoder_only is False
    assert given("idm", text_mix="0.5,0.25,0.15,0.1").text_mix == (0.5, 0.25, 0.15, 0.1)
    wrongs = [("idm", {"loss": "l3"}), ("vae", {"crop": "32"}), ("vae", {"l1": "much"}), ("vae", {"disc_start": 1.5})]
    for stage, wrong in wrongs:
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} cannot be"):
            given(stage, **wrong)


def test_what_the_idm_predicts_is_chosen_once_and_kept(trained, tmp_path):
    common = TINY | {"init": str(trained / "weights")}
    init = tmp_path / "init"
    DiffTSR.from_pretrained(trained / "weights").save(init)
    (init / "idm.safetensors").unlink()
    config = TrainConfig("idm", output=tmp_path, steps=1, prediction="v", **common | {"init": None})
    with pytest.raises(ValueError, match="vae, recognizer"):
        train_stage(config, "idm")
    for network in ("vae", "recognizer"):
        train_stage(replace(config, stage=network), network)
    train_stage(config, "idm")
    assert DiffTSR.from_pretrained(tmp_path / "weights", missing_ok=True).idm.config.prediction == "v"
    assert starting_model(replace(config, stage="tdm", prediction=None), "tdm").idm.config.prediction == "v"


# --- reduced precision ---


@pytest.mark.parametrize(
    "stage, precision", [("vae", "fp16"), ("recognizer", "bf16"), ("idm", "bf16"), ("idm", "fp16"), ("tdm", "fp16")]
)
def test_reduced_precision_takes_steps_close_to_those_of_float32(trained, tmp_path, stage, precision):
    losses = {}
    for name in ("no", precision):
        config = TrainConfig(stage, output=tmp_path / name, init=str(trained / "weights"), mixed_precision=name, **TINY)
        walked = Trainer(config, stage)
        walked.scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=name == "fp16")  # no step is left out
        for _ in range(3):
            walked.shown.clear()
            walked.take_step()
            losses.setdefault(name, []).append(float(walked.shown["loss"]))
        assert all(p.dtype == torch.float32 and p.isfinite().all() for p in walked.parameters[stage])
    assert losses[precision] == pytest.approx(losses["no"], rel=0.05)
    assert losses[precision] != losses["no"]


def test_fp16_with_two_optimizers_scales_and_unscales_each_once(tmp_path):
    settings = {"lpips": 0, "disc_start": 0, "crop": "32,32"}
    norms = {}
    for precision in ("no", "fp16"):
        config = TrainConfig("vae", output=tmp_path / precision, mixed_precision=precision, overrides=settings, **TINY)
        walked = Trainer(config, "vae")
        walked.scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=precision == "fp16")  # none is left out
        walked.take_step()
        norms[precision] = {name: float(walked.shown[name]) for name in ("norm", "norm_discriminator")}
    assert norms["fp16"] == pytest.approx(norms["no"], rel=0.05)


def spoil(walked, value):
    """The first weight's gradient becomes `value` in the next step."""
    first = next(p for p in walked.parameters[walked.name] if p.requires_grad)
    return first.register_hook(lambda gradient: torch.full_like(gradient, value))


def test_an_infinite_gradient_is_skipped_under_fp16_and_the_scale_falls(tmp_path):
    config = TrainConfig("recognizer", output=tmp_path, mixed_precision="fp16", **TINY)
    walked = Trainer(config, "recognizer")
    before = {name: p.clone() for name, p in walked.model.recognizer.named_parameters()}
    scale, hook = walked.scaler.get_scale(), spoil(walked, math.inf)
    walked.take_step()
    hook.remove()
    assert walked.scaler.get_scale() == scale / 2
    assert all(torch.equal(p, before[name]) for name, p in walked.model.recognizer.named_parameters())
    walked.take_step()
    assert not all(torch.equal(p, before[name]) for name, p in walked.model.recognizer.named_parameters())
    assert walked.state()["scaler"]["scale"] == scale / 2


def test_a_gradient_that_is_not_finite_stops_the_run_and_keeps_the_batch(tmp_path):
    walked = Trainer(TrainConfig("recognizer", output=tmp_path, **TINY), "recognizer")
    before = {name: p.clone() for name, p in walked.model.recognizer.named_parameters()}
    spoil(walked, math.nan)
    with pytest.raises(FloatingPointError, match="gradient nan at step 0"):
        walked.take_step()
    assert torch.load(tmp_path / "recognizer-bad-batch.pt", weights_only=True)["hr"].shape[0] == 4
    assert all(torch.equal(p, before[name]) for name, p in walked.model.recognizer.named_parameters())


def test_the_gan_begins_at_its_step_however_many_shares_a_step_has(tmp_path):
    settings = {"lpips": 0, "disc_start": 2, "crop": "32,32"}
    walked = Trainer(TrainConfig("vae", output=tmp_path, accumulate=3, overrides=settings, **TINY), "vae")
    for step in range(3):
        walked.take_step()
        assert ("d_weight" in walked.shown) == (step >= 2)


def test_pictures_lie_in_memory_as_asked_and_give_the_same(trained, tmp_path):
    losses = []
    for channels_last in (True, False):
        config = TrainConfig("idm", output=tmp_path, init=str(trained / "weights"), channels_last=channels_last, **TINY)
        walked = Trainer(config, "idm")
        kernel = next(p for p in walked.parameters["idm"] if p.ndim == 4 and min(p.shape) > 1)
        assert kernel.is_contiguous(memory_format=torch.channels_last) == channels_last
        walked.take_step()
        losses.append(float(walked.shown["loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_compiled_networks_take_the_same_step_and_keep_their_names(trained, tmp_path):
    losses = []
    for name in (False, True):
        config = TrainConfig("tdm", output=tmp_path / str(name), init=str(trained / "weights"), compile=name, **TINY)
        walked = Trainer(config, "tdm")
        walked.take_step()
        losses.append(float(walked.shown["loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert walked.trained["tdm"].state_dict().keys() == walked.ema.networks["tdm"].state_dict().keys()


# --- what a run tells ---


def test_the_best_weights_are_those_of_the_least_loss_on_unseen_lines(tmp_path):
    config = TrainConfig(
        "recognizer", output=tmp_path, steps=6, validation="synthetic", validate_every=2, result="best",
        **TINY | {"learning_rate": 1e-2},
    )  # fmt: skip
    train_stage(config, "recognizer")
    seen = read_card(tmp_path)["recognizer"]["validation"]
    assert seen["step"] == [2, 4, 6]
    best = torch.load(tmp_path / "checkpoints" / "recognizer" / "best.pt", weights_only=True)
    assert best["loss"] == min(seen["loss"]) and best["step"] == seen["step"][seen["loss"].index(best["loss"])]
    left = DiffTSR.from_pretrained(tmp_path / "weights", missing_ok=True).recognizer.state_dict()
    assert all(torch.equal(left[name], tensor) for name, tensor in best["ema"]["recognizer"].items())
    with pytest.raises(ValueError, match="--validation"):
        train_stage(replace(config, validation=None), "recognizer")


def test_cards_of_any_age_are_drawn(tmp_path):
    """The first cards had no gradient norms; those of the bound have a panel more."""
    history = {"step": [1, 2], "loss": [2.0, 1.0]}
    write_card(tmp_path / "run", "idm", {"history": history})
    plain = draw_curves([tmp_path / "run"], tmp_path / "plain.png")
    write_card(tmp_path / "run", "tdm", {"history": history | {"norm": [1.0, 2.0]}, "bound_by_t": [0.1] * 20})
    more = draw_curves([tmp_path / "run"], tmp_path / "more.png")
    (wide, high), (wider, higher) = (Image.open(path).size for path in (plain, more))
    assert wider > 1.5 * wide and higher > 1.3 * high


def test_captions_fit_under_their_pictures():
    """A long text is written smaller, and where the truth was read wrongly it stands on a line of its own."""
    grey, text = torch.zeros(1, 3, 64, 256), "ABCDEFGH" * 3
    right = draw_sheet([grey, grey], [[text, text, text]], ["LR", "HR", "true text"])
    wrong = draw_sheet([grey, grey], [[text, text, text[:-1]]], ["LR", "HR", "true text"])
    assert (right[:, -6:] == 255).all() and (wrong[:, -6:] == 255).all()  # nothing runs over the border
    assert wrong.shape[0] > right.shape[0]

def test_looking_at_unseen_lines_changes_nothing(tmp_path):
    config = TrainConfig("vae", output=tmp_path, steps=4, overrides={"lpips": 0, "disc_start": 0}, **TINY)
    for name, options in (("looks", {"validation": "synthetic", "validate_every": 1}), ("blind", {})):
        train_stage(replace(config, output=tmp_path / name, **options), "vae")
    a, b = (newest(tmp_path / name, "vae") for name in ("looks", "blind"))
    for kind in ("networks", "ema", "auxiliary"):
        for network, tensors in a[kind].items():
            assert all(torch.equal(tensor, b[kind][network][name]) for name, tensor in tensors.items())
    assert len(list((tmp_path / "looks" / "sheets").glob("vae-*.png"))) == 4
    assert "g_loss" not in a["validation"] and a["validation"]["loss"][-1] > 0


def test_the_card_says_how_the_weights_were_made(trained):
    card = read_card(trained)["recognizer"]
    assert card["finished"] and card["steps"] == 2 and card["seeds"]["run"] == 3
    assert card["versions"]["torch"] == torch.__version__ and card["settings"]["batch_size"] == 4
    assert card["hardware"]["processes"] == 1 and card["hardware"]["threads"] == torch.get_num_threads()
    history = card["history"]
    assert history["step"] == [2] and 0 <= history["waiting"][0] <= 1 and history["norm"][0] > 0
    assert {"accuracy_lr", "accuracy_hr"} <= history.keys()
    assert (trained / "report.png").stat().st_size > 1000


def test_a_card_of_a_run_that_goes_on_is_not_taken_for_done(tmp_path):
    config = TrainConfig("recognizer", output=tmp_path, **TINY)
    walked = Trainer(config, "recognizer")
    walked.take_step()
    walked.save()
    assert not read_card(tmp_path)["recognizer"]["finished"]


def test_what_is_told_to_tensorboard_can_be_read_back(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = TrainConfig("recognizer", output=tmp_path, steps=2, tensorboard=True, validation="synthetic", **TINY)
    train_stage(config, "recognizer")
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard" / "recognizer"))
    events.Reload()
    tags = events.Tags()
    told = {"train/loss", "train/norm", "train/waiting", "train/rate_recognizer", "validation/loss"}
    assert told <= set(tags["scalars"])
    assert tags["images"] == ["lines"] and events.Scalars("train/loss")[0].step == 2


def test_the_bound_of_a_run_is_told_by_time(trained, tmp_path):
    common = TINY | {"batch_size": 8}
    config = TrainConfig("tdm", output=tmp_path, init=str(trained / "weights"), steps=4, **common)
    train_stage(replace(config, overrides={"loss": "bound"}), "tdm")
    parts = read_card(tmp_path)["tdm"]["bound_by_t"]
    assert len(parts) == 20 and all(part >= 0 for part in parts) and sum(parts) > 0


@pytest.mark.parametrize("processes", [1, 2])
def test_a_notebook_launches_processes(trained, tmp_path, processes):
    script = f"""
from pathlib import Path
from difftsr.train import TrainConfig, launch
launch(TrainConfig("idm", "tiny", Path("run"), init={str(trained / 'weights')!r}, steps=2, batch_size=4, bar=False,
                   warmup=2, accumulate={2 // processes}), processes={processes})
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    card = read_card(tmp_path / "run")["idm"]
    assert card["hardware"]["processes"] == processes and card["history"]["lines"] == [16]


def test_cached_latents_equal_what_the_encoders_say(trained, tmp_path):
    from difftsr.dataset import make_loader, open_source

    model = DiffTSR.from_pretrained(trained / "weights")
    source = open_source("synthetic", model.alphabet, model.config.image_size, seed=1)
    cache = CachedLatents.build(tmp_path, model, source, 32, seed=5)
    batch = next(make_loader(source, 32, seed=5))
    import numpy as np

    cached = cache.batch(np.arange(32))
    with torch.no_grad():
        assert torch.allclose(cached["z_lr"], model.vae.to_latent(batch["lr"]), atol=2e-2)
        assert torch.equal(cached["reading"].best, model.recognizer.read(batch["lr"]).best)
    assert torch.equal(cached["tokens"], batch["tokens"])
    with torch.no_grad():
        model.vae.encoder.conv_in.weight.mul_(1.5)  # other weights: what lies there is of no use
    again = CachedLatents.build(tmp_path, model, source, 32, seed=5).batch(np.arange(32))
    assert not torch.equal(again["z_lr"], cached["z_lr"])
    ranks = [next(latent_batches(cache, 4, seed=0, rank=rank, world=2))["tokens"] for rank in range(2)]
    assert not torch.equal(*ranks)


def run(*arguments, cwd):
    command = [sys.executable, "-m", "difftsr.train", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


@pytest.mark.parametrize("stage", ["idm", "tdm"])
def test_two_processes_take_the_steps_of_one_that_accumulates(trained, tmp_path, stage):
    common = ["--stage", stage, "--preset", "tiny", "--steps", "4", "--batch-size", "4", "--warmup", "1", "--no-bar"]
    common += ["--init", str(trained / "weights")]
    one = run(*common, "--accumulate", "2", "--output", "one", cwd=tmp_path)
    assert one.returncode == 0, one.stderr
    # on a CPU `accelerate launch --num_processes 2` starts a single process unless MPI is there; torchrun starts two
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    launch += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    command = [*launch, "-m", "difftsr.train", *common, "--output", "two"]
    two = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert two.returncode == 0, two.stderr
    states = [newest(tmp_path / name, stage) for name in ("one", "two")]
    assert [state["history"]["lines"] for state in states] == [[32], [32]]
    a, b = (state["networks"][stage] for state in states)
    start = DiffTSR.from_pretrained(trained / "weights").networks()[stage].state_dict()
    moved = max((a[key] - start[key]).abs().max().item() for key in a if a[key].is_floating_point())
    apart = max((a[key] - b[key]).abs().max().item() for key in a if a[key].is_floating_point())
    print(f"{stage}: the weights moved by {moved:.1e}, the two runs differ by {apart:.1e}")
    assert moved > 1e-4 and apart < 0.02 * moved


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(tmp_path, number):
    common = ["--stage", "recognizer", "--preset", "tiny", "--steps", "120", "--batch-size", "4", "--no-bar"]
    common += ["--checkpoint-every", "5", "--keep", "100"]  # a busy machine sees the first checkpoint late
    whole = run(*common, "--output", "whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    command = [sys.executable, "-m", "difftsr.train", *common, "--output", "cut"]
    folder = tmp_path / "cut" / "checkpoints" / "recognizer"
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not checkpoints(folder) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait() == (128 + number if number == signal.SIGTERM else -number)
    assert newest(tmp_path / "cut", "recognizer")["step"] < 120
    done = run(*common, "--output", "cut", "--resume", cwd=tmp_path)
    assert done.returncode == 0 and "goes on from" in done.stdout, done.stderr
    a, b = (newest(tmp_path / name, "recognizer") for name in ("whole", "cut"))
    assert a["step"] == b["step"] == 120
    for kind in ("networks", "ema"):
        for name, tensor in a[kind]["recognizer"].items():
            assert torch.equal(tensor, b[kind]["recognizer"][name]), name


def test_the_command_line_trains_in_a_fresh_process(tmp_path):
    done = run("--stage", "recognizer", "--preset", "tiny", "--steps", "2", "--batch-size", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "tiny" / "weights" / "recognizer.safetensors").exists()
    report = run("--report", "runs/tiny", cwd=tmp_path)
    assert report.returncode == 0, report.stderr
    assert (tmp_path / "runs" / "tiny" / "report.png").stat().st_size > 1000


def test_the_command_line_explains_what_is_missing(tmp_path):
    done = run("--stage", "idm", "--preset", "tiny", "--steps", "1", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("difftsr.train: stage idm needs trained weights")


def test_a_non_finite_loss_stops_and_keeps_the_batch(tmp_path):
    model = DiffTSR(preset("tiny"))
    with torch.no_grad():
        next(model.recognizer.parameters()).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="recognizer"):
        train_stage(TrainConfig("recognizer", output=tmp_path, steps=2, **TINY), "recognizer", model=model)
    kept = torch.load(tmp_path / "recognizer-bad-batch.pt", weights_only=True)
    assert kept["hr"].shape[0] == 4
