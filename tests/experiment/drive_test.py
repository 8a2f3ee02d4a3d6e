"""An experiment's checks and its driver: what is refused, growth, failures, kills."""

import random
import time
from unittest import mock

import pytest

from variator_jax import gin_utils
from variator_jax.data import batches
from variator_jax.errors import ConfigError, VariatorError
from variator_jax.experiment import drive
from variator_jax.experiment.grid import Experiment, plan

GRID = dict(
    recipe="experiments/small", backbones=("nano",), tasks=("sst2",), ratios=(2, 4), seeds=(0, 1),
    arms=("variator", "no_ffn", "student"),
)  # fmt: skip


def _experiment(folder, **changes):
    return Experiment(str(folder), **(GRID | changes))


def run_training(experiment, step):
    step.result.parent.mkdir(parents=True, exist_ok=True)
    step.result.write_text("{}")


def score(experiment, cell):
    return {"score": 50.0 + cell.seed, "made": time.time_ns()}


def test_a_grid_may_grow_by_what_is_new_but_not_change_its_recipe(tmp_path, capsys):
    first = drive.drive(_experiment(tmp_path, seeds=(0,)), {}, run_training, score)
    larger = _experiment(tmp_path)
    assert "score     5 of 10 done" in drive.describe(larger)
    assert "missing: score nano sst2 student k=4 seed 1" in drive.describe(larger)
    both = drive.drive(larger, {}, run_training, score)
    assert len(both) == 2 * len(first) and all(record in both for record in first)
    assert drive.drive(larger, {}, None, None) == both
    assert "missing" not in drive.describe(larger)
    assert "[3/12] score nano sst2 backbone seed 0" in capsys.readouterr().err
    other = _experiment(tmp_path, recipe="experiments/docs")
    with pytest.raises(ConfigError, match=f"experiments/docs.*BACKBONE_PATHS.*{tmp_path}/nano"):
        drive.drive(other, {}, None, None)


@pytest.mark.parametrize("change", [{"ADAPTER_RANK": 16}, {"ARM": "truncated"}])
def test_a_plugin_that_was_trained_with_other_macros_is_refused(tmp_path, change):
    def grid(**changes):
        macros = {"SITES": ("span all",), "ADAPTER_RANK": 8, **changes}
        return _experiment(tmp_path, arms=(), plugins={"span": macros})

    with pytest.raises(ZeroDivisionError):
        drive.drive(grid(ADAPTER_RANK=4), {}, lambda *_: 1 / 0, score)  # has made nothing
    with pytest.raises(ZeroDivisionError):  # trained, and not yet scored
        drive.drive(grid(), {}, run_training, lambda e, c: 1 / 0 if c.ratio > 1 else score(e, c))
    if "ARM" not in change:
        with pytest.raises(ConfigError, match="span is .*Give the plugin another name"):
            drive.drive(grid(**change), {}, None, None)
    drive.drive(grid(), {}, run_training, score)
    with pytest.raises(ConfigError, match="span is .*Give the plugin another name"):
        drive.drive(grid(**change), {}, None, None)


def test_a_plugins_macros_stay_those_of_other_grids_in_its_folder(tmp_path):
    def grid(backbone, rank):
        plugins = {"span": {"SITES": ("span all",), "ADAPTER_RANK": rank}}
        return _experiment(tmp_path, arms=(), plugins=plugins, backbones=(backbone,))

    drive.drive(grid("nano", 8), {}, run_training, score)
    with pytest.raises(ConfigError, match="span is .*Give the plugin another name"):
        drive.drive(grid("micro", 16), {}, None, None)


@pytest.mark.parametrize("error", [SystemExit(143), VariatorError("a reason"), None])
def test_a_step_that_fails_or_writes_nothing_ends_the_experiment(tmp_path, error):
    run = mock.Mock(side_effect=error)
    with pytest.raises(type(error or VariatorError()), match=str(error or "ended without")):
        drive.drive(_experiment(tmp_path), {}, run, score)
    assert run.call_count == 1


def test_ten_kills_lose_no_finished_cell_and_repeat_none(tmp_path):
    grid, rng, made = _experiment(tmp_path, tasks=("sst2", "rte")), random.Random(0), []

    def killed_after(count, call):
        def step(experiment, item):
            if len(made) == count:
                raise KeyboardInterrupt
            made.append(str(item))
            return call(experiment, item)

        return step

    count = 0
    for _ in range(10):
        count += rng.randint(1, 3)
        with pytest.raises(KeyboardInterrupt):
            calls = (killed_after(count, call) for call in (run_training, score))
            drive.drive(grid, {}, *calls)
    records = drive.drive(grid, {}, killed_after(None, run_training), killed_after(None, score))
    assert len(made) == len(set(made)) == len(plan(grid))
    assert len(records) == len(list(grid.cells()))


