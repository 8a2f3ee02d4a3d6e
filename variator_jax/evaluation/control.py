"""A control for the evaluation: the backbone with its encoder FFNs skipped altogether.

A compression plugin can only lose what the encoder's FFNs contribute. Where a task's score hardly
falls without them, a small loss under compression says nothing about the plugin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp

from variator_jax.plugin.config import ENCODER_MLP
from variator_jax.plugin.splice import surround_sites


@contextmanager
def skip_encoder_ffn(sites: str = ENCODER_MLP) -> Iterator[None]:
    """While active, every Linen module whose path matches `sites` returns zeros like its input.

    Enter it INSIDE the function that is jitted. A function that was compiled before would run as it
    was compiled; that is noticed here, because then no site is called.

    Args:
      sites: a site pattern as in `PluginConfig.sites`.

    Raises:
      PluginError: on leaving, if no site was skipped.
    """

    def skip(layer: int, ffn: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
        return jnp.zeros_like(x)

    with surround_sites(sites, skip):
        yield
