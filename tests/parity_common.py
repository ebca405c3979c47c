"""Shared by the parity tests: the recorded fixtures and the recipe that fills weights without storing them.

Recorded inputs and outputs of the reference networks: each fixture is a pair `NAME.safetensors` + `NAME.json`. Three
of them lie in `tests/parity/`, the others outside the repository, in the folder `$DIFFTSR_REFERENCE/parity`. Tests that
need one call `load_fixture(NAME)`, which skips them, with the reason, on a machine that does not have it.
"""

import json
import os
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

COMMITTED = Path(__file__).parent / "parity"


def parity_folder() -> Path:
    """The folder with the fixtures; skips the calling test where there is none."""
    reference = os.environ.get("DIFFTSR_REFERENCE")
    if not reference:
        pytest.skip("DIFFTSR_REFERENCE is not set: the recorded reference outputs are not on this machine")
    folder = Path(reference) / "parity"
    if not folder.is_dir():
        pytest.skip(f"DIFFTSR_REFERENCE={reference} has no folder 'parity'")
    return folder


@dataclass
class Fixture:
    """One fixture: tensors by the part of their name before the first dot, and the manifest."""

    name: str
    manifest: dict
    weights: dict[str, torch.Tensor] = field(default_factory=dict)  # `weight.<key>`, as float32 (stored as float16)
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)  # `in.<name>`
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)  # `out.<name>`
    aux: dict[str, torch.Tensor] = field(default_factory=dict)  # `aux.<name>`

    def weights_under(self, prefix: str) -> dict[str, torch.Tensor]:
        """The weights whose key begins with `prefix`, without it."""
        return {key.removeprefix(prefix): value for key, value in self.weights.items() if key.startswith(prefix)}


def load_fixture(name: str) -> Fixture:
    """Read fixture `name`, e.g. "vae_small"; skips the calling test where it is not on this machine."""
    folder = COMMITTED if (COMMITTED / f"{name}.json").exists() else parity_folder()
    fixture = Fixture(name, json.loads((folder / f"{name}.json").read_text(encoding="utf-8")))
    groups = {"weight": fixture.weights, "in": fixture.inputs, "out": fixture.outputs, "aux": fixture.aux}
    for full_name, tensor in load_file(folder / f"{name}.safetensors").items():
        kind, _, key = full_name.partition(".")
        groups[kind][key] = tensor.float() if kind == "weight" and tensor.is_floating_point() else tensor
    return fixture


def splitmix(key: str, count: int, salt: int = 0) -> np.ndarray:
    """`count` reproducible numbers in [-1, 1) that depend on `key` and `salt` only, float32."""
    base = (zlib.crc32(key.encode("utf-8")) + salt * 2**32) * 0xD1342543DE82EF95 % 2**64
    with np.errstate(over="ignore"):  # unsigned 64-bit arithmetic that wraps around
        z = np.uint64(base) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return ((z >> np.uint64(40)).astype(np.float64) * (2 / 16777216) - 1).astype(np.float32)


def recipe_tensor(key: str, shape: tuple[int, ...], salt: int = 0, gain: float = 1.0) -> torch.Tensor:
    """The weight that the recipe gives to the checkpoint key `key` (spelled without any outer prefix)."""
    last = key.rpartition(".")[2]
    if last == "num_batches_tracked":
        return torch.zeros(shape, dtype=torch.int64)
    count = int(np.prod(shape))
    s = splitmix(key, count, salt).reshape(shape)
    if len(shape) >= 2:
        s = s * np.float32(gain * np.sqrt(3 / (count / shape[0])))
    elif last in ("bias", "b_2", "running_mean"):
        s = np.float32(0.1) * s
    elif last == "running_var":
        s = np.float32(1) + np.float32(0.5) * s
    else:
        s = np.float32(1) + np.float32(0.2) * s
    return torch.from_numpy(np.ascontiguousarray(s))


def recipe_state_dict(
    shapes: dict[str, tuple[int, ...]] | dict[str, torch.Tensor], salt: int = 0, gain: float = 1.0
) -> dict[str, torch.Tensor]:
    """Recipe weights for every key of `shapes` (a state dict will do).

    `pe.pe` and the two `scaling_layer` buffers are not filled: where `shapes` holds tensors these are kept.
    """
    filled = {}
    for key, value in shapes.items():
        if key.endswith("pe.pe") or "scaling_layer." in key:
            if isinstance(value, torch.Tensor):
                filled[key] = value
            continue
        filled[key] = recipe_tensor(key, tuple(value.shape if isinstance(value, torch.Tensor) else value), salt, gain)
    return filled


def fill_with_recipe(module: torch.nn.Module, salt: int = 0, gain: float = 1.0) -> torch.nn.Module:
    """Load recipe weights into a module whose state-dict keys are the checkpoint's, and put it into eval mode."""
    module.load_state_dict(recipe_state_dict(module.state_dict(), salt, gain))
    return module.eval()


def max_difference(actual: torch.Tensor | np.ndarray, expected: torch.Tensor | np.ndarray) -> float:
    """Largest absolute difference of two tensors of the same shape."""
    a, b = (torch.as_tensor(x).detach().double() for x in (actual, expected))
    assert a.shape == b.shape, f"shapes differ: {tuple(a.shape)} and {tuple(b.shape)}"
    return (a - b).abs().max().item()


def assert_close(
    actual: torch.Tensor | np.ndarray,
    expected: torch.Tensor | np.ndarray,
    *,
    atol: float = 2e-5,
    rtol: float = 1e-4,
    name: str = "",
) -> None:
    """Compare with a recorded value; the defaults are for single blocks (whole networks: 1e-4 and 1e-3)."""
    torch.testing.assert_close(
        torch.as_tensor(actual).detach().double(),
        torch.as_tensor(expected).double(),
        atol=atol,
        rtol=rtol,
        msg=lambda message: f"{name}: {message}",
    )
