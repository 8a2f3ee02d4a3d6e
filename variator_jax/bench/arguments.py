"""The arguments of `variator bench` and `variator budget`, and their settings.

Nothing heavy is imported before a backbone is named.
"""

import argparse
import dataclasses
import re
from typing import TYPE_CHECKING

from variator_jax.errors import ConfigError

if TYPE_CHECKING:
    from variator_jax.backbones.t5 import T5Config
    from variator_jax.plugin import PluginConfig

DTYPES = ("float32", "bfloat16", "float16")
# What libtpu 0.0.42 compiles for; others are left to the libtpu that is installed.
TPUS = ("v2", "v3", "v4", "v5e", "v5p", "v6e", "tpu7x")
_UNITS = {"B": 1, "MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}
_STEP_ONLY = ("targets", "microbatches", "remat")


@dataclasses.dataclass(frozen=True)
class Shape:
    """Rows and tokens a row of an encoder input."""

    batch: int
    length: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.length}"


@dataclasses.dataclass(frozen=True)
class BenchSettings:
    """What to measure.

    Attributes:
      backbone: the name of a shape, such as 't5_1_0_base'.
      shapes: encoder inputs, without padding.
      ratios: compression ratios; 1, the backbone itself, is always measured.
      plugins: further plugins for the encoder.
      dtype: of weights, activations and the matrix peak. A plugin that is trained is float32.
      rounds: how often each call is timed.
      peer: whether to time Hugging Face's encoder, too.
      train: whether to time the distillation step, too.
      targets: tokens of a target of the step.
      microbatches: passes that the step cuts its batch into.
      remat: what a layer keeps for the backward pass (`T5Config.remat`).
    """

    backbone: str = "t5_1_0_base"
    shapes: tuple[Shape, ...] = (Shape(4, 256),)
    ratios: tuple[int, ...] = (1, 2, 4, 8)
    plugins: "tuple[PluginConfig, ...]" = ()
    dtype: str = "float32"
    rounds: int = 11
    peer: bool = False
    train: bool = False
    targets: int = 48
    microbatches: int = 1
    remat: bool | str = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "shapes", tuple(dict.fromkeys(self.shapes)))
        object.__setattr__(self, "ratios", tuple(sorted({1, *self.ratios})))
        if self.train and self.ratios == (1,):
            raise ConfigError("--train needs a compression ratio of 2 or more among --ratios.")
        for shape in self.shapes if self.train else ():
            if shape.batch % self.microbatches:
                parts = f"does not divide into {self.microbatches} microbatches"
                raise ConfigError(f"A batch of {shape.batch} {parts}.")

    @property
    def config(self) -> "T5Config":
        """The backbone's shape, all of it in `dtype`.

        Raises:
          ConfigError: for an unknown name, with the nearest known ones.
        """
        from variator_jax.backbones.t5 import get_config

        return get_config(self.backbone, dtype=self.dtype, param_dtype=self.dtype)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds those of `variator bench`; what is left out is as in `BenchSettings`."""
    add = parser.add_argument
    add("--backbone", help=f"a named shape (default: {BenchSettings.backbone})")
    add("--batch", type=positive, help="rows of the encoder's input (default: 4)")
    add("--length", type=positive, help="tokens of a row, without padding (default: 256)")
    instead = "rows x tokens instead of --batch and --length; repeatable"
    add("--shape", action="append", type=_shape, metavar="4x256", help=instead)
    add("--ratios", type=positives, metavar="1,2,4,8", help="compression ratios")
    words = "also time the encoder with these sites, such as 'ffn 0 x4; span 1-11 x4'; repeatable"
    add("--plugin", action="append", metavar="SITES", help=words)
    add("--dtype", choices=DTYPES, help=f"(default: {BenchSettings.dtype})")
    add("--rounds", type=positive, help=f"how often each is timed ({BenchSettings.rounds})")
    add("--peer", action="store_true", help="also time Hugging Face's encoder in torch")
    add("--train", action="store_true", help="also time the distillation step")
    add("--targets", type=positive, help="with --train: tokens of a target (default: 48)")
    add("--microbatches", type=positive, help="with --train: parts of a batch (default: 1)")
    remat = "with --train: recompute activations in the backward pass; dots keeps matrix products"
    add("--remat", nargs="?", const="all", choices=("all", "dots"), help=remat)
    add("--output", metavar="DIR", help="write bench.json, bench.md and bench.png there")


def settings_of(args: argparse.Namespace) -> BenchSettings:
    """What the parsed arguments ask for.

    Raises:
      ConfigError: for arguments that contradict each other, or an unknown backbone.
    """
    if args.shape and (args.batch or args.length):
        raise ConfigError("--shape already sets --batch and --length; give one or the other.")
    from variator_jax.backbones.t5 import T5
    from variator_jax.plugin import PluginConfig, plugin_specs
    from variator_jax.plugin.schedule import split_sites

    names = {field.name for field in dataclasses.fields(BenchSettings)}
    given = {k: v for k, v in vars(args).items() if k in names and v is not None}
    for name in given.keys() & _STEP_ONLY if not args.train else ():
        raise ConfigError(f"--{name} belongs to the distillation step: add --train.")
    if args.remat == "all":
        given["remat"] = True
    shapes = args.shape or [Shape(args.batch or 4, args.length or 256)]
    plugins = tuple(PluginConfig(sites=split_sites(words)) for words in args.plugin or ())
    settings = BenchSettings(**given, shapes=tuple(shapes), plugins=plugins)
    stack = T5(settings.config).stack()  # An unknown backbone is refused before any measurement,
    for plugin in plugins:  # and so is a layer.
        plugin_specs(plugin, stack)
    return settings


def parse_bytes(text: str) -> int:
    """Bytes of '80GiB' or '80GB'.

    Raises:
      ConfigError: for anything else, also a number without a unit: 80 are rarely bytes.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in _UNITS:
        raise ConfigError(f"{text!r} is not an amount of memory; write 80GiB or 80GB.")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def positive(text: str) -> int:
    """Reads a number of 1 or more, for argparse."""
    if not re.fullmatch(r"\s*[1-9]\d{0,8}\s*", text):
        raise argparse.ArgumentTypeError(f"expected a positive number, found {text!r}")
    return int(text)


def positives(text: str) -> tuple[int, ...]:
    """Reads numbers of 1 or more, such as '1,8', for argparse."""
    return tuple(map(positive, text.split(",")))


def _shape(text: str) -> Shape:
    batch, times, length = text.partition("x")
    if not times:
        raise argparse.ArgumentTypeError(f"expected rows x tokens, such as 4x256, found {text!r}")
    return Shape(positive(batch), positive(length))
