import gzip
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from variator_jax.data import wikipedia
from variator_jax.data._tf import seqio, tf
from variator_jax.data.batches import batches, task_or_mixture
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


def _write(folder):
    (folder / "one.txt").write_text(f"{_words(0, 300)}\n{_words(1000, 15)}\n")
    (folder / "two.txt.gz").write_bytes(gzip.compress(f"{_words(2000, 20)}\n".encode()))
    (folder / "wiki_valid.txt").write_text(f"{_words(5000, 130)}\n")
    return str(folder)


def test_articles_are_cut_into_passages_of_128_words_without_short_ends():
    text = f"{_words(0, 256)}\n\n{_words(256, 16)}  \n{_words(272, 120)}"
    articles = tf.data.Dataset.from_tensor_slices({"text": [text, "A stub.", _words(900, 143)]})
    passages = [e["targets"].decode() for e in wikipedia.cut_passages(articles).as_numpy_iterator()]
    assert passages == [_words(0, 128), _words(128, 128), _words(256, 128), _words(900, 128)]


def _restored(batch, base):
    """The passages that a batch was made from: tokens without sentinels, one list a row."""
    rows = []
    for inputs, targets in zip(
        batch["encoder_input_tokens"], batch["decoder_target_tokens"], strict=True
    ):
        spans = np.split(targets, np.flatnonzero(targets >= base))[1:]
        by_sentinel = {span[0]: [int(t) for t in span[1:] if t > 1] for span in spans}
        pieces = [by_sentinel[t] if t >= base else [int(t)] for t in inputs if t > 1]
        rows.append(list(itertools.chain.from_iterable(pieces)))
    return rows


def test_each_passage_of_the_files_is_an_example_of_its_own(tmp_path, verbalizer_model):
    task = wikipedia.wikipedia_task(verbalizer_model, _write(tmp_path))
    assert task == wikipedia.wikipedia_task(verbalizer_model, str(tmp_path))
    assert get_spec(task).kind == "span_corruption"
    lengths = {"inputs": 1000, "targets": 300}
    vocabulary = task_or_mixture(task).output_features["inputs"].vocabulary
    passages = [_words(0, 128), _words(128, 128), _words(256, 44), _words(2000, 20)]
    (batch,) = batches(task, "train", 4, lengths, repeat=False)
    base = vocabulary.vocab_size - vocabulary.extra_ids
    assert sorted(_restored(batch, base)) == sorted(vocabulary.encode(text) for text in passages)
    (batch,) = batches(task, "validation", 1, lengths, repeat=False)
    assert _restored(batch, base) == [vocabulary.encode(_words(5000, 128))]


def test_long_passages_are_cut_to_fill_the_inputs(tmp_path, verbalizer_model):
    task = wikipedia.wikipedia_task(verbalizer_model, _write(tmp_path))
    for batch in itertools.islice(batches(task, "train", 4, LENGTHS), 3):
        assert ((batch["encoder_input_tokens"] > 0).sum(axis=1) >= 62).all()
        assert ((batch["encoder_input_tokens"] == 1).sum(axis=1) == 1).all()


def test_batches_are_resumed_and_every_epoch_draws_new_noise(tmp_path, verbalizer_model):
    task = wikipedia.wikipedia_task(verbalizer_model, _write(tmp_path))
    found = list(itertools.islice(batches(task, "train", 4, LENGTHS, seed=3), 4))
    again = batches(task, "train", 4, LENGTHS, seed=3, start_batch=2)
    for expected, batch in zip(found[2:], again, strict=False):
        assert all((batch[key] == value).all() for key, value in expected.items())
    epochs = [sorted(map(bytes, batch["encoder_input_tokens"])) for batch in found]
    assert epochs[0] != epochs[1]


def test_tfds_articles_are_streamed_and_a_hundredth_is_held_out(verbalizer_model):
    asked = []

    def as_dataset(self, *args, split=None, **kwargs):
        asked.append(str(split))
        return tf.data.Dataset.from_tensors({"title": "Words", "text": _words(0, 200)})

    task = wikipedia.wikipedia_task(verbalizer_model)
    with tfds.testing.mock_data(as_dataset_fn=as_dataset):
        for split in ("train", "validation"):
            (batch,) = batches(task, split, 2, LENGTHS, repeat=False)
            assert (batch["encoder_input_tokens"] > 0).any(axis=1).all()
    assert [str(one) for one in asked] == ["train[:99%]", "train[99%:]"]
    assert wikipedia.wikipedia_task(T5_VOCABULARIES[0]) == "wikipedia_span_corruption"
    assert not seqio.TaskRegistry.get("wikipedia_span_corruption").metric_fns


def test_a_folder_without_text_or_without_validation_is_refused(tmp_path, verbalizer_model):
    with pytest.raises(DataError, match="has no text for train"):
        wikipedia.wikipedia_task(verbalizer_model, str(tmp_path))
    (tmp_path / "wiki.txt").write_text(_words(0, 99))
    with pytest.raises(DataError, match="no text for validation.*'valid' or 'dev'"):
        wikipedia.wikipedia_task(verbalizer_model, str(tmp_path))


def test_a_process_that_reads_for_ever_still_ends(tmp_path, verbalizer_model):
    code = (
        "from variator_jax.data import wikipedia\n"
        "from variator_jax.data.batches import batches\n"
        "wikipedia._SHUFFLED = 20\n"
        f"task = wikipedia.wikipedia_task({verbalizer_model!r}, {_write(tmp_path)!r})\n"
        f"stream = batches(task, 'train', 2, {LENGTHS})\n"
        "print(next(stream)['encoder_input_tokens'].shape)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "(2, 64)\n"), result.stderr


@pytest.mark.skipif(not (SHARED / "wiki").is_dir(), reason="needs Wikipedia's text")
def test_real_articles(tmp_path):
    task = wikipedia.wikipedia_task(SHARED / "vocab" / "t5_spiece.model", str(SHARED / "wiki"))
    lengths = {"inputs": 224, "targets": 48}
    batch = next(batches(task, "validation", 64, lengths, shuffle=False))
    filled = (batch["encoder_input_tokens"] > 0).sum(axis=1)
    assert 100 < filled.mean() < 200  # 128 words are some 170 tokens, of which spans are taken
    assert 32_099 in batch["encoder_input_tokens"].max(axis=1)
    (first, *_) = task_or_mixture(task).source.list_shards("train")
    assert "train_00" in first
