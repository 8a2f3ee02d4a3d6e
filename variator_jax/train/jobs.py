"""What a run trains, from folder to folder: a plugin, a whole backbone or a LoRA.

The step and the loop are the same for all; the differences are in a `Job`.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from variator_jax import mesh as meshes
from variator_jax.backbones.lora import init_lora, lora_weights
from variator_jax.backbones.t5 import T5, T5Config, init_params
from variator_jax.errors import CheckpointError, ConfigError
from variator_jax.files import wrap_errors, write_json
from variator_jax.plugin import PluginConfig, PluginVariables, init_plugin
from variator_jax.plugin.splice import calibrate, site_output_rms
from variator_jax.store import Backbone, Plugin, load_plugin, save_backbone, save_lora, save_plugin
from variator_jax.store.arrays import fingerprint
from variator_jax.store.description import config_content
from variator_jax.store.formats import backbone_folder, open_backbone, run_part
from variator_jax.store.lora import load_on_mesh
from variator_jax.store.plugins import check_shapes
from variator_jax.train.checks import check_packing, check_trainable, check_vocabulary
from variator_jax.train.objectives import Batch, Distillation, LoraTraining, Objective, TaskTraining
from variator_jax.train.settings import TrainConfig

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
      start: makes the trained and the frozen arrays on the mesh, after the folder was checked;
        called once.
      part: the folder that is exported, in the run folder: 'plugin', 'backbone' or 'lora'.
      export: writes the trained arrays into a folder, with a summary of the run.
    """

    objective: Objective
    identity: dict[str, Any]
    start: Callable[[], tuple[Any, Any]]
    part: str
    export: Callable[[pathlib.Path, Any, Any, Mapping[str, Any]], None]


def backbone_job(config: TrainConfig, mesh: Mesh) -> Job:
    """Trains the whole backbone on the task's own loss, from a folder or from random weights."""
    _check_decoder(config.shape)
    check_vocabulary(config.data.task, config.data.vocabulary(), config.shape)
    shape = config.shape
    identity: dict[str, Any] = {"trained": "backbone"}
    # Taken out by `start`: kept, they would be in memory while the run trains a copy.
    loaded: list[dict] = []
    if config.initial_checkpoint_path is not None:
        # A backbone that is stored in bfloat16 is trained in the run's dtype: the small updates of
        # fine-tuning would be lost in its rounding.
        initial = load_initial_backbone(config, mesh, shape.param_dtype)
        shape, identity["backbone"] = initial.config, initial.fingerprint
        loaded.append(initial.params)
    else:
        of_run = {"name", "remat", "dtype", "dropout_rate"}  # recorded by the run, or no shape
        known = {k: v for k, v in config_content(shape).items() if k not in of_run}
        identity |= {"backbone": shape.name, **{f"shape_{name}": v for name, v in known.items()}}

    def start() -> tuple[dict, None]:
        if config.initial_checkpoint_path is not None:
            return loaded.pop(), None
        fresh = init_params(shape, jax.random.key(config.seed))
        return meshes.place_parameters(fresh, shape, mesh), None

    def export(folder: pathlib.Path, params: dict, frozen: None, training: object) -> None:
        export_backbone(folder, config, shape, params)

    return Job(TaskTraining(T5(shape)), identity, start, "backbone", export)


def export_backbone(
    folder: pathlib.Path, config: TrainConfig, shape: T5Config, params: dict
) -> None:
    """Writes a trained backbone into a folder; all processes call this together."""
    from variator_jax.data.vocabulary import local_model_file

    gathered = jax.tree.map(meshes.gather, params)
    if jax.process_index() == 0:
        save_backbone(folder, shape, gathered, local_model_file(config.data.vocabulary()))


def plugin_job(config: TrainConfig, mesh: Mesh) -> Job:
    """Trains a plugin of a frozen backbone, a fresh one or one to adapt."""
    plugin = check_trainable(config.plugin, T5(config.shape).stack())
    if config.data.packed:
        check_packing(config.data.pack_multiple, plugin.period)
    backbone = load_initial_backbone(config, mesh, config.backbone_dtype)
    path = config.initial_plugin_path
    initial = None if path is None else initial_plugin(path, plugin, backbone.config)

    def start() -> tuple[dict, tuple[dict, dict]]:
        variables = initial.variables if initial else fresh_plugin(config, backbone, mesh)
        placed = meshes.place_everywhere(variables, mesh)
        return placed.params, (backbone.params, placed.output_scales)

    def export(folder: pathlib.Path, params: dict, frozen: tuple, training: Mapping) -> None:
        trained = PluginVariables(params, frozen[1])
        if jax.process_index() == 0:
            save_plugin(folder, plugin, trained, backbone, training=training)

    identity = {
        "trained": "plugin",
        "plugin": plugin.to_run(),
        "backbone": backbone.fingerprint,
        "initial_plugin": fingerprint(initial.variables.params) if initial else None,
        "initial_scales": fingerprint(initial.variables.output_scales) if initial else None,
    }
    objective = Distillation(T5(backbone.config), plugin, config.loss)
    return Job(objective, identity, start, "plugin", export)


def fresh_plugin(config: TrainConfig, backbone: Backbone, mesh: Mesh) -> PluginVariables:
    """A new plugin, calibrated on the run's first batch, or as the run folder keeps it.

    Raises:
      CheckpointError: if what the run folder keeps cannot be read.
    """
    network, data = T5(backbone.config), config.data
    plugin = check_trainable(config.plugin, network.stack())
    fresh = init_plugin(plugin, network.stack(), jax.random.key(config.seed))
    # Measured once and kept, because a resumed run must continue in the very same units.
    file = pathlib.Path(config.model_dir) / "calibration.json"
    rms = _kept_scales(file, fresh.output_scales)
    if rms is None:
        batch = next(data.train(0, meshes.own_rows(mesh, data.batch_size)))
        batches = meshes.global_microbatches(batch, mesh, config.num_microbatches)
        with meshes.activations(mesh):
            rms = measure_output_scales(network, backbone.params, plugin, batches)
        if jax.process_index() == 0:
            write_json(file, {name: float(value) for name, value in rms.items()})
    return calibrate(fresh, {name: jnp.float32(value) for name, value in rms.items()})


