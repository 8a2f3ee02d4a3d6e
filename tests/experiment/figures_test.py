"""The figures of an experiment hold what their rows say; how they look is for eyes."""

import pytest

from variator_jax.errors import DataError
from variator_jax.experiment import figures
from variator_jax.experiment.arms import ARMS
from variator_jax.experiment.figure_curves import neuron_figure, size_figure
from variator_jax.experiment.figure_quality import ablations_figure, ratio_figure
from variator_jax.experiment.figures import ARM_NAMES

SIZES = {"nano": 1_400_000, "micro": 4_300_000, "mini": 11_900_000}
LOST = {
    arm: 0.25 + 0.25 * i for i, arm in enumerate(ARM_NAMES) if arm not in ("backbone", "no_ffn")
}


def row(arm, ratio, mean, backbone="nano", task="sst2", seeds=3, timed=True):
    std = 0.2 * ratio if seeds > 1 else 0.0
    allowed = 1 + 0.2 * ratio
    clock = dict(milliseconds=8.0, spread=0.8, allowed=allowed, speedup=0.9 * allowed)
    return dict(
        backbone=backbone,
        task=task,
        arm=arm,
        ratio=ratio,
        mean=mean,
        std=std,
        seeds=seeds,
        gap=80.0 - mean,
        gap_std=std / 2,
        flops_saved=0.6 * (1 - 1 / ratio),
        extra_parameters_share=0.01 * ratio,
        parameters=SIZES[backbone],
        **(clock if timed else dict.fromkeys(clock)),
    )


def table(tasks=("sst2",), backbones=("nano",), arms=("variator",), ratios=(2, 4, 8), **options):
    """The method at all ratios, other arms at 4; the mean of the tasks where there are several."""
    found = []
    for backbone in backbones:
        for task in [*tasks, *["mean"] * (len(tasks) > 1)]:
            where = dict(backbone=backbone, task=task, **options)
            found += [row("backbone", 1, 80.0, **where), row("no_ffn", 1, 60.0, **where)]
            for arm in arms:
                for ratio in ratios if arm == "variator" else (4,):
                    found.append(row(arm, ratio, 80 - LOST[arm] * ratio, **where))
    return found


def shares(backbone="nano", ratios=(2, 4), layers=(0, 1), token=True):
    return [
        dict(backbone=backbone, ratio=ratio, layer=layer, share=0.1 * ratio, union=0.2 * ratio)
        | (dict(token=0.05) if token else {})
        for ratio in ratios
        for layer in (*layers, "mean")
    ]


def titles(figure):
    return [axes.get_title() for axes in figure.axes]


def ticks(axes, which="x"):
    return [label.get_text() for label in getattr(axes, f"get_{which}ticklabels")()]


def legend(owner):
    found = owner.legends[0] if hasattr(owner, "legends") else owner.get_legend()
    return [text.get_text() for text in found.get_texts()]


def bars(axes, label, upright=True):
    """Half the length of each error bar of a curve."""
    (found,) = [c for c in axes.containers if c.get_label() == label]
    if not found.lines[2]:
        return None
    side = int(upright)
    segments = found.lines[2][0].get_segments()
    return [(high[side] - low[side]) / 2 for low, high in segments]


def curve(axes, label):
    (found,) = [c for c in axes.containers if c.get_label() == label]
    return list(found.lines[0].get_xdata()), list(found.lines[0].get_ydata())


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_every_arm_has_a_name_and_a_group():
    assert set(ARM_NAMES) == set(ARMS)
    grouped = [arm for arms in figures.ARM_GROUPS.values() for arm in arms]
    assert sorted([*grouped, "backbone"]) == sorted(ARM_NAMES)


