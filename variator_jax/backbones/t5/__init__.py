"""The T5 family in Flax Linen: T5 1.0 and 1.1, mT5, ByT5, Flan-T5."""

from variator_jax.backbones.base import Outputs
from variator_jax.backbones.t5.backbone import T5
from variator_jax.backbones.t5.config import CONFIGS, T5Config, get_config
from variator_jax.backbones.t5.network import Transformer, init_params, shape_params

__all__ = [
    "CONFIGS",
    "Outputs",
    "T5",
    "T5Config",
    "Transformer",
    "get_config",
    "init_params",
    "shape_params",
]
