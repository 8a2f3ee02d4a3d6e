"""Our own backbone folder: `backbone.json`, `backbone.safetensors` and the vocabulary."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from variator_jax.backbones.t5 import T5Config, shape_params
from variator_jax.errors import CheckpointError
from variator_jax.store import arrays_file, description, folders
from variator_jax.store.arrays_file import ArraysWriter, file_checksum
from variator_jax.store.description import CHECKSUMS, Fields, read_description
from variator_jax.store.files import check_folder

DESCRIPTION: str = "backbone.json"
ARRAYS: str = "backbone.safetensors"
VOCABULARY: str = "spiece.model"
_DTYPES = ("float32", "bfloat16", "float16")
# Far above any T5, and low enough that nothing a description claims can exhaust the memory.
_MOST = {
    "vocab_size": 1 << 24,
    "embed_dim": 1 << 20,
    "num_heads": 1 << 16,
    "head_dim": 1 << 16,
    "mlp_dim": 1 << 24,
    "num_encoder_layers": 1000,
    "num_decoder_layers": 1000,
}


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A frozen T5: its shape, its parameters in T5X's tree, and what identifies both.

    `lora` says which LoRA was merged into the parameters, by `fingerprint` and `task`.
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


def save_backbone(
    path: str | os.PathLike, config: T5Config, params: dict, vocabulary_file: str | None = None
) -> str:
    """Writes a backbone folder, whole or not at all, and returns the backbone's fingerprint.

    Raises:
      CheckpointError: if the folder cannot be written, the parameters are not those of the config,
        or one of them is not finite.
    """
    leaves = folders.flatten(params)
    with backbone_writer(path, config, leaves, vocabulary_file) as writer:
        for name in sorted(leaves):
            writer.write(name, np.asarray(leaves[name]))
    return writer.fingerprint


class BackboneWriter:
    """Takes a backbone's leaves one by one; `fingerprint` is set when the folder is in place."""

    def __init__(self, write: Callable[[str, np.ndarray], None]) -> None:
        self.write, self.fingerprint = write, ""


@contextlib.contextmanager
def backbone_writer(
    path: str | os.PathLike,
    config: T5Config,
    arrays: Mapping[str, Any],
    vocabulary_file: str | os.PathLike | None = None,
) -> Iterator[BackboneWriter]:
    """Writes a backbone folder whose leaves come one by one, in the order of their names.

    Args:
      path: the folder, which appears when the block ends well.
      config: the shape of the backbone.
      arrays: name ('/' between levels) -> anything with a shape and a dtype, of all leaves.
      vocabulary_file: a SentencePiece model to keep beside them.

    Raises:
      CheckpointError: as `save_backbone`.
    """
    target = pathlib.Path(path)
    check_header(target / ARRAYS, config, arrays)
    holds = (re.escape(ARRAYS), re.escape(VOCABULARY))
    with folders.atomic_folder(path, replaces=(DESCRIPTION,), holds=holds) as draft:
        file = ArraysWriter(draft / ARRAYS, arrays)
        writer = BackboneWriter(file.write)
        yield writer
        fingerprint = file.close()
        content: dict[str, Any] = {
            "fingerprint": fingerprint,
            "config": description.config_content(config),
            "vocabulary_fingerprint": None,
            CHECKSUMS: {ARRAYS: file_checksum(draft / ARRAYS)},
        }
        if vocabulary_file is not None:
            shutil.copyfile(vocabulary_file, draft / VOCABULARY)
            content["vocabulary_fingerprint"] = file_fingerprint(draft / VOCABULARY)
        description.write_description(draft / DESCRIPTION, "backbone", content)
    writer.fingerprint = fingerprint


@dataclasses.dataclass(frozen=True)
class Description:
    """What `backbone.json` says."""

    fields: Fields
    config: T5Config
    fingerprint: str
    vocabulary_file: pathlib.Path | None
    vocabulary_fingerprint: str | None


