"""The user's files: rows of JSON lines, TSV and plain text, and seqio tasks made of them.

`file_task` makes classification or generation tasks from JSON lines or TSV with a template;
`span_corruption_task_from_text` makes a pre-training task from plain text. All rows are checked
before anything is trained. Reading never stops at a bad row: rows and descriptions of the bad ones,
with file and line, are returned together, and `refuse_bad_rows` decides whether a run may start.
"""

import gzip
import hashlib
import json
import re
import string
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from absl import logging

from variator_jax.data import tasks
from variator_jax.data import vocabulary as vocabularies
from variator_jax.data.spec import Kind, TaskSpec, verbalizer_ids
from variator_jax.data.tasks import Examples
from variator_jax.errors import DataError, did_you_mean

_LISTED = 10  # bad rows that are named in a message; the others are counted
_FORMATS = (".jsonl", ".tsv", ".txt")
_SPLITS = ("train", "validation")
_HELD_OUT = 0.1
_FIELD = re.compile(r"(?!\d+$)[\w-]+")

T = TypeVar("T")
Fields = Mapping[str, Any]
Labels = Sequence[str] | Mapping[Any, str]


class RowError(Exception):
    """Why a row cannot be used."""


def file_task(
    path: str,
    template: str,
    target: str | None = None,
    labels: Labels | None = None,
    label_field: str = "label",
    validation_path: str | None = None,
    vocabulary: Any = None,
    tolerate_bad_rows: int = 0,
) -> str:
    """Registers a task over a .jsonl or .tsv file, once, and returns its name.

    The name is made from the file's name and a hash of all that the task consists of, so that it is
    the same in another process, or for a copy of the file.

    Args:
      path: the training rows.
      template: the input, with fields in braces: 'Sentence: {text} Is this positive?'.
      target: for generation: the target, as a template or as the name of a field.
      labels: for classification: the verbalizers, either a list (a row's label is an index, or the
        verbalizer itself) or a dict from a row's label to its verbalizer.
      label_field: the field with a row's label.
      validation_path: the validation rows; without it, a tenth of `path` is held out, by the hash
        of the row, so that equal rows are never in both splits.
      vocabulary: a seqio vocabulary or the path of a SentencePiece model; that of the documentation
        corpus if not given.
      tolerate_bad_rows: how many bad rows of both files together are skipped with a warning.

    Raises:
      DataError: for anything wrong with the files, the template or the labels; bad rows are listed
        with file and line.
    """
    if (labels is None) == (target is None):
        raise DataError("a file task needs either labels (classification) or target (generation)")
    render_inputs = _template(template)
    table = _label_table(labels) if labels is not None else {}
    render_target = _label(table, label_field) if table else _target(str(target))

    def render(row: Fields) -> dict[str, str]:
        return {"inputs": render_inputs(row), "targets": render_target(row)}

    kind: Kind = "classification" if table else "generation"
    arguments = [kind, template, target, list(table.items()), label_field]
    files = _Files(path, validation_path, render, tolerate_bad_rows, arguments)
    return _register(files, kind, tuple(dict.fromkeys(table.values())), vocabulary)


def span_corruption_task_from_text(
    path: str,
    validation_path: str | None = None,
    vocabulary: Any = None,
    tolerate_bad_rows: int = 0,
) -> str:
    """Registers span corruption over a text file, once, and returns the task's name.

    The file is .txt or .txt.gz with one text a line, or JSON lines or TSV with a field 'text'. It
    is read into memory. The other arguments and errors are those of `file_task`.
    """

    def render(row: Fields) -> dict[str, str]:
        return {"targets": text_field(row, "text")}

    files = _Files(path, validation_path, render, tolerate_bad_rows, ["span_corruption"])
    return _register(files, "span_corruption", (), vocabulary)


class _Files(NamedTuple):
    """The files of a task, and what makes examples of their rows."""

    path: str
    validation_path: str | None
    render: Callable[[Fields], dict[str, str]]
    tolerated: int  # bad rows
    arguments: list[Any]  # what `render` was made from, in JSON's types

    def paths(self) -> list[Path]:
        """Absolute paths of the one or two files."""
        given = (self.path, self.validation_path)
        return [Path(path).expanduser().absolute() for path in given if path is not None]

    def load(self) -> dict[str, Examples]:
        """Returns the examples of both splits, after all rows of all files were checked."""
        paths, examples, bad = self.paths(), [], []
        for path in paths:
            good, refused = read_rows(path, self.render)
            examples.append(good)
            bad += refused
        refuse_bad_rows(bad, sum(map(len, examples)), self.tolerated, paths[0])
        if len(paths) == 1:
            return _hold_out(examples[0], paths[0])
        for path, good in zip(paths, examples, strict=True):
            refuse_bad_rows([], len(good), 0, path)
        return dict(zip(_SPLITS, examples, strict=True))


