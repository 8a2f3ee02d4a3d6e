"""The report of an experiment: tables, CSV, JSON and plots in its folder."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from variator_jax.bench.hardware import hardware
from variator_jax.experiment import figures, measure, tables
from variator_jax.experiment.grid import METHOD, Experiment
from variator_jax.experiment.measure import Rows
from variator_jax.experiment.results import rows, write_rows
from variator_jax.files import write_json

Draw = Callable[[], Any]
_HOW_TO_READ = (
    "Scores are on a scale of 0 to 100, mean ± standard deviation over seeds; the gap is the "
    "teacher's score less the arm's, seed by seed."
)
_ONE_TEACHER = (
    " The seeds share one teacher and vary what is trained beside it; what is not trained "
    "is the same each time."
)


def report(experiment: Experiment, records: Rows) -> str:
    """Aggregates, measures what is missing, writes everything; returns the Markdown."""
    folder = Path(experiment.model_dir)
    latency, neurons = measure.latencies(experiment), measure.neurons(experiment)
    table = rows(records, latency)
    write_rows(table, folder)
    write_json(folder / "neurons.json", neurons)
    plots = _plots(experiment, table, neurons)
    for name, draw in plots.items():
        figures.save(draw, folder / f"{name}.png")
    text = _markdown(experiment, table, latency, neurons)
    text += "".join(f"\n![{name}.png]({name}.png)\n" for name in plots)
    (folder / "results.md").write_text(text, encoding="utf-8")
    names = ", ".join(f"{name}.png" for name in plots)
    return f"{text}\nWritten: {folder}/results.md, .csv, .json, {names}"


def _plots(experiment: Experiment, table: pd.DataFrame, neurons: Rows) -> dict[str, Draw]:
    """File name -> what draws the figure."""
    metric = "score" if table["majority"].isna().any() else "accuracy"
    plots: dict[str, Draw] = {}
    compressed = METHOD in experiment.arms
    for backbone, part in table.groupby("backbone", sort=False):
        if compressed:
            plots[f"ratios_{backbone}"] = partial(figures.ratio_figure, part, metric)
        for ratio in experiment.arm_ratios:
            plots[f"arms_{backbone}_k{ratio}"] = partial(figures.arms_figure, part, ratio, metric)
    if compressed and len(experiment.backbones) > 1:
        plots["sizes"] = partial(figures.size_figure, table)
    if neurons:
        plots["neurons"] = partial(figures.neuron_figure, pd.DataFrame(neurons))
    return plots


def _markdown(experiment: Experiment, table: pd.DataFrame, latency: Rows, neurons: Rows) -> str:
    seeds = ", ".join(map(str, experiment.seeds))
    one_teacher = experiment.one_teacher and len(experiment.seeds) > 1
    sections = [
        f"# Experiment {Path(experiment.model_dir).name}",
        f"{time.strftime('%Y-%m-%d')}, {hardware()}; recipe `{experiment.recipe}`, seeds {seeds}. "
        f"{_HOW_TO_READ}{_ONE_TEACHER if one_teacher else ''}",
    ]
    for backbone in experiment.backbones:
        sections += [f"## {backbone}", tables.quality_table(table, backbone)]
        sections += [tables.remarks(table, backbone), tables.details_table(table, backbone)]
    if METHOD in experiment.arms:
        sections += ["## Sizes and latency", tables.size_table(table)]
    if latency:
        machines = " and ".join(dict.fromkeys(row["hardware"] for row in latency))
        sections.append(
            "Encoder passes of {batch} x {length} tokens in {dtype}".format(**latency[0])
            + f" on {machines}, medians of interleaved rounds; the last column is the measured "
            "speed-up over the one that the saved FLOPs allow."
        )
    if neurons:
        sections += ["## Activated neurons", tables.neuron_table(neurons)]
        sections.append(
            "Share of the encoder's FFN neurons that fire, mean over layers; "
            "task {task}, seed {seed}.".format(**neurons[0])
        )
    return "\n\n".join(filter(None, sections)) + "\n"
