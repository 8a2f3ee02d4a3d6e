"""Backbones and plugins as evaluation and inference load them, in place on a mesh."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import jax
from flax import traverse_util
from jax.sharding import Mesh

from variator_jax import mesh as meshes
from variator_jax.store import Backbone, load_backbone, load_lora, stream
from variator_jax.store.any_backbone import open_backbone
from variator_jax.store.lora_merge import collect_with_lora
from variator_jax.train.jobs import backbone_folder


def load_placed(
    path: str | os.PathLike,
    lora: str | None,
    batch_size: int,
    mesh_shape: Sequence[int] | None,
) -> tuple[Backbone, Mesh | None]:
    """A backbone whose arrays go to their devices one by one as they are read, and the mesh.

    Args:
      path: a backbone folder in any format, or a run folder that holds one.
      lora: a LoRA folder or a run folder, merged into the backbone; None for none.
      batch_size: rows, which the mesh must divide.
      mesh_shape: `(data, fsdp, model)` devices; None chooses. With one device there is no mesh.

    Raises:
      CheckpointError: as `load_backbone`.
      ConfigError: for a mesh that is not possible.
    """
    folder = backbone_folder(str(path))
    source = open_backbone(folder)
    mesh = meshes.mesh_or_none(source.config, batch_size, mesh_shape)
    if mesh is None:
        return load_backbone(folder, lora=lora), None
    shardings = traverse_util.flatten_dict(meshes.parameter_shardings(source.config, mesh), sep="/")

    def place(name: str, array: Any) -> jax.Array:
        return meshes.place(array, shardings[name])

    if lora is None:
        return stream.collect(source, None, place), mesh
    return collect_with_lora(source, load_lora(lora), None, place), mesh
