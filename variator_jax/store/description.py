"""The JSON file that describes a folder: written with a checksum of itself, read with suspicion.

Everything in it came from somebody else, by mail perhaps, so that each value is checked for its
type before it is used, and a complaint names the file and the key.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from variator_jax.errors import CheckpointError, VariatorError, did_you_mean
from variator_jax.store.arrays_file import file_checksum
from variator_jax.store.files import check_file, read_error

FORMAT_VERSION = 1
VERSIONS = {"plugin": 2}  # of the kinds whose format has changed
CHECKSUM, CHECKSUMS = "checksum", "file_checksums"
_LONGEST = 10_000_000
_BLANK = "0" * 64
T = TypeVar("T")

_WORDS: dict[type, str] = {
    dict: "an object",
    list: "a list",
    str: "a text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    type(None): "null",
}


def write_description(path: pathlib.Path, kind: str, content: Mapping[str, Any]) -> None:
    """Writes a folder's description, with its kind, the format's version and its own checksum."""
    head = {"kind": kind, "format_version": VERSIONS.get(kind, FORMAT_VERSION)}
    text = json.dumps({**head, **content, CHECKSUM: _BLANK}, indent=2, allow_nan=False) + "\n"
    before, _, after = text.rpartition(_BLANK)
    digest = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(before + digest + after, encoding="utf8", newline="\n")


def read_description(path: pathlib.Path, kind: str) -> Fields:
    """Reads a folder's description and checks what it describes and in which format.

    Raises:
      CheckpointError: if the file is missing or broken, of another kind, or of a newer format.
    """
    content = read_json(path, kind)
    if not isinstance(content, dict) or content.get("kind") != kind:
        raise CheckpointError(f"{path} does not describe a {kind.replace('_', ' ')}.")
    version = content.get("format_version")
    newest = VERSIONS.get(kind, FORMAT_VERSION)
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise CheckpointError(f"{path} has format version {version!r}; expected {newest}.")
    if version > newest:
        raise CheckpointError(
            f"{path} has format version {version}; this release reads up to {newest}. "
            "Update variator_jax to read it."
        )
    return Fields(path, content)


def config_content(config: Any) -> dict[str, Any]:
    """A configuration dataclass as `Fields.config` reads it, optional numbers only if they are set.

    So a folder without use for a number that came later is what it was, and older releases read it.
    """
    return {
        item.name: value
        for item in dataclasses.fields(config)
        if (value := getattr(config, item.name)) is not None or str(item.type) != _OPTIONAL
    }


def read_json(path: pathlib.Path, kind: str) -> Any:
    """Reads a JSON file of moderate size.

    Raises:
      CheckpointError: naming the file and the reason.
    """
    try:
        check_file(path)
    except CheckpointError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise CheckpointError(
                f"{path.parent} holds no {kind.replace('_', ' ')}: there is no {path.name} in it."
            ) from error
        raise
    try:
        if path.stat().st_size > _LONGEST:
            raise CheckpointError(f"{path} is longer than {_LONGEST:,} bytes: no description is.")
        return json.loads(path.read_text(encoding="utf8"))
    except OSError as error:
        raise read_error(path, error) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}.") from error


def check_unchanged(fields: Fields, *files: pathlib.Path) -> None:
    """Compares the checksums of the description and of files beside it, in that order.

    It is the last of the checks, for whatever the others, whose messages say more, let through.

    Raises:
      CheckpointError: if anything was changed since the folder was written, or damaged.
    """
    path, written = fields.path, fields.fingerprint(CHECKSUM)
    # Mail and version control may have changed the line ends.
    data = path.read_bytes().replace(b"\r\n", b"\n")
    before, _, after = data.rpartition(written.encode())
    if hashlib.sha256(before + _BLANK.encode() + after).hexdigest() != written:
        raise CheckpointError(f"{path} was changed or damaged: its checksum is another one.")
    checksums = fields.fields(CHECKSUMS)
    for file in files:
        expected, found = checksums.fingerprint(file.name), file_checksum(file)
        if found != expected:
            raise CheckpointError(
                f"{file} was changed or damaged: its checksum is {found}, its description says "
                f"{expected}."
            )


class Fields:
    """A JSON object, read key by key."""

    def __init__(self, path: pathlib.Path, content: Mapping[str, Any], where: str = "") -> None:
        self.path, self.content, self._where = path, content, where

    def get(self, key: str, *types: type) -> Any:
        """The value of a key, which is of one of the types.

        Raises:
          CheckpointError: naming file, key and both types.
        """
        name = f"{self._where}{key}"
        if key not in self.content:
            near = did_you_mean(key, map(str, self.content))
            raise CheckpointError(f"{self.path} has no {name!r}.{near}")
        value = self.content[key]
        if type(value) not in types:
            expected = " or ".join(_WORDS[kind] for kind in types)
            raise CheckpointError(
                f"{self.path}: {name!r} is {_WORDS.get(type(value), 'something else')}; expected "
                f"{expected}."
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise CheckpointError(f"{self.path}: {name!r} is {value}; expected a finite number.")
        return value

    def size(self, key: str, least: int, most: int) -> int:
        """A whole number between two bounds."""
        value = self.get(key, int)
        if not least <= value <= most:
            raise CheckpointError(
                f"{self.path}: '{self._where}{key}' is {str(value)[:40]}; expected {least} to "
                f"{most:,}."
            )
        return value

    def fingerprint(self, key: str) -> str:
        """64 hex digits."""
        value = self.get(key, str)
        if not re.fullmatch("[0-9a-f]{64}", value):
            raise CheckpointError(
                f"{self.path}: '{self._where}{key}' is {value[:80]!r}; expected 64 hex digits."
            )
        return value

    def fields(self, key: str) -> Fields:
        """An object within."""
        return Fields(self.path, self.get(key, dict), f"{self._where}{key}.")

    def config(self, key: str, kind: type[T]) -> T:
        """A configuration dataclass written by `config_content`, every field of it.

        Raises:
          CheckpointError: for missing, unknown or mistyped fields, or values it does not accept.
        """
        fields = self.fields(key)
        declared = {item.name: str(item.type) for item in dataclasses.fields(kind)}  # type: ignore[arg-type]
        for name in fields.content:
            if name not in declared:
                raise CheckpointError(
                    f"{self.path}: {key!r} has an unknown field {name[:100]!r}."
                    f"{did_you_mean(name, declared)}"
                )
        values = {
            name: fields.get(name, *_TYPES[text])
            for name, text in declared.items()
            if text != _OPTIONAL or name in fields.content
        }
        for name, text in declared.items():
            fields._check_items(name, text)
        try:
            return kind(**values)
        except (VariatorError, re.error) as error:
            raise CheckpointError(f"{self.path} has no usable {key}: {error}") from error

    def _check_items(self, key: str, declared: str) -> None:
        kinds: dict[str, type] = {"Sequence[int] | None": int, "Sequence[str]": str}
        if declared not in kinds:
            return
        wanted = kinds[declared]
        for item in self.content[key] or ():
            if type(item) is not wanted:
                raise CheckpointError(
                    f"{self.path}: '{self._where}{key}' holds "
                    f"{_WORDS.get(type(item), 'something else')}; expected only "
                    f"{_WORDS[wanted]} each."
                )


_OPTIONAL = "int | None"  # such a field may be missing, and is then its default
# JSON types by the annotation of a configuration's field.
_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    _OPTIONAL: (int, type(None)),
    "float": (float, int),
    "bool": (bool,),
    "str": (str,),
    "bool | str": (bool, str),
    "Sequence[str]": (list,),
    "Sequence[int] | None": (list, type(None)),
}
