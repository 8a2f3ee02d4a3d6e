"""What can be told of a T5X run before T5X starts: its model, its task, its numbers, its folder.

T5X's programs would raise the same errors later, in the midst of their own.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence

from t5x import models
from tensorflow.io import gfile

from variator_jax.checkpoints.t5x_run import SETTINGS
from variator_jax.data.batches import task_or_mixture
from variator_jax.distill.jobs import check_packing
from variator_jax.errors import CheckpointError, ConfigError
from variator_jax.plugin import PluginConfig
from variator_jax.t5x_engine.model import DistillationModel


def rehearse(
    *,
    model: DistillationModel,
    task: str | None = None,
    model_dir: str | None = None,
    packed: bool = False,
    pack_multiple: int = 1,
    batch_size: int = 1,
    num_microbatches: int = 1,
    periods: Sequence[int] = (),
    output_dir: str | None = None,
    mesh_shape: Sequence[int] | None = None,
    num_partitions: int = 1,
) -> models.BaseModel:
    """Looks at what gin has made, and at what T5X will look at late.

    Args:
      model: T5X's model; to have been made is most of what there is to check.
      task: a registered task or mixture.
      model_dir: the run's folder, which may hold a run already.
      packed: whether examples are packed.
      pack_multiple: where packed examples start.
      batch_size: rows of a batch.
      num_microbatches: parts of a batch.
      periods: steps between evaluations and between checkpoints; 0 for none.
      output_dir: where an export goes.
      mesh_shape: `(data, model)` devices, if given.
      num_partitions: devices that share one copy of the weights, without `mesh_shape`.

    Raises:
      VariatorError: for what T5X or the plugin cannot work with.
    """
    if task is not None:
        task_or_mixture(task)
    if packed:
        check_packing(pack_multiple, model.start.plugin.ratio)
    if num_microbatches < 1 or batch_size % num_microbatches:
        raise ConfigError(
            f"NUM_MICROBATCHES is {num_microbatches}; it must divide BATCH_SIZE, {batch_size}."
        )
    heads, model_devices = model.start.backbone.num_heads, (mesh_shape or (1, num_partitions))[1]
    if heads % model_devices:
        raise ConfigError(
            f"The backbone's {heads} heads do not divide among {model_devices} devices of the "
            "mesh's model axis (MESH_SHAPE, NUM_PARTITIONS)."
        )
    _check_periods([period for period in periods if period])
    if output_dir is not None and not os.path.basename(output_dir.rstrip("/")).isdigit():
        raise ConfigError(
            f"MODEL_OUTPUT_DIR {output_dir!r} must end in a version number, such as {output_dir}/1."
        )
    if model_dir is not None:
        check_same_run(model_dir, model.start.plugin)
    return model


def check_same_run(model_dir: str, plugin: PluginConfig) -> None:
    """Refuses to go on with a run in whose folder another plugin was trained.

    Raises:
      CheckpointError: with both plugins' settings that differ.
    """
    file = os.path.join(model_dir, SETTINGS)
    if not gfile.exists(file):
        return
    with gfile.GFile(file, "r") as lines:
        before = json.loads(lines.read())["plugin"]
    now = json.loads(json.dumps(dataclasses.asdict(plugin)))
    differing = [f"{name} {before.get(name)!r}" for name in now if before.get(name) != now[name]]
    if differing:
        raise CheckpointError(
            f"MODEL_DIR {model_dir} holds a run that trains another plugin, with "
            f"{', '.join(differing)}; choose another MODEL_DIR."
        )


def _check_periods(periods: Sequence[int]) -> None:
    """T5X's loop goes from one evaluation or checkpoint to the next, in equal strides."""
    if periods and any(period % min(periods) for period in periods):
        raise ConfigError(
            f"T5X asks that EVAL_PERIOD and CHECKPOINT_PERIOD are multiples of one another; found "
            f"{' and '.join(map(str, periods))}."
        )
