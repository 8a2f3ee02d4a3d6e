"""The loop and the device: how far the host runs ahead, and what SIGTERM then still waits for."""

import itertools
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np

from variator_jax.train.checkpointing import Checkpoints
from variator_jax.train.logs import RunLog
from variator_jax.train.loop import Schedule, fit
from variator_jax.train.step import TrainState

SIZE, TOLD_AT = 400, 5


@jax.jit
def _slow(w):
    for _ in range(4):
        w = jnp.tanh(w @ w)
    return w


def test_a_run_that_is_told_to_stop_after_its_last_step_says_so(tmp_path):
    """Else a driver of several runs, such as the quickstart, would go on with the next one."""

    def step(state, batch):
        return state.replace(step=state.step + 1), {
            "loss": jnp.float32(1.0), "grad_norm": jnp.float32(1.0)
        }  # fmt: skip

    def evaluate(state):
        os.kill(os.getpid(), signal.SIGTERM)
        return {"loss": 1.0}

    checkpoints, log = Checkpoints(tmp_path, 1, {}), RunLog(tmp_path, 2)
    batch = {"encoder_input_tokens": np.ones((1, 2))}
    state = TrainState(jnp.int32(0), {"w": jnp.zeros(2)}, ())
    found, stopped = fit(
        state,
        step,
        lambda start: itertools.repeat(batch),
        Schedule(2, 2, 0, 2),
        checkpoints,
        log,
        evaluate,
    )
    checkpoints.close()
    log.close()
    assert stopped and int(found.step) == 2 and (tmp_path / "checkpoints" / "2").is_dir()


def test_a_run_that_is_told_to_stop_has_few_steps_left_to_carry_out(tmp_path):
    """As each step's metrics become ready; the host must not have handed out all others by then."""
    handed_out, ready = [], []

    def step(state, batch):
        w = _slow(state.params["w"])
        number = len(handed_out)
        if number == TOLD_AT:
            os.kill(os.getpid(), signal.SIGTERM)
        ready.append(sum(m.is_ready() for m in handed_out))
        handed_out.append(w[0, 0])
        return state.replace(step=state.step + 1, params={"w": w}), {
            "loss": w[0, 0], "grad_norm": jnp.float32(1.0)
        }  # fmt: skip

    state = TrainState(jnp.int32(0), {"w": jnp.full((SIZE, SIZE), 1e-3)}, ())
    checkpoints, log = Checkpoints(tmp_path, 1, {}), RunLog(tmp_path, 50)
    batch = {"encoder_input_tokens": np.ones((1, 2))}
    schedule = Schedule(50, 50, 0, 50)
    found, stopped = fit(
        state, step, lambda start: itertools.repeat(batch), schedule, checkpoints, log
    )
    checkpoints.close()
    log.close()
    assert stopped and TOLD_AT < int(found.step) <= TOLD_AT + 2
    ahead = [number - done for number, done in enumerate(ready)]
    assert max(ahead) <= 2
