"""What `variator inspect` says of each kind of folder, and what it leaves unread."""

import json
import pathlib

import jax
import pytest
from golden_vectors import config
from tiny import random_params, random_plugin

from variator_jax import load_backbone, save_backbone, save_plugin, save_plugins
from variator_jax.errors import CheckpointError
from variator_jax.evaluation.report import write_report
from variator_jax.evaluation.schema import Backbone as BackboneEntry
from variator_jax.evaluation.schema import RatioEntry, Report
from variator_jax.plugin import PluginConfig
from variator_jax.store import Plugin, inspect

SHAPE = config("1_1", num_encoder_layers=2, num_decoder_layers=1)
PARAMS = random_params(SHAPE)
COUNT = sum(leaf.size for leaf in jax.tree.leaves(PARAMS))


def _plugin(ratio):
    settings = PluginConfig(ratio, bottleneck=4)
    variables = random_plugin(settings, SHAPE, seed=ratio)
    return Plugin(settings, variables, {"quality": {"topic": 81.25}, "training": {"steps": 30}})


@pytest.fixture
def backbone(tmp_path):
    (tmp_path / "spiece.model").write_bytes(b"a vocabulary")
    path = tmp_path / "run" / "backbone"
    save_backbone(path, SHAPE, PARAMS, str(tmp_path / "spiece.model"))
    return load_backbone(path)


def _save(path, ratio, backbone):
    plugin = _plugin(ratio)
    save_plugin(path, plugin.config, plugin.variables, backbone, **plugin.description)


def test_a_backbone_is_described_without_reading_its_weights(backbone, tmp_path, monkeypatch):
    folder = tmp_path / "run" / "backbone"
    file = folder / "backbone.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    text = inspect.describe(folder)
    for said in (f"{COUNT:,} in", "float32", "2 encoder and 1 decoder layers", "gelu * linear",
                 backbone.fingerprint, backbone.vocabulary_fingerprint, "not read"):  # fmt: skip
        assert said in text
    with pytest.raises(CheckpointError, match="changed or damaged"):
        inspect.describe(folder, verify=True)
    data[-3] ^= 1
    file.write_bytes(data)
    assert "read and whole" in inspect.describe(folder, verify=True)


def test_a_damaged_backbone_is_noticed_where_headers_show_it(backbone, tmp_path):
    folder = tmp_path / "run" / "backbone"
    file = folder / "backbone.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="backbone.safetensors cannot be read"):
        inspect.describe(folder)


def test_backbones_in_other_formats_are_described_from_their_headers(backbone, tmp_path):
    from variator_jax.store.hugging_face import save_hf
    from variator_jax.store.t5x import save_t5x

    save_hf(tmp_path / "hf", backbone)
    save_t5x(tmp_path / "t5x", backbone)
    for folder, name in (("hf", "Hugging Face backbone"), ("t5x", "T5X backbone")):
        text = inspect.describe(tmp_path / folder)
        assert text.startswith(name) and f"{COUNT:,} in" in text and "1 decoder layers" in text
        assert backbone.fingerprint not in text and "variator inspect --verify" in text
        text = inspect.describe(tmp_path / folder, verify=True)
        assert f"fits:        plugins of fingerprint {backbone.fingerprint}" in text


def test_a_plugin_is_described_with_what_it_fits(backbone, tmp_path):
    _save(tmp_path / "plugin", 4, backbone)
    text = inspect.describe(tmp_path / "plugin")
    for said in ("ratio:       4", "encoder/layers_1/mlp", "bottleneck=4",
                 f"backbone golden_1_1 with fingerprint {backbone.fingerprint}",
                 "topic 81.2", "steps 30", backbone.vocabulary_fingerprint):  # fmt: skip
        assert said in text


@pytest.mark.parametrize("index", [True, False])
def test_a_set_is_described_ratio_by_ratio(backbone, tmp_path, index):
    save_plugins(tmp_path / "set", {ratio: _plugin(ratio) for ratio in (2, 16)}, backbone)
    if not index:
        (tmp_path / "set" / "plugins.json").unlink()
    text = inspect.describe(tmp_path / "set")
    assert text.startswith("set of 2 compression plugins")
    assert "ratios:      2, 16" in text and "ratio 16:" in text and backbone.fingerprint in text


def _report(folder, fingerprint):
    entries = [
        RatioEntry(1, {"topic": 90.0}, True, 100, 0.0, 0, 0.0),
        RatioEntry(4, {"topic": 88.5}, False, 60, 0.4, 10, 0.01),
    ]
    owner = BackboneEntry("golden_1_1", COUNT, fingerprint)
    write_report(Report(owner, "a machine", {}, {}, entries, {}, 128), folder)


def test_a_run_folder_is_described_with_its_parts(backbone, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints" / "20").mkdir(parents=True)
    (run / "checkpoints" / "100").mkdir()
    _save(run / "plugin", 4, backbone)
    _report(run, backbone.fingerprint)
    text = inspect.describe(run)
    assert text.startswith(f"run folder {run}") and "20, 100" in text
    assert "backbone golden_1_1 in" in text and "compression plugin in" in text
    assert "topic 88.5; 40.0 % of the encoder's FLOPs saved" in text


def test_a_run_that_has_not_ended_says_so(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    assert "nothing written yet" in inspect.describe(tmp_path)


def test_a_folder_of_runs_and_a_report_is_listed(backbone, tmp_path):
    (tmp_path / "spiece.model").unlink()
    _save(tmp_path / "adapted_4" / "plugin", 4, backbone)
    _save(tmp_path / "plugin_4" / "plugin", 4, backbone)
    (tmp_path / "adapted_4" / "run.json").write_text("{}")
    (tmp_path / "plugin_4" / "plugin" / "plugin.safetensors").unlink()
    (tmp_path / "papers").mkdir()
    _report(tmp_path, backbone.fingerprint)
    text = inspect.describe(tmp_path)
    assert "report on backbone golden_1_1" in text
    assert "run: run folder: backbone golden_1_1" in text
    assert "adapted_4: run folder: compression plugin" in text
    assert "plugin_4: cannot be read: " in text and "plugin.safetensors cannot be read" in text
    assert "papers: something else" in text


def test_a_report_alone_is_described(tmp_path):
    _report(tmp_path, "f" * 64)
    assert "f" * 64 in inspect.describe(tmp_path)


def test_what_is_nothing_is_told_with_what_was_found(tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(CheckpointError, match="is not a backbone.*it holds a.txt"):
        inspect.describe(tmp_path)
    with pytest.raises(CheckpointError, match="is a file; a folder was expected"):
        inspect.describe(tmp_path / "a.txt")


def test_the_quickstarts_folder_is_seen_as_what_it_is(backbone, tmp_path):
    """Whatever else a run writes beside its parts, it stays a run folder."""
    run = pathlib.Path(tmp_path / "run")
    for name in ("log.jsonl", "calibration.json", "operative_config.gin"):
        (run / name).write_text("")
    (run / "run.json").write_text(json.dumps({"trained": "backbone"}))
    assert inspect.describe(run).startswith("run folder")
