"""Texts in the library's four lines: the ids that seqio trains on, padding, answers, bytes."""

import dataclasses
import sys
import types

import numpy as np
import pytest
from pieces import pieces
from tiny_model import BACKBONE, PLUGINS, SHAPE, make_plugin

from variator_jax import VariatorError, VariatorModel
from variator_jax.data.vocabulary import byte_vocabulary, load_vocabulary
from variator_jax.serving.tasks import Cut, TaskConfig, token_ids
from variator_jax.texts import load_tokenizer

TEXTS = ["the lazy dog", "Is it <extra_id_0> or <extra_id_1>?", "a fox", "", "<extra_id_99>"]


@pytest.fixture(scope="module")
def vocabulary_file(tmp_path_factory):
    """A SentencePiece model, which a hundred sentinels follow."""
    path = tmp_path_factory.mktemp("vocabulary") / "spiece.model"
    path.write_bytes(pieces())
    return path


@pytest.fixture(scope="module")
def text_model(vocabulary_file):
    return VariatorModel(dataclasses.replace(BACKBONE, vocabulary_file=vocabulary_file), PLUGINS)


@pytest.fixture(scope="module")
def byte_model():
    """ByT5 needs no file to take texts."""
    named = _backbone(name="byt5_tiny")
    return VariatorModel(named, make_plugin(4, named))


def _backbone(vocabulary_file=None, **shape):
    config = dataclasses.replace(SHAPE, **shape)
    return dataclasses.replace(BACKBONE, config=config, vocabulary_file=vocabulary_file)


def test_ids_are_those_that_seqio_trains_on(text_model, vocabulary_file):
    vocabulary = load_vocabulary(vocabulary_file)
    for text, row in zip(TEXTS, text_model.tokenize(TEXTS), strict=True):
        assert [*row[: np.argmax(row == 1)]] == vocabulary.encode(text), text
    assert vocabulary.vocab_size == text_model.tokenizer.size


@pytest.mark.parametrize("name", ["text_model", "byte_model"])
def test_texts_are_their_ids_padded_to_the_longest(name, request):
    model, texts = request.getfixturevalue(name), ["the lazy dog", "a <extra_id_0>", "a fox", ""]
    tokens = model.tokenize(texts)
    lengths = (tokens > 0).sum(axis=1)
    assert tokens.shape == (4, lengths.max()) and len(set(lengths)) > 1
    assert all(row[n - 1] == 1 for row, n in zip(tokens, lengths, strict=True))
    encoded = model.encode(texts, ratio=4)
    np.testing.assert_array_equal(encoded, model.encode(tokens, ratio=4))
    one = model.encode("a fox", ratio=4)
    np.testing.assert_allclose(one[0], encoded[2, : one.shape[1]], atol=1e-5)
    answers = model.generate(texts, ratio=4, max_length=6)
    ids = model.generate(tokens, ratio=4, max_length=6)
    assert answers == [model.tokenizer.decode(row) for row in ids]
    assert isinstance(model.generate(texts[0], ratio=4, max_length=6), str)


def test_sentinels_lie_at_the_top_and_are_understood_both_ways(text_model):
    size = text_model.tokenizer.size
    row = text_model.tokenize("fox<extra_id_0>dog <extra_id_7>")[0].tolist()
    assert row.count(size - 1) == 1 and row.count(size - 8) == 1
    said = text_model.tokenizer.decode([size - 1, *row])
    assert said == "<extra_id_0> fox <extra_id_0>dog <extra_id_7>"
    with pytest.raises(VariatorError, match="<extra_id_100>; sentinels go from"):
        text_model.encode("a <extra_id_100>")


def test_decoding_stops_at_the_end_and_survives_ids_without_a_piece(text_model):
    ids, decode = text_model.tokenize("the lazy dog")[0].tolist(), text_model.tokenizer.decode
    assert decode([*ids, 5, 6, 383]) == "the lazy dog" and decode([0, 0]) == ""
    assert decode([383, *ids]).endswith("the lazy dog")


