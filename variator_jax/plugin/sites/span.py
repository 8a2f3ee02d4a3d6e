"""The span site: whole layers run on merged vectors and give back what they added.

With h the residual stream, k the ratio, a the output scale and s the merge weights, which are
scored from xn = h / rms(h):

    merge       m_g = sum_j s_gj h_(gk+j);  m0 = m
    layers      m <- layer(m), frozen: positions of the groups' first members, masks pooled over
                members, and the logarithm of a group's size on its scores as a key
    expand      d = m - m0
                h <- h + repeat(d) + a (tanh(repeat(d)/a W_r + xn W_x + b1) W_2 + b2)

Every token keeps its own residual stream. Between the layers of a span `Opened` travels in place of
the stream: unlike a variable of Python, it may cross the boundary of a rematerialised layer.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from variator_jax.backbones.base import Stack
from variator_jax.errors import PluginError, check_whole
from variator_jax.plugin import compression
from variator_jax.plugin.groups import Groups, from_groups, pool_mask, stride_bias
from variator_jax.plugin.sites import base
from variator_jax.plugin.sites.base import Arrays, ArraySpec, Call, Merge

_EPSILON = 1e-6


class Opened(NamedTuple):
    """What travels between the layers of a span."""

    merged: jax.Array  # [batch, groups, embed], the residual stream of the groups
    start: jax.Array  # [batch, groups, embed], the same before the first layer
    stream: jax.Array  # [batch, length, embed], the residual stream of the tokens


@dataclasses.dataclass(frozen=True)
class Span(base.Site):
    """Spans of layers that run on merged vectors.

    Attributes:
      ratio: how many neighbouring hidden vectors become one.
      layers: the layers, None for all.
      size: layers in each span; 0 for one span of all these layers.
      bottleneck: width of the hidden decompression.
      rank: of the adapters on the layers' matrices; 0 for none.
    """

    kind: ClassVar[str] = "span"
    role: ClassVar[str] = "layer"
    adapted: ClassVar[tuple[str, ...]] = ("attention", "ffn")

    ratio: int
    layers: Sequence[int] | None = None
    size: int = 0
    bottleneck: int = 64
    rank: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("The bottleneck", self.bottleneck, error=PluginError)
        check_whole("The size of a span", self.size, 0, PluginError)
        layers = self.layers
        if layers and tuple(layers) != tuple(range(layers[0], layers[-1] + 1)):
            raise PluginError(
                f"A span's layers follow one another, such as (3, 4, 5); found {layers}."
            )

    def keys(self, stack: Stack) -> dict[str, tuple[int, ...]]:
        """Key -> the layers of that span."""
        layers = self.selected(stack)
        size = self.size or len(layers)
        cut = [layers[i : i + size] for i in range(0, len(layers), size)]
        return {self.module(stack, span[0]): span for span in cut}

    def specs(self, width: int) -> dict[str, ArraySpec]:
        """Compression and decompression of a span."""
        merging = compression.merge_specs(self.ratio, width)
        return merging | compression.expand_specs(width, self.bottleneck)

    def rows(self, length: int, groups: int) -> tuple[int, int, int]:
        """One row a group in every part of a layer."""
        return groups, groups, groups

    def group_flops(self, width: int) -> int:
        """Merging and expanding."""
        merging = compression.merge_flops(self.ratio, width)
        return merging + compression.expand_flops(self.ratio, width, self.bottleneck)

    def merges(self, stack: Stack) -> dict[str, Merge]:
        """The FFNs of all layers of a span; what is merged is the stream before the first."""
        return {
            key: Merge(
                stack.path("input", layers[0]), tuple(stack.path("neurons", i) for i in layers)
            )
            for key, layers in self.keys(stack).items()
        }

    def weights(self, arrays: Arrays, x: jax.Array, groups: Groups) -> jax.Array:
        """`[batch, length, embed] -> [batch, groups, k]`."""
        x = groups.split(_normalised(x))
        return compression.merge_weights(arrays["compression"], x, groups.members)

    def change(self, before: jax.Array, after: jax.Array) -> jax.Array:
        """Layers give the whole residual stream back."""
        return after - before

    def run(self, call: Call) -> jax.Array | Opened:
        """Opens the span before its first layer, runs a layer, and closes it after the last."""
        stack, arrays, groups = call.stack, call.arrays, call.groups
        lasts = {around.last for around in self.around(stack).values()}
        opened: Any = next(iter(call.args), None)
        if not isinstance(opened, Opened):
            opened = self._open(stack.stream("layer", call.args, call.kwargs), arrays, groups)
        changes: dict[str, Callable[[Any], Any]] = {
            "stream": lambda _: opened.merged,
            "mask": lambda mask: pool_mask(mask, groups),
            "bias": lambda bias: stride_bias(bias, groups),
            "valid": lambda _: groups.valid,
        }
        args, kwargs = base.replace_arguments(call, "layer", changes)
        opened = opened._replace(merged=call.run(*args, **kwargs))
        return self._close(opened, arrays, groups) if call.path in lasts else opened

    def _open(self, stream: jax.Array, arrays: Arrays, groups: Groups) -> Opened:
        stream = compression.stored_gradient(stream)
        weights = self.weights(arrays, stream, groups)
        # [batch, groups, embed]
        merged = compression.constrain(compression.merge(weights, groups.split(stream)))
        return Opened(merged, merged, stream)

    def _close(self, opened: Opened, arrays: Arrays, groups: Groups) -> jax.Array:
        """`[batch, length, embed]`: each token's stream with what its group's layers added."""
        bottleneck, scale = arrays["decompression"], arrays["output_scale"]
        # [batch, groups, k, embed]
        x = groups.split(_normalised(opened.stream))
        change = opened.merged - opened.start
        z = compression.decompress(bottleneck, change, x, scale, groups.receivers)
        return compression.constrain(opened.stream + from_groups(z, opened.stream.shape[1]))


def _normalised(x: jax.Array) -> jax.Array:
    """`[batch, length, embed]` over its RMS, without a learned scale."""
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(mean_square + _EPSILON)).astype(x.dtype)
