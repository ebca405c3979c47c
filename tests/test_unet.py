"""The U-Net: parity with the recorded reference, shapes, conditions, and what a silent error would break."""

import os

import pytest
import torch

from difftsr.unet import (
    DistanceBias,
    SpatialTransformer,
    UNet,
    UNetConfig,
    WinogradConv2d,
    column_centers,
    position_code,
    timestep_embedding,
    use_winograd,
    winograd_matrices,
)
from parity_common import assert_close, fill_with_recipe, load_fixture, parity_folder

PUBLISHED = UNetConfig(
    6, 3, 320, (1, 2, 3, 4), attention_resolutions=(2, 4, 8), num_heads=8, context_dim=160,
    groups=32, position_codes=False,
)  # fmt: skip
NO_EFFECT = ("image_size", "use_spatial_transformer", "legacy")  # published names that do not change the function


def published_config(manifest: dict) -> UNetConfig:
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in manifest["config"].items() if k not in NO_EFFECT}
    return UNetConfig(**values, groups=32, position_codes=False)


def small(**changes) -> UNet:
    """A small network with random weights everywhere, also where training starts from zero."""
    torch.manual_seed(5)
    settings = dict(in_channels=5, out_channels=3, model_channels=16, channel_mult=(1, 2), num_res_blocks=1,
                    attention_resolutions=(1, 2), num_heads=2, context_dim=12, groups=4)  # fmt: skip
    net = UNet(UNetConfig(**{**settings, **changes}))
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return net.eval()


def inputs(batch: int = 2, height: int = 4, width: int = 10, tokens: int = 7):
    g = torch.Generator().manual_seed(6)
    return (
        torch.randn(batch, 5, height, width, generator=g),
        torch.randint(0, 1000, (batch,), generator=g),
        torch.randn(batch, tokens, 12, generator=g),
    )


# --- parity ---


@pytest.mark.parametrize("name", ["idm_unet_small", "idm_unet_4level_recipe"])
def test_network_equals_reference(name):
    fixture = load_fixture(name)
    net = UNet(published_config(fixture.manifest)).eval()
    if fixture.weights:
        net.load_state_dict(fixture.weights)
    else:
        fill_with_recipe(net, fixture.manifest["recipe_salt"], fixture.manifest["recipe_gain"])
    x, t, context = (fixture.inputs[k] for k in ("x", "timesteps", "context"))
    with torch.no_grad():
        assert_close(net(x, t, context), fixture.outputs["eps"], atol=2e-5, rtol=1e-4, name=name)
    embedding = timestep_embedding(t, fixture.manifest["config"]["model_channels"])
    if "timestep_embedding" in fixture.aux:
        assert_close(embedding, fixture.aux["timestep_embedding"], atol=1e-6)


def test_published_size():
    with torch.device("meta"):
        net = UNet(PUBLISHED)
    assert sum(p.numel() for p in net.parameters()) == 874_024_003
    assert {i for i, block in enumerate(net.input_blocks) if len(block) == 2} == {4, 5, 7, 8, 10, 11}
    doubling = {i for i, block in enumerate(net.output_blocks) if getattr(block[-1], "resample", None) == "up"}
    assert doubling == {2, 5, 8}


def test_published_keys():
    rows = [row.split("\t") for row in (parity_folder() / "keys" / "IDM_Unet.tsv").read_text().splitlines()]
    with torch.device("meta"):
        state = UNet(PUBLISHED).state_dict()
    assert {k: "x".join(map(str, v.shape)) for k, v in state.items()} == {row[0]: row[1] for row in rows}


@pytest.mark.skipif(not os.environ.get("DIFFTSR_SLOW"), reason="3.5 GB and minutes: set DIFFTSR_SLOW=1 to run")
def test_published_size_equals_reference():
    fixture = load_fixture("paper_IDM_Unet_recipe")
    net = fill_with_recipe(UNet(PUBLISHED), fixture.manifest["recipe_salt"], fixture.manifest["recipe_gain"])
    with torch.no_grad():
        out = net(fixture.inputs["x"], fixture.inputs["timesteps"], fixture.inputs["context"])
    assert_close(out, fixture.outputs["eps"], atol=1e-3, rtol=1e-3)


