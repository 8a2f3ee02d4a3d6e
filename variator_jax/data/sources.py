"""A seqio source over examples in memory that are made when they are first asked for."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from variator_jax.data._tf import seqio, tf
from variator_jax.data.preprocessors import span_corruption_preprocessors

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


def as_dataset(examples: Examples) -> Any:
    """Returns a tf.data.Dataset of string scalars with the keys of the first example."""
    keys = list(examples[0]) if examples else ["inputs", "targets"]
    columns = {key: tf.constant([e[key] for e in examples], tf.string) for key in keys}
    return tf.data.Dataset.from_tensor_slices(columns)


def text_to_text_task(
    name: str, make: Callable[[str], Examples], splits: Iterable[str], vocabulary: Any
) -> Any:
    """Registers and returns a seqio task from {'inputs', 'targets'} texts, both ending with EOS.

    Texts that are longer than the feature lengths lose their end, before EOS is added.
    """
    return _add(
        name,
        make,
        splits,
        vocabulary,
        [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim],
    )


def span_corruption_task(
    name: str, make: Callable[[str], Examples], splits: Iterable[str], vocabulary: Any
) -> Any:
    """Registers and returns a span corruption task over {'targets': text} examples."""
    return _add(name, make, splits, vocabulary, span_corruption_preprocessors())


def _add(
    name: str,
    make: Callable[[str], Examples],
    splits: Iterable[str],
    vocabulary: Any,
    preprocessors: list[Callable[..., Any]],
) -> Any:
    features: Mapping[str, Any] = {
        "inputs": seqio.Feature(vocabulary, add_eos=True),
        "targets": seqio.Feature(vocabulary, add_eos=True),
    }
    return seqio.TaskRegistry.add(
        name,
        source=LazySource(make, splits),
        preprocessors=preprocessors,
        output_features=features,
        metric_fns=[],
        shuffle_buffer_size=1_000,
    )
