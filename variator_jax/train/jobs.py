"""What a run trains: a plugin beside a frozen backbone, or a whole backbone. From folder to folder.

The step and the loop are the same for both; what differs is gathered in a `Job`.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import traverse_util
from jax.sharding import Mesh

from variator_jax import mesh as meshes
from variator_jax.backbones.t5 import T5Config, Transformer, init_params
from variator_jax.errors import CheckpointError, ConfigError
from variator_jax.plugin import PluginConfig, PluginVariables
from variator_jax.store import (
    Backbone,
    Plugin,
    load_lora,
    load_plugin,
    save_backbone,
    save_plugin,
    stream,
)
from variator_jax.store.any_backbone import open_backbone
from variator_jax.store.backbone_folder import file_fingerprint
from variator_jax.store.folders import fingerprint
from variator_jax.store.lora_merge import collect_with_lora
from variator_jax.train.data import DataConfig, check_vocabulary, vocabulary_file
from variator_jax.train.init import fresh_plugin
from variator_jax.train.losses import LossConfig
from variator_jax.train.objectives import Distillation, Objective, TaskTraining

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
      start: the trained and the frozen arrays, made when the folder is known to be this run's;
        they lie on the devices as `partitioning` says.
      export: writes the trained arrays, with a summary of the run, and returns the folder.
    """

    objective: Objective
    identity: dict[str, Any]
    start: Callable[[], tuple[Any, Any]]
    export: Callable[[Any, Any, Mapping[str, Any]], pathlib.Path]


def backbone_job(
    model_dir: str,
    config: T5Config,
    initial_checkpoint_path: str | None,
    data: DataConfig,
    seed: int,
    mesh: Mesh,
) -> Job:
    """Trains the whole backbone on the task's own loss, from a folder or from random weights."""
    vocabulary = data.vocabulary()
    check_vocabulary(data.task, vocabulary, config)
    initial = None
    if initial_checkpoint_path is not None:
        # A backbone that is stored in bfloat16 is trained in the run's dtype: the small updates of
        # fine-tuning would be lost in its rounding.
        dtype = config.param_dtype
        initial = load_initial_backbone(initial_checkpoint_path, config, data, mesh, dtype)

    config = initial.config if initial else config

    def start() -> tuple[dict, None]:
        if initial is not None:
            return initial.params, None
        shardings = meshes.parameter_shardings(config, mesh)
        fresh = init_params(config, jax.random.key(seed))
        return jax.tree.map(meshes.place, fresh, shardings), None

    def export(params: dict, frozen: None, training: Mapping[str, Any]) -> pathlib.Path:
        folder = pathlib.Path(model_dir) / "backbone"
        whole = jax.tree.map(meshes.gather, params)
        if jax.process_index() == 0:
            save_backbone(folder, config, whole, vocabulary_file(vocabulary))
        return folder

    identity = {"trained": "backbone", "backbone": initial.fingerprint if initial else config.name}
    return Job(TaskTraining(Transformer(config)), identity, start, export)


