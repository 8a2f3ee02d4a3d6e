"""The queue of a server and the thread that runs its batches.

There is no timed wait: when the device is free, the row that has waited longest decides program
and plugin, and others that may share them join until the batch is full. While a batch runs, the
next one is made shortly before its end, so that the device never waits for the host.
"""

import collections
import dataclasses
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from variator_jax.errors import VariatorError
from variator_jax.serving.engine import Engine
from variator_jax.serving.policy import ArrivalRate, Load, PolicyConfig, State, next_state

_AHEAD = 0.8  # of a batch's expected time, after which the next one is made


class Overloaded(VariatorError):
    """The queue is full.

    Attributes:
      retry_after_s: seconds after which the queue has room, if nothing else arrives.
    """

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(f"The queue is full; retry in {retry_after_s:.1f} s.")
        self.retry_after_s = retry_after_s


@dataclasses.dataclass(eq=False)
class Row:
    """A row of tokens that waits for a batch.

    Attributes:
      ids: its tokens.
      program: which one it goes through.
      gears: the indices of the plugins that may serve it, slowest first.
      done: called in the batcher's thread with its result and the gear, or an exception.
      arrived: when, on `time.monotonic`.
      cancelled: whether nobody waits for it any more.
    """

    ids: Sequence[int]
    program: str
    gears: Sequence[int]
    done: Callable[[Any, int], None]
    arrived: float = 0.0
    cancelled: bool = False


