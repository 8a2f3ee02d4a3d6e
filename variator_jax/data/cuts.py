"""How many texts of a task are longer than its feature lengths, and so are cut.

Both engines and `variator infer` print it before they start. Span corruption fits its text into the
inputs; what counts are targets that are longer than theirs.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from variator_jax.data._tf import tf
from variator_jax.data.batches import Lengths, check_request, task_or_mixture, tasks_of
from variator_jax.data.docs_corpus import is_built
from variator_jax.data.spec import get_spec, has_spec
from variator_jax.data.tasks import LazySource
from variator_jax.data.vocabulary import DocsVocabulary
from variator_jax.files import is_url

SAMPLE = 2_000  # examples of a task that are counted before a training run


def count_cuts(name: str, split: str, lengths: Lengths, most: int | None = None) -> list[str]:
    """Counts the texts that are cut; returns a line for each task of a task or mixture.

    Args:
      name: a registered task or mixture.
      split: a split of it.
      lengths: {'inputs': L, 'targets': T}, EOS included.
      most: how many examples of each task are read; None for all.

    Raises:
      DataError: for an unknown task or split, or lengths that leave no room.
    """
    provider = task_or_mixture(name)
    lengths = check_request(provider, split, lengths, 1)
    lines = []
    for task in tasks_of(provider, split):
        corrupts = has_spec(task.name) and get_spec(task.name).kind == "span_corruption"
        # Corruption fills the inputs, whatever length the targets then have.
        given = {**lengths, "targets": 2 * lengths["inputs"]} if corrupts else None
        rows = task.get_dataset(given, split, shuffle=False, num_epochs=1)
        rows = rows.map(lambda row: tf.stack([tf.size(row[x]) > lengths[x] for x in lengths]))
        rows = rows.take(-1 if most is None else most + 1).as_numpy_iterator()
        cut = np.fromiter(rows, np.dtype((bool, len(lengths))))  # [examples, features]
        first = "the first " if most is not None and len(cut) > most else ""
        cut = cut[:most]
        counts = " and ".join(
            f"{count:,} {feature} ({count / max(len(cut), 1):.1%}) to {lengths[feature]} tokens"
            for feature, count in zip(lengths, cut.sum(axis=0), strict=True)
        )
        lines.append(f"{task.name}, {split}: of {first}{len(cut):,} examples, cut are {counts}")
    return lines


def describe_data(name: str, split: str, lengths: Lengths, most: int | None = SAMPLE) -> list[str]:
    """Returns the lines that a run begins with: how labels are read, and what is cut.

    Raises:
      DataError: as `count_cuts`.
    """
    tasks = tasks_of(task_or_mixture(name), split)
    specs = [get_spec(task.name) for task in tasks if has_spec(task.name)]
    notes = [f"{spec.name}: {spec.note}" for spec in specs if spec.note]
    return [*notes, *count_cuts(name, split, lengths, most)]


def describe_local(name: str, splits: Sequence[str], lengths: Lengths) -> list[str]:
    """Returns `describe_data` of some splits where nothing must be built or downloaded for it.

    Raises:
      DataError: as `count_cuts`, wherever the data are.
    """
    provider = task_or_mixture(name)
    splits = [split for split in splits if split in provider.splits]
    for split in splits:
        check_request(provider, split, lengths, 1)
    if not _at_hand(provider):
        return [f"{name}: texts that are cut are counted when the data are read"]
    lines = (describe_data(name, split, lengths) for split in splits)
    return list(dict.fromkeys(itertools.chain.from_iterable(lines)))


def _at_hand(provider: Any) -> bool:
    """Returns whether a task's texts and vocabulary are on this machine, nothing to be built."""

    def is_here(task: Any) -> bool:
        vocabulary = task.output_features["inputs"].vocabulary
        if not isinstance(task.source, LazySource):
            return False
        if isinstance(vocabulary, DocsVocabulary):
            return is_built()
        return not is_url(getattr(vocabulary, "sentencepiece_model_file", ""))

    return all(map(is_here, getattr(provider, "tasks", [provider])))
