"""Schedules at their corners, and optimizers by name."""

import jax.numpy as jnp
import numpy as np
import pytest

from variator_jax.errors import ConfigError
from variator_jax.train.optimizers import optimizer, schedule


def test_linear_rises_to_the_peak_and_falls_to_zero():
    rate = schedule("linear", 0.8, warmup_steps=4, train_steps=12)
    np.testing.assert_allclose(
        [rate(s) for s in (0, 2, 4, 8, 12)], [0, 0.4, 0.8, 0.4, 0], atol=1e-6
    )


def test_constant_stays_at_the_peak():
    rate = schedule("constant", 0.8, warmup_steps=2)
    np.testing.assert_allclose([rate(s) for s in (0, 1, 2, 999)], [0, 0.4, 0.8, 0.8], atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "adamw_relative"])
def test_every_optimizer_goes_downhill(name):
    update = optimizer(name, learning_rate=0.1, schedule_name="constant")
    params = {"w": jnp.full((3,), 2.0)}
    state = update.init(params)
    updates, _ = update.update({"w": jnp.full((3,), 5.0)}, state, params)
    assert (updates["w"] < 0).all()


@pytest.mark.parametrize("name", ["adamw", "adafactor", "adamw_relative"])
def test_weight_decay_is_times_the_learning_rate(name):
    update = optimizer(name, learning_rate=0.01, schedule_name="constant", weight_decay=0.1)
    params = {"w": jnp.full((3,), 10.0)}
    updates, _ = update.update({"w": jnp.zeros((3,))}, update.init(params), params)
    np.testing.assert_allclose(updates["w"], -0.01 * 0.1 * 10.0, rtol=1e-5)


def test_a_relative_step_is_the_learning_rate_times_the_size_of_the_array():
    update = optimizer("adamw_relative", learning_rate=0.01, schedule_name="constant")
    params = {"embedding": jnp.full((4, 2), 1.0), "kernel": jnp.full((2, 2), 0.1)}
    gradient = {name: jnp.full_like(value, 0.03) for name, value in params.items()}
    updates, _ = update.update(gradient, update.init(params), params)
    np.testing.assert_allclose(updates["embedding"], -0.01, rtol=1e-4)
    np.testing.assert_allclose(updates["kernel"], -0.001, rtol=1e-4)


def test_slips_name_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean 'adamw'"):
        optimizer("adam_w", schedule_name="constant")
    with pytest.raises(ConfigError, match="Did you mean 'linear'"):
        schedule("linaer", 1.0)
    with pytest.raises(ConfigError, match="WARMUP_STEPS"):
        schedule("linear", 1.0, warmup_steps=10, train_steps=10)
