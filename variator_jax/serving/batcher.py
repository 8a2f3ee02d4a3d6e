"""The queue of a server and the thread that runs its batches.

There is no timed wait: when the device is free, the row that has waited longest decides program,
plugin and length, and others that may share them join, as many as the measured latencies make
worthwhile. The next batch is made shortly before the running one ends, so that the device never
waits for the host.
"""

import collections
import dataclasses
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from variator_jax.errors import VariatorError
from variator_jax.serving.engine import Engine
from variator_jax.serving.policy import ArrivalRate, Load, PolicyConfig, State, next_state
from variator_jax.serving.tasks import NONE

_AHEAD = 0.8  # of a batch's expected time, after which the next one is made
_KEPT = 0.9  # of the past in the average of the device's slowdown, at each batch


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
      gears: the indices of the plugins that may serve it, slowest first. The rows of a request
        share the list: the gear of the first that runs is that of all, so that scores and vectors
        of a request can be compared.
      done: called in the batcher's thread with its result and the gear, or an exception.
      arrived: when, on `time.monotonic`.
      cost: seconds of a full batch that it takes, at each gear of the policy.
      cancelled: whether nobody waits for it any more.
    """

    ids: Sequence[int]
    program: str
    gears: list[int]
    done: Callable[[Any, int], None]
    arrived: float = 0.0
    cost: Sequence[float] = ()
    cancelled: bool = False


class Batcher:
    """Runs rows in batches on an engine that is warm.

    Attributes:
      gears: the plugins' names, ratio 1 first, then from the slowest to the fastest.
      shifting: the indices of ratio 1 and of the plugins that are faster: those the load chooses.
      batches: how many have started.
    """

    def __init__(self, engine: Engine, policy: PolicyConfig, most_wait: float) -> None:
        """
        Args:
          engine: warm.
          policy: how the gear follows the load.
          most_wait: seconds of work on the fastest gear, above which the queue is full.
        """
        self._engine, self._policy, self._most_wait = engine, policy, most_wait
        # [plugin]: time against that of ratio 1, the mean over the programs.
        relative = {name: engine.relative_seconds(name) for name in engine.ratios}
        self.gears = sorted(relative, key=lambda name: (name != NONE, -relative[name]))
        self.shifting = [i for i, name in enumerate(self.gears) if i == 0 or relative[name] < 1]
        self._rows: collections.deque[Row] = collections.deque()
        self._queued = [0.0] * len(self.gears)  # seconds of all rows, at each gear of the policy
        self._state, self._rate = State(), ArrivalRate(len(self.gears))
        self._took, self._expected = 0.0, 0.0  # seconds of the last batches, weighted
        self._free_at = 0.0  # when the last batch ended
        self._changed, self._ending = threading.Condition(threading.RLock()), False
        self.batches = 0
        self._thread = threading.Thread(target=self._run, name="variator-batches", daemon=True)
        self._thread.start()

    def check_room(self) -> None:
        """Refuses a request before work is done for it.

        Raises:
          Overloaded: if what waits is more than the queue holds; an empty queue takes any request.
        """
        with self._changed:
            waiting = self._queued[-1] * self._slowdown
            if self._ending or (self._rows and waiting > self._most_wait):
                raise Overloaded(max(0.1, waiting - self._most_wait / 2))

    def put(self, rows: Sequence[Row]) -> None:
        """Adds the rows of a request to the queue.

        Raises:
          Overloaded: as `check_room`.
        """
        now = time.monotonic()
        with self._changed:
            self.check_room()
            for row in rows:
                row.arrived, row.cost = now, self._cost(row)
                self._count(row, 1)
            self._rows.extend(rows)
            columns = zip(*(row.cost for row in rows), strict=True)
            self._rate.add(now, [sum(column) for column in columns])
            self._changed.notify()

    def drop(self, rows: Sequence[Row]) -> None:
        """Forgets rows that nobody waits for any more."""
        with self._changed:
            for row in rows:
                row.cancelled = True
            self._remove({id(row) for row in rows})

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

    @property
    def _slowdown(self) -> float:
        """Of the device against the latencies that were measured."""
        return min(10.0, max(0.5, self._took / self._expected)) if self._expected else 1.0

    def _cost(self, row: Row) -> list[float]:
        """Seconds at each gear of the policy; a row that may not follow it keeps its own."""
        length = self._engine.limits.length(len(row.ids))
        gears = [_allowed(row, gear) for gear in range(len(self.gears))]
        return [self._engine.row_seconds(row.program, self.gears[g], length) for g in gears]

    def _count(self, row: Row, sign: int) -> None:
        self._queued = [x + sign * s for x, s in zip(self._queued, row.cost, strict=True)]

    def _remove(self, identities: set[int]) -> None:
        for row in self._rows:
            if id(row) in identities:
                self._count(row, -1)
        self._rows = collections.deque(row for row in self._rows if id(row) not in identities)
        if not self._rows:
            self._queued = [0.0] * len(self.gears)  # no rounding is carried on

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
            elif not self._ending:
                self._changed.wait_for(lambda: bool(self._rows) or self._ending)
            return self._take() if self._rows else None

    def _take(self) -> tuple[list[Row], int]:
        """Takes a batch from the queue: rows that share program, plugin and length, oldest first.

        Shorter rows take the places that filling up to a power of two would leave empty.
        """
        now, first, limits = time.monotonic(), self._rows[0], self._engine.limits
        slow = self._slowdown
        queued = [slow * seconds for seconds in self._queued]
        arriving = [slow * work for work in self._rate.at(now)]
        load = Load(now, now - first.arrived, queued, arriving)
        self._state = next_state(self._policy, self._state, load)
        gear, length = _allowed(first, self._state.gear), limits.length(len(first.ids))
        same, shorter = list[Row](), list[Row]()
        for row in self._rows:
            own = limits.length(len(row.ids))
            fits = row.program == first.program and _allowed(row, self._state.gear) == gear
            if fits and own <= length:
                (same if own == length else shorter).append(row)
        seconds = self._engine.sizes(first.program, self.gears[gear], length)
        count = batch_rows(seconds, len(same))
        taken = [*same[:count], *shorter[: padded(count) - count]]
        for row in taken:
            row.gears[:] = [gear]
        self._remove({id(row) for row in taken})
        return taken, gear

    def _start(self, rows: list[Row], gear: int) -> tuple[Callable[[], None], float]:
        """Starts a batch: a function that waits for it, and when the next one is to be made."""
        began, program, plugin = time.monotonic(), rows[0].program, self.gears[gear]
        self.batches += 1
        length = self._engine.limits.length(max(len(row.ids) for row in rows))
        expected = self._engine.latency[program, plugin, padded(len(rows)), length]
        try:
            wait = self._engine.dispatch(program, plugin, [row.ids for row in rows])
        except Exception as error:  # it belongs to those who wait
            wait = _raises(error)

        def finish() -> None:
            try:
                results: list[Any] = wait()
            except Exception as error:  # likewise
                results = [error] * len(rows)
            now = time.monotonic()
            self._took = _KEPT * self._took + now - max(began, self._free_at)
            self._expected, self._free_at = _KEPT * self._expected + expected, now
            for row, result in zip(rows, results, strict=True):
                if not row.cancelled:
                    row.done(result, gear)

        return finish, began + _AHEAD * expected * self._slowdown


def padded(rows: int) -> int:
    """The rows of a compiled batch that holds so many: a power of two."""
    return 1 << (rows - 1).bit_length()


def batch_rows(seconds: Mapping[int, float], waiting: int) -> int:
    """How many of the waiting rows give the most rows a second in one batch.

    Args:
      seconds: rows of a compiled batch -> its latency.
      waiting: rows, at least one.
    """
    counts = {min(size, waiting): size for size in sorted(seconds) if size < 2 * waiting}
    return max(counts, key=lambda count: count / seconds[counts[count]])


def _allowed(row: Row, gear: int) -> int:
    """The gear of a row at the policy's: the nearest that it may have, a faster one first."""
    return next((own for own in row.gears if own >= gear), row.gears[-1])


def _raises(error: Exception) -> Callable[[], list[Any]]:
    def wait() -> list[Any]:
        raise error

    return wait
