"""Writes files as torch.save does, without torch, and pickles that mean harm.

The pickles are put together word by word, for Python's own pickler only writes names that it can
import.
"""

import pickle
import struct
import zipfile

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
STORAGES = {"float64": "Double", "float32": "Float", "float16": "Half", "bfloat16": "BFloat16"}
STORAGES["int64"] = "Long"


class Name:
    """A name that the pickle imports."""

    def __init__(self, module, name):
        self.words = f"c{module}\n{name}\n".encode()


class Call:
    """A call that the pickle makes."""

    def __init__(self, name, *arguments):
        self.name, self.arguments = name, arguments


class Id:
    """A persistent id."""

    def __init__(self, content):
        self.content = content


def words(value):
    """The pickle's words for a value, without the first and the last one."""
    if isinstance(value, Name):
        return value.words
    if isinstance(value, Call):
        return words(value.name) + words(value.arguments) + b"R"
    if isinstance(value, Id):
        return words(value.content) + b"Q"
    if isinstance(value, tuple):
        return b"(" + b"".join(map(words, value)) + b"t"
    if isinstance(value, list):
        return b"](" + b"".join(map(words, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(words(k) + words(v) for k, v in value.items()) + b"u"
    return pickle.dumps(value, 2)[2:-1]


def dumps(value):
    return b"\x80\x02" + words(value) + b"."


def _storage(key, array):
    kind = Name("torch", f"{STORAGES[array.dtype.name]}Storage")
    return ("storage", kind, key, "cpu", array.size)


def _tensor(storage, array):
    """Column by column where the array is so, as torch keeps transposed tensors."""
    strides = tuple(step // array.itemsize for step in array.strides)
    hooks = Call(Name("collections", "OrderedDict"))
    rebuild = Name("torch._utils", "_rebuild_tensor_v2")
    return Call(rebuild, storage, 0, array.shape, strides, False, hooks)


def _flat(array):
    return array.ravel(order="K").tobytes()


def save_zip(path, state, byteorder=b"little"):
    """torch.save's layout of today."""
    content = {n: _tensor(Id(_storage(str(i), a)), a) for i, (n, a) in enumerate(state.items())}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("plugin/data.pkl", dumps(content))
        archive.writestr("plugin/byteorder", byteorder)
        for i, array in enumerate(state.values()):
            archive.writestr(f"plugin/data/{i}", _flat(array))
        archive.writestr("plugin/version", b"3\n")


def legacy(content, storages):
    """torch.save's older layout: `content` and the arrays behind its storages."""
    system = {"protocol_version": PROTOCOL, "little_endian": True, "type_sizes": {"int": 4}}
    parts = [dumps(part) for part in (MAGIC, PROTOCOL, system, content, list(storages))]
    for array in storages.values():
        parts.append(struct.pack("<q", array.size) + _flat(array))
    return b"".join(parts)


def save_legacy(path, state):
    content = {n: _tensor(Id((*_storage(n, a), None)), a) for n, a in state.items()}
    path.write_bytes(legacy(content, state))


WRITERS = {"zip": save_zip, "legacy": save_legacy}
