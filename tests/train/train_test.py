"""Whole runs of the built-in engine: what they write, exact resume, and refusals."""

import dataclasses
import json
import shutil
import types
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import seqio
import tiny_runs
from small_t5 import assert_same
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import TINY, random_params

from variator_jax import mesh as meshes
from variator_jax.backbones.t5 import T5, get_config
from variator_jax.data import batches
from variator_jax.data.tasks import text_to_text_task
from variator_jax.data.vocabulary import byte_vocabulary
from variator_jax.errors import CheckpointError, ConfigError, PluginError
from variator_jax.files import lock_folder
from variator_jax.plugin import Ffn, PluginConfig
from variator_jax.store import load_backbone, load_plugin, save_backbone
from variator_jax.train import jobs, optimizers, train
from variator_jax.train.checks import check_trainable
from variator_jax.train.losses import LossConfig
from variator_jax.train.objectives import TaskTraining
from variator_jax.train.run_folder import Checkpoints
from variator_jax.train.step import TrainState

EVALUATED = dataclasses.replace(tiny_runs.DATA, eval_batches=1)


def test_a_plugin_run_leaves_its_backbone_alone_and_its_checkpoint_is_a_plugins_size(
    backbone_run, plugin_run
):
    backbone = load_backbone(backbone_run / "backbone")
    plugin = load_plugin(plugin_run / "plugin", backbone)
    assert plugin.config == PluginConfig(4, bottleneck=4)
    # Parameters, Adam's two moments, and a few counters: three plugins, no backbone.
    saved = ocp.StandardCheckpointer().restore(plugin_run / "checkpoints" / "6" / "default")
    trained = sum(x.size for x in jax.tree.leaves(plugin.variables.params))
    assert 3 * trained <= sum(np.size(x) for x in jax.tree.leaves(saved)) <= 3 * trained + 5
    identity = json.loads((plugin_run / "run.json").read_text())
    assert identity["backbone"] == backbone.fingerprint
    losses = {row["step"]: row["loss"] for row in tiny_runs.rows(plugin_run)}
    assert list(losses) == [1, 2, 3, 4, 5, 6] and losses[6] < losses[1]
    assert [row["step"] for row in tiny_runs.rows(plugin_run, "eval")] == [6]
    events = EventAccumulator(str(plugin_run / "tensorboard")).Reload()
    assert {e.step: e.value for e in events.Scalars("train/loss")} == pytest.approx(losses)
    assert len(events.Scalars("eval/loss")) == 1


@pytest.mark.parametrize("trained", ["plugin", "backbone"])
def test_a_run_that_was_stopped_ends_with_the_weights_of_one_that_was_not(
    backbone_run, plugin_run, tmp_path, trained
):
    whole, cut = {"plugin": plugin_run, "backbone": backbone_run}[trained], tmp_path / "cut"
    path = str(backbone_run) if trained == "plugin" else None
    shutil.copytree(whole, cut, ignore=shutil.ignore_patterns("6"))
    result = tiny_runs.run(cut, trained=trained, initial_checkpoint_path=path, data=EVALUATED)
    assert (result.step, result.exported) == (6, cut / trained)
    assert [row["step"] for row in tiny_runs.rows(cut)] == [1, 2, 3, 4, 5, 6, 4, 5, 6]
    # What was exported before it went on would pass for its result.
    assert (cut / f"{trained}_before_1").is_dir()
    if trained == "plugin":
        before, after = (load_plugin(run / trained).variables for run in (whole, cut))
        assert_same(before.params, after.params)
        assert_same(before.output_scales, after.output_scales)
    else:
        assert_same(*(load_backbone(run / trained).params for run in (whole, cut)))