def _small(folder, **macros):
    given = {"TEXT_DIR": str(folder / "texts"), "GLUE_DIR": str(folder / "glue"), **macros}
    given |= {"MODEL_DIR": str(folder), "TASKS": ("sst2",), "ARMS": ("variator",)}
    bindings = [f"{name}={value!r}" for name, value in given.items()]
    gin_utils.parse(["experiments/glue_small.gin"], bindings)
    return gin_utils.configured(Experiment)()


def _kill_in(kind, experiment):
    """Drives an experiment up to the first step of a kind, which is killed after a checkpoint."""

    def run(experiment, step):
        if step.kind == kind:
            (step.result.parents[1] / "checkpoints" / "10").mkdir(parents=True)
            raise KeyboardInterrupt
        run_training(experiment, step)

    with pytest.raises(KeyboardInterrupt):
        drive.drive(experiment, drive.preflight(experiment), run, score)


def _lock(experiment):
    return drive.lock(experiment, drive.preflight(experiment))


def test_a_macro_may_change_until_something_was_made_with_it_and_arms_may_be_added(tmp_path):
    first, texts = _small(tmp_path), _small(tmp_path, TEXT_DIR="elsewhere")
    with pytest.raises(VariatorError):
        drive.drive(first, drive.preflight(first), lambda e, step: None, score)
    _lock(texts)  # the failed step has made nothing
    _kill_in("backbone", first)
    with pytest.raises(ConfigError, match="backbone.gin: (TEXT|DATA)_DIR is 'elsewhere'; what is"):
        _lock(texts)
    tasks = _small(tmp_path, GLUE_DIR="elsewhere")  # only tasks read it
    _kill_in("finetune", tasks)
    with pytest.raises(ConfigError, match="sst2.gin: DATA_DIR is"):
        _lock(first)
    drive.drive(tasks, drive.preflight(tasks), run_training, score)
    _lock(Experiment(**{**vars(tasks), "arms": ("mean_weights", "loss_task", "variator")}))


@pytest.mark.parametrize("macros, message", [
    ({"SITES": ("spam all",)}, "spam"),
    ({"SITES": ("span 0-7",)}, "layer"),
    ({"RATIO": 1}, "ratio of 2 or more"),
    ({"SITES": ("kv all",), "NEURONS_LOSS": 1.0}, "NEURONS_LOSS"),
    ({"ARM": "student", "SITES": ("span all",), "RESIDUAL_LOSS": 1.0}, "RESIDUAL_LOSS"),
    ({"ARM": "similar_tokens", "SITES": ("span all",)}, "cannot cost as little"),
    ({"ARM": "mean_pool", "SITES": ("span all",)}, "compression='mean'"),
])  # fmt: skip
def test_sites_and_losses_that_do_not_fit_are_found_before_anything_runs(tmp_path, macros, message):
    with pytest.raises(ConfigError, match=f"(adapt|student|score).gin.*{message}"):
        drive.preflight(_small(tmp_path, PLUGINS={"x": macros}))


def test_a_plugin_may_be_added_that_sets_what_other_macros_read(tmp_path):
    def grid(**plugins):
        return _small(tmp_path, PLUGINS=plugins)

    first = {"SITES": ("span all",)}
    drive.drive(grid(a=first), drive.preflight(grid(a=first)), run_training, score)
    more = {**first, "ADAPT_STEPS": 800}  # the recipe's TRAIN_STEPS are these
    _lock(grid(a=first, b=more))
    # Earlier versions recorded what the last of the plugins made of the recipe's macro.
    record = tmp_path / "experiment.json"
    record.write_text(record.read_text().replace('"TRAIN_STEPS": "150"', '"TRAIN_STEPS": "800"'))
    _lock(grid(a=first, b=more))
    with pytest.raises(ConfigError, match="a is .*ADAPT_STEPS.*Give the plugin another name"):
        _lock(grid(a=more))


def test_missing_and_changed_data_are_found_before_anything_runs(tmp_path, monkeypatch):
    (tmp_path / "texts").mkdir()
    for name in ("one.txt", "valid.txt"):
        (tmp_path / "texts" / name).write_text("A sentence about a river and a town.\n" * 800)
    experiment = _small(tmp_path, VOCABULARY_FILE=str(tmp_path / "missing.model"))
    with pytest.raises(ConfigError, match="sst2.gin: DATA_DIR .*no local folder"):
        drive.preflight(experiment, data=True)
    drive.preflight(experiment)
    (tmp_path / "glue" / "SST-2").mkdir(parents=True)
    for name in ("train", "dev"):
        (tmp_path / "glue" / "SST-2" / f"{name}.tsv").write_text("sentence\tlabel\na river\t1\n")
    drive.drive(experiment, drive.preflight(experiment, data=True), run_training, score)
    drive.lock(experiment, drive.preflight(experiment, data=True))
    monkeypatch.setattr(batches, "digest", lambda task, split: "that of other rows")
    with pytest.raises(ConfigError, match="sst2.gin: DATA is "):
        drive.lock(experiment, drive.preflight(experiment, data=True))
