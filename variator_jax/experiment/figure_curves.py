"""Figures of what is measured beside quality: over backbone sizes, and activated neurons."""

from __future__ import annotations

import itertools
from typing import Any

import pandas as pd

from variator_jax.evaluation.plots import COLOURS, GREY
from variator_jax.experiment.arms import METHOD
from variator_jax.experiment.figures import (
    error_bars,
    errorbar,
    heading,
    legend_below,
    panels,
    ratio_axis,
    task_title,
)
from variator_jax.experiment.results import MEAN

_HOLLOW = dict(marker="o", ls="--", lw=0.9, mfc="white")


def size_figure(table: pd.DataFrame) -> Any:
    """The method against backbone size (the paper's Figure 4), a line per ratio.

    Panels: quality gap, encoder FLOPs saved, extra parameters and, if it was measured, the speed-up
    (hollow and dashed: allowed by the saved FLOPs).

    Args:
      table: see `results.rows`; drawn is the mean of the tasks, or the only task.
    """
    task = MEAN if MEAN in set(table["task"]) else table["task"].iloc[0]
    rows = table[(table["arm"] == METHOD) & (table["task"] == task)].sort_values("parameters")
    timed = rows["speedup"].notna().any()
    figure, axes = panels(3 + timed, 2, 4.3, 3.0)
    none = pd.Series(0.0, rows.index)
    # Column, unit of the axis, factor, error bars.
    curves = [
        ("gap", "quality gap (points)", 1, rows["gap_std"]),
        ("flops_saved", "encoder FLOPs saved (%)", 100, none),
        ("extra_parameters_share", "extra parameters (% of backbone)", 100, none),
        # The spread of the time, carried over to the speed-up to first order.
        (
            "speedup",
            "encoder speed-up (times)",
            1,
            rows["speedup"] * rows["spread"] / (2 * rows["milliseconds"]),
        ),
    ]
    ratios = sorted(rows["ratio"].unique())
    # Points of several ratios lie a little aside from one another.
    step = max(rows["parameters"].max() / rows["parameters"].min(), 2.0) ** 0.02
    for panel, (column, label, factor, errors) in zip(axes, curves, strict=False):
        for i, (ratio, own) in enumerate(rows.groupby("ratio")):
            x = own["parameters"] * step ** (i - (len(ratios) - 1) / 2)
            look = dict(color=COLOURS[i % len(COLOURS)], lw=1.6)
            errorbar(panel, x, factor * own[column], errors[own.index], f"k = {ratio}", look)
            if column == "speedup":
                panel.plot(x, own["allowed"], color=look["color"], ms=5, **_HOLLOW)
        panel.set_ylabel(label)
        _size_axis(panel, rows)
        if factor == 100 and (rows[column] > 0).all():
            panel.set_ylim(0.0, 108 * rows[column].max())
    axes[0].axhline(0.0, color=GREY, ls="--", lw=1.1, label="uncompressed")
    if timed:
        axes[3].axhline(1.0, color=GREY, ls="--", lw=1.1)
        _explain_hollow(axes[3], "measured (half quartile distance)", "allowed by the saved FLOPs")
    heading(figure, f"{task_title(table, task)}; {error_bars(rows)}")
    legend_below(figure, axes)
    return figure


def neuron_figure(neurons: pd.DataFrame) -> Any:
    """Shares of firing FFN neurons (Figure 5): the mean against k, and per layer of each backbone.

    Filled and solid is one FFN input, hollow and dashed all tokens of its group together.

    Args:
      neurons: rows of `measure.neurons`.
    """
    backbones = neurons["backbone"].unique()
    figure, axes = panels(1 + len(backbones), 2 if len(backbones) == 3 else 3, 4.2, 3.2)
    means = neurons[neurons["layer"] == MEAN]
    axes[0].set_title("mean over layers", fontsize=9)
    # From the palette's other end: here a colour is a backbone, in the other panels a ratio.
    for colour, (backbone, rows) in zip(
        itertools.cycle(COLOURS[::-1]), means.groupby("backbone", sort=False), strict=False
    ):
        # At ratio 1 an FFN input is one token.
        one = rows.iloc[[0]].assign(ratio=1, share=rows["token"], union=rows["token"])
        _draw_shares(axes[0], pd.concat([one, rows]), "ratio", backbone, colour)
    ratio_axis(axes[0], [1, *sorted(means["ratio"].unique())])
    for panel, backbone in zip(axes[1:], backbones, strict=True):
        layers = neurons[(neurons["backbone"] == backbone) & (neurons["layer"] != MEAN)]
        for i, (ratio, rows) in enumerate(layers.groupby("ratio")):
            if i == 0:
                shares = 100 * rows["token"]
                panel.plot(rows["layer"], shares, "s-", ms=4, color=GREY, label="one token")
            _draw_shares(panel, rows, "layer", f"k = {ratio}", COLOURS[i % len(COLOURS)])
        panel.set_title(f"{backbone}, layer by layer", fontsize=9)
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.set_xlabel("encoder layer")
    for panel in axes:
        panel.set_ylabel("FFN neurons that fire (%)")
        panel.set_ylim(bottom=0.0)
        _explain_hollow(panel, "merged input", "all tokens of its group")
        box = dict(loc="upper center", bbox_to_anchor=(0.5, -0.2))
        panel.legend(**box, ncols=3, frameon=False, fontsize=8)
    return figure


def _draw_shares(axes: Any, rows: pd.DataFrame, x: str, label: str, colour: str) -> None:
    """A line of merged inputs, and a thin one of their groups' tokens together."""
    rows = rows.sort_values(x)
    axes.plot(rows[x], 100 * rows["share"], "o-", lw=1.6, ms=4, color=colour, label=label)
    axes.plot(rows[x], 100 * rows["union"], color=colour, ms=4, **_HOLLOW)


def _explain_hollow(axes: Any, solid: str, dashed: str) -> None:
    """Legend entries for the two kinds of curve that each colour has in a panel."""
    axes.plot([], [], "o-", color=GREY, ms=5, lw=1.6, label=solid)
    axes.plot([], [], color=GREY, ms=5, label=dashed, **_HOLLOW)


def _size_axis(axes: Any, rows: pd.DataFrame) -> None:
    """A log axis of parameters with a tick at each backbone."""
    sizes = rows.groupby("backbone", sort=False)["parameters"].first()
    margin = max((sizes.max() / sizes.min()) ** 0.12, 1.5)
    axes.set_xscale("log")
    axes.set_xlim(sizes.min() / margin, sizes.max() * margin)
    axes.set_xticks(sizes, [f"{name}\n{_million(size)}" for name, size in sizes.items()])
    axes.minorticks_off()
    axes.set_xlabel("backbone (parameters)")


def _million(count: float) -> str:
    return f"{count / 1e9:.3g} B" if count >= 1e9 else f"{count / 1e6:.3g} M"
