"""A smaller student: what it starts with, what moves, and the backbone that it is afterwards."""

import dataclasses
import shutil

import jax
import numpy as np
import optax
import pytest
import tiny_runs
from flax import traverse_util
from tiny import random_params

from variator_jax import mesh as meshes
from variator_jax.backbones.t5 import Transformer, get_config
from variator_jax.backbones.t5.cost import encoder_flops
from variator_jax.errors import CheckpointError, ConfigError
from variator_jax.evaluation.evaluate import EvalData, evaluate
from variator_jax.plugin import PluginConfig
from variator_jax.store import load_backbone, save_backbone
from variator_jax.train import jobs, train
from variator_jax.train.losses import LossConfig
from variator_jax.train.step import init_state, make_eval_step, make_train_step
from variator_jax.train.student import StudentDistillation, initial_student, narrowed, whole_student

TINY = dataclasses.replace(tiny_runs.TINY, mlp_dim=128)
PLUGIN = PluginConfig(4, bottleneck=4)
ALL = LossConfig(1.0, 1.0, 1.0, 0.0)


def _run(model_dir, steps=4, **settings):
    settings = {"backbone": TINY, "plugin": PLUGIN, "trained": "student"} | settings
    return tiny_runs.run(model_dir, steps, **settings)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    params = jax.tree.map(lambda x: x * np.float32(0.5), random_params(TINY))
    save_backbone(folder / "backbone", TINY, params)
    return folder


