"""Which rows share a batch, on the real engine of a tiny model whose latencies are set."""

import itertools
import threading
import time

import pytest
import served

from variator_jax.serving.batcher import BackendError, Batcher, Overloaded, Row, batch_rows
from variator_jax.serving.policy import PolicyConfig


def test_a_batch_has_the_rows_that_give_the_most_rows_a_second():
    linear = {1: 1.0, 2: 2.0, 4: 4.0, 8: 8.0}  # a processor: filling up costs as much as rows
    flat = {1: 1.0, 2: 1.01, 4: 1.02, 8: 1.04}  # an accelerator: filling up costs nothing
    assert batch_rows(linear, 5) in (1, 2, 4)
    assert batch_rows(flat, 5) == 5
    assert batch_rows(flat, 100) == 8
    assert batch_rows({1: 1.0}, 3) == 1  # larger ones took too long


def row(length, gears, program="embed"):
    return Row([5] * (length - 1) + [1], program, gears)


def put(batcher, rows):
    """The rows, in the queue."""
    batcher.put(rows)
    return rows


def answers(rows, seconds=30):
    """The result of each row, or its exception."""
    return [row.result.exception(seconds) or row.result.result() for row in rows]


@pytest.fixture
def batcher(monkeypatch):
    engine = served.warm()
    made, real = Batcher(engine, PolicyConfig(target=60.0), most_wait=60.0), engine.dispatch
    made.starts = []
    monkeypatch.setattr(engine, "dispatch", lambda *args: made.starts.append(args) or real(*args))
    yield made
    made.end()


def test_a_batch_has_one_program_one_plugin_and_lengths_of_the_oldest_or_below(batcher):
    kinds = [*itertools.product((9, 30), (0, 1), ("embed", "labels"))]
    rows = put(batcher, [row(length, [gear], program) for length, gear, program in 3 * kinds])
    assert not any(isinstance(answer, Exception) for answer in answers(rows))
    assert [row.gears for row in rows] == [[gear] for _, gear, _ in 3 * kinds]
    for program, _, ids, _ in batcher.starts:
        assert program in ("embed", "labels")
        assert len(ids) <= batcher._engine.limits.rows(32 if max(map(len, ids)) > 16 else 16)
    ran = {(program, plugin) for program, plugin, *_ in batcher.starts}
    assert ran == {*itertools.product(("embed", "labels"), batcher.gears)}
    assert sum(len(ids) for _, _, ids, _ in batcher.starts) == 24
    assert batcher.state()["queued"] == 0 and batcher.state()["queued_seconds"] == 0


def test_all_rows_of_a_request_have_the_plugin_of_its_first(batcher):
    shared = [0, 1]
    answers(put(batcher, [row(9, shared) for _ in range(40)]))
    assert shared == [0] and {plugin for _, plugin, *_ in batcher.starts} == {"none"}


def test_a_batch_that_fails_is_the_error_of_its_rows_and_the_next_ones_run(
    batcher, monkeypatch, caplog
):
    monkeypatch.setattr(batcher._engine.model, "encode", lambda *_, **__: 1 / 0)
    [bad] = answers(put(batcher, [row(9, [0])]))
    assert isinstance(bad, BackendError)
    assert "ZeroDivisionError" in caplog.text and "Zero" not in str(bad)
    monkeypatch.undo()
    assert not isinstance(answers(put(batcher, [row(9, [0])]))[0], Exception)


def with_latency(monkeypatch, seconds):
    engine = served.warm()
    monkeypatch.setattr(engine, "latency", dict.fromkeys(engine.latency, seconds))
    return engine


def test_an_answer_does_not_wait_for_the_time_that_its_batch_was_expected_to_take(monkeypatch):
    batcher = Batcher(with_latency(monkeypatch, 20.0), PolicyConfig(), most_wait=60.0)
    answers(put(batcher, [row(9, [0])]), 5)
    batcher.end()


def test_the_next_batch_is_given_to_the_device_shortly_before_the_last_ends(monkeypatch):
    engine, device, started, ended = with_latency(monkeypatch, 0.1), threading.Lock(), [], []

    def dispatch(program, plugin, rows, per_token):
        """A device that takes as long as it was expected to."""

        def results():
            with device:
                time.sleep(0.1)
                ended.append(time.monotonic())
            return [None] * len(rows)

        started.append(time.monotonic())
        return results

    monkeypatch.setattr(engine, "dispatch", dispatch)
    batcher = Batcher(engine, PolicyConfig(), most_wait=60.0)
    answers(put(batcher, [row(30, [0]) for _ in range(8)]), 10)
    batcher.end()
    gaps = [start - end for start, end in zip(started[2:], ended, strict=False)]
    assert len(gaps) >= 3 and min(gaps) > 0.04


def test_a_request_that_the_queue_has_no_room_for_is_refused_by_its_own_cost(
    held_device, monkeypatch
):
    batcher = Batcher(with_latency(monkeypatch, 0.1), PolicyConfig(), most_wait=0.5)
    rows = put(batcher, [row(30, [0]) for _ in range(2)])
    while batcher.state()["queued"] > 1:
        time.sleep(0.001)
    with pytest.raises(Overloaded):
        batcher.put([row(30, [0]) for _ in range(9)])
    rows += put(batcher, [row(30, [0])])
    held_device.set()
    answers(rows, 10)
    batcher.end()


def test_what_waits_of_a_request_costs_what_its_plugin_does(held_device, monkeypatch):
    engine, shared = served.warm(), [0, 1]
    slow = {key: 1.0 if key[1] == "none" else 0.5 for key in engine.latency}
    monkeypatch.setattr(engine, "latency", slow)
    batcher = Batcher(engine, PolicyConfig(target=60.0), most_wait=60.0)
    rows = put(batcher, [row(30, shared) for _ in range(5)])
    while batcher.state()["queued"] > 4:
        time.sleep(0.001)
    assert len({*batcher._queued["embed"].tolist()}) == 1  # [4, 4] or [2, 2], not [4, 2]
    held_device.set()
    answers(rows, 10)
    batcher.end()


def test_a_batcher_that_fails_gives_its_error_to_all_that_wait(monkeypatch):
    batcher = Batcher(served.warm(), PolicyConfig(), most_wait=60.0)
    assert batcher.alive
    monkeypatch.setattr("variator_jax.serving.batcher.batch_rows", lambda *_: 1 / 0)
    found = answers(put(batcher, [row(9, [0]) for _ in range(3)]), 10)
    assert all(isinstance(answer, BackendError) for answer in found)
    assert not batcher.alive
    with pytest.raises(BackendError):
        batcher.put([row(9, [0])])
    batcher.end()


def test_a_row_keeps_the_vectors_of_its_own_tokens_if_it_asked_for_them():
    rows = [[5, 1], [6, 7, 1]]
    plain, asked = served.warm().dispatch("embed", "none", rows, [False, True])()
    assert plain.tokens is None
    assert asked.tokens.shape[0] == 3 and asked.tokens.base is None
