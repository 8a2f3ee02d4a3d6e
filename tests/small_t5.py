"""Tiny T5s of every family with random weights, none of which is 0, 1 or like another."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from variator_jax.backbones.t5 import T5Config, shape_params
from variator_jax.errors import CheckpointError
from variator_jax.store import Backbone, arrays, load_backbone

GATED = T5Config(
    name="t5_1_1_custom", vocab_size=48, embed_dim=16, num_heads=3, head_dim=4, mlp_dim=24,
    num_encoder_layers=3, num_decoder_layers=2,
)  # fmt: skip
PLAIN = dataclasses.replace(
    GATED, name="t5_1_0_custom", mlp_activations=("relu",), logits_via_embedding=True
)
ENCODER = dataclasses.replace(GATED, name="t5_1_1_custom_encoder", num_decoder_layers=0)
CONFIGS = {"1.0": PLAIN, "1.1": GATED, "encoder": ENCODER}


def backbone(config: T5Config, dtype="float32", vocabulary_file: pathlib.Path | None = None):
    """A backbone of that shape, the same one in each call."""
    rng = np.random.default_rng(0)
    leaves = {
        path: rng.normal(size=leaf.shape).astype(jnp.dtype(dtype))
        for path, leaf in _shapes(config).items()
    }
    params = traverse_util.unflatten_dict(leaves, sep="/")
    compute = "bfloat16" if dtype == "bfloat16" else "float32"
    config = dataclasses.replace(config, param_dtype=dtype, dtype=compute)
    return Backbone(config, params, arrays.fingerprint(params), vocabulary_file)


@functools.cache
def _shapes(config):
    return traverse_util.flatten_dict(shape_params(config), sep="/")


def flat(tree):
    return traverse_util.flatten_dict(jax.device_get(tree), sep="/")


def refused(folder, words):
    """Such a folder is no backbone, and the message names it with the reason."""
    with pytest.raises(CheckpointError, match=words) as error:
        load_backbone(folder)
    assert str(folder) in str(error.value)


def assert_same(one, other):
    """Bit for bit, names and dtypes included."""
    one, other = flat(one), flat(other)
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype and one[name].shape == other[name].shape, name
        assert one[name].tobytes() == other[name].tobytes(), name
