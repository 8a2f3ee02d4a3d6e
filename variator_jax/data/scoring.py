"""What seqio and T5X need to score a task's predictions: a postprocessor and a metric function.

Both are made from the task's `TaskSpec` and work on decoded text, so that any seqio evaluator gives
figures. Scores of verbalizers, which need the logits, are the business of `evaluation.evaluator`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from variator_jax.data import metrics
from variator_jax.data.spec import ANSWER_SEPARATOR, TaskSpec

Scores = dict[str, float]


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
    if spec.kind == "classification":
        return [_classification(spec)]
    return [_generation] if spec.kind == "generation" else []


def _classification(spec: TaskSpec) -> Callable[..., Scores]:
    def verbalizer_accuracy(targets: Sequence[str], predictions: Sequence[str]) -> Scores:
        scores = {"accuracy": metrics.accuracy(predictions, targets)}
        if len(spec.labels) == 2:
            scores["binary_f1"] = metrics.binary_f1(predictions, targets, spec.labels[1])
        return scores

    return verbalizer_accuracy


def _generation(targets: Sequence[metrics.Answers], predictions: Sequence[str]) -> Scores:
    return {
        "exact_match": metrics.exact_match(predictions, targets),
        "token_f1": metrics.token_f1(predictions, targets),
    }


def split_answers(joined: Any) -> list[str]:
    """Returns the accepted answers in the field 'answers' of an example, bytes or text."""
    joined = joined.item() if hasattr(joined, "item") else joined  # a numpy scalar
    text = joined.decode("utf-8") if isinstance(joined, bytes) else str(joined)
    return text.split(ANSWER_SEPARATOR)
