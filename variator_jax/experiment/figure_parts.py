"""What an experiment's figures share: names and looks of the arms, panels, reference lines, saving.

The figures themselves are in `figures.py`. matplotlib is imported only while something is drawn.
"""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from variator_jax.errors import DataError, did_you_mean
from variator_jax.evaluation.plots import COLOURS, GREY, STYLE
from variator_jax.experiment.arms import ARMS

Rows = Sequence[Mapping[str, Any]]

# What a reader calls an arm; the order is that of legends and of the ablations' lines.
ARM_NAMES = {arm.name: arm.meaning for arm in ARMS.values()}
BACKBONE, METHOD, CONTROL = "backbone", "variator", "no_ffn"
_ARMS = list(ARM_NAMES)
ARM_GROUPS = {
    "ours": _ARMS[1:2],
    "ablations": _ARMS[2:10],
    "baselines and controls": _ARMS[10:],
}
GROUP_COLOURS = dict(zip(ARM_GROUPS, COLOURS, strict=False))

MEAN = "mean"  # the task, or the layer, that stands for all
RATIO_LABEL = "compression ratio k"
_MARKERS = "sD^vP"

_Parameters = ParamSpec("_Parameters")
_Drawn = TypeVar("_Drawn")


def styled(draw: Callable[_Parameters, _Drawn]) -> Callable[_Parameters, _Drawn]:
    """Runs a function that draws or saves in the style of all our plots."""

    @functools.wraps(draw)
    def inside(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Drawn:
        import matplotlib

        # The salt makes the ids in an SVG the same in each run.
        with matplotlib.rc_context({**STYLE, "svg.hashsalt": "variator"}):
            return draw(*args, **kwargs)

    return inside


@styled
def save(figure: Any, path: Path) -> None:
    """Writes a PNG of 200 dots an inch at `path`, and an SVG of the same stem beside it."""
    path = Path(path)
    figure.savefig(path.with_suffix(".png"), dpi=200)
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})


