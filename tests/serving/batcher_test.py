"""Which rows share a batch, on the real engine of a tiny model whose latencies are set."""

import threading

import pytest
import served

from variator_jax.serving.batcher import Batcher, Row, batch_rows
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
    starts = []
    monkeypatch.setattr(
        engine,
        "dispatch",
        lambda *args, real=engine.dispatch: starts.append(args) or real(*args),
    )
    made = Batcher(engine, PolicyConfig(target=60.0), most_wait=60.0)
    made.starts = starts
    yield made
    made.end()


def test_a_batch_has_one_program_one_plugin_and_lengths_of_the_oldest_or_below(batcher):
    collector = Collector()
    kinds = [
        (length, [gear], program)
        for length in (9, 30)
        for gear in (0, 1)
        for program in ("embed", "labels")
    ]
    rows = [
        collector.row((length, gears[0], program), length, list(gears), program, of=24)
        for _ in range(3)
        for length, gears, program in kinds
    ]
    batcher.put(rows)
    assert collector.all_done.wait(30)
    assert all(name[1] == gear for name, gear, _ in collector.done)
    for program, _, ids in batcher.starts:
        assert program in ("embed", "labels")
        assert len(ids) <= batcher._engine.limits.rows(32 if max(map(len, ids)) > 16 else 16)
    assert {(program, plugin) for program, plugin, _ in batcher.starts} == {
        (program, plugin) for program in ("embed", "labels") for plugin in batcher.gears
    }
    assert sum(len(ids) for *_, ids in batcher.starts) == 24
    assert batcher.state()["queued"] == 0 and batcher.state()["queued_seconds"] == 0


def test_all_rows_of_a_request_have_the_plugin_of_its_first(batcher):
    collector, shared = Collector(), [0, 1]
    batcher.put([collector.row(i, 9, shared, of=40) for i in range(40)])
    assert collector.all_done.wait(30)
    assert {gear for _, gear, _ in collector.done} == {0} and shared == [0]


def test_a_batch_that_fails_is_the_error_of_its_rows_and_the_next_ones_run(batcher, monkeypatch):
    collector, fine = Collector(), Collector()
    batcher.put([collector.row("bad", 9, [0], program="labels")])
    assert collector.all_done.wait(30)
    monkeypatch.setattr(batcher._engine.model, "encode", lambda *_, **__: 1 / 0)
    bad = Collector()
    batcher.put([bad.row("bad", 9, [0])])
    assert bad.all_done.wait(30) and isinstance(bad.done[0][2], ZeroDivisionError)
    monkeypatch.undo()
    batcher.put([fine.row("fine", 9, [0])])
    assert fine.all_done.wait(30) and not isinstance(fine.done[0][2], Exception)
