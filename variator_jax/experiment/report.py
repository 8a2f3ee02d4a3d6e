"""The report of an experiment: tables, CSV, JSON and plots in its folder."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from variator_jax.bench.hardware import hardware
from variator_jax.experiment import figures, measure, tables
from variator_jax.experiment.grid import Experiment
from variator_jax.experiment.remarks import remarks
from variator_jax.experiment.results import Row, rows, write_rows
from variator_jax.files import write_json

_ONE_TEACHER = (
    " The seeds share one teacher and vary what is trained beside it; what is not trained "
    "is the same each time."
)


def report(experiment: Experiment, records: Sequence[Mapping[str, Any]]) -> str:
    """Aggregates, measures what is missing, writes everything; returns the Markdown."""
    folder = Path(experiment.model_dir)
    latency, neurons = measure.latencies(experiment), measure.neurons(experiment)
    found = rows(records, latency)
    write_rows(found, folder)
    write_json(folder / "neurons.json", neurons)
    drawn = _draw(experiment, found, neurons, folder)
    text = _markdown(experiment, found, latency, neurons, drawn)
    (folder / "results.md").write_text(text, encoding="utf-8")
    return f"{text}\nWritten: {folder}/results.md, .csv, .json, {', '.join(drawn)}"


def _draw(
    experiment: Experiment, found: Sequence[Row], neurons: Sequence[Mapping[str, Any]], folder: Path
) -> list[str]:
    plain = [dataclasses.asdict(row) for row in found]
    metric = "score" if any(row.majority is None for row in found) else "accuracy"
    drawn = []
    for backbone in experiment.backbones:
        own = [row for row in plain if row["backbone"] == backbone]
        figures.ratio_curve(own, folder / f"ratios_{backbone}.png", metric)
        drawn.append(f"ratios_{backbone}.png")
        for ratio in experiment.arm_ratios:
            name = f"arms_{backbone}_k{ratio}.png"
            figures.ablations(own, folder / name, ratio, metric)
            drawn.append(name)
    if len(experiment.backbones) > 1:
        figures.size_curve(plain, folder / "sizes.png")
        drawn.append("sizes.png")
    if neurons:
        figures.neuron_curve(neurons, folder / "neurons.png")
        drawn.append("neurons.png")
    return drawn


def _markdown(
    experiment: Experiment,
    found: Sequence[Row],
    latency: Sequence[Mapping[str, Any]],
    neurons: Sequence[Mapping[str, Any]],
    drawn: Sequence[str],
) -> str:
    sections = [
        f"# Experiment {Path(experiment.model_dir).name}",
        f"{time.strftime('%Y-%m-%d')}, {hardware()}; recipe `{experiment.recipe}`, "
        f"seeds {', '.join(map(str, experiment.seeds))}. Scores are on a scale of 0 to 100, mean ± "
        "standard deviation over seeds; the gap is the teacher's score less the arm's, seed by "
        "seed." + (_ONE_TEACHER if experiment.one_teacher and len(experiment.seeds) > 1 else ""),
    ]
    for backbone in experiment.backbones:
        sections += [
            f"## {backbone}",
            tables.quality_table(found, backbone),
            remarks(found, backbone),
            tables.details_table(found, backbone),
        ]
    sections += ["## Sizes and clock", tables.size_table(found)]
    if latency:
        first = latency[0]
        machines = " and ".join(dict.fromkeys(row["hardware"] for row in latency))
        sections.append(
            f"Encoder passes of {first['batch']} x {first['length']} tokens in {first['dtype']} on "
            f"{machines}, medians of interleaved rounds; the last column is the "
            "share of the speed-up that the saved FLOPs allow."
        )
    if neurons:
        sections += [
            "## Activated neurons",
            tables.neuron_table(neurons),
            "Share of the encoder's FFN neurons that fire, mean over layers; "
            f"task {neurons[0]['task']}, seed {neurons[0]['seed']}.",
        ]
    sections += [f"![{name}]({name})" for name in drawn]
    return "\n\n".join(section for section in sections if section) + "\n"
