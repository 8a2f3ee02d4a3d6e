"""T5X's partitioner with a mesh of a given shape; and the budget.

The plugin is small, so each device has all of it.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import jax
import numpy as np
from t5x import partitioning, utils

from variator_jax.errors import ConfigError
from variator_jax.t5x_engine.model import DistillationModel
from variator_jax.t5x_engine.network import PLUGIN, is_trained
from variator_jax.train.plan import Part, Plan


class MeshPartitioner(partitioning.PjitPartitioner):
    """A partitioner over a mesh of `(data, model)` devices, in jax's order.

    T5X chooses the mesh from the TPU's topology; on CPUs it ignores `num_partitions` and makes all
    devices one model. This one is for CPUs, and for GPUs.
    """

    def __init__(self, mesh_shape: Sequence[int], **kwargs: Any) -> None:
        parts = model_devices(mesh_shape)
        super().__init__(num_partitions=parts, **kwargs)
        self._mesh_shape = (mesh_shape[0], parts)

    @cached_property
    def mesh(self) -> jax.sharding.Mesh:
        """The mesh, with T5X's axis names."""
        devices = np.asarray(jax.devices())
        if devices.size != np.prod(self._mesh_shape):
            raise ConfigError(
                f"MESH_SHAPE is {self._mesh_shape} (data, model), which is "
                f"{np.prod(self._mesh_shape)} devices; there are {devices.size}."
            )
        return jax.sharding.Mesh(devices.reshape(self._mesh_shape), ("data", "model"))


def model_devices(mesh_shape: Sequence[int]) -> int:
    """Devices of a mesh's model axis. The mesh may have the built-in engine's axis `fsdp`, of 1.

    Raises:
      ConfigError: for anything else.
    """
    sizes = [] if isinstance(mesh_shape, str) else list(mesh_shape)
    positive = all(isinstance(size, int) and size > 0 for size in sizes)
    if not positive or len(sizes) not in (2, 3) or len(sizes) == 3 and sizes[1] != 1:
        raise ConfigError(
            f"MESH_SHAPE is {mesh_shape!r}; expected (data, model) or (data, 1, model), for T5X's "
            "mesh has no fsdp. --engine=builtin has."
        )
    return sizes[-1]


def partitioner(
    num_partitions: int = 1,
    model_parallel_submesh: Sequence[int] | None = None,
    mesh_shape: Sequence[int] | None = None,
    additional_rules: Sequence[tuple[str, str | None]] = (),
) -> partitioning.PjitPartitioner:
    """T5X's partitioner, or one over a given mesh.

    Args:
      num_partitions: devices that share one copy of the weights.
      model_parallel_submesh: T5X's `(x, y, z, cores)`, in place of `num_partitions`.
      mesh_shape: `(data, model)`, or `(data, 1, model)`, in place of both.
      additional_rules: logical axis rules of your own, before T5X's.
    """
    # The plugin's own axes have no rule, so every device has them whole.
    rules = partitioning.standard_logical_axis_rules(additional_rules=additional_rules)
    if mesh_shape is not None:
        return MeshPartitioner(mesh_shape, logical_axis_rules=rules)
    submesh = tuple(model_parallel_submesh) if model_parallel_submesh else None
    parts = None if submesh else num_partitions
    return partitioning.PjitPartitioner(parts, submesh, logical_axis_rules=rules)


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
      partitioner: T5X's partitioner, which spreads arrays over devices.
      feature_lengths: tokens of `inputs` and `targets`.
      batch_size: rows of a batch.
      backbone_dtype: what the backbone is cast to; None for the network's own.
    """
    inputs, targets = feature_lengths["inputs"], feature_lengths["targets"]
    state = utils.TrainStateInitializer(
        optimizer_def=model.optimizer_def,
        init_fn=model.get_initial_variables,
        input_shapes={
            "encoder_input_tokens": (batch_size, inputs),
            "decoder_input_tokens": (batch_size, targets),
            "decoder_target_tokens": (batch_size, targets),
        },
        partitioner=partitioner,
    )
    shapes, axes, mesh = state.global_train_state_shape, state.train_state_axes, partitioner.mesh
    shardings = [jax.NamedSharding(mesh, spec or jax.P()) for spec in axes_leaves(axes.params)]
    params = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        dict(shapes.params),
        jax.tree.unflatten(jax.tree.structure(dict(shapes.params)), shardings),
    )
    leaves = jax.tree_util.tree_leaves_with_path(params)
    plugin = params.pop(PLUGIN, {})
    parts = [
        Part.of("backbone", params, backbone_dtype),
        Part.of("plugin and its output scales", plugin),
    ]
    if model.optimizer_def is not None:  # both of the plugin alone, which is on every device
        parts.append(Part.of("gradients", [leaf for path, leaf in leaves if is_trained(path)]))
        parts.append(Part.of("optimizer state", shapes.param_states))
    start = model.start
    return Plan(start.backbone, (start.plugin,), tuple(parts), mesh.size, inputs)


def axes_leaves(axes: Any) -> list[Any]:
    """The partition specs of a tree; None, which stands for no axes, is one of them."""
    return jax.tree.leaves(axes, is_leaf=lambda x: x is None or isinstance(x, jax.P))
