"""What `variator inspect` prints of each kind of folder, and what it leaves unread."""

import shutil

import jax
import pytest
from golden_vectors import config
from hf_files import save_hf
from t5x_files import save_t5x
from tiny import random_params, random_plugin

from variator_jax import LoraConfig, save_backbone, save_lora, save_plugin, save_plugins
from variator_jax.backbones.lora import init_lora
from variator_jax.commands.describe import describe
from variator_jax.errors import CheckpointError
from variator_jax.evaluation import schema
from variator_jax.evaluation.report import write_report
from variator_jax.plugin import PluginConfig
from variator_jax.store import Plugin, load_backbone, load_lora

SHAPE = config("1_1", num_encoder_layers=2, num_decoder_layers=1)
PARAMS = random_params(SHAPE)
COUNT = sum(leaf.size for leaf in jax.tree.leaves(PARAMS))


def _plugin(ratio):
    settings = PluginConfig(ratio, bottleneck=4)
    variables = random_plugin(settings, SHAPE, seed=ratio)
    return Plugin(settings, variables, {"quality": {"topic": 81.25}, "training": {"steps": 30}})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with a backbone and a plugin."""
    folder = tmp_path_factory.mktemp("any") / "run"
    folder.mkdir()
    (folder / "log.jsonl").write_text("")
    (folder / "run.json").write_text('{"trained": "backbone"}')
    for step in ("20", "100"):
        (folder / "checkpoints" / step).mkdir(parents=True)
    (folder / "a.model").write_bytes(b"a vocabulary")
    save_backbone(folder / "backbone", SHAPE, PARAMS, str(folder / "a.model"))
    plugin = _plugin(4)
    owner = load_backbone(folder / "backbone")
    save_plugin(folder / "plugin", plugin.config, plugin.variables, owner, **plugin.description)
    _report(folder, owner.fingerprint)
    return folder


@pytest.fixture(scope="module")
def backbone(run):
    return load_backbone(run)


def _report(folder, fingerprint):
    entries = [
        schema.RatioEntry(1, {"topic": 90.0}, True, 100, 0.0, 0, 0.0),
        schema.RatioEntry(4, {"topic": 88.5}, False, 60, 0.4, 10, 0.01),
        schema.RatioEntry(4, {"topic": 88.0}, False, 40, 0.6, 10, 0.01, plugin="span_x4"),
    ]
    owner = schema.Backbone("golden_1_1", COUNT, fingerprint)
    write_report(schema.Report(owner, "a machine", {}, {}, entries, {}, 128), folder)


def holds(text, *facts):
    for fact in facts:
        assert fact in text, f"{fact!r} is not in\n{text}"


def test_a_backbone_is_described_without_reading_its_weights(run, backbone, tmp_path):
    folder = tmp_path / "backbone"
    shutil.copytree(run / "backbone", folder)
    assert "read and whole" in describe(folder, verify=True)
    file = folder / "backbone.safetensors"
    file.write_bytes(file.read_bytes()[:-3] + b"abc")
    holds(describe(folder), f"{COUNT:,} in", "float32", "2 encoder and 1 decoder layers")
    holds(describe(folder), "gelu * linear", backbone.fingerprint, "not read")
    holds(describe(folder), backbone.vocabulary_fingerprint)
    with pytest.raises(CheckpointError, match="changed or damaged"):
        describe(folder, verify=True)


@pytest.mark.parametrize(("save", "name"), [(save_hf, "Hugging Face"), (save_t5x, "T5X")])
def test_backbones_in_other_formats_are_described_by_headers(backbone, tmp_path, save, name):
    save(tmp_path / "it", backbone)
    text = describe(tmp_path / "it")
    holds(text, f"{name} backbone", f"{COUNT:,} in", "1 decoder layers")
    assert "variator inspect --verify" in text and backbone.fingerprint not in text
    holds(describe(tmp_path / "it", verify=True), f"plugins of fingerprint {backbone.fingerprint}")


def test_a_run_is_described_with_its_parts(run, backbone):
    text = describe(run)
    assert text.startswith(f"run folder {run}")
    holds(text, "20, 100", "backbone golden_1_1 in", "compression plugin in", "ratio:       4")
    holds(text, "encoder/layers_1/mlp", "bottleneck=4", "topic 81.2", "steps 30")
    holds(text, f"backbone golden_1_1 with fingerprint {backbone.fingerprint}")
    holds(text, backbone.vocabulary_fingerprint, "topic 88.5; 40.0% of the encoder's FLOPs saved")


def test_a_set_is_described_ratio_by_ratio(backbone, tmp_path):
    save_plugins(tmp_path / "set", {ratio: _plugin(ratio) for ratio in (2, 16)}, backbone)
    text = describe(tmp_path / "set")
    assert text.startswith("set of 2 compression plugins")
    holds(text, "ratio 2:", "ratio 16:", backbone.fingerprint)
    (tmp_path / "set" / "plugins.json").unlink()
    holds(describe(tmp_path / "set"), "ratio_2: compression plugin", "ratio_16: compression plugin")


def test_a_lora_is_described(backbone, tmp_path):
    settings = LoraConfig(rank=3, alpha=4.5)
    params = init_lora(settings, backbone.params, jax.random.key(0))
    save_lora(tmp_path / "lora", settings, params, backbone, {"task": "a_task"})
    count = sum(x.size for x in jax.tree.leaves(params))
    text = describe(tmp_path / "lora")
    holds(text, "LoRA in", "rank:        3, alpha 4.5", f"{count:,} for 6 weights", "task a_task")
    holds(text, backbone.fingerprint, load_lora(tmp_path / "lora").fingerprint)


def test_a_folder_of_runs_and_a_report_is_listed(run, backbone, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "young").mkdir()
    (tmp_path / "young" / "run.json").write_text("{}")
    shutil.copytree(run / "plugin", tmp_path / "bad" / "plugin")
    (tmp_path / "bad" / "plugin" / "plugin.safetensors").unlink()
    (tmp_path / "papers").mkdir()
    _report(tmp_path, backbone.fingerprint)
    text = describe(tmp_path)
    holds(text, "ratio 4", "40.0% of the", "span_x4", "60.0% of the encoder's FLOPs saved")
    holds(text, "report on backbone golden_1_1", "run: run folder", "compression plugin in")
    holds(text, "young: run folder", "plugin.safetensors cannot", "papers: ", "it is empty")


def test_what_is_nothing_is_refused_with_what_was_found(tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(CheckpointError, match="is not a backbone.*it holds a.txt"):
        describe(tmp_path)