def test_a_folder_is_never_continued_as_another_run(backbone_run, plugin_run, tmp_path):
    other = {"initial_checkpoint_path": str(backbone_run), "plugin": PluginConfig(2, bottleneck=4)}
    with pytest.raises(CheckpointError, match="holds another run: its plugin is .*'ratio': 4"):
        tiny_runs.run(plugin_run, data=EVALUATED, **other)
    # Another name is no other run, nor is the paper's site in words as an earlier version wrote it.
    record = json.loads((plugin_run / "run.json").read_text())
    record["plugin"]["sites"][0]["pattern"] = None
    (plugin_run / "run.json").write_text(json.dumps(record | {"backbone": "sha256:0"}))
    named = dict(other, plugin=PluginConfig(4, bottleneck=4, given_name="fast"))
    with pytest.raises(CheckpointError, match="another run: its backbone is 'sha256:0'"):
        tiny_runs.run(plugin_run, data=EVALUATED, **named)
    (plugin_run / "run.json").write_text(json.dumps(record))
    # As version 0.1 wrote it.
    fields = {"ratio": 2, "bottleneck": 4, "layers": None, "compression": "learned"}
    old = {"trained": "plugin", "ratio": 2, "plugin": fields, "backbone": "sha256:0"}
    (tmp_path / "run.json").write_text(json.dumps(old))
    with pytest.raises(CheckpointError, match="another run: its plugin is .*another MODEL_DIR"):
        tiny_runs.run(tmp_path, **other)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(CheckpointError, match="run.json cannot be read"):
        tiny_runs.run(tmp_path, **other)


@pytest.mark.parametrize(("settings", "message"), [
    ({"learning_rate": 2e-2}, "its LEARNING_RATE is 0.01, this one's is 0.02"),
    ({"optimizer": optimizers.optimizer("adafactor", 1e-2, "linear", 1, 6, 0.2, None)},
     "OPTIMIZER is 'adamw'.*WARMUP_STEPS is 0.*DECAY is 0.1.*CLIP_NORM is.*SCHEDULE is 'constant'"),
    ({"seed": 1}, "INIT_SEED is 0, this one's is 1"),
    ({"data": dataclasses.replace(EVALUATED, batch_size=4, seed=3)}, "batch_size is 8.*seed is 0"),
    ({"data": dataclasses.replace(EVALUATED, feature_lengths={"inputs": 18, "targets": 5})},
     "feature_lengths is .*6}, this one's is .*5}"),
    ({"loss": LossConfig(logits=1.0)}, "LOGITS_LOSS is 0.0"),
    ({"backbone": dataclasses.replace(TINY, dropout_rate=0.5)}, "DROPOUT_RATE is 0.0"),
    ({"steps": 5}, "TRAIN_STEPS is 5, and .* 6 steps already"),
])  # fmt: skip
def test_a_run_is_continued_with_its_own_settings_alone(
    backbone_run, plugin_run, settings, message
):
    before = (plugin_run / "log.jsonl").read_bytes()
    fields = {"initial_checkpoint_path": str(backbone_run), "data": EVALUATED} | settings
    with pytest.raises((CheckpointError, ConfigError), match=message):
        tiny_runs.run(plugin_run, **fields)
    assert (plugin_run / "log.jsonl").read_bytes() == before


def test_a_run_is_known_by_the_content_of_its_vocabulary():
    text_to_text_task("of_more_bytes", lambda split: [], ("train",), byte_vocabulary(5))
    ours, other = (
        tiny_runs.config(data=dataclasses.replace(EVALUATED, task=task)).identity()
        for task in (tiny_runs.TASK, "of_more_bytes")
    )
    assert ours["VOCABULARY"] != other["VOCABULARY"]


@pytest.mark.parametrize(("schedule", "printed"), [("constant", ""), ("linear", "was 6, is 8")])
def test_train_steps_may_grow_and_a_decay_that_they_stretch_is_named(
    tmp_path, capsys, schedule, printed
):
    def open_run(steps, state=None):
        optimizer = optimizers.optimizer(schedule_name=schedule, train_steps=steps)
        run = Checkpoints(tmp_path, 2, tiny_runs.config(optimizer=optimizer).identity())
        if state is not None:
            run.save(state)
        run.close()

    open_run(6)
    open_run(8)
    assert printed in capsys.readouterr().err
    open_run(6)  # no step was made with 8
    open_run(8, TrainState(jnp.int32(7), {"w": jnp.zeros(1)}, ()))
    capsys.readouterr()
    open_run(8)
    assert "TRAIN_STEPS" not in capsys.readouterr().err
    if schedule == "linear":
        with pytest.raises(CheckpointError, match="TRAIN_STEPS is 8, this one's is 7"):
            open_run(7)


