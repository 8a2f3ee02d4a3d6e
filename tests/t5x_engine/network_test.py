"""T5X's network under our splice, and how a run of it starts and steps."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from variator_jax.backbones.t5 import T5, Transformer
from variator_jax.data.vocabulary import byte_vocabulary
from variator_jax.errors import CheckpointError, ConfigError
from variator_jax.plugin import PluginConfig, splice

SETTINGS = PluginConfig(4, bottleneck=8)


@pytest.fixture(scope="module")
def spliced(shape, t5x_engine):
    network, stack = t5x_engine.network, T5(shape).stack()
    return network.SplicedTransformer(network.network_of(shape), SETTINGS, stack)


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
    model, library = spliced, Transformer(shape)

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
    shapes = {"encoder_input_tokens": (2, 8)}
    shapes |= dict.fromkeys(("decoder_input_tokens", "decoder_target_tokens"), (2, 4))
    parts = (model.optimizer_def, model.get_initial_variables, shapes, t5x_engine.partitioner())
    return t5x_engine.PluginInitializer(*parts).from_scratch(jax.random.key(0))


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


def test_a_fresh_run_whose_leaves_are_not_filled_or_of_another_dtype_is_refused(
    model, scratch, params, t5x_engine
):
    """Otherwise T5X would train beside whatever its fallback made."""
    state = types.SimpleNamespace(step=jnp.zeros((), jnp.int32), params=scratch.params)
    with pytest.raises(CheckpointError, match="INITIAL_CHECKPOINT_PATH left .*such as"):
        t5x_engine.PluginTrainer(
            model, state, num_microbatches=None, learning_rate_fn=lambda step: 0.0,
            partitioner=t5x_engine.partitioner(), eval_names=(), summary_dir=None,
            train_state_axes=None, rng=jax.random.key(0),
        )  # fmt: skip
    t5x_engine.trainer.verify(params)
    cast = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params["plugin"])
    with pytest.raises(CheckpointError, match="plugin's encoder/layers_0/mlp/.* is bfloat16"):
        t5x_engine.trainer.verify({**params, "plugin": cast})
