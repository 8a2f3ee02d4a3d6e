"""Meshes: which are chosen, which are refused, and where the weights then lie."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from variator_jax import mesh as meshes
from variator_jax.backbones.t5 import get_config
from variator_jax.errors import ConfigError

XXL = get_config("t5_1_1_xxl")  # 11.1 B parameters, 64 heads
GIB = 2**30
TINY = dataclasses.replace(tiny.TINY, num_heads=4)


@pytest.mark.parametrize(("rows", "devices", "room", "expected"), [
    (32, 8, None, (8, 1, 1)),  # not known, as on CPUs
    (32, 8, 80 * GIB, (8, 1, 1)),  # 20.7 GiB in bfloat16 leave more than half
    (32, 8, 40 * GIB, (4, 2, 1)),
    (32, 8, 16 * GIB, (2, 4, 1)),
    (32, 8, 4 * GIB, (1, 8, 1)),  # fits nowhere: cut as far as can be
    (4, 8, None, (4, 1, 2)),  # too few rows
    (4, 16, 16 * GIB, (4, 1, 4)),
    (4, 16, 4 * GIB, (1, 4, 4)),
])  # fmt: skip
def test_data_comes_first_fsdp_as_memory_gets_short_and_model_last(rows, devices, room, expected):
    assert meshes.make_mesh(XXL, rows, None, range(devices), 2, room).devices.shape == expected


@pytest.mark.parametrize(("shape", "batch", "devices", "change", "message"), [
    ((4, 1, 1), 8, 8, {}, r"has 4 devices, and there are 8\. .*4 x 1 x 2 .*budget --devices 4"),
    ((8, 1, 1), 4, 8, {}, r"cannot share 4 rows of a \(micro\)batch\. Possible: 4 x 1 x 2"),
    ((1, 1, 8), 8, 8, {}, r"cannot split 4 heads\. Possible: 2 x 1 x 4 .*; 1 x 2 x 4"),
    ((1, 1, 8), 1, 8, {}, r"cannot split 4 heads\. Possible: none, with a batch of 1\."),
    ((1, 4), 8, 4, {"mlp_dim": 30}, "cannot split 30 feed-forward units"),  # T5X's form
    ((1, 1, 4), 8, 4, {"encoder_mlp_dim": 30}, "cannot split 30 units of the encoder"),
    ((1, 1, 4), 8, 4, {"vocab_size": 390}, "cannot split 390 embeddings"),
    ((1, 4, 1), 8, 4, {"embed_dim": 18}, "cannot cut a width of 18"),
])  # fmt: skip
def test_an_impossible_mesh_is_refused_with_the_nearest(shape, batch, devices, change, message):
    config = dataclasses.replace(TINY, **change)
    with pytest.raises(ConfigError, match=r"^MESH_SHAPE \d x \d x \d \(.*" + message):
        meshes.make_mesh(config, batch, shape, devices=range(devices))


@pytest.mark.parametrize("shape", ["(1, 1, 1)", (1,), (1, 1, 0), (1, 1, 1.0), (-1, 1, 1), None])
def test_what_is_no_shape_is_refused_and_so_is_a_batch_that_allows_none(shape):
    expected = r"it is a tuple \(data, fsdp, model\)" if shape else "batch that is a multiple of 7"
    with pytest.raises(ConfigError, match=expected):
        meshes.make_mesh(TINY, 3, shape, devices=range(7), hbm_bytes=GIB)


@dataclasses.dataclass(frozen=True)
class Device:
    """A device that is not there, of this or of another process."""

    id: int
    process_index: int = 0
    room: int | None = None
    platform: str = "tpu"
    device_kind: str = "TPU v4"
    coords: tuple[int, int, int] = (0, 0, 0)
    core_on_chip: int = 0

    def memory_stats(self):
        if self.process_index != jax.process_index():
            raise jax.errors.JaxRuntimeError("MemoryStats is only supported for addressable")
        return {"bytes_limit": self.room}


@pytest.mark.parametrize("index", [0, 1])
def test_all_processes_choose_by_the_memory_that_process_0_finds(monkeypatch, index):
    rooms, asked = (16 * GIB, 40 * GIB), []  # Process 1 alone would take (4, 2, 1).

    def broadcast(value):
        asked.append(int(value))
        return np.int32(rooms[0] // 2**20)

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: index)
    monkeypatch.setattr(meshes.multihost_utils, "broadcast_one_to_all", broadcast)
    devices = [Device(n, n // 4, rooms[n // 4], platform="gpu") for n in range(8)]
    mesh = meshes.make_mesh(XXL, 32, None, devices, bytes_per_weight=2)
    assert mesh.devices.shape == (2, 4, 1)
    assert asked == [rooms[index] // 2**20]  # of its own devices


def chips(*extents):
    """A box of TPUs in JAX's order: hosts of 2 x 2 chips, one after the other."""
    by_host = lambda at: (at[2], at[1] // 2, at[0] // 2, at[1], at[0])  # noqa: E731
    places = sorted(itertools.product(*map(range, extents)), key=by_host)
    return [Device(n, coords=place) for n, place in enumerate(places)]


@pytest.mark.parametrize("shape", [(1, 16, 4), (4, 4, 4), (16, 1, 4), (1, 32, 2)])
def test_on_tpus_a_mesh_follows_the_links(shape):
    cube = meshes.make_mesh(XXL, 64, shape, chips(4, 4, 4)).devices
    assert cube.shape == shape and len(set(cube.flat)) == 64
    coords = np.array([device.coords for device in cube.flat]).reshape(*shape, 3)
    apart = np.abs(np.diff(coords, axis=2)).sum(-1)  # between neighbours on `model`
    assert (apart == 1).all()


@pytest.mark.parametrize("devices", [
    [Device(n, platform="gpu") for n in (3, 0, 2, 1)],
    chips(4, 4, 1)[1:5],  # no box
    [*chips(2, 1, 1), *chips(2, 1, 1)],  # two slices
    [dataclasses.replace(d, core_on_chip=core) for d in chips(2, 1, 1) for core in (0, 1)],
])  # fmt: skip
def test_elsewhere_the_order_is_kept(devices):
    cube = meshes.make_mesh(XXL, 64, (2, 1, 2), devices).devices
    assert list(cube.flat) == devices


SPECS = {
    "token_embedder/embedding": ("model", "fsdp"),
    "encoder/layers_0/attention/query/kernel": ("fsdp", "model"),
    "encoder/layers_0/attention/out/kernel": ("model", "fsdp"),
    "encoder/layers_0/mlp/wi_0/kernel": ("fsdp", "model"),
    "encoder/layers_0/mlp/wo/kernel": ("model", "fsdp"),
    "decoder/logits_dense/kernel": ("fsdp", "model"),
    "encoder/layers_0/pre_mlp_layer_norm/scale": ("fsdp",),
    "encoder/relpos_bias/rel_embedding": ("model", None),
}


def test_weights_are_cut_by_their_logical_axes():
    shardings = tiny.flat(meshes.parameter_shardings(TINY, AbstractMesh((2, 2, 2), meshes.AXES)))
    assert {path: tuple(shardings[path].spec) for path in SPECS} == SPECS


def test_activations_are_pinned_and_weights_whole_while_they_are_used():
    """A pin is an operation of the traced program; Flax leaves it out where it sees no mesh."""
    from variator_jax.backbones.t5.layers import constrain

    mesh = Mesh([[jax.devices()[:1]]], meshes.AXES)
    hidden = jax.ShapeDtypeStruct((8, 4, 16), "float32")

    def pins(*names):
        shape = hidden if not names else jax.ShapeDtypeStruct((16, 16), "float32")
        # A function of its own each time, for JAX remembers what it has traced.
        traced = jax.make_jaxpr(lambda x: constrain(x, *names))(shape)
        return [e.params["sharding"].spec for e in traced.eqns if "sharding" in e.params]

    assert pins() == []
    with meshes.activations(mesh):
        assert pins() == [PartitionSpec(("data", "fsdp"), None, None)]
        assert pins("embed", "mlp") == [PartitionSpec(None, "model")]
        assert pins("joined_kv", "embed") == [PartitionSpec("model", None)]
        assert pins("vocab", "embed") == [PartitionSpec("model", None)]
    assert pins() == []
