"""GLUE's tasks with the paper's prompts and verbalizers: MNLI, QNLI, QQP, RTE, SST-2 and MRPC.

The prompts are the official code's, word for word (its grammar too). Validation is GLUE's dev set,
for MNLI the matched one; the test sets have no labels and are left out.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from variator_jax.data import prompted
from variator_jax.data._tf import tf
from variator_jax.data.mixture import mixture
from variator_jax.data.official_files import read_tsv, split_files
from variator_jax.data.sources import Examples
from variator_jax.data.spec import TaskSpec
from variator_jax.data.vocabulary import vocabulary_of
from variator_jax.errors import DataError, did_you_mean


@dataclasses.dataclass(frozen=True)
class GlueDataset:
    """One data set of GLUE.

    Attributes:
      tfds: its name and version in TensorFlow Datasets.
      folder: of its TSV files, as GLUE publishes them.
      template: the prompt; its fields are TFDS's.
      columns: field -> the column of the TSV file.
      label: the TSV file's column of the label.
      classes: the TSV file's labels, in TFDS's order.
      verbalizers: in the same order.
      examples: of the training set, by which `glue_mixture` mixes.
      validation: (TFDS's validation split, name of its file).
    """

    tfds: str
    folder: str
    template: str
    columns: Mapping[str, str]
    label: str
    classes: tuple[str, ...]
    verbalizers: tuple[str, ...]
    examples: int
    validation: tuple[str, str] = ("validation", "dev")


_ENTAILED = ("entailment", "not_entailment")
_SENTENCES = {"sentence1": "sentence1", "sentence2": "sentence2"}

DATASETS: dict[str, GlueDataset] = {
    "mnli": GlueDataset(
        tfds="glue/mnli:2.0.0",
        folder="MNLI",
        template="Sentence 1: {premise} Sentence 2: {hypothesis} "
        "Does sentence 1 entails sentence 2? <extra_id_0>.",
        columns={"premise": "sentence1", "hypothesis": "sentence2"},
        label="gold_label",
        classes=("entailment", "neutral", "contradiction"),
        verbalizers=("Yes", "Maybe", "No"),
        examples=392_702,
        validation=("validation_matched", "dev_matched"),
    ),
    "qnli": GlueDataset(
        tfds="glue/qnli:2.0.0",
        folder="QNLI",
        template="Question: {question}\nSentence: {sentence}\n"
        "Does the sentence contains the answer to the question? <extra_id_0>.",
        columns={"question": "question", "sentence": "sentence"},
        label="label",
        classes=_ENTAILED,
        verbalizers=("Yes", "No"),
        examples=104_743,
    ),
    "qqp": GlueDataset(
        tfds="glue/qqp:2.0.0",
        folder="QQP",
        template="Question 1: {question1}\nQuestion 2: {question2}\n"
        "Are the two questions paraphrase of each other? <extra_id_0>.",
        columns={"question1": "question1", "question2": "question2"},
        label="is_duplicate",
        classes=("0", "1"),
        verbalizers=("No", "Yes"),
        examples=363_846,
    ),
    "rte": GlueDataset(
        tfds="glue/rte:2.0.0",
        folder="RTE",
        template="Sentence 1: {sentence1}\nSentence 2: {sentence2}\n"
        "Does sentence 1 entails sentence 2? <extra_id_0>.",
        columns=_SENTENCES,
        label="label",
        classes=_ENTAILED,
        verbalizers=("Yes", "No"),
        examples=2_490,
    ),
    "sst2": GlueDataset(
        tfds="glue/sst2:2.0.0",
        folder="SST-2",
        template="Sentence: {sentence}\n"
        "Does this sentence express positive or negative emotions? <extra_id_0>.",
        columns={"sentence": "sentence"},
        label="label",
        classes=("0", "1"),
        verbalizers=("negative", "positive"),
        examples=67_349,
    ),
    "mrpc": GlueDataset(
        tfds="glue/mrpc:2.0.0",
        folder="MRPC",
        template="Sentence 1: {sentence1}\nSentence 2: {sentence2}\n"
        "Are the two sentences paraphrase of each other? <extra_id_0>.",
        columns={"sentence1": "#1 String", "sentence2": "#2 String"},
        label="Quality",
        classes=("0", "1"),
        verbalizers=("No", "Yes"),
        examples=3_668,
    ),
}


def glue_task(
    name: str,
    vocabulary: Any = None,
    data_dir: str | None = None,
    sentinel: bool = True,
    task_name: str | None = None,
) -> str:
    """Registers a task of GLUE, once, and returns its name; reads neither data nor vocabulary.

    Args:
      name: mnli, qnli, qqp, rte, sst2 or mrpc.
      vocabulary: a seqio vocabulary, or the path or URL of a SentencePiece model; that of the
        documentation corpus if not given.
      data_dir: a folder with GLUE's TSV files, or with the folders as GLUE publishes them (MNLI,
        SST-2, ...); TensorFlow Datasets if not given. The files are read into memory.
      sentinel: prompts end with '<extra_id_0>' and targets begin with it; without, for a vocabulary
        that has none, both are plain text.
      task_name: the task's name; if not given, `name`, and a hash of the arguments where they are
        not T5's vocabulary and TFDS.

    Raises:
      DataError: for an unknown name, a folder without the files, or a name taken by another task;
        when first read, for a vocabulary that lacks '<extra_id_0>' or bad files.
    """
    if name not in DATASETS:
        known = ", ".join(DATASETS)
        raise DataError(f"no GLUE task {name!r}.{did_you_mean(name, DATASETS)} Known: {known}")
    dataset, chosen = DATASETS[name], vocabulary_of(vocabulary)
    default, origin = prompted.named(name, chosen, data_dir, *([] if sentinel else ["plain"]))
    prefix = prompted.SENTINEL if sentinel else ""
    spec = TaskSpec(task_name or default, "classification", dataset.verbalizers, prefix)
    template = prompted.prompt(dataset.template, sentinel)
    if data_dir is None:
        splits = {"train": "train", "validation": dataset.validation[0]}
        source = prompted.tfds_source(dataset.tfds, splits)
        render = functools.partial(_tensors, template, [spec.target(w) for w in spec.labels])
        return prompted.register(spec, origin, chosen, source, render)
    dev = dataset.validation[1]
    names = {
        "train": ("train.tsv", "train*.tsv"),
        "validation": (f"{dev}.tsv", f"{dev}*.tsv"),
    }
    files = split_files(data_dir, dataset.folder, names)
    read = functools.partial(_examples, dataset, spec, template)
    return prompted.register(spec, origin, chosen, prompted.files_source(spec, chosen, files, read))


def glue_mixture(vocabulary: Any = None, data_dir: str | None = None, sentinel: bool = True) -> str:
    """Registers the mixture of the six, once, and returns its name; arguments as in `glue_task`.

    A task's share is that of its examples in the published training sets. The name is
    'variator_glue', with a hash where a task's name has one.
    """
    tasks = [glue_task(name, vocabulary, data_dir, sentinel) for name in DATASETS]
    further = [] if sentinel else ["plain"]
    name, _ = prompted.named("variator_glue", vocabulary_of(vocabulary), data_dir, *further)
    return mixture(tasks, [dataset.examples for dataset in DATASETS.values()], name)


def _tensors(template: str, targets: list[str], example: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "inputs": prompted.fill(template, example),
        "targets": tf.gather(tf.constant(targets), example["label"]),
    }


def _examples(dataset: GlueDataset, spec: TaskSpec, template: str, path: Path) -> Examples:
    columns = list(dataset.columns.values())
    return [
        {
            "inputs": template.format_map(
                {field: texts[column] for field, column in dataset.columns.items()}
            ),
            "targets": spec.target(spec.labels[label]),
        }
        for texts, label in read_tsv(path, columns, dataset.label, dataset.classes)
    ]
