"""Backbones and plugins on disk, in our own folders and in others' formats."""

from variator_jax.checkpoints.any_backbone import load_backbone
from variator_jax.checkpoints.backbone_folder import Backbone, save_backbone
from variator_jax.checkpoints.lora_folder import Lora, load_lora, save_lora
from variator_jax.checkpoints.lora_merge import with_lora
from variator_jax.checkpoints.official_file import load_official
from variator_jax.checkpoints.plugin_folder import Plugin, load_plugin, save_plugin
from variator_jax.checkpoints.plugin_set import load_plugins, save_plugins

__all__ = [
    "Backbone",
    "Lora",
    "Plugin",
    "load_backbone",
    "load_lora",
    "load_official",
    "load_plugin",
    "load_plugins",
    "save_backbone",
    "save_lora",
    "save_plugin",
    "save_plugins",
    "with_lora",
]
