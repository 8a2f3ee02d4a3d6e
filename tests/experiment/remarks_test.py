"""Sentences that follow from a table: who beats whom, and what says little."""

from variator_jax.experiment.remarks import remarks
from variator_jax.experiment.results import rows


def _records(task, seed=0, **scores):
    """A cell of one seed for each arm; at ratio 4 unless it is the teacher or has no FFN."""
    return [
        {
            "backbone": "nano", "task": task, "arm": arm, "seed": seed, "score": score,
            "ratio": 1 if arm in ("backbone", "no_ffn") else 4, "details": {}, "examples": 400,
            "majority": 50.0, "flops_saved": 0.4, "extra_parameters": 1,
            "extra_parameters_share": 0.1, "parameters": 10,
        }
        for arm, score in scores.items()
    ]  # fmt: skip


def _said(records):
    return remarks(rows(records), "nano").splitlines()


def test_the_method_is_held_against_each_rival():
    scores = {"backbone": 80.0, "variator": 79.0, "mean_pool": 60.0, "no_pretraining": 79.5}
    first, *_ = _said(_records("sst2", **scores))
    assert first == (
        "- k = 4: the plugin loses 1.00 ± 0.00 points; it is above *mean-pooling, untrained* "
        "(+19.0 ± 0.0); it is **below** *without plugin pre-training* (-0.5 ± 0.0)."
    )


def test_what_varies_more_from_seed_to_seed_than_it_differs_is_level():
    records = _records("sst2", 0, backbone=80.0, variator=79.0, student=78.0)
    records += _records("sst2", 1, backbone=80.0, variator=77.0, student=77.5)
    first, *_ = _said(records)  # +1.0 and -0.5
    assert "it is **level with** *smaller student, distilled* (+0.2 ± 1.1)" in first


def test_of_several_tasks_the_mean_counts():
    records = _records("sst2", backbone=80.0, variator=81.0, student=70.0)
    records += _records("mrpc", backbone=70.0, variator=73.0, student=80.0)
    first, *_ = _said(records)
    assert first.startswith("- k = 4: the plugin gains 2.00 ± 0.00 points; it is above *smaller")
    assert "(+2.0 ± 0.0)" in first


def test_tasks_that_say_little_are_named():
    said = _said(_records("rte", backbone=51.0, no_ffn=50.5) + _records("sst2", backbone=80.0))
    (rte,) = [line for line in said if line.startswith("- rte: ")]
    assert rte.startswith("- rte: the teacher is +1.0 points from always answering")
    assert "; without any encoder FFN the teacher loses 0.50" in rte
    assert not [line for line in said if line.startswith("- sst2")]


def test_where_some_tasks_say_little_the_others_are_told_alone():
    blurred = _records("rte", backbone=51.0, variator=48.0, mean_pool=50.0)
    told = _records("sst2", backbone=80.0, variator=79.0, mean_pool=70.0)
    said = _said(blurred + told)
    assert "(+3.5 ± 0.0)" in said[0]
    assert (
        "- On sst2 alone, k = 4: the plugin loses 1.00 ± 0.00 points; it is above "
        "*mean-pooling, untrained* (+9.0 ± 0.0)." in said
    )
    assert not [line for line in _said(told) if "alone" in line]


def test_the_standard_error_is_that_of_a_share_of_the_examples():
    *_, last = _said(_records("sst2", backbone=80.0))
    assert "standard error of 2.0 on sst2 (400 examples)" in last


def test_a_backbone_without_rows_has_no_remarks():
    assert remarks(rows(_records("sst2", backbone=80.0)), "mini") == ""
