"""The programs `variator` and `t5x`."""

import sys
from collections.abc import Sequence

# `verbs` and `serving` enter their commands into the registry.
from variator_jax.commands import registry, serving, verbs  # noqa: F401


def main(argv: Sequence[str] | None = None, program: str = "variator") -> int:
    """Runs one command; returns the exit code, as `registry.run`.

    Args:
      argv: the arguments after the program's name; those of the process if None.
      program: the program's name.
    """
    return registry.run(sys.argv[1:] if argv is None else argv, program)


def t5x() -> int:
    """The command `t5x`, which upstream T5X does not install: the same as `variator`."""
    return main(program="t5x")
