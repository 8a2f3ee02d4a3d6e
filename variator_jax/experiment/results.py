"""From cells to rows: means and standard deviations over seeds, paired gaps, CSV and JSON."""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from variator_jax.experiment.arms import TEACHER
from variator_jax.files import write_json

MEAN = "mean"  # the task that stands for all of them

# What a cell's record holds beside its score, the same for each of its seeds.
CLOCK = ("milliseconds", "spread", "speedup", "allowed")
_NESTED = ("details", "scores")  # in the JSON only
COSTS = ("flops_saved", "extra_parameters", "extra_parameters_share", "parameters", "majority")


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
      backbone: its name.
      task: a task's name, or 'mean': each seed's mean over all tasks.
      arm: the arm's name.
      ratio: compression ratio, 1 where nothing is compressed.
      seeds: how many runs.
      mean: of the score, 0 to 100.
      std: sample standard deviation of the score over seeds, 0 for one.
      scores: seed -> score.
      gap: mean over seeds of the teacher's score less this one, points.
      gap_std: sample standard deviation of it.
      flops_saved: share of the encoder's FLOPs; negative where it costs more.
      extra_parameters: weights beside the backbone's.
      extra_parameters_share: the same over the backbone's.
      parameters: the backbone's own.
      examples: that the score is over, of all tasks together for 'mean'.
      majority: score of always answering the commonest label; None where there is none.
      milliseconds: measured encoder pass, None if not measured.
      spread: its interquartile range.
      speedup: measured, over the backbone's.
      allowed: the speed-up that the saved FLOPs allow.
      details: means of further scores, such as F1.
    """

    backbone: str
    task: str
    arm: str
    ratio: int
    seeds: int
    mean: float
    std: float
    scores: Mapping[int, float]
    gap: float
    gap_std: float
    flops_saved: float
    extra_parameters: int
    extra_parameters_share: float
    parameters: int
    examples: int
    majority: float | None
    milliseconds: float | None = None
    spread: float | None = None
    speedup: float | None = None
    allowed: float | None = None
    details: Mapping[str, float] = dataclasses.field(default_factory=dict)


def rows(
    records: Sequence[Mapping[str, Any]], latency: Iterable[Mapping[str, Any]] = ()
) -> list[Row]:
    """Aggregates cells over seeds, task by task and over all tasks.

    Args:
      records: of cells, see `score.score_cell`.
      latency: of encoder passes, each with backbone, arm, ratio and the four fields of a `Row`.
    """
    clock = {(row["backbone"], row["arm"], row["ratio"]): row for row in latency}
    found = []
    whole = [*records, *_means(records)]
    teachers = {
        (r["backbone"], r["task"], r["seed"]): r["score"] for r in whole if r["arm"] == TEACHER
    }
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for record in whole:
        key = (record["backbone"], record["task"], record["arm"], record["ratio"])
        groups.setdefault(key, []).append(record)
    for (backbone, task, arm, ratio), group in groups.items():
        gaps = [teachers[backbone, task, r["seed"]] - r["score"] for r in group]
        mean, std = mean_std([r["score"] for r in group])
        gap, gap_std = mean_std(gaps)
        measured = clock.get((backbone, arm, ratio), {})
        known: dict[str, Any] = {name: group[0][name] for name in ("examples", *COSTS)}
        known |= {name: measured.get(name) for name in CLOCK}
        known["details"] = _detail_means([r["details"] for r in group])
        known["scores"] = {r["seed"]: r["score"] for r in group}
        names = (backbone, task, arm, ratio, len(group))
        found.append(Row(*names, mean=mean, std=std, gap=gap, gap_std=gap_std, **known))
    return found


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation, 0 for a single value."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, 0.0
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))


def write_rows(found: Sequence[Row], folder: Path) -> None:
    """Writes `results.json` and `results.csv`."""
    plain = [dataclasses.asdict(row) for row in found]
    write_json(folder / "results.json", plain)
    names = [field.name for field in dataclasses.fields(Row) if field.name not in _NESTED]
    with (folder / "results.csv").open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(plain)


def _means(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A record for each arm and seed that has all tasks: its mean over them."""
    tasks = list(dict.fromkeys(r["task"] for r in records))
    if len(tasks) < 2:
        return []
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for record in records:
        key = (record["backbone"], record["arm"], record["ratio"], record["seed"])
        groups.setdefault(key, []).append(record)
    means = []
    for group in groups.values():
        if len(group) == len(tasks):
            average = {name: _average([r[name] for r in group]) for name in ("score", *COSTS)}
            whole = {name: int(average[name] or 0) for name in ("extra_parameters", "parameters")}
            whole["examples"] = sum(r["examples"] for r in group)
            means.append({**group[0], **average, **whole, "task": MEAN, "details": {}})
    return means


def _average(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def _detail_means(details: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: mean_std([d[name] for d in details])[0] for name in details[0]}
