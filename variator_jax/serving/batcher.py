"""The queue of a server and the thread that runs its batches.

There is no timed wait: when the device is free, the row that has waited longest decides program,
plugin and length, and others that may share them join, as many as the measured latencies make
worthwhile. The next batch is made shortly before the running one ends, so that the device never
waits for the host; a second thread hands out the answers of a batch as soon as there are any.
"""

import collections
import concurrent.futures
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from variator_jax.errors import VariatorError
from variator_jax.plugin.config import NONE
from variator_jax.serving.engine import Engine
from variator_jax.serving.policy import ArrivalRate, Load, PolicyConfig, Slowdown, State, next_state

_LOG = logging.getLogger("uvicorn.error")
_AHEAD = 0.8  # of a batch's expected time, after which the next one is made


class Overloaded(VariatorError):
    """The queue is full.

    Attributes:
      retry_after_s: seconds after which the queue has room, if nothing else arrives.
    """

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(f"The queue is full; retry in {retry_after_s:.1f} s.")
        self.retry_after_s = retry_after_s


class TooLarge(VariatorError):
    """The answer would be larger than a client may ask for."""


class BackendError(VariatorError):
    """The device or the server failed; the request may be right."""


@dataclasses.dataclass(eq=False)
class Row:
    """A row of tokens that waits for a batch.

    Attributes:
      ids: its tokens.
      program: which one it goes through.
      gears: the indices of the plugins that may serve it, slowest first. The rows of a request
        share the list: the gear of the first that runs is that of all, so that scores and vectors
        of a request can be compared.
      per_token: of 'embed', whether the vectors of its tokens are asked for.
      result: of its result or an exception; cancelled when nobody waits for it any more.
      arrived: when, on `time.monotonic`.
      length: its bucket of lengths.
      cost: `[gears]` seconds of a full batch that it takes, at each gear of the policy.
      waiting: whether it is in the queue.
    """

    ids: Sequence[int]
    program: str
    gears: list[int]
    per_token: bool = False
    result: concurrent.futures.Future = dataclasses.field(default_factory=concurrent.futures.Future)
    arrived: float = 0.0
    length: int = 0
    cost: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
    waiting: bool = False


