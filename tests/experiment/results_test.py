import csv
import json
import math

import pytest

from variator_jax.experiment import tables
from variator_jax.experiment.results import MEAN, mean_std, rows, write_rows


def _record(task, arm, ratio, seed, score, **details):
    return {
        "backbone": "nano",
        "task": task,
        "arm": arm,
        "ratio": ratio,
        "seed": seed,
        "score": score,
        "details": details,
        "examples": 100,
        "majority": 50.0,
        "flops_saved": 0.0 if ratio == 1 else 0.4,
        "extra_parameters": 0 if ratio == 1 else 100,
        "extra_parameters_share": 0.0 if ratio == 1 else 0.01,
        "parameters": 10_000,
    }


RECORDS = [
    _record("sst2", "backbone", 1, 0, 80.0),
    _record("sst2", "backbone", 1, 1, 84.0),
    _record("sst2", "variator", 4, 0, 79.0),
    _record("sst2", "variator", 4, 1, 81.0),
    _record("mrpc", "backbone", 1, 0, 70.0, f1=82.0),
    _record("mrpc", "backbone", 1, 1, 72.0, f1=80.0),
    _record("mrpc", "variator", 4, 0, 70.0, f1=81.0),
]
LATENCY = [
    {
        "backbone": "nano", "arm": "variator", "ratio": 4,
        "milliseconds": 2.0, "spread": 0.1, "speedup": 1.5, "allowed": 1.6,
    }
]  # fmt: skip


def _row(found, task, arm):
    (row,) = [row for row in found if (row.task, row.arm) == (task, arm)]
    return row


def test_means_deviations_and_paired_gaps_are_those_of_a_calculation_by_hand():
    row = _row(rows(RECORDS, LATENCY), "sst2", "variator")
    assert (row.seeds, row.mean, row.gap) == (2, 80.0, 2.0)  # gaps 1 and 3
    assert row.std == pytest.approx(math.sqrt(2)) and row.gap_std == pytest.approx(math.sqrt(2))
    assert (row.milliseconds, row.speedup, row.allowed) == (2.0, 1.5, 1.6)
    assert _row(rows(RECORDS), "mrpc", "backbone").details == {"f1": 81.0}


def test_the_mean_over_tasks_counts_only_seeds_that_have_them_all():
    found = rows(RECORDS)
    row = _row(found, MEAN, "variator")
    assert (row.seeds, row.mean, row.gap, row.std) == (1, 74.5, 0.5, 0.0)
    assert row.examples == 200
    assert _row(found, MEAN, "backbone").mean == pytest.approx((75 + 78) / 2)
    one_task = [record for record in RECORDS if record["task"] == "sst2"]
    assert MEAN not in {row.task for row in rows(one_task)}


def test_one_seed_has_no_deviation():
    assert mean_std([3.0]) == (3.0, 0.0)


def test_files_hold_the_rows(tmp_path):
    found = rows(RECORDS, LATENCY)
    write_rows(found, tmp_path)
    kept = json.loads((tmp_path / "results.json").read_text())
    assert [row["mean"] for row in kept] == [row.mean for row in found]
    with (tmp_path / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [float(line["gap"]) for line in lines] == [row.gap for row in found]


def test_tables_show_scores_gaps_costs_and_clock():
    found = rows(RECORDS, LATENCY)
    quality = tables.quality_table(found, "nano").splitlines()
    assert quality[0] == (
        "| arm | k | sst2 | mrpc | mean | gap of the mean | FLOPs saved | extra parameters |"
    )
    (method,) = [line for line in quality if line.startswith("| compression plugin | 4 |")]
    assert "| 4 | 80.0 ± 1.4 | 70.0 | 74.5 | +0.50 ± 0.00 | 40.0 % | 1.00 % |" in method
    assert "| – | – |" not in quality[2]
    assert "| 82.0 |" not in tables.details_table(found, "nano")
    assert "| 81.0 |" in tables.details_table(found, "nano")
    assert "| nano | 0.01 M | 4 | +0.50 ± 0.00 | 40.0 % | 1.00 % |" in tables.size_table(found)
