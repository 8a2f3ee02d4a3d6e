"""Joining processes: what JAX is asked, what is refused, and the messages after a loss."""

import subprocess
import sys
import threading
from unittest import mock

import jax
import pytest
from launching import child

from variator_jax import distributed
from variator_jax.errors import ConfigError, DataError, TrainingError

SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[01-04]", "SLURM_LOCALID": "0"}


@pytest.fixture
def joined(monkeypatch):
    """The arguments of each call of jax.distributed.initialize, which is not carried out."""
    calls = []
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_COORDINATOR_PORT", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(distributed, "_relay_stderr", lambda: None)
    monkeypatch.setattr(distributed, "_joined", None)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **named: calls.append((a, named)))
    return calls


def test_flags_are_passed_on_with_bounded_waits_and_one_process_joins_nothing(joined, monkeypatch):
    for one in ((), (None, 1), (None, 1, 0)):
        distributed.initialize(*one)
    assert joined == []
    distributed.initialize("10.0.0.1:1234", 3, 2)
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "first:99")
    distributed.initialize(process_count=2, process_index=1)
    assert [args for args, _ in joined] == [("10.0.0.1:1234", 3, 2), ("first:99", 2, 1)]
    assert joined[0][1]["heartbeat_timeout_seconds"] <= 50  # A loss ends all within a minute.
    with pytest.raises(ConfigError, match="JAX_COORDINATOR_ADDRESS=first:99, but JAX detects no"):
        distributed.initialize()


@pytest.mark.parametrize(("tasks", "calls"), [("4", [(4, 2), (4, 2)]), ("1", [])])
def test_jax_detects_slurm_and_a_single_task_keeps_its_devices(joined, monkeypatch, tasks, calls):
    place = {"SLURM_NTASKS": tasks, "SLURM_PROCID": "2" if calls else "0"}
    for name, value in {**SLURM, **place}.items():
        monkeypatch.setenv(name, value)
    distributed.initialize(multiprocess=True)
    distributed.initialize()
    assert [args[1:] for args, _ in joined] == calls
    assert all(args[0].startswith("node01:") for args, _ in joined)


@pytest.mark.parametrize(("arguments", "message"), [
    (("h:1", None, None), "--process_count=None --process_index=None: give all"),
    (("h:1", 2, 2), "--process_count=2 --process_index=2: give all three"),
    (("host:70000", 2, 0), "host:70000 --process_count=2 --process_index=0: give all"),
    (("h:1", 2, 0, True), "--multiprocess detects address, count and index"),
    ((None, None, None, True), "--multiprocess, but JAX detects no TPU pod, SLURM"),
])  # fmt: skip
def test_what_does_not_fit_together_is_refused_by_name(joined, arguments, message):
    with pytest.raises(ConfigError) as raised:
        distributed.initialize(*arguments)
    assert message in str(raised.value) and joined == []


def test_a_failure_to_join_names_the_coordinator(joined, monkeypatch):
    busy = mock.Mock(side_effect=RuntimeError("UNKNOWN: Failed to start RPC server"))
    monkeypatch.setattr(jax.distributed, "initialize", busy)
    with pytest.raises(ConfigError, match=r"process 0 of 2, .* at h:1, failed.*port in use"):
        distributed.initialize("h:1", 2, 0)


def test_a_process_that_waits_soon_prints_for_whom(joined, monkeypatch, capsys):
    printed, report = threading.Event(), distributed._report_waiting
    monkeypatch.setattr(distributed, "PATIENCE_SECONDS", 0.01)
    monkeypatch.setattr(distributed, "_report_waiting", lambda p: (report(p), printed.set()))
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: printed.wait(60))
    distributed.initialize("h:1", 2, 0)
    expected = "process 0 of 2, with process 0 at h:1: waits up to 300 seconds for process 1 to"
    assert expected in capsys.readouterr().err


GLOO = "UNKNOWN: Gloo all-reduce failed: pair.cc:538] Read error: Connection reset by peer"


@pytest.mark.parametrize(("error", "raised", "code"), [
    (ValueError(GLOO), TrainingError, distributed.EXIT_LOST),
    (jax.errors.JaxRuntimeError(GLOO), TrainingError, distributed.EXIT_LOST),
    (DataError("a"), DataError, 2),
    (ValueError("a"), ValueError, 1),
    (KeyboardInterrupt("a"), KeyboardInterrupt, 130),
])  # fmt: skip
@pytest.mark.parametrize("alone", [False, True])
def test_a_failure_sets_the_exit_code_of_one_of_several(error, raised, code, alone, monkeypatch):
    codes, process = [], distributed.Process("h:1", 2, 1)
    monkeypatch.setattr(distributed, "_joined", None if alone else process)
    monkeypatch.setattr(distributed.atexit, "register", lambda _, code: codes.append(code))
    with pytest.raises(type(error) if alone else raised) as caught, distributed.fail_fast():
        raise error
    assert codes == ([] if alone else [code])
    lost = "continues from the newest checkpoint" in str(caught.value)
    assert lost == (not alone and code == distributed.EXIT_LOST)


@pytest.mark.parametrize(("text", "added"), [
    ("all is well\n", False),
    (f"before\nF client.h:80] {distributed.REPORT}.\n@ 0x7\n", True),
    (f"{distributed.REPORT}\nerror: {distributed.LOST}\n", False),
])  # fmt: skip
def test_the_relay_adds_a_line_about_losses_only(text, added):
    arguments = [distributed.RELAY, distributed.REPORT, distributed.LOST]
    program = [sys.executable, "-S", "-E", "-c", *arguments]
    result = subprocess.run(program, input=text.encode(), capture_output=True)
    last = f"variator: error: {distributed.LOST}.\n" if added else ""
    assert (result.stdout, result.stderr.decode()) == (b"", text + last)


NEVER_JOINED = """
distributed.JOIN_SECONDS = 4
distributed.initialize('127.0.0.1:9', 2, 1)
"""
# In a container, the end of the first process would kill a relay that still copies.
SLOW_RELAY = """
distributed.RELAY = "import time; time.sleep(1)" + distributed.RELAY
distributed.RELAY_SECONDS = 60
distributed._relay_stderr()
print("the last line", file=sys.stderr)
distributed._end(2)
"""


@pytest.mark.parametrize(("script", "code", "line"), [
    (NEVER_JOINED, distributed.EXIT_LOST, "process 0 at 127.0.0.1:9: not all processes joined"),
    (SLOW_RELAY, 2, "the last line\n"),
])  # fmt: skip
def test_the_last_lines_of_a_process_are_printed(script, code, line, tmp_path):
    program = [sys.executable, "-c", f"import sys\nfrom variator_jax import distributed\n{script}"]
    with (tmp_path / "log").open("w") as log:  # A pipe would also wait for the relay.
        done = subprocess.run(program, env=child(), stderr=log)
    text = (tmp_path / "log").read_text()
    assert done.returncode == code and line in text
