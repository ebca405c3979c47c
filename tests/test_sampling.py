"""The sampler: times, single steps, exact oracles for both diffusions, and the joint loop."""

import io
import math
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import init_empty_weights

from difftsr import official
from difftsr.idm import GaussianDiffusion, ScheduleConfig, alpha_bar_table
from difftsr.model import DiffTSR, preset
from difftsr.mom import PublishedMoMConfig
from difftsr.recognizer import Reading, RecognizerConfig
from difftsr.sampling import (
    LineNoise,
    ddim_step,
    dpm_solver_2m,
    from_released,
    level,
    reference_sample,
    reference_timesteps,
    sample,
    timesteps,
    to_released,
    with_text,
)
from difftsr.tdm import Denoiser, MultinomialDiffusion, PublishedTDMConfig
from difftsr.text_lines import PAD, Alphabet
from difftsr.unet import BasicTransformerBlock, UNet, UNetConfig
from difftsr.vae import VAEConfig
from parity_common import assert_close, load_fixture, recipe_state_dict

T = 1000
COSINE = GaussianDiffusion(ScheduleConfig()).alpha_bar
PUBLISHED = GaussianDiffusion(ScheduleConfig("sqrt_linear", zero_terminal_snr=False)).alpha_bar


def pairs(times):
    return list(zip(times, [*times[1:], -1]))


# ---------------------------------------------------------------- times


def test_exactly_s_different_times_for_every_s():
    for steps in range(1, T + 1):
        times = timesteps(steps, T)
        assert len(times) == steps and times[0] == T - 1 and times[-1] >= 0
        assert all(a > b for a, b in zip(times, times[1:]))
    assert timesteps(7, 7) == [6, 5, 4, 3, 2, 1, 0]


@pytest.mark.parametrize("steps", [0, -1, T + 1])
def test_other_numbers_of_steps_are_refused(steps):
    with pytest.raises(ValueError, match=r"1\.\.1000"):
        timesteps(steps, T)


def test_the_released_spacing_is_as_released():
    assert reference_timesteps(5) == [801, 601, 401, 201, 1]
    assert len(reference_timesteps(7)) == 8
    for steps in (3, 300, 1000):
        with pytest.raises(ValueError, match=f"cannot do {steps} steps"):
            reference_timesteps(steps)


# ---------------------------------------------------------------- single steps


@pytest.mark.parametrize("steps", [1, 2, 4, 20, 333, 1000])
@pytest.mark.parametrize("alpha_bar", [COSINE, PUBLISHED], ids=["cosine", "published"])
def test_the_true_noise_leads_to_the_true_latent(steps, alpha_bar):
    z0, eps = torch.randn(2, 2, 3, 4, 6, generator=torch.Generator().manual_seed(steps))
    times = timesteps(steps, T)
    z = math.sqrt(level(alpha_bar, T - 1)) * z0 + math.sqrt(1 - level(alpha_bar, T - 1)) * eps
    for t, s in pairs(times):
        a = level(alpha_bar, t)
        assert torch.allclose(z, math.sqrt(a) * z0 + math.sqrt(1 - a) * eps, atol=1e-5)
        z = ddim_step(z0, eps, t, s=s, alpha_bar=alpha_bar)
    assert torch.equal(z, z0)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_every_eta_keeps_the_marginal(eta):
    generator, count, t, s = torch.Generator().manual_seed(0), 200_000, 700, 300
    eps, noise = torch.randn(2, count, generator=generator)
    z_s = ddim_step(torch.full((count,), 2.0), eps, t, s=s, alpha_bar=COSINE, eta=eta, noise=noise)
    a = level(COSINE, s)
    assert abs(float(z_s.mean()) - 2 * math.sqrt(a)) < 0.01 and abs(float(z_s.var()) - (1 - a)) < 0.01


def test_the_end_is_free_of_noise_whatever_eta():
    z0, eps, noise = torch.randn(3, 5)
    assert torch.equal(ddim_step(z0, eps, 49, s=-1, alpha_bar=COSINE, eta=1.0, noise=noise), z0)
    with pytest.raises(ValueError, match="noise"):
        ddim_step(z0, eps, 49, s=9, alpha_bar=COSINE, eta=0.5)


def gaussian_oracle(z_t, t, alpha_bar, mean=1.0, std=0.3):
    a = level(alpha_bar, t)
    z0 = mean + math.sqrt(a) * std**2 / (a * std**2 + 1 - a) * (z_t - math.sqrt(a) * mean)
    return z0, (z_t - math.sqrt(a) * z0) / math.sqrt(1 - a)


