"""The figures of an experiment: quality against ratio, every arm, backbone sizes, neurons.

matplotlib is imported only while something is drawn.
"""

import itertools
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from variator_jax.bench.output import COLOURS, GREY, STYLE, doubling_axis
from variator_jax.experiment.grid import ARMS, MEAN, METHOD, TEACHER

_HOLLOW = dict(marker="o", ms=4, ls="--", lw=0.9, mfc="white")
_ARMS = list(ARMS)  # in the order of legends and lines
_PARTS = {"ours": _ARMS[1:2], "ablations": _ARMS[2:10], "baselines and controls": _ARMS[10:]}


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
      table: the rows of one backbone, see `report.rows`.
      metric: what the scores are, for the axis.
    """
    counts = table.groupby("arm")["ratio"].nunique()
    arms = [arm for arm in _ARMS if arm == METHOD or counts.get(arm, 0) > 1]
    figure, panels = _panels(_task_titles(table), 4, (3.5, 2.8))
    for panel, (_, rows) in zip(panels, table.groupby("task", sort=False), strict=True):
        for i, arm in enumerate(arms):
            line = rows[rows["arm"] == arm].sort_values("ratio")
            # Each arm a little aside, so that error bars of equal scores stay visible.
            x = line["ratio"] * 2 ** (0.07 * (i - (len(arms) - 1) / 2))
            width = 2.2 if arm == METHOD else 1.1
            _points(panel, i, x, line["mean"], line["std"], label=ARMS[arm].meaning, lw=width)
        _references(panel, rows)
        panel.margins(y=0.1)
        ratios = sorted(rows[rows["arm"].isin(arms)]["ratio"].unique())
        _log_axis(panel, "compression ratio k", {ratio: str(ratio) for ratio in ratios})
    figure.axes[0].set_ylabel(f"{metric} (%)")
    _finish(figure, table, table["backbone"].iloc[0])
    return figure


def arms_figure(table: pd.DataFrame, ratio: int, metric: str) -> Any:
    """Every arm at one ratio: a panel a task, a line per arm, the gap next to it.

    Args:
      table: the rows of one backbone, see `report.rows`.
      ratio: the compression ratio.
      metric: what the scores are, for the axis.
    """
    table = table[table["ratio"].isin((ratio, 1))]
    arms = [arm for arm in _ARMS[1:] if arm in set(table["arm"])]
    figure, panels = _panels(_task_titles(table), 4, (2.7, 1.1 + 0.22 * len(arms)), left=2.1)
    for number, (_, rows) in enumerate(table.groupby("task", sort=False)):
        panel = panels[number]
        _references(panel, rows[rows["arm"] == TEACHER], upright=True)
        for i, (group, members) in enumerate(_PARTS.items()):
            part = rows[rows["arm"].isin(members)]
            y = part["arm"].map(arms.index)
            _points(panel, i, part["mean"], y, xerr=part["std"], label=group, ls="")
        gaps = rows.set_index("arm")["gap"][arms].map("{:+.1f}".format)
        for height, text in enumerate(["gap", *gaps], start=-1):
            # To the right of the panel.
            place = dict(transform=panel.get_yaxis_transform(), va="center")
            panel.text(1.02, height, text, size=7.5, color=GREY, **place)
        names = [ARMS[arm].meaning for arm in arms]
        panel.set_yticks(range(len(arms)), names if number % 4 == 0 else [])
        panel.set_ylim(len(arms) - 0.3, -0.7)
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
      table: see `report.rows`; drawn is the mean of the tasks, or the only task.
    """
    rows = overall_rows(table).sort_values("parameters")
    # The spread of the time, carried over to the speed-up to first order.
    spread = rows["speedup"] * rows["spread"] / (2 * rows["milliseconds"])
    rows = rows.assign(speedup_error=spread, exact=0.0)
    curves = {  # of a panel: column, factor, column of the error bars
        "quality gap (points)": ("gap", 1, "gap_std"),
        "encoder FLOPs saved (%)": ("flops_saved", 100, "exact"),
        "extra parameters (% of backbone)": ("extra_parameters_share", 100, "exact"),
        "encoder speed-up (times)": ("speedup", 1, "speedup_error"),
    }
    sizes = rows.groupby("backbone", sort=False)["parameters"].first()
    ticks = {size: f"{name}\n{size / 1e6:,.3g} M" for name, size in sizes.items()}
    figure, axes = _panels([""] * len(curves), 2, (4.3, 3.0))
    for panel, (label, (column, factor, error)) in zip(axes, curves.items(), strict=True):
        for i, (ratio, line) in enumerate(rows.groupby("ratio")):
            # Points of several ratios a little aside from one another.
            x = line["parameters"] * 1.03**i
            _points(panel, i, x, factor * line[column], line[error], label=f"k = {ratio}")
            if column == "speedup":
                panel.plot(x, line["allowed"], color=_colour(i), **_HOLLOW)
        panel.set_ylabel(label)
        _log_axis(panel, "backbone (parameters)", ticks)
    axes[0].axhline(0.0, color=GREY, ls="--", lw=1.1, label="uncompressed")
    axes[3].axhline(1.0, color=GREY, ls="--", lw=1.1)
    _explain_hollow(axes[3], "measured (half quartile distance)", "allowed by the saved FLOPs")
    _finish(figure, rows, _task_titles(table)[-1])
    return figure


