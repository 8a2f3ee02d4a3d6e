"""`variator train`: from gin's settings to a trained folder. What is trained is in `jobs.py`."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from variator_jax import mesh as meshes
from variator_jax.backbones.lora import LoraConfig
from variator_jax.backbones.t5 import T5Config
from variator_jax.errors import ConfigError, did_you_mean
from variator_jax.plugin import PluginConfig
from variator_jax.train.checkpointing import Checkpoints
from variator_jax.train.data import DataConfig
from variator_jax.train.jobs import Job, backbone_job, plugin_job
from variator_jax.train.logs import RunLog
from variator_jax.train.loop import HostBatch, Schedule, fit
from variator_jax.train.lora import lora_job
from variator_jax.train.losses import LossConfig
from variator_jax.train.step import (
    Metrics,
    TrainState,
    init_state,
    jit_train_step,
    make_eval_step,
    make_train_step,
    mean_loss,
    placed_state,
)
from variator_jax.train.student import student_job


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How a run ended: the last step, whether a signal ended it, and the folder it wrote."""

    step: int
    interrupted: bool
    exported: pathlib.Path | None


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
    lora: LoraConfig | None = None,
    initial_lora_path: str | None = None,
    num_microbatches: int = 1,
    keep_checkpoints: int = 2,
    seed: int = 0,
    mesh_shape: Sequence[int] | None = None,
    backbone_dtype: str | None = None,
    remat: bool | str = False,
) -> TrainResult:
    """Trains a plugin, a backbone, a LoRA or a smaller student and writes it to `model_dir`.

    A run that was stopped goes on from its newest checkpoint, and ends with the weights of one that
    was never stopped.

    Args:
      model_dir: the run folder.
      data: which examples.
      schedule: how long, and when to log, evaluate and save.
      optimizer: an optax transformation.
      backbone: the shape of the backbone.
      trained: 'plugin', or 'backbone' for the whole backbone on the task's own loss, or 'lora' for
        a LoRA of a frozen one, or 'student' for a backbone with narrower encoder FFNs that is
        distilled from this one.
      plugin: the plugin's settings; for a student, those of the plugin whose FLOPs it has.
      loss: the distillation losses' weights, the paper's by default; for a plugin or a student.
      initial_checkpoint_path: a backbone folder, or a run folder that holds one. Only a backbone
        that is trained may start without, from random weights.
      initial_plugin_path: a plugin folder or a run folder to adapt; None for a fresh plugin.
      lora: the LoRA's settings, the official code's by default; for `trained='lora'`.
      initial_lora_path: a LoRA folder or a run folder, merged into the backbone beside a plugin.
      num_microbatches: passes that a batch is cut into.
      keep_checkpoints: training checkpoints to keep.
      seed: of initialisation and dropout.
      mesh_shape: `(data, fsdp, model)` devices; None chooses.
      backbone_dtype: what the backbone of a plugin or a LoRA is kept in; None for what it is
        stored in.
      remat: what a layer keeps for the backward pass; see `T5Config.remat`.

    Raises:
      VariatorError: for anything that cannot work, before the first step; or a loss or gradient
        that is not finite, at its step.
    """
    _check(data.batch_size, num_microbatches, trained, initial_lora_path)
    backbone = dataclasses.replace(backbone, remat=remat)
    frozen = trained in ("plugin", "lora") and backbone_dtype is not None
    weight = jnp.dtype(backbone_dtype if frozen else backbone.param_dtype).itemsize
    rows = data.batch_size // num_microbatches
    mesh = meshes.make_mesh(backbone, rows, mesh_shape, bytes_per_weight=weight)
    job = _job(
        trained,
        model_dir=model_dir,
        backbone=backbone,
        initial=initial_checkpoint_path,
        plugin=plugin,
        initial_plugin=initial_plugin_path,
        loss=loss or LossConfig(),
        lora=lora or LoraConfig(),
        initial_lora=initial_lora_path,
        data=data,
        seed=seed,
        mesh=mesh,
        backbone_dtype=backbone_dtype,
        num_microbatches=num_microbatches,
    )
    identity = job.identity | dataclasses.asdict(data)
    identity.pop("eval_batches")  # changes nothing in what is trained
    checkpoints = Checkpoints(model_dir, keep_checkpoints, identity)
    log = RunLog(model_dir, schedule.train_steps)
    if mesh.size > 1:
        log.say(f"  {meshes.describe(mesh, backbone, weight)}")
    try:
        _write_operative_config(model_dir)
        return _run(job, data, schedule, optimizer, num_microbatches, seed, mesh, checkpoints, log)
    finally:
        checkpoints.close()
        log.close()


