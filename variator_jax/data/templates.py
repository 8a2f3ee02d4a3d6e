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
      DataError: if the template is broken, has no fields, or asks for more than plain fields: a
        format ('{hour:02d}'), a conversion ('{text!r}') or a position ('{0}').
    """
    try:
        parts = [part for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise DataError(f"the template {template!r} is broken: {error}") from error
    names = [str(name) for _, name, _, _ in parts]
    if not names or not all(map(_is_name, names)):
        raise DataError(
            f"the template {template!r} needs fields in braces, such as {{text}}; found {names}"
        )
    for _, name, form, conversion in parts:
        if form or conversion:
            extra = f"!{conversion}" if conversion else f":{form}"
            raise DataError(
                f"the template {template!r} has {extra!r} after the field {name!r}; fields are put "
                f"in as they are, so write {{{name}}}"
            )
    return list(dict.fromkeys(names))


def _is_name(name: str) -> bool:
    """Whether `str.format_map` looks this up as it stands; digits alone would be a position."""
    return name.replace("_", "a").replace("-", "a").isalnum() and not name.isdecimal()


def target_fields(target: str) -> list[str]:
    """Returns the fields of a target that is a template or the name of a field."""
    return fields_of(target) if "{" in target else [target]


def renderer(
    template: str, target: str | None, labels: Labels | None, label_field: str
) -> Callable[[Row], dict[str, str]]:
    """Returns what makes {'inputs', 'targets'} of a row, or raises RowError.

    Raises:
      DataError: if the template or the target is broken.
    """
    fill = _filler(template)
    if labels is None:
        goal = _target_filler(str(target))
        return lambda row: {"inputs": fill(row), "targets": goal(row)}
    known = _label_table(labels)

    def classify(row: Row) -> dict[str, str]:
        label = text_field(row, label_field)
        if label not in known:
            raise RowError(
                f"unknown label {label!r}.{did_you_mean(label, known)} Known: {', '.join(known)}"
            )
        return {"inputs": fill(row), "targets": known[label]}

    return classify


def _filler(template: str) -> Callable[[Row], str]:
    fields = fields_of(template)
    return lambda row: template.format_map({field: text_field(row, field) for field in fields})


def _target_filler(target: str) -> Callable[[Row], str]:
    return _filler(target) if "{" in target else lambda row: text_field(row, target)


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
