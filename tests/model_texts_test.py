"""Texts in the library's four lines: the ids that seqio trains on, padding, answers, bytes."""

import dataclasses
import io
import sys

import numpy as np
import pytest
import sentencepiece
from tiny_model import BACKBONE, PLUGINS, SHAPE, make_plugin

from variator_jax import VariatorError, VariatorModel
from variator_jax.texts import load_tokenizer


@pytest.fixture(scope="module")
def model():
    return VariatorModel(BACKBONE, PLUGINS)


@pytest.fixture(scope="module")
def vocabulary_file(tmp_path_factory):
    """A SentencePiece model of 120 pieces, which a hundred sentinels follow."""
    texts = ["the quick brown fox jumps over the lazy dog", "Is it a sentence? Yes, it is.", "no."]
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts * 30), model_writer=written, vocab_size=120, pad_id=0,
        eos_id=1, unk_id=2, bos_id=-1, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("vocabulary") / "spiece.model"
    path.write_bytes(written.getvalue())
    return path


@pytest.fixture(scope="module")
def text_model(vocabulary_file):
    backbone = dataclasses.replace(BACKBONE, vocabulary_file=vocabulary_file)
    return VariatorModel(backbone, PLUGINS)


TEXTS = ["the lazy dog", "Is it <extra_id_0> or <extra_id_1>?", "a fox", "", "<extra_id_99>"]


class TestTexts:
    def test_ids_are_those_that_seqio_trains_on(self, text_model, vocabulary_file):
        from variator_jax.data.vocabulary import load_vocabulary

        vocabulary = load_vocabulary(vocabulary_file)
        tokens = text_model.tokenize(TEXTS)
        for text, row in zip(TEXTS, tokens, strict=True):
            assert [*row[: np.argmax(row == 1)]] == vocabulary.encode(text), text
        assert vocabulary.vocab_size == text_model.tokenizer.size

    def test_texts_are_their_ids_padded_to_the_longest(self, text_model):
        tokens = text_model.tokenize(TEXTS)
        lengths = (tokens > 0).sum(axis=1)
        assert tokens.shape == (5, lengths.max()) and len(set(lengths)) > 1
        assert all(row[n - 1] == 1 for row, n in zip(tokens, lengths, strict=True))
        encoded = text_model.encode(TEXTS, ratio=4)
        np.testing.assert_array_equal(encoded, text_model.encode(tokens, ratio=4))
        one = text_model.encode("a fox", ratio=4)
        assert one.shape[0] == 1
        np.testing.assert_allclose(one[0], encoded[2, : one.shape[1]], atol=1e-5)

    def test_sentinels_lie_at_the_top_and_are_understood_both_ways(self, text_model):
        size = text_model.tokenizer.size
        row = text_model.tokenize("fox<extra_id_0>dog <extra_id_7>")[0].tolist()
        assert row.count(size - 1) == 1 and row.count(size - 8) == 1
        assert text_model.tokenizer.decode([size - 1, *row]) == (
            "<extra_id_0> fox <extra_id_0>dog <extra_id_7>"
        )
        with pytest.raises(VariatorError, match="<extra_id_100>; sentinels go from"):
            text_model.encode("a <extra_id_100>")

    def test_decoding_stops_at_the_end_and_survives_ids_without_a_piece(self, text_model):
        ids = text_model.tokenize("the lazy dog")[0].tolist()
        assert text_model.tokenizer.decode([*ids, 5, 6, 383]) == "the lazy dog"
        assert text_model.tokenizer.decode([383, *ids]).endswith("the lazy dog")
        assert text_model.tokenizer.decode([0, 0]) == ""

    def test_generated_ids_become_texts(self, text_model):
        ids = text_model.generate(text_model.tokenize(TEXTS), ratio=2, max_length=6)
        texts = text_model.generate(TEXTS, ratio=2, max_length=6)
        assert texts == [text_model.tokenizer.decode(row) for row in ids]
        assert isinstance(text_model.generate(TEXTS[0], max_length=6), str)

    def test_the_logits_of_a_text_score_its_own_tokens(self, text_model):
        targets = ["a fox", "no."]
        logits = text_model.logits(TEXTS[:2], targets, ratio=2)
        tokens = text_model.tokenize(targets)
        assert logits.shape == (*tokens.shape, SHAPE.vocab_size)
        shifted = [[0, *row[:-1]] for row in tokens.tolist()]
        np.testing.assert_array_equal(logits, text_model.logits(TEXTS[:2], shifted, ratio=2))

    def test_a_model_with_sentinels_of_its_own_keeps_them(self, vocabulary_file, tmp_path):
        """mT5's vocabulary holds its sentinels already."""
        from sentencepiece import sentencepiece_model_pb2 as pb2

        proto = pb2.ModelProto.FromString(vocabulary_file.read_bytes())
        pieces = len(proto.pieces)
        for i in (1, 0):
            proto.pieces.add(piece=f"\u2581<extra_id_{i}>", score=0.0, type=4)
        (tmp_path / "spiece.model").write_bytes(proto.SerializeToString())
        tokenizer = load_tokenizer(tmp_path / "spiece.model")
        assert tokenizer.size == pieces + 2
        assert tokenizer.encode("<extra_id_0>") == [pieces + 1, 1]
        with pytest.raises(VariatorError, match="to <extra_id_1>"):
            tokenizer.encode("<extra_id_2>")

    def test_what_is_missing_is_named(self, model, vocabulary_file, monkeypatch, tmp_path):
        with pytest.raises(VariatorError, match="came without a vocabulary"):
            model.encode("a text")
        (tmp_path / "spiece.model").write_bytes(b"no model")
        broken = dataclasses.replace(BACKBONE, vocabulary_file=tmp_path / "spiece.model")
        with pytest.raises(VariatorError, match="spiece.model is not a SentencePiece model"):
            VariatorModel(broken).encode("a text")
        small = dataclasses.replace(
            BACKBONE,
            config=dataclasses.replace(SHAPE, vocab_size=128),
            vocabulary_file=vocabulary_file,
        )
        with pytest.raises(VariatorError, match="has only 128 embeddings"):
            VariatorModel(small).encode("a text")
        monkeypatch.setitem(sys.modules, "sentencepiece", None)
        with pytest.raises(VariatorError, match="pip install sentencepiece.*variator_jax"):
            VariatorModel(dataclasses.replace(small)).encode("a text")


