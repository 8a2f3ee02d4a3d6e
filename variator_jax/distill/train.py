"""`variator train`: puts backbone, plugin, data and optimizer together and runs the loop.

Two kinds of run share everything but what is trained: a compression plugin beside a frozen backbone
(pre-training or adaptation, which differ in data and starting point only), or a whole backbone on a
task. The loop itself is `loop.py`; this module is glue.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import optax

from variator_jax.backbone import T5Config, Transformer, init_params
from variator_jax.checkpoints import (
    Backbone,
    load_backbone,
    load_plugin,
    save_backbone,
    save_plugin,
)
from variator_jax.checkpoints.backbone_folder import DESCRIPTION, file_fingerprint
from variator_jax.distill.checkpointing import Checkpoints
from variator_jax.distill.logs import RunLog
from variator_jax.distill.loop import HostBatch, Schedule, fit
from variator_jax.distill.losses import LossConfig
from variator_jax.distill.objectives import Distillation, Objective, TaskTraining, run
from variator_jax.distill.step import (
    TrainState,
    init_state,
    make_eval_step,
    make_train_step,
    mean_loss,
)
from variator_jax.errors import CheckpointError, ConfigError
from variator_jax.plugin import (
    PluginConfig,
    PluginVariables,
    calibrate,
    init_plugin,
    site_output_rms,
)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which examples a run sees.

    Attributes:
      task: name of a seqio task or mixture.
      feature_lengths: tokens of `inputs` and `targets`; longer ones are cut.
      batch_size: examples a step.
      eval_batches: batches of the validation split in one evaluation.
      seed: of the order of the examples.
    """

    task: str
    feature_lengths: Mapping[str, int]
    batch_size: int
    eval_batches: int = 8
    seed: int = 0

    def train(self, start: int) -> Iterator[HostBatch]:
        """The endless training batches from batch `start` on; the same ones in every run."""
        from variator_jax.data.batches import batches

        return batches(
            self.task,
            "train",
            self.batch_size,
            self.feature_lengths,
            seed=self.seed,
            start_batch=start,
        )

    def validation(self) -> list[HostBatch]:
        """The same `eval_batches` batches of the validation split each time, tasks mixed."""
        from variator_jax.data.batches import batches

        stream = batches(self.task, "validation", self.batch_size, self.feature_lengths, seed=0)
        return list(itertools.islice(stream, self.eval_batches))

    def vocabulary(self) -> Any:
        """The seqio vocabulary of the task's inputs."""
        from variator_jax.data.batches import task_or_mixture

        return task_or_mixture(self.task).output_features["inputs"].vocabulary


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How a run ended."""

    step: int
    interrupted: bool
    exported: pathlib.Path | None


@dataclasses.dataclass(frozen=True)
class _Job:
    """What a run trains: the one thing in which the two kinds of run differ."""

    objective: Objective
    params: Any  # where training starts
    frozen: Any
    identity: dict[str, Any]
    export: Callable[[Any, Mapping[str, Any]], pathlib.Path]


def train(
    *,
    model_dir: str,
    data: DataConfig,
    schedule: Schedule,
    optimizer: optax.GradientTransformation,
    backbone: T5Config,
    trained: str = "plugin",
    plugin: PluginConfig | None = None,
    loss: LossConfig | None = None,
    initial_checkpoint_path: str | None = None,
    initial_plugin_path: str | None = None,
    num_microbatches: int = 1,
    keep_checkpoints: int = 2,
    seed: int = 0,
) -> TrainResult:
    """Trains a plugin or a backbone and writes it to `model_dir`.

    A run that was stopped goes on from its newest checkpoint, and ends with the weights of one that
    was never stopped.

    Args:
      model_dir: the run folder.
      data: which examples.
      schedule: how long, and when to log, evaluate and save.
      optimizer: an optax transformation.
      backbone: the shape of the backbone.
      trained: 'plugin', or 'backbone' for the whole backbone on the task's own loss.
      plugin: the plugin's settings; for `trained='plugin'`.
      loss: the distillation losses' weights, the paper's by default; for `trained='plugin'`.
      initial_checkpoint_path: a backbone folder, or a run folder that holds one. Only a backbone
        that is trained may start without, from random weights.
      initial_plugin_path: a plugin folder or a run folder to adapt; None for a fresh plugin.
      num_microbatches: passes that a batch is cut into.
      keep_checkpoints: training checkpoints to keep.
      seed: of initialisation and dropout.

    Raises:
      VariatorError: for anything that cannot work, before the first step; or a loss that is not
        finite, at its step.
    """
    if trained not in ("plugin", "backbone"):
        raise ConfigError(f"TRAINED is {trained!r}; it is 'plugin' or 'backbone'.")
    vocabulary = _checked_vocabulary(data, backbone)
    start = _load_initial(initial_checkpoint_path, backbone, trained, vocabulary)
    if trained == "backbone" or start is None:
        job = _backbone_job(model_dir, backbone, start, vocabulary, seed)
    else:
        job = _plugin_job(
            model_dir, start, plugin, loss or LossConfig(), initial_plugin_path, data, seed
        )
    identity = job.identity | {"task": data.task, "batch_size": data.batch_size, "seed": data.seed}
    checkpoints = Checkpoints(model_dir, keep_checkpoints, identity)
    log = RunLog(model_dir, schedule.train_steps)
    try:
        _write_operative_config(model_dir)
        return _run(job, data, schedule, optimizer, num_microbatches, seed, checkpoints, log)
    finally:
        checkpoints.close()
        log.close()


def _run(
    job: _Job,
    data: DataConfig,
    schedule: Schedule,
    optimizer: optax.GradientTransformation,
    num_microbatches: int,
    seed: int,
    checkpoints: Checkpoints,
    log: RunLog,
) -> TrainResult:
    # A copy, because the step gives its input's buffers up and `job.params` may be the backbone's.
    state = init_state(jax.tree.map(lambda x: jax.numpy.array(x, copy=True), job.params), optimizer)
    if checkpoints.latest_step() is not None:
        state = checkpoints.restore(state)
        log.say(f"  resuming at step {int(state.step)}")
    step = jax.jit(
        make_train_step(job.objective, optimizer, num_microbatches, seed), donate_argnums=0
    )
    state, interrupted = fit(
        state,
        lambda state, batch: step(state, job.frozen, batch),
        data.train,
        schedule,
        checkpoints,
        log,
        _evaluation(job, data),
    )
    if interrupted:
        log.say(f"  stopped at step {int(state.step)}, saved; the same command goes on from there")
        return TrainResult(int(state.step), True, None)
    summary = {"task": data.task, "steps": int(state.step), "batch_size": data.batch_size}
    exported = job.export(state.params, summary)
    log.say(f"  wrote {exported}")
    return TrainResult(int(state.step), False, exported)


def _evaluation(job: _Job, data: DataConfig) -> Callable[[TrainState], dict[str, float]] | None:
    if not data.eval_batches:
        return None
    eval_step = jax.jit(make_eval_step(job.objective))
    held_out: list[HostBatch] = []

    def evaluate(state: TrainState) -> dict[str, float]:
        held_out.extend(held_out or data.validation())
        totals = [eval_step(state.params, job.frozen, batch) for batch in held_out]
        sums, weights = jax.tree.map(lambda *parts: sum(parts), *totals)
        means = mean_loss(sums, weights, job.objective)
        return {name: float(value) for name, value in means.items()}

    return evaluate


def _plugin_job(
    model_dir: str,
    backbone: Backbone,
    config: PluginConfig | None,
    loss: LossConfig,
    initial_plugin_path: str | None,
    data: DataConfig,
    seed: int,
) -> _Job:
    if config is None or config.ratio == 1:
        raise ConfigError("A plugin run needs a compression ratio of 2 or more; set RATIO.")
    if initial_plugin_path is not None:
        variables = _initial_plugin(initial_plugin_path, config, backbone)
    else:
        variables = _fresh_plugin(pathlib.Path(model_dir), config, backbone, data, seed)
    if not jax.tree.leaves(variables.params):
        raise ConfigError(
            "This plugin has nothing to train: compression 'mean' with decompression 'repeat' has "
            "no parameters. Evaluate it as it is."
        )
    # Norms and products of the backbone run in its own dtype; the plugin's parameters are float32.
    frozen = jax.device_put((backbone.params, variables.output_scales))

    def export(params: dict, training: Mapping[str, Any]) -> pathlib.Path:
        folder = pathlib.Path(model_dir) / "plugin"
        trained = PluginVariables(params, variables.output_scales)
        save_plugin(folder, config, trained, backbone, training=training)
        return folder

    return _Job(
        Distillation(Transformer(backbone.config), config, loss),
        variables.params,
        frozen,
        {"trained": "plugin", "ratio": config.ratio, "backbone": backbone.fingerprint},
        export,
    )


def _backbone_job(
    model_dir: str, config: T5Config, start: Backbone | None, vocabulary: Any, seed: int
) -> _Job:
    params = start.params if start is not None else init_params(config, jax.random.key(seed))

    def export(params: dict, training: Mapping[str, Any]) -> pathlib.Path:
        folder = pathlib.Path(model_dir) / "backbone"
        save_backbone(folder, config, params, _vocabulary_file(vocabulary))
        return folder

    identity = {"trained": "backbone", "backbone": start.fingerprint if start else config.name}
    return _Job(TaskTraining(Transformer(config)), params, None, identity, export)


def _initial_plugin(path: str, config: PluginConfig, backbone: Backbone) -> PluginVariables:
    """A pre-trained plugin to adapt. It may come from another backbone of the same shape.

    That is the paper's recipe: pre-training runs beside the general backbone, adaptation beside one
    that was fine-tuned from it.
    """
    folder = run_part(path, "plugin")
    loaded = load_plugin(folder)
    if loaded.config != config:
        raise CheckpointError(
            f"The plugin in {folder} was trained as {loaded.config}; this run asks for {config}."
        )
    owner, shape = loaded.description["backbone"], backbone.config
    for field in ("num_encoder_layers", "embed_dim"):
        if owner[field] != getattr(shape, field):
            raise CheckpointError(
                f"The plugin in {folder} was trained beside {owner['name']!r} with {field} "
                f"{owner[field]}; backbone {shape.name!r} has {getattr(shape, field)}."
            )
    return loaded.variables


def _fresh_plugin(
    model_dir: pathlib.Path, config: PluginConfig, backbone: Backbone, data: DataConfig, seed: int
) -> PluginVariables:
    shape = backbone.config
    fresh = init_plugin(config, shape.num_encoder_layers, shape.embed_dim, jax.random.key(seed))
    # Measured once and kept, because a resumed run must go on in the very same units.
    kept = model_dir / "calibration.json"
    if kept.is_file():
        rms = {k: jax.numpy.float32(v) for k, v in json.loads(kept.read_text()).items()}
    else:
        rms = measure_output_scales(backbone, config, next(data.train(0)))
        model_dir.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps({k: float(v) for k, v in rms.items()}, indent=2) + "\n")
    return calibrate(fresh, rms)


def measure_output_scales(
    backbone: Backbone, config: PluginConfig, batch: HostBatch
) -> dict[str, jax.Array]:
    """The RMS of each encoder FFN's output on a batch, `{'layers_<i>': a}`."""
    # Rematerialised layers would keep what is measured inside themselves.
    module = Transformer(dataclasses.replace(backbone.config, remat=False))

    @jax.jit
    def measure(params: dict, batch: HostBatch) -> dict[str, jax.Array]:
        mask = batch["encoder_input_tokens"] > 0
        return site_output_rms(lambda: run(module, params, batch), config.sites, mask)

    return measure(backbone.params, batch)


