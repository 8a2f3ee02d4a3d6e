"""Figures from samples, and how they are written."""

import json

import pytest

from variator_jax.bench import results
from variator_jax.bench.results import ENCODER, STEP, Measurement, Timing

PEAK = Timing("matrix peak, 100 x 100", (1e-6, 2e-6, 4e-6), 2e6)  # 1e12 FLOPs a second
ONE = Timing("k=1, the backbone", (4.0, 4.4, 4.8), 10**9, 1, 1.0)
FOUR = Timing("k=4", (2.0, 2.0, 3.0), 5 * 10**8, 4, 2.0)
EAGER = Timing("others, eager", (8.0, 8.8, 9.0))
COMPILED = Timing("others, compiled", error="RuntimeError: no compiler")
ENCODERS = Measurement(ENCODER, 2, 100, PEAK, (ONE, FOUR, EAGER, COMPILED))
TRAINED = Timing("k=4", (0.02, 0.01, 0.03), 6e9, 4, peak_bytes=2**31, loss=1.5)
STEPS = Measurement(STEP, 2, 100, PEAK, (TRAINED,), {"targets": 8})
MACHINE = ("nano", "float32", 3, "an engine", {"jax": "1"})
RESULT = results.BenchResult(*MACHINE, (ENCODERS, STEPS), ("A remark.",))


def test_figures_of_a_step_and_the_json_with_samples_and_figures():
    encoders, steps = json.loads(json.dumps(results.to_json(RESULT)))["measurements"]
    row, figures = encoders["rows"][1], steps["rows"][0]["figures"]
    assert row["seconds"] == [2.0, 2.0, 3.0] and row["figures"]["speedup"] == pytest.approx(2.2)
    assert encoders["peak"]["figures"]["tflops_per_second"] == pytest.approx(1.0)
    expected = {
        "calls_per_second": 50.0, "examples_per_second": 100.0, "peak_gib": 2.0,
        "share_of_matrix_peak": 6e9 / 0.02 / 1e12,
    }  # fmt: skip
    assert {name: figures[name] for name in expected} == pytest.approx(expected)
    assert "speedup" not in figures


def test_the_tables_hold_the_figures_and_why_a_baseline_did_not_run(tmp_path):
    text = results.bench_markdown(RESULT)
    fours = [line.split("|") for line in text.splitlines() if line.startswith("| k=4 |")]
    encoder, step = ([cell.strip() for cell in line] for line in fours)
    time, *figures = encoder[2:9]
    assert time == "2000.00 (2000.00 to 2500.00)"
    assert figures == ["100", "2.20", "2.00", "1.10", "0.00025", "0%"]
    assert step[2:4] == ["20.00 (15.00 to 25.00)", "50"] and step[-2] == "2.00"
    assert "- others, compiled did not run: RuntimeError: no compiler" in text
    assert "| others, eager | 8800.00 (8400.00 to 8900.00) | 23 | 0.50 | – |" in text
    assert "Distillation step, 2 x 100 tokens, targets 8" in text and "- A remark." in text
    results.plot_bench(RESULT, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