class TestBytes:
    """ByT5 needs no file to take texts."""

    @pytest.fixture(scope="class")
    def byte_model(self):
        named = dataclasses.replace(BACKBONE, config=dataclasses.replace(SHAPE, name="byt5_tiny"))
        return VariatorModel(named, make_plugin(4, named))

    def test_ids_are_bytes_behind_three_special_ids(self, byte_model):
        tokenizer, text = byte_model.tokenizer, "Grüße, 世界 🙂\n"
        ids = tokenizer.encode(text)
        assert ids == [*(byte + 3 for byte in text.encode()), 1]
        assert tokenizer.decode([*ids, 5, 6]) == text and tokenizer.size == 384
        assert tokenizer.decode([0, 2, 300 + 3 * 384, *ids]) == text
        assert tokenizer.decode(tokenizer.encode("ü")[1:]) == ""  # half a character
        with pytest.raises(VariatorError, match="UTF-8"):
            tokenizer.encode("\ud800")

    def test_ids_are_those_of_seqio(self, byte_model):
        from variator_jax.data.vocabulary import byte_vocabulary

        for text in ("", "Grüße, 世界"):
            assert byte_model.tokenizer.encode(text) == [*byte_vocabulary().encode(text), 1]

    def test_sentinels_lie_behind_the_bytes(self, byte_model):
        ids = byte_model.tokenizer.encode("a<extra_id_0> b<extra_id_124>")
        assert ids == [100, 259, 35, 101, 383, 1]
        assert byte_model.tokenizer.decode(ids) == "a<extra_id_0> b<extra_id_124>"
        with pytest.raises(VariatorError, match="go from <extra_id_0> to <extra_id_124>"):
            byte_model.encode("<extra_id_125>")

    def test_texts_are_encoded_and_generated(self, byte_model):
        texts = ["Grüße", "世界, 世界"]
        tokens = byte_model.tokenize(texts)
        encoded = byte_model.encode(texts, ratio=4)
        assert encoded.shape == (2, 15, SHAPE.embed_dim)
        np.testing.assert_array_equal(encoded, byte_model.encode(tokens, ratio=4))
        ids = byte_model.generate(tokens, ratio=4, max_length=6)
        answers = byte_model.generate(texts, ratio=4, max_length=6)
        assert answers == [byte_model.tokenizer.decode(row) for row in ids]

    def test_a_vocabulary_of_its_own_comes_first_and_few_embeddings_are_refused(
        self, vocabulary_file
    ):
        named = dataclasses.replace(SHAPE, name="byt5_tiny")
        with_file = dataclasses.replace(BACKBONE, config=named, vocabulary_file=vocabulary_file)
        pieces = load_tokenizer(vocabulary_file).encode("a fox")
        assert VariatorModel(with_file).tokenizer.encode("a fox") == pieces
        few = dataclasses.replace(BACKBONE, config=dataclasses.replace(named, vocab_size=256))
        with pytest.raises(VariatorError, match="bytes has 259 ids.*only 256 embeddings"):
            VariatorModel(few).encode("a text")
