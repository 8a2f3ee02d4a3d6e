"""The tiny backbone spliced with plugins of random arrays, for tests of splicing and of sites."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from tiny import TINY

from variator_jax.backbones.base import Mask
from variator_jax.backbones.t5 import T5, init_params
from variator_jax.plugin import init_plugin, splice

NETWORK = T5(TINY)
STACK = NETWORK.stack()
BACKBONE = init_params(TINY, jax.random.key(0))


@functools.cache
def plugin_of(config, stack=STACK):
    """A plugin far from its initialisation, so that each of its parts shows in the output."""
    shapes = jax.eval_shape(lambda: init_plugin(config, stack, jax.random.key(1)))
    rng = np.random.default_rng(1)
    return shapes.replace(
        params=jax.tree.map(lambda x: np.float32(0.3 * rng.normal(size=x.shape)), shapes.params),
        output_scales=dict.fromkeys(shapes.output_scales, np.float32(1)),
    )


@functools.cache
def _compiled(config, decode=False):
    """Encoder or logits of the spliced backbone; compiled once for each shape."""

    @jax.jit
    def run(plugin, tokens, segments):
        batch = {"encoder_input_tokens": tokens}
        if segments is not None:
            batch["encoder_segment_ids"] = segments
        if decode:
            batch["decoder_input_tokens"] = jnp.full((len(tokens), 3), 7).at[:, 0].set(0)
        with splice(config, plugin, Mask(tokens > 0, segments), STACK):
            outputs = NETWORK.apply(BACKBONE, batch) if decode else None
            return outputs.logits if decode else NETWORK.encode(BACKBONE, tokens, segments)

    return run


def encode(tokens, config, segments=None, decode=False):
    plugin = plugin_of(config) if config.ratio > 1 else None
    return np.asarray(_compiled(config, decode)(plugin, jnp.asarray(tokens), segments))


def tokens_of(rows, length, seed=0):
    return np.random.default_rng(seed).integers(2, 384, (rows, length)).astype(np.int32)
