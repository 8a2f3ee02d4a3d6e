"""The dry run's budget: what the mesh cuts is counted in parts, all else whole."""

import dataclasses

import jax
import optax
import pytest
from jax.sharding import AbstractMesh

from variator_jax import mesh as meshes
from variator_jax.backbones.t5 import T5, get_config, shape_params
from variator_jax.plugin import PluginConfig, init_plugin
from variator_jax.train import plan as planning

TINY = get_config("nano", vocab_size=384, num_encoder_layers=2)
PLUGIN = PluginConfig(4, bottleneck=8)
LENGTHS = {"inputs": 16, "targets": 8}


def run(mesh_shape, optimizer=None, **settings):
    settings |= {"optimizer": optimizer or optax.adamw(1e-3), "mesh_shape": mesh_shape}
    run = {"backbone": TINY, "plugin": PLUGIN, "batch_size": 8, "feature_lengths": LENGTHS}
    return planning.plan(**run, **settings)


@pytest.fixture
def plan(monkeypatch):
    """The plan's parts by name, on a mesh of devices that are not there."""

    def make(mesh_shape, *args, **settings):
        mesh = AbstractMesh(mesh_shape, meshes.AXES)
        monkeypatch.setattr(meshes, "make_mesh", lambda *args, **kwargs: mesh)
        return {part.name: part for part in run(mesh_shape, *args, **settings).parts}

    return make


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("mesh", [(1, 4, 1), (1, 2, 2), (4, 1, 1)])
def test_a_trained_backbone_s_gradients_and_moments_are_cut_as_it_is(plan, mesh):
    parts, numbers = plan(mesh, trained="backbone"), size(shape_params(TINY))
    assert {name: part.numbers for name, part in parts.items()} == {
        "backbone": numbers, "gradients": numbers, "optimizer state": 2 * numbers + 1,
    }  # fmt: skip
    whole, cut = 4 * numbers, parts["backbone"].bytes
    cuts = mesh[1] * mesh[2]
    # Norms have no axis of `model`, and the position biases none of `fsdp`.
    assert whole / cuts <= cut <= 1.02 * whole / cuts
    assert parts["gradients"].bytes == cut
    assert parts["optimizer state"].bytes == 2 * cut + 4  # two moments, and a counter


def test_so_is_what_a_student_trains(plan):
    alone, cut = (plan(mesh, trained="student") for mesh in ((1, 1, 1), (1, 4, 1)))
    for name in ("student", "gradients", "optimizer state"):
        assert cut[name].numbers == alone[name].numbers
        assert alone[name].bytes / 4 <= cut[name].bytes <= 1.02 * alone[name].bytes / 4


def test_factored_moments_are_not_their_weights_and_lie_everywhere(plan):
    adafactor = optax.adafactor(1e-3, min_dim_size_to_factor=8)
    alone, cut = (plan(m, adafactor, trained="backbone") for m in ((1, 1, 1), (1, 4, 1)))
    whole = alone["optimizer state"].bytes
    assert 0.8 * whole < cut["optimizer state"].bytes <= whole


@pytest.mark.parametrize("mesh", [(1, 1, 1), (1, 4, 1)])
def test_a_plugin_lies_whole_on_every_device(plan, mesh):
    fresh = jax.eval_shape(lambda: init_plugin(PLUGIN, T5(TINY).stack(), jax.random.key(0)))
    parts, trained = plan(mesh, backbone_dtype="bfloat16"), 4 * size(fresh.params)
    assert parts["plugin and its output scales"].bytes == 4 * size(dataclasses.astuple(fresh))
    assert parts["gradients"].bytes == trained
    assert parts["optimizer state"].bytes == 2 * trained + 4
    weights = 2 * size(shape_params(TINY)) / mesh[1]
    assert weights <= parts["backbone"].bytes <= 1.02 * weights


@pytest.mark.parametrize("trained", ["plugin", "student", "backbone", "lora"])
def test_a_run_without_a_plugin_does_not_mention_one(trained):
    text, named = str(run((1, 1, 1), trained=trained)), trained in ("plugin", "student")
    assert ("plugin ffn_x4 of sites ffn all x4 bottleneck=8: " in text) == named
    assert ("% saved, so at most" in text) == named
