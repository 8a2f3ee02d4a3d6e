"""Spans and merged keys against their equations, written out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
from spliced import BACKBONE, NETWORK, STACK, encode, plugin_of, tokens_of
from tiny import TINY

from variator_jax.backbones.t5.attention import relative_position_bucket
from variator_jax.backbones.t5.layers import RMSNorm
from variator_jax.backbones.t5.network import EncoderLayer
from variator_jax.plugin import KeyValue, PluginConfig, Span, intercept_modules, splice


def _by_hand(config, tokens, ratio):
    """One span over both layers of the tiny encoder."""
    tree, (arrays,) = BACKBONE["encoder"], plugin_of(config).params.values()
    length = tokens.shape[1]

    def grouped(x):
        return x.reshape(len(x), -1, ratio, *x.shape[2:])

    valid = grouped(tokens > 0)
    h = BACKBONE["token_embedder"]["embedding"][tokens]
    positions = jnp.arange(length)
    bucket = relative_position_bucket(positions[None] - positions[:, None], True)
    bias = tree["relpos_bias"]["rel_embedding"][:, bucket][None]
    x = grouped(h * jax.lax.rsqrt(jnp.mean(h**2, -1, keepdims=True) + 1e-6))
    kernel, score_bias = arrays["compression"]["kernel"], arrays["compression"]["bias"]
    flat = (x * valid[..., None]).reshape(len(x), length // ratio, -1)
    scores = jnp.where(valid, flat @ kernel + score_bias, -jnp.inf)
    merged = jnp.einsum("bgk,bgkd->bgd", jax.nn.softmax(scores), grouped(h))
    sizes = jnp.log(valid.sum(-1))[:, None, None]
    m = merged
    for i in range(2):
        layer = EncoderLayer(TINY)
        args = (valid.any(-1)[:, None, None], bias[:, :, ::ratio, ::ratio] + sizes, valid.any(-1))
        m = layer.apply({"params": tree[f"layers_{i}"]}, m, *args, True)
    d = jnp.repeat(m - merged, ratio, axis=1)
    w = arrays["decompression"]  # the output scale is 1
    inner = d @ w["repeated_kernel"] + x.reshape(h.shape) @ w["input_kernel"] + w["input_bias"]
    h = h + d + (jnp.tanh(inner) @ w["output_kernel"] + w["output_bias"])
    return RMSNorm(TINY).apply({"params": tree["encoder_norm"]}, h)


def test_a_span_is_what_its_equations_say():
    config = PluginConfig(sites=(Span(4),))
    tokens = jnp.asarray(tokens_of(2, 12)).at[0, 10:].set(0)
    expected = _by_hand(config, tokens, 4)
    np.testing.assert_allclose(encode(tokens, config)[:, :10], expected[:, :10], atol=1e-5)


def test_merged_keys_stand_in_the_middle_and_count_as_many_as_they_hold():
    """Averages of equal tokens: attention over groups is then attention over the tokens."""
    config = PluginConfig(sites=(KeyValue(3),))
    tokens = jnp.full((1, 12), 7).at[0, 10:].set(0)
    seen = {}

    def record(path, call, args, kwargs):
        seen.update(zip(("queries", "keys", "mask", "bias"), args, strict=False))
        return call(*args, **kwargs)

    with splice(config, plugin_of(config), tokens > 0, stack=STACK):
        with intercept_modules({"encoder/layers_1/attention"}.__contains__, record):
            NETWORK.encode(BACKBONE, tokens)
    offset = jnp.arange(4)[None] * 3 + 1 - jnp.arange(12)[:, None]
    table = BACKBONE["encoder"]["relpos_bias"]["rel_embedding"]
    bias = table[:, relative_position_bucket(offset, True)][None] + jnp.log(jnp.array([3, 3, 3, 1]))
    np.testing.assert_allclose(seen["bias"], bias, atol=1e-6)
    np.testing.assert_allclose(seen["keys"][:, :3], seen["queries"][:, 1:9:3], atol=1e-5)
    assert seen["mask"].shape == (1, 1, 12, 4) and seen["mask"].all()
