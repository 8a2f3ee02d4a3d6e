"""Texts to token ids and back, and ragged lists of ids to arrays.

Ids are T5's: padding 0, end of sequence 1, and the sentinels `<extra_id_0>`, `<extra_id_1>`, ... at
the top of the vocabulary, counted downwards. They are the ids that seqio makes of the same text,
without seqio or TensorFlow: only `sentencepiece` is needed. Of a folder with `tokenizer.json` they
are transformers' ids, added tokens included. ByT5 has neither: its ids are bytes, and its sentinels
follow them, counted upwards as transformers does.
"""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from variator_jax import hf_tokenizer
from variator_jax.errors import CheckpointError, ConfigError
from variator_jax.files import wrap_errors
from variator_jax.hf_tokenizer import JSON, NAMED, PIECES, SENTINEL, SETTINGS, AddedToken

PAD, EOS = 0, 1
SENTINELS = 100
_FIRST_BYTE, _BYTES, _BYTE_SENTINELS = 3, 256, 125  # of ByT5: behind padding, EOS and unknown


class Tokenizer(Protocol):
    """Texts to ids and back."""

    size: int  # number of ids, sentinels included
    sentinels: Mapping[str, int]  # their ids
    added: Sequence[str]  # tokens that the folder of the vocabulary adds

    def encode(self, text: str) -> list[int]:
        """The ids of a text, the end of the sequence included."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids up to the end of the sequence."""


class PieceTokenizer:
    """A SentencePiece model with T5's hundred sentinels."""

    added: Sequence[str] = ()

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self.size: int = processor.get_piece_size()
        pieces = ((i, SENTINEL.search(processor.id_to_piece(i))) for i in range(self.size))
        self.sentinels: Mapping[str, int] = {match[0]: i for i, match in pieces if match}

    def encode(self, text: str) -> list[int]:
        """The ids of a text, the end of the sequence included.

        Raises:
          ConfigError: for a sentinel that there is not, a token that only transformers finds, or a
            text that is not Unicode.
        """
        hf_tokenizer.check_unicode(text)
        _check_sentinels(text, self.sentinels)
        for name, number in NAMED.items():
            if name in text:
                raise ConfigError(
                    f"the text holds {name!r}: letters to a {PIECES}, id {number} to transformers. "
                    f"Take it out, or use a folder with {JSON}, which has transformers' ids."
                )
        # A sentinel is a piece of its own only behind a space.
        spaced = SENTINEL.sub(lambda match: f" {match[0]}", text)
        return [*self._processor.encode(spaced), EOS]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids up to the end of the sequence; ids without a piece become unknown."""
        unknown = self._processor.unk_id()
        kept = [token if token < self.size else unknown for token in _up_to_end(ids)]
        return self._processor.decode([token for token in kept if token != PAD])


class ByteTokenizer:
    """ByT5's ids: 0 padding, 1 end, 2 unknown, then the 256 bytes of UTF-8, then sentinels.

    Args:
      vocab_size: the backbone's number of embeddings, 384 in all of ByT5; those behind the bytes
        are sentinels, up to 125.
      tokens: those that a folder of transformers adds, sentinels among them.
    """

    def __init__(self, vocab_size: int, tokens: Sequence[AddedToken] = ()) -> None:
        first = _FIRST_BYTE + _BYTES
        count = max(0, min(vocab_size - first, _BYTE_SENTINELS))
        names = {f"<extra_id_{i}>": first + i for i in range(count)}
        self._ids = names | {token.content: token.id for token in tokens if token.id is not None}
        self._flags = {token.content: token.flags for token in tokens}
        ids = self._ids.items()
        self.sentinels: Mapping[str, int] = {name: i for name, i in ids if SENTINEL.fullmatch(name)}
        self.added: Sequence[str] = [name for name, i in ids if i >= first and name not in names]
        longest_first = sorted(map(re.escape, self._ids), key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(longest_first) or SENTINEL.pattern})")
        self._pieces = {i: name.encode() for name, i in ids if i >= first}
        self._pieces |= {_FIRST_BYTE + i: bytes([i]) for i in range(_BYTES)}
        self.size: int = 1 + max(self._pieces)

    def encode(self, text: str) -> list[int]:
        """The ids of a text's bytes and sentinels, the end of the sequence included.

        Raises:
          ConfigError: for a sentinel that there is not, or a text that is not Unicode.
        """
        _check_sentinels(text, self.sentinels)
        parts = [part for part in self._split.split(text) if part]
        for i, part in enumerate(parts):
            flags = self._flags.get(part, {})
            if flags.get("lstrip") and i > 0:
                parts[i - 1] = parts[i - 1].rstrip()
            if flags.get("rstrip") and i + 1 < len(parts):
                parts[i + 1] = parts[i + 1].lstrip()
        ids: list[int] = []
        for part in parts:
            content = [_FIRST_BYTE + byte for byte in hf_tokenizer.check_unicode(part)]
            ids += [self._ids[part]] if part in self._ids else content
        return ids if ids[-1:] == [EOS] else [*ids, EOS]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids up to the end of the sequence.

        Ids without a piece, and bytes that make up no character, are left out, as seqio and
        transformers do.
        """
        pieces = (self._pieces.get(token, b"") for token in _up_to_end(ids))
        return b"".join(pieces).decode(errors="ignore")


