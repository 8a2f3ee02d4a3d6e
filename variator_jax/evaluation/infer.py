"""`variator infer`: the answers of a backbone, with a plugin or without, to all of a task.

The interface and the files are those of T5X's `infer.py`, for one ratio a run. A file appears
complete or not at all: next to a complete `NAME` is `NAME.COMPLETED`, which holds the identity of
the run. While it is written, `NAME` is in the folder `tmp-NAME`; a stopped run continues there.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from variator_jax.backbones.t5 import T5
from variator_jax.bench.output import log
from variator_jax.errors import ConfigError, TrainingError, check_known
from variator_jax.evaluation import scorers
from variator_jax.evaluation.data import Batch, EvalData, features, load_for
from variator_jax.files import local_path, lock_folder, write_json
from variator_jax.mesh import place_everywhere
from variator_jax.model import SplicedModel
from variator_jax.store import Backbone, Plugin, formats, load_plugin, t5x
from variator_jax.store.other_plugins import load_t5x_plugin

MODES = {"predict": "prediction", "score": "score"}  # mode -> field of an answer
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
) -> list[Path]:
    """Answers every example of a task or mixture, and writes a file a task to `output_dir`.

    A file is named `<task>-<mode>.jsonl-00000-of-00001`, and holds an object a line in the task's
    own order: `{"inputs": {...}, "prediction": text}` or `{"inputs": {...}, "score": number}`.
    A finished file is not computed again, and a run that was stopped continues.

    Args:
      output_dir: a local folder.
      data: the tasks.
      initial_checkpoint_path: a backbone folder, or a run folder that holds one.
      plugin_path: the folder of the plugin to splice in, or a run folder; None for that of the
        checkpoint of a T5X run, if it is one.
      initial_lora_path: a LoRA folder or a run folder, merged into the backbone.
      ratio: the plugin's ratio, as a check; 1 for the backbone alone; None checks nothing.
      mode: 'predict' for greedy decoding; 'score' for the log-probability of the targets, in nats:
        the sum over target tokens, padding left out.
      mesh_shape: `(data, fsdp, model)` devices; None chooses.

    Returns:
      The files, one a task.

    Raises:
      VariatorError: for a plugin of another backbone, or a file of another run in `output_dir`.
    """
    folder = local_path("INFER_OUTPUT_DIR", output_dir)
    check_known("INFER_MODE is", mode, MODES)
    if initial_checkpoint_path is None:
        raise ConfigError("No backbone is given: set CHECKPOINT_PATH to its folder.")
    backbone, mesh = load_for(data, initial_checkpoint_path, initial_lora_path, mesh_shape)
    if not backbone.config.has_decoder:
        raise ConfigError(f"Backbone {backbone.config.name!r} has no decoder that could answer.")
    data.describe()
    plugin = _plugin(plugin_path, ratio, initial_checkpoint_path, backbone)
    answer = _answer(mode, backbone, plugin, int(data.feature_lengths["targets"]), mesh)
    identity = _identity(mode, backbone, plugin, data)
    files = {}
    for task in data.tasks():
        path = folder / f"{task}-{mode}.jsonl-00000-of-00001"
        own = {"task": task, "data": data.digest(task)}
        files[task] = ResultFile(path, identity | own, data.batch_size)
    with lock_folder(folder):
        for task in [task for task, file in files.items() if not file.finished()]:
            try:
                _write_task(task, files[task], mode, data, answer)
            except OSError as error:
                raise ConfigError(f"{files[task].path} cannot be written: {error}.") from error
    return [file.path for file in files.values()]


def _plugin(
    path: str | None, ratio: int | None, checkpoint: str, backbone: Backbone
) -> Plugin | None:
    """The plugin of a folder, or that of a T5X run's checkpoint; None for ratio 1."""
    plugin = None
    if ratio == 1:
        return None
    if path is not None:
        plugin = load_plugin(formats.run_part(path, "plugin"), backbone)
    elif formats.kind_of(checkpoint) == formats.T5X and t5x.open_checkpoint(checkpoint).plugin:
        # With a LoRA merged in, the backbone is not the checkpoint's own, and is refused.
        plugin = load_t5x_plugin(checkpoint, backbone if backbone.lora else None)
    known = plugin.config.ratio if plugin else None
    of_sites = {site.ratio for site in plugin.config.parts} if plugin else set()
    if ratio is not None and ratio not in of_sites:
        remedy = f"set PLUGIN_PATH, or --gin.RATIO={known or 1}"
        raise ConfigError(f"RATIO is {ratio}, the plugin's ratio {known}: {remedy}.")
    return plugin


