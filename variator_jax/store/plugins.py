"""Plugin folders, `plugin.json` and `plugin.safetensors`, and sets of them for one backbone.

Format 2 keeps a list of sites, and arrays by module path; format 1, with FFN sites only and arrays
by `layers_<i>`, is still read. A set holds `plugins.json` and a plugin folder `ratio_<k>` each;
which folders are read as sets is decided in `formats.load_plugins`.
"""

import collections
import dataclasses
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from variator_jax.backbones.base import FfnStack, Stack
from variator_jax.backbones.t5 import T5
from variator_jax.errors import CheckpointError, PluginError
from variator_jax.files import AnyPath, atomic_folder, check_folder, wrap_errors
from variator_jax.plugin import PluginConfig, PluginVariables, plugin_specs
from variator_jax.plugin.sites.ffn import LAYER
from variator_jax.store import arrays, description
from variator_jax.store.backbone import Backbone

INDEX, VERSION = "plugins.json", 2
Key = int | str  # a ratio, or the name of one of several plugins of the same ratio
_MEMBER = r"\w+/plugin\.(json|safetensors)"
_MOST_LAYERS = 1000  # far above any use, and too few to exhaust the memory


@dataclasses.dataclass(frozen=True)
class Plugin:
    """A compression plugin for one ratio of one backbone.

    `description` is that of its folder: `backbone` with name, fingerprint, layers, width and the
    LoRA in it, if any; `vocabulary_fingerprint`, `training` and `quality`; empty for a new one.
    """

    config: PluginConfig
    variables: PluginVariables
    description: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of parameters and output scales, as 64 hex digits."""
        params, scales = self.variables.params, self.variables.output_scales
        return arrays.fingerprint({"params": params, "scales": scales})


def by_key(plugins: Iterable[Plugin]) -> dict[Key, Plugin]:
    """Plugins by what they are asked for, in rising order of ratio: by their ratio where only one
    of them has it, else by their name.

    Raises:
      PluginError: if two have the same name.
    """
    listed = sorted(plugins, key=lambda plugin: (plugin.config.ratio, plugin.config.name))
    ratios = collections.Counter(plugin.config.ratio for plugin in listed)
    keys = [p.config.ratio if ratios[p.config.ratio] == 1 else p.config.name for p in listed]
    for name, count in collections.Counter(plugin.config.name for plugin in listed).items():
        if count > 1:
            sites = [p.config.description for p in listed if p.config.name == name]
            both = f"'{sites[0]}' and '{sites[1]}'"
            remedy = "Give one another name: PLUGIN_NAME in gin, given_name of PluginConfig"
            raise PluginError(f"Two plugins are called {name!r}: {both}. {remedy}.")
    return dict(zip(keys, listed, strict=True))


@dataclasses.dataclass(frozen=True)
class _PluginOwner(description.Owner):
    num_encoder_layers: int
    embed_dim: int
    lora: dict[str, str] | None = None  # fingerprint and task


@dataclasses.dataclass(frozen=True)
class _Description:
    config: dict[str, Any]
    backbone: _PluginOwner
    vocabulary_fingerprint: str | None
    training: dict[str, Any]
    quality: dict[str, float]
    file_checksums: dict[str, str]
    matrices: dict[str, list[int]] = dataclasses.field(default_factory=dict)  # that have adapters


@dataclasses.dataclass(frozen=True)
class _SetDescription:
    backbone: description.Owner
    ratios: list[int]
    file_checksums: dict[str, str]
    names: list[str] = dataclasses.field(default_factory=list)


def save_plugin(
    path: AnyPath,
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
    write_plugin(path, plugin)


def write_plugin(path: AnyPath, plugin: Plugin) -> None:
    """Writes a plugin folder as `save_plugin` does, with the description that the plugin has."""
    content = {"config": plugin.config.to_json(), **plugin.description}
    if matrices := _adapted(plugin.variables):
        content["matrices"] = matrices
    description.save_folder(path, "plugin", _leaves(plugin.variables), content, VERSION)


def _adapted(variables: PluginVariables) -> dict[str, list[int]]:
    """The frozen matrices that have adapters: module path -> [in, out]."""
    pairs = [params.get("adapters", {}) for params in variables.params.values()]
    flat = {name: array for pair in pairs for name, array in arrays.flatten(pair).items()}
    paths = [name.removesuffix("/a") for name in flat if name.endswith("/a")]
    return {path: [flat[f"{path}/a"].shape[0], flat[f"{path}/b"].shape[1]] for path in paths}


def describe_plugin(
    backbone: Backbone,
    training: Mapping[str, Any] | None = None,
    quality: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """The description of a plugin that belongs to `backbone`."""
    shape = {name: getattr(backbone.config, name) for name in ("num_encoder_layers", "embed_dim")}
    lora = {"lora": dict(backbone.lora)} if backbone.lora else {}
    return {
        "backbone": {**description.owner_content(backbone), **shape, **lora},
        "vocabulary_fingerprint": backbone.vocabulary_fingerprint,
        "training": dict(training or {}),
        "quality": dict(quality or {}),
    }


def load_plugin(path: AnyPath, backbone: Backbone | None = None) -> Plugin:
    """Reads a plugin folder, and checks that it belongs to `backbone` where one is given.

    Raises:
      CheckpointError: if anything is missing or damaged, or the plugin is another backbone's.
    """
    folder = check_folder(path)
    file = folder / "plugin.json"
    record, content = description.read_description(file, "plugin", _Description, VERSION)
    if backbone is not None:
        description.check_belongs(f"The plugin in {folder}", content, backbone)
    owner = record.backbone
    if owner.num_encoder_layers > _MOST_LAYERS:
        raise CheckpointError(f"{file} is not usable: {owner.num_encoder_layers} encoder layers.")
    with wrap_errors(f"{file} is not usable"):
        pairs = record.matrices.items()
        matrices = tuple((path, (rows, columns)) for path, (rows, columns) in pairs)
        stack = FfnStack(owner.num_encoder_layers, owner.embed_dim, known=matrices)
        config = PluginConfig.from_json(record.config)
        expected = expected_leaves(config, stack)
    new = isinstance(record.config.get("sites"), list)
    names = {x: x if new else _format_1_name(x, str(config.sites)) for x in expected}
    stored = {names[name]: like for name, like in expected.items()}
    leaves = description.load_arrays(folder, "plugin", stored, record.file_checksums)
    leaves = {name: leaves[names[name]] for name in expected}
    return Plugin(config, to_variables(config, stack, leaves), content)


def _format_1_name(name: str, pattern: str) -> str:
    """What a folder of format 1 calls an array: by its layer and not by its module's path."""
    path = re.escape(pattern).replace(re.escape(LAYER), LAYER)
    return re.sub(rf"/{path}", r"/layers_\1", name, count=1)


