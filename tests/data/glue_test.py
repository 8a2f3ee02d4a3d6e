from pathlib import Path

import pytest
import tensorflow_datasets as tfds
from task_batches import same, take, texts

from variator_jax.data import glue
from variator_jax.data._tf import tf
from variator_jax.data.batches import task_or_mixture
from variator_jax.data.spec import get_spec
from variator_jax.data.vocabulary import T5_VOCABULARIES, byte_vocabulary, docs_vocabulary
from variator_jax.errors import DataError

SHARED = Path(__file__).parents[3] / "shared" / "data"
LENGTHS = {"inputs": 96, "targets": 6}

# Per data set: folder, header and a row of its TSV file, its label in TFDS, the example.
MNLI_HEADER = (
    "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\t"
    "sentence1_parse\tsentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label"
)
CASES = {
    "mnli": (
        *("MNLI", MNLI_HEADER),
        "0\t1\t1n\tfiction\t( a\t( b\t(R a\t(R b\tIt \"rains\tIt's wet.\tx\tneutral",
        {"premise": 'It "rains', "hypothesis": "It's wet.", "label": 1},
        "Sentence 1: It \"rains Sentence 2: It's wet. Does sentence 1 entails sentence 2? "
        "<extra_id_0>.",
        *("<extra_id_0> Maybe", ("Yes", "Maybe", "No")),
    ),
    "qnli": (
        *("QNLI", "index\tquestion\tsentence\tlabel", "0\tWho ran?\tHe ran.\tentailment"),
        {"question": "Who ran?", "sentence": "He ran.", "label": 0},
        "Question: Who ran?\nSentence: He ran.\nDoes the sentence contains the answer to the "
        "question? <extra_id_0>.",
        *("<extra_id_0> Yes", ("Yes", "No")),
    ),
    "qqp": (
        *("QQP", "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate"),
        "7\t1\t2\tIs it?\tWas it?\t1",
        {"question1": "Is it?", "question2": "Was it?", "label": 1},
        "Question 1: Is it?\nQuestion 2: Was it?\nAre the two questions paraphrase of each other? "
        "<extra_id_0>.",
        *("<extra_id_0> Yes", ("No", "Yes")),
    ),
    "rte": (
        *("RTE", "index\tsentence1\tsentence2\tlabel"),
        "0\tNo one came.\tAll came.\tnot_entailment",
        {"sentence1": "No one came.", "sentence2": "All came.", "label": 1},
        "Sentence 1: No one came.\nSentence 2: All came.\nDoes sentence 1 entails sentence 2? "
        "<extra_id_0>.",
        *("<extra_id_0> No", ("Yes", "No")),
    ),
    "sst2": (
        *("SST-2", "sentence\tlabel", "a charming film . \t1"),
        {"sentence": "a charming film . ", "label": 1},
        "Sentence: a charming film .\nDoes this sentence express positive or negative emotions? "
        "<extra_id_0>.",
        *("<extra_id_0> positive", ("negative", "positive")),
    ),
    "mrpc": (
        *("MRPC", "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"),
        '0\t11\t12\tHe said so .\t" She did .',
        {"sentence1": "He said so .", "sentence2": '" She did .', "label": 0},
        'Sentence 1: He said so .\nSentence 2: " She did .\nAre the two sentences paraphrase of '
        "each other? <extra_id_0>.",
        *("<extra_id_0> No", ("No", "Yes")),
    ),
}


@pytest.fixture
def folder(tmp_path):
    """GLUE's folders, each with one row to train and two to validate."""
    for name, (folder, header, row, *_) in CASES.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train.tsv").write_text(f"{header}\n{row}\n")
        dev = "dev_matched.tsv" if name == "mnli" else "dev.tsv"
        (tmp_path / folder / dev).write_text(f"{header}\n{row}\n{row}\n")
    return str(tmp_path)


