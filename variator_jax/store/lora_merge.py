"""A LoRA merged into its backbone: one in memory, or one that is read leaf by leaf.

What comes out is a backbone like any other, with a fingerprint of its own, by which the plugins
that were trained beside it are known.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from variator_jax.backbones.lora import Pair, check_fits, merge_weight, pairs
from variator_jax.errors import CheckpointError, ConfigError
from variator_jax.store import arrays_file, folders, stream
from variator_jax.store.backbone_folder import Backbone, file_fingerprint
from variator_jax.store.lora_folder import Lora, load_lora
from variator_jax.store.plugin_folder import check_belongs
from variator_jax.store.stream import Leaf, Source


def with_lora(backbone: Backbone, lora: Lora | str | os.PathLike) -> Backbone:
    """The backbone with a LoRA merged into its weights.

    Args:
      backbone: the one that the LoRA was trained on.
      lora: a LoRA, or the folder of one or of a run that trained one.

    Returns:
      A backbone with a fingerprint of its own; what the LoRA leaves alone are the very same arrays.

    Raises:
      CheckpointError: if the folder is damaged, or the LoRA is another backbone's; by name, with
        both fingerprints.
    """
    if not isinstance(lora, Lora):
        lora = load_lora(lora)
    check_belongs("The LoRA", lora.description, backbone)
    weights = traverse_util.flatten_dict(backbone.params, sep="/")
    _check_fits(lora, {path: leaf.shape for path, leaf in weights.items()})
    for path, (a, b) in pairs(lora.params):
        merged = merge_weight(np.asarray(weights[path]), a, b, lora.config)
        device = not isinstance(weights[path], np.ndarray)
        weights[path] = jnp.asarray(merged) if device else merged
    params = traverse_util.unflatten_dict(weights, sep="/")
    fingerprint = folders.fingerprint(params)
    return dataclasses.replace(backbone, params=params, fingerprint=fingerprint, lora=_said(lora))


def collect_with_lora(
    source: Source,
    lora: Lora,
    dtype: Any = None,
    place: Callable[[str, np.ndarray], Any] | None = None,
) -> Backbone:
    """Reads a whole backbone and merges a LoRA into each leaf as it comes.

    Args:
      source: the backbone that the LoRA was trained on. Which one it is, its weights tell, so that
        another one is refused when the last of them was read; one of another shape at once.
      lora: the LoRA.
      dtype: what the leaves are cast to when they are merged; None keeps each one's.
      place: puts a leaf where it belongs; see `stream.collect`.

    Raises:
      CheckpointError: if a leaf cannot be read, or the LoRA is another backbone's.
    """
    _check_fits(lora, {leaf.path: leaf.shape for leaf in source.leaves})
    changes, digest = dict(pairs(lora.params)), arrays_file.Fingerprint()

    def merged(leaf: Leaf) -> Leaf:
        def read() -> np.ndarray:
            array = stream.read_leaf(source, leaf)
            digest.add(leaf.path, array)
            change: Pair | None = changes.get(leaf.path)
            return array if change is None else merge_weight(array, *change, lora.config)

        return dataclasses.replace(leaf, read=read)

    both = dataclasses.replace(source, leaves=tuple(map(merged, source.leaves)))
    backbone = stream.collect(both, dtype, place)
    # The leaves came in the order of their paths, which is that of fingerprints.
    given = source.vocabulary_file
    vocabulary = None if given is None else file_fingerprint(given)
    bare = Backbone(source.config, {}, digest.hexdigest(), given, vocabulary)
    check_belongs("The LoRA", lora.description, bare)
    return dataclasses.replace(backbone, lora=_said(lora))


def _check_fits(lora: Lora, shapes: dict[str, tuple[int, ...]]) -> None:
    owner = lora.description["backbone"]["name"]
    try:
        for path, (a, b) in pairs(lora.params):
            check_fits(path, shapes.get(path), (a.shape[0], b.shape[1]))
    except ConfigError as error:
        raise CheckpointError(f"The LoRA belongs to backbone {owner!r}. {error}") from error


def _said(lora: Lora) -> dict[str, str]:
    """Which LoRA it is, for descriptions and messages."""
    return {"fingerprint": lora.fingerprint, "task": lora.task}
