"""A plugin's arrays: trainable parameters by layer, and the output scales that calibration sets."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from variator_jax.plugin.config import PluginConfig
from variator_jax.plugin.sites.ffn import PluginLayer


@struct.dataclass
class PluginVariables:
    """The arrays of one compression plugin.

    Attributes:
      params: `{'layers_<i>': {'compression': ..., 'decompression': ...}}` by compressed layer,
        float32, the only thing that training moves.
      output_scales: `{'layers_<i>': a}`, float32 scalars, set once by calibration.
    """

    params: dict
    output_scales: dict


def layer_name(layer: int) -> str:
    """The key of an encoder layer in both trees."""
    return f"layers_{layer}"


def init_plugin(
    config: PluginConfig,
    num_layers: int,
    embed_dim: int,
    rng: jax.Array,
    output_scale: float = 1.0,
) -> PluginVariables:
    """Fresh arrays for an encoder of `num_layers` layers with `embed_dim` wide hidden vectors.

    Raises:
      PluginError: if the config names layers that the encoder does not have.
    """
    layers = config.compressed_layers(num_layers)
    x = jnp.zeros((1, 1, config.ratio, embed_dim), jnp.float32)

    def init(rng: jax.Array) -> dict:
        keys = jax.random.split(rng, num_layers)
        module = PluginLayer(config)
        # The ablations that learn nothing have no parameters at all.
        return {layer_name(i): module.init(keys[i], x).get("params", {}) for i in layers}

    scales = {layer_name(i): jnp.full((), output_scale, jnp.float32) for i in layers}
    return PluginVariables(params=jax.jit(init)(rng), output_scales=scales)
