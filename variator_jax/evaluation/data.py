"""What is scored or answered: tasks, their batches, and the backbone in its place on a mesh.

seqio is imported when a task is asked for.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from variator_jax.bench.output import log
from variator_jax.errors import DataError
from variator_jax.mesh import mesh_or_none
from variator_jax.store import Backbone
from variator_jax.store.formats import backbone_folder, open_backbone
from variator_jax.store.lora import load_on_mesh
from variator_jax.train.checks import check_vocabulary

Batch = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class EvalData:
    """The tasks of an evaluation or inference.

    Attributes:
      task: a seqio task, or a mixture whose tasks are taken one by one.
      feature_lengths: tokens of `inputs` and `targets`; longer ones are cut, which is counted. A
        prediction has at most as many tokens as `targets`, and is compared with whole references.
      batch_size: examples at once.
      split: which examples.
    """

    task: str
    feature_lengths: Mapping[str, int]
    batch_size: int = 64
    split: str = "validation"

    def tasks(self) -> list[str]:
        """Names of the single tasks that have the split.

        Raises:
          DataError: for an unknown task or split, lengths or a batch size that cannot be.
        """
        from variator_jax.data import batches

        provider = batches.task_or_mixture(self.task)
        batches.check_request(provider, self.split, self.feature_lengths, self.batch_size)
        return [task.name for task in batches.tasks_of(provider, self.split)]

    def describe(self) -> list[str]:
        """Prints and returns how labels are read, and how many texts are cut, in sentences."""
        from variator_jax.data import cuts

        lines = cuts.describe_data(self.task, self.split, self.feature_lengths, most=None)
        for line in lines:
            log(f"  {line}")
        return [f"{line}." for line in lines]

    def digest(self, task: str) -> str:
        """Identifies the task's examples, see `data.batches.digest`."""
        from variator_jax.data.batches import digest

        return digest(task, self.split)

    def batches(self, task: str, start: int = 0) -> Iterator[Batch]:
        """One pass in the task's own order from batch `start` on, in T5X's layout.

        Empty rows fill the last batch up.
        """
        from variator_jax.data.batches import batches

        settings = (task, self.split, self.batch_size, self.feature_lengths)
        return batches(*settings, start_batch=start, shuffle=False, repeat=False, pad_last=True)

    def examples(self, task: str, start: int = 0) -> Iterator[tuple[list[dict[str, Any]], Batch]]:
        """`batches` from number `start` on, each behind its examples' fields before tokenising.

        The fields are as seqio has them: bytes and arrays.

        Raises:
          DataError: if the task cannot be read.
        """
        from variator_jax.data._tf import tf
        from variator_jax.data.batches import task_or_mixture

        dataset = task_or_mixture(task).get_dataset(
            dict(self.feature_lengths), self.split, shuffle=False, num_epochs=1, seed=0
        )  # the seed of `batches`: random preprocessors draw alike
        texts = (
            {name: x for name, x in example.items() if name.endswith("_pretokenized")}
            for example in dataset.skip(start * self.batch_size).as_numpy_iterator()
        )
        try:
            for batch in self.batches(task, start):
                yield list(itertools.islice(texts, self.batch_size)), batch
        except tf.errors.OpError as error:
            reason = error.message.splitlines()[0]
            raise DataError(f"task {task!r} cannot be read: {reason}") from error


def load_for(
    data: EvalData, path: str, lora: str | None, mesh_shape: Sequence[int] | None
) -> tuple[Backbone, Mesh | None]:
    """A backbone for some tasks, and the mesh that its arrays are placed on as they are read.

    Args:
      data: the tasks; the mesh must divide their batches.
      path: a backbone folder in any format, or a run folder that holds one.
      lora: a LoRA folder or a run folder, merged into the backbone; None for none.
      mesh_shape: `(data, fsdp, model)` devices; None chooses. With one device there is no mesh.

    Raises:
      CheckpointError: as `load_backbone`.
      ConfigError: for a mesh that is not possible, or a vocabulary that is not the backbone's.
      DataError: as `EvalData.tasks`.
    """
    tasks = data.tasks()
    source = open_backbone(backbone_folder(path))
    mesh = mesh_or_none(source.config, data.batch_size, mesh_shape)
    backbone = load_on_mesh(source, mesh, lora=lora)
    for task in tasks:
        for feature in features(task).values():
            check_vocabulary(task, feature.vocabulary, backbone.config, source.vocabulary_file)
    return backbone, mesh


def features(task: str) -> Mapping[str, Any]:
    """The seqio features of a task, 'inputs' and 'targets', with their vocabularies."""
    from variator_jax.data.batches import task_or_mixture

    return task_or_mixture(task).output_features
