"""A plugin's settings: what is refused, and their form in plugin folders."""

import dataclasses

import pytest

from variator_jax.errors import PluginError
from variator_jax.plugin import Ffn, KeyValue, PluginConfig, Span

MIXED = PluginConfig(sites=(Ffn(4, layers=(0, 1)), Ffn(2, layers=(2,), compression="mean")))


@pytest.mark.parametrize("fields, message", [
    ({"ratio": 0}, "ratio is 0; expected a whole number of at least 1"),
    ({"ratio": 2.0}, r"ratio is 2\.0; expected a whole number"),
    ({"ratio": True}, "ratio is True; expected a whole number"),
    ({"layers": 2}, "layers are a tuple"),
    ({"layers": ("0",)}, "layers are a tuple"),
    ({"bottleneck": 6.5}, r"bottleneck is 6\.5; expected a whole number"),
    ({"compression": "max"}, "compression is 'max'"),
    ({"decompression": ""}, "decompression is ''"),
    ({"pool_padding": 1}, "pool_padding is True or False"),
    ({"sites": "("}, "must be a module path with"),
    ({"sites": ()}, "a tuple of sites"),
    ({"sites": (4,)}, "a tuple of sites"),
    ({"sites": ("ffn 0 x2",), "layers": (1,)}, r"layers=\(1,\) is for .* 'ffn 0 x2'"),
    ({"sites": (Ffn(2),), "rank": 4}, "rank=4 is for a plugin of the paper's sites"),
    ({"sites": None}, "a tuple of sites; found None"),
    ({"ratio": 0, "sites": ("span all x1",)}, "'span all x1' merges nothing"),
    ({"sites": ("ffn 0 x1", "ffn 1 x2")}, "'ffn 0 x1' merges nothing: leave its layers out"),
    ({"sites": ("ffn all x2", "span 1 x2")}, "Layer 1 is in two sites, 'ffn all x2' and 'spa"),
    ({"sites": (KeyValue(2), KeyValue(2, (0,)))}, "Layer 0 is in two sites"),
    ({"sites": ("span all x2", "ffn all x2")}, "a span shares its layers with nothing"),
    ({"sites": (Ffn(2, (0,)), Span(8, (1,)))}, r"ratio is 2; its sites have \[2, 8\]"),
    ({"layers": ()}, "at least one layer; found none"),
    ({"given_name": "none"}, "name is a letter, .* found 'none'"),
    ({"given_name": "4x"}, "name is a letter, .* found '4x'"),
    ({"given_name": "ratio_4"}, "name is a letter, .* found 'ratio_4'"),
    ({"given_name": "Grüße"}, "name is a letter, .* found 'Grüße'"),
    ({"given_name": True}, "name is a letter, .* found True"),
    ({"sites": (KeyValue(2),), "pool_padding": True}, "FFN sites only"),
    ({"sites": (Ffn(4), Ffn(8))}, r"ratio is 2; its sites have \[4, 8\]"),
])  # fmt: skip
def test_settings_that_cannot_be_used_are_refused(fields, message):
    with pytest.raises(PluginError, match=message):
        PluginConfig(**{"ratio": 2} | fields)


def test_a_tuple_of_sites_has_the_largest_ratio():
    assert MIXED.ratio == 4 and MIXED.parts == MIXED.sites
    assert PluginConfig(1).parts == () and PluginConfig(4).parts[0].ratio == 4


@pytest.mark.parametrize("config", [
    PluginConfig(1), PluginConfig(4), PluginConfig(4, rank=8), PluginConfig(sites=("ffn all x4",)),
    PluginConfig(8, 16, (0, 2), "mean", "repeat", pool_padding=True),
    PluginConfig(2, sites=r"block_(\d+)/ffn"),
    MIXED,
    PluginConfig(sites=("ffn 0 x4 rank=8",), given_name="fast"),
    PluginConfig(sites=(Ffn(4, layers=(0,), rank=4), KeyValue(2, (0,)), Span(8, (1, 2), rank=16))),
], ids=str)  # fmt: skip
def test_json_keeps_every_setting(config):
    read = PluginConfig.from_json(config.to_json())
    assert read == config and read.name == config.name and read.to_json() == config.to_json()


def test_one_site_needs_no_tuple_and_the_papers_may_be_written_in_words():
    assert PluginConfig(sites="span 0-1 x4") == PluginConfig(sites=Span(4, (0, 1)))
    assert PluginConfig(sites="ffn all x4") == PluginConfig(4)


