"""What a step takes, told by compiling it for shapes alone."""

import dataclasses

import jax
import pytest

from variator_jax import cli
from variator_jax.backbones.t5 import get_config
from variator_jax.backbones.t5.network import shape_params
from variator_jax.bench import budget, budget_arguments
from variator_jax.bench.collectives import Collective, collectives, loop_trips
from variator_jax.commands import engines
from variator_jax.errors import ConfigError
from variator_jax.plugin import PluginConfig, init_plugin
from variator_jax.train import optimizers

TINY = get_config(
    "nano", vocab_size=384, embed_dim=32, num_heads=2, head_dim=16, mlp_dim=64,
    num_encoder_layers=2, num_decoder_layers=1,
)  # fmt: skip
LENGTHS = {"inputs": 16, "targets": 8}


def measured(batch_size=4, **settings):
    return budget.budget(
        backbone=TINY,
        plugin=PluginConfig(4, bottleneck=8),
        optimizer=optimizers.optimizer(schedule_name="constant"),
        feature_lengths=LENGTHS,
        batch_size=batch_size,
        backbone_dtype="bfloat16",
        devices=jax.devices()[:1],
        memory=2**30,
        **settings,
    )


@pytest.fixture(scope="module")
def found():
    return measured()


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


def test_four_microbatches_compute_four_times_as_much_as_one_in_nearly_its_memory(found):
    cost = measured(batch_size=4 * 4, num_microbatches=4).cost
    print(f"{found.cost.flops:.4g} FLOPs of one microbatch, {cost.flops:.4g} of four")
    # XLA shares what the first layers of teacher and student have in common outside of loops only.
    assert cost.flops == pytest.approx(4 * found.cost.flops, rel=0.2)
    assert cost.temporary < 2 * found.cost.temporary


def test_it_says_whether_it_fits_and_what_a_cpus_compiler_is_worth(found):
    assert found.fits and "it fits in 1.00 GiB" in str(found)
    assert "temporary memory is far above an accelerator's" in str(found)


@pytest.mark.parametrize(
    ("text", "expected"), [("80GiB", 80 * 2**30), ("80 GB", 80 * 10**9), ("1024B", 1024)]
)
def test_amounts_of_memory(text, expected):
    assert budget_arguments.parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["80", "80 gigs", "", "-1GB"])
def test_no_amounts_of_memory(text):
    with pytest.raises(ConfigError, match="80GiB"):
        budget_arguments.parse_bytes(text)


def test_amounts_below_a_gib_are_told_in_mib(found):
    weights = found.cost.arguments / 2**20
    assert f"optimizer, batch {weights:>9.2f} MiB\n" in str(found)
    gib = dataclasses.replace(found, cost=dataclasses.replace(found.cost, temporary=3 * 2**29))
    assert "temporary memory              1.50 GiB" in str(gib)


@dataclasses.dataclass(frozen=True)
class Device:
    """A device that is not there and does not tell its memory."""

    platform: str = "gpu"
    device_kind: str = "a device"

    def memory_stats(self):
        return None


class Planned(Exception):
    """Carries the mesh that would be compiled for."""


WEIGHTS = 4 * sum(leaf.size for leaf in jax.tree.leaves(shape_params(TINY)))


