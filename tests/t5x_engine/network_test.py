"""T5X's network under our splice, and how a run of it starts and steps."""

import functools
import types

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from flax import traverse_util

from variator_jax.backbones.t5 import T5, Transformer
from variator_jax.data.vocabulary import byte_vocabulary
from variator_jax.errors import CheckpointError, ConfigError
from variator_jax.plugin import PluginConfig, splice

SETTINGS = PluginConfig(4, bottleneck=8)
TOKENS = jnp.ones((2, 8), jnp.int32)


@pytest.fixture(scope="module")
def spliced(shape, t5x_engine):
    """Makes the spliced network of a plugin's settings."""
    network = t5x_engine.network

    def make(settings=SETTINGS):
        stack = T5(shape).stack()
        return network.SplicedTransformer(network.network_of(shape), settings, stack)

    return make


@pytest.fixture(scope="module")
def variables(spliced):
    """What T5X's initialisation makes of it."""
    return jax.jit(spliced().init)(jax.random.key(0), TOKENS, TOKENS, TOKENS)


@pytest.fixture(scope="module")
def plugin(shape):
    return tiny.random_plugin(SETTINGS, shape)


@pytest.fixture(scope="module")
def params(backbone, plugin, t5x_engine):
    """The backbone's parameters with the plugin's branch."""
    return {**backbone.params, "plugin": t5x_engine.network.to_tree(plugin)}


def tokens_of(length):
    """Three rows; the second ends early, the third is padding but for one token."""
    rng = np.random.default_rng(length)
    tokens = rng.integers(2, 380, (3, length)).astype(np.int32)
    tokens[1, (length + 1) // 2 :] = 0
    tokens[2, 1:] = 0
    return tokens, rng.integers(2, 380, (3, 5)).astype(np.int32)


@functools.partial(jax.jit, static_argnames=("network", "compressed"))
def logits_of(params, network, inputs, targets, **options):
    tokens = (inputs, targets, targets)
    return network.apply({"params": params}, *tokens, enable_dropout=False, **options)


@pytest.mark.parametrize("length", [1, 7, 15, 16])
def test_the_library_s_numbers_at_any_length(length, spliced, shape, backbone, plugin, params):
    inputs, targets = tokens_of(length)
    model, library = spliced(), Transformer(shape)

    @jax.jit
    def ours(params, plugin):
        with splice(SETTINGS, plugin, inputs > 0):
            return library.apply({"params": params}, inputs, targets)

    logits, expected = logits_of(params, model, inputs, targets), ours(backbone.params, plugin)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    teacher = logits_of(params, model, inputs, targets, compressed=False)
    alone = logits_of(backbone.params, model.network, inputs, targets)
    np.testing.assert_array_equal(teacher, alone)
    assert np.abs(logits - teacher).max() > 0.01


def test_encode_and_decode_are_what_the_call_is(spliced, params):
    inputs, targets = tokens_of(15)
    model, off = spliced(), {"enable_dropout": False}

    @jax.jit
    def in_two_steps(params):
        encoded = model.apply({"params": params}, inputs, **off, method="encode")
        tokens = (inputs, targets, targets)
        return encoded, model.apply({"params": params}, encoded, *tokens, **off, method="decode")

    encoded, logits = in_two_steps(params)
    assert encoded.shape == (3, 15, 32)
    at_once = logits_of(params, model, inputs, targets)
    np.testing.assert_allclose(logits, at_once, rtol=1e-5, atol=1e-4)


def test_ratio_1_has_the_network_s_own_tree_and_numbers(spliced, backbone):
    plain = spliced(PluginConfig(1))
    trees = [
        jax.eval_shape(network.init, jax.random.key(0), TOKENS, TOKENS, TOKENS)
        for network in (plain, plain.network)
    ]
    assert jax.tree.structure(trees[0]) == jax.tree.structure(trees[1])
    logits, expected = (
        logits_of(backbone.params, network, *tokens_of(7)) for network in (plain, plain.network)
    )
    np.testing.assert_array_equal(logits, expected)


def test_the_tree_is_the_network_s_with_a_branch_for_the_plugin(spliced, variables):
    host = jax.eval_shape(spliced().network.init, jax.random.key(0), TOKENS, TOKENS, TOKENS)
    params = dict(variables["params"])
    branch = traverse_util.flatten_dict(params.pop("plugin"))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, dict(host["params"]))
    assert {path[:3] for path in branch} == {("encoder", f"layers_{i}", "mlp") for i in range(2)}


