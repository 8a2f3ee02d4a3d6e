"""Scores of labels and targets, and the control."""

import jax
import numpy as np
import pytest

from variator_jax.backbones.t5 import T5, get_config, init_params
from variator_jax.evaluation.scorers import encoder, label_scorer, skip_encoder_ffn, target_scorer
from variator_jax.model import SplicedModel
from variator_jax.plugin import PluginConfig, init_plugin

CONFIG = get_config("nano", num_encoder_layers=1, num_decoder_layers=1)
NETWORK = T5(CONFIG)
LABELS = (7, 40, 12)
# Compiled once for all tests.
BARE = SplicedModel(NETWORK)
BACKBONE, TARGETS = label_scorer(BARE, LABELS), target_scorer(BARE)
FORWARD = jax.jit(lambda params, batch: BARE.logits(params, None, batch))


@pytest.fixture(scope="module")
def params():
    return init_params(CONFIG, jax.random.key(0))


def plugin(ratio, seed=0):
    config = PluginConfig(ratio, bottleneck=8)
    return config, init_plugin(config, NETWORK.stack(), jax.random.key(seed))


def batch(rows=2, length=8, targets=3, seed=0):
    rng = np.random.default_rng(seed)
    target = rng.integers(2, 100, (rows, targets), dtype=np.int32)
    return {
        "encoder_input_tokens": rng.integers(2, 100, (rows, length), dtype=np.int32),
        "decoder_input_tokens": np.pad(target, ((0, 0), (1, 0)))[:, :-1],
        "decoder_target_tokens": target,
    }


def test_label_scores_are_the_logits_at_the_position_behind_the_prefix(params):
    logits = FORWARD(params, batch())
    for position, scorer in enumerate([BACKBONE, label_scorer(BARE, LABELS, position=1)]):
        scores = scorer(params, None, batch() | {"not_read": 1})
        np.testing.assert_allclose(scores, logits[:, position, LABELS], rtol=1e-4, atol=1e-5)
        assert not np.allclose(scores, logits[:, 1 - position, LABELS])


def test_plugins_of_the_same_settings_share_one_compiled_scorer():
    (one, _), (same, _), (other, _) = plugin(2), plugin(2, seed=1), plugin(4)
    scorers = [label_scorer(SplicedModel(NETWORK, config), LABELS) for config in (one, same, other)]
    assert scorers[0] is scorers[1] is not scorers[2]


def test_target_scores_are_likelihoods_and_hits(params):
    logits = np.asarray(FORWARD(params, batch()))
    targets = np.array(batch()["decoder_target_tokens"])
    targets[0] = logits[0].argmax(-1)
    scores = TARGETS(params, None, batch() | {"decoder_target_tokens": targets})
    loss, hits = map(np.asarray, scores)
    expected = -np.asarray(jax.nn.log_softmax(logits))
    expected = np.take_along_axis(expected, targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    np.testing.assert_array_equal(hits, logits.argmax(-1) == targets)
    assert hits[0].all()


def test_one_compilation_serves_all_plugins_of_a_ratio(params):
    traces = []

    class Counting(T5):
        def encode(self, *args):
            traces.append(1)
            return super().encode(*args)

    config, first = plugin(2, seed=0)
    score = encoder(SplicedModel(Counting(CONFIG), config))
    outputs = [score(params, variables, batch()) for variables in (first, plugin(2, seed=1)[1])]
    assert not np.allclose(*outputs)
    score(params, first, batch(seed=1))
    assert len(traces) == 1
    score(params, first, batch(length=16))
    assert len(traces) == 2


def test_the_control_equals_encoder_ffns_that_put_out_zero(params):
    def silence(path, leaf):
        names = [key.key for key in path]
        return leaf * 0 if names[0] == "encoder" and names[-3:-1] == ["mlp", "wo"] else leaf

    def skip(mask):
        return skip_encoder_ffn(NETWORK.stack())

    silenced = jax.tree_util.tree_map_with_path(silence, params)
    control = label_scorer(SplicedModel(NETWORK, intervention=skip), LABELS)
    skipped = control(params, None, batch())
    np.testing.assert_allclose(skipped, BACKBONE(silenced, None, batch()), rtol=1e-5)
    assert not np.allclose(skipped, BACKBONE(params, None, batch()))
