import jax
import jax.numpy as jnp
import numpy as np
import pytest

from variator_jax.backbones.t5 import Transformer, get_config, init_params
from variator_jax.errors import PluginError
from variator_jax.evaluation.control import skip_encoder_ffn

CONFIG = get_config("nano", num_encoder_layers=1, num_decoder_layers=1)
MODULE = Transformer(CONFIG)
TOKENS = jnp.arange(2, 18).reshape(2, 8)


@pytest.fixture(scope="module")
def params():
    return init_params(CONFIG, jax.random.key(0))


def silenced(params, stack):
    """The same parameters with the output kernels of a stack's FFNs set to zero."""

    def silence(path, leaf):
        names = [key.key for key in path]
        return leaf * 0 if names[0] == stack and names[-3:-1] == ["mlp", "wo"] else leaf

    return jax.tree_util.tree_map_with_path(silence, params)


def test_skipping_equals_encoder_ffns_that_put_out_zero(params):
    with skip_encoder_ffn():
        skipped = MODULE.apply({"params": params}, TOKENS, TOKENS)
    expected = MODULE.apply({"params": silenced(params, "encoder")}, TOKENS, TOKENS)
    np.testing.assert_array_equal(skipped, expected)
    plain = MODULE.apply({"params": params}, TOKENS, TOKENS)
    assert not np.allclose(plain, expected)
    assert not np.allclose(
        plain, MODULE.apply({"params": silenced(params, "decoder")}, TOKENS, TOKENS)
    )


def test_a_pattern_without_a_site_is_told_with_the_paths(params):
    with pytest.raises(PluginError, match="encoder/layers_0/mlp"):
        with skip_encoder_ffn(r"encoder/block_(\d+)/ffn"):
            MODULE.apply({"params": params}, TOKENS, method="encode")


def test_a_function_that_was_compiled_before_is_noticed(params):
    encode = jax.jit(lambda params: MODULE.apply({"params": params}, TOKENS, method="encode"))
    encode(params)
    with pytest.raises(PluginError, match="inside the function that is jitted"):
        with skip_encoder_ffn():
            encode(params)