def _load_initial(
    path: str | None, config: T5Config, trained: str, vocabulary: Any
) -> Backbone | None:
    if path is None:
        if trained == "plugin":
            raise ConfigError(
                "A plugin is trained beside a backbone: set INITIAL_CHECKPOINT_PATH to its folder."
            )
        return None
    folder = backbone_folder(path)
    loaded = load_backbone(folder)
    expected = dataclasses.replace(
        config,
        dtype=loaded.config.dtype,
        param_dtype=loaded.config.param_dtype,
        remat=loaded.config.remat,
        dropout_rate=loaded.config.dropout_rate,
    )
    if loaded.config != expected:
        raise CheckpointError(
            f"{folder} holds a backbone of another shape: {loaded.config}; this run's is {config}."
        )
    file = _vocabulary_file(vocabulary)
    if loaded.vocabulary_fingerprint and file:
        if file_fingerprint(file) != loaded.vocabulary_fingerprint:
            raise CheckpointError(
                f"{folder} was trained with another vocabulary than {file}; the same text would "
                "become other tokens."
            )
    return dataclasses.replace(loaded, config=config)


def run_part(path: str, part: str) -> pathlib.Path:
    """`path` itself, or the 'backbone' or 'plugin' folder in it where `path` is a run folder."""
    folder = pathlib.Path(path)
    return folder / part if (folder / part).is_dir() else folder


