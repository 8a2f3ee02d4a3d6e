"""`variator convert`: backbones and plugins from one format to another."""

from __future__ import annotations

import contextlib
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from variator_jax.errors import CheckpointError, ConfigError, did_you_mean
from variator_jax.store import backbone_folder, formats, hugging_face, t5x, t5x_run
from variator_jax.store.official import RESIDUAL_SCALE, load_official
from variator_jax.store.plugin_folder import Plugin, save_plugin
from variator_jax.store.source import Backbone, Leaf, Source, Stream

FORMATS = ("hf", "t5x", "variator")
PLUGINS = ("official", "t5x-run")  # sources of plugin folders
_EVERY = 5.0  # seconds between two lines of progress where there is no bar


def run(
    source: str,
    target: str | None,
    path: str,
    destination: str,
    *,
    dtype: str | None,
    scan: bool,
    backbone: str | None,
    residual_scale: float,
) -> str:
    """The command: converts, and returns a few lines on what was made.

    Raises:
      ConfigError: for options that do not go together.
      CheckpointError: if `path` is damaged or of another format, or `destination` is in use.
    """
    _check_format("--from", source, (*FORMATS, *PLUGINS))
    if target is None and source != "t5x-run":
        raise ConfigError(f"--to is missing: what DST becomes, one of {', '.join(FORMATS)}.")
    if source not in PLUGINS:
        if backbone is not None:
            raise ConfigError(f"--backbone goes with --from {' or '.join(PLUGINS)} only.")
        return convert(source, str(target), path, destination, dtype, scan)
    if target not in ("variator", None) or dtype is not None or scan:
        raise ConfigError(
            f"--from {source} makes a plugin folder: it goes with --to variator, and with neither "
            "--dtype nor --scan."
        )
    from variator_jax.store import inspect

    if source == "t5x-run":
        made = convert_t5x_run(path, destination, backbone)
    elif backbone is None:
        raise ConfigError("--from official needs --backbone PATH, the plugin's backbone.")
    else:
        made = convert_official(path, destination, backbone, residual_scale)
    return inspect.describe(made)


def _check_format(option: str, name: str, choices: tuple[str, ...]) -> None:
    if name not in choices:
        raise ConfigError(
            f"{option} {name} is not one of the formats {', '.join(choices)}."
            f"{did_you_mean(name, choices)}"
        )


def convert(
    source: str,
    target: str,
    path: str | os.PathLike,
    destination: str | os.PathLike,
    dtype: Any = None,
    scan: bool = False,
) -> str:
    """Converts a backbone, with its progress on stderr, and describes what was made.

    Args:
      source: the format of `path`: 'hf', 't5x' or 'variator'.
      target: the format to write: one of the same.
      path: what to read; for T5X also a URL such as gs://bucket/checkpoint_1000000.
      destination: a folder that does not exist yet, or is empty.
      dtype: what the weights are cast to; None keeps each one's.
      scan: for T5X, whether to write `scalable_t5`'s form with scanned layers.

    Raises:
      CheckpointError: if `path` is damaged or of another format, or `destination` is in use.
      ConfigError: for settings that do not go together.
    """
    _check_format("--from", source, FORMATS)
    _check_format("--to", target, FORMATS)
    if scan and target != "t5x":
        raise ConfigError("--scan is a form of T5X's tree: it goes with --to t5x only.")
    start, folder = time.monotonic(), new_folder(destination, target)
    if source != "t5x" and formats.is_url(path):
        raise CheckpointError(f"{path}: only T5X checkpoints are read from URLs.")
    openers = {"hf": hugging_face.open_hf, "t5x": t5x.open_t5x}
    opened = openers.get(source, backbone_folder.open_folder)(path)
    with showing_progress(opened) as progress:
        stream = Stream(opened, dtype, progress)
        if target == "t5x":
            t5x.write(folder, stream, scan)
        else:
            {"hf": hugging_face, "variator": backbone_folder}[target].write(folder, stream)
    return (
        f"backbone {opened.config.name} in {folder}\n"
        f"  leaves:      {len(opened.leaves)}\n"
        f"  bytes:       {stream.bytes:,}\n"
        f"  dtype:       {stream.config.param_dtype}\n"
        f"  fingerprint: {stream.fingerprint}\n"
        f"  seconds:     {time.monotonic() - start:.1f}"
    )


def convert_official(
    path: str | os.PathLike,
    destination: str | os.PathLike,
    backbone: str | os.PathLike,
    residual_scale: float = RESIDUAL_SCALE,
) -> pathlib.Path:
    """Turns a file of the official release into a plugin folder.

    Args:
      path: the file, such as `plugin-t5_base-mux_4.pkl`.
      destination: a folder that does not exist yet, or is empty.
      backbone: the backbone that the plugin belongs to, in any format.
      residual_scale: see `official.load_official`.

    Raises:
      CheckpointError: if anything is damaged or does not fit.
    """
    folder = new_folder(destination, "variator")
    owner = formats.identify_backbone(backbone)
    _save(folder, load_official(path, owner, residual_scale), owner)
    return folder


def convert_t5x_run(
    path: str | os.PathLike,
    destination: str | os.PathLike,
    backbone: str | os.PathLike | None = None,
) -> pathlib.Path:
    """Turns a checkpoint of a T5X run into a plugin folder, with its progress on stderr.

    Args:
      path: `checkpoint_<step>`, the run's folder for its latest, or a URL.
      destination: a folder that does not exist yet, or is empty.
      backbone: the backbone that the plugin shall belong to, in any format, if it is the run's; by
        default the one in the checkpoint.

    Raises:
      CheckpointError: if anything is damaged or does not fit.
    """
    folder = new_folder(destination, "variator")
    opened = t5x_run.open_run(t5x.open_checkpoint(path))
    owner = None if backbone is None else formats.identify_backbone(backbone)
    with showing_progress(opened.source) as progress:
        plugin = t5x_run.read_plugin(opened, owner, progress)
    fingerprint = plugin.description["backbone"]["fingerprint"]
    _save(folder, plugin, owner or Backbone(opened.source.config, {}, fingerprint))
    return folder


def _save(folder: pathlib.Path, plugin: Plugin, owner: Backbone) -> None:
    training = plugin.description["training"]
    save_plugin(folder, plugin.config, plugin.variables, owner, training)


def new_folder(path: str | os.PathLike, target: str) -> pathlib.Path:
    """The folder to write in a format, which must not hold anything.

    Raises:
      CheckpointError: if it does, or is behind a URL.
    """
    if target == "t5x":
        return t5x.target_folder(path)
    if formats.is_url(path):
        raise CheckpointError(f"{path}: folders are written locally only.")
    folder = pathlib.Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists already; it is left alone. Name a new folder.")
    return folder


@contextlib.contextmanager
def showing_progress(source: Source) -> Iterator[Callable[[Leaf], Any]]:
    """A bar on a terminal where tqdm is installed, else a line every few seconds."""
    try:
        from tqdm import tqdm
    except ImportError:
        tqdm = None
    if tqdm is not None and sys.stderr.isatty():
        with tqdm(total=len(source.leaves), unit="leaf", desc=source.config.name) as bar:
            yield lambda leaf: bar.update()
        return
    total, done, last = len(source.leaves), 0, time.monotonic()

    def show(leaf: Leaf) -> None:
        nonlocal done, last
        done += 1
        if done == total or time.monotonic() - last > _EVERY:
            last = time.monotonic()
            print(f"{done} of {total} leaves, {leaf.path}", file=sys.stderr)

    yield show
