import numpy as np
import pytest

from variator_jax.data.spec import TaskSpec
from variator_jax.errors import ConfigError, DataError
from variator_jax.evaluation.evaluator import bit_identical, evaluate_task, verbalizer_ids

PAIR = TaskSpec("pair", "classification", ("yes", "no"))
TOPIC = TaskSpec("topic", "classification", ("red", "blue", "green"))
STORY = TaskSpec("story", "generation")
SPANS = TaskSpec("spans", "span_corruption")
WORDS = {"yes": [11], "no": [12, 5], "red": [21], "blue": [22], "green": [23]}


def label_batch(tokens, answers, padded_rows=0):
    """One target token and eos a row; `answers` are what the scorer below is to say."""
    rows = len(tokens) + padded_rows
    targets = np.zeros((rows, 3), np.int32)
    targets[: len(tokens), 0] = tokens
    targets[: len(tokens), 1] = 1
    return {
        "answers": np.array(list(answers) + [0] * padded_rows),
        "decoder_target_tokens": targets,
        "decoder_loss_weights": (targets > 0).astype(np.float32),
    }


def say(labels):
    return lambda batch: np.eye(labels)[batch["answers"]]


def test_classification_reads_label_and_answer():
    batches = [label_batch([21, 22, 22], [0, 1, 2]), label_batch([23, 22], [0, 1])]
    result = evaluate_task(TOPIC, batches, score_batch=say(3), label_ids=[21, 22, 23])
    assert result.score == pytest.approx(60.0) and result.examples == 5
    assert result.majority == pytest.approx(60.0)
    assert result.predictions == (0, 1, 2, 0, 1)
    assert "binary_f1" not in result.details


def test_two_labels_add_the_f1_of_the_second():
    batches = [label_batch([11, 12, 12], [1, 1, 0])]
    result = evaluate_task(PAIR, batches, score_batch=say(2), label_ids=[11, 12])
    assert result.details["binary_f1"] == pytest.approx(50.0)


def test_rows_that_fill_a_batch_up_do_not_count():
    full = [label_batch([11, 12], [0, 0])]
    filled = [label_batch([11, 12], [0, 0], padded_rows=3), label_batch([], [], padded_rows=5)]
    one = evaluate_task(PAIR, full, score_batch=say(2), label_ids=[11, 12])
    assert evaluate_task(PAIR, filled, score_batch=say(2), label_ids=[11, 12]) == one
    assert one.examples == 2


def test_a_target_that_is_no_verbalizer_is_told():
    with pytest.raises(DataError, match="token 99.*yes.*no"):
        evaluate_task(PAIR, [label_batch([99], [0])], score_batch=say(2), label_ids=[11, 12])


PREFIXED = TaskSpec("prefixed", "classification", ("yes", "no"), prefix="<extra_id_0>")
ASKED = TaskSpec("asked", "generation", prefix="<extra_id_0>", many_answers=True)


def test_a_verbalizer_behind_a_prefix_is_read_there():
    batch = label_batch([9, 9, 9], [0, 1, 1])
    batch["decoder_target_tokens"][:, 1] = [11, 11, 12]
    options = {"score_batch": say(2), "label_ids": [11, 12]}
    result = evaluate_task(PREFIXED, [batch], label_position=1, **options)
    assert result.score == pytest.approx(200 / 3)
    with pytest.raises(DataError, match="token 9 at position 0"):
        evaluate_task(PREFIXED, [batch], **options)
    with pytest.raises(DataError, match="targets of 3 tokens have no verbalizer.*TASK_FEATURE"):
        evaluate_task(PREFIXED, [batch], label_position=3, **options)


