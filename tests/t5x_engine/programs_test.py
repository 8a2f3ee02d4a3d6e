"""T5X's `infer` and `eval` of a spliced model say what the built-in engine says."""

import json

import pytest
import t5x_runs

from variator_jax import cli
from variator_jax.data import metrics

INFER = ("infer", "--gin_file=tiny.gin", "--gin_file=runs/infer.gin")


@pytest.fixture(scope="module")
def answered(work, trained, plugin, predicted):
    """A folder for each further run of infer, and one of eval, all in one process of T5X."""
    alone = f"--gin.CHECKPOINT_PATH={work / 'backbone' / 'checkpoint_1000'}"
    beside = (alone, f"--gin.PLUGIN_PATH={plugin}")
    run = f"--gin.CHECKPOINT_PATH={trained / 'checkpoint_20'}"
    wanted = {
        "score_run": (run, "--gin.INFER_MODE=score"),
        "score_folder": (*beside, "--gin.INFER_MODE=score"),
        "predict_folder": (*beside, "--gin.INFER_MODE=predict"),
        "score_alone": (alone, "--gin.INFER_MODE=score", "--gin.RATIO=1"),
    }
    commands = [
        (*INFER, *options, f"--gin.INFER_OUTPUT_DIR={work / name}")
        for name, options in wanted.items()
    ]
    # A generation task whose every second answer is what the model says.
    rows = t5x_runs.results(predicted, "predict")
    with open(work / "answers.jsonl", "w") as file:
        for i, row in enumerate(rows):
            text = row["inputs"]["inputs_pretokenized"].removeprefix("Text: ")
            answer = row["prediction"] if i % 2 and row["prediction"].strip() else "another"
            file.write(json.dumps({"text": text, "answer": answer}) + "\n")
    task = {"TASK_FILE": "answers.jsonl", "TASK_VALIDATION_FILE": "answers.jsonl"}
    task |= {"TASK_TARGET": "answer", "TASK_LABELS": "None", "EVAL_OUTPUT_DIR": work / "eval"}
    commands.append(
        (
            *("eval", "--gin_file=tiny.gin", f"--gin.CHECKPOINT_PATH={trained}"),
            *("--gin.INITIAL_CHECKPOINT_PATH=None", "--gin.MODEL_DIR=unused"),
            *(f"--gin.{name}={value}" for name, value in task.items()),
        )
    )
    t5x_runs.call_together(commands, work)
    return work


@pytest.fixture
def by_builtin(work, tmp_path, monkeypatch, capsys):
    """Runs the built-in engine's infer, here, and gives its rows."""

    def infer(mode, checkpoint, plugin=None):
        monkeypatch.chdir(work)
        folder = tmp_path / mode
        options = [f"--gin.CHECKPOINT_PATH={checkpoint}", f"--gin.INFER_MODE={mode}"]
        options += [f"--gin.PLUGIN_PATH={plugin}"] if plugin else ["--gin.RATIO=1"]
        arguments = [*INFER, "--engine=builtin", *options, f"--gin.INFER_OUTPUT_DIR={folder}"]
        assert cli.main(arguments) == 0, capsys.readouterr().err
        return t5x_runs.results(folder, mode)

    return infer


def same_scores(found, expected):
    assert [row["inputs"] for row in found] == [row["inputs"] for row in expected]
    wanted = [row["score"] for row in expected]
    assert [row["score"] for row in found] == pytest.approx(wanted, rel=1e-4)


def test_predictions_of_a_run_and_of_a_plugin_folder(work, plugin, predicted, answered, by_builtin):
    expected = by_builtin("predict", work / "backbone" / "checkpoint_1000", plugin)
    assert t5x_runs.results(predicted, "predict") == expected
    assert t5x_runs.results(answered / "predict_folder", "predict") == expected
    assert len({row["prediction"] for row in expected}) > 2


def test_scores_of_a_run_and_of_a_plugin_folder(plugin, trained, answered, by_builtin):
    expected = by_builtin("score", trained / "checkpoint_20", plugin)
    for name in ("score_run", "score_folder"):
        same_scores(t5x_runs.results(answered / name, "score"), expected)


def test_ratio_1_is_the_backbone(work, answered, by_builtin):
    alone = t5x_runs.results(answered / "score_alone", "score")
    same_scores(alone, by_builtin("score", work / "backbone" / "checkpoint_1000"))
    compressed = t5x_runs.results(answered / "score_run", "score")
    pairs = zip(alone, compressed, strict=True)
    assert all(abs(one["score"] - other["score"]) > 1e-3 for one, other in pairs)


def test_eval_writes_the_metrics_of_its_predictions(answered, predicted):
    folder = answered / "eval" / "inference_eval"
    [metric_file] = folder.glob("*-metrics.jsonl")
    [answer_file] = set(folder.glob("*.jsonl")) - {metric_file}
    rows = [json.loads(line) for line in answer_file.read_text().splitlines()]
    found = json.loads(metric_file.read_text())
    predictions = [row["prediction"] for row in rows]
    targets = [row["target"] for row in rows]
    assert predictions == [row["prediction"] for row in t5x_runs.results(predicted, "predict")]
    assert found["step"] == 20
    assert found["exact_match"] == pytest.approx(metrics.exact_match(predictions, targets))
    assert found["token_f1"] == pytest.approx(metrics.token_f1(predictions, targets))
    assert 0 < found["exact_match"] < 100


def test_training_decodes_at_a_length_that_the_ratio_does_not_divide(trained, predicted):
    [file] = (trained / "inference_eval").glob("*-000020.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    expected = [row["prediction"] for row in t5x_runs.results(predicted, "predict")]
    assert [row["prediction"] for row in rows] == expected
