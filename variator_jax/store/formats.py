"""Which kind of folder a path means, recognised by its content, and loading it whatever it is."""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Callable
from typing import Any

from variator_jax.errors import CheckpointError
from variator_jax.files import check_folder, is_url, wrap_errors
from variator_jax.store import backbone as backbones
from variator_jax.store import hugging_face, t5x
from variator_jax.store.backbone import Backbone, Source
from variator_jax.store.lora import Lora, collect_with_lora
from variator_jax.store.plugins import INDEX, Plugin, indexed_members, load_plugin
from variator_jax.store.t5x_run import load_t5x_plugin

BACKBONE, HUGGING_FACE, T5X = "variator", "hf", "t5x"  # as `variator convert` calls them
PLUGIN, PLUGIN_SET, LORA, RUN = "plugin", "plugin_set", "lora", "run"
REPORT, FOLDERS, UNKNOWN = "report", "folders", "unknown"
_PARTS = ("backbone", "lora", "plugin")
# A folder is of the first kind one of whose files it holds. Arrays without their description are
# damaged folders; their reader reports what is missing.
_MARKS: dict[str, tuple[str, ...]] = {
    BACKBONE: ("backbone.json", "backbone.safetensors"),
    PLUGIN: ("plugin.json", "plugin.safetensors"),
    PLUGIN_SET: (INDEX,),
    LORA: ("lora.json", "lora.safetensors"),
    T5X: ("_CHECKPOINT_METADATA", "state/_METADATA", "_METADATA", "checkpoint"),
    RUN: ("run.json", *(f"{part}/{part}.json" for part in _PARTS)),
    HUGGING_FACE: ("config.json", "model.safetensors", "pytorch_model.bin"),
}
OPENERS: dict[str, Callable[..., Source]] = {
    HUGGING_FACE: hugging_face.open_hf,
    T5X: t5x.open_t5x,
    BACKBONE: backbones.open_folder,
}


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


def folders_in(folder: pathlib.Path) -> list[pathlib.Path]:
    """The folders in a folder, without hidden ones (drafts of writers among them)."""
    items = [x for x in folder.iterdir() if x.is_dir() and not x.name.startswith(".")]
    return sorted(items, key=lambda item: (len(item.name), item.name))  # ratio_2 before ratio_16


def plugin_folders(folder: pathlib.Path) -> list[pathlib.Path]:
    """The plugin folders in a folder, and those of the run folders in it."""
    members = []
    for item in folders_in(folder):
        places = [item, item / "plugin"]
        members += [x for x in places if any((x / mark).exists() for mark in _MARKS[PLUGIN])][:1]
    return members


def run_part(path: str | os.PathLike, part: str) -> pathlib.Path:
    """`path` itself, or the 'backbone' or 'plugin' folder in it where `path` is a run folder."""
    folder = pathlib.Path(path)
    return folder / part if (folder / part).is_dir() else folder


def backbone_folder(path: str) -> pathlib.Path:
    """The folder that `path` names, or the backbone in it where it is a run folder.

    Raises:
      CheckpointError: if there is nothing, with how to get a backbone.
    """
    folder = run_part(path, "backbone")
    if not folder.is_dir() or not any(folder.iterdir()):
        raise CheckpointError(
            f"INITIAL_CHECKPOINT_PATH {path!r} holds no backbone. Train one with "
            "--gin_file=runs/backbone.gin, or name a Hugging Face, T5X or variator folder."
        )
    return folder


def unknown(folder: pathlib.Path, expected: str) -> CheckpointError:
    """What to raise for a folder of another kind than the expected one."""
    names = ", ".join(sorted(item.name for item in folder.iterdir())[:5])
    held = f"it holds {names}" if names else "it is empty"
    return CheckpointError(f"{folder} is not a {expected}: {held}.")


def open_backbone(path: str | os.PathLike) -> Source:
    """The leaves of the backbone at a path, in any format, none of them read yet.

    Raises:
      CheckpointError: if there is none, or it is damaged; naming what was found.
    """
    kind = kind_of(path)
    if kind in OPENERS:
        return OPENERS[kind](path)
    folder = pathlib.Path(path)
    if kind == RUN and (folder / "backbone").is_dir():
        return backbones.open_folder(folder / "backbone")
    if kind == LORA or (kind == RUN and (folder / "lora").is_dir()):
        raise CheckpointError(
            f"{folder} holds a LoRA and no backbone. Give both: load_backbone(BACKBONE, lora=LORA),"
            " or INITIAL_LORA_PATH with INITIAL_CHECKPOINT_PATH."
        )
    if kind in (PLUGIN, PLUGIN_SET, RUN):
        raise CheckpointError(f"{folder} holds a compression plugin and no backbone.")
    kinds = "backbone (backbone.json), Hugging Face folder (config.json), T5X checkpoint or run"
    raise unknown(folder, kinds)


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
        return backbones.collect(source, dtype)
    return collect_with_lora(source, lora, dtype)


def identify_backbone(path: str | os.PathLike) -> Backbone:
    """The backbone at a path as `load_backbone` returns it, without the parameters.

    Each array is read for the fingerprint, one at a time.

    Raises:
      CheckpointError: as `load_backbone`.
    """
    return backbones.identify(open_backbone(path))


def load_plugins(path: str | os.PathLike, backbone: Backbone | None = None) -> dict[int, Plugin]:
    """Reads the plugins of one backbone, by compression ratio in rising order.

    Args:
      path: a plugin folder, a set, a run folder, or a folder of plugin or run folders; or a T5X
        checkpoint with a plugin, whose backbone is read to the end for its fingerprint.
      backbone: the backbone they must belong to; None leaves that to whoever uses them.

    Raises:
      CheckpointError: if there is none, one is damaged, two have the same ratio, or not all belong
        to the same backbone.
    """
    folder = check_folder(path)
    kind = kind_of(folder)
    if kind == T5X:
        plugin = load_t5x_plugin(folder, backbone)
        return {plugin.config.ratio: plugin}
    members = plugin_folders(folder)
    if kind in (PLUGIN, RUN):
        members = [run_part(folder, "plugin")]
    elif os.path.lexists(folder / INDEX):
        indexed = indexed_members(folder)
        if set(indexed) != set(members):
            names = ", ".join(sorted(item.name for item in set(indexed) ^ set(members)))
            raise CheckpointError(f"{folder / INDEX} and its folder differ: {names}.")
    if not members or kind == BACKBONE:
        raise unknown(folder, "plugin (plugin.json) or folder of plugins")
    plugins: dict[int, Plugin] = {}
    places: dict[int, pathlib.Path] = {}
    for member in members:
        plugin = load_plugin(member, backbone)
        ratio = plugin.config.ratio
        if ratio in places:
            names = f"{places[ratio].relative_to(folder)} and {member.relative_to(folder)}"
            raise CheckpointError(f"{folder} has two plugins of ratio {ratio}: {names}.")
        plugins[ratio], places[ratio] = plugin, member
    owners = {plugin.description["backbone"]["fingerprint"] for plugin in plugins.values()}
    if len(owners) > 1:
        raise CheckpointError(f"{folder} mixes backbones: {' and '.join(sorted(owners))}.")
    return dict(sorted(plugins.items()))
