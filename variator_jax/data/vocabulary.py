"""Vocabularies: the documentation corpus's, a user's own, one trained on texts, bytes.

All are seqio vocabularies with T5's ids: padding 0, end of sequence 1, unknown 2, and sentinels
counted down from the last id. Importing this module builds nothing; `docs_vocabulary()` trains its
model when it is first asked for a token.
"""

import hashlib
import io
import random
import string
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as model_pb2

from variator_jax.data import docs_corpus
from variator_jax.data._tf import seqio, tf
from variator_jax.data.tasks import absolute, missing_file, read_text_lines, text_files
from variator_jax.errors import DataError
from variator_jax.files import is_url, write_file
from variator_jax.hf_tokenizer import JSON, SETTINGS, find_vocabulary
from variator_jax.texts import PieceTokenizer, load_tokenizer

EXTRA_IDS = 100

#: Addresses of the vocabulary of T5, T5 1.1 and T5X's configs: the same tokens, without and with
#: the sentinels in the file.
T5_VOCABULARIES = (
    "gs://t5-data/vocabs/cc_all.32000/sentencepiece.model",
    "gs://t5-data/vocabs/cc_all.32000.100extra/sentencepiece.model",
)

#: Every label word of the documentation tasks; each is one piece of the vocabulary.
LABEL_WORDS = ("yes", "no", "standard", "numpy", "tensorflow", "jax", "matplotlib")

_PIECES = 4000  # of the vocabularies that are trained here
_SENTENCES = 60_000  # sampled for training; more of them only cost time


class UrlVocabulary(seqio.SentencePieceVocabulary):
    """A SentencePiece model at an address such as gs://..., read when it is first used.

    A model that holds its own sentinels, such as T5X's `cc_all.32000.100extra`, gets no more.
    """

    _model: Any  # of seqio: what is loaded, or None

    def _model_context(self) -> Any:
        if self._model is None:
            path = self.sentencepiece_model_file
            loaded = seqio.SentencePieceVocabulary(path, _sentinels_to_add(path))
            self._model = loaded._model_context()
        return self._model

    def __str__(self) -> str:  # its parent's would read the file
        return f"{type(self).__name__}({self._sentencepiece_model_file})"


class TokenizerVocabulary(seqio.Vocabulary):
    """The vocabulary of a `tokenizer.json`, or of a ByT5 to which tokens were added.

    TensorFlow calls Python for each text, which is slower than SentencePiece.
    """

    eos_id, unk_id = 1, 2

    def __init__(self, file: str) -> None:
        self.file, self._tokenizer = file, load_tokenizer(Path(file))
        super().__init__(extra_ids=len(self._tokenizer.sentinels))

    @property
    def vocab_size(self) -> int:
        """The number of ids, sentinels and added tokens included."""
        return self._tokenizer.size

    @property
    def _base_vocab_size(self) -> int:
        return self._tokenizer.size  # with the sentinels, as SentencePiece's

    @property
    def sentinels_end(self) -> int:
        """One more than the id of <extra_id_0>, from which the others count down.

        Raises:
          DataError: for ByT5's, which count up.
        """
        first = self._tokenizer.sentinels.get("<extra_id_0>", self.vocab_size - 1)
        if self._tokenizer.sentinels.get("<extra_id_1>", first) > first:
            reason = "its sentinels count up from <extra_id_0>, and those of T5X's recipe down"
            remedy = "use --gin_file=vocabularies/bytes.gin, unless the folder adds tokens"
            raise DataError(f"{self.file}: {reason}; {remedy}")
        return first + 1

    def _encode(self, s: str) -> list[int]:
        return self._tokenizer.encode(s)[:-1]

    def _decode(self, ids: Any) -> str:
        return self._tokenizer.decode(ids)

    def _encode_tf(self, s: Any) -> Any:
        def encode(text: bytes) -> Any:
            return np.array(self._encode(text.decode("utf8", "replace")), np.int32)

        return tf.ensure_shape(tf.numpy_function(encode, [s], tf.int32), [None])

    def _decode_tf(self, ids: Any) -> Any:
        def decode(rows: Any) -> Any:
            texts = [self._decode(row).encode() for row in rows.reshape(-1, rows.shape[-1])]
            return np.array(texts, object).reshape(rows.shape[:-1])

        return tf.ensure_shape(tf.numpy_function(decode, [ids], tf.string), ids.shape[:-1])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TokenizerVocabulary) and identity(self) == identity(other)

    def __str__(self) -> str:
        return f"{type(self).__name__}({self.file})"