def test_one_run_at_a_time_writes_a_folder(backbone_run, plugin_run):
    path = str(backbone_run)
    with lock_folder(plugin_run), pytest.raises(CheckpointError, match="MODEL_DIR .* in use by"):
        tiny_runs.run(plugin_run, data=EVALUATED, initial_checkpoint_path=path)


def test_a_backbone_stored_in_bfloat16_is_fine_tuned_in_float32_and_keeps_its_epsilon(tmp_path):
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), random_params(TINY))
    stored = dataclasses.replace(TINY, param_dtype="bfloat16", layer_norm_epsilon=1e-5)
    save_backbone(tmp_path / "half", stored, half)
    path = str(tmp_path / "half")
    tiny_runs.run(tmp_path / "run", 1, trained="backbone", initial_checkpoint_path=path)
    tuned = load_backbone(tmp_path / "run" / "backbone")
    assert {x.dtype.name for x in jax.tree.leaves(tuned.params)} == {"float32"}
    assert tuned.config.layer_norm_epsilon == 1e-5


def test_a_fine_tuning_keeps_no_second_copy_of_its_weights(backbone_run, tmp_path, monkeypatch):
    load, fit, loaded, alive = jobs.load_initial_backbone, train.fit, [], []

    def remember(*args):
        backbone = load(*args)
        loaded.extend(map(weakref.ref, jax.tree.leaves(backbone.params)))
        return backbone

    def look(*args):
        alive.extend(ref for ref in loaded if ref() is not None)
        return fit(*args)

    monkeypatch.setattr(jobs, "load_initial_backbone", remember)
    monkeypatch.setattr(train, "fit", look)
    path = str(backbone_run)
    tiny_runs.run(tmp_path, 1, trained="backbone", initial_checkpoint_path=path)
    assert loaded and not alive


def test_adaptation_starts_from_the_pretrained_plugin(backbone_run, plugin_run, tmp_path):
    paths = dict(initial_checkpoint_path=str(backbone_run), initial_plugin_path=str(plugin_run))
    tiny_runs.run(tmp_path / "adapted", 1, learning_rate=0.0, **paths)
    before, after = (load_plugin(run / "plugin") for run in (plugin_run, tmp_path / "adapted"))
    assert_same(before.variables.params, after.variables.params)
    with pytest.raises(CheckpointError, match="'ffn all x4 bottleneck=4',.* has 'ffn all x2 bot"):
        tiny_runs.run(tmp_path / "other", 1, plugin=PluginConfig(2, bottleneck=4), **paths)


UNTRAINED = {"compression": "mean", "decompression": "repeat"}
MEAN = PluginConfig(sites=(Ffn(2, (0,), **UNTRAINED), Ffn(4, (1,), **UNTRAINED)))
CAUSAL = PluginConfig(2, sites=r"decoder/layers_(\d+)/mlp")
WHOLE = {"trained": "backbone"}
ENCODER = WHOLE | {"backbone": dataclasses.replace(TINY, num_decoder_layers=0)}
PACKED = dataclasses.replace(EVALUATED, packed=True, pack_multiple=3)


@pytest.mark.parametrize("settings, error, message", [
    ({"initial_checkpoint_path": None}, ConfigError, "set INITIAL_CHECKPOINT_PATH"),
    ({"initial_checkpoint_path": "/none"}, CheckpointError, "holds no backbone"),
    ({"num_microbatches": 3}, ConfigError, "must divide BATCH_SIZE"),
    ({"model_dir": "gs://bucket/run"}, ConfigError, "of a local folder"),
    ({"model_dir": 7}, ConfigError, "the path of a local folder, in quotes"),
    ({"trained": "plugins"}, ConfigError, "Did you mean 'plugin'"),
    ({"backbone": get_config("nano", vocab_size=384)}, CheckpointError, "another shape"),
    ({"backbone": get_config("nano", vocab_size=100)} | WHOLE, ConfigError, "only 100 embed"),
    ({"plugin": PluginConfig(1)}, ConfigError, "2 or more; set RATIO"),
    ({"plugin": MEAN}, ConfigError, "nothing to train"),
    ({"plugin": CAUSAL}, PluginError, "decoder/layers_0/mlp.* in a causal stack"),
    (ENCODER, ConfigError, "no decoder, so there is no task loss"),
    ({"data": PACKED}, ConfigError, "multiples of the ratio 4: set PACK_MULTIPLE"),
])  # fmt: skip
def test_what_cannot_work_is_refused_before_the_first_step(
    backbone_run, tmp_path, settings, error, message
):
    fields = {"model_dir": tmp_path, "initial_checkpoint_path": str(backbone_run)} | settings
    model_dir = fields.pop("model_dir")
    with pytest.raises(error, match=message):
        train.train(dataclasses.replace(tiny_runs.config(**fields), model_dir=model_dir))


