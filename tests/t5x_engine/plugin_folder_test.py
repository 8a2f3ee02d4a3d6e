"""Plugin folders between the engines; and a backbone in bfloat16 under a plugin in float32."""

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import t5x_runs

from variator_jax import cli
from variator_jax.store import load_plugin, t5x


@pytest.fixture(scope="module")
def seeded(work, plugin):
    """A T5X run in bfloat16 from a plugin folder, 2 steps, and then resumed for 2 more."""
    run = work / "seeded"
    options = ("train", "--gin_file=tiny.gin", "--gin.DTYPE=bfloat16", f"--gin.MODEL_DIR={run}")
    options += (f"--gin.INITIAL_PLUGIN_PATH={plugin}", "--gin.KEEP_CHECKPOINTS=None")
    options += ("--gin.CHECKPOINT_PERIOD=2", "--gin.EVAL_PERIOD=2", "--gin.WARMUP_STEPS=0")
    steps = [(*options, f"--gin.TRAIN_STEPS={n}") for n in (2, 4)]
    t5x_runs.call_together(steps, work)
    return run


def test_the_folder_is_what_the_run_trained(plugin, trained, backbone):
    t5x_runs.same_bits(
        t5x_runs.folder_leaves(plugin), t5x_runs.plugin_leaves(trained / "checkpoint_20")
    )
    assert load_plugin(plugin, backbone).description["training"]["engine"] == "t5x"


def test_a_run_starts_from_a_plugin_folder(plugin, seeded):
    first = t5x_runs.plugin_leaves(seeded / "checkpoint_0")
    t5x_runs.same_bits(first, t5x_runs.folder_leaves(plugin))
    assert t5x_runs.farthest(t5x_runs.plugin_leaves(seeded / "checkpoint_2"), first) > 0


def test_the_builtin_engine_adapts_it(work, plugin, trained, seeded, tmp_path, capsys):
    run = tmp_path / "adapted"
    code = cli.main(
        [
            *("train", "--engine=builtin", f"--gin_file={work / 'tiny.gin'}"),
            *("--gin.TRAIN_STEPS=2", "--gin.WARMUP_STEPS=0", f"--gin.MODEL_DIR={run}"),
            f"--gin.INITIAL_PLUGIN_PATH={plugin}",
        ]
    )
    assert code == 0, capsys.readouterr().err
    first = t5x_runs.builtin_losses(run)[1]
    assert first == pytest.approx(t5x_runs.losses(seeded)[1], rel=0.02)  # which is in bfloat16
    assert first < t5x_runs.losses(trained)[1]  # the same batch, under a fresh plugin


@pytest.mark.parametrize("step", [0, 2, 4])
def test_bfloat16_under_float32_after_resuming_too(step, seeded, backbone):
    checkpoint = seeded / f"checkpoint_{step}"
    found = t5x_runs.backbone_leaves(checkpoint)
    original = t5x_runs.backbone_leaves(seeded.parent / "backbone" / "checkpoint_1000")
    cast = {name: leaf.astype(jnp.bfloat16) for name, leaf in original.items()}
    t5x_runs.same_bits(found, cast)
    assert {x.dtype for x in t5x.open_checkpoint(checkpoint).plugin.values()} == {np.dtype("f4")}
    tree = ocp.PyTreeCheckpointer().metadata(checkpoint / "state").item_metadata.tree
    assert tree["state"]["step"].dtype == np.int32


def test_the_resumed_run_goes_on(seeded):
    first, second = t5x_runs.event_files(seeded)
    assert list(t5x_runs.file_losses(first)) == [1, 2]
    assert list(t5x_runs.file_losses(second)) == [3, 4]
