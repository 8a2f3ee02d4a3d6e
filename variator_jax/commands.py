"""The subcommands of `variator` and `t5x`: each one a function that turns arguments into calls.

A further subcommand is one function under `@_command(...)`; what it does belongs into the module
that it calls. Nothing heavy is imported until one runs. The command line itself is `cli.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from variator_jax.bench.arguments import add_arguments as bench_arguments
from variator_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Command:
    """One subcommand: what it runs and what its help says."""

    name: str
    run: Callable[[argparse.Namespace], None]
    summary: str
    examples: tuple[str, ...]
    arguments: tuple[Callable[[argparse.ArgumentParser], object], ...]  # Each adds some.


COMMANDS: dict[str, Command] = {}


def _command(
    name: str,
    summary: str,
    examples: tuple[str, ...],
    *arguments: Callable[[argparse.ArgumentParser], object],
) -> Callable[[Callable[[argparse.Namespace], None]], Callable[[argparse.Namespace], None]]:
    """Enters a function into the table of subcommands."""

    def enter(run: Callable[[argparse.Namespace], None]) -> Callable[[argparse.Namespace], None]:
        COMMANDS[name] = Command(name, run, summary, examples, arguments)
        return run

    return enter


def gin_arguments(parser: argparse.ArgumentParser) -> None:
    """What every command takes that is configured by gin."""
    parser.add_argument(
        "--gin_file",
        action="append",
        default=[],
        metavar="FILE",
        help="a gin file, or the name of a packaged one; repeatable, later ones override",
    )
    # Taken out before argparse sees them, because the name is the user's; here for the help.
    parser.add_argument(
        "--gin.NAME",
        dest="unused",
        metavar="VALUE",
        help="set a macro (--gin.TRAIN_STEPS=100) or a parameter (--gin.train.seed=1); repeatable",
    )
    parser.add_argument(
        "--gin_search_paths",
        action="append",
        default=[],
        metavar="A,B",
        help="folders where gin files are looked for before the packaged ones",
    )
    parser.add_argument("--engine", help="t5x or builtin; by default T5X where it can be imported")


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="print the configuration and what the run will need, and stop",
    )
    parser.add_argument("--tfds_data_dir", metavar="DIR", help="where TFDS keeps its datasets")
    # Taken out before argparse sees them, too.
    parser.add_argument(
        "-- FLAG", dest="unused", action="store_true", help="further flags of T5X's own program"
    )


def _process_arguments(parser: argparse.ArgumentParser) -> None:
    """How several processes find one another; T5X has the same names."""
    add = parser.add_argument
    add("--coordinator_address", metavar="HOST:PORT", help="of process 0, in a run of several")
    add("--process_count", type=int, metavar="N", help="how many processes the run has")
    add("--process_index", type=int, metavar="I", help="which of them this is, from 0")
    add(
        "--multiprocess",
        action="store_true",
        help="insist on a TPU pod, SLURM, Open MPI or Kubernetes that JAX detects",
    )


def _path(text: str) -> Callable[[argparse.ArgumentParser], object]:
    return lambda parser: parser.add_argument("path", nargs="?", help=text)


@_command(
    "train",
    "Train a compression plugin, or a backbone.",
    (
        "variator train --gin_file=nano_docs.gin --gin_file=runs/backbone.gin "
        "--gin.TRAIN_STEPS=1000 --gin.MODEL_DIR=runs/nano_docs",
        "variator train --gin_file=nano_docs.gin --gin.RATIO=4",
        "t5x train --gin_file=variator_xl.gin --dry_run",
    ),
    gin_arguments,
    _run_arguments,
    _process_arguments,
)
def _train(args: argparse.Namespace) -> None:
    if _on_builtin_engine(args, "train"):
        from variator_jax import distributed, gin_utils
        from variator_jax.distill import train

        distributed.initialize(
            args.coordinator_address, args.process_count, args.process_index, args.multiprocess
        )
        with distributed.together():
            interrupted = gin_utils.configured(train.train)().interrupted
        if interrupted:
            raise SystemExit(128 + signal.SIGTERM)  # as if the signal had ended it, for scripts


@_command(
    "eval",
    "Evaluate a backbone with its compression plugins: quality, cost and latency per ratio.",
    (
        "variator eval --gin_file=nano_docs.gin --gin_file=runs/eval.gin "
        "--gin.MODEL_DIR=runs/nano_report --gin.INITIAL_CHECKPOINT_PATH=runs/nano_docs "
        "--gin.PLUGIN_PATHS=\"('runs/nano_docs/pretrain_4',)\"",
    ),
    gin_arguments,
    _run_arguments,
)
def _eval(args: argparse.Namespace) -> None:
    if _on_builtin_engine(args, "eval"):
        from variator_jax import gin_utils
        from variator_jax.distill import evaluate

        gin_utils.configured(evaluate.evaluate)()


@_command(
    "infer",
    "Write a backbone's predictions, or scores of the targets, for every example of a task.",
    (
        "variator infer --gin_file=nano_docs.gin --gin_file=tasks/docs_tasks.gin "
        "--gin_file=runs/infer.gin --gin.CHECKPOINT_PATH=runs/nano_docs "
        "--gin.PLUGIN_PATH=runs/nano_docs/pretrain_4 --gin.INFER_OUTPUT_DIR=runs/nano_answers",
    ),
    gin_arguments,
    _run_arguments,
)
def _infer(args: argparse.Namespace) -> None:
    if _on_builtin_engine(args, "infer"):
        from variator_jax import gin_utils
        from variator_jax.distill import infer

        gin_utils.configured(infer.infer)()


@_command(
    "export",
    "Write a TensorFlow SavedModel that scores or decodes; T5X's, so T5X must be there.",
    (
        "t5x export --gin_file=variator_base.gin --gin_file=runs/export.gin "
        "--gin.CHECKPOINT_PATH=runs/base_4/checkpoint_60000 --gin.MODEL_OUTPUT_DIR=exported/1",
    ),
    gin_arguments,
    _run_arguments,
)
def _export(args: argparse.Namespace) -> None:
    if _on_builtin_engine(args, "export"):
        raise ConfigError(_NOT_BUILTIN["export"])


@_command(
    "precompile",
    "Compile the train step for a TPU that is not there; T5X's, so T5X must be there.",
    ("t5x precompile --gin_file=variator_xl.gin --gin.MODEL_DIR=compiled",),
    gin_arguments,
    _run_arguments,
)
def _precompile(args: argparse.Namespace) -> None:
    if _on_builtin_engine(args, "precompile"):
        raise ConfigError(_NOT_BUILTIN["precompile"])


# What the built-in engine leaves to T5X, and what to do without T5X.
_NOT_BUILTIN = {
    "export": (
        "the built-in engine writes no SavedModel: that is T5X's, and docs/t5x.md says how T5X is "
        "installed. Without it, variator infer scores and decodes, and VariatorModel serves a "
        "plugin folder from Python."
    ),
    "precompile": (
        "the built-in engine compiles nothing for machines that are not there: that is T5X's, and "
        "docs/t5x.md says how T5X is installed. Without it, --dry_run tells what a run needs."
    ),
}


def _budget_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--devices", type=int, metavar="N", help="pretend to have N devices")
    parser.add_argument("--hbm", metavar="80GiB", help="memory of a device, to say whether it fits")
    parser.add_argument(
        "--topology", metavar="v5e:4x4", help="compile for that TPU slice; takes libtpu"
    )


@_command(
    "budget",
    "Compile the train step for shapes alone: memory, FLOPs and exchanges per device.",
    (
        "variator budget --gin_file=variator_xl.gin --devices 8 --hbm 80GiB --gin.REMAT=True",
        "variator budget --gin_file=variator_xxl.gin --topology v5e:4x4 --hbm 16GiB "
        "--gin.REMAT=True --gin.BATCH_SIZE=128",
    ),
    gin_arguments,
    _budget_arguments,
)
def _budget(args: argparse.Namespace) -> None:
    if args.devices is not None and args.devices < 1:
        raise ConfigError(f"--devices {args.devices}: expected 1 or more.")
    if args.topology and args.devices:
        raise ConfigError("--topology names the devices; leave --devices out.")
    if args.devices:
        # Read when JAX first looks for devices, which nothing has asked it to so far.
        flag = f"--xla_force_host_platform_device_count={args.devices}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    if args.devices or args.topology:
        os.environ["JAX_PLATFORMS"] = "cpu"
        # Else libtpu asks the metadata server of a cloud machine, which this need not be.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    from variator_jax import engines, gin_utils
    from variator_jax.distill import budget

    _parse(args, "train", engines.choose(engines.BUILTIN), require=False)
    gin_utils.leave_unset()
    memory = None if args.hbm is None else budget.parse_bytes(args.hbm)
    devices = budget.topology_devices(args.topology) if args.topology else None
    print(gin_utils.configured(budget.budget)(devices=devices, memory=memory))


@_command(
    "inspect",
    "Say what a folder holds, or print what gin files and overrides come to.",
    (
        "variator inspect runs/nano",
        "variator inspect --gin_file=nano_docs.gin --gin.MODEL_DIR=runs/nano",
    ),
    gin_arguments,
    _path("a run folder, a backbone or a compression plugin"),
    lambda parser: parser.add_argument(
        "--verify", action="store_true", help="also read every weight of a backbone"
    ),
)
def _inspect(args: argparse.Namespace) -> None:
    if bool(args.path) == bool(args.gin_file):
        raise ConfigError("inspect takes a folder or --gin_file=FILE, one of the two.")
    if args.path:
        from variator_jax.checkpoints import inspect

        print(inspect.describe(args.path, verify=args.verify))
    else:
        from variator_jax import engines, gin_utils

        engine = engines.choose(args.engine)
        print(f"engine: {engine.name} ({engine.why})", file=sys.stderr, flush=True)
        _parse(args, "train", engine, require=True, rehearse=False)
        print(gin_utils.resolved_config())


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
        "--scan", action="store_true", help="to t5x: the form of scalable_t5 with scanned layers"
    )
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


@_command(
    "convert",
    "Convert backbones between Hugging Face, T5X and variator, and others' plugins to variator.",
    (
        "variator convert --from hf --to variator google/flan-t5-xl flan_t5_xl --dtype bf16",
        "variator convert --from t5x --to hf gs://BUCKET/checkpoint_1000000 t5_1_1_base",
        "variator convert --from variator --to t5x runs/nano/backbone nano_t5x --scan",
        "variator convert --from official --to variator plugin-t5_base-mux_4.pkl plugin "
        "--backbone t5_base",
        "variator convert --from t5x-run MODEL_DIR/checkpoint_100000 plugin --backbone t5_1_1_xl",
    ),
    _convert_arguments,
)
def _convert(args: argparse.Namespace) -> None:
    from variator_jax.checkpoints import convert_command

    print(
        convert_command.run(
            args.source_format,
            args.target_format,
            args.source,
            args.target,
            dtype=args.dtype,
            scan=args.scan,
            backbone=args.backbone,
            residual_scale=args.residual_scale,
        )
    )


@_command(
    "report",
    "Print the table of a finished evaluation.",
    ("variator report runs/quickstart",),
    _path("the folder with report.md"),
)
def _report(args: argparse.Namespace) -> None:
    if not args.path:
        raise ConfigError("report needs a folder: variator report runs/quickstart")
    table, plot = (Path(args.path) / f"report.{suffix}" for suffix in ("md", "png"))
    if not table.is_file():
        raise ConfigError(
            f"there is no {table}: the evaluation has not ended, or it lies elsewhere."
        )
    print(table.read_text(encoding="utf-8").rstrip())
    if plot.is_file():
        print(f"\nPlot: {plot}")


@_command(
    "bench",
    "Time an encoder at several compression ratios, and its distillation step, on this device.",
    (
        "variator bench --backbone t5_1_0_base --shape 4x256 --shape 1x512 --peer --output bench",
        "variator bench --backbone t5_1_1_xl --batch 32 --length 512 --dtype bfloat16 --peer",
        "variator bench --backbone t5_1_1_xl --batch 32 --length 512 --dtype bfloat16 --ratios 4 "
        "--train --remat dots --microbatches 2",
    ),
    bench_arguments,
)
def _bench(args: argparse.Namespace) -> None:
    from variator_jax.bench import arguments

    settings = arguments.settings_of(args)
    from variator_jax.bench import run

    run.run(settings, args.output)


def _on_builtin_engine(args: argparse.Namespace, command: str) -> bool:
    """Parses the configuration, and says whether the caller shall go on with it.

    Otherwise it was a dry run; or, on T5X, this process has become T5X's program.
    """
    from variator_jax import engines

    engine = engines.choose(args.engine)
    print(f"engine: {engine.name} ({engine.why})", file=sys.stderr, flush=True)
    if engine.name == engines.BUILTIN:
        if command in _NOT_BUILTIN:
            raise ConfigError(_NOT_BUILTIN[command])
        if args.t5x_flags:
            raise ConfigError(f"{' '.join(args.t5x_flags)}: these are T5X's, not the engine's.")
    overrides = _parse(args, command, engine, require=not args.dry_run)
    if args.tfds_data_dir and engine.name == engines.BUILTIN:
        import seqio

        seqio.set_tfds_data_dir_override(args.tfds_data_dir)
    if engine.name == engines.BUILTIN and not args.dry_run:
        return True
    flags = [f"--tfds_data_dir={args.tfds_data_dir}"] if args.tfds_data_dir else []
    flags += _t5x_process_flags(args)
    paths = _search_paths(args, command, engine)
    program = engines.command_line(
        command, args.gin_file, overrides, paths, [*flags, *args.t5x_flags]
    )
    if not args.dry_run:
        engines.run_program(program)
    _tell_plan(command, engine.name == engines.BUILTIN)
    if engine.name == engines.T5X:
        print(f"T5X's own command:\n  {shlex.join(program)}")
    return False


def _t5x_process_flags(args: argparse.Namespace) -> list[str]:
    """The flags by which T5X's training joins several processes."""
    names = ("coordinator_address", "process_count", "process_index")
    given = {name: getattr(args, name, None) for name in names}
    if all(value is None for value in given.values()) and not getattr(args, "multiprocess", False):
        return []
    return ["--multiprocess_gpu", *(f"--{k}={v}" for k, v in given.items() if v is not None)]


