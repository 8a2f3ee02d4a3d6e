"""A backbone with a plugin in place: what it may depend on, and what it leaves alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from golden_vectors import config, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

from variator_jax.backbones.base import FfnStack, Mask
from variator_jax.backbones.t5 import T5, Transformer, init_params
from variator_jax.errors import PluginError
from variator_jax.plugin import (
    PluginConfig,
    PluginVariables,
    calibrate,
    init_plugin,
    intercept_modules,
    site_output_rms,
    splice,
)

SHAPE = config("1_1")
MODULE = Transformer(SHAPE)
STACK = T5(SHAPE).stack()
FFN = "encoder/layers_{}/mlp"
IS_FFN = {FFN.format(i) for i in range(3)}.__contains__
BACKBONE = init_params(SHAPE, jax.random.key(0))


def _plugin(plugin_config, seed=1):
    """A plugin far from its initialisation, so that each of its parts shows in the output."""
    fresh = init_plugin(plugin_config, STACK, jax.random.key(seed))
    leaves, tree = jax.tree.flatten(fresh.params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves) + 1)
    leaves = [0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys[1:], leaves, strict=True)]
    return PluginVariables(tree.unflatten(leaves), fresh.output_scales)


@jax.jit
def _base(tokens):
    return MODULE.apply({"params": BACKBONE}, tokens, method="encode")


def _encode(tokens, plugin_config, plugin, segments=None, module=MODULE, params=BACKBONE):
    tokens = jnp.asarray(tokens)

    @jax.jit
    def encode(params, plugin, tokens, segments):
        with splice(plugin_config, plugin, tokens > 0, segments):
            return module.apply({"params": params}, tokens, segments, method="encode")

    return np.asarray(encode(params, plugin, tokens, segments))


def _tokens(rng, rows, length):
    return rng.integers(2, 128, (rows, length)).astype(np.int32)


def test_ratio_1_is_bit_identical_and_others_are_not():
    tokens = _tokens(np.random.default_rng(0), 2, 12)
    base = np.asarray(_base(tokens))
    np.testing.assert_array_equal(_encode(tokens, PluginConfig(1), None), base)
    for ratio in (2, 3, 4):
        plugin_config = PluginConfig(ratio)
        assert np.abs(_encode(tokens, plugin_config, _plugin(plugin_config)) - base).max() > 0.1


def test_nothing_stays_behind_after_a_splice():
    tokens = _tokens(np.random.default_rng(0), 1, 8)
    before = MODULE.apply({"params": BACKBONE}, tokens, method="encode")
    plugin_config = PluginConfig(2)
    with splice(plugin_config, _plugin(plugin_config), jnp.asarray(tokens) > 0):
        inside = MODULE.apply({"params": BACKBONE}, tokens, method="encode")
    after = MODULE.apply({"params": BACKBONE}, tokens, method="encode")
    np.testing.assert_array_equal(before, after)
    assert np.abs(np.asarray(inside - before)).max() > 0.1


@settings(max_examples=12)
@given(
    ratio=st.sampled_from([1, 2, 3, 4, 8, 16]),
    length=st.integers(1, 21),
    padding=st.sampled_from([1, 17, 64]),
    seed=st.integers(0, 99),
)
def test_padding_and_neighbours_change_nothing(ratio, length, padding, seed):
    rng = np.random.default_rng(seed)
    plugin_config = PluginConfig(ratio)
    plugin = _plugin(plugin_config) if ratio > 1 else None
    text = _tokens(rng, 1, length)
    alone = _encode(text, plugin_config, plugin)[0]
    padded = np.pad(text, ((0, 0), (0, padding)))
    np.testing.assert_allclose(_encode(padded, plugin_config, plugin)[0, :length], alone, atol=1e-5)
    crowd = np.concatenate([_tokens(rng, 2, length + padding), padded])
    np.testing.assert_allclose(_encode(crowd, plugin_config, plugin)[2, :length], alone, atol=1e-5)


@pytest.mark.parametrize("ratio", [1, 2, 4, 8, 16])
def test_the_same_text_gives_the_same_logits_however_it_is_batched(ratio):
    rng = np.random.default_rng(ratio)
    plugin_config = PluginConfig(ratio)
    plugin = _plugin(plugin_config) if ratio > 1 else None
    targets = jnp.asarray([[0, 7, 9]], jnp.int32)

    @jax.jit
    def logits(tokens):
        with splice(plugin_config, plugin, tokens > 0):
            return MODULE.apply({"params": BACKBONE}, tokens, jnp.repeat(targets, len(tokens), 0))

    text = _tokens(rng, 1, 13)
    alone = logits(jnp.asarray(text))[0]
    for padding in (1, 17, 64):
        padded = np.pad(text, ((0, 0), (0, padding)))
        np.testing.assert_allclose(logits(jnp.asarray(padded))[0], alone, atol=1e-5)
        crowd = np.concatenate([_tokens(rng, 1, 13 + padding), padded, padded])
        np.testing.assert_allclose(logits(jnp.asarray(crowd))[1], alone, atol=1e-5)


@settings(max_examples=10)
@given(
    ratio=st.sampled_from([2, 3, 4, 8]),
    lengths=st.lists(st.integers(1, 9), min_size=2, max_size=3),
    changed=st.integers(0, 2),
    seed=st.integers(0, 99),
)
def test_nothing_crosses_from_one_packed_example_into_another(ratio, lengths, changed, seed):
    rng = np.random.default_rng(seed)
    changed %= len(lengths)
    segments = np.repeat(np.arange(1, len(lengths) + 1), lengths)[None]
    tokens = _tokens(rng, 1, segments.shape[1])
    others = np.where(segments == changed + 1, _tokens(rng, *tokens.shape), tokens)
    plugin_config = PluginConfig(ratio)
    plugin = _plugin(plugin_config)
    before = _encode(tokens, plugin_config, plugin, jnp.asarray(segments))
    after = _encode(others, plugin_config, plugin, jnp.asarray(segments))
    kept = (segments != changed + 1)[0]
    np.testing.assert_allclose(after[0, kept], before[0, kept], atol=1e-5)


@pytest.mark.parametrize("ratio", [2, 4])
def test_examples_packed_on_group_boundaries_equal_examples_alone(ratio):
    rng = np.random.default_rng(0)
    plugin_config = PluginConfig(ratio)
    plugin = _plugin(plugin_config)
    first, second = _tokens(rng, 1, 7), _tokens(rng, 1, 6)
    gap = np.zeros((1, -first.shape[1] % ratio), np.int32)
    packed = np.concatenate([first, gap, second], axis=1)
    segments = np.where(np.arange(packed.shape[1]) < 7 + gap.shape[1], 1, 2)[None]
    found = _encode(packed, plugin_config, plugin, jnp.asarray(segments))
    for start, text in [(0, first), (7 + gap.shape[1], second)]:
        alone = _encode(text, plugin_config, plugin)
        # Positions are relative, so only where an example starts within its group could matter.
        np.testing.assert_allclose(found[:, start : start + text.shape[1]], alone, atol=1e-5)


def test_pooling_padding_is_what_the_option_turns_on():
    text = _tokens(np.random.default_rng(0), 1, 5)
    padded = np.pad(text, ((0, 0), (0, 3)))
    plugin = _plugin(PluginConfig(4))
    masked = _encode(padded, PluginConfig(4), plugin)[0, :5]
    pooled = _encode(padded, PluginConfig(4, pool_padding=True), plugin)[0, :5]
    assert np.abs(masked - pooled).max() > 1e-3


def test_only_the_chosen_layers_are_compressed():
    tokens = _tokens(np.random.default_rng(0), 1, 8)
    plugin_config = PluginConfig(2, layers=(1,))
    plugin = _plugin(plugin_config)
    assert set(plugin.params) == {"encoder/layers_1/mlp"}
    seen = {}

    def record(path, call, args, kwargs):
        seen[path] = args[0].shape[1]
        return call(*args, **kwargs)

    # What is entered last stands nearest to the FFN and sees what reaches it.
    with splice(plugin_config, plugin, jnp.asarray(tokens) > 0):
        with intercept_modules(IS_FFN, record):
            MODULE.apply({"params": BACKBONE}, tokens, method="encode")
    assert seen == {FFN.format(i): length for i, length in enumerate((8, 4, 8))}


@pytest.mark.parametrize("decompression", ["bottleneck", "repeat"])
@pytest.mark.parametrize("compression", ["learned", "mean"])
def test_ablations_have_only_the_parameters_they_use(compression, decompression):
    plugin_config = PluginConfig(4, compression=compression, decompression=decompression)
    plugin = init_plugin(plugin_config, STACK, jax.random.key(0))
    parts = set(plugin.params["encoder/layers_0/mlp"])
    assert parts == {
        name
        for name, used in [
            ("compression", compression == "learned"),
            ("decompression", decompression == "bottleneck"),
        ]
        if used
    }
    tokens = _tokens(np.random.default_rng(0), 1, 8)
    assert np.isfinite(_encode(tokens, plugin_config, plugin)).all()


def test_averaging_and_repeating_is_the_mean_of_a_group():
    plugin_config = PluginConfig(4, compression="mean", decompression="repeat", layers=(2,))
    plugin = init_plugin(plugin_config, STACK, jax.random.key(0))
    seen = []

    def record(path, call, args, kwargs):
        y = call(*args, **kwargs)
        seen.append((np.asarray(args[0]), np.asarray(y)))
        return y

    tokens = _tokens(np.random.default_rng(0), 1, 6)
    # Entered first, it stands outside and sees the site at full length.
    with intercept_modules(IS_FFN, record):
        with splice(plugin_config, plugin, jnp.asarray(tokens) > 0):
            MODULE.apply({"params": BACKBONE}, tokens, method="encode")
    _, outer_y = seen[2]
    assert outer_y.shape[1] == 6
    np.testing.assert_array_equal(outer_y[0, 0], outer_y[0, 3])
    np.testing.assert_array_equal(outer_y[0, 4], outer_y[0, 5])


def test_parameter_count_is_the_papers():
    for ratio, bottleneck in [(2, 64), (4, 64), (8, 16)]:
        plugin = init_plugin(PluginConfig(ratio, bottleneck), STACK, jax.random.key(0))
        per_layer = 32 * (ratio**2 + 3 * bottleneck + 1) + ratio + bottleneck
        assert sum(x.size for x in jax.tree.leaves(plugin.params)) == 3 * per_layer


def test_rematerialised_layers_have_the_same_gradients():
    plugin_config = PluginConfig(2)
    plugin = _plugin(plugin_config)
    tokens = jnp.asarray(_tokens(np.random.default_rng(0), 2, 8))

    def gradients(remat):
        module = Transformer(dataclasses.replace(SHAPE, remat=remat))

        @jax.jit
        @jax.grad
        def grad(params):
            with splice(plugin_config, plugin.replace(params=params), tokens > 0):
                out = module.apply({"params": BACKBONE}, tokens, method="encode")
            return jnp.sum(jnp.sin(out))

        return grad(plugin.params)

    for plain, remat in zip(
        jax.tree.leaves(gradients(False)), jax.tree.leaves(gradients(True)), strict=True
    ):
        assert np.abs(plain).max() > 0
        # Against the largest entry: single small ones are differences of large numbers.
        assert relative_error(remat, plain) < 1e-5


def test_all_padding_gives_finite_outputs_and_gradients():
    plugin_config = PluginConfig(4)
    plugin = _plugin(plugin_config)
    tokens = jnp.asarray([[5, 6, 0, 0, 0, 0, 0, 0], [0] * 8], jnp.int32)

    def total(params):
        with splice(plugin_config, plugin.replace(params=params), tokens > 0):
            return jnp.sum(MODULE.apply({"params": BACKBONE}, tokens, method="encode"))

    value, grads = jax.value_and_grad(total)(plugin.params)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_a_pattern_that_matches_nothing_names_what_ran():
    plugin_config = PluginConfig(2, sites=r"encoder/block_(\d+)/ffn")
    tokens = jnp.ones((1, 4), jnp.int32)
    with pytest.raises(PluginError, match="encoder/layers_0/mlp"):
        with splice(plugin_config, _plugin(plugin_config), tokens > 0):
            MODULE.apply({"params": BACKBONE}, tokens, method="encode")


def test_splicing_round_a_compiled_function_is_refused():
    encode = jax.jit(lambda tokens: MODULE.apply({"params": BACKBONE}, tokens, method="encode"))
    tokens = jnp.ones((1, 4), jnp.int32)
    encode(tokens)
    with pytest.raises(PluginError, match="inside the function that is jitted"):
        with splice(PluginConfig(2), _plugin(PluginConfig(2)), tokens > 0):
            encode(tokens)


@pytest.mark.parametrize(
    "bad", [dict(layers=2), dict(layers=("0",)), dict(bottleneck=6.5), dict(sites="(")]
)
def test_unusable_settings_are_refused_at_once(bad):
    with pytest.raises(PluginError):
        PluginConfig(2, **bad)


def test_another_linen_network_is_spliced_by_its_own_paths():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x + nn.Dense(32, name="ffn")(x)

    class Net(nn.Module):
        def setup(self):
            self.block_0, self.block_1 = Block(), Block()

        def __call__(self, x):
            return self.block_1(self.block_0(x))

    x = jax.random.normal(jax.random.key(0), (1, 8, 32))
    params = Net().init(jax.random.key(1), x)
    plugin_config = PluginConfig(2, sites=r"block_(\d+)/ffn")
    plugin = init_plugin(plugin_config, FfnStack(2, 32), jax.random.key(2))
    with splice(plugin_config, plugin, jnp.ones((1, 8), bool)):
        compressed = Net().apply(params, x)
    assert np.abs(np.asarray(compressed - Net().apply(params, x))).max() > 1e-3


def test_missing_layers_are_refused():
    tokens = jnp.ones((1, 4), jnp.int32)
    plugin = _plugin(PluginConfig(2, layers=(0, 1)))
    with pytest.raises(PluginError, match="layer 2"):
        with splice(PluginConfig(2), plugin, tokens > 0):
            MODULE.apply({"params": BACKBONE}, tokens, method="encode")
    with pytest.raises(PluginError, match=r"\[7\]"):
        init_plugin(PluginConfig(2, layers=(7,)), STACK, jax.random.key(0))


@pytest.mark.parametrize("ratio", [0, -2, 2.0, True])
def test_ratios_are_positive_integers(ratio):
    with pytest.raises(PluginError, match="positive integer"):
        PluginConfig(ratio)


def test_calibration_measures_the_ffn_output_on_tokens_only():
    tokens = jnp.asarray([[5, 6, 7, 8], [9, 10, 0, 0]], jnp.int32)
    outputs = {}

    def record(path, call, args, kwargs):
        outputs[path] = np.asarray(call(*args, **kwargs))
        return outputs[path]

    def run():
        return MODULE.apply({"params": BACKBONE}, tokens, method="encode")

    with intercept_modules(IS_FFN, record):
        run()
    rms = site_output_rms(run, PluginConfig(2), STACK, Mask(tokens > 0))
    valid = np.asarray(tokens > 0)
    for path, y in outputs.items():
        np.testing.assert_allclose(
            rms[path], np.sqrt((y[valid] ** 2).mean()), rtol=1e-5
        )
    scaled = calibrate(_plugin(PluginConfig(2)), rms)
    assert scaled.output_scales[FFN.format(1)] == rms[FFN.format(1)]
