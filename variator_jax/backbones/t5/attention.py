"""Masks, relative position bias and multi-head attention with a cache, as T5X names them."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from variator_jax.backbones.t5.config import T5Config
from variator_jax.backbones.t5.layers import (
    ATTENTION_INIT,
    Dense,
    Initializer,
    constrain,
    dropout,
    weight,
)

NUM_BUCKETS = 32
MAX_DISTANCE = 128
_MASKED = -1e10


def padding_mask(
    query_valid: jax.Array,
    key_valid: jax.Array,
    query_segments: jax.Array | None = None,
    key_segments: jax.Array | None = None,
) -> jax.Array:
    """Which key each query may see: valid keys of its own segment, `[batch, 1, query, key]` bool.

    Args:
      query_valid: `[batch, query]` bool; only its shape matters, see `MultiHeadAttention`.
      key_valid: `[batch, key]` bool.
      query_segments: `[batch, query]` int of a packed batch, or None.
      key_segments: `[batch, key]` int.
    """
    shape = (key_valid.shape[0], 1, query_valid.shape[1], key_valid.shape[1])
    mask = jnp.broadcast_to(key_valid[:, None, None, :], shape)
    if query_segments is not None and key_segments is not None:
        mask = mask & (query_segments[:, None, :, None] == key_segments[:, None, None, :])
    return mask


def causal_mask(length: int) -> jax.Array:
    """Which positions each one may see, up to itself: `[1, 1, length, length]` bool."""
    positions = jnp.arange(length)
    return (positions[:, None] >= positions[None, :])[None, None]


def relative_position_bucket(offset: jax.Array, bidirectional: bool) -> jax.Array:
    """T5's bucket of `key position - query position`, int32 in [0, 32), the same shape as `offset`.

    Half of the buckets hold one exact distance each, the other half grow logarithmically up to a
    distance of 128. A bidirectional stack spends half of all on each direction.
    """
    buckets, start = NUM_BUCKETS, 0
    distance = -offset
    if bidirectional:
        buckets //= 2
        start = jnp.where(offset > 0, buckets, 0)
        distance = jnp.abs(offset)
    distance = jnp.maximum(distance, 0)
    exact = buckets // 2
    logarithm = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact)
    scale = (buckets - exact) / np.log(MAX_DISTANCE / exact)
    far = exact + (logarithm * scale).astype(jnp.int32)
    return start + jnp.where(distance < exact, distance, jnp.minimum(far, buckets - 1))


class RelativePositionBias(nn.Module):
    """The bias that all layers of a stack share: `[1, heads, query, key]`."""

    config: T5Config
    bidirectional: bool

    @nn.compact
    def __call__(self, query_length: int, key_length: int) -> jax.Array:
        """Looks the bucket of each query and key position up, both counted from 0."""
        config, axes = self.config, ("heads", "relpos_buckets")
        init, shape = nn.initializers.normal(config.relpos_stddev), (config.num_heads, NUM_BUCKETS)
        # [heads, buckets]
        table = weight("rel_embedding", init, shape, axes, config)
        # [query, key]
        offset = jnp.arange(key_length)[None, :] - jnp.arange(query_length)[:, None]
        bucket = relative_position_bucket(offset, self.bidirectional)
        return jnp.take(table.astype(jnp.float32), bucket, axis=1)[None]


class MultiHeadAttention(nn.Module):
    """T5 attention: no bias terms, no rescaling of the scores (the query's initialiser carries it).

    With `decode=True` the keys and values of one position a call are kept in the collection
    `cache`, whose size is set by the first call, as in T5X.
    """

    config: T5Config

    @nn.compact
    def __call__(
        self,
        query_input: jax.Array,
        key_input: jax.Array,
        mask: jax.Array,
        bias: jax.Array | None = None,
        deterministic: bool = True,
        decode: bool = False,
    ) -> jax.Array:
        """Attends from `[batch, query, embed]` to `[batch, key, embed]`: `[batch, query, embed]`.

        Args:
          query_input: the normalised residual stream.
          key_input: the same, or the encoder's output.
          mask: bool, broadcastable to `[batch, heads, query, key]`.
          bias: float32, broadcastable to the same, or None.
          deterministic: False drops attention weights out.
          decode: whether to read and write the cache.
        """
        # [batch, heads, query or key, head_dim]
        query = self._project(query_input, "query", _query_init(self.config.head_dim))
        key = self._project(key_input, "key", ATTENTION_INIT)
        value = self._project(key_input, "value", ATTENTION_INIT)
        if decode:
            key, value, mask, bias = self._update_cache(key, value, mask, bias)
        # [batch, heads, query, key]
        scores = jnp.einsum("bhqd,bhkd->bhqk", query, key, preferred_element_type=jnp.float32)
        # Mask and bias are added to each other first: the sum is the same in every layer, so XLA
        # computes it once, and each layer reads one array of the scores' size instead of two.
        # [batch or 1, heads or 1, query or 1, key]
        masked = jnp.where(mask, 0.0, _MASKED)
        scores = scores + (masked if bias is None else bias + masked)
        weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
        # The softmax is divided by its sum behind the product with the values, where there are
        # head_dim numbers a query to divide instead of one a key.
        total = jnp.sum(weights, axis=-1, keepdims=True)
        weights = dropout(self.config, weights.astype(value.dtype), deterministic)
        # [batch, heads, query, head_dim]
        context = jnp.einsum("bhqk,bhkd->bhqd", weights, value, preferred_element_type=jnp.float32)
        context = (context / total).astype(value.dtype)
        # [batch, query, heads * head_dim]
        context = jnp.swapaxes(context, 1, 2).reshape(*query_input.shape[:2], -1)
        width, axes = query_input.shape[-1], ("joined_kv", "embed")
        return Dense(width, self.config, axes, ATTENTION_INIT, name="out")(context)

    def _project(self, x: jax.Array, name: str, init: Initializer) -> jax.Array:
        """`[batch, length, embed] -> [batch, heads, length, head_dim]`."""
        heads, head_dim = self.config.num_heads, self.config.head_dim
        dense = Dense(heads * head_dim, self.config, ("embed", "joined_kv"), init, name=name)
        # [batch, length, heads, head_dim]
        x = dense(x).reshape(*x.shape[:2], heads, head_dim)
        # Heads first, once: both products then run over the last two axes, a third faster on CPU.
        return constrain(jnp.swapaxes(x, 1, 2), "batch", "heads", "length", "kv")

    def _update_cache(
        self, key: jax.Array, value: jax.Array, mask: jax.Array, bias: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
        """Writes this position; returns all keys and values, and its row of mask and bias."""
        ready = self.has_variable("cache", "cached_key")
        cached_key = self.variable("cache", "cached_key", jnp.zeros, key.shape, key.dtype)
        cached_value = self.variable("cache", "cached_value", jnp.zeros, value.shape, value.dtype)
        index = self.variable("cache", "cache_index", lambda: jnp.zeros((), jnp.int32))
        if not ready:
            return key, value, mask, bias
        now = index.value
        cached_key.value = jax.lax.dynamic_update_slice_in_dim(cached_key.value, key, now, 2)
        cached_value.value = jax.lax.dynamic_update_slice_in_dim(cached_value.value, value, now, 2)
        index.value = now + 1
        length = cached_key.value.shape[2]
        # [1, 1, 1, length]
        mask = (jnp.arange(length) <= now)[None, None, None, :]
        if bias is not None:
            bias = jax.lax.dynamic_slice_in_dim(bias, now, 1, axis=2)
        return cached_key.value, cached_value.value, mask, bias


def _query_init(head_dim: int) -> Initializer:
    """The usual initialiser over sqrt(head_dim), T5's stand-in for scaled scores."""

    def init(rng: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        return ATTENTION_INIT(rng, shape, dtype) / jnp.sqrt(head_dim).astype(dtype)

    return init
