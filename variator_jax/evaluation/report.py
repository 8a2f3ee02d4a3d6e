"""Writes a report into a folder, as `report.json`, `report.md` and `report.png`, and reads it back.

What a report holds is said in `schema`, what it promises in `targets`, how it looks in `tables` and
`plots`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from variator_jax.errors import DataError
from variator_jax.evaluation.plots import plot_report
from variator_jax.evaluation.schema import Backbone, LatencyEntry, RatioEntry, Report
from variator_jax.evaluation.tables import report_markdown
from variator_jax.evaluation.targets import Targets, targets_missed


def write_report(report: Report, folder: Path | str, targets: Targets | None = None) -> list[str]:
    """Writes the three files, making the folder if needed, and returns the promised figures missed.

    Without `targets` nothing was promised, and nothing is said about it.

    Raises:
      DataError: for a report without ratios, or with a figure that is not finite.
    """
    _check(report)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    content = json.dumps(to_json(report, targets), indent=2, ensure_ascii=False, allow_nan=False)
    (folder / "report.md").write_text(report_markdown(report, targets), encoding="utf-8")
    plot_report(report, folder / "report.png")
    # Last and in one move, for whoever takes its presence to mean that the report is complete.
    draft = folder / "report.json.partial"
    draft.write_text(content + "\n", encoding="utf-8")
    draft.replace(folder / "report.json")
    return targets_missed(report, targets) if targets else []


def to_json(report: Report, targets: Targets | None = None) -> dict[str, Any]:
    """The report's fields as plain JSON values, and under `targets_missed` the figures missed."""
    missed = {"targets_missed": targets_missed(report, targets)} if targets else {}
    return {**dataclasses.asdict(report), **missed}


def read_report(path: Path | str) -> Report:
    """Reads a `report.json` back.

    Raises:
      DataError: if the file is absent, not JSON, or lacks a field.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"There is no report at {path}.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        content.pop("targets_missed", None)
        content["backbone"] = Backbone(**content["backbone"])
        content["ratios"] = tuple(_ratio_entry(entry) for entry in content["ratios"])
        content["notes"] = tuple(content.get("notes", ()))
        return Report(**content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not a report of this library: {error}") from error


def _ratio_entry(content: dict[str, Any]) -> RatioEntry:
    latency = tuple(LatencyEntry(**row) for row in content.get("latency", ()))
    return RatioEntry(**{**content, "latency": latency})


def _check(report: Report) -> None:
    if not report.ratios:
        raise DataError("A report needs at least one ratio.")
    for path, value in _numbers("", dataclasses.asdict(report)):
        if not math.isfinite(value):
            raise DataError(f"The report's figure {path} is {value}; a finite number was expected.")


def _numbers(path: str, value: Any) -> list[tuple[str, float]]:
    """All numbers of a nested value with their dotted paths."""
    if isinstance(value, dict):
        return [item for key in value for item in _numbers(f"{path}.{key}".lstrip("."), value[key])]
    if isinstance(value, (list, tuple)):
        return [item for i, each in enumerate(value) for item in _numbers(f"{path}[{i}]", each)]
    return [(path, value)] if isinstance(value, (int, float)) else []
