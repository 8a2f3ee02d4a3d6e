"""Whole runs of the built-in engine: exact resume, SIGTERM, a loss that is not finite, refusals."""

import dataclasses
import itertools
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import seqio

from variator_jax.backbones.t5 import get_config
from variator_jax.data.sources import text_to_text_task
from variator_jax.data.spec import TaskSpec, register_spec
from variator_jax.errors import CheckpointError, ConfigError, TrainingError
from variator_jax.evaluation.evaluate import EvalData, evaluate
from variator_jax.plugin import PluginConfig
from variator_jax.store import load_backbone, load_plugin, save_backbone
from variator_jax.train import optimizers, train
from variator_jax.train.checkpointing import Checkpoints
from variator_jax.train.logs import RunLog
from variator_jax.train.loop import Schedule, fit
from variator_jax.train.step import TrainState

TASK = "train_test_parity"
TINY = get_config(
    "nano", vocab_size=384, embed_dim=16, num_heads=2, head_dim=8, mlp_dim=32,
    num_encoder_layers=2, num_decoder_layers=1,
)  # fmt: skip


def _examples(split):
    rng = np.random.default_rng(["train", "validation"].index(split))
    texts = ["".join(rng.choice(list("ab"), rng.integers(3, 12))) for _ in range(64)]
    return [{"inputs": t, "targets": "even" if t.count("a") % 2 == 0 else "odd"} for t in texts]


if TASK not in seqio.TaskRegistry.names():
    text_to_text_task(TASK, _examples, ("train", "validation"), seqio.ByteVocabulary(extra_ids=0))
    register_spec(TaskSpec(TASK, "classification", ("odd", "even")))


def _run(model_dir, steps=6, *, learning_rate=1e-2, checkpoint_period=2, eval_period=0, **kwargs):
    return train.train(
        **{
            "model_dir": str(model_dir),
            "data": train.DataConfig(TASK, {"inputs": 16, "targets": 6}, 4, eval_batches=1),
            "schedule": Schedule(steps, 2, eval_period, checkpoint_period),
            "optimizer": optimizers.optimizer(
                learning_rate=learning_rate, schedule_name="constant", clip_norm=None
            ),
            "backbone": TINY,
            "plugin": PluginConfig(2, bottleneck=4),
        }
        | kwargs
    )


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("backbone")
    _run(folder, trained="backbone")
    return folder


