"""What an experiment compares: its arms, its settings, its cells and the folders of each.

How an arm is trained is given by the macros that it changes in a recipe's gin files, how it is
scored by one word; `stages` is what runs for a cell.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from variator_jax.errors import ConfigError, did_you_mean

TEACHER = "backbone"
METHOD = "variator"


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to run an encoder.

    Attributes:
      name: its name in files and on the command line.
      meaning: what it is, in a line of a table.
      scored: 'plugin' (a plugin on the teacher), 'student' (a backbone of its own), 'teacher',
        'no_ffn', 'truncated', 'mean_pool' or 'similar_tokens'.
      compressed: whether it has a compression ratio.
      pretrained: whether its plugin is pre-trained.
      adapted: whether something is trained on the task.
      plugin: macros of its plugin, in pre-training and adaptation.
      loss: macros of its loss in adaptation.
    """

    name: str
    meaning: str
    scored: str = "plugin"
    compressed: bool = True
    pretrained: bool = True
    adapted: bool = True
    plugin: Mapping[str, object] = dataclasses.field(default_factory=dict)
    loss: Mapping[str, object] = dataclasses.field(default_factory=dict)


def _loss(hidden: float, logits: float, task: float) -> dict[str, object]:
    names = ("ENCODER_HIDDEN_LOSS", "DECODER_HIDDEN_LOSS", "LOGITS_LOSS", "TASK_LOSS")
    return dict(zip(names, (hidden, hidden, logits, task), strict=True))


_UNTRAINED: dict[str, Any] = {"pretrained": False, "adapted": False}
_ALL = (
    Arm(TEACHER, "uncompressed", "teacher", compressed=False, **_UNTRAINED),
    Arm(METHOD, "compression plugin"),
    Arm("no_pretraining", "without plugin pre-training", pretrained=False),
    Arm("no_adaptation", "without plugin adaptation", adapted=False),
    Arm("mean_weights", "averaging, no learned weights", plugin={"COMPRESSION": "mean"}),
    Arm("no_decompression", "without decompression", plugin={"DECOMPRESSION": "repeat"}),
    Arm("loss_hidden", "adapted on hidden states", loss=_loss(1.0, 0.0, 0.0)),
    Arm("loss_task", "adapted on the task loss", loss=_loss(0.0, 0.0, 1.0)),
    Arm("loss_both", "adapted on hidden states and task", loss=_loss(1.0, 0.0, 1.0)),
    Arm("loss_logits", "adapted on the teacher's logits", loss=_loss(0.0, 1.0, 0.0)),
    Arm("student", "smaller student, distilled", "student", pretrained=False),
    Arm("mean_pool", "mean-pooling, untrained", "mean_pool", **_UNTRAINED),
    Arm("similar_tokens", "similar tokens merged, same FLOPs", "similar_tokens", **_UNTRAINED),
    Arm("truncated", "input cut to the same FLOPs", "truncated", **_UNTRAINED),
    Arm("no_ffn", "no encoder FFN (control)", "no_ffn", compressed=False, **_UNTRAINED),
)
ARMS: dict[str, Arm] = {arm.name: arm for arm in _ALL}


def arms_named(names: Iterable[str]) -> tuple[Arm, ...]:
    """The arms of these names, the teacher first whether named or not.

    Raises:
      ConfigError: for an unknown name, with the nearest.
    """
    chosen = list(dict.fromkeys([TEACHER, *names]))
    for name in chosen:
        if name not in ARMS:
            raise ConfigError(
                f"There is no arm {name!r}.{did_you_mean(name, ARMS)} Arms: {', '.join(ARMS)}."
            )
    return tuple(ARMS[name] for name in chosen)


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
      seeds: each pre-trains and adapts plugins of its own, on a teacher of its own.
      one_teacher: whether all seeds share the first one's teacher, which spares the fine-tuning;
        standard deviations are then those of the plugins' training alone.
      arms: what is compared with the teacher; see `ARMS`.
      arm_ratios: the ratios of all arms but the method itself.
      backbone_paths: backbone -> a folder to start from, in place of training one.
      settings: macros for every stage, such as the folders of data.
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
        """The run folder of the fine-tuned backbone that a cell's arm runs on."""
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
