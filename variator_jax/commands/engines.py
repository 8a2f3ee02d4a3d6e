"""Which engine a command runs on, and how T5X's own programs are started.

Nothing here imports T5X but `check`, which asks it what a gin file's names mean before a program of
T5X is started.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import NoReturn

from variator_jax import gin_utils
from variator_jax.errors import ConfigError, did_you_mean

BUILTIN, T5X = "builtin", "t5x"
VARIABLE = "VARIATOR_ENGINE"
HOW = "docs/t5x.md says how T5X is installed"

# T5X's programs, by the modules whose functions gin configures.
PROGRAMS = {
    "train": "t5x.train",
    "eval": "t5x.eval",
    "infer": "t5x.infer",
    "export": "t5x.export",
    "precompile": "t5x.precompile",
}
_SERVING = "tensorflow-serving-api"  # the package of what t5x.export imports


@dataclasses.dataclass(frozen=True)
class Engine:
    """An engine, and why it was taken."""

    name: str
    why: str

    def search_paths(self, command: str) -> list[str]:
        """Where its part of a configuration lies: `engine.gin` and what that includes."""
        folder = gin_utils.configs_dir() / "engines" / self.name
        if self.name == BUILTIN:
            return [str(folder)]
        return [str(folder / command), str(folder), str(_t5x_root())]


def choose(asked: str | None) -> Engine:
    """T5X where it can be imported, the built-in engine otherwise, or the one that is asked for.

    Args:
      asked: the engine's name; None for what the environment variable VARIATOR_ENGINE says, if
        anything.

    Raises:
      ConfigError: for an unknown engine, or for T5X where there is none.
    """
    asked = asked or os.environ.get(VARIABLE) or None
    if asked not in (None, BUILTIN, T5X):
        near = did_you_mean(asked, (BUILTIN, T5X))
        raise ConfigError(f"--engine={asked}: the engines are {BUILTIN} and {T5X}.{near}")
    found = _t5x_root()
    if asked == BUILTIN:
        return Engine(BUILTIN, "asked for")
    if found is not None:
        return Engine(T5X, f"t5x is importable, from {found}")
    if asked == T5X:
        raise ConfigError(f"--engine=t5x, but t5x cannot be imported; {HOW}.")
    return Engine(BUILTIN, f"t5x is not importable; {HOW}")


# Macros that only the other engine has, and what to set instead.
_FOREIGN = {
    BUILTIN: {
        "NUM_PARTITIONS": "give MESH_SHAPE = (data, fsdp, model)",
        "MODEL_PARALLEL_SUBMESH": "give MESH_SHAPE = (data, fsdp, model)",
        "EVAL_OUTPUT_DIR": "give MODEL_DIR, where the report goes",
        "DECODE_FN": "it decodes greedily",
        "INFER_EVAL_DATASET": "it evaluates by variator eval",
        "USE_CACHED_TASKS": "it has no cached tasks",
    },
    T5X: {
        "REMAT": "T5X's t5 network keeps all activations; use NUM_MICROBATCHES",
        "DATA_SHARDS": "T5X cuts the data by the number of hosts",
        "LATENCY_SHAPES": "it measures no latency; use variator bench, or --engine=builtin",
    },
}


def refuse_foreign(engine: str, command: str, bindings: Sequence[str]) -> None:
    """Refuses overrides of macros that only the other engine, or another command, reads.

    Raises:
      ConfigError: with what to set instead.
    """
    names = [binding.partition("=")[0].strip() for binding in bindings]
    for name in names:
        if name in _FOREIGN[engine]:
            other = T5X if engine == BUILTIN else BUILTIN
            raise ConfigError(
                f"--gin.{name} is for the engine {other}; on the engine {engine}: "
                f"{_FOREIGN[engine][name]}."
            )
    if "PLUGIN_PATH" in names and command in ("train", "eval") and engine == BUILTIN:
        instead = "INITIAL_PLUGIN_PATH" if command == "train" else "PLUGIN_PATHS, a tuple"
        raise ConfigError(f"--gin.PLUGIN_PATH is for infer; {command} takes {instead}.")


def check(
    command: str,
    gin_files: Sequence[str],
    bindings: Sequence[str],
    search_paths: Sequence[str],
    require: bool = True,
    rehearse: bool = True,
) -> list[tuple[str, str]]:
    """Parses a configuration as T5X's program will, so that slips are told in one line.

    Args:
      command: one of `PROGRAMS`.
      gin_files: as for `gin_utils.parse`, which says what is raised.
      bindings: the overrides.
      search_paths: all of them.
      require: whether required macros must be set.
      rehearse: whether to look at folders and files, too.

    Returns:
      The overrides, as names and gin literals.

    Raises:
      ConfigError: if T5X, or what it needs, cannot be imported.
      VariatorError: for anything else that shows before T5X starts.
    """
    with _as_main(PROGRAMS[command]):
        overrides = gin_utils.parse(gin_files, bindings, search_paths, require)
        if require and rehearse:
            _rehearse(command)
        return overrides


def _rehearse(command: str) -> None:
    """Builds what raises an error of ours, while it can still be told in one line."""
    import jax

    from variator_jax import t5x_engine
    from variator_jax.t5x_engine import preflight

    # The accelerator is for T5X's program, which may be another process's for a while.
    jax.config.update("jax_platforms", "cpu")
    if command != "precompile":
        gin_utils.configured(t5x_engine.restore_config)(check_owner=False)
    gin_utils.configured(preflight.preflight)()  # the last, for it leaves a note with results


def command_line(
    command: str,
    gin_files: Sequence[str],
    overrides: Sequence[tuple[str, str]],
    search_paths: Sequence[str],
    rest: Sequence[str] = (),
) -> list[str]:
    """The call of T5X's own program that a command comes to."""
    folders = [os.getcwd(), *search_paths, str(gin_utils.configs_dir())]
    return [
        sys.executable,
        "-m",
        "t5x.main" if command == "precompile" else PROGRAMS[command],
        *(f"--gin_file={gin_utils.find_config(name, search_paths)}" for name in gin_files),
        f"--gin_search_paths={','.join(folders)}",
        *(f"--gin.{name}={value}" for name, value in overrides),
        # Of T5X's programs this one only runs through T5X's common entrance.
        *(["--run_mode=precompile"] if command == "precompile" else []),
        *rest,
    ]


