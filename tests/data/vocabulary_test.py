import hashlib
import pickle
from pathlib import Path

import pytest
import seqio

from variator_jax.backbones.t5 import get_config
from variator_jax.data import docs_corpus
from variator_jax.data import vocabulary as vocabularies
from variator_jax.data._tf import tf
from variator_jax.data.span_corruption import tokenize
from variator_jax.data.vocabulary import load_vocabulary
from variator_jax.errors import CheckpointError, DataError
from variator_jax.texts import load_tokenizer
from variator_jax.train.checks import check_vocabulary


def test_the_documentations_vocabulary_has_t5s_ids_and_label_words_as_single_pieces():
    vocabulary = vocabularies.docs_vocabulary()
    assert (vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id) == (0, 1, 2)
    base = vocabulary.vocab_size - 100
    assert vocabulary.encode("<extra_id_0> <extra_id_99>") == [vocabulary.vocab_size - 1, base]
    text = docs_corpus.read_split(docs_corpus.ensure_corpus(), "train")[0]["text"].split("\n")[0]
    ids = vocabulary.encode(text)
    assert vocabulary.decode(ids) == text and len(ids) < len(text) / 2
    assert vocabulary.encode_tf(text).numpy().tolist() == ids
    words = [vocabulary.encode(word) for word in vocabularies.LABEL_WORDS]
    assert all(len(word) == 1 and word != [2] for word in words)
    assert len({word[0] for word in words}) == len(words)


def test_making_a_vocabulary_builds_nothing_until_it_is_used(tmp_path, monkeypatch):
    monkeypatch.setenv("VARIATOR_CACHE", str(tmp_path))
    vocabulary = vocabularies.docs_vocabulary()
    assert vocabulary == vocabularies.docs_vocabulary() and str(vocabulary)
    assert list(tmp_path.iterdir()) == []
    assert vocabulary.vocab_size > 100
    assert len(list(tmp_path.glob("docs-*/spiece.model"))) == 1


def test_fingerprints_are_those_of_the_tokens():
    docs, bytes_ = vocabularies.docs_vocabulary(), vocabularies.byte_vocabulary()
    loaded = load_vocabulary(docs.sentencepiece_model_file)
    assert loaded.encode("array shape") == docs.encode("array shape")
    digits = hashlib.sha256(Path(docs.sentencepiece_model_file).read_bytes()).hexdigest()
    assert vocabularies.fingerprint(loaded) == vocabularies.fingerprint(docs) == digits
    others = (bytes_, vocabularies.byte_vocabulary(125))
    assert len({digits, *map(vocabularies.fingerprint, others)}) == 3


def _in_memory(name, content):
    """Puts a file where only TensorFlow finds it, as with gs://, and returns its URL."""
    url = f"ram://vocabulary_test/{name}"
    tf.io.gfile.makedirs("ram://vocabulary_test")
    with tf.io.gfile.GFile(url, "wb") as file:
        file.write(content)
    return url


def test_files_and_urls_that_are_not_a_model_are_refused(tmp_path):
    for content in (b"not a model", b""):
        (tmp_path / "spiece.model").write_bytes(content)
        with pytest.raises(DataError, match="not a SentencePiece model"):
            load_vocabulary(tmp_path / "spiece.model")
    with pytest.raises(DataError, match="Did you mean 'spiece.model'"):
        load_vocabulary(tmp_path / "spiec.model")
    missing = load_vocabulary("ram://vocabulary_test/nothing.model")
    for use in (lambda: missing.encode("a"), lambda: vocabularies.fingerprint(missing)):
        with pytest.raises(DataError, match="ram://vocabulary_test/nothing.model cannot be read"):
            use()
    with pytest.raises(DataError, match="broken.model is not a SentencePiece model"):
        load_vocabulary(_in_memory("broken.model", b"not a model")).encode("a")


