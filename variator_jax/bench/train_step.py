"""Times the distillation step as the built-in engine compiles it, on one device.

Paper's losses, AdamW behind gradient clipping, frozen backbone, random tokens without padding.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from variator_jax import mesh as meshes
from variator_jax.backbones.t5 import T5, T5Config
from variator_jax.backbones.t5.network import shape_params
from variator_jax.bench import memory
from variator_jax.bench.encoder import matrix_call, matrix_size, random_backbone
from variator_jax.bench.latency import Clock, interleaved_seconds, random_tokens
from variator_jax.bench.results import MatrixPeak, StepResult, StepRow
from variator_jax.bench.settings import Shape, StepSettings
from variator_jax.bench.step_cost import distillation_flops
from variator_jax.plugin import PluginConfig, init_plugin
from variator_jax.train import optimizers
from variator_jax.train.losses import LossConfig
from variator_jax.train.objectives import Distillation
from variator_jax.train.step import init_state, jit_train_step, make_train_step, placed_state

_ADVICE = ", --remat, or more --microbatches"


@dataclasses.dataclass(frozen=True)
class _Step:
    """A compiled step that keeps its own state, and the memory it took."""

    call: Callable[[], object]
    loss: Callable[[], float]
    compiled_bytes: int
    peak: tuple[int, str]


def random_whole(config: T5Config) -> Any:
    """Weights of the whole backbone, on the device.

    Raises:
      ConfigError: where the memory does not suffice.
    """
    return random_backbone(config, shape_params(config), "weights")


def bench_steps(
    config: T5Config,
    params: Any,
    ratios: tuple[int, ...],
    shape: Shape,
    settings: StepSettings,
    rounds: int,
    clock: Clock = time.perf_counter,
) -> StepResult:
    """Times a step at each ratio, in turns with a large matrix product.

    Args:
      config: shape and dtype of the backbone.
      params: all its weights, see `random_whole`.
      ratios: of 2 or more.
      shape: rows and tokens of the encoder's input.
      settings: the rest.
      rounds: how often each step is timed, after it was compiled and warmed up.
      clock: seconds, rising.

    Raises:
      ConfigError: where the memory does not suffice, or microbatches do not divide the batch.
    """
    config = dataclasses.replace(config, remat=settings.remat)
    batch = _batch(config, shape, settings.targets)
    steps = {ratio: _step(config, params, ratio, batch, shape, settings) for ratio in ratios}
    calls: dict[Any, Callable[[], object]] = {"peak": matrix_call(config.dtype)}
    seconds = interleaved_seconds(
        calls | {ratio: step.call for ratio, step in steps.items()}, rounds, clock
    )
    rows = []
    for ratio, step in steps.items():
        flops = distillation_flops(
            config, PluginConfig(ratio), shape.batch, shape.length, settings.targets
        )
        rows.append(
            StepRow(
                ratio=ratio,
                teacher_flops=flops.teacher,
                student_flops=flops.student,
                backward_flops=flops.backward,
                seconds=tuple(seconds[ratio]),
                compiled_bytes=step.compiled_bytes,
                peak_bytes=step.peak[0],
                peak_source=step.peak[1],
                loss=step.loss(),
            )
        )
    peak = MatrixPeak(matrix_size(), tuple(seconds["peak"]))
    return StepResult(
        shape.batch,
        shape.length,
        settings.targets,
        settings.microbatches,
        settings.remat,
        peak,
        tuple(rows),
    )


def _step(
    config: T5Config,
    params: Any,
    ratio: int,
    batch: dict[str, np.ndarray],
    shape: Shape,
    settings: StepSettings,
) -> _Step:
    """Compiles one step, checks that it fits, and runs it once."""
    device = jax.devices()[0]
    rows = shape.batch // settings.microbatches
    mesh = meshes.make_mesh(config, max(rows, 1), (1, 1, 1), [device])
    plugin = PluginConfig(ratio)
    fresh = init_plugin(plugin, T5(config).stack(), jax.random.key(0))
    everywhere = meshes.replicated(mesh)
    optimizer = optimizers.optimizer("adamw", 1e-3, "constant")
    placed = jax.device_put(fresh, everywhere)
    state = placed_state(init_state(placed.params, optimizer), mesh)
    frozen = jax.device_put((params, placed.output_scales), everywhere)
    rows_on_device = meshes.global_batch(batch, mesh)
    objective = Distillation(T5(config), plugin, LossConfig())
    train_step = make_train_step(objective, optimizer, settings.microbatches)
    with meshes.activations(mesh):
        jitted: Any = jit_train_step(train_step, state, mesh)
        compiled = jitted.lower(state, frozen, rows_on_device).compile()
    what = f"The distillation step of {config.name!r} at {shape} and ratio {ratio}"
    memory.check_room(what, memory.compiled_bytes(compiled, resident=False), device, _ADVICE)
    latest: list[Any] = [state, None]  # The step takes over the memory of the state it is given.

    def call() -> object:
        latest[:] = compiled(latest[0], frozen, rows_on_device)
        return latest

    needed, before = memory.compiled_bytes(compiled), memory.peak_bytes(device)
    with memory.told(what, needed, _ADVICE):
        jax.block_until_ready(call())
    return _Step(call, lambda: float(latest[1]["loss"]), needed, _peak(device, before, needed))


def _peak(device: Any, before: int | None, compiled: int) -> tuple[int, str]:
    """The device's highest mark if this step has raised it, else the compiler's analysis."""
    after = memory.peak_bytes(device)
    if before is not None and after is not None and after > before:
        return after, "device"
    return compiled, "compiled"


def _batch(config: T5Config, shape: Shape, targets: int) -> dict[str, np.ndarray]:
    """A batch in T5X's names, without padding."""
    batch = {"encoder_input_tokens": random_tokens(config, shape.batch, shape.length)}
    if config.has_decoder:
        decoder = random_tokens(config, shape.batch, targets)
        batch["decoder_input_tokens"] = batch["decoder_target_tokens"] = decoder
        batch["decoder_loss_weights"] = np.ones(decoder.shape, jnp.int32)
    return batch
