"""Curves over what is measured beside quality: backbone sizes and activated neurons.

What rows are is in `results.py` and `evaluation.neurons`; saving is `figures.py`'s business.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from variator_jax.evaluation.plots import COLOURS, GREY
from variator_jax.experiment import figure_parts as parts
from variator_jax.experiment.figure_parts import MEAN, Rows, styled


@styled
def size_figure(rows: Rows) -> Any:
    """The method against backbone size, a line per ratio: gap, FLOPs, parameters, speed-up.

    Args:
      rows: as for `ratio_figure`; drawn is the mean of the tasks, or else the first task.

    Raises:
      DataError: for an unknown arm.
    """
    parts.check_rows(rows)
    own = [row for row in rows if row["arm"] == parts.METHOD]
    tasks = parts.distinct(own, "task")
    task = MEAN if MEAN in tasks else next(iter(tasks), "")
    own = sorted((row for row in own if row["task"] == task), key=lambda row: row["parameters"])
    figure, axes = parts.panels(4 if own else 0, 2, 4.3, 3.0)
    if not own:
        return figure
    gap, flops, weights, speed = axes
    for colour, (shift, line) in zip(_cycle(), _by_ratio(own), strict=False):
        look = dict(color=colour, marker="o", ms=5, lw=1.6, capsize=2.5, elinewidth=0.9)
        look["label"] = f"k = {line[0]['ratio']}"
        sizes = [row["parameters"] * shift for row in line]
        gap.errorbar(
            sizes, [row["gap"] for row in line], yerr=parts.errors(line, "gap_std"), **look
        )
        flops.errorbar(sizes, [100 * row["flops_saved"] for row in line], **look)
        weights.errorbar(sizes, [100 * row["extra_parameters_share"] for row in line], **look)
        _draw_speed(speed, line, shift, look)
    gap.axhline(0.0, color=GREY, ls="--", lw=1.1, label="uncompressed")
    gap.set_ylabel("quality gap (points)")
    flops.set_ylabel("encoder FLOPs saved (%)")
    weights.set_ylabel("extra parameters (% of backbone)")
    speed.set_ylabel("encoder speed-up (times)")
    for panel in axes:
        _size_axis(panel, own)
    for panel, key in ((flops, "flops_saved"), (weights, "extra_parameters_share")):
        if all(row[key] > 0 for row in own):
            panel.set_ylim(0.0, 108 * max(row[key] for row in own))
    if speed.lines:
        speed.axhline(1.0, color=GREY, ls="--", lw=1.1)
        parts.solid_and_dashed(
            speed, "measured (half quartile distance)", "allowed by the saved FLOPs"
        )
    else:
        parts.say_in(speed, "no latency was measured")
    parts.say_above(figure, f"{parts.task_title(rows, task)}; {parts.bars(own)}")
    parts.one_legend(figure, axes)
    return figure


def _draw_speed(axes: Any, line: Rows, shift: float, look: Mapping[str, Any]) -> None:
    """Filled and solid what was measured, hollow and dashed what the saved FLOPs allow."""
    timed = [row for row in line if row["milliseconds"] and row["speedup"]]
    if timed:
        axes.errorbar(
            [row["parameters"] * shift for row in timed],
            [row["speedup"] for row in timed],
            # The spread of the time, carried over to the speed-up to first order.
            yerr=[
                row["speedup"] * (row["spread"] or 0.0) / (2 * row["milliseconds"]) for row in timed
            ],
            **look,
        )
    allowed = [row for row in timed if row["allowed"]]
    if allowed:
        axes.plot(
            [row["parameters"] * shift for row in allowed],
            [row["allowed"] for row in allowed],
            "o--",
            color=look["color"],
            mfc="white",
            ms=5,
            lw=0.9,
        )


def _size_axis(axes: Any, rows: Rows) -> None:
    """A log axis of parameters with a tick at each backbone."""
    sizes = {row["backbone"]: row["parameters"] for row in rows}
    low, high = min(sizes.values()), max(sizes.values())
    axes.set_xscale("log")
    room = max((high / low) ** 0.12, 1.5)
    axes.set_xlim(low / room, high * room)
    axes.set_xticks(
        list(sizes.values()), [f"{name}\n{_million(size)}" for name, size in sizes.items()]
    )
    axes.minorticks_off()
    axes.set_xlabel("backbone (parameters)")
    axes.grid(alpha=0.25, lw=0.6)


def _million(count: float) -> str:
    return f"{count / 1e9:.3g} B" if count >= 1e9 else f"{count / 1e6:.3g} M"


def _by_ratio(rows: Rows) -> list[tuple[float, Rows]]:
    """The rows of each ratio, and the factor that sets its points a little aside."""
    ratios = sorted(parts.distinct(rows, "ratio"))
    sizes = parts.distinct(rows, "parameters")
    step = max(max(sizes) / min(sizes), 2.0) ** 0.02
    return [
        (step ** (i - (len(ratios) - 1) / 2), [row for row in rows if row["ratio"] == ratio])
        for i, ratio in enumerate(ratios)
    ]


def _cycle() -> Iterator[str]:
    return itertools.cycle(COLOURS)


@styled
def neuron_figure(neurons: Rows) -> Any:
    """Shares of firing FFN neurons: the mean against k, and per layer a panel a backbone.

    Filled and solid is one FFN input, hollow and dashed all tokens of its group together.

    Args:
      neurons: rows with backbone, ratio, layer (a number or 'mean'), share and union in [0, 1],
        and perhaps token: the share of one uncompressed token (`evaluation.neurons`).
    """
    backbones = parts.distinct(neurons, "backbone")
    count = 1 + len(backbones) if backbones else 0
    figure, axes = parts.panels(count, 2 if count == 4 else 3, 4.2, 3.2)
    if not backbones:
        return figure
    rows = _with_tokens(neurons)
    _draw_means(axes[0], [row for row in rows if row["layer"] == MEAN])
    for panel, backbone in zip(axes[1:], backbones, strict=True):
        own = [row for row in rows if row["backbone"] == backbone and row["layer"] != MEAN]
        _draw_layers(panel, own)
        panel.set_title(f"{backbone}, layer by layer", fontsize=9)
    for panel in axes:
        panel.grid(alpha=0.25, lw=0.6)
        if panel.has_data():
            panel.set_ylabel("FFN neurons that fire (%)")
            panel.set_ylim(bottom=0.0)
            parts.solid_and_dashed(panel, "merged input", "all tokens of its group")
            panel.legend(
                loc="upper center",
                bbox_to_anchor=(0.5, -0.2),
                ncols=3,
                frameon=False,
                fontsize=8,
            )
    return figure


def _with_tokens(neurons: Rows) -> list[Mapping[str, Any]]:
    """The rows, and at ratio 1, where it has none, what one uncompressed token makes fire."""
    present = {(row["backbone"], row["layer"]) for row in neurons if row["ratio"] == 1}
    found = list(neurons)
    for row in neurons:
        key = (row["backbone"], row["layer"])
        if "token" in row and key not in present:
            present.add(key)
            found.append({**row, "ratio": 1, "share": row["token"], "union": row["token"]})
    return sorted(found, key=lambda row: row["ratio"])


def _draw_means(axes: Any, rows: Rows) -> None:
    axes.set_title("mean over layers", fontsize=9)
    if not rows:
        parts.say_in(axes, "no means over layers")
        return
    # From the palette's other end: here a colour is a backbone, in the other panels a ratio.
    colours = itertools.cycle(COLOURS[::-1])
    for colour, backbone in zip(colours, parts.distinct(rows, "backbone"), strict=False):
        own = [row for row in rows if row["backbone"] == backbone]
        ratios = [row["ratio"] for row in own]
        _draw_shares(axes, ratios, own, backbone, color=colour, marker="o", ms=5)
    parts.ratio_axis(axes, sorted(parts.distinct(rows, "ratio")))


def _draw_layers(axes: Any, rows: Rows) -> None:
    if not rows:
        parts.say_in(axes, "no single layers")
        return
    colours = itertools.cycle(COLOURS)
    for ratio in parts.distinct(rows, "ratio"):
        own = sorted((row for row in rows if row["ratio"] == ratio), key=lambda row: row["layer"])
        layers = [row["layer"] for row in own]
        if ratio == 1:
            axes.plot(layers, _percent(own, "share"), "s-", ms=4, color=GREY, label="one token")
            continue
        _draw_shares(axes, layers, own, f"k = {ratio}", color=next(colours), marker="o", ms=4)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("encoder layer")


def _draw_shares(axes: Any, x: Sequence[Any], rows: Rows, label: str, **look: Any) -> None:
    """A line of merged inputs, and a thin one of their groups' tokens together."""
    axes.plot(x, _percent(rows, "share"), lw=1.6, label=label, **look)
    axes.plot(x, _percent(rows, "union"), ls="--", lw=0.9, mfc="white", **look)


def _percent(rows: Rows, key: str) -> list[float]:
    return [100 * row[key] for row in rows]