def measure_output_scales(
    backbone: T5, params: dict, plugin: PluginConfig, batches: Iterable[Batch]
) -> dict[str, Any]:
    """The RMS of what each site's modules add, `{'encoder/layers_<i>/mlp': a}`, float32.

    Args:
      backbone: the network.
      params: its parameters.
      plugin: whose sites.
      batches: on the mesh; one at a time is run, all are measured as one.
    """
    # Rematerialised layers would keep what is measured inside themselves.
    network = T5(dataclasses.replace(backbone.config, remat=False))

    @jax.jit
    def measure(params: dict, batch: Batch) -> tuple[dict[str, jax.Array], jax.Array]:
        mask = network.masks(batch)["encoder"]
        run = functools.partial(network.apply, params, batch)
        return site_output_rms(run, plugin, network.stack(), mask), jnp.sum(mask.valid)

    parts = [jax.tree.map(meshes.gather, measure(params, batch)) for batch in batches]
    tokens = max(sum(int(count) for _, count in parts), 1)
    # The RMS of a part without tokens is not a number. In float64, so that of one part is exact.
    squares = {
        key: sum(float(rms[key]) ** 2 * int(count) for rms, count in parts if count)
        for key in parts[0][0]
    }
    return {key: np.float32(np.sqrt(total / tokens)) for key, total in squares.items()}


def _kept_scales(file: pathlib.Path, names: Collection[str]) -> dict[str, Any] | None:
    """The keys' scales in a file as process 0 reads it, in every process; None without a file.

    Others may see an older state of a shared folder: a process that then measured alone would wait
    for the others in vain.
    """
    row: np.ndarray = np.zeros(1 + len(names), np.float32)
    if jax.process_index() == 0 and file.is_file():
        with wrap_errors(f"{file} does not hold the output scales of this run"):
            scales = json.loads(file.read_text(encoding="utf8"))
            row[:] = [1.0, *(scales[name] for name in names)]
    flag, *values = meshes.from_first(row)
    return dict(zip(names, values, strict=True)) if flag else None


def lora_job(config: TrainConfig, mesh: Mesh) -> Job:
    """Trains a fresh LoRA of a frozen backbone on the task's own loss."""
    _check_decoder(config.shape)
    lora, backbone = config.lora, load_initial_backbone(config, mesh, config.backbone_dtype)
    lora_weights(lora, backbone.params)  # refuses now a site that matches nothing

    def start() -> tuple[dict, dict]:
        fresh = init_lora(lora, backbone.params, jax.random.key(config.seed))
        return meshes.place_everywhere(fresh, mesh), backbone.params

    def export(folder: pathlib.Path, params: dict, frozen: dict, training: Mapping) -> None:
        if jax.process_index() == 0:
            save_lora(folder, lora, params, backbone, training)

    settings = dataclasses.asdict(lora)
    identity = {"trained": "lora", "lora": settings, "backbone": backbone.fingerprint}
    return Job(LoraTraining(T5(backbone.config), lora), identity, start, "lora", export)


def _check_decoder(shape: T5Config) -> None:
    if not shape.has_decoder:
        raise ConfigError(f"Backbone {shape.name!r} has no decoder, so there is no task loss.")


def load_initial_backbone(config: TrainConfig, mesh: Mesh, dtype: str | None) -> Backbone:
    """Loads a run's backbone into its place on the mesh, if shape and vocabulary are the run's.

    One array at a time is in the host's memory, so a backbone may be larger than that. A LoRA is
    merged into each of them on its way.
    """
    if config.initial_checkpoint_path is None:
        raise ConfigError("A frozen backbone is needed: set INITIAL_CHECKPOINT_PATH to its folder.")
    folder, data, shape = backbone_folder(config.initial_checkpoint_path), config.data, config.shape
    source = open_backbone(folder)
    for field in _SHAPE_FIELDS:
        stored, expected = getattr(source.config, field), getattr(shape, field)
        if stored != expected:
            raise CheckpointError(
                f"{folder} holds a backbone of another shape: {source.config.name!r} has {field} "
                f"{stored}; this run's {shape.name!r} has {expected}."
            )
    check_vocabulary(data.task, data.vocabulary(), shape, source.vocabulary_file)
    loaded = load_on_mesh(source, mesh, dtype, config.initial_lora_path)
    # The norms' epsilon is part of what the weights mean; dtypes, dropout and remat are the run's.
    kept = dataclasses.replace(shape, layer_norm_epsilon=loaded.config.layer_norm_epsilon)
    return dataclasses.replace(loaded, config=kept)


def initial_plugin(path: str, config: PluginConfig, shape: T5Config) -> Plugin:
    """A pre-trained plugin to adapt. It may come from another backbone of the same shape.

    That is the paper's recipe: pre-training runs on the general backbone, adaptation on one that
    was fine-tuned from it.
    """
    folder = run_part(path, "plugin")
    loaded = load_plugin(folder)
    if loaded.config != config:
        found, asked = (
            f"'{each.description}', pool_padding={each.pool_padding}"
            for each in (loaded.config, config)
        )
        raise CheckpointError(
            f"The plugin in {folder} was trained with {found}; this run has {asked}."
        )
    check_shapes(f"The plugin in {folder}", loaded, Backbone(shape, {}, ""))
    return loaded
