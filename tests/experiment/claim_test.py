"""What a folder's numbers were made with does not change behind them; what was mended may."""

import pytest

from variator_jax import gin_utils
from variator_jax.commands import engines
from variator_jax.errors import ConfigError
from variator_jax.experiment.claim import Claim
from variator_jax.experiment.grid import Cell, Experiment
from variator_jax.experiment.recipe import files_of, recipe_configs
from variator_jax.experiment.stages import plan


def _experiment(folder, **macros):
    given = {"TEXT_DIR": str(folder / "texts"), "GLUE_DIR": str(folder / "glue"), **macros}
    bindings = [f"{name}={value!r}" for name, value in given.items()]
    bindings += [f"MODEL_DIR={str(folder)!r}", "TASKS=('sst2',)", "ARMS=('variator',)"]
    paths = engines.choose(engines.BUILTIN).search_paths("train")
    gin_utils.parse(["experiments/glue_small.gin"], bindings, paths, True)
    return gin_utils.configured(Experiment)()


def _stage(experiment, kind):
    return next(s for s in plan(experiment) if not isinstance(s, Cell) and s.kind == kind)


def _claim(experiment):
    return Claim(experiment, recipe_configs(experiment))


def _trained(stage):
    (stage.result.parents[1] / "checkpoints" / "10").mkdir(parents=True)


def test_a_macro_that_a_begun_stage_read_may_not_change(tmp_path):
    before = _experiment(tmp_path)
    _claim(before).begin(_stage(before, "backbone"))
    with pytest.raises(
        ConfigError, match="backbone.gin says (TEXT|DATA)_DIR = elsewhere, where what is"
    ):
        _claim(_experiment(tmp_path, TEXT_DIR="elsewhere"))


def test_a_macro_that_no_begun_stage_read_may(tmp_path):
    before = _experiment(tmp_path)
    _claim(before).begin(_stage(before, "backbone"))
    after = _experiment(tmp_path, GLUE_DIR="elsewhere")
    claim = _claim(after)
    claim.begin(_stage(after, "finetune"))
    with pytest.raises(ConfigError, match="sst2.gin says DATA_DIR"):
        _claim(before)


def test_nothing_is_claimed_before_something_is_made(tmp_path):
    _claim(_experiment(tmp_path))
    _claim(_experiment(tmp_path, TEXT_DIR="elsewhere"))
    assert not (tmp_path / "experiment.json").exists()


@pytest.mark.parametrize("left_a_checkpoint", [False, True])
def test_a_stage_that_failed_binds_only_if_it_left_something(tmp_path, left_a_checkpoint):
    before = _experiment(tmp_path)
    stage, claim = _stage(before, "backbone"), _claim(before)
    claim.begin(stage)
    if left_a_checkpoint:
        _trained(stage)
    claim.withdraw(stage)
    other = _experiment(tmp_path, TEXT_DIR="elsewhere")
    if left_a_checkpoint:
        with pytest.raises(ConfigError, match="elsewhere"):
            _claim(other)
    else:
        _claim(other)


def test_a_failed_stage_of_a_kind_that_was_made_before_still_binds(tmp_path):
    before = _experiment(tmp_path)
    claim = _claim(before)
    first, second = [s for s in plan(before) if not isinstance(s, Cell) and s.kind == "adapt"][:2]
    assert files_of(before, first) == files_of(before, second)
    claim.begin(first)
    claim.begin(second)
    claim.withdraw(second)
    with pytest.raises(ConfigError, match="elsewhere"):
        _claim(_experiment(tmp_path, GLUE_DIR="elsewhere"))


def test_seeds_may_be_added_in_any_order(tmp_path):
    macros = {"ONE_TEACHER": False}
    first = _experiment(tmp_path, SEEDS=(1,), **macros)
    claim = _claim(first)
    for step in plan(first):
        claim.begin(step)
    _claim(_experiment(tmp_path, SEEDS=(0, 1), **macros))


def test_data_that_are_not_there_are_told_before_anything_runs(tmp_path):
    (tmp_path / "texts").mkdir()
    for name in ("one.txt", "valid.txt"):
        line = "Some sentence about a river and a town. " * 20
        (tmp_path / "texts" / name).write_text(f"{line}\n" * 40)
    experiment = _experiment(tmp_path, VOCABULARY_FILE=str(tmp_path / "missing.model"))
    with pytest.raises(ConfigError, match="sst2.gin: there is no folder .*glue.$"):
        recipe_configs(experiment, data=True)
    recipe_configs(experiment)
