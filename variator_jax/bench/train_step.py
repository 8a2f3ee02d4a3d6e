"""Times the distillation step as the built-in engine compiles it, on one device.

Paper's losses, AdamW behind gradient clipping, frozen backbone, random tokens without padding.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp

from variator_jax import mesh as meshes
from variator_jax.backbones.t5 import T5, T5Config
from variator_jax.bench.arguments import BenchSettings, Shape
from variator_jax.bench.budget import compile_step, compiled_flops, step_shapes
from variator_jax.bench.latency import Clock, random_tokens, row_name, timed_with_peak
from variator_jax.bench.results import STEP, Measurement, Timing
from variator_jax.plugin import PluginConfig
from variator_jax.train import optimizers
from variator_jax.train.losses import LossConfig
from variator_jax.train.objectives import Distillation


def bench_steps(
    config: T5Config,
    params: Any,
    shape: Shape,
    settings: BenchSettings,
    clock: Clock = time.perf_counter,
) -> Measurement:
    """Times a step at each ratio of 2 or more, in turns with a large matrix product.

    Args:
      config: shape and dtype of the backbone.
      params: all its weights.
      shape: rows and tokens of the encoder's input.
      settings: the others.
      clock: seconds, rising.
    """
    config = dataclasses.replace(config, remat=settings.remat)
    ratios = [ratio for ratio in settings.ratios if ratio > 1]
    steps = {row_name(ratio): _Step(config, params, ratio, shape, settings) for ratio in ratios}
    peak, seconds = timed_with_peak(steps, config.dtype, settings.rounds, clock)
    rows = [
        Timing(name, seconds[name], step.flops, step.ratio, None, "", step.peak_bytes, step.loss())
        for name, step in steps.items()
    ]
    details = {name: getattr(settings, name) for name in ("targets", "microbatches", "remat")}
    return Measurement(STEP, shape.batch, shape.length, peak, rows, details)


class _Step:
    """A compiled step that keeps its own state; a call runs it once."""

    def __init__(
        self, config: T5Config, params: Any, ratio: int, shape: Shape, settings: BenchSettings
    ) -> None:
        device = jax.devices()[0]
        rows = shape.batch // settings.microbatches
        mesh = meshes.make_mesh(config, rows, (1, 1, 1), [device])
        plugin, optimizer = PluginConfig(ratio), optimizers.optimizer("adamw", 1e-3, "constant")
        lengths = {"inputs": shape.length, "targets": settings.targets}
        dtype = jnp.dtype(config.param_dtype)
        shapes = step_shapes(config, plugin, optimizer, lengths, shape.batch, dtype, mesh)
        objective = Distillation(T5(config), plugin, LossConfig())
        compiled = compile_step(objective, optimizer, settings.microbatches, shapes, mesh)
        self.ratio, self.flops = ratio, compiled_flops(compiled, settings.microbatches)
        self._compiled = compiled
        # An untrained plugin of zeros serves, as the time does not depend on it.
        state, (_, scales), batch = shapes
        self._state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), state)
        scales = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), scales)
        self._frozen = jax.device_put((params, scales), meshes.replicated(mesh))
        tokens = {name: random_tokens(config, *x.shape) for name, x in batch.items()}
        self._batch = meshes.global_batch(tokens, mesh)
        before = device_peak(device)
        jax.block_until_ready(self())
        after, analysis = device_peak(device), compiled.memory_analysis()
        needed = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
        # The device's mark is of the whole process: it counts where this step has raised it.
        self.peak_bytes = after if after > before else needed

    def __call__(self) -> object:
        # The step takes over the memory of the state that it is given.
        self._state, self._metrics = self._compiled(self._state, self._frozen, self._batch)
        return self._state, self._metrics

    def loss(self) -> float:
        """Of the last step."""
        return float(self._metrics["loss"])


def device_peak(device: Any) -> int:
    """The most bytes in use so far, by the device's own account; 0 without one."""
    try:
        return int((device.memory_stats() or {}).get("peak_bytes_in_use", 0))
    except (AttributeError, NotImplementedError, jax.errors.JaxRuntimeError):
        return 0