def read_backbone_description(path: str | os.PathLike) -> Description:
    """Reads what a backbone folder says about itself, and none of its weights.

    Raises:
      CheckpointError: if the description is missing, damaged, or the vocabulary it names is.
    """
    folder = check_folder(path, "backbone")
    fields = read_description(folder / DESCRIPTION, "backbone")
    config, fingerprint = read_config(fields), fields.fingerprint("fingerprint")
    if fields.get("vocabulary_fingerprint", str, type(None)) is None:
        vocabulary, expected = None, None
    else:
        expected = fields.fingerprint("vocabulary_fingerprint")
        vocabulary = folder / VOCABULARY
        found = file_fingerprint(vocabulary)
        if found != expected:
            raise CheckpointError(
                f"{vocabulary} was changed or damaged: its fingerprint is {found}, the backbone's "
                f"description says {expected}."
            )
    return Description(fields, config, fingerprint, vocabulary, expected)


def read_config(fields: Fields, key: str = "config") -> T5Config:
    """The shape of a backbone under a key, every value checked for its type and its size.

    Raises:
      CheckpointError: naming the file and what is wrong in it.
    """
    shape = fields.fields(key)
    for name, most in _MOST.items():
        shape.size(name, 0, most)
    if shape.content.get("encoder_mlp_dim") is not None:
        shape.size("encoder_mlp_dim", 0, _MOST["mlp_dim"])
    return fields.config(key, T5Config)


def load_backbone(path: str | os.PathLike, *, verify: bool = True) -> Backbone:
    """Reads a backbone folder and checks it against its own description.

    The parameters are read-only views into the file; the file is read once for its checksum and
    once to see that all numbers are finite, about a second a gigabyte.

    Args:
      path: the folder.
      verify: False skips these two, and leaves names, shapes and dtypes to be checked.

    Raises:
      CheckpointError: if anything is missing, damaged or does not fit.
    """
    said = read_backbone_description(path)
    file = said.fields.path.parent / ARRAYS
    arrays = arrays_file.read_arrays(file)
    check_header(file, said.config, arrays)
    description.check_unchanged(said.fields, *([file] if verify else []))
    if verify:
        arrays_file.check_finite(file, arrays)
    return Backbone(
        said.config,
        traverse_util.unflatten_dict(arrays, sep="/"),
        said.fingerprint,
        said.vocabulary_file,
        said.vocabulary_fingerprint,
    )


def check_header(file: pathlib.Path, config: T5Config, found: Mapping[str, Any]) -> None:
    """Compares what a file of weights holds with what a config asks for.

    Args:
      file: the file, for messages.
      config: the shape of the backbone.
      found: name -> anything with a shape and a dtype.

    Raises:
      CheckpointError: naming what is missing, surplus, misshapen or mistyped.
    """
    folders.match_arrays(file, found, expected_leaves(file, config, found), _DTYPES)


def expected_leaves(
    where: str | os.PathLike, config: T5Config, found: Iterable[str]
) -> dict[str, Any]:
    """The leaves that a config asks for, by path, as shapes and dtypes.

    Args:
      where: the file or folder, for messages.
      config: the shape of the backbone.
      found: the paths of the leaves that are there.

    Raises:
      CheckpointError: if they are those of another depth, or no backbone has such a shape.
    """
    # The depth first, for a wrong one would make a thousand missing leaves.
    for stack, said in (
        ("encoder", config.num_encoder_layers),
        ("decoder", config.num_decoder_layers),
    ):
        layers = {path.split("/")[1] for path in found if path.startswith(f"{stack}/layers_")}
        if len(layers) != said:
            raise CheckpointError(
                f"{where}: the weights have {len(layers)} {stack} layers, the config says {said}."
            )
    try:
        return _shapes(config)
    except (TypeError, ValueError, OverflowError) as error:  # JAX's, for sizes beyond its integers
        raise CheckpointError(f"{where}: there is no backbone of the shape {config}.") from error


@functools.lru_cache(maxsize=4)
def _shapes(config: T5Config) -> dict[str, Any]:
    """Tracing a network takes longer than reading the headers of its file."""
    return folders.flatten(shape_params(config))


def file_fingerprint(path: str | os.PathLike) -> str:
    """SHA-256 of a file's bytes, as 64 hex digits."""
    return file_checksum(path)
