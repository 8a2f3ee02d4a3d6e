"""Plugin folders from others' files: the official release's, and checkpoints of T5X runs."""

from __future__ import annotations

import os
import pathlib

from variator_jax.store import convert, t5x_run
from variator_jax.store.any_backbone import identify_backbone, load_backbone
from variator_jax.store.backbone_folder import Backbone
from variator_jax.store.official_file import load_official
from variator_jax.store.plugin_folder import save_plugin


def convert_official(
    path: str | os.PathLike,
    destination: str | os.PathLike,
    backbone: str | os.PathLike,
    residual_scale: float = 100.0,
) -> pathlib.Path:
    """Turns a file of the official release into a plugin folder.

    Args:
      path: the file, such as `plugin-t5_base-mux_4.pkl`.
      destination: a folder that does not exist yet, or is empty.
      backbone: the backbone that the plugin belongs to, in any format.
      residual_scale: what `official_file.load_official` says.

    Raises:
      CheckpointError: if anything is damaged or does not fit.
    """
    folder = convert.new_folder(destination, "variator")
    owner = load_backbone(backbone)
    plugin = load_official(path, owner, residual_scale)
    training = plugin.description.get("training")
    save_plugin(folder, plugin.config, plugin.variables, owner, training)
    return folder


def convert_t5x_run(
    path: str | os.PathLike,
    destination: str | os.PathLike,
    backbone: str | os.PathLike | None = None,
) -> pathlib.Path:
    """Turns a checkpoint of a T5X run into a plugin folder, showing its progress on stderr.

    Args:
      path: `checkpoint_<step>`, the run's folder for its latest, or a URL.
      destination: a folder that does not exist yet, or is empty.
      backbone: the backbone that the plugin shall belong to, in any format, if it is the run's; by
        default the one in the checkpoint.

    Raises:
      CheckpointError: if anything is damaged or does not fit.
    """
    folder = convert.new_folder(destination, "variator")
    run = t5x_run.open_t5x_run(path)
    owner = None if backbone is None else identify_backbone(backbone)
    with convert.showing_progress(run.source) as progress:
        plugin = t5x_run.read_plugin(run, owner, progress)
    said = plugin.description["backbone"]
    owner = owner or Backbone(run.source.config, {}, said["fingerprint"])
    training = plugin.description["training"]
    save_plugin(folder, plugin.config, plugin.variables, owner, training)
    return folder
