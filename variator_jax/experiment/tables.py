"""The rows of an experiment as Markdown: tables, and sentences that follow from them.

The sentences compare the method with its baselines and name tasks on which the teacher has learned
little; the conclusions are the reader's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from variator_jax.evaluation.report import MIN_MARGIN
from variator_jax.experiment.grid import ARMS, MEAN, METHOD, TEACHER

_NONE = "–"
_HEADLINES = ("accuracy", "token_f1")  # these are the scores themselves
# What the method is compared with, in this order, where it ran.
_RIVALS = ("mean_pool", "no_pretraining", "similar_tokens", "truncated", "student")
# How the method compares with a rival: beyond the deviation over seeds, within it, below it.
_RANKS = _BETTER, _LEVEL, _WORSE = "it is above", "it is **level with**", "it is **below**"


def quality_table(rows: pd.DataFrame) -> str:
    """One line an arm and ratio of a backbone: each task's mean ± deviation, the gap, the costs."""
    gap = "gap of the mean" if MEAN in set(rows["task"]) else "gap"
    lines = []
    for (arm, ratio), group in rows.groupby(["arm", "ratio"], sort=False):
        line = _names(arm, ratio) | {row["task"]: _score(row) for _, row in group.iterrows()}
        overall = group.iloc[-1]
        compared = {gap: _gap(overall)} | _costs(overall)
        lines.append(line | ({gap: _NONE} if arm == TEACHER else compared))
    majority = rows.groupby("task")["majority"].first()
    lines.append({"arm": "majority class"} | {task: _plain(x) for task, x in majority.items()})
    return _markdown(lines)


def details_table(rows: pd.DataFrame) -> str:
    """Further scores, such as F1, one line an arm and ratio; empty where there are none."""
    lines = []
    for (arm, ratio), group in rows.groupby(["arm", "ratio"], sort=False):
        line = _names(arm, ratio)
        for row in group.itertuples():
            names = [name for name in row.details if name not in _HEADLINES]
            line |= {f"{row.task} {name}": _plain(row.details[name]) for name in names}
        lines.append(line)
    return _markdown(lines) if len(lines[0]) > 2 else ""


def size_table(table: pd.DataFrame) -> str:
    """One line a backbone and ratio of the method: gap, costs and latency."""
    lines = [
        {
            "backbone": row["backbone"],
            "parameters": f"{row['parameters'] / 1e6:,.2f} M",
            "k": str(row["ratio"]),
            "gap": _gap(row),
            **_costs(row),
            "encoder pass": _plain(row["milliseconds"], "{:.2f} ms"),
            "speed-up": _plain(row["speedup"], "{:.2f}x"),
            "of allowed": _plain(100 * row["speedup"] / row["allowed"], "{:.0f} %"),
        }
        for _, row in overall_rows(table).iterrows()
    ]
    return _markdown(lines)


def neuron_table(neurons: Sequence[Mapping[str, Any]]) -> str:
    """Mean shares over layers, one line a backbone and ratio; see `score.neurons`."""
    kinds = {"token": "one token", "share": "merged vector", "union": "a group's tokens together"}
    return _markdown(
        {"backbone": row["backbone"], "k": str(row["ratio"])}
        | {name: _percent(row[kind]) for kind, name in kinds.items()}
        for row in neurons
        if row["layer"] == "mean"
    )


def overall_rows(table: pd.DataFrame) -> pd.DataFrame:
    """The method's rows of the mean over tasks, or of the only task."""
    return table[(table["arm"] == METHOD) & (table["task"] == table["task"].iloc[-1])]


def remarks(rows: pd.DataFrame) -> str:
    """Markdown bullets on one backbone's rows."""
    tasks = rows[rows["task"] != MEAN]
    weak = dict(_weak_tasks(tasks))
    lines = [*_against_rivals(rows[rows["task"] == rows["task"].iloc[-1]]), *weak.values()]
    if weak:
        # The comparisons once more, without the tasks that blur the mean.
        for task, part in tasks[~tasks["task"].isin(weak)].groupby("task", sort=False):
            lines += [f"On {task} alone, {line}" for line in _against_rivals(part)]
    lines.append(_standard_errors(tasks[tasks["arm"] == TEACHER]))
    return "\n".join(f"- {line}" for line in lines)


# Cells.


def _markdown(lines: Iterable[Mapping[str, str]]) -> str:
    """A table of lines, each column -> text."""
    frame = pd.DataFrame(lines).fillna("")
    return frame.to_markdown(index=False, tablefmt="github", disable_numparse=True)


def _names(arm: str, ratio: int) -> dict[str, str]:
    return {"arm": ARMS[arm].meaning, "k": str(ratio) if ARMS[arm].compressed else ""}


def _costs(row: pd.Series) -> dict[str, str]:
    extra = _percent(row["extra_parameters_share"], 2)
    return {"FLOPs saved": _percent(row["flops_saved"]), "extra parameters": extra}


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
        rivals = rows[rows["ratio"] == row["ratio"]].set_index("arm")["scores"]
        parts: dict[str, list[str]] = {rank: [] for rank in _RANKS}
        for name in [name for name in _RIVALS if name in rivals]:
            gains = pd.Series(row["scores"]) - pd.Series(rivals[name])  # seed by seed
            gain, std = gains.mean(), gains.std() if len(gains) > 1 else 0.0
            rank = _LEVEL if abs(gain) <= std else _BETTER if gain > 0 else _WORSE
            parts[rank].append(f"*{ARMS[name].meaning}* ({gain:+.1f} ± {std:.1f})")
        comparisons = [f"{rank} {_list(names)}" for rank, names in parts.items() if names]
        yield "; ".join([f"k = {row['ratio']}: the plugin {_change(row)}", *comparisons]) + "."


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


def _standard_errors(teachers: pd.DataFrame) -> str:
    """The standard error that each task's number of examples leaves to a score."""
    errors = [
        f"{math.sqrt(row.mean * (100 - row.mean) / row.examples):.1f} on {row.task} "
        f"({row.examples:,} examples)"
        for row in teachers.itertuples()
    ]
    return (
        f"Whatever the deviation over seeds, a score has a standard error of {_list(errors)}; a "
        "difference between two arms has up to 1.4 times as much."
    )


def _list(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))
