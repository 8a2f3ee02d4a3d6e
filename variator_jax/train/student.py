"""A smaller student by distillation: the teacher with narrower encoder FFNs, at a plugin's cost.

Where FFNs of an eighth of their width still cost too much, it has fewer layers, too.

It is what a compression plugin competes with at equal cost. It is trained as a plugin is, by
comparing its outputs with the teacher's, and is a backbone of its own afterwards.
"""

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh

from variator_jax import mesh as meshes
from variator_jax.backbones.t5 import T5, T5Config
from variator_jax.backbones.t5.cost import attention_flops, ffn_flops
from variator_jax.errors import ConfigError
from variator_jax.model import SplicedModel
from variator_jax.plugin import PluginConfig, stack_flops
from variator_jax.train.jobs import Job, export_backbone, load_initial_backbone
from variator_jax.train.losses import LossConfig
from variator_jax.train.objectives import TeacherStudent
from variator_jax.train.settings import TrainConfig

_LAYER = re.compile(r"encoder/layers_\d+/")
_TRAINED = re.compile(r"encoder/.*(?<!/scale)")  # all of the encoder but its norms
_NARROWEST = 8  # an FFN keeps this part of its width as long as the student has layers to lose
_MULTIPLE = 8  # of which the width is one: meshes split it, and accelerators pad it


class StudentDistillation(TeacherStudent):
    """The student is a smaller backbone, the teacher the backbone itself.

    `trained` is the student's own weights, a flat dict as of `student_leaves`; `frozen` is the
    teacher's parameters, of which the student has all the others.
    """

    def __init__(self, teacher: T5, student: T5, config: LossConfig) -> None:
        super().__init__(SplicedModel(teacher), SplicedModel(student), config)

    def arguments(self, trained: dict, frozen: dict) -> tuple[Any, Any]:
        """The teacher's parameters and the student's; no plugin."""
        return (frozen, None), (whole_student(trained, frozen), None)


def whole_student(trained: Mapping[str, Any], teacher: dict) -> dict:
    """The student's tree: its own weights in their places, the teacher's everywhere else."""
    layers = len({path.split("/")[1] for path in trained if _LAYER.match(path)})
    flat = traverse_util.flatten_dict(_with_layers(teacher, layers), sep="/")
    return traverse_util.unflatten_dict({**flat, **trained}, sep="/")


def _with_layers(teacher: dict, count: int) -> dict:
    """A backbone's tree with `count` of its encoder layers, evenly spaced from first to last."""
    encoder = teacher["encoder"]
    rest = {name: part for name, part in encoder.items() if not name.startswith("layers_")}
    kept = np.linspace(0, len(encoder) - len(rest) - 1, count).round().astype(int)
    layers = {f"layers_{new}": encoder[f"layers_{old}"] for new, old in enumerate(kept)}
    return {**teacher, "encoder": rest | layers}


def initial_student(teacher: dict, shape: T5Config) -> dict[str, np.ndarray]:
    """The weights that a student starts with, in the host's memory: a flat dict.

    In each encoder FFN those neurons stay whose product of norms is largest, of the columns of the
    kernels into it and of the row of the kernel out of it. They keep their order, so that a student
    of full width is the teacher.
    """
    teacher, mlp_dim = _with_layers(teacher, shape.num_encoder_layers), shape.encoder_mlp
    flat = jax.tree.map(meshes.gather, student_leaves(teacher))
    for layer in teacher["encoder"]:
        mlp = f"encoder/{layer}/mlp/"
        kernels = {path: leaf for path, leaf in flat.items() if path.startswith(mlp)}
        if kernels:
            strengths = [
                np.linalg.norm(kernel.astype(np.float32), axis=1 - _neuron_axis(path))
                for path, kernel in kernels.items()
            ]
            kept = np.sort(np.argsort(-np.prod(strengths, axis=0), kind="stable")[:mlp_dim])
            for path, kernel in kernels.items():
                flat[path] = np.take(kernel, kept, axis=_neuron_axis(path))
    return flat


