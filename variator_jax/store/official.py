"""Plugins of the official release, such as `plugin-t5_base-mux_4.pkl`: pickled state dicts."""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from variator_jax.errors import CheckpointError
from variator_jax.plugin import PluginConfig, PluginVariables
from variator_jax.store.arrays import check_finite
from variator_jax.store.pickles import open_state_dict
from variator_jax.store.plugin_folder import Plugin, check_shapes, describe_plugin
from variator_jax.store.source import Backbone

# Its converter divides T5's residual stream by 100, and its plugins were trained in that scale.
RESIDUAL_SCALE = 100.0
_NAME = re.compile(r"mux_layer\.(\d{1,4})\.(.+)")


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
    try:
        config, variables = plugin_from_state_dict(state, residual_scale)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    training = {
        "source": f"official release, {pathlib.Path(path).name}",
        "residual_scale": residual_scale,
    }
    plugin = Plugin(config, variables, describe_plugin(backbone, training))
    check_shapes(str(path), plugin, backbone)
    return plugin


def plugin_from_state_dict(
    state: Mapping[str, np.ndarray], output_scale: float = RESIDUAL_SCALE
) -> tuple[PluginConfig, PluginVariables]:
    """Turns `mux_layer.{i}...` arrays into a plugin that pools padding as the official code does.

    Args:
      state: official names to arrays; linear weights are `[out, in]`.
      output_scale: the a of every layer; 100 for a plugin of the official scaled backbones on a
        backbone in T5X's or transformers' scale, 1 for one trained without scaling.

    Raises:
      CheckpointError: if a weight is missing, unknown, misshapen, or not a finite number.
    """
    layers: dict[int, dict[str, np.ndarray]] = {}
    for name, array in state.items():
        match = _NAME.fullmatch(name)
        if match is None:
            raise CheckpointError(f"{name!r} is not a weight of an official Variator plugin.")
        layers.setdefault(int(match[1]), {})[match[2]] = array
    first = layers[min(layers)]
    sizes = [np.shape(first.get(f"{name}.weight")) for name in ("mux_layer", "demux_adapter.w_in")]
    if any(len(size) != 2 or 0 in size for size in sizes):
        raise CheckpointError("The official plugin's first layer has no proper matrices.")
    (ratio, width), (bottleneck, _) = sizes
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
    for layer, weights in layers.items():
        _check(f"mux_layer.{layer}", weights, shapes)
    keys = {layer: f"encoder/layers_{layer}/mlp" for layer in sorted(layers)}
    return PluginConfig(ratio, bottleneck, pool_padding=True), PluginVariables(
        params={key: _params(layers[layer], embed) for layer, key in keys.items()},
        output_scales={key: jnp.float32(output_scale) for key in keys.values()},
    )


def _check(
    prefix: str, weights: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    for name in sorted(weights.keys() ^ shapes.keys()):
        problem = "has an unknown" if name in weights else "is missing"
        raise CheckpointError(f"The official plugin {problem} '{prefix}.{name}'.")
    for name, shape in shapes.items():
        array, full_name = weights[name], f"'{prefix}.{name}'"
        if array.shape != shape or not jnp.issubdtype(array.dtype, jnp.floating):
            raise CheckpointError(
                f"{full_name} has shape {array.shape} of {array.dtype}; expected {shape} of floats."
            )
        check_finite(full_name, array)


def _params(weights: Mapping[str, np.ndarray], embed: int) -> dict:
    arrays = {name: jnp.asarray(array, jnp.float32) for name, array in weights.items()}
    w_in = arrays["demux_adapter.w_in.weight"]
    return {
        "compression": {"kernel": arrays["mux_layer.weight"].T, "bias": arrays["mux_layer.bias"]},
        "decompression": {
            "repeated_kernel": w_in[:, :embed].T,
            "input_kernel": w_in[:, embed:].T,
            "input_bias": arrays["demux_adapter.w_in.bias"],
            "output_kernel": arrays["demux_adapter.w_out.weight"].T,
            "output_bias": arrays["demux_adapter.w_out.bias"],
        },
    }
