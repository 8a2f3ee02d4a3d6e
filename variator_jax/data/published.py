"""The paper's data sets as seqio tasks: GLUE, SQuAD v1.1 and Wikipedia, from TFDS or from files.

A prompt ends with '<extra_id_0>', and the target begins with it: '<extra_id_0> Yes'. That is the
form in which a T5 saw text while it was pre-trained. The prompts are the official code's, word for
word (its grammar too). Validation is the published dev set, for MNLI the matched one; the test sets
have no labels and are left out.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import logging

from variator_jax.data import rows, span_corruption, tasks
from variator_jax.data import vocabulary as vocabularies
from variator_jax.data._tf import seqio, tf
from variator_jax.data.batches import mixture
from variator_jax.data.fitting import template_parts
from variator_jax.data.spec import ANSWER_SEPARATOR, Kind, TaskSpec, verbalizer_ids
from variator_jax.errors import DataError, check_known

SENTINEL = "<extra_id_0>"
WIKIPEDIA = "wikipedia/20230601.en:1.0.0"
WIKIPEDIA_SPLITS = {"train": "train[:99%]", "validation": "train[99%:]"}

_BAD_ROWS = 1_000  # one row in so many may be broken, as some of the published files' are
_PASSAGE_WORDS = 128
_SHORTEST_PASSAGE = 16  # words: the end of an article, or a stub
_PASSAGES_SHUFFLED = 2_000  # those of an article follow each other in the file


@dataclasses.dataclass(frozen=True)
class Published:
    """A data set as it is published, and its prompt.

    Attributes:
      folder: of its files, as published.
      template: the prompt without its sentinel; its fields are TFDS's.
      words: the TSV file's labels, in TFDS's order, and the verbalizer of each; none for
        generation with many answers.
      columns: field, or 'label' -> the TSV file's column, where the names differ.
      size: examples of the published training set.
      dev: the part of the validation file's name that its suffix follows.
      suffix: of the files, as published.
    """

    folder: str
    template: str
    words: Mapping[str, str] = dataclasses.field(default_factory=dict)
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    size: int = 0
    dev: str = "dev"
    suffix: str = ".tsv"


_ENTAILED = {"entailment": "Yes", "not_entailment": "No"}
_SAME = {"0": "No", "1": "Yes"}
_PAIR = "Sentence 1: {sentence1}\nSentence 2: {sentence2}\n"

GLUE = {
    "mnli": Published(
        "MNLI",
        "Sentence 1: {premise} Sentence 2: {hypothesis} Does sentence 1 entails sentence 2?",
        {"entailment": "Yes", "neutral": "Maybe", "contradiction": "No"},
        {"premise": "sentence1", "hypothesis": "sentence2", "label": "gold_label"},
        size=392_702,
        dev="dev_matched",
    ),
    "qnli": Published(
        "QNLI",
        "Question: {question}\nSentence: {sentence}\n"
        "Does the sentence contains the answer to the question?",
        _ENTAILED,
        size=104_743,
    ),
    "qqp": Published(
        "QQP",
        "Question 1: {question1}\nQuestion 2: {question2}\n"
        "Are the two questions paraphrase of each other?",
        _SAME,
        {"label": "is_duplicate"},
        size=363_846,
    ),
    "rte": Published("RTE", f"{_PAIR}Does sentence 1 entails sentence 2?", _ENTAILED, size=2_490),
    "sst2": Published(
        "SST-2",
        "Sentence: {sentence}\nDoes this sentence express positive or negative emotions?",
        {"0": "negative", "1": "positive"},
        size=67_349,
    ),
    "mrpc": Published(
        "MRPC",
        f"{_PAIR}Are the two sentences paraphrase of each other?",
        _SAME,
        {"label": "Quality", "sentence1": "#1 String", "sentence2": "#2 String"},
        size=3_668,
    ),
}
SQUAD = Published("squad", "Question: {question}\nContext: {context}\nAnswer:", suffix="-v1.1.json")


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
    check_known("no GLUE task", name, GLUE, DataError)
    return _register(name, f"glue/{name}:2.0.0", GLUE[name], vocabulary, data_dir, sentinel)


def glue_mixture(vocabulary: Any = None, data_dir: str | None = None, sentinel: bool = True) -> str:
    """Registers the mixture of the six, once, and returns its name; arguments as in `glue_task`.

    A task's share is that of its examples in the published training sets. The name is
    'variator_glue', with a hash where a task's name has one.
    """
    names = [glue_task(name, vocabulary, data_dir, sentinel) for name in GLUE]
    sizes = [dataset.size for dataset in GLUE.values()]
    return mixture(names, sizes, _named("variator_glue", vocabulary, data_dir, sentinel))


def squad_task(vocabulary: Any = None, data_dir: str | None = None, sentinel: bool = True) -> str:
    """Registers SQuAD v1.1, once, and returns the task's name; reads neither data nor vocabulary.

    The target is the first answer, the only one in the training set. All accepted answers are in
    the field 'answers', which the metrics read: exact match and token F1 of the best.

    Args:
      vocabulary: as in `glue_task`.
      data_dir: a folder with train-v1.1.json and dev-v1.1.json, or one above its folder 'squad';
        TensorFlow Datasets if not given. The files are read into memory.
      sentinel: as in `glue_task`.

    Raises:
      DataError: as `glue_task`.
    """
    return _register("squad", "squad/v1.1:3.0.0", SQUAD, vocabulary, data_dir, sentinel)


def wikipedia_task(vocabulary: Any = None, data_dir: str | None = None) -> str:
    """Registers `wikipedia_span_corruption`, once, and returns its name; reads no data.

    An example is one passage of about 128 words, never two that were joined, and ends in padding
    where it is shorter than the inputs; one that is longer becomes several of equal length. So
    plugins meet padding already in pre-training. `file_task` has the other way, running text
    without gaps, over one file.

    Args:
      vocabulary: as in `glue_task`.
      data_dir: a folder, or its URL, with .txt or .txt.gz files of one text a line; those with
        'valid' or 'dev' in their names are for validation. They are streamed, however large.
        TensorFlow Datasets' English Wikipedia if not given, of which a hundredth is held out.

    Raises:
      DataError: if the folder lacks files for training or validation.
    """
    vocabulary = vocabularies.load_vocabulary(vocabulary)
    name = _named("wikipedia_span_corruption", vocabulary, data_dir)
    if tasks.is_registered(name):
        return name
    source: Any = tasks.TfdsSource(WIKIPEDIA, splits=WIKIPEDIA_SPLITS)
    if data_dir is not None:
        source = seqio.FileDataSource(tasks.read_text_lines, tasks.text_files(data_dir))
    steps = [_cut_passages, _tokenize_passages, *span_corruption.PREPROCESSORS[1:]]
    spec = TaskSpec(name, "span_corruption")
    return tasks.add_task(name, source, steps, vocabulary, spec, _PASSAGES_SHUFFLED)


def _cut_passages(dataset: Any) -> Any:
    """Cuts {'text'} of articles into {'targets'} of 128 words; drops ends of less than 16."""

    def cut(example: Mapping[str, Any]) -> Any:
        words = tf.strings.split(example["text"])
        starts = tf.data.Dataset.range(0, tf.size(words, out_type=tf.int64), _PASSAGE_WORDS)
        pieces = starts.map(lambda start: words[start : start + _PASSAGE_WORDS])
        pieces = pieces.filter(lambda piece: tf.size(piece) >= _SHORTEST_PASSAGE)
        return pieces.map(lambda piece: {"targets": tf.strings.reduce_join(piece, separator=" ")})

    return dataset.flat_map(cut)


def _tokenize_passages(
    dataset: Any, sequence_length: Mapping[str, int] | None, output_features: Mapping[str, Any]
) -> Any:
    """Tokenizes {'targets'} to [1, tokens]; parts of equal size where one row does not fit."""
    dataset, chunk = span_corruption.tokenize(dataset, sequence_length, output_features)

    def split(tokens: Any) -> Any:
        size = tf.size(tokens, out_type=tf.int64)
        count = (size + chunk - 1) // chunk
        parts = tf.data.Dataset.range(count)
        return parts.map(lambda i: tokens[tf.newaxis, i * size // count : (i + 1) * size // count])

    return span_corruption.without_stubs(dataset.flat_map(split))


def _register(
    name: str, tfds: str, dataset: Published, vocabulary: Any, data_dir: str | None, sentinel: bool
) -> str:
    """Registers the task of a published data set, once, and returns its name; reads no data."""
    vocabulary = vocabularies.load_vocabulary(vocabulary)
    name = _named(name, vocabulary, data_dir, sentinel)
    if tasks.is_registered(name):
        return name
    template, prefix = dataset.template, SENTINEL if sentinel else ""
    if sentinel:
        template += f" {SENTINEL}{'.' if dataset.words else ''}"
    kind: Kind = "classification" if dataset.words else "generation"
    labels = tuple(dataset.words.values())
    spec = TaskSpec(name, kind, labels, prefix, many_answers=not labels)

    def rendered(examples: Any, output_features: Mapping[str, Any]) -> Any:
        vocabulary = output_features["targets"].vocabulary
        verbalizer_ids(spec, vocabulary.encode, vocabulary.unk_id)  # refuses one that lacks tokens

        def render(row: Mapping[str, Any]) -> dict[str, Any]:
            fields = {name: tf.strings.strip(row[name]) for name in rows.template_fields(template)}
            return {"inputs": tf.stack(template_parts(template, fields)), **_targets(spec, row)}

        return examples.map(render, num_parallel_calls=tf.data.AUTOTUNE)

    steps = [rendered, *tasks.TEXT_PREPROCESSORS]
    return tasks.add_task(name, _source(tfds, dataset, data_dir), steps, vocabulary, spec)


def _named(name: str, vocabulary: Any, data_dir: str | None, sentinel: bool = True) -> str:
    """Returns a task's name; reads nothing.

    It is the data set's where T5's own vocabulary, TFDS and the sentinel are used; else it ends
    with a hash of the arguments, the same in every process of this machine.
    """
    tokens = vocabularies.identity(vocabularies.load_vocabulary(vocabulary))
    if tokens == "t5" and data_dir is None and sentinel:
        return name
    folder = data_dir and tasks.absolute(data_dir)
    return f"{name}_{tasks.hash_of([name, tokens, folder, sentinel])}"


def _source(tfds: str, dataset: Published, data_dir: str | None) -> Any:
    """Returns the seqio source of a data set: TFDS, or the files of a folder.

    Where a folder has no file of the published name, the only one that begins alike is taken: part
    of the data, such as train_subset.tsv.

    Raises:
      DataError: for a folder that is not there or not local, or that has no such file.
    """
    if data_dir is None:
        validation = dataset.dev.replace("dev", "validation")
        return tasks.TfdsSource(tfds, splits={"train": "train", "validation": validation})
    root = Path(tasks.absolute(data_dir))
    if not root.is_dir():
        raise tasks.missing_file(f"DATA_DIR {data_dir}: there is no local folder", root)
    folder = root / dataset.folder if (root / dataset.folder).is_dir() else root
    files, kind = {}, dataset.suffix.rsplit(".", 1)[1]
    for split, stem in (("train", "train"), ("validation", dataset.dev)):
        published = folder / f"{stem}{dataset.suffix}"
        fitting = [published] if published.is_file() else list(folder.glob(f"{stem}*.{kind}*"))
        if len(fitting) > 1:
            names = ", ".join(sorted(file.name for file in fitting))
            several = f"but several that may be it: {names}"
            raise DataError(f"{folder} has no {published.name}, {several}")
        if fitting:
            files[split] = fitting[0]
            if fitting[0] != published:
                logging.warning("%s is missing; %s is read in its place", published, fitting[0])
    if not files:
        names = f"train{dataset.suffix}, {dataset.dev}{dataset.suffix}"
        raise DataError(f"{folder} has none of the files {names} of {dataset.folder}")
    read = functools.partial(_read_tsv, dataset) if dataset.words else _read_squad
    return tasks.LazySource(functools.cache(lambda split: read(files[split])), files)


def _targets(spec: TaskSpec, row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns 'targets' of a row's tensors, and 'answers' where there may be many."""
    if spec.labels:
        return {"targets": tf.gather([spec.target(label) for label in spec.labels], row["label"])}
    answers = row["answers"]  # of TFDS a list of texts, of a file the texts joined
    if isinstance(answers, Mapping):
        answers = tf.strings.strip(answers["text"])
    else:
        answers = tf.strings.split(answers, ANSWER_SEPARATOR)
    return {
        "targets": tf.strings.join([spec.target(""), answers[0]]),
        "answers": tf.strings.reduce_join(answers, separator=ANSWER_SEPARATOR),
    }


