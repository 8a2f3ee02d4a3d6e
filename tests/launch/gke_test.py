"""launch/gke_jobset.yaml: its commands, and what its pods run."""

import re
from pathlib import Path

import pytest
import yaml
from launching import OUTLIVED, ROOT, SAVES, run, terminated

JOBSET = (ROOT / "launch" / "gke_jobset.yaml").read_text()


@pytest.mark.parametrize("missing", ["", "NODES", "IMAGE", "CHIPS_PER_NODE"])
def test_the_jobsets_commands_stop_where_a_variable_is_missing(missing, stubs):
    """Those of its header, as a user would paste them."""
    make, calls = stubs
    environment = make(envsubst='printf %s "$1" >"$HERE/named"; cat', kubectl="cat >/dev/null")
    lines = [line[1:].strip() for line in JOBSET.partition("# The line with")[0].splitlines()]
    exports, start = "\n".join(lines[2:]).split("\nV=")
    script = f"{exports}\nunset {missing}\nV={start}"
    result = run(["bash", "-c", script], environment, cwd=ROOT)
    applied = [call for call in calls() if call.startswith("kubectl apply")]
    assert bool(applied) == (not missing), result.stderr
    assert missing in result.stderr
    if not missing:
        named = (Path(environment["HERE"]) / "named").read_text()
        variables = set(re.findall(r"\$\{(\w+)\}", JOBSET.partition("apiVersion:")[2]))
        assert {name[1:] for name in named.split()} == variables
        docs = (ROOT / "docs" / "multi_host.md").read_text().split("V='")[1].partition("'")[0]
        assert docs.split() == named.split()


def jobset(kind):
    text = JOBSET
    values = dict.fromkeys(("NODES", "CHIPS_PER_NODE", "GPUS_PER_NODE"), "4")
    values |= {"CLAIM": "runs", "NAME": "x", "COMMAND": "train --gin.A=1"}
    for name, value in values.items():
        text = text.replace(f"${{{name}}}", value)
    by_kind = {job["metadata"]["labels"]["accelerator"]: job for job in yaml.safe_load_all(text)}
    assert by_kind.keys() == {"tpu", "gpu"}
    return by_kind[kind]["spec"]


def pod(kind):
    return jobset(kind)["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


@pytest.mark.parametrize("kind", ["tpu", "gpu"])
def test_the_pods_get_their_place_and_the_folder_of_the_runs(kind):
    spec = jobset(kind)["replicatedJobs"][0]["template"]["spec"]
    assert spec["completions"] == spec["parallelism"] == 4
    assert spec["completionMode"] == "Indexed"  # gives JOB_COMPLETION_INDEX
    assert jobset(kind)["failurePolicy"]["maxRestarts"] > 0
    [container] = pod(kind)["containers"]
    script = container["command"][2]
    assert ("--multiprocess" in script) == (kind == "tpu")
    assert ("-workers-0-0." in script and "JOB_COMPLETION_INDEX" in script) == (kind == "gpu")
    volumes = {volume["name"]: volume for volume in pod(kind)["volumes"]}
    assert volumes["runs"]["persistentVolumeClaim"]["claimName"] == "runs"
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts.keys() == volumes.keys() and mounts["runs"] == "/runs"


@pytest.mark.parametrize("kind", ["tpu", "gpu"])
def test_a_pod_passes_sigterm_on_and_keeps_the_exit_code(stubs, kind):
    make, calls = stubs
    environment = make(python=SAVES) | {"JOB_COMPLETION_INDEX": "3"}
    assert terminated(pod(kind)["containers"][0]["command"], environment) == (143, "saved\n")
    [call] = calls()
    assert call.startswith("python -m variator_jax train --") and call.endswith(" --gin.A=1 ")
    assert kind == "tpu" or "--process_count=4 --process_index=3" in call


@pytest.mark.parametrize("kind", ["tpu", "gpu"])
def test_what_outlives_the_command_of_a_pod_can_write_its_last_lines(stubs, kind):
    # As in a container: with the end of the first process of a namespace, all others are killed.
    first = ["unshare", "--user", "--map-root-user", "--pid", "--fork"]
    if run([*first, "true"], {}).returncode:
        pytest.skip("this machine allows no namespaces")
    make, _ = stubs
    environment = make(python=OUTLIVED) | {"JOB_COMPLETION_INDEX": "3"}
    command = [*first, *pod(kind)["containers"][0]["command"]]
    result = run(command, environment)
    assert (result.returncode, result.stdout) == (75, "the last lines\n")
