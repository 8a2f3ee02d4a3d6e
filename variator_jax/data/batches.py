"""Tasks and mixtures by name, and batches of numpy arrays from them, exactly resumable.

Batches have T5X's names, and examples the layout of seqio's `EncDecFeatureConverter`: a longer text
than its feature is cut, with EOS kept. `order` decides which example comes when. Packed rows hold
several examples, each of which starts on the border of a merge group.
"""

import hashlib
import itertools
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from variator_jax.data import docs_tasks  # noqa: F401  (registers the documentation tasks)
from variator_jax.data._tf import seqio, tf
from variator_jax.data.order import Order, Row, examples
from variator_jax.data.spec import get_spec, has_spec, split_answers
from variator_jax.data.tasks import LazySource, hash_of
from variator_jax.data.vocabulary import identity
from variator_jax.errors import DataError, did_you_mean

Batch = dict[str, np.ndarray]
Lengths = Mapping[str, int]  # of 'inputs' and 'targets', EOS included

_FILLER = -1  # keeps a place until seqio, which strips padding first, has packed
_registered: dict[str, tuple[list[str], list[float]]] = {}  # mixture -> its tasks and rates


def task_or_mixture(name: str) -> Any:
    """Returns the seqio task or mixture `name`; the documentation tasks are always there.

    Raises:
      DataError: if there is none; the message gives the nearest names.
    """
    known = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
    if name not in known:
        raise DataError(f"no task or mixture named {name!r}.{did_you_mean(name, known)}")
    return seqio.get_mixture_or_task(name)


def mixture(tasks: Sequence[str], rates: Sequence[float], name: str | None = None) -> str:
    """Registers a mixture of registered tasks, once, and returns its name; reads no data.

    Args:
      tasks: names of tasks or mixtures, which share one vocabulary.
      rates: how often examples of each are drawn, as shares of the rates' sum.
      name: the mixture's name; if not given, 'mixture_' and a hash of the rest.

    Raises:
      DataError: for unknown tasks, rates that do not fit, tasks of different vocabularies, or a
        name that something else has.
    """
    tasks, rates = list(tasks), [float(rate) for rate in rates]
    if not tasks or len(set(tasks)) < len(tasks) or len(rates) != len(tasks) or min(rates) <= 0:
        raise DataError(f"expected tasks, each once, and a rate above 0 each; got {tasks}, {rates}")
    inputs = {task: task_or_mixture(task).output_features["inputs"] for task in tasks}
    vocabularies = {task: identity(feature.vocabulary) for task, feature in inputs.items()}
    if len(set(vocabularies.values())) > 1:
        raise DataError(f"the tasks of a mixture share one vocabulary; found {vocabularies}")
    name = name or f"mixture_{hash_of([tasks, rates])}"
    others = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()} - _registered.keys()
    if name in others:
        raise DataError(f"{name!r} is a task or a mixture already; choose another name")
    if _registered.setdefault(name, (tasks, rates)) != (tasks, rates):
        raise DataError(f"a mixture named {name!r} is already registered: {_registered[name]}")
    if name not in seqio.MixtureRegistry.names():
        seqio.MixtureRegistry.add(name, list(zip(tasks, rates, strict=True)))
    return name


def accepted_answers(task_name: str, split: str) -> list[list[str]]:
    """Returns the accepted answers of each example of a task: all with `many_answers`, else one.

    They are whole, whatever the feature lengths, and in the order of
    `batches(..., shuffle=False, repeat=False)`.
    """
    task, spec = task_or_mixture(task_name), get_spec(task_name)
    dataset = task.get_dataset(None, split, shuffle=False, num_epochs=1, seed=0)  # as `batches`
    rows = dataset.as_numpy_iterator()
    if spec.many_answers:
        return [split_answers(row["answers"]) for row in rows]
    decode = task.output_features["targets"].vocabulary.decode
    answers = (row.get("targets_pretokenized", row["targets"]) for row in rows)
    texts = (x.decode() if isinstance(x, bytes) else decode(x.tolist()) for x in answers)
    return [[spec.answer(text)] for text in texts]