class DocsVocabulary(UrlVocabulary):
    """The documentation corpus's SentencePiece vocabulary, built when it is first used."""

    def __init__(self) -> None:
        super().__init__("docs", extra_ids=EXTRA_IDS)

    @property
    def sentencepiece_model_file(self) -> str:
        """The path of the model file; trains it if there is none yet."""
        path = docs_corpus.ensure_corpus() / "spiece.model"
        if not path.is_file():
            records = docs_corpus.read_split(path.parent, "train")
            lines = [line for record in records for line in record["text"].split("\n")]
            write_file(path, train_sentencepiece(lines, _PIECES, LABEL_WORDS))
        return str(path)


def docs_vocabulary() -> DocsVocabulary:
    """Returns the vocabulary of the documentation tasks (about 4,000 pieces and 100 sentinels)."""
    return DocsVocabulary()


def byte_vocabulary(extra_ids: int = 0) -> seqio.ByteVocabulary:
    """Returns ByT5's vocabulary of bytes; T5X's ByT5 reuses the last bytes as sentinels."""
    return seqio.ByteVocabulary(extra_ids=extra_ids)


def load_vocabulary(given: Any) -> seqio.Vocabulary:
    """Returns the vocabulary of a user's file, such as T5's `spiece.model`.

    Args:
      given: a SentencePiece model, a `tokenizer.json`, a ByT5's `tokenizer_config.json`, a folder
        that holds one of them, or a model's URL (gs://...). A URL is only read when a token is
        asked for, so that tasks can be registered where it cannot be reached. None stands for the
        documentation corpus's vocabulary; a seqio vocabulary is returned as it is.

    Returns:
      A vocabulary with 100 sentinels after the model's own pieces, unless the model has its own.

    Raises:
      DataError: if the file is missing or not a SentencePiece model; for a URL, at its first use.
    """
    if not isinstance(given, str | Path):
        return docs_vocabulary() if given is None else given
    if is_url(given):
        return UrlVocabulary(given, extra_ids=EXTRA_IDS)
    path = Path(given).expanduser()
    path = find_vocabulary(path) or path
    if not path.is_file():
        raise missing_file("no vocabulary file", path)
    if path.name in (JSON, SETTINGS):
        return TokenizerVocabulary(str(path))
    return seqio.SentencePieceVocabulary(str(path), _sentinels_to_add(str(path)))


