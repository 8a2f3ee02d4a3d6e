"""Folders that appear whole or not at all, and the JSON and safetensors files in them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError
from safetensors.flax import load_file, save_file

from variator_jax.errors import CheckpointError

FORMAT_VERSION = 1


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields a draft that becomes `path` on success; on failure `path` stays as it was."""
    target = pathlib.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        draft.chmod(0o755)  # mkdtemp's 0700 would make a shared folder unreadable for others
        yield draft
        old = draft.with_name(draft.name + ".old")
        if target.exists():
            target.rename(old)
        draft.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def fingerprint(params: Mapping[str, Any]) -> str:
    """SHA-256 over names, shapes and values rounded to bfloat16, as 64 hex digits.

    The rounding gives a backbone one fingerprint whether it is held in float32 or in bfloat16.
    """
    digest = hashlib.sha256()
    for name, leaf in sorted(traverse_util.flatten_dict(dict(params), sep="/").items()):
        rounded = np.asarray(leaf).astype(jnp.bfloat16)
        digest.update(f"{name} {rounded.shape}\n".encode())
        digest.update(np.ascontiguousarray(rounded).view(np.uint8).data)
    return digest.hexdigest()


def write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    """Writes a mapping as indented JSON."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf8")


def read_json(path: pathlib.Path, kind: str) -> dict[str, Any]:
    """Reads a folder's description and checks what it describes and in which format.

    Raises:
      CheckpointError: if the file is missing or broken, of another kind, or of a newer format.
    """
    if not path.is_file():
        raise CheckpointError(f"{path.parent} holds no {kind}: there is no {path.name} in it.")
    try:
        content = json.loads(path.read_text(encoding="utf8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}.") from error
    if not isinstance(content, dict) or content.get("kind") != kind:
        raise CheckpointError(f"{path} does not describe a {kind}.")
    version = content.get("format_version")
    if not isinstance(version, int) or version < 1:
        raise CheckpointError(f"{path} has format version {version!r}; expected {FORMAT_VERSION}.")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version}; this release reads up to {FORMAT_VERSION}. "
            "Update variator_jax to read it."
        )
    return content


def write_arrays(path: pathlib.Path, tree: Mapping[str, Any]) -> None:
    """Writes a nested dict of arrays as safetensors, names joined by '/'."""
    flat = traverse_util.flatten_dict(dict(tree), sep="/")
    save_file({name: jnp.asarray(leaf) for name, leaf in flat.items()}, path)


def read_arrays(path: pathlib.Path) -> dict[str, jax.Array]:
    """Reads a safetensors file as a flat dict, names joined by '/'.

    Raises:
      CheckpointError: if the file is missing or damaged.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing.")
    try:
        return load_file(path)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}.") from error


def match_shapes(path: pathlib.Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> dict:
    """Checks a flat dict of arrays leaf by leaf and returns it as a nested dict.

    Args:
      path: the file, for messages.
      found: name -> array.
      expected: name -> anything with a shape.

    Raises:
      CheckpointError: naming the first missing, surplus or misshapen arrays.
    """
    missing = sorted(set(expected) - set(found))
    surplus = sorted(set(found) - set(expected))
    if missing or surplus:
        parts = [
            f"{what} {', '.join(names[:3])}{' and more' if len(names) > 3 else ''}"
            for what, names in (("lacks", missing), ("has no use for", surplus))
            if names
        ]
        raise CheckpointError(f"{path} does not fit its description: it {' and '.join(parts)}.")
    for name, leaf in expected.items():
        if tuple(found[name].shape) != tuple(leaf.shape):
            raise CheckpointError(
                f"{path}: {name} has shape {tuple(found[name].shape)}; "
                f"expected {tuple(leaf.shape)}."
            )
    return traverse_util.unflatten_dict(dict(found), sep="/")
