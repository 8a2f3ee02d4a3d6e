"""A plugin that can be mailed: `plugin.json` and `plugin.safetensors` (DESIGN.md decision 8)."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from flax import traverse_util

from variator_jax.checkpoints import folders
from variator_jax.checkpoints.backbone_folder import Backbone
from variator_jax.errors import CheckpointError, PluginError
from variator_jax.plugin import PluginConfig, PluginVariables, init_plugin

DESCRIPTION, ARRAYS = "plugin.json", "plugin.safetensors"


@dataclasses.dataclass(frozen=True)
class Plugin:
    """A compression plugin for one ratio of one backbone."""

    config: PluginConfig
    variables: PluginVariables
    description: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def save_plugin(
    path: str | os.PathLike,
    config: PluginConfig,
    variables: PluginVariables,
    backbone: Backbone,
    training: Mapping[str, Any] | None = None,
    quality: Mapping[str, float] | None = None,
) -> None:
    """Writes a plugin folder, whole or not at all.

    Args:
      path: the folder.
      config: the plugin's settings.
      variables: its arrays.
      backbone: the backbone it was trained on, whose name and fingerprints are kept.
      training: what made it (task, steps, loss), for people.
      quality: score by task, 0 to 100.
    """
    variables = jax.device_get(variables)
    description = {
        "kind": "plugin",
        "format_version": folders.FORMAT_VERSION,
        "config": dataclasses.asdict(config),
        "backbone": {
            "name": backbone.config.name,
            "fingerprint": backbone.fingerprint,
            "num_encoder_layers": backbone.config.num_encoder_layers,
            "embed_dim": backbone.config.embed_dim,
        },
        "vocabulary_fingerprint": backbone.vocabulary_fingerprint,
        "training": dict(training or {}),
        "quality": dict(quality or {}),
    }
    with folders.atomic_folder(path) as draft:
        folders.write_arrays(draft / ARRAYS, _tree(variables))
        folders.write_json(draft / DESCRIPTION, description)


def load_plugin(path: str | os.PathLike, backbone: Backbone | None = None) -> Plugin:
    """Reads a plugin folder, and checks that it belongs to `backbone` where one is given.

    Raises:
      CheckpointError: if anything is missing or damaged, or the plugin is another backbone's.
    """
    folder = pathlib.Path(path)
    description = folders.read_json(folder / DESCRIPTION, "plugin")
    try:
        config = PluginConfig(**description["config"])
        shape = description["backbone"]
        layers, embed = int(shape["num_encoder_layers"]), int(shape["embed_dim"])
    except (PluginError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / DESCRIPTION} is not usable: {error}.") from error
    if backbone is not None and shape.get("fingerprint") != backbone.fingerprint:
        raise CheckpointError(
            f"The plugin in {folder} belongs to backbone {shape.get('name')!r} with fingerprint "
            f"{shape.get('fingerprint')}; this backbone is {backbone.config.name!r} with "
            f"fingerprint {backbone.fingerprint}."
        )
    expected = jax.eval_shape(lambda: init_plugin(config, layers, embed, jax.random.key(0)))
    flat = traverse_util.flatten_dict(_tree(expected), sep="/")
    tree = folders.match_shapes(folder / ARRAYS, folders.read_arrays(folder / ARRAYS), flat)
    # The ablations have layers without parameters, which a file of arrays cannot name.
    params = {name: tree.get("params", {}).get(name, {}) for name in expected.params}
    variables = PluginVariables(params, tree.get("output_scales", {}))
    return Plugin(config, variables, description)


def _tree(variables: PluginVariables) -> dict:
    return {"params": variables.params, "output_scales": variables.output_scales}
