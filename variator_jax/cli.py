"""The command line of `variator` and `t5x`: from arguments to a subcommand, errors in one line.

Nothing heavy is imported until a subcommand runs, so that `variator --help` answers at once. The
subcommands themselves are in `commands`.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from variator_jax.commands import COMMANDS, Command, gin_arguments
from variator_jax.errors import ConfigError, VariatorError, did_you_mean

_GIN_PREFIX = "--gin."
_T5X_FLAGS = ("--multiprocess_gpu", "--seqio_additional_cache_dirs", "--initialization_timeout")


def t5x() -> int:
    """The command `t5x`, which upstream T5X does not install: the same as `variator`."""
    return main(program="t5x")


def main(argv: Sequence[str] | None = None, program: str = "variator") -> int:
    """Runs one subcommand.

    Args:
      argv: the arguments after the program's name; those of the process if None.
      program: what the program is called.

    Returns:
      The exit code: 0, 2 after a VariatorError, 130 after an interrupt from the keyboard, or 141 if
      nobody reads what is printed.
    """
    _quiet_logging()
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments, program)
    except VariatorError as error:
        if os.environ.get("VARIATOR_DEBUG") == "1":
            traceback.print_exc()
        print(f"{program}: error: {_one_line(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read our lines, such as `head`, has enough. Python would complain once more at its
        # exit, when it empties what is still buffered.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _dispatch(arguments: list[str], program: str) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview(program))
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from variator_jax import __version__

        print(f"variator {__version__}")
        return 0
    name, *rest = arguments
    if name.startswith("-"):
        raise ConfigError(f"the command comes first: {program} {'|'.join(COMMANDS)} {name} ...")
    if name not in COMMANDS:
        raise ConfigError(
            f"there is no command {name!r}, only {', '.join(COMMANDS)}."
            + did_you_mean(name, COMMANDS)
        )
    command = COMMANDS[name]
    end = rest.index("--") if "--" in rest else len(rest)
    bindings, own = _split_bindings(rest[:end])
    known = argparse.Namespace(bindings=bindings, t5x_flags=rest[end + 1 :])
    try:
        args = _parser(command, program).parse_args(own, known)
    except SystemExit as done:  # argparse leaves this way after --help.
        return int(done.code or 0)
    if bindings and gin_arguments not in command.arguments:
        raise ConfigError(f"{name} takes no gin overrides, found --gin.{bindings[0]}.")
    command.run(args)
    return 0


def _overview(program: str) -> str:
    rows = (f"  {c.name:<12}{c.summary}" for c in COMMANDS.values())
    return "\n".join(
        (
            f"usage: {program} COMMAND [arguments]",
            "",
            "Compression plugins for frozen T5 encoders: train, evaluate, inspect.",
            "",
            "commands:",
            *rows,
            "",
            f"{program} COMMAND --help shows the arguments and examples of each.",
        )
    )


class _Parser(argparse.ArgumentParser):
    """An argument parser that raises its complaints, with the nearest options."""

    def error(self, message: str) -> NoReturn:
        options = [option for action in self._actions for option in action.option_strings]
        unknown = re.match(r"unrecognized arguments: (--[^\s=]+)", message)
        near = did_you_mean(unknown[1], options) if unknown else ""
        if macro := re.match(r"unrecognized arguments: --([A-Z_]+)", message):
            near = f" Did you mean '--gin.{macro[1]}'?"
        elif unknown and unknown[1] in _T5X_FLAGS:
            near = f" It is T5X's own: put it behind --, as in: {self.prog} ... -- {unknown[1]}"
        elif file := re.match(r"unrecognized arguments: ([^-\s]\S*\.gin)", message):
            near = f" Did you mean '--gin_file={file[1]}'?"
        raise ConfigError(f"{self.prog}: {message}.{near}")


def _parser(command: Command, program: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=f"{program} {command.name}",
        description=command.summary,
        epilog="\n".join(("examples:", *(f"  {example}" for example in command.examples))),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for add in command.arguments:
        add(parser)
    return parser


def _split_bindings(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Takes `--gin.NAME=VALUE` and `--gin.NAME VALUE` out of the arguments, as NAME=VALUE."""
    bindings, rest = [], []
    remaining = iter(arguments)
    for argument in remaining:
        if not argument.startswith(_GIN_PREFIX):
            rest.append(argument)
        elif "=" in argument:
            bindings.append(argument.removeprefix(_GIN_PREFIX))
        else:
            value = next(remaining, "--")
            if value.startswith("--"):
                raise ConfigError(f"{argument} has no value: write {argument}=VALUE.")
            bindings.append(f"{argument.removeprefix(_GIN_PREFIX)}={value}")
    return bindings, rest


def _one_line(message: str) -> str:
    """The message without gin's trace of calls, its lines joined."""
    own = re.split(r"\n +In (?:call to configurable|file|bindings string) ", message, maxsplit=1)[0]
    lines = [line.strip() for line in own.splitlines() if line.strip()]
    return " ".join(lines) or "unknown error"


def _quiet_logging() -> None:
    """Leaves the console to our own lines; what a user has set already stays."""
    # Level 3, for TensorFlow calls the want of a GPU an error; here it only reads data.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from absl import logging

    if logging.get_verbosity() > logging.WARNING:
        logging.set_verbosity(logging.WARNING)
