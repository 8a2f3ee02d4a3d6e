"""Vocabularies: the documentation corpus's own, a user's `spiece.model`, and bytes.

All are seqio vocabularies with T5's ids: padding 0, end of sequence 1, unknown 2, and sentinels
counted down from the last id. Importing this module builds nothing; `docs_vocabulary()` trains its
model when it is first asked for a token.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import random
from pathlib import Path
from typing import Any

import sentencepiece

from variator_jax.data import corpus
from variator_jax.data._tf import seqio, tf
from variator_jax.data.sentencepiece_training import train_sentencepiece as train_sentencepiece
from variator_jax.errors import DataError, did_you_mean
from variator_jax.files import write_file

EXTRA_IDS = 100

#: Where the vocabulary of T5, T5 1.1 and T5X's configs lies: the same tokens, without and with
#: the sentinels in the file.
T5_VOCABULARIES = (
    "gs://t5-data/vocabs/cc_all.32000/sentencepiece.model",
    "gs://t5-data/vocabs/cc_all.32000.100extra/sentencepiece.model",
)
DOCS_PIECES = 4000
_DOCS_SENTENCES = 60_000  # sampled for training; more sentences only cost time

#: Every label word of the documentation tasks; each is one piece of the vocabulary.
LABEL_WORDS = (
    "yes",
    "no",
    "standard",
    "numpy",
    "tensorflow",
    "jax",
    "matplotlib",
)


class DocsVocabulary(seqio.SentencePieceVocabulary):
    """The documentation corpus's SentencePiece vocabulary, built when it is first used."""

    def __init__(self, extra_ids: int = EXTRA_IDS):
        super().__init__("docs", extra_ids=extra_ids)

    @property
    def sentencepiece_model_file(self) -> str:
        """The path of the model file; trains it if there is none yet."""
        return str(ensure_docs_model(corpus.ensure_corpus()))

    def _model_context(self) -> Any:
        self._sentencepiece_model_file = self.sentencepiece_model_file
        try:
            return super()._model_context()
        finally:
            self._sentencepiece_model_file = "docs"

    def __str__(self) -> str:
        return f"DocsVocabulary(extra_ids={self.extra_ids})"  # does not build, unlike its parent's


def docs_vocabulary() -> DocsVocabulary:
    """Returns the vocabulary of the documentation tasks (about 4,000 pieces and 100 sentinels)."""
    return DocsVocabulary()


@functools.cache
def ensure_docs_model(folder: Path) -> Path:
    """Returns the SentencePiece model of a corpus folder, training it on the first call.

    Raises:
      DataError: if the corpus is too small to train on.
    """
    path = folder / "spiece.model"
    if not path.is_file():
        texts = [record["text"] for record in corpus.read_split(folder, "train")]
        lines = list(itertools.chain.from_iterable(text.split("\n") for text in texts))
        random.Random(0).shuffle(lines)
        model = train_sentencepiece(lines[:_DOCS_SENTENCES], DOCS_PIECES, LABEL_WORDS)
        write_file(path, model)
    return path


class UrlVocabulary(seqio.SentencePieceVocabulary):
    """A SentencePiece model at an address such as gs://..., read when it is first used.

    A model that holds its own sentinels, such as T5X's `cc_all.32000.100extra`, gets no more.
    """

    _model: Any  # of seqio: what is loaded, or None

    def _model_context(self) -> Any:
        if self._model is None:
            path = self._sentencepiece_model_file
            added = 0 if _checked_model(path, _content(path)) else self._extra_ids
            self._model = seqio.SentencePieceVocabulary(path, added)._model_context()
        return self._model

    def __str__(self) -> str:  # its parent's would read the file
        return f"UrlVocabulary({self._sentencepiece_model_file}, extra_ids={self._extra_ids})"


def vocabulary_of(given: Any) -> seqio.Vocabulary:
    """Returns the vocabulary that a task is given: a seqio one, a path or URL, or the default.

    None stands for the documentation corpus's. Errors are those of `load_vocabulary`.
    """
    if given is None:
        return docs_vocabulary()
    return load_vocabulary(given) if isinstance(given, str | Path) else given


