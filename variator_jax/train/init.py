"""A compression plugin before its first step: fresh arrays in the units of its backbone."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from variator_jax import mesh as meshes
from variator_jax.backbones.base import Batch
from variator_jax.backbones.t5 import T5
from variator_jax.errors import CheckpointError
from variator_jax.files import write_file
from variator_jax.plugin import (
    PluginConfig,
    PluginVariables,
    calibrate,
    init_plugin,
    site_output_rms,
)
from variator_jax.store import Backbone
from variator_jax.train.settings import TrainConfig, check_trainable


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
            _keep_scales(file, rms)
    return calibrate(fresh, {name: jnp.float32(value) for name, value in rms.items()})


def measure_output_scales(
    backbone: T5, params: dict, plugin: PluginConfig, batches: Iterable[Batch]
) -> dict[str, np.ndarray]:
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
    if len(parts) == 1:
        return parts[0][0]
    tokens = max(sum(int(count) for _, count in parts), 1)

    def pooled(key: str) -> np.ndarray:
        # The RMS of a part without tokens is not a number.
        squares = (float(rms[key]) ** 2 * int(count) for rms, count in parts if count)
        return np.sqrt(np.float32(sum(squares) / tokens))

    return {key: pooled(key) for key in parts[0][0]}


def _kept_scales(file: pathlib.Path, names: Collection[str]) -> dict[str, np.ndarray] | None:
    """The keys' scales in a file as process 0 reads it, in every process; None without a file.

    Others may see an older state of a shared folder: a process that then measured alone would wait
    for the others in vain.
    """
    row: np.ndarray = np.zeros(1 + len(names), np.float32)
    if jax.process_index() == 0 and file.is_file():
        try:
            scales = json.loads(file.read_text(encoding="utf8"))
            row[:] = [1.0, *(scales[name] for name in names)]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{file} does not hold the output scales of this run's layers: {error!r}. A run "
                "keeps the units it began with; start again in another MODEL_DIR."
            ) from error
    flag, *values = meshes.from_first(row)
    return dict(zip(names, values, strict=True)) if flag else None


def _keep_scales(file: pathlib.Path, rms: Mapping[str, Any]) -> None:
    """Writes the scales atomically: a run that dies here leaves no file."""
    scales = {name: float(value) for name, value in rms.items()}
    write_file(file, f"{json.dumps(scales, indent=2)}\n".encode())
