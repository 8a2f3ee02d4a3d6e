"""GLUE's tasks with the paper's prompts and verbalizers: MNLI, QNLI, QQP, RTE, SST-2 and MRPC.

The prompts are the official code's, word for word (its grammar too). Validation is GLUE's dev set,
for MNLI the matched one; the test sets have no labels and are left out.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from variator_jax.data import prompted
from variator_jax.data._tf import tf
from variator_jax.data.mixture import mixture
from variator_jax.data.rows import Fields, RowError, read_rows, refuse_bad_rows
from variator_jax.data.spec import TaskSpec
from variator_jax.data.tasks import Examples
from variator_jax.data.vocabulary import vocabulary_of
from variator_jax.errors import DataError, did_you_mean

#: Examples of the published training sets, by which `glue_mixture` mixes.
SIZES = {
    "mnli": 392_702,
    "qnli": 104_743,
    "qqp": 363_846,
    "rte": 2_490,
    "sst2": 67_349,
    "mrpc": 3_668,
}
_BAD_ROWS = 1_000  # one row in so many may be broken, as some of the published files' are


def _published(
    folder: str,
    template: str,
    columns: Mapping[str, str],
    label: str,
    classes: tuple[str, ...],
    verbalizers: tuple[str, ...],
    dev: str = "",
) -> prompted.Published:
    """Describes a data set of GLUE.

    Args:
      folder: of its TSV files, as GLUE publishes them.
      template: the prompt; its fields are TFDS's.
      columns: field -> the column of the TSV file.
      label: the TSV file's column of the label.
      classes: the TSV file's labels, in TFDS's order.
      verbalizers: in the same order.
      dev: suffix of the validation split and of its file.
    """
    name = folder.lower().replace("-", "")
    splits = {
        "train": ("train", "train.tsv", "train*.tsv"),
        "validation": (f"validation{dev}", f"dev{dev}.tsv", f"dev{dev}*.tsv"),
    }
    read = functools.partial(_read, columns, label, classes)
    tfds = f"glue/{name}:2.0.0"
    return prompted.Published(name, template, tfds, folder, splits, read, _render, verbalizers)


def _read(columns: Mapping[str, str], label: str, classes: tuple[str, ...], path: Path) -> Examples:
    """Returns the rows of a TSV file with TFDS's fields.

    One broken row in a thousand is left out with a warning: some of the published files have such,
    and TFDS leaves them out too.

    Raises:
      DataError: if the file cannot be read, lacks a column, or has more broken rows.
    """

    def convert(row: Fields) -> dict[str, Any]:
        if row[label].strip() not in classes:
            known = ", ".join(classes)
            raise RowError(f"unknown label {row[label].strip()!r}. Known: {known}")
        texts = {field: row[column] for field, column in columns.items()}
        return {**texts, "label": classes.index(row[label].strip())}

    rows, bad = read_rows(path, [*columns.values(), label], convert)
    refuse_bad_rows(bad, len(rows), (len(rows) + len(bad)) // _BAD_ROWS, path)
    return rows


def _render(spec: TaskSpec, row: Mapping[str, Any]) -> dict[str, Any]:
    targets = tf.constant([spec.target(label) for label in spec.labels])
    return {"targets": tf.gather(targets, row["label"])}


_ENTAILED, _NUMBERS = ("entailment", "not_entailment"), ("0", "1")
_YES_NO, _NO_YES = ("Yes", "No"), ("No", "Yes")

DATASETS = {
    "mnli": _published(
        "MNLI",
        "Sentence 1: {premise} Sentence 2: {hypothesis} "
        "Does sentence 1 entails sentence 2? <extra_id_0>.",
        {"premise": "sentence1", "hypothesis": "sentence2"},
        "gold_label",
        ("entailment", "neutral", "contradiction"),
        ("Yes", "Maybe", "No"),
        "_matched",
    ),
    "qnli": _published(
        "QNLI",
        "Question: {question}\nSentence: {sentence}\n"
        "Does the sentence contains the answer to the question? <extra_id_0>.",
        {"question": "question", "sentence": "sentence"},
        *("label", _ENTAILED, _YES_NO),
    ),
    "qqp": _published(
        "QQP",
        "Question 1: {question1}\nQuestion 2: {question2}\n"
        "Are the two questions paraphrase of each other? <extra_id_0>.",
        {"question1": "question1", "question2": "question2"},
        *("is_duplicate", _NUMBERS, _NO_YES),
    ),
    "rte": _published(
        "RTE",
        "Sentence 1: {sentence1}\nSentence 2: {sentence2}\n"
        "Does sentence 1 entails sentence 2? <extra_id_0>.",
        {"sentence1": "sentence1", "sentence2": "sentence2"},
        *("label", _ENTAILED, _YES_NO),
    ),
    "sst2": _published(
        "SST-2",
        "Sentence: {sentence}\n"
        "Does this sentence express positive or negative emotions? <extra_id_0>.",
        {"sentence": "sentence"},
        *("label", _NUMBERS, ("negative", "positive")),
    ),
    "mrpc": _published(
        "MRPC",
        "Sentence 1: {sentence1}\nSentence 2: {sentence2}\n"
        "Are the two sentences paraphrase of each other? <extra_id_0>.",
        {"sentence1": "#1 String", "sentence2": "#2 String"},
        *("Quality", _NUMBERS, _NO_YES),
    ),
}


def glue_task(
    name: str, vocabulary: Any = None, data_dir: str | None = None, sentinel: bool = True
) -> str:
    """Registers a task of GLUE, once, and returns its name; reads neither data nor vocabulary.

    The task's name is `name`, and a hash of the arguments where they are not T5's vocabulary and
    TFDS.

    Args:
      name: mnli, qnli, qqp, rte, sst2 or mrpc.
      vocabulary: a seqio vocabulary, or the path or URL of a SentencePiece model; that of the
        documentation corpus if not given.
      data_dir: a folder with GLUE's TSV files, or with the folders as GLUE publishes them (MNLI,
        SST-2, ...); TensorFlow Datasets if not given. The files are read into memory.
      sentinel: prompts end with '<extra_id_0>' and targets begin with it; without, for a vocabulary
        that has none, both are plain text.

    Raises:
      DataError: for an unknown name or a folder without the files; when first read, for a
        vocabulary that lacks '<extra_id_0>' or bad files.
    """
    if name not in DATASETS:
        known = ", ".join(DATASETS)
        raise DataError(f"no GLUE task {name!r}.{did_you_mean(name, DATASETS)} Known: {known}")
    return prompted.register(DATASETS[name], vocabulary, data_dir, sentinel)


def glue_mixture(vocabulary: Any = None, data_dir: str | None = None, sentinel: bool = True) -> str:
    """Registers the mixture of the six, once, and returns its name; arguments as in `glue_task`.

    A task's share is that of its examples in the published training sets. The name is
    'variator_glue', with a hash where a task's name has one.
    """
    tasks = [glue_task(name, vocabulary, data_dir, sentinel) for name in DATASETS]
    name = prompted.named("variator_glue", vocabulary_of(vocabulary), data_dir, sentinel)
    return mixture(tasks, [SIZES[dataset] for dataset in DATASETS], name)
