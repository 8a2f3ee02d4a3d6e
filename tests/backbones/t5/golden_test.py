"""Our T5 against transformers' outputs, versions 1.0 and 1.1, with padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import backbone, load, relative_error, under

from variator_jax.backbones.t5 import Transformer
from variator_jax.backbones.t5.attention import relative_position_bucket

TOLERANCE = 2e-5


@functools.cache
def _forward(config):
    return jax.jit(functools.partial(Transformer(config).apply, method="forward"))


@pytest.mark.parametrize("version", ["1_0", "1_1"])
@pytest.mark.parametrize("length", [7, 64, 200])
def test_outputs_match_transformers(version, length):
    golden = load(f"t5_t5_{version}_plain")
    config, params = backbone(golden, version)
    batch = under(golden, f"L{length}/")
    found = _forward(config)({"params": params}, batch["input_ids"], batch["decoder_input_ids"])
    encoder, decoder = batch["attention_mask"] > 0, batch["decoder_attention_mask"] > 0
    for part, at, array in [
        ("enc", encoder, found.hidden["encoder"]),
        ("dec", decoder, found.hidden["decoder"]),
        ("logits", decoder, found.logits),
    ]:
        assert relative_error(np.asarray(array)[at], batch[part][at]) < TOLERANCE, part


@pytest.mark.parametrize("stack,bidirectional", [("enc", True), ("dec", False)])
def test_position_buckets_match_at_every_offset(stack, bidirectional):
    golden = load("t5_t5_1_0_plain")
    offsets = jnp.asarray(golden["bucket_offsets"])
    found = relative_position_bucket(offsets, bidirectional)
    np.testing.assert_array_equal(found, golden[f"{stack}_buckets"])
