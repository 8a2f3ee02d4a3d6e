"""T5's span corruption, as seqio preprocessors that work under T5X too.

The noise is that of the T5 paper (section 3.1.4, "corrupting spans"), as its code draws it: text
and noise spans alternate, text first and noise last, every way of cutting equally likely; 15 % of
the tokens are noise, in spans of 3 on average. Sentinels count down from the vocabulary's last id.
It runs as a TensorFlow graph: Python inside a pipeline is slow and keeps a process from ending.
"""

from collections.abc import Mapping
from typing import Any

from absl import logging

from variator_jax.data._tf import seqio, tf
from variator_jax.errors import DataError
from variator_jax.texts import PieceTokenizer

NOISE_DENSITY = 0.15
MEAN_SPAN_LENGTH = 3.0
_DEFAULT_LENGTHS = {"inputs": 512, "targets": 128}
_TEXTS_JOINED = 512  # how many texts are joined before they are cut into chunks


def tokenize_and_chunk(
    dataset: Any, sequence_length: Mapping[str, int] | None, output_features: Mapping[str, Any]
) -> Any:
    """Joins the tokens of consecutive texts and cuts them so that corruption fills the inputs.

    Args:
      dataset: examples whose 'targets' are one text each.
      sequence_length: lengths of 'inputs' and 'targets'; None means 512 and 128.
      output_features: seqio's features; the targets' vocabulary is used.

    Returns:
      A dataset of {'targets': int32 [rows, chunk]}: all chunks of some hundred texts, and after
      them one shorter row.
    """
    dataset, chunk = tokenize(dataset, sequence_length, output_features)

    def cut(tokens: Any) -> Any:
        full = tf.size(tokens) // chunk * chunk
        rows = tf.data.Dataset.from_tensors(tf.reshape(tokens[:full], [-1, chunk]))
        return rows.concatenate(tf.data.Dataset.from_tensors(tokens[tf.newaxis, full:]))

    dataset = dataset.ragged_batch(_TEXTS_JOINED).map(lambda texts: texts.flat_values)
    return without_stubs(dataset.flat_map(cut))


def tokenize(
    dataset: Any, sequence_length: Mapping[str, int] | None, output_features: Mapping[str, Any]
) -> tuple[Any, int]:
    """Returns the tokens of each text, int32 [tokens], and how many tokens fill the inputs."""
    vocabulary = output_features["targets"].vocabulary
    chunk = chunk_for(sequence_length or _DEFAULT_LENGTHS, sentinel_count(vocabulary))

    def encode(example: Mapping[str, Any]) -> Any:
        # One text at a time: seqio's bytes of several would have to be of one length.
        return tf.ensure_shape(vocabulary.encode_tf(example["targets"]), [None])

    return dataset.map(encode, num_parallel_calls=tf.data.AUTOTUNE), chunk


def without_stubs(rows: Any) -> Any:
    """Makes {'targets'} of int32 [rows, length]; leaves out what has no token to keep."""
    dataset = rows.filter(lambda tokens: tf.size(tokens) >= 2)
    return dataset.map(lambda tokens: {"targets": tokens})


def corrupt_spans(dataset: Any, output_features: Mapping[str, Any]) -> Any:
    """Turns {'targets': int32 [rows, n]} into a span corruption {'inputs', 'targets'} for each row.

    Neither ends with EOS. The inputs have sentinel i in place of the i-th noise span; the targets
    are the noise spans, each after its sentinel. Every pass over the data draws new spans.
    """
    vocabulary = output_features["targets"].vocabulary
    end = getattr(vocabulary, "sentinels_end", vocabulary.vocab_size)

    @seqio.map_over_dataset(num_seeds=2)
    def corrupt(example: Mapping[str, Any], seeds: Any) -> dict[str, Any]:
        tokens = tf.cast(example["targets"], tf.int32)
        mask = noise_mask(tf.shape(tokens), seeds)
        replaced = {"inputs": mask, "targets": ~mask}
        return {name: replace_spans(tokens, spans, end) for name, spans in replaced.items()}

    return corrupt(dataset).unbatch()


def noise_counts(length: int) -> tuple[int, int]:
    """Returns how many of `length` tokens are noise, and in how many spans."""
    noise = min(max(round(length * NOISE_DENSITY), 1), max(length - 1, 1))
    return noise, max(min(round(noise / MEAN_SPAN_LENGTH), noise, length - noise), 1)


def corrupted_lengths(length: int) -> tuple[int, int]:
    """Returns the lengths of inputs and targets, EOS included, that `length` tokens turn into."""
    noise, spans = noise_counts(length)
    return length - noise + spans + 1, noise + spans + 1


