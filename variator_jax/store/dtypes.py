"""The dtypes of weights: by name, and what a backbone computes in that is stored in one of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from variator_jax.backbones.t5 import T5Config
from variator_jax.errors import ConfigError, did_you_mean

_NAMES = {
    **dict.fromkeys(("float32", "f32", "fp32"), np.dtype(np.float32)),
    **dict.fromkeys(("bfloat16", "bf16"), np.dtype(jnp.bfloat16)),
    **dict.fromkeys(("float16", "f16", "fp16"), np.dtype(np.float16)),
}
WEIGHTS = frozenset(_NAMES.values())


def parse_dtype(dtype: Any) -> np.dtype | None:
    """The dtype of a name such as 'bf16', a numpy or a JAX dtype; None stays None.

    Raises:
      ConfigError: for a dtype that weights do not have.
    """
    if dtype is None:
        return None
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    if name not in _NAMES:
        raise ConfigError(
            f"there is no dtype {name!r} for weights, only float32 (f32), bfloat16 (bf16) and "
            f"float16 (f16).{did_you_mean(name, _NAMES)}"
        )
    return _NAMES[name]


def cast_config(config: T5Config, dtype: np.dtype | None) -> T5Config:
    """The config of the backbone whose leaves were cast to `dtype`."""
    if dtype is None:
        return config
    # float16 is good for storage only: T5's feed-forward layers leave its range.
    compute = "bfloat16" if dtype == jnp.bfloat16 else "float32"
    return dataclasses.replace(config, dtype=compute, param_dtype=dtype.name)
