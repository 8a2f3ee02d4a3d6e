"""A control for the evaluation: the backbone with its encoder FFNs skipped altogether.

A compression plugin can only lose what the encoder's FFNs contribute. Where a task's score hardly
falls without them, a small loss under compression is no evidence for the plugin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp

from variator_jax.backbones.base import Stack
from variator_jax.plugin import intercept_modules


@contextmanager
def skip_encoder_ffn(stack: Stack) -> Iterator[None]:
    """While active, every FFN of the stack returns zeros like its input.

    Enter it inside the function that is jitted: one that was compiled before runs as it was
    compiled.

    Raises:
      PluginError: on leaving, if no FFN was skipped.
    """
    paths = {stack.path("ffn", layer) for layer in range(stack.layers)}

    def skip(path: str, call: Callable[..., Any], args: tuple, kwargs: dict) -> jax.Array:
        return jnp.zeros_like(stack.stream("ffn", args, kwargs))

    with intercept_modules(paths.__contains__, skip):
        yield
