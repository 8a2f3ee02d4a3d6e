"""The per-layer output scale `a`: how large the backbone's own FFN outputs are at each site."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from variator_jax.plugin.arrays import PluginVariables, layer_name
from variator_jax.plugin.splice import surround_sites


def site_output_rms(
    run: Callable[[], object], sites: str, token_mask: jax.Array
) -> dict[str, jax.Array]:
    """Runs the uncompressed network once and returns each site's RMS output, `{'layers_<i>': a}`.

    T5's FFN outputs grow by orders of magnitude with depth and size, so that one learning rate
    serves every backbone only if the plugin works in units of them (DESIGN.md section 3).

    Args:
      run: applies the network, for example `lambda: network.apply(...)`; call it outside remat.
      sites: the plugin's site pattern.
      token_mask: `[batch, length]` bool; padding does not count.
    """
    measured: dict[str, jax.Array] = {}
    weight = token_mask[..., None].astype(jnp.float32)

    def surround(layer: int, ffn: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
        y = ffn(x)
        total = jnp.sum(jnp.square(y.astype(jnp.float32)) * weight)
        measured[layer_name(layer)] = jnp.sqrt(total / (jnp.sum(weight) * y.shape[-1]))
        return y

    with surround_sites(sites, surround):
        run()
    return measured


def calibrate(plugin: PluginVariables, rms: dict[str, jax.Array]) -> PluginVariables:
    """Returns the plugin with its output scales set to the measured ones of its layers."""
    floor = jnp.float32(1e-6)  # an FFN that puts out nothing would otherwise divide by zero
    return dataclasses.replace(
        plugin, output_scales={name: jnp.maximum(rms[name], floor) for name in plugin.output_scales}
    )
