"""Measurements are kept, and made again only for another request."""

import pytest

from variator_jax.experiment import measure
from variator_jax.experiment.grid import Experiment


@pytest.mark.parametrize("kind", ["latencies", "neurons"])
def test_an_experiment_that_measures_nothing_loads_nothing(tmp_path, kind):
    grid = dict(recipe="r", backbones=("nano",), tasks=("t",))
    assert getattr(measure, kind)(Experiment(str(tmp_path), **grid, arms=("no_ffn",))) == []
    off = dict(latency=None, neurons=False)
    assert getattr(measure, kind)(Experiment(str(tmp_path), **grid, **off)) == []


def test_a_measurement_is_kept_until_something_else_is_requested(tmp_path):
    experiment = Experiment(str(tmp_path), recipe="r", backbones=("nano", "mini"), tasks=("t",))
    measured = []

    def rows(request):
        def measure_one(backbone):
            measured.append(backbone)
            return [{"backbone": backbone, **request}]

        return measure._kept(experiment, "latency", request, measure_one)

    first = rows({"ratios": [2]})
    assert rows({"ratios": [2]}) == first and measured == ["nano", "mini"]
    assert rows({"ratios": [2, 4]})[0]["ratios"] == [2, 4]
    assert measured == ["nano", "mini"] * 2
