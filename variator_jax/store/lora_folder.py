"""A LoRA that can be mailed: `lora.json` and `lora.safetensors`, megabytes beside a backbone.

How it comes into a backbone's weights is in `lora_merge.py`.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from variator_jax.backbones.lora import LoraConfig, lora_weights, pairs
from variator_jax.errors import CheckpointError, ConfigError
from variator_jax.store import arrays_file, folders
from variator_jax.store.backbone_folder import Backbone
from variator_jax.store.description import (
    CHECKSUMS,
    Fields,
    check_unchanged,
    config_content,
    read_description,
    write_description,
)
from variator_jax.store.files import check_folder
from variator_jax.store.plugin_folder import check_belongs

DESCRIPTION: str = "lora.json"
ARRAYS: str = "lora.safetensors"
# Far above any use, and low enough that nothing a description claims can exhaust the memory.
_MOST_WIDE = 1 << 20


@dataclasses.dataclass(frozen=True)
class Lora:
    """A LoRA of one backbone.

    `params` is the tree of `init_lora`. `description` is what its folder says of it: `backbone`
    with name and fingerprint, `vocabulary_fingerprint`, `weights` and `training`.
    """

    config: LoraConfig
    params: dict
    description: Mapping[str, Any]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of A and B, as 64 hex digits."""
        return folders.fingerprint(self.params)

    @property
    def task(self) -> str:
        """What it was trained on; empty where nobody said."""
        return str(self.description["training"].get("task", ""))


def new_lora(
    config: LoraConfig,
    params: Mapping[str, Any],
    backbone: Backbone,
    training: Mapping[str, Any] | None = None,
) -> Lora:
    """A LoRA of `backbone` in memory.

    Args:
      config: its settings.
      params: A and B, in the tree of `init_lora`.
      backbone: the backbone it was trained on, whose name and fingerprints are kept.
      training: what made it (task, steps), for people.

    Raises:
      CheckpointError: if the arrays are not those of the settings on this backbone.
    """
    try:
        weights = lora_weights(config, backbone.params)
    except ConfigError as error:
        name = backbone.config.name
        raise CheckpointError(f"The LoRA does not fit backbone {name!r}: {error}") from error
    leaves = folders.flatten(params)
    folders.match_arrays("The LoRA", leaves, _expected(config, weights), ("float32",))
    description = {
        "backbone": {"name": backbone.config.name, "fingerprint": backbone.fingerprint},
        "vocabulary_fingerprint": backbone.vocabulary_fingerprint,
        "weights": {path: list(shape) for path, shape in weights.items()},
        "training": dict(training or {}),
    }
    return Lora(config, traverse_util.unflatten_dict(leaves, sep="/"), description)


def save_lora(
    path: str | os.PathLike,
    config: LoraConfig,
    params: Mapping[str, Any],
    backbone: Backbone,
    training: Mapping[str, Any] | None = None,
) -> None:
    """Writes a LoRA folder, whole or not at all.

    Args:
      path: the folder.
      config: its settings.
      params: A and B, float32, in the tree of `init_lora`.
      backbone: the backbone it was trained on.
      training: what made it (task, steps), for people.

    Raises:
      CheckpointError: if the folder cannot be written, the arrays are not those of the settings on
        this backbone, or one of them is not finite.
    """
    lora = new_lora(config, params, backbone, training)
    leaves = {name: np.asarray(leaf) for name, leaf in folders.flatten(lora.params).items()}
    holds = (re.escape(ARRAYS),)
    with folders.atomic_folder(path, replaces=(DESCRIPTION,), holds=holds) as draft:
        arrays_file.write_arrays(draft / ARRAYS, leaves)
        checksums = {ARRAYS: arrays_file.file_checksum(draft / ARRAYS)}
        content = {"config": config_content(config), **lora.description, CHECKSUMS: checksums}
        write_description(draft / DESCRIPTION, "lora", content)


def load_lora(path: str | os.PathLike, backbone: Backbone | None = None) -> Lora:
    """Reads a LoRA folder, and checks that it belongs to `backbone` where one is given.

    Args:
      path: the folder, or a run folder that holds one.
      backbone: the backbone it was trained on, without a LoRA.

    Raises:
      CheckpointError: if anything is missing or damaged, or the LoRA is another backbone's.
    """
    folder = check_folder(path, "lora")
    if not os.path.lexists(folder / DESCRIPTION) and (folder / "lora").is_dir():
        folder = folder / "lora"
    fields = read_description(folder / DESCRIPTION, "lora")
    config, weights = _read_shape(fields)
    if backbone is not None:
        check_belongs(f"The LoRA in {folder}", fields.content, backbone)
    arrays = arrays_file.read_arrays(folder / ARRAYS)
    folders.match_arrays(folder / ARRAYS, arrays, _expected(config, weights), ("float32",))
    check_unchanged(fields, folder / ARRAYS)
    arrays_file.check_finite(folder / ARRAYS, arrays)
    return Lora(config, traverse_util.unflatten_dict(arrays, sep="/"), fields.content)


def lora_bytes(lora: Lora) -> int:
    """What its A and B take."""
    return sum(pair.a.nbytes + pair.b.nbytes for _, pair in pairs(lora.params))


def _read_shape(fields: Fields) -> tuple[LoraConfig, dict[str, tuple[int, int]]]:
    """The settings, and the shape of each weight; every value checked for its type."""
    fields.fields("config").size("rank", 1, _MOST_WIDE)
    config = fields.config("config", LoraConfig)
    owner = fields.fields("backbone")
    owner.get("name", str)
    owner.fingerprint("fingerprint")
    if fields.get("vocabulary_fingerprint", str, type(None)) is not None:
        fields.fingerprint("vocabulary_fingerprint")
    fields.get("training", dict)
    said = fields.fields("weights")
    if not said.content:
        raise CheckpointError(f"{fields.path}: 'weights' names none.")
    weights = {}
    for path in said.content:
        shape = said.get(path, list)
        if len(shape) != 2 or any(type(n) is not int or not 1 <= n <= 1 << 24 for n in shape):
            raise CheckpointError(
                f"{fields.path}: 'weights.{path[:100]}' is no shape [in, out] of a matrix."
            )
        weights[path] = (shape[0], shape[1])
    return config, weights


def _expected(
    config: LoraConfig, weights: Mapping[str, tuple[int, int]]
) -> dict[str, jax.ShapeDtypeStruct]:
    """The leaves of a LoRA of these weights, by path."""
    leaves = {}
    for path, (width, out) in weights.items():
        leaves[f"{path}/a"] = jax.ShapeDtypeStruct((width, config.rank), np.float32)
        leaves[f"{path}/b"] = jax.ShapeDtypeStruct((config.rank, out), np.float32)
    return leaves
