"""The order of examples: epochs, shuffling and mixing.

Every example comes from its task's own seqio pipeline: the source, its preprocessors, its features.
An epoch that fits into memory is read once and then indexed, so starting at any row costs nothing;
larger tasks are streamed, where starting at row n skips n rows. What is random is drawn from the
seed and from positions (task, epoch, block), never from what was read before.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from variator_jax.data._tf import seqio
from variator_jax.data.spec import get_spec, spec_names
from variator_jax.data.tasks import LazySource
from variator_jax.errors import DataError

Rows = dict[str, np.ndarray]  # name -> int32 [rows, length], padded with zeros

_BYTES_IN_MEMORY = 512 * 2**20  # of one epoch of one task
_CHUNK = 256  # rows that are read together
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
    lengths: tuple[tuple[str, int], ...]
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


class Reader:
    """Reads any number of rows at a time from an iterator of chunks of rows."""

    def __init__(self, chunks: Iterable[Rows]) -> None:
        self._chunks = iter(chunks)
        self._unread: Rows = {}

    def read(self, count: int) -> Rows:
        """Returns the next `count` rows, fewer at the end, and {} after it."""
        parts: list[Rows] = []
        while count and (size_of(self._unread) or self._next_chunk()):
            parts.append({name: array[:count] for name, array in self._unread.items()})
            self._unread = {name: array[count:] for name, array in self._unread.items()}
            count -= size_of(parts[-1])
        return concatenated(parts)

    def _next_chunk(self) -> bool:
        self._unread = next(self._chunks, {})
        return bool(self._unread)


def size_of(rows: Rows) -> int:
    """Returns the number of rows."""
    return len(next(iter(rows.values()), ()))


def concatenated(parts: list[Rows]) -> Rows:
    """Returns the rows of all parts, one part after the other; {} for no part."""
    return {name: np.concatenate([part[name] for part in parts]) for name in (parts or [{}])[0]}


def examples(tasks: list[Any], shares: np.ndarray, order: Order, start: int = 0) -> Iterator[Rows]:
    """Yields chunks of the examples of one task or several, from row `start` on.

    Args:
      tasks: seqio tasks.
      shares: how often examples of each are drawn, float [tasks] with the sum 1.
      order: of the examples.
      start: how many rows to leave out.
    """
    if not order.repeat:
        chunks = (_task_examples(task, order) for task in tasks)
        reader = Reader(itertools.chain.from_iterable(chunks))
        reader.read(start)
        yield from iter(lambda: reader.read(_CHUNK), {})
        return
    if len(tasks) == 1:
        yield from _task_examples(tasks[0], order, 0, start)
        return
    first, offset = divmod(start, _MIXING_BLOCK)
    counts: np.ndarray = np.zeros(len(tasks), np.int64)
    for block in range(first):
        counts += np.bincount(order.tasks(shares, block), minlength=len(tasks))
    readers = [
        Reader(_task_examples(task, order, number, int(counts[number])))
        for number, task in enumerate(tasks)
    ]
    for block in itertools.count(first):
        mixed = _gather(readers, order.tasks(shares, block))
        yield {name: array[offset:] for name, array in mixed.items()}
        offset = 0


def _gather(readers: list[Reader], chosen: np.ndarray) -> Rows:
    """Returns rows of which row i is the next one of reader `chosen[i]`."""
    numbers = np.unique(chosen)
    rows = concatenated([readers[number].read(int((chosen == number).sum())) for number in numbers])
    places = np.argsort(np.argsort(chosen, kind="stable"))
    return {name: array[places] for name, array in rows.items()}


def _task_examples(task: Any, order: Order, number: int = 0, start: int = 0) -> Iterator[Rows]:
    """Yields chunks of one task's examples; `number` is its place in the mixture."""
    if _fits_in_memory(task, order):
        yield from _from_memory(task, order, number, start)
        return
    chunks = _chunks(
        *(task, order.split, order.lengths, start),
        shuffle=order.shuffle,
        seed=order.seed,
        num_epochs=None if order.repeat else 1,
        shard_info=order.shard if order.shard.num_shards > 1 else None,
    )
    first = next(chunks, None)
    if first is None:
        raise DataError(f"task {task.name!r} has no examples in the split {order.split!r}")
    yield from itertools.chain([first], chunks)


def _from_memory(task: Any, order: Order, number: int, start: int) -> Iterator[Rows]:
    noisy = get_spec(task.name).kind == "span_corruption"

    def read(epoch: int) -> Rows:
        if noisy:
            return _noisy_epoch(task, order.split, order.lengths, order.noise_seed(epoch))
        return _fixed_epoch(task, order.split, order.lengths, 0)

    size, shards = size_of(read(0)), order.shard.num_shards
    if size < shards:
        raise DataError(
            f"task {task.name!r} has {size} examples in the split {order.split!r}; expected "
            f"{shards} or more, one for each stream"
        )
    first, offset = divmod(start, len(order.permutation(0, size, number)))
    for epoch in itertools.count(first) if order.repeat else (0,):
        chosen = order.permutation(epoch, size, number)[offset:]
        offset = 0
        for at in range(0, len(chosen), _CHUNK):
            yield {name: array[chosen[at : at + _CHUNK]] for name, array in read(epoch).items()}


def _fits_in_memory(task: Any, order: Order) -> bool:
    """Whether one epoch is small enough to be kept; foreign tasks may have any size."""
    if task.name not in spec_names():
        return False
    # The number of texts of span corruption is not that of its examples: an article may be a
    # hundred. Only a source in memory is known to be small.
    if get_spec(task.name).kind == "span_corruption" and not isinstance(task.source, LazySource):
        return False
    count = task.num_input_examples(order.split)
    return count is not None and 4 * count * sum(dict(order.lengths).values()) <= _BYTES_IN_MEMORY


def _epoch(task: Any, split: str, lengths: tuple[tuple[str, int], ...], seed: int) -> Rows:
    """Returns all examples of one epoch in the task's own order; `seed` decides the noise.

    Every epoch of span corruption has the same size: text is cut before noise is drawn.
    """
    return concatenated(
        list(_chunks(task, split, lengths, 0, shuffle=False, seed=seed, num_epochs=1))
    )


_fixed_epoch = functools.lru_cache(maxsize=12)(_epoch)
_noisy_epoch = functools.lru_cache(maxsize=3)(_epoch)


def _chunks(
    task: Any, split: str, lengths: tuple[tuple[str, int], ...], start: int, **options: Any
) -> Iterator[Rows]:
    """Yields what the task's seqio pipeline gives, trimmed and padded, from row `start` on."""
    shapes = {name: [length] for name, length in lengths}
    dataset = task.get_dataset(dict(lengths), split, **options)
    dataset = dataset.map(lambda example: {name: example[name] for name in shapes}).skip(start)
    for chunk in dataset.padded_batch(_CHUNK, shapes).prefetch(2).as_numpy_iterator():
        yield {name: array.astype(np.int32) for name, array in chunk.items()}
