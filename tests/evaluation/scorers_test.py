import jax
import numpy as np
import pytest

from variator_jax.backbones.t5 import Transformer, get_config, init_params
from variator_jax.errors import ConfigError, DataError
from variator_jax.evaluation.control import skip_encoder_ffn
from variator_jax.evaluation.evaluator import bit_identical
from variator_jax.evaluation.scorers import label_scorer, target_scorer
from variator_jax.plugin import PluginConfig, init_plugin

CONFIG = get_config("nano", num_encoder_layers=1, num_decoder_layers=1)
MODULE = Transformer(CONFIG)
LABELS = [7, 40, 12]
# Compiled once for all tests.
BACKBONE = label_scorer(MODULE, LABELS)
TARGETS = target_scorer(MODULE)
FORWARD = jax.jit(
    lambda params, data: MODULE.apply(
        {"params": params}, data["encoder_input_tokens"], data["decoder_input_tokens"]
    )
)


@pytest.fixture(scope="module")
def params():
    return init_params(CONFIG, jax.random.key(0))


def plugin(ratio, seed=0):
    config = PluginConfig(ratio, bottleneck=8)
    rng = jax.random.key(seed)
    return config, init_plugin(config, CONFIG.num_encoder_layers, CONFIG.embed_dim, rng)


def batch(rows=2, length=8, targets=3, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(2, 100, (rows, length), dtype=np.int32)
    target = rng.integers(2, 100, (rows, targets), dtype=np.int32)
    shifted = np.pad(target, ((0, 0), (1, 0)))[:, :-1]
    return {
        "encoder_input_tokens": tokens,
        "decoder_input_tokens": shifted,
        "decoder_target_tokens": target,
        "decoder_loss_weights": np.ones_like(target),
    }


def test_label_scores_are_the_first_positions_logits(params):
    data = batch()
    scores = BACKBONE(params, None, data)
    logits = FORWARD(params, data)
    np.testing.assert_allclose(scores, logits[:, 0, LABELS], rtol=1e-4, atol=1e-5)


def test_label_scores_behind_a_prefix_are_that_positions_logits(params):
    arrays = batch()
    scores = label_scorer(MODULE, [3, 5], position=1)(params, None, arrays)
    logits = FORWARD(params, arrays)
    np.testing.assert_allclose(scores, logits[:, 1, [3, 5]], rtol=1e-4, atol=1e-5)
    assert not np.allclose(scores, logits[:, 0, [3, 5]])


def test_target_scores_are_likelihoods_and_hits(params):
    data = batch()
    loss, hits = map(np.asarray, TARGETS(params, None, data))
    logits = FORWARD(params, data)
    logits = np.asarray(logits)
    expected = -np.asarray(jax.nn.log_softmax(logits))
    for row, column in np.ndindex(2, 3):
        target = data["decoder_target_tokens"][row, column]
        assert loss[row, column] == pytest.approx(expected[row, column, target], rel=1e-4)
        assert hits[row, column] == (logits[row, column].argmax() == target)


def test_a_hit_is_a_hit(params):
    data = batch()
    logits = FORWARD(params, data)
    best = {**data, "decoder_target_tokens": np.asarray(logits.argmax(-1), np.int32)}
    assert np.all(TARGETS(params, None, best)[1])


def test_ratio_one_is_bit_identical_and_ratio_two_is_not(params):
    plain = BACKBONE
    one = label_scorer(MODULE, LABELS, PluginConfig(1))
    config, variables = plugin(2)
    two = label_scorer(MODULE, LABELS, config)
    batches = [batch(seed=0), batch(seed=1)]
    backbone = lambda data: plain(params, None, data)  # noqa: E731
    assert bit_identical(backbone, lambda data: one(params, None, data), batches)
    assert not bit_identical(backbone, lambda data: two(params, variables, data), batches)


def test_the_control_changes_the_scores(params):
    plain = BACKBONE(params, None, batch())
    control = label_scorer(MODULE, LABELS, instead=lambda mask: skip_encoder_ffn())(
        params, None, batch()
    )
    assert not np.allclose(plain, control)


def test_one_compilation_serves_all_plugins_of_a_ratio(params):
    traces = []

    class Counting(Transformer):
        def encode(self, *args, **kwargs):
            traces.append(1)
            return super().encode(*args, **kwargs)

    config, first = plugin(2, seed=0)
    _, second = plugin(2, seed=1)
    score = label_scorer(Counting(CONFIG), LABELS, config)
    outputs = [score(params, variables, batch()) for variables in (first, second)]
    assert not np.allclose(*outputs)
    score(params, first, batch(seed=1))
    assert len(traces) == 1
    score(params, first, batch(length=16))
    assert len(traces) == 2


def test_arrays_that_the_model_does_not_read_may_differ(params):
    data = batch()
    del data["decoder_loss_weights"]
    assert BACKBONE(params, None, {**data, "extra": 1}).shape == (2, 3)


def test_settings_and_batches_that_do_not_fit_are_told(params):
    with pytest.raises(ConfigError, match="takes no plugin"):
        label_scorer(MODULE, LABELS, PluginConfig(2), instead=lambda mask: skip_encoder_ffn())
    score = BACKBONE
    data = batch()
    with pytest.raises(DataError, match="packed"):
        score(params, None, {**data, "encoder_segment_ids": data["encoder_input_tokens"]})
    data.pop("decoder_input_tokens")
    with pytest.raises(DataError, match="lacks.*decoder_input_tokens"):
        score(params, None, data)
