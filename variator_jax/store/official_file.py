"""The official release's plugin files, such as `plugin-t5_base-mux_4.pkl`.

They are pickles, which are read without running anything (`torch_pickle.py`); what the names in
them mean is in `official.py`.
"""

from __future__ import annotations

import math
import os
import pathlib

from variator_jax.errors import CheckpointError
from variator_jax.store.backbone_folder import Backbone
from variator_jax.store.official import RESIDUAL_SCALE, plugin_from_state_dict
from variator_jax.store.plugin_folder import Plugin, check_shapes, describe_plugin
from variator_jax.store.torch_pickle import read_state_dict


def load_official(
    path: str | os.PathLike, backbone: Backbone, residual_scale: float = RESIDUAL_SCALE
) -> Plugin:
    """Reads an official plugin for a backbone of the same shape.

    The file does not say which backbone it was trained beside, so only the shape can be checked.

    Args:
      path: the file: a state dict saved by torch.save, or pickled.
      backbone: the backbone, in T5X's or transformers' scale.
      residual_scale: by how much the official backbones' residual stream is smaller; 100 for the
        released plugins, 1 for one that was trained on an unscaled backbone. It becomes each
        layer's output scale, so that the weights stay those of the file.

    Raises:
      CheckpointError: if the file is damaged, holds anything but tensors, or does not fit.
    """
    if not math.isfinite(residual_scale) or residual_scale <= 0:
        raise CheckpointError(
            f"The residual scale is a positive number such as 100; found {residual_scale}."
        )
    state = read_state_dict(path)
    try:
        config, variables = plugin_from_state_dict(state, residual_scale)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    training = {
        "source": f"official release, {pathlib.Path(path).name}",
        "residual_scale": residual_scale,
    }
    plugin = Plugin(config, variables, describe_plugin(backbone, training))
    first = next(iter(variables.params.values()))
    layers, embed = len(variables.params), first["decompression"]["output_bias"].shape[0]
    shape = backbone.config
    if (layers, embed) != (shape.num_encoder_layers, shape.embed_dim):
        raise CheckpointError(
            f"{path} is a plugin for {layers} encoder layers of width {embed}; backbone "
            f"{shape.name!r} has {shape.num_encoder_layers} of width {shape.embed_dim}."
        )
    check_shapes(str(path), plugin, backbone)
    return plugin
