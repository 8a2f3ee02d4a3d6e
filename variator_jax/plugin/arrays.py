"""A plugin's arrays, by module path, and what a stack costs with the plugin in place, in FLOPs.

A multiply-add counts as 2 FLOPs, and only matrix products and the weighted sum of a merge group are
counted. Left out, as in the paper: softmax, norms, activations, residual additions, biases, masks,
position buckets and the embedding look-up. They are what separates these figures from XLA's own
count, a few per cent at small widths and below one per cent at T5-base.
"""

import math

import jax
import jax.numpy as jnp
from flax import struct, traverse_util

from variator_jax.backbones.base import Stack
from variator_jax.errors import check_whole
from variator_jax.plugin.config import PluginConfig
from variator_jax.plugin.sites.base import ArraySpec


@struct.dataclass
class PluginVariables:
    """The arrays of one compression plugin.

    Attributes:
      params: key of a site, such as 'encoder/layers_0/mlp' -> its tree of arrays, float32, the only
        ones that training moves.
      output_scales: key -> a, float32 scalars, set once by calibration.
    """

    params: dict
    output_scales: dict


def plugin_specs(config: PluginConfig, stack: Stack) -> dict[str, dict[str, ArraySpec]]:
    """The arrays of a plugin on a stack: key -> name -> shape, axes and initialiser.

    Raises:
      PluginError: if the config names layers that the stack does not have.
    """
    return {key: specs for site in config.parts for key, specs in site.arrays(stack).items()}


def plugin_parameters(config: PluginConfig, stack: Stack) -> int:
    """Number of trained weights; output scales, calibrated constants, are not counted."""
    specs = plugin_specs(config, stack).values()
    return sum(math.prod(spec.shape) for arrays in specs for spec in arrays.values())


def init_plugin(config: PluginConfig, stack: Stack, rng: jax.Array) -> PluginVariables:
    """Fresh arrays of a plugin on a stack.

    Raises:
      PluginError: if the config names layers that the stack does not have.
    """
    specs = plugin_specs(config, stack)

    def init(rng: jax.Array) -> dict:
        return {
            key: init_arrays(specs[key], jax.random.fold_in(rng, i)) for i, key in enumerate(specs)
        }

    scales = {key: jnp.ones((), jnp.float32) for key in specs}
    return PluginVariables(params=jax.jit(init)(rng), output_scales=scales)


def init_arrays(specs: dict[str, ArraySpec], rng: jax.Array) -> dict:
    """Fresh arrays of one key, as a tree."""
    keys = jax.random.split(rng, max(len(specs), 1))
    arrays = {
        name: spec.init(key, spec.shape, jnp.float32)
        for key, (name, spec) in zip(keys, specs.items(), strict=False)
    }
    return traverse_util.unflatten_dict(arrays, sep="/")


def stack_flops(stack: Stack, length: int, plugin: PluginConfig | None = None) -> int:
    """FLOPs of one row's pass through a stack, with a plugin in place or without.

    Args:
      stack: of the backbone.
      length: tokens of the row, padding included. A length that the ratio does not divide is filled
        up to whole groups, as the plugin does.
      plugin: its settings, None for the backbone itself.

    Raises:
      ConfigError: for a length below 1.
      PluginError: for a plugin of layers that the stack does not have.
    """
    check_whole("The length of a row", length)
    layers = range(stack.layers)
    flops = sum(stack.flops(layer, length, length, length) for layer in layers)
    changes = (site.flops(stack, length) for site in plugin.parts) if plugin else ()
    return flops + sum(changes)


def flops_saved(stack: Stack, length: int, plugin: PluginConfig | None) -> float:
    """Share of the stack's FLOPs that a plugin saves, below 1; negative where it costs more."""
    return 1.0 - stack_flops(stack, length, plugin) / stack_flops(stack, length)


def flops_allowed_speedup(stack: Stack, length: int, plugin: PluginConfig | None) -> float:
    """The speed-up that a machine would reach if its time were proportional to FLOPs."""
    return stack_flops(stack, length) / stack_flops(stack, length, plugin)
