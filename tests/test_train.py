"""The training loop: resume, averages, settings, starting weights, and the command line in a fresh process."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from difftsr.model import DiffTSR, preset
from difftsr.train import (
    EMA,
    STAGES,
    CachedLatents,
    TrainConfig,
    checkpoints,
    latent_batches,
    newest_checkpoint,
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


@pytest.mark.parametrize("stage", ["recognizer", "idm"])
def test_a_cut_run_resumes_bit_for_bit(trained, tmp_path, stage):
    whole = TrainConfig(stage, output=tmp_path / "whole", init=str(trained / "weights"), steps=6, **TINY)
    train_stage(whole, stage)
    cut = replace(whole, output=tmp_path / "cut")
    train_stage(cut, stage)
    for file in checkpoints(cut.output / "checkpoints" / stage)[1:]:
        file.unlink()
    assert newest(cut.output, stage)["step"] == 4
    train_stage(replace(cut, resume=True), stage)
    a, b = newest(whole.output, stage), newest(cut.output, stage)
    assert a["step"] == b["step"] == 6
    for kind in ("networks", "ema"):
        for name, tensor in a[kind][stage].items():
            assert torch.equal(tensor, b[kind][stage][name]), name


def test_a_damaged_checkpoint_is_passed_over(trained, tmp_path):
    whole = TrainConfig("recognizer", output=tmp_path, steps=4, **TINY)
    train_stage(whole, "recognizer")
    folder, said = tmp_path / "checkpoints" / "recognizer", []
    last = checkpoints(folder)[-1]
    last.write_bytes(last.read_bytes()[:5000])
    state = newest_checkpoint(folder, torch.device("cpu"), said.append)
    assert state["step"] == 2 and last.name in said[0] and "damaged" in said[0]


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
    common = ["--stage", "recognizer", "--preset", "tiny", "--steps", "30", "--batch-size", "4", "--no-bar"]
    common += ["--checkpoint-every", "5", "--keep", "100"]
    whole = run(*common, "--output", "whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    command = [sys.executable, "-m", "difftsr.train", *common, "--output", "cut"]
    folder = tmp_path / "cut" / "checkpoints" / "recognizer"
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not checkpoints(folder) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait() == (128 + number if number == signal.SIGTERM else -number)
    assert newest(tmp_path / "cut", "recognizer")["step"] < 30
    done = run(*common, "--output", "cut", "--resume", cwd=tmp_path)
    assert done.returncode == 0 and "goes on from" in done.stdout, done.stderr
    a, b = (newest(tmp_path / name, "recognizer") for name in ("whole", "cut"))
    assert a["step"] == b["step"] == 30
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
