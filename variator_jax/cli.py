"""The command `variator`: a table of subcommands, each one function.

Here arguments become calls, and errors become one line on stderr. Nothing heavy is imported until a
subcommand runs, so that `variator --help` answers at once. A further subcommand is one function
under `@_command(...)`; what it does belongs into the module that it calls.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from variator_jax.errors import ConfigError, VariatorError, did_you_mean

_GIN_PREFIX = "--gin."


@dataclasses.dataclass(frozen=True)
class Command:
    """One subcommand: what it runs and what its help says."""

    name: str
    run: Callable[[argparse.Namespace], None]
    summary: str
    examples: tuple[str, ...]
    arguments: tuple[Callable[[argparse.ArgumentParser], object], ...]  # Each adds some.


COMMANDS: dict[str, Command] = {}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand.

    Args:
      argv: the arguments after `variator`; those of the process if None.

    Returns:
      The exit code: 0, 2 after a VariatorError, or 130 after an interrupt from the keyboard.
    """
    _quiet_logging()
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except VariatorError as error:
        if os.environ.get("VARIATOR_DEBUG") == "1":
            traceback.print_exc()
        print(f"variator: error: {_one_line(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("variator: interrupted", file=sys.stderr)
        return 130


def _command(
    name: str,
    summary: str,
    examples: tuple[str, ...],
    *arguments: Callable[[argparse.ArgumentParser], object],
) -> Callable[[Callable[[argparse.Namespace], None]], Callable[[argparse.Namespace], None]]:
    """Enters a function into the table of subcommands."""

    def enter(run: Callable[[argparse.Namespace], None]) -> Callable[[argparse.Namespace], None]:
        COMMANDS[name] = Command(name, run, summary, examples, arguments)
        return run

    return enter


def _gin_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--gin_file",
        action="append",
        default=[],
        metavar="FILE",
        help="a gin file, or the name of a packaged one; repeatable, later ones override",
    )
    # Taken out before argparse sees them, because the name is the user's; here for the help.
    parser.add_argument(
        "--gin.NAME",
        dest="unused",
        metavar="VALUE",
        help="set a macro (--gin.TRAIN_STEPS=100) or a parameter (--gin.train.seed=1); repeatable",
    )
    parser.add_argument(
        "--gin_search_paths",
        action="append",
        default=[],
        metavar="A,B",
        help="folders where gin files are looked for before the packaged ones",
    )


def _path(text: str) -> Callable[[argparse.ArgumentParser], object]:
    return lambda parser: parser.add_argument("path", nargs="?", help=text)


@_command(
    "train",
    "Train a backbone or a compression plugin.",
    (
        "variator train --gin_file=nano_docs.gin --gin_file=runs/backbone.gin "
        "--gin.TRAIN_STEPS=1000 --gin.MODEL_DIR=runs/nano_docs",
        "variator train --gin_file=nano_docs.gin --gin.RATIO=4",
    ),
    _gin_arguments,
)
def _train(args: argparse.Namespace) -> None:
    _parse_gin(args)
    from variator_jax import gin_utils
    from variator_jax.distill import train

    if gin_utils.configured(train.train)().interrupted:
        raise SystemExit(128 + signal.SIGTERM)  # as if the signal had ended it, for scripts


@_command(
    "eval",
    "Evaluate a backbone with its compression plugins: quality, cost and latency per ratio.",
    (
        "variator eval --gin_file=nano_docs.gin --gin_file=runs/eval.gin "
        "--gin.MODEL_DIR=runs/nano_report --gin.INITIAL_CHECKPOINT_PATH=runs/nano_docs "
        "--gin.PLUGIN_PATHS=\"('runs/nano_docs/pretrain_4',)\"",
    ),
    _gin_arguments,
)
def _eval(args: argparse.Namespace) -> None:
    _parse_gin(args)
    from variator_jax import gin_utils
    from variator_jax.distill import evaluate

    gin_utils.configured(evaluate.evaluate)()


@_command(
    "inspect",
    "Say what a folder holds, or print what gin files and overrides come to.",
    (
        "variator inspect runs/nano",
        "variator inspect --gin_file=nano_docs.gin --gin.MODEL_DIR=runs/nano",
    ),
    _gin_arguments,
    _path("a run folder, a backbone or a compression plugin"),
    lambda parser: parser.add_argument(
        "--verify", action="store_true", help="also read every weight of a backbone"
    ),
)
def _inspect(args: argparse.Namespace) -> None:
    if bool(args.path) == bool(args.gin_file):
        raise ConfigError("inspect takes a folder or --gin_file=FILE, one of the two.")
    if args.path:
        from variator_jax.checkpoints import inspect

        print(inspect.describe(args.path, verify=args.verify))
    else:
        _parse_gin(args)
        from variator_jax import gin_utils

        print(gin_utils.resolved_config())