def _register(files: _Files, kind: Kind, labels: tuple[str, ...], vocabulary: Any) -> str:
    """Registers the task, once, and returns its name.

    The name identifies files by name and content, the vocabulary by its tokens; folders, times and
    processes do not matter.
    """
    vocabulary = vocabularies.load_vocabulary(vocabulary)
    paths = files.paths()
    contents = [[path.name, hashlib.sha256(content_of(path)).hexdigest()] for path in paths]
    tokens = [vocabularies.fingerprint(vocabulary), vocabulary.vocab_size]  # sentinels count too
    digits = tasks.hash_of([files.arguments, contents, tokens, files.tolerated])
    name = f"file_{paths[0].name.split('.')[0]}_{digits}".replace("-", "_")
    if tasks.is_registered(name):
        return name
    spec = TaskSpec(name, kind, labels)
    if labels:  # refuses those that begin alike
        verbalizer_ids(spec, vocabulary.encode, vocabulary.unk_id)
    splits = files.load()
    return tasks.text_to_text_task(name, splits.__getitem__, _SPLITS, vocabulary, spec)


def _row_hash(example: Mapping[str, str]) -> int:
    return int.from_bytes(hashlib.sha256(json.dumps(example).encode()).digest()[:8], "big")


def _hold_out(examples: Examples, path: Path) -> dict[str, Examples]:
    """Puts a tenth of the rows, at least one, into validation; equal rows stay together."""
    hashes = [_row_hash(example) for example in examples]
    if len(set(hashes)) < 2:
        raise DataError(f"{path}: one distinct row cannot be split into train and validation")
    limit = max(int(_HELD_OUT * 2**64), min(hashes) + 1)
    splits: dict[str, Examples] = {"train": [], "validation": []}
    for example, number in zip(examples, hashes, strict=True):
        splits["validation" if number < limit else "train"].append(example)
    return splits


def _template(template: str) -> Callable[[Fields], str]:
    """Returns what fills a template with the fields of a row.

    Raises:
      DataError: if the template is broken, has no fields, or asks for more than plain fields: a
        format ('{hour:02d}'), a conversion ('{text!r}') or a position ('{0}').
    """
    try:
        parts = [part[1:] for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError:  # a single brace
        parts = []
    names = [str(name) for name, _, _ in parts]
    plain = [name for name, *extra in parts if extra == ["", None] and _FIELD.fullmatch(str(name))]
    if not names or plain != names:
        raise DataError(f"the template {template!r} needs plain fields in braces, such as {{text}}")
    return lambda row: template.format_map({name: text_field(row, name) for name in names})


def _target(target: str) -> Callable[[Fields], str]:
    """Returns what makes the target of a row: `target` is a template or the name of a field."""
    return _template(target) if "{" in target else lambda row: text_field(row, target)


def _label_table(labels: Labels) -> dict[str, str]:
    """Maps what a row may have as its label, as text, to the verbalizer, in label order.

    Raises:
      DataError: if there are fewer than two verbalizers, or they are not words.
    """
    values = labels.values() if isinstance(labels, Mapping) else labels
    words = [word for word in values if isinstance(word, str) and word.strip()]
    fewest = 2 if isinstance(labels, Mapping) else max(2, len(words))  # values may share a word
    if isinstance(labels, str) or len(words) < len(labels) or len(set(words)) < fewest:
        raise DataError(f"labels are a list or dict of two different words or more: {labels!r}")
    if isinstance(labels, Mapping):
        return {str(raw): word for raw, word in labels.items()}
    table = {word: word for word in words}
    truth_values = {"False": words[0], "True": words[1]} if len(words) == 2 else {}  # JSON's
    indices = {str(index): word for index, word in enumerate(words)}
    return table | {key: w for key, w in (indices | truth_values).items() if key not in table}


def _label(known: Mapping[str, str], field: str) -> Callable[[Fields], str]:
    """Returns what makes the target of a row, the verbalizer of its label."""

    def verbalizer(row: Fields) -> str:
        label = text_field(row, field)
        if label not in known:
            raise RowError(
                f"unknown label {label!r}.{did_you_mean(label, known)} Known: {', '.join(known)}"
            )
        return known[label]

    return verbalizer


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
        if len(set(header)) < len(header):
            raise DataError(f"{path}: a column name occurs twice in the header: {header}")
    if not lines:
        raise DataError(f"{path} has no rows")
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
        value = json.loads(text) if suffix == ".jsonl" else {"text": text}
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


def _suffix(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def content_of(path: Path) -> bytes:
    """Returns the bytes of a data file, of a .gz unpacked.

    Raises:
      DataError: if the file is missing, damaged or of another format.
    """
    if not path.is_file():
        raise tasks.missing_file("no data file", path)
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
      RowError: if the field is missing, empty, or neither text nor a number.
    """
    value = field_of(fields, name)
    if value is None or isinstance(value, list | dict):
        raise RowError(f"the field {name!r} is {json.dumps(value)[:40]}, expected text")
    text = str(value).strip()
    if not text:
        raise RowError(f"the field {name!r} is empty")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise RowError(f"the field {name!r} has half a surrogate pair, which is not text")
    return text


def refuse_bad_rows(bad: Sequence[str], good: int, tolerated: int, path: Path) -> None:
    """Lists bad rows: as an error if there are more than `tolerated`, else as a warning.

    Raises:
      DataError: for too many bad rows, or if no good row is left.
    """
    listed = "".join(f"\n  {row}" for row in bad[:_LISTED])
    if len(bad) > _LISTED:
        listed += f"\n  and {len(bad) - _LISTED} more"
    summary = f"{path}: {len(bad)} of {good + len(bad)} rows are bad"
    if len(bad) > tolerated or not good:
        raise DataError(f"{summary}; {tolerated} are tolerated (tolerate_bad_rows):{listed}")
    if bad:
        logging.warning("%s and are skipped:%s", summary, listed)
