"""T5X's checkpoints of today, as Orbax keeps them: `_METADATA` and zarr arrays, mostly in OCDBT."""

from __future__ import annotations

import json

from variator_jax.errors import CheckpointError
from variator_jax.store import stores
from variator_jax.store.stores import Spec, StoredArray

METADATA = "_METADATA"
MANIFEST = "manifest.ocdbt"
_EMPTY = ("None", "Dict", "List")  # nodes without an array


def open_target(spec: Spec, where: str, content: bytes) -> dict[str, StoredArray]:
    """The parameters of a checkpoint, by path, not read yet.

    Args:
      spec: the folder with `_METADATA`.
      where: the same, for messages.
      content: the bytes of `_METADATA`.

    Raises:
      CheckpointError: if the description is damaged or an array is missing.
    """
    file = f"{where}/{METADATA}"
    try:
        metadata = json.loads(content)
        entries = list(metadata["tree_metadata"].values())
        paths = [tuple(_names(entry)) for entry in entries]
        kinds = [entry["value_metadata"].get("value_type") for entry in entries]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{file} is no description of an Orbax checkpoint: {error}."
        ) from error
    driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
    if metadata.get("use_ocdbt", True):
        if stores.read_key(spec, MANIFEST) is None:
            raise CheckpointError(f"{where}/{MANIFEST} is missing.")
        spec = {"driver": "ocdbt", "base": spec, "path": ""}
    found = {
        "/".join(path[1:]): stores.open_array(
            stores.below(spec, ".".join(path)), f"{where}: {'.'.join(path)}", driver
        )
        for path, kind in zip(paths, kinds, strict=True)
        if path[0] == "target" and kind not in _EMPTY
    }
    if not found:
        tops = sorted({path[0] for path in paths})
        raise CheckpointError(f"{file} has no 'target', T5X's parameters; it has {tops}.")
    return found


def _names(entry: dict) -> list[str]:
    names = [part["key"] for part in entry["key_metadata"]]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"a leaf is named {names}")
    return names
