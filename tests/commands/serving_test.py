"""`variator serve` as a process: it starts, drains on SIGTERM, and refuses what it cannot serve."""

import concurrent.futures
import re
import signal
import socket
import subprocess
import sys
import time

import httpx
import launching
import pytest
import served

from variator_jax import cli
from variator_jax.commands import serving
from variator_jax.errors import ConfigError
from variator_jax.store import save_backbone, save_plugins


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A backbone, its plugins and a file of tasks."""
    folder = tmp_path_factory.mktemp("served")
    save_backbone(folder / "backbone", served.BACKBONE.config, served.BACKBONE.params)
    save_plugins(folder / "plugins", {4: served.PLUGIN}, served.BACKBONE)
    (folder / "tasks.json").write_text('[{"name": "embed", "kind": "embed"}]')
    return folder


def start(folder, *more, **environment):
    """The process and the address that it prints."""
    given = "--backbone backbone --plugins plugins --tasks tasks.json --max_length 16 --port 0"
    command = [sys.executable, "-m", "variator_jax", "serve", *given.split(), *more]
    options = {"env": launching.child(**environment), "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=folder, **options)
    return process, re.search(r"http://\S+", process.stdout.readline())[0]


def test_sigterm_answers_what_was_accepted_and_exits_with_0(folder):
    process, url = start(folder, "--name", "tiny", "--slo_ms", "60000", VARIATOR_TOKEN="secret\n")
    try:
        while httpx.get(f"{url}/health", timeout=60).status_code != 200:
            time.sleep(0.1)
        client = httpx.Client(base_url=url, headers={"authorization": "Bearer secret"}, timeout=60)
        assert client.get("/info").json()["model_id"] == "tiny"
        assert httpx.get(f"{url}/info", timeout=60).status_code == 401
        body = {"inputs": [f"text {i}" for i in range(2000)]}
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            waiting = [pool.submit(client.post, "/embed", json=body) for _ in range(8)]
            while client.get("/stats").json()["requests"] < 8 and not waiting[0].done():
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            assert not all(one.done() for one in waiting)
            assert [one.result().status_code for one in waiting] == [200] * 8
        assert process.wait(120) == 0
    finally:
        process.kill()


def test_a_taken_port_and_a_missing_result_are_errors_in_words(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    taken, backbone = socket.create_server(("127.0.0.1", 0)), "--backbone=backbone"

    def refusal(*arguments):
        assert cli.main(["serve", *arguments]) == 2
        return capsys.readouterr().err

    assert "cannot be bound" in refusal(backbone, f"--port={taken.getsockname()[1]}")
    assert "launch/quickstart.sh" in refusal()
    (folder / "wrong.json").write_text('[{"name": "x", "kind": "embed", "promt": "{text}"}]')
    assert "Did you mean 'prompt'?" in refusal(backbone, "--tasks=wrong.json")
    for name in ("--max_rows", "--max_length"):
        expected = f"{name}: expected a positive number, found '-1'"
        assert expected in refusal(backbone, f"{name}=-1")
    monkeypatch.setenv("VARIATOR_TOKEN", " ")
    assert "VARIATOR_TOKEN is set, but empty" in refusal(backbone)


TASKS = {
    "[": "Invalid JSON",
    "{}": "valid array; found {}",
    "[]": "no tasks",
    '[{"kind": "embed"}]': "name: Field required",
    '[{"name": " ", "kind": "embed"}]': "empty name",
    '[{"name": "a", "kind": "classify", "labels": "ab"}]': "labels: .* found 'ab'",
    '[{"name": "a", "kind": "generate", "max_length": "3"}]': "max_length: .*; found '3'",
    '[{"name": "a", "kind": "generate", "num_beams": true}]': "num_beams: .*; found True",
    '[{"name": "a", "kind": "embed", "prompt": "{}"}]': "no names; expected such as {text}",
    '[{"name": "a", "kind": "embed", "prompt": "{a.b}"}]': "no names; expected such as {text}",
}


@pytest.mark.parametrize("written", TASKS)
def test_files_of_tasks_that_cannot_be_served_are_refused_in_words(tmp_path, written):
    (tmp_path / "tasks.json").write_text(written)
    with pytest.raises(ConfigError, match=f"tasks.json.*{TASKS[written]}"):
        serving.read_tasks(tmp_path / "tasks.json")
