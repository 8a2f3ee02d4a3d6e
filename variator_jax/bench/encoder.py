"""Times encoder passes: every ratio, the baselines and a matrix product in the same rounds."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from variator_jax.backbones.t5 import T5, T5Config
from variator_jax.bench import memory
from variator_jax.bench.arguments import BenchSettings, Shape
from variator_jax.bench.latency import (
    Clock,
    bound,
    encoder_call,
    interleaved_seconds,
    random_params,
    random_tokens,
)
from variator_jax.bench.results import ENCODER, Measurement, Timing
from variator_jax.plugin import PluginConfig, flops_allowed_speedup, init_plugin, stack_flops

Call = Callable[[], object]
PEAK = "matrix peak"


def bench_encoder(
    config: T5Config,
    params: Any,
    shape: Shape,
    settings: BenchSettings,
    clock: Clock = time.perf_counter,
) -> Measurement:
    """Times `encode` of full rows with fresh plugins.

    Args:
      config: shape and dtype of the backbone.
      params: its weights, at least those of embeddings and encoder.
      shape: rows and tokens.
      settings: ratios, rounds, and whether baselines are timed.
      clock: seconds, rising.

    Raises:
      ConfigError: where the memory does not suffice.
    """
    stack = T5(config).stack()
    tokens = random_tokens(config, shape.batch, shape.length)
    calls: dict[str, Call] = {}
    for ratio in settings.ratios:
        plugin = PluginConfig(ratio)
        fresh = init_plugin(plugin, stack, jax.random.key(0)) if ratio > 1 else None
        call: Any = encoder_call(config, plugin)
        compiled = call.lower(params, fresh, tokens).compile()
        needed = memory.temporary_bytes(compiled)
        memory.check_fits(f"The encoder of {config.name!r} at {shape} and ratio {ratio}", needed)
        calls[row_name(ratio)] = bound(compiled, params, fresh, tokens)
    errors: dict[str, str] = {}
    if settings.peer:
        from variator_jax.bench.baselines import start_baselines

        for name, baseline in start_baselines(config, tokens).items():
            if isinstance(baseline, str):
                errors[name] = baseline
            else:
                calls[name] = baseline
    peak, seconds = timed_with_peak(calls, config.dtype, settings.rounds, clock)
    rows = [
        Timing(
            row_name(ratio),
            seconds.pop(row_name(ratio)),
            stack_flops(stack, shape.length, PluginConfig(ratio), shape.batch),
            ratio,
            flops_allowed_speedup(stack, shape.length, PluginConfig(ratio)),
        )
        for ratio in settings.ratios
    ]
    rows += [Timing(name, samples) for name, samples in seconds.items()]
    rows += [Timing(name, error=error) for name, error in errors.items()]
    return Measurement(ENCODER, shape.batch, shape.length, peak, rows)


def timed_with_peak(
    calls: Mapping[str, Call], dtype: str, rounds: int, clock: Clock
) -> tuple[Timing, dict[str, list[float]]]:
    """Times calls in turns with one large matrix product, the best that the device can reach."""
    size = matrix_size()
    # Random numbers: processors slow down where bits toggle, and zeros would not.
    a = jax.random.normal(jax.random.key(0), (size, size), jnp.float32).astype(dtype)
    calls = {PEAK: bound(jax.jit(jnp.dot), a, a), **calls}
    seconds = interleaved_seconds(calls, rounds, clock)
    return Timing(f"{PEAK}, {size} x {size}", seconds.pop(PEAK), 2.0 * size**3), seconds


def row_name(ratio: int) -> str:
    """The name of our own encoder or step at a ratio."""
    return f"k={ratio}" if ratio > 1 else "k=1, the backbone"


def random_weights(config: T5Config, shapes: Any) -> Any:
    """Random weights of these shapes on the device.

    Raises:
      ConfigError: where the memory does not suffice.
    """
    what = f"Backbone {config.name!r} in {config.param_dtype}"
    memory.check_fits(what, memory.tree_bytes(shapes))
    return random_params(config, shapes)


def matrix_size() -> int:
    """Rows of the square matrices: a few milliseconds on an accelerator, a tenth second on CPUs."""
    return 2048 if jax.devices()[0].platform == "cpu" else 8192
