import hashlib
import pickle
from pathlib import Path

import pytest

from variator_jax.backbones.t5 import get_config
from variator_jax.data import corpus
from variator_jax.data import vocabulary as vocabularies
from variator_jax.data._tf import tf
from variator_jax.errors import CheckpointError, DataError
from variator_jax.train.settings import check_vocabulary


def test_ids_are_those_of_t5():
    vocabulary = vocabularies.docs_vocabulary()
    assert (vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id) == (0, 1, 2)
    base = vocabulary.vocab_size - 100
    assert vocabulary.encode("<extra_id_0> <extra_id_99>") == [vocabulary.vocab_size - 1, base]


def test_text_survives_encoding_in_python_and_in_a_graph():
    vocabulary = vocabularies.docs_vocabulary()
    text = corpus.read_split(corpus.ensure_corpus(), "train")[0]["text"].split("\n")[0]
    ids = vocabulary.encode(text)
    assert vocabulary.decode(ids) == text and len(ids) < len(text) / 2
    assert vocabulary.encode_tf(text).numpy().tolist() == ids


def test_every_label_word_is_one_piece_of_its_own():
    vocabulary = vocabularies.docs_vocabulary()
    ids = [vocabulary.encode(word) for word in vocabularies.LABEL_WORDS]
    assert all(len(one) == 1 for one in ids)
    assert len({one[0] for one in ids}) == len(ids) and [2] not in ids


def test_making_a_vocabulary_builds_nothing_until_it_is_used(tmp_path, monkeypatch):
    monkeypatch.setenv("VARIATOR_CACHE", str(tmp_path))
    vocabulary = vocabularies.docs_vocabulary()
    assert vocabulary == vocabularies.docs_vocabulary() and str(vocabulary)
    assert list(tmp_path.iterdir()) == []
    assert vocabulary.vocab_size > 100
    assert len(list(tmp_path.glob("docs-*/spiece.model"))) == 1


def test_a_users_model_is_loaded_and_has_the_same_fingerprint():
    docs = vocabularies.docs_vocabulary()
    path = docs.sentencepiece_model_file
    loaded = vocabularies.load_vocabulary(path)
    assert loaded.encode("array shape") == docs.encode("array shape")
    assert loaded.vocab_size == docs.vocab_size
    expected = hashlib.sha256(open(path, "rb").read()).hexdigest()
    assert vocabularies.fingerprint(loaded) == vocabularies.fingerprint(docs) == expected


def test_files_that_are_no_model_are_refused(tmp_path):
    (tmp_path / "spiece.model").write_bytes(b"not a model")
    with pytest.raises(DataError, match="Did you mean 'spiece.model'"):
        vocabularies.load_vocabulary(tmp_path / "spiec.model")
    with pytest.raises(DataError, match="not a SentencePiece model"):
        vocabularies.load_vocabulary(tmp_path / "spiece.model")
    (tmp_path / "empty.model").write_bytes(b"")
    with pytest.raises(DataError, match="not a SentencePiece model"):
        vocabularies.load_vocabulary(tmp_path / "empty.model")


def test_bytes_need_no_model_and_differ_from_pieces():
    vocabulary = vocabularies.byte_vocabulary()
    assert vocabulary.decode(vocabulary.encode("any text")) == "any text"
    fingerprints = {
        vocabularies.fingerprint(v)
        for v in (vocabulary, vocabularies.byte_vocabulary(125), vocabularies.docs_vocabulary())
    }
    assert len(fingerprints) == 3


def _in_memory(name, content):
    """Puts a file where only TensorFlow finds it, as with gs://, and returns its URL."""
    url = f"ram://vocabulary_test/{name}"
    tf.io.gfile.makedirs("ram://vocabulary_test")
    with tf.io.gfile.GFile(url, "wb") as file:
        file.write(content)
    return url


def test_a_url_is_read_when_it_is_first_used(verbalizer_model):
    content = Path(verbalizer_model).read_bytes()
    url = "ram://vocabulary_test/later.model"
    vocabulary = vocabularies.load_vocabulary(url)  # not there yet
    assert url in str(vocabulary) and vocabularies.identity(vocabulary).startswith(url)
    _in_memory("later.model", content)
    local = vocabularies.load_vocabulary(verbalizer_model)
    assert vocabulary.vocab_size == local.vocab_size
    text = "Answer: <extra_id_0> Yes"
    assert (
        vocabulary.encode(text) == local.encode(text) == vocabulary.encode_tf(text).numpy().tolist()
    )
    assert vocabularies.fingerprint(vocabulary) == vocabularies.fingerprint(local)
    assert vocabulary == vocabularies.load_vocabulary(url) == pickle.loads(pickle.dumps(vocabulary))
    copy = vocabularies.local_model_file(vocabulary)
    assert Path(copy).read_bytes() == content
    assert vocabularies.local_model_file(local) == verbalizer_model


def test_what_a_url_lacks_is_told_with_the_url():
    missing = vocabularies.load_vocabulary("ram://vocabulary_test/nothing.model")
    for use in (lambda: missing.encode("a"), lambda: vocabularies.fingerprint(missing)):
        with pytest.raises(DataError, match="ram://vocabulary_test/nothing.model cannot be read"):
            use()
    broken = vocabularies.load_vocabulary(_in_memory("broken.model", b"not a model"))
    with pytest.raises(DataError, match="broken.model is not a SentencePiece model"):
        broken.encode("a")


def test_a_model_with_its_own_sentinels_gets_no_more(tmp_path, verbalizer_model):
    plain = vocabularies.load_vocabulary(verbalizer_model)
    path = tmp_path / "100extra.model"
    path.write_bytes(plain.sp_model)  # seqio's model in memory holds what it added
    for place in (path, _in_memory("100extra.model", plain.sp_model)):
        vocabulary = vocabularies.load_vocabulary(place)
        assert vocabulary.vocab_size == plain.vocab_size
        text = "Yes <extra_id_0> No <extra_id_99>"
        assert vocabulary.encode(text) == plain.encode(text)
    assert plain.encode("<extra_id_0>") == [plain.vocab_size - 1]


def test_a_backbones_vocabulary_may_be_a_url(verbalizer_model):
    url = _in_memory("backbone.model", Path(verbalizer_model).read_bytes())
    vocabulary = vocabularies.load_vocabulary(url)
    config = get_config("nano", vocab_size=vocabulary.vocab_size)
    check_vocabulary("t", vocabulary, config, vocabularies.fingerprint(vocabulary))
    with pytest.raises(CheckpointError, match=f"another vocabulary.*{url}"):
        check_vocabulary("t", vocabulary, config, "0" * 64)
