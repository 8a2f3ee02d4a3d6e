"""What an engine runs: `train`, `eval`, `infer`, `export`, `precompile`; and `experiment`."""

from __future__ import annotations

import argparse
import shlex
import signal

from variator_jax import gin_utils
from variator_jax.commands import engines
from variator_jax.commands.registry import command, gin_arguments, process_arguments, run_arguments
from variator_jax.errors import ConfigError

# Commands that T5X alone has, and what to do without it.
_WITHOUT_T5X = {
    "export": "variator infer scores and decodes, and VariatorModel runs a plugin folder in Python",
    "precompile": "--dry_run shows what a run needs",
}


@command("train", gin_arguments, run_arguments, process_arguments)
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


@command("eval", gin_arguments, run_arguments)
def _eval(args: argparse.Namespace) -> None:
    """Evaluate a backbone with its compression plugins: quality, cost and latency per ratio.

    variator eval --gin_file=nano_docs.gin --gin_file=runs/eval.gin \
        --gin.MODEL_DIR=runs/nano_report --gin.INITIAL_CHECKPOINT_PATH=runs/nano_docs \
        --gin.PLUGIN_PATHS="('runs/nano_docs/pretrain_4',)"
    """
    if _prepare_builtin(args):
        from variator_jax.evaluation import evaluate

        gin_utils.configured(evaluate.evaluate)()


@command("infer", gin_arguments, run_arguments)
def _infer(args: argparse.Namespace) -> None:
    """Write a backbone's predictions, or scores of the targets, for every example of a task.

    variator infer --gin_file=nano_docs.gin --gin_file=tasks/docs_tasks.gin \
        --gin_file=runs/infer.gin --gin.CHECKPOINT_PATH=runs/nano_docs \
        --gin.PLUGIN_PATH=runs/nano_docs/pretrain_4 --gin.INFER_OUTPUT_DIR=runs/nano_answers
    """
    if _prepare_builtin(args):
        from variator_jax.evaluation import infer

        gin_utils.configured(infer.infer)()


@command("export", gin_arguments, run_arguments)
def _export(args: argparse.Namespace) -> None:
    """Write a TensorFlow SavedModel that scores or decodes; needs T5X.

    t5x export --gin_file=variator_base.gin --gin_file=runs/export.gin \
        --gin.CHECKPOINT_PATH=runs/base_4/checkpoint_60000 --gin.MODEL_OUTPUT_DIR=exported/1
    """
    _prepare_builtin(args)


@command("precompile", gin_arguments, run_arguments)
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
    if builtin and args.command in _WITHOUT_T5X:
        raise ConfigError(
            f"the built-in engine has no {args.command}: it is T5X's, and {engines.HOW}. "
            f"Without T5X, {_WITHOUT_T5X[args.command]}."
        )
    if builtin and args.t5x_flags:
        raise ConfigError(f"{' '.join(args.t5x_flags)}: a flag of T5X, not of the built-in engine.")
    overrides = engines.parse(
        args, engine, args.command, require=args.check or not args.dry_run, preflight=not args.check
    )
    if args.check:
        return False
    if args.dry_run:
        _print_plan(args.command, builtin)
    if builtin:
        engines.use_tfds_folder(args.tfds_data_dir)
        return not args.dry_run
    paths = [*args.gin_search_paths, *engine.search_paths(args.command)]
    flags = [*_t5x_flags(args), *args.t5x_flags]
    program = engines.command_line(args.command, args.gin_file, overrides, paths, flags)
    if not args.dry_run:
        engines.run_program(program)
    print(f"T5X's own command:\n  {shlex.join(program)}")
    return False


def _t5x_flags(args: argparse.Namespace) -> list[str]:
    """T5X's flags for the data folder, and for joining several processes of its training."""
    names = ("tfds_data_dir", "coordinator_address", "process_count", "process_index")
    values = {name: getattr(args, name, None) for name in names}
    flags = [f"--{name}={value}" for name, value in values.items() if value is not None]
    joined = any(values[name] is not None for name in names[1:])
    return [*flags, *(["--multiprocess_gpu"] if joined or vars(args).get("multiprocess") else [])]


def _print_plan(command_name: str, builtin: bool) -> None:
    """Prints the configuration, what it leaves open, and what the run will need."""
    print(gin_utils.resolved_config())
    missing = gin_utils.leave_unset()
    if builtin:
        from variator_jax.train import plan

        train_only = {} if command_name == "train" else {"optimizer": None}
        print(gin_utils.configured(plan.plan)(**train_only))
    else:
        from variator_jax import t5x_engine

        print(gin_utils.configured(t5x_engine.plan)())
    print(f"still to be set: {', '.join(missing) or 'nothing'}")


def _experiment_arguments(parser: argparse.ArgumentParser) -> None:
    progress = "print what is done and what is missing, and stop"
    parser.add_argument("--dry_run", action="store_true", help=progress)
    parser.add_argument("--tfds_data_dir", metavar="DIR", help="where TFDS keeps its datasets")


@command("experiment", gin_arguments, _experiment_arguments)
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

    engines.use_tfds_folder(args.tfds_data_dir)
    configs = drive.preflight(experiment, data=True)
    records = drive.drive(experiment, configs, grid.run_training, score.score_cell)
    print(report.report(experiment, records))
