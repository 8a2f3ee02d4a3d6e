import json
from pathlib import Path

import pytest
import tensorflow_datasets as tfds

from variator_jax.data import squad
from variator_jax.data._tf import seqio, tf
from variator_jax.data.batches import accepted_answers, batches, task_or_mixture
from variator_jax.data.spec import get_spec
from variator_jax.data.vocabulary import T5_VOCABULARIES
from variator_jax.errors import DataError

SHARED = Path(__file__).parents[3] / "shared" / "data"
CONTEXT = "The Normans came from Denmark, Iceland and Norway."
INPUTS = f"Question: From where?\nContext: {CONTEXT}\nAnswer: <extra_id_0>"


def _question(text, *answers):
    found = [{"text": answer, "answer_start": 0} for answer in answers]
    return {"id": text, "question": text, "answers": found}


def _write(folder):
    """The two files in SQuAD's own format: one question to train, two to validate."""
    questions = {
        "train": [_question(" From where?", "Denmark")],
        "dev": [_question("From where?", "Denmark", "the north"), _question("Who?", "Normans")],
    }
    for split, asked in questions.items():
        paragraphs = [{"context": CONTEXT, "qas": asked}]
        content = {"version": "1.1", "data": [{"title": "Normans", "paragraphs": paragraphs}]}
        (folder / f"{split}-v1.1.json").write_text(json.dumps(content))
    return str(folder)


def _examples(task, split):
    dataset = seqio.get_mixture_or_task(task).get_dataset(None, split, shuffle=False)
    fields = ("inputs_pretokenized", "targets_pretokenized", "answers")
    return [tuple(e[key].decode() for key in fields) for e in dataset.as_numpy_iterator()]


def test_squads_own_files_become_prompts_with_all_answers(tmp_path, verbalizer_model):
    task = squad.squad_task(verbalizer_model, _write(tmp_path))
    assert _examples(task, "train") == [(INPUTS, "<extra_id_0> Denmark", "Denmark")]
    first, second = _examples(task, "validation")
    assert first == (INPUTS, "<extra_id_0> Denmark", "Denmark\x1fthe north")
    assert second[0].startswith("Question: Who?\n")
    assert accepted_answers(task, "validation") == [["Denmark", "the north"], ["Normans"]]
    spec = get_spec(task)
    assert (spec.kind, spec.prefix, spec.many_answers) == ("generation", "<extra_id_0>", True)
    assert spec.answer("<extra_id_0> Denmark <extra_id_1> and more") == "Denmark"


def test_tfds_gives_the_same_examples(tmp_path, verbalizer_model):
    def as_dataset(self, *args, **kwargs):
        answers = {"text": tf.constant(["Denmark", "the north "]), "answer_start": [0, 0]}
        row = {"question": " From where?", "context": CONTEXT, "answers": answers}
        return tf.data.Dataset.from_tensors({"id": "1", "title": "Normans", **row})

    task = squad.squad_task(verbalizer_model)
    with tfds.testing.mock_data(as_dataset_fn=as_dataset):
        (found,) = _examples(task, "validation")
        lengths = {"inputs": 96, "targets": 12}
        (batch,) = batches(task, "validation", 1, lengths, repeat=False)
        assert accepted_answers(task, "validation") == [["Denmark", "the north"]]
    local = squad.squad_task(verbalizer_model, _write(tmp_path))
    assert found == _examples(local, "validation")[0]
    (expected, _) = batches(local, "validation", 1, lengths, repeat=False, shuffle=False)
    assert all((batch[key] == value).all() for key, value in expected.items())


def test_tfds_has_the_fields_and_splits_that_are_read(verbalizer_model):
    task = squad.squad_task(verbalizer_model)
    with tfds.testing.mock_data(num_examples=3):
        assert len(_examples(task, "train")) == 3
    info = tfds.builder(squad.TFDS).info
    assert {"question", "context", "answers"} <= set(info.features)
    assert squad.squad_task(T5_VOCABULARIES[0]) == "squad"


def test_json_lines_and_a_single_split_will_do(tmp_path, verbalizer_model):
    rows = [
        {"question": "Who?", "context": "He.", "answers": ["He"]},
        {"question": "When?", "context": "Now.", "answers": {"text": ["Now", "now"]}},
    ]
    lines = "\n".join(json.dumps(row) for row in rows)
    (tmp_path / "train_part.jsonl").write_text(lines + "\n")
    task = squad.squad_task(verbalizer_model, str(tmp_path))
    assert accepted_answers(task, "train") == [["He"], ["Now", "now"]]
    assert set(task_or_mixture(task).splits) == {"train"}


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "is not SQuAD's JSON"),
        ('{"data": [{"paragraphs": [{"qas": [{}]}]}]}', "is not SQuAD's JSON: KeyError 'context'"),
        ('{"data": []}', "has no questions"),
        (
            '{"data": [{"paragraphs": [{"context": "c", "qas": '
            '[{"question": "q", "answers": []}]}]}]}',
            "question 1 has no answer.*v1.1",
        ),
    ],
)
def test_other_files_are_refused_when_read(tmp_path, verbalizer_model, content, message):
    (tmp_path / "train-v1.1.json").write_text(content)
    task = squad.squad_task(verbalizer_model, str(tmp_path))
    with pytest.raises(DataError, match=message):
        next(batches(task, "train", 1, {"inputs": 8, "targets": 8}))


@pytest.mark.skipif(not (SHARED / "squad").is_dir(), reason="needs SQuAD's files")
def test_real_questions():
    task = squad.squad_task(SHARED / "vocab" / "t5_spiece.model", str(SHARED / "squad"))
    assert task_or_mixture(task).num_input_examples("train") == 4_000
    example = task_or_mixture(task).source.make("train")[0]
    question = "Question: What caused the Qing armies to lose many battles?\nContext: Early during"
    assert example["inputs"].startswith(question)
    assert example["targets"] == "<extra_id_0> Taiping Rebellion"
