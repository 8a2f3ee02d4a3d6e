"""The report as Markdown: one table of quality and cost, one of latencies, the figures missed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from variator_jax.evaluation.schema import LatencyEntry, RatioEntry, Report, Scores
from variator_jax.evaluation.targets import Targets, classification_mean, targets_missed

_NONE = "–"
#: Points above the commonest label that a backbone needs on a task for it to say something.
TELLING = 2.0
_HEADLINES = ("accuracy", "token_f1")  # these are the scores of the first table


def report_markdown(report: Report, targets: Targets | None = None) -> str:
    """The whole `report.md`."""
    backbone = report.backbone
    sections = [
        f"# {backbone.name} at compression ratios {_listing(e.ratio for e in report.ratios)}",
        f"Backbone `{backbone.name}`, {backbone.parameters:,} parameters, fingerprint "
        f"`{backbone.fingerprint}`.  \nHardware: {report.hardware}.",
        quality_table(report),
        "Scores are on a scale of 0 to 100; in brackets the difference to the uncompressed "
        f"backbone. Encoder FLOPs are by formula, for one row of {report.encoder_length} tokens. "
        "Shares of parameters are of the whole backbone. The row *no encoder FFN* is the "
        "backbone with its encoder FFNs skipped, *majority* always answers the commonest label.",
        *_details_section(report),
        *_latency_section(report),
        *_promises(report, targets),
        _bullets([*report.notes, *weak_tasks(report)]),
        "## Time taken",
        _table(("stage", "seconds"), [(k, f"{v:.1f}") for k, v in report.seconds.items()]),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def weak_tasks(report: Report) -> list[str]:
    """A sentence for each task on which the backbone itself is hardly above the commonest label."""
    reference = report.at(1)
    above = {
        task: reference.quality[task] - majority
        for task, majority in report.majority.items()
        if reference and task in reference.quality
    }
    return [
        f"{task}: the uncompressed backbone is {points:+.1f} points from always answering the "
        "commonest label, so this task says nothing about plugins."
        for task, points in above.items()
        if points < TELLING
    ]


def _promises(report: Report, targets: Targets | None) -> tuple[str, ...]:
    if targets is None:
        return ()
    missed = targets_missed(report, targets)
    return (
        "## Promised figures",
        _bullets(missed) if missed else "All promised figures were reached.",
    )


def quality_table(report: Report) -> str:
    """Per ratio: quality per task, FLOPs, extra parameters, and the first latency measured."""
    shape = next((_shape(row) for entry in report.ratios for row in entry.latency), None)
    header = [
        "k",
        *report.tasks,
        "mean of classification",
        "encoder GFLOP",
        "saved",
        "extra parameters",
        "share",
    ]
    header += [f"latency, {_shape_words(shape)}", "speed-up"] if shape else []
    backbone = report.at(1)
    reference = backbone.quality if backbone else {}
    rows = [
        [
            str(entry.ratio),
            *_scores(report, entry.quality, reference),
            *_costs(entry),
            *_first_latency(entry, shape),
        ]
        for entry in report.ratios
    ]
    blank = [_NONE] * (4 + 2 * bool(shape))
    if report.control_no_ffn:
        rows.append(["no encoder FFN", *_scores(report, report.control_no_ffn, reference), *blank])
    rows.append(["majority", *_scores(report, report.majority, {}), *blank])
    return _table(header, rows)


def details_table(report: Report) -> str:
    """Further scores of each task, one row each and one column per ratio."""
    found = [
        (task, name)
        for task, scores in report.ratios[0].details.items()
        for name in scores
        if name not in _HEADLINES
    ]
    if not found:
        return ""
    rows = [
        [
            task,
            name,
            *(f"{e.details.get(task, {}).get(name, float('nan')):.1f}" for e in report.ratios),
        ]
        for task, name in found
    ]
    return _table(["task", "score", *(f"k={entry.ratio}" for entry in report.ratios)], rows)


def _details_section(report: Report) -> list[str]:
    table = details_table(report) if report.ratios else ""
    return ["## Further scores", table] if table else []


def latency_table(report: Report) -> str:
    """Every latency: shape, ratio, time, speed-up, and what share of the allowed one that is."""
    header = (
        "shape",
        "batch",
        "length",
        "k",
        "encoder ms (quartile distance)",
        "speed-up",
        "FLOPs allow",
        "reached",
    )
    measured = [(entry.ratio, row) for entry in report.ratios for row in entry.latency]
    shapes = list(dict.fromkeys(_shape(row) for _, row in measured))
    measured.sort(key=lambda pair: (shapes.index(_shape(pair[1])), pair[0]))
    rows = [
        (
            row.config,
            str(row.batch),
            str(row.length),
            str(ratio),
            f"{row.milliseconds:.2f} ({row.spread:.2f})",
            f"{row.speedup:.2f}",
            f"{row.flops_allowed_speedup:.2f}",
            f"{row.speedup / row.flops_allowed_speedup:.0%}",
        )
        for ratio, row in measured
    ]
    return _table(header, rows)


def _latency_section(report: Report) -> list[str]:
    if not any(entry.latency for entry in report.ratios):
        return []
    return [
        "## Encoder latency",
        f"Medians over interleaved rounds, rows without padding, on {report.hardware}. *FLOPs "
        "allow* is the speed-up if time were proportional to FLOPs.",
        latency_table(report),
    ]


def _scores(report: Report, scores: Scores, reference: Scores) -> list[str]:
    """One cell per task and one for the mean of the classification tasks."""
    cells = [_score(scores.get(task), reference.get(task)) for task in report.tasks]
    mean = classification_mean(report, scores)
    return [*cells, _score(mean, classification_mean(report, reference))]


def _score(score: float | None, reference: float | None) -> str:
    if score is None:
        return _NONE
    return f"{score:.1f}" if reference is None else f"{score:.1f} ({score - reference:+.1f})"


def _costs(entry: RatioEntry) -> list[str]:
    return [
        f"{entry.encoder_flops / 1e9:.3f}",
        f"{entry.flops_saved:.1%}",
        f"{entry.extra_parameters:,}",
        f"{entry.extra_parameters_share:.2%}",
    ]


def _first_latency(entry: RatioEntry, shape: tuple[str, int, int] | None) -> list[str]:
    if shape is None:
        return []
    row = next((row for row in entry.latency if _shape(row) == shape), None)
    return [_NONE, _NONE] if row is None else [f"{row.milliseconds:.2f} ms", f"{row.speedup:.2f}"]


def _shape(row: LatencyEntry) -> tuple[str, int, int]:
    return row.config, row.batch, row.length


def _shape_words(shape: tuple[str, int, int]) -> str:
    config, batch, length = shape
    return f"{config}, batch {batch}, length {length}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rule = ["-", *("-:" for _ in header[1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def _bullets(sentences: Iterable[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)


def _listing(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))
