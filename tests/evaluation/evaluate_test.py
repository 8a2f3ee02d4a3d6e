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
def trained(tmp_path_factory):
    """The files of a vocabulary and of a backbone that has it."""
    folder = tmp_path_factory.mktemp("evaluate")
    path = folder / "spiece.model"
    lines = [f"the film number {n} is {'good' if n % 2 else 'bad'}" for n in range(200)]
    labels = ("negative", "positive", "Yes", "No")
    path.write_bytes(vocabularies.train_sentencepiece(lines, 120, labels))
    size = vocabularies.load_vocabulary(str(path)).vocab_size
    config = T5Config("tiny", size, 8, 2, 4, 16, 1, 1)
    save_backbone(folder / "backbone", config, random_params(config), str(path))
    return str(path), str(folder / "backbone")


def _evaluated(task, backbone, folder, targets):
    data = EvalData(task, {"inputs": 48, "targets": targets}, batch_size=4)
    places = {"model_dir": str(folder), "initial_checkpoint_path": backbone}
    evaluate(data=data, latency_shapes=[("nano", 1, 8, 2)], **places)
    report = read_report(folder / "report.json")
    assert "## Further scores" in (folder / "report.md").read_text()
    [row] = report.at(1).latency
    assert (row.shape, row.speedup) == ("nano, batch 1, length 8", 1.0) and row.milliseconds > 0
    return report, report.at(1).details[task]


def test_a_task_with_a_prefix_is_scored_at_the_verbalizer(tmp_path, trained):
    rows = [f"film {number}\t{int(number < 4)}" for number in range(6)]
    (tmp_path / "dev.tsv").write_text("\n".join(["sentence\tlabel", *rows]))
    task = published.glue_task("sst2", trained[0], str(tmp_path))
    report, details = _evaluated(task, trained[1], tmp_path / "report", targets=4)
    assert report.majority[task] == pytest.approx(200 / 3)
    assert set(details) == {"accuracy", "binary_f1"}
    assert details["accuracy"] == report.at(1).quality[task]


def test_squad_is_scored_against_all_its_answers(tmp_path, trained, monkeypatch):
    given = []

    def noted(*args):
        given.append(args[-1])
        return evaluate_generation(*args)

    monkeypatch.setattr(evaluator, "evaluate_generation", noted)
    rows = [{"question": f"Who {n}?", "context": "c", "answers": ["number", "film"]} for n in "ab"]
    (tmp_path / "dev.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = published.squad_task(trained[0], str(tmp_path))
    report, details = _evaluated(task, trained[1], tmp_path / "report", targets=8)
    assert set(details) == {"exact_match", "token_f1"} and task not in report.majority
    assert report.at(1).quality[task] == details["token_f1"]
    assert given == [[["number", "film"]] * 2] * 2  # the backbone's, and the control's


@pytest.mark.parametrize(
    "shape, message", [("nano", "each is"), (("nano", 4), "each is"), (("nanoo", 4, 8), "'nano'")]
)
def test_a_latency_shape_that_cannot_be_timed_is_refused_first(shape, message):
    places = {"model_dir": "unused", "initial_checkpoint_path": "unused"}
    with pytest.raises(ConfigError, match=message):
        evaluate(data=EvalData("unused", {}), latency_shapes=[shape], **places)
