"""Whole evaluations of tiny backbones. tests/train/train_test.py evaluates a trained plugin."""

import json

import pytest
from tiny import random_params, random_plugin

from variator_jax.backbones.t5 import T5Config, get_config
from variator_jax.data import published
from variator_jax.data import vocabulary as vocabularies
from variator_jax.data.file_task import file_task
from variator_jax.errors import ConfigError, DataError
from variator_jax.evaluation import evaluator
from variator_jax.evaluation.data import EvalData
from variator_jax.evaluation.evaluate import _latency_shape, _timed, evaluate
from variator_jax.evaluation.evaluator import evaluate_generation
from variator_jax.evaluation.report import read_report
from variator_jax.plugin import PluginConfig
from variator_jax.store import load_backbone, save_backbone, save_plugin


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


@pytest.fixture
def references(monkeypatch):
    """The references of each task that is scored as generation, one after the other."""
    given = []

    def noted(*args):
        given.append(args[-1])
        return evaluate_generation(*args)

    monkeypatch.setattr(evaluator, "evaluate_generation", noted)
    return given


def _evaluated(task, backbone, folder, targets, plugins=()):
    data = EvalData(task, {"inputs": 64, "targets": targets}, batch_size=4)
    paths = {"initial_checkpoint_path": backbone, "plugin_paths": plugins}
    evaluate(model_dir=str(folder), data=data, latency_shapes=[("nano", 1, 8, 2)], **paths)
    report = read_report(folder / "report.json")
    assert "## Further scores" in (folder / "report.md").read_text()
    [row] = report.at(1).latency
    assert (row.shape, row.speedup) == ("nano, batch 1, length 8", 1.0) and row.milliseconds > 0
    return report, report.at(1).details[task]


def test_shapes_without_the_layers_that_a_plugin_names_are_not_timed():
    shapes = [_latency_shape((name, 1, 8)) for name in ("nano", "micro")]
    config = get_config("nano")
    named, all_of_them = PluginConfig(sites=("ffn 0 x4", "span 1-2 x4")), PluginConfig(4)
    assert _timed(shapes, config, [all_of_them]) == (shapes, [])
    kept, notes = _timed(shapes, config, [all_of_them, named])
    assert kept == shapes[:1] and "micro is not timed: ffn_span_x4 names layers" in notes[0]


def test_a_task_with_a_prefix_is_scored_at_the_verbalizer(tmp_path, trained):
    rows = [f"{number} film\t{int(number < 4)}" for number in range(6)]
    (tmp_path / "dev.tsv").write_text("\n".join(["sentence\tlabel", *rows]))
    task = published.glue_task("sst2", trained[0], str(tmp_path))
    backbone, plugin = load_backbone(trained[1]), tmp_path / "plugin"
    settings = PluginConfig(4, bottleneck=2)
    save_plugin(plugin, settings, random_plugin(settings, backbone.config), backbone)
    report, details = _evaluated(task, trained[1], tmp_path / "report", 4, [str(plugin)])
    assert report.majority[task] == pytest.approx(200 / 3)
    assert set(details) == {"accuracy", "binary_f1"}
    assert details["accuracy"] == report.at(1).quality[task]
    kept = report.at(4).details[task]
    assert -100 <= kept["similarity_spearman"] <= 100.01 and 0 <= kept["top10_overlap"] <= 100
    assert "similarity_spearman" in (tmp_path / "report" / "report.md").read_text()


def test_squad_is_scored_against_all_its_answers(tmp_path, trained, references):
    rows = [{"question": f"Who {n}?", "context": "c", "answers": ["number", "film"]} for n in "ab"]
    (tmp_path / "dev.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = published.squad_task(trained[0], str(tmp_path))
    report, details = _evaluated(task, trained[1], tmp_path / "report", targets=8)
    assert set(details) == {"exact_match", "token_f1"} and task not in report.majority
    assert report.at(1).quality[task] == details["token_f1"]
    assert references == [[["number", "film"]] * 2] * 2  # the backbone's, and the control's


@pytest.mark.parametrize(
    "shape, message",
    [
        *(("nano", "each is"), (("nano", 4), "each is"), (("nanoo", 4, 8), "'nano'")),
        *((("nano", 4, 0), "4, 0.* is 0"), (("nano", 4, 8, 0), "8, 0.* is 0")),
    ],
)
def test_a_latency_shape_that_cannot_be_timed_is_refused_first(shape, message, tmp_path):
    places = {"model_dir": str(tmp_path), "initial_checkpoint_path": "unused"}
    with pytest.raises(ConfigError, match=message):
        evaluate(data=EvalData("unused", {}), latency_shapes=[shape], **places)
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", "gs://bucket/report"):
        with pytest.raises(ConfigError, match=f"^MODEL_DIR .*{folder}"):
            evaluate(data=None, model_dir=folder, initial_checkpoint_path="unused")


def test_generation_is_scored_against_whole_references_and_cuts_are_noted(
    tmp_path, trained, references
):
    targets = [f"{'film ' * 40}{n}" for n in range(2)]
    rows = [{"text": f"Who {n}?", "target": target} for n, target in enumerate(targets)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    path = str(tmp_path / "rows.jsonl")
    task = file_task(path, "{text}", target="target", validation_path=path, vocabulary=trained[0])
    report, details = _evaluated(task, trained[1], tmp_path / "report", targets=8)
    assert references[0] == [[target] for target in targets] and details["exact_match"] == 0.0
    assert "2 targets (100.0%) to 8 tokens." in report.notes[0]
    assert report.notes[0] in (tmp_path / "report" / "report.md").read_text()


def test_a_label_that_has_no_room_is_refused_before_anything_is_loaded(tmp_path, trained):
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\na\t0\nb\t1\n")
    task = published.glue_task("sst2", trained[0], str(tmp_path))
    with pytest.raises(DataError, match="TASK_FEATURE_LENGTHS.*the prefix <extra_id_0>, one token"):
        _evaluated(task, "no backbone", tmp_path / "report", targets=2)
