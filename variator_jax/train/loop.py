"""The training loop of the built-in engine: steps, logs, evaluation, checkpoints, and how it stops.

What a step computes is `step.py`; what is trained and on which data is `train.py`.
"""

import contextlib
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

from variator_jax.errors import TrainingError, check_whole
from variator_jax.train.run_folder import Checkpoints, RunLog
from variator_jax.train.step import Metrics, TrainState

HostBatch = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """When the loop does what, in steps.

    Attributes:
      train_steps: updates in all.
      log_period: between lines on the console and rows in the log.
      eval_period: between evaluations; 0 for none before the end.
      checkpoint_period: between training checkpoints; one more is written at the end.
    """

    train_steps: int
    log_period: int = 50
    eval_period: int = 0
    checkpoint_period: int = 1000

    def __post_init__(self) -> None:
        for field, value in dataclasses.asdict(self).items():
            check_whole(field.upper(), value, 0 if field == "eval_period" else 1)


# How many steps the host may dispatch before the device has executed the first of them.
_STEPS_AHEAD = 2


class _Window:
    """Metrics since the last log line. They stay on the device until the line is written."""

    def __init__(self) -> None:
        self._metrics: list[Metrics] = []
        self._tokens = 0
        self._started = time.monotonic()

    def add(self, metrics: Metrics, tokens: int) -> None:
        """Adds a step, and keeps the host at most a few steps ahead of the device.

        Otherwise it dispatches steps until the window closes, and a run that gets SIGTERM would
        first execute all of them: longer than the grace before a machine is taken away.
        """
        self._metrics.append(metrics)
        self._tokens += tokens
        if len(self._metrics) > _STEPS_AHEAD:
            jax.block_until_ready(self._metrics[-1 - _STEPS_AHEAD])

    def means(self, last_step: int) -> dict[str, float]:
        """Means over the steps; raises where a loss is not finite, naming the first such step."""
        rows = jax.device_get(self._metrics)
        for step, row in enumerate(rows, start=last_step - len(rows) + 1):
            # A finite loss may have an infinite gradient, and then the parameters are lost, too.
            for name in ("loss", "grad_norm"):
                if not math.isfinite(row[name]):
                    raise TrainingError(
                        f"The {name} of step {step} is {float(row[name])}. The last checkpoint is "
                        "kept; in another MODEL_DIR, try a lower LEARNING_RATE or CLIP_NORM."
                    )
        seconds = max(time.monotonic() - self._started, 1e-9)
        means = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
        means["steps_per_second"] = len(rows) / seconds
        means["tokens_per_second"] = self._tokens / seconds
        return means

    def __bool__(self) -> bool:
        return bool(self._metrics)


def fit(
    state: TrainState,
    step_fn: Callable[[TrainState, HostBatch], tuple[TrainState, Metrics]],
    batches: Callable[[int], Iterator[HostBatch]],
    schedule: Schedule,
    checkpoints: Checkpoints,
    log: RunLog,
    evaluate: Callable[[TrainState], dict[str, float]] | None = None,
) -> tuple[TrainState, bool]:
    """Trains from `state.step` to the end.

    Args:
      state: where to start.
      step_fn: one compiled step.
      batches: given a step, the iterator over the batches from that step on.
      schedule: when to do what.
      checkpoints: of the run.
      log: of the run.
      evaluate: metrics of a state on held-out data.

    Returns:
      The last state, which is saved, and whether SIGTERM came.

    Raises:
      TrainingError: when a loss is NaN or infinite. Nothing is saved from that step on.
    """
    step, window = int(state.step), _Window()
    stream = batches(step)
    with _sigterm() as stopped:
        while step < schedule.train_steps and not _all_stop(stopped, step):
            batch = next(stream)
            state, metrics = step_fn(state, batch)
            step += 1
            window.add(metrics, _tokens(batch))
            at_end = step == schedule.train_steps
            saves = at_end or step % schedule.checkpoint_period == 0
            # A window closes before every save, so that no bad step is ever saved.
            if saves or step % schedule.log_period == 0:
                means = window.means(step)
                log.write("train", step, means)
                log.progress(step, means)
                window = _Window()
            if saves:
                checkpoints.save(state)
            evaluates = schedule.eval_period and step % schedule.eval_period == 0
            if evaluate is not None and (evaluates or at_end):
                means = evaluate(state)
                log.write("eval", step, means)
                log.print("  held out: " + "  ".join(f"{k} {v:.4f}" for k, v in means.items()))
            if not window:
                window = _Window()  # so that saving and evaluating do not count as slow steps
        # The signal may have come at any point of the step; what is saved already stays.
        if step < schedule.train_steps:
            if window:
                window.means(step)
            checkpoints.save(state)
    # After the last step it counts too: else a driver of several runs would begin the next one.
    return state, step < schedule.train_steps or bool(stopped)


def _all_stop(stopped: list[int], step: int) -> bool:
    """Whether the run ends before this step: of several processes, all of them at the same one."""
    if jax.process_count() > 1:
        # JAX's runtime forwards the signal of any process to all of them.
        return bool(multihost_utils.reached_preemption_sync_point(step))
    return bool(stopped)


def _tokens(batch: HostBatch) -> int:
    """Tokens a step works on, padding included, as T5X counts them."""
    return sum(array.size for name, array in batch.items() if name.endswith("input_tokens"))


@contextlib.contextmanager
def _sigterm() -> Iterator[list[int]]:
    """Collects SIGTERM in a list instead of dying, where the thread may handle signals at all."""
    received: list[int] = []
    # Of several processes, JAX has a handler of its own, see `_all_stop`.
    if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)
