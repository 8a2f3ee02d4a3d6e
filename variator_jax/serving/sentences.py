"""Folders of sentence-transformers, such as ST5 and GTR: the encoder, and what is behind it."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from variator_jax.errors import CheckpointError
from variator_jax.files import check_folder, wrap_errors
from variator_jax.serving.tasks import Dense
from variator_jax.store.arrays import Stored, open_arrays
from variator_jax.store.description import read_json
from variator_jax.store.pickles import open_state_dict

MODULES = "modules.json"
_ORDER = ["Transformer", "Pooling", "Dense", "Normalize"]


@dataclasses.dataclass(frozen=True)
class SentenceFolder:
    """What a folder of sentence-transformers holds.

    Attributes:
      backbone: the Hugging Face folder of the encoder, which `load_backbone` reads.
      dense: the layers behind mean pooling.
      normalized: whether its vectors have length 1.
    """

    backbone: Path
    dense: tuple[Dense, ...]
    normalized: bool


def is_sentence_folder(path: str | os.PathLike) -> bool:
    """Whether a path is a folder of sentence-transformers."""
    return (Path(path) / MODULES).is_file()


def read_sentence_folder(path: str | os.PathLike) -> SentenceFolder:
    """Reads `modules.json`, the pooling and the dense layers.

    Raises:
      CheckpointError: for anything but mean pooling, dense layers without another activation than
        tanh, and normalisation, in this order; or if a file is missing or damaged.
    """
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
    dense = tuple(_read_dense(part) for kind, part in parts if kind == "Dense")
    return SentenceFolder(parts[0][1], dense, "Normalize" in kinds)


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
    return Dense(arrays["linear.weight"].T, arrays.get("linear.bias"), name == "Tanh")
