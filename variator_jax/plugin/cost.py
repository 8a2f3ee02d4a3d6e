"""What a stack costs with a plugin in place, in FLOPs by formula.

A multiply-add counts as 2 FLOPs, and only matrix products and the weighted sum of a merge group are
counted. Left out, as in the paper: softmax, norms, activations, residual additions, biases, masks,
position buckets and the embedding look-up. They are what separates these figures from XLA's own
count, a few per cent at small widths and below one per cent at T5-base.
"""

from __future__ import annotations

from variator_jax.backbones.base import Stack
from variator_jax.errors import ConfigError
from variator_jax.plugin.config import PluginConfig


def stack_flops(
    stack: Stack, length: int, plugin: PluginConfig | None = None, batch: int = 1
) -> int:
    """FLOPs of one pass through a stack, with a plugin in place or without.

    Args:
      stack: of the backbone.
      length: tokens a row, padding included. A length that the ratio does not divide is filled up
        to whole groups, as the plugin does.
      plugin: its settings, None for the backbone itself.
      batch: rows.

    Raises:
      ConfigError: for a size below 1.
      PluginError: for a plugin of layers that the stack does not have.
    """
    for name, value in (("length", length), ("batch", batch)):
        if value < 1:
            raise ConfigError(f"A cost needs a positive {name}; found {value}.")
    layers = range(stack.layers)
    flops = sum(stack.flops(layer, length, length, length) for layer in layers)
    changes = (site.flops(stack, length) for site in plugin.parts) if plugin else ()
    return batch * (flops + sum(changes))


def flops_saved(stack: Stack, length: int, plugin: PluginConfig | None) -> float:
    """Share of the stack's FLOPs that a plugin saves, below 1; negative where it costs more."""
    return 1.0 - stack_flops(stack, length, plugin) / stack_flops(stack, length)


def flops_allowed_speedup(stack: Stack, length: int, plugin: PluginConfig | None) -> float:
    """The speed-up that a machine would reach if its time were proportional to FLOPs."""
    return stack_flops(stack, length) / stack_flops(stack, length, plugin)
