"""A T5X run that trained a plugin: its checkpoints, read as a plugin that belongs to a backbone.

Such a checkpoint is any of T5X's with the plugin beside the backbone, under `target/plugin`, and
`variator_plugin.json` in the run's folder says what both are. The engine that writes them is
elsewhere; how T5X keeps arrays is `t5x.py`'s business.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import numpy as np

from variator_jax.backbones.t5 import T5
from variator_jax.errors import CheckpointError, PluginError
from variator_jax.plugin import PluginConfig, PluginVariables
from variator_jax.store import arrays_file, folders, plugin_folder, stores, stream, t5x
from variator_jax.store.backbone_folder import Backbone
from variator_jax.store.backbone_folder import read_config as read_backbone_config
from variator_jax.store.description import Fields
from variator_jax.store.plugin_folder import Plugin
from variator_jax.store.plugin_shapes import deduce_config
from variator_jax.store.stores import StoredArray
from variator_jax.store.stream import Leaf, Source

SETTINGS = "variator_plugin.json"
_LONGEST = 10_000_000  # bytes; no settings are that long
# What a network computes and its leaves do not show.
_UNSEEN = ("mlp_activations", "layer_norm_epsilon")


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
    arrays: Mapping[str, StoredArray]
    training: Mapping[str, Any]
    described: bool


def load_t5x_plugin(
    path: str | os.PathLike,
    backbone: Backbone | None = None,
    progress: Callable[[Leaf], None] | None = None,
) -> Plugin:
    """Reads the plugin that a T5X run trained, and which backbone it belongs to.

    The backbone is the one in the checkpoint. Its fingerprint is made leaf by leaf, so that it is
    read from end to end and never held. `variator_plugin.json` in the checkpoint or in the folder
    around it has the settings; without it they are deduced from the shapes, where nothing can tell
    a plugin of fewer layers from one that lost some, or that padding was pooled.

    Args:
      path: as for `t5x.load_t5x`: `checkpoint_<step>`, the run's folder for its latest, or a URL.
      backbone: one that must be the checkpoint's, in any dtype of the same fingerprint; the
        plugin then carries its name and its vocabulary. Its parameters are not looked at.
      progress: called after each leaf of the backbone.

    Raises:
      CheckpointError: if anything is missing, damaged or does not fit, or `backbone` is another.
    """
    return read_plugin(open_t5x_run(path), backbone, progress)


def open_t5x_run(path: str | os.PathLike) -> T5XRun:
    """Opens a checkpoint with a plugin; `path` as for `load_t5x_plugin`.

    Raises:
      CheckpointError: if there is no plugin in it, or it is not complete.
    """
    return run_of(t5x.open_checkpoint(path))


def run_of(checkpoint: t5x.Checkpoint) -> T5XRun:
    """What an opened checkpoint is as a run; errors as `open_t5x_run`."""
    where = checkpoint.where
    if not checkpoint.plugin:
        raise CheckpointError(
            f"{where} holds no compression plugin: its tree has no {t5x.PLUGIN.strip('/')!r}."
        )
    if not checkpoint.backbone:
        raise CheckpointError(
            f"{where} holds a compression plugin and no backbone, so that nothing tells which one "
            "the plugin belongs to; save whole checkpoints."
        )
    training: dict[str, Any] = {"source": f"T5X run, {pathlib.Path(checkpoint.folder).name}"}
    said = _read_settings(checkpoint.folder)
    if said is None:
        source = t5x.backbone_source(checkpoint)
        config = deduce_config(where, checkpoint.plugin, source.config)
        training["settings"] = f"deduced from the shapes, for there was no {SETTINGS}"
    else:
        source = t5x.backbone_source(checkpoint, read_backbone_config(said, "backbone"))
        config = plugin_folder.read_config(said, "plugin")
        where = f"{where} with {said.path}"
        training.update(said.get("training", dict))
        training["initial_checkpoint_path"] = said.get("initial_checkpoint_path", str, type(None))
    arrays = _matched(where, config, checkpoint.plugin, source)
    return T5XRun(
        checkpoint.folder, where, source, config, arrays, training, described=said is not None
    )


def read_plugin(
    run: T5XRun,
    backbone: Backbone | None = None,
    progress: Callable[[Leaf], None] | None = None,
) -> Plugin:
    """Reads an opened run, the backbone included; see `load_t5x_plugin`."""
    variables = read_variables(run)  # first, for it is small and most likely what is damaged
    own = stream.identify(run.source, progress)
    if backbone is not None:
        _check_owner(run, own, backbone)
    description = plugin_folder.describe_plugin(backbone or own, run.training)
    return Plugin(run.config, variables, description)


def read_variables(run: T5XRun) -> PluginVariables:
    """Reads the plugin's arrays alone.

    Raises:
      CheckpointError: if one cannot be read or is not finite.
    """
    leaves = {leaf: np.asarray(array.read(...)) for leaf, array in run.arrays.items()}
    named = {_origin(leaf): array for leaf, array in leaves.items()}
    arrays_file.check_finite(pathlib.Path(run.where), named)
    return plugin_folder.to_variables(run.config, T5(run.source.config).stack(), leaves)


def _read_settings(folder: str) -> Fields | None:
    """What the run says of itself, in the checkpoint or in the folder around it."""
    here = folder if stores.is_url(folder) else str(pathlib.Path(folder).absolute())
    for place in (here, os.path.dirname(here)):
        content = stores.read_key(stores.folder(place), SETTINGS)
        if content is not None:
            return _parsed(pathlib.Path(place) / SETTINGS, content)
    return None


def _parsed(file: pathlib.Path, content: bytes) -> Fields:
    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no number of JSON")

    if len(content) > _LONGEST:
        raise CheckpointError(f"{file} is longer than {_LONGEST:,} bytes: no settings are.")
    try:
        found = json.loads(content, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not readable JSON: {error}.") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} does not describe a T5X run with a plugin.")
    return Fields(file, found)


def _matched(
    where: str, config: PluginConfig, found: Mapping[str, StoredArray], source: Source
) -> dict[str, StoredArray]:
    """The plugin's arrays by our paths, which are exactly those that its settings ask for."""
    try:
        expected = plugin_folder.expected_leaves(config, T5(source.config).stack())
    except PluginError as error:
        raise CheckpointError(f"{where}: {error}") from error
    origins = {_origin(leaf): like for leaf, like in expected.items()}
    folders.match_arrays(where, found, origins, ("float32",))
    return {leaf: found[_origin(leaf)] for leaf in expected}


