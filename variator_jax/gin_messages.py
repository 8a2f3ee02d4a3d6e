"""Gin's errors boiled down: one line with file, line and the nearest right name."""

from __future__ import annotations

import inspect
import pkgutil
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gin import config as gin_config  # Its tables have no public readers; see setup.py's pin.
from gin import config_parser

from variator_jax.errors import ConfigError, did_you_mean
from variator_jax.gin_scan import Scan, syntax_message

# Dependencies of the `train` extra, by the module that is found missing.
_TRAIN_MODULES = ("matplotlib", "seqio", "sentencepiece", "tensorflow", "tensorflow_datasets")


def told(parsing: Callable[[], object], scan: Scan, where: str = "") -> None:
    """Runs one parse by gin; whatever goes wrong becomes a ConfigError of one line."""
    try:
        parsing()
    except SyntaxError as error:  # In a module that is imported; the gin files are scanned.
        raise ConfigError(syntax_message(error, error.filename or where)) from error
    except Exception as error:  # Anything at all: gin files import modules of the user's.
        message = str(error)
        located = re.search(r'In file "(.*)", line (\d+)', message)
        file, line = (str(Path(located[1])), int(located[2])) if located else ("", 0)
        imports = scan.imports.get(file, [])
        failed = [statement for statement in imports if statement.location.line_num == line]
        reason = (
            _import_failure(error, failed[0].module) if failed else _name_failure(message, imports)
        )
        raise ConfigError(f"{f'{file}:{line}' if file else where}: {reason}") from error


def _import_failure(error: Exception, module: str) -> str:
    first_line = str(error).partition("\n")[0]
    missing = re.match(r"No module named '([\w.]+)'", first_line)
    if not missing:
        return f"importing {module} failed with {type(error).__name__}: {first_line}"
    parent, _, _ = missing[1].rpartition(".")
    if missing[1].partition(".")[0] in _TRAIN_MODULES:
        near = " It comes with: pip install 'variator_jax[train]'."
    else:
        folders = getattr(sys.modules[parent], "__path__", []) if parent else None
        siblings = [found.name for found in pkgutil.iter_modules(folders)]
        names = [f"{parent}.{name}" if parent else name for name in siblings]
        near = did_you_mean(missing[1], names)
    needed = "" if f"{module}.".startswith(f"{missing[1]}.") else f" (needed by {module})"
    return f"there is no module {missing[1]!r}{needed}.{near}"


def _name_failure(message: str, imports: Sequence[config_parser.ImportStatement]) -> str:
    if match := re.match(r"'(\w+)' was not provided by an import", message):
        names = [statement.bound_name() for statement in imports]
        return f"this file imports nothing as {match[1]!r}." + did_you_mean(match[1], names)
    if match := re.match(r"Couldn't resolve selector ([\w.]+);[^\n]* attribute (\w+)", message):
        parent = match[1][: f"{match[1]}.".index(f".{match[2]}.")]
        near = did_you_mean(match[2], dir(_lookup(parent, imports)))
        return f"{parent} has nothing called {match[2]!r}." + near
    if match := re.match(r"Configurable '(.+)' doesn't have a parameter named '(\w+)'", message):
        parameters = inspect.signature(_lookup(match[1], imports)).parameters
        near = did_you_mean(match[2], parameters)
        return f"{match[1]} has no parameter {match[2]!r}." + near
    if match := re.match(r"No configurable matching (?:reference )?'@?([\w.]+)", message):
        depth = match[1].count(".") + 1
        known = {".".join(name.split(".")[-depth:]) for name, _ in gin_config._REGISTRY.items()}
        near = did_you_mean(match[1], sorted(known))
        return f"no gin file of this run mentions a configurable {match[1]!r}." + near
    return message.partition("\n")[0].strip('"')  # A KeyError shows itself quoted.


def _lookup(selector: str, imports: Sequence[config_parser.ImportStatement]) -> Any:
    """What `alias.name` means in a gin file with these imports, else in gin's registry."""
    first, *rest = selector.split(".")
    for statement in imports:
        if statement.bound_name() == first:
            whole = statement.is_from or statement.alias
            found = sys.modules[statement.module if whole else first]
            for name in rest:
                found = getattr(found, name)
            return found
    return gin_config._REGISTRY.get_match(selector).wrapped
