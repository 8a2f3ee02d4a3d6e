"""Gin files: finding them, parsing them, and saying in one line what is wrong with them.

Gin does the configuring; this module adds what its users miss. Packaged configurations are found
from any folder, and a slip in a file, a name or an override is told in one line with the nearest
right names, before anything is built. Each file is first *scanned* (read with gin's own parser, but
nothing imported and nothing resolved), so that syntax, includes and macro names are judged early;
then gin parses it for good. What a configuration means is not known here: only gin is imported.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import logging
import pkgutil
import re
import sys
import tokenize
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import gin
from gin import config as gin_config  # Its tables have no public readers; see setup.py's pin.
from gin import config_parser

from variator_jax.errors import ConfigError, did_you_mean

T = TypeVar("T")

_MACRO = "gin.macro"
# What a shell leaves of an unquoted string: a path, a task name, a bucket, a template.
_BARE_WORD = re.compile(r"[A-Za-z_.~/$][^'\"\n]*|[\w:+=.$-]+")
# Dependencies of the `train` extra, by the module that is found missing.
_TRAIN_MODULES = ("matplotlib", "seqio", "sentencepiece", "tensorflow", "tensorflow_datasets")


def configs_dir() -> Path:
    """The packaged configurations: the repository's `gin_configs` in a checkout, else ours."""
    package = Path(__file__).resolve().parent
    installed = package / "gin_configs"
    return installed if installed.is_dir() else package.parent / "gin_configs"


def find_config(name: str, search_paths: Sequence[str] = ()) -> Path:
    """Finds the gin file `name`: in the current folder, in `search_paths`, in the packaged ones.

    Args:
      name: a path, or a name below one of these folders, such as `runs/adapt.gin`.
      search_paths: folders that go before the packaged configurations, in this order.

    Returns:
      The path of the first file that exists.

    Raises:
      ConfigError: if there is none, with the nearest names among the files that there are.
    """
    given = Path(name).expanduser()
    folders = _folders(search_paths)
    for folder in folders:
        if (folder / given).is_file():  # An absolute name stands for itself.
            return folder / given
    beside = map(str, given.parent.glob("*.gin"))
    depths = ("*.gin", "*/*.gin", "*/*/*.gin")
    below = (str(f.relative_to(d)) for d in folders[1:] for glob in depths for f in d.glob(glob))
    raise ConfigError(
        f"gin file {name!r} does not exist; looked in {', '.join(map(str, folders))}."
        + did_you_mean(name, sorted({*beside, *below}))
    )


def parse(
    gin_files: Sequence[str], bindings: Sequence[str] = (), search_paths: Sequence[str] = ()
) -> None:
    """Clears gin, parses files and then bindings, and checks the result.

    Gin is left unlocked: the built-in engine imports lazily, and a locked gin refuses modules that
    register configurables.

    Args:
      gin_files: names as `find_config` takes them; a later file overrides an earlier one.
      bindings: overrides `NAME=VALUE`, where the value is a Python literal or a gin reference. A
        bare word (`runs/x`) stands for a string, unless the files give the name another type.
      search_paths: folders for gin files and for the files that they include.

    Raises:
      ConfigError: for a missing file, a syntax error, an unknown module, name, parameter or macro,
        and for every required macro that nothing sets.
    """
    gin.clear_config()
    paths = [find_config(name, search_paths) for name in gin_files]
    scan = _Scan(search_paths)
    for path in paths:
        scan.file(path)
    overrides = _named_overrides(bindings, scan)
    with _search_path(search_paths):
        for path in paths:
            _told(functools.partial(gin.parse_config_file, str(path)), scan)
    for name, value in overrides:
        statement = f"{name} = {_literal(name, value)}"
        _told(functools.partial(gin.parse_config, statement), scan, f"--gin.{name}={value}")
    _check_macros(scan)
    _check_required()


def macro(name: str) -> Any:
    """The value of a macro, with the macros that it reads put in; references stay references.

    Raises:
      ConfigError: if the parsed configuration does not define it.
    """
    key = (name, _MACRO)
    if key not in gin_config._CONFIG:
        known = [scope for scope, selector in gin_config._CONFIG if selector == _MACRO]
        raise ConfigError(f"no macro {name!r} is defined." + did_you_mean(name, known))
    return _without_macros(gin_config._CONFIG[key]["value"])


def macros() -> dict[str, Any]:
    """All macros of the parsed configuration by name, each as `macro` gives it."""
    names = sorted(scope for scope, selector in gin_config._CONFIG if selector == _MACRO)
    return {name: macro(name) for name in names}


