"""What is measured of trained models: the score of each cell, and each backbone's latency and
activated neurons.

All of it is kept in files; delete one to measure again, such as latency on a quieter machine.

Neurons (the paper's Figure 5): a compressed FFN input stands for k tokens. If it makes more neurons
fire than one token does, and nearly as many as its k tokens together, the FFN still does the work
of all of them.

A neuron is one entry of what goes into the FFN's output kernel `wo`: the activation, and in a
gated FFN the product of both branches. Where ReLU takes part it fires when it is not 0, exactly.
GELU and SiLU are never quite 0; there a neuron fires when its magnitude exceeds the RMS of all
neurons for that same input: when it carries more than an even share of what the input calls up.
Like ReLU's, this rule does not see a vector's length, and a merged vector, being an average, is
mostly shorter than its members.
"""

import dataclasses
import functools
import itertools
import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from variator_jax import gin_utils
from variator_jax.backbones.base import Stack
from variator_jax.backbones.t5 import T5
from variator_jax.backbones.t5.cost import backbone_parameters
from variator_jax.bench.arguments import Shape
from variator_jax.bench.latency import measure_encoder_latency
from variator_jax.bench.output import hardware
from variator_jax.evaluation.data import EvalData
from variator_jax.evaluation.evaluate import Runner
from variator_jax.evaluation.evaluator import TaskResult
from variator_jax.evaluation.scorers import skip_encoder_ffn
from variator_jax.experiment import rivals
from variator_jax.experiment.grid import ARMS, METHOD, TEACHER, Cell, Experiment, configure, scoring
from variator_jax.files import write_json
from variator_jax.model import Intervention, SplicedModel
from variator_jax.plugin import PluginConfig, PluginVariables, init_plugin, intercept_modules
from variator_jax.plugin.arrays import plugin_parameters, stack_flops
from variator_jax.plugin.groups import make_groups, to_groups
from variator_jax.store import Backbone, Plugin, load_backbone, load_plugin
from variator_jax.train.student import student_leaves

_ROUNDS = 15
_NEURON_BATCHES = 4
_INPUTS = "encoder_input_tokens"

Rows = list[dict[str, Any]]
Measure = Callable[[list[Cell]], Rows]


@dataclasses.dataclass(frozen=True)
class Scored:
    """What a cell's arm runs: an encoder, with a plugin or an intervention in place.

    Attributes:
      backbone: the weights.
      data: the task's examples.
      plugin: settings of a plugin, None for none.
      variables: its arrays.
      intervention: in place of a plugin, None for none.
      flops: of one encoder pass over a row of the task's length; None for those of the teacher
        with the plugin.
      extra_parameters: trained weights beside the teacher's, without those of the plugin.
    """

    backbone: Backbone
    data: EvalData
    plugin: PluginConfig | None = None
    variables: PluginVariables | None = None
    intervention: Intervention | None = None
    flops: int | None = None
    extra_parameters: int = 0


def score_cell(experiment: Experiment, cell: Cell) -> dict[str, Any]:
    """Scores a cell whose training is done.

    Returns:
      Its names, `score` (0 to 100), `details`, costs by formula, and when it was made.
    """
    configure(experiment, scoring(experiment, cell))
    method = gin_utils.configured(PluginConfig)(ratio=cell.ratio)
    teacher = Scored(_teacher(experiment, cell), gin_utils.configured(EvalData)())
    stack, length = _encoder(teacher)
    arm = _arm(experiment, cell, teacher, method)
    runner = Runner(arm.backbone, arm.data)
    results = runner.results(arm.plugin, arm.variables, arm.intervention, str(cell))
    flops = arm.flops or stack_flops(stack, length, arm.plugin)
    extra = plugin_parameters(arm.plugin, stack) if arm.plugin else arm.extra_parameters
    parameters = backbone_parameters(teacher.backbone.config)
    return {
        **vars(cell),
        "arm": cell.arm.name,
        "sites": arm.plugin.description if arm.plugin else "",
        **_summary(results),
        "encoder_length": length,
        "flops_saved": 1.0 - flops / stack_flops(stack, length),
        "extra_parameters": extra,
        "extra_parameters_share": extra / parameters,
        "parameters": parameters,
    }


def latencies(experiment: Experiment) -> Rows:
    """Encoder passes of every backbone at every ratio of the method, in interleaved rounds."""
    if experiment.latency is None or METHOD not in experiment.arms:
        return []
    shape = Shape(*experiment.latency)

    def measure(cells: list[Cell]) -> Rows:
        config = _teacher(experiment, cells[0]).config
        plugins = {cell.ratio: _plugin(experiment, cell).config for cell in cells}
        names = {"backbone": cells[0].backbone, "dtype": config.dtype, "hardware": hardware()}
        return [
            {**dataclasses.asdict(row), "allowed": row.flops_allowed_speedup, **names}
            | {"arm": METHOD if ratio > 1 else TEACHER, "ratio": ratio}
            for ratio, row in measure_encoder_latency(config, plugins, shape, _ROUNDS).items()
        ]

    return _kept(experiment, "latency", dataclasses.asdict(shape), measure)


