"""What is measured once per backbone, apart from its cells: latency and activated neurons.

Each is kept in a file, like a cell; delete the file to measure again, on a quieter machine.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from variator_jax import gin_utils
from variator_jax.backbones.t5 import T5
from variator_jax.bench.hardware import hardware
from variator_jax.bench.latency import measure_encoder_latency
from variator_jax.evaluation.evaluate import EvalData
from variator_jax.experiment.grid import ARMS, METHOD, TEACHER, Cell, Experiment
from variator_jax.experiment.neurons import activated_neurons
from variator_jax.experiment.stages import configure, scoring
from variator_jax.files import write_json
from variator_jax.plugin import PluginConfig, PluginVariables
from variator_jax.store import Backbone, load_backbone, load_plugin
from variator_jax.train.jobs import backbone_folder, run_part

_ROUNDS = 15
_NEURON_BATCHES = 4

Rows = list[dict[str, Any]]
Settings = tuple[PluginConfig, PluginVariables]


def latencies(experiment: Experiment) -> Rows:
    """Encoder passes of every backbone at every ratio of the method, in interleaved rounds."""
    if experiment.latency is None or METHOD not in experiment.arms:
        return []
    batch, length = experiment.latency
    request = {"batch": batch, "length": length, "ratios": [*experiment.ratios]}

    def measure(backbone: str) -> Rows:
        teacher, plugins = _load(experiment, backbone)
        settings = {cell.ratio: plugin for cell, plugin in plugins}
        rows = measure_encoder_latency(
            teacher.config, teacher.params, settings, batch, length, _ROUNDS
        )
        machine = {"batch": batch, "length": length, "dtype": teacher.config.dtype}
        machine["hardware"] = hardware()
        return [
            {"backbone": backbone, "arm": TEACHER if row.ratio == 1 else METHOD}
            | dataclasses.asdict(row)
            | {"allowed": row.flops_allowed_speedup, **machine}
            for row in rows
        ]

    return _kept(experiment, "latency", request, measure)


def neurons(experiment: Experiment) -> Rows:
    """Shares of activated neurons of every backbone, on its first task and seed.

    Returns:
      A row for each backbone, ratio and layer (a number or 'mean'): shares in [0, 1], see
      `activated_neurons`.
    """
    if not experiment.neurons or METHOD not in experiment.arms:
        return []
    first = {"task": experiment.tasks[0], "seed": experiment.seeds[0]}

    def measure(backbone: str) -> Rows:
        teacher, plugins = _load(experiment, backbone)
        configure(experiment, scoring(experiment, plugins[0][0]))
        data = gin_utils.configured(EvalData)()
        parts = (itertools.islice(data.batches(task), _NEURON_BATCHES) for task in data.tasks())
        batches = list(itertools.chain.from_iterable(parts))
        rows: Rows = []
        for cell, (config, variables) in plugins:
            network = T5(teacher.config)
            shares = activated_neurons(network, teacher.params, config, variables, batches)
            names = {"backbone": backbone, "ratio": cell.ratio, **first}
            layers = shares.reset_index().to_dict("records")
            rows += [{**names, **row} for row in [*layers, {"layer": "mean", **shares.mean()}]]
        return rows

    return _kept(experiment, "neurons", first | {"ratios": [*experiment.ratios]}, measure)


def _kept(
    experiment: Experiment, kind: str, request: Mapping[str, Any], measure: Callable[[str], Rows]
) -> Rows:
    """The kept measurements of every backbone; what is missing is measured and kept."""
    rows: Rows = []
    for backbone in experiment.backbones:
        file = Path(experiment.model_dir) / kind / f"{backbone}.json"
        kept = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if kept.get("asked") != request:
            kept = {"asked": request, "rows": measure(backbone)}
            write_json(file, kept)
        rows += kept["rows"]
    return rows


def _load(experiment: Experiment, backbone: str) -> tuple[Backbone, list[tuple[Cell, Settings]]]:
    """A backbone's first teacher, and the method's cell and plugin of each ratio."""
    task, seed = experiment.tasks[0], experiment.seeds[0]
    cells = [Cell(backbone, task, ARMS[METHOD], ratio, seed) for ratio in experiment.ratios]
    teacher = load_backbone(backbone_folder(str(experiment.teacher_folder(cells[0]))))
    plugins = []
    for cell in cells:
        plugin = load_plugin(run_part(str(experiment.adapted_folder(cell)), "plugin"), teacher)
        plugins.append((cell, (plugin.config, plugin.variables)))
    return teacher, plugins