# --- time ---


def test_time_code_has_cosines_first_and_the_published_frequencies():
    code = timestep_embedding(torch.tensor([0, 3]), 6)
    assert code.shape == (2, 6)
    assert code[0].tolist() == [1, 1, 1, 0, 0, 0]
    frequencies = torch.tensor([1.0, 10000 ** (-1 / 3), 10000 ** (-2 / 3)])
    torch.testing.assert_close(code[1], torch.cat([(3 * frequencies).cos(), (3 * frequencies).sin()]))
    assert timestep_embedding(torch.tensor([7]), 5)[0, -1] == 0  # odd sizes end with a zero


def test_time_changes_the_output():
    net, (x, t, context) = small(), inputs()
    assert (net(x, t, context) - net(x, t + 100, context)).abs().max() > 1e-3


# --- shapes and errors ---


@pytest.mark.parametrize(
    "changes", [{}, {"resblock_updown": False}, {"transformer_depth": 2}, {"channel_mult": (1, 2, 3)}]
)
@pytest.mark.parametrize("batch, height, width, tokens", [(1, 4, 12, 5), (3, 8, 20, 24)])
def test_shapes(changes, batch, height, width, tokens):
    out, bottleneck = small(**changes)(*inputs(batch, height, width, tokens), return_bottleneck=True)
    levels = len(changes.get("channel_mult", (1, 2)))
    assert out.shape == (batch, 3, height, width)
    assert bottleneck.shape == (batch, 16 * levels, height // 2 ** (levels - 1), width // 2 ** (levels - 1))


def test_convolutional_resizing_has_its_published_keys():
    keys = small(resblock_updown=False).state_dict().keys()
    assert "input_blocks.2.0.op.weight" in keys and "output_blocks.1.2.conv.weight" in keys


def test_attention_only_in_the_middle():
    net = small(attention_resolutions=(0,))
    assert [name for name, m in net.named_modules() if isinstance(m, SpatialTransformer)] == ["middle_block.1"]


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="divisible by 2"):
        small()(*inputs(width=9))
    with pytest.raises(ValueError, match="heads"):
        small(num_heads=3)


# --- learning ---


def test_starts_at_zero_and_every_parameter_learns():
    torch.manual_seed(0)
    fresh = UNet(UNetConfig(5, 3, 16, (1, 2), 1, (1, 2), 2, 12, groups=4))
    assert fresh(*inputs()).abs().max() == 0
    net, (x, t, context) = small(), inputs()
    centers = torch.linspace(0, 1, 7).repeat(2, 1)
    centers[:, 5:] = -1
    net(x, t, context, centers).square().mean().backward()
    silent = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()]
    assert silent == []


def test_checkpointing_and_memory_format_change_nothing():
    plain, (x, t, context) = small(), inputs()
    thrifty = UNet(UNetConfig(**{**vars(plain.config), "use_checkpoint": True}))
    thrifty.load_state_dict(plain.state_dict())
    for net in (plain, thrifty):
        net(x, t, context).square().mean().backward()
    for a, b in zip(plain.parameters(), thrifty.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    with torch.no_grad():
        last = plain.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last), t, context)
        torch.testing.assert_close(last, thrifty(x, t, context), atol=1e-5, rtol=1e-4)


# --- the text and its places ---


def test_text_and_places_change_the_output():
    net, (x, t, context) = small(), inputs()
    centers = torch.linspace(0.1, 0.9, 7).repeat(2, 1)
    with torch.no_grad():
        out = net(x, t, context, centers)
        assert (out - net(x, t, context.flip(1), centers)).abs().max() > 1e-3  # the same words, other places
        assert (out - net(x, t, context, centers * 0.5)).abs().max() > 1e-3
        together = net(x, t, context.flip(1), centers.flip(1))
        torch.testing.assert_close(together, out, atol=1e-5, rtol=1e-4)  # a set of (word, place), in any order


def test_no_centres_means_nowhere():
    net, (x, t, context) = small(), inputs()
    with torch.no_grad():
        torch.testing.assert_close(net(x, t, context), net(x, t, context, torch.full((2, 7), -1.0)))


