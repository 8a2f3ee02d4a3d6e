"""From cells to rows: means and standard deviations over seeds, and paired gaps, as data frames."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from variator_jax.experiment.grid import TEACHER

MEAN = "mean"  # the mean over all tasks

# Fields of a cell's record besides its score, the same for each of its seeds.
COSTS = ["flops_saved", "extra_parameters", "extra_parameters_share", "parameters", "majority"]
LATENCY = ["milliseconds", "spread", "speedup", "allowed"]
_ROW = ["backbone", "task", "arm", "ratio"]


def rows(
    records: Sequence[Mapping[str, Any]], latency: Iterable[Mapping[str, Any]] = ()
) -> pd.DataFrame:
    """Aggregates cells over seeds, task by task and over all tasks.

    Args:
      records: of cells, see `score.score_cell`.
      latency: of encoder passes, see `measure.latencies`.

    Returns:
      A row for each backbone, task, arm and ratio, with the columns:
        task: a task's name, or 'mean': of the mean over all tasks, of the seeds that have all.
        ratio: 1 where nothing is compressed.
        seeds: how many runs.
        mean, std: of the score, 0 to 100; the sample standard deviation is 0 for one seed.
        scores: seed -> score.
        gap, gap_std: of the teacher's score less this one, seed by seed, in points.
        details: means of further scores, such as F1.
        examples: that a score is over, of all tasks together for 'mean'.
        flops_saved: share of the encoder's FLOPs; negative where it costs more.
        extra_parameters, extra_parameters_share: weights added to the backbone's, and their share.
        parameters: the backbone's.
        majority: score of the majority class, NaN where there is none.
        milliseconds, spread: a measured encoder pass and its interquartile range; NaN if not
          measured.
        speedup, allowed: measured over the backbone's, and the one that the saved FLOPs allow.
    """
    cells = pd.DataFrame(records).astype({"majority": float})
    cells = pd.concat([cells, _task_means(cells)], ignore_index=True)
    paired = ["backbone", "task", "seed"]
    teachers = cells[cells["arm"] == TEACHER].set_index(paired)["score"]
    cells["gap"] = cells.join(teachers.rename("teacher"), on=paired)["teacher"] - cells["score"]
    groups = cells.groupby(_ROW, sort=False)
    table = groups.agg(
        seeds=("score", "size"),
        mean=("score", "mean"),
        std=("score", "std"),
        gap=("gap", "mean"),
        gap_std=("gap", "std"),
        **{name: (name, "first") for name in ("examples", *COSTS)},
    ).fillna({"std": 0.0, "gap_std": 0.0})
    table["scores"] = [dict(zip(g["seed"], g["score"], strict=True)) for _, g in groups]
    table["details"] = [pd.DataFrame(list(g["details"])).mean().to_dict() for _, g in groups]
    measured = pd.DataFrame(latency, columns=["backbone", "arm", "ratio", *LATENCY])
    dtypes = {"ratio": int, **dict.fromkeys(LATENCY, float)}
    keys = ["backbone", "arm", "ratio"]
    return table.reset_index().merge(measured.astype(dtypes), "left", keys)


def write_rows(table: pd.DataFrame, folder: Path) -> None:
    """Writes `results.json` and, without what is nested, `results.csv`."""
    table.to_json(folder / "results.json", orient="records", indent=2, double_precision=15)
    table.drop(columns=["scores", "details"]).to_csv(folder / "results.csv", index=False)


def _task_means(cells: pd.DataFrame) -> pd.DataFrame:
    """A cell for each arm and seed that has all tasks: the mean over them."""
    tasks = cells["task"].nunique()
    groups = cells.groupby(["backbone", "arm", "ratio", "seed"], sort=False)
    means = groups[["score", *COSTS]].mean(skipna=False)
    means["examples"] = groups["examples"].sum()
    means = means[groups.size() == tasks].reset_index()
    if tasks < 2:
        means = means.iloc[:0]
    counts = {"extra_parameters": int, "parameters": int}
    return means.astype(counts).assign(task=MEAN, details=[{}] * len(means))
