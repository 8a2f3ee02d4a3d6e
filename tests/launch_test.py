"""The launch scripts: what they refuse, what they start, and what they do when something is lost.

gcloud, srun and scontrol are stand-ins on the PATH that write down how they were called; local.sh
runs real processes that JAX joins.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from variator_jax import cli

ROOT = Path(__file__).parents[1]
JOBSET = (ROOT / "launch" / "gke_jobset.yaml").read_text()
LOST = "another process was lost; the same command continues from the newest checkpoint"
ANY_POD = ["tpu_pod.sh", "my-pod", "--zone", "z", "--type", "v4-32"]
POD = [*ANY_POD, "--no-check"]
SLURM = ["slurm.sbatch", "--no-check"]
TRAIN = ["train", "--gin.MODEL_DIR=/mnt/runs/a", "--gin.X=(1, 2)"]

# One process of a run over all devices: each adds up, until something happens to it.
PROGRAM = """
import os, signal, sys, time
from variator_jax import distributed, errors

HAPPENING, flags = sys.argv[1], dict(flag.lstrip("-").split("=") for flag in sys.argv[2:])
INDEX = int(flags["process_index"])
distributed.HEARTBEAT_SECONDS, distributed.FAREWELL_SECONDS = 8, 1

def work():
    distributed.initialize(flags["coordinator_address"], int(flags["process_count"]), INDEX)
    import jax, numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    mesh = Mesh(np.array(jax.devices()), ("data",))
    local = np.full(jax.local_device_count(), INDEX + 1, np.float32)
    rows = jax.make_array_from_process_local_data(
        NamedSharding(mesh, PartitionSpec("data")), local)
    add = jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(mesh, PartitionSpec()))
    print("sum", float(add(rows)), "main", distributed.is_main(), flush=True)
    for step in range(5):
        add(rows).block_until_ready()
    if HAPPENING == "another_run":
        from variator_jax.distill.checkpointing import Checkpoints
        Checkpoints(flags["folder"], 1, {"ratio": 2})
    if HAPPENING == f"killed{INDEX}":
        os.kill(os.getpid(), signal.SIGKILL)
    if HAPPENING == "error1" and INDEX == 1:
        raise errors.DataError("a disk of process 1 is full")
    if HAPPENING == "killed1":
        time.sleep(600)  # outside of a collective
    while HAPPENING != "nothing":
        add(rows).block_until_ready()

try:
    with distributed.together():
        work()
except errors.VariatorError as error:
    print("error:", error, file=sys.stderr)
    sys.exit(2)
