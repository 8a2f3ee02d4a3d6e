"""SQuAD v1.1 with the paper's prompt: a short answer is generated from a paragraph."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from variator_jax.data import prompted
from variator_jax.data._tf import tf
from variator_jax.data.official_files import read_squad, split_files
from variator_jax.data.sources import Examples
from variator_jax.data.spec import ANSWER_SEPARATOR, TaskSpec
from variator_jax.data.vocabulary import vocabulary_of

TFDS = "squad/v1.1:3.0.0"
TEMPLATE = "Question: {question}\nContext: {context}\nAnswer: <extra_id_0>"
_FILES = {
    "train": ("train-v1.1.json", "train*.json*"),
    "validation": ("dev-v1.1.json", "dev*.json*"),
}


def squad_task(
    vocabulary: Any = None,
    data_dir: str | None = None,
    sentinel: bool = True,
    task_name: str | None = None,
) -> str:
    """Registers SQuAD v1.1, once, and returns the task's name; reads neither data nor vocabulary.

    The target is the first answer, the only one in the training set. All accepted answers are in
    the field 'answers', which the metrics read: exact match and token F1 of the best.

    Args:
      vocabulary: as in `glue.glue_task`.
      data_dir: a folder with train-v1.1.json and dev-v1.1.json, or one above its folder 'squad';
        TensorFlow Datasets if not given. The files are read into memory.
      sentinel: as in `glue.glue_task`.
      task_name: the task's name; if not given, as in `glue.glue_task`.

    Raises:
      DataError: as `glue.glue_task`.
    """
    chosen = vocabulary_of(vocabulary)
    default, origin = prompted.named("squad", chosen, data_dir, *([] if sentinel else ["plain"]))
    prefix = prompted.SENTINEL if sentinel else ""
    spec = TaskSpec(task_name or default, "generation", prefix=prefix, many_answers=True)
    template = prompted.prompt(TEMPLATE, sentinel)
    if data_dir is None:
        source = prompted.tfds_source(TFDS, prompted.names_of(_FILES))
        render = functools.partial(_tensors, template, prefix)
        return prompted.register(spec, origin, chosen, source, render)
    files = split_files(data_dir, "squad", _FILES)
    read = functools.partial(_examples, spec, template)
    return prompted.register(spec, origin, chosen, prompted.files_source(spec, chosen, files, read))


def _tensors(template: str, prefix: str, example: Mapping[str, Any]) -> dict[str, Any]:
    answers = tf.strings.strip(example["answers"]["text"])
    target = answers[0]
    return {
        "inputs": prompted.fill(template, example),
        "targets": tf.strings.join([prefix, target], separator=" ") if prefix else target,
        "answers": tf.strings.reduce_join(answers, separator=ANSWER_SEPARATOR),
    }


def _examples(spec: TaskSpec, template: str, path: Path) -> Examples:
    return [
        {
            "inputs": template.format_map(question),
            "targets": spec.target(question["answers"][0]),
            "answers": ANSWER_SEPARATOR.join(question["answers"]),
        }
        for question in read_squad(path)
    ]
