"""launch/tpu_pod.sh with a stand-in of gcloud: pods that come, go and fail."""

import shlex
import sys
from pathlib import Path

import pytest
from launching import POD, SLURM, TRAIN, launch

# A TPU whose states, and whose command's exit codes, are the lines of two files.
GCLOUD = """
next() { head -n 1 "$HERE/$1"; sed -i 1d "$HERE/$1"; }
case "$4" in
  list) state="$(next states)"; [[ "$state" == MISSING ]] || echo "my-pod,$state" ;;
  ssh) [[ "$*" != *--multiprocess* ]] || exit "$(next codes)" ;;
esac
"""
READY = ["READY"] * 9


@pytest.mark.parametrize("engine", [["--engine=t5x"], ["--engine", "t5x"]], ids=" ".join)
def test_a_bucket_is_for_t5x(engine):
    command = ["train", "--gin.MODEL_DIR=gs://bucket/a", *engine]
    for script in ([*POD, "--dry-run", "--"], [*SLURM, "--dry-run"]):
        result = launch(*script, *command, PYTHON=sys.executable)
        assert (result.returncode, result.stderr) == (0, "")


def pod_calls(stubs, states, codes, *options):
    make, calls = stubs
    environment = make(gcloud=GCLOUD)
    for name, values in {"states": states, "codes": codes}.items():
        (Path(environment["HERE"]) / name).write_text("".join(f"{value}\n" for value in values))
    result = launch(*POD, *options, "--", *TRAIN, **environment)
    kinds = []
    for call in calls():
        kind = call.split()[4]  # gcloud compute tpus tpu-vm KIND
        kinds.append("run" if kind == "ssh" and "--multiprocess" in call else kind)
    return result, [kind for kind in kinds if kind != "list"], calls()


def test_the_pod_is_created_installed_and_started(stubs):
    states = ["MISSING", "MISSING"]
    result, kinds, calls = pod_calls(stubs, states, [0], "--spot", "--delete")
    assert result.returncode == 0, result.stderr
    assert kinds == ["create", "scp", "ssh", "run", "delete"]
    assert all("--zone z" in call for call in calls)
    assert "--accelerator-type v4-32" in calls[2] and "--spot" in calls[2]
    assert all("--worker=all" in call for call in calls if " ssh " in call or " scp " in call)


def test_a_preempted_pod_is_created_anew_and_the_same_command_runs_again(stubs):
    states = ["READY", "READY", "PREEMPTED", "PREEMPTED", "READY"]
    result, kinds, calls = pod_calls(stubs, states, [255, 0])
    assert result.returncode == 0, result.stderr
    assert kinds == ["scp", "ssh", "run", "delete", "create", "scp", "ssh", "run"]
    runs = [call for call in calls if "--multiprocess" in call]
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    ("codes", "options", "runs", "message"),
    [
        ([75, 0], [], 2, "attempt 2 of 20"),  # A lost process needs no new TPU.
        ([137, 0], [], 2, "attempt 2 of 20"),
        ([2, 0], [], 1, "giving up with exit code 2"),
        ([134, 75, 0], ["--attempts", "2"], 2, "giving up with exit code 75"),
    ],
)
def test_a_loss_is_tried_again_and_an_error_is_not(stubs, codes, options, runs, message):
    result, kinds, _ = pod_calls(stubs, READY, codes, *options)
    assert (result.returncode, kinds) == (codes[runs - 1], ["scp", "ssh", *["run"] * runs])
    assert message in result.stderr


def test_the_setup_runs_on_all_workers_after_the_installation(stubs):
    result, kinds, calls = pod_calls(stubs, READY, [75, 0], "--setup", "mount /mnt/runs")
    assert (result.returncode, kinds) == (0, ["scp", "ssh", "ssh", "run", "run"])
    setup = calls[4]  # after two lists, the copy and the installation
    assert "--worker=all" in setup and shlex.split(setup)[-3] == "mount /mnt/runs"


def test_waits_in_a_row_are_bounded_are_no_attempts_and_delete_nothing(stubs):
    row = ["CREATING", "STOPPED"]
    states = ["READY", *row, "READY", "READY", *row, "CREATING", *READY]
    result, kinds, _ = pod_calls(stubs, states, [75, 0], "--waits", "2", "--attempts", "2")
    assert (result.returncode, kinds) == (75, ["scp", "ssh", "run"])
    assert "STOPPED: waiting" in result.stderr
    assert "after waiting 2 times in a row" in result.stderr


def test_an_installation_that_fails_is_an_attempt(stubs):
    make, calls = stubs
    environment = make(gcloud=GCLOUD + '[[ "$4" != scp ]]')
    (Path(environment["HERE"]) / "states").write_text("\n".join(READY))
    result = launch(*POD, "--attempts", "2", "--", *TRAIN, **environment)
    assert result.returncode == 255
    assert [call.split()[4] for call in calls()].count("scp") == 2
