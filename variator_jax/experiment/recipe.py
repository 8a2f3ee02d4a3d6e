"""What a recipe's gin files say, stage by stage: looked at before anything runs.

A slip in any of them is told at once, and not after hours; and a folder remembers what its numbers
were made with, so that a recipe does not change behind them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from variator_jax.errors import ConfigError, VariatorError
from variator_jax.experiment.grid import Cell, Experiment
from variator_jax.experiment.stages import Stage, gin_arguments, plan

# What stages and cells were made with: their files -> macro -> value, as text.
Configs = dict[str, dict[str, str]]
# These differ from stage to stage, or change no number.
_OWN = (
    "MODEL_DIR",
    "SEED",
    "RATIO",
    "INITIAL_CHECKPOINT_PATH",
    "CHECKPOINT_PATH",  # of eval: the same
    "INITIAL_PLUGIN_PATH",
)
_FREE = ("LOG_PERIOD", "CHECKPOINT_PERIOD", "KEEP_CHECKPOINTS", "EVAL_PERIOD", "MESH_SHAPE")


def recipe_configs(experiment: Experiment, data: bool = False) -> Configs:
    """Parses what every stage and cell will be given, and returns what its files come to.

    Args:
      experiment: the grid.
      data: whether to look for the data, too, which may train a vocabulary.

    Raises:
      ConfigError: what `variator train` would say before its first step, with the files' names
        before it.
    """
    found: Configs = {}
    seen = set()
    for step in plan(experiment):
        command = "eval" if isinstance(step, Cell) else "train"
        files, bindings = _split(_arguments(experiment, step))
        kind = (tuple(files), *(b for b in bindings if b.partition("=")[0] not in _OWN))
        if kind in seen:
            continue
        seen.add(kind)
        name = " + ".join(files)
        try:
            macros = _macros(experiment, files, bindings, command)
            if command == "train":
                _rehearse(data)
        except VariatorError as error:
            said = str(error).partition("\n  In call to configurable")[0]  # gin's addition
            hint = " (of an experiment: in SETTINGS)" if "required, but not set" in said else ""
            raise ConfigError(f"{name}: {said}{hint}") from None
        found.setdefault(name, macros)
    return found


def files_of(experiment: Experiment, step: Stage | Cell) -> str:
    """The gin files of a stage or cell, as one name: what `recipe_configs` calls them."""
    return " + ".join(_split(_arguments(experiment, step))[0])


def _arguments(experiment: Experiment, step: Stage | Cell) -> Sequence[str]:
    return gin_arguments(experiment, step, "score") if isinstance(step, Cell) else step.command


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Gin files and overrides out of a command's arguments."""
    files = [a.partition("=")[2] for a in arguments if a.startswith("--gin_file=")]
    return files, [a.removeprefix("--gin.") for a in arguments if a.startswith("--gin.")]


def _macros(
    experiment: Experiment, files: Sequence[str], bindings: Sequence[str], command: str
) -> dict[str, str]:
    """Macro -> value; of a stage that is trained, all that is required must be there."""
    from variator_jax import gin_utils
    from variator_jax.commands import engines

    folders = [*experiment.search_paths, *engines.choose(engines.BUILTIN).search_paths(command)]
    gin_utils.parse(files, bindings, folders, require=command == "train")
    resolved = gin_utils.resolved_config()
    kept = [name for name in _read_by_something(resolved) if name not in (*_OWN, *_FREE)]
    return {name: str(gin_utils.macro(name)) for name in kept}


def _rehearse(data: bool) -> None:
    """Makes what the parsed configuration trains with, as far as that costs little."""
    from variator_jax import gin_utils
    from variator_jax.train.loop import Schedule
    from variator_jax.train.optimizers import optimizer
    from variator_jax.train.settings import DataConfig

    gin_utils.configured(optimizer)()
    gin_utils.configured(Schedule)()
    if data:
        gin_utils.configured(DataConfig)()


def _read_by_something(resolved: str) -> list[str]:
    """The macros of a configuration that something other than an unread macro reads."""
    statements = re.split(r"\n(?=[\w./]+ = )", f"\n{resolved}")[1:]
    reads = {
        name: set(re.findall(r"%([A-Z]\w*)", value))
        for name, _, value in (statement.partition(" = ") for statement in statements)
    }
    macros = [name for name in reads if re.fullmatch(r"[A-Z][A-Z0-9_]*", name)]
    found = set().union(*(names for name, names in reads.items() if name not in macros))
    waiting = list(found)
    while waiting:
        new = reads.get(waiting.pop(), set()) - found
        found |= new
        waiting += new
    return [name for name in macros if name in found]