def _logged_steps(folder, kind="train"):
    rows = [json.loads(row) for row in (folder / "log.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows if row["kind"] == kind]


def _assert_equal(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_plugin_run_leaves_its_backbone_alone_and_its_folder_is_a_plugins_size(
    backbone, tmp_path
):
    before = load_backbone(backbone / "backbone")
    result = _run(tmp_path / "run", initial_checkpoint_path=str(backbone))
    assert (result.step, result.interrupted) == (6, False)
    _assert_equal(before.params, load_backbone(backbone / "backbone").params)
    plugin = load_plugin(result.exported, before)
    assert plugin.config == PluginConfig(2, bottleneck=4)
    # Parameters, Adam's two moments, and a few counters: three plugins, no backbone.
    saved = ocp.StandardCheckpointer().restore(tmp_path / "run" / "checkpoints" / "6" / "default")
    trained = sum(x.size for x in jax.tree.leaves(plugin.variables.params))
    assert 3 * trained <= sum(np.size(x) for x in jax.tree.leaves(saved)) <= 3 * trained + 5
    identity = json.loads((tmp_path / "run" / "run.json").read_text())
    assert identity["backbone"] == before.fingerprint
    assert _logged_steps(tmp_path / "run") == [2, 4, 6]
    assert _logged_steps(tmp_path / "run", "eval") == [6]
    assert list((tmp_path / "run" / "tensorboard").iterdir())


@pytest.mark.parametrize("trained", ["plugin", "backbone"])
def test_a_run_that_was_stopped_ends_with_the_weights_of_one_that_was_not(
    backbone, tmp_path, trained
):
    kwargs = {"trained": trained, "initial_checkpoint_path": str(backbone)}
    _run(tmp_path / "whole", 6, **kwargs)
    _run(tmp_path / "cut", 4, **kwargs)  # leaves a checkpoint of step 4
    result = _run(tmp_path / "cut", 6, **kwargs)
    assert result.step == 6
    assert _logged_steps(tmp_path / "cut") == [2, 4, 6]  # none was done twice
    load = load_plugin if trained == "plugin" else load_backbone
    whole, cut = (load(tmp_path / name / trained) for name in ("whole", "cut"))
    arrays = (lambda x: x.variables) if trained == "plugin" else (lambda x: x.params)
    _assert_equal(arrays(whole), arrays(cut))


@pytest.mark.parametrize("moment", ["train", "validation"])
def test_sigterm_at_any_moment_saves_and_stops(backbone, tmp_path, monkeypatch, moment):
    kwargs = {"initial_checkpoint_path": str(backbone), "checkpoint_period": 100, "eval_period": 3}
    real_train, real_validation = train.DataConfig.train, train.DataConfig.validation

    def stream(self, start, rows=None):
        for number, batch in enumerate(real_train(self, start, rows), start=start):
            if number == 3 and moment == "train":
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    def validation(self):
        if moment == "validation":
            os.kill(os.getpid(), signal.SIGTERM)
        return real_validation(self)

    with monkeypatch.context() as patched:
        patched.setattr(train.DataConfig, "train", stream)
        patched.setattr(train.DataConfig, "validation", validation)
        result = _run(tmp_path / "cut", **kwargs)
    assert result.interrupted and result.exported is None and 3 <= result.step < 6
    saved = [int(p.name) for p in (tmp_path / "cut" / "checkpoints").iterdir() if p.name.isdigit()]
    assert saved == [result.step]
    assert _run(tmp_path / "cut", **kwargs).step == 6
    _run(tmp_path / "whole", **kwargs)
    _assert_equal(
        load_plugin(tmp_path / "cut" / "plugin").variables,
        load_plugin(tmp_path / "whole" / "plugin").variables,
    )


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
    backbone, tmp_path
):
    kwargs = {"initial_checkpoint_path": str(backbone), "trained": "backbone"}
    _run(tmp_path, 2, **kwargs)
    with pytest.raises(TrainingError, match="loss of step 4 is nan"):
        _run(tmp_path, 8, learning_rate=float("nan"), checkpoint_period=100, **kwargs)
    saved = [int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()]
    assert max(saved) == 2


def test_a_folder_is_never_continued_as_another_run(backbone, tmp_path):
    _run(tmp_path, initial_checkpoint_path=str(backbone))
    with pytest.raises(CheckpointError, match="ratio is 2, this one's is 4"):
        _run(tmp_path, initial_checkpoint_path=str(backbone), plugin=PluginConfig(4, bottleneck=4))


def test_a_backbone_stored_in_bfloat16_is_fine_tuned_in_float32_and_keeps_its_epsilon(
    backbone, tmp_path
):
    whole = load_backbone(backbone / "backbone")
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), whole.params)
    stored = dataclasses.replace(TINY, param_dtype="bfloat16", layer_norm_epsilon=1e-5)
    save_backbone(tmp_path / "half", stored, half)
    _run(tmp_path / "run", 2, trained="backbone", initial_checkpoint_path=str(tmp_path / "half"))
    tuned = load_backbone(tmp_path / "run" / "backbone")
    assert {x.dtype.name for x in jax.tree.leaves(tuned.params)} == {"float32"}
    assert tuned.config.layer_norm_epsilon == 1e-5


def test_adaptation_starts_from_the_pretrained_plugin(backbone, tmp_path):
    kwargs = {"initial_checkpoint_path": str(backbone)}
    _run(tmp_path / "pre", **kwargs)
    _run(
        tmp_path / "adapted", 1, learning_rate=0.0,
        initial_plugin_path=str(tmp_path / "pre"), **kwargs,
    )  # fmt: skip
    _assert_equal(
        load_plugin(tmp_path / "pre" / "plugin").variables,
        load_plugin(tmp_path / "adapted" / "plugin").variables,
    )
    with pytest.raises(CheckpointError, match="this run asks for"):
        _run(
            tmp_path / "other", 1, plugin=PluginConfig(4, bottleneck=4),
            initial_plugin_path=str(tmp_path / "pre"), **kwargs,
        )  # fmt: skip


def test_a_plugin_run_needs_a_backbone_of_the_right_shape_and_vocabulary(backbone, tmp_path):
    with pytest.raises(ConfigError, match="INITIAL_CHECKPOINT_PATH"):
        _run(tmp_path)
    with pytest.raises(ConfigError, match="must divide BATCH_SIZE"):
        _run(tmp_path, num_microbatches=3)
    with pytest.raises(ConfigError, match="not a local folder"):
        _run("gs://bucket/run", trained="backbone")
    with pytest.raises(CheckpointError, match="holds no backbone"):
        _run(tmp_path, initial_checkpoint_path=str(tmp_path))
    other = get_config("nano", vocab_size=384)
    with pytest.raises(CheckpointError, match="another shape"):
        _run(tmp_path, initial_checkpoint_path=str(backbone), backbone=other)
    with pytest.raises(ConfigError, match="only 100 embeddings"):
        _run(tmp_path, trained="backbone", backbone=get_config("nano", vocab_size=100))
    with pytest.raises(ConfigError, match="2 or more"):
        _run(tmp_path, initial_checkpoint_path=str(backbone), plugin=PluginConfig(1))
    nothing = PluginConfig(2, compression="mean", decompression="repeat")
    with pytest.raises(ConfigError, match="nothing to train"):
        _run(tmp_path, initial_checkpoint_path=str(backbone), plugin=nothing)


