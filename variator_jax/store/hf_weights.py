"""The weights of a Hugging Face folder by name, not read yet: one file, shards, or pickles."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

from variator_jax.errors import CheckpointError
from variator_jax.store import safetensors_file, torch_pickle

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_COMPARED = 1 << 22  # numbers compared in one go


@dataclasses.dataclass(frozen=True)
class Pickled:
    """A weight of a pickled state dict, in the way of `safetensors_file.Entry`."""

    file: pathlib.Path
    name: str
    array: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""
        return self.array.shape

    @property
    def dtype(self) -> np.dtype:
        """Of its numbers."""
        return self.array.dtype

    def read(self) -> np.ndarray:
        """The array, a view of the file."""
        return self.array


Weight = safetensors_file.Entry | Pickled


def find_weights(folder: pathlib.Path) -> dict[str, Weight]:
    """Every weight of a folder, by name: safetensors before pickles, one file before shards."""
    for whole, index in ((WEIGHTS, INDEX), (PICKLE, PICKLE_INDEX)):
        if (folder / whole).is_file():
            return _file(folder / whole)
        if (folder / index).is_file():
            return _sharded(folder, folder / index)
    raise CheckpointError(
        f"{folder} holds no weights: there is no {WEIGHTS} (nor {INDEX}) and no {PICKLE} in it."
    )


def _file(path: pathlib.Path) -> dict[str, Weight]:
    if path.suffix == ".safetensors":
        return dict(safetensors_file.read_header(path))
    state = torch_pickle.read_state_dict(path)
    return {name: Pickled(path, name, array) for name, array in state.items()}


def _sharded(folder: pathlib.Path, index: pathlib.Path) -> dict[str, Weight]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map.")
    for file in weight_map.values():
        if not isinstance(file, str) or pathlib.PurePath(file).name != file:
            raise CheckpointError(f"{index} names {file!r}, which is no file of its folder.")
    found: dict[str, Weight] = {}
    for file in sorted(set(weight_map.values())):
        said = {name for name, where in weight_map.items() if where == file}
        weights = _file(folder / file)
        if odd := sorted(said ^ set(weights)):
            raise CheckpointError(f"{index} and {folder / file} disagree about {odd[0]}.")
        found |= weights
    return found


def equal(one: Weight, other: Weight) -> bool:
    """Whether two weights are the same in every number."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    first, second = one.read().reshape(-1), other.read().reshape(-1)
    parts = range(0, first.size, _COMPARED)
    return all(np.array_equal(first[i : i + _COMPARED], second[i : i + _COMPARED]) for i in parts)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Reads a dictionary, or raises a CheckpointError."""
    try:
        content = json.loads(path.read_text(encoding="utf8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no dictionary.")
    return content
