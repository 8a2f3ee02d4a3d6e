"""Folders of sentence-transformers, such as ST5 and GTR: the encoder, and what is behind it."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from variator_jax.errors import CheckpointError
from variator_jax.files import check_folder, wrap_errors
from variator_jax.serving.tasks import Dense
from variator_jax.store import Backbone, load_backbone
from variator_jax.store.arrays import Stored, open_arrays
from variator_jax.store.description import read_json
from variator_jax.store.pickles import open_state_dict

MODULES = "modules.json"
_ORDER = ["Transformer", "Pooling", "Dense", "Normalize"]


class Encoder(NamedTuple):
    """A backbone, and what a folder of sentence-transformers has besides."""

    backbone: Backbone
    dense: tuple[Dense, ...] = ()  # behind mean pooling
    max_length: int | None = None  # tokens of the longest text, EOS included


def load_encoder(path: str | os.PathLike) -> Encoder:
    """Loads a backbone from its folder, or from one of sentence-transformers with its layers.

    Raises:
      VariatorError: as `load_backbone`; and of sentence-transformers for anything but mean pooling,
        dense layers without another activation than tanh, and normalisation, in this order.
    """
    if not (Path(path) / MODULES).is_file():
        return Encoder(load_backbone(path))
    folder = check_folder(path)
    file = folder / MODULES
    with wrap_errors(f"{file} is not readable JSON"):
        modules = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise CheckpointError(f"{file} is not a list of modules.")
    parts = [(str(m.get("type")).rpartition(".")[2], folder / str(m.get("path"))) for m in modules]
    kinds = [kind for kind, _ in parts]
    known = [kind for kind in kinds if kind in _ORDER]
    if known != kinds or sorted(kinds, key=_ORDER.index) != kinds or kinds[:2] != _ORDER[:2]:
        raise CheckpointError(f"{file} has the modules {kinds}; expected {_ORDER} in this order.")
    if any(not part.resolve().is_relative_to(folder.resolve()) for _, part in parts):
        raise CheckpointError(f"{file} names a folder outside of its own.")
    _check_pooling(parts[1][1] / "config.json")
    _check_texts(folder / "config_sentence_transformers.json", "default_prompt_name")
    _check_texts(parts[0][1] / "sentence_bert_config.json", "do_lower_case")
    dense = tuple(_read_dense(part) for kind, part in parts if kind == "Dense")
    return Encoder(load_backbone(parts[0][1]), dense, _max_length(parts[0][1]))


def _max_length(folder: Path) -> int | None:
    file = folder / "sentence_bert_config.json"
    found = read_json(file).get("max_seq_length") if file.is_file() else None
    if found is not None and (type(found) is not int or found < 1):
        raise CheckpointError(f"{file} has the max_seq_length {found!r}; expected 1 or more.")
    return found


def _check_texts(file: Path, setting: str) -> None:
    """Refuses a setting that would change each text before it is tokenised."""
    if file.is_file() and (found := read_json(file).get(setting)):
        raise CheckpointError(
            f"{file} has {setting} {found!r}, which changes each text; change the texts "
            "themselves, or write it into the task's prompt, and set it to null."
        )


def arrays_of(layer: Dense) -> dict[str, np.ndarray]:
    """The arrays that a dense layer has, by the names of its fields."""
    return {"kernel": layer.kernel} | ({} if layer.bias is None else {"bias": layer.bias})


def _check_pooling(file: Path) -> None:
    """Refuses everything but the mean; older and newer releases write it in different ways."""
    config = read_json(file)
    prefix = "pooling_mode_"
    modes = {k.removeprefix(prefix) for k, v in config.items() if k.startswith(prefix) and v}
    if config.get("pooling_mode"):
        modes = {str(config["pooling_mode"]) + "_tokens"}
    if modes != {"mean_tokens"}:
        raise CheckpointError(f"{file} pools by {sorted(modes)}; only mean_tokens is known.")


def _read_dense(folder: Path) -> Dense:
    activation = str(read_json(folder / "config.json").get("activation_function"))
    name = activation.rpartition(".")[2]
    if name not in ("Identity", "Tanh"):
        raise CheckpointError(f"{folder} has the activation {activation!r}, not Identity or Tanh.")
    weights = folder / "model.safetensors"
    stored: dict[str, Stored] = (
        open_arrays(weights) if weights.is_file() else open_state_dict(folder / "pytorch_model.bin")
    )
    if not {"linear.weight"} <= set(stored) <= {"linear.weight", "linear.bias"}:
        raise CheckpointError(f"{folder} holds {sorted(stored)}; expected linear.weight, .bias.")
    arrays: dict[str, Any] = {key: array.read().astype("f4") for key, array in stored.items()}
    kernel = np.ascontiguousarray(arrays["linear.weight"].T)  # as safetensors writes arrays
    return Dense(kernel, arrays.get("linear.bias"), name == "Tanh")
