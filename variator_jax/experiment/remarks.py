"""What a table of an experiment lets a reader say, and what it does not, in sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence

from variator_jax.experiment.arms import ARMS, METHOD, TEACHER
from variator_jax.experiment.results import MEAN, Row

# Points on a task's score that the FFNs, or a teacher, must be worth to say something.
_TELLING = 2.0
# What the method is compared with, in this order, where it ran.
_RIVALS = ("mean_pool", "no_pretraining", "similar_tokens", "truncated", "student")


def remarks(found: Sequence[Row], backbone: str) -> str:
    """Markdown bullets on one backbone's rows; empty if there is nothing to say."""
    own = [row for row in found if row.backbone == backbone]
    tasks = [row for row in own if row.task != MEAN]
    whole = [row for row in own if row.task == MEAN] or tasks
    if len({row.task for row in whole}) > 1:
        whole = []  # some arm has not run on all tasks
    said = [*_against_rivals(whole), *_weak_tasks(tasks), *_errors(tasks)]
    return "\n".join(f"- {line}" for line in said)


def _against_rivals(rows: Sequence[Row]) -> list[str]:
    """Each ratio of the method: its gap, and by how much it beats the rivals, seed by seed."""
    said = []
    for row in rows:
        if row.arm != METHOD:
            continue
        rivals = {r.arm: _gain(row, r) for r in rows if r.ratio == row.ratio}
        known = [(f"*{ARMS[name].meaning}*", rivals[name]) for name in _RIVALS if name in rivals]
        text = f"k = {row.ratio}: the plugin {_change(-row.gap, row.gap_std)}"
        if beaten := [f"{name} by {gain:.1f}" for name, gain in known if gain > 0]:
            text += f"; it beats {_list(beaten)}"
        if others := [f"{name} ({gain:+.1f})" for name, gain in known if gain <= 0]:
            text += f"; it **does not beat** {_list(others)}"
        said.append(f"{text}.")
    return said


def _gain(row: Row, rival: Row) -> float:
    """Points that a row is above another one of the same task."""
    return row.mean - rival.mean


def _change(points: float, std: float) -> str:
    if points >= 0:
        return f"gains {points:.2f} ± {std:.2f} points"
    return f"loses {-points:.2f} ± {std:.2f} points"


def _weak_tasks(tasks: Sequence[Row]) -> list[str]:
    """Tasks on which FFNs or the teacher itself are worth little."""
    said = []
    for row in tasks:
        if row.arm == "no_ffn" and row.gap < _TELLING:
            said.append(
                f"{row.task}: without any encoder FFN the teacher loses {row.gap:.1f} points "
                f"(± {row.gap_std:.1f}), so this task says little about plugins."
            )
        above = None if row.majority is None else row.mean - row.majority
        if row.arm == TEACHER and above is not None and above < _TELLING:
            said.append(
                f"{row.task}: the teacher is {above:+.1f} points from always "
                "answering the commonest label, so differences on it are chance."
            )
    return said


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
        "smaller differences between arms are not certain."
    ]


def _list(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
