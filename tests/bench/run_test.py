"""The whole command, on a machine that has neither TensorFlow nor gin, torch or matplotlib."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from variator_jax import cli
from variator_jax.bench import encoder, results, run, train_step

ROOT = Path(__file__).parents[2]

BARE = """
import sys

BLOCKED = {"airio", "clu", "matplotlib", "seqio", "t5", "t5x", "tensorflow",
           "tensorflow_datasets", "tensorflow_text", "torch", "transformers"}

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Block())
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in BLOCKED else find(name, *rest)

from variator_jax import cli
from variator_jax.bench import encoder, train_step
encoder.matrix_size = train_step.matrix_size = lambda: 32
sys.exit(cli.main(sys.argv[1:]))
"""
ARGUMENTS = "bench --backbone nano --shape 2x8 --ratios 2 --rounds 2 --targets 4 --train --peer"


def test_it_runs_where_only_jax_and_its_kin_are(tmp_path):
    program = [sys.executable, "-c", BARE, *ARGUMENTS.split(), "--output", str(tmp_path / "out")]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"bench.json", "bench.md"}
    assert "no plot: matplotlib is not installed" in result.stderr
    found = results.from_json(json.loads((tmp_path / "out/bench.json").read_text()))
    assert [row.ratio for row in found.encoder[0].ratios] == [1, 2]
    assert [row.ratio for row in found.steps[0].rows] == [2]
    # Both peers are missing, and both are named with the reason.
    assert [peer.seconds for peer in found.encoder[0].peers] == [(), ()]
    assert result.stdout.count("did not run: ModuleNotFoundError: No module named 'torch'") == 2
    assert (tmp_path / "out/bench.md").read_text().rstrip() == result.stdout.rstrip()


def test_the_command_hands_everything_over(monkeypatch):
    handed = []
    monkeypatch.setattr(run, "run", lambda settings, output: handed.append((settings, output)))
    assert cli.main([*ARGUMENTS.split(), "--output", "there"]) == 0
    ((settings, output),) = handed
    assert output == "there" and settings.peer and settings.step.targets == 4


def test_a_file_in_the_place_of_the_folder_is_told_before_measuring(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "measure", lambda settings: pytest.fail("measured"))
    (tmp_path / "file").write_text("")
    assert cli.main(["bench", "--output", str(tmp_path / "file")]) == 2
    assert "is a file; it is the folder to write into" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_told_before_measuring(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "measure", lambda settings: pytest.fail("measured"))
    (tmp_path / "file").write_text("")
    assert cli.main(["bench", "--output", str(tmp_path / "file" / "below")]) == 2
    error = capsys.readouterr().err
    assert "below cannot be written" in error and error.count("\n") == 1


def test_a_folder_that_takes_no_file_is_told_before_measuring(tmp_path, monkeypatch, capsys):
    def refuse(**where):
        raise PermissionError(13, "Permission denied", where["dir"])

    monkeypatch.setattr(run, "measure", lambda settings: pytest.fail("measured"))
    monkeypatch.setattr(run.tempfile, "TemporaryFile", refuse)
    assert cli.main(["bench", "--output", str(tmp_path)]) == 2
    assert "cannot be written: [Errno 13] Permission denied" in capsys.readouterr().err


def test_a_disk_that_fills_up_while_measuring_is_told_in_one_line(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run, "measure", lambda settings: None)
    monkeypatch.setattr(run, "bench_markdown", lambda result: "the table")
    monkeypatch.setattr(run, "_write", refuse)
    assert cli.main(["bench", "--output", str(tmp_path)]) == 2
    out, error = capsys.readouterr()
    assert out == "the table\n" and "No space left on device" in error and error.count("\n") == 1


def test_steps_are_measured_before_encoders(monkeypatch):
    order = []
    monkeypatch.setattr(train_step, "random_whole", lambda config: None)
    monkeypatch.setattr(encoder, "random_encoder", lambda config: None)
    monkeypatch.setattr(train_step, "bench_steps", lambda *a: order.append("step"))
    monkeypatch.setattr(encoder, "bench_encoder", lambda *a: order.append("encoder"))
    run.measure(run.BenchSettings("nano", ratios=(2,), step=train_step.StepSettings()))
    assert order == ["step", "encoder"]
