"""Backbones, read array by array from any format, and our own folder for them.

A reader of a format makes a `Source`, a `Stream` reads it, a writer of a format takes the stream.
Our folder holds `backbone.json`, `backbone.safetensors` and the vocabulary.
"""

import dataclasses
import functools
import hashlib
import pathlib
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from variator_jax.backbones.t5 import T5Config, shape_params
from variator_jax.errors import CheckpointError
from variator_jax.files import AnyPath, atomic_folder, wrap_errors
from variator_jax.hf_tokenizer import FILES, JSON, PIECES, SETTINGS, vocabulary_files
from variator_jax.store import arrays, description

_HOLDS = "|".join([r"backbone(-\d{5}-of-\d{5})?\.safetensors", *map(re.escape, FILES)])


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


@dataclasses.dataclass(frozen=True)
class Source:
    """A backbone in a file: complete, of the right shapes, in the order of the paths.

    `leaves` are its arrays by their paths in our tree, not read yet.
    `fingerprint` is set where the format keeps it; otherwise it is known when all was read.
    """

    origin: str
    config: T5Config
    leaves: Mapping[str, arrays.Stored]
    vocabulary_file: pathlib.Path | None = None
    fingerprint: str | None = None


def make_source(
    origin: AnyPath,
    config: T5Config,
    leaves: Mapping[str, arrays.Stored],
    vocabulary_file: pathlib.Path | None = None,
) -> Source:
    """A source, after comparing the leaves of a file with those that its config needs.

    Args:
      origin: the file or folder, for messages.
      config: the shape of the backbone.
      leaves: what the file has by path, in any order.
      vocabulary_file: the vocabulary in the folder.

    Raises:
      CheckpointError: naming what is missing, unexpected, misshapen or mistyped.
    """
    arrays.check_arrays(origin, leaves, leaf_shapes(origin, config, len(leaves)), arrays.WEIGHTS)
    return Source(str(origin), config, dict(sorted(leaves.items())), vocabulary_file)


def leaf_shapes(origin: AnyPath, config: T5Config, count: int) -> dict[str, Any]:
    """The leaves that a config needs, by path; `count` is how many a file has.

    Raises:
      CheckpointError: if no network can have this shape.
    """
    depth = config.num_encoder_layers + config.num_decoder_layers
    if depth > count:  # a damaged number would make a million missing leaves
        raise CheckpointError(f"{origin}: {count} weights for {depth} layers, as its config has.")
    with wrap_errors(f"{origin}: no backbone has the shape {config}"):  # beyond JAX's integers
        return _shapes(config)


@functools.lru_cache(maxsize=4)
def _shapes(config: T5Config) -> dict[str, Any]:
    """Tracing a network takes longer than reading the headers of its file."""
    return arrays.flatten(shape_params(config))


def memory_source(origin: AnyPath, backbone: Backbone) -> Source:
    """The leaves of a backbone in memory; errors as `make_source`."""
    leaves = {
        path: arrays.Stored(tuple(array.shape), array.dtype, functools.partial(np.asarray, array))
        for path, array in arrays.flatten(backbone.params).items()
    }
    return make_source(origin, backbone.config, leaves, vocabulary_file=backbone.vocabulary_file)


def stored_config(config: T5Config, leaves: Mapping[str, arrays.Stored]) -> T5Config:
    """The config of a backbone whose file keeps no dtype: that of its embedding."""
    embedding = leaves.get("token_embedder/embedding")
    return _cast_config(config, embedding and embedding.dtype)


def _cast_config(config: T5Config, dtype: np.dtype | None) -> T5Config:
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
      progress: iterates over the paths in place of `iter`, to show how far it is.
    """

    def __init__(
        self,
        source: Source,
        dtype: Any = None,
        progress: Callable[[Collection[str]], Iterable[str]] = iter,
    ) -> None:
        self.source, self.dtype, self._progress = source, arrays.parse_dtype(dtype), progress
        self.config = _cast_config(source.config, self.dtype)
        self.bytes, self._digest = 0, hashlib.sha256()
        self._known = source.fingerprint if self.dtype is None else None

    def __iter__(self) -> Iterator[tuple[str, np.ndarray]]:
        """Paths and arrays, in the order of the paths.

        Raises:
          CheckpointError: if a leaf cannot be read, or holds a NaN or an infinite number.
        """
        for path in self._progress(self.source.leaves):
            array = read_leaf(self.source, path, self.dtype)
            self.bytes += array.nbytes
            if self._known is None:
                arrays.add_leaf(self._digest, path, array)
            yield path, array

    @property
    def fingerprint(self) -> str:
        """That of the arrays as they were cast, when all were read."""
        return self._known or self._digest.hexdigest()

    def backbone(self, params: dict) -> Backbone:
        """The backbone with these parameters, when all leaves were read."""
        vocabulary = self.source.vocabulary_file
        checksum = _vocabulary_fingerprint(vocabulary)
        return Backbone(self.config, params, self.fingerprint, vocabulary, checksum)


def _vocabulary_fingerprint(file: pathlib.Path | None) -> str | None:
    """That of the pieces, where they lie beside the file; ByT5's bytes have none."""
    if file is not None and file.name in (JSON, SETTINGS):
        pieces = file.with_name(PIECES)
        file = pieces if pieces.is_file() else file if file.name == JSON else None
    return None if file is None else arrays.file_checksum(file)


