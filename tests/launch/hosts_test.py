"""SLURM and TPU pods with stand-ins of srun, scontrol and gcloud; and the pods of GKE's JobSet."""

import re
import shlex
import string
import sys
from pathlib import Path

import pytest
import yaml
from launching import OUTLIVED, POD, ROOT, SAVES, SLURM, TRAIN, launch, run, terminated

# launch/slurm.sbatch

SRUN_JOB = {
    "SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_GPUS_ON_NODE": "4", "PYTHON": sys.executable,
}  # fmt: skip
# Runs what a task runs, as SLURM does: once for each exit code in $CODES; the highest one counts.
SRUN = """
echo "ids $JAX_LOCAL_DEVICE_IDS cpus $SRUN_CPUS_PER_TASK"
while [[ "$1" == --* ]]; do shift; done
printf "%s\\0" "$@" >"$HERE/task"
highest=0
for CODE in $CODES; do
  code=0
  CODE="$CODE" "$@" || code=$?
  if ((code > highest)); then highest="$code"; fi
done
exit "$highest"
"""


@pytest.fixture
def slurm(stubs):
    """Runs a job whose tasks end with these codes; gives its result, its calls, its environment."""
    make, calls = stubs

    def job(codes, body='exit "${CODE:-0}"', **variables):
        environment = make(srun=SRUN, scontrol="", python=f'[[ "$1" != -c ]] || exit 0\n{body}')
        python = {"PYTHON": f"{environment['HERE']}/python", "CODES": codes}
        result = launch(*SLURM, *TRAIN, **(environment | SRUN_JOB | python | variables))
        return result, calls(), environment

    return job


FOLDERS = {"runs/a": "runs/a is relative to", "'gs://bucket/a'": "only T5X writes to gs://bucket/a"}
FOLDERS["'/shared/a'"] = ""


@pytest.mark.parametrize("folder", FOLDERS)
def test_slurm_warns_of_folders_that_may_not_be_shared(folder):
    command = [*SLURM, "--dry-run", "train", f"--gin.MODEL_DIR={folder}"]
    result = launch(*command, PYTHON=sys.executable)
    assert result.returncode == 0 and FOLDERS[folder] in result.stderr
    assert result.stderr.startswith("warning: ") == bool(FOLDERS[folder])


def test_slurm_refuses_an_interpreter_without_variator_and_tasks_that_share_gpus():
    result = launch(*SLURM, "train", **(SRUN_JOB | {"PYTHON": "/nowhere/python"}))
    assert result.returncode == 2 and "/nowhere/python cannot import" in result.stderr
    result = launch(*SLURM, "--dry-run", "train", SLURM_NTASKS_PER_NODE="3", SLURM_GPUS_ON_NODE="8")
    assert result.returncode == 2 and "as many tasks as GPUs, or 1" in result.stderr


@pytest.mark.parametrize(("codes", "expected", "restarts", "requeued"), [
    ("0 0", 0, 0, False),
    ("75 2", 2, 0, False),
    ("2 134", 2, 0, False),
    ("143 1 75", 1, 0, False),
    ("75 143", 143, 0, True),
    ("137 75", 137, 19, True),
    ("134 0", 134, 20, False),
])  # fmt: skip
def test_slurm_requeues_a_loss_and_no_error_of_any_task(codes, expected, restarts, requeued, slurm):
    result, calls, _ = slurm(codes, SLURM_RESTART_COUNT=str(restarts))
    assert result.returncode == expected, result.stderr
    assert ("scontrol requeue 7 " in calls) == requeued
    runs = [shlex.split(call) for call in calls if call.startswith("python -m variator_jax train")]
    assert runs and all("--multiprocess" in run and run[-2:] == TRAIN[1:] for run in runs)


@pytest.mark.parametrize(("own", "cpus"), [({}, "6"), ({"SRUN_CPUS_PER_TASK": "3"}, "3")])
def test_slurm_gives_a_task_its_gpus_and_cpus(own, cpus, slurm):
    result, *_ = slurm("0", SLURM_CPUS_PER_TASK="6", **own)
    assert f"ids 0,1,2,3 cpus {cpus}" in result.stdout.splitlines()


