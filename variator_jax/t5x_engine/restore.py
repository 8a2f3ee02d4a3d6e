"""Which checkpoint a T5X program restores, checked before T5X starts.

T5X restores what it finds, and makes the rest up. So the leaves' names and shapes are compared
with the model's beforehand, and what is to come from elsewhere (a fresh plugin, the optimizer's
state) is named.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from t5x import checkpoints, utils
from tensorflow.io import gfile

from variator_jax.errors import CheckpointError, ConfigError, did_you_mean
from variator_jax.store import formats, load_plugin, t5x
from variator_jax.t5x_engine.model import DistillationModel
from variator_jax.t5x_engine.plugin_branch import PLUGIN, chosen_path
from variator_jax.train.jobs import run_part

# What T5X must not restore from a backbone's checkpoint: its step and optimizer, and any plugin.
_FRESH_STATE = ("state.*", None)
_FRESH_PLUGIN = (f"target/{PLUGIN}/.*", None)
_DTYPES = ("float32", "bfloat16", "float16")


def absolute_path(path: str) -> str:
    """The path as T5X's Orbax wants it; URLs stay as they are.

    Raises:
      ConfigError: if it is not a path.
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
    """T5X's settings for restoring a backbone and its plugin.

    Args:
      path: a T5X checkpoint, or a local folder of some, whose latest is taken.
      model: what is restored; the checkpoint must have every leaf that it needs.
      plugin_path: a plugin folder, or one a ratio; None or () for the plugin of the checkpoint
        itself, of a T5X run. Outside of training it must belong to this very backbone.
      training: a new run, which takes nothing but the backbone from `path`.
      dtype: what the backbone is cast to; None keeps the checkpoint's.
      check_owner: whether to read every weight once, to see that a plugin folder belongs to them.
      model_dir: the folder of a run; if it has checkpoints it is resumed, and `path` ignored.

    Raises:
      CheckpointError: if there is no T5X checkpoint, or one of another backbone or plugin.
      ConfigError: for settings that do not go together.
    """
    plugin = model.start.plugin
    if dtype is not None and dtype not in _DTYPES:
        near = did_you_mean(dtype, _DTYPES)
        raise ConfigError(f"BACKBONE_DTYPE is {dtype!r}; it is one of {_DTYPES}.{near}")
    if model_dir and gfile.isdir(model_dir) and checkpoints.latest_step(model_dir) is not None:
        where, found = _leaves(model_dir)
        check_leaves(where, found, _wanted(model), "MODEL_DIR holds checkpoints of something else:")
        return utils.RestoreCheckpointConfig(path=where, mode="specific")
    if not path:
        name = "INITIAL_CHECKPOINT_PATH" if training else "CHECKPOINT_PATH"
        raise ConfigError(f"A plugin works beside a backbone: set {name} to a T5X checkpoint.")
    where, found = _leaves(absolute_path(path))
    if not re.fullmatch(r"checkpoint_\d+", os.path.basename(where.rstrip("/"))):
        raise CheckpointError(
            f"{where}: T5X restores a checkpoint only from a folder that is called checkpoint_N, "
            "N its step; rename it."
        )
    fresh_plugin = (training or bool(plugin_path)) and plugin.ratio > 1
    if dtype is not None and plugin.ratio > 1 and not fresh_plugin:
        raise ConfigError(
            f"BACKBONE_DTYPE = {dtype!r} would cast the checkpoint's plugin, too, and plugins are "
            "float32: leave it None, which keeps what the run was trained in, or convert the "
            "plugin to a folder (variator convert --from t5x-run) and give PLUGIN_PATH."
        )
    wanted = _wanted(model)
    if fresh_plugin:
        wanted = {k: v for k, v in wanted.items() if not k.startswith(f"{PLUGIN}/")}
    check_leaves(where, found, wanted)
    if plugin_path and plugin.ratio > 1 and not training and check_owner:
        load_plugin(chosen_path(plugin_path, plugin), formats.identify_backbone(where))
    rules = [_FRESH_STATE] if training else []
    rules += [_FRESH_PLUGIN] if fresh_plugin else []
    return utils.RestoreCheckpointConfig(
        path=where,
        mode="specific",
        dtype=dtype,
        assignment_map=tuple(rules) or None,
        fallback_to_scratch=bool(rules),
    )


def check_leaves(
    where: str,
    found: Mapping[str, tuple[int, ...]],
    wanted: Mapping[str, tuple[int, ...]],
    opening: str = "",
) -> None:
    """Compares a checkpoint's leaves with those that are wanted; additional leaves are ignored.

    Raises:
      CheckpointError: for a missing leaf, or one of another shape, with the nearest remedy.
    """
    where = f"{opening} {where}".strip()
    missing = [name for name in wanted if name not in found]
    if missing and any(name.startswith("encoder/encoder/") for name in found):
        raise CheckpointError(
            f"{where} has scanned layers (scalable_t5), which the plugin cannot be spliced into. "
            f"variator convert --from t5x --to t5x {where} DST writes the plain form."
        )
    if missing and all(name.startswith(f"{PLUGIN}/") for name in missing):
        raise CheckpointError(
            f"{where} has no plugin (it lacks {missing[0]} and {len(missing) - 1} more leaves): "
            "name a checkpoint of a T5X run that trained one, or a plugin folder in PLUGIN_PATH."
        )
    if missing:
        raise CheckpointError(
            f"{where} lacks {missing[0]} and {len(missing) - 1} more leaves of the backbone; the "
            "gin files ask for another one than it holds."
        )
    for name, shape in wanted.items():
        if found[name] != shape:
            hint = " RATIO and BOTTLENECK must be those of the run." if PLUGIN in name else ""
            raise CheckpointError(
                f"{where} has {name} of shape {found[name]}, this run's is {shape}.{hint}"
            )


def _wanted(model: DistillationModel) -> dict[str, tuple[int, ...]]:
    """The shapes of the model's parameters, for any network."""
    names = ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")
    shapes = {name: (1, 8) for name in names}
    types = dict.fromkeys(names, jnp.int32)
    variables = jax.eval_shape(
        lambda rng: model.get_initial_variables(rng, shapes, types), jax.random.key(0)
    )
    leaves = jax.tree_util.tree_leaves_with_path(variables["params"])
    return {"/".join(key.key for key in path): leaf.shape for path, leaf in leaves}


def _leaves(path: str) -> tuple[str, dict[str, tuple[int, ...]]]:
    try:
        opened = t5x.open_checkpoint(path)
    except CheckpointError as error:
        raise CheckpointError(f"{error}{_remedy(path)}") from error
    arrays = {**opened.backbone, **opened.plugin}
    return opened.folder, {name: array.shape for name, array in arrays.items()}


def _remedy(path: str) -> str:
    """How to make a T5X checkpoint of a backbone in another format, if it is one."""
    folder = run_part(path, "backbone")
    names = {formats.BACKBONE: "variator", formats.HUGGING_FACE: "hf"}
    kind = names.get(formats.kind_of(folder)) if folder.is_dir() else None
    if kind is None:
        return ""
    return (
        f" T5X restores its own checkpoints only. Convert this one: variator convert --from {kind} "
        f"--to t5x {folder} DST/checkpoint_0; or use --engine=builtin."
    )