@pytest.fixture(scope="module")
def trained(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    return _run(folder, initial_checkpoint_path=str(teacher))


def _batch():
    return next(tiny_runs.DATA.train(0))


def _flat(params):
    return traverse_util.flatten_dict(params, sep="/")


def _losses(params, mlp_dim):
    student = narrowed(TINY, mlp_dim)
    objective = StudentDistillation(Transformer(TINY), Transformer(student), ALL)
    sums, _ = jax.jit(make_eval_step(objective))(initial_student(params, mlp_dim), params, _batch())
    return {name: float(value) for name, value in sums.items()}


@pytest.mark.parametrize("activations", [("relu",), ("gelu", "linear")])
def test_the_neurons_with_the_largest_products_of_norms_stay_in_their_order(activations):
    config = get_config("nano", num_encoder_layers=1, mlp_activations=activations)
    params = random_params(config)
    kernels = _flat(params["encoder"]["layers_0"]["mlp"])
    strength = np.ones(config.mlp_dim)
    for path, kernel in kernels.items():
        for neuron in range(config.mlp_dim):
            own = kernel[neuron] if path == "wo/kernel" else kernel[:, neuron]
            strength[neuron] *= np.sqrt((np.asarray(own) ** 2).sum())
    expected = sorted(range(config.mlp_dim), key=lambda n: -strength[n])[:24]
    student = initial_student(jax.tree.map(jax.numpy.asarray, params), 24)
    for path, kernel in kernels.items():
        kept = kernel[sorted(expected)] if path == "wo/kernel" else kernel[:, sorted(expected)]
        np.testing.assert_array_equal(student[f"encoder/layers_0/mlp/{path}"], kept)


def test_a_student_of_full_width_is_its_teacher_and_a_narrow_one_is_not():
    params = jax.tree.map(jax.numpy.asarray, random_params(TINY))
    whole = whole_student(initial_student(params, 128), params)
    jax.tree.map(np.testing.assert_array_equal, whole, params)
    # But for rounding: XLA fuses the two passes differently.
    assert max(_losses(params, 128).values()) < 1e-9
    narrow = _losses(params, 64)
    assert set(narrow) == {"encoder_hidden", "decoder_hidden", "logits"}
    assert min(narrow.values()) > 1e-3


def test_a_step_moves_the_students_own_weights_alone_and_lowers_the_loss():
    params = jax.tree.map(jax.numpy.asarray, random_params(TINY))
    student = Transformer(narrowed(TINY, 32))
    objective = StudentDistillation(Transformer(TINY), student, LossConfig())
    optimizer = optax.adam(1e-2)
    state = init_state(initial_student(params, 32), optimizer)
    step, batch = jax.jit(make_train_step(objective, optimizer)), _batch()
    before, losses = jax.device_get((state.params, params)), []
    for _ in range(5):
        state, metrics = step(state, params, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    for path, leaf in before[0].items():
        assert (np.asarray(state.params[path]) != leaf).any(), path
    jax.tree.map(np.testing.assert_array_equal, before[1], params)


def test_a_run_exports_a_backbone_that_shares_all_but_its_encoders_kernels(teacher, trained):
    whole, student = load_backbone(teacher / "backbone"), load_backbone(trained.exported)
    assert trained.exported.name == "backbone"
    length = tiny_runs.DATA.feature_lengths["inputs"]
    most = encoder_flops(TINY, length, 4, PLUGIN)
    assert encoder_flops(student.config, length, 1) <= most
    assert student.config.encoder_mlp < TINY.mlp_dim == student.config.mlp_dim
    before, after = _flat(whole.params), _flat(student.params)
    assert set(before) == set(after)
    for path, leaf in after.items():
        if path.startswith("encoder/") and not path.endswith("/scale"):
            same = before[path].shape == leaf.shape and (before[path] == leaf).all()
            assert not same, path
        else:
            np.testing.assert_array_equal(before[path], leaf)


def test_the_exported_folder_reopens_with_its_shape_and_is_scored_and_served(trained, tmp_path):
    student = load_backbone(trained.exported)
    saved = save_backbone(tmp_path / "again", student.config, student.params)
    again = load_backbone(tmp_path / "again")
    assert again.config == student.config and again.fingerprint == saved == student.fingerprint
    jax.tree.map(np.testing.assert_array_equal, again.params, student.params)
    lengths = tiny_runs.DATA.feature_lengths
    report = evaluate(
        model_dir=str(tmp_path / "report"),
        data=EvalData(tiny_runs.TASK, lengths, batch_size=32),
        initial_checkpoint_path=str(trained.exported.parent),
    )
    assert report.backbone.name == student.config.name != TINY.name
    (entry,) = report.ratios
    assert entry.encoder_flops == encoder_flops(student.config, lengths["inputs"], 1)
    assert 0 <= entry.quality[tiny_runs.TASK] <= 100


def test_a_run_that_is_continued_has_the_weights_that_it_had(teacher, trained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained.exported.parent, folder)
    shutil.rmtree(folder / "backbone")
    result = _run(folder, initial_checkpoint_path=str(teacher))
    again, before = load_backbone(result.exported), load_backbone(trained.exported)
    assert again.fingerprint == before.fingerprint
    jax.tree.map(np.testing.assert_array_equal, again.params, before.params)


def test_only_the_students_own_weights_have_optimizer_state(teacher, tmp_path):
    mesh = meshes.make_mesh(TINY, 8)
    arguments = (str(tmp_path), TINY, str(teacher), PLUGIN, LossConfig(), tiny_runs.DATA, mesh)
    job = train.student_job(*arguments)
    own, frozen = job.start()
    state = init_state(own, optax.adam(1e-3))
    moments = sum(x.size for x in jax.tree.leaves(state.opt_state)) - 1
    assert moments == 2 * sum(x.size for x in own.values())
    assert {x.dtype.name for x in own.values()} == {"float32"}
    assert set(_flat(whole_student(own, frozen))) == set(_flat(frozen))


def test_what_a_student_cannot_be_is_told(teacher, trained, tmp_path):
    with pytest.raises(ConfigError, match="set RATIO to that ratio"):
        _run(tmp_path, initial_checkpoint_path=str(teacher), plugin=PluginConfig(1))
    with pytest.raises(ConfigError, match="set INITIAL_CHECKPOINT_PATH"):
        _run(tmp_path)
    with pytest.raises(ConfigError, match="TRAINED is 'students'.*Did you mean 'student'"):
        _run(tmp_path, trained="students")
    student = str(trained.exported.parent)
    with pytest.raises(CheckpointError, match="has encoder_mlp"):
        _run(tmp_path, trained="backbone", initial_checkpoint_path=student)
    with pytest.raises(CheckpointError, match="ratio is 4|encoder_mlp_dim is"):
        _run(student, initial_checkpoint_path=str(teacher), plugin=PluginConfig(2, bottleneck=4))


def test_a_student_is_the_backbone_of_further_runs_of_its_shape(trained):
    student = load_backbone(trained.exported)
    mesh = meshes.make_mesh(student.config, 8)
    folder = str(trained.exported.parent)
    loaded = jobs.load_initial_backbone(folder, student.config, tiny_runs.DATA, mesh)
    assert loaded.fingerprint == student.fingerprint
    assert loaded.config.encoder_mlp == student.config.encoder_mlp
