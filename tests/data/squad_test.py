import json
from pathlib import Path

import pytest
import tensorflow_datasets as tfds
from task_batches import same, take, texts

from variator_jax.data import squad
from variator_jax.data._tf import tf
from variator_jax.data.batches import accepted_answers, task_or_mixture
from variator_jax.data.spec import get_spec
from variator_jax.data.vocabulary import T5_VOCABULARIES
from variator_jax.errors import DataError

SHARED = Path(__file__).parents[3] / "shared" / "data"
LENGTHS = {"inputs": 96, "targets": 12}
CONTEXT = "The Normans came from Denmark, Iceland and Norway."
INPUTS = f"Question: From where?\nContext: {CONTEXT}\nAnswer: <extra_id_0>"
FIELDS = ("inputs_pretokenized", "targets_pretokenized", "answers")


def _question(text, *answers):
    return {"question": text, "answers": [{"text": answer} for answer in answers]}


def _content(*questions):
    paragraphs = [{"context": CONTEXT, "qas": questions}]
    return json.dumps({"version": "1.1", "data": [{"title": "Normans", "paragraphs": paragraphs}]})


@pytest.fixture
def folder(tmp_path):
    """The two files in SQuAD's own format: one question to train, two to validate."""
    train, who = _question(" From where?", "Denmark"), _question("Who?", "Normans")
    (tmp_path / "train-v1.1.json").write_text(_content(train))
    dev = _content(_question("From where?", "Denmark", "the north"), who)
    (tmp_path / "dev-v1.1.json").write_text(dev)
    return str(tmp_path)


def test_squads_own_files_and_tfds_become_prompts_with_all_answers(folder, verbalizer_model):
    local = squad.squad_task(verbalizer_model, folder)
    assert texts(local, fields=FIELDS) == [(INPUTS, "<extra_id_0> Denmark", "Denmark")]
    first, second = texts(local, "validation", FIELDS)
    assert first == (INPUTS, "<extra_id_0> Denmark", "Denmark\x1fthe north")
    assert second[0].startswith("Question: Who?\n")
    assert accepted_answers(local, "validation") == [["Denmark", "the north"], ["Normans"]]
    spec = get_spec(local)
    assert (spec.kind, spec.prefix, spec.many_answers) == ("generation", "<extra_id_0>", True)

    def as_dataset(self, *args, **kwargs):
        answers = {"text": tf.constant(["Denmark", "the north "]), "answer_start": [0, 0]}
        row = {"question": " From where?", "context": CONTEXT, "answers": answers}
        return tf.data.Dataset.from_tensors({"id": "1", "title": "Normans", **row})

    task = squad.squad_task(verbalizer_model)
    options = {"size": 1, "lengths": LENGTHS, "repeat": False, "shuffle": False}
    with tfds.testing.mock_data(as_dataset_fn=as_dataset):
        assert texts(task, "validation", FIELDS) == [first]
        batches = take(None, task, "validation", **options)
        assert accepted_answers(task, "validation") == [["Denmark", "the north"]]
    assert same(batches, take(1, local, "validation", **options))


def test_tfds_has_the_fields_and_splits_that_are_read(verbalizer_model):
    task = squad.squad_task(verbalizer_model)
    with tfds.testing.mock_data(num_examples=3):
        assert len(texts(task)) == len(texts(task, "validation")) == 3
    assert squad.squad_task(T5_VOCABULARIES[0]) == "squad"


def test_json_lines_and_a_single_split_will_do(tmp_path, verbalizer_model):
    rows = [
        {"question": "Who?", "context": "He.", "answers": ["He"]},
        {"question": "When?", "context": "Now.", "answers": {"text": ["Now", "now"]}},
    ]
    (tmp_path / "train_part.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    task = squad.squad_task(verbalizer_model, str(tmp_path), sentinel=False)
    assert accepted_answers(task, "train") == [["He"], ["Now", "now"]]
    assert texts(task)[0] == ("Question: Who?\nContext: He.\nAnswer:", "He")
    assert set(task_or_mixture(task).splits) == {"train"}


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "is not SQuAD's JSON"),
        ('{"data": [{"paragraphs": [{"qas": [{}]}]}]}', "is not SQuAD's JSON: KeyError 'context'"),
        ('{"data": []}', "has no questions"),
        (_content(_question("q")), "question 1 has no answer.*v1.1"),
    ],
)
def test_other_files_are_refused_when_read(tmp_path, verbalizer_model, content, message):
    (tmp_path / "train-v1.1.json").write_text(content)
    task = squad.squad_task(verbalizer_model, str(tmp_path))
    with pytest.raises(DataError, match=message):
        take(1, task)


@pytest.mark.skipif(not (SHARED / "squad").is_dir(), reason="needs SQuAD's files")
def test_real_questions():
    task = squad.squad_task(SHARED / "vocab" / "t5_spiece.model", str(SHARED / "squad"))
    assert task_or_mixture(task).num_input_examples("train") == 4_000
    inputs, targets = texts(task)[0]
    question = "Question: What caused the Qing armies to lose many battles?\nContext: Early during"
    assert inputs.startswith(question) and targets == "<extra_id_0> Taiping Rebellion"
