"""How a T5X run starts and steps: frozen leaves stay, leaves that nothing restored are named."""

import types

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from variator_jax.data.vocabulary import byte_vocabulary
from variator_jax.errors import CheckpointError
from variator_jax.plugin import PluginConfig

SETTINGS = PluginConfig(4, bottleneck=8)


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
def params(backbone, shape, t5x_engine):
    plugin = t5x_engine.network.to_tree(tiny.random_plugin(SETTINGS, shape))
    return flax.core.freeze({**backbone.params, "plugin": plugin})


def test_the_backbone_starts_as_nan_that_takes_no_memory_and_the_rest_is_real(
    scratch, model, t5x_engine
):
    backbone = scratch.params.unfreeze()
    plugin = backbone.pop("plugin")
    for leaf in jax.tree.leaves(backbone):
        assert isinstance(leaf, np.ndarray) and set(leaf.strides) <= {0} and np.isnan(leaf).all()
    branch = t5x_engine.network
    started = branch.to_tree(branch.start_values(model.start))
    jax.tree.map(np.testing.assert_array_equal, plugin, started)
    for leaf in jax.tree.leaves(scratch.param_states):
        assert isinstance(leaf, jax.Array) and bool(jnp.isfinite(leaf).all())


def test_leaves_that_nothing_filled_or_of_another_dtype_are_named(scratch, params, t5x_engine):
    verify = t5x_engine.trainer.verify
    verify(params)
    broken = params.unfreeze()
    broken["encoder"]["layers_1"]["mlp"] = scratch.params["encoder"]["layers_1"]["mlp"]
    with pytest.raises(CheckpointError, match="3 of .*encoder/layers_1/mlp/wi_0/kernel"):
        verify(broken)
    cast = params.unfreeze()
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


def test_frozen_leaves_are_handed_through_to_the_sign_of_a_zero(model, params):
    optimizer = model.optimizer_def
    gradients = jax.tree.map(jnp.ones_like, params)
    apply = jax.jit(optimizer.apply_gradient, static_argnums=0)
    stepped, _ = apply(None, params, optimizer.init_state(params), gradients)
    assert np.signbit(stepped["encoder"]["encoder_norm"]["scale"][0])
    before, after = (
        flax.traverse_util.flatten_dict(tree.unfreeze(), sep="/") for tree in (params, stepped)
    )
    for name, leaf in after.items():
        trained = name.startswith("plugin/") and not name.endswith("/output_scale")
        assert (np.asarray(leaf).tobytes() != np.asarray(before[name]).tobytes()) == trained, name
