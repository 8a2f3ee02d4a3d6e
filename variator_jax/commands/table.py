"""The table of subcommands, and the arguments that several of them take."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Command:
    """One subcommand: what it runs and what its help says."""

    name: str
    run: Callable[[argparse.Namespace], None]
    summary: str
    examples: tuple[str, ...]
    arguments: tuple[Callable[[argparse.ArgumentParser], object], ...]  # Each adds some.


COMMANDS: dict[str, Command] = {}


def command(
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


def gin_arguments(parser: argparse.ArgumentParser) -> None:
    """What every command takes that is configured by gin."""
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
    parser.add_argument("--engine", help="t5x or builtin; by default T5X where it can be imported")


def run_arguments(parser: argparse.ArgumentParser) -> None:
    """What every command takes that an engine runs."""
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="print the configuration and what the run will need, and stop",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="say whether the arguments and gin files are in order, and stop; unlike --dry_run it "
        "wants all that is required, and looks at no devices",
    )
    parser.add_argument("--tfds_data_dir", metavar="DIR", help="where TFDS keeps its datasets")
    # Taken out before argparse sees them, too.
    parser.add_argument(
        "-- FLAG", dest="unused", action="store_true", help="further flags of T5X's own program"
    )


def process_arguments(parser: argparse.ArgumentParser) -> None:
    """How several processes find one another; T5X has the same names."""
    add = parser.add_argument
    add("--coordinator_address", metavar="HOST:PORT", help="of process 0, in a run of several")
    add("--process_count", type=int, metavar="N", help="how many processes the run has")
    add("--process_index", type=int, metavar="I", help="which of them this is, from 0")
    add(
        "--multiprocess",
        action="store_true",
        help="insist on a TPU pod, SLURM, Open MPI or Kubernetes that JAX detects",
    )


def path_argument(text: str) -> Callable[[argparse.ArgumentParser], object]:
    """A folder that may be left out; `text` is its help."""
    return lambda parser: parser.add_argument("path", nargs="?", help=text)
