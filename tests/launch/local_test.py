"""launch/local.sh: real processes that JAX joins, and what follows when one is lost."""

import sys

import pytest
from launching import LOST, ROOT, launch

# One process of a run: each adds up over all, until an event.
PROGRAM = r"""
import os, signal, sys, time
from variator_jax import distributed, errors

EVENT, *flags = sys.argv[1:]
ADDRESS, COUNT, INDEX = (flag.partition("=")[2] for flag in flags)
distributed.HEARTBEAT_SECONDS, distributed.FAREWELL_SECONDS = 8, 2

def work():
    distributed.initialize(ADDRESS, int(COUNT), int(INDEX))
    import jax, numpy as np
    from jax.experimental.multihost_utils import process_allgather
    add = lambda: int(process_allgather(np.array([int(INDEX) + 1])).sum())
    sys.stdout.write(f"sum {add()} of {jax.device_count()} devices\n")
    if EVENT in ("error", f"error{INDEX}"):
        raise errors.DataError(f"disk {INDEX} is full")
    if EVENT == f"killed{INDEX}":
        os.kill(os.getpid(), signal.SIGKILL)
    if EVENT == "killed1":
        time.sleep(600)  # outside of a collective
    while True:
        add()

try:
    with distributed.fail_fast():
        work()
except errors.VariatorError as error:
    sys.stderr.write(f"error: {error}\n")
    sys.exit(2)
"""


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "program"
    path.write_text(f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\n{PROGRAM}")
    path.chmod(0o755)
    return ["--program", str(path)]


@pytest.mark.parametrize(("event", "code", "other", "line", "ended"), [
    ("killed0", 137, "1", LOST, "process 0 ended with exit code 137"),
    ("killed1", 137, "0", LOST, "process 1 ended with exit code 137"),
    ("error1", 2, "1", "error: disk 1 is full", "process 0 ended with exit code 75"),
])  # fmt: skip
def test_the_end_of_one_process_ends_the_other(event, code, other, line, ended, program):
    result = launch("local.sh", "2", *program, "--", event)
    assert result.returncode == code and ended in result.stderr
    assert "ending the processes that are left" not in result.stderr  # It ended by itself.
    lines = [text for text in result.stdout.splitlines() if line in text]
    assert lines and all(text.startswith(f"[{other}]") for text in lines)


def test_processes_join_and_each_prints_an_error_that_all_have(program):
    result = launch("local.sh", "2", "--devices", "2", *program, "--", "error")
    assert result.returncode == 2
    for index in "01":
        # Gloo writes its own lines in pieces, and ours may stand behind one of them.
        own = [line for line in result.stdout.splitlines() if line.startswith(f"[{index}] ")]
        assert any(line.endswith("sum 3 of 4 devices") for line in own)
        assert any(line.endswith(f"error: disk {index} is full") for line in own)
        assert f"process {index} ended with exit code 2." in result.stderr


def test_local_ends_what_does_not_end_by_itself(stubs):
    loop = "while :; do sleep 0.1; done"
    stubborn = f'[[ "$*" == *index=1* ]] && exit 3\ntrap "exit 0" TERM\n{loop}'
    program = f"{stubs[0](stubborn=stubborn)['HERE']}/stubborn"
    result = launch("local.sh", "2", "--grace", "1", "--program", program, "--", "x")
    assert result.returncode == 3
    assert "ending the processes that are left" in result.stderr
