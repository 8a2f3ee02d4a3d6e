"""Predictions from counted figures: their arithmetic, their table and their plot."""

import pytest

from variator_jax.bench import scaling

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


def test_the_meshes_are_copies_and_cut_weights():
    assert scaling.meshes(1) == [(1, 1, 1)]
    assert scaling.meshes(8) == [(8, 1, 1), (1, 8, 1)]


def test_the_table_and_the_plot(tmp_path):
    rows = [row(1), row(2, (2, 1, 1), all_reduce=2**20), row(2, (1, 2, 1), all_gather=2**20)]
    text = scaling.table(rows)
    assert "all-reduce 1 MiB" in text and "| 1 x 2 x 1 |" in text and text.count("\n") == 5
    scaling.plot(rows, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
