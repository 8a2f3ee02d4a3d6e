"""The user's files: rows of JSON lines, TSV and plain text, and folders of texts.

Reading never stops at a bad row: rows and `BadRow`s, with file and line, are returned together, and
`refuse_bad_rows` decides whether a run may start. A folder of texts may have any size; it is only
listed here, and streamed by TensorFlow.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from absl import logging

from variator_jax.data._tf import tf
from variator_jax.errors import DataError, did_you_mean

_LISTED = 10  # bad rows that are named in a message; the others are counted
_FORMATS = (".jsonl", ".tsv", ".txt")

T = TypeVar("T")
Fields = Mapping[str, Any]
Parser = Callable[[str], dict[str, Any]]


class BadRow(NamedTuple):
    """A row that cannot be used, its line, and why."""

    path: Path
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}"


class RowError(Exception):
    """Why a row cannot be used; `read_rows` turns it into a `BadRow`."""


def is_url(path: str | Path) -> bool:
    """Whether a path is an address such as gs://bucket/file, which TensorFlow reads."""
    return "://" in str(path)


def missing_file(what: str, path: Path) -> DataError:
    """Returns the error for a missing file or folder, with the nearest names in its folder."""
    names = [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else []
    return DataError(f"{what} {path}.{did_you_mean(path.name, names)}")


def read_rows(
    path: Path, required: Sequence[str], convert: Callable[[Fields], T]
) -> tuple[list[T], list[BadRow]]:
    """Returns the converted rows and the bad ones of a .jsonl, .tsv or .txt file, or its .gz.

    A TSV file has a header, is split on tabs and knows no quoting. A text file gives each line as
    the field 'text'. Blank lines are skipped.

    Args:
      path: of the file.
      required: fields that at least one row must have, so that a misspelt name is one error and
        not many. The rows of a TSV file have no others.
      convert: makes of a row's fields what is returned, or raises RowError.

    Raises:
      DataError: if the file is missing, empty, broken as a whole, of another format, or lacks a
        required field.
    """
    content = content_of(path).removeprefix(b"\xef\xbb\xbf").split(b"\n")
    lines = [(n, line.removesuffix(b"\r")) for n, line in enumerate(content, 1) if line.strip()]
    if not lines:
        raise DataError(f"{path} is empty")
    if _format(path) == ".tsv":
        parse: Parser = _tsv_parser(path, lines.pop(0)[1], required)
        if not lines:
            raise DataError(f"{path} has a header and no rows")
    else:
        parse = _parse_json if _format(path) == ".jsonl" else _parse_text
    bad: list[BadRow] = []
    parsed = _each(path, lines, lambda line: parse(_text(line)), bad)
    if parsed:
        _require(path, required, list({name: None for _, fields in parsed for name in fields}))
    rows = _each(path, parsed, convert, bad)
    return [row for _, row in rows], sorted(bad)


def _each(
    path: Path, lines: Sequence[tuple[int, Any]], convert: Callable[[Any], T], bad: list[BadRow]
) -> list[tuple[int, T]]:
    """Returns (line, converted) of each item; those that raise RowError go to `bad`."""
    rows = []
    for line, item in lines:
        try:
            rows.append((line, convert(item)))
        except RowError as error:
            bad.append(BadRow(path, line, str(error)))
    return rows


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
        raise missing_file("no data file", path)
    _format(path)
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _text(line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowError(f"broken UTF-8 at byte {error.start + 1} of the line") from error


def _require(path: Path, required: Sequence[str], names: Sequence[str]) -> None:
    for field in required:
        if field not in names:
            raise DataError(
                f"no row of {path} has a field {field!r}.{did_you_mean(field, names)} "
                f"Fields: {', '.join(names[:20])}"
            )


def _parse_text(line: str) -> dict[str, Any]:
    return {"text": line}


def _parse_json(line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:  # also integers beyond Python's limit on digits
        raise RowError(f"broken JSON: {error}") from error
    if not isinstance(value, dict):
        raise RowError(f"expected a JSON object, found {json.dumps(value)[:40]}")
    return value


def _tsv_parser(path: Path, first: bytes, required: Sequence[str]) -> Parser:
    header = [name.strip() for name in first.decode("utf-8", "replace").split("\t")]
    if len(set(header)) != len(header):
        raise DataError(f"{path}: a column name occurs twice in the header: {header}")
    _require(path, required, header)
    places = {name: header.index(name) for name in required}

    def parse(line: str) -> dict[str, Any]:
        cells = line.split("\t")
        if len(cells) != len(header):
            raise RowError(f"{len(cells)} columns, expected {len(header)} as in the header")
        return {name: cells[place] for name, place in places.items()}

    return parse


def text_field(fields: Fields, name: str) -> str:
    """Returns a field of a row as text.

    Raises:
      RowError: if the field is missing, empty, or neither text nor a number.
    """
    if name not in fields:
        raise RowError(f"no field {name!r}.{did_you_mean(name, fields)}")
    value = fields[name]
    if value is None or isinstance(value, list | dict):
        raise RowError(f"the field {name!r} is {json.dumps(value)[:40]}, expected text")
    text = str(value).strip()
    if not text:
        raise RowError(f"the field {name!r} is empty")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise RowError(f"the field {name!r} has half a surrogate pair, which is not text")
    return text


def refuse_bad_rows(bad: Sequence[BadRow], good: int, tolerated: int, path: Path) -> None:
    """Lists bad rows: as an error if there are more than `tolerated`, else as a warning.

    Raises:
      DataError: for too many bad rows, or if no good row is left.
    """
    listed = "".join(f"\n  {row}" for row in bad[:_LISTED])
    if len(bad) > _LISTED:
        listed += f"\n  and {len(bad) - _LISTED} more"
    summary = f"{path}: {len(bad)} of {good + len(bad)} rows are bad"
    if len(bad) > tolerated:
        raise DataError(f"{summary}, and {tolerated} are tolerated (tolerate_bad_rows):{listed}")
    if not good:
        raise DataError(f"{path}: no usable row{':' + listed if bad else ''}")
    if bad:
        logging.warning("%s and are skipped:%s", summary, listed)


def text_files(data_dir: str) -> dict[str, list[str]]:
    """Returns the .txt and .txt.gz files of a folder, or its URL, for 'train' and 'validation'.

    Raises:
      DataError: if there are none for one of the two.
    """
    folder = data_dir if is_url(data_dir) else str(Path(data_dir).expanduser().absolute())
    folder = folder.rstrip("/")
    splits: dict[str, list[str]] = {"train": [], "validation": []}
    for path in sorted(tf.io.gfile.glob([f"{folder}/*.txt", f"{folder}/*.txt.gz"])):
        name = path.rsplit("/", 1)[-1].lower()
        splits["validation" if "valid" in name or "dev" in name else "train"].append(path)
    for split, paths in splits.items():
        if not paths:
            raise DataError(
                f"{folder} has no text for {split}: expected .txt or .txt.gz files, one text a "
                "line, of which those for validation have 'valid' or 'dev' in their names"
            )
    return splits


def read_text_lines(path: Any) -> Any:
    """Returns the `tf.data.Dataset` of {'text'} of a file, a line each, gzipped by its name."""
    compression = tf.where(tf.strings.regex_full_match(path, r".*\.gz"), "GZIP", "")
    return tf.data.TextLineDataset(path, compression).map(lambda line: {"text": line})
