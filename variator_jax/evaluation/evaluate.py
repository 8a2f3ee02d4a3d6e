"""`variator eval`: one backbone at several compression ratios, and the report on quality and cost.

Puts data, scorers, latency and report together; what each of them does lives in `evaluation/`.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from variator_jax.backbones.t5 import T5, get_config
from variator_jax.backbones.t5.cost import backbone_parameters
from variator_jax.bench import latency
from variator_jax.bench.hardware import hardware
from variator_jax.errors import ConfigError
from variator_jax.evaluation import evaluator, scorers
from variator_jax.evaluation.control import skip_encoder_ffn
from variator_jax.evaluation.report import write_report
from variator_jax.evaluation.schema import Backbone as BackboneEntry
from variator_jax.evaluation.schema import LatencyEntry, Report, latency_entry, ratio_entry
from variator_jax.evaluation.tables import report_markdown
from variator_jax.mesh import compile_on, mesh_or_none, place_everywhere, place_parameters
from variator_jax.model import Intervention, SplicedModel
from variator_jax.plugin import PluginConfig, PluginVariables, init_plugin
from variator_jax.store import Backbone, Plugin, load_backbone, load_plugin
from variator_jax.store.formats import backbone_folder, run_part
from variator_jax.train.settings import check_vocabulary, task_vocabulary

_TOKENS = "encoder_input_tokens"
Settings = tuple[PluginConfig, PluginVariables | None]


@dataclasses.dataclass(frozen=True)
class LatencyShape:
    """An encoder to time: `batch` rows of `length` tokens on the named backbone, random weights."""

    config: str
    batch: int
    length: int
    rounds: int = 7

    @classmethod
    def of(cls, fields: Sequence[Any]) -> LatencyShape:
        """From `(backbone name, batch, length)`, with an optional number of rounds."""
        if isinstance(fields, str) or not 3 <= len(fields) <= 4:
            raise ConfigError(
                f"LATENCY_SHAPES holds {fields!r}; each is (backbone, batch, length), such as "
                "('t5_1_0_base', 4, 256)."
            )
        get_config(fields[0])
        return cls(*fields)


@dataclasses.dataclass(frozen=True)
class EvalData:
    """The tasks to score, and how their examples are batched."""

    task: str  # a task, or a mixture whose tasks are scored one by one
    feature_lengths: Mapping[str, int]
    batch_size: int = 64
    split: str = "validation"

    def tasks(self) -> list[str]:
        """Names of the single tasks."""
        from variator_jax.data.batches import task_or_mixture

        return [task.name for task in getattr(task_or_mixture(self.task), "tasks", ())] or [
            self.task
        ]

    def batches(self, task: str) -> Iterator[Mapping[str, Any]]:
        """One pass over a task, the last batch filled up with empty rows."""
        from variator_jax.data.batches import batches

        return batches(
            task,
            self.split,
            self.batch_size,
            self.feature_lengths,
            shuffle=False,
            repeat=False,
            pad_last=True,
        )


def evaluate(
    *,
    model_dir: str,
    data: EvalData,
    initial_checkpoint_path: str,
    plugin_paths: Sequence[str] | str = (),
    initial_lora_path: str | None = None,
    latency_shapes: Sequence[tuple[str, int, int]] = (),
    mesh_shape: Sequence[int] | None = None,
) -> Report:
    """Scores a backbone without and with each plugin, and writes the report to `model_dir`.

    Args:
      model_dir: where `report.json`, `report.md` and `report.png` go.
      data: the tasks.
      initial_checkpoint_path: a backbone folder, or a run folder that holds one.
      plugin_paths: plugin folders or run folders, one a ratio.
      initial_lora_path: a LoRA folder or a run folder, merged into the backbone.
      latency_shapes: `(backbone name, batch, length)` to time; any size, weights do not matter.
      mesh_shape: `(data, fsdp, model)` devices; None chooses.

    Raises:
      VariatorError: if a plugin belongs to another backbone, or two have the same ratio.
    """
    started = time.monotonic()
    backbone = load_backbone(backbone_folder(initial_checkpoint_path), lora=initial_lora_path)
    paths = [plugin_paths] if isinstance(plugin_paths, str) else plugin_paths
    plugins = _load_plugins(paths, backbone)
    shapes = [LatencyShape.of(fields) for fields in latency_shapes]
    for task in data.tasks():
        vocabulary = task_vocabulary(task)
        check_vocabulary(task, vocabulary, backbone.config, backbone.vocabulary_fingerprint)
    settings: dict[int, Settings] = {1: (PluginConfig(ratio=1), None)} | {
        ratio: (plugin.config, plugin.variables) for ratio, plugin in sorted(plugins.items())
    }
    runner = Runner(backbone, data, mesh_or_none(backbone.config, data.batch_size, mesh_shape))
    stack = T5(backbone.config).stack()
    results = {ratio: runner.results(*setting) for ratio, setting in settings.items()}
    control = runner.results(
        None, None, lambda mask: skip_encoder_ffn(stack), "control without encoder FFNs"
    )
    identical = {ratio: runner.identical(*setting) for ratio, setting in settings.items()}
    times = _latencies(shapes, settings)
    length = data.feature_lengths["inputs"]
    report = Report(
        backbone=BackboneEntry(
            backbone.config.name, backbone_parameters(backbone.config), backbone.fingerprint
        ),
        hardware=hardware(),
        seconds={"evaluate": time.monotonic() - started},
        majority=runner.majority,
        ratios=[
            ratio_entry(
                backbone.config,
                config,
                length,
                _scores(results[ratio]),
                identical[ratio],
                times[ratio],
                {task: result.details for task, result in results[ratio].items()},
            )
            for ratio, (config, _) in settings.items()
        ],
        control_no_ffn=_scores(control),
        encoder_length=length,
    )
    write_report(report, model_dir)
    print(report_markdown(report))
    print(f"Written: {model_dir}/report.json, report.md, report.png")
    return report


class Runner:
    """Scores every task of one backbone, with any plugin in place."""

    def __init__(self, backbone: Backbone, data: EvalData, mesh: Mesh | None = None) -> None:
        self._network, self._mesh = T5(backbone.config), mesh
        self._params = place_parameters(backbone.params, backbone.config, mesh)
        self._data = data
        self.majority: dict[str, float] = {}

    def results(
        self,
        config: PluginConfig | None,
        variables: PluginVariables | None,
        intervention: Intervention | None = None,
        name: str | None = None,
    ) -> dict[str, evaluator.TaskResult]:
        """Task -> result. Fills `majority` in on the way, which no plugin changes.

        Args:
          config: the plugin's settings, None for the backbone itself.
          variables: its arrays.
          intervention: a control or baseline in place of a plugin.
          name: what to call it on the screen; by default the ratio.
        """
        from variator_jax.data.spec import get_spec

        model = SplicedModel(self._network, config, intervention)
        placed = place_everywhere(variables, self._mesh)
        results = {}
        for task in self._data.tasks():
            spec = get_spec(task)
            functions = self._functions(spec, model, placed)
            result = evaluator.evaluate_task(spec, self._data.batches(task), **functions)
            results[task] = result
            if result.majority is not None:
                self.majority[task] = result.majority
        name = name or f"ratio {config.ratio if config else 1}"
        _say(f"  {name}: " + "  ".join(f"{k} {v:.1f}" for k, v in _scores(results).items()))
        return results

    def identical(self, config: PluginConfig, variables: PluginVariables | None) -> bool:
        """Whether the encoder's states are those of the bare module on each task, bit by bit."""
        calls = [
            compile_on(self._mesh, _encoder(SplicedModel(self._network, plugin)))
            for plugin in (None, config)
        ]
        arrays = (None, place_everywhere(variables, self._mesh))
        bare, spliced = (
            functools.partial(call, self._params, plugin)
            for call, plugin in zip(calls, arrays, strict=True)
        )
        batches = (next(iter(self._data.batches(task))) for task in self._data.tasks())
        tokens = ({_TOKENS: batch[_TOKENS]} for batch in batches)
        return evaluator.bit_identical(bare, spliced, tokens)

    def _functions(
        self, spec: Any, model: SplicedModel, variables: PluginVariables | None
    ) -> dict[str, Any]:
        from variator_jax.data.batches import accepted_answers, task_or_mixture

        vocabulary = task_or_mixture(spec.name).output_features["targets"].vocabulary
        if spec.kind == "generation":
            generate = compile_on(self._mesh, self._generate(model))
            return {
                "generate": lambda batch: generate(
                    self._params, variables, {_TOKENS: batch[_TOKENS]}
                ),
                "decode": vocabulary.decode,
                "references": accepted_answers(spec.name, self._data.split)
                if spec.many_answers
                else None,
            }
        if spec.kind == "classification":
            label_ids = evaluator.verbalizer_ids(spec, vocabulary.encode, vocabulary.unk_id)
            position = len(evaluator.prefix_ids(spec, vocabulary.encode, vocabulary.unk_id))
            scorer = scorers.label_scorer(model, label_ids, position, self._mesh)
            bound = functools.partial(scorer, self._params, variables)
            return {"score_batch": bound, "label_ids": label_ids, "label_position": position}
        scorer = scorers.target_scorer(model, self._mesh)
        return {"score_batch": functools.partial(scorer, self._params, variables)}

    def _generate(self, model: SplicedModel) -> Callable[..., jax.Array]:
        length = self._data.feature_lengths["targets"]

        def generate(params: dict, variables: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
            return model.generate(params, variables, batch[_TOKENS], length)

        return generate


def _encoder(model: SplicedModel) -> Callable[..., jax.Array]:
    return lambda params, variables, batch: model.encode(params, variables, batch[_TOKENS])


def _scores(results: Mapping[str, evaluator.TaskResult]) -> dict[str, float]:
    return {task: result.score for task, result in results.items()}


def _load_plugins(paths: Sequence[str], backbone: Backbone) -> dict[int, Plugin]:
    plugins: dict[int, Plugin] = {}
    for path in paths:
        plugin = load_plugin(run_part(path, "plugin"), backbone)
        ratio = plugin.config.ratio
        if ratio in plugins:
            raise ConfigError(f"PLUGIN_PATHS names two plugins of ratio {ratio}; give one a ratio.")
        plugins[ratio] = plugin
    return plugins


def _latencies(
    shapes: Sequence[LatencyShape], settings: Mapping[int, Settings]
) -> dict[int, list[LatencyEntry]]:
    rows: dict[int, list[LatencyEntry]] = {ratio: [] for ratio in settings}
    for shape in shapes:
        config = get_config(shape.config)
        # Plugins are trained per backbone; for the clock, fresh ones of the same kind serve.
        plugins = {
            ratio: (plugin, _fresh(plugin, config))
            for ratio, (plugin, _) in settings.items()
            if ratio > 1
        }
        _say(f"  timing the {shape.config} encoder, batch {shape.batch}, length {shape.length}")
        params = latency.random_params(config)
        measured = latency.measure_encoder_latency(
            config, params, plugins, shape.batch, shape.length, shape.rounds
        )
        for row in measured:
            rows[row.ratio].append(latency_entry(shape.config, shape.batch, shape.length, row))
    return rows


def _fresh(plugin: PluginConfig, config: Any) -> PluginVariables:
    return init_plugin(plugin, T5(config).stack(), jax.random.key(0))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
