"""The folder that `variator encode` writes: a file for each window, the bad rows, the index.

Every file appears whole or not at all. That of a window records which lines it was made of, its
counts and its bad rows, so the lists of the whole run are made of the windows' files.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from variator_jax.errors import ConfigError
from variator_jax.files import wrap_errors, write_file, write_json
from variator_jax.serving.rows import Window
from variator_jax.store.description import read_json

INDEX, BAD_ROWS = "encode.json", "bad_rows.jsonl"
_KEY = "variator"  # of the one entry in a file's header; the library does not sort several


class Counts(NamedTuple):
    """What a file or a run has."""

    rows: int = 0
    tokens: int = 0
    bad: int = 0
    cut: int = 0  # texts that lost their end


class Prepared(NamedTuple):
    """A window whose texts are token ids, or whose file is there already."""

    number: int
    window: Window
    ids: dict[int, list[int]]  # by the line's number
    bad: list[dict[str, Any]]
    counts: Counts
    written: bool = False


class EncodedFolder:
    """The output of one run, which this process alone writes.

    Args:
      path: the folder, which exists.
      identity: what decides the numbers, in JSON's types.

    Raises:
      ConfigError: if the folder is another run's, with the differences, or holds anything else.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self._path, self._index = path, path / INDEX
        if not self._index.is_file():
            others = sorted(x.name for x in path.iterdir() if not x.name.startswith("."))
            if others:
                raise ConfigError(f"{path} holds {others[0]}, and no {INDEX}: name a new --output.")
            write_json(self._index, {**identity, "finished": False})
        known = read_json(self._index)
        differs = [
            f"{name} {known.get(name)!r:.60} and not {value!r:.60}"
            for name, value in identity.items()
            if known.get(name) != value
        ]
        if differs:
            raise ConfigError(f"{path} is that of another run, with {', '.join(differs)}.")
        self._files: int | None = known.get("files")  # of the run, once it has been finished
        for draft in [*path.glob(".encode*"), *path.glob(f".{BAD_ROWS}*")]:  # of a killed run
            draft.unlink()

    def counts(self, number: int, window: Window) -> Counts | None:
        """What the file of a window has; None if it is not written yet.

        Raises:
          ConfigError: if the file was made of other lines.
        """
        file = self._file(number)
        if not file.is_file():
            return None
        record = _header(file)
        if record["digest"] != window.digest:
            lines = f"lines {window.lines[0][0]} to {window.lines[-1][0]}"
            raise ConfigError(
                f"The input's {lines} are not those that {file} was made of; name a new --output."
            )
        return Counts(*record["counts"])

    def write(self, done: Prepared, arrays: dict[str, np.ndarray]) -> None:
        """Writes the file of a window.

        Raises:
          ConfigError: if a finished run had no such window.
        """
        if self._files is not None:
            if done.number >= self._files:
                raise ConfigError(
                    f"The input has more lines than {self._path} was made of; name a new --output."
                )
            write_json(self._index, {**read_json(self._index), "finished": False})
        record = {"digest": done.window.digest, "counts": done.counts, "bad": done.bad}
        write_file(self._file(done.number), save(arrays, {_KEY: json.dumps(record)}))

    def finish(self, files: int, total: Counts) -> None:
        """Writes the list of bad rows and the index, when all windows are written.

        Raises:
          ConfigError: if there are more files than windows.
        """
        if (more := self._file(files)).exists():
            raise ConfigError(f"The input has no lines for {more}; name a new --output.")
        headers = (_header(self._file(number)) for number in range(files))
        rows = [json.dumps(row) + "\n" for header in headers for row in header["bad"]]
        write_file(self._path / BAD_ROWS, "".join(rows).encode())
        done = {"finished": True, "files": files, **total._asdict()}
        write_json(self._index, read_json(self._index) | done)

    def _file(self, number: int) -> Path:
        return self._path / f"encoded-{number:06d}.safetensors"


def _header(file: Path) -> dict[str, Any]:
    """What a window's file records besides its arrays."""
    with wrap_errors(f"{file} cannot be read"), safe_open(file, framework="np") as opened:
        return dict(json.loads(opened.metadata()[_KEY]))
