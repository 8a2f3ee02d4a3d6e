"""What a load test found: tables, a plot, and the highest load that holds a target."""

import dataclasses
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from variator_jax.bench.output import COLOURS, figure, log, markdown_table
from variator_jax.errors import ConfigError
from variator_jax.files import write_json
from variator_jax.serving.loadtest import Load, Run, Sample, run

_ROWS = 12  # of the table over time
_BINS = 60  # of the plot
HELD = 0.99  # of all requests are answered within the target where a load is held
REFUSED = 429


class Interval(NamedTuple):
    """What became of the requests that left in a stretch of time; rates a second, times in ms."""

    start: float  # seconds
    offered: float
    goodput: float  # answered within the target
    p50: float  # of the answers; NaN without any
    p99: float
    ratio: float  # mean over the answers
    refused: int
    failed: int
    requests: int

    @property
    def held(self) -> bool:
        """Whether the target holds for 99 % of all requests; a refused one misses it."""
        return self.goodput >= HELD * self.offered and self.requests > 0


def summarise(
    samples: Sequence[Sample], target_ms: float, start: float, seconds: float
) -> Interval:
    """What became of samples, all of which left in `seconds` from `start`."""
    # [answered]
    answered = np.array([1e3 * s.seconds for s in samples if s.status == 200])
    ratios = [s.ratio for s in samples if s.status == 200]
    p50, p99 = np.percentile(answered, (50, 99)) if ratios else (np.nan, np.nan)
    ratio = float(np.mean(ratios)) if ratios else np.nan
    rates = len(samples) / seconds, float((answered <= target_ms).sum()) / seconds
    refused = sum(s.status == REFUSED for s in samples)
    failed = len(samples) - len(ratios) - refused
    return Interval(start, *rates, float(p50), float(p99), ratio, refused, failed, len(samples))


def intervals(run: Run, load: Load, target_ms: float, count: int) -> list[Interval]:
    """The same for `count` equal stretches of the test."""
    width = load.seconds / count
    parts: list[list[Sample]] = [[] for _ in range(count)]
    for sample in run.samples:
        parts[min(count - 1, int(sample.start / width))].append(sample)
    return [summarise(part, target_ms, i * width, width) for i, part in enumerate(parts)]


def whole(run: Run, load: Load, target_ms: float) -> Interval:
    """The same for the whole test."""
    return summarise(run.samples, target_ms, 0.0, load.seconds)


def markdown(run: Run, load: Load, target_ms: float) -> str:
    """The tables that `variator loadtest` prints."""
    header = ("from s", "offered/s", "goodput/s", "p50 ms", "p99 ms", "ratio", "refused", "failed")
    rows = [_cells(part) for part in intervals(run, load, target_ms, _ROWS)]
    total = whole(run, load, target_ms)
    rows.append(("all", *_cells(total)[1:]))
    late = max((sample.behind for sample in run.samples), default=0.0)
    lines = [
        f"{load.route} at {load.url}, {load.shape}, target {target_ms:,.0f} ms, "
        f"{total.requests:,} requests in {load.seconds:,.0f} s",
        "",
        markdown_table(header, rows),
        "",
        f"Goodput: answers within the target. The client was {1e3 * late:,.0f} ms late at most.",
        *_server(run),
    ]
    return "\n".join(lines)


def _cells(part: Interval) -> tuple[str, ...]:
    rates = (f"{part.offered:.1f}", f"{part.goodput:.1f}")
    times = (f"{part.p50:,.0f}", f"{part.p99:,.0f}", f"{part.ratio:.2f}")
    return (f"{part.start:,.0f}", *rates, *times, f"{part.refused:,}", f"{part.failed:,}")