def _origin(leaf: str) -> str:
    """What T5X's tree calls a leaf of a plugin folder."""
    branch, _, rest = leaf.partition("/")
    return f"{t5x.PLUGIN}{rest}" if branch == "params" else f"{t5x.PLUGIN}{rest}/output_scale"


def _check_owner(run: T5XRun, own: Backbone, backbone: Backbone) -> None:
    """Compares the backbone in a checkpoint with the one that its plugin shall belong to."""
    what = f"The plugin in {run.where} was trained on backbone {own.config.name!r} with"
    given = f"{backbone.config.name!r} with"
    if own.fingerprint == backbone.fingerprint:
        for setting in _UNSEEN if run.described else ():
            ours, theirs = getattr(backbone.config, setting), getattr(own.config, setting)
            if ours != theirs:
                raise CheckpointError(
                    f"{what} {setting} {theirs}; the backbone given, {given} {ours}, has the same "
                    "weights and computes something else."
                )
        return
    prints = f"{what} fingerprint {own.fingerprint}; the backbone given, {given} fingerprint "
    prints += f"{backbone.fingerprint},"
    convert = f"variator convert --from t5x --to variator {run.folder} DST"
    if _is_cast(run.source, backbone):
        raise CheckpointError(
            f"{prints} is the same one cast to float16, which changes what it computes. Name it in "
            f"float32 or bfloat16, which have one fingerprint, or make such a folder: {convert}"
        )
    raise CheckpointError(
        f"{prints} is another one. Name the backbone that the run started from, or none and take "
        f"the run's own: {convert}"
    )


def _is_cast(source: Source, backbone: Backbone) -> bool:
    """Whether a backbone of another fingerprint differs by its cast to float16 and nothing else."""
    if backbone.config.param_dtype != "float16":
        return False  # float32 and bfloat16 have one fingerprint
    try:
        cast = stream.copy(source, lambda *_: None, np.dtype(np.float16))
    except CheckpointError:  # beyond float16's range, so that no folder can hold its cast
        return False
    return cast.fingerprint == backbone.fingerprint
