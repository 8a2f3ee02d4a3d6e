"""Folders that appear whole or not at all, and checks of the arrays in them.

The JSON that describes a folder is `description.py`'s business, files of arrays are
`arrays_file.py`'s; what each kind of folder holds is said in `backbone_folder.py`,
`plugin_folder.py` and `plugin_set.py`.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from variator_jax.errors import CheckpointError
from variator_jax.store.arrays_file import Fingerprint

try:
    import fcntl
except ImportError:  # Windows: nobody can tell there whether a draft's writer is alive
    fcntl = None  # type: ignore[assignment]

_DRAFT, _OLD = "draft-", "old-"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux's renameat2


@contextlib.contextmanager
def atomic_folder(
    path: str | os.PathLike, replaces: Collection[str] = (), holds: Collection[str] = ()
) -> Iterator[pathlib.Path]:
    """Yields a draft that becomes `path` on success; on failure `path` stays as it was.

    The draft lies beside `path` under a hidden name. What a writer that was killed left there is
    removed by the next one. Where the system can swap two names (Linux), there is no moment
    without a folder at `path`.

    Args:
      path: the folder to write; a link is followed.
      replaces: an existing folder is replaced only if it is empty or holds one of these files, and
        nothing beside them but what `holds` allows.
      holds: regular expressions of the other files that such a folder may hold, as paths in it with
        '/' between folders.

    Raises:
      CheckpointError: if `path` is a file or somebody else's folder, or cannot be written.
    """
    target = pathlib.Path(os.path.realpath(path))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _check_replaceable(target, replaces, holds)
        _clear_left_over(target)
        draft, lock = _locked_draft(target)
    except OSError as error:
        raise _write_error(path, error) from error
    try:
        draft.chmod(0o755)  # mkdtemp's 0700 would make a shared folder unreadable for others
        yield draft
        _flush(draft)
        _put_in_place(draft, target)
    except OSError as error:
        raise _write_error(path, error) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _write_error(path: str | os.PathLike, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path} cannot be written: {error}.")


def _check_replaceable(
    target: pathlib.Path, replaces: Collection[str], holds: Collection[str]
) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise CheckpointError(f"{target} is a file; it cannot become a folder.")
    held = sorted(item.name for item in target.iterdir())
    if held and not set(held) & set(replaces):
        raise CheckpointError(
            f"{target} holds other things ({', '.join(held[:3])}), which would be lost; name a new "
            "folder."
        )
    allowed = [*map(re.escape, replaces), *holds]
    for item in target.rglob("*") if held else ():
        name = item.relative_to(target).as_posix()
        is_file = item.is_symlink() or not item.is_dir()
        if is_file and not any(re.fullmatch(each, name) for each in allowed):
            raise CheckpointError(
                f"{target} holds {name} too, which would be lost; move it away or name a new "
                "folder."
            )


def _hidden(target: pathlib.Path, what: str) -> str:
    return f".{target.name[:100]}.{what}"


def _locked_draft(target: pathlib.Path) -> tuple[pathlib.Path, int | None]:
    """An empty draft, and the lock that says that its writer is alive, for it ends with it."""
    for _ in range(100):
        draft = pathlib.Path(tempfile.mkdtemp(prefix=_hidden(target, _DRAFT), dir=target.parent))
        lock = _lock(draft)
        if fcntl is None or (lock is not None and draft.is_dir()):
            return draft, lock
        if lock is not None:  # somebody cleared it away before it was locked
            os.close(lock)
    raise OSError(f"no draft folder can be kept in {target.parent}")


def _lock(draft: pathlib.Path) -> int | None:
    """Locks a draft, None if its writer still does (or it is gone)."""
    if fcntl is None:
        return None
    try:
        lock = os.open(draft, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    except OSError:  # a file system without locks: as if it were locked
        return lock
    return lock


def _clear_left_over(target: pathlib.Path) -> None:
    """Removes drafts whose writers are gone, and puts back what one of them had moved away."""
    for item in list(target.parent.iterdir()):
        if item.name.startswith(_hidden(target, _OLD)):
            if target.exists():
                shutil.rmtree(item, ignore_errors=True)
            else:
                item.rename(target)
        elif item.name.startswith(_hidden(target, _DRAFT)) and fcntl is not None:
            lock = _lock(item)
            if lock is not None:
                shutil.rmtree(item, ignore_errors=True)
                os.close(lock)


def _flush(folder: pathlib.Path) -> None:
    """Waits until files and folders are on the disk, so that a power cut cannot mix them."""
    for item in [*folder.rglob("*"), folder]:
        if os.name != "posix" and item.is_dir():
            continue  # Windows cannot open a folder
        handle = os.open(item, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _put_in_place(draft: pathlib.Path, target: pathlib.Path) -> None:
    """Renames the draft; what was at `target` is then at the draft's name, or gone."""
    if not target.exists():
        draft.rename(target)
    elif not _exchange(draft, target):
        old = target.with_name(draft.name.replace(_DRAFT, _OLD))
        target.rename(old)
        draft.rename(target)
        shutil.rmtree(old, ignore_errors=True)


def _exchange(one: pathlib.Path, other: pathlib.Path) -> bool:
    """Swaps two names in one step; False where the system or the file system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    names = os.fsencode(one), os.fsencode(other)
    return rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0


def write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    """Writes a mapping as indented JSON."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf8")


def fingerprint(params: Mapping[str, Any]) -> str:
    """SHA-256 over names, shapes and values rounded to bfloat16, as 64 hex digits.

    The rounding gives a backbone one fingerprint whether it is held in float32 or in bfloat16.
    """
    digest = Fingerprint()
    for name, leaf in sorted(flatten(params).items()):
        digest.add(name, np.asarray(leaf))
    return digest.hexdigest()


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A nested dict as a flat one, names joined by '/'."""
    return traverse_util.flatten_dict(dict(tree), sep="/")


def match_arrays(
    what: str | pathlib.Path,
    found: Mapping[str, Any],
    expected: Mapping[str, Any],
    dtypes: Collection[str],
) -> None:
    """Compares what a file holds, leaf by leaf, with what it should hold.

    Args:
      what: the file, for messages.
      found: name -> anything with a shape and a dtype.
      expected: name -> anything with a shape.
      dtypes: names of those that a leaf may have.

    Raises:
      CheckpointError: naming the first missing, surplus, misshapen or mistyped leaf.
    """
    missing = sorted(set(expected) - set(found))
    surplus = sorted(set(found) - set(expected))
    if missing or surplus:
        parts = [
            f"{what} {', '.join(names[:3])}{' and more' if len(names) > 3 else ''}"
            for what, names in (("lacks", missing), ("has no use for", surplus))
            if names
        ]
        raise CheckpointError(f"{what} does not fit its description: it {' and '.join(parts)}.")
    for name, leaf in expected.items():
        shape, dtype = tuple(found[name].shape), np.dtype(found[name].dtype).name
        if shape != tuple(leaf.shape):
            raise CheckpointError(
                f"{what}: {name} has shape {shape}; expected {tuple(leaf.shape)}."
            )
        if dtype not in dtypes:
            raise CheckpointError(
                f"{what}: {name} has dtype {dtype}; expected {' or '.join(dtypes)}."
            )
