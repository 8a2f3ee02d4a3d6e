"""From one format of backbones to another, leaf by leaf; the command is `convert_command.py`.

How much memory a conversion takes does not depend on the number of layers: one leaf is held at a
time, in the dtype of its file and in the one it is cast to.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from variator_jax.errors import CheckpointError, ConfigError, did_you_mean
from variator_jax.store import (
    backbone_folder,
    description,
    dtypes,
    folders,
    hf_folder,
    safetensors_file,
    stores,
    stream,
    t5x,
)
from variator_jax.store.stream import Leaf, Source, Summary

FORMATS = ("hf", "t5x", "variator")
_EVERY = 5.0  # seconds between two lines of progress where there is no bar

Progress = Callable[[Leaf], None]


class Conversion(NamedTuple):
    """What a conversion made, and where."""

    path: pathlib.Path
    name: str  # of the backbone
    summary: Summary


def convert(
    source: str,
    target: str,
    path: str | os.PathLike,
    destination: str | os.PathLike,
    dtype: Any = None,
    scan: bool = False,
) -> Conversion:
    """Converts a backbone, showing its progress on stderr.

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
    _check_formats(source, target, scan)
    cast = dtypes.parse_dtype(dtype)
    folder = new_folder(destination, target)
    opened = open_source(source, path)
    with showing_progress(opened) as progress:
        if target == "variator":
            summary = write_variator(folder, opened, cast, progress)
        else:
            with folders.atomic_folder(folder) as draft:
                if target == "hf":
                    summary = hf_folder.write(draft, opened, cast, progress=progress)
                else:
                    step = t5x.step_of(folder)
                    summary = t5x.write(
                        draft, opened, cast, scan=scan, step=step, progress=progress
                    )
    return Conversion(folder, opened.config.name, summary)


def open_source(source: str, path: str | os.PathLike) -> Source:
    """The leaves of a backbone in the named format; see `convert`."""
    if source == "t5x":
        return t5x.open_t5x(path)
    if stores.is_url(path):
        raise CheckpointError(f"{path}: only T5X checkpoints are read from URLs.")
    return hf_folder.open_hf(path) if source == "hf" else open_variator(path)


def open_variator(path: str | os.PathLike) -> Source:
    """The leaves of one of our backbone folders, after comparing its checksums.

    Raises:
      CheckpointError: if the folder is damaged.
    """
    said = backbone_folder.read_backbone_description(path)
    file = said.fields.path.parent / backbone_folder.ARRAYS
    entries = safetensors_file.read_header(file)
    backbone_folder.check_header(file, said.config, entries)
    leaves = [Leaf(x.name, x.shape, x.dtype, x.read, x.name) for x in entries.values()]
    source = stream.checked_source(str(file), said.config, leaves, said.vocabulary_file)
    description.check_unchanged(said.fields, file)
    return source


def write_variator(
    folder: pathlib.Path, source: Source, dtype: np.dtype | None, progress: Progress | None
) -> Summary:
    """Writes one of our backbone folders from a source, one leaf in memory at a time."""
    arrays = {x.path: _Announced(x.shape, dtype or x.dtype) for x in source.leaves}
    config = dtypes.cast_config(source.config, dtype)
    with backbone_folder.backbone_writer(folder, config, arrays, source.vocabulary_file) as writer:
        return stream.copy(source, writer.write, dtype, progress)


class _Announced(NamedTuple):
    shape: tuple[int, ...]
    dtype: np.dtype


def _check_formats(source: str, target: str, scan: bool) -> None:
    for option, name in (("--from", source), ("--to", target)):
        if name not in FORMATS:
            raise ConfigError(
                f"{option} {name} is no format of backbones, only {', '.join(FORMATS)} are."
                f"{did_you_mean(name, FORMATS)}"
            )
    if scan and target != "t5x":
        raise ConfigError("--scan is a form of T5X's tree: it goes with --to t5x only.")


def new_folder(path: str | os.PathLike, target: str) -> pathlib.Path:
    """The folder to write in a format, which must not hold anything.

    Raises:
      CheckpointError: if it does, or lies behind a URL.
    """
    if target == "t5x":
        return t5x.target_folder(path)
    if stores.is_url(path):
        raise CheckpointError(f"{path}: folders are written locally only.")
    folder = pathlib.Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists already; it is left alone. Name a new folder.")
    return folder


@contextlib.contextmanager
def showing_progress(source: Source) -> Iterator[Progress]:
    """A bar on a terminal where tqdm is installed, else a line every few seconds."""
    try:
        from tqdm import tqdm
    except ImportError:
        tqdm = None
    if tqdm is None or not sys.stderr.isatty():
        yield _lines(len(source.leaves))
        return
    size = sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in source.leaves)
    with tqdm(total=size, unit="B", unit_scale=True, desc=source.config.name) as bar:
        yield lambda leaf: bar.update(int(np.prod(leaf.shape)) * leaf.dtype.itemsize)


def _lines(total: int) -> Progress:
    done, last = 0, time.monotonic()

    def tell(leaf: Leaf) -> None:
        nonlocal done, last
        done += 1
        if done == total or time.monotonic() - last > _EVERY:
            last = time.monotonic()
            print(f"{done} of {total} leaves, {leaf.path}", file=sys.stderr)

    return tell
