"""The compiled step: what is sent between devices, what is computed, and what is kept.

One process with four devices compiles all steps; this one reads its results.
"""

import json
import os
import sys

import compiled_steps
import pytest
import t5x_runs

BATCH, LENGTH, TARGETS = 8, 24, 6
CONFIG = {
    "name": "tiny", "vocab_size": 352, "embed_dim": 32, "num_heads": 4, "head_dim": 8,
    "mlp_dim": 80, "num_encoder_layers": 2, "num_decoder_layers": 1,
}  # fmt: skip
MESHES = [(1, 1, 1), (4, 1, 1), (1, 2, 2), (2, 1, 2)]
# Deep and wide, so that what is kept for the backward pass outweighs all else.
DEEP = CONFIG | {
    "embed_dim": 64, "num_heads": 2, "head_dim": 32, "mlp_dim": 256, "num_encoder_layers": 6,
    "num_decoder_layers": 0,
}  # fmt: skip
# As accelerators do, order the operations by the memory they need, and not by what could run at
# the same time.
FLAGS = f"{os.environ['XLA_FLAGS']} --xla_cpu_enable_concurrency_optimized_scheduler=false"
REMAT = [False, "dots", True]


@pytest.fixture(scope="module")
def found():
    """The steps by mesh and by remat, from one child process."""
    cases, deep = [{"config": CONFIG, "mesh_shape": mesh} for mesh in MESHES], MESHES[0]
    for remat in REMAT:
        cases.append({"config": DEEP | {"remat": remat}, "mesh_shape": deep, "length": 32})
    program = [sys.executable, compiled_steps.__file__, json.dumps(cases)]
    out = t5x_runs.call(program, ".", devices=f"4 {FLAGS}").stdout
    return dict(zip([*MESHES, *REMAT], json.loads(out.splitlines()[-1]), strict=True))


def arrays(step, *kinds):
    """Shapes and bytes of what the step's collectives of these kinds give."""
    return [tuple(a) for kind, results in step["collectives"] if kind in kinds for a in results]


def test_copies_exchange_the_plugin_s_gradients_and_share_the_work(found):
    alone, step = found[1, 1, 1], found[4, 1, 1]
    assert alone["collectives"] == []
    assert step["flops"] == pytest.approx(alone["flops"] / 4, rel=0.03)
    assert {kind for kind, _ in step["collectives"]} == {"all-reduce"}
    sent = sum(size for _, size in arrays(step, "all-reduce"))
    assert step["plugin"] <= sent <= 1.1 * step["plugin"] + 1024


@pytest.mark.parametrize("mesh", [(1, 2, 2), (2, 1, 2)])
def test_no_activation_is_gathered_over_the_batch(found, mesh):
    """The batch is cut into parts of 2 or 4 rows, and nothing has 8 rows anywhere."""
    step = found[mesh]
    rows = [shape for shape, _ in arrays(step, *compiled_steps.KINDS) if len(shape) > 2]
    assert all(shape[0] == BATCH // (mesh[0] * mesh[1]) for shape in rows)
    assert {kind for kind, _ in step["collectives"]} <= {"all-reduce", "all-gather"}
    # What is gathered are weights: of two axes, or of one, and along `embed`.
    weights = arrays(step, "all-gather")
    assert bool(weights) == (mesh[1] > 1)
    assert all(len(shape) <= 2 and CONFIG["embed_dim"] in shape for shape, _ in weights)
    assert bool(rows) == (mesh[2] > 1)


def test_each_weight_is_gathered_once_at_most_and_no_gradient_of_it_is_sent(found):
    step = found[1, 2, 2]
    embed, mlp, vocab = (CONFIG[name] for name in ("embed_dim", "mlp_dim", "vocab_size"))
    joined, layers = CONFIG["num_heads"] * CONFIG["head_dim"], 3  # two of the encoder
    matrices = 4 * (layers + 1) * embed * joined + 3 * layers * embed * mlp + vocab * embed
    scales = embed * (2 * layers + 1 + 2)
    gathered = sum(size for _, size in arrays(step, "all-gather"))
    assert gathered <= 4 * (matrices / 2 + scales)  # the mesh halves what has the axis `model`
    reduced = [size for shape, size in arrays(step, "all-reduce") if len(shape) <= 2]
    assert sum(reduced) <= 1.1 * step["plugin"] + 1024


@pytest.mark.parametrize("mesh", MESHES)
def test_a_step_gives_back_a_plugin_and_its_moments(found, mesh):
    """No backbone is among its results; all but the metrics take over the old state's memory."""
    step = found[mesh]
    assert 3 * step["plugin"] <= step["output"] <= 3 * step["plugin"] + 1024
    assert 3 * step["plugin"] <= step["aliased"]


def test_rematerialisation_saves_memory_and_costs_work(found):
    everything, dots, nothing = map(found.get, REMAT)
    # Which of the two keeps less hangs on the order that XLA finds; on CPUs it is often 'dots'.
    assert max(nothing["temporary"], dots["temporary"]) < 0.75 * everything["temporary"]
    assert everything["flops"] < dots["flops"] < nothing["flops"]
