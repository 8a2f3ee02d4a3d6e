"""The documentation tasks, registered with seqio on import; nothing is built until one is read.

`docs_span_corruption` is for pre-training; `docs_topic`, `docs_pair` and `docs_name` are the tasks
that plugins are adapted to; `docs_tasks` mixes the three, `docs_labels` the first two, which are
classification. The examples come from `docs_examples`, the scoring from `spec`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from variator_jax.data import corpus, docs_examples
from variator_jax.data._tf import seqio
from variator_jax.data.sources import Examples, span_corruption_task, text_to_text_task
from variator_jax.data.spec import TaskSpec, register_spec
from variator_jax.data.vocabulary import docs_vocabulary

VALIDATION_CAP = 2_000

_MAKERS: dict[str, Callable[..., Examples]] = {
    "docs_span_corruption": docs_examples.text_examples,
    "docs_topic": docs_examples.topic_examples,
    "docs_pair": docs_examples.pair_examples,
    "docs_name": docs_examples.name_examples,
}


def docs_examples_of(task: str, split: str) -> Examples:
    """Returns the texts of one split of a documentation task, building the corpus if need be."""
    return _examples(task, split, str(corpus.ensure_corpus()))


@functools.lru_cache(maxsize=16)
def _examples(task: str, split: str, folder: str) -> Examples:
    records = _records(folder, split)
    if split == "train" or task == "docs_span_corruption":
        return _MAKERS[task](records)
    balanced = {"cap": VALIDATION_CAP // len(docs_examples.TOPICS)} if task == "docs_topic" else {}
    examples = _MAKERS[task](records, **balanced)
    train = _examples(task, "train", folder)
    return docs_examples.held_out(train, examples, task == "docs_pair", VALIDATION_CAP)


@functools.lru_cache(maxsize=4)
def _records(folder: str, split: str) -> list[dict[str, str]]:
    return corpus.read_split(corpus.Path(folder), split)


def _register() -> None:
    vocabulary = docs_vocabulary()
    spans, *answered = [
        TaskSpec("docs_span_corruption", "span_corruption"),
        TaskSpec("docs_topic", "classification", tuple(docs_examples.TOPICS)),
        TaskSpec("docs_pair", "classification", ("no", "yes")),
        TaskSpec("docs_name", "generation"),
    ]
    make = functools.partial(docs_examples_of, spans.name)
    span_corruption_task(spans.name, make, corpus.SPLITS, vocabulary)
    for spec in answered:
        make = functools.partial(docs_examples_of, spec.name)
        text_to_text_task(spec.name, make, corpus.SPLITS, vocabulary, spec)
    for spec in (spans, *answered):
        register_spec(spec)
    labelled = ["docs_topic", "docs_pair"]
    seqio.MixtureRegistry.add("docs_labels", labelled, default_rate=1.0)
    seqio.MixtureRegistry.add("docs_tasks", [*labelled, "docs_name"], default_rate=1.0)


if "docs_topic" not in seqio.TaskRegistry.names():
    _register()
