"""What is measured once for a backbone, beside its cells: latency and activated neurons.

Each is kept in a file, like a cell; delete the file to measure again, on a quieter machine.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from variator_jax.backbones.t5 import T5
from variator_jax.bench.hardware import hardware
from variator_jax.bench.latency import measure_encoder_latency
from variator_jax.experiment.arms import METHOD, TEACHER, arms_named
from variator_jax.experiment.grid import Cell, Experiment
from variator_jax.experiment.neurons import activated_neurons
from variator_jax.experiment.score import task_data
from variator_jax.files import write_json
from variator_jax.store import Backbone, Plugin, load_backbone, load_plugin
from variator_jax.store.formats import backbone_folder, run_part

_ROUNDS = 15
_NEURON_BATCHES = 4


def latencies(experiment: Experiment) -> list[dict[str, Any]]:
    """Encoder passes of every backbone at every ratio of the method, in interleaved rounds."""
    if experiment.latency is None or METHOD not in experiment.arms:
        return []
    batch, length = experiment.latency
    asked = {"batch": batch, "length": length, "ratios": [*experiment.ratios]}
    return _kept(experiment, "latency", asked, lambda backbone: _time(experiment, backbone))


def neurons(experiment: Experiment) -> list[dict[str, Any]]:
    """Shares of activated neurons of every backbone, on its first task and seed."""
    if not experiment.neurons or METHOD not in experiment.arms:
        return []
    asked = {"task": experiment.tasks[0], "seed": experiment.seeds[0]}
    asked |= {"ratios": [*experiment.ratios]}
    return _kept(experiment, "neurons", asked, lambda backbone: _count(experiment, backbone))


def _kept(
    experiment: Experiment,
    kind: str,
    asked: Mapping[str, Any],
    measure: Callable[[str], list[dict[str, Any]]],
) -> list[dict[str, Any]]:
    """What was measured when the same was asked, or else a measurement now, which is kept."""
    found: list[dict[str, Any]] = []
    for backbone in experiment.backbones:
        file = Path(experiment.model_dir) / kind / f"{backbone}.json"
        kept = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if kept.get("asked") != asked:
            kept = {"asked": asked, "rows": measure(backbone)}
            write_json(file, kept)
        found += kept["rows"]
    return found


def _time(experiment: Experiment, backbone: str) -> list[dict[str, Any]]:
    batch, length = experiment.latency or (1, 1)  # known by now
    teacher, cells = _beside(experiment, backbone)
    plugins = {
        cell.ratio: (plugin.config, plugin.variables)
        for cell in cells
        for plugin in [_adapted(experiment, cell, teacher)]
    }
    config = teacher.config
    rows = measure_encoder_latency(config, teacher.params, plugins, batch, length, _ROUNDS)
    return [
        {
            "backbone": backbone,
            "arm": TEACHER if row.ratio == 1 else METHOD,
            "ratio": row.ratio,
            "batch": batch,
            "length": length,
            "dtype": config.dtype,
            "milliseconds": row.milliseconds,
            "spread": row.spread,
            "speedup": row.speedup,
            "allowed": row.flops_allowed_speedup,
            "hardware": hardware(),
        }
        for row in rows
    ]


def _count(experiment: Experiment, backbone: str) -> list[dict[str, Any]]:
    teacher, cells = _beside(experiment, backbone)
    data = task_data(experiment, cells[0])
    each = (itertools.islice(data.batches(task), _NEURON_BATCHES) for task in data.tasks())
    batches = list(itertools.chain.from_iterable(each))
    module = T5(teacher.config)
    found: list[dict[str, Any]] = []
    for cell in cells:
        plugin = _adapted(experiment, cell, teacher)
        counted = activated_neurons(
            module, teacher.params, plugin.config, plugin.variables, batches
        )
        rows = counted.rows(backbone)
        found += [{**row, "task": cell.task, "seed": cell.seed} for row in rows]
    return found


def _beside(experiment: Experiment, backbone: str) -> tuple[Backbone, list[Cell]]:
    """A backbone's first teacher and the method's cells beside it, one a ratio."""
    (method,) = (arm for arm in arms_named([METHOD]) if arm.name == METHOD)
    task, seed = experiment.tasks[0], experiment.seeds[0]
    cells = [Cell(backbone, task, method, ratio, seed) for ratio in experiment.ratios]
    return load_backbone(backbone_folder(str(experiment.teacher_folder(cells[0])))), cells


def _adapted(experiment: Experiment, cell: Cell, teacher: Backbone) -> Plugin:
    return load_plugin(run_part(str(experiment.adapted_folder(cell)), "plugin"), teacher)