def line_of_the_sampler(times, alpha_bar, end=-1):
    """The oracle's sampler is linear: (mean of the result, share of the std .3) from two starting points."""
    z = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for t, s in zip(times, [*times[1:], end]):
        z = ddim_step(*gaussian_oracle(z, t, alpha_bar), t, s=s, alpha_bar=alpha_bar)
    return float(z[0]), float(z[1] - z[0]) / 0.3


@pytest.mark.parametrize(
    ("alpha_bar", "shares"),
    [(COSINE, (0.54, 0.80, 0.89)), (PUBLISHED, (0.28, 0.52, 0.68))],
    ids=["cosine", "published"],
)
def test_a_gaussian_denoiser_recovers_the_known_share_of_the_spread(alpha_bar, shares):
    for steps, share in zip((4, 10, 20), shares):
        mean, recovered = line_of_the_sampler(timesteps(steps, T), alpha_bar)
        assert abs(mean - 1) < 0.005 and abs(recovered - share) < 0.012
    assert line_of_the_sampler(timesteps(1, T), COSINE)[0] == pytest.approx(1.0)  # one step: the conditional mean


def test_leading_spacing_biases_the_mean():
    mean, _ = line_of_the_sampler(reference_timesteps(4), COSINE, end=0)
    assert 0.01 < 1 - mean < 0.17


def test_the_solver_begins_and_ends_like_ddim():
    z = torch.linspace(-2, 2, 7, dtype=torch.float64)
    for t, s in ((999, 700), (700, 300), (49, -1)):
        z0, eps = gaussian_oracle(z, t, COSINE)
        first = dpm_solver_2m(z, z0, t, s=s, alpha_bar=COSINE)
        assert torch.allclose(first, ddim_step(z0, eps, t, s=s, alpha_bar=COSINE), atol=1e-6)
    z0, _ = gaussian_oracle(z, 49, COSINE)
    assert torch.allclose(dpm_solver_2m(z, z0, 49, s=-1, alpha_bar=COSINE, previous=(99, z)), z0)


def test_the_solver_is_of_second_order():
    """Between 800 and 160, against the exact flow of the oracle: half the step, a quarter of the error."""
    schedule = alpha_bar_table(ScheduleConfig())

    def solve(steps, second_order=True):
        times = [round(800 - 640 * k / steps) for k in range(steps + 1)]
        z, previous = torch.tensor([-1.5, 0.0, 2.0], dtype=torch.float64), None
        for t, s in zip(times, times[1:]):
            z0, _ = gaussian_oracle(z, t, schedule)
            z, previous = dpm_solver_2m(z, z0, t, s=s, alpha_bar=schedule, previous=previous), (t, z0)
            previous = previous if second_order else None
        return z

    def exact(z):  # z_t = sqrt(abar) m + sqrt(abar v + 1 - abar) u with u fixed along the flow
        a, b = level(schedule, 800), level(schedule, 160)
        return math.sqrt(b) + math.sqrt((b * 0.09 + 1 - b) / (a * 0.09 + 1 - a)) * (z - math.sqrt(a))

    truth = exact(torch.tensor([-1.5, 0.0, 2.0], dtype=torch.float64))
    errors = [float((solve(n) - truth).abs().max()) for n in (40, 80, 160)]
    first = [float((solve(n, False) - truth).abs().max()) for n in (80, 160)]
    assert 3.5 < errors[0] / errors[1] < 5 and 3.5 < errors[1] / errors[2] < 5
    assert 1.8 < first[0] / first[1] < 2.2 and errors[2] < 0.01 * first[1]


# ---------------------------------------------------------------- noise of a line


def test_noise_depends_on_the_seed_of_the_line_alone():
    alone, batch = LineNoise([3]), LineNoise([1, 3, 1])
    a, b = alone.normal((2, 5)), batch.normal((2, 5))
    assert torch.equal(b[1], a[0]) and torch.equal(b[0], b[2]) and not torch.equal(b[0], b[1])
    log_p = torch.full((1, 9, 24), 1 / 9).log()
    chosen = batch.choose(log_p.expand(3, -1, -1))
    assert torch.equal(chosen[1], alone.choose(log_p)[0]) and len(chosen.unique()) > 5


def test_choose_follows_the_probabilities_and_never_takes_the_impossible():
    p = torch.tensor([0.6, 0.0, 0.4]).log()[None, :, None].expand(1, 3, 20_000)
    counts = LineNoise([0]).choose(p)[0].bincount(minlength=3) / 20_000
    assert counts[1] == 0 and abs(float(counts[0]) - 0.6) < 0.02


