"""Runs an experiment step by step in one process, which may be killed and started again.

A step that is done is never repeated; a run of training that was cut off continues from its own
checkpoint.
"""

from __future__ import annotations

import datetime
import json
import sys
import time
from collections.abc import Callable
from typing import Any

from variator_jax.errors import VariatorError
from variator_jax.experiment.grid import Cell, Experiment
from variator_jax.experiment.preflight import Configs, ExperimentLock
from variator_jax.experiment.stages import Step, plan
from variator_jax.files import write_json

RunTraining = Callable[[Experiment, Step], None]
# Returns a cell's record, ready for JSON.
ScoreCell = Callable[[Experiment, Cell], dict[str, Any]]


def drive(
    experiment: Experiment, configs: Configs, run_training: RunTraining, score_cell: ScoreCell
) -> list[dict[str, Any]]:
    """Runs what is missing and returns the records of all cells.

    Args:
      experiment: the grid.
      configs: of `preflight`.
      run_training: runs a step of training; see `stages.run_training`.
      score_cell: scores a cell whose training is done; see `score.score_cell`.

    Raises:
      ConfigError: if the folder was made with another recipe or other settings.
      VariatorError: from a step.
    """
    lock = ExperimentLock(experiment, configs)
    steps, started = plan(experiment), time.monotonic()
    for number, step in enumerate(steps, start=1):
        if step.done:
            continue
        elapsed = datetime.timedelta(seconds=int(time.monotonic() - started))
        print(f"[{number}/{len(steps)}] {step.name}  ({elapsed})", file=sys.stderr, flush=True)
        lock.begin(step)
        if step.cell is not None:
            record = score_cell(experiment, step.cell)
            write_json(step.result, record)
            print(f"    {step.cell}: {record['score']:.1f}", file=sys.stderr, flush=True)
            continue
        try:
            run_training(experiment, step)
        except (VariatorError, SystemExit):
            lock.withdraw(step)
            raise
        if not step.done:
            raise VariatorError(f"{step.name} ended without {step.result}.")
    files = map(experiment.cell_file, experiment.cells())
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def describe(experiment: Experiment) -> str:
    """What is done and what is missing, for `--dry_run`."""
    steps = plan(experiment)
    lines = [f"experiment {experiment.model_dir}, recipe {experiment.recipe}"]
    for kind in dict.fromkeys(step.kind for step in steps):
        done = [step.done for step in steps if step.kind == kind]
        lines.append(f"  {kind:<9} {sum(done)} of {len(done)} done")
    missing = [step.name for step in steps if not step.done]
    lines += [f"  missing: {name}" for name in missing[:20]]
    if len(missing) > 20:
        lines.append(f"  ... and {len(missing) - 20} more")
    return "\n".join(lines)
