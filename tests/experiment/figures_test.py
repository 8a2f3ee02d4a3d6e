"""The figures of an experiment hold what their rows say; how they look is for eyes."""

import pandas as pd
import pytest

from variator_jax.experiment import figures
from variator_jax.experiment.arms import ARMS
from variator_jax.experiment.figure_curves import neuron_figure, size_figure
from variator_jax.experiment.figures import arms_figure, ratio_figure

SIZES = {"nano": 1_400_000, "micro": 4_300_000, "mini": 11_900_000}


def row(arm, ratio, mean, backbone="nano", task="sst2", seeds=3, timed=True):
    std, allowed = 0.2 * ratio * (seeds > 1), 1 + 0.2 * ratio
    latency = dict(milliseconds=8.0, spread=0.8, allowed=allowed, speedup=0.9 * allowed)
    if not timed:
        latency = dict.fromkeys(latency, float("nan"))
    names = dict(backbone=backbone, task=task, arm=arm, ratio=ratio, parameters=SIZES[backbone])
    scores = dict(mean=mean, std=std, seeds=seeds, gap=80.0 - mean, gap_std=std / 2)
    costs = dict(flops_saved=0.6 * (1 - 1 / ratio), extra_parameters_share=0.01 * ratio)
    return names | scores | costs | latency


def table(tasks=("sst2",), backbones=("nano",), arms=("variator",), **options):
    """The method at ratios 2, 4 and 8, other arms at 4; the mean of several tasks."""
    rows = []
    for backbone in backbones:
        for task in [*tasks, *["mean"] * (len(tasks) > 1)]:
            names = dict(backbone=backbone, task=task, **options)
            rows += [row("backbone", 1, 80.0, **names), row("no_ffn", 1, 60.0, **names)]
            for arm in arms:
                ratios = (2, 4, 8) if arm == "variator" else (4,)
                rows += [row(arm, ratio, 80 - ratio / 2, **names) for ratio in ratios]
    return pd.DataFrame(rows)


def shares(backbone="nano", layers=(0, 1)):
    return [
        dict(backbone=backbone, ratio=ratio, layer=layer, token=0.05, share=0.1 * ratio)
        | dict(union=0.2 * ratio)
        for ratio in (2, 4)
        for layer in (*layers, "mean")
    ]


def titles(figure):
    return [axes.get_title() for axes in figure.axes]


def ticks(axes, which="x"):
    return [label.get_text() for label in getattr(axes, f"get_{which}ticklabels")()]


def legend(owner):
    box = owner.legends[0] if hasattr(owner, "legends") else owner.get_legend()
    return [text.get_text() for text in box.get_texts()]


def curve(axes, label, upright=1):
    """The points of a curve, and half the lengths of its error bars."""
    (drawn,) = [c for c in axes.containers if c.get_label() == label]
    segments = drawn.lines[2][0].get_segments() if drawn.lines[2] else []
    bars = [(high[upright] - low[upright]) / 2 for low, high in segments]
    return list(drawn.lines[0].get_xdata()), list(drawn.lines[0].get_ydata()), bars


def test_quality_against_the_ratio():
    figure = ratio_figure(table(("sst2", "rte"), arms=("variator", "student")), "F1")
    assert titles(figure) == ["sst2", "rte", "mean of 2 tasks"]
    axes = figure.axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("compression ratio k", "F1 (%)")
    assert (axes.get_xscale(), ticks(axes)) == ("log", ["2", "4", "8"])
    ratios, scores, bars = curve(axes, "compression plugin")
    assert (ratios, scores) == ([2, 4, 8], [79.0, 78.0, 76.0])
    assert bars == pytest.approx([0.4, 0.8, 1.6])
    # The student has one ratio only, so it is no curve; the control needs none.
    assert set(legend(figure)) == {"uncompressed", "no encoder FFN (control)", "compression plugin"}
    dashed = [line for line in axes.lines if line.get_linestyle() == "--"]
    assert [line.get_ydata()[0] for line in dashed] == [80.0]
    (band,) = axes.patches
    assert band.get_height() == pytest.approx(2 * 0.2)
    assert figure.get_suptitle() == "nano; error bars: standard deviation over 3 seeds"


