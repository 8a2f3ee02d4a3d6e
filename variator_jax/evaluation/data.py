"""Which examples are scored or answered, and how they are batched. seqio is imported when used."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from variator_jax.errors import DataError

Batch = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class EvalData:
    """The tasks of an evaluation or inference.

    Attributes:
      task: a seqio task, or a mixture whose tasks are taken one by one.
      feature_lengths: tokens of `inputs` and `targets`; longer ones are cut. A prediction has at
        most as many tokens as `targets`.
      batch_size: examples at once.
      split: which examples.
    """

    task: str
    feature_lengths: Mapping[str, int]
    batch_size: int = 64
    split: str = "validation"

    def tasks(self) -> list[str]:
        """Names of the single tasks that have the split.

        Raises:
          DataError: for an unknown task or split, lengths or a batch size that cannot be.
        """
        from variator_jax.data.batches import check_request, task_or_mixture, tasks_of

        provider = task_or_mixture(self.task)
        check_request(provider, self.split, self.feature_lengths, self.batch_size)
        return [task.name for task in tasks_of(provider, self.split)]

    def batches(self, task: str) -> Iterator[Batch]:
        """One pass over a task in T5X's layout, the last batch filled up with empty rows."""
        from variator_jax.data.batches import batches

        lengths, size = self.feature_lengths, self.batch_size
        return batches(task, self.split, size, lengths, shuffle=False, repeat=False, pad_last=True)

    def examples(self, task: str, start: int = 0) -> Iterator[tuple[list[dict[str, Any]], Batch]]:
        """One pass in the task's own order, from example `start` on, with the texts.

        Yields:
          The fields of each example before it was tokenised (`*_pretokenized`), and a batch in
          T5X's layout, of at most `batch_size` rows.

        Raises:
          DataError: if the task cannot be read.
        """
        from variator_jax.data._tf import seqio, tf
        from variator_jax.data.batches import task_or_mixture

        lengths = {name: int(length) for name, length in self.feature_lengths.items()}
        # The seed decides the noise of span corruption; it is T5X's in runs/infer.gin.
        dataset = task_or_mixture(task).get_dataset(
            lengths, self.split, shuffle=False, seed=0, num_epochs=1
        )
        features = seqio.EncDecFeatureConverter(pack=False)(dataset, lengths)
        pairs = tf.data.Dataset.zip((dataset, features)).skip(start).prefetch(tf.data.AUTOTUNE)
        remaining = pairs.as_numpy_iterator()
        try:
            while rows := list(itertools.islice(remaining, self.batch_size)):
                inputs, arrays = [_texts(example) for example, _ in rows], [row for _, row in rows]
                yield inputs, {name: np.stack([row[name] for row in arrays]) for name in arrays[0]}
        except tf.errors.OpError as error:
            reason = error.message.splitlines()[0]
            raise DataError(f"task {task!r} cannot be read: {reason}") from error


def _texts(example: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that T5X writes: those of an example before it was tokenised."""
    return {k: _plain(v) for k, v in example.items() if k.endswith("_pretokenized")}


def _plain(value: Any) -> Any:
    """`value` in JSON's types."""
    if isinstance(value, bytes):
        return value.decode("utf8", errors="replace")
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    return [_plain(item) for item in value] if isinstance(value, list) else value
