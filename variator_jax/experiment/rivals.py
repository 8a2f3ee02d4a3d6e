"""Rivals without training, at a plugin's FLOPs: similar tokens are merged, or inputs are cut.

Merging is in the style of ToMe (Bolya et al., 2023) and of its form for Stable Diffusion, which
unmerges after each block: every k-th position of a row is a destination, and every other token
joins the destination that it is most similar to. Cutting works on numpy batches in T5X's names.
"""

import bisect
import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from variator_jax.backbones.base import Stack
from variator_jax.errors import ConfigError
from variator_jax.plugin import PluginConfig, intercept_modules, stack_flops

Batch = Mapping[str, Any]
_INPUTS = "encoder_input_tokens"


def mean_pool(method: PluginConfig) -> PluginConfig:
    """The method's FFN sites with the mean of each group, repeated: nothing to train.

    Raises:
      PluginError: if the method has sites of another kind, or in words.
    """
    return dataclasses.replace(method, compression="mean", decompression="repeat", rank=0)


# Similar tokens.


def merge_similar(
    ratio: float, stack: Stack, token_mask: jax.Array
) -> AbstractContextManager[None]:
    """While active, every FFN of the stack runs on ceil(length / ratio) vectors.

    Enter it INSIDE the function that is jitted, as `splice`.

    Args:
      ratio: a destination comes every so many positions, rounded down; 1 or more, whole or not.
      stack: the encoder.
      token_mask: `[batch, length]` bool, True on tokens.

    Raises:
      PluginError: on leaving, if no FFN ran.
    """

    def handler(path: str, call: Callable[..., Any], args: tuple, kwargs: dict) -> jax.Array:
        def ffn(merged: jax.Array) -> jax.Array:
            new_args, new_kwargs = stack.with_stream("ffn", args, kwargs, merged)
            return call(*new_args, **new_kwargs)

        return on_merged(ffn, stack.stream("ffn", args, kwargs), token_mask, ratio)

    paths = {stack.path("ffn", layer) for layer in range(stack.layers)}
    return intercept_modules(paths.__contains__, handler)


