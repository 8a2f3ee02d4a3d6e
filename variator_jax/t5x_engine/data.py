"""The built-in engine's batches as a T5X dataset: the same order, exactly resumed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from clu.data import dataset_iterator
from t5x import checkpoints, utils
from tensorflow.io import gfile

from variator_jax.data.batches import batches
from variator_jax.errors import ConfigError
from variator_jax.train.jobs import check_packing

Batch = Mapping[str, np.ndarray]


def get_dataset(
    cfg: utils.DatasetConfig,
    shard_id: int,
    num_shards: int,
    *t5x_arguments: Any,
    model_dir: str,
    seed: int = 0,
    ratio: int = 1,
    pack_multiple: int = 1,
    **t5x_options: Any,
) -> BatchIterator:
    """T5X's `get_dataset_fn` over the built-in engine's batches, which never end.

    A resumed run continues at its latest checkpoint without any saved iterator: the order depends
    on the seed alone, and neither on the process nor on the number of hosts.

    Args:
      cfg: T5X's settings.
      shard_id: which part of each batch this host feeds.
      num_shards: of how many.
      *t5x_arguments: T5X's other arguments, which are ignored.
      model_dir: the folder of the run's checkpoints.
      seed: of the order, and of span corruption.
      ratio: the plugin's compression ratio.
      pack_multiple: packed examples start on multiples of it; itself a multiple of the ratio.
      **t5x_options: T5X's other options, which are ignored.

    Raises:
      ConfigError: for settings that these batches do not have.
      DataError: for an unknown task, or one without examples.
    """
    if cfg.pack:
        check_packing(pack_multiple, ratio)
    if cfg.use_cached:
        raise ConfigError(
            "USE_CACHED_TASKS = True is for T5X's own pipeline: set "
            "train_script.train.get_dataset_fn = @utils.get_dataset in a gin file."
        )
    if cfg.batch_size % num_shards:
        raise ConfigError(f"BATCH_SIZE {cfg.batch_size} does not divide among {num_shards} hosts.")
    steps = checkpoints.latest_step(model_dir) if gfile.isdir(model_dir) else None
    order = batches(
        cfg.mixture_or_task_name,
        cfg.split,
        cfg.batch_size,
        cfg.task_feature_lengths,
        seed=seed,
        start_batch=steps or 0,
        shuffle=cfg.shuffle,
        packed=cfg.pack,
        pad_inputs_to_multiple=pack_multiple,
    )
    rows = cfg.batch_size // num_shards
    return BatchIterator(order, slice(shard_id * rows, (shard_id + 1) * rows))


class BatchIterator(dataset_iterator.DatasetIterator):
    """One host's rows of each batch. It is not saved: the step alone decides what comes next."""

    def __init__(self, order: Iterator[Batch], rows: slice) -> None:
        self._rows = rows
        self._first = next(order)
        self._batches = itertools.chain([self._first], order)

    def __next__(self) -> dict[str, np.ndarray]:
        return {name: array[self._rows] for name, array in next(self._batches).items()}

    @property
    def element_spec(self) -> dict[str, dataset_iterator.ArraySpec]:
        """Shapes and dtypes of this host's part of a batch."""
        return {
            name: dataset_iterator.ArraySpec(array.dtype, array[self._rows].shape)
            for name, array in self._first.items()
        }
