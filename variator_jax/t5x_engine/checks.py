"""What is checked before T5X starts, where its own error would be late, or there is none.

T5X restores what it finds, and makes the rest up. So a checkpoint's leaves are compared with the
model's, and what is to come from elsewhere (a fresh plugin, the optimizer's state) is named. What a
run trains is recorded in its folder, in `variator_plugin.json`, which a resumed run is compared
with and `variator convert --from t5x-run` reads.
"""

import hashlib
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import traverse_util
from t5x import checkpoints, utils
from tensorflow.io import gfile

from variator_jax.backbones.t5 import T5Config
from variator_jax.data.batches import digest, task_or_mixture
from variator_jax.data.cuts import describe_local
from variator_jax.errors import CheckpointError, ConfigError, check_known
from variator_jax.plugin import PluginConfig
from variator_jax.store import Plugin, formats, load_plugin, t5x
from variator_jax.store.description import config_content
from variator_jax.store.other_plugins import SETTINGS, t5x_plugin
from variator_jax.t5x_engine.model import DistillationModel
from variator_jax.t5x_engine.network import PLUGIN, chosen_path
from variator_jax.t5x_engine.partitioning import model_devices
from variator_jax.train.checks import check_packing, check_steps, check_vocabulary, take_longer

_RESULTS = "variator_results.json"  # in the folder of T5X's results: what they are the results of
# What T5X shall not take from a backbone's checkpoint: its step and optimizer, and any plugin.
_FRESH_STATE = ("state.*", None)
_FRESH_PLUGIN = (f"target/{PLUGIN}/.*", None)
_DTYPES = (None, "float32", "bfloat16", "float16")

Shapes = Mapping[str, tuple[int, ...]]


def preflight(
    *,
    model: DistillationModel,
    task: str | None = None,
    feature_lengths: Mapping[str, int] | None = None,
    model_dir: str | None = None,
    training: Mapping[str, Any] | None = None,
    packed: bool = False,
    pack_multiple: int = 1,
    batch_size: int = 1,
    num_microbatches: int = 1,
    periods: Sequence[int] = (),
    output_dir: str | None = None,
    results_dir: str | None = None,
    results_of: Mapping[str, Any] | None = None,
    mesh_shape: Sequence[int] | None = None,
    num_partitions: int = 1,
) -> None:
    """Checks what gin has made, and what T5X checks late or never.

    Args:
      model: T5X's model.
      task: a registered task or mixture.
      feature_lengths: its tokens; how many texts are longer is printed, where they are local.
      model_dir: the folder of a training run, which may hold one already.
      training: what decides that run's batches, as in `check_same_run`.
      periods: steps between evaluations and checkpoints; 0 for none.
      output_dir, results_dir: folders of an export, of inference with results of `results_of`.
      mesh_shape: the mesh; None for `num_partitions` devices.

    Raises:
      VariatorError: for what T5X or the plugin cannot work with.
    """
    backbone = model.start.backbone
    if task is not None:
        _check_task(task, feature_lengths, backbone)
    if packed:
        check_packing(pack_multiple, model.start.plugin.period)
    parts = model_devices(mesh_shape) if mesh_shape is not None else num_partitions
    strides = list(filter(None, periods))
    checks = {
        f"NUM_MICROBATCHES is {num_microbatches}; it must divide BATCH_SIZE, {batch_size}.": (
            num_microbatches < 1 or batch_size % num_microbatches
        ),
        f"The backbone's {backbone.num_heads} heads do not divide among {parts} devices of the "
        "mesh's model axis (MESH_SHAPE, NUM_PARTITIONS).": backbone.num_heads % parts,
        "T5X asks that EVAL_PERIOD and CHECKPOINT_PERIOD are multiples of one another; found "
        f"{' and '.join(map(str, strides))}.": any(n % min(strides) for n in strides),
        f"MODEL_OUTPUT_DIR {output_dir!r} must end in a version number, such as {output_dir}/1.": (
            output_dir is not None and not re.search(r"(^|/)\d+/*$", output_dir)
        ),
    }
    for message, failed in checks.items():
        if failed:
            raise ConfigError(message)
    if model_dir is not None:
        check_same_run(model_dir, model, training or {})
    if results_dir is not None:
        _check_results(results_dir, _results_identity(model, task, results_of or {}))