def test_ratio_1_is_the_backbone_whatever_the_sites():
    for sites in (("ffn 0 x4", "span 1-2 x8"), ("ffn 0", "span 1-2 x8"), "span all rank=2"):
        config = PluginConfig(1, sites=sites)
        assert config.parts == () and config == PluginConfig(1) and config.name == ""


@pytest.mark.parametrize("text, site", [
    ("ffn 0 x4", Ffn(4, layers=(0,))),
    ("kv all x2", KeyValue(2)),
    ("span 3-5 x8 size=1 rank=16", Span(8, (3, 4, 5), size=1, rank=16)),
    ("ffn 0,2,4-7 x4 compression=mean", Ffn(4, (0, 2, 4, 5, 6, 7), compression="mean")),
])  # fmt: skip
def test_sites_are_read_and_written_in_words(text, site):
    config = PluginConfig(sites=(text,))
    assert config == PluginConfig(sites=(site,)) and config.description == text
    assert PluginConfig(4, layers=(1, 2)).description == "ffn 1-2 x4"


@pytest.mark.parametrize("text, message", [
    ("span 1-2 4", "'span 1-2 4' is not KIND LAYERS xRATIO"),
    ("span 1-2 x4 rank=8 rank=16", "gives a setting twice"),
    ("span 1-2 x4 ratio=8", "gives a setting twice"),
    ("span 1-2 x4 layers=1", "gives a setting twice"),
    ("span 1-2", "has no ratio: write one, such as .span 1-2 x4."),
    ("spam 1-2 x4", "of kind 'spam'. Did you mean 'span'"),
    ("span 1-2 x4 ranks=2", "Span has no field 'ranks'. Did you mean 'rank'"),
    ("span 1-2 x4 rank=two", "rank of the adapters is 'two'; expected a whole number"),
    ("ffn 5-2 x4", "layers '5-2' are none"),
    ("ffn 1 x0", "ratio is 0; expected a whole number"),
    ("span 0,2 x2", "layers follow one another"),
])  # fmt: skip
def test_sites_in_other_words_are_refused(text, message):
    with pytest.raises(PluginError, match=message):
        PluginConfig(sites=(text,))


def test_what_a_site_in_words_leaves_out_is_the_plugins():
    config = PluginConfig(8, 32, rank=4, sites=("ffn 0 x4 rank=0", "kv 0", "span 1-2"))
    sites = (Ffn(4, (0,), bottleneck=32), KeyValue(8, (0,), rank=4), Span(8, (1, 2), 0, 32, 4))
    assert config == PluginConfig(sites=sites)


FORMAT_1 = dataclasses.asdict(PluginConfig(4, 16)) | {"layers": [0, 2]}


@pytest.mark.parametrize("content, expected", [
    (FORMAT_1, PluginConfig(4, 16, layers=(0, 2))),
    ({"ratio": 4}, PluginConfig(4)),
    ({"sites": [{"kind": "ffn", "ratio": 4}]}, PluginConfig(4)),
    ({"sites": []}, PluginConfig(1)),
])  # fmt: skip
def test_format_1_is_read_and_absent_fields_take_their_defaults(content, expected):
    assert PluginConfig.from_json(content) == expected


@pytest.mark.parametrize("content, message", [
    ({"ratio": 4, "bottlenek": 8}, "no field 'bottlenek'. Did you mean 'bottleneck'"),
    ({"sites": [{"kind": "fnn", "ratio": 4}]}, "of kind 'fnn'. Did you mean 'ffn'"),
    ({"sites": [{"kind": "ffn", "ratios": 4}]}, "Ffn has no field 'ratios'. Did you mean"),
    ({"sites": [{"ratio": 4}]}, "of kind None.*Known: ffn"),
    ({"sites": [{"kind": "ffn"}]}, "Ffn cannot have the fields {}: .*'ratio'"),
    ({"sites": [{"kind": "span", "ratio": 2, "size": -1}]}, "size of a span is -1; .* at least 0"),
    ({"sites": [{"kind": "kv", "ratio": 2, "rank": 1.5}]}, r"rank of the adapters is 1\.5"),
    ({"ratio": 4, "layers": 1.5}, "cannot have the fields"),
    ({"sites": [], "pool_paddings": True}, "Unknown field 'pool_paddings'; a newer version"),
])  # fmt: skip
def test_unknown_fields_and_kinds_name_the_nearest_and_values_are_checked(content, message):
    with pytest.raises(PluginError, match=message):
        PluginConfig.from_json(content)
