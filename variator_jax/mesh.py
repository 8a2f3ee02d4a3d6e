"""The device mesh: its shape, and which device holds what.

Logical axis names are T5X's. A mesh has the axes `data` (copies of everything), `fsdp` (weights cut
along their width, gathered when used) and `model` (heads and feed-forward units split). Batches are
cut along `data` and `fsdp`.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax
import jax
import numpy as np
from flax.linen import partitioning as flax_partitioning
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from variator_jax.backbones.t5 import T5Config, Transformer
from variator_jax.backbones.t5.cost import backbone_parameters
from variator_jax.errors import ConfigError

AXES = ("data", "fsdp", "model")
BATCH_AXES = ("data", "fsdp")

# Weights: logical axis -> mesh axis. A plugin is small and replicated, so its axes have no rule.
_CUT = ("vocab", "heads", "joined_kv", "mlp")  # along `model`
PARAMETER_RULES: Mapping[str, str] = {**dict.fromkeys(_CUT, "model"), "embed": "fsdp"}
# Activations, and weights while they are used. `embed` is not cut: a weight in parts is gathered
# for its product, and the batch's rows stay where they are.
ACTIVATION_RULES: tuple[tuple[str, Any], ...] = (
    ("batch", BATCH_AXES),
    *((axis, "model") for axis in _CUT),
    ("length", None),
    ("embed", None),
)


def parameter_shardings(config: T5Config, mesh: Mesh) -> dict:
    """A backbone's tree of `NamedSharding`, by the logical axes of its parameters."""

    def sharding(names: PartitionSpec) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*(PARAMETER_RULES.get(name) for name in names)))

    is_leaf = lambda x: isinstance(x, PartitionSpec)  # noqa: E731
    return dict(jax.tree.map(sharding, _logical_axes(config), is_leaf=is_leaf))


@functools.lru_cache(maxsize=16)
def _logical_axes(config: T5Config) -> dict:
    tokens = jax.ShapeDtypeStruct((1, 2), np.int32)
    shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0), tokens, tokens)
    return dict(flax.core.unfreeze(flax_partitioning.get_axis_names(shapes["params_axes"])))


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device: the plugin, its optimizer's state, metrics."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch among `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def own_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """The rows of a batch that this process's devices hold, rising."""
    slices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for (part,) in slices for row in range(batch_size)[part]})


def place(array: Any, sharding: NamedSharding) -> jax.Array:
    """Distributes an array that every process has in full; each process keeps its own part."""
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def global_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Arrays over all devices, of a batch of which every process has all rows.

    The rows of a batch thus depend on the seed alone, and not on the number of processes.
    """
    sharding = batch_sharding(mesh)
    return {name: place(array, sharding) for name, array in batch.items()}


def global_microbatches(
    batch: Mapping[str, np.ndarray], mesh: Mesh, count: int
) -> Iterator[dict[str, jax.Array]]:
    """The microbatches of a batch: strided rows as in the step, so each is on all devices."""
    for first in range(count):
        yield global_batch({name: array[first::count] for name, array in batch.items()}, mesh)


def mesh_or_none(config: T5Config, batch_size: int, shape: Sequence[int] | None) -> Mesh | None:
    """The mesh on which a trained backbone runs; None for a single device.

    Raises:
      ConfigError: as `make_mesh`.
    """
    if shape is None and jax.device_count() == 1:
        return None
    mesh = make_mesh(config, batch_size, shape)
    return mesh if mesh.size > 1 else None


def place_parameters(params: dict, config: T5Config, mesh: Mesh | None) -> dict:
    """A backbone's parameters on the mesh; on the first device without a mesh."""
    if mesh is None:
        return jax.device_put(params)
    return jax.tree.map(place, params, parameter_shardings(config, mesh))


def place_everywhere(tree: Any, mesh: Mesh | None) -> Any:
    """A small tree, such as a plugin's arrays, copied to every device."""
    if mesh is None:
        return jax.device_put(tree)
    return jax.tree.map(lambda leaf: place(leaf, replicated(mesh)), tree)


