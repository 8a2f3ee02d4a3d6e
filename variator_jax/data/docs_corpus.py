"""The documentation corpus: the docstrings of the running Python installation, as JSON lines.

Built on first use and kept in a cache folder. Sources are read with `ast` and never imported. The
split is by file: a file is in train or in validation as a whole, and a text that both have is kept
in train only. `docs_text` turns a docstring into sentences. No TensorFlow here.
"""

from __future__ import annotations

import ast
import collections
import functools
import gc
import hashlib
import json
import os
import re
import shutil
import site
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from variator_jax.data.docs_text import sentences
from variator_jax.errors import DataError

FORMAT_VERSION = 1  # of the records, and of the vocabulary that is kept next to them
SPLITS = ("train", "validation")
STANDARD_LIBRARY = "python"  # the `package` of the standard library's records
VALIDATION_SHARE = 0.08  # of a package's source bytes, in whole files
_SOURCE_BYTES_PER_PACKAGE = 12_000_000
_SOURCE_BYTES = 95_000_000
_BYTES_PER_DOCSTRING = 6_000  # a file with fewer docstrings costs much and gives little text
_TEXT_BYTES_PER_PACKAGE = 1_200_000
_SOURCE_FILE = re.compile(r"(?!test_).*(?<!_test)\.py")
_SKIPPED_FOLDERS = frozenset(
    "__pycache__ test tests testing idlelib lib2to3 site-packages dist-packages "
    "_vendor vendor variator_jax node_modules".split()
)


class Installation(NamedTuple):
    """The folders of a Python installation's sources: standard library and site packages."""

    standard_library: Path
    site_folders: tuple[Path, ...]


class Source(NamedTuple):
    """One Python file."""

    order: str  # a random number that its path fixes: decides sampling and split
    relative: str  # path, from 'python' or 'site' on
    package: str
    path: Path
    size: int  # bytes


def cache_root() -> Path:
    """The folder for what is built once: `$VARIATOR_CACHE`, or `~/.cache/variator_jax`."""
    return Path(os.environ.get("VARIATOR_CACHE") or "~/.cache/variator_jax").expanduser()


@functools.cache
def running_installation() -> Installation:
    """Returns the Python installation that runs this code."""
    paths = sysconfig.get_paths()
    folders = [paths["purelib"], paths["platlib"], *site.getsitepackages(), *sys.path]
    named = [Path(f) for f in folders if Path(f).name in ("site-packages", "dist-packages")]
    existing = tuple(dict.fromkeys(folder for folder in named if folder.is_dir()))
    return Installation(Path(paths["stdlib"]), existing)


def ensure_corpus(installation: Installation | None = None) -> Path:
    """Returns the corpus folder, building it on the first call from the packages that are there.

    The folder holds train.jsonl, validation.jsonl (one record a line: package, module, name, kind,
    text with one sentence a line) and manifest.json. It is written completely or not at all.

    Raises:
      DataError: if the cache folder cannot be written, or no docstring was found.
    """
    # Not named after the packages: what is trained on the corpus and on its vocabulary must stay
    # usable when a package comes or goes. Delete the folder to read the installation again.
    folder = cache_root() / f"docs-v{FORMAT_VERSION}"
    if (folder / "manifest.json").is_file():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".building-", dir=folder.parent))
    except OSError as error:
        raise DataError(
            f"the cache folder {folder.parent} cannot be written ({error.strerror}); set "
            "VARIATOR_CACHE to a folder that can"
        ) from error
    try:
        gc.disable()  # parses twice as fast: syntax trees are many small objects, and none is kept
        _build(installation or running_installation(), work)
        os.rename(work, folder)
    except OSError:
        if not (folder / "manifest.json").is_file():  # else another process was first
            raise
    finally:
        gc.enable()
        shutil.rmtree(work, ignore_errors=True)
    return folder


