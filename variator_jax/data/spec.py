"""How a task is scored: the registry that evaluation reads next to seqio's own, and the scores.

A seqio task defines how examples are made; a `TaskSpec` defines what a right answer is, and from it
come the postprocessor and the metrics with which seqio's and T5X's evaluators score decoded text.
Nothing here imports TensorFlow or seqio, so that evaluation can name tasks without them.

Scores lie between 0 and 100. Text is compared as the SQuAD evaluation does it (Rajpurkar et al.,
2016): lower case, no punctuation, no articles, single spaces, and the best score over all accepted
answers.
"""

import dataclasses
import re
import string
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

from variator_jax.errors import DataError, did_you_mean

_PAD, _EOS = 0, 1
_SENTINEL = re.compile(r"<extra_id_\d+>")

#: Separator between the accepted answers of one example in the field 'answers'.
ANSWER_SEPARATOR = "\x1f"

Kind = Literal["classification", "generation", "span_corruption"]
Scores = dict[str, float]

# One example's accepted answers: a single text, or several of which the best counts.
Answers = str | Sequence[str]
Encode = Callable[[str], Sequence[int]]  # from a text to its token ids

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclasses.dataclass(frozen=True)
class TaskSpec:
    """How the task `name` is scored.

    Attributes:
      name: the name of the seqio task.
      kind: 'classification' (verbalizer scores at the first target position after the prefix),
        'generation' (token F1 of the decoded text) or 'span_corruption' (loss only).
      labels: the verbalizers in label order; only for classification.
      prefix: one token that begins every target and does not belong to the answer, such as
        '<extra_id_0>'.
      note: how the labels of the files are read, for people.
      many_answers: whether each example has all its accepted answers, joined by
        `ANSWER_SEPARATOR`, in the field 'answers'; only for generation.

    Raises:
      DataError: if the kind is unknown, or the other fields do not suit it.
    """

    name: str
    kind: Kind
    labels: tuple[str, ...] = ()
    prefix: str = ""
    many_answers: bool = False
    note: str = ""

    def __post_init__(self) -> None:
        distinct, kinds = set(self.labels), get_args(Kind)
        several = len(distinct) > 1 and len(distinct) == len(self.labels)
        fits = {
            "kind": self.kind in kinds,
            "labels": several if self.kind == "classification" else not self.labels,
            "prefix": not self.prefix or self.kind != "span_corruption",
            "many_answers": not self.many_answers or self.kind == "generation",
        }
        for field in [field for field, right in fits.items() if not right]:
            nearest = did_you_mean(str(self.kind), kinds) if field == "kind" else ""
            what = f"task {self.name!r} ({self.kind}) cannot have {field}"
            raise DataError(f"{what} {getattr(self, field)!r}.{nearest}")

    def target(self, answer: str) -> str:
        """Returns the target text whose answer is `answer`."""
        return f"{self.prefix} {answer}" if self.prefix else answer

    def answer(self, text: str) -> str:
        """Returns the answer in a target or a decoded text.

        With a prefix it ends before the next sentinel: a T5 closes what it filled in for
        '<extra_id_0>' with '<extra_id_1>'.
        """
        text = text.strip()
        if self.prefix:
            text = _SENTINEL.split(text.removeprefix(self.prefix), maxsplit=1)[0]
        return text.strip()

    def postprocess(
        self, text: str, example: Mapping[str, Any] | None = None, is_target: bool = False
    ) -> str | list[str]:
        """seqio's `postprocess_fn`: the answer in a text; of a target with many answers, all."""
        if is_target and self.many_answers and example is not None:
            return split_answers(example["answers"])
        return self.answer(text)

    def metric_functions(self) -> list[Callable[..., Scores]]:
        """Returns seqio's `metric_fns` for predicted text, none for span corruption.

        Classification: accuracy, and with two labels the F1 of the second, by comparison with the
        verbalizer. Generation: exact match and token F1, over all accepted answers.
        """
        return [] if self.kind == "span_corruption" else [self._scores]

    def _scores(self, targets: Sequence[Any], predictions: Sequence[str]) -> Scores:
        if self.kind == "generation":
            metrics = {"exact_match": exact_match, "token_f1": token_f1}
            return {name: metric(predictions, targets) for name, metric in metrics.items()}
        scores = {"accuracy": accuracy(predictions, targets)}
        if len(self.labels) == 2:
            scores["binary_f1"] = binary_f1(predictions, targets, self.labels[1])
        return scores


_SPECS: dict[str, TaskSpec] = {}


def register_spec(spec: TaskSpec) -> TaskSpec:
    """Registers and returns `spec`; the same again is fine.

    Raises:
      DataError: if another spec already has this name.
    """
    known = _SPECS.setdefault(spec.name, spec)
    if known != spec:
        raise DataError(f"task {spec.name!r} is already registered as {known}, not as {spec}")
    return spec


def get_spec(name: str) -> TaskSpec:
    """Returns the spec of the task `name`.

    Raises:
      DataError: if there is none; the message gives the nearest names.
    """
    if name not in _SPECS:
        raise DataError(f"no task spec named {name!r}.{did_you_mean(name, _SPECS)}")
    return _SPECS[name]


