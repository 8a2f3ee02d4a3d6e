import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from task_batches import parsed_task, same, take, texts

from variator_jax.data import batches, order
from variator_jax.data._tf import seqio, tf
from variator_jax.data.batches import mixture, task_or_mixture
from variator_jax.data.docs_tasks import docs_examples_of
from variator_jax.data.tasks import text_to_text_task
from variator_jax.data.vocabulary import byte_vocabulary
from variator_jax.errors import DataError

LENGTHS = {"inputs": 32, "targets": 8}
EVERYTHING = ("docs_topic", "docs_span_corruption", "docs_tasks")
TASKS = ("docs_topic", "docs_pair", "docs_name")
ONCE = {"repeat": False, "shuffle": False}


def _rows(batches, key="encoder_input_tokens"):
    return np.concatenate([batch[key] for batch in batches])


def _count(name, split="train"):
    return len(take(None, name, split, 1, **ONCE))


@pytest.fixture(params=[False, True], ids=["in memory", "streamed"])
def streamed(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(order, "_BYTES_IN_MEMORY", 0)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("task", ["docs_topic", "docs_name"])
def test_rows_are_what_seqio_itself_makes(task, packed, streamed):
    lengths = {"inputs": 96, "targets": 24} if packed else LENGTHS
    dataset = task_or_mixture(task).get_dataset(lengths, "validation", shuffle=False)
    options = {"packed": packed, "pad_inputs_to_multiple": 4, **ONCE}
    made = take(None, task, "validation", 1, lengths, **options)
    grouped = type("Fours", (batches.GroupedFeatureConverter,), {"group": 4})
    for converter in (grouped,) if packed else (grouped, seqio.EncDecFeatureConverter):
        converted = converter(pack=packed)(dataset, lengths).batch(1)
        assert same(made, list(converted.as_numpy_iterator()))
    assert {value.dtype for value in made[0].values()} == {np.dtype(np.int32)}


def test_long_texts_are_cut_and_still_end():
    (batch,) = take(1, "docs_name", size=16, lengths={"inputs": 5, "targets": 2})
    for name in ("encoder_input_tokens", "decoder_target_tokens"):
        assert (batch[name][:, -1] == 1).all()


@settings(max_examples=12)
@given(st.sampled_from(EVERYTHING), st.integers(0, 90), st.booleans())
def test_starting_at_a_batch_gives_what_follows_from_the_beginning(name, start, shuffle):
    beginning = take(start + 3, name, seed=5, shuffle=shuffle)
    assert same(beginning[start:], take(3, name, seed=5, shuffle=shuffle, start_batch=start))
    assert not shuffle or not same(beginning[:3], take(3, name, seed=6))


def test_streamed_and_packed_batches_are_resumed_too(streamed):
    for options in ({"seed": 3}, {"seed": 3, "packed": True}):
        resumed = take(3, "docs_tasks", start_batch=5, **options)
        assert same(take(8, "docs_tasks", **options)[5:], resumed)
        assert take(3, "docs_topic", "validation", repeat=False, start_batch=10**6, **options) == []


def test_an_epoch_has_every_example_once_in_a_new_order():
    count = len(docs_examples_of("docs_topic", "train"))
    rows = [row.tobytes() for row in _rows(take(2 * count, "docs_topic", size=1))]
    assert rows[:count] != rows[count:] and sorted(rows[:count]) == sorted(rows[count:])


def test_evaluation_pads_the_last_batch_with_zero_rows(streamed):
    count = _count("docs_topic", "validation")
    size = next(size for size in (7, 8, 9, 10) if count % size)
    padded = take(None, "docs_topic", "validation", size, pad_last=True, **ONCE)
    assert len(padded) == -(-count // size)
    assert _rows(padded)[:count].any(axis=1).all()
    assert not any(value[count % size :].any() for value in padded[-1].values())
    assert same(take(None, "docs_topic", "validation", size, **ONCE), padded[:-1])


def test_a_mixture_gives_every_task_its_share_and_one_epoch_of_all(streamed):
    owner = {bytes(row): name for name in TASKS for row in _rows(take(None, name, size=1, **ONCE))}
    mixed = _rows(take(60, "docs_tasks", size=16))
    drawn = [owner[bytes(row)] for row in mixed]
    assert all(0.27 < drawn.count(name) / len(drawn) < 0.40 for name in TASKS)
    epoch = _rows(take(None, "docs_tasks", size=1, repeat=False))
    assert len(epoch) == sum(_count(name) for name in TASKS)
    assert set(map(bytes, epoch)) == set(owner)


@pytest.mark.parametrize(
    "name, packed, memory",
    [("docs_tasks", False, 2**20), ("docs_topic", True, 2**20), ("docs_topic", False, 0)],
)
def test_streams_make_the_same_batches_whoever_reads_which(name, packed, memory, monkeypatch):
    monkeypatch.setattr(order, "_BYTES_IN_MEMORY", memory)
    options = {"packed": packed, "streams": 4, "seed": 3}
    complete = take(4, name, read_streams=range(4), **options)
    rows = [2, 3, 6, 7]  # of the streams 1 and 3
    for part, batch in zip(take(4, name, read_streams=(1, 3), **options), complete, strict=True):
        for key, value in batch.items():
            np.testing.assert_array_equal(part[key][rows], value[rows])
            assert not np.delete(part[key], rows, axis=0).any()
    resumed = take(2, name, read_streams=range(4), start_batch=2, **options)
    assert same(complete[2:], resumed)


def test_streams_share_the_examples_of_an_epoch_without_overlap(streamed):
    size = _count("docs_topic", "validation") // 8
    ordered = {"split": "validation", "shuffle": False}
    one = _rows(take(size, "docs_topic", **ordered))
    four = _rows(take(size, "docs_topic", streams=4, read_streams=range(4), **ordered))
    assert sorted(map(bytes, one)) == sorted(map(bytes, four))


@pytest.mark.parametrize("changed, message", [
    ({"task_name": "docs_topik"}, "Did you mean 'docs_topic'"),
    ({"split": "valid"}, "Did you mean 'validation'"),
    ({"batch_size": 0}, "batch_size 0"),
    ({"feature_lengths": {"inputs": 8}}, "expected positive 'inputs' and 'targets'"),
    ({"seed": -1}, "seed -1"),
    ({"packed": True, "pad_inputs_to_multiple": 0}, "multiple 0"),
    ({"streams": 3}, "8 rows cannot be cut into 3"),
])  # fmt: skip
def test_wrong_arguments_are_refused_before_the_first_batch(changed, message):
    arguments = {"task_name": "docs_topic", "split": "train", "batch_size": 8}
    with pytest.raises(DataError, match=message):
        batches.batches(**{**arguments, "feature_lengths": LENGTHS, **changed})


def test_tasks_of_seqios_own_are_read_too_and_empty_ones_refused():
    dataset = tf.data.Dataset.from_tensors({"inputs": "an array", "targets": "yes"})
    for name, rows in (("foreign", dataset.repeat(3)), ("foreign_empty", dataset.take(0))):
        make = functools.partial(lambda rows, split, shuffle_files, seed=None: rows, rows)
        seqio.TaskRegistry.add(
            name,
            source=seqio.FunctionDataSource(make, splits=("train",)),
            preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
            output_features=task_or_mixture("docs_topic").output_features,
        )
    with pytest.raises(DataError, match="another task named 'foreign'"):
        text_to_text_task("foreign", lambda split: [], ("train",), byte_vocabulary())
    assert texts("foreign") == [("an array", "yes")] * 3
    (batch,) = take(1, "foreign", size=3, **ONCE)
    assert (batch["decoder_target_tokens"][:, 1] == 1).all()
    with pytest.raises(DataError, match="no examples in the split 'train'"):
        take(1, "foreign_empty")


def test_mixed_tasks_are_drawn_by_their_rates_and_resumed():
    name = mixture(("docs_span_corruption", "docs_pair"), (1, 3))
    beginning = take(40, name, size=16)
    labelled = np.mean((_rows(beginning, "decoder_target_tokens") != 0).sum(1) == 2)
    assert 0.7 < labelled < 0.8  # a label and the end of the sequence
    far = take(2, name, size=16, start_batch=200)  # in another block of draws
    assert same(far, take(202, name, size=16)[200:])


def test_a_mixture_has_one_name_and_may_hold_another(fresh_gin, tmp_path):
    pair = ("docs_topic", "docs_pair")
    assert mixture(pair, (1, 2)) == mixture(list(pair), [1.0, 2.0]) != mixture(pair, (1, 3))
    assert mixture(pair, (1, 1), "evenly") == "evenly"
    with pytest.raises(DataError, match="'evenly' is already registered"):
        mixture(pair, (1, 3), "evenly")
    outer = task_or_mixture(mixture(("docs_labels", "docs_name"), (3, 1)))
    assert sorted(outer.get_rate(task) for task in outer.tasks) == [1.0, 1.5, 1.5]
    (tmp_path / "mixed.gin").write_text(
        "from __gin__ import dynamic_registration\n"
        "from variator_jax.data import batches\n"
        "MIXTURE_OR_TASK_NAME = @batches.mixture()\n"
        f"batches.mixture:\n  tasks = {pair}\n  rates = (1, 2)\n"
    )
    assert parsed_task([str(tmp_path / "mixed.gin")]) == mixture(pair, (1, 2))


def test_tasks_and_rates_that_do_not_fit_are_refused():
    text_to_text_task("of_bytes", lambda split: [], ("train",), byte_vocabulary())
    for tasks, rates, message in (
        (("docs_topic", "docs_pear"), (1, 1), "Did you mean 'docs_pair'"),
        (("docs_topic", "docs_pair"), (1,), "a rate above 0 each"),
        (("docs_topic", "docs_pair"), (1, 0), "a rate above 0 each"),
        (("docs_topic", "docs_topic"), (1, 1), "each once"),
        (("docs_topic", "of_bytes"), (1, 1), "share one vocabulary.*ByteVocabulary"),
    ):
        with pytest.raises(DataError, match=message):
            mixture(tasks, rates)
    for name in ("docs_topic", "docs_labels"):
        with pytest.raises(DataError, match=f"{name!r} is a task or a mixture already"):
            mixture(("docs_topic", "docs_name"), (1, 1), name)


def test_packed_examples_start_on_group_borders_with_padding_between():
    rows = [
        {"inputs": np.array([i] * n + [1] + [0] * (15 - n)), "targets": np.array([i, 1, 0, 0])}
        for i, n in ((2, 3), (3, 2), (4, 4), (5, 9))
    ]
    first, second = batches.pack(rows, {"inputs": 16, "targets": 8}, 4)
    groups = {name: array.reshape(-1, 4).tolist() for name, array in first.items()}
    assert groups == {
        "inputs": [[2, 2, 2, 1], [3, 3, 1, 0], [4, 4, 4, 4], [1, 0, 0, 0]],
        "inputs_segment_ids": [[1, 1, 1, 1], [2, 2, 2, 0], [3, 3, 3, 3], [3, 0, 0, 0]],
        "inputs_positions": [[0, 1, 2, 3], [0, 1, 2, 0], [0, 1, 2, 3], [4, 0, 0, 0]],
        "targets": [[2, 1, 3, 1], [4, 1, 0, 0]],
        "targets_segment_ids": [[1, 1, 2, 2], [3, 3, 0, 0]],
        "targets_positions": [[0, 1, 0, 1], [0, 1, 0, 0]],
    }
    assert second["inputs"].tolist() == [5] * 9 + [1] + [0] * 6
