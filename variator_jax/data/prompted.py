"""How published data sets become seqio tasks: prompts with a sentinel, from TFDS or from files.

A prompt ends with '<extra_id_0>', and the target begins with it: '<extra_id_0> Yes'. That is the
form in which a T5 saw text while it was pre-trained.
"""

from __future__ import annotations

import dataclasses
import functools
import string
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from absl import logging

from variator_jax.data import tasks
from variator_jax.data import vocabulary as vocabularies
from variator_jax.data._tf import tf
from variator_jax.data.rows import is_url, missing_file
from variator_jax.data.spec import Kind, TaskSpec, prefix_ids, verbalizer_ids
from variator_jax.errors import DataError

SENTINEL = "<extra_id_0>"


@dataclasses.dataclass(frozen=True)
class Published:
    """A data set as it is published, and its prompt.

    Attributes:
      name: of the task where T5's vocabulary and TFDS are used.
      template: the prompt; its fields are TFDS's.
      tfds: name and version in TensorFlow Datasets.
      folder: of its files, as published.
      splits: our split -> (TFDS's split, the file's name as published, a pattern for the file).
      read: returns a file's rows with TFDS's fields, 'answers' joined by `ANSWER_SEPARATOR`.
      render: returns 'targets' (and 'answers') of a row's tensors.
      labels: the verbalizers of a classification; none for generation with many answers.
    """

    name: str
    template: str
    tfds: str
    folder: str
    splits: Mapping[str, tuple[str, str, str]]
    read: Callable[[Path], tasks.Examples]
    render: Callable[[TaskSpec, Mapping[str, Any]], dict[str, Any]]
    labels: tuple[str, ...] = ()


def register(dataset: Published, vocabulary: Any, data_dir: str | None, sentinel: bool) -> str:
    """Registers the task of a published data set, once, and returns its name; reads no data.

    The arguments are those of `glue.glue_task`.
    """
    vocabulary = vocabularies.vocabulary_of(vocabulary)
    name = named(dataset.name, vocabulary, data_dir, sentinel)
    prefix = SENTINEL if sentinel else ""
    kind: Kind = "classification" if dataset.labels else "generation"
    spec = TaskSpec(name, kind, dataset.labels, prefix, many_answers=kind == "generation")
    if data_dir is None:
        tfds_splits = {split: names[0] for split, names in dataset.splits.items()}
        source: Any = tasks.TfdsSource(dataset.tfds, splits=tfds_splits)
    else:
        files = _split_files(dataset, local_folder(data_dir))
        source = tasks.LazySource(functools.cache(lambda split: dataset.read(files[split])), files)
    if tasks.is_registered(name):
        return name
    template = dataset.template
    if not sentinel:
        template = template.removesuffix(".").removesuffix(f" {SENTINEL}")

    def rendered(examples: Any, output_features: Mapping[str, Any]) -> Any:
        _check_tokens(spec, output_features["targets"].vocabulary)
        return examples.map(
            lambda row: {"inputs": _fill(template, row), **dataset.render(spec, row)},
            num_parallel_calls=tf.data.AUTOTUNE,
        )

    steps = [rendered, *tasks.text_preprocessors()]
    return tasks.add_task(name, source, steps, vocabulary, spec)


def named(dataset: str, vocabulary: Any, data_dir: str | None, sentinel: bool = True) -> str:
    """Returns a task's name; reads nothing.

    It is the data set's where T5's own vocabulary, TFDS and the sentinel are used; else it ends
    with a hash of the arguments, the same in every process of this machine.
    """
    tokens = vocabularies.identity(vocabulary)
    if tokens == "t5" and data_dir is None and sentinel:
        return dataset
    folder = data_dir if data_dir is None or is_url(data_dir) else str(local_folder(data_dir))
    return f"{dataset}_{tasks.hash_of([dataset, tokens, folder, sentinel])}"


def local_folder(data_dir: str) -> Path:
    """Returns an existing local folder as an absolute path; DataError for anything else."""
    if is_url(data_dir):
        raise DataError(
            f"DATA_DIR is {data_dir}; these files are read from a local folder. Copy them, or read "
            "from TensorFlow Datasets (DATA_DIR = None)."
        )
    root = Path(data_dir).expanduser().absolute()
    if not root.is_dir():
        raise missing_file("there is no folder", root)
    return root


def _split_files(dataset: Published, root: Path) -> dict[str, Path]:
    """Returns the file of each split that a folder, or the data set's folder in it, has.

    Where there is no file of the published name, the only one that fits the pattern is taken: part
    of the data, such as train_subset.tsv.

    Raises:
      DataError: if all files are missing, or several files fit.
    """
    folder = root / dataset.folder if (root / dataset.folder).is_dir() else root
    files = {}
    for split, (_, name, pattern) in dataset.splits.items():
        fitting = [folder / name] if (folder / name).is_file() else sorted(folder.glob(pattern))
        if len(fitting) > 1:
            listed = ", ".join(path.name for path in fitting)
            raise DataError(f"{folder} has no {name}, and several files fit: {listed}; rename one")
        for path in fitting:
            files[split] = path
            if path.name != name:
                logging.warning("%s has no %s; %s is read in its place", folder, name, path.name)
    if not files:
        expected = ", ".join(name for _, name, _ in dataset.splits.values())
        raise DataError(f"{folder} has none of the files {expected} of {dataset.folder}")
    return files


def _check_tokens(spec: TaskSpec, vocabulary: Any) -> None:
    """Refuses a vocabulary that lacks the prefix or cannot tell the verbalizers apart."""
    check = verbalizer_ids if spec.labels else prefix_ids
    check(spec, vocabulary.encode, vocabulary.unk_id)


def _fill(template: str, fields: Mapping[str, Any]) -> Any:
    """Returns a template with string tensors, stripped of outer spaces, in place of its fields."""
    parts: list[Any] = []
    for literal, field, _, _ in string.Formatter().parse(template):
        parts += [literal] if field is None else [literal, tf.strings.strip(fields[field])]
    return tf.strings.join(parts)
