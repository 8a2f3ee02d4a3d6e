"""seqio preprocessors: span corruption of running text.

They work in any seqio task, under T5X too. The noise itself is drawn in `noise`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

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
    """Turns {'targets': int32 [n]} into T5's span corruption {'inputs', 'targets'}, without EOS."""
    vocab_size = output_features["targets"].vocabulary.vocab_size

    def corrupt_one(tokens: np.ndarray, seed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(np.asarray(seed).view(np.uint32))
        inputs, targets = noise.corrupt(tokens[None], rng, vocab_size)
        return inputs[0], targets[0]

    @seqio.map_over_dataset(num_seeds=1)
    def corrupt(example: Mapping[str, Any], seed: Any) -> dict[str, Any]:
        seed = tf.cast(seed, tf.int32)
        pair = tf.numpy_function(corrupt_one, [example["targets"], seed], [tf.int32, tf.int32])
        return {
            key: tf.ensure_shape(value, [None])
            for key, value in zip(("inputs", "targets"), pair, strict=True)
        }

    return corrupt(dataset)
