"""FLOPs and parameters of plugins on T5, against the paper's table and against XLA's own count."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from variator_jax.backbones.t5 import T5, get_config, shape_params
from variator_jax.backbones.t5.cost import attention_flops, backbone_parameters, ffn_flops
from variator_jax.bench.latency import encoder_call, encoder_shapes
from variator_jax.errors import ConfigError, PluginError
from variator_jax.plugin import Ffn, KeyValue, PluginConfig, Span, init_plugin, stack_flops
from variator_jax.plugin.arrays import flops_allowed_speedup, flops_saved, plugin_parameters

BASE = get_config("t5_1_0_base")
TINY = get_config("nano", num_encoder_layers=3)
STACK, TINY_STACK = T5(BASE).stack(), T5(TINY).stack()

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


def _official(config, length, ratio, bottleneck=64):
    """The official code's form: W_r and W_x multiply the repeated output on the long side."""
    layer = attention_flops(config, length, length) + ffn_flops(config, length // ratio)
    if ratio > 1:
        layer += length * (2 * config.embed_dim * (ratio + 1) + 6 * config.embed_dim * bottleneck)
    return config.num_encoder_layers * layer


@pytest.mark.parametrize("size, length", PUBLISHED)
def test_the_official_form_gives_the_published_table(size, length):
    config = get_config(f"t5_1_0_{size}")
    gigaflops, *saved = PUBLISHED[size, length]
    backbone = stack_flops(T5(config).stack(), length)
    assert backbone / 1e9 == pytest.approx(gigaflops, rel=2.5e-3)
    for ratio, share in zip((2, 4, 8, 16), saved, strict=True):
        found = 100 * (1 - _official(config, length, ratio) / backbone)
        assert found == pytest.approx(share, abs=0.06), ratio
        # Ours repeats after W_r, which saves 2Db for all but one member of each group.
        ours = stack_flops(T5(config).stack(), length, PluginConfig(ratio))
        products = config.num_encoder_layers * 2 * config.embed_dim * 64
        assert _official(config, length, ratio) - ours == products * (length - length // ratio)


def test_ratio_1_costs_what_the_backbone_costs():
    plain, four = stack_flops(STACK, 256), PluginConfig(4)
    assert plain == stack_flops(STACK, 256, PluginConfig(1)) and flops_saved(STACK, 256, None) == 0
    saved = flops_saved(STACK, 256, four)
    assert 0.43 < saved < 0.50
    assert flops_allowed_speedup(STACK, 256, four) == pytest.approx(1 / (1 - saved))


def test_layers_and_sites_add_up():
    none, all_three = stack_flops(TINY_STACK, 64), stack_flops(TINY_STACK, 64, PluginConfig(4))
    two = stack_flops(TINY_STACK, 64, PluginConfig(4, layers=(0, 2)))
    assert 3 * (none - two) == 2 * (none - all_three)
    sites = PluginConfig(sites=(Ffn(4, layers=(0,)), Ffn(4, layers=(2,))))
    assert stack_flops(TINY_STACK, 64, sites) == two
    with pytest.raises(PluginError, match=r"layers \[3\]; the backbone has layers 0 to 2"):
        stack_flops(TINY_STACK, 64, PluginConfig(4, layers=(3,)))


def test_a_length_that_does_not_divide_is_padded_on_the_plugins_side_only():
    plugin = PluginConfig(4)
    step = stack_flops(TINY_STACK, 64, plugin) - stack_flops(TINY_STACK, 61, plugin)
    attention = stack_flops(TINY_STACK, 64) - stack_flops(TINY_STACK, 61)
    assert step == attention - 3 * TINY.num_encoder_layers * 6 * TINY.embed_dim * TINY.mlp_dim


@pytest.mark.parametrize("size, shares", [
    ("base", {2: 0.81, 4: 0.864, 8: 1.06, 16: 1.86}),
    ("large", {2: 0.66, 4: 0.697, 8: 0.86, 16: 1.50}),
    ("3b", {2: 0.17, 4: 0.180, 8: 0.22, 16: 0.39}),
    ("11b", {2: 0.04, 4: 0.045, 8: 0.06, 16: 0.10}),
])  # fmt: skip
def test_published_parameter_shares(size, shares):
    config = get_config(f"t5_1_0_{size}")
    for ratio, share in shares.items():
        extra = plugin_parameters(PluginConfig(ratio), T5(config).stack())
        assert 100 * extra / backbone_parameters(config) == pytest.approx(share, abs=0.0051)


@pytest.mark.parametrize("plugin, per_layer", [
    (PluginConfig(1), 0),
    (PluginConfig(4), 209 * 128 + 68),
    (PluginConfig(8, bottleneck=16, layers=(0, 1, 2)), 128 * (64 + 3 * 16 + 1) + 24),
    (PluginConfig(4, compression="mean"), 193 * 128 + 64),
    (PluginConfig(4, decompression="repeat"), 16 * 128 + 4),
    (PluginConfig(4, compression="mean", decompression="repeat"), 0),
], ids=str)  # fmt: skip
def test_plugin_parameters_are_counted_and_made(plugin, per_layer):
    assert plugin_parameters(plugin, TINY_STACK) == 3 * per_layer
    fresh = jax.eval_shape(lambda: init_plugin(plugin, TINY_STACK, jax.random.key(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(fresh.params)) == 3 * per_layer


# XLA's own count also holds the elementwise work, so widths are such that it is a small share.
@pytest.mark.parametrize("name, plugin, length", [
    ("t5_1_1_base", PluginConfig(4, layers=(1,)), 128),
    ("t5_1_0_base", PluginConfig(4, compression="mean", decompression="repeat"), 128),
    ("t5_1_0_base", PluginConfig(8), 100),
    ("t5_1_1_base", PluginConfig(sites=(Span(4, rank=16),)), 128),
    ("t5_1_0_base", PluginConfig(sites=(KeyValue(4, rank=8), Ffn(4, rank=8))), 130),
])  # fmt: skip
def test_flops_agree_with_xlas_cost_analysis(name, plugin, length):
    config = get_config(name, num_encoder_layers=2)
    stack = T5(config).stack()
    variables = jax.eval_shape(lambda: init_plugin(plugin, stack, jax.random.key(0)))
    tokens = jax.ShapeDtypeStruct((2, length), jnp.int32)
    lowered = encoder_call(config, plugin).lower(encoder_shapes(config), variables, tokens)
    counted = lowered.compile().cost_analysis()["flops"]
    assert 2 * stack_flops(stack, length, plugin) == pytest.approx(counted, rel=0.03)


def test_lengths_below_1_are_refused():
    with pytest.raises(ConfigError, match="is 0; expected a whole number of at least 1"):
        stack_flops(STACK, 0)


@pytest.mark.parametrize("name", ["t5_1_0_base", "t5_1_1_large", "mt5_small", "byt5_base", "nano"])
def test_backbone_parameters_are_those_of_the_network(name):
    whole = get_config(name)
    for config in (whole, dataclasses.replace(whole, num_decoder_layers=0)):
        shapes = shape_params(config)
        assert backbone_parameters(config) == sum(leaf.size for leaf in jax.tree.leaves(shapes))
