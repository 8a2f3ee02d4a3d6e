"""What the distillation step takes on each device, by compiling it for shapes alone.

No weights are made and no data are read. The step is compiled for the devices that are there, for
as many pretended CPU devices, or, where the package libtpu is installed, for a TPU slice that is
not there. What is in memory before a step is known exactly; what a step needs on top is what that
compiler reports.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from variator_jax import mesh as meshes
from variator_jax.backbones.t5 import T5, T5Config
from variator_jax.errors import ConfigError
from variator_jax.plugin import PluginConfig, init_plugin
from variator_jax.train.losses import LossConfig
from variator_jax.train.objectives import Distillation
from variator_jax.train.plan import placed_shapes, readable, weights_dtype
from variator_jax.train.settings import check_divides
from variator_jax.train.step import TrainState, init_state, jit_train_step, make_train_step

_CPU_NOTE = (
    "The compiler for CPUs undoes rematerialisation and keeps float32 copies of bfloat16 weights, "
    "so its temporary memory is far above an accelerator's: install libtpu and give --topology, "
    "or run this where the accelerator is."
)
_KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# `%name = TYPE kind(` or `kind-start(`; TYPE is one array, or a tuple of some with comments in it.
_LINE = re.compile(rf" = (?P<type>.+?) (?P<kind>{'|'.join(_KINDS)})(?P<start>-start)?\(")
_ARRAY = re.compile(r"(?:pred|[a-z]+(\d+))\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """All of one kind: how many, and the bytes that each device has of their results."""

    count: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Budget:
    """A compiled step's cost on each device of a mesh, and the memory that it has to fit in.

    Attributes:
      mesh: its shape.
      sites: of the plugin, in words.
      compiler: the kind of device that it was compiled for.
      arguments: bytes of backbone, plugin, optimizer state and batch.
      temporary: bytes that the step needs on top.
      flops: of its matrix products and all else that the compiler counts, in all microbatches.
      collectives: bytes by kind of collective, over all microbatches.
      hbm_bytes: memory of a device; None where it was not named.
    """

    mesh: str
    sites: str
    compiler: str
    arguments: int
    temporary: int
    flops: float
    collectives: Mapping[str, Collective]
    hbm_bytes: int | None = None

    def __str__(self) -> str:
        together = self.arguments + self.temporary
        rows = [
            f"mesh {self.mesh}, compiled for {self.compiler}, {self.sites}; of each device:",
            f"  weights, plugin, optimizer, batch {readable(self.arguments):>13}",
            f"  a step's temporary memory         {readable(self.temporary):>13}",
            f"  together                          {readable(together):>13}",
            f"  FLOPs of a step                   {self.flops:>9.3g}",
        ]
        for kind, moved in sorted(self.collectives.items()):
            rows.append(f"  {kind:<33} {moved.bytes / 2**20:>9.2f} MiB in {moved.count}")
        if self.hbm_bytes is not None:
            verdict = "fits" if together <= self.hbm_bytes else "does not fit"
            rows.append(f"it {verdict} in {readable(self.hbm_bytes)}")
        return "\n".join(rows + [_CPU_NOTE] * (self.compiler == "cpu"))


@dataclasses.dataclass(frozen=True)
class Step:
    """A distillation step on a mesh.

    Attributes:
      config: shape of the backbone.
      plugin: the compression plugin.
      optimizer: of the plugin's parameters.
      lengths: tokens of `inputs` and `targets`.
      batch_size: rows of a batch, over all devices.
      mesh: the devices.
      loss: the losses' weights.
      num_microbatches: passes that a batch is cut into.
      weight_dtype: what the frozen weights are kept in.
    """

    config: T5Config
    plugin: PluginConfig
    optimizer: optax.GradientTransformation
    lengths: Mapping[str, int]
    batch_size: int
    mesh: Mesh
    loss: LossConfig = LossConfig()
    num_microbatches: int = 1
    weight_dtype: Any = "float32"

    @functools.cached_property
    def compiled(self) -> jax.stages.Compiled:
        """The step, compiled for `shapes`."""
        objective = Distillation(T5(self.config), self.plugin, self.loss)
        step = make_train_step(objective, self.optimizer, self.num_microbatches)
        shapes = self.shapes()
        with meshes.activations(self.mesh):
            return jit_train_step(step, shapes[0], self.mesh).lower(*shapes).compile()

    @functools.cached_property
    def one_pass(self) -> "Step":
        """The step of one microbatch, for a compiler counts the body of a loop once."""
        if self.num_microbatches == 1:
            return self
        rows = self.batch_size // self.num_microbatches
        return dataclasses.replace(self, batch_size=rows, num_microbatches=1)

    @property
    def flops(self) -> float:
        """FLOPs of the whole step, as its compiler counts them."""
        cost: Any = self.one_pass.compiled.cost_analysis()
        cost = cost[0] if isinstance(cost, list) else cost or {}
        return self.num_microbatches * float(cost.get("flops", 0.0))

    def shapes(self) -> tuple[TrainState, tuple[Any, Any], dict[str, Any]]:
        """Shapes, dtypes and places of its arguments: state, (weights, output scales), batch."""

        def placed(tree: Any, sharding: Any) -> Any:
            return jax.tree.map(lambda x: x.update(sharding=sharding), tree)

        weights = placed_shapes(self.config, self.mesh, self.weight_dtype)
        stack = T5(self.config).stack()
        fresh = jax.eval_shape(lambda: init_plugin(self.plugin, stack, jax.random.key(0)))
        state = jax.eval_shape(lambda params: init_state(params, self.optimizer), fresh.params)
        columns = {"encoder_input_tokens": self.lengths["inputs"]}
        if self.config.has_decoder:
            names = ("decoder_input_tokens", "decoder_target_tokens", "decoder_loss_weights")
            columns |= dict.fromkeys(names, self.lengths["targets"])
        batch = {
            name: jax.ShapeDtypeStruct((self.batch_size, length), jnp.int32)
            for name, length in columns.items()
        }
        everywhere = meshes.replicated(self.mesh)
        frozen = (weights, placed(fresh.output_scales, everywhere))
        return placed(state, everywhere), frozen, placed(batch, meshes.batch_sharding(self.mesh))


def budget(
    *,
    backbone: T5Config,
    plugin: PluginConfig,
    optimizer: optax.GradientTransformation,
    feature_lengths: Mapping[str, int],
    batch_size: int,
    loss: LossConfig = LossConfig(),  # noqa: B008 - frozen
    num_microbatches: int = 1,
    mesh_shape: Sequence[int] | None = None,
    backbone_dtype: str | None = None,
    remat: bool | str = False,
    trained: str = "plugin",
    devices: Sequence[Any] | None = None,
    hbm_bytes: int | None = None,
) -> Budget:
    """Compiles the step of a plugin run and returns what it takes.

    Args: see `Step`, and
      mesh_shape: `(data, fsdp, model)`; None chooses, as a device of that memory would.
      backbone_dtype: what the frozen weights are kept in.
      remat: what a layer keeps for the backward pass.
      trained: 'plugin': other runs are planned by --dry_run alone.
      devices: to compile for; by default those that are there.
      hbm_bytes: memory of a device.

    Raises:
      ConfigError: for a mesh that is not possible, or a run of another kind.
    """
    if trained != "plugin":
        raise ConfigError(
            f"TRAINED is {trained!r}; the step of a plugin alone is compiled here. "
            "variator train --dry_run plans the others."
        )
    check_divides("NUM_MICROBATCHES", num_microbatches, batch_size)
    config = dataclasses.replace(backbone, remat=remat)
    devices = list(devices if devices is not None else jax.devices())
    weight = weights_dtype(trained, config, backbone_dtype)
    rows = batch_size // num_microbatches
    mesh = meshes.make_mesh(config, rows, mesh_shape, devices, weight.itemsize, hbm_bytes)
    sizes = (feature_lengths, batch_size, mesh, loss, num_microbatches, weight)
    step = Step(config, plugin, optimizer, *sizes)
    memory = step.compiled.memory_analysis()
    return Budget(
        str(meshes.MeshShape(*mesh.devices.shape)),
        plugin.description,
        devices[0].device_kind,
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        step.flops,
        collectives(step.one_pass.compiled.as_text() or "", num_microbatches),
        hbm_bytes,
    )


def topology_devices(name: str) -> list[Any]:
    """The devices of a TPU slice that is not there, such as 'v5e:4x4'.

    Raises:
      ConfigError: without the package libtpu, or for a slice that it does not know.
    """
    from jax.experimental import topologies

    extent = name.partition(":")[2].split("x")
    single = {"chips_per_host_bounds": tuple(map(int, extent))} if set(extent) == {"1"} else {}
    try:
        slice_ = topologies.get_topology_desc(platform="tpu", topology_name=name, **single)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise ConfigError(
            f"--topology {name} cannot be compiled for: {str(error).splitlines()[0]} It takes the "
            "libtpu that belongs to this JAX (pip install 'jax[tpu]'), and names such as v5e:4x4."
        ) from error
    return list(slice_.devices)


def collectives(text: str, passes: int = 1) -> dict[str, Collective]:
    """The collectives of an optimised module, by kind, `passes` times.

    A collective that is started and awaited apart has a tuple of operands and results; the results
    alone are counted.
    """
    total: dict[str, Collective] = {}
    for match in filter(None, map(_LINE.search, text.splitlines())):
        before = total.get(match["kind"], Collective(0, 0))
        size = before.bytes + passes * _result_bytes(match)
        total[match["kind"]] = Collective(before.count + passes, size)
    return total


def _result_bytes(match: re.Match[str]) -> int:
    sizes = [
        math.prod(int(n) for n in shape.split(",") if n) * int(bits or 8) // 8
        for bits, shape in _ARRAY.findall(match["type"])
        # A permutation may have two counters, u32[], behind operand and result.
        if not (match["kind"] == "collective-permute" and bits == "32" and not shape)
    ]
    if match["start"] and match["kind"] != "all-reduce" and len(sizes) > 1:
        sizes = sizes[len(sizes) // 2 :]
    return sum(sizes)
