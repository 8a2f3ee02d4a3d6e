"""What a frozen backbone offers to plugins, training and serving: interfaces, no code of a family.

A new family of backbones is one folder next to this file whose classes have these methods.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from variator_jax.errors import PluginError

Batch = Mapping[str, jax.Array]
INTERMEDIATES = "intermediates"  # Flax's collection of captured results


class Outputs(NamedTuple):
    """What one pass returns. Hidden states are taken after the final norm."""

    # By stack, 'encoder' and 'decoder', and by captured module path: [batch, length, embed].
    hidden: dict[str, jax.Array]
    logits: jax.Array | None  # [batch, target length, vocab], float32; None without a decoder


def captures(paths: Collection[str]) -> Callable[[nn.Module, str], bool]:
    """What Flax's `capture_intermediates` asks for: whether to keep a call's result."""
    return lambda module, method: method == "__call__" and "/".join(module.path) in paths


def captured(variables: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Module path -> its captured result, from the variables that `apply` returned."""
    flat = traverse_util.flatten_dict(dict(variables.get(INTERMEDIATES, {})))
    return {"/".join(path[:-1]): values[-1] for path, values in flat.items()}


class Mask(NamedTuple):
    """Which positions of a stack's input are tokens, and which belong together."""

    valid: jax.Array  # [batch, length] bool, False on padding
    segments: jax.Array | None = None  # [batch, length] int, the examples of a packed row


class Stack(Protocol):
    """One stack of layers of a backbone, as a site sees it."""

    @property
    def layers(self) -> int:
        """How many layers it has."""

    @property
    def width(self) -> int:
        """Width of the residual stream."""

    @property
    def causal(self) -> bool:
        """Whether positions must not see later ones."""

    def path(self, role: str, layer: int) -> str:
        """The module path of a part of a layer.

        Roles: 'layer', 'ffn', 'attention', 'bias', and, of what the modules return, 'input', the
        residual stream before the layer, 'ffn_input' and 'neurons', the input of the FFN's last
        matrix.
        'bias' is the module called with (query length, key length) for a position bias
        `[1, heads, query, key]`, by the stack or by each layer; '' where there is none.
        """

    def matrices(self, role: str, layer: int) -> dict[str, tuple[int, int]]:
        """Module path -> (in, out) of a part's frozen matrices; empty where they are not known.

        Roles: 'ffn', 'attention', and 'keys', those of the attention that multiply keys and values.
        """

    def arguments(self, role: str) -> dict[str, str]:
        """Parameter -> kind, in the order of the signature of a 'layer' or an 'attention'.

        Kinds: 'stream', 'queries' and 'keys', 'mask' `[batch, heads or 1, query, key]`, 'bias' of
        the same shape, 'valid' `[batch, length]`; others stay as they are.

        Raises:
          PluginError: for a network whose layers are not known.
        """

    def stream(self, role: str, args: tuple, kwargs: dict) -> jax.Array:
        """The residual stream among a call's arguments, `[batch, length, embed]`."""

    def with_stream(
        self, role: str, args: tuple, kwargs: dict, stream: jax.Array
    ) -> tuple[tuple, dict]:
        """The same arguments with another residual stream."""

    def flops(self, layer: int, queries: int, keys: int, ffn_rows: int) -> int:
        """FLOPs of a layer for one row of so many queries, keys and rows of its FFN."""


class Backbone(Protocol):
    """A family's network with one configuration; parameters are arguments."""

    @property
    def config(self) -> Any:
        """Its shape."""

    def apply(
        self,
        params: dict,
        batch: Batch,
        dropout_rng: jax.Array | None = None,
        capture: Collection[str] = (),
    ) -> Outputs:
        """One pass over a batch in T5X's names; with dropout where an rng is given.

        Results of the modules at the paths in `capture` are among the hidden states.
        """

    def encode(
        self, params: dict, tokens: jax.Array, segment_ids: jax.Array | None = None
    ) -> jax.Array:
        """Encodes `[batch, length]` int tokens: `[batch, length, embed]`."""

    def generate(
        self,
        params: dict,
        encoded: jax.Array,
        tokens: jax.Array,
        max_length: int,
        num_beams: int = 1,
    ) -> jax.Array:
        """Generates from the encoder's output: `[batch, max_length]` int32."""

    def masks(self, batch: Batch) -> dict[str, Mask]:
        """The mask of each stack."""

    def stack(self, name: str = "encoder") -> Stack:
        """A stack by its name."""


@dataclasses.dataclass(frozen=True)
class FfnStack:
    """A stack of which only the feed-forward modules are known: an encoder of any Linen network.

    Attributes:
      layers: how many layers it has.
      width: of its hidden vectors.
      causal: whether positions must not see later ones.
      prefix: path of the stack; a family's own stack inherits T5X's names for its parts.
      known: module path and (in, out) of each matrix that can have an adapter.
    """

    layers: int
    width: int
    causal: bool = False
    prefix: str = "encoder"
    known: tuple[tuple[str, tuple[int, int]], ...] = ()

    def path(self, role: str, layer: int) -> str:
        """The path of a part, as T5 and T5X name it."""
        if role == "bias":
            return ""
        return f"{self.prefix}/layers_{layer}/{_PARTS[role]}".rstrip("/")

    def matrices(self, role: str, layer: int) -> dict[str, tuple[int, int]]:
        """Those that are known."""
        within = f"{self.path(role, layer)}/"
        return {path: shape for path, shape in self.known if path.startswith(within)}

    def arguments(self, role: str) -> dict[str, str]:
        """Not known for a network of one's own."""
        raise PluginError("Only FFN sites fit a network whose layers are not known.")

    def stream(self, role: str, args: tuple, kwargs: dict) -> jax.Array:
        """The first argument that is an array `[batch, length, embed]` of floats."""
        values = [*args, *kwargs.values()]
        return values[_stream_index(values)]

    def with_stream(
        self, role: str, args: tuple, kwargs: dict, stream: jax.Array
    ) -> tuple[tuple, dict]:
        """The same arguments with another residual stream."""
        values = [*args, *kwargs.values()]
        values[_stream_index(values)] = stream
        keywords = dict(zip(kwargs, values[len(args) :], strict=True))
        return tuple(values[: len(args)]), keywords

    def flops(self, layer: int, queries: int, keys: int, ffn_rows: int) -> int:
        """Not known for a network of one's own."""
        raise NotImplementedError("The FLOPs of this network are not known.")


_PARTS = {"layer": "", "ffn": "mlp", "attention": "attention"}


def _stream_index(values: Sequence[Any]) -> int:
    for i, value in enumerate(values):
        if getattr(value, "ndim", 0) == 3 and jnp.issubdtype(value.dtype, jnp.floating):
            return i
    raise TypeError(
        "The module was called without floats [batch, length, embed]; found arguments of "
        f"types {[type(value).__name__ for value in values]}."
    )
