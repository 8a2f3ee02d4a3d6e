"""The figures of an experiment: quality against ratio, every arm, backbone sizes, neurons.

matplotlib is imported only while something is drawn.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from variator_jax.evaluation.plots import COLOURS, GREY, STYLE
from variator_jax.experiment.grid import ARMS, METHOD, TEACHER
from variator_jax.experiment.results import MEAN

_DOTS = dict(marker="o", ms=5, capsize=2.5, elinewidth=0.9)
_HOLLOW = dict(marker="o", ms=4, ls="--", lw=0.9, mfc="white")
_ARMS = list(ARMS)  # in the order of legends and lines
ARM_GROUPS = {
    "ours": _ARMS[1:2],
    "ablations": _ARMS[2:10],
    "baselines and controls": _ARMS[10:],
}


def save(draw: Callable[[], Any], path: Path) -> None:
    """Draws a figure, and writes a PNG of 200 dots an inch at `path` and an SVG next to it."""
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
            line = rows[rows["arm"] == arm].sort_values("ratio")
            # Each arm a little aside, so that error bars of equal scores stay visible.
            x = line["ratio"] * 2 ** (0.07 * (i - (len(arms) - 1) / 2))
            look = dict(color=COLOURS[i % len(COLOURS)], lw=2.2 if arm == METHOD else 1.1, **_DOTS)
            panel.errorbar(x, line["mean"], line["std"], label=ARMS[arm].meaning, **look)
        _references(panel, rows)
        panel.margins(y=0.1)
        _ratio_axis(panel, sorted(rows[rows["arm"].isin(arms)]["ratio"].unique()))
    axes[0][0].set_ylabel(f"{metric} (%)")
    _finish(figure, table, table["backbone"].iloc[0])
    return figure


def arms_figure(table: pd.DataFrame, ratio: int, metric: str) -> Any:
    """Every arm at one ratio: a panel a task, a line per arm, and the gap.

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
            group_rows = rows[rows["arm"].isin(members)]
            look = dict(color=colour, ls="", label=group, **_DOTS)
            panel.errorbar(
                group_rows["mean"], group_rows["arm"].map(heights), xerr=group_rows["std"], **look
            )
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
    _finish(figure, table, f"k = {ratio}; {backbone}; gap: points below the uncompressed")
    return figure


def size_figure(table: pd.DataFrame) -> Any:
    """The method against backbone size (the paper's Figure 4), a line per ratio.

    Panels: quality gap, encoder FLOPs saved, extra parameters and the speed-up, empty if it was not
    measured (hollow and dashed: allowed by the saved FLOPs).

    Args:
      table: see `results.rows`; drawn is the mean of the tasks, or the only task.
    """
    task = MEAN if MEAN in set(table["task"]) else table["task"].iloc[0]
    rows = table[(table["arm"] == METHOD) & (table["task"] == task)].sort_values("parameters")
    # The spread of the time, carried over to the speed-up to first order.
    spread = rows["speedup"] * rows["spread"] / (2 * rows["milliseconds"])
    rows = rows.assign(speedup_error=spread, exact=0.0)
    curves = {  # of a panel: column, factor, column of the error bars
        "quality gap (points)": ("gap", 1, "gap_std"),
        "encoder FLOPs saved (%)": ("flops_saved", 100, "exact"),
        "extra parameters (% of backbone)": ("extra_parameters_share", 100, "exact"),
        "encoder speed-up (times)": ("speedup", 1, "speedup_error"),
    }
    figure, axes = _panels(4, 2, 4.3, 3.0)
    for panel, (label, (column, factor, error)) in zip(axes, curves.items(), strict=True):
        for i, (ratio, line) in enumerate(rows.groupby("ratio")):
            # Points of several ratios a little aside from one another.
            x, look = line["parameters"] * 1.03**i, dict(color=COLOURS[i % len(COLOURS)])
            y = factor * line[column]
            panel.errorbar(x, y, line[error], label=f"k = {ratio}", **look, **_DOTS)
            if column == "speedup":
                panel.plot(x, line["allowed"], **look, **_HOLLOW)
        panel.set_ylabel(label)
        _size_axis(panel, rows)
    axes[0].axhline(0.0, color=GREY, ls="--", lw=1.1, label="uncompressed")
    axes[3].axhline(1.0, color=GREY, ls="--", lw=1.1)
    _explain_hollow(axes[3], "measured (half quartile distance)", "allowed by the saved FLOPs")
    _finish(figure, rows, _task_title(table, task))
    return figure


