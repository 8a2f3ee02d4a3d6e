"""Several processes as one run: joining them, and ending the others when one of them is lost.

JAX does the work between processes: it detects TPU pods, SLURM, Open MPI and Kubernetes, notices a
lost process by its missing heartbeats, and then ends the others. Here are the time limits and the
messages. Meshes and shardings are in `mesh.py`, the scripts that start processes in `launch/`.
"""

import atexit
import contextlib
import dataclasses
import os
import re
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator

import jax

from variator_jax.errors import ConfigError, TrainingError, VariatorError

# A lost process is noticed after at most this long, so the others have ended within a minute.
HEARTBEAT_SECONDS = 30
# How long the processes wait for one another at the start, when machines come up one by one.
JOIN_SECONDS = 300
# A process that waits longer than this prints for whom.
PATIENCE_SECONDS = 5
# How long a process waits after an error of its own, for the others may be about to print theirs;
# process 0 waits twice as long, because JAX ends all others when it ends.
FAREWELL_SECONDS = 5
# How long a process waits until its last lines are copied to standard error.
RELAY_SECONDS = 5

# A program that copies standard input to standard error. After JAX's report of a lost process (its
# first argument) it adds a last line (its second), unless that was printed already.
RELAY = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
report, last_line = (argument.encode() for argument in sys.argv[1:])
tail, lost, printed = b"", False, False
while chunk := os.read(0, 65536):
    sys.stderr.buffer.write(chunk)
    sys.stderr.flush()
    tail += chunk
    lost, printed = lost or report in tail, printed or last_line in tail
    tail = tail[-max(len(report), len(last_line)) :]
if lost and not printed:
    sys.stderr.write(f"variator: error: {last_line.decode()}.\\n")
"""

# The exit code after another process was lost or did not join: the same command may be run again.
# It is EX_TEMPFAIL of sysexits.h. Where JAX ends the process itself, the code is 134 (SIGABRT).
EXIT_LOST = 75
LOST = "another process was lost; the same command continues from the newest checkpoint"
REPORT = "JAX distributed service detected fatal errors"  # what JAX prints before it aborts

_FLAGS = "Give --coordinator_address, --process_count and --process_index, or a count of 1 alone."

# What JAX raises where a collective, a barrier or the coordinator misses a peer.
_SIGNS_OF_LOSS = re.compile(
    r"Gloo .* failed|Connection (reset|closed) by peer|Socket closed|Broken pipe"
    r"|stopped sending heartbeats|coordination service|CoordinationService"
    r"|NCCL .*(remote|peer|aborted|unhandled system error)",
    re.IGNORECASE | re.DOTALL,
)


@dataclasses.dataclass(frozen=True)
class Process:
    """One process of a run."""

    coordinator_address: str  # host:port of process 0
    count: int
    index: int

    def __str__(self) -> str:
        return f"process {self.index} of {self.count}, with process 0 at {self.coordinator_address}"


_joined: Process | None = None  # this process, once it has joined a run
_relay: subprocess.Popen[bytes] | None = None


def initialize(
    coordinator_address: str | None = None,
    process_count: int | None = None,
    process_index: int | None = None,
    multiprocess: bool = False,
) -> None:
    """Joins this process to its run; call it once, before any device of JAX is touched.

    With no argument, the environment decides: what JAX detects (a TPU pod, SLURM, Open MPI,
    Kubernetes) is joined; otherwise this is the only process and nothing happens. With a count of 1
    this is the only process wherever it runs.

    Args:
      coordinator_address: host:port on which process 0 listens; JAX_COORDINATOR_ADDRESS if None.
      process_count: how many processes there are.
      process_index: which of them this is, from 0.
      multiprocess: insist on an environment that JAX detects.

    Raises:
      ConfigError: for arguments that do not fit together, a run that cannot be joined, or devices
        that are in use already.
    """
    if process_count == 1 and not multiprocess and process_index in (None, 0):
        return
    if process_count is None and process_index is None and not coordinator_address:
        process = _detect(multiprocess)
    elif multiprocess:
        raise ConfigError("--multiprocess detects address, count and index: leave those flags out.")
    else:
        process = _given(coordinator_address, process_count, process_index)
    if process is not None and not jax.distributed.is_initialized():
        _join(process)


@contextlib.contextmanager
def fail_fast() -> Iterator[None]:
    """Around the work of a joined process: no process outlives the failure of another for long.

    An exception that comes from a lost process is raised as a TrainingError. After any exception
    the process exits without waiting at JAX's shutdown barrier: with code 75 after a loss, 2 after
    a VariatorError, 130 after an interrupt from the keyboard, and 1 otherwise. With one process
    nothing is changed.

    Raises:
      TrainingError: where another process was lost.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if _joined is None or _joined.count == 1:
            raise
        lost = _is_loss(error)
        codes = {VariatorError: 2, KeyboardInterrupt: 130, Exception: 1}
        code = next(code for kind, code in codes.items() if isinstance(error, kind))
        # At exit, so that the caller can still print the error.
        atexit.register(_end, EXIT_LOST if lost else code)
        if lost:
            raise TrainingError(f"{LOST}. JAX's error: {error}") from error
        raise


