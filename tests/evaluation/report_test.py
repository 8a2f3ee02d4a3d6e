import dataclasses
import json
import struct
import subprocess
import sys

import pytest

from variator_jax.backbones.t5 import cost, get_config
from variator_jax.bench.latency import Latency
from variator_jax.errors import DataError
from variator_jax.evaluation.report import read_report, to_json, write_report
from variator_jax.evaluation.schema import Backbone, Report, latency_entry, ratio_entry
from variator_jax.evaluation.tables import report_markdown
from variator_jax.evaluation.targets import QUICKSTART, targets_missed
from variator_jax.plugin import PluginConfig

NANO, BASE = get_config("nano"), get_config("t5_1_0_base")


def quality(topic, pair):
    return {"docs_topic": topic, "docs_pair": pair, "docs_answer": 40.0}


QUALITY = {1: quality(80.0, 70.0), 2: quality(79.5, 69.5), 4: quality(79.0, 69.0)}


def entry(ratio, efficiency=0.9):
    allowed = cost.flops_allowed_speedup(BASE, 256, ratio)
    speedup = 1 + (allowed - 1) * efficiency if ratio == 1 else allowed * efficiency
    row = Latency(ratio, 100 / speedup, 2.0, speedup, allowed, speedup / allowed)
    rows = [latency_entry("nano", 8, 128, row), latency_entry("t5_1_0_base", 4, 256, row)]
    return ratio_entry(NANO, PluginConfig(ratio), 128, QUALITY[ratio], ratio == 1, rows)


def good_report(**changes):
    """A report that keeps every promise."""
    fields = dict(
        backbone=Backbone("nano", 1_500_000, "abc123"),
        hardware="CPU Imaginary C2, 2 cores, jax 0.0",
        seconds={"train": 61.25, "evaluate": 3.0},
        majority={"docs_topic": 20.0, "docs_pair": 50.0},
        ratios=(entry(1), entry(2), entry(4)),
        control_no_ffn={"docs_topic": 60.0, "docs_pair": 60.0, "docs_answer": 10.0},
        encoder_length=128,
    )
    return Report(**{**fields, **changes})


def with_ratio(report, ratio, **changes):
    ratios = tuple(
        dataclasses.replace(e, **changes) if e.ratio == ratio else e for e in report.ratios
    )
    return dataclasses.replace(report, ratios=ratios)


def test_the_json_has_the_promised_fields(tmp_path):
    assert write_report(good_report(), tmp_path / "new", QUICKSTART) == []
    content = json.loads((tmp_path / "new" / "report.json").read_text())
    assert set(content["backbone"]) == {"name", "parameters", "fingerprint"}
    assert content["majority"] == {"docs_topic": 20.0, "docs_pair": 50.0}
    assert content["seconds"] == {"train": 61.25, "evaluate": 3.0}
    assert {"hardware", "control_no_ffn", "targets_missed", "notes"} <= set(content)
    assert [row["ratio"] for row in content["ratios"]] == [1, 2, 4]
    for row in content["ratios"]:
        assert set(row) == {
            "ratio", "quality", "identical_to_backbone", "encoder_flops", "flops_saved",
            "extra_parameters", "extra_parameters_share", "latency", "details",
        }  # fmt: skip
        assert {
            "config", "batch", "length", "milliseconds", "speedup", "flops_allowed_speedup",
        } <= set(row["latency"][0])  # fmt: skip
    four = content["ratios"][2]
    assert four["encoder_flops"] == cost.encoder_flops(NANO, 128, 4)
    assert four["flops_saved"] == pytest.approx(cost.flops_saved(NANO, 128, 4))
    assert four["extra_parameters"] == cost.plugin_parameters(NANO, PluginConfig(4))


def test_a_report_reads_back_as_it_was(tmp_path):
    report = good_report(notes=("A remark.",))
    write_report(report, tmp_path, QUICKSTART)
    assert read_report(tmp_path / "report.json") == report
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.md", "report.png"}


def test_what_is_no_report_is_told(tmp_path):
    with pytest.raises(DataError, match="no report at"):
        read_report(tmp_path / "report.json")
    for text in ("{", "[]", '{"ratios": []}', '{"backbone": {"size": 3}}'):
        (tmp_path / "report.json").write_text(text)
        with pytest.raises(DataError, match="is not a report"):
            read_report(tmp_path / "report.json")


def test_a_figure_that_is_not_finite_is_told_and_nothing_is_written(tmp_path):
    report = good_report(control_no_ffn={"docs_topic": float("nan")})
    with pytest.raises(DataError, match="control_no_ffn.docs_topic is nan"):
        write_report(report, tmp_path / "report", QUICKSTART)
    assert not list(tmp_path.iterdir())
    with pytest.raises(DataError, match="at least one ratio"):
        write_report(good_report(ratios=()), tmp_path)


