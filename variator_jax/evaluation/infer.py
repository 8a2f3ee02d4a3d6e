"""`variator infer`: the answers of a backbone, with a plugin or without, to whole tasks.

The interface and the files are those of T5X's `infer.py`, for one ratio a run. How a file comes to
be whole lives in `result_files.py`; what the answers are worth is `evaluate.py`'s business.
"""

from __future__ import annotations

import json
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from variator_jax.backbones.t5 import T5
from variator_jax.errors import ConfigError, DataError, TrainingError, did_you_mean
from variator_jax.evaluation import scorers
from variator_jax.evaluation.infer_data import Batch, InferData
from variator_jax.evaluation.result_files import finished, writing
from variator_jax.mesh import compile_on, mesh_or_none, place_everywhere, place_parameters
from variator_jax.model import SplicedModel
from variator_jax.store import Backbone, Plugin, formats, load_backbone, load_plugin, t5x
from variator_jax.store.arrays import fingerprint
from variator_jax.store.formats import backbone_folder, run_part
from variator_jax.store.t5x_run import load_t5x_plugin
from variator_jax.train.settings import check_vocabulary

MODES = ("predict", "score")
_SAY_EVERY = 100  # batches

# A whole batch -> an answer a row: token ids [batch, length], or scores [batch].
Answer = Callable[[Batch], np.ndarray]


def infer(
    *,
    output_dir: str,
    data: InferData,
    initial_checkpoint_path: str,
    plugin_path: str | None = None,
    initial_lora_path: str | None = None,
    ratio: int | None = None,
    mode: str = "predict",
    mesh_shape: Sequence[int] | None = None,
) -> list[pathlib.Path]:
    """Answers every example of a task or mixture, and writes a file a task to `output_dir`.

    A file is named `<task>-<mode>.jsonl-00000-of-00001`, as T5X names it, and holds an object a
    line in the task's own order: `{"inputs": {...}, "prediction": text}` or
    `{"inputs": {...}, "score": number}`. A finished file is not computed again, and a run that was
    stopped goes on where it was.

    Args:
      output_dir: a local folder.
      data: the tasks.
      initial_checkpoint_path: a backbone folder, or a run folder that holds one.
      plugin_path: the folder of the plugin to splice in, or a run folder; None for that of the
        checkpoint of a T5X run, if it is one.
      initial_lora_path: a LoRA folder or a run folder, merged into the backbone.
      ratio: the plugin's ratio, as a check; 1 for the backbone alone; None for that of the plugin,
        if there is one.
      mode: 'predict' for greedy decoding; 'score' for the log-probability of the targets, in nats:
        the sum over target tokens, padding left out.
      mesh_shape: `(data, fsdp, model)` devices; None chooses.

    Returns:
      The files, one a task.

    Raises:
      VariatorError: for a plugin of another backbone, a file of another run in `output_dir`, and
        anything else that cannot work.
    """
    folder = _output_folder(output_dir)
    if mode not in MODES:
        raise ConfigError(
            f"INFER_MODE is {mode!r}; it is 'predict' or 'score'." + did_you_mean(str(mode), MODES)
        )
    if initial_checkpoint_path is None:
        raise ConfigError("No backbone is given: set CHECKPOINT_PATH to its folder.")
    tasks = data.tasks()
    backbone = load_backbone(backbone_folder(initial_checkpoint_path), lora=initial_lora_path)
    if not backbone.config.num_decoder_layers:
        raise ConfigError(f"Backbone {backbone.config.name!r} has no decoder that could answer.")
    plugin = _plugin(plugin_path, ratio, initial_checkpoint_path, backbone)
    for task in tasks:
        for feature in task.output_features.values():
            known = backbone.vocabulary_fingerprint
            check_vocabulary(task.name, feature.vocabulary, backbone.config, known)
    mesh = mesh_or_none(backbone.config, data.batch_size, mesh_shape)
    answer = _answer(mode, backbone, plugin, data.feature_lengths["targets"], mesh)
    identity = _identity(mode, backbone, plugin, data)
    paths = [folder / f"{task.name}-{mode}.jsonl-00000-of-00001" for task in tasks]
    done = [
        finished(path, identity | {"task": task.name})
        for task, path in zip(tasks, paths, strict=True)
    ]
    for task, path, is_done in zip(tasks, paths, done, strict=True):
        if is_done:
            _say(f"  {task.name}: finished before, {path}")
        else:
            _write_task(task, path, data, answer, identity | {"task": task.name})
    return paths


