"""Our own backbone folder: `backbone.json`, `backbone.safetensors` and the vocabulary."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
import shutil
from typing import Any

import jax
from flax import traverse_util

from variator_jax.backbone import T5Config, shape_params
from variator_jax.checkpoints import folders
from variator_jax.errors import CheckpointError, ConfigError

DESCRIPTION, ARRAYS, VOCABULARY = "backbone.json", "backbone.safetensors", "spiece.model"


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A frozen T5: its shape, its parameters in T5X's tree, and what identifies both."""

    config: T5Config
    params: dict
    fingerprint: str
    vocabulary_file: pathlib.Path | None = None
    vocabulary_fingerprint: str | None = None


def save_backbone(
    path: str | os.PathLike, config: T5Config, params: dict, vocabulary_file: str | None = None
) -> str:
    """Writes a backbone folder, whole or not at all, and returns the backbone's fingerprint."""
    params = jax.device_get(params)
    description: dict[str, Any] = {
        "kind": "backbone",
        "format_version": folders.FORMAT_VERSION,
        "fingerprint": folders.fingerprint(params),
        "config": dataclasses.asdict(config),
    }
    with folders.atomic_folder(path) as draft:
        folders.write_arrays(draft / ARRAYS, params)
        if vocabulary_file is not None:
            shutil.copyfile(vocabulary_file, draft / VOCABULARY)
            description["vocabulary_fingerprint"] = file_fingerprint(draft / VOCABULARY)
        folders.write_json(draft / DESCRIPTION, description)
    return description["fingerprint"]


def load_backbone(path: str | os.PathLike) -> Backbone:
    """Reads a backbone folder and checks it against its own description.

    Raises:
      CheckpointError: if anything is missing, damaged or does not fit.
    """
    folder = pathlib.Path(path)
    description = folders.read_json(folder / DESCRIPTION, "backbone")
    try:
        config = T5Config(**description["config"])
    except (ConfigError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / DESCRIPTION} has no usable config: {error}.") from error
    expected = traverse_util.flatten_dict(shape_params(config), sep="/")
    arrays = folders.read_arrays(folder / ARRAYS)
    params = folders.match_shapes(folder / ARRAYS, arrays, expected)
    found = folders.fingerprint(jax.device_get(params))
    if found != description.get("fingerprint"):
        raise CheckpointError(
            f"{folder / ARRAYS} has fingerprint {found}; its description says "
            f"{description.get('fingerprint')}. The file was changed or damaged."
        )
    vocabulary = folder / VOCABULARY
    return Backbone(
        config,
        params,
        found,
        vocabulary if vocabulary.is_file() else None,
        description.get("vocabulary_fingerprint"),
    )


def file_fingerprint(path: str | os.PathLike) -> str:
    """SHA-256 of a file's bytes, as 64 hex digits."""
    return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()
