"""The dry run of a training run: parameters, memory per device and FLOPs saved, from shapes alone.

No weights and no data are read. Activations are not counted.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from variator_jax import mesh as meshes
from variator_jax.backbones.lora import LoraConfig, init_lora
from variator_jax.backbones.t5 import T5, T5Config, shape_params
from variator_jax.backbones.t5.cost import backbone_parameters
from variator_jax.plugin import PluginConfig, init_plugin, plugin_parameters
from variator_jax.plugin.arrays import flops_allowed_speedup, flops_saved
from variator_jax.store.arrays import parse_dtype
from variator_jax.train.step import moment_shardings
from variator_jax.train.student import student_leaves, student_shape


@dataclasses.dataclass(frozen=True)
class Part:
    """One kind of arrays: how many numbers in all, and bytes on the fullest device."""

    name: str
    numbers: int
    bytes: int

    @classmethod
    def of(cls, name: str, tree: Any, dtype: Any = None, shardings: Any = None) -> "Part":
        """Counts leaves that have a shape and a dtype.

        Args:
          name: for the table.
          tree: of leaves.
          dtype: what they are kept in; None for their own.
          shardings: the leaves' own by default; a leaf without one is on every device.
        """

        def size(leaf: Any, sharding: Any) -> int:
            shape = sharding.shard_shape(leaf.shape) if sharding else leaf.shape
            return math.prod(shape) * np.dtype(dtype or leaf.dtype).itemsize

        if shardings is None:
            shardings = jax.tree.map(lambda leaf: getattr(leaf, "sharding", None) or False, tree)
        sizes = jax.tree.leaves(jax.tree.map(size, tree, shardings))
        return cls(name, sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree)), sum(sizes))


@dataclasses.dataclass(frozen=True)
class Plan:
    """The budget of a run.

    Attributes:
      backbone: its shape.
      plugins: those that are trained or used; ratio 1 is not printed.
      parts: the arrays in each device's memory.
      devices: how many there are.
      length: tokens of an encoder input.
    """

    backbone: T5Config
    plugins: tuple[PluginConfig, ...]
    parts: tuple[Part, ...]
    devices: int
    length: int

    def __str__(self) -> str:
        stack, total = T5(self.backbone).stack(), readable(sum(part.bytes for part in self.parts))
        named = [
            f"plugin {plugin.name} of sites {plugin.description}: "
            f"{plugin_parameters(plugin, stack) / backbone_parameters(self.backbone):.2%} of its "
            f"parameters; of the encoder's FLOPs at {self.length} tokens "
            f"{flops_saved(stack, self.length, plugin):.1%} saved, so at most "
            f"{flops_allowed_speedup(stack, self.length, plugin):.2f} times as fast"
            for plugin in self.plugins
            if plugin.parts
        ]
        rows = [f"{p.name:<28}{p.numbers:>18,}{readable(p.bytes):>14}" for p in self.parts]
        return "\n".join(
            (
                f"backbone {self.backbone.name}, {self.devices} device(s)",
                f"{'':<28}{'numbers':>18}{'per device':>14}",
                *rows,
                f"{'together':<28}{'':>18}{total:>14}, without activations",
                *named,
            )
        )


def readable(count: int) -> str:
    """Bytes as GiB, or MiB below one."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"


def weights_dtype(trained: str, backbone: T5Config, backbone_dtype: str | None) -> np.dtype:
    """What a run keeps its backbone in: `backbone_dtype` is for a frozen one."""
    frozen = trained in ("plugin", "lora")
    return np.dtype(parse_dtype(frozen and backbone_dtype or backbone.param_dtype))


def plan(
    *,
    backbone: T5Config,
    plugin: PluginConfig,
    feature_lengths: Mapping[str, int],
    trained: str = "plugin",
    lora: LoraConfig | None = None,
    optimizer: Any = None,
    batch_size: int = 1,
    num_microbatches: int = 1,
    mesh_shape: Sequence[int] | None = None,
    backbone_dtype: str | None = None,
    plugins: Sequence[PluginConfig] | None = None,
) -> Plan:
    """The built-in engine's budget: the backbone as the mesh cuts it, the plugin replicated.

    Args:
      backbone: shape of the backbone.
      plugin: the compression plugin.
      feature_lengths: tokens of `inputs` and `targets`.
      trained: 'plugin', 'backbone', 'lora' or 'student'.
      lora: the LoRA's settings.
      optimizer: the optax transformation of a run that trains; None where nothing is trained.
      batch_size: rows of a batch.
      num_microbatches: passes that a batch is cut into.
      mesh_shape: `(data, fsdp, model)`; None for the engine's choice.
      backbone_dtype: dtype in which a frozen backbone is kept; None for its stored one.
      plugins: those of an evaluation or inference, in place of `plugin`.

    Raises:
      ConfigError: for a mesh that is not possible.
    """
    dtype = weights_dtype(trained, backbone, backbone_dtype)
    rows, length, key = batch_size // num_microbatches, feature_lengths["inputs"], jax.random.key(0)
    mesh = meshes.make_mesh(backbone, rows, mesh_shape, bytes_per_weight=dtype.itemsize)
    weights = placed_shapes(backbone, mesh)
    parts = [Part.of("backbone", weights, dtype)]
    if trained == "student":
        moved = student_leaves(placed_shapes(student_shape(backbone, length, plugin), mesh))
        parts.append(Part.of("student", moved))
    elif trained == "lora":
        moved = jax.eval_shape(lambda: init_lora(lora or LoraConfig(), weights, key))
        parts.append(Part.of("LoRA", moved))
    else:
        moved = weights if trained == "backbone" else {}
    used = (plugin,) if plugins is None else tuple(plugins)
    for one in used if trained == "plugin" else ():
        fresh = jax.eval_shape(functools.partial(init_plugin, one, T5(backbone).stack(), key))
        moved = fresh.params
        parts.append(Part.of("plugin and its output scales", fresh))
    if optimizer is not None:
        state = jax.eval_shape(optimizer.init, moved)
        parts.append(Part.of("gradients", moved))
        parts.append(Part.of("optimizer state", state, None, moment_shardings(state, moved)))
    compressed = trained in ("plugin", "student")
    return Plan(backbone, used if compressed else (), tuple(parts), mesh.size, length)


def placed_shapes(config: T5Config, mesh: Any, dtype: Any = None) -> dict:
    """A backbone's tree of shapes, each with its sharding, in `dtype` or that of fresh weights."""

    def placed(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=sharding)

    return jax.tree.map(placed, shape_params(config), meshes.parameter_shardings(config, mesh))