def _plugin(
    path: str | None, ratio: int | None, checkpoint: str, backbone: Backbone
) -> Plugin | None:
    """The plugin of a folder, or that of a T5X run's checkpoint; None for ratio 1."""
    if ratio == 1:
        return None
    if path is not None:
        found = load_plugin(run_part(path, "plugin"), backbone)
    elif formats.kind_of(checkpoint) == formats.T5X and t5x.open_checkpoint(checkpoint).plugin:
        # Beside a LoRA it is not the checkpoint's own backbone any more, and refused.
        found = load_t5x_plugin(checkpoint, backbone if backbone.lora else None)
    elif ratio is None:
        return None
    else:
        raise ConfigError(
            f"RATIO is {ratio}, but there is no plugin: name its folder in PLUGIN_PATH, or set "
            "RATIO = 1 for the backbone alone."
        )
    if ratio not in (None, found.config.ratio):
        raise ConfigError(f"RATIO is {ratio}, and the plugin's ratio is {found.config.ratio}.")
    return found


def _write_task(
    task: Any, path: pathlib.Path, data: InferData, answer: Answer, identity: dict[str, Any]
) -> None:
    with writing(path, identity, data.batch_size) as file:
        count = file.lines
        if count:
            _say(f"  {task.name}: going on after {count} examples")
        for number, (inputs, batch) in enumerate(data.batches(task, count), start=1):
            rows = answer(_fill(batch, data.batch_size))[: len(inputs)].tolist()
            if identity["mode"] == "predict":
                decode = task.output_features["targets"].vocabulary.decode
                found = [{"prediction": decode(ids)} for ids in rows]
            else:
                found = [{"score": score} for score in rows]
            file.append({"inputs": i} | f for i, f in zip(inputs, found, strict=True))
            count += len(inputs)
            if number % _SAY_EVERY == 0:
                _say(f"  {task.name}: {count} examples")
        if not count:
            raise DataError(f"task {task.name!r} has no examples in the split {data.split!r}")
    _say(f"  {task.name}: {count} examples, wrote {path}")


def _answer(
    mode: str, backbone: Backbone, plugin: Plugin | None, length: int, mesh: Mesh | None
) -> Answer:
    """The compiled model, with its arrays bound; compiled once, as all batches have one shape."""
    model = SplicedModel(T5(backbone.config), plugin.config if plugin else None)
    params = place_parameters(backbone.params, backbone.config, mesh)
    variables = place_everywhere(plugin.variables if plugin else None, mesh)
    if mode == "predict":

        def generate(params: dict, variables: Any, batch: Batch) -> jax.Array:
            return model.generate(params, variables, batch["encoder_input_tokens"], int(length))

        predict = compile_on(mesh, generate)
        return lambda batch: np.asarray(
            predict(params, variables, {"encoder_input_tokens": batch["encoder_input_tokens"]})
        )
    scorer = scorers.target_scorer(model, mesh)

    def score(batch: Batch) -> np.ndarray:
        # [batch, target length]
        losses = np.asarray(scorer(params, variables, batch)[0])
        scores = -(losses * batch["decoder_loss_weights"]).sum(axis=-1, dtype=np.float32)
        if not np.isfinite(scores).all():
            raise TrainingError(
                f"Backbone {backbone.config.name!r} gives scores that are not finite in "
                f"{backbone.config.dtype}."
            )
        return scores

    return score


def _fill(batch: Batch, size: int) -> Batch:
    """Repeats the last row until there are `size`, so that decoding ends no later for it."""
    return {
        name: np.pad(value, [(0, size - len(value)), (0, 0)], mode="edge")
        for name, value in batch.items()
    }


def _identity(
    mode: str, backbone: Backbone, plugin: Plugin | None, data: InferData
) -> dict[str, Any]:
    """What decides the results, in JSON's types; the batch size does not."""
    settings = None
    if plugin:
        arrays = {"params": plugin.variables.params, "scales": plugin.variables.output_scales}
        settings = plugin.config.to_json() | {"arrays": fingerprint(arrays)}
    identity = {
        "mode": mode,
        "backbone": backbone.fingerprint,
        "dtype": backbone.config.dtype,
        "ratio": plugin.config.ratio if plugin else 1,
        "plugin": settings,
        "split": data.split,
        "feature_lengths": dict(data.feature_lengths),
    }
    return json.loads(json.dumps(identity))


def _output_folder(path: str | os.PathLike) -> pathlib.Path:
    if not isinstance(path, str | os.PathLike):
        raise ConfigError(f"INFER_OUTPUT_DIR is {path!r}; it must be a path, in quotes.")
    if "://" in str(path):
        raise ConfigError(
            f"INFER_OUTPUT_DIR {str(path)!r} is not a local folder; the built-in engine writes to "
            "local or mounted folders only."
        )
    return pathlib.Path(path)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
