"""Meshes: which are chosen, which are refused, and where the weights then lie."""

import dataclasses
import math

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from variator_jax import partitioning
from variator_jax.backbone import get_config, shape_params
from variator_jax.errors import ConfigError
from variator_jax.partitioning import MeshShape, default_shape

XXL = get_config("t5_1_1_xxl")  # 11.1 B parameters, 64 heads
GIB = 2**30
TINY = get_config(
    "nano", vocab_size=384, embed_dim=16, num_heads=4, head_dim=8, mlp_dim=32,
    num_encoder_layers=2, num_decoder_layers=1,
)  # fmt: skip


@pytest.mark.parametrize(
    ("room", "expected"),
    [
        (None, (8, 1, 1)),  # not known, as on CPUs
        (80 * GIB, (8, 1, 1)),  # 20.7 GiB in bfloat16 leave more than half
        (40 * GIB, (4, 2, 1)),
        (16 * GIB, (2, 4, 1)),
        (4 * GIB, (1, 8, 1)),  # fits nowhere: cut as far as can be
    ],
)
def test_data_comes_first_and_fsdp_as_memory_gets_short(room, expected):
    found = default_shape(XXL, 32, 8, room, bytes_per_weight=2)
    assert dataclasses.astuple(found) == expected


def test_model_comes_last_where_rows_are_too_few():
    assert dataclasses.astuple(default_shape(XXL, 4, 8, None)) == (4, 1, 2)
    found = default_shape(XXL, 4, 16, 16 * GIB, bytes_per_weight=2)
    assert dataclasses.astuple(found) == (4, 1, 4)
    assert dataclasses.astuple(default_shape(XXL, 4, 16, 4 * GIB, bytes_per_weight=2)) == (1, 4, 4)


def test_no_mesh_at_all_is_an_error_with_a_remedy():
    with pytest.raises(ConfigError, match="a batch of 3: take a batch that is a multiple of 7"):
        default_shape(TINY, 3, 7)


@given(
    devices=st.integers(1, 48),
    batch=st.integers(1, 64),
    heads=st.integers(1, 16),
    embed=st.sampled_from([16, 24, 40]),
)
def test_possible_shapes_are_all_that_divide_and_no_others(devices, batch, heads, embed):
    config = dataclasses.replace(TINY, num_heads=heads, embed_dim=embed, mlp_dim=48)
    found = {dataclasses.astuple(s) for s in partitioning.possible_shapes(config, batch, devices)}
    numbers = range(1, devices + 1)
    expected = {
        (data, fsdp, devices // (data * fsdp))
        for data in numbers
        for fsdp in numbers
        if devices % (data * fsdp) == 0 and batch % (data * fsdp) == 0 and embed % fsdp == 0
    }
    model = math.gcd(heads, 48, config.vocab_size)
    assert found == {shape for shape in expected if model % shape[2] == 0}


@pytest.mark.parametrize(
    ("shape", "batch", "message"),
    [
        ((4, 1, 1), 8, r"has 4 devices, and there are 8\. Possible: .*4 x 1 x 2 \(data x fsdp"),
        ((8, 1, 1), 4, r"cannot share 4 rows of a \(micro\)batch\. Possible: 4 x 1 x 2"),
        ((1, 1, 8), 8, r"cannot split 4 heads\. Possible: 2 x 1 x 4 .*; 1 x 2 x 4"),
        ((1, 1, 8), 1, r"cannot split 4 heads\. Possible: none, with a batch of 1\."),
    ],
)
def test_a_mesh_that_is_not_possible_is_refused_with_the_nearest(shape, batch, message):
    with pytest.raises(ConfigError, match=r"^MESH_SHAPE \d x \d x \d \(.*" + message):
        partitioning.check_shape(MeshShape(*shape), TINY, batch, 8)


@pytest.mark.parametrize(
    ("change", "shape", "message"),
    [
        ({"mlp_dim": 30}, (1, 1, 4), "cannot split 30 feed-forward units"),
        ({"vocab_size": 390}, (1, 1, 4), "cannot split 390 embeddings"),
        ({"embed_dim": 18}, (1, 4, 1), "cannot cut a width of 18"),
    ],
)
def test_every_cut_must_divide(change, shape, message):
    with pytest.raises(ConfigError, match=message):
        partitioning.check_shape(MeshShape(*shape), dataclasses.replace(TINY, **change), 8, 4)


@pytest.mark.parametrize("shape", ["(1, 1, 1)", (1,), (1, 1, 0), (1, 1, 1.0), (-1, 1, 1)])
def test_a_mesh_is_three_positive_integers(shape):
    with pytest.raises(ConfigError, match=r"it is a tuple \(data, fsdp, model\) of positive"):
        partitioning.make_mesh(TINY, 8, shape)


def test_two_numbers_are_data_and_model_as_in_t5x():
    devices = jax.devices()[:1]
    assert partitioning.make_mesh(TINY, 8, (1, 1), devices).devices.shape == (1, 1, 1)
    with pytest.raises(ConfigError, match="MESH_SHAPE 2 x 1 x 3 "):
        partitioning.make_mesh(TINY, 8, (2, 3), devices)


def test_a_refused_mesh_never_reaches_the_devices():
    with pytest.raises(ConfigError, match="has 4 devices, and there are 2"):
        partitioning.make_mesh(TINY, 8, (4, 1, 1), devices=["a", "b"])


@pytest.fixture(scope="module")
def specs():
    """The partition of each weight of a backbone, by its path."""
    mesh = AbstractMesh((2, 2, 2), partitioning.AXES)
    shardings = partitioning.parameter_shardings(TINY, mesh)
    leaves = jax.tree_util.tree_leaves_with_path(shardings)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): x.spec for p, x in leaves}


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("token_embedder/embedding", ("model", "fsdp")),
        ("encoder/layers_0/attention/query/kernel", ("fsdp", "model")),
        ("encoder/layers_1/attention/key/kernel", ("fsdp", "model")),
        ("decoder/layers_0/encoder_decoder_attention/value/kernel", ("fsdp", "model")),
        ("encoder/layers_0/attention/out/kernel", ("model", "fsdp")),
        ("encoder/layers_0/mlp/wi_0/kernel", ("fsdp", "model")),
        ("encoder/layers_0/mlp/wi_1/kernel", ("fsdp", "model")),
        ("encoder/layers_0/mlp/wo/kernel", ("model", "fsdp")),
        ("decoder/logits_dense/kernel", ("fsdp", "model")),
        ("encoder/layers_0/pre_mlp_layer_norm/scale", ("fsdp",)),
        ("encoder/relpos_bias/rel_embedding", ("model", None)),
    ],
)
def test_weights_are_cut_by_their_logical_axes(specs, path, expected):
    assert specs[path] == PartitionSpec(*expected)


