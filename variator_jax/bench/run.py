"""`variator bench`: measures what was asked, prints it and writes it down."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import tempfile
from pathlib import Path

import jax

from variator_jax.backbones.t5.network import shape_params
from variator_jax.bench.arguments import BenchSettings
from variator_jax.bench.hardware import hardware
from variator_jax.bench.latency import bench_encoder, random_params
from variator_jax.bench.output import log
from variator_jax.bench.results import (
    BenchResult,
    Measurement,
    bench_markdown,
    plot_bench,
    to_json,
)
from variator_jax.bench.train_step import bench_steps
from variator_jax.errors import ConfigError
from variator_jax.files import write_json

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
        if output is not None:  # Before measuring what could not be kept.
            Path(output).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=output).close()
        try:
            result = measure(settings)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise ConfigError(
                f"The device ran out of memory: {str(error).splitlines()[0]} Take a smaller batch, "
                "length or backbone, --dtype bfloat16, --remat, or more --microbatches."
            ) from error
        markdown = bench_markdown(result)
        print(markdown.rstrip())
        if output is not None:
            _write(result, markdown, Path(output))
    except OSError as error:
        raise ConfigError(f"--output {output} cannot be written into: {error}.") from error
    return result


def measure(settings: BenchSettings) -> BenchResult:
    """All measurements. Steps come first: a device keeps only the highest mark of its memory."""
    config = settings.config
    if settings.peer:  # Else JAX would take three quarters of a GPU's memory from the baselines.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    steps: list[Measurement] = []
    if settings.train:
        params = random_params(config, shape_params(config))
        for shape in settings.shapes:
            log(f"distillation step of {config.name}, {shape} tokens")
            steps.append(bench_steps(config, params, shape, settings))
        del params
    params = random_params(config)
    encoders = []
    for shape in settings.shapes:
        log(f"encoder of {config.name}, {shape} tokens")
        encoders.append(bench_encoder(config, params, shape, settings))
    notes = ["Weights are random and plugins untrained; that does not change the time."]
    if settings.peer:
        notes.append(
            "Baselines run in this process, on the same tokens and as many threads, without "
            "gradients; in float32 on a GPU both libraries multiply in TF32."
        )
    versions = {"python": platform.python_version()}
    packages = _PACKAGES if settings.peer else _PACKAGES[:-2]
    for package in importlib.metadata.distributions():
        if package.metadata["Name"] in packages:
            versions[package.metadata["Name"]] = package.version
    return BenchResult(
        config.name,
        settings.dtype,
        settings.rounds,
        hardware(),
        versions,
        (*encoders, *steps),
        notes,
    )


def _write(result: BenchResult, markdown: str, folder: Path) -> None:
    write_json(folder / "bench.json", to_json(result))
    (folder / "bench.md").write_text(markdown, encoding="utf-8")
    if importlib.util.find_spec("matplotlib") is None:
        log("no plot: matplotlib is not installed")
        return
    plot_bench(result, folder / "bench.png")
    log(f"written: {folder}/bench.json, bench.md, bench.png")
