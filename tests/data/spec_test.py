"""Specs of tasks, the tokens that they need, and the metrics of predictions."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from variator_jax.data import published, spec
from variator_jax.data._tf import seqio
from variator_jax.data.spec import TaskSpec, get_spec, prefix_ids, register_spec, verbalizer_ids
from variator_jax.errors import DataError

PAIR = TaskSpec("pair", "classification", ("No", "Yes"), "<extra_id_0>")
ASKED = TaskSpec("asked", "generation", prefix="<extra_id_0>", many_answers=True)
PLAIN = TaskSpec("plain", "classification", ("yes", "no"))
MARKED = TaskSpec("marked", "classification", ("yes", "no"), prefix="<s>")


def test_a_spec_may_be_registered_twice_and_no_other_under_its_name():
    first = TaskSpec("spec_test_task", "generation")
    assert register_spec(first) == register_spec(TaskSpec("spec_test_task", "generation"))
    assert get_spec("spec_test_task") is first
    with pytest.raises(DataError, match="already registered"):
        register_spec(TaskSpec("spec_test_task", "span_corruption"))
    with pytest.raises(DataError, match="Did you mean 'spec_test_task'"):
        get_spec("spec_test_tsk")


@pytest.mark.parametrize("kind, fields, message", [
    ("classificaton", {}, "Did you mean 'classification'"),
    ("classification", {"labels": ("a",)}, "cannot have labels"),
    ("classification", {"labels": ("a", "b", "a")}, "cannot have labels"),
    ("generation", {"labels": ("yes", "no")}, "cannot have labels"),
    ("span_corruption", {"prefix": "<s>"}, "cannot have prefix"),
    ("span_corruption", {"many_answers": True}, "cannot have many_answers"),
])  # fmt: skip
def test_a_spec_that_cannot_be_scored_is_refused(kind, fields, message):
    with pytest.raises(DataError, match=message):
        TaskSpec("x", kind, **fields)


def test_verbalizers_are_known_by_their_first_token_after_the_prefix():
    assert verbalizer_ids(PLAIN, {"yes": [11], "no": [12, 5]}.__getitem__) == [11, 12]
    words = {"<s>": [9], "<s> yes": [9, 11], "<s> no": [9, 12, 5]}.__getitem__
    assert verbalizer_ids(MARKED, words) == [11, 12]
    assert prefix_ids(MARKED, words) == [9] and prefix_ids(PLAIN, words) == []


def test_tokens_that_do_not_identify_the_verbalizer_or_the_prefix_are_refused():
    both, unspelt = "'yes' and 'no' both begin with token 11", "cannot spell the label 'no'"
    for tokens, message in (([11, 6], both), ([], unspelt), ([1], unspelt), ([2, 7], unspelt)):
        with pytest.raises(DataError, match=message):
            verbalizer_ids(PLAIN, {"yes": [11], "no": tokens}.__getitem__, unknown_id=2)
    for tokens in ([], [2], [9, 8]):
        with pytest.raises(DataError, match="needs <s> as one token"):
            prefix_ids(MARKED, lambda _, ids=tokens: ids, unknown_id=2)


def test_an_answer_is_what_follows_the_prefix_and_a_target_may_have_many():
    texts = ["<extra_id_0> Yes", " <extra_id_0>Yes", "Yes", "<extra_id_0> Yes <extra_id_1> x"]
    assert {PAIR.postprocess(text, example={}, is_target=False) for text in texts} == {"Yes"}
    assert PAIR.answer(PAIR.target("Yes")) == "Yes" and PLAIN.target("yes") == "yes"
    for answers in (b"the man\x1fhe", np.bytes_(b"the man\x1fhe"), np.array(b"the man\x1fhe")):
        assert ASKED.postprocess("the man", {"answers": answers}, True) == ["the man", "he"]
    assert ASKED.postprocess("<extra_id_0> a man", {"answers": b"x"}, False) == "a man"


def _evaluated(task, answer=None):
    """Scores by seqio's own evaluator of a model with one answer, by default the target."""
    converter = seqio.EncDecFeatureConverter(pack=False)
    evaluator = seqio.Evaluator(task, converter, eval_split="validation")
    vocabulary = seqio.TaskRegistry.get(task).output_features["targets"].vocabulary
    tokens = vocabulary.encode(answer) if answer else None

    def predict(dataset):
        examples = dataset.as_numpy_iterator()
        return [(int(i), tokens or e["decoder_target_tokens"].tolist()) for i, e in examples]

    return evaluator.evaluate(compute_metrics=True, predict_fn=predict)[0].result()[task]


