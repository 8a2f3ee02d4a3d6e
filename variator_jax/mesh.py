"""The device mesh: choosing its shape, and which device holds what.

T5's own axis names are T5X's. A mesh has the axes `data` (copies of everything), `fsdp` (weights
cut along their width, gathered when used) and `model` (heads and feed-forward units split). Batches
are cut along `data` and `fsdp`. Nothing here knows what a step computes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax
import jax
import numpy as np
from flax.linen import partitioning as flax_partitioning
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from variator_jax.backbones.t5 import T5Config, Transformer, shape_params
from variator_jax.errors import ConfigError

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


def mesh_or_none(config: T5Config, batch_size: int, shape: Sequence[int] | None) -> Mesh | None:
    """The mesh on which a trained backbone runs; None where there is one device only.

    Raises:
      ConfigError: as `make_mesh`.
    """
    if shape is None and jax.device_count() == 1:
        return None
    mesh = make_mesh(config, batch_size, shape)
    return mesh if mesh.size > 1 else None


def place_parameters(params: dict, config: T5Config, mesh: Mesh | None) -> dict:
    """A backbone's parameters where the mesh wants them; on the first device without a mesh."""
    if mesh is None:
        return jax.device_put(params)
    return jax.tree.map(place, params, parameter_shardings(config, mesh))


def place_everywhere(tree: Any, mesh: Mesh | None) -> Any:
    """A small tree, such as a plugin's arrays, whole on every device."""
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
      static: names of keyword arguments for each of whose values it is compiled anew.
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


@dataclasses.dataclass(frozen=True)
class MeshShape:
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
    room: int | None = None,
) -> Mesh:
    """The mesh of a run.

    Args:
      config: the backbone, whose heads, units and width must divide.
      batch_size: rows of a batch or microbatch, which must divide among `data` and `fsdp`.
      shape: `(data, fsdp, model)`; None chooses by the number of devices and the backbone's size.
        Of several processes all must ask at once then, for they choose by what process 0 finds.
      devices: by default all.
      bytes_per_weight: of the backbone in memory, for the choice.
      room: bytes of memory of a device, for the choice; by default what the devices tell.

    Raises:
      ConfigError: for a mesh that is not possible, with the nearest that are.
    """
    found = list(devices if devices is not None else jax.devices())
    if shape is None:
        room = _room(found) if room is None else room
        chosen = default_shape(config, batch_size, len(found), room, bytes_per_weight)
    else:
        chosen = _given(shape)
        check_shape(chosen, config, batch_size, len(found))
    return Mesh(_laid_out(chosen, found), AXES)


def default_shape(
    config: T5Config,
    batch_size: int,
    num_devices: int,
    room: int | None = None,
    bytes_per_weight: int = 4,
) -> MeshShape:
    """The mesh with the least talk whose weights leave half of a device's memory to activations.

    Data parallelism talks least, and FSDP less than model parallelism: a plugin's gradients are
    small, gathered weights are not, and activations are exchanged in every layer.

    Args:
      config: the backbone.
      batch_size: rows of a batch.
      num_devices: how many there are.
      room: bytes of memory of a device; None where it is not known, as on CPUs.
      bytes_per_weight: of the backbone in memory.

    Raises:
      ConfigError: if no mesh is possible at all.
    """
    shapes = possible_shapes(config, batch_size, num_devices)
    if not shapes:
        raise ConfigError(
            f"No mesh of {num_devices} devices is possible for backbone {config.name!r} and a "
            f"batch of {batch_size}: take a batch that is a multiple of {num_devices}."
        )
    weights = _parameters(config) * bytes_per_weight

    def cost(shape: MeshShape) -> tuple[bool, int, int]:
        crowded = room is not None and weights / (shape.fsdp * shape.model) > room / 2
        return crowded, shape.model, shape.fsdp

    # Where nothing fits, the one that spreads the weights most.
    best = min(shapes, key=cost)
    return best if not cost(best)[0] else max(shapes, key=lambda s: (s.fsdp * s.model, s.fsdp))


