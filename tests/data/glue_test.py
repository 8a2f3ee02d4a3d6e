from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from variator_jax.data import glue
from variator_jax.data._tf import seqio, tf
from variator_jax.data.batches import batches, task_or_mixture
from variator_jax.data.spec import get_spec
from variator_jax.data.vocabulary import T5_VOCABULARIES, byte_vocabulary, docs_vocabulary
from variator_jax.errors import DataError

SHARED = Path(__file__).parents[3] / "shared" / "data"
LENGTHS = {"inputs": 96, "targets": 6}

# Per data set: a row of its TSV file, with the header; the row as TFDS gives it; the example.
MNLI_HEADER = (
    "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\t"
    "sentence1_parse\tsentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label"
)
CASES = {
    "mnli": (
        "MNLI/train.tsv",
        [MNLI_HEADER, "0\t1\t1n\tfiction\t( a\t( b\t(R a\t(R b\tIt \"rains\tIt's wet.\tx\tneutral"],
        {"premise": 'It "rains', "hypothesis": "It's wet.", "label": 1, "idx": 0},
        "Sentence 1: It \"rains Sentence 2: It's wet. Does sentence 1 entails sentence 2? "
        "<extra_id_0>.",
        "<extra_id_0> Maybe",
    ),
    "qnli": (
        "QNLI/train.tsv",
        ["index\tquestion\tsentence\tlabel", "0\tWho ran?\tHe ran.\tentailment"],
        {"question": "Who ran?", "sentence": "He ran.", "label": 0, "idx": 0},
        "Question: Who ran?\nSentence: He ran.\nDoes the sentence contains the answer to the "
        "question? <extra_id_0>.",
        "<extra_id_0> Yes",
    ),
    "qqp": (
        "QQP/train.tsv",
        ["id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "7\t1\t2\tIs it?\tWas it?\t1"],
        {"question1": "Is it?", "question2": "Was it?", "label": 1, "idx": 0},
        "Question 1: Is it?\nQuestion 2: Was it?\nAre the two questions paraphrase of each other? "
        "<extra_id_0>.",
        "<extra_id_0> Yes",
    ),
    "rte": (
        "RTE/train.tsv",
        ["index\tsentence1\tsentence2\tlabel", "0\tNo one came.\tAll came.\tnot_entailment"],
        {"sentence1": "No one came.", "sentence2": "All came.", "label": 1, "idx": 0},
        "Sentence 1: No one came.\nSentence 2: All came.\nDoes sentence 1 entails sentence 2? "
        "<extra_id_0>.",
        "<extra_id_0> No",
    ),
    "sst2": (
        "SST-2/train.tsv",
        ["sentence\tlabel", "a charming film . \t1"],
        {"sentence": "a charming film . ", "label": 1, "idx": 0},
        "Sentence: a charming film .\nDoes this sentence express positive or negative emotions? "
        "<extra_id_0>.",
        "<extra_id_0> positive",
    ),
    "mrpc": (
        "MRPC/train.tsv",
        ["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", '0\t11\t12\tHe said so .\t" She did .'],
        {"sentence1": "He said so .", "sentence2": '" She did .', "label": 0, "idx": 0},
        'Sentence 1: He said so .\nSentence 2: " She did .\nAre the two sentences paraphrase of '
        "each other? <extra_id_0>.",
        "<extra_id_0> No",
    ),
}


def _write(root, name):
    path, rows, *_ = CASES[name]
    train = root / path
    train.parent.mkdir(parents=True, exist_ok=True)
    train.write_text("\n".join(rows) + "\n")
    dev = "dev_matched.tsv" if name == "mnli" else "dev.tsv"
    (train.parent / dev).write_text("\n".join([rows[0], rows[1], rows[1]]) + "\n")
    return str(root)


def _first(task, split="train"):
    dataset = seqio.get_mixture_or_task(task).get_dataset(None, split, shuffle=False)
    return next(dataset.as_numpy_iterator())


def _texts(example):
    return [example[f"{key}_pretokenized"].decode() for key in ("inputs", "targets")]


@pytest.mark.parametrize("name", CASES)
def test_a_published_file_becomes_the_papers_prompt_and_verbalizer(
    tmp_path, verbalizer_model, name
):
    task = glue.glue_task(name, verbalizer_model, _write(tmp_path, name))
    *_, inputs, targets = CASES[name]
    assert _texts(_first(task)) == [inputs, targets]
    provider = task_or_mixture(task)
    assert [provider.num_input_examples(s) for s in ("train", "validation")] == [1, 2]
    # GLUE's folder itself will do as well as the one above.
    home = tmp_path / CASES[name][0].split("/")[0]
    assert _texts(_first(glue.glue_task(name, verbalizer_model, str(home)))) == [inputs, targets]


def _mocked(row):
    """TFDS as it is, but for the rows, which are always this one; notes the splits it was asked."""
    asked = []

    def as_dataset(self, *args, split=None, **kwargs):
        asked.append(str(split))
        signature = tf.nest.map_structure(
            lambda feature: tf.TensorSpec(feature.shape, feature.dtype),
            self.info.features.get_tensor_info(),
        )
        return tf.data.Dataset.from_generator(lambda: iter([row] * 3), output_signature=signature)

    return tfds.testing.mock_data(as_dataset_fn=as_dataset), asked


@pytest.mark.parametrize("name", CASES)
def test_tfds_gives_the_same_examples_as_the_files(tmp_path, verbalizer_model, name):
    _, _, row, inputs, targets = CASES[name]
    task = glue.glue_task(name, verbalizer_model)
    context, asked = _mocked(row)
    with context:
        assert _texts(_first(task)) == [inputs, targets]
        streamed = list(batches(task, "validation", 2, LENGTHS, repeat=False, pad_last=True))
    assert asked[-1] == ("validation_matched" if name == "mnli" else "validation")
    local = glue.glue_task(name, verbalizer_model, _write(tmp_path, name))
    (expected,) = batches(local, "validation", 2, LENGTHS, repeat=False)
    assert len(streamed) == 2  # 3 rows
    for key, value in expected.items():
        np.testing.assert_array_equal(streamed[0][key], value)


def test_tfds_rows_are_streamed_for_ever_and_resumed(verbalizer_model):
    task = glue.glue_task("sst2", verbalizer_model)
    with tfds.testing.mock_data(num_examples=7):
        one = batches(task, "train", 4, LENGTHS, seed=1)
        found = [next(one) for _ in range(5)]
        again = batches(task, "train", 4, LENGTHS, seed=1, start_batch=3)
        for expected in found[3:]:
            batch = next(again)
            assert all((batch[key] == value).all() for key, value in expected.items())


@pytest.mark.parametrize(
    "name, labels",
    [
        ("mnli", ("Yes", "Maybe", "No")),
        ("qnli", ("Yes", "No")),
        ("qqp", ("No", "Yes")),
        ("rte", ("Yes", "No")),
        ("sst2", ("negative", "positive")),
        ("mrpc", ("No", "Yes")),
    ],
)
def test_with_t5s_vocabulary_and_tfds_names_are_plain_and_nothing_is_read(name, labels):
    for url in T5_VOCABULARIES:
        assert glue.glue_task(name, url) == glue.glue_task(name, url) == name
    spec = get_spec(name)
    assert (spec.kind, spec.labels, spec.prefix) == ("classification", labels, "<extra_id_0>")


def test_labels_are_in_the_order_of_tfds(verbalizer_model):
    for dataset in glue.DATASETS.values():
        classes = tfds.builder(dataset.tfds).info.features["label"].names
        assert len(classes) == len(dataset.classes) == len(dataset.verbalizers)
        if dataset.classes[0] != "0":  # else the files have the numbers
            assert tuple(classes) == dataset.classes


def test_other_vocabularies_folders_and_prompts_are_other_tasks(tmp_path, verbalizer_model):
    folder = _write(tmp_path, "rte")
    names = {
        glue.glue_task("rte", verbalizer_model),
        glue.glue_task("rte", verbalizer_model, folder),
        glue.glue_task("rte", verbalizer_model, folder, sentinel=False),
        glue.glue_task("rte", docs_vocabulary(), folder),
        glue.glue_task("rte", None, folder),  # the documentation's again
        glue.glue_task("rte", verbalizer_model, folder, task_name="my_rte"),
    }
    assert len(names) == 5 and "my_rte" in names
    with pytest.raises(DataError, match="'my_rte' is already registered"):
        glue.glue_task("rte", verbalizer_model, task_name="my_rte")


def test_the_mixture_holds_the_six_by_their_sizes(tmp_path, verbalizer_model):
    for name in CASES:
        folder = _write(tmp_path, name)
    assert glue.glue_mixture(T5_VOCABULARIES[0]) == "variator_glue"
    name = glue.glue_mixture(verbalizer_model, folder)
    assert name == glue.glue_mixture(verbalizer_model, folder)
    mixture = task_or_mixture(name)
    sizes = [392_702, 104_743, 363_846, 2_490, 67_349, 3_668]
    assert sorted(mixture.get_rate(task) for task in mixture.tasks) == sorted(sizes)
    assert (
        mixture.get_rate(task_or_mixture(glue.glue_task("rte", verbalizer_model, folder))) == 2_490
    )
    assert len(list(batches(name, "train", 1, LENGTHS, repeat=False))) == 6
    next(batches(name, "train", 8, LENGTHS))


def test_a_vocabulary_without_the_sentinel_is_refused_or_does_without(tmp_path):
    folder = _write(tmp_path, "rte")
    task = glue.glue_task("rte", byte_vocabulary(), folder)  # registering reads nothing
    with pytest.raises(DataError, match="<extra_id_0> as one token.*TASK_SENTINEL = False"):
        next(batches(task, "train", 1, LENGTHS))
    with pytest.raises(DataError, match="<extra_id_0> as one token"):
        with _mocked(CASES["rte"][2])[0]:
            _first(glue.glue_task("rte", byte_vocabulary()))
    task = glue.glue_task("rte", byte_vocabulary(), folder, sentinel=False)
    inputs, target = _texts(_first(task))
    assert inputs.endswith("Does sentence 1 entails sentence 2?") and target == "No"
    next(batches(task, "train", 1, LENGTHS))
    assert get_spec(task).prefix == ""


def test_verbalizers_that_begin_alike_are_refused(tmp_path):
    # The tiny documentation vocabulary spells both as '_', 'Y' or 'N', ...
    task = glue.glue_task("rte", docs_vocabulary(), _write(tmp_path, "rte"))
    with pytest.raises(DataError, match="both begin with token"):
        next(batches(task, "train", 1, LENGTHS))


def test_broken_rows_are_named_and_one_in_a_thousand_is_left_out(
    tmp_path, verbalizer_model, caplog
):
    good = [f"text {number}\t{number % 2}" for number in range(1999)]
    (tmp_path / "train.tsv").write_text("\n".join(["sentence\tlabel", "torn", *good]))
    with caplog.at_level("WARNING", logger="absl"):
        task = glue.glue_task("sst2", verbalizer_model, str(tmp_path))
        assert task_or_mixture(task).num_input_examples("train") == 1999
    assert "train.tsv:2: 1 columns, expected 2" in caplog.text
    (tmp_path / "few").mkdir()
    (tmp_path / "few" / "dev.tsv").write_text("sentence\tlabel\ngood\t1\nbad\t2\n")
    task = glue.glue_task("sst2", verbalizer_model, str(tmp_path / "few"))
    with pytest.raises(DataError, match=r"dev.tsv:3: unknown label '2'. Known: 0, 1"):
        task_or_mixture(task).num_input_examples("validation")
    with pytest.raises(DataError, match="no split 'train'"):
        batches(task, "train", 1, LENGTHS)


def test_what_is_not_there_is_told_when_registering(tmp_path, verbalizer_model):
    with pytest.raises(DataError, match="no GLUE task 'sst-2'. Did you mean 'sst2'"):
        glue.glue_task("sst-2", verbalizer_model)
    (tmp_path / "glue").mkdir()
    with pytest.raises(DataError, match="there is no folder.*Did you mean 'glue'"):
        glue.glue_task("rte", verbalizer_model, str(tmp_path / "gleu"))
    with pytest.raises(DataError, match="none of the files train.tsv, dev.tsv of RTE"):
        glue.glue_task("rte", verbalizer_model, str(tmp_path / "glue"))
    with pytest.raises(DataError, match="DATA_DIR is gs://bucket/glue; these files are read from"):
        glue.glue_task("rte", verbalizer_model, "gs://bucket/glue")
    for name in ("train_a.tsv", "train_b.tsv"):
        (tmp_path / "glue" / name).write_text("sentence\tlabel\n")
    with pytest.raises(DataError, match="several files fit: train_a.tsv, train_b.tsv"):
        glue.glue_task("sst2", verbalizer_model, str(tmp_path / "glue"))


def test_data_that_tfds_cannot_load_is_told_with_the_way_out(monkeypatch, verbalizer_model):
    def refuse(*args, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr(tfds, "load", refuse)
    task = glue.glue_task("qqp", verbalizer_model)
    with pytest.raises(DataError, match="cannot load 'glue/qqp:2.0.0': no route.*DATA_DIR"):
        next(batches(task, "train", 1, LENGTHS))


@pytest.mark.skipif(not (SHARED / "glue").is_dir(), reason="needs GLUE's files")
@pytest.mark.parametrize(
    "name, rows, first",
    [
        ("sst2", (67_349, 872), "it 's a charming and often affecting journey ."),
        ("rte", (2_490, 277), "Dana Reeve, the widow of the actor Christopher Reeve, has died"),
        ("mrpc", (3_668, 408), "He said the foodservice pie business doesn 't fit the company"),
        ("qnli", (9_999, 5_463), "What came into force after the new constitution was herald?"),
    ],
)
def test_the_published_files_have_the_published_rows(name, rows, first):
    vocabulary = SHARED / "vocab" / "t5_spiece.model"
    task = task_or_mixture(glue.glue_task(name, vocabulary, str(SHARED / "glue")))
    assert (task.num_input_examples("train"), task.num_input_examples("validation")) == rows
    example = task.source.make("validation")[0]
    assert f": {first}" in example["inputs"]
    labels = get_spec(task.name).labels
    found = {row["targets"] for split in task.splits for row in task.source.make(split)}
    assert found == {f"<extra_id_0> {label}" for label in labels}
    batch = next(batches(task.name, "validation", 2, {"inputs": 96, "targets": 4}, shuffle=False))
    assert (batch["decoder_target_tokens"][:, [0, 2]] == [32099, 1]).all()
    ids = {"Yes": 2163, "No": 465, "negative": 2841, "positive": 1465}  # paper_facts
    assert set(batch["decoder_target_tokens"][:, 1]) <= {ids[label] for label in labels}
