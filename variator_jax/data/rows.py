"""The rows of the user's files: JSON lines, TSV and plain text, and the bad ones among them.

Reading never stops at a bad row: rows and descriptions of the bad ones, with file and line, are
returned together, and `refuse_bad_rows` decides whether a run may start.
"""

import gzip
import json
import re
import string
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from absl import logging

from variator_jax.data.tasks import missing_file
from variator_jax.errors import DataError, did_you_mean

_LISTED = 10  # bad rows that are named in a message; the others are counted
_FORMATS = (".jsonl", ".tsv", ".txt")
_FIELD = re.compile(r"(?!\d+$)[\w-]+")

T = TypeVar("T")
Fields = Mapping[str, Any]


class RowError(Exception):
    """Why a row cannot be used."""


def read_rows(path: Path, convert: Callable[[Fields], T]) -> tuple[list[T], list[str]]:
    """Returns the converted rows and the bad ones of a .jsonl, .tsv or .txt file, or its .gz.

    A TSV file has a header, is split on tabs and knows no quoting. A text file gives each line as
    the field 'text'. Blank lines are skipped.

    Args:
      path: of the file.
      convert: makes of a row's fields what is returned, or raises RowError.

    Returns:
      The converted rows, and the place of each bad row with what is wrong.

    Raises:
      DataError: if the file is missing, empty, broken as a whole or of another format.
    """
    content = content_of(path).removeprefix(b"\xef\xbb\xbf").split(b"\n")
    lines = [(n, line.removesuffix(b"\r")) for n, line in enumerate(content, 1) if line.strip()]
    suffix, header = _suffix(path), list[str]()
    if suffix == ".tsv" and lines:
        header = [n.strip() for n in lines.pop(0)[1].decode("utf-8", "replace").split("\t")]
    if not lines or len(set(header)) < len(header):
        raise DataError(f"{path} has no rows, or a column name twice: {header}")
    rows, bad = [], []
    for number, line in lines:
        try:
            rows.append(convert(_parse(line, header, suffix)))
        except RowError as error:
            bad.append(f"{path}:{number}: {error}")
    return rows, bad


def _parse(line: bytes, header: list[str], suffix: str) -> Fields:
    """Returns the fields of a line of a file with this suffix."""
    try:
        text = line.decode("utf-8")
        value = _JSON.decode(text) if suffix == ".jsonl" else {"text": text}
    except (ValueError, RecursionError) as error:  # broken UTF-8, broken JSON, too long integers
        raise RowError(f"cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise RowError(f"expected a JSON object, found {json.dumps(value)[:40]}")
    if suffix != ".tsv":
        return value
    cells = text.split("\t")
    if len(cells) != len(header):
        raise RowError(f"{len(cells)} columns, expected {len(header)} as in the header")
    return dict(zip(header, cells, strict=True))


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Returns a JSON object, in which a field stands once."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise RowError(f"a field is there twice: {[name for name, _ in pairs]}"[:80])
    return fields


def _integer(digits: str) -> str:
    int(digits)  # refuses one too long to be a number
    return digits


# Numbers stay as they stand in the file, so that as a text they read back unchanged.
_JSON = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer, parse_float=str)


def _suffix(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def content_of(path: Path) -> bytes:
    """Returns the bytes of a data file, of a .gz unpacked.

    Raises:
      DataError: if the file is missing, damaged or of another format.
    """
    if not path.is_file():
        raise missing_file("no data file", path)
    if _suffix(path) not in _FORMATS:
        raise DataError(f"{path}: expected {', '.join(_FORMATS)}, or one of these with .gz")
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def field_of(fields: Fields, name: str) -> Any:
    """Returns a field of a row; RowError if it is missing."""
    if name not in fields:
        raise RowError(f"no field {name!r}.{did_you_mean(name, fields)}")
    return fields[name]


def text_field(fields: Fields, name: str) -> str:
    """Returns a field of a row as text.

    Raises:
      RowError: if the field is missing, empty, or neither text nor a number; NaN is none.
    """
    value = field_of(fields, name)
    if not isinstance(value, str):
        raise RowError(f"the field {name!r} is {json.dumps(value)[:40]}, expected text")
    text = value.strip()
    if not text:
        raise RowError(f"the field {name!r} is empty")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise RowError(f"the field {name!r} has half a surrogate pair, which is not text")
    return text


def one_of(label: str, known: Mapping[str, T]) -> T:
    """Returns what a label stands for; RowError for an unknown one."""
    if label not in known:
        nearest = did_you_mean(label, [*known, *map(str, known.values())])
        raise RowError(f"unknown label {label!r}.{nearest} Known: {', '.join(known)}")
    return known[label]


def template_fields(template: str) -> list[str]:
    """Returns the names of a template's fields, in their order.

    Raises:
      DataError: if the template is broken, has no fields, or asks for more than plain fields: a
        format ('{hour:02d}'), a conversion ('{text!r}') or a position ('{0}').
    """
    try:
        parts = [part[1:] for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError:  # a single brace
        parts = []
    names = [str(name) for name, *extra in parts if extra == ["", None]]
    if not names or len(names) < len(parts) or not all(map(_FIELD.fullmatch, names)):
        raise DataError(f"the template {template!r} needs plain fields in braces, such as {{text}}")
    return names


def refuse_bad_rows(bad: Sequence[str], good: int, tolerated: int, path: Path) -> None:
    """Lists bad rows: as an error if there are more than `tolerated`, else as a warning.

    Raises:
      DataError: for too many bad rows, or if no good row is left.
    """
    more = [f"and {len(bad) - _LISTED} more"] if len(bad) > _LISTED else []
    listed = "".join(f"\n  {row}" for row in [*bad[:_LISTED], *more])
    summary = f"{path}: {len(bad)} of {good + len(bad)} rows are bad"
    if len(bad) > tolerated or not good:
        raise DataError(f"{summary}; {tolerated} are tolerated (tolerate_bad_rows):{listed}")
    if bad:
        logging.warning("%s and are skipped:%s", summary, listed)
