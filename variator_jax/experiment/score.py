"""Scores one cell: an arm's quality on its task, and what it costs, as a record for JSON."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax

from variator_jax.backbones.t5 import T5, shape_params
from variator_jax.backbones.t5.cost import backbone_parameters
from variator_jax.evaluation.control import skip_encoder_ffn
from variator_jax.evaluation.evaluate import EvalData, Runner
from variator_jax.evaluation.evaluator import TaskResult
from variator_jax.experiment.grid import Cell, Experiment
from variator_jax.experiment.similar_tokens import (
    merge_similar,
    same_flops_ratio,
    similar_tokens_flops,
)
from variator_jax.experiment.stages import gin_arguments
from variator_jax.experiment.truncation import common_suffix, same_flops_length, truncated
from variator_jax.model import Intervention
from variator_jax.plugin import (
    PluginConfig,
    PluginVariables,
    init_plugin,
    plugin_parameters,
    stack_flops,
)
from variator_jax.store import Backbone, load_backbone, load_plugin
from variator_jax.store.formats import backbone_folder, run_part
from variator_jax.train.student import student_leaves

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Scored:
    """What a cell's arm runs: the encoder, what is spliced into it or stands in its place.

    Attributes:
      backbone: the weights.
      data: the task's examples.
      flops: of one encoder pass over a row of the task's length.
      plugin: settings of a plugin, None for none.
      variables: its arrays.
      intervention: what the backbone runs under in place of a plugin; None for none.
      extra_parameters: trained weights beside the backbone's.
    """

    backbone: Backbone
    data: EvalData
    flops: int
    plugin: PluginConfig | None = None
    variables: PluginVariables | None = None
    intervention: Intervention | None = None
    extra_parameters: int = 0


def score_cell(experiment: Experiment, cell: Cell) -> dict[str, Any]:
    """Scores a cell whose stages have ended.

    Returns:
      Its names, `score` (0 to 100), `details`, costs by formula, and when it was made.
    """
    started = time.monotonic()
    data = task_data(experiment, cell)
    teacher = _loaded(str(backbone_folder(str(experiment.teacher_folder(cell)))))
    scored = _SCORED[cell.arm.scored](experiment, cell, teacher, data)
    runner = Runner(scored.backbone, scored.data)
    results = runner.results(scored.plugin, scored.variables, scored.intervention, str(cell))
    whole = stack_flops(T5(teacher.config).stack(), _length(data))
    parameters = backbone_parameters(teacher.config)
    return {
        "backbone": cell.backbone,
        "task": cell.task,
        "arm": cell.arm.name,
        "ratio": cell.ratio,
        "seed": cell.seed,
        **_together(results),
        "encoder_length": _length(data),
        "flops_saved": 1.0 - scored.flops / whole,
        "extra_parameters": scored.extra_parameters,
        "extra_parameters_share": scored.extra_parameters / parameters,
        "parameters": parameters,
        "seconds": round(time.monotonic() - started, 3),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _together(results: Mapping[str, TaskResult]) -> dict[str, Any]:
    """A task's score and what belongs to it; of a mixture the mean, with each task's beside it."""
    if len(results) == 1:
        (only,) = results.values()
        details, majority = dict(only.details), only.majority
    else:
        details = {name: result.score for name, result in results.items()}
        known = [r.majority for r in results.values() if r.majority is not None]
        majority = statistics.fmean(known) if len(known) == len(results) else None
    return {
        "score": statistics.fmean(result.score for result in results.values()),
        "details": details,
        "examples": sum(result.examples for result in results.values()),
        "majority": majority,
    }


def task_data(experiment: Experiment, cell: Cell) -> EvalData:
    """The examples that a cell is scored on, as the recipe's score.gin and task file say."""
    return _configured(EvalData, experiment, cell)()


def method_plugin(experiment: Experiment, cell: Cell) -> PluginConfig:
    """The recipe's plugin at a cell's ratio: what has the same FLOPs has those of this one."""
    return _configured(PluginConfig, experiment, cell)(ratio=cell.ratio)


def _configured(kind: Callable[..., T], experiment: Experiment, cell: Cell) -> Callable[..., T]:
    from variator_jax import gin_utils

    arguments = gin_arguments(experiment, cell, "score")
    files = [a.partition("=")[2] for a in arguments if a.startswith("--gin_file=")]
    bindings = [a.removeprefix("--gin.") for a in arguments if a.startswith("--gin.")]
    folders = [*experiment.search_paths, gin_utils.engine_dir()]
    gin_utils.parse(files, bindings, folders, require=False)
    return gin_utils.configured(kind)


