"""How a T5X run starts and steps: what is frozen stays, what is not restored is found out."""

import types

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
def model(shape):
    from variator_jax import t5x_engine

    return t5x_engine.model(
        backbone=shape,
        plugin=SETTINGS,
        vocabulary=byte_vocabulary(),
        optimizer=optax.adamw(1e-2, weight_decay=0.1),
    )


@pytest.fixture(scope="module")
def initializer(model):
    from variator_jax import t5x_engine

    shapes = {"encoder_input_tokens": (2, 8), "decoder_input_tokens": (2, 4)}
    return t5x_engine.PluginInitializer(
        optimizer_def=model.optimizer_def,
        init_fn=model.get_initial_variables,
        input_shapes={**shapes, "decoder_target_tokens": (2, 4)},
        partitioner=t5x_engine.partitioner(),
    )


@pytest.fixture(scope="module")
def scratch(initializer):
    return initializer.from_scratch(jax.random.key(0))


@pytest.fixture
def params(backbone, shape):
    import flax

    from variator_jax.t5x_engine.plugin_branch import PLUGIN, to_tree

    plugin = tiny.random_plugin(SETTINGS, shape)
    return flax.core.freeze({**backbone.params, PLUGIN: to_tree(plugin)})


class TestFromScratch:
    def test_the_backbone_is_nan_that_takes_no_memory(self, scratch):
        for stack in ("encoder", "decoder", "token_embedder"):
            for leaf in jax.tree.leaves(scratch.params[stack]):
                assert isinstance(leaf, np.ndarray) and set(leaf.strides) <= {0}
                assert np.isnan(leaf).all()

    def test_the_plugin_and_the_optimizer_s_state_are_real(self, scratch, model):
        from variator_jax.t5x_engine.plugin_branch import start_values, to_tree

        started = to_tree(start_values(model.start))
        found = scratch.params.unfreeze()["plugin"]
        jax.tree.map(np.testing.assert_array_equal, found, started)
        for leaf in jax.tree.leaves(scratch.param_states):
            assert isinstance(leaf, jax.Array) and bool(jnp.isfinite(leaf).all())


class TestVerify:
    def test_leaves_that_nothing_filled_are_named(self, scratch, params):
        from variator_jax.t5x_engine.trainer import verify

        verify(params)
        broken = params.unfreeze()
        broken["encoder"]["layers_1"]["mlp"] = scratch.params["encoder"]["layers_1"]["mlp"]
        with pytest.raises(CheckpointError, match="3 of .*encoder/layers_1/mlp/wi_0/kernel"):
            verify(broken)

    def test_a_plugin_in_another_dtype_is_named(self, params):
        from variator_jax.t5x_engine.trainer import verify

        cast = params.unfreeze()
        cast["plugin"] = jax.tree.map(lambda x: x.astype(jnp.bfloat16), cast["plugin"])
        with pytest.raises(CheckpointError, match="plugin's encoder/layers_0/mlp/.* is bfloat16"):
            verify(cast)

    def test_a_trainer_of_a_fresh_run_verifies(self, model, scratch):
        """Without it T5X would train beside whatever its fallback made."""
        from variator_jax import t5x_engine

        step = types.SimpleNamespace(step=jnp.zeros((), jnp.int32), params=scratch.params)
        with pytest.raises(CheckpointError, match="INITIAL_CHECKPOINT_PATH left"):
            t5x_engine.PluginTrainer(
                model, step, num_microbatches=None, learning_rate_fn=lambda step: 0.0,
                partitioner=t5x_engine.partitioner(), eval_names=(), summary_dir=None,
                train_state_axes=None, rng=jax.random.key(0),
            )  # fmt: skip


class TestOptimizer:
    def test_state_is_the_plugin_s_alone(self, model, params):
        state = model.optimizer_def.init_state(params)
        sizes = [leaf.size for leaf in jax.tree.leaves(state.param_states)]
        plugin = jax.tree.leaves(dict(params["plugin"]))
        trained = sum(leaf.size for leaf in plugin if leaf.ndim)  # scales have no dimension
        assert sum(size for size in sizes if size > 1) == 2 * trained

    def test_frozen_leaves_are_handed_through_to_the_sign_of_a_zero(self, model, params):
        state = model.optimizer_def.init_state(params)
        gradients = jax.tree.map(jnp.ones_like, params)
        found, _ = jax.jit(model.optimizer_def.apply_gradient, static_argnums=0)(
            None, params, state, gradients
        )
        assert np.signbit(found["encoder"]["encoder_norm"]["scale"][0])
        for path, leaf in jax.tree_util.tree_leaves_with_path(found):
            names = [key.key for key in path]
            before = params
            for name in names:
                before = before[name]
            moves = names[0] == "plugin" and names[-1] != "output_scale"
            assert (np.asarray(leaf).tobytes() != np.asarray(before).tobytes()) == moves, names
