"""Backbones in whatever format they come: ours, Hugging Face's or T5X's, told apart by content."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from typing import TYPE_CHECKING, Any

from variator_jax.errors import CheckpointError
from variator_jax.store import backbone_folder, kinds
from variator_jax.store.backbone_folder import Backbone

if TYPE_CHECKING:
    from variator_jax.store.lora_folder import Lora
    from variator_jax.store.stream import Source

_EXPECTED = (
    "backbone (backbone.json), Hugging Face folder (config.json), T5X checkpoint and no run folder "
    "with a backbone"
)


def load_backbone(
    path: str | os.PathLike, dtype: Any = None, lora: Lora | str | os.PathLike | None = None
) -> Backbone:
    """Reads a backbone folder, a Hugging Face folder, a T5X checkpoint or a run's backbone.

    Our own folders have checksums. Foreign formats without them (Hugging Face's safetensors, raw
    data of T5X) cannot tell a flipped bit in the data; the backbone's fingerprint can, where the
    right one is known.

    Args:
      path: a local folder, or for T5X also a URL such as gs://bucket/checkpoint_1000000.
      dtype: what the weights of another format are cast to ('bfloat16', ...), and what the
        backbone then computes in; None keeps what the files have. Our own folders keep theirs.
      lora: a LoRA of this backbone to merge into the weights, or the folder of one or of a run
        that trained one.

    Raises:
      CheckpointError: if there is none, or it is damaged; saying what was found. Or if the LoRA is
        another backbone's.
    """
    kind = kinds.kind_of(path)
    if lora is not None:
        return _load_with_lora(path, kind, dtype, lora)
    if kind == kinds.HUGGING_FACE:
        from variator_jax.store.hf_folder import load_hf

        return load_hf(path, dtype)
    if kind == kinds.T5X:
        from variator_jax.store.t5x import load_t5x

        return load_t5x(path, dtype)
    folder = pathlib.Path(path)
    if kind == kinds.RUN and (folder / "backbone").is_dir():
        folder = folder / "backbone"
    elif kind != kinds.BACKBONE:
        raise _no_backbone(folder, kind)
    if dtype is not None:
        raise CheckpointError(
            f"{folder} is a backbone folder, which keeps the dtype it was written in; convert it "
            "to another one with: variator convert --dtype"
        )
    return backbone_folder.load_backbone(folder)


def _load_with_lora(
    path: str | os.PathLike, kind: str, dtype: Any, lora: Lora | str | os.PathLike
) -> Backbone:
    from variator_jax.store.lora_folder import Lora, load_lora
    from variator_jax.store.lora_merge import collect_with_lora, with_lora

    found = lora if isinstance(lora, Lora) else load_lora(lora)
    if kind in (kinds.HUGGING_FACE, kinds.T5X):
        return collect_with_lora(open_backbone(path), found, dtype)
    return with_lora(load_backbone(path, dtype), found)


def identify_backbone(path: str | os.PathLike) -> Backbone:
    """Which backbone lies at a path: what `load_backbone` gives, without the parameters.

    The fingerprint of another format is made leaf by leaf, so that no more than one is held.

    Raises:
      CheckpointError: as `load_backbone`.
    """
    from variator_jax.store import stream

    if kinds.kind_of(path) in (kinds.HUGGING_FACE, kinds.T5X):
        return stream.identify(open_backbone(path))
    return dataclasses.replace(load_backbone(path), params={})


def open_backbone(path: str | os.PathLike) -> Source:
    """The leaves of the backbone at a path, in any format, none of them read yet.

    Raises:
      CheckpointError: as `load_backbone`.
    """
    from variator_jax.store import convert, hf_folder, t5x

    kind = kinds.kind_of(path)
    if kind == kinds.HUGGING_FACE:
        return hf_folder.open_hf(path)
    if kind == kinds.T5X:
        return t5x.open_t5x(path)
    folder = pathlib.Path(path)
    if kind == kinds.RUN and (folder / "backbone").is_dir():
        return convert.open_variator(folder / "backbone")
    if kind != kinds.BACKBONE:
        raise _no_backbone(folder, kind)
    return convert.open_variator(folder)


def _no_backbone(folder: pathlib.Path, kind: str) -> CheckpointError:
    if kind == kinds.LORA or (kind == kinds.RUN and (folder / "lora").is_dir()):
        return CheckpointError(
            f"{folder} holds a LoRA and no backbone. A LoRA is merged into the backbone that it "
            "belongs to: load_backbone(BACKBONE, lora=LORA), or INITIAL_LORA_PATH beside "
            "INITIAL_CHECKPOINT_PATH."
        )
    if kind in (kinds.PLUGIN, kinds.PLUGIN_SET, kinds.RUN):
        return CheckpointError(
            f"{folder} holds a compression plugin and no backbone. A plugin is loaded with "
            "load_plugins, beside the backbone that it belongs to."
        )
    return kinds.unknown(folder, _EXPECTED)
