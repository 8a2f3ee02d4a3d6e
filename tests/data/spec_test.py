import json

import numpy as np
import pytest

from variator_jax.data import glue, squad
from variator_jax.data._tf import seqio
from variator_jax.data.file_task import file_task, span_corruption_task_from_text
from variator_jax.data.spec import (
    TaskSpec,
    get_spec,
    metric_functions,
    postprocessor,
    prefix_ids,
    register_spec,
    verbalizer_ids,
)
from variator_jax.errors import DataError

PAIR = TaskSpec("pair", "classification", ("No", "Yes"), "<extra_id_0>")
ASKED = TaskSpec("asked", "generation", prefix="<extra_id_0>", many_answers=True)
PLAIN = TaskSpec("plain", "classification", ("yes", "no"))
MARKED = TaskSpec("marked", "classification", ("yes", "no"), prefix="<s>")


def test_a_spec_may_be_registered_twice_and_no_other_under_its_name():
    spec = TaskSpec("spec_test_task", "generation")
    assert register_spec(spec) is spec
    register_spec(TaskSpec("spec_test_task", "generation"))
    assert get_spec("spec_test_task") == spec
    with pytest.raises(DataError, match="already registered"):
        register_spec(TaskSpec("spec_test_task", "span_corruption"))
    with pytest.raises(DataError, match="Did you mean 'spec_test_task'"):
        get_spec("spec_test_tsk")


@pytest.mark.parametrize(
    "kind, fields, message",
    [
        ("classificaton", {}, "Did you mean 'classification'"),
        ("classification", {"labels": ("yes",)}, "two labels"),
        ("classification", {"labels": ("yes", "no", "yes")}, "twice"),
        ("generation", {"labels": ("yes", "no")}, "takes no labels"),
        ("span_corruption", {"prefix": "<s>"}, "takes no prefix"),
        ("classification", {"labels": ("a", "b"), "many_answers": True}, "one answer an example"),
    ],
)
def test_a_spec_that_cannot_be_scored_is_refused(kind, fields, message):
    with pytest.raises(DataError, match=message):
        TaskSpec("x", kind, **fields)


def test_verbalizers_are_known_by_their_first_token_after_the_prefix():
    assert verbalizer_ids(PLAIN, {"yes": [11], "no": [12, 5]}.__getitem__) == [11, 12]
    words = {"<s>": [9], "<s> yes": [9, 11], "<s> no": [9, 12, 5]}.__getitem__
    assert verbalizer_ids(MARKED, words) == [11, 12]
    assert prefix_ids(MARKED, words) == [9] and prefix_ids(PLAIN, words) == []
    assert MARKED.target("yes") == "<s> yes" and PLAIN.target("yes") == "yes"


@pytest.mark.parametrize(
    "tokens, message",
    [
        ([11, 6], "'yes' and 'no' both begin with token 11"),
        ([], "'no' encodes to no token"),
        ([1], "'no' encodes to no token"),
        ([2, 7], "cannot spell the verbalizer 'no'"),
    ],
)
def test_verbalizers_that_the_first_token_does_not_identify_are_refused(tokens, message):
    with pytest.raises(DataError, match=message):
        verbalizer_ids(PLAIN, {"yes": [11], "no": tokens}.__getitem__, unknown_id=2)
    with pytest.raises(DataError, match="is generation, so it has no verbalizers"):
        verbalizer_ids(ASKED, lambda text: [5])


@pytest.mark.parametrize("tokens", [[], [2], [9, 8]])
def test_a_prefix_that_is_not_one_token_is_refused(tokens):
    with pytest.raises(DataError, match="needs <s> as one token"):
        prefix_ids(MARKED, lambda _: tokens, unknown_id=2)


def test_an_answer_is_what_follows_the_prefix():
    texts = ["<extra_id_0> Yes", " <extra_id_0>Yes", "Yes", "<extra_id_0> Yes <extra_id_1> x"]
    assert {postprocessor(PAIR)(text, example={}, is_target=False) for text in texts} == {"Yes"}
    assert postprocessor(TaskSpec("story", "generation"))(" two words ") == "two words"