def test_one_site_with_parameters_can_be_trained():
    plugin = PluginConfig(sites=(Ffn(2, (0,), **UNTRAINED), Ffn(4, (1,))))
    assert check_trainable(plugin, T5(TINY).stack()) is plugin


def test_held_out_loss_is_that_of_the_whole_batch_without_dropout():
    """Measured in microbatches where a step has them, for a whole batch may not fit."""
    mesh, rows = meshes.make_mesh(TINY, 8, (1, 1, 1)), []

    class Counting(TaskTraining):
        def terms(self, trained, frozen, batch, rng):
            rows.append(batch["encoder_input_tokens"].shape[0])
            return super().terms(trained, frozen, batch, rng)

    job = types.SimpleNamespace(objective=Counting(T5(dataclasses.replace(TINY, dropout_rate=0.5))))
    state = TrainState(jnp.int32(0), random_params(TINY), ())
    once, cut = (train._evaluation(job, None, EVALUATED, mesh, n)(state) for n in (1, 4))
    assert rows == [8, 2]
    assert cut == pytest.approx(once, rel=1e-5)
    assert train._evaluation(job, None, tiny_runs.DATA, mesh, 1) is None  # no EVAL_BATCHES


def test_other_rows_under_the_same_name_make_another_run(monkeypatch):
    identity = tiny_runs.config(data=EVALUATED).identity
    before = identity()
    assert identity() == before
    source = seqio.get_mixture_or_task(EVALUATED.task).source
    rows = source.make("train")
    monkeypatch.setattr(source, "make", lambda split: [*rows[:-1], rows[0]])
    changed = identity()
    assert [name for name in before if before[name] != changed[name]] == ["DATA"]


def test_a_mixture_of_the_same_name_and_other_rates_is_another_run(monkeypatch):
    tasks = [tiny_runs.TASK, f"{tiny_runs.TASK}_again"]
    text_to_text_task(tasks[1], lambda split: [], ("train",), byte_vocabulary())
    name = batches.mixture(tasks, (1, 3), "train_test_mixture")
    identity = tiny_runs.config(data=dataclasses.replace(EVALUATED, task=name)).identity
    before = identity()
    assert before["RATES"] == [1.0, 3.0]
    monkeypatch.setattr(seqio.get_mixture_or_task(name), "get_rate", lambda task: 1.0)
    changed = identity()
    assert [name for name in before if before[name] != changed[name]] == ["RATES"]


@pytest.mark.parametrize("settings, message", [
    ({"keep_checkpoints": 0}, "KEEP_CHECKPOINTS is 0"),
    ({"trained": "plugin", "backbone_dtype": "float16"}, "'float16', .* set it to 'bfloat16'"),
    ({"seed": 2**32}, "SEED is 4294967296; expected one below"),
    ({"num_microbatches": None}, "NUM_MICROBATCHES is None; expected a whole number"),
])  # fmt: skip
def test_settings_with_a_result_that_could_not_be_used_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        tiny_runs.config(**settings)


@pytest.mark.parametrize("name, value", [
    ("eval_batches", -1), ("batch_size", 8.0), ("data_shards", None), ("pack_multiple", None),
])  # fmt: skip
def test_numbers_of_the_data_that_are_none_are_refused(name, value):
    with pytest.raises(ConfigError, match=f"{name.upper()} is {value}"):
        dataclasses.replace(EVALUATED, **{name: value})


def test_a_rate_of_dropout_that_leaves_nothing_is_refused():
    with pytest.raises(ConfigError, match="DROPOUT_RATE is 10; .* at least 0 and below 1"):
        dataclasses.replace(TINY, dropout_rate=10)
