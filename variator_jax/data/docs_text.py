"""From a raw docstring to plain English sentences. Pure functions of strings.

Dropped: doctests, code, tables, directives, parameter lists and other sections that are data rather
than prose, and inline markup. Kept: sentences, one list per docstring.
"""

from __future__ import annotations

import inspect
import re

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
    fenced = skipping = tabular = False
    for line, following in zip(lines, [*lines[1:], ""], strict=False):
        fence = bool(_FENCE.match(line))
        fenced ^= fence
        tabular = bool(line.strip()) and (tabular or bool(_TABLE.match(line)))
        title = None if fence else _section_title(line, following)
        if title is not None:
            skipping = title.lower() in _LIST_SECTIONS
        dropped = fence or fenced or skipping or tabular or title is not None
        if dropped or _UNDERLINE.match(line) or _NO_PROSE.search(line):
            groups.append([])
            continue
        if _ITEM.match(line):
            groups.append([])
        groups[-1].append(_ITEM.sub("", line).strip())
    return [group for group in groups if group]


def _section_title(line: str, following: str) -> str | None:
    """Returns the title if `line` opens a section (Google's 'Args:' or an underlined heading)."""
    match = _SECTION.match(line)
    if match and (line.rstrip().endswith(":") or _UNDERLINE.match(following)):
        return match["title"].strip()
    return None


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
