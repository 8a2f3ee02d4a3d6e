"""How much memory a device has, and a refusal of what will not fit."""

from __future__ import annotations

import math
from typing import Any

import jax

from variator_jax.errors import ConfigError


def tree_bytes(tree: Any) -> int:
    """Bytes of arrays, or of their shapes."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def temporary_bytes(compiled: jax.stages.Compiled) -> int:
    """What a compiled program needs on top of its arguments; 0 where the backend has no analysis.

    Results that take over an argument's memory do not count.
    """
    memory = compiled.memory_analysis()
    if memory is None:
        return 0
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return int(memory.temp_size_in_bytes + max(results, 0))


def free_bytes(device: Any) -> int | None:
    """Memory of a device that is not in use; None where it is not known."""
    stats = device_stats(device)
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"] - stats.get("bytes_in_use", 0))
    return None


def device_stats(device: Any) -> dict[str, Any]:
    """A device's own account of its memory, such as 'peak_bytes_in_use'; empty without one."""
    try:
        return device.memory_stats() or {}
    except (AttributeError, NotImplementedError, jax.errors.JaxRuntimeError):
        return {}


def check_fits(what: str, needed: int, advice: str = "") -> None:
    """Refuses what will not fit into the first device, before it is tried.

    Raises:
      ConfigError: with what is needed and what is free.
    """
    device = jax.devices()[0]
    free = free_bytes(device)
    if free is not None and needed > free:
        raise ConfigError(
            f"{what} needs {readable(needed)} more memory, and {readable(free)} of "
            f"{device.device_kind} are free. Take a smaller batch, length or backbone, or --dtype "
            f"bfloat16{advice}."
        )


def readable(count: int) -> str:
    """Bytes as GiB, or MiB below one."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"
