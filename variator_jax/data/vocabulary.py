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
import string
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as model_pb2

from variator_jax.data import corpus
from variator_jax.data._tf import seqio
from variator_jax.errors import DataError, did_you_mean

EXTRA_IDS = 100
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
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as out:
            out.write(model)
        Path(out.name).replace(path)
    return path


def train_sentencepiece(
    sentences: Sequence[str], pieces: int, whole_words: Iterable[str] = ()
) -> bytes:
    """Trains a unigram model and returns its bytes; ids are T5's (pad 0, eos 1, unk 2).

    Args:
      sentences: the training text.
      pieces: size of the vocabulary; fewer come out if the text does not have so many.
      whole_words: words that shall each be one piece, also at the start of a text.

    Raises:
      DataError: if SentencePiece cannot train on this text.
    """
    with tempfile.TemporaryDirectory() as folder:
        prefix = str(Path(folder) / "model")
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(sentences),
                model_prefix=prefix,
                model_type="unigram",
                vocab_size=pieces,
                hard_vocab_limit=False,
                character_coverage=1.0,
                pad_id=0,
                eos_id=1,
                unk_id=2,
                bos_id=-1,
                num_threads=2,
                minloglevel=2,
                required_chars=string.ascii_letters + string.digits + string.punctuation,
                max_sentence_length=2000,
                seed_sentencepiece_size=100_000,
                num_sub_iterations=2,
            )
        except RuntimeError as error:
            raise DataError(
                f"SentencePiece cannot train on {len(sentences)} sentences: {error}"
            ) from error
        return _with_whole_words(Path(prefix + ".model").read_bytes(), whole_words)


def _with_whole_words(model: bytes, words: Iterable[str]) -> bytes:
    """Makes each word a piece that always wins, in place of the rarest ordinary pieces.

    SentencePiece's own user-defined symbols would also match inside longer words ('no' in 'note'),
    so a word that is no piece yet enters as an ordinary one, likelier than any way of spelling it.
    """
    message: Any = model_pb2.ModelProto  # type: ignore[attr-defined]  # made at run time
    proto, normal = message.FromString(model), message.SentencePiece.NORMAL
    wanted = {f"\u2581{word}" for word in words}
    rare: Iterator[Any] = (
        piece
        for piece in reversed(list(proto.pieces))
        if piece.type == normal and len(piece.piece) > 2 and piece.piece not in wanted
    )
    best = max(piece.score for piece in proto.pieces if piece.type == normal)
    for word in sorted(wanted - {piece.piece for piece in proto.pieces}):
        piece = next(rare, None) or proto.pieces.add(type=normal)
        piece.piece, piece.score = word, best
    return bytes(proto.SerializeToString(deterministic=True))


def load_vocabulary(path: str | Path, extra_ids: int = EXTRA_IDS) -> seqio.SentencePieceVocabulary:
    """Returns the vocabulary of a user's SentencePiece model, such as T5's `spiece.model`.

    Args:
      path: the model file.
      extra_ids: sentinels that are added after the model's own pieces.

    Raises:
      DataError: if the file is missing or is no SentencePiece model.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        beside = [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else []
        raise DataError(f"no vocabulary file {path}.{did_you_mean(path.name, beside)}")
    processor = sentencepiece.SentencePieceProcessor()
    try:
        if not processor.LoadFromSerializedProto(path.read_bytes() or b"empty"):
            raise RuntimeError("not loaded")
    except RuntimeError as error:
        raise DataError(
            f"{path} is not a SentencePiece model; expected a file such as T5's spiece.model"
        ) from error
    return seqio.SentencePieceVocabulary(str(path), extra_ids=extra_ids)


def byte_vocabulary(extra_ids: int = 0) -> seqio.ByteVocabulary:
    """Returns ByT5's vocabulary of bytes; T5X's ByT5 reuses the last bytes as sentinels."""
    return seqio.ByteVocabulary(extra_ids=extra_ids)


def fingerprint(vocabulary: seqio.Vocabulary) -> str:
    """Returns what identifies a vocabulary: the sha256 of its SentencePiece model file, in hex.

    A vocabulary without a file (bytes) is identified by its class and size.
    """
    if isinstance(vocabulary, seqio.SentencePieceVocabulary):
        content = Path(vocabulary.sentencepiece_model_file).read_bytes()
    else:
        content = f"{type(vocabulary).__name__}:{vocabulary.vocab_size}".encode()
    return hashlib.sha256(content).hexdigest()
