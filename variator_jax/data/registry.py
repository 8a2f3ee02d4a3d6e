"""Which tasks and mixtures this library registered, and what each was made from."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from variator_jax.data._tf import seqio
from variator_jax.data.spec import TaskSpec, register_spec
from variator_jax.errors import DataError

_registered: dict[str, str] = {}  # name -> origin


def origin_of(parts: Any) -> str:
    """Returns the hash of what a task is made from: any JSON value."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def is_registered(name: str, origin: str) -> bool:
    """Returns whether the very same task or mixture has this name.

    Raises:
      DataError: if another one has it.
    """
    if _registered.get(name) == origin:
        return True
    if name in {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}:
        raise DataError(
            f"a task named {name!r} is already registered, from other files or other arguments; "
            "give this one another name"
        )
    return False


def remember(name: str, origin: str, spec: TaskSpec | None = None) -> str:
    """Notes what `name` was made from, registers a task's spec, and returns the name."""
    if spec is not None:
        register_spec(spec)
    _registered[name] = origin
    return name
