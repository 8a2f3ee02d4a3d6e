"""Which checkpoint a T5X program restores, looked at before T5X does.

T5X restores what it finds, and makes the rest up. So the leaves' names and shapes are compared
with the backbone's beforehand, and what is to come from elsewhere (a fresh plugin, the optimizer's
state) is named.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence

import jax
from t5x import checkpoints, utils
from tensorflow.io import gfile

from variator_jax.backbone import T5Config
from variator_jax.backbone.network import shape_params
from variator_jax.checkpoints import any_backbone, kinds, load_plugin, stores, t5x
from variator_jax.distill.jobs import run_part
from variator_jax.errors import CheckpointError, ConfigError
from variator_jax.plugin import PluginConfig, init_plugin
from variator_jax.t5x_engine.network import PLUGIN, to_tree
from variator_jax.t5x_engine.start import chosen_path

# What T5X shall not take from a backbone's checkpoint: its step and optimizer, and any plugin.
_FRESH_STATE = ("state.*", None)
_FRESH_PLUGIN = (f"target/{PLUGIN}/.*", None)


def absolute_path(path: str) -> str:
    """The path as T5X's Orbax wants it; URLs stay as they are.

    Raises:
      ConfigError: if it is no path.
    """
    if not isinstance(path, str) or not path:
        raise ConfigError(f"A folder's path was expected, in quotes; found {path!r}.")
    return path if stores.is_url(path) else os.path.abspath(os.path.expanduser(path))


def restore_config(
    path: str,
    backbone: T5Config,
    plugin: PluginConfig,
    plugin_path: str | Sequence[str] | None = None,
    training: bool = False,
    dtype: str | None = None,
    custom_network: bool = False,
    check_owner: bool = True,
    model_dir: str | None = None,
) -> utils.RestoreCheckpointConfig:
    """T5X's settings for restoring a backbone, and a plugin beside it.

    Args:
      path: a T5X checkpoint, or a local folder of some, whose latest is taken.
      backbone: the shape that it must have.
      plugin: the plugin that the model has.
      plugin_path: a plugin folder, or one a ratio; None or () for the plugin of the checkpoint
        itself, of a T5X run. Outside of training it must belong to this very backbone.
      training: a new run, which takes nothing but the backbone from `path`.
      dtype: what the backbone is cast to; None keeps the checkpoint's.
      custom_network: the network is the user's own, so its leaves are not known here.
      model_dir: where a run that is resumed has its own checkpoints, so that `path` is not read.
      check_owner: whether to read every weight once, to see that a plugin folder belongs to them.

    Raises:
      CheckpointError: if there is no T5X checkpoint, or one of another backbone or plugin; or if
        the plugin folder belongs to another backbone.
    """
    if not path:
        name = "INITIAL_CHECKPOINT_PATH" if training else "CHECKPOINT_PATH"
        raise ConfigError(f"A plugin works beside a backbone: set {name} to a T5X checkpoint.")
    if model_dir and gfile.isdir(model_dir) and checkpoints.latest_step(model_dir) is not None:
        return utils.RestoreCheckpointConfig(path=absolute_path(path), mode="specific")
    where, found = _leaves(absolute_path(path))
    if not re.fullmatch(r"checkpoint_\d+", os.path.basename(where.rstrip("/"))):
        raise CheckpointError(
            f"{where}: T5X restores a checkpoint only from a folder that is called checkpoint_N, "
            "N its step; rename it."
        )
    fresh_plugin = (training or bool(plugin_path)) and plugin.ratio > 1
    if not custom_network:
        wanted = _shapes(backbone, None if fresh_plugin else plugin)
        check_leaves(where, found, wanted)
    if plugin_path and plugin.ratio > 1 and not training and check_owner:
        load_plugin(chosen_path(plugin_path, plugin), any_backbone.identify_backbone(where))
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
    where: str, found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]
) -> None:
    """Compares a checkpoint's leaves with those that are wanted; more of them do no harm.

    Raises:
      CheckpointError: for a missing leaf, or one of another shape, with the nearest remedy.
    """
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


def _shapes(backbone: T5Config, plugin: PluginConfig | None) -> dict[str, tuple[int, ...]]:
    tree = dict(shape_params(backbone))
    if plugin is not None and plugin.ratio > 1:
        layers, embed = backbone.num_encoder_layers, backbone.embed_dim
        tree[PLUGIN] = jax.eval_shape(
            lambda: to_tree(init_plugin(plugin, layers, embed, jax.random.key(0)))
        )
    leaves = jax.tree_util.tree_leaves_with_path(tree)
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
    names = {kinds.BACKBONE: "variator", kinds.HUGGING_FACE: "hf"}
    kind = names.get(kinds.kind_of(folder)) if folder.is_dir() else None
    if kind is None:
        return ""
    return (
        f" T5X restores its own checkpoints only. Convert this one: variator convert --from {kind} "
        f"--to t5x {folder} DST/checkpoint_0; or use --engine=builtin."
    )
