"""Tiny backbones, plugins and LoRAs of random numbers, made without compiling anything."""

import jax
import numpy as np

from variator_jax.backbones.lora import init_lora
from variator_jax.backbones.t5 import T5, get_config, shape_params
from variator_jax.plugin import init_plugin
from variator_jax.store.arrays import flatten as flat  # noqa: F401  (for tests)

#: The backbone of all tests that train, and of most others.
TINY = get_config(
    "nano", vocab_size=384, embed_dim=16, num_heads=2, head_dim=8, mlp_dim=32,
    num_encoder_layers=2, num_decoder_layers=1,
)  # fmt: skip


def random_params(config, seed=0):
    """Parameters of a backbone, as numpy arrays."""
    return _random(shape_params(config), seed)


def random_plugin(settings, config, seed=0):
    """Variables of a plugin on that backbone, with positive output scales."""
    stack = T5(config).stack()
    shapes = jax.eval_shape(lambda: init_plugin(settings, stack, jax.random.key(0)))
    found = _random(shapes, seed)
    return found.replace(output_scales=jax.tree.map(np.abs, found.output_scales))


def random_lora(config, params, seed=0):
    """A LoRA that changes every one of its weights of a backbone."""
    return _random(jax.eval_shape(lambda: init_lora(config, params, jax.random.key(0))), seed)


def _random(shapes, seed):
    rng = np.random.default_rng(seed)

    def draw(leaf):
        scale = 1 / np.sqrt(leaf.shape[0]) if len(leaf.shape) > 1 else 1.0
        return np.asarray(rng.normal(0.5, 1.0, leaf.shape) * scale, "f4")

    return jax.tree.map(draw, shapes)
