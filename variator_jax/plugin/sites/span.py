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
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from variator_jax.backbones.base import Stack
from variator_jax.errors import PluginError
from variator_jax.plugin.compression import (
    compression_flops,
    compression_specs,
    constrain,
    decompress,
    decompression_flops,
    decompression_specs,
    merge,
    merge_weights,
)
from variator_jax.plugin.groups import Groups, from_groups, pool_mask, stride_bias, to_groups
from variator_jax.plugin.sites.base import (
    Around,
    Arrays,
    ArraySpec,
    Call,
    Merge,
    adapter_flops,
    adapter_specs,
    check_positive,
    replace_arguments,
    run_adapted,
    selected_layers,
    sorted_layers,
)

_EPSILON = 1e-6


class Opened(NamedTuple):
    """What travels between the layers of a span."""

    merged: jax.Array  # [batch, groups, embed], the residual stream of the groups
    start: jax.Array  # [batch, groups, embed], the same before the first layer
    stream: jax.Array  # [batch, length, embed], the residual stream of the tokens


@dataclasses.dataclass(frozen=True)
class Span:
    """Spans of layers that run on merged vectors.

    Attributes:
      ratio: how many neighbouring hidden vectors become one.
      layers: the layers, None for all.
      size: layers in each span; 0 for one span of all these layers.
      bottleneck: width of the hidden decompression.
      rank: of the adapters on the layers' matrices; 0 for none.
    """

    kind: ClassVar[str] = "span"

    ratio: int
    layers: Sequence[int] | None = None
    size: int = 0
    bottleneck: int = 64
    rank: int = 0

    def __post_init__(self) -> None:
        check_positive("compression ratio", self.ratio)
        check_positive("bottleneck", self.bottleneck)
        check_positive("size of a span", self.size, least=0)
        check_positive("rank of the adapters", self.rank, least=0)
        object.__setattr__(self, "layers", sorted_layers(self.layers))
        layers = self.layers
        if layers is not None and (
            not layers or tuple(layers) != tuple(range(layers[0], layers[-1] + 1))
        ):
            raise PluginError(
                f"A span's layers follow one another, such as (3, 4, 5); found {layers}."
            )

    def selected(self, stack: Stack) -> tuple[int, ...]:
        """The layers of a stack that are in a span."""
        return selected_layers(self.layers, stack)

    def spans(self, stack: Stack) -> dict[str, tuple[int, ...]]:
        """Key -> the layers of that span; the key is the path of its first layer."""
        layers = self.selected(stack)
        size = self.size or len(layers)
        cut = [layers[i : i + size] for i in range(0, len(layers), size)]
        return {stack.path("layer", span[0]): span for span in cut}

    def points(self, stack: Stack) -> dict[str, str]:
        """Every layer of every span, and every matrix that has an adapter."""
        points: dict[str, str] = {}
        for key, layers in self.spans(stack).items():
            points |= {stack.path("layer", layer): key for layer in layers}
            points |= dict.fromkeys(self._matrices(stack, layers), key)
        return points

    def arrays(self, stack: Stack) -> dict[str, dict[str, ArraySpec]]:
        """Compression and decompression of each span, and its adapters."""
        ends = compression_specs(self.ratio, stack.width)
        ends |= decompression_specs(stack.width, self.bottleneck)
        return {
            key: ends | adapter_specs(self._matrices(stack, layers), self.rank)
            for key, layers in self.spans(stack).items()
        }

    def around(self, stack: Stack) -> dict[str, Around]:
        """From the first layer of a span to its last."""
        return {
            key: Around(key, stack.path("layer", layers[-1]), layers[-1])
            for key, layers in self.spans(stack).items()
        }

    def merges(self, stack: Stack) -> dict[str, Merge]:
        """The FFNs of all layers of a span; what is merged is the stream before the first."""
        return {
            key: Merge(
                stack.path("input", layers[0]), tuple(stack.path("neurons", i) for i in layers)
            )
            for key, layers in self.spans(stack).items()
        }

    def weights(self, arrays: Arrays, x: jax.Array, groups: Groups) -> jax.Array:
        """`[batch, length, embed] -> [batch, groups, k]`."""
        x = to_groups(_normalised(x), self.ratio)
        return merge_weights(arrays["compression"], x, groups.members)

    def change(self, before: jax.Array, after: jax.Array) -> jax.Array:
        """Layers give the whole residual stream back."""
        return after - before

    def call(
        self,
        stack: Stack,
        call: Call,
        arrays: Arrays,
        groups: Groups,
        key_bias: jax.Array | None,
    ) -> jax.Array | Opened:
        """Opens the span before its first layer, runs a layer, and closes it after the last."""
        ends = {stack.path("layer", layers[-1]): key for key, layers in self.spans(stack).items()}
        layers = {stack.path("layer", layer) for layer in self.selected(stack)}
        if call.path not in layers:
            return run_adapted(call, arrays)
        names = stack.arguments("layer")
        stream = next(iter(call.args), None)
        opened = (
            stream
            if isinstance(stream, Opened)
            else self._open(stack.stream("layer", call.args, call.kwargs), arrays, groups)
        )
        args, kwargs = replace_arguments(
            names,
            call.args,
            call.kwargs,
            {
                "stream": lambda _: opened.merged,
                "mask": lambda mask: pool_mask(mask, groups),
                "bias": lambda bias: stride_bias(bias, groups),
                "valid": lambda _: groups.valid,
            },
        )
        opened = opened._replace(merged=call.run(*args, **kwargs))
        return self._close(opened, arrays, groups) if call.path in ends else opened

    def flops(self, stack: Stack, length: int) -> int:
        """What layers on fewer rows save, less merging, expanding and adapters."""
        groups, total = -(-length // self.ratio), 0
        for layers in self.spans(stack).values():
            total += groups * compression_flops(self.ratio, stack.width)
            total += groups * decompression_flops(self.ratio, stack.width, self.bottleneck)
            total += groups * adapter_flops(self._matrices(stack, layers), self.rank)
            for layer in layers:
                total += stack.flops(layer, groups, groups, groups)
                total -= stack.flops(layer, length, length, length)
        return total

    def _open(self, stream: jax.Array, arrays: Arrays, groups: Groups) -> Opened:
        weights = self.weights(arrays, stream, groups)
        # [batch, groups, embed]
        merged = constrain(merge(weights, to_groups(stream, self.ratio)))
        return Opened(merged, merged, stream)

    def _close(self, opened: Opened, arrays: Arrays, groups: Groups) -> jax.Array:
        """`[batch, length, embed]`: each token's stream with what its group's layers added."""
        # [batch, groups, k, embed]
        x = to_groups(_normalised(opened.stream), self.ratio)
        change = opened.merged - opened.start
        z = decompress(arrays["decompression"], change, x, arrays["output_scale"], groups.receivers)
        return constrain(opened.stream + from_groups(z, opened.stream.shape[1]))

    def _matrices(self, stack: Stack, layers: Sequence[int]) -> dict[str, tuple[int, int]]:
        """The matrices that have adapters: path -> (in, out)."""
        if not self.rank:
            return {}
        roles = ("attention", "ffn")
        pairs = (stack.matrices(role, layer) for layer in layers for role in roles)
        return {path: shape for matrices in pairs for path, shape in matrices.items()}


def _normalised(x: jax.Array) -> jax.Array:
    """`[batch, length, embed]` over its RMS, without a learned scale."""
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(mean_square + _EPSILON)).astype(x.dtype)
