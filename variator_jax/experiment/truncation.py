"""A baseline without training: inputs cut to the length with the FLOPs of a compressed one.

Batches are numpy arrays in T5X's names; nothing here runs a model.
"""

from __future__ import annotations

import bisect
import math
import os
from collections.abc import Iterable, Iterator

import numpy as np

from variator_jax.backbones.base import Stack
from variator_jax.errors import ConfigError, DataError
from variator_jax.evaluation.data import Batch
from variator_jax.plugin import PluginConfig, stack_flops

_INPUTS = "encoder_input_tokens"


def same_flops_length(stack: Stack, length: int, plugin: PluginConfig) -> int:
    """The longest input, up to `length`, that costs no more uncompressed than `length` compressed.

    Args:
      stack: the encoder.
      length: tokens of the whole input.
      plugin: the plugin's settings.

    Raises:
      ConfigError: for a size below 1.
    """
    most = stack_flops(stack, length, plugin)
    lengths = range(1, length + 1)
    return bisect.bisect_right(lengths, most, key=lambda n: stack_flops(stack, n))


def truncated(batches: Iterable[Batch], share: float, suffix: int) -> Iterator[Batch]:
    """Batches whose inputs are cut in their middle, so that a question at the end stays.

    A row of n tokens keeps max(suffix + 1, ceil(share * n)) of them, or all if it has no more: its
    last `suffix` tokens, and of those before as many from the beginning as from the end, shifted
    together. So of a pair of sentences neither is lost. The rest of the row is padding.

    Args:
      batches: with `encoder_input_tokens` `[batch, length]`; other arrays stay as they are.
      share: of the tokens to keep, above 0 and up to 1.
      suffix: how many last tokens to keep, such as `common_suffix`.

    Raises:
      ConfigError: for a share or a suffix out of range.
      DataError: for a packed batch.
    """
    if not 0 < share <= 1:
        raise ConfigError(f"The share of tokens to keep is above 0 and up to 1; found {share}.")
    if suffix < 0:
        raise ConfigError(f"The number of last tokens to keep is not negative; found {suffix}.")
    for batch in batches:
        rows = np.zeros_like(np.asarray(batch[_INPUTS]))
        for row, tokens in zip(rows, _rows(batch), strict=True):
            kept = _cut(tokens, share, suffix)
            row[: len(kept)] = kept
        yield {**batch, _INPUTS: rows}


def common_suffix(batches: Iterable[Batch]) -> int:
    """How many last tokens all rows share; rows without tokens, which fill a batch up, are none.

    A row as long as its batch may have lost its end when it was cut at its feature length, so such
    rows count only if there are no others.

    Raises:
      DataError: if there is no row with a token, or a batch is packed.
    """
    complete: list[list[int]] = []
    cut: list[list[int]] = []
    for batch in batches:
        length = np.shape(batch[_INPUTS])[1]
        for tokens in filter(len, _rows(batch)):
            (complete if len(tokens) < length else cut).append(tokens[::-1].tolist())
    endings = complete or cut
    if not endings:
        raise DataError("There is no row with a token, so there is no suffix to share.")
    return len(os.path.commonprefix(endings))  # of any sequences


def _rows(batch: Batch) -> list[np.ndarray]:
    """The tokens of each row, without padding."""
    if "encoder_segment_ids" in batch:
        raise DataError("A packed batch cannot be cut: one example a row was expected.")
    return [row[row > 0] for row in np.asarray(batch[_INPUTS])]


def _cut(tokens: np.ndarray, share: float, suffix: int) -> np.ndarray:
    # 0.07 * 100 is a little above 7 in floating point, and must not be 8.
    kept = max(suffix + 1, math.ceil(share * len(tokens) - 1e-9))
    if kept >= len(tokens):
        return tokens
    end = suffix + (kept - suffix) // 2
    return np.concatenate([tokens[: kept - end], tokens[len(tokens) - end :]])