def test_every_leaf_has_axes_that_the_partitioner_has_rules_for(variables, t5x_engine):
    leaves = traverse_util.flatten_dict(variables["params"], sep="/")
    axes = traverse_util.flatten_dict(variables["params_axes"], sep="/")
    assert {f"{name}_axes" for name in leaves} == axes.keys()
    ruled = {name for name, _ in t5x_engine.partitioner()._logical_axis_rules}
    for name, leaf in leaves.items():
        names = axes[f"{name}_axes"].names
        assert len(names) == leaf.ndim and set(names) <= ruled, name


def test_scanned_networks_are_refused_with_the_conversion(t5x_engine):
    scanned = types.SimpleNamespace(config=types.SimpleNamespace(scan_layers=True))
    with pytest.raises(ConfigError, match="variator convert --from t5x --to t5x"):
        t5x_engine.network.refuse_scanned(scanned)


# How a run starts and steps.


@pytest.fixture(scope="module")
def model(shape, t5x_engine):
    optimizer = optax.adamw(1e-2, weight_decay=0.1)
    return t5x_engine.model(
        backbone=shape, plugin=SETTINGS, vocabulary=byte_vocabulary(), optimizer=optimizer
    )


@pytest.fixture(scope="module")
def scratch(model, t5x_engine):
    """The train state before anything is restored."""
    shapes = {"encoder_input_tokens": (2, 8), "decoder_input_tokens": (2, 4)}
    initializer = t5x_engine.PluginInitializer(
        optimizer_def=model.optimizer_def,
        init_fn=model.get_initial_variables,
        input_shapes={**shapes, "decoder_target_tokens": (2, 4)},
        partitioner=t5x_engine.partitioner(),
    )
    return initializer.from_scratch(jax.random.key(0))


@pytest.fixture(scope="module")
def state_params(params):
    """The parameters as a train state has them."""
    return flax.core.freeze(params)


def test_the_backbone_starts_as_nan_that_takes_no_memory_and_the_rest_is_real(
    scratch, model, t5x_engine
):
    backbone = scratch.params.unfreeze()
    plugin = backbone.pop("plugin")
    for leaf in jax.tree.leaves(backbone):
        assert isinstance(leaf, np.ndarray) and set(leaf.strides) <= {0} and np.isnan(leaf).all()
    started = t5x_engine.network.to_tree(model.start.values())
    jax.tree.map(np.testing.assert_array_equal, plugin, started)
    for leaf in jax.tree.leaves(scratch.param_states):
        assert isinstance(leaf, jax.Array) and bool(jnp.isfinite(leaf).all())


def test_leaves_that_nothing_filled_or_of_another_dtype_are_named(
    scratch, state_params, t5x_engine
):
    verify = t5x_engine.trainer.verify
    verify(state_params)
    broken = state_params.unfreeze()
    broken["encoder"]["layers_1"]["mlp"] = scratch.params["encoder"]["layers_1"]["mlp"]
    with pytest.raises(CheckpointError, match="3 of .*encoder/layers_1/mlp/wi_0/kernel"):
        verify(broken)
    cast = state_params.unfreeze()
    cast["plugin"] = jax.tree.map(lambda x: x.astype(jnp.bfloat16), cast["plugin"])
    with pytest.raises(CheckpointError, match="plugin's encoder/layers_0/mlp/.* is bfloat16"):
        verify(cast)


def test_a_trainer_of_a_fresh_run_verifies(model, scratch, t5x_engine):
    """Otherwise T5X would train beside whatever its fallback made."""
    state = types.SimpleNamespace(step=jnp.zeros((), jnp.int32), params=scratch.params)
    with pytest.raises(CheckpointError, match="INITIAL_CHECKPOINT_PATH left"):
        t5x_engine.PluginTrainer(
            model, state, num_microbatches=None, learning_rate_fn=lambda step: 0.0,
            partitioner=t5x_engine.partitioner(), eval_names=(), summary_dir=None,
            train_state_axes=None, rng=jax.random.key(0),
        )  # fmt: skip


def test_frozen_leaves_are_handed_through_to_the_sign_of_a_zero(model, state_params):
    optimizer = model.optimizer_def
    gradients = jax.tree.map(jnp.ones_like, state_params)
    apply = jax.jit(optimizer.apply_gradient, static_argnums=0)
    stepped, _ = apply(None, state_params, optimizer.init_state(state_params), gradients)
    assert np.signbit(stepped["encoder"]["encoder_norm"]["scale"][0])
    before, after = (
        flax.traverse_util.flatten_dict(tree.unfreeze(), sep="/")
        for tree in (state_params, stepped)
    )
    for name, leaf in after.items():
        trained = name.startswith("plugin/") and not name.endswith("/output_scale")
        assert (np.asarray(leaf).tobytes() != np.asarray(before[name]).tobytes()) == trained, name
