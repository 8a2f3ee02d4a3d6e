"""Training a SentencePiece model with T5's ids, in which chosen words are whole pieces."""

from __future__ import annotations

import string
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as model_pb2

from variator_jax.errors import DataError


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
