"""Scores of predictions against references, all on a scale of 0 to 100.

Pure functions of labels and strings, for seqio's metric functions (`spec`) and for our own
evaluator. Text is compared as the SQuAD evaluation does it (Rajpurkar et al., 2016): lower case, no
punctuation, no articles, single spaces, and the best score over all accepted answers.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from variator_jax.errors import DataError

# One example's accepted answers: a single text, or several of which the best counts.
Answers = str | Sequence[str]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


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
        lambda p, a: float(normalise_answer(p) == normalise_answer(a)), predictions, references
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
    for row, (prediction, answers) in enumerate(_pairs(predictions, references)):
        accepted = [answers] if isinstance(answers, str) else list(answers)
        if not accepted:
            raise DataError(f"Example {row} has no answer to compare with.")
        total += max(similarity(prediction, answer) for answer in accepted)
    return 100.0 * total / len(references)


def _pairs(predictions: Sequence[Any], references: Sequence[Any]) -> list[tuple[Any, Any]]:
    if len(predictions) != len(references) or not len(references):
        raise DataError(
            f"{len(predictions)} predictions for {len(references)} references; expected as many, "
            "and at least one"
        )
    return list(zip(predictions, references, strict=True))
