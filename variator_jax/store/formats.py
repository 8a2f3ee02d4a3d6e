"""Recognises by its content what a path holds, and opens backbones of every format."""

from __future__ import annotations

import os
import pathlib
import re
from typing import TYPE_CHECKING, Any

from variator_jax.errors import CheckpointError
from variator_jax.files import wrap_errors
from variator_jax.store import backbone_folder
from variator_jax.store.source import Backbone, Source, collect, identify

if TYPE_CHECKING:
    from variator_jax.store.lora import Lora

BACKBONE, PLUGIN, PLUGIN_SET, LORA = "backbone", "plugin", "plugin_set", "lora"
HUGGING_FACE, T5X, RUN, REPORT, FOLDERS = "hugging_face", "t5x", "run", "report", "folders"
UNKNOWN = "unknown"
_PARTS = ("backbone", "lora", "plugin")
# A folder is of the first kind one of whose files it holds. Arrays without their description are
# damaged folders; their reader reports what is missing.
_MARKS: dict[str, tuple[str, ...]] = {
    BACKBONE: ("backbone.json", "backbone.safetensors"),
    PLUGIN: ("plugin.json", "plugin.safetensors"),
    PLUGIN_SET: ("plugins.json",),
    LORA: ("lora.json", "lora.safetensors"),
    T5X: ("_CHECKPOINT_METADATA", "state/_METADATA", "_METADATA", "checkpoint"),
    RUN: ("run.json", *(f"{part}/{part}.json" for part in _PARTS)),
    HUGGING_FACE: ("config.json", "model.safetensors", "pytorch_model.bin"),
}


def is_url(path: str | os.PathLike) -> bool:
    """Whether a path has a scheme, such as gs:// or file://."""
    return isinstance(path, str) and re.match(r"[a-z][a-z0-9+.-]+://", path) is not None


def kind_of(path: str | os.PathLike) -> str:
    """The kind of what a path (a folder, or a URL) holds, one of this module's names.

    Raises:
      CheckpointError: if there is no readable folder.
    """
    if is_url(path):
        return T5X  # the only one that is read remotely
    folder = check_folder(path)
    with wrap_errors(f"{folder} cannot be read"):
        names = os.listdir(folder)
    for kind, marks in _MARKS.items():
        # A broken link counts, too: its reader reports the error.
        if any(os.path.lexists(folder / mark) for mark in marks):
            return kind
    if any(re.fullmatch(r"checkpoint_\d+", name) for name in names):
        return T5X
    if plugin_folders(folder):
        return PLUGIN_SET
    if "report.json" in names:
        return REPORT
    return FOLDERS if folders_in(folder) else UNKNOWN


def check_folder(path: str | os.PathLike) -> pathlib.Path:
    """The path of a folder that exists.

    Raises:
      CheckpointError: if it does not, or is a file.
    """
    folder = pathlib.Path(path)
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file; a folder was expected.")
    if not folder.is_dir():
        raise CheckpointError(f"There is no folder {str(folder)!r}.")
    return folder


def folders_in(folder: pathlib.Path) -> list[pathlib.Path]:
    """The folders in a folder, without hidden ones (drafts of writers among them)."""
    with wrap_errors(f"{folder} cannot be read"):
        items = [x for x in folder.iterdir() if x.is_dir() and not x.name.startswith(".")]
    return sorted(items, key=lambda item: (len(item.name), item.name))  # ratio_2 before ratio_16


def plugin_folders(folder: pathlib.Path) -> list[pathlib.Path]:
    """The plugin folders in a folder, and those of the run folders in it."""
    members = []
    for item in folders_in(folder):
        places = [item, item / "plugin"]
        members += [x for x in places if any((x / mark).exists() for mark in _MARKS[PLUGIN])][:1]
    return members


def unknown(folder: pathlib.Path, expected: str) -> CheckpointError:
    """What to raise for a folder of no known kind."""
    names = sorted(item.name for item in folder.iterdir())
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    held = f"it holds {', '.join(names[:5])}{more}" if names else "it is empty"
    return CheckpointError(f"{folder} is not a {expected}: {held}.")


def open_backbone(path: str | os.PathLike) -> Source:
    """The leaves of the backbone at a path, in any format, none of them read yet.

    Raises:
      CheckpointError: if there is none, or it is damaged; naming what was found.
    """
    kind = kind_of(path)
    if kind == HUGGING_FACE:
        from variator_jax.store import hugging_face

        return hugging_face.open_hf(path)
    if kind == T5X:
        from variator_jax.store import t5x

        return t5x.open_t5x(path)
    folder = pathlib.Path(path)
    if kind == RUN and (folder / "backbone").is_dir():
        folder = folder / "backbone"
    elif kind != BACKBONE:
        raise _not_a_backbone(folder, kind)
    return backbone_folder.open_folder(folder)


def load_backbone(
    path: str | os.PathLike, dtype: Any = None, lora: Lora | str | os.PathLike | None = None
) -> Backbone:
    """Reads a backbone folder, a Hugging Face folder, a T5X checkpoint or a run's backbone.

    Our own folders have checksums. In formats without them (Hugging Face's safetensors, raw data of
    T5X) a flipped bit of a weight is seen only in the backbone's fingerprint.

    Args:
      path: a local folder, or for T5X also a URL such as gs://bucket/checkpoint_1000000.
      dtype: what the weights of another format are cast to ('bfloat16', ...), and what the
        backbone then computes in; None keeps what the files have. Our own folders keep theirs.
      lora: a LoRA of this backbone to merge into the weights, or the folder of one or of a run
        that trained one.

    Raises:
      CheckpointError: if there is none, or it is damaged; naming what was found. Or if the LoRA is
        another backbone's.
    """
    source = open_backbone(path)
    if dtype is not None and source.fingerprint is not None:
        raise CheckpointError(
            f"{path} is a backbone folder, which keeps the dtype it was written in; convert it "
            "to another one with: variator convert --dtype"
        )
    if lora is None:
        return collect(source, dtype)
    from variator_jax.store.lora import collect_with_lora

    return collect_with_lora(source, lora, dtype)


def identify_backbone(path: str | os.PathLike) -> Backbone:
    """The backbone at a path as `load_backbone` returns it, without the parameters.

    Each array is read for the fingerprint, one at a time.

    Raises:
      CheckpointError: as `load_backbone`.
    """
    return identify(open_backbone(path))


def _not_a_backbone(folder: pathlib.Path, kind: str) -> CheckpointError:
    if kind == LORA or (kind == RUN and (folder / "lora").is_dir()):
        return CheckpointError(
            f"{folder} holds a LoRA and no backbone. Give both: load_backbone(BACKBONE, lora=LORA),"
            " or INITIAL_LORA_PATH with INITIAL_CHECKPOINT_PATH."
        )
    if kind in (PLUGIN, PLUGIN_SET, RUN):
        return CheckpointError(f"{folder} holds a compression plugin and no backbone.")
    kinds = "backbone (backbone.json), Hugging Face folder (config.json), T5X checkpoint or run"
    return unknown(folder, kinds)
