"""The report's files, its tables, and the promises that it checks."""

import dataclasses
import json
import struct

import pytest

from variator_jax.backbones.t5 import T5, get_config
from variator_jax.commands import quickstart
from variator_jax.errors import DataError
from variator_jax.evaluation.report import read_report, report_markdown, write_report
from variator_jax.evaluation.schema import Backbone, Latency, Report, ratio_entry, targets_missed
from variator_jax.plugin import PluginConfig, stack_flops
from variator_jax.plugin.arrays import flops_allowed_speedup, flops_saved, plugin_parameters

NANO = get_config("nano")
STACK, BASE = T5(NANO).stack(), T5(get_config("t5_1_0_base")).stack()


def quality(topic, pair):
    return {"docs_topic": topic, "docs_pair": pair, "docs_answer": 40.0}


FIELDS = (
    "backbone hardware seconds majority ratios control_no_ffn encoder_length notes targets_missed "
    "name parameters fingerprint ratio quality identical_to_backbone encoder_flops flops_saved "
    "extra_parameters extra_parameters_share latency details plugin sites "
    "config batch length milliseconds speedup flops_allowed_speedup spread"
)
QUALITY = {1: quality(80.0, 70.0), 2: quality(79.5, 69.5), 4: quality(79.0, 69.0)}


def entry(ratio, efficiency=0.9):
    plugin = PluginConfig(ratio)
    allowed = flops_allowed_speedup(BASE, 256, plugin)
    speedup = 1 + (allowed - 1) * efficiency if ratio == 1 else allowed * efficiency
    time = {"milliseconds": 100 / speedup, "speedup": speedup, "spread": 2.0}
    shapes = ("nano", 8, 128), ("t5_1_0_base", 4, 256)
    rows = tuple(Latency(*shape, flops_allowed_speedup=allowed, **time) for shape in shapes)
    same = {"identical_to_backbone": ratio == 1}
    return ratio_entry(NANO, plugin, 128, quality=QUALITY[ratio], latency=rows, **same)


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
    """With other fields in the entry of a ratio, or without a ratio in the report itself."""
    if ratio:
        entries = {e.ratio: e for e in report.ratios}
        entries[ratio] = dataclasses.replace(entries[ratio], **changes)
        changes = {"ratios": tuple(entries.values())}
    return dataclasses.replace(report, **changes)


def test_the_files_have_the_promised_fields_and_read_back(tmp_path):
    report = good_report(notes=("A remark.",))
    write_report(report, tmp_path, promised=True)
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.md", "report.png"}
    assert read_report(tmp_path / "report.json") == report
    content = json.loads((tmp_path / "report.json").read_text())
    one, _, four = content["ratios"]
    keys = [*content, *content["backbone"], *one, *one["latency"][0]]
    assert " ".join(keys) == FIELDS
    assert four["encoder_flops"] == stack_flops(STACK, 128, PluginConfig(4))
    assert four["flops_saved"] == pytest.approx(flops_saved(STACK, 128, PluginConfig(4)))
    assert four["extra_parameters"] == plugin_parameters(PluginConfig(4), STACK)
    assert (four["plugin"], four["sites"]) == ("ffn_x4", ["ffn all x4"])
    assert (one["plugin"], one["sites"]) == ("", [])
    image = (tmp_path / "report.png").read_bytes()
    width, height = struct.unpack(">II", image[16:24])
    assert image.startswith(b"\x89PNG\r\n") and width >= 1600 and height >= 700


def test_the_quickstart_keeps_the_notes_of_its_evaluation(tmp_path):
    report = with_ratio(good_report(notes=("A remark.",)), 4, quality=quality(20.0, 50.0))
    write_report(report, tmp_path)
    for _ in range(2):  # as when the same command is given again
        quickstart._finish(tmp_path, {"train": 1.0})
    found = read_report(tmp_path / "report.json")
    assert found.notes == ("A remark.", quickstart._NOTE) and found.seconds == {"train": 1.0}


@pytest.mark.parametrize("text", ["{", "[]", '{"ratios": []}', '{"backbone": {"size": 3}}', None])
def test_what_is_not_a_report_is_refused(tmp_path, text):
    if text is not None:
        (tmp_path / "report.json").write_text(text)
    with pytest.raises(DataError, match="is not a report"):
        read_report(tmp_path / "report.json")


