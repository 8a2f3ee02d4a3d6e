"""Checks of what gin has parsed: macros that nobody defines, parameters that nobody sets."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import gin
from gin import config as gin_config  # Its tables have no public readers; see setup.py's pin.

from variator_jax.errors import ConfigError, did_you_mean
from variator_jax.gin_scan import Scan

MACRO = "gin.macro"  # gin keeps a macro as a configurable of this name, scoped by the macro's name


def check_macros(scan: Scan) -> None:
    """Every macro that is read must be defined."""
    config = gin_config._CONFIG
    defined = sorted(scope for scope, selector in config if selector == MACRO)
    for reference in gin_config.iterate_references(config):
        name = "/".join(reference.scopes)
        if reference.configurable.selector == MACRO and name not in defined:
            raise ConfigError(
                f"{scan.read.get(name, 'command line')}: macro %{name} is defined nowhere; "
                f"set it in a gin file or with --gin.{name}=VALUE." + did_you_mean(name, defined)
            )


def check_required() -> None:
    """Nothing may still be `%gin.REQUIRED`."""
    if missing := unset_required():
        raise ConfigError(f"required, but not set: {', '.join(missing)}.{how(missing)}")


def unset_required() -> list[str]:
    """The names that are still `%gin.REQUIRED`, as an override would name them."""
    missing = []
    for (scope, selector), parameters in gin_config._CONFIG.items():
        for parameter, value in parameters.items():
            references = gin_config.iterate_references([value])
            if any(r.scoped_selector == "gin.REQUIRED/gin.constant" for r in references):
                missing.append(scope if selector == MACRO else _bound(scope, selector, parameter))
    return sorted(missing)


def missing_parameters(
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
            yield from missing_parameters(reference.configurable, inner, seen)


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


def how(names: Iterable[str]) -> str:
    """How to set these from the command line."""
    return " Give " + " ".join(f"--gin.{name}=VALUE" for name in names) + ", or set it in a file."


def mentioned(selector: str) -> bool:
    """Whether the parsed configuration binds or references this configurable."""
    config = gin_config._CONFIG
    references = gin_config.iterate_references(config)
    return any(key[1] == selector for key in config) or any(
        reference.configurable.selector == selector for reference in references
    )
