"""Which engine a command runs on, parsing for it, and how T5X's own programs are started.

Nothing here imports T5X but `as_main`, so that a gin file's names resolve as in T5X's program.
"""

import argparse
import contextlib
import importlib
import importlib.util
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple, NoReturn

from variator_jax import gin_utils
from variator_jax.errors import ConfigError, check_known

BUILTIN, T5X = "builtin", "t5x"
HOW = "docs/t5x.md shows how to install T5X"

# T5X's programs, by the modules whose functions gin configures.
PROGRAMS = {name: f"t5x.{name}" for name in ("train", "eval", "infer", "export", "precompile")}

# Macros that one engine alone reads, and what to do on the other.
_MESH = "give MESH_SHAPE = (data, fsdp, model)"
_FOREIGN = {
    BUILTIN: {"NUM_PARTITIONS": _MESH, "MODEL_PARALLEL_SUBMESH": _MESH},
    T5X: {
        "REMAT": "give NUM_MICROBATCHES",
        "DATA_SHARDS": "T5X cuts the data by the number of hosts",
        "LATENCY_SHAPES": "use variator bench, or --engine=builtin",
    },
}
_PLUGIN_MACROS = {"train": "INITIAL_PLUGIN_PATH", "eval": "PLUGIN_PATHS, a tuple"}  # builtin
# Flags of the data folder and of several processes, which T5X's programs have, too.
_SHARED_FLAGS = ("tfds_data_dir", "coordinator_address", "process_count", "process_index")


class Engine(NamedTuple):
    """An engine, and why it was taken."""

    name: str
    reason: str

    def search_paths(self, command: str) -> list[str]:
        """The folders of its part of a configuration: `engine.gin` and what that includes."""
        folder = gin_utils.engine_dir(self.name)
        folders = [os.path.join(folder, command), folder, str(_t5x_root())]
        return folders if self.name == T5X else [folder]


def choose(asked: str | None) -> Engine:
    """The engine of that name or of VARIATOR_ENGINE; else T5X where it is, or the built-in one.

    Raises:
      ConfigError: for an unknown engine, or for T5X where it is not importable.
    """
    asked = asked or os.environ.get("VARIATOR_ENGINE") or None
    if asked is not None:
        check_known("No engine is named", asked, (BUILTIN, T5X))
    if asked == BUILTIN:
        return Engine(BUILTIN, "asked for")
    if (root := _t5x_root()) is not None:
        return Engine(T5X, f"t5x is importable, from {root}")
    if asked == T5X:
        raise ConfigError(f"--engine=t5x, but t5x cannot be imported; {HOW}.")
    return Engine(BUILTIN, f"t5x is not importable; {HOW}")


def announce(asked: str | None) -> Engine:
    """`choose`, with a line on standard error that names the engine."""
    engine = choose(asked)
    print(f"engine: {engine.name} ({engine.reason})", file=sys.stderr, flush=True)
    return engine


def parse(
    args: argparse.Namespace, engine: Engine, require: bool = True, preflight: bool = True
) -> list[tuple[str, str]]:
    """Parses the gin files for an engine's command; returns the overrides as gin literals.

    With `require`, required macros must be set; with `preflight`, T5X's folders are checked, too.

    Raises:
      VariatorError: as `gin_utils.parse`, and for macros of the other engine or a T5X that cannot
        be imported or would refuse to start.
    """
    if not args.gin_file:
        raise ConfigError("no gin file given: --gin_file=nano_docs.gin is the smallest one.")
    command = args.command if args.command in PROGRAMS else "train"
    other, hints = {BUILTIN: T5X, T5X: BUILTIN}[engine.name], dict(_FOREIGN[engine.name])
    if engine.name == BUILTIN and command in _PLUGIN_MACROS:
        hints["PLUGIN_PATH"] = f"{command} takes {_PLUGIN_MACROS[command]}"
    for name in (binding.partition("=")[0].strip() for binding in args.bindings):
        if name in hints:
            on_this = f"on {engine.name}: {hints[name]}"
            raise ConfigError(f"--gin.{name} is for the engine {other}; {on_this}.")
    paths = [*args.gin_search_paths, *engine.search_paths(command)]
    if engine.name == BUILTIN:
        return gin_utils.parse(args.gin_file, args.bindings, paths, require)
    with as_main(PROGRAMS[command]):
        overrides = gin_utils.parse(args.gin_file, args.bindings, paths, require)
        if require and preflight:  # Now errors of ours can still be shown in one line.
            import jax

            from variator_jax import t5x_engine

            jax.config.update("jax_platforms", "cpu")  # The accelerator is for T5X's program.
            if command != "precompile":
                gin_utils.configured(t5x_engine.restore_config)(check_owner=False)
            gin_utils.configured(t5x_engine.preflight)()  # Last, because it writes beside results.
    return overrides


def command_line(
    args: argparse.Namespace, engine: Engine, overrides: Sequence[tuple[str, str]]
) -> list[str]:
    """The call of T5X's own program for a command, with its further flags."""
    paths = [*args.gin_search_paths, *engine.search_paths(args.command)]
    folders = [os.getcwd(), *paths, str(gin_utils.configs_dir())]
    precompile = args.command == "precompile"  # It only runs through T5X's common entrance.
    given = {k: v for k, v in vars(args).items() if k in _SHARED_FLAGS and v is not None}
    several = vars(args).get("multiprocess") or given.keys() - {"tfds_data_dir"}
    flags = [f"--{name}={value}" for name, value in given.items()]
    return [
        *(sys.executable, "-m", "t5x.main" if precompile else PROGRAMS[args.command]),
        *(f"--gin_file={gin_utils.find_config(name, paths)}" for name in args.gin_file),
        f"--gin_search_paths={','.join(folders)}",
        *(f"--gin.{name}={value}" for name, value in overrides),
        *["--run_mode=precompile"] * precompile,
        *(*flags, *["--multiprocess_gpu"] * bool(several), *args.t5x_flags),
    ]


def run_program(arguments: Sequence[str]) -> NoReturn:
    """Replaces this process by T5X's program, so that signals and the exit code are its own."""
    sys.stdout.flush()
    sys.stderr.flush()
    # `python -m` puts the current folder first, where a console command has its own.
    paths = [path for path in sys.path if path and path != os.path.dirname(sys.argv[0])]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(paths))
    os.execve(arguments[0], list(arguments), environment)


@contextlib.contextmanager
def as_main(module: str) -> Iterator[None]:
    """Lets `import __main__` in a gin file mean T5X's program, as it will when that runs."""
    main = sys.modules["__main__"]
    try:
        sys.modules["__main__"] = importlib.import_module(module)
        yield
    except ImportError as error:
        raise ConfigError(
            f"{module} cannot be imported: {error}. It needs the package {error.name!r}; {HOW}. "
            f"--engine={BUILTIN} trains, evaluates and infers without T5X."
        ) from error
    finally:
        sys.modules["__main__"] = main


def _t5x_root() -> pathlib.Path | None:
    """The folder of the package t5x, which is not imported; its dependencies may be missing."""
    spec = importlib.util.find_spec("t5x")
    if spec is None or not spec.origin:
        return None
    package = pathlib.Path(spec.origin).parent
    return package.parent if (package / "train.py").is_file() else None
