"""Two processes with two devices each, joined by JAX: one run, as if one process did it alone.

All cases are run by two pairs, for each costs its imports: in the first pair a process is killed
half-way; the second restarts that run, and does all others.
"""

import socket
import time

import pytest
import t5x_runs
import tiny_runs
from small_t5 import assert_same

from variator_jax.distributed import LOST

STEPS, KILLED, SAVED = 8, 5, 3
STOPPED, ENDLESS = 5, 3_000
MESH = (2, 1, 2)


def start_pair(cases):
    """Two processes that join; the port is free when it is looked for, and nearly always after."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{found.getsockname()[1]}"
    return [tiny_runs.start(cases, devices=2, place=(address, 2, index)) for index in range(2)]


def case(work, name, **settings):
    backbone = {"initial_checkpoint_path": str(work / "backbone")}
    arguments = {"model_dir": str(work / name), "steps": STEPS, "mesh_shape": MESH}
    return ["train", {**arguments, **backbone, **settings}]


@pytest.fixture(scope="module")
def killed(work):
    """A pair of which process 1 is killed at a step: how the other ended, and how fast."""
    happening = ["SIGKILL", KILLED, 1]
    pair = start_pair([case(work, "killed", checkpoint_period=SAVED, happening=happening)])
    # Meanwhile, one process with one device.
    backbone = {"initial_checkpoint_path": str(work / "backbone")}
    tiny_runs.run(work / "one", STEPS, mesh_shape=(1, 1, 1), **backbone)
    try:
        pair[1].wait()
        lost = time.monotonic()
        _, printed = pair[0].communicate()
        seconds = time.monotonic() - lost
    finally:
        for process in pair:
            process.kill()
    saved = sorted(p.name for p in (work / "killed" / "checkpoints").iterdir())
    codes = [process.returncode for process in pair]
    return {"codes": codes, "seconds": seconds, "printed": printed, "saved": saved}


@pytest.fixture(scope="module")
def second(work, killed):
    """The results and the lines of each process of a second pair."""
    cases = [case(work, "killed", checkpoint_period=SAVED), case(work, "whole")]
    _, settings = case(work, "refused", learning_rates=[1e-2, 2e-2])
    cases += [["refused", settings]]
    # The last one, because a process keeps a signal to stop for good.
    # It has far to go, for the steps are short and the signal takes its time to come round.
    happening = ["SIGTERM", STOPPED, 1]
    cases += [case(work, "stopped", steps=ENDLESS, happening=happening)]
    pair = start_pair(cases)
    try:
        return [tiny_runs.finish(process) for process in pair]
    finally:
        for process in pair:
            process.kill()


def test_a_killed_process_ends_the_other_with_a_message(killed):
    print(f"process 0 ended {killed['seconds']:.1f} s after the loss, with {killed['codes'][0]}")
    assert killed["codes"][1] == -9
    assert killed["codes"][0] in (75, 134, -6)  # by us, or by JAX from C++
    assert killed["seconds"] < 60
    assert LOST in killed["printed"]
    assert killed["saved"] == [str(SAVED)]


def test_processes_of_other_settings_are_refused_in_all_of_them(second):
    for results, _ in second:
        assert "Processes [1] have other settings" in results[2]["error"]


def test_two_processes_train_what_one_does(second, work):
    ours, alone = (t5x_runs.builtin_losses(work / run) for run in ("whole", "one"))
    assert list(ours) == list(alone) == list(range(1, STEPS + 1))
    assert alone[STEPS] < alone[1]  # It trained, indeed.
    distance = max(abs(ours[step] / alone[step] - 1) for step in alone)
    moved = t5x_runs.farthest(
        *(t5x_runs.folder_leaves(work / run / "plugin") for run in ("whole", "one"))
    )
    print(f"losses differ by {distance:.1e}, plugins by {moved:.1e}")
    assert distance < 1e-5 and moved < 1e-4


def test_a_restart_ends_with_the_plugin_of_an_undisturbed_run(second, work):
    assert f"resuming at step {SAVED}, " in second[0][1]
    assert_same(*(t5x_runs.folder_leaves(work / run / "plugin") for run in ("killed", "whole")))


def test_sigterm_of_one_process_stops_both_at_the_same_step(second, work):
    ends = [results[-1] for results, _ in second]
    print(f"stopped at {ends}")
    assert ends[0] == ends[1]
    assert ends[0]["interrupted"] and STOPPED < ends[0]["step"] < ENDLESS
    saved = [path.name for path in (work / "stopped" / "checkpoints").iterdir()]
    assert saved == [str(ends[0]["step"])]
    assert not (work / "stopped" / "plugin").exists()


def test_only_process_0_writes_logs(second, work):
    (_, first), (_, other) = second
    assert f"  step {STEPS}/{STEPS}" in first and "2 process(es)" in first
    assert "  step " not in other and "  wrote " not in other
    for name in ("whole", "killed", "stopped"):
        steps = [row["step"] for row in tiny_runs.rows(work / name)]
        if name != "killed":  # That one did some steps again.
            assert steps == list(range(1, len(steps) + 1))
        assert len(list((work / name / "tensorboard").iterdir())) == 1 + (name == "killed")
