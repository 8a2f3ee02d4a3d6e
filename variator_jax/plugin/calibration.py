"""The output scale `a` of each key: how much the modules inside a site add in the teacher.

T5's FFN outputs grow by orders of magnitude with depth and size, so that one learning rate serves
every backbone only if the plugin works in units of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from variator_jax.backbones.base import Mask, Stack
from variator_jax.plugin.arrays import PluginVariables
from variator_jax.plugin.config import PluginConfig
from variator_jax.plugin.splice import intercept_modules


def site_output_rms(
    run: Callable[[], object], config: PluginConfig, stack: Stack, mask: Mask
) -> dict[str, jax.Array]:
    """Runs the uncompressed network once and returns, for each key, the RMS of what it adds.

    Args:
      run: applies the network, for example `lambda: network.apply(...)`; call it outside remat.
      config: the plugin's settings.
      stack: where its sites are.
      mask: of the stack's input; padding does not count.
    """
    spans = {
        key: (site, *paths) for site in config.parts for key, paths in site.around(stack).items()
    }
    firsts = {first for _, first, _ in spans.values()}
    lasts = {last for _, _, last in spans.values()}
    before: dict[str, jax.Array] = {}
    after: dict[str, jax.Array] = {}

    def record(path: str, call: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        if path in firsts:
            before[path] = stack.stream("ffn", args, kwargs)
        out = call(*args, **kwargs)
        if path in lasts:
            after[path] = out
        return out

    with intercept_modules((firsts | lasts).__contains__, record):
        run()
    return {
        key: _rms(site.change(before[first], after[last]), mask.valid)
        for key, (site, first, last) in spans.items()
    }


def calibrate(plugin: PluginVariables, rms: dict[str, jax.Array]) -> PluginVariables:
    """Returns the plugin with its output scales set to the measured ones of its keys."""
    floor = jnp.float32(1e-6)  # modules that add nothing would otherwise divide by zero
    return dataclasses.replace(
        plugin, output_scales={key: jnp.maximum(rms[key], floor) for key in plugin.output_scales}
    )


def _rms(x: jax.Array, valid: jax.Array) -> jax.Array:
    """The RMS over valid positions of `[batch, length, embed]`."""
    # [batch, length, 1]
    weight = valid[..., None].astype(jnp.float32)
    total = jnp.sum(jnp.square(x.astype(jnp.float32)) * weight)
    return jnp.sqrt(total / (jnp.sum(weight) * x.shape[-1]))