def _up_to_end(ids: Sequence[int]) -> Iterator[int]:
    return itertools.takewhile(lambda token: token != EOS, map(int, ids))


def _check_sentinels(text: str, known: Mapping[str, int]) -> None:
    for match in SENTINEL.finditer(text):
        if match[0] not in known:
            names = f"go from <extra_id_0> to <extra_id_{len(known) - 1}>" if known else "are none"
            raise ConfigError(f"the text holds {match[0]}; sentinels {names}.")


def load_tokenizer(path: Path, vocab_size: int = 384) -> Tokenizer:
    """Reads a vocabulary: a `spiece.model`, a `tokenizer.json`, or ByT5's `tokenizer_config.json`.

    Args:
      path: the file. Those beside it count, too, where they add tokens.
      vocab_size: the backbone's number of embeddings, for the sentinels of ByT5.

    Raises:
      ConfigError: if `sentencepiece` or `tokenizers` is not installed.
      CheckpointError: if the file is missing, damaged or of another kind; or where tokens are added
        that could not be read as transformers does.
    """
    if path.name not in (JSON, SETTINGS):
        return _load_pieces(path)
    kind = hf_tokenizer.tokenizer_class(hf_tokenizer.read_settings(path.parent))
    if kind == "ByT5Tokenizer":
        return _load_bytes(path.parent, vocab_size)
    if path.name == SETTINGS:
        raise CheckpointError(f"{path} names a {kind}, but {JSON} and spiece.model are missing.")
    return hf_tokenizer.load_json(path)


def _load_bytes(folder: Path, vocab_size: int) -> ByteTokenizer:
    listed = "added_tokens_decoder" in hf_tokenizer.read_settings(folder)
    ids = NAMED | dict(ByteTokenizer(vocab_size).sentinels)
    stripped = {"lstrip": True, "rstrip": True}  # of the first three, where no file has it
    tokens = {text: AddedToken(text, i, stripped) for text, i in ids.items() if i < _FIRST_BYTE}
    for token in hf_tokenizer.added_tokens(folder):
        number = ids.get(token.content, token.id if listed else None)
        if number is None or token.id not in (None, number) or token.flags.get("single_word"):
            adds = f"{folder} adds {token.content!r} to ByT5's tokens"
            remedy = "ByT5Tokenizer.save_pretrained of transformers 5 writes it"
            raise CheckpointError(f"{adds}, but not with this id in {SETTINGS}. {remedy}.")
        flags = {**(stripped if number < _FIRST_BYTE else {}), **token.flags}
        tokens[token.content] = AddedToken(token.content, number, flags)
    return ByteTokenizer(vocab_size, list(tokens.values()))


