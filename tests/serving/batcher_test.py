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


class Collector:
    """Rows of requests and the order in which they were answered."""

    def __init__(self):
        self.done, self.all_done = [], threading.Event()

    def row(self, name, length, gears, program="embed", of=1):
        def done(result, gear):
            self.done.append((name, gear, result))
            if len(self.done) == of:
                self.all_done.set()

        return Row([5] * (length - 1) + [1], program, gears, done)


@pytest.fixture
def batcher(monkeypatch):
    engine = served.warm()
    made, real = Batcher(engine, PolicyConfig(target=60.0), most_wait=60.0), engine.dispatch
    made.starts = []
    monkeypatch.setattr(engine, "dispatch", lambda *args: made.starts.append(args) or real(*args))
    yield made
    made.end()


def test_a_batch_has_one_program_one_plugin_and_lengths_of_the_oldest_or_below(batcher):
    collector = Collector()
    kinds = [*itertools.product((9, 30), (0, 1), ("embed", "labels"))]
    batcher.put([collector.row(kind, kind[0], [kind[1]], kind[2], of=24) for kind in 3 * kinds])
    assert collector.all_done.wait(30)
    assert all(name[1] == gear for name, gear, _ in collector.done)
    for program, _, ids, _ in batcher.starts:
        assert program in ("embed", "labels")
        assert len(ids) <= batcher._engine.limits.rows(32 if max(map(len, ids)) > 16 else 16)
    ran = {(program, plugin) for program, plugin, *_ in batcher.starts}
    assert ran == {*itertools.product(("embed", "labels"), batcher.gears)}
    assert sum(len(ids) for _, _, ids, _ in batcher.starts) == 24
    assert batcher.state()["queued"] == 0 and batcher.state()["queued_seconds"] == 0


def test_all_rows_of_a_request_have_the_plugin_of_its_first(batcher):
    collector, shared = Collector(), [0, 1]
    batcher.put([collector.row(i, 9, shared, of=40) for i in range(40)])
    assert collector.all_done.wait(30)
    assert {gear for _, gear, _ in collector.done} == {0} and shared == [0]


def test_a_batch_that_fails_is_the_error_of_its_rows_and_the_next_ones_run(
    batcher, monkeypatch, caplog
):
    bad, fine = Collector(), Collector()
    monkeypatch.setattr(batcher._engine.model, "encode", lambda *_, **__: 1 / 0)
    batcher.put([bad.row("bad", 9, [0])])
    assert bad.all_done.wait(30) and isinstance(bad.done[0][2], BackendError)
    assert "ZeroDivisionError" in caplog.text and "Zero" not in str(bad.done[0][2])
    monkeypatch.undo()
    batcher.put([fine.row("fine", 9, [0])])
    assert fine.all_done.wait(30) and not isinstance(fine.done[0][2], Exception)


def with_latency(monkeypatch, seconds):
    engine = served.warm()
    monkeypatch.setattr(engine, "latency", dict.fromkeys(engine.latency, seconds))
    return engine


def test_an_answer_does_not_wait_for_the_time_that_its_batch_was_expected_to_take(monkeypatch):
    batcher = Batcher(with_latency(monkeypatch, 20.0), PolicyConfig(), most_wait=60.0)
    collector = Collector()
    batcher.put([collector.row("early", 9, [0])])
    assert collector.all_done.wait(5)
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
    batcher, collector = Batcher(engine, PolicyConfig(), most_wait=60.0), Collector()
    batcher.put([collector.row(i, 30, [0], of=8) for i in range(8)])
    assert collector.all_done.wait(10)
    batcher.end()
    gaps = [start - end for start, end in zip(started[2:], ended, strict=False)]
    assert len(gaps) >= 3 and min(gaps) > 0.04


def test_a_request_that_the_queue_has_no_room_for_is_refused_by_its_own_cost(
    held_device, monkeypatch
):
    engine, collector = with_latency(monkeypatch, 0.1), Collector()
    batcher = Batcher(engine, PolicyConfig(), most_wait=0.5)
    batcher.put([collector.row(i, 30, [0], of=3) for i in range(2)])
    while batcher.state()["queued"] > 1:
        time.sleep(0.001)
    with pytest.raises(Overloaded):
        batcher.put([collector.row(i, 30, [0]) for i in range(9)])
    batcher.put([collector.row(2, 30, [0], of=3)])
    held_device.set()
    assert collector.all_done.wait(10)
    batcher.end()


def test_what_waits_of_a_request_costs_what_its_plugin_does(held_device, monkeypatch):
    engine, shared = served.warm(), [0, 1]
    slow = {key: 1.0 if key[1] == "none" else 0.5 for key in engine.latency}
    monkeypatch.setattr(engine, "latency", slow)
    batcher, collector = Batcher(engine, PolicyConfig(target=60.0), most_wait=60.0), Collector()
    batcher.put([collector.row(i, 30, shared, of=5) for i in range(5)])
    while batcher.state()["queued"] > 4:
        time.sleep(0.001)
    assert len({*batcher._queued["embed"].tolist()}) == 1  # [4, 4] or [2, 2], not [4, 2]
    held_device.set()
    assert collector.all_done.wait(10)
    batcher.end()


def test_a_batcher_that_fails_gives_its_error_to_all_that_wait(monkeypatch):
    engine = served.warm()
    batcher, collector = Batcher(engine, PolicyConfig(), most_wait=60.0), Collector()
    assert batcher.alive
    monkeypatch.setattr("variator_jax.serving.batcher.batch_rows", lambda *_: 1 / 0)
    batcher.put([collector.row(i, 9, [0], of=3) for i in range(3)])
    assert collector.all_done.wait(10)
    assert all(isinstance(result, BackendError) for *_, result in collector.done)
    assert not batcher.alive
    with pytest.raises(BackendError):
        batcher.put([collector.row("late", 9, [0])])
    batcher.end()


def test_a_row_keeps_the_vectors_of_its_own_tokens_if_it_asked_for_them():
    rows = [[5, 1], [6, 7, 1]]
    plain, asked = served.warm().dispatch("embed", "none", rows, [False, True])()
    assert plain.tokens is None
    assert asked.tokens.shape[0] == 3 and asked.tokens.base is None
