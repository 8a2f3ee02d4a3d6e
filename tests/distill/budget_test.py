"""What a step takes, told by compiling it for shapes alone."""

import jax
import pytest

from variator_jax.backbone import get_config
from variator_jax.backbone.network import shape_params
from variator_jax.distill import budget, optimizers
from variator_jax.distill.collectives import Collective, collectives
from variator_jax.errors import ConfigError
from variator_jax.plugin import PluginConfig, init_plugin

TINY = get_config(
    "nano", vocab_size=384, embed_dim=32, num_heads=2, head_dim=16, mlp_dim=64,
    num_encoder_layers=2, num_decoder_layers=1,
)  # fmt: skip
LENGTHS = {"inputs": 16, "targets": 8}


@pytest.fixture(scope="module")
def found():
    return budget.budget(
        backbone=TINY,
        plugin=PluginConfig(4, bottleneck=8),
        optimizer=optimizers.optimizer(schedule_name="constant"),
        feature_lengths=LENGTHS,
        batch_size=4,
        backbone_dtype="bfloat16",
        devices=jax.devices()[:1],
        memory=2**30,
    )


def test_the_arguments_are_the_frozen_weights_and_three_plugins(found):
    weights = 2 * sum(leaf.size for leaf in jax.tree.leaves(shape_params(TINY)))
    fresh = jax.eval_shape(
        lambda: init_plugin(PluginConfig(4, bottleneck=8), 2, 32, jax.random.key(0))
    )
    plugin = 4 * sum(leaf.size for leaf in jax.tree.leaves(fresh.params))
    batch = 4 * 4 * (LENGTHS["inputs"] + 3 * LENGTHS["targets"])
    # The output projection is no part of a step on hidden states, so the compiler leaves it out.
    unread = 2 * TINY.embed_dim * TINY.vocab_size
    assert found.cost.arguments == pytest.approx(weights - unread + 3 * plugin + batch, rel=0.02)
    assert found.cost.temporary > 0 and found.cost.flops > 0 and not found.cost.collectives


def test_it_says_whether_it_fits_and_what_a_cpus_compiler_is_worth(found):
    assert found.fits and "it fits in 1.0 GiB" in str(found)
    assert "temporary memory is far above an accelerator's" in str(found)


@pytest.mark.parametrize(
    ("text", "expected"), [("80GiB", 80 * 2**30), ("80 GB", 80 * 10**9), ("1024", 1024)]
)
def test_amounts_of_memory(text, expected):
    assert budget.parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["80 gigs", "", "-1GB"])
def test_no_amounts_of_memory(text):
    with pytest.raises(ConfigError, match="80GiB"):
        budget.parse_bytes(text)


def test_a_slice_that_cannot_be_compiled_for_is_refused():
    with pytest.raises(ConfigError, match="--topology v9z:2x2"):
        budget.topology_devices("v9z:2x2")


def test_collectives_are_read_from_a_modules_text():
    text = """
  %all-reduce.1 = (f32[], f32[4,8]{1,0}, /*index=5*/bf16[2]{0}) all-reduce(%a, %b, %c), channel_id=1
  %ag = bf16[16,8]{1,0:T(8,128)(2,1)} all-gather(%x), dimensions={0}
  %ags = (bf16[4,8]{1,0}, bf16[16,8]{1,0}) all-gather-start(%x), dimensions={0}
  %agd = bf16[16,8]{1,0} all-gather-done(%ags)
  %fusion = f32[8]{0} fusion(%all-reduce.1), kind=kLoop
"""
    found = collectives(text)
    assert found["all-reduce"] == Collective(1, 4 + 4 * 32 + 2 * 2)
    assert found["all-gather"] == Collective(2, 2 * 2 * 16 * 8)
    assert set(found) == {"all-reduce", "all-gather"}