def on_merged(
    ffn: Callable[[jax.Array], jax.Array], x: jax.Array, token_mask: jax.Array, ratio: float
) -> jax.Array:
    """Each token gets what `ffn` makes of the mean of its destination and all that join it.

    Args:
      ffn: `[batch, groups, embed] -> [batch, groups, embed]`.
      x: its normalised input, `[batch, length, embed]`.
      token_mask: `[batch, length]` bool. Padding joins nothing and gets 0, and so does a token
        whose row has no destination.
      ratio: see `destinations`.
    """
    owners, groups = destinations(x, token_mask, ratio), len(_places(x.shape[1], ratio))
    joins = token_mask & (owners >= 0)

    def total(values: jax.Array, owners: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(values, owners, num_segments=groups)  # drops number `groups`

    # Added up row by row, as a scatter: a product with a matrix of ones would cost like the
    # similarities.
    joined = jnp.where(joins, owners, groups)
    sums = jax.vmap(total)(x.astype(jnp.float32), joined)
    counts = jax.vmap(total)(jnp.ones(owners.shape, jnp.float32), joined)
    # [batch, groups, embed]
    y = ffn((sums / jnp.maximum(counts, 1.0)[..., None]).astype(x.dtype))
    # [batch, length, embed]
    spread = jnp.take_along_axis(y, jnp.maximum(owners, 0)[..., None], axis=1)
    return spread * joins[..., None].astype(y.dtype)


def destinations(x: jax.Array, token_mask: jax.Array, ratio: float) -> jax.Array:
    """Which destination each position joins, by the cosine of the angle between the vectors.

    Args:
      x: the FFN's normalised input, `[batch, length, embed]`.
      token_mask: `[batch, length]` bool.
      ratio: positions 0, ratio, 2 ratio, ..., rounded down, are destinations, and join themselves.

    Returns:
      `[batch, length]` int32, destinations counted from 0; -1 where a row has none.
    """
    direction = x.astype(jnp.float32)
    norm = jnp.linalg.norm(direction, axis=-1, keepdims=True)
    direction = direction / jnp.maximum(norm, 1e-12)
    places = _places(x.shape[1], ratio)
    valid = token_mask[:, None, places]
    # [batch, length, groups]
    cosine = jnp.einsum("bld,bgd->blg", direction, direction[:, places])
    nearest = jnp.argmax(jnp.where(valid, cosine, -jnp.inf), axis=-1)
    nearest = jnp.where(valid.any(axis=-1), nearest, -1)
    return nearest.at[:, places].set(jnp.arange(len(places))).astype(jnp.int32)


def similar_tokens_flops(stack: Stack, length: int, ratio: float) -> int:
    """FLOPs of one encoder pass over one row: FFNs on merged vectors, and the similarities.

    The similarities cost 2 * length * ceil(length / ratio) * embed in each layer. Means are sums of
    vectors without a product, and are not counted.
    """
    groups = len(_places(length, ratio))
    layers = sum(stack.flops(i, length, length, groups) for i in range(stack.layers))
    return layers + stack.layers * 2 * length * groups * stack.width


def same_flops_ratio(stack: Stack, length: int, plugin: PluginConfig) -> float:
    """The ratio at which merging similar tokens costs at most what a plugin costs.

    Args:
      stack: the encoder.
      length: tokens of the input.
      plugin: its settings.

    Returns:
      length / n for the most destinations n that cost no more.

    Raises:
      ConfigError: if even one destination costs more: attention, which spans shorten, stays whole.
    """
    most, counts = stack_flops(stack, length, plugin), range(1, length + 1)
    fitting = bisect.bisect_right(
        counts, most, key=lambda n: similar_tokens_flops(stack, length, length / n)
    )
    if not fitting:
        raise ConfigError(
            f"Similar tokens that are merged in FFNs alone cannot cost as little as "
            f"{plugin.description} at {length} tokens; compare them with a plugin of FFN sites."
        )
    return length / fitting


def _places(length: int, ratio: float) -> np.ndarray:
    """The positions of destinations, `[ceil(length / ratio)]`; no two are equal."""
    count = math.ceil(length / ratio - 1e-9)  # length / (length / n) may be a little above n
    return np.floor(np.arange(count) * ratio + 1e-9).astype(np.int32)


# Shorter inputs.


def same_flops_length(stack: Stack, length: int, plugin: PluginConfig) -> int:
    """The longest input, up to `length`, that costs no more uncompressed than `length` compressed.

    Args:
      stack: the encoder.
      length: tokens of the whole input.
      plugin: the plugin's settings.
    """
    most, lengths = stack_flops(stack, length, plugin), range(1, length + 1)
    return bisect.bisect_right(lengths, most, key=lambda n: stack_flops(stack, n))


def truncated(batches: Iterable[Batch], share: float, suffix: int) -> Iterator[Batch]:
    """Batches whose inputs are cut in their middle, so that a question at the end stays.

    A row of n tokens keeps max(suffix + 1, ceil(share * n)) of them, or all if it has no more: its
    last `suffix` tokens, and of those before as many from the beginning as from the end, shifted
    together. So of a pair of sentences neither is lost. The rest of the row is padding.

    Args:
      batches: with `encoder_input_tokens` `[batch, length]`, one example a row; other arrays stay
        as they are.
      share: of the tokens to keep, above 0 and up to 1.
      suffix: how many last tokens to keep, such as `common_suffix`.
    """
    for batch in batches:
        inputs = np.zeros_like(np.asarray(batch[_INPUTS]))
        for row, tokens in zip(inputs, _rows(batch), strict=True):
            # 0.07 * 100 is a little above 7 in floating point, and must not be 8.
            count = max(suffix + 1, math.ceil(share * len(tokens) - 1e-9))
            if count < len(tokens):
                end = suffix + (count - suffix) // 2
                tokens = [*tokens[: count - end], *tokens[len(tokens) - end :]]
            row[: len(tokens)] = tokens
        yield {**batch, _INPUTS: inputs}


def common_suffix(batches: Iterable[Batch]) -> int:
    """How many last tokens all rows share; rows without tokens, which fill a batch up, are none.

    A row as long as its batch may have lost its end when it was cut at its feature length, so such
    rows are left out.
    """
    rows = [
        tokens[::-1]
        for batch in batches
        for tokens in _rows(batch)
        if 0 < len(tokens) < np.shape(batch[_INPUTS])[1]
    ]
    return len(os.path.commonprefix(rows))  # of any sequences


def _rows(batch: Batch) -> list[list[int]]:
    """The tokens of each row, without padding."""
    return [row[row > 0].tolist() for row in np.asarray(batch[_INPUTS])]
