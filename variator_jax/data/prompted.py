"""How the paper's data sets become seqio tasks: prompts with a sentinel, from TFDS or from files.

A prompt ends with '<extra_id_0>', and the target says what stands in its place: '<extra_id_0> Yes'.
That is the form in which a T5 saw text while it was pre-trained.
"""

from __future__ import annotations

import functools
import string
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from variator_jax.data import vocabulary as vocabularies
from variator_jax.data._tf import seqio, tf
from variator_jax.data.official_files import local_folder
from variator_jax.data.registry import is_registered, origin_of, remember
from variator_jax.data.sources import Examples, LazySource, TfdsSource, add_task, text_preprocessors
from variator_jax.data.spec import TaskSpec, prefix_ids, verbalizer_ids

SENTINEL = "<extra_id_0>"


def named(
    dataset: str, vocabulary: seqio.Vocabulary, data_dir: str | None, *further: Any
) -> tuple[str, str]:
    """Returns a task's name, and its origin (see `registry`); reads nothing.

    The name is the data set's where T5's own vocabulary and TFDS are used with no further
    arguments; else it ends with a hash of them, the same in every process of this machine.
    """
    parts = [dataset, vocabularies.identity(vocabulary), _place(data_dir), *further]
    plain = vocabularies.is_t5(vocabulary) and data_dir is None and not any(further)
    origin = origin_of(parts)
    return (dataset if plain else f"{dataset}_{origin[:8]}"), origin


def _place(data_dir: str | None) -> str | None:
    if data_dir is None or vocabularies.is_url(data_dir):
        return data_dir
    return str(local_folder(data_dir))


def prompt(template: str, sentinel: bool) -> str:
    """Returns a template as it is, or without the sentinel it ends with."""
    return template if sentinel else template.removesuffix(".").removesuffix(f" {SENTINEL}")


def register(
    spec: TaskSpec,
    origin: str,
    vocabulary: seqio.Vocabulary,
    source: Any,
    render: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
) -> str:
    """Registers a task over a source of rendered texts, or of raw ones with `render`, once.

    Args:
      spec: of the task.
      origin: what the task is made from (`named`).
      vocabulary: of both features.
      source: its examples are 'inputs' and 'targets', or what `render` takes.
      render: from an example's tensors to those of 'inputs' and 'targets'.

    Returns:
      The task's name.
    """
    if is_registered(spec.name, origin):
        return spec.name

    def rendered(dataset: Any, output_features: Mapping[str, Any]) -> Any:
        check_tokens(spec, output_features["targets"].vocabulary)
        return dataset.map(render, num_parallel_calls=tf.data.AUTOTUNE)

    steps = [*([rendered] if render else []), *text_preprocessors()]
    add_task(spec.name, source, steps, vocabulary, spec)
    return remember(spec.name, origin, spec)


def files_source(
    spec: TaskSpec,
    vocabulary: seqio.Vocabulary,
    files: Mapping[str, Path],
    read: Callable[[Path], Examples],
) -> LazySource:
    """Returns a source that reads, renders and keeps a split when it is first asked for."""

    @functools.cache
    def make(split: str) -> Examples:
        check_tokens(spec, vocabulary)
        return read(files[split])

    return LazySource(make, files)


def tfds_source(dataset: str, splits: Mapping[str, str]) -> TfdsSource:
    """Returns a source of TensorFlow Datasets; `splits` names its splits: ours -> its own."""
    return TfdsSource(dataset, splits=dict(splits))


def check_tokens(spec: TaskSpec, vocabulary: seqio.Vocabulary) -> None:
    """Refuses a vocabulary that lacks the prefix or cannot tell the verbalizers apart."""
    if spec.labels:
        verbalizer_ids(spec, vocabulary.encode, vocabulary.unk_id)
    else:
        prefix_ids(spec, vocabulary.encode, vocabulary.unk_id)


def fill(template: str, fields: Mapping[str, Any]) -> Any:
    """Returns a template with string tensors in place of its fields, as `str.format_map` would.

    Spaces round a field are dropped, as they are when the files are read.
    """
    parts: list[Any] = []
    for literal, field, _, _ in string.Formatter().parse(template):
        parts.append(literal)
        if field is not None:
            parts.append(tf.strings.strip(fields[field]))
    return tf.strings.join(parts)


def names_of(splits: Iterable[str]) -> dict[str, str]:
    """Returns splits that TFDS calls as we do."""
    return {split: split for split in splits}
