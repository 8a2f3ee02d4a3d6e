"""The settings of an experiment, its cells, and the folders of each; `stages` is what they run."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from variator_jax.errors import ConfigError
from variator_jax.experiment.arms import METHOD, Arm, arms_named


@dataclasses.dataclass(frozen=True)
class Cell:
    """One number of the table: a score of one arm. `ratio` is 1 where nothing is compressed."""

    backbone: str
    task: str
    arm: Arm
    ratio: int
    seed: int

    @property
    def name(self) -> str:
        """Unique in its experiment, and a file name."""
        return f"{self.backbone}.{self.task}.{self.arm.name}.k{self.ratio}.s{self.seed}"

    def __str__(self) -> str:
        ratio = f" k={self.ratio}" if self.arm.compressed else ""
        return f"{self.backbone} {self.task} {self.arm.name}{ratio} seed {self.seed}"


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A grid of backbones, tasks, arms, ratios and seeds.

    Attributes:
      model_dir: where everything is kept: runs, cells, tables and plots.
      recipe: folder of the gin files that train and score: backbone.gin, finetune.gin,
        pretrain.gin, adapt.gin, student.gin, score.gin, and one file for each task.
      backbones: names of packaged shapes, as in gin_configs/backbones, in rising order of size.
      tasks: names of the recipe's task files.
      ratios: compression ratios of the method.
      seeds: each pre-trains and adapts plugins of its own, beside a teacher of its own.
      one_teacher: whether all seeds share the first one's teacher, which spares the fine-tuning;
        standard deviations are then those of the plugins' training alone.
      arms: what is compared beside the teacher; see `arms.ARMS`.
      arm_ratios: the ratios of all arms but the method itself.
      backbone_paths: backbone -> a folder to start from, in place of training one.
      settings: macros for every stage, such as where data lie.
      latency: (rows, tokens) of the encoder passes that are timed for each backbone, or None.
      neurons: whether activated neurons are counted, on each backbone's first task and seed.
      search_paths: folders where gin files are looked for before the packaged ones.
    """

    model_dir: str
    recipe: str
    backbones: Sequence[str]
    tasks: Sequence[str]
    ratios: Sequence[int] = (2, 4, 8)
    seeds: Sequence[int] = (0, 1, 2)
    one_teacher: bool = False
    arms: Sequence[str] = (METHOD,)
    arm_ratios: Sequence[int] = (4,)
    backbone_paths: Mapping[str, str] = dataclasses.field(default_factory=dict)
    settings: Mapping[str, object] = dataclasses.field(default_factory=dict)
    latency: Sequence[int] | None = (4, 256)
    neurons: bool = True
    search_paths: Sequence[str] = ()

    def __post_init__(self) -> None:
        for field in ("backbones", "tasks", "ratios", "seeds", "arms", "arm_ratios"):
            values = getattr(self, field)
            if isinstance(values, str) or not isinstance(values, Sequence):
                raise ConfigError(f"{field.upper()} is a tuple, such as (2, 4); found {values!r}.")
            if len(set(values)) < len(values):
                raise ConfigError(f"{field.upper()} names something twice: {values!r}.")
            if not (values or field.startswith("arm")):
                raise ConfigError(f"{field.upper()} is empty; an experiment needs one at least.")
        wrong = [r for r in (*self.ratios, *self.arm_ratios) if not isinstance(r, int) or r < 2]
        if wrong:
            raise ConfigError(f"Compression ratios are whole numbers from 2; found {wrong}.")
        for name in (*self.backbones, *self.tasks):
            if not re.fullmatch(r"\w+", name):
                raise ConfigError(f"{name!r} is not the name of a gin file: letters, digits and _.")
        if self.latency is not None and len(self.latency) != 2:
            raise ConfigError(f"LATENCY is (rows, tokens), as (4, 256); found {self.latency}.")
        arms_named(self.arms)
        unknown = [name for name in self.backbone_paths if name not in self.backbones]
        if unknown:
            raise ConfigError(f"BACKBONE_PATHS names {unknown}, which BACKBONES does not.")

    def cells(self) -> Iterator[Cell]:
        """All cells, the smallest backbone first, then the first seed; teachers before arms."""
        arms = [(arm, ratio) for arm in arms_named(self.arms) for ratio in self._ratios(arm)]
        for backbone, seed, task in itertools.product(self.backbones, self.seeds, self.tasks):
            for arm, ratio in arms:
                yield Cell(backbone, task, arm, ratio, seed)

    def _ratios(self, arm: Arm) -> Sequence[int]:
        if not arm.compressed:
            return (1,)
        return self.ratios if arm.name == METHOD else self.arm_ratios

    def cell_file(self, cell: Cell) -> Path:
        """Where a cell's score is; its presence means that the cell is finished."""
        return Path(self.model_dir) / "cells" / f"{cell.name}.json"

    def backbone_folder(self, backbone: str) -> Path:
        """The run folder, or given folder, of the backbone before fine-tuning."""
        given = self.backbone_paths.get(backbone)
        return Path(given) if given else Path(self.model_dir) / backbone / "pretrained"

    def teacher_folder(self, cell: Cell) -> Path:
        """The run folder of the fine-tuned backbone beside which a cell's arm runs."""
        seed = self.teacher_seed(cell)
        return Path(self.model_dir) / cell.backbone / cell.task / f"seed_{seed}" / "teacher"

    def teacher_seed(self, cell: Cell) -> int:
        """The seed that a cell's teacher was fine-tuned with."""
        return self.seeds[0] if self.one_teacher else cell.seed

    def pretrained_folder(self, cell: Cell) -> Path:
        """The run folder of a cell's plugin pre-training, which tasks and losses share."""
        kind = cell.arm.name if cell.arm.plugin else METHOD
        folder = Path(self.model_dir) / cell.backbone / "plugins"
        return folder / f"{kind}_k{cell.ratio}_seed_{cell.seed}"

    def adapted_folder(self, cell: Cell) -> Path:
        """The run folder of what a cell's arm trains on the task."""
        folder = Path(self.model_dir) / cell.backbone / cell.task / f"seed_{cell.seed}"
        return folder / f"{cell.arm.name}_k{cell.ratio}"
