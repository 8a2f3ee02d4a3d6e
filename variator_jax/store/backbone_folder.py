"""Our own backbone folder: `backbone.json`, `backbone.safetensors` and the vocabulary."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
import shutil
from collections.abc import Mapping

from variator_jax.backbones.t5 import T5Config
from variator_jax.errors import CheckpointError
from variator_jax.files import atomic_folder
from variator_jax.store import arrays, description
from variator_jax.store.description import Sha256
from variator_jax.store.source import Backbone, Leaf, Source, Stream, make_source, memory_source

VOCABULARY: str = "spiece.model"
_HOLDS = r"backbone(-\d{5}-of-\d{5})?\.safetensors|spiece\.model"


@dataclasses.dataclass(frozen=True)
class _Description:
    fingerprint: Sha256
    config: T5Config
    vocabulary_fingerprint: Sha256 | None
    file_checksums: Mapping[str, Sha256]


def save_backbone(
    path: str | os.PathLike, config: T5Config, params: dict, vocabulary_file: str | None = None
) -> str:
    """Writes a backbone folder atomically and returns the backbone's fingerprint.

    Raises:
      CheckpointError: if the folder cannot be written, the parameters are not those of the config,
        or one of them is not finite.
    """
    vocabulary = None if vocabulary_file is None else pathlib.Path(vocabulary_file)
    backbone = Backbone(config, params, "", vocabulary)
    return write(path, Stream(memory_source(path, backbone)))


def write(path: str | os.PathLike, stream: Stream) -> str:
    """Writes a backbone folder from a stream, 5 GB in memory at a time; see `save_backbone`."""
    with atomic_folder(path, replaces=("backbone.json",), holds=_HOLDS) as draft:
        arrays.write_arrays(draft, "backbone", stream)
        vocabulary = stream.source.vocabulary_file
        if vocabulary is not None:
            shutil.copyfile(vocabulary, draft / VOCABULARY)
        content = {
            "fingerprint": stream.fingerprint,
            "config": description.config_content(stream.config),
            "vocabulary_fingerprint": vocabulary and arrays.file_checksum(draft / VOCABULARY),
        }
        description.write_description(draft / "backbone.json", "backbone", content)
    return stream.fingerprint


def open_folder(path: str | os.PathLike, verify: bool = True) -> Source:
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
    weights, vocabulary = dict(record.file_checksums), None
    weights.pop(VOCABULARY, None)
    if record.vocabulary_fingerprint is not None:
        vocabulary = folder / VOCABULARY
        description.check_files(folder, {VOCABULARY: record.vocabulary_fingerprint})
    leaves: list[Leaf] = []
    for name in weights:
        if not re.fullmatch(_HOLDS, name):
            raise CheckpointError(f"{file} has a checksum of {name[:80]!r}, which is not its own.")
        stored = arrays.open_arrays(folder / name)
        leaves += [Leaf(path, path, *array) for path, array in stored.items()]
    source = make_source(
        folder, record.config, leaves, vocabulary_file=vocabulary, fingerprint=record.fingerprint
    )
    if verify:
        description.check_files(folder, weights)
    return source
