"""`variator experiment` from gin files to the report, with real stages and cells, in miniature."""

import json
import re

import pytest
import tiny_runs

from variator_jax import cli

SETTINGS = dict(
    MIXTURE_OR_TASK_NAME=tiny_runs.TASK, TASK_FEATURE_LENGTHS={"inputs": 18, "targets": 6},
    BATCH_SIZE=16, WARMUP_STEPS=0, SCHEDULE="constant", BOTTLENECK=4, EVAL_PERIOD=0, EVAL_BATCHES=1,
)  # fmt: skip
RIVALS = ("mean_pool", "similar_tokens", "truncated", "no_ffn", "student")
GRID = dict(
    RECIPE="small", BACKBONES=("tiny",), TASKS=("parity",), RATIOS=(2,), ARM_RATIOS=(2,),
    SEEDS=(0,), ARMS=("variator", "no_adaptation", *RIVALS), LATENCY=(2, 8), SETTINGS=SETTINGS,
)  # fmt: skip
SHAPE = dict(
    name="nano", vocab_size=384, embed_dim=16, num_heads=2, head_dim=8, mlp_dim=32,
    num_encoder_layers=1, num_decoder_layers=1,
)  # fmt: skip
BACKBONE = """
from __gin__ import dynamic_registration
from variator_jax.backbones.t5 import config
BACKBONE = @config.get_config()
config.get_config.dtype = %DTYPE
config.get_config.dropout_rate = %DROPOUT_RATE
"""
STAGE = "include 'engine.gin'\ninclude 'plugins/variator.gin'\ninclude 'runs/{}.gin'\n"


def _bindings(values, prefix=""):
    return "".join(f"{prefix}{name} = {value!r}\n" for name, value in values.items())


FILES = {
    f"small/{kind}": f"{STAGE.format(kind)}TRAIN_STEPS = 2"
    for kind in ("backbone", "finetune", "pretrain", "adapt", "student")
}
FILES |= {
    "backbones/tiny": BACKBONE + _bindings(SHAPE, "config.get_config."),
    "small/parity": "TRAIN_STEPS = 3",
    "small/score": f"{STAGE.format('pretrain')}include 'runs/eval.gin'",
    "grid": f"include 'experiments/experiment.gin'\n{_bindings(GRID)}",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("experiment")
    for name, text in FILES.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / f"{name}.gin").write_text(text)
    assert _experiment(root) == 0
    return root


def _experiment(root, *more):
    paths = [f"--gin_search_paths={root}", f"--gin.MODEL_DIR={root}/run"]
    return cli.main(["experiment", "--gin_file=grid.gin", *paths, *more])


def test_each_arm_has_a_score_and_costs_of_its_own_kind(folder):
    table = json.loads((folder / "run" / "results.json").read_text())
    rows = {row["arm"]: row for row in table}
    assert all(0 <= row["mean"] <= 100 and row["examples"] == 64 for row in table)
    assert len(rows) == 8  # one of them is the teacher
    saved = {arm: row["flops_saved"] for arm, row in rows.items()}
    assert saved["backbone"] == 0 < saved["variator"] < saved["mean_pool"] < saved["no_ffn"]
    assert saved["similar_tokens"] >= saved["variator"] == saved["no_adaptation"]
    assert saved["truncated"] >= saved["variator"]
    extra = {arm: row["extra_parameters"] for arm, row in rows.items()}
    assert extra["variator"] == extra["no_adaptation"] > 0 < extra["student"]
    assert extra["mean_pool"] == extra["similar_tokens"] == extra["no_ffn"] == 0


def test_the_report_and_its_figures_are_there(folder):
    report = (folder / "run" / "results.md").read_text()
    assert re.search(r"compression plugin +\| 2 ", report) and "tokens in float32" in report
    names = ("results.csv", "ratios_tiny.png", "arms_tiny_k2.svg", "neurons.png")
    assert all((folder / "run" / name).stat().st_size > 0 for name in names)


def test_a_dry_run_shows_what_is_missing(folder, capsys):
    assert _experiment(folder, "--gin.RATIOS=(2, 4)", "--dry_run") == 0
    shown = capsys.readouterr().out
    assert "score     8 of 9 done" in shown and "missing: adapt tiny/parity/seed_0/" in shown


@pytest.mark.parametrize("override, message", [
    ("--gin.TASKS=('partiy',)", "small/partiy.gin' does not exist"),
    ("--gin.ONE_TEACHER=True", "teacher_seed"),
    ("--engine=t5x", "leave --engine out"),
])  # fmt: skip
def test_errors_are_found_before_anything_runs(folder, capsys, override, message):
    assert _experiment(folder, override) == 2
    assert message in capsys.readouterr().err
