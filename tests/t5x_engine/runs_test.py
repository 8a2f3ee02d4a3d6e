"""T5X's training of a plugin: as the built-in engine, on meshes, resumed, from plugin folders."""

import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import t5x_runs
from small_t5 import assert_same

from variator_jax import cli, gin_utils
from variator_jax.commands import engines
from variator_jax.store import load_plugin, t5x

MESHES = ((1, 4), (4, 1), (2, 2))  # (data, model)
# A few steps in bfloat16, of which the first one moves the plugin.
SHORT = ("--gin.DTYPE=bfloat16", "--gin.WARMUP_STEPS=0", "--gin.KEEP_CHECKPOINTS=None")
SHORT += ("--gin.CHECKPOINT_PERIOD=2", "--gin.EVAL_PERIOD=2")


@pytest.fixture(scope="module")
def original(work):
    """The leaves of the backbone's checkpoint."""
    return t5x_runs.backbone_leaves(work / "backbone" / "checkpoint_1000")


def agree(run, builtin, original, steps):
    """Losses within 1e-4, plugins within 1e-3; and the backbone's bits are the checkpoint's."""
    losses, expected = t5x_runs.losses(run), t5x_runs.builtin_losses(builtin)
    assert list(losses) == list(expected) == list(range(1, steps + 1))
    assert list(losses.values()) == pytest.approx(list(expected.values()), rel=1e-4)
    latest = run / f"checkpoint_{steps}"
    folder = t5x_runs.folder_leaves(builtin / "plugin")
    assert t5x_runs.farthest(t5x_runs.plugin_leaves(latest), folder) < 1e-3
    assert_same(t5x_runs.backbone_leaves(latest), original)


def test_losses_and_plugins_agree_and_the_backbone_is_untouched(trained, builtin, original):
    agree(trained, builtin, original, 20)
    before, after = (t5x_runs.plugin_leaves(trained / f"checkpoint_{n}") for n in (10, 20))
    assert t5x_runs.farthest(after, before) > 0.01  # It trained, indeed.


def test_spans_merged_keys_adapters_and_their_losses_agree_too(work, original):
    sites = "('ffn 0 x4 rank=2', 'kv 0 x2 rank=2', 'span 1 x4 rank=2')"
    common = ["train", "--gin_file=tiny.gin", f"--gin.SITES={sites}"]
    common += ["--gin.RESIDUAL_LOSS=1.0", "--gin.NEURONS_LOSS=0.5"]
    runs = {engine: work / f"sites_{engine}" for engine in ("t5x", "builtin")}
    commands = [
        [*common, f"--engine={engine}", f"--gin.MODEL_DIR={run}"] for engine, run in runs.items()
    ]
    t5x_runs.call_together(commands, work)
    agree(runs["t5x"], runs["builtin"], original, 20)
    residual = t5x_runs.losses(runs["t5x"], "residual")
    # Over several batches, which differ more than so few steps change.
    early, late = (np.mean([residual[first + n] for n in range(10)]) for first in (1, 11))
    assert late < early


def test_the_log_has_the_terms_of_the_loss_and_its_sum(trained):
    tags = ("loss", "encoder_hidden", "decoder_hidden")
    total, *terms = (t5x_runs.losses(trained, tag) for tag in tags)
    for step, loss in total.items():
        assert loss == pytest.approx(sum(term[step] for term in terms), rel=1e-5)


def test_microbatches_and_packing_agree_too_and_t5x_runs_by_hand(work, trained, original):
    """`python -m t5x.train`, with the search path that the commands use, and no command of ours."""
    options = {"PACK": True, "PACK_MULTIPLE": 4, "NUM_MICROBATCHES": 2, "TRAIN_STEPS": 8}
    bindings = [f"--gin.{name}={value}" for name, value in options.items()]
    bindings += ["--gin.TASK_FEATURE_LENGTHS={'inputs': 80, 'targets': 18}"]
    root, configs = engines._t5x_root(), gin_utils.configs_dir()
    paths = [configs / "engines/t5x/train", configs / "engines/t5x", configs, root]
    by_hand = [
        *(sys.executable, "-m", "t5x.train", "--gin_file=tiny.gin", *bindings),
        f"--gin_search_paths=.,{','.join(map(str, paths))}",
        f"--gin.MODEL_DIR='{work / 'packed'}'",
    ]
    t5x_runs.call(by_hand, work)
    arguments = ("train", "--engine=builtin", "--gin_file=tiny.gin", *bindings)
    t5x_runs.call(t5x_runs.command(*arguments, f"--gin.MODEL_DIR={work / 'packed_builtin'}"), work)
    agree(work / "packed", work / "packed_builtin", original, 8)
    first = t5x_runs.losses(work / "packed")[1]
    assert abs(first / t5x_runs.losses(trained)[1] - 1) > 1e-3  # other batches, indeed


def test_the_optimizer_s_state_in_the_checkpoint_is_the_plugin_s(trained):
    tree = ocp.PyTreeCheckpointer().metadata(trained / "checkpoint_20" / "state")
    state = tree.item_metadata.tree["state"]["param_states"]
    sizes = [int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(state) if leaf is not None]
    leaves = t5x_runs.plugin_leaves(trained / "checkpoint_20")
    trained_size = sum(x.size for name, x in leaves.items() if not name.endswith("output_scale"))
    assert sum(size for size in sizes if size > 1) == 2 * trained_size


