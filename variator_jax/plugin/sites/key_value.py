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
from variator_jax.errors import PluginError
from variator_jax.plugin import compression
from variator_jax.plugin.groups import pool_keys
from variator_jax.plugin.sites import base
from variator_jax.plugin.sites.base import ArraySpec, Call


@dataclasses.dataclass(frozen=True)
class KeyValue(base.Site):
    """Self-attention over merged keys and values.

    Attributes:
      ratio: how many neighbouring vectors become one key and one value.
      layers: the layers, None for all.
      rank: of the adapters on the attention's matrices; 0 for none.
    """

    kind: ClassVar[str] = "kv"
    role: ClassVar[str] = "attention"
    adapted: ClassVar[tuple[str, ...]] = ("attention",)

    ratio: int
    layers: Sequence[int] | None = None
    rank: int = 0

    def specs(self, width: int) -> dict[str, ArraySpec]:
        """A merge; nothing is expanded."""
        return compression.merge_specs(self.ratio, width)

    def rows(self, length: int, groups: int) -> tuple[int, int, int]:
        """One key a group."""
        return length, groups, length

    def group_flops(self, width: int) -> int:
        """Merging."""
        return compression.merge_flops(self.ratio, width)

    def whole(self, stack: Stack, path: str, layers: Sequence[int]) -> bool:
        """Queries, and what the attention returns, are whole."""
        return all(path not in stack.matrices("keys", layer) for layer in layers)

    def run(self, call: Call) -> jax.Array:
        """Runs the attention with one key and one value a group."""
        stack, groups, key_bias = call.stack, call.groups, call.key_bias

        def merged(keys: jax.Array) -> jax.Array:
            # [batch, length, embed] -> [batch, groups, embed]
            x = groups.split(keys)
            return compression.compress(call.arrays["compression"], x, groups.members)

        seen: list[jax.Array] = []

        def pooled(mask: jax.Array) -> jax.Array:
            seen.append(pool_keys(mask, groups))
            return seen[0]

        def biased(_: jax.Array) -> jax.Array:
            if key_bias is None:
                raise PluginError(
                    f"{call.path!r} is given a position bias, but the module that makes it for kv "
                    f"sites, {stack.path('bias', 0)!r}, did not run before it."
                )
            return key_bias

        changes = {"keys": merged, "mask": pooled, "bias": biased}
        args, kwargs = base.replace_arguments(call, "attention", changes)
        out = call.run(*args, **kwargs)
        if groups.packed:
            # An example that lies in another's last group has no key of its own: the softmax of
            # its queries is then over keys of others, which must not reach it.
            # [batch, length, 1]
            out = out * jnp.any(seen[0] > 0, axis=(1, 3))[..., None].astype(out.dtype)
        return out
