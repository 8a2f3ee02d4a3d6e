import collections
import subprocess
import sys

import pytest

from variator_jax.data import docs_examples
from variator_jax.data.docs_tasks import docs_examples_of
from variator_jax.data.spec import get_spec
from variator_jax.data.vocabulary import LABEL_WORDS

TASKS = ("docs_topic", "docs_pair", "docs_name")


def _record(text, package="numpy", name="f", kind="function"):
    return {"package": package, "module": "m", "name": name, "kind": kind, "text": text}


@pytest.mark.parametrize("task", TASKS)
def test_splits_share_no_input_and_inputs_are_unique(task):
    inputs = {s: [e["inputs"] for e in docs_examples_of(task, s)] for s in ("train", "validation")}
    assert inputs["train"] and inputs["validation"]
    assert not set(inputs["train"]) & set(inputs["validation"])
    assert all(len(set(texts)) == len(texts) for texts in inputs.values())


@pytest.mark.parametrize("task", ["docs_topic", "docs_pair"])
def test_labels_are_those_of_the_spec_and_one_piece_each(task):
    labels = get_spec(task).labels
    assert {e["targets"] for e in docs_examples_of(task, "train")} == set(labels)
    assert set(labels) <= set(LABEL_WORDS)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_every_pair_occurs_in_both_orders_so_its_words_say_nothing(split):
    by_words = collections.defaultdict(list)
    for example in docs_examples_of("docs_pair", split):
        words = tuple(sorted(docs_examples.pair_sentences(example["inputs"])))
        by_words[words].append(example["targets"])
    assert by_words and all(sorted(labels) == ["no", "yes"] for labels in by_words.values())


def test_pairs_are_in_order_where_the_answer_is_yes():
    records = [_record("This is the opening sentence.\nThat is the second one.\nA third one here.")]
    answers = {e["inputs"]: e["targets"] for e in docs_examples.pair_examples(records)}
    prompt = docs_examples.PAIR_PROMPT
    first, second = "This is the opening sentence.", "That is the second one."
    assert answers == {
        prompt.format(first=first, second=second): "yes",
        prompt.format(first=second, second=first): "no",
    }


def test_topics_lose_the_words_that_give_them_away_and_ambiguous_texts_go():
    text = "Convert the numpy.ndarray to a tf.Tensor with jnp.asarray and keras_core for later use."
    (example,) = docs_examples.topic_examples([_record(text)])
    words = example["inputs"].lower()
    assert example["targets"] == "numpy"
    assert not any(word in words for word in ("numpy", "tf.", "jnp", "keras", "ndarray"))
    both = "This very same text stands in more than one library here."
    assert docs_examples.topic_examples([_record(both), _record(both, "jax")]) == []


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
    assert docs_examples.name_words(name) == words


def test_held_out_drops_a_pair_of_which_one_sentence_is_known():
    def pairs(first, second):
        return docs_examples.pair_examples([_record(f"{first}\n{second}")])

    train = pairs("This one is known already.", "This is the other one.")
    partly = pairs("This one is known already.", "Here is something quite new.")
    fresh = pairs("Here is a new beginning.", "Here is something quite new.")
    assert docs_examples.held_out(train, partly + fresh, True, 10) == fresh
    assert docs_examples.held_out(train, fresh, True, 1) == fresh[:1]


def test_registering_the_tasks_builds_nothing(tmp_path):
    code = "import variator_jax.data.docs_tasks, variator_jax.data.batches"
    result = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        env={"VARIATOR_CACHE": str(tmp_path / "cache"), "PYTHONPATH": ":".join(sys.path)},
    )
    assert not (tmp_path / "cache").exists()
    assert result.stderr == ""  # and TensorFlow keeps quiet
