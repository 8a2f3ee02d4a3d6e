"""The FFN site: hidden compression and decompression around a feed-forward sublayer (the paper's).

The input is the normalised residual stream, of which the FFN sees one vector a group.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import ClassVar

import jax

from variator_jax.backbones.base import Stack
from variator_jax.errors import PluginError, check_known, check_whole
from variator_jax.plugin import compression
from variator_jax.plugin.groups import Groups, from_groups
from variator_jax.plugin.sites import base
from variator_jax.plugin.sites.base import Arrays, ArraySpec, Call, Merge

LAYER = r"(\d+)"  # stands for the layer's number in a path
ENCODER_MLP = rf"encoder/layers_{LAYER}/mlp"
_CHOICES = {"compression": ("learned", "mean"), "decompression": ("bottleneck", "repeat")}


@dataclasses.dataclass(frozen=True)
class Ffn(base.Site):
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
    role: ClassVar[str] = "ffn"
    adapted: ClassVar[tuple[str, ...]] = ("ffn",)

    ratio: int
    layers: Sequence[int] | None = None
    bottleneck: int = 64
    compression: str = "learned"
    decompression: str = "bottleneck"
    pattern: str | None = None
    rank: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("The bottleneck", self.bottleneck, error=PluginError)
        for field, choices in _CHOICES.items():
            check_known(f"The plugin's {field} is", getattr(self, field), choices, PluginError)
        if self.pattern == ENCODER_MLP:  # the path in T5, whose stack knows it
            object.__setattr__(self, "pattern", None)
        if self.pattern is not None and str(self.pattern).count(LAYER) != 1:
            raise PluginError(
                f"The site pattern {self.pattern!r} must be a module path with {LAYER} in the "
                r"place of the layer's number, such as 'encoder/layers_(\d+)/mlp'."
            )

    def layer_of(self, path: str) -> int | None:
        """The layer of the module at `path`; None if this site does not compress it.

        Without a pattern the module has T5's path.
        """
        parts = (re.escape(part) for part in (self.pattern or ENCODER_MLP).split(LAYER))
        match = re.fullmatch(LAYER.join(parts), path)
        layer = None if match is None else int(match[1])
        return layer if self.layers is None or layer in self.layers else None

    def module(self, stack: Stack, layer: int) -> str:
        """The path of the layer's FFN."""
        if self.pattern is None:
            return stack.path("ffn", layer)
        return self.pattern.replace(LAYER, str(layer))

    def specs(self, width: int) -> dict[str, ArraySpec]:
        """The same arrays in each layer; the ablations have fewer."""
        specs: dict[str, ArraySpec] = {}
        if self.compression == "learned":
            specs |= compression.merge_specs(self.ratio, width)
        if self.decompression == "bottleneck":
            specs |= compression.expand_specs(width, self.bottleneck)
        return specs

    def merges(self, stack: Stack) -> dict[str, Merge]:
        """Each FFN's own; none for a pattern, whose modules are not known."""
        if self.pattern is not None:
            return {}
        return {
            key: Merge(stack.path("ffn_input", layer), (stack.path("neurons", layer),))
            for key, (layer,) in self.keys(stack).items()
        }

    def weights(self, arrays: Arrays, x: jax.Array, groups: Groups) -> jax.Array:
        """`[batch, length, embed] -> [batch, groups, k]`."""
        return compression.merge_weights(arrays.get("compression"), groups.split(x), groups.members)

    def rows(self, length: int, groups: int) -> tuple[int, int, int]:
        """The FFN runs on one row a group."""
        return length, length, groups

    def group_flops(self, width: int) -> int:
        """Merging, and expanding by the bottleneck."""
        flops = compression.merge_flops(self.ratio, width, self.compression == "learned")
        if self.decompression == "bottleneck":
            flops += compression.expand_flops(self.ratio, width, self.bottleneck)
        return flops

    def run(self, call: Call) -> jax.Array:
        """Runs the FFN on one vector a group, and expands its output to all members."""
        stack, arrays, groups = call.stack, call.arrays, call.groups
        # [batch, length, embed]
        stream = stack.stream("ffn", call.args, call.kwargs)
        # [batch, groups, k, embed]
        x = groups.split(stream)
        # [batch, groups, embed]
        merged = compression.compress(arrays.get("compression"), x, groups.members)
        args, kwargs = stack.with_stream("ffn", call.args, call.kwargs, merged)
        y = call.run(*args, **kwargs)
        # [batch, groups, k, embed]
        bottleneck, scale = arrays.get("decompression"), arrays["output_scale"]
        z = compression.decompress(bottleneck, y, x, scale, groups.receivers)
        return compression.constrain(from_groups(z, stream.shape[1]))
