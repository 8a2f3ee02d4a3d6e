"""A T5X run that trained a plugin: its checkpoints, read as a plugin that belongs to a backbone.

Such a checkpoint is any of T5X's with the plugin next to the backbone, under `target/plugin`;
`variator_plugin.json` in the run's folder has the settings of both. The engine that writes them is
`t5x_engine`.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from variator_jax.backbones.t5 import T5, T5Config
from variator_jax.errors import CheckpointError
from variator_jax.files import is_url, wrap_errors
from variator_jax.plugin import PluginConfig, PluginVariables
from variator_jax.store import arrays, plugins, t5x
from variator_jax.store.arrays import Stored
from variator_jax.store.backbone import Backbone, Leaf, Source, identify
from variator_jax.store.description import parse, parse_json
from variator_jax.store.plugins import Plugin

SETTINGS = "variator_plugin.json"


@dataclasses.dataclass(frozen=True)
class _Settings:
    plugin: dict[str, Any]
    backbone: T5Config
    training: dict[str, Any]
    initial_checkpoint_path: str | None
    initial_plugin_path: Any = None


@dataclasses.dataclass(frozen=True)
class T5XRun:
    """A checkpoint with a plugin: complete and of the right shapes, nothing of it read yet.

    Attributes:
      folder: `checkpoint_<step>`, or its URL.
      origin: the same with the settings' file, for messages.
      source: the backbone's leaves.
      config: the plugin's settings.
      leaves: the plugin's leaves, by their names in the checkpoint.
      training: what made it, for people.
    """

    folder: str
    origin: str
    source: Source
    config: PluginConfig
    leaves: Mapping[str, Stored]
    training: Mapping[str, Any]


def load_t5x_plugin(path: str | os.PathLike, backbone: Backbone | None = None) -> Plugin:
    """Reads the plugin that a T5X run trained, and which backbone it belongs to.

    The backbone is the one in the checkpoint, read for its fingerprint one array at a time.

    Args:
      path: as for `t5x.open_checkpoint`: `checkpoint_<step>`, the run's folder for its latest, or a
        URL. `variator_plugin.json` must be in it or in the folder around it.
      backbone: one that must be the checkpoint's, in any dtype of the same fingerprint; the
        plugin then carries its name and its vocabulary. Its parameters are not used.

    Raises:
      CheckpointError: if anything is missing, damaged or does not fit, or `backbone` is another.
    """
    return read_plugin(open_run(t5x.open_checkpoint(path)), backbone)


def open_run(checkpoint: t5x.Checkpoint) -> T5XRun:
    """A checkpoint with a plugin as a run.

    Raises:
      CheckpointError: if there is no plugin in it, or it is not complete.
    """
    origin = checkpoint.origin
    if not checkpoint.plugin:
        raise CheckpointError(f"{origin} holds no compression plugin: its tree has no 'plugin'.")
    if not checkpoint.backbone:
        raise CheckpointError(f"{origin} holds a compression plugin and no backbone.")
    file, settings = _read_settings(checkpoint.folder)
    origin = f"{origin} with {file}"
    source = t5x.backbone_source(checkpoint, settings.backbone)
    with wrap_errors(f"{origin} is not usable"):
        config = PluginConfig.from_json(settings.plugin)
        expected = plugins.expected_leaves(config, T5(source.config).stack())
    named = {_name(path): like for path, like in expected.items()}
    arrays.check_arrays(origin, checkpoint.plugin, named)
    training = {"source": f"T5X run, {pathlib.Path(checkpoint.folder).name}", **settings.training}
    training["initial_checkpoint_path"] = settings.initial_checkpoint_path
    return T5XRun(checkpoint.folder, origin, source, config, checkpoint.plugin, training)


def _name(path: str) -> str:
    """What T5X's tree calls a leaf of a plugin folder."""
    branch, _, name = path.partition("/")
    return f"{t5x.PLUGIN}{name}" if branch == "params" else f"{t5x.PLUGIN}{name}/output_scale"


def _read_settings(folder: str) -> tuple[str, _Settings]:
    """The run's settings, from the checkpoint or from the folder around it."""
    here = folder if is_url(folder) else os.path.abspath(folder)
    for place in (here, os.path.dirname(here)):
        file, content = f"{place}/{SETTINGS}", t5x.read_key(place, SETTINGS)
        if content is not None:
            return file, parse(_Settings, parse_json(file, content), file)
    raise CheckpointError(f"There is no {SETTINGS} in {here} or around it, with a run's settings.")


def read_plugin(
    run: T5XRun,
    backbone: Backbone | None = None,
    progress: Callable[..., Iterable[Leaf]] = iter,
) -> Plugin:
    """Reads an opened run, the backbone included; see `load_t5x_plugin`.

    Args:
      run: the run.
      backbone: one that must be the run's.
      progress: as for `Stream`.
    """
    variables = read_variables(run)  # first: it is small and most likely to be damaged
    trained_on = identify(run.source, progress)
    if backbone is not None:
        _check_owner(run, trained_on, backbone)
    description = plugins.describe_plugin(backbone or trained_on, run.training)
    return Plugin(run.config, variables, description)


def read_variables(run: T5XRun) -> PluginVariables:
    """Reads the plugin's arrays alone.

    Raises:
      CheckpointError: if one cannot be read or is not finite.
    """
    stack = T5(run.source.config).stack()
    leaves = arrays.read_arrays(run.origin, run.leaves, run.leaves)
    expected = plugins.expected_leaves(run.config, stack)
    return plugins.to_variables(run.config, stack, {x: leaves[_name(x)] for x in expected})


def _check_owner(run: T5XRun, trained_on: Backbone, backbone: Backbone) -> None:
    """Compares the backbone in a checkpoint with the expected owner of its plugin."""
    if trained_on.fingerprint != backbone.fingerprint:
        raise CheckpointError(
            f"The plugin in {run.origin} was trained on backbone {trained_on.config.name!r} with "
            f"fingerprint {trained_on.fingerprint}; the given {backbone.config.name!r} with "
            f"fingerprint {backbone.fingerprint} is another one, or was cast to float16. Take the "
            f"run's own: variator convert --from t5x --to variator {run.folder} DST"
        )
    for setting in ("mlp_activations", "layer_norm_epsilon"):  # which weights do not show
        given, expected = getattr(backbone.config, setting), getattr(trained_on.config, setting)
        if given != expected:
            raise CheckpointError(
                f"The plugin in {run.origin} was trained with {setting} {expected}; the given "
                f"backbone has the same weights and {setting} {given}."
            )
