"""The losses at a plugin's sites, against their definitions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import TINY, random_params, random_plugin

from variator_jax.backbones.t5 import T5
from variator_jax.errors import ConfigError
from variator_jax.model import SplicedModel
from variator_jax.plugin import PluginConfig
from variator_jax.train import losses
from variator_jax.train.losses import LossConfig
from variator_jax.train.objectives import Distillation, TeacherStudent

PARAMS = random_params(TINY)
TOKENS = np.random.default_rng(0).integers(2, 384, (2, 10))
TOKENS[0, 7:] = 0
BATCH = dict.fromkeys(("decoder_input_tokens", "decoder_target_tokens"), jnp.asarray(TOKENS[:, :3]))
BATCH |= {"encoder_input_tokens": jnp.asarray(TOKENS), "decoder_loss_weights": jnp.ones((2, 3))}
ONLY = {"encoder_hidden": 0, "decoder_hidden": 0}
PLUGINS = {
    "ffn": PluginConfig(4),
    "span": PluginConfig(sites=("span all x4 rank=2",)),
    "mixed": PluginConfig(sites=("ffn 0 x2", "kv 0 x2", "span 1 x3")),
}


def _terms(plugin, variables, remat=False, **weights):
    network = T5(dataclasses.replace(TINY, remat=remat))
    objective = Distillation(network, plugin, LossConfig(**ONLY, **weights))

    @jax.jit
    def loss(params):
        terms = objective.terms(params, (PARAMS, variables.output_scales), BATCH, None)
        return sum(terms.values()), (terms, objective.weights(BATCH))

    (_, found), gradient = jax.value_and_grad(loss, has_aux=True)(variables.params)
    return *found, gradient


def _captured(plugin, variables, paths):
    return SplicedModel(T5(TINY), plugin).apply(PARAMS, variables, BATCH, capture=paths).hidden


@pytest.mark.parametrize("name, layers", [("ffn", (0, 1)), ("span", (1,)), ("mixed", (0, 1))])
def test_the_residual_stream_is_compared_behind_each_site(name, layers):
    plugin = PLUGINS[name]
    variables = random_plugin(plugin, TINY)
    terms, weights, _ = _terms(plugin, variables, residual=1.0)
    paths = [f"encoder/layers_{layer}" for layer in layers]
    student, teacher = _captured(plugin, variables, paths), _captured(None, None, paths)
    expected = 0.0
    for path in paths:
        error = np.square(student[path] - teacher[path]).mean(-1)
        expected += (error / np.square(teacher[path]).mean(-1))[TOKENS > 0].sum()
    np.testing.assert_allclose(terms["residual"], expected, rtol=1e-4)
    assert weights["residual"] == len(layers) * (TOKENS > 0).sum()


def test_merged_neurons_are_compared_with_the_mean_of_their_members():
    plugin = PluginConfig(4, compression="mean", layers=(1,))
    variables = random_plugin(plugin, TINY)
    terms, weights, _ = _terms(plugin, variables, neurons=1.0)
    path = "encoder/layers_1/mlp/Dropout_0"
    student, teacher = (
        np.asarray(_captured(*model, [path])[path]) for model in ((plugin, variables), (None, None))
    )
    expected, members = 0.0, np.pad(TOKENS > 0, ((0, 0), (0, 2))).reshape(2, 3, 4)
    for row, group in np.argwhere(members.any(-1)):
        mean = teacher[row, 4 * group :][:4][members[row, group][: 10 - 4 * group]].mean(0)
        error = np.square(student[row, group] - mean).mean()
        expected += error / np.square(mean).mean()
    np.testing.assert_allclose(terms["neurons"], expected, rtol=1e-4)
    assert weights["neurons"] == members.any(-1).sum() == 5


def test_a_loss_without_anything_to_compare_is_refused_beside_others_too():
    plugin = PluginConfig(sites=("kv all x2",))
    for others in (ONLY, {}, {"residual": 1.0}):
        with pytest.raises(ConfigError, match="NEURONS_LOSS is 1.0, .*kv all x2.* set it to 0"):
            Distillation(T5(TINY), plugin, LossConfig(**others, neurons=1.0))


@pytest.mark.parametrize("name", PLUGINS)
def test_rematerialised_layers_give_the_same_losses_and_gradients(name):
    plugin = PLUGINS[name]
    variables = random_plugin(plugin, TINY)
    plain, again = (
        _terms(plugin, variables, remat, residual=1.0, neurons=1.0) for remat in (False, True)
    )
    for one, other in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4 * np.abs(one).max())
    assert any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(plain[2]))


def test_the_pooled_loss_is_one_minus_the_cosine_of_each_texts_mean():
    plugin = PLUGINS["ffn"]
    variables = random_plugin(plugin, TINY)
    terms, weights, gradient = _terms(plugin, variables, pooled=1.0)
    student, teacher = _captured(plugin, variables, ()), _captured(None, None, ())
    expected = 0.0
    for row, tokens in enumerate(TOKENS > 0):
        ours, theirs = (np.asarray(x["encoder"])[row, tokens].mean(0) for x in (student, teacher))
        expected += 1 - ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs)
    np.testing.assert_allclose(terms["pooled"], expected, rtol=1e-4)
    assert weights["pooled"] == 2 and any(np.any(x) for x in jax.tree.leaves(gradient))


def test_the_pooled_loss_of_a_packed_row_is_the_sum_over_its_texts():
    rng = np.random.default_rng(1)
    student, teacher = rng.normal(size=(2, 1, 5, 4))
    segments = np.array([[1, 1, 2, 2, 0]])
    found, texts = losses.pooled_cosine(student, teacher, segments > 0, jnp.asarray(segments))
    alone = [
        losses.pooled_cosine(student[:, part], teacher[:, part], np.ones((1, 2)))
        for part in (slice(0, 2), slice(2, 4))
    ]
    np.testing.assert_allclose(found, sum(loss for loss, _ in alone), rtol=1e-5)
    assert texts == 2


def test_a_loss_that_has_nothing_to_compare_is_refused():
    alone = T5(dataclasses.replace(TINY, num_decoder_layers=0))
    with pytest.raises(ConfigError, match="LOGITS_LOSS is 1.0, .* no decoder"):
        Distillation(alone, PLUGINS["ffn"], LossConfig(logits=1.0))
    models = SplicedModel(T5(TINY)), SplicedModel(T5(TINY))
    with pytest.raises(ConfigError, match="RESIDUAL_LOSS is 0.5, .* no plugin"):
        TeacherStudent(*models, LossConfig(residual=0.5))
