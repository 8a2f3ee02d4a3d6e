"""What a recipe's gin files say, stage by stage: looked at before anything runs.

A slip in any of them is told at once, and not after hours; and a folder remembers what its numbers
were made with, so that a recipe does not change behind them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from variator_jax.errors import ConfigError
from variator_jax.experiment.grid import Cell, Experiment
from variator_jax.experiment.stages import gin_arguments, plan

# What stages and cells were made with: their files -> macro -> value, as text.
Configs = dict[str, dict[str, str]]
# These differ from stage to stage, or change no number.
_OWN = ("MODEL_DIR", "SEED", "RATIO", "INITIAL_CHECKPOINT_PATH", "INITIAL_PLUGIN_PATH")
_FREE = ("LOG_PERIOD", "CHECKPOINT_PERIOD", "KEEP_CHECKPOINTS", "EVAL_PERIOD", "MESH_SHAPE")


def recipe_configs(experiment: Experiment) -> Configs:
    """Parses what every stage and cell will be given, and returns what its files come to.

    Raises:
      ConfigError: for whatever `variator train` would refuse, with the files' names before it.
    """
    found: Configs = {}
    seen = set()
    for step in plan(experiment):
        if isinstance(step, Cell):
            command, arguments = "eval", gin_arguments(experiment, step, "score")
        else:
            command, arguments = "train", step.command
        files, bindings = _split(arguments)
        kind = (tuple(files), *(b for b in bindings if b.partition("=")[0] not in _OWN))
        if kind in seen:
            continue
        seen.add(kind)
        name = " + ".join(files)
        try:
            macros = _macros(experiment, files, bindings, command)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from None
        found.setdefault(name, macros)
    return found


def changed(before: Mapping[str, Mapping[str, str]], now: Configs) -> str | None:
    """The first macro that both know and that differs, in a sentence; None if there is none."""
    for name in before.keys() & now.keys():
        for macro in sorted(before[name].keys() & now[name].keys()):
            if before[name][macro] != now[name][macro]:
                return (
                    f"{name} says {macro} = {now[name][macro]}, where what is there was made with "
                    f"{before[name][macro]}"
                )
    return None


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Gin files and overrides out of a command's arguments."""
    files = [a.partition("=")[2] for a in arguments if a.startswith("--gin_file=")]
    return files, [a.removeprefix("--gin.") for a in arguments if a.startswith("--gin.")]


def _macros(
    experiment: Experiment, files: Sequence[str], bindings: Sequence[str], command: str
) -> dict[str, str]:
    """Macro -> value; of a stage that is trained, all that is required must be there."""
    from variator_jax import engines, gin_utils

    folders = [*experiment.search_paths, *engines.choose(engines.BUILTIN).search_paths(command)]
    gin_utils.parse(files, bindings, folders, require=command == "train")
    names = re.findall(r"^([A-Z][A-Z0-9_]*) = ", gin_utils.resolved_config(), re.MULTILINE)
    kept = [name for name in names if name not in (*_OWN, *_FREE)]
    return {name: str(gin_utils.macro(name)) for name in kept}
