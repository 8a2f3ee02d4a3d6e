"""A plugin that can be mailed: `plugin.json` and `plugin.safetensors` (DESIGN.md decision 8)."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from variator_jax.errors import CheckpointError, PluginError
from variator_jax.plugin import PluginConfig, PluginVariables, init_plugin, layer_name
from variator_jax.store import arrays_file, folders
from variator_jax.store.backbone_folder import Backbone, title
from variator_jax.store.description import (
    CHECKSUMS,
    Fields,
    check_unchanged,
    read_description,
    write_description,
)
from variator_jax.store.files import check_folder

DESCRIPTION: str = "plugin.json"
ARRAYS: str = "plugin.safetensors"
# Far above any use, and low enough that nothing a description claims can exhaust the memory.
_MOST_LAYERS, _MOST_WIDE = 1000, 1 << 20
LARGEST_RATIO = 1 << 12


@dataclasses.dataclass(frozen=True)
class Plugin:
    """A compression plugin for one ratio of one backbone.

    `description` is what its folder says of it: `backbone` with name, fingerprint, layers, width
    and the LoRA in it, if any; `vocabulary_fingerprint`, `training` and `quality`; empty for one
    that was just made.
    """

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

    Raises:
      CheckpointError: if the folder cannot be written, the arrays are not those of the config on
        this backbone, or one of them is not finite.
    """
    leaves = {name: np.asarray(leaf) for name, leaf in _leaves(variables).items()}
    shape = backbone.config
    expected = expected_leaves(config, shape.num_encoder_layers, shape.embed_dim)
    folders.match_arrays(pathlib.Path(path) / ARRAYS, leaves, expected, ("float32",))
    content = describe_plugin(backbone, training, quality)
    holds = (re.escape(ARRAYS),)
    with folders.atomic_folder(path, replaces=(DESCRIPTION,), holds=holds) as draft:
        arrays_file.write_arrays(draft / ARRAYS, leaves)
        checksums = {ARRAYS: arrays_file.file_checksum(draft / ARRAYS)}
        content = {"config": dataclasses.asdict(config), **content, CHECKSUMS: checksums}
        write_description(draft / DESCRIPTION, "plugin", content)


