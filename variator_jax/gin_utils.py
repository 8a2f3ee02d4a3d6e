"""Gin files: found from any folder, parsed by gin, checked, with errors in one line.

Gin does the configuring. Added here: packaged configurations, overrides as a shell passes them, and
messages that name the file, the line and the nearest right name. Each file is read once. What a
configuration means is not known here: only gin is imported.
"""

import contextlib
import inspect
import os
import pkgutil
import re
import sys
import tokenize
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import gin
from gin import config as gin_config  # Its tables have no public readers; see setup.py's pin.
from gin import config_parser

from variator_jax.errors import ConfigError, did_you_mean
from variator_jax.files import expand_home

T = TypeVar("T")

MACRO = "gin.macro"  # gin keeps a macro as a configurable of this name, scoped by the macro's name

# Unquoted strings as the shell passes them: a path, a task name, a bucket, a template.
_BARE_WORD = re.compile(r"(?!(?i:true|false|none|null)$)(?:[A-Za-z_.~/$][^'\"\n]*|[\w:+=.$~/-]+)")
_TEMPLATE = re.compile(r"(?=.*\{[\w-]+\})[^'\"].*", re.DOTALL)  # such as {text}
# Dependencies of the `train` extra, by the module that an import misses.
_TRAIN_MODULES = ("matplotlib", "seqio", "sentencepiece", "tensorflow", "tensorflow_datasets")


def configs_dir() -> Path:
    """The packaged configurations: the repository's `gin_configs` in a checkout, else ours."""
    package = Path(__file__).resolve().parent
    installed = package / "gin_configs"
    return installed if installed.is_dir() else package.parent / "gin_configs"


def engine_dir(engine: str = "builtin") -> str:
    """The folder with the `engine.gin` of an engine: a search path of its configurations."""
    return str(configs_dir() / "engines" / engine)


def find_config(name: str, search_paths: Sequence[str] = ()) -> Path:
    """Finds the gin file `name`: in the current folder, in `search_paths`, in the packaged ones.

    Args:
      name: a path, or a name below one of these folders, such as `runs/adapt.gin`.
      search_paths: folders that go before the packaged configurations, in this order.

    Raises:
      ConfigError: if there is none, with the nearest names.
    """
    given = Path(name).expanduser()
    searched = [Path(path).expanduser().absolute() for path in search_paths]
    folders = [Path.cwd(), *searched, configs_dir()]
    for folder in folders:
        if (folder / given).is_file():  # `folder / given` is `given` if that is absolute.
            return folder / given
    near = set(map(str, given.parent.glob("*.gin")))
    for depth in ("*.gin", "*/*.gin", "*/*/*.gin"):
        near |= {str(path.relative_to(d)) for d in folders[1:] for path in d.glob(depth)}
    raise ConfigError(
        f"gin file {name!r} does not exist; looked in {', '.join(map(str, folders))}."
        + did_you_mean(name, sorted(near))
    )


def parse(
    gin_files: Sequence[str],
    bindings: Sequence[str] = (),
    search_paths: Sequence[str] = (),
    require: bool = True,
) -> list[tuple[str, str]]:
    """Clears gin, parses files and then overrides, and checks the result.

    The leading `~/` of a string, in a file or an override, is the home folder.
    Gin is left unlocked: a locked gin refuses modules that register configurables later.

    Args:
      gin_files: names as `find_config` takes them; a later file overrides an earlier one.
      bindings: overrides `NAME=VALUE`, where the value is a Python literal or a gin reference. A
        bare word (`runs/x`) is a string, unless the files give the name another type.
      search_paths: folders for gin files and for the files that they include.
      require: whether required macros must be set; `leave_unset` returns those that are not.

    Returns:
      The overrides as names and gin literals, for another program's command line; those of paths
      below the home folder are among them.

    Raises:
      ConfigError: for a missing file, a syntax error, an unknown module, name, parameter or macro,
        and for every required macro that nothing sets.
    """
    gin.clear_config()
    paths = [find_config(name, search_paths) for name in gin_files]
    with _file_reader(search_paths) as opened:
        for path in paths:
            gin.parse_config_file(str(path))
    overrides = []
    for name, value in _named(bindings):
        overrides.append((name, _literal(name, value)))
        with _explain(f"--gin.{name}={value}"):
            gin.parse_config(" = ".join(overrides[-1]))
    overrides += _expand_home()
    _check_macros(opened)
    if require and (missing := unset_required()):
        raise ConfigError(f"required, but not set: {', '.join(missing)}.{_hint(missing)}")
    return overrides


def macro(name: str) -> Any:
    """The value of a macro, with the macros that it reads put in; references stay references.

    Raises:
      ConfigError: if the parsed configuration does not define it.
    """
    if name not in (known := _defined_macros()):
        raise ConfigError(f"no macro {name!r} is defined." + did_you_mean(name, known))
    return _without_macros(gin_config._CONFIG[name, MACRO]["value"])


