"""Scanning gin files: read with gin's own parser, but nothing imported and nothing resolved.

What a file says (imports, macros defined and read) is known afterwards, and its syntax and includes
are judged; what its names mean is not.
"""

from __future__ import annotations

import dataclasses
import re
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gin import config_parser

from variator_jax.errors import ConfigError


class Reader(config_parser.ParserDelegate):
    """Takes note of the macros that statements read; all references stay unresolved."""

    def __init__(self) -> None:
        self.read: list[str] = []

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> None:
        """Leaves the reference alone."""

    def macro(self, macro_name: str) -> None:
        """Notes the name."""
        self.read.append(macro_name)


@dataclasses.dataclass
class Scan:
    """What the gin files of one configuration say."""

    # From the name in an include statement to the file, or a ConfigError.
    find: Callable[[str], Path]
    # By file name: its import statements.
    imports: dict[str, list[config_parser.ImportStatement]] = dataclasses.field(
        default_factory=dict
    )
    # Macros by name: where they are read; and all that are defined.
    read: dict[str, str] = dataclasses.field(default_factory=dict)
    defined: set[str] = dataclasses.field(default_factory=set)

    def file(self, path: Path, including: tuple[Path, ...] = ()) -> None:
        """Scans a file and those that it includes."""
        if path in including:
            raise ConfigError(f"{including[-1]} includes {path}, which is still being read.")
        self.imports[str(path)] = []
        with path.open(encoding="utf-8") as lines:
            for statement in self._statements(lines, str(path)):
                if isinstance(statement, config_parser.ImportStatement):
                    self.imports[str(path)].append(statement)
                elif isinstance(statement, config_parser.IncludeStatement):
                    included = self._included(statement, path)
                    self.file(included, (*including, path))

    def _statements(self, source: Any, where: str) -> Iterator[Any]:
        reader = Reader()
        try:
            for statement in config_parser.ConfigParser(source, reader):
                line = f"{where}:{statement.location.line_num}"
                if isinstance(statement, config_parser.BindingStatement) and not statement.arg_name:
                    self.defined.add("/".join(filter(None, statement[:2])))
                for name in reader.read:
                    self.read.setdefault(name, line)
                reader.read.clear()
                yield statement
        except (SyntaxError, tokenize.TokenError, UnicodeDecodeError) as error:
            raise ConfigError(syntax_message(error, where)) from error

    def _included(self, statement: config_parser.IncludeStatement, path: Path) -> Path:
        try:
            return self.find(statement.filename)
        except ConfigError as error:
            raise ConfigError(f"{path}:{statement.location.line_num}: included {error}") from None


def syntax_message(error: Exception, where: str) -> str:
    """Where the syntax goes wrong and why, in one line."""
    if isinstance(error, UnicodeDecodeError):
        return f"{where}: not a text file in UTF-8."
    if isinstance(error, SyntaxError):
        line, text, reason = error.lineno, (error.text or "").strip(), str(error.msg)
    else:  # tokenize.TokenError: what was opened is never closed.
        (reason, (line, _)), text = error.args, ""
    literal = re.search(r"Failed to parse token '(.*)'", reason, re.DOTALL)
    if literal:
        reason = f"{literal[1]!r} is no Python literal (strings need quotes)"
    reason = reason.splitlines()[0].rstrip(".")
    return f"{where}:{line}: syntax error: {reason}" + (f", in: {text}" if text else ".")
