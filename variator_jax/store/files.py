"""Files of a user's that should be there: the reasons why they cannot be read, in words."""

from __future__ import annotations

import os
import pathlib
import stat

from variator_jax.errors import CheckpointError


def check_file(path: pathlib.Path) -> None:
    """Refuses what is no readable file.

    Raises:
      CheckpointError: naming the path and the reason.
    """
    if not stat.S_ISREG(_mode(path)):
        raise CheckpointError(f"{path} is a folder or a device; a file was expected.")


def check_folder(path: str | os.PathLike, kind: str = "") -> pathlib.Path:
    """The path of a folder that exists; `kind` is what it should hold, for messages.

    Raises:
      CheckpointError: naming the path and the reason.
    """
    folder = pathlib.Path(path)
    try:
        mode = _mode(folder)
    except CheckpointError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            said = f"{folder} holds no {kind}: there is no such folder." if kind else ""
            raise CheckpointError(said or f"There is no folder {folder}.") from error
        raise
    if not stat.S_ISDIR(mode):
        raise CheckpointError(f"{folder} is a file; a folder was expected.")
    return folder


def _mode(path: pathlib.Path) -> int:
    try:
        return os.stat(path).st_mode
    except OSError as error:
        raise read_error(path, error) from error
    except ValueError as error:
        raise CheckpointError(f"{str(path)!r} is no path: {error}.") from error


def read_error(path: pathlib.Path, error: OSError) -> CheckpointError:
    """What to raise where a file cannot be read."""
    if isinstance(error, FileNotFoundError):
        return CheckpointError(f"{path} is missing.")
    return CheckpointError(f"{path} cannot be read: {error.strerror or error}.")
