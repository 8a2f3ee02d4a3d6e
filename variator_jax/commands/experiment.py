"""`experiment`: a grid of backbones, tasks, arms, ratios and seeds, from training to tables."""

from __future__ import annotations

import argparse

from variator_jax import gin_utils
from variator_jax.commands import engines
from variator_jax.commands.registry import command, gin_arguments
from variator_jax.errors import ConfigError


def _experiment_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dry_run", action="store_true", help="print what is done and what is missing, and stop"
    )
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
