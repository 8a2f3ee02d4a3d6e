"""Plugin folders, `plugin.json` and `plugin.safetensors`, and sets of them for one backbone.

A set that `save_plugins` wrote holds `plugins.json` and a plugin folder `ratio_<k>` each. Any other
folder whose folders are plugins, or runs that ended with one, is a set, too.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from variator_jax.errors import CheckpointError, PluginError
from variator_jax.files import atomic_folder
from variator_jax.plugin import PluginConfig, PluginVariables, init_plugin, layer_name
from variator_jax.store import arrays, formats
from variator_jax.store.description import (
    Sha256,
    config_content,
    load_arrays,
    read_description,
    save_folder,
    write_description,
)
from variator_jax.store.source import Backbone, title

INDEX = "plugins.json"
_MEMBER = r"ratio_\d+/plugin\.(json|safetensors)"
# Far above any use, and low enough that nothing a description claims can exhaust the memory.
_MOST_LAYERS, _LARGEST_RATIO = 1000, 1 << 12


@dataclasses.dataclass(frozen=True)
class Plugin:
    """A compression plugin for one ratio of one backbone.

    `description` is that of its folder: `backbone` with name, fingerprint, layers, width and the
    LoRA in it, if any; `vocabulary_fingerprint`, `training` and `quality`; empty for a new one.
    """

    config: PluginConfig
    variables: PluginVariables
    description: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Owner:
    """The backbone that a plugin, a set of them or a LoRA belongs to."""

    name: str
    fingerprint: Sha256


@dataclasses.dataclass(frozen=True)
class _LoraIdentity:
    fingerprint: Sha256
    task: str


@dataclasses.dataclass(frozen=True)
class _PluginOwner(Owner):
    num_encoder_layers: int
    embed_dim: int
    lora: _LoraIdentity | None = None


@dataclasses.dataclass(frozen=True)
class _Description:
    config: PluginConfig
    backbone: _PluginOwner
    vocabulary_fingerprint: Sha256 | None
    training: dict[str, Any]
    quality: dict[str, float]
    file_checksums: dict[str, Sha256]


@dataclasses.dataclass(frozen=True)
class _SetDescription:
    backbone: Owner
    ratios: list[int]
    file_checksums: dict[str, Sha256]


def save_plugin(
    path: str | os.PathLike,
    config: PluginConfig,
    variables: PluginVariables,
    backbone: Backbone,
    training: Mapping[str, Any] | None = None,
    quality: Mapping[str, float] | None = None,
) -> None:
    """Writes a plugin folder atomically.

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
    plugin = Plugin(config, variables, describe_plugin(backbone, training, quality))
    check_shapes(str(path), plugin, backbone)
    content = {"config": config_content(config), **plugin.description}
    save_folder(path, "plugin", to_leaves(variables), content)


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
    folder = formats.check_folder(path)
    description, content = read_description(folder / "plugin.json", "plugin", _Description)
    if backbone is not None:
        check_belongs(f"The plugin in {folder}", content, backbone)
    config, owner = description.config, description.backbone
    if owner.num_encoder_layers > _MOST_LAYERS or config.ratio > _LARGEST_RATIO:
        raise CheckpointError(
            f"{folder} is not usable: ratio {config.ratio}, {owner.num_encoder_layers} layers."
        )
    expected = expected_leaves(str(folder), config, owner.num_encoder_layers, owner.embed_dim)
    leaves = load_arrays(folder, "plugin", expected, description.file_checksums)
    return Plugin(config, to_variables(config, owner.num_encoder_layers, leaves), content)


def to_leaves(variables: PluginVariables) -> dict[str, Any]:
    """A plugin's arrays by the names of its file."""
    return arrays.flatten({"params": variables.params, "output_scales": variables.output_scales})


def to_variables(
    config: PluginConfig, layers: int, leaves: Mapping[str, np.ndarray]
) -> PluginVariables:
    """The arrays of a plugin from its leaves, which are those of `expected_leaves`."""
    tree = arrays.unflatten({name: jnp.array(leaf) for name, leaf in leaves.items()})
    # The ablations have layers without parameters, which a file of arrays cannot name.
    names = [layer_name(layer) for layer in config.compressed_layers(layers)]
    params = {name: tree.get("params", {}).get(name, {}) for name in names}
    return PluginVariables(params, tree.get("output_scales", {}))


