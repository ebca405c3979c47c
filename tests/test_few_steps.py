"""Few steps: where a restoration stands, what the stage trains, and that it learns."""

import pytest
import torch
from torch import nn

from difftsr.few_steps import FewStepStage, FewStepTraining, arrive
from difftsr.idm import IDM, IDMConfig
from difftsr.recognizer import Reading
from difftsr.sampling import ddim_step, timesteps
from difftsr.vae import VAE, VAEConfig

K = 38


class Tiny(nn.Module):
    """The networks that the stage needs; texts are given, so nobody reads."""

    def __init__(self, seed: int = 1):
        super().__init__()
        torch.manual_seed(seed)
        self.vae, self.recognizer = VAE(VAEConfig.tiny()), nn.Identity()
        self.idm = IDM(IDMConfig.tiny(K), torch.randint(0, 2, (K, 24, 24), dtype=torch.uint8) * 255)
        for parameter in self.idm.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.05)
        self.eval()


def line_batch(batch: int = 3, seed: int = 0) -> dict:
    g = torch.Generator().manual_seed(seed)
    tokens = torch.zeros(batch, 24, dtype=torch.long)
    tokens[:, :4] = torch.randint(2, K, (batch, 4), generator=g)
    hr = torch.randn(batch, 3, 8, 32, generator=g).clamp(-1, 1).repeat_interleave(4, 2).repeat_interleave(4, 3)
    lr = (hr + 0.3 * torch.randn(hr.shape, generator=g)).clamp(-1, 1)
    return {"hr": hr, "lr": lr, "tokens": tokens, "centers": Reading.of(tokens).centers}


def training(**settings) -> FewStepTraining:
    return FewStepTraining(text_mix=(0.0, 0.6, 0.2, 0.2), **{"ocr_weight": 0.0, **settings})


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_arrive_stands_where_ddim_stands():
    idm, batch = Tiny().idm, line_batch(2)
    told = Reading.of(batch["tokens"], batch["centers"])
    z_lr, noise = (torch.randn(2, 4, 8, 32, generator=generator(s)) for s in (1, 2))
    z_t, t = arrive(idm, z_lr, told, steps=3, number=0, noise=noise)
    assert torch.equal(z_t, noise) and t == 999
    times, z = timesteps(3, 1000), noise
    with torch.no_grad():
        for before, after in zip(times[:2], times[1:]):
            z_0, eps = idm.predict(z, z_lr, torch.full((2,), before), idm.context(told), told)
            z = ddim_step(z_0, eps, before, s=after, alpha_bar=idm.diffusion.alpha_bar)
    z_t, t = arrive(idm, z_lr, told, steps=3, number=2, noise=noise)
    assert t == times[2]
    torch.testing.assert_close(z_t, z)


@pytest.mark.parametrize("decoder", [True, False])
def test_the_stage_trains_idm_and_decoder_and_nothing_else(decoder):
    model = Tiny()
    stage = FewStepStage(training(decoder=decoder), model)
    optimizer = stage.optimizers(model)["idm"]
    before = {name: p.clone() for name, p in model.named_parameters()}
    g = generator()
    for _ in range(3):
        for loss, name, logs in stage.losses(model, line_batch(), g):
            assert name == "idm" and loss.isfinite() and ("round_trip" in logs) == decoder
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert any(name.startswith("idm.unet") for name in changed)
    assert any(name.startswith("vae.decoder") for name in changed) == decoder
    assert not any(name.startswith(("vae.encoder", "vae.quant_conv")) for name in changed)


def test_the_reading_loss_counts_with_its_weight_and_reaches_the_network():
    class Reader(nn.Module):
        def ocr_loss(self, images, tokens, reduction):
            assert reduction == "none" and images.shape == (2, 3, 32, 128) and tokens.shape == (2, 24)
            return images.square().mean((1, 2, 3))

    model, losses, gradients = Tiny(), {}, {}
    model.recognizer = Reader()
    for weight in (0.0, 0.5):
        stage = FewStepStage(training(ocr_weight=weight, ocr_lines=2, max_steps=1), model)
        ((losses[weight], _, logs),) = stage.losses(model, line_batch(), generator())
        model.zero_grad()
        losses[weight].backward()
        gradients[weight] = model.idm.unet.out[-1].weight.grad.clone()
    assert losses[0.5].item() == pytest.approx((losses[0.0] + 0.5 * logs["ocr"]).item(), rel=1e-5)
    assert not torch.equal(gradients[0.0], gradients[0.5])


def test_the_noise_of_the_start_has_the_temperature():
    model, batch, seen = Tiny(), line_batch(), []
    predict = model.idm.predict
    model.idm.predict = lambda z_t, *rest: seen.append(z_t.std().item()) or predict(z_t, *rest)
    for temperature in (0.0, 0.5, 1.0):
        stage = FewStepStage(training(temperature=temperature, max_steps=1), model)
        next(iter(stage.losses(model, batch, generator())))
    assert seen == [0, pytest.approx(seen[2] / 2), pytest.approx(1, abs=0.05)]


def test_later_steps_start_from_the_models_own_first_step():
    model, batch, times = Tiny(), line_batch(), set()
    predict = model.idm.predict

    def watched(z_t, z_lr, t, *rest):
        times.add(int(t[0]))
        return predict(z_t, z_lr, t, *rest)

    model.idm.predict = watched
    stage, g = FewStepStage(training(max_steps=2), model), generator()
    for _ in range(12):
        next(iter(stage.losses(model, batch, g)))
    assert times == {999, 499}


def test_it_overfits_a_few_lines():
    model, batch = Tiny(), line_batch(2)
    stage, g = FewStepStage(training(max_steps=1, learning_rate=3e-3), model), generator()
    optimizer, losses = stage.optimizers(model)["idm"], []
    for _ in range(45):
        for loss, _, logs in stage.losses(model, batch, g):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(logs["l1"]))
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])


def test_the_stage_repeats_with_the_seed():
    def run(seed: int) -> float:
        model = Tiny()
        return float(next(iter(FewStepStage(training(), model).losses(model, line_batch(), generator(seed))))[0])

    assert run(3) == run(3) != run(4)