def _mocked(name):
    """TFDS as it is, but for the rows, three of this one; notes the splits that it was asked."""
    row, asked = {**CASES[name][3], "idx": 0}, []

    def as_dataset(self, *args, split=None, **kwargs):
        asked.append(str(split))
        signature = tf.nest.map_structure(
            lambda feature: tf.TensorSpec(feature.shape, feature.dtype),
            self.info.features.get_tensor_info(),
        )
        return tf.data.Dataset.from_generator(lambda: iter([row] * 3), output_signature=signature)

    return tfds.testing.mock_data(as_dataset_fn=as_dataset), asked


@pytest.mark.parametrize("name", CASES)
def test_published_files_and_tfds_give_the_papers_prompt_and_verbalizer(
    folder, verbalizer_model, name
):
    home, _, _, _, inputs, targets, labels = CASES[name]
    local = glue.glue_task(name, verbalizer_model, folder)
    assert texts(local) == [(inputs, targets)]
    assert texts(local, "validation") == [(inputs, targets)] * 2
    # The data set's own folder will do as well as the one above.
    assert texts(glue.glue_task(name, verbalizer_model, f"{folder}/{home}")) == texts(local)
    task = glue.glue_task(name, verbalizer_model)
    context, asked = _mocked(name)
    options = {"lengths": LENGTHS, "repeat": False}
    with context:
        assert texts(task) == [(inputs, targets)] * 3
        first, last = take(None, task, "validation", 2, pad_last=True, **options)
    assert asked[-1] == ("validation_matched" if name == "mnli" else "validation")
    assert same([first], take(None, local, "validation", 2, **options))
    spec = get_spec(task)
    assert (spec.kind, spec.labels, spec.prefix) == ("classification", labels, "<extra_id_0>")


def test_tfds_rows_are_read_for_ever_and_resumed(verbalizer_model):
    task = glue.glue_task("sst2", verbalizer_model)
    with tfds.testing.mock_data(num_examples=7):
        beginning = take(5, task, size=4, lengths=LENGTHS, seed=1)
        assert same(beginning[3:], take(2, task, size=4, lengths=LENGTHS, seed=1, start_batch=3))


def test_with_t5s_vocabulary_and_tfds_names_are_plain_and_nothing_is_read():
    for url in T5_VOCABULARIES:
        assert [glue.glue_task(name, url) for name in CASES] == list(CASES)


def test_labels_are_in_the_order_of_tfds():
    for dataset in glue.DATASETS.values():
        *_, classes = dataset.read.args
        names = tuple(tfds.builder(dataset.tfds).info.features["label"].names)
        assert classes in (names, ("0", "1")) and len(names) == len(dataset.labels)


def test_other_vocabularies_folders_and_prompts_are_other_tasks(folder, verbalizer_model):
    names = {
        glue.glue_task("rte", verbalizer_model),
        glue.glue_task("rte", verbalizer_model, folder),
        glue.glue_task("rte", verbalizer_model, folder, sentinel=False),
        glue.glue_task("rte", docs_vocabulary(), folder),
        glue.glue_task("rte", None, folder),  # the documentation's again
    }
    assert len(names) == 4


def test_the_mixture_holds_the_six_by_their_sizes(folder, verbalizer_model):
    assert glue.glue_mixture(T5_VOCABULARIES[0]) == "variator_glue"
    name = glue.glue_mixture(verbalizer_model, folder)
    assert name == glue.glue_mixture(verbalizer_model, folder)
    mixture = task_or_mixture(name)
    sizes = [392_702, 104_743, 363_846, 2_490, 67_349, 3_668]
    assert sorted(mixture.get_rate(task) for task in mixture.tasks) == sorted(sizes)
    rte = task_or_mixture(glue.glue_task("rte", verbalizer_model, folder))
    assert mixture.get_rate(rte) == 2_490
    assert len(take(None, name, size=1, lengths=LENGTHS, repeat=False)) == 6
    take(1, name, lengths=LENGTHS)