def _write_task(task: str, file: "ResultFile", mode: str, data: EvalData, answer: Answer) -> None:
    lines = file.resume()
    if lines:
        log(f"  {task}: continues after {lines} examples")
    decode = features(task)["targets"].vocabulary.decode
    for number, (inputs, batch) in enumerate(data.examples(task, lines // data.batch_size), 1):
        answers = answer(batch)[: len(inputs)].tolist()
        if mode == "predict":
            answers = [decode(ids) for ids in answers]
        file.append({"inputs": i, MODES[mode]: a} for i, a in zip(inputs, answers, strict=True))
        lines += len(inputs)
        if number % _LOG_PERIOD == 0:
            log(f"  {task}: {lines} examples")
    file.publish()
    log(f"  {task}: {lines} examples, wrote {file.path}")


def _answer(
    mode: str, backbone: Backbone, plugin: Plugin | None, length: int, mesh: Mesh | None
) -> Answer:
    """The compiled model, with its arrays bound; compiled once, as all batches have one shape."""
    model = SplicedModel(T5(backbone.config), plugin.config if plugin else None)
    variables = place_everywhere(plugin.variables if plugin else None, mesh)
    predict = mode == "predict"
    scorer = (
        scorers.generator(model, length, mesh) if predict else scorers.target_scorer(model, mesh)
    )

    def answer(batch: Batch) -> np.ndarray:
        outputs = scorer(backbone.params, variables, batch)
        if predict:
            return np.asarray(outputs)
        # [batch, target length]
        losses = np.asarray(outputs[0]) * batch["decoder_loss_weights"]
        scores = -losses.sum(axis=-1, dtype=np.float32)
        if not np.isfinite(scores).all():
            config = backbone.config
            raise TrainingError(f"Scores of {config.name!r} in {config.dtype} are not finite.")
        return scores

    return answer


def _identity(
    mode: str, backbone: Backbone, plugin: Plugin | None, data: EvalData
) -> dict[str, Any]:
    """What decides the results, in JSON's types; the batch size does not."""
    settings = plugin.config.to_run() | {"arrays": plugin.fingerprint} if plugin else None
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


def _plain(value: Any) -> Any:
    """Bytes or an array for JSON."""
    return value.decode("utf8", errors="replace") if isinstance(value, bytes) else value.tolist()


class ResultFile:
    """A task's results: a complete file with its mark, or a draft in `tmp-NAME`."""

    def __init__(self, path: Path, identity: Mapping[str, Any], batch_size: int) -> None:
        """Nothing is read or written yet.

        Args:
          path: where the complete file goes.
          identity: what makes the run this one, in JSON's types.
          batch_size: how many results are appended at once.
        """
        self.path, self._identity, self._batch_size = path, identity, batch_size
        self._mark = path.with_name(f"{path.name}.COMPLETED")
        self._folder = path.with_name(f"tmp-{path.name}")
        self._draft = self._folder / path.name

    def finished(self) -> bool:
        """Whether the complete file of this very run is there.

        Raises:
          ConfigError: if the file of another run is there, with the differences.
        """
        if not (self._mark.is_file() and self.path.is_file()):
            return False
        known = _identity_in(self._mark)
        differs = ", ".join(
            f"{key} {known.get(key)!r} and not {value!r}"
            for key, value in self._identity.items()
            if known.get(key) != value
        )
        if differs:
            remedy = f"name another INFER_OUTPUT_DIR, or remove {self._mark.name}"
            other = f"{self.path} holds the results of another run, with {differs}"
            raise ConfigError(f"{other}: {remedy}.")
        return True

    def resume(self) -> int:
        """How many results a stopped run left, in complete batches; the rest is cut off.

        What a run of another identity left is removed.
        """
        owner = self._folder / "identity.json"
        if _identity_in(owner) != self._identity:
            shutil.rmtree(self._folder, ignore_errors=True)
            write_json(owner, self._identity)
        self._draft.touch()
        written = self._draft.read_bytes().split(b"\n")
        lines = (len(written) - 1) // self._batch_size * self._batch_size  # the last has no break
        os.truncate(self._draft, sum(len(line) + 1 for line in written[:lines]))
        return lines

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Writes a batch of results, each as one line."""
        with self._draft.open("a", encoding="utf8") as file:
            file.writelines(json.dumps(record, default=_plain) + "\n" for record in records)

    def publish(self) -> None:
        """Moves the file to its place."""
        with self._draft.open("rb") as file:
            os.fsync(file.fileno())
        # The old mark goes first: at no moment does it vouch for a file that is not its own.
        self._mark.unlink(missing_ok=True)
        os.replace(self._draft, self.path)
        write_json(self._mark, self._identity)
        shutil.rmtree(self._folder)


def _identity_in(path: Path) -> dict[str, Any]:
    """The identity in a file; empty if there is none, as in T5X's."""
    try:
        return dict(json.loads(path.read_text(encoding="utf8")))
    except (OSError, ValueError, TypeError):
        return {}
