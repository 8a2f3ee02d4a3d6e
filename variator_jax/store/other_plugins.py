"""Plugins of other programs: the official release's pickled state dicts, and T5X runs' checkpoints.

A file such as `plugin-t5_base-mux_4.pkl` holds a state dict. A T5X run keeps the plugin beside the
backbone, under `target/plugin`, and the settings of both in `variator_plugin.json` in its folder;
`t5x_engine` writes them.
"""

import dataclasses
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from variator_jax.backbones.t5 import T5, T5Config
from variator_jax.errors import CheckpointError
from variator_jax.files import AnyPath, is_url, wrap_errors
from variator_jax.plugin import PluginConfig, PluginVariables
from variator_jax.store import arrays, plugins, t5x
from variator_jax.store.backbone import Backbone, Source, identify
from variator_jax.store.description import parse, parse_json
from variator_jax.store.pickles import open_state_dict

# The official converter divides T5's residual stream by 100; its plugins were trained so.
RESIDUAL_SCALE = 100.0
_LAYER = re.compile(r"(mux_layer\.\d{1,4})\.(mux_layer|demux_adapter)\..+")
SETTINGS = "variator_plugin.json"


def load_official(
    path: AnyPath, backbone: Backbone, residual_scale: float = RESIDUAL_SCALE
) -> plugins.Plugin:
    """Reads an official plugin for a backbone of the same shape.

    The file does not name the backbone it was trained beside, so only the shape can be checked.

    Args:
      path: the file: a state dict saved by torch.save, in either of its layouts.
      backbone: the backbone, in T5X's or transformers' scale.
      residual_scale: by how much the official backbones' residual stream is smaller; 100 for the
        released plugins, 1 for one that was trained on an unscaled backbone. It becomes each
        layer's output scale, so that the weights stay those of the file.

    Raises:
      CheckpointError: if the file is damaged, holds anything but tensors, or does not fit.
    """
    if not 0 < residual_scale < float("inf"):
        raise CheckpointError(f"A residual scale is a positive number; found {residual_scale}.")
    state = {name: stored.read() for name, stored in open_state_dict(path).items()}
    config, variables = plugin_from_state_dict(state, residual_scale, str(path))
    source = f"official release, {pathlib.Path(path).name}"
    training = {"source": source, "residual_scale": residual_scale}
    plugin = plugins.Plugin(config, variables, plugins.describe_plugin(backbone, training))
    plugins.check_shapes(str(path), plugin, backbone)
    return plugin


def plugin_from_state_dict(
    state: Mapping[str, np.ndarray],
    output_scale: float = RESIDUAL_SCALE,
    what: str = "The official plugin",
) -> tuple[PluginConfig, PluginVariables]:
    """Turns `mux_layer.{i}...` arrays into a plugin that pools padding as the official code does.

    Args:
      state: official names to arrays; linear weights are `[out, in]`.
      output_scale: the a of every layer; 100 for a plugin of the official scaled backbones on a
        backbone in T5X's or transformers' scale, 1 for one trained without scaling.
      what: the file, for messages.

    Raises:
      CheckpointError: if a weight is missing, unknown, misshapen, or not a finite number.
    """
    layers = sorted({match[1] for name in state if (match := _LAYER.fullmatch(name))})
    with wrap_errors(f"{what} is not an official plugin"):
        ratio, width = state[f"{layers[0]}.mux_layer.weight"].shape
        bottleneck, _ = state[f"{layers[0]}.demux_adapter.w_in.weight"].shape
        embed = width // ratio
    # Weights are [out, in]; w_in's input is the FFN's output, then the normalised hidden vector.
    shapes = {
        "mux_layer.weight": (ratio, ratio * embed),
        "mux_layer.bias": (ratio,),
        "demux_adapter.w_in.weight": (bottleneck, 2 * embed),
        "demux_adapter.w_in.bias": (bottleneck,),
        "demux_adapter.w_out.weight": (embed, bottleneck),
        "demux_adapter.w_out.bias": (embed,),
    }
    expected = {
        f"{layer}.{name}": jax.ShapeDtypeStruct(shape, np.float32)
        for layer in layers
        for name, shape in shapes.items()
    }
    arrays.check_arrays(what, state, expected, (*arrays.WEIGHTS, "float64"))
    for name, array in state.items():
        arrays.check_finite(f"{what}: {name}", array)
    keys = {layer: f"encoder/layers_{int(layer.rpartition('.')[2])}/mlp" for layer in layers}
    return PluginConfig(ratio, bottleneck, pool_padding=True), PluginVariables(
        params={key: _params(state, layer, embed) for layer, key in keys.items()},
        output_scales={key: jnp.float32(output_scale) for key in keys.values()},
    )


