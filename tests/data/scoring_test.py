import json

import numpy as np
import pytest

from variator_jax.data import docs_tasks, glue, squad  # noqa: F401  (registers the first)
from variator_jax.data._tf import seqio
from variator_jax.data.file_task import file_task, span_corruption_task_from_text
from variator_jax.data.scoring import metric_functions, postprocessor
from variator_jax.data.spec import TaskSpec

PAIR = TaskSpec("scoring_pair", "classification", ("No", "Yes"), "<extra_id_0>")
STORY = TaskSpec("scoring_story", "generation")
ASKED = TaskSpec("scoring_asked", "generation", prefix="<extra_id_0>", many_answers=True)


def test_an_answer_is_what_stands_behind_the_prefix():
    found = [
        postprocessor(PAIR)(text, example={}, is_target=False)
        for text in (
            "<extra_id_0> Yes",
            " <extra_id_0>Yes",
            "Yes",
            "<extra_id_0> No <extra_id_1> x",
        )
    ]
    assert found == ["Yes", "Yes", "Yes", "No"]
    assert postprocessor(STORY)(" two words ") == "two words"


def test_a_target_with_many_answers_becomes_them_all():
    process = postprocessor(ASKED)
    for answers in (b"the man\x1fhe", np.bytes_(b"the man\x1fhe"), np.array(b"the man\x1fhe")):
        assert process("<extra_id_0> the man", {"answers": answers}, True) == ["the man", "he"]
    assert process("<extra_id_0> a man", {"answers": b"x"}, False) == "a man"


def test_classification_has_accuracy_and_with_two_labels_the_f1_of_the_second():
    (score,) = metric_functions(PAIR)
    scores = score(targets=["Yes", "No", "No", "Yes"], predictions=["Yes", "Yes", "No", "maybe"])
    # F1: one of two Yes found, two said.
    assert scores == {"accuracy": 50.0, "binary_f1": 50.0}
    (score,) = metric_functions(TaskSpec("three", "classification", ("a", "b", "c")))
    assert score(["a", "b"], ["a", "a"]) == {"accuracy": 50.0}


def test_generation_takes_the_best_of_all_answers():
    (score,) = metric_functions(ASKED)
    scores = score(targets=[["the man", "he"], ["one two"]], predictions=["He!", "two"])
    assert scores["exact_match"] == 50.0
    assert scores["token_f1"] == pytest.approx((100 + 200 / 3) / 2)
    assert metric_functions(TaskSpec("spans", "span_corruption")) == []


def _evaluated(task, answer):
    """What seqio's own evaluator says of a model that gives each example `answer(tokens)`."""
    evaluator = seqio.Evaluator(
        task, seqio.EncDecFeatureConverter(pack=False), eval_split="validation"
    )

    def predict(dataset):
        return [
            (int(i), [int(t) for t in answer(e["decoder_target_tokens"])])
            for i, e in dataset.as_numpy_iterator()
        ]

    metrics, _ = evaluator.evaluate(compute_metrics=True, predict_fn=predict)
    return metrics.result()[task]


def _rows(folder):
    (folder / "dev.tsv").write_text("sentence\tlabel\ngood\t1\nbad\t0\ndull\t0\nfine\t1\n")
    return str(folder)


def test_seqios_evaluator_scores_glue(tmp_path, verbalizer_model):
    task = glue.glue_task("sst2", verbalizer_model, _rows(tmp_path))
    assert _evaluated(task, lambda target: target) == {"accuracy": 100.0, "binary_f1": 100.0}
    vocabulary = seqio.TaskRegistry.get(task).output_features["targets"].vocabulary
    positive = vocabulary.encode("<extra_id_0> positive")
    scores = _evaluated(task, lambda _: [*positive, 1, 0, 0])
    assert scores == {"accuracy": 50.0, "binary_f1": pytest.approx(200 / 3)}
    assert _evaluated(task, lambda _: [7, 1])["accuracy"] == 0.0


def test_seqios_evaluator_scores_squad(tmp_path, verbalizer_model):
    rows = [{"question": "Who?", "context": "c", "answers": [f"number {n}", "Yes"]} for n in "ab"]
    (tmp_path / "dev.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = squad.squad_task(verbalizer_model, str(tmp_path))
    assert _evaluated(task, lambda target: target) == {"exact_match": 100.0, "token_f1": 100.0}
    vocabulary = seqio.TaskRegistry.get(task).output_features["targets"].vocabulary
    second = vocabulary.encode("<extra_id_0> Yes <extra_id_1> No")
    assert _evaluated(task, lambda _: second) == {"exact_match": 100.0, "token_f1": 100.0}


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
        assert _evaluated(task, lambda target: target)[metric] == 100.0
    spans = span_corruption_task_from_text(str(path), "text")
    for task in (spans, "docs_span_corruption"):
        assert not seqio.TaskRegistry.get(task).metric_objs