"""


def launch(script, *arguments, **environment):
    return subprocess.run(
        ["bash", ROOT / "launch" / script, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "program"
    path.write_text(f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\n{PROGRAM}")
    path.chmod(0o755)
    return ["--program", str(path)]


@pytest.fixture
def stubs(tmp_path):
    """Makes stand-ins of programs; gives their PATH, and their calls as lists of arguments."""
    folder, record = tmp_path / "bin", tmp_path / "calls"
    folder.mkdir()

    def make(**bodies):
        for name, body in bodies.items():
            text = f"#!/bin/bash\nprintf '%q ' {name} \"$@\" >>{record}\necho >>{record}\n{body}\n"
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        return {"PATH": f"{folder}:{os.environ['PATH']}", "RETRY_SECONDS": "0", "HERE": str(folder)}

    def calls():
        lines = record.read_text().splitlines() if record.exists() else []
        return [line for line in lines if line]

    return make, calls


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["local.sh"], "number of processes first"),
        (["local.sh", "two"], "found 'two'"),
        (["local.sh", "2", "--devices", "0", "--", "train"], "--devices 0: expected a number"),
        (["local.sh", "2", "--fast", "--", "train"], "unknown argument '--fast'"),
        (["local.sh", "2", "--program", "/nowhere", "--", "a"], "no such executable"),
        (["local.sh", "2", "--"], "no command given"),
        (["tpu_pod.sh"], "name of the TPU first"),
        (["tpu_pod.sh", "pod", "--type", "v4-8", "--", "train"], "no zone given"),
        (["tpu_pod.sh", "pod", "--zone", "z", "--", "train"], "no accelerator type given"),
        (["tpu_pod.sh", "pod", "--zone", "--spot"], "--zone needs a value"),
        ([*POD, "--attempts", "0", "--", "train"], "--attempts 0"),
        ([*POD], "no command given"),
        ([*POD, "--waits", "x", "--", "train"], "--waits x"),
        ([*POD, "--", "train", "--gin.MODEL_DIR=runs/a"], "each worker's own disk"),
        ([*POD, "--", "train", "--gin.MODEL_DIR", "'runs/a'"], "each worker's own disk"),
        ([*POD, "--", "train", "--gin.MODEL_DIR=gs://b/a"], "gs://b/a, where only T5X writes"),
        ([*POD, "--", "train", "--engine=builtin", "--gin.MODEL_DIR='gs://b/a'"], "only T5X"),
        (["slurm.sbatch", "--dry-run"], "no command given"),
        (["slurm.sbatch", "--nodes=2"], "options of sbatch stand before"),
        (["slurm.sbatch", "train"], "no SLURM job"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_inputs_are_checked_in_the_users_words(command, message, stubs):
    make, calls = stubs
    environment = make(gcloud="exit 1", srun="exit 1")
    result = launch(*command, **environment, SLURM_JOB_ID="")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert calls() == []


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (
            ["local.sh", "2", "--no-check", "--dry-run", "--", *TRAIN],
            "--process_count=2 --process_index=1",
        ),
        ([*POD, "--spot", "--dry-run", "--", *TRAIN], "create my-pod --accelerator-type v4-32"),
        ([*SLURM, "--dry-run", *TRAIN], "-m variator_jax train --multiprocess"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_dry_run_says_what_would_be_done_and_does_nothing(command, expected, stubs):
    make, calls = stubs
    result = launch(*command, **make(gcloud="exit 1", srun="exit 1"), PYTHON=sys.executable)
    assert (result.returncode, result.stderr) == (0, "")
    assert "Would " in result.stdout and expected in result.stdout
    assert TRAIN[1] in result.stdout
    assert calls() == []


@pytest.mark.parametrize("engine", [["--engine=t5x"], ["--engine", "t5x"]], ids=" ".join)
def test_a_bucket_is_for_t5x(engine):
    command = ["train", "--gin.MODEL_DIR=gs://bucket/a", *engine]
    for script in ([*POD, "--dry-run", "--"], [*SLURM, "--dry-run"]):
        result = launch(*script, *command, PYTHON=sys.executable)
        assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(
    ("folder", "warning"),
    [
        (["--gin.MODEL_DIR=runs/a"], "is relative to"),
        (["--gin.MODEL_DIR", "'runs/a'"], "is relative to"),
        (["--gin.MODEL_DIR='gs://bucket/a'"], "only T5X writes there"),
        (["--gin.MODEL_DIR='/shared/a'"], ""),
        (["--gin.RATIO=4"], ""),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_slurm_warns_of_folders_that_may_not_be_shared(folder, warning):
    result = launch(*SLURM, "--dry-run", "train", *folder, PYTHON=sys.executable)
    assert result.returncode == 0
    assert result.stderr.startswith("warning: ") == bool(warning) and warning in result.stderr


def test_local_joins_processes_with_several_devices_each(program):
    result = launch("local.sh", "2", "--devices", "2", *program, "--", "nothing")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "[0] sum 6.0 main True\n" in result.stdout
    assert "[1] sum 6.0 main False\n" in result.stdout


@pytest.mark.parametrize("happening", ["killed0", "killed1"])
def test_a_killed_process_ends_the_other_with_a_message(program, happening):
    killed, other = ("0", "1") if happening == "killed0" else ("1", "0")
    result = launch("local.sh", "2", *program, "--", happening)
    assert result.returncode == 128 + 9
    assert f"process {killed} ended with exit code 137" in result.stderr
    assert "ending the processes that are left" not in result.stderr  # It ended by itself.
    told = [line for line in result.stdout.splitlines() if LOST in line]
    assert told and all(line.startswith(f"[{other}]") for line in told)


def test_an_error_in_one_process_ends_the_other_and_gives_its_code(program):
    result = launch("local.sh", "2", *program, "--", "error1")
    assert result.returncode == 2
    assert "[1] error: a disk of process 1 is full" in result.stdout
    assert "process 0 ended with exit code 75" in result.stderr


def test_a_folder_of_another_run_is_told_by_all_processes(program, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text('{"ratio": 4}')
    result = launch("local.sh", "2", *program, "--", "another_run", f"--folder={folder}")
    assert result.returncode == 2
    for index in "01":
        assert f"process {index} ended with exit code 2." in result.stderr
        assert f"[{index}] error: {folder} holds another run: its ratio is 4" in result.stdout


def test_local_ends_what_does_not_end_by_itself(tmp_path):
    path = tmp_path / "stubborn"
    path.write_text(
        '#!/bin/bash\n[[ "$*" == *index=1* ]] && exit 3\ntrap "exit 0" TERM\n'
        "while :; do sleep 0.1; done\n"
    )
    path.chmod(0o755)
    result = launch("local.sh", "2", "--grace", "1", "--program", str(path), "--", "x")
    assert result.returncode == 3
    assert "ending the processes that are left" in result.stderr


# A TPU whose states and whose command's exit codes come one after the other out of two files.
GCLOUD = """
next() { head -n 1 "$HERE/$1"; sed -i 1d "$HERE/$1"; }
case "$4" in
  list) found="$(next states)"; [[ "$found" == MISSING ]] || echo "my-pod,$found" ;;
  ssh) [[ "$*" != *--multiprocess* ]] || exit "$(next codes)" ;;
