import numpy as np
import pytest

from variator_jax.backbones.t5 import T5, get_config
from variator_jax.errors import ConfigError, DataError
from variator_jax.experiment.truncation import common_suffix, same_flops_length, truncated
from variator_jax.plugin import PluginConfig, stack_flops

BASE = T5(get_config("t5_1_0_base")).stack()


def batch(*rows, width=9):
    array = np.zeros((len(rows), width), np.int32)
    for row, tokens in zip(array, rows, strict=True):
        row[: len(tokens)] = tokens
    return {"encoder_input_tokens": array, "decoder_target_tokens": np.ones((len(rows), 2))}


def cut(rows, share, suffix, width=9):
    (kept,) = truncated([batch(*rows, width=width)], share, suffix)
    return [row[row > 0].tolist() for row in kept["encoder_input_tokens"]]


@pytest.mark.parametrize("stack", [BASE, T5(get_config("nano")).stack()])
@pytest.mark.parametrize("plugin", [PluginConfig(2), PluginConfig(8), PluginConfig(4, layers=(1,))])
@pytest.mark.parametrize("length", [1, 7, 256])
def test_the_length_is_the_longest_that_costs_no_more(stack, plugin, length):
    shorter = same_flops_length(stack, length, plugin)
    most = stack_flops(stack, length, plugin)
    assert 1 <= shorter <= length and stack_flops(stack, shorter) <= most
    assert shorter == length or stack_flops(stack, shorter + 1) > most


def test_a_row_is_cut_in_the_middle_of_what_comes_before_the_suffix():
    rows = [[1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 7, 8], [8], []]
    assert cut(rows, 0.5, 2) == [[1, 6, 7, 8], [1, 7, 8], [8], []]
    assert cut(rows, 0.5, 0) == [[1, 2, 7, 8], [1, 8], [8], []]
    assert cut(rows, 0.01, 3) == [[1, 6, 7, 8], [1, 2, 7, 8], [8], []]
    assert cut(rows, 1.0, 1) == rows
    # Floating point puts 0.07 * 100 just above 7.
    assert cut([[1] * 100], 0.07, 0, width=100) == [[1] * 7]


def test_other_arrays_and_the_batch_itself_stay_as_they_are():
    original = batch([1, 2, 3, 4])
    (kept,) = truncated([original], 0.5, 0)
    assert kept["decoder_target_tokens"] is original["decoder_target_tokens"]
    assert kept["encoder_input_tokens"].dtype == np.int32
    assert original["encoder_input_tokens"][0, :4].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "batches, suffix",
    [
        ([[[5, 6, 7, 8], [9, 7, 8]], [[7, 8], []]], 2),
        ([[[1, 2], [2, 1]]], 0),
        ([[[3, 4, 5]]], 3),
        # Rows as long as the feature length may have lost their ending, and count only alone.
        ([[[5, 6, 7, 8], [1, 2, 3, 4, 5, 1]], [[9, 7, 8]]], 2),
        ([[[1, 2, 3, 4, 5, 1], [2, 1, 1, 1, 5, 1]]], 2),
    ],
)
def test_the_common_suffix_is_what_all_complete_rows_end_with(batches, suffix):
    assert common_suffix([batch(*rows, width=6) for rows in batches]) == suffix


def test_what_cannot_be_cut_is_refused():
    with pytest.raises(ConfigError, match="above 0 and up to 1"):
        cut([[1]], 0.0, 0)
    with pytest.raises(ConfigError, match="not negative"):
        cut([[1]], 0.5, -1)
    packed = {**batch([1, 2]), "encoder_segment_ids": np.ones((1, 9))}
    with pytest.raises(DataError, match="packed"):
        list(truncated([packed], 0.5, 0))
    with pytest.raises(DataError, match="no row with a token"):
        common_suffix([batch([], [])])
