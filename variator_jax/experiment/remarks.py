"""What a table of an experiment lets a reader say, and what it does not, in sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from variator_jax.evaluation.report import MIN_MARGIN
from variator_jax.experiment.arms import ARMS, METHOD, TEACHER
from variator_jax.experiment.results import MEAN, Row, mean_std

# What the method is compared with, in this order, where it ran.
_RIVALS = ("mean_pool", "no_pretraining", "similar_tokens", "truncated", "student")

# How the method stands to a rival: beyond the deviation over seeds, within it, below it.
_RANKS = ("it is above", "it is **level with**", "it is **below**")


def remarks(found: Sequence[Row], backbone: str) -> str:
    """Markdown bullets on one backbone's rows; empty if there is nothing to say."""
    own = [row for row in found if row.backbone == backbone]
    tasks = [row for row in own if row.task != MEAN]
    whole = [row for row in own if row.task == MEAN] or tasks
    if len({row.task for row in whole}) > 1:
        whole = []  # some arm has not run on all tasks
    weak = _weak_tasks(tasks)
    said = [*_against_rivals(whole), *weak.values(), *_telling_tasks(tasks, weak), *_errors(tasks)]
    return "\n".join(f"- {line}" for line in said)


def _telling_tasks(tasks: Sequence[Row], weak: Mapping[str, str]) -> list[str]:
    """The comparisons once more, without the tasks that blur the mean."""
    names = dict.fromkeys(row.task for row in tasks)
    if not weak or len(names) == 1:
        return []
    return [
        f"On {name} alone, k{line.removeprefix('k')}"
        for name in names
        if name not in weak
        for line in _against_rivals([row for row in tasks if row.task == name])
    ]


def _against_rivals(rows: Sequence[Row]) -> list[str]:
    """Each ratio of the method: its gap, and how it stands to the rivals of the same ratio."""
    said = []
    for row in rows:
        if row.arm != METHOD:
            continue
        rivals = {r.arm: r for r in rows if r.ratio == row.ratio and r.arm in _RIVALS}
        ranks: dict[str, list[str]] = {rank: [] for rank in _RANKS}
        for name in filter(rivals.get, _RIVALS):
            gain, std = _gain(row, rivals[name])
            ranks[_rank(gain, std)].append(f"*{ARMS[name].meaning}* ({gain:+.1f} ± {std:.1f})")
        parts = [f"{rank} {_list(names)}" for rank, names in ranks.items() if names]
        said.append("; ".join([f"k = {row.ratio}: the plugin {_change(row)}", *parts]) + ".")
    return said


def _gain(row: Row, rival: Row) -> tuple[float, float]:
    """Mean and sample standard deviation of the points above a rival, over common seeds."""
    common = row.scores.keys() & rival.scores.keys()
    return mean_std([row.scores[seed] - rival.scores[seed] for seed in sorted(common)])


def _rank(gain: float, std: float) -> str:
    better, level, worse = _RANKS
    if abs(gain) <= std:
        return level
    return better if gain > 0 else worse


def _change(row: Row) -> str:
    """What a row loses or gains against the teacher."""
    return f"{'gains' if row.gap < 0 else 'loses'} {abs(row.gap):.2f} ± {row.gap_std:.2f} points"


def _weak_tasks(tasks: Sequence[Row]) -> dict[str, str]:
    """Tasks on which FFNs or the teacher itself are worth little, and what to say of them."""
    said: dict[str, list[str]] = {}
    for row in tasks:
        above = None if row.majority is None else row.mean - row.majority
        if row.arm == TEACHER and above is not None and above < MIN_MARGIN:
            said.setdefault(row.task, []).append(
                f"the teacher is {above:+.1f} points from always answering the commonest label, so "
                "differences on it are chance"
            )
        if row.arm == "no_ffn" and row.gap < MIN_MARGIN:
            said.setdefault(row.task, []).append(
                f"without any encoder FFN the teacher {_change(row)}, so this task says little "
                "about plugins"
            )
    return {task: f"{task}: {'; '.join(parts)}." for task, parts in said.items()}


def _errors(tasks: Sequence[Row]) -> list[str]:
    """The standard error that each task's number of examples leaves to a score."""
    errors = [
        f"{math.sqrt(row.mean * (100 - row.mean) / row.examples):.1f} on {row.task} "
        f"({row.examples:,} examples)"
        for row in tasks
        if row.arm == TEACHER and row.examples
    ]
    if not errors:
        return []
    return [
        f"Whatever the deviation over seeds, a score has a standard error of {_list(errors)}; "
        "a difference between two arms has up to 1.4 times as much."
    ]


def _list(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
