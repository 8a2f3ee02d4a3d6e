"""The FFN site: hidden compression and decompression around a feed-forward sublayer (the paper's).

The input is the normalised residual stream, of which the FFN sees one vector a group.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import ClassVar

import jax

from variator_jax.backbones.base import Stack
from variator_jax.errors import PluginError
from variator_jax.plugin.compression import (
    compress,
    compression_flops,
    compression_specs,
    constrain,
    decompress,
    decompression_flops,
    decompression_specs,
    merge_weights,
)
from variator_jax.plugin.groups import Groups, from_groups, to_groups
from variator_jax.plugin.sites.base import (
    Around,
    Arrays,
    ArraySpec,
    Call,
    Merge,
    adapter_flops,
    adapter_specs,
    check_choice,
    check_positive,
    run_adapted,
    selected_layers,
    sorted_layers,
)

LAYER = r"(\d+)"  # stands for the layer's number in a path
ENCODER_MLP = rf"encoder/layers_{LAYER}/mlp"


@dataclasses.dataclass(frozen=True)
class Ffn:
    """FFN sites of one ratio.

    Attributes:
      ratio: how many neighbouring hidden vectors become one.
      layers: the layers to compress, None for all.
      bottleneck: width of the hidden decompression; the paper's is 64.
      compression: 'learned' weights, or 'mean', the ablation that averages a group.
      decompression: 'bottleneck', or 'repeat', the ablation that only repeats the FFN's output.
      pattern: module path of the FFNs, with `(\\d+)` in the place of the layer's number; None for
        the backbone's own.
      rank: of the adapters on the FFNs' matrices; 0 for none.
    """

    kind: ClassVar[str] = "ffn"

    ratio: int
    layers: Sequence[int] | None = None
    bottleneck: int = 64
    compression: str = "learned"
    decompression: str = "bottleneck"
    pattern: str | None = None
    rank: int = 0

    def __post_init__(self) -> None:
        check_positive("compression ratio", self.ratio)
        check_positive("bottleneck", self.bottleneck)
        check_positive("rank of the adapters", self.rank, least=0)
        check_choice("compression", self.compression, ("learned", "mean"))
        check_choice("decompression", self.decompression, ("bottleneck", "repeat"))
        object.__setattr__(self, "layers", sorted_layers(self.layers))
        if self.pattern is not None and str(self.pattern).count(LAYER) != 1:
            raise PluginError(
                f"The site pattern {self.pattern!r} must be a module path with {LAYER} in the "
                r"place of the layer's number, such as 'encoder/layers_(\d+)/mlp'."
            )

    def selected(self, stack: Stack) -> tuple[int, ...]:
        """The layers of a stack that have this site."""
        return selected_layers(self.layers, stack)

    def layer_of(self, path: str) -> int | None:
        """The layer of the module at `path`; None if this site does not compress it.

        Without a pattern the module has T5's path.
        """
        parts = (re.escape(part) for part in (self.pattern or ENCODER_MLP).split(LAYER))
        match = re.fullmatch(LAYER.join(parts), path)
        layer = None if match is None else int(match[1])
        return layer if self.layers is None or layer in self.layers else None

    def points(self, stack: Stack) -> dict[str, str]:
        """The path of each FFN, which is also the key of its arrays, and its adapted matrices."""
        points: dict[str, str] = {}
        for layer, path in self._paths(stack).items():
            points |= {path: path, **dict.fromkeys(self._matrices(stack, layer), path)}
        return points

    def arrays(self, stack: Stack) -> dict[str, dict[str, ArraySpec]]:
        """The same arrays in each layer; the ablations have fewer."""
        specs: dict[str, ArraySpec] = {}
        if self.compression == "learned":
            specs |= compression_specs(self.ratio, stack.width)
        if self.decompression == "bottleneck":
            specs |= decompression_specs(stack.width, self.bottleneck)
        return {
            path: specs | adapter_specs(self._matrices(stack, layer), self.rank)
            for layer, path in self._paths(stack).items()
        }

    def around(self, stack: Stack) -> dict[str, Around]:
        """The FFN itself is first and last."""
        return {path: Around(path, path, layer) for layer, path in self._paths(stack).items()}

    def merges(self, stack: Stack) -> dict[str, Merge]:
        """Each FFN's own; none for a pattern, whose modules are not known."""
        if self.pattern not in (None, ENCODER_MLP):
            return {}
        return {
            path: Merge(stack.path("ffn_input", layer), (stack.path("neurons", layer),))
            for layer, path in self._paths(stack).items()
        }

    def weights(self, arrays: Arrays, x: jax.Array, groups: Groups) -> jax.Array:
        """`[batch, length, embed] -> [batch, groups, k]`."""
        return merge_weights(arrays.get("compression"), to_groups(x, self.ratio), groups.members)

    def change(self, before: jax.Array, after: jax.Array) -> jax.Array:
        """An FFN's output is what it adds to the residual stream."""
        return after

    def call(
        self,
        stack: Stack,
        call: Call,
        arrays: Arrays,
        groups: Groups,
        key_bias: jax.Array | None,
    ) -> jax.Array:
        """Runs the FFN on one vector a group, and expands its output to all members."""
        if call.path not in self._paths(stack).values():
            return run_adapted(call, arrays)
        # [batch, length, embed]
        stream = stack.stream("ffn", call.args, call.kwargs)
        # [batch, groups, k, embed]
        x = to_groups(stream, self.ratio)
        # [batch, groups, embed]
        merged = compress(arrays.get("compression"), x, groups.members)
        args, kwargs = stack.with_stream("ffn", call.args, call.kwargs, constrain(merged))
        y = call.run(*args, **kwargs)
        # [batch, groups, k, embed]
        z = decompress(arrays.get("decompression"), y, x, arrays["output_scale"], groups.receivers)
        return constrain(from_groups(z, stream.shape[1]))

    def flops(self, stack: Stack, length: int) -> int:
        """What FFNs on fewer rows save, less what merging, expanding and adapters cost."""
        groups, total = -(-length // self.ratio), 0
        for layer in self.selected(stack):
            total += groups * compression_flops(
                self.ratio, stack.width, self.compression == "learned"
            )
            if self.decompression == "bottleneck":
                total += groups * decompression_flops(self.ratio, stack.width, self.bottleneck)
            total += groups * adapter_flops(self._matrices(stack, layer), self.rank)
            total += stack.flops(layer, length, length, groups)
            total -= stack.flops(layer, length, length, length)
        return total

    def _paths(self, stack: Stack) -> dict[int, str]:
        """Layer -> path of its FFN."""
        if self.pattern is None:
            return {layer: stack.path("ffn", layer) for layer in self.selected(stack)}
        return {layer: self.pattern.replace(LAYER, str(layer)) for layer in self.selected(stack)}

    def _matrices(self, stack: Stack, layer: int) -> dict[str, tuple[int, int]]:
        return stack.matrices("ffn", layer) if self.rank else {}