def _params(state: Mapping[str, np.ndarray], layer: str, embed: int) -> dict:
    def weight(name: str) -> jnp.ndarray:
        return jnp.asarray(state[f"{layer}.{name}"], jnp.float32)

    w_in = weight("demux_adapter.w_in.weight")
    return {
        "compression": {"kernel": weight("mux_layer.weight").T, "bias": weight("mux_layer.bias")},
        "decompression": {
            "repeated_kernel": w_in[:, :embed].T,
            "input_kernel": w_in[:, embed:].T,
            "input_bias": weight("demux_adapter.w_in.bias"),
            "output_kernel": weight("demux_adapter.w_out.weight").T,
            "output_bias": weight("demux_adapter.w_out.bias"),
        },
    }


@dataclasses.dataclass(frozen=True)
class _Settings:
    plugin: dict[str, Any]
    backbone: T5Config
    training: dict[str, Any]
    initial_checkpoint_path: str | None
    initial_plugin_path: Any = None


def load_t5x_plugin(
    path: AnyPath, backbone: Backbone | None = None, progress: Callable[..., Iterable[str]] = iter
) -> plugins.Plugin:
    """Reads the plugin that a T5X run trained, and which backbone it belongs to.

    The backbone is the one in the checkpoint, read for its fingerprint one array at a time.

    Args:
      path: as for `t5x.open_checkpoint`: `checkpoint_<step>`, the run's folder for its latest, or a
        URL. `variator_plugin.json` must be in it or in the folder around it.
      backbone: one that must be the checkpoint's, in any dtype of the same fingerprint; the
        plugin then carries its name and its vocabulary. Its parameters are not used.
      progress: as for `Stream`.

    Raises:
      CheckpointError: if anything is missing, damaged or does not fit, or `backbone` is another.
    """
    source, plugin = open_run(t5x.open_checkpoint(path))
    trained_on = identify(source, progress)
    if backbone is not None:
        _check_owner(source.origin, trained_on, backbone)
    description = plugins.describe_plugin(backbone or trained_on, plugin.description["training"])
    return dataclasses.replace(plugin, description=description)


def open_run(checkpoint: t5x.Checkpoint) -> tuple[Source, plugins.Plugin]:
    """The backbone of a checkpoint with a plugin, not read yet, and the plugin.

    Both are complete and of the right shapes; the plugin's description is its training alone.

    Raises:
      CheckpointError: if there is no plugin in it, or it is not complete.
    """
    origin = checkpoint.origin
    if not checkpoint.plugin:
        raise CheckpointError(f"{origin} holds no compression plugin: its tree has no 'plugin'.")
    if not checkpoint.backbone:
        raise CheckpointError(f"{origin} holds a compression plugin and no backbone.")
    file, settings = _read_settings(checkpoint.folder)
    origin = f"{origin} with {file}"
    source = t5x.backbone_source(checkpoint, settings.backbone)
    stack = T5(source.config).stack()
    with wrap_errors(f"{origin} is not usable"):
        config = PluginConfig.from_json(settings.plugin)
        expected = plugins.expected_leaves(config, stack)
    named = {_name(path): like for path, like in expected.items()}
    leaves = arrays.read_arrays(origin, checkpoint.plugin, named)
    variables = plugins.to_variables(config, stack, {x: leaves[_name(x)] for x in expected})
    training = {"source": f"T5X run, {pathlib.Path(checkpoint.folder).name}", **settings.training}
    training["initial_checkpoint_path"] = settings.initial_checkpoint_path
    return source, plugins.Plugin(config, variables, {"training": training})


def t5x_plugin(folder: str) -> PluginConfig:
    """The settings of the plugin that a T5X run trains, from the folder of its checkpoint.

    Raises:
      CheckpointError: if they are missing or damaged.
    """
    file, settings = _read_settings(folder)
    with wrap_errors(f"{file} is not usable"):
        return PluginConfig.from_json(settings.plugin)


def _name(path: str) -> str:
    """What T5X's tree calls a leaf of a plugin folder."""
    branch, _, name = path.partition("/")
    return f"{t5x.PLUGIN}{name}" if branch == "params" else f"{t5x.PLUGIN}{name}/output_scale"


def _read_settings(folder: str) -> tuple[str, _Settings]:
    """The run's settings, from the checkpoint or from the folder around it."""
    here = folder if is_url(folder) else os.path.abspath(folder)
    for place in (here, os.path.dirname(here)):
        file, content = f"{place}/{SETTINGS}", t5x.read_key(place, SETTINGS)
        if content is not None:
            return file, parse(_Settings, parse_json(file, content), file)
    raise CheckpointError(f"There is no {SETTINGS} in {here} or around it, with a run's settings.")


def _check_owner(origin: str, trained_on: Backbone, backbone: Backbone) -> None:
    """Compares the backbone in a checkpoint with the one that its plugin shall belong to."""
    names = ("fingerprint", "mlp_activations", "layer_norm_epsilon")  # weights show the first only
    trained, given = (
        (x.fingerprint, x.config.mlp_activations, x.config.layer_norm_epsilon)
        for x in (trained_on, backbone)
    )
    for name, expected, found in zip(names, trained, given, strict=True):
        if found != expected:
            raise CheckpointError(
                f"The plugin in {origin} was trained on a backbone with {name} {expected}; "
                f"the given one has {name} {found}. Float16 changes the fingerprint, too."
            )
