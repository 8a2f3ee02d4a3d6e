"""The FFN site: hidden compression and decompression around a feed-forward sublayer (the paper's).

The input `x` is the normalised residual stream. With k the ratio, b the bottleneck, a the output
scale and t the mask:

    compress    s = softmax(reshape(x, [batch, length/k, k*embed]) W + c  masked by t)
                m_g = sum_j s_gj x_(gk+j)
    FFN         y = FFN(m)                             frozen, k times fewer rows
    decompress  r = repeat(y, k);  z = r + a (tanh(r/a W_r + x W_x + b1) W_2 + b2)
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.partitioning import with_sharding_constraint

from variator_jax.backbones.base import Stack
from variator_jax.errors import PluginError
from variator_jax.plugin.groups import Groups, from_groups, masked_softmax, to_groups
from variator_jax.plugin.sites.base import Arrays, ArraySpec

# The official code's initialisation: W ~ N(0, 2/(kD)), the decompression's kernels ~ N(0, 0.01^2),
# biases zero; so a fresh plugin nearly pools, runs the FFN and repeats.
_SCORES_INIT = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
_SMALL_INIT = nn.initializers.normal(stddev=0.01)
_ZEROS = nn.initializers.zeros
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
    """

    ratio: int
    layers: Sequence[int] | None = None
    bottleneck: int = 64
    compression: str = "learned"
    decompression: str = "bottleneck"
    pattern: str | None = None

    def __post_init__(self) -> None:
        _check_positive("compression ratio", self.ratio)
        _check_positive("bottleneck", self.bottleneck)
        _check_choice("compression", self.compression, ("learned", "mean"))
        _check_choice("decompression", self.decompression, ("bottleneck", "repeat"))
        if self.layers is not None:
            object.__setattr__(self, "layers", _sorted_layers(self.layers))
        if self.pattern is not None and str(self.pattern).count(LAYER) != 1:
            raise PluginError(
                f"The site pattern {self.pattern!r} must be a module path with {LAYER} in the "
                r"place of the layer's number, such as 'encoder/layers_(\d+)/mlp'."
            )

    def selected(self, stack: Stack) -> tuple[int, ...]:
        """The layers of a stack that have this site.

        Raises:
          PluginError: if `layers` names one that the stack does not have.
        """
        beyond = [layer for layer in self.layers or () if not 0 <= layer < stack.layers]
        if beyond:
            raise PluginError(
                f"The plugin names encoder layers {beyond}; the backbone has layers 0 to "
                f"{stack.layers - 1}."
            )
        return tuple(range(stack.layers) if self.layers is None else self.layers)

    def layer_of(self, path: str) -> int | None:
        """The layer of the module at `path`; None if this site does not compress it.

        Without a pattern the module has T5's path.
        """
        parts = (re.escape(part) for part in (self.pattern or ENCODER_MLP).split(LAYER))
        match = re.fullmatch(LAYER.join(parts), path)
        layer = None if match is None else int(match[1])
        return layer if self.layers is None or layer in self.layers else None

    def points(self, stack: Stack) -> dict[str, str]:
        """The path of each FFN, which is also the key of its arrays."""
        paths = [self._path(stack, layer) for layer in self.selected(stack)]
        return {path: path for path in paths}

    def arrays(self, stack: Stack) -> dict[str, dict[str, ArraySpec]]:
        """The same arrays in each layer; the ablations have fewer."""
        specs = self._specs(stack.width)
        return {path: specs for path in self.points(stack)}

    def around(self, stack: Stack) -> dict[str, tuple[str, str]]:
        """The FFN itself is first and last."""
        return {path: (path, path) for path in self.points(stack)}

    def change(self, before: jax.Array, after: jax.Array) -> jax.Array:
        """An FFN's output is what it adds to the residual stream."""
        return after

    def call(
        self,
        stack: Stack,
        path: str,
        call: Callable[..., Any],
        args: tuple,
        kwargs: dict,
        arrays: Arrays,
        groups: Groups,
    ) -> jax.Array:
        """Runs the FFN on one vector a group, and expands its output to all members."""
        # [batch, length, embed]
        stream = stack.stream("ffn", args, kwargs)
        # [batch, groups, k, embed]
        x = to_groups(stream, self.ratio)
        # [batch, groups, embed]
        merged = compress(arrays.get("compression"), x, groups.members)
        args, kwargs = stack.with_stream("ffn", args, kwargs, constrain(merged))
        y = call(*args, **kwargs)
        # Only in a packed batch can a group hold tokens that must not see what it became.
        receivers = groups.members if groups.packed else None
        # [batch, groups, k, embed]
        z = decompress(arrays.get("decompression"), y, x, arrays["output_scale"], receivers)
        return constrain(from_groups(z, stream.shape[1]))

    def flops(self, stack: Stack, length: int) -> int:
        """What FFNs on fewer rows save, less what merging and expanding cost."""
        groups, width = -(-length // self.ratio), stack.width
        plugin = 2 * self.ratio * width  # the weighted sum of a group
        if self.compression == "learned":
            plugin += 2 * (self.ratio * width) * self.ratio  # u W
        if self.decompression == "bottleneck":
            plugin += 2 * width * self.bottleneck  # y W_r, before it is repeated
            plugin += self.ratio * 4 * width * self.bottleneck  # x W_x and the product with W_2
        saved = (
            stack.flops(layer, length, length, length) - stack.flops(layer, length, length, groups)
            for layer in self.selected(stack)
        )
        return sum(groups * plugin - layer for layer in saved)

    def _path(self, stack: Stack, layer: int) -> str:
        if self.pattern is None:
            return stack.path("ffn", layer)
        return self.pattern.replace(LAYER, str(layer))

    def _specs(self, embed: int) -> dict[str, ArraySpec]:
        ratio, width, specs = self.ratio, self.bottleneck, {}
        if self.compression == "learned":
            axes = ("plugin_in", "plugin_ratio")
            specs["compression/kernel"] = ArraySpec((ratio * embed, ratio), axes, _SCORES_INIT)
            specs["compression/bias"] = ArraySpec((ratio,), ("plugin_ratio",), _ZEROS)
        if self.decompression == "bottleneck":
            inwards = ArraySpec((embed, width), ("embed", "plugin_hidden"), _SMALL_INIT)
            outwards = ArraySpec((width, embed), ("plugin_hidden", "embed"), _SMALL_INIT)
            specs["decompression/repeated_kernel"] = inwards
            specs["decompression/input_kernel"] = inwards
            specs["decompression/output_kernel"] = outwards
            specs["decompression/input_bias"] = ArraySpec((width,), ("plugin_hidden",), _ZEROS)
            specs["decompression/output_bias"] = ArraySpec((embed,), ("embed",), _ZEROS)
        return specs


def compress(arrays: Arrays | None, x: jax.Array, members: jax.Array) -> jax.Array:
    """Merges each group of k hidden vectors into one, by weights that the group itself scores.

    Args:
      arrays: `kernel` `[k * embed, k]` and `bias` `[k]`; None averages a group.
      x: `[batch, groups, k, embed]`, finite everywhere.
      members: `[batch, groups, k]` bool; others get weight 0, and a group without any gives 0.

    Returns:
      `[batch, groups, embed]`.
    """
    # The scores see the whole group, so what stays out of the merge must be 0 there, too.
    x = x * members[..., None].astype(x.dtype)
    if arrays:
        # [batch, groups, k * embed] @ [k * embed, k]
        scores = jnp.dot(
            x.reshape(*x.shape[:2], -1),
            arrays["kernel"].astype(x.dtype),
            preferred_element_type=jnp.float32,
        )
        scores = scores + arrays["bias"]
    else:
        scores = jnp.zeros(members.shape, jnp.float32)
    # [batch, groups, k]
    weights = masked_softmax(scores, members).astype(x.dtype)
    # Member by member, not as one sum over an axis: XLA's CPU backend fuses such a reduction
    # into the FFN's matrix product and then runs that product as a naive loop, 5 times slower.
    merged: Any = sum(weights[:, :, j, None] * x[:, :, j] for j in range(x.shape[2]))
    return merged


def decompress(
    arrays: Arrays | None,
    y: jax.Array,
    x: jax.Array,
    output_scale: jax.Array,
    receivers: jax.Array | None = None,
) -> jax.Array:
    """Spreads the FFN's output for a group over its members, corrected by what each one was.

    z = r + a (tanh(r / a W_r + x W_x + b1) W_2 + b2), with r the repeated y. The product with
    W_r is taken on the short side, before repeating.

    Args:
      arrays: the kernels and biases of the bottleneck; None only repeats.
      y: `[batch, groups, embed]`, the FFN's output.
      x: `[batch, groups, k, embed]`, what went into compression.
      output_scale: the key's a, a float32 scalar.
      receivers: `[batch, groups, k]` bool, False on tokens that y must not reach (those of
        another packed example); None for all.

    Returns:
      `[batch, groups, k, embed]`.
    """
    # [batch, groups, k or 1, embed]
    r = _repeat_to(y, receivers)
    if not arrays:
        return jnp.broadcast_to(r, x.shape)
    cast = {name: array.astype(x.dtype) for name, array in arrays.items()}
    scale = output_scale.astype(x.dtype)
    # [batch, groups, k, bottleneck]
    hidden = _repeat_to(jnp.dot(y / scale, cast["repeated_kernel"]), receivers)
    hidden = jnp.tanh(hidden + jnp.dot(x, cast["input_kernel"]) + cast["input_bias"])
    # [batch, groups, k, embed]
    return r + scale * (jnp.dot(hidden, cast["output_kernel"]) + cast["output_bias"])


def constrain(x: jax.Array) -> jax.Array:
    """Keeps `[batch, length or groups, embed]` cut along the batch, where there is a mesh."""
    return with_sharding_constraint(x, ("batch", "length", "embed"))


def _repeat_to(y: jax.Array, receivers: jax.Array | None) -> jax.Array:
    """`[batch, groups, width] -> [batch, groups, k or 1, width]`, 0 where nothing is received."""
    y = y[:, :, None, :]
    return y if receivers is None else y * receivers[..., None].astype(y.dtype)


def _check_positive(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise PluginError(f"The {name} is a positive integer; found {value!r}.")


def _check_choice(field: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise PluginError(f"The plugin's {field} is {value!r}; it is one of {choices}.")


def _sorted_layers(layers: Any) -> tuple[int, ...]:
    if isinstance(layers, int | str) or not all(isinstance(layer, int) for layer in layers):
        raise PluginError(
            f"The plugin's layers are a tuple of numbers, such as (2,); found {layers!r}."
        )
    return tuple(sorted(set(layers)))
