"""Figures of quality: against the compression ratio, and of every arm; and what figures share.

matplotlib is imported only while something is drawn.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from variator_jax.evaluation.plots import COLOURS, GREY, STYLE
from variator_jax.experiment.arms import ARMS, METHOD, TEACHER
from variator_jax.experiment.results import MEAN

CONTROL = "no_ffn"
ERRORBAR = dict(capsize=2.5, elinewidth=0.9)
_ARMS = list(ARMS)  # in the order of legends and lines
ARM_GROUPS = {
    "ours": _ARMS[1:2],
    "ablations": _ARMS[2:10],
    "baselines and controls": _ARMS[10:],
}


def save(draw: Callable[[], Any], path: Path) -> None:
    """Draws a figure, and writes a PNG of 200 dots an inch at `path` and an SVG beside it."""
    import matplotlib

    # The salt makes the ids in an SVG the same in each run.
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "variator"}):
        figure = draw()
        figure.savefig(path.with_suffix(".png"), dpi=200)
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})


def ratio_figure(table: pd.DataFrame, metric: str) -> Any:
    """Quality against k (the paper's Figure 3): a panel a task, a curve per arm of several ratios.

    Args:
      table: the rows of one backbone, see `results.rows`.
      metric: what the scores are, for the axis.
    """
    tasks = tasks_in_order(table)
    counts = table.groupby("arm")["ratio"].nunique()
    arms = [arm for arm in _ARMS if arm in counts and (arm == METHOD or counts[arm] > 1)]
    figure, axes = panels(len(tasks), _columns(tasks), 3.5 if len(tasks) > 1 else 5.2, 2.8)
    # Each arm a little aside, so that error bars of equal scores stay visible side by side.
    step = min(0.07, 0.5 / max(len(arms), 1))
    for panel, task in zip(axes, tasks, strict=True):
        rows = table[table["task"] == task]
        for i, arm in enumerate(arms):
            own = rows[rows["arm"] == arm].sort_values("ratio")
            shift = 2 ** (step * (i - (len(arms) - 1) / 2))
            look = dict(color=COLOURS[i % len(COLOURS)], lw=2.2 if arm == METHOD else 1.1)
            errorbar(panel, own["ratio"] * shift, own["mean"], own["std"], ARMS[arm].meaning, look)
        _references(panel, rows)
        panel.margins(y=0.1)
        ratio_axis(panel, sorted(rows[rows["arm"].isin(arms)]["ratio"].unique()))
        panel.set_title(task_title(table, task), fontsize=9)
    axes[0].set_ylabel(f"{metric} (%)")
    heading(figure, f"{table['backbone'].iloc[0]}; {error_bars(table)}")
    legend_below(figure, axes)
    return figure


def arms_figure(table: pd.DataFrame, ratio: int, metric: str) -> Any:
    """Every arm at one ratio: a panel a task, a line per arm, the gap beside it.

    Args:
      table: the rows of one backbone, see `results.rows`.
      ratio: the compression ratio.
      metric: what the scores are, for the axis.
    """
    table = table[table["ratio"].isin((ratio, 1))]
    tasks, columns = tasks_in_order(table), _columns(tasks_in_order(table))
    heights = _heights(set(table["arm"]))
    height = 0.9 + 0.22 * (max(heights.values(), default=4) + 1)
    figure, axes = panels(len(tasks), columns, 2.7, height, names=2.1)
    for i, (panel, task) in enumerate(zip(axes, tasks, strict=True)):
        rows = table[table["task"] == task]
        _references(panel, rows[rows["arm"] == TEACHER], upright=True)
        for colour, (group, members) in zip(COLOURS, ARM_GROUPS.items(), strict=False):
            own = rows[rows["arm"].isin(members)]
            look = dict(color=colour, ls="")
            x, y = own["mean"], own["arm"].map(heights)
            errorbar(panel, x, y, own["std"], group, look, upright=False)
            for gap, line in zip(own["gap"], y, strict=True):
                _text_beside(panel, line, signed(gap))
        _text_beside(panel, -1.0, "gap")
        panel.set_ylim(max(heights.values(), default=0.0) + 0.7, -0.7)
        panel.margins(x=0.12)
        names = [ARMS[arm].meaning for arm in heights]
        panel.set_yticks(list(heights.values()), names if i % columns == 0 else [])
        panel.set_title(task_title(table, task), fontsize=9)
        panel.set_xlabel(f"{metric} (%)")
    heading(
        figure,
        f"k = {ratio}; {table['backbone'].iloc[0]}; {error_bars(table)}; gap: points below the "
        "uncompressed",
    )
    legend_below(figure, axes)
    return figure


def _references(axes: Any, rows: pd.DataFrame, upright: bool = False) -> None:
    """The uncompressed backbone, with a band of its deviation, and the control without FFNs."""
    line, band = (axes.axvline, axes.axvspan) if upright else (axes.axhline, axes.axhspan)
    for row in rows[rows["arm"] == TEACHER].itertuples():
        line(row.mean, color=GREY, ls="--", lw=1.1, label=ARMS[TEACHER].meaning, zorder=1)
        if row.std:
            band(row.mean - row.std, row.mean + row.std, color=GREY, alpha=0.12, lw=0, zorder=1)
    for row in rows[rows["arm"] == CONTROL].itertuples():
        line(row.mean, color=GREY, ls=":", lw=1.4, label=ARMS[CONTROL].meaning, zorder=1)


def _text_beside(axes: Any, height: float, text: str) -> None:
    """Text to the right of a panel, at a height in its data's units."""
    transform = axes.get_yaxis_transform()
    axes.text(1.02, height, text, transform=transform, va="center", fontsize=7.5, color=GREY)


def _heights(arms: set[str]) -> dict[str, float]:
    """The height of each arm's line, from the top, with space between the groups."""
    heights: dict[str, float] = {}
    for members in ARM_GROUPS.values():
        top = max(heights.values()) + 1.6 if heights else 0.0
        present = [arm for arm in members if arm in arms]
        heights |= {arm: top + i for i, arm in enumerate(present)}
    return heights


def _columns(tasks: Sequence[str]) -> int:
    """Panels in a line: up to three, else half of all."""
    return len(tasks) if len(tasks) <= 3 else -(-len(tasks) // 2)


# What the figures share.


def panels(
    count: int, columns: int, width: float, height: float, names: float = 0.0
) -> tuple[Any, list[Any]]:
    """A figure of `count` panels in lines of `columns`, each `width` x `height` inches.

    `names` is the width in inches of long names left of the first column.
    """
    from matplotlib.figure import Figure

    lines = -(-count // columns)
    figure = Figure(figsize=(names + width * columns, height * lines + 0.8), layout="constrained")
    axes: list[Any] = list(figure.subplots(lines, columns, squeeze=False).flat)
    for unused in axes[count:]:
        unused.remove()
    for panel in axes[:count]:
        panel.grid(alpha=0.25, lw=0.6)
    return figure, axes[:count]


def errorbar(
    axes: Any,
    x: pd.Series,
    y: pd.Series,
    errors: pd.Series,
    label: str,
    look: dict[str, Any],
    upright: bool = True,
) -> None:
    """A curve of dots with error bars, none where all errors are 0 as with one seed."""
    if len(x):
        sizes = {"yerr" if upright else "xerr": errors} if errors.any() else {}
        axes.errorbar(x, y, label=label, marker="o", ms=5, zorder=3, **ERRORBAR, **sizes, **look)


def tasks_in_order(table: pd.DataFrame) -> list[str]:
    """The tasks as in the rows, the mean of several tasks last."""
    return sorted(table["task"].unique(), key=lambda task: task == MEAN)


def task_title(table: pd.DataFrame, task: str) -> str:
    """A task's name, or how many tasks the mean is of."""
    return f"mean of {table['task'].nunique() - 1} tasks" if task == MEAN else task


def error_bars(table: pd.DataFrame) -> str:
    """What an error bar is."""
    low, high = table["seeds"].min(), table["seeds"].max()
    if high == 1:
        return "one seed, no error bars"
    number = str(high) if low == high else f"{low} to {high}"
    return f"error bars: standard deviation over {number} seeds"


def signed(points: float) -> str:
    """One decimal with its sign, and none on a zero."""
    text = f"{points:+.1f}"
    return "0.0" if float(text) == 0 else text.replace("-", "\N{MINUS SIGN}")


def ratio_axis(axes: Any, ratios: Sequence[int]) -> None:
    """A log2 axis with a tick at each ratio."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(ratios, [str(ratio) for ratio in ratios])
    axes.minorticks_off()
    axes.set_xlim(min(ratios) / 1.25, max(ratios) * 1.25)
    axes.set_xlabel("compression ratio k")


def heading(figure: Any, text: str) -> None:
    """Text above all panels, in as many lines as it takes."""
    figure.suptitle(textwrap.fill(text, int(12 * figure.get_figwidth())), fontsize=9)


def legend_below(figure: Any, axes: Iterable[Any]) -> None:
    """One legend below the panels, each entry once, as wide as the figure allows."""
    entries: dict[str, Any] = {}
    for panel in axes:
        handles, labels = panel.get_legend_handles_labels()
        entries = dict(zip(labels, handles, strict=True)) | entries
    columns = max(1, min(int(figure.get_figwidth() / 2.4), len(entries)))
    # Each further line gets its own space, so that a long legend does not squeeze the panels.
    lines = -(-len(entries) // columns)
    figure.set_figheight(figure.get_figheight() + 0.16 * (lines - 1))
    figure.legend(
        list(entries.values()),
        list(entries),
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=8,
    )
