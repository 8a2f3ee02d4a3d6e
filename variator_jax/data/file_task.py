"""seqio tasks from the user's own files, checked row by row before anything is trained.

`file_task` makes classification or generation tasks from JSON lines or TSV with a template;
`span_corruption_task_from_text` makes a pre-training task from plain text. Reading and reporting of
rows is in `rows`.
"""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import logging

from variator_jax.data import rows
from variator_jax.data import vocabulary as vocabularies
from variator_jax.data.rows import Fields, RowError, text_field
from variator_jax.data.spec import Kind, TaskSpec, verbalizer_ids
from variator_jax.data.tasks import Examples, hash_of, is_registered, text_to_text_task
from variator_jax.errors import DataError, did_you_mean

Labels = Sequence[str] | Mapping[Any, str]

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
    fields, render_inputs = _template(template)
    table = _label_table(labels) if labels is not None else {}
    verbalizers = tuple(dict.fromkeys(table.values()))
    target_fields, render_target = _label(table, label_field) if table else _target(str(target))

    def render(row: Fields) -> dict[str, str]:
        return {"inputs": render_inputs(row), "targets": render_target(row)}

    files = _Files(path, validation_path, [*fields, *target_fields], render, tolerate_bad_rows)
    arguments = [template, target, list(table.items()), label_field]
    kind: Kind = "classification" if table else "generation"
    return _register(kind, verbalizers, files, vocabulary, arguments)


def span_corruption_task_from_text(
    path: str,
    text_field_name: str = "text",
    validation_path: str | None = None,
    vocabulary: Any = None,
    tolerate_bad_rows: int = 0,
) -> str:
    """Registers span corruption over a text file, once, and returns the task's name.

    The file is .txt or .txt.gz with one text a line, or JSON lines or TSV with a text field. It is
    read into memory. The other arguments and errors are those of `file_task`.
    """

    def render(row: Fields) -> dict[str, str]:
        return {"targets": text_field(row, text_field_name)}

    files = _Files(path, validation_path, [text_field_name], render, tolerate_bad_rows)
    return _register("span_corruption", (), files, vocabulary, [text_field_name])


class _Files(NamedTuple):
    """The files of a task, the fields their rows must have, and what makes examples of rows."""

    path: str
    validation_path: str | None
    required: list[str]
    render: Callable[[Fields], dict[str, str]]
    tolerated: int  # bad rows

    def paths(self) -> list[Path]:
        """Absolute paths of the one or two files."""
        given = (self.path, self.validation_path)
        return [Path(path).expanduser().absolute() for path in given if path is not None]

    def load(self) -> dict[str, Examples]:
        """Returns the examples of both splits, after all rows of all files were checked."""
        paths, examples, bad = self.paths(), [], []
        for path in paths:
            good, refused = rows.read_rows(path, self.required, self.render)
            examples.append(good)
            bad += refused
        rows.refuse_bad_rows(bad, sum(map(len, examples)), self.tolerated, paths[0])
        if len(paths) == 1:
            return _hold_out(examples[0], paths[0])
        for path, good in zip(paths, examples, strict=True):
            if not good:
                raise DataError(f"{path}: no usable row")
        train, validation = ({_row_hash(example) for example in good} for good in examples)
        if shared := train & validation:
            logging.warning("%s: %d rows are in %s too", paths[1], len(shared), paths[0])
        return dict(zip(_SPLITS, examples, strict=True))


def _register(
    kind: Kind, labels: tuple[str, ...], files: _Files, vocabulary: Any, arguments: list[Any]
) -> str:
    """Registers the task, once, and returns its name.

    The name identifies files by name and content, the vocabulary by its tokens; folders, times and
    processes do not matter.
    """
    vocabulary = vocabularies.vocabulary_of(vocabulary)
    paths = files.paths()
    contents = [[path.name, hashlib.sha256(rows.content_of(path)).hexdigest()] for path in paths]
    tokens = [vocabularies.fingerprint(vocabulary), vocabulary.vocab_size]  # sentinels count too
    digits = hash_of([kind, contents, tokens, files.tolerated, arguments])
    name = f"file_{paths[0].name.split('.')[0]}_{digits}".replace("-", "_")
    if is_registered(name):
        return name
    spec = TaskSpec(name, kind, labels)
    if labels:  # refuses those that begin alike
        verbalizer_ids(spec, vocabulary.encode, vocabulary.unk_id)
    splits = files.load()
    return text_to_text_task(name, splits.__getitem__, _SPLITS, vocabulary, spec)


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


def _template(template: str) -> tuple[list[str], Callable[[Fields], str]]:
    """Returns a template's fields, and what fills it with those of a row.

    Raises:
      DataError: if the template is broken, has no fields, or asks for more than plain fields: a
        format ('{hour:02d}'), a conversion ('{text!r}') or a position ('{0}').
    """
    try:
        parts = [part for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise DataError(f"the template {template!r} is broken: {error}") from error
    names = [str(name) for _, name, _, _ in parts]
    plain = (name.translate({ord("_"): "a", ord("-"): "a"}) for name in names)
    if not names or not all(name.isalnum() and not name.isdecimal() for name in plain):
        raise DataError(
            f"the template {template!r} needs fields in braces, such as {{text}}; found {names}"
        )
    for _, name, form, conversion in parts:
        if form or conversion:
            extra = f"!{conversion}" if conversion else f":{form}"
            raise DataError(
                f"the template {template!r} has {extra!r} after the field {name!r}; expected a "
                f"plain {{{name}}}"
            )
    return names, lambda row: template.format_map({name: text_field(row, name) for name in names})


def _target(target: str) -> tuple[list[str], Callable[[Fields], str]]:
    """Returns fields and renderer of a target that is a template or the name of a field."""
    return _template(target) if "{" in target else ([target], lambda row: text_field(row, target))


def _label_table(labels: Labels) -> dict[str, str]:
    """Maps what a row may have as its label, as text, to the verbalizer, in label order.

    Raises:
      DataError: if there are fewer than two verbalizers, or they are not words.
    """
    words = list(labels.values()) if isinstance(labels, Mapping) else list(labels)
    if isinstance(labels, str) or not all(isinstance(w, str) and w.strip() for w in words):
        raise DataError(f"labels are a list or dict of words, found {labels!r}")
    distinct = set(words)
    if len(distinct) < 2 or (len(distinct) < len(words) and not isinstance(labels, Mapping)):
        raise DataError(f"labels need two different verbalizers or more, found {words}")
    if isinstance(labels, Mapping):
        return {str(raw): word for raw, word in labels.items()}
    table = {word: word for word in labels}
    truth_values = {"False": words[0], "True": words[1]} if len(words) == 2 else {}  # JSON's
    indices = {str(index): word for index, word in enumerate(words)}
    return table | {key: w for key, w in (indices | truth_values).items() if key not in table}


def _label(known: Mapping[str, str], field: str) -> tuple[list[str], Callable[[Fields], str]]:
    """Returns fields and renderer of a target that is the verbalizer of a row's label."""

    def verbalizer(row: Fields) -> str:
        label = text_field(row, field)
        if label not in known:
            raise RowError(
                f"unknown label {label!r}.{did_you_mean(label, known)} Known: {', '.join(known)}"
            )
        return known[label]

    return [field], verbalizer
