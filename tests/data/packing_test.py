import numpy as np
import pytest

from variator_jax.data import packing
from variator_jax.data._tf import seqio, tf
from variator_jax.errors import DataError

LENGTHS = {"inputs": 16, "targets": 8}


def _examples(lengths):
    return [{"inputs": [i + 2] * n + [1], "targets": [i + 2, 1]} for i, n in enumerate(lengths)]


def _padded(examples):
    return {
        name: np.array(
            [example[name] + [0] * (length - len(example[name])) for example in examples]
        )
        for name, length in LENGTHS.items()
    }


def _converted(converter, lengths=(3, 2, 4, 9)):
    signature = {name: tf.TensorSpec([None], tf.int32) for name in LENGTHS}
    dataset = tf.data.Dataset.from_generator(lambda: _examples(lengths), output_signature=signature)
    return [
        {name: array.tolist() for name, array in row.items()}
        for row in converter(dataset, LENGTHS).as_numpy_iterator()
    ]


class Fours(packing.GroupedFeatureConverter):
    group = 4


def test_packed_examples_start_on_group_borders_with_padding_between():
    first, second = packing.pack([_padded(_examples((3, 2, 4, 9)))], LENGTHS, 4)
    groups = {name: array.reshape(-1, 4).tolist() for name, array in first.items()}
    assert groups == {
        "inputs": [[2, 2, 2, 1], [3, 3, 1, 0], [4, 4, 4, 4], [1, 0, 0, 0]],
        "inputs_segment_ids": [[1, 1, 1, 1], [2, 2, 2, 0], [3, 3, 3, 3], [3, 0, 0, 0]],
        "inputs_positions": [[0, 1, 2, 3], [0, 1, 2, 0], [0, 1, 2, 3], [4, 0, 0, 0]],
        "targets": [[2, 1, 3, 1], [4, 1, 0, 0]],
        "targets_segment_ids": [[1, 1, 2, 2], [3, 3, 0, 0]],
        "targets_positions": [[0, 1, 0, 1], [0, 1, 0, 0]],
    }
    assert second["inputs"].tolist() == [[5] * 9 + [1] + [0] * 6]


def test_a_multiple_below_one_is_refused():
    with pytest.raises(DataError, match="1 or more, not of 0"):
        next(packing.pack([], LENGTHS, 0))


@pytest.mark.parametrize(
    "pack, converter", [(True, packing.GroupedFeatureConverter), (False, Fours)]
)
def test_without_groups_or_packing_the_converter_is_seqios_own(pack, converter):
    assert _converted(converter(pack=pack)) == _converted(seqio.EncDecFeatureConverter(pack=pack))