class Batcher:
    """Runs rows in batches on an engine that is warm.

    Attributes:
      gears: the plugins' names, the slowest first.
    """

    def __init__(self, engine: Engine, policy: PolicyConfig, most_wait: float) -> None:
        """
        Args:
          engine: warm.
          policy: how the gear follows the load.
          most_wait: seconds of work on the fastest gear, above which the queue is full.
        """
        self._engine, self._policy, self._most_wait = engine, policy, most_wait
        first, longest = engine.programs[0], engine.limits.lengths[-1]
        self.gears = sorted(
            engine.ratios, key=lambda name: -engine.row_seconds(first, name, longest)
        )
        self._costs = {
            (program, length): [engine.row_seconds(program, gear, length) for gear in self.gears]
            for program in engine.programs
            for length in engine.limits.lengths
        }
        self._rows: collections.deque[Row] = collections.deque()
        self._queued = [0.0] * len(self.gears)  # seconds of all rows, on each gear
        self._least = 0.0  # seconds of all rows, each on the fastest gear that it may have
        self._state, self._rate = State(), ArrivalRate(len(self.gears))
        self._slowdown = 1.0  # of the device, against the latencies that were measured
        self._changed, self._ending = threading.Condition(), False
        self.batches = 0
        self._thread = threading.Thread(target=self._run, name="variator-batches", daemon=True)
        self._thread.start()

    def put(self, rows: Sequence[Row]) -> None:
        """Adds the rows of a request to the queue.

        Raises:
          Overloaded: if what waits is more than the queue holds; an empty queue takes any request.
        """
        now = time.monotonic()
        with self._changed:
            waiting = self._least * self._slowdown
            if self._ending or (self._rows and waiting > self._most_wait):
                raise Overloaded(max(0.1, waiting - self._most_wait / 2))
            for row in rows:
                row.arrived = now
                self._count(row, 1)
            self._rows.extend(rows)
            work = [sum(column) for column in zip(*map(self._cost, rows), strict=True)]
            self._rate.add(now, work)
            self._changed.notify()

    def drop(self, rows: Iterable[Row]) -> None:
        """Forgets rows that nobody waits for any more."""
        with self._changed:
            for row in rows:
                row.cancelled = True

    def end(self) -> None:
        """Runs what is queued, refuses what comes, and ends the thread."""
        with self._changed:
            self._ending = True
            self._changed.notify()
        self._thread.join()

    def state(self) -> dict[str, Any]:
        """Load and gear at this moment."""
        with self._changed:
            gear = self._state.gear
            return {
                "queued": len(self._rows),
                "queued_seconds": self._queued[gear] * self._slowdown,
                "busy": self._rate.at(time.monotonic())[gear] * self._slowdown,
                "plugin": self.gears[gear],
                "ratio": self._engine.ratios[self.gears[gear]],
                "batches": self.batches,
                "slowdown": self._slowdown,
            }

    def _cost(self, row: Row) -> list[float]:
        return self._costs[row.program, self._engine.limits.length(len(row.ids))]

    def _count(self, row: Row, sign: int) -> None:
        cost = self._cost(row)
        totals = zip(self._queued, cost, strict=True)
        self._queued = [total + sign * seconds for total, seconds in totals]
        self._least += sign * cost[row.gears[-1]]

    def _run(self) -> None:
        running: tuple[Callable[[], None], float] | None = None
        while True:
            batch = self._next(running[1] if running else None)
            started = self._start(*batch) if batch else None
            if running:
                running[0]()
            if not running and batch is None:
                return
            running = started

    def _next(self, ahead_at: float | None) -> tuple[list[Row], int] | None:
        """The next batch and its gear; None at the end, or if none waits while another runs."""
        with self._changed:
            if ahead_at is not None:
                self._changed.wait_for(lambda: False, max(0.0, ahead_at - time.monotonic()))
            while True:
                while self._rows and self._rows[0].cancelled:
                    self._count(self._rows.popleft(), -1)
                if self._rows:
                    return self._take()
                if ahead_at is not None or self._ending:
                    return None
                self._changed.wait()

    def _take(self) -> tuple[list[Row], int]:
        """Takes a batch from the queue: rows that share program and plugin, oldest first."""
        now, first = time.monotonic(), self._rows[0]
        load = Load(
            now,
            now - first.arrived,
            [self._slowdown * seconds for seconds in self._queued],
            [self._slowdown * work for work in self._rate.at(now)],
        )
        self._state = next_state(self._policy, self._state, load)
        gear = _allowed(first, self._state.gear)
        taken, kept, longest = list[Row](), list[Row](), 0
        limits = self._engine.limits
        for row in self._rows:
            length = max(longest, limits.length(len(row.ids)))
            fits = len(taken) < limits.rows(length) and row.program == first.program
            if row.cancelled:
                self._count(row, -1)
            elif fits and _allowed(row, self._state.gear) == gear:
                taken.append(row)
                longest = length
                self._count(row, -1)
            else:
                kept.append(row)
        self._rows = collections.deque(kept)
        if not kept:
            self._queued, self._least = [0.0] * len(self.gears), 0.0  # no rounding is carried on
        return taken, gear

    def _start(self, rows: list[Row], gear: int) -> tuple[Callable[[], None], float]:
        """Starts a batch: a function that waits for it, and when the next one is to be made."""
        began, plugin = time.monotonic(), self.gears[gear]
        self.batches += 1
        length = self._engine.limits.length(max(len(row.ids) for row in rows))
        bucket = rows[0].program, plugin, 1 << (len(rows) - 1).bit_length(), length
        expected = self._engine.latency[bucket]
        try:
            wait = self._engine.dispatch(rows[0].program, plugin, [row.ids for row in rows])
        except Exception as error:  # it belongs to those who wait
            wait = _raises(error)

        def finish() -> None:
            try:
                results: list[Any] = wait()
            except Exception as error:  # likewise
                results = [error] * len(rows)
            took = (time.monotonic() - began) / expected
            self._slowdown = min(10.0, max(0.5, 0.9 * self._slowdown + 0.1 * took))
            for row, result in zip(rows, results, strict=True):
                if not row.cancelled:
                    row.done(result, gear)

        return finish, began + _AHEAD * expected * self._slowdown


def _allowed(row: Row, gear: int) -> int:
    """The gear of a row at the policy's: the nearest that it may have, a faster one first."""
    return next((own for own in row.gears if own >= gear), row.gears[-1])


def _raises(error: Exception) -> Callable[[], list[Any]]:
    def wait() -> list[Any]:
        raise error

    return wait
