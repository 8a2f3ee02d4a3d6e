"""What the distillation step takes on each device, by compiling it for shapes alone.

No weights are made and no data are read. The step is compiled for the devices that are there, for
as many pretended CPU devices, or, where the package libtpu is installed, for a TPU slice that is
not there. What is in memory before a step is known exactly; what a step needs on top is what that
compiler says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from variator_jax import mesh as meshes
from variator_jax.backbones.t5 import T5, T5Config
from variator_jax.backbones.t5.network import shape_params
from variator_jax.bench.collectives import Collective, collectives, loop_trips
from variator_jax.errors import ConfigError
from variator_jax.plugin import PluginConfig, init_plugin
from variator_jax.train.losses import LossConfig
from variator_jax.train.objectives import Distillation
from variator_jax.train.step import TrainState, jit_train_step, make_train_step


@dataclasses.dataclass(frozen=True)
class StepCost:
    """One device's share of a compiled step.

    Attributes:
      arguments: bytes of backbone, plugin, optimizer state and batch.
      temporary: bytes that the step needs on top, as its compiler says.
      flops: of its matrix products and all else that the compiler counts, in all microbatches.
      collectives: what is exchanged, by kind, in all microbatches.
    """

    arguments: int
    temporary: int
    flops: float
    collectives: Mapping[str, Collective]


@dataclasses.dataclass(frozen=True)
class Budget:
    """A step's cost on a mesh, and the memory that it has to fit in."""

    mesh: str
    compiler: str
    cost: StepCost
    memory: int | None = None

    @property
    def fits(self) -> bool | None:
        """Whether it fits; None where no memory was named."""
        if self.memory is None:
            return None
        return self.cost.arguments + self.cost.temporary <= self.memory

    def __str__(self) -> str:
        cost = self.cost
        rows = [
            f"mesh {self.mesh}, compiled for {self.compiler}; of each device:",
            f"  weights, plugin, optimizer, batch {_readable(cost.arguments):>13}",
            f"  a step's temporary memory         {_readable(cost.temporary):>13}",
            f"  together                          {_readable(cost.arguments + cost.temporary):>13}",
            f"  FLOPs of a step                   {cost.flops:>9.3g}",
            *(
                f"  {kind:<33} {found.bytes / 2**20:>9.2f} MiB in {found.count}"
                for kind, found in sorted(cost.collectives.items())
            ),
        ]
        if self.memory is not None:
            verdict = "fits" if self.fits else "does not fit"
            rows.append(f"it {verdict} in {_readable(self.memory)}")
        if self.compiler == "cpu":
            rows.append(
                "The compiler for CPUs undoes rematerialisation and keeps float32 copies of "
                "bfloat16 weights, so its temporary memory is far above an accelerator's: install "
                "libtpu and give --topology, or run this where the accelerator is."
            )
        return "\n".join(rows)


def budget(
    *,
    backbone: T5Config,
    plugin: PluginConfig,
    optimizer: optax.GradientTransformation,
    feature_lengths: Mapping[str, int],
    batch_size: int,
    loss: LossConfig | None = None,
    num_microbatches: int = 1,
    mesh_shape: Sequence[int] | None = None,
    backbone_dtype: str | None = None,
    remat: bool | str = False,
    devices: Sequence[Any] | None = None,
    memory: int | None = None,
) -> Budget:
    """Compiles the step of a plugin run and says what it takes.

    Args:
      backbone: shape of the backbone.
      plugin: the compression plugin.
      optimizer: of the plugin's parameters.
      feature_lengths: tokens of `inputs` and `targets`.
      batch_size: rows of a batch, over all devices.
      loss: the distillation losses' weights.
      num_microbatches: passes that a batch is cut into.
      mesh_shape: `(data, fsdp, model)`; None chooses, as a device of that memory would.
      backbone_dtype: what the frozen weights are kept in.
      remat: what a layer keeps for the backward pass.
      devices: to compile for; by default those that are there.
      memory: bytes of a device.

    Raises:
      ConfigError: for a mesh that is not possible.
    """
    config = dataclasses.replace(backbone, remat=remat)
    found = list(devices if devices is not None else jax.devices())
    weight = jnp.dtype(backbone_dtype or config.param_dtype)
    rows = batch_size // num_microbatches
    mesh = meshes.make_mesh(config, rows, mesh_shape, found, weight.itemsize, memory)
    step = make_train_step(
        Distillation(T5(config), plugin, loss or LossConfig()), optimizer, num_microbatches
    )
    shapes = _arguments(config, plugin, optimizer, feature_lengths, batch_size, weight, mesh)
    with meshes.activations(mesh):
        compiled = jit_train_step(step, shapes[0], mesh).lower(*shapes).compile()
    shape = meshes.MeshShape(*mesh.devices.shape)
    return Budget(str(shape), found[0].device_kind, step_cost(compiled, num_microbatches), memory)


def step_cost(compiled: jax.stages.Compiled, num_microbatches: int = 1) -> StepCost:
    """What a compiled step takes on each device.

    XLA counts the FLOPs of a loop's body once, however often it runs. What is outside of the
    microbatches' loop, the update of a plugin, is nothing next to them, so all is multiplied.
    """
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    text = compiled.as_text() or ""
    flops = float((cost[0] if isinstance(cost, list) else cost or {}).get("flops", 0.0))
    return StepCost(
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        flops * loop_trips(text, num_microbatches),
        collectives(text, num_microbatches),
    )


def _readable(count: int) -> str:
    """Bytes as GiB, or MiB below one."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"


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
    except (RuntimeError, ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
        raise ConfigError(
            f"--topology {name} cannot be compiled for: {str(error).splitlines()[0]} It takes the "
            "libtpu that belongs to this JAX (pip install 'jax[tpu]'), and names such as v5e:4x4."
        ) from error
    return list(slice_.devices)


def _arguments(
    config: T5Config,
    plugin: PluginConfig,
    optimizer: optax.GradientTransformation,
    lengths: Mapping[str, int],
    batch_size: int,
    weight: Any,
    mesh: Mesh,
) -> tuple[TrainState, tuple[Any, Any], dict[str, Any]]:
    """The shapes, dtypes and places of a step's arguments."""
    everywhere = meshes.replicated(mesh)

    def at(sharding: Any) -> Any:
        return lambda x, dtype=None: jax.ShapeDtypeStruct(
            x.shape, dtype or x.dtype, sharding=sharding
        )

    weights = jax.tree.map(
        lambda x, sharding: at(sharding)(x, weight),
        shape_params(config),
        meshes.parameter_shardings(config, mesh),
    )
    stack = T5(config).stack()
    fresh = jax.eval_shape(lambda: init_plugin(plugin, stack, jax.random.key(0)))
    state = jax.eval_shape(
        lambda params: TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params)),
        fresh.params,
    )
    rows = meshes.batch_sharding(mesh)
    columns = {"encoder_input_tokens": lengths["inputs"]} | {
        name: lengths["targets"]
        for name in ("decoder_input_tokens", "decoder_target_tokens", "decoder_loss_weights")
    }
    batch = {
        name: jax.ShapeDtypeStruct((batch_size, length), jnp.int32, sharding=rows)
        for name, length in columns.items()
    }
    scales = jax.tree.map(at(everywhere), fresh.output_scales)
    return jax.tree.map(at(everywhere), state), (weights, scales), batch
