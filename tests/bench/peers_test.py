import jax
import numpy as np
import pytest

from variator_jax.backbones.t5 import T5Config, get_config
from variator_jax.bench import peers
from variator_jax.bench.latency import encoder_shapes

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

TINY = T5Config("tiny", 64, 16, 2, 8, 32, 2, 2, mlp_activations=("relu",))
TOKENS = np.arange(2, 12, dtype=np.int32).reshape(2, 5)


@pytest.fixture(autouse=True)
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["t5_1_0_small", "t5_1_1_small", "mt5_small"])
def test_the_peer_has_our_encoders_weights(name):
    import transformers

    config = get_config(name, vocab_size=64)
    with torch.device("meta"):
        theirs = transformers.T5EncoderModel(peers.transformers_config(config))
    ours = sum(leaf.size for leaf in jax.tree.leaves(encoder_shapes(config)))
    assert sum(weight.numel() for weight in theirs.parameters()) == ours


def test_eager_runs_and_a_compilation_that_fails_is_told(monkeypatch):
    def no_compiler(model, **kwargs):
        raise RuntimeError("no C++ compiler\nand a long story")

    monkeypatch.setattr(torch, "compile", no_compiler)
    eager, compiled = peers.start_peers(TINY, TOKENS)
    assert eager[0] == peers.EAGER and eager[2] == "" and eager[1]() is None
    assert compiled == (peers.COMPILED, None, "RuntimeError: no C++ compiler")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_peer_gets_our_tokens_dtype_and_no_gradients(dtype, monkeypatch):
    import dataclasses

    seen = []

    class Watched(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, input_ids):
            out = self.model(input_ids=input_ids).last_hidden_state
            seen.append((input_ids, out, self.model.training))
            return out

    monkeypatch.setattr(torch, "compile", lambda model, **kwargs: Watched(model))
    config = dataclasses.replace(TINY, dtype=dtype, param_dtype=dtype)
    _, (_, call, why) = peers.start_peers(config, TOKENS)
    assert call is not None, why
    tokens, out, training = seen[0]
    np.testing.assert_array_equal(tokens, TOKENS)
    assert out.dtype == getattr(torch, dtype) and out.shape == (2, 5, 16)
    assert not out.requires_grad and not training


def test_a_torch_that_lacks_jaxs_device_is_told(monkeypatch):
    class Device:
        platform = "gpu"

    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = peers.start_peers(TINY, TOKENS)
    assert [name for name, _, _ in found] == [peers.EAGER, peers.COMPILED]
    assert all(call is None and "JAX runs on gpu" in why for _, call, why in found)
