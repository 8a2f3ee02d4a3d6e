"""What a run trains, from folder to folder: a plugin, a whole backbone or a LoRA.

The step and the loop are the same for all; the differences are in a `Job`.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from variator_jax import mesh as meshes
from variator_jax.backbones.lora import LoraConfig, init_lora, lora_weights, merge_lora
from variator_jax.backbones.t5 import T5, T5Config, init_params
from variator_jax.errors import CheckpointError, ConfigError
from variator_jax.plugin import PluginConfig, PluginVariables
from variator_jax.store import (
    Backbone,
    Plugin,
    load_plugin,
    save_backbone,
    save_lora,
    save_plugin,
)
from variator_jax.store.arrays import file_checksum, fingerprint
from variator_jax.store.formats import open_backbone
from variator_jax.store.lora import load_on_mesh
from variator_jax.train.init import fresh_plugin
from variator_jax.train.objectives import Batch, Distillation, Objective, TaskTraining
from variator_jax.train.settings import (
    DataConfig,
    TrainConfig,
    check_packing,
    check_trainable,
    check_vocabulary,
    vocabulary_file,
)

# What must agree between a loaded backbone and the run's; dtypes, dropout and remat may differ.
_SHAPE_FIELDS = (
    "vocab_size", "embed_dim", "num_heads", "head_dim", "mlp_dim", "encoder_mlp",
    "num_encoder_layers", "num_decoder_layers", "mlp_activations", "logits_via_embedding",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Job:
    """What a run trains.

    Attributes:
      objective: what a step minimises.
      identity: what makes the run this one; a run folder is never continued as another.
      start: makes the trained and the frozen arrays on the mesh, after the folder was checked.
      export: writes the trained arrays, with a summary of the run, and returns the folder.
    """

    objective: Objective
    identity: dict[str, Any]
    start: Callable[[], tuple[Any, Any]]
    export: Callable[[Any, Any, Mapping[str, Any]], pathlib.Path]


def backbone_job(config: TrainConfig, mesh: Mesh) -> Job:
    """Trains the whole backbone on the task's own loss, from a folder or from random weights."""
    data = config.data
    check_vocabulary(data.task, data.vocabulary(), config.shape)
    shape, initial = config.shape, None
    if config.initial_checkpoint_path is not None:
        # A backbone that is stored in bfloat16 is trained in the run's dtype: the small updates of
        # fine-tuning would be lost in its rounding.
        dtype = shape.param_dtype
        initial = load_initial_backbone(config.initial_checkpoint_path, shape, data, mesh, dtype)
        shape = initial.config

    def start() -> tuple[dict, None]:
        if initial is not None:
            return initial.params, None
        fresh = init_params(shape, jax.random.key(config.seed))
        return meshes.place_parameters(fresh, shape, mesh), None

    def export(params: dict, frozen: None, training: Mapping[str, Any]) -> pathlib.Path:
        return export_backbone(config, shape, params)

    identity = {"trained": "backbone", "backbone": initial.fingerprint if initial else shape.name}
    return Job(TaskTraining(T5(shape)), identity, start, export)


def export_backbone(config: TrainConfig, shape: T5Config, params: dict) -> pathlib.Path:
    """Writes a trained backbone into the run folder; all processes call this together."""
    folder = pathlib.Path(config.model_dir) / "backbone"
    gathered = jax.tree.map(meshes.gather, params)
    if jax.process_index() == 0:
        save_backbone(folder, shape, gathered, vocabulary_file(config.data.vocabulary()))
    return folder


def plugin_job(config: TrainConfig, mesh: Mesh) -> Job:
    """Trains a plugin of a frozen backbone, a fresh one or one to adapt."""
    plugin = check_trainable(config.plugin, T5(config.shape).stack())
    data = config.data
    if data.packed:
        check_packing(data.pack_multiple, plugin.ratio)
    backbone = load_initial_backbone(
        config.initial_backbone("A plugin is trained on a backbone"),
        config.shape,
        data,
        mesh,
        config.backbone_dtype,
        config.initial_lora_path,
    )
    initial = None
    if config.initial_plugin_path is not None:
        initial = initial_plugin(config.initial_plugin_path, plugin, backbone.config)

    def start() -> tuple[dict, tuple[dict, dict]]:
        variables = initial.variables if initial else fresh_plugin(config, backbone, mesh)
        placed = meshes.place_everywhere(variables, mesh)
        return placed.params, (backbone.params, placed.output_scales)

    def export(params: dict, frozen: tuple, training: Mapping[str, Any]) -> pathlib.Path:
        folder = pathlib.Path(config.model_dir) / "plugin"
        trained = PluginVariables(params, frozen[1])
        if jax.process_index() == 0:
            save_plugin(folder, plugin, trained, backbone, training=training)
        return folder

    identity = {
        "trained": "plugin",
        "plugin": plugin.to_json(),
        "backbone": backbone.fingerprint,
        "initial_plugin": fingerprint(initial.variables.params) if initial else None,
    }
    objective = Distillation(T5(backbone.config), plugin, config.loss)
    return Job(objective, identity, start, export)


