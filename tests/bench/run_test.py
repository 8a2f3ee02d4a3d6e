"""The command: its arguments, and a whole run where torch and matplotlib are missing."""

import argparse
import json
import re
import sys

import jax
import numpy as np
import pytest

from variator_jax import cli
from variator_jax.backbones.t5 import get_config, shape_params
from variator_jax.bench import arguments, latency, run
from variator_jax.bench.arguments import BenchSettings, Shape
from variator_jax.errors import ConfigError

COMMAND = "bench --backbone nano --shape 2x8 --ratios 2 --rounds 2 --targets 4 --train --peer"


def test_it_runs_without_torch_and_matplotlib(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(latency, "matrix_size", lambda: 32)
    for package in ("matplotlib", "torch", "transformers"):
        monkeypatch.setitem(sys.modules, package, None)
    assert cli.main([*COMMAND.split(), "--output", str(tmp_path / "out")]) == 0
    out, err = capsys.readouterr()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"bench.json", "bench.md"}
    assert "no plot: matplotlib is not installed" in err
    encoders, steps = json.loads((tmp_path / "out/bench.json").read_text())["measurements"]
    assert [row["ratio"] for row in encoders["rows"]] == [1, 2, None, None]
    assert [row["ratio"] for row in steps["rows"]] == [2]
    # Both baselines are missing, and both are named with the reason.
    assert out.count("did not run: ModuleNotFoundError: import of torch") == 2
    assert out.rstrip().endswith((tmp_path / "out/bench.md").read_text().rstrip())


def test_a_step_is_timed_with_its_flops_and_memory(monkeypatch):
    config = get_config("nano", num_encoder_layers=1)
    params = latency.random_params(config, shape_params(config))
    before = jax.tree.map(np.array, params)
    monkeypatch.setattr(latency, "matrix_size", lambda: 32)
    details = {"targets": 4, "microbatches": 2, "remat": True}
    settings = BenchSettings(ratios=(2, 4), rounds=2, train=True, **details)
    marks = iter([60, 70, 70, 70])  # of the device: the second step does not raise its mark
    monkeypatch.setattr(run, "device_peak", lambda device: next(marks))
    result = run.bench_steps(config, params, Shape(4, 16), settings)
    two, row = result.rows
    assert (two.ratio, two.peak_bytes) == (2, 70)
    assert row.ratio == 4 and len(row.seconds) == len(result.peak.seconds) == 2
    assert np.isfinite(row.loss) and row.loss > 0 and row.flops > 0
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params["encoder"]))
    assert row.peak_bytes > weights  # by the compiler's analysis
    assert result.details == details
    jax.tree.map(np.testing.assert_array_equal, params, before)


def test_a_device_that_runs_out_of_memory_is_reported_with_advice(monkeypatch):
    def measure(settings):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(run, "measure", measure)
    with pytest.raises(ConfigError, match="smaller batch: RESOURCE_EXHAUSTED: Out of memory"):
        run.run(BenchSettings())


def test_an_output_that_cannot_be_written_is_refused_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "measure", lambda settings: pytest.fail("measured"))
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        assert cli.main(["bench", "--output", str(output)]) == 2
        error = capsys.readouterr().err
        assert f"{output} cannot be written into" in error and error.count("\n") == 1


@pytest.mark.parametrize(("command", "expected"), [
    ("", {}),
    ("--ratios 8,2 --rounds 3 --peer", {"ratios": (1, 2, 8), "rounds": 3, "peer": True}),
    ("--batch 2 --length 96 --dtype float16", {"shapes": (Shape(2, 96),), "dtype": "float16"}),
    ("--shape 4x256 --shape 1x5 --shape 4x256", {"shapes": (Shape(4, 256), Shape(1, 5))}),
    ("--train --remat --microbatches 2", {"train": True, "remat": True, "microbatches": 2}),
    ("--train --remat dots --targets 8", {"train": True, "remat": "dots", "targets": 8}),
])  # fmt: skip
def test_settings(command, expected):
    parser = argparse.ArgumentParser()
    arguments.add_arguments(parser)
    settings = arguments.settings_of(parser.parse_args(command.split()))
    assert settings == BenchSettings(**expected)
    assert settings.config.dtype == settings.config.param_dtype == settings.dtype


REFUSED = {
    "--backbone t5_1_0_bse": "Did you mean 't5_1_0_base'",
    "--dtype bfloat61": "choose from .*bfloat16",
    "--shape 4*256": "rows x tokens, such as 4x256",
    "--shape 4x256 --batch 4": "one or the other",
    "--ratios 1,four": "expected a positive number, found 'four'",
    "--ratios 1 --train": "2 or more among --ratios",
    "--remat": "--remat belongs to the distillation step: add --train",
    "--train --shape 4x256 --shape 1x256 --microbatches 2": "batch of 1 does not divide into 2",
}


@pytest.mark.parametrize("command", REFUSED)
def test_refusals_are_one_line(command, capsys):
    assert cli.main(["bench", *command.split()]) == 2
    *_, error = capsys.readouterr().err.splitlines()  # perhaps behind what was measured first
    assert re.search(f"^variator: error: .*{REFUSED[command]}", error), error
