"""The image diffusion: schedules, parametrisations, the text encoder, training conditions and the training stage."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from difftsr.idm import (
    IDM,
    MIX,
    GaussianDiffusion,
    IDMConfig,
    IDMStage,
    IDMTraining,
    ScheduleConfig,
    TextEncoder,
    TextEncoderConfig,
    alpha_bar_table,
    columns_of,
    draw_text,
    ocr_loss,
    similar_glyphs,
    spread_times,
    text_conditions,
)
from difftsr.recognizer import CharacterEmbedding, Reading, RecognizerConfig, TransOCR, unpack_bits
from difftsr.text_lines import PAD, UNK, Alphabet, glyph_bitmaps
from difftsr.vae import VAE, VAEConfig
from parity_common import assert_close, load_fixture

K, N = 38, 24
COSINE, PUBLISHED = ScheduleConfig(), ScheduleConfig("sqrt_linear", zero_terminal_snr=False)


class Tiny(nn.Module):
    """The three networks that the stage needs, with random weights."""

    def __init__(self, prediction: str = "residual"):
        super().__init__()
        torch.manual_seed(1)
        self.vae, self.recognizer = VAE(VAEConfig.tiny()), TransOCR(RecognizerConfig.tiny(K))
        config = IDMConfig.tiny(K)
        config.prediction = prediction
        config.schedule.zero_terminal_snr = prediction != "eps"
        glyphs = torch.randint(0, 2, (K, 24, 24), dtype=torch.uint8) * 255
        self.idm = IDM(config, glyphs)
        for parameter in self.idm.parameters():  # wake up what starts from zero, and with it the path to the text
            if not parameter.any():
                nn.init.normal_(parameter, std=0.05)
        self.eval()


def line_batch(batch: int = 3, seed: int = 0) -> dict:
    g = torch.Generator().manual_seed(seed)
    tokens, centers = torch.zeros(batch, N, dtype=torch.long), torch.full((batch, N), -1.0)
    for row in range(batch):
        n = row % 5 + 2
        tokens[row, :n] = torch.randint(2, K, (n,), generator=g)
        centers[row, :n] = (torch.arange(n) + 0.5) / n
    hr = torch.randn(batch, 3, 8, 32, generator=g).clamp(-1, 1).repeat_interleave(4, 2).repeat_interleave(4, 3)
    lr = (hr + 0.3 * torch.randn(hr.shape, generator=g)).clamp(-1, 1)
    return {"hr": hr, "lr": lr, "tokens": tokens, "centers": centers}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- schedule ---


def test_published_schedule_equals_reference():
    fixture = load_fixture("idm_schedule")
    diffusion, x, t = GaussianDiffusion(PUBLISHED), fixture.inputs, fixture.inputs["t"]
    assert_close(diffusion.alpha_bar, fixture.aux["train.alphas_cumprod"], atol=1e-7, rtol=1e-6)
    assert_close(diffusion.q_sample(x["x_start"], t, x["noise"]), fixture.outputs["q_sample"], atol=1e-6)
    z_0, eps = diffusion.to_z0_eps(x["noise"], x["x_start"], t, x["x_start"], "eps")
    assert_close(z_0, fixture.outputs["predict_start_from_noise"], atol=1e-5, rtol=1e-5)
    assert eps is x["noise"]


@pytest.mark.parametrize("config", [COSINE, PUBLISHED, ScheduleConfig(zero_terminal_snr=False, timesteps=50)])
def test_alpha_bar_falls_from_nearly_one(config):
    table = alpha_bar_table(config)
    assert table.shape == (config.timesteps,) and table.dtype == torch.float64
    assert table[0] > 0.99 and (table.diff() < 0).all() and (table >= 0).all()
    assert (table[-1] == 0) == config.zero_terminal_snr


def test_cosine_is_half_way_at_half_time():
    assert alpha_bar_table(COSINE)[499].item() == pytest.approx(math.cos(0.504 / 1.008 * math.pi / 2) ** 2, abs=0.02)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="cosine or sqrt_linear"):
        alpha_bar_table(ScheduleConfig("linear"))
    with pytest.raises(ValueError, match="eps, v, residual"):
        IDM(IDMConfig(prediction="x0"))
    with pytest.raises(ValueError, match="zero_terminal_snr"):
        IDM(IDMConfig(prediction="eps"))


def test_noised_latents_have_the_stated_mean_and_variance():
    diffusion, g = GaussianDiffusion(COSINE), generator()
    z_0 = torch.full((20000, 1, 1, 1), 2.0)
    for t in (0, 300, 700, 999):
        z_t = diffusion.q_sample(z_0, torch.full((20000,), t), torch.randn(z_0.shape, generator=g))
        a = diffusion.alpha_bar[t].item()
        assert z_t.mean().item() == pytest.approx(2 * a**0.5, abs=0.03)
        assert z_t.var().item() == pytest.approx(1 - a, abs=0.03)


# --- parametrisations ---


@pytest.mark.parametrize("config", [COSINE, PUBLISHED])
@pytest.mark.parametrize("kind", ["eps", "v", "residual"])
def test_predictions_are_inverted_at_every_time(config, kind):
    diffusion, g = GaussianDiffusion(config), generator()
    t = torch.tensor([0, 1, 250, 500, 997, 998, 999])
    z_0, z_lr, noise = (torch.randn(7, 4, 2, 6, generator=g) for _ in range(3))
    z_t = diffusion.q_sample(z_0, t, noise)
    z_back, eps = diffusion.to_z0_eps(diffusion.target(z_0, noise, t, z_lr, kind), z_t, t, z_lr, kind)
    assert z_back.isfinite().all() and eps.isfinite().all()
    torch.testing.assert_close(eps, noise, atol=2e-3, rtol=0)
    known = slice(0, 4) if kind == "eps" and config is COSINE else slice(None)  # at alpha_bar = 0 eps knows nothing
    torch.testing.assert_close(z_back[known], z_0[known], atol=2e-3, rtol=0)


def test_eps_explodes_near_the_end_and_the_others_do_not():
    diffusion = GaussianDiffusion(PUBLISHED)
    shape = (3, 1, 1, 1)
    t, z_t, z_lr = torch.tensor([500, 750, 999]), torch.zeros(shape), torch.zeros(shape)

    def slope(kind: str) -> torch.Tensor:
        ends = [diffusion.to_z0_eps(torch.full(shape, x), z_t, t, z_lr, kind)[0] for x in (0.0, 1.0)]
        return (ends[1] - ends[0]).abs().flatten()

    torch.testing.assert_close(slope("eps"), torch.tensor([2.9, 12.0, 102.0]), atol=0.5, rtol=0.02)
    assert (slope("v") <= 1).all() and (slope("residual") == 1).all()


def test_weights_are_the_same_error_of_z0():
    """An error of z_0 costs the same in v and in the residual; in eps also, as long as the SNR is above the limit."""
    diffusion, t = GaussianDiffusion(PUBLISHED), torch.tensor([100, 200, 300, 500, 900])
    a = diffusion.alpha_bar[t]
    snr = a / (1 - a)
    residual = diffusion.loss_weight(t, "residual")
    assert residual.min() >= 0.5 and residual.max() <= 5
    torch.testing.assert_close(diffusion.loss_weight(t, "v") * (snr + 1), residual)
    above = snr > 0.5
    torch.testing.assert_close((diffusion.loss_weight(t, "eps") * snr)[above], residual[above])
    assert diffusion.loss_weight(t, "eps").max() <= 1


def test_training_times_are_uniform_and_unordered():
    g, counts, first = generator(), torch.zeros(10), []
    for _ in range(400):
        t = spread_times(10, 1000, g)
        assert t.min() >= 0 and t.max() <= 999
        counts += torch.bincount(t // 100, minlength=10)
        first.append(t[0].item())
    assert counts.tolist() == [400] * 10  # one in every tenth of the range, each time
    assert 400 < torch.tensor(first).float().mean() < 600


# --- text encoder ---


def test_published_text_encoder_equals_reference():
    fixture = load_fixture("text_encoder_small")
    c = fixture.manifest["config"]
    encoder = TextEncoder(TextEncoderConfig(c["vocab_size"], c["n_embed"], c["n_layer"], 24, 8, 64, soft=False))
    encoder.load_state_dict(fixture.weights)
    tokens = fixture.inputs["tokens"]
    assert_close(encoder(tokens), fixture.outputs["z"])
    assert_close(encoder(tokens[:, :12]), fixture.outputs["z_half_length"])


def test_soft_tokens_blend_between_characters():
    encoder = Tiny().idm.text_encoder
    tokens = torch.tensor([[[5, 9]]])
    a, b, unknown = (encoder.embed(Reading.of(torch.tensor([[k]]))) for k in (5, 9, UNK))
    mix = encoder.embed(Reading(tokens, torch.tensor([[[1.0, 0.0]]]), torch.zeros(1, 1)))
    torch.testing.assert_close(mix, a)
    # the map is linear in (sum of p E[k], confidence): check at p = (.6, .3), the rest on UNK, confidence .6
    got = encoder.embed(Reading(tokens, torch.tensor([[[0.6, 0.3]]]), torch.zeros(1, 1)))
    confidence = encoder.transformer.project.weight[:, -1]
    torch.testing.assert_close(got, 0.6 * a + 0.3 * b + 0.1 * unknown + (0.6 - 1.0) * confidence)


def test_confidence_and_order_change_the_context():
    encoder = Tiny().idm.text_encoder
    tokens = line_batch()["tokens"]
    with torch.no_grad():
        sure, unsure = (encoder(Reading.of(tokens, prob=p)) for p in (1.0, 0.3))
        assert sure.shape == (3, N, 48)
        assert (sure - unsure).abs().max() > 1e-3
        assert (encoder(tokens) - sure).abs().max() == 0  # token ids are certain
        assert (encoder(tokens.flip(1)).flip(1) - sure).abs().max() > 1e-3


# --- training texts ---


def test_mixture_of_texts():
    batch = line_batch(400)
    tokens, centers = batch["tokens"], batch["centers"]
    marked = Reading.of(torch.full_like(tokens, 7), torch.full_like(centers, 0.123), prob=0.77)
    told = text_conditions(tokens, centers, marked, generator(), MIX, jitter=0.01)
    real = (told.best == 7).all(1) & (told.confidence == 0.77).all(1)
    none = (told.probs.sum(-1) == 0).all(1) & (told.best == UNK).all(1)
    written = tokens > UNK
    right = ((told.best == tokens) | ~written).all(1) & ~real & ~none
    assert 0.42 < real.float().mean() < 0.58 and 0.05 < none.float().mean() < 0.16
    assert right.float().mean() > 0.2
    known = (told.confidence == 1).all(1) & right
    assert 0.4 < known.sum() / right.sum() < 0.6 and (told.confidence[right & ~known] < 1).any(1).all()
    assert 0.03 < (~real & ~none & ~right).float().mean() < 0.2  # misread lines
    assert (told.centers[none] == -1).all() and (told.centers[real] == 0.123).all()
    moved = (told.centers - centers)[~real & ~none & True][written[~real & ~none]]
    assert 0.005 < moved.std() < 0.02
    assert (told.centers[~real & ~none][tokens[~real & ~none] == PAD] == -1).all()
    assert (told.probs.sum(-1) <= 1 + 1e-6).all() and (told.probs >= 0).all()
    misread = ~real & ~none & ~right
    second = told.tokens[misread, :, 1]
    wrong = (told.best != tokens)[misread] & written[misread]
    assert (second[wrong] == tokens[misread][wrong]).all()  # the truth comes second


def test_only_the_lines_that_need_it_are_read():
    batch, asked = line_batch(64), []

    def read(rows):
        asked.extend(rows.tolist())
        return Reading.of(batch["tokens"][rows], prob=0.5)

    text_conditions(batch["tokens"], batch["centers"], read, generator(1), MIX)
    assert 16 < len(asked) < 48 and len(set(asked)) == len(asked)
    asked.clear()
    text_conditions(batch["tokens"], batch["centers"], read, generator(1), (0.0, 0.5, 0.3, 0.2))
    assert asked == []


def test_texts_repeat_with_the_seed():
    batch = line_batch(16)
    a, b, c = (text_conditions(batch["tokens"], batch["centers"], None, generator(s)) for s in (3, 3, 4))
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.probs, b.probs)
    assert not torch.equal(a.probs, c.probs)


def test_similar_glyphs_are_similar():
    model = Tiny()
    glyphs = torch.zeros(K, 24, 24, dtype=torch.uint8)
    for k in range(2, K):  # bars; neighbours overlap most
        glyphs[k, :, (k - 2) // 2 : (k - 2) // 2 + 5] = 255
    embedding = IDM(model.idm.config, glyphs).text_encoder.transformer.token_emb
    similar = similar_glyphs(embedding, 3)
    assert similar.shape == (K, 3)
    assert (similar[PAD] == PAD).all() and (similar[UNK] == UNK).all()
    assert (similar[2:] > UNK).all()
    itself = torch.arange(2, K)[:, None]
    assert ((similar[2:] - itself).abs() <= 4).all() and not (similar[2:] == itself).any()


def test_of_glyphs_that_are_equally_similar_the_first_comes_first():
    alphabet = Alphabet.tiny()
    embedding = CharacterEmbedding(len(alphabet), 8, torch.as_tensor(glyph_bitmaps(alphabet)))
    bitmaps = unpack_bits(embedding.glyphs).double().numpy()[2:]
    likeness = np.corrcoef(bitmaps).round(9)
    np.fill_diagonal(likeness, -2)
    similar = similar_glyphs(embedding, 6)[2:].numpy() - 2
    assert np.array_equal(similar, np.argsort(-likeness, axis=1, kind="stable")[:, :6])
    five, eight, e = (alphabet.characters.index(c) for c in "58E")
    assert likeness[five, eight] == likeness[five, e]  # else nothing would be tested


# --- the model ---


@pytest.mark.parametrize("prediction", ["eps", "v", "residual"])
def test_text_changes_what_is_predicted(prediction):
    idm, batch = Tiny(prediction).idm, line_batch(2)
    g = generator()
    z_t, z_lr = (torch.randn(2, 4, 8, 32, generator=g) for _ in range(2))
    t = torch.tensor([200, 950])
    with torch.no_grad():
        outs = []
        for text in (Reading.of(batch["tokens"]), Reading.of(batch["tokens"].flip(0)), Reading.none(2)):
            z_0, eps = idm.predict(z_t, z_lr, t, idm.context(text), text)
            assert z_0.shape == z_t.shape == eps.shape and z_0.isfinite().all()
            alpha, sigma = idm.diffusion.levels(t)
            torch.testing.assert_close(alpha * z_0 + sigma * eps, z_t, atol=1e-3, rtol=1e-3)
            outs.append(z_0)
    assert all((outs[i] - outs[j]).abs().max() > 1e-4 for i, j in ((0, 1), (0, 2), (1, 2)))


def test_an_untrained_residual_model_returns_the_low_resolution_latent():
    idm = IDM(IDMConfig.tiny(K))
    z_lr = torch.randn(1, 4, 8, 32, generator=generator())
    text = Reading.none(1)
    z_0, _ = idm.predict(torch.randn(1, 4, 8, 32), z_lr, torch.tensor([999]), idm.context(text), text)
    assert torch.equal(z_0, z_lr)


def test_published_idm_has_the_published_parts():
    with torch.device("meta"):
        idm = IDM(IDMConfig.paper())
    assert sum(p.numel() for p in idm.unet.parameters()) == 874_024_003
    assert idm.text_encoder.state_dict()["transformer.to_logits.weight"].shape == (6736, 160)
    assert "diffusion.alpha_bar" not in idm.state_dict()


# --- the stage ---


def run_stage(model: nn.Module, batch: dict, seed: int = 0, **settings):
    stage = IDMStage(IDMTraining(**settings), model)
    stage.progress = 1.0
    ((loss, name, logs),) = stage.losses(model, batch, generator(seed))
    assert name == "idm" and stage.trains == ("idm",)
    return stage, loss, logs


@pytest.mark.parametrize("prediction", ["eps", "v", "residual"])
@pytest.mark.parametrize("t", [0, 400, 999])
def test_the_reading_of_a_one_step_estimate_teaches_the_unet(prediction, t):
    model, batch = Tiny(prediction), line_batch()
    for network in (model.vae, model.recognizer):
        network.requires_grad_(False)
    g = generator()
    z_hr, z_lr = model.vae.to_latent(batch["hr"]), model.vae.to_latent(batch["lr"])
    noise, times = torch.randn(z_hr.shape, generator=g), torch.full((3,), t)
    z_t, text = model.idm.diffusion.q_sample(z_hr, times, noise), Reading.of(batch["tokens"], batch["centers"])
    z_0, _ = model.idm.predict(z_t, z_lr, times, model.idm.context(text), text)
    ocr_loss(model, z_0, batch["tokens"], times, 2).backward()
    gradients = [p.grad for p in model.idm.unet.parameters() if p.grad is not None]
    size = math.sqrt(sum(x.double().square().sum().item() for x in gradients))
    assert all(x.isfinite().all() for x in gradients) and 0 < size < 1e3
    assert all(p.grad is None for net in (model.vae, model.recognizer) for p in net.parameters())


def test_a_step_moves_the_idm_and_nothing_else():
    model, batch = Tiny(), line_batch()
    model.train()  # the stage itself must keep the batch norms of the frozen networks still
    before = {k: v.clone() for k, v in model.state_dict().items()}
    stage, loss, logs = run_stage(model, batch, ocr_start=0.0)
    optimizer = stage.optimizers(model)["idm"]
    loss.backward()
    optimizer.step()
    changed = {k.split(".")[0] for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"idm"}
    assert set(logs) >= {"loss", "denoise", "ocr"} and all(math.isfinite(float(v)) for v in logs.values())
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.idm.parameters()}


def test_the_ocr_loss_waits_for_its_part_of_the_run():
    model, batch = Tiny(), line_batch()
    stage = IDMStage(IDMTraining(ocr_start=0.5), model)
    for progress, on in ((0.0, False), (0.4, False), (0.5, True)):
        stage.progress = progress
        ((_, _, logs),) = stage.losses(model, batch, generator())
        assert ("ocr" in logs) == on


def test_cached_latents_and_readings_give_the_same_loss():
    model, batch = Tiny(), line_batch(5)
    _, loss, _ = run_stage(model, batch)
    with torch.no_grad():
        cached = {"z_hr": model.vae.to_latent(batch["hr"]), "z_lr": model.vae.to_latent(batch["lr"])}
        cached["reading"] = model.recognizer.read(batch["lr"])
    cached |= {"tokens": batch["tokens"], "centers": batch["centers"]}
    _, again, _ = run_stage(model, cached)
    torch.testing.assert_close(loss, again, atol=1e-5, rtol=1e-4)


def test_the_same_seed_gives_the_same_loss():
    model, batch = Tiny(), line_batch()
    a, b, c = (run_stage(model, batch, seed=s)[1].item() for s in (0, 0, 1))
    assert a == b != c


@pytest.mark.parametrize(
    "prediction, loss, weighting",
    [("residual", "l2", "snr"), ("v", "l2", "snr"), ("v", "l2", "none"), ("eps", "l1", "none")],
)
def test_training_lowers_the_loss(prediction, loss, weighting):
    torch.manual_seed(0)
    model, batch = Tiny(prediction), line_batch(6)
    model.idm = IDM(model.idm.config)
    batch["z_hr"] = torch.randn(6, 4, 8, 32, generator=generator())
    batch["z_lr"] = 0.4 * batch["z_hr"]
    settings = IDMTraining(
        loss=loss, weighting=weighting, ocr_weight=0.0, learning_rate=2e-3, text_mix=(0.0, 0.7, 0.2, 0.1)
    )
    stage = IDMStage(settings, model)
    optimizer, history = stage.optimizers(model)["idm"], []
    for _ in range(12):
        for value, _, logs in stage.losses(model, batch, generator()):  # always the same draws
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
            history.append(float(logs["denoise"]))
    assert history[-1] < 0.9 * history[0]


# --- the drawn text ---


def test_columns_show_the_character_that_stands_there():
    which, place, room = columns_of(torch.tensor([[0.5, 0.25, -1.0], [0.5, -1.0, -1.0], [-1.0, -1.0, -1.0]]), 8)
    assert which[0].tolist() == [-1, 1, 1, 0, 0, -1, -1, -1]  # rooms of a quarter of the line around 1/4 and 1/2
    torch.testing.assert_close(place[0, 1:5], torch.tensor([0.25, 0.75, 0.25, 0.75]))
    assert which[1].tolist() == [0] * 8 and torch.all(place[1].diff() > 0)  # alone: all of the line
    assert which[2].tolist() == [-1] * 8
    assert room[0, 1:5].tolist() == [1] * 4
    _, _, uneven = columns_of(torch.tensor([[0.1, 0.2, 0.7]]), 100)
    assert uneven[0, 5] < uneven[0, 75] <= 1


def test_drawn_text_is_as_bright_as_it_is_probable_and_stands_where_the_character_stands():
    glyphs = torch.zeros(K, 24, 24)
    glyphs[2, 2:22, 11:13] = 1.0  # an upright stroke
    glyphs[3, 11:13, 2:22] = 1.0  # a level one
    packed = CharacterEmbedding(K, 8, glyphs).glyphs
    text = Reading.of(torch.tensor([[2, 3]]), torch.tensor([[0.25, 0.75]]))
    picture = F.pixel_shuffle(draw_text(text, packed, (8, 32)), 2)[0, 0]  # (16, 64)
    assert draw_text(text, packed, (8, 32)).shape == (1, 4, 8, 32)
    assert picture.max() == pytest.approx(1, abs=0.05)
    left, right = picture[:, :32], picture[:, 32:]
    assert left.mean(1)[4:12].std() < 0.02 < left.mean(0).std()  # upright: all rows alike
    assert right.mean(0)[4:28].std() < 0.02 < right.mean(1).std()
    assert float((left.mean(0) * torch.arange(32)).sum() / left.mean(0).sum()) == pytest.approx(15.5, abs=1)
    unsure = Reading(torch.tensor([[[2, 3], [3, 2]]]), torch.tensor([[[0.3, 0.2], [0.5, 0.0]]]), text.centers)
    mixed = F.pixel_shuffle(draw_text(unsure, packed, (8, 32)), 2)[0, 0]
    torch.testing.assert_close(mixed[:, 32:], 0.5 * right)
    assert mixed[:, :32].max() <= 0.51
    moved = Reading.of(text.best, text.centers + 0.125)
    shifted = F.pixel_shuffle(draw_text(moved, packed, (8, 32)), 2)[0, 0]
    torch.testing.assert_close(shifted[:, 8:], picture[:, :-8])


def test_unknown_characters_and_no_text_are_not_drawn():
    packed = CharacterEmbedding(K, 8, torch.ones(K, 24, 24)).glyphs
    assert draw_text(Reading.none(2), packed, (8, 32)).abs().max() == 0
    assert draw_text(Reading.of(torch.tensor([[UNK, PAD]])), packed, (8, 32)).abs().max() == 0
    assert draw_text(Reading.of(torch.tensor([[2, PAD]])), packed, (8, 32)).max() > 0.9


def test_canvas_needs_bitmaps():
    with pytest.raises(ValueError, match="soft=True"):
        IDM(replace(IDMConfig.paper(), canvas=True))
