"""The shape of a smaller student: a backbone whose encoder FFNs are narrow instead of compressed.

It is what a compression plugin competes with at equal cost. Which of the teacher's neurons a
student starts with, and how it is trained, is said in `distill.student`.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from flax import traverse_util

from variator_jax.backbones.t5.config import T5Config
from variator_jax.backbones.t5.cost import attention_flops, encoder_flops, ffn_flops
from variator_jax.errors import ConfigError
from variator_jax.plugin.config import PluginConfig

_TRAINED = re.compile(r"encoder/.*(?<!/scale)")  # all of the encoder but its norms
_MULTIPLE = 8  # of which the width is one: meshes split it, and accelerators pad it


def student_mlp_dim(config: T5Config, length: int, plugin: PluginConfig) -> int:
    """The widest encoder FFN whose encoder costs no more FLOPs than the backbone with a plugin.

    Rounded down to a multiple of 8, unless it is below 8; at most the backbone's own width.

    Args:
      config: shape of the backbone.
      length: tokens per row, padding included.
      plugin: the plugin to compare with.

    Raises:
      ConfigError: for a length below 1, or a plugin that leaves the FFN no neuron.
    """
    most = encoder_flops(config, length, plugin.ratio, plugin)
    most -= config.num_encoder_layers * attention_flops(config, length)
    neuron = ffn_flops(dataclasses.replace(config, encoder_mlp_dim=1), length)
    width = min(most // (config.num_encoder_layers * neuron), config.encoder_mlp)
    if width < 1:
        raise ConfigError(
            f"At {length} tokens a plugin of ratio {plugin.ratio} costs less than one neuron in "
            f"each encoder FFN of backbone {config.name!r}: there is no student so small."
        )
    return width - width % _MULTIPLE or width


def narrowed(config: T5Config, mlp_dim: int) -> T5Config:
    """The same shape with encoder FFNs of `mlp_dim` hidden units, and a name that says so."""
    if mlp_dim == config.encoder_mlp:
        return config
    return dataclasses.replace(config, name=f"{config.name}_ffn{mlp_dim}", encoder_mlp_dim=mlp_dim)


def student_leaves(params: dict[str, Any]) -> dict[str, Any]:
    """What a student trains, of a backbone's tree of anything: its encoder without the norms.

    Decoder, embeddings and norms stay the teacher's, so that a student differs from a plugin in
    its capacity alone and has less to keep.

    Returns:
      A flat dict, names joined by '/'.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    return {path: leaf for path, leaf in flat.items() if _TRAINED.fullmatch(path)}