def _read_tsv(dataset: Published, path: Path) -> tasks.Examples:
    """Returns the rows of a TSV file with TFDS's fields.

    One broken row in a thousand is left out with a warning: some of the published files have such,
    and TFDS leaves them out too.

    Raises:
      DataError: if the file cannot be read, lacks a column, or has more broken rows.
    """
    fields = rows.template_fields(dataset.template)
    classes = {label: number for number, label in enumerate(dataset.words)}

    def convert(row: rows.Fields) -> dict[str, Any]:
        read = {x: rows.field_of(row, dataset.columns.get(x, x)) for x in [*fields, "label"]}
        return {**read, "label": rows.one_of(read["label"].strip(), classes)}

    examples, bad = rows.read_rows(path, convert)
    tolerated = (len(examples) + len(bad)) // _BAD_ROWS
    rows.refuse_bad_rows(bad, len(examples), tolerated, path)
    return examples


def _read_squad(path: Path) -> tasks.Examples:
    """Returns SQuAD's questions: {'question', 'context', 'answers'} each.

    The file is SQuAD's own JSON, or JSON lines with these three fields, where the answers are texts
    or {'text': [...]}.

    Raises:
      DataError: if the file is neither, or a question has no answer, as in SQuAD 2.
    """
    try:
        text = path.read_text("utf-8")
        if path.suffix == ".jsonl":
            asked = [json.loads(line) for line in text.split("\n") if line]
        else:
            paragraphs = [p for article in json.loads(text)["data"] for p in article["paragraphs"]]
            asked = [{**qa, "context": p["context"]} for p in paragraphs for qa in p["qas"]]
        questions = [_question(fields) for fields in asked]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not SQuAD's JSON: {type(error).__name__} {error}") from error
    if not questions or not all(question["answers"] for question in questions):
        raise DataError(f"{path}: expected questions with an answer each, as in SQuAD v1.1")
    return questions


def _question(fields: Mapping[str, Any]) -> dict[str, str]:
    answers = fields["answers"]
    texts = answers["text"] if isinstance(answers, Mapping) else answers
    texts = [text["text"] if isinstance(text, Mapping) else text for text in texts]
    stripped = {name: fields[name].strip() for name in ("question", "context")}
    return {**stripped, "answers": ANSWER_SEPARATOR.join(text.strip() for text in texts)}