def _tell_plan(command: str, builtin: bool) -> None:
    """Prints the configuration, what it leaves open, and what the run will need."""
    from variator_jax import gin_utils

    print(gin_utils.resolved_config())
    missing = gin_utils.leave_unset()
    if builtin:
        from variator_jax.evaluation import plan

        train_only = {} if command == "train" else {"optimizer": None}
        print(gin_utils.configured(plan.plan)(**train_only))
    else:
        from variator_jax.t5x_engine import plan as t5x_plan

        print(gin_utils.configured(t5x_plan.plan)())
    print(f"still to be set: {', '.join(missing) or 'nothing'}")


def _parse(
    args: argparse.Namespace, command: str, engine: Any, require: bool, rehearse: bool = True
) -> Any:
    from variator_jax import engines, gin_utils

    if not args.gin_file:
        raise ConfigError(
            "no gin file given: --gin_file=nano_docs.gin is the smallest packaged one."
        )
    engines.refuse_foreign(engine.name, command, args.bindings)
    paths = _search_paths(args, command, engine)
    if engine.name == engines.BUILTIN:
        return gin_utils.parse(args.gin_file, args.bindings, paths, require)
    return engines.check(command, args.gin_file, args.bindings, paths, require, rehearse)


def _search_paths(args: argparse.Namespace, command: str, engine: Any) -> list[str]:
    """The user's folders, then what the engine's part of the configuration lies in."""
    own = [path for group in args.gin_search_paths for path in group.split(",") if path]
    return [*own, *engine.search_paths(command)]
