"""A backbone with a plugin in place: what it may depend on, and what it leaves alone."""

import dataclasses
import functools
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from golden_vectors import relative_error
from spliced import BACKBONE, NETWORK, STACK, encode, plugin_of, tokens_of
from tiny import TINY

from variator_jax.backbones.base import FfnStack, Mask
from variator_jax.backbones.t5 import T5
from variator_jax.errors import PluginError
from variator_jax.model import SplicedModel
from variator_jax.plugin import Ffn, KeyValue, PluginConfig, Span, calibrate, init_plugin
from variator_jax.plugin.splice import intercept_modules, site_output_rms, splice

FFN = "encoder/layers_{}/mlp"
IS_FFN = {FFN.format(i) for i in range(2)}.__contains__
TWO_SITES = PluginConfig(sites=(Ffn(4, layers=(0,)), Ffn(2, layers=(1,))))
SPAN = PluginConfig(sites=(Span(3, rank=2),))
SPANS = PluginConfig(sites=(Span(4, size=1),))
KEYS = PluginConfig(sites=(KeyValue(4, rank=2), Ffn(3, rank=2)))
MIXED = PluginConfig(sites=(Ffn(2, layers=(0,)), KeyValue(3, layers=(0,)), Span(4, layers=(1,))))
KINDS = {"span": SPAN, "spans": SPANS, "kv and ffn": KEYS, "mixed": MIXED}


def test_ratio_1_is_bit_identical_and_others_are_not():
    tokens = tokens_of(2, 12)
    base = np.asarray(jax.jit(functools.partial(NETWORK.encode, BACKBONE))(tokens))
    np.testing.assert_array_equal(encode(tokens, PluginConfig(1)), base)
    for ratio in (2, 3):
        assert np.abs(encode(tokens, PluginConfig(ratio)) - base).max() > 0.1


OPTIMISED = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})
import jax, numpy as np
from tiny import TINY, random_params, random_plugin
from variator_jax.backbones.t5 import T5
from variator_jax.plugin import PluginConfig, splice

network, params, tokens = T5(TINY), random_params(TINY), np.full((1, 8), 5)
run = lambda: np.asarray(jax.jit(lambda: network.encode(params, tokens))())
before, config = run(), PluginConfig(2)
with splice(config, random_plugin(config, TINY), tokens > 0):
    inside = run()
if not (before == run()).all() or (before == inside).all() or __debug__:
    sys.exit("the backbone changed, the splice did nothing, or assertions are on")
"""


def test_nothing_stays_behind_after_a_splice_without_assertions_too():
    """Flax takes an interceptor away inside an `assert`, which `python -O` leaves out."""
    folder = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-O", "-c", OPTIMISED], cwd=folder, check=True)


@pytest.mark.parametrize("kind", [3, 16, *KINDS])
def test_padding_and_neighbours_change_nothing(kind):
    config, text = KINDS.get(kind) or PluginConfig(kind), tokens_of(1, 13)
    exact = encode(text, config, decode=True)[0]
    for length in (13, 1, 2, 7, 21):
        text = tokens_of(1, 21)
        text[:, length:] = 0
        crowd = np.concatenate([tokens_of(2, 40, seed=length), np.pad(text, ((0, 0), (0, 19)))])
        found = encode(text, config)[0, :length]
        np.testing.assert_allclose(encode(crowd, config)[2, :length], found, atol=1e-5)
        if length == 13:  # the first 13 tokens of both texts are not the same ones
            text[:, :13] = tokens_of(1, 13)
            np.testing.assert_allclose(encode(text, config, decode=True)[0], exact, atol=1e-5)


@pytest.mark.parametrize("kind", [3, *KINDS])
def test_nothing_crosses_from_one_packed_example_into_another(kind):
    config, rng = KINDS.get(kind) or PluginConfig(kind), np.random.default_rng(3)
    for draw in range(8):
        lengths = rng.integers(1, 10, 3)
        segments = np.repeat([1, 2, 3, 0], [*lengths, 27 - lengths.sum()])[None]
        tokens = np.where(segments > 0, tokens_of(1, 27, draw), 0)
        changed = segments == 1 + draw % 3
        others = np.where(changed, tokens_of(1, 27, draw + 100), tokens)
        before, after = (encode(t, config, jnp.asarray(segments)) for t in (tokens, others))
        kept = (segments > 0) & ~changed
        np.testing.assert_allclose(after[kept], before[kept], atol=1e-5)
        assert np.abs(after[changed] - before[changed]).max() > 1e-3


@pytest.mark.parametrize("kind", [4, "spans"])
def test_examples_packed_on_group_boundaries_equal_examples_alone(kind):
    config, packed = KINDS.get(kind) or PluginConfig(kind), tokens_of(1, 14)
    packed[:, 7] = 0  # a gap up to the next group
    segments = jnp.asarray(np.repeat([1, 2], [8, 6])[None])
    found = encode(packed, config, segments)[0]
    # Positions are relative, so only where an example starts within its group could matter.
    alone = np.zeros((2, 8), np.int32)
    alone[0, :7], alone[1, :6] = packed[0, :7], packed[0, 8:]
    first, second = encode(alone, config)
    np.testing.assert_allclose(found[:7], first[:7], atol=1e-5)
    np.testing.assert_allclose(found[8:], second[:6], atol=1e-5)


def _recorded(config, plugin, tokens, inner):
    """Length of the FFNs' inputs and their outputs, seen from inside or outside of a splice."""
    seen = {}

    def record(path, call, args, kwargs):
        out = call(*args, **kwargs)
        seen[path] = (args[0].shape[1], out)
        return out

    around = [
        lambda: splice(config, plugin, jnp.asarray(tokens) > 0),
        lambda: intercept_modules(IS_FFN, record),
    ]
    first, second = around if inner else around[::-1]
    with first(), second():
        NETWORK.encode(BACKBONE, tokens)
    return seen


