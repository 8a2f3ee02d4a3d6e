"""Figures of quality: against the compression ratio, and of every arm; and what figures share.

matplotlib is imported only while something is drawn.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from variator_jax.evaluation.plots import COLOURS, GREY, STYLE
from variator_jax.experiment.arms import ARMS, METHOD, TEACHER
from variator_jax.experiment.results import MEAN

DOTS = dict(marker="o", ms=5, capsize=2.5, elinewidth=0.9)
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
    counts = table.groupby("arm")["ratio"].nunique()
    arms = [arm for arm in _ARMS if arm == METHOD or counts.get(arm, 0) > 1]
    figure, axes = _task_panels(table, 3.5, 2.8)
    for panel, rows in axes:
        for i, arm in enumerate(arms):
            own = rows[rows["arm"] == arm].sort_values("ratio")
            # Each arm a little aside, so that error bars of equal scores stay visible.
            x = own["ratio"] * 2 ** (0.07 * (i - (len(arms) - 1) / 2))
            look = dict(color=COLOURS[i % len(COLOURS)], lw=2.2 if arm == METHOD else 1.1, **DOTS)
            panel.errorbar(x, own["mean"], own["std"], label=ARMS[arm].meaning, **look)
        _references(panel, rows)
        panel.margins(y=0.1)
        ratio_axis(panel, sorted(rows[rows["arm"].isin(arms)]["ratio"].unique()))
    axes[0][0].set_ylabel(f"{metric} (%)")
    finish(figure, table, table["backbone"].iloc[0])
    return figure


def arms_figure(table: pd.DataFrame, ratio: int, metric: str) -> Any:
    """Every arm at one ratio: a panel a task, a line per arm, the gap beside it.

    Args:
      table: the rows of one backbone, see `results.rows`.
      ratio: the compression ratio.
      metric: what the scores are, for the axis.
    """
    table = table[table["ratio"].isin((ratio, 1))]
    heights = _heights(set(table["arm"]))
    lowest = max(heights.values(), default=0.0) + 1
    figure, axes = _task_panels(table, 2.7, 0.9 + 0.22 * lowest, names=2.1)
    for i, (panel, rows) in enumerate(axes):
        _references(panel, rows[rows["arm"] == TEACHER], upright=True)
        for colour, (group, members) in zip(COLOURS, ARM_GROUPS.items(), strict=False):
            own = rows[rows["arm"].isin(members)]
            look = dict(color=colour, ls="", label=group, **DOTS)
            panel.errorbar(own["mean"], own["arm"].map(heights), xerr=own["std"], **look)
        others = rows[rows["arm"] != TEACHER]
        gaps = {heights[row.arm]: f"{row.gap:+.1f}" for row in others.itertuples()}
        for height, text in {-1.0: "gap", **gaps}.items():
            # To the right of the panel.
            transform = panel.get_yaxis_transform()
            panel.text(1.02, height, text, transform=transform, va="center", size=7.5, color=GREY)
        names = [ARMS[arm].meaning for arm in heights] if i % 4 == 0 else []
        panel.set_yticks(list(heights.values()), names)
        panel.set_ylim(lowest - 0.3, -0.7)
        panel.margins(x=0.12)
        panel.set_xlabel(f"{metric} (%)")
    backbone = table["backbone"].iloc[0]
    finish(figure, table, f"k = {ratio}; {backbone}; gap: points below the uncompressed")
    return figure


def _task_panels(
    table: pd.DataFrame, width: float, height: float, names: float = 0.0
) -> tuple[Any, list[tuple[Any, pd.DataFrame]]]:
    """A figure with a panel for each task, the mean of several last, and the rows of each."""
    tasks = sorted(table["task"].unique(), key=lambda task: task == MEAN)
    figure, axes = panels(len(tasks), 4, width, height, names)
    for panel, task in zip(axes, tasks, strict=True):
        panel.set_title(task_title(table, task), fontsize=9)
    return figure, [(p, table[table["task"] == t]) for p, t in zip(axes, tasks, strict=True)]


def _references(axes: Any, rows: pd.DataFrame, upright: bool = False) -> None:
    """The uncompressed backbone, with a band of its deviation, and the control without FFNs."""
    line, band = (axes.axvline, axes.axvspan) if upright else (axes.axhline, axes.axhspan)
    for arm, style in {TEACHER: "--", "no_ffn": ":"}.items():
        for row in rows[rows["arm"] == arm].itertuples():
            line(row.mean, color=GREY, ls=style, lw=1.2, label=ARMS[arm].meaning, zorder=1)
            if arm == TEACHER and row.std:
                band(row.mean - row.std, row.mean + row.std, color=GREY, alpha=0.12, lw=0)


def _heights(arms: set[str]) -> dict[str, float]:
    """The height of each arm's line, from the top, with space between the groups."""
    heights: dict[str, float] = {}
    for members in ARM_GROUPS.values():
        top = max(heights.values()) + 1.6 if heights else 0.0
        present = [arm for arm in members if arm in arms]
        heights |= {arm: top + i for i, arm in enumerate(present)}
    return heights


# What the figures share.


def panels(
    count: int, columns: int, width: float, height: float, names: float = 0.0
) -> tuple[Any, list[Any]]:
    """A figure of `count` panels in lines of up to `columns`, each `width` x `height` inches.

    `names` is the width in inches of long names left of the first column.
    """
    from matplotlib.figure import Figure

    columns = min(count, columns)
    lines = -(-count // columns)
    figure = Figure(figsize=(names + width * columns, height * lines + 0.8), layout="constrained")
    axes: list[Any] = list(figure.subplots(lines, columns, squeeze=False).flat)
    for unused in axes[count:]:
        unused.remove()
    for panel in axes[:count]:
        panel.grid(alpha=0.25, lw=0.6)
    return figure, axes[:count]


def task_title(table: pd.DataFrame, task: str) -> str:
    """A task's name, or how many tasks the mean is of."""
    return f"mean of {table['task'].nunique() - 1} tasks" if task == MEAN else task


def ratio_axis(axes: Any, ratios: Sequence[int]) -> None:
    """A log2 axis with a tick at each ratio."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(ratios, [str(ratio) for ratio in ratios])
    axes.minorticks_off()
    axes.set_xlim(min(ratios) / 1.25, max(ratios) * 1.25)
    axes.set_xlabel("compression ratio k")


def finish(figure: Any, table: pd.DataFrame, heading: str) -> None:
    """A heading above all panels, and below them one legend with each entry once."""
    width, seeds = figure.get_figwidth(), table["seeds"].max()
    bars = f"error bars: standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    figure.suptitle(textwrap.fill(f"{heading}; {bars}", int(12 * width)), fontsize=9)
    entries: dict[str, Any] = {}
    for panel in figure.axes:
        handles, labels = panel.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    place = dict(loc="outside lower center", ncols=max(1, int(width / 2.4)))
    figure.legend([*entries.values()], [*entries], **place, frameon=False, fontsize=8)
