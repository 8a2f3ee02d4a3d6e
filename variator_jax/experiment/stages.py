"""What must be run for a cell: commands of `variator`, each with the file that it ends in."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path

from variator_jax.experiment.arms import Arm
from variator_jax.experiment.grid import Cell, Experiment
from variator_jax.gin_utils import as_override


@dataclasses.dataclass(frozen=True)
class Stage:
    """One run of training.

    Attributes:
      kind: 'backbone', 'finetune', 'pretrain', 'adapt' or 'student', as the recipe's file.
      name: what it trains, in a few words.
      command: the arguments of `variator`.
      result: the file whose presence means that it has ended.
    """

    kind: str
    name: str
    command: tuple[str, ...]
    result: Path


def plan(experiment: Experiment) -> Iterator[Stage | Cell]:
    """Every stage and cell of an experiment, each once, in an order that can be run."""
    seen: set[Path] = set()
    for cell in experiment.cells():
        for stage in stages(experiment, cell):
            if stage.result not in seen:
                seen.add(stage.result)
                yield stage
        yield cell


def stages(experiment: Experiment, cell: Cell) -> Iterator[Stage]:
    """What one cell needs, in order."""
    arm, general = cell.arm, experiment.backbone_folder(cell.backbone)
    if cell.backbone not in experiment.backbone_paths:
        yield _stage(experiment, cell, "backbone", general, {"SEED": 0})
    teacher = experiment.teacher_folder(cell)
    beside_general: dict[str, object] = {"INITIAL_CHECKPOINT_PATH": str(general)}
    seed = {"SEED": experiment.teacher_seed(cell)}
    yield _stage(experiment, cell, "finetune", teacher, beside_general | seed)
    pretrained = experiment.pretrained_folder(cell)
    if arm.pretrained:
        settings = beside_general | {"RATIO": cell.ratio}
        yield _stage(experiment, cell, "pretrain", pretrained, settings)
    if arm.adapted:
        settings = {"INITIAL_CHECKPOINT_PATH": str(teacher), "RATIO": cell.ratio}
        if arm.scored == "plugin":
            settings["INITIAL_PLUGIN_PATH"] = str(pretrained) if arm.pretrained else None
        kind = "student" if arm.scored == "student" else "adapt"
        yield _stage(experiment, cell, kind, experiment.adapted_folder(cell), settings)


def gin_arguments(experiment: Experiment, cell: Cell, kind: str) -> tuple[str, ...]:
    """The gin files and macros that every stage of a kind is given."""
    files = [f"backbones/{cell.backbone}.gin", f"{experiment.recipe}/{kind}.gin"]
    if kind not in ("backbone", "pretrain"):
        files.append(f"{experiment.recipe}/{cell.task}.gin")
    paths = (f"--gin_search_paths={path}" for path in experiment.search_paths)
    return (*paths, *(f"--gin_file={file}" for file in files), *_macros(experiment.settings))


def _stage(
    experiment: Experiment, cell: Cell, kind: str, folder: Path, macros: Mapping[str, object]
) -> Stage:
    own = {"MODEL_DIR": str(folder), "SEED": cell.seed, **_arm_macros(cell.arm, kind), **macros}
    command = ("train", "--engine=builtin", *gin_arguments(experiment, cell, kind))
    part = "plugin" if kind in ("pretrain", "adapt") else "backbone"
    return Stage(
        kind,
        f"{kind} {folder.relative_to(experiment.model_dir)}",
        (*command, *_macros(own)),
        folder / part / f"{part}.json",
    )


def _arm_macros(arm: Arm, kind: str) -> dict[str, object]:
    if kind == "pretrain":
        return dict(arm.plugin)
    return dict(arm.plugin) | dict(arm.loss) if kind == "adapt" else {}


def _macros(macros: Mapping[str, object]) -> Iterator[str]:
    return itertools.starmap(as_override, macros.items())
