"""Preflight checks: surface errors before T5X starts, where they would be late or silent.

What a run trains is recorded next to its checkpoints in `variator_plugin.json`, which a resumed run
is compared with and `variator convert --from t5x-run` reads.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from t5x import models
from tensorflow.io import gfile

from variator_jax.data.batches import task_or_mixture
from variator_jax.errors import CheckpointError, ConfigError
from variator_jax.store.description import config_content
from variator_jax.store.t5x_run import SETTINGS
from variator_jax.t5x_engine.model import DistillationModel
from variator_jax.t5x_engine.partitioner import model_devices
from variator_jax.train.settings import check_packing, check_vocabulary

_RESULTS = "variator_results.json"  # next to T5X's results: the settings that made them


def preflight(
    *,
    model: DistillationModel,
    task: str | None = None,
    model_dir: str | None = None,
    packed: bool = False,
    pack_multiple: int = 1,
    batch_size: int = 1,
    num_microbatches: int = 1,
    seed: int = 0,
    periods: Sequence[int] = (),
    output_dir: str | None = None,
    results_dir: str | None = None,
    results_of: Mapping[str, Any] | None = None,
    mesh_shape: Sequence[int] | None = None,
    num_partitions: int = 1,
) -> models.BaseModel:
    """Checks the configuration for errors that T5X raises late or never.

    Args:
      model: T5X's model; making it has checked most settings already.
      task: a registered task or mixture.
      model_dir: the folder of a training run, which may hold one already.
      packed: whether examples are packed.
      pack_multiple: where packed examples start.
      batch_size: rows of a batch.
      num_microbatches: parts of a batch.
      seed: of the data's order.
      periods: steps between evaluations and between checkpoints; 0 for none.
      output_dir: where an export goes.
      results_dir: where inference writes, and may have written before.
      results_of: the settings that determine its results.
      mesh_shape: the mesh, if given.
      num_partitions: devices that share one copy of the weights, without `mesh_shape`.

    Raises:
      VariatorError: for settings that T5X or the plugin does not support.
    """
    shape = model.start.backbone
    if task is not None:
        vocabulary = task_or_mixture(task).output_features["inputs"].vocabulary
        check_vocabulary(task, vocabulary, shape)
    if packed:
        check_packing(pack_multiple, model.start.plugin.ratio)
    if num_microbatches < 1 or batch_size % num_microbatches:
        raise ConfigError(
            f"NUM_MICROBATCHES is {num_microbatches}; it must divide BATCH_SIZE, {batch_size}."
        )
    parts = model_devices(mesh_shape) if mesh_shape is not None else num_partitions
    if shape.num_heads % parts:
        raise ConfigError(
            f"The backbone's {shape.num_heads} heads do not divide among {parts} devices of the "
            "mesh's model axis (MESH_SHAPE, NUM_PARTITIONS)."
        )
    _check_periods([period for period in periods if period])
    if output_dir is not None and not os.path.basename(output_dir.rstrip("/")).isdigit():
        raise ConfigError(
            f"MODEL_OUTPUT_DIR {output_dir!r} must end in a version number, such as {output_dir}/1."
        )
    if model_dir is not None:
        check_same_run(model_dir, model, {"task": task, "batch_size": batch_size, "seed": seed})
    if results_dir is not None:
        _check_results(results_dir, dict(results_of or {}))
    return model


def _check_periods(periods: Sequence[int]) -> None:
    """T5X's loop goes from one evaluation or checkpoint to the next, in equal strides."""
    if periods and any(period % min(periods) for period in periods):
        raise ConfigError(
            f"T5X asks that EVAL_PERIOD and CHECKPOINT_PERIOD are multiples of one another; found "
            f"{' and '.join(map(str, periods))}."
        )


def _check_results(folder: str, identity: dict[str, Any]) -> None:
    """Refuses results of other settings: T5X does not overwrite finished files."""
    identity = json.loads(json.dumps(identity, default=str))
    file = os.path.join(folder, _RESULTS)
    before = None
    if gfile.exists(file):
        with gfile.GFile(file, "r") as lines:
            before = json.loads(lines.read())
    if before != identity and gfile.glob(os.path.join(folder, "*.COMPLETED")):
        raise ConfigError(
            f"INFER_OUTPUT_DIR {folder} holds results of another run ({before or 'not told'}), "
            "which T5X would keep; choose another folder."
        )
    gfile.makedirs(folder)
    with gfile.GFile(file, "w") as out:
        out.write(json.dumps(identity, indent=2) + "\n")


def check_same_run(folder: str, model: DistillationModel, training: Mapping[str, Any]) -> None:
    """Refuses to resume in the folder of another run.

    Args:
      folder: MODEL_DIR.
      model: what is trained now.
      training: `task`, `batch_size` and `seed`, which decide what the next batches are.

    Raises:
      CheckpointError: naming what differs.
    """
    file = os.path.join(folder, SETTINGS)
    if not gfile.exists(file):
        return
    with gfile.GFile(file, "r") as lines:
        before = json.loads(lines.read())
    now = _plain({**_shape_of(model), "training": dict(training)})
    differing = [
        f"{name} {before.get(part, {}).get(name)!r}"
        for part, fields in now.items()
        for name, value in fields.items()
        if before.get(part, {}).get(name) != value
    ]
    if differing:
        raise CheckpointError(
            f"MODEL_DIR {folder} holds another run, with {', '.join(differing)}; choose another "
            "MODEL_DIR."
        )


def write_record(
    folder: str, model: DistillationModel, training: Mapping[str, Any], checkpoint: str | None
) -> None:
    """Writes what a run trains, unless the run is resumed."""
    file = os.path.join(folder, SETTINGS)
    if gfile.exists(file):
        return
    content = {
        **_shape_of(model),
        "training": {"engine": "t5x", **training},
        "initial_checkpoint_path": checkpoint,
        "initial_plugin_path": model.start.path,
    }
    gfile.makedirs(folder)
    with gfile.GFile(file, "w") as out:
        out.write(json.dumps(content, indent=2) + "\n")


def _shape_of(model: DistillationModel) -> dict[str, Any]:
    start = model.start
    return {
        "plugin": start.plugin.to_json(),
        "backbone": config_content(start.backbone),
    }


def _plain(content: Any) -> Any:
    return json.loads(json.dumps(content))
