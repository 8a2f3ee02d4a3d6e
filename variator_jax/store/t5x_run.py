"""A T5X run that trained a plugin: its checkpoints, read as a plugin that belongs to a backbone.

Such a checkpoint is any of T5X's with the plugin beside the backbone, under `target/plugin`;
`variator_plugin.json` in the run's folder has the settings of both. The engine that writes them is
`t5x_engine`.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from variator_jax.backbones.t5 import T5Config
from variator_jax.errors import CheckpointError
from variator_jax.plugin import PluginConfig, PluginVariables
from variator_jax.store import plugin_folder, t5x
from variator_jax.store.description import parse, parse_json
from variator_jax.store.plugin_folder import Plugin
from variator_jax.store.source import Backbone, Leaf, Source, Stream, identify
from variator_jax.store.t5x_tree import Sliced

SETTINGS = "variator_plugin.json"
# What a network computes and its leaves do not show.
_HIDDEN = ("mlp_activations", "layer_norm_epsilon")
_LAYER = re.compile(r"plugin/layers_(\d+)/(.+)")


@dataclasses.dataclass(frozen=True)
class _Settings:
    plugin: PluginConfig
    backbone: T5Config
    training: dict[str, Any]
    initial_checkpoint_path: str | None
    initial_plugin_path: Any = None


@dataclasses.dataclass(frozen=True)
class T5XRun:
    """A checkpoint with a plugin: complete and of the right shapes, nothing of it read yet.

    Attributes:
      folder: `checkpoint_<step>`, or its URL.
      where: the same with the settings' file, for messages.
      source: the backbone's leaves.
      config: the plugin's settings.
      arrays: the plugin's leaves, by the paths of a plugin folder.
      training: what made it, for people.
      described: whether there are settings; otherwise `config` was deduced from the shapes.
    """

    folder: str
    where: str
    source: Source
    config: PluginConfig
    arrays: Mapping[str, Sliced]
    training: Mapping[str, Any]
    described: bool


def load_t5x_plugin(
    path: str | os.PathLike,
    backbone: Backbone | None = None,
    progress: Callable[[Leaf], Any] | None = None,
) -> Plugin:
    """Reads the plugin that a T5X run trained, and which backbone it belongs to.

    The backbone is the one in the checkpoint, read for its fingerprint one array at a time. Without
    `variator_plugin.json` the settings are deduced from the shapes, which do not show whether
    layers were lost or padding was pooled.

    Args:
      path: as for `t5x.load_t5x`: `checkpoint_<step>`, the run's folder for its latest, or a URL.
      backbone: one that must be the checkpoint's, in any dtype of the same fingerprint; the
        plugin then carries its name and its vocabulary. Its parameters are not used.
      progress: called after each leaf of the backbone.

    Raises:
      CheckpointError: if anything is missing, damaged or does not fit, or `backbone` is another.
    """
    return read_plugin(open_run(t5x.open_checkpoint(path)), backbone, progress)


def open_run(checkpoint: t5x.Checkpoint) -> T5XRun:
    """A checkpoint with a plugin as a run.

    Raises:
      CheckpointError: if there is no plugin in it, or it is not complete.
    """
    where = checkpoint.where
    if not checkpoint.plugin:
        raise CheckpointError(f"{where} holds no compression plugin: its tree has no 'plugin'.")
    if not checkpoint.backbone:
        raise CheckpointError(
            f"{where} holds a compression plugin and no backbone to identify its owner; save whole "
            "checkpoints."
        )
    training: dict[str, Any] = {"source": f"T5X run, {pathlib.Path(checkpoint.folder).name}"}
    file, settings = _read_settings(checkpoint.folder)
    if settings is None:
        source = t5x.backbone_source(checkpoint)
        config = _deduce_config(where, checkpoint.plugin, source.config)
        training["settings"] = f"deduced from the shapes, for there was no {SETTINGS}"
    else:
        source, config = t5x.backbone_source(checkpoint, settings.backbone), settings.plugin
        where = f"{where} with {file}"
        training |= settings.training
        training["initial_checkpoint_path"] = settings.initial_checkpoint_path
    shape = source.config
    expected = plugin_folder.expected_leaves(
        where, config, shape.num_encoder_layers, shape.embed_dim
    )
    arrays = {path: checkpoint.plugin.get(_name(path)) for path in expected}
    check_arrays(where, checkpoint.plugin, {_name(path): like for path, like in expected.items()})
    return T5XRun(
        checkpoint.folder, where, source, config, arrays, training, described=settings is not None
    )


def _name(path: str) -> str:
    """What T5X's tree calls a leaf of a plugin folder."""
    branch, _, rest = path.partition("/")
    return f"{t5x.PLUGIN}{rest}" if branch == "params" else f"{t5x.PLUGIN}{rest}/output_scale"


