"""What a benchmark is asked to measure, and how the command line says it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from variator_jax.backbones.t5.config import T5Config, get_config
from variator_jax.errors import ConfigError, did_you_mean

DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Shape:
    """Rows and tokens a row of an encoder input."""

    batch: int
    length: int

    def __post_init__(self) -> None:
        if min(self.batch, self.length) < 1:
            raise ConfigError(
                f"A shape is rows x tokens, both positive, such as 4x256; found {self}."
            )

    def __str__(self) -> str:
        return f"{self.batch}x{self.length}"


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """The distillation step: tokens of a target, microbatches, and what a layer keeps.

    `remat` is `T5Config.remat`.
    """

    targets: int = 48
    microbatches: int = 1
    remat: bool | str = False

    def __post_init__(self) -> None:
        for name in ("targets", "microbatches"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} is at least 1; found {getattr(self, name)}.")


@dataclasses.dataclass(frozen=True)
class BenchSettings:
    """What to measure.

    Attributes:
      backbone: the name of a shape, such as 't5_1_0_base'.
      shapes: encoder inputs, without padding.
      ratios: compression ratios; 1, the backbone itself, is always measured.
      dtype: of weights, activations and the matrix peak. A plugin that is trained is float32.
      rounds: how often each call is timed.
      peer: whether to time Hugging Face's encoder, too.
      step: the distillation step to measure, None for none.
    """

    backbone: str = "t5_1_0_base"
    shapes: Sequence[Shape] = (Shape(4, 256),)
    ratios: Sequence[int] = (1, 2, 4, 8)
    dtype: str = "float32"
    rounds: int = 11
    peer: bool = False
    step: StepSettings | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(
                f"No dtype is named {self.dtype!r}.{did_you_mean(self.dtype, DTYPES)} "
                f"Known: {', '.join(DTYPES)}."
            )
        if self.rounds < 1:
            raise ConfigError(f"A benchmark needs at least one round; found {self.rounds}.")
        if not self.shapes:
            raise ConfigError("A benchmark needs at least one shape, such as 4x256.")
        if any(ratio < 1 for ratio in self.ratios):
            raise ConfigError(f"Compression ratios are positive; found {list(self.ratios)}.")
        object.__setattr__(self, "shapes", tuple(dict.fromkeys(self.shapes)))
        object.__setattr__(self, "ratios", tuple(sorted({1, *self.ratios})))
        if self.step and self.ratios == (1,):
            raise ConfigError("--train needs a compression ratio of 2 or more among --ratios.")
        parts = self.step.microbatches if self.step else 1
        if uneven := [shape.batch for shape in self.shapes if shape.batch % parts]:
            raise ConfigError(
                f"A batch of {uneven[0]} does not divide into --microbatches {parts}."
            )
        if "/" in self.backbone:
            raise ConfigError(
                f"--backbone {self.backbone} is a path; bench takes named shapes only, such as "
                "t5_1_0_base, and gives them random weights."
            )
        self.config  # noqa: B018 - names an unknown backbone before anything heavy begins.

    @property
    def config(self) -> T5Config:
        """The backbone's shape, all of it in `dtype`.

        Raises:
          ConfigError: for an unknown name, with the nearest known ones.
        """
        return get_config(self.backbone, dtype=self.dtype, param_dtype=self.dtype)


def parse_shape(text: str) -> Shape:
    """`4x256` as rows and tokens."""
    match = re.fullmatch(r"(\d{1,9})x(\d{1,9})", text.strip())
    if match is None:
        raise ConfigError(f"--shape {text!r} is no shape; write rows x tokens, such as 4x256.")
    return Shape(int(match[1]), int(match[2]))


def parse_ratios(text: str) -> tuple[int, ...]:
    """`1,2,4` as numbers."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(re.fullmatch(r"\d{1,6}", part) for part in parts):
        raise ConfigError(f"--ratios {text!r} are no compression ratios; write them as 1,2,4,8.")
    return tuple(map(int, parts))
