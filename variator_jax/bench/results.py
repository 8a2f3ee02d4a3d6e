"""What a benchmark measured, as data, and how it is written: JSON, Markdown and a plot.

Fields are samples and counts; every figure is computed from them. Times are seconds, sizes bytes.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from variator_jax.bench import output

SCHEMA = 2
ENCODER, STEP = "encoder", "distillation step"
_TIME = ("milliseconds", "first_quartile_milliseconds", "third_quartile_milliseconds")
# Columns behind name and time: header, figure, format.
_COLUMNS = {
    ENCODER: (
        ("tokens/s", "tokens_per_second", "{:,.0f}"),
        ("speed-up", "speedup", "{:.2f}"),
        ("FLOPs allow", "allowed_speedup", "{:.2f}"),
        ("efficiency", "efficiency", "{:.2f}"),
        ("TFLOP/s", "tflops_per_second", "{:.3g}"),
        ("share of peak", "share_of_matrix_peak", "{:.0%}"),
    ),
    STEP: (
        ("steps/s", "calls_per_second", "{:.3g}"),
        ("examples/s", "examples_per_second", "{:.3g}"),
        ("TFLOP a step", "tflops", "{:.3g}"),
        ("TFLOP/s", "tflops_per_second", "{:.3g}"),
        ("share of peak", "share_of_matrix_peak", "{:.0%}"),
        ("peak memory, GiB", "peak_gib", "{:.2f}"),
    ),
}
_WORDS = {
    ENCODER: "Medians over interleaved rounds, in brackets the quartiles; rows without padding. "
    "*FLOPs allow* is the speed-up if time were proportional to FLOPs, *efficiency* the measured "
    "share of it. *Share of peak* is over the matrix peak, the median of one product of two square "
    "matrices in the same dtype and the same rounds. A baseline's speed-up is over our "
    "uncompressed encoder. FLOPs are by formula: matrix products only, a multiply-add counted as "
    "2. An efficiency or a share above 100 % is noise, or a device that runs other products "
    "faster; quartiles of fewer than 5 rounds mean little (--rounds).",
    STEP: "FLOPs of a step are those that the compiler counts, with what rematerialisation runs "
    "twice. *Peak memory* is the device's own highest mark where it keeps one and this step raised "
    "it, else the compiler's analysis.",
}


@dataclasses.dataclass(frozen=True)
class Timing:
    """One call, timed in each round.

    Attributes:
      name: 'k=4', a baseline's name, or the matrix product's.
      seconds: of each round; empty where the call could not run.
      flops: of a call; None where they are not known.
      ratio: compression ratio; None of a baseline or the matrix product.
      allowed_speedup: if time were proportional to FLOPs.
      error: why the call could not run.
      peak_bytes: the most memory in use during a step.
      loss: of the last step.
    """

    name: str
    seconds: Sequence[float] = ()
    flops: float | None = None
    ratio: int | None = None
    allowed_speedup: float | None = None
    error: str = ""
    peak_bytes: int | None = None
    loss: float | None = None

    @property
    def median(self) -> float:
        """Seconds."""
        return float(np.median(self.seconds))


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Calls timed in the same rounds on one shape of input.

    Attributes:
      kind: 'encoder' or 'distillation step'.
      batch: rows.
      length: tokens of a row.
      peak: the product of two large square matrices.
      rows: what was timed; of an encoder ratio 1 first.
      details: further settings of a step.
    """

    kind: str
    batch: int
    length: int
    peak: Timing
    rows: Sequence[Timing]
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def figures(self, row: Timing) -> dict[str, float]:
        """All figures of a row by name; none of a row that did not run."""
        if not row.seconds:
            return {}
        times = np.percentile(1e3 * np.array(row.seconds), (50, 25, 75))
        figures, rate = dict(zip(_TIME, map(float, times), strict=True)), 1 / row.median
        if row.flops is not None:
            figures |= {"tflops": row.flops / 1e12, "tflops_per_second": row.flops * rate / 1e12}
        if row is self.peak:
            return figures
        per_call = {"calls": 1, "examples": self.batch, "tokens": self.batch * self.length}
        figures |= {f"{name}_per_second": count * rate for name, count in per_call.items()}
        if row.flops is not None and self.peak.flops is not None:
            peak = self.peak.flops / self.peak.median
            figures["share_of_matrix_peak"] = row.flops * rate / peak
        if self.kind == ENCODER:
            figures["speedup"] = self.rows[0].median * rate
        if row.allowed_speedup is not None:
            figures["allowed_speedup"] = row.allowed_speedup
            figures["efficiency"] = figures["speedup"] / row.allowed_speedup
        if row.peak_bytes is not None:
            figures["peak_gib"] = row.peak_bytes / 2**30
        return figures


