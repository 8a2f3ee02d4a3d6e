"""The order of examples: epochs, shuffling and mixing.

Every example comes from its task's own seqio pipeline: the source, its preprocessors, its features.
An epoch that fits into memory is read once and then indexed, so starting at any row costs nothing;
larger tasks are streamed, where starting at row n skips n rows. What is random is drawn from the
seed and from positions (task, epoch, block), never from what was read before.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from variator_jax.data._tf import seqio
from variator_jax.data.spec import get_spec
from variator_jax.data.tasks import LazySource, is_registered
from variator_jax.errors import DataError

Row = dict[str, np.ndarray]  # name -> int32 [length], padded with zeros
LengthItems = tuple[tuple[str, int], ...]  # of 'inputs' and 'targets'

_BYTES_IN_MEMORY = 512 * 2**20  # of one epoch of one task
_CHUNK = 256  # rows that are taken from TensorFlow together
_MIXING_BLOCK = 1024  # rows whose tasks are drawn together
_NOISE, _MIXING = 1 << 20, 1 << 21  # random streams next to those of the tasks' orders


@dataclasses.dataclass(frozen=True)
class Order:
    """Which examples are read, and in which order.

    Attributes:
      split: of the tasks.
      lengths: to which 'inputs' and 'targets' are trimmed and padded.
      seed: of everything random.
      shuffle: a new order every epoch; otherwise the tasks' own.
      repeat: epoch after epoch without end, tasks mixed; otherwise one epoch of each in turn.
      shard: the part of the data that is read, of how many.
    """

    split: str
    lengths: LengthItems
    seed: int
    shuffle: bool
    repeat: bool
    shard: Any = seqio.ShardInfo(0, 1)

    def permutation(self, epoch: int, size: int, task: int) -> np.ndarray:
        """Returns this shard's rows of an epoch in their order, int [size / shards]."""
        rows = np.arange(size)
        if self.shuffle:
            rows = np.random.default_rng([self.seed, task, epoch]).permutation(size)
        return rows[self.shard.index :: self.shard.num_shards]

    def noise_seed(self, epoch: int) -> int:
        """Returns the seed of an epoch's span corruption."""
        return int(np.random.default_rng([self.seed, _NOISE, epoch]).integers(2**31))

    def tasks(self, shares: np.ndarray, block: int) -> np.ndarray:
        """Returns which task each row of a block of a mixture comes from, int [block size]."""
        seed = [self.seed, _MIXING, self.shard.index, block]
        return np.random.default_rng(seed).choice(len(shares), _MIXING_BLOCK, p=shares)


def examples(tasks: list[Any], shares: np.ndarray, order: Order, start: int = 0) -> Iterator[Row]:
    """Yields the examples of one task or several, from row `start` on.

    Args:
      tasks: seqio tasks.
      shares: how often examples of each are drawn, float [tasks] with the sum 1.
      order: of the examples.
      start: how many rows to leave out.
    """
    if not order.repeat:
        epochs = (_task_examples(task, order) for task in tasks)
        yield from itertools.islice(itertools.chain.from_iterable(epochs), start, None)
    elif len(tasks) == 1:
        yield from _task_examples(tasks[0], order, 0, start)
    else:
        yield from _mixed(tasks, shares, order, start)


def _mixed(tasks: list[Any], shares: np.ndarray, order: Order, start: int) -> Iterator[Row]:
    first, offset = divmod(start, _MIXING_BLOCK)
    read: np.ndarray = np.zeros(len(tasks), np.int64)  # rows of each task before `start`
    for block in range(first + 1):
        drawn = order.tasks(shares, block)[: start - block * _MIXING_BLOCK]
        read += np.bincount(drawn, minlength=len(tasks))
    readers = [_task_examples(task, order, i, int(read[i])) for i, task in enumerate(tasks)]
    for block in itertools.count(first):
        for number in order.tasks(shares, block)[offset:]:
            yield next(readers[number])
        offset = 0


def _task_examples(task: Any, order: Order, number: int = 0, start: int = 0) -> Iterator[Row]:
    """Yields one task's examples; `number` is its place in the mixture."""
    if _fits_in_memory(task, order):
        yield from _from_memory(task, order, number, start)
        return
    options = {
        "shuffle": order.shuffle,
        "seed": order.seed,
        "num_epochs": None if order.repeat else 1,
        "shard_info": order.shard if order.shard.num_shards > 1 else None,
    }
    rows = _read(task, order.split, order.lengths, start, **options)
    first = next(rows, None)
    if first is None:
        raise DataError(f"task {task.name!r} has no examples in the split {order.split!r}")
    yield from itertools.chain([first], rows)


def _from_memory(task: Any, order: Order, number: int, start: int) -> Iterator[Row]:
    noisy = get_spec(task.name).kind == "span_corruption"

    def read(epoch: int) -> Row:
        if not noisy:
            return _fixed_epoch(task, order.split, order.lengths, 0)
        return _noisy_epoch(task, order.split, order.lengths, order.noise_seed(epoch))

    size, shards = len(read(0)["inputs"]), order.shard.num_shards
    if size < shards:
        what = f"task {task.name!r} has {size} examples in the split {order.split!r}"
        raise DataError(f"{what}; expected {shards} or more, one for each stream")
    first, offset = divmod(start, len(order.permutation(0, size, number)))
    for epoch in itertools.count(first) if order.repeat else (0,):
        rows = read(epoch)
        for place in order.permutation(epoch, size, number)[offset:]:
            yield {name: array[place] for name, array in rows.items()}
        offset = 0


def _fits_in_memory(task: Any, order: Order) -> bool:
    """Whether one epoch is small enough to be kept; foreign tasks may have any size."""
    if not is_registered(task.name):
        return False
    # An article may be a hundred examples of span corruption: only texts in memory are few.
    if get_spec(task.name).kind == "span_corruption" and not isinstance(task.source, LazySource):
        return False
    count = task.num_input_examples(order.split)
    return count is not None and 4 * count * sum(dict(order.lengths).values()) <= _BYTES_IN_MEMORY


def _epoch(task: Any, split: str, lengths: LengthItems, seed: int) -> Row:
    """Returns the examples of one epoch in the task's own order: int32 [rows, length] each.

    `seed` decides the noise. Every epoch of span corruption has the same size: text is cut before
    noise is drawn.
    """
    rows = list(_read(task, split, lengths, 0, shuffle=False, seed=seed, num_epochs=1))
    return {
        name: np.array([row[name] for row in rows], np.int32).reshape(-1, length)
        for name, length in lengths
    }


_fixed_epoch = functools.lru_cache(maxsize=12)(_epoch)
_noisy_epoch = functools.lru_cache(maxsize=3)(_epoch)


def _read(task: Any, split: str, lengths: LengthItems, start: int, **options: Any) -> Iterator[Row]:
    """Yields what the task's seqio pipeline gives, trimmed and padded, from row `start` on."""
    shapes = {name: [length] for name, length in lengths}
    dataset = task.get_dataset(dict(lengths), split, **options)
    dataset = dataset.map(lambda example: {name: example[name] for name in shapes}).skip(start)
    for chunk in dataset.padded_batch(_CHUNK, shapes).prefetch(2).as_numpy_iterator():
        arrays = [chunk[name].astype(np.int32) for name in shapes]
        yield from (dict(zip(shapes, row, strict=True)) for row in zip(*arrays, strict=True))
