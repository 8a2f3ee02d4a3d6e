"""Compression plugins: configuration, arrays, merge groups, sites and the splice.

Nothing in here knows T5, checkpoints or training.
"""

from variator_jax.plugin.arrays import (
    PluginVariables,
    init_plugin,
    plugin_parameters,
    plugin_specs,
)
from variator_jax.plugin.calibration import calibrate, site_output_rms
from variator_jax.plugin.config import PluginConfig
from variator_jax.plugin.cost import flops_allowed_speedup, flops_saved, stack_flops
from variator_jax.plugin.sites.ffn import ENCODER_MLP, Ffn
from variator_jax.plugin.splice import check_causal, intercept_modules, splice

__all__ = [
    "ENCODER_MLP",
    "Ffn",
    "PluginConfig",
    "PluginVariables",
    "calibrate",
    "check_causal",
    "flops_allowed_speedup",
    "flops_saved",
    "init_plugin",
    "intercept_modules",
    "plugin_parameters",
    "plugin_specs",
    "site_output_rms",
    "splice",
    "stack_flops",
]
