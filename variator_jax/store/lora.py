"""LoRA folders, `lora.json` and `lora.safetensors`, and LoRAs merged into their backbones.

A merged backbone is one like any other, with a fingerprint of its own, which identifies the plugins
that were trained on it.
"""

import dataclasses
import functools
import hashlib
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from variator_jax import mesh as meshes
from variator_jax.backbones.lora import LoraConfig, lora_weights, merge_weight, pairs
from variator_jax.errors import CheckpointError
from variator_jax.files import AnyPath, wrap_errors
from variator_jax.store import arrays, description
from variator_jax.store.backbone import Backbone, Source, collect, read_leaf


@dataclasses.dataclass(frozen=True)
class Lora:
    """A LoRA of one backbone.

    `params` is the tree of `init_lora`. `description` is that of its folder: `backbone` with name
    and fingerprint, `vocabulary_fingerprint`, `weights` and `training`.
    """

    config: LoraConfig
    params: dict
    description: Mapping[str, Any]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of A and B, as 64 hex digits."""
        return arrays.fingerprint(self.params)

    @property
    def task(self) -> str:
        """What it was trained on; empty if that was not recorded."""
        return str(self.description["training"].get("task", ""))


@dataclasses.dataclass(frozen=True)
class _Description:
    config: LoraConfig
    backbone: description.Owner
    vocabulary_fingerprint: str | None
    weights: dict[str, list[int]]
    training: dict[str, Any]
    file_checksums: dict[str, str]


def save_lora(
    path: AnyPath,
    config: LoraConfig,
    params: Mapping[str, Any],
    backbone: Backbone,
    training: Mapping[str, Any] | None = None,
) -> None:
    """Writes a LoRA folder atomically.

    Args:
      path: the folder.
      config: its settings.
      params: A and B, float32, in the tree of `init_lora`.
      backbone: the backbone it was trained on, whose name and fingerprints are kept.
      training: what made it (task, steps), for people.

    Raises:
      CheckpointError: if the folder cannot be written, the arrays are not those of the settings on
        this backbone, or one of them is not finite.
    """
    with wrap_errors(f"The LoRA does not fit backbone {backbone.config.name!r}"):
        weights = lora_weights(config, backbone.params)
    leaves = arrays.flatten(params)
    arrays.check_arrays("The LoRA", leaves, _expected(config, weights))
    content = {
        "config": description.config_content(config),
        "backbone": description.owner_content(backbone),
        "vocabulary_fingerprint": backbone.vocabulary_fingerprint,
        "weights": {path: list(shape) for path, shape in weights.items()},
        "training": dict(training or {}),
    }
    description.save_folder(path, "lora", leaves, content)


def load_lora(path: AnyPath, backbone: Backbone | None = None) -> Lora:
    """Reads a LoRA folder, and checks that it belongs to `backbone` where one is given.

    Args:
      path: the folder, or a run folder that holds one.
      backbone: the backbone it was trained on, without a LoRA.

    Raises:
      CheckpointError: if anything is missing or damaged, or the LoRA is another backbone's.
    """
    folder = pathlib.Path(path)
    if not os.path.lexists(folder / "lora.json") and (folder / "lora").is_dir():
        folder = folder / "lora"
    record, content = description.read_description(folder / "lora.json", "lora", _Description)
    if backbone is not None:
        description.check_belongs(f"The LoRA in {folder}", content, backbone)
    with wrap_errors(f"{folder / 'lora.json'} is not usable"):
        expected = _expected(record.config, record.weights)
    leaves = description.load_arrays(folder, "lora", expected, record.file_checksums)
    return Lora(record.config, arrays.unflatten(leaves), content)


def _expected(config: LoraConfig, weights: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of a LoRA of these weights, by path."""
    leaves = {}
    for path, (width, out) in weights.items():
        leaves[f"{path}/a"] = jax.ShapeDtypeStruct((width, config.rank), np.float32)
        leaves[f"{path}/b"] = jax.ShapeDtypeStruct((config.rank, out), np.float32)
    return leaves


