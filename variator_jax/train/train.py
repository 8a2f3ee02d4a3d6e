"""`variator train`: from gin's settings to a trained folder. What is trained is in `jobs.py`."""

import contextlib
import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from variator_jax import mesh as meshes
from variator_jax.errors import check_known
from variator_jax.files import local_path, wrap_errors
from variator_jax.train import step as steps
from variator_jax.train.checks import check_steps
from variator_jax.train.jobs import Job, backbone_job, lora_job, plugin_job
from variator_jax.train.loop import HostBatch, fit
from variator_jax.train.plan import weights_dtype
from variator_jax.train.run_folder import Checkpoints, RunLog
from variator_jax.train.settings import DataConfig, TrainConfig
from variator_jax.train.step import Metrics, TrainState
from variator_jax.train.student import student_job

JOBS: dict[str, Callable[[TrainConfig, Mesh], Job]] = {
    "plugin": plugin_job,
    "backbone": backbone_job,
    "lora": lora_job,
    "student": student_job,
}


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How a run ended: the last step, whether a signal ended it, and the folder it wrote."""

    step: int
    interrupted: bool
    exported: pathlib.Path | None


def train(config: TrainConfig) -> TrainResult:
    """Trains a plugin, a backbone, a LoRA or a smaller student and writes it to `model_dir`.

    A run that was stopped continues from its newest checkpoint, and ends with the weights of one
    that was never stopped.

    Raises:
      VariatorError: for anything that cannot work, before the first step; or a loss or gradient
        that is not finite, at its step.
    """
    import gin

    check_known("TRAINED is", config.trained, JOBS)
    local_path("MODEL_DIR", config.model_dir)
    described = config.data.describe()  # before anything is loaded
    weight = weights_dtype(config.trained, config.backbone, config.backbone_dtype).itemsize
    rows = config.data.batch_size // config.num_microbatches
    mesh = meshes.make_mesh(config.shape, rows, config.mesh_shape, bytes_per_weight=weight)
    job = JOBS[config.trained](config, mesh)
    identity = job.identity | config.identity()
    with contextlib.ExitStack() as stack:
        checkpoints = Checkpoints(config.model_dir, config.keep_checkpoints, identity)
        stack.enter_context(contextlib.closing(checkpoints))
        check_steps(config.schedule.train_steps, checkpoints.latest_step() or 0, config.model_dir)
        with wrap_errors(f"MODEL_DIR {config.model_dir} cannot be written"):
            log = RunLog(config.model_dir, config.schedule.train_steps)
            stack.enter_context(contextlib.closing(log))
            if jax.process_index() == 0:  # empty when it was called from Python
                text = gin.operative_config_str()
                file = pathlib.Path(config.model_dir, "operative_config.gin")
                file.write_text(text, encoding="utf8")
        for line in described:
            log.print(f"  {line}")
        if mesh.size > 1:
            log.print(f"  {meshes.describe(mesh, config.backbone, weight)}")
        return _run(job, config, mesh, checkpoints, log)


def _run(
    job: Job, config: TrainConfig, mesh: Mesh, checkpoints: Checkpoints, log: RunLog
) -> TrainResult:
    data, optimizer, parts = config.data, config.optimizer, config.num_microbatches
    exported = pathlib.Path(config.model_dir, job.part)
    params, frozen = job.start()
    # A copy, because the step gives its input's buffers up and these may be the backbone's own.
    params = jax.tree.map(lambda x: jnp.array(x, copy=True), params)
    state = steps.placed_state(steps.init_state(params, optimizer), mesh)
    del params  # A resumed run would keep them beside its own.
    if checkpoints.latest_step() is not None:
        state = checkpoints.restore(state)
        left = config.schedule.train_steps - int(state.step)
        log.print(f"  resuming at step {int(state.step)}, {left or 'nothing'} left to train")
        if left and jax.process_index() == 0:
            _set_aside(exported)
    step_fn = steps.make_train_step(job.objective, optimizer, parts, config.seed)
    step = steps.jit_train_step(step_fn, state, mesh)

    def on_mesh(state: TrainState, batch: HostBatch) -> tuple[TrainState, Metrics]:
        with meshes.activations(mesh):
            return step(state, frozen, meshes.global_batch(batch, mesh))

    batches = functools.partial(data.train, rows=meshes.own_rows(mesh, data.batch_size))
    evaluate = _evaluation(job, frozen, data, mesh, parts)
    state, interrupted = fit(state, on_mesh, batches, config.schedule, checkpoints, log, evaluate)
    last = int(state.step)
    if interrupted:
        log.print(f"  stopped and saved at step {last}; the same command continues")
        return TrainResult(last, True, None)
    summary = {"task": data.task, "steps": last, "batch_size": data.batch_size}
    job.export(exported, state.params, frozen, summary)
    meshes.wait_for_all("exported")
    log.print(f"  wrote {exported}")
    return TrainResult(last, False, exported)


def _set_aside(exported: pathlib.Path) -> None:
    """Renames what a shorter run has exported, which would pass for the result of this one."""
    names = (exported.with_name(f"{exported.name}_before_{n}") for n in itertools.count(1))
    with wrap_errors(f"{exported} cannot be renamed"):
        if exported.is_dir():
            exported.rename(next(name for name in names if not name.exists()))


def _evaluation(
    job: Job, frozen: object, data: DataConfig, mesh: Mesh, num_microbatches: int
) -> Callable[[TrainState], dict[str, float]] | None:
    if not data.eval_batches:
        return None
    eval_step = jax.jit(steps.make_eval_step(job.objective))
    validation = functools.cache(data.validation)  # the same batches each time

    def evaluate(state: TrainState) -> dict[str, float]:
        # A whole batch may not fit where its microbatches do.
        with meshes.activations(mesh):
            totals = [
                eval_step(state.params, frozen, part)
                for batch in validation()
                for part in meshes.global_microbatches(batch, mesh, num_microbatches)
            ]
        sums, weights = jax.tree.map(lambda *parts: sum(parts), *totals)
        means = steps.combine(sums, weights, job.objective.coefficients)[1]
        return {name: float(value) for name, value in means.items()}

    return evaluate
