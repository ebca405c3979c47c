"""The autoencoder: equal to the published one, and honest in everything that is ours."""

import pickle

import numpy as np
import pytest
import torch
from parity_common import assert_close, fill_with_recipe, load_fixture, recipe_state_dict
from torch import nn

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
    hinge_loss,
    lpips_weights,
    random_crops,
)

WHOLE = {"atol": 1e-4, "rtol": 1e-3}
OWN_BUFFERS = {"latent_shift", "latent_scale"}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def load_published(vae: VAE, weights: dict[str, torch.Tensor]) -> VAE:
    """Load a published state dict; only our two buffers may be missing and nothing may be left over."""
    result = vae.load_state_dict(weights, strict=False)
    assert set(result.missing_keys) == OWN_BUFFERS and not result.unexpected_keys
    return vae.eval()


def in_published_range(vae: VAE) -> VAE:
    """Without the conversion of [-1, 1] to [0, 1]: the fixtures feed the networks directly."""
    vae.config.unit_range = False
    return vae


# --- parity -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vae_small", "vae_124_recipe"])
def test_published_autoencoder(name):
    fixture = load_fixture(name)
    vae = in_published_range(VAE(VAEConfig.published(**{k: fixture.manifest["config"][k] for k in ("ddconfig", "embed_dim")})))
    if fixture.weights:
        load_published(vae, fixture.weights)
    else:
        shapes = {key: value for key, value in vae.state_dict().items() if key not in OWN_BUFFERS}
        manifest = fixture.manifest
        load_published(vae, recipe_state_dict(shapes, manifest["recipe_salt"], manifest.get("recipe_gain", 1.0)))
    out = fixture.outputs
    with torch.no_grad():
        posterior = vae.encode(fixture.inputs["x"])
        actual = {
            "mean": posterior.mean,
            "logvar": posterior.logvar,
            "std": posterior.std,
            "mode": posterior.mode,
            "sample": posterior.mean + posterior.std * fixture.inputs["noise"],
            "kl": posterior.kl(),
            "decode_z": vae.decode(fixture.inputs["z"]),
            "decode_mode": vae.decode(posterior.mode),
        }
    for key, value in actual.items():
        print(name, key, (value - out[key]).abs().max().item())
        assert_close(value, out[key], name=key, **WHOLE)
