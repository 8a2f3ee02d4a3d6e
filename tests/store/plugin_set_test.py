"""Sets of plugins of one backbone, mixtures refused; and a plugin folder that release 0.1 wrote."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import small_t5
from tiny_model import BACKBONE, make_plugin

from variator_jax import VariatorModel, load_plugins, save_plugin, save_plugins
from variator_jax.errors import CheckpointError, PluginError

FORMAT_1 = Path(__file__).parent / "format_1"
STRANGER = dataclasses.replace(BACKBONE, fingerprint="f" * 64)
PLUGINS = {
    ratio: dataclasses.replace(make_plugin(ratio), description={"training": {"steps": ratio}})
    for ratio in (2, 4, 16)
}


def _save(path, ratio, backbone=BACKBONE):
    save_plugin(path, PLUGINS[ratio].config, PLUGINS[ratio].variables, backbone)


def _assert_equal(found, ratios=(2, 4, 16)):
    assert tuple(found) == ratios
    for ratio in ratios:
        assert found[ratio].config == PLUGINS[ratio].config
        small_t5.assert_same(found[ratio].variables.params, PLUGINS[ratio].variables.params)


def test_a_set_is_the_same_after_reloading_and_says_what_its_plugins_said(tmp_path):
    save_plugins(tmp_path / "set", PLUGINS, BACKBONE)
    held = sorted(p.name for p in (tmp_path / "set").iterdir())
    assert held == ["plugins.json", "ratio_16", "ratio_2", "ratio_4"]
    found = load_plugins(tmp_path / "set", BACKBONE)
    _assert_equal(found)
    assert found[16].description["training"] == {"steps": 16}


def test_a_folder_of_plugins_or_of_runs_is_a_set_without_an_index(tmp_path):
    _save(tmp_path / "some" / "four", 4)
    _save(tmp_path / "some" / "run_of_two" / "plugin", 2)
    _save(tmp_path / "some" / "plugin", 16)  # as the only one of a run is called
    (tmp_path / "some" / "logs").mkdir()
    (tmp_path / "some" / "notes.txt").write_text("mine")
    _save(tmp_path / "some" / ".four.draft-x", 4)  # what a killed writer left
    _assert_equal(load_plugins(tmp_path / "some", BACKBONE))


def test_a_plugin_and_a_run_folder_are_sets_of_one(tmp_path):
    _save(tmp_path / "run" / "plugin", 4)
    _assert_equal(load_plugins(tmp_path / "run"), (4,))
    _assert_equal(load_plugins(str(tmp_path / "run" / "plugin")), (4,))
    (tmp_path / "young").mkdir()
    for words in ("it is empty", "holds no plugin"):
        with pytest.raises(CheckpointError, match=words):
            load_plugins(tmp_path / "young")
        (tmp_path / "young" / "run.json").write_text("{}")


def test_plugins_of_two_backbones_are_refused_with_both_fingerprints(tmp_path):
    _save(tmp_path / "set" / "two", 2)
    _save(tmp_path / "set" / "four", 4, STRANGER)
    with pytest.raises(CheckpointError, match="mixes backbones") as error:
        load_plugins(tmp_path / "set")
    assert "f" * 64 in str(error.value) and BACKBONE.fingerprint in str(error.value)
    with pytest.raises(CheckpointError, match="belongs to backbone"):
        load_plugins(tmp_path / "set", BACKBONE)
    foreign = load_plugins(tmp_path / "set" / "four")
    with pytest.raises(CheckpointError, match="The plugin ffn_x4 belongs to backbone"):
        save_plugins(tmp_path / "other", foreign, BACKBONE)
    assert not (tmp_path / "other").exists()


def test_a_set_is_replaced_only_if_it_holds_nothing_else(tmp_path):
    save_plugins(tmp_path, PLUGINS, BACKBONE)
    save_plugins(tmp_path, {2: PLUGINS[2]}, BACKBONE)
    assert list(load_plugins(tmp_path)) == [2]
    (tmp_path / "ratio_2" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="holds ratio_2/notes.txt"):
        save_plugins(tmp_path, PLUGINS, BACKBONE)
    assert (tmp_path / "ratio_2" / "notes.txt").read_text() == "mine"


def test_slips_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(CheckpointError, match="no plugins to write"):
        save_plugins(tmp_path / "set", {}, BACKBONE)
    with pytest.raises(CheckpointError, match="plugin ffn_x4 is given as that of ratio 2"):
        save_plugins(tmp_path / "set", {2: PLUGINS[4]}, BACKBONE)
    assert list(tmp_path.iterdir()) == []


def test_a_member_that_is_damaged_or_gone_or_new_is_told(tmp_path):
    folder = tmp_path / "set"

    def fails(words):
        with pytest.raises(CheckpointError, match=words):
            load_plugins(folder)

    save_plugins(folder, PLUGINS, BACKBONE)
    (folder / "ratio_4" / "plugin.safetensors").unlink()
    fails("ratio_4/plugin.safetensors cannot be read")
    (folder / "ratio_4" / "plugin.json").unlink()
    fails("plugins.json and its folder differ: ratio_4")
    save_plugins(folder, PLUGINS, BACKBONE)
    _save(folder / "ratio_8", 16)
    fails("plugins.json and its folder differ: ratio_8")
    (folder / "plugins.json").unlink()
    _save(folder / "run" / "plugin", 4)
    fails("two plugins of one name: .'run/plugin': 'ffn_x4',.* 'ratio_8': 'ffn_x16', 'ratio_16': ")


@pytest.mark.parametrize(
    "change", [{"ratios": ["../../etc"]}, {"ratios": 4}, {"ratios": []}, {"backbone": None},
               {"format_version": 2}, {"kind": "plugin"}, {"ratios": [2, 4]}],
)  # fmt: skip
def test_a_damaged_index_is_refused(tmp_path, change):
    save_plugins(tmp_path / "set", PLUGINS, BACKBONE)
    file = tmp_path / "set" / "plugins.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError, match="plugins.json"):
        load_plugins(tmp_path / "set")


def test_paths_where_plugins_are_expected_and_lists_of_paths_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"one folder, found .*; several are joined"):
        load_plugins(["a", "b"])
    for plugins in (str(tmp_path), tmp_path, [tmp_path]):
        with pytest.raises(PluginError, match="Expected plugins, as load_plugins returns"):
            VariatorModel(BACKBONE, plugins)


def test_format_1_loads_and_gives_the_states_that_release_0_1_gave():
    expected = np.load(FORMAT_1 / "encoded.npz")
    model = VariatorModel(small_t5.backbone(small_t5.GATED), load_plugins(FORMAT_1))
    encoded = np.asarray(model.encode(expected["tokens"], ratio=4))
    valid = expected["tokens"] > 0
    # They were recorded on another CPU, which adds in another order.
    np.testing.assert_allclose(encoded[valid], expected["encoded"][valid], atol=1e-4)


def test_format_1_is_saved_as_format_2_and_is_the_same_plugin(tmp_path):
    before, owner = load_plugins(FORMAT_1)[4], small_t5.backbone(small_t5.GATED)
    save_plugin(tmp_path / "new", before.config, before.variables, owner)
    content = json.loads((tmp_path / "new" / "plugin.json").read_text())
    assert content["format_version"] == 2
    (site,) = content["config"]["sites"]
    assert {"kind": "ffn", "ratio": 4, "layers": [0, 2]}.items() <= site.items()
    after = load_plugins(tmp_path / "new", owner)[4]
    assert after.config == before.config
    assert set(after.variables.params) == {f"encoder/layers_{i}/mlp" for i in (0, 2)}
