"""What a folder is, in a few lines for people: `variator inspect PATH`."""

from __future__ import annotations

import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from variator_jax.checkpoints import backbone_folder, plugin_folder
from variator_jax.errors import CheckpointError


def describe(path: str | os.PathLike) -> str:
    """Describes a backbone, a plugin or a run folder.

    Raises:
      CheckpointError: if the folder is missing, damaged or none of these.
    """
    folder = pathlib.Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"There is no folder {folder}.")
    if (folder / backbone_folder.DESCRIPTION).is_file():
        return _describe_backbone(folder)
    if (folder / plugin_folder.DESCRIPTION).is_file():
        return _describe_plugin(folder)
    parts = [name for name in ("backbone", "plugin") if (folder / name).is_dir()]
    steps = sorted(int(p.name) for p in (folder / "checkpoints").glob("*") if p.name.isdigit())
    if not parts and not steps:
        raise CheckpointError(
            f"{folder} is no backbone (backbone.json), no plugin (plugin.json) and no run folder."
        )
    lines = [f"run folder {folder}"]
    lines.append(f"  training checkpoints: {', '.join(map(str, steps)) or 'none'}")
    return "\n".join(lines + [describe(folder / part) for part in parts])


def _count(tree: object) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _listing(values: Mapping[str, Any]) -> str:
    shown = (f"{k} {v:.1f}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
    return ", ".join(shown) or "not recorded"


def _describe_backbone(folder: pathlib.Path) -> str:
    backbone = backbone_folder.load_backbone(folder)
    config = backbone.config
    return "\n".join(
        [
            f"backbone {config.name} in {folder}",
            f"  parameters:  {_count(backbone.params):,}",
            f"  shape:       {config.num_encoder_layers} encoder and {config.num_decoder_layers} "
            f"decoder layers, embed {config.embed_dim}, mlp {config.mlp_dim}, "
            f"{config.num_heads} heads of {config.head_dim}, vocabulary {config.vocab_size}",
            f"  feed-forward: {' * '.join(config.mlp_activations)}",
            f"  fingerprint: {backbone.fingerprint}",
            f"  vocabulary:  {backbone.vocabulary_fingerprint or 'none in the folder'}",
        ]
    )


def _describe_plugin(folder: pathlib.Path) -> str:
    plugin = plugin_folder.load_plugin(folder)
    config, owner = plugin.config, plugin.description["backbone"]
    quality = plugin.description.get("quality") or {}
    training = plugin.description.get("training") or {}
    return "\n".join(
        [
            f"compression plugin in {folder}",
            f"  ratio:       {config.ratio}",
            f"  parameters:  {_count(plugin.variables.params):,}",
            f"  layers:      {', '.join(plugin.variables.output_scales) or 'none'}",
            f"  method:      compression {config.compression}, decompression "
            f"{config.decompression}, bottleneck {config.bottleneck}",
            f"  sites:       {config.sites}",
            f"  fits:        backbone {owner['name']} with fingerprint {owner['fingerprint']}",
            f"  trained:     {_listing(training)}",
            f"  quality:     {_listing(quality)}",
        ]
    )
