"""Runs a task's batches through a scorer or a decoder and scores the answers.

Model and parameters are bound into the functions passed in (see `scorers` for those that score), so
nothing here knows a plugin. Rows whose loss weights are all zero fill the last batch up and are
ignored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from variator_jax.data import metrics
from variator_jax.data.metrics import Answers
from variator_jax.data.spec import TaskSpec
from variator_jax.data.spec import prefix_ids as prefix_ids  # these two for callers of this module
from variator_jax.data.spec import verbalizer_ids as verbalizer_ids
from variator_jax.errors import ConfigError, DataError
from variator_jax.evaluation.scorers import Batch

PAD, EOS = 0, 1

# What a batch of a task is turned into: label scores, target scores or generated tokens.
ScoreBatch = Callable[[Batch], Any]
Decode = Callable[[Sequence[int]], str]


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """A task's outcome.

    `score` (0 to 100) is accuracy for classification, token F1 for generation and the accuracy of
    target tokens under teacher forcing for span corruption. `majority` is the score of always
    answering the commonest label, None for other kinds. `details` holds further figures by name.
    """

    task: str
    kind: str
    score: float
    examples: int
    majority: float | None = None
    details: Mapping[str, float] = dataclasses.field(default_factory=dict)
    predictions: tuple[int | str, ...] = ()


def evaluate_task(
    spec: TaskSpec,
    batches: Iterable[Batch],
    *,
    score_batch: ScoreBatch | None = None,
    generate: ScoreBatch | None = None,
    label_ids: Sequence[int] | None = None,
    label_position: int = 0,
    decode: Decode | None = None,
    references: Sequence[Answers] | None = None,
) -> TaskResult:
    """Scores one task as its specification says.

    Args:
      spec: the task.
      batches: batches with T5X's names, one example a row.
      score_batch: for classification, batch -> `[batch, labels]`; for span corruption, batch ->
        (negative log-likelihoods, hits), both `[batch, target length]`.
      generate: for generation, batch -> token ids `[batch, length]`.
      label_ids: for classification, the first token id of each verbalizer (`verbalizer_ids`).
      label_position: for classification, where in the target that token stands.
      decode: for generation, token ids -> text.
      references: for generation, the accepted answers of each example, in the order of the
        batches; the decoded targets if not given.

    Raises:
      ConfigError: if a function that this kind of task needs is missing.
      DataError: if there is nothing to score, or a target is none of the verbalizers.
    """
    if spec.kind == "classification":
        scorer = _needed(spec, "score_batch", score_batch)
        ids = _needed(spec, "label_ids", label_ids)
        return evaluate_classification(spec, batches, scorer, ids, label_position)
    if spec.kind == "generation":
        decoder = _needed(spec, "decode", decode)
        generator = _needed(spec, "generate", generate)
        return evaluate_generation(spec, batches, generator, decoder, references)
    if spec.kind == "span_corruption":
        return evaluate_span_corruption(spec, batches, _needed(spec, "score_batch", score_batch))
    raise ConfigError(f"Task {spec.name!r} is of kind {spec.kind!r}, which has no score.")


def evaluate_classification(
    spec: TaskSpec,
    batches: Iterable[Batch],
    score_batch: ScoreBatch,
    label_ids: Sequence[int],
    label_position: int = 0,
) -> TaskResult:
    """Accuracy of the highest verbalizer; for two labels `details` adds the F1 of the second."""
    predictions: list[int] = []
    references: list[int] = []
    index = {token: label for label, token in enumerate(label_ids)}
    for batch, rows in _scored(batches):
        targets = np.asarray(batch["decoder_target_tokens"])[rows]
        references += [_label(spec, index, row, label_position) for row in targets]
        predictions += np.asarray(score_batch(batch))[rows].argmax(axis=-1).tolist()
    score = metrics.accuracy(predictions, references)
    details = {"accuracy": score}
    if len(label_ids) == 2:
        details["binary_f1"] = metrics.binary_f1(predictions, references)
    majority = metrics.majority_score(references)
    return TaskResult(
        spec.name, spec.kind, score, len(references), majority, details, tuple(predictions)
    )


def evaluate_generation(
    spec: TaskSpec,
    batches: Iterable[Batch],
    generate: ScoreBatch,
    decode: Decode,
    references: Sequence[Answers] | None = None,
) -> TaskResult:
    """Token F1 of the decoded answers; `details` adds the exact match."""
    predictions: list[str] = []
    decoded: list[str] = []
    for batch, rows in _scored(batches):
        targets = np.asarray(batch["decoder_target_tokens"])[rows]
        outputs = np.asarray(generate(batch))[rows]
        decoded += [spec.answer(decode(_until_eos(row))) for row in targets]
        predictions += [spec.answer(decode(_until_eos(row))) for row in outputs]
    references = decoded if references is None else references
    score = metrics.token_f1(predictions, references)
    details = {"token_f1": score, "exact_match": metrics.exact_match(predictions, references)}
    return TaskResult(
        spec.name,
        spec.kind,
        score,
        len(references),
        details=details,
        predictions=tuple(predictions),
    )


def evaluate_span_corruption(
    spec: TaskSpec, batches: Iterable[Batch], score_batch: ScoreBatch
) -> TaskResult:
    """Accuracy of the target tokens; `details` adds their mean cross-entropy and perplexity."""
    tokens, hits, loss, examples = 0, 0, 0.0, 0
    for batch, rows in _scored(batches):
        mask = np.asarray(batch["decoder_loss_weights"])[rows] > 0
        likelihoods, right = (np.asarray(scores)[rows] for scores in score_batch(batch))
        loss += float(likelihoods[mask].sum(dtype=np.float64))
        hits += int(right[mask].sum())
        tokens += int(mask.sum())
        examples += len(mask)
    if not tokens:
        raise DataError(f"Task {spec.name!r} has no target token to score.")
    details = {"cross_entropy": loss / tokens, "perplexity": float(np.exp(loss / tokens))}
    return TaskResult(spec.name, spec.kind, 100.0 * hits / tokens, examples, details=details)


def bit_identical(first: ScoreBatch, second: ScoreBatch, batches: Iterable[Batch]) -> bool:
    """Whether two score functions give the same bits on every batch; DataError for no batch."""
    compared = 0
    for batch in batches:
        one, other = np.asarray(first(batch)), np.asarray(second(batch))
        if one.shape != other.shape or one.tobytes() != other.tobytes():
            return False
        compared += 1
    if not compared:
        raise DataError("There is no batch to compare two models on.")
    return True


def _scored(batches: Iterable[Batch]) -> Iterator[tuple[Batch, np.ndarray]]:
    """Batches that hold examples, each with a mask `[batch]` of the rows that are one."""
    for batch in batches:
        rows = (np.asarray(batch["decoder_loss_weights"]) > 0).any(axis=-1)
        if rows.any():
            yield batch, rows


def _label(spec: TaskSpec, index: Mapping[int, int], target: np.ndarray, position: int) -> int:
    if position >= len(target):
        raise DataError(
            f"Task {spec.name!r}: targets of {len(target)} tokens have no verbalizer; it stands "
            f"behind the prefix {spec.prefix!r}, so give longer targets in TASK_FEATURE_LENGTHS."
        )
    token = int(target[position])
    if token not in index:
        raise DataError(
            f"Task {spec.name!r}: a target has token {token} at position {position}, which begins "
            f"none of the verbalizers {list(spec.labels)} (tokens {list(index)})."
        )
    return index[token]


def _until_eos(tokens: np.ndarray) -> list[int]:
    """The ids before the first end of sequence, without padding."""
    ids = [int(token) for token in tokens]
    ids = ids[: ids.index(EOS)] if EOS in ids else ids
    return [token for token in ids if token != PAD]


def _needed(spec: TaskSpec, name: str, value: Any) -> Any:
    if value is None:
        raise ConfigError(
            f"Task {spec.name!r} of kind {spec.kind!r} cannot be scored without {name}."
        )
    return value
