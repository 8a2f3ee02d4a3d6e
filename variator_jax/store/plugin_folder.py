"""Plugin folders: `plugin.json` and `plugin.safetensors`.

Format 2 keeps a list of sites, and arrays by module path; format 1, with FFN sites only and arrays
by `layers_<i>`, is still read.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from variator_jax.backbones.base import FfnStack, Stack
from variator_jax.backbones.t5 import T5
from variator_jax.errors import CheckpointError, PluginError
from variator_jax.plugin import PluginConfig, PluginVariables, plugin_specs
from variator_jax.plugin.sites.ffn import LAYER
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
    expected = expected_leaves(config, T5(backbone.config).stack())
    folders.match_arrays(pathlib.Path(path) / ARRAYS, leaves, expected, ("float32",))
    content = describe_plugin(backbone, training, quality)
    holds = (re.escape(ARRAYS),)
    with folders.atomic_folder(path, replaces=(DESCRIPTION,), holds=holds) as draft:
        arrays_file.write_arrays(draft / ARRAYS, leaves)
        checksums = {ARRAYS: arrays_file.file_checksum(draft / ARRAYS)}
        content = {"config": config.to_json(), **content, CHECKSUMS: checksums}
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
    config, stack = _read_shape(fields)
    if backbone is not None:
        check_belongs(f"The plugin in {folder}", fields.content, backbone)
    try:
        expected = expected_leaves(config, stack)
    except PluginError as error:
        raise CheckpointError(f"{fields.path} is not usable: {error}") from error
    arrays = _by_path(arrays_file.read_arrays(folder / ARRAYS), config, fields)
    folders.match_arrays(folder / ARRAYS, arrays, expected, ("float32",))
    check_unchanged(fields, folder / ARRAYS)
    arrays_file.check_finite(folder / ARRAYS, arrays)
    return Plugin(config, to_variables(config, stack, arrays), fields.content)


def _by_path(
    arrays: Mapping[str, np.ndarray], config: PluginConfig, fields: Fields
) -> dict[str, np.ndarray]:
    """The arrays by module path; format 1 names them by layer."""
    if fields.content["format_version"] > 1:
        return dict(arrays)
    pattern = str(config.sites)

    def renamed(name: str) -> str:
        return re.sub(r"/layers_(\d+)", lambda m: "/" + pattern.replace(LAYER, m[1]), name, count=1)

    return {renamed(name): array for name, array in arrays.items()}


def to_variables(
    config: PluginConfig, stack: Stack, arrays: Mapping[str, np.ndarray]
) -> PluginVariables:
    """The arrays of a plugin from its leaves, which are those of `expected_leaves`."""
    params = {
        key: traverse_util.unflatten_dict(
            {name: jnp.array(arrays[f"params/{key}/{name}"]) for name in specs}, sep="/"
        )
        for key, specs in plugin_specs(config, stack).items()
    }
    scales = {key: jnp.array(arrays[f"output_scales/{key}"]) for key in params}
    return PluginVariables(params, scales)


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
    try:
        expected = expected_leaves(plugin.config, T5(backbone.config).stack())
    except PluginError as error:
        name = backbone.config.name
        raise CheckpointError(f"{what} does not fit backbone {name!r}: {error}") from error
    leaves = {name: np.asarray(leaf) for name, leaf in _leaves(plugin.variables).items()}
    folders.match_arrays(what, leaves, expected, ("float32",))


def read_config(fields: Fields, key: str = "config") -> PluginConfig:
    """The settings of a plugin under a key; fields that are absent take their defaults.

    Raises:
      CheckpointError: naming the file and what is wrong in it.
    """
    try:
        config = PluginConfig.from_json(fields.get(key, dict))
    except (PluginError, TypeError) as error:
        raise CheckpointError(f"{fields.path} has no usable {key}: {error}") from error
    for site in config.parts:
        if site.ratio > LARGEST_RATIO or getattr(site, "bottleneck", 1) > _MOST_WIDE:
            raise CheckpointError(
                f"{fields.path} has no usable {key}: a ratio is at most {LARGEST_RATIO:,} and a "
                f"bottleneck at most {_MOST_WIDE:,}; found {site}."
            )
    return config


def _read_shape(fields: Fields) -> tuple[PluginConfig, Stack]:
    """The settings and the backbone's encoder; every value checked for its type."""
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
    return config, FfnStack(layers, embed)


def _leaves(variables: PluginVariables) -> dict[str, Any]:
    return folders.flatten({"params": variables.params, "output_scales": variables.output_scales})


def expected_leaves(config: PluginConfig, stack: Stack) -> dict[str, jax.ShapeDtypeStruct]:
    """The leaves of a plugin on a stack, by path.

    Raises:
      PluginError: if the settings name layers that the stack does not have.
    """
    expected = {}
    for key, specs in plugin_specs(config, stack).items():
        expected[f"output_scales/{key}"] = jax.ShapeDtypeStruct((), jnp.float32)
        for name, spec in specs.items():
            expected[f"params/{key}/{name}"] = jax.ShapeDtypeStruct(spec.shape, jnp.float32)
    return expected