@pytest.mark.parametrize(("memory", "expected"), [(None, (4, 1, 1)), (WEIGHTS, (2, 2, 1))])
def test_the_mesh_is_that_of_devices_of_the_named_memory(monkeypatch, memory, expected):
    def planned(*arguments):
        raise Planned(arguments[-1].devices.shape)

    monkeypatch.setattr(budget, "_arguments", planned)
    with pytest.raises(Planned) as told:
        budget.budget(
            backbone=TINY,
            plugin=PluginConfig(4, bottleneck=8),
            optimizer=optimizers.optimizer(schedule_name="constant"),
            feature_lengths=LENGTHS,
            batch_size=8,
            devices=[Device()] * 4,
            memory=memory,
        )
    assert told.value.args == (expected,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hbm", "80"], "'80' is no amount of memory; write 80GiB"),
        (["--topology", "banana"], "--topology banana is no TPU slice; write NAME:AxB"),
        (["--topology", "v5e:4"], "such as v5e:4x4"),
        (["--topology", "v5e:4x4x4x4"], "such as v5e:4x4"),
        (["--topology", "v5e:0x4"], "Names: v2, v3"),
    ],
    ids=" ".join,
)
def test_slips_are_told_before_the_engine_is_asked(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(engines, "parse", lambda *_, **__: pytest.fail("parsed"))
    assert cli.main(["budget", "--gin_file=none.gin", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_help_lists_the_slices(capsys):
    assert cli.main(["budget", "--help"]) == 0
    assert ", ".join(budget_arguments.TPUS) in " ".join(capsys.readouterr().out.split())


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


def test_started_exchanges_count_their_results_alone():
    text = """
  %p = (f32[8]{0}, f32[8]{0}, u32[]{:T(128)}, u32[]{:T(128)}) collective-permute-start(%x), pairs={}
  %q = (bf16[8]{0}, bf16[8]{0}) collective-permute-start(%x), source_target_pairs={{0,1}}
  %r = ((f32[2], s32[4]), (f32[8], s32[16])) all-gather-start(%x, %y), dimensions={0}
  %s = (f32[8]{0}, f32[2]{0}) reduce-scatter-start(%x), dimensions={0}
  %t = f32[8]{0} all-reduce-start(%x), to_apply=%add
"""
    assert collectives(text) == {
        "collective-permute": Collective(2, 32 + 16),
        "all-gather": Collective(1, 32 + 64),
        "reduce-scatter": Collective(1, 8),
        "all-reduce": Collective(1, 32),
    }


# As XLA prints it, callees first: a loop in a loop, a fusion in both, and an exchange in each.
LOOPS = """HloModule jit_train_step, entry_computation_layout={(f32[2])->f32[2]}
%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %c = f32[] add(%a, %b)
}
%shared (x: f32[2]) -> f32[2] {
  ROOT %y = f32[2]{0} all-to-all(%x), dimensions={0}
}
%inner.1 (x: (s32[], f32[2])) -> (s32[], f32[2]) {
  %g = f32[8]{0} all-gather(%x), dimensions={0}
}
%outer (x: (s32[], f32[2])) -> (s32[], f32[2]) {
  %r = f32[2]{0} all-reduce(%x), to_apply=%add
  %f = f32[2]{0} call(%r), to_apply=%shared
  ROOT %w = (s32[], f32[2]{0}) while(%t), condition=%less, body=%inner.1, INNER
}
ENTRY %main (x: f32[2]) -> f32[2] {
  %r = f32[2]{0} all-reduce(%x), to_apply=%add
  %f = f32[2]{0} async-start(%r), calls=%shared
  %w = (s32[], f32[2]{0}) while(%t), condition=%less.2, body=%outer, OUTER
}
"""
KNOWN = 'backend_config={{"known_trip_count":{{"n":"{}"}},"known_init_step":{{"init":"0"}}}}'


@pytest.mark.parametrize(
    ("outer", "inner", "trips", "runs"),
    [
        (KNOWN.format(4), KNOWN.format(3), 1, (4, 12)),
        (KNOWN.format(4), KNOWN.format(3), 8, (4, 12)),  # half unrolled: the module knows better
        ("metadata={}", KNOWN.format(3), 4, (4, 12)),
        ("metadata={}", "metadata={}", 4, (4, 4)),  # as on TPUs; only the outer one is ours
        ("metadata={}", "metadata={}", 1, (1, 1)),
    ],
)
def test_what_is_in_a_loop_counts_as_often_as_it_runs(outer, inner, trips, runs):
    text = LOOPS.replace("OUTER", outer).replace("INNER", inner)
    found = collectives(text, trips)
    assert found == {
        "all-reduce": Collective(1 + runs[0], 8 * (1 + runs[0])),
        "all-to-all": Collective(1 + runs[0], 8 * (1 + runs[0])),
        "all-gather": Collective(runs[1], 32 * runs[1]),
    }


def test_the_microbatches_loop_is_the_outermost_that_may_be_it():
    known = LOOPS.replace("OUTER", KNOWN.format(4)).replace("INNER", "")
    assert [loop_trips(known, n) for n in (8, 4, 2)] == [4, 4, 1]
    assert loop_trips(LOOPS, 6) == 6
    assert loop_trips(LOOPS.replace("while(", "tuple(").replace("body=", "of="), 6) == 1
