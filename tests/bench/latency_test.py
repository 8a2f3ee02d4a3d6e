"""The clock, what it times, Hugging Face's encoder as a baseline, and the names of machines."""

import dataclasses
import itertools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from variator_jax.backbones.t5 import T5, T5Config, get_config
from variator_jax.bench import latency, output
from variator_jax.bench.arguments import BenchSettings, Shape
from variator_jax.errors import ConfigError
from variator_jax.plugin import PluginConfig, flops_allowed_speedup, init_plugin, stack_flops

CONFIG = get_config("nano", num_encoder_layers=1)
STACK = T5(CONFIG).stack()


@pytest.fixture(scope="module")
def params():
    return latency.random_params(CONFIG)


@pytest.fixture
def ticking(monkeypatch):
    """A clock on which all that is timed takes a second."""
    clock = types.SimpleNamespace(perf_counter=itertools.count(0.0).__next__)
    monkeypatch.setattr(latency, "time", clock)


def test_rounds_rotate_and_every_call_is_timed_once_a_round(ticking):
    calls, log = {}, []
    for key in (1, 2, 4):
        calls[key] = lambda key=key: log.append(key)
    seconds = latency.interleaved_seconds(calls, rounds=4)
    assert log[:6] == [1, 1, 2, 2, 4, 4]  # one call that compiles and one that warms up
    assert log[6:] == [1, 2, 4, 2, 4, 1, 4, 1, 2, 1, 2, 4]
    assert seconds == {key: [1.0] * 4 for key in calls}


def test_rows_hold_medians_spreads_and_speedups(monkeypatch):
    seconds = {1: [0.4, 0.4, 0.9], 4: [0.1, 0.2, 0.3]}
    monkeypatch.setattr(latency, "interleaved_seconds", lambda calls, *_: seconds)
    four = PluginConfig(4)
    rows = latency.measure_encoder_latency(CONFIG, {4: four}, Shape(2, 16))
    allowed = flops_allowed_speedup(STACK, 16, four)
    assert rows[1] == latency.Latency("nano", 2, 16, 400.0, 1.0, 1.0, 250.0)
    assert dataclasses.astuple(rows[4])[3:] == pytest.approx((200.0, 2.0, allowed, 100.0))
    with pytest.raises(ConfigError, match="at least one round"):
        latency.measure_encoder_latency(CONFIG, {}, Shape(1, 8), rounds=0)


def test_the_call_runs_the_plugin_and_its_weights_are_arguments(params):
    config = PluginConfig(2, bottleneck=8)
    variables = init_plugin(config, STACK, jax.random.key(0))
    tokens = jnp.arange(2, 18).reshape(2, 8)
    plain = latency.encoder_call(CONFIG, PluginConfig(1))(params, None, tokens)
    assert set(params) == {"encoder", "token_embedder"} and np.std(plain) > 0.1
    call = latency.encoder_call(CONFIG, config)
    compressed = call(params, variables, tokens)
    assert plain.shape == compressed.shape and not np.allclose(plain, compressed)
    constants = call.trace(params, variables, tokens).jaxpr.consts
    assert all(np.size(constant) < CONFIG.embed_dim * CONFIG.mlp_dim for constant in constants)


def test_ratios_baselines_and_the_matrix_product_share_the_rounds(params, monkeypatch, ticking):
    calls, log = [], []

    def start(config, tokens):
        calls.append((config, tokens.shape))
        return {"a": lambda: log.append("a"), "b": "no such thing"}

    monkeypatch.setattr(latency, "matrix_size", lambda: 32)
    monkeypatch.setattr(latency, "start_baselines", start)
    settings = BenchSettings(ratios=(4,), rounds=3, peer=True)
    result = latency.bench_encoder(CONFIG, params, Shape(2, 16), settings)
    one, four, a, b = result.rows
    assert all(row.seconds == [1.0] * 3 for row in (one, four, a, result.peak))
    assert (one.ratio, four.ratio, a.ratio) == (1, 4, None)
    assert four.flops == 2 * stack_flops(STACK, 16, PluginConfig(4))
    assert four.allowed_speedup == flops_allowed_speedup(STACK, 16, PluginConfig(4))
    assert result.peak.name == "matrix peak, 32 x 32" and result.peak.flops == 2 * 32**3
    assert calls == [(CONFIG, (2, 16))] and len(log) == 2 + 3  # to warm up, and one a round
    assert (a.name, b.name, b.seconds, b.error) == ("a", "b", (), "no such thing")


def test_machines_are_named_by_kind_and_number(monkeypatch):
    assert re.match(rf"CPU \S.*cores?, jax {jax.__version__}$", output.hardware())
    for platform, name in (("gpu", "2 x Imaginary G1 (gpu), jax"), ("cpu", "JAX as 2 devices")):
        device = types.SimpleNamespace(platform=platform, device_kind="Imaginary G1")
        monkeypatch.setattr(jax, "devices", lambda device=device: [device] * 2)
        assert name in output.hardware()


# Hugging Face's encoder as a baseline: our shape, tokens and dtype, or the reason why not.

TINY = T5Config("tiny", 64, 16, 2, 8, 32, 2, 2, mlp_activations=("relu",))
TOKENS = np.arange(2, 12, dtype=np.int32).reshape(2, 5)


@pytest.fixture
def torch():
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    before = torch.get_num_threads()
    yield torch
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["t5_1_0_small", "t5_1_1_small", "mt5_small"])
def test_the_baseline_has_our_encoders_weights(name, torch):
    from transformers import T5EncoderModel

    config = get_config(name, vocab_size=64)
    with torch.device("meta"):
        theirs = T5EncoderModel(latency.transformers_config(config))
    ours = sum(leaf.size for leaf in jax.tree.leaves(latency.encoder_shapes(config)))
    assert sum(weight.numel() for weight in theirs.parameters()) == ours


def test_the_baseline_gets_our_tokens_dtype_and_no_gradients(monkeypatch, torch):
    seen = []

    def watched(model, **kwargs):
        def forward(input_ids):
            seen.append((input_ids, model(input_ids=input_ids).last_hidden_state, model.training))

        return forward

    monkeypatch.setattr(torch, "compile", watched)
    config = dataclasses.replace(TINY, dtype="bfloat16", param_dtype="bfloat16")
    assert callable(latency.start_baselines(config, TOKENS)[latency.COMPILED])
    tokens, out, training = seen[0]
    np.testing.assert_array_equal(tokens, TOKENS)
    assert out.dtype == torch.bfloat16 and out.shape == (2, 5, 16)
    assert not out.requires_grad and not training


def test_a_baseline_that_cannot_run_is_returned_with_the_reason(monkeypatch, torch):
    def no_compiler(model, **kwargs):
        raise RuntimeError("no C++ compiler\nand a long story")

    monkeypatch.setattr(torch, "compile", no_compiler)
    started = latency.start_baselines(TINY, TOKENS)
    assert started[latency.EAGER]() is None
    assert started[latency.COMPILED] == "RuntimeError: no C++ compiler"
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(platform="gpu")])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    reasons = latency.start_baselines(TINY, TOKENS)
    assert reasons.keys() == started.keys()
    assert all("JAX runs on gpu" in reason for reason in reasons.values())
