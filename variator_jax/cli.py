"""The programs `variator` and `t5x`. The commands are in `commands`, which registers them."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from variator_jax import commands


def main(argv: Sequence[str] | None = None, program: str = "variator") -> int:
    """Runs one command; returns the exit code, as `commands.registry.run`.

    Args:
      argv: the arguments after the program's name; those of the process if None.
      program: what the program is called.
    """
    return commands.registry.run(sys.argv[1:] if argv is None else argv, program)


def t5x() -> int:
    """The command `t5x`, which upstream T5X does not install: the same as `variator`."""
    return main(program="t5x")
