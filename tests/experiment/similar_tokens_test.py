import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import random_params

from variator_jax.backbones.t5 import Transformer, cost, get_config
from variator_jax.errors import ConfigError, PluginError
from variator_jax.experiment.similar_tokens import (
    destinations,
    merge,
    merge_similar,
    same_flops_ratio,
    similar_tokens_flops,
    unmerge,
)
from variator_jax.plugin.config import ENCODER_MLP
from variator_jax.plugin.splice import surround_sites

CONFIG = get_config("nano", num_encoder_layers=2, num_decoder_layers=1, vocab_size=64)
MODULE = Transformer(CONFIG)
EMBED = 5


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


def tokens(lengths, width):
    rng = np.random.default_rng(0)
    rows = np.zeros((len(lengths), width), np.int32)
    for row, length in zip(rows, lengths, strict=True):
        row[:length] = rng.integers(2, 64, length)
    return jnp.asarray(rows)


@functools.partial(jax.jit, static_argnums=2)
def encode(params, rows, ratio=None):
    if ratio is None:
        return MODULE.apply({"params": params}, rows, method="encode")
    with merge_similar(ratio, rows > 0):
        return MODULE.apply({"params": params}, rows, method="encode")


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
    found = through(x, mask, 2)[0]
    np.testing.assert_allclose(found, [[1.5, 0], [0, 2], [1, 1], [1.5, 0], [0, 2], [0, 0]])


def test_padding_is_no_destination_even_if_it_is_the_most_similar():
    x = np.array([[[1, 0], [0, 1], [0, 1], [0, 1]]])
    found = through(x, np.array([[True, True, False, False]]), 2)[0]
    np.testing.assert_allclose(found, [[0.5, 0.5], [0.5, 0.5], [0, 0], [0, 0]])


def test_a_row_without_a_destination_receives_nothing():
    found = through(np.ones((1, 4, 2)), np.array([[False, True, False, False]]), 2)
    np.testing.assert_array_equal(found, 0)


def test_ratio_one_of_the_algorithm_gives_each_token_its_own():
    x = np.random.default_rng(0).normal(size=(2, 7, EMBED))
    mask = np.arange(7) < np.array([[7], [3]])
    np.testing.assert_allclose(through(x, mask, 1), x * mask[..., None], rtol=1e-6)


def test_ratio_one_is_the_backbone(params):
    rows = tokens([7, 4], 8)
    np.testing.assert_array_equal(encode(params, rows, 1), encode(params, rows))
    assert not np.allclose(encode(params, rows, 2), encode(params, rows))


@pytest.mark.parametrize("ratio, length", [(2, 8), (3, 8), (4, 5), (8, 3)])
def test_the_ffn_sees_a_plugins_number_of_vectors(params, ratio, length):
    seen = []

    def note(layer, ffn, x):
        seen.append(x.shape)
        return ffn(x)

    def run(rows):
        # The inner one sees what the outer one hands on.
        with merge_similar(ratio, rows > 0), surround_sites(ENCODER_MLP, note):
            return MODULE.apply({"params": params}, rows, method="encode")

    jax.eval_shape(run, tokens([length, 1], length))
    assert seen == [(2, -(-length // ratio), CONFIG.embed_dim)] * 2


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
    found = through(other, mask, ratio)
    np.testing.assert_allclose(found[:, :7], through(x[:, :7], valid[None], ratio), atol=1e-5)
    np.testing.assert_array_equal(found[~mask], 0)


def test_padding_and_neighbours_change_no_row_of_a_backbone(params):
    alone = encode(params, tokens([6], 6), 3)
    together = encode(params, tokens([6, 9], 10), 3)
    np.testing.assert_allclose(together[0, :6], alone[0], atol=1e-4)


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
    found = through(x, np.ones((1, groups * ratio), bool), ratio, jnp.tanh)
    np.testing.assert_allclose(found, np.tanh(x), atol=1e-5)


def test_wrong_ratios_and_patterns_are_told(params):
    rows = tokens([4], 4)
    with pytest.raises(PluginError, match="ratio of 1 or more"), merge_similar(0, rows > 0):
        pass
    with pytest.raises(PluginError, match="matches no module"):
        with merge_similar(2, rows > 0, r"encoder/block_(\d+)/ffn"):
            encode(params, rows)
    with pytest.raises(ConfigError, match="length and ratio of 1 or more"):
        similar_tokens_flops(CONFIG, 0, 2)


@pytest.mark.parametrize("ratio", [2, 4, 3])
def test_cost_is_a_repeating_means_and_the_similarities(ratio):
    length, groups = 50, -(-50 // ratio)
    found = similar_tokens_flops(CONFIG, length, ratio)
    layer = cost.attention_flops(CONFIG, length) + cost.ffn_flops(CONFIG, groups)
    assert found == 2 * (layer + 2 * length * groups * CONFIG.embed_dim)
    assert similar_tokens_flops(CONFIG, length, 1) == cost.encoder_flops(CONFIG, length, 1)


@pytest.mark.parametrize("name", ["nano", "t5_1_0_base"])
@pytest.mark.parametrize("length", [1, 7, 64, 256])
def test_the_same_flops_are_a_plugins_with_no_destination_to_spare(name, length):
    config = get_config(name)
    most = cost.encoder_flops(config, length, 4)
    groups = round(length / same_flops_ratio(config, length, 4))
    assert 1 <= groups <= length
    if groups > 1:
        assert similar_tokens_flops(config, length, length / groups) <= most
    if groups < length:
        assert similar_tokens_flops(config, length, length / (groups + 1)) > most


@given(length=st.integers(1, 70), data=st.data())
def test_a_ratio_that_is_not_whole_has_as_many_destinations_all_different(length, data):
    groups = data.draw(st.integers(1, length))
    x = jnp.asarray(np.random.default_rng(length).normal(size=(1, length, 4)), jnp.float32)
    owners = np.asarray(destinations(x, jnp.ones((1, length), bool), length / groups))
    assert set(owners[0]) == set(range(groups))
