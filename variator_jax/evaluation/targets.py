"""The figures that the quickstart promises, and which of them a report misses, in words."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping

from variator_jax.evaluation.schema import LatencyEntry, RatioEntry, Report, Scores


@dataclasses.dataclass(frozen=True)
class Targets:
    """Promised figures; a field left empty promises nothing.

    Attributes:
      over_majority: part of a classification task's name -> points above the majority score.
      largest_drop: ratio -> points that the mean of the classification tasks may lose.
      control_drop: points that this mean must lose without encoder FFNs.
      speed_config: shape whose cost is promised, at `speed_length` and `speed_ratio`.
      saved: the least share of its encoder FLOPs saved.
      efficiency: the least share of the speed-up that the saved FLOPs allow.
    """

    over_majority: Mapping[str, float] = dataclasses.field(
        default_factory=lambda: {"topic": 25.0, "pair": 10.0}
    )
    largest_drop: Mapping[int, float] = dataclasses.field(default_factory=lambda: {2: 1.0, 4: 2.0})
    control_drop: float = 5.0
    speed_config: str = "t5_1_0_base"
    speed_length: int = 256
    speed_ratio: int = 4
    saved: float = 0.43
    efficiency: float = 0.85


QUICKSTART = Targets()


def targets_missed(report: Report, targets: Targets) -> list[str]:
    """One sentence for each promised figure that the report misses or does not hold."""
    return [
        *_identity(report),
        *_over_majority(report, targets),
        *_drops(report, targets),
        *_control(report, targets),
        *_speed(report, targets),
    ]


def classification_mean(report: Report, scores: Scores) -> float | None:
    """Mean score of the classification tasks, those with a majority score; None if any lacks."""
    tasks = list(report.majority)
    if not tasks or any(task not in scores for task in tasks):
        return None
    return sum(scores[task] for task in tasks) / len(tasks)


def _identity(report: Report) -> Iterator[str]:
    entry = report.at(1)
    if entry is None:
        yield "Ratio 1 was not evaluated, so there is no uncompressed backbone to compare with."
    elif not entry.identical_to_backbone:
        yield "k=1 is not bit-identical to the backbone."


def _over_majority(report: Report, targets: Targets) -> Iterator[str]:
    backbone = report.at(1)
    for part, margin in targets.over_majority.items():
        tasks = [task for task in report.majority if part in task]
        if not tasks:
            yield f"No classification task is named after {part!r}, so its promise is not checked."
        for task in tasks if backbone else ():
            gain = _score(backbone, task) - report.majority[task]
            if not gain >= margin:
                yield (
                    f"The uncompressed backbone beats the majority class of {task} by {gain:.1f} "
                    f"points; at least {margin:.1f} were promised."
                )


def _drops(report: Report, targets: Targets) -> Iterator[str]:
    for ratio, limit in targets.largest_drop.items():
        entry = report.at(ratio)
        drop = _drop(report, entry.quality) if entry else None
        if drop is None:
            yield f"k={ratio} was not evaluated on all classification tasks beside the backbone."
        elif not drop <= limit:
            yield (
                f"k={ratio} loses {drop:.1f} points of the mean of the classification tasks; at "
                f"most {limit:.1f} were promised."
            )


def _control(report: Report, targets: Targets) -> Iterator[str]:
    drop = _drop(report, report.control_no_ffn)
    if drop is None:
        yield "The control without encoder FFNs was not evaluated on all classification tasks."
    elif not drop >= targets.control_drop:
        yield (
            f"Without encoder FFNs the mean of the classification tasks falls by {drop:.1f} "
            f"points; at least {targets.control_drop:.1f} were promised, so these tasks say little "
            "about the plugin."
        )


def _speed(report: Report, targets: Targets) -> Iterator[str]:
    where = f"{targets.speed_config} at length {targets.speed_length} and k={targets.speed_ratio}"
    entry = report.at(targets.speed_ratio)
    rows = list(_at_shape(entry.latency if entry else (), targets))
    if not rows:
        yield f"The cost of {where} was not measured."
    for row in rows:
        saved = 1 - 1 / row.flops_allowed_speedup
        reached = row.speedup / row.flops_allowed_speedup
        if not saved >= targets.saved:
            yield (
                f"{where} saves {saved:.1%} of the encoder FLOPs; at least {targets.saved:.0%} "
                "were promised."
            )
        if not reached >= targets.efficiency:
            yield (
                f"{where} (batch {row.batch}) runs {row.speedup:.2f} times as fast, {reached:.0%} "
                f"of the {row.flops_allowed_speedup:.2f} that the saved FLOPs allow; at least "
                f"{targets.efficiency:.0%} were promised."
            )


def _at_shape(rows: Iterable[LatencyEntry], targets: Targets) -> Iterator[LatencyEntry]:
    for row in rows:
        if row.config == targets.speed_config and row.length == targets.speed_length:
            yield row


def _drop(report: Report, scores: Scores) -> float | None:
    """Points that the mean of the classification tasks loses against the uncompressed backbone."""
    backbone = report.at(1)
    before = classification_mean(report, backbone.quality) if backbone else None
    after = classification_mean(report, scores)
    return None if before is None or after is None else before - after


def _score(entry: RatioEntry | None, task: str) -> float:
    """A task's score, not a number where it is absent, so that no promise counts as kept."""
    return entry.quality.get(task, float("nan")) if entry else float("nan")
