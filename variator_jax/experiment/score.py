"""Scores one cell: an arm's quality on its task, and what it costs, as a record for JSON."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from variator_jax import gin_utils
from variator_jax.backbones.base import Stack
from variator_jax.backbones.t5 import T5, shape_params
from variator_jax.backbones.t5.cost import backbone_parameters
from variator_jax.evaluation.control import skip_encoder_ffn
from variator_jax.evaluation.data import EvalData
from variator_jax.evaluation.evaluate import Runner
from variator_jax.evaluation.evaluator import TaskResult
from variator_jax.experiment import similar_tokens, truncation
from variator_jax.experiment.grid import Cell, Experiment
from variator_jax.experiment.stages import configure, scoring
from variator_jax.model import Intervention
from variator_jax.plugin import (
    PluginConfig,
    PluginVariables,
    init_plugin,
    plugin_parameters,
    stack_flops,
)
from variator_jax.store import Backbone, load_backbone, load_plugin
from variator_jax.train.jobs import backbone_folder, run_part
from variator_jax.train.student import student_leaves


@dataclasses.dataclass(frozen=True)
class Scored:
    """What a cell's arm runs: an encoder, with a plugin or an intervention in place.

    Attributes:
      backbone: the weights.
      data: the task's examples.
      plugin: settings of a plugin, None for none.
      variables: its arrays.
      intervention: in place of a plugin, None for none.
      flops: of one encoder pass over a row of the task's length; None for those of the plugin.
      extra_parameters: trained weights in addition to the teacher's, without the plugin's.
    """

    backbone: Backbone
    data: EvalData
    plugin: PluginConfig | None = None
    variables: PluginVariables | None = None
    intervention: Intervention | None = None
    flops: int | None = None
    extra_parameters: int = 0

    @property
    def stack(self) -> Stack:
        """The encoder."""
        return T5(self.backbone.config).stack()

    @property
    def length(self) -> int:
        """Tokens of an input, padding included."""
        return self.data.feature_lengths["inputs"]


def score_cell(experiment: Experiment, cell: Cell) -> dict[str, Any]:
    """Scores a cell whose training is done.

    Returns:
      Its names, `score` (0 to 100), `details`, costs by formula, and when it was made.
    """
    configure(experiment, scoring(experiment, cell))
    data = gin_utils.configured(EvalData)()
    method = gin_utils.configured(PluginConfig)(ratio=cell.ratio)
    backbone = _load_teacher(backbone_folder(str(experiment.teacher_folder(cell))))
    teacher = Scored(backbone, data)
    arm = _ARMS[cell.arm.scored](experiment, cell, teacher, method)
    runner = Runner(arm.backbone, arm.data)
    results = runner.results(arm.plugin, arm.variables, arm.intervention, str(cell))
    flops = arm.flops or stack_flops(arm.stack, arm.length, arm.plugin)
    extra = arm.extra_parameters
    if arm.plugin is not None:
        extra = plugin_parameters(arm.plugin, arm.stack)
    parameters = backbone_parameters(backbone.config)
    return {
        "backbone": cell.backbone,
        "task": cell.task,
        "arm": cell.arm.name,
        "ratio": cell.ratio,
        "seed": cell.seed,
        **_summary(results),
        "encoder_length": teacher.length,
        "flops_saved": 1.0 - flops / stack_flops(teacher.stack, teacher.length),
        "extra_parameters": extra,
        "extra_parameters_share": extra / parameters,
        "parameters": parameters,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _summary(results: Mapping[str, TaskResult]) -> dict[str, Any]:
    """A task's score and its details; of a mixture the mean score, with each task's as details."""
    details: Mapping[str, float] = {name: result.score for name, result in results.items()}
    if len(results) == 1:
        details = next(iter(results.values())).details
    majorities = [r.majority for r in results.values() if r.majority is not None]
    return {
        "score": statistics.fmean(result.score for result in results.values()),
        "details": dict(details),
        "examples": sum(result.examples for result in results.values()),
        "majority": statistics.fmean(majorities) if len(majorities) == len(results) else None,
    }


@functools.lru_cache(maxsize=2)  # a teacher serves many cells, one after the other
def _load_teacher(folder: str) -> Backbone:
    return load_backbone(folder)


# One function for each way to score. All take an experiment, a cell, its teacher, and the recipe's
# plugin at the cell's ratio, whose FLOPs are those of the baselines.


def _plugin(experiment: Experiment, cell: Cell, teacher: Scored, method: PluginConfig) -> Scored:
    if cell.arm.adapted:
        folder, owner = experiment.adapted_folder(cell), teacher.backbone
    else:  # It belongs to the backbone before fine-tuning.
        folder, owner = experiment.pretrained_folder(cell), None
    plugin = load_plugin(run_part(str(folder), "plugin"), owner)
    return dataclasses.replace(teacher, plugin=plugin.config, variables=plugin.variables)


def _mean_pool(experiment: Experiment, cell: Cell, teacher: Scored, method: PluginConfig) -> Scored:
    plugin = dataclasses.replace(method, compression="mean", decompression="repeat")
    variables = init_plugin(plugin, teacher.stack, jax.random.key(0))
    return dataclasses.replace(teacher, plugin=plugin, variables=variables)


def _student(experiment: Experiment, cell: Cell, teacher: Scored, method: PluginConfig) -> Scored:
    student = load_backbone(backbone_folder(str(experiment.adapted_folder(cell))))
    # Decoder and embeddings are the teacher's.
    leaves = jax.tree.leaves(student_leaves(shape_params(student.config)))
    extra = sum(math.prod(leaf.shape) for leaf in leaves)
    return dataclasses.replace(teacher, backbone=student, extra_parameters=extra)


def _no_ffn(experiment: Experiment, cell: Cell, teacher: Scored, method: PluginConfig) -> Scored:
    stack, length = teacher.stack, teacher.length
    flops = sum(stack.flops(layer, length, length, 0) for layer in range(stack.layers))
    control = dataclasses.replace(teacher, flops=flops)
    return dataclasses.replace(control, intervention=lambda mask: skip_encoder_ffn(stack))


def _similar(experiment: Experiment, cell: Cell, teacher: Scored, method: PluginConfig) -> Scored:
    stack, length = teacher.stack, teacher.length
    ratio = similar_tokens.same_flops_ratio(stack, length, method)
    flops = similar_tokens.similar_tokens_flops(stack, length, ratio)
    intervention = functools.partial(similar_tokens.merge_similar, ratio, stack)
    return dataclasses.replace(teacher, flops=flops, intervention=intervention)


def _truncated(experiment: Experiment, cell: Cell, teacher: Scored, method: PluginConfig) -> Scored:
    length = truncation.same_flops_length(teacher.stack, teacher.length, method)
    data = _Truncated(**vars(teacher.data), share=length / teacher.length)
    return dataclasses.replace(teacher, data=data, flops=stack_flops(teacher.stack, length))


@dataclasses.dataclass(frozen=True)
class _Truncated(EvalData):
    """Examples that keep a share of their tokens, and the ending that all prompts have."""

    share: float = 1.0

    def batches(self, task: str) -> Iterator[Mapping[str, Any]]:
        """One pass over a task, the last batch filled up with empty rows."""
        first = list(itertools.islice(super().batches(task), 8))
        suffix = truncation.common_suffix(first)
        yield from truncation.truncated(super().batches(task), self.share, suffix)


_ARMS: dict[str, Callable[[Experiment, Cell, Scored, PluginConfig], Scored]] = {
    "teacher": lambda experiment, cell, teacher, method: teacher,
    "plugin": _plugin,
    "student": _student,
    "mean_pool": _mean_pool,
    "no_ffn": _no_ffn,
    "similar_tokens": _similar,
    "truncated": _truncated,
}
