"""Finding tasks and mixtures by name, and mixtures that a gin file names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from variator_jax.data import docs_tasks  # noqa: F401  (registers the documentation tasks)
from variator_jax.data._tf import seqio
from variator_jax.data.tasks import hash_of
from variator_jax.data.vocabulary import identity
from variator_jax.errors import DataError, did_you_mean

_registered: dict[str, tuple[list[str], list[float]]] = {}  # name -> tasks, rates


def task_or_mixture(name: str) -> Any:
    """Returns the seqio task or mixture `name`; the documentation tasks are always there.

    Raises:
      DataError: if there is none; the message gives the nearest names.
    """
    known = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
    if name not in known:
        raise DataError(
            f"no task or mixture named {name!r}.{did_you_mean(name, known)} "
            f"Registered: {', '.join(sorted(known))}"
        )
    return seqio.get_mixture_or_task(name)


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
    inputs = {task: task_or_mixture(task).output_features["inputs"] for task in tasks}
    vocabularies = {task: identity(feature.vocabulary) for task, feature in inputs.items()}
    if len(set(vocabularies.values())) > 1:
        raise DataError(f"the tasks of a mixture share one vocabulary; found {vocabularies}")
    name = name or f"mixture_{hash_of([tasks, rates])}"
    if _registered.setdefault(name, (tasks, rates)) != (tasks, rates):
        raise DataError(f"a mixture named {name!r} is already registered: {_registered[name]}")
    if name not in seqio.MixtureRegistry.names():
        seqio.MixtureRegistry.add(name, list(zip(tasks, rates, strict=True)))
    return name
