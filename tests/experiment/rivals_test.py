"""Rivals without training: what is merged or cut, and that it costs what a plugin costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import random_params

from variator_jax.backbones.t5 import T5, get_config
from variator_jax.errors import ConfigError
from variator_jax.experiment import rivals
from variator_jax.plugin import PluginConfig, intercept_modules, stack_flops

NANO = T5(get_config("nano", num_encoder_layers=2, num_decoder_layers=1, vocab_size=64))
STACK = NANO.stack()
BASE = T5(get_config("t5_1_0_base")).stack()


_on_merged = jax.jit(rivals.on_merged, static_argnums=(0, 3))


def through(x, mask, ratio):
    """What the tokens of an FFN's input get from one that changes nothing."""
    return np.asarray(_on_merged(jnp.asarray, np.asarray(x, np.float32), np.asarray(mask), ratio))


@pytest.mark.parametrize("x, mask, expected", [
    # Destinations are positions 0, 2 and 4: 3 points in the direction of 0, and 1 in that of 4.
    (
        [[1, 0], [0, 3], [1, 1], [2, 0], [0, 1], [9, 9]],
        [True, True, True, True, True, False],
        [[1.5, 0], [0, 2], [1, 1], [1.5, 0], [0, 2], [0, 0]],
    ),
    # Padding is no destination.
    (np.eye(4, 2)[[0, 1, 1, 1]], [True, True, False, False], [[0.5, 0.5]] * 2 + [[0, 0]] * 2),
    ([[1, 1]] * 4, [False, True, False, False], [[0, 0]] * 4),  # and there may be none
])  # fmt: skip
def test_tokens_join_their_most_similar_destination_and_share_its_mean(x, mask, expected):
    np.testing.assert_allclose(through([x], [mask], 2)[0], expected)


def test_the_ffn_sees_a_plugins_number_of_vectors():
    seen, params = [], random_params(NANO.config)

    def note(path, call, args, kwargs):
        seen.append(args[0].shape)
        return call(*args, **kwargs)

    @jax.jit
    def encode(rows):
        # The inner one sees what the outer one passes to the FFN.
        ffns = {STACK.path("ffn", layer) for layer in range(2)}
        with rivals.merge_similar(3, STACK, rows > 0), intercept_modules(ffns.__contains__, note):
            return NANO.encode(params, rows)

    encode(np.arange(16, dtype=np.int32).reshape(2, 8))
    assert seen == [(2, 3, NANO.config.embed_dim)] * 2


@given(
    valid=st.lists(st.booleans(), min_size=7, max_size=7),
    ratio=st.sampled_from([1, 2, 3, 5]),
    seed=st.integers(0, 1000),
)
def test_padding_changes_no_token(valid, ratio, seed):
    rng = np.random.default_rng(seed)
    mask = np.pad(np.array(valid)[None], ((0, 0), (0, 4)))
    x = np.where(mask[..., None], rng.normal(size=(1, 11, 5)), 0)
    other = np.where(mask[..., None], x, 100 * rng.normal(size=x.shape))
    merged = through(other, mask, ratio)
    np.testing.assert_allclose(merged[:, :7], through(x[:, :7], mask[:, :7], ratio), atol=1e-5)
    np.testing.assert_array_equal(merged[~mask], 0)
    if ratio == 1:  # each token gets its own
        np.testing.assert_allclose(merged, x, rtol=1e-6)


@pytest.mark.parametrize("length, groups", [(1, 1), (6, 4), (33, 7), (33, 32), (70, 23)])
def test_a_ratio_that_is_not_whole_has_as_many_destinations_all_different(length, groups):
    x = jnp.asarray(np.random.default_rng(length).normal(size=(1, length, 4)), jnp.float32)
    owners = rivals.destinations(x, jnp.ones((1, length), bool), length / groups)
    assert set(owners[0].tolist()) == set(range(groups))


@pytest.mark.parametrize(
    "stack, plugin", [(BASE, PluginConfig(2)), (STACK, PluginConfig(4, layers=(1,)))]
)
@pytest.mark.parametrize("length", [1, 7, 256])
def test_rivals_cost_what_a_plugin_costs_with_no_vector_to_spare(stack, plugin, length):
    most = stack_flops(stack, length, plugin)
    groups = round(length / rivals.same_flops_ratio(stack, length, plugin))
    shorter = rivals.same_flops_length(stack, length, plugin)
    for count, cost in (
        (groups, lambda n: rivals.similar_tokens_flops(stack, length, length / n)),
        (shorter, lambda n: stack_flops(stack, n)),
    ):
        assert cost(count) <= most
        assert count == length or cost(count + 1) > most


def test_a_span_costs_less_than_merging_in_ffns_can():
    with pytest.raises(ConfigError, match="span all x4.* at 32 tokens"):
        rivals.same_flops_ratio(STACK, 32, PluginConfig(sites=("span all x4",)))


def batch(*rows, width=9):
    padded = [[*tokens, *[0] * (width - len(tokens))] for tokens in rows]
    return {"encoder_input_tokens": np.array(padded), "decoder_target_tokens": "kept"}


def cut(rows, share, suffix, width=9):
    (kept,) = rivals.truncated([batch(*rows, width=width)], share, suffix)
    assert kept["decoder_target_tokens"] == "kept"
    return [row[row > 0].tolist() for row in kept["encoder_input_tokens"]]


def test_a_row_is_cut_in_the_middle_of_what_comes_before_the_suffix():
    rows = [[1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 7, 8], [8], []]
    assert cut(rows, 0.5, 2) == [[1, 6, 7, 8], [1, 7, 8], [8], []]
    assert cut(rows, 0.5, 0) == [[1, 2, 7, 8], [1, 8], [8], []]
    assert cut(rows, 0.01, 3) == [[1, 6, 7, 8], [1, 2, 7, 8], [8], []]
    assert cut(rows, 1.0, 1) == rows
    # Floating point puts 0.07 * 100 just above 7.
    assert cut([[1] * 100], 0.07, 0, width=100) == [[1] * 7]


def test_the_common_suffix_is_what_all_complete_rows_end_with():
    # A row as long as the feature length may have lost its ending.
    for rows, suffix in (
        ([[5, 6, 7, 8], [9, 7, 8], [], [1, 2, 3, 4, 5, 1]], 2),
        ([[1, 2], [2, 1]], 0),
    ):
        assert rivals.common_suffix([batch(row, width=6) for row in rows]) == suffix
