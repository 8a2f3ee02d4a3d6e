"""Folders of plain texts, one a line, in .txt and .txt.gz files: which there are, their lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from variator_jax.data._tf import tf
from variator_jax.data.vocabulary import is_url
from variator_jax.errors import DataError


def text_files(data_dir: str) -> dict[str, list[str]]:
    """Returns the files of a folder, or its URL, for 'train' and 'validation'.

    Those with 'valid' or 'dev' in their names are for validation.

    Raises:
      DataError: if there are none for one of the two.
    """
    folder = data_dir if is_url(data_dir) else str(Path(data_dir).expanduser().absolute())
    folder = folder.rstrip("/")
    files = sorted(
        path for end in ("txt", "txt.gz") for path in tf.io.gfile.glob(f"{folder}/*.{end}")
    )
    held_out = [path for path in files if _is_validation(path.rsplit("/", 1)[-1])]
    found = {"train": [path for path in files if path not in held_out], "validation": held_out}
    for split, paths in found.items():
        if not paths:
            raise DataError(
                f"{folder} has no text for {split}: expected .txt or .txt.gz files, one text a "
                "line, of which those for validation have 'valid' or 'dev' in their names"
            )
    return found


def read_text_lines(path: Any) -> Any:
    """Returns the `tf.data.Dataset` of {'text'} of a file, a line each, gzipped by its name."""
    compression = tf.where(tf.strings.regex_full_match(path, r".*\.gz"), "GZIP", "")
    return tf.data.TextLineDataset(path, compression).map(lambda line: {"text": line})


def _is_validation(name: str) -> bool:
    return "valid" in name.lower() or "dev" in name.lower()
