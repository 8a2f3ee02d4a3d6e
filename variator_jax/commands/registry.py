"""The table of commands, the arguments that several of them take, and running one of them.

Nothing heavy is imported until a command runs, so that `variator --help` answers at once.
"""

import argparse
import dataclasses
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from absl import logging

from variator_jax import __version__
from variator_jax.errors import ConfigError, VariatorError, did_you_mean

Run = Callable[[argparse.Namespace], None]
AddArguments = Callable[[argparse.ArgumentParser], object]


@dataclasses.dataclass(frozen=True)
class Command:
    """One command: its function and its help."""

    name: str
    run: Run
    summary: str
    examples: tuple[str, ...]
    arguments: tuple[AddArguments, ...]


COMMANDS: dict[str, Command] = {}


def command(name: str, *arguments: AddArguments) -> Callable[[Run], Run]:
    """Enters a function into the table of commands.

    The first line of its docstring is the command's summary, each further one an example.
    """

    def enter(function: Run) -> Run:
        summary, *lines = inspect.cleandoc(function.__doc__ or name).splitlines()
        examples = tuple(" ".join(line.split()) for line in lines if line)
        COMMANDS[name] = Command(name, function, summary, examples, arguments)
        return function

    return enter


def run(arguments: Sequence[str], program: str = "variator") -> int:
    """Runs one command; its errors become one line on standard error.

    Args:
      arguments: the command's name and its arguments.
      program: the program's name in messages.

    Returns:
      The exit code: 0, 2 after a VariatorError, 130 after an interrupt from the keyboard, or 141 if
      nobody reads what is printed.
    """
    # Level 3, for TensorFlow reports a missing GPU as an error; here it only reads data.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logging.set_verbosity(min(logging.get_verbosity(), logging.WARNING))
    if not arguments:
        _program_parser(program).print_help()
        return 2
    try:
        args = _parse(arguments, program)
        args.run(args)
    except SystemExit as done:
        if done.code not in (0, None):  # argparse exits after --help and --version.
            raise
    except VariatorError as error:
        if os.environ.get("VARIATOR_DEBUG") == "1":
            traceback.print_exc()
        print(f"{program}: error: {_one_line(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader, such as `head`, has ended. Python would raise again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0


def _parse(arguments: Sequence[str], program: str) -> argparse.Namespace:
    """The arguments of a command, with its function, gin overrides and T5X's flags."""
    name = arguments[0]
    if name.startswith("-") and name not in ("-h", "--help", "--version"):
        raise ConfigError(f"the command comes first: {program} {'|'.join(COMMANDS)} {name} ...")
    end = arguments.index("--") if "--" in arguments else len(arguments)
    prefix = "--gin."
    plain = [a for a in arguments[:end] if not a.startswith(prefix)]
    args, unknown = _program_parser(program).parse_known_args(plain)
    args.bindings = [a.removeprefix(prefix) for a in arguments[:end] if a.startswith(prefix)]
    if unknown:
        _refuse(unknown, args.parser)
    if args.bindings and "gin_file" not in args:
        raise ConfigError(f"{name} takes no gin overrides, found {prefix}{args.bindings[0]}.")
    args.t5x_flags = arguments[end + 1 :]
    return args


class _Parser(argparse.ArgumentParser):
    """An argument parser that raises its errors, with the nearest command."""

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"argument COMMAND: invalid choice: '?([^'\s]+)", message)
        near = did_you_mean(unknown[1], COMMANDS) if unknown else ""
        raise ConfigError(f"{self.prog}: {message}.{near}")


def _program_parser(program: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=program,
        description="Compression plugins for frozen T5 encoders: train, evaluate, inspect.",
        epilog=f"{program} COMMAND --help shows the arguments and examples of each.",
    )
    parser.add_argument("--version", action="version", version=f"variator {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", dest="command", title="commands")
    for entry in COMMANDS.values():
        subparser = commands.add_parser(
            entry.name,
            help=entry.summary,
            description=entry.summary,
            epilog="\n  ".join(("examples:", *entry.examples)),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        subparser.set_defaults(run=entry.run, parser=subparser)
        for add in entry.arguments:
            add(subparser)
    return parser


def _refuse(unknown: Sequence[str], parser: argparse.ArgumentParser) -> NoReturn:
    """Refuses arguments that a command does not take, with what is probably meant."""
    flag = unknown[0].partition("=")[0]
    options = [option for action in parser._actions for option in action.option_strings]
    near = did_you_mean(flag, options) if flag.startswith("--") else ""
    if re.fullmatch(r"--[A-Z_]+", flag):
        near = f" Did you mean '--gin.{flag[2:]}'?"
    elif flag.endswith(".gin"):
        near = f" Did you mean '--gin_file={flag}'?"
    elif "--dry_run" in options:
        near += " Flags of T5X's own program go behind --."
    raise ConfigError(f"{parser.prog}: unrecognized arguments: {' '.join(unknown)}.{near}")


def _one_line(message: str) -> str:
    """The message without gin's trace of calls, its lines joined."""
    message = re.split(r"\n +In (?:call to configurable|file|bindings string) ", message)[0]
    return " ".join(message.split()) or "unknown error"


# Arguments that several commands take.


def gin_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of every command that is configured by gin."""
    add = parser.add_argument
    files = "a gin file, or the name of a packaged one; repeatable, later ones override"
    add("--gin_file", action="append", default=[], metavar="FILE", help=files)
    # For the help alone: `_parse` removes overrides, whose names are the user's, before argparse.
    overrides = "set a macro (--gin.RATIO=8) or a parameter (--gin.train.seed=1); repeatable"
    add("--gin.NAME=VALUE", dest="unused", action="store_true", help=overrides)
    folders = "folders where gin files are looked for before the packaged ones"
    extend = {"action": "extend", "type": lambda names: list(filter(None, names.split(",")))}
    add("--gin_search_paths", default=[], metavar="A,B", help=folders, **extend)
    add("--engine", help="t5x or builtin; by default T5X where it can be imported")


def run_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of every command that an engine runs."""
    add = parser.add_argument
    plan = "print the configuration and what the run will need, and stop"
    add("--dry_run", action="store_true", help=plan)
    check = "check arguments and gin files without looking at devices; nothing may be left unset"
    add("--check", action="store_true", help=check)
    add("--tfds_data_dir", metavar="DIR", help="where TFDS keeps its datasets")
    parser.add_argument_group("-- FLAG ...", "further flags of T5X's own program")


def process_arguments(parser: argparse.ArgumentParser) -> None:
    """How several processes find one another; T5X has the same names."""
    add = parser.add_argument
    add("--coordinator_address", metavar="HOST:PORT", help="of process 0, in a run of several")
    add("--process_count", type=int, metavar="N", help="how many processes the run has")
    add("--process_index", type=int, metavar="I", help="which of them this is, from 0")
    detected = "insist on a TPU pod, SLURM, Open MPI or Kubernetes that JAX detects"
    add("--multiprocess", action="store_true", help=detected)
