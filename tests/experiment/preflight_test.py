"""Errors show before anything runs; what a folder was made with does not change under it."""

import pytest

from variator_jax import gin_utils
from variator_jax.errors import ConfigError
from variator_jax.experiment.grid import Experiment
from variator_jax.experiment.preflight import ExperimentLock, preflight
from variator_jax.experiment.stages import plan


def _experiment(folder, **macros):
    given = {"TEXT_DIR": str(folder / "texts"), "GLUE_DIR": str(folder / "glue"), **macros}
    given |= {"MODEL_DIR": str(folder), "TASKS": ("sst2",), "ARMS": ("variator",)}
    bindings = [f"{name}={value!r}" for name, value in given.items()]
    gin_utils.parse(["experiments/glue_small.gin"], bindings)
    return gin_utils.configured(Experiment)()


def _steps(experiment, kind):
    return [step for step in plan(experiment) if step.kind == kind]


def _lock(experiment):
    return ExperimentLock(experiment, preflight(experiment))


def test_a_macro_may_change_until_a_step_that_reads_it_begins(tmp_path):
    before = _experiment(tmp_path)
    lock = _lock(before)
    assert not (tmp_path / "experiment.json").exists()
    (backbone,) = _steps(before, "backbone")
    lock.begin(backbone)
    with pytest.raises(ConfigError, match="backbone.gin: (TEXT|DATA)_DIR is 'elsewhere'; what is"):
        _lock(_experiment(tmp_path, TEXT_DIR="elsewhere"))
    after = _experiment(tmp_path, GLUE_DIR="elsewhere")  # only tasks read it
    lock = _lock(after)
    lock.begin(_steps(after, "finetune")[0])
    with pytest.raises(ConfigError, match="sst2.gin: DATA_DIR is"):
        _lock(before)


def test_a_failed_step_counts_only_if_something_was_made_with_its_configuration(tmp_path):
    before, other = _experiment(tmp_path), _experiment(tmp_path, GLUE_DIR="elsewhere")
    lock, (first, second, *_) = _lock(before), _steps(before, "adapt")
    assert first.config == second.config
    lock.begin(first)
    lock.withdraw(first)
    _lock(other)
    lock.begin(first)
    (first.result.parents[1] / "checkpoints" / "10").mkdir(parents=True)
    lock.withdraw(first)
    lock.begin(second)
    lock.withdraw(second)
    with pytest.raises(ConfigError, match="elsewhere"):
        _lock(other)


def test_a_grid_may_grow_by_seeds_and_arms_in_any_order(tmp_path):
    first = _experiment(tmp_path, SEEDS=(1,), ONE_TEACHER=False)
    lock = _lock(first)
    for step in plan(first):
        lock.begin(step)
    larger = _experiment(tmp_path, SEEDS=(0, 1), ONE_TEACHER=False)
    _lock(larger)
    arms = ("mean_weights", "loss_task", "variator")
    ExperimentLock(larger, preflight(Experiment(**{**vars(larger), "arms": arms})))


def test_missing_data_are_found_before_anything_runs(tmp_path):
    (tmp_path / "texts").mkdir()
    for name in ("one.txt", "valid.txt"):
        line = "Some sentence about a river and a town. " * 20
        (tmp_path / "texts" / name).write_text(f"{line}\n" * 40)
    experiment = _experiment(tmp_path, VOCABULARY_FILE=str(tmp_path / "missing.model"))
    with pytest.raises(ConfigError, match="sst2.gin: there is no folder .*glue.$"):
        preflight(experiment, data=True)
    preflight(experiment)
