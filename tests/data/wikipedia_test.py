import gzip
import subprocess
import sys
from pathlib import Path

import pytest
import tensorflow_datasets as tfds
from task_batches import restored, same, take

from variator_jax.data import wikipedia
from variator_jax.data._tf import seqio, tf
from variator_jax.data.batches import task_or_mixture
from variator_jax.data.spec import get_spec
from variator_jax.data.vocabulary import T5_VOCABULARIES
from variator_jax.errors import DataError

SHARED = Path(__file__).parents[3] / "shared" / "data"
LENGTHS = {"inputs": 64, "targets": 24}


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch):
    """Else a thousand passages would be read before the first batch."""
    monkeypatch.setattr(wikipedia, "_SHUFFLED", 20)


def _words(start, count):
    return " ".join(f"w{number}" for number in range(start, start + count))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "one.txt").write_text(f"{_words(0, 300)}\n{_words(1000, 15)}\n")
    (tmp_path / "two.txt.gz").write_bytes(gzip.compress(f"{_words(2000, 20)}\n".encode()))
    (tmp_path / "wiki_valid.txt").write_text(f"{_words(5000, 130)}\n")
    return str(tmp_path)


def test_articles_are_cut_into_passages_of_128_words_without_short_ends():
    text = f"{_words(0, 256)}\n\n{_words(256, 16)}  \n{_words(272, 120)}"
    articles = tf.data.Dataset.from_tensor_slices({"text": [text, "A stub.", _words(900, 143)]})
    passages = [e["targets"].decode() for e in wikipedia.cut_passages(articles).as_numpy_iterator()]
    assert passages == [_words(0, 128), _words(128, 128), _words(256, 128), _words(900, 128)]


def test_each_passage_of_the_files_is_an_example_of_its_own(folder, verbalizer_model):
    task = wikipedia.wikipedia_task(verbalizer_model, folder)
    assert task == wikipedia.wikipedia_task(verbalizer_model, folder)
    assert get_spec(task).kind == "span_corruption"
    vocabulary = task_or_mixture(task).output_features["inputs"].vocabulary
    passages = {
        "train": [_words(0, 128), _words(128, 128), _words(256, 44), _words(2000, 20)],
        "validation": [_words(5000, 128)],
    }
    for split, expected in passages.items():
        options = {"lengths": {"inputs": 1000, "targets": 300}, "repeat": False}
        (batch,) = take(None, task, split, len(expected), **options)
        columns = batch["encoder_input_tokens"], batch["decoder_target_tokens"]
        base = vocabulary.vocab_size - vocabulary.extra_ids
        rows = [restored(*row, base) for row in zip(*columns, strict=True)]
        assert sorted(rows) == sorted(vocabulary.encode(text) for text in expected)


def test_batches_are_full_resumed_and_every_epoch_draws_new_noise(folder, verbalizer_model):
    task = wikipedia.wikipedia_task(verbalizer_model, folder)
    beginning = take(4, task, size=4, lengths=LENGTHS, seed=3)
    assert same(beginning[2:], take(2, task, size=4, lengths=LENGTHS, seed=3, start_batch=2))
    epochs = [sorted(map(bytes, batch["encoder_input_tokens"])) for batch in beginning]
    assert epochs[0] != epochs[1]
    for batch in beginning:  # long passages are cut to fill the inputs
        assert ((batch["encoder_input_tokens"] > 0).sum(axis=1) >= 62).all()
        assert ((batch["encoder_input_tokens"] == 1).sum(axis=1) == 1).all()


def test_tfds_articles_are_streamed_and_a_hundredth_is_held_out(verbalizer_model):
    asked = []

    def as_dataset(self, *args, split=None, **kwargs):
        asked.append(str(split))
        return tf.data.Dataset.from_tensors({"title": "Words", "text": _words(0, 200)})

    task = wikipedia.wikipedia_task(verbalizer_model)
    with tfds.testing.mock_data(as_dataset_fn=as_dataset):
        for split in ("train", "validation"):
            (batch,) = take(None, task, split, 2, LENGTHS, repeat=False)
            assert (batch["encoder_input_tokens"] > 0).any(axis=1).all()
    assert asked == ["train[:99%]", "train[99%:]"]
    assert wikipedia.wikipedia_task(T5_VOCABULARIES[0]) == "wikipedia_span_corruption"
    assert not seqio.TaskRegistry.get("wikipedia_span_corruption").metric_fns


def test_a_folder_without_text_or_without_validation_is_refused(tmp_path, verbalizer_model):
    with pytest.raises(DataError, match="has no text for train"):
        wikipedia.wikipedia_task(verbalizer_model, str(tmp_path))
    (tmp_path / "wiki.txt").write_text(_words(0, 99))
    with pytest.raises(DataError, match="no text for validation.*'valid' or 'dev'"):
        wikipedia.wikipedia_task(verbalizer_model, str(tmp_path))


def test_a_process_that_reads_for_ever_is_quiet_builds_no_corpus_and_ends(
    folder, tmp_path, verbalizer_model, monkeypatch
):
    monkeypatch.setenv("VARIATOR_CACHE", str(tmp_path / "cache"))
    code = (
        "from variator_jax.data import wikipedia\n"
        "from variator_jax.data.batches import batches\n"
        "wikipedia._SHUFFLED = 20\n"
        f"task = wikipedia.wikipedia_task({verbalizer_model!r}, {folder!r})\n"
        f"stream = batches(task, 'train', 2, {LENGTHS})\n"
        "print(next(stream)['encoder_input_tokens'].shape)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "(2, 64)\n"), result.stderr
    assert result.stderr == "" and not (tmp_path / "cache").exists()


@pytest.mark.skipif(not (SHARED / "wiki").is_dir(), reason="needs Wikipedia's text")
def test_real_articles():
    task = wikipedia.wikipedia_task(SHARED / "vocab" / "t5_spiece.model", str(SHARED / "wiki"))
    (batch,) = take(1, task, "validation", 64, {"inputs": 224, "targets": 48}, shuffle=False)
    filled = (batch["encoder_input_tokens"] > 0).sum(axis=1)
    assert 100 < filled.mean() < 200  # 128 words are some 170 tokens, of which spans are taken
    assert 32_099 in batch["encoder_input_tokens"].max(axis=1)
    (first, *_) = task_or_mixture(task).source.list_shards("train")
    assert "train_00" in first
