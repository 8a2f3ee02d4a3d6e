"""The budget of a T5X run, by T5X's own shapes and T5X's own partitioning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from t5x import partitioning, utils

from variator_jax.t5x_engine.model import DistillationModel
from variator_jax.t5x_engine.plugin_branch import OUTPUT_SCALE, PLUGIN
from variator_jax.train.plan import Part, Plan


def plan(
    *,
    model: DistillationModel,
    partitioner: partitioning.PjitPartitioner,
    feature_lengths: Mapping[str, int],
    batch_size: int = 1,
    backbone_dtype: str | None = None,
) -> Plan:
    """What T5X will hold on each device, from the shapes of its train state.

    Args:
      model: T5X's model.
      partitioner: T5X's partitioner, which knows how arrays are sharded.
      feature_lengths: tokens of `inputs` and `targets`.
      batch_size: rows of a batch.
      backbone_dtype: what the backbone is cast to; None for float32.
    """
    lengths = {
        "encoder_input_tokens": feature_lengths["inputs"],
        "decoder_input_tokens": feature_lengths["targets"],
        "decoder_target_tokens": feature_lengths["targets"],
    }
    state = utils.TrainStateInitializer(
        optimizer_def=model.optimizer_def,
        init_fn=model.get_initial_variables,
        input_shapes={name: (batch_size, length) for name, length in lengths.items()},
        partitioner=partitioner,
    )
    shapes, axes = state.global_train_state_shape, state.train_state_axes
    backbone, plugin = _split(shapes.params)
    where, beside = _split(axes.params)
    mesh = partitioner.mesh
    parts = [
        _part("backbone", backbone, where, mesh, backbone_dtype),
        _part("plugin", plugin, beside, mesh),
    ]
    if model.optimizer_def is not None:
        trained = [
            x
            for path, x in jax.tree_util.tree_leaves_with_path(plugin)
            if path[-1].key != OUTPUT_SCALE
        ]
        parts.append(Part.of("gradients", trained))
        parts.append(_part("optimizer state", shapes.param_states, axes.param_states, mesh))
    start = model.start
    return Plan(start.backbone, start.plugin, tuple(parts), mesh.size, feature_lengths["inputs"])


def _split(params: Any) -> tuple[Any, Any]:
    tree = dict(params)
    plugin = tree.pop(PLUGIN, {})
    return tree, plugin


def _part(
    name: str, shapes: Any, axes: Any, mesh: jax.sharding.Mesh, dtype: str | None = None
) -> Part:
    leaves = jax.tree.leaves(shapes)
    specs = jax.tree.leaves(axes, is_leaf=lambda x: x is None or isinstance(x, jax.P))
    if len(specs) != len(leaves):  # Counters have no axes.
        specs = [None] * len(leaves)
    pieces = [
        Part.of(name, [leaf], dtype, _shards(spec, mesh))
        for leaf, spec in zip(leaves, specs, strict=True)
    ]
    return Part(name, sum(p.numbers for p in pieces), sum(p.bytes for p in pieces))


def _shards(spec: Any, mesh: jax.sharding.Mesh) -> int:
    names = [name for entry in spec or () if entry for name in np.atleast_1d(entry)]
    return int(np.prod([mesh.shape[name] for name in names])) if names else 1
