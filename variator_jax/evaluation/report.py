"""Writes a report into a folder, as `report.json`, `report.md` and `report.png`, and reads it back.

What a report holds is defined in `schema`. matplotlib is imported only while a plot is drawn.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from variator_jax.bench.latency import Latency
from variator_jax.bench.output import GREY, NONE, bullets, colours, figure, markdown_table
from variator_jax.errors import DataError
from variator_jax.evaluation.schema import Backbone, RatioEntry, Report, Scores, targets_missed
from variator_jax.files import write_json

#: Points above the majority class that a backbone needs on a task for it to be informative.
MIN_MARGIN = 2.0
_HEADLINES = ("accuracy", "token_f1")  # these are the scores of the first table
_QUALITY = (
    "Scores are on a scale of 0 to 100; in brackets the difference to the uncompressed backbone. "
    "Encoder FLOPs are by formula, for one row of {length} tokens. Shares of parameters are of the "
    "whole backbone. The row *no encoder FFN* is the backbone with its encoder FFNs skipped, "
    "*majority* always answers the majority class."
)
_LATENCY = (
    "Medians over interleaved rounds, rows without padding, on {hardware}. *FLOPs allow* is the "
    "speed-up if time were proportional to FLOPs."
)


def write_report(report: Report, folder: Path | str, promised: bool = False) -> None:
    """Writes the three files, making the folder if needed; if `promised`, with the promises missed.

    Raises:
      DataError: for a report without ratios, or with a figure that is not finite.
    """
    if not report.ratios:
        raise DataError("A report needs at least one ratio.")
    content = dataclasses.asdict(report)
    try:
        json.dumps(content, allow_nan=False)
    except ValueError as error:
        raise DataError(f"The report has a figure that is not finite: {content}") from error
    if promised:
        content["targets_missed"] = targets_missed(report)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").write_text(report_markdown(report, promised), encoding="utf-8")
    plot_report(report, folder / "report.png")
    write_json(folder / "report.json", content)  # last: its presence means that all is complete


def read_report(path: Path | str) -> Report:
    """Reads a `report.json` back.

    Raises:
      DataError: if the file is absent, not JSON, or lacks a field.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        content.pop("targets_missed", None)
        content["backbone"] = Backbone(**content["backbone"])
        for entry in content["ratios"]:
            entry["latency"] = tuple(Latency(**row) for row in entry["latency"])
            entry["sites"] = tuple(entry.get("sites", ()))
        content["ratios"] = tuple(RatioEntry(**entry) for entry in content["ratios"])
        content["notes"] = tuple(content["notes"])
        return Report(**content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not a report of this library: {error}") from error


def report_markdown(report: Report, promised: bool = False) -> str:
    """The whole `report.md`: quality and cost, latencies, promised figures missed, notes."""
    backbone, details = report.backbone, details_table(report)
    named = [entry for entry in report.ratios if entry.plugin and entry.label == entry.plugin]
    ratios = ", ".join(entry.label for entry in report.ratios)
    sections = [
        f"# {backbone.name} at compression ratios {ratios}",
        f"Backbone `{backbone.name}`, {backbone.parameters:,} parameters, fingerprint "
        f"`{backbone.fingerprint}`.  \nHardware: {report.hardware}.",
        quality_table(report),
        bullets(f"`{x.plugin}` is {', '.join(x.sites)}." for x in named),
        _QUALITY.format(length=report.encoder_length),
    ]
    if details:
        sections += ["## Further scores", details]
    if any(entry.latency for entry in report.ratios):
        words = _LATENCY.format(hardware=report.hardware)
        sections += ["## Encoder latency", words, latency_table(report)]
    if promised and (missed := targets_missed(report)):
        sections += ["## Promised figures missed", bullets(missed)]
    notes = bullets([*report.notes, *_weak_tasks(report)])
    seconds = [{"stage": name, "seconds": f"{value:.1f}"} for name, value in report.seconds.items()]
    sections += [notes, "## Time taken", _table(seconds)]
    return "\n\n".join(section for section in sections if section) + "\n"


def quality_table(report: Report) -> str:
    """Per ratio: quality per task, FLOPs, extra parameters, and the first latency measured."""
    timed = next(iter(_by_shape(report)), None)

    def line(name: str, scores: Scores, reference: Scores) -> dict[str, str]:
        cells = {task: _score(scores.get(task), reference.get(task)) for task in report.tasks}
        mean = _score(report.mean(scores), report.mean(reference))
        return {"k": name, **cells, "mean of classification": mean}

    lines = []
    for entry in report.ratios:
        costs = {
            "encoder GFLOP": f"{entry.encoder_flops / 1e9:.3f}",
            "saved": f"{entry.flops_saved:.1%}",
            "extra parameters": f"{entry.extra_parameters:,}",
            "share": f"{entry.extra_parameters_share:.2%}",
        }
        for row in entry.latency:
            if row.shape == timed:
                costs[f"latency, {timed}"] = f"{row.milliseconds:.2f} ms"
                costs["speed-up"] = f"{row.speedup:.2f}"
        lines.append(line(entry.label, entry.quality, report.reference) | costs)
    if report.control_no_ffn:
        lines.append(line("no encoder FFN", report.control_no_ffn, report.reference))
    return _table([*lines, line("majority", report.majority, {})])


def details_table(report: Report) -> str:
    """Further scores of each task, one row each and one column per ratio; empty without any."""
    ratios = {f"k={entry.label}": entry.details for entry in report.ratios}
    lines = [
        {"task": task, "score": name}
        | {k: _score(details.get(task, {}).get(name), None) for k, details in ratios.items()}
        for task in report.ratios[0].details
        # Some are of plugins only.
        for name in dict.fromkeys(key for own in ratios.values() for key in own.get(task, ()))
        if name not in _HEADLINES
    ]
    return _table(lines)


def latency_table(report: Report) -> str:
    """Every latency: shape, ratio, time, speed-up, and what share of the allowed one that is."""
    lines = [
        {
            "shape": row.config,
            "batch": str(row.batch),
            "length": str(row.length),
            "k": label,
            "encoder ms (quartile distance)": f"{row.milliseconds:.2f} ({row.spread:.2f})",
            "speed-up": f"{row.speedup:.2f}",
            "FLOPs allow": f"{row.flops_allowed_speedup:.2f}",
            "reached": f"{row.speedup / row.flops_allowed_speedup:.0%}",
        }
        for rows in _by_shape(report).values()
        for label, row in rows.items()
    ]
    return _table(lines)


def _table(lines: Sequence[Mapping[str, str]]) -> str:
    """A table of rows that are cells by column, some of which may be absent; empty for no row."""
    header = list(dict.fromkeys(name for line in lines for name in line))
    rows = [[line.get(name, NONE) for name in header] for line in lines]
    return markdown_table(header, rows) if rows else ""


def _by_shape(report: Report) -> dict[str, dict[str, Latency]]:
    """Shape -> ratio or plugin -> latency."""
    rows: dict[str, dict[str, Latency]] = {}
    for entry in report.ratios:
        for row in entry.latency:
            rows.setdefault(row.shape, {})[entry.label] = row
    return rows


def _weak_tasks(report: Report) -> list[str]:
    """A sentence for each task on which the backbone is hardly above the majority class."""
    reference = report.reference
    margins = {t: reference[t] - score for t, score in report.majority.items() if t in reference}
    return [
        f"{task}: the uncompressed backbone is {margin:+.1f} points from always answering the "
        "majority class, so a plugin's score on this task has no meaning."
        for task, margin in margins.items()
        if margin < MIN_MARGIN
    ]


def _score(score: float | None, reference: float | None) -> str:
    if score is None:
        return NONE
    return f"{score:.1f}" if reference is None else f"{score:.1f} ({score - reference:+.1f})"


def plot_report(report: Report, path: Path) -> None:
    """Draws quality against ratio, and measured next to allowed speed-up, as a PNG at `path`."""
    with figure(path, 2, (10.5, 4.9)) as (_, (left, right)):
        _draw_quality(left, report)
        _draw_speedup(right, report)
        for axes in (left, right):
            axes.set_xlabel("compression ratio k (hidden vectors merged into one), or plugin")
            place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16), "ncols": 2}
            axes.legend(frameon=False, fontsize=8, **place)


