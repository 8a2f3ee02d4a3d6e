"""What a run will need, told before anything is built: parameters, memory per device, FLOPs saved.

Shapes are all that is read; no weights, no data. Activations are not counted.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from variator_jax import mesh as meshes
from variator_jax.backbones.lora import LoraConfig, init_lora
from variator_jax.backbones.t5 import T5, T5Config
from variator_jax.backbones.t5.cost import backbone_parameters
from variator_jax.backbones.t5.network import shape_params
from variator_jax.plugin import (
    PluginConfig,
    flops_allowed_speedup,
    flops_saved,
    init_plugin,
    plugin_parameters,
)
from variator_jax.train.student import narrowed, student_leaves, student_mlp_dim


@dataclasses.dataclass(frozen=True)
class Part:
    """One kind of arrays: how many numbers in all, and bytes on the fullest device."""

    name: str
    numbers: int
    bytes: int

    @classmethod
    def of(cls, name: str, leaves: Iterable[Any], dtype: Any = None, shards: int = 1) -> Part:
        """Counts leaves that have a shape and a dtype, spread evenly over `shards` devices."""
        sizes = [(math.prod(x.shape), np.dtype(dtype or x.dtype).itemsize) for x in leaves]
        total = sum(numbers * size for numbers, size in sizes)
        return cls(name, sum(numbers for numbers, _ in sizes), -(-total // shards))


@dataclasses.dataclass(frozen=True)
class Plan:
    """The budget of a run.

    Attributes:
      backbone: its shape.
      plugin: the plugin that is trained or used.
      parts: what lies in each device's memory.
      devices: how many there are.
      length: tokens of an encoder input.
      compressed: whether the run has to do with a compression plugin, or what stands for one.
    """

    backbone: T5Config
    plugin: PluginConfig
    parts: tuple[Part, ...]
    devices: int
    length: int
    compressed: bool = True

    def __str__(self) -> str:
        rows = [
            f"{part.name:<18}{part.numbers:>18,}{_readable(part.bytes):>14}" for part in self.parts
        ]
        total = _readable(sum(part.bytes for part in self.parts))
        plugin, flops = self._compression() if self.compressed else ("", [])
        return "\n".join(
            (
                f"backbone {self.backbone.name}{plugin}, {self.devices} device(s)",
                f"{'':<18}{'numbers':>18}{'per device':>14}",
                *rows,
                f"{'together':<18}{'':>18}{total:>14}, without activations",
                *flops,
            )
        )

    def _compression(self) -> tuple[str, list[str]]:
        """What is said of the plugin beside the backbone's name, and at the end."""
        stack = T5(self.backbone).stack()
        saved = flops_saved(stack, self.length, self.plugin)
        allowed = flops_allowed_speedup(stack, self.length, self.plugin)
        share = plugin_parameters(self.plugin, stack) / backbone_parameters(self.backbone)
        return f", plugin of ratio {self.plugin.ratio} ({share:.2%} of its parameters)", [
            f"encoder FLOPs at {self.length} tokens: {saved:.1%} saved, so at most "
            f"{allowed:.2f} times as fast"
        ]


def _readable(count: int) -> str:
    """Bytes in the unit that keeps the number short."""
    size, units = float(count), ["B", "KiB", "MiB", "GiB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.2f} {units[0]}"


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
) -> Plan:
    """The built-in engine's budget: the backbone as the mesh cuts it, the plugin everywhere.

    Args:
      backbone: shape of the backbone.
      plugin: the compression plugin.
      feature_lengths: tokens of `inputs` and `targets`.
      trained: 'plugin', 'backbone', 'lora' or 'student'.
      lora: the LoRA's settings.
      optimizer: the optax transformation of a run that trains; None where nothing is trained.
      batch_size: rows of a batch.
      num_microbatches: passes that a batch is cut into.
      mesh_shape: `(data, fsdp, model)`; None for what the engine would choose.
      backbone_dtype: what a frozen backbone is kept in; None for float32.

    Raises:
      ConfigError: for a mesh that is not possible.
    """
    frozen = trained in ("plugin", "lora") and backbone_dtype is not None
    dtype = np.dtype(jax.numpy.dtype(backbone_dtype if frozen else backbone.param_dtype))
    rows = batch_size // num_microbatches
    mesh = meshes.make_mesh(backbone, rows, mesh_shape, bytes_per_weight=dtype.itemsize)
    weights = shape_params(backbone)
    where = _shards(weights, meshes.parameter_shardings(backbone, mesh))
    stack = T5(backbone).stack()
    fresh = jax.eval_shape(lambda: init_plugin(plugin, stack, jax.random.key(0)))
    moved, cut = (weights, where) if trained == "backbone" else (fresh.params, {})
    if trained == "student":
        mlp_dim = student_mlp_dim(backbone, feature_lengths["inputs"], plugin)
        student = narrowed(backbone, mlp_dim)
        moved = student_leaves(shape_params(student))
        cut = _shards(moved, student_leaves(meshes.parameter_shardings(student, mesh)))
    if trained == "lora":
        settings = lora or LoraConfig()
        moved = jax.eval_shape(lambda: init_lora(settings, weights, jax.random.key(0)))
    parts = [_spread("backbone", weights, where, dtype)]
    if trained == "plugin":
        parts.append(Part.of("plugin", jax.tree.leaves(fresh)))
    elif trained == "student":
        parts.append(_spread("student", moved, cut))
    elif trained == "lora":
        parts.append(Part.of("LoRA", jax.tree.leaves(moved)))
    if optimizer is not None:
        parts.append(_spread("gradients", moved, cut))
        parts.append(_spread("optimizer state", jax.eval_shape(optimizer.init, moved), cut))
    compressed = trained in ("plugin", "student")
    return Plan(backbone, plugin, tuple(parts), mesh.size, feature_lengths["inputs"], compressed)


Shards = Mapping[tuple[str, ...], tuple[tuple[int, ...], int]]


def _shards(weights: Any, shardings: Any) -> Shards:
    """By a weight's path, its shape and into how many parts the mesh cuts it."""
    places = jax.tree.leaves(shardings)
    leaves = jax.tree_util.tree_leaves_with_path(weights)
    return {
        _names(path): (leaf.shape, leaf.size // max(1, math.prod(place.shard_shape(leaf.shape))))
        for (path, leaf), place in zip(leaves, places, strict=True)
    }


def _spread(name: str, tree: Any, where: Shards, dtype: Any = None) -> Part:
    """A tree of weights, or one that holds such, as the moments of optimizers do; else whole."""
    numbers = bytes_ = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        ends = (_names(path[start:]) for start in range(len(path)))
        shape, parts = next((where[end] for end in ends if end in where), (leaf.shape, 1))
        part = Part.of(name, [leaf], dtype, parts if shape == leaf.shape else 1)
        numbers, bytes_ = numbers + part.numbers, bytes_ + part.bytes
    return Part(name, numbers, bytes_)


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
