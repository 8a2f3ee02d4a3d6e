"""seqio preprocessors: span corruption of running text.

They work in any seqio task, under T5X too. `noise` says what the noise is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from variator_jax.data import noise
from variator_jax.data._tf import seqio, tf

_DEFAULT_LENGTHS = {"inputs": 512, "targets": 128}
_TEXTS_JOINED = 512  # how many texts are joined before they are cut into chunks


def span_corruption_preprocessors() -> list[Callable[..., Any]]:
    """Returns the preprocessors of a span corruption task whose source gives {'targets': text}.

    Density is 0.15 and the mean span 3. Every pass over the text draws new spans.
    """
    return [
        tokenize_and_chunk,
        corrupt_spans,
        seqio.preprocessors.append_eos_after_trim,
    ]


def tokenize_and_chunk(
    dataset: Any, sequence_length: Mapping[str, int] | None, output_features: Mapping[str, Any]
) -> Any:
    """Joins the tokens of consecutive texts and cuts them so that corruption fills the inputs.

    Args:
      dataset: examples whose 'targets' are one text each.
      sequence_length: lengths of 'inputs' and 'targets'; None means 512 and 128.
      output_features: seqio's features; the targets' vocabulary is used.

    Returns:
      A dataset of {'targets': int32 [chunk]}; the last chunk of every few hundred texts is shorter.
    """
    vocabulary = output_features["targets"].vocabulary
    chunk = noise.check_room(sequence_length or _DEFAULT_LENGTHS, vocabulary.extra_ids)

    def cut(texts: Any) -> Any:
        tokens = vocabulary.encode_tf(texts)
        tokens = tokens.flat_values if isinstance(tokens, tf.RaggedTensor) else tokens
        starts = tf.data.Dataset.range(0, tf.size(tokens, out_type=tf.int64), chunk)
        return starts.map(lambda start: {"targets": tokens[start : start + chunk]})

    dataset = dataset.map(lambda example: example["targets"]).batch(_TEXTS_JOINED).flat_map(cut)
    return dataset.filter(lambda example: tf.size(example["targets"]) >= 2)


def corrupt_spans(dataset: Any, output_features: Mapping[str, Any]) -> Any:
    """Turns {'targets': int32 [n]} into T5's span corruption {'inputs', 'targets'}, without EOS.

    The noise has the shape and distribution of `noise.corrupt`, but is drawn by TensorFlow: Python
    in the pipeline would be slow, and hold the process up at its end.
    """
    vocab_size = output_features["targets"].vocabulary.vocab_size

    @seqio.map_over_dataset(num_seeds=2)
    def corrupt(example: Mapping[str, Any], seeds: Any) -> dict[str, Any]:
        tokens = tf.cast(example["targets"], tf.int32)
        mask = _noise_mask(tf.size(tokens), seeds)
        return {
            "inputs": _replace_spans(tokens, mask, vocab_size),
            "targets": _replace_spans(tokens, ~mask, vocab_size),
        }

    return corrupt(dataset)


def _noise_mask(length: Any, seeds: Any) -> Any:
    """`noise.noise_mask` of one row of `length` tokens, 2 or more: bool [length]."""
    density, mean_span = noise.NOISE_DENSITY, noise.MEAN_SPAN_LENGTH
    wanted = _rounded(tf.cast(length, tf.float64) * density)
    count = tf.minimum(tf.maximum(wanted, 1), length - 1)
    wanted = tf.minimum(_rounded(tf.cast(count, tf.float64) / mean_span), length - count)
    spans = tf.maximum(tf.minimum(wanted, count), 1)
    lengths = [_random_lengths(length - count, spans, seeds[0])]
    lengths.append(_random_lengths(count, spans, seeds[1]))
    # [spans, 2] -> [2 * spans]: text, noise, text, noise, ...
    return tf.repeat(tf.range(2 * spans) % 2 == 1, tf.reshape(tf.stack(lengths, 1), [-1]))


def _rounded(number: Any) -> Any:
    return tf.cast(tf.round(number), tf.int32)  # half to even, as Python does


def _random_lengths(total: Any, parts: Any, seed: Any) -> Any:
    """Cuts `total` items into `parts` non-empty parts, every way equally likely: int32 [parts]."""
    order = tf.argsort(tf.random.stateless_uniform([total - 1], seed))
    cuts = tf.sort(order[: parts - 1]) + 1
    ends = tf.concat([[0], cuts, [total]], 0)
    return ends[1:] - ends[:-1]


def _replace_spans(tokens: Any, mask: Any, vocab_size: int) -> Any:
    """`noise.replace_spans` of one row."""
    begins = mask & ~tf.concat([[False], mask[:-1]], 0)
    sentinels = vocab_size - tf.cumsum(tf.cast(begins, tf.int32))
    return tf.boolean_mask(tf.where(begins, sentinels, tokens), ~mask | begins)
