"""The arguments of `variator bench`. Nothing heavy is imported until they are turned into settings.

What a user may leave out has its default here only, so that `--help` can print it.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from variator_jax.errors import ConfigError

if TYPE_CHECKING:
    from variator_jax.bench.settings import BenchSettings, StepSettings

_STEP_ONLY = ("targets", "microbatches", "remat")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds them all."""
    add = parser.add_argument
    add("--backbone", default="t5_1_0_base", help="a named shape (default: %(default)s)")
    add("--batch", type=int, help="rows of the encoder's input (default: 4)")
    add("--length", type=int, help="tokens of a row, without padding (default: 256)")
    add(
        "--shape",
        action="append",
        default=[],
        metavar="4x256",
        help="rows x tokens instead of --batch and --length; repeatable",
    )
    add("--ratios", default="1,2,4,8", metavar="1,2,4,8", help="compression ratios")
    add("--dtype", default="float32", help="float32, bfloat16 or float16 (default: %(default)s)")
    add("--rounds", type=int, default=11, help="how often each is timed (default: %(default)s)")
    add("--peer", action="store_true", help="also time Hugging Face's encoder in torch")
    add("--train", action="store_true", help="also time the distillation step")
    add("--targets", type=int, help="with --train: tokens of a target (default: 48)")
    add("--microbatches", type=int, help="with --train: parts of a batch (default: 1)")
    add(
        "--remat",
        nargs="?",
        const="all",
        choices=("all", "dots"),
        help="with --train: compute activations again in the backward pass, all of them or all "
        "but the products with weights",
    )
    add("--output", metavar="DIR", help="write bench.json, bench.md and bench.png there")


def settings_of(args: argparse.Namespace) -> BenchSettings:
    """What the parsed arguments ask for.

    Raises:
      ConfigError: for what cannot be measured, or arguments that contradict each other.
    """
    from variator_jax.bench.settings import BenchSettings, Shape, parse_ratios, parse_shape

    if args.shape and (args.batch is not None or args.length is not None):
        raise ConfigError("--shape already says --batch and --length; give one or the other.")
    shapes = [parse_shape(text) for text in args.shape]
    if not shapes:
        batch = 4 if args.batch is None else args.batch
        shapes = [Shape(batch, 256 if args.length is None else args.length)]
    return BenchSettings(
        backbone=args.backbone,
        shapes=shapes,
        ratios=parse_ratios(args.ratios),
        dtype=args.dtype,
        rounds=args.rounds,
        peer=args.peer,
        step=_step(args),
    )


def _step(args: argparse.Namespace) -> StepSettings | None:
    from variator_jax.bench.settings import StepSettings

    given = {name: getattr(args, name) for name in _STEP_ONLY if getattr(args, name) is not None}
    if not args.train:
        if given:
            raise ConfigError(f"--{next(iter(given))} is of the distillation step: add --train.")
        return None
    if given.get("remat") == "all":
        given["remat"] = True
    return StepSettings(**given)
