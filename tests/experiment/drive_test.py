"""The driver: order, progress, growth of a grid, and kills at random moments."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from variator_jax.errors import ConfigError, VariatorError
from variator_jax.experiment import drive
from variator_jax.experiment.grid import Cell, Experiment
from variator_jax.experiment.stages import plan

ROOT = Path(__file__).parents[2]
GRID = dict(
    recipe="experiments/small",
    backbones=("nano",),
    tasks=("sst2", "rte"),
    ratios=(2, 4),
    seeds=(0, 1),
    arms=("variator", "no_ffn", "mean_weights", "student"),
)

# Stages and cells that take a while and leave a trace of each time that they end.
SCRIPT = """
import json, pathlib, sys, time
from variator_jax.experiment import drive
from variator_jax.experiment.grid import Experiment

def slowly(kind, name):
    time.sleep(0.01)
    with open(sys.argv[2], "a") as log:
        log.write(f"{kind} {name}\\n")

def run_stage(command):
    (folder,) = [a.partition("=")[2] for a in command if a.startswith("--gin.MODEL_DIR=")]
    kind = [a for a in command if a.startswith("--gin_file=experiments/small/")][0]
    part = "plugin" if "pretrain" in kind or "adapt" in kind else "backbone"
    slowly("stage", folder)
    file = pathlib.Path(folder, part, f"{part}.json")
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    return 0

def score_cell(experiment, cell):
    slowly("cell", cell.name)
    return {"score": float(len(cell.name)), "made": time.time_ns()}