def _check_task(task: str, feature_lengths: Mapping[str, int] | None, backbone: T5Config) -> None:
    vocabulary = task_or_mixture(task).output_features["inputs"].vocabulary
    check_vocabulary(task, vocabulary, backbone)
    if feature_lengths is not None:
        for line in describe_local(task, ("train", "validation"), feature_lengths):
            print(f"  {line}", file=sys.stderr)


def _results_identity(
    model: DistillationModel, task: str | None, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """What decides the results of inference: the settings, and what their paths hold now."""
    identity = {**settings, "sites": model.start.plugin.description}
    if settings.get("checkpoint"):
        folder, _ = _open(absolute_path(settings["checkpoint"]))
        identity |= {"checkpoint": folder, "checkpoint_written": _written(folder)}
    if task is not None and "split" in settings:
        identity["data"] = digest(task, settings["split"])
    if (loaded := model.start.loaded) is not None:
        identity["plugin_arrays"] = Plugin(model.start.plugin, loaded).fingerprint
    return identity


def _written(folder: str) -> str:
    """What another checkpoint that is written into the same folder has not."""
    names = ("state/manifest.ocdbt", "manifest.ocdbt", "state/_METADATA", "_METADATA", "checkpoint")
    index = next(filter(gfile.exists, (os.path.join(folder, name) for name in names)))
    with gfile.GFile(index, "rb") as opened:
        content = hashlib.sha256(opened.read()).hexdigest()[:16]
    # A manifest names its own files and time; other indices are alike, seconds are all there is.
    return content if index.endswith(".ocdbt") else f"{content} {gfile.stat(index).mtime_nsec}"


def _plugin_folder(path: str) -> str:
    """The absolute path of a plugin folder, or of that in a run folder."""
    return absolute_path(str(formats.run_part(path, "plugin")))


def _check_results(folder: str, identity: dict[str, Any]) -> None:
    """T5X leaves finished files alone, whatever they are the results of."""
    before, now = _read_json(folder, _RESULTS), _as_json(identity)
    files, parts = (gfile.glob(os.path.join(folder, x, "*.COMPLETED")) for x in ("", "tmp-*"))
    if "checkpoint_written" not in (before or {}):  # of an earlier version
        now = {**now, "checkpoint_written": None}
        before = before and {**before, "checkpoint_written": None}
    if not parts:  # which a stopped run left: they are of so many batches each
        before, now = ({**(x or {}), "batch_size": None} for x in (before, now))
    if before != now and (files or parts):
        raise ConfigError(
            f"INFER_OUTPUT_DIR {folder} holds results of another run ({before}), which T5X would "
            "keep; choose another folder."
        )
    _write_json(folder, _RESULTS, identity)


def check_same_run(
    folder: str, model: DistillationModel, training: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Refuses to continue a run in whose folder another one was begun.

    Args:
      folder: MODEL_DIR.
      model: what is trained now.
      training: what decides the next batches and updates. `TRAIN_STEPS` may grow.

    Returns:
      The folder's record of its run; None if there is none yet.

    Raises:
      CheckpointError: naming what differs.
    """
    before = _read_json(folder, SETTINGS)
    if before is None:
        return None
    done = checkpoints.latest_step(folder) or 0
    check_steps(training.get("TRAIN_STEPS", done), done, folder)
    longer = take_longer(before.setdefault("training", {}), training)
    plugin = PluginConfig.from_json(before["plugin"]).to_run()
    known = {**before, "plugin": _as_json(plugin)}
    now = _record(model, training) | {"plugin": model.start.plugin.to_run()}
    if "initial_plugin_path" in before:
        paths = (before["initial_plugin_path"], model.start.path)
        begun, given = (path and _plugin_folder(str(path)) for path in paths)
        known["started from"] = {"INITIAL_PLUGIN_PATH": begun}
        now["started from"] = {"INITIAL_PLUGIN_PATH": given}
    differing = [
        f"{name} {known.get(part, {}).get(name)!r} and not {value!r}"
        for part, fields in _as_json(now).items()
        for name, value in fields.items()
        # Earlier versions wrote less of how a run trains; what is unknown is not compared.
        if known.get(part, {}).get(name, value if part == "training" else None) != value
    ]
    if differing:
        names = ", ".join(differing)
        raise CheckpointError(
            f"MODEL_DIR {folder} holds another run, with {names}; choose another MODEL_DIR."
        )
    print(longer, end="", file=sys.stderr)
    return before


def record_run(
    folder: str, model: DistillationModel, training: Mapping[str, Any], checkpoint: str | None
) -> None:
    """Writes what a run trains; of a run that continues, checks that it is the same."""
    paths = {"initial_checkpoint_path": checkpoint, "initial_plugin_path": model.start.path}
    record = _record(model, {"engine": "t5x", **training}) | paths
    _write_json(folder, SETTINGS, check_same_run(folder, model, training) or record)


def _record(model: DistillationModel, training: Mapping[str, Any]) -> dict[str, Any]:
    plugin, backbone = model.start.plugin.to_json(), config_content(model.start.backbone)
    training = dict(training)
    if training.get("SCHEDULE") == "constant":
        training.pop("TRAIN_STEPS", None)
    return {"plugin": plugin, "backbone": backbone, "training": training}


def _as_json(content: Mapping[str, Any]) -> Any:
    """The content as it is read back from a file."""
    return json.loads(json.dumps(content, default=_named))


def _named(value: Any) -> str:
    """What a file keeps of a value that JSON has no form for: of a function its name."""
    return getattr(value, "__qualname__", str(value))


def _read_json(folder: str, name: str) -> Any:
    file = os.path.join(folder, name)
    if not gfile.exists(file):
        return None
    with gfile.GFile(file, "r") as opened:
        return json.loads(opened.read())


def _write_json(folder: str, name: str, content: Mapping[str, Any]) -> None:
    gfile.makedirs(folder)
    with gfile.GFile(os.path.join(folder, name), "w") as opened:
        opened.write(json.dumps(content, indent=2, default=_named) + "\n")


def absolute_path(path: str) -> str:
    """The path as T5X's Orbax wants it; URLs stay as they are.

    Raises:
      ConfigError: for anything but a string.
    """
    if not isinstance(path, str) or not path:
        raise ConfigError(f"A folder's path was expected, in quotes; found {path!r}.")
    return path if formats.is_url(path) else os.path.abspath(os.path.expanduser(path))


def restore_config(
    path: str,
    model: DistillationModel,
    plugin_path: str | Sequence[str] | None = None,
    training: bool = False,
    dtype: str | None = None,
    check_owner: bool = True,
    model_dir: str | None = None,
) -> utils.RestoreCheckpointConfig:
    """T5X's settings for restoring a backbone, and a plugin with it.

    Args:
      path: a T5X checkpoint, or a local folder of some, whose latest is taken.
      model: what is restored; the checkpoint must have every leaf that it needs.
      plugin_path: a plugin folder, or one a ratio; None or () for the plugin of the checkpoint
        itself, of a T5X run. Outside of training it must belong to this very backbone.
      training: a new run, which takes nothing but the backbone from `path`.
      dtype: what the backbone is cast to; None keeps the checkpoint's.
      check_owner: whether to read every weight once, to see that a plugin folder belongs to them.
      model_dir: the folder of a run that is resumed if it has checkpoints, whatever `path` is.

    Raises:
      CheckpointError: if there is no T5X checkpoint, or one of another backbone or plugin.
      ConfigError: for settings that do not go together.
    """
    plugin, wanted = model.start.plugin, _parameter_shapes(model)
    check_known("BACKBONE_DTYPE is", dtype, _DTYPES)
    if model_dir and gfile.isdir(model_dir) and checkpoints.latest_step(model_dir) is not None:
        folder, stored = _open(model_dir)
        _check_leaves(f"MODEL_DIR holds checkpoints of something else: {folder}", stored, wanted)
        return utils.RestoreCheckpointConfig(path=folder, mode="specific")
    if not path:
        name = "INITIAL_CHECKPOINT_PATH" if training else "CHECKPOINT_PATH"
        raise ConfigError(f"A plugin needs its backbone: set {name} to a T5X checkpoint.")
    folder, stored = _open(absolute_path(path))
    fresh_plugin = (training or bool(plugin_path)) and plugin.ratio > 1
    if dtype is not None and plugin.ratio > 1 and not fresh_plugin:
        raise ConfigError(
            f"BACKBONE_DTYPE = {dtype!r} would cast the checkpoint's plugin, too, and plugins are "
            "float32: leave it None, or convert the plugin to a folder and give PLUGIN_PATH."
        )
    if fresh_plugin:
        wanted = {k: v for k, v in wanted.items() if not k.startswith(f"{PLUGIN}/")}
    _check_leaves(folder, stored, wanted)
    if plugin.ratio > 1 and not fresh_plugin:
        trained = t5x_plugin(folder)  # other sites may have leaves of the same names and shapes
        if trained != plugin:
            raise CheckpointError(
                f"{folder} was trained with '{trained.description}'; this run has "
                f"'{plugin.description}'. SITES, RATIO and the like must be those of the run."
            )
    if plugin_path and plugin.ratio > 1 and not training and check_owner:
        load_plugin(chosen_path(plugin_path, plugin), formats.identify_backbone(folder))
    rules = tuple([_FRESH_STATE] * training + [_FRESH_PLUGIN] * fresh_plugin)
    fresh = {"assignment_map": rules or None, "fallback_to_scratch": bool(rules)}
    return utils.RestoreCheckpointConfig(path=folder, mode="specific", dtype=dtype, **fresh)


def _check_leaves(folder: str, stored: Shapes, wanted: Shapes) -> None:
    """Refuses a checkpoint without a wanted leaf, or with one of another shape."""
    missing = [name for name in wanted if name not in stored]
    if missing:
        lacks = f"(it lacks {missing[0]} and {len(missing) - 1} more leaves)"
        reason = f"is not of the backbone of the gin files {lacks}."
        if any(name.startswith("encoder/encoder/") for name in stored):
            reason = (
                "has scanned layers (scalable_t5), which the plugin cannot be spliced into. "
                f"variator convert --from t5x --to t5x {folder} DST writes the plain form."
            )
        elif all(name.startswith(f"{PLUGIN}/") for name in missing):
            reason = f"has no plugin {lacks}: name a T5X run that trained one, or set PLUGIN_PATH."
        raise CheckpointError(f"{folder} {reason}")
    for name, shape in wanted.items():
        if stored[name] != shape:
            hint = " RATIO and BOTTLENECK must be those of the run." if PLUGIN in name else ""
            raise CheckpointError(
                f"{folder} has {name} of shape {stored[name]}, this run's is {shape}.{hint}"
            )


def _parameter_shapes(model: DistillationModel) -> Shapes:
    """The shapes of the model's parameters, whatever its network is."""
    names = ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")
    tokens = dict.fromkeys(names, (1, 8))
    variables = jax.eval_shape(
        lambda rng: model.get_initial_variables(rng, tokens), jax.random.key(0)
    )
    leaves = traverse_util.flatten_dict(variables["params"], sep="/")
    return {name: leaf.shape for name, leaf in leaves.items()}


def _open(path: str) -> tuple[str, Shapes]:
    """The folder of a T5X checkpoint, and its leaves; other formats name the conversion."""
    try:
        opened = t5x.open_checkpoint(path)
    except CheckpointError as error:
        folder = formats.run_part(path, "backbone")
        names = {formats.BACKBONE: "variator", formats.HUGGING_FACE: "hf"}
        name = names.get(formats.kind_of(folder)) if folder.is_dir() else None
        convert = f"variator convert --from {name} --to t5x {folder} DST/checkpoint_0"
        remedy = f" Convert it: {convert}; or use --engine=builtin." if name else ""
        raise CheckpointError(f"{error}{remedy}") from error
    if not re.fullmatch(r"checkpoint_\d+", os.path.basename(opened.folder.rstrip("/"))):
        raise CheckpointError(
            f"{opened.folder}: T5X restores a checkpoint only from a folder that is called "
            "checkpoint_N, N its step; rename it."
        )
    arrays = {**opened.backbone, **opened.plugin}
    return opened.folder, {name: array.shape for name, array in arrays.items()}
