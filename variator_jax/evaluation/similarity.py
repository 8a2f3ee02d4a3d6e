"""How far a plugin keeps similarities: what an index of embeddings would notice of it."""

from collections.abc import Callable, Iterable

import numpy as np
from scipy import stats

from variator_jax.evaluation.data import Batch

MOST = 512  # texts of a task that are compared with each other
_NEAREST = 10


def pooled_vectors(batches: Iterable[Batch], encode: Callable[[Batch], np.ndarray]) -> np.ndarray:
    """The mean-pooled vectors of the first texts, of length 1: `[texts, embed]` float32.

    Args:
      batches: with T5X's names, one text a row; empty rows fill the last one up.
      encode: batch -> hidden states `[batch, length, embed]`.
    """
    pooled: list[np.ndarray] = []
    for batch in batches:
        # [batch, length, 1]
        valid = (np.asarray(batch["encoder_input_tokens"]) > 0)[..., None]
        # [batch, embed]; a sum has the direction of the mean
        sums = np.sum(np.asarray(encode(batch), np.float32), axis=1, where=valid)
        pooled += list(sums[valid.any(axis=(1, 2))])
        if len(pooled) >= MOST:
            break
    vectors = np.array(pooled[:MOST])
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def similarity_kept(vectors: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """Spearman correlation of all cosines, and the share of each text's 10 nearest that stay.

    Args:
      vectors: `[texts, embed]`, of length 1.
      reference: of the same texts without a plugin.

    Returns:
      Both times 100, by name; nothing for fewer than three texts, or where all are alike.
    """
    texts = len(reference)
    if texts < 3:
        return {}
    cosines = [own @ own.T for own in (vectors, reference)]
    pairs = np.triu_indices(texts, 1)
    if not all(np.ptp(own[pairs]) for own in cosines):
        return {}  # without differences there is no order
    nearest = min(_NEAREST, texts - 1)
    ranked = (np.argsort(-(own - 4 * np.eye(texts)), axis=1, kind="stable") for own in cosines)
    found, expected = (others[:, :nearest] for others in ranked)
    kept = [len({*a} & {*b}) / nearest for a, b in zip(found, expected, strict=True)]
    spearman = float(stats.spearmanr(*(own[pairs] for own in cosines)).statistic)
    return {"similarity_spearman": 100 * spearman, "top10_overlap": 100 * float(np.mean(kept))}