def unset_required() -> list[str]:
    """The names that are still `%gin.REQUIRED`, as an override would name them."""
    missing = []
    for (scope, selector), parameters in gin_config._CONFIG.items():
        for parameter, value in parameters.items():
            references = gin_config.iterate_references([value])
            if any(r.scoped_selector == "gin.REQUIRED/gin.constant" for r in references):
                missing.append(scope if selector == MACRO else _bound(scope, selector, parameter))
    return sorted(missing)


def leave_unset() -> list[str]:
    """Sets what is required and not set to None, to look at the rest; returns the names."""
    missing = unset_required()
    for name in missing:
        gin.parse_config(f"{name} = None")
    return missing


def resolved_config() -> str:
    """The whole parsed configuration as one gin file, used or not."""
    return str(gin.config_str())


def configured(function: Callable[..., T]) -> Callable[..., T]:
    """The gin-configured version of `function`; its required parameters are checked first.

    Whatever gin would call on the way (each `@name()` reached from `function`) is checked too.

    Raises:
      ConfigError: if the parsed files do not mention the function, or leave out a parameter
        without default of it or of something that it is given.
    """
    config = gin_config._CONFIG
    target = gin_config._inverse_lookup(function, allow_decorators=True)
    mentioned = {selector for _, selector in config}
    mentioned |= {r.configurable.selector for r in gin_config.iterate_references(config)}
    if target is None or target.selector not in mentioned:
        name = f"{function.__module__}.{function.__qualname__}"
        raise ConfigError(f"the given gin files do not configure {name}: add one that does.")
    missing = sorted(_missing_parameters(target, (), set()))
    if missing:
        raise ConfigError(f"not set, and without a default: {', '.join(missing)}.{_hint(missing)}")
    return gin.get_configurable(function)


def as_override(name: str, value: object) -> str:
    """`--gin.NAME=VALUE` as `parse` reads it back: a plain path bare, else a literal."""
    bare = isinstance(value, str) and re.fullmatch(r"[A-Za-z_.~/][\w.~/-]*", value)
    plain = bare and value not in ("None", "True", "False")
    return f"--gin.{name}={value if plain else repr(value)}"


def _named(bindings: Sequence[str]) -> list[tuple[str, str]]:
    """Overrides as (name, value), their macros known to the parsed files or to one another."""
    overrides = []
    for binding in bindings:
        name, _, value = (part.strip() for part in binding.partition("="))
        if not value:
            raise ConfigError(f"--gin.{name} has no value: write --gin.{name}=VALUE.")
        overrides.append((name, value))
    in_files = sorted({*_defined_macros(), *_read_macros()})
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
    with contextlib.suppress(SyntaxError, tokenize.TokenError):  # It may be a bare word.
        delegate = gin_config.ParserDelegate(skip_unknown=True)
        if len(list(config_parser.ConfigParser(f"{name} = {value}", delegate))) == 1:
            return value
    current = None
    with contextlib.suppress(ValueError, KeyError, NameError):
        current = gin.query_parameter(name if "." in name else f"{name}/{MACRO}.value")
    if not isinstance(current, str | tuple | gin_config.ConfigurableReference | None):
        raise ConfigError(f"--gin.{name}={value}: expected a value such as {current!r}.")
    if not _BARE_WORD.fullmatch(value) and not _TEMPLATE.fullmatch(value):
        raise ConfigError(
            f"--gin.{name}={value}: neither a Python literal (True, False, None) nor a plain word; "
            f"""quote a string twice: --gin.{name}="'...'"."""
        )
    return repr(value)


def _expand_home() -> list[tuple[str, str]]:
    """Puts the home folder for the leading `~` of strings; returns the changes as overrides."""
    changes = []
    for (scope, selector), parameters in gin_config._CONFIG.items():
        for parameter, value in parameters.items():
            name = scope if selector == MACRO else _bound(scope, selector, parameter)
            changes.append((name, repr(value), expand_home(repr(value))))
    changed = [(name, literal) for name, before, literal in changes if literal != before]
    for binding in changed:
        gin.parse_config(" = ".join(binding))
    return changed


def _defined_macros() -> list[str]:
    return sorted(scope for scope, selector in gin_config._CONFIG if selector == MACRO)


def _read_macros() -> set[str]:
    references = gin_config.iterate_references(gin_config._CONFIG)
    return {"/".join(r.scopes) for r in references if r.configurable.selector == MACRO}


def _check_macros(opened: Sequence[Path]) -> None:
    """Every macro that is read must be defined."""
    defined = _defined_macros()
    for name in sorted(_read_macros() - set(defined)):
        places = [
            f"{path}:{number}"
            for path in opened
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
            if re.search(rf"%{re.escape(name)}\b", line)
        ]
        raise ConfigError(
            f"{[*places, 'command line'][0]}: macro %{name} is not defined; set it in a gin file "
            f"or with --gin.{name}=VALUE." + did_you_mean(name, defined)
        )