def batches(
    task_name: str,
    split: str,
    batch_size: int,
    feature_lengths: Lengths,
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
      feature_lengths: {'inputs': L, 'targets': T}, EOS included; longer texts are cut.
      seed: decides order, mixing and span corruption noise.
      start_batch: how many batches to leave out; the others are those of an iterator from 0.
      shuffle: a new order every epoch; otherwise the task's own order.
      repeat: epoch after epoch without end; otherwise one epoch.
      pad_last: without repeat, fill the last batch with rows of zeros; otherwise it is dropped.
      packed: put several examples into a row, with segment ids and positions.
      pad_inputs_to_multiple: with packed, each example starts on a multiple of this many tokens.
      streams: into how many shards the data are cut, only with repeat. The i-th of as many equal
        parts of a batch comes from shard i, whichever process reads it.
      read_streams: the shards to read; the rows of the others are zeros.

    Returns:
      An iterator of dicts of int32 arrays: encoder_input_tokens [batch, L], decoder_input_tokens,
      decoder_target_tokens and decoder_loss_weights [batch, T]; with packed also
      {encoder,decoder}_segment_ids and {encoder,decoder}_positions.

    Raises:
      DataError: for an unknown task or split, unusable lengths, or a split without examples.
    """
    lengths = check_request(task_or_mixture(task_name), split, feature_lengths, batch_size)
    share, multiple = batch_size // streams, pad_inputs_to_multiple
    if min(start_batch, seed, multiple - 1) < 0:
        raise DataError(f"start_batch {start_batch}, seed {seed}, multiple {multiple}: too small")
    if batch_size % streams:
        raise DataError(f"{batch_size} rows cannot be cut into {streams} equal streams")
    readers = {}
    for stream in read_streams:
        shard = seqio.ShardInfo(stream, streams)
        order = Order(split, tuple(lengths.items()), seed, shuffle, repeat, shard)
        readers[stream] = _rows(task_name, order, start_batch * share, multiple if packed else None)
    return _batches(readers, share, streams, pad_last)


def _rows(name: str, order: Order, start: int, multiple: int | None) -> Iterator[Row]:
    """Yields rows from row `start` on: examples, or with `multiple` packed ones."""
    provider = task_or_mixture(name)
    shares = np.array(task_rates(provider, order.split))
    tasks = tasks_of(provider, order.split)
    rows = examples(tasks, shares / shares.sum(), order, start if multiple is None else 0)
    if multiple is None:
        return rows
    return itertools.islice(pack(rows, dict(order.lengths), multiple), start, None)


def _batches(
    readers: Mapping[int, Iterator[Row]], share: int, streams: int, pad_last: bool
) -> Iterator[Batch]:
    """Yields batches of `streams` equal parts; zeros for the streams that are not read."""
    while True:
        parts = {stream: list(itertools.islice(rows, share)) for stream, rows in readers.items()}
        some = next(iter(parts.values()))
        if not some or (len(some) < share and not pad_last):
            return
        zeros = {name: np.zeros_like(array) for name, array in some[0].items()}
        rows = []
        for stream in range(streams):
            rows += [*parts.get(stream, ()), *[zeros] * share][:share]
        yield _lay_out({name: np.stack([row[name] for row in rows]) for name in zeros})


def digest(task_name: str, split: str) -> str:
    """Identifies the examples that the tasks of a task or mixture hold in memory.

    Those of TFDS and of folders of texts, which are streamed, do not count.
    """
    hashed = hashlib.sha256()
    for task in tasks_of(task_or_mixture(task_name), split):
        for example in task.source.make(split) if isinstance(task.source, LazySource) else ():
            hashed.update(json.dumps(example, sort_keys=True).encode())
    return hashed.hexdigest()


def tasks_of(provider: Any, split: str) -> list[Any]:
    """Returns the single seqio tasks of a task or mixture that have a split."""
    return [task for task in getattr(provider, "tasks", [provider]) if split in task.splits]


def task_rates(provider: Any, split: str) -> list[float]:
    """Returns the rates at which a mixture draws from its tasks that have a split."""
    tasks = tasks_of(provider, split)
    return [float(provider.get_rate(task)) for task in tasks] if tasks[1:] else [1.0]


def check_request(provider: Any, split: str, lengths: Lengths, batch_size: int) -> dict[str, int]:
    """Returns the feature lengths as integers.

    Raises:
      DataError: for unusable lengths, an unusable batch size, or a split that is not there; for
        lengths that leave no room for the first token of a label or an answer, and EOS.
    """
    named = isinstance(lengths, Mapping) and set(lengths) == {"inputs", "targets"}
    if not named or min(map(int, [*lengths.values(), batch_size])) < 1:
        given = f"feature lengths {lengths!r}, batch_size {batch_size!r}"
        raise DataError(f"{given}: expected positive 'inputs' and 'targets', and 1 or more rows")
    if split not in provider.splits:
        nearest = did_you_mean(split, provider.splits)
        raise DataError(f"{provider.name!r} has no split {split!r}.{nearest}")
    for task in getattr(provider, "tasks", [provider]):
        if has_spec(task.name):
            spec = get_spec(task.name)
            least = {"inputs": 2, "targets": 3 if spec.prefix else 2}
            if any(lengths[name] < length for name, length in least.items()):
                kept = f"the prefix {spec.prefix}, " if spec.prefix else ""
                what = f"task {spec.name!r} ({spec.kind}) has TASK_FEATURE_LENGTHS {dict(lengths)}"
                need = f"{kept}one token of each text and the end of sequence need {least} or more"
                raise DataError(f"{what}; {need}")
    return {name: int(length) for name, length in lengths.items()}


def _lay_out(rows: Batch) -> Batch:
    """Returns rows of 'inputs' and 'targets' in the layout of seqio's EncDecFeatureConverter."""
    targets = rows["targets"]
    shifted = np.zeros_like(targets)
    shifted[:, 1:] = targets[:, :-1]
    batch = {
        "encoder_input_tokens": rows["inputs"],
        "decoder_target_tokens": targets,
        "decoder_input_tokens": shifted,
        "decoder_loss_weights": (targets != 0).astype(np.int32),
    }
    if "targets_positions" in rows:
        shifted[rows["targets_positions"] == 0] = 0  # the first token of each packed example
        for kind in ("segment_ids", "positions"):
            batch[f"encoder_{kind}"] = rows[f"inputs_{kind}"]
            batch[f"decoder_{kind}"] = rows[f"targets_{kind}"]
    return batch


def pack(rows: Iterable[Row], lengths: Lengths, multiple: int) -> Iterator[Row]:
    """Yields rows that hold as many consecutive examples as fit.

    Args:
      rows: examples, padded with zeros.
      lengths: of the features.
      multiple: each example's 'inputs' start on a multiple of this many tokens; the places between
        examples are padding.

    Returns:
      An iterator of rows: int32 [length] for each feature, its `_segment_ids`, counted from 1, and
      its `_positions`.
    """
    row, used, segment = _empty_row(lengths), dict.fromkeys(lengths, 0), 0
    for example in rows:
        tokens = {name: example[name][example[name] != 0] for name in lengths}
        if any(used[name] + len(ids) > lengths[name] for name, ids in tokens.items()):
            yield row
            row, used, segment = _empty_row(lengths), dict.fromkeys(lengths, 0), 0
        segment += 1
        for name, ids in tokens.items():
            place = slice(used[name], used[name] + len(ids))
            row[name][place] = ids
            row[f"{name}_segment_ids"][place] = segment
            row[f"{name}_positions"][place] = np.arange(len(ids))
            used[name] += len(ids)
        used["inputs"] += -used["inputs"] % multiple
    if segment:
        yield row


def _empty_row(lengths: Lengths) -> Row:
    return {
        name + kind: np.zeros(length, np.int32)
        for name, length in lengths.items()
        for kind in ("", "_segment_ids", "_positions")
    }


class GroupedFeatureConverter(seqio.EncDecFeatureConverter):
    """`pack` for T5X's own pipeline: packed examples start on multiples of `group` tokens.

    Without packing it is its parent. T5X makes converters itself: give it a subclass that sets
    `group`.
    """

    group = 1

    def _pack_or_pad(self, ds: Any, packed_lengths: Mapping[str, int]) -> Any:
        if not self.pack:
            return super()._pack_or_pad(ds, packed_lengths)
        return super()._pack_or_pad(ds.map(self._fill), packed_lengths).map(_clear_filler)

    def _fill(self, example: Mapping[str, Any]) -> dict[str, Any]:
        inputs = example["inputs"]
        missing = [[0, -tf.size(inputs) % self.group]]
        return {**example, "inputs": tf.pad(inputs, missing, constant_values=_FILLER)}


def _clear_filler(example: Mapping[str, Any]) -> dict[str, Any]:
    real = tf.not_equal(example["inputs"], _FILLER)
    names = ("inputs", "inputs_segment_ids", "inputs_positions")
    return {**example, **{name: tf.where(real, example[name], 0) for name in names}}
