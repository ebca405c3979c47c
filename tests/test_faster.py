"""Faster: counts, the solver against a second implementation, 8 bits, ONNX, the sweep, and the student's card."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from difftsr import faster
from difftsr.model import DiffTSR, preset
from difftsr.sampling import dpm_solver_2m, sample, timesteps
from difftsr.train import TrainConfig


class Reader:
    """A judge that says the same of everything."""

    name, version = "nobody", "0"

    def __call__(self, image):
        return "", 0.5


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return DiffTSR(preset("tiny")).eval()


@pytest.fixture
def lines(tmp_path):
    """Two damaged lines with sharp originals."""
    from PIL import Image

    generator = np.random.default_rng(0)
    for part, size in (("lr", (60, 20)), ("hr", (384, 128))):
        (tmp_path / "set" / part).mkdir(parents=True)
        for name in ("00-mild", "00-hard", "01-mild") if part == "lr" else ("00", "01"):
            pixels = generator.integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "set" / part / f"{name}.png")
    rows = [f"{name}.png\t{name[:2]}.png\tAB\t{name[3:]}" for name in ("00-mild", "00-hard", "01-mild")]
    table = "\n".join(["file\thr\ttext\tstrength", *rows]) + "\n"
    (tmp_path / "set" / "labels.tsv").write_text(table, encoding="utf-8")
    return faster.labelled(tmp_path / "set")


def test_operations_are_two_for_each_product():
    conv, x = nn.Conv2d(3, 5, 3, padding=1, bias=False), torch.zeros(2, 3, 8, 10)
    assert faster.counted(lambda: conv(x)) == 2 * 2 * 5 * 3 * 9 * 8 * 10
    assert faster.counted(lambda: torch.zeros(4, 6) @ torch.zeros(6, 7)) == 2 * 4 * 6 * 7


def test_every_part_is_counted(tiny):
    found = faster.operations(tiny)
    assert list(found) == ["read", "encode", "step, image", "step, text", "decode"]
    assert all(number > 1e6 for number in found.values())


@pytest.mark.parametrize("steps", [2, 5, 10, 20])
def test_the_solver_of_second_order_is_that_of_diffusers(steps):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: the second implementation")
    total, betas = 1000, np.linspace(0.0015**0.5, 0.0205**0.5, 1000) ** 2
    scheduler = diffusers.DPMSolverMultistepScheduler(
        total, trained_betas=betas, algorithm_type="dpmsolver++", solver_order=2, prediction_type="sample",
        timestep_spacing="trailing", final_sigmas_type="zero",
    )  # fmt: skip
    scheduler.set_timesteps(steps)
    alpha_bar = torch.from_numpy(np.cumprod(1 - betas))
    times = timesteps(steps, total)
    assert scheduler.timesteps.tolist() == times

    def network(z, t):
        return torch.tanh(z * 1.3 + t / total)

    z = theirs = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    previous = None
    for t, s in zip(times, [*times[1:], -1]):
        z0 = network(z, t)
        z, previous = dpm_solver_2m(z, z0, t, s=s, alpha_bar=alpha_bar, previous=previous), (t, z0)
        theirs = scheduler.step(network(theirs, t), t, theirs).prev_sample
        torch.testing.assert_close(z, theirs, atol=1e-4, rtol=1e-4)  # theirs computes its levels in float32


def test_eight_bits_change_little_and_only_matrices():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10), nn.LayerNorm(10))
    light, x = faster.quantized(network), torch.randn(16, 64)
    assert all(parameter.dtype == torch.float32 for parameter in network.parameters())
    assert {name for name, _ in light.named_parameters()} == {"3.weight", "3.bias"}
    error = (light(x) - network(x)).norm() / network(x).norm()
    assert 0 < error < 0.05


def test_the_light_model_restores_and_leaves_the_other_alone(tiny):
    before = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    light = faster.quantized_model(tiny)
    lr = torch.rand(2, 3, *tiny.config.image_size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    image = sample(light, lr, steps=2).image
    assert image.shape == lr.shape and torch.isfinite(image).all()
    assert all(torch.equal(before[name], tensor) for name, tensor in tiny.state_dict().items())


def test_onnx_gives_the_same_for_any_batch_and_text(tiny, tmp_path):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed: the extra onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    faster.export_onnx(tiny, tmp_path / "graphs")
    about = json.loads((tmp_path / "graphs" / "about.json").read_text(encoding="utf-8"))
    assert about["alphabet"] == tiny.alphabet.characters and len(about["alpha_bar"]) == 1000
    assert not [path for path in (tmp_path / "graphs").iterdir() if "tmp" in path.name]
    run = {
        name: onnxruntime.InferenceSession(tmp_path / "graphs" / f"{name}.onnx").run
        for name in ("encoder", "step", "decoder")
    }
    generator = torch.Generator().manual_seed(0)
    for batch in (1, 3):
        lr = torch.rand(batch, 3, *tiny.config.image_size, generator=generator) * 2 - 1
        z_lr = tiny.vae.to_latent(lr).detach()
        z_t = torch.randn(z_lr.shape, generator=generator)
        tokens = torch.randint(2, len(tiny.alphabet), (batch, 24, 5), generator=generator)
        probs = torch.rand(tokens.shape, generator=generator).softmax(-1)
        centers = torch.rand(batch, 24, generator=generator).sort(1).values
        centers[:, 10:] = -1
        t = torch.randint(1, 1000, (batch,), generator=generator)
        parts = dict(zip(faster.StepNetwork.inputs, (z_t, z_lr, t, tokens, probs, centers)))
        with torch.no_grad():
            expected = {
                "encoder": (z_lr,), "step": faster.StepNetwork(tiny)(**parts),
                "decoder": (tiny.vae.from_latent(z_t).clamp(-1, 1),),
            }  # fmt: skip
        given = {"encoder": {"lr": lr}, "step": parts, "decoder": {"z_0": z_t}}
        for name, tensors in given.items():
            there = run[name](None, {key: value.numpy() for key, value in tensors.items()})
            for a, b in zip(there, expected[name], strict=True):
                np.testing.assert_allclose(a, b.numpy(), atol=1e-4, rtol=1e-4, err_msg=name)


def test_the_sweep_has_a_row_for_every_solver_and_count(tiny, lines):
    rows = faster.sweep(tiny, lines[:1], Reader(), (4, 1))
    assert [(row["solver"], row["steps"]) for row in rows] == [("ddim", 1), ("ddim", 4), ("dpm", 4)]
    assert all(row["ned"] == 0 and row["seconds"] > 0 and row["lpips"] > 0 for row in rows)


def test_lines_are_thinned_by_text_so_that_every_strength_stays(lines):
    assert [line.name for line in faster.thinned(lines, 2)] == ["00-mild.png", "00-hard.png"]
    assert faster.thinned(lines, 1) == lines


def test_a_student_comes_with_a_card(tiny, lines, tmp_path):
    teacher = DiffTSR(tiny.config, tiny.alphabet)
    teacher.untrained = []
    teacher.save(tmp_path / "teacher")
    training = TrainConfig(
        stage="few-step", preset="tiny", output=tmp_path / "run", steps=1, batch_size=2, init=str(tmp_path / "teacher"),
        bar=False,
    )  # fmt: skip
    card = faster.distill(str(tmp_path / "teacher"), lines[:1], Reader(), training, teacher_steps=2)
    assert (tmp_path / "run" / "weights" / "README.md").read_text(encoding="utf-8") == card
    assert "| teacher, 2 steps |" in card and "| student, 1 step |" in card and "| **change** |" in card
    assert DiffTSR.from_pretrained(tmp_path / "run" / "weights").config.steps == 1


def test_the_command_says_what_it_lacks(capsys, tmp_path):
    assert faster.main([]) == 2
    assert "--sweep" in capsys.readouterr().err
    assert faster.main(["--sweep", "--set", str(tmp_path)]) == 2
    assert "no line with a sharp original" in capsys.readouterr().err
