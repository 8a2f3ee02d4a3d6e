"""Shapes by name, T5X's tree and axes, dtypes, rematerialisation, packing, encoder-only."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from golden_vectors import config

from variator_jax.backbones.t5 import T5, Transformer, get_config, init_params, shape_params
from variator_jax.errors import ConfigError

SHAPE = config("1_1")
PARAMS = init_params(SHAPE, jax.random.key(0))
TOKENS = jnp.asarray([[5, 6, 7, 8], [9, 10, 0, 0]], jnp.int32)
TARGETS = jnp.asarray([[0, 11, 12], [0, 13, 14]], jnp.int32)


@pytest.mark.parametrize("name, millions", [
    ("t5_1_0_base", 222.9), ("t5_1_0_large", 737.7), ("t5_1_0_3b", 2851.6), ("t5_1_0_11b", 11307),
    ("t5_1_1_base", 247.6), ("t5_1_1_large", 783), ("t5_1_1_xl", 2850), ("t5_1_1_xxl", 11135),
    ("byt5_small", 299.6), ("mt5_small", 300.2), ("nano", 1.902), ("mini", 12.85),
])  # fmt: skip
def test_published_sizes(name, millions):
    shapes = shape_params(get_config(name))
    assert sum(x.size for x in jax.tree.leaves(shapes)) / 1e6 == pytest.approx(millions, rel=2e-3)


def test_paths_shapes_and_axes_are_t5xs():
    variables = jax.eval_shape(Transformer(SHAPE).init, jax.random.key(0), TOKENS, TARGETS)
    params = traverse_util.flatten_dict(variables["params"], sep="/")
    axes = traverse_util.flatten_dict(variables["params_axes"], sep="/")
    assert {f"{path}_axes" for path in params} == set(axes)
    expected = {
        "token_embedder/embedding": ((128, 32), ("vocab", "embed")),
        "encoder/relpos_bias/rel_embedding": ((4, 32), ("heads", "relpos_buckets")),
        "encoder/layers_0/attention/query/kernel": ((32, 48), ("embed", "joined_kv")),
        "encoder/layers_0/attention/out/kernel": ((48, 32), ("joined_kv", "embed")),
        "encoder/layers_2/mlp/wi_1/kernel": ((32, 80), ("embed", "mlp")),
        "encoder/layers_2/mlp/wo/kernel": ((80, 32), ("mlp", "embed")),
        "encoder/encoder_norm/scale": ((32,), ("embed",)),
        "decoder/layers_0/self_attention/key/kernel": ((32, 48), ("embed", "joined_kv")),
        "decoder/layers_0/pre_cross_attention_layer_norm/scale": ((32,), ("embed",)),
        "decoder/logits_dense/kernel": ((32, 128), ("embed", "vocab")),
    }
    for path, (shape, names) in expected.items():
        assert params[path].shape == shape, path
        assert tuple(axes[f"{path}_axes"].names) == names, path


def test_bfloat16_activations_stay_near_float32_and_logits_are_float32():
    batch = {"encoder_input_tokens": TOKENS, "decoder_input_tokens": TARGETS}
    plain = T5(SHAPE).apply(PARAMS, batch).hidden["encoder"]
    rounded = T5(dataclasses.replace(SHAPE, dtype="bfloat16")).apply(PARAMS, batch)
    hidden = rounded.hidden["encoder"]
    assert hidden.dtype == jnp.bfloat16 and rounded.logits.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(hidden, np.float32)[0], plain[0], atol=0.15)


def test_an_encoder_alone_does_not_decode_and_says_so():
    module = Transformer(dataclasses.replace(SHAPE, num_decoder_layers=0))
    arguments = jnp.ones((2, 4, 32)), TOKENS, TARGETS
    with pytest.raises(ConfigError, match="without a decoder"):
        module.apply({"params": PARAMS}, *arguments, method="decode")


@pytest.mark.parametrize("name, fields, message", [
    ("t5_1_1_bass", {}, "t5_1_1_base"),
    ("nano", {"mlp_dims": 3}, "mlp_dim"),
    ("nano", {"num_encoder_layers": 0}, "num_encoder_layers is 0"),
    ("nano", {"remat": "dot"}, "remat.*Did you mean 'dots'"),
    ("nano", {"mlp_activations": ("rellu",)}, "relu"),
    ("nano", {"dtype": "float8"}, "dtype"),
    ("nano", {"encoder_mlp_dim": 0}, "encoder_mlp is 0"),
])  # fmt: skip
def test_unknown_names_and_values_name_the_nearest(name, fields, message):
    with pytest.raises(ConfigError, match=message):
        get_config(name, **fields)


def test_the_stacks_of_a_backbone():
    stacks = [T5(SHAPE).stack(name) for name in ("encoder", "decoder")]
    assert [(stack.layers, stack.causal) for stack in stacks] == [(3, False), (2, True)]
    with pytest.raises(ConfigError, match="has no stack 'decoder'"):
        T5(dataclasses.replace(SHAPE, num_decoder_layers=0)).stack("decoder")