def _convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="a folder, a file, or a URL such as gs://...")
    parser.add_argument("target", metavar="DST", help="a folder that does not exist yet")
    source = "what SRC is: hf, t5x or variator (backbones), official or t5x-run (plugins)"
    target = "what DST becomes: hf, t5x or variator; a plugin from t5x-run always becomes variator"
    parser.add_argument(
        "--from", dest="source_format", metavar="FORMAT", required=True, help=source
    )
    parser.add_argument("--to", dest="target_format", metavar="FORMAT", help=target)
    parser.add_argument("--dtype", help="cast the weights to f32, bf16 or f16")
    parser.add_argument(
        "--scan", action="store_true", help="to t5x: the form of scalable_t5 with scanned layers"
    )
    parser.add_argument(
        "--backbone",
        metavar="PATH",
        help="the backbone that the plugin belongs to: needed from official; from t5x-run, one "
        "that must be the run's own",
    )
    parser.add_argument(
        "--residual_scale",
        type=float,
        default=100.0,
        help="from official: 100 for the released plugins, 1 for one trained on an unscaled T5",
    )


@_command(
    "convert",
    "Convert backbones between Hugging Face, T5X and variator, and others' plugins to variator.",
    (
        "variator convert --from hf --to variator google/flan-t5-xl flan_t5_xl --dtype bf16",
        "variator convert --from t5x --to hf gs://BUCKET/checkpoint_1000000 t5_1_1_base",
        "variator convert --from variator --to t5x runs/nano/backbone nano_t5x --scan",
        "variator convert --from official --to variator plugin-t5_base-mux_4.pkl plugin "
        "--backbone t5_base",
        "variator convert --from t5x-run MODEL_DIR/checkpoint_100000 plugin --backbone t5_1_1_xl",
    ),
    _convert_arguments,
)
def _convert(args: argparse.Namespace) -> None:
    from variator_jax.checkpoints import convert_command

    print(
        convert_command.run(
            args.source_format,
            args.target_format,
            args.source,
            args.target,
            dtype=args.dtype,
            scan=args.scan,
            backbone=args.backbone,
            residual_scale=args.residual_scale,
        )
    )


@_command(
    "report",
    "Print the table of a finished evaluation.",
    ("variator report runs/quickstart",),
    _path("the folder with report.md"),
)
def _report(args: argparse.Namespace) -> None:
    if not args.path:
        raise ConfigError("report needs a folder: variator report runs/quickstart")
    table, plot = (Path(args.path) / f"report.{suffix}" for suffix in ("md", "png"))
    if not table.is_file():
        raise ConfigError(
            f"there is no {table}: the evaluation has not ended, or it lies elsewhere."
        )
    print(table.read_text(encoding="utf-8").rstrip())
    if plot.is_file():
        print(f"\nPlot: {plot}")


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from variator_jax import __version__

        print(f"variator {__version__}")
        return 0
    name, *rest = arguments
    if name.startswith("-"):
        raise ConfigError(f"the command comes first: variator {'|'.join(COMMANDS)} {name} ...")
    if name not in COMMANDS:
        raise ConfigError(
            f"there is no command {name!r}, only {', '.join(COMMANDS)}."
            + did_you_mean(name, COMMANDS)
        )
    command = COMMANDS[name]
    bindings, rest = _split_bindings(rest)
    try:
        args = _parser(command).parse_args(rest, argparse.Namespace(bindings=bindings))
    except SystemExit as done:  # argparse leaves this way after --help.
        return int(done.code or 0)
    if bindings and _gin_arguments not in command.arguments:
        raise ConfigError(f"{name} takes no gin overrides, found --gin.{bindings[0]}.")
    command.run(args)
    return 0


def _overview() -> str:
    rows = (f"  {c.name:<10}{c.summary}" for c in COMMANDS.values())
    return "\n".join(
        (
            "usage: variator COMMAND [arguments]",
            "",
            "Compression plugins for frozen T5 encoders: train, evaluate, inspect.",
            "",
            "commands:",
            *rows,
            "",
            "variator COMMAND --help shows the arguments and examples of each.",
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
        elif file := re.match(r"unrecognized arguments: ([^-\s]\S*\.gin)", message):
            near = f" Did you mean '--gin_file={file[1]}'?"
        raise ConfigError(f"{self.prog}: {message}.{near}")


def _parser(command: Command) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=f"variator {command.name}",
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


def _parse_gin(args: argparse.Namespace) -> None:
    from variator_jax import gin_utils

    if not args.gin_file:
        raise ConfigError(
            "no gin file given: --gin_file=nano_docs.gin is the smallest packaged one."
        )
    search_paths = [path for group in args.gin_search_paths for path in group.split(",") if path]
    # What differs between the engines lies in one folder each; this is the built-in engine's.
    search_paths.append(str(gin_utils.configs_dir() / "engines" / "builtin"))
    gin_utils.parse(args.gin_file, args.bindings, search_paths)


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