def test_a_target_with_many_answers_becomes_them_all():
    process = postprocessor(ASKED)
    for answers in (b"the man\x1fhe", np.bytes_(b"the man\x1fhe"), np.array(b"the man\x1fhe")):
        assert process("<extra_id_0> the man", {"answers": answers}, True) == ["the man", "he"]
    assert process("<extra_id_0> a man", {"answers": b"x"}, False) == "a man"


def test_metrics_are_those_of_the_kind():
    (score,) = metric_functions(PAIR)
    scores = score(targets=["Yes", "No", "No", "Yes"], predictions=["Yes", "Yes", "No", "maybe"])
    assert scores == {"accuracy": 50.0, "binary_f1": 50.0}  # one of two Yes, two predicted
    (score,) = metric_functions(TaskSpec("three", "classification", ("a", "b", "c")))
    assert score(["a", "b"], ["a", "a"]) == {"accuracy": 50.0}
    (score,) = metric_functions(ASKED)
    scores = score(targets=[["the man", "he"], ["one two"]], predictions=["He!", "two"])
    assert scores == {"exact_match": 50.0, "token_f1": pytest.approx((100 + 200 / 3) / 2)}
    assert metric_functions(TaskSpec("spans", "span_corruption")) == []


def _evaluated(task, answer=None):
    """Scores by seqio's own evaluator of a model with one answer, by default the target."""
    converter = seqio.EncDecFeatureConverter(pack=False)
    evaluator = seqio.Evaluator(task, converter, eval_split="validation")
    vocabulary = seqio.TaskRegistry.get(task).output_features["targets"].vocabulary
    tokens = vocabulary.encode(answer) if answer else None

    def predict(dataset):
        examples = dataset.as_numpy_iterator()
        return [(int(i), tokens or e["decoder_target_tokens"].tolist()) for i, e in examples]

    metrics, _ = evaluator.evaluate(compute_metrics=True, predict_fn=predict)
    return metrics.result()[task]


def test_seqios_evaluator_scores_glue_and_squad(tmp_path, verbalizer_model):
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\ngood\t1\nbad\t0\ndull\t0\nfine\t1\n")
    task = glue.glue_task("sst2", verbalizer_model, str(tmp_path))
    assert _evaluated(task) == {"accuracy": 100.0, "binary_f1": 100.0}
    scores = _evaluated(task, "<extra_id_0> positive")
    assert scores == {"accuracy": 50.0, "binary_f1": pytest.approx(200 / 3)}
    assert _evaluated(task, "Question")["accuracy"] == 0.0
    rows = [{"question": "Who?", "context": "c", "answers": [f"number {n}", "Yes"]} for n in "ab"]
    (tmp_path / "dev.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = squad.squad_task(verbalizer_model, str(tmp_path))
    for answer in (None, "<extra_id_0> Yes <extra_id_1> No"):
        assert _evaluated(task, answer) == {"exact_match": 100.0, "token_f1": 100.0}


def test_documentation_and_file_tasks_have_metrics_and_span_corruption_has_none(tmp_path):
    rows = [{"text": f"text {n}", "label": n % 2, "goal": f"goal {n}"} for n in range(40)]
    path = tmp_path / "scored.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    scored = {
        file_task(str(path), "{text}", labels=("no", "yes")): "accuracy",
        file_task(str(path), "{text}", target="goal"): "exact_match",
        "docs_topic": "accuracy",
        "docs_pair": "binary_f1",
        "docs_name": "token_f1",
    }
    for task, metric in scored.items():
        assert _evaluated(task)[metric] == 100.0
    for task in (span_corruption_task_from_text(str(path)), "docs_span_corruption"):
        assert not seqio.TaskRegistry.get(task).metric_objs
