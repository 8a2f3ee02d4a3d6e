"""One gin file, two engines: the same losses and the same plugin, and a backbone left alone."""

import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import t5x_runs

from variator_jax import gin_utils
from variator_jax.commands import engines


def agree(run, builtin, backbone_path, steps):
    """Losses within 1e-4, plugins within 1e-3; and the backbone's bits are the checkpoint's."""
    found, expected = t5x_runs.losses(run), t5x_runs.builtin_losses(builtin)
    assert list(found) == list(expected) == list(range(1, steps + 1))
    difference = max(abs(found[step] / expected[step] - 1) for step in expected)
    assert difference < 1e-4
    latest = run / f"checkpoint_{steps}"
    moved = t5x_runs.farthest(
        t5x_runs.plugin_leaves(latest), t5x_runs.folder_leaves(builtin / "plugin")
    )
    assert moved < 1e-3
    print(f"losses differ by {difference:.1e}, plugins by {moved:.1e}")
    t5x_runs.same_bits(t5x_runs.backbone_leaves(latest), t5x_runs.backbone_leaves(backbone_path))
    return list(found.values())


def test_losses_and_plugins_agree_and_the_backbone_is_untouched(work, trained, builtin):
    agree(trained, builtin, work / "backbone" / "checkpoint_1000", 20)
    before, after = (t5x_runs.plugin_leaves(trained / f"checkpoint_{n}") for n in (10, 20))
    assert t5x_runs.farthest(after, before) > 0.01  # It trained, indeed.


def test_the_log_has_the_terms_of_the_loss_and_its_sum(trained):
    total, *terms = (
        t5x_runs.losses(trained, tag) for tag in ("loss", "encoder_hidden", "decoder_hidden")
    )
    for step, loss in total.items():
        assert loss == pytest.approx(sum(term[step] for term in terms), rel=1e-5)


def test_microbatches_and_packing_agree_too_and_t5x_runs_by_hand(work, trained):
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
    values = agree(
        work / "packed", work / "packed_builtin", work / "backbone" / "checkpoint_1000", 8
    )
    assert abs(values[0] / t5x_runs.losses(trained)[1] - 1) > 1e-3  # other batches, indeed


def test_the_optimizer_s_state_in_the_checkpoint_is_the_plugin_s(trained):
    tree = ocp.PyTreeCheckpointer().metadata(trained / "checkpoint_20" / "state")
    state = tree.item_metadata.tree["state"]["param_states"]
    sizes = [int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(state) if leaf is not None]
    leaves = t5x_runs.plugin_leaves(trained / "checkpoint_20")
    trained_size = sum(x.size for name, x in leaves.items() if not name.endswith("output_scale"))
    assert sum(size for size in sizes if size > 1) == 2 * trained_size
