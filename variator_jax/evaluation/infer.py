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
from variator_jax.errors import ConfigError, TrainingError, did_you_mean
from variator_jax.evaluation import scorers
from variator_jax.evaluation.data import Batch, EvalData, features, load_for
from variator_jax.files import write_json
from variator_jax.mesh import place_everywhere
from variator_jax.model import SplicedModel
from variator_jax.store import Backbone, Plugin, formats, load_plugin, t5x
from variator_jax.store.arrays import fingerprint
from variator_jax.store.formats import run_part
from variator_jax.store.other_plugins import load_t5x_plugin

MODES = ("predict", "score")
_LOG_PERIOD = 100  # batches

# A full batch -> an answer a row: token ids [batch, length], or scores [batch].
Answer = Callable[[Batch], np.ndarray]
Identity = Mapping[str, Any]


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
      ratio: the plugin's ratio, as a check; 1 for the backbone alone; None for that of the plugin,
        if there is one.
      mode: 'predict' for greedy decoding; 'score' for the log-probability of the targets, in nats:
        the sum over target tokens, padding left out.
      mesh_shape: `(data, fsdp, model)` devices; None chooses.

    Returns:
      The files, one a task.

    Raises:
      VariatorError: for a plugin of another backbone, or a file of another run in `output_dir`.
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
    missing = [t for t, path in paths.items() if not finished(path, identity | {"task": t})]
    for task in missing:
        try:
            _write_task(task, paths[task], data, answer, identity | {"task": task})
        except OSError as error:
            raise ConfigError(f"{paths[task]} cannot be written: {error}.") from error
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
    task: str, path: Path, data: EvalData, answer: Answer, identity: dict[str, Any]
) -> None:
    draft = Draft(path, identity, data.batch_size)
    if draft.lines:
        log(f"  {task}: continues after {draft.lines} examples")
    decode = features(task)["targets"].vocabulary.decode
    for number, (inputs, batch) in enumerate(
        data.examples(task, draft.lines // data.batch_size), start=1
    ):
        rows = answer(batch)[: len(inputs)].tolist()
        if identity["mode"] == "predict":
            answers = [{"prediction": decode(ids)} for ids in rows]
        else:
            answers = [{"score": score} for score in rows]
        draft.append({"inputs": i} | a for i, a in zip(inputs, answers, strict=True))
        if number % _LOG_PERIOD == 0:
            log(f"  {task}: {draft.lines} examples")
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


def _output_folder(path: object) -> Path:
    if not isinstance(path, str | os.PathLike) or "://" in str(path):
        raise ConfigError(f"INFER_OUTPUT_DIR is {path!r}; expected the path of a local folder.")
    return Path(path)


def finished(path: Path, identity: Identity) -> bool:
    """Whether the complete file of this very run is there.

    Args:
      path: the file of results.
      identity: what makes the run this one, in JSON's types.

    Raises:
      ConfigError: if the file of another run is there, with the differences.
    """
    mark = _mark(path)
    if not (mark.is_file() and path.is_file()):
        return False
    known = _identity_in(mark)
    differs = [key for key in identity if known.get(key) != identity[key]]
    if differs:
        parts = ", ".join(f"{k} {known.get(k)!r} and not {identity[k]!r}" for k in differs)
        raise ConfigError(
            f"{path} holds the results of another run, with {parts}: name another "
            f"INFER_OUTPUT_DIR, or remove {mark.name}."
        )
    return True


class Draft:
    """A file of results in the making.

    What a stopped run of the same identity left is kept up to its last complete batch, what one of
    another identity left is removed.

    Attributes:
      lines: how many results it holds.
    """

    def __init__(self, path: Path, identity: Identity, batch: int = 1) -> None:
        """`batch` is how many lines are appended at once."""
        self._path, self._identity = path, identity
        self._folder = path.with_name(f"tmp-{path.name}")
        self._file = self._folder / path.name
        owner = self._folder / "identity.json"
        if _identity_in(owner) != identity:
            self._file.unlink(missing_ok=True)
            write_json(owner, identity)
        written = self._file.read_bytes().split(b"\n") if self._file.exists() else [b""]
        self.lines = (len(written) - 1) // batch * batch  # the last part has no line break
        if self._file.exists():
            os.truncate(self._file, sum(len(line) + 1 for line in written[: self.lines]))

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Writes a batch of results, each as one line."""
        lines = [json.dumps(record) + "\n" for record in records]
        with self._file.open("a", encoding="utf8") as file:
            file.writelines(lines)
        self.lines += len(lines)

    def publish(self) -> None:
        """Moves the file to its place."""
        with self._file.open("rb") as file:
            os.fsync(file.fileno())
        # The old mark goes first: at no moment does it vouch for a file that is not its own.
        _mark(self._path).unlink(missing_ok=True)
        os.replace(self._file, self._path)
        write_json(_mark(self._path), self._identity)
        shutil.rmtree(self._folder)


def _mark(path: Path) -> Path:
    return path.with_name(f"{path.name}.COMPLETED")


def _identity_in(path: Path) -> dict[str, Any]:
    """The identity in a file; empty if there is none, as in T5X's."""
    try:
        return dict(json.loads(path.read_text(encoding="utf8")))
    except (OSError, ValueError, TypeError):
        return {}