def _is_loss(error: BaseException | None) -> bool:
    """Whether this exception, or one that it came from, is that of a lost process."""
    while error is not None:
        # JAX raises the same failure as a JaxRuntimeError or, where it is waited for, a ValueError.
        if isinstance(error, (RuntimeError, ValueError)) and _SIGNS_OF_LOSS.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _given(address: str | None, count: int | None, index: int | None) -> Process:
    """The process that the flags describe."""
    address = address or os.environ.get("JAX_COORDINATOR_ADDRESS")
    flags = f"--coordinator_address={address} --process_count={count} --process_index={index}"
    _, separator, port = (address or "").rpartition(":")
    listens = separator and port.isdecimal() and 0 < int(port) < 65536
    if not listens or count is None or index is None or not 0 <= index < count:
        raise ConfigError(
            f"found {flags}: give all three, host:port of process 0 and an index below the count."
        )
    return Process(str(address), count, index)


def _detect(insist: bool) -> Process | None:
    """The process as JAX detects it from the environment; None if it detects none."""
    # JAX's public function cannot be asked without also joining, and with a single process (one
    # task of SLURM) joining would hide all devices but one.
    from jax._src import clusters

    try:
        with warnings.catch_warnings():
            if not insist:  # In a pod of Kubernetes, JAX warns of a missing package.
                warnings.filterwarnings("ignore", message="Kubernetes environment detected")
            address, count, index, _ = clusters.ClusterEnv.auto_detect_unset_distributed_params(
                None, None, None, None, None, JOIN_SECONDS
            )
    except (RuntimeError, ValueError, OSError) as error:
        raise ConfigError(f"the processes could not be detected: {error} {_FLAGS}") from error
    address = os.environ.get("JAX_COORDINATOR_ADDRESS") or address
    if count is not None and index is not None and address:
        return Process(address, count, index) if count > 1 else None
    if insist or address:
        reason = "--multiprocess" if insist else f"JAX_COORDINATOR_ADDRESS={address}"
        environments = "TPU pod, SLURM, Open MPI or Kubernetes"
        raise ConfigError(f"{reason}, but JAX detects no {environments} here. {_FLAGS}")
    return None


def _join(process: Process) -> None:
    """Calls JAX, with limits on every wait."""
    global _joined
    if process.count > 1:
        _relay_stderr()
    # JAX ends the process from C++ where the others do not come in time; this timer comes first.
    waits = ((PATIENCE_SECONDS, _report_waiting), (JOIN_SECONDS, _give_up))
    timers = [threading.Timer(seconds, act, (process,)) for seconds, act in waits]
    for timer in timers:
        timer.daemon = True
        timer.start()
    try:
        jax.distributed.initialize(
            process.coordinator_address,
            process.count,
            process.index,
            initialization_timeout=2 * JOIN_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        busy = " Is the port in use, by an earlier run?" if "RPC server" in str(error) else ""
        raise ConfigError(f"joining as {process}, failed: {error}{busy}") from error
    finally:
        for timer in timers:
            timer.cancel()
    _joined = process


def _report_waiting(process: Process) -> None:
    """Prints for whom a process waits, such as for the second task of SLURM in a shell of srun."""
    others = " and ".join(str(index) for index in range(process.count) if index != process.index)
    print(
        f"{process}: waits up to {JOIN_SECONDS} seconds for process {others[:40]} to join. If this "
        "is to be the only one, give --process_count=1.",
        file=sys.stderr,
        flush=True,
    )


def _give_up(process: Process) -> None:
    """Ends a process whose peers did not join; it waits in C++, where no exception reaches it."""
    late = f"{process}: not all processes joined within {JOIN_SECONDS} seconds"
    print(f"variator: error: {late}. Can all reach that address?", file=sys.stderr)
    _end(EXIT_LOST)


def _end(code: int) -> None:
    """Ends the process when the others have printed their errors and the relay its last lines.

    The end of the first process of a container kills all others, the relay among them.
    """
    if code != EXIT_LOST and _joined is not None:
        time.sleep(FAREWELL_SECONDS * (2 if _joined.index == 0 else 1))
    sys.stdout.flush()
    sys.stderr.flush()
    if _relay is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # The relay ends when its pipe is closed.
        with contextlib.suppress(subprocess.TimeoutExpired):
            _relay.wait(RELAY_SECONDS)
    os._exit(code)


def _relay_stderr() -> None:
    """Starts a process that copies this one's standard error and can add a last line.

    Where this process waits outside of a collective, JAX ends it from C++, and no Python runs.
    """
    global _relay
    _relay = subprocess.Popen(
        [sys.executable, "-S", "-E", "-c", RELAY, REPORT, LOST],
        stdin=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for the run, whose last lines are still to come.
    )
    assert _relay.stdin is not None  # for mypy
    sys.stderr.flush()
    os.dup2(_relay.stdin.fileno(), 2)
    _relay.stdin.close()
