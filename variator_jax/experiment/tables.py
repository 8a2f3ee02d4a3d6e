"""The rows of an experiment as Markdown tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from variator_jax.experiment.arms import ARMS, METHOD, TEACHER
from variator_jax.experiment.results import MEAN

_NONE = "–"
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
