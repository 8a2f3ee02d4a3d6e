"""An exported SavedModel, run by TensorFlow alone, gives what `infer` gives."""

import importlib.util

import numpy as np
import pytest
import t5x_runs

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorflow_serving") is None,
    reason="t5x.export needs the package tensorflow-serving-api",
)


@pytest.fixture(scope="module")
def exported(work, trained, tmp_path_factory):
    """The folder of one SavedModel for each mode."""
    folder = tmp_path_factory.mktemp("exported")
    options = ("export", "--gin_file=tiny.gin", f"--gin.CHECKPOINT_PATH={trained}")
    options += ("--gin.INITIAL_CHECKPOINT_PATH=None", "--gin.MODEL_DIR=unused")
    score = (*options, f"--gin.MODEL_OUTPUT_DIR={folder / 'score' / '1'}")
    t5x_runs.call(t5x_runs.command(*score), work)
    predict = (*options, f"--gin.MODEL_OUTPUT_DIR={folder / 'predict' / '1'}")
    t5x_runs.call_together([(*predict, "--gin.INFER_MODE=predict")], work)
    return folder


def answers(folder, texts):
    import tensorflow as tf

    model = tf.saved_model.load(str(folder))
    return model.signatures["serving_default"](tf.constant(texts))["output_0"].numpy()


def test_scores(exported, work, trained, plugin):
    from variator_jax import cli

    out = exported / "builtin"
    code = cli.main(
        [
            *("infer", "--engine=builtin", f"--gin_file={work / 'tiny.gin'}"),
            *("--gin_file=runs/infer.gin", "--gin.INFER_MODE=score"),
            *(f"--gin.CHECKPOINT_PATH={trained}", f"--gin.PLUGIN_PATH={plugin}"),
            f"--gin.INFER_OUTPUT_DIR={out}",
        ]
    )
    assert code == 0
    rows = t5x_runs.results(out, "score")
    texts = ["\t".join(row["inputs"].values()) for row in rows]
    scores = answers(exported / "score_cpu" / "1", texts)
    np.testing.assert_allclose(scores, [row["score"] for row in rows], rtol=1e-4)


def test_predictions(exported, predicted):
    rows = t5x_runs.results(predicted, "predict")
    texts = [row["inputs"]["inputs_pretokenized"] for row in rows]
    found = answers(exported / "predict_cpu" / "1", texts).reshape(-1).tolist()
    assert [text.decode() for text in found] == [row["prediction"] for row in rows]
