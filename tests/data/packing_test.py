import pytest

from variator_jax.data import packing
from variator_jax.data._tf import seqio, tf
from variator_jax.errors import DataError

LENGTHS = {"inputs": 16, "targets": 8}


def _dataset(lengths):
    examples = [{"inputs": [i + 2] * n + [1], "targets": [i + 2, 1]} for i, n in enumerate(lengths)]
    return tf.data.Dataset.from_generator(
        lambda: examples,
        output_signature={
            "inputs": tf.TensorSpec([None], tf.int32),
            "targets": tf.TensorSpec([None], tf.int32),
        },
    )


def _convert(converter, lengths=(3, 2, 4, 9)):
    return list(converter(_dataset(lengths), LENGTHS).as_numpy_iterator())


@pytest.mark.parametrize("k", [1, 3, 4])
def test_inputs_are_padded_to_a_multiple(k):
    dataset = tf.data.Dataset.from_tensors({"inputs": [5, 6, 7, 8, 1], "targets": [9, 1]})
    (example,) = packing.pad_to_multiple(k)(dataset).as_numpy_iterator()
    padded = example["inputs"].tolist()
    assert len(padded) % k == 0 and len(padded) < 5 + k
    assert padded[:5] == [5, 6, 7, 8, 1] and not any(padded[5:])
    assert example["targets"].tolist() == [9, 1]


def test_a_multiple_below_one_is_refused():
    with pytest.raises(DataError, match="1 or more, not of 0"):
        packing.pad_to_multiple(0)


def test_packed_examples_start_on_group_borders_with_padding_between():
    first, second = _convert(packing.GroupedFeatureConverter(pack=True, group=4), (3, 2, 4, 9))
    groups = {key: first[key].reshape(-1, 4).tolist() for key in first if "encoder" in key}
    assert groups == {
        "encoder_input_tokens": [[2, 2, 2, 1], [3, 3, 1, 0], [4, 4, 4, 4], [1, 0, 0, 0]],
        "encoder_segment_ids": [[1, 1, 1, 1], [2, 2, 2, 0], [3, 3, 3, 3], [3, 0, 0, 0]],
        "encoder_positions": [[0, 1, 2, 3], [0, 1, 2, 0], [0, 1, 2, 3], [4, 0, 0, 0]],
    }
    assert first["decoder_segment_ids"].tolist() == [1, 1, 2, 2, 3, 3, 0, 0]
    assert second["encoder_input_tokens"].tolist() == [5] * 9 + [1] + [0] * 6


@pytest.mark.parametrize("options", [{"pack": True}, {"pack": False, "group": 4}])
def test_without_groups_or_packing_it_is_seqios_own(options):
    expected = _convert(seqio.EncDecFeatureConverter(pack=options["pack"]))
    found = _convert(packing.GroupedFeatureConverter(**options))
    for one, other in zip(found, expected, strict=True):
        assert {k: v.tolist() for k, v in one.items()} == {k: v.tolist() for k, v in other.items()}


def test_a_subclass_may_fix_the_group():
    class Fours(packing.GroupedFeatureConverter):
        group = 4

    assert len(_convert(Fours(pack=True))) == 2
    assert _convert(Fours(pack=True))[0]["encoder_input_tokens"][7] == 0
