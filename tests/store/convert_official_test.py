"""`variator convert --from official` on the golden vectors, written as the release is."""

import numpy as np
import pytest
import torch_files
from golden_vectors import backbone, load, relative_error, under

from variator_jax import cli
from variator_jax.backbones.t5 import Transformer
from variator_jax.plugin import splice
from variator_jax.store import load_backbone, load_plugin, save_backbone


@pytest.fixture
def golden(tmp_path):
    """The golden arrays; their backbone in a folder of ours, their plugin in an official file."""
    arrays = load("scale100_t5_1_0_4")
    # The official norm's epsilon of 1e-6 acts on a residual stream 1/100 as large: 1e-6 * 100^2.
    config, params = backbone(arrays, "1_0", layer_norm_epsilon=1e-2)
    save_backbone(tmp_path / "backbone", config, params)
    state = {
        name: np.asarray(array, np.float32)
        for name, array in under(arrays, "plugin_official/").items()
    }
    torch_files.save_zip(tmp_path / "plugin-t5-mux_4.pkl", state)
    return arrays


def run(tmp_path, *arguments):
    source = tmp_path / "plugin-t5-mux_4.pkl"
    target = tmp_path / "plugin"
    formats = ("--from", "official", "--to", "variator")
    return cli.main(["convert", *formats, *map(str, (source, target)), *map(str, arguments)])


def encoded(tmp_path, tokens):
    owner = load_backbone(tmp_path / "backbone")
    plugin = load_plugin(tmp_path / "plugin", owner)
    with splice(plugin.config, plugin.variables, tokens > 0):
        return Transformer(owner.config).apply({"params": owner.params}, tokens, method="encode")


def test_the_golden_student_comes_out_of_the_plugin_folder(golden, tmp_path, capsys):
    assert run(tmp_path, "--backbone", tmp_path / "backbone") == 0
    out = capsys.readouterr().out
    assert "compression plugin" in out and "ratio" in out
    assert relative_error(encoded(tmp_path, golden["input_ids"]), golden["student.enc"]) < 2e-5


def test_without_the_residual_scale_it_is_another_plugin(golden, tmp_path):
    assert run(tmp_path, "--backbone", tmp_path / "backbone", "--residual_scale", 1) == 0
    assert relative_error(encoded(tmp_path, golden["input_ids"]), golden["student.enc"]) > 1e-3


def test_a_damaged_file_and_a_missing_backbone_leave_nothing(golden, tmp_path, capsys):
    assert run(tmp_path, "--backbone", tmp_path / "nowhere") == 2
    assert "nowhere" in capsys.readouterr().err
    file = tmp_path / "plugin-t5-mux_4.pkl"
    file.write_bytes(file.read_bytes()[:-40])
    assert run(tmp_path, "--backbone", tmp_path / "backbone") == 2
    assert file.name in capsys.readouterr().err
    assert not (tmp_path / "plugin").exists()
