"""The backbone of an evaluation or inference, in its place on a mesh."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import traverse_util
from jax.sharding import Mesh

from variator_jax import mesh as meshes
from variator_jax.evaluation.data import EvalData
from variator_jax.store import Backbone, load_backbone, load_lora
from variator_jax.store.backbone import collect
from variator_jax.store.formats import backbone_folder, open_backbone
from variator_jax.store.lora import collect_with_lora
from variator_jax.train.settings import check_vocabulary


def load_for(
    data: EvalData, path: str, lora: str | None, mesh_shape: Sequence[int] | None
) -> tuple[Backbone, Mesh | None]:
    """A backbone for some tasks, and the mesh that its arrays are placed on as they are read.

    Args:
      data: the tasks; the mesh must divide their batches.
      path: a backbone folder in any format, or a run folder that holds one.
      lora: a LoRA folder or a run folder, merged into the backbone; None for none.
      mesh_shape: `(data, fsdp, model)` devices; None chooses. With one device there is no mesh.

    Raises:
      CheckpointError: as `load_backbone`.
      ConfigError: for a mesh that is not possible, or a vocabulary that is not the backbone's.
      DataError: as `EvalData.tasks`.
    """
    tasks = data.tasks()
    folder = backbone_folder(path)
    source = open_backbone(folder)
    mesh = meshes.mesh_or_none(source.config, data.batch_size, mesh_shape)
    if mesh is None:
        backbone = load_backbone(folder, lora=lora)
        backbone = dataclasses.replace(backbone, params=jax.device_put(backbone.params))
    else:
        shardings = meshes.parameter_shardings(source.config, mesh)
        by_name = traverse_util.flatten_dict(shardings, sep="/")

        def place(name: str, array: Any) -> jax.Array:
            return meshes.place(array, by_name[name])

        if lora is None:
            backbone = collect(source, None, place)
        else:
            backbone = collect_with_lora(source, load_lora(lora), None, place)
    for task in tasks:
        for feature in features(task).values():
            trained_with = backbone.vocabulary_fingerprint
            check_vocabulary(task, feature.vocabulary, backbone.config, trained_with)
    return backbone, mesh


def features(task: str) -> Mapping[str, Any]:
    """The seqio features of a task, 'inputs' and 'targets', with their vocabularies."""
    from variator_jax.data.batches import task_or_mixture

    return task_or_mixture(task).output_features
