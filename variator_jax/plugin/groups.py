"""Merge groups: which of k neighbouring positions become one vector. Arrays in, arrays out.

A sequence of length L is cut into G = ceil(L / k) groups of k neighbours.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from variator_jax.backbones.base import Mask
from variator_jax.errors import PluginError


class Groups(NamedTuple):
    """The merge groups of a batch for one ratio, built once for all sites that share it."""

    members: jax.Array  # [batch, groups, k] bool: positions that enter the merge
    packed: bool  # whether a group may hold tokens of an example that is not its own
    length: int  # of the rows

    @property
    def ratio(self) -> int:
        """The compression ratio k."""
        return self.members.shape[-1]

    @property
    def receivers(self) -> jax.Array | None:
        """`[batch, groups, k]` bool: tokens that their group's result may reach; None for all.

        Only in a packed batch can a group hold tokens that must not see what it became.
        """
        return self.members if self.packed else None

    @property
    def valid(self) -> jax.Array:
        """`[batch, groups]` bool: groups with any member."""
        return jnp.any(self.members, axis=-1)

    def split(self, x: jax.Array) -> jax.Array:
        """`[batch, length, ...] -> [batch, groups, k, ...]`, for arrays of the mask's own shape.

        Raises:
          PluginError: for an array of another shape.
        """
        if x.shape[:2] != (self.members.shape[0], self.length):
            raise PluginError(
                f"The mask is of {self.members.shape[0]} x {self.length} tokens, what a site "
                f"merges of {x.shape[0]} x {x.shape[1]}; expected a mask of the input's own shape."
            )
        return to_groups(x, self.ratio)


def make_groups(mask: Mask, ratio: int, pool_padding: bool = False) -> Groups:
    """Which positions belong to their group's merge.

    Padding never does, unless `pool_padding`. In a packed batch the group belongs to the segment of
    its first valid token and the tokens of any other segment stay out, so that nothing crosses
    from one example into the next; pack on multiples of `ratio` and no token is ever left out.
    """
    # [batch, groups, k]
    members = to_groups((mask.valid != 0) | pool_padding, ratio)
    length = mask.valid.shape[1]
    if mask.segments is None:
        return Groups(members, False, length)
    # [batch, groups, k] and [batch, groups, 1]
    segments = to_groups(mask.segments, ratio)
    first = jnp.argmax(members, axis=-1, keepdims=True)
    same_example = segments == jnp.take_along_axis(segments, first, axis=-1)
    return Groups(members & same_example, True, length)


def to_groups(x: jax.Array, ratio: int) -> jax.Array:
    """Cuts `[batch, length, ...]` into `[batch, groups, ratio, ...]`, zero-padded at the end."""
    missing = -x.shape[1] % ratio
    if missing:
        x = jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))
    return x.reshape(x.shape[0], -1, ratio, *x.shape[2:])


def from_groups(x: jax.Array, length: int) -> jax.Array:
    """The inverse of `to_groups`: `[batch, groups, ratio, ...] -> [batch, length, ...]`."""
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def pool_keys(mask: jax.Array, groups: Groups) -> jax.Array:
    """Which merged keys each query may see: those with a member that it may see.

    Args:
      mask: `[batch or 1, heads or 1, query, length]`, nonzero where a query may see a key.
      groups: of the keys.

    Returns:
      `[batch, heads or 1, query, groups]` in the mask's dtype.
    """
    # [batch or 1, heads or 1, query, groups, k]
    by_group = _grouped_last(mask > 0, groups.ratio)
    return jnp.any(by_group & groups.members[:, None, None], axis=-1).astype(mask.dtype)


def pool_mask(mask: jax.Array, groups: Groups) -> jax.Array:
    """As `pool_keys` with merged queries, too: `[batch, heads or 1, groups, groups]`.

    A group sees another if one of its members sees one of the other's.
    """
    keys = jnp.swapaxes(pool_keys(mask, groups), 2, 3)
    return jnp.swapaxes(pool_keys(keys, groups), 2, 3)


def log_sizes(groups: Groups) -> jax.Array:
    """What is added to the scores of merged keys, `[batch, 1, 1, groups]` float32.

    A merged key counts as many as it has members (ToMe's proportional attention).
    """
    sizes = jnp.sum(groups.members, axis=-1, dtype=jnp.float32)
    return jnp.log(jnp.maximum(sizes, 1.0))[:, None, None, :]


def key_columns(bias: jax.Array, groups: Groups) -> jax.Array:
    """The position bias of merged keys, which stand where their middle member stands.

    Args:
      bias: `[1 or batch, heads, query, k * groups]`, of the length rounded up to whole groups.
      groups: of the keys.

    Returns:
      `[batch, heads, query, groups]`, with the logarithm of the groups' sizes.
    """
    middle = (groups.ratio - 1) // 2
    return bias[..., middle :: groups.ratio] + log_sizes(groups).astype(bias.dtype)


def stride_bias(bias: jax.Array, groups: Groups) -> jax.Array:
    """The position bias among merged vectors, whose distances are those of their first members.

    Args:
      bias: `[1 or batch, heads, length, length]`; the length may be rounded up to whole groups.
      groups: of queries and keys.

    Returns:
      `[batch, heads, groups, groups]`, with the logarithm of the groups' sizes.
    """
    strided = bias[:, :, :: groups.ratio, :: groups.ratio]
    return strided + log_sizes(groups).astype(bias.dtype)


def _grouped_last(x: jax.Array, ratio: int) -> jax.Array:
    """`[..., length] -> [..., groups, ratio]`, filled up with 0."""
    missing = [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % ratio)]
    return jnp.pad(x, missing).reshape(*x.shape[:-1], -1, ratio)


def masked_softmax(scores: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax over the last axis where `mask` is True, 0 elsewhere and in rows without any.

    `jax.nn.softmax(where=...)` has the same values but a NaN gradient for rows without any.
    """
    scores = jnp.where(mask, scores, -1e30)
    weights = jnp.where(mask, jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True)), 0.0)
    return weights / jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1e-30)
