"""How a column of labels is read: one way for all rows, or it is refused.

A reading maps what a row may have as its label to a verbalizer. With a list of verbalizers there
are several: the verbalizers themselves, their indices, and truth values.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from variator_jax.data import rows
from variator_jax.errors import DataError

Labels = Sequence[str] | Mapping[Any, str]

#: Words of which the second means that something is true.
_MEANINGS = (
    ("no", "yes"), ("false", "true"), ("negative", "positive"), ("bad", "good"), ("0", "1"),
    ("wrong", "right"), ("incorrect", "correct"), ("off", "on"), ("n", "y"), ("f", "t"),
)  # fmt: skip
_TRUTH = ("false", "true")


class Reading(NamedTuple):
    """One way to read labels: what the rows have, and the verbalizer of each value."""

    name: str
    table: Mapping[str, str]

    def __str__(self) -> str:
        pairs = ", ".join(f"{raw!r} is {word!r}" for raw, word in self.table.items())
        return f"labels are read as {self.name}: {pairs}"


def label_of(fields: rows.Fields, name: str) -> str:
    """Returns a row's label as text; a truth value is 'true' or 'false', however it is spelt."""
    value = fields.get(name)
    return _plain(value if isinstance(value, bool) else rows.text_field(fields, name))


def _plain(value: Any) -> str:
    text = str(value).strip()
    return text.lower() if text.lower() in _TRUTH else text


def readings(labels: Labels) -> list[Reading]:
    """Returns the ways to read a column, the plainest first.

    Raises:
      DataError: if there are fewer than two verbalizers, they are not words, or a dict has one
        label twice, such as 1 and '1'.
    """
    words = list(labels.values() if isinstance(labels, Mapping) else labels)
    fewest = 2 if isinstance(labels, Mapping) else max(2, len(words))  # labels may share a word
    texts = [word for word in words if isinstance(word, str) and word.strip()]
    if isinstance(labels, str) or len(texts) < len(words) or len(set(texts)) < fewest:
        raise DataError(f"labels are a list or dict of two different words or more: {labels!r}")
    if isinstance(labels, Mapping):
        table = {_plain(raw): word for raw, word in labels.items()}
        if len(table) < len(labels):
            raise DataError(f"labels has one label twice: {labels!r}")
        return [Reading("given", table)]
    plain = [_plain(word) for word in words]
    found = [
        Reading("the words themselves", dict(zip(plain, words, strict=True))),
        Reading("indices", {str(number): word for number, word in enumerate(words)}),
    ]
    if len(words) == 2 and set(plain) != set(_TRUTH):
        meant = {(no, yes)[i]: _TRUTH[i] for no, yes in _MEANINGS for i in (0, 1)}
        truths = [meant.get(word.lower()) for word in plain]
        in_order = dict(zip(_TRUTH, words, strict=True))
        found.append(Reading("truth values, in the order of the list", in_order))
        table, name = dict(zip(_TRUTH, words[::-1], strict=True)), "in the reverse order"
        if set(truths) == set(_TRUTH):
            pairs = sorted(zip(map(str, truths), words, strict=True))
            table, name = dict(pairs), "by what the words mean"
        found.append(Reading(f"truth values, {name}", table))
    return found


def choose(labels: Labels, column: Iterable[str]) -> Reading:
    """Returns the reading that fits the most rows; those that it does not fit are bad rows.

    Raises:
      DataError: if another reading fits the column as well and disagrees about a label, with both;
        or as `readings`.
    """
    counts = Counter(column)
    rows_read = lambda reading: sum(counts[raw] for raw in reading.table)  # noqa: E731
    known = readings(labels)
    first = max(known, key=rows_read)
    whole = rows_read(first) == counts.total()
    for other in known:
        shared = {*counts} & {*first.table} & {*other.table}
        fits = not whole or rows_read(other) == counts.total()
        if fits and any(first.table[raw] != other.table[raw] for raw in shared):
            ways = f"the labels {sorted(counts)[:10]} can be read in two ways: {first}; {other}"
            remedy = f"Give labels (TASK_LABELS) as a dict, such as {dict(other.table)}"
            raise DataError(f"{ways}. {remedy}")
    return first
