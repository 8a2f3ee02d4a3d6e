"""Formats: recognising what a path holds, loading it whatever it is, and converting it."""

import os
import pathlib
import re
import sys
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any

from variator_jax.errors import CheckpointError, ConfigError, check_known
from variator_jax.files import AnyPath, check_folder, is_url, wrap_errors
from variator_jax.store import backbone as backbones
from variator_jax.store import hugging_face, other_plugins, plugins, t5x
from variator_jax.store.backbone import Backbone, Source, Stream
from variator_jax.store.lora import Lora, collect_with_lora
from variator_jax.store.plugins import INDEX, Key, Plugin, load_plugin

BACKBONE, HUGGING_FACE, T5X = "variator", "hf", "t5x"  # as `variator convert` calls them
PLUGIN, PLUGIN_SET, LORA, RUN = "plugin", "plugin_set", "lora", "run"
FOLDERS, UNKNOWN = "folders", "unknown"
# A folder is of the first kind one of whose files it holds. Arrays without their description are
# damaged folders; their reader reports what is missing.
_MARKS: dict[str, tuple[str, ...]] = {
    BACKBONE: ("backbone.json", "backbone.safetensors"),
    PLUGIN: ("plugin.json", "plugin.safetensors"),
    PLUGIN_SET: (INDEX,),
    LORA: ("lora.json", "lora.safetensors"),
    T5X: ("_CHECKPOINT_METADATA", "state/_METADATA", "_METADATA", "checkpoint"),
    RUN: ("run.json", "backbone/backbone.json", "lora/lora.json", "plugin/plugin.json"),
    HUGGING_FACE: ("config.json", "model.safetensors", "pytorch_model.bin"),
}
_FORMATS: dict[str, tuple[Callable[..., Source], Callable[..., Any]]] = {
    HUGGING_FACE: (hugging_face.open_hf, hugging_face.write),
    T5X: (t5x.open_t5x, t5x.write),
    BACKBONE: (backbones.open_folder, backbones.write),
}
FORMATS = tuple(_FORMATS)
PLUGINS = ("official", "t5x-run")  # sources of plugin folders
_EVERY = 5.0  # seconds between two lines of progress


def kind_of(path: AnyPath) -> str:
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
            # One of several plugins may be called 'plugin', as the only one of a run is.
            others = any(os.path.lexists(folder / mark) for mark in _MARKS[RUN][:-1])
            several = kind == RUN and not others and len(plugin_folders(folder)) > 1
            return PLUGIN_SET if several else kind
    if any(re.fullmatch(r"checkpoint_\d+", name) for name in names):
        return T5X
    if plugin_folders(folder):
        return PLUGIN_SET
    return FOLDERS if "report.json" in names or folders_in(folder) else UNKNOWN


def folders_in(folder: pathlib.Path) -> list[pathlib.Path]:
    """The folders in a folder, without hidden ones (drafts of writers among them)."""
    items = [x for x in folder.iterdir() if x.is_dir() and not x.name.startswith(".")]
    return sorted(items, key=lambda item: (len(item.name), item.name))  # ratio_2 before ratio_16


def plugin_folders(folder: pathlib.Path) -> list[pathlib.Path]:
    """The plugin folders in a folder, and those of the run folders in it."""
    members = [run_part(item, "plugin") for item in folders_in(folder)]
    return [x for x in members if any((x / mark).exists() for mark in _MARKS[PLUGIN])]


def run_part(path: AnyPath, part: str) -> pathlib.Path:
    """`path` itself, or the 'backbone' or 'plugin' folder in it where `path` is a run folder."""
    folder = pathlib.Path(path)
    return folder / part if (folder / part).is_dir() else folder


def backbone_folder(path: str) -> pathlib.Path | str:
    """The folder that `path` names, or the backbone in it where it is a run folder; URLs as given.

    Raises:
      CheckpointError: if there is nothing, with how to get a backbone.
    """
    if is_url(path):
        return path
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


def open_backbone(path: AnyPath) -> Source:
    """The leaves of the backbone at a path, in any format, none of them read yet.

    Raises:
      CheckpointError: if there is none, or it is damaged; naming what was found.
    """
    kind = kind_of(path)
    if kind in _FORMATS:
        return _FORMATS[kind][0](path)
    folder = pathlib.Path(path)
    if kind == RUN and (folder / "backbone").is_dir():
        return backbones.open_folder(folder / "backbone")
    if kind == LORA or (kind == RUN and (folder / "lora").is_dir()):
        hint = "give it as the LoRA of one (lora=..., INITIAL_LORA_PATH)"
        raise CheckpointError(f"{folder} holds a LoRA and no backbone; {hint}.")
    if kind in (PLUGIN, PLUGIN_SET, RUN):
        raise CheckpointError(f"{folder} holds a compression plugin and no backbone.")
    kinds = "backbone (backbone.json), Hugging Face folder (config.json), T5X checkpoint or run"
    raise unknown(folder, kinds)


def load_backbone(path: AnyPath, dtype: Any = None, lora: Lora | AnyPath | None = None) -> Backbone:
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
        hint = "variator convert --dtype writes another one"
        raise CheckpointError(f"{path} is a backbone folder, which keeps its dtype; {hint}.")
    return collect_with_lora(source, lora, dtype)


def identify_backbone(path: AnyPath) -> Backbone:
    """The backbone at a path as `load_backbone` returns it, without the parameters.

    Each array is read for the fingerprint, one at a time.

    Raises:
      CheckpointError: as `load_backbone`.
    """
    return backbones.identify(open_backbone(path))


