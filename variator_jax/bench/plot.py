"""A benchmark's speed-ups as a figure. matplotlib is imported only while it is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from variator_jax.bench.results import BenchResult, EncoderResult
from variator_jax.evaluation.plots import COLOURS, GREY, STYLE

_MEASURED, _ALLOWED, *_PEERS = COLOURS


def plot_bench(result: BenchResult, path: Path) -> None:
    """Draws the speed-up of each ratio beside the allowed one, a panel per shape, as a PNG."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = len(result.encoder)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(max(6.4, 4.6 * count), 4.6), dpi=200, layout="constrained")
        FigureCanvasAgg(figure)
        panels: Any = figure.subplots(1, count, sharey=True, squeeze=False)[0]
        for axes, one in zip(panels, result.encoder, strict=True):
            _draw(axes, one)
        panels[0].set_ylim(bottom=0)  # Once all are drawn: it ends the scaling that they share.
        panels[0].set_ylabel("speed-up over the uncompressed encoder (times)")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside lower center", ncols=2 * min(count, 2), frameon=False
        )
        figure.suptitle(
            f"{result.backbone} encoder in {result.dtype} on {result.hardware}", fontsize=9
        )
        figure.savefig(path)


def _draw(axes: Any, one: EncoderResult) -> None:
    ratios = [row.ratio for row in one.ratios]
    allowed = [row.allowed_speedup for row in one.ratios]
    measured = [one.speedup(row) for row in one.ratios]
    # The quartiles of the rounds' own speed-ups may lie on one side of the ratio of medians.
    spread = [one.speedup_quartiles(row) for row in one.ratios]
    below = [max(m - low, 0.0) for m, (low, _) in zip(measured, spread, strict=True)]
    above = [max(high - m, 0.0) for m, (_, high) in zip(measured, spread, strict=True)]
    axes.plot(ratios, allowed, "--", lw=1.2, color=_ALLOWED, label="allowed by the saved FLOPs")
    axes.errorbar(
        ratios,
        measured,
        yerr=[below, above],
        fmt="o-",
        capsize=3,
        color=_MEASURED,
        label="measured, quartiles of the rounds",
        zorder=3,
    )
    for row, value in zip(one.ratios, measured, strict=True):
        if row.ratio > 1:
            axes.annotate(
                f"{value:.2f}",
                (row.ratio, value),
                textcoords="offset points",
                xytext=(5, -11),
                ha="left",
                fontsize=8,
                color=_MEASURED,
            )
    for i, peer in enumerate(peer for peer in one.peers if peer.seconds):
        colour = _PEERS[i % len(_PEERS)]
        axes.axhline(one.speedup(peer), color=colour, ls=(0, (4, 2, 1, 2)), lw=1.2, label=peer.name)
    axes.axhline(1.0, color=GREY, lw=0.6)
    axes.set_title(f"{one.batch} x {one.length} tokens", fontsize=9)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ratios, [str(ratio) for ratio in ratios])
    axes.minorticks_off()
    axes.margins(x=0.1)
    axes.set_xlabel("compression ratio k (hidden vectors merged into one)")
    axes.grid(alpha=0.25, lw=0.6)
