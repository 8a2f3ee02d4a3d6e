"""The documentation corpus: the docstrings of the running Python installation, as JSON lines.

Built on first use and kept in a cache folder. Sources are read with `ast` and never imported. The
split is by file: a file is in train or in validation as a whole, and a text that both have is kept
in train only.

Of a docstring its prose is kept: sentences, one list per docstring. Doctests, code, tables,
directives, parameter lists and other sections that are data rather than prose, and inline markup
are dropped. No TensorFlow here.
"""

import ast
import bisect
import collections
import functools
import gc
import hashlib
import inspect
import itertools
import json
import os
import re
import site
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from variator_jax.errors import DataError
from variator_jax.files import write_file, write_json

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

# Sections whose bodies are lists of names and types; prose resumes after the next section title.
_LIST_SECTIONS = frozenset(
    "args,arguments,parameters,params,returns,return,yields,yield,raises,raise,attributes,attrs,"
    "references,reference,see also,methods,kwargs,inputs,outputs,input shape,output shape,shape,"
    "shapes,examples,example,usage,call arguments,keyword arguments,keyword args,other parameters,"
    "type parameters,contents,authors".split(",")
)
_SECTION = re.compile(r"^(?P<title>[A-Za-z][A-Za-z ]{2,30}):{0,2}\s*$")
_UNDERLINE = re.compile(r"^\s*([=\-~^*#+`])\1{2,}\s*$")
_TABLE = re.compile(r"^\s*={2,}(\s+={2,})+\s*$")
_FENCE = re.compile(r"^\s*(```|~~~)")
# Blank or indented lines, directives, doctests, rules, and cells of tables.
_NO_PROSE = re.compile(
    r"^\s*$|^\s{4}|^\s*(\.\. |:[\w \*]+:( |$)|@\w+)|"
    r">>>|^\s*\.\.\.|^\s*[|+]|\|\s*$|^\s*\$|^\s*[-*=#]{3,}|===|\s{4,}\S+\s{2,}\S"
)
_ITEM = re.compile(r"^\s*([-*+]|\d+[.)])\s+")
_MARKUP = [  # pattern -> replacement, in this order
    (re.compile(r":[\w:+-]+:`~?!?([^`<]*?)\s*(?:<[^>]*>)?`"), r"\1"),  # a role
    (re.compile(r"`([^`<]+?)\s*<[^>]*>`__?"), r"\1"),  # a link
    (re.compile(r"\[([^\]]+)\]\((?:[^)]*)\)"), r"\1"),  # a link of Markdown
    (re.compile(r"(?:https?|ftp)://\S+"), ""),
    (re.compile(r"``|`_{0,2}|\*\*|(?<!\w)\*(?=\w)|(?<=\w)\*(?!\w)|\[\d+\]_?"), ""),
]
_ABBREVIATION = re.compile(r"\b(?:e\.g|i\.e|etc|cf|vs|resp|Eq|Fig|Ref|approx|al|Dr|Mr|No)\.$")
_BREAK = re.compile(r"(?<=[.!?])\s+(?=[\"'(]?[A-Z])")
_STRANGE = re.compile(r"[^A-Za-z ,.]")
_ASCII = str.maketrans("\u2018\u2019\u201c\u201d\u2013\u2014\u00a0", "''\"\"-- ") | {0x2026: "..."}


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
def source_folders() -> tuple[Path, ...]:
    """Returns the running Python's standard library, and after it the folders of its packages."""
    paths = sysconfig.get_paths()
    folders = map(Path, (paths["purelib"], paths["platlib"], *site.getsitepackages(), *sys.path))
    packages = [f for f in folders if f.name in ("site-packages", "dist-packages") and f.is_dir()]
    return tuple(dict.fromkeys([Path(paths["stdlib"]), *packages]))


def _folder() -> Path:
    return cache_root() / f"docs-v{FORMAT_VERSION}"


def is_built() -> bool:
    """Returns whether the corpus is complete."""
    return (_folder() / "manifest.json").is_file()


