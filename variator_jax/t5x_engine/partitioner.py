"""T5X's partitioner with rules for the plugin's axes, and with a mesh of a given shape."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import jax
import numpy as np
from t5x import partitioning

from variator_jax.errors import ConfigError

# The plugin is small: it is replicated on every device.
PLUGIN_RULES = (("plugin_in", None), ("plugin_ratio", None), ("plugin_hidden", None))


class MeshPartitioner(partitioning.PjitPartitioner):
    """A partitioner over a mesh of `(data, model)` devices, in jax's order.

    T5X chooses the mesh from the TPU's topology; on CPUs it ignores `num_partitions` and makes all
    devices one model. This serves there, and on GPUs.
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
    numbers = list(mesh_shape) if not isinstance(mesh_shape, str) else []
    if len(numbers) not in (2, 3) or not all(isinstance(n, int) and n > 0 for n in numbers):
        raise ConfigError(
            f"MESH_SHAPE is {mesh_shape!r}; under T5X it is (data, model), positive integers."
        )
    if len(numbers) == 3 and numbers[1] != 1:
        raise ConfigError(
            f"MESH_SHAPE {tuple(numbers)} is (data, fsdp, model), and T5X's mesh has no fsdp: make "
            "it 1, or use --engine=builtin."
        )
    return numbers[-1]


def partitioner(
    num_partitions: int = 1,
    model_parallel_submesh: Sequence[int] | None = None,
    mesh_shape: Sequence[int] | None = None,
    additional_rules: Sequence[tuple[str, str | None]] = (),
    params_on_devices: bool = True,
) -> partitioning.PjitPartitioner:
    """T5X's partitioner, or one over a given mesh.

    Args:
      num_partitions: devices that share one copy of the weights.
      model_parallel_submesh: T5X's `(x, y, z, cores)`, in place of `num_partitions`.
      mesh_shape: `(data, model)`, or `(data, 1, model)`, in place of both.
      additional_rules: logical axis rules of your own, before T5X's.
      params_on_devices: False keeps weights in host memory, as T5X's export may want.
    """
    rules = partitioning.standard_logical_axis_rules(
        additional_rules=[*additional_rules, *PLUGIN_RULES]
    )
    if mesh_shape is not None:
        return MeshPartitioner(
            mesh_shape, logical_axis_rules=rules, params_on_devices=params_on_devices
        )
    submesh = tuple(model_parallel_submesh) if model_parallel_submesh else None
    return partitioning.PjitPartitioner(
        num_partitions=None if submesh else num_partitions,
        model_parallel_submesh=submesh,
        logical_axis_rules=rules,
        params_on_devices=params_on_devices,
    )
