"""Files made to exhaust their reader: each is refused, soon and by name."""

import json
import struct

import numpy as np
import pytest
import torch_files
from torch_files import Call, Id, Name, dumps, words

from variator_jax.errors import CheckpointError
from variator_jax.store import pickled_tensors
from variator_jax.store.arrays_file import read_arrays
from variator_jax.store.torch_pickle import read_state_dict

DTYPE = Name("numpy", "dtype").words
DICT = Name("collections", "OrderedDict").words
LOAD = Name("torch.storage", "_load_from_bytes").words


def _reason(file, data):
    file.write_bytes(data)
    with pytest.raises(CheckpointError) as error:
        read_state_dict(file)
    assert file.name in str(error.value) and len(str(error.value)) < 500
    return str(error.value)


@pytest.mark.parametrize(
    "value",
    [b")" + b"2\x86" * 40, b")" + b"\x85" * 100_000],
    ids=["doubled forty times", "a hundred thousand deep"],
)
def test_a_strangers_object_is_named_by_its_kind_only(tmp_path, value):
    calls = b"\x80\x02" + DTYPE + value + b"\x85R."
    assert "dtype a tuple, which are no numbers" in _reason(tmp_path / "f.pkl", calls)
    # As a content, as a key, and as the state of what it completes.
    assert "holds a tuple" in _reason(tmp_path / "f.pkl", b"\x80\x02" + value + b".")
    assert "a tuple" in _reason(tmp_path / "f.pkl", b"\x80\x02}" + value + b"K\x01s.")
    _reason(tmp_path / "f.pkl", b"\x80\x02" + DTYPE + b"X\x02\0\0\0f4\x85R" + value + b"b.")


@pytest.mark.parametrize("error", [RecursionError, MemoryError])
def test_what_is_too_deep_or_too_large_is_a_broken_file(tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    data = dumps({"a": Call(Name("torch", "Size"), (1,))})
    monkeypatch.setattr(pickled_tensors, "_sizes", fail)
    assert "too deep or too large" in _reason(tmp_path / "f.pkl", data)


def test_numbers_as_names_are_not_written_out(tmp_path):
    assert "the value of a int is a str" in _reason(tmp_path / "f.pkl", dumps({7: "b"}))
    assert "no proper key" in _reason(tmp_path / "f.pkl", dumps({1 << 20_000: "b"}))
    pairs = Call(Name("collections", "OrderedDict"), [(1 << 20_000, "b")])
    assert "a dictionary is broken" in _reason(tmp_path / "f.pkl", dumps(pairs))


class TestCopies:
    def test_a_memoised_list_is_not_copied_without_end(self, tmp_path, monkeypatch):
        monkeypatch.setattr(pickled_tensors, "_MAX_ITEMS", 1000)
        pairs = words([("a", 1)] * 100) + b"q\x000"  # memoised and taken from the stack
        calls = (DICT + b"h\x00\x85R0") * 9
        ending = DICT + b"h\x00\x85R."
        assert "no tensor" in _reason(tmp_path / "f.pkl", b"\x80\x02" + pairs + calls + ending)
        calls = calls + DICT + b"h\x00\x85R0"
        reason = _reason(tmp_path / "f.pkl", b"\x80\x02" + pairs + calls + ending)
        assert "more than 1000 items in all" in reason

    def test_files_within_the_file_share_its_items(self, tmp_path, monkeypatch):
        monkeypatch.setattr(pickled_tensors, "_MAX_ITEMS", 150)
        kind = Name("torch", "FloatStorage")
        storage = Id(("storage", kind, "0", "cpu", 1, None))
        inner = torch_files.legacy(storage, {"0": np.ones(1, "f4")})
        # A storage with a hundred items beside it, in the dict of the system.
        beside = Call(Name("collections", "OrderedDict"), [("little_endian", True)] * 100)
        start = dumps(torch_files.MAGIC) + dumps(torch_files.PROTOCOL)
        rest = inner[inner.index(dumps(storage)) :]
        one = start + dumps(beside) + rest
        call = Call(Name("torch.storage", "_load_from_bytes"), one)
        assert "no tensor" in _reason(tmp_path / "f.pkl", dumps({"a": call}))
        reason = _reason(tmp_path / "f.pkl", dumps({"a": call, "b": call}))
        assert "more than 150 items" in reason

    def test_a_storage_named_twice_is_read_once(self, tmp_path, monkeypatch):
        storage = Id(("storage", Name("torch", "FloatStorage"), "0", "cpu", 1, None))
        inner = torch_files.legacy(storage, {"0": np.ones(1, "f4")})
        memoised = b"\x80\x02" + words(inner) + b"q\x000"
        twice = memoised + LOAD + b"h\x00\x85R" + LOAD + b"h\x00\x85R\x86."
        made, init = [], pickled_tensors.Storage.__init__
        monkeypatch.setattr(
            pickled_tensors.Storage, "__init__", lambda *x: made.append(1) or init(*x)
        )
        assert "holds a tuple" in _reason(tmp_path / "f.pkl", twice)
        assert len(made) == 1

    def test_bytes_for_a_storage_hold_nothing_else(self, tmp_path):
        call = Call(Name("torch.storage", "_load_from_bytes"), dumps({"a": 1}))
        assert "a dict where a storage belongs" in _reason(tmp_path / "f.pkl", dumps({"a": call}))

    def test_a_call_has_few_arguments(self, tmp_path):
        call = Call(Name("torch._utils", "_rebuild_parameter"), *[0] * 1000)
        assert "1000 arguments" in _reason(tmp_path / "f.pkl", dumps({"a": call}))


def test_a_tensor_without_numbers_has_a_shape_that_numpy_takes(tmp_path):
    storage = Id(("storage", Name("torch", "FloatStorage"), "0", "cpu", 1, None))
    huge = (0, 1 << 40, 1 << 40)
    tensor = Call(Name("torch._utils", "_rebuild_tensor_v2"), storage, 0, huge, (1, 1, 1))
    data = torch_files.legacy({"a": tensor}, {"0": np.ones(1, "f4")})
    assert "proper shape" in _reason(tmp_path / "f.pkl", data)


def _safetensors(file, entry, content=b""):
    header = json.dumps({"a": entry}).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + content)


@pytest.mark.parametrize(
    ("shape", "size", "reason"),
    [
        ([1] * 65, 4, "65 dimensions; up to 8"),
        ([1] * 9, 4, "9 dimensions"),
        ([0] * 65, 0, "65 dimensions"),
        ([0, 1 << 61, 1 << 61], 0, "no proper shape"),
    ],
)
def test_arrays_of_strange_shapes_are_refused(tmp_path, shape, size, reason):
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}
    _safetensors(tmp_path / "f.safetensors", entry, b"\0" * size)
    with pytest.raises(CheckpointError, match=reason):
        read_arrays(tmp_path / "f.safetensors")


def test_eight_dimensions_are_read(tmp_path):
    entry = {"dtype": "F32", "shape": [1] * 8, "data_offsets": [0, 4]}
    _safetensors(tmp_path / "f.safetensors", entry, b"\0" * 4)
    assert read_arrays(tmp_path / "f.safetensors")["a"].shape == (1,) * 8
