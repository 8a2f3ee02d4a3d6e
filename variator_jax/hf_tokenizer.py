"""Hugging Face's tokenizer files: `tokenizer.json`, and the tokens that other files add.

Ids are those of transformers' AutoTokenizer; only `tokenizers` is needed.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from variator_jax.errors import CheckpointError, ConfigError
from variator_jax.files import wrap_errors

JSON, PIECES, SETTINGS = "tokenizer.json", "spiece.model", "tokenizer_config.json"
_ADDED, _SPECIAL = "added_tokens.json", "special_tokens_map.json"
#: The files of a vocabulary. The first three can be one; the others change its ids.
FILES = (JSON, PIECES, SETTINGS, _ADDED, _SPECIAL)
SENTINEL = re.compile(r"(<extra_id_\d+>)")
NAMED = {"<pad>": 0, "</s>": 1, "<unk>": 2}
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
# transformers' T5Tokenizer takes the pieces and the charsmap of a file, and the rest from here.
_METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
_FIRST = {"Sequence": {"id": "A", "type_id": 0}}
_T5: dict[str, Any] = {
    "pre_tokenizer": {
        "type": "Sequence",
        "pretokenizers": [{"type": "WhitespaceSplit"}, _METASPACE],
    },
    "decoder": _METASPACE,
    "post_processor": {
        "type": "TemplateProcessing",
        "single": [_FIRST, {"SpecialToken": {"id": "</s>", "type_id": 0}}],
        "pair": [_FIRST, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
    },
}


@dataclasses.dataclass(frozen=True)
class AddedToken:
    """A token that is found in the text before all others; `id` is None where no file has one."""

    content: str
    id: int | None
    flags: Mapping[str, bool]


def find_vocabulary(folder: Path) -> Path | None:
    """The file of a folder's vocabulary: `tokenizer.json`, then `spiece.model`, then ByT5's."""
    return next((folder / name for name in FILES[:3] if (folder / name).is_file()), None)


def vocabulary_files(file: Path) -> dict[Path, str]:
    """The files to copy with a vocabulary, itself first, and their names in another folder."""
    if file.name not in FILES:
        return {file: PIECES}
    names = FILES[FILES.index(file.name) :]
    return {file.parent / name: name for name in names if (file.parent / name).is_file()}


def read_settings(folder: Path) -> dict[str, Any]:
    """What `tokenizer_config.json` has, and where it lists no tokens, `special_tokens_map.json`."""
    settings = _read(folder / SETTINGS)
    return settings if "added_tokens_decoder" in settings else settings | _read(folder / _SPECIAL)


def tokenizer_class(settings: Mapping[str, Any]) -> str:
    """The class of transformers that a folder names, by default T5's."""
    return str(settings.get("tokenizer_class") or "T5Tokenizer").removesuffix("Fast")


def added_tokens(folder: Path, listed: Sequence[Mapping[str, Any]] = ()) -> list[AddedToken]:
    """The tokens that a folder's files add, in the order in which transformers adds them.

    Args:
      folder: of the vocabulary.
      listed: those in `tokenizer.json`, which count where `tokenizer_config.json` lists none.

    Raises:
      CheckpointError: if a file is damaged.
    """
    settings = read_settings(folder)
    extras = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    extras = list(extras.values() if isinstance(extras, dict) else extras)
    extras += [settings[key] for key in settings if key.endswith("_token") and settings[key]]
    with wrap_errors(f"{folder}: the added tokens cannot be read"):
        special = [_token(value, None, True) for value in extras]
        contents = {token.content for token in special} | set(NAMED)
        numbers = _read(folder / _ADDED).items()
        numbered = {i: _token(text, i, text in contents) for text, i in numbers}
        numbered |= {token["id"]: _token(token, token["id"], False) for token in listed}
        if "added_tokens_decoder" in settings:
            decoder = settings["added_tokens_decoder"]
            numbered = {int(i): _token(value, int(i), False) for i, value in decoder.items()}
        tokens = [numbered[i] for i in sorted(numbered)] + special
    first = {token.content: token for token in reversed(tokens)}
    return [first[text] for text in dict.fromkeys(token.content for token in tokens)]


def _token(value: Any, number: int | None, special: bool) -> AddedToken:
    """A token of a file; one that is only a text has no flags but those that follow."""
    given = {"content": value, "special": special} if isinstance(value, str) else value
    special = bool(given.get("special", special))
    flags = {name: bool(given[name]) for name in _FLAGS if name in given}
    return AddedToken(str(given["content"]), number, {"normalized": not special} | flags)


