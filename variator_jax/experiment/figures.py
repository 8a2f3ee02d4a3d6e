"""The figures of an experiment, from plain rows: ratios, sizes, ablations, activated neurons.

Each function saves a PNG of 200 dots an inch at `path` and an SVG of the same stem beside it; what
is drawn is in `figure_quality` and `figure_curves`. What is missing (an arm, a ratio, a second seed
or size, a clock) is left out, or its panel says so. How rows come about is `results.py`'s business.
"""

from __future__ import annotations

from pathlib import Path

from variator_jax.experiment.figure_curves import neuron_figure, size_figure
from variator_jax.experiment.figure_parts import ARM_GROUPS, ARM_NAMES, Rows, save
from variator_jax.experiment.figure_quality import ablations_figure, ratio_figure

__all__ = ["ARM_GROUPS", "ARM_NAMES", "ablations", "neuron_curve", "ratio_curve", "size_curve"]


def ratio_curve(rows: Rows, path: Path, metric: str = "accuracy") -> None:
    """Saves quality against the compression ratio (the paper's Figure 3), see `ratio_figure`."""
    save(ratio_figure(rows, metric), path)


def size_curve(rows: Rows, path: Path) -> None:
    """Saves gap, costs and speed against backbone size (Figure 4), see `size_figure`."""
    save(size_figure(rows), path)


def ablations(rows: Rows, path: Path, ratio: int, metric: str = "accuracy") -> None:
    """Saves every arm at one compression ratio, see `ablations_figure`."""
    save(ablations_figure(rows, ratio, metric), path)


def neuron_curve(neurons: Rows, path: Path) -> None:
    """Saves the shares of activated neurons (Figure 5), see `neuron_figure`."""
    save(neuron_figure(neurons), path)
