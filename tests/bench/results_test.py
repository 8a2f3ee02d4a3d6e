import dataclasses
import json

import pytest

from variator_jax.bench import results, tables
from variator_jax.bench.plot import plot_bench
from variator_jax.bench.results import (
    BenchResult,
    EncoderResult,
    MatrixPeak,
    PeerRow,
    RatioRow,
    StepResult,
    StepRow,
)
from variator_jax.errors import DataError

PEAK = MatrixPeak(100, (1e-6, 2e-6, 4e-6))  # 2e6 FLOPs in 2e-6 s: 1e12 a second
ENCODER = EncoderResult(
    batch=2,
    length=100,
    peak=PEAK,
    ratios=(
        RatioRow(1, 10**9, 1.0, (4.0, 4.4, 4.8)),
        RatioRow(4, 5 * 10**8, 2.0, (2.0, 2.0, 3.0)),
    ),
    peers=(
        PeerRow("others, eager", (8.0, 8.8, 9.0)),
        PeerRow("others, compiled", reason="RuntimeError: no compiler"),
    ),
)
STEP = StepResult(
    batch=2,
    length=100,
    targets=8,
    microbatches=1,
    remat=False,
    peak=PEAK,
    rows=(
        StepRow(4, 3 * 10**9, 2 * 10**9, 10**9, (0.02, 0.01, 0.03), 2**30, 2**31, "device", 1.5),
    ),
)
RESULT = BenchResult(
    "nano", "float32", 3, "an engine", {"jax": "1"}, (ENCODER,), (STEP,), ("A remark.",)
)


def test_figures_of_a_ratio_are_quotients_of_medians():
    found = ENCODER.figures(ENCODER.ratios[1])
    assert found["milliseconds"] == pytest.approx(2000.0)
    assert found["first_quartile_milliseconds"] == pytest.approx(2000.0)
    assert found["third_quartile_milliseconds"] == pytest.approx(2500.0)
    assert found["tokens_per_second"] == pytest.approx(100.0)
    assert found["speedup"] == pytest.approx(2.2)
    assert found["efficiency"] == pytest.approx(1.1)
    assert found["tflops_per_second"] == pytest.approx(2.5e-4)
    assert found["share_of_matrix_peak"] == pytest.approx(2.5e-4)
    # The rounds' own speed-ups are 2.0, 2.2 and 1.6.
    assert found["speedup_first_quartile"] == pytest.approx(1.8)
    assert found["speedup_third_quartile"] == pytest.approx(2.1)


def test_a_peers_speedup_is_over_our_backbone():
    assert ENCODER.peer_figures(ENCODER.peers[0])["speedup"] == pytest.approx(0.5)
    assert ENCODER.peer_figures(ENCODER.peers[1]) == {}


def test_figures_of_a_step():
    found = STEP.figures(STEP.rows[0])
    assert found["steps_per_second"] == pytest.approx(50.0)
    assert found["examples_per_second"] == pytest.approx(100.0)
    assert found["model_flops_utilisation"] == pytest.approx(6e9 / 0.02 / 1e12)


def test_json_round_trip_and_its_figures():
    content = json.loads(json.dumps(results.to_json(RESULT)))
    assert results.from_json(content) == RESULT
    row = content["encoder"][0]["ratios"][1]
    assert row["seconds"] == [2.0, 2.0, 3.0] and row["figures"]["speedup"] == pytest.approx(2.2)
    assert content["encoder"][0]["peak"]["tflops_per_second"] == pytest.approx(1.0)
    assert content["steps"][0]["rows"][0]["figures"]["steps_per_second"] == pytest.approx(50.0)


def test_another_schema_is_refused():
    with pytest.raises(DataError, match="schema 99"):
        results.from_json({**results.to_json(RESULT), "schema": 99})


def test_the_tables_say_the_figures_and_why_a_peer_did_not_run():
    text = tables.bench_markdown(RESULT)
    four = next(line for line in text.splitlines() if line.startswith("| k=4 |"))
    assert [cell.strip() for cell in four.split("|")[2:7]] == [
        "2000.00 (2000.00 to 2500.00)", "100", "2.20", "2.00", "1.10",
    ]  # fmt: skip
    assert "- others, compiled did not run: RuntimeError: no compiler" in text
    assert "2.00 GiB (device)" in text
    for part in (tables.encoder_table(ENCODER), tables.step_table(STEP)):
        assert len({line.count("|") for line in part.splitlines()}) == 1


def test_figures_that_cannot_be_trusted_are_told_under_their_table():
    doubtful = tables.bench_markdown(RESULT)
    assert doubtful.count("Only 3 round(s)") == 2  # under either table
    assert "An efficiency above 1:" in doubtful and "above 100%" not in doubtful
    peak = MatrixPeak(100, (1e-3,))  # 2e9 FLOPs a second
    ratios = (RatioRow(1, 10**9, 1.0, (0.4,)), RatioRow(4, 5 * 10**8, 2.0, (0.3,)))
    fast = dataclasses.replace(ENCODER, ratios=ratios, peak=peak, peers=())
    step = dataclasses.replace(STEP, peak=peak)
    result = dataclasses.replace(RESULT, rounds=5, encoder=(fast,), steps=(step,))
    told = tables.bench_markdown(result)
    assert "A share of peak above 100%: the product of 100 x 100" in told
    assert "An MFU above 100%" in told
    assert "round(s)" not in told and "An efficiency above 1" not in told


def test_the_plot_shows_measured_and_allowed_speedups(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    kept = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, p: kept.append(self) or save(self, p))
    plot_bench(RESULT, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    (axes,) = kept[0].axes
    lines = {tuple(line.get_ydata()) for line in axes.get_lines()}
    assert (1.0, 2.0) in lines and (1.0, pytest.approx(2.2)) in [tuple(x) for x in lines]
    assert "compression ratio" in axes.get_xlabel() and "speed-up" in axes.get_ylabel()
