"""Packing examples into rows so that each starts on the border of a merge group."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from variator_jax.data._tf import seqio, tf
from variator_jax.data.order import Rows
from variator_jax.errors import DataError

_FILLER = -1  # keeps a place until seqio, which strips padding first, has packed


def pack(chunks: Iterable[Rows], lengths: Mapping[str, int], multiple: int) -> Iterator[Rows]:
    """Yields rows that hold as many consecutive examples as fit, one row at a time.

    Args:
      chunks: examples, padded with zeros.
      lengths: of the features.
      multiple: each example's 'inputs' start on a multiple of this many tokens; the places between
        examples are padding.

    Returns:
      An iterator of rows: int32 [1, length] for each feature, its `_segment_ids`, counted from 1,
      and its `_positions`.

    Raises:
      DataError: if `multiple` is not positive.
    """
    _check_multiple(multiple)
    row, used, segment = _empty_row(lengths), dict.fromkeys(lengths, 0), 0
    for chunk in chunks:
        for example in zip(*(chunk[name] for name in lengths), strict=True):
            tokens = {name: ids[ids != 0] for name, ids in zip(lengths, example, strict=True)}
            if any(used[name] + len(ids) > lengths[name] for name, ids in tokens.items()):
                yield row
                row, used, segment = _empty_row(lengths), dict.fromkeys(lengths, 0), 0
            segment += 1
            for name, ids in tokens.items():
                place = slice(used[name], used[name] + len(ids))
                row[name][0, place] = ids
                row[f"{name}_segment_ids"][0, place] = segment
                row[f"{name}_positions"][0, place] = np.arange(len(ids))
                used[name] += len(ids)
            used["inputs"] += -used["inputs"] % multiple
    if segment:
        yield row


def _empty_row(lengths: Mapping[str, int]) -> Rows:
    return {
        name + kind: np.zeros((1, length), np.int32)
        for name, length in lengths.items()
        for kind in ("", "_segment_ids", "_positions")
    }


def _check_multiple(multiple: int) -> None:
    if multiple < 1:
        raise DataError(f"examples can be padded to a multiple of 1 or more, not of {multiple}")


class GroupedFeatureConverter(seqio.EncDecFeatureConverter):
    """`pack` for T5X's own pipeline: packed examples start on multiples of `group` tokens.

    Without packing it is its parent. T5X makes converters itself: give it a subclass that sets
    `group`.
    """

    group = 1

    def _pack_or_pad(self, ds: Any, packed_lengths: Mapping[str, int]) -> Any:
        if not self.pack:
            return super()._pack_or_pad(ds, packed_lengths)
        _check_multiple(self.group)
        return super()._pack_or_pad(ds.map(self._fill), packed_lengths).map(_clear_filler)

    def _fill(self, example: Mapping[str, Any]) -> dict[str, Any]:
        inputs = example["inputs"]
        missing = [[0, -tf.size(inputs) % self.group]]
        return {**example, "inputs": tf.pad(inputs, missing, constant_values=_FILLER)}


def _clear_filler(example: Mapping[str, Any]) -> dict[str, Any]:
    real = tf.not_equal(example["inputs"], _FILLER)
    names = ("inputs", "inputs_segment_ids", "inputs_positions")
    cleared = {name: tf.where(real, example[name], 0) for name in names}
    return {**example, **cleared}
