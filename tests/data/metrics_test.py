import pytest
from hypothesis import given
from hypothesis import strategies as st

from variator_jax.data import metrics
from variator_jax.errors import DataError

LABELS = st.lists(st.integers(0, 3), min_size=1, max_size=20)


def test_accuracy_is_the_share_of_hits():
    assert metrics.accuracy([0, 1, 2, 2], [0, 1, 2, 1]) == 75.0
    assert metrics.accuracy(["yes"], ["no"]) == 0.0


@given(LABELS)
def test_perfect_answers_score_a_hundred(labels):
    assert metrics.accuracy(labels, labels) == 100.0


@given(LABELS)
def test_majority_is_the_best_constant_answer(labels):
    best = max(metrics.accuracy([label] * len(labels), labels) for label in range(4))
    assert metrics.majority_score(labels) == best


def test_binary_f1_by_hand():
    # 1 hit, 1 false alarm, 2 misses: precision 1/2, recall 1/3.
    assert metrics.binary_f1([1, 1, 0, 0, 0], [1, 0, 1, 1, 0]) == pytest.approx(40.0)
    assert metrics.binary_f1([0, 0], [0, 0]) == 0.0
    assert metrics.binary_f1(["no", "yes"], ["no", "no"], positive="no") == pytest.approx(200 / 3)


def test_normalisation_drops_case_punctuation_articles_and_spaces():
    text = "  The quick,  brown-Fox's an  apple! theatre another"
    assert metrics.normalise_answer(text) == "quick brownfoxs apple theatre another"


@pytest.mark.parametrize(
    "predictions, answers, exact, f1",
    [
        (["The Cat."], [["dog", "cat"]], 100.0, 100.0),
        (["cat", "cow"], ["cats", "cow"], 50.0, 50.0),
        (["red car"], ["a red fast car"], 0.0, 80.0),  # two of two words, two of three
        (["red car"], [["blue", "red car"]], 100.0, 100.0),
        (["go go go"], ["go"], 0.0, 50.0),  # a repeated word counts as often as it is expected
        (["the", "the", "cat"], ["", "cat", "the"], 100 / 3, 100 / 3),  # texts without words
    ],
)
def test_answers_score_by_their_best(predictions, answers, exact, f1):
    assert metrics.exact_match(predictions, answers) == pytest.approx(exact)
    assert metrics.token_f1(predictions, answers) == pytest.approx(f1)


@pytest.mark.parametrize(
    "metric", [metrics.accuracy, metrics.binary_f1, metrics.exact_match, metrics.token_f1]
)
def test_nothing_to_score_and_unequal_lengths_are_told(metric):
    with pytest.raises(DataError, match="no example"):
        metric([], [])
    with pytest.raises(DataError, match="1 predictions for 2 references"):
        metric(["a"], ["a", "b"])


def test_majority_and_answers_of_nothing_are_told():
    with pytest.raises(DataError, match="no example"):
        metrics.majority_score([])
    with pytest.raises(DataError, match="Example 1 has no answer"):
        metrics.token_f1(["a", "b"], ["a", []])