def describe_plugin(
    backbone: Backbone,
    training: Mapping[str, Any] | None = None,
    quality: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """The description of a plugin that belongs to `backbone`."""
    return {
        "backbone": {
            "name": backbone.config.name,
            "fingerprint": backbone.fingerprint,
            "num_encoder_layers": backbone.config.num_encoder_layers,
            "embed_dim": backbone.config.embed_dim,
            **({"lora": dict(backbone.lora)} if backbone.lora else {}),
        },
        "vocabulary_fingerprint": backbone.vocabulary_fingerprint,
        "training": dict(training or {}),
        "quality": dict(quality or {}),
    }


def load_plugin(path: str | os.PathLike, backbone: Backbone | None = None) -> Plugin:
    """Reads a plugin folder, and checks that it belongs to `backbone` where one is given.

    Raises:
      CheckpointError: if anything is missing or damaged, or the plugin is another backbone's.
    """
    folder = check_folder(path, "plugin")
    fields = read_description(folder / DESCRIPTION, "plugin")
    config, layers, embed = _read_shape(fields)
    if backbone is not None:
        check_belongs(f"The plugin in {folder}", fields.content, backbone)
    try:
        expected = expected_leaves(config, layers, embed)
    except PluginError as error:
        raise CheckpointError(f"{fields.path} is not usable: {error}") from error
    arrays = arrays_file.read_arrays(folder / ARRAYS)
    folders.match_arrays(folder / ARRAYS, arrays, expected, ("float32",))
    check_unchanged(fields, folder / ARRAYS)
    arrays_file.check_finite(folder / ARRAYS, arrays)
    return Plugin(config, to_variables(config, layers, arrays), fields.content)


def to_variables(
    config: PluginConfig, layers: int, arrays: Mapping[str, np.ndarray]
) -> PluginVariables:
    """The arrays of a plugin from its leaves, which are those of `expected_leaves`."""
    tree = traverse_util.unflatten_dict(jax.tree.map(jnp.array, dict(arrays)), sep="/")
    # The ablations have layers without parameters, which a file of arrays cannot name.
    names = [layer_name(layer) for layer in config.compressed_layers(layers)]
    params = {name: tree.get("params", {}).get(name, {}) for name in names}
    return PluginVariables(params, tree.get("output_scales", {}))


def check_belongs(what: str, description: Mapping[str, Any], backbone: Backbone) -> None:
    """Compares the fingerprints in a plugin's description with a backbone's.

    Args:
      what: the plugin, as a message begins.
      description: the plugin's, whose types were checked.
      backbone: the backbone it is to be spliced into.

    Raises:
      CheckpointError: with both fingerprints.
    """
    owner = description["backbone"]
    if owner["fingerprint"] != backbone.fingerprint:
        lacks = owner.get("lora") and not backbone.lora
        hint = " Give its LoRA, too: INITIAL_LORA_PATH, or load_backbone(..., lora=...)."
        raise CheckpointError(
            f"{what} belongs to backbone {title(owner['name'], owner.get('lora'))} with "
            f"fingerprint {owner['fingerprint']}; this backbone is {backbone.title} with "
            f"fingerprint {backbone.fingerprint}.{hint if lacks else ''}"
        )
    theirs, ours = description["vocabulary_fingerprint"], backbone.vocabulary_fingerprint
    if theirs and ours and theirs != ours:
        raise CheckpointError(
            f"{what} was trained with the vocabulary of fingerprint {theirs}; the backbone's "
            f"vocabulary has {ours}, so that the same text would become other tokens."
        )


def check_shapes(what: str, plugin: Plugin, backbone: Backbone) -> None:
    """Compares a plugin's arrays with what its settings ask for on a backbone.

    Raises:
      CheckpointError: naming the first array that is missing, surplus or misshapen.
    """
    shape = backbone.config
    try:
        expected = expected_leaves(plugin.config, shape.num_encoder_layers, shape.embed_dim)
    except PluginError as error:
        raise CheckpointError(f"{what} does not fit backbone {shape.name!r}: {error}") from error
    leaves = {name: np.asarray(leaf) for name, leaf in _leaves(plugin.variables).items()}
    folders.match_arrays(what, leaves, expected, ("float32",))


def read_config(fields: Fields, key: str = "config") -> PluginConfig:
    """The settings of a plugin under a key, every value checked for its type and its size.

    Raises:
      CheckpointError: naming the file and what is wrong in it.
    """
    sizes = fields.fields(key)
    sizes.size("ratio", 1, LARGEST_RATIO)
    sizes.size("bottleneck", 1, _MOST_WIDE)
    return fields.config(key, PluginConfig)


def _read_shape(fields: Fields) -> tuple[PluginConfig, int, int]:
    """The settings, and the layers and width of the backbone; every value checked for its type."""
    config = read_config(fields)
    owner = fields.fields("backbone")
    owner.get("name", str)
    owner.fingerprint("fingerprint")
    layers = owner.size("num_encoder_layers", 1, _MOST_LAYERS)
    embed = owner.size("embed_dim", 1, _MOST_WIDE)
    if "lora" in owner.content:
        lora = owner.fields("lora")
        lora.fingerprint("fingerprint")
        lora.get("task", str)
    if fields.get("vocabulary_fingerprint", str, type(None)) is not None:
        fields.fingerprint("vocabulary_fingerprint")
    fields.get("training", dict)
    quality = fields.fields("quality")
    for task in quality.content:
        quality.get(task, float, int)
    return config, layers, embed


def _leaves(variables: PluginVariables) -> dict[str, Any]:
    return folders.flatten({"params": variables.params, "output_scales": variables.output_scales})


def expected_leaves(
    config: PluginConfig, layers: int, embed: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """The leaves of a plugin on an encoder of so many layers and that width, by path.

    Raises:
      PluginError: if the settings name layers that the encoder does not have.
    """
    one = dataclasses.replace(config, layers=None, sites=PluginConfig(2).sites)
    leaves = _layer_leaves(one, embed) if config.ratio > 1 else {}
    expected = {}
    for layer in config.compressed_layers(layers):
        for name, leaf in leaves.items():
            expected[name.replace(layer_name(0), layer_name(layer))] = leaf
    return expected


@functools.lru_cache
def _layer_leaves(config: PluginConfig, embed: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The leaves of a plugin on an encoder of one layer; more layers only repeat them."""
    return _leaves(jax.eval_shape(lambda: init_plugin(config, 1, embed, jax.random.key(0))))
