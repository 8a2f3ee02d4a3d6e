import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from task_batches import restored

from variator_jax.data import span_corruption
from variator_jax.data._tf import seqio
from variator_jax.data.docs_tasks import docs_examples_of
from variator_jax.data.vocabulary import docs_vocabulary
from variator_jax.errors import DataError

LENGTHS = {"inputs": 48, "targets": 16}
SENTINELS = 9_000  # the first of them


def _masks(rows, length, seed):
    seeds = np.array([[seed, 1], [seed, 2]])
    return span_corruption.noise_mask(np.array([rows, length], np.int32), seeds).numpy()


def _examples(seed, epochs=1):
    task = seqio.get_mixture_or_task("docs_span_corruption")
    dataset = task.get_dataset(LENGTHS, "train", shuffle=False, seed=seed, num_epochs=epochs)
    return list(dataset.as_numpy_iterator())


@settings(max_examples=40)
@given(st.integers(2, 300), st.integers(1, 4), st.integers(0, 2**31))
def test_spans_put_back_give_the_original_tokens(length, rows, seed):
    tokens = np.random.default_rng(seed).integers(3, SENTINELS, (rows, length)).astype(np.int32)
    masks = _masks(rows, length, seed)
    parts = (span_corruption.replace_spans(tokens, mask, 10_000) for mask in (masks, ~masks))
    inputs, targets = (part.numpy() for part in parts)
    for row, corrupted in enumerate(inputs):
        assert restored(corrupted, targets[row], SENTINELS) == tokens[row].tolist()
        sentinels = corrupted[corrupted >= SENTINELS]
        assert sentinels.tolist() == [9_999 - i for i in range(len(sentinels))]
    lengths = (inputs.shape[1] + 1, targets.shape[1] + 1)
    assert lengths == span_corruption.corrupted_lengths(length)


def test_density_and_mean_span_are_those_of_the_paper():
    masks = _masks(200, 400, 0)
    begins = masks[:, 1:] & ~masks[:, :-1]
    assert masks.mean() == pytest.approx(0.15, abs=0.002)
    assert masks.sum() / begins.sum() == pytest.approx(3.0, abs=0.1)
    assert not masks[:, 0].any() and masks[:, -1].all()
    # Every place is noise in some row, and no place always, apart from the two ends.
    assert masks.any(axis=0)[1:].all() and not masks.all(axis=0)[:-1].any()
    assert len({mask.tobytes() for mask in masks}) == 200


@given(st.integers(3, 2000))
def test_a_chunk_fills_the_inputs_and_never_overflows_them(inputs_length):
    length = span_corruption.chunk_length(inputs_length)
    assert span_corruption.corrupted_lengths(length)[0] <= inputs_length
    assert span_corruption.corrupted_lengths(length + 1)[0] > inputs_length


def test_what_cannot_be_corrupted_is_refused_and_cut_targets_are_announced(caplog):
    with pytest.raises(DataError, match="at least 3"):
        span_corruption.chunk_length(2)
    with pytest.raises(DataError, match="sentinels"):
        span_corruption.chunk_for({"inputs": 512, "targets": 128}, extra_ids=5)
    assert span_corruption.chunk_for({"inputs": 512, "targets": 128}, extra_ids=0) == 568
    with caplog.at_level("WARNING", logger="absl"):
        span_corruption.chunk_for({"inputs": 48, "targets": 4}, 100)
    assert "cut to 4" in caplog.text


def test_the_seqio_task_restores_to_the_text_and_fills_its_inputs():
    vocabulary = docs_vocabulary()
    base = vocabulary.vocab_size - vocabulary.extra_ids
    examples = _examples(0)
    assert all(e["inputs"][-1] == e["targets"][-1] == 1 for e in examples)
    tokens = [restored(e["inputs"], e["targets"], base) for e in examples]
    texts = [e["targets"] for e in docs_examples_of("docs_span_corruption", "train")]
    expected = itertools.chain.from_iterable(map(vocabulary.encode, texts))
    assert list(itertools.chain.from_iterable(tokens)) == list(expected)
    full = span_corruption.corrupted_lengths(span_corruption.chunk_length(48))
    assert (len(examples[0]["inputs"]), len(examples[0]["targets"])) == full
    assert full[0] in (47, 48)


def test_noise_depends_on_the_seed_and_is_new_in_every_epoch():
    runs = [(3, 1), (3, 1), (4, 1), (3, 2)]
    once, again, other, twice = ([e["inputs"].tolist() for e in _examples(*run)] for run in runs)
    assert once == again != other
    assert len(twice) == 2 * len(once) and twice[len(once) :] != once