def test_every_weight_has_a_place_and_its_cuts_divide():
    for name in ("t5_1_0_small", "mt5_small"):
        config = get_config(name)
        [shape] = partitioning.possible_shapes(config, 2, 2)[:1]
        mesh = AbstractMesh(dataclasses.astuple(shape), partitioning.AXES)
        shapes = shape_params(config)
        shardings = partitioning.parameter_shardings(config, mesh)
        assert jax.tree.structure(shapes) == jax.tree.structure(shardings)
        jax.tree.map(lambda leaf, place: place.shard_shape(leaf.shape), shapes, shardings)


def test_a_plugin_lies_everywhere_and_a_batch_in_rows():
    mesh = AbstractMesh((2, 2, 2), partitioning.AXES)
    assert partitioning.replicated(mesh).shard_shape((7, 5)) == (7, 5)
    assert partitioning.batch_sharding(mesh).shard_shape((8, 5)) == (2, 5)


def test_activations_are_pinned_and_weights_whole_while_they_are_used():
    """A pin is an operation of the traced program; Flax leaves it out where it sees no mesh."""
    from variator_jax.backbone.layers import constrain

    mesh = Mesh([[jax.devices()[:1]]], partitioning.AXES)
    hidden = jax.ShapeDtypeStruct((8, 4, 16), "float32")

    def pins(*names):
        shape = hidden if not names else jax.ShapeDtypeStruct((16, 16), "float32")
        # A function of its own each time, for JAX remembers what it has traced.
        traced = jax.make_jaxpr(lambda x: constrain(x, *names))(shape)
        return [e.params["sharding"].spec for e in traced.eqns if "sharding" in e.params]

    assert pins() == []
    with partitioning.activations(mesh):
        assert pins() == [PartitionSpec(("data", "fsdp"), None, None)]
        assert pins("embed", "mlp") == [PartitionSpec(None, "model")]
        assert pins("joined_kv", "embed") == [PartitionSpec("model", None)]
        assert pins("vocab", "embed") == [PartitionSpec("model", None)]
    assert pins() == []


def test_the_mesh_is_told_with_the_bytes_of_each_device():
    mesh = partitioning.make_mesh(XXL, 32, (1, 1, 1), jax.devices()[:1])
    text = partitioning.describe(mesh, XXL, 2)
    assert text.startswith("mesh 1 x 1 x 1 (data x fsdp x model) of cpu, 1 process(es); ")
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shape_params(XXL)))
    assert text.endswith(f"backbone: {2 * parameters / 2**20:,.1f} MiB a device")
