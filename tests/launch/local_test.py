"""launch/local.sh: real processes that JAX joins, and what follows when one is lost."""

import shlex
import sys

import pytest
from launching import LOST, ROOT, launch

from variator_jax import cli

# One process of a run over all devices: each adds up, until an event.
PROGRAM = """
import os, signal, sys, time
from variator_jax import distributed, errors

EVENT, flags = sys.argv[1], dict(flag.lstrip("-").split("=") for flag in sys.argv[2:])
INDEX = int(flags["process_index"])
distributed.HEARTBEAT_SECONDS, distributed.FAREWELL_SECONDS = 8, 1

def work():
    distributed.initialize(flags["coordinator_address"], int(flags["process_count"]), INDEX)
    import jax, numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    mesh = Mesh(np.array(jax.devices()), ("data",))
    local = np.full(jax.local_device_count(), INDEX + 1, np.float32)
    rows = jax.make_array_from_process_local_data(
        NamedSharding(mesh, PartitionSpec("data")), local)
    add = jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(mesh, PartitionSpec()))
    print("sum", float(add(rows)), flush=True)
    for step in range(5):
        add(rows).block_until_ready()
    if EVENT == "another_run":
        from variator_jax.train.checkpointing import Checkpoints
        Checkpoints(flags["folder"], 1, {"ratio": 2})
    if EVENT == f"killed{INDEX}":
        os.kill(os.getpid(), signal.SIGKILL)
    if EVENT == "error1" and INDEX == 1:
        raise errors.DataError("a disk of process 1 is full")
    if EVENT == "killed1":
        time.sleep(600)  # outside of a collective
    while EVENT != "nothing":
        add(rows).block_until_ready()

try:
    with distributed.fail_fast():
        work()
except errors.VariatorError as error:
    print("error:", error, file=sys.stderr)
    sys.exit(2)
"""


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "program"
    path.write_text(f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\n{PROGRAM}")
    path.chmod(0o755)
    return ["--program", str(path)]


def test_local_joins_processes_with_several_devices_each(program):
    result = launch("local.sh", "2", "--devices", "2", *program, "--", "nothing")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "[0] sum 6.0\n" in result.stdout
    assert "[1] sum 6.0\n" in result.stdout


@pytest.mark.parametrize("event", ["killed0", "killed1"])
def test_a_killed_process_ends_the_other_with_a_message(program, event):
    killed, other = ("0", "1") if event == "killed0" else ("1", "0")
    result = launch("local.sh", "2", *program, "--", event)
    assert result.returncode == 128 + 9
    assert f"process {killed} ended with exit code 137" in result.stderr
    assert "ending the processes that are left" not in result.stderr  # It ended by itself.
    lines = [line for line in result.stdout.splitlines() if LOST in line]
    assert lines and all(line.startswith(f"[{other}]") for line in lines)


def test_an_error_in_one_process_ends_the_other_and_gives_its_code(program):
    result = launch("local.sh", "2", *program, "--", "error1")
    assert result.returncode == 2
    assert "[1] error: a disk of process 1 is full" in result.stdout
    assert "process 0 ended with exit code 75" in result.stderr


def test_each_process_prints_an_error_that_all_have(program, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text('{"ratio": 4}')
    result = launch("local.sh", "2", *program, "--", "another_run", f"--folder={folder}")
    assert result.returncode == 2
    for index in "01":
        assert f"process {index} ended with exit code 2." in result.stderr
        assert f"[{index}] error: {folder} holds another run: its ratio is 4" in result.stdout


def test_local_ends_what_does_not_end_by_itself(tmp_path):
    path = tmp_path / "stubborn"
    path.write_text(
        '#!/bin/bash\n[[ "$*" == *index=1* ]] && exit 3\ntrap "exit 0" TERM\n'
        "while :; do sleep 0.1; done\n"
    )
    path.chmod(0o755)
    result = launch("local.sh", "2", "--grace", "1", "--program", str(path), "--", "x")
    assert result.returncode == 3
    assert "ending the processes that are left" in result.stderr


def test_local_has_one_command_for_a_fresh_clone_in_its_help_and_in_the_docs():
    text = " ".join(launch("local.sh", "--help").stdout.replace("\\\n", " ").split())
    docs = (ROOT / "docs" / "multi_host.md").read_text().replace("\\\n", " ")
    command = text[text.index("bash launch/local.sh") : text.index(" That trains")]
    assert command in " ".join(docs.split())
    arguments = shlex.split(command)[4:]
    assert cli.main([arguments[0], "--check", "--engine=builtin", *arguments[1:]]) == 0