def test_seqios_evaluator_scores_glue_and_squad(tmp_path, verbalizer_model):
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\ngood\t1\nbad\t0\ndull\t0\nfine\t1\n")
    task = published.glue_task("sst2", verbalizer_model, str(tmp_path))
    assert _evaluated(task) == {"accuracy": 100.0, "binary_f1": 100.0}
    scores = _evaluated(task, "<extra_id_0> positive")
    assert scores == {"accuracy": 50.0, "binary_f1": pytest.approx(200 / 3)}
    assert _evaluated(task, "Question")["accuracy"] == 0.0
    rows = [{"question": "Who?", "context": "c", "answers": [f"number {n}", "Yes"]} for n in "ab"]
    (tmp_path / "dev.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = published.squad_task(verbalizer_model, str(tmp_path))
    for answer in (None, "<extra_id_0> Yes <extra_id_1> No"):
        assert _evaluated(task, answer) == {"exact_match": 100.0, "token_f1": 100.0}


@given(st.lists(st.integers(0, 3), min_size=1, max_size=20))
def test_the_majority_is_the_best_constant_answer(labels):
    best = max(spec.accuracy([label] * len(labels), labels) for label in range(4))
    assert spec.majority_score(labels) == best and spec.accuracy(labels, labels) == 100.0


def test_binary_f1_by_hand():
    # 1 hit, 1 false alarm, 2 misses: precision 1/2, recall 1/3.
    assert spec.binary_f1([1, 1, 0, 0, 0], [1, 0, 1, 1, 0]) == pytest.approx(40.0)
    assert spec.binary_f1([0, 0], [0, 0]) == 0.0
    (score,) = TaskSpec("three", "classification", ("a", "b", "c")).metric_functions()
    assert score(["a", "b"], ["a", "a"]) == {"accuracy": 50.0}  # only two labels have an F1
    assert spec.binary_f1(["no", "yes"], ["no", "no"], positive="no") == pytest.approx(200 / 3)


def test_answers_score_by_their_best():
    spaced, plain = "  The quick,  brown-Fox's an  apple! theatre", "quick brownfoxs apple theatre"
    for predictions, answers, exact, f1 in (
        ([spaced], [plain], 100.0, 100.0),
        (["The Cat."], [["dog", "cat"]], 100.0, 100.0),
        (["cat", "cow"], ["cats", "cow"], 50.0, 50.0),
        (["red car"], ["a red fast car"], 0.0, 80.0),  # two of two words, two of three
        (["go go go"], ["go"], 0.0, 50.0),  # a repeated word counts as often as it is expected
        (["the", "the", "cat"], ["", "cat", "the"], 100 / 3, 100 / 3),  # texts without words
    ):
        assert spec.exact_match(predictions, answers) == pytest.approx(exact), predictions
        assert spec.token_f1(predictions, answers) == pytest.approx(f1), predictions


def test_nothing_to_score_and_unequal_lengths_are_refused():
    for metric in (spec.accuracy, spec.binary_f1, spec.exact_match, spec.token_f1):
        for predictions, references in (([], []), (["a"], ["a", "b"])):
            with pytest.raises(DataError, match=f"for {len(references)} references"):
                metric(predictions, references)
