"""What a path holds, told by its content: backbones in three formats, plugins, LoRAs and runs."""

from __future__ import annotations

import os
import pathlib
import re

from variator_jax.errors import CheckpointError
from variator_jax.store import backbone_folder, lora_folder, plugin_folder
from variator_jax.store.files import check_folder, read_error

BACKBONE, PLUGIN, PLUGIN_SET, LORA = "backbone", "plugin", "plugin_set", "lora"
HUGGING_FACE, T5X, RUN, REPORT, FOLDERS = "hugging_face", "t5x", "run", "report", "folders"
UNKNOWN = "unknown"

_URL = re.compile(r"[a-z][a-z0-9+.-]+://")
# A folder is of the first kind one of whose marks it holds.
_MARKS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (BACKBONE, (backbone_folder.DESCRIPTION,)),
    (PLUGIN, (plugin_folder.DESCRIPTION,)),
    (PLUGIN_SET, ("plugins.json",)),
    (LORA, (lora_folder.DESCRIPTION,)),
    (T5X, ("_CHECKPOINT_METADATA", "state/_METADATA", "_METADATA", "checkpoint")),
    (
        RUN,
        (
            "run.json",
            f"backbone/{backbone_folder.DESCRIPTION}",
            f"plugin/{plugin_folder.DESCRIPTION}",
            f"lora/{lora_folder.DESCRIPTION}",
        ),
    ),
    (HUGGING_FACE, ("config.json", "model.safetensors", "pytorch_model.bin")),
    (BACKBONE, (backbone_folder.ARRAYS,)),  # a damaged one, whose reader says what is missing
    (PLUGIN, (plugin_folder.ARRAYS,)),
    (LORA, (lora_folder.ARRAYS,)),
)


def kind_of(path: str | os.PathLike, *, look_below: bool = True) -> str:
    """The kind of what lies at a path, one of this module's names.

    Args:
      path: a folder, or a URL.
      look_below: whether a folder of no kind may be one because of the folders in it.

    Raises:
      CheckpointError: if there is no readable folder.
    """
    if _URL.match(str(path)):
        return T5X  # the only one that is read from afar
    folder = check_folder(path)
    try:
        names = [item.name for item in folder.iterdir()]
    except OSError as error:
        raise read_error(folder, error) from error
    for kind, marks in _MARKS:
        if any(_exists(folder / mark) for mark in marks):
            return kind
    if any(re.fullmatch(r"checkpoint_\d+", name) for name in names):
        return T5X
    if plugin_folders(folder):
        return PLUGIN_SET
    if _exists(folder / "report.json"):
        return REPORT
    below = look_below and any(map(_is_something, parts(folder)))
    return FOLDERS if below else UNKNOWN


def _is_something(folder: pathlib.Path) -> bool:
    try:
        return kind_of(folder, look_below=False) != UNKNOWN
    except CheckpointError:  # not readable, and so nothing that could be described
        return False


def parts(folder: pathlib.Path) -> list[pathlib.Path]:
    """The folders in a folder, without hidden ones (drafts of writers among them)."""
    try:
        items = sorted(folder.iterdir(), key=_by_number)
        return [item for item in items if item.is_dir() and not item.name.startswith(".")]
    except OSError as error:
        raise read_error(folder, error) from error


def plugin_folders(folder: pathlib.Path) -> list[pathlib.Path]:
    """The plugin folders in a folder, and those of the run folders in it."""
    found = []
    for item in parts(folder):
        for place in (item, item / "plugin"):
            if _exists(place / plugin_folder.DESCRIPTION) or _exists(place / plugin_folder.ARRAYS):
                found.append(place)
                break
    return found


def held(folder: pathlib.Path) -> str:
    """What a folder of no known kind holds, for messages."""
    names = sorted(item.name for item in folder.iterdir())
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"it holds {', '.join(names[:5])}{more}" if names else "it is empty"


def _exists(path: pathlib.Path) -> bool:
    # A link that leads nowhere is there, too: its reader says what is wrong with it.
    return os.path.lexists(path)


def _by_number(path: pathlib.Path) -> tuple[str, int]:
    digits = re.search(r"\d+$", path.name)
    return path.name.rstrip("0123456789"), int(digits[0]) if digits else -1


def unknown(folder: pathlib.Path, expected: str) -> CheckpointError:
    """What to raise for a folder of no known kind."""
    return CheckpointError(f"{folder} is no {expected}: {held(folder)}.")