@pytest.mark.parametrize("config, lengths", [
    (PluginConfig(2, layers=(1,)), (8, 4)), (PluginConfig(4), (2, 2)), (TWO_SITES, (2, 4)),
])  # fmt: skip
def test_only_the_chosen_layers_are_compressed_each_by_its_own_ratio(config, lengths):
    seen = _recorded(config, plugin_of(config), tokens_of(1, 8), inner=True)
    assert tuple(seen[FFN.format(i)][0] for i in range(2)) == lengths


def test_averaging_and_repeating_is_the_mean_of_a_group():
    config = PluginConfig(4, compression="mean", decompression="repeat", layers=(1,))
    seen = _recorded(config, init_plugin(config, STACK, jax.random.key(0)), tokens_of(1, 6), False)
    length, out = seen[FFN.format(1)]
    assert length == out.shape[1] == 6
    np.testing.assert_array_equal(out[0, 0], out[0, 3])
    np.testing.assert_array_equal(out[0, 4], out[0, 5])


def test_the_gradient_at_each_span_is_stored():
    """On CPUs XLA would compute it again for each layer before it; the first needs none."""
    config = SPANS
    batch = {"encoder_input_tokens": jnp.asarray(tokens_of(1, 6))}

    def loss(params):
        plugin = plugin_of(config).replace(params=params)
        return jnp.sum(SplicedModel(NETWORK, config).encode(BACKBONE, plugin, batch))

    jaxpr = str(jax.make_jaxpr(jax.grad(loss))(plugin_of(config).params))
    assert jaxpr.count("optimization_barrier") == STACK.layers - 1


@pytest.mark.parametrize("config", [PluginConfig(4), *KINDS.values()], ids=[4, *KINDS])
def test_rematerialised_layers_have_the_same_gradients_which_padding_leaves_finite(config):
    tokens = jnp.asarray(np.pad(tokens_of(2, 6), ((0, 1), (0, 6))))  # the last row is all padding

    def gradients(remat):
        network = T5(dataclasses.replace(TINY, remat=remat))

        @jax.jit
        @jax.grad
        def grad(params):
            plugin = plugin_of(config).replace(params=params)
            batch = {"encoder_input_tokens": tokens}
            encoded = SplicedModel(network, config).encode(BACKBONE, plugin, batch)
            return jnp.sum(jnp.sin(encoded))

        return jax.tree.leaves(grad(plugin_of(config).params))

    for plain, *again in zip(*map(gradients, (False, True, "dots")), strict=True):
        assert np.isfinite(plain).all() and np.abs(plain).max() > 0
        # Against the largest entry: single small ones are differences of large numbers.
        assert max(relative_error(gradient, plain) for gradient in again) < 1e-5


