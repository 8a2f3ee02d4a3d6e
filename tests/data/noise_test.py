import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from variator_jax.data import noise
from variator_jax.errors import DataError

VOCAB = 10_000


def _restore(inputs, targets):
    """Puts the targets' spans back into the inputs: the inverse of span corruption."""
    spans, current = {}, None
    for token in targets:
        if token >= VOCAB - 1000:
            current = spans.setdefault(int(token), [])
        else:
            current.append(int(token))
    restored = []
    for token in inputs:
        restored += spans[int(token)] if token >= VOCAB - 1000 else [int(token)]
    return restored


@given(st.integers(2, 300), st.integers(1, 4), st.integers(0, 2**31))
def test_spans_put_back_give_the_original_tokens(length, rows, seed):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, VOCAB - 1000, (rows, length))
    inputs, targets = noise.corrupt(tokens, rng, VOCAB)
    for row in range(rows):
        assert _restore(inputs[row], targets[row]) == tokens[row].tolist()
        sentinels = [t for t in inputs[row] if t >= VOCAB - 1000]
        assert sentinels == [VOCAB - 1 - i for i in range(len(sentinels))]
    expected = noise.corrupted_lengths(length)
    assert (inputs.shape[1] + 1, targets.shape[1] + 1) == expected


def test_density_and_mean_span_are_those_asked_for():
    mask = noise.noise_mask(200, 400, np.random.default_rng(0))
    begins = mask[:, 1:] & ~mask[:, :-1]
    assert mask.mean() == pytest.approx(0.15, abs=0.002)
    assert mask.sum() / begins.sum() == pytest.approx(3.0, abs=0.1)
    assert not mask[:, 0].any() and mask[:, -1].all()
    # Every place is noise in some row, and no place always, apart from the two ends.
    assert mask.any(axis=0)[1:].all() and not mask.all(axis=0)[:-1].any()


def test_rows_are_corrupted_differently_and_the_same_seed_gives_the_same():
    one = noise.noise_mask(8, 100, np.random.default_rng(1))
    assert len({row.tobytes() for row in one}) == 8
    assert (one == noise.noise_mask(8, 100, np.random.default_rng(1))).all()
    assert (one != noise.noise_mask(8, 100, np.random.default_rng(2))).any()


@given(st.integers(3, 2000))
def test_a_chunk_fills_the_inputs_and_never_overflows_them(inputs_length):
    length = noise.chunk_length(inputs_length)
    assert noise.corrupted_lengths(length)[0] <= inputs_length
    assert noise.corrupted_lengths(length + 1)[0] > inputs_length


def test_what_cannot_be_corrupted_is_refused():
    with pytest.raises(DataError, match="at least 3"):
        noise.chunk_length(2)
    with pytest.raises(DataError, match="at least 2"):
        noise.noise_mask(1, 1, np.random.default_rng(0))
    with pytest.raises(DataError, match="sentinels"):
        noise.check_room({"inputs": 512, "targets": 128}, extra_ids=5)
    assert noise.check_room({"inputs": 512, "targets": 128}, extra_ids=0) == 568
