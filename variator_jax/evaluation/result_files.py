"""A file of results, a JSON object a line, that appears whole or not at all.

Names are T5X's: beside a whole `NAME` lies `NAME.COMPLETED`. While it is written, `NAME` lies in
the folder `tmp-NAME`; a run that was stopped goes on behind the last whole batch there. What a
result means is not known here, only the identity of the run that it comes from.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO

from variator_jax.errors import ConfigError

try:
    import fcntl
except ImportError:  # Windows: two runs at a time cannot be told apart there
    fcntl = None  # type: ignore[assignment]

Identity = Mapping[str, Any]


def finished(path: pathlib.Path, identity: Identity) -> bool:
    """Whether the whole file of this very run is there.

    Args:
      path: the file of results.
      identity: what makes the run this one, in JSON's types.

    Raises:
      ConfigError: if the file of another run is there, saying how it differs.
    """
    mark = _mark(path)
    if not (mark.is_file() and path.is_file()):
        return False
    found = _read(mark)
    if found is None:
        raise ConfigError(
            f"{path} is finished, but {mark.name} does not say from which run (T5X's does not): "
            "name another INFER_OUTPUT_DIR, or remove both files."
        )
    differs = [key for key in sorted({*found, *identity}) if found.get(key) != identity.get(key)]
    if differs:
        parts = ", ".join(f"{k} {found.get(k)!r} and not {identity.get(k)!r}" for k in differs)
        raise ConfigError(
            f"{path} holds the results of another run, with {parts}: name another "
            f"INFER_OUTPUT_DIR, or remove {mark.name}."
        )
    return True


@dataclasses.dataclass(frozen=True)
class ResultFile:
    """A file of results in the making, and how many lines were already there."""

    path: pathlib.Path
    file: BinaryIO
    lines: int

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Writes a batch of results, each as one line."""
        lines = "".join(json.dumps(record) + "\n" for record in records)
        with _told(self.path):
            self.file.write(lines.encode("utf8"))
            self.file.flush()


@contextlib.contextmanager
def writing(path: pathlib.Path, identity: Identity, batch: int = 1) -> Iterator[ResultFile]:
    """Yields a file of results that is published when all went well.

    Left by an error or killed, it stays for the next run of the same identity; what a run of
    another identity left is started over.

    Args:
      path: where the file is to be.
      identity: what makes the run this one, in JSON's types.
      batch: how many lines are appended at once; what was written of a torn batch is cut.

    Raises:
      ConfigError: if another run is at it, or it cannot be written.
    """
    folder = path.with_name(f"tmp-{path.name}")
    draft = folder / path.name
    with _told(path):
        folder.mkdir(parents=True, exist_ok=True)
        lock = _lock(folder, path)
    try:
        with _told(path):
            if _read(folder / "identity.json") != identity:
                draft.unlink(missing_ok=True)
                _write(folder / "identity.json", identity)
            lines = _cut(draft, batch)
            file = draft.open("ab")
        with file:
            yield ResultFile(path, file, lines)
            os.fsync(file.fileno())
        with _told(path):
            _publish(folder, path, identity)
    finally:
        os.close(lock)


def _publish(folder: pathlib.Path, path: pathlib.Path, identity: Identity) -> None:
    # The old mark goes first: at no moment does it vouch for a file that is not its own.
    _mark(path).unlink(missing_ok=True)
    os.replace(folder / path.name, path)
    _write(folder / "mark", identity)
    os.replace(folder / "mark", _mark(path))
    shutil.rmtree(folder)


def _mark(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(f"{path.name}.COMPLETED")


def _read(path: pathlib.Path) -> dict[str, Any] | None:
    """The identity in a file; None if there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _write(path: pathlib.Path, identity: Identity) -> None:
    path.write_text(json.dumps(identity, indent=2) + "\n", encoding="utf8")


def _cut(path: pathlib.Path, batch: int) -> int:
    """Cuts a draft behind its last whole batch; how many lines are left."""
    if not path.exists():
        return 0
    lines = size = kept = 0
    with path.open("rb") as file:
        for line in file:
            size += len(line)
            if line.endswith(b"\n"):
                lines += 1
                kept = size if lines % batch == 0 else kept
    os.truncate(path, kept)
    return lines - lines % batch


def _lock(folder: pathlib.Path, path: pathlib.Path) -> int:
    """Locks the folder of a draft for as long as this process, or the returned handle, is open."""
    handle = os.open(os.devnull if fcntl is None else folder, os.O_RDONLY)
    try:
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise ConfigError(
            f"another run is writing {path}: wait for it, or name another INFER_OUTPUT_DIR."
        ) from error
    except OSError:  # a file system without locks: as if it were locked
        return handle
    return handle


@contextlib.contextmanager
def _told(path: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}.") from error