def test_the_published_network_ignores_places():
    net, (x, t, context) = small(position_codes=False), inputs()
    assert not any("position" in key or "distance" in key or "column" in key for key in net.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(net(x, t, context), net(x, t, context, torch.rand(2, 7)))


@pytest.mark.parametrize("width", [64, 32])  # columns of a line of 512 pixels at f = 8, and one level below
def test_a_shift_by_one_column_shifts_what_attends(width):
    bias, columns = DistanceBias(3), column_centers(2, width)
    pixels = torch.tensor([[100.0, 204.0, 388.0]])
    here = bias(columns, pixels / 512)  # (1, heads, 2 * width, 3)
    there = bias(columns, (pixels + 512 / width) / 512)
    maps = [b.unflatten(2, (2, width)) for b in (here, there)]
    torch.testing.assert_close(maps[0][..., :-1, :], maps[1][..., 1:, :], atol=1e-4, rtol=1e-4)
    assert here[0, 0, :width].argmax(0).tolist() == (pixels[0] * width / 512).int().tolist()
    torch.testing.assert_close(maps[0][:, :, 0], maps[0][:, :, 1])  # every row of the map alike


def test_codes_of_columns_and_of_characters_agree():
    columns = column_centers(1, 64)
    nearest = (position_code(columns, 32) @ position_code(torch.tensor([0.25, 0.7]), 32).T).argmax(0)
    assert nearest.tolist() in ([15, 44], [16, 44])


def test_tokens_without_a_place_are_not_favoured_by_distance():
    bias = DistanceBias(2)(column_centers(1, 8), torch.tensor([[0.5, -1.0]]))
    assert bias[..., 1].abs().max() == 0 and bias[..., 0].max() <= 0


# --- fewer multiplications ---


@pytest.mark.parametrize("tile", [2, 4])
def test_the_matrices_of_winograd_filter_a_line(tile):
    back, taps_in, into = winograd_matrices(tile)
    g, d = torch.randn(3).double(), torch.randn(tile + 2).double()
    torch.testing.assert_close(back @ ((taps_in @ g) * (into @ d)), d.unfold(0, 3, 1) @ g, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(5, 7), (4, 16), (16, 64), (33, 50)])  # whole tiles or not, both sizes
@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_in_tiles_is_the_convolution(height, width, bias):
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(40, 24, 3, padding=1, bias=bias)
    x, exact = torch.randn(3, 40, height, width), conv.double()
    with torch.no_grad():
        expected = exact(x.double())
        error = (WinogradConv2d(conv.float())(x) - expected).abs().max()
        assert error < 3e-5 and error < 10 * (conv(x) - expected).abs().max()


def test_a_network_in_tiles_keeps_its_keys_its_gradients_and_its_result():
    net, (x, t, context) = small(), inputs()
    keys = list(net.state_dict())
    expected = net(x, t, context)
    use_winograd(net, channels=16)
    count = sum(isinstance(layer, WinogradConv2d) for layer in net.modules())
    assert count > 8 and list(net.state_dict()) == keys
    assert torch.equal(net(x, t, context), expected)  # with gradients: the ordinary convolution
    with torch.no_grad():
        torch.testing.assert_close(net(x, t, context), expected, atol=1e-4, rtol=1e-4)
    layer = next(layer for layer in net.modules() if isinstance(layer, WinogradConv2d))
    assert layer.kept
    net(x, t, context).sum().backward()
    assert not layer.kept and layer.weight.grad is not None  # after a step the kept weights would be the old ones


def test_only_convolutions_that_gain_are_exchanged():
    same = dict(kernel_size=3, padding=1)
    others = (dict(kernel_size=1), dict(kernel_size=3), {**same, "stride": 2}, {**same, "groups": 2},
              {**same, "padding_mode": "reflect"}, {**same, "dilation": 2})  # fmt: skip
    odd = [torch.nn.Conv2d(128, 128, **settings) for settings in others] + [torch.nn.Conv2d(128, 64, **same)]
    network = use_winograd(torch.nn.Sequential(*odd, torch.nn.Conv2d(128, 128, **same)))
    assert [isinstance(layer, WinogradConv2d) for layer in network] == [False] * len(odd) + [True]