def trained_vocabulary(
    path: str, data_dir: str | None, pieces: int = _PIECES, whole_words: Sequence[str] = ()
) -> seqio.Vocabulary:
    """Returns the vocabulary in `path`; trains it on the texts of `data_dir` if there is none yet.

    For backbones that are trained from nothing; a published backbone has its vocabulary already.

    Args:
      path: the model file. Once written it stays, whatever the texts become.
      data_dir: a folder of .txt or .txt.gz files, as for `published.wikipedia_task`; those for
        validation are left out.
      pieces: size, without the 100 sentinels.
      whole_words: words that become one piece each, such as a task's verbalizers.

    Raises:
      DataError: if there is neither a file nor a folder with texts, or they are too few.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        if data_dir is None:
            raise DataError(f"no vocabulary file {file}, and no texts (DATA_DIR) to train it on")
        sentences = [
            sentence
            for text_file in text_files(data_dir)["train"]
            for line in read_text_lines(text_file).as_numpy_iterator()
            for sentence in line["text"].decode("utf-8", "replace").split(". ")
        ]
        write_file(file, train_sentencepiece(sentences, pieces, whole_words))
    return load_vocabulary(file)


def train_sentencepiece(
    sentences: Sequence[str], pieces: int, whole_words: Iterable[str] = ()
) -> bytes:
    """Trains a unigram model and returns its bytes; ids are T5's (pad 0, eos 1, unk 2).

    Args:
      sentences: the training text, of which a random sample is used.
      pieces: size of the vocabulary; fewer come out if the text does not have so many.
      whole_words: words that become one piece each, also at the start of a text.

    Raises:
      DataError: if SentencePiece cannot train on this text.
    """
    sample, model = list(sentences), io.BytesIO()
    random.Random(0).shuffle(sample)
    ids: Any = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample[:_SENTENCES]),
            model_writer=model,
            vocab_size=pieces,
            hard_vocab_limit=False,
            character_coverage=1.0,
            num_threads=2,
            minloglevel=2,
            required_chars=string.ascii_letters + string.digits + string.punctuation,
            max_sentence_length=2000,  # bytes; longer ones are left out
            seed_sentencepiece_size=100_000,
            **ids,
        )
    except RuntimeError as error:
        raise DataError(f"SentencePiece cannot train on these texts: {error}") from error
    return _with_whole_words(model.getvalue(), whole_words)


def _with_whole_words(model: bytes, words: Iterable[str]) -> bytes:
    """Makes each word a piece that always wins, in place of the rarest ordinary pieces.

    SentencePiece's own user-defined symbols would also match inside longer words ('no' in 'note'),
    so a word not yet a piece enters as an ordinary one, likelier than any way of spelling it.
    """
    message: Any = model_pb2.ModelProto  # type: ignore[attr-defined]  # made at run time
    proto, normal = message.FromString(model), message.SentencePiece.NORMAL
    wanted = {f"\u2581{word}" for word in words}
    ordinary = [piece for piece in proto.pieces if piece.type == normal]
    rare = (p for p in reversed(ordinary) if len(p.piece) > 2 and p.piece not in wanted)
    best = max(piece.score for piece in ordinary)
    for word in sorted(wanted - {piece.piece for piece in proto.pieces}):
        piece = next(rare, None) or proto.pieces.add(type=normal)
        piece.piece, piece.score = word, best
    return bytes(proto.SerializeToString(deterministic=True))


def _file(vocabulary: seqio.Vocabulary) -> str | None:
    model = getattr(vocabulary, "sentencepiece_model_file", None)
    return getattr(vocabulary, "file", model)


def _content(path: str) -> bytes:
    """Returns the bytes of a model file or URL."""
    try:
        with tf.io.gfile.GFile(path, "rb") as file:
            return bytes(file.read())
    except (tf.errors.OpError, OSError) as error:
        raise DataError(f"the vocabulary {path} cannot be read: {error}") from error


def _sentinels_to_add(path: str) -> int:
    """Returns how many sentinels a model lacks: 100, or 0 if it has its own.

    Raises:
      DataError: if it cannot be read or is not a SentencePiece model.
    """
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(_content(path) or b"empty")
    except RuntimeError as error:
        expected = "a SentencePiece model, such as T5's spiece.model"
        raise DataError(f"{path} is not {expected}") from error
    return 0 if PieceTokenizer(processor).sentinels else EXTRA_IDS


def fingerprint(vocabulary: seqio.Vocabulary) -> str:
    """Returns what identifies a vocabulary: the sha256 of its SentencePiece model file, in hex.

    A `tokenizer.json` is one, too; bytes are identified by their class and size.
    """
    if (file := _file(vocabulary)) is not None:
        return hashlib.sha256(_content(file)).hexdigest()
    name = f"{type(vocabulary).__name__}:{vocabulary.vocab_size}"
    return hashlib.sha256(name.encode()).hexdigest()


def identity(vocabulary: seqio.Vocabulary) -> str:
    """Returns what a vocabulary was made from, such as its path; reads nothing.

    A relative path and the absolute one are the same, and so are the addresses of T5's vocabulary,
    which have the same tokens; two copies of a file are not.
    """
    if isinstance(vocabulary, DocsVocabulary):
        return "docs"
    if isinstance(vocabulary, TokenizerVocabulary):
        return absolute(vocabulary.file)
    if not isinstance(vocabulary, seqio.SentencePieceVocabulary):
        return f"{type(vocabulary).__name__}:{vocabulary.extra_ids}"
    name = vocabulary.sentencepiece_model_file
    if name in T5_VOCABULARIES and vocabulary.extra_ids == EXTRA_IDS:
        return "t5"
    return f"{absolute(name)}:{vocabulary.extra_ids}"


def local_model_file(vocabulary: seqio.Vocabulary) -> str | None:
    """Returns the path of a vocabulary's model file, None for bytes; of a URL's, that of a copy."""
    file = _file(vocabulary)
    if file is None or not is_url(file):
        return file
    path = docs_corpus.cache_root() / "vocabularies" / f"{fingerprint(vocabulary)}.model"
    if not path.is_file():
        write_file(path, _content(file))
    return str(path)