def _neuron_axis(path: str) -> int:
    """The axis of a kernel's neurons: the first of `wo`, the second of `wi`s."""
    return 0 if path.endswith("/wo/kernel") else 1


def student_job(config: TrainConfig, mesh: Mesh) -> Job:
    """Trains a student that costs what the backbone with `plugin` does; exports a backbone folder.

    The weights that it shares with the teacher are exported as they are, so they are kept in the
    run's `param_dtype`, for any dtype of the frozen backbone elsewhere.
    """
    plugin = config.plugin
    if plugin is None or plugin.ratio == 1:
        raise ConfigError("A student has the FLOPs of a plugin of ratio 2 or more: set RATIO.")
    teacher = load_initial_backbone(config, mesh, config.backbone.param_dtype)
    student = student_shape(teacher.config, config.data.feature_lengths["inputs"], plugin)
    shape = meshes.MeshShape(*mesh.devices.shape)
    meshes.check_shape(shape, student, shape.data * shape.fsdp, shape.size)

    def start() -> tuple[dict, dict]:
        shardings = student_leaves(meshes.parameter_shardings(student, mesh))
        fresh = initial_student(teacher.params, student)
        placed = {path: meshes.place(fresh[path], shardings[path]) for path in fresh}
        return placed, teacher.params

    def export(folder: pathlib.Path, trained: dict, frozen: dict, training: object) -> None:
        export_backbone(folder, config, student, whole_student(trained, frozen))

    identity = {"trained": "student", "backbone": teacher.fingerprint, "ratio": plugin.ratio}
    identity["encoder_mlp_dim"] = student.encoder_mlp
    identity["encoder_layers"] = student.num_encoder_layers
    objective = StudentDistillation(T5(teacher.config), T5(student), config.loss)
    return Job(objective, identity, start, "backbone", export)


def student_shape(config: T5Config, length: int, plugin: PluginConfig) -> T5Config:
    """The widest encoder FFNs whose encoder costs no more FLOPs than the backbone with a plugin.

    The width is rounded down to a multiple of 8, unless it is below 8. The student has as many
    layers as leave each FFN an eighth of its width.

    Args:
      config: shape of the backbone.
      length: tokens per row, padding included.
      plugin: the plugin to compare with.

    Raises:
      ConfigError: for a length below 1, or a plugin that leaves one layer no neuron.
    """
    most, width = stack_flops(T5(config).stack(), length, plugin), 0
    neuron = ffn_flops(dataclasses.replace(config, encoder_mlp_dim=1), length)
    for layers in range(config.num_encoder_layers, 0, -1):
        width = most // layers - attention_flops(config, length, length)
        width = min(width // neuron, config.encoder_mlp)
        if width >= max(1, config.encoder_mlp // _NARROWEST):
            break
    if width < 1:
        raise ConfigError(
            f"At {length} tokens a plugin of ratio {plugin.ratio} costs less than one layer with "
            f"one neuron of backbone {config.name!r}: no student is so small."
        )
    width = width - width % _MULTIPLE or width
    if (layers, width) == (config.num_encoder_layers, config.encoder_mlp):
        return config
    fewer = f"_layers{layers}" if layers < config.num_encoder_layers else ""
    name = f"{config.name}{fewer}_ffn{width}"
    return dataclasses.replace(config, name=name, num_encoder_layers=layers, encoder_mlp_dim=width)


def student_leaves(params: dict[str, Any]) -> dict[str, Any]:
    """What a student trains, of a backbone's tree of anything: its encoder without the norms.

    Decoder, embeddings and norms stay the teacher's: it differs from a plugin in capacity alone.

    Returns:
      A flat dict, names joined by '/'.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    return {path: leaf for path, leaf in flat.items() if _TRAINED.fullmatch(path)}
