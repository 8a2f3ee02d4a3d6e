"""`experiment`: a grid of backbones, tasks, arms, ratios and seeds, from training to tables."""

from __future__ import annotations

import argparse

from variator_jax.commands.table import command, gin_arguments
from variator_jax.errors import ConfigError


def _experiment_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dry_run", action="store_true", help="say what is done and what is missing, and stop"
    )
    parser.add_argument("--tfds_data_dir", metavar="DIR", help="where TFDS keeps its datasets")


@command(
    "experiment",
    "Run a grid of backbones, tasks, ratios and seeds; the same command goes on where it stopped.",
    (
        "variator experiment --gin_file=experiments/glue_small.gin --gin.TEXT_DIR=wiki "
        "--gin.GLUE_DIR=glue",
        "variator experiment --gin_file=experiments/glue_small.gin --gin.TEXT_DIR=wiki "
        '--gin.GLUE_DIR=glue --gin.SEEDS="(0,)" --dry_run',
    ),
    gin_arguments,
    _experiment_arguments,
)
def _experiment(args: argparse.Namespace) -> None:
    from variator_jax import gin_utils
    from variator_jax.commands import engines
    from variator_jax.commands.engine import own_search_paths, parse
    from variator_jax.experiment import drive, grid, preflight

    if args.engine not in (None, engines.BUILTIN):
        raise ConfigError("experiment runs on the built-in engine; leave --engine out.")
    parse(args, "train", engines.choose(engines.BUILTIN), require=True)
    experiment = gin_utils.configured(grid.Experiment)(search_paths=own_search_paths(args))
    if args.dry_run:
        preflight.ExperimentLock(experiment, preflight.preflight(experiment))
        print(drive.describe(experiment))
        return
    from variator_jax.experiment import report, score, stages

    if args.tfds_data_dir:
        import seqio

        seqio.set_tfds_data_dir_override(args.tfds_data_dir)
    configs = preflight.preflight(experiment, data=True)
    records = drive.drive(experiment, configs, stages.run_training, score.score_cell)
    print(report.report(experiment, records))
