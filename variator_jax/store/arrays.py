"""Named arrays on disk: safetensors files, fingerprints, checksums, checks of names and shapes."""

import functools
import hashlib
import pathlib
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from flax import traverse_util
from safetensors import safe_open
from safetensors.numpy import save_file

from variator_jax.errors import CheckpointError, ConfigError, did_you_mean
from variator_jax.files import AnyPath, wrap_errors

SHARD_SIZE = 5 * 10**9  # bytes in one safetensors file, and so in memory while it is written
WEIGHTS = ("float32", "bfloat16", "float16")
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_DTYPES = {"F64": np.dtype("f8"), "F32": np.dtype("f4"), "F16": np.dtype("f2"), "BF16": _BFLOAT16}
_DTYPES |= {"I64": np.dtype("i8"), "I32": np.dtype("i4")}  # rare, in Hugging Face folders only
_SHORT = {"f32": "float32", "fp32": "float32", "bf16": "bfloat16", "f16": "float16"}


class Stored(NamedTuple):
    """An array in a file, not read yet; T5X's are read by parts: `read(index)`."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[..., np.ndarray]


def parse_dtype(dtype: Any) -> np.dtype | None:
    """The dtype of a name such as 'bf16', a numpy or a JAX dtype; None stays None.

    Raises:
      ConfigError: for a dtype that weights do not have.
    """
    if dtype is None:
        return None
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    name = _SHORT.get(name, name)
    if name not in WEIGHTS:
        near = did_you_mean(name, [*WEIGHTS, *_SHORT])
        raise ConfigError(f"Weights have no dtype {name!r}, only {', '.join(WEIGHTS)}.{near}")
    return np.dtype(name)


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A nested dict as a flat one, names joined by '/'."""
    return traverse_util.flatten_dict(dict(tree), sep="/")


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict of a flat one."""
    return traverse_util.unflatten_dict(dict(leaves), sep="/")


def check_downloaded(path: pathlib.Path) -> None:
    """Refuses a pointer of git-lfs in place of its file.

    Raises:
      CheckpointError: for one, or if the file cannot be read.
    """
    with wrap_errors(f"{path} cannot be read"), path.open("rb") as file:
        pointer = file.read(40).startswith(b"version https://git-lfs")
    if pointer:
        hint = "run `git lfs install` and `git lfs pull` in its repository, or download it again"
        raise CheckpointError(f"{path} is a git-lfs pointer and not the file itself; {hint}.")


def open_arrays(path: pathlib.Path) -> dict[str, Stored]:
    """The arrays of a safetensors file by name; each is read when its `read` is called.

    Raises:
      CheckpointError: if the file is missing or damaged, or an array has a dtype of no weights.
    """
    check_downloaded(path)
    with wrap_errors(f"{path} cannot be read"):
        file = safe_open(path, framework="np")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    stored = {}
    for name, view in slices.items():
        code = view.get_dtype()
        if code not in _DTYPES:
            raise CheckpointError(f"{path}: {name} is {code}. Quantised weights are not read.")
        read = wrap_errors(f"{path} cannot be read")(functools.partial(file.get_tensor, name))
        stored[name] = Stored(tuple(view.get_shape()), _DTYPES[code], read)
    return stored


def write_arrays(
    folder: pathlib.Path,
    stem: str,
    arrays: Iterable[tuple[str, np.ndarray]],
    metadata: dict[str, str] | None = None,
    limit: int = SHARD_SIZE,
) -> dict[str, str]:
    """Writes `<stem>.safetensors`, or several `<stem>-00001-of-00002.safetensors`.

    Args:
      folder: where to write.
      stem: of the files' names.
      arrays: names and arrays, which may come one by one.
      metadata: text for the files' headers.
      limit: bytes a file, unless one array is larger; no more is in memory at a time.

    Returns:
      The name of its file by that of each array.
    """
    shards: list[list[str]] = []
    pending: dict[str, np.ndarray] = {}

    def flush() -> None:
        save_file(pending, folder / f"{len(shards)}.part", metadata)
        shards.append(list(pending))
        pending.clear()

    for name, array in arrays:
        if pending and sum(x.nbytes for x in pending.values()) + array.nbytes > limit:
            flush()
        pending[name] = np.asarray(array, order="C")  # the library ignores strides
    flush()
    files: dict[str, str] = {}
    for i, names in enumerate(shards):
        part = f"-{i + 1:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        (folder / f"{i}.part").rename(folder / f"{stem}{part}.safetensors")
        files |= dict.fromkeys(names, f"{stem}{part}.safetensors")
    return files


def fingerprint(params: Mapping[str, Any]) -> str:
    """SHA-256 of a tree of arrays, in numpy or on devices, as 64 hex digits; see `add_leaf`."""
    digest = hashlib.sha256()
    for name, leaf in sorted(flatten(params).items()):
        add_leaf(digest, name, np.asarray(leaf))
    return digest.hexdigest()


def add_leaf(digest: Any, name: str, leaf: np.ndarray) -> None:
    """Takes one array into the SHA-256 of a fingerprint; arrays come in the order of their names.

    Name, shape and the values rounded to bfloat16 count, so that a backbone has one fingerprint
    whether it is held in float32 or in bfloat16.
    """
    digest.update(f"{name} {leaf.shape}\n".encode())
    rounded = np.asarray(leaf, order="C").reshape(-1).astype(_BFLOAT16, copy=False)
    digest.update(rounded.view(np.uint8).data)


def file_checksum(path: AnyPath) -> str:
    """SHA-256 of a file's bytes, as 64 hex digits.

    Raises:
      CheckpointError: if the file cannot be read.
    """
    with wrap_errors(f"{path} cannot be read"), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_finite(what: AnyPath, array: np.ndarray) -> None:
    """Refuses an array that no network can run with.

    Raises:
      CheckpointError: if it holds a NaN or an infinite number.
    """
    if array.dtype == _BFLOAT16:  # on its bits, ten times as fast as its own isfinite
        finite = not (array.view(np.uint16) & 0x7F80 == 0x7F80).any()
    else:
        finite = array.dtype.kind != "f" or np.isfinite(array).all()
    if not finite:
        raise CheckpointError(f"{what} holds numbers that are NaN or infinite.")


def cast(what: AnyPath, array: np.ndarray, dtype: np.dtype | None) -> np.ndarray:
    """An array in another dtype; None keeps its own. Errors as `check_finite`."""
    if dtype is None or array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        array = array.astype(dtype)
    check_finite(f"{what} as {dtype}", array)
    return array


def check_arrays(
    what: AnyPath,
    arrays: Mapping[str, Any],
    expected: Mapping[str, Any],
    dtypes: Collection[str] = ("float32",),
) -> None:
    """Compares names, shapes and dtypes of arrays with those that there should be.

    Args:
      what: the file, for messages.
      arrays: name -> anything with a shape and a dtype.
      expected: name -> anything with a shape.
      dtypes: names of those that an array may have.

    Raises:
      CheckpointError: naming what is missing, unexpected, misshapen or mistyped.
    """
    missing, unexpected = expected.keys() - arrays.keys(), arrays.keys() - expected.keys()
    if missing or unexpected:
        names = sorted(missing or unexpected)
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        problem = "is missing" if missing else "has unexpected"
        raise CheckpointError(f"{what} {problem} {', '.join(names[:3])}{more}.")
    for name, like in expected.items():
        shape, dtype = tuple(arrays[name].shape), np.dtype(arrays[name].dtype).name
        if shape != tuple(like.shape) or dtype not in dtypes:
            right = f"{tuple(like.shape)} of {' or '.join(dtypes)}"
            raise CheckpointError(f"{what}: {name} has shape {shape} of {dtype}; expected {right}.")


def read_arrays(
    what: AnyPath, arrays: Mapping[str, Stored], expected: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Reads the expected arrays, which must be float32 and finite.

    Raises:
      CheckpointError: as `check_arrays` and `check_finite`.
    """
    check_arrays(what, arrays, expected)
    leaves = {name: np.asarray(array.read()) for name, array in arrays.items()}
    for name, leaf in leaves.items():
        check_finite(f"{what}: {name}", leaf)
    return leaves
