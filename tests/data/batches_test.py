import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from variator_jax.data import epochs
from variator_jax.data.batches import batches, task_or_mixture
from variator_jax.data.docs_tasks import docs_examples_of
from variator_jax.data.vocabulary import docs_vocabulary
from variator_jax.errors import DataError

LENGTHS = {"inputs": 32, "targets": 8}
SHAPES = {
    "encoder_input_tokens": (8, 32),
    "decoder_input_tokens": (8, 8),
    "decoder_target_tokens": (8, 8),
    "decoder_loss_weights": (8, 8),
}
EVERYTHING = ("docs_topic", "docs_span_corruption", "docs_tasks")


def _take(count, name="docs_topic", split="train", size=8, **options):
    return list(itertools.islice(batches(name, split, size, LENGTHS, **options), count))


def _same(one, other):
    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)
        for a, b in zip(one, other, strict=True)
    )


def _count(name, split="train"):
    return len(_take(None, name, split=split, size=1, repeat=False, shuffle=False))


@pytest.mark.parametrize("name", EVERYTHING)
def test_batches_have_the_layout_of_t5x(name):
    (batch,) = _take(1, name)
    assert {key: value.shape for key, value in batch.items()} == SHAPES
    assert {value.dtype for value in batch.values()} == {np.dtype(np.int32)}
    targets = batch["decoder_target_tokens"]
    assert not batch["decoder_input_tokens"][:, 0].any()
    assert (batch["decoder_input_tokens"][:, 1:] == targets[:, :-1]).all()
    assert (batch["decoder_loss_weights"] == (targets != 0)).all()


@pytest.mark.parametrize("task", ["docs_topic", "docs_name"])
def test_rows_in_memory_are_what_seqio_itself_makes(task):
    provider = task_or_mixture(task)
    expected = epochs.through_seqio(provider, "validation", LENGTHS, 0)
    found = epochs.epoch(provider, "validation", LENGTHS, 0)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(found[key], value)
        assert found[key].dtype == value.dtype


def test_long_texts_are_cut_and_still_end():
    lengths = {"inputs": 5, "targets": 2}
    batch = next(batches("docs_name", "train", 16, lengths))
    assert (batch["encoder_input_tokens"][:, -1] == 1).all()
    assert (batch["decoder_target_tokens"][:, -1] == 1).all()


@pytest.mark.parametrize("name", EVERYTHING)
def test_the_seed_decides_everything(name):
    one = _take(5, name, seed=1)
    assert _same(one, _take(5, name, seed=1))
    assert not _same(one, _take(5, name, seed=2))


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(EVERYTHING), st.integers(0, 90), st.booleans())
def test_starting_at_a_batch_gives_what_follows_from_the_beginning(name, start, shuffle):
    beginning = _take(start + 3, name, seed=5, shuffle=shuffle)
    assert _same(beginning[start:], _take(3, name, seed=5, shuffle=shuffle, start_batch=start))


@pytest.mark.parametrize("packed", [False, True])
def test_starting_at_a_batch_past_the_end_of_one_epoch_gives_nothing(packed):
    assert _take(3, split="validation", repeat=False, start_batch=10**6, packed=packed) == []


def test_an_epoch_has_every_example_once_in_a_new_order():
    count = _count("docs_topic")
    rows = np.concatenate([b["encoder_input_tokens"] for b in _take(2 * count, size=1)])
    first, second = rows[:count], rows[count:]
    assert (first != second).any()
    assert sorted(map(bytes, first)) == sorted(map(bytes, second))
    assert count == len(docs_examples_of("docs_topic", "train"))


def test_span_corruption_draws_new_noise_every_epoch():
    count = _count("docs_span_corruption")
    rows = [
        b["encoder_input_tokens"].tobytes()
        for b in _take(2 * count, "docs_span_corruption", size=1, shuffle=False)
    ]
    assert sum(a == b for a, b in zip(rows[:count], rows[count:], strict=True)) < count / 10


