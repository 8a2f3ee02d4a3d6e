"""One process, several devices: the same losses and the same plugin on every mesh."""

import math
import shutil

import jax
import pytest
import t5x_runs
import tiny_runs

from variator_jax.store import load_backbone

STEPS = 12
# What is run on four devices, and what it is compared with on one.
CASES = {
    "data": {"mesh_shape": (4, 1, 1)},
    "fsdp": {"mesh_shape": (1, 4, 1)},
    "microbatches": {"mesh_shape": (2, 1, 2), "num_microbatches": 2},
    "resumed": {"mesh_shape": (1, 2, 2)},
    "bfloat16": {"mesh_shape": (2, 2, 1), "backbone_dtype": "bfloat16"},
    "whole": {"mesh_shape": (1, 2, 2), "trained": "backbone", "steps": 6},
}
LIKE_ONE = ("data", "fsdp", "microbatches", "resumed")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tiny_runs.save_tiny_backbone(tmp_path_factory.mktemp("meshes"))


@pytest.fixture(scope="module")
def found(work):
    """What one child process with four devices found, while this one ran on its own one."""
    settings = {"initial_checkpoint_path": str(work / "backbone"), "steps": STEPS}
    tiny_runs.run(work / "one", checkpoint_period=STEPS // 2, **settings)
    half_way(work / "one", work / "resumed", STEPS // 2)
    cases = [
        ["train", {"model_dir": str(work / name), **settings, **own}] for name, own in CASES.items()
    ]
    there = {"backbone": str(work / "backbone")}
    cases += [["shards", there | {"mesh_shape": shape}] for shape in ((1, 4, 1), (1, 2, 2))]
    cases += [["moments", there | {"mesh_shape": (1, 2, 2)}]]
    child = tiny_runs.start(cases, devices=4)
    for name in ("bfloat16", "whole"):
        own = settings | CASES[name] | {"mesh_shape": None}
        tiny_runs.run(work / f"one_{name}", **own)
    results, printed = tiny_runs.finish(child)
    return {"shards": results[-3:-1], "moments": results[-1], "printed": printed}


def half_way(run, copy, step):
    """A copy of a run's folder, as it was when it had saved that step."""
    shutil.copytree(run, copy)
    for later in ("plugin", f"checkpoints/{STEPS}"):
        shutil.rmtree(copy / later)
    rows = (copy / "log.jsonl").read_text().splitlines(keepends=True)
    (copy / "log.jsonl").write_text("".join(rows[:step]))


def difference(run, reference):
    """The largest relative difference of two runs' losses, which are of the same steps."""
    ours, theirs = t5x_runs.builtin_losses(run), t5x_runs.builtin_losses(reference)
    assert ours.keys() == theirs.keys()
    return max(abs(ours[step] / theirs[step] - 1) for step in ours)


@pytest.mark.parametrize("case", LIKE_ONE)
def test_a_mesh_has_the_losses_and_the_plugin_of_one_device(found, work, case):
    losses = list(t5x_runs.builtin_losses(work / "one").values())
    assert len(losses) == STEPS and losses[-1] < 0.8 * losses[0]  # It trained, indeed.
    distance = difference(work / case, work / "one")
    moved = t5x_runs.farthest(
        *(t5x_runs.folder_leaves(work / run / "plugin") for run in (case, "one"))
    )
    print(f"{case}: losses differ by {distance:.1e}, plugins by {moved:.1e}")
    assert distance < 1e-5 and moved < 1e-5


def test_one_of_them_went_on_from_where_one_device_had_stopped(found):
    assert f"resuming at step {STEPS // 2}\n" in found["printed"]


@pytest.mark.parametrize("case", ["bfloat16", "whole"])
def test_a_rounded_and_a_trained_backbone_agree_too(found, work, case):
    distance = difference(work / case, work / f"one_{case}")
    print(f"{case}: losses differ by {distance:.1e}")
    assert distance < 1e-5


def test_a_rounded_backbone_is_another_one(found, work):
    assert difference(work / "one_bfloat16", work / "one") > 1e-4


def test_each_mesh_is_told_with_its_bytes(found):
    for text in ("mesh 4 x 1 x 1", "mesh 1 x 4 x 1", "backbone: 0."):
        assert text in found["printed"]


def test_restored_weights_lie_in_parts(found):
    """A quarter on each of four devices, but for what has no axis that is cut."""
    for leaves in found["shards"]:
        for path, (shape, parts) in leaves.items():
            [part] = parts
            quarter = math.prod(part) * 4 == math.prod(shape)
            # Norms have no axis of `model`, and the position biases none of `fsdp`.
            assert quarter or path.endswith(("scale", "rel_embedding")), path
        whole = sum(math.prod(shape) for shape, _ in leaves.values())
        assert sum(math.prod(parts[0]) for _, parts in leaves.values()) < 0.27 * whole


def test_moments_lie_where_their_weights_lie(found):
    moments, weights = found["moments"]["moments"], found["moments"]["weights"]
    for name in ("mu", "nu"):
        own = {path.split(f"{name}/")[1]: v for path, v in moments.items() if f"{name}/" in path}
        assert own == weights
    [part] = weights["encoder/layers_0/mlp/wi_0/kernel"]
    assert math.prod(part) == 16 * 32 / 4


def test_a_trained_backbone_is_written_whole(found, work):
    both = [
        {
            jax.tree_util.keystr(path): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(load_backbone(run).params)
        }
        for run in (work / "whole" / "backbone", work / "one_whole" / "backbone")
    ]
    assert t5x_runs.farthest(*both) < 1e-3