def panels(
    count: int, columns: int, width: float, height: float, names: float = 0.0
) -> tuple[Any, list[Any]]:
    """A figure of `count` panels in rows of `columns`, each `width` x `height` inches.

    `names` is the room in inches for long names left of the first column.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = max(1, min(count, columns))
    lines = max(1, -(-count // columns))
    figure = Figure(figsize=(names + width * columns, height * lines + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    cells: list[Any] = list(figure.subplots(lines, columns, squeeze=False).flat)
    for unused in cells[max(count, 1) :]:
        unused.remove()
    if count == 0:
        say_in(cells[0], "no results yet")
    return figure, cells[:count]


def arm_look(arm: str) -> dict[str, Any]:
    """How an arm's curve is drawn: ours strong, ablations thin, baselines dotted and hollow."""
    if arm == METHOD:
        return dict(color=COLOURS[0], marker="o", ls="-", lw=2.2, ms=6, zorder=4)
    index = _ARMS.index(arm) - 2
    look = dict(
        color=COLOURS[1 + index % (len(COLOURS) - 1)],
        marker=_MARKERS[(index + index // 5) % 5],
        lw=1.1,
        ms=4.5,
    )
    if arm in ARM_GROUPS["ablations"]:
        return dict(**look, ls="-", zorder=3)
    return dict(**look, ls=":", mfc="white", zorder=3)


def check_rows(rows: Rows) -> None:
    """Refuses rows of an arm that has no name.

    Raises:
      DataError: with the nearest names.
    """
    for row in rows:
        if row["arm"] not in ARM_NAMES:
            raise DataError(
                f"No arm is named {row['arm']!r}.{did_you_mean(row['arm'], ARM_NAMES)} "
                f"Known: {', '.join(ARM_NAMES)}."
            )


def quality_cells(rows: Rows) -> list[tuple[str, str]]:
    """(backbone, task) of each panel: as in the rows, the mean of several tasks last."""
    found = []
    for backbone in distinct(rows, "backbone"):
        tasks = distinct((row for row in rows if row["backbone"] == backbone), "task")
        found += [(backbone, task) for task in sorted(tasks, key=lambda task: task == MEAN)]
    return found


def cell_title(rows: Rows, backbone: str, task: str) -> str:
    """A panel's title; the backbone is named where there are several."""
    title = task_title([row for row in rows if row["backbone"] == backbone], task)
    return f"{backbone}: {title}" if len(distinct(rows, "backbone")) > 1 else title


def task_title(rows: Rows, task: str) -> str:
    """A task's name, or how many the mean is of."""
    count = len(set(distinct(rows, "task")) - {MEAN})
    return f"mean of {count} tasks" if task == MEAN and count else task


def headline(rows: Rows) -> str:
    """What holds for the whole figure: the backbone, if there is but one, and the error bars."""
    backbones = distinct(rows, "backbone")
    return "; ".join([*backbones[: len(backbones) == 1], bars(rows)])


def bars(rows: Rows) -> str:
    """What an error bar is."""
    seeds = sorted(distinct(rows, "seeds"))
    if seeds[-1] == 1:
        return "one seed, no error bars"
    number = str(seeds[-1]) if seeds[0] == seeds[-1] else f"{seeds[0]} to {seeds[-1]}"
    return f"error bars: standard deviation over {number} seeds"


def distinct(rows: Iterable[Mapping[str, Any]], key: str) -> list[Any]:
    """The values of a key, each once, in the rows' order."""
    return list(dict.fromkeys(row[key] for row in rows))


def errors(rows: Rows, key: str) -> list[float] | None:
    """Sizes of error bars, or None where every one is 0, as with one seed."""
    sizes = [float(row[key]) for row in rows]
    return sizes if any(sizes) else None


def score_label(metric: str) -> str:
    """An axis label for scores from 0 to 100."""
    return f"{metric} (%)"


def reference_line(axes: Any, row: Mapping[str, Any], upright: bool = False) -> None:
    """The uncompressed backbone: a dashed line and, with several seeds, a band of its deviation."""
    line, band = (axes.axvline, axes.axvspan) if upright else (axes.axhline, axes.axhspan)
    mean, std = row["mean"], row["std"]
    line(mean, color=GREY, ls="--", lw=1.1, label=ARM_NAMES[BACKBONE], zorder=2)
    if std:
        band(mean - std, mean + std, color=GREY, alpha=0.12, lw=0, zorder=1)


def ratio_axis(axes: Any, ratios: Sequence[int]) -> None:
    """A log2 axis with a tick at each ratio, and room for a single one."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(ratios, [str(ratio) for ratio in ratios])
    axes.minorticks_off()
    axes.set_xlim(min(ratios) / 1.25, max(ratios) * 1.25)
    axes.set_xlabel(RATIO_LABEL)


def say_in(axes: Any, text: str) -> None:
    """Says in an empty panel why it is empty."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=GREY)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set(xlabel="", ylabel="")


def solid_and_dashed(axes: Any, solid: str, dashed: str) -> None:
    """Legend entries for the two kinds of curve that each colour has in a panel."""
    axes.plot([], [], "o-", color=GREY, ms=5, lw=1.6, label=solid)
    axes.plot([], [], "o--", color=GREY, ms=5, lw=0.9, mfc="white", label=dashed)


def say_above(figure: Any, text: str) -> None:
    """A line, or as many as it takes, above all panels."""
    figure.suptitle(textwrap.fill(text, int(12 * figure.get_figwidth())), fontsize=9)


def one_legend(figure: Any, axes: Iterable[Any]) -> None:
    """One legend below the panels, each entry once, as wide as the figure allows."""
    entries: dict[str, Any] = {}
    for panel in axes:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if entries:
        columns = max(1, min(int(figure.get_figwidth() / 2.4), len(entries)))
        # Each further line gets its own room, so that a long legend does not squeeze the panels.
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
