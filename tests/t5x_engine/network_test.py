"""T5X's network under our splice: the library's numbers, T5X's own tree, axes for every leaf."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import traverse_util

from variator_jax.backbones.t5 import T5, Transformer
from variator_jax.plugin import PluginConfig, splice

SETTINGS = PluginConfig(4, bottleneck=8)


@pytest.fixture(scope="module")
def spliced(shape):
    """Makes the spliced network of a plugin's settings."""
    from variator_jax.t5x_engine.network import SplicedTransformer, network_of

    def make(settings=SETTINGS):
        return SplicedTransformer(network_of(shape), settings, T5(shape).stack())

    return make


@pytest.fixture(scope="module")
def variables(spliced):
    """What T5X's initialisation makes of it."""
    tokens = jnp.ones((2, 8), jnp.int32)
    return jax.jit(spliced().init)(jax.random.key(0), tokens, tokens, tokens)


@pytest.fixture(scope="module")
def plugin(shape):
    return tiny.random_plugin(SETTINGS, shape)


def tokens_of(length):
    """Three rows; the second ends early, the third is padding but for one token."""
    rng = np.random.default_rng(length)
    tokens = rng.integers(2, 380, (3, length)).astype(np.int32)
    tokens[1, (length + 1) // 2 :] = 0
    tokens[2, 1:] = 0
    return tokens, rng.integers(2, 380, (3, 5)).astype(np.int32)


@pytest.mark.parametrize("length", [1, 7, 15, 16])
def test_the_library_s_numbers_at_any_length(length, spliced, shape, backbone, plugin):
    from variator_jax.t5x_engine.plugin_branch import PLUGIN, to_tree

    inputs, targets = tokens_of(length)
    params = {**backbone.params, PLUGIN: to_tree(plugin)}
    model, library = spliced(), Transformer(shape)

    @functools.partial(jax.jit, static_argnames=("network", "compressed"))
    def t5x(params, network, **options):
        call = (inputs, targets, targets)
        return network.apply({"params": params}, *call, enable_dropout=False, **options)

    @jax.jit
    def ours(params, plugin):
        with splice(SETTINGS, plugin, inputs > 0):
            return library.apply({"params": params}, inputs, targets)

    found, expected = t5x(params, model), ours(backbone.params, plugin)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    teacher = t5x(params, model, compressed=False)
    np.testing.assert_array_equal(teacher, t5x(backbone.params, model.network))
    assert np.abs(found - teacher).max() > 0.01


def test_encode_and_decode_are_what_the_call_is(spliced, backbone, plugin):
    from variator_jax.t5x_engine.plugin_branch import PLUGIN, to_tree

    inputs, targets = tokens_of(15)
    params = {"params": {**backbone.params, PLUGIN: to_tree(plugin)}}
    model = spliced()

    @jax.jit
    def both(params):
        off = {"enable_dropout": False}
        encoded = model.apply(params, inputs, **off, method="encode")
        call = (inputs, targets, targets)
        whole = model.apply(params, *call, **off)
        return encoded, model.apply(params, encoded, *call, **off, method="decode"), whole

    encoded, logits, whole = both(params)
    assert encoded.shape == (3, 15, 32)
    np.testing.assert_allclose(logits, whole, rtol=1e-5, atol=1e-4)


def test_ratio_1_has_the_network_s_own_tree_and_numbers(spliced, backbone):
    inputs, targets = tokens_of(7)
    plain = spliced(PluginConfig(1))
    made = jax.eval_shape(plain.init, jax.random.key(0), inputs, targets, targets)
    own = jax.eval_shape(plain.network.init, jax.random.key(0), inputs, targets, targets)
    assert jax.tree.structure(made) == jax.tree.structure(own)
    params = {"params": backbone.params}
    call = functools.partial(jax.jit, static_argnums=0)(
        lambda network: network.apply(params, inputs, targets, targets, enable_dropout=False)
    )
    np.testing.assert_array_equal(call(plain), call(plain.network))


def test_the_tree_is_the_network_s_with_the_plugin_beside_it(spliced, variables):
    tokens = jnp.ones((2, 8), jnp.int32)
    own = jax.eval_shape(spliced().network.init, jax.random.key(0), tokens, tokens, tokens)
    found = traverse_util.flatten_dict(variables["params"], sep="/")
    expected = traverse_util.flatten_dict(own["params"], sep="/")
    beside = {name for name in found if name.startswith("plugin/")}
    assert {n: x.shape for n, x in found.items() if n not in beside} == {
        n: x.shape for n, x in expected.items()
    }
    prefixes = {"/".join(name.split("/")[:4]) for name in beside}
    assert prefixes == {f"plugin/encoder/layers_{i}/mlp" for i in range(2)}


def test_every_leaf_has_axes_that_the_partitioner_has_rules_for(variables):
    from variator_jax.t5x_engine import partitioner

    leaves = traverse_util.flatten_dict(variables["params"], sep="/")
    axes = traverse_util.flatten_dict(variables["params_axes"], sep="/")
    assert {f"{name}_axes" for name in leaves} == axes.keys()
    ruled = {name for name, _ in partitioner()._logical_axis_rules}
    for name, leaf in leaves.items():
        names = axes[f"{name}_axes"].names
        assert len(names) == leaf.ndim and set(names) <= ruled, name


def test_scanned_networks_are_refused_with_the_conversion(shape):
    import types

    from variator_jax.errors import ConfigError
    from variator_jax.t5x_engine.network import refuse_scanned

    scanned = types.SimpleNamespace(config=types.SimpleNamespace(scan_layers=True))
    with pytest.raises(ConfigError, match="variator convert --from t5x --to t5x"):
        refuse_scanned(scanned)
    refuse_scanned(types.SimpleNamespace(config=types.SimpleNamespace(scan_layers=False)))
