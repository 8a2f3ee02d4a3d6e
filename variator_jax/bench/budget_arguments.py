"""What `variator budget` is told in words: amounts of memory and TPU slices. No JAX is imported."""

from __future__ import annotations

import re

from variator_jax.errors import ConfigError

# What libtpu 0.0.42 compiles for; others are left to the libtpu that is installed.
TPUS = ("v2", "v3", "v4", "v5e", "v5p", "v6e", "tpu7x")
_UNITS = {"B": 1, "MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(text: str) -> int:
    """Bytes of '80GiB' or '80GB'.

    Raises:
      ConfigError: for anything else, a number without a unit too: 80 are rarely bytes.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in _UNITS:
        raise ConfigError(f"{text!r} is no amount of memory; write 80GiB or 80GB.")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def check_topology(name: str) -> None:
    """Refuses what cannot be the name of a slice; whether there is one, libtpu knows.

    Raises:
      ConfigError: with the form and the names that are known.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*:[1-9]\d*(x[1-9]\d*){1,2}", name):
        raise ConfigError(
            f"--topology {name} is no TPU slice; write NAME:AxB or NAME:AxBxC, such as v5e:4x4 or "
            f"v5p:2x2x1. Names: {', '.join(TPUS)}."
        )
