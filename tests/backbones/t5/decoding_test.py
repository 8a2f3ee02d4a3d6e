"""Decoding with the cache against plain forward passes, and beams against brute force."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import backbone, config, load
from tiny import random_params

from variator_jax.backbones.t5 import Transformer
from variator_jax.backbones.t5.decoding import EOS_TOKEN, beam_decode, greedy_decode

TOKENS = jnp.asarray([[5, 6, 7, 8, 9, 1], [11, 12, 1, 0, 0, 0]])


def _log_probabilities(module, params, tokens, targets):
    """Of each next token, by a forward pass without a cache: [batch, length, vocab]."""
    inputs = jnp.pad(targets, ((0, 0), (1, 0)))[:, :-1]
    return jax.nn.log_softmax(module.apply({"params": params}, tokens, inputs))


@pytest.mark.parametrize("version", ["1_0", "1_1"])
def test_greedy_tokens_are_the_argmax_of_a_forward_pass_and_one_beam_is_greedy(version):
    golden_config, params = backbone(load(f"t5_t5_{version}_plain"), version)
    module = Transformer(golden_config)

    @jax.jit
    def decode(params):
        encoded = module.apply({"params": params}, TOKENS, method="encode")
        greedy = greedy_decode(module, params, encoded, TOKENS, 12)
        beam = beam_decode(module, params, encoded, TOKENS, 12, num_beams=1, length_penalty=0.0)
        return greedy, beam, _log_probabilities(module, params, TOKENS, greedy)

    greedy, beam, forward = decode(params)
    np.testing.assert_array_equal(greedy, beam)
    for row in range(2):
        generated = np.asarray(greedy[row])
        length = list(generated).index(EOS_TOKEN) + 1 if EOS_TOKEN in generated else 12
        assert (generated[length:] == 0).all()
        np.testing.assert_array_equal(generated[:length], forward[row].argmax(-1)[:length])


def test_empty_rows_fill_a_batch_up_and_change_nothing():
    golden_config, params = backbone(load("t5_t5_1_1_plain"), "1_1")
    module = Transformer(golden_config)
    empty = jnp.zeros_like(TOKENS)
    for search in (greedy_decode, beam_decode):
        alone, among, none = (
            search(module, params, module.apply({"params": params}, t, method="encode"), t, 6)
            for t in (TOKENS, jnp.concatenate([TOKENS, empty]), empty)
        )
        np.testing.assert_array_equal(among[: len(TOKENS)], alone)
        assert not none.any()  # nothing to wait for
        assert not among[len(TOKENS) :].any()


def test_enough_beams_find_the_best_sequence_of_all():
    tiny, length = config("1_1", vocab_size=5, num_encoder_layers=1, num_decoder_layers=1), 3
    module, tokens = Transformer(tiny), jnp.asarray([[2, 3, 4, 1]])
    ends = {}  # every sequence that ends, and its length
    for candidate in itertools.product(range(5), repeat=length):
        if EOS_TOKEN in candidate:
            end = candidate.index(EOS_TOKEN) + 1
            ends[candidate[:end] + (0,) * (length - end)] = end
    rows = np.asarray(list(ends))

    @jax.jit
    def decode(params):
        encoded = module.apply({"params": params}, tokens, method="encode")
        forward = _log_probabilities(module, params, jnp.repeat(tokens, len(rows), 0), rows)
        return beam_decode(module, params, encoded, tokens, length, num_beams=40), forward

    for seed in range(3):
        params = jax.tree.map(lambda x: 2.0 * x, random_params(tiny, seed))
        decoded, forward = jax.device_get(decode(params))
        scores = [
            forward[i, np.arange(end), rows[i, :end]].sum() / ((5 + end) / 6) ** 0.6
            for i, end in enumerate(ends.values())
        ]
        np.testing.assert_array_equal(decoded[0], rows[np.argmax(scores)])
