"""What must be run for a cell: runs of training and the scoring, each with the file it ends in."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path

from variator_jax import gin_utils
from variator_jax.experiment.grid import Cell, Experiment


@dataclasses.dataclass(frozen=True)
class Step:
    """A run of training, or the scoring of a cell.

    Attributes:
      kind: 'backbone', 'finetune', 'pretrain', 'adapt', 'student' or 'score': the recipe's file.
      name: for people.
      files: the gin files that configure it.
      macros: macro -> value, set on top of the files.
      result: the file whose presence means that the step is done.
      cell: the cell that is scored; None for training.
    """

    kind: str
    name: str
    files: tuple[str, ...]
    macros: Mapping[str, object]
    result: Path
    cell: Cell | None = None

    @property
    def done(self) -> bool:
        """Whether it need not be run."""
        return self.result.is_file()

    @property
    def config(self) -> str:
        """The name of its configuration, which all steps with the same gin files share."""
        return " + ".join(self.files)


def plan(experiment: Experiment) -> list[Step]:
    """Every step of an experiment, each once, in an order that can be run."""
    steps: dict[Path, Step] = {}
    for cell in experiment.cells():
        for step in (*_training_steps(experiment, cell), scoring(experiment, cell)):
            steps.setdefault(step.result, step)
    return list(steps.values())


def scoring(experiment: Experiment, cell: Cell) -> Step:
    """The step that scores a cell."""
    files, settings = _files(experiment, cell, "score"), experiment.settings
    return Step("score", f"score {cell}", files, settings, experiment.cell_file(cell), cell)


def configure(experiment: Experiment, step: Step) -> None:
    """Parses a step's gin files and macros, for `gin_utils.configured`.

    Raises:
      ConfigError: as `gin_utils.parse`; what scoring does not read may be unset.
    """
    bindings = [f"{name}={value!r}" for name, value in step.macros.items()]
    folders = [*experiment.search_paths, gin_utils.engine_dir()]
    gin_utils.parse(step.files, bindings, folders, require=step.kind != "score")


def run_training(experiment: Experiment, step: Step) -> None:
    """Trains on the built-in engine, or continues a run that was cut off.

    Raises:
      SystemExit: if a signal stopped the run, which has saved a checkpoint.
    """
    from variator_jax.train import train

    configure(experiment, step)
    if gin_utils.configured(train.train)().interrupted:
        raise SystemExit(128 + signal.SIGTERM)  # as if the signal had ended it, for scripts


def _training_steps(experiment: Experiment, cell: Cell) -> Iterator[Step]:
    """The runs that one cell needs, in order."""
    arm, ratio = cell.arm, cell.ratio
    general = experiment.backbone_folder(cell.backbone)
    teacher = experiment.teacher_folder(cell)
    pretrained = experiment.pretrained_folder(cell)
    adapted = experiment.adapted_folder(cell)
    start = {"INITIAL_CHECKPOINT_PATH": str(general)}
    if cell.backbone not in experiment.backbone_paths:
        yield _training(experiment, cell, "backbone", general, {"SEED": 0})
    seed = {"SEED": experiment.teacher_seed(cell)}
    yield _training(experiment, cell, "finetune", teacher, {**start, **seed})
    if arm.pretrained:
        settings = {**start, "RATIO": ratio, **arm.plugin}
        yield _training(experiment, cell, "pretrain", pretrained, settings)
    if arm.adapted:
        settings = {"INITIAL_CHECKPOINT_PATH": str(teacher), "RATIO": ratio}
        if arm.scored == "student":
            yield _training(experiment, cell, "student", adapted, settings)
            return
        plugin = str(pretrained) if arm.pretrained else None
        settings |= {"INITIAL_PLUGIN_PATH": plugin, **arm.plugin, **arm.loss}
        yield _training(experiment, cell, "adapt", adapted, settings)


def _training(
    experiment: Experiment, cell: Cell, kind: str, folder: Path, macros: Mapping[str, object]
) -> Step:
    run = {"MODEL_DIR": str(folder), "SEED": cell.seed}
    part = "plugin" if kind in ("pretrain", "adapt") else "backbone"
    return Step(
        kind,
        f"{kind} {folder.relative_to(experiment.model_dir)}",
        _files(experiment, cell, kind),
        {**experiment.settings, **run, **macros},
        folder / part / f"{part}.json",
    )


def _files(experiment: Experiment, cell: Cell, kind: str) -> tuple[str, ...]:
    files = (f"backbones/{cell.backbone}.gin", f"{experiment.recipe}/{kind}.gin")
    if kind in ("backbone", "pretrain"):
        return files
    return (*files, f"{experiment.recipe}/{cell.task}.gin")