def _load_pieces(path: Path) -> PieceTokenizer:
    """Models without sentinels of their own (all but mT5's) get T5's."""
    try:
        import sentencepiece
        from sentencepiece import sentencepiece_model_pb2 as model_pb2
    except ImportError as error:
        raise ConfigError(
            f"Texts need sentencepiece and protobuf ({error}): pip install sentencepiece protobuf, "
            "or 'variator_jax[train]' with all that training needs. Token ids need neither."
        ) from error
    message: Any = model_pb2.ModelProto  # type: ignore[attr-defined]  # made at run time
    with wrap_errors(f"{path} is not a SentencePiece model"):
        proto = message.FromString(path.read_bytes())
        if not any(SENTINEL.search(piece.piece) for piece in proto.pieces):
            for i in reversed(range(SENTINELS)):
                piece = proto.pieces.add(type=message.SentencePiece.USER_DEFINED)
                piece.piece, piece.score = f"\u2581<extra_id_{i}>", 0.0
        processor = sentencepiece.SentencePieceProcessor()
        processor.LoadFromSerializedProto(proto.SerializeToString() or b"empty")
    tokenizer = PieceTokenizer(processor)
    hf_tokenizer.check_none_added(path, tokenizer.sentinels)
    return tokenizer


def text_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text, EOS last.

    Raises:
      ConfigError: if the tokenizer refuses the text, or reads a token of padding in it, which
        would be masked.
    """
    ids = tokenizer.encode(text)
    if PAD in ids:
        raise ConfigError(f"A text holds '<pad>', the token of padding: {text[:60]!r}.")
    return ids


def token_array(what: str, tokens: Any, vocab_size: int) -> np.ndarray:
    """Token ids as an array `[batch, length]` int32; rows of unequal length are padded with 0.

    Args:
      what: the argument's name, for messages.
      tokens: an integer array `[batch, length]`, or a list of lists (or arrays) of ids.
      vocab_size: ids are below it.

    Raises:
      ConfigError: for anything else, or naming the first id that does not exist.
    """
    if isinstance(tokens, jax.core.Tracer):
        remedy = "Inside jit, enter variator_jax.splice round the network."
        raise ConfigError(f"{what} is traced: a model compiles its own calls. {remedy}")
    array = _padded(what, tokens) if isinstance(tokens, (list, tuple)) else _array(what, tokens)
    if array.ndim != 2 or 0 in array.shape:
        expected = "expected [batch, length], both 1 or more"
        hint = "One sequence is a batch of one: [[...]]."
        raise ConfigError(f"{what} has shape {array.shape}; {expected}. {hint}")
    wrong = np.argwhere((array < 0) | (array >= vocab_size))
    if wrong.size:
        row, column = wrong[0]
        place = f"id {array[row, column]} in row {row} at position {column}"
        raise ConfigError(f"{what} holds {place}; the vocabulary's ids are 0 to {vocab_size - 1}.")
    return array.astype(np.int32)


def check_padding(tokens: np.ndarray) -> None:
    """Refuses `[rows, length]` with padding before a token, which would move the merge groups."""
    wrong = np.argwhere((tokens[:, :-1] == 0) & (tokens[:, 1:] > 0))
    if wrong.size:
        row, column = wrong[0]
        place = f"position {column} of row {row}, before a token"
        reason = "a plugin merges neighbours, so padding stands behind them"
        raise ConfigError(f"token_ids has padding at {place}; {reason}.")


def _padded(what: str, rows: Sequence[Any]) -> np.ndarray:
    arrays = [_array(f"{what}, row {i},", row) for i, row in enumerate(rows)]
    for i, array in enumerate(arrays):
        if array.ndim != 1 or not array.size:
            found = f"{what} has shape {array.shape} in row {i}; expected [length]"
            raise ConfigError(f"{found}: a batch of one is a list in it, [[...]].")
    columns = itertools.zip_longest(*arrays, fillvalue=PAD)
    return np.array(list(columns), np.int64).T


def _array(what: str, tokens: Any) -> np.ndarray:
    try:
        array = np.asarray(tokens)
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"{what} is not an array of token ids: {error}.") from error
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise ConfigError(f"{what} has dtype {array.dtype}; expected integers, the ids of tokens.")
    return array
