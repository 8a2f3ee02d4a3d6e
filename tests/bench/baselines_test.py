"""Hugging Face's encoder as a baseline: our shape, tokens and dtype, or the reason why not."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from variator_jax.backbones.t5 import T5Config, get_config
from variator_jax.bench import baselines
from variator_jax.bench.latency import encoder_shapes

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TINY = T5Config("tiny", 64, 16, 2, 8, 32, 2, 2, mlp_activations=("relu",))
TOKENS = np.arange(2, 12, dtype=np.int32).reshape(2, 5)


@pytest.fixture(autouse=True)
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["t5_1_0_small", "t5_1_1_small", "mt5_small"])
def test_the_baseline_has_our_encoders_weights(name):
    config = get_config(name, vocab_size=64)
    with torch.device("meta"):
        theirs = transformers.T5EncoderModel(baselines.transformers_config(config))
    ours = sum(leaf.size for leaf in jax.tree.leaves(encoder_shapes(config)))
    assert sum(weight.numel() for weight in theirs.parameters()) == ours


def test_the_baseline_gets_our_tokens_dtype_and_no_gradients(monkeypatch):
    seen = []

    def watched(model, **kwargs):
        def forward(input_ids):
            seen.append((input_ids, model(input_ids=input_ids).last_hidden_state, model.training))

        return forward

    monkeypatch.setattr(torch, "compile", watched)
    config = dataclasses.replace(TINY, dtype="bfloat16", param_dtype="bfloat16")
    assert callable(baselines.start_baselines(config, TOKENS)[baselines.COMPILED])
    tokens, out, training = seen[0]
    np.testing.assert_array_equal(tokens, TOKENS)
    assert out.dtype == torch.bfloat16 and out.shape == (2, 5, 16)
    assert not out.requires_grad and not training


def test_what_cannot_run_is_returned_with_the_reason(monkeypatch):
    def no_compiler(model, **kwargs):
        raise RuntimeError("no C++ compiler\nand a long story")

    monkeypatch.setattr(torch, "compile", no_compiler)
    started = baselines.start_baselines(TINY, TOKENS)
    assert started[baselines.EAGER]() is None
    assert started[baselines.COMPILED] == "RuntimeError: no C++ compiler"
    device = types.SimpleNamespace(platform="gpu")
    monkeypatch.setattr(jax, "devices", lambda: [device])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    started = baselines.start_baselines(TINY, TOKENS)
    assert set(started) == {baselines.EAGER, baselines.COMPILED}
    assert all("JAX runs on gpu" in reason for reason in started.values())
