"""Packing examples into rows so that each starts on the border of a merge group."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from variator_jax.data._tf import seqio, tf
from variator_jax.errors import DataError

_FILLER = -1  # seqio strips padding before it packs, so something else holds the place till then


def pad_to_multiple(k: int, value: int = 0) -> Callable[[Any], Any]:
    """Returns a preprocessor that pads 'inputs' with `value` to a multiple of `k`.

    With `value` 0 the padding is stripped again by seqio's packing; see `GroupedFeatureConverter`.

    Raises:
      DataError: if `k` is not a positive integer.
    """
    if k < 1:
        raise DataError(f"examples can be padded to a multiple of 1 or more, not of {k}")

    def pad(example: Mapping[str, Any]) -> dict[str, Any]:
        missing = -tf.size(example["inputs"]) % k
        padded = tf.pad(example["inputs"], [[0, missing]], constant_values=value)
        return {**example, "inputs": padded}

    return lambda dataset: dataset.map(pad, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)


class GroupedFeatureConverter(seqio.EncDecFeatureConverter):
    """seqio's encoder-decoder layout whose packed examples start on multiples of `group` tokens.

    No merge group of a compression plugin whose ratio divides `group` then holds tokens of two
    examples. The places between examples are padding: token, segment and position are 0 there.
    Without packing it is its parent. T5X makes converters itself: give it a subclass that sets
    `group`.
    """

    group = 1

    def __init__(self, *args: Any, group: int | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.group = type(self).group if group is None else group

    def _pack_or_pad(self, ds: Any, packed_lengths: Mapping[str, int]) -> Any:
        if not self.pack:
            return super()._pack_or_pad(ds, packed_lengths)
        ds = super()._pack_or_pad(pad_to_multiple(self.group, _FILLER)(ds), packed_lengths)
        return ds.map(_clear_filler, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)


def _clear_filler(example: Mapping[str, Any]) -> dict[str, Any]:
    real = tf.cast(tf.not_equal(example["inputs"], _FILLER), tf.int32)
    names = ("inputs", "inputs_segment_ids", "inputs_positions")
    cleared = {name: example[name] * tf.cast(real, example[name].dtype) for name in names}
    return {**example, **cleared}
