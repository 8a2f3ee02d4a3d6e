"""The report as a figure of two panels. matplotlib is imported only while one is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from variator_jax.bench.output import COLOURS as COLOURS  # these three also for the experiment
from variator_jax.bench.output import GREY, colours, doubling_axis, figure
from variator_jax.bench.output import STYLE as STYLE
from variator_jax.evaluation.schema import LatencyEntry, Report


def plot_report(report: Report, path: Path) -> None:
    """Draws quality against ratio, and measured next to allowed speed-up, as a PNG at `path`."""
    with figure(path, 2, (10.5, 4.9)) as (_, (left, right)):
        _draw_quality(left, report)
        _draw_speedup(right, report)
        for axes in (left, right):
            ratios = [entry.ratio for entry in report.ratios]
            doubling_axis(axes, ratios, "compression ratio k (hidden vectors merged into one)")
            place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16), "ncols": 2}
            axes.legend(frameon=False, fontsize=8, **place)


def _draw_quality(axes: Any, report: Report) -> None:
    """A line per task; dashed: uncompressed, dotted: no encoder FFN, triangle: majority class."""
    ratios = [entry.ratio for entry in report.ratios]
    triangle = {"marker": "<", "ms": 8, "ls": ""}
    for i, (task, colour) in enumerate(zip(report.tasks, colours(len(report.tasks)), strict=True)):
        scores = [entry.quality.get(task, float("nan")) for entry in report.ratios]
        axes.plot(ratios, scores, "o-", color=colour, label=task, zorder=3)
        if task in report.reference:
            axes.axhline(report.reference[task], color=colour, ls="--", lw=0.9, alpha=0.7)
        if task in report.control_no_ffn:
            # Shifted dots, so that tasks of equal score stay visible side by side.
            dots = (2.5 * i, (1.2, 5.0))
            axes.axhline(report.control_no_ffn[task], color=colour, ls=dots, lw=1.6)
        if task in report.majority:
            edge = {"clip_on": False, "transform": axes.get_yaxis_transform(), "zorder": 4}
            axes.plot(1.0, report.majority[task], color=colour, **triangle, **edge)
    axes.plot([], [], color=GREY, ls="--", lw=0.9, label="uncompressed")
    if report.control_no_ffn:
        axes.plot([], [], color=GREY, ls=":", lw=1.4, label="no encoder FFN (control)")
    if report.majority:
        axes.plot([], [], color=GREY, label="majority class", **triangle)
    axes.set_title(f"Quality of {report.backbone.name}", fontsize=9)
    axes.set_ylabel("validation score (0–100)")
    axes.margins(y=0.08)


def _draw_speedup(axes: Any, report: Report) -> None:
    """Per shape: filled and solid what was measured, hollow and dashed what FLOPs allow."""
    rows: dict[str, dict[int, LatencyEntry]] = {}
    for entry in report.ratios:
        for row in entry.latency:
            rows.setdefault(row.shape, {})[entry.ratio] = row
    allowed_style = {"mfc": "white", "lw": 0.9}
    for (shape, by_ratio), colour in zip(rows.items(), colours(len(rows)), strict=True):
        ratios, entries = list(by_ratio), list(by_ratio.values())
        measured = [row.speedup for row in entries]
        # The spread of the time, carried over to the speed-up to first order.
        errors = [row.speedup * row.spread / (2 * row.milliseconds) for row in entries]
        style = {"fmt": "o-", "capsize": 2, "color": colour, "zorder": 3}
        axes.errorbar(ratios, measured, yerr=errors, label=shape, **style)
        allowed = [row.flops_allowed_speedup for row in entries]
        axes.plot(ratios, allowed, "o--", color=colour, **allowed_style)
    axes.axhline(1.0, color=GREY, lw=0.6)
    axes.plot([], [], "o-", color=GREY, label="measured (half quartile distance)")
    label = "allowed by the saved FLOPs"
    axes.plot([], [], "o--", color=GREY, label=label, **allowed_style)
    axes.set_title(f"Encoder speed on {report.hardware}", fontsize=9)
    axes.set_ylabel("encoder speed-up (times)")
