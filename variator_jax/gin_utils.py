"""Gin files: finding them, parsing them, and saying in one line what is wrong with them.

Gin does the configuring; this module adds what its users miss. Packaged configurations are found
from any folder, and a slip in a file, a name or an override is told in one line with the nearest
right names, before anything is built. Each file is first *scanned* (`gin_scan`), so that syntax,
includes and macro names are judged early; then gin parses it for good, its errors told by
`gin_messages`, and `gin_checks` looks for what is left out. What a configuration means is not known
here: only gin is imported.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import tokenize
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import gin
from gin import config as gin_config  # Its tables have no public readers; see setup.py's pin.
from gin import config_parser

from variator_jax.errors import ConfigError, did_you_mean
from variator_jax.gin_checks import (
    MACRO,
    check_macros,
    check_required,
    how,
    mentioned,
    missing_parameters,
    unset_required,
)
from variator_jax.gin_messages import told
from variator_jax.gin_scan import Reader, Scan

__all__ = [
    "as_override",
    "configs_dir",
    "configured",
    "find_config",
    "leave_unset",
    "macro",
    "parse",
    "resolved_config",
]

T = TypeVar("T")

# What a shell leaves of an unquoted string: a path, a task name, a bucket, a template.
_BARE_WORD = re.compile(r"[A-Za-z_.~/$][^'\"\n]*|[\w:+=.$~/-]+")


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
    gin_files: Sequence[str],
    bindings: Sequence[str] = (),
    search_paths: Sequence[str] = (),
    require: bool = True,
) -> list[tuple[str, str]]:
    """Clears gin, parses files and then bindings, and checks the result.

    Gin is left unlocked: the built-in engine imports lazily, and a locked gin refuses modules that
    register configurables.

    Args:
      gin_files: names as `find_config` takes them; a later file overrides an earlier one.
      bindings: overrides `NAME=VALUE`, where the value is a Python literal or a gin reference. A
        bare word (`runs/x`) stands for a string, unless the files give the name another type.
      search_paths: folders for gin files and for the files that they include.
      require: whether required macros must be set; `leave_unset` tells which are not.

    Returns:
      The overrides as names and gin literals, for handing them on.

    Raises:
      ConfigError: for a missing file, a syntax error, an unknown module, name, parameter or macro,
        and for every required macro that nothing sets.
    """
    gin.clear_config()
    paths = [find_config(name, search_paths) for name in gin_files]
    scan = Scan(functools.partial(find_config, search_paths=search_paths))
    for path in paths:
        scan.file(path)
    given = named_overrides(bindings, scan)
    overrides = []
    with _search_path(search_paths):
        for path in paths:
            told(functools.partial(gin.parse_config_file, str(path)), scan)
    for name, value in given:
        overrides.append((name, _literal(name, value)))
        statement = " = ".join(overrides[-1])
        told(functools.partial(gin.parse_config, statement), scan, f"--gin.{name}={value}")
    check_macros(scan)
    if require:
        check_required()
    return overrides


def macro(name: str) -> Any:
    """The value of a macro, with the macros that it reads put in; references stay references.

    Raises:
      ConfigError: if the parsed configuration does not define it.
    """
    key = (name, MACRO)
    if key not in gin_config._CONFIG:
        known = [scope for scope, selector in gin_config._CONFIG if selector == MACRO]
        raise ConfigError(f"no macro {name!r} is defined." + did_you_mean(name, known))
    return _without_macros(gin_config._CONFIG[key]["value"])


def leave_unset() -> list[str]:
    """Sets what is required and not set to None, for a look at the rest; returns the names."""
    missing = unset_required()
    for name in missing:
        gin.parse_config(f"{name} = None")
    return missing


def resolved_config() -> str:
    """The whole parsed configuration as one gin file, used or not."""
    return gin.config_str()


def configured(function: Callable[..., T]) -> Callable[..., T]:
    """The gin-configured version of `function`, all that it needs being there.

    Whatever gin would call on the way (each `@name()` reached from `function`) is checked too.

    Raises:
      ConfigError: if the parsed files do not mention the function, or leave out a parameter
        without default of it or of something that it is given.
    """
    found = gin_config._inverse_lookup(function, allow_decorators=True)
    if found is None or not mentioned(found.selector):
        where = f"{function.__module__}.{function.__qualname__}"
        raise ConfigError(f"the given gin files configure no {where}: add one that does.")
    missing = sorted(missing_parameters(found, (), set()))
    if missing:
        raise ConfigError(f"not set, and without a default: {', '.join(missing)}.{how(missing)}")
    return gin.get_configurable(function)


def _folders(search_paths: Sequence[str]) -> list[Path]:
    """Where gin files are looked for, in this order."""
    folders = [Path(path).expanduser().absolute() for path in search_paths]
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"the gin search path {folder} is not a folder.")
    return [Path.cwd(), *folders, configs_dir()]


# Overrides from the command line.


def named_overrides(bindings: Iterable[str], scan: Scan) -> list[tuple[str, str]]:
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
        if len(list(config_parser.ConfigParser(f"{name} = {value}", Reader()))) == 1:
            return value
    except (SyntaxError, tokenize.TokenError):
        pass  # Not a literal, so perhaps a word: told apart below.
    current = _current(name)
    if current is not None and not isinstance(
        current, str | tuple | gin_config.ConfigurableReference
    ):
        raise ConfigError(f"--gin.{name}={value}: expected a value such as {current!r}.")
    if value.lower() in ("true", "false", "none", "null"):
        raise ConfigError(f"--gin.{name}={value}: Python writes True, False and None.")
    if not _BARE_WORD.fullmatch(value):
        raise ConfigError(
            f"--gin.{name}={value}: not a Python literal; quote a string twice: "
            f"""--gin.{name}="'...'"."""
        )
    return repr(value)


def as_override(name: str, value: object) -> str:
    """`--gin.NAME=VALUE` as it is typed: a plain path bare, to spare quotes; else a literal.

    The inverse of what `parse` does with an override's value.
    """
    bare = isinstance(value, str) and re.fullmatch(r"[A-Za-z_.~/][\w.~/-]*", value)
    plain = bare and value not in ("None", "True", "False")
    return f"--gin.{name}={value if plain else repr(value)}"


def _current(name: str) -> Any:
    """What the files bind `name` to; None if nothing, or if the name is unknown."""
    try:
        return gin.query_parameter(name if "." in name else f"{name}/{MACRO}.value")
    except (ValueError, KeyError, NameError):
        return None


# Gin's own parsing.


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


def _without_macros(value: Any) -> Any:
    """`value` with each `%NAME` replaced by what it stands for, at any depth."""
    if isinstance(value, gin_config.ConfigurableReference):
        is_macro = value.configurable.selector == MACRO
        return macro("/".join(value.scopes)) if is_macro else value
    if isinstance(value, dict):
        return {_without_macros(k): _without_macros(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_without_macros, value))
    return value
