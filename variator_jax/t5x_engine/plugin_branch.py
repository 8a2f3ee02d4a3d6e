"""The plugin's branch of a T5X tree: its parameters, what they start as, and their optimizer.

The branch `plugin/` follows the module paths of the plugin's keys. Each key's output scale is one
more leaf, which is not trained.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import traverse_util
from flax.linen.partitioning import param_with_axes
from t5x import optimizers

from variator_jax.backbones.base import Stack
from variator_jax.backbones.t5 import T5, T5Config
from variator_jax.errors import ConfigError
from variator_jax.plugin import PluginConfig, PluginVariables, init_plugin, plugin_specs
from variator_jax.plugin.sites.base import ArraySpec
from variator_jax.store import load_plugin
from variator_jax.store.formats import run_part
from variator_jax.train.jobs import initial_plugin

PLUGIN = "plugin"  # the plugin's branch of the tree
OUTPUT_SCALE = "output_scale"  # one leaf of each key's branch
TRAINED, FROZEN = "plugin", "frozen"  # the labels of leaves


def to_tree(plugin: PluginVariables) -> dict[str, Any]:
    """A plugin's arrays as T5X's tree has them: by module path, with the output scales."""
    flat = {
        (*key.split("/"), *path): array
        for key, params in plugin.params.items()
        for path, array in traverse_util.flatten_dict(params).items()
    }
    flat |= {(*key.split("/"), OUTPUT_SCALE): a for key, a in plugin.output_scales.items()}
    return traverse_util.unflatten_dict(flat)


def from_tree(tree: Mapping[str, Any]) -> PluginVariables:
    """The inverse of `to_tree`."""
    flat = traverse_util.flatten_dict(flax.core.unfreeze(dict(tree)))
    keys = ["/".join(path[:-1]) for path in flat if path[-1] == OUTPUT_SCALE]
    params: dict[str, Any] = {}
    scales = {}
    for key in keys:
        depth = key.count("/") + 1
        leaves = {p[depth:]: x for p, x in flat.items() if "/".join(p[:depth]) == key}
        scales[key] = leaves.pop((OUTPUT_SCALE,))
        params[key] = traverse_util.unflatten_dict(leaves)
    return PluginVariables(params, scales)


def parameter_tree(config: PluginConfig, stack: Stack) -> dict[str, Any]:
    """The specs of a plugin's arrays, as `to_tree` arranges the arrays."""
    scale = ArraySpec((), (), nn.initializers.ones)
    flat = {
        f"{key}/{name}": spec
        for key, specs in plugin_specs(config, stack).items()
        for name, spec in {OUTPUT_SCALE: scale, **specs}.items()
    }
    return traverse_util.unflatten_dict(flat, sep="/")


class Parameters(nn.Module):
    """A tree of float32 parameters with logical axes.

    Attributes:
      specs: their `ArraySpec`s, in nested dicts.
    """

    specs: Mapping[str, Any]

    @nn.compact
    def __call__(self) -> dict[str, Any]:
        """The arrays, in dicts as `specs`."""
        return {
            name: param_with_axes(name, spec.init, spec.shape, jnp.float32, axes=spec.axes)
            if isinstance(spec, ArraySpec)
            else Parameters(spec, name=name)()
            for name, spec in self.specs.items()
        }


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a plugin's arrays come from before the first step.

    Attributes:
      plugin: its settings.
      backbone: shape of its backbone.
      path: a plugin folder, or one for each of several ratios; None or () for a fresh plugin.
      seed: of a fresh one.
    """

    plugin: PluginConfig
    backbone: T5Config
    path: str | Sequence[str] | None = None
    seed: int = 0

    @property
    def fresh(self) -> bool:
        """Whether the plugin starts untrained, and so must be calibrated."""
        return not self.path


def start_values(start: Start) -> PluginVariables:
    """The arrays that `start` names. Fresh ones are those of the built-in engine.

    Raises:
      CheckpointError: if a folder is damaged or has another plugin.
      ConfigError: if none of several folders has the wanted ratio.
    """
    if not start.path:
        shape, key = start.backbone, jax.random.key(start.seed)
        return init_plugin(start.plugin, T5(shape).stack(), key)
    return _loaded(str(chosen_path(start.path, start.plugin)), start.plugin, start.backbone)


@functools.lru_cache(maxsize=2)  # T5X asks for the initial variables several times.
def _loaded(path: str, plugin: PluginConfig, backbone: T5Config) -> PluginVariables:
    # T5X asks while it traces; what is kept must not belong to that trace.
    with jax.ensure_compile_time_eval():
        return jax.tree.map(np.asarray, initial_plugin(path, plugin, backbone).variables)


def chosen_path(path: str | Sequence[str], plugin: PluginConfig) -> pathlib.Path:
    """The plugin folder that `path` names, of several the one with the wanted ratio.

    Raises:
      CheckpointError: if a folder is damaged.
      ConfigError: if none of several has the ratio.
    """
    if isinstance(path, str):
        return run_part(path, "plugin")
    folders = {load_plugin(f).config.ratio: f for f in (run_part(p, "plugin") for p in path)}
    if plugin.ratio not in folders:
        raise ConfigError(f"RATIO is {plugin.ratio}; the plugins in {path} have {list(folders)}.")
    return folders[plugin.ratio]


def is_trained(path: tuple[Any, ...]) -> bool:
    """Whether the leaf at this path of a T5X tree is trained: the plugin's, but for its scales."""
    names = [key.key for key in path]
    return names[0] == PLUGIN and names[-1] != OUTPUT_SCALE


def labels(params: Any) -> Any:
    """'plugin' or 'frozen' for each leaf, in the very containers of `params`, as optax asks for."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: TRAINED if is_trained(path) else FROZEN, params
    )


class PluginOptimizer(optimizers.OptaxWrapper):
    """T5X's wrapper of an optax optimizer, applied to the plugin's parameters and to no others.

    Modifications to the host: `apply_gradient` hands frozen leaves through. Adding a zero would
    leave their values alone, but not the sign of a zero, and would rewrite every weight.
    """

    def __init__(self, optimizer: optax.GradientTransformation) -> None:
        super().__init__(
            optax.multi_transform({TRAINED: optimizer, FROZEN: optax.set_to_zero()}, labels)
        )

    def apply_gradient(
        self, hyper_params: Any, params: Any, state: Any, grads: Any
    ) -> tuple[Any, Any]:
        """The new parameters and state; frozen leaves are those of `params` themselves."""
        updated, state = super().apply_gradient(hyper_params, params, state, grads)
        kept = jax.tree_util.tree_map_with_path(
            lambda path, old, new: new if is_trained(path) else old, params, updated
        )
        return kept, state
