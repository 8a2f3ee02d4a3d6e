"""Starts T5X's programs for tests, and reads what they wrote. Importing this does not import T5X.

As a script it runs several commands of `variator` in one process, T5X's programs included: their
imports take longer than what the tests let them do.
"""

import json
import os
import subprocess
import sys

import launching
import numpy as np


def environment(devices=1):
    """What a child process needs: our package, T5X where this process finds it, and devices."""
    return launching.child(
        XLA_FLAGS=f"--xla_force_host_platform_device_count={devices}",
        # What one process has compiled, the next one need not.
        JAX_COMPILATION_CACHE_DIR=os.path.join(os.environ["VARIATOR_CACHE"], "compiled"),
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0.1",
    )


def command(*arguments):
    """The call of `variator` with these arguments."""
    return [sys.executable, "-m", "variator_jax", *map(str, arguments)]


def call(program, cwd, devices=1, code=0):
    """Runs a program to its end; the test fails with its log if it exits otherwise."""
    done = subprocess.run(
        program, cwd=cwd, env=environment(devices), capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-6000:]
    return done


def call_together(commands, cwd, devices=1):
    """Runs commands of `variator` one after the other, in one process."""
    return call([sys.executable, __file__, json.dumps(commands, default=str)], cwd, devices)


def _in_this_process(arguments):
    """In place of `engines.run_program`: gin is parsed already, so the program is one call."""
    import importlib

    from variator_jax import gin_utils
    from variator_jax.commands import engines

    module = arguments[2]
    name = {"t5x.eval": "evaluate", "t5x.export": "save"}.get(module, module.removeprefix("t5x."))
    library = importlib.import_module("t5x.export_lib" if name == "save" else module)
    with engines.as_main(module):
        gin_utils.configured(getattr(library, name))()


def _main():
    from absl import flags

    from variator_jax import cli
    from variator_jax.commands import engines

    flags.FLAGS(sys.argv[:1])
    engines.run_program = _in_this_process
    for arguments in json.loads(sys.argv[1]):
        if code := cli.main(arguments):
            sys.exit(code)


# What was written.


def losses(run, tag="loss"):
    """{step: value} of a T5X run's training log; later files go before earlier ones."""
    logs = [file_losses(file, tag) for file in event_files(run)]
    return {step: value for log in logs for step, value in log.items()}


def event_files(run):
    """The logs of a run's processes, oldest first."""
    return sorted((run / "train").glob("events.*"), key=lambda file: file.stat().st_mtime_ns)


def file_losses(file, tag="loss"):
    """{step: value} of the log of one process."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util import tensor_util

    log = EventAccumulator(str(file), size_guidance={"tensors": 0})
    log.Reload()
    return {e.step: float(tensor_util.make_ndarray(e.tensor_proto)) for e in log.Tensors(tag)}


def builtin_losses(run):
    """{step: loss} of a built-in run's training log."""
    rows = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows if row["kind"] == "train"}


def backbone_leaves(checkpoint):
    """{path: array} of a T5X checkpoint, without its plugin."""
    from variator_jax.store import t5x

    return {name: x.read(...) for name, x in t5x.open_checkpoint(checkpoint).backbone.items()}


def plugin_leaves(checkpoint):
    """{path: array} of a T5X checkpoint's plugin."""
    from variator_jax.store import t5x

    return {name: x.read(...) for name, x in t5x.open_checkpoint(checkpoint).plugin.items()}


def folder_leaves(folder):
    """{path: array} of a plugin folder, named as a T5X checkpoint names them."""
    from flax import traverse_util

    from variator_jax.store import load_plugin

    variables = load_plugin(folder).variables
    leaves = {f"plugin/{key}/output_scale": a for key, a in variables.output_scales.items()}
    for key, params in variables.params.items():
        for name, array in traverse_util.flatten_dict(params, sep="/").items():
            leaves[f"plugin/{key}/{name}"] = array
    return {name: np.asarray(leaf) for name, leaf in leaves.items()}


def farthest(one, other):
    """The largest difference of two trees' leaves, relative to each leaf's largest number."""
    assert one.keys() == other.keys()
    return max(np.abs(one[n] - other[n]).max() / np.abs(other[n]).max() for n in one)


def results(folder, mode):
    """The rows that `infer` wrote."""
    [file] = folder.glob(f"*-{mode}.jsonl-00000-of-00001")
    return [json.loads(line) for line in file.read_text().splitlines()]


if __name__ == "__main__":
    _main()
