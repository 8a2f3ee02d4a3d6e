"""The plan of an experiment, and that every packaged one is what the built-in engine can run."""

import pytest

from variator_jax import gin_utils
from variator_jax.errors import ConfigError
from variator_jax.evaluation.data import EvalData
from variator_jax.experiment import grid
from variator_jax.experiment.grid import Experiment, configure, plan
from variator_jax.train import train

GRID = dict(
    recipe="experiments/small", backbones=("nano",), tasks=("sst2", "rte"), ratios=(2, 4),
    seeds=(0, 1), arms=("variator", "no_ffn", "mean_weights", "student"),
)  # fmt: skip
FOLDERS = ["TEXT_DIR='texts'", "GLUE_DIR='glue'"]
BASE = ["BACKBONES=('t5_1_0_base',)", "BACKBONE_PATHS={'t5_1_0_base': 'given'}"]
PAPER = ["MODEL_DIR='runs/paper'", "VOCABULARY='spiece.model'", *BASE]
GIVEN = dict.fromkeys(
    ("sizes_docs", "sites_docs", "sites_docs_mini", "sites_labels", "sites_sentences"), []
)
GIVEN |= {"glue_small": FOLDERS, "glue_multitask": FOLDERS, "paper": PAPER}
# Of runs that train a backbone, by recipe.
OPTIMIZERS = dict.fromkeys(("experiments/docs", "experiments/sites"), "adafactor")
OPTIMIZERS |= {"experiments/paper": "adamw"}


def _plan(folder, **changes):
    return plan(Experiment(str(folder), **(GRID | changes)))


def test_every_step_comes_after_those_it_needs_and_only_once(tmp_path):
    steps = _plan(tmp_path)
    assert len({step.result for step in steps}) == len(steps)
    kinds = [step.kind for step in steps]
    # A backbone; 2 teachers a seed; plugins of 2 ratios and one ablation a seed; per task and seed
    # 3 adaptations and a student, and as many scores with those of the teacher and the control.
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "backbone": 1, "finetune": 4, "pretrain": 6, "adapt": 12, "student": 4,
        "score": 4 * (1 + 2 + 1 + 1 + 1),
    }  # fmt: skip
    before = set()
    for step in steps:
        for name in ("INITIAL_CHECKPOINT_PATH", "INITIAL_PLUGIN_PATH"):
            assert step.macros.get(name) in before | {None}
        before.add(str(step.result.parents[1]))


def test_the_arms_differ_by_what_their_names_mean(tmp_path):
    arms = ("mean_weights", "no_decompression", "loss_task", "no_pretraining")
    macros = {
        (step.kind, step.result.parents[1].name): step.macros
        for step in _plan(tmp_path, arms=arms, tasks=("sst2",), seeds=(3,))
    }
    plugin = str(tmp_path / "nano" / "plugins" / "variator_k4_seed_3")
    for kind, folder, expected in (
        ("adapt", "mean_weights_k4", {"COMPRESSION": "mean", "SEED": 3}),
        ("pretrain", "mean_weights_k4_seed_3", {"COMPRESSION": "mean"}),
        ("adapt", "no_decompression_k4", {"DECOMPRESSION": "repeat"}),
        ("adapt", "no_pretraining_k4", {"INITIAL_PLUGIN_PATH": None}),
        ("adapt", "loss_task_k4", {"TASK_LOSS": 1.0, "ENCODER_HIDDEN_LOSS": 0.0}),
        ("adapt", "loss_task_k4", {"INITIAL_PLUGIN_PATH": plugin}),
    ):
        assert expected.items() <= macros[kind, folder].items()


def test_plugins_of_ones_own_are_arms_with_their_sites_ratio_seeds_and_rival(tmp_path):
    span = {"SITES": ("span all size=1",), "RATIO": 8}
    plugins = {"span_x8": span, "narrow": {**span, "ARM": "student", "SEEDS": (0,)}}
    steps = _plan(tmp_path, arms=(), tasks=("sst2",), plugins=plugins)
    folders = [step.result.parents[1] for step in steps if step.kind == "adapt"]
    assert [path.name for path in folders] == ["span_x8_k8"] * 2
    assert [path.parent.name for path in folders] == ["seed_0", "seed_1"]
    (narrow,) = (step for step in steps if step.kind == "student")
    (adapt, _) = (step for step in steps if step.kind == "adapt")
    for step in (adapt, narrow):
        assert {"RATIO": 8, "SITES": span["SITES"]}.items() <= step.macros.items()
    assert adapt.macros["INITIAL_PLUGIN_PATH"] is None
    mean = {"mean": {**span, "ARM": "mean_weights", "INITIAL_PLUGIN_PATH": "before"}}
    alone = _plan(tmp_path, arms=(), tasks=("sst2",), seeds=(0,), plugins=mean)
    (step,) = (step for step in alone if step.kind == "adapt")
    assert step.macros["COMPRESSION"] == "mean"  # an arm's own macros stay
    assert step.macros["INITIAL_PLUGIN_PATH"] == "before"
    given = {"given": {"ARM": "variator", "INITIAL_PLUGIN_PATH": "before"}}
    assert "pretrain" not in {step.kind for step in _plan(tmp_path, arms=(), plugins=given)}
    scored = [step.cell.arm.name for step in steps if step.cell and step.macros.get("SITES")]
    assert scored == ["span_x8", "narrow", "span_x8"]