def test_a_loss_that_is_finite_with_a_gradient_that_is_not_is_never_saved(tmp_path):
    def step(state, batch):
        bad = int(state.step) == 3
        metrics = {"loss": jnp.float32(1.0), "grad_norm": jnp.float32(np.inf if bad else 1.0)}
        return state.replace(step=state.step + 1), metrics

    state = TrainState(jnp.int32(0), {"w": jnp.zeros(2)}, ())
    checkpoints, log = Checkpoints(tmp_path, 5, {}), RunLog(tmp_path, 8)
    batch = {"encoder_input_tokens": np.ones((1, 2))}
    with pytest.raises(TrainingError, match="gradient norm of step 4 is inf"):
        fit(
            state,
            step,
            lambda start: itertools.repeat(batch),
            Schedule(8, 8, 0, 2),
            checkpoints,
            log,
        )
    checkpoints.close()
    log.close()
    saved = [int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()]
    assert max(saved) == 2


def test_held_out_loss_is_measured_on_the_same_batches_without_dropout(backbone, tmp_path):
    dropped = dataclasses.replace(TINY, dropout_rate=0.5)
    _run(
        tmp_path, 6, trained="backbone", backbone=dropped, learning_rate=0.0, eval_period=2,
        initial_checkpoint_path=str(backbone),
    )  # fmt: skip
    rows = [json.loads(row) for row in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len({row["loss"] for row in rows if row["kind"] == "eval"}) == 1
    assert len({row["loss"] for row in rows if row["kind"] == "train"}) == 3


def test_held_out_loss_is_measured_in_microbatches_where_a_step_has_them(
    backbone, tmp_path, monkeypatch
):
    rows, real = [], train.make_eval_step

    def make_eval_step(objective):
        def step(params, frozen, batch):
            rows.append(batch["encoder_input_tokens"].shape[0])
            return real(objective)(params, frozen, batch)

        return step

    monkeypatch.setattr(train, "make_eval_step", make_eval_step)
    held_out = []
    for count in (1, 2):
        folder = tmp_path / str(count)
        _run(folder, 1, num_microbatches=count, initial_checkpoint_path=str(backbone))
        logged = [json.loads(row) for row in (folder / "log.jsonl").read_text().splitlines()]
        held_out += [row["loss"] for row in logged if row["kind"] == "eval"]
    assert rows == [4, 2]
    assert held_out[1] == pytest.approx(held_out[0], rel=1e-5)


@pytest.mark.parametrize("field", ["train_steps", "log_period", "checkpoint_period"])
def test_periods_are_positive(field):
    with pytest.raises(ConfigError, match=field.upper()):
        Schedule(**({"train_steps": 1} | {field: 0}))


def test_evaluation_reports_every_ratio_and_the_control(backbone, tmp_path):
    _run(tmp_path / "run", initial_checkpoint_path=str(backbone))
    report = evaluate(
        model_dir=str(tmp_path / "report"),
        data=EvalData(TASK, {"inputs": 16, "targets": 6}, batch_size=24),
        initial_checkpoint_path=str(backbone),
        plugin_paths=[str(tmp_path / "run")],
        latency_shapes=[("nano", 2, 16)],
    )
    assert [entry.ratio for entry in report.ratios] == [1, 2]
    assert [entry.identical_to_backbone for entry in report.ratios] == [True, False]
    assert set(report.control_no_ffn) == set(report.majority) == {TASK}
    written = json.loads((tmp_path / "report" / "report.json").read_text())
    assert written["ratios"][1]["latency"][0]["config"] == "nano"
    assert {f.name for f in (tmp_path / "report").iterdir()} == {
        "report.json", "report.md", "report.png",
    }  # fmt: skip
    _run(tmp_path / "stranger", trained="backbone", seed=1)
    with pytest.raises(CheckpointError, match="belongs to backbone"):
        evaluate(
            model_dir=str(tmp_path / "report"),
            data=EvalData(TASK, {"inputs": 16, "targets": 6}),
            initial_checkpoint_path=str(tmp_path / "stranger"),
            plugin_paths=[str(tmp_path / "run")],
        )
