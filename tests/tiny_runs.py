"""Tiny runs of the built-in engine, here or in processes that pretend to have several devices.

As a script it carries out the cases that `start` hands it, one after the other in one process, for
the imports take longer than the runs. It prints one line of JSON for each.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import launching
import numpy as np
import seqio
from tiny import TINY

from variator_jax import distributed
from variator_jax import mesh as meshes
from variator_jax.backbones.t5 import init_params
from variator_jax.data.spec import TaskSpec, register_spec
from variator_jax.data.tasks import text_to_text_task
from variator_jax.errors import VariatorError
from variator_jax.plugin import PluginConfig
from variator_jax.store import formats, load_backbone, save_backbone
from variator_jax.train import jobs, optimizers, train
from variator_jax.train.loop import Schedule
from variator_jax.train.settings import DataConfig, TrainConfig
from variator_jax.train.step import init_state, placed_state

TASK = "tiny_runs_parity"
DATA = DataConfig(TASK, {"inputs": 18, "targets": 6}, 8, eval_batches=0)


def _examples(split):
    rng = np.random.default_rng(["train", "validation"].index(split))
    texts = ["".join(rng.choice(list("ab"), rng.integers(3, 17))) for _ in range(64)]
    return [{"inputs": t, "targets": "even" if t.count("a") % 2 == 0 else "odd"} for t in texts]


if TASK not in seqio.TaskRegistry.names():
    text_to_text_task(TASK, _examples, ("train", "validation"), seqio.ByteVocabulary(extra_ids=0))
    register_spec(TaskSpec(TASK, "classification", ("odd", "even")))


def config(
    model_dir="",
    steps=6,
    *,
    checkpoint_period=100,
    learning_rate=1e-2,
    sites=("ffn all",),
    **settings,
):
    """Settings of a plugin run; a row of the log for each step."""
    adamw = optimizers.optimizer("adamw", learning_rate, "constant", weight_decay=0.1)
    fields = {"data": DATA, "optimizer": adamw, "backbone": TINY}
    fields["schedule"] = Schedule(steps, 1, 0, checkpoint_period)
    fields["plugin"] = PluginConfig(4, bottleneck=4, sites=sites)
    return TrainConfig(str(model_dir), **fields | settings)


def run(model_dir, steps=6, **settings):
    """One run of `train`."""
    return train.train(config(model_dir, steps, **settings))


def rows(model_dir, kind="train"):
    """The rows of a run's log."""
    logged = map(json.loads, (Path(model_dir) / "log.jsonl").read_text().splitlines())
    return [row for row in logged if row["kind"] == kind]


def save_tiny_backbone(folder):
    """Puts a backbone of random weights into `folder / "backbone"`; returns the folder."""
    save_backbone(folder / "backbone", TINY, init_params(TINY, jax.random.key(0)))
    return folder


# In other processes.


def start(cases, devices, place=None, script=__file__):
    """Starts a process with so many devices that carries out `cases`: `[kind, arguments]`.

    `place` is its place in a run of several: `(address, count, index)`. Another `script` has cases
    of its own.
    """
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    # Whole lines: Gloo writes lines of its own.
    environment = launching.child(PYTHONUNBUFFERED="", XLA_FLAGS=flags)
    program = [sys.executable, script, json.dumps([place, cases])]
    pipe = subprocess.PIPE
    return subprocess.Popen(program, env=environment, stdout=pipe, stderr=pipe, text=True)


def finish(process, code=0):
    """What the process found, case by case; the test fails with its log if it exits otherwise."""
    out, err = process.communicate()
    assert process.returncode == code, f"exit code {process.returncode}\n{out[-1000:]}{err[-6000:]}"
    return [json.loads(line) for line in out.splitlines() if line.startswith("{")], err


def _train(model_dir, happening=None, **settings):
    """A run; `[signal's name, step, process]` happens when that process fetches that batch."""
    real, period = DataConfig.train, settings.get("checkpoint_period", 100)

    def stream(self, first, rows=None):
        for number, batch in enumerate(real(self, first, rows), start=first):
            if happening and happening[1:] == [number, jax.process_index()]:
                saved = Path(model_dir, "checkpoints", str(number // period * period))
                for _ in range(2400 if number >= period else 0):  # two minutes at the most
                    if saved.is_dir():
                        break
                    time.sleep(0.05)
                os.kill(os.getpid(), getattr(signal, happening[0]))
            yield batch

    DataConfig.train = stream
    try:
        result = run(model_dir, **settings)
    finally:
        DataConfig.train = real
    return {"step": result.step, "interrupted": result.interrupted}


def _refused(learning_rates, **settings):
    """The error of a run whose processes have learning rates of their own."""
    try:
        run(learning_rate=learning_rates[jax.process_index()], **settings)
    except VariatorError as error:
        return {"error": str(error)}
    return {"error": ""}


def _placement(backbone, mesh_shape):
    """For each weight of a folder: its shape, and those of its parts and of its moments' parts."""
    mesh = meshes.make_mesh(TINY, DATA.batch_size, mesh_shape)
    job = jobs.backbone_job(config(trained="backbone", initial_checkpoint_path=str(backbone)), mesh)
    params, _ = job.start()
    host = load_backbone(formats.backbone_folder(str(backbone))).params
    assert all(map(np.array_equal, *map(jax.tree.leaves, (params, host))))
    optimizer = optimizers.optimizer("adamw", 1e-2, "constant")
    state = placed_state(init_state(params, optimizer), mesh)
    moments = _parts(state.opt_state)
    shapes = {path: leaf.shape for path, leaf in _flat(params)}
    return {"shapes": shapes, "weights": _parts(state.params), "moments": moments}


def _flat(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]


def _parts(tree):
    return {p: sorted({s.data.shape for s in x.addressable_shards}) for p, x in _flat(tree)}


def _main():
    place, cases = json.loads(sys.argv[1])
    kinds = {"train": _train, "refused": _refused, "placement": _placement}
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
