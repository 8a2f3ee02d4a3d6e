"""Tiny runs of the built-in engine, here or in processes that pretend to have several devices.

As a script it carries out the cases that `start` hands it, one after the other in one process, for
the imports take longer than the runs. It prints one line of JSON for each.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import seqio

from variator_jax import distributed
from variator_jax import mesh as meshes
from variator_jax.backbones.t5 import get_config, init_params
from variator_jax.data.spec import TaskSpec, register_spec
from variator_jax.data.tasks import text_to_text_task
from variator_jax.errors import VariatorError
from variator_jax.plugin import PluginConfig
from variator_jax.store import formats, load_backbone, save_backbone
from variator_jax.train import jobs, optimizers, train
from variator_jax.train.loop import Schedule
from variator_jax.train.settings import DataConfig, TrainConfig
from variator_jax.train.step import init_state, placed_state

ROOT = Path(__file__).parents[1]
TASK = "tiny_runs_parity"
TINY = get_config(
    "nano", vocab_size=384, embed_dim=16, num_heads=2, head_dim=8, mlp_dim=32,
    num_encoder_layers=2, num_decoder_layers=1,
)  # fmt: skip
DATA = DataConfig(TASK, {"inputs": 18, "targets": 6}, 8, eval_batches=0)
STREAMED = dataclasses.replace(DATA, packed=True, pack_multiple=4, data_shards=2)
# LLVM's own optimisation takes most of the time to compile, and nothing here is large.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def _examples(split):
    rng = np.random.default_rng(["train", "validation"].index(split))
    texts = ["".join(rng.choice(list("ab"), rng.integers(3, 17))) for _ in range(64)]
    return [{"inputs": t, "targets": "even" if t.count("a") % 2 == 0 else "odd"} for t in texts]


if TASK not in seqio.TaskRegistry.names():
    text_to_text_task(TASK, _examples, ("train", "validation"), seqio.ByteVocabulary(extra_ids=0))
    register_spec(TaskSpec(TASK, "classification", ("odd", "even")))


def run(model_dir, steps=6, *, checkpoint_period=100, learning_rate=1e-2, **settings):
    """One run of `train`; a row of the log for each step."""
    adamw = optimizers.optimizer("adamw", learning_rate, "constant", weight_decay=0.1)
    fields = {
        "model_dir": str(model_dir),
        "data": DATA,
        "schedule": Schedule(steps, 1, 0, checkpoint_period),
        "optimizer": adamw,
        "backbone": TINY,
        "plugin": PluginConfig(4, bottleneck=4),
    }
    return train.train(TrainConfig(**fields | settings))


def save_tiny_backbone(folder):
    """Puts a backbone of random weights into `folder / "backbone"`; returns the folder."""
    save_backbone(folder / "backbone", TINY, init_params(TINY, jax.random.key(0)))
    return folder


# In other processes.


def start(cases, devices, place=None):
    """Starts a process with so many devices that carries out `cases`: `[kind, arguments]`.

    `place` is its place in a run of several: `(address, count, index)`.
    """
    paths = [str(ROOT), *(path for path in sys.path if path)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "XLA_FLAGS": f"{QUICK} --xla_force_host_platform_device_count={devices}",
    }
    program = [sys.executable, __file__, json.dumps([place, cases])]
    pipe = subprocess.PIPE
    return subprocess.Popen(program, env=environment, stdout=pipe, stderr=pipe, text=True)


def finish(process, code=0):
    """What the process found, case by case; the test fails with its log if it exits otherwise."""
    out, err = process.communicate()
    assert process.returncode == code, f"exit code {process.returncode}\n{out[-1000:]}{err[-6000:]}"
    return [json.loads(line) for line in out.splitlines() if line.startswith("{")], err


def _train(model_dir, happening=None, streamed=False, **settings):
    """A run; `[signal's name, step, process]` happens when that process fetches that batch."""
    real = DataConfig.train
    filled = set()

    def stream(self, first, rows=None):
        for number, batch in enumerate(real(self, first, rows), start=first):
            filled.add(int(batch["encoder_input_tokens"].any(axis=1).sum()))
            if happening and happening[1:] == [number, jax.process_index()]:
                os.kill(os.getpid(), getattr(signal, happening[0]))
            yield batch

    DataConfig.train = stream
    try:
        result = run(model_dir, data=STREAMED if streamed else DATA, **settings)
    finally:
        DataConfig.train = real
    return {"step": result.step, "interrupted": result.interrupted, "rows_read": sorted(filled)}


def _shards(backbone, mesh_shape):
    """For each weight, restored from a folder, its shape and those of its parts on devices."""
    mesh = meshes.make_mesh(TINY, DATA.batch_size, mesh_shape)
    restored = jobs.load_initial_backbone(str(backbone), TINY, DATA, mesh)
    assert all(map(np.array_equal, *map(jax.tree.leaves, (restored.params, _host(backbone)))))
    return {path: [leaf.shape, _parts(leaf)] for path, leaf in _flat(restored.params)}


def _moments(backbone, mesh_shape):
    """Where the weights of a backbone that is trained lie, and AdamW's moments of them."""
    mesh = meshes.make_mesh(TINY, DATA.batch_size, mesh_shape)
    optimizer = optimizers.optimizer("adamw", 1e-2, "constant")
    schedule, path = Schedule(1), str(backbone)
    config = TrainConfig("", DATA, schedule, optimizer, TINY, initial_checkpoint_path=path)
    params, _ = jobs.backbone_job(config, mesh).start()
    state = placed_state(init_state(params, optimizer), mesh)
    moments, weights = (
        {path: _parts(leaf) for path, leaf in _flat(tree)}
        for tree in (state.opt_state, state.params)
    )
    return {"moments": moments, "weights": weights}


def _host(backbone):
    return load_backbone(formats.backbone_folder(str(backbone))).params


def _flat(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]


def _parts(leaf):
    return sorted({shard.data.shape for shard in leaf.addressable_shards})


def _main():
    place, cases = json.loads(sys.argv[1])
    kinds = {"train": _train, "shards": _shards, "moments": _moments}
    if place:
        distributed.initialize(*place)
    try:
        with distributed.fail_fast():
            for kind, arguments in cases:
                print(json.dumps(kinds[kind](**arguments)), flush=True)
    except VariatorError as error:
        print(f"variator: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    _main()