def ensure_corpus() -> Path:
    """Returns the corpus folder, building it on the first call from the packages that are there.

    The folder holds train.jsonl, validation.jsonl (one record a line: package, module, name, kind,
    text with one sentence a line) and, once these are complete, manifest.json.

    Raises:
      DataError: if the cache folder cannot be written, or no docstring was found.
    """
    # Not named after the packages: what is trained on the corpus and on its vocabulary must stay
    # usable when a package comes or goes. Delete the folder to read the installation again.
    folder = _folder()
    if is_built():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _build(folder)
    except OSError as error:
        reason = f"the cache folder {folder.parent} cannot be written ({error.strerror})"
        raise DataError(f"{reason}; set VARIATOR_CACHE to another") from error
    return folder


@functools.lru_cache(maxsize=4)
def read_split(folder: Path, split: str) -> list[dict[str, str]]:
    """Returns the records of one split of a corpus folder."""
    with open(folder / f"{split}.jsonl", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _build(folder: Path) -> None:
    sources = select_sources(find_sources())
    reading = f"reading the documentation in {len(sources)} Python files (first use)"
    print(f"variator_jax: {reading}", file=sys.stderr, flush=True)
    gc.disable()  # parses twice as fast: syntax trees are many small objects, and none is kept
    try:
        records = _extract(sources)
    finally:
        gc.enable()
    if not records["train"]:
        raise DataError(f"no docstring found below {source_folders()[0]}")
    for split, kept in records.items():
        lines = "".join(f"{json.dumps(record)}\n" for record in kept)
        write_file(folder / f"{split}.jsonl", lines.encode())
    counts = {split: len(kept) for split, kept in records.items()}
    write_json(folder / "manifest.json", {"files": len(sources), "records": counts})


def find_sources() -> Iterator[Source]:
    """Yields every documented Python file of the installation but tests and vendored copies."""
    for number, root in enumerate(source_folders()):
        for folder, subfolders, files in os.walk(root):
            subfolders[:] = sorted(set(subfolders) - _SKIPPED_FOLDERS)
            for name in filter(_SOURCE_FILE.fullmatch, sorted(files)):
                path = Path(folder, name)
                inside = path.relative_to(root)
                if size := _documented_size(path):
                    package = inside.parts[0].removesuffix(".py") if number else STANDARD_LIBRARY
                    kind = "site" if number else STANDARD_LIBRARY
                    relative = f"{kind}/{inside.as_posix()}"
                    order = hashlib.sha256(relative.encode()).hexdigest()
                    yield Source(order, relative, package, path, size)


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
    packages: dict[str, list[Source]] = collections.defaultdict(list)
    first_found = {source.relative: source for source in reversed(list(sources))}
    for source in sorted(first_found.values()):
        packages[source.package].append(source)
    sizes = [_bytes(of_package) for of_package in packages.values()]
    caps = range(_SOURCE_BYTES_PER_PACKAGE + 1)
    cap = bisect.bisect(caps, _SOURCE_BYTES, key=lambda cap: sum(min(n, cap) for n in sizes)) - 1
    selected = []
    for package in sorted(packages):
        chosen = _take(packages[package], cap)
        validation = set(_take(chosen, VALIDATION_SHARE * _bytes(chosen)))
        selected += [(source, SPLITS[source in validation]) for source in chosen]
    return selected


def _bytes(sources: Iterable[Source]) -> int:
    return sum(source.size for source in sources)


def _take(sources: Iterable[Source], most: float) -> list[Source]:
    """Greedily takes sources up to a byte budget."""
    chosen: list[Source] = []
    for source in sources:
        if source.size <= most:
            most -= source.size
            chosen.append(source)
    return chosen


def _extract(sources: list[tuple[Source, str]]) -> dict[str, list[dict[str, str]]]:
    """Returns the records of each split, every text once; broken files have none."""
    records: dict[str, dict[str, dict[str, str]]] = {split: {} for split in SPLITS}  # by text
    written: collections.Counter[str] = collections.Counter()
    for source, split in sources:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in other people's strings
                tree = ast.parse(source.path.read_bytes())
        except (SyntaxError, ValueError, RecursionError, MemoryError, OSError):
            continue
        module = source.relative.removesuffix(".py").partition("/")[2].replace("/", ".")
        owner = {"package": source.package, "module": module.removesuffix(".__init__")}
        for name, kind, raw in _docstrings(tree):
            text = "\n".join(sentences(raw))
            if text and written[source.package] + len(text) <= _TEXT_BYTES_PER_PACKAGE:
                written[source.package] += len(text)
                record = {**owner, "name": name, "kind": kind, "text": text}
                records[split].setdefault(text, record)
    train, validation = (records[split] for split in SPLITS)
    held_out = [record for text, record in validation.items() if text not in train]
    return {"train": list(train.values()), "validation": held_out}


def _docstrings(node: Any, name: str = "") -> Iterator[tuple[str, str, str]]:
    """Yields (qualified name, kind, raw docstring) of a module and what it defines."""
    if raw := ast.get_docstring(node, clean=False):
        kind = {ast.Module: "module", ast.ClassDef: "class"}.get(type(node), "function")
        yield name, kind, raw
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child, f"{name}.{child.name}".lstrip("."))


