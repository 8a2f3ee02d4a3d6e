"""Which plugin the next batch runs on: ratio 1 whenever the load permits, else as much as it takes.

Pure: times are arguments. The gears are the plugins, the slowest first. A gear holds the target if
what waits is served in time by it, and if it keeps up with what arrives.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
    """How the gear follows the load.

    Attributes:
      target: seconds within which 99 of 100 requests are to be answered.
      wait_share: of the target, that the queue may take before a faster gear is chosen; the rest is
        for the batch that a request joins and for bursts.
      busy: share of the time that a gear may be busy with what arrives.
      hold: seconds for which a slower gear must have been enough before it is chosen again.
      relief: how far below the two limits the load must be for a slower gear.
    """

    target: float = 0.1
    wait_share: float = 0.4
    busy: float = 0.85
    hold: float = 1.0
    relief: float = 0.7


class Load(NamedTuple):
    """What is known at the start of a batch.

    Attributes:
      now: seconds on any clock.
      waited: seconds of the request that has waited longest.
      queued: seconds that each gear needs for all that waits, the slowest gear first.
      arriving: seconds of work that arrive each second, on each gear.
      idle: seconds for which queue and device were empty before that request.
    """

    now: float
    waited: float
    queued: Sequence[float]
    arriving: Sequence[float]
    idle: float = 0.0


class State(NamedTuple):
    """Where the policy is.

    Attributes:
      gear: index of the plugin, 0 for the slowest.
      enough_since: since when a slower gear has been enough, in seconds; infinite if it is not.
    """

    gear: int = 0
    enough_since: float = math.inf


def next_state(config: PolicyConfig, state: State, load: Load) -> State:
    """The gear of the next batch.

    A faster gear is chosen at once, as slow a one as holds the target; a slower one, by one step,
    when it has been enough for `hold` seconds, or by all if there was no load for so long.
    """
    if load.idle >= config.hold:
        state = State()
    needed = _slowest(config, load, 1.0)
    if needed > state.gear:
        return State(needed)
    if state.gear == 0 or _slowest(config, load, config.relief) >= state.gear:
        return State(state.gear)
    since = min(state.enough_since, load.now)
    if load.now - since < config.hold:
        return State(state.gear, since)
    return State(state.gear - 1, load.now)


def _slowest(config: PolicyConfig, load: Load, share: float) -> int:
    """The slowest gear that holds a share of the limits; that with the least work if none does."""
    wait, busy = share * config.wait_share * config.target, share * config.busy
    work = list(zip(load.queued, load.arriving, strict=True))
    for gear, (queued, arriving) in enumerate(work):
        if load.waited + queued <= wait and arriving <= busy:
            return gear
    # Rows may be too short for a plugin to save what it costs. Of equal gears the fastest.
    return min(range(len(work)), key=lambda g: (max(work[g][0] / wait, work[g][1] / busy), -g))


class ArrivalRate:
    """Work that arrives each second, averaged over the last seconds, for each gear.

    It is the smaller of two averages: the shorter one falls soon when a load ends, and in the
    longer one a few requests that come together by chance are no load yet.

    Args:
      gears: how many.
      shorter, longer: seconds over which it is averaged; older work counts less and less.
    """

    def __init__(self, gears: int, shorter: float = 2.0, longer: float | None = None) -> None:
        # [2], [2, gears]
        self._seconds = np.array([shorter, longer or shorter])
        self._rates, self._last = np.zeros((2, gears)), 0.0

    def add(self, now: float, work: Sequence[float]) -> None:
        """Counts work that arrived: seconds on each gear."""
        self._rates = self._left(now) + np.outer(1 / self._seconds, work)
        self._last = now

    def at(self, now: float) -> list[float]:
        """Seconds of work a second, on each gear."""
        return self._left(now).min(axis=0).tolist()

    def _left(self, now: float) -> np.ndarray:
        return self._rates * np.exp(-max(0.0, now - self._last) / self._seconds)[:, None]


class Slowdown:
    """Time of a program's last batches against the latencies that were measured.

    Args:
      kept: of the past in the average, at each batch.
    """

    def __init__(self, kept: float = 0.9) -> None:
        self._kept, self._sums = kept, dict[str, tuple[float, float]]()

    def add(self, program: str, took: float, expected: float) -> None:
        """Counts a batch, in seconds; no stall counts as more than ten of its kind."""
        before = self._sums.get(program, (0.0, 0.0))
        new = min(took, 10 * expected), expected
        self._sums[program] = self._kept * before[0] + new[0], self._kept * before[1] + new[1]

    def of(self, program: str) -> float:
        """The quotient, between 0.5 and 10; 1 before the first batch."""
        took, expected = self._sums.get(program, (1.0, 1.0))
        return min(10.0, max(0.5, took / expected))
