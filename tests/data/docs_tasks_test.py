import collections

import pytest

from variator_jax.data import docs_tasks
from variator_jax.data.docs_tasks import docs_examples_of
from variator_jax.data.spec import get_spec
from variator_jax.data.vocabulary import LABEL_WORDS


def _record(text, package="numpy", name="f", kind="function"):
    return {"package": package, "module": "m", "name": name, "kind": kind, "text": text}


@pytest.mark.parametrize("task", ["docs_topic", "docs_pair", "docs_name"])
def test_splits_share_no_input_inputs_are_unique_and_labels_are_the_specs(task):
    train, validation = (docs_examples_of(task, split) for split in ("train", "validation"))
    inputs = [{e["inputs"] for e in examples} for examples in (train, validation)]
    assert all(inputs) and not inputs[0] & inputs[1]
    assert [len(train), len(validation)] == [len(texts) for texts in inputs]
    labels = get_spec(task).labels
    assert not labels or {e["targets"] for e in train} == set(labels)
    assert set(labels) <= set(LABEL_WORDS)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_every_pair_occurs_in_both_orders_so_its_words_do_not_give_the_answer(split):
    by_words = collections.defaultdict(list)
    for example in docs_examples_of("docs_pair", split):
        words = tuple(sorted(docs_tasks.texts_of(example["inputs"])))
        by_words[words].append(example["targets"])
    assert by_words and all(sorted(labels) == ["no", "yes"] for labels in by_words.values())


def test_pairs_are_in_order_where_the_answer_is_yes():
    records = [_record("This is the opening sentence.\nThat is the second one.\nA third one here.")]
    answers = {e["inputs"]: e["targets"] for e in docs_tasks.pair_examples(records)}
    assert answers == {
        "First: This is the opening sentence. Second: That is the second one.": "yes",
        "First: That is the second one. Second: This is the opening sentence.": "no",
    }


def test_topics_lose_the_words_that_give_them_away_and_ambiguous_texts_are_dropped():
    text = "Convert the numpy.ndarray to a tf.Tensor with jnp.asarray and keras_core for later use."
    (example,) = docs_tasks.topic_examples([_record(text)])
    words = example["inputs"].lower()
    assert example["targets"] == "numpy"
    assert not any(word in words for word in ("numpy", "tf.", "jnp", "keras", "ndarray"))
    both = "This very same text stands in more than one library here."
    assert docs_tasks.topic_examples([_record(both), _record(both, "jax")]) == []


@pytest.mark.parametrize(
    "name, words",
    [
        ("Box.open_lid", ["open", "lid"]),
        ("HTTPServerError", ["http", "server", "error"]),
        ("Box.__init__", []),
        ("a_b", []),
        ("one_two_three_four_five", []),
        ("conv2d", []),
        ("_private_name", ["private", "name"]),
    ],
)
def test_names_become_words(name, words):
    assert docs_tasks.name_words(name) == words


def test_held_out_drops_a_pair_of_which_one_sentence_is_known():
    train, partly, fresh = (
        docs_tasks.pair_examples([_record(text)])
        for text in (
            "This one is known already.\nThis is the other one.",
            "This one is known already.\nHere is something quite new.",
            "Here is a new beginning.\nHere is something quite new.",
        )
    )
    assert docs_tasks.held_out(train, partly + fresh, 10) == fresh
    assert docs_tasks.held_out(train, fresh, 1) == fresh[:1]
