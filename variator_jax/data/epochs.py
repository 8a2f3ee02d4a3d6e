"""Finished examples in memory, and the order in which they are read: numpy index arithmetic.

An epoch of a task is a dict of arrays [examples, length] in T5X's layout. What is random is drawn
from (seed, stream, epoch), never from what was read before, so reading can begin at any row.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from variator_jax.data import noise
from variator_jax.data._tf import seqio
from variator_jax.data.sources import LazySource
from variator_jax.data.spec import get_spec, spec_names
from variator_jax.errors import DataError

Batch = dict[str, np.ndarray]
_BYTES_IN_MEMORY = 512 * 2**20  # of one epoch of one task, as int32 arrays
_NOISE, _MIXING = 1 << 20, 1 << 21  # streams of random numbers beside those of the tasks' orders


@dataclasses.dataclass(frozen=True)
class Order:
    """How examples are put in order: the seed, whether to shuffle, whether to go on for ever."""

    seed: int
    shuffle: bool
    repeat: bool

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise DataError(f"a seed is 0 or more, not {self.seed}")

    def permutation(self, epoch: int, size: int, stream: int = 0) -> np.ndarray:
        """Returns the order of one epoch, int [size]; `stream` tells a mixture's tasks apart."""
        if not self.shuffle:
            return np.arange(size)
        return np.random.default_rng([self.seed, stream, epoch]).permutation(size)

    def noise_seed(self, epoch: int) -> int:
        """Returns the seed of an epoch's span corruption."""
        return int(np.random.default_rng([self.seed, _NOISE, epoch]).integers(2**31))

    def tasks(self, rates: np.ndarray, block: int, size: int) -> np.ndarray:
        """Returns which task each row of a block of a mixture comes from, int [size]."""
        return np.random.default_rng([self.seed, _MIXING, block]).choice(len(rates), size, p=rates)


def fits_in_memory(task: Any, split: str, lengths: Mapping[str, int]) -> bool:
    """Whether one epoch of a task of known size and kind is small enough to be kept.

    Where the source does not lie in memory, the texts of span corruption say nothing about how many
    examples they become: an article may be a hundred.
    """
    if task.name not in spec_names():
        return False
    if get_spec(task.name).kind == "span_corruption" and not isinstance(task.source, LazySource):
        return False
    count = task.num_input_examples(split)
    row_bytes = 4 * (lengths["inputs"] + 3 * lengths["targets"])
    return count is not None and count * row_bytes <= _BYTES_IN_MEMORY


def epoch(task: Any, split: str, lengths: Mapping[str, int], noise_seed: int) -> Batch:
    """Returns all examples of one epoch in the task's own order.

    Only span corruption depends on `noise_seed`; its epochs have the same number of examples, since
    the text is cut before noise is drawn.

    Raises:
      DataError: if the split has no examples.
    """
    key = (task, split, tuple(sorted(lengths.items())))
    noisy = get_spec(task.name).kind == "span_corruption"
    arrays = _noisy(*key, noise_seed) if noisy else _fixed(*key)
    if not rows(arrays):
        raise DataError(f"task {task.name!r} has no examples in the split {split!r}")
    return arrays


@functools.lru_cache(maxsize=12)
def _fixed(task: Any, split: str, lengths: tuple[tuple[str, int], ...]) -> Batch:
    if not isinstance(task.source, LazySource):
        return through_seqio(task, split, dict(lengths), 0)
    examples = task.source.make(split)
    columns = {}
    for name, length in lengths:
        vocabulary = task.output_features[name].vocabulary
        tokens = encode(vocabulary, [example[name] for example in examples])
        eos = vocabulary.eos_id
        columns[name] = [[*ids[: length - 1], eos] for ids in tokens]
    return lay_out(columns["inputs"], columns["targets"], dict(lengths))


@functools.lru_cache(maxsize=3)
def _noisy(task: Any, split: str, lengths: tuple[tuple[str, int], ...], noise_seed: int) -> Batch:
    by_name = dict(lengths)
    if not isinstance(task.source, LazySource):
        return through_seqio(task, split, by_name, noise_seed)
    vocabulary = task.output_features["targets"].vocabulary
    chunk = noise.check_room(by_name, vocabulary.extra_ids)
    tokens = _tokens(task, split)
    whole = len(tokens) // chunk * chunk
    rng = np.random.default_rng(noise_seed)
    inputs: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    for part in (tokens[:whole].reshape(-1, chunk), tokens[None, whole:]):
        if part.size > 1:
            for column, corrupted in zip(
                (inputs, targets), noise.corrupt(part, rng, vocabulary.vocab_size), strict=True
            ):
                column.extend(corrupted)
    eos = [vocabulary.eos_id]
    return lay_out(
        [[*row[: by_name["inputs"] - 1], *eos] for row in inputs],
        [[*row[: by_name["targets"] - 1], *eos] for row in targets],
        by_name,
    )