def chunk_length(inputs_length: int) -> int:
    """Returns how many tokens of text fill `inputs_length` after corruption, EOS included.

    Raises:
      DataError: if `inputs_length` is too short for one token, one sentinel and EOS.
    """
    if inputs_length < 3:
        raise DataError(f"span corruption needs inputs of at least 3 tokens, not {inputs_length}")
    lengths = range(2 * inputs_length)  # beyond what fits
    return max(n for n in lengths if corrupted_lengths(n)[0] <= inputs_length)


def sentinel_count(vocabulary: seqio.Vocabulary) -> int:
    """Returns how many sentinels count down from a vocabulary's end, those of its file included.

    Raises:
      DataError: if the file's own are elsewhere: ids at the end would be ordinary pieces.
    """
    if vocabulary.extra_ids or not isinstance(vocabulary, seqio.SentencePieceVocabulary):
        return vocabulary.extra_ids
    own, last = PieceTokenizer(vocabulary.tokenizer).sentinels, vocabulary.vocab_size - 1
    if wrong := [name for name, i in own.items() if name != f"<extra_id_{last - i}>"]:
        expected = "span corruption counts sentinels down from the last piece, <extra_id_0>"
        raise DataError(
            f"{vocabulary.sentencepiece_model_file} has {wrong[0]} in another place: {expected}"
        )
    return len(own)


def chunk_for(lengths: Mapping[str, int], extra_ids: int) -> int:
    """Returns how many tokens of text fill the inputs; warns if the targets will be cut.

    Raises:
      DataError: if the vocabulary has sentinels, but too few.
    """
    chunk = chunk_length(lengths["inputs"])
    _, spans = noise_counts(chunk)
    if 0 < extra_ids < spans:
        what = f"{lengths['inputs']} input tokens need {spans} sentinels"
        raise DataError(f"{what}, but the vocabulary has {extra_ids}; give shorter inputs")
    _, targets = corrupted_lengths(chunk)
    if lengths.get("targets", targets) < targets:
        logging.warning(
            "span corruption of %d input tokens makes targets of %d tokens; they are cut to %d",
            *(lengths["inputs"], targets, lengths["targets"]),
        )
    return chunk


def noise_mask(shape: Any, seeds: Any) -> Any:
    """Returns which tokens are noise: bool [rows, length].

    Args:
      shape: int32 [2], the number of rows and their length, 2 or more.
      seeds: int [2, 2].
    """
    rows, length = shape[0], shape[1]
    noise = _rounded(tf.cast(length, tf.float64) * NOISE_DENSITY)
    noise = tf.minimum(tf.maximum(noise, 1), length - 1)
    spans = _rounded(tf.cast(noise, tf.float64) / MEAN_SPAN_LENGTH)
    spans = tf.maximum(tf.minimum(spans, tf.minimum(noise, length - noise)), 1)
    text_lengths = _random_lengths(rows, length - noise, spans, seeds[0])
    noise_lengths = _random_lengths(rows, noise, spans, seeds[1])
    # [rows, spans, 2] -> [rows * spans * 2]: text, noise, text, noise, ...
    lengths = tf.reshape(tf.stack([text_lengths, noise_lengths], 2), [-1])
    return tf.reshape(tf.repeat(tf.range(tf.size(lengths)) % 2 == 1, lengths), shape)


def _rounded(number: Any) -> Any:
    return tf.cast(tf.round(number), tf.int32)  # half to even, as Python does


def _random_lengths(rows: Any, total: Any, parts: Any, seed: Any) -> Any:
    """Cuts `total` items into non-empty parts, every way equally likely: int32 [rows, parts]."""
    order = tf.argsort(tf.random.stateless_uniform([rows, total - 1], seed))
    cuts = tf.sort(order[:, : parts - 1]) + 1
    ends = tf.pad(tf.pad(cuts, [[0, 0], [1, 0]]), [[0, 0], [0, 1]], constant_values=total)
    return ends[:, 1:] - ends[:, :-1]


def replace_spans(tokens: Any, mask: Any, vocab_size: int) -> Any:
    """Puts one sentinel in place of each span of the mask: the last id, then downwards.

    Args:
      tokens: int32 [rows, length].
      mask: bool [rows, length], with as many tokens and spans in each row.
      vocab_size: one more than the id of the first sentinel.

    Returns:
      int32 [rows, kept tokens + spans].
    """
    begins = mask & ~tf.pad(mask[:, :-1], [[0, 0], [1, 0]])
    sentinels = vocab_size - tf.cumsum(tf.cast(begins, tf.int32), axis=1)
    kept = tf.boolean_mask(tf.where(begins, sentinels, tokens), ~mask | begins)
    return tf.reshape(kept, [tf.shape(tokens)[0], -1])


#: Of a task whose source gives {'targets': text}.
PREPROCESSORS = (tokenize_and_chunk, corrupt_spans, seqio.preprocessors.append_eos_after_trim)
