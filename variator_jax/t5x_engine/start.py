"""What a plugin starts as under T5X: fresh, or the arrays of a plugin folder."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Sequence

import jax
import numpy as np

from variator_jax.backbones.t5 import T5, T5Config
from variator_jax.errors import ConfigError
from variator_jax.plugin import PluginConfig, PluginVariables, init_plugin
from variator_jax.store import load_plugin
from variator_jax.train.jobs import initial_plugin, run_part


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a plugin's arrays come from before the first step.

    Attributes:
      plugin: its settings.
      backbone: shape of the backbone beside it.
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
