"""Batches of numpy arrays from registered tasks and mixtures, in T5X's layout, exactly resumable.

Examples are trimmed and laid out as seqio's `EncDecFeatureConverter` does, so a text that is longer
than its feature length is truncated, with EOS kept. Shuffling and mixing are index arithmetic over
the finished examples of an epoch, so starting at batch n costs the same as starting at batch 0.
Packed batches, and tasks too large for memory, are streamed; there, starting at n reads n batches,
and several processes can share the reading.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np

from variator_jax.data._tf import seqio
from variator_jax.data.epochs import Batch, Order, Reader, epoch, fits_in_memory, pad_rows, rows
from variator_jax.data.packing import GroupedFeatureConverter
from variator_jax.data.scoring import split_answers
from variator_jax.errors import DataError, did_you_mean

_MIXING_BLOCK = 4096  # rows whose tasks are drawn together


def task_or_mixture(name: str) -> Any:
    """Returns the seqio task or mixture `name`; the documentation tasks are always there.

    Raises:
      DataError: if there is none; the message gives the nearest names.
    """
    from variator_jax.data import docs_tasks  # noqa: F401  (registers them)

    known = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
    if name not in known:
        raise DataError(
            f"no task or mixture named {name!r}.{did_you_mean(name, known)} "
            f"Registered: {', '.join(sorted(known))}"
        )
    return seqio.get_mixture_or_task(name)


def accepted_answers(task_name: str, split: str) -> list[list[str]]:
    """Returns the accepted answers of each example of a task with `TaskSpec.many_answers`.

    They are in the order of `batches(..., shuffle=False, repeat=False)`.
    """
    task = task_or_mixture(task_name)
    dataset = task.get_dataset(None, split, shuffle=False, num_epochs=1)
    dataset = dataset.map(lambda example: example["answers"])
    return [split_answers(joined) for joined in dataset.as_numpy_iterator()]


def batches(
    task_name: str,
    split: str,
    batch_size: int,
    feature_lengths: Mapping[str, int],
    *,
    seed: int = 0,
    start_batch: int = 0,
    shuffle: bool = True,
    repeat: bool = True,
    pad_last: bool = False,
    packed: bool = False,
    pad_inputs_to_multiple: int = 1,
    streams: int = 1,
    read_streams: Collection[int] = (0,),
) -> Iterator[Batch]:
    """Yields batches of a task or mixture, the same for the same arguments.

    Args:
      task_name: a registered task or mixture.
      split: a split of it, such as 'train'.
      batch_size: rows of every batch.
      feature_lengths: {'inputs': L, 'targets': T}, EOS included; longer texts are truncated.
      seed: decides order, mixing and span corruption noise.
      start_batch: how many batches to leave out at the beginning; what follows is exactly what
        follows them in an iterator from 0.
      shuffle: a new order every epoch; otherwise the task's own order.
      repeat: go on for ever, epoch after epoch; otherwise stop after one.
      pad_last: without repeat, fill the last batch with rows of zeros; otherwise it is dropped.
      packed: put several examples into a row, with segment ids and positions.
      pad_inputs_to_multiple: with packed, each example starts on a multiple of this many tokens.
      streams: into how many shards data are cut that are streamed and repeated. Rows
        [i * batch_size / streams, (i + 1) * batch_size / streams) come from shard i, whoever reads.
      read_streams: the shards to read, so that a process need not read what others do; rows of the
        rest are zeros. Only counts where there are several; data in memory are not cut.

    Returns:
      An iterator of dicts of int32 arrays: encoder_input_tokens [batch, L], decoder_input_tokens,
      decoder_target_tokens and decoder_loss_weights [batch, T]; with packed also
      {encoder,decoder}_segment_ids and {encoder,decoder}_positions.

    Raises:
      DataError: for an unknown task or split, unusable lengths, or a split without examples.
    """
    provider = task_or_mixture(task_name)
    lengths = _checked(provider, split, feature_lengths, batch_size, start_batch)
    order = Order(seed, shuffle, repeat)
    tasks = _tasks(provider, split)
    if packed or not all(fits_in_memory(task, split, lengths) for task in tasks):
        stream = functools.partial(
            _streamed, provider, split, lengths, order, packed, pad_inputs_to_multiple
        )
        if streams > 1 and repeat:
            found = _side_by_side(stream, batch_size, streams, read_streams, start_batch)
        else:
            found = _read(stream(None), batch_size, start_batch)
    elif len(tasks) > 1 and repeat:
        rates = [provider.get_rate(task) for task in tasks]
        found = _mixed(tasks, rates, split, lengths, order, batch_size, start_batch)
    else:
        found = _in_turn(tasks, split, lengths, order, batch_size, start_batch)
    return _whole(found, batch_size, pad_last)


def _whole(found: Iterator[Batch], batch_size: int, pad_last: bool) -> Iterator[Batch]:
    for batch in found:
        if rows(batch) == batch_size:
            yield batch
        elif pad_last:
            yield pad_rows(batch, batch_size)


def _tasks(provider: Any, split: str) -> list[Any]:
    tasks = provider.tasks if isinstance(provider, seqio.Mixture) else [provider]
    return [task for task in tasks if split in task.splits]


def _checked(
    provider: Any, split: str, lengths: Mapping[str, int], batch_size: int, start_batch: int = 0
) -> dict[str, int]:
    if set(lengths) != {"inputs", "targets"} or any(int(n) < 1 for n in lengths.values()):
        raise DataError(
            f"feature lengths {dict(lengths)!r}: expected positive 'inputs' and 'targets'"
        )
    if batch_size < 1 or start_batch < 0:
        raise DataError(f"batch_size {batch_size} or start_batch {start_batch} is too small")
    if split not in provider.splits:
        raise DataError(
            f"{provider.name!r} has no split {split!r}.{did_you_mean(split, provider.splits)} "
            f"Splits: {', '.join(sorted(provider.splits))}"
        )
    return {name: int(length) for name, length in lengths.items()}


def _in_turn(
    tasks: list[Any],
    split: str,
    lengths: Mapping[str, int],
    order: Order,
    batch_size: int,
    start_batch: int,
) -> Iterator[Batch]:
    """Yields batches of one task; or of one epoch of several, one after the other."""
    start = start_batch * batch_size
    readers = []
    for stream, task in enumerate(tasks):
        readers.append(Reader(task, split, lengths, order, stream, start))
        start -= min(start, rows(epoch(task, split, lengths, order.noise_seed(0))))
    chain = _Chain(readers)
    while (batch := chain.read(batch_size)) is not None:
        yield batch


class _Chain:
    """Reads rows of the first reader until it ends, then of the next."""

    def __init__(self, readers: list[Reader]):
        self._readers = list(readers)

    def read(self, count: int) -> Batch | None:
        """Returns the next `count` rows, fewer at the end, or None after it."""
        parts: list[Batch] = []
        while count and self._readers:
            part = self._readers[0].read(count)
            if part is None:
                self._readers.pop(0)
                continue
            count -= rows(part)
            parts.append(part)
        if not parts:
            return None
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def _mixed(
    tasks: list[Any],
    weights: list[float],
    split: str,
    lengths: Mapping[str, int],
    order: Order,
    batch_size: int,
    start_batch: int,
) -> Iterator[Batch]:
    """Yields batches whose rows come from tasks drawn by their rates, for ever."""
    rates = np.array(weights, np.float64) / sum(weights)
    drawn = itertools.chain.from_iterable(
        order.tasks(rates, block, _MIXING_BLOCK) for block in itertools.count()
    )
    skipped = np.fromiter(itertools.islice(drawn, start_batch * batch_size), np.int64)
    before = np.bincount(skipped, minlength=len(tasks))
    readers = [
        Reader(task, split, lengths, order, stream + 1, int(before[stream]))
        for stream, task in enumerate(tasks)
    ]
    while True:
        yield _gather(readers, np.fromiter(itertools.islice(drawn, batch_size), np.int64))


def _gather(readers: list[Reader], chosen: np.ndarray) -> Batch:
    """Returns a batch whose row i is the next row of reader `chosen[i]`."""
    batch: Batch = {}
    for stream in np.unique(chosen):
        where = np.flatnonzero(chosen == stream)
        for key, value in (readers[stream].read(len(where)) or {}).items():
            batch.setdefault(key, np.zeros((len(chosen), value.shape[1]), value.dtype))
            batch[key][where] = value
    return batch


def _streamed(
    provider: Any,
    split: str,
    lengths: dict[str, int],
    order: Order,
    packed: bool,
    multiple: int,
    shard: Any,
) -> Any:
    """Returns the rows of seqio's own pipeline, of one shard of the data or of all of them."""
    options = dict(
        sequence_length=lengths,
        split=split,
        shuffle=order.shuffle,
        seed=order.seed,
        num_epochs=None if order.repeat else 1,
        shard_info=shard,
    )
    if order.repeat:
        dataset = provider.get_dataset(**options)
    else:
        parts = [task.get_dataset(**options) for task in _tasks(provider, split)]
        dataset = functools.reduce(lambda one, other: one.concatenate(other), parts)
    dataset = dataset.map(lambda example: {key: example[key] for key in lengths})
    return GroupedFeatureConverter(pack=packed, group=multiple)(dataset, lengths)


def _read(dataset: Any, batch_size: int, start_batch: int) -> Iterator[Batch]:
    return dataset.batch(batch_size).skip(start_batch).prefetch(2).as_numpy_iterator()


def _side_by_side(
    stream: Callable[[Any], Any],
    batch_size: int,
    streams: int,
    wanted: Collection[int],
    start_batch: int,
) -> Iterator[Batch]:
    """Yields batches whose equal parts come from one shard each; zeros for shards not `wanted`."""
    if batch_size % streams or not set(wanted) <= set(range(streams)) or not wanted:
        raise DataError(
            f"{batch_size} rows in {streams} streams, of which {sorted(wanted)} are read: expected "
            "a divisor of the batch size, and some of the streams from 0"
        )
    share = batch_size // streams
    readers = {i: _read(stream(seqio.ShardInfo(i, streams)), share, start_batch) for i in wanted}
    while True:
        parts = {i: next(reader) for i, reader in readers.items()}
        nothing = {key: np.zeros_like(value) for key, value in next(iter(parts.values())).items()}
        rows_of = [parts.get(i, nothing) for i in range(streams)]
        yield {key: np.concatenate([part[key] for part in rows_of]) for key in nothing}
