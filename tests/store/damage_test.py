"""Hundreds of damaged folders of each kind: each is refused by name, and none loads.

The damage is drawn from fixed seeds. Descriptions and weights that were forged, rather than hit by
chance, come with checksums that fit, so that the checks behind the checksums are tried, too.
"""

import hashlib
import json
import pathlib
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import torch_files
from golden_vectors import config
from tiny import random_params, random_plugin

from variator_jax import LoraConfig, load_backbone, load_lora, load_plugins, save_lora
from variator_jax.backbones.lora import init_lora
from variator_jax.errors import CheckpointError
from variator_jax.plugin import PluginConfig
from variator_jax.store import save_backbone, save_plugin
from variator_jax.store.arrays_file import file_checksum
from variator_jax.store.safetensors_file import Writer, read_header
from variator_jax.store.torch_pickle import read_state_dict

SHAPE = config("1_1", num_encoder_layers=2, num_decoder_layers=1)
KINDS = ("plugin", "backbone", "lora")
JSON = {kind: f"{kind}.json" for kind in KINDS}
ARRAYS = {kind: f"{kind}.safetensors" for kind in KINDS}
LOAD = {"plugin": load_plugins, "backbone": load_backbone, "lora": load_lora}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A plugin folder, a backbone folder and a LoRA folder that load."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "spiece.model").write_bytes(b"a vocabulary")
    params = random_params(SHAPE)
    save_backbone(folder / "backbone", SHAPE, params, folder / "spiece.model")
    settings = PluginConfig(4, bottleneck=8)
    variables = random_plugin(settings, SHAPE, seed=1)
    backbone = load_backbone(folder / "backbone")
    save_plugin(folder / "plugin", settings, variables, backbone, {"task": "x"}, {"x": 81.5})
    assert set(load_plugins(folder / "plugin", backbone)) == {4}
    lora = LoraConfig(rank=2)
    shapes = jax.eval_shape(lambda: init_lora(lora, params, jax.random.key(0)))
    filled = jax.tree.map(lambda x: np.full(x.shape, 0.5, "f4"), shapes)
    save_lora(folder / "lora", lora, filled, backbone, {"task": "x"})
    assert load_lora(folder / "lora", backbone).config == lora
    return folder


def _any_file(folder, rng):
    return folder / str(rng.choice(sorted(p.name for p in folder.iterdir())))


def _truncated(folder, kind, rng):
    file = _any_file(folder, rng)
    data = file.read_bytes()
    file.write_bytes(data[: rng.integers(0, len(data))])
    return file


def _flipped(folder, kind, rng):
    """One to four bits of a file; in half of the cases within the header of the arrays."""
    file = _any_file(folder, rng)
    data = bytearray(file.read_bytes())
    end = len(data)
    if file.suffix == ".safetensors" and rng.random() < 0.5:
        end = 8 + int.from_bytes(data[:8], "little")
    for at in set(rng.integers(0, end, rng.integers(1, 5)).tolist()):
        data[at] ^= 1 << int(rng.integers(0, 8))
    file.write_bytes(data)
    return file


def _overwritten(folder, kind, rng):
    file = _any_file(folder, rng)
    data = bytearray(file.read_bytes())
    at, length = int(rng.integers(0, len(data))), int(rng.integers(1, 64))
    noise = rng.bytes(min(length, len(data) - at))
    data[at : at + len(noise)] = bytes(b ^ (n | 1) for b, n in zip(data[at:], noise, strict=False))
    file.write_bytes(data)
    return file


def _missing(folder, kind, rng):
    file = _any_file(folder, rng)
    file.unlink()
    if rng.random() < 0.3:
        file.mkdir()
    elif rng.random() < 0.3:
        file.symlink_to(file)
    return file


def _paths(content, at=()):
    """Where a wrong value must be noticed: everywhere but in what was written for people."""
    for key, value in content.items():
        yield (*at, key)
        if isinstance(value, dict) and key not in ("training", "quality"):
            yield from _paths(value, (*at, key))


def _forged_description(folder, kind, rng):
    """A missing key, a wrong type or an absurd number, under a checksum that fits."""
    file = folder / JSON[kind]
    content = json.loads(file.read_text())
    paths = sorted(_paths(content))
    *parents, key = paths[int(rng.integers(0, len(paths)))]
    node = content
    for parent in parents:
        node = node[parent]
    value = node[key]
    wrong = [{"a": 1}] if not isinstance(value, dict) else [["a"], None, "a", 4]
    if isinstance(value, int) and not isinstance(value, bool):
        wrong += [
            0 if key in ("ratio", "embed_dim", "bottleneck") else -1,
            10**9,
            10**400,
            "4",
            4.5,
        ]
        wrong += [True, None]
    if isinstance(value, str):
        wrong += [4, None if key != "vocabulary_fingerprint" else 4, ["a"]]
    choice = int(rng.integers(0, len(wrong) + 1))
    if choice == len(wrong):
        del node[key]
    else:
        node[key] = wrong[choice]
    if key == "checksum":
        file.write_text(json.dumps(content))
    else:
        _sign(file, content)
    return file