@functools.lru_cache(maxsize=4)
def _tokens(task: Any, split: str) -> np.ndarray:
    """Returns all text of a span corruption task as one int32 array."""
    texts = [example["targets"] for example in task.source.make(split)]
    encoded = encode(task.output_features["targets"].vocabulary, texts)
    return np.fromiter(itertools.chain.from_iterable(encoded), np.int32)


def encode(vocabulary: Any, texts: list[str]) -> list[list[int]]:
    """Returns the token ids of each text, without EOS; much faster than a graph, text by text."""
    if isinstance(vocabulary, seqio.SentencePieceVocabulary):
        encoded: list[list[int]] = vocabulary.tokenizer.encode(texts)
        return encoded
    return [list(vocabulary.encode(text)) for text in texts]


def lay_out(
    inputs: Sequence[Sequence[int]], targets: Sequence[Sequence[int]], lengths: Mapping[str, int]
) -> Batch:
    """Returns examples in the layout of seqio's `EncDecFeatureConverter(pack=False)`."""
    target = _padded(targets, lengths["targets"])
    shifted = np.zeros_like(target)
    shifted[:, 1:] = target[:, :-1]
    return {
        "encoder_input_tokens": _padded(inputs, lengths["inputs"]),
        "decoder_target_tokens": target,
        "decoder_input_tokens": shifted,
        "decoder_loss_weights": (target != 0).astype(np.int32),
    }


def _padded(sequences: Sequence[Sequence[int]], length: int) -> np.ndarray:
    filled = np.array([len(sequence) for sequence in sequences], np.int64)
    array: np.ndarray = np.zeros((len(sequences), length), np.int32)
    flat = np.fromiter(itertools.chain.from_iterable(sequences), np.int32, int(filled.sum()))
    array[np.arange(length) < filled[:, None]] = flat
    return array


def through_seqio(task: Any, split: str, lengths: dict[str, int], seed: int) -> Batch:
    """Returns an epoch as seqio itself makes it.

    For tasks in memory without noise `epoch` gives the same. For span corruption it does not: its
    noise has the same shape and distribution, but is drawn by numpy and not by seqio.
    """
    dataset = task.get_dataset(lengths, split, shuffle=False, seed=seed, num_epochs=1)
    dataset = seqio.EncDecFeatureConverter(pack=False)(dataset, lengths)
    chunks = list(dataset.batch(1024).as_numpy_iterator())
    if not chunks:
        return lay_out([], [], lengths)
    return {key: np.concatenate([chunk[key] for chunk in chunks]) for key in chunks[0]}


def rows(arrays: Batch) -> int:
    """Returns the number of rows of a batch or an epoch."""
    return len(arrays["encoder_input_tokens"])


def pad_rows(batch: Batch, size: int) -> Batch:
    """Adds rows of zeros until there are `size`."""
    missing = size - rows(batch)
    return {key: np.pad(value, [(0, missing), (0, 0)]) for key, value in batch.items()}


class Reader:
    """Reads rows of a task one after the other, epoch after epoch, from row `start` of them all."""

    def __init__(
        self,
        task: Any,
        split: str,
        lengths: Mapping[str, int],
        order: Order,
        stream: int,
        start: int,
    ):
        self._epochs = self._walk(task, split, lengths, order, stream, start)
        self._arrays: Batch = {}
        self._left: np.ndarray = np.zeros(0, np.int64)

    @staticmethod
    def _walk(
        task: Any, split: str, lengths: Mapping[str, int], order: Order, stream: int, start: int
    ) -> Iterator[tuple[Batch, np.ndarray]]:
        size = rows(epoch(task, split, lengths, order.noise_seed(0)))
        first, skipped = divmod(start, size)
        for number in itertools.count(first):
            if number and not order.repeat:
                return
            arrays = epoch(task, split, lengths, order.noise_seed(number))
            yield arrays, order.permutation(number, size, stream)[skipped:]
            skipped = 0

    def read(self, count: int) -> Batch | None:
        """Returns the next `count` rows, fewer at the end, or None after it."""
        parts = []
        while count:
            if not len(self._left):
                following = next(self._epochs, None)
                if following is None:
                    break
                self._arrays, self._left = following
            index, self._left = self._left[:count], self._left[count:]
            count -= len(index)
            parts.append({key: value[index] for key, value in self._arrays.items()})
        if not parts:
            return None
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
