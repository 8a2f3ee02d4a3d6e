"""Sentences that follow from an experiment's table: how the method compares, and how sure that is.

The conclusions are the reader's; a task on which the teacher has learned little is named.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import pandas as pd

from variator_jax.evaluation.tables import TELLING
from variator_jax.experiment.arms import ARMS, METHOD, TEACHER
from variator_jax.experiment.results import MEAN

# What the method is compared with, in this order, where it ran.
_RIVALS = ("mean_pool", "no_pretraining", "similar_tokens", "truncated", "student")

# How the method compares with a rival: beyond the deviation over seeds, within it, below it.
_RANKS = _BETTER, _LEVEL, _WORSE = "it is above", "it is **level with**", "it is **below**"


def remarks(table: pd.DataFrame, backbone: str) -> str:
    """Markdown bullets on one backbone's rows; empty if there are none.

    Args:
      table: see `results.rows`.
      backbone: its name.
    """
    rows = table[table["backbone"] == backbone]
    tasks = rows[rows["task"] != MEAN]
    overall = rows[rows["task"] == MEAN] if MEAN in set(rows["task"]) else tasks
    weak = dict(_weak_tasks(tasks))
    lines: list[str] = []
    if overall["task"].nunique() == 1:  # else some arm has not run on all tasks
        lines += _against_rivals(overall)
    lines += weak.values()
    if weak:
        # The comparisons once more, without the tasks that blur the mean.
        for task in [name for name in tasks["task"].unique() if name not in weak]:
            alone = _against_rivals(tasks[tasks["task"] == task])
            lines += [f"On {task} alone, {line}" for line in alone]
    lines += _standard_errors(tasks)
    return "\n".join(f"- {line}" for line in lines)


def _against_rivals(rows: pd.DataFrame) -> Iterator[str]:
    """Each ratio of the method: its gap, and how it compares with the rivals of the same ratio."""
    for _, row in rows[rows["arm"] == METHOD].iterrows():
        same_ratio = rows[rows["ratio"] == row["ratio"]].set_index("arm")
        parts: dict[str, list[str]] = {rank: [] for rank in _RANKS}
        for name in [name for name in _RIVALS if name in same_ratio.index]:
            # Seed by seed, over the common ones.
            gains = (pd.Series(row["scores"]) - pd.Series(same_ratio["scores"][name])).dropna()
            gain, std = gains.mean(), gains.std() if len(gains) > 1 else 0.0
            rank = _LEVEL if abs(gain) <= std else _BETTER if gain > 0 else _WORSE
            parts[rank].append(f"*{ARMS[name].meaning}* ({gain:+.1f} ± {std:.1f})")
        comparisons = [f"{rank} {_list(names)}" for rank, names in parts.items() if names]
        change = f"k = {row['ratio']}: the plugin {_change(row)}"
        yield "; ".join([change, *comparisons]) + "."


def _change(row: pd.Series) -> str:
    """What a row loses or gains against the teacher."""
    verb = "gains" if row["gap"] < 0 else "loses"
    return f"{verb} {abs(row['gap']):.2f} ± {row['gap_std']:.2f} points"


def _weak_tasks(tasks: pd.DataFrame) -> Iterator[tuple[str, str]]:
    """Tasks on which FFNs or the teacher itself contribute little, each with a sentence."""
    for task, rows in tasks.groupby("task", sort=False):
        reasons = []
        for _, row in rows.iterrows():
            above = row["mean"] - row["majority"]
            if row["arm"] == TEACHER and above < TELLING:
                reasons.append(
                    f"the teacher is {above:+.1f} points from the majority class, so differences "
                    "on it are chance"
                )
            if row["arm"] == "no_ffn" and row["gap"] < TELLING:
                reasons.append(
                    f"without any encoder FFN the teacher {_change(row)}, so this task is not "
                    "informative about plugins"
                )
        if reasons:
            yield str(task), f"{task}: {'; '.join(reasons)}."


def _standard_errors(tasks: pd.DataFrame) -> Iterator[str]:
    """The standard error that each task's number of examples leaves to a score."""
    errors = [
        f"{math.sqrt(row.mean * (100 - row.mean) / row.examples):.1f} on {row.task} "
        f"({row.examples:,} examples)"
        for row in tasks[(tasks["arm"] == TEACHER) & (tasks["examples"] > 0)].itertuples()
    ]
    if errors:
        yield (
            f"Whatever the deviation over seeds, a score has a standard error of {_list(errors)}; "
            "a difference between two arms has up to 1.4 times as much."
        )


def _list(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
