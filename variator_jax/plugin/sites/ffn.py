"""Hidden compression and hidden decompression: arrays in, arrays out (DESIGN.md section 3).

Shapes: a sequence of length L is cut into G = ceil(L / k) groups of k neighbours. Where they are
spliced into a backbone is `splice.py`'s business; nothing in here knows T5.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.partitioning import param_with_axes

from variator_jax.plugin.config import PluginConfig

# The official code's initialisation: W ~ N(0, 2/(kD)), the decompression's kernels ~ N(0, 0.01^2),
# biases zero; so a fresh plugin nearly pools, runs the FFN and repeats.
_SCORES_INIT = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
_SMALL_INIT = nn.initializers.normal(stddev=0.01)


def to_groups(x: jax.Array, ratio: int) -> jax.Array:
    """Cuts `[batch, length, ...]` into `[batch, groups, ratio, ...]`, zero-padded at the end."""
    missing = -x.shape[1] % ratio
    if missing:
        x = jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))
    return x.reshape(x.shape[0], -1, ratio, *x.shape[2:])


def from_groups(x: jax.Array, length: int) -> jax.Array:
    """The inverse of `to_groups`: `[batch, groups, ratio, ...] -> [batch, length, ...]`."""
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def group_members(
    token_mask: jax.Array, ratio: int, segment_ids: jax.Array | None = None
) -> jax.Array:
    """Which positions belong to their group's merge: `[batch, groups, ratio]` bool.

    Padding never does. In a packed batch the group belongs to the segment of its first valid token
    and the tokens of any other segment stay out, so that nothing crosses from one example into the
    next; pack on multiples of `ratio` and no token is ever left out.

    Args:
      token_mask: `[batch, length]` bool, True on tokens.
      ratio: the compression ratio.
      segment_ids: `[batch, length]` int of a packed batch, or None.
    """
    members = to_groups(token_mask, ratio)
    if segment_ids is None:
        return members
    segments = to_groups(segment_ids, ratio)
    first = jnp.argmax(members, axis=-1, keepdims=True)
    return members & (segments == jnp.take_along_axis(segments, first, axis=-1))


def masked_softmax(scores: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax over the last axis where `mask` is True, 0 elsewhere and in rows without any.

    `jax.nn.softmax(where=...)` has the same values but a NaN gradient for rows without any.
    """
    scores = jnp.where(mask, scores, -1e30)
    weights = jnp.where(mask, jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True)), 0.0)
    return weights / jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1e-30)


class HiddenCompression(nn.Module):
    """Merges each group of k hidden vectors into one, by weights that the group itself scores."""

    config: PluginConfig

    @nn.compact
    def __call__(self, x: jax.Array, members: jax.Array) -> jax.Array:
        """Merges `[batch, groups, k, embed]` into `[batch, groups, embed]`.

        Args:
          x: the normalised hidden vectors, in groups; finite everywhere.
          members: `[batch, groups, k]` bool; others get weight 0, and a group without any gives 0.
        """
        # The scores see the whole group, so what stays out of the merge must be 0 there, too.
        x = x * members[..., None].astype(x.dtype)
        learned = self.config.compression == "learned"
        scores = self._scores(x) if learned else jnp.zeros(members.shape, jnp.float32)
        weights = masked_softmax(scores, members)
        weights = weights.astype(x.dtype)
        # Member by member, not as one sum over an axis: XLA's CPU backend fuses such a reduction
        # into the FFN's matrix product and then runs that product as a naive loop, 5 times slower.
        return sum(weights[:, :, j, None] * x[:, :, j] for j in range(x.shape[2]))

    def _scores(self, x: jax.Array) -> jax.Array:
        """Scores of the members, each seeing its whole group: `[batch, groups, k]` float32."""
        ratio, embed = x.shape[2:]
        kernel = param_with_axes(
            "kernel",
            _SCORES_INIT,
            (ratio * embed, ratio),
            jnp.float32,
            axes=("plugin_in", "plugin_ratio"),
        )
        bias = param_with_axes(
            "bias", nn.initializers.zeros, (ratio,), jnp.float32, axes=("plugin_ratio",)
        )
        # [batch, groups, k * embed] @ [k * embed, k]
        scores = jnp.dot(
            x.reshape(*x.shape[:2], -1), kernel.astype(x.dtype), preferred_element_type=jnp.float32
        )
        return scores + bias


