"""Templates and labels: from a row of a user's file to an input text and a target text."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from variator_jax.data.rows import Row, RowError, text_field
from variator_jax.errors import DataError, did_you_mean

Labels = Sequence[str] | Mapping[Any, str]


def verbalizers_of(labels: Labels) -> tuple[str, ...]:
    """Returns the different verbalizers in label order.

    Raises:
      DataError: if there are fewer than two, or they are not words.
    """
    words = list(labels.values()) if isinstance(labels, Mapping) else list(labels)
    if isinstance(labels, str) or not all(isinstance(w, str) and w.strip() for w in words):
        raise DataError(f"labels are a list or dict of words, found {labels!r}")
    distinct = tuple(dict.fromkeys(words))
    if len(distinct) < 2 or (len(distinct) < len(words) and not isinstance(labels, Mapping)):
        raise DataError(f"labels need two different verbalizers or more, found {words}")
    return distinct


def fields_of(template: str) -> list[str]:
    """Returns the names of a template's fields.

    Raises:
      DataError: if the template is broken or has no fields.
    """
    try:
        names = [
            field for _, field, _, _ in string.Formatter().parse(template) if field is not None
        ]
    except ValueError as error:
        raise DataError(f"the template {template!r} is broken: {error}") from error
    if not names or not all(name.replace("_", "a").replace("-", "a").isalnum() for name in names):
        raise DataError(
            f"the template {template!r} needs fields in braces, such as {{text}}; found {names}"
        )
    return list(dict.fromkeys(names))


def target_fields(target: str) -> list[str]:
    """Returns the fields of a target that is a template or the name of a field."""
    return fields_of(target) if "{" in target else [target]


def renderer(
    template: str, target: str | None, labels: Labels | None, label_field: str
) -> Callable[[Row], dict[str, str]]:
    """Returns what makes {'inputs', 'targets'} of a row, or raises RowError."""

    def fill(text: str, row: Row) -> str:
        return text.format_map({field: text_field(row, field) for field in fields_of(text)})

    if labels is None:
        goal = str(target) if "{" in str(target) else f"{{{target}}}"
        return lambda row: {"inputs": fill(template, row), "targets": fill(goal, row)}
    known = _label_table(labels)

    def classify(row: Row) -> dict[str, str]:
        label = text_field(row, label_field)
        if label not in known:
            raise RowError(
                f"unknown label {label!r}.{did_you_mean(label, known)} Known: {', '.join(known)}"
            )
        return {"inputs": fill(template, row), "targets": known[label]}

    return classify


def _label_table(labels: Labels) -> dict[str, str]:
    """Maps what a row may have as its label, as text, to the verbalizer."""
    if isinstance(labels, Mapping):
        return {str(raw): word for raw, word in labels.items()}
    table = {word: word for word in labels}
    for index, word in enumerate(labels):
        table.setdefault(str(index), word)
    if len(labels) == 2:  # JSON's truth values
        table.setdefault("False", labels[0])
        table.setdefault("True", labels[1])
    return table
