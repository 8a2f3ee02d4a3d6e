"""Predictions from counted figures: their arithmetic, their table and their plot."""

import dataclasses
import json

import pytest

from variator_jax.bench import budget, scaling
from variator_jax.errors import ConfigError

MACHINE = scaling.Machine("m", peak=2e12, link=1e9, far_link=1e8, near=4, memory=16e9)


def row(devices, mesh=(1, 1, 1), **collectives):
    kinds = {name.replace("_", "-"): size for name, size in collectives.items()}
    return scaling.Row("t5_1_1_xl", devices, mesh, 2**30, 1e12, kinds)


@pytest.mark.parametrize(("counted", "exchanging"), [
    # A ring sends a reduced array twice and a gathered one once.
    (row(4, all_reduce=1e9, all_gather=1e9), 0.75 * 3e9 / 1e9),
    # What is reduced and scattered goes round as a whole and leaves a part.
    (row(4, reduce_scatter=1e9), 0.75 * 4e9 / 1e9),
    # Beyond the fast links the slow one counts.
    (row(8, all_gather=1e9), 0.875 * 1e9 / 1e8),
    (row(1), 0.0),
])  # fmt: skip
def test_predicted_seconds(counted, exchanging):
    computing = 1e12 / (2e12 * scaling.UTILISATION)
    assert counted.seconds(MACHINE) == pytest.approx((computing, exchanging))
    assert counted.efficiency(MACHINE) == pytest.approx(computing / (computing + exchanging))


def test_counted_figures_give_new_predictions(tmp_path, capsys):
    rows = [row(1), row(2, (1, 2, 1), all_gather=2**20), row(4, (1, 4, 1), all_gather=2**20)]
    file = tmp_path / "scaling.json"
    file.write_text(json.dumps([dataclasses.asdict(r) for r in rows]))
    output = tmp_path / "again"
    scaling.main(["--output", str(output), "--counted", str(file), "--devices", "2,4"])
    assert scaling.read_rows(output / "scaling.json", ["t5_1_1_xl"], [1, 2, 4]) == rows[1:]
    assert (output / "scaling.md").read_text() == scaling.table(rows[1:])
    assert (output / "scaling.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        scaling.main(["--output", str(output), "--counted", str(file), "--sizes", "t5_1_1_xxl"])
    assert "has no row of ['t5_1_1_xxl']" in capsys.readouterr().err
    file.write_text("[{}]")
    with pytest.raises(ConfigError, match="is not a scaling.json"):
        scaling.read_rows(file, ["t5_1_1_xl"], [1])


def test_stacks_of_two_depths_are_not_counted_as_if_they_had_one():
    with pytest.raises(ConfigError, match="byt5_small is not counted: its two stacks"):
        scaling.measure("byt5_small", 1, (1, 1, 1))


def test_the_table_has_a_line_a_mesh_and_marks_what_is_too_large(monkeypatch):
    assert scaling.meshes(1) == [(1, 1, 1)] and scaling.meshes(8) == [(8, 1, 1), (1, 8, 1)]
    monkeypatch.setattr(scaling, "MACHINES", (MACHINE,))
    small = dataclasses.replace(row(2, (2, 1, 1), all_reduce=2**20), arguments=7.9e9)
    rows = [small, dataclasses.replace(row(2, (1, 2, 1)), arguments=8.1e9)]
    _, _, fits, large = scaling.table(rows).splitlines()
    assert "all-reduce 1 MiB" in fits and "(too large)" not in fits
    assert "| 1 x 2 x 1 |" in large and "nothing" in large and "(too large)" in large


def test_layers_are_extended_from_two_depths(monkeypatch):
    def counted(backbone, **settings):
        assert settings["batch_size"] == scaling.ROWS and settings["remat"]
        layers = backbone.num_encoder_layers
        assert layers == backbone.num_decoder_layers
        moved = {"all-gather": budget.Collective(1, 10 * layers)}
        return budget.Budget("", "", "", 100 + layers, 0, 1000.0 * layers, moved)

    monkeypatch.setattr(scaling, "budget", counted)
    measured = scaling.measure("t5_1_1_xl", 1, (1, 1, 1))
    assert (measured.arguments, measured.flops) == (124, 24000.0)
    assert measured.collectives == {"all-gather": 240}
