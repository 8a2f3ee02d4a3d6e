"""From texts to tokens that fit: what is too long loses the end of a field, and the prompt stays.

An input is a text, or the parts of a filled template: literal, field, literal, ..., literal. It
runs as seqio preprocessors, so that both engines read the same examples.
"""

import string
from collections.abc import Mapping
from typing import Any

from variator_jax.data._tf import seqio, tf


def template_parts(template: str, fields: Mapping[str, Any]) -> list[Any]:
    """Returns the parts of a template of plain fields, filled with texts or string tensors."""
    parts: list[Any] = [""]
    for literal, field, _, _ in string.Formatter().parse(template):
        parts[-1] += literal
        parts += [] if field is None else [fields[field], ""]
    return parts


def tokenize_fitting(
    dataset: Any,
    output_features: Mapping[str, Any],
    sequence_length: Mapping[str, int] | None = None,
) -> Any:
    """seqio's `tokenize`, but for inputs in parts, which lose the end of their fields.

    Where the whole is longer than the inputs, all fields are cut to the same number of characters,
    the largest that fits; so the longest is cut first. If the literals alone do not fit, the end is
    left to `append_eos_after_trim`.

    Args:
      dataset: {'inputs', 'targets'}: string [] or, for inputs, [parts].
      output_features: seqio's features.
      sequence_length: lengths of 'inputs' and 'targets'; None cuts nothing.

    Returns:
      A dataset with int32 [tokens], without EOS, and the whole texts with '_pretokenized'.
    """
    encode = output_features["inputs"].vocabulary.encode_tf

    def tokenize(example: Mapping[str, Any]) -> dict[str, Any]:
        parts = example["inputs"]
        tokens = encode(tf.strings.reduce_join(parts))
        if parts.shape.rank and sequence_length:
            tokens = _fitted(parts, tokens, sequence_length["inputs"] - 1, encode)
        whole = tf.strings.reduce_join(parts)
        return {**example, "inputs": tokens, "inputs_pretokenized": whole}

    targets = {name: output_features[name] for name in output_features if name != "inputs"}
    dataset = seqio.preprocessors.tokenize(dataset, output_features=targets)
    return dataset.map(tokenize, num_parallel_calls=tf.data.AUTOTUNE)


def _fitted(parts: Any, whole: Any, room: int, encode: Any) -> Any:
    """Returns the tokens of parts with their fields cut, by bisection over characters."""
    is_field = tf.range(tf.size(parts)) % 2 == 1
    lengths = tf.strings.length(parts, unit="UTF8_CHAR")

    def cut_to(most: Any) -> Any:
        kept = tf.where(is_field, tf.minimum(lengths, most), lengths)
        cut = tf.strings.substr(parts, tf.zeros_like(kept), kept, unit="UTF8_CHAR")
        return tf.ensure_shape(encode(tf.strings.reduce_join(cut)), [None])

    def halve(fits: Any, too_long: Any) -> Any:
        middle = (fits + too_long) // 2
        right = tf.size(cut_to(middle)) <= room
        return tf.where(right, middle, fits), tf.where(right, too_long, middle)

    def search() -> Any:
        bounds = (tf.constant(0), tf.reduce_max(tf.where(is_field, lengths, 0)))
        most, _ = tf.while_loop(lambda fits, too_long: too_long - fits > 1, halve, bounds)
        return cut_to(most)

    return tf.cond(tf.size(whole) <= room, lambda: tf.ensure_shape(whole, [None]), search)
