"""What a step takes, from compiling it for shapes alone."""

import dataclasses

import jax
import pytest

from variator_jax import cli
from variator_jax.backbones.t5 import T5, get_config, shape_params
from variator_jax.bench import arguments, budget
from variator_jax.bench.budget import Collective, collectives
from variator_jax.errors import ConfigError
from variator_jax.plugin import PluginConfig, plugin_parameters
from variator_jax.train import optimizers

TINY = get_config(
    "nano", vocab_size=384, embed_dim=32, num_heads=2, head_dim=16, mlp_dim=64,
    num_encoder_layers=2, num_decoder_layers=1,
)  # fmt: skip
LENGTHS = {"inputs": 16, "targets": 8}
PLUGIN = PluginConfig(4, bottleneck=8)
WEIGHTS = sum(leaf.size for leaf in jax.tree.leaves(shape_params(TINY)))


def measured(batch_size=4, **settings):
    defaults = {"backbone_dtype": "bfloat16", "devices": jax.devices()[:1], "hbm_bytes": 2**30}
    optimizer = optimizers.optimizer(schedule_name="constant")
    run = {"backbone": TINY, "plugin": PLUGIN, "optimizer": optimizer, "feature_lengths": LENGTHS}
    return budget.budget(batch_size=batch_size, **run, **defaults | settings)


@pytest.fixture(scope="module")
def found():
    return measured()


def test_the_arguments_are_the_frozen_weights_and_three_plugins(found):
    plugin = 4 * plugin_parameters(PLUGIN, T5(TINY).stack())
    batch = 4 * 4 * (LENGTHS["inputs"] + 3 * LENGTHS["targets"])
    # The output projection takes no part in a step on hidden states: the compiler leaves it out.
    read = 2 * (WEIGHTS - TINY.embed_dim * TINY.vocab_size)
    assert found.arguments == pytest.approx(read + 3 * plugin + batch, rel=0.02)
    assert found.temporary > 0 and found.flops > 0 and not found.collectives


def test_four_microbatches_compute_four_times_as_much_as_one_in_nearly_its_memory(found):
    four = measured(batch_size=4 * 4, num_microbatches=4)
    # XLA shares what the first layers of teacher and student have in common outside of loops only.
    assert four.flops == pytest.approx(4 * found.flops, rel=0.2)
    assert four.temporary < 2 * found.temporary


def test_it_prints_amounts_whether_it_fits_and_what_a_cpus_compiler_is_worth(found):
    batch = f"optimizer, batch {found.arguments / 2**20:>9.2f} MiB\n"
    texts = (", ffn all x4", "it fits in 1.00 GiB", batch, "far above an accelerator's")
    assert all(text in str(found) for text in texts)
    moved = {"all-reduce": Collective(2, 3 * 2**20)}
    large = dataclasses.replace(found, temporary=3 * 2**29, compiler="TPU", collectives=moved)
    texts = ("temporary memory              1.50 GiB", "it does not fit", "3.00 MiB in 2")
    assert all(text in str(large) for text in texts)


def test_the_mesh_is_chosen_for_devices_of_the_named_memory(monkeypatch):
    def make_mesh(config, rows, shape, devices, bytes_per_weight, hbm_bytes):
        raise LookupError(rows, shape, bytes_per_weight, hbm_bytes)

    monkeypatch.setattr(budget.meshes, "make_mesh", make_mesh)
    with pytest.raises(LookupError) as raised:
        measured(8, num_microbatches=2, hbm_bytes=1234)
    assert raised.value.args == (4, None, 2, 1234)


def test_amounts_of_memory():
    assert arguments.parse_bytes("80GiB") == 80 * 2**30
    assert arguments.parse_bytes("80 GB") == 80 * 10**9
    for text in ("80", "80 gigs", "", "-1GB"):
        with pytest.raises(ConfigError, match="80GiB"):
            arguments.parse_bytes(text)


def test_the_help_lists_the_slices_and_an_unknown_one_is_refused(capsys):
    assert cli.main(["budget", "--help"]) == 0
    assert ", ".join(arguments.TPUS) in " ".join(capsys.readouterr().out.split())
    for name in ("v9z:2x2", "banana", "v5e:0x4"):
        with pytest.raises(ConfigError, match=f"--topology {name} cannot be .* such as v5e:4x4"):
            budget.topology_devices(name)


def test_a_run_that_trains_no_plugin_is_not_compiled_as_if_it_did():
    with pytest.raises(ConfigError, match="TRAINED is 'backbone'"):
        measured(trained="backbone")
    with pytest.raises(ConfigError, match="NUM_MICROBATCHES is 0"):
        measured(num_microbatches=0)


def test_collectives_are_read_from_a_modules_text():
    text = """
  %all-reduce.1 = (f32[], f32[4,8]{1,0}, /*index=5*/bf16[2]{0}) all-reduce(%a, %b, %c), channel_id=1
  %ag = bf16[16,8]{1,0:T(8,128)(2,1)} all-gather(%x), dimensions={0}
  %ags = (bf16[4,8]{1,0}, bf16[16,8]{1,0}) all-gather-start(%x), dimensions={0}
  %agd = bf16[16,8]{1,0} all-gather-done(%ags)
  %fusion = f32[8]{0} fusion(%all-reduce.1), kind=kLoop
  %p = (f32[8]{0}, f32[8]{0}, u32[]{:T(128)}, u32[]{:T(128)}) collective-permute-start(%x), pairs={}
  %q = (bf16[8]{0}, bf16[8]{0}) collective-permute-start(%x), source_target_pairs={{0,1}}
  %r = ((f32[2], s32[4]), (f32[8], s32[16])) all-gather-start(%x, %y), dimensions={0}
  %s = (f32[8]{0}, f32[2]{0}) reduce-scatter-start(%x), dimensions={0}
  %t = f32[8]{0} all-reduce-start(%x), to_apply=%add
"""
    assert collectives(text) == {
        "all-reduce": Collective(2, 4 + 4 * 32 + 2 * 2 + 32),
        "all-gather": Collective(3, 2 * 2 * 16 * 8 + 32 + 64),
        "collective-permute": Collective(2, 32 + 16),
        "reduce-scatter": Collective(1, 8),
    }
    assert collectives(text, passes=3)["reduce-scatter"] == Collective(3, 24)
