"""A fresh plugin's units: measured in microbatches, kept whole, and the same in every process."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from tiny import TINY, random_params

from variator_jax import mesh as meshes
from variator_jax.backbones.t5 import T5
from variator_jax.errors import CheckpointError
from variator_jax.plugin import PluginConfig
from variator_jax.store import Backbone
from variator_jax.train import jobs as fresh
from variator_jax.train.loop import Schedule
from variator_jax.train.settings import DataConfig, TrainConfig

BACKBONE = Backbone(TINY, random_params(TINY), "sha256:0", None)
ROWS = 8
NAMES = ["encoder/layers_0/mlp", "encoder/layers_1/mlp"]


class Data(DataConfig):
    def train(self, start, rows):
        """Rows of different lengths; every fourth one is empty."""
        rng = np.random.default_rng(0)
        inputs = rng.integers(2, 128, (ROWS, 12)).astype(np.int32)
        for row in range(ROWS):
            inputs[row, row % 4 * 4 :] = 0
        targets = rng.integers(2, 128, (ROWS, 3)).astype(np.int32)
        return iter([{"encoder_input_tokens": inputs, "decoder_input_tokens": targets}])


CONFIG = TrainConfig(
    "", Data("", {}, ROWS), Schedule(1), None, TINY, plugin=PluginConfig(4, bottleneck=8)
)


def plugin(folder, num_microbatches=1):
    mesh = meshes.make_mesh(TINY, ROWS, (1, 1, 1), jax.devices()[:1])
    config = dataclasses.replace(CONFIG, model_dir=str(folder), num_microbatches=num_microbatches)
    variables = fresh.fresh_plugin(config, BACKBONE, mesh)
    return {name: float(value) for name, value in variables.output_scales.items()}


@pytest.fixture
def sizes(monkeypatch):
    """How many rows each traced pass of the backbone has."""
    seen, real = [], T5.apply

    def apply(self, params, batch):
        seen.append(batch["encoder_input_tokens"].shape[0])
        return real(self, params, batch)

    monkeypatch.setattr(T5, "apply", apply)
    return seen


def test_microbatches_are_measured_one_at_a_time_and_give_the_whole_batch_s_scales(tmp_path, sizes):
    found = {count: plugin(tmp_path / str(count), count) for count in (1, 4)}
    assert sizes == [ROWS, ROWS // 4]
    assert list(found[1]) == NAMES
    assert found[4] == pytest.approx(found[1], rel=1e-6)  # of four, the first has no tokens


def test_what_was_measured_is_kept_and_not_measured_again(tmp_path, sizes):
    first = plugin(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["calibration.json"]
    assert plugin(tmp_path) == first and len(sizes) == 1
    twice = {name: 2 * value for name, value in first.items()}
    (tmp_path / "calibration.json").write_text(json.dumps(twice))
    assert plugin(tmp_path) == twice


@pytest.mark.parametrize("text", ["{", "{}", f'{{"{NAMES[0]}": 1, "{NAMES[1]}": "much"}}'])
def test_scales_that_cannot_be_read_are_an_error(tmp_path, text):
    (tmp_path / "calibration.json").write_text(text)
    with pytest.raises(CheckpointError, match="does not hold the output scales"):
        plugin(tmp_path)


@pytest.mark.parametrize("sent", [(1, 0.5, 0.25), (0, 0, 0)])
def test_all_processes_use_what_process_0_reads(tmp_path, monkeypatch, sent):
    asked = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    receive = lambda value: asked.append(value.any()) or np.float32(sent)  # noqa: E731
    monkeypatch.setattr(meshes.multihost_utils, "broadcast_one_to_all", receive)
    file = tmp_path / "calibration.json"
    file.write_text(json.dumps(dict.fromkeys(NAMES, 7)))  # an old state, that only this one sees
    expected = dict(zip(NAMES, sent[1:], strict=True)) if sent[0] else None
    assert fresh._kept_scales(file, NAMES) == expected
    assert asked == [False]
