"""What an experiment compares, and what must be run for it.

An `Arm` is given by the macros that it changes in a recipe's gin files and by how it is scored. An
`Experiment` is a grid of cells, each one score of one arm; `plan` lists the runs of training and
the scorings that fill it, each a `Step` with the file that it ends in.
"""

import dataclasses
import itertools
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from variator_jax import gin_utils
from variator_jax.errors import ConfigError, check_known, check_whole
from variator_jax.files import local_path

TEACHER = "backbone"
METHOD = "variator"
MEAN = "mean"  # the task that stands for all of several tasks


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
      plugin: macros of its plugin, in pre-training, adaptation and scoring.
      ratios, seeds: its own; None for the experiment's.
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
    ratios: tuple[int, ...] | None = None
    seeds: Sequence[int] | None = None


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


@dataclasses.dataclass(frozen=True)
class Cell:
    """One number of the table: a score of one arm. `ratio` is 1 where nothing is compressed."""

    backbone: str
    task: str
    arm: Arm
    ratio: int
    seed: int

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
      plugins: name -> macros of a plugin and its training, which make one arm more each, such as
        {'span_x8': {'SITES': ('span all',), 'RATIO': 8, 'ADAPTER_RANK': 16}}. It is adapted without
        pre-training, or from an 'INITIAL_PLUGIN_PATH'; with 'ARM' it is another of `ARMS`, such as
        the student of the same FLOPs, and with 'SEEDS' it has those alone.
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
    plugins: Mapping[str, Mapping[str, object]] = dataclasses.field(default_factory=dict)
    backbone_paths: Mapping[str, str] = dataclasses.field(default_factory=dict)
    settings: Mapping[str, object] = dataclasses.field(default_factory=dict)
    latency: Sequence[int] | None = (4, 256)
    neurons: bool = True
    search_paths: Sequence[str] = ()

    def __post_init__(self) -> None:
        local_path("MODEL_DIR", self.model_dir)
        for field in ("backbones", "tasks", "ratios", "seeds", "arms", "arm_ratios"):
            values, fewest = getattr(self, field), 0 if field.startswith("arm") else 1
            if type(values) not in (tuple, list) or len(set(values)) < max(len(values), fewest):
                raise ConfigError(f"{field.upper()} is a tuple of different values: {values!r}.")
        for name in self.plugins.keys() & ARMS.keys():
            raise ConfigError(f"PLUGINS names {name!r}, which is an arm of every experiment.")
        for name, own in self.plugins.items():
            if type(seeds := own.get("SEEDS", (0,))) not in (tuple, list) or not seeds:
                raise ConfigError(
                    f"SEEDS of the plugin {name!r} is a tuple of one or more; found {seeds!r}."
                )
        for ratio in (*self.ratios, *self.arm_ratios):
            check_whole("A compression ratio", ratio, 2)
        if self.latency is not None and len(self.latency) != 2:
            raise ConfigError(f"LATENCY is (rows, tokens), as (4, 256); found {self.latency}.")
        for name in self.arms:
            check_known("ARMS names", name, ARMS)
        for own in self.plugins.values():
            if "ARM" in own:
                check_known("PLUGINS' ARM names", own["ARM"], ARMS)
        for name in self.backbone_paths:
            check_known("BACKBONE_PATHS names", name, self.backbones)

    def all_arms(self) -> list[Arm]:
        """The arms by name and those of `plugins`, the teacher first."""
        arms = [ARMS[name] for name in dict.fromkeys([TEACHER, *self.arms])]
        for name, macros in self.plugins.items():
            own: dict[str, Any] = dict(macros)
            like, seeds = ARMS[own.pop("ARM", "no_pretraining")], own.pop("SEEDS", None)
            changes = {"name": name, "ratios": (own.pop("RATIO", 4),), "seeds": seeds}
            changes["pretrained"] = like.pretrained and not (
                like.adapted and "INITIAL_PLUGIN_PATH" in own
            )
            changes["loss"] = {key: own.get(key, value) for key, value in like.loss.items()}
            changes["plugin"] = {**like.plugin, **own}
            arms.append(dataclasses.replace(like, **changes))
        return arms

    def cells(self) -> Iterator[Cell]:
        """All cells, the smallest backbone first, then the first seed; teachers before arms."""
        arms = self.all_arms()
        for backbone, seed, task in itertools.product(self.backbones, self.seeds, self.tasks):
            for arm in arms:
                ratios = arm.ratios or (self.ratios if arm.name == METHOD else self.arm_ratios)
                wanted = arm.seeds is None or seed in arm.seeds
                for ratio in (ratios if arm.compressed else (1,)) if wanted else ():
                    yield Cell(backbone, task, arm, ratio, seed)

    def cell_file(self, cell: Cell) -> Path:
        """Where a cell's score is; its presence means that the cell is finished."""
        name = f"{cell.backbone}.{cell.task}.{cell.arm.name}.k{cell.ratio}.s{cell.seed}.json"
        return Path(self.model_dir) / "cells" / name

    def backbone_folder(self, backbone: str) -> Path:
        """The run folder, or given folder, of the backbone before fine-tuning."""
        given = self.backbone_paths.get(backbone)
        return Path(given) if given else Path(self.model_dir) / backbone / "pretrained"

    def teacher_seed(self, cell: Cell) -> int:
        """The seed that a cell's teacher was fine-tuned with."""
        return self.seeds[0] if self.one_teacher else cell.seed

    def teacher_folder(self, cell: Cell) -> Path:
        """The run folder of the fine-tuned backbone of a cell."""
        return self._task_folder(cell, self.teacher_seed(cell)) / "teacher"

    def pretrained_folder(self, cell: Cell) -> Path:
        """The run folder of a cell's plugin pre-training, which tasks and losses share."""
        kind = cell.arm.name if cell.arm.plugin else METHOD
        folder = Path(self.model_dir) / cell.backbone / "plugins"
        return folder / f"{kind}_k{cell.ratio}_seed_{cell.seed}"

    def adapted_folder(self, cell: Cell) -> Path:
        """The run folder of what a cell's arm trains on the task."""
        return self._task_folder(cell, cell.seed) / f"{cell.arm.name}_k{cell.ratio}"

    def _task_folder(self, cell: Cell, seed: int) -> Path:
        return Path(self.model_dir) / cell.backbone / cell.task / f"seed_{seed}"


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
    def begun(self) -> bool:
        """Whether something was made that a further run continues from."""
        return self.done or any(self.result.parents[1].glob("checkpoints/*"))

    @property
    def config(self) -> str:
        """The name of its configuration, which all steps with the same gin files share."""
        return " + ".join(self.files)


