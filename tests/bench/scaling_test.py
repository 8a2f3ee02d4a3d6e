"""Predictions from counted figures: their arithmetic, their table and their plot."""

import dataclasses
import json

import pytest

from variator_jax.bench import scaling
from variator_jax.errors import ConfigError

MACHINE = scaling.Machine("m", peak=2e12, link=1e9, far_link=1e8, near=4, memory=16e9)


def row(devices, mesh=(1, 1, 1), **collectives):
    kinds = {name.replace("_", "-"): size for name, size in collectives.items()}
    return scaling.Row("t5_1_1_xl", devices, mesh, 2**30, 1e12, kinds)


def test_a_ring_sends_a_reduced_array_twice_and_a_gathered_one_once():
    computing, exchanging = row(4, all_reduce=1e9, all_gather=1e9).seconds(MACHINE)
    assert computing == pytest.approx(1e12 / (2e12 * scaling.UTILISATION))
    assert exchanging == pytest.approx(0.75 * 3e9 / 1e9)


def test_beyond_the_fast_links_the_slow_one_counts():
    assert row(8, all_gather=1e9).seconds(MACHINE)[1] == pytest.approx(0.875 * 1e9 / 1e8)
    assert row(1).efficiency(MACHINE) == 1.0


def test_a_reduce_scatter_goes_round_whole_and_leaves_a_part():
    assert row(4, reduce_scatter=1e9).seconds(MACHINE)[1] == pytest.approx(0.75 * 4e9 / 1e9)


def test_the_speeds_are_those_of_rings_and_not_of_all_links():
    v4, v5e, h200 = scaling.MACHINES
    assert v4.link == v4.far_link == v5e.link == v5e.far_link == 2 * 50e9
    # A ring over nodes runs over all their network cards, and slower than within a node.
    assert 50e9 < h200.far_link < h200.link


@pytest.mark.parametrize(("arguments", "crowded"), [(7.9e9, False), (8.1e9, True)])
def test_too_large_is_what_leaves_activations_less_than_half(monkeypatch, arguments, crowded):
    monkeypatch.setattr(scaling, "MACHINES", (MACHINE,))
    text = scaling.table([dataclasses.replace(row(1), arguments=int(arguments))])
    assert ("(too large)" in text) == crowded


def test_xxl_is_too_large_for_a_v4_as_its_budget_says():
    """20.73 GiB lie there, and a step needs 10.50 on top (docs/scaling.md)."""
    v4 = scaling.MACHINES[0]
    assert (20.73 + 10.50) * 2**30 > v4.memory and 20.73 * 2**30 > scaling.FILLED * v4.memory


def test_counted_figures_give_new_predictions(tmp_path, capsys):
    rows = [row(1), row(2, (1, 2, 1), all_gather=2**20), row(4, (1, 4, 1), all_gather=2**20)]
    file = tmp_path / "scaling.json"
    file.write_text(json.dumps([dataclasses.asdict(r) for r in rows]))
    assert scaling.read_rows(file, ["t5_1_1_xl"], [1, 2]) == rows[:2]
    output = tmp_path / "again"
    scaling.main(["--output", str(output), "--counted", str(file), "--devices", "2,4"])
    assert (output / "scaling.md").read_text() == scaling.table(rows[1:])
    assert (output / "scaling.png").is_file()
    for text in ("", "[{}]", "3"):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ConfigError, match="is no scaling.json"):
            scaling.read_rows(tmp_path / "bad.json", ["t5_1_1_xl"], [1])
    with pytest.raises(SystemExit):
        scaling.main(["--output", str(output), "--counted", str(file), "--sizes", "t5_1_1_xxl"])
    assert "has no row of ['t5_1_1_xxl']" in capsys.readouterr().err


def test_the_meshes_are_copies_and_cut_weights():
    assert scaling.meshes(1) == [(1, 1, 1)]
    assert scaling.meshes(8) == [(8, 1, 1), (1, 8, 1)]


def test_the_table_and_the_plot(tmp_path):
    rows = [row(1), row(2, (2, 1, 1), all_reduce=2**20), row(2, (1, 2, 1), all_gather=2**20)]
    text = scaling.table(rows)
    assert "all-reduce 1 MiB" in text and "| 1 x 2 x 1 |" in text and text.count("\n") == 5
    scaling.plot(rows, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
