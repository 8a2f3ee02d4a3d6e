"""launch/slurm.sbatch with stand-ins of srun and scontrol: requeues, CPUs, GPUs, signals."""

import shlex
import sys
from pathlib import Path

import pytest
from launching import ROOT, SAVES, SLURM, TRAIN, launch, terminated

SRUN_JOB = {
    "SLURM_JOB_ID": "7",
    "SLURM_SUBMIT_DIR": str(ROOT),
    "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_GPUS_ON_NODE": "4",
    "PYTHON": sys.executable,
}


@pytest.mark.parametrize(
    ("argument", "warning"),
    [
        ("--gin.MODEL_DIR=runs/a", "runs/a is relative to"),
        ("--gin.MODEL_DIR='gs://bucket/a'", "only T5X writes to gs://bucket/a"),
        ("--gin.MODEL_DIR='/shared/a'", ""),
        ("--gin.RATIO=4", ""),
    ],
)
def test_slurm_warns_of_folders_that_may_not_be_shared(argument, warning):
    result = launch(*SLURM, "--dry-run", "train", argument, PYTHON=sys.executable)
    assert result.returncode == 0
    assert result.stderr.startswith("warning: ") == bool(warning) and warning in result.stderr


def test_slurm_refuses_an_interpreter_without_variator_and_tasks_that_share_gpus():
    result = launch(*SLURM, "train", **(SRUN_JOB | {"PYTHON": "/nowhere/python"}))
    assert result.returncode == 2 and "/nowhere/python cannot import" in result.stderr
    assert "python3 -m venv .venv" in launch("slurm.sbatch", "--help").stdout
    result = launch(*SLURM, "--dry-run", "train", SLURM_NTASKS_PER_NODE="3", SLURM_GPUS_ON_NODE="8")
    assert result.returncode == 2 and "as many tasks as GPUs, or 1" in result.stderr


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [(0, 0, False), (2, 0, False), (143, 0, True), (75, 19, True), (134, 20, False)],
)
def test_slurm_requeues_what_can_continue(stubs, code, restarts, requeued):
    make, calls = stubs
    environment = make(srun=f'echo "ids $JAX_LOCAL_DEVICE_IDS"; exit {code}', scontrol="")
    result = launch(*SLURM, *TRAIN, **environment, **SRUN_JOB, SLURM_RESTART_COUNT=str(restarts))
    assert result.returncode == code, result.stderr
    assert "ids 0,1,2,3" in result.stdout
    assert "-m variator_jax train --multiprocess" in calls()[0]
    assert ("scontrol requeue 7 " in calls()) == requeued


# Runs what a task runs, as SLURM does: once for each exit code in $CODES; the highest one counts.
SRUN = """
while [[ "$1" == --* ]]; do shift; done
highest=0
for CODE in $CODES; do
  code=0
  CODE="$CODE" "$@" || code=$?
  if ((code > highest)); then highest="$code"; fi
done
exit "$highest"
"""


@pytest.mark.parametrize(
    ("codes", "expected"),
    [("0 0", 0), ("75 2", 2), ("2 134", 2), ("143 1 75", 1), ("75 143", 143), ("137 75", 137)],
)
def test_slurm_separates_an_error_of_one_task_from_a_loss(stubs, codes, expected):
    make, calls = stubs
    environment = make(srun=SRUN, scontrol="", python='exit "${CODE:-0}"')
    python = {"PYTHON": f"{environment['HERE']}/python", "CODES": codes}
    result = launch(*SLURM, *TRAIN, **environment, **(SRUN_JOB | python))
    assert result.returncode == expected, result.stderr
    assert ("scontrol requeue 7 " in calls()) == (expected > 2)
    runs = [call for call in calls() if "variator_jax train" in call]
    assert shlex.split(runs[-1])[-2:] == TRAIN[1:]


def test_a_task_of_slurm_passes_sigterm_on_and_waits_for_the_checkpoint(stubs):
    make, _ = stubs
    environment = make(
        srun='while [[ "$1" == --* ]]; do shift; done; printf "%s\\0" "$@" >"$HERE/task"',
        python=f'[[ "$1" != -c ]] || exit 0\n{SAVES}',
    )
    python = {"PYTHON": f"{environment['HERE']}/python"}
    launch(*SLURM, *TRAIN, **environment, **(SRUN_JOB | python))
    task = (Path(environment["HERE"]) / "task").read_text().split("\0")[:-1]
    assert terminated(task, environment) == (143, "saved\n")


@pytest.mark.parametrize(("own", "expected"), [({}, "6"), ({"SRUN_CPUS_PER_TASK": "3"}, "3")])
def test_slurm_gives_each_task_its_cpus(stubs, own, expected):
    make, _ = stubs
    environment = make(srun='echo "cpus ${SRUN_CPUS_PER_TASK:-none}"')
    result = launch(*SLURM, *TRAIN, **environment, **SRUN_JOB, SLURM_CPUS_PER_TASK="6", **own)
    assert f"cpus {expected}" in result.stdout.splitlines()
