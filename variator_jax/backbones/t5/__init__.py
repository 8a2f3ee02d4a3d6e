"""The T5 family in Flax Linen: T5 1.0 and 1.1, mT5, ByT5, Flan-T5."""

from variator_jax.backbones.t5.backbone import T5 as T5
from variator_jax.backbones.t5.config import CONFIGS as CONFIGS
from variator_jax.backbones.t5.config import T5Config as T5Config
from variator_jax.backbones.t5.config import get_config as get_config
from variator_jax.backbones.t5.network import Transformer as Transformer
from variator_jax.backbones.t5.network import init_params as init_params
from variator_jax.backbones.t5.network import shape_params as shape_params
