import subprocess
import sys

import pytest

from variator_jax.data.spec import TaskSpec, get_spec, prefix_ids, register_spec, verbalizer_ids
from variator_jax.errors import DataError


def test_a_spec_is_found_again_and_may_be_registered_twice():
    spec = TaskSpec("spec_test_task", "classification", ("no", "yes"))
    assert register_spec(spec) is spec
    register_spec(TaskSpec("spec_test_task", "classification", ("no", "yes")))
    assert get_spec("spec_test_task") == spec


def test_another_spec_of_the_same_name_is_refused():
    register_spec(TaskSpec("spec_test_other", "generation"))
    with pytest.raises(DataError, match="already registered"):
        register_spec(TaskSpec("spec_test_other", "span_corruption"))


def test_an_unknown_name_gives_the_nearest():
    register_spec(TaskSpec("spec_test_sentiment", "generation"))
    with pytest.raises(DataError, match="Did you mean 'spec_test_sentiment'"):
        get_spec("spec_test_sentimant")


@pytest.mark.parametrize(
    "kind, labels, message",
    [
        ("classificaton", (), "Did you mean 'classification'"),
        ("classification", ("yes",), "two labels"),
        ("classification", ("yes", "no", "yes"), "twice"),
        ("generation", ("yes", "no"), "takes no labels"),
    ],
)
def test_a_spec_that_cannot_be_scored_is_refused(kind, labels, message):
    with pytest.raises(DataError, match=message):
        TaskSpec("x", kind, labels)


PAIR = TaskSpec("pair", "classification", ("yes", "no"))


def test_verbalizers_are_known_by_their_first_token():
    assert verbalizer_ids(PAIR, {"yes": [11], "no": [12, 5]}.__getitem__) == [11, 12]


@pytest.mark.parametrize(
    "tokens, message",
    [
        ([11, 6], "'yes' and 'no' both begin with token 11"),
        ([], "'no' encodes to no token"),
        ([1], "'no' encodes to no token"),
        ([2, 7], "cannot spell the verbalizer 'no'"),
    ],
)
def test_verbalizers_that_the_first_token_does_not_tell_apart_are_refused(tokens, message):
    with pytest.raises(DataError, match=message):
        verbalizer_ids(PAIR, {"yes": [11], "no": tokens}.__getitem__, unknown_id=2)


def test_only_classification_has_verbalizers():
    with pytest.raises(DataError, match="is generation, so it has no verbalizers"):
        verbalizer_ids(TaskSpec("x", "generation"), lambda text: [5])


def test_neither_spec_corpus_rows_nor_noise_import_tensorflow():
    code = (
        "import sys; sys.modules['tensorflow'] = sys.modules['seqio'] = None\n"
        "import variator_jax.data.spec, variator_jax.data.corpus\n"
        "import variator_jax.data.rows, variator_jax.data.noise"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_behind_a_prefix_the_verbalizer_begins_after_it():
    spec = TaskSpec("pair", "classification", ("yes", "no"), prefix="<s>")
    words = {"<s>": [9], "<s> yes": [9, 11], "<s> no": [9, 12, 5]}
    assert verbalizer_ids(spec, words.__getitem__) == [11, 12]
    assert prefix_ids(spec, words.__getitem__) == [9]
    assert spec.target("yes") == "<s> yes" and PAIR.target("yes") == "yes"
    assert prefix_ids(PAIR, words.__getitem__) == []


@pytest.mark.parametrize("tokens", [[], [2], [9, 8]])
def test_a_prefix_that_is_no_token_is_refused(tokens):
    spec = TaskSpec("pair", "generation", prefix="<s>")
    with pytest.raises(DataError, match="needs <s> as one token"):
        prefix_ids(spec, lambda _: tokens, unknown_id=2)


@pytest.mark.parametrize(
    "kind, fields, message",
    [
        ("span_corruption", {"prefix": "<s>"}, "takes no prefix"),
        ("classification", {"labels": ("a", "b"), "many_answers": True}, "one answer an example"),
    ],
)
def test_fields_that_do_not_suit_the_kind_are_refused(kind, fields, message):
    with pytest.raises(DataError, match=message):
        TaskSpec("x", kind, **fields)
