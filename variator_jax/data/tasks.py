"""seqio sources, where their files lie, and how tasks are registered over them.

Registering reads nothing: a `LazySource` makes its examples when they are first asked for, a
`TfdsSource` asks TensorFlow Datasets then. The names of tasks that take arguments end with a hash
of them, so registering the same again is fine, and another task has another name.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from variator_jax.data import span_corruption
from variator_jax.data._tf import seqio, tf
from variator_jax.data.fitting import tokenize_fitting
from variator_jax.data.spec import TaskSpec, has_spec, register_spec
from variator_jax.errors import DataError, did_you_mean
from variator_jax.files import is_url

Examples = list[dict[str, Any]]

#: Of a task whose source gives {'inputs', 'targets'} texts; inputs may be a template's parts.
TEXT_PREPROCESSORS = (tokenize_fitting, seqio.preprocessors.append_eos_after_trim)


class LazySource(seqio.DataSource):
    """Gives the examples that `make(split)` returns: dicts with the same keys.

    Constructing it, and so registering a task, calls nothing. `make` should cache.
    """

    supports_arbitrary_sharding = False  # seqio takes every n-th example instead

    def __init__(self, make: Callable[[str], Examples], splits: Iterable[str]):
        self.make = make
        super().__init__(splits)

    def list_shards(self, split: str) -> list[str]:
        """Returns one name: the examples are not stored in parts."""
        return [split]

    def get_dataset(
        self, split: str = "train", shuffle: bool = True, seed: int | None = None, **unused: Any
    ) -> Any:
        """Returns the examples, shuffled as a whole or in their own order."""
        examples = self.make(split)
        if not examples:
            raise DataError(f"no examples in the split {split!r}")
        if shuffle:
            examples = random.Random(seed).sample(examples, len(examples))
        columns = {key: [example[key] for example in examples] for key in examples[0]}
        return tf.data.Dataset.from_tensor_slices(columns)

    def num_input_examples(self, split: str) -> int:
        """Returns the number of examples before preprocessing."""
        return len(self.make(split))


class TfdsSource(seqio.TfdsDataSource):
    """A dataset of TensorFlow Datasets whose loading errors name the way out."""

    def get_dataset(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the examples of a split; downloads and prepares them if need be.

        Raises:
          DataError: if they are not prepared and cannot be downloaded.
        """
        try:
            return super().get_dataset(*args, **kwargs)
        except Exception as error:  # anything, from refused connections to TFDS's own
            what = f"TensorFlow Datasets cannot load {self.tfds_dataset.name!r}: {error}"
            raise DataError(f"{what}. DATA_DIR takes a folder with its files instead") from error

    def num_input_examples(self, split: str) -> int | None:
        """Returns the number of rows of a split; None where TFDS has not prepared it."""
        try:
            return super().num_input_examples(split)
        except (KeyError, ValueError):  # TFDS knows no splits before the data is there
            return None


def absolute(path: str) -> str:
    """Returns the absolute path, with '~' expanded; an address such as gs:// stays as it is."""
    return path if is_url(path) else str(Path(path).expanduser().absolute())


def missing_file(what: str, path: Path) -> DataError:
    """Returns the error for a missing file or folder, with the nearest names in its folder."""
    names = [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else []
    return DataError(f"{what} {path}.{did_you_mean(path.name, names)}")


def hash_of(parts: Any) -> str:
    """Returns 8 hex digits for what a task is made from, any JSON value: the end of its name."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]


def is_registered(name: str) -> bool:
    """Returns whether this library registered the task `name`."""
    return has_spec(name) and name in seqio.TaskRegistry.names()


def text_to_text_task(
    name: str,
    make: Callable[[str], Examples],
    splits: Iterable[str],
    vocabulary: Any,
    spec: TaskSpec | None = None,
) -> str:
    """Registers a task from {'inputs', 'targets'} texts, or with a span corruption spec, 'targets'.

    Inputs may be the parts of a template (`fitting.template_parts`), whose fields are cut where the
    whole is too long. Other texts lose their end, before EOS is added.
    """
    spans = spec is not None and spec.kind == "span_corruption"
    steps = span_corruption.PREPROCESSORS if spans else TEXT_PREPROCESSORS
    return add_task(name, LazySource(make, splits), steps, vocabulary, spec)


def add_task(
    name: str,
    source: Any,
    preprocessors: Sequence[Callable[..., Any]],
    vocabulary: Any,
    spec: TaskSpec | None = None,
    shuffle_buffer_size: int = 1_000,
) -> str:
    """Registers a seqio task over a source and returns its name.

    `preprocessors` lead from the source's examples to tokens of 'inputs' and 'targets', which share
    a vocabulary. `spec` is how seqio's, T5X's and our evaluators score the task.
    `shuffle_buffer_size` examples are shuffled among each other.

    Raises:
      DataError: if another task has the name.
    """
    if name in {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}:
        raise DataError(f"another task named {name!r} is registered already; rename one")
    feature = seqio.Feature(vocabulary, add_eos=True)
    seqio.TaskRegistry.add(
        name,
        source=source,
        preprocessors=preprocessors,
        output_features={"inputs": feature, "targets": feature},
        postprocess_fn=spec.postprocess if spec else None,
        metric_fns=spec.metric_functions() if spec else [],
        shuffle_buffer_size=shuffle_buffer_size,
    )
    if spec is not None:
        register_spec(spec)
    return name


def text_files(data_dir: str) -> dict[str, list[str]]:
    """Returns the .txt and .txt.gz files of a folder, or its URL, for 'train' and 'validation'.

    Raises:
      DataError: if there are none for one of the two.
    """
    folder = absolute(data_dir).rstrip("/")
    splits: dict[str, list[str]] = {"train": [], "validation": []}
    for path in sorted(tf.io.gfile.glob([f"{folder}/*.txt", f"{folder}/*.txt.gz"])):
        name = path.rsplit("/", 1)[-1].lower()
        splits["validation" if "valid" in name or "dev" in name else "train"].append(path)
    for split, paths in splits.items():
        if not paths:
            names = "those for validation have 'valid' or 'dev' in their names"
            raise DataError(f"{folder} has no .txt or .txt.gz files for {split}; {names}")
    return splits


def read_text_lines(path: Any) -> Any:
    """Returns the `tf.data.Dataset` of {'text'} of a file, a line each, gzipped by its name."""
    compression = tf.where(tf.strings.regex_full_match(path, r".*\.gz"), "GZIP", "")
    return tf.data.TextLineDataset(path, compression).map(lambda line: {"text": line})
