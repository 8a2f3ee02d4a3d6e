"""Merge groups: which of k neighbouring positions become one vector. Arrays in, arrays out.

A sequence of length L is cut into G = ceil(L / k) groups of k neighbours.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from variator_jax.backbones.base import Mask


class Groups(NamedTuple):
    """The merge groups of a batch for one ratio, built once for all sites that share it."""

    members: jax.Array  # [batch, groups, k] bool: positions that enter the merge
    packed: bool  # whether a group may hold tokens of an example that is not its own

    @property
    def ratio(self) -> int:
        """The compression ratio k."""
        return self.members.shape[-1]


def make_groups(mask: Mask, ratio: int, pool_padding: bool = False) -> Groups:
    """Which positions belong to their group's merge.

    Padding never does, unless `pool_padding`. In a packed batch the group belongs to the segment of
    its first valid token and the tokens of any other segment stay out, so that nothing crosses
    from one example into the next; pack on multiples of `ratio` and no token is ever left out.
    """
    # [batch, groups, k]
    members = to_groups(mask.valid | pool_padding, ratio)
    if mask.segments is None:
        return Groups(members, packed=False)
    # [batch, groups, k] and [batch, groups, 1]
    segments = to_groups(mask.segments, ratio)
    first = jnp.argmax(members, axis=-1, keepdims=True)
    same_example = segments == jnp.take_along_axis(segments, first, axis=-1)
    return Groups(members & same_example, packed=True)


def to_groups(x: jax.Array, ratio: int) -> jax.Array:
    """Cuts `[batch, length, ...]` into `[batch, groups, ratio, ...]`, zero-padded at the end."""
    missing = -x.shape[1] % ratio
    if missing:
        x = jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))
    return x.reshape(x.shape[0], -1, ratio, *x.shape[2:])


def from_groups(x: jax.Array, length: int) -> jax.Array:
    """The inverse of `to_groups`: `[batch, groups, ratio, ...] -> [batch, length, ...]`."""
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def masked_softmax(scores: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax over the last axis where `mask` is True, 0 elsewhere and in rows without any.

    `jax.nn.softmax(where=...)` has the same values but a NaN gradient for rows without any.
    """
    scores = jnp.where(mask, scores, -1e30)
    weights = jnp.where(mask, jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True)), 0.0)
    return weights / jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1e-30)
