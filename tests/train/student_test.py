"""A smaller student: its width, what it starts with, what moves, and the backbone it becomes."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
import tiny_runs
from small_t5 import assert_same
from tiny import flat, random_params

from variator_jax import mesh as meshes
from variator_jax.backbones.t5 import T5, get_config, shape_params
from variator_jax.backbones.t5.cost import backbone_parameters
from variator_jax.errors import CheckpointError, ConfigError
from variator_jax.plugin import PluginConfig, stack_flops
from variator_jax.store import load_backbone, save_backbone
from variator_jax.train import jobs
from variator_jax.train.losses import LossConfig
from variator_jax.train.step import init_state, make_train_step
from variator_jax.train.student import (
    StudentDistillation,
    initial_student,
    student_job,
    student_leaves,
    student_shape,
    whole_student,
)

BASE = get_config("t5_1_0_base")
TINY = dataclasses.replace(tiny_runs.TINY, mlp_dim=128)
PLUGIN = PluginConfig(4, bottleneck=4)


def _flops(config, length, plugin=None):
    return stack_flops(T5(config).stack(), length, plugin)


def _run(model_dir, **settings):
    settings = {"backbone": TINY, "plugin": PLUGIN, "trained": "student"} | settings
    return tiny_runs.run(model_dir, 3, **settings)


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


@pytest.mark.parametrize("name", ["nano", "micro", "t5_1_0_base", "t5_1_1_large"])
@pytest.mark.parametrize(("length", "ratio", "bottleneck"), [(16, 2, 8), (65, 8, 64), (512, 4, 64)])
def test_a_student_costs_no_more_than_the_plugin_and_hardly_less(name, length, ratio, bottleneck):
    config, plugin = get_config(name), PluginConfig(ratio, bottleneck)
    student, most = student_shape(config, length, plugin), _flops(config, length, plugin)
    assert student.num_encoder_layers == config.num_encoder_layers
    assert _flops(student, length) <= most
    more = (student.encoder_mlp // 8 + 1) * 8
    wider = dataclasses.replace(student, encoder_mlp_dim=more)
    assert _flops(wider, length) > most or more > config.mlp_dim


def test_widths_at_t5_base_and_at_the_limits():
    # A quarter of the width is 768, and the plugin's own products pay for 74.5 neurons more.
    assert student_shape(BASE, 256, PluginConfig(4)).encoder_mlp == 840
    assert student_shape(BASE, 256, PluginConfig(4, layers=(0, 1, 2))).encoder_mlp > 2000
    nano = get_config("nano")  # a plugin that costs more than it saves
    assert student_shape(nano, 64, PluginConfig(2, bottleneck=4096)) is nano
    spans = PluginConfig(4, sites=("span all size=1",))
    with pytest.raises(ConfigError, match="less than one layer"):
        student_shape(get_config("nano", num_encoder_layers=1, mlp_dim=1), 64, spans)


def test_a_student_of_a_span_plugin_has_fewer_layers_which_are_the_teachers():
    spans = PluginConfig(8, sites=("span all size=1",))
    student = student_shape(TINY, 64, spans)
    assert student.num_encoder_layers < TINY.num_encoder_layers
    assert _flops(student, 64) <= _flops(TINY, 64, spans)
    params = jax.tree.map(jax.numpy.asarray, random_params(TINY))
    own = {path: leaf + 1 for path, leaf in initial_student(params, student).items()}
    tree, first = whole_student(own, params), "encoder/layers_0/attention/query/kernel"
    assert jax.tree.map(np.shape, tree) == jax.tree.map(np.shape, shape_params(student))
    np.testing.assert_array_equal(flat(tree)[first], flat(params)[first] + 1)


def test_a_narrow_encoder_has_its_own_width_and_name_and_trains_all_but_its_norms():
    student = student_shape(BASE, 256, PluginConfig(4))
    assert (student.name, student.encoder_mlp, student.mlp_dim) == ("t5_1_0_base_ffn840", 840, 3072)
    shapes = flat(shape_params(student))
    assert shapes["encoder/layers_3/mlp/wi/kernel"].shape == (768, 840)
    assert shapes["encoder/layers_3/mlp/wo/kernel"].shape == (840, 768)
    assert shapes["decoder/layers_3/mlp/wi/kernel"].shape == (768, 3072)
    assert backbone_parameters(student) == sum(x.size for x in shapes.values())
    leaves = student_leaves(shape_params(student))
    assert len(leaves) == 12 * (4 + 2) + 1  # kernels of attention and FFN, and the position bias
    assert all(path.startswith("encoder/") and "norm" not in path for path in leaves)


@pytest.mark.parametrize("activations", [("relu",), ("gelu", "linear")])
def test_the_neurons_with_the_largest_products_of_norms_stay_in_their_order(activations):
    config = dataclasses.replace(TINY, mlp_activations=activations)
    params = random_params(config)
    kernels = flat(params["encoder"]["layers_0"]["mlp"])
    strength = np.ones(config.mlp_dim)
    for path, kernel in kernels.items():
        neurons = kernel if path == "wo/kernel" else kernel.T
        strength *= np.sqrt((neurons.astype("f8") ** 2).sum(axis=1))
    kept = sorted(sorted(range(config.mlp_dim), key=lambda n: -strength[n])[:24])
    narrow = dataclasses.replace(config, encoder_mlp_dim=24)
    student = initial_student(jax.tree.map(jax.numpy.asarray, params), narrow)
    for path, kernel in kernels.items():
        expected = kernel[kept] if path == "wo/kernel" else kernel[:, kept]
        np.testing.assert_array_equal(student[f"encoder/layers_0/mlp/{path}"], expected)


def test_a_student_of_full_width_is_its_teacher_and_a_narrow_one_learns_from_it():
    params = jax.tree.map(jax.numpy.asarray, random_params(TINY))
    assert_same(whole_student(initial_student(params, TINY), params), params)
    shape = dataclasses.replace(TINY, encoder_mlp_dim=32)
    objective = StudentDistillation(T5(TINY), T5(shape), LossConfig(1.0, 1.0, 1.0, 0.0))
    optimizer = optax.adam(1e-2)
    state = init_state(initial_student(params, shape), optimizer)
    # Only its own weights have moments.
    moments = sum(x.size for x in jax.tree.leaves(state.opt_state)) - 1
    assert moments == 2 * sum(x.size for x in state.params.values())
    step, batch = jax.jit(make_train_step(objective, optimizer)), next(tiny_runs.DATA.train(0))
    (before, whole), losses = jax.device_get((state.params, params)), []
    for _ in range(5):
        state, metrics = step(state, params, batch)
        losses.append(float(metrics["loss"]))
    assert {"encoder_hidden", "decoder_hidden", "logits"} < set(metrics)
    assert losses[0] > 1e-3 and losses[-1] < losses[0]
    for path, leaf in before.items():
        assert (np.asarray(state.params[path]) != leaf).any(), path
    assert_same(whole, params)


def test_a_run_exports_a_backbone_that_shares_all_but_its_encoders_kernels(teacher, trained):
    whole, student = load_backbone(teacher / "backbone"), load_backbone(trained.exported)
    assert trained.exported.name == "backbone"
    length = tiny_runs.DATA.feature_lengths["inputs"]
    assert _flops(student.config, length) <= _flops(TINY, length, PLUGIN)
    assert student.config.encoder_mlp < TINY.mlp_dim == student.config.mlp_dim
    before, after = flat(whole.params), flat(student.params)
    assert set(before) == set(after)
    for path, leaf in after.items():
        same = before[path].shape == leaf.shape and (before[path] == leaf).all()
        moved = path.startswith("encoder/") and not path.endswith("/scale")
        assert same != moved, path


def test_the_exported_folder_is_the_backbone_of_further_runs(trained):
    student, folder = load_backbone(trained.exported), str(trained.exported.parent)
    settings = tiny_runs.config(backbone=student.config, initial_checkpoint_path=folder)
    loaded = jobs.load_initial_backbone(settings, meshes.make_mesh(student.config, 8), None)
    assert loaded.fingerprint == student.fingerprint
    assert loaded.config.encoder_mlp == student.config.encoder_mlp
    assert_same(loaded.params, student.params)


def test_a_student_starts_in_float32_from_a_rounded_teacher(teacher):
    settings = {"trained": "student", "backbone": TINY, "initial_checkpoint_path": str(teacher)}
    config = tiny_runs.config(backbone_dtype="bfloat16", **settings)
    own, frozen = student_job(config, meshes.make_mesh(TINY, 8)).start()
    assert {x.dtype.name for x in jax.tree.leaves((own, frozen))} == {"float32"}
    assert set(flat(whole_student(own, frozen))) == set(flat(frozen))


@pytest.mark.parametrize("settings, error, message", [
    ({"plugin": None}, ConfigError, "set RATIO"),
    ({"trained": "backbone", "initial_checkpoint_path": "student"}, CheckpointError, "mlp"),
    ({"model_dir": "student", "plugin": PluginConfig(2)}, CheckpointError, "another run"),
])  # fmt: skip
def test_what_a_student_cannot_be_is_refused(teacher, trained, tmp_path, settings, error, message):
    folders = {"student": str(trained.exported.parent)}
    settings = {name: folders.get(str(value), value) for name, value in settings.items()}
    with pytest.raises(error, match=message):
        _run(**{"model_dir": tmp_path, "initial_checkpoint_path": str(teacher)} | settings)