def _sign(file, content):
    """Writes a description whose checksum fits, as `write_description` would."""
    text = json.dumps({**content, "checksum": "0" * 64})
    before, _, after = text.rpartition("0" * 64)
    file.write_text(before + hashlib.sha256(text.encode()).hexdigest() + after)


def _forged_arrays(folder, kind, rng):
    """NaN, another shape, another dtype, a leaf too many or too few, under checksums that fit."""
    file = folder / ARRAYS[kind]
    arrays = {name: entry.read() for name, entry in read_header(file).items()}
    name = sorted(arrays)[int(rng.integers(0, len(arrays)))]
    array = arrays.pop(name).copy()
    damage = str(rng.choice(["nan", "infinite", "shape", "dtype", "missing", "surplus"]))
    if damage in ("nan", "infinite"):
        array.reshape(-1)[int(rng.integers(0, array.size))] = np.nan if damage == "nan" else -np.inf
    if damage == "shape":
        array = array[None]
    if damage == "dtype":
        array = array.astype(np.int32 if kind == "backbone" else ml_dtypes.bfloat16)
    if damage != "missing":
        arrays[name] = array
    if damage == "surplus":
        arrays[f"{name}_2"] = array
    writer = Writer(file, {name: (array.shape, array.dtype) for name, array in arrays.items()})
    for name, array in arrays.items():
        writer.write(name, array)
    writer.close()
    content = json.loads((folder / JSON[kind]).read_text())
    content["file_checksums"] = {file.name: file_checksum(file)}
    _sign(folder / JSON[kind], content)
    return file


DAMAGES = [
    _truncated, _flipped, _flipped, _overwritten, _missing, _forged_description,
    _forged_description, _forged_arrays,
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(100))
def test_a_damaged_folder_is_refused_by_name_and_reason(whole, tmp_path, kind, seed):
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    folder = tmp_path / kind
    shutil.copytree(whole / kind, folder)
    damage = DAMAGES[seed % len(DAMAGES)]
    file = damage(folder, kind, rng)
    with pytest.raises(CheckpointError) as error:
        LOAD[kind](folder)
    message = str(error.value)
    # Where description and arrays do not fit each other, either may be the one that is told of.
    assert file.name in message or str(folder) in message, message
    assert "Traceback" not in message and len(message) < 1000


def test_the_control_loads(whole, tmp_path):
    for kind in JSON:
        shutil.copytree(whole / kind, tmp_path / kind)
        content = json.loads((tmp_path / kind / JSON[kind]).read_text())
        _sign(tmp_path / kind / JSON[kind], content)  # signing alone is no damage
        LOAD[kind](tmp_path / kind)


@pytest.mark.parametrize("layout", ["zip", "legacy"])
def test_damaged_state_dicts_are_refused_or_hold_only_numbers(tmp_path, layout):
    """torch's older layout has no checksums: there, a flipped number is a number."""
    rng = np.random.default_rng(7)
    state = {f"layer.{i}.weight": rng.normal(size=(8, 6)).astype("f4") for i in range(4)}
    file = tmp_path / "model.bin"
    torch_files.WRITERS[layout](file, state)
    data, loaded = file.read_bytes(), 0
    for _ in range(150):
        changed = bytearray(data)
        if rng.random() < 0.3:
            changed = changed[: rng.integers(0, len(data))]
        else:
            changed[rng.integers(0, len(data))] ^= 1 << int(rng.integers(0, 8))
        file.write_bytes(changed)
        try:
            found = read_state_dict(file)
        except CheckpointError as error:
            assert file.name in str(error)
            continue
        loaded += 1
        assert all(isinstance(array, np.ndarray) for array in found.values())
        if layout == "zip":  # only what is no content, such as a file's date
            assert {name: array.tobytes() for name, array in found.items()} == {
                name: array.tobytes() for name, array in state.items()
            }
    assert loaded < 150


def test_nothing_of_a_damaged_folder_is_left_open(whole, tmp_path):
    """A refused file can be replaced at once, and then loads."""
    shutil.copytree(whole / "plugin", tmp_path / "plugin")
    file = tmp_path / "plugin" / "plugin.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    with pytest.raises(CheckpointError):
        load_plugins(tmp_path / "plugin")
    pathlib.Path(file).write_bytes(data)
    load_plugins(tmp_path / "plugin")
