"""Backbones and plugins from one format to another."""

from __future__ import annotations

import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from variator_jax.errors import CheckpointError, ConfigError, did_you_mean
from variator_jax.files import is_url
from variator_jax.store import backbone as backbones
from variator_jax.store import formats, hugging_face, t5x, t5x_run
from variator_jax.store.backbone import Backbone, Leaf, Stream
from variator_jax.store.official import RESIDUAL_SCALE, load_official
from variator_jax.store.plugins import save_plugin

WRITERS: dict[str, Callable[[pathlib.Path, Stream], Any]] = {
    formats.HUGGING_FACE: hugging_face.write,
    formats.T5X: t5x.write,
    formats.BACKBONE: backbones.write,
}
FORMATS = tuple(WRITERS)
PLUGINS = ("official", "t5x-run")  # sources of plugin folders
_EVERY = 5.0  # seconds between two lines of progress


def check_format(option: str, name: str | None, choices: tuple[str, ...]) -> None:
    """Refuses an unknown format, with the nearest known one."""
    if name not in choices:
        near = did_you_mean(str(name), choices)
        raise ConfigError(f"{option} {name} is not one of {', '.join(choices)}.{near}")


def convert(
    source: str,
    target: str,
    path: str | os.PathLike,
    destination: str | os.PathLike,
    dtype: Any = None,
) -> str:
    """Converts a backbone, with its progress on stderr, and describes what was made.

    Args:
      source: the format of `path`: 'hf', 't5x' or 'variator'.
      target: the format to write: one of the same.
      path: what to read; for T5X also a URL such as gs://bucket/checkpoint_1000000.
      destination: a folder that does not exist yet, or is empty.
      dtype: what the weights are cast to; None keeps each one's.

    Raises:
      CheckpointError: if `path` is damaged or of another format, or `destination` is in use.
      ConfigError: for a format or a dtype that there is not.
    """
    check_format("--to", target, FORMATS)
    start, folder = time.monotonic(), new_folder(destination, target)
    if source != formats.T5X and is_url(path):
        raise CheckpointError(f"{path}: only T5X checkpoints are read from URLs.")
    opened = formats.OPENERS[source](path)
    stream = Stream(opened, dtype, show_progress)
    WRITERS[target](folder, stream)
    return (
        f"backbone {opened.config.name} in {folder}\n"
        f"  leaves:      {len(opened.leaves)}\n"
        f"  bytes:       {stream.bytes:,}\n"
        f"  dtype:       {stream.config.param_dtype}\n"
        f"  fingerprint: {stream.fingerprint}\n"
        f"  seconds:     {time.monotonic() - start:.1f}"
    )


def convert_plugin(
    source: str,
    path: str | os.PathLike,
    destination: str | os.PathLike,
    backbone: str | os.PathLike | None = None,
    residual_scale: float = RESIDUAL_SCALE,
) -> pathlib.Path:
    """Makes a plugin folder of a file of the official release, or of a T5X run's checkpoint.

    Args:
      source: 'official' or 't5x-run'.
      path: the file; or `checkpoint_<step>`, the run's folder for its latest, or a URL.
      destination: a folder that does not exist yet, or is empty.
      backbone: the plugin's backbone, in any format; for a T5X run by default the one in it.
      residual_scale: see `official.load_official`.

    Raises:
      CheckpointError: if anything is damaged or does not fit.
      ConfigError: for an official plugin without a backbone.
    """
    folder = new_folder(destination, "variator")
    owner = None if backbone is None else formats.identify_backbone(backbone)
    if source == "official":
        if owner is None:
            raise ConfigError("--from official needs --backbone PATH, the plugin's backbone.")
        plugin = load_official(path, owner, residual_scale)
    else:
        run = t5x_run.open_run(t5x.open_checkpoint(path))
        plugin = t5x_run.read_plugin(run, owner, show_progress)
        fingerprint = plugin.description["backbone"]["fingerprint"]
        owner = owner or Backbone(run.source.config, {}, fingerprint)
    save_plugin(folder, plugin.config, plugin.variables, owner, plugin.description["training"])
    return folder


def new_folder(path: str | os.PathLike, target: str) -> pathlib.Path:
    """The folder to write in a format, which must not hold anything.

    Raises:
      CheckpointError: if it does, or is behind a URL.
    """
    if is_url(path):
        raise CheckpointError(f"{path}: folders are written locally only.")
    folder = t5x.target_folder(path) if target == formats.T5X else pathlib.Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists already; it is left alone. Name a new folder.")
    return folder


def show_progress(leaves: Sequence[Leaf]) -> Iterator[Leaf]:
    """Iterates over leaves, and prints a line to stderr every few seconds."""
    last = time.monotonic()
    for done, leaf in enumerate(leaves, start=1):
        yield leaf
        if done == len(leaves) or time.monotonic() - last > _EVERY:
            last = time.monotonic()
            print(f"{done} of {len(leaves)} leaves, {leaf.path}", file=sys.stderr)
