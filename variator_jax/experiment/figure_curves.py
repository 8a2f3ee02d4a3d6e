"""Figures of what is measured beside quality: over backbone sizes, and activated neurons."""

from __future__ import annotations

from typing import Any

import pandas as pd

from variator_jax.evaluation.plots import COLOURS, GREY
from variator_jax.experiment.arms import METHOD
from variator_jax.experiment.figures import DOTS, finish, panels, ratio_axis, task_title
from variator_jax.experiment.results import MEAN

_HOLLOW = dict(marker="o", ms=4, ls="--", lw=0.9, mfc="white")


def size_figure(table: pd.DataFrame) -> Any:
    """The method against backbone size (the paper's Figure 4), a line per ratio.

    Panels: quality gap, encoder FLOPs saved, extra parameters and, if it was measured, the speed-up
    (hollow and dashed: allowed by the saved FLOPs).

    Args:
      table: see `results.rows`; drawn is the mean of the tasks, or the only task.
    """
    task = MEAN if MEAN in set(table["task"]) else table["task"].iloc[0]
    rows = table[(table["arm"] == METHOD) & (table["task"] == task)].sort_values("parameters")
    curves = [
        ("quality gap (points)", rows["gap"], rows["gap_std"]),
        ("encoder FLOPs saved (%)", 100 * rows["flops_saved"], None),
        ("extra parameters (% of backbone)", 100 * rows["extra_parameters_share"], None),
    ]
    timed = rows["speedup"].notna().any()
    if timed:
        # The spread of the time, carried over to the speed-up to first order.
        spread = rows["speedup"] * rows["spread"] / (2 * rows["milliseconds"])
        curves.append(("encoder speed-up (times)", rows["speedup"], spread))
    figure, axes = panels(len(curves), 2, 4.3, 3.0)
    for panel, (label, values, errors) in zip(axes, curves, strict=True):
        for i, (ratio, own) in enumerate(rows.groupby("ratio")):
            # Points of several ratios a little aside from one another.
            x, line = own["parameters"] * 1.03**i, own.index
            colour, bars = COLOURS[i % len(COLOURS)], None if errors is None else errors[line]
            panel.errorbar(x, values[line], bars, color=colour, label=f"k = {ratio}", **DOTS)
            if timed and panel is axes[-1]:
                panel.plot(x, own["allowed"], color=colour, **_HOLLOW)
        panel.set_ylabel(label)
        _size_axis(panel, rows)
    axes[0].axhline(0.0, color=GREY, ls="--", lw=1.1, label="uncompressed")
    if timed:
        axes[3].axhline(1.0, color=GREY, ls="--", lw=1.1)
        _explain_hollow(axes[3], "measured (half quartile distance)", "allowed by the saved FLOPs")
    finish(figure, rows, task_title(table, task))
    return figure


def neuron_figure(neurons: pd.DataFrame) -> Any:
    """Shares of firing FFN neurons (Figure 5): the mean against k, and per layer of each backbone.

    Filled and solid is one FFN input, hollow and dashed all tokens of its group together.

    Args:
      neurons: rows of `measure.neurons`.
    """
    backbones = neurons["backbone"].unique()
    figure, (first, *others) = panels(1 + len(backbones), 3, 4.2, 3.2)
    means = neurons[neurons["layer"] == MEAN]
    for i, backbone in enumerate(backbones):
        rows = means[means["backbone"] == backbone]
        # At ratio 1 an FFN input is one token.
        one = rows.iloc[[0]].assign(ratio=1, share=rows["token"], union=rows["token"])
        # From the palette's other end: here a colour is a backbone, in the other panels a ratio.
        colour = COLOURS[-1 - i % len(COLOURS)]
        _draw_shares(first, pd.concat([one, rows]), "ratio", backbone, colour)
    ratio_axis(first, [1, *sorted(means["ratio"].unique())])
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
