"""The official release's plugin state dicts and our trees: names and layouts, no files."""

from __future__ import annotations

import re
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from variator_jax.errors import CheckpointError
from variator_jax.plugin.arrays import PluginVariables
from variator_jax.plugin.config import PluginConfig

# Its converter divides T5's residual stream by 100, and its plugins were trained in that scale.
RESIDUAL_SCALE = 100.0
# Linear weights are [out, in]; w_in's input is the FFN's output, then the normalised hidden vector.
_WEIGHTS = (
    "mux_layer.weight",  # [k, k * embed]
    "mux_layer.bias",  # [k]
    "demux_adapter.w_in.weight",  # [bottleneck, 2 * embed]
    "demux_adapter.w_in.bias",  # [bottleneck]
    "demux_adapter.w_out.weight",  # [embed, bottleneck]
    "demux_adapter.w_out.bias",  # [embed]
)
_NAME = re.compile(r"mux_layer\.(\d{1,4})\.(.+)")


def plugin_from_state_dict(
    state: Mapping[str, np.ndarray], output_scale: float = RESIDUAL_SCALE
) -> tuple[PluginConfig, PluginVariables]:
    """Turns `mux_layer.{i}...` arrays into a plugin that pools padding as the official code does.

    Args:
      state: official names to arrays; linear weights are `[out, in]`.
      output_scale: the a of every layer; 100 for a plugin of the official scaled backbones on a
        backbone in T5X's or transformers' scale, 1 for one trained without scaling.

    Raises:
      CheckpointError: if a weight is missing, unknown, misshapen, or no finite number.
    """
    layers = _layers(state)
    first = layers[min(layers)]
    ratio, width = _shape(first, "mux_layer.weight")
    bottleneck, _ = _shape(first, "demux_adapter.w_in.weight")
    embed = width // max(ratio, 1)
    expected = [
        (ratio, ratio * embed), (ratio,),
        (bottleneck, 2 * embed), (bottleneck,),
        (embed, bottleneck), (embed,),
    ]  # fmt: skip
    for layer, weights in layers.items():
        for name, shape in zip(_WEIGHTS, expected, strict=True):
            _check(f"mux_layer.{layer}.{name}", weights.get(name), shape)
    config = PluginConfig(ratio=ratio, bottleneck=bottleneck, pool_padding=True)
    return config, PluginVariables(
        params={_key(i): _params(layers[i], embed) for i in sorted(layers)},
        output_scales={_key(i): jnp.float32(output_scale) for i in sorted(layers)},
    )


def _key(layer: int) -> str:
    return f"encoder/layers_{layer}/mlp"


def _layers(state: Mapping[str, np.ndarray]) -> dict[int, dict[str, np.ndarray]]:
    layers: dict[int, dict[str, np.ndarray]] = {}
    for name, array in state.items():
        match = _NAME.fullmatch(name)
        if match is None and not any(key.startswith("mux_layer.") for key in state):
            raise CheckpointError(
                f"No name starts with 'mux_layer.': not an official Variator plugin ({name!r})."
            )
        if match is None or match[2] not in _WEIGHTS:
            raise CheckpointError(f"{name!r} is not the name of an official plugin's weight.")
        layers.setdefault(int(match[1]), {})[match[2]] = array
    if not layers:
        raise CheckpointError("No name starts with 'mux_layer.': not an official Variator plugin.")
    return layers


def _shape(weights: Mapping[str, np.ndarray], name: str) -> tuple[int, int]:
    found = weights.get(name)
    if found is None or found.ndim != 2 or 0 in found.shape:
        raise CheckpointError(f"The official plugin has no matrix {name!r} in its first layer.")
    return found.shape[0], found.shape[1]


def _check(name: str, found: np.ndarray | None, shape: tuple[int, ...]) -> None:
    if found is None:
        raise CheckpointError(f"The official plugin has no array {name!r}.")
    if found.shape != shape:
        raise CheckpointError(f"{name!r} has shape {found.shape}; expected {shape}.")
    if not jnp.issubdtype(found.dtype, jnp.floating):
        raise CheckpointError(f"{name!r} has dtype {found.dtype}; expected floating-point numbers.")
    if not np.isfinite(found).all():
        raise CheckpointError(f"{name!r} holds numbers that are NaN or infinite.")


def _params(weights: Mapping[str, np.ndarray], embed: int) -> dict:
    def get(name: str) -> jnp.ndarray:
        return jnp.asarray(weights[name], jnp.float32)

    w_in = get("demux_adapter.w_in.weight")
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
