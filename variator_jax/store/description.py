"""Our folders: `KIND.json`, with a checksum of every file and every value checked, and arrays."""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from variator_jax.errors import CheckpointError, check_known
from variator_jax.files import AnyPath, atomic_folder, wrap_errors
from variator_jax.store import arrays

LARGEST = 1 << 24  # no setting of a T5 or a plugin comes near it; a damaged number does
_LONGEST = 10_000_000  # bytes
_BLANK = "0" * 64
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Owner:
    """The backbone that a plugin, a set of them or a LoRA belongs to."""

    name: str
    fingerprint: str


def owner_content(backbone: Any) -> dict[str, Any]:
    """What a description keeps of its `Owner`."""
    return {"name": backbone.config.name, "fingerprint": backbone.fingerprint}


def check_belongs(what: str, content: Mapping[str, Any], backbone: Any) -> None:
    """Compares the fingerprints in the description of a plugin or a LoRA with a backbone's.

    Args:
      what: the plugin or LoRA, as a message begins.
      content: its description, whose types were checked.
      backbone: the backbone it is to be used with.

    Raises:
      CheckpointError: with both fingerprints.
    """
    owner = content["backbone"]
    if owner["fingerprint"] != backbone.fingerprint:
        other = _title(owner["name"], owner["fingerprint"], owner.get("lora"))
        ours = _title(backbone.config.name, backbone.fingerprint, backbone.lora)
        merged = owner.get("lora")
        hint = " Give its LoRA, too (INITIAL_LORA_PATH)." if merged else ""
        if merged and backbone.lora and merged["fingerprint"] == backbone.lora["fingerprint"]:
            # Merging before and after rounding gives different weights.
            hint = (
                " Its LoRA was merged into other weights: load_backbone(path, dtype=..., lora=...)."
            )
        raise CheckpointError(f"{what} belongs to backbone {other}; this backbone is {ours}.{hint}")
    trained, given = content["vocabulary_fingerprint"], backbone.vocabulary_fingerprint
    if trained and given and trained != given:
        problem = f"the vocabulary of fingerprint {trained}; the backbone's is {given}"
        raise CheckpointError(f"{what} was trained with {problem}.")


def _title(name: str, fingerprint: str, lora: Mapping[str, str] | None) -> str:
    merged = f" with a LoRA merged in (task {lora['task']!r})" if lora else ""
    return f"{name!r}{merged} with fingerprint {fingerprint}"


def save_folder(
    path: AnyPath,
    kind: str,
    leaves: Mapping[str, Any],
    content: Mapping[str, Any],
    version: int = 1,
) -> None:
    """Writes a folder with `KIND.json` and `KIND.safetensors`, atomically.

    Args:
      path: the folder.
      kind: 'plugin' or 'lora'.
      leaves: the arrays by name.
      content: the description.
      version: of the format.

    Raises:
      CheckpointError: if the folder cannot be written, or an array is not finite.
    """
    host = {name: np.asarray(leaf) for name, leaf in sorted(leaves.items())}
    for name, leaf in host.items():
        arrays.check_finite(f"{path}: {name}", leaf)
    with atomic_folder(path, (f"{kind}.json",), rf"{kind}\.safetensors") as draft:
        arrays.write_arrays(draft, kind, host.items())
        write_description(draft / f"{kind}.json", kind, content, version)


def load_arrays(
    folder: pathlib.Path, kind: str, expected: Mapping[str, Any], checksums: Mapping[str, str]
) -> dict[str, np.ndarray]:
    """Reads `KIND.safetensors`, whose arrays must be the expected ones, float32 and finite.

    Raises:
      CheckpointError: naming what is missing, damaged or does not fit.
    """
    file = folder / f"{kind}.safetensors"
    stored = arrays.open_arrays(file)
    check_file(file, checksums.get(file.name))
    return arrays.read_arrays(file, stored, expected)


def write_description(
    path: pathlib.Path, kind: str, content: Mapping[str, Any], version: int = 1
) -> None:
    """Writes a description, with checksums of itself and of the folder's other files."""
    others = sorted(file for file in path.parent.iterdir() if file.is_file())
    files = {file.name: arrays.file_checksum(file) for file in others}
    head = {"kind": kind, "format_version": version}
    content = {**head, **content, "file_checksums": files, "checksum": _BLANK}
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    path.write_text(_signed(text, _BLANK), encoding="utf8", newline="\n")


def _signed(text: str, signature: str) -> str:
    """The text with its own checksum in the place of the last `signature`."""
    before, _, after = text.rpartition(signature)
    digest = hashlib.sha256(f"{before}{_BLANK}{after}".encode()).hexdigest()
    return f"{before}{digest}{after}"


