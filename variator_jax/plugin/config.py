"""What a compression plugin is: its ratio, its size, its sites. No arrays in here."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from variator_jax.errors import PluginError

ENCODER_MLP = r"encoder/layers_(\d+)/mlp"


@dataclasses.dataclass(frozen=True)
class PluginConfig:
    """Settings of a compression plugin for one compression ratio.

    Attributes:
      ratio: how many neighbouring hidden vectors become one; 1 is the backbone itself.
      bottleneck: width of the hidden decompression; the paper's is 64.
      layers: the encoder layers to compress, None for all.
      compression: 'learned' weights, or 'mean', the ablation that averages a group.
      decompression: 'bottleneck', or 'repeat', the ablation that only repeats the FFN's output.
      pool_padding: let padding enter the merges, as the official code does. Only for its released
        plugins: a result then depends on how far its batch is padded.
      sites: regular expression for the module paths to surround, whose one group is the layer.
    """

    ratio: int
    bottleneck: int = 64
    layers: Sequence[int] | None = None
    compression: str = "learned"
    decompression: str = "bottleneck"
    pool_padding: bool = False
    sites: str = ENCODER_MLP

    def __post_init__(self) -> None:
        if not isinstance(self.ratio, int) or isinstance(self.ratio, bool) or self.ratio < 1:
            raise PluginError(f"A compression ratio is a positive integer; found {self.ratio!r}.")
        if not isinstance(self.bottleneck, int) or self.bottleneck < 1:
            raise PluginError(f"The bottleneck is a positive integer; found {self.bottleneck!r}.")
        _check_choice("compression", self.compression, ("learned", "mean"))
        _check_choice("decompression", self.decompression, ("bottleneck", "repeat"))
        if self.layers is not None:
            if isinstance(self.layers, int | str) or not all(
                isinstance(layer, int) for layer in self.layers
            ):
                raise PluginError(
                    f"The plugin's layers are a tuple of numbers, such as (2,); found "
                    f"{self.layers!r}."
                )
            object.__setattr__(self, "layers", tuple(sorted(set(self.layers))))
        try:
            groups = re.compile(self.sites).groups
        except re.error as error:
            raise PluginError(
                f"The site pattern {self.sites!r} is no regular expression: {error}."
            ) from error
        if groups != 1:
            raise PluginError(
                f"The site pattern {self.sites!r} needs exactly one group, the layer's number."
            )

    def covers(self, layer: int) -> bool:
        """Whether this plugin compresses that encoder layer."""
        return self.ratio > 1 and (self.layers is None or layer in self.layers)

    def compressed_layers(self, num_layers: int) -> tuple[int, ...]:
        """The layers this plugin compresses in an encoder of `num_layers`.

        Raises:
          PluginError: if `layers` names one that the encoder does not have.
        """
        beyond = [layer for layer in self.layers or () if not 0 <= layer < num_layers]
        if beyond:
            raise PluginError(
                f"The plugin names encoder layers {beyond}; the backbone has layers 0 to "
                f"{num_layers - 1}."
            )
        return tuple(layer for layer in range(num_layers) if self.covers(layer))


def _check_choice(field: str, found: str, choices: tuple[str, ...]) -> None:
    if found not in choices:
        raise PluginError(f"PluginConfig.{field} is {found!r}; it is one of {choices}.")
