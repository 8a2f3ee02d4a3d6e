"""How far similarities are kept, on vectors whose order is known."""

import numpy as np
import pytest
import scipy.stats

from variator_jax.evaluation.similarity import pooled_vectors, similarity_kept


def normed(vectors):
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def unit(rng):
    return normed(rng.normal(size=(30, 6)))


def test_equal_vectors_keep_everything_and_random_ones_little():
    rng = np.random.default_rng(0)
    reference = unit(rng)
    everything = {"similarity_spearman": 100, "top10_overlap": 100}
    assert similarity_kept(reference, reference) == pytest.approx(everything)
    found = similarity_kept(unit(rng), reference)
    assert abs(found["similarity_spearman"]) < 25 and found["top10_overlap"] < 60
    assert similarity_kept(reference[:2], reference[:2]) == {}


@pytest.mark.parametrize("equal", [False, True])
def test_the_correlation_is_scipys_over_pairs_of_different_texts_and_equal_ones_share_a_rank(equal):
    rng = np.random.default_rng(1)
    reference = unit(rng)
    vectors = normed(reference + 0.2 * unit(rng))
    if equal:  # two directions: of many pairs the cosine is exactly 1 or 0
        reference, vectors = (np.eye(2)[rng.integers(0, 2, 30)] for _ in range(2))
    cosines = [(own @ own.T)[np.triu_indices(30, 1)] for own in (vectors, reference)]
    found = similarity_kept(vectors, reference)["similarity_spearman"]
    # Of two values, ranks are affine.
    expected = np.corrcoef(*cosines)[0, 1] if equal else scipy.stats.spearmanr(*cosines).statistic
    assert found == pytest.approx(100 * expected)


def test_vectors_are_means_over_tokens_and_empty_rows_do_not_count():
    tokens = np.array([[5, 6, 0], [7, 0, 0], [0, 0, 0]])
    states = np.random.default_rng(2).normal(size=(3, 3, 4))
    found = pooled_vectors([{"encoder_input_tokens": tokens}], lambda _: states)
    means = np.stack([states[0, :2].mean(0), states[1, 0]])
    np.testing.assert_allclose(found, normed(means), rtol=1e-5)
