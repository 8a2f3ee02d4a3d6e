"""A file of results, a JSON object a line, that appears complete or not at all.

Names are T5X's: next to a complete `NAME` is `NAME.COMPLETED`, which holds the identity of the run.
While it is written, `NAME` is in the folder `tmp-NAME`; a run that was stopped continues there.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from variator_jax.errors import ConfigError
from variator_jax.files import write_json

Identity = Mapping[str, Any]


def finished(path: Path, identity: Identity) -> bool:
    """Whether the complete file of this very run is there.

    Args:
      path: the file of results.
      identity: what makes the run this one, in JSON's types.

    Raises:
      ConfigError: if the file of another run is there, with the differences.
    """
    mark = _mark(path)
    if not (mark.is_file() and path.is_file()):
        return False
    known = _identity_in(mark)
    if known is None:
        raise ConfigError(
            f"{path} is finished, but {mark.name} does not say from which run (T5X's does not): "
            "name another INFER_OUTPUT_DIR, or remove both files."
        )
    differs = [key for key in sorted({*known, *identity}) if known.get(key) != identity.get(key)]
    if differs:
        parts = ", ".join(f"{k} {known.get(k)!r} and not {identity.get(k)!r}" for k in differs)
        raise ConfigError(
            f"{path} holds the results of another run, with {parts}: name another "
            f"INFER_OUTPUT_DIR, or remove {mark.name}."
        )
    return True


class Draft:
    """A file of results in the making.

    What a stopped run of the same identity left is kept up to its last complete batch, what one of
    another identity left is removed.

    Attributes:
      lines: how many results it holds.
    """

    def __init__(self, path: Path, identity: Identity, batch: int = 1) -> None:
        """`batch` is how many lines are appended at once."""
        self._path, self._identity = path, identity
        self._folder = path.with_name(f"tmp-{path.name}")
        self._file = self._folder / path.name
        owner = self._folder / "identity.json"
        if _identity_in(owner) != identity:
            self._file.unlink(missing_ok=True)
            write_json(owner, identity)
        written = self._file.read_bytes().split(b"\n") if self._file.exists() else [b""]
        self.lines = (len(written) - 1) // batch * batch  # the last part has no line break
        if self._file.exists():
            os.truncate(self._file, sum(len(line) + 1 for line in written[: self.lines]))

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Writes a batch of results, each as one line."""
        lines = [json.dumps(record) + "\n" for record in records]
        with self._file.open("a", encoding="utf8") as file:
            file.writelines(lines)
        self.lines += len(lines)

    def publish(self) -> None:
        """Moves the file to its place."""
        with self._file.open("rb") as file:
            os.fsync(file.fileno())
        # The old mark goes first: at no moment does it vouch for a file that is not its own.
        _mark(self._path).unlink(missing_ok=True)
        os.replace(self._file, self._path)
        write_json(_mark(self._path), self._identity)
        shutil.rmtree(self._folder)


def _mark(path: Path) -> Path:
    return path.with_name(f"{path.name}.COMPLETED")


def _identity_in(path: Path) -> dict[str, Any] | None:
    """The identity in a file; None if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
