"""seqio tasks made of the user's files.

`file_task` makes classification or generation tasks from JSON lines or TSV with a template;
`span_corruption_task_from_text` makes a pre-training task from plain text. All rows are checked
before anything is trained.
"""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from variator_jax.data import labels as label_readings
from variator_jax.data import rows, tasks
from variator_jax.data import vocabulary as vocabularies
from variator_jax.data.fitting import template_parts
from variator_jax.data.spec import Kind, TaskSpec, verbalizer_ids
from variator_jax.errors import DataError

_SPLITS = ("train", "validation")
_SPLIT_VERSION = 3  # which rows are held out: part of a task's name
_HELD_OUT = 0.1


class _Rendering(NamedTuple):
    """What a task makes of a row."""

    kind: Kind
    example: Callable[[rows.Fields], dict[str, Any]]
    arguments: list[Any]  # what `example` was made from, in JSON's types
    labels: label_readings.Labels | None = None  # of a classification; targets are the raw labels


def file_task(
    path: str,
    template: str,
    target: str | None = None,
    labels: label_readings.Labels | None = None,
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
      template: the input, with fields in braces: 'Sentence: {text} Is this positive?'. Where that
        is longer than the inputs, the end of the longest field is cut, and the rest stays.
      target: for generation: the target, as a template or as the name of a field.
      labels: for classification: the verbalizers, either a list (all rows have verbalizers, or all
        have indices, or all have truth values) or a dict from a row's label to its verbalizer.
      label_field: the field with a row's label.
      validation_path: the validation rows; without it, a tenth of `path` is held out, by the hash
        of the input, so that rows of one input are in one split.
      vocabulary: a seqio vocabulary or the path of a SentencePiece model; that of the documentation
        corpus if not given.
      tolerate_bad_rows: how many bad rows of both files together are skipped with a warning.

    Raises:
      DataError: for anything wrong with the files, the template or the labels, also where these can
        be read in two ways; bad rows are listed with file and line.
    """
    if (labels is None) == (target is None):
        raise DataError("a file task needs either labels (classification) or target (generation)")
    for name, value in (("target", target), ("label_field", label_field), ("template", template)):
        if value is not None and not isinstance(value, str):
            raise DataError(f"{name} is {value!r}; expected a text, in quotes")
    kind: Kind = "generation" if labels is None else "classification"
    readings = [] if labels is None else label_readings.readings(labels)
    known = [list(reading.table.items()) for reading in readings]
    inputs = _template(template)
    filled = _template(target) if target is not None and "{" in target else None

    def example(row: rows.Fields) -> dict[str, Any]:
        if target is None:
            return {"inputs": inputs(row), "targets": label_readings.label_of(row, label_field)}
        answer = "".join(filled(row)) if filled else rows.text_field(row, target)
        return {"inputs": inputs(row), "targets": answer}

    rendering = _Rendering(kind, example, [kind, template, target, known, label_field], labels)
    return _register(rendering, path, validation_path, vocabulary, tolerate_bad_rows)


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

    def example(row: rows.Fields) -> dict[str, str]:
        return {"targets": rows.text_field(row, "text")}

    rendering = _Rendering("span_corruption", example, ["span_corruption"])
    return _register(rendering, path, validation_path, vocabulary, tolerate_bad_rows)


def _register(
    rendering: _Rendering, path: str, validation_path: str | None, vocabulary: Any, tolerated: int
) -> str:
    """Registers the task, once, and returns its name.

    The name identifies files by name and content, the vocabulary by its tokens; folders, times and
    processes do not matter.
    """
    vocabulary = vocabularies.load_vocabulary(vocabulary)
    paths = [Path(tasks.absolute(given)) for given in (path, validation_path) if given is not None]
    contents = [[file.name, hashlib.sha256(rows.content_of(file)).hexdigest()] for file in paths]
    tokens = [vocabularies.fingerprint(vocabulary), vocabulary.vocab_size]  # sentinels count too
    split = [_SPLIT_VERSION] if validation_path is None else []
    digits = tasks.hash_of([rendering.arguments, contents, tokens, tolerated, *split])
    name = re.sub(r"\W", "_", f"file_{paths[0].name.split('.')[0]}_{digits}", flags=re.ASCII)
    if tasks.is_registered(name):
        return name
    reading = _reading(paths, rendering)
    words = tuple(dict.fromkeys(reading.table.values())) if reading else ()
    spec = TaskSpec(name, rendering.kind, words, note=str(reading or ""))
    verbalizer_ids(spec, vocabulary.encode, vocabulary.unk_id)  # refuses those that begin alike
    splits = _load(paths, rendering, reading, tolerated)
    return tasks.text_to_text_task(name, splits.__getitem__, _SPLITS, vocabulary, spec)


def _reading(paths: list[Path], rendering: _Rendering) -> label_readings.Reading | None:
    """Returns how the labels of all files together are read; None without labels."""
    if rendering.labels is None:
        return None
    read = [rows.read_rows(path, lambda row: rendering.example(row)["targets"]) for path in paths]
    return label_readings.choose(rendering.labels, sum((column for column, _ in read), []))


def _load(
    paths: list[Path], rendering: _Rendering, reading: label_readings.Reading | None, tolerated: int
) -> dict[str, tasks.Examples]:
    """Returns the examples of both splits, after all rows of all files were checked."""

    def convert(row: rows.Fields) -> dict[str, Any]:
        example = rendering.example(row)
        if reading is not None:
            example["targets"] = rows.one_of(example["targets"], reading.table)
        return example

    examples, bad = zip(*(rows.read_rows(path, convert) for path in paths), strict=True)
    rows.refuse_bad_rows(sum(bad, []), sum(map(len, examples)), tolerated, paths[0])
    if len(paths) == 1:
        return _hold_out(examples[0], paths[0])
    for path, good in zip(paths, examples, strict=True):
        rows.refuse_bad_rows([], len(good), 0, path)
    return dict(zip(_SPLITS, examples, strict=True))


def _hold_out(examples: tasks.Examples, path: Path) -> dict[str, tasks.Examples]:
    """Puts a tenth of the rows, at least one, into validation; rows of one input stay together.

    The fields of a row that the prompt has decide, in whatever order and with whatever words around
    them: a plugin is often adapted under another prompt than its backbone. In span corruption the
    text is the input.
    """
    # A template's parts are literals and fields in turn.
    fields = (example.get("inputs", ["", example["targets"]])[1::2] for example in examples)
    inputs = ("\0".join(sorted({*texts})) for texts in fields)
    digests = [hashlib.sha256(text.encode()).digest() for text in inputs]
    hashes = [int.from_bytes(digest[:8], "big") for digest in digests]
    if len(set(hashes)) < 2:
        raise DataError(f"{path}: one distinct input cannot be split into train and validation")
    limit = max(int(_HELD_OUT * 2**64), min(hashes) + 1)
    splits: dict[str, tasks.Examples] = {"train": [], "validation": []}
    for example, number in zip(examples, hashes, strict=True):
        splits["validation" if number < limit else "train"].append(example)
    return splits


def _template(template: str) -> Callable[[rows.Fields], list[str]]:
    """Returns what makes a template's parts of a row; errors of `rows.template_fields`."""
    names = rows.template_fields(template)
    return lambda row: template_parts(template, {n: rows.text_field(row, n) for n in names})
