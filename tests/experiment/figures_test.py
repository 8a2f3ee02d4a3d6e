"""The figures of an experiment hold what their rows say; how they look is for eyes."""

import itertools

import pandas as pd
import pytest

from variator_jax.experiment import figures
from variator_jax.experiment.grid import ARMS

SIZES = {"nano": 1_400_000, "micro": 4_300_000, "mini": 11_900_000}


def table(tasks=("sst2", "rte", "mean"), backbones=("nano",), arms=(), seeds=3):
    """Rows of the method at ratios 2, 4 and 8, of other arms at 4 and of arms without a ratio."""
    settings = [*(("variator", k) for k in (2, 4, 8)), *((arm, 4) for arm in arms)]
    rows = itertools.product(backbones, tasks, [*settings, ("backbone", 1), ("no_ffn", 1)])
    frame = pd.DataFrame(
        [(backbone, task, *setting) for backbone, task, setting in rows],
        columns=["backbone", "task", "arm", "ratio"],
    )
    ratio, allowed = frame["ratio"], 1 + 0.2 * frame["ratio"]
    mean = frame["arm"].map({"backbone": 80.0, "no_ffn": 60.0}).fillna(80 - ratio / 2)
    frame = frame.assign(seeds=seeds, mean=mean, gap=80 - mean, flops_saved=0.6)
    std = 0.2 * ratio * (seeds > 1)
    return frame.assign(
        std=std, gap_std=std / 2, parameters=frame["backbone"].map(SIZES),
        extra_parameters_share=0.01 * ratio, allowed=allowed, speedup=0.9 * allowed,
        milliseconds=8.0, spread=0.8,
    )  # fmt: skip


def ticks(axes, which="x"):
    return [label.get_text() for label in getattr(axes, f"get_{which}ticklabels")()]


def legend(figure):
    return {text.get_text() for text in figure.legends[0].get_texts()}


def curve(axes, label, upright=1):
    """The points of a curve, and half the lengths of its error bars."""
    (drawn,) = [c for c in axes.containers if c.get_label() == label]
    segments = drawn.lines[2][0].get_segments()
    bars = [(s[1][upright] - s[0][upright]) / 2 for s in segments if len(s)]
    return list(drawn.lines[0].get_xdata()), list(drawn.lines[0].get_ydata()), bars


def test_quality_against_the_ratio_is_a_curve_for_each_arm_of_several_ratios():
    rows = table(arms=("student", "mean_pool"))
    more = rows[rows["arm"] == "mean_pool"].assign(ratio=2)
    figure = figures.ratio_figure(pd.concat([rows, more]), "F1")
    assert [axes.get_title() for axes in figure.axes] == ["sst2", "rte", "mean of 2 tasks"]
    axes = figure.axes[0]
    assert axes.get_ylabel() == "F1 (%)" and ticks(axes) == ["2", "4", "8"]
    drawn = curve(axes, "compression plugin")
    assert drawn[1:] == ([79.0, 78.0, 76.0], pytest.approx([0.4, 0.8, 1.6]))
    assert curve(axes, "mean-pooling, untrained")[1] == [78.0, 78.0]
    assert figure.get_suptitle() == "nano; error bars: standard deviation over 3 seeds"


def test_all_arms_at_one_ratio():
    arms = [arm for arm in ARMS if arm not in ("backbone", "variator", "no_ffn")]
    figure = figures.arms_figure(table(arms=arms), 4, "accuracy")
    axes = figure.axes[0]
    assert ticks(axes, "y") == [ARMS[arm].meaning for arm in ["variator", *arms, "no_ffn"]]
    assert legend(figure) == {"uncompressed", "ours", "ablations", "baselines and controls"}
    assert curve(axes, "ours", upright=0) == ([78.0], [0.0], pytest.approx([0.8]))
    texts = sorted(text.get_text() for text in axes.texts)
    assert texts == [*["+2.0"] * (1 + len(arms)), "+20.0", "gap"]


def test_sizes():
    figure = figures.size_figure(table(backbones=SIZES))
    gap, flops, weights, speed = figure.axes
    assert ticks(gap) == ["nano\n1.4 M", "micro\n4.3 M", "mini\n11.9 M"]
    # Half of the spread, as a share of the time: 0.05 of the speed-up.
    drawn = (gap, 4, 2.0, 0.4), (flops, 2, 60.0, 0), (weights, 8, 8.0, 0), (speed, 4, 1.62, 0.081)
    for axes, ratio, height, bar in drawn:
        expected = pytest.approx([height] * 3), pytest.approx([bar] * 3)
        assert curve(axes, f"k = {ratio}")[1:] == expected
    hollow = [list(line.get_ydata()) for line in speed.lines if line.get_mfc() == "white"]
    assert [pytest.approx([1 + 0.2 * k] * 3) for k in (2, 4, 8)] == [y for y in hollow if y]
    assert figure.get_suptitle().startswith("mean of 2 tasks")
    figure = figures.size_figure(table(("sst2",), seeds=1).assign(speedup=float("nan")))
    assert figure.get_suptitle() == "sst2; one seed"


def test_neurons_against_the_ratio_and_layer_by_layer():
    shares = [
        dict(backbone=backbone, ratio=k, layer=layer, token=0.05, share=0.1 * k, union=0.2 * k)
        for backbone, layers in (("nano", (0, 1)), ("mini", (0, 1, 2)))
        for k in (2, 4)
        for layer in (*layers, "mean")
    ]
    means, _, mini = figures.neuron_figure(pd.DataFrame(shares)).axes
    # Ratio 1 is one token, whose share every row holds.
    assert ticks(means) == ["1", "2", "4"]
    heights = [list(line.get_ydata()) for line in means.lines[:2]]
    assert heights == [pytest.approx([5.0, 20.0, 40.0]), pytest.approx([5.0, 40.0, 80.0])]
    assert mini.get_title() == "mini, layer by layer" and len(mini.lines[0].get_xdata()) == 3
