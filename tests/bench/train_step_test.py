import jax
import numpy as np
import pytest

from variator_jax.backbones.t5 import get_config
from variator_jax.bench import encoder, memory, train_step
from variator_jax.bench.settings import Shape, StepSettings
from variator_jax.bench.step_cost import distillation_flops
from variator_jax.errors import ConfigError
from variator_jax.plugin import PluginConfig

CONFIG = get_config("nano", num_encoder_layers=1)


@pytest.fixture(autouse=True)
def small_matrices(monkeypatch):
    monkeypatch.setattr(encoder, "matrix_size", lambda: 32)
    monkeypatch.setattr(train_step, "matrix_size", lambda: 32)


@pytest.fixture(scope="module")
def params():
    return train_step.random_whole(CONFIG)


def test_a_step_is_timed_and_its_memory_told(params):
    before = jax.tree.map(np.array, params)
    settings = StepSettings(targets=4, microbatches=2, remat=True)
    result = train_step.bench_steps(CONFIG, params, (4,), Shape(4, 16), settings, 2)
    (row,) = result.rows
    flops = distillation_flops(CONFIG, PluginConfig(4), 4, 16, 4)
    assert row.flops == flops.total and len(row.seconds) == len(result.peak.seconds) == 2
    assert np.isfinite(row.loss) and row.loss > 0
    # A CPU keeps no mark, so the compiler's analysis serves; frozen weights that it reads are part
    assert (row.peak_source, row.peak_bytes) == ("compiled", row.compiled_bytes)
    assert row.compiled_bytes > memory.tree_bytes(params["encoder"])
    assert (result.targets, result.microbatches, result.remat) == (4, 2, True)
    jax.tree.map(np.testing.assert_array_equal, params, before)


def test_the_devices_mark_is_used_only_where_this_step_raised_it(monkeypatch):
    monkeypatch.setattr(memory, "peak_bytes", lambda device: 70)
    assert train_step._peak(None, 60, 50) == (70, "device")
    assert train_step._peak(None, 70, 50) == (50, "compiled")
    assert train_step._peak(None, None, 50) == (50, "compiled")


def test_microbatches_that_do_not_divide_and_a_lack_of_memory_are_told(params, monkeypatch):
    with pytest.raises(ConfigError, match="does not divide into 3 microbatches"):
        settings = StepSettings(targets=4, microbatches=3)
        train_step.bench_steps(CONFIG, params, (2,), Shape(4, 8), settings, 1)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10)
    with pytest.raises(ConfigError, match="distillation step of 'nano' at 4x8.*--microbatches"):
        train_step.bench_steps(CONFIG, params, (2,), Shape(4, 8), StepSettings(targets=4), 1)
