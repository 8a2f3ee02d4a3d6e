"""The report as a figure of two panels. matplotlib is imported only while one is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from variator_jax.evaluation.schema import LatencyEntry, Report

# Okabe and Ito's palette: told apart by colour-blind readers and in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREY = "#555555"
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


def plot_report(report: Report, path: Path) -> None:
    """Draws quality against ratio, and measured beside allowed speed-up, as a PNG at `path`."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.5, 4.9), dpi=200, layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2)
        _draw_quality(left, report)
        _draw_speedup(right, report)
        figure.savefig(path)


def _draw_quality(axes: Any, report: Report) -> None:
    """A line per task; dashed: uncompressed, dotted: no encoder FFN, triangle: majority class."""
    ratios = [entry.ratio for entry in report.ratios]
    backbone = report.at(1)
    for i, (task, colour) in enumerate(zip(report.tasks, _cycle(len(report.tasks)), strict=True)):
        scores = [entry.quality.get(task, float("nan")) for entry in report.ratios]
        axes.plot(ratios, scores, "o-", color=colour, label=task, zorder=3)
        if backbone and task in backbone.quality:
            axes.axhline(backbone.quality[task], color=colour, ls="--", lw=0.9, alpha=0.7)
        if task in report.control_no_ffn:
            # Shifted dots, so that tasks of equal score stay visible side by side.
            dots = (2.5 * i, (1.2, 5.0))
            axes.axhline(report.control_no_ffn[task], color=colour, ls=dots, lw=1.6)
        if task in report.majority:
            axes.plot(
                1.0,
                report.majority[task],
                marker="<",
                ms=8,
                color=colour,
                clip_on=False,
                transform=axes.get_yaxis_transform(),
                zorder=4,
            )
    axes.plot([], [], color=GREY, ls="--", lw=0.9, label="uncompressed")
    if report.control_no_ffn:
        axes.plot([], [], color=GREY, ls=":", lw=1.4, label="no encoder FFN (control)")
    if report.majority:
        axes.plot([], [], color=GREY, ls="", marker="<", ms=8, label="majority class")
    axes.set_title(f"Quality of {report.backbone.name}", fontsize=9)
    axes.set_ylabel("validation score (0–100)")
    axes.margins(y=0.08)
    _finish(axes, ratios)


def _draw_speedup(axes: Any, report: Report) -> None:
    """Per shape: filled and solid what was measured, hollow and dashed what FLOPs allow."""
    rows: dict[str, dict[int, LatencyEntry]] = {}
    for entry in report.ratios:
        for row in entry.latency:
            shape = f"{row.config}, batch {row.batch}, length {row.length}"
            rows.setdefault(shape, {})[entry.ratio] = row
    for (shape, by_ratio), colour in zip(rows.items(), _cycle(len(rows)), strict=True):
        measured = [row.speedup for row in by_ratio.values()]
        # The spread of the time, carried over to the speed-up to first order.
        errors = [r.speedup * r.spread / (2 * r.milliseconds) for r in by_ratio.values()]
        allowed = [row.flops_allowed_speedup for row in by_ratio.values()]
        axes.errorbar(
            list(by_ratio),
            measured,
            yerr=errors,
            fmt="o-",
            capsize=2,
            color=colour,
            label=shape,
            zorder=3,
        )
        axes.plot(list(by_ratio), allowed, "o--", mfc="white", lw=0.9, color=colour)
    axes.axhline(1.0, color=GREY, lw=0.6)
    axes.plot([], [], "o-", color=GREY, label="measured (half quartile distance)")
    axes.plot([], [], "o--", mfc="white", lw=0.9, color=GREY, label="allowed by the saved FLOPs")
    axes.set_title(f"Encoder speed on {report.hardware}", fontsize=9)
    axes.set_ylabel("encoder speed-up (times)")
    _finish(axes, [entry.ratio for entry in report.ratios])


def _finish(axes: Any, ratios: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ratios, [str(ratio) for ratio in ratios])
    axes.minorticks_off()
    axes.set_xlabel("compression ratio k (hidden vectors merged into one)")
    axes.grid(alpha=0.25, lw=0.6)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False, fontsize=8)


def _cycle(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]