def with_lora(backbone: Backbone, lora: Lora | AnyPath) -> Backbone:
    """The backbone with a LoRA merged into its weights.

    Args:
      backbone: the one that the LoRA was trained on. One that was cast when it was loaded gives
        other sums than `load_backbone(path, dtype, lora)`, which casts them, as training does.
      lora: a LoRA, or the folder of one or of a run that trained one.

    Returns:
      A backbone with a fingerprint of its own; weights without a change are the very same arrays.

    Raises:
      CheckpointError: if the folder is damaged, or the LoRA is another backbone's; by name, with
        both fingerprints.
    """
    if not isinstance(lora, Lora):
        lora = load_lora(lora)
    description.check_belongs("The LoRA", lora.description, backbone)
    weights = arrays.flatten(backbone.params)
    _check_fits(lora, weights)
    for path, (a, b) in pairs(lora.params):
        merged = merge_weight(np.asarray(weights[path]), a, b, lora.config)
        on_host = isinstance(weights[path], np.ndarray)
        weights[path] = merged if on_host else jnp.asarray(merged)
    params = arrays.unflatten(weights)
    changed = dataclasses.replace(backbone, params=params, fingerprint=arrays.fingerprint(params))
    return dataclasses.replace(changed, lora=_identity(lora))


def collect_with_lora(
    source: Source,
    lora: Lora | AnyPath | None,
    dtype: Any = None,
    place: Callable[[str, np.ndarray], Any] | None = None,
) -> Backbone:
    """Reads a whole backbone and merges a LoRA, if one is given, into each leaf as it is read.

    Args:
      source: the backbone that the LoRA was trained on. It is identified by its weights, so another
        one is refused when the last of them was read; one of another shape at once.
      lora: the LoRA, its folder, or None.
      dtype: what the leaves are cast to when they are merged; None keeps each one's.
      place: puts a leaf where it belongs; see `backbone.collect`.

    Raises:
      CheckpointError: if a leaf cannot be read, or the LoRA is another backbone's.
    """
    if lora is None:
        return collect(source, dtype, place)
    lora = lora if isinstance(lora, Lora) else load_lora(lora)
    _check_fits(lora, source.leaves)
    changes, config, digest = dict(pairs(lora.params)), lora.config, hashlib.sha256()

    def read(path: str) -> np.ndarray:
        array = read_leaf(source, path)
        arrays.add_leaf(digest, path, array)  # in the order of the paths, as fingerprints want it
        return merge_weight(array, *changes[path], config) if path in changes else array

    leaves = {
        path: leaf._replace(read=functools.partial(read, path))
        for path, leaf in source.leaves.items()
    }
    backbone = collect(dataclasses.replace(source, leaves=leaves, fingerprint=None), dtype, place)
    bare = dataclasses.replace(backbone, params={}, fingerprint=digest.hexdigest())
    description.check_belongs("The LoRA", lora.description, bare)
    return dataclasses.replace(backbone, lora=_identity(lora))


def _check_fits(lora: Lora, weights: Mapping[str, Any]) -> None:
    """Refuses a backbone that lacks a weight which the LoRA changes, or has it in another shape.

    Raises:
      CheckpointError: with both shapes.
    """
    for path, (a, b) in pairs(lora.params):
        expected = (a.shape[0], b.shape[1])
        found = tuple(weights[path].shape) if path in weights else None
        if found != expected:
            owner = lora.description["backbone"]["name"]
            problem = f"it changes {path} {expected}; this backbone has {found or 'none'}"
            raise CheckpointError(f"The LoRA belongs to backbone {owner!r}: {problem}.")


def _identity(lora: Lora) -> dict[str, str]:
    """Which LoRA was merged, for descriptions and messages."""
    return {"fingerprint": lora.fingerprint, "task": lora.task}


def load_on_mesh(
    source: Source, mesh: Mesh | None, dtype: Any = None, lora: AnyPath | None = None
) -> Backbone:
    """Reads a backbone, each array straight to its place: one at a time is in the host's memory.

    Args:
      source: of `open_backbone`.
      mesh: None for the first device.
      dtype: what the weights are cast to; None keeps each one's.
      lora: a LoRA folder or a run folder, merged into the weights on their way.

    Raises:
      CheckpointError: if an array cannot be read, or the LoRA is another backbone's.
    """
    shardings = arrays.flatten(meshes.parameter_shardings(source.config, mesh)) if mesh else {}

    def place(path: str, array: np.ndarray) -> jax.Array:
        return meshes.place(array, shardings[path]) if mesh else jax.device_put(array)

    return collect_with_lora(source, lora, dtype, place)