class LoraTraining(TaskTraining):
    """The task's own cross-entropy: `trained` is A and B, `frozen` is the backbone's parameters."""

    def __init__(self, backbone: T5, config: LoraConfig) -> None:
        super().__init__(backbone)
        self._config = config

    def terms(
        self, trained: dict, frozen: dict | None, batch: Batch, rng: jax.Array | None
    ) -> dict[str, jax.Array]:
        """Those of `TaskTraining` on the merged weights, which is what will be served."""
        merged = merge_lora(frozen or {}, trained, self._config)
        return super().terms(merged, None, batch, rng)


def lora_job(config: TrainConfig, mesh: Mesh) -> Job:
    """Trains a fresh LoRA of a frozen backbone on the task's own loss."""
    path = config.initial_backbone("A LoRA is trained on a backbone")
    if not config.backbone.has_decoder:
        raise ConfigError(
            f"Backbone {config.backbone.name!r} has no decoder, so a LoRA has no task loss."
        )
    lora = config.lora
    backbone = load_initial_backbone(path, config.shape, config.data, mesh, config.backbone_dtype)
    lora_weights(lora, backbone.params)  # refuses now a site that matches nothing

    def start() -> tuple[dict, dict]:
        fresh = init_lora(lora, backbone.params, jax.random.key(config.seed))
        return meshes.place_everywhere(fresh, mesh), backbone.params

    def export(params: dict, frozen: dict, training: Mapping[str, Any]) -> pathlib.Path:
        folder = pathlib.Path(config.model_dir) / "lora"
        if jax.process_index() == 0:
            save_lora(folder, lora, params, backbone, training)
        return folder

    identity = {
        "trained": "lora",
        "lora": dataclasses.asdict(lora),
        "backbone": backbone.fingerprint,
    }
    return Job(LoraTraining(T5(backbone.config), lora), identity, start, export)


def run_part(path: str, part: str) -> pathlib.Path:
    """`path` itself, or the 'backbone' or 'plugin' folder in it where `path` is a run folder."""
    folder = pathlib.Path(path)
    return folder / part if (folder / part).is_dir() else folder


def backbone_folder(path: str) -> pathlib.Path:
    """The folder that `path` names, or the backbone in it where it is a run folder.

    Raises:
      CheckpointError: if there is nothing, with how to get a backbone.
    """
    folder = run_part(path, "backbone")
    if not folder.is_dir() or not any(folder.iterdir()):
        raise CheckpointError(
            f"INITIAL_CHECKPOINT_PATH {path!r} holds no backbone. Train one with "
            "--gin_file=runs/backbone.gin, or name a Hugging Face, T5X or variator folder."
        )
    return folder


def load_initial_backbone(
    path: str,
    config: T5Config,
    data: DataConfig,
    mesh: Mesh,
    dtype: str | None = None,
    lora_path: str | None = None,
) -> Backbone:
    """Loads a backbone into its place on the mesh, if the run's shape and vocabulary are its own.

    One array at a time is in the host's memory, so a backbone may be larger than that. A LoRA is
    merged into each of them on its way.
    """
    folder = backbone_folder(path)
    source = open_backbone(folder)
    for field in _SHAPE_FIELDS:
        stored, expected = getattr(source.config, field), getattr(config, field)
        if stored != expected:
            raise CheckpointError(
                f"{folder} holds a backbone of another shape: {source.config.name!r} has {field} "
                f"{stored}; this run's {config.name!r} has {expected}."
            )
    given = source.vocabulary_file
    trained_with = None if given is None else file_checksum(given)
    check_vocabulary(data.task, data.vocabulary(), config, trained_with)
    loaded = load_on_mesh(source, mesh, dtype, lora_path)
    # The norms' epsilon is part of what the weights mean; dtypes, dropout and remat are the run's.
    kept = dataclasses.replace(config, layer_norm_epsilon=loaded.config.layer_norm_epsilon)
    return dataclasses.replace(loaded, config=kept)


def initial_plugin(path: str, config: PluginConfig, shape: T5Config) -> Plugin:
    """A pre-trained plugin to adapt. It may come from another backbone of the same shape.

    That is the paper's recipe: pre-training runs on the general backbone, adaptation on one that
    was fine-tuned from it.
    """
    folder = run_part(path, "plugin")
    loaded = load_plugin(folder)
    if loaded.config != config:
        raise CheckpointError(
            f"The plugin in {folder} was trained as {loaded.config}; this run asks for {config}."
        )
    owner = loaded.description["backbone"]
    for field in ("num_encoder_layers", "embed_dim"):
        if owner[field] != getattr(shape, field):
            raise CheckpointError(
                f"The plugin in {folder} was trained on {owner['name']!r} with {field} "
                f"{owner[field]}; backbone {shape.name!r} has {getattr(shape, field)}."
            )
    return loaded
