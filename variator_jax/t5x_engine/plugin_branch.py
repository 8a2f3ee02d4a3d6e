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
from variator_jax.train.jobs import initial_plugin, run_part

PLUGIN = "plugin"  # the plugin's branch of the tree
OUTPUT_SCALE = "output_scale"  # next to each key's trained parameters
TRAINED, FROZEN = "plugin", "frozen"  # the labels of leaves


def to_tree(plugin: PluginVariables) -> dict[str, Any]:
    """A plugin's arrays as T5X's tree has them: by module path, with output scales."""
    flat = {
        (*key.split("/"), *path): array
        for key, params in plugin.params.items()
        for path, array in traverse_util.flatten_dict(params).items()
    }
    flat |= {(*key.split("/"), OUTPUT_SCALE): a for key, a in plugin.output_scales.items()}
    return traverse_util.unflatten_dict(flat)


def from_tree(tree: Mapping[str, Any]) -> PluginVariables:
    """The inverse of `to_tree`."""
    flat = traverse_util.flatten_dict(flax.core.unfreeze(dict(tree)), sep="/")
    scales = {
        path.removesuffix(f"/{OUTPUT_SCALE}"): array
        for path, array in flat.items()
        if path.endswith(f"/{OUTPUT_SCALE}")
    }
    params = {
        key: traverse_util.unflatten_dict(
            {
                path.removeprefix(f"{key}/"): array
                for path, array in flat.items()
                if path.startswith(f"{key}/") and not path.endswith(OUTPUT_SCALE)
            },
            sep="/",
        )
        for key in scales
    }
    return PluginVariables(params, scales)


class PluginParameters(nn.Module):
    """A plugin's parameters in a T5X tree, each with axes; what they start as is `model.py`'s."""

    config: PluginConfig
    stack: Stack

    @nn.compact
    def __call__(self) -> PluginVariables:
        """The plugin's arrays, in the two trees that `splice` takes."""
        branches: dict[str, dict[str, ArraySpec]] = {}
        scale = ArraySpec((), (), nn.initializers.ones)
        for key, specs in plugin_specs(self.config, self.stack).items():
            branch, _, rest = key.partition("/")
            named = {f"{rest}/{name}": spec for name, spec in specs.items()}
            branches.setdefault(branch, {}).update({f"{rest}/{OUTPUT_SCALE}": scale, **named})
        return from_tree({name: _Branch(specs, name=name)() for name, specs in branches.items()})


class _Branch(nn.Module):
    """A subtree of parameters, by paths relative to it."""

    specs: Mapping[str, ArraySpec]

    @nn.compact
    def __call__(self) -> dict[str, Any]:
        children: dict[str, dict[str, ArraySpec]] = {}
        tree = {}
        for path, spec in self.specs.items():
            name, _, rest = path.partition("/")
            if rest:
                children.setdefault(name, {})[rest] = spec
            else:
                tree[name] = param_with_axes(
                    name, spec.init, spec.shape, jnp.float32, axes=spec.axes
                )
        return tree | {name: _Branch(specs, name=name)() for name, specs in children.items()}


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a plugin's arrays come from before the first step.

    Attributes:
      plugin: its settings.
      backbone: shape of the plugin's backbone.
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
    folders = [run_part(one, "plugin") for one in path]
    ratios = [load_plugin(folder).config.ratio for folder in folders]
    if plugin.ratio not in ratios:
        raise ConfigError(
            f"RATIO is {plugin.ratio}, but the plugins in {list(path)} have the ratios {ratios}."
        )
    return folders[ratios.index(plugin.ratio)]


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
