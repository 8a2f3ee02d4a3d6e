"""How much memory a device has, how much a compiled program needs, and saying so in time."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from variator_jax.errors import ConfigError

_MEMINFO = Path("/proc/meminfo")
_ADVICE = "Take a smaller batch, length or backbone, or --dtype bfloat16"


def tree_bytes(tree: Any) -> int:
    """Bytes of arrays, or of their shapes."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def compiled_bytes(compiled: Any, resident: bool = True) -> int:
    """What a compiled program needs, by the compiler's analysis; 0 where the backend has none.

    Args:
      compiled: a `jax.stages.Compiled`.
      resident: whether to count its arguments, which lie on the device before it runs.
    """
    found = compiled.memory_analysis()
    if found is None:
        return 0
    # Results that take over an argument's memory are counted as the argument.
    fresh = found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return int(max(fresh, 0) + resident * found.argument_size_in_bytes)


def free_bytes(device: Any) -> int | None:
    """Memory of a device that is not in use; None where nobody knows."""
    stats = _stats(device)
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"] - stats.get("bytes_in_use", 0))
    if device.platform == "cpu" and _MEMINFO.is_file():
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def peak_bytes(device: Any) -> int | None:
    """The highest mark of memory in use since the process began, where the device keeps one."""
    found = _stats(device).get("peak_bytes_in_use")
    return None if found is None else int(found)


def check_room(what: str, needed: int, device: Any, advice: str = "") -> None:
    """Refuses what will not fit, before it is tried.

    Raises:
      ConfigError: with what is needed, and what there is.
    """
    free = free_bytes(device)
    if free is not None and needed > free:
        raise ConfigError(
            f"{what} needs {readable(needed)} more memory, and {readable(free)} of "
            f"{device.device_kind} are free. {_ADVICE}{advice}."
        )


@contextlib.contextmanager
def told(what: str, needed: int, advice: str = "") -> Iterator[None]:
    """Turns a device's own lack of memory into an error that says what was needed."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ConfigError(
            f"{what} needs {readable(needed)}, and the device ran out of memory. {_ADVICE}{advice}."
        ) from error


def readable(count: int) -> str:
    """Bytes as GiB, or MiB where that is a small number."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _stats(device: Any) -> dict[str, Any]:
    try:
        return device.memory_stats() or {}
    except (AttributeError, NotImplementedError, jax.errors.JaxRuntimeError):
        return {}
