"""`convert`: backbones and plugins from one format to another."""

from __future__ import annotations

import argparse

from variator_jax.commands.registry import command
from variator_jax.errors import ConfigError


def _convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="a folder, a file, or a URL such as gs://...")
    parser.add_argument("target", metavar="DST", help="a folder that does not exist yet")
    source = "what SRC is: hf, t5x or variator (backbones), official or t5x-run (plugins)"
    target = "what DST becomes: hf, t5x or variator; a plugin from t5x-run always becomes variator"
    parser.add_argument(
        "--from", dest="source_format", metavar="FORMAT", required=True, help=source
    )
    parser.add_argument("--to", dest="target_format", metavar="FORMAT", help=target)
    parser.add_argument("--dtype", help="cast the weights to f32, bf16 or f16")
    parser.add_argument(
        "--backbone",
        metavar="PATH",
        help="the backbone that the plugin belongs to: needed from official; from t5x-run, one "
        "that must be the run's own",
    )
    parser.add_argument(
        "--residual_scale",
        type=float,
        default=100.0,
        help="from official: 100 for the released plugins, 1 for one trained on an unscaled T5",
    )


@command("convert", _convert_arguments)
def _convert(args: argparse.Namespace) -> None:
    """Convert backbones between Hugging Face, T5X and variator, and others' plugins to variator.

    variator convert --from hf --to variator google/flan-t5-xl flan_t5_xl --dtype bf16
    variator convert --from t5x --to hf gs://BUCKET/checkpoint_1000000 t5_1_1_base
    variator convert --from variator --to t5x runs/nano/backbone nano_t5x
    variator convert --from official --to variator plugin-t5_base-mux_4.pkl plugin \
        --backbone t5_base
    variator convert --from t5x-run MODEL_DIR/checkpoint_100000 plugin --backbone t5_1_1_xl
    """
    from variator_jax.store.convert import FORMATS, PLUGINS, check_format, convert, convert_plugin

    source, target = args.source_format, args.target_format
    check_format("--from", source, (*FORMATS, *PLUGINS))
    if target is None and source != "t5x-run":
        raise ConfigError(f"--to is missing: what DST becomes, one of {', '.join(FORMATS)}.")
    if source not in PLUGINS:
        if args.backbone is not None:
            raise ConfigError(f"--backbone goes with --from {' or '.join(PLUGINS)} only.")
        print(convert(source, target, args.source, args.target, args.dtype))
        return
    if target not in ("variator", None) or args.dtype is not None:
        raise ConfigError(f"--from {source} goes with --to variator, and without --dtype.")
    from variator_jax.commands.describe import describe

    folder = convert_plugin(source, args.source, args.target, args.backbone, args.residual_scale)
    print(describe(folder))
