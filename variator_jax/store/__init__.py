"""Backbones and plugins on disk, in our own folders and in others' formats."""

from variator_jax.store.backbone import Backbone as Backbone
from variator_jax.store.backbone import save_backbone as save_backbone
from variator_jax.store.formats import load_backbone as load_backbone
from variator_jax.store.formats import load_plugins as load_plugins
from variator_jax.store.lora import Lora as Lora
from variator_jax.store.lora import load_lora as load_lora
from variator_jax.store.lora import save_lora as save_lora
from variator_jax.store.lora import with_lora as with_lora
from variator_jax.store.other_plugins import load_official as load_official
from variator_jax.store.plugins import Plugin as Plugin
from variator_jax.store.plugins import load_plugin as load_plugin
from variator_jax.store.plugins import save_plugin as save_plugin
from variator_jax.store.plugins import save_plugins as save_plugins
