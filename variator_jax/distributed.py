"""Several processes as one run: joining them, and what is told when one of them is lost.

JAX does all the work between the processes: it detects TPU pods, SLURM, Open MPI and Kubernetes,
notices a lost process by its missing heartbeats, and then ends the others. What lives here is when
to ask for it, with which time limits, and the sentence that the user reads. Meshes and shardings
are in `partitioning.py`, the scripts that start processes in `launch/`.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import os
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import jax

from variator_jax.errors import ConfigError, TrainingError, VariatorError

# A lost process is noticed after at most this long, so the others have ended within a minute.
HEARTBEAT_SECONDS = 30
# How long the processes wait for one another at the start, when machines come up one by one.
JOIN_SECONDS = 300
# How long a failed process waits for the others to tell their errors, before it ends.
FAREWELL_SECONDS = 5
# How long it waits for its last lines to be told; a child that holds standard error would delay it.
RELAY_SECONDS = 5

# The exit code of a process that ended because another was lost, or did not come at the start, for
# after a preemption machines may be minutes apart: run the same command again. It is EX_TEMPFAIL of
# sysexits.h. Where JAX ends the process itself the code is 134, of SIGABRT.
EXIT_LOST = 75
LOST = "another process was lost; the same command continues from the newest checkpoint"

# What JAX raises where a collective, a barrier or the coordinator misses a peer.
_SIGNS_OF_LOSS = re.compile(
    r"Gloo .* failed|Connection (reset|closed) by peer|Socket closed|Broken pipe"
    r"|stopped sending heartbeats|coordination service|CoordinationService"
    r"|NCCL .*(remote|peer|aborted|unhandled system error)",
    re.IGNORECASE | re.DOTALL,
)


@dataclasses.dataclass(frozen=True)
class Place:
    """One process of a run: where the first one listens, how many there are, which this is."""

    coordinator_address: str  # host:port of process 0
    process_count: int
    process_index: int


def initialize(
    coordinator_address: str | None = None,
    process_count: int | None = None,
    process_index: int | None = None,
    multiprocess: bool = False,
) -> None:
    """Joins this process to its run; call it once, before any device of JAX is touched.

    With no argument, the environment decides: what JAX detects (a TPU pod, SLURM, Open MPI,
    Kubernetes) is joined, and otherwise this is the only process and nothing happens. A count of 1
    says that this is the only process wherever it runs.

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
    address = coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS")
    if process_count is None and process_index is None and not coordinator_address:
        place = _detect(multiprocess)
    else:
        place = _given(address, process_count, process_index, multiprocess)
    if place is not None and not jax.distributed.is_initialized():
        _join(place)


def is_main() -> bool:
    """Whether this is process 0, the one that writes logs; touches the devices."""
    return jax.process_index() == 0


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Around the work of a joined process: no process outlives the failure of another for long.

    An exception that comes from a lost process is raised as one of ours. After any exception the
    process ends without JAX's farewell, in which it would wait minutes for processes that still
    compute: the exit code is 75 after a loss, 2 after a VariatorError, 130 after an interrupt from
    the keyboard, and 1 otherwise. With one process nothing is changed.

    Raises:
      TrainingError: where another process was lost.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if not jax.distributed.is_initialized() or jax.process_count() == 1:
            raise
        lost = _is_loss(error)
        codes = {VariatorError: 2, KeyboardInterrupt: 130, Exception: 1}
        code = (
            EXIT_LOST if lost else next(c for kind, c in codes.items() if isinstance(error, kind))
        )
        # At exit, so that the caller still tells the error in its own way.
        atexit.register(_end, code, 0 if lost else FAREWELL_SECONDS)
        if lost:
            raise TrainingError(f"{LOST}. What JAX said: {error}") from error
        raise


