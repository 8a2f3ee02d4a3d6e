"""The settings of a run, as gin fills them in. seqio is imported when a batch is asked for."""

import dataclasses
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import optax

from variator_jax.backbones.lora import LoraConfig
from variator_jax.backbones.t5 import T5Config
from variator_jax.errors import ConfigError, check_whole
from variator_jax.plugin import PluginConfig
from variator_jax.train.loop import HostBatch, Schedule
from variator_jax.train.losses import LossConfig


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which examples a run sees.

    Attributes:
      task: name of a seqio task or mixture.
      feature_lengths: tokens of `inputs` and `targets`; longer ones are cut, which is counted.
      batch_size: examples a step.
      eval_batches: batches of the validation split in one evaluation, 0 for none.
      seed: of the order of the examples.
      packed: put several short examples into a row.
      pack_multiple: a packed example starts on a multiple of this many tokens; itself a multiple
        of every site's ratio, so that no merge group spans two examples.
      data_shards: into how many streams the data are cut, each read only by the
        processes that hold its rows. The examples of a step depend on this number, and never on
        how many processes there are: it is a multiple of every number of processes to come.
    """

    task: str
    feature_lengths: Mapping[str, int]
    batch_size: int
    eval_batches: int = 8
    seed: int = 0
    packed: bool = False
    pack_multiple: int = 1
    data_shards: int = 1

    def __post_init__(self) -> None:
        check_whole("BATCH_SIZE", self.batch_size)
        check_divides("DATA_SHARDS", self.data_shards, self.batch_size)
        check_whole("PACK_MULTIPLE", self.pack_multiple)
        check_whole("EVAL_BATCHES", self.eval_batches, 0)

    def train(self, start: int, rows: Collection[int] | None = None) -> Iterator[HostBatch]:
        """The endless training batches from batch `start` on; the same ones in every run.

        Args:
          start: how many batches come before.
          rows: those of a batch that are wanted, others may be zeros; None for all.
        """
        share = self.batch_size // self.data_shards
        wanted = range(self.batch_size) if rows is None else rows
        read = sorted({row // share for row in wanted})
        streams = {"streams": self.data_shards, "read_streams": read}
        return self._batches("train", start_batch=start, seed=self.seed, **streams)

    def validation(self) -> list[HostBatch]:
        """The same `eval_batches` batches of the validation split each time, tasks mixed."""
        return list(itertools.islice(self._batches("validation", seed=0), self.eval_batches))

    def _batches(self, split: str, **kwargs: Any) -> Iterator[HostBatch]:
        from variator_jax.data.batches import batches

        kwargs |= {"packed": self.packed, "pad_inputs_to_multiple": self.pack_multiple}
        return batches(self.task, split, self.batch_size, self.feature_lengths, **kwargs)

    def describe(self) -> list[str]:
        """How labels are read and how many texts of the first examples are cut, a line each.

        Raises:
          DataError: for an unknown task, or lengths that leave no room for a label.
        """
        from variator_jax.data import cuts

        splits = ["train", *["validation"] * bool(self.eval_batches)]
        lines = (cuts.describe_data(self.task, split, self.feature_lengths) for split in splits)
        return list(dict.fromkeys(itertools.chain.from_iterable(lines)))

    def vocabulary(self) -> Any:
        """The seqio vocabulary of the task's inputs."""
        from variator_jax.data.batches import task_or_mixture

        return task_or_mixture(self.task).output_features["inputs"].vocabulary


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """What a run trains, on what, and how long.

    Attributes:
      model_dir: the run folder.
      data: which examples.
      schedule: how long, and when to log, evaluate and save.
      optimizer: an optax transformation.
      backbone: the shape of the backbone.
      trained: 'plugin', or 'backbone' for the whole backbone on the task's own loss, or 'lora' for
        a LoRA of a frozen one, or 'student' for a backbone with narrower encoder FFNs that is
        distilled from this one.
      plugin: the plugin's settings; for a student, those of the plugin whose FLOPs it has.
      loss: the distillation losses' weights; for a plugin or a student.
      initial_checkpoint_path: a backbone folder, or a run folder that holds one. Only a backbone
        that is trained may start without, from random weights.
      initial_plugin_path: a plugin folder or a run folder to adapt; None for a fresh plugin.
      lora: the LoRA's settings; for `trained='lora'`.
      initial_lora_path: a LoRA folder or a run folder, merged into the backbone of a plugin run.
      num_microbatches: passes that a batch is cut into.
      keep_checkpoints: training checkpoints to keep.
      seed: of initialisation and dropout.
      mesh_shape: `(data, fsdp, model)` devices; None chooses.
      backbone_dtype: what the backbone of a plugin or a LoRA is kept in; None for what it is
        stored in.
      remat: what a layer keeps for the backward pass; see `T5Config.remat`.
    """

    model_dir: str
    data: DataConfig
    schedule: Schedule
    optimizer: optax.GradientTransformation
    backbone: T5Config
    trained: str = "plugin"
    plugin: PluginConfig | None = None
    loss: LossConfig = LossConfig()
    initial_checkpoint_path: str | None = None
    initial_plugin_path: str | None = None
    lora: LoraConfig = LoraConfig()
    initial_lora_path: str | None = None
    num_microbatches: int = 1
    keep_checkpoints: int = 2
    seed: int = 0
    mesh_shape: Sequence[int] | None = None
    backbone_dtype: str | None = None
    remat: bool | str = False

    def __post_init__(self) -> None:
        check_divides("NUM_MICROBATCHES", self.num_microbatches, self.data.batch_size)
        check_whole("SEED", self.seed, 0)
        if self.seed >= 1 << 32:  # JAX's keys would take its lower bits
            raise ConfigError(f"SEED is {self.seed}; expected one below {1 << 32:,}.")
        if self.keep_checkpoints is not None:
            check_whole("KEEP_CHECKPOINTS", self.keep_checkpoints)
        if self.trained in ("plugin", "lora") and self.backbone_dtype == "float16":
            raise ConfigError(
                "BACKBONE_DTYPE is 'float16', whose rounding makes another backbone of the stored "
                "one, to which the result would not belong; set it to 'bfloat16' or None."
            )
        if self.initial_lora_path is not None and self.trained != "plugin":
            raise ConfigError(
                f"INITIAL_LORA_PATH is for a plugin run; TRAINED is {self.trained!r}. Save the "
                "merged backbone with save_backbone, and set INITIAL_CHECKPOINT_PATH to it."
            )

    def identity(self) -> dict[str, Any]:
        """What decides the weights after each step, beside what is trained: names and values.

        The settings of an optimizer that `optimizers.optimizer` has not made are not known.
        """
        from variator_jax.data.batches import digest, task_or_mixture, task_rates
        from variator_jax.data.vocabulary import fingerprint

        kept = dataclasses.asdict(self.data) | getattr(self.optimizer, "settings", {})
        del kept["eval_batches"]
        kept["VOCABULARY"] = fingerprint(self.data.vocabulary())
        kept["DATA"] = digest(self.data.task, "train")
        kept["RATES"] = task_rates(task_or_mixture(self.data.task), "train")
        kept |= {"INIT_SEED": self.seed, "BACKBONE_DTYPE": self.backbone_dtype}
        kept |= {name.upper(): getattr(self.backbone, name) for name in ("dtype", "dropout_rate")}
        losses = {} if self.trained in ("backbone", "lora") else dataclasses.asdict(self.loss)
        return kept | {f"{name}_loss".upper(): value for name, value in losses.items()}

    @property
    def shape(self) -> T5Config:
        """The backbone's shape with the run's `remat`."""
        return dataclasses.replace(self.backbone, remat=self.remat)


def check_divides(name: str, value: int, batch_size: int) -> None:
    """Refuses a number that does not divide the batch.

    Raises:
      ConfigError: with both.
    """
    check_whole(name, value)
    if batch_size % value:
        raise ConfigError(f"{name} is {value!r}; it must divide BATCH_SIZE, {batch_size}.")