def _leaves(variables: PluginVariables) -> dict[str, Any]:
    return arrays.flatten({"params": variables.params, "output_scales": variables.output_scales})


def expected_leaves(config: PluginConfig, stack: Stack) -> dict[str, jax.ShapeDtypeStruct]:
    """The leaves of a plugin on a stack, by the names of its file.

    Raises:
      PluginError: if the settings name layers that the stack does not have.
    """
    specs = plugin_specs(config, stack)
    shapes: dict[str, tuple[int, ...]] = {f"output_scales/{key}": () for key in specs}
    for key, group in specs.items():
        shapes |= {f"params/{key}/{name}": spec.shape for name, spec in group.items()}
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}


def to_variables(
    config: PluginConfig, stack: Stack, leaves: Mapping[str, np.ndarray]
) -> PluginVariables:
    """The arrays of a plugin from its leaves, which are those of `expected_leaves`."""
    specs = plugin_specs(config, stack)
    params = {
        key: arrays.unflatten({x: jnp.array(leaves[f"params/{key}/{x}"]) for x in group})
        for key, group in specs.items()
    }
    scales = {key: jnp.array(leaves[f"output_scales/{key}"]) for key in specs}
    return PluginVariables(params, scales)


def check_plugin(plugin: Plugin, backbone: Backbone) -> None:
    """Refuses a plugin that does not run on a backbone.

    Raises:
      CheckpointError: if its description, which a new plugin has not, names another backbone, with
        both fingerprints; or for an array that does not fit.
    """
    what = f"The plugin {plugin.config.name}"
    if "backbone" in plugin.description:
        description.check_belongs(what, plugin.description, backbone)
    check_shapes(what, plugin, backbone)


def check_shapes(what: str, plugin: Plugin, backbone: Backbone) -> None:
    """Compares a plugin's arrays with what its settings need on a backbone.

    Raises:
      CheckpointError: naming the first array that is missing, unexpected or misshapen.
    """
    owner = f"{what} on backbone {backbone.config.name!r}"
    with wrap_errors(f"{owner} is not usable"):
        expected = expected_leaves(plugin.config, T5(backbone.config).stack())
    arrays.check_arrays(owner, _leaves(plugin.variables), expected)


def save_plugins(path: AnyPath, plugins: Mapping[Key, Plugin], backbone: Backbone) -> None:
    """Writes a set atomically: one folder `ratio_<k>` or `<name>` a plugin, and the index.

    Args:
      path: the folder; a set that is there already is replaced.
      plugins: by ratio or name, see `by_key`; their records of training and quality are kept.
      backbone: the backbone they belong to.

    Raises:
      CheckpointError: if there are none, a key is not its plugin's ratio or name, or one belongs
        to another backbone.
    """
    if not plugins:
        raise CheckpointError(f"There are no plugins to write to {path}.")
    by_key(plugins.values())  # refuses two of one name, which could not be loaded again
    with atomic_folder(path, replaces=(INDEX,), holds=_MEMBER) as draft:
        for key, plugin in plugins.items():
            what, before = f"The plugin {plugin.config.name}", plugin.description
            if key not in (plugin.config.ratio, plugin.config.name):
                raise CheckpointError(f"{what} is given as that of ratio {key}.")
            if "backbone" in before:
                description.check_belongs(what, before, backbone)
            records = before.get("training"), before.get("quality")
            save_plugin(draft / _member(key), plugin.config, plugin.variables, backbone, *records)
        ratios = [key for key in plugins if isinstance(key, int)]
        content = {"backbone": description.owner_content(backbone), "ratios": ratios}
        if names := [key for key in plugins if isinstance(key, str)]:
            content["names"] = names
        description.write_description(draft / INDEX, "plugin_set", content)


def _member(key: Key) -> str:
    return f"ratio_{key}" if isinstance(key, int) else key


def indexed_members(folder: pathlib.Path) -> list[pathlib.Path]:
    """The plugin folders that the index of a set names."""
    record, _ = description.read_description(folder / INDEX, "plugin_set", _SetDescription)
    keys: list[Key] = [*record.ratios, *record.names]
    return [folder / _member(key) for key in keys]
