"""Backbones and plugins on disk, in our own folders and in others' formats."""

from variator_jax.checkpoints.backbone_folder import Backbone, load_backbone, save_backbone
from variator_jax.checkpoints.plugin_folder import Plugin, load_plugin, save_plugin

__all__ = [
    "Backbone",
    "Plugin",
    "load_backbone",
    "load_plugin",
    "save_backbone",
    "save_plugin",
]