# ---------------------------------------------------------------- the joint loop, with oracles for networks


class OracleText(Denoiser):
    """A TDM that knows the answer, or is sure of nothing."""

    rule = "mixture"

    def __init__(self, answer, num_classes, log):
        super().__init__()
        self.diffusion, self.answer, self.log = MultinomialDiffusion(num_classes, T), answer, log

    def context(self, features, z_lr, residual=None):
        return residual

    def forward(self, c_t, t, context, reading=None):
        self.log.append(("tdm", int(t[0]), c_t.clone()))
        return 30 * self.diffusion.log_onehot(self.answer).exp().expand(len(c_t), -1, -1)


def oracle_model(image, answer, alphabet):
    """A model whose VAE is the identity, whose IDM knows the image and whose TDM knows the text."""
    log, diffusion = [], GaussianDiffusion(ScheduleConfig())

    def predict(z_t, z_lr, t, context, centers=None):
        log.append(("idm", int(t[0]), context))
        a = diffusion.alpha_bar[t].view(-1, 1, 1, 1)
        return image.expand_as(z_t), (z_t - a.sqrt() * image) / (1 - a).sqrt()

    def image_condition(c_t, z_lr, z_t, t, reading=None):
        log.append(("mom", int(t[0]), z_t.clone()))
        return torch.zeros(len(z_t), 4, 8)

    wrong = Reading.of(alphabet.encode("WRONG")[None].expand(2, -1))
    wrong.features = torch.zeros(2, 1, 1, 1)
    return SimpleNamespace(
        config=SimpleNamespace(steps=4, image_size=(8, 32), temperature=1.0, reference=False),
        alphabet=alphabet,
        vae=SimpleNamespace(to_latent=lambda x: x, from_latent=lambda z: z),
        recognizer=SimpleNamespace(
            read=lambda x: wrong[: len(x)], locate=lambda features, tokens: torch.full(tokens.shape, 0.5)
        ),
        idm=SimpleNamespace(
            diffusion=diffusion, predict=predict, context=lambda reading: ("baseline", reading),
            unet=SimpleNamespace(fixed_text=nullcontext),
        ),
        tdm=OracleText(answer, len(alphabet), log),
        mom=SimpleNamespace(image_condition=image_condition, text_condition=lambda reading: ("full", reading)),
        log=log,
    )


@pytest.fixture
def oracle():
    alphabet = Alphabet.tiny()
    red = torch.tensor([0.8, -1.0, -1.0]).view(1, 3, 1, 1).expand(1, 3, 8, 32)
    return oracle_model(red, alphabet.encode("RIGHT42")[None], alphabet)


@pytest.mark.parametrize("steps", [1, 4, 20, 200])
def test_oracles_end_at_the_truth_for_any_number_of_steps(oracle, steps):
    result = sample(oracle, torch.zeros(2, 3, 8, 32), steps=steps)
    assert [oracle.alphabet.decode(row) for row in result.tokens] == ["RIGHT42"] * 2
    assert float(result.probs.min()) > 0.99
    assert torch.allclose(result.image[1, :, 4, 7], torch.tensor([0.8, -1.0, -1.0]), atol=1e-5)  # red stays red


def test_the_text_goes_first_and_its_prediction_conditions_the_image(oracle):
    sample(oracle, torch.zeros(1, 3, 8, 32), steps=3)
    assert [name for name, *_ in oracle.log] == ["mom", "tdm", "idm"] * 3
    assert [t for name, t, _ in oracle.log] == [999] * 3 + [665] * 3 + [332] * 3
    noisy, (kind, told) = oracle.log[1][2], oracle.log[2][2]
    right = oracle.alphabet.encode("RIGHT42")[None]
    assert kind == "full" and torch.equal(told.best, right)  # the clean text, while ...
    assert (noisy == right).float().mean() < 0.3  # ... c_t is noise


def test_the_text_leaves_its_noise_behind_step_by_step(oracle):
    result = sample(oracle, torch.zeros(1, 3, 8, 32), steps=20, trace=True)
    right = oracle.alphabet.encode("RIGHT42")[None]
    shares = [float((step.c_t == right).float().mean()) for step in result.trace]
    assert shares[0] < 0.3 and shares[-1] > 0.9 and 0.2 < shares[10] < 0.95
    assert len(result.trace) == 20 and result.trace[-1].s == -1