def test_the_logits_of_a_text_score_its_own_tokens(text_model):
    targets = ["a fox", "no."]
    logits = text_model.logits(TEXTS[:2], targets, ratio=2)
    tokens = text_model.tokenize(targets)
    assert logits.shape == (*tokens.shape, SHAPE.vocab_size)
    shifted = [[0, *row[:-1]] for row in tokens.tolist()]
    np.testing.assert_array_equal(logits, text_model.logits(TEXTS[:2], shifted, ratio=2))


def test_a_model_with_sentinels_of_its_own_keeps_them(vocabulary_file, tmp_path):
    """mT5's vocabulary holds its sentinels already."""
    (tmp_path / "spiece.model").write_bytes(pieces(own_sentinels=2))
    tokenizer = load_tokenizer(tmp_path / "spiece.model")
    count = load_tokenizer(vocabulary_file).size - 100
    assert tokenizer.size == count + 2 and tokenizer.encode("<extra_id_0>") == [count + 1, 1]
    with pytest.raises(VariatorError, match="to <extra_id_1>"):
        tokenizer.encode("<extra_id_2>")


def test_what_is_missing_is_named(vocabulary_file, monkeypatch, tmp_path):
    (tmp_path / "spiece.model").write_bytes(b"no model")
    for backbone, message in (
        (_backbone(), "has no vocabulary"),
        (_backbone(tmp_path / "spiece.model"), "spiece.model is not a SentencePiece model"),
        (_backbone(vocabulary_file, vocab_size=128), "has only 128 embeddings"),
        (_backbone(name="byt5_tiny", vocab_size=256), "bytes has 259 ids.*only 256 embeddings"),
    ):
        with pytest.raises(VariatorError, match=message):
            VariatorModel(backbone).encode("a text")
    named = VariatorModel(_backbone(vocabulary_file, name="byt5_tiny"))  # its own comes first
    assert named.tokenizer.encode("a fox") == load_tokenizer(vocabulary_file).encode("a fox")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(VariatorError, match="pip install sentencepiece.*variator_jax"):
        VariatorModel(_backbone(vocabulary_file)).encode("a text")


def test_ids_are_bytes_behind_three_special_ids(byte_model):
    tokenizer, text = byte_model.tokenizer, "Grüße, 世界 🙂\n"
    ids = tokenizer.encode(text)
    assert ids == [*(byte + 3 for byte in text.encode()), 1]
    assert tokenizer.decode([*ids, 5, 6]) == text and tokenizer.size == 384
    assert tokenizer.decode([0, 2, 300 + 3 * 384, *ids]) == text
    assert tokenizer.decode(tokenizer.encode("ü")[1:]) == ""  # half a character
    assert ids == [*byte_vocabulary().encode(text), 1]
    with pytest.raises(VariatorError, match="UTF-8"):
        tokenizer.encode("\ud800")


def test_sentinels_lie_behind_the_bytes(byte_model):
    ids = byte_model.tokenizer.encode("a<extra_id_0> b<extra_id_124>")
    assert ids == [100, 259, 35, 101, 383, 1]
    assert byte_model.tokenizer.decode(ids) == "a<extra_id_0> b<extra_id_124>"
    with pytest.raises(VariatorError, match="go from <extra_id_0> to <extra_id_124>"):
        byte_model.encode("<extra_id_125>")


def test_spaces_that_the_tokenizer_joins_do_not_count_when_a_text_is_cut(vocabulary_file):
    tokenizer, words = load_tokenizer(vocabulary_file), "the fox " * 200
    found = token_ids(TaskConfig("e", "embed"), " " * 9000 + words, tokenizer, Cut(16, True))
    assert found == [*tokenizer.encode(words)[:15], 1]
    given = []
    spy = types.SimpleNamespace(encode=lambda text: given.append(text) or tokenizer.encode(text))
    assert token_ids(TaskConfig("e", "embed"), words + " " * 9000, spy, Cut(16, True)) == found
    assert len("".join(given[0].split())) <= 256  # no more than could stay
