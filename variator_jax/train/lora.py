"""A run that trains a LoRA: the backbone stays frozen, and learns a task through A and B alone.

The arrays and the merge are `backbone/lora.py`'s; the step and the loop are those of every run.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from variator_jax import mesh as meshes
from variator_jax.backbones.lora import LoraConfig, init_lora, lora_weights, merge_lora
from variator_jax.backbones.t5 import T5Config, Transformer
from variator_jax.errors import ConfigError
from variator_jax.store import save_lora
from variator_jax.train.data import DataConfig
from variator_jax.train.jobs import Job, load_initial_backbone
from variator_jax.train.objectives import Batch, TaskTraining


class LoraTraining:
    """The task's own cross-entropy: `trained` is A and B, `frozen` is the backbone's parameters."""

    coefficients: Mapping[str, float] = TaskTraining.coefficients

    def __init__(self, module: Transformer, config: LoraConfig) -> None:
        self._task, self._config = TaskTraining(module), config

    def weights(self, batch: Batch) -> dict[str, jax.Array]:
        """Valid positions of the targets."""
        return self._task.weights(batch)

    def terms(
        self, trained: dict, frozen: dict, batch: Batch, rng: jax.Array | None
    ) -> dict[str, jax.Array]:
        """Those of `TaskTraining` on the merged weights, which is what will be served."""
        merged = merge_lora(frozen, trained, self._config)
        return self._task.terms(merged, None, batch, rng)


def lora_job(
    model_dir: str,
    config: T5Config,
    initial_checkpoint_path: str | None,
    lora: LoraConfig,
    data: DataConfig,
    seed: int,
    mesh: Mesh,
    backbone_dtype: str | None = None,
) -> Job:
    """Trains a fresh LoRA of a frozen backbone on the task's own loss."""
    if initial_checkpoint_path is None:
        raise ConfigError(
            "A LoRA is trained on a backbone: set INITIAL_CHECKPOINT_PATH to its folder."
        )
    if not config.has_decoder:
        raise ConfigError(
            f"Backbone {config.name!r} has no decoder, and so no task's loss to train a LoRA by."
        )
    backbone = load_initial_backbone(initial_checkpoint_path, config, data, mesh, backbone_dtype)
    lora_weights(lora, backbone.params)  # refuses now a site that matches nothing

    def start() -> tuple[dict, dict]:
        everywhere = meshes.replicated(mesh)
        fresh = init_lora(lora, backbone.params, jax.random.key(seed))
        return jax.tree.map(lambda x: meshes.place(x, everywhere), fresh), backbone.params

    def export(params: dict, frozen: dict, training: Mapping[str, Any]) -> pathlib.Path:
        folder = pathlib.Path(model_dir) / "lora"
        if jax.process_index() == 0:
            save_lora(folder, lora, params, backbone, training)
        return folder

    identity = {
        "trained": "lora",
        "lora": dataclasses.asdict(lora),
        "backbone": backbone.fingerprint,
    }
    return Job(LoraTraining(Transformer(backbone.config), lora), identity, start, export)