def test_the_other_modes_ask_neither_tdm_nor_mom(oracle):
    for mode, text in (("baseline", "WRONG"), ("no-text", "\ufffd" * 24)):
        oracle.log.clear()
        sample(oracle, torch.zeros(1, 3, 8, 32), steps=2, mode=mode)
        assert [name for name, *_ in oracle.log] == ["idm", "idm"]
        kind, told = oracle.log[0][2]
        assert kind == "baseline" and oracle.alphabet.decode(told.best[0]) == text
        assert mode == "baseline" or not told.probs.any()


@pytest.mark.parametrize("mode", ["full", "baseline"])
def test_a_given_text_is_never_changed(oracle, mode):
    given = oracle.alphabet.encode("GIVEN")[None]
    result = sample(oracle, torch.zeros(1, 3, 8, 32), steps=3, mode=mode, text=given)
    assert torch.equal(result.tokens, given) and {name for name, *_ in oracle.log} == {"idm"}
    assert all(torch.equal(context[1].best, given) and context[0] == mode for _, _, context in oracle.log)


def test_a_start_from_the_lr_latent(oracle):
    lr = torch.full((1, 3, 8, 32), 0.5)
    result = sample(oracle, lr, steps=4, start="lr", strength=0.3, trace=True)
    assert result.trace[0].t == 299
    a = level(COSINE, 299)
    assert abs(float(result.trace[0].z_t.mean()) - 0.5 * math.sqrt(a)) < 0.1
    with pytest.raises(ValueError, match="strength"):
        sample(oracle, lr, start="lr", strength=0.0)


def test_the_solver_in_the_loop_reaches_the_same_end(oracle):
    lr = torch.zeros(1, 3, 8, 32)
    assert torch.allclose(sample(oracle, lr, steps=8, solver="dpm").image, sample(oracle, lr, steps=8).image, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "fast"},
        {"start": "middle"},
        {"solver": "euler"},
        {"solver": "dpm", "eta": 0.5},
        {"steps": 0},
        {"steps": 1001},
        {"seed": [1, 2]},
        {"temperature": -0.1},
        {"temperature": 1.1},
        {"mode": "no-text", "text": torch.zeros(1, 24, dtype=torch.long)},
    ],
)
def test_wrong_settings_are_value_errors(oracle, settings):
    with pytest.raises(ValueError):
        sample(oracle, torch.zeros(1, 3, 8, 32), **settings)


