"""The interface of a site: the part of a frozen network that a plugin surrounds."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax

from variator_jax.backbones.base import Stack
from variator_jax.plugin.groups import Groups

Arrays = Mapping[str, Any]


class ArraySpec(NamedTuple):
    """One trained array, float32: what initialisation, files, T5X's tree and counts need."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]  # logical axes
    init: Callable[..., jax.Array]  # (key, shape, dtype) -> array


class Site(Protocol):
    """A kind of site with its settings, a frozen dataclass; one file each.

    A site may surround several modules (an FFN in each layer). Arrays belong to a key, which is a
    module path; each key also has an output scale.
    """

    @property
    def ratio(self) -> int:
        """How many neighbouring vectors become one."""

    def arrays(self, stack: Stack) -> dict[str, dict[str, ArraySpec]]:
        """Key -> name, with '/' between its parts -> array."""

    def points(self, stack: Stack) -> dict[str, str]:
        """Module path whose calls are surrounded -> key of its arrays."""

    def call(
        self,
        stack: Stack,
        path: str,
        call: Callable[..., Any],
        args: tuple,
        kwargs: dict,
        arrays: Arrays,
        groups: Groups,
    ) -> Any:
        """Surrounds one call of the module at `path`; `arrays` is a tree of those of its key."""

    def around(self, stack: Stack) -> dict[str, tuple[str, str]]:
        """Key -> paths of the first and the last module inside, where its scale is measured."""

    def change(self, before: jax.Array, after: jax.Array) -> jax.Array:
        """What the modules inside add to the residual stream.

        Args:
          before: `[batch, length, embed]`, the input of the first.
          after: `[batch, length, embed]`, the output of the last.
        """

    def flops(self, stack: Stack, length: int) -> int:
        """FLOPs of a row of `length` tokens with the site, less those without: negative if saved.

        Changes of a plugin's sites add up.
        """
