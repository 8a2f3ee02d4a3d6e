"""Mixtures of tasks that a gin file names, such as span corruption beside labelled tasks.

Mixtures with a name of their own stand with their tasks: `docs_tasks`, `glue`.
"""

from __future__ import annotations

from collections.abc import Sequence

from variator_jax.data._tf import seqio
from variator_jax.data.batches import task_or_mixture
from variator_jax.data.registry import is_registered, origin_of, remember
from variator_jax.data.vocabulary import identity
from variator_jax.errors import DataError


def mixture(tasks: Sequence[str], rates: Sequence[float], name: str | None = None) -> str:
    """Registers a mixture of registered tasks, once, and returns its name; reads no data.

    Args:
      tasks: names of tasks or mixtures, which share one vocabulary.
      rates: how often examples of each are drawn, as shares of the rates' sum.
      name: the mixture's name; if not given, 'mixture_' and a hash of the rest.

    Raises:
      DataError: for unknown tasks, rates that do not fit, tasks of different vocabularies, or a
        name that something else has.
    """
    tasks, rates = list(tasks), [float(rate) for rate in rates]
    if not tasks or len(tasks) != len(set(tasks)):
        raise DataError(f"a mixture needs tasks, each once; found {tasks}")
    if len(rates) != len(tasks) or min(rates) <= 0:
        raise DataError(f"{len(tasks)} tasks need as many rates above 0; found {rates}")
    vocabularies = {task: _vocabulary(task) for task in tasks}
    if len(set(vocabularies.values())) > 1:
        raise DataError(f"the tasks of a mixture share one vocabulary; found {vocabularies}")
    origin = origin_of([tasks, rates])
    name = name or f"mixture_{origin[:8]}"
    if not is_registered(name, origin):
        seqio.MixtureRegistry.add(name, list(zip(tasks, rates, strict=True)))
    return remember(name, origin)


def _vocabulary(task: str) -> str:
    return identity(task_or_mixture(task).output_features["inputs"].vocabulary)