def test_an_arm_of_several_ratios_is_a_curve_and_one_seed_has_no_deviation():
    other = [row("mean_pool", ratio, mean, seeds=1) for ratio, mean in ((2, 70.0), (4, 65.0))]
    figure = ratio_figure(pd.concat([table(seeds=1), pd.DataFrame(other)]), "accuracy")
    (axes,) = figure.axes
    ratios, scores, bars = curve(axes, "mean-pooling, untrained")
    assert (scores, bars) == ([70.0, 65.0], [0, 0])
    # A little aside, so that both error bars can be seen.
    assert ratios[0] > 2 > curve(axes, "compression plugin")[0][0]
    assert not axes.patches
    assert "one seed" in figure.get_suptitle()


def test_all_arms_at_one_ratio():
    arms = [arm for arm in ARMS if arm not in ("backbone", "no_ffn")]
    figure = arms_figure(table(("sst2", "rte"), arms=arms), 4, "accuracy")
    assert titles(figure) == ["sst2", "rte", "mean of 2 tasks"]
    axes = figure.axes[0]
    assert axes.get_xlabel() == "accuracy (%)"
    assert ticks(axes, "y") == [ARMS[arm].meaning for arm in [*arms, "no_ffn"]]
    assert not any(ticks(figure.axes[1], "y"))
    assert legend(figure) == ["uncompressed", "ours", "ablations", "baselines and controls"]
    scores, heights, bars = curve(axes, "ours", upright=0)
    assert (scores, heights, bars) == ([78.0], [0.0], pytest.approx([0.8]))
    # The control has no ratio, and each arm's gap is written beside its line.
    assert 60.0 in curve(axes, "baselines and controls")[0]
    texts = sorted(text.get_text() for text in axes.texts)
    assert texts == [*["+2.0"] * len(arms), "+20.0", "gap"]
    assert figure.get_suptitle().startswith("k = 4; nano;")


def test_sizes():
    figure = size_figure(table(("sst2", "rte"), SIZES))
    gap, flops, weights, speed = figure.axes
    assert speed.get_ylabel() == "encoder speed-up (times)"
    assert ticks(gap) == ["nano\n1.4 M", "micro\n4.3 M", "mini\n11.9 M"]
    assert gap.get_xscale() == "log"
    assert curve(gap, "k = 4")[1:] == ([2.0] * 3, pytest.approx([0.4] * 3))
    assert curve(flops, "k = 2")[1] == pytest.approx([30.0] * 3)
    assert curve(weights, "k = 8")[1] == pytest.approx([8.0] * 3)
    # Half of the spread, as a share of the time: 0.05 of the speed-up.
    _, speedups, bars = curve(speed, "k = 4")
    assert speedups == pytest.approx([0.9 * 1.8] * 3)
    assert bars == pytest.approx([0.9 * 1.8 * 0.05] * 3)
    hollow = [list(line.get_ydata()) for line in speed.lines if line.get_mfc() == "white"]
    assert [pytest.approx([1 + 0.2 * k] * 3) for k in (2, 4, 8)] == [y for y in hollow if y]
    assert {"k = 2", "k = 4", "k = 8", "allowed by the saved FLOPs"} < set(legend(figure))
    assert figure.get_suptitle().startswith("mean of 2 tasks")


def test_one_size_that_was_not_timed_has_no_speed():
    figure = size_figure(table(timed=False))
    assert ticks(figure.axes[0]) == ["nano\n1.4 M"]
    assert len(figure.axes) == 3
    assert figure.get_suptitle().startswith("sst2;")


def test_neurons_against_the_ratio_and_layer_by_layer():
    figure = neuron_figure(pd.DataFrame([*shares(), *shares("mini", layers=(0, 1, 2))]))
    assert titles(figure) == ["mean over layers", "nano, layer by layer", "mini, layer by layer"]
    means, _, mini = figure.axes
    # Ratio 1 is one token, whose share every row holds.
    assert ticks(means) == ["1", "2", "4"]
    merged, union = means.lines[:2]
    assert list(merged.get_ydata()) == pytest.approx([5.0, 20.0, 40.0])
    assert list(union.get_ydata()) == pytest.approx([5.0, 40.0, 80.0])
    assert legend(means) == ["nano", "mini", "merged input", "all tokens of its group"]
    assert legend(mini)[:3] == ["one token", "k = 2", "k = 4"]
    assert [len(line.get_xdata()) for line in mini.lines[:2]] == [3, 3]


def test_a_figure_is_saved_as_png_and_svg(tmp_path):
    figures.save(lambda: size_figure(table()), tmp_path / "sizes.png")
    assert (tmp_path / "sizes.png").read_bytes().startswith(b"\x89PNG")
    first = (tmp_path / "sizes.svg").read_bytes()
    figures.save(lambda: size_figure(table()), tmp_path / "sizes.png")
    assert (tmp_path / "sizes.svg").read_bytes() == first