def read_description(
    path: pathlib.Path, kind: str, schema: type[T], newest: int = 1
) -> tuple[T, dict[str, Any]]:
    """Reads a description and checks its kind, format, checksum, and every value.

    Args:
      path: the file.
      kind: what it should describe: 'backbone', 'plugin', ...
      schema: a dataclass of what the description holds.
      newest: the newest format that is read.

    Returns:
      The description as that dataclass, and as it is in the file.

    Raises:
      CheckpointError: if it is missing, damaged, of another kind or of a newer format.
    """
    if path.parent.is_dir() and not os.path.lexists(path):
        raise CheckpointError(f"{path.parent} holds no {kind}: there is no {path.name} in it.")
    content = read_json(path)
    if content.pop("kind", None) != kind:
        raise CheckpointError(f"{path} does not describe a {kind.replace('_', ' ')}.")
    version = content.pop("format_version", None)
    if type(version) is not int or not 1 <= version <= newest:
        known = f"this release reads 1 to {newest}. Update variator_jax to read a newer one"
        raise CheckpointError(f"{path} has format version {str(version)[:40]}; {known}.")
    signature = content.pop("checksum", None)
    text = path.read_text(encoding="utf8")  # mail may have changed the line ends; this undoes it
    if not signature or _signed(text, str(signature)) != text:
        raise CheckpointError(f"{path} was changed or damaged: its checksum does not match.")
    return parse(schema, content, str(path)), content


def check_file(path: pathlib.Path, expected: str | None) -> None:
    """Compares a file with the checksum in its description.

    Raises:
      CheckpointError: if it is missing, or was changed or damaged since it was written.
    """
    actual = arrays.file_checksum(path)
    if actual != expected:
        reason = f"its checksum is {actual}; expected {expected}"
        raise CheckpointError(f"{path} was changed or damaged: {reason}.")


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Reads a JSON object of moderate size.

    Raises:
      CheckpointError: naming the file and the reason.
    """
    with wrap_errors(f"{path} cannot be read"), path.open("rb") as file:
        return parse_json(path, file.read(_LONGEST + 1))


def parse_json(path: str | pathlib.Path, data: bytes) -> dict[str, Any]:
    """The JSON object in a file's bytes; errors as `read_json`."""
    with wrap_errors(f"{path} is not readable JSON"):
        if len(data) > _LONGEST:
            raise ValueError(f"it is longer than {_LONGEST:,} bytes")
        content = json.loads(data)
    return _typed(dict, content, str(path))


def config_content(config: Any) -> dict[str, Any]:
    """A configuration dataclass as `parse` reads it; what is None by default is left out then.

    So older releases read folders that do not use a newer setting.
    """
    return {
        field.name: value
        for field in dataclasses.fields(config)
        if (value := getattr(config, field.name)) is not None or field.default is not None
    }


def parse(kind: Any, value: Any, context: str) -> Any:
    """Checks a value of a JSON file against a type annotation, and builds dataclasses.

    A field that is absent takes the dataclass's default, so new fields do not make old files
    unreadable.

    Args:
      kind: a type, `Any`, a union, a list, a mapping or a dataclass of such.
      value: what `json` returned.
      context: file and key, for messages.

    Raises:
      CheckpointError: for a missing, unknown or mistyped field, or a value that is not accepted.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        exact = [option for option in arguments if option is type(value)]
        others = [option for option in arguments if option is not type(None)]
        return parse((exact or others)[0], value, context)
    if dataclasses.is_dataclass(kind):
        return _parse_dataclass(kind, _typed(dict, value, context), context)
    if origin in (list, Sequence):
        return [parse(arguments[0], item, context) for item in _typed(list, value, context)]
    if origin in (dict, Mapping):
        items = _typed(dict, value, context).items()
        return {key: parse(arguments[1], item, f"{context}.{key[:80]}") for key, item in items}
    return _typed(kind, value, context)


def _parse_dataclass(kind: Any, content: dict[str, Any], context: str) -> Any:
    annotations = typing.get_type_hints(kind)
    for name in content:
        check_known(f"{context} has no field", name[:100], annotations, CheckpointError)
    values = {name: parse(annotations[name], x, f"{context}.{name}") for name, x in content.items()}
    with wrap_errors(f"{context} is not usable"):
        return kind(**values)


def _typed(kind: type, value: Any, context: str) -> Any:
    accepted = (int, float) if kind is float else (kind,)
    if type(value) not in accepted:
        raise CheckpointError(f"{context} is a {type(value).__name__}; expected {kind.__name__}.")
    if type(value) in (int, float) and not (math.isfinite(value) and abs(value) <= LARGEST):
        raise CheckpointError(f"{context} is {str(value)[:40]}; expected at most {LARGEST:,}.")
    return value
