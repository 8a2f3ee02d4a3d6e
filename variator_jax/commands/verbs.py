"""The commands of both programs: those that an engine runs, and the tools around them."""

import argparse
import contextlib
import copy
import os
import shlex
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from variator_jax import gin_utils
from variator_jax.bench import arguments
from variator_jax.commands import bulk, engines
from variator_jax.commands.registry import command, listed
from variator_jax.errors import ConfigError, check_known

_REPORTS = ("report.md", "results.md")  # of an evaluation, of an experiment


def _gin_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of every command that is configured by gin."""
    add = parser.add_argument
    files = "a gin file, or the name of a packaged one; repeatable, later ones override"
    add("--gin_file", action="append", default=[], metavar="FILE", help=files)
    # For the help alone: `_parse` removes overrides, whose names are the user's, before argparse.
    overrides = "set a macro, such as --gin.RATIO=8 or --gin.SEED=1; repeatable"
    add("--gin.NAME=VALUE", dest="unused", action="store_true", help=overrides)
    folders = "folders where gin files are looked for before the packaged ones"
    add("--gin_search_paths", action="extend", default=[], type=listed, metavar="A,B", help=folders)
    engine = "t5x or builtin (experiment, budget: always builtin); T5X where it can be imported"
    add("--engine", help=engine)


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of every command that an engine runs."""
    add = parser.add_argument
    plan = "print the configuration and what the run will need, and stop"
    add("--dry_run", action="store_true", help=plan)
    check = "check arguments and gin files without looking at devices; nothing may be left unset"
    add("--check", action="store_true", help=check)
    add("--tfds_data_dir", metavar="DIR", help="where TFDS keeps its datasets")
    parser.add_argument_group("-- FLAG ...", "further flags of T5X's own program")


def _process_arguments(parser: argparse.ArgumentParser) -> None:
    """How several processes find one another; T5X has the same names."""
    add = parser.add_argument
    add("--coordinator_address", metavar="HOST:PORT", help="of process 0, in a run of several")
    add("--process_count", type=int, metavar="N", help="how many processes the run has")
    add("--process_index", type=int, metavar="I", help="which of them this is, from 0")
    detected = "insist on a TPU pod, SLURM, Open MPI or Kubernetes that JAX detects"
    add("--multiprocess", action="store_true", help=detected)


@command("train", _gin_arguments, _run_arguments, _process_arguments)
def _train(args: argparse.Namespace) -> None:
    """Train a compression plugin, or a backbone.

    variator train --gin_file=nano_docs.gin --gin_file=runs/backbone.gin \
        --gin.TRAIN_STEPS=1000 --gin.MODEL_DIR=runs/nano_docs
    variator train --gin_file=nano_docs.gin --gin.RATIO=4
    t5x train --gin_file=variator_xl.gin --dry_run
    """
    if _prepare_builtin(args):
        from variator_jax import distributed
        from variator_jax.train import train

        distributed.initialize(
            args.coordinator_address, args.process_count, args.process_index, args.multiprocess
        )
        with distributed.fail_fast():
            interrupted = gin_utils.configured(train.train)().interrupted
        if interrupted:
            raise SystemExit(128 + signal.SIGTERM)  # as if the signal had ended it, for scripts


@command("eval", _gin_arguments, _run_arguments)
def _eval(args: argparse.Namespace) -> None:
    """Evaluate a backbone with its compression plugins: quality, cost and latency per ratio.

    variator eval --gin_file=nano_docs.gin --gin_file=runs/eval.gin \
        --gin.MODEL_DIR=runs/nano_report --gin.INITIAL_CHECKPOINT_PATH=runs/nano_docs \
        --gin.PLUGIN_PATHS="('runs/nano_docs/pretrain_4',)"
    """
    if _prepare_builtin(args):
        from variator_jax.evaluation import evaluate

        gin_utils.configured(evaluate.evaluate)()


@command("infer", _gin_arguments, _run_arguments)
def _infer(args: argparse.Namespace) -> None:
    """Write a backbone's predictions, or scores of the targets, for every example of a task.

    variator infer --gin_file=nano_docs.gin --gin_file=tasks/docs_tasks.gin \
        --gin_file=runs/infer.gin --gin.CHECKPOINT_PATH=runs/nano_docs \
        --gin.PLUGIN_PATH=runs/nano_docs/pretrain_4 --gin.INFER_OUTPUT_DIR=runs/nano_answers
    """
    if _prepare_builtin(args):
        from variator_jax.evaluation import infer

        gin_utils.configured(infer.infer)()