def test_bfloat16_is_near_float32():
    tokens = jnp.asarray(tokens_of(2, 12))
    batch = {"encoder_input_tokens": tokens}
    model = SplicedModel(T5(dataclasses.replace(TINY, dtype="bfloat16")), MIXED)
    found = jax.jit(lambda plugin: model.encode(BACKBONE, plugin, batch))(plugin_of(MIXED))
    assert found.dtype == jnp.bfloat16
    assert relative_error(np.float32(found), encode(tokens, MIXED)) < 0.05


class Host(nn.Module):
    """A network of one's own, which calls its feed-forward modules in its own way."""

    style: str = "positional"

    def setup(self):
        self.block_0, self.block_1 = HostFfn(), HostFfn()

    def __call__(self, h):
        for ffn in (self.block_0, self.block_1):
            args, kwargs = {
                "positional": ((h,), {}),
                "keyword": ((), {"inputs": h}),
                "mixed": ((h,), {"deterministic": True}),
                "masked": ((), {"mask": h > 1e9, "inputs": h}),
            }[self.style]
            h = h + ffn(*args, **kwargs)
        return h


class HostFfn(nn.Module):
    @nn.compact
    def __call__(self, inputs, deterministic=True, mask=None):
        return nn.Dense(32)(nn.relu(inputs)) if deterministic else inputs


def test_a_network_of_ones_own_is_spliced_however_it_calls_its_ffn():
    x = jax.random.normal(jax.random.key(0), (1, 8, 32))
    params = Host().init(jax.random.key(1), x)
    config = PluginConfig(2, sites=r"block_(\d+)")
    plugin = init_plugin(config, FfnStack(2, 32), jax.random.key(2))
    found = {}
    for style in ("positional", "keyword", "mixed", "masked"):
        with splice(config, plugin, jnp.ones((1, 8), bool)):
            found[style] = np.asarray(Host(style).apply(params, x))
        np.testing.assert_array_equal(found[style], found["positional"])
    assert np.abs(found["positional"] - Host().apply(params, x)).max() > 1e-3


def _spliced(config, plugin, mask, tokens, stack=STACK):
    with splice(config, plugin, mask, stack=stack):
        return NETWORK.encode(BACKBONE, tokens)


PARTLY = PluginConfig(sites=(r"ffn 1 x2 pattern=encoder/block_(\d+)/ffn", "ffn 0 x2"))
RANKS = PluginConfig(2, rank=4)


def test_a_mask_of_another_form_is_refused():
    tokens, config = tokens_of(2, 4), PluginConfig(2)
    for mask in (tokens[0] > 0, (tokens > 0)[..., None], [[True]]):
        with pytest.raises(PluginError, match=r"The mask is an array \[batch, length\]; found"):
            _spliced(config, plugin_of(config), mask, tokens, stack=None)


def test_a_span_has_a_forward_derivative_which_is_that_of_its_gradient():
    tokens, config = tokens_of(1, 4), PluginConfig(sites="span all x2 size=1")
    plugin = plugin_of(config)

    def total(params):
        variables = dataclasses.replace(plugin, params=params)
        encoded = _spliced(config, variables, tokens > 0, tokens)
        return jnp.sum(encoded * jnp.arange(encoded.size).reshape(encoded.shape))

    direction = jax.tree.map(jnp.ones_like, plugin.params)
    _, forward = jax.jvp(total, (plugin.params,), (direction,))
    sums = jax.tree.map(jnp.sum, jax.grad(total)(plugin.params))
    np.testing.assert_allclose(forward, sum(jax.tree.leaves(sums)), rtol=1e-3)


@pytest.mark.parametrize("config, given, message", [
    (PluginConfig(2, sites=r"encoder/block_(\d+)/ffn"), PluginConfig(2), "arrays for|no mod"),
    (PluginConfig(2), PluginConfig(2, layers=(0,)), "runs encoder layer 1, but"),
    (PluginConfig(2), None, "Ratio 2 needs a plugin's arrays"),
    # One site of two runs; what the other would save is not saved.
    (PARTLY, PARTLY, "need 'encoder/block_1/ffn', which did not run"),
    (SPANS, SPANS, "needs to know the network's layers: give stack="),
    (RANKS, RANKS, "needs to know the network's layers: give stack="),
    (PluginConfig(4), PluginConfig(4, compression="mean"), "'compression/bias' is not in the plug"),
    (PluginConfig(4, compression="mean"), PluginConfig(4), "'compression/bias' is not of its sett"),
    (PluginConfig(4), PluginConfig(4, rank=2), "'adapters/.*' is not of its settings, ffn all x4"),
    (PluginConfig(4), PluginConfig(2), r"shape \(32, 2\); its .* have \(width, 4\)"),
])  # fmt: skip
def test_sites_without_a_module_a_stack_or_their_arrays_are_refused(config, given, message):
    tokens, plugin = jnp.ones((1, 4), jnp.int32), given and plugin_of(given)
    with pytest.raises(PluginError, match=message):
        _spliced(config, plugin, tokens > 0, tokens, stack=None)


