"""Joining processes: what JAX is asked, what is refused, and the messages after a loss."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from variator_jax import distributed, stderr_relay
from variator_jax.errors import ConfigError, DataError, TrainingError

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[01-04]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}


@pytest.fixture
def joined(monkeypatch):
    """The arguments of each call of jax.distributed.initialize, which is not carried out."""
    calls = []
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_COORDINATOR_PORT", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(distributed, "_relay_stderr", lambda: None)
    monkeypatch.setattr(distributed, "_joined", None)
    monkeypatch.setattr(
        jax.distributed, "initialize", lambda *args, **kwargs: calls.append((args, kwargs))
    )
    return calls


def test_one_process_joins_nothing(joined):
    distributed.initialize()
    distributed.initialize(process_count=1)
    distributed.initialize("host:1", 1, 0)
    assert joined == []


def test_flags_are_passed_on_with_bounded_waits(joined, monkeypatch):
    distributed.initialize("10.0.0.1:1234", 3, 2)
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "first:99")
    distributed.initialize(process_count=2, process_index=1)
    assert [args for args, _ in joined] == [("10.0.0.1:1234", 3, 2), ("first:99", 2, 1)]
    assert joined[0][1]["heartbeat_timeout_seconds"] <= 50  # A loss ends all within a minute.
    with pytest.raises(ConfigError, match="JAX_COORDINATOR_ADDRESS=first:99, but JAX detects no"):
        distributed.initialize()


@pytest.mark.parametrize(("tasks", "calls"), [("4", [(4, 2), (4, 2)]), ("1", [])])
def test_slurm_is_detected_by_jax_and_a_single_task_keeps_its_devices(
    joined, monkeypatch, tasks, calls
):
    index = "2" if calls else "0"
    for name, value in {**SLURM, "SLURM_NTASKS": tasks, "SLURM_PROCID": index}.items():
        monkeypatch.setenv(name, value)
    distributed.initialize(multiprocess=True)
    distributed.initialize()
    assert [args[1:] for args, _ in joined] == calls
    assert all(args[0].startswith("node01:") for args, _ in joined)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("h:1", None, None), "no --process_count and no --process_index: give all three"),
        ((None, 2, 1), "no --coordinator_address"),
        (("h:1", 2, None), "found --coordinator_address=h:1, --process_count=2, but no --pro"),
        (("h:1", 2, 2), "--process_index=2 with --process_count=2: expected an index from 0"),
        (("h:1", 2, -1), "--process_index=-1"),
        (("h:1", 0, 0), "--process_count=0"),
        (("host", 2, 0), "--coordinator_address=host: expected host:port"),
        (("host:http", 2, 0), "expected host:port"),
        (("host:70000", 2, 0), "expected host:port"),
        (("h:1", 2, 0, True), "--multiprocess detects the processes: leave it out"),
        ((None, None, None, True), "--multiprocess, but JAX detects no TPU pod, SLURM"),
    ],
)
def test_what_does_not_fit_together_is_refused_by_name(joined, arguments, message):
    with pytest.raises(ConfigError) as raised:
        distributed.initialize(*arguments)
    assert message in str(raised.value)
    assert joined == []


def test_a_failure_to_join_names_the_coordinator(joined, monkeypatch):
    def busy(*args, **kwargs):
        raise RuntimeError("UNKNOWN: Failed to start RPC server")

    monkeypatch.setattr(jax.distributed, "initialize", busy)
    with pytest.raises(ConfigError, match=r"process 0 of 2, .* at h:1, failed.*port in use"):
        distributed.initialize("h:1", 2, 0)


GLOO = "UNKNOWN: Gloo all-reduce failed: pair.cc:538] Read error: Connection reset by peer"


@pytest.fixture
def at_exit(monkeypatch):
    """As if this were one of two processes: the exit codes that are registered for its end."""
    codes = []
    monkeypatch.setattr(distributed, "_joined", distributed.Process("h:1", 2, 1))
    monkeypatch.setattr(distributed.atexit, "register", lambda _, code: codes.append(code))
    return codes


@pytest.mark.parametrize("kind", [ValueError, RuntimeError, jax.errors.JaxRuntimeError])
def test_a_loss_is_raised_as_one(at_exit, kind):
    with pytest.raises(TrainingError, match="continues from the newest checkpoint"):
        with distributed.fail_fast():
            raise kind(GLOO)
    assert at_exit == [distributed.EXIT_LOST]


@pytest.mark.parametrize(
    ("error", "code"), [(DataError("a"), 2), (ValueError("a"), 1), (KeyboardInterrupt("a"), 130)]
)
def test_other_errors_stay_what_they_are(at_exit, error, code):
    with pytest.raises(type(error), match="a") as raised, distributed.fail_fast():
        raise error
    assert raised.value is error and at_exit == [code]


def test_alone_nothing_is_changed(at_exit, monkeypatch):
    monkeypatch.setattr(distributed, "_joined", None)
    with pytest.raises(ValueError, match="Gloo"):
        with distributed.fail_fast():
            raise ValueError(GLOO)
    assert at_exit == []


@pytest.mark.parametrize(
    ("text", "added"),
    [
        ("all is well\n", False),
        (f"before\nF client.h:80] {stderr_relay.MARK.decode()}.\n@ 0x7\n", True),
        (f"{stderr_relay.MARK.decode()}\nerror: {distributed.LOST}\n", False),
    ],
)
def test_the_relay_adds_a_line_about_losses_only(text, added):
    result = subprocess.run(
        [sys.executable, "-S", "-E", stderr_relay.__file__, distributed.LOST],
        input=text.encode(),
        capture_output=True,
    )
    last = f"variator: error: {distributed.LOST}.\n" if added else ""
    assert (result.stdout, result.stderr.decode()) == (b"", text + last)


@pytest.fixture
def child(tmp_path):
    """Runs a script in a process of its own; returns its exit code and its standard error."""

    def run(script, *folders):
        paths = os.pathsep.join([*map(str, folders), str(Path(__file__).parents[1])])
        with (tmp_path / "log").open("w") as log:  # A pipe would also wait for the relay.
            done = subprocess.run(
                [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": paths}, stderr=log
            )
        return done.returncode, (tmp_path / "log").read_text()

    return run


def test_a_process_whose_peers_do_not_join_names_them(child):
    code, log = child(
        "from variator_jax import distributed\n"
        "distributed.JOIN_SECONDS = 1\n"
        "distributed.initialize('127.0.0.1:9', 2, 1)\n"
    )
    assert code == distributed.EXIT_LOST  # Those that come late can be joined again.
    assert "process 1 of 2, with process 0 at 127.0.0.1:9: not all processes joined" in log


def test_a_process_ends_after_the_relay_has_copied_its_last_lines(child, tmp_path):
    # In a container, the end of the first process would kill a relay that still copies.
    slow = "import time\ntime.sleep(1)\n"
    (tmp_path / "stderr_relay.py").write_text(slow + Path(stderr_relay.__file__).read_text())
    shutil.copy(distributed.__file__, tmp_path / "relayed.py")
    script = (
        "import relayed, sys\n"
        "relayed._relay_stderr()\n"
        "print('the last line', file=sys.stderr)\n"
        "relayed._end(2)\n"
    )
    assert child(script, tmp_path) == (2, "the last line\n")