def expected_leaves(
    what: str, config: PluginConfig, layers: int, embed: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """The leaves of a plugin on an encoder of so many layers and that width, by path.

    Raises:
      CheckpointError: if the settings name layers that the encoder does not have.
    """
    try:
        compressed = config.compressed_layers(layers)
    except PluginError as error:
        raise CheckpointError(f"{what} is not usable: {error}") from error
    one = dataclasses.replace(config, layers=None, sites=PluginConfig(2).sites)
    leaves = _layer_leaves(one, embed) if config.ratio > 1 else {}
    return {
        name.replace(layer_name(0), layer_name(layer)): leaf
        for layer in compressed
        for name, leaf in leaves.items()
    }


@functools.lru_cache
def _layer_leaves(config: PluginConfig, embed: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The leaves of a plugin on an encoder of one layer; more layers only repeat them."""
    return to_leaves(jax.eval_shape(lambda: init_plugin(config, 1, embed, jax.random.key(0))))


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
        hint = ""
        if owner.get("lora") and not backbone.lora:
            hint = " Give its LoRA, too: INITIAL_LORA_PATH, or load_backbone(..., lora=...)."
        raise CheckpointError(
            f"{what} belongs to backbone {title(owner['name'], owner.get('lora'))} with "
            f"fingerprint {owner['fingerprint']}; this backbone is {backbone.title} with "
            f"fingerprint {backbone.fingerprint}.{hint}"
        )
    theirs, ours = description["vocabulary_fingerprint"], backbone.vocabulary_fingerprint
    if theirs and ours and theirs != ours:
        raise CheckpointError(
            f"{what} was trained with the vocabulary of fingerprint {theirs}; the backbone's "
            f"vocabulary has {ours}, so that the same text would become other tokens."
        )


def check_shapes(what: str, plugin: Plugin, backbone: Backbone) -> None:
    """Compares a plugin's arrays with what its settings need on a backbone.

    Raises:
      CheckpointError: naming the first array that is missing, unexpected or misshapen.
    """
    shape = backbone.config
    expected = expected_leaves(
        f"{what} on backbone {shape.name!r}",
        plugin.config,
        shape.num_encoder_layers,
        shape.embed_dim,
    )
    arrays.check_arrays(what, to_leaves(plugin.variables), expected)


def save_plugins(
    path: str | os.PathLike, plugins: Mapping[int, Plugin], backbone: Backbone
) -> None:
    """Writes a set atomically: one folder `ratio_<k>` a plugin, and the index.

    Args:
      path: the folder; a set that is there already is replaced.
      plugins: by compression ratio; their records of training and quality are kept.
      backbone: the backbone they belong to.

    Raises:
      CheckpointError: if there are none, a key is not its plugin's ratio, or one belongs to
        another backbone.
    """
    if not plugins:
        raise CheckpointError(f"There are no plugins to write to {path}.")
    with atomic_folder(path, replaces=(INDEX,), holds=_MEMBER) as draft:
        for ratio, plugin in sorted(plugins.items()):
            what = f"The plugin of ratio {plugin.config.ratio}"
            if ratio != plugin.config.ratio:
                raise CheckpointError(f"{what} is given as that of ratio {ratio}.")
            before = plugin.description
            if "backbone" in before:
                check_belongs(what, before, backbone)
            records = before.get("training"), before.get("quality")
            member = draft / f"ratio_{ratio}"
            save_plugin(member, plugin.config, plugin.variables, backbone, *records)
        owner = {"name": backbone.config.name, "fingerprint": backbone.fingerprint}
        content = {"backbone": owner, "ratios": sorted(plugins)}
        write_description(draft / INDEX, "plugin_set", content)


def load_plugins(path: str | os.PathLike, backbone: Backbone | None = None) -> dict[int, Plugin]:
    """Reads the plugins of one backbone, by compression ratio in rising order.

    Args:
      path: a plugin folder, a set, a run folder, or a folder of plugin or run folders; or a T5X
        checkpoint with a plugin, whose backbone is read to the end for its fingerprint.
      backbone: the backbone they must belong to; None leaves that to whoever uses them.

    Raises:
      CheckpointError: if there is none, one is damaged, two have the same ratio, or not all belong
        to the same backbone.
    """
    folder = formats.check_folder(path)
    kind = formats.kind_of(folder)
    if kind == formats.RUN:
        folder = folder / "plugin"
        if not folder.is_dir():
            raise CheckpointError(
                f"The run folder {folder.parent} holds no plugin (yet): a run writes it when it ends."
            )
        kind = formats.PLUGIN
    if kind == formats.T5X:
        from variator_jax.store.t5x_run import load_t5x_plugin  # most users have none

        plugin = load_t5x_plugin(folder, backbone)
        return {plugin.config.ratio: plugin}
    if kind == formats.PLUGIN:
        plugin = load_plugin(folder, backbone)
        return {plugin.config.ratio: plugin}
    members = [] if kind == formats.BACKBONE else _members(folder)
    if not members:
        raise formats.unknown(folder, "plugin (plugin.json) or folder of plugins")
    return _by_ratio(folder, {member: load_plugin(member, backbone) for member in members})


def _members(folder: pathlib.Path) -> list[pathlib.Path]:
    """The plugin folders of a set; where there is an index, exactly those that it names."""
    folders = formats.plugin_folders(folder)
    index = folder / INDEX
    if not os.path.lexists(index):
        return folders
    description, _ = read_description(index, "plugin_set", _SetDescription)
    named = [folder / f"ratio_{ratio}" for ratio in description.ratios]
    differing = sorted(set(named) ^ set(folders))
    if differing or not named:
        names = ", ".join(item.name for item in differing) or "no plugin"
        raise CheckpointError(
            f"{folder}: {INDEX} and the plugins in it differ in {names}. Write the set again with "
            f"save_plugins, or remove {INDEX}."
        )
    return named


def _by_ratio(folder: pathlib.Path, loaded: Mapping[pathlib.Path, Plugin]) -> dict[int, Plugin]:
    """The members by ratio, if they belong to one backbone."""
    places: dict[int, pathlib.Path] = {}
    first, first_plugin = next(iter(loaded.items()))
    for member, plugin in loaded.items():
        one, other = (each.description["backbone"] for each in (first_plugin, plugin))
        if one["fingerprint"] != other["fingerprint"]:
            raise CheckpointError(
                f"{folder} mixes backbones: {first.relative_to(folder)} belongs to "
                f"{one['name']!r} with fingerprint {one['fingerprint']}, "
                f"{member.relative_to(folder)} to {other['name']!r} with fingerprint "
                f"{other['fingerprint']}."
            )
        known = places.setdefault(plugin.config.ratio, member)
        if known is not member:
            raise CheckpointError(
                f"{folder} holds two plugins of ratio {plugin.config.ratio}: "
                f"{known.relative_to(folder)} and {member.relative_to(folder)}."
            )
    return {ratio: loaded[places[ratio]] for ratio in sorted(places)}