@pytest.mark.parametrize("spliced", ["by hand", "with a stack", "as a model"])
def test_a_site_in_a_causal_stack_is_refused(spliced):
    """A merge would show a position the targets after it."""
    config = PluginConfig(2, sites=r"decoder/layers_(\d+)/mlp")
    plugin = plugin_of(config, FfnStack(1, TINY.embed_dim))
    tokens = jnp.ones((1, 4), jnp.int32)
    batch = {"encoder_input_tokens": tokens, "decoder_input_tokens": tokens}
    with pytest.raises(PluginError, match="causal stack: .* later tokens leak into earlier pos"):
        if spliced == "as a model":
            SplicedModel(NETWORK, config).apply(BACKBONE, plugin, batch)
        stack = NETWORK.stack("decoder") if spliced == "with a stack" else None
        with splice(config, plugin, tokens > 0, stack=stack):
            NETWORK.apply(BACKBONE, batch)


@pytest.mark.parametrize("length", [4, 7])  # 7 tokens make as many groups as 8
def test_a_mask_of_another_length_is_refused(length):
    config, mask = PluginConfig(4), jnp.ones((1, length), bool)
    with pytest.raises(PluginError, match=f"mask is of 1 x {length} tokens, .* 1 x 8"):
        _spliced(config, plugin_of(config), mask, jnp.ones((1, 8), jnp.int32))


def test_token_ids_are_a_mask():
    config, tokens = PluginConfig(4), jnp.asarray([[5, 6, 7, 0]])
    masks = (tokens, tokens > 0, Mask(tokens))
    by_ids, by_mask, whole = (_spliced(config, plugin_of(config), mask, tokens) for mask in masks)
    np.testing.assert_array_equal(by_ids, by_mask)
    np.testing.assert_array_equal(whole, by_mask)


@dataclasses.dataclass(frozen=True)
class _OtherBias(type(STACK)):
    def path(self, role, layer):
        return "encoder/bias" if role == "bias" else super().path(role, layer)


@pytest.mark.parametrize("site, message", [
    ("kv all x4", "makes it for kv sites, 'encoder/bias', did not run"),
    ("span all x4", "need 'encoder/bias', which did not run"),
])  # fmt: skip
def test_a_position_bias_that_cannot_be_merged_is_refused(site, message):
    config, tokens = PluginConfig(sites=site), jnp.ones((1, 8), jnp.int32)
    stack = _OtherBias(**vars(STACK))
    with pytest.raises(PluginError, match=message):
        _spliced(config, plugin_of(config), tokens > 0, tokens, stack)


def test_splicing_round_a_compiled_function_is_refused():
    encode = jax.jit(lambda tokens: NETWORK.encode(BACKBONE, tokens))
    tokens = jnp.ones((1, 4), jnp.int32)
    encode(tokens)
    with pytest.raises(PluginError, match="inside the function that is jitted"):
        with splice(PluginConfig(2), plugin_of(PluginConfig(2)), tokens > 0):
            encode(tokens)


def test_calibration_measures_the_ffn_output_on_tokens_only():
    tokens = jnp.asarray([[5, 6, 7, 8], [9, 10, 0, 0]], jnp.int32)
    outputs = {}

    def record(path, call, args, kwargs):
        outputs[path] = np.asarray(call(*args, **kwargs))
        return outputs[path]

    run = functools.partial(NETWORK.encode, BACKBONE, tokens)
    with intercept_modules(IS_FFN, record):
        run()
    rms = site_output_rms(run, PluginConfig(2), STACK, Mask(tokens > 0))
    valid = np.asarray(tokens > 0)
    for path, y in outputs.items():
        np.testing.assert_allclose(rms[path], np.sqrt((y[valid] ** 2).mean()), rtol=1e-5)
    assert calibrate(plugin_of(PluginConfig(2)), rms).output_scales == rms
    nothing = site_output_rms(run, PluginConfig(2), STACK, Mask(tokens < 0))
    assert all(calibrate(plugin_of(PluginConfig(2)), nothing).output_scales.values())
