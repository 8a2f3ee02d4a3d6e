"""The interface of a site, and what all kinds of sites share: layers, adapters, checks."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import linen as nn

from variator_jax.backbones.base import Stack
from variator_jax.errors import PluginError
from variator_jax.plugin.groups import Groups

Arrays = Mapping[str, Any]


class ArraySpec(NamedTuple):
    """One trained array, float32: what initialisation, files, T5X's tree and counts need."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]  # logical axes
    init: Callable[..., jax.Array]  # (key, shape, dtype) -> array


class Call(NamedTuple):
    """One call of a module that a site surrounds."""

    path: str  # of the module
    run: Callable[..., Any]  # the module's own call
    args: tuple
    kwargs: dict


class Around(NamedTuple):
    """Where the arrays of one key work: what calibration and the residual-stream loss need."""

    first: str  # path of the first module inside
    last: str  # path of the last one
    layer: int  # the layer after which the residual stream has all that the site adds


class Merge(NamedTuple):
    """FFNs that run on merged vectors."""

    source: str  # path of the module whose result is merged
    neurons: tuple[str, ...]  # paths of the modules whose results go into the FFNs' last matrix


class Site(Protocol):
    """A kind of site with its settings, a frozen dataclass; one file each.

    A site may surround several modules (an FFN in each layer). Arrays belong to a key, which is a
    module path; each key also has an output scale.
    """

    kind: ClassVar[str]

    @property
    def ratio(self) -> int:
        """How many neighbouring vectors become one."""

    @property
    def rank(self) -> int:
        """Rank of its adapters; 0 for none."""

    def selected(self, stack: Stack) -> tuple[int, ...]:
        """The layers of a stack that have this site; raises PluginError for one beyond it."""

    def arrays(self, stack: Stack) -> dict[str, dict[str, ArraySpec]]:
        """Key -> name, with '/' between its parts -> array."""

    def points(self, stack: Stack) -> dict[str, str]:
        """Module path whose calls are surrounded -> key of its arrays."""

    def call(
        self,
        stack: Stack,
        call: Call,
        arrays: Arrays,
        groups: Groups,
        key_bias: jax.Array | None,
    ) -> Any:
        """Surrounds one call.

        Args:
          stack: where the module is.
          call: of a module at one of the site's points.
          arrays: a tree of those of its key, with `output_scale`.
          groups: the merge groups of the stack's input.
          key_bias: `[batch, heads, length, groups]`, the position bias of merged keys.
        """

    def around(self, stack: Stack) -> dict[str, Around]:
        """Key -> the modules inside."""

    def merges(self, stack: Stack) -> dict[str, Merge]:
        """Key -> which FFNs run on merged vectors, and what they are merged from."""

    def weights(self, arrays: Arrays, x: jax.Array, groups: Groups) -> jax.Array:
        """The merge weights `[batch, groups, k]` of what is merged, `[batch, length, embed]`."""

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


def selected_layers(layers: Sequence[int] | None, stack: Stack) -> tuple[int, ...]:
    """The layers that a site names, all for None.

    Raises:
      PluginError: for one that the stack does not have.
    """
    beyond = [layer for layer in layers or () if not 0 <= layer < stack.layers]
    if beyond:
        raise PluginError(
            f"The plugin names encoder layers {beyond}; the backbone has layers 0 to "
            f"{stack.layers - 1}."
        )
    return tuple(range(stack.layers) if layers is None else layers)


def adapter_specs(matrices: Mapping[str, tuple[int, int]], rank: int) -> dict[str, ArraySpec]:
    """Low-rank deltas A B of frozen matrices, by module path; B starts at 0.

    Raises:
      PluginError: if there are none, for a host whose matrices are not known.
    """
    if rank and not matrices:
        raise PluginError("This backbone's matrices are not known: its sites have no adapters.")
    specs = {}
    for path, (rows, columns) in matrices.items() if rank else ():
        start = nn.initializers.normal(stddev=rows**-0.5)
        specs[f"adapters/{path}/a"] = ArraySpec((rows, rank), ("embed", "plugin_rank"), start)
        zeros = nn.initializers.zeros
        specs[f"adapters/{path}/b"] = ArraySpec((rank, columns), ("plugin_rank", "embed"), zeros)
    return specs


def adapter_flops(matrices: Mapping[str, tuple[int, int]], rank: int) -> int:
    """FLOPs of the deltas for one row of each matrix's input."""
    return sum(2 * rank * (rows + columns) for rows, columns in matrices.values())


def run_adapted(call: Call, arrays: Arrays) -> jax.Array:
    """The frozen product plus its low-rank delta, for modules that multiply by one matrix.

    A Dense contracts its input's last axis, a DenseGeneral may contract several trailing ones.
    """
    pair = arrays["adapters"]
    for part in call.path.split("/"):
        pair = pair[part]
    y = call.run(*call.args, **call.kwargs)
    x = call.args[0].astype(y.dtype)
    a, b = pair["a"].astype(y.dtype), pair["b"].astype(y.dtype)
    # [batch, rows, in] @ [in, rank] @ [rank, out]
    delta = jnp.dot(jnp.dot(x.reshape(*x.shape[:2], a.shape[0]), a), b)
    return y + delta.reshape(y.shape)


def replace_arguments(
    names: Mapping[str, str],
    args: tuple,
    kwargs: dict,
    changes: Mapping[str, Callable[[Any], Any]],
) -> tuple[tuple, dict]:
    """The arguments of a call with those of some kinds replaced.

    Args:
      names: parameter -> kind, in the order of the signature, see `Stack.arguments`.
      args: of the call.
      kwargs: of the call.
      changes: kind -> what makes the new value of the old one; None stays None.
    """

    values = {**dict(zip(names, args, strict=False)), **kwargs}
    for name, kind in names.items():
        if kind in changes and values.get(name) is not None:
            values[name] = changes[kind](values[name])
    positional = [values[name] for name in list(names)[: len(args)]]
    return (*positional, *args[len(names) :]), {name: values[name] for name in kwargs}


def check_positive(name: str, value: object, least: int = 1) -> None:
    """Refuses anything but a whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        wanted = "a positive integer" if least else "0 or a positive integer"
        raise PluginError(f"The {name} is {wanted}; found {value!r}.")


def check_choice(field: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuses a value that is not among the choices."""
    if value not in choices:
        raise PluginError(f"The plugin's {field} is {value!r}; it is one of {choices}.")


def sorted_layers(layers: Any) -> tuple[int, ...] | None:
    """Layers as a rising tuple; None for all stays None."""
    if layers is None:
        return None
    if isinstance(layers, int | str) or not all(type(layer) is int for layer in layers):
        raise PluginError(
            f"The plugin's layers are a tuple of numbers, such as (2,); found {layers!r}."
        )
    return tuple(sorted(set(layers)))
