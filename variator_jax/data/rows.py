"""Rows of a user's file (JSON lines, TSV, plain text) with their places, and what is wrong.

Reading never stops at a bad row: rows and `BadRow`s come out side by side, and `refuse_bad_rows`
decides whether a run may start. No TensorFlow here.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from variator_jax.errors import DataError, did_you_mean

_LISTED = 10  # bad rows that are named in a message; the rest are counted
_FORMATS = (".jsonl", ".tsv", ".txt")


@dataclasses.dataclass(frozen=True)
class Row:
    """The fields of one row, and where it stands."""

    path: Path
    line: int
    fields: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class BadRow:
    """A row that cannot be used, where it stands, and why."""

    path: Path
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}"


class RowError(Exception):
    """Why a row cannot be used; turned into a `BadRow` by whoever knows the line."""


def read_rows(
    path: str | Path, columns: Sequence[str] | None = None
) -> tuple[list[Row], list[BadRow]]:
    """Returns the readable rows and the bad ones of a .jsonl, .tsv or .txt file, or its .gz.

    With `columns`, the rows of a TSV file keep only those, which saves memory.

    A TSV file has a header, is split on tabs and knows no quoting. A text file gives each line as
    the field 'text'. Blank lines are no rows.

    Raises:
      DataError: if the file is missing, empty, broken as a whole, or of another format.
    """
    path = Path(path).expanduser()
    lines = list(_lines(path, content_of(path)))
    if not lines:
        raise DataError(f"{path} is empty")
    parse = {".jsonl": _parse_json, ".txt": _parse_text}.get(_format(path))
    if parse is None:
        header = _decode(path, lines.pop(0))
        if len(set(header)) != len(header):
            raise DataError(f"{path}:1: a column name occurs twice in the header: {header}")
        parse = _tsv_parser(header, header if columns is None else columns)
        if not lines:
            raise DataError(f"{path} has a header and no rows")
    rows: list[Row] = []
    bad: list[BadRow] = []
    for number, raw in lines:
        try:
            rows.append(Row(path, number, parse(_text(raw))))
        except RowError as error:
            bad.append(BadRow(path, number, str(error)))
    return rows, bad


def _format(path: Path) -> str:
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    if suffix not in _FORMATS:
        raise DataError(
            f"{path} ends with {suffix or 'no suffix'!r}; expected {', '.join(_FORMATS)}, or "
            "one of these with .gz"
        )
    return suffix


def content_of(path: Path) -> bytes:
    """Returns the bytes of a data file, of a .gz unpacked.

    Raises:
      DataError: if the file is missing, damaged or of another format.
    """
    if not path.is_file():
        beside = [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else []
        raise DataError(f"no data file {path}.{did_you_mean(path.name, beside)}")
    _format(path)
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _lines(path: Path, content: bytes) -> Iterator[tuple[int, bytes]]:
    content = content.removeprefix(b"\xef\xbb\xbf")
    for number, line in enumerate(content.split(b"\n"), start=1):
        line = line.removesuffix(b"\r")
        if line.strip():
            yield number, line


def _text(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowError(f"broken UTF-8 at byte {error.start + 1} of the line") from error


def _decode(path: Path, header: tuple[int, bytes]) -> list[str]:
    try:
        return [name.strip() for name in _text(header[1]).split("\t")]
    except RowError as error:
        raise DataError(f"{path}:{header[0]}: {error} (the header)") from error


def _parse_text(line: str) -> dict[str, Any]:
    return {"text": line}


def _parse_json(line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise RowError(f"broken JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise RowError("broken JSON: nested too deeply") from error
    except ValueError as error:  # Python's limit on digits; nothing else is left
        raise RowError("an integer has too many digits") from error
    if not isinstance(value, dict):
        raise RowError(f"expected a JSON object, found {_kind(value)}")
    return value


def _tsv_parser(header: Sequence[str], columns: Sequence[str]) -> Any:
    kept = [(number, name) for number, name in enumerate(header) if name in columns]

    def parse(line: str) -> dict[str, Any]:
        cells = line.split("\t")
        if len(cells) != len(header):
            raise RowError(f"{len(cells)} columns, expected {len(header)} as in the header")
        return {name: cells[number] for number, name in kept}

    return parse


def _kind(value: Any) -> str:
    names = {list: "a list", dict: "an object", str: "a string", bool: "a truth value"}
    return "null" if value is None else names.get(type(value), "a number")


def text_field(row: Row, field: str) -> str:
    """Returns a field of a row as text.

    Raises:
      RowError: if the field is missing, empty, or neither text nor a number.
    """
    if field not in row.fields:
        raise RowError(f"no field {field!r}.{did_you_mean(field, row.fields)}")
    value = row.fields[field]
    if value is None or isinstance(value, list | dict):
        raise RowError(f"the field {field!r} is {_kind(value)}, expected text")
    text = str(value).strip()
    if not text:
        raise RowError(f"the field {field!r} is empty")
    if any(0xD800 <= ord(character) <= 0xDFFF for character in text):
        raise RowError(f"the field {field!r} has half a surrogate pair, which is no text")
    return text


def require_field(rows: Sequence[Row], field: str, path: str | Path) -> None:
    """Checks that at least one row has a field, so that a misspelt name is one error and not many.

    Raises:
      DataError: if no row has it; the message gives the nearest names.
    """
    names = dict.fromkeys(name for row in rows for name in row.fields)
    if rows and field not in names:
        raise DataError(
            f"no row of {path} has a field {field!r}.{did_you_mean(field, names)} "
            f"Fields: {', '.join(list(names)[:20])}"
        )


def refuse_bad_rows(bad: Sequence[BadRow], good: int, tolerated: int, path: str | Path) -> None:
    """Lists bad rows: as an error if there are more than `tolerated`, else as a warning.

    Raises:
      DataError: for too many bad rows, or if no good row is left.
    """
    listed = "".join(f"\n  {row}" for row in bad[:_LISTED])
    more = f"\n  and {len(bad) - _LISTED} more" if len(bad) > _LISTED else ""
    summary = f"{len(bad)} of {good + len(bad)} rows are bad"
    if len(bad) > tolerated:
        raise DataError(
            f"{path}: {summary}, and {tolerated} are tolerated (tolerate_bad_rows):{listed}{more}"
        )
    if not good:
        raise DataError(f"{path}: no usable row{':' + listed + more if bad else ''}")
    if bad:
        logging.warning("%s: %s and are skipped:%s%s", path, summary, listed, more)