def has_spec(name: str) -> bool:
    """Returns whether a spec of this name is registered."""
    return name in _SPECS


def prefix_ids(spec: TaskSpec, encode: Encode, unknown_id: int | None = None) -> list[int]:
    """Returns the tokens that begin every target of a task: one for a prefix, else none.

    Args:
      spec: the task.
      encode: from a text to its token ids.
      unknown_id: the id of what the vocabulary cannot spell.

    Raises:
      DataError: if the vocabulary does not have the prefix as one token.
    """
    ids = [int(token) for token in encode(spec.prefix)] if spec.prefix else []
    if spec.prefix and (len(ids) != 1 or ids[0] in (_PAD, _EOS, unknown_id)):
        what = f"task {spec.name!r} needs {spec.prefix} as one token of the vocabulary"
        raise DataError(f"{what}; give it extra ids, or set TASK_SENTINEL = False")
    return ids


def verbalizer_ids(spec: TaskSpec, encode: Encode, unknown_id: int | None = None) -> list[int]:
    """Returns the first token id of each verbalizer after the prefix, in label order.

    A verbalizer may have several tokens: it is known, and scored, by the first.

    Args:
      spec: a classification task.
      encode: from a text to its token ids.
      unknown_id: the id of what the vocabulary cannot spell.

    Raises:
      DataError: if a verbalizer encodes to nothing or to the unknown, or two of them begin with the
        same token, which one target position cannot distinguish; or as `prefix_ids`.
    """
    prefix = prefix_ids(spec, encode, unknown_id)
    owners: dict[int, str] = {}
    for label in spec.labels:
        first = next(map(int, encode(spec.target(label))[len(prefix) :]), _PAD)
        if first in (_PAD, _EOS, unknown_id):
            raise DataError(f"task {spec.name!r}: the vocabulary cannot spell the label {label!r}")
        if first in owners:
            both = f"{owners[first]!r} and {label!r} both begin with token {first}"
            raise DataError(f"task {spec.name!r}: {both} in this vocabulary; choose other words")
        owners[first] = label
    return list(owners)


def split_answers(joined: Any) -> list[str]:
    """Returns the accepted answers in the field 'answers' of an example, bytes or text."""
    value = np.asarray(joined).item()
    return str(value.decode() if isinstance(value, bytes) else value).split(ANSWER_SEPARATOR)


def accuracy(predictions: Sequence[Hashable], references: Sequence[Hashable]) -> float:
    """Share of predictions that equal their reference; DataError for empty or unequal lengths."""
    return 100.0 * sum(p == r for p, r in _pairs(predictions, references)) / len(references)


def binary_f1(
    predictions: Sequence[Hashable], references: Sequence[Hashable], positive: Hashable = 1
) -> float:
    """F1 of the class `positive`; 0 where the class is neither predicted nor present."""
    pairs = _pairs(predictions, references)
    hits = sum(p == positive and r == positive for p, r in pairs)
    mentions = sum((p == positive) + (r == positive) for p, r in pairs)
    return 100.0 * 2 * hits / mentions if mentions else 0.0


def majority_score(references: Sequence[Hashable]) -> float:
    """The accuracy of always answering the majority class."""
    pairs = _pairs(references, references)
    return 100.0 * max(Counter(pairs).values()) / len(pairs)


def exact_match(predictions: Sequence[str], references: Sequence[Answers]) -> float:
    """Share of predictions that equal one of their answers after normalisation."""
    return _mean_of_best(
        lambda p, a: normalise_answer(p) == normalise_answer(a), predictions, references
    )


def token_f1(predictions: Sequence[str], references: Sequence[Answers]) -> float:
    """Mean over examples of the best F1 between the words of prediction and answer."""
    return _mean_of_best(_word_overlap_f1, predictions, references)


def normalise_answer(text: str) -> str:
    """Lower-cases `text` and drops punctuation, the articles a, an, the, and extra spaces."""
    bare = text.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def _word_overlap_f1(prediction: str, answer: str) -> float:
    """F1 of two bags of words, 0 to 1; two texts without any word agree."""
    predicted, expected = normalise_answer(prediction).split(), normalise_answer(answer).split()
    if not predicted or not expected:
        return float(predicted == expected)
    common = sum((Counter(predicted) & Counter(expected)).values())
    return 2.0 * common / (len(predicted) + len(expected))


def _mean_of_best(
    similarity: Callable[[str, str], float],
    predictions: Sequence[str],
    references: Sequence[Answers],
) -> float:
    total = 0.0
    for prediction, answers in _pairs(predictions, references):
        accepted = [answers] if isinstance(answers, str) else answers
        total += max(similarity(prediction, answer) for answer in accepted)
    return 100.0 * total / len(references)


def _pairs(predictions: Sequence[Any], references: Sequence[Any]) -> list[tuple[Any, Any]]:
    if len(predictions) != len(references) or not len(references):
        raise DataError(f"{len(predictions)} predictions for {len(references)} references")
    return list(zip(predictions, references, strict=True))