def neurons(experiment: Experiment) -> Rows:
    """Shares of activated neurons of every backbone, on its first task and seed.

    Returns:
      A row for each backbone, ratio and layer (a number or 'mean'): shares in [0, 1], see
      `activated_neurons`.
    """
    if not experiment.neurons or METHOD not in experiment.arms:
        return []

    def measure(cells: list[Cell]) -> Rows:
        teacher, rows = _teacher(experiment, cells[0]), []
        configure(experiment, scoring(experiment, cells[0]))
        data = gin_utils.configured(EvalData)()
        parts = (itertools.islice(data.batches(task), _NEURON_BATCHES) for task in data.tasks())
        batches = list(itertools.chain.from_iterable(parts))
        for cell in cells:
            plugin, network = _plugin(experiment, cell), T5(teacher.config)
            settings = (plugin.config, plugin.variables)
            shares = activated_neurons(network, teacher.params, *settings, batches)
            layers = shares.reset_index().to_dict("records")
            names = {name: getattr(cell, name) for name in ("backbone", "ratio", "task", "seed")}
            rows += [{**names, **row} for row in [*layers, {"layer": "mean", **shares.mean()}]]
        return rows

    first = {"task": experiment.tasks[0], "seed": experiment.seeds[0]}
    return _kept(experiment, "neurons", first, measure)


def _kept(experiment: Experiment, kind: str, request: dict[str, Any], measure: Measure) -> Rows:
    """The kept rows of every backbone; what is missing is measured, of the method's first cells."""
    rows: Rows = []
    task, seed = experiment.tasks[0], experiment.seeds[0]
    request = {**request, "ratios": [*experiment.ratios]}
    for backbone in experiment.backbones:
        file = Path(experiment.model_dir) / kind / f"{backbone}.json"
        kept = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if kept.get("asked") != request:
            cells = [Cell(backbone, task, ARMS[METHOD], ratio, seed) for ratio in experiment.ratios]
            kept = {"asked": request, "rows": measure(cells)}
            write_json(file, kept)
        rows += kept["rows"]
    return rows


def _summary(results: Mapping[str, TaskResult]) -> dict[str, Any]:
    """A task's score and its details; of a mixture the mean score, with each task's as details."""
    scores = {name: result.score for name, result in results.items()}
    first, *others = results.values()
    majorities = [r.majority for r in results.values() if r.majority is not None]
    return {
        "score": statistics.fmean(scores.values()),
        "details": scores if others else dict(first.details),
        "examples": sum(result.examples for result in results.values()),
        "majority": statistics.fmean(majorities) if len(majorities) == len(results) else None,
        "labelled": [name for name, result in results.items() if result.majority is not None],
        "scores": {name: [*result.scores] for name, result in results.items()},
    }


_load_backbone = functools.lru_cache(maxsize=2)(load_backbone)  # a teacher serves many cells


def _teacher(experiment: Experiment, cell: Cell) -> Backbone:
    return _load_backbone(experiment.teacher_folder(cell) / "backbone")


def _encoder(arm: Scored) -> tuple[Stack, int]:
    """The encoder, and the tokens of an input, padding included."""
    return T5(arm.backbone.config).stack(), arm.data.feature_lengths["inputs"]


def _plugin(experiment: Experiment, cell: Cell) -> Plugin:
    """The plugin of a cell; without adaptation it belongs to the backbone before fine-tuning."""
    if not cell.arm.adapted:
        return load_plugin(experiment.pretrained_folder(cell) / "plugin")
    return load_plugin(experiment.adapted_folder(cell) / "plugin", _teacher(experiment, cell))


def _arm(experiment: Experiment, cell: Cell, teacher: Scored, method: PluginConfig) -> Scored:
    """What a cell's arm runs; `method` is the plugin whose FLOPs the rivals may use."""
    stack, length = _encoder(teacher)
    changed = functools.partial(dataclasses.replace, teacher)
    match cell.arm.scored:
        case "plugin":
            plugin = _plugin(experiment, cell)
            return changed(plugin=plugin.config, variables=plugin.variables)
        case "mean_pool":
            config = rivals.mean_pool(method)
            variables = init_plugin(config, stack, jax.random.key(0))
            return changed(plugin=config, variables=variables)
        case "student":
            student = load_backbone(experiment.adapted_folder(cell) / "backbone")
            # Decoder and embeddings are the teacher's.
            extra = sum(leaf.size for leaf in student_leaves(student.params).values())
            flops = stack_flops(T5(student.config).stack(), length)
            return changed(backbone=student, flops=flops, extra_parameters=extra)
        case "no_ffn":
            flops = sum(stack.flops(layer, length, length, 0) for layer in range(stack.layers))
            return changed(flops=flops, intervention=lambda mask: skip_encoder_ffn(stack))
        case "similar_tokens":
            ratio = rivals.same_flops_ratio(stack, length, method)
            flops = rivals.similar_tokens_flops(stack, length, ratio)
            merge = functools.partial(rivals.merge_similar, ratio, stack)
            return changed(flops=flops, intervention=merge)
        case "truncated":
            shorter = rivals.same_flops_length(stack, length, method)
            data = _Truncated(**vars(teacher.data), share=shorter / length)
            return changed(flops=stack_flops(stack, shorter), data=data)
    return teacher