def load_plugins(path: AnyPath, backbone: Backbone | None = None) -> dict[Key, Plugin]:
    """Reads the plugins of one backbone, by ratio or name (`by_key`), in rising order of ratio.

    Args:
      path: a plugin folder, a set, a run folder, or a folder of plugin or run folders; or a T5X
        checkpoint with a plugin, whose backbone is read to the end for its fingerprint.
      backbone: the backbone they must belong to; None leaves that to whoever uses them.

    Raises:
      CheckpointError: if there is none, one is damaged, two have the same name, or not all belong
        to the same backbone.
    """
    if not isinstance(path, AnyPath):
        hint = "several are joined: [*load_plugins(a).values(), *load_plugins(b).values()]"
        raise CheckpointError(f"Expected the path of one folder, found {path!r}; {hint}.")
    folder = check_folder(path)
    kind = kind_of(folder)
    if kind == T5X:
        plugin = other_plugins.load_t5x_plugin(folder, backbone)
        return {plugin.config.ratio: plugin}
    members = plugin_folders(folder)
    if kind in (PLUGIN, RUN):
        members = [run_part(folder, "plugin")]
    elif os.path.lexists(folder / INDEX):
        indexed = plugins.indexed_members(folder)
        if set(indexed) != set(members):
            names = ", ".join(sorted(item.name for item in set(indexed) ^ set(members)))
            raise CheckpointError(f"{folder / INDEX} and its folder differ: {names}.")
    if not members or kind == BACKBONE:
        raise unknown(folder, "plugin (plugin.json) or folder of plugins")
    loaded = [load_plugin(member, backbone) for member in members]
    called = [plugin.config.name for plugin in loaded]
    if len(set(called)) < len(called):
        held = {str(x.relative_to(folder)): n for x, n in zip(members, called, strict=True)}
        raise CheckpointError(f"{folder} has two plugins of one name: {held}.")
    owners = {plugin.description["backbone"]["fingerprint"] for plugin in loaded}
    if len(owners) > 1:
        raise CheckpointError(f"{folder} mixes backbones: {' and '.join(sorted(owners))}.")
    return plugins.by_key(loaded)


def convert(
    source: str, target: str, path: AnyPath, destination: AnyPath, dtype: Any = None
) -> str:
    """Converts a backbone, with its progress on stderr, and describes what was made.

    Args:
      source: the format of `path`: 'hf', 't5x' or 'variator'.
      target: the format to write: one of the same.
      path: what to read; for variator also a run folder, for T5X also a URL such as
        gs://bucket/checkpoint_1000000.
      destination: a folder that does not exist yet, or is empty.
      dtype: what the weights are cast to; None keeps each one's.

    Raises:
      CheckpointError: if `path` is damaged or of another format, or `destination` is in use.
      ConfigError: for a format or a dtype that there is not.
    """
    check_known("--to is", target, FORMATS)
    start, folder = time.monotonic(), new_folder(destination, target)
    if source != T5X and is_url(path):
        raise CheckpointError(f"{path}: only T5X checkpoints are read from URLs.")
    opened = _FORMATS[source][0](run_part(path, "backbone") if source == BACKBONE else path)
    stream = Stream(opened, dtype, show_progress)
    _FORMATS[target][1](folder, stream)
    return (
        f"backbone {opened.config.name} in {folder}\n"
        f"  leaves:      {len(opened.leaves)}\n"
        f"  bytes:       {stream.bytes:,}\n"
        f"  dtype:       {stream.config.param_dtype}\n"
        f"  fingerprint: {stream.fingerprint}\n"
        f"  seconds:     {time.monotonic() - start:.1f}"
    )


def convert_plugin(
    source: str,
    path: AnyPath,
    destination: AnyPath,
    backbone: AnyPath | None = None,
    residual_scale: float = other_plugins.RESIDUAL_SCALE,
) -> pathlib.Path:
    """Makes a plugin folder of a file of the official release, or of a T5X run's checkpoint.

    Args:
      source: 'official' or 't5x-run'.
      path: the file; or `checkpoint_<step>`, the run's folder for its latest, or a URL.
      destination: a folder that does not exist yet, or is empty.
      backbone: the plugin's backbone, in any format; for a T5X run by default the one in it.
      residual_scale: see `other_plugins.load_official`.

    Raises:
      CheckpointError: if anything is damaged or does not fit.
      ConfigError: for an official plugin without a backbone.
    """
    folder = new_folder(destination, "variator")
    owner = None if backbone is None else identify_backbone(backbone)
    if source == "official":
        if owner is None:
            raise ConfigError("--from official needs --backbone PATH, the plugin's backbone.")
        plugin = other_plugins.load_official(path, owner, residual_scale)
    else:
        plugin = other_plugins.load_t5x_plugin(path, owner, show_progress)
    plugins.write_plugin(folder, plugin)
    return folder


def new_folder(path: AnyPath, target: str) -> pathlib.Path:
    """The folder to write in a format, which must not hold anything.

    Raises:
      CheckpointError: if it does, or is behind a URL.
    """
    if is_url(path):
        raise CheckpointError(f"{path}: folders are written locally only.")
    folder = t5x.target_folder(path) if target == T5X else pathlib.Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists already; it is left alone. Name a new folder.")
    return folder


def show_progress(leaves: Collection[str]) -> Iterator[str]:
    """Iterates over the paths of leaves, and prints a line to stderr every few seconds."""
    last = time.monotonic()
    for done, path in enumerate(leaves, start=1):
        yield path
        if done == len(leaves) or time.monotonic() - last > _EVERY:
            last = time.monotonic()
            print(f"{done} of {len(leaves)} leaves, {path}", file=sys.stderr)