def possible_shapes(config: T5Config, batch_size: int, num_devices: int) -> list[MeshShape]:
    """All meshes of this many devices that the backbone and the batch allow."""
    divisors = [n for n in range(1, num_devices + 1) if num_devices % n == 0]
    shapes = (
        MeshShape(num_devices // (fsdp * model), fsdp, model)
        for fsdp, model in itertools.product(divisors, repeat=2)
        if num_devices % (fsdp * model) == 0
    )
    return [shape for shape in shapes if not _obstacle(shape, config, batch_size)]


def check_shape(shape: MeshShape, config: T5Config, batch_size: int, num_devices: int) -> None:
    """Refuses a mesh that is not possible.

    Raises:
      ConfigError: with the reason and the nearest meshes that are.
    """
    if shape.size != num_devices:
        reason = f"has {shape.size} devices, and there are {num_devices}"
    else:
        reason = _obstacle(shape, config, batch_size)
    if not reason:
        return

    def distance(other: MeshShape) -> float:
        pairs = zip(dataclasses.astuple(shape), dataclasses.astuple(other), strict=True)
        return sum(abs(math.log(max(a, 1)) - math.log(b)) for a, b in pairs)

    near = sorted(possible_shapes(config, batch_size, num_devices), key=distance)[:3]
    instead = "; ".join(map(str, near)) or f"none, with a batch of {batch_size}"
    message = f"MESH_SHAPE {shape} {reason}. Possible: {instead}."
    if shape.size != num_devices:
        message += f" `variator budget --devices {shape.size}` checks a mesh without the devices."
    raise ConfigError(message)


def describe(mesh: Mesh, config: T5Config, bytes_per_weight: int) -> str:
    """One line: the mesh, and what the backbone takes on each device."""
    shape = MeshShape(*mesh.devices.shape)
    each = _parameters(config) * bytes_per_weight / (shape.fsdp * shape.model)
    kind = mesh.devices.flat[0].device_kind
    return (
        f"mesh {shape} of {kind}, {jax.process_count()} process(es); "
        f"backbone: {each / 2**20:,.1f} MiB a device"
    )


def _obstacle(shape: MeshShape, config: T5Config, batch_size: int) -> str:
    """Why a mesh is not possible; empty if it is."""
    rows = shape.data * shape.fsdp
    parts = (
        (batch_size, rows, f"cannot share {batch_size} rows of a (micro)batch"),
        (config.num_heads, shape.model, f"cannot split {config.num_heads} heads"),
        (config.mlp_dim, shape.model, f"cannot split {config.mlp_dim} feed-forward units"),
        (
            config.encoder_mlp,
            shape.model,
            f"cannot split {config.encoder_mlp} units of the encoder",
        ),
        (config.vocab_size, shape.model, f"cannot split {config.vocab_size} embeddings"),
        (config.embed_dim, shape.fsdp, f"cannot cut a width of {config.embed_dim}"),
    )
    return next((reason for whole, part, reason in parts if whole % part), "")


def _given(shape: Sequence[int]) -> MeshShape:
    numbers = list(shape) if not isinstance(shape, str) else []
    if len(numbers) == 2:  # T5X's form: no fsdp
        numbers.insert(1, 1)
    if len(numbers) != 3 or not all(isinstance(n, int) and n > 0 for n in numbers):
        raise ConfigError(
            f"MESH_SHAPE is {shape!r}; it is a tuple (data, fsdp, model) of positive integers, "
            "such as (8, 1, 1), or (data, model)."
        )
    return MeshShape(*numbers)


def _laid_out(shape: MeshShape, devices: Sequence[Any]) -> np.ndarray:
    """`[data, fsdp, model]` of devices: neighbours on an axis are near, most of all on `model`."""
    extents = dataclasses.astuple(shape)
    if _is_torus(devices):
        # JAX's order goes host by host there, and an axis is to go along the links.
        return mesh_utils.create_device_mesh(extents, devices, allow_split_physical_axes=True)
    # In JAX's order neighbours are near each other: devices of a host, then hosts of a slice.
    return np.asarray(devices).reshape(extents)


def _is_torus(devices: Sequence[Any]) -> bool:
    """Whether these are the chips of one box of TPUs, each a device; JAX knows how to cut that.

    Not so, and left in JAX's order: parts of a slice, several slices, chips of two devices.
    """
    if any(getattr(device, "platform", "") != "tpu" for device in devices):
        return False
    places = {tuple(device.coords) for device in devices}
    extents = [max(along) - min(along) + 1 for along in zip(*places, strict=True)]
    return len(places) == len(devices) == math.prod(extents)


def _room(devices: Sequence[Any]) -> int | None:
    """Bytes of memory of a device, where it tells; in every process what process 0 finds.

    A process can ask its own devices only, and what they tell differs by some bytes: processes
    that chose by their own numbers could choose different meshes, and wait for ever.
    """
    own = (d for d in devices if getattr(d, "process_index", 0) == jax.process_index())
    room = _memory(next(own, None)) or 0
    return int(from_first(np.asarray(room // 2**20, np.int32))) * 2**20 or None


def _memory(device: Any) -> int | None:
    try:
        stats = device.memory_stats()
    except (AttributeError, NotImplementedError, jax.errors.JaxRuntimeError):
        return None
    return stats.get("bytes_limit") if stats else None


def _parameters(config: T5Config) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shape_params(config)))