def run_program(arguments: Sequence[str]) -> NoReturn:
    """Becomes T5X's program: its signals and its exit code are this process's own."""
    sys.stdout.flush()
    sys.stderr.flush()
    # `python -m` puts the current folder first, where a console command has its own.
    paths = [path for path in sys.path if path and path != os.path.dirname(sys.argv[0])]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(paths))
    os.execve(arguments[0], list(arguments), environment)


@contextlib.contextmanager
def _as_main(module: str) -> Iterator[None]:
    """Lets `import __main__` in a gin file mean T5X's program, as it will when that runs."""
    own = sys.modules["__main__"]
    try:
        sys.modules["__main__"] = importlib.import_module(module)
        yield
    except ImportError as error:
        package = _SERVING if "tensorflow_serving" in str(error) else error.name
        raise ConfigError(
            f"{module} cannot be imported: {error}. It needs the package {package!r}; {HOW}. Where "
            f"the built-in engine has the command, too, --engine={BUILTIN} does without T5X."
        ) from error
    finally:
        sys.modules["__main__"] = own


def _t5x_root() -> pathlib.Path | None:
    """The folder that holds the package t5x; a folder that is only called so does not count.

    Nothing is imported: a T5X whose dependencies are missing is there, and `check` says what it
    lacks.
    """
    found = importlib.util.find_spec("t5x")
    if found is None or not found.origin:
        return None
    package = pathlib.Path(found.origin).parent
    return package.parent if (package / "train.py").is_file() else None
