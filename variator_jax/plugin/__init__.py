"""Compression plugins in pure Linen: hidden compression, hidden decompression and the splice.

Nothing in here knows T5, checkpoints or training.
"""

from variator_jax.plugin.arrays import PluginVariables, init_plugin, layer_name
from variator_jax.plugin.calibration import calibrate, site_output_rms
from variator_jax.plugin.config import ENCODER_MLP, PluginConfig
from variator_jax.plugin.sites.ffn import HiddenCompression, HiddenDecompression, PluginLayer
from variator_jax.plugin.splice import splice, surround_sites

__all__ = [
    "ENCODER_MLP",
    "HiddenCompression",
    "HiddenDecompression",
    "PluginConfig",
    "PluginLayer",
    "PluginVariables",
    "calibrate",
    "init_plugin",
    "layer_name",
    "site_output_rms",
    "splice",
    "surround_sites",
]
