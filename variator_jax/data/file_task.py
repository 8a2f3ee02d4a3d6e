"""seqio tasks from the user's own files, checked row by row before anything is trained.

`file_task` makes classification or generation tasks from JSON lines or TSV with a template;
`span_corruption_task_from_text` makes a pre-training task from plain text. Reading and reporting of
rows is in `rows`, rendering in `templates`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from variator_jax.data import vocabulary as vocabularies
from variator_jax.data.registry import is_registered, origin_of, remember
from variator_jax.data.rows import (
    BadRow,
    Row,
    RowError,
    content_of,
    read_rows,
    refuse_bad_rows,
    require_field,
    text_field,
)
from variator_jax.data.sources import Examples, span_corruption_task, text_to_text_task
from variator_jax.data.spec import Kind, TaskSpec, verbalizer_ids
from variator_jax.data.templates import Labels, fields_of, renderer, target_fields, verbalizers_of
from variator_jax.errors import DataError

_SPLITS = ("train", "validation")
_HELD_OUT = 0.1


def file_task(
    path: str,
    template: str,
    target: str | None = None,
    labels: Labels | None = None,
    label_field: str = "label",
    validation_path: str | None = None,
    vocabulary: Any = None,
    tolerate_bad_rows: int = 0,
    name: str | None = None,
) -> str:
    """Registers a task over a .jsonl or .tsv file, once, and returns its name.

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
      name: the task's name; if not given, made from the file's name and a hash of all that the
        task consists of, so that it is the same in another process, or for a copy of the file.

    Raises:
      DataError: for anything wrong with the files, the template or the labels; bad rows are listed
        with file and line.
    """
    if (labels is None) == (target is None):
        raise DataError("a file task needs either labels (classification) or target (generation)")
    verbalizers = verbalizers_of(labels) if labels is not None else ()
    chosen = vocabularies.vocabulary_of(vocabulary)
    paths = _paths(path, validation_path)
    render = renderer(template, target, labels, label_field)
    arguments = [template, target, _plain(labels), label_field, tolerate_bad_rows]
    origin = _origin(paths, chosen, arguments)
    name = name or _name(paths[0], origin)
    if is_registered(name, origin):
        return name
    kind: Kind = "classification" if verbalizers else "generation"
    spec = TaskSpec(name, kind, verbalizers)
    if verbalizers:
        verbalizer_ids(spec, chosen.encode, chosen.unk_id)  # refuses those that begin alike
    required = [*fields_of(template), *([label_field] if target is None else target_fields(target))]
    splits = _load(paths, required, render, tolerate_bad_rows)
    text_to_text_task(name, splits.__getitem__, _SPLITS, chosen, spec)
    return remember(name, origin, spec)


def span_corruption_task_from_text(
    path: str,
    text_field_name: str = "text",
    validation_path: str | None = None,
    vocabulary: Any = None,
    tolerate_bad_rows: int = 0,
    name: str | None = None,
) -> str:
    """Registers span corruption over a text file and returns its name; the same call again is fine.

    The file is .txt or .txt.gz with one text a line, or JSON lines or TSV with a text field. It is
    read into memory. The other arguments and errors are those of `file_task`.
    """
    paths = _paths(path, validation_path)
    chosen = vocabularies.vocabulary_of(vocabulary)
    origin = _origin(paths, chosen, [text_field_name, tolerate_bad_rows])
    name = name or _name(paths[0], origin)
    if is_registered(name, origin):
        return name

    def render(row: Row) -> dict[str, str]:
        return {"targets": text_field(row, text_field_name)}

    splits = _load(paths, [text_field_name], render, tolerate_bad_rows)
    span_corruption_task(name, splits.__getitem__, _SPLITS, chosen)
    return remember(name, origin, TaskSpec(name, "span_corruption"))


def _paths(path: str, validation_path: str | None) -> list[Path]:
    given = [path] if validation_path is None else [path, validation_path]
    return [Path(one).expanduser().absolute() for one in given]


def _plain(labels: Labels | None) -> Any:
    if isinstance(labels, Mapping):
        return [[str(raw), word] for raw, word in labels.items()]
    return labels if labels is None else list(labels)


def _origin(paths: Sequence[Path], vocabulary: Any, arguments: Sequence[Any]) -> str:
    """Identifies files by name and content, the vocabulary by its tokens, and the arguments.

    Nothing of this machine or process enters: neither folders nor times nor addresses.
    """
    parts = [
        [[path.name, hashlib.sha256(content_of(path)).hexdigest()] for path in paths],
        [vocabularies.fingerprint(vocabulary), vocabulary.vocab_size],  # sentinels count too
        arguments,
    ]
    return origin_of(parts)


def _name(path: Path, origin: str) -> str:
    return f"file_{path.name.split('.')[0]}_{origin[:8]}".replace("-", "_")


def _load(
    paths: Sequence[Path],
    required: Sequence[str],
    render: Callable[[Row], dict[str, str]],
    tolerated: int,
) -> dict[str, Examples]:
    """Returns the examples of both splits, after all rows of all files were checked."""
    examples: list[Examples] = []
    bad: list[BadRow] = []
    for path in paths:
        rows, broken = read_rows(path)
        for field in required:
            require_field(rows, field, path)
        good, refused = _render(rows, render)
        examples.append(good)
        bad += sorted(broken + refused, key=lambda row: row.line)
    refuse_bad_rows(bad, sum(map(len, examples)), tolerated, paths[0])
    if len(paths) == 1:
        return _hold_out(examples[0], paths[0])
    if not all(examples):
        raise DataError(f"{paths[1] if examples[0] else paths[0]}: no usable row")
    shared = {_row_hash(e) for e in examples[0]} & {_row_hash(e) for e in examples[1]}
    if shared:
        logging.warning("%s: %d rows are in %s too", paths[1], len(shared), paths[0])
    return dict(zip(_SPLITS, examples, strict=True))


def _render(
    rows: Sequence[Row], render: Callable[[Row], dict[str, str]]
) -> tuple[Examples, list[BadRow]]:
    good: Examples = []
    bad: list[BadRow] = []
    for row in rows:
        try:
            good.append(render(row))
        except RowError as error:
            bad.append(BadRow(row.path, row.line, str(error)))
    return good, bad


def _row_hash(example: Mapping[str, str]) -> int:
    return int.from_bytes(hashlib.sha256(json.dumps(example).encode()).digest()[:8], "big")


def _hold_out(examples: Examples, path: Path) -> dict[str, Examples]:
    """Puts a tenth of the rows, at least one, into validation; equal rows stay together."""
    hashes = [_row_hash(example) for example in examples]
    if len(set(hashes)) < 2:
        raise DataError(f"{path}: one distinct row cannot be split into train and validation")
    limit = max(int(_HELD_OUT * 2**64), min(hashes) + 1)
    chosen = [number < limit for number in hashes]
    return {
        "train": [e for e, held in zip(examples, chosen, strict=True) if not held],
        "validation": [e for e, held in zip(examples, chosen, strict=True) if held],
    }
