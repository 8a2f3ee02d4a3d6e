"""Compression plugins: configuration, arrays, merge groups, sites and the splice.

Nothing in here knows T5, checkpoints or training.
"""

from variator_jax.plugin.arrays import (
    PluginVariables,
    flops_allowed_speedup,
    flops_saved,
    init_plugin,
    plugin_parameters,
    plugin_specs,
    stack_flops,
)
from variator_jax.plugin.config import PluginConfig
from variator_jax.plugin.sites.ffn import ENCODER_MLP, Ffn
from variator_jax.plugin.sites.key_value import KeyValue
from variator_jax.plugin.sites.span import Span
from variator_jax.plugin.splice import (
    calibrate,
    check_causal,
    intercept_modules,
    site_output_rms,
    splice,
)

__all__ = [
    "ENCODER_MLP",
    "Ffn",
    "KeyValue",
    "PluginConfig",
    "PluginVariables",
    "Span",
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
