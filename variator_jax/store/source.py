"""Backbones read array by array from any format: a `Source` opens one, a `Stream` reads it."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from variator_jax.backbones.t5 import T5Config, shape_params
from variator_jax.errors import CheckpointError
from variator_jax.files import wrap_errors
from variator_jax.store import arrays


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A frozen T5: its shape, its parameters in T5X's tree, and what identifies both.

    `lora` identifies the LoRA that was merged into the parameters, by `fingerprint` and `task`.
    """

    config: T5Config
    params: dict
    fingerprint: str
    vocabulary_file: pathlib.Path | None = None
    vocabulary_fingerprint: str | None = None
    lora: Mapping[str, str] | None = None

    @property
    def title(self) -> str:
        """Its name for messages, with the LoRA that was merged into it."""
        return title(self.config.name, self.lora)


def title(name: str, lora: Mapping[str, str] | None) -> str:
    """The name of a backbone for messages, with the LoRA that was merged into it."""
    if lora is None:
        return repr(name)
    task = f"task {lora['task']!r}, " if lora["task"] else ""
    return f"{name!r} with a LoRA merged in ({task}{lora['fingerprint'][:12]})"


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of a backbone in our tree, not read yet. `name` is what its file calls it."""

    path: str
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Source:
    """A backbone in a file: complete, of the right shapes, in the order of the paths.

    `fingerprint` is set where the format keeps it; otherwise it is known when all was read.
    """

    origin: str
    config: T5Config
    leaves: tuple[Leaf, ...]
    vocabulary_file: pathlib.Path | None = None
    fingerprint: str | None = None


def make_source(
    origin: str | os.PathLike,
    config: T5Config,
    leaves: Iterable[Leaf],
    name_of: Callable[[str], str] = str,
    **more: Any,
) -> Source:
    """A source, after comparing the leaves of a file with those that its config needs.

    Args:
      origin: the file or folder, for messages.
      config: the shape of the backbone.
      leaves: what the file has, in any order.
      name_of: our path of a leaf -> what the file would call it.
      **more: the other fields of `Source`.

    Raises:
      CheckpointError: naming what is missing, unexpected, misshapen or mistyped.
    """
    leaves = sorted(leaves, key=lambda leaf: leaf.path)
    by_path = {leaf.path: leaf for leaf in leaves}
    if len(by_path) < len(leaves):
        raise CheckpointError(f"{origin} holds an array twice, under two names.")
    # The depth first: a wrong one would make a thousand missing leaves.
    for stack in ("encoder", "decoder"):
        expected = getattr(config, f"num_{stack}_layers")
        numbers = {path.split("/")[1] for path in by_path if path.startswith(f"{stack}/layers_")}
        if len(numbers) != expected:
            counts = f"{len(numbers)} {stack} layers, the config has {expected}"
            raise CheckpointError(f"{origin}: the weights have {counts}.")
    with wrap_errors(
        f"{origin}: no backbone has the shape {config}"
    ):  # sizes beyond JAX's integers
        shapes = _shapes(config)
    arrays.check_arrays(origin, by_path, shapes, arrays.WEIGHTS, name_of)
    return Source(str(origin), config, tuple(leaves), **more)


@functools.lru_cache(maxsize=4)
def _shapes(config: T5Config) -> dict[str, Any]:
    """Tracing a network takes longer than reading the headers of its file."""
    return arrays.flatten(shape_params(config))


def memory_source(origin: str | os.PathLike, backbone: Backbone) -> Source:
    """The leaves of a backbone in memory; errors as `make_source`."""
    leaves = [
        Leaf(path, path, tuple(array.shape), array.dtype, functools.partial(np.asarray, array))
        for path, array in arrays.flatten(backbone.params).items()
    ]
    return make_source(origin, backbone.config, leaves, vocabulary_file=backbone.vocabulary_file)


def stored_config(config: T5Config, leaves: Iterable[Leaf]) -> T5Config:
    """The config of a backbone whose file keeps no dtype: that of its embedding."""
    dtypes = {leaf.path: leaf.dtype for leaf in leaves}
    return cast_config(config, dtypes.get("token_embedder/embedding"))


def cast_config(config: T5Config, dtype: np.dtype | None) -> T5Config:
    """The config of the backbone whose leaves were cast to `dtype`."""
    if dtype is None or dtype.name not in arrays.WEIGHTS:
        return config
    # float16 is for storage only: T5's feed-forward layers leave its range.
    compute = "bfloat16" if dtype == jnp.bfloat16 else "float32"
    return dataclasses.replace(config, dtype=compute, param_dtype=dtype.name)


class Stream:
    """Reads the leaves of a source one by one, cast and checked, and fingerprints them.

    Args:
      source: where the leaves come from.
      dtype: what they are cast to; None keeps each one's.
      progress: called after each leaf.
    """

    def __init__(
        self, source: Source, dtype: Any = None, progress: Callable[[Leaf], Any] | None = None
    ) -> None:
        self.source, self.dtype, self._progress = source, arrays.parse_dtype(dtype), progress
        self.config = cast_config(source.config, self.dtype)
        self.bytes, self._digest = 0, arrays.Fingerprint()

    def __iter__(self) -> Iterator[tuple[str, np.ndarray]]:
        """Paths and arrays, in the order of the paths.

        Raises:
          CheckpointError: if a leaf cannot be read, or holds a NaN or an infinite number.
        """
        for leaf in self.source.leaves:
            array = read_leaf(self.source, leaf, self.dtype)
            self.bytes += array.nbytes
            if self.source.fingerprint is None or self.dtype is not None:
                self._digest.add(leaf.path, array)
            yield leaf.path, array
            if self._progress is not None:
                self._progress(leaf)

    @property
    def fingerprint(self) -> str:
        """That of the arrays as they were cast, when all were read."""
        known = self.source.fingerprint if self.dtype is None else None
        return known or self._digest.hexdigest()

    def backbone(self, params: dict) -> Backbone:
        """The backbone with these parameters, when all leaves were read."""
        vocabulary = self.source.vocabulary_file
        checksum = None if vocabulary is None else arrays.file_checksum(vocabulary)
        return Backbone(self.config, params, self.fingerprint, vocabulary, checksum)


def read_leaf(source: Source, leaf: Leaf, dtype: np.dtype | None = None) -> np.ndarray:
    """Reads one leaf, cast to `dtype`; errors as `Stream`."""
    array = leaf.read()
    arrays.check_finite(f"{source.origin}: {leaf.name}", array)
    if dtype is None or array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        array = array.astype(dtype)
    arrays.check_finite(f"{source.origin}: {leaf.name} as {dtype}", array)
    return array


def collect(
    source: Source, dtype: Any = None, place: Callable[[str, np.ndarray], Any] | None = None
) -> Backbone:
    """Reads a whole backbone.

    Args:
      source: where the leaves come from.
      dtype: what they are cast to; None keeps each one's.
      place: puts a leaf, of which the path is given, where it belongs, such as among devices; by
        default it stays in the host's memory as a numpy array.

    Raises:
      CheckpointError: if a leaf cannot be read.
    """
    stream = Stream(source, dtype)
    leaves = {path: array if place is None else place(path, array) for path, array in stream}
    return stream.backbone(arrays.unflatten(leaves))


def identify(source: Source, progress: Callable[[Leaf], Any] | None = None) -> Backbone:
    """What `collect` returns, without the parameters: each leaf is read, and none is kept.

    Raises:
      CheckpointError: if a leaf cannot be read.
    """
    stream = Stream(source, progress=progress)
    for _ in stream:
        pass
    return stream.backbone({})
