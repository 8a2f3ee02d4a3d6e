"""Backbones and plugins on disk, in our own folders and in others' formats."""

from variator_jax.store.any_backbone import load_backbone
from variator_jax.store.backbone_folder import Backbone, save_backbone
from variator_jax.store.lora_folder import Lora, load_lora, save_lora
from variator_jax.store.lora_merge import with_lora
from variator_jax.store.official_file import load_official
from variator_jax.store.plugin_folder import Plugin, load_plugin, save_plugin
from variator_jax.store.plugin_set import load_plugins, save_plugins

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
