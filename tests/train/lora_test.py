"""Runs that train a LoRA, and plugins of the backbone that it was merged into."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
import tiny_runs
from small_t5 import assert_same, flat

from variator_jax import LoraConfig, cli, load_backbone, load_lora, save_backbone
from variator_jax.backbones.lora import init_lora
from variator_jax.backbones.t5 import T5
from variator_jax.errors import CheckpointError, ConfigError
from variator_jax.evaluation.data import EvalData
from variator_jax.evaluation.evaluate import evaluate
from variator_jax.evaluation.infer import infer
from variator_jax.mesh import make_mesh
from variator_jax.train.jobs import lora_job
from variator_jax.train.objectives import LoraTraining, TaskTraining
from variator_jax.train.step import init_state, make_eval_step, make_train_step

LENGTHS = dict(tiny_runs.DATA.feature_lengths)
CONFIG = LoraConfig()
EVALUATED = dataclasses.replace(tiny_runs.DATA, eval_batches=2)
STEPS = 4


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A backbone, a LoRA of it, and a plugin of both."""
    folder = tiny_runs.save_tiny_backbone(tmp_path_factory.mktemp("lora"))
    _train(folder, folder / "tuned", data=EVALUATED, checkpoint_period=STEPS // 2)
    _plugin(folder, folder / "adapted", initial_lora_path=str(folder / "tuned"))
    return folder


def _train(work, model_dir, **settings):
    return _plugin(work, model_dir, **{"trained": "lora", "steps": STEPS} | settings)


def _plugin(work, model_dir, **settings):
    own = {"initial_checkpoint_path": str(work / "backbone"), "steps": 2}
    return tiny_runs.run(model_dir, **own | settings)


def _fresh(backbone):
    return init_lora(CONFIG, backbone.params, jax.random.key(0))


def test_a_run_moves_a_and_b_and_nothing_else(work):
    backbone = load_backbone(work / "backbone")
    lora = load_lora(work / "tuned", backbone)
    before, after = flat(_fresh(backbone)), flat(lora.params)
    assert before.keys() == after.keys()
    assert all(not np.array_equal(before[name], after[name]) for name in before)
    assert lora.config == CONFIG and lora.task == tiny_runs.TASK
    assert not (work / "tuned" / "backbone").exists()
    losses = [row["loss"] for row in tiny_runs.rows(work / "tuned")]
    assert losses[-1] < losses[0]


def test_the_frozen_arrays_stay_bit_identical_and_only_a_and_b_are_differentiated(work):
    path, half = str(work / "backbone"), "bfloat16"
    settings = {"trained": "lora", "initial_checkpoint_path": path, "backbone_dtype": half}
    config = tiny_runs.config(**settings)
    job = lora_job(config, make_mesh(tiny_runs.TINY, tiny_runs.DATA.batch_size))
    params, frozen = job.start()
    before = jax.tree.map(lambda x: np.array(x, copy=True), frozen)
    assert {x.dtype.name for x in jax.tree.leaves(frozen)} == {half}
    assert {x.dtype.name for x in jax.tree.leaves(params)} == {"float32"}
    state = init_state(params, config.optimizer)
    step = make_train_step(job.objective, config.optimizer)
    state, _ = jax.jit(step)(state, frozen, _batch())
    assert_same(before, frozen)
    assert jax.tree.structure(state.params) == jax.tree.structure(params)
    # In memory in bfloat16, it is still the backbone that is on the disk.
    assert job.identity["backbone"] == load_backbone(path).fingerprint


def _batch():
    return next(tiny_runs.DATA.train(0))


def test_a_fresh_one_has_the_loss_of_its_backbone_dropout_included(work):
    backbone = load_backbone(work / "backbone")
    network = T5(dataclasses.replace(tiny_runs.TINY, dropout_rate=0.5))
    fresh, batch = _fresh(backbone), _batch()

    @jax.jit
    def both(fresh, params, rng):
        own = LoraTraining(network, CONFIG).terms(fresh, params, batch, rng)
        return own["task"], TaskTraining(network).terms(params, None, batch, rng)["task"]

    losses = [both(fresh, backbone.params, jax.random.key(seed)) for seed in (1, 2)]
    for own, bare in losses:
        np.testing.assert_allclose(own, bare, rtol=1e-6)
    assert losses[0][0] != losses[1][0]


def test_what_is_loaded_has_the_held_out_loss_of_what_was_trained(work):
    logged = tiny_runs.rows(work / "tuned", "eval")[-1]["loss"]
    merged = load_backbone(work / "backbone", lora=work / "tuned")
    step = jax.jit(make_eval_step(TaskTraining(T5(tiny_runs.TINY))))
    losses = []
    for backbone in (merged, load_backbone(work / "backbone")):
        totals = [step(backbone.params, None, batch) for batch in EVALUATED.validation()]
        losses.append(sum(x["task"] for x, _ in totals) / sum(w["task"] for _, w in totals))
    assert losses[0] == pytest.approx(logged, rel=1e-5)
    assert abs(losses[1] - logged) > 1e-3


def test_a_run_that_was_stopped_ends_with_the_arrays_of_one_that_was_not(work, tmp_path):
    cut = tmp_path / "cut"
    shutil.copytree(work / "tuned", cut, ignore=shutil.ignore_patterns(str(STEPS)))
    result = _train(work, cut, data=EVALUATED)
    assert result.step == STEPS and result.exported == cut / "lora"
    assert_same(load_lora(cut).params, load_lora(work / "tuned").params)
    with pytest.raises(CheckpointError, match="its lora is"):
        _train(work, cut, lora=LoraConfig(rank=2))


def test_both_are_evaluated_together_and_not_apart(work, tmp_path):
    data = EvalData(tiny_runs.TASK, LENGTHS, batch_size=32)
    paths = {"model_dir": str(tmp_path), "initial_checkpoint_path": str(work / "backbone")}
    paths |= {"plugin_paths": [str(work / "adapted")]}
    report = evaluate(data=data, initial_lora_path=str(work / "tuned"), **paths)
    merged = load_backbone(work / "backbone", lora=work / "tuned")
    assert [(x.ratio, x.identical_to_backbone) for x in report.ratios] == [(1, True), (4, False)]
    assert report.backbone.fingerprint == merged.fingerprint
    assert set(report.control_no_ffn) == set(report.majority) == {tiny_runs.TASK}
    reason = rf"with a LoRA merged in \(task '{tiny_runs.TASK}'\) .*INITIAL_LORA_PATH"
    with pytest.raises(CheckpointError, match=reason):
        evaluate(data=data, **paths)


def test_inference_runs_the_merged_weights(work, tmp_path):
    def run(output, checkpoint, **paths):
        paths = {"initial_checkpoint_path": str(checkpoint), "plugin_path": adapted} | paths
        data, folder = EvalData(tiny_runs.TASK, LENGTHS, 64), tmp_path / output
        infer(output_dir=str(folder), data=data, mode="score", **paths)
        return [path.read_bytes() for path in sorted(folder.glob("*score*"))]

    adapted, tuned = str(work / "adapted"), str(work / "tuned")
    merged = load_backbone(work / "backbone", lora=tuned)
    save_backbone(tmp_path / "merged", tiny_runs.TINY, merged.params)
    together = run("together", work / "backbone", initial_lora_path=tuned)
    assert together and together == run("merged", tmp_path / "merged")
    with pytest.raises(CheckpointError, match="with a LoRA merged in"):
        run("together", work / "backbone")
    with pytest.raises(ConfigError, match="another run, with backbone"):
        run("together", work / "backbone", plugin_path=None)


def test_it_is_refused_where_it_is_not_merged(work, tmp_path):
    for trained in ("backbone", "lora", "student"):
        with pytest.raises(ConfigError, match=f"INITIAL_LORA_PATH .* TRAINED is '{trained}'"):
            _plugin(work, tmp_path, trained=trained, initial_lora_path=str(work / "tuned"))


def test_a_run_needs_a_decoder_and_sites(work, tmp_path):
    encoder = dataclasses.replace(tiny_runs.TINY, num_decoder_layers=0)
    with pytest.raises(ConfigError, match="no decoder"):
        _train(work, tmp_path, backbone=encoder)
    with pytest.raises(ConfigError, match="matches no weight"):
        _train(work, tmp_path, lora=LoraConfig(sites=("nothing",)))


def test_the_plan_of_a_run_counts_a_and_b(capsys):
    files = ["--gin_file=nano_docs.gin", "--gin_file=runs/lora.gin"]
    assert cli.main(["train", "--engine=builtin", *files, "--gin.LORA_RANK=2", "--dry_run"]) == 0
    printed = capsys.readouterr().out
    count = 2 * (128 + 128) * 2 * 4  # rank, in and out, query and value, layers
    assert "LORA_RANK = 2" in printed and "LEARNING_RATE = 0.0001" in printed
    rows = {line.split("  ")[0]: line for line in printed.splitlines()}
    assert f"{count:,}" in rows["LoRA"] and f"{count:,}" in rows["gradients"]
