"""Joining processes: what is asked of JAX, what is refused, and how a loss is told."""

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
    monkeypatch.setattr(
        jax.distributed, "initialize", lambda *args, **kwargs: calls.append((args, kwargs))
    )
    return calls


def test_one_process_joins_nothing(joined):
    distributed.initialize()
    distributed.initialize(process_count=1)
    distributed.initialize("host:1", 1, 0)
    assert joined == []
    assert distributed.is_main()


def test_flags_are_handed_on_with_bounded_waits(joined):
    distributed.initialize("10.0.0.1:1234", 3, 2)
    [(args, kwargs)] = joined
    assert args == ("10.0.0.1:1234", 3, 2)
    assert kwargs["heartbeat_timeout_seconds"] <= 50  # so that a loss ends all within a minute


def test_slurm_is_detected_by_jax(joined, monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    distributed.initialize(multiprocess=True)
    distributed.initialize()
    assert [args[1:] for args, _ in joined] == [(4, 2), (4, 2)]
    assert joined[0][0][0].startswith("node01:")


def test_a_single_task_of_slurm_keeps_all_its_devices(joined, monkeypatch):
    for name, value in {**SLURM, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}.items():
        monkeypatch.setenv(name, value)
    distributed.initialize()
    assert joined == []


def test_the_address_may_come_from_the_environment(joined, monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "first:99")
    distributed.initialize(process_count=2, process_index=1)
    assert joined[0][0] == ("first:99", 2, 1)
    with pytest.raises(ConfigError, match="JAX_COORDINATOR_ADDRESS=first:99, but JAX detects no"):
        distributed.initialize()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("h:1", None, None), "no --process_count and no --process_index: give all three"),
        ((None, 2, 1), "no --coordinator_address"),
        (
            ("h:1", 2, None),
            "found --coordinator_address=h:1, --process_count=2, but no --pro",
        ),
        (("h:1", 2, 2), "--process_index=2: of 2 processes the indices are 0 to 1"),
        (("h:1", 2, -1), "--process_index=-1"),
        (("h:1", 0, 0), "at least one process"),
        (("host", 2, 0), "--coordinator_address=host: expected host:port"),
        (("host:http", 2, 0), "expected host:port"),
        (("host:70000", 2, 0), "expected host:port"),
        (("h:1", 2, 0, True), "--multiprocess detects the processes by itself"),
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
    """As if this were one of two processes: what would be done at its end."""
    registered = []
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed.atexit, "register", lambda *args: registered.append(args))
    return registered


@pytest.mark.parametrize("kind", [ValueError, RuntimeError, jax.errors.JaxRuntimeError])
def test_a_loss_is_told_as_one(at_exit, kind):
    with pytest.raises(TrainingError, match="continues from the newest checkpoint"):
        with distributed.together():
            raise kind(GLOO)
    assert [args[1] for args in at_exit] == [distributed.EXIT_LOST]


@pytest.mark.parametrize(
    ("error", "code"),
    [(DataError("a slip"), 2), (ValueError("a bug"), 1), (KeyboardInterrupt(), 130)],
)
def test_other_errors_stay_what_they_are(at_exit, error, code):
    with pytest.raises(type(error)) as raised:
        with distributed.together():
            raise error
    assert raised.value is error
    assert [args[1] for args in at_exit] == [code]


def test_alone_nothing_is_changed(monkeypatch):
    monkeypatch.setattr(distributed.atexit, "register", lambda *args: pytest.fail("registered"))
    with pytest.raises(ValueError, match="Gloo"):
        with distributed.together():
            raise ValueError(GLOO)


@pytest.mark.parametrize(
    ("text", "spoken"),
    [
        ("all is well\n", False),
        (f"before\nF client.h:80] {stderr_relay.MARK.decode()}.\n@ 0x7\n", True),
        (f"{stderr_relay.MARK.decode()}\nerror: {distributed.LOST}\n", False),
    ],
)
def test_the_relay_has_a_last_word_about_losses_only(text, spoken):
    result = subprocess.run(
        [sys.executable, "-S", "-E", stderr_relay.__file__, distributed.LOST],
        input=text.encode(),
        capture_output=True,
    )
    last = f"variator: error: {distributed.LOST}.\n" if spoken else ""
    assert (result.stdout, result.stderr.decode()) == (b"", text + last)


def test_a_process_that_waits_in_vain_says_for_whom():
    script = (
        "from variator_jax import distributed\n"
        "distributed.JOIN_SECONDS = 1\n"
        "distributed.initialize('127.0.0.1:9', 2, 1)\n"
    )
    root = str(Path(__file__).parents[1])
    result = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
    )
    assert result.returncode == distributed.EXIT_LOST  # Those that come late can be joined again.
    assert "process 1 of 2, with process 0 at 127.0.0.1:9, not all came" in result.stderr


def test_a_process_that_gives_up_waits_until_its_last_lines_are_told(tmp_path):
    # In a container, the end of the first process would kill a relay that still copies.
    slow = "import time\ntime.sleep(1)\n"
    (tmp_path / "stderr_relay.py").write_text(slow + Path(stderr_relay.__file__).read_text())
    shutil.copy(distributed.__file__, tmp_path / "relayed.py")
    script = (
        "import relayed, sys\n"
        "relayed._relay_stderr()\n"
        "print('the last line', file=sys.stderr)\n"
        "relayed._end(2, 0)\n"
    )
    paths = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": paths}, stderr=log
        )
        code = process.wait()  # not for the relay, which holds the log, too
    assert (code, (tmp_path / "log").read_text()) == (2, "the last line\n")
