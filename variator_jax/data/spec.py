"""How a task is scored: the registry that evaluation reads next to seqio's own.

A seqio task defines how examples are made; a `TaskSpec` defines what a right answer is, and from it
come the postprocessor and the metrics with which seqio's and T5X's evaluators score decoded text.
Nothing here imports TensorFlow or seqio, so that evaluation can name tasks without them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

from variator_jax.data import metrics
from variator_jax.errors import DataError, did_you_mean

_PAD, _EOS = 0, 1
_SENTINEL = re.compile(r"<extra_id_\d+>")

#: Separator between the accepted answers of one example in the field 'answers'.
ANSWER_SEPARATOR = "\x1f"

Kind = Literal["classification", "generation", "span_corruption"]
Scores = dict[str, float]


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

    def __post_init__(self) -> None:
        kinds, labelled = get_args(Kind), self.kind == "classification"
        checks = {
            f"has the kind {self.kind!r}; the kinds are {', '.join(kinds)}."
            f"{did_you_mean(str(self.kind), kinds)}": self.kind not in kinds,
            f"needs two labels or more, found {self.labels!r}": labelled
            and len(set(self.labels)) < 2,
            f"has a label twice: {self.labels!r}": len(set(self.labels)) < len(self.labels),
            f"is {self.kind}, so it takes no labels": not labelled and bool(self.labels),
            "is span corruption, so it takes no prefix": self.kind == "span_corruption"
            and bool(self.prefix),
            f"is {self.kind}, so it has one answer an example": self.kind != "generation"
            and self.many_answers,
        }
        for message, wrong in checks.items():
            if wrong:
                raise DataError(f"task {self.name!r} {message}")

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
        known = ", ".join(sorted(_SPECS)) or "none"
        raise DataError(f"no task spec named {name!r}.{did_you_mean(name, _SPECS)} Known: {known}")
    return _SPECS[name]


def spec_names() -> tuple[str, ...]:
    """Returns the names of all registered specs, sorted."""
    return tuple(sorted(_SPECS))


def prefix_ids(
    spec: TaskSpec, encode: Callable[[str], Sequence[int]], unknown_id: int | None = None
) -> list[int]:
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
        raise DataError(
            f"task {spec.name!r} needs {spec.prefix} as one token, and the vocabulary has no such "
            "token; give it extra ids, or leave the sentinel out (TASK_SENTINEL = False)"
        )
    return ids


def verbalizer_ids(
    spec: TaskSpec, encode: Callable[[str], Sequence[int]], unknown_id: int | None = None
) -> list[int]:
    """Returns the first token id of each verbalizer after the prefix, in label order.

    A verbalizer may have several tokens: it is known, and scored, by the first.

    Args:
      spec: a classification task.
      encode: from a text to its token ids.
      unknown_id: the id of what the vocabulary cannot spell.

    Raises:
      DataError: if a verbalizer encodes to nothing or to the unknown, or two of them begin with the
        same token, for then one target position cannot tell them apart; or as `prefix_ids`.
    """
    if not spec.labels:
        raise DataError(f"task {spec.name!r} is {spec.kind}, so it has no verbalizers")
    prefix = prefix_ids(spec, encode, unknown_id)
    owners: dict[int, str] = {}
    for label in spec.labels:
        first = next((int(token) for token in encode(spec.target(label))[len(prefix) :]), _PAD)
        reason = {
            _PAD: f"the verbalizer {label!r} encodes to no token",
            _EOS: f"the verbalizer {label!r} encodes to no token",
            unknown_id: f"the vocabulary cannot spell the verbalizer {label!r}",
        }.get(first)
        if first in owners:
            reason = (
                f"the verbalizers {owners[first]!r} and {label!r} both begin with token {first} in "
                "this vocabulary; choose words that differ there"
            )
        if reason:
            raise DataError(f"task {spec.name!r}: {reason}")
        owners[first] = label
    return list(owners)


def postprocessor(spec: TaskSpec) -> Callable[..., Any]:
    """Returns seqio's `postprocess_fn`: the answer in a target or a prediction.

    For a task with many answers a target becomes the list of them all.
    """

    def postprocess(
        text: str, example: Mapping[str, Any] | None = None, is_target: bool = False
    ) -> str | list[str]:
        if is_target and spec.many_answers and example is not None:
            return split_answers(example["answers"])
        return spec.answer(text)

    return postprocess


def metric_functions(spec: TaskSpec) -> list[Callable[..., Scores]]:
    """Returns seqio's `metric_fns` for predicted text, none for span corruption.

    Classification: accuracy, and with two labels the F1 of the second, by comparison with the
    verbalizer. Generation: exact match and token F1, over all accepted answers.
    """

    def verbalizer_accuracy(targets: Sequence[str], predictions: Sequence[str]) -> Scores:
        scores = {"accuracy": metrics.accuracy(predictions, targets)}
        if len(spec.labels) == 2:
            scores["binary_f1"] = metrics.binary_f1(predictions, targets, spec.labels[1])
        return scores

    def generation(targets: Sequence[metrics.Answers], predictions: Sequence[str]) -> Scores:
        return {
            "exact_match": metrics.exact_match(predictions, targets),
            "token_f1": metrics.token_f1(predictions, targets),
        }

    functions: dict[str, list[Callable[..., Scores]]]
    functions = {"classification": [verbalizer_accuracy], "generation": [generation]}
    return functions.get(spec.kind, [])


def split_answers(joined: Any) -> list[str]:
    """Returns the accepted answers in the field 'answers' of an example, bytes or text."""
    joined = joined.item() if hasattr(joined, "item") else joined  # a numpy scalar
    text = joined.decode("utf-8") if isinstance(joined, bytes) else str(joined)
    return text.split(ANSWER_SEPARATOR)
