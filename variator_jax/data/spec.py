"""How a task is scored: the registry that evaluation reads beside seqio's own.

A seqio task says how examples are made; a `TaskSpec` says what a right answer is. Nothing here
imports TensorFlow or seqio, so that serving and evaluation can name tasks without them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Literal, get_args

from variator_jax.errors import DataError, did_you_mean

_PAD, _EOS = 0, 1
_SENTINEL = re.compile(r"<extra_id_\d+>")

#: Between the accepted answers of one example in the field 'answers': ASCII's unit separator.
ANSWER_SEPARATOR = "\x1f"

Kind = Literal["classification", "generation", "span_corruption"]


@dataclasses.dataclass(frozen=True)
class TaskSpec:
    """How the task `name` is scored.

    Attributes:
      name: the name of the seqio task.
      kind: 'classification' (verbalizer scores at the first target position behind the prefix),
        'generation' (token F1 of the decoded text) or 'span_corruption' (loss only).
      labels: the verbalizers in label order; only for classification.
      prefix: one token that begins every target and is no part of the answer, such as
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
        if self.kind not in get_args(Kind):
            kinds = ", ".join(get_args(Kind))
            raise DataError(
                f"task {self.name!r} has the kind {self.kind!r}; the kinds are {kinds}."
                f"{did_you_mean(str(self.kind), get_args(Kind))}"
            )
        if self.kind == "classification" and len(set(self.labels)) < 2:
            raise DataError(f"task {self.name!r} needs two labels or more, found {self.labels!r}")
        if len(set(self.labels)) != len(self.labels):
            raise DataError(f"task {self.name!r} has a label twice: {self.labels!r}")
        if self.kind != "classification" and self.labels:
            raise DataError(f"task {self.name!r} is {self.kind}, so it takes no labels")
        if self.kind == "span_corruption" and self.prefix:
            raise DataError(f"task {self.name!r} is span corruption, so it takes no prefix")
        if self.kind != "generation" and self.many_answers:
            raise DataError(f"task {self.name!r} is {self.kind}, so it has one answer an example")

    def target(self, answer: str) -> str:
        """Returns the target text whose answer is `answer`."""
        return f"{self.prefix} {answer}" if self.prefix else answer

    def answer(self, text: str) -> str:
        """Returns the answer in a target or a decoded text.

        That is what stands behind the prefix and, where there is one, before the next sentinel:
        a T5 closes what it filled in for '<extra_id_0>' with '<extra_id_1>'.
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
    """Returns the first token id of each verbalizer behind the prefix, in label order.

    A verbalizer may have several tokens: it is known, and scored, by the first.

    Args:
      spec: a classification task.
      encode: from a text to its token ids.
      unknown_id: the id of what the vocabulary cannot spell, where a verbalizer may be such.

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
        if first in (_PAD, _EOS):
            raise DataError(f"task {spec.name!r}: the verbalizer {label!r} encodes to no token")
        if first == unknown_id:
            raise DataError(
                f"task {spec.name!r}: the vocabulary cannot spell the verbalizer {label!r}"
            )
        if first in owners:
            raise DataError(
                f"task {spec.name!r}: the verbalizers {owners[first]!r} and {label!r} both begin "
                f"with token {first} in this vocabulary; choose words that differ there"
            )
        owners[first] = label
    return list(owners)
