"""Ends of real processes: two interrupts, no space, no device. Each prints one line."""

import signal
import subprocess
import sys

import pytest
from launching import child

START = """
import argparse, pathlib, resource, signal, sys, threading, time
from variator_jax.commands import registry

# A shell's background job, such as these tests may be, ignores it.
signal.signal(signal.SIGINT, signal.default_int_handler)

@registry.command("probe", lambda parser: parser.add_argument("folder"))
def probe(args):
    "A command."
{body}

sys.exit(registry.run(["probe", sys.argv[1]]))
"""
# Like Orbax's: a thread that is not done, for which the interpreter would wait at its end.
INTERRUPTED = """
    threading.Thread(target=time.sleep, args=(60,)).start()
    try:
        print(flush=True)
        time.sleep(60)
    finally:
        print(flush=True)
        time.sleep({unwinds})
"""
FULL = """
    import jax.numpy as jnp, numpy as np
    from variator_jax.train.run_folder import Checkpoints
    from variator_jax.train.step import TrainState
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    checkpoints = Checkpoints(pathlib.Path(args.folder) / ("long" * 40), 2, {})
    weights = np.random.default_rng(0).normal(size=(8, 64, 1024)).astype(np.float32)
    checkpoints.save(TrainState(jnp.int32(1), dict(enumerate(map(jnp.asarray, weights))), ()))
    checkpoints.close()
"""
NO_DEVICE = """
    import jax
    print(jax.devices())
"""


def start(body, folder, **environment):
    program = [sys.executable, "-c", START.format(body=body.strip("\n")), str(folder)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(program, env=child(**environment), **options)


@pytest.mark.parametrize("unwinds", [60, 0])
def test_a_second_interrupt_ends_the_process_with_one_line(tmp_path, unwinds):
    with start(INTERRUPTED.format(unwinds=unwinds), tmp_path) as process:
        for _ in range(2 if unwinds else 1):
            process.stdout.readline()
            process.send_signal(signal.SIGINT)
        if not unwinds:  # The first one's line is out; now the process waits for its thread.
            assert process.stderr.readline() == "variator: interrupted\n"
            process.send_signal(signal.SIGINT)
        err = process.stderr.read()
    assert process.returncode == 130
    assert err == ("variator: interrupted twice\n" if unwinds else "")


def test_a_checkpoint_that_finds_no_space_is_one_line(tmp_path):
    process = start(FULL, tmp_path)
    err = process.communicate()[1]
    assert process.returncode == 2 and err.count("\n") == 1
    assert str(tmp_path) in err and "cannot be saved: File too large" in err


def test_a_platform_without_a_device_is_one_line(tmp_path):
    process = start(NO_DEVICE, tmp_path, JAX_PLATFORMS="cuda")
    err = process.communicate()[1]
    assert process.returncode == 2 and err.count("\n") == 1
    assert "JAX_PLATFORMS=cuda: JAX finds no such device" in err