def test_evaluation_pads_the_last_batch_with_zero_rows():
    count = _count("docs_topic", "validation")
    size = next(size for size in (7, 8, 9, 10) if count % size)
    options = {"split": "validation", "size": size, "repeat": False, "shuffle": False}
    padded = _take(None, pad_last=True, **options)
    assert len(padded) == -(-count // size)
    rows = np.concatenate([b["encoder_input_tokens"] for b in padded])
    assert rows[:count].any(axis=1).all() and not rows[count:].any()
    last = padded[-1]
    assert not any(last[key][count % size :].any() for key in last)
    assert _same(_take(None, **options), padded[:-1])
    vocabulary = docs_vocabulary()
    texts = [e["inputs"] for e in docs_examples_of("docs_topic", "validation")]
    assert rows[0, :3].tolist() == vocabulary.encode(texts[0])[:3]


def test_a_mixture_gives_every_task_its_share_and_one_epoch_of_all():
    names = ("docs_topic", "docs_pair", "docs_name")
    prompts = {}
    for name in names:
        for batch in _take(None, name, repeat=False, size=1):
            prompts[batch["encoder_input_tokens"].tobytes()] = name
    mixed = np.concatenate([b["encoder_input_tokens"] for b in _take(60, "docs_tasks", size=16)])
    drawn = [prompts[row.tobytes()] for row in mixed]
    assert all(0.27 < drawn.count(name) / len(drawn) < 0.40 for name in names)
    total = _count("docs_tasks")
    assert total == sum(_count(name) for name in names)
    epoch = _take(None, "docs_tasks", size=1, repeat=False)
    assert {b["encoder_input_tokens"].tobytes() for b in epoch} == set(prompts)


@pytest.mark.parametrize("k", [1, 4])
def test_packed_examples_start_on_multiples(k):
    lengths = {"inputs": 96, "targets": 24}
    options = {"packed": True, "pad_inputs_to_multiple": k}
    stream = batches("docs_topic", "train", 4, lengths, **options)
    first = list(itertools.islice(stream, 6))
    resumed = batches("docs_topic", "train", 4, lengths, start_batch=3, **options)
    assert _same(first[3:], list(itertools.islice(resumed, 3)))
    tokens = np.concatenate([b["encoder_input_tokens"] for b in first])
    segments = np.concatenate([b["encoder_segment_ids"] for b in first])
    positions = np.concatenate([b["encoder_positions"] for b in first])
    assert segments.max() > 1
    starts = (tokens != 0) & (positions == 0)
    assert (np.nonzero(starts)[1] % k == 0).all()
    # A group of k never holds tokens of two examples.
    for group in np.where(tokens != 0, segments, 0).reshape(-1, k):
        assert len(set(group[group != 0])) <= 1
    for batch in first:  # inputs and targets of an example have the same segment
        for inputs, targets in zip(
            batch["encoder_segment_ids"], batch["decoder_segment_ids"], strict=True
        ):
            assert set(inputs) - {0} == set(targets) - {0}


def test_streams_make_the_same_batches_whoever_reads_which():
    options = {"packed": True, "streams": 4, "seed": 3}
    whole = _take(4, read_streams=range(4), **options)
    for own in ((1,), (0, 3)):
        rows = [row for stream in own for row in (2 * stream, 2 * stream + 1)]
        for part, batch in zip(_take(4, read_streams=own, **options), whole, strict=True):
            for key, value in batch.items():
                np.testing.assert_array_equal(part[key][rows], value[rows])
                assert not np.delete(part[key], rows, axis=0).any()
    assert _same(whole[2:], _take(2, read_streams=range(4), start_batch=2, **options))


def test_streams_share_the_examples_of_an_epoch_without_overlap(monkeypatch):
    monkeypatch.setattr(epochs, "_BYTES_IN_MEMORY", 0)
    size = _count("docs_topic", "validation") // 8
    streams = {"split": "validation", "shuffle": False, "streams": 4, "read_streams": range(4)}
    found = np.concatenate([b["encoder_input_tokens"] for b in _take(size, **streams)])
    known = np.concatenate(
        [b["encoder_input_tokens"] for b in _take(size, split="validation", shuffle=False)]
    )
    assert len(found) == len(known)
    assert sorted(map(bytes, found)) == sorted(map(bytes, known))


def test_streams_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(DataError, match="divisor of the batch size"):
        _take(1, packed=True, streams=3)


def test_tasks_too_large_for_memory_are_streamed_with_the_same_examples(monkeypatch):
    options = {"split": "validation", "repeat": False, "shuffle": False, "pad_last": True}
    expected = _take(None, **options)
    monkeypatch.setattr(epochs, "_BYTES_IN_MEMORY", 0)
    assert _same(_take(None, **options), expected)
    examples = docs_examples_of("docs_topic", "train")
    assert _count("docs_topic") == len(examples)
    shuffled = _take(12, seed=3)
    assert _same(shuffled[5:], _take(7, seed=3, start_batch=5))
    assert len(_take(3, "docs_tasks")) == 3


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("docs_topik", "train", 8, LENGTHS), "Did you mean 'docs_topic'"),
        (("docs_topic", "valid", 8, LENGTHS), "Did you mean 'validation'"),
        (("docs_topic", "train", 0, LENGTHS), "batch_size 0"),
        (("docs_topic", "train", 8, {"inputs": 8}), "expected positive 'inputs' and 'targets'"),
        (("docs_topic", "train", 8, {"inputs": 8, "targets": 0}), "expected positive"),
    ],
)
def test_wrong_arguments_are_told_before_the_first_batch(arguments, message):
    with pytest.raises(DataError, match=message):
        batches(*arguments)


def test_a_negative_seed_is_refused():
    with pytest.raises(DataError, match="not -1"):
        batches("docs_topic", "train", 8, LENGTHS, seed=-1)
