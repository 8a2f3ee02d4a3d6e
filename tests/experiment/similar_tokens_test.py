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
from variator_jax.model import SplicedModel
from variator_jax.plugin import PluginConfig, intercept_modules, stack_flops

NANO = T5(get_config("nano", num_encoder_layers=2, num_decoder_layers=1, vocab_size=64))
STACK = NANO.stack()
EMBED = 5


@pytest.fixture(scope="module")
def params():
    return random_params(NANO.config)


def tokens(lengths, width):
    rng = np.random.default_rng(0)
    rows = np.zeros((len(lengths), width), np.int32)
    for row, length in zip(rows, lengths, strict=True):
        row[:length] = rng.integers(2, 64, length)
    return jnp.asarray(rows)


@functools.partial(jax.jit, static_argnums=2)
def encode(params, rows, ratio=None):
    intervention = functools.partial(merge_similar, ratio, STACK) if ratio else None
    return SplicedModel(NANO, intervention=intervention).encode(params, None, rows)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _through(x, mask, ratio, ffn):
    owners = destinations(x, mask, ratio)
    y = ffn(merge(x, mask, owners, -(-x.shape[1] // ratio)))
    return unmerge(y, mask & (owners >= 0), owners)


def through(x, mask, ratio, ffn=jnp.positive):
    """What the tokens of a site's input receive, by default from an FFN that changes nothing."""
    return np.asarray(_through(np.asarray(x, np.float32), mask, ratio, ffn))


def test_tokens_join_their_most_similar_destination_and_share_its_mean():
    # Destinations are positions 0, 2 and 4; 3 points where 0 does, and 1 where 4 does.
    x = np.array([[[1, 0], [0, 3], [1, 1], [2, 0], [0, 1], [9, 9]]])
    mask = np.array([[True] * 5 + [False]])
    assert destinations(jnp.asarray(x), jnp.asarray(mask), 2).tolist()[0][:5] == [0, 2, 1, 0, 2]
    merged = through(x, mask, 2)[0]
    np.testing.assert_allclose(merged, [[1.5, 0], [0, 2], [1, 1], [1.5, 0], [0, 2], [0, 0]])


def test_padding_is_no_destination_even_if_it_is_the_most_similar():
    x = np.array([[[1, 0], [0, 1], [0, 1], [0, 1]]])
    merged = through(x, np.array([[True, True, False, False]]), 2)[0]
    np.testing.assert_allclose(merged, [[0.5, 0.5], [0.5, 0.5], [0, 0], [0, 0]])


def test_a_row_without_a_destination_receives_nothing():
    merged = through(np.ones((1, 4, 2)), np.array([[False, True, False, False]]), 2)
    np.testing.assert_array_equal(merged, 0)


def test_ratio_one_is_the_backbone(params):
    rows = tokens([7, 4], 8)
    np.testing.assert_array_equal(encode(params, rows, 1), encode(params, rows))
    assert not np.allclose(encode(params, rows, 2), encode(params, rows))


@pytest.mark.parametrize("ratio, length", [(2, 8), (3, 8), (4, 5), (8, 3)])
def test_the_ffn_sees_a_plugins_number_of_vectors(params, ratio, length):
    seen = []

    def note(path, call, args, kwargs):
        seen.append(args[0].shape)
        return call(*args, **kwargs)

    def run(rows):
        # The inner one sees what the outer one passes to the FFN.
        ffns = {STACK.path("ffn", layer) for layer in range(2)}
        with merge_similar(ratio, STACK, rows > 0), intercept_modules(ffns.__contains__, note):
            return NANO.encode(params, rows)

    jax.eval_shape(run, tokens([length, 1], length))
    assert seen == [(2, -(-length // ratio), NANO.config.embed_dim)] * 2


@given(
    valid=st.lists(st.booleans(), min_size=7, max_size=7) | st.integers(0, 7),
    ratio=st.sampled_from([1, 2, 3, 5]),
    seed=st.integers(0, 1000),
)
def test_padding_changes_no_token(valid, ratio, seed):
    """Neither its number nor what stands in it, whatever tokens are masked."""
    rng = np.random.default_rng(seed)
    valid = np.arange(7) < valid if isinstance(valid, int) else np.array(valid)
    mask = np.pad(valid[None], ((0, 0), (0, 4)))
    x = np.where(mask[..., None], rng.normal(size=(1, 11, EMBED)), 0)
    other = np.where(mask[..., None], x, 100 * rng.normal(size=x.shape))
    merged = through(other, mask, ratio)
    np.testing.assert_allclose(merged[:, :7], through(x[:, :7], valid[None], ratio), atol=1e-5)
    np.testing.assert_array_equal(merged[~mask], 0)
    if ratio == 1:  # each token gets its own
        np.testing.assert_allclose(merged, x, rtol=1e-6)


@given(ratio=st.sampled_from([2, 4]), seed=st.integers(0, 1000))
def test_equal_tokens_merge_exactly(ratio, seed):
    """Where every token is a copy of some destination, nothing is lost but rounding."""
    groups = 3
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(1, groups * ratio, EMBED))
    kinds = x[:, ::ratio]
    for position in range(groups * ratio):
        if position % ratio:
            x[:, position] = kinds[:, rng.integers(groups)]
    merged = through(x, np.ones((1, groups * ratio), bool), ratio, jnp.tanh)
    np.testing.assert_allclose(merged, np.tanh(x), atol=1e-5)


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
@pytest.mark.parametrize("length", [1, 7, 64, 256])
def test_the_same_flops_are_a_plugins_with_no_destination_to_spare(name, length):
    stack, plugin = T5(get_config(name)).stack(), PluginConfig(4)
    most = stack_flops(stack, length, plugin)
    groups = round(length / same_flops_ratio(stack, length, plugin))
    assert 1 <= groups <= length
    if groups > 1:
        assert similar_tokens_flops(stack, length, length / groups) <= most
    if groups < length:
        assert similar_tokens_flops(stack, length, length / (groups + 1)) > most


@pytest.mark.parametrize("length", [1, 6, 33, 70])
def test_a_ratio_that_is_not_whole_has_as_many_destinations_all_different(length):
    x = jnp.asarray(np.random.default_rng(length).normal(size=(1, length, 4)), jnp.float32)
    for groups in {1, length // 2 + 1, length - length // 7, length}:
        owners = np.asarray(destinations(x, jnp.ones((1, length), bool), length / groups))
        assert set(owners[0]) == set(range(groups))
