"""Activated FFN neurons: by hand where a backbone's neurons are known, and what never counts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_t5 import PLAIN
from tiny import random_params

from variator_jax.backbones.t5 import T5
from variator_jax.experiment.score import activated_neurons
from variator_jax.plugin import PluginConfig, PluginVariables, init_plugin

RELU = dataclasses.replace(
    PLAIN, name="by_hand", vocab_size=8, embed_dim=4, num_heads=1, mlp_dim=5, num_encoder_layers=2
)
GATED = dataclasses.replace(RELU, name="gated", mlp_dim=24, mlp_activations=("gelu", "linear"))
POOL = PluginConfig(2, compression="mean", decompression="repeat")
SITES = [f"encoder/layers_{i}/mlp" for i in (0, 1)]
NOTHING_LEARNED = PluginVariables({s: {} for s in SITES}, {s: np.float32(1) for s in SITES})


def by_hand(config=RELU):
    """Attention and FFNs put out nothing, so every FFN's input is its token's unit vector.

    Token 2 is +e0 and makes neurons 0 and 1 fire, token 3 is +e1 and neuron 2, token 4 is -e0 and
    neuron 3. Padding is +e0. Neuron 4 never fires.
    """
    params = random_params(config)
    for layer in ("layers_0", "layers_1"):
        block = params["encoder"][layer]
        block["attention"]["out"]["kernel"] *= 0
        block["mlp"]["wo"]["kernel"] *= 0
        block["pre_mlp_layer_norm"]["scale"][:] = 1
        if not config.gated:
            rows = [[1, 1, 0, -1, 0], [0, 0, 1, 0, 0], [0] * 5, [0] * 5]
            block["mlp"]["wi"]["kernel"] = np.array(rows, "f4")
    embedding = params["token_embedder"]["embedding"]
    embedding[:] = 0
    embedding[[0, 2], 0], embedding[3, 1], embedding[4, 0] = 1, 1, -1
    return params


def count(plugin, *rows, config=RELU, params=None, variables=NOTHING_LEARNED):
    """Shares of neurons; each row is a batch."""
    params = by_hand(config) if params is None else params
    batches = [{"encoder_input_tokens": np.array([row], np.int32)} for row in rows]
    return activated_neurons(T5(config), params, plugin, variables, batches)


def test_a_relu_backbone_whose_neurons_are_known():
    # Groups {+e0, +e1}, {-e0} and {+e0, -e0}, {+e1}: the merge of the third is the zero vector.
    shares = count(POOL, [2, 3, 4, 0], [2, 4, 3, 0])
    assert list(shares.index) == [0, 1]
    assert list(shares.token) == pytest.approx([(2 + 1 + 1) / 3 / 5] * 2)
    assert list(shares.share) == pytest.approx([(3 + 1 + 0 + 1) / 4 / 5] * 2)
    assert list(shares.union) == pytest.approx([(3 + 1 + 3 + 1) / 4 / 5] * 2)


def test_a_layer_that_the_plugin_leaves_alone_counts_its_tokens():
    shares = count(dataclasses.replace(POOL, layers=(1,)), [2, 4, 3, 0])
    assert list(shares.share) == pytest.approx([4 / 15, 1 / 10])
    assert list(shares.union) == pytest.approx([4 / 15, 4 / 10])


def test_ffns_inside_a_span_run_on_its_merged_vectors():
    config = PluginConfig(sites=("span 1 x2",))
    variables = init_plugin(config, T5(RELU).stack(), jax.random.key(0))
    shares = count(config, [2, 2, 3, 0], variables=variables)
    # The groups of the span are {+e0, +e0} and {+e1}.
    assert list(shares.share) == pytest.approx([5 / 15, 3 / 10])
    assert list(shares.union) == pytest.approx([5 / 15, 3 / 10])


def test_padding_never_counts():
    alone = count(POOL, [2, 4, 3])
    padded = count(POOL, [2, 4, 3, 0, 0, 0, 0], [0] * 7)
    assert padded.equals(alone)
    # Where padding enters a merge, a group of nothing else still is no input: {+e1, pad} is one.
    pooled = count(dataclasses.replace(POOL, pool_padding=True), [2, 4, 3, 0, 0, 0])
    assert list(pooled.share) == pytest.approx([(0 + 3) / 2 / 5] * 2)
    assert pooled.union.equals(alone.union)


@pytest.mark.parametrize("config", [RELU, GATED], ids=lambda config: config.name)
def test_ratio_1_is_the_backbone_itself_and_remat_changes_nothing(config):
    params, remat = random_params(config), dataclasses.replace(config, remat=True)
    shares, same = (
        count(PluginConfig(1), [2, 5, 7, 6, 0], config=c, params=params) for c in (config, remat)
    )
    assert shares.equals(same)
    assert list(shares.share) == list(shares.token) == list(shares.union)
    assert 0 < shares.share.mean() < 1


def test_a_gated_neuron_fires_beyond_the_rms_of_its_own_input():
    params = by_hand(GATED)
    shares = count(POOL, [2, 4, 3, 0], config=GATED, params=params)
    for layer in (0, 1):
        mlp = params["encoder"][f"layers_{layer}"]["mlp"]
        # RMSNorm makes 2 of the only entry of four; the group of +e0 and -e0 merges to 0.
        x = 2 * jnp.asarray([[1, 0, 0, 0], [-1, 0, 0, 0], [0, 1, 0, 0]], "f4")
        hidden = jax.nn.gelu(x @ mlp["wi_0"]["kernel"]) * (x @ mlp["wi_1"]["kernel"])
        fires = np.abs(hidden) > np.sqrt(np.mean(hidden**2, axis=-1, keepdims=True))
        assert shares.token[layer] == pytest.approx(fires.mean())
        assert shares.share[layer] == pytest.approx(fires[2].mean() / 2)
        union = np.stack([fires[0] | fires[1], fires[2]]).mean()
        assert shares.union[layer] == pytest.approx(union)
