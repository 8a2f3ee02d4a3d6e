"""The documentation corpus: the docstrings of the running Python installation, as JSON lines.

Built on first use and kept in a cache folder. The split is by file: a file is in train or in
validation as a whole, and a text that both have is kept in train only. Reading the sources lives in
`docstrings`, making examples in `docs_examples`.
"""

from __future__ import annotations

import collections
import functools
import importlib.metadata
import json
import os
import shutil
import site
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from variator_jax.data import docstrings
from variator_jax.data.docstrings import SPLITS, Installation
from variator_jax.errors import DataError

FORMAT_VERSION = 1  # of the records, and of the vocabulary that is kept beside them


def cache_root() -> Path:
    """The folder for what is built once: `$VARIATOR_CACHE`, or `~/.cache/variator_jax`."""
    return Path(os.environ.get("VARIATOR_CACHE") or "~/.cache/variator_jax").expanduser()


@functools.cache
def running_installation() -> Installation:
    """Describes the Python installation that runs this code."""
    paths = sysconfig.get_paths()
    folders = [paths["purelib"], paths["platlib"], *site.getsitepackages(), *sys.path]
    named = [Path(f) for f in folders if Path(f).name in ("site-packages", "dist-packages")]
    packages = {
        (d.metadata["Name"] or "").lower(): d.version for d in importlib.metadata.distributions()
    }
    packages.pop("variator-jax", None)
    packages.pop("variator_jax", None)
    return Installation(
        standard_library=Path(paths["stdlib"]),
        site_folders=tuple(dict.fromkeys(folder for folder in named if folder.is_dir())),
        packages=tuple(sorted(packages.items())),
        python_version=sys.version.split()[0],
    )


def ensure_corpus(installation: Installation | None = None) -> Path:
    """Returns the corpus folder, building it on the first call from the packages that are there.

    The folder holds train.jsonl, validation.jsonl (one record a line: package, module, name, kind,
    text with one sentence a line) and manifest.json. It appears whole or not at all.

    Raises:
      DataError: if the cache folder cannot be written, or no docstring was found.
    """
    installation = installation or running_installation()
    # Not named after the packages: what is trained on the corpus and on its vocabulary must stay
    # usable when a package comes or goes. Delete the folder to read the installation anew.
    folder = cache_root() / f"docs-v{FORMAT_VERSION}"
    if not (folder / "manifest.json").is_file():
        _build_atomically(installation, folder)
    return folder


def read_split(folder: Path, split: str) -> list[dict[str, str]]:
    """Returns the records of one split of a corpus folder."""
    if split not in SPLITS:
        raise DataError(f"the documentation corpus has no split {split!r}, only {SPLITS}")
    with open(folder / f"{split}.jsonl", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _build_atomically(installation: Installation, folder: Path) -> None:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".building-", dir=folder.parent))
    except OSError as error:
        raise DataError(
            f"the cache folder {folder.parent} cannot be written ({error.strerror}); set "
            "VARIATOR_CACHE to a folder that can"
        ) from error
    try:
        _build(installation, work)
        install_folder(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def install_folder(work: Path, folder: Path) -> None:
    """Moves a finished folder to its place; if another process was first, theirs stays."""
    try:
        os.rename(work, folder)
    except OSError:
        if not (folder / "manifest.json").is_file():
            raise


def _build(installation: Installation, work: Path) -> None:
    begin = time.monotonic()
    sources = list(docstrings.select_sources(docstrings.find_sources(installation)))
    print(
        f"variator_jax: reading the documentation in {len(sources)} Python files (first use)",
        file=sys.stderr,
        flush=True,
    )
    with docstrings.without_cycle_collection():
        records, broken = docstrings.extract(sources)
    splits = docstrings.deduplicate(records)
    if not splits["train"]:
        raise DataError(f"no docstring found below {installation.standard_library}")
    for split, kept in splits.items():
        with open(work / f"{split}.jsonl", "w", encoding="utf-8") as out:
            out.writelines(json.dumps(record) + "\n" for record in kept)
    manifest = {
        "format_version": FORMAT_VERSION,
        "python_version": installation.python_version,
        "package_versions": dict(installation.packages),
        "files": {"read": len(sources), "broken": broken},
        "records": {split: len(kept) for split, kept in splits.items()},
        "records_per_package": {
            split: dict(sorted(collections.Counter(r["package"] for r in kept).items()))
            for split, kept in splits.items()
        },
        "seconds": round(time.monotonic() - begin, 1),
    }
    (work / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