@dataclasses.dataclass(frozen=True)
class _Truncated(EvalData):
    """Examples that keep a share of their tokens, and the ending that all prompts have."""

    share: float = 1.0

    def batches(self, task: str, start: int = 0) -> Iterator[Mapping[str, Any]]:
        """One pass over a task, the last batch filled up with empty rows."""
        suffix = rivals.common_suffix(itertools.islice(super().batches(task), 8))
        yield from rivals.truncated(super().batches(task, start), self.share, suffix)


# Neurons that fire.


def activated_neurons(
    backbone: T5,
    params: Any,
    plugin: PluginConfig,
    variables: PluginVariables | None,
    batches: Iterable[Mapping[str, Any]],
) -> pd.DataFrame:
    """Shares of the encoder's FFN neurons that fire, with a plugin in place and without it.

    Args:
      backbone: the network; it runs without dropout and remat.
      params: its parameters.
      plugin: the plugin's settings; ratio 1 is the backbone itself.
      variables: the plugin's arrays; may be None at ratio 1.
      batches: with `encoder_input_tokens` `[batch, length]`, 0 on padding, one example a row. Few
        shapes are best: each is compiled once.

    Returns:
      A row for each encoder layer, the index, with shares in [0, 1] averaged over FFN inputs:
        share: of an FFN input of the spliced encoder, a merged group, or a token where the plugin
          leaves the layer alone. A group counts once, if it has a token at all.
        token: of one token in the uncompressed encoder.
        union: that fire for one or more members of a group in the uncompressed encoder: what the
          merged vector would have to make fire to lose nothing.

    Raises:
      PluginError: if no layer matches `plugin.sites`, or `variables` do not fit.
    """
    # Arrays that remat's layers compute cannot be carried out of them.
    count = _counter(T5(dataclasses.replace(backbone.config, remat=False)), plugin)
    counts = [count(params, variables, batch[_INPUTS]) for batch in batches]
    totals = jax.tree.map(lambda *parts: np.sum(parts, axis=0, dtype=np.float64), *counts)
    means = pd.Series({key: total / number for key, (total, number) in totals.items()})
    return means.unstack().rename_axis("layer").rename_axis(None, axis=1)


def _counter(backbone: T5, plugin: PluginConfig) -> Callable[..., dict]:
    """The jitted count of one batch: (layer, kind) -> (sum of shares, number of inputs)."""
    stack = backbone.stack()
    threshold = 0.0 if "relu" in backbone.config.mlp_activations else 1.0
    sites = [site for site in plugin.parts if site.merges(stack)]
    ratios = {layer: site.ratio for site in sites for layer in site.selected(stack)}

    def fires(hidden: jax.Array) -> jax.Array:
        # [batch, inputs, neurons]
        energy = jnp.square(hidden.astype(jnp.float32))
        return energy > threshold * jnp.mean(energy, axis=-1, keepdims=True)

    @jax.jit
    def count(params: Any, variables: Any, tokens: jax.Array) -> dict:
        mask = backbone.masks({_INPUTS: tokens})["encoder"]
        model = SplicedModel(backbone, plugin)
        plain = _ffn_hidden(stack, backbone.encode, params, tokens)
        spliced = _ffn_hidden(stack, model.encode, params, variables, {_INPUTS: tokens})
        counts = {}
        for layer in plain:
            # [batch, groups, k]; without regard to `pool_padding`: a group of padding is no input
            ratio = ratios.get(layer, 1)
            members = make_groups(mask, ratio).members
            groups = members.any(-1)
            token, merged = fires(plain[layer]), fires(spliced[layer])
            # [batch, groups, neurons]
            union = (to_groups(token, ratio) & members[..., None]).any(2)
            kinds = {"share": (merged, groups), "token": (token, mask.valid)}
            for kind, (fired, valid) in (kinds | {"union": (union, groups)}).items():
                # [batch, inputs, neurons] -> [2]
                shares = jnp.sum(fired.mean(-1), where=valid)
                counts[layer, kind] = jnp.stack([shares, jnp.sum(valid)])
        return counts

    return count


def _ffn_hidden(stack: Stack, encode: Callable[..., Any], *inputs: Any) -> dict[int, jax.Array]:
    """What goes into each FFN's `wo` in `encode(*inputs)`: `[batch, inputs, neurons]` by layer."""
    caught: dict[int, jax.Array] = {}
    layers = {f"{stack.path('ffn', layer)}/wo": layer for layer in range(stack.layers)}

    def catch(path: str, call: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        caught[layers[path]] = stack.stream("ffn", args, kwargs)
        return call(*args, **kwargs)

    with intercept_modules(layers.__contains__, catch):
        encode(*inputs)
    return caught
