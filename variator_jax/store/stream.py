"""Backbones leaf by leaf: what a conversion holds in memory is one array, however deep the model.

A `Source` knows the shape of every leaf and reads none; `copy` takes one leaf after another from
it to a sink. Which file holds what is the business of the formats' own modules.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from flax import traverse_util

from variator_jax.backbones.t5 import T5Config
from variator_jax.errors import CheckpointError
from variator_jax.store import arrays_file, dtypes
from variator_jax.store.backbone_folder import Backbone, expected_leaves, file_fingerprint

Sink = Callable[[str, np.ndarray], None]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of a backbone in our tree, not read yet. `origin` is what its file calls it."""

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    origin: str


@dataclasses.dataclass(frozen=True)
class Source:
    """A backbone in some file: complete, of the right shapes, in the order of the paths."""

    where: str
    config: T5Config
    leaves: tuple[Leaf, ...]
    vocabulary_file: pathlib.Path | None = None


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a conversion wrote."""

    leaves: int
    bytes: int
    dtype: str
    fingerprint: str
    seconds: float


def checked_source(
    where: str,
    config: T5Config,
    leaves: Iterable[Leaf],
    vocabulary_file: pathlib.Path | None = None,
    spell: Callable[[str], str] = str,
) -> Source:
    """Compares the leaves that a file has with those that its config asks for.

    Args:
      where: the file or folder, for messages.
      config: the shape of the backbone; its dtypes become those of the leaves.
      leaves: what the file has, in any order.
      vocabulary_file: the tokenizer's file beside it.
      spell: our path of a leaf -> what the file would call it.

    Raises:
      CheckpointError: naming missing, surplus or misshapen leaves, or a dtype of no weights.
    """
    found: dict[str, Leaf] = {}
    for leaf in leaves:
        if leaf.path in found:
            other = found[leaf.path].origin
            raise CheckpointError(f"{where} holds {leaf.path} twice: {other} and {leaf.origin}.")
        found[leaf.path] = leaf
    expected = expected_leaves(where, config, found)
    missing = [spell(path) for path in sorted(set(expected) - set(found))]
    if missing:
        raise CheckpointError(f"{where} lacks {_listing(missing)}.")
    surplus = [found[path].origin for path in sorted(set(found) - set(expected))]
    if surplus:
        raise CheckpointError(f"{where} holds {_listing(surplus)}, of no use to this backbone.")
    for path, leaf in sorted(found.items()):
        if leaf.shape != expected[path].shape:
            raise CheckpointError(
                f"{where}: {leaf.origin} has shape {leaf.shape} as {path}; "
                f"expected {expected[path].shape}."
            )
        if leaf.dtype not in dtypes.WEIGHTS:
            raise CheckpointError(
                f"{where}: {leaf.origin} has dtype {leaf.dtype}; weights are float32, bfloat16 or "
                "float16. Quantised checkpoints are not read."
            )
    stored = found["token_embedder/embedding"].dtype
    config = dtypes.cast_config(config, stored)
    return Source(where, config, tuple(found[path] for path in sorted(found)), vocabulary_file)


def _listing(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def read_leaf(source: Source, leaf: Leaf, dtype: np.dtype | None = None) -> np.ndarray:
    """Reads one leaf, cast to `dtype`.

    Raises:
      CheckpointError: if it cannot be read, or holds something infinite or no number.
    """
    array = leaf.read()
    if array.shape != leaf.shape or array.dtype != leaf.dtype:
        raise CheckpointError(
            f"{source.where}: {leaf.origin} was read as {array.dtype} {array.shape}; "
            f"its description says {leaf.dtype} {leaf.shape}."
        )
    where = pathlib.Path(source.where)
    arrays_file.check_finite(where, {leaf.origin: array})
    if dtype is None or array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):  # told below, in the user's words
        array = array.astype(dtype)
    arrays_file.check_finite(where, {f"{leaf.origin} as {dtype}": array})
    return array


def copy(
    source: Source,
    sink: Sink,
    dtype: np.dtype | None = None,
    progress: Callable[[Leaf], None] | None = None,
) -> Summary:
    """Takes every leaf from a source to a sink, one in memory at a time.

    Args:
      source: where the leaves come from.
      sink: called with path and array, in the order of the paths.
      dtype: what the leaves are cast to; None keeps each one's own.
      progress: called after each leaf.

    Raises:
      CheckpointError: if a leaf cannot be read.
    """
    start, size, digest = time.monotonic(), 0, arrays_file.Fingerprint()
    for leaf in source.leaves:
        array = read_leaf(source, leaf, dtype)
        digest.add(leaf.path, array)
        sink(leaf.path, array)
        size += array.nbytes
        if progress is not None:
            progress(leaf)
        del array  # before the next one is read
    stored = dtypes.cast_config(source.config, dtype).param_dtype
    seconds = time.monotonic() - start
    return Summary(len(source.leaves), size, stored, digest.hexdigest(), seconds)


def identify(source: Source, progress: Callable[[Leaf], None] | None = None) -> Backbone:
    """What `collect` gives, without the parameters: each leaf is read, and none is kept.

    Raises:
      CheckpointError: if a leaf cannot be read.
    """
    return _backbone(source, copy(source, lambda *_: None, progress=progress), {})


def backbone_source(where: str | os.PathLike, backbone: Backbone) -> Source:
    """The leaves of a backbone in memory."""
    flat = traverse_util.flatten_dict(backbone.params, sep="/")

    def leaf(path: str, array: Any) -> Leaf:
        return Leaf(path, tuple(array.shape), array.dtype, lambda: np.asarray(array), path)

    leaves = (leaf(path, array) for path, array in flat.items())
    found = checked_source(str(where), backbone.config, leaves, backbone.vocabulary_file)
    # What it computes in is the user's choice by now.
    config = dataclasses.replace(backbone.config, param_dtype=found.config.param_dtype)
    return dataclasses.replace(found, config=config)


def collect(
    source: Source, dtype: Any = None, place: Callable[[str, np.ndarray], Any] | None = None
) -> Backbone:
    """Reads a whole source.

    Args:
      source: where the leaves come from.
      dtype: what they are cast to; None keeps each one's.
      place: puts a leaf, of which the path is given, where it belongs, such as among devices; by
        default it stays in the host's memory as a numpy array.

    Raises:
      CheckpointError: if a leaf cannot be read.
    """
    cast = dtypes.parse_dtype(dtype)
    leaves: dict[str, Any] = {}

    def keep(path: str, array: np.ndarray) -> None:
        leaves[path] = array if place is None else place(path, array)

    summary = copy(source, keep, cast)
    backbone = _backbone(source, summary, traverse_util.unflatten_dict(leaves, sep="/"))
    return dataclasses.replace(backbone, config=dtypes.cast_config(source.config, cast))


def _backbone(source: Source, summary: Summary, params: dict) -> Backbone:
    vocabulary = source.vocabulary_file
    return Backbone(
        source.config,
        params,
        summary.fingerprint,
        vocabulary,
        None if vocabulary is None else file_fingerprint(vocabulary),
    )
