"""Writing one file at once or not at all. Whole folders are `checkpoints.folders`' business."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path


def write_file(path: Path, content: bytes) -> None:
    """Puts `content` where `path` says, making its folder; who reads finds the old or the new file.

    Whoever is killed meanwhile leaves a draft beside it, whose name begins with a dot.
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
