import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from variator_jax.backbones.t5 import T5, get_config
from variator_jax.errors import ConfigError, DataError
from variator_jax.experiment.truncation import common_suffix, same_flops_length, truncated
from variator_jax.plugin import PluginConfig, stack_flops

ROWS = st.lists(st.lists(st.integers(1, 4), max_size=9), min_size=1, max_size=4)


def batch(*rows, width=9):
    array = np.zeros((len(rows), width), np.int32)
    for row, tokens in zip(array, rows, strict=True):
        row[: len(tokens)] = tokens
    return {"encoder_input_tokens": array, "decoder_target_tokens": np.ones((len(rows), 2))}


def cut(rows, share, suffix):
    (kept,) = truncated([batch(*rows)], share, suffix)
    return [row[row > 0].tolist() for row in kept["encoder_input_tokens"]]


@pytest.mark.parametrize("name", ["nano", "t5_1_0_base"])
@pytest.mark.parametrize("ratio", [2, 4, 8])
@pytest.mark.parametrize("length", [1, 7, 64, 256])
def test_the_length_is_the_longest_that_costs_no_more(name, ratio, length):
    stack, plugin = T5(get_config(name)).stack(), PluginConfig(ratio)
    shorter = same_flops_length(stack, length, plugin)
    most = stack_flops(stack, length, plugin)
    assert 1 <= shorter <= length and stack_flops(stack, shorter) <= most
    assert shorter == length or stack_flops(stack, shorter + 1) > most


def test_the_length_follows_the_plugins_settings():
    stack = T5(get_config("t5_1_0_base")).stack()
    half = PluginConfig(4, layers=tuple(range(6)))
    none, all_layers = PluginConfig(1), PluginConfig(4)
    lengths = [same_flops_length(stack, 256, plugin) for plugin in (all_layers, half, none)]
    assert lengths == sorted(set(lengths)) and lengths[-1] == 256


def test_a_row_is_cut_in_the_middle_of_what_comes_before_the_suffix():
    rows = [[1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 7, 8], [8], []]
    assert cut(rows, 0.5, 2) == [[1, 6, 7, 8], [1, 7, 8], [8], []]
    assert cut(rows, 0.5, 0) == [[1, 2, 7, 8], [1, 8], [8], []]
    assert cut(rows, 0.01, 3) == [[1, 6, 7, 8], [1, 2, 7, 8], [8], []]
    assert cut(rows, 1.0, 1) == rows


def test_other_arrays_and_the_batch_itself_stay_as_they_are():
    original = batch([1, 2, 3, 4])
    (kept,) = truncated([original], 0.5, 0)
    assert kept["decoder_target_tokens"] is original["decoder_target_tokens"]
    assert kept["encoder_input_tokens"].dtype == np.int32
    assert original["encoder_input_tokens"][0, :4].tolist() == [1, 2, 3, 4]


@given(rows=ROWS, share=st.floats(0.01, 1.0), suffix=st.integers(0, 10))
def test_lengths_and_ends_of_what_is_kept(rows, share, suffix):
    for tokens, kept in zip(rows, cut(rows, share, suffix), strict=True):
        wanted = max(suffix + 1, math.ceil(round(share * len(tokens), 6)))
        assert len(kept) == min(len(tokens), wanted)
        if len(kept) > suffix:
            last = suffix + (len(kept) - suffix) // 2
            assert kept[len(kept) - last :] == tokens[len(tokens) - last :]
            assert kept[: len(kept) - last] == tokens[: len(kept) - last]


def test_a_share_that_floating_point_puts_just_above_a_whole_number_keeps_that_number():
    (kept,) = truncated([batch([1] * 100, width=100)], 0.07, 0)
    assert (kept["encoder_input_tokens"] > 0).sum() == 7


@given(rows=ROWS, ending=st.lists(st.integers(1, 4), max_size=4))
def test_the_common_suffix_is_shared_and_no_longer_one_is(rows, ending):
    rows = [[*row, *ending] for row in rows]
    batches = [batch(row, [], width=14) for row in rows]
    if not any(rows):
        with pytest.raises(DataError, match="no row with a token"):
            common_suffix(batches)
        return
    suffix = common_suffix(batches)
    filled = [row for row in rows if row]
    endings = [{tuple(row[-n:]) for row in filled} for n in range(1, min(map(len, filled)) + 1)]
    assert suffix == sum(len(kinds) == 1 for kinds in endings)
    assert suffix >= len(ending)


def test_rows_that_were_cut_at_the_feature_length_do_not_hide_the_shared_ending():
    complete, cut_off = [5, 6, 7, 8], [1, 2, 3, 4, 5, 1]
    assert common_suffix([batch(complete, cut_off, width=6), batch([9, 7, 8], width=6)]) == 2
    assert common_suffix([batch(cut_off, [2, 1, 1, 1, 5, 1], width=6)]) == 2


def test_what_cannot_be_cut_is_refused():
    with pytest.raises(ConfigError, match="above 0 and up to 1"):
        cut([[1]], 0.0, 0)
    with pytest.raises(ConfigError, match="not negative"):
        cut([[1]], 0.5, -1)
    packed = {**batch([1, 2]), "encoder_segment_ids": np.ones((1, 9))}
    with pytest.raises(DataError, match="packed"):
        list(truncated([packed], 0.5, 0))
