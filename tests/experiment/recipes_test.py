"""Every stage of every packaged experiment is a command that the built-in engine can run."""

import pytest

from variator_jax import gin_utils
from variator_jax.commands import engines
from variator_jax.evaluation.evaluate import EvalData
from variator_jax.experiment.grid import Cell, Experiment
from variator_jax.experiment.stages import gin_arguments, plan
from variator_jax.train import train

GIVEN = {
    "glue_small": ["TEXT_DIR='texts'", "GLUE_DIR='glue'"],
    "glue_multitask": ["TEXT_DIR='texts'", "GLUE_DIR='glue'"],
    "sizes_docs": [],
    "paper": [
        "MODEL_DIR='runs/paper'",
        "BACKBONES=('t5_1_0_base',)",
        "BACKBONE_PATHS={'t5_1_0_base': 'given'}",
        "VOCABULARY='spiece.model'",
    ],
}


@pytest.fixture(params=GIVEN)
def experiment(request):
    _parse([f"experiments/{request.param}.gin"], GIVEN[request.param])
    return gin_utils.configured(Experiment)()


def _parse(files, bindings, require=True):
    paths = engines.choose(engines.BUILTIN).search_paths("train")
    return gin_utils.parse(files, bindings, paths, require)


def _split(arguments):
    files = [a.removeprefix("--gin_file=") for a in arguments if a.startswith("--gin_file=")]
    return files, [a.removeprefix("--gin.") for a in arguments if a.startswith("--gin.")]


def test_each_kind_of_stage_has_all_that_it_needs(experiment):
    seen = set()
    for step in plan(experiment):
        if isinstance(step, Cell):
            continue
        files, bindings = _split(step.command)
        if tuple(files) in seen:
            continue
        seen.add(tuple(files))
        _parse(files, bindings)
        assert gin_utils.configured(train.train)
        trained = {"pretrain": "plugin", "adapt": "plugin", "student": "student"}
        assert gin_utils.macro("TRAINED") == trained.get(step.kind, "backbone")
        assert gin_utils.macro("MODEL_DIR") == str(step.result.parents[1])
    assert len(seen) >= len(experiment.tasks)


@pytest.mark.parametrize(
    ("recipe", "stage", "optimizer"),
    [
        ("docs", "backbone", "adafactor"),
        ("docs", "finetune", "adafactor"),
        ("docs", "adapt", "adamw"),
        ("small", "backbone", "adamw_relative"),
        ("small", "finetune", "adamw_relative"),
        ("paper", "finetune", "adamw"),
    ],
)
def test_what_stages_share_does_not_undo_what_their_own_run_says(recipe, stage, optimizer):
    task = {"docs": "docs_labels"}.get(recipe, "sst2")
    files = [f"experiments/{recipe}/{name}.gin" for name in (stage, task)]
    _parse(["backbones/nano.gin", *files], [], require=False)
    assert gin_utils.macro("OPTIMIZER") == optimizer


def test_each_task_has_examples_to_be_scored_on(experiment):
    cells = {cell.task: cell for cell in experiment.cells()}
    for cell in cells.values():
        _parse(*_split(gin_arguments(experiment, cell, "score")), require=False)
        assert gin_utils.configured(EvalData)
        assert gin_utils.macro("TASK_FEATURE_LENGTHS")["inputs"] >= 32
