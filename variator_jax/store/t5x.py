"""T5X checkpoints in and out: which layout a path has, and whole backbones in memory.

The layouts themselves are in `t5x_legacy.py`, `t5x_orbax.py` and `t5x_write.py`, the forms of the
tree in `scan.py`. Nothing here needs T5X.
"""

from __future__ import annotations

import os
import pathlib
import re
from typing import Any, NamedTuple

import numpy as np

from variator_jax.backbones.t5 import T5Config
from variator_jax.errors import CheckpointError
from variator_jax.store import folders, scan, stores, stream, t5x_legacy, t5x_orbax, t5x_write
from variator_jax.store.backbone_folder import Backbone
from variator_jax.store.stores import StoredArray
from variator_jax.store.stream import Source

PLUGIN = "plugin/"  # where a run of our T5X engine keeps its plugin, beside the backbone
_STEP = re.compile(r"checkpoint_(\d+)")


class Checkpoint(NamedTuple):
    """A checkpoint's parameters, not read yet: the backbone's, and a plugin's if it has one."""

    folder: str  # `checkpoint_<step>`, or its URL
    where: str  # the part of it that holds the arrays, for messages
    backbone: dict[str, StoredArray]
    plugin: dict[str, StoredArray]


def load_t5x(
    path: str | os.PathLike, dtype: Any = None, config: T5Config | None = None
) -> Backbone:
    """Reads a checkpoint of T5X, in its older layout or today's, scanned or not.

    A plugin beside the backbone, as our T5X engine trains it, is left to `t5x_run.py`.

    Args:
      path: a folder `checkpoint_<step>`, or a local folder of such, whose latest is taken; local or
        a URL that tensorstore opens, such as gs://bucket/t5_1_1_base/checkpoint_1000000.
      dtype: what the weights are cast to; None keeps what the checkpoint has.
      config: the shape, where it is none of T5's, such as other activations; by default deduced.

    Raises:
      CheckpointError: if anything is missing, damaged or not a T5 of this network.
    """
    return stream.collect(open_t5x(path, config), dtype)


def open_t5x(path: str | os.PathLike, config: T5Config | None = None) -> Source:
    """The leaves of a checkpoint, by their descriptions; arguments as for `load_t5x`."""
    return backbone_source(open_checkpoint(path), config)


def open_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Opens every array of a checkpoint; `path` as for `load_t5x`.

    Raises:
      CheckpointError: if it is none of T5X's, or its descriptions are damaged.
    """
    folder, key, content = _find(path)
    where, target = _open_target(folder, key, content)
    if not key.startswith("state/") and os.path.basename(folder) == "state":
        folder = os.path.dirname(folder)
    plugin = {name: array for name, array in target.items() if name.startswith(PLUGIN)}
    backbone = {name: array for name, array in target.items() if name not in plugin}
    return Checkpoint(folder, where, backbone, plugin)


def backbone_source(checkpoint: Checkpoint, config: T5Config | None = None) -> Source:
    """The leaves of a checkpoint's backbone, whatever lies beside it."""
    where = checkpoint.where
    leaves = scan.to_leaves(where, checkpoint.backbone)
    return stream.checked_source(where, config or scan.deduce_config(where, leaves), leaves)


def is_t5x(path: str | os.PathLike) -> bool:
    """Whether a local folder or a URL looks like a checkpoint of T5X, or a folder of some."""
    try:
        _find(path)
    except CheckpointError:
        return False
    return True


def save_t5x(
    path: str | os.PathLike, backbone: Backbone, scan: bool = False, step: int | None = None
) -> pathlib.Path:
    """Writes a checkpoint that T5X restores, whole or not at all.

    Args:
      path: a folder `checkpoint_<step>`, or the folder in which to make it.
      backbone: with a decoder, or an encoder alone.
      scan: whether to write the form of `scalable_t5` with scanned layers.
      step: the step that T5X is told; by default that of the path, or 0.

    Returns:
      The checkpoint's folder.

    Raises:
      CheckpointError: if it exists already, or lies behind a URL.
    """
    folder = target_folder(path, step)
    with folders.atomic_folder(folder) as draft:
        write(draft, stream.backbone_source(folder, backbone), scan=scan, step=step_of(folder))
    return folder


def write(
    draft: pathlib.Path,
    source: Source,
    dtype: np.dtype | None = None,
    *,
    scan: bool = False,
    step: int = 0,
    progress: Any = None,
) -> stream.Summary:
    """Fills an empty folder from a source, one leaf in memory at a time."""
    writer = t5x_write.Writer(draft, source.config, source.leaves, dtype, scan, step)
    summary = stream.copy(source, writer.write, dtype, progress)
    writer.close()
    return summary


def target_folder(path: str | os.PathLike, step: int | None = None) -> pathlib.Path:
    """The folder `checkpoint_<step>` that writing to `path` makes; T5X asks for such a name."""
    if stores.is_url(path):
        raise CheckpointError(f"{path}: checkpoints are written to local folders only.")
    folder = pathlib.Path(path)
    if _STEP.fullmatch(folder.name) is None:
        folder = folder / f"checkpoint_{step or 0}"
    elif step is not None and step != step_of(folder):
        raise CheckpointError(f"{folder} is named after another step than {step}.")
    if folder.exists():
        raise CheckpointError(f"{folder} exists already; it is left alone.")
    return folder


def step_of(folder: pathlib.Path) -> int:
    """The step in the name of a folder `checkpoint_<step>`."""
    match = _STEP.fullmatch(folder.name)
    return int(match[1]) if match else 0


def _open_target(where: str, key: str, content: bytes) -> tuple[str, dict[str, StoredArray]]:
    if key == t5x_legacy.FILE:
        return where, t5x_legacy.open_target(stores.folder(where), where, content)
    inner = key.removesuffix(t5x_orbax.METADATA)
    spec = stores.folder(where)
    if inner:
        spec, where = stores.below(spec, inner), f"{where}/{inner.strip('/')}"
    return where, t5x_orbax.open_target(spec, where, content)


def _find(path: str | os.PathLike) -> tuple[str, str, bytes]:
    """(folder of the checkpoint, its description's name, that description)."""
    where = str(path).rstrip("/")
    if where.endswith(f"/{t5x_legacy.FILE}") and (stores.is_url(path) or os.path.isfile(where)):
        where = where.removesuffix(f"/{t5x_legacy.FILE}")
    if not stores.is_url(path):
        if not os.path.isdir(where):
            raise CheckpointError(f"There is no folder {where}.")
        where = _latest(where)
    spec = stores.folder(where)
    for key in (f"state/{t5x_orbax.METADATA}", t5x_orbax.METADATA, t5x_legacy.FILE):
        content = stores.read_key(spec, key)
        if content is not None:
            return where, key, content
    raise CheckpointError(
        f"{where} is no T5X checkpoint: it has neither state/{t5x_orbax.METADATA} nor "
        f"{t5x_legacy.FILE}."
    )


def _latest(folder: str) -> str:
    """The latest of a folder's checkpoints, or the folder itself if it holds none."""
    steps = [int(match[1]) for name in os.listdir(folder) if (match := _STEP.fullmatch(name))]
    return os.path.join(folder, f"checkpoint_{max(steps)}") if steps else folder