def resolved_config() -> str:
    """The whole parsed configuration as one gin file, used or not."""
    return gin.config_str()


def operative_config() -> str:
    """What the configurables called so far were given, defaults included, as one gin file."""
    return gin.operative_config_str()


def configured(function: Callable[..., T]) -> Callable[..., T]:
    """The gin-configured version of `function`, all that it needs being there.

    Whatever gin would call on the way (each `@name()` reached from `function`) is checked too.

    Raises:
      ConfigError: if the parsed files do not mention the function, or leave out a parameter
        without default of it or of something that it is given.
    """
    found = gin_config._inverse_lookup(function, allow_decorators=True)
    if found is None or not _mentioned(found.selector):
        where = f"{function.__module__}.{function.__qualname__}"
        raise ConfigError(f"the given gin files configure no {where}: add one that does.")
    missing = sorted(_missing_parameters(found, (), set()))
    if missing:
        raise ConfigError(f"not set, and without a default: {', '.join(missing)}.{_how(missing)}")
    return gin.get_configurable(function)


# Scanning: reading files without importing or resolving anything.


class _Reader(config_parser.ParserDelegate):
    """Takes note of the macros that statements read; all references stay unresolved."""

    def __init__(self) -> None:
        self.read: list[str] = []

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> None:
        """Leaves the reference alone."""

    def macro(self, macro_name: str) -> None:
        """Notes the name."""
        self.read.append(macro_name)


@dataclasses.dataclass
class _Scan:
    """What the gin files of one configuration say."""

    search_paths: Sequence[str]
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
        reader = _Reader()
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
            raise ConfigError(_syntax_message(error, where)) from error

    def _included(self, statement: config_parser.IncludeStatement, path: Path) -> Path:
        try:
            return find_config(statement.filename, self.search_paths)
        except ConfigError as error:
            raise ConfigError(f"{path}:{statement.location.line_num}: included {error}") from None


def _syntax_message(error: Exception, where: str) -> str:
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


def _folders(search_paths: Sequence[str]) -> list[Path]:
    """Where gin files are looked for, in this order."""
    folders = [Path(path).expanduser().absolute() for path in search_paths]
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"the gin search path {folder} is not a folder.")
    return [Path.cwd(), *folders, configs_dir()]


# Overrides from the command line.


def _named_overrides(bindings: Iterable[str], scan: _Scan) -> list[tuple[str, str]]:
    """Overrides as (name, value); their macros are known to the files or read by one another."""
    overrides = []
    for binding in bindings:
        name, _, value = (part.strip() for part in binding.partition("="))
        if not value:
            raise ConfigError(f"--gin.{name} has no value: write --gin.{name}=VALUE.")
        if not all(map(str.isidentifier, re.split(r"[./]", name))):
            raise ConfigError(f"--gin.{name}: this is not a name that gin can bind.")
        overrides.append((name, value))
    in_files = sorted(scan.defined | set(scan.read))
    known = {*in_files, *re.findall(r"%([\w./]+)", " ".join(value for _, value in overrides))}
    for name, _ in overrides:
        if "." not in name and name not in known:
            raise ConfigError(
                f"--gin.{name}: no gin file of this run defines or reads a macro {name!r}."
                + did_you_mean(name, in_files)
            )
    return overrides


def _literal(name: str, value: str) -> str:
    """`value` if gin can read it; quoted if it is a bare word where a string may stand."""
    try:
        if len(list(config_parser.ConfigParser(f"{name} = {value}", _Reader()))) == 1:
            return value
    except (SyntaxError, tokenize.TokenError):
        pass  # Not a literal, so perhaps a word: told apart below.
    current = _current(name)
    if current is not None and not isinstance(current, str | gin_config.ConfigurableReference):
        raise ConfigError(f"--gin.{name}={value}: expected a value such as {current!r}.")
    if value.lower() in ("true", "false", "none", "null"):
        raise ConfigError(f"--gin.{name}={value}: Python writes True, False and None.")
    if not _BARE_WORD.fullmatch(value):
        raise ConfigError(
            f"--gin.{name}={value}: not a Python literal; quote a string twice: "
            f"""--gin.{name}="'...'"."""
        )
    return repr(value)


def _current(name: str) -> Any:
    """What the files bind `name` to; None if nothing, or if the name is unknown."""
    try:
        return gin.query_parameter(name if "." in name else f"{name}/{_MACRO}.value")
    except (ValueError, KeyError, NameError):
        return None


