"""MoM and the joint stage: recorded reference values, what must not change, and what must."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from difftsr.idm import IDM, IDMConfig, ScheduleConfig, TextEncoderConfig
from difftsr.model import DiffTSR, preset
from difftsr.mom import (
    MoMStage,
    MoMTraining,
    PublishedMoM,
    PublishedMoMConfig,
    joint_step,
    joint_text_loss,
    noised_reading,
)
from difftsr.recognizer import Reading
from difftsr.tdm import MultinomialDiffusion, PublishedTDM, PublishedTDMConfig, TDMStage, TDMTraining, top_reading
from difftsr.unet import UNetConfig
from parity_common import assert_close, fill_with_recipe, load_fixture, parity_folder


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- recorded values of the reference ---


def published(vocab: int, context_dim: int, n_embed: int, n_layer: int) -> PublishedMoM:
    """The published module at the small sizes of the fixtures."""
    unet = UNetConfig(6, 3, 32, (1, 2), 1, (0,), 4, context_dim, groups=32, position_codes=False)
    encoder = TextEncoderConfig(vocab, n_embed, n_layer, heads=8, dim_head=64, soft=False)
    return PublishedMoM(PublishedMoMConfig(unet, encoder, vocab)).eval()


def test_published_module_has_the_published_keys_and_outputs():
    f = load_fixture("mom_small")
    mom = published(50, 24, 32, 2)
    mom.load_state_dict(f.weights)
    with torch.no_grad():
        image, text = mom(f.inputs["c_t"], f.inputs["z_lr"], f.inputs["z_t"], f.inputs["t"])
    assert_close(image, f.outputs["I_cond"], atol=1e-4, rtol=1e-3)
    assert_close(text, f.outputs["C_cond"], atol=1e-4, rtol=1e-3)


def test_published_module_at_paper_size():
    f = load_fixture("paper_MoM_module_recipe")
    mom = fill_with_recipe(PublishedMoM(PublishedMoMConfig()), f.manifest["recipe_salt"])
    assert sum(p.numel() for p in mom.parameters()) == 6_226_675
    rows = [line.split("\t") for line in (parity_folder() / "keys/MoM_module.tsv").read_text().splitlines()]
    assert {k: "x".join(map(str, v.shape)) for k, v in mom.state_dict().items()} == {
        row[0]: row[1] for row in rows if row[0] != "key"
    }
    with torch.no_grad():
        image, text = mom(f.inputs["c_t"], f.inputs["z_lr"], f.inputs["z_t"], f.inputs["t"])
    assert_close(image, f.outputs["I_cond"], atol=1e-3, rtol=1e-3)
    assert_close(text, f.outputs["C_cond"], atol=1e-3, rtol=1e-3)


def test_published_joint_loss_and_its_gradients():
    """The released step-3 objective, with its clean label in MoM, from our parts (parity section 15)."""
    f = load_fixture("train_step3_loss")
    m, x = f.manifest, f.inputs
    salt = m["recipe_salt"]
    mom = fill_with_recipe(published(50, 24, 16, 2), salt)
    idm_config = IDMConfig(
        UNetConfig(6, 3, 32, (1, 2), 1, (8, 4, 2), 4, 16, groups=32, position_codes=False),
        mom.config.text_encoder, ScheduleConfig("sqrt_linear", zero_terminal_snr=False), "eps",
    )  # fmt: skip
    idm = IDM(idm_config).eval()
    fill_with_recipe(idm.unet, salt)
    tdm = PublishedTDM(PublishedTDMConfig(50, 64, 4, 2, 4, 3))
    fill_with_recipe(tdm, salt)
    t, z_t = x["t"], idm.diffusion.q_sample(x["hr_latent"], x["t"], x["noise"])
    log_x0 = tdm.diffusion.log_onehot(x["text"])
    c_t = tdm.diffusion.sample(tdm.diffusion.q_pred(log_x0, t), uniform=x["uniform"])
    image, text = mom(x["text"], x["lr_latent"], z_t, t)
    idm_loss = F.l1_loss(idm(z_t, x["lr_latent"], t, text), x["noise"]) + m["ocr_loss_constant"]
    log_p0 = tdm(c_t, t, image.reshape(len(t), -1, 64)).log_softmax(1)
    tdm_loss = 0.1 * joint_text_loss(tdm, log_p0, x["text"], c_t, t)
    assert_close(idm_loss, f.outputs["IDM_loss"], atol=1e-4, rtol=1e-3)
    assert_close(tdm_loss, f.outputs["TDM_loss"], atol=1e-4, rtol=1e-3)
    (idm_loss + tdm_loss).backward()
    norms = {name: p.grad.norm() for name, p in mom.named_parameters() if p.grad is not None}
    recorded = {name: value for name, value in m["MoM_grad_norms"].items() if value is not None and value > 1e-8}
    assert len(recorded) > 50
    for name, value in recorded.items():
        assert_close(norms[name], torch.tensor(value), atol=1e-5, rtol=1e-3, name=name)


# --- ours, on the tiny preset ---


@pytest.fixture
def model() -> DiffTSR:
    """The tiny model whose five networks have weights that do something (as if the earlier stages were done)."""
    torch.manual_seed(0)
    model = DiffTSR(preset("tiny"))
    for network in (model.idm, model.tdm):
        for parameter in network.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.05)
    MoMStage(MoMTraining(), model).initialise(model)
    return model.eval()


def batch_of(model: DiffTSR, count: int = 3, seed: int = 0) -> dict:
    draw, (channels, height, width) = generator(seed), model.config.tdm.latent_shape
    tokens = torch.randint(2, len(model.alphabet), (count, 24), generator=draw)
    tokens[:, 9:] = 0
    read = torch.where(torch.rand(count, 24, generator=draw) < 0.3, tokens.roll(1, 0), tokens)
    reading = Reading.of(read, prob=0.7)
    reading.features = torch.randn(count, model.config.tdm.feature_channels, 1, width, generator=draw)
    z_hr = torch.randn(count, channels, height, width, generator=draw)
    z_lr = 0.8 * z_hr + 0.3 * torch.randn(z_hr.shape, generator=draw)
    return {"tokens": tokens, "centers": Reading.of(tokens).centers, "reading": reading, "z_hr": z_hr, "z_lr": z_lr}


def look(model: DiffTSR, batch: dict, t: Tensor) -> tuple[Tensor, Tensor]:
    c_t = model.tdm.diffusion.q_sample(batch["tokens"], t, generator(1))
    noise = torch.randn(batch["z_hr"].shape, generator=generator(2))
    return c_t, model.idm.diffusion.q_sample(batch["z_hr"], t, noise)


def wake(model: DiffTSR) -> None:
    """Give MoM weights that are no longer those of step 0."""
    torch.manual_seed(1)
    for parameter in model.mom.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)


def test_joint_step_0_equals_the_earlier_stages(model):
    batch, t = batch_of(model), torch.tensor([5, 500, 990])
    c_t, z_t = look(model, batch, t)
    reading = batch["reading"]
    with torch.no_grad():
        log_p0, prediction = joint_step(model, c_t, z_t, batch["z_lr"], t, reading)
        alone = model.tdm(c_t, t, model.tdm.context(reading.features, batch["z_lr"]), reading).log_softmax(1)
        assert torch.equal(log_p0, alone)
        told = top_reading(alone, reading)
        assert torch.equal(prediction, model.idm(z_t, batch["z_lr"], t, model.idm.context(told), told))
        wake(model)
        assert not torch.equal(joint_step(model, c_t, z_t, batch["z_lr"], t, reading)[0], alone)


def test_both_conditions_have_their_shapes_and_hear_every_input(model):
    wake(model)
    batch, t = batch_of(model), torch.tensor([300, 300, 300])
    c_t, z_t = look(model, batch, t)
    z_lr, reading, c = batch["z_lr"], batch["reading"], model.config
    with torch.no_grad():
        image, text = model.mom(c_t, z_lr, z_t, t, reading=reading)
        assert image.shape == (3, c.tdm.columns, c.tdm.dim)
        assert text.shape == (3, 24, c.idm.text_encoder.n_embed)
        for changed in (
            model.mom(c_t.roll(1, 1), z_lr, z_t, t, reading=reading),
            model.mom(c_t, z_lr.flip(3), z_t, t, reading=reading),
            model.mom(c_t, z_lr, z_t.flip(3), t, reading=reading),
            model.mom(c_t, z_lr, z_t, t + 100, reading=reading),
            model.mom(c_t, z_lr, z_t, t),
        ):
            assert (changed[0] - image).abs().max() > 1e-4
        swapped = model.mom(c_t, z_t, z_lr, t, reading=reading)[0]
        assert (swapped - image).abs().max() > 1e-4
        assert torch.equal(model.mom.text_condition(reading.best), model.mom.text_condition(Reading.of(reading.best)))


def test_what_is_known_of_the_text_goes_from_the_reading_to_c_t():
    diffusion, reading = MultinomialDiffusion(20), Reading.of(torch.full((2, 24), 7), prob=0.6)
    c_t = torch.full((2, 24), 5)
    known = noised_reading(c_t, reading, diffusion.alpha_bar_at(torch.tensor([0, 999])))
    assert known.tokens[0, 0].tolist() == [5, 7]
    torch.testing.assert_close(known.probs[0, 0], torch.tensor([1.0, 0.0]), atol=2e-3, rtol=0)
    torch.testing.assert_close(known.probs[1, 0], torch.tensor([0.0, 0.6]), atol=2e-3, rtol=0)
    assert (known.probs.sum(-1) <= 1 + 1e-6).all()
    assert noised_reading(c_t, None, torch.tensor([0.3, 0.3])).probs.shape == (2, 24, 1)


def test_changing_the_label_with_c_t_fixed_leaves_mom_unchanged(model, monkeypatch):
    wake(model)
    batch, seen = batch_of(model), []
    other = {**batch, "tokens": torch.where(batch["tokens"] > 1, batch["tokens"].roll(1, 1), 0)}
    c_t = torch.randint(2, len(model.alphabet), batch["tokens"].shape, generator=generator(4))
    monkeypatch.setattr(model.tdm.diffusion, "q_sample", lambda *_: c_t)
    model.mom.unet.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    model.mom.text_encoder.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    stage, losses = MoMStage(MoMTraining(), model), []
    for data in (batch, other):
        ((loss, _, _),) = stage.losses(model, data, generator(5))
        losses.append(loss.item())
    half = len(seen) // 2
    assert half == 3  # the encoder twice (for the image, for the text), the U-Net once
    assert all(torch.equal(a, b) for a, b in zip(seen[:half], seen[half:], strict=True))
    assert losses[0] != losses[1]  # the label is the target, and only that


def test_a_joint_step_moves_mom_and_nothing_else(model):
    before = copy.deepcopy(model.state_dict())
    stage = MoMStage(MoMTraining(learning_rate=1e-2, weight_decay=0.1), model)
    optimizer = stage.optimizers(model)["mom"]
    assert stage.trains == ("mom",) and not model.recognizer.training and model.mom.training
    for seed in range(2):
        ((loss, name, logs),) = stage.losses(model, batch_of(model, seed=seed), generator(seed))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = model.state_dict()
    moved = {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}
    assert moved == {"mom"}
    assert name == "mom" and {"image", "text", "accuracy_reader"} <= set(logs)
    assert all(p.grad is None for n in ("vae", "recognizer", "idm", "tdm") for p in getattr(model, n).parameters())


def test_frozen_batch_norms_stay_when_images_have_to_be_read(model):
    before = {k: v.clone() for k, v in model.recognizer.state_dict().items()}
    batch = batch_of(model)
    images = torch.rand(2, 3, len(batch["tokens"]), *model.config.image_size, generator=generator()) * 2 - 1
    raw = {"tokens": batch["tokens"], "centers": batch["centers"], "hr": images[0], "lr": images[1]}
    model.train()
    for stage in (TDMStage(TDMTraining(), model), MoMStage(MoMTraining(ocr_weight=0.02, ocr_lines=1), model)):
        stage.optimizers(model)
        for loss, _, logs in stage.losses(model, raw, generator()):
            assert loss.isfinite() and all(torch.as_tensor(v).isfinite() for v in logs.values())
            loss.backward()
    assert all(torch.equal(before[k], v) for k, v in model.recognizer.state_dict().items())


def test_every_parameter_of_mom_can_learn(model):
    wake(model)
    stage = MoMStage(MoMTraining(), model)
    stage.optimizers(model)
    ((loss, _, _),) = stage.losses(model, batch_of(model), generator())
    loss.backward()
    assert not [name for name, p in model.mom.named_parameters() if p.grad is None or not p.grad.isfinite().all()]


def test_the_joint_stage_lowers_the_loss(model):
    stage = MoMStage(MoMTraining(learning_rate=2e-3), model)
    optimizer, batch, history = stage.optimizers(model)["mom"], batch_of(model, 4), []
    for _ in range(15):
        ((loss, _, _),) = stage.losses(model, batch, generator(3))  # the same noise: this must go down
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.95 * history[0]


def test_stages_with_different_numbers_of_timesteps_are_refused(model):
    model.idm = IDM(replace(model.config.idm, schedule=ScheduleConfig(timesteps=500)))
    with pytest.raises(ValueError, match="timesteps"):
        MoMStage(MoMTraining(), model)
