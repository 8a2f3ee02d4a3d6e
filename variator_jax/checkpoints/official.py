"""The official release's plugin state dicts and our trees: names and layouts, no files."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from variator_jax.errors import CheckpointError
from variator_jax.plugin.config import PluginConfig
from variator_jax.plugin.variables import PluginVariables, layer_name

# Its converter divides T5's residual stream by 100, and its plugins were trained in that scale.
RESIDUAL_SCALE = 100.0


def plugin_from_state_dict(
    state: Mapping[str, np.ndarray], output_scale: float = RESIDUAL_SCALE
) -> tuple[PluginConfig, PluginVariables]:
    """Turns `mux_layer.{i}...` arrays into a plugin that pools padding as the official code does.

    Args:
      state: official names to arrays; linear weights are `[out, in]`.
      output_scale: the a of every layer; 100 for a plugin of the official scaled backbones on a
        backbone in T5X's or transformers' scale, 1 for one trained without scaling.

    Raises:
      CheckpointError: if a layer's weights are missing.
    """
    layers = sorted({int(name.split(".")[1]) for name in state if name.startswith("mux_layer.")})
    if not layers:
        raise CheckpointError("No name starts with 'mux_layer.': not an official Variator plugin.")
    params = {layer_name(i): _layer(state, i) for i in layers}
    first = params[layer_name(layers[0])]
    config = PluginConfig(
        ratio=first["compression"]["bias"].shape[0],
        bottleneck=first["decompression"]["input_bias"].shape[0],
        pool_padding=True,
    )
    scales = {layer_name(i): jnp.float32(output_scale) for i in layers}
    return config, PluginVariables(params=params, output_scales=scales)


def _layer(state: Mapping[str, np.ndarray], layer: int) -> dict:
    def get(name: str) -> jnp.ndarray:
        full = f"mux_layer.{layer}.{name}"
        if full not in state:
            raise CheckpointError(f"The official plugin has no array {full!r}.")
        return jnp.asarray(state[full], jnp.float32)

    w_in = get("demux_adapter.w_in.weight")  # [bottleneck, 2 * embed], the FFN's output first
    embed = w_in.shape[1] // 2
    return {
        "compression": {"kernel": get("mux_layer.weight").T, "bias": get("mux_layer.bias")},
        "decompression": {
            "repeated_kernel": w_in[:, :embed].T,
            "input_kernel": w_in[:, embed:].T,
            "input_bias": get("demux_adapter.w_in.bias"),
            "output_kernel": get("demux_adapter.w_out.weight").T,
            "output_bias": get("demux_adapter.w_out.bias"),
        },
    }
