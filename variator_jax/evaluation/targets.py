"""The figures that the quickstart promises, and which of them a report misses, in words."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

from variator_jax.evaluation.schema import Report, Scores


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
    return [*_quality(report, targets), *_control(report, targets), *_speed(report, targets)]


def _quality(report: Report, targets: Targets) -> Iterator[str]:
    backbone = report.at(1)
    if backbone is None:
        yield "Ratio 1 was not evaluated, so there is no uncompressed backbone to compare with."
    elif not backbone.identical_to_backbone:
        yield "k=1 is not bit-identical to the backbone."
    for part, margin in targets.over_majority.items():
        tasks = [task for task in report.majority if part in task]
        if not tasks:
            yield f"No classification task is named after {part!r}, so its promise is not checked."
        for task in tasks if backbone else ():
            # Not a number where the score is absent, so that the promise does not count as kept.
            gain = report.reference.get(task, float("nan")) - report.majority[task]
            if not gain >= margin:
                yield (
                    f"The uncompressed backbone beats the majority class of {task} by {gain:.1f} "
                    f"points; at least {margin:.1f} were promised."
                )
    for ratio, limit in targets.largest_drop.items():
        entry = report.at(ratio)
        drop = _drop(report, entry.quality if entry else {})
        if drop is None:
            yield f"k={ratio} or the backbone was not evaluated on all classification tasks."
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
    shape = f"{targets.speed_config} at length {targets.speed_length} and k={targets.speed_ratio}"
    expected = (targets.speed_config, targets.speed_length)
    entry = report.at(targets.speed_ratio)
    measured = entry.latency if entry else ()
    rows = [row for row in measured if (row.config, row.length) == expected]
    if not rows:
        yield f"The cost of {shape} was not measured."
    for row in rows:
        saved = 1 - 1 / row.flops_allowed_speedup
        reached = row.speedup / row.flops_allowed_speedup
        if not saved >= targets.saved:
            yield (
                f"{shape} saves {saved:.1%} of the encoder FLOPs; at least {targets.saved:.0%} "
                "were promised."
            )
        if not reached >= targets.efficiency:
            yield (
                f"{shape} (batch {row.batch}) runs {row.speedup:.2f} times as fast, {reached:.0%} "
                f"of the {row.flops_allowed_speedup:.2f} that the saved FLOPs allow; at least "
                f"{targets.efficiency:.0%} were promised."
            )


def _drop(report: Report, scores: Scores) -> float | None:
    """Points that the mean of the classification tasks loses against the uncompressed backbone."""
    before, after = report.mean(report.reference), report.mean(scores)
    return None if before is None or after is None else before - after