def compile_on(
    mesh: Mesh | None, function: Callable[..., Any], static: Sequence[str] = ()
) -> Callable[..., Any]:
    """Compiles `function(params, variables, batch, **static)` for batches in the host's memory.

    Args:
      mesh: where it runs; rows of the batch are filled up with zeros to a number that the mesh
        divides, and cut off the results again, which come back to the host. None runs on the
        device where the parameters are.
      function: maps parameters, plugin arrays and a dict of `[rows, ...]` arrays to a tree of
        `[rows, ...]` arrays.
      static: names of keyword arguments; each new value compiles again.
    """
    compiled = jax.jit(function, static_argnames=tuple(static))
    if mesh is None:
        return compiled

    def call(params: Any, variables: Any, batch: Mapping[str, np.ndarray], **values: Any) -> Any:
        rows = len(next(iter(batch.values())))
        missing = -rows % (mesh.shape["data"] * mesh.shape["fsdp"])
        padded = {
            name: np.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1))
            for name, array in batch.items()
        }
        with activations(mesh):
            results = compiled(params, variables, global_batch(padded, mesh), **values)
        return jax.tree.map(lambda array: gather(array)[:rows], results)

    return call


def gather(array: jax.Array) -> np.ndarray:
    """The full array in every process's memory."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def wait_for_all(name: str) -> None:
    """Returns when every process has called this."""
    multihost_utils.sync_global_devices(name)


def from_first(array: np.ndarray) -> np.ndarray:
    """Process 0's array, in every process; all call this with arrays of one shape.

    Numbers have at most 32 bits, because JAX cuts wider ones.
    """
    return np.asarray(multihost_utils.broadcast_one_to_all(array))


def differing(array: np.ndarray) -> list[int]:
    """The processes whose array is not process 0's; the same list in every process."""
    rows = np.asarray(multihost_utils.process_allgather(array))
    return np.flatnonzero((rows != rows[0]).any(axis=1)).tolist()


@contextlib.contextmanager
def activations(mesh: Mesh) -> Iterator[None]:
    """While active, traced networks and splices pin their activations to the mesh."""
    # Not `with mesh`: Flax looks for the mesh that `set_mesh` sets, and without it pins nothing.
    with jax.set_mesh(mesh), flax_partitioning.axis_rules(ACTIVATION_RULES):
        yield


class MeshShape(NamedTuple):
    """How many devices each axis of a mesh has."""

    data: int = 1
    fsdp: int = 1
    model: int = 1

    @property
    def size(self) -> int:
        """Devices in all."""
        return self.data * self.fsdp * self.model

    def __str__(self) -> str:
        return f"{self.data} x {self.fsdp} x {self.model} (data x fsdp x model)"


def make_mesh(
    config: T5Config,
    batch_size: int,
    shape: Sequence[int] | None = None,
    devices: Sequence[Any] | None = None,
    bytes_per_weight: int = 4,
    hbm_bytes: int | None = None,
) -> Mesh:
    """The mesh of a run.

    Args:
      config: the backbone, whose heads, units and width must divide.
      batch_size: rows of a batch or microbatch, which must divide among `data` and `fsdp`.
      shape: `(data, fsdp, model)`; None chooses by the number of devices and the backbone's size.
        All processes must then call this together, because they use the memory of process 0.
      devices: by default all.
      bytes_per_weight: of the backbone in memory, for the choice.
      hbm_bytes: memory of a device, for the choice; None asks the devices.

    Raises:
      ConfigError: for a mesh that is not possible, with the nearest that are.
    """
    available = list(devices if devices is not None else jax.devices())
    if shape is not None:
        chosen = _parse_shape(shape)
        check_shape(chosen, config, batch_size, len(available))
    elif shapes := possible_shapes(config, batch_size, len(available)):
        memory = _device_memory(available) if hbm_bytes is None else hbm_bytes
        chosen = _default_shape(shapes, backbone_parameters(config) * bytes_per_weight, memory)
    else:
        raise ConfigError(
            f"No mesh of {len(available)} devices is possible for backbone {config.name!r} and a "
            f"batch of {batch_size}: take a batch that is a multiple of {len(available)}."
        )
    return Mesh(_device_grid(chosen, available), AXES)


def _default_shape(shapes: Sequence[MeshShape], weights: int, memory: int | None) -> MeshShape:
    """Picks the mesh with the least communication that keeps weights under half of device memory.

    Data parallelism communicates least, and FSDP less than model parallelism: a plugin's gradients
    are small, gathered weights are not, and activations move in every layer. Where nothing
    fits, it is the mesh that cuts the weights most.

    Args:
      shapes: those that are possible, at least one.
      weights: bytes of the whole backbone.
      memory: bytes of a device; None where it is not known, as on CPUs.
    """
    most = math.inf if memory is None else memory / 2
    fitting = [shape for shape in shapes if weights / (shape.fsdp * shape.model) <= most]
    if not fitting:
        return max(shapes, key=lambda shape: (shape.fsdp * shape.model, shape.fsdp))
    return min(fitting, key=lambda shape: (shape.model, shape.fsdp))