esac
"""


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


@pytest.mark.parametrize("code", [75, 137])
def test_a_lost_process_is_started_again_without_a_new_pod(stubs, code):
    result, kinds, _ = pod_calls(stubs, ["READY"] * 4, [code, 0])
    assert (result.returncode, kinds) == (0, ["scp", "ssh", "run", "run"])


def test_an_error_of_the_command_is_not_tried_again(stubs):
    result, kinds, _ = pod_calls(stubs, ["READY"] * 4, [2, 0])
    assert (result.returncode, kinds) == (2, ["scp", "ssh", "run"])


def test_the_setup_runs_on_all_workers_after_the_installation(stubs):
    result, kinds, calls = pod_calls(stubs, ["READY"] * 4, [75, 0], "--setup", "mount /mnt/runs")
    assert (result.returncode, kinds) == (0, ["scp", "ssh", "ssh", "run", "run"])
    setup = calls[4]  # after two lists, the copy and the installation
    assert "--worker=all" in setup and shlex.split(setup)[-3] == "mount /mnt/runs"


def test_attempts_are_bounded_and_waits_do_not_count_as_such(stubs):
    states = ["READY", "STOPPED", "CREATING", *["READY"] * 9]
    result, kinds, _ = pod_calls(stubs, states, [134, 75, 0], "--attempts", "2")
    assert (result.returncode, kinds) == (75, ["scp", "ssh", "run", "run"])
    assert "STOPPED: waiting" in result.stderr and "giving up" in result.stderr


def test_waits_in_a_row_are_bounded_and_nothing_is_deleted(stubs):
    row = ["CREATING"] * 2
    states = ["READY", *row, "READY", "READY", *row, "CREATING", "READY", "READY"]
    result, kinds, _ = pod_calls(stubs, states, [75, 0], "--waits", "2")
    assert (result.returncode, kinds) == (75, ["scp", "ssh", "run"])
    assert "after waiting 2 times in a row" in result.stderr


def test_an_installation_that_fails_is_an_attempt(stubs):
    make, calls = stubs
    environment = make(gcloud=GCLOUD + '[[ "$4" != scp ]]')
    (Path(environment["HERE"]) / "states").write_text("READY\n" * 9)
    result = launch(*POD, "--attempts", "2", "--", *TRAIN, **environment)
    assert result.returncode == 255
    assert [call.split()[4] for call in calls()].count("scp") == 2


# Stands for an interpreter: its --check refuses as variator does, or ends with another code.
CHECKS = """
[[ "$1" != -c ]] || { [[ "$2" != "import ${LACKS:-}" ]]; exit; }
[[ "${CHECK:-2}" == 0 ]] || echo "variator: error: there is no command 'trian'." >&2
exit "${CHECK:-2}"
"""
MISSPELT = ["trian", "--gin.MODEL_DIR=/mnt/runs/a"]
ON_T5X = [*MISSPELT, "--engine=t5x"]


def checked(script, stubs, *options, arguments=MISSPELT, **environment):
    """A script's dry run, and its calls. It is a copy, whose .venv has a stand-in for Python."""
    make, calls = stubs
    found = make(gcloud="exit 1", srun="exit 1", scontrol="", python=CHECKS)
    folder = Path(found["HERE"]).parent / "repository"
    shutil.copytree(ROOT / "launch", folder / "launch", dirs_exist_ok=True)
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(Path(found["HERE"]) / "python")
    head = {
        "local.sh": ["2", "--dry-run", *options, "--"],
        "tpu_pod.sh": [*ANY_POD[1:], *options, "--dry-run", "--"],
        "slurm.sbatch": ["--dry-run", *options],
    }
    result = subprocess.run(
        ["bash", folder / "launch" / script, *head[script], *arguments],
        cwd=folder,
        env={**os.environ, **found, **environment},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    return result, calls()


SCRIPTS = ["local.sh", "tpu_pod.sh", "slurm.sbatch"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_command_that_variator_refuses_is_refused_before_anything_starts(script, stubs):
    result, calls = checked(script, stubs)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: there is no command 'trian'.\n")
    assert "--no-check" in result.stderr
    asked = [shlex.split(call) for call in calls]
    assert [call[1] for call in asked] == ["-c", "-m"]
    assert asked[1][2:6] == ["variator_jax", "trian", "--check", "--multiprocess"]
    assert asked[1][-1] == MISSPELT[-1]
    assert ("--engine=builtin" in asked[1]) == (script == "tpu_pod.sh")


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("environment", "options", "told"),
    [
        ({"CHECK": "0"}, [], ""),
        ({}, ["--no-check"], ""),
        ({"LACKS": "variator_jax"}, [], "has no variator_jax"),
        ({"CHECK": "137"}, [], "ended with exit code 137"),
    ],
)
def test_what_is_in_order_or_cannot_be_checked_is_started(
    script, environment, options, told, stubs
):
    result, _ = checked(script, stubs, *options, **environment)
    assert result.returncode == 0 and "Would " in result.stdout
    assert result.stderr.startswith("warning: the command is not checked") == bool(told)
    assert told in result.stderr


def test_the_workers_t5x_need_not_be_here(stubs):
    options = ("--setup", "install_t5x")
    result, calls = checked("tpu_pod.sh", stubs, *options, arguments=ON_T5X, LACKS="t5x")
    assert (result.returncode, len(calls)) == (0, 1) and "has no T5X" in result.stderr


def test_with_t5x_here_a_command_for_it_is_checked(stubs):
    result, calls = checked("tpu_pod.sh", stubs, arguments=ON_T5X)
    assert result.returncode == 2 and "--engine=builtin" not in calls[-1]


def test_variator_itself_answers_the_check():
    command = ["slurm.sbatch", "--dry-run", "train", "--gin_file=nonexist.gin"]
    result = launch(*command, PYTHON=sys.executable, SLURM_SUBMIT_DIR=str(ROOT))
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ") and "nonexist.gin" in result.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_help_is_the_comment_at_the_head(script, stubs):
    make, calls = stubs
    result = launch(script, "--help", **make(gcloud="exit 1", srun="exit 1"))
    assert (result.returncode, result.stderr, calls()) == (0, "", [])
    assert script in result.stdout and "--no-check" in result.stdout
    assert not any(line.startswith(("#", "set -")) for line in result.stdout.splitlines())


def test_slurm_warns_of_an_interpreter_that_is_not_there():
    result = launch(*SLURM, "--dry-run", "train", PYTHON="/nowhere/python")
    assert result.returncode == 0
    assert "warning: /nowhere/python is no executable" in result.stderr
    assert "python3 -m venv .venv" in launch("slurm.sbatch", "--help").stdout


def test_local_has_one_command_for_a_fresh_clone_in_its_help_and_in_the_docs():
    told = " ".join(launch("local.sh", "--help").stdout.replace("\\\n", " ").split())
    docs = (ROOT / "docs" / "multi_host.md").read_text().replace("\\\n", " ")
    command = told[told.index("bash launch/local.sh") : told.index(" That trains")]
    assert command in " ".join(docs.split())
    arguments = shlex.split(command)[4:]
    assert cli.main([arguments[0], "--check", "--engine=builtin", *arguments[1:]]) == 0


@pytest.mark.parametrize("missing", ["", "NODES", "IMAGE", "CHIPS_PER_NODE"])
def test_the_jobsets_commands_stop_where_a_variable_is_missing(missing, stubs):
    """Those of its header, as a user would paste them."""
    make, calls = stubs
    environment = make(envsubst='printf %s "$1" >"$HERE/named"; cat', kubectl="cat >/dev/null")
    lines = [line[1:].strip() for line in JOBSET.partition("# The line with")[0].splitlines()]
    exports, start = "\n".join(lines[2:]).split("\nV=")
    script = f"{exports}\nunset {missing}\nV={start}"
    result = subprocess.run(
        ["bash", "-c", script],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    applied = [call for call in calls() if call.startswith("kubectl apply")]
    assert bool(applied) == (not missing), result.stderr
    assert missing in result.stderr
    if not missing:
        named = (Path(environment["HERE"]) / "named").read_text()
        variables = set(re.findall(r"\$\{(\w+)\}", JOBSET.partition("apiVersion:")[2]))
        assert {name[1:] for name in named.split()} == variables
        docs = (ROOT / "docs" / "multi_host.md").read_text().split("V='")[1].partition("'")[0]
        assert docs.split() == named.split()


SRUN_JOB = {
    "SLURM_JOB_ID": "7",
    "SLURM_SUBMIT_DIR": str(ROOT),
    "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_GPUS_ON_NODE": "4",
    "PYTHON": sys.executable,
}


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


# Runs what a task runs, as SLURM does: once for each exit code in a file; the highest one counts.
SRUN = """
while [[ "$1" == --* ]]; do shift; done
highest=0
for CODE in $(<"$HERE/codes"); do
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
def test_slurm_tells_an_error_of_one_task_from_a_loss(stubs, codes, expected):
    make, calls = stubs
    environment = make(srun=SRUN, scontrol="", python='exit "${CODE:-0}"')
    (Path(environment["HERE"]) / "codes").write_text(codes)
    python = {"PYTHON": f"{environment['HERE']}/python"}
    result = launch(*SLURM, *TRAIN, **environment, **(SRUN_JOB | python))
    assert result.returncode == expected, result.stderr
    assert ("scontrol requeue 7 " in calls()) == (expected > 2)
    runs = [call for call in calls() if "variator_jax train" in call]
    assert shlex.split(runs[-1])[-2:] == TRAIN[1:]


# A command that saves when it is told to end, and one that something of its own outlives.
SAVES = """
trap 'sleep 0.3; echo saved; exit 143' TERM
touch "$HERE/up"
while :; do sleep 0.05; done
"""
OUTLIVED = '(trap "" TERM; sleep 0.4; echo the last lines) & exit 75'


def told_to_end(command, environment):
    """Sends SIGTERM to a shell, and to it alone, once the command in it is up."""
    process = subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True
    )
    while not (Path(environment["HERE"]) / "up").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate()
    return process.returncode, out


def test_a_task_of_slurm_passes_sigterm_on_and_waits_for_the_checkpoint(stubs):
    make, _ = stubs
    environment = make(
        srun='while [[ "$1" == --* ]]; do shift; done; printf "%s\\0" "$@" >"$HERE/task"',
        python=f'[[ "$1" != -c ]] || exit 0\n{SAVES}',
    )
    python = {"PYTHON": f"{environment['HERE']}/python"}
    launch(*SLURM, *TRAIN, **environment, **(SRUN_JOB | python))
    task = (Path(environment["HERE"]) / "task").read_text().split("\0")[:-1]
    assert told_to_end(task, environment) == (143, "saved\n")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"SLURM_CPUS_PER_TASK": "6"}, "cpus 6"),
        ({"SLURM_CPUS_PER_TASK": "6", "SRUN_CPUS_PER_TASK": "3"}, "cpus 3"),
        ({}, "cpus none"),
    ],
)
def test_slurm_gives_each_task_its_cpus(stubs, environment, expected):
    make, _ = stubs
    stand_in = make(srun='echo "cpus ${SRUN_CPUS_PER_TASK:-none}"')
    result = launch(*SLURM, *TRAIN, **stand_in, **SRUN_JOB, **environment)
    assert expected in result.stdout.splitlines()


def test_slurm_refuses_processes_that_share_gpus():
    result = launch(*SLURM, "--dry-run", "train", SLURM_NTASKS_PER_NODE="3", SLURM_GPUS_ON_NODE="8")
    assert result.returncode == 2 and "as many tasks as GPUs, or 1" in result.stderr


def jobsets():
    text = (ROOT / "launch" / "gke_jobset.yaml").read_text()
    for name in ("NODES", "CHIPS_PER_NODE", "GPUS_PER_NODE"):
        text = text.replace(f"${{{name}}}", "4")
    for name, value in {"CLAIM": "runs", "NAME": "x", "COMMAND": "train --gin.A=1"}.items():
        text = text.replace(f"${{{name}}}", value)
    return {job["metadata"]["labels"]["accelerator"]: job for job in yaml.safe_load_all(text)}


def pod(kind):
    return jobsets()[kind]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


def test_the_jobsets_tell_the_pods_their_place():
    found = jobsets()
    assert found.keys() == {"tpu", "gpu"}
    for kind, job in found.items():
        spec = job["spec"]["replicatedJobs"][0]["template"]["spec"]
        assert spec["completions"] == spec["parallelism"] == 4
        assert spec["completionMode"] == "Indexed"  # gives JOB_COMPLETION_INDEX
        assert job["spec"]["failurePolicy"]["maxRestarts"] > 0
        script = spec["template"]["spec"]["containers"][0]["command"][2]
        assert ("--multiprocess" in script) == (kind == "tpu")
        assert ("-workers-0-0." in script and "JOB_COMPLETION_INDEX" in script) == (kind == "gpu")


@pytest.mark.parametrize("kind", ["tpu", "gpu"])
def test_a_pod_mounts_the_folder_of_the_runs(kind):
    volumes = {volume["name"]: volume for volume in pod(kind)["volumes"]}
    assert volumes["runs"]["persistentVolumeClaim"]["claimName"] == "runs"
    mounts = {mount["name"]: mount for mount in pod(kind)["containers"][0]["volumeMounts"]}
    assert mounts.keys() == volumes.keys() and mounts["runs"]["mountPath"] == "/runs"


@pytest.mark.parametrize("kind", ["tpu", "gpu"])
def test_a_pod_passes_sigterm_on_and_keeps_the_exit_code(stubs, kind):
    make, calls = stubs
    environment = make(python=SAVES) | {"JOB_COMPLETION_INDEX": "3"}
    assert told_to_end(pod(kind)["containers"][0]["command"], environment) == (143, "saved\n")
    [call] = calls()
    assert call.startswith("python -m variator_jax train --") and call.endswith(" --gin.A=1 ")
    assert kind == "tpu" or "--process_count=4 --process_index=3" in call


@pytest.mark.parametrize("kind", ["tpu", "gpu"])
def test_what_outlives_the_command_of_a_pod_can_tell_its_last_lines(stubs, kind):
    # As in a container: with the end of the first process of a namespace, all others are killed.
    first = ["unshare", "--user", "--map-root-user", "--pid", "--fork"]
    if subprocess.run([*first, "true"], capture_output=True).returncode:
        pytest.skip("this machine allows no namespaces")
    make, _ = stubs
    environment = make(python=OUTLIVED) | {"JOB_COMPLETION_INDEX": "3"}
    command = [*first, *pod(kind)["containers"][0]["command"]]
    result = subprocess.run(
        command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True
    )
    assert (result.returncode, result.stdout) == (75, "the last lines\n")
