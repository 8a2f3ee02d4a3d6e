import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import random_params

from variator_jax.backbones.t5 import T5, get_config
from variator_jax.errors import ConfigError, PluginError
from variator_jax.experiment.similar_tokens import (
    destinations,
    merge,
    merge_similar,
    same_flops_ratio,
    similar_tokens_flops,
    unmerge,
)
from variator_jax.plugin import PluginConfig, intercept_modules, stack_flops

NANO = T5(get_config("nano", num_encoder_layers=2, num_decoder_layers=1, vocab_size=64))
STACK = NANO.stack()


@functools.partial(jax.jit, static_argnums=2)
def _through(x, mask, ratio):
    owners = destinations(x, mask, ratio)
    y = merge(x, mask, owners, -(-x.shape[1] // ratio))
    return unmerge(y, mask & (owners >= 0), owners)


def through(x, mask, ratio):
    """What the tokens of a site's input receive from an FFN that changes nothing."""
    return np.asarray(_through(np.asarray(x, np.float32), mask, ratio))


# Destinations are positions 0, 2 and 4.
MERGES = {
    # Position 3 points in the direction of 0, and 1 in that of 4.
    "most similar": (
        [[1, 0], [0, 3], [1, 1], [2, 0], [0, 1], [9, 9]],
        [True, True, True, True, True, False],
        [[1.5, 0], [0, 2], [1, 1], [1.5, 0], [0, 2], [0, 0]],
    ),
    "padding is no destination": (
        [[1, 0], [0, 1], [0, 1], [0, 1]],
        [True, True, False, False],
        [[0.5, 0.5], [0.5, 0.5], [0, 0], [0, 0]],
    ),
    "no destination": ([[1, 1]] * 4, [False, True, False, False], [[0, 0]] * 4),
}


@pytest.mark.parametrize("name", MERGES)
def test_tokens_join_their_most_similar_destination_and_share_its_mean(name):
    x, mask, expected = MERGES[name]
    np.testing.assert_allclose(through([x], np.array([mask]), 2)[0], expected)


@pytest.mark.parametrize("ratio, length", [(3, 8), (8, 3), (1, 8)])
def test_the_ffn_sees_a_plugins_number_of_vectors_and_ratio_one_changes_nothing(ratio, length):
    seen, params = [], random_params(NANO.config)

    def note(path, call, args, kwargs):
        seen.append(args[0].shape)
        return call(*args, **kwargs)

    @jax.jit
    def encode_both(rows):
        # The inner one sees what the outer one passes to the FFN.
        ffns = {STACK.path("ffn", layer) for layer in range(2)}
        with merge_similar(ratio, STACK, rows > 0), intercept_modules(ffns.__contains__, note):
            merged = NANO.encode(params, rows)
        return merged, NANO.encode(params, rows)

    rows = np.random.default_rng(0).integers(2, 64, (2, length)).astype(np.int32)
    rows[1, length // 2 :] = 0
    merged, plain = encode_both(rows)
    assert seen == [(2, -(-length // ratio), NANO.config.embed_dim)] * 2
    assert np.array_equal(merged, plain) == (ratio == 1)


@given(
    valid=st.lists(st.booleans(), min_size=7, max_size=7) | st.integers(0, 7),
    ratio=st.sampled_from([1, 2, 3, 5]),
    seed=st.integers(0, 1000),
)
def test_padding_changes_no_token(valid, ratio, seed):
    rng = np.random.default_rng(seed)
    valid = np.arange(7) < valid if isinstance(valid, int) else np.array(valid)
    mask = np.pad(valid[None], ((0, 0), (0, 4)))
    x = np.where(mask[..., None], rng.normal(size=(1, 11, 5)), 0)
    other = np.where(mask[..., None], x, 100 * rng.normal(size=x.shape))
    merged = through(other, mask, ratio)
    np.testing.assert_allclose(merged[:, :7], through(x[:, :7], valid[None], ratio), atol=1e-5)
    np.testing.assert_array_equal(merged[~mask], 0)
    if ratio == 1:  # each token gets its own
        np.testing.assert_allclose(merged, x, rtol=1e-6)


def test_a_ratio_below_one_is_refused():
    with pytest.raises(PluginError, match="ratio of 1 or more"):
        with merge_similar(0, STACK, jnp.ones((1, 4), bool)):
            pass
    with pytest.raises(ConfigError, match="length and ratio of 1 or more"):
        similar_tokens_flops(STACK, 0, 2)


@pytest.mark.parametrize("ratio", [2, 4, 3])
def test_cost_is_attention_ffns_on_groups_and_the_similarities(ratio):
    length, groups, width = 50, -(-50 // ratio), NANO.config.embed_dim
    layer = STACK.flops(0, length, length, groups) + 2 * length * groups * width
    assert similar_tokens_flops(STACK, length, ratio) == 2 * layer
    assert similar_tokens_flops(STACK, length, 1) == stack_flops(STACK, length)


@pytest.mark.parametrize("name", ["nano", "t5_1_0_base"])
@pytest.mark.parametrize("length", [1, 7, 256])
def test_the_same_flops_are_a_plugins_with_no_destination_to_spare(name, length):
    stack, plugin = T5(get_config(name)).stack(), PluginConfig(4)
    most = stack_flops(stack, length, plugin)
    groups = round(length / same_flops_ratio(stack, length, plugin))
    assert groups == 1 or similar_tokens_flops(stack, length, length / groups) <= most
    more = length / min(groups + 1, length)
    assert groups == length or similar_tokens_flops(stack, length, more) > most


@pytest.mark.parametrize("length, groups", [(1, 1), (6, 4), (33, 7), (33, 32), (70, 23)])
def test_a_ratio_that_is_not_whole_has_as_many_destinations_all_different(length, groups):
    x = jnp.asarray(np.random.default_rng(length).normal(size=(1, length, 4)), jnp.float32)
    owners = jax.jit(destinations, static_argnums=2)(
        x, jnp.ones((1, length), bool), length / groups
    )
    assert set(owners[0].tolist()) == set(range(groups))
