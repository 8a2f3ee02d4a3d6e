"""What the reports share: Markdown tables and lists, figures with one look, the machine's name.

matplotlib is imported only while a figure is drawn.
"""

import contextlib
import os
import platform
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

# Okabe and Ito's palette, which colour-blind readers can tell apart, also in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREY = "#555555"
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
NONE = "–"  # an empty cell


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is left-aligned and the others right-aligned."""
    rule = ["-", *("-:" for _ in header[1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def bullets(sentences: Iterable[str]) -> str:
    """A list, empty for no sentence."""
    return "\n".join(f"- {sentence}" for sentence in sentences)


def log(text: str) -> None:
    """A line on the error stream, which leaves standard output to results."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def figure(
    path: Path, panels: int, size: tuple[float, float], **options: Any
) -> Iterator[tuple[Any, list[Any]]]:
    """Yields a figure and its axes side by side; on leaving it is written to `path` as a PNG."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        drawing = Figure(figsize=size, dpi=200, layout="constrained")
        axes: Any = drawing.subplots(1, panels, squeeze=False, **options)
        yield drawing, list(axes[0])
        drawing.savefig(path)


def doubling_axis(
    axes: Any, values: Sequence[float], label: str, names: Sequence[str] | None = None
) -> None:
    """Makes x a logarithmic axis with ticks at `values`, or `names` there, and draws the grid."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(values, names or [str(value) for value in values])
    axes.minorticks_off()
    axes.set_xlabel(label)
    axes.grid(alpha=0.25, lw=0.6)


def colours(count: int) -> list[str]:
    """So many colours, repeated where the palette ends."""
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def hardware() -> str:
    """Names JAX's default devices, their number and the JAX version.

    A CPU is named by its model and the cores that this process may use; accelerators by their kind
    and number, with the number of hosts where there are several.
    """
    devices = jax.devices()
    if devices[0].platform == "cpu":
        cores = usable_cores()
        name = f"{_cpu_model()}, {cores} {'core' if cores == 1 else 'cores'}"
        if len(devices) > 1:
            name += f" shown to JAX as {len(devices)} devices"
    else:
        name = f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})"
    if jax.process_count() > 1:
        name += f" on {jax.process_count()} hosts"
    return f"{name}, jax {jax.__version__}"


def _cpu_model() -> str:
    """The first model name that Linux has, or what the platform module knows."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(errors="replace") if cpuinfo.is_file() else ""
    model = re.search(r"^model name\s*: (.+)", text, re.MULTILINE)
    return f"CPU {model[1] if model else platform.processor() or platform.machine()}"


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