def test_a_backbone_may_be_given_and_seeds_may_share_a_teacher(tmp_path):
    steps = _plan(tmp_path, backbone_paths={"nano": "/given"}, one_teacher=True)
    assert steps[0].kind == "finetune" and steps[0].macros["INITIAL_CHECKPOINT_PATH"] == "/given"
    assert "backbone" not in {step.kind for step in steps}
    assert [step.macros["SEED"] for step in steps if step.kind == "finetune"] == [0, 0]  # a task
    adapted = [step.macros for step in steps if step.kind == "adapt" and step.macros["SEED"] == 1]
    assert f"{tmp_path}/nano/sst2/seed_0/teacher" in {m["INITIAL_CHECKPOINT_PATH"] for m in adapted}


@pytest.mark.parametrize("wrong, message", [
    ({"arms": ("variatr",)}, "ARMS names 'variatr'.* Did you mean 'variator'"),
    ({"plugins": {"student": {}}}, "PLUGINS names 'student', which is an arm"),
    ({"plugins": {"x": {"ARM": "studnt"}}}, "PLUGINS' ARM names 'studnt'.*'student'"),
    ({"plugins": {"x": {"SEEDS": 0}}}, "SEEDS of the plugin 'x' is a tuple"),
    ({"plugins": {"x": {"SEEDS": ()}}}, "SEEDS of the plugin 'x' is a tuple of one or more"),
    ({"ratios": (1, 2)}, "ratio is 1; expected a whole number of at least 2"),
    ({"tasks": "sst2"}, "TASKS is a tuple"),
    ({"seeds": ()}, "SEEDS is a tuple of different"),
    ({"ratios": (2, 2)}, "RATIOS is a tuple of different"),
    ({"backbone_paths": {"mini": "x"}}, "BACKBONE_PATHS names 'mini'"),
    ({"latency": (4,)}, r"LATENCY is \(rows, tokens\)"),
    ({"model_dir": "gs://bucket/runs"}, "MODEL_DIR is 'gs://bucket/runs'; .* a local folder"),
])  # fmt: skip
def test_wrong_grids_are_refused_by_name(tmp_path, wrong, message):
    with pytest.raises(ConfigError, match=message):
        Experiment(**({"model_dir": str(tmp_path)} | GRID | wrong))


def test_an_interrupted_run_ends_with_the_code_of_its_signal(tmp_path, monkeypatch):
    interrupted = train.TrainResult(3, True, None)
    monkeypatch.setattr(grid, "configure", lambda experiment, step: None)
    monkeypatch.setattr(gin_utils, "configured", lambda function: lambda: interrupted)
    with pytest.raises(SystemExit, match="143"):
        grid.run_training(None, _plan(tmp_path)[0])


@pytest.mark.parametrize("name", GIVEN)
def test_each_kind_of_step_of_a_packaged_experiment_has_all_that_it_needs(name):
    gin_utils.parse([f"experiments/{name}.gin"], GIVEN[name])
    experiment = gin_utils.configured(Experiment)()
    kinds = {step.config: step for step in plan(experiment)}
    assert len(kinds) > 2 * len(experiment.tasks)
    trained = {"pretrain": "plugin", "adapt": "plugin", "student": "student"}
    for step in kinds.values():
        configure(experiment, step)
        if step.kind == "score":
            assert gin_utils.configured(EvalData)
            assert gin_utils.macro("TASK_FEATURE_LENGTHS")["inputs"] >= 32
            continue
        assert gin_utils.configured(train.train)
        assert gin_utils.macro("TRAINED") == trained.get(step.kind, "backbone")
        assert gin_utils.macro("MODEL_DIR") == str(step.result.parents[1])
        # What stages share does not undo what their own run sets.
        of_backbone = OPTIMIZERS.get(experiment.recipe, "adamw_relative")
        expected = of_backbone if step.kind in ("backbone", "finetune") else "adamw"
        assert gin_utils.macro("OPTIMIZER") == expected
