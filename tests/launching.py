"""The launch scripts as tests start them, and stand-ins of the programs that they call."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOST = "another process was lost; the same command continues from the newest checkpoint"
ANY_POD = ["tpu_pod.sh", "my-pod", "--zone", "z", "--type", "v4-32"]
POD = [*ANY_POD, "--no-check"]
SLURM = ["slurm.sbatch", "--no-check"]
SCRIPTS = ["local.sh", "tpu_pod.sh", "slurm.sbatch"]
TRAIN = ["train", "--gin.MODEL_DIR=/mnt/runs/a", "--gin.X=(1, 2)"]


def run(command, environment, **options):
    pipes = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL}
    return subprocess.run(command, env={**os.environ, **environment}, **pipes, **options)


def child(**variables):
    """The environment of a process that finds our package, and what this one imports."""
    paths = [str(ROOT), *filter(None, sys.path)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **variables}


def launch(script, *arguments, cwd=None, **environment):
    return run(["bash", ROOT / "launch" / script, *arguments], environment, cwd=cwd)


# A command that saves after a SIGTERM, and one that a child of its own outlives.
SAVES = """
trap 'sleep 0.3; echo saved; exit 143' TERM
touch "$HERE/up"
while :; do sleep 0.05; done
"""
OUTLIVED = '(trap "" TERM; sleep 0.1; echo the last lines) & exit 75'


def terminated(command, environment):
    """Sends SIGTERM to a shell, and to it alone, once the command in it is up."""
    environment = {**os.environ, **environment}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    while not (Path(environment["HERE"]) / "up").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    try:
        out, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, out
