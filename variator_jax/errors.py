"""The errors of this library, and the nearest right name for their messages.

Everything that a user can get wrong ends in a `VariatorError`, whose message names what was found
and what was expected. The command line prints that message as one line; any other error is a bug.
"""

import difflib
import math
import numbers
from collections.abc import Iterable


class VariatorError(Exception):
    """An error that the user can mend."""


class ConfigError(VariatorError):
    """A setting, a gin file or a command-line argument that cannot be used."""


class DataError(VariatorError):
    """A task, a data file or a row that cannot be used."""


class CheckpointError(VariatorError):
    """A backbone, a plugin or a training checkpoint that cannot be read or does not fit."""


class PluginError(VariatorError):
    """A compression plugin that cannot be spliced where it was asked to go."""


class TrainingError(VariatorError):
    """A run that cannot continue, such as one whose loss is no longer finite."""


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Returns " Did you mean 'x' or 'y'?" for the choices nearest to `name`, '' if none is."""
    near = difflib.get_close_matches(name, list(choices), n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""


def check_known(
    what: str, name: object, known: Iterable[object], error: type[VariatorError] = ConfigError
) -> None:
    """Refuses a name that is not known, with the nearest and all known ones.

    Args:
      what: the message up to the name, such as 'No optimizer is named'.
      name: what the user wrote.
      known: the names that there are.
      error: the kind of error.

    Raises:
      VariatorError: of that kind, for any other name.
    """
    known = list(known)
    if name not in known:
        names = [str(choice) for choice in known]
        near = did_you_mean(str(name), names)
        raise error(f"{what} {name!r}.{near} Known: {', '.join(names)}.")


def check_number(what: str, value: object, below: float = math.inf) -> None:
    """Refuses anything but a number of at least 0 and below `below`.

    Raises:
      ConfigError: with what was found.
    """
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real or not 0 <= float(value) < below:  # type: ignore[arg-type]
        end = "" if math.isinf(below) else f" and below {below:g}"
        raise ConfigError(f"{what} is {value!r}; expected a number of at least 0{end}.")


def check_whole(
    what: str, value: object, least: int = 1, error: type[VariatorError] = ConfigError
) -> None:
    """Refuses anything but a whole number of at least `least`.

    Raises:
      VariatorError: of the kind `error`, with what was found.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise error(f"{what} is {value!r}; expected a whole number of at least {least}.")