def test_a_task_of_slurm_passes_sigterm_on_and_waits_for_the_checkpoint(slurm):
    *_, environment = slurm("", SAVES)
    task = (Path(environment["HERE"]) / "task").read_text().split("\0")[:-1]
    assert terminated(task, environment) == (143, "saved\n")


# launch/tpu_pod.sh

# A TPU whose states, and whose command's exit codes, are the lines of two files.
GCLOUD = """
next() { head -n 1 "$HERE/$1"; sed -i 1d "$HERE/$1"; }
case "$4" in
  list) state="$(next states)"; [[ "$state" == MISSING ]] || echo "my-pod,$state" ;;
  ssh) [[ "$*" != *--multiprocess* ]] || exit "$(next codes)" ;;
  scp) exit "${SCP:-0}" ;;
esac
"""
READY = ["READY"] * 9


@pytest.fixture
def pod(stubs):
    """Runs a command on a TPU; gives the result, the kinds of gcloud's calls, and the calls."""
    make, calls = stubs

    def start(states, codes, *options, **variables):
        environment = make(gcloud=GCLOUD)
        for name, values in {"states": states, "codes": codes}.items():
            (Path(environment["HERE"]) / name).write_text("".join(f"{v}\n" for v in values))
        result = launch(*POD, *options, "--", *TRAIN, **environment, **variables)
        kinds = []
        for call in calls():
            kind = call.split()[4]  # gcloud compute tpus tpu-vm KIND
            kinds.append("run" if kind == "ssh" and "--multiprocess" in call else kind)
        return result, [kind for kind in kinds if kind != "list"], calls()

    return start


@pytest.mark.parametrize("engine", ["--engine=t5x", "--engine t5x"])
def test_a_bucket_is_for_t5x(engine):
    command = ["train", "--gin.MODEL_DIR=gs://bucket/a", *engine.split()]
    for script in ([*POD, "--dry-run", "--"], [*SLURM, "--dry-run"]):
        result = launch(*script, *command, PYTHON=sys.executable)
        assert (result.returncode, result.stderr) == (0, "")


def test_the_pod_is_created_installed_and_started(pod):
    result, kinds, calls = pod(["MISSING", "MISSING"], [0], "--spot", "--delete")
    assert result.returncode == 0, result.stderr
    assert kinds == ["create", "scp", "ssh", "run", "delete"]
    assert all("--zone z" in call for call in calls)
    assert "--accelerator-type v4-32" in calls[2] and "--spot" in calls[2]
    assert all("--worker=all" in call for call in calls if " ssh " in call or " scp " in call)


INSTALL = ["scp", "ssh"]
WAITS = ["CREATING", "STOPPED"]
# Waiting is not an attempt, and deletes nothing.
WAITED = ["READY", *WAITS, "READY", "READY", *WAITS, "CREATING", *READY]
PREEMPTED = ["READY", "READY", "PREEMPTED", "PREEMPTED", "READY"]
RENEWED = [*INSTALL, "run", "delete", "create", *INSTALL, "run"]


@pytest.mark.parametrize(("states", "codes", "options", "code", "kinds", "message"), [
    (READY, [75, 0], "", 0, [*INSTALL, "run", "run"], "attempt 2 of 20"),  # no new TPU
    (READY, [137, 0], "", 0, [*INSTALL, "run", "run"], "attempt 2 of 20"),
    (READY, [2, 0], "", 2, [*INSTALL, "run"], "giving up with exit code 2"),
    (READY, [134, 75], "--attempts 2", 75, [*INSTALL, "run", "run"], "giving up with"),
    (PREEMPTED, [255, 0], "", 0, RENEWED, "attempt 2 of 20"),
    (WAITED, [75, 0], "--waits 2 --attempts 2", 75, [*INSTALL, "run"], "waiting 2 times in a row"),
])  # fmt: skip
def test_a_loss_is_tried_again_but_no_error(states, codes, options, code, kinds, message, pod):
    result, done, calls = pod(states, codes, *options.split())
    assert (result.returncode, done) == (code, kinds) and message in result.stderr
    assert len({call for call in calls if "--multiprocess" in call}) == 1