def copy_vocabulary(file: pathlib.Path | None, folder: pathlib.Path) -> None:
    """Copies a vocabulary, and the files beside it that change its ids."""
    for source, name in vocabulary_files(file).items() if file is not None else ():
        shutil.copyfile(source, folder / name)


def read_leaf(source: Source, path: str, dtype: np.dtype | None = None) -> np.ndarray:
    """Reads one leaf, cast to `dtype`; errors as `Stream`."""
    what, array = f"{source.origin}: {path}", source.leaves[path].read()
    arrays.check_finite(what, array)
    return arrays.cast(what, array, dtype)


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


def identify(source: Source, progress: Callable[..., Iterable[str]] = iter) -> Backbone:
    """What `collect` returns, without the parameters: each leaf is read, and none is kept.

    Raises:
      CheckpointError: if a leaf cannot be read.
    """
    stream = Stream(source, progress=progress)
    for _ in stream:
        pass
    return stream.backbone({})


@dataclasses.dataclass(frozen=True)
class _Description:
    fingerprint: str
    config: T5Config
    vocabulary_fingerprint: str | None
    file_checksums: Mapping[str, str]


def save_backbone(
    path: AnyPath, config: T5Config, params: dict, vocabulary_file: str | None = None
) -> str:
    """Writes a backbone folder atomically and returns the backbone's fingerprint.

    Raises:
      CheckpointError: if the folder cannot be written, the parameters are not those of the config,
        or one of them is not finite.
    """
    vocabulary = None if vocabulary_file is None else pathlib.Path(vocabulary_file)
    backbone = Backbone(config, params, "", vocabulary)
    return write(path, Stream(memory_source(path, backbone)))


def write(path: AnyPath, stream: Stream) -> str:
    """Writes a backbone folder from a stream, 5 GB in memory at a time; see `save_backbone`."""
    with atomic_folder(path, replaces=("backbone.json",), holds=_HOLDS) as draft:
        arrays.write_arrays(draft, "backbone", stream)
        vocabulary = stream.source.vocabulary_file
        copy_vocabulary(vocabulary, draft)
        content = {
            "fingerprint": stream.fingerprint,
            "config": description.config_content(stream.config),
            "vocabulary_fingerprint": _vocabulary_fingerprint(vocabulary),
        }
        description.write_description(draft / "backbone.json", "backbone", content)
    return stream.fingerprint


def open_folder(path: AnyPath, verify: bool = True) -> Source:
    """The leaves of a backbone folder, after comparing its description and its checksums.

    Args:
      path: the folder.
      verify: False skips the checksums of the weights, and reads no more than their headers.

    Raises:
      CheckpointError: if anything is missing, damaged or does not fit.
    """
    folder = pathlib.Path(path)
    file = folder / "backbone.json"
    record, _ = description.read_description(file, "backbone", _Description)
    names = [name for name in FILES[:3] if name in record.file_checksums]
    vocabulary = folder / names[0] if names else None
    leaves: dict[str, arrays.Stored] = {}
    for name, checksum in sorted(record.file_checksums.items()):
        if not re.fullmatch(_HOLDS, name):
            raise CheckpointError(f"{file} has a checksum of {name[:80]!r}, which is not its own.")
        if name not in FILES:
            leaves |= arrays.open_arrays(folder / name)
        if verify or name in FILES:
            description.check_file(folder / name, checksum)
    source = make_source(folder, record.config, leaves, vocabulary_file=vocabulary)
    return dataclasses.replace(source, fingerprint=record.fingerprint)