def neuron_figure(neurons: pd.DataFrame) -> Any:
    """Shares of firing FFN neurons (Figure 5): the mean against k, and per layer of each backbone.

    Filled and solid is one FFN input, hollow and dashed all tokens of its group together.

    Args:
      neurons: rows of `measure.neurons`.
    """
    neurons, backbones = neurons.sort_values("ratio"), neurons["backbone"].unique()
    figure, (first, *others) = _panels(1 + len(backbones), 3, 4.2, 3.2)
    means = neurons[neurons["layer"] == MEAN]
    for i, backbone in enumerate(backbones):
        rows = means[means["backbone"] == backbone]
        # At ratio 1 an FFN input is one token.
        one = rows.iloc[[0]].assign(ratio=1, share=rows["token"], union=rows["token"])
        # From the palette's other end: here a colour is a backbone, in the other panels a ratio.
        colour = COLOURS[-1 - i % len(COLOURS)]
        _draw_shares(first, pd.concat([one, rows]), "ratio", backbone, colour)
    _ratio_axis(first, [1, *sorted(means["ratio"].unique())])
    first.set_title("mean over layers", fontsize=9)
    for panel, backbone in zip(others, backbones, strict=True):
        layers = neurons[(neurons["backbone"] == backbone) & (neurons["layer"] != MEAN)]
        token = layers.drop_duplicates("layer")
        panel.plot(token["layer"], 100 * token["token"], "s-", ms=4, color=GREY, label="one token")
        for i, (ratio, rows) in enumerate(layers.groupby("ratio")):
            _draw_shares(panel, rows, "layer", f"k = {ratio}", COLOURS[i % len(COLOURS)])
        panel.set_title(f"{backbone}, layer by layer", fontsize=9)
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.set_xlabel("encoder layer")
    for panel in (first, *others):
        panel.set_ylabel("FFN neurons that fire (%)")
        panel.set_ylim(bottom=0.0)
        _explain_hollow(panel, "merged input", "all tokens of its group")
        box = dict(loc="upper center", bbox_to_anchor=(0.5, -0.2))
        panel.legend(**box, ncols=3, frameon=False, fontsize=8)
    return figure


# What the figures share.


def _task_panels(
    table: pd.DataFrame, width: float, height: float, names: float = 0.0
) -> tuple[Any, list[tuple[Any, pd.DataFrame]]]:
    """A figure with a panel for each task, the mean of several last, and the rows of each."""
    tasks = sorted(table["task"].unique(), key=lambda task: task == MEAN)
    figure, axes = _panels(len(tasks), 4, width, height, names)
    for panel, task in zip(axes, tasks, strict=True):
        panel.set_title(_task_title(table, task), fontsize=9)
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


def _panels(
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


def _task_title(table: pd.DataFrame, task: str) -> str:
    """A task's name, or how many tasks the mean is of."""
    return f"mean of {table['task'].nunique() - 1} tasks" if task == MEAN else task


def _ratio_axis(axes: Any, ratios: Sequence[int]) -> None:
    """A log2 axis with a tick at each ratio."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(ratios, [str(ratio) for ratio in ratios])
    axes.minorticks_off()
    axes.set_xlim(min(ratios) / 1.25, max(ratios) * 1.25)
    axes.set_xlabel("compression ratio k")


def _finish(figure: Any, table: pd.DataFrame, heading: str) -> None:
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


def _draw_shares(axes: Any, rows: pd.DataFrame, x: str, label: str, colour: str) -> None:
    """A line of merged inputs, and a thin one of their groups' tokens together."""
    axes.plot(rows[x], 100 * rows["share"], "o-", lw=1.6, ms=4, color=colour, label=label)
    axes.plot(rows[x], 100 * rows["union"], color=colour, **_HOLLOW)


def _explain_hollow(axes: Any, solid: str, dashed: str) -> None:
    """Legend entries for the two kinds of curve that each colour has in a panel."""
    axes.plot([], [], "o-", color=GREY, ms=4, lw=1.6, label=solid)
    axes.plot([], [], color=GREY, label=dashed, **_HOLLOW)


def _size_axis(axes: Any, rows: pd.DataFrame) -> None:
    """A log axis of parameters with a tick at each backbone."""
    sizes = rows.groupby("backbone", sort=False)["parameters"].first()
    axes.set_xscale("log")
    axes.set_xlim(sizes.min() / 1.5, sizes.max() * 1.5)
    axes.set_xticks(sizes, [f"{name}\n{size / 1e6:,.3g} M" for name, size in sizes.items()])
    axes.minorticks_off()
    axes.set_xlabel("backbone (parameters)")
