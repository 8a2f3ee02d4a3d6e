"""Hidden compression and hidden decompression: their arrays, their functions and their FLOPs.

With k the ratio, b the bottleneck, a the output scale and t the mask, for the vectors x of a group:

    compress    s = softmax(reshape(x, [batch, length/k, k*embed]) W + c  masked by t)
                m_g = sum_j s_gj x_(gk+j)
    decompress  r = repeat(y, k);  z = r + a (tanh(r/a W_r + x W_x + b1) W_2 + b2)
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.partitioning import with_sharding_constraint

from variator_jax.plugin.groups import masked_softmax
from variator_jax.plugin.sites.base import Arrays, ArraySpec

# The official code's initialisation: W ~ N(0, 2/(kD)), the decompression's kernels ~ N(0, 0.01^2),
# biases zero; so a fresh plugin nearly pools, runs the network and repeats.
_SCORES_INIT = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
_SMALL_INIT = nn.initializers.normal(stddev=0.01)
_ZEROS = nn.initializers.zeros


def merge_specs(ratio: int, embed: int) -> dict[str, ArraySpec]:
    """The arrays that score the members of a group."""
    kernel = ArraySpec((ratio * embed, ratio), ("plugin_in", "plugin_ratio"), _SCORES_INIT)
    bias = ArraySpec((ratio,), ("plugin_ratio",), _ZEROS)
    return {"compression/kernel": kernel, "compression/bias": bias}


def expand_specs(embed: int, width: int) -> dict[str, ArraySpec]:
    """The arrays of the bottleneck, `width` wide."""
    inwards = ArraySpec((embed, width), ("embed", "plugin_hidden"), _SMALL_INIT)
    outwards = ArraySpec((width, embed), ("plugin_hidden", "embed"), _SMALL_INIT)
    return {
        "decompression/repeated_kernel": inwards,
        "decompression/input_kernel": inwards,
        "decompression/output_kernel": outwards,
        "decompression/input_bias": ArraySpec((width,), ("plugin_hidden",), _ZEROS),
        "decompression/output_bias": ArraySpec((embed,), ("embed",), _ZEROS),
    }


def merge_flops(ratio: int, embed: int, learned: bool = True) -> int:
    """FLOPs of merging one group: the scores and the weighted sum."""
    return 2 * ratio * embed + (2 * ratio * embed * ratio if learned else 0)


def expand_flops(ratio: int, embed: int, width: int) -> int:
    """FLOPs of expanding one group: y W_r once, x W_x and the product with W_2 for each member."""
    return 2 * embed * width + ratio * 4 * embed * width


def merge_weights(arrays: Arrays | None, x: jax.Array, members: jax.Array) -> jax.Array:
    """How much each member counts in its group's merge, scored from the group itself.

    Args:
      arrays: `kernel` `[k * embed, k]` and `bias` `[k]`; None weighs members alike.
      x: `[batch, groups, k, embed]`, finite everywhere.
      members: `[batch, groups, k]` bool; others get weight 0, as do groups without any.

    Returns:
      `[batch, groups, k]` in x's dtype.
    """
    if arrays:
        # The scores see the whole group, so what stays out of the merge must be 0 there, too.
        x = x * members[..., None].astype(x.dtype)
        whole, kernel = x.reshape(*x.shape[:2], -1), arrays["kernel"].astype(x.dtype)
        # [batch, groups, k * embed] @ [k * embed, k]
        scores = jnp.dot(whole, kernel, preferred_element_type=jnp.float32) + arrays["bias"]
    else:
        scores = jnp.zeros(members.shape, jnp.float32)
    return masked_softmax(scores, members).astype(x.dtype)


def merge(weights: jax.Array, x: jax.Array) -> jax.Array:
    """Sums the members of each group: `[batch, groups, k]`, `[..., k, embed] -> [..., embed]`."""
    # Member by member, not as one sum over an axis: XLA's CPU backend fuses such a reduction
    # into the FFN's matrix product and then runs that product as a naive loop, 5 times slower.
    merged: Any = sum(weights[:, :, j, None] * x[:, :, j] for j in range(x.shape[2]))
    return merged


def compress(arrays: Arrays | None, x: jax.Array, members: jax.Array) -> jax.Array:
    """Merges `[batch, groups, k, embed]` into `[batch, groups, embed]`, see `merge_weights`."""
    weights = merge_weights(arrays, x, members)
    return constrain(merge(weights, x * members[..., None].astype(x.dtype)))


def decompress(
    arrays: Arrays | None,
    y: jax.Array,
    x: jax.Array,
    output_scale: jax.Array,
    receivers: jax.Array | None = None,
) -> jax.Array:
    """Spreads what the network made of a group over its members, corrected by what each one was.

    z = r + a (tanh(r / a W_r + x W_x + b1) W_2 + b2), with r the repeated y. The product with
    W_r is taken on the short side, before repeating.

    Args:
      arrays: the kernels and biases of the bottleneck; None only repeats.
      y: `[batch, groups, embed]`, the network's output.
      x: `[batch, groups, k, embed]`, what went into compression.
      output_scale: the key's a, a float32 scalar.
      receivers: `[batch, groups, k]` bool, False on tokens that y must not reach (those of
        another packed example); None for all.

    Returns:
      `[batch, groups, k, embed]`.
    """
    # [batch, groups, k or 1, embed]
    r = _repeat_to(y, receivers)
    if not arrays:
        return jnp.broadcast_to(r, x.shape)
    cast = {name: array.astype(x.dtype) for name, array in arrays.items()}
    scale = output_scale.astype(x.dtype)
    # [batch, groups, k, bottleneck]
    hidden = _repeat_to(jnp.dot(y / scale, cast["repeated_kernel"]), receivers)
    hidden = jnp.tanh(hidden + jnp.dot(x, cast["input_kernel"]) + cast["input_bias"])
    # [batch, groups, k, embed]
    return r + scale * (jnp.dot(hidden, cast["output_kernel"]) + cast["output_bias"])


def constrain(x: jax.Array) -> jax.Array:
    """Keeps `[batch, length or groups, embed]` cut along the batch, where there is a mesh."""
    return with_sharding_constraint(x, ("batch", "length", "embed"))


@jax.custom_jvp
def stored_gradient(x: jax.Array) -> jax.Array:
    """The identity, whose gradient is computed once and stored.

    XLA on CPUs fuses the sums of a residual stream's gradient into each of their uses, so that each
    layer would compute the gradients of all later layers again.
    """
    return x


# Of the tangent, whose transpose is the gradient.
stored_gradient.defjvp(lambda x, dx: (x[0], jax.lax.optimization_barrier(dx[0])))


def _repeat_to(y: jax.Array, receivers: jax.Array | None) -> jax.Array:
    """`[batch, groups, width] -> [batch, groups, k or 1, width]`, 0 where nothing is received."""
    y = y[:, :, None, :]
    return y if receivers is None else y * receivers[..., None].astype(y.dtype)
