"""The report of an experiment: from cells to a row for each arm, and to the files in its folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from variator_jax.bench.output import hardware
from variator_jax.experiment import figures, score, tables
from variator_jax.experiment.grid import MEAN, METHOD, TEACHER, Experiment
from variator_jax.experiment.score import Rows
from variator_jax.files import write_json

Plots = dict[str, Callable[[], Any]]  # file name -> what draws the figure
_HOW_TO_READ = (
    "Scores are on a scale of 0 to 100, mean ± standard deviation over seeds; the gap is the "
    "teacher's score less the arm's, seed by seed."
)
_ONE_TEACHER = (
    " The seeds share one teacher and vary what is trained beside it; what is not trained "
    "is the same each time."
)
# What a cell's record holds beside its score, the same for each of its seeds.
_COSTS = ["flops_saved", "extra_parameters", "extra_parameters_share", "parameters", "majority"]
_LATENCY = ["milliseconds", "spread", "speedup", "allowed"]


def report(experiment: Experiment, records: Rows) -> str:
    """Aggregates, measures what is missing, writes everything; returns the Markdown."""
    folder = Path(experiment.model_dir)
    latency, neurons = score.latencies(experiment), score.neurons(experiment)
    table = rows(records, latency)
    table.to_json(folder / "results.json", orient="records", indent=2, double_precision=15)
    table.drop(columns=["scores", "details"]).to_csv(folder / "results.csv", index=False)
    write_json(folder / "neurons.json", neurons)
    plots = _plots(experiment, table, neurons)
    for name, draw in plots.items():
        figures.save(draw, folder / f"{name}.png")
    text = _markdown(experiment, table, latency, neurons)
    text += "".join(f"\n![{name}.png]({name}.png)\n" for name in plots)
    (folder / "results.md").write_text(text, encoding="utf-8")
    names = ", ".join(f"{name}.png" for name in plots)
    return f"{text}\nWritten: {folder}/results.md, .csv, .json, {names}"


def rows(records: Rows, latency: Iterable[Mapping[str, Any]] = ()) -> pd.DataFrame:
    """Aggregates cells over seeds, task by task and over all tasks.

    Args:
      records: of all cells, see `score.score_cell`.
      latency: of encoder passes, see `score.latencies`.

    Returns:
      A row for each backbone, task, arm and ratio, with the columns:
        task: a task's name, or 'mean': of the mean over several tasks, after all tasks.
        ratio: 1 where nothing is compressed.
        seeds: how many runs.
        mean, std: of the score, 0 to 100; the sample standard deviation is 0 for one seed.
        scores: seed -> score.
        gap, gap_std: of the teacher's score less this one, seed by seed, in points.
        details: means of further scores, such as F1.
        examples: that a score is over, of all tasks together for 'mean'.
        flops_saved: share of the encoder's FLOPs; negative where it costs more.
        extra_parameters, extra_parameters_share: weights beside the backbone's, over them.
        parameters: the backbone's.
        majority: score of the majority class, NaN where there is none.
        milliseconds, spread: a measured encoder pass and its interquartile range; NaN if not
          measured.
        speedup, allowed: measured over the backbone's, and the one that the saved FLOPs allow.
    """
    cells = pd.DataFrame(records).astype({"majority": float})
    if cells["task"].nunique() > 1:
        seeds = cells.groupby(["backbone", "arm", "ratio", "seed"], sort=False)
        means = (
            seeds[["score", *_COSTS]].mean(skipna=False).assign(examples=seeds["examples"].sum())
        )
        means = means.reset_index().astype({"extra_parameters": int, "parameters": int})
        cells = pd.concat([cells, means.assign(task=MEAN, details=[{}] * len(means))])
    pairs = ["backbone", "task", "seed"]
    teachers = cells[cells["arm"] == TEACHER].set_index(pairs)["score"].rename("teacher")
    cells = cells.join(teachers, on=pairs)
    cells["gap"] = cells["teacher"] - cells["score"]
    groups = cells.groupby(["backbone", "task", "arm", "ratio"], sort=False)
    table = groups.agg(
        seeds=("score", "size"),
        mean=("score", "mean"),
        std=("score", "std"),
        gap=("gap", "mean"),
        gap_std=("gap", "std"),
        **{name: (name, "first") for name in ("examples", *_COSTS)},
    ).fillna({"std": 0.0, "gap_std": 0.0})
    table["scores"] = [dict(zip(g["seed"], g["score"], strict=True)) for _, g in groups]
    table["details"] = [pd.DataFrame(list(g["details"])).mean().to_dict() for _, g in groups]
    keys = {"backbone": str, "arm": str, "ratio": int}
    measured = pd.DataFrame(latency, columns=[*keys, *_LATENCY])
    measured = measured.astype(keys | dict.fromkeys(_LATENCY, float))
    return table.reset_index().merge(measured, "left", [*keys])


def _plots(experiment: Experiment, table: pd.DataFrame, neurons: Rows) -> Plots:
    metric = "score" if table["majority"].isna().any() else "accuracy"
    plots: Plots = {}
    for backbone, part in table.groupby("backbone", sort=False):
        if METHOD in experiment.arms:
            plots[f"ratios_{backbone}"] = partial(figures.ratio_figure, part, metric)
        for ratio in experiment.arm_ratios:
            plots[f"arms_{backbone}_k{ratio}"] = partial(figures.arms_figure, part, ratio, metric)
    if METHOD in experiment.arms and len(experiment.backbones) > 1:
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
    for backbone, part in table.groupby("backbone", sort=False):
        sections += [f"## {backbone}", tables.quality_table(part)]
        sections += [tables.remarks(part), tables.details_table(part)]
    if METHOD in experiment.arms:
        sections += ["## Sizes and latency", tables.size_table(table)]
    if latency:
        sections.append(
            "Encoder passes of {batch} x {length} tokens in {dtype} on {hardware}, medians of "
            "interleaved rounds; the last column is the measured speed-up over the one that the "
            "saved FLOPs allow.".format(**latency[0])
        )
    if neurons:
        sections += ["## Activated neurons", tables.neuron_table(neurons)]
        sections.append(
            "Share of the encoder's FFN neurons that fire, mean over layers; "
            "task {task}, seed {seed}.".format(**neurons[0])
        )
    return "\n\n".join(filter(None, sections)) + "\n"
