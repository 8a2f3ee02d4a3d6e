"""`variator infer`: the answers of a backbone, with a plugin or without, to all of a task.

The interface and the files are those of T5X's `infer.py`, for one ratio a run.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from variator_jax.backbones.t5 import T5
from variator_jax.bench.output import log
from variator_jax.errors import ConfigError, DataError, TrainingError, did_you_mean
from variator_jax.evaluation import scorers
from variator_jax.evaluation.data import Batch, EvalData
from variator_jax.evaluation.loading import features, load_for
from variator_jax.evaluation.result_files import Draft, finished
from variator_jax.mesh import place_everywhere
from variator_jax.model import SplicedModel
from variator_jax.store import Backbone, Plugin, formats, load_plugin, t5x
from variator_jax.store.arrays import fingerprint
from variator_jax.store.formats import run_part
from variator_jax.store.t5x_run import load_t5x_plugin

MODES = ("predict", "score")
_LOG_PERIOD = 100  # batches

# A full batch -> an answer a row: token ids [batch, length], or scores [batch].
Answer = Callable[[Batch], np.ndarray]


def infer(
    *,
    output_dir: str,
    data: EvalData,
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
    stopped continues.

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
    backbone, mesh = load_for(data, initial_checkpoint_path, initial_lora_path, mesh_shape)
    if not backbone.config.has_decoder:
        raise ConfigError(f"Backbone {backbone.config.name!r} has no decoder that could answer.")
    plugin = _plugin(plugin_path, ratio, initial_checkpoint_path, backbone)
    answer = _answer(mode, backbone, plugin, int(data.feature_lengths["targets"]), mesh)
    identity = _identity(mode, backbone, plugin, data)
    paths = {task: folder / f"{task}-{mode}.jsonl-00000-of-00001" for task in data.tasks()}
    done = {task for task, path in paths.items() if finished(path, identity | {"task": task})}
    for task, path in paths.items():
        if task in done:
            log(f"  {task}: finished before, {path}")
            continue
        try:
            _write_task(task, path, data, answer, identity | {"task": task})
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error.strerror or error}.") from error
    return list(paths.values())


def _plugin(
    path: str | None, ratio: int | None, checkpoint: str, backbone: Backbone
) -> Plugin | None:
    """The plugin of a folder, or that of a T5X run's checkpoint; None for ratio 1."""
    if ratio == 1:
        return None
    if path is not None:
        plugin = load_plugin(run_part(path, "plugin"), backbone)
    elif formats.kind_of(checkpoint) == formats.T5X and t5x.open_checkpoint(checkpoint).plugin:
        # With a LoRA merged in, the backbone is not the checkpoint's own, and is refused.
        plugin = load_t5x_plugin(checkpoint, backbone if backbone.lora else None)
    elif ratio is None:
        return None
    else:
        raise ConfigError(
            f"RATIO is {ratio}, but there is no plugin: name its folder in PLUGIN_PATH, or set "
            "RATIO = 1 for the backbone alone."
        )
    if ratio not in (None, plugin.config.ratio):
        raise ConfigError(f"RATIO is {ratio}, and the plugin's ratio is {plugin.config.ratio}.")
    return plugin


def _write_task(
    task: str, path: pathlib.Path, data: EvalData, answer: Answer, identity: dict[str, Any]
) -> None:
    draft = Draft(path, identity, data.batch_size)
    if draft.lines:
        log(f"  {task}: continues after {draft.lines} examples")
    decode = features(task)["targets"].vocabulary.decode
    for number, (inputs, batch) in enumerate(data.examples(task, draft.lines), start=1):
        rows = answer(_fill(batch, data.batch_size))[: len(inputs)].tolist()
        if identity["mode"] == "predict":
            answers = [{"prediction": decode(ids)} for ids in rows]
        else:
            answers = [{"score": score} for score in rows]
        draft.append({"inputs": i} | a for i, a in zip(inputs, answers, strict=True))
        if number % _LOG_PERIOD == 0:
            log(f"  {task}: {draft.lines} examples")
    if not draft.lines:
        raise DataError(f"task {task!r} has no examples in the split {data.split!r}")
    draft.publish()
    log(f"  {task}: {draft.lines} examples, wrote {path}")


def _answer(
    mode: str, backbone: Backbone, plugin: Plugin | None, length: int, mesh: Mesh | None
) -> Answer:
    """The compiled model, with its arrays bound; compiled once, as all batches have one shape."""
    model = SplicedModel(T5(backbone.config), plugin.config if plugin else None)
    params = backbone.params
    variables = place_everywhere(plugin.variables if plugin else None, mesh)
    if mode == "predict":
        generate = scorers.generator(model, length, mesh)
        return lambda batch: np.asarray(generate(params, variables, batch))
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
    mode: str, backbone: Backbone, plugin: Plugin | None, data: EvalData
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
