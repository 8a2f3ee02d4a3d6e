import gzip
import json
from pathlib import Path

import pytest
import tensorflow_datasets as tfds
from task_batches import parsed_task, restored, same, take, texts

from variator_jax import gin_utils
from variator_jax.data import published
from variator_jax.data._tf import tf
from variator_jax.data.batches import accepted_answers, task_or_mixture
from variator_jax.data.spec import get_spec
from variator_jax.data.vocabulary import T5_VOCABULARIES, byte_vocabulary, docs_vocabulary
from variator_jax.errors import DataError

LENGTHS = {"inputs": 96, "targets": 12}
PASSAGE_LENGTHS = {"inputs": 64, "targets": 24}
ONCE = {"repeat": False, "shuffle": False}
FIELDS = ("inputs_pretokenized", "targets_pretokenized", "answers")
CONTEXT = "The Normans came from Denmark, Iceland and Norway."
GIN_FILES = {"mnli": 256, "qnli": 356, "qqp": 256, "rte": 256, "sst2": 96, "mrpc": 96}
GIN_FILES |= {"variator_glue": 356, "squad": 512, "wikipedia": 224}  # tokens of the inputs
ASKED = f"Question: From where?\nContext: {CONTEXT}\nAnswer: <extra_id_0>"

# Per data set of GLUE: the header and a row of its TSV files, its prompt and verbalizer.
CASES = json.loads((Path(__file__).parents[1] / "golden" / "glue_prompts.json").read_text())


@pytest.fixture
def glue(tmp_path):
    """GLUE's folders, each with one row to train and one to validate."""
    for name, case in CASES.items():
        folder = tmp_path / published.GLUE[name].folder
        folder.mkdir()
        for file in ("train.tsv", "dev_matched.tsv" if name == "mnli" else "dev.tsv"):
            (folder / file).write_text(f"{case['header']}\n{case['row']}\n")
    return str(tmp_path)


def _mocked(row, repeated=1):
    """TFDS as it is, but for the rows, all this one; notes the splits that it was asked for."""
    asked = []

    def as_dataset(self, *args, split=None, **kwargs):
        asked.append(str(split))
        return tf.data.Dataset.from_tensors(row).repeat(repeated)

    return tfds.testing.mock_data(as_dataset_fn=as_dataset), asked


@pytest.mark.parametrize("name", CASES)
def test_glues_files_and_tfds_give_the_papers_prompt_and_verbalizer(glue, verbalizer_model, name):
    case = CASES[name]
    example = (f"{case['prompt']} <extra_id_0>.", f"<extra_id_0> {case['verbalizer']}")
    dataset = published.GLUE[name]
    local = published.glue_task(name, verbalizer_model, glue)
    assert texts(local) == texts(local, "validation") == [example]
    # The data set's own folder will do as well as the one above.
    inner = published.glue_task(name, verbalizer_model, f"{glue}/{dataset.folder}")
    assert inner != local and texts(inner) == texts(local)
    task = published.glue_task(name, verbalizer_model)
    features = tfds.builder(f"glue/{name}:2.0.0").info.features
    (row,) = task_or_mixture(local).source.make("train")
    assert set(row) | {"idx"} == set(features)
    context, asked = _mocked({**row, "label": tf.constant(row["label"], tf.int64)})
    with context:
        made = take(None, task, "validation", 2, LENGTHS, pad_last=True, **ONCE)
    assert asked == ["validation_matched" if name == "mnli" else "validation"]
    assert same(made, take(None, local, "validation", 2, LENGTHS, pad_last=True, **ONCE))
    spec, classes = get_spec(task), features["label"].names
    assert (spec.kind, spec.prefix) == ("classification", "<extra_id_0>")
    assert spec.labels == tuple(dataset.words.values()) and len(classes) == len(dataset.words)
    assert list(dataset.words) in (classes, ["0", "1"])


def test_names_are_plain_with_t5s_vocabulary_and_tfds_and_else_hashed(glue, verbalizer_model):
    for url in T5_VOCABULARIES:
        assert [published.glue_task(name, url) for name in CASES] == list(CASES)
    one, other = (verbalizer_model, glue), (docs_vocabulary(), glue)
    arguments = [(verbalizer_model,), one, (*one, False), other, (None, glue)]  # two are the same
    assert len({published.glue_task("rte", *given) for given in arguments}) == 4
    assert published.glue_mixture(T5_VOCABULARIES[0]) == "variator_glue"


def test_the_mixture_holds_the_six_by_their_sizes(glue, verbalizer_model):
    mixture = task_or_mixture(published.glue_mixture(verbalizer_model, glue))
    rates = sorted(mixture.get_rate(task) for task in mixture.tasks)
    assert rates == [2_490, 3_668, 67_349, 104_743, 363_846, 392_702]


