"""Runs an experiment, stage after stage and cell after cell, in one process that may be killed.

A stage that ended and a cell that is written are never run again; a stage that was cut off goes on
from its own checkpoint. What a stage does is `variator train`'s business, a cell's is `score`'s.
"""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from variator_jax.errors import VariatorError
from variator_jax.experiment.claim import Claim
from variator_jax.experiment.grid import Cell, Experiment
from variator_jax.experiment.recipe import Configs
from variator_jax.experiment.stages import Stage, plan
from variator_jax.files import write_json

# Runs a stage's command; returns its exit code.
RunStage = Callable[[Sequence[str]], int]
# A cell's record, ready for JSON.
ScoreCell = Callable[[Experiment, Cell], dict[str, Any]]


def drive(
    experiment: Experiment,
    run_stage: RunStage,
    score_cell: ScoreCell,
    configs: Configs | None = None,
) -> list[dict]:
    """Runs what is missing and returns the records of all cells.

    Args:
      experiment: the grid.
      run_stage: runs the arguments of a `variator` command; not 0 ends the experiment.
      score_cell: scores one cell whose stages have ended.
      configs: what the recipe's files come to, from `recipe_configs`.

    Raises:
      ConfigError: if the folder holds an experiment with another recipe or other settings.
      VariatorError: if a stage failed.
    """
    claim = Claim(experiment, configs or {})
    steps = list(plan(experiment))
    progress = _Progress(experiment, steps)
    for number, step in enumerate(steps, start=1):
        if is_done(experiment, step):
            continue
        progress.begin(number, step)
        claim.begin(step)
        if isinstance(step, Cell):
            write_json(experiment.cell_file(step), score_cell(experiment, step))
        elif code := run_stage(step.command):
            # What was wrong has been printed. A run that was told to stop may be told to go on.
            claim.withdraw(step)
            raise SystemExit(code)
        elif not step.result.is_file():
            raise VariatorError(f"{step.name} ended without {step.result}.")
        progress.end(step)
    return [read_cell(experiment, cell) for cell in experiment.cells()]


def is_done(experiment: Experiment, step: Stage | Cell) -> bool:
    """Whether a stage or a cell needs no run."""
    file = experiment.cell_file(step) if isinstance(step, Cell) else step.result
    return file.is_file()


def read_cell(experiment: Experiment, cell: Cell) -> dict[str, Any]:
    """The record of a finished cell."""
    record: dict[str, Any] = json.loads(experiment.cell_file(cell).read_text(encoding="utf-8"))
    return record


def describe(experiment: Experiment) -> str:
    """What is there and what is missing, for `--dry_run`."""
    steps = list(plan(experiment))
    missing = [step for step in steps if not is_done(experiment, step)]
    lines = [f"experiment {experiment.model_dir}, recipe {experiment.recipe}"]
    for kind in dict.fromkeys(map(_kind, steps)):
        count, left = (sum(_kind(s) == kind for s in part) for part in (steps, missing))
        lines.append(f"  {kind:<9} {count - left} of {count} done")
    lines += [f"  missing: {step}" for step in map(_name, missing[:20])]
    if len(missing) > 20:
        lines.append(f"  ... and {len(missing) - 20} more")
    return "\n".join(lines)


class _Progress:
    """One line a step: how far the grid is, how long it took and what is left."""

    def __init__(self, experiment: Experiment, steps: Sequence[Stage | Cell]) -> None:
        self._experiment, self._steps = experiment, steps
        self._file = Path(experiment.model_dir) / "seconds.json"
        kept = json.loads(self._file.read_text()) if self._file.is_file() else {}
        self._seconds: dict[str, float] = kept
        self._began = self._started = time.monotonic()

    def begin(self, number: int, step: Stage | Cell) -> None:
        self._started = time.monotonic()
        gone, left = self._started - self._began, self._left()
        clock = f"{_clock(gone)} gone" + (f", {_clock(left)} left" if left else "")
        _say(f"[{number}/{len(self._steps)}] {_name(step)}  ({clock})")

    def end(self, step: Stage | Cell) -> None:
        self._seconds[_name(step)] = time.monotonic() - self._started
        write_json(self._file, self._seconds)
        if isinstance(step, Cell):
            record = read_cell(self._experiment, step)
            _say(f"    {step}: {record['score']:.1f}")

    def _left(self) -> float:
        """Seconds that the missing steps take if each takes the mean of its kind."""
        known: dict[str, list[float]] = defaultdict(list)
        for step in self._steps:
            if _name(step) in self._seconds:
                known[_kind(step)].append(self._seconds[_name(step)])
        means = {kind: sum(seconds) / len(seconds) for kind, seconds in known.items()}
        missing = [step for step in self._steps if not is_done(self._experiment, step)]
        return sum(means.get(_kind(step), 0.0) for step in missing)


def _kind(step: Stage | Cell) -> str:
    return "cell" if isinstance(step, Cell) else step.kind


def _name(step: Stage | Cell) -> str:
    return f"score {step}" if isinstance(step, Cell) else step.name


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