def test_generation_drops_the_prefix_and_takes_the_best_of_all_answers():
    targets = np.array([[9, 5, 1], [9, 6, 1], [0, 0, 0]], np.int32)
    texts = {9: "<extra_id_0>", 5: "five", 6: "six", 8: "<extra_id_1>"}
    outputs = np.array([[9, 6, 8, 5], [6, 1, 0, 0], [5, 5, 5, 5]], np.int32)
    result = evaluate_task(
        ASKED,
        [{"decoder_target_tokens": targets, "decoder_loss_weights": targets > 0}],
        generate=lambda _: outputs,
        decode=lambda ids: " ".join(texts[token] for token in ids),
        references=[["five", "Six."], ["eleven"]],
    )
    assert result.predictions == ("six", "six")
    assert result.details == {"token_f1": 50.0, "exact_match": 50.0}


def test_no_example_at_all_is_told():
    for spec in (PAIR, STORY, SPANS):
        with pytest.raises(DataError):
            evaluate_task(
                spec, [], score_batch=say(2), generate=say(2), label_ids=[11, 12], decode=str
            )


def test_verbalizers_are_known_by_their_first_token():
    assert verbalizer_ids(PAIR, WORDS.__getitem__) == [11, 12]
    assert verbalizer_ids(TOPIC, WORDS.__getitem__) == [21, 22, 23]


def test_verbalizers_that_begin_alike_are_told():
    colliding = {**WORDS, "no": [11, 6]}
    with pytest.raises(DataError, match="'yes' and 'no' both begin with token 11"):
        verbalizer_ids(PAIR, colliding.__getitem__)


@pytest.mark.parametrize("tokens", [[], [1], [0, 4]])
def test_a_verbalizer_without_tokens_is_told(tokens):
    with pytest.raises(DataError, match="cannot spell the label 'no'"):
        verbalizer_ids(PAIR, {**WORDS, "no": tokens}.__getitem__)


def test_generation_compares_decoded_texts_up_to_eos():
    targets = np.array([[5, 6, 1, 0], [7, 8, 9, 1], [0, 0, 0, 0]], np.int32)
    outputs = np.array([[5, 6, 1, 9], [7, 1, 0, 0], [3, 3, 3, 3]], np.int32)
    batch = {"decoder_target_tokens": targets, "decoder_loss_weights": (targets > 0) * 1}
    result = evaluate_task(
        STORY,
        [batch],
        generate=lambda _: outputs,
        decode=lambda ids: " ".join(f"w{token}" for token in ids),
    )
    # The second answer holds one of three words: precision 1, recall 1/3.
    assert result.score == pytest.approx((100 + 50) / 2)
    assert result.details["exact_match"] == 50.0
    assert result.predictions == ("w5 w6", "w7") and result.majority is None


def test_span_corruption_means_over_target_tokens():
    weights = np.array([[1, 1, 0], [1, 0, 0], [0, 0, 0]], np.float32)
    loss = np.array([[1.0, 2.0, 99.0], [3.0, 99.0, 99.0], [99.0] * 3], np.float32)
    hits = np.array([[1, 0, 1], [1, 1, 1], [1, 1, 1]], bool)
    result = evaluate_task(
        SPANS,
        [{"decoder_target_tokens": weights, "decoder_loss_weights": weights}],
        score_batch=lambda _: (loss, hits),
    )
    assert result.score == pytest.approx(200 / 3) and result.examples == 2
    assert result.details["cross_entropy"] == pytest.approx(2.0)
    assert result.details["perplexity"] == pytest.approx(np.exp(2.0))


@pytest.mark.parametrize(
    "spec, missing",
    [
        (PAIR, "score_batch"),
        (STORY, "decode"),
        (SPANS, "score_batch"),
    ],
)
def test_a_missing_function_is_told(spec, missing):
    with pytest.raises(ConfigError, match=f"{spec.name}.*without {missing}"):
        evaluate_task(spec, [label_batch([11], [0])])


def test_bit_identical_sees_a_single_bit():
    scores = np.ones((2, 2), np.float32)
    close = scores.copy()
    close[1, 1] = np.nextafter(np.float32(1), np.float32(2))
    assert bit_identical(lambda _: scores, lambda _: scores.copy(), [{}])
    assert not bit_identical(lambda _: scores, lambda _: close, [{}])
    with pytest.raises(DataError, match="no batch"):
        bit_identical(lambda _: scores, lambda _: scores, [])