# Gin's own parsing, its errors boiled down.


@contextlib.contextmanager
def _search_path(search_paths: Sequence[str]) -> Iterator[None]:
    """Lets gin find included files as `find_config` does, and nowhere else."""
    before = list(gin_config._LOCATION_PREFIXES)
    logs = logging.getLogger()
    gin_config._LOCATION_PREFIXES.clear()
    for folder in _folders(search_paths):
        gin.add_config_file_search_path(str(folder))
    logs.addFilter(_not_searching)
    try:
        yield
    finally:
        logs.removeFilter(_not_searching)
        gin_config._LOCATION_PREFIXES[:] = before


def _not_searching(record: logging.LogRecord) -> bool:
    """Drops the error that gin logs for every place where it looks for a file in vain."""
    return record.module != "resource_reader"


def _told(parsing: Callable[[], object], scan: _Scan, where: str = "") -> None:
    """Runs one parse by gin; whatever goes wrong becomes a ConfigError of one line."""
    try:
        parsing()
    except SyntaxError as error:  # In a module that is imported; the gin files are scanned.
        raise ConfigError(_syntax_message(error, error.filename or where)) from error
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


# Checks after parsing.


def _check_macros(scan: _Scan) -> None:
    """Every macro that is read must be defined."""
    config = gin_config._CONFIG
    defined = sorted(scope for scope, selector in config if selector == _MACRO)
    for reference in gin_config.iterate_references(config):
        name = "/".join(reference.scopes)
        if reference.configurable.selector == _MACRO and name not in defined:
            raise ConfigError(
                f"{scan.read.get(name, 'command line')}: macro %{name} is defined nowhere; "
                f"set it in a gin file or with --gin.{name}=VALUE." + did_you_mean(name, defined)
            )


def _check_required() -> None:
    """Nothing may still be `%gin.REQUIRED`."""
    missing = []
    for (scope, selector), parameters in gin_config._CONFIG.items():
        for parameter, value in parameters.items():
            references = gin_config.iterate_references([value])
            if any(r.scoped_selector == "gin.REQUIRED/gin.constant" for r in references):
                missing.append(scope if selector == _MACRO else _bound(scope, selector, parameter))
    if missing:
        missing.sort()
        raise ConfigError(f"required, but not set: {', '.join(missing)}.{_how(missing)}")


def _missing_parameters(
    found: gin_config.Configurable, scopes: tuple[str, ...], seen: set[tuple[Any, ...]]
) -> Iterator[str]:
    """Parameters without default or binding, of `found` and of all that gin calls for it."""
    if (found.selector, scopes) in seen:
        return
    seen.add((found.selector, scopes))
    bound = gin_config._get_bindings(found.selector, list(scopes))
    for parameter in _required_parameters(found.wrapped):
        if parameter not in bound and found.module != "gin":
            yield _bound("/".join(scopes), found.selector, parameter)
    for reference in gin_config.iterate_references([bound]):
        if reference.evaluate:  # Others are handed over as functions; their caller fills them in.
            inner = tuple(reference.scopes) or scopes
            yield from _missing_parameters(reference.configurable, inner, seen)


def _required_parameters(function: Callable[..., Any]) -> Iterator[str]:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # Some builtins have none.
        return
    for name, parameter in signature.parameters.items():
        variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        default = parameter.default
        if not variadic and (default is parameter.empty or default is gin.REQUIRED):
            yield name


def _bound(scope: str, selector: str, parameter: str) -> str:
    """How an override names this parameter."""
    short = gin_config._REGISTRY.minimal_selector(selector)
    return f"{scope}{'/' if scope else ''}{short}.{parameter}"


def _how(names: Iterable[str]) -> str:
    return " Give " + " ".join(f"--gin.{name}=VALUE" for name in names) + ", or set it in a file."


def _mentioned(selector: str) -> bool:
    """Whether the parsed configuration binds or references this configurable."""
    config = gin_config._CONFIG
    references = gin_config.iterate_references(config)
    return any(key[1] == selector for key in config) or any(
        reference.configurable.selector == selector for reference in references
    )


def _without_macros(value: Any) -> Any:
    """`value` with each `%NAME` replaced by what it stands for, at any depth."""
    if isinstance(value, gin_config.ConfigurableReference):
        is_macro = value.configurable.selector == _MACRO
        return macro("/".join(value.scopes)) if is_macro else value
    if isinstance(value, dict):
        return {_without_macros(k): _without_macros(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_without_macros, value))
    return value
