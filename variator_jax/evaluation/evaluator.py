"""Scores a task's batches with a scorer or a decoder, by the kind of the task.

Model and parameters are bound into the functions passed in (see `scorers`), so nothing here knows a
plugin. Rows whose loss weights are all zero fill up the last batch and are ignored.
"""

import dataclasses
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from variator_jax.data import spec as metrics
from variator_jax.data.spec import Answers, TaskSpec, token_f1
from variator_jax.errors import DataError, TrainingError
from variator_jax.evaluation.data import Batch

# Turns a batch into label scores, target scores or generated tokens.
ScoreBatch = Callable[[Batch], Any]


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """A task's outcome.

    `score` (0 to 100) is accuracy for classification, token F1 for generation and the accuracy of
    target tokens under teacher forcing for span corruption. `majority` is the score of always
    answering the majority class, None for other kinds. `details` holds further figures by name.
    `scores` is each example's share of the score, 0 to 100; empty for span corruption.
    """

    score: float
    examples: int
    majority: float | None = None
    details: Mapping[str, float] = dataclasses.field(default_factory=dict)
    scores: Sequence[float] = ()


def evaluate_classification(
    spec: TaskSpec,
    batches: Iterable[Batch],
    score_batch: ScoreBatch,
    label_ids: Sequence[int],
    label_position: int = 0,
) -> TaskResult:
    """Accuracy of the highest verbalizer; for two labels `details` adds the F1 of the second.

    Args:
      spec: the task.
      batches: batches with T5X's names, one example a row.
      score_batch: batch -> `[batch, labels]`.
      label_ids: the first token id of each verbalizer.
      label_position: where in the target that token stands.

    Raises:
      DataError: if there is nothing to score, or a target is none of the verbalizers.
      TrainingError: for scores that are not finite; the highest of them would be the first label.
    """
    predictions: list[int] = []
    references: list[int] = []
    for targets, _, scores in _scored(batches, score_batch):
        if not np.isfinite(scores).all():
            raise TrainingError(f"Scores of labels of task {spec.name!r} are not finite.")
        references += [_label(spec, label_ids, row, label_position) for row in targets]
        predictions += scores.argmax(axis=-1).tolist()
    score = metrics.accuracy(predictions, references)
    details = {"accuracy": score}
    if len(label_ids) == 2:
        details["binary_f1"] = metrics.binary_f1(predictions, references)
    majority = metrics.majority_score(references)
    hits = [100.0 * (p == r) for p, r in zip(predictions, references, strict=True)]
    return TaskResult(score, len(references), majority, details, hits)


def evaluate_generation(
    spec: TaskSpec,
    batches: Iterable[Batch],
    generate: ScoreBatch,
    decode: Callable[[Sequence[int]], str],
    references: Sequence[Answers],
) -> TaskResult:
    """Token F1 of the decoded answers; `details` adds the exact match.

    Args:
      spec: the task.
      batches: batches with T5X's names, one example a row.
      generate: batch -> token ids `[batch, length]`.
      decode: token ids -> text, up to the end of sequence, as the vocabularies of seqio do.
      references: the accepted answers of each example, in the order of the batches. They are whole;
        the batches' targets may be cut.

    Raises:
      DataError: if there is nothing to score.
    """
    rows = (row for _, _, outputs in _scored(batches, generate) for row in outputs.tolist())
    predictions = [spec.answer(decode(row)) for row in rows]
    score = token_f1(predictions, references)
    details = {"token_f1": score, "exact_match": metrics.exact_match(predictions, references)}
    scores = [token_f1([p], [r]) for p, r in zip(predictions, references, strict=True)]
    return TaskResult(score, len(references), None, details, scores)


def evaluate_span_corruption(
    spec: TaskSpec, batches: Iterable[Batch], score_batch: ScoreBatch
) -> TaskResult:
    """Accuracy of the target tokens; `details` adds their mean cross-entropy and perplexity.

    Args:
      spec: the task.
      batches: batches with T5X's names, one example a row.
      score_batch: batch -> (negative log-likelihoods, hits), both `[batch, target length]`.

    Raises:
      DataError: if there is nothing to score.
    """
    tokens, hits, loss, examples = 0, 0, 0.0, 0
    for _, mask, (likelihoods, right) in _scored(batches, score_batch):
        loss += float(likelihoods[mask].sum(dtype=np.float64))
        hits += int(right[mask].sum())
        tokens += int(mask.sum())
        examples += len(mask)
    if not tokens:
        raise DataError(f"Task {spec.name!r} has no target token to score.")
    details = {"cross_entropy": loss / tokens, "perplexity": float(np.exp(loss / tokens))}
    return TaskResult(100.0 * hits / tokens, examples, details=details)


def _scored(
    batches: Iterable[Batch], score_batch: ScoreBatch
) -> Iterator[tuple[np.ndarray, np.ndarray, Any]]:
    """Targets, which of them count, and scores of each batch, without the rows that fill it up."""
    for batch in batches:
        # [batch, target length]
        mask = np.asarray(batch["decoder_loss_weights"]) > 0
        rows = mask.any(axis=-1)
        if rows.any():
            arrays = batch["decoder_target_tokens"], mask, score_batch(batch)
            yield jax.tree.map(operator.itemgetter(rows), jax.tree.map(np.asarray, arrays))


def _label(spec: TaskSpec, label_ids: Sequence[int], target: np.ndarray, position: int) -> int:
    token = int(target[position]) if position < len(target) else None
    if token is None or token not in label_ids:
        raise DataError(
            f"Task {spec.name!r}: a target has token {token} at position {position}; expected one "
            f"of {list(label_ids)}, of the verbalizers {list(spec.labels)}. None stands for a "
            "target that TASK_FEATURE_LENGTHS cuts before it."
        )
    return list(label_ids).index(token)
