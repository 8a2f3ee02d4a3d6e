"""A fresh plugin's units: measured in microbatches, kept whole, and the same in every process."""

import json
import os
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import config

from variator_jax import mesh as meshes
from variator_jax.backbones.t5 import init_params
from variator_jax.errors import CheckpointError
from variator_jax.plugin import PluginConfig
from variator_jax.store import Backbone
from variator_jax.train import init as fresh

SHAPE = config("1_1")
BACKBONE = Backbone(SHAPE, init_params(SHAPE, jax.random.key(0)), "sha256:0", None)
PLUGIN = PluginConfig(4, bottleneck=8)
ROWS = 8


def batch():
    """Rows of different lengths; every fourth one is empty."""
    rng = np.random.default_rng(0)
    inputs = rng.integers(2, 128, (ROWS, 12)).astype(np.int32)
    for row in range(ROWS):
        inputs[row, row % 4 * 4 :] = 0
    targets = rng.integers(2, 128, (ROWS, 3)).astype(np.int32)
    return {"encoder_input_tokens": inputs, "decoder_input_tokens": targets}


DATA = types.SimpleNamespace(batch_size=ROWS, train=lambda start, rows: iter([batch()]))


def plugin(folder, **settings):
    mesh = meshes.make_mesh(SHAPE, ROWS, (1, 1, 1), jax.devices()[:1])
    variables = fresh.fresh_plugin(folder, PLUGIN, BACKBONE, DATA, 0, mesh, **settings)
    return {name: float(value) for name, value in variables.output_scales.items()}


@pytest.fixture
def sizes(monkeypatch):
    """How many rows each traced pass of the backbone has."""
    seen, real = [], fresh.run

    def run(module, params, batch):
        seen.append(batch["encoder_input_tokens"].shape[0])
        return real(module, params, batch)

    monkeypatch.setattr(fresh, "run", run)
    return seen


def test_microbatches_are_measured_one_at_a_time_and_give_the_whole_batch_s_scales(tmp_path, sizes):
    found = {}
    for count in (1, 2, 4):
        (tmp_path / str(count)).mkdir()
        found[count] = plugin(tmp_path / str(count), num_microbatches=count)
    assert sizes == [ROWS, ROWS // 2, ROWS // 4]
    assert found[1].keys() == {"layers_0", "layers_1", "layers_2"}
    for count in (2, 4):  # Of four, the first has no tokens at all.
        assert found[count] == pytest.approx(found[1], rel=1e-6)


def test_what_was_measured_is_kept_and_not_measured_again(tmp_path, sizes):
    first = plugin(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["calibration.json"]
    assert plugin(tmp_path) == first and len(sizes) == 1
    twice = {name: 2 * value for name, value in first.items()}
    (tmp_path / "calibration.json").write_text(json.dumps(twice))
    assert plugin(tmp_path) == twice


def test_a_run_that_dies_while_it_writes_leaves_no_scales(tmp_path, monkeypatch):
    def die(descriptor):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", die)
        with pytest.raises(KeyboardInterrupt):
            plugin(tmp_path)
    assert not (tmp_path / "calibration.json").exists()
    assert plugin(tmp_path)


@pytest.mark.parametrize("text", ["", "{", '{"layers_0": 1.0}', '{"layers_0": "much"}', "[]"])
def test_scales_that_cannot_be_read_are_an_error(tmp_path, text):
    (tmp_path / "calibration.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"calibration\.json does not hold .* MODEL_DIR"):
        plugin(tmp_path)


@pytest.fixture
def second(monkeypatch):
    """This process is the second of two; process 0 tells what is in the list."""
    told, asked = [], []

    def broadcast(value):
        asked.append(np.copy(value))
        return told[0]

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(meshes.multihost_utils, "broadcast_one_to_all", broadcast)
    return told, asked


NAMES = ["layers_0", "layers_1"]


def test_all_processes_go_by_what_process_0_finds(tmp_path, second):
    told, asked = second
    file = tmp_path / "calibration.json"
    told[:] = [np.float32([1, 0.5, 0.25])]
    assert fresh._kept_scales(file, NAMES) == {"layers_0": 0.5, "layers_1": 0.25}
    file.write_text('{"layers_0": 7, "layers_1": 7}')  # an old state, that only this one sees
    assert fresh._kept_scales(file, NAMES) == {"layers_0": 0.5, "layers_1": 0.25}
    told[:] = [np.float32([0, 0, 0])]
    assert fresh._kept_scales(file, NAMES) is None
    assert len(asked) == 3 and not np.any(asked)


def test_kept_scales_are_exact(tmp_path):
    exact = {name: np.float32(value) for name, value in zip(NAMES, (0.1, 1 / 3), strict=True)}
    fresh._keep_scales(tmp_path / "f.json", {k: jnp.float32(v) for k, v in exact.items()})
    assert fresh._kept_scales(tmp_path / "f.json", NAMES) == exact
