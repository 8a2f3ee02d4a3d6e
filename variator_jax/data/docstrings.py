"""The docstrings of a Python installation: which files are read, and what is taken from them.

Sources are read with `ast` and never imported. Where the result is kept is in `corpus`; how a
docstring becomes sentences is in `cleaning`.
"""

from __future__ import annotations

import ast
import collections
import contextlib
import dataclasses
import gc
import hashlib
import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from variator_jax.data import cleaning

SPLITS = ("train", "validation")
STANDARD_LIBRARY = "python"  # the `package` of the standard library's records
VALIDATION_SHARE = 0.08  # of a package's source bytes, in whole files
_SOURCE_BYTES_PER_PACKAGE = 12_000_000
_SOURCE_BYTES = 95_000_000
_BYTES_PER_DOCSTRING = 6_000
_TEXT_BYTES_PER_PACKAGE = 1_200_000
_SKIPPED_FOLDERS = frozenset(
    "__pycache__ test tests testing idlelib lib2to3 site-packages dist-packages "
    "_vendor vendor variator_jax node_modules".split()
)


@dataclasses.dataclass(frozen=True)
class Installation:
    """Where Python sources lie: the standard library, site folders, and (name, version) pairs."""

    standard_library: Path
    site_folders: tuple[Path, ...]
    packages: tuple[tuple[str, str], ...]
    python_version: str


@dataclasses.dataclass(frozen=True)
class Source:
    """One Python file: its package, its path below the root it was found in, and its place."""

    package: str
    relative: str
    path: Path
    size: int
    split: str = "train"

    @property
    def order(self) -> str:
        """A fixed random number of the path, in hex: decides sampling and split."""
        return hashlib.sha256(self.relative.encode()).hexdigest()


@contextlib.contextmanager
def without_cycle_collection() -> Iterator[None]:
    """Parses twice as fast: syntax trees are many small objects, and none is kept."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def find_sources(installation: Installation) -> Iterator[Source]:
    """Yields every Python file of the installation, tests and vendored copies left out."""
    yield from _walk(installation.standard_library, STANDARD_LIBRARY)
    for folder in installation.site_folders:
        yield from _walk(folder, None)


def _walk(root: Path, package: str | None) -> Iterator[Source]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - _SKIPPED_FOLDERS)
        for name in sorted(files):
            if not name.endswith(".py") or name.startswith("test_") or name.endswith("_test.py"):
                continue
            path = Path(folder, name)
            relative = path.relative_to(root)
            owner = package or relative.parts[0].removesuffix(".py")
            size = _documented_size(path)
            if size:
                yield Source(owner, f"{package or 'site'}/{relative.as_posix()}", path, size)


def _documented_size(path: Path) -> int:
    """Returns the file's bytes, or 0 if parsing it would cost much and give little text."""
    try:
        source = path.read_bytes()
    except OSError:
        return 0
    docstrings = (source.count(b'"""') + source.count(b"'''")) // 2
    return len(source) if docstrings * _BYTES_PER_DOCSTRING >= len(source) else 0


def select_sources(sources: Iterable[Source]) -> Iterator[Source]:
    """Yields a fixed sample of each package's files, each with its split.

    Files are taken in the order of their paths' hashes. So that no package takes all the time, each
    gives at most `cap` bytes: the largest cap that keeps the sum of all within `_SOURCE_BYTES`, and
    at most `_SOURCE_BYTES_PER_PACKAGE`. About `VALIDATION_SHARE` of a package's bytes, in whole
    files, are validation; a package with few files may have none.
    """
    packages: dict[str, dict[str, Source]] = collections.defaultdict(dict)
    for source in sources:
        packages[source.package].setdefault(source.relative, source)
    sizes = [sum(s.size for s in files.values()) for files in packages.values()]
    cap = _shared_cap(sizes, _SOURCE_BYTES, _SOURCE_BYTES_PER_PACKAGE)
    for package in sorted(packages):
        ordered = sorted(packages[package].values(), key=lambda s: (s.order, s.relative))
        chosen = _take(ordered, cap)
        share = VALIDATION_SHARE * sum(source.size for source in chosen)
        validation = set(_take(chosen, share))
        for source in chosen:
            split = "validation" if source in validation else "train"
            yield dataclasses.replace(source, split=split)


def _take(sources: Iterable[Source], most: float) -> list[Source]:
    """Returns the sources that fit into `most` bytes, first come first served."""
    taken, chosen = 0, []
    for source in sources:
        if taken + source.size <= most:
            taken += source.size
            chosen.append(source)
    return chosen


def _shared_cap(sizes: list[int], total: int, most: int) -> int:
    """Returns the largest cap <= `most` with sum(min(size, cap)) <= total."""
    left, remaining = total, sorted(sizes)
    for index, size in enumerate(remaining):
        share = left // (len(remaining) - index)
        if size > share:
            return min(share, most)
        left -= size
    return most


def extract(sources: Iterable[Source]) -> tuple[list[dict[str, str]], int]:
    """Returns the records of all sources (with 'split'), and how many files were broken."""
    records: list[dict[str, str]] = []
    written: collections.Counter[str] = collections.Counter()
    broken = 0
    for source in sources:
        try:
            docstrings = list(_docstrings(source.path.read_bytes()))
        except (SyntaxError, ValueError, RecursionError, MemoryError, OSError):
            broken += 1
            continue
        module = _module_name(source.relative)
        for name, kind, raw in docstrings:
            text = "\n".join(cleaning.sentences(raw))
            if text and written[source.package] + len(text) <= _TEXT_BYTES_PER_PACKAGE:
                written[source.package] += len(text)
                records.append(
                    {
                        "split": source.split,
                        "package": source.package,
                        "module": module,
                        "name": name,
                        "kind": kind,
                        "text": text,
                    }
                )
    return records, broken


def _module_name(relative: str) -> str:
    parts = relative.split("/")[1:]
    return ".".join([*parts[:-1], parts[-1].removesuffix(".py")]).removesuffix(".__init__")


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


def deduplicate(records: Iterable[dict[str, str]]) -> dict[str, list[dict[str, str]]]:
    """Splits records by their 'split'; every text is kept once, in train if it occurs there."""
    by_split: dict[str, list[dict[str, str]]] = {split: [] for split in SPLITS}
    for record in records:
        by_split[record["split"]].append(
            {key: value for key, value in record.items() if key != "split"}
        )
    seen: set[str] = set()
    kept: dict[str, list[dict[str, str]]] = {}
    for split in SPLITS:  # train first
        kept[split] = []
        for record in by_split[split]:
            if record["text"] not in seen:
                seen.add(record["text"])
                kept[split].append(record)
    return kept
