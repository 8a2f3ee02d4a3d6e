"""`variator eval`: quality and cost of one backbone at several compression ratios."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from variator_jax.backbones.t5 import T5, T5Config, get_config
from variator_jax.backbones.t5.cost import backbone_parameters
from variator_jax.bench.arguments import Shape
from variator_jax.bench.latency import measure_encoder_latency
from variator_jax.bench.output import hardware, log
from variator_jax.errors import ConfigError, check_whole
from variator_jax.evaluation import evaluator, schema, scorers, similarity
from variator_jax.evaluation.data import Batch, EvalData, features, load_for
from variator_jax.evaluation.report import report_markdown, write_report
from variator_jax.files import make_output
from variator_jax.mesh import place_everywhere
from variator_jax.model import Intervention, SplicedModel
from variator_jax.plugin import PluginConfig, PluginVariables
from variator_jax.store import Backbone, load_plugin
from variator_jax.store.formats import run_part
from variator_jax.store.plugins import Key, by_key

Settings = tuple[PluginConfig, PluginVariables | None]
_Timed = tuple[T5Config, Shape, int]


def evaluate(
    *,
    model_dir: str,
    data: EvalData,
    initial_checkpoint_path: str,
    plugin_paths: Sequence[str] | str = (),
    initial_lora_path: str | None = None,
    latency_shapes: Sequence[tuple[str, int, int]] = (),
    mesh_shape: Sequence[int] | None = None,
) -> schema.Report:
    """Scores a backbone without and with each plugin, and writes the report to `model_dir`.

    Args:
      model_dir: where `report.json`, `report.md` and `report.png` go.
      data: the tasks.
      initial_checkpoint_path: a backbone folder, or a run folder that holds one.
      plugin_paths: plugin folders or run folders, whose ratios or names differ.
      initial_lora_path: a LoRA folder or a run folder, merged into the backbone.
      latency_shapes: `(backbone name, batch, length)` to time, with an optional number of rounds.
      mesh_shape: `(data, fsdp, model)` devices; None chooses.

    Raises:
      VariatorError: if a plugin belongs to another backbone, or two have the same name.
    """
    started, shapes = time.monotonic(), [_latency_shape(fields) for fields in latency_shapes or ()]
    folder = make_output("MODEL_DIR", model_dir)
    backbone, mesh = load_for(data, initial_checkpoint_path, initial_lora_path, mesh_shape)
    notes = data.describe()
    config, length = backbone.config, data.feature_lengths["inputs"]
    settings = _settings(plugin_paths, backbone)
    shapes, untimed = _timed(shapes, config, [plugin for plugin, _ in settings.values()])
    notes += untimed
    runner = Runner(backbone, data, mesh)
    results = {ratio: runner.results(*setting) for ratio, setting in settings.items()}
    skip = functools.partial(scorers.skip_encoder_ffn, T5(config).stack())
    control = runner.results(None, None, lambda mask: skip(), "control without encoder FFNs")
    plugins = {ratio: plugin for ratio, (plugin, _) in settings.items()}
    log(f"  timing {', '.join(config.name for config, _, _ in shapes) or 'no encoder'}")
    latencies = [measure_encoder_latency(c, plugins, shape, rounds) for c, shape, rounds in shapes]
    rows = [
        schema.ratio_entry(
            *(config, plugins[ratio], length),
            quality=_scores(results[ratio]),
            identical_to_backbone=runner.identical(setting),
            latency=tuple(entries[ratio] for entries in latencies),
            details={
                task: {**result.details, **runner.similarity_kept(task, setting)}
                for task, result in results[ratio].items()
            },
        )
        for ratio, setting in settings.items()
    ]
    owner = schema.Backbone(config.name, backbone_parameters(config), backbone.fingerprint)
    seconds = {"evaluate": time.monotonic() - started}
    scores = _majorities(results[1]), rows, _scores(control)
    report = schema.Report(owner, hardware(), seconds, *scores, length, notes)
    write_report(report, folder)
    print(report_markdown(report))
    print(f"Written: {model_dir}/report.json, report.md, report.png")
    return report


def _majorities(results: Mapping[str, evaluator.TaskResult]) -> dict[str, float]:
    """Task -> score of the majority class, of the tasks that have one."""
    return {k: result.majority for k, result in results.items() if result.majority is not None}


def _timed(
    shapes: list[_Timed], config: T5Config, plugins: Sequence[PluginConfig]
) -> tuple[list[_Timed], list[str]]:
    """The shapes that have the layers of every plugin, and a note on each other one."""
    named = [plugin.name for plugin in plugins if any(site.layers for site in plugin.parts)]
    fits = lambda other: not named or other.num_encoder_layers == config.num_encoder_layers  # noqa: E731
    notes = [
        f"{other.name} is not timed: {named[0]} names layers of a backbone of "
        f"{config.num_encoder_layers}, and it has {other.num_encoder_layers}"
        for other, *_ in shapes
        if not fits(other)
    ]
    return [shape for shape in shapes if fits(shape[0])], notes


class Runner:
    """Scores every task of one backbone, with any plugin in place.

    On a mesh the backbone's arrays are in their places already (`load_for`).
    """

    def __init__(self, backbone: Backbone, data: EvalData, mesh: Mesh | None = None) -> None:
        self._network, self._mesh, self._data = T5(backbone.config), mesh, data
        self._params = backbone.params if mesh else jax.device_put(backbone.params)
        self._references: dict[str, np.ndarray] = {}  # task -> vectors without a plugin

    def results(
        self,
        config: PluginConfig | None,
        variables: PluginVariables | None,
        intervention: Intervention | None = None,
        name: str | None = None,
    ) -> dict[str, evaluator.TaskResult]:
        """Task -> result, with a plugin, or an intervention in its place, or neither.

        `name` is what the screen shows; by default the ratio.
        """
        model = SplicedModel(self._network, config, intervention)
        placed = place_everywhere(variables, self._mesh)
        results = {task: self._result(task, model, placed) for task in self._data.tasks()}
        name = name or (config.name if config and config.name else "ratio 1")
        log(f"  {name}: " + "  ".join(f"{k} {v:.1f}" for k, v in _scores(results).items()))
        return results

    def identical(self, setting: Settings) -> bool:
        """Whether the encoder's states are those of the bare module on each task, bit by bit."""
        encoders = self._encoder(None), self._encoder(setting)
        batches = (next(self._data.batches(task)) for task in self._data.tasks())
        states = ([np.asarray(encode(batch)).tobytes() for encode in encoders] for batch in batches)
        return all(bare == spliced for bare, spliced in states)

    def similarity_kept(self, task: str, setting: Settings) -> dict[str, float]:
        """How far a plugin keeps the similarities of a task's texts; nothing at ratio 1."""
        config, _ = setting
        if config.ratio == 1:
            return {}
        if task not in self._references:
            self._references[task] = self._vectors(task, None)
        return similarity.similarity_kept(self._vectors(task, setting), self._references[task])

    def _vectors(self, task: str, setting: Settings | None) -> np.ndarray:
        return similarity.pooled_vectors(self._data.batches(task), self._encoder(setting))

    def _encoder(self, setting: Settings | None) -> Callable[[Batch], Any]:
        """Batch -> the encoder's states with a plugin, or without."""
        config, variables = setting or (None, None)
        encode = scorers.encoder(SplicedModel(self._network, config), self._mesh)
        return functools.partial(encode, self._params, place_everywhere(variables, self._mesh))

    def _result(
        self, task: str, model: SplicedModel, variables: PluginVariables | None
    ) -> evaluator.TaskResult:
        from variator_jax.data.batches import accepted_answers
        from variator_jax.data.spec import get_spec, prefix_ids, verbalizer_ids

        spec, batches = get_spec(task), self._data.batches(task)
        vocabulary = features(task)["targets"].vocabulary

        def bind(scorer: scorers.Scorer) -> Callable[[Batch], Any]:
            return functools.partial(scorer, self._params, variables)

        if spec.kind == "span_corruption":
            score = bind(scorers.target_scorer(model, self._mesh))
            return evaluator.evaluate_span_corruption(spec, batches, score)
        if spec.kind == "generation":
            length = self._data.feature_lengths["targets"]
            answers = accepted_answers(task, self._data.split)
            score = bind(scorers.generator(model, length, self._mesh))
            return evaluator.evaluate_generation(spec, batches, score, vocabulary.decode, answers)
        labels = verbalizer_ids(spec, vocabulary.encode, vocabulary.unk_id)
        position = len(prefix_ids(spec, vocabulary.encode, vocabulary.unk_id))
        score = bind(scorers.label_scorer(model, tuple(labels), position, self._mesh))
        return evaluator.evaluate_classification(spec, batches, score, labels, position)