def _draw_quality(axes: Any, report: Report) -> None:
    """A line per task; dashed: uncompressed, dotted: no encoder FFN, triangle: majority class."""
    labels = [entry.label for entry in report.ratios]
    triangle = {"marker": "<", "ms": 8, "ls": ""}
    for i, (task, colour) in enumerate(zip(report.tasks, colours(len(report.tasks)), strict=True)):
        scores = [entry.quality.get(task, float("nan")) for entry in report.ratios]
        axes.plot(labels, scores, "o-", color=colour, label=task, zorder=3)
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
    shapes = _by_shape(report)
    hollow = {"mfc": "white", "lw": 0.9}
    for (shape, rows), colour in zip(shapes.items(), colours(len(shapes)), strict=True):
        speedups = [row.speedup for row in rows.values()]
        allowed = [row.flops_allowed_speedup for row in rows.values()]
        # The spread of the time, carried over to the speed-up to first order.
        errors = [row.speedup * row.spread / (2 * row.milliseconds) for row in rows.values()]
        style = {"fmt": "o-", "capsize": 2, "color": colour, "zorder": 3}
        axes.errorbar(list(rows), speedups, yerr=errors, label=shape, **style)
        axes.plot(list(rows), allowed, "o--", color=colour, **hollow)
    axes.axhline(1.0, color=GREY, lw=0.6)
    axes.plot([], [], "o-", color=GREY, label="measured (half quartile distance)")
    axes.plot([], [], "o--", color=GREY, label="allowed by the saved FLOPs", **hollow)
    axes.set_title(f"Encoder speed on {report.hardware}", fontsize=9)
    axes.set_ylabel("encoder speed-up (times)")
