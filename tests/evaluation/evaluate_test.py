"""Whole evaluations of tiny backbones. tests/train/train_test.py evaluates a trained plugin."""

import json

import pytest
from tiny import random_params

from variator_jax.backbones.t5 import T5Config
from variator_jax.data import published
from variator_jax.data import vocabulary as vocabularies
from variator_jax.errors import ConfigError
from variator_jax.evaluation import evaluator
from variator_jax.evaluation.data import EvalData
from variator_jax.evaluation.evaluate import evaluate
from variator_jax.evaluation.evaluator import evaluate_generation
from variator_jax.evaluation.report import read_report
from variator_jax.store import save_backbone


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "spiece.model"
    lines = [f"the film number {n} is {'good' if n % 2 else 'bad'}" for n in range(200)]
    labels = ("negative", "positive", "Yes", "No")
    path.write_bytes(vocabularies.train_sentencepiece(lines, 120, labels))
    return str(path)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory, vocabulary):
    size = vocabularies.load_vocabulary(vocabulary).vocab_size
    config = T5Config("tiny", size, 8, 2, 4, 16, 1, 1)
    folder = tmp_path_factory.mktemp("backbone") / "backbone"
    save_backbone(folder, config, random_params(config), vocabulary)
    return str(folder)


def _evaluated(task, backbone, folder, targets):
    data = EvalData(task, {"inputs": 48, "targets": targets}, batch_size=4)
    timed = [("nano", 1, 8, 2)]
    evaluate(
        model_dir=str(folder), data=data, initial_checkpoint_path=backbone, latency_shapes=timed
    )
    report = read_report(folder / "report.json")
    assert "## Further scores" in (folder / "report.md").read_text()
    [row] = report.at(1).latency
    assert (row.shape, row.speedup) == ("nano, batch 1, length 8", 1.0) and row.milliseconds > 0
    return report, report.at(1).details[task]


def test_a_task_with_a_prefix_is_scored_at_the_verbalizer(tmp_path, vocabulary, backbone):
    rows = [f"film {number}\t{int(number < 4)}" for number in range(6)]
    (tmp_path / "dev.tsv").write_text("\n".join(["sentence\tlabel", *rows]))
    task = published.glue_task("sst2", vocabulary, str(tmp_path))
    report, details = _evaluated(task, backbone, tmp_path / "report", targets=4)
    assert report.majority[task] == pytest.approx(200 / 3)
    assert set(details) == {"accuracy", "binary_f1"}
    assert details["accuracy"] == report.at(1).quality[task]


def test_squad_is_scored_against_all_its_answers(tmp_path, vocabulary, backbone, monkeypatch):
    given = []

    def noted(*args):
        given.append(args[-1])
        return evaluate_generation(*args)

    monkeypatch.setattr(evaluator, "evaluate_generation", noted)
    rows = [{"question": f"Who {n}?", "context": "c", "answers": ["number", "film"]} for n in "ab"]
    (tmp_path / "dev.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = published.squad_task(vocabulary, str(tmp_path))
    report, details = _evaluated(task, backbone, tmp_path / "report", targets=8)
    assert set(details) == {"exact_match", "token_f1"} and task not in report.majority
    assert report.at(1).quality[task] == details["token_f1"]
    assert given == [[["number", "film"]] * 2] * 2  # the backbone's, and the control's


@pytest.mark.parametrize(
    "shape, message", [("nano", "each is"), (("nano", 4), "each is"), (("nanoo", 4, 8), "'nano'")]
)
def test_a_latency_shape_that_cannot_be_timed_is_refused_first(shape, message):
    with pytest.raises(ConfigError, match=message):
        evaluate(
            model_dir="unused",
            data=EvalData("unused", {}),
            initial_checkpoint_path="unused",
            latency_shapes=[shape],
        )
