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
        cores = usable_cores()
        name = f"{_cpu_model(_CPUINFO)}, {cores} {'core' if cores == 1 else 'cores'}"
        if len(devices) > 1:
            name += f" shown to JAX as {len(devices)} devices"
    else:
        name = f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})"
    if jax.process_count() > 1:
        name += f" on {jax.process_count()} hosts"
    return f"{name}, jax {jax.__version__}"


def _cpu_model(cpuinfo: Path) -> str:
    """The first model name in `cpuinfo`, or what the platform module knows."""
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    known = [name for name in names if name] or [platform.processor(), platform.machine()]
    return f"CPU {next(filter(None, known), 'of unknown model')}"


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
