"""One process, several devices: the losses and the weights of one device on every mesh."""

import math
import shutil

import jax
import pytest
import t5x_runs
import tiny_runs
from tiny import flat

from variator_jax.store import load_backbone, load_lora, load_plugin

STEPS = 6
# What is run on four devices; 'fsdp', 'microbatches' and 'resumed' are like 'plugin' on one.
CASES = {
    "fsdp": {"mesh_shape": (1, 4, 1)},
    "microbatches": {"mesh_shape": (2, 1, 2), "num_microbatches": 2},
    "resumed": {"mesh_shape": (1, 2, 2)},
    "mixed sites, bfloat16": {
        "mesh_shape": (2, 2, 1), "backbone_dtype": "bfloat16",
        "sites": ("ffn 0", "kv 0 rank=2", "span 1 rank=2"),
    },
    "whole": {"mesh_shape": (1, 2, 2), "trained": "backbone"},
    "lora": {"mesh_shape": (1, 2, 2), "trained": "lora"},
}  # fmt: skip
ON_ONE = {"plugin": {}} | {name: CASES[name] for name in list(CASES)[3:]}


@pytest.fixture(scope="module")
def found(work):
    """The results of one child process with four devices; meanwhile this one runs on its one."""
    path = str(work / "backbone")
    settings = {"initial_checkpoint_path": path, "steps": STEPS}
    tiny_runs.run(work / "one_plugin", checkpoint_period=STEPS // 2, **settings)
    later = shutil.ignore_patterns("plugin", str(STEPS), "log.jsonl")
    shutil.copytree(work / "one_plugin", work / "resumed", ignore=later)
    cases = [["train", {"model_dir": str(work / n), **settings, **CASES[n]}] for n in CASES]
    cases += [["placement", {"backbone": path, "mesh_shape": shape}] for shape in SHAPES]
    child = tiny_runs.start(cases, devices=4)
    for name, own in ON_ONE.items():
        if name != "plugin":
            tiny_runs.run(work / f"one_{name}", **settings | own | {"mesh_shape": None})
    results, printed = tiny_runs.finish(child)
    return {"placed": results[-2:], "printed": printed}


SHAPES = ((1, 4, 1), (1, 2, 2))
LOADED = {"whole": (load_backbone, "backbone"), "lora": (load_lora, "lora")}


def difference(run, reference):
    """The largest relative difference of two runs' losses."""
    ours, theirs = t5x_runs.builtin_losses(run), t5x_runs.builtin_losses(reference)
    assert len(ours) in (STEPS, STEPS // 2)
    return max(abs(ours[step] / theirs[step] - 1) for step in ours)


@pytest.mark.parametrize("case", CASES)
def test_a_mesh_has_the_losses_and_the_weights_of_one_device(found, work, case):
    reference = f"one_{case}" if case in ON_ONE else "one_plugin"
    distance = difference(work / case, work / reference)
    print(f"{case}: losses differ by {distance:.1e}")
    assert distance < 1e-5
    one = t5x_runs.builtin_losses(work / reference)
    assert one[STEPS] < 0.95 * one[1] or case == "lora"  # It trained, indeed.
    load, exported = LOADED.get(case, (lambda run: load_plugin(run).variables, "plugin"))
    trees = [flat(jax.device_get(load(work / run / exported).params)) for run in (case, reference)]
    assert t5x_runs.farthest(*trees) < (1e-3 if case in LOADED else 1e-5)


def test_each_mesh_is_printed_with_its_bytes_and_a_run_continues_on_another_mesh(found):
    resumed = f"resuming at step {STEPS // 2}, "
    for text in ("mesh 2 x 1 x 2", "mesh 1 x 4 x 1", "backbone: 0.", resumed):
        assert text in found["printed"]


def test_weights_and_their_moments_are_in_parts(found):
    """A quarter on each of four devices, but for what has no axis that is cut."""
    for placed in found["placed"]:
        for path, (part,) in placed["weights"].items():
            quarter = math.prod(part) * 4 == math.prod(placed["shapes"][path])
            # Norms have no axis of `model`, and the position biases none of `fsdp`.
            assert quarter or path.endswith(("scale", "rel_embedding")), path
        for name in ("mu", "nu"):
            own = {
                path.split(f"{name}/")[1]: parts
                for path, parts in placed["moments"].items()
                if f"{name}/" in path
            }
            assert own == placed["weights"]
