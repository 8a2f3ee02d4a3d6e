"""Schedules at their corners, and optimizers by name."""

import jax.numpy as jnp
import numpy as np
import pytest

from variator_jax.errors import ConfigError
from variator_jax.train.optimizers import optimizer, schedule


@pytest.mark.parametrize("name, warmup, rates", [
    ("linear", 4, {0: 0, 2: 0.4, 4: 0.8, 8: 0.4, 12: 0}),
    ("constant", 2, {0: 0, 1: 0.4, 2: 0.8, 999: 0.8}),
])  # fmt: skip
def test_a_schedule_rises_to_its_peak_and_falls_or_stays(name, warmup, rates):
    rate = schedule(name, 0.8, warmup_steps=warmup, train_steps=12)
    np.testing.assert_allclose([rate(s) for s in rates], list(rates.values()), atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "adamw_relative"])
def test_every_optimizer_goes_downhill_and_decays_by_the_learning_rate(name):
    update = optimizer(name, learning_rate=0.01, schedule_name="constant", weight_decay=0.1)
    params = {"w": jnp.full((3,), 10.0)}
    down, flat = (
        update.update({"w": jnp.full((3,), slope)}, update.init(params), params)[0]["w"]
        for slope in (5.0, 0.0)
    )
    np.testing.assert_allclose(flat, -0.01 * 0.1 * 10.0, rtol=1e-5)
    assert (down < flat).all()


def test_a_relative_step_is_the_learning_rate_times_the_size_of_the_array():
    update = optimizer("adamw_relative", learning_rate=0.01, schedule_name="constant")
    params = {"embedding": jnp.full((4, 2), 1.0), "kernel": jnp.full((2, 2), 0.1)}
    gradient = {name: jnp.full_like(value, 0.03) for name, value in params.items()}
    updates, _ = update.update(gradient, update.init(params), params)
    np.testing.assert_allclose(updates["embedding"], -0.01, rtol=1e-4)
    np.testing.assert_allclose(updates["kernel"], -0.001, rtol=1e-4)


@pytest.mark.parametrize(
    "name, value",
    [
        *(("learning_rate", -1e-3), ("clip_norm", 0), ("weight_decay", -0.1)),
        *(
            ("learning_rate", None),
            ("weight_decay", None),
            ("clip_norm", "1"),
            ("warmup_steps", 0.06),
        ),
    ],
)
def test_numbers_that_train_nothing_or_uphill_are_refused(name, value):
    with pytest.raises(ConfigError, match=name.upper()):
        optimizer("adamw", schedule_name="constant", **{name: value})


def test_unknown_names_name_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean 'adamw'"):
        optimizer("adam_w", schedule_name="constant")
    with pytest.raises(ConfigError, match="Did you mean 'linear'"):
        schedule("linaer", 1.0)
    with pytest.raises(ConfigError, match="WARMUP_STEPS"):
        schedule("linear", 1.0, warmup_steps=10, train_steps=10)