def test_a_vocabulary_that_lacks_tokens_is_refused_or_does_without(glue):
    task = published.glue_task("rte", byte_vocabulary(), glue)  # registering reads nothing
    with pytest.raises(DataError, match="<extra_id_0> as one token.*TASK_SENTINEL = False"):
        take(1, task)
    # The tiny documentation vocabulary spells both verbalizers as '_', 'Y' or 'N', ...
    with pytest.raises(DataError, match="both begin with token"):
        take(1, published.glue_task("rte", docs_vocabulary(), glue))
    plain = published.glue_task("rte", byte_vocabulary(), glue, sentinel=False)
    ((inputs, target),) = texts(plain)
    assert inputs.endswith("Does sentence 1 entails sentence 2?") and target == "No"


def test_one_broken_row_in_a_thousand_is_left_out(tmp_path, verbalizer_model, caplog):
    good = [f"text {number}\t{number % 2}" for number in range(1999)]
    (tmp_path / "train.tsv").write_text("\n".join(["sentence\tlabel", "torn", *good]))
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\ngood\t1\nbad\t2\n")
    task = published.glue_task("sst2", verbalizer_model, str(tmp_path))
    assert task_or_mixture(task).num_input_examples("train") == 1999
    assert "train.tsv:2: 1 columns, expected 2" in caplog.text
    with pytest.raises(DataError, match=r"dev.tsv:3: unknown label '2'. Known: 0, 1"):
        take(1, task, "validation")


def test_parts_of_the_files_under_other_names_are_read(tmp_path, verbalizer_model, caplog):
    (tmp_path / "train_subset.tsv").write_text("sentence\tlabel\ngood\t1\n")
    task = published.glue_task("sst2", verbalizer_model, str(tmp_path))
    assert len(texts(task)) == 1 and "train.tsv is missing" in caplog.text
    row = {"question": "Who? ", "context": "A", "answers": {"text": ["Normans"]}}
    (tmp_path / "train_v1.1_subset.jsonl").write_text(json.dumps(row))
    squad = published.squad_task(verbalizer_model, str(tmp_path))
    assert [target for _, target in texts(squad)] == ["<extra_id_0> Normans"]


def test_wrong_names_and_folders_are_refused_when_registering(tmp_path):
    (tmp_path / "glue").mkdir()
    for name, folder, message in (
        ("sst-2", None, "no GLUE task 'sst-2'. Did you mean 'sst2'"),
        ("rte", f"{tmp_path}/gleu", "there is no local folder.*Did you mean 'glue'"),
        ("rte", f"{tmp_path}/glue", "none of the files train.tsv, dev.tsv of RTE"),
    ):
        with pytest.raises(DataError, match=message):
            published.glue_task(name, None, folder)
    for name in ("dev.tsv.gz", "dev_2.tsv"):
        (tmp_path / "glue" / name).write_text("")
    with pytest.raises(DataError, match="several that may be it: dev.tsv.gz, dev_2.tsv"):
        published.glue_task("rte", None, f"{tmp_path}/glue")
    (tmp_path / "wiki.txt").write_text(_words(0, 99))
    for folder, split in ((tmp_path / "glue", "train"), (tmp_path, "validation")):
        with pytest.raises(DataError, match=f"no .txt or .txt.gz files for {split}"):
            published.wikipedia_task(None, str(folder))