@command("export", _gin_arguments, _run_arguments, bulk.export_arguments)
def _export(args: argparse.Namespace) -> None:
    """Write a TensorFlow SavedModel with T5X; or, with --format jax, programs of jax.export.

    t5x export --gin_file=variator_base.gin --gin_file=runs/export.gin \
        --gin.CHECKPOINT_PATH=runs/base_4/checkpoint_60000 --gin.MODEL_OUTPUT_DIR=exported/1
    variator export --format jax --backbone runs/quickstart/finetuned \
        --plugins runs/quickstart/adapted_4 --lengths 64,256 --output exported
    """
    if not bulk.export_jax(args):
        _prepare_builtin(args)


@command("precompile", _gin_arguments, _run_arguments)
def _precompile(args: argparse.Namespace) -> None:
    """Compile the train step for an absent TPU; needs T5X.

    t5x precompile --gin_file=variator_xl.gin --gin.MODEL_DIR=compiled
    """
    _prepare_builtin(args)


def _prepare_builtin(args: argparse.Namespace) -> bool:
    """Parses the configuration; returns whether the built-in engine is to run it.

    Otherwise it was a check or a dry run; or, on T5X, this process has become T5X's program.
    """
    engine = engines.announce(args.engine)
    builtin = engine.name == engines.BUILTIN
    of_t5x = [args.command] if args.command in ("export", "precompile") else args.t5x_flags
    if builtin and of_t5x:
        raise ConfigError(f"the built-in engine has no {' '.join(of_t5x)}; {engines.HOW}.")
    overrides = engines.parse(args, engine, args.check or not args.dry_run, not args.check)
    if args.check:
        return False
    if args.dry_run:
        _print_plan(args.command, builtin)
    if builtin:
        _use_tfds_folder(args.tfds_data_dir)
        return not args.dry_run
    program = engines.command_line(args, engine, overrides)
    if not args.dry_run:
        engines.run_program(program)
    print(f"T5X's own command:\n  {shlex.join(program)}")
    return False


def _use_tfds_folder(folder: str | None) -> None:
    """Lets seqio read TFDS's datasets from `folder`, if one is given."""
    if folder:
        import seqio

        seqio.set_tfds_data_dir_override(folder)


def _print_plan(command_name: str, builtin: bool) -> None:
    """Prints the configuration, what it leaves open, and what the run will need."""
    print(gin_utils.resolved_config())
    missing = gin_utils.leave_unset()
    if builtin:
        from variator_jax.train import plan

        settings = {} if command_name == "train" else {"optimizer": None}
        print(gin_utils.configured(plan.plan)(**settings, **_folders_of(command_name)))
    else:
        from variator_jax import t5x_engine

        print(gin_utils.configured(t5x_engine.plan)())
    if command_name in ("train", "eval", "infer"):
        _print_data(command_name, missing)
    print(f"still to be set: {', '.join(missing) or 'nothing'}")


def _folders_of(command_name: str) -> dict[str, Any]:
    """The plugins of the folders that an evaluation or inference names, by plan's parameter.

    Empty where one is not on this machine, as before training: then gin's plugin is planned.
    """
    from variator_jax.store import formats, load_plugin

    macro = {"eval": "PLUGIN_PATHS", "infer": "PLUGIN_PATH"}.get(command_name)
    paths = gin_utils.macro(macro) if macro else None
    paths = [paths] if isinstance(paths, str) else paths
    if command_name == "infer" and gin_utils.macro("RATIO") == 1:
        return {"plugins": []}
    folders = [formats.run_part(path, "plugin") for path in paths or ()]
    if paths is None or not all((folder / "plugin.json").is_file() for folder in folders):
        return {}
    return {"plugins": [load_plugin(folder).config for folder in folders]}


def _print_data(command_name: str, missing: Sequence[str]) -> None:
    """Prints how labels are read and how many texts are cut, where the data are on this machine."""
    from variator_jax.data.cuts import describe_local
    from variator_jax.files import is_url

    named = dict.fromkeys(("SPLIT", "VOCABULARY", "TASK_FILE", "DATA_DIR", "TEXT_FILE"))
    for name in named:
        with contextlib.suppress(ConfigError):  # of another task or engine
            named[name] = gin_utils.macro(name)
    if {*named, "TASK_TEMPLATE", "MIXTURE_OR_TASK_NAME"} & set(missing) or any(
        is_url(value) for value in named.values() if isinstance(value, str)
    ):
        return
    split = named["SPLIT"] or "validation"
    splits = ["train", "validation"] if command_name == "train" else [split]
    # Copying a reference is how gin evaluates one that is called.
    task = copy.deepcopy(gin_utils.macro("MIXTURE_OR_TASK_NAME"))
    for line in describe_local(task, splits, gin_utils.macro("TASK_FEATURE_LENGTHS")):
        print(line)


def _experiment_arguments(parser: argparse.ArgumentParser) -> None:
    progress = "print what is done and what is missing, and stop"
    parser.add_argument("--dry_run", action="store_true", help=progress)
    parser.add_argument("--tfds_data_dir", metavar="DIR", help="where TFDS keeps its datasets")


