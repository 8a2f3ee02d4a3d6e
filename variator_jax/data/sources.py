"""seqio sources, and how a task is registered over one.

Constructing a source, and so registering a task, reads nothing: a `LazySource` makes its examples
when they are first asked for, a `TfdsSource` asks TensorFlow Datasets then.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from variator_jax.data._tf import seqio, tf
from variator_jax.data.preprocessors import span_corruption_preprocessors
from variator_jax.data.scoring import metric_functions, postprocessor
from variator_jax.data.spec import TaskSpec
from variator_jax.errors import DataError

Examples = list[dict[str, str]]


class LazySource(seqio.FunctionDataSource):
    """Gives the examples that `make(split)` returns: dicts of strings with the same keys.

    Constructing it, and so registering a task, calls nothing. `make` should cache.
    """

    def __init__(self, make: Callable[[str], Examples], splits: Iterable[str]):
        self.make = make

        def dataset_fn(split: str, shuffle_files: bool, seed: int | None = None) -> Any:
            examples = make(split)
            if shuffle_files:
                examples = list(examples)
                random.Random(seed).shuffle(examples)
            return as_dataset(examples)

        super().__init__(dataset_fn, splits=tuple(splits))

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: Any = None,
        **unused: Any,
    ) -> Any:
        """Returns the examples, shuffled as a whole: the parent's warning does not apply."""
        if shard_info and shard_info.num_shards > 1:
            raise ValueError("examples in memory are one shard; seqio shards the examples itself")
        return self._dataset_fn(split=split, shuffle_files=shuffle, seed=seed)

    def num_input_examples(self, split: str) -> int:
        """Returns the number of examples before preprocessing."""
        return len(self.make(split))


class TfdsSource(seqio.TfdsDataSource):
    """A dataset of TensorFlow Datasets; what cannot be loaded is told in the user's words."""

    def get_dataset(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the examples of a split, as seqio does; downloads and prepares them if need be.

        Raises:
          DataError: if they are not prepared and cannot be downloaded.
        """
        try:
            return super().get_dataset(*args, **kwargs)
        except Exception as error:  # anything, from refused connections to TFDS's own
            raise DataError(
                f"TensorFlow Datasets cannot load {self.tfds_dataset.name!r}: {error}. Where it "
                "cannot be downloaded, give a folder with the dataset's own files (DATA_DIR)."
            ) from error

    def num_input_examples(self, split: str) -> int | None:
        """Returns the number of rows of a split; None where TFDS has not prepared it."""
        try:
            count = super().num_input_examples(split)
        except (KeyError, ValueError):  # TFDS knows no splits before the data is there
            return None
        return None if count is None or count == float("inf") else int(count)


def as_dataset(examples: Examples) -> Any:
    """Returns a tf.data.Dataset of string scalars with the keys of the first example."""
    keys = list(examples[0]) if examples else ["inputs", "targets"]
    columns = {key: tf.constant([e[key] for e in examples], tf.string) for key in keys}
    return tf.data.Dataset.from_tensor_slices(columns)


def text_to_text_task(
    name: str,
    make: Callable[[str], Examples],
    splits: Iterable[str],
    vocabulary: Any,
    spec: TaskSpec | None = None,
) -> Any:
    """Registers and returns a seqio task from {'inputs', 'targets'} texts, both ending with EOS.

    Texts that are longer than the feature lengths lose their end, before EOS is added. With a
    `spec`, seqio's and T5X's evaluators score the task's predictions.
    """
    return add_task(name, LazySource(make, splits), text_preprocessors(), vocabulary, spec)


def text_preprocessors() -> list[Callable[..., Any]]:
    """Returns the preprocessors of a task whose source gives {'inputs', 'targets'} texts."""
    return [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim]


def span_corruption_task(
    name: str, make: Callable[[str], Examples], splits: Iterable[str], vocabulary: Any
) -> Any:
    """Registers and returns a span corruption task over {'targets': text} examples."""
    source = LazySource(make, splits)
    return add_task(name, source, span_corruption_preprocessors(), vocabulary)


def add_task(
    name: str,
    source: Any,
    preprocessors: list[Callable[..., Any]],
    vocabulary: Any,
    spec: TaskSpec | None = None,
    shuffle_buffer_size: int = 1_000,
) -> Any:
    """Registers and returns a seqio task over a source, scored as `spec` says where there is one.

    Args:
      name: of the task.
      source: a seqio data source.
      preprocessors: from the source's examples to tokens of 'inputs' and 'targets'.
      vocabulary: of both features.
      spec: what a right answer is.
      shuffle_buffer_size: examples that seqio shuffles among each other.
    """
    features: Mapping[str, Any] = {
        "inputs": seqio.Feature(vocabulary, add_eos=True),
        "targets": seqio.Feature(vocabulary, add_eos=True),
    }
    return seqio.TaskRegistry.add(
        name,
        source=source,
        preprocessors=preprocessors,
        output_features=features,
        postprocess_fn=postprocessor(spec) if spec else None,
        metric_fns=metric_functions(spec) if spec else [],
        shuffle_buffer_size=shuffle_buffer_size,
    )
