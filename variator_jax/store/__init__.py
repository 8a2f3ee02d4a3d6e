"""Backbones and plugins on disk, in our own folders and in others' formats."""

from variator_jax.store.backbone_folder import save_backbone
from variator_jax.store.formats import load_backbone
from variator_jax.store.lora import Lora, load_lora, save_lora, with_lora
from variator_jax.store.official import load_official
from variator_jax.store.plugin_folder import (
    Plugin,
    load_plugin,
    load_plugins,
    save_plugin,
    save_plugins,
)
from variator_jax.store.source import Backbone

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