def _missing_parameters(
    target: gin_config.Configurable, scopes: tuple[str, ...], seen: set[tuple[Any, ...]]
) -> Iterator[str]:
    """Parameters without default or binding, of `target` and of all that gin calls for it."""
    if (target.selector, scopes) in seen:
        return
    seen.add((target.selector, scopes))
    bound = gin_config._get_bindings(target.selector, list(scopes))
    for name, parameter in _parameters(target.wrapped).items():
        variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        unset = any(parameter.default is none for none in (parameter.empty, gin.REQUIRED))
        if unset and not variadic and name not in bound and target.module != "gin":
            yield _bound("/".join(scopes), target.selector, name)
    for reference in gin_config.iterate_references([bound]):
        if reference.evaluate:  # Others are passed as functions, whose caller fills them in.
            inner = tuple(reference.scopes) or scopes
            yield from _missing_parameters(reference.configurable, inner, seen)


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # Some builtins have no signature.
        return {}


def _bound(scope: str, selector: str, parameter: str) -> str:
    """How an override names this parameter."""
    short = gin_config._REGISTRY.minimal_selector(selector)
    return f"{scope}{'/' if scope else ''}{short}.{parameter}"


def _hint(names: Sequence[str]) -> str:
    """How to set these from the command line."""
    return " Give " + " ".join(f"--gin.{name}=VALUE" for name in names) + ", or set it in a file."


def _without_macros(value: Any) -> Any:
    """`value` with each `%NAME` replaced by its value, at any depth."""
    match value:
        case gin_config.ConfigurableReference() if value.configurable.selector == MACRO:
            return macro("/".join(value.scopes))
        case dict():
            return {_without_macros(k): _without_macros(v) for k, v in value.items()}
        case list() | tuple():
            return type(value)(map(_without_macros, value))
    return value


@contextlib.contextmanager
def _file_reader(search_paths: Sequence[str]) -> Iterator[list[Path]]:
    """Lets gin open files as `find_config` finds them, and nowhere else; yields the opened ones."""
    opened: list[Path] = []
    including: list[Path] = []

    @contextlib.contextmanager
    def read(name: str) -> Iterator[Any]:
        path = find_config(name, search_paths)
        if path in including:
            raise ConfigError(f"circular include of {path}.")
        opened.append(path)
        including.append(path)
        with _explain(str(path)), path.open(encoding="utf-8") as lines:
            yield lines
        including.pop()

    readers = gin_config._FILE_READERS
    gin_config._FILE_READERS = [(read, lambda name: True)]
    try:
        yield opened
    finally:
        gin_config._FILE_READERS = readers


class _LocatedError(ConfigError):
    """An error whose message names the place already."""


@contextlib.contextmanager
def _explain(place: str) -> Iterator[None]:
    """Raises any error of a parse as a ConfigError of one line, with file, line and near names."""
    try:
        yield
    except _LocatedError as error:  # Of an included file; gin has appended the way to it.
        raise _LocatedError(str(error).partition("\n")[0]) from error
    except Exception as error:  # Of any type: gin files import the user's modules.
        raise _LocatedError(_message(error, place)) from error


def _message(error: Exception, place: str) -> str:
    if isinstance(error, SyntaxError):
        literal = re.search(r"Failed to parse token '(.*)'", error.msg, re.DOTALL)
        reason = error.msg.splitlines()[0].rstrip(".")
        if literal:
            reason = f"{literal[1]!r} is not a Python literal (strings need quotes)"
        line_text = (error.text or "").strip()
        return f"{error.filename or place}:{error.lineno}: syntax error: {reason}, in: {line_text}"
    reason = str(error).partition("\n")[0].strip('"')  # A KeyError's text is quoted.
    near = _near(reason, place)
    located = re.search(r'\n  In file ".*", line (\d+)\n +(.*)', str(error))
    if located and re.match(r"(?:from \S+ )?import ", located[2]) and not near:
        reason = f"{located[2]} failed with {type(error).__name__}: {reason}"
    return f"{place}{f':{located[1]}' if located else ''}: {reason.rstrip('.')}.{near}"


def _near(message: str, place: str) -> str:
    """The nearest names to the one that gin, by its message, could not resolve."""
    if match := re.match(r"No module named '(?:([\w.]+)\.)?(\w+)'", message):
        if (match[1] or match[2]).partition(".")[0] in _TRAIN_MODULES:
            return " It comes with: pip install 'variator_jax[train]'."
        folders = getattr(sys.modules.get(match[1]), "__path__", None)
        return did_you_mean(match[2], [module.name for module in pkgutil.iter_modules(folders)])
    if match := re.search(r"<module '(.+?)'.*no attribute (\w+)", message):
        return did_you_mean(match[2], dir(sys.modules[match[1]]))
    unresolved = r"(?:^| named |No configurable matching (?:reference )?)'@?(?:\w+\.)*(\w+)'"
    if not (match := re.search(unresolved, message)):
        return ""
    text = Path(place).read_text(encoding="utf-8") if os.path.isfile(place) else ""
    known = set(re.findall(r"^(?:from .*)?import .*\b(\w+)$", text, re.MULTILINE))
    for selector, configurable in gin_config._REGISTRY.items():
        known |= {*selector.split("."), *_parameters(configurable.wrapped)}
    return did_you_mean(match[1], known)