def possible_shapes(config: T5Config, batch_size: int, num_devices: int) -> list[MeshShape]:
    """All meshes of this many devices that the backbone and the batch allow."""
    divisors = [n for n in range(1, num_devices + 1) if num_devices % n == 0]
    pairs = ((f, m) for f in divisors for m in divisors if num_devices % (f * m) == 0)
    shapes = (MeshShape(num_devices // (f * m), f, m) for f, m in pairs)
    return [shape for shape in shapes if not _obstacle(shape, config, batch_size)]


def check_shape(shape: MeshShape, config: T5Config, batch_size: int, num_devices: int) -> None:
    """Refuses a mesh that is not possible.

    Raises:
      ConfigError: with the reason and the nearest meshes that are.
    """
    reason, advice = _obstacle(shape, config, batch_size), ""
    if shape.size != num_devices:
        reason = f"has {shape.size} devices, and there are {num_devices}"
        advice = f" `variator budget --devices {shape.size}` checks a mesh without the devices."
    if reason:
        # The nearest first, in doublings of an axis.
        shapes = possible_shapes(config, batch_size, num_devices)
        shapes.sort(key=lambda other: np.abs(np.log2(shape) - np.log2(other)).sum())
        possible = "; ".join(map(str, shapes[:3])) or f"none, with a batch of {batch_size}"
        raise ConfigError(f"MESH_SHAPE {shape} {reason}. Possible: {possible}.{advice}")


def describe(mesh: Mesh, config: T5Config, bytes_per_weight: int) -> str:
    """One line: the mesh, and the backbone's bytes on each device."""
    shape = MeshShape(*mesh.devices.shape)
    per_device = backbone_parameters(config) * bytes_per_weight / (shape.fsdp * shape.model)
    return (
        f"mesh {shape} of {mesh.devices.flat[0].device_kind}, {jax.process_count()} process(es); "
        f"backbone: {per_device / 2**20:,.1f} MiB a device"
    )


def _obstacle(shape: MeshShape, config: T5Config, batch_size: int) -> str:
    """Why a mesh is not possible; empty if it is."""
    divisions = (
        (batch_size, shape.data * shape.fsdp, "share {} rows of a (micro)batch"),
        (config.num_heads, shape.model, "split {} heads"),
        (config.mlp_dim, shape.model, "split {} feed-forward units"),
        (config.encoder_mlp, shape.model, "split {} units of the encoder"),
        (config.vocab_size, shape.model, "split {} embeddings"),
        (config.embed_dim, shape.fsdp, "cut a width of {}"),
    )
    reasons = (f"cannot {text.format(size)}" for size, parts, text in divisions if size % parts)
    return next(reasons, "")


def _parse_shape(shape: Sequence[int]) -> MeshShape:
    numbers = list(shape) if not isinstance(shape, str) else []
    if len(numbers) == 2:  # T5X's form: no fsdp
        numbers.insert(1, 1)
    if len(numbers) != 3 or not all(isinstance(n, int) and n > 0 for n in numbers):
        raise ConfigError(
            f"MESH_SHAPE is {shape!r}; it is a tuple (data, fsdp, model) of positive integers, "
            "such as (8, 1, 1), or (data, model)."
        )
    return MeshShape(*numbers)


def _device_grid(shape: MeshShape, devices: Sequence[Any]) -> np.ndarray:
    """`[data, fsdp, model]` of devices: neighbours on an axis are near, most of all on `model`."""
    if all(getattr(device, "platform", "") == "tpu" for device in devices):
        # JAX's order goes host by host there, and an axis should follow the links. JAX asserts that
        # the devices are one box: no part of a slice, one slice, and one device a chip.
        with contextlib.suppress(AssertionError):
            return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    # In JAX's order neighbours are near each other: devices of a host, then hosts of a slice.
    return np.asarray(devices).reshape(shape)


def _device_memory(devices: Sequence[Any]) -> int | None:
    """Bytes of memory of a device, in whole MiB; None if unknown. All processes get process 0's.

    A process can ask its own devices only, and their numbers differ by some bytes: processes that
    chose by their own numbers could choose different meshes and wait for each other for ever.
    """
    local = (d for d in devices if getattr(d, "process_index", 0) == jax.process_index())
    try:
        stats = next(local).memory_stats()
    except (AttributeError, NotImplementedError, StopIteration, jax.errors.JaxRuntimeError):
        stats = None
    mebibytes = ((stats or {}).get("bytes_limit") or 0) // 2**20
    return int(from_first(np.asarray(mebibytes, np.int32))) * 2**20 or None