def test_data_that_tfds_cannot_load_is_refused_with_the_way_out(monkeypatch, verbalizer_model):
    def refuse(*args, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr(tfds, "load", refuse)
    with pytest.raises(DataError, match="cannot load 'glue/qqp:2.0.0': no route.*DATA_DIR"):
        take(1, published.glue_task("qqp", verbalizer_model))


def _squad(*questions):
    """SQuAD's own JSON: each question is its text and its answers."""
    asked = [{"question": q, "answers": [{"text": a} for a in said]} for q, *said in questions]
    return json.dumps({"data": [{"paragraphs": [{"context": CONTEXT, "qas": asked}]}]})


def test_squads_own_files_and_tfds_become_prompts_with_all_answers(tmp_path, verbalizer_model):
    asked = (" From where?", "Denmark", "the north")
    (tmp_path / "dev-v1.1.json").write_text(_squad(asked, ("Who?", "Normans")))
    local = published.squad_task(verbalizer_model, str(tmp_path))
    first, second = texts(local, "validation", FIELDS)
    assert first == (ASKED, "<extra_id_0> Denmark", "Denmark\x1fthe north")
    assert second[0].startswith("Question: Who?\n")
    assert accepted_answers(local, "validation") == [["Denmark", "the north"], ["Normans"]]
    spec = get_spec(local)
    assert (spec.kind, spec.prefix, spec.many_answers) == ("generation", "<extra_id_0>", True)
    answers = {"text": tf.constant(["Denmark", "the north "]), "answer_start": [0, 0]}
    row = {"id": "1", "title": "Normans", "question": asked[0], "context": CONTEXT}
    with _mocked({**row, "answers": answers})[0]:
        assert texts(published.squad_task(verbalizer_model), "validation", FIELDS) == [first]


def test_other_files_than_squads_are_refused(tmp_path, verbalizer_model):
    for content, message in (
        ('{"data": [{"paragraphs": [{"qas": [{}]}]}]}', "not SQuAD's JSON: KeyError 'context'"),
        (_squad(("q",)), "expected questions with an answer"),
    ):
        (tmp_path / "train-v1.1.json").write_text(content)
        with pytest.raises(DataError, match=message):
            take(1, published.squad_task(verbalizer_model, str(tmp_path)))


def _words(start, count):
    return " ".join(f"w{number}" for number in range(start, start + count))


@pytest.fixture
def articles(tmp_path, monkeypatch):
    # Else a thousand passages would be read before the first batch.
    monkeypatch.setattr(published, "_PASSAGES_SHUFFLED", 20)
    (tmp_path / "one.txt").write_text(f"{_words(0, 300)}\n{_words(1000, 15)}\n")
    (tmp_path / "two.txt.gz").write_bytes(gzip.compress(f"{_words(2000, 20)}\n".encode()))
    (tmp_path / "wiki_valid.txt").write_text(f"{_words(5000, 130)}\n")
    return str(tmp_path)


def test_each_passage_of_wikipedia_is_an_example_of_its_own(articles, verbalizer_model):
    task = published.wikipedia_task(verbalizer_model, articles)
    assert task == published.wikipedia_task(verbalizer_model, articles)
    assert get_spec(task).kind == "span_corruption" and not task_or_mixture(task).metric_fns
    vocabulary = task_or_mixture(task).output_features["inputs"].vocabulary
    passages = {  # ends of less than 16 words are dropped
        "train": [_words(0, 128), _words(128, 128), _words(256, 44), _words(2000, 20)],
        "validation": [_words(5000, 128)],
    }

    def rows(split, inputs):
        lengths, columns = {"inputs": inputs, "targets": 300}, ("encoder_input", "decoder_target")
        made = take(None, task, split, 1, lengths, repeat=False)
        base = vocabulary.vocab_size - vocabulary.extra_ids
        return [restored(*(batch[f"{c}_tokens"][0] for c in columns), base) for batch in made]

    for split, expected in passages.items():
        assert sorted(rows(split, 1000)) == sorted(vocabulary.encode(text) for text in expected)
    parts = rows("validation", 40)
    whole = vocabulary.encode(_words(5000, 128))
    assert sorted(sum(parts, [])) == sorted(whole) and len(parts) > 2
    sizes = [len(part) for part in parts]  # a long one is parts of equal length, nothing is lost
    assert max(sizes) - min(sizes) <= 1


def test_a_hundredth_of_tfds_wikipedia_is_held_out(verbalizer_model):
    context, asked = _mocked({"title": "Words", "text": _words(0, 200)})
    task = published.wikipedia_task(verbalizer_model)
    with context:
        for split in ("train", "validation"):
            assert take(None, task, split, 2, PASSAGE_LENGTHS, repeat=False)
    assert asked == ["train[:99%]", "train[99%:]"]


@pytest.mark.parametrize("name, inputs", GIN_FILES.items())
def test_gin_files_need_a_vocabulary_and_have_the_papers_lengths(fresh_gin, name, inputs):
    files = ["tasks/text.gin", f"tasks/{name}.gin"]  # stacked, as adaptation stacks them
    task = parsed_task(files, f"VOCABULARY='{T5_VOCABULARIES[1]}'")
    assert task == name.replace("wikipedia", "wikipedia_span_corruption")
    targets = {"squad": 32, "wikipedia": 48}.get(name, 4)
    assert gin_utils.macro("TASK_FEATURE_LENGTHS") == {"inputs": inputs, "targets": targets}
    assert gin_utils.macro("TEXT_FILE") is None


def test_gin_files_take_a_folder_and_no_sentinel(glue, verbalizer_model, fresh_gin):
    bindings = [f"VOCABULARY='{verbalizer_model}'", f"DATA_DIR='{glue}'", "TASK_SENTINEL=False"]
    assert texts(parsed_task(["tasks/sst2.gin"], *bindings))[0][1] == "positive"
