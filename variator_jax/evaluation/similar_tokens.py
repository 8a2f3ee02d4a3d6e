"""A baseline without training: similar tokens are merged before an FFN and unmerged after it.

It is token merging in the style of ToMe (Bolya et al., 2023) and of its form for Stable Diffusion,
which unmerges after each block: every k-th position of a row is a destination, and every other
token joins the destination that it is most similar to. The FFN sees as many vectors as with a
compression plugin of the same ratio, so the two differ in what is merged and how it is spread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp

from variator_jax.backbone.config import T5Config
from variator_jax.errors import ConfigError
from variator_jax.evaluation.cost import attention_flops, encoder_flops, ffn_flops
from variator_jax.plugin.config import ENCODER_MLP, PluginConfig
from variator_jax.plugin.splice import surround_sites


@contextmanager
def merge_similar(ratio: int, token_mask: jax.Array, sites: str = ENCODER_MLP) -> Iterator[None]:
    """While active, every module whose path matches `sites` runs on ceil(length / ratio) vectors.

    Enter it INSIDE the function that is jitted, as `splice`. Ratio 1 changes nothing at all. Rows
    are expected to begin with a token; what has no destination in its row gets 0.

    Args:
      ratio: every so many-th position is a destination.
      token_mask: `[batch, length]` bool, True on tokens. Padding joins nothing and receives 0.
      sites: a site pattern as in `PluginConfig.sites`.

    Raises:
      PluginError: for a ratio below 1 or a pattern that is none; on leaving, if no site matched.
    """
    checked = PluginConfig(ratio, sites=sites)
    if ratio == 1:
        yield
        return

    def merged(layer: int, ffn: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
        owners = destinations(x, token_mask, ratio)
        # [batch, groups, embed]
        y = ffn(merge(x, token_mask, owners, -(-x.shape[1] // ratio)))
        return unmerge(y, token_mask & (owners >= 0), owners)

    with surround_sites(checked.sites, merged):
        yield


def destinations(x: jax.Array, token_mask: jax.Array, ratio: int) -> jax.Array:
    """Which destination each position joins, by the cosine of the angle between the vectors.

    Args:
      x: the site's normalised input, `[batch, length, embed]`.
      token_mask: `[batch, length]` bool.
      ratio: positions 0, ratio, 2 ratio, ... are destinations, and join themselves.

    Returns:
      `[batch, length]` int32, destinations counted from 0; -1 where a row has none.
    """
    direction = x.astype(jnp.float32)
    norm = jnp.sqrt(jnp.sum(jnp.square(direction), axis=-1, keepdims=True))
    direction = direction / jnp.maximum(norm, 1e-12)
    valid = token_mask[:, None, ::ratio]
    # [batch, length, groups]
    cosine = jnp.einsum("bld,bgd->blg", direction, direction[:, ::ratio])
    nearest = jnp.argmax(jnp.where(valid, cosine, -jnp.inf), axis=-1)
    nearest = jnp.where(valid.any(axis=-1), nearest, -1)
    position = jnp.arange(x.shape[1])
    return jnp.where(position % ratio == 0, position // ratio, nearest).astype(jnp.int32)


def merge(x: jax.Array, token_mask: jax.Array, owners: jax.Array, groups: int) -> jax.Array:
    """Means of a destination and the tokens that join it: `[batch, groups, embed]`, 0 where none.

    Args:
      x: `[batch, length, embed]`.
      token_mask: `[batch, length]` bool; others join nothing.
      owners: `[batch, length]` int, from `destinations`.
      groups: number of destinations of a row.
    """
    # Numbers that are no destination are dropped by the sum.
    owners = jnp.where(token_mask & (owners >= 0), owners, groups)

    def total(values: jax.Array, owners: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(values, owners, num_segments=groups)

    # Added up row by row, as a scatter: a product with a matrix of ones would cost like the
    # similarities.
    sums = jax.vmap(total)(x.astype(jnp.float32), owners)
    counts = jax.vmap(total)(jnp.ones(owners.shape, jnp.float32), owners)
    return (sums / jnp.maximum(counts, 1.0)[..., None]).astype(x.dtype)


def unmerge(y: jax.Array, receivers: jax.Array, owners: jax.Array) -> jax.Array:
    """Each token's own destination's output, `[batch, groups, embed] -> [batch, length, embed]`.

    Args:
      y: the FFN's output, one vector a destination.
      receivers: `[batch, length]` bool; others get 0.
      owners: `[batch, length]` int, from `destinations`.
    """
    spread = jnp.take_along_axis(y, jnp.maximum(owners, 0)[..., None], axis=1)
    return spread * receivers[..., None].astype(y.dtype)


def similar_tokens_flops(config: T5Config, length: int, ratio: int) -> int:
    """FLOPs of one encoder pass over one row: FFNs on merged vectors, and the similarities.

    The similarities cost 2 * length * ceil(length / ratio) * embed in each layer. Means are sums of
    vectors without a product, and are not counted; see `cost`.

    Raises:
      ConfigError: for a size below 1.
    """
    if length < 1 or ratio < 1:
        raise ConfigError(f"A cost needs a positive length and ratio; found {length} and {ratio}.")
    if ratio == 1:
        return encoder_flops(config, length, 1)
    groups = -(-length // ratio)
    layer = attention_flops(config, length) + ffn_flops(config, groups)
    return config.num_encoder_layers * (layer + 2 * length * groups * config.embed_dim)