@functools.lru_cache(maxsize=2)  # a teacher serves many cells, one after the other
def _loaded(folder: str) -> Backbone:
    return load_backbone(folder)


def _length(data: EvalData) -> int:
    return data.feature_lengths["inputs"]


def _teacher(experiment: Experiment, cell: Cell, teacher: Backbone, data: EvalData) -> Scored:
    return Scored(teacher, data, stack_flops(T5(teacher.config).stack(), _length(data)))


def _plugin(experiment: Experiment, cell: Cell, teacher: Backbone, data: EvalData) -> Scored:
    folder = (
        experiment.adapted_folder(cell) if cell.arm.adapted else experiment.pretrained_folder(cell)
    )
    # A plugin that is not adapted belongs to the backbone before fine-tuning.
    plugin = load_plugin(run_part(str(folder), "plugin"), teacher if cell.arm.adapted else None)
    return _with_plugin(teacher, data, plugin.config, plugin.variables)


def _mean_pool(experiment: Experiment, cell: Cell, teacher: Backbone, data: EvalData) -> Scored:
    method = method_plugin(experiment, cell)
    plugin = dataclasses.replace(method, compression="mean", decompression="repeat")
    fresh = init_plugin(plugin, T5(teacher.config).stack(), jax.random.key(0))
    return _with_plugin(teacher, data, plugin, fresh)


def _with_plugin(
    teacher: Backbone, data: EvalData, plugin: PluginConfig, variables: PluginVariables
) -> Scored:
    stack = T5(teacher.config).stack()
    flops = stack_flops(stack, _length(data), plugin)
    extra = plugin_parameters(plugin, stack)
    return Scored(teacher, data, flops, plugin, variables, extra_parameters=extra)


def _student(experiment: Experiment, cell: Cell, teacher: Backbone, data: EvalData) -> Scored:
    student = load_backbone(backbone_folder(str(experiment.adapted_folder(cell))))
    config = student.config
    # What a student has of its own; decoder and embeddings are the teacher's.
    own = jax.tree.leaves(student_leaves(shape_params(config)))
    flops = stack_flops(T5(config).stack(), _length(data))
    return Scored(student, data, flops, extra_parameters=sum(math.prod(x.shape) for x in own))


def _no_ffn(experiment: Experiment, cell: Cell, teacher: Backbone, data: EvalData) -> Scored:
    stack, length = T5(teacher.config).stack(), _length(data)
    flops = sum(stack.flops(layer, length, length, 0) for layer in range(stack.layers))
    return Scored(teacher, data, flops, intervention=lambda mask: skip_encoder_ffn(stack))


def _similar(experiment: Experiment, cell: Cell, teacher: Backbone, data: EvalData) -> Scored:
    method = method_plugin(experiment, cell)
    stack = T5(teacher.config).stack()
    ratio = same_flops_ratio(stack, _length(data), method)
    flops = similar_tokens_flops(stack, _length(data), ratio)
    intervention = functools.partial(merge_similar, ratio, stack)
    return Scored(teacher, data, flops, intervention=intervention)


def _truncated(experiment: Experiment, cell: Cell, teacher: Backbone, data: EvalData) -> Scored:
    method = method_plugin(experiment, cell)
    stack = T5(teacher.config).stack()
    length = same_flops_length(stack, _length(data), method)
    share = length / _length(data)
    flops = stack_flops(stack, length)
    return Scored(teacher, Truncated(**_fields(data), share=share), flops)


@dataclasses.dataclass(frozen=True)
class Truncated(EvalData):
    """Examples that keep a share of their tokens; what all end with, the prompt's own, stays."""

    share: float = 1.0

    def batches(self, task: str) -> Iterator[Mapping[str, Any]]:
        """One pass over a task, the last batch filled up with empty rows."""
        first = list(itertools.islice(super().batches(task), 8))
        yield from truncated(super().batches(task), self.share, common_suffix(first))


def _fields(data: EvalData) -> dict[str, Any]:
    return {field.name: getattr(data, field.name) for field in dataclasses.fields(EvalData)}


_SCORED: dict[str, Callable[[Experiment, Cell, Backbone, EvalData], Scored]] = {
    "teacher": _teacher,
    "plugin": _plugin,
    "student": _student,
    "mean_pool": _mean_pool,
    "no_ffn": _no_ffn,
    "similar_tokens": _similar,
    "truncated": _truncated,
}
