import hashlib

import pytest

from variator_jax.data import corpus
from variator_jax.data import vocabulary as vocabularies
from variator_jax.errors import DataError


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
