"""LoRA as arrays: what a fresh one is, what merging gives, and which weights it touches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import TINY, flat, random_params

from variator_jax.backbones import lora as loras
from variator_jax.backbones.lora import LoraConfig, init_lora, lora_weights, merge_weight, pairs
from variator_jax.backbones.t5 import get_config, shape_params
from variator_jax.errors import ConfigError

SHAPE = dataclasses.replace(TINY, num_heads=3, head_dim=4)
PARAMS = random_params(SHAPE)
SMALL = LoraConfig(rank=4, alpha=6.0)


def random_lora(config=SMALL, seed=0):
    """A LoRA that changes every one of its weights, as numpy arrays."""
    shapes = jax.eval_shape(lambda: init_lora(config, PARAMS, jax.random.key(0)))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: np.asarray(rng.normal(0, 0.3, x.shape), "f4"), shapes)


def test_a_fresh_one_is_the_backbone_bit_for_bit():
    fresh = init_lora(LoraConfig(), PARAMS, jax.random.key(1))
    merged = flat(loras.merge_lora(PARAMS, fresh, LoraConfig()))
    for path, leaf in flat(PARAMS).items():
        assert np.asarray(merged[path]).tobytes() == leaf.tobytes(), path


def test_a_is_uniform_as_torchs_kaiming_with_slope_root_five_and_b_is_zero():
    wide = dataclasses.replace(SHAPE, embed_dim=400)
    config = LoraConfig(rank=32)
    leaves = flat(init_lora(config, shape_params(wide), jax.random.key(0)))
    bound = np.sqrt(6 / ((1 + 5) * 400))
    a = [np.asarray(leaf) for name, leaf in leaves.items() if name.endswith("/a")]
    assert len({array.tobytes() for array in a}) == 6
    for array in a:
        assert array.shape == (400, 32) and array.dtype == np.float32
        assert 0.99 * bound < np.abs(array).max() <= bound
        assert abs(array.std() - bound / np.sqrt(3)) < 0.02 * bound
    assert not any(leaf.any() for name, leaf in leaves.items() if name.endswith("/b"))


@given(rank=st.integers(1, 5), alpha=st.floats(0.5, 50), seed=st.integers(0, 9))
def test_merging_is_the_papers_formula_and_leaves_the_rest_alone(rank, alpha, seed):
    config = LoraConfig(rank, alpha)
    lora, before = random_lora(config, seed), flat(PARAMS)
    merged = flat(loras.merge_lora(PARAMS, lora, config))
    changed = dict(pairs(lora))
    for path, leaf in before.items():
        if path not in changed:
            assert merged[path] is leaf
            continue
        a, b = (np.asarray(x, np.float64) for x in changed[path])
        expected = leaf + (alpha / rank) * sum(np.outer(a[:, r], b[r]) for r in range(rank))
        np.testing.assert_allclose(merged[path], expected, rtol=1e-5, atol=1e-4)
        assert np.abs(merged[path] - leaf).max() > 1e-3
        host = merge_weight(leaf, *changed[path], config)
        np.testing.assert_allclose(host, expected, rtol=1e-6, atol=1e-6)


def test_the_sum_is_made_in_float32_and_then_cast():
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), PARAMS)
    lora = random_lora()
    merged, before = flat(loras.merge_lora(half, lora, SMALL)), flat(half)
    for path, (a, b) in pairs(lora):
        assert merged[path].dtype == jnp.bfloat16
        exact = (np.asarray(before[path], "f4") + SMALL.scale * (a @ b)).astype(jnp.bfloat16)
        # Where the last bit of a float32 decides how it is rounded, either way is right.
        assert np.mean(np.asarray(merged[path]) == exact) > 0.99
        host = merge_weight(np.asarray(before[path]), a, b, SMALL)
        assert host.dtype == jnp.bfloat16 and np.mean(host == exact) > 0.99


def test_a_merged_weight_does_not_depend_on_the_order_of_the_sum():
    """Machines add up in different orders; the fingerprint of the result must not show it."""
    rng = np.random.default_rng(0)
    shapes = (300, 200), (300, 16), (16, 200)
    weight, a, b = (np.asarray(rng.normal(size=shape), "f4") for shape in shapes)
    orders = np.arange(16), rng.permutation(16)
    merged = [merge_weight(weight, a[:, order], b[order], LoraConfig()) for order in orders]
    assert merged[0].tobytes() == merged[1].tobytes()


def test_it_changes_query_and_value_of_self_attention_alone():
    base = shape_params(get_config("t5_1_0_base"))
    assert list(lora_weights(LoraConfig(), base).values()) == [(768, 768)] * 48
    modules = ["decoder/layers_0/self_attention"]
    modules += [f"encoder/layers_{i}/attention" for i in range(2)]
    paths = [f"{module}/{name}/kernel" for module in modules for name in ("query", "value")]
    assert list(lora_weights(LoraConfig(), PARAMS)) == paths
    encoder = shape_params(dataclasses.replace(SHAPE, num_decoder_layers=0))
    assert list(lora_weights(LoraConfig(), encoder)) == paths[2:]


@pytest.mark.parametrize(("settings", "reason"), [
    ({"rank": 0}, "rank is 0; expected a whole number of at least 1"),
    ({"alpha": float("nan")}, "found nan"),
    ({"sites": ()}, "sites is empty"),
    ({"sites": ("(",)}, "not a regular expression"),
])  # fmt: skip
def test_settings_that_cannot_be_are_refused(settings, reason):
    with pytest.raises(ConfigError, match=reason):
        LoraConfig(**settings)


@pytest.mark.parametrize(("sites", "message"), [
    (r"encoder/layers_\d+/attention/q/kernel", "encoder/layers_<i>/attention/query/kernel"),
    (r"encoder/.*scale", r"/scale \(16,\); the matrices"),
])  # fmt: skip
def test_a_site_without_a_matrix_is_refused(sites, message):
    with pytest.raises(ConfigError, match=message):
        lora_weights(LoraConfig(sites=sites), PARAMS)
