"""What an experiment's folder remembers of how its numbers were made, in experiment.json.

Grids may grow; what a cell means may not change behind its number. Only what has been made counts:
a setting that was mended before anything was made with it is no change.
"""

from __future__ import annotations

import json
from pathlib import Path

from variator_jax.errors import ConfigError
from variator_jax.experiment.grid import Cell, Experiment
from variator_jax.experiment.recipe import Configs, files_of
from variator_jax.experiment.stages import Stage
from variator_jax.files import write_json


class Claim:
    """The record of one experiment's folder.

    Raises:
      ConfigError: if what is there was made with another recipe, other backbones or other macros.
    """

    def __init__(self, experiment: Experiment, configs: Configs) -> None:
        self._experiment, self._now = experiment, configs
        self._file = Path(experiment.model_dir) / "experiment.json"
        kept = json.loads(self._file.read_text(encoding="utf-8")) if self._file.is_file() else {}
        self._configs: Configs = kept.get("configs", {})
        self._new = False  # whether the step that is being made is the first with its files
        self._fixed = {
            "recipe": experiment.recipe,
            "backbone_paths": dict(experiment.backbone_paths),
            "teacher_seed": experiment.seeds[0] if experiment.one_teacher else None,
        }
        if not self._configs:  # nothing has been made
            return
        for name, value in self._fixed.items():
            if kept.get(name, value) != value:
                raise self._refusal(f"{name} is {value!r}", repr(kept[name]))
        for name in self._configs.keys() & configs.keys():
            before, now = self._configs[name], configs[name]
            for macro in sorted(before.keys() & now.keys()):
                if before[macro] != now[macro]:
                    raise self._refusal(f"{name} says {macro} = {now[macro]}", before[macro])

    def begin(self, step: Stage | Cell) -> None:
        """Notes what a step is made with, before it is made: it may be killed in its midst."""
        name = files_of(self._experiment, step)
        self._new = name not in self._configs
        if self._new:
            self._write(self._configs | {name: self._now.get(name, {})})

    def withdraw(self, stage: Stage) -> None:
        """Forgets the stage just begun, which failed, if nothing was made with its files yet."""
        if self._new and not any(stage.result.parents[1].glob("checkpoints/*")):
            name = files_of(self._experiment, stage)
            self._write({key: value for key, value in self._configs.items() if key != name})

    def _refusal(self, now: str, before: str) -> ConfigError:
        folder = self._experiment.model_dir
        return ConfigError(
            f"{folder}: {now}, where what is there was made with {before}. Choose another "
            f"MODEL_DIR; BACKBONE_PATHS there may name a backbone of this one, such as {folder}/"
            f"{self._experiment.backbones[0]}/pretrained."
        )

    def _write(self, configs: Configs) -> None:
        write_json(self._file, {**self._fixed, "configs": configs})
        self._configs = configs
