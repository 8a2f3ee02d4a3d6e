"""The name of the machine that a measurement was taken on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import jax

_CPUINFO = Path("/proc/cpuinfo")


def hardware() -> str:
    """Names JAX's default devices, their number and the JAX version.

    A CPU is named by its model and the cores that this process may use; accelerators by their kind
    and number, with the number of hosts where there are several.
    """
    devices = jax.devices()
    if devices[0].platform == "cpu":
        name = f"{_cpu_model(_CPUINFO)}, {_plural(usable_cores(), 'core')}"
        if len(devices) > 1:
            name += f" shown to JAX as {len(devices)} devices"
    else:
        name = f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})"
    if jax.process_count() > 1:
        name += f" on {jax.process_count()} hosts"
    return f"{name}, jax {jax.__version__}"


def _cpu_model(cpuinfo: Path) -> str:
    """The first model name in `cpuinfo`, or what the platform module knows."""
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip().lower() == "model name" and value.strip():
                return f"CPU {value.strip()}"
    return f"CPU {platform.processor() or platform.machine() or 'of unknown model'}"


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
