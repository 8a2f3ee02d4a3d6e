"""The kv site: keys and values of the self-attention come from merged vectors.

Queries stay whole, so that an attention of as many queries reads k times fewer keys. A merged key
stands where its middle member stands and counts as many as it has members.
"""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp

from variator_jax.backbones.base import Stack
from variator_jax.plugin.compression import (
    compress,
    compression_flops,
    compression_specs,
    constrain,
    merge_weights,
)
from variator_jax.plugin.groups import Groups, pool_keys, to_groups
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


@dataclasses.dataclass(frozen=True)
class KeyValue:
    """Self-attention over merged keys and values.

    Attributes:
      ratio: how many neighbouring vectors become one key and one value.
      layers: the layers, None for all.
      rank: of the adapters on the attention's matrices; 0 for none.
    """

    kind: ClassVar[str] = "kv"

    ratio: int
    layers: Sequence[int] | None = None
    rank: int = 0

    def __post_init__(self) -> None:
        check_positive("compression ratio", self.ratio)
        check_positive("rank of the adapters", self.rank, least=0)
        object.__setattr__(self, "layers", sorted_layers(self.layers))

    def selected(self, stack: Stack) -> tuple[int, ...]:
        """The layers of a stack that have this site."""
        return selected_layers(self.layers, stack)

    def points(self, stack: Stack) -> dict[str, str]:
        """The attention of each layer, and every matrix that has an adapter."""
        points: dict[str, str] = {}
        for layer in self.selected(stack):
            key = stack.path("attention", layer)
            points |= {key: key, **dict.fromkeys(self._matrices(stack, layer), key)}
        return points

    def arrays(self, stack: Stack) -> dict[str, dict[str, ArraySpec]]:
        """Compression and adapters of each layer."""
        merging = compression_specs(self.ratio, stack.width)
        return {
            stack.path("attention", layer): merging
            | adapter_specs(self._matrices(stack, layer), self.rank)
            for layer in self.selected(stack)
        }

    def around(self, stack: Stack) -> dict[str, Around]:
        """The attention itself is first and last."""
        paths = {layer: stack.path("attention", layer) for layer in self.selected(stack)}
        return {path: Around(path, path, layer) for layer, path in paths.items()}

    def merges(self, stack: Stack) -> dict[str, Merge]:
        """None: its FFNs run on whole sequences."""
        return {}

    def weights(self, arrays: Arrays, x: jax.Array, groups: Groups) -> jax.Array:
        """`[batch, length, embed] -> [batch, groups, k]`."""
        return merge_weights(arrays["compression"], to_groups(x, self.ratio), groups.members)

    def change(self, before: jax.Array, after: jax.Array) -> jax.Array:
        """An attention's output is what it adds to the residual stream."""
        return after

    def call(
        self,
        stack: Stack,
        call: Call,
        arrays: Arrays,
        groups: Groups,
        key_bias: jax.Array | None,
    ) -> jax.Array:
        """Runs the attention with one key and one value a group."""
        if call.path not in {stack.path("attention", layer) for layer in self.selected(stack)}:
            return run_adapted(call, arrays)

        def merged(keys: jax.Array) -> jax.Array:
            # [batch, length, embed] -> [batch, groups, embed]
            x = to_groups(keys, self.ratio)
            return constrain(compress(arrays["compression"], x, groups.members))

        seen: list[jax.Array] = []

        def pooled(mask: jax.Array) -> jax.Array:
            seen.append(pool_keys(mask, groups))
            return seen[0]

        args, kwargs = replace_arguments(
            stack.arguments("attention"),
            call.args,
            call.kwargs,
            {"keys": merged, "mask": pooled, "bias": lambda _: key_bias},
        )
        out = call.run(*args, **kwargs)
        if groups.packed:
            # An example that lies in another's last group has no key of its own: the softmax of
            # its queries is then over keys of others, which must not reach it.
            # [batch, length, 1]
            out = out * jnp.any(seen[0] > 0, axis=(1, 3))[..., None].astype(out.dtype)
        return out

    def flops(self, stack: Stack, length: int) -> int:
        """What fewer keys save, less merging and adapters."""
        groups, total = -(-length // self.ratio), 0
        for layer in self.selected(stack):
            total += groups * compression_flops(self.ratio, stack.width)
            total += stack.flops(layer, length, groups, length)
            total -= stack.flops(layer, length, length, length)
            for path, shape in self._matrices(stack, layer).items():
                rows = groups if path in stack.matrices("keys", layer) else length
                total += rows * adapter_flops({path: shape}, self.rank)
        return total

    def _matrices(self, stack: Stack, layer: int) -> dict[str, tuple[int, int]]:
        return stack.matrices("attention", layer) if self.rank else {}