def read_split(folder: Path, split: str) -> list[dict[str, str]]:
    """Returns the records of one split of a corpus folder."""
    if split not in SPLITS:
        raise DataError(f"the documentation corpus has no split {split!r}, only {SPLITS}")
    with open(folder / f"{split}.jsonl", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _build(installation: Installation, work: Path) -> None:
    sources = select_sources(find_sources(installation))
    print(
        f"variator_jax: reading the documentation in {len(sources)} Python files (first use)",
        file=sys.stderr,
        flush=True,
    )
    records, broken = _extract(sources)
    if not records["train"]:
        raise DataError(f"no docstring found below {installation.standard_library}")
    for split, kept in records.items():
        with open(work / f"{split}.jsonl", "w", encoding="utf-8") as out:
            out.writelines(json.dumps(record) + "\n" for record in kept)
    manifest = {
        "format_version": FORMAT_VERSION,
        "files": {"read": len(sources), "broken": broken},
        "records": {split: len(kept) for split, kept in records.items()},
    }
    (work / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def find_sources(installation: Installation) -> Iterator[Source]:
    """Yields every documented Python file of the installation but tests and vendored copies."""
    roots = [installation.standard_library, *installation.site_folders]
    for root in roots:
        kind = STANDARD_LIBRARY if root == roots[0] else "site"
        for folder, subfolders, files in os.walk(root):
            subfolders[:] = sorted(set(subfolders) - _SKIPPED_FOLDERS)
            for name in sorted(files):
                path = Path(folder, name)
                size = _documented_size(path) if _SOURCE_FILE.fullmatch(name) else 0
                if size:
                    package = path.relative_to(root).parts[0].removesuffix(".py")
                    relative = f"{kind}/{path.relative_to(root).as_posix()}"
                    order = hashlib.sha256(relative.encode()).hexdigest()
                    owner = package if kind == "site" else STANDARD_LIBRARY
                    yield Source(order, relative, owner, path, size)


def _documented_size(path: Path) -> int:
    """Returns the file's bytes, or 0 if parsing it would cost much and give little text."""
    try:
        source = path.read_bytes()
    except OSError:
        return 0
    docstrings = (source.count(b'"""') + source.count(b"'''")) // 2
    return len(source) if docstrings * _BYTES_PER_DOCSTRING >= len(source) else 0


def select_sources(sources: Iterable[Source]) -> list[tuple[Source, str]]:
    """Returns a fixed sample of each package's files, each with its split.

    Files are taken in the order of their paths' hashes. So that no package takes all the time, each
    gives at most `cap` bytes: the largest cap that keeps the sum of all within `_SOURCE_BYTES`, and
    at most `_SOURCE_BYTES_PER_PACKAGE`. About `VALIDATION_SHARE` of a package's bytes, in whole
    files, are validation; a package with few files may have none.
    """
    packages: dict[str, dict[str, Source]] = collections.defaultdict(dict)
    for source in sources:
        packages[source.package].setdefault(source.relative, source)
    sizes = sorted(_bytes(files.values()) for files in packages.values())
    left, cap = _SOURCE_BYTES, _SOURCE_BYTES_PER_PACKAGE
    for number, size in enumerate(sizes):
        share = left // (len(sizes) - number)
        if size > share:
            cap = min(share, cap)
            break
        left -= size
    selected = []
    for package in sorted(packages):
        chosen = _take(sorted(packages[package].values()), cap)
        validation = set(_take(chosen, VALIDATION_SHARE * _bytes(chosen)))
        selected += [(source, SPLITS[source in validation]) for source in chosen]
    return selected


def _bytes(sources: Iterable[Source]) -> int:
    return sum(source.size for source in sources)


def _take(sources: Iterable[Source], most: float) -> list[Source]:
    """Greedily takes sources up to a byte budget."""
    taken, chosen = 0, []
    for source in sources:
        if taken + source.size <= most:
            taken += source.size
            chosen.append(source)
    return chosen


def _extract(sources: list[tuple[Source, str]]) -> tuple[dict[str, list[dict[str, str]]], int]:
    """Returns the records of each split, every text once, and how many files were broken."""
    records: dict[str, dict[str, dict[str, str]]] = {split: {} for split in SPLITS}  # by text
    written: collections.Counter[str] = collections.Counter()
    broken = 0
    for source, split in sources:
        try:
            docstrings = list(_docstrings(source.path.read_bytes()))
        except (SyntaxError, ValueError, RecursionError, MemoryError, OSError):
            broken += 1
            continue
        module = source.relative.removesuffix(".py").partition("/")[2].replace("/", ".")
        owner = {"package": source.package, "module": module.removesuffix(".__init__")}
        for name, kind, raw in docstrings:
            text = "\n".join(sentences(raw))
            if text and written[source.package] + len(text) <= _TEXT_BYTES_PER_PACKAGE:
                written[source.package] += len(text)
                record = {**owner, "name": name, "kind": kind, "text": text}
                records[split].setdefault(text, record)
    train, validation = (records[split] for split in SPLITS)
    held_out = [record for text, record in validation.items() if text not in train]
    return {"train": list(train.values()), "validation": held_out}, broken


def _docstrings(source: bytes) -> Iterator[tuple[str, str, str]]:
    """Yields (qualified name, kind, raw docstring) of a module and what it defines."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's strings
        tree = ast.parse(source)
    stack: list[tuple[str, Any]] = [("", tree)]
    while stack:
        name, node = stack.pop()
        raw = ast.get_docstring(node, clean=False)
        if raw:
            kind = {ast.Module: "module", ast.ClassDef: "class"}.get(type(node), "function")
            yield name, kind, raw
        for child in reversed(node.body):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                stack.append((f"{name}.{child.name}".lstrip("."), child))
