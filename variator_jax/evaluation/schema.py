"""The report as data: frozen dataclasses whose fields are the keys of `report.json`.

`targets_missed` checks the figures that the quickstart promises.

Qualities are on a scale of 0 to 100, shares are fractions of 1, times in their fields' units.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from variator_jax.backbones.t5 import T5, T5Config
from variator_jax.backbones.t5.cost import backbone_parameters
from variator_jax.bench.latency import Latency
from variator_jax.plugin import PluginConfig, flops_saved, plugin_parameters, stack_flops
from variator_jax.plugin.schedule import describe_site

Scores = Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Backbone:
    """The frozen backbone: its config's name, number of parameters and fingerprint."""

    name: str
    parameters: int
    fingerprint: str


@dataclasses.dataclass(frozen=True)
class RatioEntry:
    """What one compression ratio gives and costs.

    Attributes:
      ratio: compression ratio k.
      quality: task -> score.
      identical_to_backbone: whether the hidden states equal the backbone's bit by bit.
      encoder_flops: by formula, one row of the report's `encoder_length` tokens.
      flops_saved: share of the backbone's encoder FLOPs.
      extra_parameters: the plugin's trained weights.
      extra_parameters_share: the same over the backbone's parameters.
      latency: one entry per shape that was measured.
      details: task -> further scores by name, such as SQuAD's exact match.
      plugin: a name such as 'ffn_x4'; empty for the backbone itself.
      sites: the plugin's sites in words, such as 'span 1-2 x4'.
    """

    ratio: int
    quality: Scores
    identical_to_backbone: bool
    encoder_flops: int
    flops_saved: float
    extra_parameters: int
    extra_parameters_share: float
    latency: Sequence[Latency] = ()
    details: Mapping[str, Scores] = dataclasses.field(default_factory=dict)
    plugin: str = ""
    sites: Sequence[str] = ()

    @property
    def label(self) -> str:
        """The ratio of the paper's sites; of FFNs chosen otherwise their words, else the name."""
        if self.plugin and self.plugin != f"ffn_x{self.ratio}":
            return self.plugin
        usual = all(site.startswith("ffn all") and "rank=" not in site for site in self.sites)
        return f"{self.ratio}" if usual else ", ".join(self.sites)


@dataclasses.dataclass(frozen=True)
class Report:
    """A backbone at several compression ratios.

    Attributes:
      backbone: what was compressed.
      hardware: the machine that latencies were measured on.
      seconds: stage -> wall-clock seconds.
      majority: classification task -> score of always answering the majority class.
      ratios: in rising order, the uncompressed backbone (ratio 1) first.
      control_no_ffn: task -> score of the backbone with its encoder FFNs skipped.
      encoder_length: tokens of the row that `encoder_flops` counts.
      notes: reasons and remarks, in sentences.
    """

    backbone: Backbone
    hardware: str
    seconds: Scores
    majority: Scores
    ratios: Sequence[RatioEntry]
    control_no_ffn: Scores
    encoder_length: int
    notes: Sequence[str] = ()

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks in the order of the first ratio."""
        return tuple(self.ratios[0].quality) if self.ratios else ()

    def at(self, ratio: int) -> RatioEntry | None:
        """The entry of a ratio, None if it was not evaluated."""
        return next((entry for entry in self.ratios if entry.ratio == ratio), None)

    @property
    def reference(self) -> Scores:
        """Scores of the uncompressed backbone, empty if it was not evaluated."""
        entry = self.at(1)
        return entry.quality if entry else {}

    def mean(self, scores: Scores) -> float | None:
        """Mean of the classification tasks, those with a majority score; None if any lacks."""
        if not self.majority or any(task not in scores for task in self.majority):
            return None
        return sum(scores[task] for task in self.majority) / len(self.majority)


def ratio_entry(config: T5Config, plugin: PluginConfig, length: int, **measured: Any) -> RatioEntry:
    """An entry whose FLOPs and parameters are computed from the shapes; `measured` is the rest."""
    stack = T5(config).stack()
    extra = plugin_parameters(plugin, stack)
    return RatioEntry(
        ratio=plugin.ratio,
        encoder_flops=stack_flops(stack, length, plugin),
        flops_saved=flops_saved(stack, length, plugin),
        extra_parameters=extra,
        extra_parameters_share=extra / backbone_parameters(config),
        plugin=plugin.name,
        sites=tuple(map(describe_site, plugin.parts)),
        **measured,
    )


# What the quickstart promises.
_OVER_MAJORITY = {"topic": 25.0, "pair": 10.0}  # part of a task's name -> points of the backbone
_LARGEST_DROP = {2: 1.0, 4: 2.0}  # ratio -> points of the mean of the classification tasks
_CONTROL_DROP = 5.0  # points that this mean loses at least without encoder FFNs
_SPEED_CONFIG, _SPEED_LENGTH, _SPEED_RATIO = "t5_1_0_base", 256, 4
_SAVED = 43.0  # % of the FLOPs of that encoder, at least
_EFFICIENCY = 85.0  # % of the speed-up that these FLOPs allow, at least


def targets_missed(report: Report) -> list[str]:
    """One sentence for each promised figure that the report misses; "nan" if it is absent."""
    backbone = report.at(1)
    identical = backbone is not None and backbone.identical_to_backbone
    missed = [] if identical else ["k=1 is not bit-identical to the backbone, or not evaluated."]
    for what, figure, least, most in _promises(report):
        if not least <= figure <= most:
            limit = f"at least {least:.1f}" if most == math.inf else f"at most {most:.1f}"
            missed.append(f"{what}: found {figure:.1f}; {limit} was promised.")
    return missed


def _promises(report: Report) -> Iterator[tuple[str, float, float, float]]:
    """What each promise is about, its figure, and the least and the most that it may be."""

    def lost(scores: Scores) -> float:
        before, after = report.mean(report.reference), report.mean(scores)
        return math.nan if before is None or after is None else before - after

    for part, margin in _OVER_MAJORITY.items():
        for task in [task for task in report.majority if part in task] or [part]:
            gain = report.reference.get(task, math.nan) - report.majority.get(task, math.nan)
            yield f"backbone's points above the majority class of {task}", gain, margin, math.inf
    mean = "points of the mean of the classification tasks"
    for ratio, limit in _LARGEST_DROP.items():
        entry = report.at(ratio)
        yield f"{mean} lost at k={ratio}", lost(entry.quality if entry else {}), -math.inf, limit
    control = lost(report.control_no_ffn)
    yield f"{mean} lost without encoder FFNs", control, _CONTROL_DROP, math.inf

    shape = f"{_SPEED_CONFIG} at length {_SPEED_LENGTH} and k={_SPEED_RATIO}"
    entry = report.at(_SPEED_RATIO)
    expected = (_SPEED_CONFIG, _SPEED_LENGTH)
    rows = [row for row in entry.latency if (row.config, row.length) == expected] if entry else []
    speeds = [(row.speedup, row.flops_allowed_speedup) for row in rows] or [(math.nan, math.nan)]
    for speedup, allowed in speeds:
        saved, reached = 100 - 100 / allowed, 100 * speedup / allowed
        yield f"% of the encoder FLOPs saved by {shape}", saved, _SAVED, math.inf
        what = f"% of the speed-up that the saved FLOPs allow, of {shape}"
        yield what, reached, _EFFICIENCY, math.inf