def load_vocabulary(path: str | Path, extra_ids: int = EXTRA_IDS) -> seqio.SentencePieceVocabulary:
    """Returns the vocabulary of a user's SentencePiece model, such as T5's `spiece.model`.

    Args:
      path: the model file, or its URL (gs://...). A URL is only read when a token is asked for, so
        that tasks can be registered where it cannot be reached.
      extra_ids: sentinels that are added after the model's own pieces; none are if the model has
        its own.

    Raises:
      DataError: if the file is missing or is no SentencePiece model; for a URL, at its first use.
    """
    if is_url(path):
        return UrlVocabulary(str(path), extra_ids=extra_ids)
    path = Path(path).expanduser()
    if not path.is_file():
        beside = [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else []
        raise DataError(f"no vocabulary file {path}.{did_you_mean(path.name, beside)}")
    has_sentinels = _checked_model(str(path), path.read_bytes())
    return seqio.SentencePieceVocabulary(str(path), extra_ids=0 if has_sentinels else extra_ids)


def is_url(path: str | Path) -> bool:
    """Whether a path is an address such as gs://bucket/file, which TensorFlow reads."""
    return "://" in str(path)


def is_t5(vocabulary: seqio.Vocabulary) -> bool:
    """Whether a vocabulary is T5's own, by its address; reads nothing."""
    return (
        isinstance(vocabulary, UrlVocabulary)
        and vocabulary.sentencepiece_model_file in T5_VOCABULARIES
        and vocabulary.extra_ids == EXTRA_IDS
    )


def _content(path: str) -> bytes:
    """Returns the bytes of a model file or URL."""
    try:
        with tf.io.gfile.GFile(path, "rb") as file:
            return bytes(file.read())
    except (tf.errors.OpError, OSError) as error:
        raise DataError(f"the vocabulary {path} cannot be read: {error}") from error


def _checked_model(path: str, content: bytes) -> bool:
    """Returns whether a SentencePiece model has its own sentinels; DataError if it is none."""
    processor = sentencepiece.SentencePieceProcessor()
    try:
        if not processor.LoadFromSerializedProto(content or b"empty"):
            raise RuntimeError("not loaded")
    except RuntimeError as error:
        raise DataError(
            f"{path} is not a SentencePiece model; expected a file such as T5's spiece.model"
        ) from error
    return bool(processor.PieceToId("\u2581<extra_id_0>") != processor.unk_id())


def byte_vocabulary(extra_ids: int = 0) -> seqio.ByteVocabulary:
    """Returns ByT5's vocabulary of bytes; T5X's ByT5 reuses the last bytes as sentinels."""
    return seqio.ByteVocabulary(extra_ids=extra_ids)


def fingerprint(vocabulary: seqio.Vocabulary) -> str:
    """Returns what identifies a vocabulary: the sha256 of its SentencePiece model file, in hex.

    A vocabulary without a file (bytes) is identified by its class and size.
    """
    if isinstance(vocabulary, seqio.SentencePieceVocabulary):
        content = _content(vocabulary.sentencepiece_model_file)
    else:
        content = f"{type(vocabulary).__name__}:{vocabulary.vocab_size}".encode()
    return hashlib.sha256(content).hexdigest()


def identity(vocabulary: seqio.Vocabulary) -> str:
    """Returns what a vocabulary was made from, such as its path; reads nothing.

    A relative path and the absolute one are the same, and so are the addresses of T5's vocabulary,
    which have the same tokens; two copies of a file are not.
    """
    if is_t5(vocabulary):
        return "t5"
    if isinstance(vocabulary, DocsVocabulary):
        return f"docs:{vocabulary.extra_ids}"
    if isinstance(vocabulary, seqio.SentencePieceVocabulary):
        file = vocabulary.sentencepiece_model_file
        return f"{file if is_url(file) else Path(file).absolute()}:{vocabulary.extra_ids}"
    return f"{type(vocabulary).__name__}:{vocabulary.extra_ids}"


def local_model_file(vocabulary: seqio.Vocabulary) -> str | None:
    """Returns the path of a vocabulary's model file, None for bytes; of a URL's, that of a copy."""
    if not isinstance(vocabulary, seqio.SentencePieceVocabulary):
        return None
    file = vocabulary.sentencepiece_model_file
    if not is_url(file):
        return file
    content = _content(file)
    path = corpus.cache_root() / "vocabularies" / f"{hashlib.sha256(content).hexdigest()}.model"
    if not path.is_file():
        write_file(path, content)
    return str(path)
