"""Quality as figures: against the compression ratio, and every arm at one ratio.

What rows are is in `results.py`; saving is `figures.py`'s business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from variator_jax.evaluation.plots import GREY
from variator_jax.experiment import figure_parts as parts
from variator_jax.experiment.figure_parts import ARM_GROUPS, ARM_NAMES, Rows, styled


@styled
def ratio_figure(rows: Rows, metric: str = "accuracy") -> Any:
    """Quality against k: a panel per backbone and task, a curve per arm with several ratios.

    Args:
      rows: aggregated rows of an experiment (`results.Row` as mappings).
      metric: what the scores are, for the axis.

    Raises:
      DataError: for an unknown arm.
    """
    parts.check_rows(rows)
    cells = parts.quality_cells(rows)
    columns = _columns(rows)
    width = 3.5 if len(cells) > 1 else 5.2
    figure, axes = parts.panels(len(cells), columns, width, 2.8)
    arms = [arm for arm in ARM_NAMES if arm == parts.METHOD or len(_ratios(rows, arm)) > 1]
    arms = [arm for arm in arms if _ratios(rows, arm)]
    for i, (panel, (backbone, task)) in enumerate(zip(axes, cells, strict=True)):
        own = [row for row in rows if (row["backbone"], row["task"]) == (backbone, task)]
        _draw_ratios(panel, own, arms)
        panel.set_title(parts.cell_title(rows, backbone, task), fontsize=9)
        if i % columns == 0:
            panel.set_ylabel(parts.score_label(metric))
    if cells:
        parts.say_above(figure, parts.headline(rows))
    parts.one_legend(figure, axes)
    return figure


def _draw_ratios(axes: Any, rows: Rows, arms: Sequence[str]) -> None:
    # Each arm a little aside, so that error bars of equal scores stay visible side by side.
    step = min(0.07, 0.5 / max(len(arms), 1))
    drawn: set[int] = set()
    for i, arm in enumerate(arms):
        own = sorted((row for row in rows if row["arm"] == arm), key=lambda row: row["ratio"])
        shift = 2 ** (step * (i - (len(arms) - 1) / 2))
        axes.errorbar(
            [row["ratio"] * shift for row in own],
            [row["mean"] for row in own],
            yerr=parts.errors(own, "std"),
            label=ARM_NAMES[arm],
            capsize=2.5,
            elinewidth=0.9,
            **parts.arm_look(arm),
        )
        drawn.update(row["ratio"] for row in own)
    for row in rows:
        if row["arm"] == parts.BACKBONE:
            parts.reference_line(axes, row)
        if row["arm"] == parts.CONTROL:
            axes.axhline(row["mean"], color=GREY, ls=":", lw=1.4, label=ARM_NAMES[parts.CONTROL])
    axes.margins(y=0.1)
    axes.grid(alpha=0.25, lw=0.6)
    if drawn:
        parts.ratio_axis(axes, sorted(drawn))
    else:
        axes.set_xticks([])
        axes.set_xlabel(f"{parts.RATIO_LABEL}: no compressed result yet")


@styled
def ablations_figure(rows: Rows, ratio: int, metric: str = "accuracy") -> Any:
    """Every arm at one ratio: a panel per backbone and task, a line per arm, the gap beside it.

    Args:
      rows: as for `ratio_figure`; arms that know no ratio have 1.
      ratio: the compression ratio.
      metric: what the scores are, for the axis.

    Raises:
      DataError: for an unknown arm.
    """
    parts.check_rows(rows)
    chosen = [row for row in rows if row["ratio"] in (ratio, 1)]
    arms = [arm for arm in ARM_NAMES if arm in parts.distinct(chosen, "arm")]
    heights = _heights(arms)
    cells = parts.quality_cells(chosen)
    columns = _columns(chosen)
    height = 0.9 + 0.22 * (max(heights.values(), default=4) + 1)
    figure, axes = parts.panels(len(cells), columns, 2.7, height, names=2.1)
    for i, (panel, (backbone, task)) in enumerate(zip(axes, cells, strict=True)):
        own = [row for row in chosen if (row["backbone"], row["task"]) == (backbone, task)]
        _draw_arms(panel, own, ratio, heights)
        names = [ARM_NAMES[arm] for arm in heights]
        panel.set_yticks(list(heights.values()), names if i % columns == 0 else [])
        panel.set_title(parts.cell_title(chosen, backbone, task), fontsize=9)
        panel.set_xlabel(parts.score_label(metric))
    if cells:
        said = f"k = {ratio}; {parts.headline(chosen)}; gap: points below the uncompressed"
        parts.say_above(figure, said)
    parts.one_legend(figure, axes)
    return figure


def _draw_arms(axes: Any, rows: Rows, ratio: int, heights: Mapping[str, float]) -> None:
    for row in rows:
        if row["arm"] == parts.BACKBONE:
            parts.reference_line(axes, row, upright=True)
    for group, members in ARM_GROUPS.items():
        # An arm of both ratios would be one that exists uncompressed, too; the asked one counts.
        own = {row["arm"]: row for row in sorted(rows, key=lambda r: r["ratio"] == ratio)}
        found = [own[arm] for arm in members if arm in own]
        if not found:
            continue
        axes.errorbar(
            [row["mean"] for row in found],
            [heights[row["arm"]] for row in found],
            xerr=parts.errors(found, "std"),
            fmt="o",
            ms=5,
            capsize=2.5,
            elinewidth=0.9,
            color=parts.GROUP_COLOURS[group],
            label=group,
            zorder=3,
        )
        for row in found:
            _beside(axes, heights[row["arm"]], _signed(row["gap"]))
    if heights:
        _beside(axes, -1.0, "gap")
        axes.set_ylim(max(heights.values()) + 0.7, -0.7)
    axes.margins(x=0.12)
    axes.tick_params(axis="y", length=0)
    axes.grid(alpha=0.25, lw=0.6)


def _beside(axes: Any, height: float, text: str) -> None:
    """Text to the right of a panel, at a height in its data's units."""
    axes.text(
        1.02,
        height,
        text,
        transform=axes.get_yaxis_transform(),
        ha="left",
        va="center",
        fontsize=7.5,
        color=GREY,
    )


def _signed(points: float) -> str:
    """One decimal with its sign, and none on a zero."""
    text = f"{points:+.1f}"
    return "0.0" if float(text) == 0 else text.replace("-", "\N{MINUS SIGN}")


def _heights(arms: Sequence[str]) -> dict[str, float]:
    """Where each arm's line lies, from the top, with room between the groups."""
    heights: dict[str, float] = {}
    free = 0.0
    for members in ARM_GROUPS.values():
        present = [arm for arm in members if arm in arms]
        heights |= {arm: free + i for i, arm in enumerate(present)}
        free += len(present) + 0.6 * bool(present)
    return heights


def _ratios(rows: Rows, arm: str) -> list[int]:
    """The ratios above 1 that an arm was run at."""
    return sorted({row["ratio"] for row in rows if row["arm"] == arm and row["ratio"] > 1})


def _columns(rows: Rows) -> int:
    """Panels in a line: up to three, else half of all; of several backbones a line for each."""
    backbones = len(parts.distinct(rows, "backbone"))
    count = len(parts.quality_cells(rows))
    if 1 < backbones < count:
        return -(-count // backbones)
    return count if count <= 3 else -(-count // 2)