class _Batch(NamedTuple):
    """A batch that was given to the device at `began`, and what waits for its results."""

    rows: list[Row]
    began: float
    expected: float  # seconds
    results: Callable[[], list[Any]]


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
        self._costs: dict[tuple[Any, ...], np.ndarray] = {}
        self._rows: collections.deque[Row] = collections.deque()
        # Program -> `[gears]` seconds of all rows, at each gear of the policy.
        self._queued: dict[str, np.ndarray] = {p: np.zeros(len(relative)) for p in engine.programs}
        averaged = max(2.0, policy.target), max(2.0, 5 * policy.target)  # seconds
        self._rates = {name: ArrivalRate(len(relative), *averaged) for name in engine.programs}
        self._state, self._slowdown = State(), Slowdown()
        self._running: collections.deque[_Batch] = collections.deque()  # two at the most
        self._free_at = 0.0  # when the last batch ended
        self._last = engine.programs[0], 0  # program and gear of the last batch
        self._changed, self._ending = threading.Condition(threading.RLock()), False
        self._failure: VariatorError | None = None
        self.batches = 0
        self._finishing = concurrent.futures.ThreadPoolExecutor(1, "variator-answers")
        self._thread = threading.Thread(target=self._run, name="variator-batches", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether it runs batches."""
        return self._thread.is_alive() and not self._ending

    def check_room(self, own: float = 0.0) -> None:
        """Refuses a request before work is done for it.

        Args:
          own: seconds of the request's own work on the fastest gear, where known.

        Raises:
          Overloaded: if that and what waits are more than the queue holds; an empty queue takes any
            request.
          BackendError: if no batch can run any more.
        """
        with self._changed:
            if self._failure:
                raise self._failure
            waiting = min(self._at_gears(self._queued))
            if self._ending or (self._rows and waiting + own > self._most_wait):
                room_in = min(waiting, waiting + own - self._most_wait / 2)
                raise Overloaded(max(0.1, room_in))

    def put(self, rows: Sequence[Row]) -> None:
        """Adds the rows of a request to the queue.

        Raises:
          Overloaded: as `check_room`.
          BackendError: likewise.
        """
        now = time.monotonic()
        for row in rows:
            row.arrived, row.length = now, self._engine.limits.length(len(row.ids))
            row.cost = self._cost(row)
        work = _work(rows)
        with self._changed:
            self.check_room(min(self._at_gears(work)))
            for program, seconds in work.items():
                self._queued[program] += seconds
                self._rates[program].add(now, seconds.tolist())
            for row in rows:
                row.waiting = True
            self._rows.extend(rows)
            self._changed.notify()

    def drop(self, rows: Sequence[Row]) -> None:
        """Forgets rows that nobody waits for any more."""
        with self._changed:
            for row in rows:
                row.result.cancel()
            self._remove([row for row in rows if row.waiting])

    def end(self) -> None:
        """Runs what is queued, refuses what comes, and ends the threads."""
        with self._changed:
            self._ending = True
            self._changed.notify()
        self._thread.join()
        self._finishing.shutdown()

    def state(self) -> dict[str, Any]:
        """Load at this moment, and the plugin of the last batch."""
        with self._changed:
            (program, gear), now = self._last, time.monotonic()
            arriving = {name: rate.at(now) for name, rate in self._rates.items()}
            return {
                "queued": len(self._rows),
                "queued_seconds": self._at_gears(self._queued)[gear],
                "busy": self._at_gears(arriving)[gear],
                "plugin": self.gears[gear],
                "ratio": self._engine.ratios[self.gears[gear]],
                "batches": self.batches,
                "slowdown": self._slowdown.of(program),
            }

    def _at_gears(self, work: Mapping[str, Sequence[float] | np.ndarray]) -> list[float]:
        """Seconds at each gear of what the programs have to do, as slow as the device is now."""
        # [programs, gears]
        seconds = [self._slowdown.of(name) * np.asarray(each) for name, each in work.items()]
        return np.sum(seconds, axis=0).tolist()

    def _cost(self, row: Row) -> np.ndarray:
        """`[gears]` seconds; a row that may not follow the policy keeps its own."""
        key = row.program, row.length, *row.gears
        if key not in self._costs:
            gears = [self.gears[_allowed(row, gear)] for gear in range(len(self.gears))]
            seconds = [self._engine.row_seconds(row.program, name, row.length) for name in gears]
            self._costs[key] = np.array(seconds)
        return self._costs[key]

    def _remove(self, rows: Sequence[Row]) -> None:
        for program, seconds in _work(rows).items():
            self._queued[program] -= seconds
        for row in rows:
            row.waiting = False
        self._rows = collections.deque(row for row in self._rows if row.waiting)
        if not self._rows:  # no rounding is carried on
            self._queued = {name: np.zeros(len(self.gears)) for name in self._queued}

    def _run(self) -> None:
        taken: list[Row] = []
        try:
            while batch := self._next():
                taken, gear = batch
                self._start(taken, gear)
                taken = []
        except Exception as error:  # an error of this program: no batch may run on what is left
            self._fail(error, taken)

    def _fail(self, error: Exception, taken: Sequence[Row]) -> None:
        """Refuses what comes, and gives the error to all that wait."""
        with self._changed:
            self._ending, self._failure = True, _backend_error(error)
            rows = [*taken, *self._rows]
            self._remove(list(self._rows))
        for row in rows:
            _resolve(row, self._failure)

    def _next(self) -> tuple[list[Row], int] | None:
        """The next batch and its gear, when it is time for it; None at the end."""
        with self._changed:
            while self._rows or not self._ending:
                seconds = self._seconds_to_next()
                if seconds is not None and seconds <= 0:
                    return self._take()
                self._changed.wait(seconds)
        return None

    def _seconds_to_next(self) -> float | None:
        """Until a batch is due, unless another ends before; None if one must end, or none waits."""
        if not self._rows or len(self._running) > 1:
            return None
        if not self._running:
            return 0.0
        batch = self._running[0]
        expected = batch.expected * self._slowdown.of(batch.rows[0].program)
        return max(batch.began, self._free_at) + _AHEAD * expected - time.monotonic()

    def _take(self) -> tuple[list[Row], int]:
        """Takes a batch from the queue: rows that share program, plugin and length, oldest first.

        Shorter rows take the places that filling up to a power of two would leave empty.
        """
        now, first = time.monotonic(), self._rows[0]
        arriving = self._at_gears({name: rate.at(now) for name, rate in self._rates.items()})
        idle = 0.0 if self._running else first.arrived - self._free_at
        load = Load(now, now - first.arrived, self._at_gears(self._queued), arriving, idle)
        self._state = next_state(self._policy, self._state, load)
        gear = _allowed(first, self._state.gear)
        seconds = self._engine.sizes(first.program, self.gears[gear], first.length)
        same, shorter = list[Row](), list[Row]()
        for row in self._rows:
            if len(same) == max(seconds):
                break
            fits = row.program == first.program and row.length <= first.length
            if fits and _allowed(row, self._state.gear) == gear:
                (same if row.length == first.length else shorter).append(row)
        count = batch_rows(seconds, len(same))
        taken = [*same[:count], *shorter[: padded(count) - count]]
        self._remove(taken)
        self._bind(taken, gear)
        return taken, gear

    def _bind(self, taken: Sequence[Row], gear: int) -> None:
        """Gives the requests of a batch its gear, and what waits of them the cost of that."""
        lists = {id(row.gears) for row in taken if len(row.gears) > 1}
        for row in taken:
            row.gears[:] = [gear]
        for row in self._rows if lists else ():
            if id(row.gears) in lists:
                cost = self._cost(row)
                self._queued[row.program] += cost - row.cost
                row.cost = cost

    def _start(self, rows: list[Row], gear: int) -> None:
        """Gives a batch to the device, and its results to the other thread."""
        began, program, plugin = time.monotonic(), rows[0].program, self.gears[gear]
        bucket = program, plugin, padded(len(rows)), max(row.length for row in rows)
        asked = [row.per_token for row in rows]
        try:
            results = self._engine.dispatch(program, plugin, [row.ids for row in rows], asked)
        except Exception as error:  # it belongs to those who wait
            failed = concurrent.futures.Future[list[Any]]()
            failed.set_exception(error)
            results = failed.result
        batch = _Batch(rows, began, self._engine.latency[bucket], results)
        with self._changed:
            self._running.append(batch)
            self.batches, self._last = self.batches + 1, (program, gear)
        self._finishing.submit(self._finish, batch)

    def _finish(self, batch: _Batch) -> None:
        """Waits for a batch, and gives its results to those who wait for them."""
        try:
            results, failed = batch.results(), False
        except Exception as error:  # likewise
            results, failed = [_backend_error(error)] * len(batch.rows), True
        with self._changed:
            now = time.monotonic()
            if not failed:
                took = now - max(batch.began, self._free_at)
                self._slowdown.add(batch.rows[0].program, took, batch.expected)
            self._free_at = now
            self._running.popleft()
            self._changed.notify()
        for row, result in zip(batch.rows, results, strict=True):
            _resolve(row, result)


def _resolve(row: Row, result: Any) -> None:
    """Gives a row its result or an exception, unless nobody waits for it any more."""
    if row.result.set_running_or_notify_cancel():
        give = row.result.set_exception if isinstance(result, Exception) else row.result.set_result
        give(result)


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


def _work(rows: Iterable[Row]) -> dict[str, np.ndarray]:
    """Program -> `[gears]` seconds of its rows."""
    costs = collections.defaultdict[str, list[np.ndarray]](list)
    for row in rows:
        costs[row.program].append(row.cost)
    return {program: np.sum(each, axis=0) for program, each in costs.items()}


def _backend_error(error: Exception) -> VariatorError:
    """An error as those see it who asked; what they can mend stays as it is."""
    if isinstance(error, VariatorError):
        return error
    _LOG.error("a batch failed", exc_info=error)
    failure = BackendError("The server could not run a batch; its log has the reason.")
    failure.__cause__ = error
    return failure