@dataclasses.dataclass(frozen=True)
class BenchResult:
    """A whole benchmark: the machine, the software and all that was measured."""

    backbone: str
    dtype: str
    rounds: int
    hardware: str
    versions: Mapping[str, str]
    measurements: Sequence[Measurement]
    notes: Sequence[str] = ()


def to_json(result: BenchResult) -> dict[str, Any]:
    """Plain values; each measured row carries its figures."""
    content = {"schema": SCHEMA, **dataclasses.asdict(result)}
    for one, plain in zip(result.measurements, content["measurements"], strict=True):
        plain["peak"]["figures"] = one.figures(one.peak)
        for row, written in zip(one.rows, plain["rows"], strict=True):
            written["figures"] = one.figures(row)
    return content


def bench_markdown(result: BenchResult) -> str:
    """The whole `bench.md`, which is also what the command prints."""
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    sections = [
        f"# {result.backbone} in {result.dtype}",
        f"Hardware: {result.hardware}, one device used.  \nSoftware: {versions}.",
    ]
    for one in result.measurements:
        details = "".join(f", {name} {value}" for name, value in one.details.items())
        sections += [
            f"## {one.kind.capitalize()}, {one.batch} x {one.length} tokens{details}",
            measurement_table(one),
            output.bullets(f"{row.name} did not run: {row.error}" for row in one.rows if row.error),
        ]
    sections += [_WORDS[kind] for kind in dict.fromkeys(one.kind for one in result.measurements)]
    sections.append(output.bullets([f"Rounds: {result.rounds}.", *result.notes]))
    return "\n\n".join(section for section in sections if section) + "\n"


def measurement_table(one: Measurement) -> str:
    """One line per row that ran, and one for the matrix peak."""
    columns = _COLUMNS[one.kind]
    lines = []
    for row in [*one.rows, one.peak]:
        if row.seconds:
            figures = one.figures(row)
            median, low, high = (figures[name] for name in _TIME)
            cells = [
                form.format(figures[key]) if key in figures else output.NONE
                for _, key, form in columns
            ]
            lines.append([row.name, f"{median:.2f} ({low:.2f} to {high:.2f})", *cells])
    return output.markdown_table([one.kind, "ms", *(header for header, _, _ in columns)], lines)


def plot_bench(result: BenchResult, path: Path) -> None:
    """Draws the speed-up of each ratio and the allowed one, a panel per shape, as a PNG."""
    encoders = [one for one in result.measurements if one.kind == ENCODER]
    size = (max(6.4, 4.6 * len(encoders)), 4.6)
    with output.figure(path, len(encoders), size, sharey=True) as (drawing, panels):
        for axes, one in zip(panels, encoders, strict=True):
            _draw(axes, one)
        panels[0].set_ylim(bottom=0)  # Once all are drawn: it ends the scaling that they share.
        panels[0].set_ylabel("speed-up over the uncompressed encoder (times)")
        lines, labels = panels[0].get_legend_handles_labels()
        drawing.legend(lines, labels, loc="outside lower center", ncols=2, frameon=False)
        title = f"{result.backbone} encoder in {result.dtype} on {result.hardware}"
        drawing.suptitle(title, fontsize=9)


def _draw(axes: Any, one: Measurement) -> None:
    rows = [row for row in one.rows if row.ratio is not None]
    ratios, allowed = [row.ratio or 1 for row in rows], [row.allowed_speedup for row in rows]
    # [ratios, median and both quartiles], in seconds
    times = np.array([np.percentile(row.seconds, (50, 25, 75)) for row in rows])
    median, fast, slow = (one.rows[0].median / times).T
    axes.plot(ratios, allowed, "--", color=output.COLOURS[1], label="allowed by the saved FLOPs")
    style = {"fmt": "o-", "capsize": 3, "color": output.COLOURS[0], "zorder": 3}
    bars = [median - slow, fast - median]
    axes.errorbar(ratios, median, yerr=bars, label="measured, quartiles of the time", **style)
    others = [row for row in one.rows if row.ratio is None and row.seconds]
    for row, colour in zip(others, output.colours(2 + len(others))[2:], strict=True):
        axes.axhline(one.figures(row)["speedup"], color=colour, ls="-.", lw=1.2, label=row.name)
    axes.axhline(1.0, color=output.GREY, lw=0.6)
    axes.set_title(f"{one.batch} x {one.length} tokens", fontsize=9)
    output.doubling_axis(axes, ratios, "compression ratio k (hidden vectors merged into one)")