class HiddenDecompression(nn.Module):
    """Spreads the FFN's output for a group over its members, corrected by what each one was."""

    config: PluginConfig

    @nn.compact
    def __call__(
        self,
        y: jax.Array,
        x: jax.Array,
        output_scale: jax.Array,
        receivers: jax.Array | None = None,
    ) -> jax.Array:
        """Expands `[batch, groups, embed]` to `[batch, groups, k, embed]`.

        z = r + a (tanh(r / a W_r + x W_x + b1) W_2 + b2), with r the repeated y. The product with
        W_r is taken on the short side, before repeating.

        Args:
          y: the FFN's output, one vector a group.
          x: the normalised hidden vectors that went into compression, `[batch, groups, k, embed]`.
          output_scale: the layer's a, a float32 scalar.
          receivers: `[batch, groups, k]` bool, False on tokens that y must not reach (those of
            another packed example); None for all.
        """
        r = _repeat_to(y, receivers)
        if self.config.decompression == "repeat":
            return jnp.broadcast_to(r, x.shape)
        embed, bottleneck = x.shape[-1], self.config.bottleneck
        w_r = self._kernel("repeated_kernel", (embed, bottleneck), ("embed", "plugin_hidden"))
        w_x = self._kernel("input_kernel", (embed, bottleneck), ("embed", "plugin_hidden"))
        w_2 = self._kernel("output_kernel", (bottleneck, embed), ("plugin_hidden", "embed"))
        b_1 = self._bias("input_bias", bottleneck, "plugin_hidden")
        b_2 = self._bias("output_bias", embed, "embed")
        scale = output_scale.astype(x.dtype)
        # [batch, groups, k, bottleneck]
        hidden = _repeat_to(jnp.dot(y / scale, w_r.astype(x.dtype)), receivers)
        hidden = jnp.tanh(hidden + jnp.dot(x, w_x.astype(x.dtype)) + b_1.astype(x.dtype))
        return r + scale * (jnp.dot(hidden, w_2.astype(x.dtype)) + b_2.astype(x.dtype))

    def _kernel(self, name: str, shape: tuple[int, int], axes: tuple[str, str]) -> jax.Array:
        return param_with_axes(name, _SMALL_INIT, shape, jnp.float32, axes=axes)

    def _bias(self, name: str, size: int, axis: str) -> jax.Array:
        return param_with_axes(name, nn.initializers.zeros, (size,), jnp.float32, axes=(axis,))


def _repeat_to(y: jax.Array, receivers: jax.Array | None) -> jax.Array:
    """`[batch, groups, width] -> [batch, groups, k or 1, width]`, 0 where nothing is received."""
    y = y[:, :, None, :]
    return y if receivers is None else y * receivers[..., None].astype(y.dtype)


class PluginLayer(nn.Module):
    """One site's hidden compression and hidden decompression, and their parameters."""

    config: PluginConfig

    def setup(self) -> None:
        """Names the two halves as their parameters are named."""
        self.compression = HiddenCompression(self.config)
        self.decompression = HiddenDecompression(self.config)

    def compress(self, x: jax.Array, members: jax.Array) -> jax.Array:
        """`[batch, groups, k, embed] -> [batch, groups, embed]`."""
        return self.compression(x, members)

    def decompress(
        self,
        y: jax.Array,
        x: jax.Array,
        output_scale: jax.Array,
        receivers: jax.Array | None = None,
    ) -> jax.Array:
        """`[batch, groups, embed] -> [batch, groups, k, embed]`."""
        return self.decompression(y, x, output_scale, receivers)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Runs both halves with nothing between them; only to create the parameters."""
        members = jnp.ones(x.shape[:3], bool)
        return self.decompress(self.compress(x, members), x, jnp.ones((), jnp.float32))
