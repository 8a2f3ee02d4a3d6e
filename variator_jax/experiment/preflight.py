"""Checks before an experiment runs: its gin files, and what its folder was made with so far."""

from __future__ import annotations

import json
import re
from pathlib import Path

from variator_jax import gin_utils
from variator_jax.errors import ConfigError, VariatorError
from variator_jax.experiment.grid import Experiment
from variator_jax.experiment.stages import Step, configure, plan
from variator_jax.files import write_json

# The configuration of steps: `Step.config` -> macro -> value, as text.
Configs = dict[str, dict[str, str]]
# Macros that differ from run to run.
_PER_RUN = {"MODEL_DIR", "SEED", "RATIO", "INITIAL_CHECKPOINT_PATH", "INITIAL_PLUGIN_PATH"}
_PER_RUN |= {"CHECKPOINT_PATH"}  # of inference; by default the initial one
# Macros that may change, for they change no number.
_FREE = {"LOG_PERIOD", "CHECKPOINT_PERIOD", "KEEP_CHECKPOINTS", "EVAL_PERIOD", "MESH_SHAPE"}


def preflight(experiment: Experiment, data: bool = False) -> Configs:
    """Parses the configuration of every step, so that an error shows before anything runs.

    Args:
      experiment: the grid.
      data: whether to look for the data, too, which may train a vocabulary.

    Returns:
      What each configuration sets of what it reads.

    Raises:
      ConfigError: what the first step of a run would raise, after the names of its files.
    """
    configs: Configs = {}
    checked = []
    for step in plan(experiment):
        shared = {name: step.macros[name] for name in step.macros.keys() - _PER_RUN}
        if (step.files, shared) in checked:
            continue
        checked.append((step.files, shared))
        try:
            configure(experiment, step)
            if step.cell is None:
                _check_training(data)
        except VariatorError as error:
            reason = str(error).partition("\n  In call to configurable")[0]  # gin's addition
            hint = " (of an experiment: in SETTINGS)" if "required, but not set" in reason else ""
            raise ConfigError(f"{step.config}: {reason}{hint}") from None
        # What an arm sets is part of the arm, not of the recipe.
        settings = experiment.settings
        arm = {name for name, value in step.macros.items() if value != settings.get(name)}
        names = sorted(_macros_in_use(gin_utils.resolved_config()) - _PER_RUN - _FREE - arm)
        macros = {name: str(gin_utils.macro(name)) for name in names}
        configs[step.config] = configs.get(step.config, {}) | macros
    return configs


def _check_training(data: bool) -> None:
    """Makes what the parsed configuration trains with, as far as that costs little."""
    from variator_jax.train import loop, optimizers, settings

    gin_utils.configured(optimizers.optimizer)()
    gin_utils.configured(loop.Schedule)()
    if data:
        gin_utils.configured(settings.DataConfig)()


def _macros_in_use(config: str) -> set[str]:
    """The macros that a configuration reads, but for those that only unread macros read."""
    statements = [part.partition(" = ") for part in re.split(r"\n(?=[\w./]+ = )", f"\n{config}")]
    reads = {name: set(re.findall(r"%([A-Z]\w*)", value)) for name, _, value in statements}
    is_macro = re.compile(r"[A-Z][A-Z0-9_]*").fullmatch
    in_use: set[str] = set()
    new = set().union(*(names for name, names in reads.items() if not is_macro(name)))
    while new:
        in_use |= new
        new = set().union(*(reads.get(name, set()) for name in new)) - in_use
    return in_use & reads.keys()


class ExperimentLock:
    """What a folder's numbers were made with, in `experiment.json`: it must not change under them.

    A grid may grow. Only what has been made counts: a setting that was corrected before anything
    was made with it is no change.

    Raises:
      ConfigError: if the folder was made with another recipe, other backbones or other macros.
    """

    def __init__(self, experiment: Experiment, configs: Configs) -> None:
        self._experiment, self._current = experiment, configs
        self._file = Path(experiment.model_dir) / "experiment.json"
        kept = json.loads(self._file.read_text(encoding="utf-8")) if self._file.is_file() else {}
        self._made: Configs = kept.get("configs", {})
        self._fixed = {
            "recipe": experiment.recipe,
            "backbone_paths": dict(experiment.backbone_paths),
            "teacher_seed": experiment.seeds[0] if experiment.one_teacher else None,
        }
        self._first = False  # whether the step in progress is the first of its configuration
        if self._made:
            self._refuse_changes("", self._fixed, kept)
        for name in self._made.keys() & configs.keys():
            self._refuse_changes(f"{name}: ", configs[name], self._made[name])

    def begin(self, step: Step) -> None:
        """Records a step's configuration, before the step runs: it may be killed."""
        self._first = step.config not in self._made
        if self._first:
            self._write(self._made | {step.config: self._current.get(step.config, {})})

    def withdraw(self, step: Step) -> None:
        """Forgets the step just begun, which failed, if nothing was made with its configuration."""
        if self._first and not any(step.result.parents[1].glob("checkpoints/*")):
            self._write({name: self._made[name] for name in self._made if name != step.config})

    def _refuse_changes(self, place: str, current: dict, made: dict) -> None:
        for name in sorted(current.keys() & made.keys()):
            if current[name] != made[name]:
                folder, first = self._experiment.model_dir, self._experiment.backbones[0]
                raise ConfigError(
                    f"{place}{name} is {current[name]!r}; what is in {folder} was made with "
                    f"{made[name]!r}. Choose another MODEL_DIR; its BACKBONE_PATHS may name a "
                    f"backbone of this one, such as {folder}/{first}/pretrained."
                )

    def _write(self, configs: Configs) -> None:
        write_json(self._file, {**self._fixed, "configs": configs})
        self._made = configs
