"""The frozen backbone: T5 1.0 and 1.1 in Flax Linen. Nothing in here knows about plugins."""

from variator_jax.backbone.config import CONFIGS, T5Config, get_config
from variator_jax.backbone.lora import LoraConfig
from variator_jax.backbone.network import Outputs, Transformer, init_params, shape_params

__all__ = [
    "CONFIGS",
    "LoraConfig",
    "Outputs",
    "T5Config",
    "Transformer",
    "get_config",
    "init_params",
    "shape_params",
]
