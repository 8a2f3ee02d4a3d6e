"""Differences to the teacher, example by example."""

import math

import numpy as np

from variator_jax.experiment.paired import CHOSEN, JUDGED, paired_gaps, paired_table, sizes_table


def _cell(arm, seed, pair, name):
    scores = {"docs_pair": pair, "docs_name": name}
    costs = {"flops_saved": 0.7, "extra_parameters": 1200}
    place = {"backbone": "nano", "task": "docs", "ratio": 1 if arm == "backbone" else 4}
    place["sites"] = "" if arm == "backbone" else "span all x4"
    return {**place, "arm": arm, "seed": seed, "labelled": ["docs_pair"], "scores": scores, **costs}


TEACHER = [100.0, 100.0, 100.0, 0.0]
CELLS = [
    _cell("backbone", 0, TEACHER, [50.0, 50.0]),
    _cell("backbone", 1, TEACHER, [50.0, 50.0]),
    _cell("span_x4", 0, [100.0, 0.0, 100.0, 0.0], [50.0, 20.0]),
    _cell("span_x4", 1, [100.0, 0.0, 0.0, 0.0], [50.0, 40.0]),
]


def test_gaps_are_paired_and_their_errors_are_of_examples_and_seeds():
    gaps = paired_gaps(CELLS).set_index("measure")
    expected = {"docs_pair": 37.5, "docs_name": 10.0, CHOSEN: 50.0, JUDGED: 25.0}
    assert gaps["gap"].to_dict() == expected
    examples = np.var([0.0, 100.0, 50.0, 0.0], ddof=1) / 4
    seeds = np.var([25.0, 50.0], ddof=1) / 2
    np.testing.assert_allclose(gaps["error"]["docs_pair"], math.sqrt(examples + seeds))
    assert set(gaps["seeds"]) == {2}
    one = paired_gaps(CELLS[::2]).set_index("measure")  # one seed: the examples' error alone
    np.testing.assert_allclose(one["error"]["docs_pair"], math.sqrt(100**2 * 0.25 / 4))


def test_the_tasks_of_an_experiment_are_paired_each_with_its_own_and_averaged():
    others = [
        {**cell, "task": "other", "labelled": ["cr"], "scores": {"cr": scores}, "flops_saved": 0.5}
        for cell, scores in zip(CELLS, [TEACHER, TEACHER, [100.0, 0, 0, 0], [0] * 4], strict=True)
    ]
    gaps = paired_gaps([*CELLS, *others]).set_index("measure")
    assert gaps["gap"]["docs_pair"] == 37.5
    assert gaps["gap"]["cr"] == 62.5
    assert gaps["gap"][CHOSEN] == (50.0 + 75.0) / 2 and gaps["gap"][JUDGED] == (25.0 + 50.0) / 2
    assert set(gaps["seeds"]) == {2}
    np.testing.assert_allclose(gaps["flops_saved"], 0.6)
    alone = [{**cell, "task": "docs_pair", "scores": {"docs_pair": TEACHER}} for cell in CELLS]
    shared = paired_gaps([*CELLS, *alone]).set_index("measure")["gap"]  # a task and a mixture of it
    assert shared["docs_pair"] == 37.5 and shared["docs_pair docs_pair"] == 0


def test_a_line_of_the_table_has_every_gap_with_its_error_and_the_costs():
    header, _, line = paired_table(paired_gaps(CELLS)).splitlines()
    assert [cell.strip() for cell in header.split("|")[1:5]] == ["arm", "sites", "k", "seeds"]
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[:6] == ["span_x4", "span all x4", "4", "2", "+37.5 ± 27.0", "+10.0 ± 11.2"]
    assert cells[-2:] == ["70.0 %", "1,200"]


def test_plugins_of_all_layers_are_costed_on_published_sizes():
    sites = ["span all x4 size=1 rank=16", "span 1-2 x4", ""]
    cells = [_cell(f"arm_{i}", 0, TEACHER, []) | {"sites": words} for i, words in enumerate(sites)]
    (line,) = sizes_table(cells).splitlines()[2:]  # figures as `train --dry_run` prints them
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[:3] == ["arm_0", "4", sites[0]]
    assert cells[3] == "73.7 %, 1.91 %" and cells[-1] == "74.7 %, 0.45 %"
    assert sizes_table(CELLS[:2]) == ""


def test_cells_without_the_scores_of_their_examples_are_left_out():
    old = {name: value for name, value in CELLS[0].items() if name != "scores"}
    gaps = paired_gaps([old, *CELLS[2:3]])
    assert gaps.empty and paired_table(gaps) == ""
