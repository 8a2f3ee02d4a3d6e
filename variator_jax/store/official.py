"""Plugins of the official release, such as `plugin-t5_base-mux_4.pkl`: pickled state dicts."""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from variator_jax.errors import CheckpointError
from variator_jax.files import wrap_errors
from variator_jax.plugin import PluginConfig, PluginVariables
from variator_jax.store import arrays
from variator_jax.store.backbone import Backbone
from variator_jax.store.pickles import open_state_dict
from variator_jax.store.plugins import Plugin, check_shapes, describe_plugin

# Its converter divides T5's residual stream by 100, and its plugins were trained in that scale.
RESIDUAL_SCALE = 100.0
_LAYER = re.compile(r"(mux_layer\.\d{1,4})\.(mux_layer|demux_adapter)\..+")


def load_official(
    path: str | os.PathLike, backbone: Backbone, residual_scale: float = RESIDUAL_SCALE
) -> Plugin:
    """Reads an official plugin for a backbone of the same shape.

    The file does not name the backbone it was trained on, so only the shape can be checked.

    Args:
      path: the file: a state dict saved by torch.save, in either of its layouts.
      backbone: the backbone, in T5X's or transformers' scale.
      residual_scale: by how much the official backbones' residual stream is smaller; 100 for the
        released plugins, 1 for one that was trained on an unscaled backbone. It becomes each
        layer's output scale, so that the weights stay those of the file.

    Raises:
      CheckpointError: if the file is damaged, holds anything but tensors, or does not fit.
    """
    if not 0 < residual_scale < float("inf"):
        raise CheckpointError(f"A residual scale is a positive number; found {residual_scale}.")
    state = {name: stored.read() for name, stored in open_state_dict(path).items()}
    config, variables = plugin_from_state_dict(state, residual_scale, str(path))
    source = f"official release, {pathlib.Path(path).name}"
    training = {"source": source, "residual_scale": residual_scale}
    plugin = Plugin(config, variables, describe_plugin(backbone, training))
    check_shapes(str(path), plugin, backbone)
    return plugin


def plugin_from_state_dict(
    state: Mapping[str, np.ndarray],
    output_scale: float = RESIDUAL_SCALE,
    what: str = "The official plugin",
) -> tuple[PluginConfig, PluginVariables]:
    """Turns `mux_layer.{i}...` arrays into a plugin that pools padding as the official code does.

    Args:
      state: official names to arrays; linear weights are `[out, in]`.
      output_scale: the a of every layer; 100 for a plugin of the official scaled backbones on a
        backbone in T5X's or transformers' scale, 1 for one trained without scaling.
      what: the file, for messages.

    Raises:
      CheckpointError: if a weight is missing, unknown, misshapen, or not a finite number.
    """
    layers = sorted({match[1] for name in state if (match := _LAYER.fullmatch(name))})
    with wrap_errors(f"{what} is not an official plugin"):
        ratio, width = state[f"{layers[0]}.mux_layer.weight"].shape
        bottleneck, _ = state[f"{layers[0]}.demux_adapter.w_in.weight"].shape
        embed = width // ratio
    # Weights are [out, in]; w_in's input is the FFN's output, then the normalised hidden vector.
    shapes = {
        "mux_layer.weight": (ratio, ratio * embed),
        "mux_layer.bias": (ratio,),
        "demux_adapter.w_in.weight": (bottleneck, 2 * embed),
        "demux_adapter.w_in.bias": (bottleneck,),
        "demux_adapter.w_out.weight": (embed, bottleneck),
        "demux_adapter.w_out.bias": (embed,),
    }
    expected = {
        f"{layer}.{name}": jax.ShapeDtypeStruct(shape, np.float32)
        for layer in layers
        for name, shape in shapes.items()
    }
    arrays.check_arrays(what, state, expected, (*arrays.WEIGHTS, "float64"))
    for name, array in state.items():
        arrays.check_finite(f"{what}: {name}", array)
    keys = {layer: f"encoder/layers_{int(layer.rpartition('.')[2])}/mlp" for layer in layers}
    return PluginConfig(ratio, bottleneck, pool_padding=True), PluginVariables(
        params={key: _params(state, layer, embed) for layer, key in keys.items()},
        output_scales={key: jnp.float32(output_scale) for key in keys.values()},
    )


def _params(state: Mapping[str, np.ndarray], layer: str, embed: int) -> dict:
    def weight(name: str) -> jnp.ndarray:
        return jnp.asarray(state[f"{layer}.{name}"], jnp.float32)

    w_in = weight("demux_adapter.w_in.weight")
    return {
        "compression": {"kernel": weight("mux_layer.weight").T, "bias": weight("mux_layer.bias")},
        "decompression": {
            "repeated_kernel": w_in[:, :embed].T,
            "input_kernel": w_in[:, embed:].T,
            "input_bias": weight("demux_adapter.w_in.bias"),
            "output_kernel": weight("demux_adapter.w_out.weight").T,
            "output_bias": weight("demux_adapter.w_out.bias"),
        },
    }
