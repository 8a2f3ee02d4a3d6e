import dataclasses

import jax
import jax.numpy as jnp
import pytest

from variator_jax.backbones.t5 import cost, get_config, shape_params
from variator_jax.bench.latency import encoder_call, encoder_shapes
from variator_jax.errors import ConfigError, PluginError
from variator_jax.plugin import PluginConfig, init_plugin

BASE = get_config("t5_1_0_base")
TINY = get_config("nano", num_encoder_layers=3)

# GFLOP at k=1 and per cent saved at k = 2, 4, 8, 16, by the official code's form of the plugin.
PUBLISHED = {
    ("base", 128): (22.3, 30.4, 46.6, 54.6, 58.6),
    ("base", 256): (45.9, 29.6, 45.3, 53.2, 57.1),
    ("base", 512): (96.6, 28.1, 43.1, 50.5, 54.2),
    ("large", 128): (78.9, 31.1, 47.4, 55.5, 59.6),
    ("large", 512): (335.0, 29.3, 44.7, 52.3, 56.1),
    ("3b", 256): (644.2, 31.6, 47.6, 55.6, 59.6),
    ("11b", 512): (5360, 30.7, 46.1, 53.8, 57.6),
}


@pytest.mark.parametrize("size, length", PUBLISHED)
def test_the_papers_form_gives_the_published_table(size, length):
    config = get_config(f"t5_1_0_{size}")
    gigaflops, *saved = PUBLISHED[size, length]
    backbone = cost.paper_flops(config, length, 1)
    assert backbone / 1e9 == pytest.approx(gigaflops, rel=2.5e-3)
    for ratio, share in zip((2, 4, 8, 16), saved, strict=True):
        found = 100 * (1 - cost.paper_flops(config, length, ratio) / backbone)
        assert found == pytest.approx(share, abs=0.06), ratio