def _is_loss(error: BaseException | None) -> bool:
    """Whether this exception, or one that it came from, tells of a lost process."""
    while error is not None:
        # JAX raises the same failure as a JaxRuntimeError or, where it is waited for, a ValueError.
        if isinstance(error, (RuntimeError, ValueError)) and _SIGNS_OF_LOSS.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _given(address: str | None, count: int | None, index: int | None, multiprocess: bool) -> Place:
    """Checks what the flags say."""
    if multiprocess:
        raise ConfigError(
            "--multiprocess detects the processes by itself: leave it out, or leave out "
            "--coordinator_address, --process_count and --process_index."
        )
    flags = {
        "--coordinator_address": address,
        "--process_count": count,
        "--process_index": index,
    }
    missing = [flag for flag, value in flags.items() if value is None]
    if address is None or count is None or index is None:
        found = ", ".join(f"{flag}={value}" for flag, value in flags.items() if value is not None)
        raise ConfigError(f"found {found}, but no {' and no '.join(missing)}: give all three.")
    if count < 1:
        raise ConfigError(f"--process_count={count}: at least one process is needed.")
    if not 0 <= index < count:
        raise ConfigError(
            f"--process_index={index}: of {count} processes the indices are 0 to {count - 1}."
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(
            f"--coordinator_address={address}: expected host:port of process 0, such as "
            "10.0.0.1:1234."
        )
    return Place(address, count, index)


def _detect(insist: bool) -> Place | None:
    """Asks JAX whether it knows the environment; None if it does not."""
    # The one place that needs JAX's own module: its public function cannot be asked without also
    # joining, and what it found is wanted for the messages.
    from jax._src import clusters

    try:
        with warnings.catch_warnings():
            if not insist:  # In a pod of Kubernetes, JAX warns that it lacks a package.
                warnings.filterwarnings("ignore", message="Kubernetes environment detected")
            address, count, index, _ = clusters.ClusterEnv.auto_detect_unset_distributed_params(
                coordinator_address=None,
                num_processes=None,
                process_id=None,
                local_device_ids=None,
                cluster_detection_method=None,
                initialization_timeout=JOIN_SECONDS,
            )
    except (RuntimeError, ValueError, OSError) as error:
        raise ConfigError(
            f"the processes of this run could not be detected: {error} "
            "Give --coordinator_address, --process_count and --process_index, or --process_count=1 "
            "for one process."
        ) from error
    address = os.environ.get("JAX_COORDINATOR_ADDRESS") or address
    if count is not None and index is not None and address:
        # Alone, it shall see all devices, where SLURM's and Open MPI's processes see one each.
        return Place(address, count, index) if count > 1 else None
    if insist or address:
        why = "--multiprocess" if insist else f"JAX_COORDINATOR_ADDRESS={address}"
        raise ConfigError(
            f"{why}, but JAX detects no TPU pod, SLURM, Open MPI or Kubernetes here: give "
            "--coordinator_address, --process_count and --process_index."
        )
    return None


def _join(place: Place) -> None:
    """Calls JAX, with limits on all that waits."""
    if place.process_count > 1:
        _relay_stderr()
    # JAX ends the process from C++ where the others do not come in time; this timer comes first.
    timer = threading.Timer(JOIN_SECONDS, _give_up, (place,))
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            place.coordinator_address,
            place.process_count,
            place.process_index,
            initialization_timeout=2 * JOIN_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"{_attempt(place)} failed: {error}"
            + (
                " Is the port in use, by an earlier run that has not ended?"
                if "RPC server" in str(error)
                else ""
            )
        ) from error
    finally:
        timer.cancel()


def _attempt(place: Place) -> str:
    return (
        f"joining as process {place.process_index} of {place.process_count}, with process 0 at "
        f"{place.coordinator_address},"
    )


def _give_up(place: Place) -> None:
    """Ends a process that waits for others in vain; in C++, where no exception reaches it."""
    why = (
        "The others have to be started with the same address and count"
        if place.process_index == 0
        else "Process 0 and all others have to be started, and this address be reachable from here"
    )
    print(
        f"variator: error: {_attempt(place)} not all came within {JOIN_SECONDS} seconds. {why}.",
        file=sys.stderr,
        flush=True,
    )
    _leave(EXIT_LOST)


def _end(code: int, patience: float) -> None:
    """Ends the process at once, after the others have told their own errors, if they have any."""
    # Gone with the first process is the coordinator, and the others would only speak of that.
    from jax._src import distributed

    client = distributed.global_state.client
    if client is not None and patience:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # Others are not ending: then not.
            client.wait_at_barrier("variator_end", int(1000 * patience))
    _leave(code)


_relay: subprocess.Popen[bytes] | None = None


def _leave(code: int) -> NoReturn:
    """Ends the process at once, but not before the relay has told its last lines.

    Where it is the first process of a container, its end kills the relay.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if _relay is not None:
        # The relay ends once nobody can write to it any more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        with contextlib.suppress(subprocess.TimeoutExpired):
            _relay.wait(RELAY_SECONDS)
    os._exit(code)


def _relay_stderr() -> None:
    """Lets a small process carry this one's standard error, which can have a last word.

    Where this process waits outside of a collective, JAX ends it from C++, with a page about its
    coordination service: then nothing of ours runs here any more.
    """
    global _relay
    _relay = subprocess.Popen(
        [sys.executable, "-S", "-E", str(Path(__file__).with_name("stderr_relay.py")), LOST],
        stdin=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for the run, whose last lines are still to come.
    )
    assert _relay.stdin is not None  # for mypy
    sys.stderr.flush()
    os.dup2(_relay.stdin.fileno(), 2)
    _relay.stdin.close()
