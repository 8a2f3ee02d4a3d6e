"""The texts of a file of any size, in windows of lines, and the batches of a window.

A window is read, tokenised, encoded and written as one, so its batches depend on its lines alone:
a run that is killed and started again computes the same numbers.
"""

import codecs
import functools
import gzip
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from variator_jax.errors import ConfigError, DataError, did_you_mean
from variator_jax.files import wrap_errors
from variator_jax.serving.engine import EngineLimits, Rows
from variator_jax.serving.tasks import Cut, TaskConfig, token_ids
from variator_jax.texts import Tokenizer

FORMATS = (".jsonl", ".txt")


class RowError(Exception):
    """Why a row has no encoding."""


class Window(NamedTuple):
    """Consecutive lines of the input that are not blank."""

    lines: list[tuple[int, bytes]]  # their numbers in the file, from 1
    digest: str  # SHA-256 of the numbered lines
    bytes_read: int  # of the file as it lies on the disk, up to the end of this window


class Texts(NamedTuple):
    """What becomes of a row: where its text is, what surrounds it, how long it may be."""

    field: str = "text"  # of an object in a .jsonl file
    prompt: str = "{text}"
    max_length: int = 512  # tokens, EOS included
    truncate: bool = False  # longer texts lose their end, prompts do not; otherwise bad rows


def suffix_of(path: Path) -> str:
    """`.jsonl` or `.txt`, that of a compressed file without its `.gz`.

    Raises:
      DataError: if the file is missing or of another format.
    """
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    if not path.is_file():
        raise DataError(f"There is no file {str(path)!r} to encode.")
    if suffix not in FORMATS:
        raise DataError(f"{path}: expected {' or '.join(FORMATS)}, or one of these with .gz.")
    return suffix


def read_windows(path: Path, size: int) -> Iterator[Window]:
    """The lines of a file, `size` at a time; only one window is in memory.

    Raises:
      DataError: if the file cannot be read to its end.
    """
    with wrap_errors(f"{path} cannot be read", DataError), path.open("rb") as raw:
        filled = _filled(gzip.open(raw) if path.suffix == ".gz" else raw)
        while lines := list(itertools.islice(filled, size)):
            yield Window(lines, _digest(lines), raw.tell())


def _filled(file: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers."""
    for number, line in enumerate(file, 1):
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if stripped := line.strip():
            yield number, stripped


def _digest(lines: Sequence[tuple[int, bytes]]) -> str:
    digest = hashlib.sha256()
    for number, line in lines:
        digest.update(b"%d %d " % (number, len(line)) + line)
    return digest.hexdigest()


def row_ids(line: bytes, suffix: str, tokenizer: Tokenizer, texts: Texts) -> tuple[list[int], bool]:
    """The token ids of a line, and whether its text was cut.

    Raises:
      RowError: for a line that has no text, or a longer one than is allowed.
    """
    text, task = _text(line, suffix, texts.field), task_of(texts.prompt)
    for allowed in (False, True)[: 1 + texts.truncate]:
        try:
            return token_ids(task, text, tokenizer, Cut(texts.max_length, allowed)), allowed
        except (ConfigError, UnicodeError) as error:
            reason = str(error)
    raise RowError(reason)


@functools.lru_cache
def task_of(prompt: str) -> TaskConfig:
    """The task of a server that has the same rows."""
    return TaskConfig("encode", "embed", prompt)


def _text(line: bytes, suffix: str, field: str) -> str:
    try:
        text = line.decode("utf-8")
        value = json.loads(text) if suffix == ".jsonl" else text
    except (ValueError, RecursionError) as error:  # broken UTF-8 or JSON
        raise RowError(f"cannot be read: {error}") from error
    if isinstance(value, dict):
        if field not in value:
            raise RowError(f"no field {field!r}.{did_you_mean(field, value)}")
        value = value[field]
    if not isinstance(value, str):
        raise RowError(f"expected a text, found {json.dumps(value)[:40]}")
    if not value.strip():
        raise RowError("the text is empty")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise RowError("half a surrogate pair, which is not text")
    return value


def make_batches(rows: Rows, limits: EngineLimits) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of rows of similar length, each of the one shape that its length has.

    The longest rows come first. A batch is as long as the bucket of its longest row, and has as
    many rows, a power of two, as the limits allow; the last one is filled up with padding.

    Args:
      rows: token ids.
      limits: the lengths, and the tokens of a batch.

    Yields:
      Which rows these are, `[rows]`, and their tokens `[batch, length]` int32, 0 on padding.
    """
    order = sorted(range(len(rows)), key=lambda row: (-len(rows[row]), row))
    while order:
        length = limits.length(len(rows[order[0]]))
        size = limits.rows(length)
        chosen, order = order[:size], order[size:]
        # [batch, length]
        tokens: np.ndarray = np.zeros((size, length), np.int32)
        for place, row in enumerate(chosen):
            tokens[place, : len(rows[row])] = rows[row]
        yield np.array(chosen), tokens
