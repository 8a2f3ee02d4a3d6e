"""Which examples `variator infer` answers: text and tokens side by side, in the task's own order.

They come through seqio's own pipeline, since the text is wanted too. seqio is imported only when a
task is asked for.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from variator_jax.errors import DataError, did_you_mean

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class InferData:
    """The tasks to answer, and how their examples are batched.

    Attributes:
      task: a seqio task, or a mixture whose tasks are answered one by one.
      feature_lengths: tokens of `inputs` and `targets`; longer ones are cut. A prediction has as
        many tokens as `targets` at the most.
      batch_size: examples that are answered at once.
      split: which examples.
    """

    task: str
    feature_lengths: Mapping[str, int]
    batch_size: int = 32
    split: str = "validation"

    def tasks(self) -> list[Any]:
        """The single seqio tasks that have the split; DataError for anything that cannot work."""
        from variator_jax.data.batches import task_or_mixture

        provider = task_or_mixture(self.task)
        lengths = self.feature_lengths
        if set(lengths) != {"inputs", "targets"} or any(int(n) < 1 for n in lengths.values()):
            raise DataError(
                f"feature lengths {dict(lengths)!r}: expected positive 'inputs' and 'targets'"
            )
        if not isinstance(self.batch_size, int) or self.batch_size < 1:
            raise DataError(f"BATCH_SIZE is {self.batch_size!r}; it must be 1 or more.")
        if self.split not in provider.splits:
            raise DataError(
                f"{self.task!r} has no split {self.split!r}."
                f"{did_you_mean(self.split, provider.splits)} "
                f"Splits: {', '.join(sorted(provider.splits))}"
            )
        tasks = getattr(provider, "tasks", [provider])
        return [task for task in tasks if self.split in task.splits]

    def batches(self, task: Any, start: int) -> Iterator[tuple[list[dict[str, Any]], Batch]]:
        """One pass in the task's own order, from example `start` on.

        Yields:
          What is known of each example before tokens were made of it (fields `*_pretokenized`), and
          a batch in T5X's layout, of at most `batch_size` rows.
        """
        from variator_jax.data._tf import seqio, tf

        lengths = {name: int(length) for name, length in self.feature_lengths.items()}
        # The seed decides the noise of span corruption; it is T5X's in runs/infer.gin.
        examples = task.get_dataset(lengths, self.split, shuffle=False, seed=0, num_epochs=1)
        features = seqio.EncDecFeatureConverter(pack=False)(examples, lengths)
        pairs = tf.data.Dataset.zip((examples, features)).skip(start).prefetch(tf.data.AUTOTUNE)
        rows = pairs.as_numpy_iterator()
        while part := self._read(task, rows):
            inputs, arrays = [_inputs(example) for example, _ in part], [row for _, row in part]
            yield inputs, {name: np.stack([row[name] for row in arrays]) for name in arrays[0]}

    def _read(self, task: Any, rows: Iterator[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
        from variator_jax.data._tf import tf

        try:
            return list(itertools.islice(rows, self.batch_size))
        except tf.errors.OpError as error:
            reason = error.message.splitlines()[0]
            raise DataError(f"task {task.name!r} cannot be read: {reason}") from error


def _inputs(example: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that T5X writes: those of an example before it was tokenised."""
    return {k: _plain(v) for k, v in example.items() if k.endswith("_pretokenized")}


def _plain(value: Any) -> Any:
    """`value` in JSON's types."""
    if isinstance(value, bytes):
        return value.decode("utf8", errors="replace")
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    return [_plain(item) for item in value] if isinstance(value, list) else value
