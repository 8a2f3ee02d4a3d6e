"""The table of commands, and running one of them.

Nothing heavy is imported until a command runs, so that `variator --help` answers at once.
"""

import argparse
import contextlib
import inspect
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

from absl import logging

from variator_jax import __version__
from variator_jax.errors import ConfigError, VariatorError, did_you_mean
from variator_jax.files import expand_home

Run = Callable[[argparse.Namespace], None]
AddArguments = Callable[[argparse.ArgumentParser], object]


class Command(NamedTuple):
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


def listed(text: str) -> tuple[str, ...]:
    """Reads names such as 'cpu,tpu', for argparse."""
    return tuple(filter(None, text.split(",")))


def run(arguments: Sequence[str], program: str = "variator") -> int:
    """Runs one command; its errors become one line on standard error.

    Args:
      arguments: the command's name and its arguments.
      program: the program's name in messages.

    Returns:
      The exit code: 0, 2 after a VariatorError or without the devices of JAX_PLATFORMS, 130 after
      an interrupt from the keyboard, or 141 if nobody reads what is printed.
    """
    _handle_signals_and_threads(program)
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
    except (AssertionError, RuntimeError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        if not any(frame.filename.endswith("jax/_src/xla_bridge.py") for frame in frames):
            raise
        found = f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}: JAX finds no such device"
        raised = str(error).partition("\n  In call to")[0]
        reason = _one_line(raised or "its plugin is not installed")
        print(f"{program}: error: {found}: {reason}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        _exit_on_interrupt("")
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader, such as `head`, has ended. Python would raise again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0


def _handle_signals_and_threads(program: str) -> None:
    """Ctrl-C unwinds once and then ends the process; errors are shown in the main thread alone.

    Orbax's threads hand theirs over to it, and would print hundreds of lines on a full disk.
    """
    if os.environ.get("VARIATOR_DEBUG") != "1":
        logging.get_absl_logger().addFilter(_without_traceback)
        threading.excepthook = lambda error: None
        sys.unraisablehook = lambda error: None

    def interrupt(number: int, frame: Any) -> NoReturn:
        _exit_on_interrupt(f"{program}: interrupted twice\n")
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        with contextlib.suppress(ValueError):  # in another thread than the main one
            signal.signal(signal.SIGINT, interrupt)


def _without_traceback(record: Any) -> bool:
    return not record.exc_info


def _exit_on_interrupt(last_words: str) -> None:
    """From now on, Ctrl-C ends the process at once: what is half written is not a checkpoint."""

    def end(number: int, frame: Any) -> NoReturn:
        os.write(2, last_words.encode())
        os._exit(130)

    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGINT, end)


def _parse(arguments: Sequence[str], program: str) -> argparse.Namespace:
    """The arguments of a command, with its function, gin overrides and T5X's flags."""
    name = arguments[0]
    if name.startswith("-") and name not in ("-h", "--help", "--version"):
        raise ConfigError(f"the command comes first: {program} {'|'.join(COMMANDS)} {name} ...")
    end = arguments.index("--") if "--" in arguments else len(arguments)
    prefix = "--gin."
    plain = [expand_home(a) for a in arguments[:end] if not a.startswith(prefix)]
    args, unknown = _program_parser(program).parse_known_args(plain)
    args.bindings = [a.removeprefix(prefix) for a in arguments[:end] if a.startswith(prefix)]
    if unknown:
        before = dict(zip(arguments[1:], arguments, strict=False)).get(unknown[0], "")
        _refuse(unknown, args.parser, before)
    if args.bindings and "gin_file" not in args:
        raise ConfigError(f"{name} takes no gin overrides, found {prefix}{args.bindings[0]}.")
    args.t5x_flags = list(map(expand_home, arguments[end + 1 :]))
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


def _refuse(unknown: Sequence[str], parser: argparse.ArgumentParser, before: str) -> NoReturn:
    """Refuses arguments that a command does not take, with what is probably meant."""
    flag, _, value = unknown[0].partition("=")
    options = [option for action in parser._actions for option in action.option_strings]
    near = did_you_mean(flag, options) if flag.startswith("--") else ""
    if re.fullmatch(r"--gin\.[^=]+", before):
        near = f" Did you mean '{before}={unknown[0]}'?"
    elif re.fullmatch(r"--[A-Z_]+", flag):
        near = f" Did you mean '--gin.{flag[2:]}={value or 'VALUE'}'?"
    elif flag.endswith(".gin"):
        near = f" Did you mean '--gin_file={flag}'?"
    elif "--dry_run" in options:
        if value and not near:
            near = f" Did you mean '--gin.{flag[2:].upper()}={value}'?"
        near += " Flags of T5X's own program go behind --."
    raise ConfigError(f"{parser.prog}: unrecognized arguments: {' '.join(unknown)}.{near}")


def _one_line(message: str) -> str:
    """The message without gin's trace of calls, its lines joined."""
    message = re.split(r"\n +In (?:call to configurable|file|bindings string) ", message)[0]
    return " ".join(message.split()) or "unknown error"
