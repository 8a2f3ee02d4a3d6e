"""How a task is scored: the registry that evaluation reads beside seqio's own.

A seqio task says how examples are made; a `TaskSpec` says what a right answer is. Nothing here
imports TensorFlow or seqio, so that serving and evaluation can name tasks without them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal, get_args

from variator_jax.errors import DataError, did_you_mean

_PAD, _EOS = 0, 1

Kind = Literal["classification", "generation", "span_corruption"]


@dataclasses.dataclass(frozen=True)
class TaskSpec:
    """How the task `name` is scored.

    Attributes:
      name: the name of the seqio task.
      kind: 'classification' (verbalizer scores at the first target position), 'generation' (token
        F1 of the decoded text) or 'span_corruption' (loss only).
      labels: the verbalizers in label order; only for classification.

    Raises:
      DataError: if the kind is unknown, or the labels do not suit it.
    """

    name: str
    kind: Kind
    labels: tuple[str, ...] = ()

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


def verbalizer_ids(
    spec: TaskSpec, encode: Callable[[str], Sequence[int]], unknown_id: int | None = None
) -> list[int]:
    """Returns the first token id of each verbalizer, in label order.

    Args:
      spec: a classification task.
      encode: from a text to its token ids.
      unknown_id: the id of what the vocabulary cannot spell, where a verbalizer may be such.

    Raises:
      DataError: if a verbalizer encodes to nothing or to the unknown, or two of them begin with the
        same token, for then the first target position cannot tell them apart.
    """
    if not spec.labels:
        raise DataError(f"task {spec.name!r} is {spec.kind}, so it has no verbalizers")
    owners: dict[int, str] = {}
    for label in spec.labels:
        first = next((int(token) for token in encode(label)), _PAD)
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
