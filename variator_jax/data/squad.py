"""SQuAD v1.1 with the paper's prompt: a short answer is generated from a paragraph."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from variator_jax.data import prompted
from variator_jax.data._tf import tf
from variator_jax.data.spec import ANSWER_SEPARATOR, TaskSpec
from variator_jax.data.tasks import Examples
from variator_jax.errors import DataError


def squad_task(vocabulary: Any = None, data_dir: str | None = None, sentinel: bool = True) -> str:
    """Registers SQuAD v1.1, once, and returns the task's name; reads neither data nor vocabulary.

    The target is the first answer, the only one in the training set. All accepted answers are in
    the field 'answers', which the metrics read: exact match and token F1 of the best.

    Args:
      vocabulary: as in `glue.glue_task`.
      data_dir: a folder with train-v1.1.json and dev-v1.1.json, or one above its folder 'squad';
        TensorFlow Datasets if not given. The files are read into memory.
      sentinel: as in `glue.glue_task`.

    Raises:
      DataError: as `glue.glue_task`.
    """
    return prompted.register(_SQUAD, vocabulary, data_dir, sentinel)


def _render(spec: TaskSpec, row: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(row["answers"], Mapping):  # of TFDS
        answers = tf.strings.strip(row["answers"]["text"])
    else:
        answers = tf.strings.split(row["answers"], ANSWER_SEPARATOR)
    prefix = [spec.prefix] if spec.prefix else []
    return {
        "targets": tf.strings.join([*prefix, answers[0]], separator=" "),
        "answers": tf.strings.reduce_join(answers, separator=ANSWER_SEPARATOR),
    }


def _read(path: Path) -> Examples:
    """Returns SQuAD's questions: {'question', 'context', 'answers'} each.

    The file is SQuAD's own JSON, or JSON lines with these three fields, where the answers are texts
    or {'text': [...]}.

    Raises:
      DataError: if the file is neither, or a question has no answer, as in SQuAD 2.
    """
    try:
        text = path.read_text("utf-8")
        if path.suffix == ".jsonl":
            rows = [_row(json.loads(line)) for line in text.split("\n") if line]
        else:
            rows = [
                _row({**question, "context": paragraph["context"]})
                for article in json.loads(text)["data"]
                for paragraph in article["paragraphs"]
                for question in paragraph["qas"]
            ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not SQuAD's JSON: {type(error).__name__} {error}") from error
    for number, row in enumerate(rows, start=1):
        if not row["answers"]:
            raise DataError(
                f"{path}: question {number} has no answer ({row['question']!r}); expected SQuAD "
                "v1.1, where each has one or more"
            )
    if not rows:
        raise DataError(f"{path} has no questions")
    return rows


def _row(question: Mapping[str, Any]) -> dict[str, str]:
    answers = question["answers"]
    texts = answers["text"] if isinstance(answers, Mapping) else answers
    texts = [text["text"] if isinstance(text, Mapping) else text for text in texts]
    answers = ANSWER_SEPARATOR.join(text.strip() for text in texts)
    fields = {name: question[name].strip() for name in ("question", "context")}
    return {**fields, "answers": answers}


_SQUAD = prompted.Published(
    "squad",
    "Question: {question}\nContext: {context}\nAnswer: <extra_id_0>",
    "squad/v1.1:3.0.0",
    "squad",
    {
        "train": ("train", "train-v1.1.json", "train*.json*"),
        "validation": ("validation", "dev-v1.1.json", "dev*.json*"),
    },
    _read,
    _render,
)
