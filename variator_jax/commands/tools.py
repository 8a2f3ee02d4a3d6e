"""The commands that do not train: `budget`, `inspect`, `report`, `bench` and `convert`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from variator_jax import gin_utils
from variator_jax.bench.arguments import TPUS, parse_bytes
from variator_jax.bench.arguments import add_arguments as bench_arguments
from variator_jax.commands import engines
from variator_jax.commands.registry import command, gin_arguments
from variator_jax.errors import ConfigError

_REPORTS = ("report.md", "results.md")  # of an evaluation, of an experiment


def _budget_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--devices", type=int, metavar="N", help="pretend to have N devices")
    memory = "memory of a device, with its unit: to check whether it fits, and to choose the mesh"
    add("--hbm", metavar="80GiB", help=memory)
    slices = f"compile for that TPU slice; needs libtpu, which supports {', '.join(TPUS)}"
    add("--topology", metavar="v5e:4x4", help=slices)


@command("budget", gin_arguments, _budget_arguments)
def _budget(args: argparse.Namespace) -> None:
    """Compile the train step for shapes alone: memory, FLOPs and collectives per device.

    variator budget --gin_file=variator_xl.gin --devices 8 --hbm 80GiB --gin.REMAT=True
    variator budget --gin_file=variator_xxl.gin --topology v5e:4x4 --hbm 16GiB \
        --gin.REMAT=True --gin.BATCH_SIZE=128
    """
    hbm_bytes = None if args.hbm is None else parse_bytes(args.hbm)
    if args.devices is not None and args.devices < 1:
        raise ConfigError(f"--devices {args.devices}: expected 1 or more.")
    if args.topology and args.devices:
        raise ConfigError("--topology names the devices; leave --devices out.")
    if args.devices:
        # Read when JAX first looks for devices.
        flag = f"--xla_force_host_platform_device_count={args.devices}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    if args.devices or args.topology:
        os.environ["JAX_PLATFORMS"] = "cpu"
        # Otherwise libtpu queries the metadata server of a cloud machine.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    from variator_jax.bench import budget

    engines.parse(args, engines.choose(engines.BUILTIN), require=False)
    gin_utils.leave_unset()
    devices = budget.topology_devices(args.topology) if args.topology else None
    print(gin_utils.configured(budget.budget)(devices=devices, hbm_bytes=hbm_bytes))


def _inspect_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("path", nargs="?", help="a run folder, a backbone or a compression plugin")
    add("--verify", action="store_true", help="also read every weight of a backbone")


@command("inspect", gin_arguments, _inspect_arguments)
def _inspect(args: argparse.Namespace) -> None:
    """Describe a folder, or print the configuration that gin files and overrides resolve to.

    variator inspect runs/nano
    variator inspect --gin_file=nano_docs.gin --gin.MODEL_DIR=runs/nano
    """
    if bool(args.path) == bool(args.gin_file):
        raise ConfigError("inspect takes a folder or --gin_file=FILE, one of the two.")
    if args.path:
        from variator_jax.commands.describe import describe

        print(describe(args.path, verify=args.verify))
    else:
        engines.parse(args, engines.announce(args.engine), preflight=False)
        print(gin_utils.resolved_config())


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", help=f"the folder with {' or '.join(_REPORTS)}")


@command("report", _report_arguments)
def _report(args: argparse.Namespace) -> None:
    """Print the tables of a finished evaluation or experiment.

    variator report runs/quickstart
    variator report runs/glue_small
    """
    folder = Path(args.path)
    table = next((folder / n for n in _REPORTS if (folder / n).is_file()), None)
    if table is None:
        names = " nor ".join(_REPORTS)
        raise ConfigError(f"{folder} holds neither {names}: not a finished evaluation's folder.")
    print(table.read_text(encoding="utf-8").rstrip())
    for plot in sorted(folder.glob("*.png")):
        print(f"\nPlot: {plot}")


@command("bench", bench_arguments)
def _bench(args: argparse.Namespace) -> None:
    """Time an encoder at several compression ratios, and its distillation step, on this device.

    variator bench --backbone t5_1_0_base --shape 4x256 --shape 1x512 --peer --output bench
    variator bench --backbone t5_1_1_xl --batch 32 --length 512 --dtype bfloat16 --peer
    variator bench --backbone t5_1_1_xl --batch 32 --length 512 --dtype bfloat16 --ratios 4 \
        --train --remat dots --microbatches 2
    """
    from variator_jax.bench import arguments

    settings = arguments.settings_of(args)
    from variator_jax.bench import run

    run.run(settings, args.output)


def _convert_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", metavar="SRC", help="a folder, a file, or a URL such as gs://...")
    add("target", metavar="DST", help="a folder that does not exist yet")
    source = "what SRC is: hf, t5x or variator (backbones), official or t5x-run (plugins)"
    add("--from", dest="source_format", metavar="FORMAT", required=True, help=source)
    target = "what DST becomes: hf, t5x or variator; a plugin from t5x-run always becomes variator"
    add("--to", dest="target_format", metavar="FORMAT", help=target)
    add("--dtype", help="cast the weights to f32, bf16 or f16")
    backbone = "the plugin's backbone: needed from official; from t5x-run, it must be the run's own"
    add("--backbone", metavar="PATH", help=backbone)
    scale = "from official: 100 for the released plugins, 1 for one trained on an unscaled T5"
    add("--residual_scale", type=float, default=100.0, help=scale)


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
    from variator_jax.store.formats import FORMATS, PLUGINS, check_format, convert, convert_plugin

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
