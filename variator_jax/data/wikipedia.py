"""Span corruption on Wikipedia, for plugin pre-training: the paper's data.

An example is one passage of about 128 words, never two that were joined, and ends in padding where
it is shorter than the inputs; so plugins meet padding already here. `file_task` has the other way,
running text without gaps, over one file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from variator_jax.data import prompted, span_corruption
from variator_jax.data._tf import seqio, tf
from variator_jax.data.rows import read_text_lines, text_files
from variator_jax.data.spec import TaskSpec
from variator_jax.data.tasks import TfdsSource, add_task, is_registered
from variator_jax.data.vocabulary import vocabulary_of

TFDS = "wikipedia/20230601.en:1.0.0"
SPLITS = {"train": "train[:99%]", "validation": "train[99%:]"}
PASSAGE_WORDS = 128
SHORTEST_PASSAGE = 16  # words: the end of an article, or a stub
_SHUFFLED = 2_000  # passages: those of an article follow each other in the file
_DEFAULT_LENGTHS = {"inputs": 224, "targets": 48}


def wikipedia_task(vocabulary: Any = None, data_dir: str | None = None) -> str:
    """Registers `wikipedia_span_corruption`, once, and returns its name; reads no data.

    Args:
      vocabulary: as in `glue.glue_task`.
      data_dir: a folder, or its URL, with .txt or .txt.gz files of one text a line; those with
        'valid' or 'dev' in their names are for validation. They are streamed, however large.
        TensorFlow Datasets' English Wikipedia if not given, of which a hundredth is held out.

    Raises:
      DataError: if the folder lacks files for training or validation.
    """
    vocabulary = vocabulary_of(vocabulary)
    name = prompted.named("wikipedia_span_corruption", vocabulary, data_dir)
    if is_registered(name):
        return name
    source: Any = TfdsSource(TFDS, splits=SPLITS)
    if data_dir is not None:
        source = seqio.FileDataSource(read_text_lines, text_files(data_dir))
    steps: list[Callable[..., Any]] = [
        cut_passages,
        tokenize_passages,
        span_corruption.corrupt_spans,
        seqio.preprocessors.append_eos_after_trim,
    ]
    return add_task(name, source, steps, vocabulary, TaskSpec(name, "span_corruption"), _SHUFFLED)


def cut_passages(dataset: Any) -> Any:
    """Cuts {'text'} of articles into {'targets'} of 128 words; drops ends of less than 16."""

    def cut(example: Mapping[str, Any]) -> Any:
        words = tf.strings.split(example["text"])
        starts = tf.data.Dataset.range(0, tf.size(words, out_type=tf.int64), PASSAGE_WORDS)
        pieces = starts.map(lambda start: words[start : start + PASSAGE_WORDS])
        pieces = pieces.filter(lambda piece: tf.size(piece) >= SHORTEST_PASSAGE)
        return pieces.map(lambda piece: {"targets": tf.strings.reduce_join(piece, separator=" ")})

    return dataset.flat_map(cut)


def tokenize_passages(
    dataset: Any, sequence_length: Mapping[str, int] | None, output_features: Mapping[str, Any]
) -> Any:
    """Tokenizes {'targets'} to [1, tokens], cut to fit into the inputs after corruption."""
    vocabulary = output_features["targets"].vocabulary
    chunk = span_corruption.chunk_for(sequence_length or _DEFAULT_LENGTHS, vocabulary.extra_ids)

    def tokenize(example: Mapping[str, Any]) -> dict[str, Any]:
        return {"targets": vocabulary.encode_tf(example["targets"])[tf.newaxis, :chunk]}

    dataset = dataset.map(tokenize, num_parallel_calls=tf.data.AUTOTUNE)
    return dataset.filter(lambda example: tf.size(example["targets"]) >= 2)
