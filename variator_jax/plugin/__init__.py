"""Compression plugins: configuration, arrays, merge groups, sites and the splice.

Nothing in here knows T5, checkpoints or training.
"""

from variator_jax.plugin.arrays import PluginVariables as PluginVariables
from variator_jax.plugin.arrays import flops_allowed_speedup as flops_allowed_speedup
from variator_jax.plugin.arrays import flops_saved as flops_saved
from variator_jax.plugin.arrays import init_plugin as init_plugin
from variator_jax.plugin.arrays import plugin_parameters as plugin_parameters
from variator_jax.plugin.arrays import plugin_specs as plugin_specs
from variator_jax.plugin.arrays import stack_flops as stack_flops
from variator_jax.plugin.config import PluginConfig as PluginConfig
from variator_jax.plugin.sites.ffn import Ffn as Ffn
from variator_jax.plugin.sites.key_value import KeyValue as KeyValue
from variator_jax.plugin.sites.span import Span as Span
from variator_jax.plugin.splice import calibrate as calibrate
from variator_jax.plugin.splice import check_causal as check_causal
from variator_jax.plugin.splice import intercept_modules as intercept_modules
from variator_jax.plugin.splice import site_output_rms as site_output_rms
from variator_jax.plugin.splice import splice as splice