def _server(run: Run) -> list[str]:
    """The server's memory a fifth into the test and at its end, and what it compiled."""
    lines: list[str] = []
    memory = [row["memory"] for row in run.metrics if "memory" in row]
    if memory:
        early, last = memory[len(memory) // 5] / 2**20, memory[-1] / 2**20
        change = f"{100 * (last / early - 1):+.1f} %"
        sizes = f"{early:,.0f} MiB early, {last:,.0f} MiB at the end"
        lines.append(f"Server memory: {sizes}, {change}.")
    compiled = [row["compilations"] for row in run.metrics if "compilations" in row]
    if compiled:
        lines.append(f"Compilations during the test: {compiled[-1] - compiled[0]:.0f}.")
    return lines


def write(run: Run, load: Load, target_ms: float, folder: Path) -> None:
    """Writes `loadtest.json`, `loadtest.md` and, where there is matplotlib, `loadtest.png`."""
    parts = intervals(run, load, target_ms, _BINS)
    # The token is a secret, and a NaN is no JSON.
    settings = {**dataclasses.asdict(load), "token": None, "target_ms": target_ms}
    over_time = [{k: v if v == v else None for k, v in part._asdict().items()} for part in parts]
    content = {"load": settings, "over_time": over_time, "metrics": run.metrics}
    write_json(folder / "loadtest.json", content)
    (folder / "loadtest.md").write_text(markdown(run, load, target_ms) + "\n", "utf8")
    if importlib.util.find_spec("matplotlib") is None:
        log("no plot: matplotlib is not installed")
        return
    plot(parts, target_ms, folder / "loadtest.png")


def plot(parts: Sequence[Interval], target_ms: float, path: Path) -> None:
    """Load, latency and ratio over time, side by side."""
    panels = {
        "requests a second": ["offered", "goodput"],
        "milliseconds": ["p50", "p99"],
        "mean ratio of the answers": ["ratio"],
    }
    with figure(path, len(panels), (11, 3)) as (_, axes):
        for panel, (label, names) in zip(axes, panels.items(), strict=True):
            for colour, name in zip(COLOURS, names, strict=False):
                values = [getattr(part, name) for part in parts]
                panel.step([part.start for part in parts], values, color=colour, label=name, lw=1.2)
            panel.set(xlabel="seconds", ylabel=label)
            if panel is axes[1]:
                panel.axhline(target_ms, color="black", ls="--", lw=0.8, label="target")
                panel.set_yscale("log")
            else:
                panel.set_ylim(bottom=0)
            panel.grid(alpha=0.25, lw=0.6)
        for panel in axes[:2]:
            panel.legend(frameon=False)


def highest_rate(
    holds: Callable[[float], bool], first: float, precision: float = 1.05
) -> tuple[float, float]:
    """The highest rate that holds and the lowest that does not, by doubling, then bisection.

    Args:
      holds: measures a rate, in requests a second.
      first: the rate to begin with.
      precision: the search ends where the two are at most this factor apart.

    Raises:
      ConfigError: if even a hundredth of the first rate does not hold.
    """
    low, high = 0.0, first
    while holds(high):
        low, high = high, 2 * high
    while not low:
        if high < first / 100:
            raise ConfigError(f"Even {high:.2g} requests a second miss the target.")
        low, high = (high / 2, high) if holds(high / 2) else (0.0, high / 2)
    while high / low > precision:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low, high


class Limits(NamedTuple):
    """The highest rates that held a target, in requests a second, and the lowest that missed it."""

    target_ms: float
    plugins: tuple[str, ...]
    held: tuple[float, ...]
    missed: tuple[float, ...]

    def markdown(self) -> str:
        """A table with the quotients to the first plugin."""
        rows = [
            (name, f"{held:.2f}", f"{missed:.2f}", f"{held / self.held[0]:.2f}")
            for name, held, missed in zip(self.plugins, self.held, self.missed, strict=True)
        ]
        header = ("plugin", "held, requests/s", "missed, requests/s", "held / first")
        return f"target {self.target_ms:,.0f} ms\n\n{markdown_table(header, rows)}"


def compare(load: Load, target_ms: float, against: str | None = None) -> Limits:
    """Searches the highest rates that hold the target; each measurement is logged.

    Args:
      load: what is sent at each rate; its own rate is the first that is measured.
      target_ms: of the p99.
      against: the plugin that requests of the first search name; None searches once.

    Raises:
      ConfigError: as `run` and `highest_rate`.
    """
    plugins = [against, load.plugin] if against else [load.plugin]
    names = [plugin or "chosen by the server" for plugin in plugins]
    found: list[tuple[float, float]] = []
    for plugin, name in zip(plugins, names, strict=True):

        def holds(rate: float, plugin: str | None = plugin, name: str = name) -> bool:
            measured = dataclasses.replace(load, rate=rate, plugin=plugin)
            total = whole(run(measured), measured, target_ms)
            verdict = "held" if total.held else "missed"
            log(f"{name}: {rate:.2f}/s {verdict}, p99 {total.p99:,.0f} ms, ratio {total.ratio:.2f}")
            return total.held

        found.append(highest_rate(holds, found[0][0] if found else load.rate))
    held, missed = zip(*found, strict=True)
    return Limits(target_ms, tuple(names), held, missed)