def plugin_job(
    model_dir: str,
    config: T5Config,
    initial_checkpoint_path: str | None,
    plugin: PluginConfig | None,
    initial_plugin_path: str | None,
    loss: LossConfig,
    data: DataConfig,
    seed: int,
    mesh: Mesh,
    backbone_dtype: str | None = None,
    initial_lora_path: str | None = None,
    num_microbatches: int = 1,
) -> Job:
    """Trains a plugin beside a frozen backbone, a fresh one or one to adapt."""
    plugin = check_trainable(plugin)
    if data.packed:
        check_packing(data.pack_multiple, plugin.ratio)
    if initial_checkpoint_path is None:
        raise ConfigError(
            "A plugin is trained beside a backbone: set INITIAL_CHECKPOINT_PATH to its folder."
        )
    backbone = load_initial_backbone(
        initial_checkpoint_path, config, data, mesh, backbone_dtype, initial_lora_path
    )
    initial = None
    if initial_plugin_path is not None:
        initial = initial_plugin(initial_plugin_path, plugin, backbone.config)

    def start() -> tuple[dict, tuple[dict, dict]]:
        if initial is not None:
            variables = initial.variables
        else:
            folder = pathlib.Path(model_dir)
            variables = fresh_plugin(folder, plugin, backbone, data, seed, mesh, num_microbatches)
        everywhere = meshes.replicated(mesh)
        placed = jax.tree.map(lambda x: meshes.place(x, everywhere), variables)
        return placed.params, (backbone.params, placed.output_scales)

    def export(params: dict, frozen: tuple, training: Mapping[str, Any]) -> pathlib.Path:
        folder = pathlib.Path(model_dir) / "plugin"
        trained = PluginVariables(params, frozen[1])
        if jax.process_index() == 0:
            save_plugin(folder, plugin, trained, backbone, training=training)
        return folder

    identity = {
        "trained": "plugin",
        "ratio": plugin.ratio,
        "plugin": dataclasses.asdict(plugin),
        "backbone": backbone.fingerprint,
        "initial_plugin": fingerprint(initial.variables.params) if initial else None,
    }
    objective = Distillation(Transformer(backbone.config), plugin, loss)
    return Job(objective, identity, start, export)


def check_trainable(plugin: PluginConfig | None) -> PluginConfig:
    """Refuses a plugin that has nothing to train.

    Raises:
      ConfigError: with the remedy.
    """
    if plugin is None or plugin.ratio == 1:
        raise ConfigError("A plugin run needs a compression ratio of 2 or more; set RATIO.")
    if plugin.compression == "mean" and plugin.decompression == "repeat":
        raise ConfigError(
            "This plugin has nothing to train: compression 'mean' with decompression 'repeat' has "
            "no parameters. Evaluate it as it is."
        )
    return plugin


def check_packing(pack_multiple: int, ratio: int) -> None:
    """Refuses packed examples that a merge group could span.

    Raises:
      ConfigError: with the remedy.
    """
    if pack_multiple % ratio:
        raise ConfigError(
            f"Packed examples must start on multiples of the ratio {ratio}: set PACK_MULTIPLE to "
            f"one; found {pack_multiple}."
        )


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
    lora = None if lora_path is None else load_lora(lora_path)
    source = open_backbone(folder)
    for field in _SHAPE_FIELDS:
        found, expected = getattr(source.config, field), getattr(config, field)
        if found != expected:
            raise CheckpointError(
                f"{folder} holds a backbone of another shape: {source.config.name!r} has {field} "
                f"{found}; this run's {config.name!r} has {expected}."
            )
    given = source.vocabulary_file
    trained_with = None if given is None else file_fingerprint(given)
    check_vocabulary(data.task, data.vocabulary(), config, trained_with)
    shardings = traverse_util.flatten_dict(
        meshes.parameter_shardings(source.config, mesh), sep="/"
    )

    def place(name: str, array: Any) -> jax.Array:
        return meshes.place(array, shardings[name])

    if lora is None:
        loaded = stream.collect(source, dtype, place)
    else:
        loaded = collect_with_lora(source, lora, dtype, place)
    # The norms' epsilon is part of what the weights mean; dtypes, dropout and remat are the run's.
    kept = dataclasses.replace(config, layer_norm_epsilon=loaded.config.layer_norm_epsilon)
    return dataclasses.replace(loaded, config=kept)


def initial_plugin(path: str, config: PluginConfig, shape: T5Config) -> Plugin:
    """A pre-trained plugin to adapt. It may come from another backbone of the same shape.

    That is the paper's recipe: pre-training runs beside the general backbone, adaptation beside one
    that was fine-tuned from it.
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
                f"The plugin in {folder} was trained beside {owner['name']!r} with {field} "
                f"{owner[field]}; backbone {shape.name!r} has {getattr(shape, field)}."
            )
    return loaded
