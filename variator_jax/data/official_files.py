"""The files in which data sets are distributed: GLUE's TSV and SQuAD's JSON.

Finding looks at names alone; reading is done when a split is asked for. What a row becomes, prompt
and target, is the business of `glue` and `squad`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from variator_jax.data.rows import BadRow, read_rows, refuse_bad_rows, require_field
from variator_jax.data.vocabulary import is_url
from variator_jax.errors import DataError, did_you_mean

_BAD_ROWS = 1_000  # one row in so many may be broken, as some of the published files' are


def split_files(
    data_dir: str | Path, subfolder: str, names: Mapping[str, tuple[str, str]]
) -> dict[str, Path]:
    """Returns the file of each split that a folder has.

    Args:
      data_dir: the folder with the files, or the one above, which has them in `subfolder`.
      subfolder: the folder's name as published, such as 'SST-2'.
      names: split -> (the file's name as published, a pattern). Where there is no such file, the
        only one that fits the pattern is taken: part of the data, such as train_subset.tsv.

    Raises:
      DataError: if the folder or all its files are missing, or several files fit.
    """
    root = local_folder(data_dir)
    home = root / subfolder if (root / subfolder).is_dir() else root
    found = {split: _file(home, *name) for split, name in names.items()}
    files = {split: path for split, path in found.items() if path is not None}
    if not files:
        expected = ", ".join(name for name, _ in names.values())
        raise DataError(f"{home} has none of the files {expected} of {subfolder}")
    return files


def local_folder(data_dir: str | Path) -> Path:
    """Returns an existing local folder as an absolute path; DataError for anything else."""
    if is_url(data_dir):
        raise DataError(
            f"DATA_DIR is {data_dir}; these files are read from a local folder. Copy them, or read "
            "from TensorFlow Datasets (DATA_DIR = None)."
        )
    root = Path(data_dir).expanduser().absolute()
    if not root.is_dir():
        beside = [p.name for p in root.parent.glob("*")] if root.parent.is_dir() else []
        raise DataError(f"there is no folder {root}.{did_you_mean(root.name, beside)}")
    return root


def _file(home: Path, name: str, pattern: str) -> Path | None:
    if (home / name).is_file():
        return home / name
    fitting = sorted(home.glob(pattern))
    if len(fitting) > 1:
        listed = ", ".join(path.name for path in fitting)
        raise DataError(f"{home} has no {name}, and several files fit: {listed}; rename one")
    if fitting:
        logging.warning("%s has no %s; %s is read in its place", home, name, fitting[0].name)
    return fitting[0] if fitting else None


def read_tsv(path: Path, columns: Sequence[str], label: str, classes: Sequence[str]) -> Any:
    """Returns the rows of a GLUE file: (texts of `columns`, number of the class) each.

    The file has a header and knows no quoting. One broken row in a thousand is left out with a
    warning: some of the published files have such, and TFDS leaves them out too.

    Raises:
      DataError: if the file cannot be read, lacks a column, or has more broken rows.
    """
    rows, bad = read_rows(path, [*columns, label])
    for column in (*columns, label):
        require_field(rows, column, path)
    known = {name: number for number, name in enumerate(classes)}
    examples = []
    for row in rows:
        given = row.fields[label].strip()
        if given in known:
            texts = {column: row.fields[column].strip() for column in columns}
            examples.append((texts, known[given]))
        else:
            reason = f"unknown label {given!r}. Known: {', '.join(classes)}"
            bad.append(BadRow(row.path, row.line, reason))
    total = len(examples) + len(bad)
    bad.sort(key=lambda broken: broken.line)
    refuse_bad_rows(bad, len(examples), total // _BAD_ROWS, path)
    return examples


def read_squad(path: Path) -> list[dict[str, Any]]:
    """Returns SQuAD's questions: {'question', 'context', 'answers': [text, ...]} each.

    The file is SQuAD's own JSON, or JSON lines with these three fields, where the answers are texts
    or {'text': [...]}.

    Raises:
      DataError: if the file is neither, or a question has no answer, as in SQuAD 2.
    """
    try:
        if path.suffix == ".jsonl":
            questions = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
        else:
            questions = _questions(json.loads(path.read_text("utf-8")))
        examples = [_question(entry) for entry in questions]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not SQuAD's JSON: {type(error).__name__} {error}") from error
    for number, example in enumerate(examples, start=1):
        if not example["answers"]:
            raise DataError(
                f"{path}: question {number} has no answer ({example['question']!r}); expected "
                "SQuAD v1.1, where each has one or more"
            )
    if not examples:
        raise DataError(f"{path} has no questions")
    return examples


def _questions(content: Any) -> list[dict[str, Any]]:
    return [
        {**question, "context": paragraph["context"]}
        for article in content["data"]
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
    ]


def _question(entry: Mapping[str, Any]) -> dict[str, Any]:
    answers = entry["answers"]
    texts = answers["text"] if isinstance(answers, Mapping) else answers
    texts = [text["text"] if isinstance(text, Mapping) else text for text in texts]
    return {
        "question": entry["question"].strip(),
        "context": entry["context"].strip(),
        "answers": [text.strip() for text in texts],
    }
