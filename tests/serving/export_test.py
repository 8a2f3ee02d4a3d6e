"""`variator export --format jax`: programs that JAX and safetensors run without this package."""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
import served
from safetensors.numpy import load_file
from tiny import flat
from tiny_model import BACKBONE, PLUGINS, SHAPE, TOKENS, make_plugin

from variator_jax import VariatorModel, cli, save_backbone
from variator_jax.errors import VariatorError
from variator_jax.serving.export import ExportSettings, export_programs
from variator_jax.serving.sentences import Encoder
from variator_jax.store import Backbone

# As the module's docstring has it, where this package cannot be imported.
LOADER = """
import json, sys
sys.modules["variator_jax"] = None
import jax, numpy as np, safetensors.numpy
from jax import export

folder, tokens, results = sys.argv[1], np.load(sys.argv[2]), sys.argv[3]
index = json.load(open(f"{folder}/export.json"))
weights = safetensors.numpy.load_file(f"{folder}/weights.safetensors")
found = {}
for entry in index["programs"]:
    program = export.deserialize(open(f"{folder}/{entry['file']}", "rb").read())
    used = {name: weights[name] for name in index["weights"][entry["plugin"]]}
    padded = np.zeros((entry["batch"], entry["length"]), np.int32)
    padded[:2, :6] = tokens
    found[entry["file"]] = np.asarray(program.call(used, padded))
    assert list(found[entry["file"]].shape) == entry["output"]
np.savez(results, **found)
"""
SETTINGS = ExportSettings("encode", batches=(2, 4), lengths=(16,))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "exported"
    export_programs(folder, Encoder(BACKBONE), PLUGINS.values(), SETTINGS)
    return folder


def test_programs_run_without_this_package_and_equal_the_library(exported, tmp_path):
    np.save(tmp_path / "tokens.npy", TOKENS)
    arguments = [exported, tmp_path / "tokens.npy", tmp_path / "found.npz"]
    program = [sys.executable, "-c", LOADER, *map(str, arguments)]
    result = subprocess.run(program, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found, model = np.load(tmp_path / "found.npz"), VariatorModel(BACKBONE, PLUGINS)
    files = {1: "none", 2: "ffn_x2", 4: "ffn_x4"}
    assert sorted(found) == sorted(f"{x}_{n}x16.jaxexport" for x in files.values() for n in (2, 4))
    for ratio, name in files.items():
        expected = np.asarray(model.encode(TOKENS, ratio=ratio))
        np.testing.assert_array_equal(found[f"{name}_2x16.jaxexport"][:2, :6], expected)
        np.testing.assert_allclose(found[f"{name}_4x16.jaxexport"][:2, :6], expected, atol=1e-5)


def test_weights_are_stored_once_and_only_those_that_the_task_reads(exported):
    stored = load_file(exported / "weights.safetensors")
    index = json.loads((exported / "export.json").read_text())
    read = {f"backbone/{path}" for path in flat(BACKBONE.params) if "decoder/" not in path}
    read = {name for name in read if "lm_head" not in name and "logits" not in name}
    assert set(index["weights"]["none"]) == read
    assert set(index["weights"]["ffn_x2"]) > read
    assert set(stored) == set().union(*index["weights"].values())
    for path, leaf in flat(BACKBONE.params).items():
        if f"backbone/{path}" in stored:
            np.testing.assert_array_equal(stored[f"backbone/{path}"], leaf)


def test_the_command_exports_pooled_vectors_for_another_platform(tmp_path, capsys):
    save_backbone(tmp_path / "backbone", SHAPE, BACKBONE.params)
    out = tmp_path / "exported"
    command = ["export", "--format=jax", f"--backbone={tmp_path}/backbone", f"--output={out}"]
    shapes = ["--batches=2", "--lengths=16", "--platforms=cpu,tpu"]
    assert cli.main([*command, *shapes]) == 0
    (file,) = out.glob("*.jaxexport")
    program = jax.export.deserialize(file.read_bytes())
    assert program.platforms == ("cpu", "tpu")
    index = json.loads((out / "export.json").read_text())
    stored = load_file(out / "weights.safetensors")
    used = {name: stored[name] for name in index["weights"]["none"]}
    vectors = program.call(used, np.pad(TOKENS, ((0, 0), (0, 10))))
    expected = served.pooled(VariatorModel(BACKBONE), [ids[None, ids > 0] for ids in TOKENS])
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    for wrong, reason in {
        ("--task=rank",): "Known: encode, embed",
        ("--platforms=gpu",): "Known: cpu, cuda",
        ("--batches=1,x",): "expected a positive number",
        ("--batches=0",): "expected a positive number",
        ("--gin_file=nano_docs.gin",): "takes no gin files",
    }.items():
        assert cli.main([*command, *wrong]) == 2
        assert reason in capsys.readouterr().err
    assert cli.main(["export", "--backbone=x"]) == 2
    assert "--backbone goes with --format jax" in capsys.readouterr().err


def test_a_plugin_that_was_never_saved_is_exported(tmp_path):
    fresh = dataclasses.replace(PLUGINS[2], description={})
    settings = ExportSettings("encode", batches=(2,), lengths=(16,))
    files = export_programs(tmp_path / "exported", Encoder(BACKBONE), [fresh], settings)
    assert files == ["none_2x16.jaxexport", "ffn_x2_2x16.jaxexport"]


def test_a_plugin_of_another_backbone_is_refused(tmp_path):
    other = make_plugin(2, Backbone(SHAPE, BACKBONE.params, "f" * 64))
    with pytest.raises(VariatorError, match="f{8}"):
        export_programs(tmp_path / "exported", Encoder(BACKBONE), [other], SETTINGS)
    config = dataclasses.replace(PLUGINS[2].config, pool_padding=True)
    merging = dataclasses.replace(PLUGINS[2], config=config)
    with pytest.raises(VariatorError, match="merges padding"):
        export_programs(tmp_path / "exported", Encoder(BACKBONE), [merging], SETTINGS)
    assert not (tmp_path / "exported").exists()
