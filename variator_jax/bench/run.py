"""The whole benchmark: measures what was asked, prints it and writes it down."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
import tempfile
from pathlib import Path

from variator_jax.bench import encoder, train_step
from variator_jax.bench.hardware import hardware
from variator_jax.bench.plot import plot_bench
from variator_jax.bench.results import BenchResult, StepResult, to_json
from variator_jax.bench.settings import BenchSettings
from variator_jax.bench.tables import bench_markdown
from variator_jax.errors import ConfigError

_PACKAGES = ("jax", "jaxlib", "flax", "optax")
_PEER_PACKAGES = ("torch", "transformers")


def run(settings: BenchSettings, output: str | None = None) -> BenchResult:
    """Measures, prints the tables, and writes `bench.json`, `bench.md` and `bench.png`.

    Args:
      settings: what to measure.
      output: a folder, made if it is not there; None writes nothing.

    Raises:
      ConfigError: where the memory does not suffice, or `output` cannot be written into.
    """
    if output is not None:
        _make_folder(output)
    result = measure(settings)
    markdown = bench_markdown(result)
    print(markdown.rstrip())
    if output is not None:
        try:
            _write(result, markdown, Path(output))
        except OSError as error:
            raise ConfigError(f"--output {output} cannot be written: {error}.") from error
    return result


def measure(settings: BenchSettings) -> BenchResult:
    """All measurements. Steps come first: a device keeps only the highest mark of its memory."""
    config = settings.config
    if settings.peer:  # Else JAX would take three quarters of a GPU's memory from the peers.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    steps: list[StepResult] = []
    if settings.step is not None:
        params = train_step.random_whole(config)
        ratios = tuple(ratio for ratio in settings.ratios if ratio > 1)
        for shape in settings.shapes:
            _say(f"distillation step of {config.name}, {shape} tokens")
            steps.append(
                train_step.bench_steps(
                    config, params, ratios, shape, settings.step, settings.rounds
                )
            )
        del params
    params = encoder.random_encoder(config)
    plugins = encoder.fresh_plugins(config, settings.ratios)
    start_peers: encoder.StartPeers | None = None
    if settings.peer:
        from variator_jax.bench import peers

        start_peers = peers.start_peers
    encoders = []
    for shape in settings.shapes:
        _say(f"encoder of {config.name}, {shape} tokens")
        encoders.append(
            encoder.bench_encoder(config, params, plugins, shape, settings.rounds, start_peers)
        )
    return BenchResult(
        backbone=config.name,
        dtype=settings.dtype,
        rounds=settings.rounds,
        hardware=hardware(),
        versions=_versions(_PACKAGES + (_PEER_PACKAGES if settings.peer else ())),
        encoder=tuple(encoders),
        steps=tuple(steps),
        notes=tuple(_notes(settings)),
    )


def _notes(settings: BenchSettings) -> list[str]:
    notes = ["Weights are random and plugins untrained; the clock does not see them."]
    if settings.peer:
        notes.append(
            "Peers run in this process, on the same tokens and as many threads, without gradients; "
            "in float32 on a GPU both libraries multiply in TF32."
        )
    return notes


def _make_folder(output: str) -> None:
    """Makes the folder, and tries it: nobody shall wait for figures that cannot be kept."""
    if Path(output).exists() and not Path(output).is_dir():
        raise ConfigError(f"--output {output} is a file; it is the folder to write into.")
    try:
        Path(output).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output).close()
    except OSError as error:
        raise ConfigError(f"--output {output} cannot be written: {error}.") from error


def _write(result: BenchResult, markdown: str, folder: Path) -> None:
    text = json.dumps(to_json(result), indent=2) + "\n"
    (folder / "bench.json").write_text(text, encoding="utf-8")
    (folder / "bench.md").write_text(markdown, encoding="utf-8")
    if importlib.util.find_spec("matplotlib") is None:
        _say("no plot: matplotlib is not installed")
        return
    plot_bench(result, folder / "bench.png")
    _say(f"written: {folder}/bench.json, bench.md, bench.png")


def _versions(packages: tuple[str, ...]) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
