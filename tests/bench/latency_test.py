import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from variator_jax.backbones.t5 import Transformer, get_config, shape_params
from variator_jax.backbones.t5.cost import flops_allowed_speedup
from variator_jax.bench import latency
from variator_jax.errors import ConfigError
from variator_jax.plugin import PluginConfig, init_plugin

CONFIG = get_config("nano", num_encoder_layers=1)


def plugin(ratio):
    config = PluginConfig(ratio, bottleneck=8)
    return config, init_plugin(
        config, CONFIG.num_encoder_layers, CONFIG.embed_dim, jax.random.key(0)
    )


@pytest.fixture(scope="module")
def params():
    return latency.random_params(CONFIG)


def test_random_params_are_the_encoders_part_of_the_tree(params):
    whole = shape_params(CONFIG)
    assert set(params) == {"encoder", "token_embedder"}
    for name in params:
        shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params[name])
        assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), whole[name])


def test_random_params_run_to_finite_varied_outputs(params):
    tokens = jnp.arange(2, 18).reshape(2, 8)
    encoded = Transformer(CONFIG).apply({"params": params}, tokens, method="encode")
    assert np.isfinite(encoded).all() and np.std(encoded) > 0.1


def test_rounds_rotate_and_every_call_is_timed_once_a_round():
    calls, log = {}, []
    for key in (1, 2, 4):
        calls[key] = lambda key=key: log.append(key)
    ticks = itertools.count()
    seconds = latency.interleaved_seconds(calls, rounds=4, clock=lambda: float(next(ticks)))
    assert log[:6] == [1, 1, 2, 2, 4, 4]  # one call that compiles and one that warms up
    assert log[6:] == [1, 2, 4, 2, 4, 1, 4, 1, 2, 1, 2, 4]
    assert seconds == {key: [1.0] * 4 for key in calls}


def test_rows_hold_medians_spread_and_speedups():
    seconds = {1: [0.4, 0.4, 0.9], 4: [0.1, 0.2, 0.3]}
    one, four = latency._rows(seconds, {1: 1.0, 4: 2.5})
    assert (one.ratio, one.milliseconds, one.speedup, one.efficiency) == (1, 400.0, 1.0, 1.0)
    assert four.milliseconds == pytest.approx(200.0)
    assert four.spread == pytest.approx(100.0)
    assert four.speedup == pytest.approx(2.0)
    assert four.efficiency == pytest.approx(0.8)


def test_a_measurement_of_a_real_encoder(params):
    rows = latency.measure_encoder_latency(
        CONFIG, params, {4: plugin(4), 2: plugin(2)}, batch=2, length=16, rounds=2
    )
    assert [row.ratio for row in rows] == [1, 2, 4]
    for row in rows:
        settings = PluginConfig(row.ratio, bottleneck=8)
        allowed = flops_allowed_speedup(CONFIG, 16, row.ratio, settings)
        assert row.milliseconds > 0 and row.flops_allowed_speedup == allowed
        assert row.efficiency == pytest.approx(row.speedup / allowed)


def test_weights_are_arguments_not_constants(params):
    config, variables = plugin(2)
    tokens = jnp.ones((1, 8), jnp.int32)
    traced = latency.encoder_call(CONFIG, config).trace(params, variables, tokens).jaxpr
    smallest_kernel = CONFIG.embed_dim * CONFIG.mlp_dim
    assert all(np.size(constant) < smallest_kernel for constant in traced.consts)


def test_the_encoder_call_runs_the_plugin(params):
    config, variables = plugin(2)
    tokens = jnp.arange(2, 18).reshape(2, 8)
    plain = latency.encoder_call(CONFIG, PluginConfig(1))(params, None, tokens)
    compressed = latency.encoder_call(CONFIG, config)(params, variables, tokens)
    assert plain.shape == compressed.shape and not np.allclose(plain, compressed)


def test_a_plugin_under_the_wrong_ratio_and_no_rounds_are_told(params):
    with pytest.raises(ConfigError, match="given for ratio 4 has ratio 2"):
        latency.measure_encoder_latency(CONFIG, params, {4: plugin(2)}, 1, 8)
    with pytest.raises(ConfigError, match="at least one round"):
        latency.measure_encoder_latency(CONFIG, params, {}, 1, 8, rounds=0)
