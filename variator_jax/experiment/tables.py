"""The rows of an experiment as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from variator_jax.experiment.arms import ARMS, METHOD, TEACHER
from variator_jax.experiment.results import MEAN, Row

_NONE = "–"
_HEADLINES = ("accuracy", "token_f1")  # of what the scores are anyway


def quality_table(rows: Sequence[Row], backbone: str) -> str:
    """One line an arm and ratio: mean ± standard deviation of each task, and the gap."""
    own = [row for row in rows if row.backbone == backbone]
    tasks = list(dict.fromkeys(row.task for row in own))
    lines = [
        [_arm(arm), _ratio(arm, ratio), *_scores(own, tasks, arm, ratio), *_costs(own, arm, ratio)]
        for arm, ratio in dict.fromkeys((row.arm, row.ratio) for row in own)
    ]
    majority = {row.task: row.majority for row in own}
    lines.append(["majority class", "", *(_plain(majority[task]) for task in tasks), "", "", ""])
    gap = "gap" if len(tasks) == 1 else "gap of the mean"
    return markdown(("arm", "k", *tasks, gap, "FLOPs saved", "extra parameters"), lines)


def details_table(rows: Sequence[Row], backbone: str) -> str:
    """Further scores, such as F1, one line an arm and ratio; empty where there are none."""
    own = [row for row in rows if row.backbone == backbone and row.details]
    names = list(
        dict.fromkeys((row.task, n) for row in own for n in row.details if n not in _HEADLINES)
    )
    if not names:
        return ""
    by_key = {(row.arm, row.ratio, row.task): row.details for row in own}
    lines = [
        [
            _arm(arm),
            _ratio(arm, ratio),
            *(_plain(by_key.get((arm, ratio, task), {}).get(name)) for task, name in names),
        ]
        for arm, ratio in dict.fromkeys((row.arm, row.ratio) for row in own)
    ]
    return markdown(("arm", "k", *(f"{task} {name}" for task, name in names)), lines)


def size_table(rows: Sequence[Row]) -> str:
    """One line a backbone and ratio of the method: gap, costs and clock."""
    task = MEAN if any(row.task == MEAN for row in rows) else rows[0].task
    lines = [
        [
            row.backbone,
            f"{row.parameters / 1e6:,.2f} M",
            str(row.ratio),
            f"{row.gap:+.2f} ± {row.gap_std:.2f}",
            f"{100 * row.flops_saved:.1f} %",
            f"{100 * row.extra_parameters_share:.2f} %",
            *_clock(row),
        ]
        for row in rows
        if row.arm == METHOD and row.task == task
    ]
    header = ("backbone", "parameters", "k", "gap", "FLOPs saved", "extra parameters")
    return markdown((*header, "encoder pass", "speed-up", "of allowed"), lines)


def neuron_table(neurons: Sequence[Mapping[str, Any]]) -> str:
    """Mean shares over layers, one line a backbone and ratio."""
    lines = [
        [row["backbone"], str(row["ratio"]), *(_share(row[n]) for n in ("token", "share", "union"))]
        for row in neurons
        if row["layer"] == "mean"
    ]
    header = ("backbone", "k", "one token", "merged vector", "a group's tokens together")
    return markdown(header, lines)


def markdown(header: Iterable[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    names = list(header)
    rule = "|".join("---" for _ in names)
    body = [" | ".join(line) for line in [names, *lines]]
    return "\n".join([f"| {body[0]} |", f"|{rule}|", *(f"| {line} |" for line in body[1:])])


def _scores(own: Sequence[Row], tasks: Sequence[str], arm: str, ratio: int) -> list[str]:
    by_task = {row.task: row for row in own if (row.arm, row.ratio) == (arm, ratio)}
    found = [_score(by_task.get(task)) for task in tasks]
    last = by_task.get(tasks[-1] if len(tasks) == 1 else MEAN)
    gap = _NONE if last is None or arm == TEACHER else f"{last.gap:+.2f} ± {last.gap_std:.2f}"
    return [*found, gap]


def _score(row: Row | None) -> str:
    if row is None:
        return _NONE
    return f"{row.mean:.1f} ± {row.std:.1f}" if row.seeds > 1 else f"{row.mean:.1f}"


def _costs(own: Sequence[Row], arm: str, ratio: int) -> list[str]:
    same = [row for row in own if (row.arm, row.ratio) == (arm, ratio)]
    row = next((row for row in same if row.task == MEAN), same[0])  # lengths differ by task
    if arm == TEACHER:
        return ["", ""]
    return [_share(row.flops_saved), _share(row.extra_parameters_share, 2)]


def _clock(row: Row) -> list[str]:
    if row.milliseconds is None or row.speedup is None or row.allowed is None:
        return [_NONE] * 3
    return [
        f"{row.milliseconds:.2f} ms",
        f"{row.speedup:.2f}x",
        f"{100 * row.speedup / row.allowed:.0f} %",
    ]


def _arm(name: str) -> str:
    return ARMS[name].meaning


def _ratio(arm: str, ratio: int) -> str:
    return str(ratio) if ARMS[arm].compressed else ""


def _plain(value: float | None) -> str:
    return _NONE if value is None else f"{value:.1f}"


def _share(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f} %"
