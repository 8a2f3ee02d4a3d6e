"""A smaller student by distillation: the teacher with narrower encoder FFNs, at a plugin's cost.

It is trained as a plugin is, by comparing its outputs with the teacher's, and is a backbone of its
own afterwards. Its shape, and which of its weights move, are said in `evaluation.narrow`.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh

from variator_jax import mesh as meshes
from variator_jax.backbones.t5 import T5Config, Transformer
from variator_jax.errors import ConfigError
from variator_jax.plugin import PluginConfig
from variator_jax.store import save_backbone
from variator_jax.train.data import DataConfig, vocabulary_file
from variator_jax.train.jobs import Job, load_initial_backbone
from variator_jax.train.losses import LossConfig
from variator_jax.train.narrow import narrowed, student_leaves, student_mlp_dim
from variator_jax.train.objectives import Batch, Comparison, run


class StudentDistillation:
    """The student is a backbone with narrower encoder FFNs, the teacher the backbone itself.

    `trained` is the student's own weights, a flat dict as of `student_leaves`; `frozen` is the
    teacher's parameters, of which the student has all the others. Both run without dropout.
    """

    def __init__(self, teacher: Transformer, student: Transformer, config: LossConfig) -> None:
        shape = teacher.config
        self._teacher, self._student = teacher, student
        self._comparison = Comparison(config, shape.embed_dim, shape.has_decoder)
        self.coefficients: Mapping[str, float] = self._comparison.coefficients

    def weights(self, batch: Batch) -> dict[str, jax.Array]:
        """Valid elements of the hidden states, valid positions of the targets."""
        return self._comparison.weights(batch)

    def terms(
        self, trained: dict, frozen: dict, batch: Batch, rng: jax.Array | None
    ) -> dict[str, jax.Array]:
        """Runs teacher and student and compares them."""
        teacher = jax.lax.stop_gradient(run(self._teacher, frozen, batch))
        student = run(self._student, whole_student(trained, frozen), batch)
        return self._comparison.terms(student, teacher, batch)


def whole_student(trained: Mapping[str, Any], teacher: dict) -> dict:
    """The student's tree: its own weights in their places, the teacher's everywhere else."""
    flat = traverse_util.flatten_dict(teacher, sep="/")
    return traverse_util.unflatten_dict({**flat, **trained}, sep="/")


def initial_student(teacher: dict, mlp_dim: int) -> dict[str, np.ndarray]:
    """The weights that a student starts with, in the host's memory: a flat dict.

    In each encoder FFN the `mlp_dim` neurons stay whose product of norms is largest, of the columns
    of the kernels into it and of the row of the kernel out of it. They keep their order, so that a
    student of full width is the teacher.
    """
    flat = jax.tree.map(meshes.gather, student_leaves(teacher))
    for layer in teacher["encoder"]:
        mlp = f"encoder/{layer}/mlp/"
        kernels = {path: leaf for path, leaf in flat.items() if path.startswith(mlp)}
        if kernels:
            kept = _strongest(kernels, mlp_dim)
            for path, kernel in kernels.items():
                flat[path] = np.take(kernel, kept, axis=_neuron_axis(path))
    return flat


def _strongest(kernels: Mapping[str, np.ndarray], count: int) -> np.ndarray:
    """Numbers of the neurons with the largest products of norms, rising."""
    strengths = [
        np.linalg.norm(kernel.astype(np.float32), axis=1 - _neuron_axis(path))
        for path, kernel in kernels.items()
    ]
    return np.sort(np.argsort(-np.prod(strengths, axis=0), kind="stable")[:count])


def _neuron_axis(path: str) -> int:
    """Along which axis the neurons of a kernel lie: the first of `wo`, the second of `wi`s."""
    return 0 if path.endswith("/wo/kernel") else 1


def student_job(
    model_dir: str,
    config: T5Config,
    initial_checkpoint_path: str | None,
    plugin: PluginConfig | None,
    loss: LossConfig,
    data: DataConfig,
    mesh: Mesh,
) -> Job:
    """Trains a student that costs what the backbone with `plugin` does; exports a backbone folder.

    The weights that it shares with the teacher are exported as they are, so they are kept in the
    run's `param_dtype`, whatever dtype a frozen backbone is kept in elsewhere.
    """
    if plugin is None or plugin.ratio == 1:
        raise ConfigError(
            "A student has the FLOPs of a plugin of ratio 2 or more: set RATIO to that ratio."
        )
    if initial_checkpoint_path is None:
        raise ConfigError(
            "A student is made from a backbone, its teacher: set INITIAL_CHECKPOINT_PATH to its "
            "folder."
        )
    dtype = config.param_dtype
    teacher = load_initial_backbone(initial_checkpoint_path, config, data, mesh, dtype)
    mlp_dim = student_mlp_dim(teacher.config, data.feature_lengths["inputs"], plugin)
    student = narrowed(teacher.config, mlp_dim)
    shape = meshes.MeshShape(*mesh.devices.shape)
    meshes.check_shape(shape, student, shape.data * shape.fsdp, shape.size)

    def start() -> tuple[dict, dict]:
        shardings = student_leaves(meshes.parameter_shardings(student, mesh))
        fresh = initial_student(teacher.params, mlp_dim)
        placed = {path: meshes.place(fresh[path], shardings[path]) for path in fresh}
        return placed, teacher.params

    def export(trained: dict, frozen: dict, training: Mapping[str, Any]) -> pathlib.Path:
        folder = pathlib.Path(model_dir) / "backbone"
        whole = jax.tree.map(meshes.gather, whole_student(trained, frozen))
        if jax.process_index() == 0:
            save_backbone(folder, student, whole, vocabulary_file(data.vocabulary()))
        return folder

    identity = {
        "trained": "student",
        "backbone": teacher.fingerprint,
        "encoder_mlp_dim": mlp_dim,
        "ratio": plugin.ratio,
    }
    objective = StudentDistillation(Transformer(teacher.config), Transformer(student), loss)
    return Job(objective, identity, start, export)
