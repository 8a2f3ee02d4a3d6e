import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from variator_jax.backbones.t5 import get_config
from variator_jax.backbones.t5.cost import encoder_flops, flops_allowed_speedup
from variator_jax.bench import encoder, memory
from variator_jax.bench.settings import Shape
from variator_jax.errors import ConfigError
from variator_jax.plugin import PluginConfig

CONFIG = get_config("nano", num_encoder_layers=1)


@pytest.fixture(autouse=True)
def small_matrices(monkeypatch):
    monkeypatch.setattr(encoder, "matrix_size", lambda: 32)


@pytest.fixture(scope="module")
def params():
    return encoder.random_encoder(CONFIG)


def test_rows_are_samples_and_formulas(params):
    plugins = encoder.fresh_plugins(CONFIG, (1, 4))
    ticks = itertools.count()
    result = encoder.bench_encoder(
        CONFIG, params, plugins, Shape(2, 16), 3, clock=lambda: float(next(ticks))
    )
    assert [row.ratio for row in result.ratios] == [1, 4]
    assert all(row.seconds == (1.0,) * 3 for row in (*result.ratios, result.peak))
    assert result.ratios[1].flops == encoder_flops(CONFIG, 16, 4, batch=2)
    assert result.ratios[1].allowed_speedup == flops_allowed_speedup(CONFIG, 16, 4)
    assert result.speedup(result.ratios[1]) == 1.0 and result.peak.size == 32


def test_peers_take_part_in_the_rounds_and_refusals_are_kept(params):
    calls, log = [], []

    def start_peers(config, tokens):
        calls.append((config, tokens.shape))
        return [("a", lambda: log.append("a"), ""), ("b", None, "no such thing")]

    plugins = encoder.fresh_plugins(CONFIG, (1,))
    result = encoder.bench_encoder(CONFIG, params, plugins, Shape(1, 8), 4, start_peers)
    assert calls == [(CONFIG, (1, 8))]
    assert len(log) == 2 + 4  # to warm up, and one a round
    a, b = result.peers
    assert len(a.seconds) == 4 and not a.reason
    assert (b.name, b.seconds, b.reason) == ("b", (), "no such thing")


def test_what_is_timed_is_the_spliced_encoder(params):
    tokens = np.arange(2, 18, dtype=np.int32).reshape(2, 8)
    plugins = encoder.fresh_plugins(CONFIG, (1, 2))
    found = [
        encoder.compiled_call("it", encoder.encoder_call(CONFIG, p), params, v, tokens)()
        for p, v in plugins.values()
    ]
    assert found[0].shape == found[1].shape == (2, 8, CONFIG.embed_dim)
    assert not np.allclose(found[0], found[1])
    assert plugins[1] == (PluginConfig(1), None)


def test_too_little_memory_is_told_before_and_after(params, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2**20)
    with pytest.raises(ConfigError, match=r"encoder needs .* MiB more memory, and 1.0 MiB of"):
        encoder.random_encoder(CONFIG)
    grow = jax.jit(lambda x: jnp.ones((2**20,)) * x)
    with pytest.raises(ConfigError, match=r"The thing needs 4.0 MiB more .*--dtype bfloat16"):
        encoder.compiled_call("The thing", grow, np.float32(1))


def test_a_device_that_runs_out_is_told():
    lack = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating")
    with pytest.raises(ConfigError, match=r"The thing needs 3.00 GiB, and the device ran out"):
        with memory.told("The thing", 3 * 2**30):
            raise lack
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        with memory.told("The thing", 1):
            raise jax.errors.JaxRuntimeError("INTERNAL: something else")


def test_memory_of_a_device_that_tells():
    class Device:
        platform = "gpu"

        def memory_stats(self):
            return {"bytes_limit": 100, "bytes_in_use": 30, "peak_bytes_in_use": 60}

    assert (memory.free_bytes(Device()), memory.peak_bytes(Device())) == (70, 60)
    assert memory.peak_bytes(jax.devices("cpu")[0]) is None
