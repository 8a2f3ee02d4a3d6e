"""Plugins compared with the teacher example by example, each difference with its error.

Schedules of sites are chosen by the first half of the held-out examples and judged by the second.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from variator_jax.backbones.t5 import T5, get_config
from variator_jax.backbones.t5.cost import backbone_parameters
from variator_jax.experiment.grid import TEACHER
from variator_jax.plugin import PluginConfig, flops_saved, plugin_parameters
from variator_jax.plugin.schedule import split_sites

SIZES, LENGTH = ("base", "large", "xl", "xxl"), 256  # of T5 1.1, and tokens of a row
CHOSEN, JUDGED = "labels, to choose", "labels, to judge"


def paired_gaps(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """How far every arm is below its teacher, over the same examples.

    Args:
      records: of cells, see `score.score_cell`; those without each example's score, or
        whose teacher has none, are left out.

    Returns:
      A row for each backbone, arm, ratio and measure, with `gap` in points, `error`, which is the
      standard error over examples and over seeds together, `seeds`, and the arm's sites and costs.
      Measures are the tasks, and the mean of the classification tasks on each half of the examples.
    """
    cells = [record for record in records if all(record.get("scores", {"": ()}).values())]
    teachers = {_pair(cell): cell for cell in cells if cell["arm"] == TEACHER}
    rows = []
    others = [cell for cell in cells if cell["arm"] != TEACHER and _pair(cell) in teachers]
    names = ("backbone", "arm", "ratio")
    keys = [tuple(cell[name] for name in names) for cell in others]
    for key in dict.fromkeys(keys):
        group = [cell for cell, own in zip(others, keys, strict=True) if own == key]
        arm = dict(zip(names, key, strict=True), sites=group[0].get("sites", ""))
        arm["seeds"] = len({cell["seed"] for cell in group})
        # The tasks of an experiment may have inputs of different lengths.
        arm["flops_saved"] = np.mean([cell["flops_saved"] for cell in group])
        arm["extra_parameters"] = group[0]["extra_parameters"]
        lost: dict[str, np.ndarray] = {}  # measure -> [seeds, examples]
        labelled: list[np.ndarray] = []
        for place, task in dict.fromkeys((c["task"], t) for c in group for t in c["scores"]):
            own = [cell for cell in group if cell["task"] == place]
            pairs = [(teachers[_pair(c)]["scores"][task], c["scores"][task]) for c in own]
            points = np.subtract(*np.swapaxes(pairs, 0, 1))
            # Mixtures may share a task with another task of the experiment.
            lost[f"{place} {task}" if task in lost else task] = points
            labelled += [points] if task in own[0]["labelled"] else []
        measures = {task: [points] for task, points in lost.items()}
        if labelled:
            measures[CHOSEN] = [points[:, : points.shape[1] // 2] for points in labelled]
            measures[JUDGED] = [points[:, points.shape[1] // 2 :] for points in labelled]
        for measure, parts in measures.items():
            gap, error = _mean_and_error(parts)
            rows.append({**arm, "measure": measure, "gap": gap, "error": error})
    return pd.DataFrame(rows)


def paired_table(gaps: pd.DataFrame) -> str:
    """A Markdown table of one backbone's `paired_gaps`, a line an arm and ratio, or nothing."""
    lines = []
    groups = [] if gaps.empty else gaps.groupby(["arm", "ratio"], sort=False)
    for (arm, ratio), group in groups:
        first = group.iloc[0]
        line = {"arm": arm, "sites": first["sites"], "k": ratio, "seeds": first["seeds"]}
        line |= {row.measure: f"{row.gap:+.1f} ± {row.error:.1f}" for row in group.itertuples()}
        line["FLOPs saved"] = f"{100 * first['flops_saved']:.1f} %"
        lines.append(line | {"extra parameters": f"{first['extra_parameters']:,}"})
    return as_table(lines)


def sizes_table(records: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of the plugins on T5 1.1 by formula; empty without any.

    Each cell has the share of the encoder's FLOPs that is saved, and the plugin's parameters as a
    share of the backbone's. Plugins of numbered layers are left out: larger sizes have more.
    """
    backbones = {name: T5(get_config(f"t5_1_1_{name}")) for name in SIZES}
    sites = {(record["arm"], record["ratio"]): record.get("sites", "") for record in records}
    lines = []
    for (arm, ratio), words in sites.items():
        plugin = PluginConfig(sites=split_sites(words)) if words else PluginConfig(1)
        if plugin.ratio == 1 or any(site.layers is not None for site in plugin.parts):
            continue
        line = {"arm": arm, "k": ratio, "sites": words}
        for name, backbone in backbones.items():
            stack = backbone.stack()
            extra = plugin_parameters(plugin, stack) / backbone_parameters(backbone.config)
            saved = flops_saved(stack, LENGTH, plugin)
            line[f"T5 1.1 {name}"] = f"{100 * saved:.1f} %, {100 * extra:.2f} %"
        lines.append(line)
    return as_table(lines)


def as_table(lines: Iterable[Mapping[str, object]]) -> str:
    """A Markdown table of lines, each column -> text; empty without lines."""
    frame = pd.DataFrame(lines).fillna("")
    return str(frame.to_markdown(index=False, tablefmt="github", disable_numparse=True))


def _pair(cell: Mapping[str, Any]) -> tuple[Any, ...]:
    return cell["backbone"], cell["task"], cell["seed"]


def _mean_and_error(parts: Sequence[np.ndarray]) -> tuple[float, float]:
    """The mean over tasks of `[seeds, examples]`, and the standard error of that mean."""
    seeds = np.mean([points.mean(axis=1) for points in parts], axis=0)
    # Seeds share the examples, so their differences are averaged before the variance is taken.
    variances = [points.mean(axis=0).var(ddof=1) / points.shape[1] for points in parts]
    variance = sum(variances) / len(parts) ** 2
    if len(seeds) > 1:
        variance += seeds.var(ddof=1) / len(seeds)
    return float(seeds.mean()), math.sqrt(variance)