def test_the_losses_of_one_device_on_meshes_of_four(work, trained, original):
    runs = {mesh: work / f"mesh_{mesh[0]}x{mesh[1]}" for mesh in MESHES}
    options = ("train", "--gin_file=tiny.gin", "--gin.EVAL_PERIOD=20")
    commands = [
        (*options, f"--gin.MESH_SHAPE={mesh}", f"--gin.MODEL_DIR={run}")
        for mesh, run in runs.items()
    ]
    t5x_runs.call_together(commands, work, devices=4)
    for run in runs.values():
        assert t5x_runs.losses(run) == pytest.approx(t5x_runs.losses(trained), rel=1e-5)
        assert_same(t5x_runs.backbone_leaves(run / "checkpoint_20"), original)


def test_a_killed_run_from_a_legacy_checkpoint_continues_as_if_undisturbed(work, trained, original):
    run = work / "killed"
    arguments = ("train", "--gin_file=tiny.gin", "--gin_file=decoded.gin", f"--gin.MODEL_DIR={run}")
    legacy = f"--gin.INITIAL_CHECKPOINT_PATH={work / 'legacy'}"
    program = t5x_runs.command(*arguments, legacy)
    with open(work / "killed.log", "w") as log:
        process = subprocess.Popen(
            program, cwd=work, env=t5x_runs.environment(), stdout=log, stderr=log
        )
        while not (run / "checkpoint_10" / "commit_success.txt").exists():
            assert process.poll() is None, (work / "killed.log").read_text()[-6000:]
            time.sleep(0.02)
        process.kill()
        process.wait()
    assert not list(run.glob("checkpoint_20*"))

    t5x_runs.call(program, work)
    resumed = t5x_runs.file_losses(t5x_runs.event_files(run)[1])
    undisturbed = t5x_runs.losses(trained)
    assert resumed == {step: undisturbed[step] for step in range(11, 21)}
    at_the_end = t5x_runs.plugin_leaves(run / "checkpoint_20")
    assert_same(at_the_end, t5x_runs.plugin_leaves(trained / "checkpoint_20"))
    assert_same(t5x_runs.backbone_leaves(run / "checkpoint_20"), original)


@pytest.fixture(scope="module")
def seeded(work, plugin):
    """A T5X run in bfloat16 from a plugin folder, 2 steps, and then resumed for 2 more."""
    run = work / "seeded"
    options = ("train", "--gin_file=tiny.gin", *SHORT, f"--gin.MODEL_DIR={run}")
    options += (f"--gin.INITIAL_PLUGIN_PATH={plugin}",)
    t5x_runs.call_together([(*options, f"--gin.TRAIN_STEPS={n}") for n in (2, 4)], work)
    return run


def test_plugin_folders_go_from_t5x_to_t5x(plugin, trained, backbone, seeded):
    folder = t5x_runs.folder_leaves(plugin)
    assert_same(folder, t5x_runs.plugin_leaves(trained / "checkpoint_20"))
    assert load_plugin(plugin, backbone).description["training"]["engine"] == "t5x"
    assert_same(t5x_runs.plugin_leaves(seeded / "checkpoint_0"), folder)
    assert t5x_runs.farthest(t5x_runs.plugin_leaves(seeded / "checkpoint_2"), folder) > 0
    logs = [list(t5x_runs.file_losses(file)) for file in t5x_runs.event_files(seeded)]
    assert logs == [[1, 2], [3, 4]]


def test_the_builtin_engine_adapts_a_plugin_of_t5x(work, plugin, trained, seeded, tmp_path, capsys):
    options = (f"--gin_file={work / 'tiny.gin'}", "--gin.TRAIN_STEPS=2", "--gin.WARMUP_STEPS=0")
    paths = (f"--gin.MODEL_DIR={tmp_path / 'run'}", f"--gin.INITIAL_PLUGIN_PATH={plugin}")
    assert cli.main(["train", "--engine=builtin", *options, *paths]) == 0, capsys.readouterr().err
    first = t5x_runs.builtin_losses(tmp_path / "run")[1]
    assert first == pytest.approx(t5x_runs.losses(seeded)[1], rel=0.02)  # which is in bfloat16
    assert first < t5x_runs.losses(trained)[1]  # the same batch, under a fresh plugin


@pytest.mark.parametrize("step", [0, 2, 4])
def test_bfloat16_under_a_float32_plugin_after_resuming_too(step, seeded, original):
    checkpoint = seeded / f"checkpoint_{step}"
    cast = {name: leaf.astype(jnp.bfloat16) for name, leaf in original.items()}
    assert_same(t5x_runs.backbone_leaves(checkpoint), cast)
    assert {x.dtype for x in t5x.open_checkpoint(checkpoint).plugin.values()} == {np.dtype("f4")}
    tree = ocp.PyTreeCheckpointer().metadata(checkpoint / "state").item_metadata.tree
    assert tree["state"]["step"].dtype == np.int32
