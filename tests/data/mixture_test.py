import copy

import numpy as np
import pytest
from task_batches import same, take

from variator_jax import gin_utils
from variator_jax.data.batches import task_or_mixture
from variator_jax.data.file_task import file_task
from variator_jax.data.mixture import mixture
from variator_jax.data.vocabulary import byte_vocabulary
from variator_jax.errors import DataError

LENGTHS = {"inputs": 32, "targets": 12}


def test_tasks_are_drawn_by_their_rates_span_corruption_among_them_and_resumed():
    name = mixture(("docs_span_corruption", "docs_pair"), (1, 3))
    beginning = take(40, name, size=16, lengths=LENGTHS)
    answers = np.concatenate([batch["decoder_target_tokens"] for batch in beginning])
    labelled = np.mean((answers != 0).sum(1) == 2)  # a label and the end of the sequence
    assert 0.7 < labelled < 0.8
    assert same(beginning[38:], take(2, name, size=16, lengths=LENGTHS, start_batch=38))
    far = take(2, name, size=16, lengths=LENGTHS, start_batch=200)  # in another block of draws
    assert same(far, take(202, name, size=16, lengths=LENGTHS)[200:])


def test_the_same_mixture_has_one_name_and_another_has_another():
    first = mixture(("docs_topic", "docs_pair"), (1, 2))
    assert mixture(["docs_topic", "docs_pair"], [1.0, 2.0]) == first
    assert mixture(("docs_topic", "docs_pair"), (1, 3)) != first
    assert mixture(("docs_topic", "docs_pair"), (1, 1), "evenly") == "evenly"
    with pytest.raises(DataError, match="'evenly' is already registered"):
        mixture(("docs_topic", "docs_pair"), (1, 3), "evenly")


def test_a_mixture_may_hold_another():
    outer = task_or_mixture(mixture(("docs_labels", "docs_name"), (3, 1)))
    rates = {task.name: outer.get_rate(task) for task in outer.tasks}
    assert rates["docs_topic"] == rates["docs_pair"]
    assert rates["docs_topic"] + rates["docs_pair"] == 3 * rates["docs_name"]


@pytest.mark.parametrize(
    ("tasks", "rates", "message"),
    [
        (("docs_topic", "docs_pear"), (1, 1), "Did you mean 'docs_pair'"),
        (("docs_topic", "docs_pair"), (1,), "2 tasks need as many rates above 0"),
        (("docs_topic", "docs_pair"), (1, 0), "2 tasks need as many rates above 0"),
        (("docs_topic", "docs_topic"), (1, 1), "each once"),
        ((), (), "needs tasks"),
    ],
)
def test_tasks_and_rates_that_do_not_fit_are_refused(tasks, rates, message):
    with pytest.raises(DataError, match=message):
        mixture(tasks, rates)


def test_tasks_of_different_vocabularies_are_refused(tmp_path):
    path = tmp_path / "rows.tsv"
    path.write_text("text\tlabel\na film\tyes\na book\tno\n")
    bytes_task = file_task(str(path), "{text}", labels=["no", "yes"], vocabulary=byte_vocabulary())
    with pytest.raises(DataError, match="share one vocabulary.*ByteVocabulary"):
        mixture(("docs_pair", bytes_task), (1, 1))


def test_a_gin_file_may_name_one(tmp_path, fresh_gin):
    path = tmp_path / "mixed.gin"
    path.write_text(
        "from __gin__ import dynamic_registration\n"
        "from variator_jax.data import mixture\n"
        "MIXTURE_OR_TASK_NAME = @mixture.mixture()\n"
        "mixture.mixture:\n  tasks = ('docs_topic', 'docs_pair')\n  rates = (1, 2)\n"
    )
    gin_utils.parse([str(path)], [])
    name = copy.deepcopy(gin_utils.macro("MIXTURE_OR_TASK_NAME"))
    assert task_or_mixture(name).get_rate(task_or_mixture("docs_pair")) == 2