def test_the_table_shows_differences_costs_and_controls():
    lines = report_markdown(good_report(notes=("A remark.",)), QUICKSTART).splitlines()
    rows = {line.split("|")[1].strip(): line for line in lines if line.startswith("|")}
    [header] = [line for line in lines if line.startswith("| k |")]
    assert "docs_topic" in header and "nano, batch 8, length 128" in header
    assert "79.0 (-1.0)" in rows["4"] and "40.0 (+0.0)" in rows["4"]
    assert f"{cost.flops_saved(NANO, 128, 4):.1%}" in rows["4"]
    assert f"{cost.plugin_parameters(NANO, PluginConfig(4)):,}" in rows["4"]
    assert "60.0 (-20.0)" in rows["no encoder FFN"] and "50.0" in rows["majority"]
    assert any("CPU Imaginary C2" in line for line in lines)
    assert "- A remark." in lines and "All promised figures were reached." in lines
    assert [line for line in lines if line.startswith("| t5_1_0_base | 4 | 256 | 4 |")]


def test_a_backbone_that_is_hardly_above_the_commonest_label_is_told():
    report = good_report(majority={"docs_topic": 20.0, "docs_pair": 69.0})
    told = [line for line in report_markdown(report).splitlines() if "commonest label," in line]
    assert len(told) == 1 and told[0].startswith("- docs_pair: the uncompressed backbone is +1.0")


def test_all_rows_of_a_table_have_the_headers_width():
    blocks = report_markdown(good_report(), QUICKSTART).split("\n\n")
    for block in blocks:
        if block.startswith("|"):
            assert len({line.count("|") for line in block.splitlines()}) == 1, block


def test_a_report_that_keeps_every_promise_misses_nothing():
    assert targets_missed(good_report(), QUICKSTART) == []


@pytest.mark.parametrize("change, words", [
    (lambda r: with_ratio(r, 1, identical_to_backbone=False), "k=1 is not bit-identical"),
    (lambda r: with_ratio(r, 2, quality=quality(78.9, 68.9)), "k=2 loses 1.1 points"),
    (lambda r: with_ratio(r, 4, quality=quality(77.9, 67.9)), "k=4 loses 2.1 points"),
    (lambda r: with_ratio(r, 4, quality={"docs_topic": 80.0}), "k=4 was not evaluated on all"),
    (lambda r: dataclasses.replace(r, majority={"docs_topic": 56.0, "docs_pair": 50.0}),
     "docs_topic by 24.0 points; at least 25.0"),
    (lambda r: dataclasses.replace(r, majority={"docs_topic": 20.0, "docs_pair": 61.0}),
     "docs_pair by 9.0 points; at least 10.0"),
    (lambda r: dataclasses.replace(r, majority={"docs_topic": 20.0}), "named after 'pair'"),
    (lambda r: dataclasses.replace(r, control_no_ffn=quality(75.5, 66.5)), "falls by 4.0 points"),
    (lambda r: dataclasses.replace(r, control_no_ffn={}), "control without encoder FFNs was not"),
    (lambda r: with_ratio(r, 4, latency=entry(4, 0.84).latency), "84% of the"),
    (lambda r: with_ratio(r, 4, latency=entry(2).latency), "saves 29.9% of the encoder FLOPs"),
    (lambda r: with_ratio(r, 4, latency=()), "was not measured"),
])  # fmt: skip
def test_a_missed_promise_is_said_in_words(change, words):
    report = change(good_report())
    missed = targets_missed(report, QUICKSTART)
    assert any(words in sentence for sentence in missed), missed
    markdown = report_markdown(report, QUICKSTART)
    assert all(f"- {sentence}" in markdown for sentence in missed)
    assert to_json(report, QUICKSTART)["targets_missed"] == missed


def test_a_report_without_the_backbone_keeps_no_promise_silently():
    report = good_report(ratios=(entry(2), entry(4)))
    missed = targets_missed(report, QUICKSTART)
    assert any("Ratio 1 was not evaluated" in sentence for sentence in missed)
    assert any("k=2 was not evaluated" in sentence for sentence in missed)
    assert report_markdown(report, QUICKSTART)


def test_the_plot_is_a_png_of_a_papers_size(tmp_path):
    write_report(good_report(), tmp_path, QUICKSTART)
    data = (tmp_path / "report.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n")
    width, height = struct.unpack(">II", data[16:24])
    assert width >= 1600 and height >= 700


def test_a_plot_without_latency_and_controls_is_drawn(tmp_path):
    bare = [dataclasses.replace(e, latency=()) for e in good_report().ratios]
    write_report(good_report(ratios=tuple(bare), control_no_ffn={}, majority={}), tmp_path)
    assert (tmp_path / "report.png").stat().st_size > 10_000


def test_importing_evaluation_imports_neither_matplotlib_nor_tensorflow_nor_seqio():
    names = "report evaluator scorers latency hardware control cost targets"
    code = (
        f"import sys, importlib\n"
        f"for n in {names.split()!r}: importlib.import_module('variator_jax.evaluation.' + n)\n"
        f"print([m for m in ('matplotlib', 'tensorflow', 'seqio', 't5x') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