def _scores(results: Mapping[str, evaluator.TaskResult]) -> dict[str, float]:
    return {task: result.score for task, result in results.items()}


def _settings(paths: Sequence[str] | str, backbone: Backbone) -> dict[Key, Settings]:
    """Ratio or name -> plugin, in rising order of ratio; the backbone itself first."""
    paths = [paths] if isinstance(paths, str) else paths or ()
    folders = [run_part(path, "plugin") for path in paths]
    plugins = by_key(load_plugin(folder, backbone) for folder in folders)
    settings: dict[Key, Settings] = {1: (PluginConfig(ratio=1), None)}
    return settings | {key: (p.config, p.variables) for key, p in plugins.items()}


def _latency_shape(fields: Sequence[Any]) -> _Timed:
    """Backbone's shape, rows and tokens, rounds."""
    if isinstance(fields, str) or not 3 <= len(fields) <= 4:
        example = "(backbone, batch, length), such as ('t5_1_0_base', 4, 256)"
        raise ConfigError(f"LATENCY_SHAPES holds {fields!r}; each is {example}.")
    name, batch, length, *more = fields
    rounds = more[0] if more else 7
    for number in (batch, length, rounds):
        check_whole(f"A number of LATENCY_SHAPES' {fields!r}", number)
    return get_config(name), Shape(batch, length), rounds
