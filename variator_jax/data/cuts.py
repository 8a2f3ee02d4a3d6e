"""How many texts of a task are longer than its feature lengths, and so are cut.

Both engines and `variator infer` print it before they start. Span corruption fits its text into the
inputs; what counts are targets that are longer than theirs.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from variator_jax.data.batches import check_request, task_or_mixture, tasks_of
from variator_jax.data.docs_corpus import is_built
from variator_jax.data.spec import get_spec, has_spec
from variator_jax.data.tasks import LazySource
from variator_jax.data.vocabulary import DocsVocabulary
from variator_jax.files import is_url

SAMPLE = 2_000  # examples of a task that are counted before a training run


@dataclasses.dataclass(frozen=True)
class Cuts:
    """How many of the examples counted are cut.

    Attributes:
      task: its name.
      split: of it.
      examples: how many were counted.
      sampled: whether these are the first of more.
      cut: feature -> how many of its texts are longer than its length, EOS included.
      lengths: feature -> its length.
    """

    task: str
    split: str
    examples: int
    sampled: bool
    cut: Mapping[str, int]
    lengths: Mapping[str, int]

    def __str__(self) -> str:
        first = "the first " if self.sampled else ""
        counts = " and ".join(
            f"{count:,} {name} ({count / max(self.examples, 1):.1%}) to {self.lengths[name]} tokens"
            for name, count in self.cut.items()
        )
        return f"{self.task}, {self.split}: of {first}{self.examples:,} examples, cut are {counts}"


def count_cuts(
    name: str, split: str, lengths: Mapping[str, int], most: int | None = None
) -> list[Cuts]:
    """Counts the texts that are cut, in each task of a task or mixture.

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
    counted = []
    for task in tasks_of(provider, split):
        corrupts = has_spec(task.name) and get_spec(task.name).kind == "span_corruption"
        # Corruption fills the inputs, whatever length the targets then have.
        given = (
            {"inputs": lengths["inputs"], "targets": 2 * lengths["inputs"]} if corrupts else None
        )
        rows = task.get_dataset(given, split, shuffle=False, num_epochs=1)
        rows = rows.map(lambda row: {feature: row[feature] for feature in lengths})
        cut, examples = dict.fromkeys(lengths, 0), 0
        for row in rows.take(-1 if most is None else most + 1).as_numpy_iterator():
            if examples == most:
                counted.append(Cuts(task.name, split, examples, True, cut, lengths))
                break
            examples += 1
            for feature, length in lengths.items():
                cut[feature] += len(row[feature]) > length
        else:
            counted.append(Cuts(task.name, split, examples, False, cut, lengths))
    return counted


def describe_data(
    name: str, split: str, lengths: Mapping[str, int], most: int | None = SAMPLE
) -> list[str]:
    """Returns the lines that a run begins with: how labels are read, and what is cut.

    Raises:
      DataError: as `count_cuts`.
    """
    tasks = [task.name for task in tasks_of(task_or_mixture(name), split)]
    notes = [f"{task}: {get_spec(task).note}" for task in tasks if has_spec(task)]
    notes = [note for note in notes if not note.endswith(": ")]
    return [*notes, *map(str, count_cuts(name, split, lengths, most))]


def describe_local(name: str, splits: Sequence[str], lengths: Mapping[str, int]) -> list[str]:
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
    for task in getattr(provider, "tasks", [provider]):
        vocabulary = task.output_features["inputs"].vocabulary
        if not isinstance(task.source, LazySource):
            return False
        if isinstance(vocabulary, DocsVocabulary):
            if not is_built():
                return False
        elif is_url(getattr(vocabulary, "sentencepiece_model_file", "")):
            return False
    return True