drive.drive(Experiment(**json.loads(sys.argv[1])), run_stage, score_cell)
"""


def _run_stage(command):
    (folder,) = [a.partition("=")[2] for a in command if a.startswith("--gin.MODEL_DIR=")]
    kind = next(a for a in command if a.startswith("--gin_file=experiments/small/"))
    part = "plugin" if "pretrain" in kind or "adapt" in kind else "backbone"
    (Path(folder) / part).mkdir(parents=True)
    (Path(folder) / part / f"{part}.json").write_text("{}")
    return 0


def _score(experiment, cell):
    return {"score": 50.0 + cell.seed, "arm": cell.arm.name}


def test_every_stage_comes_before_the_cell_that_needs_it_and_only_once(tmp_path):
    steps = list(plan(Experiment(str(tmp_path), **GRID)))
    results = [step.result for step in steps if not isinstance(step, Cell)]
    assert len(results) == len(set(results))
    kinds = [step.kind for step in steps if not isinstance(step, Cell)]
    # A backbone; 2 teachers a seed; plugins of 2 ratios and one ablation a seed; per task and seed
    # 3 adaptations and a student.
    assert [kinds.count(k) for k in ("backbone", "finetune", "pretrain", "adapt", "student")] == [
        1, 4, 6, 12, 4,
    ]  # fmt: skip
    assert sum(isinstance(step, Cell) for step in steps) == 4 * (1 + 2 + 1 + 1 + 1)
    before = set()
    for step in steps:
        if isinstance(step, Cell):
            continue
        for argument in step.command:
            name, _, path = argument.partition("=")
            if name in ("--gin.INITIAL_CHECKPOINT_PATH", "--gin.INITIAL_PLUGIN_PATH"):
                assert path in before
        before.add(str(step.result.parents[1]))


def test_the_arms_differ_by_what_their_names_say(tmp_path):
    arms = ("mean_weights", "no_decompression", "loss_task", "no_pretraining")
    grid = GRID | {"arms": arms, "tasks": ("sst2",), "seeds": (3,)}
    commands = {
        (step.kind, step.result.parents[1].name): step.command
        for step in plan(Experiment(str(tmp_path), **grid))
        if not isinstance(step, Cell)
    }
    mean = commands["adapt", "mean_weights_k4"]
    assert "--gin.COMPRESSION=mean" in mean and "--gin.SEED=3" in mean
    assert "--gin.COMPRESSION=mean" in commands["pretrain", "mean_weights_k4_seed_3"]
    assert "--gin.DECOMPRESSION=repeat" in commands["adapt", "no_decompression_k4"]
    assert "--gin.INITIAL_PLUGIN_PATH=None" in commands["adapt", "no_pretraining_k4"]
    task = commands["adapt", "loss_task_k4"]
    assert "--gin.TASK_LOSS=1.0" in task and "--gin.ENCODER_HIDDEN_LOSS=0.0" in task
    plugin = tmp_path / "nano" / "plugins" / "variator_k4_seed_3"
    assert f"--gin.INITIAL_PLUGIN_PATH={plugin}" in task


def test_a_backbone_that_is_given_is_not_trained(tmp_path):
    grid = GRID | {"backbone_paths": {"nano": "/given"}}
    stages = [s for s in plan(Experiment(str(tmp_path), **grid)) if not isinstance(s, Cell)]
    assert all(stage.kind != "backbone" for stage in stages)
    assert "--gin.INITIAL_CHECKPOINT_PATH=/given" in stages[0].command


def test_seeds_may_share_a_teacher(tmp_path):
    grid = GRID | {"one_teacher": True}
    stages = [s for s in plan(Experiment(str(tmp_path), **grid)) if not isinstance(s, Cell)]
    teachers = [s for s in stages if s.kind == "finetune"]
    assert len(teachers) == len(GRID["tasks"])
    assert all("--gin.SEED=0" in stage.command for stage in teachers)
    adapted = [s for s in stages if s.kind == "adapt" and "seed_1" in str(s.result)]
    assert adapted and all("--gin.SEED=1" in stage.command for stage in adapted)
    shared = f"--gin.INITIAL_CHECKPOINT_PATH={tmp_path}/nano/sst2/seed_0/teacher"
    assert any(shared in stage.command for stage in adapted)


def test_a_grid_may_grow_and_only_what_is_new_is_run(tmp_path):
    small = Experiment(str(tmp_path), **(GRID | {"seeds": (0,)}))
    first = drive.drive(small, _run_stage, _score)
    ran = []
    larger = Experiment(str(tmp_path), **GRID)
    both = drive.drive(larger, _run_stage, lambda e, cell: ran.append(cell.seed) or _score(e, cell))
    assert set(ran) == {1} and len(both) == 2 * len(first)
    assert drive.drive(larger, None, None) == both
    assert "cell      24 of 24 done" in drive.describe(larger)


def test_another_recipe_in_the_same_folder_is_refused(tmp_path):
    drive.drive(Experiment(str(tmp_path), **GRID), _run_stage, _score)
    other = Experiment(str(tmp_path), **(GRID | {"recipe": "experiments/docs"}))
    with pytest.raises(ConfigError, match=f"experiments/docs.*BACKBONE_PATHS.*{tmp_path}/nano"):
        drive.drive(other, _run_stage, _score)


def test_a_failed_stage_ends_the_experiment_with_its_code(tmp_path):
    with pytest.raises(SystemExit) as ended:
        drive.drive(Experiment(str(tmp_path), **GRID), lambda command: 2, _score)
    assert ended.value.code == 2
    with pytest.raises(VariatorError, match="ended without"):
        drive.drive(Experiment(str(tmp_path), **GRID), lambda command: 0, _score)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"arms": ("variatr",)}, "no arm 'variatr'.* Did you mean 'variator'"),
        ({"ratios": (1, 2)}, r"whole numbers from 2; found \[1\]"),
        ({"tasks": "sst2"}, "TASKS is a tuple"),
        ({"seeds": ()}, "SEEDS is empty"),
        ({"ratios": (2, 2)}, "twice"),
        ({"backbone_paths": {"mini": "x"}}, r"\['mini'\], which BACKBONES does not"),
        ({"tasks": ("../x",)}, "names of files"),
    ],
)
def test_wrong_grids_are_refused_by_name(tmp_path, wrong, message):
    with pytest.raises(ConfigError, match=message):
        Experiment(str(tmp_path), **(GRID | wrong))


def test_ten_kills_lose_no_finished_cell_and_repeat_none(tmp_path):
    log, folder = tmp_path / "log", tmp_path / "experiment"
    arguments = [json.dumps({"model_dir": str(folder), **GRID}), str(log)]
    command = [sys.executable, "-c", SCRIPT, *arguments]
    experiment, rng, seen = Experiment(str(folder), **GRID), random.Random(0), {}

    def lines_of(file):
        return file.read_text().count("\n") if file.exists() else 0

    def finished():
        return {p.name: p.read_bytes() for p in (folder / "cells").glob("[!.]*.json")}

    for _ in range(10):
        before = lines_of(log)
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
        # It is killed at some moment after it has done something new, or when it has ended.
        while process.poll() is None and lines_of(log) <= before:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.06))
        process.send_signal(signal.SIGKILL)
        process.wait()
        now = finished()
        assert seen.items() <= now.items()  # neither lost nor made again
        seen = now
    assert 0 < len(seen) < len(list(experiment.cells()))  # killed in the midst of it, indeed
    subprocess.run(command, cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
    now = finished()
    assert seen.items() <= now.items()
    assert len(now) == len(list(experiment.cells()))
    # Only what was cut off can appear twice in the log: at most one step a kill.
    lines = log.read_text().splitlines()
    assert len(lines) - len(set(lines)) <= 10