def test_a_url_is_read_when_it_is_first_used(verbalizer_model, tmp_path):
    url, content = "ram://vocabulary_test/later.model", Path(verbalizer_model).read_bytes()
    vocabulary, local = load_vocabulary(url), load_vocabulary(verbalizer_model)  # not there yet
    assert url in str(vocabulary) and vocabularies.identity(vocabulary).startswith(url)
    _in_memory("later.model", content)
    assert vocabulary.vocab_size == local.vocab_size
    text = "Answer: <extra_id_0> Yes"
    assert vocabulary.encode(text) == local.encode(text) == [*vocabulary.encode_tf(text).numpy()]
    assert vocabularies.fingerprint(vocabulary) == vocabularies.fingerprint(local)
    assert vocabulary == load_vocabulary(url) == pickle.loads(pickle.dumps(vocabulary))
    assert Path(vocabularies.local_model_file(vocabulary)).read_bytes() == content
    assert vocabularies.local_model_file(local) == verbalizer_model
    config = get_config("nano", vocab_size=vocabulary.vocab_size)
    check_vocabulary("t", vocabulary, config, Path(verbalizer_model))
    (tmp_path / "other.model").write_bytes(vocabularies.train_sentencepiece(["one two"] * 9, 110))
    with pytest.raises(CheckpointError, match=f"another vocabulary.*{url}"):
        check_vocabulary("t", vocabulary, config, tmp_path / "other.model")


def test_a_model_with_its_own_sentinels_gets_no_more(tmp_path, verbalizer_model):
    plain, path = load_vocabulary(verbalizer_model), tmp_path / "100extra.model"
    path.write_bytes(plain.sp_model)  # seqio's model in memory holds what it added
    for place in (path, _in_memory("100extra.model", plain.sp_model)):
        vocabulary = load_vocabulary(place)
        assert vocabulary.vocab_size == plain.vocab_size
        text = "Yes <extra_id_0> No <extra_id_99>"
        assert vocabulary.encode(text) == plain.encode(text)
        # Span corruption of so many tokens would take ordinary pieces for sentinels.
        features = {"targets": seqio.Feature(vocabulary)}
        with pytest.raises(DataError, match="need 114 sentinels, but the vocabulary has 100"):
            tokenize(None, {"inputs": 2048, "targets": 480}, features)


def test_sentinels_of_a_model_that_span_corruption_could_not_use_are_refused(tmp_path):
    path = tmp_path / "spiece.model"
    names = [
        f"<extra_id_{i}>" for i in range(3)
    ]  # as spm_train's user_defined_symbols: at the start
    path.write_bytes(vocabularies.train_sentencepiece(["one two"] * 9, 110, names))
    vocabulary, texts = load_vocabulary(path), load_tokenizer(path)
    assert vocabulary.vocab_size == texts.size
    assert [*vocabulary.encode("one <extra_id_1>"), 1] == texts.encode("one <extra_id_1>")
    with pytest.raises(DataError, match="spiece.model has <extra_id_0> in another place"):
        tokenize(None, None, {"targets": seqio.Feature(vocabulary)})


def test_a_vocabulary_is_trained_once_and_has_whole_words_and_sentinels(tmp_path):
    file, words = tmp_path / "new" / "spiece.model", ("Yes", "negative")
    with pytest.raises(DataError, match="no vocabulary file .*DATA_DIR"):
        vocabularies.trained_vocabulary(str(file), None)
    text = "A sentence about rivers and mountains. " * 40 + "No river is negative, yes. " * 10
    (tmp_path / "one.txt").write_text(f"{text}\n{text}\n")
    (tmp_path / "valid.txt").write_text("Unseen words: zebra.\n")
    made = vocabularies.trained_vocabulary(str(file), str(tmp_path), 120, words)
    assert all(len(made.encode(word)) == 1 for word in words)
    assert made.encode("<extra_id_0>") == [made.vocab_size - 1]
    content = file.read_bytes()
    vocabularies.trained_vocabulary(str(file), None)
    assert file.read_bytes() == content