def neuron_figure(neurons: pd.DataFrame) -> Any:
    """Shares of firing FFN neurons (Figure 5): the mean against k, and per layer of each backbone.

    Filled and solid is one FFN input, hollow and dashed all tokens of its group together.

    Args:
      neurons: rows of `score.neurons`.
    """
    neurons, backbones = neurons.sort_values("ratio"), neurons["backbone"].unique()
    titles = ["mean over layers", *(f"{backbone}, layer by layer" for backbone in backbones)]
    figure, panels = _panels(titles, 3, (4.2, 3.2))
    means = neurons[neurons["layer"] == "mean"]
    for i, backbone in enumerate(backbones):
        rows = means[means["backbone"] == backbone]
        # At ratio 1 an FFN input is one token.
        one = rows.iloc[[0]].assign(ratio=1, share=rows["token"], union=rows["token"])
        # From the palette's other end: here a colour is a backbone, in the other panels a ratio.
        _draw_shares(panels[0], pd.concat([one, rows]), "ratio", backbone, _colour(-1 - i))
    ratios = [1, *sorted(means["ratio"].unique())]
    _log_axis(panels[0], "compression ratio k", {ratio: str(ratio) for ratio in ratios})
    for panel, backbone in zip(panels[1:], backbones, strict=True):
        layers = neurons[(neurons["backbone"] == backbone) & (neurons["layer"] != "mean")]
        token = layers.drop_duplicates("layer")
        panel.plot(token["layer"], 100 * token["token"], "s-", ms=4, color=GREY, label="one token")
        for i, (ratio, rows) in enumerate(layers.groupby("ratio")):
            _draw_shares(panel, rows, "layer", f"k = {ratio}", _colour(i))
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.set_xlabel("encoder layer")
    for panel in panels:
        panel.set_ylabel("FFN neurons that fire (%)")
        panel.set_ylim(bottom=0.0)
        _explain_hollow(panel, "merged input", "all tokens of its group")
        box = dict(loc="upper center", bbox_to_anchor=(0.5, -0.2))
        panel.legend(**box, ncols=3, frameon=False, fontsize=8)
    return figure


# What the figures share.


def overall_rows(table: pd.DataFrame) -> pd.DataFrame:
    """The method's rows of the mean over tasks, or of the only task."""
    return table[(table["arm"] == METHOD) & (table["task"] == table["task"].iloc[-1])]


def _panels(
    titles: Sequence[str], columns: int, size: tuple[float, float], left: float = 0.0
) -> tuple[Any, list[Any]]:
    """A figure with a panel of `size` inches for each title, and `left` inches for long names."""
    from matplotlib.figure import Figure

    (width, height), columns = size, min(len(titles), columns)
    lines = -(-len(titles) // columns)
    figure = Figure(figsize=(left + width * columns, height * lines + 0.8), layout="constrained")
    axes: list[Any] = list(figure.subplots(lines, columns, squeeze=False).flat)
    for panel, title in itertools.zip_longest(axes, titles):
        if title is None:
            panel.remove()
        else:
            panel.set_title(title, fontsize=9)
            panel.grid(alpha=0.25, lw=0.6)
    return figure, axes[: len(titles)]


def _task_titles(table: pd.DataFrame) -> list[str]:
    """The names of the tasks, and last how many tasks the mean is of."""
    tasks = table["task"].unique()
    return [f"mean of {len(tasks) - 1} tasks" if task == MEAN else task for task in tasks]


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _points(axes: Any, number: int, *values: pd.Series, **look: Any) -> None:
    """Filled points with error bars, in colour `number`; arguments as for `Axes.errorbar`."""
    dots = dict(marker="o", ms=5, capsize=2.5, elinewidth=0.9)
    axes.errorbar(*values, color=_colour(number), **dots, **look)


def _references(axes: Any, rows: pd.DataFrame, upright: bool = False) -> None:
    """The uncompressed backbone, with a band of its deviation, and the control without FFNs."""
    line, band = (axes.axvline, axes.axvspan) if upright else (axes.axhline, axes.axhspan)
    for arm, style in {TEACHER: "--", "no_ffn": ":"}.items():
        for row in rows[rows["arm"] == arm].itertuples():
            line(row.mean, color=GREY, ls=style, lw=1.2, label=ARMS[arm].meaning, zorder=1)
            if arm == TEACHER and row.std:
                band(row.mean - row.std, row.mean + row.std, color=GREY, alpha=0.12, lw=0)


def _log_axis(axes: Any, label: str, ticks: dict[Any, str]) -> None:
    doubling_axis(axes, list(ticks), label, list(ticks.values()))
    axes.set_xlim(min(ticks) / 1.3, max(ticks) * 1.3)


def _draw_shares(axes: Any, rows: pd.DataFrame, x: str, label: str, colour: str) -> None:
    """A line of merged inputs, and a thin one of their groups' tokens together."""
    axes.plot(rows[x], 100 * rows["share"], "o-", lw=1.6, ms=4, color=colour, label=label)
    axes.plot(rows[x], 100 * rows["union"], color=colour, **_HOLLOW)


def _explain_hollow(axes: Any, solid: str, dashed: str) -> None:
    """Legend entries for the two kinds of curve that each colour has in a panel."""
    axes.plot([], [], "o-", color=GREY, ms=4, lw=1.6, label=solid)
    axes.plot([], [], color=GREY, label=dashed, **_HOLLOW)


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
