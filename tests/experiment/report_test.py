"""From the scores of cells to rows and tables."""

import math

import pytest

from variator_jax.experiment import report
from variator_jax.experiment.grid import MEAN


def _records(task, seed=0, details=(), **scores):
    """A cell of one seed for each arm; at ratio 4 unless it is the teacher or has no FFN."""
    records = []
    for arm, score in scores.items():
        ratio = 1 if arm in ("backbone", "no_ffn") else 4
        record = {
            "backbone": "nano", "task": task, "arm": arm, "ratio": ratio, "seed": seed,
            "score": score, "details": dict(details), "examples": 400, "majority": 50.0,
            "parameters": 10_000, "scores": {task: [100.0] * 320 + [0.0] * 80},
        }  # fmt: skip
        costs = ("flops_saved", 0.4), ("extra_parameters", 100), ("extra_parameters_share", 0.01)
        records.append(record | {name: value * (ratio > 1) for name, value in costs})
    return records


RECORDS = [
    *_records("sst2", 0, backbone=80.0, variator=79.0),
    *_records("sst2", 1, backbone=84.0, variator=81.0),
    *_records("mrpc", 0, {"f1": 82.0}, backbone=70.0, variator=70.0),
    *_records("mrpc", 1, {"f1": 80.0}, backbone=72.0, variator=71.0),
]
LATENCY = [dict(milliseconds=2.0, spread=0.1, speedup=1.5, allowed=1.6)]
LATENCY[0] |= dict(backbone="nano", arm="variator", ratio=4)


def test_rows_are_those_of_a_calculation_by_hand():
    table = report.rows(RECORDS, LATENCY).set_index(["task", "arm"])
    row = table.loc["sst2", "variator"]
    assert (row["seeds"], row["mean"], row["gap"]) == (2, 80.0, 2.0)  # gaps 1 and 3
    assert row["std"] == row["gap_std"] == pytest.approx(math.sqrt(2))
    assert row["scores"] == {0: 79.0, 1: 81.0}
    assert (row["milliseconds"], row["speedup"], row["allowed"]) == (2.0, 1.5, 1.6)
    assert table.loc["mrpc", "backbone"]["details"] == {"f1": 81.0}
    row = table.loc[MEAN, "variator"]
    assert (row["seeds"], row["mean"], row["gap"], row["examples"]) == (2, 75.25, 1.25, 800)
    assert math.isnan(table.loc[MEAN, "backbone"]["speedup"])
    assert MEAN not in set(report.rows(RECORDS[:4])["task"])


def _lines(markdown):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in markdown.splitlines()]


def test_tables_show_scores_gaps_costs_and_latency():
    table = report.rows(RECORDS, LATENCY)
    header, _, teacher, method, majority = _lines(report.quality_table(table))
    assert header[:6] == ["arm", "k", "sst2", "mrpc", "mean", "gap of the mean"]
    assert header[6:] == ["FLOPs saved", "extra parameters", "mrpc f1"]
    assert teacher[:2] + teacher[5:] == ["uncompressed", "", "–", "", "", "81.0"]
    assert method[:4] == ["compression plugin", "4", "80.0 ± 1.4", "70.5 ± 0.7"]
    assert method[4:] == ["75.2 ± 1.1", "+1.25 ± 1.06", "40.0 %", "1.00 %", "81.0"]
    assert majority[2:5] == ["50.0"] * 3
    sizes = _lines(report.size_table(table))[-1]
    assert sizes[:6] == ["nano", "0.01 M", "4", "+1.25 ± 1.06", "40.0 %", "1.00 %"]
    assert sizes[6:] == ["2.00 ms", "1.50x", "94 %"]
    assert _lines(report.size_table(report.rows(RECORDS)))[-1][6:] == ["–"] * 3


def test_a_task_without_a_majority_class_has_none_and_neither_has_the_mean():
    records = [record | {"majority": None} for record in _records("squad", backbone=60.0)]
    table = report.rows(records + _records("sst2", backbone=80.0))
    assert _lines(report.quality_table(table))[-1][:5] == ["majority class", "", "–", "50.0", "–"]


def test_the_method_is_compared_with_the_arms_of_its_ratio_seed_by_seed():
    records = _records("sst2", 0, backbone=80.0, variator=79.0, student=78.0, no_ffn=60.0)
    records += _records("sst2", 1, backbone=80.0, variator=77.0, student=77.5, no_ffn=60.0)
    # Gains are +1.0 and -0.5; teacher and control have no ratio.
    (line,) = _lines(report.rivals_table(report.rows(records)))[2:]
    assert line == ["smaller student, distilled", "4", "+0.2 ± 1.1"]
    one = [record for record in records if (record["arm"], record["seed"]) != ("student", 1)]
    assert _lines(report.rivals_table(report.rows(one)))[2][2] == "+1.0"
    scores = [line[:4] for line in _lines(report.quality_table(report.rows(one)))]
    assert ["smaller student, distilled", "4", "78.0", "+2.00"] in scores
    assert report.rivals_table(report.rows(RECORDS)) == ""


def test_the_standard_error_of_a_mixture_is_that_of_the_mean_of_its_tasks():
    assert "2.0 on sst2 (400 examples);" in report.standard_errors(RECORDS[:4])
    (mixture,) = _records("both", backbone=80.0)
    mixture["scores"] = {"many": [0.0, 100.0] * 5_000, "few": [0.0, 100.0] * 50}
    # sqrt(50² / 10,000 + 50² / 100) / 2
    assert "2.5 on both" in report.standard_errors([mixture])
    assert report.standard_errors([mixture | {"scores": {}}]) == ""