def test_the_setup_runs_on_all_workers_after_an_installation_which_is_an_attempt(pod):
    result, kinds, calls = pod(READY, [75, 0], "--setup", "mount /mnt/runs")
    assert (result.returncode, kinds) == (0, [*INSTALL, "ssh", "run", "run"])
    setup = calls[4]  # after two lists, the copy and the installation
    assert "--worker=all" in setup and shlex.split(setup)[-3] == "mount /mnt/runs"
    result, kinds, _ = pod(READY, [], "--attempts", "2", SCP="1")
    assert result.returncode == 255 and kinds[5:] == ["scp", "scp"]


# launch/gke_jobset.yaml

JOBSET = (ROOT / "launch" / "gke_jobset.yaml").read_text()


@pytest.mark.parametrize("missing", ["", "NODES", "CHIPS_PER_NODE"])
def test_the_jobsets_commands_stop_where_a_variable_is_missing(missing, stubs):
    """Those of its header, as a user would paste them."""
    make, calls = stubs
    environment = make(envsubst='printf %s "$1" >"$HERE/named"; cat', kubectl="cat >/dev/null")
    lines = [line[1:].strip() for line in JOBSET.partition("# The line with")[0].splitlines()]
    exports, start = "\n".join(lines[2:]).split("\nV=")
    script = f"{exports}\nunset {missing}\nV={start}"
    result = run(["bash", "-c", script], environment, cwd=ROOT)
    applied = [call for call in calls() if call.startswith("kubectl apply")]
    assert bool(applied) == (not missing) and missing in result.stderr, result.stderr
    if not missing:
        named = (Path(environment["HERE"]) / "named").read_text().split()
        variables = set(re.findall(r"\$\{\w+\}", JOBSET.partition("apiVersion:")[2]))
        assert {f"${{{name[1:]}}}" for name in named} == variables


@pytest.fixture(params=["tpu", "gpu"])
def jobset(request):
    """The kind of a JobSet, its spec, that of its job, and that of the job's pods."""
    values = dict.fromkeys(("NODES", "CHIPS_PER_NODE", "GPUS_PER_NODE"), "4")
    values |= {"CLAIM": "runs", "COMMAND": "train --gin.A=1"}
    text = string.Template(JOBSET).safe_substitute(values)
    by_kind = {job["metadata"]["labels"]["accelerator"]: job for job in yaml.safe_load_all(text)}
    assert by_kind.keys() == {"tpu", "gpu"}
    spec = by_kind[request.param]["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    return request.param, spec, job, job["template"]["spec"]


def test_the_pods_get_their_place_and_the_folder_of_the_runs(jobset):
    kind, spec, job, pods = jobset
    assert job["completions"] == job["parallelism"] == 4
    assert job["completionMode"] == "Indexed"  # gives JOB_COMPLETION_INDEX
    assert spec["failurePolicy"]["maxRestarts"] > 0
    [container] = pods["containers"]
    assert ("--multiprocess" in container["command"][2]) == (kind == "tpu")
    assert ("-workers-0-0." in container["command"][2]) == (kind == "gpu")
    volumes = {volume["name"]: volume for volume in pods["volumes"]}
    assert volumes["runs"]["persistentVolumeClaim"]["claimName"] == "runs"
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts.keys() == volumes.keys() and mounts["runs"] == "/runs"


def test_a_pod_passes_sigterm_on_keeps_the_exit_code_and_prints_the_last_lines(jobset, stubs):
    (kind, _, _, pods), (make, calls) = jobset, stubs
    command = pods["containers"][0]["command"]
    environment = make(python=SAVES) | {"JOB_COMPLETION_INDEX": "3"}
    assert terminated(command, environment) == (143, "saved\n")
    [call] = calls()
    assert call.startswith("python -m variator_jax train --") and call.endswith(" --gin.A=1 ")
    assert kind == "tpu" or "--process_count=4 --process_index=3" in call
    # As in a container: with the end of the first process of a namespace, all others are killed.
    first = ["unshare", "--user", "--map-root-user", "--pid", "--fork"]
    if run([*first, "true"], {}).returncode:
        pytest.skip("this machine allows no namespaces")
    make(python=OUTLIVED)
    result = run([*first, *command], environment)
    assert (result.returncode, result.stdout) == (75, "the last lines\n")
