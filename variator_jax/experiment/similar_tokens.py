"""A baseline without training: similar tokens are merged before an FFN and unmerged after it.

It is token merging in the style of ToMe (Bolya et al., 2023) and of its form for Stable Diffusion,
which unmerges after each block: every k-th position of a row is a destination, and every other
token joins the destination that it is most similar to. At a plugin's ratio the FFN sees as many
vectors as with it, at `same_flops_ratio` the encoder costs as much; the two then differ in what is
merged and how it is spread.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from variator_jax.backbones.base import Stack
from variator_jax.errors import ConfigError, PluginError
from variator_jax.plugin import PluginConfig, intercept_modules, stack_flops


@contextmanager
def merge_similar(ratio: float, stack: Stack, token_mask: jax.Array) -> Iterator[None]:
    """While active, every FFN of the stack runs on ceil(length / ratio) vectors.

    Enter it INSIDE the function that is jitted, as `splice`. Ratio 1 changes nothing at all. Rows
    are expected to begin with a token; what has no destination in its row gets 0.

    Args:
      ratio: a destination comes every so many positions, rounded down; 1 or more, whole or not.
      stack: the encoder.
      token_mask: `[batch, length]` bool, True on tokens. Padding joins nothing and receives 0.

    Raises:
      PluginError: for a ratio below 1; on leaving, if no FFN ran.
    """
    if not 1 <= ratio < math.inf:
        raise PluginError(f"Tokens are merged at a ratio of 1 or more; found {ratio!r}.")
    if ratio == 1:
        yield
        return

    def merged(path: str, call: Callable[..., Any], args: tuple, kwargs: dict) -> jax.Array:
        x = stack.stream("ffn", args, kwargs)
        owners = destinations(x, token_mask, ratio)
        short = merge(x, token_mask, owners, len(_places(x.shape[1], ratio)))
        args, kwargs = stack.with_stream("ffn", args, kwargs, short)
        # [batch, groups, embed]
        y = call(*args, **kwargs)
        return unmerge(y, token_mask & (owners >= 0), owners)

    paths = {stack.path("ffn", layer) for layer in range(stack.layers)}
    with intercept_modules(paths.__contains__, merged):
        yield


def _places(length: int, ratio: float) -> np.ndarray:
    """The positions of destinations, `[ceil(length / ratio)]`; no two are equal."""
    count = math.ceil(length / ratio - 1e-9)  # length / (length / n) may be a little above n
    return np.floor(np.arange(count) * ratio + 1e-9).astype(np.int32)


def destinations(x: jax.Array, token_mask: jax.Array, ratio: float) -> jax.Array:
    """Which destination each position joins, by the cosine of the angle between the vectors.

    Args:
      x: the site's normalised input, `[batch, length, embed]`.
      token_mask: `[batch, length]` bool.
      ratio: positions 0, ratio, 2 ratio, ..., rounded down, are destinations, and join themselves.

    Returns:
      `[batch, length]` int32, destinations counted from 0; -1 where a row has none.
    """
    direction = x.astype(jnp.float32)
    norm = jnp.sqrt(jnp.sum(jnp.square(direction), axis=-1, keepdims=True))
    direction = direction / jnp.maximum(norm, 1e-12)
    places = _places(x.shape[1], ratio)
    valid = token_mask[:, None, places]
    # [batch, length, groups]
    cosine = jnp.einsum("bld,bgd->blg", direction, direction[:, places])
    nearest = jnp.argmax(jnp.where(valid, cosine, -jnp.inf), axis=-1)
    nearest = jnp.where(valid.any(axis=-1), nearest, -1)
    return nearest.at[:, places].set(jnp.arange(len(places))).astype(jnp.int32)


def merge(x: jax.Array, token_mask: jax.Array, owners: jax.Array, groups: int) -> jax.Array:
    """Means of a destination and the tokens that join it: `[batch, groups, embed]`, 0 where none.

    Args:
      x: `[batch, length, embed]`.
      token_mask: `[batch, length]` bool; others join nothing.
      owners: `[batch, length]` int, from `destinations`.
      groups: number of destinations of a row.
    """
    # The sum drops numbers that are not a destination.
    owners = jnp.where(token_mask & (owners >= 0), owners, groups)

    def total(values: jax.Array, owners: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(values, owners, num_segments=groups)

    # Added up row by row, as a scatter: a product with a matrix of ones would cost like the
    # similarities.
    sums = jax.vmap(total)(x.astype(jnp.float32), owners)
    counts = jax.vmap(total)(jnp.ones(owners.shape, jnp.float32), owners)
    return (sums / jnp.maximum(counts, 1.0)[..., None]).astype(x.dtype)


def unmerge(y: jax.Array, unmerge_mask: jax.Array, owners: jax.Array) -> jax.Array:
    """Each token's own destination's output, `[batch, groups, embed] -> [batch, length, embed]`.

    Args:
      y: the FFN's output, one vector a destination.
      unmerge_mask: `[batch, length]` bool; others get 0.
      owners: `[batch, length]` int, from `destinations`.
    """
    spread = jnp.take_along_axis(y, jnp.maximum(owners, 0)[..., None], axis=1)
    return spread * unmerge_mask[..., None].astype(y.dtype)


def similar_tokens_flops(stack: Stack, length: int, ratio: float) -> int:
    """FLOPs of one encoder pass over one row: FFNs on merged vectors, and the similarities.

    The similarities cost 2 * length * ceil(length / ratio) * embed in each layer. Means are sums of
    vectors without a product, and are not counted; see `cost`.

    Raises:
      ConfigError: for a length or ratio below 1.
    """
    if length < 1 or ratio < 1:
        raise ConfigError(f"A cost needs a length and ratio of 1 or more: {length} and {ratio}.")
    if ratio == 1:
        return stack_flops(stack, length)
    groups = len(_places(length, ratio))
    layers = sum(stack.flops(i, length, length, groups) for i in range(stack.layers))
    return layers + stack.layers * 2 * length * groups * stack.width


def same_flops_ratio(stack: Stack, length: int, plugin: PluginConfig) -> float:
    """The ratio at which merging similar tokens costs what a plugin costs, as nearly as it goes.

    Args:
      stack: the encoder.
      length: tokens of the input.
      plugin: its settings.

    Returns:
      length / n for the most destinations n that cost no more; for a plugin that saves nothing, 1.

    Raises:
      ConfigError: for a size below 1.
    """
    most = stack_flops(stack, length, plugin)
    if most >= stack_flops(stack, length):
        return 1.0
    counts = range(1, length + 1)
    fitting = bisect.bisect_right(
        counts, most, key=lambda n: similar_tokens_flops(stack, length, length / n)
    )
    return length / max(fitting, 1)
