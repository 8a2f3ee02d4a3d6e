"""The frozen backbone: T5 1.0 and 1.1 in Flax Linen. Nothing in here knows about plugins."""

from variator_jax.backbones.t5.config import CONFIGS, T5Config, get_config
from variator_jax.backbones.t5.network import Outputs, Transformer, init_params, shape_params

__all__ = [
    "CONFIGS",
    "Outputs",
    "T5Config",
    "Transformer",
    "get_config",
    "init_params",
    "shape_params",
]
