"""T5X's `infer`, `eval` and `export` of a spliced model give what the built-in engine gives."""

import json

import numpy as np
import pytest
import t5x_runs

from variator_jax import cli
from variator_jax.data import spec

INFER = ("infer", "--gin_file=tiny.gin", "--gin_file=runs/infer.gin")


@pytest.fixture(scope="module")
def answered(work, trained, plugin, predicted):
    """A folder for each further run of infer, and one of eval, all in one process of T5X."""
    alone = f"--gin.CHECKPOINT_PATH={work / 'backbone' / 'checkpoint_1000'}"
    run = f"--gin.CHECKPOINT_PATH={trained / 'checkpoint_20'}"
    folder, score = f"--gin.PLUGIN_PATH={plugin}", "--gin.INFER_MODE=score"
    wanted = {
        "score_run": (run, score),
        "score_folder": (alone, folder, score),
        "predict_folder": (alone, folder, "--gin.INFER_MODE=predict"),
        "score_alone": (alone, score, "--gin.RATIO=1"),
    }
    commands = [
        (*INFER, *options, f"--gin.INFER_OUTPUT_DIR={work / name}")
        for name, options in wanted.items()
    ]
    # A generation task in which every second answer is the model's own.
    rows = []
    for i, row in enumerate(t5x_runs.results(predicted, "predict")):
        text = row["inputs"]["inputs_pretokenized"].removeprefix("Text: ")
        answer = row["prediction"] if i % 2 and row["prediction"].strip() else "another"
        rows.append(json.dumps({"text": text, "answer": answer}))
    (work / "answers.jsonl").write_text("\n".join(rows))
    task = {"TASK_FILE": "answers.jsonl", "TASK_VALIDATION_FILE": "answers.jsonl"}
    task |= {"TASK_TARGET": "answer", "TASK_LABELS": "None", "EVAL_OUTPUT_DIR": work / "eval"}
    task |= {"CHECKPOINT_PATH": trained, "INITIAL_CHECKPOINT_PATH": None, "MODEL_DIR": "unused"}
    options = [f"--gin.{name}={value}" for name, value in task.items()]
    t5x_runs.call_together([*commands, ("eval", "--gin_file=tiny.gin", *options)], work)
    return work


@pytest.fixture
def by_builtin(work, tmp_path, monkeypatch, capsys):
    """Runs the built-in engine's infer, here, and gives its rows."""

    def infer(mode, checkpoint, plugin=None):
        monkeypatch.chdir(work)
        options = [f"--gin.CHECKPOINT_PATH={checkpoint}", f"--gin.INFER_MODE={mode}"]
        options += [f"--gin.PLUGIN_PATH={plugin}"] if plugin else ["--gin.RATIO=1"]
        arguments = [*INFER, "--engine=builtin", *options, f"--gin.INFER_OUTPUT_DIR={tmp_path}"]
        assert cli.main(arguments) == 0, capsys.readouterr().err
        return t5x_runs.results(tmp_path, mode)

    return infer


def same_scores(rows, expected):
    assert [row["inputs"] for row in rows] == [row["inputs"] for row in expected]
    scores = [row["score"] for row in expected]
    assert [row["score"] for row in rows] == pytest.approx(scores, rel=1e-4)


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
    written = json.loads(metric_file.read_text())
    predictions = [row["prediction"] for row in rows]
    targets = [row["target"] for row in rows]
    assert predictions == [row["prediction"] for row in t5x_runs.results(predicted, "predict")]
    assert written["step"] == 20 and 0 < written["exact_match"] < 100
    assert written["exact_match"] == pytest.approx(spec.exact_match(predictions, targets))
    assert written["token_f1"] == pytest.approx(spec.token_f1(predictions, targets))


def test_training_decodes_at_a_length_that_the_ratio_does_not_divide(trained, predicted):
    [file] = (trained / "inference_eval").glob("*-000020.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    expected = [row["prediction"] for row in t5x_runs.results(predicted, "predict")]
    assert [row["prediction"] for row in rows] == expected


def test_an_exported_model_gives_in_tensorflow_what_infer_gives(
    work, trained, plugin, predicted, answered, tmp_path
):
    pytest.importorskip("tensorflow_serving", reason="t5x.export needs tensorflow-serving-api")
    import tensorflow as tf

    options = ("export", "--gin_file=tiny.gin", f"--gin.CHECKPOINT_PATH={trained}")
    options += ("--gin.INITIAL_CHECKPOINT_PATH=None", "--gin.MODEL_DIR=unused")
    for mode in ("score", "predict"):
        paths = (f"--gin.MODEL_OUTPUT_DIR={tmp_path / mode / '1'}", f"--gin.INFER_MODE={mode}")
        t5x_runs.call(t5x_runs.command(*options, *paths), work)

    def answers(mode, texts):
        model = tf.saved_model.load(str(tmp_path / f"{mode}_cpu" / "1"))
        return model.signatures["serving_default"](tf.constant(texts))["output_0"].numpy()

    rows = t5x_runs.results(answered / "score_run", "score")
    names = ("inputs_pretokenized", "targets_pretokenized")  # T5X writes them in either order
    scores = answers("score", ["\t".join(row["inputs"][name] for name in names) for row in rows])
    np.testing.assert_allclose(scores, [row["score"] for row in rows], rtol=1e-4)
    rows = t5x_runs.results(predicted, "predict")
    texts = answers("predict", [row["inputs"]["inputs_pretokenized"] for row in rows]).reshape(-1)
    assert [text.decode() for text in texts.tolist()] == [row["prediction"] for row in rows]
