"""The rows of an experiment as Markdown: tables, and sentences that follow from them.

The sentences compare the method with its baselines and name tasks on which the teacher has learned
little; the conclusions are the reader's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from variator_jax.evaluation.report import MIN_MARGIN
from variator_jax.experiment.grid import ARMS, METHOD, TEACHER
from variator_jax.experiment.results import MEAN

_NONE = "–"
# What the method is compared with, in this order, where it ran.
_RIVALS = ("mean_pool", "no_pretraining", "similar_tokens", "truncated", "student")

# How the method compares with a baseline: beyond the deviation over seeds, within it, below it.
_RANKS = _BETTER, _LEVEL, _WORSE = "it is above", "it is **level with**", "it is **below**"
_HEADLINES = ("accuracy", "token_f1")  # these are the scores themselves


def quality_table(table: pd.DataFrame, backbone: str) -> str:
    """One line an arm and ratio: mean ± standard deviation of each task, the gap and the costs."""
    rows = table[table["backbone"] == backbone]
    tasks = list(rows["task"].unique())
    last = tasks[0] if len(tasks) == 1 else MEAN
    gap = "gap" if len(tasks) == 1 else "gap of the mean"
    lines = []
    for (arm, ratio), group in rows.groupby(["arm", "ratio"], sort=False):
        by_task = group.set_index("task")
        line = _names(arm, ratio) | dict.fromkeys(tasks, _NONE) | {gap: _NONE}
        line |= {task: _score(row) for task, row in by_task.iterrows()}
        if arm != TEACHER:
            if last in by_task.index:
                line[gap] = _gap(by_task.loc[last])
            costs = by_task.loc[last if last in by_task.index else by_task.index[0]]
            line["FLOPs saved"] = _percent(costs["flops_saved"])
            line["extra parameters"] = _percent(costs["extra_parameters_share"], 2)
        lines.append(line)
    majority = rows.groupby("task")["majority"].first()
    lines.append({"arm": "majority class", **{task: _plain(majority[task]) for task in tasks}})
    return markdown(lines)


def details_table(table: pd.DataFrame, backbone: str) -> str:
    """Further scores, such as F1, one line an arm and ratio; empty where there are none."""
    rows, lines = table[table["backbone"] == backbone], []
    for (arm, ratio), group in rows.groupby(["arm", "ratio"], sort=False):
        line = _names(arm, ratio)
        for row in group.itertuples():
            names = [name for name in row.details if name not in _HEADLINES]
            line |= {f"{row.task} {name}": _plain(row.details[name]) for name in names}
        lines.append(line)
    return markdown(lines, missing=_NONE) if any(len(line) > 2 for line in lines) else ""


def size_table(table: pd.DataFrame) -> str:
    """One line a backbone and ratio of the method: gap, costs and latency."""
    task = MEAN if MEAN in set(table["task"]) else table["task"].iloc[0]
    rows = table[(table["arm"] == METHOD) & (table["task"] == task)]
    lines = [
        {
            "backbone": row["backbone"],
            "parameters": f"{row['parameters'] / 1e6:,.2f} M",
            "k": str(row["ratio"]),
            "gap": _gap(row),
            "FLOPs saved": _percent(row["flops_saved"]),
            "extra parameters": _percent(row["extra_parameters_share"], 2),
            "encoder pass": _plain(row["milliseconds"], "{:.2f} ms"),
            "speed-up": _plain(row["speedup"], "{:.2f}x"),
            "of allowed": _plain(row["speedup"] / row["allowed"], "{:.0%}").replace("%", " %"),
        }
        for _, row in rows.iterrows()
    ]
    return markdown(lines)


def neuron_table(neurons: Sequence[Mapping[str, Any]]) -> str:
    """Mean shares over layers, one line a backbone and ratio; see `measure.neurons`."""
    lines = []
    for row in [row for row in neurons if row["layer"] == "mean"]:
        one, merged, union = (_percent(row[name]) for name in ("token", "share", "union"))
        names = {"backbone": row["backbone"], "k": str(row["ratio"]), "one token": one}
        lines.append(names | {"merged vector": merged, "a group's tokens together": union})
    return markdown(lines)


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


def markdown(lines: Sequence[Mapping[str, str]], missing: str = "") -> str:
    """A Markdown table of lines, each column -> text."""
    frame = pd.DataFrame(lines).fillna(missing)
    return frame.to_markdown(index=False, tablefmt="github", disable_numparse=True)


def _names(arm: str, ratio: int) -> dict[str, str]:
    return {"arm": ARMS[arm].meaning, "k": str(ratio) if ARMS[arm].compressed else ""}


def _score(row: pd.Series) -> str:
    return f"{row['mean']:.1f}" + (f" ± {row['std']:.1f}" if row["seeds"] > 1 else "")


def _gap(row: pd.Series) -> str:
    return f"{row['gap']:+.2f} ± {row['gap_std']:.2f}"


def _plain(value: float, form: str = "{:.1f}") -> str:
    return _NONE if pd.isna(value) else form.format(value)


def _percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


# Sentences.


def _against_rivals(rows: pd.DataFrame) -> Iterator[str]:
    """Each ratio of the method: its gap, and how it compares with baselines of that ratio."""
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
            if row["arm"] == TEACHER and above < MIN_MARGIN:
                reasons.append(
                    f"the teacher is {above:+.1f} points from the majority class, so differences "
                    "on it are chance"
                )
            if row["arm"] == "no_ffn" and row["gap"] < MIN_MARGIN:
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
