"""Reading registered tasks in tests: batches side by side, and texts."""

import copy
import itertools

import numpy as np
import seqio

from variator_jax import gin_utils
from variator_jax.data.batches import batches


def take(count, name, split="train", size=8, lengths=None, **options):
    """The first `count` batches, or with None all."""
    lengths = lengths or {"inputs": 32, "targets": 8}
    return list(itertools.islice(batches(name, split, size, lengths, **options), count))


def same(one, other):
    """Whether two lists of batches are equal, bit by bit."""
    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)
        for a, b in zip(one, other, strict=True)
    )


def texts(task, split="train", fields=("inputs_pretokenized", "targets_pretokenized")):
    """The texts of each example of a task, in its own order."""
    dataset = seqio.get_mixture_or_task(task).get_dataset(None, split, shuffle=False)
    return [tuple(e[key].decode() for key in fields) for e in dataset.as_numpy_iterator()]


def restored(inputs, targets, first_sentinel):
    """The tokens that span corruption was made from, without padding and EOS."""
    spans = np.split(targets, np.flatnonzero(targets >= first_sentinel))[1:]
    by_sentinel = {span[0]: [int(token) for token in span[1:] if token > 1] for span in spans}
    ids = (int(token) for token in inputs if token > 1)
    pieces = (by_sentinel[i] if i >= first_sentinel else [i] for i in ids)
    return list(itertools.chain.from_iterable(pieces))


def parsed_task(files, *bindings):
    """The task that gin files name as MIXTURE_OR_TASK_NAME, registered."""
    gin_utils.parse(files, list(bindings))
    # Copying a reference is how gin evaluates one that is called.
    return copy.deepcopy(gin_utils.macro("MIXTURE_OR_TASK_NAME"))
