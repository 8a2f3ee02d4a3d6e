"""`variator bench`: measures what was asked, prints it and writes it down.

The distillation step is the built-in engine's, on one device: the paper's losses, AdamW behind
gradient clipping, a frozen backbone, random tokens without padding.
"""

import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from variator_jax import mesh as meshes
from variator_jax.backbones.t5 import T5Config, shape_params
from variator_jax.bench import latency, results
from variator_jax.bench.arguments import BenchSettings, Shape
from variator_jax.bench.budget import Step
from variator_jax.bench.output import hardware, log
from variator_jax.bench.results import STEP, BenchResult, Measurement, Timing
from variator_jax.errors import ConfigError
from variator_jax.files import make_output, write_json
from variator_jax.plugin import PluginConfig
from variator_jax.train import optimizers
from variator_jax.train.losses import LossConfig

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "transformers")


def run(settings: BenchSettings, output: str | None = None) -> BenchResult:
    """Measures, prints the tables, and writes `bench.json`, `bench.md` and `bench.png`.

    Args:
      settings: what to measure.
      output: a folder, made if it is not there; None writes nothing.

    Raises:
      ConfigError: where the memory does not suffice, or `output` cannot be written into.
    """
    try:
        if output is not None:
            make_output("--output", output)
        result = measure(settings)
        print(results.bench_markdown(result).rstrip())
        if output is not None:
            _write(result, Path(output))
    except jax.errors.JaxRuntimeError as error:  # Mostly for want of memory.
        reason = str(error).splitlines()[0]
        raise ConfigError(f"The device cannot run it, try a smaller batch: {reason}") from error
    except OSError as error:
        raise ConfigError(f"--output {output} cannot be written into: {error}.") from error
    return result


def measure(settings: BenchSettings) -> BenchResult:
    """All measurements. Steps come first: a device keeps only the highest mark of its memory."""
    config = settings.config
    if settings.peer:  # Else JAX would take three quarters of a GPU's memory from the baselines.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    steps = []
    if settings.train:
        params = latency.random_params(config, shape_params(config))
        steps = [bench_steps(config, params, shape, settings) for shape in settings.shapes]
        del params
    params = latency.random_params(config)
    encoders = [latency.bench_encoder(config, params, shape, settings) for shape in settings.shapes]
    notes = ["Weights are random and plugins untrained; that does not change the time."]
    if settings.peer:
        notes.append(
            "Baselines run in this process, on the same tokens and as many threads, without "
            "gradients; in float32 on a GPU both libraries multiply in TF32."
        )
    packages = _PACKAGES if settings.peer else _PACKAGES[:-2]
    installed = {x.metadata["Name"]: x.version for x in importlib.metadata.distributions()}
    versions = {"python": platform.python_version()}
    versions |= {name: installed[name] for name in packages if name in installed}
    names = (config.name, settings.dtype, settings.rounds, hardware(), versions)
    return BenchResult(*names, (*encoders, *steps), notes)


def _write(result: BenchResult, folder: Path) -> None:
    write_json(folder / "bench.json", results.to_json(result))
    (folder / "bench.md").write_text(results.bench_markdown(result), encoding="utf-8")
    if importlib.util.find_spec("matplotlib") is None:
        log("no plot: matplotlib is not installed")
        return
    results.plot_bench(result, folder / "bench.png")
    log(f"written: {folder}/bench.json, bench.md, bench.png")


def bench_steps(
    config: T5Config, params: Any, shape: Shape, settings: BenchSettings
) -> Measurement:
    """Times a step at each ratio of 2 or more, in turns with a large matrix product.

    Args:
      config: shape and dtype of the backbone.
      params: all its weights.
      shape: rows and tokens of the encoder's input.
      settings: the others.
    """
    log(f"distillation step of {config.name}, {shape} tokens")
    config = dataclasses.replace(config, remat=settings.remat)
    rows = shape.batch // settings.microbatches
    mesh = meshes.make_mesh(config, rows, (1, 1, 1), jax.devices()[:1])
    optimizer = optimizers.optimizer("adamw", 1e-3, "constant")
    lengths = {"inputs": shape.length, "targets": settings.targets}
    sizes = (lengths, shape.batch, mesh, LossConfig(), settings.microbatches, config.param_dtype)
    steps = {
        ratio: _Running(Step(config, PluginConfig(ratio), optimizer, *sizes), params)
        for ratio in settings.ratios
        if ratio > 1
    }
    peak, seconds = latency.timed_with_peak(steps, config.dtype, settings.rounds)
    timings = []
    for ratio, step in steps.items():
        memory, loss = step.peak_bytes, float(step.metrics["loss"])
        times = (f"k={ratio}", seconds[ratio], step.flops, ratio)
        timings.append(Timing(*times, peak_bytes=memory, loss=loss))
    details = {name: getattr(settings, name) for name in ("targets", "microbatches", "remat")}
    return Measurement(STEP, shape.batch, shape.length, peak, timings, details)


class _Running:
    """A compiled step that keeps its own state; a call runs it once."""

    def __init__(self, step: Step, params: Any) -> None:
        device, self._compiled, self.flops = jax.devices()[0], step.compiled, step.flops
        # An untrained plugin of zeros serves, as the time does not depend on it.
        state, (_, scales), batch = step.shapes()
        self._state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), state)
        scales = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), scales)
        self._frozen = jax.device_put((params, scales), meshes.replicated(step.mesh))
        tokens = {name: latency.random_tokens(step.config, *x.shape) for name, x in batch.items()}
        self._batch = meshes.global_batch(tokens, step.mesh)
        before = device_peak(device)
        jax.block_until_ready(self())
        after, analysis = device_peak(device), self._compiled.memory_analysis()
        needed = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
        # The device's mark is of the whole process: it counts where this step has raised it.
        self.peak_bytes = after if after > before else needed

    def __call__(self) -> object:
        # The step takes over the memory of the state that it is given.
        self._state, self.metrics = self._compiled(self._state, self._frozen, self._batch)
        return self._state, self.metrics


def device_peak(device: Any) -> int:
    """The most bytes in use so far, by the device's own account; 0 without one."""
    return (device.memory_stats() or {}).get("peak_bytes_in_use", 0)
