import jax
import jax.numpy as jnp
import optax
import pytest

from variator_jax.backbones.t5 import T5Config, Transformer
from variator_jax.backbones.t5.cost import encoder_flops
from variator_jax.backbones.t5.network import shape_params
from variator_jax.bench.step_cost import decoder_flops, distillation_flops
from variator_jax.errors import ConfigError
from variator_jax.plugin import PluginConfig, init_plugin
from variator_jax.train.losses import LossConfig
from variator_jax.train.objectives import Distillation
from variator_jax.train.step import TrainState, make_train_step

WIDE = T5Config("wide", 64, 256, 4, 64, 1024, 3, 2, mlp_activations=("gelu", "linear"))


def compiled_flops(config, plugin, batch, length, targets):
    """XLA's own count of the step that is trained, from shapes alone."""
    fresh = jax.eval_shape(
        lambda: init_plugin(plugin, config.num_encoder_layers, config.embed_dim, jax.random.key(0))
    )
    optimizer = optax.sgd(1e-3)
    step = make_train_step(Distillation(Transformer(config), plugin, LossConfig()), optimizer)
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    decoder = jax.ShapeDtypeStruct((batch, targets), jnp.int32)
    names = ("input_tokens", "target_tokens", "loss_weights")
    rows = {"encoder_input_tokens": tokens} | {f"decoder_{name}": decoder for name in names}
    state = TrainState(
        jax.ShapeDtypeStruct((), jnp.int32), fresh.params, optimizer.init(fresh.params)
    )
    frozen = (shape_params(config), fresh.output_scales)
    return jax.jit(step).lower(state, frozen, rows).compile().cost_analysis()["flops"]


@pytest.mark.parametrize("ratio, layers", [(4, None), (2, (1, 2))])
def test_the_formula_is_the_compiled_steps_count(ratio, layers):
    plugin = PluginConfig(ratio, layers=layers)
    found = distillation_flops(WIDE, plugin, batch=2, length=64, targets=16)
    counted = compiled_flops(WIDE, plugin, 2, 64, 16)
    # What lies below the first plugin is the same in teacher and student, and XLA runs it once.
    embed, joined = WIDE.embed_dim, WIDE.num_heads * WIDE.head_dim
    attention = lambda rows: rows * (8 * embed * joined + 4 * rows * joined)  # noqa: E731
    ffn = 64 * 6 * embed * WIDE.mlp_dim
    lowest = 0 if layers is None else min(layers)
    shared = 2 * ((lowest + 1) * attention(64) + lowest * ffn + attention(16))
    assert counted == pytest.approx(found.total - shared, rel=0.03)


def test_parts_of_a_step():
    plugin = PluginConfig(4)
    found = distillation_flops(WIDE, plugin, 2, 64, 16)
    decoder = decoder_flops(WIDE, 64, 16)
    assert found.teacher == 2 * (encoder_flops(WIDE, 64, 1) + decoder)
    assert found.student == 2 * (encoder_flops(WIDE, 64, 4) + decoder)
    assert found.total == found.teacher + found.student + found.backward
    # Frozen weights get no gradients: backwards costs far less than twice the forward pass.
    assert found.backward < 1.4 * found.student


def test_an_encoder_alone_has_no_decoder_to_pay():
    alone = T5Config("alone", 64, 256, 4, 64, 1024, 3, 0)
    assert decoder_flops(alone, 64, 16) == 0
    found = distillation_flops(alone, PluginConfig(4), 1, 64, 16)
    assert found.teacher == encoder_flops(alone, 64, 1)


def test_nothing_to_train_is_told():
    with pytest.raises(ConfigError, match="compresses no layer"):
        distillation_flops(WIDE, PluginConfig(1), 1, 64, 16)
    with pytest.raises(ConfigError, match="positive number of targets"):
        distillation_flops(WIDE, PluginConfig(2), 1, 64, 0)
