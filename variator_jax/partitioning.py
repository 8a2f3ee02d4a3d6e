"""Which device holds what: the mesh, and rules from logical axes to its axes.

T5's own axis names are T5X's. A mesh has the axes `data` (copies of everything), `fsdp` (weights
cut along their width, gathered when used) and `model` (heads and feed-forward units split). Batches
are cut along `data` and `fsdp`. Nothing here knows what a step computes.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import flax
import jax
import numpy as np
from flax.linen import partitioning as flax_partitioning
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from variator_jax.backbone import T5Config, Transformer

AXES = ("data", "fsdp", "model")
BATCH_AXES = ("data", "fsdp")

# Weights: logical axis -> mesh axis. A plugin's are not named: it is small, and lies everywhere.
PARAMETER_RULES: Mapping[str, str] = {
    "vocab": "model",
    "mlp": "model",
    "heads": "model",
    "joined_kv": "model",
    "embed": "fsdp",
}
# Activations, and weights while they are used; what is not named is not cut. `embed` is whole: a
# weight that lies in parts is gathered for its product, and the batch's rows stay where they are.
ACTIVATION_RULES = (
    ("batch", BATCH_AXES),
    ("vocab", "model"),
    ("heads", "model"),
    ("joined_kv", "model"),
    ("mlp", "model"),
    ("length", None),
    ("embed", None),
)


def parameter_shardings(config: T5Config, mesh: Mesh) -> dict:
    """A backbone's tree of `NamedSharding`, by the logical axes of its parameters."""
    axes = flax_partitioning.get_axis_names(_logical_axes(config))

    def sharding(names: PartitionSpec) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*(PARAMETER_RULES.get(name) for name in names)))

    is_leaf = lambda x: isinstance(x, PartitionSpec)  # noqa: E731
    return dict(flax.core.unfreeze(jax.tree.map(sharding, axes, is_leaf=is_leaf)))


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device: the plugin, its optimizer's state, metrics."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch among `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def own_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """Which rows of a batch lie on this process's devices, rising."""
    parts = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for (part,) in parts for row in range(batch_size)[part]})


def global_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Arrays over the whole mesh, of a batch of which every process has all rows.

    Each process keeps those of its own devices. The rows of a batch thus depend on the seed alone,
    and not on how many processes there are.
    """
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_callback(array.shape, sharding, functools.partial(_rows, array))
        for name, array in batch.items()
    }


def global_microbatches(
    batch: Mapping[str, np.ndarray], mesh: Mesh, count: int
) -> Iterator[dict[str, jax.Array]]:
    """The microbatches of a batch, one after the other: every so many-th row, as in the step.

    Each has its part on every device, of rows that lie there in the whole batch, too.
    """
    for first in range(count):
        yield global_batch({name: array[first::count] for name, array in batch.items()}, mesh)


def place(array: Any, sharding: NamedSharding) -> jax.Array:
    """Puts an array that every process has whole where `sharding` says; each keeps its part."""
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, sharding, functools.partial(_rows, host))


def gather(array: jax.Array) -> np.ndarray:
    """The whole of an array, in every process's memory."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def wait_for_all(name: str) -> None:
    """Returns when every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def from_first(array: np.ndarray) -> np.ndarray:
    """What process 0 has, in every process: all call this at once, with arrays of one shape.

    Of at most 32 bits a number, for JAX cuts wider ones.
    """
    if jax.process_count() == 1:
        return array
    return np.asarray(multihost_utils.broadcast_one_to_all(array))


def _rows(array: np.ndarray, index: Any) -> np.ndarray:
    return array[index]


@contextlib.contextmanager
def activations(mesh: Mesh) -> Iterator[None]:
    """While active, traced networks and splices pin their activations to the mesh."""
    # Not `with mesh`: Flax looks for the mesh that `set_mesh` sets, and without it pins nothing.
    with jax.set_mesh(mesh), flax_partitioning.axis_rules(ACTIVATION_RULES):
        yield


@functools.lru_cache(maxsize=16)
def _shapes(config: T5Config) -> Any:
    tokens = jax.ShapeDtypeStruct((1, 2), np.int32)
    return jax.eval_shape(Transformer(config).init, jax.random.key(0), tokens, tokens)


def _logical_axes(config: T5Config) -> Any:
    return _shapes(config)["params_axes"]