@pytest.mark.parametrize("ratio", [2, 4, 8, 16])
def test_the_short_side_product_saves_one_of_the_papers_three(ratio):
    """Repeating after W_r saves 2Db for all but one member of each group."""
    length, products = 256, 2 * BASE.embed_dim * 64
    found = cost.paper_flops(BASE, length, ratio) - cost.encoder_flops(BASE, length, ratio)
    assert found == BASE.num_encoder_layers * products * (length - length // ratio)


def test_ratio_one_is_the_backbone_and_costs_scale_with_the_batch():
    plain = cost.encoder_flops(BASE, 256, 1)
    assert plain == cost.paper_flops(BASE, 256, 1)
    assert cost.flops_saved(BASE, 256, 1) == 0
    assert cost.encoder_flops(BASE, 256, 4, batch=7) == 7 * cost.encoder_flops(BASE, 256, 4)
    assert cost.flops_allowed_speedup(BASE, 256, 4) == pytest.approx(
        1 / (1 - cost.flops_saved(BASE, 256, 4))
    )


def test_base_at_length_256_and_ratio_4_saves_at_least_43_per_cent():
    assert 0.43 < cost.flops_saved(BASE, 256, 4) < 0.50


def test_a_layer_subset_costs_its_share():
    whole, none = (cost.encoder_flops(TINY, 64, k) for k in (4, 1))
    two = cost.encoder_flops(TINY, 64, 4, PluginConfig(4, layers=(0, 2)))
    assert 3 * (none - two) == 2 * (none - whole)
    with pytest.raises(PluginError, match=r"layers \[3\]"):
        cost.encoder_flops(TINY, 64, 4, PluginConfig(4, layers=(3,)))


def test_ablations_are_cheaper_by_what_they_leave_out():
    embed, length, ratio, layers = TINY.embed_dim, 64, 4, TINY.num_encoder_layers
    full = cost.encoder_flops(TINY, length, ratio)
    mean = cost.encoder_flops(TINY, length, ratio, PluginConfig(ratio, compression="mean"))
    repeat = cost.encoder_flops(TINY, length, ratio, PluginConfig(ratio, decompression="repeat"))
    assert full - mean == layers * length * 2 * embed * ratio
    assert full - repeat == layers * (length * 4 * embed * 64 + length // ratio * 2 * embed * 64)


def test_a_length_that_does_not_divide_is_filled_up_on_the_plugins_side_only():
    step = cost.encoder_flops(TINY, 64, 4) - cost.encoder_flops(TINY, 61, 4)
    attention = cost.encoder_flops(TINY, 64, 1) - cost.encoder_flops(TINY, 61, 1)
    ffn = 3 * TINY.num_encoder_layers * 6 * TINY.embed_dim * TINY.mlp_dim
    assert step == attention - ffn


@pytest.mark.parametrize("name", ["t5_1_0_base", "t5_1_1_large", "mt5_small", "byt5_base", "nano"])
def test_backbone_parameters_are_those_of_the_module(name):
    config = get_config(name)
    assert cost.backbone_parameters(config) == _size(shape_params(config))


def test_backbone_parameters_of_an_encoder_alone():
    config = dataclasses.replace(TINY, num_decoder_layers=0)
    assert cost.backbone_parameters(config) == _size(shape_params(config))
    assert cost.backbone_parameters(config) == _size(encoder_shapes(TINY))


@pytest.mark.parametrize(
    "size, backbone, shares",
    [
        ("base", 222.9, {2: 0.81, 4: 0.864, 8: 1.06, 16: 1.86}),
        ("large", 737.7, {2: 0.66, 4: 0.697, 8: 0.86, 16: 1.50}),
        ("3b", 2851.6, {2: 0.17, 4: 0.180, 8: 0.22, 16: 0.39}),
        ("11b", 11307, {2: 0.04, 4: 0.045, 8: 0.06, 16: 0.10}),
    ],
)
def test_published_parameter_counts(size, backbone, shares):
    config = get_config(f"t5_1_0_{size}")
    assert cost.backbone_parameters(config) / 1e6 == pytest.approx(backbone, rel=2e-4)
    for ratio, share in shares.items():
        extra = cost.plugin_parameters(config, PluginConfig(ratio))
        assert 100 * extra / cost.backbone_parameters(config) == pytest.approx(share, abs=0.0051)


def test_plugin_parameters_at_ratio_four():
    assert cost.plugin_parameters(BASE, PluginConfig(4)) == 12 * (209 * 768 + 68) == 1_926_960
    large = cost.plugin_parameters(get_config("t5_1_0_large"), PluginConfig(4))
    assert large / 1e6 == pytest.approx(5.138, abs=5e-4)


@pytest.mark.parametrize(
    "plugin",
    [
        PluginConfig(1),
        PluginConfig(4),
        PluginConfig(8, bottleneck=16, layers=(0, 2)),
        PluginConfig(4, compression="mean"),
        PluginConfig(4, decompression="repeat"),
        PluginConfig(4, compression="mean", decompression="repeat"),
    ],
    ids=str,
)
def test_plugin_parameters_are_those_of_the_module(plugin):
    shapes = jax.eval_shape(
        lambda rng: init_plugin(plugin, TINY.num_encoder_layers, TINY.embed_dim, rng).params,
        jax.random.key(0),
    )
    assert cost.plugin_parameters(TINY, plugin) == _size(shapes)


# XLA's own count also holds the elementwise work, so widths are such that it is a small share.
@pytest.mark.parametrize(
    "name, plugin, length",
    [
        ("t5_1_0_base", PluginConfig(1), 256),
        ("t5_1_0_base", PluginConfig(2), 256),
        ("t5_1_0_base", PluginConfig(4), 256),
        ("t5_1_0_base", PluginConfig(8), 256),
        ("t5_1_1_base", PluginConfig(1), 128),
        ("t5_1_1_base", PluginConfig(4, layers=(1,)), 128),
        ("t5_1_0_base", PluginConfig(4, compression="mean", decompression="repeat"), 128),
        ("t5_1_0_base", PluginConfig(8), 100),
    ],
)
def test_flops_agree_with_xlas_cost_analysis(name, plugin, length):
    config = get_config(name, num_encoder_layers=2)
    counted = _xla_flops(config, plugin, batch=2, length=length)
    ours = cost.encoder_flops(config, length, plugin.ratio, plugin, batch=2)
    assert ours == pytest.approx(counted, rel=0.03)


def test_sizes_that_cannot_be_are_told():
    with pytest.raises(ConfigError, match="positive length"):
        cost.encoder_flops(BASE, 0, 4)
    with pytest.raises(ConfigError, match="positive ratio"):
        cost.encoder_flops(BASE, 8, 0)
    with pytest.raises(ConfigError, match="ratio 2, but the cost of 4"):
        cost.encoder_flops(BASE, 8, 4, PluginConfig(2))
    with pytest.raises(ConfigError, match="divides by 4"):
        cost.paper_flops(BASE, 10, 4)


def _xla_flops(config, plugin, batch, length):
    """FLOPs of the compiled encoder by XLA's own cost analysis, without allocating a weight."""
    variables = jax.eval_shape(
        lambda rng: init_plugin(plugin, config.num_encoder_layers, config.embed_dim, rng),
        jax.random.key(0),
    )
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    lowered = encoder_call(config, plugin).lower(encoder_shapes(config), variables, tokens)
    analysis = lowered.compile().cost_analysis()
    return analysis["flops"]


def _size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
