"""Every recorded building block, one by one: here a wrong epsilon or a wrong mask cannot hide in a whole network."""

import pytest
from torch import Tensor, nn

from difftsr import recognizer, tdm, vae
from difftsr.idm import TextAttention, TextEncoderConfig, TextTransformer
from difftsr.unet import CrossAttention, FeedForward, ResBlock, SpatialTransformer
from parity_common import Fixture, assert_close, load_fixture


@pytest.fixture(scope="module")
def blocks() -> Fixture:
    return load_fixture("blocks")


def text_layers(x: Tensor, module: TextTransformer) -> Tensor:
    """The layers of the text encoder without its embedding and its last norm."""
    for norm, part in module.attn_layers["layers"]:
        x = x + part(norm(x))
    return x


def published_attention() -> nn.Module:
    attention = recognizer.MultiHeadAttention(16, 4)
    attention.compress_attention_linear = nn.Linear(4, 1)
    return attention


TDM_SMALL = tdm.PublishedTDMConfig(dim=32, heads=4, local_heads=2, window=4, depth=1)
BLOCKS = {
    "unet_resblock": lambda: ResBlock(32, 24, 64),
    "unet_resblock_tiny_input": lambda: ResBlock(32, 24, 32),
    "unet_resblock_down": lambda: ResBlock(32, 24, 32, resample="down"),
    "unet_resblock_up": lambda: ResBlock(32, 24, 32, resample="up"),
    "spatial_transformer": lambda: SpatialTransformer(32, 4, context_dim=10),
    "spatial_transformer_tiny_input": lambda: SpatialTransformer(32, 4, context_dim=10),
    "cross_attention": lambda: CrossAttention(32, 10, 4, 12),
    "geglu_ff": lambda: FeedForward(32),
    "vae_resnet": lambda: vae.ResnetBlock(32, 64, 32),
    "vae_resnet_tiny_input": lambda: vae.ResnetBlock(32, 32, 32),
    "vae_attn": lambda: vae.AttnBlock(32, 32),
    "vae_down": lambda: vae.Downsample(32, 32),
    "vae_up": lambda: vae.Upsample(32, 32, lean=False),
    "lat_self_attention": lambda: tdm.LinearAttention(32, 4, 2, 4),
    "lat_context_attention": lambda: tdm.LinearAttention(32, 4),
    "lat_layer": lambda: tdm.PublishedLayer(TDM_SMALL),
    "xt_attention": lambda: TextAttention(32, 8, 64),
    "ocr_layernorm": lambda: recognizer.StdNorm(16),
    "ocr_layernorm_tiny_input": lambda: recognizer.StdNorm(16),
    "ocr_ff": lambda: recognizer.FeedForward(16, 32),
    "ocr_basicblock": lambda: recognizer.ResidualBlock(8, 12),
}
ARGUMENTS = ("x", "emb", "context")
SPECIAL = {"local_attention", "linear_attention", "sinusoidal_time", "xt_encoder", "ocr_posenc", "ocr_mha_causal",
           "ocr_mha_cross"}  # fmt: skip


def test_no_block_is_left_out(blocks):
    assert BLOCKS.keys() | SPECIAL == blocks.manifest["blocks"].keys()


def compare(blocks, name, epsilons):
    """The block with its recorded weights, beside its recorded output; `epsilons` of some norms are changed before."""
    module = BLOCKS[name]()
    module.load_state_dict(blocks.weights_under(f"{name}."))
    for norm, epsilon in epsilons.items():
        module.get_submodule(norm).eps = epsilon
    inputs = [blocks.inputs[f"{name}.{key}"] for key in ARGUMENTS if f"{name}.{key}" in blocks.inputs]
    assert_close(module.eval()(*inputs), blocks.outputs[f"{name}.y"], name=name)


@pytest.mark.parametrize("name", BLOCKS)
def test_block_equals_recorded(blocks, name):
    compare(blocks, name, {})


@pytest.mark.parametrize(
    ("name", "module", "wrong"),
    [
        ("unet_resblock_tiny_input", "in_layers.0", 1e-6),
        ("spatial_transformer_tiny_input", "norm", 1e-5),
        ("vae_resnet_tiny_input", "norm1", 1e-5),
    ],
)
def test_a_wrong_epsilon_is_noticed(blocks, name, module, wrong):
    with pytest.raises(AssertionError):
        compare(blocks, name, {module: wrong})


def test_local_and_linear_heads_equal_recorded(blocks):
    for name, local in (("local_attention", 2), ("linear_attention", 0)):
        q, k, v = (blocks.inputs[f"{name}.{part}"] for part in "qkv")
        assert_close(tdm.LinearAttention(16, 2, local, 4).mix(q, k, v), blocks.outputs[f"{name}.y"], name=name)


def test_times_of_the_text_diffusion_equal_recorded(blocks):
    t = blocks.inputs["sinusoidal_time.t"]
    for key, total in (("y", 1000), ("y_500", 500)):
        assert_close(tdm.sinusoid(t / total * 4000, 32), blocks.outputs[f"sinusoidal_time.{key}"], name=key)


def test_layers_of_the_text_encoder_equal_recorded(blocks):
    config = TextEncoderConfig(4, n_embed=32, n_layer=1, heads=8, dim_head=64, soft=False)
    transformer = TextTransformer(config).eval()
    transformer.attn_layers.load_state_dict(blocks.weights_under("xt_encoder."))
    assert_close(text_layers(blocks.inputs["xt_encoder.x"], transformer), blocks.outputs["xt_encoder.y"])


@pytest.mark.parametrize("name", ["ocr_mha_causal", "ocr_mha_cross"])
def test_attention_of_the_recogniser_equals_recorded(blocks, name):
    attention = published_attention().eval()
    attention.load_state_dict(blocks.weights_under(f"{name}."))
    x = blocks.inputs[f"{name}.x"]
    source = blocks.inputs.get(f"{name}.mem", x)
    y, weights = attention(x, attention.keys_values(source), causal=name.endswith("causal"))
    assert_close(y, blocks.outputs[f"{name}.y"], name=name)
    assert_close(weights, blocks.outputs[f"{name}.map"], name=f"{name} map")


def test_position_code_of_the_recogniser_equals_recorded(blocks):
    code = recognizer.PositionCode(16, 50)(0, 9)
    assert_close(code, blocks.outputs["ocr_posenc.y"])