def check_none_added(path: Path, sentinels: Mapping[str, int]) -> None:
    """Refuses a SentencePiece model to which the files beside it add tokens.

    Raises:
      CheckpointError: with the token and the remedy.
    """
    known = NAMED | dict(sentinels)
    for token in added_tokens(path.parent) if path.name == PIECES else ():
        number = known.get(token.content.removeprefix("▁"))
        if number is None or token.id not in (None, number):
            raise CheckpointError(
                f"{path.parent} adds the token {token.content!r} to {path.name}, by "
                f"{SETTINGS}, {_ADDED} or {_SPECIAL}. Ids with it need {JSON}: "
                f"AutoTokenizer.from_pretrained({str(path.parent)!r}).save_pretrained(...) of "
                "transformers 5 writes one."
            )


class JsonTokenizer:
    """A `tokenizer.json`, with the ids and texts of transformers.

    `size` is the number of ids; `added` are the tokens that are neither T5's own nor sentinels.
    """

    def __init__(self, tokenizer: Any, added: Sequence[str]) -> None:
        self._tokenizer, self.added = tokenizer, added
        self.size: int = tokenizer.get_vocab_size()
        vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
        found = ((SENTINEL.search(text), i) for text, i in vocab)
        self.sentinels: Mapping[str, int] = {match[0]: i for match, i in found if match}

    def encode(self, text: str) -> list[int]:
        """The ids of a text, the end of the sequence included.

        Raises:
          ConfigError: for a text that is not Unicode.
        """
        check_unicode(text)
        return self._tokenizer.encode(text).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids up to the end of the sequence; ids without a piece are left out."""
        kept = [int(token) for token in ids if token != 0]
        kept = kept[: kept.index(1)] if 1 in kept else kept
        return self._tokenizer.decode(kept, skip_special_tokens=False)


def check_unicode(text: str) -> bytes:
    """A text as UTF-8.

    Raises:
      ConfigError: if it cannot be written so.
    """
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"the text cannot be written as UTF-8: {error}.") from error


def load_json(path: Path) -> JsonTokenizer:
    """Reads a `tokenizer.json` as transformers' AutoTokenizer does.

    Raises:
      ConfigError: if `tokenizers` is not installed.
      CheckpointError: if the file is damaged, or its ids are not T5's.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise ConfigError(
            f"Texts of a {JSON} need tokenizers ({error}): pip install tokenizers, or "
            "'variator_jax[train]' with all that training needs. Token ids need it not."
        ) from error
    content, settings = _read(path), read_settings(path.parent)
    kind = tokenizer_class(settings)
    if kind not in ("T5Tokenizer", "MT5Tokenizer", "TokenizersBackend", "PreTrainedTokenizer"):
        raise CheckpointError(f"{path.parent / SETTINGS} names a {kind}; expected a T5Tokenizer.")
    tokens = added_tokens(path.parent, content.get("added_tokens") or [])
    names = {token.content for token in tokens}
    more = list(NAMED)
    if not {"extra_special_tokens", "additional_special_tokens"} & set(settings):
        more += [f"<extra_id_{i}>" for i in range(settings.get("extra_ids", 100))]
    if kind == "T5Tokenizer":
        tokens += [_token(text, None, True) for text in more if text not in names]
    with wrap_errors(f"{path} is not a tokenizer of a T5"):
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(_model(content, kind)))
        tokenizer.add_tokens([tokenizers.AddedToken(t.content, **t.flags) for t in tokens])
    _check_ids(path, tokenizer, tokens)
    own = [t.content for t in tokens if t.content not in more and not SENTINEL.search(t.content)]
    return JsonTokenizer(tokenizer, own)


def _model(content: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The file without its added tokens, and for a T5 with T5's own steps."""
    model = {**content, "added_tokens": [], "truncation": None, "padding": None}
    if kind != "T5Tokenizer":
        return model
    normalizer = content.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    maps = [step for step in steps if step.get("type") == "Precompiled"]
    unigram = {**content["model"], "unk_id": 2, "byte_fallback": False}
    return model | _T5 | {"normalizer": maps[0] if maps else None, "model": unigram}


def _check_ids(path: Path, tokenizer: Any, tokens: Sequence[AddedToken]) -> None:
    expected = NAMED | {token.content: token.id for token in tokens if token.id is not None}
    for text, number in expected.items():
        found = tokenizer.token_to_id(text)
        if found != number:
            raise CheckpointError(f"{path} has {text!r} as id {found}; expected {number}.")
    if tokenizer.encode("").ids != [1]:
        raise CheckpointError(f"{path} ends no text with </s>, id 1, as a T5 needs.")


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; empty if there is no such file."""
    if not path.exists():
        return {}
    with wrap_errors(f"{path} cannot be read"):
        content = json.loads(path.read_text(encoding="utf8"))
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object.")
    return content
