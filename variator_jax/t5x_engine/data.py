"""The built-in engine's batches as a T5X dataset: the same order, exactly resumed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
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
    feature_converter_cls: Any,
    num_epochs: int | None = None,
    continue_from_last_checkpoint: bool = False,
    *,
    model_dir: str,
    seed: int = 0,
    ratio: int = 1,
    pack_multiple: int = 1,
) -> BatchIterator:
    """T5X's `get_dataset_fn` over the built-in engine's batches.

    A resumed run continues at the step of its latest checkpoint, without any saved iterator:
    the order depends on the seed alone, and neither on the process nor on the number of hosts.

    Args:
      cfg: T5X's settings; `use_cached` is not for these batches.
      shard_id: which part of each batch this host feeds.
      num_shards: of how many.
      feature_converter_cls: ignored, for the layout is the same.
      num_epochs: must be None, for ever.
      continue_from_last_checkpoint: ignored; it is always so.
      model_dir: where the run's checkpoints are.
      seed: of the order, and of span corruption.
      ratio: the plugin's compression ratio.
      pack_multiple: packed examples start on multiples of it; itself a multiple of the ratio.

    Raises:
      ConfigError: for settings that these batches do not have.
      DataError: for an unknown task, or one without examples.
    """
    del feature_converter_cls, continue_from_last_checkpoint
    if cfg.pack:
        check_packing(pack_multiple, ratio)
    if cfg.use_cached:
        raise ConfigError(
            "USE_CACHED_TASKS = True is for T5X's own pipeline: set "
            "train_script.train.get_dataset_fn = @utils.get_dataset in a gin file."
        )
    if num_epochs is not None or cfg.batch_size % num_shards:
        raise ConfigError(
            f"BATCH_SIZE {cfg.batch_size} does not divide among {num_shards} hosts, or a number "
            f"of epochs was given ({num_epochs})."
        )

    def start_at(batch: int) -> Iterator[Batch]:
        return batches(
            cfg.mixture_or_task_name,
            cfg.split,
            cfg.batch_size,
            cfg.task_feature_lengths,
            seed=seed,
            start_batch=batch,
            shuffle=cfg.shuffle,
            packed=cfg.pack,
            pad_inputs_to_multiple=pack_multiple,
        )

    done = checkpoints.latest_step(model_dir) if gfile.isdir(model_dir) else None
    rows = cfg.batch_size // num_shards
    return BatchIterator(start_at, done or 0, slice(shard_id * rows, (shard_id + 1) * rows))


class BatchIterator(dataset_iterator.DatasetIterator):
    """An iterator whose only state is the number of batches that it has given."""

    def __init__(self, start_at: Callable[[int], Iterator[Batch]], start: int, rows: slice) -> None:
        self._start_at, self._start, self._rows = start_at, start, rows
        self._specs: dict[str, dataset_iterator.ArraySpec] | None = None
        self._go_to(start)

    def __next__(self) -> dict[str, np.ndarray]:
        batch = next(self._batches)
        self._given += 1
        return {name: array[self._rows] for name, array in batch.items()}

    @property
    def element_spec(self) -> dict[str, dataset_iterator.ArraySpec]:
        """Shapes and dtypes of this host's part of a batch."""
        if self._specs is None:
            first = next(self._start_at(0))
            self._specs = {
                name: dataset_iterator.ArraySpec(x.dtype, x[self._rows].shape)
                for name, x in first.items()
            }
        return self._specs

    def reset(self) -> None:
        """Starts over where it began."""
        self._go_to(self._start)

    def save(self, filename: Any) -> None:
        """Writes how many batches it has given."""
        with gfile.GFile(str(filename), "w") as file:
            file.write(json.dumps({"batches": self._given}))

    def restore(self, filename: Any) -> None:
        """Continues after the number of batches in `filename`."""
        with gfile.GFile(str(filename), "r") as file:
            self._go_to(int(json.loads(file.read())["batches"]))

    def _go_to(self, batch: int) -> None:
        self._batches, self._given = self._start_at(batch), batch