def test_a_bar_counts_the_steps_where_somebody_sees_it(oracle, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    written = {}
    for stream, steps, progress in (
        (Terminal(), 3, True), (Terminal(), 3, False), (Terminal(), 1, True), (io.StringIO(), 3, True)
    ):  # fmt: skip
        monkeypatch.setattr("sys.stderr", stream)
        sample(oracle, torch.zeros(1, 3, 8, 32), steps=steps, progress=progress)
        written[type(stream).__name__, steps, progress] = stream.getvalue()
    shown = written.pop(("Terminal", 3, True))
    assert "steps" in shown and "0/3" in shown and not any(written.values())


def test_places_of_a_given_text():
    alphabet = Alphabet.tiny()
    seen = Reading.of(alphabet.encode("AB")[None], centers=torch.tensor([[0.2, 0.8] + [-1.0] * 22]))
    same = with_text(seen, alphabet.encode("XY")[None])
    more = with_text(seen, alphabet.encode("WXYZ")[None])
    assert same.centers[0, :2].tolist() == pytest.approx([0.2, 0.8])
    assert more.centers[0, :4].tolist() == pytest.approx([0.2, 0.4, 0.6, 0.8]) and (more.centers[0, 4:] == -1).all()
    nothing = with_text(Reading.none(1), alphabet.encode("ABCD")[None])
    assert nothing.centers[0, :4].tolist() == pytest.approx([0.125, 0.375, 0.625, 0.875])
    assert (with_text(seen, torch.full((1, 24), PAD)).centers == -1).all()


# ---------------------------------------------------------------- the joint loop, with networks


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    model = DiffTSR(preset("tiny")).eval()
    for parameter in model.parameters():  # zero-initialised layers would hide what they are told
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture(scope="module")
def lines():
    return torch.rand(3, 3, 32, 128, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("settings", [{}, {"eta": 1.0}, {"mode": "baseline"}, {"solver": "dpm"}])
def test_the_same_seed_gives_the_same_bytes(tiny, lines, settings):
    first, second, other = (sample(tiny, lines[:1], steps=3, seed=seed, **settings) for seed in (4, 4, 5))
    assert torch.equal(first.image, second.image) and torch.equal(first.tokens, second.tokens)
    assert not torch.equal(first.image, other.image)


def test_temperature_scales_the_noise_of_the_start(tiny, lines):
    cold = [sample(tiny, lines[:1], steps=2, seed=seed, mode="baseline", temperature=0.0).image for seed in (1, 2)]
    warm = [sample(tiny, lines[:1], steps=2, seed=seed, mode="baseline", temperature=1.0).image for seed in (1, 2)]
    assert torch.equal(*cold) and not torch.equal(*warm)
    assert torch.equal(sample(tiny, lines[:1], steps=2, seed=1, mode="baseline").image, warm[0])  # the preset's
    traced = sample(tiny, lines[:1], steps=2, seed=1, temperature=0.5, trace=True).trace[0].z_t
    assert torch.equal(2 * traced, sample(tiny, lines[:1], steps=2, seed=1, trace=True).trace[0].z_t)


def test_a_line_does_not_depend_on_its_neighbours(tiny, lines):
    alone = sample(tiny, lines[1:2], steps=3, seed=7, eta=0.5)
    together = sample(tiny, lines, steps=3, seed=[1, 7, 2], eta=0.5)
    assert torch.allclose(together.image[1], alone.image[0], atol=1e-3)
    assert torch.equal(together.tokens[1], alone.tokens[0])


def test_the_text_matters_to_the_image(tiny, lines):
    a, b = (sample(tiny, lines[:1], steps=2, text=tiny.alphabet.encode(text)[None]) for text in ("AAAA", "WWWW"))
    none = sample(tiny, lines[:1], steps=2, mode="no-text")
    assert not torch.allclose(a.image, b.image) and not torch.allclose(a.image, none.image)


# ---------------------------------------------------------------- parity


@pytest.mark.parametrize("steps", [200, 20])
def test_steps_equal_the_recorded_ones(steps):
    fixture = load_fixture("idm_schedule")
    alpha_bar = fixture.aux["train.alphas_cumprod"]
    assert_close(PUBLISHED, alpha_bar, atol=1e-6, rtol=1e-6, name="schedule")
    times = reference_timesteps(steps)[::-1]
    assert times == fixture.aux[f"ddim.S{steps}.timesteps"].tolist()
    for name, expected in fixture.outputs.items():
        if not name.startswith(f"p_sample.S{steps}.") or not name.endswith("x_prev"):
            continue
        eta, index = float(name.split("eta")[1].split(".index")[0]), int(name.split(".index")[1].split(".")[0])
        t, s = times[index], times[index - 1] if index else 0
        z, eps, a = fixture.inputs["z_t"], fixture.inputs["e_t"], level(alpha_bar, times[index])
        z0 = (z - math.sqrt(1 - a) * eps) / math.sqrt(a)
        assert_close(z0, fixture.outputs[name.replace("x_prev", "pred_x0")], name=name)
        noise = fixture.inputs["step_noise"]
        assert_close(ddim_step(z0, eps, t, s=s, alpha_bar=alpha_bar, eta=eta, noise=noise), expected, name=name)


class RecordedNoise:
    """Draws that were recorded, in the order in which the loop asks for them."""

    def __init__(self, normals, uniforms):
        self.normals, self.uniforms = iter(normals), iter(uniforms)

    def normal(self, shape):
        noise = next(self.normals)
        assert tuple(noise.shape[1:]) == tuple(shape)
        return noise

    def choose(self, log_probs):
        return (log_probs - torch.log(-torch.log(next(self.uniforms) + 1e-30) + 1e-30)).argmax(1)


def recorded_model(fixture):
    """The small published model of the fixture, with its recipe weights; its text comes from the fixture."""
    params = {key: value["params"] for key, value in fixture.manifest["config"].items() if "params" in str(value)}
    config = preset("paper")
    text = official.text_encoder_config(params["MoM_module_config"]["MoM_Transformer"]["params"])
    config.idm = replace(config.idm, unet=official.unet_config(params["IDM_Unet_config"]), text_encoder=text)
    config.mom = PublishedMoMConfig(
        official.unet_config(params["MoM_module_config"]["MoM_Unet"]["params"]), text, num_classes=50
    )
    config.tdm = official.settings(PublishedTDMConfig, params["TDM_Decoder_config"], official.TDM_NAMES)
    vae = params["VAE_model_config"]
    config.vae = VAEConfig.published(vae["ddconfig"], vae["embed_dim"])
    config.recognizer, config.reference = RecognizerConfig.paper(52), True
    alphabet = Alphabet("".join(chr(0x4E00 + i) for i in range(49)))
    with init_empty_weights(include_buffers=False):
        model = DiffTSR(config, alphabet)
    networks = {"IDM_Unet": model.idm.unet, "TDM_Decoder": model.tdm, "MoM_module": model.mom, "VAE_model": model.vae}
    for network in networks.values():
        weights = recipe_state_dict(
            {k: v for k, v in network.state_dict().items() if "latent_" not in k}, salt=fixture.manifest["recipe_salt"]
        )
        official.fill(network, weights, "fixture", optional=("latent_shift", "latent_scale"))
    model.tdm.rezero["alpha"].data.fill_(fixture.manifest["tdm_rezero_alpha"])
    model.vae.latent_scale.fill_(1 / official.LATENT_FACTOR)
    model.reader_alphabet = alphabet
    model.recognizer.read = lambda lr: Reading.of(torch.full((len(lr), 24), 51))  # END: nothing was read
    return model.eval()


@pytest.mark.parametrize("run", ["general", "full"])
def test_the_published_loop_equals_the_recorded_one(run):
    fixture = load_fixture("sample_loop")
    model = recorded_model(fixture)
    inputs = {key.removeprefix(f"{run}."): value for key, value in fixture.inputs.items() if key.startswith(run)}
    outputs = {key.removeprefix(f"{run}."): value for key, value in fixture.outputs.items() if key.startswith(run)}
    normals = [inputs["noise_vae_posterior"], inputs["noise_init"], *inputs["noise_steps"]]
    x = fixture.inputs["image_u8"].permute(2, 0, 1)[None].float() / 127.5 - 1
    result = reference_sample(
        model, x, steps=5, mode="full" if run == "full" else "baseline", eta=fixture.manifest["eta"], trace=True,
        noise=RecordedNoise(normals, inputs.get("uniform_steps", ())),
        text=from_released(fixture.inputs["c_T"], model.alphabet),
    )  # fmt: skip
    loop = {"atol": 1e-3, "rtol": 1e-3}
    assert [step.t for step in result.trace] == outputs["idm_timesteps"].flatten().tolist()
    for k, step in enumerate(result.trace):
        assert_close(step.z0, outputs["pred_x0"][k], name=f"x0 of step {k}", **loop)
        after = result.trace[k + 1].z_t if k + 1 < len(result.trace) else result.latent
        assert_close(after, outputs["z_t"][k], name=f"latent after step {k}", **loop)
        if run == "full":
            tokens = result.trace[k + 1].c_t if k + 1 < len(result.trace) else result.tokens
            assert torch.equal(to_released(tokens, model.alphabet), outputs["c_t"][k])
    pixels = ((result.image[0] + 1) * 127.5).round().permute(1, 2, 0).to(torch.uint8)
    off = (pixels.int() - outputs["image_u8"].int()).abs()  # truncated: a rounding error can cost one level
    assert off.max() <= 1 and (off > 0).float().mean() < 1e-3


def test_released_classes_and_ours():
    alphabet = Alphabet("AB字")
    ours = alphabet.encode("B?字")
    assert to_released(ours, alphabet)[:4].tolist() == [1, 3, 2, 3]  # one class for unknown and for padding
    assert alphabet.decode(from_released(to_released(ours, alphabet), alphabet)) == "B字"


def test_a_fixed_text_is_read_once_and_another_one_anew():
    torch.manual_seed(0)
    unet = UNet(UNetConfig(6, 3, 16, (1, 2), 1, (1, 2), 2, 12, groups=4)).eval()
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, t, calls = torch.randn(1, 6, 8, 16), torch.tensor([9]), []
    a, b, places = torch.randn(1, 5, 12), torch.randn(1, 5, 12), torch.linspace(0, 1, 5)[None]
    blocks = [m for m in unet.modules() if isinstance(m, BasicTransformerBlock)]
    blocks[0].attn2.to_k.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        alone = [unet(x, t, text, places) for text in (a, b)]
        calls.clear()
        with unet.fixed_text():
            kept = [unet(x, t, text, places) for text in (a, a, b, a)]
        assert len(calls) == 3
        assert all(torch.equal(kept[k], alone[which]) for k, which in enumerate((0, 0, 1, 0)))
        assert torch.equal(unet(x, t, b, places), alone[1]) and all(block.kept is None for block in blocks)
