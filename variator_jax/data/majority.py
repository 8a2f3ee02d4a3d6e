"""What a task's score is without a model: always answering with the commonest target."""

from __future__ import annotations

import collections

from variator_jax.data._tf import seqio
from variator_jax.data.batches import task_or_mixture
from variator_jax.data.sources import LazySource
from variator_jax.data.spec import get_spec
from variator_jax.errors import DataError


def majority(task: str, split: str = "validation") -> float:
    """Returns the score (0 to 100) of always giving the commonest target of a split.

    Accuracy for classification; mean token F1 for generation.

    Raises:
      DataError: for a mixture, and for span corruption, which have no such score.
    """
    provider = task_or_mixture(task)
    if isinstance(provider, seqio.Mixture) or get_spec(task).kind == "span_corruption":
        raise DataError(f"{task!r} has no majority score: it is not a single task with answers")
    targets = _targets(provider, split)
    counts = collections.Counter(targets)
    if not counts:
        raise DataError(f"task {task!r} has no examples in the split {split!r}")
    answer = min(counts, key=lambda target: (-counts[target], target))
    if get_spec(task).kind == "classification":
        return 100.0 * counts[answer] / len(targets)
    return 100.0 * sum(n * _token_f1(answer, target) for target, n in counts.items()) / len(targets)


def _targets(task: seqio.Task, split: str) -> list[str]:
    if isinstance(task.source, LazySource):
        return [example["targets"] for example in task.source.make(split)]
    vocabulary = task.output_features["targets"].vocabulary
    dataset = task.get_dataset(None, split, shuffle=False)
    return [vocabulary.decode(list(e["targets"])) for e in dataset.as_numpy_iterator()]


def _token_f1(answer: str, target: str) -> float:
    found, wanted = collections.Counter(answer.split()), collections.Counter(target.split())
    common = sum((found & wanted).values())
    return 2.0 * common / (sum(found.values()) + sum(wanted.values())) if common else 0.0
