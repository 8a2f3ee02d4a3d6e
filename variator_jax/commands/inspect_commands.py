"""`budget`, `inspect`, `report` and `bench`: the commands that do not train."""

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
    parser.add_argument("path", help="the folder with report.md or results.md")


@command("report", _report_arguments)
def _report(args: argparse.Namespace) -> None:
    """Print the tables of a finished evaluation or experiment.

    variator report runs/quickstart
    variator report runs/glue_small
    """
    folder = Path(args.path)
    table = next((folder / n for n in _REPORTS if (folder / n).is_file()), None)
    if table is None:
        raise ConfigError(
            f"{folder} holds neither {' nor '.join(_REPORTS)}: the evaluation or experiment has "
            "not ended, or it was written elsewhere."
        )
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