def _check(
    batch_size: int, num_microbatches: int, trained: str, initial_lora_path: str | None
) -> None:
    if num_microbatches < 1 or batch_size % num_microbatches:
        raise ConfigError(
            f"NUM_MICROBATCHES is {num_microbatches!r}; it must divide BATCH_SIZE, {batch_size}."
        )
    if initial_lora_path is not None and trained != "plugin":
        raise ConfigError(
            f"INITIAL_LORA_PATH is for a run that trains a plugin; TRAINED is {trained!r}. Write "
            "the merged backbone with save_backbone, and give it as INITIAL_CHECKPOINT_PATH."
        )


def _job(
    trained: str,
    *,
    model_dir: str,
    backbone: T5Config,
    initial: str | None,
    plugin: PluginConfig | None,
    initial_plugin: str | None,
    loss: LossConfig,
    lora: LoraConfig,
    initial_lora: str | None,
    data: DataConfig,
    seed: int,
    mesh: Mesh,
    backbone_dtype: str | None,
    num_microbatches: int,
) -> Job:
    """What `trained` names, with those of the settings that it looks at."""
    if trained == "backbone":
        return backbone_job(model_dir, backbone, initial, data, seed, mesh)
    if trained == "student":
        return student_job(model_dir, backbone, initial, plugin, loss, data, mesh)
    if trained == "lora":
        return lora_job(model_dir, backbone, initial, lora, data, seed, mesh, backbone_dtype)
    if trained == "plugin":
        return plugin_job(
            model_dir,
            backbone,
            initial,
            plugin,
            initial_plugin,
            loss,
            data,
            seed,
            mesh,
            backbone_dtype,
            initial_lora,
            num_microbatches,
        )
    kinds = ("plugin", "backbone", "lora", "student")
    raise ConfigError(
        f"TRAINED is {trained!r}; it is one of {', '.join(map(repr, kinds))}."
        f"{did_you_mean(str(trained), kinds)}"
    )


def _run(
    job: Job,
    data: DataConfig,
    schedule: Schedule,
    optimizer: optax.GradientTransformation,
    num_microbatches: int,
    seed: int,
    mesh: Mesh,
    checkpoints: Checkpoints,
    log: RunLog,
) -> TrainResult:
    params, frozen = job.start()
    # A copy, because the step gives its input's buffers up and these may be the backbone's own.
    state = init_state(jax.tree.map(lambda x: jnp.array(x, copy=True), params), optimizer)
    state = placed_state(state, mesh)
    if checkpoints.latest_step() is not None:
        state = checkpoints.restore(state)
        log.say(f"  resuming at step {int(state.step)}")
    step = jit_train_step(
        make_train_step(job.objective, optimizer, num_microbatches, seed), state, mesh
    )

    def on_mesh(state: TrainState, batch: HostBatch) -> tuple[TrainState, Metrics]:
        with meshes.activations(mesh):
            return step(state, frozen, meshes.global_batch(batch, mesh))

    state, interrupted = fit(
        state,
        on_mesh,
        functools.partial(data.train, rows=meshes.own_rows(mesh, data.batch_size)),
        schedule,
        checkpoints,
        log,
        _evaluation(job, frozen, data, mesh, num_microbatches),
    )
    if interrupted:
        log.say(f"  stopped at step {int(state.step)}, saved; the same command goes on from there")
        return TrainResult(int(state.step), True, None)
    summary = {"task": data.task, "steps": int(state.step), "batch_size": data.batch_size}
    exported = job.export(state.params, frozen, summary)
    meshes.wait_for_all("exported")
    log.say(f"  wrote {exported}")
    return TrainResult(int(state.step), False, exported)


def _evaluation(
    job: Job, frozen: object, data: DataConfig, mesh: Mesh, num_microbatches: int
) -> Callable[[TrainState], dict[str, float]] | None:
    if not data.eval_batches:
        return None
    eval_step = jax.jit(make_eval_step(job.objective))

    def evaluate(state: TrainState) -> dict[str, float]:
        # A whole batch may not fit where its microbatches do.
        batches = (
            part
            for batch in data.validation()
            for part in meshes.global_microbatches(batch, mesh, num_microbatches)
        )
        with meshes.activations(mesh):
            totals = [eval_step(state.params, frozen, batch) for batch in batches]
        sums, weights = jax.tree.map(lambda *parts: sum(parts), *totals)
        means = mean_loss(sums, weights, job.objective)
        return {name: float(value) for name, value in means.items()}

    return evaluate


def _write_operative_config(model_dir: str) -> None:
    """Keeps the gin configuration that the run used; empty when it was called from Python."""
    import gin

    if jax.process_index():
        return

    text = gin.operative_config_str()
    pathlib.Path(model_dir, "operative_config.gin").write_text(text, encoding="utf8")


__all__ = ["DataConfig", "TrainResult", "train"]