def backbone_folder(path: str) -> pathlib.Path:
    """The backbone folder that `path` is, or that a run folder `path` holds.

    Raises:
      CheckpointError: if it is neither, with how to get one.
    """
    folder = run_part(path, "backbone")
    if not (folder / DESCRIPTION).is_file():
        raise CheckpointError(
            f"INITIAL_CHECKPOINT_PATH {path!r} holds no backbone ({DESCRIPTION}). Train one with "
            "--gin_file=runs/backbone.gin, or name another folder."
        )
    return folder


def _checked_vocabulary(data: DataConfig, config: T5Config) -> Any:
    vocabulary = data.vocabulary()
    if vocabulary.vocab_size > config.vocab_size:
        raise ConfigError(
            f"Task {data.task!r} has a vocabulary of {vocabulary.vocab_size} tokens, backbone "
            f"{config.name!r} only {config.vocab_size} embeddings."
        )
    return vocabulary


def _vocabulary_file(vocabulary: Any) -> str | None:
    return getattr(vocabulary, "sentencepiece_model_file", None)


def _write_operative_config(model_dir: str) -> None:
    """Keeps the gin configuration that the run used; empty when it was called from Python."""
    import gin

    text = gin.operative_config_str()
    pathlib.Path(model_dir, "operative_config.gin").write_text(text, encoding="utf8")


__all__ = [
    "DataConfig",
    "TrainResult",
    "backbone_folder",
    "measure_output_scales",
    "run_part",
    "train",
]
