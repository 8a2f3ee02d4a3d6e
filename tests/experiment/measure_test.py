"""Measurements are kept, and made again only for another request."""

from variator_jax.experiment import measure
from variator_jax.experiment.grid import Experiment


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