def test_a_vocabulary_that_lacks_tokens_is_refused_or_does_without(folder):
    task = glue.glue_task("rte", byte_vocabulary(), folder)  # registering reads nothing
    with pytest.raises(DataError, match="<extra_id_0> as one token.*TASK_SENTINEL = False"):
        take(1, task)
    # The tiny documentation vocabulary spells both verbalizers as '_', 'Y' or 'N', ...
    with pytest.raises(DataError, match="both begin with token"):
        take(1, glue.glue_task("rte", docs_vocabulary(), folder))
    task = glue.glue_task("rte", byte_vocabulary(), folder, sentinel=False)
    ((inputs, target),) = texts(task)
    assert inputs.endswith("Does sentence 1 entails sentence 2?") and target == "No"
    assert get_spec(task).prefix == ""


def test_broken_rows_are_named_and_one_in_a_thousand_is_left_out(
    tmp_path, verbalizer_model, caplog
):
    good = [f"text {number}\t{number % 2}" for number in range(1999)]
    (tmp_path / "train.tsv").write_text("\n".join(["sentence\tlabel", "torn", *good]))
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\ngood\t1\nbad\t2\n")
    task = task_or_mixture(glue.glue_task("sst2", verbalizer_model, str(tmp_path)))
    with caplog.at_level("WARNING", logger="absl"):
        assert task.num_input_examples("train") == 1999
    assert "train.tsv:2: 1 columns, expected 2" in caplog.text
    with pytest.raises(DataError, match=r"dev.tsv:3: unknown label '2'. Known: 0, 1"):
        task.num_input_examples("validation")
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "dev.tsv").write_text("sentence\tlabel\n")
    with pytest.raises(DataError, match="no split 'train'"):
        take(1, glue.glue_task("sst2", verbalizer_model, f"{tmp_path}/part"))


def test_wrong_names_and_folders_are_refused_when_registering(tmp_path, verbalizer_model):
    (tmp_path / "glue").mkdir()
    for name, folder, message in (
        ("sst-2", None, "no GLUE task 'sst-2'. Did you mean 'sst2'"),
        ("rte", f"{tmp_path}/gleu", "there is no folder.*Did you mean 'glue'"),
        ("rte", f"{tmp_path}/glue", "none of the files train.tsv, dev.tsv of RTE"),
        ("rte", "gs://bucket/glue", "DATA_DIR is gs://bucket/glue; these files are read from"),
    ):
        with pytest.raises(DataError, match=message):
            glue.glue_task(name, verbalizer_model, folder)
    for name in ("train_a.tsv", "train_b.tsv"):
        (tmp_path / "glue" / name).write_text("sentence\tlabel\n")
    with pytest.raises(DataError, match="several files fit: train_a.tsv, train_b.tsv"):
        glue.glue_task("sst2", verbalizer_model, str(tmp_path / "glue"))


def test_data_that_tfds_cannot_load_is_refused_with_the_way_out(monkeypatch, verbalizer_model):
    def refuse(*args, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr(tfds, "load", refuse)
    with pytest.raises(DataError, match="cannot load 'glue/qqp:2.0.0': no route.*DATA_DIR"):
        take(1, glue.glue_task("qqp", verbalizer_model))


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
    examples = texts(task.name, "validation")
    labels = get_spec(task.name).labels
    assert f": {first}" in examples[0][0]
    assert {targets for _, targets in examples} == {f"<extra_id_0> {label}" for label in labels}
    (batch,) = take(1, task.name, "validation", 2, {"inputs": 96, "targets": 4}, shuffle=False)
    assert (batch["decoder_target_tokens"][:, [0, 2]] == [32099, 1]).all()
    ids = {"Yes": 2163, "No": 465, "negative": 2841, "positive": 1465}  # of the official code
    assert set(batch["decoder_target_tokens"][:, 1]) <= {ids[label] for label in labels}