def sentences(docstring: str) -> list[str]:
    """Returns the prose sentences of a raw docstring, in the order in which they were written.

    Every sentence is ASCII, on one line, has 4 to 60 words, and ends with '.', '!' or '?'.
    """
    kept: list[str] = []
    for paragraph in _paragraphs(inspect.cleandoc(docstring).translate(_ASCII).splitlines()):
        text = " ".join(paragraph)
        for pattern, replacement in _MARKUP:
            text = pattern.sub(replacement, text)
        kept += filter(_is_prose, map(_finish, _split(" ".join(text.split()))))
    return kept


def _paragraphs(lines: list[str]) -> list[list[str]]:
    """Groups the prose lines of a docstring into paragraphs; drops everything else."""
    groups: list[list[str]] = [[]]
    fenced = listed = tabular = False
    for line, following in itertools.pairwise([*lines, ""]):
        fence = bool(_FENCE.match(line))
        fenced ^= fence
        tabular = bool(line.strip()) and (tabular or bool(_TABLE.match(line)))
        title = _SECTION.match(line)  # Google's 'Args:', or an underlined heading
        heading = line.rstrip().endswith(":") or bool(_UNDERLINE.match(following))
        if title and heading:
            listed = title["title"].strip().lower() in _LIST_SECTIONS
        dropped = bool(title and heading) or fence or fenced or listed or tabular
        dropped = dropped or bool(_UNDERLINE.match(line) or _NO_PROSE.search(line))
        if dropped or _ITEM.match(line):
            groups.append([])
        if not dropped:
            groups[-1].append(_ITEM.sub("", line).strip())
    return [group for group in groups if group]


def _split(text: str) -> list[str]:
    """Splits a paragraph at sentence ends, but not after abbreviations such as 'e.g.'."""
    parts: list[str] = []
    for part in _BREAK.split(text):
        if parts and _ABBREVIATION.search(parts[-1]):
            parts[-1] += " " + part
        else:
            parts.append(part)
    return parts


def _finish(sentence: str) -> str:
    """Ends a heading that has no full stop with one; a colon announces what was dropped."""
    sentence = sentence.strip().rstrip(":,;").rstrip()
    return sentence if sentence.endswith((".", "!", "?")) else sentence + "."


def _is_prose(sentence: str) -> bool:
    words = sentence.split()
    plain = sentence.isascii() and sentence[0].isalpha() and "@" not in sentence
    if not 4 <= len(words) <= 60 or not plain:
        return False
    strange = len(_STRANGE.findall(sentence))
    return strange <= 0.12 * len(sentence) and max(map(len, words)) <= 40
