"""How far similarities are kept, on vectors whose order is known."""

import numpy as np
import pytest
import scipy.stats

from variator_jax.evaluation.similarity import pooled_vectors, similarity_kept


def unit(rng, texts=30, embed=6):
    vectors = rng.normal(size=(texts, embed))
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def test_equal_vectors_keep_everything_and_random_ones_little():
    rng = np.random.default_rng(0)
    reference = unit(rng)
    assert similarity_kept(reference, reference) == {
        "similarity_spearman": pytest.approx(100),
        "top10_overlap": pytest.approx(100),
    }
    found = similarity_kept(unit(rng), reference)
    assert abs(found["similarity_spearman"]) < 25 and found["top10_overlap"] < 60
    assert similarity_kept(reference[:2], reference[:2]) == {}


def test_the_correlation_is_scipys_over_pairs_of_different_texts():
    rng = np.random.default_rng(1)
    reference = unit(rng)
    vectors = reference + 0.2 * unit(rng)
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    pairs = np.triu_indices(30, 1)
    expected = scipy.stats.spearmanr(
        (vectors @ vectors.T)[pairs], (reference @ reference.T)[pairs]
    ).statistic
    assert similarity_kept(vectors, reference)["similarity_spearman"] == pytest.approx(
        100 * expected
    )


def test_equal_cosines_share_their_rank():
    rng = np.random.default_rng(3)
    # Two directions: of many pairs the cosine is exactly 1 or 0.
    reference, vectors = (np.eye(2)[rng.integers(0, 2, 30)] for _ in range(2))
    pairs = np.triu_indices(30, 1)
    cosines = [(own @ own.T)[pairs] for own in (vectors, reference)]
    found = similarity_kept(vectors, reference)["similarity_spearman"]
    assert found == pytest.approx(
        100 * np.corrcoef(*cosines)[0, 1]
    )  # of two values, ranks are affine


def test_vectors_are_means_over_tokens_and_empty_rows_do_not_count():
    tokens = np.array([[5, 6, 0], [7, 0, 0], [0, 0, 0]])
    states = np.random.default_rng(2).normal(size=(3, 3, 4))
    found = pooled_vectors([{"encoder_input_tokens": tokens}], lambda _: states)
    means = np.stack([states[0, :2].mean(0), states[1, 0]])
    expected = means / np.linalg.norm(means, axis=-1, keepdims=True)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