@command("experiment", _gin_arguments, _experiment_arguments)
def _experiment(args: argparse.Namespace) -> None:
    """Run a grid of backbones, tasks, ratios and seeds; the same command resumes it.

    variator experiment --gin_file=experiments/glue_small.gin --gin.TEXT_DIR=wiki \
        --gin.GLUE_DIR=glue
    variator experiment --gin_file=experiments/glue_small.gin --gin.TEXT_DIR=wiki \
        --gin.GLUE_DIR=glue --gin.SEEDS="(0,)" --dry_run
    """
    from variator_jax.experiment import drive, grid

    if args.engine not in (None, engines.BUILTIN):
        raise ConfigError("experiment runs on the built-in engine; leave --engine out.")
    engines.parse(args, engines.choose(engines.BUILTIN))
    experiment = gin_utils.configured(grid.Experiment)(search_paths=args.gin_search_paths)
    if args.dry_run:
        drive.lock(experiment, drive.preflight(experiment))
        print(drive.describe(experiment))
        return
    from variator_jax.experiment import report, score

    _use_tfds_folder(args.tfds_data_dir)
    configs = drive.preflight(experiment, data=True)
    records = drive.drive(experiment, configs, grid.run_training, score.score_cell)
    print(report.report(experiment, records))


def _budget_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--devices", type=int, metavar="N", help="pretend to have N devices")
    memory = "memory of a device, with its unit: to check whether it fits, and to choose the mesh"
    add("--hbm", metavar="80GiB", help=memory)
    slices = f"compile for that TPU slice; needs libtpu, which supports {', '.join(arguments.TPUS)}"
    add("--topology", metavar="v5e:4x4", help=slices)


@command("budget", _gin_arguments, _budget_arguments)
def _budget(args: argparse.Namespace) -> None:
    """Compile the train step for shapes alone: memory, FLOPs and collectives per device.

    variator budget --gin_file=variator_xl.gin --devices 8 --hbm 80GiB --gin.REMAT=True
    variator budget --gin_file=variator_xxl.gin --topology v5e:4x4 --hbm 16GiB \
        --gin.REMAT=True --gin.BATCH_SIZE=128
    """
    hbm_bytes = None if args.hbm is None else arguments.parse_bytes(args.hbm)
    if args.devices is not None and (args.topology or args.devices < 1):
        raise ConfigError(f"--devices {args.devices}: expected 1 or more, without --topology.")
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
    add("path", nargs="?", help="a run, backbone, T5X checkpoint, plugin, set of plugins or LoRA")
    add("--verify", action="store_true", help="also read every weight of a backbone")


@command("inspect", _gin_arguments, _inspect_arguments)
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
    tables = [folder / name for name in _REPORTS if (folder / name).is_file()]
    if not tables:
        raise ConfigError(f"{folder} is not that of a report: it has no {' or '.join(_REPORTS)}.")
    print(tables[0].read_text(encoding="utf-8").rstrip())
    for plot in sorted(folder.glob("*.png")):
        print(f"\nPlot: {plot}")


@command("bench", arguments.add_arguments)
def _bench(args: argparse.Namespace) -> None:
    """Time an encoder at several compression ratios, and its distillation step, on this device.

    variator bench --backbone t5_1_0_base --shape 4x256 --shape 1x512 --peer --output bench
    variator bench --backbone t5_1_1_xl --batch 32 --length 512 --dtype bfloat16 --peer
    variator bench --backbone t5_1_1_xl --batch 32 --length 512 --dtype bfloat16 --ratios 4 \
        --train --remat dots --microbatches 2
    """
    settings = arguments.settings_of(args)
    from variator_jax.bench import run

    run.run(settings, args.output)


def _convert_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", metavar="SRC", help="a folder or file on disk, or a URL such as gs://... of T5X")
    add("target", metavar="DST", help="a folder that does not exist yet")
    source = "what SRC is: hf (a Hugging Face folder on disk; nothing is downloaded), t5x or "
    source += "variator (backbones), official or t5x-run (plugins)"
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

    variator convert --from hf --to variator downloads/flan-t5-xl flan_t5_xl --dtype bf16
    variator convert --from t5x --to hf gs://BUCKET/checkpoint_1000000 t5_1_1_base
    variator convert --from variator --to t5x runs/nano_docs/backbone nano_t5x/checkpoint_0
    variator convert --from official --to variator plugin-t5_base-mux_4.pkl plugin \
        --backbone t5_base
    variator convert --from t5x-run MODEL_DIR/checkpoint_100000 plugin --backbone t5_1_1_xl
    """
    from variator_jax.store.formats import FORMATS, PLUGINS, convert, convert_plugin

    source, target = args.source_format, args.target_format
    check_known("--from is", source, (*FORMATS, *PLUGINS))
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