def test_a_figure_that_is_not_finite_is_refused_and_nothing_is_written(tmp_path):
    report = good_report(control_no_ffn={"docs_topic": float("nan")})
    with pytest.raises(DataError, match="not finite: .*'docs_topic': nan"):
        write_report(report, tmp_path / "report", promised=True)
    assert not list(tmp_path.iterdir())
    with pytest.raises(DataError, match="at least one ratio"):
        write_report(good_report(ratios=()), tmp_path)


def test_the_tables_show_differences_costs_controls_and_latencies():
    report = good_report(notes=("A remark.",))
    report = with_ratio(report, 4, details={"docs_answer": {"exact_match": 12.0}})
    report = with_ratio(report, 1, details={"docs_answer": {"exact_match": 15.0}})
    text = report_markdown(report, promised=True)
    lines = text.splitlines()
    rows = {line.split("|")[1].strip(): line for line in lines if line.startswith("|")}
    [header] = [line for line in lines if line.startswith("| k |")]
    assert "docs_topic" in header and "nano, batch 8, length 128" in header
    assert "79.0 (-1.0)" in rows["4"] and "40.0 (+0.0)" in rows["4"]
    assert f"{flops_saved(STACK, 128, PluginConfig(4)):.1%}" in rows["4"]
    assert f"{plugin_parameters(PluginConfig(4), STACK):,}" in rows["4"]
    assert "60.0 (-20.0)" in rows["no encoder FFN"] and "50.0" in rows["majority"]
    assert "| docs_answer | exact_match | 15.0 | – | 12.0 |" in lines
    assert any("CPU Imaginary C2" in line for line in lines)
    assert "- A remark." in lines and "romised figures" not in text
    assert [line for line in lines if line.startswith("| t5_1_0_base | 4 | 256 | 4 |")]


def test_a_backbone_that_is_hardly_above_the_majority_class_is_noted():
    report = good_report(majority={"docs_topic": 20.0, "docs_pair": 69.0})
    notes = [line for line in report_markdown(report).splitlines() if "majority class," in line]
    assert len(notes) == 1 and notes[0].startswith("- docs_pair: the uncompressed backbone is +1.0")


@pytest.mark.parametrize("ratio, changes, words", [
    (1, {"identical_to_backbone": False}, "k=1 is not bit-identical"),
    (None, {"ratios": (entry(2), entry(4))}, "k=1 is not bit-identical"),
    (2, {"quality": quality(78.9, 68.9)}, "at k=2: found 1.1; at most 1.0"),
    (4, {"quality": {"docs_topic": 80.0}}, "at k=4: found nan"),
    (None, {"majority": {"docs_topic": 56.0, "docs_pair": 50.0}}, "found 24.0; at least 25.0"),
    (None, {"majority": {"docs_topic": 20.0}}, "class of pair: found nan"),
    (None, {"control_no_ffn": quality(75.5, 66.5)}, "without encoder FFNs: found 4.0"),
    (4, {"latency": entry(4, 0.84).latency}, "k=4: found 84.0; at least 85.0"),
    (4, {"latency": entry(2).latency}, "found 29.9; at least 43.0"),
    (4, {"latency": ()}, "FLOPs saved by t5_1_0_base at length 256 and k=4: found nan"),
])  # fmt: skip
def test_a_missed_promise_is_stated_in_words(ratio, changes, words):
    report = good_report()
    assert targets_missed(report) == []
    report = with_ratio(report, ratio, **changes)
    missed = targets_missed(report)
    assert any(words in sentence for sentence in missed), missed
    markdown = report_markdown(report, promised=True)
    assert all(f"- {sentence}" in markdown for sentence in missed)


def test_a_plot_without_latency_and_controls_is_drawn(tmp_path):
    bare = [dataclasses.replace(e, latency=()) for e in good_report().ratios]
    write_report(good_report(ratios=tuple(bare), control_no_ffn={}, majority={}), tmp_path)
    assert (tmp_path / "report.png").stat().st_size > 10_000
    assert "targets_missed" not in json.loads((tmp_path / "report.json").read_text())


def test_the_label_is_the_ratio_for_all_ffns_and_words_for_sites_chosen_otherwise():
    for sites, ratio in {"ffn all x4": "4", "ffn 0-1 x4": "", "ffn all x4 rank=2": ""}.items():
        plugin = PluginConfig(sites=(sites,))
        own = dataclasses.replace(entry(4), plugin=plugin.name, sites=(plugin.description,))
        assert own.label == (ratio or sites)