def test_quality_against_the_ratio():
    figure = ratio_figure(table(("sst2", "rte"), arms=("variator", "student")), metric="F1")
    assert titles(figure) == ["sst2", "rte", "mean of 2 tasks"]
    axes = figure.axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("compression ratio k", "F1 (%)")
    assert (axes.get_xscale(), ticks(axes)) == ("log", ["2", "4", "8"])
    assert curve(axes, "compression plugin") == ([2, 4, 8], [79.0, 78.0, 76.0])
    assert bars(axes, "compression plugin") == pytest.approx([0.4, 0.8, 1.6])
    # The student has one ratio only, so it is no curve; the control needs none.
    assert set(legend(figure)) == {"uncompressed", "no encoder FFN (control)", "compression plugin"}
    dashed = [line for line in axes.lines if line.get_linestyle() == "--"]
    assert [line.get_ydata()[0] for line in dashed] == [80.0]
    (band,) = axes.patches
    assert band.get_height() == pytest.approx(2 * 0.2)
    assert figure.get_suptitle() == "nano; error bars: standard deviation over 3 seeds"


def test_an_arm_of_several_ratios_is_a_curve_beside_the_method():
    rows = [*table(), row("mean_pool", 2, 70.0), row("mean_pool", 4, 65.0)]
    axes = ratio_figure(rows).axes[0]
    ratios, scores = curve(axes, ARM_NAMES["mean_pool"])
    assert scores == [70.0, 65.0]
    # A little aside, so that both error bars can be seen.
    assert ratios[0] > 2 > curve(axes, "compression plugin")[0][0]


def test_one_seed_has_neither_error_bars_nor_a_band():
    figure = ratio_figure(table(seeds=1))
    assert bars(figure.axes[0], "compression plugin") is None
    assert not figure.axes[0].patches
    assert "one seed" in figure.get_suptitle()


def test_several_backbones_are_named_in_the_panels():
    assert titles(ratio_figure(table(("a", "b"), ("nano", "mini")))) == [
        "nano: a",
        "nano: b",
        "nano: mean of 2 tasks",
        "mini: a",
        "mini: b",
        "mini: mean of 2 tasks",
    ]


def test_sizes():
    figure = size_figure(table(("sst2", "rte"), SIZES))
    gap, flops, weights, speed = figure.axes
    assert [axes.get_ylabel() for axes in figure.axes] == [
        "quality gap (points)",
        "encoder FLOPs saved (%)",
        "extra parameters (% of backbone)",
        "encoder speed-up (times)",
    ]
    assert ticks(gap) == ["nano\n1.4 M", "micro\n4.3 M", "mini\n11.9 M"]
    assert gap.get_xscale() == "log"
    assert curve(gap, "k = 4")[1] == [2.0] * 3
    assert bars(gap, "k = 4") == pytest.approx([0.4] * 3)
    assert curve(flops, "k = 2")[1] == pytest.approx([30.0] * 3)
    assert curve(weights, "k = 8")[1] == pytest.approx([8.0] * 3)
    assert curve(speed, "k = 4")[1] == pytest.approx([0.9 * 1.8] * 3)
    # Half of the spread, as a share of the time: 0.05 of the speed-up.
    assert bars(speed, "k = 4") == pytest.approx([0.9 * 1.8 * 0.05] * 3)
    hollow = [list(line.get_ydata()) for line in speed.lines if line.get_mfc() == "white"]
    assert [pytest.approx([1 + 0.2 * k] * 3) for k in (2, 4, 8)] == [y for y in hollow if y]
    assert {"k = 2", "k = 4", "k = 8", "allowed by the saved FLOPs"} < set(legend(figure))
    assert figure.get_suptitle().startswith("mean of 2 tasks")


def test_one_size_without_a_clock_says_so():
    figure = size_figure(table(timed=False))
    assert ticks(figure.axes[0]) == ["nano\n1.4 M"]
    assert texts(figure.axes[3]) == ["no latency was measured"]
    assert figure.get_suptitle().startswith("sst2;")