def plan(experiment: Experiment) -> list[Step]:
    """Every step of an experiment, each once, in an order that can be run."""
    steps: dict[Path, Step] = {}
    for cell in experiment.cells():
        for step in (*_training(experiment, cell), scoring(experiment, cell)):
            steps.setdefault(step.result, step)
    return list(steps.values())


def scoring(experiment: Experiment, cell: Cell) -> Step:
    """The step that scores a cell."""
    files, settings = _files(experiment, cell, "score"), {**experiment.settings, **cell.arm.plugin}
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


def _training(experiment: Experiment, cell: Cell) -> Iterator[Step]:
    """The runs of training that one cell needs, in order."""
    arm, ratio = cell.arm, {"RATIO": cell.ratio}
    general = experiment.backbone_folder(cell.backbone)
    teacher, adapted = experiment.teacher_folder(cell), experiment.adapted_folder(cell)
    plugin = experiment.pretrained_folder(cell) if arm.pretrained else None

    def run(kind: str, folder: Path, start: Path | None, **macros: object) -> Step:
        settings = {**experiment.settings, "MODEL_DIR": str(folder), "SEED": cell.seed, **macros}
        if start is not None:
            settings["INITIAL_CHECKPOINT_PATH"] = str(start)
        part = "plugin" if kind in ("pretrain", "adapt") else "backbone"
        name = f"{kind} {folder.relative_to(experiment.model_dir)}"
        result = folder / part / f"{part}.json"
        return Step(kind, name, _files(experiment, cell, kind), settings, result)

    if cell.backbone not in experiment.backbone_paths:
        yield run("backbone", general, None, SEED=0)
    yield run("finetune", teacher, general, SEED=experiment.teacher_seed(cell))
    if plugin:
        yield run("pretrain", plugin, general, **ratio, **arm.plugin)
    if arm.scored == "student":
        yield run("student", adapted, teacher, **ratio, **arm.plugin)
    elif arm.adapted:
        start = {"INITIAL_PLUGIN_PATH": str(plugin) if plugin else None}
        yield run("adapt", adapted, teacher, **(ratio | start | {**arm.plugin, **arm.loss}))


def _files(experiment: Experiment, cell: Cell, kind: str) -> tuple[str, ...]:
    files = (f"backbones/{cell.backbone}.gin", f"{experiment.recipe}/{kind}.gin")
    if kind in ("backbone", "pretrain"):
        return files
    return (*files, f"{experiment.recipe}/{cell.task}.gin")