def _read_settings(folder: str) -> tuple[str, _Settings | None]:
    """The run's settings, from the checkpoint or from the folder around it."""
    here = folder if t5x.is_url(folder) else os.path.abspath(folder)
    for place in (here, os.path.dirname(here)):
        file, content = f"{place}/{SETTINGS}", t5x.read_key(place, SETTINGS)
        if content is not None:
            return file, parse(_Settings, parse_json(file, content), file)
    return "", None


def _deduce_config(where: str, arrays: Mapping[str, Sliced], backbone: T5Config) -> PluginConfig:
    """The settings of a plugin by the shapes of its arrays: ratio, bottleneck, layers and halves."""
    layers, ratios, bottlenecks = set(), set(), set()
    for name, array in arrays.items():
        match = _LAYER.fullmatch(name)
        if match is None:
            continue
        layers.add(int(match[1]))
        if match[2] == "compression/kernel":
            ratios.add(array.shape[-1])
        elif match[2] == "decompression/input_bias":
            bottlenecks.add(array.shape[-1])
    learned = any("/decompression/" in name for name in arrays)
    if len(ratios) != 1 or len(bottlenecks) > 1 or learned > len(bottlenecks):
        raise CheckpointError(
            f"{where}: the plugin's shapes give ratios {sorted(ratios)} and bottlenecks "
            f"{sorted(bottlenecks)}; expected one each. {SETTINGS}, where T5X's runs keep them, is "
            "missing."
        )
    every = sorted(layers) == list(range(backbone.num_encoder_layers))
    return PluginConfig(
        ratios.pop(),
        bottleneck=bottlenecks.pop() if learned else PluginConfig(2).bottleneck,
        layers=None if every else tuple(sorted(layers)),
        decompression="bottleneck" if learned else "repeat",
    )


def read_plugin(
    run: T5XRun,
    backbone: Backbone | None = None,
    progress: Callable[[Leaf], Any] | None = None,
) -> Plugin:
    """Reads an opened run, the backbone included; see `load_t5x_plugin`."""
    variables = read_variables(run)  # first: it is small and most likely to be damaged
    trained_on = identify(run.source, progress)
    if backbone is not None:
        _check_owner(run, trained_on, backbone)
    description = plugin_folder.describe_plugin(backbone or trained_on, run.training)
    return Plugin(run.config, variables, description)


def read_variables(run: T5XRun) -> PluginVariables:
    """Reads the plugin's arrays alone.

    Raises:
      CheckpointError: if one cannot be read or is not finite.
    """
    leaves = {path: np.asarray(array.read(...)) for path, array in run.arrays.items()}
    for path, leaf in leaves.items():
        check_finite(f"{run.where}: {_name(path)}", leaf)
    return plugin_folder.to_variables(run.config, run.source.config.num_encoder_layers, leaves)


def _check_owner(run: T5XRun, trained_on: Backbone, backbone: Backbone) -> None:
    """Compares the backbone in a checkpoint with the one that its plugin shall belong to."""
    what = f"The plugin in {run.where} was trained on backbone {trained_on.config.name!r} with"
    if trained_on.fingerprint == backbone.fingerprint:
        for setting in _HIDDEN if run.described else ():
            given, expected = getattr(backbone.config, setting), getattr(trained_on.config, setting)
            if given != expected:
                raise CheckpointError(
                    f"{what} {setting} {expected}; the given backbone has the same weights and "
                    f"{setting} {given}."
                )
        return
    hint = "is another one. Name the one that the run started from, or take the run's own"
    if _is_cast(run.source, backbone):
        hint = (
            "is the same one cast to float16, which changes what it computes. Name it in float32 or "
            "bfloat16, which have one fingerprint, or make such a folder"
        )
    raise CheckpointError(
        f"{what} fingerprint {trained_on.fingerprint}; the given backbone "
        f"{backbone.config.name!r} with fingerprint {backbone.fingerprint} {hint}: "
        f"variator convert --from t5x --to variator {run.folder} DST"
    )


def _is_cast(source: Source, backbone: Backbone) -> bool:
    """Whether a backbone of another fingerprint differs by its cast to float16 and nothing else."""
    if backbone.config.param_dtype != "float16":
        return False  # float32 and bfloat16 have one fingerprint
    stream = Stream(source, np.float16)
    try:
        for _ in stream:
            pass
    except CheckpointError:  # beyond float16's range, so that no folder can hold its cast
        return False
    return stream.fingerprint == backbone.fingerprint