def test_all_arms_at_one_ratio():
    figure = ablations_figure(table(("sst2", "rte"), arms=LOST), 4)
    assert titles(figure) == ["sst2", "rte", "mean of 2 tasks"]
    axes = figure.axes[0]
    assert axes.get_xlabel() == "accuracy (%)"
    assert ticks(axes, "y") == [ARM_NAMES[arm] for arm in ARM_NAMES if arm != "backbone"]
    assert not any(ticks(figure.axes[1], "y"))
    assert legend(figure) == ["uncompressed", "ours", "ablations", "baselines and controls"]
    assert curve(axes, "ours") == ([78.0], [0.0])
    assert bars(axes, "ours", upright=False) == pytest.approx([0.8])
    # The control knows no ratio, and each arm's gap stands beside its line.
    assert curve(axes, "baselines and controls")[0][-1] == 60.0
    assert {"gap", "+2.0", "+20.0"} < set(texts(axes))
    assert figure.get_suptitle().startswith("k = 4; nano;")


def test_a_gap_below_zero_has_a_true_minus_and_a_tiny_one_no_sign():
    rows = [row("variator", 4, 81.5), row("no_adaptation", 4, 80.04), row("student", 8, 10.0)]
    axes = ablations_figure(rows, 4).axes[0]
    assert set(texts(axes)) == {"gap", "\N{MINUS SIGN}1.5", "0.0"}


def test_neurons_against_the_ratio_and_layer_by_layer():
    figure = neuron_figure([*shares("nano"), *shares("mini", layers=(0, 1, 2))])
    assert titles(figure) == ["mean over layers", "nano, layer by layer", "mini, layer by layer"]
    means, _, mini = figure.axes
    assert means.get_ylabel() == "FFN neurons that fire (%)"
    # Ratio 1 is one token, whose share every row holds.
    assert ticks(means) == ["1", "2", "4"]
    merged, union = means.lines[:2]
    assert list(merged.get_ydata()) == pytest.approx([5.0, 20.0, 40.0])
    assert list(union.get_ydata()) == pytest.approx([5.0, 40.0, 80.0])
    assert legend(means) == ["nano", "mini", "merged input", "all tokens of its group"]
    assert mini.get_xlabel() == "encoder layer"
    assert legend(mini)[:3] == ["one token", "k = 2", "k = 4"]
    assert [len(line.get_xdata()) for line in mini.lines[:2]] == [3, 3]


def test_neurons_without_tokens_or_layers():
    means, layers = neuron_figure(shares(layers=(), token=False)).axes
    assert ticks(means) == ["2", "4"]
    assert texts(layers) == ["no single layers"]


@pytest.mark.parametrize(
    "draw", [ratio_figure, size_figure, lambda rows: ablations_figure(rows, 4), neuron_figure]
)
def test_nothing_yet_is_said(draw):
    (axes,) = draw([]).axes
    assert texts(axes) == ["no results yet"]


def test_the_teacher_alone():
    rows = [row("backbone", 1, 80.0)]
    assert "no compressed result" in ratio_figure(rows).axes[0].get_xlabel()
    assert texts(size_figure(rows).axes[0]) == ["no results yet"]
    assert not any(ticks(ablations_figure(rows, 4).axes[0], "y"))


def test_an_unknown_arm_is_told_with_the_nearest():
    with pytest.raises(DataError, match="'student'"):
        ratio_figure([row("studnet", 4, 70.0)])


def test_each_is_saved_as_png_and_svg(tmp_path):
    rows = table()
    figures.ratio_curve(rows, tmp_path / "ratio.png")
    figures.size_curve(rows, tmp_path / "size.png")
    figures.ablations(rows, tmp_path / "arms.png", 4)
    figures.neuron_curve(shares(), tmp_path / "neurons.png")
    names = [
        f"{stem}.{end}" for stem in ("arms", "neurons", "ratio", "size") for end in ("png", "svg")
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert (tmp_path / "ratio.png").read_bytes().startswith(b"\x89PNG")
    first = (tmp_path / "ratio.svg").read_bytes()
    figures.ratio_curve(rows, tmp_path / "ratio.png")
    assert (tmp_path / "ratio.svg").read_bytes() == first
