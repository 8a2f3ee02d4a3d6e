"""T5's span corruption of token arrays: pure numpy, vectorised over examples.

The noise is the one of the T5 paper (section 3.1.4, "corrupting spans"), as its code draws it: text
and noise spans alternate, text first and noise last, every way of cutting equally likely.
Sentinels count down from the vocabulary's last id. How a seqio task calls this: `preprocessors`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from absl import logging

from variator_jax.errors import DataError

NOISE_DENSITY = 0.15
MEAN_SPAN_LENGTH = 3.0


def noise_counts(
    length: int, density: float = NOISE_DENSITY, mean_span: float = MEAN_SPAN_LENGTH
) -> tuple[int, int]:
    """Returns how many of `length` tokens are noise, and in how many spans."""
    noise = min(max(round(length * density), 1), max(length - 1, 1))
    spans = max(min(round(noise / mean_span), noise, length - noise), 1)
    return noise, spans


def corrupted_lengths(
    length: int, density: float = NOISE_DENSITY, mean_span: float = MEAN_SPAN_LENGTH
) -> tuple[int, int]:
    """Returns the lengths of inputs and targets, EOS included, that `length` tokens turn into."""
    noise, spans = noise_counts(length, density, mean_span)
    return length - noise + spans + 1, noise + spans + 1


def chunk_length(
    inputs_length: int, density: float = NOISE_DENSITY, mean_span: float = MEAN_SPAN_LENGTH
) -> int:
    """Returns how many tokens of text fill `inputs_length` after corruption, EOS included.

    Raises:
      DataError: if `inputs_length` is too short for one token, one sentinel and EOS.
    """
    if inputs_length < 3:
        raise DataError(f"span corruption needs inputs of at least 3 tokens, not {inputs_length}")
    length = inputs_length
    while corrupted_lengths(length + 1, density, mean_span)[0] <= inputs_length:
        length += 1
    while corrupted_lengths(length, density, mean_span)[0] > inputs_length:
        length -= 1
    return length


def _random_lengths(rows: int, total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """Cuts `total` items into `parts` non-empty parts in each row: int [rows, parts]."""
    cuts = np.argsort(rng.random((rows, total - 1)), axis=1)[:, : parts - 1] + 1
    ends = np.concatenate([np.sort(cuts, axis=1), np.full((rows, 1), total)], axis=1)
    return np.diff(ends, axis=1, prepend=0)


def noise_mask(
    rows: int,
    length: int,
    rng: np.random.Generator,
    density: float = NOISE_DENSITY,
    mean_span: float = MEAN_SPAN_LENGTH,
) -> np.ndarray:
    """Returns a bool mask [rows, length] of noise; the first token never is and the last always is.

    Raises:
      DataError: if `length` is less than 2, which leaves no room for text and noise.
    """
    if length < 2:
        raise DataError(f"span corruption needs at least 2 tokens, found {length}")
    noise, spans = noise_counts(length, density, mean_span)
    text_lengths = _random_lengths(rows, length - noise, spans, rng)
    noise_lengths = _random_lengths(rows, noise, spans, rng)
    # [rows, spans, 2] -> [rows, 2 * spans]: text, noise, text, noise, ...
    ends = np.stack([text_lengths, noise_lengths], axis=2).reshape(rows, -1).cumsum(axis=1)
    spans_begun: np.ndarray = np.zeros((rows, length), np.int64)
    spans_begun[np.arange(rows)[:, None], ends[:, :-1]] = 1
    return spans_begun.cumsum(axis=1) % 2 == 1


def replace_spans(tokens: np.ndarray, mask: np.ndarray, vocab_size: int) -> np.ndarray:
    """Puts one sentinel in place of each span where `mask` holds: the last id, then downwards.

    Args:
      tokens: int [rows, length].
      mask: bool [rows, length], with equally many kept tokens and spans in every row.
      vocab_size: one more than the id of the first sentinel.

    Returns:
      int32 [rows, kept tokens + spans].
    """
    begins = mask.copy()
    begins[:, 1:] &= ~mask[:, :-1]
    sentinels = vocab_size - begins.cumsum(axis=1)
    kept = ~mask | begins
    return np.where(begins, sentinels, tokens)[kept].reshape(len(tokens), -1).astype(np.int32)


def corrupt(
    tokens: np.ndarray,
    rng: np.random.Generator,
    vocab_size: int,
    density: float = NOISE_DENSITY,
    mean_span: float = MEAN_SPAN_LENGTH,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns span corruption's inputs and targets of tokens [rows, length], without EOS.

    Inputs int32 [rows, text + spans] have sentinel i in place of the i-th noise span; targets int32
    [rows, noise + spans] are the noise spans, each after its sentinel.
    """
    mask = noise_mask(tokens.shape[0], tokens.shape[1], rng, density, mean_span)
    return replace_spans(tokens, mask, vocab_size), replace_spans(tokens, ~mask, vocab_size)


def check_room(
    lengths: Mapping[str, int],
    extra_ids: int,
    density: float = NOISE_DENSITY,
    mean_span: float = MEAN_SPAN_LENGTH,
) -> int:
    """Returns how many tokens of text fill the inputs; warns if the targets will be cut.

    Raises:
      DataError: if the vocabulary has sentinels, but too few.
    """
    chunk = chunk_length(lengths["inputs"], density, mean_span)
    spans = noise_counts(chunk, density, mean_span)[1]
    if 0 < extra_ids < spans:
        raise DataError(
            f"{lengths['inputs']} input tokens need {spans} sentinels, but the vocabulary has "
            f"{extra_ids}; give shorter inputs or a vocabulary with more extra ids"
        )
    targets = corrupted_lengths(chunk, density, mean_span)[1]
    if lengths.get("targets", targets) < targets:
        logging.warning(
            "span corruption of %d input tokens makes targets of %d tokens; they are cut to %d",
            lengths["inputs"],
            targets,
            lengths["targets"],
        )
    return chunk
