"""Optimizers and schedules by name, from optax, with the few numbers that gin files set."""

from typing import Any

import optax

from variator_jax.errors import ConfigError, check_known, check_number, check_whole


class Optimizer(optax.GradientTransformationExtraArgs):
    """An optax transformation that knows what it was made of: `settings`, by gin's macros."""

    settings: dict[str, Any]


def schedule(
    name: str, learning_rate: float, warmup_steps: int = 0, train_steps: int = 0
) -> optax.Schedule:
    """Learning rate by step: 'constant', or 'linear' decay to 0; after a linear warm-up from 0.

    Raises:
      ConfigError: for an unknown name, a rate below 0, or a decay that ends before the warm-up
        does.
    """
    ends = {"constant": learning_rate, "linear": 0.0}
    check_known("No schedule is named", name, ends)
    check_number("LEARNING_RATE", learning_rate)
    check_whole("WARMUP_STEPS", warmup_steps, 0)
    check_whole("TRAIN_STEPS", train_steps, 0)
    if name == "linear" and train_steps <= warmup_steps:
        raise ConfigError(
            f"A linear decay over {train_steps} steps ends within {warmup_steps} steps of warm-up; "
            "lower WARMUP_STEPS or raise TRAIN_STEPS."
        )
    after = optax.linear_schedule(learning_rate, ends[name], max(train_steps - warmup_steps, 1))
    if not warmup_steps:
        return after
    warmup = optax.linear_schedule(0.0, learning_rate, warmup_steps)
    return optax.join_schedules([warmup, after], [warmup_steps])


def optimizer(
    name: str = "adamw",
    learning_rate: float = 1e-3,
    schedule_name: str = "linear",
    warmup_steps: int = 0,
    train_steps: int = 0,
    weight_decay: float = 0.0,
    clip_norm: float | None = 1.0,
) -> Optimizer:
    """AdamW, plain or with relative steps, or Adafactor, after global-norm clipping.

    Args:
      name: 'adamw'; 'adafactor' as T5 uses it, whose steps are relative to the RMS of each array;
        or 'adamw_relative', AdamW with such steps. T5 draws its embeddings at unit size and all
        else much smaller, so that a plain AdamW which suits the rest hardly moves a rare word.
      learning_rate: the peak; 1e-3 is usual for AdamW, 1e-2 for the relative ones.
      schedule_name: 'constant' or 'linear', see `schedule`.
      warmup_steps: steps of linear warm-up.
      train_steps: where a linear decay reaches 0.
      weight_decay: decoupled, times the learning rate.
      clip_norm: largest global norm of a gradient, None for no limit.

    Raises:
      ConfigError: for an unknown name, a CLIP_NORM that lets nothing through, or a negative rate or
        decay.
    """
    settings = {("OPTIMIZER" if k == "name" else k.upper()): v for k, v in locals().items()}
    settings["SCHEDULE"] = settings.pop("SCHEDULE_NAME")
    if schedule_name == "constant":
        del settings["TRAIN_STEPS"]  # A longer run has the same steps.
    rate = schedule(schedule_name, learning_rate, warmup_steps, train_steps)
    check_number("WEIGHT_DECAY", weight_decay)
    if clip_norm is not None:
        check_number("CLIP_NORM", clip_norm)
        if clip_norm == 0:
            raise ConfigError("CLIP_NORM is 0, which lets nothing through; None does not clip.")
    adam = optax.scale_by_adam()
    decayed = (optax.add_decayed_weights(weight_decay), optax.scale_by_learning_rate(rate))
    # optax's Adafactor flips the sign itself, and its own decay is not scaled by the learning rate.
    upwards = optax.scale_by_learning_rate(rate, flip_sign=False)
    flipped = (optax.add_decayed_weights(-weight_decay), upwards)
    optimizers = {
        "adamw": (adam, *decayed),
        "adamw_relative": (adam, optax.scale_by_param_block_rms(), *decayed),
        "adafactor": (optax.adafactor(learning_rate=None), *flipped),
    }
    check_known("No optimizer is named", name, optimizers)
    update = optax.chain(*optimizers[name])
    if clip_norm is not None:
        update = optax.chain(optax.clip_by_global_norm(clip_norm), update)
    made = Optimizer(*update)
    made.settings = settings
    return made
