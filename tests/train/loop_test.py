"""The loop with a fake step: when it saves and stops, and how far the host runs ahead."""

import itertools
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs

from variator_jax.errors import ConfigError, TrainingError
from variator_jax.train.loop import Schedule, fit
from variator_jax.train.run_folder import Checkpoints, RunLog
from variator_jax.train.step import TrainState

BATCH = {"encoder_input_tokens": np.ones((1, 2))}


def _step(state, batch, loss=1.0, grad_norm=1.0):
    metrics = {"loss": jnp.float32(loss), "grad_norm": jnp.float32(grad_norm)}
    params = {"w": state.params["w"] + batch["encoder_input_tokens"].sum()}
    return state.replace(step=state.step + 1, params=params), metrics


def _fit(folder, step=_step, batches=None, schedule=None, evaluate=None, start=0, size=2):
    """The loop's result, and the steps whose checkpoints it left."""
    schedule = schedule or Schedule(8, 8, 0, 2)
    checkpoints, log = Checkpoints(folder, 2, {}), RunLog(folder, schedule.train_steps)
    state = TrainState(jnp.int32(0), {"w": jnp.full((size, size), 1e-3)}, ())
    if start:
        state = checkpoints.restore(state)
    batches = batches or (lambda start: itertools.repeat(BATCH))
    try:
        result = fit(state, step, batches, schedule, checkpoints, log, evaluate)
    finally:
        checkpoints.close()
        log.close()
        names = (path.name for path in (folder / "checkpoints").iterdir())
        saved.append(sorted(int(name) for name in names if name.isdigit()))
    return result


saved = []  # by `_fit`, also where the loop raised


def _terminate():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("moment", ["batch", "evaluation"])
def test_sigterm_at_any_moment_saves_and_stops_and_the_same_command_continues(tmp_path, moment):
    pending = [moment]

    def terminate(now):
        if pending == [now]:
            pending.clear()
            _terminate()

    def batches(start):
        for number in itertools.count(start):
            if number == 3:
                terminate("batch")
            yield {"encoder_input_tokens": np.full((1, 2), number)}

    def evaluate(state):
        terminate("evaluation")
        return {"loss": 1.0}

    arguments = (_step, batches, Schedule(8, 8, 3, 100), evaluate)
    state, stopped = _fit(tmp_path / "cut", *arguments)
    assert stopped and 3 <= int(state.step) < 8 and saved[-1] == [int(state.step)]
    ended, stopped = _fit(tmp_path / "cut", *arguments, start=1)
    whole, _ = _fit(tmp_path / "whole", *arguments)
    assert int(ended.step) == int(whole.step) == 8 and not stopped
    np.testing.assert_array_equal(ended.params["w"], whole.params["w"])


def test_a_run_that_is_stopped_after_its_last_step_returns_so(tmp_path):
    """Else a driver of several runs, such as the quickstart, would start the next one."""
    evaluate = lambda state: _terminate() or {"loss": 1.0}  # noqa: E731
    state, stopped = _fit(tmp_path, schedule=Schedule(2, 2, 0, 2), evaluate=evaluate)
    assert stopped and int(state.step) == 2 and saved[-1] == [2]


@pytest.mark.parametrize(("name", "value"), [("loss", np.nan), ("grad_norm", np.inf)])
def test_a_step_that_is_not_finite_stops_the_run_and_is_never_saved(tmp_path, name, value):
    def step(state, batch):
        return _step(state, batch, **{name: value if int(state.step) == 3 else 1.0})

    with pytest.raises(TrainingError, match=f"{name} of step 4 is {value}"):
        _fit(tmp_path, step)
    assert saved[-1] == [2]


def test_logs_evaluations_and_checkpoints_have_their_periods(tmp_path):
    _fit(tmp_path, schedule=Schedule(7, 2, 3, 4), evaluate=lambda state: {"loss": 0.5})
    found = [[row["step"] for row in tiny_runs.rows(tmp_path, kind)] for kind in ("train", "eval")]
    assert found == [[2, 4, 6, 7], [3, 6, 7]] and saved[-1] == [4, 7]


@jax.jit
def _slow(w):
    for _ in range(4):
        w = jnp.tanh(w @ w)
    return w


def test_a_run_that_is_stopped_has_few_steps_left_to_carry_out(tmp_path):
    """As each step's metrics become ready; the host must not have handed out all others by then."""
    handed_out, ahead = [], []

    def step(state, batch):
        w = _slow(state.params["w"])
        if len(handed_out) == 5:
            _terminate()
        ahead.append(sum(not metrics.is_ready() for metrics in handed_out))
        loss = w[0, 0]
        handed_out.append(loss)
        metrics = {"loss": loss, "grad_norm": jnp.float32(1.0)}
        return state.replace(step=state.step + 1, params={"w": w}), metrics

    state, stopped = _fit(tmp_path, step, schedule=Schedule(50, 50, 0, 50), size=400)
    assert stopped and 5 < int(state.step) <= 7 and max(ahead) <= 2


@pytest.mark.parametrize("field", ["train_steps", "log_period", "checkpoint_period"])
def test_periods_are_positive(field):
    with pytest.raises(ConfigError, match=field.upper()):
        Schedule(**({"train_steps": 1} | {field: 0}))
    with pytest.raises(ConfigError, match="EVAL_PERIOD"):
        Schedule(1, eval_period=-1)
