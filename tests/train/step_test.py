"""One step: what moves, what stays, what it costs; and the losses' treatment of padding."""

import functools

import jax
import numpy as np
import optax
import pytest
from tiny import TINY

from variator_jax.backbones.t5 import T5, init_params
from variator_jax.errors import ConfigError
from variator_jax.plugin import PluginConfig, init_plugin
from variator_jax.train.losses import LossConfig, cross_entropy, hidden_mse, logits_kl
from variator_jax.train.objectives import Distillation
from variator_jax.train.step import init_state, make_train_step

NETWORK = T5(TINY)
BACKBONE = init_params(TINY, jax.random.key(0))
PLUGIN = PluginConfig(4, bottleneck=8)
SGD = optax.sgd(0.1)
ALL_LOSSES = LossConfig(1.0, 1.0, 0.5, 0.5, temperature=2.0)


def _batch(rows=4, seed=0):
    """Rows of different lengths, so that padding would show if it counted."""
    rng = np.random.default_rng(seed)
    inputs = rng.integers(2, 128, (rows, 12)).astype(np.int32)
    targets = rng.integers(2, 128, (rows, 5)).astype(np.int32)
    for row in range(rows):
        inputs[row, 3 + 2 * row :] = 0
        targets[row, 1 + row :] = 0
    return {
        "encoder_input_tokens": inputs,
        "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
        "decoder_target_tokens": targets,
        "decoder_loss_weights": (targets > 0).astype(np.int32),
    }


@functools.cache
def _distillation(optimizer, losses=ALL_LOSSES, num_microbatches=1):
    plugin = init_plugin(PLUGIN, NETWORK.stack(), jax.random.key(1))
    objective = Distillation(NETWORK, PLUGIN, losses)
    state = init_state(plugin.params, optimizer)
    step = jax.jit(make_train_step(objective, optimizer, num_microbatches))
    return state, (BACKBONE, plugin.output_scales), step


def test_the_plugin_moves_lowers_its_loss_and_the_backbone_stays_bit_identical():
    state, frozen, step = _distillation(optax.adamw(1e-2, weight_decay=0.1))
    # The optimizer's state has the plugin's size: two moments and a counter.
    size = sum(x.size for x in jax.tree.leaves(state.params))
    assert sum(x.size for x in jax.tree.leaves(state.opt_state)) == 2 * size + 1
    before, backbone = jax.device_get((state.params, frozen))
    losses = []
    for _ in range(20):
        state, metrics = step(state, frozen, _batch())
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.95 * losses[0]
    jax.tree.map(np.testing.assert_array_equal, backbone, frozen)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(state.params), strict=True):
        assert (np.asarray(old) != np.asarray(new)).any()
    assert step._cache_size() == 1  # one trace for all steps


def test_microbatches_give_the_update_of_the_whole_batch():
    results = []
    for pieces in (1, 4):
        state, frozen, step = _distillation(SGD, num_microbatches=pieces)
        state, metrics = step(state, frozen, _batch())
        results.append((state.params, metrics))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=1e-6), *results)
    state, frozen, step = _distillation(SGD, num_microbatches=3)
    with pytest.raises(ConfigError, match="4 does not divide into 3"):
        step(state, frozen, _batch())


def test_padding_the_batch_changes_neither_loss_nor_gradient():
    state, frozen, step = _distillation(SGD)
    batch = _batch()
    padded = {name: np.pad(array, ((0, 0), (0, 7))) for name, array in batch.items()}
    plain, wide = (step(state, frozen, each)[1] for each in (batch, padded))
    for name in plain:
        np.testing.assert_allclose(plain[name], wide[name], rtol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_losses_ignore_what_is_masked(seed):
    rng = np.random.default_rng(seed)
    student, teacher = rng.normal(size=(2, 3, 4, 5)).astype(np.float32)
    mask = (rng.random((3, 4)) < 0.6).astype(np.int32)
    targets = rng.integers(0, 5, (3, 4))
    noise = np.where(mask[..., None] > 0, 0, rng.normal(size=student.shape)).astype(np.float32)
    for loss in (
        lambda s: hidden_mse(s, teacher, mask),
        lambda s: logits_kl(s, teacher, mask, 2.0),
        lambda s: cross_entropy(s, targets, mask),
    ):
        np.testing.assert_allclose(loss(student + noise), loss(student), rtol=1e-5)
    assert hidden_mse(student, student, mask)[0] == 0
    whole, half = hidden_mse(student, teacher, mask), hidden_mse(student, teacher, mask / 2)
    np.testing.assert_allclose(half, np.divide(whole, 2), rtol=1e-5)
    assert abs(float(logits_kl(student, student, mask)[0])) < 1e-5


@pytest.mark.parametrize("bad", [
    dict(encoder_hidden=-1.0), dict(encoder_hidden=0, decoder_hidden=0), dict(temperature=0),
])  # fmt: skip
def test_unusable_loss_weights_are_refused(bad):
    with pytest.raises(ConfigError):
        LossConfig(**bad)
