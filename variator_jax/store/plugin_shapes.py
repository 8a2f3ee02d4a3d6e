"""The settings of a plugin by the shapes of its arrays, where a T5X run's folder does not say them.

Shapes tell the ratio, the bottleneck, the layers and which halves are learned; that padding stays
out of the merges is taken for granted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from variator_jax.backbones.t5 import T5Config
from variator_jax.errors import CheckpointError
from variator_jax.plugin import PluginConfig
from variator_jax.store.plugin_folder import LARGEST_RATIO

_LAYER = re.compile(r"plugin/encoder/layers_(\d+)/mlp/(.+)")
_SCORES = "compression/kernel"
_BOTTLENECKS = {"decompression/input_kernel": 1, "decompression/output_kernel": 0}


def deduce_config(where: str, arrays: Mapping[str, Any], backbone: T5Config) -> PluginConfig:
    """The settings of the plugin that has these arrays.

    Args:
      where: the checkpoint, for messages.
      arrays: path in T5X's tree, such as `plugin/encoder/layers_0/mlp/compression/kernel` ->
        anything with a shape.
      backbone: the shape of the backbone that it is spliced into.

    Raises:
      CheckpointError: if the shapes do not tell, or tell two things.
    """
    names: dict[tuple[int, str], str] = {
        (int(match[1]), match[2]): path for path in arrays if (match := _LAYER.fullmatch(path))
    }
    ratio = _ratio(where, arrays, backbone.embed_dim, names)
    learned = any(name.startswith("decompression/") for _, name in names)
    layers = tuple(sorted({layer for layer, _ in names}))
    return PluginConfig(
        ratio,
        bottleneck=_bottleneck(where, arrays, names) if learned else PluginConfig(2).bottleneck,
        layers=None if layers == tuple(range(backbone.num_encoder_layers)) else layers,
        decompression="bottleneck" if learned else "repeat",
    )


def _ratio(
    where: str, arrays: Mapping[str, Any], embed: int, names: Mapping[tuple[int, str], str]
) -> int:
    found: dict[int, str] = {}
    for (_, name), path in sorted(names.items()):
        if name == _SCORES:
            shape = tuple(arrays[path].shape)
            ratio = shape[-1] if len(shape) == 2 else 0
            if not 2 <= ratio <= LARGEST_RATIO or shape[0] != ratio * embed:
                raise CheckpointError(
                    f"{where}: {path} has shape {shape}; on a backbone of width {embed} it is "
                    f"(ratio * {embed}, ratio)."
                )
            found.setdefault(ratio, path)
    if not found:
        raise CheckpointError(
            f"{where} does not tell the plugin's ratio: it has no {_SCORES}, and there is no "
            "variator_plugin.json beside it, where T5X's runs say it."
        )
    return _only(where, "ratio", found)


def _bottleneck(where: str, arrays: Mapping[str, Any], names: Mapping[tuple[int, str], str]) -> int:
    found: dict[int, str] = {}
    for (_, name), path in sorted(names.items()):
        if name in _BOTTLENECKS:
            shape = tuple(arrays[path].shape)
            if len(shape) != 2 or not 1 <= shape[_BOTTLENECKS[name]] <= 1 << 20:
                raise CheckpointError(f"{where}: {path} has shape {shape} and is no kernel.")
            found.setdefault(shape[_BOTTLENECKS[name]], path)
    if not found:
        raise CheckpointError(f"{where} lacks every one of {', '.join(sorted(_BOTTLENECKS))}.")
    return _only(where, "bottleneck", found)


def _only(where: str, what: str, found: Mapping[int, str]) -> int:
    if len(found) > 1:
        (one, path), (other, second) = list(found.items())[:2]
        raise CheckpointError(
            f"{where} mixes plugins: {path} has {what} {one}, {second} has {what} {other}."
        )
    return next(iter(found))
