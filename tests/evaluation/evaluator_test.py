"""Scores of each kind of task from given answers. Verbalizers are tested in data/spec_test.py."""

import numpy as np
import pytest

from variator_jax.data.spec import TaskSpec
from variator_jax.errors import DataError, TrainingError
from variator_jax.evaluation.evaluator import (
    evaluate_classification,
    evaluate_generation,
    evaluate_span_corruption,
)

PAIR = TaskSpec("pair", "classification", ("yes", "no"))
TOPIC = TaskSpec("topic", "classification", ("red", "blue", "green"))
PREFIXED = TaskSpec("prefixed", "classification", ("yes", "no"), prefix="<extra_id_0>")
STORY = TaskSpec("story", "generation")
ASKED = TaskSpec("asked", "generation", prefix="<extra_id_0>", many_answers=True)
SPANS = TaskSpec("spans", "span_corruption")


def label_batch(tokens, answers, padded_rows=0):
    """One target token and EOS a row; `answers` are what the scorer below answers."""
    targets = np.zeros((len(tokens) + padded_rows, 3), np.int32)
    targets[: len(tokens), 0] = tokens
    targets[: len(tokens), 1] = 1
    return {
        "answers": np.array(list(answers) + [0] * padded_rows),
        "decoder_target_tokens": targets,
        "decoder_loss_weights": (targets > 0).astype(np.float32),
    }


def answered(labels):
    return lambda batch: np.eye(labels)[batch["answers"]]


def pair(*batches, **options):
    return evaluate_classification(PAIR, batches, answered(2), [11, 12], **options)


def test_classification_reads_label_and_answer():
    batches = [label_batch([21, 22, 22], [0, 1, 2]), label_batch([23, 22], [0, 1])]
    result = evaluate_classification(TOPIC, batches, answered(3), [21, 22, 23])
    assert result.score == pytest.approx(60.0) and result.examples == 5
    assert result.majority == pytest.approx(60.0)
    assert "binary_f1" not in result.details
    two_labels = pair(label_batch([11, 12, 12], [1, 1, 0]))
    assert two_labels.details["binary_f1"] == pytest.approx(50.0)


def test_rows_that_fill_a_batch_up_do_not_count():
    one = pair(label_batch([11, 12], [0, 0]))
    filled = label_batch([11, 12], [0, 0], padded_rows=3), label_batch([], [], padded_rows=5)
    assert pair(*filled) == one and one.examples == 2


def test_scores_that_are_not_finite_are_refused():
    batches, nothing = [label_batch([11, 12], [0, 1])], np.full((2, 2), np.nan)
    with pytest.raises(TrainingError, match="not finite"):
        evaluate_classification(PAIR, batches, lambda batch: nothing, [11, 12])


def test_a_verbalizer_behind_a_prefix_is_read_there():
    batch = label_batch([9, 9, 9], [0, 1, 1])
    batch["decoder_target_tokens"][:, 1] = [11, 11, 12]
    assert pair(batch, label_position=1).score == pytest.approx(200 / 3)
    with pytest.raises(DataError, match="token 9 at position 0.*yes.*no"):
        pair(batch)
    with pytest.raises(DataError, match="token None at position 3.*TASK_FEATURE"):
        pair(batch, label_position=3)


def test_generation_drops_the_prefix_and_takes_the_best_of_all_answers():
    targets = np.array([[9, 5, 1], [9, 6, 1], [0, 0, 0]], np.int32)
    texts = {9: "<extra_id_0>", 5: "five", 6: "six", 8: "<extra_id_1>", 1: "", 0: ""}
    outputs = np.array([[9, 6, 8, 5], [6, 1, 0, 0], [5, 5, 5, 5]], np.int32)
    batch = {"decoder_target_tokens": targets, "decoder_loss_weights": targets > 0}
    decode = lambda ids: " ".join(texts[token] for token in ids)  # noqa: E731
    answers = [["five", "Six."], ["eleven", "six seven eight"]]  # overlap: 1 of 1, 1 of 3 words
    result = evaluate_generation(ASKED, [batch], lambda _: outputs, decode, answers)
    assert result.details == {"token_f1": pytest.approx(75.0), "exact_match": 50.0}
    assert result.score == result.details["token_f1"] and result.majority is None


def test_span_corruption_means_over_target_tokens():
    weights = np.array([[1, 1, 0], [1, 0, 0], [0, 0, 0]], np.float32)
    loss = np.array([[1.0, 2.0, 99.0], [3.0, 99.0, 99.0], [99.0] * 3], np.float32)
    hits = np.array([[1, 0, 1], [1, 1, 1], [1, 1, 1]], bool)
    batch = {"decoder_target_tokens": weights, "decoder_loss_weights": weights}
    result = evaluate_span_corruption(SPANS, [batch], lambda _: (loss, hits))
    assert result.score == pytest.approx(200 / 3) and result.examples == 2
    assert result.details["cross_entropy"] == pytest.approx(2.0)
    assert result.details["perplexity"] == pytest.approx(np.exp(2.0))


def test_no_example_at_all_is_refused():
    with pytest.raises(DataError):
        pair()
    with pytest.raises(DataError):
        evaluate_generation(STORY, [], answered(2), str, [])
    with pytest.raises(DataError):
        evaluate_span_corruption(SPANS, [], answered(2))
