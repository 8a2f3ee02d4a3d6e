"""Files and folders that appear whole or not at all, and one form of error for all of them."""

import contextlib
import fcntl
import json
import os
import re
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Collection, Iterator
from pathlib import Path

from variator_jax.errors import CheckpointError, ConfigError, VariatorError

AnyPath = str | os.PathLike
_ABANDONED = 86_400  # seconds after which the draft of a killed writer is removed
_HOME = re.compile(r"""(?:^|(?<=[=,'"]))~\w*(?=/|['"]?$)""")


def expand_home(text: str) -> str:
    """An argument or a literal, with the home folder for the `~` that a path in it begins with.

    A shell leaves the one of `--gin.MODEL_DIR=~/x` alone.
    """
    return _HOME.sub(lambda match: os.path.expanduser(match[0]), text)


def is_url(path: AnyPath) -> bool:
    """Whether a path has a scheme, such as gs:// or file://."""
    return isinstance(path, str) and re.match(r"[a-z][a-z0-9+.-]+://", path) is not None


def check_folder(path: AnyPath) -> Path:
    """The path of a folder that exists.

    Raises:
      CheckpointError: if it does not, or is a file.
    """
    if os.path.isfile(path):
        raise CheckpointError(f"{path} is a file; a folder was expected.")
    if not os.path.isdir(path):
        named = re.fullmatch(r"[\w-]+/[\w.-]+", str(path)) and not Path(path).parent.exists()
        hint = " Nothing is downloaded: a model of the Hugging Face hub has to be on disk."
        raise CheckpointError(f"There is no folder {str(path)!r}.{hint if named else ''}")
    return Path(path)


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Makes this process the only writer of a folder.

    The system removes the lock with the process, however that ends.

    Raises:
      CheckpointError: if another process is its writer, or the folder cannot be made.
    """
    with wrap_errors(f"{folder} cannot be written"):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / ".lock"
        file = path.open("a+", encoding="utf8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read() or "another process"
            raise CheckpointError(
                f"{folder} is in use by {holder}; wait for its end, or choose another folder."
            ) from error
        except OSError:
            pass  # There are file systems without locks.
        # A holder that ended in between took the file away, and another may have made a new one.
        if not path.is_file() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            raise CheckpointError(f"{folder} was in use until now; give the command again.")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


def write_file(path: Path, content: bytes) -> None:
    """Writes a file atomically, with its folder; readers see the old or the new content.

    A killed writer leaves a draft next to it, whose name begins with a dot.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    draft.write_bytes(content)
    _flush(draft)
    os.replace(draft, path)


def write_json(path: Path, content: object) -> None:
    """Writes `content` as JSON, as `write_file` does."""
    write_file(path, f"{json.dumps(content, indent=2)}\n".encode())


@contextlib.contextmanager
def atomic_folder(path: AnyPath, replaces: Collection[str] = (), holds: str = "") -> Iterator[Path]:
    """Yields a draft that becomes `path` on success; on failure `path` stays as it was.

    The old folder is moved aside before the draft takes its place. A writer killed between the two
    renames leaves it as `.NAME.old`, and the next writer puts it back first.

    Args:
      path: the folder to write; a link is followed.
      replaces: an existing folder is replaced only if it is empty or holds one of these files.
      holds: regular expression of the other files that such a folder may hold, as paths in it.

    Raises:
      CheckpointError: if `path` is a file or another kind of folder, or cannot be written.
    """
    target = Path(os.path.realpath(path))
    old = target.with_name(f".{target.name[:100]}.old")
    with wrap_errors(f"{path} cannot be written"):
        target.parent.mkdir(parents=True, exist_ok=True)
        _clean_up(target, old)
        if target.exists():
            _check_replaceable(target, replaces, holds)
        draft = Path(tempfile.mkdtemp(prefix=f".{target.name[:100]}.draft-", dir=target.parent))
        try:
            draft.chmod(0o755)  # mkdtemp's 0700 would hide a shared folder from others
            yield draft
            for file in draft.rglob("*"):
                if file.is_file():
                    _flush(file)
            if target.exists():
                os.replace(target, old)
            os.replace(draft, target)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def _flush(file: Path) -> None:
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())


def _clean_up(target: Path, old: Path) -> None:
    """Completes what a killed writer left behind."""
    if old.exists() and not target.exists():
        os.replace(old, target)
    shutil.rmtree(old, ignore_errors=True)
    for draft in target.parent.glob(f".{target.name[:100]}.draft-*"):
        if time.time() - draft.stat().st_mtime > _ABANDONED:
            shutil.rmtree(draft, ignore_errors=True)


def _check_replaceable(target: Path, replaces: Collection[str], holds: str) -> None:
    files = [x for x in check_folder(target).rglob("*") if x.is_symlink() or not x.is_dir()]
    names = sorted(file.relative_to(target).as_posix() for file in files)
    others = [name for name in names if name not in replaces and not re.fullmatch(holds, name)]
    if others or (names and not set(names) & set(replaces)):
        lost = (others or names)[0]
        raise CheckpointError(f"{target} holds {lost}, which would be lost; name a new folder.")


def local_path(name: str, path: AnyPath) -> Path:
    """The path that a setting gives.

    Raises:
      ConfigError: with the setting's name, for a URL, which `Path` would make a folder of here, or
        for anything but a path.
    """
    if not isinstance(path, str | os.PathLike) or is_url(path):
        quotes = "" if isinstance(path, str) else ", in quotes"
        raise ConfigError(f"{name} is {path!r}; expected the path of a local folder{quotes}.")
    return Path(path)


def make_output(name: str, path: AnyPath) -> Path:
    """Makes the folder of a setting, before work is done whose results could not be kept there.

    Raises:
      ConfigError: if nothing can be written into it, or it is no local one.
    """
    folder = local_path(name, path)
    with wrap_errors(f"{name} {folder} cannot be written into", ConfigError):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    return folder


@contextlib.contextmanager
def wrap_errors(what: str, kind: type[VariatorError] = CheckpointError) -> Iterator[None]:
    """Turns an error of a library, the system or a setting into one of `kind`: "WHAT: reason"."""
    try:
        yield
    except kind:
        raise
    except Exception as error:
        text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
        if isinstance(error, LookupError):  # whose message is the key alone
            text = f"{type(error).__name__} {text}"
        text = re.sub(r".*: (.+?) \[os_error_code=.*", r"\1", text)  # TensorStore's, at any length
        reason = text.splitlines()[0].partition(" [source locations")[0][:500]
        end = "" if reason.endswith((".", "?")) else "."
        raise kind(f"{what}: {reason}{end}") from error
