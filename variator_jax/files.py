"""Atomic writing of one file. Whole folders are written by `store.folders`."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path


def write_file(path: Path, content: bytes) -> None:
    """Writes `content` to `path` and makes its folder; readers see the old or the new file.

    A process that is killed meanwhile leaves a draft in the folder, whose name begins with a dot.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with draft.open("wb") as opened:
        opened.write(content)
        opened.flush()
        os.fsync(opened.fileno())
    os.replace(draft, path)


def write_json(path: Path, content: object) -> None:
    """Writes `content` as JSON, as `write_file` does."""
    write_file(path, f"{json.dumps(content, indent=2)}\n".encode())
