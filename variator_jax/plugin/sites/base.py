"""The base of all kinds of sites: the interface, and their layers, adapters, FLOPs and checks."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from variator_jax.backbones.base import Stack
from variator_jax.errors import PluginError, check_whole
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
    stack: Stack  # where the module is
    arrays: Arrays  # a tree of those of its key, with `output_scale`
    groups: Groups  # of the stack's input
    key_bias: jax.Array | None  # [batch, heads, length, groups], the position bias of merged keys


class Around(NamedTuple):
    """Where the arrays of one key work: what calibration and the residual-stream loss need."""

    first: str  # path of the first module inside
    last: str  # path of the last one
    layer: int  # the layer after which the residual stream has all that the site adds


class Merge(NamedTuple):
    """FFNs that run on merged vectors."""

    source: str  # path of the module whose result is merged
    neurons: tuple[str, ...]  # paths of the modules whose results go into the FFNs' last matrix


class Site:
    """A kind of site with its settings: the base of a frozen dataclass, one file each.

    A site may surround several modules (an FFN in each layer). Arrays belong to a key, the path of
    the first module that they serve; each key also has an output scale.
    """

    kind: ClassVar[str]
    role: ClassVar[str]  # the part of a layer whose calls are surrounded, see `Stack.path`
    adapted: ClassVar[tuple[str, ...]]  # the parts whose matrices can have adapters

    ratio: int  # how many neighbouring vectors become one
    layers: Sequence[int] | None  # None for all
    rank: int  # of the adapters, 0 for none

    def __post_init__(self) -> None:
        check_whole("The compression ratio", self.ratio, error=PluginError)
        check_whole("The rank of the adapters", self.rank, 0, PluginError)
        object.__setattr__(self, "layers", sorted_layers(self.layers))

    def specs(self, width: int) -> dict[str, ArraySpec]:
        """The arrays of one key but for adapters: name, with '/' between its parts -> array."""
        raise NotImplementedError

    def run(self, call: Call) -> Any:
        """Surrounds one call of a module of the site's role."""
        raise NotImplementedError

    def rows(self, length: int, groups: int) -> tuple[int, int, int]:
        """How many queries, keys and FFN rows a layer has with the site."""
        raise NotImplementedError

    def group_flops(self, width: int) -> int:
        """FLOPs of merging and expanding one group."""
        raise NotImplementedError

    def weights(self, arrays: Arrays, x: jax.Array, groups: Groups) -> jax.Array:
        """The merge weights `[batch, groups, k]` of what is merged, `[batch, length, embed]`."""
        raise NotImplementedError

    def merges(self, stack: Stack) -> dict[str, Merge]:
        """Key -> which FFNs run on merged vectors, and what they are merged from."""
        return {}

    def change(self, before: jax.Array, after: jax.Array) -> jax.Array:
        """What the modules inside add to the residual stream.

        Args:
          before: `[batch, length, embed]`, the input of the first.
          after: `[batch, length, embed]`, the output of the last.
        """
        return after

    def module(self, stack: Stack, layer: int) -> str:
        """The path of the module that is surrounded in a layer."""
        return stack.path(self.role, layer)

    def selected(self, stack: Stack) -> tuple[int, ...]:
        """The layers of a stack that have this site.

        Raises:
          PluginError: for one that the stack does not have.
        """
        beyond = [layer for layer in self.layers or () if not 0 <= layer < stack.layers]
        if beyond:
            raise PluginError(
                f"The plugin names encoder layers {beyond}; the backbone has layers 0 to "
                f"{stack.layers - 1}."
            )
        return tuple(range(stack.layers) if self.layers is None else self.layers)

    def keys(self, stack: Stack) -> dict[str, tuple[int, ...]]:
        """Key -> the layers whose modules its arrays serve."""
        return {self.module(stack, layer): (layer,) for layer in self.selected(stack)}

    def arrays(self, stack: Stack) -> dict[str, dict[str, ArraySpec]]:
        """Key -> name -> array."""
        specs = self.specs(stack.width)
        return {
            key: specs | adapter_specs(self.matrices(stack, layers), self.rank)
            for key, layers in self.keys(stack).items()
        }

    def points(self, stack: Stack) -> dict[str, str]:
        """Path of each module whose calls are surrounded, adapted matrices too -> its key."""
        points: dict[str, str] = {}
        for key, layers in self.keys(stack).items():
            points |= {self.module(stack, layer): key for layer in layers}
            points |= dict.fromkeys(self.matrices(stack, layers), key) if self.rank else {}
        return points

    def call(self, call: Call) -> Any:
        """Surrounds one call of a module at one of the site's points."""
        if call.path in {self.module(call.stack, layer) for layer in self.selected(call.stack)}:
            return self.run(call)
        return run_adapted(call)

    def around(self, stack: Stack) -> dict[str, Around]:
        """Key -> the modules inside."""
        return {
            key: Around(self.module(stack, layers[0]), self.module(stack, layers[-1]), layers[-1])
            for key, layers in self.keys(stack).items()
        }

    def flops(self, stack: Stack, length: int) -> int:
        """FLOPs of a row of `length` tokens with the site, less those without: negative if saved.

        Changes of a plugin's sites add up.
        """
        groups, total = -(-length // self.ratio), 0
        for layers in self.keys(stack).values():
            total += groups * self.group_flops(stack.width)
            for path, (rows, columns) in self.matrices(stack, layers).items():
                inputs = length if self.whole(stack, path, layers) else groups
                total += inputs * 2 * self.rank * (rows + columns)
            for layer in layers:
                total += stack.flops(layer, *self.rows(length, groups))
                total -= stack.flops(layer, length, length, length)
        return total

    def matrices(self, stack: Stack, layers: Sequence[int]) -> dict[str, tuple[int, int]]:
        """The matrices inside that can have adapters: module path -> (in, out)."""
        pairs = (stack.matrices(role, layer) for layer in layers for role in self.adapted)
        return {path: shape for matrices in pairs for path, shape in matrices.items()}

    def whole(self, stack: Stack, path: str, layers: Sequence[int]) -> bool:
        """Whether a matrix inside multiplies every token and not only one vector a group."""
        return False


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


def run_adapted(call: Call) -> jax.Array:
    """The frozen product plus its low-rank delta, for modules that multiply by one matrix.

    A Dense contracts its input's last axis, a DenseGeneral may contract several trailing ones.
    """
    pair = call.arrays["adapters"]
    for part in call.path.split("/"):
        pair = pair[part]
    y = call.run(*call.args, **call.kwargs)
    x = call.args[0].astype(y.dtype)
    a, b = pair["a"].astype(y.dtype), pair["b"].astype(y.dtype)
    # [batch, rows, in] @ [in, rank] @ [rank, out]
    delta = jnp.dot(jnp.dot(x.reshape(*x.shape[:2], a.shape[0]), a), b)
    return y + delta.reshape(y.shape)


def replace_arguments(
    call: Call, role: str, changes: Mapping[str, Callable[[Any], Any]]
) -> tuple[tuple, dict]:
    """The arguments of a call with those of some kinds replaced.

    Args:
      call: of a module of `role`.
      role: whose parameters `Stack.arguments` names.
      changes: kind -> what makes the new value of the old one; None stays None.
    """
    # Parameter -> kind, in the order of the signature.
    names, args, kwargs = call.stack.arguments(role), call.args, call.kwargs
    values = {**dict(zip(names, args, strict=False)), **kwargs}
    for name, kind in names.items():
        if kind in changes and values.get(name) is not None:
            values[name] = changes[kind](values[name])
    positional = [values[name] for name in list(names)[: len(args)]]
    return (*positional, *args[len(names) :]), {name: values[name] for name in kwargs}


def sorted_layers(layers: Any) -> tuple[int, ...] | None:
    """Layers as a rising tuple; None for all stays None."""
    if layers is None:
        return None
    if isinstance(layers, int | str) or not all(type(layer) is int for layer in layers):
        raise PluginError(
            f"The plugin's layers are a tuple of numbers, such as (2,); found {layers!r}."
        )
    if not len(layers):
        raise PluginError("A site surrounds at least one layer; found none. None is for all.")
    return tuple(sorted(set(layers)))
