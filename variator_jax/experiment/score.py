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
from variator_jax.backbones.t5 import T5, shape_params
from variator_jax.backbones.t5.backbone import T5Stack
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
from variator_jax.experiment.stages import configure, scoring
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
from variator_jax.train.jobs import backbone_folder, run_part
from variator_jax.train.student import student_leaves


@dataclasses.dataclass(frozen=True)
class Setting:
    """What the arms of a cell start from.

    Attributes:
      adapted: the run folder of what the arm trained on the task.
      pretrained: the run folder of the plugin's pre-training.
      teacher: the fine-tuned backbone.
      data: the task's examples.
      method: the recipe's plugin at the cell's ratio; its FLOPs are those of the rivals.
    """

    adapted: str
    pretrained: str
    teacher: Backbone
    data: EvalData
    method: PluginConfig

    @property
    def stack(self) -> T5Stack:
        """The teacher's encoder."""
        return T5(self.teacher.config).stack()

    @property
    def length(self) -> int:
        """Tokens of an input, padding included."""
        return self.data.feature_lengths["inputs"]


@dataclasses.dataclass(frozen=True)
class Scored:
    """What a cell's arm runs: an encoder with a plugin or an intervention.

    Attributes:
      backbone: the weights.
      data: the task's examples.
      flops: of one encoder pass over a row of the task's length.
      plugin: settings of a plugin, None for none.
      variables: its arrays.
      intervention: in place of a plugin, None for none.
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
    """Scores a cell whose training is done.

    Returns:
      Its names, `score` (0 to 100), `details`, costs by formula, and when it was made.
    """
    started = time.monotonic()
    configure(experiment, scoring(experiment, cell))
    setting = Setting(
        str(experiment.adapted_folder(cell)),
        str(experiment.pretrained_folder(cell)),
        _load_teacher(backbone_folder(str(experiment.teacher_folder(cell)))),
        gin_utils.configured(EvalData)(),
        gin_utils.configured(PluginConfig)(ratio=cell.ratio),
    )
    scored = _ARMS[cell.arm.scored](setting, cell)
    runner = Runner(scored.backbone, scored.data)
    results = runner.results(scored.plugin, scored.variables, scored.intervention, str(cell))
    parameters = backbone_parameters(setting.teacher.config)
    return {
        "backbone": cell.backbone,
        "task": cell.task,
        "arm": cell.arm.name,
        "ratio": cell.ratio,
        "seed": cell.seed,
        **_summary(results),
        "encoder_length": setting.length,
        "flops_saved": 1.0 - scored.flops / stack_flops(setting.stack, setting.length),
        "extra_parameters": scored.extra_parameters,
        "extra_parameters_share": scored.extra_parameters / parameters,
        "parameters": parameters,
        "seconds": round(time.monotonic() - started, 3),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _summary(results: Mapping[str, TaskResult]) -> dict[str, Any]:
    """A task's score and its details; of a mixture the mean score, with each task's as details."""
    details = {name: result.score for name, result in results.items()}
    if len(results) == 1:
        details = dict(next(iter(results.values())).details)
    majorities = [result.majority for result in results.values() if result.majority is not None]
    return {
        "score": statistics.fmean(result.score for result in results.values()),
        "details": details,
        "examples": sum(result.examples for result in results.values()),
        "majority": statistics.fmean(majorities) if len(majorities) == len(results) else None,
    }


@functools.lru_cache(maxsize=2)  # a teacher serves many cells, one after the other
def _load_teacher(folder: str) -> Backbone:
    return load_backbone(folder)


def _teacher(setting: Setting, cell: Cell) -> Scored:
    return Scored(setting.teacher, setting.data, stack_flops(setting.stack, setting.length))


def _plugin(setting: Setting, cell: Cell) -> Scored:
    if cell.arm.adapted:
        plugin = load_plugin(run_part(setting.adapted, "plugin"), setting.teacher)
    else:  # It belongs to the backbone before fine-tuning.
        plugin = load_plugin(run_part(setting.pretrained, "plugin"))
    return _with_plugin(setting, plugin.config, plugin.variables)


def _mean_pool(setting: Setting, cell: Cell) -> Scored:
    plugin = dataclasses.replace(setting.method, compression="mean", decompression="repeat")
    return _with_plugin(setting, plugin, init_plugin(plugin, setting.stack, jax.random.key(0)))


def _with_plugin(setting: Setting, plugin: PluginConfig, variables: PluginVariables) -> Scored:
    flops = stack_flops(setting.stack, setting.length, plugin)
    extra = plugin_parameters(plugin, setting.stack)
    return Scored(setting.teacher, setting.data, flops, plugin, variables, extra_parameters=extra)


def _student(setting: Setting, cell: Cell) -> Scored:
    student = load_backbone(backbone_folder(setting.adapted))
    # Decoder and embeddings are the teacher's.
    leaves = jax.tree.leaves(student_leaves(shape_params(student.config)))
    flops = stack_flops(T5(student.config).stack(), setting.length)
    extra = sum(math.prod(leaf.shape) for leaf in leaves)
    return Scored(student, setting.data, flops, extra_parameters=extra)


def _no_ffn(setting: Setting, cell: Cell) -> Scored:
    stack, length = setting.stack, setting.length
    flops = sum(stack.flops(layer, length, length, 0) for layer in range(stack.layers))
    return _intervened(setting, flops, lambda mask: skip_encoder_ffn(stack))


def _similar_tokens(setting: Setting, cell: Cell) -> Scored:
    ratio = same_flops_ratio(setting.stack, setting.length, setting.method)
    flops = similar_tokens_flops(setting.stack, setting.length, ratio)
    return _intervened(setting, flops, functools.partial(merge_similar, ratio, setting.stack))


def _intervened(setting: Setting, flops: int, intervention: Intervention) -> Scored:
    return Scored(setting.teacher, setting.data, flops, intervention=intervention)


def _truncated(setting: Setting, cell: Cell) -> Scored:
    length = same_flops_length(setting.stack, setting.length, setting.method)
    data = _Truncated(**vars(setting.data), share=length / setting.length)
    return Scored(setting.teacher, data, stack_flops(setting.stack, length))


@dataclasses.dataclass(frozen=True)
class _Truncated(EvalData):
    """Examples that keep a share of their tokens, and the ending that all prompts have."""

    share: float = 1.0

    def batches(self, task: str) -> Iterator[Mapping[str, Any]]:
        """One pass over a task, the last batch filled up with empty rows."""
        first = list(itertools.islice(super().batches(task), 8))
        yield from truncated(super().batches(task), self.share, common_suffix(first))


_ARMS: dict[str, Callable[[Setting, Cell], Scored]] = {
    "teacher": _teacher,
    "plugin": _plugin,
    "student": _student,
    "mean_pool": _mean_pool,
    "no_ffn": _no_ffn,
    "similar_tokens": _similar_tokens,
    "truncated": _truncated,
}
