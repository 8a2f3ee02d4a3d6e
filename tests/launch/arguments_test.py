"""What the launch scripts refuse and print before anything starts."""

import shlex
import shutil
import sys
from pathlib import Path

import pytest
from launching import ANY_POD, POD, ROOT, SCRIPTS, SLURM, TRAIN, launch

# Stands for an interpreter: its --check refuses as variator does, or ends with another code.
CHECKS = """
[[ "$1" != -c ]] || { [[ "$2" != "import ${LACKS:-}" ]]; exit; }
[[ "${CHECK:-2}" == 0 ]] || echo "variator: error: there is no command 'trian'." >&2
exit "${CHECK:-2}"
"""
MISSPELT = ["trian", "--gin.MODEL_DIR=/mnt/runs/a"]


REFUSED = {
    "local.sh": "number of processes first",
    "local.sh two": "found 'two'",
    "local.sh 2 --devices 0 -- train": "--devices 0: expected a number",
    "local.sh 2 --program /nowhere -- a": "is not an executable",
    "tpu_pod.sh pod --type v4-8 -- train": "no zone given",
    "tpu_pod.sh pod --zone z -- train": "no accelerator type given",
    "POD --attempts 0 -- train": "--attempts 0",
    "POD": "no command given",
    "POD -- train --gin.MODEL_DIR=runs/a": "each worker's own disk",
    "POD -- train --gin.MODEL_DIR=gs://b/a": "gs://b/a, where only T5X writes",
    "slurm.sbatch --dry-run": "no command given",
    "slurm.sbatch --nodes=2": "options of sbatch stand before",
}


@pytest.mark.parametrize("command", REFUSED)
def test_arguments_are_checked(command, stubs):
    make, calls = stubs
    arguments = command.replace("POD", " ".join(POD)).split(" ")
    result = launch(*arguments, **make(gcloud="exit 1", srun="exit 1"), SLURM_JOB_ID="")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ") and REFUSED[command] in result.stderr
    assert calls() == []


DRY_RUNS = {
    "local.sh 2 --no-check --dry-run --": "--process_count=2 --process_index=1",
    f"{' '.join(POD)} --spot --dry-run --": "create my-pod --accelerator-type v4-32",
    f"{' '.join(SLURM)} --dry-run": "-m variator_jax train --multiprocess",
}


@pytest.mark.parametrize("command", DRY_RUNS)
def test_a_dry_run_and_the_help_print_and_do_nothing(command, stubs):
    make, calls = stubs
    stand_ins = make(gcloud="exit 1", srun="exit 1")
    script, *options = command.split()
    result = launch(script, *options, *TRAIN, **stand_ins, PYTHON=sys.executable)
    assert (result.returncode, result.stderr) == (0, "")
    assert all(text in result.stdout for text in ("Would ", DRY_RUNS[command], TRAIN[1]))
    result = launch(script, "--help", **stand_ins)
    assert (result.returncode, result.stderr, calls()) == (0, "", [])
    assert script in result.stdout and "--no-check" in result.stdout
    assert "\n#" not in result.stdout


def checked(script, stubs, *options, command=MISSPELT, **environment):
    """A script's dry run, and its calls. It is a copy, whose .venv has a stand-in for Python."""
    make, calls = stubs
    stand_ins = make(gcloud="exit 1", srun="exit 1", scontrol="", python=CHECKS)
    folder = Path(stand_ins["HERE"]).parent / "repository"
    shutil.copytree(ROOT / "launch", folder / "launch")
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(Path(stand_ins["HERE"]) / "python")
    place = {"local.sh": ["2"], "tpu_pod.sh": ANY_POD[1:], "slurm.sbatch": []}[script]
    end = [] if script == "slurm.sbatch" else ["--"]
    program = [folder / "launch" / script, *place, "--dry-run", *options, *end]
    result = launch(*program, *command, cwd=folder, **stand_ins, **environment)
    return result, calls()


UNCHECKED = "warning: the command is not checked: "


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(("environment", "options", "code", "message"), [
    ({}, [], 2, "error: there is no command 'trian'.\nerror: nothing was started; --no-check"),
    ({"CHECK": "0"}, [], 0, ""),
    ({}, ["--no-check"], 0, ""),
    ({"LACKS": "variator_jax"}, [], 0, UNCHECKED),
    ({"CHECK": "137"}, [], 0, UNCHECKED),
])  # fmt: skip
def test_a_refused_command_is_not_started(script, environment, options, code, message, stubs):
    result, calls = checked(script, stubs, *options, **environment)
    assert result.returncode == code and ("Would " in result.stdout) == (code == 0)
    assert result.stderr.startswith(message) and bool(result.stderr) == bool(message)
    if code:
        check = shlex.split(calls[-1])
        assert check[1:6] == ["-m", "variator_jax", "trian", "--check", "--multiprocess"]
        assert check[-1] == MISSPELT[-1]
        assert ("--engine=builtin" in check) == (script == "tpu_pod.sh")


@pytest.mark.parametrize("lacks", ["", "t5x"])
def test_a_command_for_t5x_is_checked_where_t5x_is_installed(lacks, stubs):
    result, calls = checked("tpu_pod.sh", stubs, command=[*MISSPELT, "--engine=t5x"], LACKS=lacks)
    assert result.returncode == (0 if lacks else 2) and "--engine=builtin" not in calls[-1]
    assert ("has no T5X" in result.stderr) == (lacks == "t5x")


def test_variator_itself_answers_the_check():
    command = ["slurm.sbatch", "--dry-run", "train", "--gin_file=nonexist.gin"]
    result = launch(*command, PYTHON=sys.executable, SLURM_SUBMIT_DIR=str(ROOT))
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ") and "nonexist.gin" in result.stderr
